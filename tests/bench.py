"""Speed and size of this repository's models, measured beside plain implementations and the papers' figures; a script, not a test.

    python tests/bench.py                  time and memory ratios plain / ours: single layers, then whole models
    python tests/bench.py --throughput     images/s of every variant, inference and training step
    python tests/bench.py --scaling        density peaks and key-only attention against plain ones over the number of tokens
    python tests/bench.py --dense          training steps of Mask R-CNN and pose: time, memory, share outside of matrix products
    python tests/bench.py --table          parameters and FLOPs of every model beside the papers' figures

Ratios. "Plain" is written the way the papers' own code is: channels-first maps, linear layers as 1x1 convolutions, explicit
softmax, expanded gathers or one-hot convolutions; ClusTR's, which is not public, as TCFormer's. It gets our weights; before timing,
outputs and input gradients must agree in float64 (float32 rounding can move a token to the next cluster). Ours and plain are then
called in turn, A B A B, after a warm-up, and medians compared: "forward" without gradient (models in eval mode), "f+b" forward and
backward (train mode, no stochastic depth). Layers see the stage shapes of 224-pixel images. Memory is that of f+b: on a GPU the peak
above what was allocated before, on the CPU what the finished graph keeps for backward (distinct storages without parameters; a
deterministic number).

Throughput. Repeated steps on one fixed batch for --seconds after a warm-up; a training step is forward, cross-entropy, backward and
AdamW. FLOPs (2 a multiply-add) are counted on one image's forward, three times as many for training; "of matmul" is FLOPs/s over the
rate of one large matrix product measured in the same run.

Table. Multiply-adds of one 224-pixel image's forward in eval mode. "No products" is what runs inside convolutions, linear layers and
norms, where a norm costs what fvcore, the usual counter of the papers, says: 5 an element of LayerNorm, 2 of BatchNorm. "All" adds
every matrix product outside layers that torch's flop counter sees, halved since it counts 2 a multiply-add: attention, STViT's
association, LinGlo's sum of keys. Seen by neither: ClusTR's clustering (distances, 1.5 N^2 C a layer that clusters, selection, pointer
doubling) and aggregation, SecViT's similarities, sorts and gathers, STViT's gathering and folding of neighbours, averages, softmax,
activations, element-wise products and sums. A figure matches if rounding ours to the digits that the paper prints gives the paper's,
FLOPs if either of ours does.

Scaling. Density peaks against one full distance matrix with top-k and a masked minimum; a layer of key-only attention against one of
fused dot-product attention, and LinGlo-b0 with either. "Exponent" is that of the growth from the row above. Memory is the peak of one
call above what was there before: allocated on a GPU, resident on the CPU (Linux). What would need more than the machine has is left out.

Dense. A training step around SecViT-S on random images with 8 objects each, or on random crops: forward, loss, backward, AdamW. "Outside"
is the share of the time, on a GPU of its kernels, that torch's profiler sees in anything but convolutions, matrix products and fused
attention: samplers, RoIAlign, NMS, norms, losses, the optimizer.

On CUDA: bfloat16 autocast, batch 128, throughput without and with torch.compile. On the CPU: float32, batch 8 for layers and 4 for
models, throughput of each file's smallest variant only unless --models names others. Where other jobs share the CPU, set
OMP_WAIT_POLICY=PASSIVE: threads that spin while waiting can make times ten times longer and ratios meaningless.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clustr
import linglo
import secvit
import stvit
import train_dense
import train_imagenet

CUDA = torch.cuda.is_available()
DEVICE, synchronize = (torch.device("cuda"), torch.cuda.synchronize) if CUDA else (torch.device("cpu"), lambda: None)
LAYER_BATCH, MODEL_BATCH = (128, 128) if CUDA else (8, 4)
WARMUP, LAYER_REPEATS, MODEL_REPEATS, STEPS_A_WAIT = (10, 50, 20, 10) if CUDA else (2, 15, 7, 1)    # calls of each
PIXELS = 224


# ------------------------------------------------------------------------------------------------ plain implementations
class PlainSECA(nn.Module):
    """SECA on (B, C, H, W)."""

    def __init__(self, dim, heads, clusters):
        super().__init__()
        self.heads, self.clusters = heads, clusters
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)                   # rows [all q | all k | all v]
        self.lce = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        N, d = H * W, C // self.heads
        qkv = self.qkv(x)
        lce = self.lce(qkv[:, 2 * C:])
        q, k, v = qkv.reshape(B, 3, self.heads, d, N).permute(1, 0, 2, 4, 3)            # (B, h, N, d)
        if self.clusters > 1:
            similarity = F.normalize(k, dim=-1) @ F.normalize(k.mean(2, keepdim=True), dim=-1).mT
            order = similarity.squeeze(-1).argsort(-1, descending=True)                 # (B, h, N)
            index = order[..., None].expand(-1, -1, -1, d)
            q, k, v = (t.gather(2, index).reshape(B, self.heads, self.clusters, -1, d) for t in (q, k, v))
        y = (q * d ** -0.5 @ k.mT).softmax(-1) @ v                                      # (B, h, K, M, d)
        if self.clusters > 1:
            back = order.sort(-1).indices[..., None].expand(-1, -1, -1, d)
            y = y.reshape(B, self.heads, N, d).gather(2, back)
        return self.proj(y.mT.reshape(B, C, H, W) + lce)


class PlainSTA(nn.Module):
    """Super token attention, one iteration, on (B, C, H, W) with sides that the cell side `grid` divides."""

    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)                   # rows head by head, each [q | k | v]
        self.proj = nn.Conv2d(dim, dim, 1)
        self.register_buffer("one_hot", torch.eye(9).reshape(9, 1, 3, 3), persistent=False)

    def attend(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).reshape(B, self.heads, -1, H * W).chunk(3, 2)             # (B, h, d, N)
        weights = (k.mT @ q * (C // self.heads) ** -0.5).softmax(-2)
        return self.proj((v @ weights).reshape(B, C, H, W))

    def unfold(self, x):
        """(B, C, H', W') -> (B, M, C, 9), the 3x3 cells around each cell."""
        B, C, H, W = x.shape
        around = F.conv2d(x.reshape(B * C, 1, H, W), self.one_hot, padding=1)           # (B*C, 9, H', W')
        return around.reshape(B, C * 9, H * W).mT.reshape(B, H * W, C, 9)

    def fold(self, x, H, W):
        """(B, M, C, 9) -> (B, C, H', W'), its adjoint."""
        B, _, C, _ = x.shape
        parts = x.permute(0, 2, 3, 1).reshape(B * C, 9, H, W)
        return F.conv_transpose2d(parts, self.one_hot, padding=1).reshape(B, C, H, W)

    def forward(self, x):
        if self.grid == 1:
            return self.attend(x)
        B, C, H, W = x.shape
        g, rows, columns = self.grid, H // self.grid, W // self.grid
        tokens = x.reshape(B, C, rows, g, columns, g).permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, g * g, C)
        with torch.no_grad():
            around = self.unfold(F.adaptive_avg_pool2d(x, (rows, columns)))
            association = (tokens @ around * C ** -0.5).softmax(-1)                     # (B, M, P, 9)
            share = self.fold(association.sum(2)[:, :, None], rows, columns)            # (B, 1, H', W')
        supers = self.attend(self.fold(tokens.mT @ association, rows, columns) / (share + 1e-12))
        y = self.unfold(supers) @ association.mT                                        # (B, M, C, P)
        return y.reshape(B, rows, columns, C, g, g).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def plain_density_peaks(x, k=5):
    """Density, distance to the nearest denser token and that token, each (B, N), of x (B, N, C), the way TCFormer's code does it."""
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5                                    # (B, N, N)
    density = (-distance.topk(k, largest=False).values.square().mean(2)).exp()
    denser = (density[:, None] > density[:, :, None]).to(x.dtype)
    largest = distance.flatten(1).amax(1)[:, None, None]
    delta, parent = (distance * denser + largest * (1 - denser)).min(2)
    return density, delta, parent


def plain_assign(density, delta, parent, clusters):
    """Clusters (B, N) of what `plain_density_peaks` returns."""
    gamma = (density * delta).scatter(1, density.argmax(1, keepdim=True), torch.inf)
    centres = gamma.topk(clusters).indices
    pointer = parent.scatter(1, centres, centres)
    for _ in range((parent.shape[1] - 1).bit_length()):
        pointer = pointer.gather(1, pointer)
    return (pointer[:, :, None] == centres[:, None]).int().argmax(2)


def plain_aggregate(x, score, index, clusters):
    """Softmax within clusters, then two sums: x (B, N, C), score and index (B, N) -> (B, M, C)."""
    weight = (score - score.amax(1, keepdim=True).detach()).exp()
    total = weight.new_zeros(len(x), clusters).scatter_add(1, index, weight)
    share = weight / total.gather(1, index)
    wide = index[..., None].expand_as(x)
    return torch.zeros_like(x[:, :clusters]).scatter_add(1, wide, x * share[..., None])


class PlainClusteringGuidedAttention(nn.Module):
    """Multi-scale clustering-guided attention on (B, C, H, W), one clustering a layer."""

    def __init__(self, dim, heads, ratios):
        super().__init__()
        self.heads, self.ratios = heads, ratios
        self.q, self.proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in ratios)
        self.reduce = nn.ModuleList(nn.Linear(dim, 1) for ratio in ratios if ratio > 1)

    def forward(self, x):
        B, C, H, W = x.shape
        q = self.q(x).reshape(B, self.heads, -1, H * W).mT                              # (B, h, N, d)
        tokens, scores, y = x.flatten(2).mT, iter(self.reduce), 0
        if self.reduce:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                peaks = plain_density_peaks(tokens.to(torch.promote_types(x.dtype, torch.float32)))
        for ratio, kv in zip(self.ratios, self.kv, strict=True):
            few = tokens
            if ratio > 1:
                clusters = -(-H * W // ratio)
                score = next(scores)(tokens).squeeze(2).to(tokens.dtype)
                few = plain_aggregate(tokens, score, plain_assign(*peaks, clusters), clusters)
            k, v = kv(few).reshape(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
            y = y + (q @ k.mT * k.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(y.mT.reshape(B, C, H, W))


class PlainKeyOnlyAttention(nn.Module):
    """Key-only attention on (B, C, H, W)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.k, self.v, self.u1, self.u2 = (nn.Conv2d(dim, dim, 1) for _ in range(4))
        self.saliency = nn.Parameter(torch.zeros(heads, dim // heads))

    def forward(self, x):
        B, C, H, W = x.shape
        heads, d = self.saliency.shape
        k = self.k(x)
        keys = k.reshape(B, heads, d, H * W)
        weights = ((keys * self.saliency[..., None]).sum(2, keepdim=True) * d ** -0.5).softmax(3)           # (B, h, 1, N)
        context = (weights * keys).sum(3).reshape(B, C, 1, 1)
        return self.u2(self.u1(context * self.v(x)) + k)


class PlainRPCPE(nn.Module):
    """Skip connection and four convolutions with BatchNorm on (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.BatchNorm2d(dim)) for _ in range(4))

    def forward(self, x):
        return x + sum(branch(x) for branch in self.branches)


class PlainPyramidBlock(nn.Module):
    """Attention and FFN behind LayerNorm on (B, C, H, W); `encoding`: (name, module) in front of the GELU."""

    def __init__(self, dim, attn, ratio, encoding):
        super().__init__()
        self.norm1, self.attn, self.norm2 = PlainLayerNorm(dim, eps=1e-6), attn, PlainLayerNorm(dim, eps=1e-6)
        self.encoding, module = encoding
        self.ffn = nn.ModuleDict({"fc1": nn.Conv2d(dim, ratio * dim, 1), self.encoding: module, "fc2": nn.Conv2d(ratio * dim, dim, 1)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn["fc2"](F.gelu(self.ffn[self.encoding](self.ffn["fc1"](self.norm2(x)))))


class PlainPyramid(nn.Module):
    """ClusTR or LinGlo: our embeddings, norms and head, stages of `block(dim, ratio of the FFN, heads, ...)`."""

    def __init__(self, ours, shapes, block):
        super().__init__()
        self.embeds, self.norms, self.head = copy.deepcopy((ours.embeds, ours.norms, ours.head))
        self.stages = nn.ModuleList(
            nn.Sequential(*(block(dim, ratio, *rest) for _ in stage))
            for stage, (dim, _, *rest), ratio in zip(ours.stages, shapes, (8, 8, 4, 4), strict=True))

    def forward(self, images):
        x = images
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            x = stage(embed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous())
            x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


class PlainBlock(nn.Module):
    """Depth-wise convolution, attention, FFN (`conv`: with a residual 3x3 depth-wise one), each with a shortcut; no layer scale."""

    def __init__(self, dim, attn, norm2, ratio, conv=False):
        super().__init__()
        wide = ratio * dim
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.attn, self.norm2 = PlainLayerNorm(dim, eps=1e-6), attn, norm2
        self.ffn = nn.ModuleDict({"fc1": nn.Conv2d(dim, wide, 1), "fc2": nn.Conv2d(wide, dim, 1)})
        if conv:
            self.ffn["conv"] = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)

    def forward(self, x):
        x = x + self.cpe(x)
        x = x + self.attn(self.norm1(x))
        y = F.gelu(self.ffn["fc1"](self.norm2(x)))
        if "conv" in self.ffn:
            y = y + self.ffn["conv"](y)
        return x + self.ffn["fc2"](y)


class PlainModel(nn.Module):
    """A whole model on channels-first memory: our stem, downsamples and head, stages of `block(dim, heads, clusters or grid)`."""

    def __init__(self, ours, shapes, block):
        super().__init__()
        self.stem, self.downsamples, self.proj, self.head = copy.deepcopy((ours.stem, ours.downsamples, ours.proj, ours.head))
        self.stages = nn.ModuleList(
            nn.Sequential(*(block(dim, *rest) for _ in stage)) for stage, (dim, _, *rest) in zip(ours.stages, shapes, strict=True))

    def forward(self, images):
        x = self.stem(images)
        for i, stage in enumerate(self.stages):
            x = stage(self.downsamples[i - 1](x) if i else x)
        return self.head(self.proj(x).mean((2, 3)))


class Entry(NamedTuple):
    """A model of the ratio tables; layers are built from a stage's shape without its side, ours on (B, H, W, C)."""
    build: Callable
    layer: Callable
    plain_layer: Callable
    plain_model: Callable       # (our model, shapes) -> its twin
    shapes: tuple               # a stage each: channels, side of the map at 224 pixels, heads, what else the layer takes


MODELS = {
    "clustr_t": Entry(
        clustr.clustr_t, clustr.ClusteringGuidedAttention, PlainClusteringGuidedAttention,
        functools.partial(PlainPyramid, block=lambda dim, ratio, heads, ratios: PlainPyramidBlock(
            dim, PlainClusteringGuidedAttention(dim, heads, ratios), ratio,
            ("conv", nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)))),
        ((64, 56, 1, (64, 16)), (128, 28, 2, (16, 4)), (256, 14, 4, (4, 1)), (512, 7, 8, (1,)))),
    "secvit_t": Entry(
        secvit.secvit_t, secvit.SECA, PlainSECA,
        functools.partial(PlainModel, block=lambda dim, heads, clusters: PlainBlock(
            dim, PlainSECA(dim, heads, clusters), PlainLayerNorm(dim, eps=1e-6), ratio=3)),
        ((64, 56, 2, 32), (128, 28, 4, 8), (256, 14, 8, 2), (512, 7, 16, 1))),
    "linglo_b0": Entry(
        linglo.linglo_b0, linglo.KeyOnlyAttention, PlainKeyOnlyAttention,
        functools.partial(PlainPyramid, block=lambda dim, ratio, heads: PlainPyramidBlock(
            dim, PlainKeyOnlyAttention(dim, heads), ratio, ("cpe", PlainRPCPE(ratio * dim)))),
        ((32, 56, 1), (64, 28, 2), (160, 14, 5), (256, 7, 8))),
    "stvit_s": Entry(
        stvit.stvit_s, lambda dim, heads, grid: stvit.SuperTokenAttention(dim, heads, (grid, grid)), PlainSTA,
        functools.partial(PlainModel, block=lambda dim, heads, grid: PlainBlock(
            dim, PlainSTA(dim, heads, grid), nn.BatchNorm2d(dim), ratio=4, conv=True)),
        ((64, 56, 1, 8), (128, 28, 2, 4), (320, 14, 5, 1), (512, 7, 8, 1))),
}
VARIANTS = {name: getattr(module, name) for module in (clustr, secvit, linglo, stvit) for name in module.VARIANTS}
VARIANTS |= {f"{name}_released": functools.partial(VARIANTS[name], released=True) for name in secvit.VARIANTS if name.startswith("secvit_")}


# --------------------------------------------------------------------------------------------------------------- ratios
def share_weights(ours, plain):
    """Move our parameters off their initial 0 and 1, then copy them: q, k, v in one matrix, linear layers as 1x1 convolutions."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    source, state = ours.state_dict(), {}
    for name, value in plain.state_dict().items():
        tensor = source[name] if name in source else torch.cat([source[name.replace("qkv", part)] for part in "qkv"])
        state[name] = tensor.reshape(value.shape)
    plain.load_state_dict(state)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())


def assert_equal(ours, plain, x, channels_last):
    """Outputs and input gradients of both agree in float64 on x (B, C, H, W)."""
    ours, plain, x = copy.deepcopy(ours).double(), copy.deepcopy(plain).double(), x.double().requires_grad_()
    y = ours(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if channels_last else ours(x)
    expected = plain(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))


def autocast():
    """Entered anew each step, since its cache of cast weights lives as long as it does."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)


def run(module, x, grad=None):
    """Forward without gradient, or forward and backward where the output's gradient is given."""
    with torch.set_grad_enabled(grad is not None), autocast():
        y = module(x)
    if grad is not None:
        torch.autograd.grad(y, [*module.parameters()] + [x] * x.requires_grad, grad)
    return y.detach()


def milliseconds(function):
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def race(functions, repeats):
    """Median milliseconds of each function, called in turn after a warm-up."""
    for function in functions * WARMUP:
        function()
    rounds = [[milliseconds(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def training_mib(module, x, grad):
    """CUDA: peak of forward and backward above what was allocated before. CPU: what the graph of forward keeps for backward."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(module, x, grad)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    saved = []                                                  # weak: a graph dropped on the way, of a sort key say, does not count

    def pack(tensor):
        tensor = tensor.detach()
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    storages = [tensor.untyped_storage() for reference in saved if (tensor := reference()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert y.requires_grad                                      # it has held the graph until here
    return sum(sizes[address] for address in sizes.keys() - {p.data_ptr() for p in module.parameters()}) / 2 ** 20


def compare(name, ours, plain, x, repeats, channels_last=False):
    """Print one row of a ratio table; x (B, C, H, W); layers take and give channels-last maps, models images."""
    share_weights(ours, plain)
    ours, plain, x = ours.to(DEVICE), plain.to(DEVICE), x.to(DEVICE)
    assert_equal(ours, plain, x[:2], channels_last)
    sides = []
    for module, own in ((ours, x.permute(0, 2, 3, 1).contiguous() if channels_last else x.clone()), (plain, x)):
        own.requires_grad_(channels_last)                       # layers pass a gradient on, images do not
        sides.append((module, own, torch.randn_like(run(module, own))))
    cells = race([functools.partial(run, module.eval(), own) for module, own, _ in sides], repeats)
    cells += race([functools.partial(run, module.train(), own, grad) for module, own, grad in sides], repeats)
    cells += [training_mib(*side) for side in sides]
    pairs = zip(cells[::2], cells[1::2], strict=True)
    print_row(name, *(text for a, b in pairs for text in (f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}")))


def ratios(names, batch):
    """Print two tables: the layers of the named models at every stage's shape, then the whole models."""
    memory = "peak MiB" if CUDA else "kept MiB"
    columns = ["forward ms", "plain", "ratio", "f+b ms", "plain", "ratio", memory, "plain", "ratio"]
    print_header(f"layer, batch {batch or LAYER_BATCH}", *columns)
    for name, stage in itertools.product(names, range(4)):
        dim, side, *rest = MODELS[name].shapes[stage]
        layers = (build(dim, *rest) for build in (MODELS[name].layer, MODELS[name].plain_layer))
        x = torch.randn(batch or LAYER_BATCH, dim, side, side)
        compare(f"{name} stage {stage + 1}", *layers, x, LAYER_REPEATS, channels_last=True)
    print_header(f"model, batch {batch or MODEL_BATCH}", *columns)
    for name in names:
        ours = MODELS[name].build(drop_path_rate=0.0)
        images = torch.randn(batch or MODEL_BATCH, 3, PIXELS, PIXELS)
        compare(name, ours, MODELS[name].plain_model(ours, MODELS[name].shapes), images, MODEL_REPEATS)


# ---------------------------------------------------------------------------------------------------------------- table
PAPERS = {  # as printed: parameters (M), multiply-adds (G) at 224 x 224, top-1 (%) on ImageNet-1K
    "clustr_t": ("11.7", "2.2", "80.2"), "clustr_s": ("22.7", "4.8", "83.2"), "clustr_b": ("40.2", "7.5", "84.1"),
    "secvit_t": ("15", "2.5", "82.6"), "secvit_s": ("27", "4.4", "84.2"), "secvit_b": ("55", "9.7", "85.0"),
    "secvit_l": ("96", "18.1", "85.6"),
    "sec_swin_t": ("29", "4.9", "83.6"), "sec_swin_s": ("50", "9.3", "84.8"),
    "sec_fastervit_0": ("25", "3.6", "82.6"), "sec_fastervit_1": ("41", "5.6", "83.8"),
    "linglo_b0": ("3.4", "-", "72.5"), "linglo_b1": ("13.1", "-", "79.7"), "linglo_b2": ("25.4", "-", "82.7"),
    "stvit_s": ("25", "4.4", "83.6; at 384: 85.0"), "stvit_b": ("52", "9.9", "84.8; at 384: 86.0"),
    "stvit_l": ("95", "15.6", "85.3; at 384: 86.4"),
}
REASONS = {  # of figures that do not match, by a pattern for column and model
    r"FLOPs of clustr_.": "the paper counts attention products as if all models had the reductions 64, 16, 4, 1",
    r"(parameters|FLOPs) of secvit_[sb]": "the paper's figure is that of the released model, in the row below",
    r"FLOPs of secvit_l.*": "18.1 fits neither model, nor the paper's detection table, whose growth from SecViT-B to -L agrees with ours",
    r"parameters of linglo_.*": "no reading of the text gives the printed sizes, which disagree with the paper's own dense tables",
    r"parameters of sec_swin_t": "the paper prints 29 for Swin-T, too, which has 28.29 M",
    r"FLOPs of sec_swin_.": "a plain swap of the attention, as the text has it, costs less than the paper says",
    r"FLOPs of sec_fastervit_.": "SECA in stage 3 alone, which gives the printed parameters, costs less than the paper says, and so "
                                 "does the text's in stages 3 and 4 (3.26 and 5.07)",
}


def complexity(build, pixels=PIXELS):
    """Parameters of what `build` returns and the multiply-adds of one image's forward, without and with products outside layers.

    Nothing is computed. Attention is decomposed, since torch's counter does not know every fused kernel.
    """
    layers, norms = [], []

    def count(module, _inputs, output):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            norms.append(output.numel() * (5 if isinstance(module, nn.LayerNorm) else 2))

    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = build().eval()
        for module in model.modules():
            module.register_forward_hook(count)
        model(torch.empty(1, 3, pixels, pixels))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, sum(layers + norms), counter.get_total_flops() // 2 + sum(norms)


def table():
    """Print papers' figures and ours for every model, SecViT also as released and LinGlo also deployed, and why some do not match."""
    print_header("model", "paper, M", "ours, M", "paper, G", "ours, no products", "ours, all", "paper's top-1", "our ImageNet-1K run")
    unequal = {}                                                # column and reason -> models
    for name, build in train_imagenet.MODELS.items():
        forms = {name: build}
        if name.startswith("secvit"):
            forms[f"{name}, released"] = VARIANTS[f"{name}_released"]
        elif name.startswith("linglo"):
            forms[f"{name}, deployed"] = lambda build=build: build().reparameterize()
        parameters, flops, accuracy = PAPERS[name]
        for form, build in forms.items():
            top_1 = "-" if form.startswith("secvit") and form == name else accuracy                 # the paper's are the released models'
            millions, *billions = (count / scale for count, scale in zip(complexity(build), (1e6, 1e9, 1e9)))
            print_row(form, parameters, f"{millions:.2f}", flops, *(f"{count:.2f}" for count in billions), top_1, "not run")
            for column, printed, ours in (("parameters", parameters, [millions]), ("FLOPs", flops, billions)):
                digits = len(printed.partition(".")[2])
                if printed != "-" and printed not in [f"{count:.{digits}f}" for count in ours]:
                    reasons = [reason for pattern, reason in REASONS.items() if re.fullmatch(pattern, f"{column} of {form}")]
                    unequal.setdefault((column, reasons[0] if reasons else "not explained"), []).append(form.replace(",", ""))
    print()
    for (column, reason), forms in unequal.items():
        print(f"- {column} of {', '.join(forms)}: {reason}.")


# ----------------------------------------------------------------------------------------------------------- throughput
def matmul_rate():
    """FLOPs/s of a large square matrix product in the type that the models run in."""
    size = 8192 if CUDA else 2048
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32)
    return STEPS_A_WAIT * 2 * size ** 3 / (1e-3 * race([lambda: [a @ b for _ in range(STEPS_A_WAIT)]], LAYER_REPEATS)[0])


def make_step(build, batch, compiled, training):
    """Build a model; returns a function that does one inference or training step with it."""
    model = build().to(DEVICE).train(training)
    module = torch.compile(model) if compiled else model
    images, labels = torch.randn(batch, 3, PIXELS, PIXELS, device=DEVICE), torch.randint(1000, (batch,), device=DEVICE)
    if not training:
        return functools.partial(run, module, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=CUDA)

    def step():
        with autocast():
            loss = F.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def steps_per_second(step, seconds):
    """Warm up, then call `step` for that long, waiting for a GPU every few calls; a GPU's peak memory counts from here."""
    race([step], repeats=1)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or not steps:
        for _ in range(STEPS_A_WAIT):
            step()
        synchronize()
        steps += STEPS_A_WAIT
    return steps / elapsed


def throughput(names, batch, seconds):
    """Print the throughput table of the named variants; a configuration that fails, out of memory say, gives its reason instead."""
    rate = matmul_rate()
    print(f"matrix product: {rate / 1e12:.3g} TFLOP/s")
    print_header(f"variant, batch {batch}", "GFLOPs", "step", "compiled", "images/s", "peak GiB", "of matmul")
    for name in names:
        flops = 2 * complexity(VARIANTS[name])[2]
        for compiled, training in itertools.product((False, True) if CUDA else (False,), (False, True)):
            try:
                speed = batch * steps_per_second(make_step(VARIANTS[name], batch, compiled, training), seconds)
                peak = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.2f}" if CUDA else "-"
                results = f"{speed:.1f}", peak, f"{speed * flops * (3 if training else 1) / rate:.1%}"
            except RuntimeError as error:
                results = "failed", "-", f"{type(error).__name__}: {error}".strip().splitlines()[0].replace("|", "/")
            print_row(name, f"{flops / 1e9:.2f}", "training" if training else "inference", "yes" if compiled else "no", *results)
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()                            # nothing without CUDA


# ---------------------------------------------------------------------------------------------------------- dense tasks
DENSE = {  # task: batch, height, width
    "mask_rcnn": (2, 800, 1344) if CUDA else (2, 160, 256), "pose": (64, 256, 192) if CUDA else (8, 128, 96)}


def dense_step(task, B, H, W):
    """A function that does one training step of a dense task around SecViT-S."""
    model = train_dense.build_model(task, "secvit_s", 133 if task == "pose" else 80).to(DEVICE).train()
    optimizer, side = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=CUDA), torch.tensor([W, H], device=DEVICE)
    images, points = torch.randn(B, 3, H, W, device=DEVICE), torch.rand(B, 133, 3, device=DEVICE)
    corner, size = 0.5 * torch.rand(B, 8, 2, device=DEVICE) * side, (0.1 + 0.4 * torch.rand(B, 8, 2, device=DEVICE)) * side
    truth = side.flip(0).expand(B, 2), torch.cat([corner, corner + size], 2), torch.randint(80, (B, 8), device=DEVICE)
    masks = torch.ones(8 * B, H, W, dtype=torch.bool, device=DEVICE)
    points[..., :2] *= side

    def step():
        with autocast():
            loss = train_dense.pose_loss(model(images), points) if task == "pose" else model(images, *truth, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def outside_products(step):
    """The share of a step's time outside of convolutions, matrix products and fused attention."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA][:1 + CUDA]) as profile:
        step()
        synchronize()
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]  # kernels count in theirs
    times = {event.key: event.self_device_time_total if CUDA else event.self_cpu_time_total for event in events}
    return 1 - sum(time for name, time in times.items() if re.search(r"conv|mm\b|attention", name)) / sum(times.values())


def dense():
    """Print time, memory and share outside of matrix products of training steps of dense tasks."""
    print_header("training, secvit_s", "batch", "size", "ms", "peak GiB", "outside")
    for task, (B, H, W) in DENSE.items():
        step = dense_step(task, B, H, W)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        ms, = race([step], MODEL_REPEATS)
        peak = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.2f}" if CUDA else "-"
        print_row(task, str(B), f"{H} x {W}", f"{ms:.1f}", peak, f"{outside_products(step):.1%}")


# -------------------------------------------------------------------------------------------------------------- scaling
def return_memory():
    """Make the C library give large blocks back when they are freed; it slows allocation down, so not where time is measured."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)                      # M_MMAP_THRESHOLD, bytes


def peak_mib(function):
    """Peak memory of one call above what was there before, after a call for warmth."""
    function()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")               # the peak starts anew
    status = re.compile(r"VmHWM:\s*(\d+) kB")
    before = int(status.search(Path("/proc/self/status").read_text())[1])
    function()
    return (int(status.search(Path("/proc/self/status").read_text())[1]) - before) / 1024


def machine_mib():
    """Memory of the device."""
    if CUDA:
        return torch.cuda.mem_get_info()[1] / 2 ** 20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 20


def time_pair(pair):
    """Milliseconds of functions: medians in turn, or one measurement each after one for warmth where they take seconds."""
    slow = sum(milliseconds(function) for function in pair) > 2000
    return [milliseconds(function) for function in pair] if slow else race(pair, LAYER_REPEATS)


def print_growth(title, rows, times, memory):
    """A table of rows (name, N, functions ours and perhaps plain) with their times and memory."""
    print_header(title, "ms", "exponent", "plain", "exponent", "ratio", "MiB", "plain", "ratio")
    for i, ((name, N, _), ms, mib) in enumerate(zip(rows, times, memory, strict=True)):
        grown = [""] * len(ms)
        if i:
            grown = [f"{math.log(now / before) / math.log(N / rows[i - 1][1]):.2f}" for now, before in zip(ms, times[i - 1])]
        cells = [f"{ms[0]:.1f}", grown[0], *(["-"] * 3 if len(ms) == 1 else [f"{ms[1]:.1f}", grown[1], f"{ms[1] / ms[0]:.2f}"])]
        print_row(name, *cells, f"{mib[0]:.1f}", *(["-"] * 2 if len(ms) == 1 else [f"{mib[1]:.1f}", f"{mib[1] / mib[0]:.1f}"]))


def scaling():
    """Print how clustering and key-only attention grow with the number of tokens, and what share of training clustering takes."""
    peaks = []
    for B, N in ((4, 3136), (1, 3136), (1, 12544), (1, 66800)):
        x = F.layer_norm(torch.randn(B, N, 64, device=DEVICE), (64,))
        pair = [functools.partial(function, x) for function in (clustr.density_peaks, plain_density_peaks)]
        need = 3 * 4 * B * N ** 2 / 2 ** 20                     # MiB: distances, those of denser tokens, one copy on the way
        peaks.append((f"{B} x {N}", N, pair[:1] if need > machine_mib() else pair))
    layers = []
    for side in (56, 80, 112, 160, 256):
        x = torch.randn(1, side, side, 32, device=DEVICE, requires_grad=True)
        pair = [functools.partial(run, layer(32, 1).to(DEVICE), x, torch.randn_like(x))
                for layer in (linglo.KeyOnlyAttention, linglo.DotProductAttention)]
        layers.append((f"{side} x {side}", side ** 2, pair))
    images, grad = torch.randn(MODEL_BATCH, 3, PIXELS, PIXELS, device=DEVICE), torch.randn(MODEL_BATCH, 1000, device=DEVICE)
    models = [linglo.linglo_b0(drop_path_rate=0.0, attention=attention).to(DEVICE) for attention in ("key-only", "dot")]
    forward = [functools.partial(run, copy.deepcopy(model).eval(), images) for model in models]
    both = [functools.partial(run, model, images, grad) for model in models]
    tables = [("density peaks, batch 4", peaks[:1]), ("density peaks", peaks[1:]), ("key-only layer, f+b", layers),
              (f"linglo_b0, batch {MODEL_BATCH}", [("forward", 1, forward)]),
              (f"linglo_b0, batch {MODEL_BATCH}", [("forward + backward", 1, both)])]
    times = [[time_pair(pair) for _, _, pair in rows] for _, rows in tables]
    share = clustering_share()
    with contextlib.ExitStack() as stack:
        measure = peak_mib
        if not CUDA:                                            # in a process of its own
            pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), return_memory))
            measure = lambda function: pool.submit(peak_mib, function).result()  # noqa: E731
        memory = [[[measure(function) for function in pair] for _, _, pair in rows] for _, rows in tables]
    for (title, rows), ms, mib in zip(tables, times, memory, strict=True):
        print_growth(title, rows, ms, mib)
    print(f"\nclustering takes {share:.1%} of a training step of clustr_t, batch {MODEL_BATCH}")


def clustering_share():
    """The part of a ClusTR-T training step that `cluster_tokens` takes."""
    step, spent, cluster_tokens = make_step(clustr.clustr_t, MODEL_BATCH, compiled=False, training=True), [], clustr.cluster_tokens

    def timed(*given):
        index = None

        def call():
            nonlocal index
            index = cluster_tokens(*given)
        spent.append(milliseconds(call))
        return index
    clustr.cluster_tokens = timed
    race([step], repeats=1)
    spent.clear()
    total = sum(milliseconds(step) for _ in range(MODEL_REPEATS))
    clustr.cluster_tokens = cluster_tokens
    return sum(spent) / total


# --------------------------------------------------------------------------------------------------------------- output
def print_row(name, *cells):
    print(f"| {name:<20} | " + " | ".join(f"{cell:>10}" for cell in cells) + " |", flush=True)


def print_header(*titles):
    print()
    print_row(*titles)
    print(f"|{'-' * 22}|" + f"{'-' * 11}:|" * (len(titles) - 1), flush=True)


def device_name():
    """The GPU's name, or the CPU's where Linux tells it, its architecture elsewhere."""
    cpus = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpus.read_text() if cpus.exists() else "")
    return torch.cuda.get_device_name() if CUDA else f"{cpu[1] if cpu else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def main():
    parser = argparse.ArgumentParser(description="Compare the models with plain implementations, or measure their throughput.")
    parser.add_argument("--throughput", action="store_true", help="images/s of the variants instead of ratios")
    parser.add_argument("--scaling", action="store_true", help="growth with the number of tokens instead of ratios")
    parser.add_argument("--dense", action="store_true", help="training steps of dense tasks instead of ratios")
    parser.add_argument("--table", action="store_true", help="parameters and FLOPs beside the papers' figures instead of ratios")
    parser.add_argument("--models", help="comma-separated names; default: all, for throughput on the CPU the smallest")
    parser.add_argument("--batch", type=int, help="images at once; default: 128 on CUDA, 8 for layers and 4 for models on the CPU")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each throughput is measured after the warm-up")
    parser.add_argument("--threads", type=int, help="torch's CPU threads; default: torch's choice")
    args = parser.parse_args()
    known = VARIANTS if args.throughput else MODELS
    usual = [name for name in known if CUDA or name.removesuffix("_released") in MODELS]
    names = args.models.split(",") if args.models else usual
    if not set(names) <= known.keys():
        parser.error(f"--models {args.models}, expected some of {','.join(known)}")
    if args.table:
        return table()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    print(f"torch {torch.__version__}, {device_name()}, {torch.get_num_threads()} threads, "
          f"{'bfloat16 autocast' if CUDA else 'float32'}, `{shlex.join(['python', *sys.argv])}`", flush=True)
    if args.throughput:
        throughput(names, args.batch or MODEL_BATCH, args.seconds)
    elif args.scaling:
        scaling()
    elif args.dense:
        dense()
    else:
        ratios(names, args.batch)


if __name__ == "__main__":
    main()
