"""SecViT: Semantic Equitable Clustering: A Simple, Fast and Effective Strategy for Vision Transformer
Qihang Fan, Huaibo Huang, Mingrui Chen, Ran He; arXiv 2405.13337

Mechanism: sort the tokens by the similarity of their keys to the mean key, cut the sorted sequence into
equally long clusters, and attend inside each cluster. One sort, no iterations, no ragged groups.

Letters: B batch, C channels, H x W the token grid, N = H * W tokens, h heads, d = C / h head width, K clusters, M = N / K.
Reading order: cluster_order, cut_runs, run_attention -> equitable_cluster_attention -> SECA -> Block -> SecViT -> secvit_t. The main
model ends there; behind it come the layers of its ablations, then SEC-Swin, SEC-FasterViT, drawing and `main`.
Memory order: every map inside a stage is channels-last, (B, H, W, C), so that linear layers, norms and convolutions share it.

What differs from the paper's text, and why:
- N need not divide by K: cluster sizes differ by at most one, longer clusters first. The released code asserts divisibility.
- The head projects to 1024 channels (1x1 convolution, BN, SiLU) before averaging: the printed sizes need it, the text is silent.
- SecViT-B and -L use layer scale 1e-6 in stages 3 and 4, weights start at N(0, 0.02): released code, the text is silent.
- `released=True` is the model that the authors trained: rotary embedding of q and k, a residual 3x3 depth-wise convolution in
  the FFN, no GELU after the stem's last BN, ascending sort. Their training logs carry its parameter count exactly, so **the
  paper's accuracies belong to `released=True`**; the default is the paper's text (14.87 M against 14.98 M for SecViT-T).
- Without convolutional stem SecViT has Swin's patch embedding and patch merging: Table 6's 14 M and 2.1 G need both.
- SEC-FasterViT has SECA in stage 3 only, though the text says "the latter two stages": with FasterViT's global attention kept in
  stage 4 it has the printed 25 and 41 M, without it 23.7 and 39.2 M. Drop path of SEC-Swin and SEC-FasterViT is the baselines',
  the eps of their LayerNorms this file's 1e-6 (there 1e-5).
- Rows of Tables 6 and 7 are `released=True`. Table 7's 4.3, 4.3, 4.3, 4.4 G fit no way of counting: 4.37 in all four without
  attention products, 4.57 to 4.75 with them.
"""
import argparse
import colorsys
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

VARIANTS = {  # Table 8
    "secvit_t": dict(depths=(2, 2, 9, 2), dims=(64, 128, 256, 512), heads=(2, 4, 8, 16)),
    "secvit_s": dict(depths=(3, 4, 18, 4), dims=(64, 128, 256, 512), heads=(2, 4, 8, 16)),
    "secvit_b": dict(depths=(4, 8, 26, 8), dims=(80, 160, 320, 512), heads=(5, 5, 10, 16), layer_scale=(None, None, 1e-6, 1e-6)),
    "secvit_l": dict(depths=(4, 8, 26, 8), dims=(112, 224, 448, 640), heads=(7, 7, 14, 20), layer_scale=(None, None, 1e-6, 1e-6)),
}


# ---------------------------------------------------------------------------------------------------------------- core
class PermuteRows(torch.autograd.Function):
    """`rows[index]` where `index` is a permutation of the rows and `inverse` its inverse.

    The gradient of a permutation is the gather by its inverse; autograd would derive a scatter-add, which is slower
    and on a GPU not deterministic.
    """

    @staticmethod
    def forward(ctx, rows, index, inverse):  # (R, D), (R,), (R,)
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def cluster_order(k, descending=True):
    """Sort tokens by cosine similarity to the mean key (paper, Eq. 2 and 3).

    Args: k (B, h, N, d), keys; descending, the paper's text (True) or the released code (False).
    Returns: (B, h, N), the token at each sorted place, without gradient; ties keep input order.
    Half precision is compared in float32, since rounding decides clusters.
    """
    k = k.detach().to(torch.promote_types(k.dtype, torch.float32))
    if k.stride(-1) != 1:
        k = k.contiguous()  # strided sums round equal keys differently, which would break their ties
    similarity = F.cosine_similarity(k, k.mean(2, keepdim=True), dim=-1)                # (B, h, N)
    return similarity.sort(dim=-1, descending=descending, stable=True).indices


def cut_runs(tokens, clusters):
    """Runs that `tokens` sorted tokens are cut into: [(how many, how long), ...], one or two groups, longer runs first."""
    length, longer = tokens // clusters, tokens % clusters  # torch.compile knows no divmod of symbolic sizes
    return [(count, size) for count, size in ((longer, length + 1), (clusters - longer, length)) if count]


def run_attention(q, k, v, runs):
    """Attention inside consecutive runs of tokens: q, k, v (G, N, d), runs as from `cut_runs` -> (G, N, d)."""
    outputs, start = [], 0
    for count, length in runs:
        part = slice(start, start + count * length)
        qi, ki, vi = (t[:, part].unflatten(1, (count, length)) for t in (q, k, v))      # (G, K, M, d)
        outputs.append(F.scaled_dot_product_attention(qi, ki, vi).flatten(1, 2))        # (G, K*M, d)
        start += count * length
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def equitable_cluster_attention(q, k, v, clusters, descending=True):
    """Attention inside equally large clusters of tokens (paper, Eq. 2 to 5).

    Args:
        q, k, v (B, h, N, d): any float type; fastest as views of (B, N, h, d), the way linear layers leave them.
        clusters: number of clusters a head; above N it means N, 1 is plain attention.
        descending: sort by falling similarity, the paper's text; False is the released code's order.
    Returns: (B, h, N, d), each token's output at the token's own place, scale 1 / sqrt(d).
    Raises: ValueError for fewer than one cluster.
    """
    if clusters < 1:
        raise ValueError(f"clusters = {clusters}, expected at least 1")
    B, h, N, d = q.shape
    clusters = min(clusters, N)
    if clusters == 1:
        return F.scaled_dot_product_attention(q, k, v)
    order = cluster_order(k, descending)                                                # (B, h, N)
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(N, device=q.device).expand_as(order))
    batch = torch.arange(B, device=q.device)[:, None, None]
    head = torch.arange(h, device=q.device)[:, None]
    gather = ((batch * N + order) * h + head).flatten()                                 # rows (B, N, h) -> (B, h, N sorted)
    scatter = ((batch * h + head) * N + place).mT.flatten()                             # and back
    q, k, v = (PermuteRows.apply(t.transpose(1, 2).reshape(B * N * h, d), gather, scatter).view(B * h, N, d) for t in (q, k, v))
    y = run_attention(q, k, v, cut_runs(N, clusters))                                   # (B*h, N, d) sorted, Eq. 5
    return PermuteRows.apply(y.reshape(B * h * N, d), scatter, gather).view(B, N, h, d).transpose(1, 2)


def rotary_table(H, W, d, device):
    """cos and sin (N, d) of the released model's 2-D rotary embedding: first half of d by row, second half by column."""
    rate = 1 / 10000 ** torch.linspace(0, 1, d // 4, device=device)
    rate = rate.repeat_interleave(2)                                                    # (d/2,), one rate a pair
    row = torch.arange(H, device=device)[:, None, None] * rate                          # (H, 1, d/2)
    column = torch.arange(W, device=device)[None, :, None] * rate                       # (1, W, d/2)
    angle = torch.cat([row.expand(H, W, -1), column.expand(H, W, -1)], -1).flatten(0, 1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (even, odd) of x (B, h, N, d) by the angles of cos, sin (N, d); float32 inside, x's type outside."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- layers
class DepthwiseConv(nn.Conv2d):
    """Depth-wise k x k convolution with zero padding on channels-last maps (B, H, W, C)."""

    def __init__(self, dim, kernel_size):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch per sample with probability `rate`, scale the survivors by 1 / (1 - rate)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = F.dropout(x.new_ones(x.shape[0]), self.rate)                             # 0 or 1 / (1 - rate)
        return x * keep.view(-1, 1, 1, 1)


class LayerScale(nn.Module):
    """Learned factor per channel."""

    def __init__(self, dim, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.weight


class SECA(nn.Module):
    """Semantic equitable clustering attention (paper, sec. 3.2): (B, H, W, C) -> the same.

    `lce` adds a 5x5 depth-wise convolution of V (Eq. 6). `rope` is the released code's rotary embedding with its ascending sort.
    Raises: ValueError for fewer than one cluster, for a width of the heads that is not whole or, with `rope`, no multiple of 4.
    """

    def __init__(self, dim, heads, clusters, lce=True, rope=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        if clusters < 1:
            raise ValueError(f"clusters = {clusters}, expected at least 1")
        if rope and dim // heads % 4:
            raise ValueError(f"rotary embedding needs heads of a multiple of 4 channels, not {dim // heads}")
        self.heads, self.clusters, self.rope = heads, clusters, rope
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))    # three outputs in one piece each: no copies later
        self.lce = DepthwiseConv(dim, 5) if lce else None
        self.proj = nn.Linear(dim, dim)

    def queries_keys(self, x):
        """(B, H, W, C) -> q, k (B, h, N, d), rotated if `rope`."""
        q, k = self.split_heads(self.q(x)), self.split_heads(self.k(x))
        if self.rope:
            cos, sin = rotary_table(*x.shape[1:3], q.shape[-1], x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k

    def split_heads(self, x):
        """(B, H, W, C) -> (B, h, N, d), a view."""
        return x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k = self.queries_keys(x)
        v = self.v(x)
        y = equitable_cluster_attention(q, k, self.split_heads(v), self.clusters, descending=not self.rope)
        y = y.transpose(1, 2).reshape(x.shape)                                          # (B, h, N, d) -> (B, H, W, C)
        return self.proj(y if self.lce is None else y + self.lce(v))


class FFN(nn.Module):
    """Linear, GELU, linear; `conv` adds a residual 3x3 depth-wise convolution after the GELU (released code)."""

    def __init__(self, dim, ratio, conv):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.conv = DepthwiseConv(ratio * dim, 3) if conv else None
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        if self.conv is not None:
            x = x + self.conv(x)
        return self.fc2(x)


class Block(nn.Module):
    """Eq. 1: position encoding `cpe` (a module or None), attention `attn`, FFN, each with a shortcut; (B, H, W, C) -> the same."""

    def __init__(self, dim, cpe, attn, ratio, drop_path, layer_scale=None, ffn_conv=False):
        super().__init__()
        self.cpe = cpe
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FFN(dim, ratio, ffn_conv)
        self.scale1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.scale2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        if self.cpe is not None:
            x = x + self.cpe(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.ffn(self.norm2(x))))


def conv_norm(in_dim, out_dim, stride):
    """3x3 convolution and batch norm on channels-first maps."""
    return [nn.Conv2d(in_dim, out_dim, 3, stride, padding=1), nn.BatchNorm2d(out_dim)]


def init_weights(module):
    """One rule for every parameter: weights N(0, 0.02) truncated, biases 0, norms and layer scales as constructed."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif list(module.parameters(recurse=False)) and not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, LayerScale)):
        raise TypeError(f"no initialization rule for {type(module).__name__}")


# --------------------------------------------------------------------------------------------------------------- model
class SecViT(nn.Module):
    """Four stages of SECA blocks at strides 4, 8, 16 and 32 (paper, Fig. 3 and Table 8).

    Args:
        num_classes: width of the classifier.
        drop_path_rate: stochastic depth of the last block; the first block's rate is 0, linear between.
        depths, dims, heads, clusters, layer_scale: one entry a stage.
        released: the model of the authors' checkpoints, see the file's header.
        lce, cpe: False leaves the convolution of V, or the position encoding, out of every block (Table 6).
        conv_stem: False for Swin's patch embedding and patch merging instead of the convolutions before and between stages (Table 6).
        attention: "sec", or "csw" for cross-shaped windows instead of clusters (Table 6), which has the same tensors.
    `channels` holds the four map widths.
    Raises: ValueError for another `attention`, and unless there are four numbers of clusters, untouched with "csw".
    """

    def __init__(self, *, num_classes, drop_path_rate, depths, dims, heads, clusters=(32, 8, 2, 1),
                 layer_scale=(None, None, None, None), released=False, lce=True, cpe=True, conv_stem=True, attention="sec"):
        super().__init__()
        if attention not in ("sec", "csw"):
            raise ValueError(f"attention = {attention!r}, expected 'sec' or 'csw'")
        if len(clusters) != 4 or (attention == "csw" and tuple(clusters) != (32, 8, 2, 1)):
            raise ValueError(f"clusters = {clusters}, expected four, one a stage, and the default where attention = 'csw' has none")
        self.channels = tuple(dims)
        half = dims[0] // 2
        stem = []
        for in_dim, out_dim, stride in ((3, half, 2), (half, half, 1), (half, half, 1), (half, dims[0], 2)):
            stem += [*conv_norm(in_dim, out_dim, stride), nn.GELU()]
        self.stem = nn.Sequential(*(stem[:-1] if released else stem)) if conv_stem else PatchEmbedding(dims[0])
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])

        def block(i):
            layer, size = (SECA, clusters[i]) if attention == "sec" else (CSWA, STRIPES[i])
            return Block(dims[i], DepthwiseConv(dims[i], 3) if cpe else None, layer(dims[i], heads[i], size, lce, released), ratio=3,
                         drop_path=next(rates), layer_scale=layer_scale[i], ffn_conv=released)
        self.stages = nn.ModuleList(nn.Sequential(*(block(i) for _ in range(depths[i]))) for i in range(4))
        self.downsamples = nn.ModuleList(
            nn.Sequential(*conv_norm(dims[i], dims[i + 1], 2)) if conv_stem else PatchMerging(dims[i], dims[i + 1]) for i in range(3))
        self.proj = nn.Sequential(nn.Conv2d(dims[3], 1024, 1), nn.BatchNorm2d(1024), nn.SiLU())
        self.head = nn.Linear(1024, num_classes)
        self.apply(init_weights)

    def forward_features(self, images):
        """(B, 3, H, W) -> four maps (B, C_i, ceil(H / s), ceil(W / s)) at strides s = 4, 8, 16, 32, channels-last in memory.

        Raises: ValueError unless images are (B, 3, H, W) with both sides at least 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (B, 3, H, W) with H and W at least 32")
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps = []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.downsamples[i - 1](x)
            x = stage(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)                        # blocks see (B, H, W, C)
            maps.append(x)
        return tuple(maps)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, num_classes). In train mode BN needs more than one value a channel: B > 1 at 32 x 32."""
        x = self.proj(self.forward_features(images)[-1])
        return self.head(x.mean((2, 3)))

    def convert_released(self, state_dict):
        """Rename, reshape and reorder the tensors of the authors' SecViT checkpoint to this file's; returns a new dict."""
        names = ((r"^patch_embed\.proj", "stem"), (r"^layers\.(\d)\.blocks", r"stages.\1"), (r"^proj", "proj.0"), (r"^norm", "proj.1"),
                 (r"^layers\.(\d)\.downsample\.reduction", r"downsamples.\1.0"), (r"^layers\.(\d)\.downsample\.norm", r"downsamples.\1.1"),
                 (r"norm([12])\.norm", r"norm\1"), (r"attn\.lepe", "attn.lce"), (r"attn\.out_proj", "attn.proj"),
                 (r"ffn\.dwconv", "ffn.conv"), (r"\.pos\.", ".cpe."), (r"gamma_([12])", r"scale\1.weight"))
        ours, converted = self.state_dict(), {}
        for key, value in state_dict.items():
            if key.endswith("RoPE.angle"):  # recomputed from its formula
                continue
            name = key
            for pattern, new in names:
                name = re.sub(pattern, new, name)
            rows = {name: value}
            if ".qkv." in name:             # rows [all q | all k | all v]
                rows = {name.replace(".qkv.", f".{part}."): third for part, third in zip("qkv", value.chunk(3))}
            for name, value in rows.items():
                if name in ours and value.squeeze().shape == ours[name].squeeze().shape:
                    value = value.reshape(ours[name].shape)  # 1x1 convolutions are linear layers here
                converted[name] = value
        return converted

    def load_released(self, state_dict):
        """Load the authors' SecViT checkpoint (its "model" entry) strictly; needs a model built with `released=True`."""
        self.load_state_dict(self.convert_released(state_dict))


def secvit_t(num_classes=1000, drop_path_rate=0.1, **overrides):
    """SecViT-T, 14.87 M parameters (14.98 M released)."""
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["secvit_t"], **overrides})


def secvit_s(num_classes=1000, drop_path_rate=0.15, **overrides):
    """SecViT-S, 26.56 M parameters (26.78 M released)."""
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["secvit_s"], **overrides})


def secvit_b(num_classes=1000, drop_path_rate=0.4, **overrides):
    """SecViT-B, 54.26 M parameters (54.68 M released)."""
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["secvit_b"], **overrides})


def secvit_l(num_classes=1000, drop_path_rate=0.5, **overrides):
    """SecViT-L, 95.92 M parameters (96.50 M released)."""
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["secvit_l"], **overrides})


# ----------------------------------------------------------------------------------- ablations; the main model ends above
STRIPES = (1, 2, 7, 7)  # rows or columns a stripe, stage by stage: CSWin, arXiv 2107.00652


def stripe_attention(q, k, v, width):
    """Attention inside stripes of up to `width` rows, as many as needed and as equal as can be: (B, h, H, W, d) -> the same."""
    H, W = q.shape[2:4]
    runs = [(count, rows * W) for count, rows in cut_runs(H, (H + width - 1) // width)]
    return run_attention(*(t.flatten(0, 1).flatten(1, 2) for t in (q, k, v)), runs).view(q.shape)


def cross_shaped_attention(q, k, v, H, W, width):
    """Cross-shaped windows: the first half of the heads attends in horizontal stripes, the second in vertical ones.

    Args: q, k, v (B, h, N, d), an even number of heads; H, W, the map's sides; width, most rows or columns of a stripe.
    Returns: (B, h, N, d). Where `width` does not divide a side stripes are narrower; no token is padding.
    """
    half = q.shape[1] // 2
    q, k, v = (t.unflatten(2, (H, W)) for t in (q, k, v))                               # (B, h, H, W, d)
    horizontal = stripe_attention(*(t[:, :half] for t in (q, k, v)), width)
    vertical = stripe_attention(*(t[:, half:].transpose(2, 3) for t in (q, k, v)), width).transpose(2, 3)
    return torch.cat((horizontal, vertical), 1).flatten(2, 3)


class CSWA(SECA):
    """SECA with cross-shaped windows of `width` in place of clusters (Table 6): (B, H, W, C) -> the same.

    Raises: ValueError for an odd number of heads.
    """

    def __init__(self, dim, heads, width, lce=True, rope=False):
        if heads % 2:
            raise ValueError(f"heads = {heads} do not split into two halves, one for horizontal and one for vertical stripes")
        super().__init__(dim, heads, 1, lce, rope)
        self.width = width

    def forward(self, x):
        q, k = self.queries_keys(x)
        v = self.v(x)
        y = cross_shaped_attention(q, k, self.split_heads(v), *x.shape[1:3], self.width)
        y = y.transpose(1, 2).reshape(x.shape)                                          # (B, h, N, d) -> (B, H, W, C)
        return self.proj(y if self.lce is None else y + self.lce(v))


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbedding(nn.Module):
    """Swin's: images (B, 3, H, W), zero-padded right and bottom to whole 4 x 4 patches, -> (B, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 4, 4)
        self.norm = MapNorm(dim)

    def forward(self, x):
        return self.norm(self.conv(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))))


class PatchMerging(nn.Module):
    """Swin's: 2 x 2 tokens, column by column, zero-padded right and bottom, to one; (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim, eps=1e-6)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False)

    def forward(self, x):
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)).permute(0, 2, 3, 1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)           # (B, ceil(H / 2), ceil(W / 2), 4C)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------ SEC-Swin
VARIANTS |= {
    "sec_swin_t": dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768), heads=(3, 6, 12, 24)),
    "sec_swin_s": dict(depths=(2, 2, 18, 2), dims=(96, 192, 384, 768), heads=(3, 6, 12, 24)),
}


class SECSwin(nn.Module):
    """Swin (arXiv 2103.14030) with SECA for its window attention: no CPE, no convolutional stem (Table 2a).

    Args and `channels` as SecViT's. `proj`, before averaging, is only Swin's last norm.
    """
    forward_features, forward = SecViT.forward_features, SecViT.forward

    def __init__(self, *, num_classes, drop_path_rate, depths, dims, heads, clusters=(32, 8, 2, 1)):
        super().__init__()
        self.channels = tuple(dims)
        self.stem = PatchEmbedding(dims[0])
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dims[i], None, SECA(dims[i], heads[i], clusters[i]), ratio=4, drop_path=next(rates))
                            for _ in range(depths[i])))
            for i in range(4))
        self.downsamples = nn.ModuleList(PatchMerging(dims[i], dims[i + 1]) for i in range(3))
        self.proj = MapNorm(dims[3])
        self.head = nn.Linear(dims[3], num_classes)
        self.apply(init_weights)


def sec_swin_t(num_classes=1000, drop_path_rate=0.2, **overrides):
    """SEC-Swin-T, 28.38 M parameters."""
    return SECSwin(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["sec_swin_t"], **overrides})


def sec_swin_s(num_classes=1000, drop_path_rate=0.3, **overrides):
    """SEC-Swin-S, 49.79 M parameters."""
    return SECSwin(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["sec_swin_s"], **overrides})


# ------------------------------------------------------------------------------------------------------- SEC-FasterViT
VARIANTS |= {
    "sec_fastervit_0": dict(depths=(2, 3, 6, 5), dims=(64, 128, 256, 512), heads=(None, None, 8, 16), stem_dim=64),
    "sec_fastervit_1": dict(depths=(1, 3, 8, 5), dims=(80, 160, 320, 640), heads=(None, None, 8, 16), stem_dim=32),
}


class ConvBlock(nn.Module):
    """FasterViT's first two stages: two 3x3 convolutions with BN, GELU between, with a shortcut; (B, H, W, C) -> the same."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.convs = nn.Sequential(*conv_norm(dim, dim, 1), nn.GELU(), *conv_norm(dim, dim, 1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.convs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PositionMLP(nn.Sequential):
    """A learned function of row and column: coordinates (R,) and (S,) -> (R, S, dim), at all pairs of them."""

    def __init__(self, dim):
        super().__init__(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, dim, bias=False))

    def forward(self, rows, columns):
        return super().forward(torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).to(self[0].weight.dtype))


class TokenPosition(PositionMLP):
    """FasterViT's position encoding of a map (B, H, W, C): the MLP at the tokens' places, from -1 to 1 along each side -> (H, W, C)."""

    def forward(self, x):
        return super().forward(*((2 * torch.arange(side, device=x.device) - (side - 1)) / max(side - 1, 1) for side in x.shape[1:3]))


class GlobalAttention(SECA):
    """FasterViT's attention in the last stage, one window over the whole map, with a position bias: (B, H, W, C) -> the same.

    The bias of a pair of tokens is 16 sigmoid(MLP(offset)); offsets are relative to the map's sides and on a logarithmic scale
    (Swin V2, arXiv 2111.09883, Eq. 4), which FasterViT evaluates for windows of 7 x 7 and this for whatever map comes: (h, N, N) a block.
    """

    def __init__(self, dim, heads):
        super().__init__(dim, heads, clusters=1, lce=False)
        self.bias = PositionMLP(heads)

    def position_bias(self, H, W, device):
        """(h, N, N), queries by keys, for a map of H x W."""
        offsets = [8 * torch.arange(1 - side, side, device=device) / max(side - 1, 1) for side in (H, W)]   # -8 to 8, Eq. 4
        table = 16 * self.bias(*(t.sign() * (t.abs() + 1).log2() / 3 for t in offsets)).sigmoid()           # (2H-1, 2W-1, h)
        rows, columns = (torch.arange(side, device=device) for side in (H, W))
        rows = rows[:, None] - rows + H - 1                                             # (H, H), of query and key
        columns = columns[:, None] - columns + W - 1                                    # (W, W)
        bias = table.permute(2, 0, 1)[:, rows[:, None, :, None], columns[None, :, None]]  # (h, H, W, H, W)
        return bias.flatten(3, 4).flatten(1, 2).contiguous()

    def forward(self, x):
        q, k = self.queries_keys(x)
        bias = self.position_bias(*x.shape[1:3], x.device).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, self.split_heads(self.v(x)), attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class SECFasterViT(nn.Module):
    """FasterViT (arXiv 2306.06189) with SECA for the hierarchical attention of stage 3 (Table 2b).

    Args and `channels` as SecViT's; of heads the last two are used; clusters, one number, of stage 3; stem_dim, channels between
    the stem's convolutions. `proj`, before averaging, is only FasterViT's last norm.
    """
    forward_features, forward = SecViT.forward_features, SecViT.forward

    def __init__(self, *, num_classes, drop_path_rate, depths, dims, heads, stem_dim, clusters=2):
        super().__init__()
        self.channels = tuple(dims)
        stem = []
        for in_dim, out_dim in ((3, stem_dim), (stem_dim, dims[0])):
            stem += [nn.Conv2d(in_dim, out_dim, 3, 2, padding=1, bias=False), nn.BatchNorm2d(out_dim, eps=1e-4), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])

        def block(i):
            if i < 2:
                return ConvBlock(dims[i], next(rates))
            if i == 2:
                return Block(dims[2], None, SECA(dims[2], heads[2], clusters), ratio=4, drop_path=next(rates))
            return Block(dims[3], TokenPosition(dims[3]), GlobalAttention(dims[3], heads[3]), ratio=4, drop_path=next(rates))
        self.stages = nn.ModuleList(nn.Sequential(*(block(i) for _ in range(depths[i]))) for i in range(4))
        self.downsamples = nn.ModuleList(
            nn.Sequential(MapNorm(dims[i]), nn.Conv2d(dims[i], dims[i + 1], 3, 2, padding=1, bias=False)) for i in range(3))
        self.proj = nn.BatchNorm2d(dims[3])
        self.head = nn.Linear(dims[3], num_classes)
        self.apply(init_weights)


def sec_fastervit_0(num_classes=1000, drop_path_rate=0.2, **overrides):
    """SEC-FasterViT-0, 25.04 M parameters."""
    return SECFasterViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["sec_fastervit_0"], **overrides})


def sec_fastervit_1(num_classes=1000, drop_path_rate=0.2, **overrides):
    """SEC-FasterViT-1, 40.83 M parameters."""
    return SECFasterViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["sec_fastervit_1"], **overrides})


# ------------------------------------------------------------------------------------------------------------- drawing
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what trained weights expect


def example_picture():
    """A 480 x 320 landscape drawn here, so that the file can show itself without a photo."""
    picture = Image.new("RGB", (480, 320))
    draw = ImageDraw.Draw(picture)
    for y in range(320):
        draw.line((0, y, 480, y), (120 + y // 4, 170 + y // 6, 235 - y // 8))               # sky
    draw.ellipse((350, 30, 410, 90), (255, 225, 120))                                       # sun
    draw.polygon([(0, 220), (110, 110), (230, 215), (330, 140), (480, 230), (480, 320), (0, 320)], (96, 108, 128))
    draw.rectangle((0, 225, 480, 320), (86, 140, 62))                                       # meadow
    draw.polygon([(210, 320), (250, 225), (262, 225), (330, 320)], (196, 170, 120))         # path
    draw.rectangle((60, 170, 170, 265), (206, 92, 70))                                      # house
    draw.polygon([(50, 172), (115, 120), (180, 172)], (92, 52, 48))
    draw.rectangle((100, 215, 128, 265), (70, 42, 36))
    draw.rectangle((138, 190, 160, 212), (250, 240, 190))
    draw.rectangle((392, 180, 406, 262), (92, 66, 44))                                      # tree
    draw.ellipse((350, 105, 448, 205), (38, 92, 46))
    return picture


def load_picture(path, longer_side=512):
    """Read any picture Pillow reads, upright by its EXIF orientation, as RGB with the given longer side and no side under 32.

    Grey of more than 8 bits is stretched from its darkest to its brightest value, which Pillow would clip.
    """
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float32)
        picture = Image.fromarray((255 * (values - values.min()) / max(np.ptp(values), 1e-9)).astype(np.uint8))
    picture = picture.convert("RGB")
    scale = longer_side / max(picture.size)
    return picture.resize([max(32, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def load_weights(factory, path):
    """Build `factory`'s model with a file's weights: train_imagenet.py's checkpoint, a bare state dict or the authors' file.

    Raises: OSError if the file cannot be opened, ValueError if it holds no weights of this model.
    """
    with open(path, "rb") as file:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):                # the authors' files hold one
                state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("model", state)
            classes = state["head.weight"].shape[0]
        except Exception as error:  # torch.load raises half a dozen types for files that are not its own
            raise ValueError(f"no weights in it ({type(error).__name__})") from None
    released = "patch_embed.proj.0.weight" in state
    options = {"released": True} if released or "stages.0.0.ffn.conv.weight" in state else {}
    try:
        model = factory(num_classes=classes, **options)
        (model.load_released if released else model.load_state_dict)(state)
    except (RuntimeError, TypeError) as error:  # TypeError: SEC-Swin and SEC-FasterViT have no `released`
        raise ValueError(f"weights of another model ({' '.join(str(error).split())[:200]})") from None
    return model.eval()


def tile(panels):
    """Put (caption, picture) pairs of equal size side by side."""
    W, H = panels[0][1].size
    sheet = Image.new("RGB", (len(panels) * (W + 8) - 8, H + 20), "white")
    for i, (caption, picture) in enumerate(panels):
        sheet.paste(picture, (i * (W + 8), 20))
        ImageDraw.Draw(sheet).text((i * (W + 8) + 2, 3), caption, "black")
    return sheet


@torch.no_grad()
def draw_clusters(model, picture):
    """The paper's Fig. 4: the picture beside the clusters in the last block of each stage that has several, one colour a cluster.

    Clusters differ from head to head; the first head is drawn. Colours run from the most to the least similar cluster.
    """
    seen = {}
    layers = {i: stage[-1].attn for i, stage in enumerate(model.stages, 1) if not isinstance(stage[-1], ConvBlock)}
    hooks = [attn.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})) for attn in layers.values()]
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    model.forward_features((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    panels = [("image", picture)]
    for hook in hooks:
        hook.remove()
    for i, attn in layers.items():
        _, H, W, _ = seen[attn].shape
        clusters = min(attn.clusters, H * W)
        if clusters == 1:
            continue
        order = cluster_order(attn.queries_keys(seen[attn])[1], descending=not attn.rope)[0, 0]  # (N,)
        lengths = [length for count, length in cut_runs(H * W, clusters) for _ in range(count)]
        colours = torch.tensor([colorsys.hsv_to_rgb(0.8 * c / clusters, 0.75, 0.95 - 0.3 * (c % 2)) for c in range(clusters)])
        colours = (255 * colours).byte().repeat_interleave(torch.tensor(lengths), 0)    # (N, 3), by sorted place
        drawn = torch.empty_like(colours).index_copy_(0, order, colours).view(H, W, 3)
        drawn = Image.fromarray(drawn.numpy()).resize(picture.size, Image.Resampling.NEAREST)
        panels.append((f"stage {i}: {clusters} clusters", Image.blend(picture.convert("L").convert("RGB"), drawn, 0.7)))
    return tile(panels)


def main():
    """Command line: read a picture, draw what the mechanism does to it, write a PNG."""
    parser = argparse.ArgumentParser(description="Draw SecViT's clusters on a picture, stage by stage (paper, Fig. 4).")
    parser.add_argument("picture", nargs="?", help="any file Pillow reads; without it a picture drawn here")
    parser.add_argument("-o", "--output", default="secvit.png", help="where to write the drawing")
    parser.add_argument("--model", default="secvit_t", choices=sorted(VARIANTS))
    parser.add_argument("--weights", help="trained weights; without them the model is random and so are its clusters")
    args = parser.parse_args()
    torch.manual_seed(0)
    factory, reading = globals()[args.model], args.picture
    try:
        picture = load_picture(args.picture) if args.picture else example_picture()
        reading = args.weights
        model = load_weights(factory, args.weights) if args.weights else factory().eval()
        reading = args.output
        draw_clusters(model, picture).save(args.output)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow on broken files
        parser.exit(2, f"{reading}: {' '.join(str(error).split())}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
