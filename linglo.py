"""LinGlo: Linear-Complexity Global-Local Interaction (key-only attention)
"Rethinking Query-Key Pairwise Interactions in Vision Transformers", Cheng Li, Yangxin Liu; arXiv 2207.00188

Mechanism: drop the queries. A learned vector tells how salient each key is, the salient keys are summed up to one context a head,
and the context gates the value of every token. Linear in the number of tokens, so that all stages can afford it.

Letters: B batch, C channels, H x W the token grid, N = H * W tokens, h heads, d = C / h head width.
Reading order: key_only_attention -> KeyOnlyAttention -> RPCPE -> Block -> LinGlo; drawing and `main` come last.
Memory order: every map inside a stage is channels-last, (B, H, W, C), so that linear layers, norms and convolutions share it.

What differs from the paper, and why:
- The printed 3.4/13.1/25.4 M are not reached by any reading of the text, and disagree with the paper's own dense tables (they are
  printed by PVTv2 for its models, too). This is the text taken literally: 3.60/13.73/25.14 M deployed, 3.81/14.14/25.97 M in training.
- Each of the four RP-CPE branches has a BatchNorm in training, as in the re-parameterisation method that the paper cites: without it
  they would be one convolution in training already. `reparameterize()` folds branches, norms and skip for deployment. In the
  ablations (Table 6) single branches have it, too.
Where the text is silent:
- K, V, U1 and U2 are C x C with bias, and a head's saliency vector has d entries, so that the scale is 1 / sqrt(d).
- The rest is PVTv2's: LayerNorm before attention and FFN, after patch embeddings and stages, initial weights. Stochastic depth
  0.1/0.1/0.15, and what exactly a convolution block with SE is (Table 5), are our choice.
"""
import argparse
import colorsys
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

VARIANTS = {  # sec. 3.4
    "linglo_b0": dict(depths=(2, 3, 3, 2), dims=(32, 64, 160, 256), heads=(1, 2, 5, 8)),
    "linglo_b1": dict(depths=(2, 3, 3, 2), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
    "linglo_b2": dict(depths=(3, 5, 9, 3), dims=(64, 128, 320, 512), heads=(1, 2, 5, 8)),
}
CPE = {"cpe": (1, False), "r": (1, True), "p": (4, False), "rp": (4, True)}  # Table 6: branches, skip connection


# ---------------------------------------------------------------------------------------------------------------- core
def salience(k, saliency):
    """How salient each token is: k (B, h, N, d), saliency (h, d) -> softmax over the tokens (B, h, N) (paper, Eq. 2).

    For looking at it: `key_only_attention` has the same softmax inside its fused kernel.
    """
    return (k @ saliency[..., None] * k.shape[-1] ** -0.5).squeeze(3).softmax(2)


def key_only_attention(k, v, saliency):
    """Gate every value with the sum of the salient keys (paper, Eq. 2, 3 and the product in Eq. 4).

    Args: k, v (B, h, N, d), keys and values; saliency (h, d), learned.
    Returns: (B, h, N, d) in k's type. Time and memory are linear in N.
    """
    # softmax(s . K / sqrt(d)) K is ordinary attention with s as the only query and the keys as values: a fused kernel does it
    query = saliency.to(k.dtype)[None, :, None].expand(k.shape[0], -1, -1, -1)          # (B, h, 1, d)
    context = F.scaled_dot_product_attention(query, k, k)                               # (B, h, 1, d), Eq. 3
    return context * v


# -------------------------------------------------------------------------------------------------------------- layers
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


class KeyOnlyAttention(nn.Module):
    """Key-only attention with its projections (paper, Fig. 1, Eq. 4): (B, H, W, C) -> the same.

    Raises: ValueError for heads that do not divide `dim`, like DotProductAttention.
    """

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        self.heads = heads
        self.k, self.v, self.u1, self.u2 = (nn.Linear(dim, dim) for _ in range(4))
        self.saliency = nn.Parameter(torch.zeros(heads, dim // heads))

    def split_heads(self, x):
        """(B, H, W, C) -> (B, h, N, d), a view."""
        return x.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        k = self.k(x)
        y = key_only_attention(self.split_heads(k), self.split_heads(self.v(x)), self.saliency)
        return self.u2(self.u1(y.transpose(1, 2).reshape(x.shape)) + k)                 # Eq. 4


class DotProductAttention(nn.Module):
    """Plain multi-head self-attention, which Fig. 4 compares with: (B, H, W, C) -> the same."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim = {dim} does not split into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.heads, -1))               # (B, N, 3, h, d)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))                 # (B, h, N, d)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class RPCPE(nn.Module):
    """Residual parallel conditional position encoding (paper, sec. 3.2): (B, H, W, C) -> the same.

    The input, if `skip`, plus parallel 3x3 depth-wise convolutions, each with BatchNorm. After `reparameterize` one convolution.
    """

    def __init__(self, dim, branches, skip):
        super().__init__()
        self.skip = skip
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.BatchNorm2d(dim)) for _ in range(branches))

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        y = x if self.skip else 0
        for branch in self.branches:
            y = y + branch(x)
        return y.permute(0, 2, 3, 1)

    @torch.no_grad()
    def reparameterize(self):
        """Fold branches, running statistics and skip connection into one convolution with bias; nothing if that is done."""
        if isinstance(self.branches[0], nn.Conv2d):
            return
        first, weight, bias = self.branches[0][0], 0, 0
        for conv, norm in self.branches:
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight = weight + conv.weight * scale[:, None, None, None]
            bias = bias + norm.bias - norm.running_mean * scale
        if self.skip:
            weight[:, :, 1, 1] += 1
        folded = torch.nn.utils.skip_init(nn.Conv2d, len(weight), len(weight), 3, padding=1, groups=len(weight), device=weight.device)
        folded.weight, folded.bias = (nn.Parameter(t, first.weight.requires_grad) for t in (weight, bias))
        self.branches, self.skip = nn.ModuleList([folded]).train(self.training), False


class FFN(nn.Module):
    """Linear, position encoding `cpe` (a key of CPE, or None), GELU, linear."""

    def __init__(self, dim, ratio, cpe):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.cpe = RPCPE(ratio * dim, *CPE[cpe]) if cpe else nn.Identity()
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.cpe(self.fc1(x))))


class Block(nn.Module):
    """Attention and FFN, each with LayerNorm before and a shortcut (paper, Fig. 3b); (B, H, W, C) -> the same."""

    def __init__(self, dim, heads, attention, ffn_ratio, cpe, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = (KeyOnlyAttention if attention == "key-only" else DotProductAttention)(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FFN(dim, ffn_ratio, cpe)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a squeeze-and-excitation gate, with a shortcut (Table 5); (B, H, W, C) -> the same."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.GELU(),
                                   nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim))
        self.gate = nn.Sequential(nn.Linear(dim, dim // 4), nn.GELU(), nn.Linear(dim // 4, dim), nn.Sigmoid())
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.convs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(y * self.gate(y.mean((1, 2), keepdim=True)))


class PatchEmbedding(nn.Module):
    """A strided convolution and LayerNorm; (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C').

    With `kernel_size` = `stride` patches do not overlap; maps are then zero-padded right and bottom to whole patches.
    """

    def __init__(self, in_dim, dim, kernel_size, stride):
        super().__init__()
        self.pad = stride if kernel_size == stride else 1
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2 if kernel_size > stride else 0)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = F.pad(x.permute(0, 3, 1, 2), (0, -x.shape[2] % self.pad, 0, -x.shape[1] % self.pad))
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class PositionTable(nn.Module):
    """Adds a learned vector a place, for maps of side x side, interpolated for others (PVT; Fig. 5); (B, H, W, C) -> the same."""

    def __init__(self, dim, side):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, side, side))

    def forward(self, x):
        return x + F.interpolate(self.weight, size=x.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)


def init_weights(module):
    """PVTv2's rule: linear weights, saliency and position tables N(0, 0.02) truncated, convolutions N(0, sqrt(2 / fan-out)), biases 0,
    norms as constructed."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, (nn.Linear, PositionTable)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, KeyOnlyAttention):
        nn.init.trunc_normal_(module.saliency, std=0.02)
    elif list(module.parameters(recurse=False)) and not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        raise TypeError(f"no initialization rule for {type(module).__name__}")
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------------------- model
class LinGlo(nn.Module):
    """Four stages of key-only blocks at strides 4, 8, 16 and 32 (paper, Fig. 3 and sec. 3.4).

    Args:
        num_classes: width of the classifier.
        drop_path_rate: stochastic depth of the last block; the first block's rate is 0, linear between.
        depths, dims, heads: one entry a stage.
        attention: "key-only", or "dot" for dot-product attention (Fig. 4).
        layout: a letter a stage, H for hybrid blocks, C for convolution blocks with SE (Table 5).
        cpe: "rp", "r", "p" or "cpe", see CPE (Table 6).
        convolutions: False for patches without overlap, no RP-CPE, learned position tables (LinGlo-w/o-C of Fig. 5).
        hierarchical: False for 16 x 16 patches and no other down-sampling (LinGlo-w/o-CH of Fig. 5, which has dims=(150,) * 4 and
            heads=(3,) * 4); the four maps then all have stride 16.
    `channels` holds the four map widths.
    Raises: ValueError for values outside these, for different `dims` without hierarchy, for convolutions without hierarchy.
    """

    def __init__(self, *, num_classes, drop_path_rate, depths, dims, heads, attention="key-only", layout="HHHH", cpe="rp",
                 convolutions=True, hierarchical=True):
        super().__init__()
        if attention not in ("key-only", "dot"):
            raise ValueError(f"attention = {attention!r}, expected 'key-only' or 'dot'")
        if len(layout) != 4 or set(layout) - set("HC"):
            raise ValueError(f"layout = {layout!r}, expected four letters H or C")
        if cpe not in CPE:
            raise ValueError(f"cpe = {cpe!r}, expected one of {', '.join(CPE)}")
        if not hierarchical and (convolutions or len(set(dims)) > 1):
            raise ValueError(f"hierarchical=False needs convolutions=False and equal dims, not {convolutions} and {dims}")
        self.channels = tuple(dims)
        if not hierarchical:
            embeds = [[PatchEmbedding(3, dims[0], 16, 16), PositionTable(dims[0], 14)], [], [], []]
        elif not convolutions:
            embeds = [[PatchEmbedding(dims[i - 1] if i else 3, dims[i], size, size), PositionTable(dims[i], 56 >> i)]
                      for i, size in enumerate((4, 2, 2, 2))]
        else:
            embeds = [[PatchEmbedding(dims[i - 1] if i else 3, dims[i], *size)] for i, size in enumerate(((7, 4), (3, 2), (3, 2), (3, 2)))]
        self.embeds = nn.ModuleList(nn.Sequential(*embed) for embed in embeds)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvBlock(dims[i], next(rates)) if layout[i] == "C" else
                            Block(dims[i], heads[i], attention, (8, 8, 4, 4)[i], cpe if convolutions else None, next(rates))
                            for _ in range(depths[i])))
            for i in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self.head = nn.Linear(dims[3], num_classes)
        self.apply(init_weights)

    def forward_features(self, images):
        """(B, 3, H, W) -> four maps (B, C_i, ceil(H / s), ceil(W / s)) at strides s = 4, 8, 16, 32, channels-last in memory.

        Without hierarchy all strides are 16.

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
        """(B, 3, H, W) -> logits (B, num_classes). In train mode BN needs more than one value a channel: B > 1 at 32 x 32."""
        return self.head(self.forward_features(images)[-1].mean((2, 3)))

    def reparameterize(self):
        """Fold every RP-CPE into one convolution, in place, for deployment: the same outputs in eval mode. Returns the model.

        Parameters are replaced, so optimizers, weight averages and DistributedDataParallel made before do not know them.
        """
        for module in self.modules():
            if isinstance(module, RPCPE):
                module.reparameterize()
        return self


def linglo_b0(num_classes=1000, drop_path_rate=0.1, **overrides):
    """LinGlo-b0, 3.60 M parameters deployed, 3.81 M in training."""
    return LinGlo(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["linglo_b0"], **overrides})


def linglo_b1(num_classes=1000, drop_path_rate=0.1, **overrides):
    """LinGlo-b1, 13.73 M parameters deployed, 14.14 M in training."""
    return LinGlo(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["linglo_b1"], **overrides})


def linglo_b2(num_classes=1000, drop_path_rate=0.15, **overrides):
    """LinGlo-b2, 25.14 M parameters deployed, 25.97 M in training."""
    return LinGlo(num_classes=num_classes, drop_path_rate=drop_path_rate, **{**VARIANTS["linglo_b2"], **overrides})


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
    """Build `factory`'s model with a file's weights: train_imagenet.py's checkpoint or a bare state dict, deployed or not.

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
    if "stages.0.0.ffn.cpe.branches.0.weight" in state:
        model.reparameterize()
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
def draw_saliency(model, picture):
    """The picture beside the saliency (Eq. 2) of every head in the last block of each stage, bright where keys count most.

    The heads of a stage share a panel, row by row.
    """
    attns = [stage[-1].attn for stage in model.stages if isinstance(getattr(stage[-1], "attn", None), KeyOnlyAttention)]
    seen = {}
    hooks = [attn.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})) for attn in attns]
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    model.forward_features((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    heat = np.array([colorsys.hsv_to_rgb(0.7 * (1 - i / 255), 0.9, 0.3 + 0.7 * i / 255) for i in range(256)])   # blue to red
    panels = [("image", picture)]
    for i, stage in enumerate(model.stages):
        attn = getattr(stage[-1], "attn", None)
        if attn not in seen:
            continue
        hooks.pop(0).remove()
        _, H, W, _ = seen[attn].shape
        maps = salience(attn.split_heads(attn.k(seen[attn])), attn.saliency)[0].view(-1, H, W)              # (h, H, W)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        maps = (255 * (maps - low) / (high - low).clamp(min=1e-12)).int().numpy()
        side = math.ceil(math.sqrt(attn.heads))
        cell = picture.size[0] // side, picture.size[1] // side
        panel = Image.new("RGB", picture.size, "white")
        for j, shown in enumerate(maps):
            drawn = Image.fromarray((255 * heat[shown]).astype(np.uint8)).resize(cell, Image.Resampling.NEAREST)
            drawn = Image.blend(picture.convert("L").convert("RGB").resize(cell), drawn, 0.7)
            panel.paste(drawn, (j % side * cell[0], j // side * cell[1]))
        panels.append((f"stage {i + 1}: {attn.heads} heads", panel))
    return tile(panels)


def main():
    """Command line: read a picture, draw what the mechanism does to it, write a PNG."""
    parser = argparse.ArgumentParser(description="Draw which keys of a picture LinGlo finds salient, stage by stage and head by head.")
    parser.add_argument("picture", nargs="?", help="any file Pillow reads; without it a picture drawn here")
    parser.add_argument("-o", "--output", default="linglo.png", help="where to write the drawing")
    parser.add_argument("--model", default="linglo_b0", choices=sorted(VARIANTS))
    parser.add_argument("--weights", help="trained weights; without them the model is random and so is its saliency")
    args = parser.parse_args()
    torch.manual_seed(0)
    factory, reading = globals()[args.model], args.picture
    try:
        picture = load_picture(args.picture) if args.picture else example_picture()
        reading = args.weights
        model = load_weights(factory, args.weights) if args.weights else factory().eval()
        reading = args.output
        draw_saliency(model, picture).save(args.output)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow on broken files
        parser.exit(2, f"{reading}: {' '.join(str(error).split())}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
