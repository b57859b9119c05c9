"""Speed and size of the models, beside plain implementations and the papers' values; not a test.

    python tests/bench.py                  time and memory ratios of single layers and whole models
    python tests/bench.py --throughput     images/s of every variant, inference and training
    python tests/bench.py --scaling        growth of clustering and attention with the tokens, and
                                           LinGlo's Fig. 4 as a figure, see --figure
    python tests/bench.py --dense          training steps of Mask R-CNN and pose
    python tests/bench.py --gpu            all that needs a GPU, in 9 minutes and one table
    python tests/bench.py --table          parameters and FLOPs of every model and of the rows of
                                           the papers' ablation and dense tables

Measuring. On CUDA: bfloat16 autocast, batch 128. On the CPU: float32, batch 8 for layers and 4 for
models. Use a quiet machine. Where other jobs share the CPU, set OMP_WAIT_POLICY=PASSIVE: threads
that spin while they wait can make times ten times longer and ratios meaningless. A published value
needs the printed first line (torch, device, threads, command); repeat the command, since one run
gives medians, not their spread. On 2 cores of an AMD EPYC the ratio of SecViT's stage 1, forward,
was 2.18 in one run and 1.65 in another, on those of an Intel Xeon 1.67.

Ratios. "Plain" is written the way the papers' own code is: channels-first maps, linear layers as
1x1 convolutions, explicit softmax, expanded gathers or one-hot convolutions. ClusTR's follows the
authors' density peaks (one full distance matrix), on channels-first maps and with our cluster
assignment, score layers and FFN, so that outputs can agree. LinGlo's is written from the text.
Plain modules get our weights, and before timing outputs and input gradients must agree in float64
(float32 rounding can move a token to the next cluster). Ours and plain are then called in turn,
A B A B, after a warm-up; the table has each one's median and the ratio of medians, plain / ours.
"forward" is without gradient, in eval mode, where our LinGlo folds its branches and the plain one
does not; "f+b" is forward and backward in train mode without stochastic depth. Layers see the stage
shapes of 224-pixel images. Memory is that of f+b: on a GPU the peak above what was allocated
before; on the CPU what the finished graph keeps for backward (distinct storages without
parameters), a deterministic number. Layers without clustering are plain attention between matrix
products, so little can be gained there.

Measured. On 2 cores of an AMD EPYC (AVX2), torch 2.13.0+cpu, `OMP_WAIT_POLICY=PASSIVE`, one run:
ratios of layers, forward and f+b; ms of models, ours and plain, and their ratio.

              stage 1     stage 2     stage 3     stage 4
    clustr_t  4.09, 3.70  1.81, 1.62  1.21, 1.13  1.31, 1.24
    secvit_t  1.65, 2.42  1.66, 2.31  1.36, 1.30  1.25, 1.20
    linglo_b0 1.54, 1.43  1.55, 1.40  1.39, 1.33  1.56, 1.52
    stvit_s   2.16, 2.01  1.48, 1.52  1.18, 1.21  1.19, 1.20

              forward               f+b                   kept MiB
    clustr_t  529.2, 1118.5: 2.11   1025.4, 1896.0: 1.85  349.5, 374.0: 1.07
    secvit_t  338.7, 480.3: 1.42    1288.8, 1795.2: 1.39  362.3, 445.8: 1.23
    linglo_b0 118.2, 270.4: 2.29    648.5, 882.0: 1.36    420.7, 420.9: 1.00
    stvit_s   510.2, 608.4: 1.19    1547.3, 2043.2: 1.32  544.9, 578.7: 1.06

Throughput. Repeated steps on one fixed batch for --seconds after a warm-up; a training step is
forward, cross-entropy, backward and AdamW. On CUDA without and with torch.compile; on the CPU only
the smallest variant of each file unless --models names others. FLOPs (2 per multiply-add) are
counted on one image's forward, three times as many for training; LinGlo's inference, which folds
its branches, has those of the deployed model. "of matmul" is FLOPs/s over the rate of one large
matrix product measured in the same run.

Scaling. Density peaks against one full distance matrix with top-k and a masked minimum; a layer of
key-only attention against one of fused dot-product attention, and LinGlo-b0 with either.
"exponent" is that of the growth from the row above. Memory is the peak of one call above what was
there before: allocated on a GPU, resident on the CPU (Linux), in a process in which glibc returns
freed blocks at once. What would need more than the machine's memory is left out. Fig. 4 of LinGlo
is forward and backward of LinGlo-b0, batch 16, with key-only attention and with fused and explicit
dot-product attention. On the CPU it has batch 1, small images and two minutes.

Dense. A training step around SecViT-S on random images with 8 objects each, or on random crops:
forward, loss, backward, AdamW. "outside" is the fraction of the time (on a GPU: of its kernels)
that torch's profiler sees outside of convolutions, matrix products and fused attention: samplers,
RoIAlign, NMS, norms, losses, the optimizer.

GPU. In this order, until the time is over: tests that use the GPU, each model against itself on the
CPU (largest difference of the logits over the largest logit) and against itself (gradients of two
equal steps with deterministic algorithms), eager steps of every variant, the fraction of ClusTR's
training steps that clustering takes, steps of the dense tasks, and compiled steps: torch.compile's
default, and for training also "reduce-overhead", which captures CUDA graphs. "waits" counts the
calls of one step that wait for the GPU, as far as torch's debug mode sees them. A row that fails
gives the reason.

Table. Multiply-adds of one 224-pixel image's forward in train mode. "no products" is what runs
inside convolutions, linear layers and norms, where a norm costs what fvcore, the papers' usual
counter, says: 5 per element of LayerNorm, 2 of BatchNorm. "all" adds every matrix product outside
layers that torch's flop counter sees, halved since it counts 2 per multiply-add: attention,
STViT's association, LinGlo's sum of keys. Neither has ClusTR's clustering (distances, 1.5 N^2 C
per layer that clusters, selection, pointer doubling) and aggregation, SecViT's similarities, sorts
and gathers, STViT's gathering and folding of neighbours, averages, softmax, activations,
element-wise products and sums. A value matches the paper's if rounding ours to the paper's digits
gives it; FLOPs match if either of ours does. The README has the first table. Then follow the rows
of the ablation tables with what builds them and FLOPs "as the paper counts": ClusTR's are layers
and attention products as if the reductions were 64, 16, 4, 1; SecViT's are layers alone; STViT's
have gathering and folding, too; SEC-Swin's are "all"; LinGlo's paper has none. Dense tables have
80 classes for detection, 150 for segmentation. LinGlo is deployed.

The README's pictures of mechanisms have weights trained on cifar10, 5,000 + 1,000 CIFAR-10 images
as JPEG folders; for the other models with --model clustr_t, linglo_b0, stvit_s --epochs 10:
    python train_imagenet.py --model secvit_t --epochs 12 --data cifar10 --img-size 64 \\
        --output runs/cifar_secvit_t --batch-size 64 --lr 4e-4 --warmup-epochs 1 --mixup 0 \\
        --cutmix 0 --randaug none --random-erase 0 --repeated-aug 1 --min-crop 0.5 --test-crop 1 \\
        --drop-path 0 --ema 0 --workers 0

Peak memory of a whole process, for one 800 x 1333 image (66,800 tokens in stage 1):

    MALLOC_MMAP_THRESHOLD_=65536 python -c "import resource, torch, clustr
    torch.set_grad_enabled(False)
    clustr.clustr_t().eval()(torch.randn(1, 3, 800, 1333))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)"

prints GiB. The variable makes glibc return freed blocks; without it ClusTR-T needed 2.4 GiB more,
ClusTR-S 5.4 and the other models up to 0.1.
"""
import argparse
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
import signal
import statistics
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import paper_tables

import clustr
import linglo
import secvit
import stvit
import train_dense
import train_imagenet

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LAYER_BATCH = 128 if CUDA else 8
MODEL_BATCH = 128 if CUDA else 4
WARMUP = 10 if CUDA else 2              # calls before timing
LAYER_REPEATS = 50 if CUDA else 15      # timed calls, of which the median is printed
MODEL_REPEATS = 20 if CUDA else 7
STEPS_PER_WAIT = 10 if CUDA else 1      # steps that are queued before waiting for the GPU
PIXELS = 224
MIB = 2 ** 20
GIB = 2 ** 30


# ---------------------------------------------------------- plain implementations: attention layers
class PlainSECA(nn.Module):
    """SECA on (B, C, H, W)."""

    def __init__(self, dim, heads, clusters):
        super().__init__()
        self.heads = heads
        self.clusters = clusters
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)                   # rows [all q | all k | all v]
        self.lce = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        d = C // self.heads
        qkv = self.qkv(x)                                       # (B, 3*C, H, W)
        lce = self.lce(qkv[:, 2 * C:])
        qkv = qkv.reshape(B, 3, self.heads, d, H * W)
        q, k, v = qkv.permute(1, 0, 2, 4, 3)                    # (B, h, N, d)
        if self.clusters > 1:
            order = self.cluster_order(k)                       # (B, h, N)
            q, k, v = (self.cut(t, order) for t in (q, k, v))   # (B, h, K, N_c, d)
        y = (q * d ** -0.5 @ k.mT).softmax(-1) @ v
        if self.clusters > 1:
            restore = order.sort(-1).indices
            restore = restore[..., None].expand(-1, -1, -1, d)
            y = y.flatten(2, 3).gather(2, restore)              # (B, h, N, d)
        return self.proj(y.mT.reshape(B, C, H, W) + lce)

    def cluster_order(self, k):
        centre = F.normalize(k.mean(2, keepdim=True), dim=-1)
        similarity = F.normalize(k, dim=-1) @ centre.mT         # (B, h, N, 1)
        return similarity.squeeze(-1).argsort(-1, descending=True)

    def cut(self, x, order):
        index = order[..., None].expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, index).unflatten(2, (self.clusters, -1))


class PlainSTA(nn.Module):
    """Super token attention, one iteration, on (B, C, H, W) with sides that `grid` divides.

    grid: side of a cell in tokens.
    """

    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)                   # rows per head, each [q | k | v]
        self.proj = nn.Conv2d(dim, dim, 1)
        one_hot = torch.eye(9).reshape(9, 1, 3, 3)
        self.register_buffer("one_hot", one_hot, persistent=False)

    def attend(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(x).reshape(B, self.heads, -1, H * W)
        q, k, v = qkv.chunk(3, 2)                               # (B, h, d, N)
        weights = k.mT @ q * (C // self.heads) ** -0.5
        y = v @ weights.softmax(-2)
        return self.proj(y.reshape(B, C, H, W))

    def unfold(self, x):
        """(B, C, H', W') -> (B, M, C, 9), the 3x3 cells around each cell."""
        B, C, H, W = x.shape
        x = x.reshape(B * C, 1, H, W)
        neighbours = F.conv2d(x, self.one_hot, padding=1)       # (B*C, 9, H', W')
        neighbours = neighbours.reshape(B, C * 9, H * W)
        return neighbours.mT.reshape(B, H * W, C, 9)

    def fold(self, x, H, W):
        """(B, M, C, 9) -> (B, C, H', W'), its adjoint."""
        B, _, C, _ = x.shape
        parts = x.permute(0, 2, 3, 1).reshape(B * C, 9, H, W)
        total = F.conv_transpose2d(parts, self.one_hot, padding=1)
        return total.reshape(B, C, H, W)

    def forward(self, x):
        if self.grid == 1:
            return self.attend(x)
        B, C, H, W = x.shape
        g = self.grid
        rows = H // g
        columns = W // g
        tokens = x.reshape(B, C, rows, g, columns, g)
        tokens = tokens.permute(0, 2, 4, 3, 5, 1)
        tokens = tokens.reshape(B, rows * columns, g * g, C)    # (B, M, P, C)
        with torch.no_grad():
            neighbours = self.unfold(F.adaptive_avg_pool2d(x, (rows, columns)))
            logits = tokens @ neighbours * C ** -0.5
            association = logits.softmax(-1)                    # (B, M, P, 9)
            column_sum = association.sum(2)[:, :, None]
            column_sum = self.fold(column_sum, rows, columns)   # (B, 1, H', W')
        supers = self.fold(tokens.mT @ association, rows, columns)
        supers = self.attend(supers / (column_sum + 1e-12))
        y = self.unfold(supers) @ association.mT                # (B, M, C, P)
        y = y.reshape(B, rows, columns, C, g, g)
        return y.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def plain_density_peaks(x, k=5):
    """Density peaks of x (B, N, C) the way the authors' code finds them, without its noise.

    Returns: density, distance to the nearest denser token and that token's index, each (B, N).
    """
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5            # (B, N, N)
    nearest = distance.topk(k, largest=False).values
    density = (-nearest.square().mean(2)).exp()
    denser = density[:, None] > density[:, :, None]
    denser = denser.to(x.dtype)
    largest = distance.flatten(1).amax(1)[:, None, None]
    delta, parent = (distance * denser + largest * (1 - denser)).min(2)
    return density, delta, parent


def plain_assign(density, delta, parent, clusters):
    """Clusters (B, N) from the result of `plain_density_peaks`."""
    densest = density.argmax(1, keepdim=True)
    gamma = (density * delta).scatter(1, densest, torch.inf)
    centres = gamma.topk(clusters).indices
    pointer = parent.scatter(1, centres, centres)
    for _ in range((parent.shape[1] - 1).bit_length()):
        pointer = pointer.gather(1, pointer)
    return (pointer[:, :, None] == centres[:, None]).int().argmax(2)


def plain_aggregate(x, score, index, clusters):
    """Softmax within clusters, then two sums: x (B, N, C), score and index (B, N) -> (B, M, C)."""
    largest = score.amax(1, keepdim=True).detach()
    weight = (score - largest).exp()
    total = weight.new_zeros(len(x), clusters).scatter_add(1, index, weight)
    weight = weight / total.gather(1, index)
    merged = torch.zeros_like(x[:, :clusters])
    return merged.scatter_add(1, index[..., None].expand_as(x), x * weight[..., None])


class PlainClusteringGuidedAttention(nn.Module):
    """Multi-scale clustering-guided attention on (B, C, H, W), one clustering per layer."""

    def __init__(self, dim, heads, ratios):
        super().__init__()
        self.heads = heads
        self.ratios = ratios
        self.q = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in ratios)
        self.reduce = nn.ModuleList(nn.Linear(dim, 1) for ratio in ratios if ratio > 1)

    def reduced_tokens(self, tokens):
        """(B, N, C) -> the tokens (B, M, C) of each scale."""
        if self.reduce:
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
                peaks = plain_density_peaks(tokens.to(dtype))
        scores = iter(self.reduce)
        scales = []
        for ratio in self.ratios:
            if ratio == 1:
                scales.append(tokens)
                continue
            clusters = -(-tokens.shape[1] // ratio)
            score = next(scores)(tokens).squeeze(2).to(tokens.dtype)
            index = plain_assign(*peaks, clusters)
            scales.append(plain_aggregate(tokens, score, index, clusters))
        return scales

    def forward(self, x):
        B, C, H, W = x.shape
        q = self.q(x).reshape(B, self.heads, -1, H * W).mT      # (B, h, N, d)
        y = 0
        for tokens, to_kv in zip(self.reduced_tokens(x.flatten(2).mT), self.kv, strict=True):
            kv = to_kv(tokens).unflatten(2, (2, self.heads, -1))
            k, v = kv.permute(2, 0, 3, 1, 4)                    # (B, h, M, d)
            y = y + (q @ k.mT * k.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(y.mT.reshape(B, C, H, W))


class PlainKeyOnlyAttention(nn.Module):
    """Key-only attention on (B, C, H, W)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.k = nn.Conv2d(dim, dim, 1)
        self.v = nn.Conv2d(dim, dim, 1)
        self.u1 = nn.Conv2d(dim, dim, 1)
        self.u2 = nn.Conv2d(dim, dim, 1)
        self.saliency = nn.Parameter(torch.zeros(heads, dim // heads))

    def forward(self, x):
        B, C, H, W = x.shape
        heads, d = self.saliency.shape
        k = self.k(x)
        keys = k.reshape(B, heads, d, H * W)
        score = (keys * self.saliency[..., None]).sum(2, keepdim=True)
        weights = (score * d ** -0.5).softmax(3)                # (B, h, 1, N)
        context = (weights * keys).sum(3).reshape(B, C, 1, 1)
        return self.u2(self.u1(context * self.v(x)) + k)


class PlainDotProductAttention(linglo.DotProductAttention):
    """Dot-product attention on (B, H, W, C) that stores its (N, N) maps."""

    def forward(self, x):
        qkv = self.qkv(x).flatten(1, 2)                         # (B, N, 3*C)
        qkv = qkv.unflatten(2, (3, self.heads, -1))             # (B, N, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, h, N, d)
        y = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))


# ------------------------------------------------------ plain implementations: blocks, whole models
class PlainRPCPE(nn.Module):
    """Skip connection and four convolutions with BatchNorm on (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__()
        self.branches = nn.ModuleList()
        for _ in range(4):
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
            self.branches.append(nn.Sequential(conv, nn.BatchNorm2d(dim)))

    def forward(self, x):
        return x + sum(branch(x) for branch in self.branches)


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).contiguous()
        return super().forward(x).permute(0, 3, 1, 2).contiguous()


class PlainPyramidBlock(nn.Module):
    """Attention and FFN, each after a LayerNorm, on (B, C, H, W).

    encoding: name of the module before the GELU; module: what it is.
    """

    def __init__(self, dim, attn, ratio, encoding, module):
        super().__init__()
        self.norm1 = PlainLayerNorm(dim)
        self.attn = attn
        self.norm2 = PlainLayerNorm(dim)
        self.encoding = encoding
        self.ffn = nn.ModuleDict()
        self.ffn["fc1"] = nn.Conv2d(dim, ratio * dim, 1)
        self.ffn[encoding] = module
        self.ffn["fc2"] = nn.Conv2d(ratio * dim, dim, 1)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        y = self.ffn["fc1"](self.norm2(x))
        y = self.ffn[self.encoding](y)
        return x + self.ffn["fc2"](F.gelu(y))


class PlainPyramid(nn.Module):
    """ClusTR or LinGlo: our embeddings, norms and head, plain blocks.

    shapes: `Entry.shapes`; block: function of channels, FFN ratio, heads and what follows.
    """

    def __init__(self, ours, shapes, block):
        super().__init__()
        self.embeds = copy.deepcopy(ours.embeds)
        self.norms = copy.deepcopy(ours.norms)
        self.head = copy.deepcopy(ours.head)
        self.stages = nn.ModuleList()
        for stage, shape, ratio in zip(ours.stages, shapes, (8, 8, 4, 4), strict=True):
            dim, _, *rest = shape
            blocks = [block(dim, ratio, *rest) for _ in stage]
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, images):
        x = images
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            x = embed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = stage(x.contiguous())
            x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class PlainBlock(nn.Module):
    """Depth-wise convolution, attention, FFN, each with a shortcut; no layer scale.

    conv: whether the FFN has a residual 3x3 depth-wise convolution.
    """

    def __init__(self, dim, attn, norm2, ratio, conv=False):
        super().__init__()
        hidden = ratio * dim
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = PlainLayerNorm(dim)
        self.attn = attn
        self.norm2 = norm2
        self.ffn = nn.ModuleDict()
        self.ffn["fc1"] = nn.Conv2d(dim, hidden, 1)
        if conv:
            self.ffn["conv"] = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.ffn["fc2"] = nn.Conv2d(hidden, dim, 1)

    def forward(self, x):
        x = x + self.cpe(x)
        x = x + self.attn(self.norm1(x))
        y = F.gelu(self.ffn["fc1"](self.norm2(x)))
        if "conv" in self.ffn:
            y = y + self.ffn["conv"](y)
        return x + self.ffn["fc2"](y)


class PlainModel(nn.Module):
    """SecViT or STViT, channels-first in memory: our convolutions and head, plain blocks.

    shapes: `Entry.shapes`; block: function of channels, heads and clusters or grid.
    """

    def __init__(self, ours, shapes, block):
        super().__init__()
        self.stem = copy.deepcopy(ours.stem)
        self.downsamples = copy.deepcopy(ours.downsamples)
        self.proj = copy.deepcopy(ours.proj)
        self.head = copy.deepcopy(ours.head)
        self.stages = nn.ModuleList()
        for stage, (dim, _, *rest) in zip(ours.stages, shapes, strict=True):
            blocks = [block(dim, *rest) for _ in stage]
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, images):
        x = self.stem(images)
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.downsamples[i - 1](x)
            x = stage(x)
        return self.head(self.proj(x).mean((2, 3)))


# -------------------------------------------------------------------------------- models to measure
def plain_clustr_block(dim, ratio, heads, ratios):
    hidden = ratio * dim
    attn = PlainClusteringGuidedAttention(dim, heads, ratios)
    conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
    return PlainPyramidBlock(dim, attn, ratio, "conv", conv)


def plain_secvit_block(dim, heads, clusters):
    return PlainBlock(dim, PlainSECA(dim, heads, clusters), PlainLayerNorm(dim), ratio=3)


def plain_linglo_block(dim, ratio, heads):
    attn = PlainKeyOnlyAttention(dim, heads)
    return PlainPyramidBlock(dim, attn, ratio, "cpe", PlainRPCPE(ratio * dim))


def plain_stvit_block(dim, heads, grid):
    attn = PlainSTA(dim, heads, grid)
    return PlainBlock(dim, attn, nn.BatchNorm2d(dim), ratio=4, conv=True)


def super_token_attention(dim, heads, grid):
    return stvit.SuperTokenAttention(dim, heads, (grid, grid))


class Entry(NamedTuple):
    """A model of the ratio tables.

    shapes: per stage the channels, the side of the map at 224 pixels, and what else layers and
    blocks take. Our layers map (B, H, W, C), plain ones (B, C, H, W).
    """
    build: Callable
    layer: Callable
    plain_layer: Callable
    plain_model: Callable       # PlainModel or PlainPyramid
    plain_block: Callable
    shapes: tuple


MODELS = {
    "clustr_t": Entry(
        clustr.clustr_t,
        clustr.ClusteringGuidedAttention,
        PlainClusteringGuidedAttention,
        PlainPyramid,
        plain_clustr_block,
        ((64, 56, 1, (64, 16)), (128, 28, 2, (16, 4)), (256, 14, 4, (4, 1)), (512, 7, 8, (1,))),
    ),
    "secvit_t": Entry(
        secvit.secvit_t,
        secvit.SECA,
        PlainSECA,
        PlainModel,
        plain_secvit_block,
        ((64, 56, 2, 32), (128, 28, 4, 8), (256, 14, 8, 2), (512, 7, 16, 1)),
    ),
    "linglo_b0": Entry(
        linglo.linglo_b0,
        linglo.KeyOnlyAttention,
        PlainKeyOnlyAttention,
        PlainPyramid,
        plain_linglo_block,
        ((32, 56, 1), (64, 28, 2), (160, 14, 5), (256, 7, 8)),
    ),
    "stvit_s": Entry(
        stvit.stvit_s,
        super_token_attention,
        PlainSTA,
        PlainModel,
        plain_stvit_block,
        ((64, 56, 1, 8), (128, 28, 2, 4), (320, 14, 5, 1), (512, 7, 8, 1)),
    ),
}
VARIANTS = {}  # name -> factory
for module in (clustr, secvit, linglo, stvit):
    VARIANTS |= {name: getattr(module, name) for name in module.VARIANTS}
RELEASED = {}  # name -> factory of SecViT as its authors released it
for name in ("secvit_t", "secvit_s", "secvit_b", "secvit_l"):
    RELEASED[name] = functools.partial(VARIANTS[name], released=True)


# ------------------------------------------------------------------------------------------- timing
def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def autocast():
    """Entered in every step, since its cache of cast weights lives as long as the context."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)


def run(module, x, grad=None):
    """Forward without gradient, or forward and backward if the output's gradient is given."""
    with torch.set_grad_enabled(grad is not None), autocast():
        y = module(x)
    if grad is not None:
        inputs = list(module.parameters())
        if x.requires_grad:
            inputs.append(x)
        torch.autograd.grad(y, inputs, grad)
    return y.detach()


def milliseconds(function):
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def warm_up(functions):
    for _ in range(WARMUP):
        for function in functions:
            function()


def median_times(functions, repeats):
    """Median milliseconds of each function; they are called in turn after a warm-up."""
    warm_up(functions)
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, measured in zip(functions, times, strict=True):
            measured.append(milliseconds(function))
    return [statistics.median(measured) for measured in times]


# ------------------------------------------------------------------------------------------- ratios
def share_weights(ours, plain):
    """Move our parameters off their initial 0 and 1, then copy them.

    q, k and v become one matrix, linear layers 1x1 convolutions.
    """
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    source = ours.state_dict()
    state = {}
    for name, value in plain.state_dict().items():
        if name in source:
            tensor = source[name]
        else:
            tensor = torch.cat([source[name.replace("qkv", letter)] for letter in "qkv"])
        state[name] = tensor.reshape(value.shape)
    plain.load_state_dict(state)
    assert count_parameters(ours) == count_parameters(plain)


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def assert_equal(ours, plain, x, channels_last):
    """Outputs and input gradients of both agree in float64 on x (B, C, H, W)."""
    ours = copy.deepcopy(ours).double()
    plain = copy.deepcopy(plain).double()
    x = x.double().requires_grad_()
    if channels_last:
        y = ours(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        y = ours(x)
    expected = plain(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    result = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(result, torch.autograd.grad(expected, x, grad))


def training_mib(module, x, grad):
    """Memory of forward and backward, see the file's header."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(module, x, grad)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    return kept_for_backward(module, x) / MIB


def kept_for_backward(module, x):
    """Bytes of the distinct storages that the graph of one forward keeps, without parameters."""
    saved = []  # weak references: a subgraph dropped on the way, as of a sort key, does not count

    def pack(tensor):
        tensor = tensor.detach()
        saved.append(weakref.ref(tensor))
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = module(x)
    sizes = {}
    for reference in saved:
        tensor = reference()
        if tensor is not None:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    assert y.requires_grad  # it has held the graph until here
    for parameter in module.parameters():
        sizes.pop(parameter.data_ptr(), None)
    return sum(sizes.values())


def compare(name, ours, plain, x, repeats, channels_last=False):
    """Print one row of a ratio table.

    x: (B, C, H, W), the input of a layer or a model. channels_last: whether `ours` is a layer on
    (B, H, W, C). Layers pass a gradient to their input, models to images do not.
    """
    share_weights(ours, plain)
    ours = ours.to(DEVICE)
    plain = plain.to(DEVICE)
    x = x.to(DEVICE)
    assert_equal(ours, plain, x[:2], channels_last)
    ours_x = x.permute(0, 2, 3, 1).contiguous() if channels_last else x.clone()
    inference = []
    training = []
    for module, given in ((ours, ours_x), (plain, x)):
        given.requires_grad_(channels_last)
        inference.append((module, given))
        training.append((module, given, torch.randn_like(run(module, given))))
    ours.eval()
    plain.eval()
    forward = median_times([functools.partial(run, *args) for args in inference], repeats)
    ours.train()
    plain.train()
    both = median_times([functools.partial(run, *args) for args in training], repeats)
    memory = [training_mib(*args) for args in training]
    cells = []
    for ours_value, plain_value in (forward, both, memory):
        ratio = plain_value / ours_value
        cells += [f"{ours_value:.1f}", f"{plain_value:.1f}", f"{ratio:.2f}"]
    print_row(name, *cells)


def ratios(names, batch):
    """Print two tables: the named models' layers at every stage's shape, then the whole models."""
    memory = "peak MiB" if CUDA else "kept MiB"
    columns = []
    for title in ("forward ms", "f+b ms", memory):
        columns += [title, "plain", "ratio"]
    layer_batch = batch or LAYER_BATCH
    print_header(f"layer, batch {layer_batch}", *columns)
    for name in names:
        entry = MODELS[name]
        for i, (dim, side, *rest) in enumerate(entry.shapes):
            ours = entry.layer(dim, *rest)
            plain = entry.plain_layer(dim, *rest)
            x = torch.randn(layer_batch, dim, side, side)
            title = f"{name} stage {i + 1}"
            compare(title, ours, plain, x, LAYER_REPEATS, channels_last=True)
    model_batch = batch or MODEL_BATCH
    print_header(f"model, batch {model_batch}", *columns)
    for name in names:
        entry = MODELS[name]
        ours = entry.build(drop_path_rate=0.0)
        plain = entry.plain_model(ours, entry.shapes, entry.plain_block)
        images = torch.randn(model_batch, 3, PIXELS, PIXELS)
        compare(name, ours, plain, images, MODEL_REPEATS)


# -------------------------------------------------------------------------------------------- table
class Paper(NamedTuple):
    """What a paper prints of a model, "-" for nothing."""
    parameters: str     # M
    flops: str          # multiply-adds at 224 x 224, G
    top_1: str          # on ImageNet-1K, %


PAPERS = {
    "clustr_t": Paper("11.7", "2.2", "80.2"),
    "clustr_s": Paper("22.7", "4.8", "83.2"),
    "clustr_b": Paper("40.2", "7.5", "84.1"),
    "secvit_t": Paper("15", "2.5", "82.6"),
    "secvit_s": Paper("27", "4.4", "84.2"),
    "secvit_b": Paper("55", "9.7", "85.0"),
    "secvit_l": Paper("96", "18.1", "85.6"),
    "sec_swin_t": Paper("29", "4.9", "83.6"),
    "sec_swin_s": Paper("50", "9.3", "84.8"),
    "sec_fastervit_0": Paper("25", "3.6", "82.6"),
    "sec_fastervit_1": Paper("41", "5.6", "83.8"),
    "linglo_b0": Paper("3.4", "-", "72.5"),
    "linglo_b1": Paper("13.1", "-", "79.7"),
    "linglo_b2": Paper("25.4", "-", "82.7"),
    "stvit_s": Paper("25", "4.4", "83.6 (at 384: 85.0)"),
    "stvit_b": Paper("52", "9.9", "84.8 (86.0)"),
    "stvit_l": Paper("95", "15.6", "85.3 (86.4)"),
}
REASONS = {  # why a value differs, by a pattern of column and model
    r"FLOPs of clustr_.":
        "the paper counts attention products as if all models had the reductions 64, 16, 4, 1; "
        "ours are 2.16, 4.80 and 7.49 then",
    r"(parameters|FLOPs) of secvit_[sb]":
        "the paper's figure is that of the released model, in the row below",
    r"FLOPs of secvit_l.*":
        "18.1 fits neither model, nor the paper's detection table, whose growth from SecViT-B to "
        "-L agrees with ours",
    r"parameters of linglo_b[01].*":
        "no reading of the text gives the printed size, which contradicts the paper's own dense "
        "tables",
    r"parameters of linglo_b2.*":
        "no reading of the text gives all three printed sizes; 25.4 agrees with the dense tables",
    r"parameters of sec_swin_t":
        "the paper prints 29 for Swin-T, too, which has 28.29 M",
    r"FLOPs of sec_swin_.":
        "a plain swap of the attention, as the text has it, costs less than the paper says",
    r"FLOPs of sec_fastervit_.":
        "SECA in stage 3 alone, which gives the printed parameters, costs less than the paper "
        "says, and so does the text's in stages 3 and 4 (3.26 and 5.07)",
}
NORM_COST = {nn.LayerNorm: 5, nn.BatchNorm2d: 2}  # per element, fvcore's


def complexity(build, pixels=PIXELS):
    """Parameters and multiply-adds of the model that `build` returns, see the file's header.

    Nothing is computed, and one block of each stage runs, since the blocks of a stage are alike.
    Returns: parameters; multiply-adds of one image's forward without and with products outside
    layers.
    """
    with torch.device("meta"):
        model = build()
        image = torch.empty(1, 3, pixels, pixels)
    parameters = count_parameters(model)
    depths = [keep_one_block(stage) for stage in model.stages]
    layers = []         # multiply-adds of each layer
    norms = []
    counts = []         # at the start and end of every stage, then at the end
    counter = FlopCounterMode(display=False)

    def count(module, _inputs, output):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            norms.append(output.numel() * norm_cost(module))

    def note_counts(*_):
        products = counter.get_total_flops() // 2
        counts.append((sum(layers) + sum(norms), products + sum(norms)))

    for module in model.modules():
        module.register_forward_hook(count)
    for stage in model.stages:
        stage.register_forward_pre_hook(note_counts)
        stage.register_forward_hook(note_counts)
    # torch's counter does not know every fused attention kernel, hence MATH
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    note_counts()
    return parameters, *add_repeated_blocks(counts, depths)


def norm_cost(module):
    return next(cost for kind, cost in NORM_COST.items() if isinstance(module, kind))


def keep_one_block(stage):
    """Remove all blocks of a stage but the first; returns how many there were."""
    depth = len(stage)
    shapes = parameter_shapes(stage[0])
    for block in stage:
        assert parameter_shapes(block) == shapes, "the blocks of a stage differ"
    del stage[1:]
    return depth


def parameter_shapes(module):
    return [(name, p.shape) for name, p in module.named_parameters()]


def add_repeated_blocks(counts, depths):
    """Both totals of `complexity` for stages of `depths` blocks instead of one."""
    totals = list(counts[-1])
    for i, depth in enumerate(depths):
        start = counts[2 * i]
        end = counts[2 * i + 1]
        for j in range(2):
            totals[j] += (depth - 1) * (end[j] - start[j])
    return totals


class TableRow(NamedTuple):
    """The models of one row of the table.

    suffix: "", ", released" or ", deployed"; builds: a function per name; has_top_1: whether the
    paper's accuracies are theirs.
    """
    names: list
    suffix: str
    builds: list
    has_top_1: bool


def table_rows():
    """A row per family; SecViT also as released, as its authors trained it, LinGlo deployed."""
    families = {}
    for name in VARIANTS:
        family = name.rpartition("_")[0]
        families.setdefault(family, []).append(name)
    rows = []
    for family, names in families.items():
        builds = [VARIANTS[name] for name in names]
        rows.append(TableRow(names, "", builds, has_top_1=family != "secvit"))
        if family == "secvit":
            builds = [RELEASED[name] for name in names]
            rows.append(TableRow(names, ", released", builds, True))
        if family == "linglo":
            builds = [functools.partial(build_deployed, build) for build in builds]
            rows.append(TableRow(names, ", deployed", builds, True))
    return rows


def row_title(row):
    """Such as clustr_t/s/b or secvit_t/s/b/l, released."""
    sizes = [name.rpartition("_")[2] for name in row.names[1:]]
    return "/".join([row.names[0], *sizes]) + row.suffix


def build_deployed(build):
    """The model with LinGlo's branches folded; the other papers' models have none."""
    model = build()
    return model.reparameterize() if hasattr(model, "reparameterize") else model


def matches(printed, values):
    """Whether one of `values` is what a paper prints, at the paper's digits."""
    digits = len(printed.partition(".")[2])
    return printed == "-" or printed in [f"{value:.{digits}f}" for value in values]


def reason_of(difference):
    """The reason of a difference such as "FLOPs of clustr_t"."""
    for pattern, reason in REASONS.items():
        if re.fullmatch(pattern, difference):
            return reason
    return "not explained"


def join_numbers(values):
    return ", ".join(f"{value:.2f}" for value in values)


def measure_model(build):
    """Parameters in M and multiply-adds in G, without and with products outside layers."""
    parameters, layers, everything = complexity(build)
    return parameters / 1e6, layers / 1e9, everything / 1e9


def different_columns(paper, size):
    """The values of a Paper that no value of `measure_model` matches: "parameters", "FLOPs"."""
    parameters, *flops = size
    columns = []
    if not matches(paper.parameters, [parameters]):
        columns.append("parameters")
    if not matches(paper.flops, flops):
        columns.append("FLOPs")
    return columns


def table():
    """Print the papers' parameters and FLOPs and ours, a blank line, and why some differ."""
    print_header("models", "paper, M", "ours, M", "paper, G", "ours, no products", "ours, all",
                 "paper's top-1")
    differences = {}  # (column, reason) -> models
    for row in table_rows():
        papers = [PAPERS[name] for name in row.names]
        sizes = [measure_model(build) for build in row.builds]
        parameters, layers, everything = zip(*sizes)
        top_1 = [paper.top_1 for paper in papers] if row.has_top_1 else ["-"]
        print_row(row_title(row), ", ".join(paper.parameters for paper in papers),
                  join_numbers(parameters), ", ".join(paper.flops for paper in papers),
                  join_numbers(layers), join_numbers(everything), ", ".join(top_1))
        for name, paper, size in zip(row.names, papers, sizes):
            for column in different_columns(paper, size):
                reason = reason_of(f"{column} of {name}{row.suffix}")
                title = name + row.suffix.replace(",", "")
                differences.setdefault((column, reason), []).append(title)
    print()
    for (column, reason), titles in differences.items():
        print(f"- {column} of {', '.join(titles)}: {reason}.")


PVT_REDUCTIONS = (64, 16, 4, 1)  # tokens per key in each stage


def pvt_products(model, pixels=PIXELS):
    """Multiply-adds of both products of attention if PVT_REDUCTIONS held."""
    total = 0
    for i, stage in enumerate(model.stages):
        tokens = (pixels // 4 // 2 ** i) ** 2
        keys = tokens // PVT_REDUCTIONS[i]
        total += len(stage) * 2 * tokens * keys * model.channels[i]
    return total


def unseen_by_attention(attn, tokens):
    """Multiply-adds of a layer on tokens x tokens that `complexity` does not see, see below."""
    side, _ = attn.grid
    C = attn.proj.out_features
    cells = math.ceil(tokens / side) ** 2
    averages = cells * side ** 2 * C
    if attn.iterations == 0:
        return averages + 4 * tokens ** 2 * C               # bilinear up-sampling
    sampling = 81 * cells * (C + C + 1) * attn.iterations   # gather; fold, with the column sums
    upsampling = 81 * cells * C
    return averages + sampling + upsampling


def unseen_multiply_adds(model, pixels):
    """Multiply-adds that fvcore counts in the authors' code and `complexity` does not see.

    One per element for averages of cells and of the last map; 81 per value for gathering and
    folding, which are convolutions with nine one-hot 3x3 kernels there.
    """
    total = (pixels // 32) ** 2 * model.head.in_features
    for i, stage in enumerate(model.stages):
        for block in stage:
            if block.attn.grid != (1, 1):
                total += unseen_by_attention(block.attn, pixels // 4 // 2 ** i)
    return total


def printed_flops(factory, model, layers, everything):
    """Multiply-adds of a model as its paper counts them, or None, see the file's header."""
    family = factory.split("_")[0]
    if family == "clustr":
        return layers + pvt_products(model)
    if family == "secvit":
        return layers
    if family == "stvit":
        return everything + unseen_multiply_adds(model, PIXELS)
    return None if family == "linglo" else everything


def ablation_builder(row):
    """A function that builds the model of a row of an ablation table."""
    build = functools.partial(VARIANTS[row.factory], **row.options)
    return functools.partial(build_deployed, build)


def format_options(options):
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def measure_ablation(row):
    """Parameters in M and multiply-adds in G of a row: as the paper counts, or None, and all."""
    build = ablation_builder(row)
    parameters, layers, everything = complexity(build)
    with torch.device("meta"):
        model = build()
    printed = printed_flops(row.factory, model, layers, everything)
    if printed is not None:
        printed = printed / 1e9
    return parameters / 1e6, printed, everything / 1e9


def ablation_tables():
    """Print sizes and arguments of every row of the papers' ablation tables."""
    for title, rows in paper_tables.ABLATIONS.items():
        print_header(title, "paper, M", "ours, M", "paper, G", "ours, as the paper counts",
                     "ours, all", "model", "note")
        for row in rows:
            parameters, printed, everything = measure_ablation(row)
            printed = "-" if printed is None else f"{printed:.2f}"
            model = f"`{row.factory}({format_options(row.options)})`"
            print_row(row.title, row.parameters, f"{parameters:.2f}", row.flops, printed,
                      f"{everything:.2f}", model, row.note)


def dense_parameters(row):
    """Parameters in M of a row of a dense table."""
    classes = 150 if row.task in train_dense.SEGMENTATION else DENSE_CLASSES.get(row.task, 80)
    with torch.device("meta"):
        model = train_dense.build_model(row.task, row.backbone, classes, **row.options)
        if row.backbone.startswith("linglo"):
            model.backbone.net.reparameterize()
    return count_parameters(model) / 1e6


def dense_tables():
    """Print the parameters of every row of the papers' dense tables."""
    for title, rows in paper_tables.DENSE.items():
        print_header(title, "backbone", "paper, M", "ours, M", "note")
        for row in rows:
            backbone = row.backbone + (", released" if "released" in row.options else "")
            print_row(row.task, backbone, row.parameters, f"{dense_parameters(row):.2f}", row.note)


# --------------------------------------------------------------------------------------- throughput
def matmul_rate():
    """FLOPs/s of a large square matrix product in the type in which the models run."""
    size = 8192 if CUDA else 2048
    dtype = torch.bfloat16 if CUDA else torch.float32
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype)

    def products():
        for _ in range(STEPS_PER_WAIT):
            a @ b

    ms, = median_times([products], LAYER_REPEATS)
    return STEPS_PER_WAIT * 2 * size ** 3 / (1e-3 * ms)


def step_flops(build, training):
    """FLOPs of one image's step; LinGlo's inference is that of the deployed model."""
    if training:
        return 3 * 2 * complexity(build)[2]
    return 2 * complexity(functools.partial(build_deployed, build))[2]


def make_step(build, batch, compiled, training, mode="default"):
    """Build a model; returns a function that does one inference or training step with it.

    mode: torch.compile's, if `compiled`.
    """
    model = build().to(DEVICE).train(training)
    net = torch.compile(model, mode=mode) if compiled else model
    images = torch.randn(batch, 3, PIXELS, PIXELS, device=DEVICE)
    labels = torch.randint(1000, (batch,), device=DEVICE)
    if training:
        return training_step(model, lambda: F.cross_entropy(net(images), labels))
    return functools.partial(run, net, images)


def training_step(model, compute_loss):
    """A function that does one step: loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=CUDA)

    def step():
        with autocast():
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_per_second(step, seconds):
    """Warm up, then call `step` for that long; a GPU's peak memory counts from there."""
    warm_up([step])
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    steps = 0
    elapsed = 0.0
    start = time.perf_counter()
    while steps == 0 or elapsed < seconds:
        for _ in range(STEPS_PER_WAIT):
            step()
        synchronize()
        steps += STEPS_PER_WAIT
        elapsed = time.perf_counter() - start
    return steps / elapsed


def peak_gib():
    return f"{torch.cuda.max_memory_allocated() / GIB:.2f}" if CUDA else "-"


def throughput(names, batch, seconds):
    """Print the throughput table of the named variants; a row that fails gives the reason."""
    rate = matmul_rate()
    print(f"matrix product: {rate / 1e12:.3g} TFLOP/s")
    print_header(f"variant, batch {batch}", "GFLOPs", "step", "compiled", "images/s", "peak GiB",
                 "of matmul")
    builds = VARIANTS | {f"{name}_released": build for name, build in RELEASED.items()}
    compile_modes = (False, True) if CUDA else (False,)
    for name in names:
        for compiled, training in itertools.product(compile_modes, (False, True)):
            flops = step_flops(builds[name], training)
            try:
                speed, peak = measure_throughput(builds[name], batch, seconds, compiled, training)
                fraction = speed * flops / rate
                cells = [f"{speed:.1f}", peak, f"{fraction:.1%}"]
            except RuntimeError as error:  # out of memory, for example
                message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                cells = ["failed", "-", message.replace("|", "/")]
            kind = "training" if training else "inference"
            print_row(name, f"{flops / 1e9:.2f}", kind, "yes" if compiled else "no", *cells)


def measure_throughput(build, batch, seconds, compiled, training):
    """Images/s and peak memory of one configuration."""
    try:
        step = make_step(build, batch, compiled, training)
        return batch * steps_per_second(step, seconds), peak_gib()
    finally:
        step = None
        free_memory()


def free_memory():
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


# -------------------------------------------------------------------------------------- dense tasks
DENSE_SIZES = {  # batch, height, width
    "mask_rcnn": (2, 800, 1344) if CUDA else (2, 160, 256),
    "pose": (64, 256, 192) if CUDA else (8, 128, 96),
}
OBJECTS = 8     # per image
DENSE_CLASSES = {"retinanet": 80, "mask_rcnn": 80, "cascade_mask_rcnn": 80, "pose": 133}


def detection_batch(B, H, W):
    """Images, sizes and targets of Mask R-CNN: boxes that fill 10 to 50 % of each side."""
    side = torch.tensor([W, H], device=DEVICE)
    corner = 0.5 * torch.rand(B, OBJECTS, 2, device=DEVICE) * side
    size = (0.1 + 0.4 * torch.rand(B, OBJECTS, 2, device=DEVICE)) * side
    targets = {
        "boxes": torch.cat([corner, corner + size], 2),
        "labels": torch.randint(DENSE_CLASSES["mask_rcnn"], (B, OBJECTS), device=DEVICE),
        "masks": torch.ones(OBJECTS * B, H, W, dtype=torch.bool, device=DEVICE),
    }
    images = torch.randn(B, 3, H, W, device=DEVICE)
    return images, side.flip(0).expand(B, 2), targets


def pose_batch(B, H, W):
    """Images and labelled keypoints (B, K, 3) anywhere in them."""
    points = torch.rand(B, DENSE_CLASSES["pose"], 3, device=DEVICE)
    points[..., :2] *= torch.tensor([W, H], device=DEVICE)
    return torch.randn(B, 3, H, W, device=DEVICE), points


def dense_step(task, B, H, W):
    """A function that does one training step of a dense task around SecViT-S."""
    model = train_dense.build_model(task, "secvit_s", DENSE_CLASSES[task])
    model.to(DEVICE).train()
    batch = pose_batch(B, H, W) if task == "pose" else detection_batch(B, H, W)
    return training_step(model, lambda: sum(model(*batch).values()))


def fraction_outside(step):
    """Fraction of a step's time outside of convolutions, matrix products and fused attention."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize()
    inside = 0
    total = 0
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels count in the operators that start them
        spent = event.self_device_time_total if CUDA else event.self_cpu_time_total
        total += spent
        if re.search(r"conv|mm\b|attention", event.key):
            inside += spent
    return 1 - inside / total


def dense():
    """Print time, memory and the fraction outside of matrix products of dense training steps."""
    print_header("training, secvit_s", "batch", "size", "ms", "peak GiB", "outside")
    for task, (B, H, W) in DENSE_SIZES.items():
        step = dense_step(task, B, H, W)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        ms, = median_times([step], MODEL_REPEATS)
        peak = peak_gib()
        outside = fraction_outside(step)
        print_row(task, str(B), f"{H} x {W}", f"{ms:.1f}", peak, f"{outside:.1%}")


# ------------------------------------------------------------------------------------------ scaling
PEAK_SIZES = ((4, 3136), (1, 3136), (1, 12544), (1, 66800))  # batch and tokens of 64 channels
LAYER_SIDES = (56, 80, 112, 160, 256)  # sides of the key-only layer's map
FIG_4_BATCH = 16 if CUDA else 1
FIG_4_SIDES = (128, 192, 256, 320, 384, 448, 512) if CUDA else (128, 192, 256, 320, 384)
FIG_4_SECONDS = 40  # after which no larger image is timed; memory then takes about as long


class ScalingRow(NamedTuple):
    """functions: ours and, unless they need more than the machine's memory, those it is beside."""
    title: str
    tokens: int
    functions: list


def return_memory():
    """Make glibc return large blocks as soon as they are freed.

    It slows allocation down, so it is not for processes in which time is measured.
    """
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # bytes


def peak_mib(function):
    """Peak memory of one call above what was there before, after one call to warm up."""
    function()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_resident_kib()
    function()
    return (peak_resident_kib() - before) / 1024


def peak_resident_kib():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def machine_mib():
    """Memory of the device."""
    if CUDA:
        return torch.cuda.mem_get_info()[1] / MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB


def time_functions(functions, repeats=LAYER_REPEATS):
    """Median milliseconds after a warm-up call; a single call each if that takes over 2 s."""
    first = sum(milliseconds(function) for function in functions)
    if first > 2000:
        return [milliseconds(function) for function in functions]
    return median_times(functions, repeats)


def measure_memory(tables):
    """MiB per function, row and table; on the CPU in a process of its own, see return_memory."""
    if CUDA:
        return [memory_of_rows(rows, peak_mib) for _, rows in tables]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, return_memory) as pool:
        def measure(function):
            return pool.submit(peak_mib, function).result()

        return [memory_of_rows(rows, measure) for _, rows in tables]


def memory_of_rows(rows, measure):
    return [list(map(measure, row.functions)) for row in rows]


def growth_exponents(times, before, tokens, tokens_before):
    """Exponents of the growth between two rows."""
    exponents = []
    for now, earlier in zip(times, before):
        exponent = math.log(now / earlier) / math.log(tokens / tokens_before)
        exponents.append(f"{exponent:.2f}")
    return exponents


def print_growth(title, rows, times, memory):
    """Print a table of ScalingRows with their times and memory."""
    print_header(title, "ms", "exponent", "plain", "exponent", "ratio", "MiB", "plain", "ratio")
    for i, (row, ms, mib) in enumerate(zip(rows, times, memory, strict=True)):
        exponents = ["", ""]
        if i > 0:
            before = rows[i - 1].tokens
            exponents = growth_exponents(ms, times[i - 1], row.tokens, before)
        cells = [f"{ms[0]:.1f}", exponents[0]]
        if len(ms) == 2:
            cells += [f"{ms[1]:.1f}", exponents[1], f"{ms[1] / ms[0]:.2f}"]
            cells += [f"{mib[0]:.1f}", f"{mib[1]:.1f}", f"{mib[1] / mib[0]:.1f}"]
        else:
            cells += ["-", "-", "-", f"{mib[0]:.1f}", "-", "-"]
        print_row(row.title, *cells)


def peak_rows():
    """Density peaks of normalised tokens, ours and plain."""
    rows = []
    for B, N in PEAK_SIZES:
        x = F.layer_norm(torch.randn(B, N, 64, device=DEVICE), (64,))
        functions = [functools.partial(clustr.density_peaks, x)]
        # distances, those of denser tokens and one temporary copy, in float32
        plain_mib = 3 * 4 * B * N ** 2 / MIB
        if plain_mib <= machine_mib():
            functions.append(functools.partial(plain_density_peaks, x))
        rows.append(ScalingRow(f"{B} x {N}", N, functions))
    return rows


def key_only_rows():
    """Forward and backward of one layer of key-only and one of dot-product attention."""
    rows = []
    for side in LAYER_SIDES:
        x = torch.randn(1, side, side, 32, device=DEVICE, requires_grad=True)
        functions = []
        for layer in (linglo.KeyOnlyAttention, linglo.DotProductAttention):
            module = layer(32, 1).to(DEVICE)
            functions.append(functools.partial(run, module, x, torch.randn_like(x)))
        rows.append(ScalingRow(f"{side} x {side}", side ** 2, functions))
    return rows


def linglo_rows():
    """LinGlo-b0 with key-only and with dot-product attention: forward; forward and backward."""
    images = torch.randn(MODEL_BATCH, 3, PIXELS, PIXELS, device=DEVICE)
    grad = torch.randn(MODEL_BATCH, 1000, device=DEVICE)
    forward = []
    both = []
    for attention in ("key-only", "dot"):
        model = linglo.linglo_b0(drop_path_rate=0.0, attention=attention).to(DEVICE)
        forward.append(functools.partial(run, copy.deepcopy(model).eval(), images))
        both.append(functools.partial(run, model, images, grad))
    return ScalingRow("forward", 1, forward), ScalingRow("forward + backward", 1, both)


def fig_4_models():
    """LinGlo-b0 with each attention, the one that needs the most memory last."""
    build = functools.partial(linglo.linglo_b0, drop_path_rate=0.0)
    explicit = build(attention="dot")
    for block in itertools.chain(*explicit.stages):
        block.attn = PlainDotProductAttention(block.attn.proj.in_features, block.attn.heads)
    models = {
        "key-only": build(),
        "fused dot product": build(attention="dot"),
        "explicit dot product": explicit,
    }
    return {name: model.to(DEVICE) for name, model in models.items()}


def time_what_fits(functions):
    """Median milliseconds; removes the last functions until the GPU's memory suffices."""
    while functions:
        try:
            return time_functions(functions, MODEL_REPEATS)
        except torch.OutOfMemoryError:
            functions.pop()
        free_memory()
    return []


def time_fig_4(models):
    """ScalingRows of forward and backward, and their times, until FIG_4_SECONDS are over."""
    deadline = time.perf_counter() + FIG_4_SECONDS
    grad = torch.randn(FIG_4_BATCH, 1000, device=DEVICE)
    rows = []
    times = []
    for side in FIG_4_SIDES:
        if time.perf_counter() > deadline:
            break
        images = torch.randn(FIG_4_BATCH, 3, side, side, device=DEVICE)
        functions = [functools.partial(run, model, images, grad) for model in models]
        times.append(time_what_fits(functions))
        rows.append(ScalingRow(f"{side} x {side}", side ** 2, functions))
    return rows, times


def fig_4_panel(title, names, values):
    """A panel of 500 x 420 pixels with a line per name.

    values: per image side a list with at most one value per name.
    """
    lines = {name: {} for name in names}
    for side, row in zip(FIG_4_SIDES, values):
        for name, value in zip(names, row):
            lines[name][side] = value
    plot = Image.new("RGB", (500, 366), "white")  # low enough to cut off the label "update"
    train_imagenet.plot_lines(ImageDraw.Draw(plot), 60, lines)
    panel = Image.new("RGB", (500, 420), "white")
    panel.paste(plot, (0, 24))
    draw = ImageDraw.Draw(panel)
    draw.text((260, 6), title, "black", anchor="ma")
    text = "image side, pixels (of lines that coincide, the last name's is visible)"
    draw.text((260, 394), text, "black", anchor="ma")
    return panel


def fig_4(path):
    """Print and plot time and memory of LinGlo-b0 with three attentions (LinGlo's Fig. 4)."""
    models = fig_4_models()
    rows, times = time_fig_4(models.values())
    memory, = measure_memory([("", rows)])
    columns = ("fused", "explicit")
    print_header(f"Fig. 4, batch {FIG_4_BATCH}", "ms", *columns, "MiB", *columns)
    for row, ms, mib in zip(rows, times, memory, strict=True):
        missing = ["-"] * (len(models) - len(ms))
        cells = [f"{value:.1f}" for value in ms] + missing
        cells += [f"{value:.1f}" for value in mib] + missing
        print_row(row.title, *cells)
    figure = Image.new("RGB", (1000, 420))
    figure.paste(fig_4_panel("forward and backward, ms", models, times), (0, 0))
    figure.paste(fig_4_panel("memory, MiB", models, memory), (500, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.save(path)
    print(f"\nLinGlo's Fig. 4, up to {rows[-1].title} pixels: {path}")


def scaling(figure):
    """Print how clustering and key-only attention grow with the number of tokens."""
    batches, *peaks = peak_rows()
    forward, both = linglo_rows()
    tables = [
        (f"density peaks, batch {PEAK_SIZES[0][0]}", [batches]),
        ("density peaks", peaks),
        ("key-only layer, f+b", key_only_rows()),
        (f"linglo_b0, batch {MODEL_BATCH}", [forward]),
        (f"linglo_b0, batch {MODEL_BATCH}", [both]),
    ]
    times = []
    for _, rows in tables:
        times.append([time_functions(row.functions) for row in rows])
    fraction = clustering_fraction()
    memory = measure_memory(tables)
    for (title, rows), ms, mib in zip(tables, times, memory, strict=True):
        print_growth(title, rows, ms, mib)
    print(f"\nclustering takes {fraction:.1%} of a training step of clustr_t, batch {MODEL_BATCH}")
    fig_4(figure)


def clustering_fraction(build=clustr.clustr_t, batch=MODEL_BATCH):
    """Fraction of a ClusTR training step that `cluster_tokens` takes."""
    step = make_step(build, batch, compiled=False, training=True)
    cluster_tokens = clustr.cluster_tokens
    spent = []

    def timed_cluster_tokens(*args):
        results = []
        spent.append(milliseconds(lambda: results.append(cluster_tokens(*args))))
        return results[0]

    clustr.cluster_tokens = timed_cluster_tokens
    warm_up([step])
    spent.clear()
    total = sum(milliseconds(step) for _ in range(MODEL_REPEATS))
    clustr.cluster_tokens = cluster_tokens
    return sum(spent) / total


# ---------------------------------------------------------------------------- one command for a GPU
GPU_SECONDS = 530
GPU_TESTS = {  # title: files, pytest's -k
    "layers, losses": (("clustr", "secvit", "linglo", "stvit", "detection", "mask_rcnn"), "cuda"),
    "models": (("models",), "cuda and not float64"),
    "determinism": (("clustr",), "deterministic"),
    "update per task": (("train_dense",), "every_loss_is_logged"),
}
COMPILED_STEPS = (  # whether training, torch.compile's mode
    (False, "default"),
    (True, "default"),
    (True, "reduce-overhead"),
)
GPU_DENSE = {  # batch, height, width
    "retinanet": (2, 800, 1344),
    "mask_rcnn": (2, 800, 1344),
    "cascade_mask_rcnn": (2, 800, 1344),
    "pose": (64, 256, 192),
}


class OutOfTime(BaseException):
    """The time of --gpu is over; no Exception, since nothing in between may catch it."""


class GpuRow(NamedTuple):
    """A row of --gpu's table; measure() returns a text, or the cells from "ms" to "waits"."""
    title: str
    step: str
    measure: Callable


def raise_out_of_time(*_):
    raise OutOfTime


def run_tests(modules, expression):
    """The last line of pytest on some modules, and the first test that failed."""
    files = [f"tests/test_{module}.py" for module in modules]
    command = [sys.executable, "-m", "pytest", "-k", expression, *files]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=150)
    lines = (done.stderr + done.stdout).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return ", ".join([lines[-1].strip("= "), *failed[:1]])


def differences_to_cpu(build, batch):
    """Largest difference of the logits to the CPU's, over the largest logit, in both types."""
    model = build().eval()
    images = torch.randn(min(batch, 4), 3, PIXELS, PIXELS)
    texts = []
    with torch.no_grad():
        expected = model(images)
        model.to(DEVICE)
        for enabled in (False, True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
                logits = model(images.to(DEVICE)).float().cpu()
            difference = (logits - expected).abs().max() / expected.abs().max()
            texts.append(f"{'bf16' if enabled else 'float32'} {difference:.1e}")
    return ", ".join(texts)


def repeated_gradients(build, batch):
    """Whether deterministic algorithms give the same gradients twice."""
    model = build().to(DEVICE).train()
    images = torch.randn(batch, 3, PIXELS, PIXELS, device=DEVICE)
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            with autocast():
                loss = model(images).square().mean()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(map(torch.equal, *gradients))
    return "same gradients twice" if same else "gradients differ"


def count_waits(step):
    """Calls of one step that wait for the GPU."""
    if not CUDA:
        return "-"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchronizing" in str(warning.message) for warning in caught))


def measure_step(step, batch, seconds, flops=0, rate=0):
    """Cells ms, images/s, peak GiB, of matmul, waits; flops: of one image, 0 if unknown."""
    per_second = steps_per_second(step, seconds)
    peak = peak_gib()
    speed = batch * per_second
    fraction = f"{speed * flops / rate:.1%}" if flops else "-"
    return f"{1e3 / per_second:.1f}", f"{speed:.0f}", peak, fraction, count_waits(step)


def measure_variant(build, batch, seconds, rate, training, **options):
    flops = step_flops(build, training)
    step = make_step(build, batch, training=training, **options)
    return measure_step(step, batch, seconds, flops, rate)


def measure_clustering(build, batch):
    return f"{clustering_fraction(build, batch):.1%} of a training step"


def measure_dense(task, seconds):
    B, H, W = GPU_DENSE[task]
    return measure_step(dense_step(task, B, H, W), B, seconds)


def gpu_rows(names, batch, seconds, rate):
    """The rows of --gpu, the most important ones first."""
    builds = VARIANTS | {f"{name}_released": build for name, build in RELEASED.items()}
    measure = functools.partial(measure_variant, batch=batch, seconds=seconds, rate=rate)
    smallest = [name for name in names if name in MODELS]
    rows = []

    def add(title, step, function, *args, **options):
        rows.append(GpuRow(title, step, functools.partial(function, *args, **options)))

    for title, selection in GPU_TESTS.items():
        add(title, "tests", run_tests, *selection)
    for name in smallest:
        add(name, "as on CPU", differences_to_cpu, builds[name], batch)
        add(name, "repeated", repeated_gradients, builds[name], batch)
    for name in names:
        add(name, "inference", measure, builds[name], training=False, compiled=False)
        add(name, "training", measure, builds[name], training=True, compiled=False)
        if name.startswith("clustr"):
            add(name, "clustering", measure_clustering, builds[name], batch)
    for task, sizes in GPU_DENSE.items():
        add(task, "x".join(map(str, sizes)), measure_dense, task, seconds)
    for name in sorted(names, key=lambda name: name not in smallest):
        for training, mode in COMPILED_STEPS:
            step = f"{'training' if training else 'inference'}, {mode}"
            add(name, step, measure, builds[name], training=training, compiled=True, mode=mode)
    return rows


def gpu(names, batch, seconds):
    """Print one table of all that needs a GPU, until the time is over."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for deterministic algorithms
    signal.signal(signal.SIGALRM, raise_out_of_time)
    signal.alarm(GPU_SECONDS)
    rate = matmul_rate()
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
          f"matrix product {rate / 1e12:.3g} TFLOP/s")
    columns = ("ms", "images/s", "peak GiB", "of matmul", "waits")
    print_header(f"batch {batch}", "step", *columns, "result")
    try:
        for row in gpu_rows(names, batch, seconds, rate):
            print_row(row.title, row.step, *measured_cells(row))
    except OutOfTime:
        print_row("the rest", *["-"] * 6, f"not measured within {GPU_SECONDS} s")
    signal.alarm(0)


def measured_cells(row):
    """A row's cells from "ms" on; the last one is a text, such as the reason why it failed."""
    try:
        result = row.measure()
    except Exception as error:
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        result = f"failed, {message.replace('|', '/')}"
    free_memory()
    if isinstance(result, str):
        return [*["-"] * 5, result]
    return [*result, "-"]


# ------------------------------------------------------------------------------------------- output
def print_row(name, *cells):
    columns = [f"{name:<20}"]
    columns += [f"{cell:>10}" for cell in cells]
    print(f"| {' | '.join(columns)} |", flush=True)


def print_header(*titles):
    print()
    print_row(*titles)
    rule = f"{'-' * 11}:|" * (len(titles) - 1)
    print(f"|{'-' * 22}|{rule}", flush=True)


def device_name():
    """The GPU's name, or the CPU's, which Linux tells; elsewhere its architecture."""
    if CUDA:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = cpu[1] if cpu else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def make_parser():
    parser = argparse.ArgumentParser(
        description="Compare the models with plain implementations, or measure their throughput.")
    parser.add_argument("--throughput", action="store_true",
                        help="images/s of the variants instead of ratios")
    parser.add_argument("--scaling", action="store_true",
                        help="growth with the number of tokens instead of ratios")
    parser.add_argument("--figure", type=Path, default=Path("runs/linglo_fig4.png"),
                        help="where --scaling saves LinGlo's Fig. 4; default: %(default)s")
    parser.add_argument("--dense", action="store_true",
                        help="training steps of dense tasks instead of ratios")
    parser.add_argument("--gpu", action="store_true",
                        help="tests, speed, memory and waits on a GPU instead of ratios")
    parser.add_argument("--table", action="store_true",
                        help="the papers' parameters and FLOPs and ours instead of ratios")
    parser.add_argument("--models", help="comma-separated names; default: all, or for throughput "
                        "on the CPU the smallest of each file")
    parser.add_argument("--batch", type=int, help="images per step; default: 128 on CUDA, on the "
                        "CPU 8 for layers and 4 for models")
    parser.add_argument("--seconds", type=float, help="how long each throughput is measured "
                        "after the warm-up; default: 5, with --gpu 1")
    parser.add_argument("--threads", type=int, help="torch's CPU threads; default: torch's choice")
    return parser


def model_names(args, parser):
    """The models that --models names, or the default ones."""
    choices = list(MODELS)
    if args.throughput or args.gpu:
        choices = [*VARIANTS, *(f"{name}_released" for name in RELEASED)]
    if args.models is None:
        return [name for name in choices if CUDA or name.removesuffix("_released") in MODELS]
    names = args.models.split(",")
    if not set(names) <= set(choices):
        parser.error(f"--models {args.models}, expected some of {','.join(choices)}")
    return names


def describe_run():
    dtype = "bfloat16 autocast" if CUDA else "float32"
    command = shlex.join(["python", *sys.argv])
    threads = f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {device_name()}, {threads}, {dtype}, `{command}`"


def main():
    parser = make_parser()
    args = parser.parse_args()
    names = model_names(args, parser)
    seconds = args.seconds or (1.0 if args.gpu else 5.0)
    if args.table:
        table()
        ablation_tables()
        return dense_tables()
    if args.gpu and not CUDA:
        return print("--gpu needs a CUDA device, and torch sees none")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    print(describe_run(), flush=True)
    if args.throughput:
        throughput(names, args.batch or MODEL_BATCH, seconds)
    elif args.gpu:
        gpu(names, args.batch or MODEL_BATCH, seconds)
    elif args.scaling:
        scaling(args.figure)
    elif args.dense:
        dense()
    else:
        ratios(names, args.batch)


if __name__ == "__main__":
    main()
