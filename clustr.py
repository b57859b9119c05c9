"""ClusTR: Exploring Efficient Self-attention via Clustering for Vision Transformers
Yutong Xie, Jianpeng Zhang, Yong Xia, Anton van den Hengel, Qi Wu; arXiv 2208.13138v1

Mechanism. Tokens are clustered around density peaks, and each cluster is merged into one token.
Every token attends to the merged tokens, at several numbers of clusters (scales) at once.

Symbols.
    paper                           here
    X or z_l (Eq. 9); N, C          x, N = H * W tokens of C channels; B samples
    L, C, H (Table 1)               depths, dims, heads; in shapes h is the number of heads, H and W
                                    are the sides of the token map, and L is the number of scales
    k (Eq. 1)                       neighbours
    rho, delta, gamma (sec. 3.1)    log_density, delta, log_gamma
    M and G_1 ... G_M (sec. 3.1)    clusters and index (B, N), the cluster of each token
    w_i (Eq. 3)                     weight, the softmax of `score` within the cluster
    s (Eq. 4), W^Q, W^K, W^V, Phi   d = C / h, the width of a head; q, kv, proj
    lambda_1 ... lambda_L (Eq. 7)   ratios, one tuple per stage
Inside a stage every map is channels-last, (B, H, W, C): linear layers, norms and convolutions
share this layout.

Reading order. density_peaks -> assign_clusters -> aggregate -> ClusteringGuidedAttention -> Block
-> ClusTR. What follows the factories is not needed to understand the model.

Differs from the text.
- Distances are divided by sqrt(C), as in the authors' code (github.com/YtongXie/ClusTR). This is a
  choice: Eq. 1 does not divide, and undivided distances choose other centres.
- One clustering per layer, of the normalised input, serves K and V, all heads and all scales.
  Literally, Eq. 5 and 6 cluster K and V of every head separately.
- Every scale has its own W^K and W^V, which have no index j in Eq. 8, and the FFN ("fully
  connected") has a 3x3 depth-wise convolution before its GELU. Table 2's sizes need both.
- Tokens are aggregated first and projected to K and V afterwards. This is cheaper than Eq. 5 and
  equal to it for the same clusters and weights, since the weights of a cluster sum to one.
- Patch embeddings are PVTv2's, as in the authors' code: 7x7/4, then 3x3/2, with LayerNorm. Sec. 3.4
  names Ren et al. (2022).

Differs from the authors' code.
- It has one score layer per layer, here one per scale, and a shortcut around the FFN's convolution.
- In it tokens join the nearest centre, M is rounded down, and random noise breaks ties of density.
- Its stochastic depth of S is 0.1.

The text is ambiguous.
- Eq. 7 concatenates the tokens of all scales, Eq. 8 sums one attention per scale. Eq. 8 is built;
  the tokens of Eq. 7 stay in one tensor per scale.
- w_i is "the learnable parameter for each token": here the softmax, within the cluster, of a linear
  score of the token, with one score layer per scale (authors' code: one for all).
- A token may or may not be one of its own k neighbours: here it is, as in the authors' code.
- Equally dense tokens: here the one with the smaller index counts as denser.
- Tables 7 and 8 do not say their ratios. Their sizes are those of single-scale models.

The text is silent.
- From the authors' code: k is 5, s is d. Ratio 1 keeps the tokens as they are, without score.
- M is N / lambda, rounded up.
- The FFN expands 8, 8, 4 and 4 times, which Table 2's sizes need and the authors' code has.
- As in PVTv2: LayerNorm after every stage, initial weights but for the biases of patch embeddings,
  see `init_weights`.
- Our choice: stochastic depth of 0.1 / 0.2 / 0.3 for T / S / B (authors' configurations: 0.1 / 0.1
  / 0.3); `aggregation="knn"` keeps half of the keys.
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
VARIANTS = {  # Table 1
    "clustr_t": dict(depths=(1, 2, 6, 1), dims=(64, 128, 256, 512), heads=(1, 2, 4, 8)),
    "clustr_s": dict(depths=(3, 5, 13, 2), dims=(64, 128, 256, 512), heads=(1, 2, 4, 8)),
    "clustr_b": dict(depths=(3, 5, 18, 3), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
}
RATIOS = ((64, 16), (16, 4), (4, 1), (1,))  # Table 1, lambda
FFN_RATIOS = (8, 8, 4, 4)  # expansion of the FFN in each stage, from the sizes of Table 2


# --------------------------------------------------------------------------------------------- core
@torch.no_grad()
def density_peaks(x, neighbours=5, chunk=160):
    """Density and distance to denser tokens (Eq. 1 and 2; Rodriguez and Laio, Science 2014).

    For one sample x (N, C) without ties, with all distances at once, this is
        distance = torch.cdist(x, x) / C ** 0.5                             # (N, N)
        nearest = distance.topk(neighbours, largest=False).values           # (N, k)
        log_density = -nearest.square().mean(1)                             # Eq. 1
        denser = log_density[None, :] > log_density[:, None]                # j denser than i?
        delta, parent = distance.where(denser, torch.inf).min(1)            # Eq. 2
        densest = log_density.argmax()
        delta[densest] = distance[densest].max()
        parent[densest] = densest
    The code computes distances twice, once per equation, and only `chunk` rows at a time, so that
    memory is O(B * chunk * N): see nearest_distances and nearest_before, after the factories. For
    Eq. 2 it sorts tokens by falling density, so that the denser tokens are those before a token.
    A GPU multiplies bfloat16 tokens without converting them, see multiplies_bfloat16.

    Args:
        x: (B, N, C), tokens.
        neighbours: k of Eq. 1, the token itself included; all N if there are fewer than k.
        chunk: rows of distances computed at a time.
    Returns, without gradient and in at least float32 (with TF32 a few tokens change clusters):
        log_density: (B, N), log rho. The logarithm does not underflow.
        delta: (B, N), distance to the nearest denser token; the densest token's largest distance.
        parent: (B, N), index of the nearest denser token, on ties the densest of them; the densest
            token is its own parent.
    Raises: ValueError for neighbours or chunk below 1.
    """
    if neighbours < 1 or chunk < 1:
        raise ValueError(f"neighbours = {neighbours}, chunk = {chunk}, expected at least 1")
    N = x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        x, norm, scale = tokens_and_norms(x)                                # norm (B, N), |x_i|^2
        rows, columns = extended_tokens(x, norm)                            # (B, N', C') each
        squared = nearest_distances(rows, columns, norm, min(neighbours, N), chunk)     # (B, N, k)
        log_density = -scale * squared.mean(2)                              # Eq. 1

        order = log_density.sort(descending=True, stable=True).indices      # densest first
        rows, columns = gather_tokens(rows, columns, order)
        norm = norm.gather(1, order)
        squared_delta, sorted_parent = nearest_before(rows, columns, norm, min(chunk, N))
        sorted_delta = (scale * squared_delta).sqrt()                       # Eq. 2
    delta = torch.empty_like(norm).scatter_(1, order, sorted_delta)         # back to input order
    parent = torch.empty_like(order).scatter_(1, order, order.gather(1, sorted_parent))
    return log_density, delta, parent


def assign_clusters(log_density, delta, parent, clusters):
    """Cut the tree of nearest denser tokens at the density peaks (sec. 3.1).

    The `clusters` tokens of largest gamma = rho * delta are centres, the densest token always.
    Every other token joins the cluster of its parent:
        centre(i) = i if i is a centre, else centre(parent[i])
    The code does this for all tokens at once, and each step doubles the number of links followed.
    (The authors' code assigns tokens to the nearest centre instead.)

    Args: log_density, delta, parent, each (B, N), from `density_peaks`; clusters, M.
    Returns: (B, N), the cluster of each token in [0, M), clusters numbered by falling gamma.
    Raises: ValueError unless 1 <= M <= N.
    """
    B, N = parent.shape
    if not 1 <= clusters <= N:
        raise ValueError(f"clusters = {clusters}, expected 1 to {N}, the number of tokens")
    token_ids = torch.arange(N, device=parent.device).expand(B, N)
    is_densest = parent == token_ids            # no other token is its own parent
    log_gamma = (log_density + delta.log()).masked_fill_(is_densest, torch.inf)
    order = log_gamma.sort(descending=True, stable=True).indices
    centres = order[:, :clusters]                                           # (B, M)
    pointer = parent.scatter(1, centres, centres)   # a centre points to itself
    for _ in range((N - 1).bit_length()):       # a chain has at most N - 1 links
        pointer = pointer.gather(1, pointer)
    index = torch.zeros_like(parent)            # zeros are read only if the input has NaNs
    index.scatter_(1, centres, token_ids[:, :clusters])     # the m-th centre has cluster m
    return index.gather(1, pointer)


def aggregate(x, score, index, clusters):
    """Merge each cluster into one token, h_m = sum of w_i x_i over its tokens (Eq. 3).

    For cluster m of one sample, with `members = index == m`:
        h[m] = score[members].softmax(0) @ x[members]
    The code does it for all clusters at once.

    Args:
        x: (B, N, C), tokens.
        score: (B, N), learned; w is its softmax within each cluster.
        index: (B, N), the cluster of each token; no cluster may be empty.
        clusters: M.
    Returns: (B, M, C) in x's type, summed in at least float32. Deterministic under
        torch.use_deterministic_algorithms(True).
    """
    B, N, C = x.shape
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    detached = score.detach()                   # a softmax does not depend on what is subtracted
    largest = detached.new_full((B, clusters), -torch.inf)
    largest = largest.scatter_reduce(1, index, detached, "amax")            # (B, M)
    weight = (score - largest.gather(1, index)).exp()                       # (B, N), at most 1
    offset = torch.arange(0, B * clusters, clusters, device=x.device)[:, None]      # (B, 1)
    rows = (index + offset).flatten()                                       # (B*N,)
    total = weight.new_zeros(B * clusters).index_add(0, rows, weight.flatten())
    weight = weight / total.index_select(0, rows).view(B, N)                # w of Eq. 3
    weighted = (x * weight[..., None]).flatten(0, 1)                        # (B*N, C)
    merged = weighted.new_zeros(B * clusters, C).index_add(0, rows, weighted)
    return merged.view(B, clusters, C).to(x.dtype)                          # (B, M, C), Eq. 3


@torch.library.custom_op(
    "clustr::cluster_tokens",
    mutates_args=(),
    schema="(Tensor x, SymInt neighbours, SymInt[] clusters) -> Tensor",
)
def cluster_tokens(x, neighbours, clusters):
    """`density_peaks` once, then `assign_clusters` per number of clusters: (B, N, C) -> (L, B, N).

    One opaque operator, so that data-dependent loops stay out of torch.compile's graph.
    """
    peaks = density_peaks(x, neighbours, rows_per_chunk(x))
    return torch.stack([assign_clusters(*peaks, count) for count in clusters])


@cluster_tokens.register_fake
def _(x, _neighbours, clusters):  # shape and type, for torch.compile
    B, N, _ = x.shape
    return x.new_empty((len(clusters), B, N), dtype=torch.int64)


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


class ClusteringGuidedAttention(nn.Module):
    """Multi-head multi-scale clustering-guided attention (Eq. 5 to 8): (B, H, W, C) -> the same.

    Args:
        dim, heads: C and h, which divides C.
        ratios: lambda, token reductions, whole numbers of at least 1, one per scale.
        neighbours: k of the densities, a whole number of at least 1.
        aggregation: "cluster", or for Tables 7 and 8 "grid" (spatial reduction) or "knn" (spatial
            reduction, then k-NN attention to half of the keys).
    Raises: ValueError for other values.
    """

    def __init__(self, dim, heads, ratios, neighbours=5, aggregation="cluster"):
        super().__init__()
        check_attention(dim, heads, ratios, neighbours, aggregation)
        self.heads = heads
        self.ratios = tuple(ratios)
        self.neighbours = neighbours
        self.aggregation = aggregation
        self.q = nn.Linear(dim, dim)
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in ratios)
        self.reduce = nn.ModuleList()           # scores of Eq. 3, or the ablations' convolutions
        for ratio in ratios:
            if ratio > 1 and aggregation == "cluster":
                self.reduce.append(nn.Linear(dim, 1))
            elif ratio > 1:
                self.reduce.append(GridReduction(dim, ratio))
        self.proj = nn.Linear(dim, dim)

    def cluster_counts(self, N):
        """M = N / lambda, rounded up, for each ratio above 1."""
        return [-(-N // ratio) for ratio in self.ratios if ratio > 1]

    def merge_clusters(self, tokens):
        """Cluster(X; lambda) of Eq. 3 for each ratio above 1: (B, N, C) -> [(B, M, C), ...]."""
        counts = self.cluster_counts(tokens.shape[1])
        if not counts:
            return []
        indices = cluster_tokens(tokens.detach(), self.neighbours, counts)  # (L, B, N)
        scores = [to_score(tokens).squeeze(2) for to_score in self.reduce]  # (B, N) each
        merged = []
        for score, index, count in zip(scores, indices, counts):
            merged.append(aggregate(tokens, score, index, count))
        return merged

    def reduced_tokens(self, x):
        """The tokens of each scale, what Eq. 7 concatenates: (B, H, W, C) -> [(B, M, C), ...]."""
        tokens = x.flatten(1, 2)                                            # (B, N, C)
        if self.aggregation == "cluster":
            merged = iter(self.merge_clusters(tokens))
        else:
            merged = iter([layer(x) for layer in self.reduce])
        # Eq. 7, one tensor per scale
        return [next(merged) if ratio > 1 else tokens for ratio in self.ratios]

    def forward(self, x):
        q = self.q(x).flatten(1, 2).unflatten(2, (self.heads, -1))          # (B, N, h, d)
        q = q.transpose(1, 2)                                               # (B, h, N, d)
        scales = []
        for reduced, to_kv in zip(self.reduced_tokens(x), self.kv):         # j of Eq. 8
            kv = to_kv(reduced).unflatten(2, (2, self.heads, -1))           # (B, M, 2, h, d)
            k, v = (t.transpose(1, 2) for t in kv.unbind(2))                # (B, h, M, d) each
            if self.aggregation == "knn":
                y = nearest_keys_attention(q, k, v, keep=(k.shape[2] + 1) // 2)
            else:
                y = F.scaled_dot_product_attention(q, k, v)                 # Eq. 5; Eq. 4 if M = N
            scales.append(y)
        y = sum(scales[1:], start=scales[0])                                # Eq. 8
        y = y.transpose(1, 2).reshape(x.shape)                              # heads joined, Eq. 6
        return self.proj(y)                                                 # Phi of Eq. 6 and 8


class ConvFFN(nn.Module):
    """Linear, 3x3 depth-wise convolution, GELU, linear; (B, H, W, C) -> the same."""

    def __init__(self, dim, ratio):
        super().__init__()
        hidden = ratio * dim
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.fc1(x).permute(0, 3, 1, 2)                                 # (B, ratio * C, H, W)
        x = self.conv(x).permute(0, 2, 3, 1)                                # (B, H, W, ratio * C)
        return self.fc2(F.gelu(x))


def init_weights(module):
    """PVTv2's rule: linear weights N(0, 0.02) truncated, convolutions N(0, sqrt(2 / fan-out)).

    Biases are 0, except in the patch embeddings, whose convolutions keep PyTorch's default: with
    bias 0, padded pixels would become zero tokens, and the LayerNorm of a zero token multiplies
    gradients by 1 / sqrt(eps) = 1000. Norms stay as constructed.
    Raises: TypeError for a module with parameters and no rule.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.groups > 1:  # depth-wise
            nn.init.zeros_(module.bias)
    elif list(module.parameters(recurse=False)) and not isinstance(module, nn.LayerNorm):
        raise TypeError(f"no initialization rule for {type(module).__name__}")


# -------------------------------------------------------------------------------------------- block
class Block(nn.Module):
    """Clustering-guided attention and FFN (Eq. 9); (B, H, W, C) -> the same."""

    def __init__(self, dim, heads, ratios, neighbours, aggregation, ffn_ratio, drop_path):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = ClusteringGuidedAttention(dim, heads, ratios, neighbours, aggregation)
        self.norm2 = LayerNorm(dim)
        self.ffn = ConvFFN(dim, ffn_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = self.drop_path(x, self.attn(self.norm1(x)))                    # z' of Eq. 9
        return self.drop_path(x, self.ffn(self.norm2(x)))                  # z of Eq. 9


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


class ClusTR(nn.Module):
    """Four stages of clustering-guided blocks at strides 4, 8, 16 and 32 (Fig. 3 and Table 1).

    Args:
        num_classes: width of the classifier; 0 for none.
        drop_path_rate: stochastic depth of the last block; rates rise linearly from 0.
        depths, dims, heads: blocks, channels and heads, one entry per stage.
        ratios: one tuple of token reductions per stage; Table 9's single-scale models are
            ((64,), (16,), (4,), (1,)) and ((16,), (4,), (1,), (1,)).
        neighbours: k of the densities.
        aggregation: "cluster", or "grid" or "knn" (Tables 7 and 8).
    Attributes: channels, the widths of the four feature maps.
    Raises: ValueError for other values.
    """

    def __init__(
        self, *, num_classes, drop_path_rate, depths, dims, heads,
        ratios=RATIOS, neighbours=5, aggregation="cluster",
    ):
        super().__init__()
        check_arguments(num_classes, drop_path_rate, depths=depths, dims=dims, heads=heads)
        if len(ratios) != 4:
            raise ValueError(f"ratios = {ratios}, expected 4 tuples, one per stage")
        self.channels = tuple(dims)
        self.embeds = nn.ModuleList([PatchEmbedding(3, dims[0], kernel_size=7, stride=4)])
        for i in range(1, 4):
            self.embeds.append(PatchEmbedding(dims[i - 1], dims[i], kernel_size=3, stride=2))

        def block(i, rate):
            return Block(
                dims[i], heads[i], ratios[i], neighbours, aggregation, FFN_RATIOS[i], rate)

        self.stages = build_stages(depths, drop_path_rate, block)
        self.norms = nn.ModuleList(LayerNorm(dim) for dim in dims)
        self.head = nn.Linear(dims[3], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    def forward_features(self, images):
        """Feature maps of the four stages, channels-last in memory.

        Args: images (B, 3, H, W), normalised.
        Returns: four maps (B, C_i, ceil(H / s), ceil(W / s)) with s = 4, 8, 16, 32.
        Raises: ValueError unless images are (B, 3, H, W) with both sides at least 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, "
                "expected (B, 3, H, W) with H and W at least 32")
        x = images.contiguous(memory_format=torch.channels_last)
        x = x.permute(0, 2, 3, 1)                                           # (B, H, W, 3)
        maps = []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms):
            x = norm(stage(embed(x)))                                       # (B, H/s, W/s, C_i)
            maps.append(x.permute(0, 3, 1, 2))
        return tuple(maps)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, num_classes); pooled features (B, C_4) if num_classes is 0."""
        pooled = self.forward_features(images)[-1].mean((2, 3))             # (B, C_4)
        return self.head(pooled)


# ---------------------------------------------------------------------------------------- factories
def clustr_t(num_classes=1000, drop_path_rate=0.1, **overrides):
    """ClusTR-T, 11.68 M parameters."""
    options = {**VARIANTS["clustr_t"], **overrides}
    return ClusTR(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def clustr_s(num_classes=1000, drop_path_rate=0.2, **overrides):
    """ClusTR-S, 22.69 M parameters."""
    options = {**VARIANTS["clustr_s"], **overrides}
    return ClusTR(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


def clustr_b(num_classes=1000, drop_path_rate=0.3, **overrides):
    """ClusTR-B, 40.25 M parameters."""
    options = {**VARIANTS["clustr_b"], **overrides}
    return ClusTR(num_classes=num_classes, drop_path_rate=drop_path_rate, **options)


# ------------------------------------------------ the main model ends here: ablations and relatives
def check_attention(dim, heads, ratios, neighbours, aggregation):
    """Raise ValueError for arguments that ClusteringGuidedAttention cannot have."""
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"dim = {dim} does not split into {heads} heads")
    if not ratios or not all(isinstance(ratio, int) and ratio >= 1 for ratio in ratios):
        raise ValueError(f"ratios = {ratios}, expected one or more whole numbers of at least 1")
    if not isinstance(neighbours, int) or neighbours < 1:
        raise ValueError(f"neighbours = {neighbours}, expected a whole number of at least 1")
    if aggregation not in ("cluster", "grid", "knn"):
        raise ValueError(f"aggregation = {aggregation!r}, expected 'cluster', 'grid' or 'knn'")


class GridReduction(nn.Module):
    """Spatial reduction (Table 7; PVT): (B, H, W, C) -> (B, M, C).

    A convolution merges each cell of `ratio` tokens into one, followed by LayerNorm. Maps are
    zero-padded right and bottom to whole cells.
    Raises: ValueError for a ratio that is not a square.
    """

    def __init__(self, dim, ratio):
        super().__init__()
        self.side = math.isqrt(ratio)
        if self.side ** 2 != ratio:
            raise ValueError(f"ratio = {ratio}, a grid needs the square of a cell's side")
        self.conv = nn.Conv2d(dim, dim, self.side, stride=self.side)
        self.norm = LayerNorm(dim)

    def forward(self, x):
        _, H, W, _ = x.shape
        x = x.permute(0, 3, 1, 2)                                           # (B, C, H, W)
        x = F.pad(x, (0, -W % self.side, 0, -H % self.side))
        x = self.conv(x).flatten(2).mT                                      # (B, M, C)
        return self.norm(x)


def nearest_keys_attention(q, k, v, keep):
    """k-NN attention (Table 8; Wang et al., arXiv 2106.00515).

    Each query attends to its `keep` top-scoring keys, ties included.
    Args: q (B, h, N, d); k, v (B, h, M, d); keep, 1 to M.
    Returns: (B, h, N, d). Holds the N x M map, which top-k needs.
    """
    logits = q @ k.mT * q.shape[-1] ** -0.5                                 # (B, h, N, M)
    smallest_kept = logits.topk(keep).values[..., -1:]                      # (B, h, N, 1)
    logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    return logits.softmax(-1) @ v


# The distances of density_peaks, in chunks of rows: d_ij^2 = |x_i|^2 - 2 s_ij, with the similarity
# s_ij = x_i . x_j - |x_j|^2 / 2. The tokens nearest to x_i are those most similar to it.
GROUP = 14  # columns that `largest` reduces to their maximum; 224-pixel images need no padding


def rows_per_chunk(x):
    """Rows of distances at a time for x (B, N, C): 160, on a GPU more where they fit.

    A GPU needs large products: about 2^26 entries, at most a quarter of the rows if there are more
    than 256, since half of the columns are left out for Eq. 2. A CPU needs products that stay in
    its caches.
    """
    B, N, _ = x.shape
    if not x.is_cuda:
        return 160
    rows = N // 4 if N > 256 else N
    return max(160, min(2 ** 26 // (B * N), rows))


def multiplies_bfloat16(x):
    """Whether x is bfloat16 on a GPU whose torch.bmm returns float32: CUDA, torch from 2.8.

    Such products are cheaper than those in float32. Products of two bfloat16 numbers are exact in
    float32. Tensor cores sum them with errors around 1e-6 of |x|^2, in the tests' emulation up to
    1e-5. The rounding of the tokens themselves changes distances by more, unless a channel with
    the same large value in all tokens makes up nearly all of |x|^2.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.version.cuda is None:
        return False
    return "dtype" in torch.ops.aten.bmm.overloads()


def tokens_and_norms(x):
    """Tokens to multiply, their squared norms, and what turns squared distances into Eq. 1's.

    Tokens are centred, which reduces rounding errors, and divided by sqrt(C), as distances are in
    Eq. 1. Tokens multiplied in bfloat16 stay as they are: centred or divided they would have to be
    rounded to 8 bits again, which usually costs more than centring gains.
    x (B, N, C) -> tokens (B, N, C), squared norms (B, N), and the factor for squared distances.
    """
    C = x.shape[2]
    if multiplies_bfloat16(x):
        zero = x.new_zeros(1, dtype=torch.float32)      # makes the squares float32, in one pass
        return x, torch.addcmul(zero, x, x).sum(2), 1 / C
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x - x.mean(1, keepdim=True, dtype=dtype)    # keeps distances, reduces rounding errors
    x = x * C ** -0.5
    return x, x.square().sum(2), 1


def bfloat16_pieces(values):
    """Split float32 numbers, of 24 bits, into three bfloat16 ones, of 8: (B, N) -> (B, N, 3)."""
    high = values.bfloat16()
    rest = values - high
    middle = rest.bfloat16()
    return torch.stack([high, middle, (rest - middle).bfloat16()], 2)


def extended_tokens(x, norm):
    """Rows (x_i, -1/2) and columns (x_j, |x_j|^2), whose products are similarities.

    As one more channel the norm costs no pass over the N x N products; in bfloat16 it takes three.
    Channels of zeros align tokens to 16 bytes in memory, which makes the products faster. Tokens of
    infinite norm, similar to none, fill the last group of `largest`.
    x (B, N, C), norm (B, N) -> two tensors (B, N', C').
    """
    B, N, C = x.shape
    norm = bfloat16_pieces(norm) if x.dtype == torch.bfloat16 else norm[..., None]
    padding = -N % (2 * GROUP)                  # an even number of groups aligns the products, too
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
        norm = F.pad(norm, (0, 0, 0, padding), value=torch.inf)
    channels = C + norm.shape[2]
    zeros = x.new_zeros(B, N + padding, -channels % (16 // x.element_size()))
    rows = torch.cat([x, torch.full_like(norm, -0.5), zeros], 2)
    columns = torch.cat([x, norm, zeros], 2)
    return rows, columns


def similarities(rows, columns):
    """Products of rows (B, R, C') and columns (B, N, C') in at least float32: (B, R, N)."""
    if rows.dtype == torch.bfloat16:
        return torch.bmm(rows, columns.mT, out_dtype=torch.float32)
    return torch.bmm(rows, columns.mT)


def squared_distances(similarity, norm, rows):
    """d_ij^2 = |x_i|^2 - 2 s_ij. Rounding errors around 0 become 0, as for equal tokens.

    Tensor cores add 8 or more products at a time and truncate both the products and the sum. Two
    units in the last place per sum cover the errors of emulated A100s and H100s, see the tests.
    Args: similarity and norm, which broadcast; rows (B, N', C'), which were multiplied: their type
    and number of channels determine the errors.
    """
    squared = torch.sub(norm, similarity, alpha=2)
    sums = rows.shape[2] // 8 if rows.dtype == torch.bfloat16 else 0
    rounding = 2 * (1 + sums) * torch.finfo(squared.dtype).eps * norm
    return squared.masked_fill_(squared < rounding, 0)


def nearest_distances(rows, columns, norm, k, chunk):
    """Squared distances to the k nearest tokens: (B, N', C') twice, (B, N) -> (B, N, k)."""
    N = norm.shape[1]
    highest = []
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        similarity = similarities(rows[:, start:stop], columns)             # (B, R, N')
        similarity.diagonal(start, 1, 2).fill_(torch.inf)                   # d_ii is exactly 0
        highest.append(largest(similarity, k))                              # (B, R, k)
    return squared_distances(torch.cat(highest, 1), norm[..., None], rows)


def largest(rows, k):
    """The k largest values of each row, in any order: (B, R, N) -> (B, R, k); GROUP divides N.

    The same as rows.topk(k), which is slow on long rows. The k largest values lie in the k groups
    with the largest maxima, so topk sees N / GROUP maxima, then k groups.
    """
    groups = rows.unflatten(2, (GROUP, -1))                                 # (B, R, GROUP, N/GROUP)
    maxima = groups.amax(2)                                                 # (B, R, N/GROUP)
    chosen = maxima.topk(min(k, maxima.shape[2]), sorted=False).indices
    chosen = chosen[:, :, None].expand(-1, -1, GROUP, -1)                   # (B, R, GROUP, k)
    candidates = groups.gather(3, chosen).flatten(2)                        # (B, R, GROUP*k)
    return candidates.topk(k, sorted=False).values


def gather_tokens(rows, columns, order):
    """Rows and columns (B, N', C') in the given order (B, N)."""
    B, N, _ = rows.shape
    offset = torch.arange(0, B * N, N, device=rows.device)[:, None]         # (B, 1)
    index = (order + offset).flatten()                                      # (B*N,)
    rows = rows.flatten(0, 1).index_select(0, index)
    columns = columns.flatten(0, 1).index_select(0, index)
    return rows.unflatten(0, order.shape), columns.unflatten(0, order.shape)


def nearest_before(rows, columns, norm, chunk):
    """Squared distance to, and position of, the nearest of the tokens before each token (Eq. 2).

    Tokens are sorted by falling density, so that chunks need no later columns, and only their
    diagonal block needs a mask. The densest token, the first, gets its largest distance and its own
    position. Args: rows and columns (B, N, C'), norm (B, N). Returns: two tensors (B, N).
    """
    N = norm.shape[1]
    not_before = norm.new_full((chunk, chunk), -torch.inf).triu()
    highest = []
    position = []
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        size = stop - start
        similarity = similarities(rows[:, start:stop], columns[:, :stop])   # (B, R, stop)
        similarity[:, :, start:] += not_before[:size, :size]
        most_similar = similarity.max(2)                                    # on ties the first
        highest.append(most_similar.values)
        position.append(most_similar.indices)
    highest = torch.cat(highest, 1)
    position = torch.cat(position, 1)
    highest[:, 0] = similarities(rows[:, :1], columns).amin((1, 2))         # largest distance
    position[:, 0] = 0
    return squared_distances(highest, norm, rows), position


# --------------------------------------------------------------------------------- released weights
# The authors released no weights of ClusTR; these are train_imagenet.py's.
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
    """Build the model of `factory` with the weights in a file, in eval mode.

    Raises: OSError if the file cannot be opened, ValueError if it does not fit the model.
    """
    state, options = read_weights(path)
    try:
        classes = len(state.get("head.weight", ()))  # TypeError: a scalar
        model = factory(num_classes=classes, **options)
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


def palette(clusters):
    """Colours (M, 3), all different: hue, saturation and value take irrational steps."""
    colours = []
    for i in range(clusters):
        hue = i * 0.618034 % 1
        saturation = 0.45 + 0.55 * (i * 0.414214 % 1)
        value = 0.5 + 0.5 * (i * 0.732051 % 1)
        colours.append(colorsys.hsv_to_rgb(hue, saturation, value))
    return (255 * np.array(colours)).astype(np.uint8)


def token_attention(attention, score, index):
    """Attention of one token to all tokens: its attention to clusters, spread over their tokens.

    It is a row of softmax(Q K^T / sqrt(d)) W of one scale, where W (M, N) holds the weights w of
    Eq. 3, for visualisation only.

    Args: attention (M,), to the merged tokens; score and index (N,), as in `aggregate`.
    Returns: (N,), which sums to 1.
    """
    weight = (score.double() - score.max()).exp()                           # (N,)
    total = weight.new_zeros(len(attention)).index_add(0, index, weight)    # (M,)
    return attention[index] * weight / total[index]


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
    grey = image.convert("L").convert("RGB")
    panel = Image.blend(grey, heat, 0.6)
    height = image.height / weights.shape[0]
    width = image.width / weights.shape[1]
    box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
    ImageDraw.Draw(panel).rectangle(box, outline="white", width=2)
    return panel


def attention_maps(attn, x, token):
    """Attention of one token of x (1, H, W, C) to all, mean of the heads: [(N,), ...] per ratio."""
    tokens = x.flatten(1, 2)                                                # (1, N, C)
    q = attn.q(tokens)[0, token].view(attn.heads, 1, -1)                    # (h, 1, d)
    counts = attn.cluster_counts(tokens.shape[1])
    indices = iter(cluster_tokens(tokens, attn.neighbours, counts) if counts else ())
    scores = iter([to_score(tokens)[0, :, 0] for to_score in attn.reduce])  # (N,) each
    maps = []
    for ratio, reduced, to_kv in zip(attn.ratios, attn.reduced_tokens(x), attn.kv):
        kv = to_kv(reduced)[0].unflatten(1, (2, attn.heads, -1))            # (M, 2, h, d)
        logits = q @ kv[:, 0].permute(1, 2, 0) * q.shape[-1] ** -0.5        # (h, 1, M)
        attention = logits.softmax(2).mean((0, 1))                          # (M,)
        if ratio > 1:
            attention = token_attention(attention, next(scores), next(indices)[0])
        maps.append(attention)
    return maps


@torch.no_grad()
def draw_attention(model, image, position):
    """The image beside one token's attention in each stage's last block, one panel per ratio.

    Args: position, of the token: fractions of width and height, from the top left corner.
    """
    attns = [stage[-1].attn for stage in model.stages]
    panels = [("image", image)]
    for i, (attn, x) in enumerate(zip(attns, layer_inputs(model, attns, image)), 1):
        if attn.aggregation != "cluster":
            continue
        _, H, W, _ = x.shape
        column = int(position[0] * W)
        row = int(position[1] * H)
        maps = attention_maps(attn, x, row * W + column)
        for ratio, weights in zip(attn.ratios, maps):
            panel = attention_panel(weights.view(H, W), image, row, column)
            panels.append((f"stage {i}, ratio {ratio}: attention of a token", panel))
    return tile(panels)


@torch.no_grad()
def draw_clusters(model, image):
    """The image beside the clusters in each stage's last block, one panel per ratio."""
    attns = [stage[-1].attn for stage in model.stages]
    panels = [("image", image)]
    for i, x in enumerate(layer_inputs(model, attns, image)):
        _, H, W, _ = x.shape
        counts = attns[i].cluster_counts(H * W)
        if attns[i].aggregation != "cluster" or not counts:
            continue
        indices = cluster_tokens(x.flatten(1, 2), attns[i].neighbours, counts)     # (L, 1, N)
        for count, index in zip(counts, indices):
            pixels = palette(count)[index.view(H, W).numpy()]               # (H, W, 3)
            panel = Image.fromarray(pixels).resize(image.size, Image.Resampling.NEAREST)
            panels.append((f"stage {i + 1}: {count} clusters", panel))
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
    parser = argparse.ArgumentParser(description="Plot ClusTR's clusters on an image.")
    parser.add_argument("image", nargs="?", help="any image file (default: a built-in landscape)")
    parser.add_argument("-o", "--output", default="clustr.png", help="file to write")
    parser.add_argument("--model", default="clustr_t", choices=sorted(VARIANTS))
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
