"""SecViT: Semantic Equitable Clustering, A Simple, Fast and Effective Strategy for Vision
Transformer; Qihang Fan, Huaibo Huang, Mingrui Chen, Ran He; arXiv 2405.13337v1
Later versions have another title and further experiments, which are not part of this file.

Mechanism. Tokens are sorted by the similarity of their keys to the mean key, the sorted sequence
is cut into clusters of equally many tokens, and attention runs inside each cluster. One sort
replaces the iterations of k-means, and equal clusters are plain batched matrix products.

Symbols.
    paper               here
    C                   N = H * W tokens of C channels, B samples
    heads (Table 8)     heads, h in shapes; d = C / h is the width of a head
    Q, K, V             q, k, v (B, h, N, d)
    k_c, sim, idx       centre, similarity and order, one of each per head
    Q*, K*, V*          sorted_qkv
    c (Eq. 4)           index of a cluster; their number is `clusters`
    N_c                 size of a cluster, in tokens
    Y_c                 y_c
    CPE, FFN (Eq. 1)    Block.cpe, FFN
    SECA, LCE (Eq. 6)   SECA, SECA.lce
    Ratios (Table 8)    ratio, the expansion of the FFN
Inside a stage every map is channels-last, (B, H, W, C): linear layers, norms and convolutions
share this layout.

Reading order. cluster_order -> cluster_sizes -> attend_clusters -> equitable_cluster_attention ->
SECA -> Block -> SecViT. What follows the factories is not needed to understand the model.

Differs from the text.
- Any number of tokens works: cluster sizes differ by at most one token, larger clusters first.
  In the text all clusters are equal, and appendix E asserts divisibility.
- LCE is added before the output projection, as in the released code. Eq. 6 with appendix E's SECA,
  taken literally, adds it after the projection.
- SEC-FasterViT has SECA in stage 3 only, the text says "the latter two stages". The printed 25 and
  41 M need FasterViT's attention in stage 4; `stage4_attention="sec"` is the text, with 23.74 and
  39.22 M.
- `released=True` is the model that the authors trained: their logs carry exactly its sizes, so the
  paper's accuracies belong to it, not to the default. Against the text it has rotary embedding of
  q and k, a residual 3x3 depth-wise convolution in the FFN and no GELU after the last stem
  convolution; it sorts ascending, against sec. 3.2 but as in appendix E.

The text is ambiguous.
- Sec. 3.2 sorts by descending similarity, appendix E and the released code ascending. Both give
  the same clusters only if `clusters` divides N. The default is descending.
- Appendix E lists SECA without LCE, Eq. 6 adds LCE. The default has it, in SEC-Swin and in
  SEC-FasterViT, too, which are said to replace only the attention; `lce=False` leaves it out.
- Eq. 2 does not say whether heads share k_c and the order. Here each head has its own, as in
  appendix E. Eq. 4 defines K_c twice; the second definition is that of V_c.

The text is silent.
- From the released code: strides 2, 1, 1, 2 and half the width in the first three convolutions of
  the stem; BatchNorm after each down-sampling convolution; GELU in the FFN; one cluster in stage 4;
  layer scale 1e-6 in stages 3 and 4 of SecViT-B and -L; the 1x1 convolution to 1024 channels,
  BatchNorm and SiLU before averaging, which the printed sizes need; LayerNorm's eps 1e-6; biases
  outside of SECA; initial weights N(0, 0.02).
- Our choice: ties keep the order of the tokens, similarities are compared in at least float32,
  initial biases of convolutions are N(0, 0.02), see `init_weights`.
- Under autocast keys of bf16 or fp16 decide the order. In the first block of an untrained SecViT-T,
  46 to 64 % (fp16: 8 to 19 %) of a photo's tokens then change clusters (8 photos). Learning showed
  no difference: a small SecViT (1 M), trained in float32 for 5 epochs on 5,000 CIFAR-10 images,
  reached 47.3, 47.9, 45.5 % (seeds 0, 1, 2), and 45.8, 48.2, 45.2 % if keys were rounded to bf16
  for the order alone.
- Without the convolutional stem SecViT has Swin's patch embedding and patch merging: Table 6's 14 M
  and 2.1 G need both. Stripes of the cross-shaped windows are CSWin's.
- SEC-Swin and SEC-FasterViT follow Swin and FasterViT, drop path rates included, but their
  LayerNorms have this file's eps.
"""
import argparse
import colorsys
import functools
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

# ----------------------------------------------------------------------------------------- variants
VARIANTS = {  # Table 8
    "secvit_t": dict(depths=(2, 2, 9, 2), dims=(64, 128, 256, 512), heads=(2, 4, 8, 16)),
    "secvit_s": dict(depths=(3, 4, 18, 4), dims=(64, 128, 256, 512), heads=(2, 4, 8, 16)),
    "secvit_b": dict(
        depths=(4, 8, 26, 8), dims=(80, 160, 320, 512), heads=(5, 5, 10, 16),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
    "secvit_l": dict(
        depths=(4, 8, 26, 8), dims=(112, 224, 448, 640), heads=(7, 7, 14, 20),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
}
CLUSTERS = (32, 8, 2, 1)  # per stage; appendix A gives the first three
FFN_RATIO = 3  # Table 8
PROJECTION_DIM = 1024  # channels before averaging (released code)


# --------------------------------------------------------------------------------------------- core
def cluster_order(k, descending=True):
    """Sort tokens by the cosine similarity of their keys to the mean key (Eq. 2 and 3).

    Args:
        k: (B, h, N, d), keys; compared in at least float32, since rounding would decide clusters.
        descending: most similar tokens first (the text), or last (the released code).
    Returns: (B, h, N), idx of Eq. 3, without gradient; ties keep the order of the tokens.
    """
    k = k.detach()
    if k.stride(-1) != 1:
        k = k.contiguous()  # sums of strided values would round equal keys differently
    dtype = torch.promote_types(k.dtype, torch.float32)
    centre = k.mean(2, keepdim=True, dtype=dtype)           # (B, h, 1, d), k_c of Eq. 2
    # F.cosine_similarity(k, centre, dim=-1), without its copies of k in float32 and of the centre
    length = torch.linalg.vector_norm(k, dim=-1, keepdim=True, dtype=dtype)
    unit_key = k / length.clamp(min=1e-8)
    unit_centre = F.normalize(centre, dim=-1, eps=1e-8)
    similarity = (unit_key * unit_centre).sum(-1)           # (B, h, N), sim of Eq. 3
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6
    if is_exporting():  # ONNX has no stable sort, so that the index breaks ties
        step = -2 ** -50 if descending else 2 ** -50
        similarity = similarity.double() + step * torch.arange(k.shape[2], device=k.device)
        return similarity.sort(dim=-1, descending=descending).indices
    return similarity.sort(dim=-1, descending=descending, stable=True).indices  # idx of Eq. 3


def cluster_sizes(tokens, clusters):
    """Sizes N_c of the clusters that consecutive sorted tokens are cut into (Eq. 4).

    Returns: [(count, size), ...], `count` clusters of `size` tokens each: one entry if `clusters`
    divides `tokens`, otherwise two that differ by one token, larger clusters first.
    """
    size = tokens // clusters       # torch.compile has no divmod of symbolic sizes
    larger = tokens % clusters
    if larger == 0:
        return [(clusters, size)]
    return [(larger, size + 1), (clusters - larger, size)]


def attend_clusters(q, k, v, sizes):
    """Attention inside consecutive clusters (Eq. 4 and 5).

    Args: q, k, v (G, N, d), sorted tokens of G groups; sizes, as from `cluster_sizes`.
    Returns: (G, N, d), in the same order.
    """
    outputs = []
    start = 0
    for count, size in sizes:
        tokens = slice(start, start + count * size)
        queries = q[:, tokens].unflatten(1, (count, size))  # (G, count, N_c, d), Q_c of Eq. 4
        keys = k[:, tokens].unflatten(1, (count, size))     # K_c
        values = v[:, tokens].unflatten(1, (count, size))   # V_c
        y_c = F.scaled_dot_product_attention(queries, keys, values)     # Eq. 5
        outputs.append(y_c.flatten(1, 2))                   # (G, count * N_c, d)
        start += count * size
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def equitable_cluster_attention(q, k, v, clusters, descending=True):
    """Attention inside clusters of equally many tokens (Eq. 2 to 5).

    For one head q, k, v (N, d) and a number of clusters that divides N, this is
        centre = k.mean(0, keepdim=True)                                        # Eq. 2
        similarity = F.cosine_similarity(k, centre)                             # Eq. 3
        order = similarity.argsort(descending=descending, stable=True)          # Eq. 3
        q, k, v = (t[order].unflatten(0, (clusters, -1)) for t in (q, k, v))    # Eq. 3, 4
        y = F.scaled_dot_product_attention(q, k, v)                             # Eq. 5
        return y.flatten(0, 1)[order.argsort()]                                 # restore
    The code does it for all heads of the batch at once: tokens of all heads are the rows of one
    matrix, which `PermuteRows` sorts and restores.

    Args:
        q, k, v: (B, h, N, d), fastest as views of (B, N, h, d), which linear layers return.
        clusters: number of clusters per head; above N it means N, 1 is plain attention.
        descending: order of the sort, as in `cluster_order`.
    Returns: (B, h, N, d), in the order of the given tokens; logits are scaled by 1 / sqrt(d).
    Raises: ValueError for fewer than one cluster.
    """
    if clusters < 1:
        raise ValueError(f"clusters = {clusters}, expected at least 1")
    B, h, N, d = q.shape
    clusters = min(clusters, N)
    if clusters == 1:
        return F.scaled_dot_product_attention(q, k, v)
    order = cluster_order(k, descending)                    # (B, h, N)
    sort, restore = row_permutations(order)                 # (B*h*N,), (B*N*h,)
    sorted_qkv = []
    for t in (q, k, v):
        rows = t.transpose(1, 2).reshape(B * N * h, d)      # a view of (B, N, h, d)
        rows = PermuteRows.apply(rows, sort, restore)
        sorted_qkv.append(rows.view(B * h, N, d))           # Q*, K*, V* of Eq. 3
    y = attend_clusters(*sorted_qkv, cluster_sizes(N, clusters))
    rows = y.reshape(B * h * N, d)
    rows = PermuteRows.apply(rows, restore, sort)
    return rows.view(B, N, h, d).transpose(1, 2)            # (B, h, N, d)


def row_permutations(order):
    """Row indices that sort tokens and restore their order.

    Args: order (B, h, N), the token at each sorted position.
    Returns: `sort` (B*h*N,), from rows (B, N, h) to rows (B, h, sorted N), and its inverse.
    """
    B, h, N = order.shape
    sample = torch.arange(B, device=order.device)[:, None, None]
    head = torch.arange(h, device=order.device)[:, None]
    sort = ((sample * N + order) * h + head).flatten()              # (B*h*N,)
    row = torch.arange(B * h * N, device=order.device)
    return sort, torch.empty_like(sort).scatter_(0, sort, row)


class PermuteRows(torch.autograd.Function):
    """`rows[index]` for a permutation `index` of the rows, with `rows[inverse]` as its gradient.

    Autograd would derive a scatter-add, which is slower and on a GPU not deterministic.
    """

    @staticmethod
    def forward(ctx, rows, index, inverse):  # (R, d), (R,), (R,) -> (R, d)
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


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


class SECA(nn.Module):
    """Semantic equitable clustering attention with LCE (Eq. 2 to 6): (B, H, W, C) -> the same.

    Args:
        dim, heads: C and h, which divides C.
        clusters: number of clusters per head.
        lce: False for no 5x5 depth-wise convolution of V (Eq. 6).
        rope: 2-D rotary embedding of q and k before the clustering (released code).
        descending: order of the sort, as in `cluster_order`.
    Raises: ValueError for fewer than one cluster, if `dim` does not split into `heads`, and with
        `rope` for a head width that is not a multiple of 4.
    """

    def __init__(self, dim, heads, clusters, lce=True, rope=False, descending=True):
        super().__init__()
        if min(dim, heads) < 1 or dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        if clusters < 1:
            raise ValueError(f"clusters = {clusters}, expected at least 1")
        if rope and dim // heads % 4:
            raise ValueError(f"head width {dim // heads}, rotary embedding needs a multiple of 4")
        self.heads = heads
        self.clusters = clusters
        self.rope = rope
        self.descending = descending
        self.q = nn.Linear(dim, dim)    # separate layers, so that q, k and v are contiguous
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.lce = DepthwiseConv(dim, 5) if lce else None
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x):
        """(B, H, W, C) -> (B, h, N, d), a view."""
        x = x.flatten(1, 2).unflatten(2, (self.heads, -1))      # (B, N, h, d)
        return x.transpose(1, 2)

    def queries_keys(self, x):
        """(B, H, W, C) -> q, k (B, h, N, d), with rotary embedding if `rope`."""
        q = self.split_heads(self.q(x))                         # Eq. 2
        k = self.split_heads(self.k(x))                         # Eq. 2
        if self.rope:
            compiling = torch.compiler.is_compiling()       # a compiler must not see a cache
            table = rotary_table if compiling else cached_rotary_table
            cos, sin = table(*x.shape[1:3], q.shape[-1], x.device)
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        return q, k

    def attend(self, q, k, v, _size):
        """q, k, v (B, h, N, d) of a map of size (H, W) -> (B, h, N, d)."""
        return equitable_cluster_attention(q, k, v, self.clusters, self.descending)

    def forward(self, x):
        q, k = self.queries_keys(x)                             # (B, h, N, d)
        v = self.v(x)                                           # (B, H, W, C), Eq. 2
        y = self.attend(q, k, self.split_heads(v), x.shape[1:3])
        y = y.transpose(1, 2).reshape(x.shape)                  # (B, H, W, C)
        if self.lce is not None:
            y = y + self.lce(v)                                 # Eq. 6
        return self.proj(y)


class FFN(nn.Module):
    """Linear, GELU, linear: (B, H, W, C) -> the same.

    With `conv`, a residual 3x3 depth-wise convolution follows the GELU (released code).
    """

    def __init__(self, dim, ratio, conv):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.conv = DepthwiseConv(ratio * dim, 3) if conv else None
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x):
        hidden = F.gelu(self.fc1(x))                            # (B, H, W, ratio * C)
        if self.conv is not None:
            hidden = hidden + self.conv(hidden)
        return self.fc2(hidden)


def conv_norm(in_dim, dim, stride=2):
    """3x3 convolution and BatchNorm, with stride 2 between stages; channels-first maps."""
    conv = nn.Conv2d(in_dim, dim, 3, stride, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(dim))


def convolutional_stem(dim, last_gelu):
    """Four 3x3 convolutions, each with BatchNorm and GELU (appendix A); (B, 3, H, W) -> stride 4.

    The released model has no GELU after the last of them.
    """
    stem = nn.Sequential()
    in_dim = 3
    for out_dim, stride in ((dim // 2, 2), (dim // 2, 1), (dim // 2, 1), (dim, 2)):
        stem.extend(conv_norm(in_dim, out_dim, stride))
        stem.append(nn.GELU())
        in_dim = out_dim
    return stem if last_gelu else stem[:-1]


# -------------------------------------------------------------------------------------------- block
class Block(nn.Module):
    """Positional encoding, attention and FFN, each with a shortcut (Eq. 1).

    (B, H, W, C) -> the same.

    Args:
        dim: C.
        cpe, attn: modules; cpe is None in blocks without positional encoding.
        ratio: expansion of the FFN.
        drop_path: rate of stochastic depth.
        layer_scale: initial value of both LayerScales, or None for none.
        ffn_conv: `conv` of FFN.
    """

    def __init__(self, dim, cpe, attn, ratio, drop_path, layer_scale=None, ffn_conv=False):
        super().__init__()
        self.cpe = cpe
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.norm2 = LayerNorm(dim)
        self.ffn = FFN(dim, ratio, ffn_conv)
        self.scale1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.scale2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        if self.cpe is not None:
            x = x + self.cpe(x)                                         # X of Eq. 1
        x = self.drop_path(x, self.scale1(self.attn(self.norm1(x))))   # Y
        return self.drop_path(x, self.scale2(self.ffn(self.norm2(x))))  # Z


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


def init_weights(module):
    """Weights and convolution biases N(0, 0.02) truncated, linear biases 0, the rest unchanged.

    With all biases 0, as in the released code, padding and black images would give tokens that are
    exactly 0 in all blocks, and each LayerNorm multiplies the gradient of such a token by
    1 / sqrt(eps) = 1000.
    Raises: TypeError for a module with parameters and no rule.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.trunc_normal_(module.bias, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif list(module.parameters(recurse=False)):
        if not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, LayerScale)):
            raise TypeError(f"no initialization rule for {type(module).__name__}")


class SecViT(nn.Module):
    """Four stages of SECA blocks at strides 4, 8, 16 and 32 (Fig. 3 and Table 8).

    Args:
        num_classes: width of the classifier; 0 for none.
        drop_path_rate: stochastic depth of the last block, in [0, 1); rates rise linearly from 0.
        depths, dims, heads, clusters: blocks, channels, heads and clusters, one entry per stage.
        layer_scale: initial value of LayerScale or None, one per stage.
        released: True for the model of the authors' checkpoints and of Tables 6 and 7, see the
            file's header.
        lce, cpe: False for blocks without the convolution of V or positional encoding (Table 6).
        conv_stem: False for Swin's patch embedding and patch merging instead of the convolutions
            before and between the stages (Table 6).
        attention: "sec", or "csw" for cross-shaped windows instead of clusters (Table 6).
    Attributes: channels, the widths of the four feature maps.
    Raises: ValueError for other values, and for clusters with "csw", which has none.
    """

    def __init__(
        self, *, num_classes, drop_path_rate, depths, dims, heads,
        clusters=CLUSTERS, layer_scale=(None, None, None, None), released=False,
        lce=True, cpe=True, conv_stem=True, attention="sec",
    ):
        super().__init__()
        check_arguments(
            num_classes, drop_path_rate, depths=depths, dims=dims, heads=heads, clusters=clusters)
        check_ablations(layer_scale, attention, clusters)

        def block(stage, rate):
            dim = dims[stage]
            position = DepthwiseConv(dim, 3) if cpe else None
            if attention == "csw":
                attn = CSWA(dim, heads[stage], STRIPES[stage], lce, rope=released)
            else:
                attn = SECA(
                    dim, heads[stage], clusters[stage],
                    lce, rope=released, descending=not released)
            return Block(
                dim, position, attn, FFN_RATIO, rate, layer_scale[stage], ffn_conv=released)

        self.channels = tuple(dims)
        if conv_stem:
            self.stem = convolutional_stem(dims[0], last_gelu=not released)
            down = conv_norm
        else:
            self.stem = PatchEmbedding(dims[0])
            down = PatchMerging
        self.stages = build_stages(depths, drop_path_rate, block)
        self.downsamples = nn.ModuleList(down(dims[i], dims[i + 1]) for i in range(3))
        conv = nn.Conv2d(dims[3], PROJECTION_DIM, 1)
        self.proj = nn.Sequential(conv, nn.BatchNorm2d(PROJECTION_DIM), nn.SiLU())
        self.head = nn.Linear(PROJECTION_DIM, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

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
        x = self.stem(x)                                                # (B, C_1, H / 4, W / 4)
        maps = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.downsamples[i - 1](x)
            x = stage(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)        # blocks see (B, H, W, C)
            maps.append(x)
        return tuple(maps)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, num_classes), or pooled features (B, C) without classes.

        In train mode BatchNorm needs more than one value per channel: B > 1 at 32 x 32.
        """
        x = self.proj(self.forward_features(images)[-1])
        return self.head(x.mean((2, 3)))

    def convert_released(self, state_dict):
        """Rename and reshape the authors' tensors to this file's, see "released weights"."""
        return convert_released(state_dict, self.state_dict())

    def load_released(self, state_dict):
        """Load the authors' checkpoint (its "model" entry) strictly; needs `released=True`."""
        self.load_state_dict(self.convert_released(state_dict))


# ---------------------------------------------------------------------------------------- factories
def secvit_t(num_classes=1000, drop_path_rate=0.1, **overrides):
    """SecViT-T, 14.87 M parameters (14.98 M released)."""
    options = {**VARIANTS["secvit_t"], **overrides}
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def secvit_s(num_classes=1000, drop_path_rate=0.15, **overrides):
    """SecViT-S, 26.56 M parameters (26.78 M released)."""
    options = {**VARIANTS["secvit_s"], **overrides}
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def secvit_b(num_classes=1000, drop_path_rate=0.4, **overrides):
    """SecViT-B, 54.26 M parameters (54.68 M released)."""
    options = {**VARIANTS["secvit_b"], **overrides}
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def secvit_l(num_classes=1000, drop_path_rate=0.5, **overrides):
    """SecViT-L, 95.92 M parameters (96.50 M released)."""
    options = {**VARIANTS["secvit_l"], **overrides}
    return SecViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


# ------------------------------------------------ the main model ends here: ablations and relatives
def check_ablations(layer_scale, attention, clusters):
    """Raise ValueError for values that no row of the paper's tables has."""
    if len(layer_scale) != 4:
        raise ValueError(f"layer_scale = {layer_scale}, expected 4 values, one per stage")
    if attention not in ("sec", "csw"):
        raise ValueError(f"attention = {attention!r}, expected 'sec' or 'csw'")
    if attention == "csw" and tuple(clusters) != CLUSTERS:
        raise ValueError(f"clusters = {clusters}, expected none with attention = 'csw'")


@torch.inference_mode(False)  # so that a cached table serves training as well
def rotary_table(H, W, d, device):
    """cos and sin (N, d) of the released model's 2-D rotary embedding on a map of H x W.

    Pairs of channels share an angle: the first half of d turns by row, the second by column. sin is
    negative in the first channel of a pair, as in a rotation matrix.
    """
    rate = 1 / 10000 ** torch.linspace(0, 1, d // 4, device=device)
    rate = rate.repeat_interleave(2)                                # (d/2,), one rate per pair
    row = torch.arange(H, device=device)[:, None, None] * rate      # (H, 1, d/2)
    column = torch.arange(W, device=device)[None, :, None] * rate   # (1, W, d/2)
    row = row.expand(H, W, -1)
    column = column.expand(H, W, -1)
    angle = torch.cat([row, column], -1).flatten(0, 1)              # (N, d)
    sin = angle.sin()
    sin[:, ::2] *= -1
    return angle.cos(), sin


cached_rotary_table = functools.lru_cache(maxsize=8)(rotary_table)


def rotate(x, cos, sin):
    """Rotate the channel pairs (even, odd) of x (B, h, N, d) by the angles of cos, sin (N, d).

    `sin` has its sign for each channel, see `rotary_table`: even * cos - odd * sin and
    odd * cos + even * sin.
    """
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)         # (odd, even)
    return torch.addcmul(x * cos, swapped, sin)


STRIPES = (1, 2, 7, 7)  # rows or columns per stripe, per stage: CSWin, arXiv 2107.00652


def stripe_attention(q, k, v, width):
    """Attention inside horizontal stripes of up to `width` rows, of sizes as equal as possible.

    Shape: q, k, v (B, h, H, W, d) -> (B, h, H, W, d).
    """
    H, W = q.shape[2:4]
    stripes = (H + width - 1) // width
    sizes = [(count, rows * W) for count, rows in cluster_sizes(H, stripes)]
    tokens = [t.flatten(0, 1).flatten(1, 2) for t in (q, k, v)]     # (B*h, N, d) each
    return attend_clusters(*tokens, sizes).view(q.shape)


def cross_shaped_attention(q, k, v, H, W, width):
    """Cross-shaped windows: half of the heads attend in horizontal stripes, half in vertical ones.

    Args:
        q, k, v: (B, h, N, d) with an even number of heads.
        H, W: sides of the map.
        width: largest number of rows or columns per stripe. Where it does not divide a side,
            stripes are narrower; no token is padding.
    Returns: (B, h, N, d).
    """
    half = q.shape[1] // 2
    maps = [t.unflatten(2, (H, W)) for t in (q, k, v)]              # (B, h, H, W, d) each
    rows = [t[:, :half] for t in maps]                              # (B, h/2, H, W, d)
    columns = [t[:, half:].transpose(2, 3) for t in maps]           # (B, h/2, W, H, d)
    horizontal = stripe_attention(*rows, width)
    vertical = stripe_attention(*columns, width).transpose(2, 3)
    return torch.cat((horizontal, vertical), 1).flatten(2, 3)       # (B, h, N, d)


class CSWA(SECA):
    """SECA with cross-shaped windows of `width` instead of clusters (Table 6, CSWSA).

    Shape: (B, H, W, C) -> (B, H, W, C).
    Raises: ValueError for an odd number of heads, and what SECA raises.
    """

    def __init__(self, dim, heads, width, lce=True, rope=False):
        if heads % 2:
            raise ValueError(f"heads = {heads} do not split into horizontal and vertical halves")
        super().__init__(dim, heads, clusters=1, lce=lce, rope=rope)
        self.width = width

    def attend(self, q, k, v, size):
        return cross_shaped_attention(q, k, v, *size, self.width)


class MapNorm(LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)                       # (B, H, W, C)
        return super().forward(x).permute(0, 3, 1, 2)   # (B, C, H, W)


class PatchEmbedding(nn.Module):
    """Swin's 4 x 4 patches; images are zero-padded at the right and bottom to whole patches.

    Shape: (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 4, 4)
        self.norm = MapNorm(dim)

    def forward(self, x):
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % 4, 0, -H % 4))
        return self.norm(self.conv(x))


class PatchMerging(nn.Module):
    """Swin's 2 x 2 merging; maps are zero-padded at the right and bottom to whole groups.

    Shape: (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim, dim):
        super().__init__()
        self.norm = LayerNorm(4 * in_dim)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False)

    def forward(self, x):
        H, W = x.shape[2:]
        x = F.pad(x, (0, W % 2, 0, H % 2))
        x = x.permute(0, 2, 3, 1)                       # (B, H, W, C)
        groups = [
            x[:, 0::2, 0::2],                           # column by column, as in Swin
            x[:, 1::2, 0::2],
            x[:, 0::2, 1::2],
            x[:, 1::2, 1::2],
        ]
        x = torch.cat(groups, -1)                       # (B, H/2, W/2, 4C)
        x = self.reduction(self.norm(x))                # (B, H/2, W/2, C')
        return x.permute(0, 3, 1, 2)


VARIANTS |= {
    "sec_swin_t": dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768), heads=(3, 6, 12, 24)),
    "sec_swin_s": dict(depths=(2, 2, 18, 2), dims=(96, 192, 384, 768), heads=(3, 6, 12, 24)),
}


class SECSwin(nn.Module):
    """Swin (arXiv 2103.14030) with SECA instead of window attention (Table 2a).

    It has neither a positional encoding nor a convolutional stem.
    Args and `channels` as SecViT's; `lce` False is SECA without its convolution of V. `proj`,
    before averaging, is only Swin's last norm.
    Raises: ValueError for values outside these.
    """
    forward_features = SecViT.forward_features
    forward = SecViT.forward

    def __init__(
        self, *, num_classes, drop_path_rate, depths, dims, heads, clusters=CLUSTERS, lce=True,
    ):
        super().__init__()
        check_arguments(
            num_classes, drop_path_rate,
            depths=depths, dims=dims, heads=heads, clusters=clusters,
        )

        def block(stage, rate):
            attn = SECA(dims[stage], heads[stage], clusters[stage], lce=lce)
            return Block(dims[stage], None, attn, ratio=4, drop_path=rate)

        self.channels = tuple(dims)
        self.stem = PatchEmbedding(dims[0])
        self.stages = build_stages(depths, drop_path_rate, block)
        self.downsamples = nn.ModuleList(PatchMerging(dims[i], dims[i + 1]) for i in range(3))
        self.proj = MapNorm(dims[3])
        self.head = nn.Linear(dims[3], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)


def sec_swin_t(num_classes=1000, drop_path_rate=0.2, **overrides):
    """SEC-Swin-T, 28.38 M parameters."""
    options = {**VARIANTS["sec_swin_t"], **overrides}
    return SECSwin(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def sec_swin_s(num_classes=1000, drop_path_rate=0.3, **overrides):
    """SEC-Swin-S, 49.79 M parameters."""
    options = {**VARIANTS["sec_swin_s"], **overrides}
    return SECSwin(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


VARIANTS |= {
    "sec_fastervit_0": dict(
        depths=(2, 3, 6, 5), dims=(64, 128, 256, 512), heads=(None, None, 8, 16), stem_dim=64,
    ),
    "sec_fastervit_1": dict(
        depths=(1, 3, 8, 5), dims=(80, 160, 320, 640), heads=(None, None, 8, 16), stem_dim=32,
    ),
}


class ConvBlock(nn.Module):
    """Block of FasterViT's first two stages: two 3x3 convolutions and a shortcut.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim, drop_path):
        super().__init__()
        self.convs = nn.Sequential(
            *conv_norm(dim, dim, stride=1), nn.GELU(),
            *conv_norm(dim, dim, stride=1),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.convs(x.permute(0, 3, 1, 2))           # (B, C, H, W)
        return self.drop_path(x, y.permute(0, 2, 3, 1))


class PositionMLP(nn.Sequential):
    """Learned function of two coordinates, evaluated at all pairs of them.

    Shape: rows (R,), columns (S,) -> (R, S, dim).
    """

    def __init__(self, dim):
        super().__init__(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, dim, bias=False))

    def forward(self, rows, columns):
        grid = torch.meshgrid(rows, columns, indexing="ij")
        pairs = torch.stack(grid, -1)                   # (R, S, 2)
        return super().forward(pairs.to(self[0].weight.dtype))


def centred_positions(side, device):
    """Positions of `side` tokens, from -1 to 1; a single token is at 0."""
    position = 2 * torch.arange(side, device=device) - (side - 1)
    return position / max(side - 1, 1)


def log_offsets(side, device):
    """Offsets (2 * side - 1,) between `side` tokens on Swin V2's logarithmic scale.

    arXiv 2111.09883, Eq. 4, and its code: offsets relative to the side, times 8; base 8.
    """
    offset = 8 * torch.arange(1 - side, side, device=device) / max(side - 1, 1)
    return offset.sign() * (offset.abs() + 1).log2() / 3


def offset_index(side, device):
    """Index (side, side) of the offset between query and key among the 2 * side - 1 offsets."""
    position = torch.arange(side, device=device)
    return position[:, None] - position + side - 1


class TokenPosition(PositionMLP):
    """FasterViT's positional encoding: an MLP of the token's position.

    Shape: (B, H, W, C) -> (H, W, C).
    """

    def forward(self, x):
        _, H, W, _ = x.shape
        rows = centred_positions(H, x.device)
        columns = centred_positions(W, x.device)
        return super().forward(rows, columns)


class GlobalAttention(SECA):
    """Attention of FasterViT's last stage: one window over the whole map, with a position bias.

    The bias of query and key is 16 sigmoid(MLP(offset)), in FasterViT for windows of 7 x 7, here
    for a map of any size. All (h, N, N) biases of a block are held in memory.
    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim, heads):
        super().__init__(dim, heads, clusters=1, lce=False)
        self.bias = PositionMLP(heads)

    def position_bias(self, H, W, device):
        """(h, N, N), queries by keys, for a map of H x W."""
        table = self.bias(log_offsets(H, device), log_offsets(W, device))
        table = 16 * table.sigmoid()                    # (2H-1, 2W-1, h)
        rows = offset_index(H, device)[:, None, :, None]        # (H, 1, H, 1)
        columns = offset_index(W, device)[None, :, None, :]     # (1, W, 1, W)
        bias = table.permute(2, 0, 1)[:, rows, columns]         # (h, H, W, H, W)
        return bias.flatten(3, 4).flatten(1, 2).contiguous()    # (h, N, N)

    def attend(self, q, k, v, size):
        bias = self.position_bias(*size, q.device).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def fastervit_stem(stem_dim, dim):
    """FasterViT's stem; (B, 3, H, W) -> (B, dim, H/4, W/4)."""
    return nn.Sequential(
        nn.Conv2d(3, stem_dim, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(stem_dim, eps=1e-4),
        nn.ReLU(),
        nn.Conv2d(stem_dim, dim, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(dim, eps=1e-4),
        nn.ReLU(),
    )


class SECFasterViT(nn.Module):
    """FasterViT (arXiv 2306.06189) with SECA instead of hierarchical attention (Table 2b).

    Args: as SecViT's, apart from
        heads: per stage, the first two stages have none.
        stem_dim: channels between the two convolutions of the stem.
        clusters: number of clusters in stage 3.
        stage4_attention: "global", FasterViT's attention with its position bias and encoding, or
            "sec", SECA with one cluster, as the text says.
        lce: False leaves the convolution of V out of SECA.
    `channels` as SecViT's. `proj`, before averaging, is only FasterViT's last norm.
    Raises: ValueError for values outside these.
    """
    forward_features = SecViT.forward_features
    forward = SecViT.forward

    def __init__(
        self, *, num_classes, drop_path_rate, depths, dims, heads, stem_dim,
        clusters=CLUSTERS[2], stage4_attention="global", lce=True,
    ):
        super().__init__()
        attention_heads = [1 if h is None else h for h in heads]  # convolutions have none
        check_arguments(
            num_classes, drop_path_rate,
            depths=depths, dims=dims, heads=attention_heads,
        )
        if stem_dim < 1:
            raise ValueError(f"stem_dim = {stem_dim}, expected at least 1")
        if stage4_attention not in ("global", "sec"):
            raise ValueError(f"stage4_attention = {stage4_attention!r}, expected 'global' or 'sec'")

        def block(stage, rate):
            dim = dims[stage]
            if stage < 2:
                return ConvBlock(dim, rate)
            if stage == 3 and stage4_attention == "global":
                position = TokenPosition(dim)
                attn = GlobalAttention(dim, heads[stage])
            else:
                position = None
                attn = SECA(dim, heads[stage], clusters if stage == 2 else 1, lce=lce)
            return Block(dim, position, attn, ratio=4, drop_path=rate)

        self.channels = tuple(dims)
        self.stem = fastervit_stem(stem_dim, dims[0])
        self.stages = build_stages(depths, drop_path_rate, block)
        self.downsamples = nn.ModuleList()
        for in_dim, out_dim in zip(dims, dims[1:]):
            conv = nn.Conv2d(in_dim, out_dim, 3, 2, padding=1, bias=False)
            self.downsamples.append(nn.Sequential(MapNorm(in_dim), conv))
        self.proj = nn.BatchNorm2d(dims[3])
        self.head = nn.Linear(dims[3], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)


def sec_fastervit_0(num_classes=1000, drop_path_rate=0.2, **overrides):
    """SEC-FasterViT-0, 25.04 M parameters."""
    options = {**VARIANTS["sec_fastervit_0"], **overrides}
    return SECFasterViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def sec_fastervit_1(num_classes=1000, drop_path_rate=0.2, **overrides):
    """SEC-FasterViT-1, 40.83 M parameters."""
    options = {**VARIANTS["sec_fastervit_1"], **overrides}
    return SECFasterViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


# --------------------------------------------------------------------------------- released weights
RELEASED_NAMES = (  # pattern in the authors' keys, our name
    (r"^patch_embed\.proj", "stem"),
    (r"^layers\.(\d)\.blocks", r"stages.\1"),
    (r"^layers\.(\d)\.downsample\.reduction", r"downsamples.\1.0"),
    (r"^layers\.(\d)\.downsample\.norm", r"downsamples.\1.1"),
    (r"^proj", "proj.0"),
    (r"^norm", "proj.1"),
    (r"\.pos\.", ".cpe."),
    (r"norm([12])\.norm", r"norm\1"),
    (r"attn\.lepe", "attn.lce"),
    (r"attn\.out_proj", "attn.proj"),
    (r"ffn\.dwconv", "ffn.conv"),
    (r"gamma_([12])", r"scale\1.weight"),
)


def rename_released(key):
    """Our name of a tensor in the authors' checkpoint."""
    for pattern, name in RELEASED_NAMES:
        key = re.sub(pattern, name, key)
    return key


def split_qkv(name, value):
    """[(name, tensor), ...]: the authors' `qkv` has the rows of all q, all k, all v."""
    if ".qkv." not in name:
        return [(name, value)]
    parts = zip("qkv", value.chunk(3))
    return [(name.replace(".qkv.", f".{letter}."), rows) for letter, rows in parts]


def convert_released(state_dict, ours):
    """Rename, split and reshape the tensors of the authors' SecViT checkpoint.

    Args: state_dict, the authors' tensors; ours, the state dict that they are to fit.
    Returns: a new state dict; tensors without a counterpart in `ours` stay, for a strict load.
    """
    converted = {}
    for key, value in state_dict.items():
        if key.endswith("RoPE.angle"):  # rotary_table computes it
            continue
        for name, tensor in split_qkv(rename_released(key), value):
            if name in ours and tensor.squeeze().shape == ours[name].squeeze().shape:
                tensor = tensor.reshape(ours[name].shape)  # 1x1 convolutions are linear here
            converted[name] = tensor
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
    from_authors = "patch_embed.proj.0.weight" in state
    if from_authors or "stages.0.0.ffn.conv.weight" in state:
        options["released"] = True
    try:
        options["num_classes"] = len(state.get("head.weight", ()))
        model = factory(**options)  # TypeError: SEC-Swin and SEC-FasterViT have no `released`
        if from_authors:
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


def cluster_map(attn, x):
    """Cluster of each token of x (1, H, W, C) in the first head of a SECA, (H, W)."""
    _, H, W, _ = x.shape
    _, k = attn.queries_keys(x)
    order = cluster_order(k, attn.descending)[0, 0]     # (N,)
    counts, sizes = zip(*cluster_sizes(H * W, min(attn.clusters, H * W)))
    sizes = torch.tensor(sizes).repeat_interleave(torch.tensor(counts))     # (clusters,)
    cluster = torch.arange(len(sizes)).repeat_interleave(sizes)     # (N,), in sorted order
    return torch.empty_like(order).scatter_(0, order, cluster).view(H, W)


def palette(clusters):
    """Colours (clusters, 3): the hue follows the sorted order, the brightness alternates."""
    colours = []
    for c in range(clusters):
        colours.append(colorsys.hsv_to_rgb(0.8 * c / clusters, 0.75, 0.95 - 0.3 * (c % 2)))
    return (255 * torch.tensor(colours)).byte()


def token_attention(q, k, cluster, token):
    """Attention of one token inside its cluster (Eq. 5), for visualisation only.

    Args: q, k (N, d), of one head; cluster (N,), the cluster of each token; token, its index.
    Returns: (N,), weights that sum to 1 and are 0 outside of the cluster.
    """
    logits = k @ q[token] * q.shape[-1] ** -0.5                     # (N,)
    outside = cluster != cluster[token]
    return logits.masked_fill(outside, -torch.inf).softmax(0)


def blue_to_red(values):
    """Array of values from 0 to 255 -> RGB array with one more axis."""
    palette = []
    for level in range(256):
        palette.append(colorsys.hsv_to_rgb(0.7 * (1 - level / 255), 0.9, 0.3 + 0.7 * level / 255))
    return (255 * np.array(palette)[values]).astype(np.uint8)


def attention_panel(weights, image, row, column):
    """Weights (H, W) over the image from blue, 0, to red; the token at (row, column) is framed.

    Tokens of weight 0, which are in other clusters, stay grey.
    """
    levels = (255 * weights / weights.max()).int().numpy()
    heat = Image.fromarray(blue_to_red(levels)).resize(image.size, Image.Resampling.NEAREST)
    grey = image.convert("L").convert("RGB")
    panel = Image.blend(grey, heat, 0.6)
    seen = Image.fromarray(255 * (weights > 0).byte().numpy())
    panel = Image.composite(panel, grey, seen.resize(image.size, Image.Resampling.NEAREST))
    height = image.height / weights.shape[0]
    width = image.width / weights.shape[1]
    box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
    ImageDraw.Draw(panel).rectangle(box, outline="white", width=2)
    return panel


@torch.no_grad()
def draw_attention(model, image, position):
    """The image beside the cluster of a token and its attention there, in the first head.

    One panel for the last block of each stage that has SECA.
    Args: position, of the token: fractions of width and height, from the top left corner.
    """
    layers = {}
    for i, stage in enumerate(model.stages, 1):
        if isinstance(stage[-1], Block) and type(stage[-1].attn) is SECA:
            layers[f"stage {i}: cluster and attention of a token"] = stage[-1].attn
    panels = [("image", image)]
    for (caption, attn), x in zip(layers.items(), layer_inputs(model, layers.values(), image)):
        _, H, W, _ = x.shape
        column = int(position[0] * W)
        row = int(position[1] * H)
        q, k = attn.queries_keys(x)                     # (1, h, N, d)
        cluster = cluster_map(attn, x).flatten()        # (N,)
        weights = token_attention(q[0, 0], k[0, 0], cluster, row * W + column)
        panels.append((caption, attention_panel(weights.view(H, W), image, row, column)))
    return tile(panels)


@torch.no_grad()
def draw_clusters(model, image):
    """Fig. 4: the image beside the clusters of each stage's last block, where it has any."""
    layers = {}
    for i, stage in enumerate(model.stages, 1):
        if isinstance(stage[-1], Block) and stage[-1].attn.clusters > 1:
            layers[f"stage {i}"] = stage[-1].attn
    inputs = layer_inputs(model, layers.values(), image)
    grey = image.convert("L").convert("RGB")
    panels = [("image", image)]
    for (name, attn), x in zip(layers.items(), inputs):
        cluster = cluster_map(attn, x)
        clusters = int(cluster.max()) + 1
        overlay = Image.fromarray(palette(clusters)[cluster].numpy())
        overlay = overlay.resize(image.size, Image.Resampling.NEAREST)
        panels.append((f"{name}: {clusters} clusters", Image.blend(grey, overlay, 0.7)))
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
    parser = argparse.ArgumentParser(description="Plot SecViT's clusters on an image (Fig. 4).")
    parser.add_argument("image", nargs="?", help="any image file (default: a built-in landscape)")
    parser.add_argument("-o", "--output", default="secvit.png", help="file to write")
    parser.add_argument("--model", default="secvit_t", choices=sorted(VARIANTS))
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
            figure = draw_clusters(model, image)
        figure.save(path)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{path}: {' '.join(str(error).split())}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
