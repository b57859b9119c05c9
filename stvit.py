"""STViT: Vision Transformer with Super Token Sampling
Huaibo Huang, Xiaoqiang Zhou, Jie Cao, Ran He, Tieniu Tan; CVPR 2023, arXiv 2211.11167v2

Mechanism. Tokens are pooled into super tokens as pixels are into superpixels: every token is
softly associated with the 3x3 cells around it. Attention runs among the few super tokens, and the
same association maps its result back to all tokens.

Symbols.
    paper                   here
    N, C                    N = H * W tokens of C channels, B samples
    m super tokens          M = H' * W', one super token per cell
    h x w, the grid size    grid (gh, gw), tokens per cell; P = gh * gw
    X, S (sec. 3.2.1)       tokens by cell (B, H', W', P, C), supers (B, H', W', C)
    Q (Eq. 5)               association (B, M, P, 9); by cell (B, H', W', P, 9) while sampling
    q, k, v, A (Eq. 9, 10)  qkv, a linear layer; A(S) is inside F.scaled_dot_product_attention
    heads (Table 8)         heads, h in shapes; d = C / h is the width of a head
    STS, MHSA, TU           sample_super_tokens, SuperTokenAttention.attend, upsample_super_tokens
    CPE, STA, STT block     DepthwiseConv (Block.cpe), SuperTokenAttention, Block
Inside a stage every map is channels-last, (B, H, W, C): linear layers, norms and convolutions
share this layout.

Reading order. sample_super_tokens -> upsample_super_tokens -> SuperTokenAttention -> ConvFFN ->
Block -> STViT. What follows the factories is not needed to understand the model.

Differs from the text.
- The text speaks of learned associations. Here, as in the released code, Q has no gradient; Eq. 6
  and 11 are differentiated in X and S only.

The text is ambiguous.
- A token at the border has fewer than nine cells around it. Here, as in the released code, a cell
  outside the map is a zero vector: it takes part in the softmax of Eq. 5 and its weight is
  dropped. A corner token's weights thus sum to less than 1, to 4/9 where all nine logits are 0.
  Eq. 6 normalises this away, Eq. 11 does not.
- Up-sampled tokens are "added to the original tokens": here by the shortcut of Eq. 2 only.
- GELU and batch normalization are "used after each convolution" of the stem: here in this order.

The text is silent.
- As in the released code: sides that the grid does not divide are zero-padded right and bottom;
  half the width in the first two convolutions of the stem; BatchNorm after each down-sampling
  convolution; GELU before the depth-wise convolution of ConvFFN; LayerNorm's eps 1e-6; biases;
  LayerScale of 1e-6 in stages 3 and 4 of STViT-B and -L; the rows of `qkv` are head-major, each
  head's q, k and v rows adjacent; initial weights are torch's, but N(0, 0.02) in the classifier.
- Our choice for Tables 6, 7 and 9: without iterations, up-sampling is bilinear. Patches without
  overlap keep the 3x3 convolutions between stages, norms stay BatchNorm. Tables of positions start
  at N(0, 0.02), belong to 224 x 224 and are interpolated for other sizes.
"""
import argparse
import colorsys
import math
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

# ----------------------------------------------------------------------------------------- variants
VARIANTS = {  # Table 8
    "stvit_s": dict(depths=(3, 5, 9, 3), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
    "stvit_b": dict(
        depths=(4, 6, 14, 6), dims=(96, 192, 384, 512), heads=(2, 3, 6, 8),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
    "stvit_l": dict(
        depths=(4, 7, 19, 8), dims=(96, 192, 448, 640), heads=(2, 3, 7, 10),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
}
GRIDS = (8, 4, 1, 1)  # side of a cell in tokens, per stage (sec. 3.3)
FFN_RATIO = 4  # sec. 3.3
PROJECTION_DIM = 1024  # Table 8


# --------------------------------------------------------------------------------------------- core
def sample_super_tokens(x, grid, iterations=1):
    """Super token sampling (sec. 3.2.1, Eq. 5 and 6).

    With all super tokens for every token, for one sample X (N, C), this is
        S = mean of X in each cell                                      # (M, C)
        Q = (X @ S.T / C ** 0.5).softmax(1)                             # (N, M), Eq. 5
        S = (Q / Q.sum(0)).T @ X                                        # (M, C), Eq. 6
    with the last two lines once per iteration (Eq. 19 and 20). The code keeps, of each token's row
    of Q, only the nine columns of the 3x3 cells around its own (Fig. 4, Eq. 8).

    Args:
        x: (B, C, H, W), tokens.
        grid: (gh, gw), tokens per cell.
        iterations: number of updates; 0 keeps the means of the cells.
    Returns:
        supers: (B, C, H', W') with H' = ceil(H / gh) and W' = ceil(W / gw).
        association: (B, M, P, 9), Q without gradient; None without iterations.
    """
    tokens = split_cells(x, grid)                                       # (B, H', W', P, C), X
    supers = tokens.mean(3)                                             # (B, H', W', C), first S
    association = None
    for _ in range(iterations):
        association = associate(tokens, supers)                         # (B, H', W', P, 9), Eq. 5
        supers = update_super_tokens(tokens, association)               # (B, H', W', C), Eq. 6
    if association is not None:
        association = association.to(tokens.dtype).flatten(1, 2)        # (B, M, P, 9)
    return supers.permute(0, 3, 1, 2), association


def upsample_super_tokens(supers, association, grid, size):
    """Token up-sampling (sec. 3.2.3): X = Q S (Eq. 11).

    Args:
        supers: (B, C, H', W').
        association: (B, M, P, 9), or None for bilinear interpolation (Table 7, no iterations).
        grid: (gh, gw), tokens per cell.
        size: (H, W) of the token map.
    Returns: (B, C, H, W), each token the association-weighted sum of the 3x3 super tokens around
        it, where super tokens outside the map are zero.
    """
    if association is None:
        x = F.interpolate(supers, scale_factor=grid, mode="bilinear")
    else:
        supers = supers.permute(0, 2, 3, 1)                             # (B, H', W', C), S
        neighbours = GatherNeighbours.apply(supers).flatten(1, 2)       # (B, M, 9, C)
        tokens = association @ neighbours                               # (B, M, P, C), Eq. 11
        tokens = tokens.unflatten(1, supers.shape[1:3])                 # (B, H', W', P, C)
        x = merge_cells(tokens, grid).permute(0, 3, 1, 2)
    return x[:, :, :size[0], :size[1]]


def associate(tokens, supers):
    """Association Q of each token with the 3x3 super tokens around it, without gradient.

    Eq. 5; it replaces Eq. 4, the distances of superpixel sampling networks.

    Args: tokens (B, H', W', P, C), X; supers (B, H', W', C), S.
    Returns: (B, H', W', P, 9) in at least float32; each token's nine weights sum to 1. In memory
        the 9-axis comes before P, which makes the softmax and the product in Eq. 6 faster.
    """
    compute_dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.no_grad():
        supers = supers * tokens.shape[-1] ** -0.5      # before the product, which may be float16
        neighbours = gather_neighbours(supers)                          # (B, H', W', 9, C)
        logits = neighbours @ tokens.mT                                 # (B, H', W', 9, P)
        return logits.softmax(3, dtype=compute_dtype).mT                # (B, H', W', P, 9), Eq. 5


def update_super_tokens(tokens, association):
    """Weighted mean of the tokens of the 3x3 cells around each cell (Eq. 6), differentiable in X.

    The columns of Q are normalised after the product with X.

    Args: tokens (B, H', W', P, C), X; association (B, H', W', P, 9), Q.
    Returns: (B, H', W', C), S.
    """
    column_sum = fold_neighbours(association.mT.sum(4, keepdim=True))   # (B, H', W', 1)
    parts = association.to(tokens.dtype).mT @ tokens                    # (B, H', W', 9, C)
    total = FoldNeighbours.apply(parts)                                 # (B, H', W', C), Q^T X
    supers = total / (column_sum + 1e-12)                               # Eq. 6; 1e-12 as released
    return supers.to(total.dtype)


def split_cells(x, grid):
    """(B, C, H, W) -> tokens by cell (B, H', W', P, C), zero-padded right and bottom."""
    gh, gw = grid
    H, W = x.shape[2:]
    x = x.permute(0, 2, 3, 1)
    if H % gh != 0 or W % gw != 0:  # torch 2.6 would compile again for each remainder of "H % gh"
        x = F.pad(x, (0, 0, 0, -W % gw, 0, -H % gh))                    # (B, H'*gh, W'*gw, C)
    x = x.unflatten(2, (-1, gw)).unflatten(1, (-1, gh))                 # (B, H', gh, W', gw, C)
    return x.transpose(2, 3).flatten(3, 4)


def merge_cells(tokens, grid):
    """Tokens by cell (B, H', W', P, C) -> (B, H'*gh, W'*gw, C), the inverse of `split_cells`."""
    x = tokens.unflatten(3, grid).transpose(2, 3)                       # (B, H', gh, W', gw, C)
    return x.flatten(3, 4).flatten(1, 2)


def gather_neighbours(cells):
    """Unfold: (B, H', W', C) -> (B, H', W', 9, C), the 3x3 cells around each cell.

    They are in row-major order, zeros outside the map. Appendix E names unfold as slow on GPUs;
    here it is a strided view, with the same results.
    """
    padded = F.pad(cells, (0, 0, 1, 1, 1, 1))                           # (B, H' + 2, W' + 2, C)
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)                    # (B, H', W', C, 3, 3)
    return windows.flatten(4).transpose(3, 4).contiguous()


def fold_neighbours(parts):
    """Fold: (B, H', W', 9, C) -> (B, H', W', C), the adjoint of `gather_neighbours`.

    Adds each cell's nine contributions to its neighbours; those outside the map are dropped.
    Appendix E names fold as slow on GPUs; here it is nine shifted sums, with the same results.
    """
    B, rows, columns, _, C = parts.shape
    if torch.compiler.is_compiling():   # inductor takes minutes for nine updates of slices
        shifted = []
        for i in range(9):
            row, column = divmod(i, 3)
            sides = (0, 0, column - 1, 1 - column, row - 1, 1 - row)    # -1 crops
            shifted.append(F.pad(parts[:, :, :, i], sides))             # (B, H', W', C)
        return sum(shifted)
    total = parts.new_zeros(B, rows + 2, columns + 2, C)
    for i in range(9):
        row, column = divmod(i, 3)
        total[:, row:row + rows, column:column + columns] += parts[:, :, :, i]
    return total[:, 1:-1, 1:-1]


class GatherNeighbours(torch.autograd.Function):
    """`gather_neighbours`, with folding as its gradient."""

    @staticmethod
    def forward(ctx, cells):
        return gather_neighbours(cells)

    @staticmethod
    def backward(ctx, grad):
        return fold_neighbours(grad)


class FoldNeighbours(torch.autograd.Function):
    """`fold_neighbours`, with gathering as its gradient."""

    @staticmethod
    def forward(ctx, parts):
        return fold_neighbours(parts)

    @staticmethod
    def backward(ctx, grad):
        return gather_neighbours(grad)


# ------------------------------------------------------------------------------------------- layers
class DepthwiseConv(nn.Conv2d):
    """Depth-wise k x k convolution with zero padding on channels-last maps (B, H, W, C)."""

    def __init__(self, dim, kernel_size):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)                       # (B, C, H, W), a view
        return super().forward(x).permute(0, 2, 3, 1)   # (B, H, W, C)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels in the type of its input, with statistics in at least float32.

    Under autocast torch's own returns float32, which every linear layer after it casts again.
    """

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        if x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class DropPath(nn.Module):
    """Add a residual branch, with stochastic depth: (x, branch) -> x + branch.

    In training, a sample's branch is dropped with probability `rate`, and the remaining branches
    are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x, branch):
        if not self.training or self.rate == 0:
            return x + branch
        keep = F.dropout(branch.new_ones(branch.shape[0]), self.rate)   # 0 or 1 / (1 - rate)
        return torch.addcmul(x, branch, keep.view(-1, 1, 1, 1))         # x + keep * branch


class LayerScale(nn.Module):
    """Learned factor per channel."""

    def __init__(self, dim, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.weight


class SuperTokenAttention(nn.Module):
    """Sample super tokens, attend among them, map back (Eq. 14): (B, H, W, C) -> the same.

    Args:
        dim, heads: C and h, which divides C.
        grid: (gh, gw), tokens per cell; (1, 1) is plain attention.
        iterations: sampling steps, see `sample_super_tokens`.
        bias_side: side of a RelativePositionBias among the super tokens (Table 6), or None.
    Raises: ValueError for heads that do not divide `dim`.
    """

    def __init__(self, dim, heads, grid, iterations=1, bias_side=None):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        self.heads = heads
        self.grid = tuple(grid)
        self.iterations = iterations
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = RelativePositionBias(heads, bias_side) if bias_side else None

    def queries_keys_values(self, x):
        """(B, H, W, C) -> three tensors (B, h, N, d) (Eq. 9)."""
        qkv = self.qkv(x).flatten(1, 2)                                 # (B, N, 3 * C)
        qkv = qkv.unflatten(2, (self.heads, 3, -1))                     # (B, N, h, 3, d)
        return [t.transpose(1, 2) for t in qkv.unbind(3)]

    def attend(self, x):
        """Multi-head self-attention over all positions of x (B, H, W, C) (Eq. 9 and 10)."""
        q, k, v = self.queries_keys_values(x)                           # each (B, h, N, d)
        bias = None if self.bias is None else self.bias(*x.shape[1:3])  # (1, h, N, N)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)     # (B, h, N, d), Eq. 10
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def forward(self, x):
        if self.grid == (1, 1):
            return self.attend(x)
        x = x.permute(0, 3, 1, 2)                                       # (B, C, H, W), a view
        supers, association = sample_super_tokens(x, self.grid, self.iterations)
        supers = self.attend(supers.permute(0, 2, 3, 1))                # (B, H', W', C)
        supers = supers.permute(0, 3, 1, 2)                             # (B, C, H', W')
        y = upsample_super_tokens(supers, association, self.grid, x.shape[2:])
        return y.permute(0, 2, 3, 1)                                    # (B, H, W, C)


class ConvFFN(nn.Module):
    """Linear, GELU, 3x3 depth-wise convolution with shortcut, linear: (B, H, W, C) -> the same.

    Args:
        dim: C.
        ratio: expansion of the hidden layer.
        conv: False for no convolution (Table 6).
        shortcut: False for no shortcut around the convolution (Table 6).
    """

    def __init__(self, dim, ratio, conv, shortcut):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.conv = DepthwiseConv(ratio * dim, 3) if conv else None
        self.shortcut = shortcut
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x):
        hidden = F.gelu(self.fc1(x))                                    # (B, H, W, ratio * C)
        if self.conv is None:
            return self.fc2(hidden)
        local = self.conv(hidden)
        return self.fc2(hidden + local if self.shortcut else local)


def convolutional_stem(dim):
    """Four 3x3 convolutions with strides 2, 1, 2, 1 (sec. 3.1): (B, 3, H, W) -> stride 4."""
    stem = nn.Sequential()
    in_dim = 3
    for out_dim, stride in ((dim // 2, 2), (dim // 2, 1), (dim, 2), (dim, 1)):
        stem.append(nn.Conv2d(in_dim, out_dim, 3, stride, padding=1))
        stem.append(nn.GELU())
        stem.append(nn.BatchNorm2d(out_dim))
        in_dim = out_dim
    return stem


def downsampling(in_dim, dim):
    """3x3 convolution of stride 2 (appendix B) and BatchNorm: (B, C, H, W) -> stride 2."""
    conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(dim))


def conv_projection(dim):
    """1x1 convolution, BatchNorm and Swish before the average (appendix B)."""
    conv = nn.Conv2d(dim, PROJECTION_DIM, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(PROJECTION_DIM), nn.SiLU())


# -------------------------------------------------------------------------------------------- block
class Block(nn.Module):
    """Super token transformer block (Eq. 1 to 3): (B, H, W, C) -> the same.

    Args:
        dim, heads, grid, iterations, bias_side: see SuperTokenAttention.
        drop_path: rate of stochastic depth.
        layer_scale: initial value of both LayerScales, or None for none.
        cpe: whether to have the convolutional position embedding of Eq. 1.
        conv_ffn, ffn_shortcut: `conv` and `shortcut` of ConvFFN.
    """

    def __init__(
        self, dim, heads, grid, *, iterations, bias_side, drop_path, layer_scale,
        cpe, conv_ffn, ffn_shortcut,
    ):
        super().__init__()
        self.cpe = DepthwiseConv(dim, 3) if cpe else None
        self.norm1 = LayerNorm(dim)
        self.attn = SuperTokenAttention(dim, heads, grid, iterations, bias_side)
        self.norm2 = nn.BatchNorm2d(dim)
        self.ffn = ConvFFN(dim, FFN_RATIO, conv_ffn, ffn_shortcut)
        self.scale1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.scale2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        if self.cpe is not None:
            x = x + self.cpe(x)                                         # Eq. 1
        x = self.drop_path(x, self.scale1(self.attn(self.norm1(x))))   # Eq. 2
        y = self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)       # (B, H, W, C)
        return self.drop_path(x, self.scale2(self.ffn(y)))             # Eq. 3


# -------------------------------------------------------------------------------------------- model
def check_arguments(num_classes, drop_path_rate, **stages):
    """Raise ValueError unless every tuple in `stages` holds four integers of at least 1."""
    if num_classes < 0:
        raise ValueError(f"num_classes = {num_classes}, expected at least 0")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate = {drop_path_rate}, expected 0 <= rate < 1")
    for name, values in stages.items():
        if len(values) != 4 or min(values) < 1:
            raise ValueError(f"{name} = {values}, expected 4 values of at least 1, one per stage")


def build_stages(depths, drop_path_rate, block):
    """Four stages of blocks, each from `block(stage, rate)`.

    The rates of stochastic depth rise linearly from 0 to `drop_path_rate` at the last block.
    """
    last = max(sum(depths) - 1, 1)
    index = 0
    stages = nn.ModuleList()
    for stage, depth in enumerate(depths):
        blocks = nn.Sequential()
        for _ in range(depth):
            blocks.append(block(stage, drop_path_rate * index / last))
            index += 1
        stages.append(blocks)
    return stages


class STViT(nn.Module):
    """Four stages of super token blocks at strides 4, 8, 16 and 32 (Fig. 3, Table 8).

    Args:
        num_classes: width of the classifier; 0 for none.
        drop_path_rate: stochastic depth of the last block; rates rise linearly from 0.
        depths, dims, heads: blocks, channels and heads, one entry per stage; in Table 9 also
            (2, 2, 6, 2), (96, 192, 384, 768) and (3, 6, 12, 24).
        grids: side of a cell in tokens, one per stage.
        iterations: sampling steps; 0 for the means of the cells (Table 7).
        layer_scale: initial value of LayerScale or None, one per stage.
        stem: "conv", or "patch" for 4 x 4 patches without overlap (Tables 6, 7 and 9).
        projection: False for BatchNorm alone before the average (Tables 6, 7 and 9).
        position: "cpe"; "ape", a table of positions after the stem; "rpe", a bias in every
            attention; or None (Tables 6 and 9).
        conv_ffn, ffn_shortcut: False for an FFN without its convolution, or without the shortcut
            around it (Table 6).
    Attributes: channels, the widths of the four feature maps.
    Raises: ValueError for other values.
    """

    def __init__(
        self, *, num_classes, drop_path_rate, depths, dims, heads,
        grids=GRIDS, iterations=1, layer_scale=(None, None, None, None),
        stem="conv", projection=True, position="cpe", conv_ffn=True, ffn_shortcut=True,
    ):
        super().__init__()
        check_arguments(
            num_classes, drop_path_rate, depths=depths, dims=dims, heads=heads, grids=grids)
        check_ablations(iterations, layer_scale, stem, position, conv_ffn, ffn_shortcut)

        def block(stage, rate):
            side = grids[stage]
            return Block(
                dims[stage], heads[stage], (side, side), iterations=iterations,
                bias_side=bias_side(stage, side) if position == "rpe" else None,
                drop_path=rate, layer_scale=layer_scale[stage],
                cpe=position == "cpe", conv_ffn=conv_ffn, ffn_shortcut=ffn_shortcut,
            )

        self.channels = tuple(dims)
        self.stem = convolutional_stem(dims[0]) if stem == "conv" else PatchEmbedding(dims[0])
        self.position = PositionTable(dims[0], 56) if position == "ape" else nn.Identity()
        self.stages = build_stages(depths, drop_path_rate, block)
        self.downsamples = nn.ModuleList(downsampling(dims[i], dims[i + 1]) for i in range(3))
        self.proj = conv_projection(dims[3]) if projection else nn.BatchNorm2d(dims[3])
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(PROJECTION_DIM if projection else dims[3], num_classes)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_features(self, images):
        """(B, 3, H, W) -> four maps (B, C_i, ceil(H / s), ceil(W / s)), s = 4, 8, 16, 32.

        The maps are channels-last in memory.
        Raises: ValueError unless images are (B, 3, H, W) with both sides at least 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, "
                "expected (B, 3, H, W) with H and W at least 32")
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.position(self.stem(x))                                 # (B, C_1, H / 4, W / 4)
        maps = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.downsamples[i - 1](x)
            x = stage(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)        # blocks see (B, H, W, C)
            maps.append(x)
        return tuple(maps)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, num_classes), or pooled features (B, 1024) without classes.

        In train mode BatchNorm needs more than one value per channel: B > 1 at 32 x 32.
        """
        x = self.proj(self.forward_features(images)[-1])
        return self.head(x.mean((2, 3)))

    def convert_released(self, state_dict):
        """Rename and reshape the authors' tensors to this file's, see "released weights"."""
        return convert_released(state_dict, self.state_dict())

    def load_released(self, state_dict):
        """Load the authors' STViT checkpoint (its "model" entry) strictly."""
        self.load_state_dict(self.convert_released(state_dict))


# ---------------------------------------------------------------------------------------- factories
def stvit_s(num_classes=1000, drop_path_rate=0.1, **overrides):
    """STViT-S, 25.50 M parameters."""
    options = {**VARIANTS["stvit_s"], **overrides}
    return STViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def stvit_b(num_classes=1000, drop_path_rate=0.4, **overrides):
    """STViT-B, 51.69 M parameters."""
    options = {**VARIANTS["stvit_b"], **overrides}
    return STViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def stvit_l(num_classes=1000, drop_path_rate=0.6, **overrides):
    """STViT-L, 94.97 M parameters."""
    options = {**VARIANTS["stvit_l"], **overrides}
    return STViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


# ------------------------------------------------ the main model ends here: ablations and relatives
def check_ablations(iterations, layer_scale, stem, position, conv_ffn, ffn_shortcut):
    """Raise ValueError for values that no row of the paper's tables has."""
    if iterations < 0:
        raise ValueError(f"iterations = {iterations}, expected at least 0")
    if len(layer_scale) != 4:
        raise ValueError(f"layer_scale = {layer_scale}, expected 4 values, one per stage")
    if stem not in ("conv", "patch"):
        raise ValueError(f"stem = {stem!r}, expected 'conv' or 'patch'")
    if position not in ("cpe", "ape", "rpe", None):
        raise ValueError(f"position = {position!r}, expected 'cpe', 'ape', 'rpe' or None")
    if not conv_ffn and not ffn_shortcut:
        raise ValueError("ffn_shortcut = False, expected True without a convolution (conv_ffn)")


def bias_side(stage, grid):
    """Super tokens along a side of a stage's map for 224 x 224 images."""
    tokens = 224 // 4 // 2 ** stage
    return math.ceil(tokens / grid)


class PatchEmbedding(nn.Module):
    """4 x 4 patches without overlap, and BatchNorm (Table 6).

    (B, 3, H, W), zero-padded right and bottom -> (B, C, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, images):
        H, W = images.shape[2:]
        return self.norm(self.conv(F.pad(images, (0, -W % 4, 0, -H % 4))))


class PositionTable(nn.Module):
    """Adds a learned vector per position (Table 6, APE): (B, C, H, W) -> the same.

    The table is side x side and bilinearly interpolated for other maps.
    """

    def __init__(self, dim, side):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim, side, side))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x):
        return x + F.interpolate(self.weight, size=x.shape[2:], mode="bilinear")


class RelativePositionBias(nn.Module):
    """A learned bias per head and offset between two positions (Table 6, RPE; Swin).

    H, W -> (1, h, N, N) with N = H * W, held in memory. The table has one entry per offset on a
    side x side map and is interpolated for other maps; offset 0 stays in its middle.
    """

    def __init__(self, heads, side):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, heads, 2 * side - 1, 2 * side - 1))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, H, W):
        table = F.interpolate(self.weight, size=(2 * H - 1, 2 * W - 1), mode="bilinear")
        row = torch.arange(H, device=table.device)
        column = torch.arange(W, device=table.device)
        rows = row[:, None] - row + H - 1                               # (H, H), query - key
        columns = column[:, None] - column + W - 1                      # (W, W)
        bias = table[:, :, rows[:, None, :, None], columns[:, None]]    # (1, h, H, W, H, W)
        return bias.flatten(4).flatten(2, 3)


# --------------------------------------------------------------------------------- released weights
RELEASED_NAMES = (  # pattern in the authors' names, name here
    (r"^patch_embed\.proj", "stem"),
    (r"^layers\.(\d)\.blocks", r"stages.\1"),
    (r"^proj", "proj.0"),
    (r"^norm", "proj.1"),
    (r"^layers\.(\d)\.downsample\.proj", r"downsamples.\1"),
    (r"norm1\.norm", "norm1"),
    (r"attn\.stoken_refine", "attn"),
    (r"mlp2\.conv\.conv", "ffn.conv"),
    (r"mlp2", "ffn"),
    (r"pos_embed\.conv", "cpe"),
    (r"gamma_([12])", r"scale\1.weight"),
)


def convert_released(state_dict, ours):
    """Rename and reshape the tensors of the authors' STViT checkpoint; returns a new dict.

    Fold and unfold kernels are constants and dropped. The first release stored a 3x3 "shortcut"
    kernel in place of the identity around both depth-wise convolutions: it is added to the
    convolution's kernel, and our identity is subtracted from the centre tap.

    Args:
        state_dict: the authors' names and tensors.
        ours: state dict of the model to load, for the shapes.
    """
    converted = {}
    for key, value in state_dict.items():
        if key.endswith(("fold.weights", "shortcut")):
            continue
        shortcut = state_dict.get(re.sub(r"conv\.weight$", "shortcut", key))
        if key.endswith("conv.weight") and shortcut is not None:
            value = value + shortcut
            value[:, :, 1, 1] -= 1
        for pattern, name in RELEASED_NAMES:
            key = re.sub(pattern, name, key)
        if key in ours and value.squeeze().shape == ours[key].squeeze().shape:
            value = value.reshape(ours[key].shape)  # 1x1 convolutions are linear layers here
        converted[key] = value
    return converted


def read_weights(path):
    """State dict in a file and the model's options.

    The file is a train_imagenet.py checkpoint, a bare state dict or the authors' file.
    Raises: OSError if the file cannot be opened, ValueError if it holds no state dict.
    """
    with open(path, "rb") as file:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # in the authors' files
                state = torch.load(file, map_location="cpu", weights_only=True)
            args = state.get("args")
            options = args.get("option") if isinstance(args, dict) else None  # --option
            weights = state.get("ema") or state.get("model", state)  # averaged, if there are any
            return dict(weights), dict(options or {})
        except Exception as error:  # torch.load raises many types on files of other formats
            raise ValueError(f"no weights in it ({type(error).__name__})") from None


def load_weights(factory, path):
    """Build the model of `factory` with the weights in a file, in eval mode.

    Raises: OSError if the file cannot be opened, ValueError if it does not fit the model.
    """
    state, options = read_weights(path)
    try:
        classes = len(state.get("head.weight", ()))
        model = factory(num_classes=classes, **options)
        if "patch_embed.proj.0.weight" in state:  # the authors' names
            model.load_released(state)
        else:
            model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"weights of another model ({message})") from None
    return model.eval()


# ------------------------------------------------------------------------------------------ drawing
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)  # of ImageNet, as in training
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def to_tensor(image):
    """RGB image -> normalised tensor (1, 3, H, W)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels[None] / 255 - MEAN) / STD


def layer_inputs(model, layers, image):
    """Run `model` on an image and return the input of each of its `layers`."""
    inputs = {}

    def record(layer, args):
        inputs[layer] = args[0]

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    model.forward_features(to_tensor(image))
    for hook in hooks:
        hook.remove()
    return [inputs[layer] for layer in layers]


def nearest_super_tokens(attn, x):
    """For each token of x (1, H, W, C), the super token on the map with the largest weight in Q.

    Returns: (H, W), numbers from 1, and the number of super tokens.
    """
    supers, association = sample_super_tokens(x.permute(0, 3, 1, 2), attn.grid, attn.iterations)
    cells = supers.shape[2:]
    number = torch.arange(1, cells.numel() + 1).view(1, *cells, 1)      # 0 is outside the map
    neighbours = gather_neighbours(number).view(-1, 1, 9)               # (M, 1, 9)
    best = (association[0] * (neighbours > 0)).argmax(2, keepdim=True)  # (M, P, 1)
    nearest = neighbours.expand(association.shape[1:]).gather(2, best)  # (M, P, 1)
    nearest = merge_cells(nearest.unflatten(0, cells)[None], attn.grid)
    return nearest[0, :x.shape[1], :x.shape[2], 0], cells.numel()


def mosaic(segments, image):
    """Paint each segment of an (H, W) map of numbers in its mean colour, outlined in yellow."""
    segments = Image.fromarray(segments.numpy().astype(np.int32))
    segments = np.array(segments.resize(image.size, Image.Resampling.NEAREST))
    count = np.maximum(np.bincount(segments.ravel()), 1)
    channels = np.array(image).reshape(-1, 3).T
    mean = [np.bincount(segments.ravel(), channel) / count for channel in channels]
    painted = np.stack(mean, -1)[segments].astype(np.uint8)
    edge = np.zeros(segments.shape, bool)
    edge[:, 1:] |= segments[:, 1:] != segments[:, :-1]
    edge[1:] |= segments[1:] != segments[:-1]
    painted[edge] = (255, 255, 0)
    return Image.fromarray(painted)


@torch.no_grad()
def draw_super_tokens(model, image):
    """The image beside the super tokens of the last block of each stage that samples them."""
    attns = [stage[-1].attn for stage in model.stages]
    panels = [("image", image)]
    for i, (attn, x) in enumerate(zip(attns, layer_inputs(model, attns, image))):
        if attn.grid != (1, 1) and attn.iterations > 0:
            segments, count = nearest_super_tokens(attn, x)
            panels.append((f"stage {i + 1}: {count} super tokens", mosaic(segments, image)))
    return tile(panels)


def attention_rows(attn, x, rows):
    """Rows of the attention map of Eq. 10 for x (1, H, W, C), the mean of the heads: (rows, N)."""
    q, k, _ = attn.queries_keys_values(x)                               # (1, h, N, d)
    logits = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5                 # (1, h, rows, N)
    if attn.bias is not None:
        logits = logits + attn.bias(*x.shape[1:3])[:, :, rows]
    return logits.softmax(3)[0].mean(0)


def attention_map(attn, x, row, column):
    """Attention of the token at (row, column) of x (1, H, W, C) to all tokens, (H, W)."""
    _, H, W, _ = x.shape
    if attn.grid == (1, 1):
        return attention_rows(attn, x, [row * W + column]).view(H, W)
    supers, association = sample_super_tokens(x.permute(0, 3, 1, 2), attn.grid, attn.iterations)
    supers = supers.permute(0, 2, 3, 1)                                 # (1, H', W', C)
    attention = attention_rows(attn, supers, slice(None))               # (M, M)
    gh, gw = attn.grid
    cells = supers.shape[1:3]
    cell = row // gh * cells[1] + column // gw
    token = cell, row % gh * gw + column % gw
    weights = token_attention(association[0], attention, cells, token)  # (M, P)
    weights = merge_cells(weights.view(1, *cells, -1, 1), attn.grid)    # (1, H'*gh, W'*gw, 1)
    return weights[0, :H, :W, 0]


def token_attention(association, attention, cells, token):
    """Attention of one token to all tokens, its row of Q A(S) Q^T (Eq. 15), for visualisation only.

    As a product of matrices, with Q (N, M) and normalised columns in the second one, it is
        Q[token] @ A @ (Q / Q.sum(0)).T                                 # (N,)
    Args:
        association: (M, P, 9), Q of one sample, from `sample_super_tokens`.
        attention: (M, M), A(S) of Eq. 10, of a head or the mean of the heads.
        cells: (H', W'), with M = H' * W'.
        token: the cell in [0, M) and the position in it in [0, P).
    Returns: (M, P), tokens by cell. It sums to less than 1 for a token at the border.
    """
    cell, position = token
    parts = association.new_zeros(len(attention), 9)                    # (M, 9)
    parts[cell] = association[cell, position]
    row = fold_neighbours(parts.view(1, *cells, 9, 1)).flatten()        # (M,), Q[token]
    association = association.unflatten(0, cells)[None]                 # (1, H', W', P, 9)
    column_sum = fold_neighbours(association.sum(3)[..., None]).flatten()   # (M,), Q.sum(0)
    supers = (row @ attention) / (column_sum + 1e-12)                   # (M,)
    neighbours = gather_neighbours(supers.view(1, *cells, 1))           # (1, H', W', 9, 1)
    return (association @ neighbours).flatten(0, 2).squeeze(2)          # (M, P)


def blue_to_red(values):
    """Array of values from 0 to 255 -> RGB array with one more axis."""
    palette = []
    for level in range(256):
        palette.append(colorsys.hsv_to_rgb(0.7 * (1 - level / 255), 0.9, 0.3 + 0.7 * level / 255))
    return (255 * np.array(palette)[values]).astype(np.uint8)


def attention_panel(weights, image, row, column):
    """Weights (H, W) over the image from blue, 0, to red; the token at (row, column) is framed."""
    levels = (255 * weights / weights.max()).int().numpy()
    heat = Image.fromarray(blue_to_red(levels)).resize(image.size, Image.Resampling.NEAREST)
    panel = Image.blend(image.convert("L").convert("RGB"), heat, 0.6)
    height = image.height / weights.shape[0]
    width = image.width / weights.shape[1]
    box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
    ImageDraw.Draw(panel).rectangle(box, outline="white", width=2)
    return panel


@torch.no_grad()
def draw_attention(model, image, position):
    """The image beside one token's attention in each stage's last block (Fig. 2d, Eq. 15).

    Args: position, of the token: fractions of width and height, from the top left corner.
    """
    attns = [stage[-1].attn for stage in model.stages]
    panels = [("image", image)]
    for i, (attn, x) in enumerate(zip(attns, layer_inputs(model, attns, image)), 1):
        if attn.grid == (1, 1) or attn.iterations > 0:
            column = int(position[0] * x.shape[2])
            row = int(position[1] * x.shape[1])
            weights = attention_map(attn, x, row, column)
            panel = attention_panel(weights, image, row, column)
            panels.append((f"stage {i}: attention of a token", panel))
    return tile(panels)


def tile(panels):
    """Put (caption, image) pairs of equal size side by side."""
    gap = 8
    caption_height = 20
    width, height = panels[0][1].size
    sheet_size = (len(panels) * (width + gap) - gap, height + caption_height)
    sheet = Image.new("RGB", sheet_size, "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (caption, image) in enumerate(panels):
        left = i * (width + gap)
        sheet.paste(image, (left, caption_height))
        canvas.text((left + 2, 3), caption, "black")
    return sheet


# ------------------------------------------------------------------------------------- command line
ORIENTATION_TAG = 0x0112
UPRIGHT = {  # EXIF orientation -> what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def example_image():
    """A 480 x 320 landscape, so that the command line works without a photo."""
    image = Image.new("RGB", (480, 320))
    canvas = ImageDraw.Draw(image)
    for y in range(320):  # sky
        canvas.line((0, y, 480, y), (120 + y // 4, 170 + y // 6, 235 - y // 8))
    canvas.ellipse((350, 30, 410, 90), (255, 225, 120))  # sun
    mountains = [(0, 220), (110, 110), (230, 215), (330, 140), (480, 230), (480, 320), (0, 320)]
    canvas.polygon(mountains, (96, 108, 128))
    canvas.rectangle((0, 225, 480, 320), (86, 140, 62))  # meadow
    canvas.polygon([(210, 320), (250, 225), (262, 225), (330, 320)], (196, 170, 120))  # path
    canvas.rectangle((60, 170, 170, 265), (206, 92, 70))  # house
    canvas.polygon([(50, 172), (115, 120), (180, 172)], (92, 52, 48))  # roof
    canvas.rectangle((100, 215, 128, 265), (70, 42, 36))  # door
    canvas.rectangle((138, 190, 160, 212), (250, 240, 190))  # window
    canvas.rectangle((392, 180, 406, 262), (92, 66, 44))  # trunk
    canvas.ellipse((350, 105, 448, 205), (38, 92, 46))  # crown
    return image


def turn_upright(image):
    """Turn an image by its EXIF orientation; with unreadable EXIF data it stays as stored."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # Pillow raises SyntaxError, struct.error and others on damaged EXIF data
        return image
    if orientation not in UPRIGHT:
        return image
    return image.transpose(UPRIGHT[orientation])


def load_image(path, longer_side=512):
    """Read an image file: upright, RGB, with the given longer side and no side under 32 pixels.

    Grey values of more than 8 bits, which Pillow would clip, are stretched to 0 .. 255.
    Raises: OSError if the file cannot be read or holds no image, ValueError if it is damaged.
    """
    try:
        image = Image.open(path)
        image.load()
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f"damaged image ({type(error).__name__}: {error})") from error
    image = turn_upright(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        values = 255 * (values - values.min()) / max(np.ptp(values), 1e-9)
        image = Image.fromarray(values.astype(np.uint8))
    image = image.convert("RGB")
    scale = longer_side / max(image.size)
    size = [max(32, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def fraction(text):
    """A number from 0 to below 1. Raises: ValueError, which argparse reports."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def main():
    """Read an image, show what the mechanism does to it, write a PNG."""
    parser = argparse.ArgumentParser(description="Plot STViT's super tokens on an image.")
    parser.add_argument("image", nargs="?", help="any image file (default: a built-in landscape)")
    parser.add_argument("-o", "--output", default="stvit.png", help="file to write")
    parser.add_argument("--model", default="stvit_s", choices=sorted(VARIANTS))
    parser.add_argument("--weights", help="trained weights (default: random, seed 0)")
    parser.add_argument(
        "--token", nargs=2, type=fraction, metavar=("X", "Y"),
        help="plot the attention of the token there, in fractions of width and height",
    )
    args = parser.parse_args()
    if "" in (args.image, args.weights, args.output):  # an unset shell variable
        parser.error("a file name is empty")
    torch.manual_seed(0)
    factory = globals()[args.model]
    path = args.image
    try:
        image = load_image(path) if path else example_image()
        path = args.weights
        model = load_weights(factory, path) if path else factory().eval()
        path = args.output
        if args.token:
            figure = draw_attention(model, image, args.token)
        else:
            figure = draw_super_tokens(model, image)
        figure.save(path)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{path}: {' '.join(str(error).split())}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
