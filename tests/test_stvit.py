"""STViT's core, layers and released checkpoints against slow references written from the paper and the released code's description.

Equivalence tests run in float64 with B > 1 and compare outputs and the gradients of all inputs. Order as in stvit.py, and as in
test_secvit.py: references, core, layers, released checkpoints. Letters as in stvit.py.
"""
import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

from stvit import (
    FoldNeighbours,
    GatherNeighbours,
    STViT,
    SuperTokenAttention,
    draw_super_tokens,
    fold_neighbours,
    gather_neighbours,
    load_weights,
    sample_super_tokens,
    upsample_super_tokens,
)


# ---------------------------------------------------------------------------------------------------------- references
def neighbours(i, j, rows, columns):
    """(place among the nine, row, column) of the cells around cell (i, j) that lie on the map."""
    around = ((n, i + n // 3 - 1, j + n % 3 - 1) for n in range(9))
    return [(n, a, b) for n, a, b in around if 0 <= a < rows and 0 <= b < columns]


def loop_associate(token, supers, i, j):
    """Eq. 5 for one token (C,) of cell (i, j): softmax over nine super tokens of (C, H', W'), those off the map being zero."""
    around = [torch.zeros_like(token)] * 9
    for n, a, b in neighbours(i, j, *supers.shape[1:]):
        around[n] = supers[:, a, b]
    return torch.stack([token @ s / math.sqrt(len(token)) for s in around]).softmax(0)


def loop_sample(x, grid, iterations):
    """Super tokens (B, C, H', W') and association (B, H'*W', gh*gw, 9) of x (B, C, H, W), one token at a time."""
    (gh, gw), (B, C, H, W) = grid, x.shape
    rows, columns = math.ceil(H / gh), math.ceil(W / gw)
    padded = F.pad(x, (0, columns * gw - W, 0, rows * gh - H))
    cells = {(i, j): padded[:, :, i * gh:(i + 1) * gh, j * gw:(j + 1) * gw].flatten(2) for i, j in product(range(rows), range(columns))}
    supers = torch.stack([cell.mean(2) for cell in cells.values()], -1).view(B, C, rows, columns)
    association = None
    for _ in range(iterations):
        frozen, updated = supers.detach(), []
        association = x.new_zeros(B, rows * columns, gh * gw, 9)
        for b in range(B):
            total = {cell: 0 for cell in cells}
            share = {cell: 0 for cell in cells}
            for (i, j), p in product(cells, range(gh * gw)):
                token = cells[i, j][b, :, p]
                weights = association[b, i * columns + j, p] = loop_associate(token.detach(), frozen[b], i, j)
                for n, *cell in neighbours(i, j, rows, columns):
                    total[tuple(cell)] += weights[n] * token
                    share[tuple(cell)] += weights[n]
            updated.append(torch.stack([total[cell] / (share[cell] + 1e-12) for cell in cells], -1))        # Eq. 6
        supers = torch.stack(updated).view(B, C, rows, columns)
    return supers, association


def loop_upsample(supers, association, grid, size):
    """Eq. 11, one token at a time: super tokens (B, C, H', W') -> (B, C, H, W)."""
    (gh, gw), (B, C, rows, columns) = grid, supers.shape
    if association is None:
        return F.interpolate(supers, size=(rows * gh, columns * gw), mode="bilinear")[:, :, :size[0], :size[1]]
    tokens = []
    for b, r, c in product(range(B), range(size[0]), range(size[1])):
        weights = association[b, (r // gh) * columns + c // gw, (r % gh) * gw + c % gw]                     # (9,)
        tokens.append(sum(weights[n] * supers[b, :, i, j] for n, i, j in neighbours(r // gh, c // gw, rows, columns)))
    return torch.stack(tokens, -1).view(C, B, *size).transpose(0, 1)


def loop_attend(module, x):
    """Multi-head self-attention on x (B, C, H, W), head by head; each head's q, k and v rows are adjacent in `qkv`."""
    B, C, H, W = x.shape
    d, heads = C // module.heads, []
    for i in range(module.heads):
        rows = slice(3 * d * i, 3 * d * (i + 1))
        q, k, v = (F.linear(x.flatten(2).mT, module.qkv.weight[rows], module.qkv.bias[rows])).split(d, -1)  # (B, N, d)
        heads.append((q @ k.mT / math.sqrt(d)).softmax(-1) @ v)
    return F.linear(torch.cat(heads, -1), module.proj.weight, module.proj.bias).mT.reshape(B, C, H, W)


def assert_same(fast, slow, inputs, **tolerance):
    """Equal outputs, and equal gradients of all inputs for one random cotangent."""
    assert_close(fast, slow, **tolerance)
    cotangent = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, inputs, cotangent), torch.autograd.grad(slow, inputs, cotangent), strict=True):
        assert_close(a, b, **tolerance)


def random_leaves(*shapes, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]


# ---------------------------------------------------------------------------------------------------------------- core
CELLS = [(3, 4), (4, 1), (1, 5), (1, 1), (2, 2)]  # H', W'


@pytest.mark.parametrize("rows, columns", CELLS)
def test_gather_and_fold_match_loops(rows, columns, device):
    cells, parts = random_leaves((2, rows, columns, 3), (2, rows, columns, 9, 3), device=device)
    gathered, folded = torch.zeros_like(parts), torch.zeros_like(cells)
    for i, j in product(range(rows), range(columns)):
        for n, a, b in neighbours(i, j, rows, columns):
            gathered[:, i, j, n] += cells[:, a, b]
            folded[:, a, b] += parts[:, i, j, n]
    assert_same(GatherNeighbours.apply(cells), gathered, [cells])
    assert_same(FoldNeighbours.apply(parts), folded, [parts])
    strided = parts.detach().permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert_close(fold_neighbours(strided), folded)


@pytest.mark.parametrize("rows, columns", CELLS)
def test_gather_and_fold_are_adjoint(rows, columns, device):
    cells, parts = random_leaves((2, rows, columns, 3), (2, rows, columns, 9, 3), device=device)
    assert_close((gather_neighbours(cells) * parts).sum(), (cells * fold_neighbours(parts)).sum())


@pytest.mark.parametrize("function, shape", [(GatherNeighbours.apply, (2, 2, 3, 2)), (FoldNeighbours.apply, (2, 2, 3, 9, 2))])
def test_gather_and_fold_gradcheck(function, shape):
    x, = random_leaves(shape)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


SIZES = [(7, 10, (3, 4)), (6, 8, (3, 4)), (4, 9, (4, 2)), (9, 4, (2, 3)), (5, 3, (8, 8)), (3, 4, (1, 1))]  # H, W, grid


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("H, W, grid", SIZES)
def test_sampling_matches_loops(H, W, grid, iterations, device):
    x, = random_leaves((2, 5, H, W), device=device)
    fast, association = sample_super_tokens(x, grid, iterations)
    slow, expected = loop_sample(x, grid, iterations)
    assert_same(fast, slow, [x])
    if iterations == 0:
        assert association is None
    else:
        assert not association.requires_grad
        assert_close(association, expected)


@pytest.mark.parametrize("H, W, grid", SIZES)
def test_upsampling_matches_loops(H, W, grid, device):
    rows, columns = math.ceil(H / grid[0]), math.ceil(W / grid[1])
    supers, association = random_leaves((2, 5, rows, columns), (2, rows * columns, grid[0] * grid[1], 9), device=device)
    assert_same(upsample_super_tokens(supers, association, grid, (H, W)), loop_upsample(supers, association, grid, (H, W)),
                [supers, association])
    assert_same(upsample_super_tokens(supers, None, grid, (H, W)), loop_upsample(supers, None, grid, (H, W)), [supers])


def test_core_takes_any_strides(device):
    x, supers, association = random_leaves((2, 7, 10, 5), (2, 3, 3, 5), (9, 9, 12, 2), device=device)
    tokens = x.permute(0, 3, 1, 2)
    assert_same(sample_super_tokens(tokens, (3, 4))[0], loop_sample(tokens, (3, 4), 1)[0], [x])
    given = supers.permute(0, 3, 1, 2), association.permute(3, 1, 2, 0), (3, 4), (7, 10)
    assert_same(upsample_super_tokens(*given), loop_upsample(*given), [supers, association])


def test_super_token_off_the_map_takes_its_share():
    """All tokens alike and one cell: eight zero neighbours leave the cell 1 / (1 + 8 exp(-|x|^2 / sqrt(C))) of each token."""
    x = torch.full((1, 4, 2, 2), 0.5, dtype=torch.float64)
    supers, association = sample_super_tokens(x, (2, 2))
    share = 1 / (1 + 8 * math.exp(-1 / 2))                                                      # |x|^2 = 1, sqrt(C) = 2
    assert_close(association[0, :, :, 4], torch.full((1, 4), share, dtype=torch.float64))
    assert_close(supers, torch.full((1, 4, 1, 1), 0.5, dtype=torch.float64))
    assert_close(upsample_super_tokens(supers, association, (2, 2), (2, 2)), share * x)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_core_gradcheck(iterations):
    """Of the function whose gradient is defined: association held fixed."""
    x, supers = random_leaves((2, 2, 4, 5), (2, 2, 2, 2))
    association = sample_super_tokens(x, (2, 3), iterations)[1]
    if association is not None:
        association = association.detach()
    else:
        assert torch.autograd.gradcheck(lambda x: sample_super_tokens(x, (2, 3), 0)[0], x)
    assert torch.autograd.gradcheck(lambda s: upsample_super_tokens(s, association, (2, 3), (4, 5)), supers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, device):
    x = torch.randn(2, 8, 7, 10, device=device).to(dtype)
    supers, association = sample_super_tokens(x, (3, 4))
    assert supers.dtype == association.dtype == dtype
    exact_supers, exact_association = loop_sample(x.double(), (3, 4), 1)
    assert_close(association.double(), exact_association, rtol=0, atol=0.02)
    assert_close(supers.double(), exact_supers, rtol=0, atol=0.05)
    assert upsample_super_tokens(supers, association, (3, 4), (7, 10)).dtype == dtype


# -------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("H, W, grid", SIZES[:-1])
def test_super_token_attention_matches_loops(H, W, grid, iterations, device):
    module = SuperTokenAttention(12, 3, grid, iterations).to(device).double()
    x, = random_leaves((2, H, W, 12), device=device)
    supers, association = loop_sample(x.permute(0, 3, 1, 2), grid, iterations)
    slow = loop_upsample(loop_attend(module, supers), association, grid, (H, W)).permute(0, 2, 3, 1)
    assert_same(module(x), slow, [x, *module.parameters()])


@pytest.mark.parametrize("grid", [(1, 1), [1, 1]])
def test_grid_one_is_plain_attention(grid, device):
    module = SuperTokenAttention(12, 3, grid).to(device).double()
    x, = random_leaves((2, 4, 5, 12), device=device)
    assert_same(module(x), loop_attend(module, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), [x, *module.parameters()])


def test_super_token_attention_raises_when_heads_do_not_divide():
    with pytest.raises(ValueError, match="dim = 10 does not split into 4 heads"):
        SuperTokenAttention(10, 4, (2, 2))


# ------------------------------------------------------------------------------------------------- released checkpoints
class TheirNorm(nn.Module):
    """Layer norm of a channels-first map."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TheirResidualConv(nn.Module):
    """x + depth-wise convolution; the first release's `shortcut` is a diagonal kernel in place of the identity."""

    def __init__(self, dim, shortcut):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.shortcut = nn.Parameter(torch.eye(3).repeat(dim, 1, 1, 1), requires_grad=False) if shortcut else None

    def forward(self, x):
        if self.shortcut is None:
            return x + self.conv(x)
        return F.conv2d(x, self.conv.weight + self.shortcut, self.conv.bias, padding=1, groups=x.shape[1])


class TheirAttention(nn.Module):
    """Fold and unfold are convolutions with one-hot kernels, stored in every block."""

    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads, self.grid = heads, grid
        one_hot = nn.Parameter(torch.eye(9).view(9, 1, 3, 3), requires_grad=False)
        self.unfold, self.fold = nn.ParameterDict({"weights": one_hot}), nn.ParameterDict({"weights": one_hot})
        self.stoken_refine = nn.ModuleDict({"qkv": nn.Conv2d(dim, 3 * dim, 1), "proj": nn.Conv2d(dim, dim, 1)})

    def refine(self, x):
        B, C, H, W = x.shape
        q, k, v = self.stoken_refine["qkv"](x).view(B, self.heads, 3 * C // self.heads, H * W).chunk(3, 2)  # each (B, h, d, N)
        weights = (q.mT @ k * (C // self.heads) ** -0.5).softmax(-1)
        return self.stoken_refine["proj"]((v @ weights.mT).reshape(B, C, H, W))

    def forward(self, x):
        if self.grid == 1:
            return self.refine(x)
        B, C, H, W = x.shape
        x = F.pad(x, (0, -W % self.grid, 0, -H % self.grid))
        rows, columns = x.shape[2] // self.grid, x.shape[3] // self.grid
        pixels = F.unfold(x, self.grid, stride=self.grid).view(B, C, -1, rows * columns).permute(0, 3, 2, 1)    # (B, M, P, C)
        supers = F.adaptive_avg_pool2d(x, (rows, columns))
        affinity = (pixels @ self.unfolded(supers) * C ** -0.5).softmax(-1)                                     # (B, M, P, 9)
        share = self.folded(affinity.sum(2)[:, :, None], rows, columns)
        supers = self.refine(self.folded(pixels.mT @ affinity, rows, columns) / (share + 1e-12))
        x = self.unfolded(supers) @ affinity.mT                                                                 # (B, M, C, P)
        x = F.fold(x.permute(0, 2, 3, 1).flatten(1, 2), (rows * self.grid, columns * self.grid), self.grid, stride=self.grid)
        return x[:, :, :H, :W]

    def unfolded(self, x):
        """(B, C, H', W') -> (B, M, C, 9)."""
        x = F.conv2d(x.flatten(0, 1)[:, None], self.unfold["weights"], padding=1).unflatten(0, x.shape[:2])
        return x.flatten(3).permute(0, 3, 1, 2)

    def folded(self, x, rows, columns):
        """(B, M, C, 9) -> (B, C, H', W')."""
        parts = x.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (rows, columns))                               # (B*C, 9, H', W')
        return F.conv_transpose2d(parts, self.fold["weights"], padding=1).view(x.shape[0], -1, rows, columns)


class TheirFFN(nn.Module):
    def __init__(self, dim, shortcut):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)
        self.conv = TheirResidualConv(4 * dim, shortcut)

    def forward(self, x):
        return self.fc2(self.conv(F.gelu(self.fc1(x))))


class TheirBlock(nn.Module):
    def __init__(self, dim, heads, grid, scale, shortcut):
        super().__init__()
        self.pos_embed = TheirResidualConv(dim, shortcut)
        self.norm1, self.attn = TheirNorm(dim), TheirAttention(dim, heads, grid)
        self.norm2, self.mlp2 = nn.BatchNorm2d(dim), TheirFFN(dim, shortcut)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.rand(1, dim, 1, 1)) if scale else None for _ in range(2))

    def forward(self, x):
        x = self.pos_embed(x)
        x = x + self.attn(self.norm1(x)) * (1 if self.gamma_1 is None else self.gamma_1)
        return x + self.mlp2(self.norm2(x)) * (1 if self.gamma_2 is None else self.gamma_2)


class TheirSTViT(nn.Module):
    """The released model, channels-first; its state dict has the names and shapes of the released files."""

    def __init__(self, num_classes, depths, dims, heads, grids, layer_scale, shortcut):
        super().__init__()
        half, stem = dims[0] // 2, []
        for i, o, stride in ((3, half, 2), (half, half, 1), (half, dims[0], 2), (dims[0], dims[0], 1)):
            stem += [nn.Conv2d(i, o, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(o)]
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(*stem)})
        self.layers = nn.ModuleList()
        for i in range(4):
            blocks = (TheirBlock(dims[i], heads[i], grids[i], layer_scale[i], shortcut) for _ in range(depths[i]))
            layer = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
            if i < 3:
                merge = nn.Sequential(nn.Conv2d(dims[i], dims[i + 1], 3, 2, 1), nn.BatchNorm2d(dims[i + 1]))
                layer["downsample"] = nn.ModuleDict({"proj": merge})
            self.layers.append(layer)
        self.proj, self.norm, self.head = nn.Conv2d(dims[3], 1024, 1), nn.BatchNorm2d(1024), nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x)
        for layer in self.layers:
            x = layer["blocks"](x)
            if "downsample" in layer:
                x = layer["downsample"]["proj"](x)
        return self.head(F.silu(self.norm(self.proj(x))).mean((2, 3)))


TINY = {"depths": (1, 2, 1, 1), "dims": (16, 32, 24, 32), "heads": (1, 2, 3, 4), "grids": (4, 3, 1, 1),
        "layer_scale": (None, None, 0.5, 0.5)}


@pytest.fixture(scope="module", params=["identity", "shortcut"])
def theirs(request):
    """A small released model, of the last and of the first release, with every weight and statistic away from its initial value."""
    torch.manual_seed(1)
    model = TheirSTViT(5, **TINY, shortcut=request.param == "shortcut").double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(("fold.weights", "shortcut")):
            tensor += 0.1 * torch.rand_like(tensor) if name.endswith("running_var") else 0.1 * torch.randn_like(tensor)
    return model


@pytest.mark.parametrize("H, W", [(64, 96), (50, 100)])
def test_load_released_gives_the_released_outputs(theirs, H, W, device):
    ours = STViT(num_classes=5, drop_path_rate=0.1, **TINY).double().eval()
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours.load_released(state)
    assert_close(state, dict(theirs.state_dict()), rtol=0, atol=0)      # the given dict stays as it was
    images = torch.randn(2, 3, H, W, dtype=torch.float64)
    assert_close(ours.to(device)(images.to(device)).cpu(), theirs(images))


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("layers.1.blocks.1.attn.stoken_refine.qkv.bias"), "Missing key.*stages.1.1.attn.qkv.bias"),
    (lambda state: state.pop("head.weight"), "Missing key.*head.weight"),
    (lambda state: state.update({"layers.0.blocks.0.extra": torch.zeros(1)}), "Unexpected key.*stages.0.0.extra"),
    (lambda state: state.update({"proj.bias": torch.zeros(7)}), "size mismatch for proj.0.bias")])
def test_load_released_is_strict(theirs, change, message):
    state = theirs.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        STViT(num_classes=5, drop_path_rate=0., **TINY).load_released(state)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"model": state, "step": 3}])
def test_load_weights_reads_our_files(wrap, tmp_path):
    factory = partial(STViT, drop_path_rate=0.1, **TINY)
    model = factory(num_classes=3).eval()
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pt")
    loaded, images = load_weights(factory, tmp_path / "weights.pt"), torch.randn(1, 3, 32, 64)
    assert not loaded.training
    assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_load_weights_reads_the_authors_file(theirs, tmp_path):
    torch.save({"model": theirs.state_dict()}, tmp_path / "released.pth")
    loaded, images = load_weights(partial(STViT, drop_path_rate=0.1, **TINY), tmp_path / "released.pth"), torch.randn(1, 3, 64, 96)
    assert_close(loaded(images).double(), theirs(images.double()), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- drawing
def test_drawn_super_tokens_have_their_mean_colour():
    """A flat picture keeps its colour, up to the yellow outlines; 100 x 60 pixels are no whole number of cells."""
    model = STViT(num_classes=5, drop_path_rate=0., **TINY).eval()
    sheet = draw_super_tokens(model, Image.new("RGB", (100, 60), (90, 120, 40)))
    for panel in (1, 2):
        drawn = sheet.crop((panel * 108, 20, panel * 108 + 100, 80))
        assert {colour for _, colour in drawn.getcolors()} == {(90, 120, 40), (255, 255, 0)}
