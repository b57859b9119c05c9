"""STViT: Vision Transformer with Super Token Sampling
Huaibo Huang, Xiaoqiang Zhou, Jie Cao, Ran He, Tieniu Tan; CVPR 2023, arXiv 2211.11167

Mechanism: pool the tokens into super tokens the way superpixels are grown (soft association of every token with the
3x3 cells around it), attend among the few super tokens, and map the result back with the same association.

Letters: B batch, C channels, H x W the token grid, N = H * W tokens, h heads, d = C / h head width; grid (gh, gw) the size of
a cell in tokens, H' x W' the cell grid, M = H' * W' super tokens, P = gh * gw tokens a cell.
Reading order: GatherNeighbours, FoldNeighbours -> sample_super_tokens, upsample_super_tokens -> SuperTokenAttention -> Block ->
STViT -> stvit_s. The main model ends there; behind it come the layers of its ablations, drawing and `main`.
Memory order: every map inside a stage is channels-last, (B, H, W, C), so that linear layers, norms and convolutions share it.

Where the paper's text is silent, this follows the released code:
- a neighbour cell outside the map is a zero vector: it takes its share of the softmax, and that share is dropped;
- associations carry no gradient, aggregation does; sides that the grid does not divide are zero-padded right and bottom;
- SuperTokenAttention sits behind LayerNorm, ConvFFN behind BatchNorm; layer scale 1e-6 in stages 3 and 4 of STViT-B and -L;
- the rows of `qkv` are head-major: each head's q, k and v rows adjacent.
Our choice in the ablations, where the text is silent (the sizes of Tables 6 and 9 follow from it): patches keep the 3x3 merging
between stages, norms stay BatchNorm, tables of positions start at N(0, 0.02), belong to 224 x 224 and are resized bilinearly.
Printed figures that they do not meet: APE has those of "+ conv stem" (here 25.43 M, 4.29 G), grids 4, 2, 1, 1 have 4.15 G (4.11),
and 25.4 M (25.50) and Table 9's 4.3 G (4.353) are truncated; all others come out, counted as tests/test_stvit.py says.
Against the released code: layer-scale vectors are exempt from weight decay in train_imagenet.py (there they are 4-D and decayed).
Faster than the paper's own form (its appendix E names fold and unfold by one-hot convolutions as the bottleneck): neighbours
are a strided view, folding is nine shifted adds, each is the other's gradient, and the association keeps the nine last but one.
"""
import argparse
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

VARIANTS = {  # Table 8
    "stvit_s": dict(depths=(3, 5, 9, 3), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
    "stvit_b": dict(depths=(4, 6, 14, 6), dims=(96, 192, 384, 512), heads=(2, 3, 6, 8), layer_scale=(None, None, 1e-6, 1e-6)),
    "stvit_l": dict(depths=(4, 7, 19, 8), dims=(96, 192, 448, 640), heads=(2, 3, 7, 10), layer_scale=(None, None, 1e-6, 1e-6)),
}


# ---------------------------------------------------------------------------------------------------------------- core
def gather_neighbours(cells):
    """(B, H', W', C) -> (B, H', W', 9, C): the 3x3 cells around each cell, row by row, zeros outside the map."""
    windows = F.pad(cells, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)          # (B, H', W', C, 3, 3), a view
    return windows.flatten(4).transpose(3, 4).contiguous()


def fold_neighbours(parts):
    """(B, H', W', 9, C) -> (B, H', W', C): adds what each cell holds for its neighbours to those; the adjoint of gathering."""
    B, H, W, _, C = parts.shape
    total = parts.new_zeros(B, H + 2, W + 2, C)
    for i in range(9):
        total[:, i // 3:i // 3 + H, i % 3:i % 3 + W] += parts[:, :, :, i]
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


def split_cells(x, grid):
    """(B, C, H, W) -> tokens by cell (B, H', W', P, C), zero-padded right and bottom to whole cells."""
    (gh, gw), (H, W) = grid, x.shape[2:]
    x = x.permute(0, 2, 3, 1)
    if H % gh or W % gw:
        x = F.pad(x, (0, 0, 0, -W % gw, 0, -H % gh))                                    # (B, H'*gh, W'*gw, C)
    return x.unflatten(2, (-1, gw)).unflatten(1, (-1, gh)).transpose(2, 3).flatten(3, 4)


def sample_super_tokens(x, grid, iterations=1):
    """Super token sampling (paper, sec. 3.2.1, Eq. 5 and 6).

    Args: x (B, C, H, W), tokens; grid (gh, gw), tokens a cell; iterations, 0 keeps the averages of the cells.
    Returns: super tokens (B, C, ceil(H / gh), ceil(W / gw)) and the association (B, H'*W', gh*gw, 9) of the tokens of each
    cell with the 3x3 cells around it (None without iterations). Softmax runs in float32 at least.
    """
    tokens = split_cells(x, grid)                                                       # (B, H', W', P, C)
    B, H, W, P, C = tokens.shape
    supers = tokens.mean(3)                                                             # (B, H', W', C)
    wide = torch.promote_types(x.dtype, torch.float32)
    association = None
    for step in range(iterations):
        with torch.no_grad():
            around = gather_neighbours(supers)                                          # (B, H', W', 9, C)
            logits = around @ tokens.mT * C ** -0.5                                     # (B, H', W', 9, P), Eq. 5
            weights = logits.to(wide).softmax(3)
            share = fold_neighbours(weights.sum(4, keepdim=True))                       # (B, H', W', 1), sum over tokens
            association = weights.to(tokens.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step == iterations - 1):
            gathered = FoldNeighbours.apply(association @ tokens)                       # (B, H', W', C)
            supers = (gathered / (share + 1e-12)).to(gathered.dtype)                    # Eq. 6
    if association is not None:
        association = association.mT.flatten(1, 2)                                      # (B, M, P, 9)
    return supers.permute(0, 3, 1, 2), association


def upsample_super_tokens(supers, association, grid, size):
    """Token up-sampling (paper, sec. 3.2.3, Eq. 11).

    Args: supers (B, C, H', W'); association (B, H'*W', gh*gw, 9) or None; grid (gh, gw); size (H, W) of the token map.
    Returns: (B, C, H, W), each token the association-weighted sum of the 3x3 super tokens around it, those outside the map
    being zero; without an association, plain bilinear interpolation (iterations = 0, paper Table 7).
    """
    (gh, gw), (H, W) = grid, supers.shape[2:]
    if association is None:
        x = F.interpolate(supers, scale_factor=(gh, gw), mode="bilinear")
    else:
        around = GatherNeighbours.apply(supers.permute(0, 2, 3, 1)).flatten(1, 2)       # (B, M, 9, C)
        x = association @ around                                                        # (B, M, P, C)
        x = x.unflatten(2, (gh, gw)).unflatten(1, (H, W)).transpose(2, 3)               # (B, H', gh, W', gw, C)
        x = x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return x[:, :, :size[0], :size[1]]


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


class SuperTokenAttention(nn.Module):
    """Sample super tokens, attend among them, map back (paper, sec. 3.2): (B, H, W, C) -> the same. Grid (1, 1) is plain attention.

    `bias_side`: side of the learned RelativePositionBias among the super tokens (Table 6), None without one.
    Raises: ValueError if `dim` does not split into `heads`.
    """

    def __init__(self, dim, heads, grid, iterations=1, bias_side=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        self.heads, self.grid, self.iterations = heads, tuple(grid), iterations
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = RelativePositionBias(heads, bias_side) if bias_side else None

    def attend(self, x):
        """Multi-head self-attention over all positions of x (B, H, W, C), Eq. 9 and 10."""
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (self.heads, 3, -1))               # (B, N, h, 3, d)
        bias = None if self.bias is None else self.bias(*x.shape[1:3])                  # (1, h, N, N)
        y = F.scaled_dot_product_attention(*qkv.permute(3, 0, 2, 1, 4), attn_mask=bias)     # (B, h, N, d)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def forward(self, x):
        if self.grid == (1, 1):
            return self.attend(x)
        tokens = x.permute(0, 3, 1, 2)
        supers, association = sample_super_tokens(tokens, self.grid, self.iterations)
        supers = self.attend(supers.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return upsample_super_tokens(supers, association, self.grid, tokens.shape[2:]).permute(0, 2, 3, 1)


class ConvFFN(nn.Module):
    """Linear, GELU, residual 3x3 depth-wise convolution, linear; for Table 6 without the `shortcut` or the whole `conv`."""

    def __init__(self, dim, ratio, conv, shortcut):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.conv = DepthwiseConv(ratio * dim, 3) if conv else None
        self.shortcut = shortcut
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        if self.conv is not None:
            x = x + self.conv(x) if self.shortcut else self.conv(x)
        return self.fc2(x)


class Block(nn.Module):
    """Eq. 1 to 3: convolutional position embedding, super token attention, ConvFFN, each with a shortcut; (B, H, W, C) -> the same."""

    def __init__(self, dim, heads, grid, iterations, drop_path, layer_scale, cpe, bias_side, conv_ffn, ffn_shortcut):
        super().__init__()
        self.cpe = DepthwiseConv(dim, 3) if cpe else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SuperTokenAttention(dim, heads, grid, iterations, bias_side)
        self.norm2 = nn.BatchNorm2d(dim)
        self.ffn = ConvFFN(dim, ratio=4, conv=conv_ffn, shortcut=ffn_shortcut)
        self.scale1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.scale2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        if self.cpe is not None:
            x = x + self.cpe(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        y = self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.scale2(self.ffn(y)))


# --------------------------------------------------------------------------------------------------------------- model
class STViT(nn.Module):
    """Four stages of super token blocks at strides 4, 8, 16 and 32 (paper, Fig. 3 and Table 8).

    Args:
        num_classes: width of the classifier.
        drop_path_rate: stochastic depth of the last block; the first block's rate is 0, linear between.
        depths, dims, heads, grids, layer_scale: one entry a stage; a grid is the side of a cell in tokens. Table 9's models have
            depths (2, 2, 6, 2), dims (96, 192, 384, 768) and heads (3, 6, 12, 24).
        iterations: sampling steps; 0 for averages of the cells and bilinear up-sampling (Table 7).
        stem: "conv", or "patch" for 4 x 4 patches without overlap (Tables 6, 7 and 9).
        projection: False for a classifier on the last map's BatchNorm (Tables 6, 7 and 9).
        position: "cpe"; "ape", a learned map after the stem; "rpe", a learned bias in every attention; or None (Tables 6 and 9).
        conv_ffn, ffn_shortcut: False for an FFN without its convolution, or without the shortcut around that (Table 6).
    `channels` holds the four map widths. Weights start as the released code's do: torch's defaults, classifier N(0, 0.02).
    Raises: ValueError for values outside these.
    """

    def __init__(self, *, num_classes, drop_path_rate, depths, dims, heads, grids=(8, 4, 1, 1), iterations=1,
                 layer_scale=(None, None, None, None), stem="conv", projection=True, position="cpe", conv_ffn=True, ffn_shortcut=True):
        super().__init__()
        if len(grids) != 4 or min(grids) < 1 or iterations < 0:
            raise ValueError(f"grids = {grids}, iterations = {iterations}, expected four grids of at least 1 and iterations of at least 0")
        if stem not in ("conv", "patch"):
            raise ValueError(f"stem = {stem!r}, expected 'conv' or 'patch'")
        if position not in ("cpe", "ape", "rpe", None):
            raise ValueError(f"position = {position!r}, expected 'cpe', 'ape', 'rpe' or None")
        if not conv_ffn and not ffn_shortcut:
            raise ValueError("ffn_shortcut = False, expected True where conv_ffn = False leaves nothing to go around")
        self.channels = tuple(dims)
        half, layers = dims[0] // 2, []
        for in_dim, out_dim, stride in ((3, half, 2), (half, half, 1), (half, dims[0], 2), (dims[0], dims[0], 1)):
            layers += [nn.Conv2d(in_dim, out_dim, 3, stride, padding=1), nn.GELU(), nn.BatchNorm2d(out_dim)]
        self.stem = nn.Sequential(*layers) if stem == "conv" else PatchEmbedding(dims[0])
        self.position = PositionTable(dims[0], 56) if position == "ape" else nn.Identity()
        sides = [-(-56 // 2 ** i // grids[i]) if position == "rpe" else None for i in range(4)]     # super tokens at 224 x 224
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dims[i], heads[i], (grids[i], grids[i]), iterations, drop_path=next(rates), layer_scale=layer_scale[i],
                                  cpe=position == "cpe", bias_side=sides[i], conv_ffn=conv_ffn, ffn_shortcut=ffn_shortcut)
                            for _ in range(depths[i])))
            for i in range(4))
        self.downsamples = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dims[i], dims[i + 1], 3, stride=2, padding=1), nn.BatchNorm2d(dims[i + 1])) for i in range(3))
        self.proj = nn.Sequential(nn.Conv2d(dims[3], 1024, 1), nn.BatchNorm2d(1024), nn.SiLU()) if projection else nn.BatchNorm2d(dims[3])
        self.head = nn.Linear(1024 if projection else dims[3], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, images):
        """(B, 3, H, W) -> four maps (B, C_i, ceil(H / s), ceil(W / s)) at strides s = 4, 8, 16, 32, channels-last in memory.

        Raises: ValueError unless images are (B, 3, H, W) with both sides at least 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (B, 3, H, W) with H and W at least 32")
        x = self.position(self.stem(images.contiguous(memory_format=torch.channels_last)))
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
        """Rename and reshape the tensors of the authors' STViT checkpoint to this file's; returns a new dict.

        The fold and unfold kernels in it are constants and dropped. The first release added a stored 3x3 "shortcut" kernel instead
        of the identity to both residual depth-wise convolutions: then our identity is taken off the centre tap, theirs put on.
        """
        names = ((r"^patch_embed\.proj", "stem"), (r"^layers\.(\d)\.blocks", r"stages.\1"), (r"^proj", "proj.0"), (r"^norm", "proj.1"),
                 (r"^layers\.(\d)\.downsample\.proj", r"downsamples.\1"), (r"norm1\.norm", "norm1"),
                 (r"attn\.stoken_refine", "attn"), (r"mlp2\.conv\.conv", "ffn.conv"), (r"mlp2", "ffn"),
                 (r"pos_embed\.conv", "cpe"), (r"gamma_([12])", r"scale\1.weight"))
        ours, converted = self.state_dict(), {}
        for key, value in state_dict.items():
            if key.endswith(("fold.weights", "shortcut")):
                continue
            if key.endswith("conv.weight") and (shortcut := state_dict.get(key.removesuffix("conv.weight") + "shortcut")) is not None:
                value = value + shortcut
                value[:, :, 1, 1] -= 1
            for pattern, new in names:
                key = re.sub(pattern, new, key)
            if key in ours and value.squeeze().shape == ours[key].squeeze().shape:
                value = value.reshape(ours[key].shape)  # 1x1 convolutions are linear layers here
            converted[key] = value
        return converted

    def load_released(self, state_dict):
        """Load the authors' STViT checkpoint (its "model" entry) strictly."""
        self.load_state_dict(self.convert_released(state_dict))


def stvit_s(num_classes=1000, drop_path_rate=0.1, **overrides):
    """STViT-S, 25.50 M parameters."""
    return STViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["stvit_s"], **overrides})


def stvit_b(num_classes=1000, drop_path_rate=0.4, **overrides):
    """STViT-B, 51.69 M parameters."""
    return STViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["stvit_b"], **overrides})


def stvit_l(num_classes=1000, drop_path_rate=0.6, **overrides):
    """STViT-L, 94.97 M parameters."""
    return STViT(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["stvit_l"], **overrides})


# ----------------------------------------------------------------------------------- ablations; the main model ends above
class PatchEmbedding(nn.Module):
    """4 x 4 patches without overlap, BatchNorm; (B, 3, H, W), zero-padded right and bottom -> (B, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, images):
        return self.norm(self.conv(F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))))


class PositionTable(nn.Module):
    """Adds a learned vector a place, for maps of side x side, interpolated for others (Table 6, APE); (B, C, H, W) -> the same."""

    def __init__(self, dim, side):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim, side, side))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x):
        return x + F.interpolate(self.weight, size=x.shape[2:], mode="bilinear")


class RelativePositionBias(nn.Module):
    """A learned bias a head for each offset between two places of a side x side map (Table 6, RPE; Swin): H, W -> (1, h, N, N), N = H * W.

    For other maps the table of offsets is interpolated to theirs; offset 0 stays in its middle. The N x N biases are held in memory.
    """

    def __init__(self, heads, side):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, heads, 2 * side - 1, 2 * side - 1))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, H, W):
        table = F.interpolate(self.weight, size=(2 * H - 1, 2 * W - 1), mode="bilinear")
        row, column = (torch.arange(length, device=table.device) for length in (H, W))
        rows, columns = row[:, None] - row + H - 1, column[:, None] - column + W - 1    # query minus key, from 0
        return table[:, :, rows[:, None, :, None], columns[:, None]].flatten(4).flatten(2, 3)


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
    model = factory(num_classes=classes)
    try:
        (model.load_released if released else model.load_state_dict)(state)
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
def draw_super_tokens(model, picture):
    """The picture beside its tessellation in the last block of each stage that samples super tokens.

    A token belongs to the super token on the map that it is associated with most; super tokens show their mean colour and outline.
    """
    seen = {}
    hooks = [stage[-1].attn.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})) for stage in model.stages]
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    model.forward_features((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    panels = [("image", picture)]
    for i, (attn, x) in enumerate(seen.items()):
        hooks[i].remove()
        if attn.grid == (1, 1) or attn.iterations == 0:
            continue
        _, H, W, _ = x.shape
        supers, association = sample_super_tokens(x.permute(0, 3, 1, 2), attn.grid, attn.iterations)
        (gh, gw), (rows, columns) = attn.grid, supers.shape[2:]
        number = torch.arange(1.0, rows * columns + 1).view(1, rows, columns, 1)        # 1, 2, ...; 0 means off the map
        around = gather_neighbours(number).view(rows * columns, 1, 9).expand(association.shape[1:])     # (M, P, 9)
        best = (association[0] * (around > 0)).argmax(-1, keepdim=True)
        owner = around.gather(-1, best).view(rows, columns, gh, gw).transpose(1, 2).flatten(2).flatten(0, 1)[:H, :W]
        owner = Image.fromarray(owner.numpy().astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST)
        owner, pixels = np.array(owner), np.array(picture)
        count = np.maximum(np.bincount(owner.ravel()), 1)
        mean = np.stack([np.bincount(owner.ravel(), pixels[..., c].ravel()) / count for c in range(3)], -1)
        drawn = mean[owner].astype(np.uint8)
        edge = np.zeros(owner.shape, bool)
        edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
        edge[1:] |= owner[1:] != owner[:-1]
        drawn[edge] = (255, 255, 0)
        panels.append((f"stage {i + 1}: {rows * columns} super tokens", Image.fromarray(drawn)))
    return tile(panels)


def main():
    """Command line: read a picture, draw what the mechanism does to it, write a PNG."""
    parser = argparse.ArgumentParser(description="Draw STViT's super-token tessellation of a picture, stage by stage.")
    parser.add_argument("picture", nargs="?", help="any file Pillow reads; without it a picture drawn here")
    parser.add_argument("-o", "--output", default="stvit.png", help="where to write the drawing")
    parser.add_argument("--model", default="stvit_s", choices=sorted(VARIANTS))
    parser.add_argument("--weights", help="trained weights; without them the model is random and so are its super tokens")
    args = parser.parse_args()
    torch.manual_seed(0)
    factory, reading = globals()[args.model], args.picture
    try:
        picture = load_picture(args.picture) if args.picture else example_picture()
        reading = args.weights
        model = load_weights(factory, args.weights) if args.weights else factory().eval()
        reading = args.output
        draw_super_tokens(model, picture).save(args.output)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow on broken files
        parser.exit(2, f"{reading}: {' '.join(str(error).split())}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
