"""LinGlo: Rethinking Query-Key Pairwise Interactions in Vision Transformers
Cheng Li, Yangxing (arXiv: Yangxin) Liu; arXiv 2207.00188v2

Mechanism. Key-only attention has no queries: a learned vector scores the keys, and their
softmax-weighted mean is one context per head, which gates the value of every token, at a cost
linear in the number of tokens. The FFN encodes positions by parallel depth-wise convolutions with a
skip connection (RP-CPE), which are folded into one convolution for deployment.

Symbols.
    paper                 here
    X (N x F), D, Y       x, N = H * W tokens of C channels, F = D = C; B samples; Y is returned
    heads (sec. 3.4)      heads, h in shapes; d = C / h, the width of a head
    K, V (sec. 3.1)       k, v (B, h, N, d)
    W_K, W_V              layers k and v of KeyOnlyAttention
    W_saliency (Eq. 2)    saliency (h, d), one vector per head
    A (Eq. 2)             attention_map (B, h, N)
    G (Eq. 3)             global_context (B, h, 1, d)
    U1, U2 (Eq. 4)        u1, u2
    RP-CPE (sec. 3.2)     RPCPE
    C, B (sec. 3.4)       dims, depths, one entry per stage; C and B in shapes are those above
Inside a stage every map is channels-last, (B, H, W, C): linear layers, norms and convolutions
share this layout.

Reading order. key_only_attention -> KeyOnlyAttention -> RPCPE -> FFN -> Block -> LinGlo. What
follows the factories is not needed to understand the model.

Differs from the text.
- LinGlo-w/o-CH (Fig. 5, `hierarchical=False`) keeps the LayerNorms after stages 1 to 3, where the
  resolution does not change.

The text is ambiguous.
- Sizes. Tables 2 to 4 print the sizes of PVTv2-B0, -B1 and -B2. Table 2's 3.4 and 13.1 M contradict
  the dense models of Tables 3 and 4, its 25.4 M agrees with them; no reading gives all three. Here
  it is the text's model: 3.60, 13.73 and 25.14 M deployed, 3.81, 14.14 and 25.97 M in training.
- Heads. Eq. 2 and 3 have one softmax over K of width D, sec. 3.4 has several heads. Here each head
  has its own saliency vector and softmax, scaled by 1 / sqrt(d).
- RP-CPE. Sec. 3.2 folds branches as the Diverse Branch Block does, whose branches have BatchNorm.
  Here each branch has one, the single branches of Table 6 too: without it the four would be one
  convolution in training as well. The skip connection has none.
- RP-CPE is "in" the FFN: here after the expansion and before the GELU, as in PVTv2.
- LayerNorm is "added wherever spatial resolution is changed": here after each patch embedding and
  after each stage. Sec. 3.3 does not say its place in a block: here before attention and FFN.
- "Convolutional blocks with SE" (Table 5): here two 3x3 convolutions with BatchNorm and a gate.

The text is silent.
- K, V, U1 and U2 have biases. The classifier sees the mean of the last map.
- Initial weights are PVTv2's but for the biases of patch embeddings, see `init_weights`.
- Our choice: stochastic depth of 0.1 / 0.1 / 0.15 for b0 / b1 / b2. Without convolutions (Fig. 5),
  sides that the patches do not divide are zero-padded, and position tables are made for 224 x 224
  and interpolated for other sizes.
"""
import argparse
import colorsys
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

# ----------------------------------------------------------------------------------------- variants
VARIANTS = {  # sec. 3.4
    "linglo_b0": dict(depths=(2, 3, 3, 2), dims=(32, 64, 160, 256), heads=(1, 2, 5, 8)),
    "linglo_b1": dict(depths=(2, 3, 3, 2), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
    "linglo_b2": dict(depths=(3, 5, 9, 3), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
}
FFN_RATIOS = (8, 8, 4, 4)  # sec. 3.4, expansion of the FFN in each stage
DOWN_SAMPLING = ((7, 4), (3, 2), (3, 2), (3, 2))  # sec. 3.4, kernel size and stride per stage
CPE = {  # Table 6: number of branches, skip connection
    "cpe": (1, False),
    "r": (1, True),
    "p": (4, False),
    "rp": (4, True),  # sec. 3.4
    "folded": (1, False),  # any of them after `reparameterize`
}


# --------------------------------------------------------------------------------------------- core
def key_only_attention(k, v, saliency):
    """Gate every value with the global context (Eq. 2, Eq. 3 and the product in Eq. 4).

    As in the equations, this is
        score = k @ saliency[..., None] / d ** 0.5              # (B, h, N, 1)
        attention_map = score.softmax(2)                        # (B, h, N, 1), Eq. 2
        global_context = (attention_map * k).sum(2, True)       # (B, h, 1, d), Eq. 3
        return global_context * v                               # (B, h, N, d), Eq. 4
    Eq. 2 and 3 are dot-product attention with one query, the saliency vector, and with the keys as
    values, so that a fused kernel computes them without storing the attention map.

    Args:
        k: (B, h, N, d), keys.
        v: (B, h, N, d), values.
        saliency: (h, d), learned.
    Returns: (B, h, N, d), G * V. Time and memory are linear in N.
    """
    query = saliency.to(k.dtype)[None, :, None]                         # (1, h, 1, d)
    query = query.expand(k.shape[0], -1, -1, -1)                        # (B, h, 1, d)
    global_context = F.scaled_dot_product_attention(query, k, k)        # (B, h, 1, d), Eq. 2, 3
    return global_context * v                                           # (B, h, N, d), Eq. 4


def attention_map(k, saliency):
    """Weight of each key in its head's context (Eq. 2), for visualisation only.

    Args: k (B, h, N, d), keys; saliency (h, d).
    Returns: (B, h, N), which sums to 1 over the tokens.
    """
    score = k @ saliency[..., None] * k.shape[-1] ** -0.5               # (B, h, N, 1)
    return score.squeeze(3).softmax(2)                                  # (B, h, N), Eq. 2


# ------------------------------------------------------------------------------------------- layers
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


class PatchEmbedding(nn.Module):
    """Overlapping patches: a strided convolution and LayerNorm.

    (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C').
    """

    def __init__(self, in_dim, dim, kernel_size, stride):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = LayerNorm(dim)

    def forward(self, x):
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


class KeyOnlyAttention(nn.Module):
    """Key-only attention with its projections (Fig. 1, Eq. 4): (B, H, W, C) -> the same.

    Args: dim, heads, which are C and h.
    Raises: ValueError for heads that do not divide `dim`.
    """

    def __init__(self, dim, heads):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        self.heads = heads
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.u1 = nn.Linear(dim, dim)
        self.u2 = nn.Linear(dim, dim)
        self.saliency = nn.Parameter(torch.zeros(heads, dim // heads))

    def split_heads(self, x):
        """(B, H, W, C) -> (B, h, N, d), a view."""
        x = x.flatten(1, 2)                                             # (B, N, C)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)         # (B, h, N, d)

    def forward(self, x):
        k = self.k(x)                                                   # (B, H, W, C)
        v = self.v(x)
        gated = key_only_attention(self.split_heads(k), self.split_heads(v), self.saliency)
        gated = gated.transpose(1, 2).reshape(x.shape)                  # (B, H, W, C)
        return self.u2(self.u1(gated) + k)                              # Eq. 4


class RPCPE(nn.Module):
    """Residual parallel conditional positional encoding (sec. 3.2, Fig. 2b).

    (B, H, W, C) -> the same: the sum of parallel 3x3 depth-wise convolutions, each with BatchNorm,
    plus the input if `skip`. With running statistics (evaluation, frozen BatchNorm) all of it is
    linear and computed as one convolution, without calling the branches; `reparameterize` keeps
    only that convolution.
    """

    def __init__(self, dim, branches, skip):
        super().__init__()
        self.skip = skip
        self.branches = nn.ModuleList()
        for _ in range(branches):
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
            self.branches.append(nn.Sequential(conv, nn.BatchNorm2d(dim)))

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)                                       # (B, C, H, W), a view
        if self.has_fixed_statistics():
            weight, bias = self.fold()
            y = F.conv2d(x, weight, bias, padding=1, groups=len(weight))
        else:
            y = x if self.skip else 0
            for branch in self.branches:
                y = y + branch(x)
        return y.permute(0, 2, 3, 1)                                    # (B, H, W, C)

    def has_fixed_statistics(self):
        """Whether every branch has BatchNorm that uses its running statistics."""
        return all(
            isinstance(branch, nn.Sequential) and not branch[1].training
            for branch in self.branches
        )

    def fold(self):
        """Branches, BatchNorm and skip connection as one kernel (C, 1, 3, 3) and bias (C,)."""
        convs, norms = zip(*self.branches)
        kernels = torch.stack([conv.weight for conv in convs])          # (branches, C, 1, 3, 3)
        mean = torch.stack([norm.running_mean for norm in norms])       # (branches, C)
        variance = torch.stack([norm.running_var for norm in norms])
        gain = torch.stack([norm.weight for norm in norms])
        scale = gain * (variance + norms[0].eps).rsqrt()
        weight = (kernels * scale[..., None, None, None]).sum(0)        # (C, 1, 3, 3)
        bias = (torch.stack([norm.bias for norm in norms]) - mean * scale).sum(0)
        if self.skip:
            identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))     # as a kernel
            weight = weight + identity
        return weight, bias

    @torch.no_grad()
    def reparameterize(self):
        """Replace everything by the convolution of `fold`; idempotent."""
        if isinstance(self.branches[0], nn.Conv2d):
            return
        weight, bias = self.fold()
        trainable = self.branches[0][0].weight.requires_grad
        dim = len(weight)
        folded = nn.utils.skip_init(nn.Conv2d, dim, dim, 3, padding=1, groups=dim)
        folded.weight = nn.Parameter(weight, trainable)
        folded.bias = nn.Parameter(bias, trainable)
        self.branches = nn.ModuleList([folded]).train(self.training)
        self.skip = False


class FFN(nn.Module):
    """Linear, positional encoding, GELU, linear: (B, H, W, C) -> the same.

    Args: dim, C; ratio, expansion of the hidden layer; cpe, a key of CPE, or None for no encoding.
    """

    def __init__(self, dim, ratio, cpe):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.cpe = RPCPE(ratio * dim, *CPE[cpe]) if cpe else nn.Identity()
        if cpe == "folded":
            self.cpe.reparameterize()
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x):
        hidden = self.cpe(self.fc1(x))                                  # (B, H, W, ratio * C)
        return self.fc2(F.gelu(hidden))


def init_weights(module):
    """PVTv2's rule: linear weights N(0, 0.02) truncated, convolutions N(0, sqrt(2 / fan-out)).

    Saliency and position tables are N(0, 0.02) truncated. Biases are 0, except in the patch
    embeddings, whose convolutions keep PyTorch's default: with bias 0, padded pixels would become
    zero tokens, and the LayerNorm of a zero token multiplies gradients by 1 / sqrt(eps) = 1000.
    Norms stay as constructed.
    Raises: TypeError for a module with parameters and no rule.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, KeyOnlyAttention):
        nn.init.trunc_normal_(module.saliency, std=0.02)
    elif isinstance(module, PositionTable):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif list(module.parameters(recurse=False)):
        if not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            raise TypeError(f"no initialization rule for {type(module).__name__}")


# -------------------------------------------------------------------------------------------- block
class Block(nn.Module):
    """Attention and FFN, each with LayerNorm and a skip connection (Fig. 3b).

    (B, H, W, C) -> the same. `attention` is "key-only" or "dot", `cpe` as in FFN.
    """

    def __init__(self, dim, heads, ffn_ratio, attention, cpe, drop_path):
        super().__init__()
        layer = KeyOnlyAttention if attention == "key-only" else DotProductAttention
        self.norm1 = LayerNorm(dim)
        self.attn = layer(dim, heads)
        self.norm2 = LayerNorm(dim)
        self.ffn = FFN(dim, ffn_ratio, cpe)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = self.drop_path(x, self.attn(self.norm1(x)))
        return self.drop_path(x, self.ffn(self.norm2(x)))


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


def overlapping_embeddings(dims):
    """Patch embedding of each stage, in a Sequential as in `non_overlapping_embeddings`."""
    embeds = nn.ModuleList()
    in_dim = 3
    for dim, (kernel_size, stride) in zip(dims, DOWN_SAMPLING):
        embeds.append(nn.Sequential(PatchEmbedding(in_dim, dim, kernel_size, stride)))
        in_dim = dim
    return embeds


class LinGlo(nn.Module):
    """Four stages of key-only blocks at strides 4, 8, 16 and 32 (Fig. 3, sec. 3.4).

    Args:
        num_classes: width of the classifier; 0 for none.
        drop_path_rate: stochastic depth of the last block; rates rise linearly from 0.
        depths, dims, heads: blocks, channels and heads, one entry per stage.
        attention: "key-only", or "dot" for dot-product attention (Fig. 4).
        layout: one letter per stage, H for hybrid blocks, C for convolution blocks (Table 5).
        cpe: "rp", "r", "p" or "cpe", see CPE (Table 6); "folded" for the deployed form of all.
        convolutions: False for non-overlapping patches, position tables and no RP-CPE
            (LinGlo-w/o-C of Fig. 5).
        hierarchical: False for 16 x 16 patches and no other down-sampling, so that all strides
            are 16 (LinGlo-w/o-CH of Fig. 5, with dims=(150,) * 4 and heads=(3,) * 4). It needs
            convolutions=False and equal dims.
    Attributes: channels, the widths of the four feature maps.
    Raises: ValueError for other values.
    """

    def __init__(
        self, *, num_classes, drop_path_rate, depths, dims, heads,
        attention="key-only", layout="HHHH", cpe="rp", convolutions=True, hierarchical=True,
    ):
        super().__init__()
        check_arguments(num_classes, drop_path_rate, depths=depths, dims=dims, heads=heads)
        check_ablations(attention, layout, cpe, convolutions, hierarchical, dims)

        def block(stage, rate):
            dim = dims[stage]
            if layout[stage] == "C":
                return ConvBlock(dim, rate)
            encoding = cpe if convolutions else None
            return Block(dim, heads[stage], FFN_RATIOS[stage], attention, encoding, rate)

        self.channels = tuple(dims)
        if convolutions:
            self.embeds = overlapping_embeddings(dims)
        else:
            self.embeds = non_overlapping_embeddings(dims, hierarchical)
        self.stages = build_stages(depths, drop_path_rate, block)
        self.norms = nn.ModuleList(LayerNorm(dim) for dim in dims)
        self.head = nn.Linear(dims[3], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    def forward_features(self, images):
        """Feature maps of the four stages, channels-last in memory.

        Args: images (B, 3, H, W), normalised.
        Returns: four maps (B, C_i, ceil(H / s), ceil(W / s)) with s = 4, 8, 16, 32; without
            hierarchy all strides s are 16.
        Raises: ValueError unless images are (B, 3, H, W) with both sides at least 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, "
                "expected (B, 3, H, W) with H and W at least 32")
        x = images.contiguous(memory_format=torch.channels_last)
        x = x.permute(0, 2, 3, 1)                                       # (B, H, W, 3)
        maps = []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms):
            x = norm(stage(embed(x)))                                   # (B, H/s, W/s, C_i)
            maps.append(x.permute(0, 3, 1, 2))
        return tuple(maps)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, num_classes); pooled features (B, C_4) if num_classes is 0.

        In train mode BatchNorm needs more than one value per channel: B > 1 at 32 x 32.
        """
        pooled = self.forward_features(images)[-1].mean((2, 3))         # (B, C_4)
        return self.head(pooled)

    def reparameterize(self):
        """Fold every RP-CPE into one convolution, in place, and return the model (sec. 3.2).

        Outputs in eval mode stay the same. Parameters are replaced: call it before creating an
        optimizer, EMA or DistributedDataParallel.
        """
        for module in self.modules():
            if isinstance(module, RPCPE):
                module.reparameterize()
        return self


# ---------------------------------------------------------------------------------------- factories
def linglo_b0(num_classes=1000, drop_path_rate=0.1, **overrides):
    """LinGlo-b0, 3.60 M parameters deployed, 3.81 M in training."""
    options = {**VARIANTS["linglo_b0"], **overrides}
    return LinGlo(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def linglo_b1(num_classes=1000, drop_path_rate=0.1, **overrides):
    """LinGlo-b1, 13.73 M parameters deployed, 14.14 M in training."""
    options = {**VARIANTS["linglo_b1"], **overrides}
    return LinGlo(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def linglo_b2(num_classes=1000, drop_path_rate=0.15, **overrides):
    """LinGlo-b2, 25.14 M parameters deployed, 25.97 M in training."""
    options = {**VARIANTS["linglo_b2"], **overrides}
    return LinGlo(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


# ------------------------------------------------ the main model ends here: ablations and relatives
def check_ablations(attention, layout, cpe, convolutions, hierarchical, dims):
    """Raise ValueError for values that LinGlo does not document."""
    if attention not in ("key-only", "dot"):
        raise ValueError(f"attention = {attention!r}, expected 'key-only' or 'dot'")
    if len(layout) != 4 or set(layout) - set("HC"):
        raise ValueError(f"layout = {layout!r}, expected four letters H or C")
    if cpe not in CPE:
        raise ValueError(f"cpe = {cpe!r}, expected one of {', '.join(CPE)}")
    if not hierarchical and (convolutions or len(set(dims)) > 1):
        raise ValueError(
            "hierarchical=False needs convolutions=False and equal dims, "
            f"not {convolutions} and {dims}")


class DotProductAttention(nn.Module):
    """Multi-head self-attention (Eq. 1; Fig. 4): (B, H, W, C) -> the same.

    Raises: ValueError for heads that do not divide `dim`.
    """

    def __init__(self, dim, heads):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).flatten(1, 2)                                 # (B, N, 3 * C)
        qkv = qkv.unflatten(2, (3, self.heads, -1))                     # (B, N, 3, h, d)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))            # each (B, h, N, d)
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, h, N, d), Eq. 1
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class ConvBlock(nn.Module):
    """Convolution block with squeeze-and-excitation (Table 5): (B, H, W, C) -> the same.

    Two 3x3 convolutions with BatchNorm, a gate per channel and a skip connection.
    """

    def __init__(self, dim, drop_path):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
        )
        self.gate = nn.Sequential(
            nn.Linear(dim, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, dim),
            nn.Sigmoid(),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.convs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)       # (B, H, W, C)
        squeezed = y.mean((1, 2), keepdim=True)                         # (B, 1, 1, C)
        return self.drop_path(x, y * self.gate(squeezed))


class SeparatePatches(nn.Module):
    """Non-overlapping patches: a convolution of kernel size = stride, and LayerNorm (Fig. 5).

    (B, H, W, C), zero-padded right and bottom -> (B, ceil(H / size), ceil(W / size), C').
    """

    def __init__(self, in_dim, dim, size):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(in_dim, dim, size, stride=size)
        self.norm = LayerNorm(dim)

    def forward(self, x):
        _, H, W, _ = x.shape
        x = F.pad(x.permute(0, 3, 1, 2), (0, -W % self.size, 0, -H % self.size))
        x = self.conv(x)                                                # (B, C', H', W')
        return self.norm(x.permute(0, 2, 3, 1))


class PositionTable(nn.Module):
    """Adds a learned vector per position (Fig. 5, as in PVT): (B, H, W, C) -> the same.

    The table is side x side and bilinearly interpolated for other maps.
    """

    def __init__(self, dim, side):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, side, side))

    def forward(self, x):
        table = F.interpolate(self.weight, size=x.shape[1:3], mode="bilinear")
        return x + table.permute(0, 2, 3, 1)                            # (1, H, W, C)


def non_overlapping_embeddings(dims, hierarchical):
    """Patch embedding and position table of each stage (Fig. 5); tables are for 224 x 224."""
    if not hierarchical:
        first = nn.Sequential(SeparatePatches(3, dims[0], 16), PositionTable(dims[0], 14))
        return nn.ModuleList([first, nn.Sequential(), nn.Sequential(), nn.Sequential()])
    embeds = nn.ModuleList()
    in_dim = 3
    side = 224
    for dim, size in zip(dims, (4, 2, 2, 2)):
        side //= size
        patches = SeparatePatches(in_dim, dim, size)
        embeds.append(nn.Sequential(patches, PositionTable(dim, side)))
        in_dim = dim
    return embeds


# --------------------------------------------------------------------------------- released weights
# The authors released no weights of LinGlo; these are train_imagenet.py's.
def read_weights(path):
    """State dict in a file, a train_imagenet.py checkpoint or a bare one, and the model's options.

    Raises: OSError if the file cannot be opened, ValueError if it holds no state dict.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            args = state.get("args")
            options = args.get("option") if isinstance(args, dict) else None  # --option
            weights = state.get("ema") or state.get("model", state)  # averaged, if there are any
            return dict(weights), dict(options or {})
        except Exception as error:  # torch.load raises many types on files of other formats
            raise ValueError(f"no weights in it ({type(error).__name__})") from None


def load_weights(factory, path):
    """Build the model of `factory` with the weights in a file, deployed or not, in eval mode.

    Raises: OSError if the file cannot be opened, ValueError if it does not fit the model.
    """
    state, options = read_weights(path)
    try:
        classes = len(state.get("head.weight", ()))
        model = factory(num_classes=classes, **options)
        if any(name.endswith("cpe.branches.0.weight") for name in state):
            model.reparameterize()  # as the model of the file was
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"weights of another model ({message})") from None
    return model.eval()


def deploy(model, path):
    """What a file of weights holds once RP-CPE is folded, readable wherever that file is.

    Args: model, its factory's name; path, as in `load_weights`.
    Returns: dict of the weights, averaged ones if there are any, the arguments of the run, with
        the option cpe="folded", and the names of the classes.
    Raises: as `load_weights`.
    """
    weights = load_weights(globals()[model], path).reparameterize().state_dict()
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args = checkpoint.get("args") or {}
    option = {**(args.get("option") or {}), "cpe": "folded"}
    deployed = {"model": weights, "args": {**args, "model": model, "option": option}}
    if "classes" in checkpoint:
        deployed["classes"] = checkpoint["classes"]
    return deployed


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


def blue_to_red(values):
    """Array of values from 0 to 255 -> RGB array with one more axis."""
    palette = []
    for level in range(256):
        palette.append(colorsys.hsv_to_rgb(0.7 * (1 - level / 255), 0.9, 0.3 + 0.7 * level / 255))
    return (255 * np.array(palette)[values]).astype(np.uint8)


def saliency_panel(weights, image):
    """Attention maps (h, H, W) of one layer over the image: a grid of heads, row by row."""
    low = weights.amin((1, 2), keepdim=True)
    high = weights.amax((1, 2), keepdim=True)
    levels = (255 * (weights - low) / (high - low).clamp(min=1e-12)).int().numpy()
    columns = math.ceil(math.sqrt(len(weights)))
    width, height = (side // columns for side in image.size)
    grey = image.convert("L").convert("RGB").resize((width, height))
    panel = Image.new("RGB", image.size, "white")
    for head, colours in enumerate(blue_to_red(levels)):
        heat = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
        row, column = divmod(head, columns)
        panel.paste(Image.blend(grey, heat, 0.7), (column * width, row * height))
    return panel


@torch.no_grad()
def draw_saliency(model, image):
    """The image beside the attention maps (Eq. 2) of each stage's last block, red for large A."""
    attns = {}
    for i, stage in enumerate(model.stages):
        attn = getattr(stage[-1], "attn", None)
        if isinstance(attn, KeyOnlyAttention):
            attns[f"stage {i + 1}: {attn.heads} heads"] = attn
    panels = [("image", image)]
    for (caption, attn), x in zip(attns.items(), layer_inputs(model, attns.values(), image)):
        weights = attention_map(attn.split_heads(attn.k(x)), attn.saliency)     # (1, h, N)
        panels.append((caption, saliency_panel(weights[0].unflatten(1, x.shape[1:3]), image)))
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


def main():
    """Read an image, show what the mechanism does to it, write a PNG."""
    parser = argparse.ArgumentParser(description="Plot which keys of an image LinGlo attends to.")
    parser.add_argument("image", nargs="?", help="any image file (default: a built-in landscape)")
    parser.add_argument("-o", "--output", default="linglo.png", help="file to write")
    parser.add_argument("--model", default="linglo_b0", choices=sorted(VARIANTS))
    parser.add_argument("--weights", help="trained weights (default: random, seed 0)")
    parser.add_argument("--deploy", metavar="FILE", help="fold RP-CPE of --weights, write FILE")
    args = parser.parse_args()
    if "" in (args.image, args.weights, args.output, args.deploy):  # an unset shell variable
        parser.error("a file name is empty")
    if args.deploy and not args.weights:
        parser.error("--deploy needs --weights")
    torch.manual_seed(0)
    path = args.weights
    try:
        if args.deploy:
            deployed = deploy(args.model, path)
            path = args.deploy
            with open(path, "wb") as file:
                torch.save(deployed, file)
        else:
            factory = globals()[args.model]
            model = load_weights(factory, path) if path else factory().eval()
            path = args.image
            image = load_image(path) if path else example_image()
            path = args.output
            draw_saliency(model, image).save(path)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{path}: {' '.join(str(error).split())}\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
