"""STViT's core, layers and released checkpoints against slow references written from the paper and the released code's description.

Equivalence tests run in float64 with B > 1 and compare outputs and the gradients of all inputs. Order as in stvit.py, and as in
test_secvit.py: references, core, layers, ablations, released checkpoints. Letters as in stvit.py.
"""
import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from bench import complexity
from PIL import Image
from torch import nn
from torch.testing import assert_close

from stvit import (
    ConvFFN,
    FoldNeighbours,
    GatherNeighbours,
    PatchEmbedding,
    PositionTable,
    RelativePositionBias,
    STViT,
    SuperTokenAttention,
    draw_super_tokens,
    fold_neighbours,
    gather_neighbours,
    load_weights,
    sample_super_tokens,
    stvit_b,
    stvit_l,
    stvit_s,
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


def loop_resize(table, size):
    """Bilinear interpolation of (..., H, W) to `size`, one value at a time; values sit in the middle of their cells."""
    def neighbours_and_weights(i, old, new):
        at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        return [(math.floor(at), 1 - at % 1), (math.ceil(at), at % 1)]

    values = [sum(a * b * table[..., r, c] for (r, a), (c, b) in product(neighbours_and_weights(i, table.shape[-2], size[0]),
                                                                       neighbours_and_weights(j, table.shape[-1], size[1])))
              for i, j in product(*map(range, size))]
    return torch.stack(values, -1).unflatten(-1, size)


def loop_upsample(supers, association, grid, size):
    """Eq. 11, one token at a time: super tokens (B, C, H', W') -> (B, C, H, W)."""
    (gh, gw), (B, C, rows, columns) = grid, supers.shape
    if association is None:
        return loop_resize(supers, (rows * gh, columns * gw))[:, :, :size[0], :size[1]]
    tokens = []
    for b, r, c in product(range(B), range(size[0]), range(size[1])):
        weights = association[b, (r // gh) * columns + c // gw, (r % gh) * gw + c % gw]                     # (9,)
        tokens.append(sum(weights[n] * supers[b, :, i, j] for n, i, j in neighbours(r // gh, c // gw, rows, columns)))
    return torch.stack(tokens, -1).view(C, B, *size).transpose(0, 1)


def loop_bias(weight, H, W):
    """(1, h, N, N) of a table (1, h, 2s-1, 2s-1) of offsets, one pair of query and key at a time."""
    table, places = loop_resize(weight[0], (2 * H - 1, 2 * W - 1)), list(product(range(H), range(W)))
    pairs = [table[:, i - a + H - 1, j - b + W - 1] for (i, j), (a, b) in product(places, places)]
    return torch.stack(pairs, -1).view(1, -1, H * W, H * W)


def loop_attend(module, x):
    """Multi-head self-attention on x (B, C, H, W), head by head; each head's q, k and v rows are adjacent in `qkv`."""
    bias = torch.zeros(1, module.heads, 1, 1).to(x) if module.bias is None else loop_bias(module.bias.weight, *x.shape[2:])
    B, C, H, W = x.shape
    d, heads = C // module.heads, []
    for i in range(module.heads):
        rows = slice(3 * d * i, 3 * d * (i + 1))
        q, k, v = (F.linear(x.flatten(2).mT, module.qkv.weight[rows], module.qkv.bias[rows])).split(d, -1)  # (B, N, d)
        heads.append((q @ k.mT / math.sqrt(d) + bias[:, i]).softmax(-1) @ v)
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
@pytest.mark.parametrize("bias_side", [None, 2])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("H, W, grid", SIZES[:-1])
def test_super_token_attention_matches_loops(H, W, grid, iterations, bias_side, device):
    module = SuperTokenAttention(12, 3, grid, iterations, bias_side).to(device).double()
    x, = random_leaves((2, H, W, 12), device=device)
    supers, association = loop_sample(x.permute(0, 3, 1, 2), grid, iterations)
    slow = loop_upsample(loop_attend(module, supers), association, grid, (H, W)).permute(0, 2, 3, 1)
    assert_same(module(x), slow, [x, *module.parameters()])


@pytest.mark.parametrize("grid", [(1, 1), [1, 1]])
def test_grid_one_is_plain_attention(grid, device):
    module = SuperTokenAttention(12, 3, grid).to(device).double()
    x, = random_leaves((2, 4, 5, 12), device=device)
    assert_same(module(x), loop_attend(module, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), [x, *module.parameters()])


def test_grid_one_with_bias_matches_loops(device):
    module = SuperTokenAttention(12, 3, (1, 1), bias_side=4).to(device).double()
    x, = random_leaves((2, 4, 5, 12), device=device)
    assert_same(module(x), loop_attend(module, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), [x, *module.parameters()])


def test_super_token_attention_raises_when_heads_do_not_divide():
    with pytest.raises(ValueError, match="dim = 10 does not split into 4 heads"):
        SuperTokenAttention(10, 4, (2, 2))


# ----------------------------------------------------------------------------------------------------------- ablations
@pytest.mark.parametrize("H, W", [(3, 3), (2, 5), (5, 7), (1, 4), (1, 1)])
def test_relative_position_bias_matches_loops(H, W, device):
    module = RelativePositionBias(2, 3).to(device).double()
    assert_same(module(H, W), loop_bias(module.weight, H, W), [module.weight])


def test_relative_position_bias_of_the_tables_own_side():
    """Nothing is interpolated: query (2, 0) and key (0, 1) are two rows and minus one column apart, the middle of 5 x 5 is no offset."""
    module = RelativePositionBias(2, 3)
    bias = module(3, 3).unflatten(2, (3, 3)).unflatten(4, (3, 3))       # (1, h, H, W, H, W)
    assert bias[0, :, 2, 0, 0, 1].equal(module.weight[0, :, 4, 1])
    assert bias[0, :, 1, 2, 1, 2].equal(module.weight[0, :, 2, 2])


@pytest.mark.parametrize("H, W", [(4, 4), (3, 7), (1, 2)])
def test_position_table_matches_loops(H, W, device):
    module = PositionTable(3, 4).to(device).double()
    x, = random_leaves((2, 3, H, W), device=device)
    assert_same(module(x), x + loop_resize(module.weight, (H, W)), [x, module.weight])


@pytest.mark.parametrize("H, W", [(8, 12), (9, 14)])
def test_patch_embedding_matches_loops(H, W, device):
    module = PatchEmbedding(5).to(device).double().eval()
    images, = random_leaves((2, 3, H, W), device=device)
    rows, columns = math.ceil(H / 4), math.ceil(W / 4)
    padded = F.pad(images, (0, 4 * columns - W, 0, 4 * rows - H))
    patches = [padded[:, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4].flatten(1) for i, j in product(range(rows), range(columns))]
    slow = torch.stack([F.linear(patch, module.conv.weight.flatten(1), module.conv.bias) for patch in patches], -1)
    slow = slow.unflatten(-1, (rows, columns)) / math.sqrt(1 + module.norm.eps)         # BatchNorm as it starts
    assert_same(module(images), slow, [images, *module.conv.parameters()])


@pytest.mark.parametrize("conv, shortcut", [(True, True), (True, False), (False, True)])
def test_conv_ffn_matches_loops(conv, shortcut, device):
    module = ConvFFN(3, 2, conv, shortcut).to(device).double()
    x, = random_leaves((2, 4, 5, 3), device=device)
    hidden = F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias))                    # (B, H, W, 2 C)
    if conv:
        padded = F.pad(hidden, (0, 0, 1, 1, 1, 1))
        mixed = module.conv.bias + sum(padded[:, i:i + 4, j:j + 5] * module.conv.weight[:, 0, i, j] for i, j in product(range(3), range(3)))
        hidden = hidden + mixed if shortcut else mixed
    assert_same(module(x), F.linear(hidden, module.fc2.weight, module.fc2.bias), [x, *module.parameters()])


TINY = {"depths": (1, 2, 1, 1), "dims": (16, 32, 24, 32), "heads": (1, 2, 3, 4), "grids": (4, 3, 1, 1),
        "layer_scale": (None, None, 0.5, 0.5)}
BARE = {"stem": "patch", "projection": False, "position": None, "conv_ffn": False}      # STA-4stage
SWIN = {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)}
ROWS = {    # overrides of STViT-S; parameters (M) and multiply-adds (G), exact and as the paper prints them
    "Table 6, STA-4stage": (BARE, "24.13", "3.970", "24.1", "3.97"),
    "Table 6, + conv stem": ({**BARE, "stem": "conv"}, "24.19", "4.262", "24.2", "4.26"),
    "Table 6, + projection": ({"position": None, "conv_ffn": False}, "25.23", "4.288", "25.2", "4.29"),
    "Table 6, + CPE": ({"conv_ffn": False}, "25.29", "4.304", "25.3", "4.30"),
    "Table 6, w/o CPE, + APE": ({"position": "ape", "conv_ffn": False}, "25.43", "4.288", "24.2", "4.26"),
    "Table 6, w/o CPE, + RPE": ({"position": "rpe", "conv_ffn": False}, "25.27", "4.288", "25.3", "4.29"),
    "Table 6, + ConvFFN": ({}, "25.50", "4.367", "25.4", "4.37"),
    "Table 6, w/o shortcut": ({"ffn_shortcut": False}, "25.50", "4.367", "25.4", "4.37"),
    "Table 7, grids 8,1,1,1": ({**BARE, "grids": (8, 1, 1, 1)}, "24.13", "4.972", None, "4.97"),
    "Table 7, grids 8,4,2,1": ({**BARE, "grids": (8, 4, 2, 1)}, "24.13", "3.270", None, "3.27"),
    "Table 7, grids 4,2,1,1": ({**BARE, "grids": (4, 2, 1, 1)}, "24.13", "4.115", None, "4.15"),
    "Table 7, 0 iterations": ({**BARE, "iterations": 0}, "24.13", "3.934", None, "3.93"),
    "Table 7, 2 iterations": ({**BARE, "iterations": 2}, "24.13", "3.996", None, "4.00"),
    "Table 9, Swin's size": ({**BARE, **SWIN}, "30.20", "4.353", "30", "4.3"),
    "Table 9, Swin's size, RPE": ({**BARE, **SWIN, "position": "rpe"}, "30.26", "4.353", "30", "4.3"),
    "Table 9, STViT-S's size": (BARE, "24.13", "3.970", "24", "4.0"),
    "Table 9, STViT-S's size, RPE": ({**BARE, "position": "rpe"}, "24.17", "3.970", "24", "4.0"),
}
MISPRINTS = {   # what the paper prints, where that is not the exact figure rounded
    "Table 6, w/o CPE, + APE": ("24.2", "4.26"),    # the figures of + conv stem, without the projection and the map
    "Table 6, + ConvFFN": ("25.4",), "Table 6, w/o shortcut": ("25.4",),        # truncated
    "Table 7, grids 4,2,1,1": ("4.15",),            # two iterations would give 4.16
    "Table 9, Swin's size": ("4.3",), "Table 9, Swin's size, RPE": ("4.3",),    # truncated
}


def unseen_multiply_adds(model, pixels):
    """What fvcore counts of the authors' code and `complexity` does not see: averages of cells and of the last map, one an element;
    gathering and folding neighbours, there convolutions with nine one-hot 3x3 kernels, so 81 a value; bilinear up-sampling, four."""
    total = (pixels // 32) ** 2 * model.head.in_features
    for i, stage in enumerate(model.stages):
        for attn in (block.attn for block in stage if block.attn.grid != (1, 1)):
            (side, _), C, tokens = attn.grid, attn.proj.out_features, pixels // 4 >> i
            cells = math.ceil(tokens / side) ** 2
            total += cells * side ** 2 * C                                              # averages
            if attn.iterations == 0:
                total += 4 * tokens ** 2 * C
            else:
                total += 81 * cells * (C + C + 1) * attn.iterations                     # gather super tokens; fold them and their shares
                total += 81 * cells * C                                                 # gather for up-sampling
    return total


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_tables(row):
    overrides, parameters, flops, *printed = ROWS[row]
    build = partial(stvit_s, **overrides)
    counted, _, multiply_adds = complexity(build)
    with torch.device("meta"):
        multiply_adds += unseen_multiply_adds(build(), 224)
    exact = counted / 1e6, multiply_adds / 1e9
    assert (f"{exact[0]:.2f}", f"{exact[1]:.3f}") == (parameters, flops)
    digits = [len(figure.partition(".")[2]) if figure else 0 for figure in printed]
    wrong = [figure for figure, value, n in zip(printed, exact, digits) if figure and figure != f"{value:.{n}f}"]
    assert wrong == list(MISPRINTS.get(row, ()))


@pytest.mark.parametrize("factory, pixels, flops", [(stvit_s, 224, "4.37"), (stvit_b, 224, "9.87"), (stvit_l, 224, "15.60"),
                                                    (stvit_s, 384, "14.16"), (stvit_b, 384, "31.49"), (stvit_l, 384, "49.75")])
def test_flops_of_the_variants(factory, pixels, flops):
    with torch.device("meta"):
        unseen = unseen_multiply_adds(factory(), pixels)
    assert f"{(complexity(factory, pixels)[2] + unseen) / 1e9:.2f}" == flops


ABLATIONS = {"ape": {"stem": "patch", "position": "ape", "ffn_shortcut": False}, "rpe": {"position": "rpe", "iterations": 2},
             "bare": {**BARE, "iterations": 0}}
each_ablation = pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS)


@each_ablation
@pytest.mark.parametrize("H, W", [(33, 47), (50, 100)])
def test_ablations_take_any_size_and_use_every_parameter(ablation, H, W, device):
    model = STViT(num_classes=5, drop_path_rate=0., **TINY, **ablation).to(device)
    images = torch.randn(2, 3, H, W, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert model.eval()(images).isfinite().all()
        assert model(images[..., :32, :32]).isfinite().all()
    maps = model.train().forward_features(images)
    assert [m.shape[2:] for m in maps] == [(math.ceil(H / s), math.ceil(W / s)) for s in (4, 8, 16, 32)]
    logits = model(images)
    (logits * torch.randn_like(logits)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        if parameter.ndim > 1:      # biases in front of a norm have none in exact arithmetic
            assert parameter.grad.count_nonzero() > 0, key


@each_ablation
def test_compiled_ablations_equal_eager(ablation):
    torch._dynamo.reset()
    model, images = STViT(num_classes=5, drop_path_rate=0., **TINY, **ablation).double(), torch.randn(2, 3, 50, 64, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(images), model(images), [*model.parameters()])


@pytest.mark.parametrize("build, shapes", [
    (lambda: nn.Sequential(PatchEmbedding(3), PositionTable(3, 7)), ((2, 3, 5, 6), (2, 3, 7, 4))),
    (lambda: SuperTokenAttention(4, 2, (1, 1), bias_side=3), ((2, 5, 6, 4), (2, 7, 4, 4)))], ids=["ape", "rpe"])
def test_compiled_positions_with_dynamic_sizes_equal_eager(build, shapes):
    """The layers alone: torch's symbolic shapes are slow."""
    torch._dynamo.reset()
    layer = build().double()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for x in random_leaves(*shapes):
        assert_same(compiled(x), layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize("wrong, message", [
    ({"stem": "swin"}, "stem = 'swin', expected 'conv' or 'patch'"),
    ({"position": "rope"}, "position = 'rope', expected 'cpe', 'ape', 'rpe' or None"),
    ({"conv_ffn": False, "ffn_shortcut": False}, "ffn_shortcut = False, expected True"),
    ({"iterations": -1}, "iterations = -1, expected"), ({"grids": (8, 0, 1, 1)}, r"grids = \(8, 0, 1, 1\)"),
    ({"grids": (8, 4, 1)}, r"grids = \(8, 4, 1\), .*expected four")])
def test_unknown_ablations_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        STViT(num_classes=5, drop_path_rate=0., **{**TINY, **wrong})


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
