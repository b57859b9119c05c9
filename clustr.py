"""ClusTR: Exploring Efficient Self-attention via Clustering for Vision Transformers
Yutong Xie, Jianpeng Zhang, Yong Xia, Anton van den Hengel, Qi Wu; arXiv 2208.13138

Mechanism: find density peaks among the tokens, give every other token to the cluster of its nearest denser token, melt each
cluster into one token, and let all tokens attend to these few keys and values, at several numbers of clusters at once.

Letters: B batch, C channels, H x W the token grid, N = H * W tokens, h heads, d = C / h head width; L reduction ratios a layer,
M = ceil(N / ratio) clusters, k neighbours that make a density.
Reading order: density_peaks -> assign_clusters -> aggregate -> ClusteringGuidedAttention -> Block -> ClusTR; drawing and `main`
come last.
Memory order: every map inside a stage is channels-last, (B, H, W, C), so that linear layers, norms and convolutions share it.

What differs from the paper's text, and why:
- Distances are divided by sqrt(C), as in TCFormer's code, the closest public one. Squared distances of LayerNorm-ed tokens are about
  2 C, and exp(-x) is 0 in float32 beyond x = 103: undivided densities (Eq. 1) all underflow. For the same reason densities and
  decision values stay logarithms here.
- A token is one of its own k neighbours, as in TCFormer's code; equally dense tokens are ordered by their index.
- Tokens follow their chain of nearest denser tokens, as the text says; TCFormer's code sends them to the nearest centre.
Where the text is silent:
- An FFN with a 3x3 depth-wise convolution before its GELU and expansions 8, 8, 4, 4, and K and V of their own for each ratio make
  the sizes of Table 2 come out (11.68/22.69/40.25 M). Ratio 1 keeps the tokens as they are and has no score.
- Tokens are aggregated, then projected to K and V: the same as the other way round, since the weights of a cluster sum to one.
- Our choice is PVTv2's: 7x7/4 and 3x3/2 patch embeddings with LayerNorm, LayerNorm after each stage, initial weights. Also ours:
  stochastic depth 0.1/0.2/0.3, and the half of the keys that `aggregation="knn"` keeps.
"""
import argparse
import colorsys
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

VARIANTS = {  # Table 1
    "clustr_t": dict(depths=(1, 2, 6, 1), dims=(64, 128, 256, 512), heads=(1, 2, 4, 8)),
    "clustr_s": dict(depths=(3, 5, 13, 2), dims=(64, 128, 256, 512), heads=(1, 2, 4, 8)),
    "clustr_b": dict(depths=(3, 5, 18, 3), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
}


# ---------------------------------------------------------------------------------------------------------------- core
def smallest(rows, k, group):
    """The k smallest values of each row of rows (B, R, N), in any order; `group` divides N.

    They lie in the k groups of columns with the smallest minima, so the slow selection sees N / group values only.
    """
    groups = rows.unflatten(2, (group, -1))                                             # (B, R, group, N / group)
    best = groups.amin(2).topk(min(k, groups.shape[3]), largest=False, sorted=False).indices
    candidates = groups.gather(3, best[:, :, None].expand(-1, -1, group, -1))
    return candidates.flatten(2).topk(k, largest=False, sorted=False).values


def squared_distance(without, norm):
    """d^2 = `without` + norm, where what is within the rounding of the norm counts as 0: a copy of a token has distance 0."""
    squared = without + norm
    return squared.masked_fill(squared < 2 * torch.finfo(squared.dtype).eps * norm, 0)


@torch.no_grad()
def density_peaks(x, k=5, chunk=160):
    """k-nearest-neighbour density peaks over all tokens (paper, Eq. 1 and 2; Rodriguez and Laio, Science 2014).

    Args: x (B, N, C), tokens; k, neighbours that make a density, the token itself among them; chunk, rows of distances at a time.
    Returns, without gradient, of type float32 at least (products that TF32 rounds move a few tokens to another cluster):
        log_density (B, N), minus the mean squared distance to the k nearest tokens (all N if there are fewer than k);
        delta (B, N), the distance to the nearest denser token, for the densest token the largest distance from it;
        parent (B, N), that token; the denser one of several equally near, the densest token itself for the densest.
    Raises: ValueError for k or chunk below 1.
    Denser is a strict order, by density, then by smaller index. Distances are Euclidean over sqrt(C). Two passes over chunks of rows:
    memory O(B * chunk * N). The second pass takes the tokens in order of density, so that the denser tokens are the columns before
    one's own: half the distances, and no mask but in the diagonal block.
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"k = {k}, chunk = {chunk}, expected at least 1")
    (B, N, C), group, wide = x.shape, 32, torch.promote_types(x.dtype, torch.float32)
    chunk = min(chunk, N)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(wide)
        x = (x - x.mean(1, keepdim=True)) * C ** -0.5       # distances are what they were, their rounding errors smaller
        norm = x.square().sum(2)                                                        # (B, N); d^2 = norm_i + norm_j - 2 x_i . x_j
        columns = F.pad(x, (0, 0, 0, -N % group)).mT                                    # whole groups for `smallest`
        column_norm = F.pad(norm, (0, -N % group), value=torch.inf)[:, None]
        nearest = []
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            squared = torch.baddbmm(column_norm, x[:, rows], columns, alpha=-2)         # (B, R, N) but for norm_i
            squared.diagonal(start, 1, 2).copy_(-norm[:, rows])                         # no rounding between a token and itself
            nearest.append(smallest(squared, min(k, N), group))
        log_density = -squared_distance(torch.cat(nearest, 1), norm[..., None]).mean(2)                     # Eq. 1

        order = log_density.sort(descending=True, stable=True).indices                  # (B, N), densest first
        flat = (order + N * torch.arange(B, device=x.device)[:, None]).flatten()
        x, norm = x.flatten(0, 1).index_select(0, flat).view_as(x), norm.flatten().index_select(0, flat).view_as(norm)
        denser = torch.full((chunk, chunk), torch.inf, dtype=wide, device=x.device).triu()
        delta, place = [], []
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            squared = torch.baddbmm(norm[:, None, :rows.stop], x[:, rows], x[:, :rows.stop].mT, alpha=-2)
            squared[:, :, rows] += denser[:rows.stop - start, :rows.stop - start]
            least = squared.min(2)                                                      # the first one of equals
            delta.append(least.values)
            place.append(least.indices)
        delta, place = torch.cat(delta, 1), torch.cat(place, 1)
        delta[:, 0] = torch.baddbmm(norm[:, None], x[:, :1], x.mT, alpha=-2).amax((1, 2))
        place[:, 0] = 0
        delta = squared_distance(delta, norm).sqrt()                                    # Eq. 2
    parent = torch.empty_like(order).scatter_(1, order, order.gather(1, place))
    return log_density, torch.empty_like(delta).scatter_(1, order, delta), parent


def assign_clusters(log_density, delta, parent, clusters):
    """Cut the tree of nearest denser tokens at the density peaks (paper, sec. 3.1).

    Args: what `density_peaks` returns, each (B, N); clusters, 1 to N.
    Returns: (B, N), each token's cluster in [0, clusters). Centres are the tokens of largest gamma = density * delta, always the
    densest; all others follow their parents to a centre. Cluster 0 has the densest token, the others fall by gamma.
    Raises: ValueError for a number of clusters outside 1 to N.
    """
    B, N = parent.shape
    if not 1 <= clusters <= N:
        raise ValueError(f"clusters = {clusters}, expected 1 to {N}, the number of tokens")
    own = torch.arange(N, device=parent.device).expand(B, N)
    gamma = (log_density + delta.log()).masked_fill(parent == own, torch.inf)           # only the densest is its own parent
    centres = gamma.sort(descending=True, stable=True).indices[:, :clusters]            # (B, M)
    pointer = parent.scatter(1, centres, centres)
    for _ in range((N - 1).bit_length()):                                               # a chain has at most N - 1 links,
        pointer = pointer.gather(1, pointer)                                            # each gather doubles those followed
    label = torch.zeros_like(parent).scatter_(1, centres, own[:, :clusters])            # else read only where there is NaN
    return label.gather(1, pointer)


@torch.library.custom_op("clustr::cluster_tokens", mutates_args=())
def cluster_tokens(x: torch.Tensor, k: int, clusters: Sequence[int]) -> torch.Tensor:
    """`density_peaks` once, then `assign_clusters` for each number of clusters: (B, N, C) -> (L, B, N).

    A single operator to torch.compile and torch.export: how many chunks and gathers a picture takes stays out of their graphs.
    """
    peaks = density_peaks(x, k)
    return torch.stack([assign_clusters(*peaks, count) for count in clusters])


@cluster_tokens.register_fake
def _(x, _k, clusters):  # what torch.compile knows of it: shape and type
    return x.new_empty((len(clusters), x.shape[0], x.shape[1]), dtype=torch.int64)


def aggregate(x, score, index, clusters):
    """One token a cluster: the sum of its tokens weighted by the softmax of their scores within the cluster (paper, Eq. 3).

    Args: x (B, N, C), tokens; score (B, N), learned; index (B, N), clusters from `assign_clusters`; clusters M, none of them empty.
    Returns: (B, M, C) in x's type, summed in float32 at least. Deterministic under torch.use_deterministic_algorithms(True).
    """
    B, N, C = x.shape
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    largest = score.detach().new_full((B, clusters), -torch.inf).scatter_reduce(1, index, score.detach(), "amax")
    weight = (score - largest.gather(1, index)).exp()[..., None]                        # (B, N, 1), at most 1
    weighted = torch.cat([x * weight, weight], 2).flatten(0, 1)                         # (B*N, C+1)
    rows = (index + clusters * torch.arange(B, device=x.device)[:, None]).flatten()
    total = weighted.new_zeros(B * clusters, C + 1).index_add(0, rows, weighted).view(B, clusters, C + 1)
    return (total[..., :C] / total[..., C:]).to(x.dtype)


def nearest_keys_attention(q, k, v, keep):
    """k-NN attention (paper, Table 8; arXiv 2106.00515): each query sees the `keep` keys that it likes best, and what ties with them.

    Args: q (B, h, N, d); k, v (B, h, M, d); keep, 1 to M. Returns: (B, h, N, d). Holds the N x M map, which top-k needs.
    """
    logits = q @ k.mT * q.shape[-1] ** -0.5
    weakest = logits.topk(keep).values[..., -1:]
    return logits.masked_fill(logits < weakest, -torch.inf).softmax(-1) @ v


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


class GridReduction(nn.Module):
    """Spatial reduction (paper, Table 7; PVT): a convolution over cells of `ratio` tokens, LayerNorm; (B, H, W, C) -> (B, M, C).

    Maps are zero-padded right and bottom to whole cells. Raises: ValueError for a ratio that is no square.
    """

    def __init__(self, dim, ratio):
        super().__init__()
        self.side = math.isqrt(ratio)
        if self.side ** 2 != ratio:
            raise ValueError(f"ratio = {ratio}, a grid needs the square of a cell's side")
        self.conv = nn.Conv2d(dim, dim, self.side, stride=self.side)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        _, H, W, _ = x.shape
        x = F.pad(x.permute(0, 3, 1, 2), (0, -W % self.side, 0, -H % self.side))
        return self.norm(self.conv(x).flatten(2).mT)


class ClusteringGuidedAttention(nn.Module):
    """Multi-scale clustering-guided attention (paper, Eq. 5 to 8): (B, H, W, C) -> the same.

    `ratios` are the token reductions, each with a score, K and V of its own; one clustering serves them all. `aggregation` is
    "cluster", or for Tables 7 and 8 "grid" (spatial reduction) or "knn" (the same, then k-NN attention to half of the keys).
    Raises: ValueError for heads that do not divide `dim`, ratios or k below 1, another aggregation.
    """

    def __init__(self, dim, heads, ratios, k=5, aggregation="cluster"):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        if not ratios or min(*ratios, k) < 1:
            raise ValueError(f"ratios = {ratios}, k = {k}, expected one or more ratios, all at least 1")
        if aggregation not in ("cluster", "grid", "knn"):
            raise ValueError(f"aggregation = {aggregation!r}, expected 'cluster', 'grid' or 'knn'")
        self.heads, self.ratios, self.k, self.aggregation = heads, tuple(ratios), k, aggregation
        self.q = nn.Linear(dim, dim)
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in ratios)
        reduced = [ratio for ratio in ratios if ratio > 1]
        self.reduce = nn.ModuleList(nn.Linear(dim, 1) if aggregation == "cluster" else GridReduction(dim, ratio) for ratio in reduced)
        self.proj = nn.Linear(dim, dim)

    def cluster_counts(self, tokens):
        """ceil(N / ratio) for each ratio that clusters."""
        return [-(-tokens // ratio) for ratio in self.ratios if ratio > 1]

    def representatives(self, x):
        """The tokens that keys and values are made of, for each ratio: (B, H, W, C) -> [(B, M, C), ...]."""
        tokens = x.flatten(1, 2)
        if self.aggregation != "cluster":
            reduced = [layer(x) for layer in self.reduce]
        elif self.reduce:
            counts = self.cluster_counts(tokens.shape[1])
            indices = cluster_tokens(tokens.detach(), self.k, counts)
            scores = [score(tokens).squeeze(2) for score in self.reduce]
            reduced = [aggregate(tokens, *each) for each in zip(scores, indices, counts)]
        else:
            reduced = []
        reduced = iter(reduced)
        return [next(reduced) if ratio > 1 else tokens for ratio in self.ratios]

    def forward(self, x):
        q = self.q(x).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)      # (B, h, N, d)
        y = 0
        for few, project in zip(self.representatives(x), self.kv):
            k, v = project(few).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)                    # (B, h, M, d) each
            if self.aggregation == "knn":
                y = y + nearest_keys_attention(q, k, v, -(-k.shape[2] // 2))
            else:
                y = y + F.scaled_dot_product_attention(q, k, v)                         # Eq. 5
        return self.proj(y.transpose(1, 2).reshape(x.shape))                            # Eq. 8


class ConvFFN(nn.Module):
    """Linear, 3x3 depth-wise convolution, GELU, linear."""

    def __init__(self, dim, ratio):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.conv = DepthwiseConv(ratio * dim, 3)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.conv(self.fc1(x))))


class Block(nn.Module):
    """Eq. 9: clustering-guided attention and FFN, each with LayerNorm before and a shortcut; (B, H, W, C) -> the same."""

    def __init__(self, dim, heads, ratios, k, aggregation, ffn_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClusteringGuidedAttention(dim, heads, ratios, k, aggregation)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim, ffn_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """Overlapping patches: a strided convolution and LayerNorm; (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C')."""

    def __init__(self, in_dim, dim, kernel_size, stride):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def init_weights(module):
    """PVTv2's rule: linear weights N(0, 0.02) truncated, convolutions N(0, sqrt(2 / fan-out)), biases 0, norms as constructed."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)
    elif list(module.parameters(recurse=False)) and not isinstance(module, nn.LayerNorm):
        raise TypeError(f"no initialization rule for {type(module).__name__}")


# --------------------------------------------------------------------------------------------------------------- model
class ClusTR(nn.Module):
    """Four stages of clustering-guided blocks at strides 4, 8, 16 and 32 (paper, Fig. 3 and Table 1).

    Args:
        num_classes: width of the classifier.
        drop_path_rate: stochastic depth of the last block; the first block's rate is 0, linear between.
        depths, dims, heads: one entry a stage.
        ratios: one tuple of token reductions a stage; single-scale (Table 9) is ((64,), (16,), (4,), (1,)).
        k: neighbours that make a token's density.
        aggregation: "cluster", or "grid" or "knn" (Tables 7 and 8).
    `channels` holds the four map widths.
    """

    def __init__(self, *, num_classes, drop_path_rate, depths, dims, heads, ratios=((64, 16), (16, 4), (4, 1), (1,)), k=5,
                 aggregation="cluster"):
        super().__init__()
        self.channels = tuple(dims)
        self.embeds = nn.ModuleList(
            PatchEmbedding(dims[i - 1], dims[i], 3, 2) if i else PatchEmbedding(3, dims[0], 7, 4) for i in range(4))
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dims[i], heads[i], ratios[i], k, aggregation, (8, 8, 4, 4)[i], next(rates)) for _ in range(depths[i])))
            for i in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self.head = nn.Linear(dims[3], num_classes)
        self.apply(init_weights)

    def forward_features(self, images):
        """(B, 3, H, W) -> four maps (B, C_i, ceil(H / s), ceil(W / s)) at strides s = 4, 8, 16, 32, channels-last in memory.

        Raises: ValueError unless images are (B, 3, H, W) with both sides at least 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (B, 3, H, W) with H and W at least 32")
        x = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)    # blocks see (B, H, W, C)
        maps = []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms):
            x = norm(stage(embed(x)))
            maps.append(x.permute(0, 3, 1, 2))
        return tuple(maps)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, num_classes)."""
        return self.head(self.forward_features(images)[-1].mean((2, 3)))


def clustr_t(num_classes=1000, drop_path_rate=0.1, **overrides):
    """ClusTR-T, 11.68 M parameters."""
    return ClusTR(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["clustr_t"], **overrides})


def clustr_s(num_classes=1000, drop_path_rate=0.2, **overrides):
    """ClusTR-S, 22.69 M parameters."""
    return ClusTR(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["clustr_s"], **overrides})


def clustr_b(num_classes=1000, drop_path_rate=0.3, **overrides):
    """ClusTR-B, 40.25 M parameters."""
    return ClusTR(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["clustr_b"], **overrides})


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
    """Build `factory`'s model with a file's weights: train_imagenet.py's checkpoint or a bare state dict.

    Raises: OSError if the file cannot be opened, ValueError if it holds no weights of this model.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("model", state)
            classes = state["head.weight"].shape[0]
        except Exception as error:  # torch.load raises half a dozen types for files that are not its own
            raise ValueError(f"no weights in it ({type(error).__name__})") from None
    model = factory(num_classes=classes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
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
    """The picture beside the clusters in the last block of each stage, at each ratio, one colour a cluster."""
    seen = {}
    hooks = [stage[-1].attn.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})) for stage in model.stages]
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    model.forward_features((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    panels = [("image", picture)]
    for i, (attn, x) in enumerate(seen.items()):
        hooks[i].remove()
        counts = attn.cluster_counts(x.shape[1] * x.shape[2])
        if attn.aggregation != "cluster" or not counts:
            continue
        for count, index in zip(counts, cluster_tokens(x.flatten(1, 2), attn.k, counts)[:, 0]):
            hues = [(j * 0.618034 % 1, 0.45 + 0.55 * (j * 0.414214 % 1), 0.5 + 0.5 * (j * 0.732051 % 1)) for j in range(count)]
            colours = np.array([colorsys.hsv_to_rgb(*hue) for hue in hues])             # irrational steps: no two alike
            drawn = Image.fromarray((255 * colours[index.view(x.shape[1:3]).numpy()]).astype(np.uint8))
            panels.append((f"stage {i + 1}: {count} clusters", drawn.resize(picture.size, Image.Resampling.NEAREST)))
    return tile(panels)


def main():
    """Command line: read a picture, draw what the mechanism does to it, write a PNG."""
    parser = argparse.ArgumentParser(description="Draw ClusTR's clusters of a picture, stage by stage and ratio by ratio.")
    parser.add_argument("picture", nargs="?", help="any file Pillow reads; without it a picture drawn here")
    parser.add_argument("-o", "--output", default="clustr.png", help="where to write the drawing")
    parser.add_argument("--model", default="clustr_t", choices=sorted(VARIANTS))
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
