"""STViT's core, layers and released checkpoints against slow references.

The references are written from the paper and from the released code's description. Equivalence
tests run in float64 with B > 1 and compare outputs and the gradients of all inputs. Sections and
symbols are those of stvit.py, after the references.
"""
import math
import struct
from functools import cache, partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench import complexity, unseen_multiply_adds
from PIL import Image, ImageOps
from torch import nn
from torch.testing import assert_close

import stvit


# --------------------------------------------------------------------------------------- references
def neighbour_cells(i, j, rows, columns):
    """(index among the nine, row, column) of the cells around cell (i, j) that are on the map."""
    cells = []
    for n in range(9):
        row = i + n // 3 - 1
        column = j + n % 3 - 1
        if 0 <= row < rows and 0 <= column < columns:
            cells.append((n, row, column))
    return cells


def loop_associate(token, supers, i, j):
    """Eq. 5 for one token (C,) of cell (i, j) and supers (C, H', W'): softmax over nine logits.

    Super tokens outside the map are zero.
    """
    logits = [torch.zeros(()).to(token)] * 9
    for n, row, column in neighbour_cells(i, j, *supers.shape[1:]):
        logits[n] = token @ supers[:, row, column] / math.sqrt(len(token))
    return torch.stack(logits).softmax(0)


def loop_cells(x, grid):
    """x (B, C, H, W) -> {(i, j): tokens of the cell (B, C, P)}, zero-padded right and bottom."""
    gh, gw = grid
    rows = math.ceil(x.shape[2] / gh)
    columns = math.ceil(x.shape[3] / gw)
    padded = F.pad(x, (0, columns * gw - x.shape[3], 0, rows * gh - x.shape[2]))
    cells = {}
    for i, j in product(range(rows), range(columns)):
        cell = padded[:, :, i * gh:(i + 1) * gh, j * gw:(j + 1) * gw]
        cells[i, j] = cell.flatten(2)
    return cells


def loop_update(cells, supers, association):
    """One sampling step for one sample: cells of (C, P), supers (C, H', W') -> new supers.

    Fills association (M, P, 9).
    """
    _, rows, columns = supers.shape
    total = dict.fromkeys(cells, 0)
    column_sum = dict.fromkeys(cells, 0)
    for (i, j), tokens in cells.items():
        for p, token in enumerate(tokens.unbind(1)):
            weights = loop_associate(token.detach(), supers.detach(), i, j)     # (9,), Eq. 5
            association[i * columns + j, p] = weights
            for n, *cell in neighbour_cells(i, j, rows, columns):
                total[tuple(cell)] += weights[n] * token
                column_sum[tuple(cell)] += weights[n]
    updated = [total[cell] / (column_sum[cell] + 1e-12) for cell in cells]      # Eq. 6
    return torch.stack(updated, -1).view(supers.shape)


def loop_sample(x, grid, iterations):
    """Super tokens (B, C, H', W') and association (B, M, P, 9) of x, one token at a time."""
    cells = loop_cells(x, grid)
    rows, columns = (side + 1 for side in max(cells))
    means = torch.stack([cell.mean(2) for cell in cells.values()], -1)          # (B, C, M)
    supers = means.unflatten(2, (rows, columns))
    association = None
    for _ in range(iterations):
        association = x.new_zeros(len(x), rows * columns, grid[0] * grid[1], 9)
        updated = []
        for b in range(len(x)):
            sample = {position: cell[b] for position, cell in cells.items()}
            updated.append(loop_update(sample, supers[b], association[b]))
        supers = torch.stack(updated)
    return supers, association


def loop_samples(i, old, new):
    """Bilinear interpolation of one axis: (index, weight) of the two old values of new value i."""
    position = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
    fraction = position % 1
    return [(math.floor(position), 1 - fraction), (math.ceil(position), fraction)]


def loop_token_attention(association, attention, cells):
    """Q A Q^T of Eq. 15 by whole matrices: (M, P, 9), (M, M) -> (M * P, M * P)."""
    M, P, _ = association.shape
    dense = association.new_zeros(M, P, M)                                      # Q (N, M)
    for i, j in product(range(cells[0]), range(cells[1])):
        for n, row, column in neighbour_cells(i, j, *cells):
            cell = i * cells[1] + j
            dense[cell, :, row * cells[1] + column] = association[cell, :, n]
    dense = dense.flatten(0, 1)
    return dense @ attention @ (dense / dense.sum(0)).T


def loop_resize(table, size):
    """Bilinear interpolation of (..., H, W) to `size`, one value at a time."""
    H, W = table.shape[-2:]
    values = []
    for i, j in product(range(size[0]), range(size[1])):
        rows = loop_samples(i, H, size[0])
        columns = loop_samples(j, W, size[1])
        value = 0
        for (row, a), (column, b) in product(rows, columns):
            value = value + a * b * table[..., row, column]
        values.append(value)
    return torch.stack(values, -1).unflatten(-1, size)


def loop_upsample_token(supers, weights, i, j):
    """Eq. 11 for one token of cell (i, j): supers (C, H', W'), weights (9,) -> (C,)."""
    total = 0
    for n, row, column in neighbour_cells(i, j, *supers.shape[1:]):
        total = total + weights[n] * supers[:, row, column]
    return total


def loop_upsample(supers, association, grid, size):
    """Eq. 11, one token at a time: super tokens (B, C, H', W') -> (B, C, H, W)."""
    gh, gw = grid
    B, C, rows, columns = supers.shape
    if association is None:
        full = loop_resize(supers, (rows * gh, columns * gw))
        return full[:, :, :size[0], :size[1]]
    tokens = []
    for b, row, column in product(range(B), range(size[0]), range(size[1])):
        i = row // gh
        j = column // gw
        p = row % gh * gw + column % gw
        weights = association[b, i * columns + j, p]                            # (9,)
        tokens.append(loop_upsample_token(supers[b], weights, i, j))
    return torch.stack(tokens, -1).view(C, B, *size).transpose(0, 1)


def loop_bias(weight, H, W):
    """(1, h, N, N) of a table (1, h, 2s-1, 2s-1), one pair of query and key at a time."""
    table = loop_resize(weight[0], (2 * H - 1, 2 * W - 1))
    positions = list(product(range(H), range(W)))
    pairs = []
    for (i, j), (a, b) in product(positions, positions):
        pairs.append(table[:, i - a + H - 1, j - b + W - 1])
    return torch.stack(pairs, -1).view(1, -1, H * W, H * W)


def loop_attend(module, x):
    """Multi-head self-attention on x (B, C, H, W), head by head.

    The q, k and v rows of each head are adjacent in `qkv`.
    """
    B, C, H, W = x.shape
    d = C // module.heads
    bias = torch.zeros(1, module.heads, 1, 1).to(x)
    if module.bias is not None:
        bias = loop_bias(module.bias.weight, H, W)
    heads = []
    for i in range(module.heads):
        rows = slice(3 * d * i, 3 * d * (i + 1))
        qkv = F.linear(x.flatten(2).mT, module.qkv.weight[rows], module.qkv.bias[rows])
        q, k, v = qkv.split(d, -1)                                              # each (B, N, d)
        weights = (q @ k.mT / math.sqrt(d) + bias[:, i]).softmax(-1)            # (B, N, N)
        heads.append(weights @ v)
    y = F.linear(torch.cat(heads, -1), module.proj.weight, module.proj.bias)    # (B, N, C)
    return y.mT.reshape(B, C, H, W)


def loop_conv(conv, x):
    """3x3 depth-wise convolution, tap by tap: (B, H, W, C) -> the same."""
    _, H, W, _ = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    total = conv.bias
    for i, j in product(range(3), range(3)):
        total = total + padded[:, i:i + H, j:j + W] * conv.weight[:, 0, i, j]
    return total


def assert_same(fast, slow, inputs, **tolerance):
    """Equal outputs, and equal gradients of all inputs for one random cotangent."""
    assert_close(fast, slow, **tolerance)
    cotangent = torch.randn_like(slow)
    fast_gradients = torch.autograd.grad(fast, inputs, cotangent)
    slow_gradients = torch.autograd.grad(slow, inputs, cotangent)
    for fast_gradient, slow_gradient in zip(fast_gradients, slow_gradients, strict=True):
        assert_close(fast_gradient, slow_gradient, **tolerance)


def random_leaf(*shape, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


# --------------------------------------------------------------------------------------------- core
CELLS = [(3, 4), (4, 1), (1, 5), (1, 1), (2, 2)]  # H', W'
each_map = pytest.mark.parametrize("rows, columns", CELLS)


@each_map
def test_gather_matches_loops(rows, columns, device):
    cells = random_leaf(2, rows, columns, 3, device=device)
    gathered = cells.new_zeros(2, rows, columns, 9, 3)
    for i, j in product(range(rows), range(columns)):
        for n, row, column in neighbour_cells(i, j, rows, columns):
            gathered[:, i, j, n] += cells[:, row, column]
    assert_same(stvit.GatherNeighbours.apply(cells), gathered, [cells])


def loop_fold(parts):
    _, rows, columns, _, _ = parts.shape
    folded = torch.zeros_like(parts[:, :, :, 0])
    for i, j in product(range(rows), range(columns)):
        for n, row, column in neighbour_cells(i, j, rows, columns):
            folded[:, row, column] += parts[:, i, j, n]
    return folded


@each_map
def test_fold_matches_loops(rows, columns, device):
    parts = random_leaf(2, rows, columns, 9, 3, device=device)
    assert_same(stvit.FoldNeighbours.apply(parts), loop_fold(parts), [parts])


@each_map
def test_fold_takes_any_strides(rows, columns, device):
    parts = random_leaf(3, 9, columns, rows, 2, device=device).permute(4, 3, 2, 1, 0)
    assert_close(stvit.fold_neighbours(parts), loop_fold(parts))


@each_map
def test_gather_and_fold_are_adjoint(rows, columns, device):
    cells = random_leaf(2, rows, columns, 3, device=device)
    parts = random_leaf(2, rows, columns, 9, 3, device=device)
    gathered = stvit.gather_neighbours(cells)
    folded = stvit.fold_neighbours(parts)
    assert_close((gathered * parts).sum(), (cells * folded).sum())


each_function = pytest.mark.parametrize("function, shape", [
    (stvit.GatherNeighbours.apply, (2, 2, 3, 2)),
    (stvit.FoldNeighbours.apply, (2, 2, 3, 9, 2)),
])


@each_function
def test_gather_and_fold_gradcheck(function, shape):
    assert torch.autograd.gradcheck(function, random_leaf(*shape))


@each_function
def test_gather_and_fold_gradgradcheck(function, shape):
    assert torch.autograd.gradgradcheck(function, random_leaf(*shape))


SIZES = [  # H, W, grid
    (7, 10, (3, 4)),
    (6, 8, (3, 4)),
    (4, 9, (4, 2)),
    (9, 4, (2, 3)),
    (5, 3, (8, 8)),
    (3, 4, (1, 1)),
]
each_size = pytest.mark.parametrize("H, W, grid", SIZES)


@each_size
def test_merging_cells_inverts_splitting(H, W, grid, device):
    x = random_leaf(2, 5, H, W, device=device)
    merged = stvit.merge_cells(stvit.split_cells(x, grid), grid)
    assert merged[:, :H, :W].equal(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("iterations", [0, 1, 2])
@each_size
def test_super_tokens_match_loops(H, W, grid, iterations, device):
    x = random_leaf(2, 5, H, W, device=device)
    fast, _ = stvit.sample_super_tokens(x, grid, iterations)
    slow, _ = loop_sample(x, grid, iterations)
    assert_same(fast, slow, [x])


@pytest.mark.parametrize("iterations", [1, 2])
@each_size
def test_association_matches_loops(H, W, grid, iterations, device):
    x = random_leaf(2, 5, H, W, device=device)
    _, fast = stvit.sample_super_tokens(x, grid, iterations)
    _, slow = loop_sample(x, grid, iterations)
    assert_close(fast, slow)


def test_association_has_no_gradient():
    _, association = stvit.sample_super_tokens(random_leaf(2, 5, 7, 10), (3, 4), 2)
    assert not association.requires_grad


def test_no_association_without_iterations():
    _, association = stvit.sample_super_tokens(random_leaf(2, 5, 7, 10), (3, 4), 0)
    assert association is None


@each_size
def test_upsampling_matches_loops(H, W, grid, device):
    gh, gw = grid
    rows = math.ceil(H / gh)
    columns = math.ceil(W / gw)
    supers = random_leaf(2, 5, rows, columns, device=device)
    association = random_leaf(2, rows * columns, gh * gw, 9, device=device)
    fast = stvit.upsample_super_tokens(supers, association, grid, (H, W))
    slow = loop_upsample(supers, association, grid, (H, W))
    assert_same(fast, slow, [supers, association])


@each_size
def test_bilinear_upsampling_matches_loops(H, W, grid, device):
    gh, gw = grid
    supers = random_leaf(2, 5, math.ceil(H / gh), math.ceil(W / gw), device=device)
    fast = stvit.upsample_super_tokens(supers, None, grid, (H, W))
    slow = loop_upsample(supers, None, grid, (H, W))
    assert_same(fast, slow, [supers])


def test_sampling_takes_any_strides(device):
    x = random_leaf(2, 7, 10, 5, device=device)
    tokens = x.permute(0, 3, 1, 2)
    fast, _ = stvit.sample_super_tokens(tokens, (3, 4))
    slow, _ = loop_sample(tokens, (3, 4), 1)
    assert_same(fast, slow, [x])


def test_upsampling_takes_any_strides(device):
    supers = random_leaf(2, 3, 3, 5, device=device)
    association = random_leaf(9, 9, 12, 2, device=device)
    strided = supers.permute(0, 3, 1, 2), association.permute(3, 1, 2, 0), (3, 4), (7, 10)
    fast = stvit.upsample_super_tokens(*strided)
    assert_same(fast, loop_upsample(*strided), [supers, association])


def single_cell():
    """Equal tokens x in one cell, with |x|^2 = 1 and sqrt(C) = 2."""
    return torch.full((1, 4, 2, 2), 0.5, dtype=torch.float64)


SINGLE_CELL_WEIGHT = 1 / (1 + 8 * math.exp(-1 / 2))     # beside eight zero neighbours


def test_cells_outside_the_map_take_part_in_the_softmax():
    _, association = stvit.sample_super_tokens(single_cell(), (2, 2))
    expected = torch.full((1, 4), SINGLE_CELL_WEIGHT, dtype=torch.float64)
    assert_close(association[0, :, :, 4], expected)


def test_update_normalises_the_dropped_weights():
    supers, _ = stvit.sample_super_tokens(single_cell(), (2, 2))
    assert_close(supers, torch.full((1, 4, 1, 1), 0.5, dtype=torch.float64))


def test_upsampling_keeps_the_weights_dropped():
    supers, association = stvit.sample_super_tokens(single_cell(), (2, 2))
    upsampled = stvit.upsample_super_tokens(supers, association, (2, 2), (2, 2))
    assert_close(upsampled, SINGLE_CELL_WEIGHT * single_cell())


def test_sampling_gradcheck_without_iterations():
    """With iterations the association is held constant, so that gradcheck does not apply."""
    def supers(x):
        return stvit.sample_super_tokens(x, (2, 3), 0)[0]

    assert torch.autograd.gradcheck(supers, random_leaf(2, 2, 4, 5))


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_upsampling_gradcheck(iterations):
    x = random_leaf(2, 2, 4, 5)
    _, association = stvit.sample_super_tokens(x, (2, 3), iterations)

    def upsample(supers):
        return stvit.upsample_super_tokens(supers, association, (2, 3), (4, 5))

    assert torch.autograd.gradcheck(upsample, random_leaf(2, 2, 2, 2))


def test_association_of_large_equal_tokens_is_finite_in_half_precision(device):
    """256 products of 16 x 16 sum up to the limit of float16, 65504; scaled, to 4096."""
    tokens = torch.full((1, 2, 2, 6, 256), 16, dtype=torch.float16, device=device)
    association = stvit.associate(tokens, tokens[:, :, :, 0])
    expected = stvit.associate(tokens.float(), tokens[:, :, :, 0].float())
    assert_close(association, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, device):
    x = torch.randn(2, 8, 7, 10, device=device).to(dtype)
    supers, association = stvit.sample_super_tokens(x, (3, 4))
    exact_supers, exact_association = loop_sample(x.double(), (3, 4), 1)
    assert_close(association.double(), exact_association, rtol=0, atol=0.02)
    assert_close(supers.double(), exact_supers, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype, device):
    x = torch.randn(2, 8, 7, 10, device=device).to(dtype)
    supers, association = stvit.sample_super_tokens(x, (3, 4))
    upsampled = stvit.upsample_super_tokens(supers, association, (3, 4), (7, 10))
    assert (supers.dtype, association.dtype, upsampled.dtype) == (dtype, dtype, dtype)


@pytest.mark.parametrize("H, W, grid", [(6, 9, (2, 3)), (5, 7, (2, 2)), (3, 4, (4, 4))])
def test_token_attention_matches_whole_matrices(H, W, grid, device):
    """And, times the tokens, it gives what sampling, attention and up-sampling give (Eq. 14)."""
    x = torch.randn(1, 4, H, W, dtype=torch.float64, device=device)
    supers, association = stvit.sample_super_tokens(x, grid)
    cells = supers.shape[2:]
    M, P, _ = association[0].shape
    attention = torch.randn(M, M, dtype=torch.float64, device=device).softmax(1)
    rows = []
    for token in product(range(M), range(P)):
        rows.append(stvit.token_attention(association[0], attention, cells, token).flatten())
    rows = torch.stack(rows)                                                    # (N, N)
    assert_close(rows, loop_token_attention(association[0], attention, cells))
    attended = (supers.flatten(2) @ attention.T).view(supers.shape)
    y = stvit.upsample_super_tokens(attended, association, grid, (H, W))
    tokens = stvit.split_cells(x, grid).flatten(0, 3)                           # (N, C)
    mapped = (rows @ tokens).view(1, *cells, P, 4)
    assert_close(stvit.merge_cells(mapped, grid)[:, :H, :W].permute(0, 3, 1, 2), y)


# ------------------------------------------------------------------------------------------- layers
def channels_first(function, x, *arguments):
    """Apply a function of channels-first maps to x (B, H, W, C)."""
    return function(x.permute(0, 3, 1, 2), *arguments).permute(0, 2, 3, 1)


@pytest.mark.parametrize("bias_side", [None, 2])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("H, W, grid", SIZES[:-1])
def test_super_token_attention_matches_loops(H, W, grid, iterations, bias_side, device):
    module = stvit.SuperTokenAttention(12, 3, grid, iterations, bias_side).to(device).double()
    x = random_leaf(2, H, W, 12, device=device)
    supers, association = loop_sample(x.permute(0, 3, 1, 2), grid, iterations)
    attended = loop_attend(module, supers)
    slow = loop_upsample(attended, association, grid, (H, W)).permute(0, 2, 3, 1)
    assert_same(module(x), slow, [x, *module.parameters()])


@pytest.mark.parametrize("grid, bias_side", [((1, 1), None), ([1, 1], None), ((1, 1), 4)])
def test_grid_one_is_plain_attention(grid, bias_side, device):
    module = stvit.SuperTokenAttention(12, 3, grid, bias_side=bias_side).to(device).double()
    x = random_leaf(2, 4, 5, 12, device=device)
    slow = channels_first(partial(loop_attend, module), x)
    assert_same(module(x), slow, [x, *module.parameters()])


@pytest.mark.parametrize("heads", [0, 4])
def test_super_token_attention_refuses_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f"dim = 10 does not split into {heads} heads"):
        stvit.SuperTokenAttention(10, heads, (2, 2))


@pytest.mark.parametrize("conv, shortcut", [(True, True), (True, False), (False, True)])
def test_conv_ffn_matches_loops(conv, shortcut, device):
    module = stvit.ConvFFN(3, 2, conv, shortcut).to(device).double()
    x = random_leaf(2, 4, 5, 3, device=device)
    hidden = F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias))            # (B, H, W, 2 * C)
    if conv:
        local = loop_conv(module.conv, hidden)
        hidden = hidden + local if shortcut else local
    slow = F.linear(hidden, module.fc2.weight, module.fc2.bias)
    assert_same(module(x), slow, [x, *module.parameters()])


# ---------------------------------------------------------------------------------- block and model
TINY = {
    "depths": (1, 2, 1, 1),
    "dims": (16, 32, 24, 32),
    "heads": (1, 2, 3, 4),
    "grids": (4, 3, 1, 1),
    "layer_scale": (None, None, 0.5, 0.5),
}


def tiny(**overrides):
    return stvit.STViT(num_classes=5, drop_path_rate=0.0, **{**TINY, **overrides})


@pytest.mark.parametrize("projection", [True, False])
def test_no_classes_give_the_mean_of_the_projection(projection):
    model = tiny_factory(0, projection=projection).eval()
    images = torch.randn(2, 3, 64, 96)
    projected = model.proj(model.forward_features(images)[3])
    assert model(images).equal(projected.mean((2, 3)))


def gradient_norm(model, images):
    """Norm of all gradients of a fixed linear function of the maps and logits."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = 0
    for output in (*model.forward_features(images), model(images)):
        loss = loss + (output * torch.randn_like(output)).mean()
    loss.backward()
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return torch.stack(gradients).norm()


@pytest.mark.parametrize("training, blank_columns", [(True, 32), (False, 32), (False, 64)])
def test_blank_pixels_give_gradients_of_ordinary_size(training, blank_columns, device):
    """Zero padding, and in eval mode zero images. A whole batch of them has no variance."""
    model = stvit.stvit_s(drop_path_rate=0.0, depths=(1, 1, 2, 1)).to(device).train(training)
    images = torch.randn(2, 3, 64, 64, device=device)
    ordinary = gradient_norm(model, images)
    images[..., 64 - blank_columns:] = 0
    assert gradient_norm(model, images) <= 3 * ordinary


def test_a_batch_of_zero_images_gives_finite_gradients(device):
    model = stvit.stvit_s(drop_path_rate=0.0, depths=(1, 1, 2, 1)).to(device).train()
    assert gradient_norm(model, torch.zeros(2, 3, 64, 64, device=device)).isfinite()


@pytest.mark.parametrize("grids", [(2, 2, 2), (2, 2, 2, 2, 2), (0, 2, 2, 2), (2, 2, 2, -2)])
def test_grids_are_four_of_at_least_one(grids):
    with pytest.raises(ValueError, match="grids = .*expected 4 values of at least 1"):
        tiny(grids=grids)


def test_layer_scale_has_a_value_per_stage():
    with pytest.raises(ValueError, match="layer_scale = .*expected 4 values, one per stage"):
        tiny(layer_scale=(None, None, 0.5))


# -------------------------------------------------------------------------- ablations and relatives
@pytest.mark.parametrize("H, W", [(3, 3), (2, 5), (5, 7), (1, 4), (1, 1)])
def test_relative_position_bias_matches_loops(H, W, device):
    module = stvit.RelativePositionBias(2, 3).to(device).double()
    assert_same(module(H, W), loop_bias(module.weight, H, W), [module.weight])


@pytest.mark.parametrize("query_row, query_column, key_row, key_column, row, column", [
    (2, 0, 0, 1, 4, 1),     # two rows and minus one column apart
    (1, 2, 1, 2, 2, 2),     # no offset: the middle of the 5 x 5 table
])
def test_relative_position_bias_of_its_own_side_is_the_table(
        query_row, query_column, key_row, key_column, row, column):
    module = stvit.RelativePositionBias(2, 3)
    bias = module(3, 3).unflatten(2, (3, 3)).unflatten(4, (3, 3))               # (1, h, H, W, H, W)
    pair = bias[0, :, query_row, query_column, key_row, key_column]             # (h,)
    assert pair.equal(module.weight[0, :, row, column])


@pytest.mark.parametrize("H, W", [(4, 4), (3, 7), (1, 2)])
def test_position_table_matches_loops(H, W, device):
    module = stvit.PositionTable(3, 4).to(device).double()
    x = random_leaf(2, 3, H, W, device=device)
    assert_same(module(x), x + loop_resize(module.weight, (H, W)), [x, module.weight])


@pytest.mark.parametrize("H, W", [(8, 12), (9, 14)])
def test_patch_embedding_matches_loops(H, W, device):
    module = stvit.PatchEmbedding(5).to(device).double().eval()
    images = random_leaf(2, 3, H, W, device=device)
    kernel = module.conv.weight.permute(0, 2, 3, 1).flatten(1)                  # (C', 16 * 3)
    patches = []
    for cell in loop_cells(images, (4, 4)).values():                            # (B, 3, 16)
        patches.append(F.linear(cell.mT.flatten(1), kernel, module.conv.bias))
    slow = torch.stack(patches, -1) / math.sqrt(1 + module.norm.eps)    # BatchNorm as it starts
    slow = slow.unflatten(-1, (math.ceil(H / 4), math.ceil(W / 4)))
    assert_same(module(images), slow, [images, *module.conv.parameters()])


BARE = {"stem": "patch", "projection": False, "position": None, "conv_ffn": False}  # STA-4stage
STEM = {**BARE, "stem": "conv"}
PROJECTION = {**STEM, "projection": True}
SWIN = {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)}
ROWS = {  # overrides of STViT-S, parameters in M, multiply-adds in G
    "Table 6, STA-4stage": (BARE, "24.13", "3.970"),
    "Table 6, + conv stem": (STEM, "24.19", "4.262"),
    "Table 6, + projection": (PROJECTION, "25.23", "4.288"),
    "Table 6, + CPE": ({**PROJECTION, "position": "cpe"}, "25.29", "4.304"),
    "Table 6, w/o CPE, + APE": ({**PROJECTION, "position": "ape"}, "25.43", "4.288"),
    "Table 6, w/o CPE, + RPE": ({**PROJECTION, "position": "rpe"}, "25.27", "4.288"),
    "Table 6, + ConvFFN": ({}, "25.50", "4.367"),
    "Table 6, w/o shortcut": ({"ffn_shortcut": False}, "25.50", "4.367"),
    "Table 7, grids 8,1,1,1": ({**BARE, "grids": (8, 1, 1, 1)}, "24.13", "4.972"),
    "Table 7, grids 8,4,2,1": ({**BARE, "grids": (8, 4, 2, 1)}, "24.13", "3.270"),
    "Table 7, grids 4,2,1,1": ({**BARE, "grids": (4, 2, 1, 1)}, "24.13", "4.115"),
    "Table 7, 0 iterations": ({**BARE, "iterations": 0}, "24.13", "3.934"),
    "Table 7, 2 iterations": ({**BARE, "iterations": 2}, "24.13", "3.996"),
    "Table 9, Swin's size": ({**BARE, **SWIN}, "30.20", "4.353"),
    "Table 9, Swin's size, RPE": ({**BARE, **SWIN, "position": "rpe"}, "30.26", "4.353"),
    "Table 9, STViT-S's size": (BARE, "24.13", "3.970"),
    "Table 9, STViT-S's size, RPE": ({**BARE, "position": "rpe"}, "24.17", "3.970"),
}
PRINTED = {  # by the paper; Table 7 has no parameters
    "Table 6, STA-4stage": ("24.1", "3.97"),
    "Table 6, + conv stem": ("24.2", "4.26"),
    "Table 6, + projection": ("25.2", "4.29"),
    "Table 6, + CPE": ("25.3", "4.30"),
    "Table 6, w/o CPE, + APE": ("24.2", "4.26"),
    "Table 6, w/o CPE, + RPE": ("25.3", "4.29"),
    "Table 6, + ConvFFN": ("25.4", "4.37"),
    "Table 6, w/o shortcut": ("25.4", "4.37"),
    "Table 7, grids 8,1,1,1": ("", "4.97"),
    "Table 7, grids 8,4,2,1": ("", "3.27"),
    "Table 7, grids 4,2,1,1": ("", "4.15"),
    "Table 7, 0 iterations": ("", "3.93"),
    "Table 7, 2 iterations": ("", "4.00"),
    "Table 9, Swin's size": ("30", "4.3"),
    "Table 9, Swin's size, RPE": ("30", "4.3"),
    "Table 9, STViT-S's size": ("24", "4.0"),
    "Table 9, STViT-S's size, RPE": ("24", "4.0"),
}
MISPRINTS = {  # printed values that are not ours rounded
    "Table 6, w/o CPE, + APE": ["24.2", "4.26"],    # those of "+ conv stem"
    "Table 6, + ConvFFN": ["25.4"],                 # truncated
    "Table 6, w/o shortcut": ["25.4"],              # truncated
    "Table 7, grids 4,2,1,1": ["4.15"],             # two iterations would give 4.16
    "Table 9, Swin's size": ["4.3"],                # truncated
    "Table 9, Swin's size, RPE": ["4.3"],           # truncated
}
each_row = pytest.mark.parametrize("row", ROWS)


def exact_size(build, pixels):
    """Parameters in M, multiply-adds in G."""
    parameters, _, multiply_adds = complexity(build, pixels)
    with torch.device("meta"):
        multiply_adds += unseen_multiply_adds(build(), pixels)
    return parameters / 1e6, multiply_adds / 1e9


def rounds_to(value, printed):
    """Whether the value, rounded to as many digits, is the printed one."""
    digits = len(printed.partition(".")[2])
    return f"{value:.{digits}f}" == printed


@cache
def exact_size_of_row(row):
    overrides, _, _ = ROWS[row]
    return exact_size(partial(stvit.stvit_s, **overrides), 224)


@each_row
def test_rows_of_the_tables(row):
    _, expected_parameters, expected_multiply_adds = ROWS[row]
    parameters, multiply_adds = exact_size_of_row(row)
    assert f"{parameters:.2f}" == expected_parameters
    assert f"{multiply_adds:.3f}" == expected_multiply_adds


@each_row
def test_the_paper_prints_these_sizes(row):
    wrong = []
    for value, printed in zip(exact_size_of_row(row), PRINTED[row]):
        if printed and not rounds_to(value, printed):
            wrong.append(printed)
    assert wrong == MISPRINTS.get(row, [])


@pytest.mark.parametrize("factory, pixels, multiply_adds", [
    (stvit.stvit_s, 224, "4.37"),
    (stvit.stvit_b, 224, "9.87"),
    (stvit.stvit_l, 224, "15.60"),
    (stvit.stvit_s, 384, "14.16"),
    (stvit.stvit_b, 384, "31.49"),
    (stvit.stvit_l, 384, "49.75"),
])
def test_multiply_adds_of_the_variants(factory, pixels, multiply_adds):
    assert f"{exact_size(factory, pixels)[1]:.2f}" == multiply_adds


ABLATIONS = {
    "ape": {"stem": "patch", "position": "ape", "ffn_shortcut": False},
    "rpe": {"position": "rpe", "iterations": 2},
    "bare": {**BARE, "iterations": 0},
}
each_ablation = pytest.mark.parametrize("ablation", ABLATIONS)
each_image_size = pytest.mark.parametrize("H, W", [(33, 47), (50, 100)])


@each_ablation
@pytest.mark.parametrize("H, W", [(33, 47), (50, 100), (32, 32)])
def test_ablations_are_finite_under_autocast(ablation, H, W, device):
    model = tiny(**ABLATIONS[ablation]).to(device).eval()
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(torch.randn(2, 3, H, W, device=device))
    assert logits.isfinite().all()


@each_ablation
@each_image_size
def test_sizes_of_the_ablations_maps(ablation, H, W, device):
    model = tiny(**ABLATIONS[ablation]).to(device)
    maps = model.forward_features(torch.randn(2, 3, H, W, device=device))
    expected = [(math.ceil(H / s), math.ceil(W / s)) for s in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected


@each_ablation
@each_image_size
def test_ablations_use_every_parameter(ablation, H, W, device):
    model = tiny(**ABLATIONS[ablation]).to(device)
    logits = model(torch.randn(2, 3, H, W, device=device))
    (logits * torch.randn_like(logits)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        if parameter.ndim > 1:      # biases before a norm have none in exact arithmetic
            assert parameter.grad.count_nonzero() > 0, key


@each_ablation
def test_compiled_ablations_equal_eager(ablation):
    torch._dynamo.reset()
    model = tiny(**ABLATIONS[ablation]).double()
    images = torch.randn(2, 3, 50, 64, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(images), model(images), [*model.parameters()])


def position_layer():
    return nn.Sequential(stvit.PatchEmbedding(3), stvit.PositionTable(3, 7))


def bias_layer():
    return stvit.SuperTokenAttention(4, 2, (1, 1), bias_side=3)


@pytest.mark.parametrize("build, shapes", [
    (position_layer, ((2, 3, 5, 6), (2, 3, 7, 4))),
    (bias_layer, ((2, 5, 6, 4), (2, 7, 4, 4))),
])
def test_compiled_positions_with_dynamic_sizes_equal_eager(build, shapes):
    """The layers alone: torch's symbolic shapes are slow."""
    torch._dynamo.reset()
    layer = build().double()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for shape in shapes:
        x = random_leaf(*shape)
        assert_same(compiled(x), layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize("wrong, message", [
    ({"stem": "swin"}, "stem = 'swin', expected 'conv' or 'patch'"),
    ({"position": "rope"}, "position = 'rope', expected 'cpe', 'ape', 'rpe' or None"),
    ({"conv_ffn": False, "ffn_shortcut": False}, "ffn_shortcut = False, expected True"),
    ({"iterations": -1}, "iterations = -1, expected"),
    ({"grids": (8, 0, 1, 1)}, r"grids = \(8, 0, 1, 1\)"),
    ({"grids": (8, 4, 1)}, r"grids = \(8, 4, 1\), .*expected 4 values"),
])
def test_unknown_ablations_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


# --------------------------------------------------------------------------------- released weights
class TheirNorm(nn.Module):
    """Layer norm of a channels-first map."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TheirResidualConv(nn.Module):
    """x + depth-wise convolution.

    The first release has a diagonal kernel, `shortcut`, in place of the identity.
    """

    def __init__(self, dim, shortcut):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.shortcut = None
        if shortcut:
            diagonal = torch.eye(3).repeat(dim, 1, 1, 1)
            self.shortcut = nn.Parameter(diagonal, requires_grad=False)

    def forward(self, x):
        if self.shortcut is None:
            return x + self.conv(x)
        kernel = self.conv.weight + self.shortcut
        return F.conv2d(x, kernel, self.conv.bias, padding=1, groups=x.shape[1])


class TheirAttention(nn.Module):
    """Fold and unfold are convolutions with one-hot kernels, stored in every block."""

    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads = heads
        self.grid = grid
        one_hot = nn.Parameter(torch.eye(9).view(9, 1, 3, 3), requires_grad=False)
        self.unfold = nn.ParameterDict({"weights": one_hot})
        self.fold = nn.ParameterDict({"weights": one_hot})
        self.stoken_refine = nn.ModuleDict({
            "qkv": nn.Conv2d(dim, 3 * dim, 1),
            "proj": nn.Conv2d(dim, dim, 1),
        })

    def refine(self, x):
        B, C, H, W = x.shape
        d = C // self.heads
        qkv = self.stoken_refine["qkv"](x).view(B, self.heads, 3 * d, H * W)
        q, k, v = qkv.chunk(3, 2)                                               # each (B, h, d, N)
        weights = (q.mT @ k * d ** -0.5).softmax(-1)                            # (B, h, N, N)
        return self.stoken_refine["proj"]((v @ weights.mT).reshape(B, C, H, W))

    def forward(self, x):
        if self.grid == 1:
            return self.refine(x)
        B, C, H, W = x.shape
        x = F.pad(x, (0, -W % self.grid, 0, -H % self.grid))
        padded = x.shape[2:]
        rows = padded[0] // self.grid
        columns = padded[1] // self.grid
        pixels = F.unfold(x, self.grid, stride=self.grid)                       # (B, C * P, M)
        pixels = pixels.view(B, C, -1, rows * columns).permute(0, 3, 2, 1)      # (B, M, P, C)
        supers = F.adaptive_avg_pool2d(x, (rows, columns))
        affinity = (pixels @ self.unfolded(supers) * C ** -0.5).softmax(-1)     # (B, M, P, 9)
        column_sum = self.folded(affinity.sum(2)[:, :, None], rows, columns)
        supers = self.folded(pixels.mT @ affinity, rows, columns) / (column_sum + 1e-12)
        supers = self.refine(supers)
        x = self.unfolded(supers) @ affinity.mT                                 # (B, M, C, P)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)                                 # (B, C * P, M)
        x = F.fold(x, padded, self.grid, stride=self.grid)
        return x[:, :, :H, :W]

    def unfolded(self, x):
        """(B, C, H', W') -> (B, M, C, 9)."""
        B, C, _, _ = x.shape
        x = F.conv2d(x.flatten(0, 1)[:, None], self.unfold["weights"], padding=1)
        return x.unflatten(0, (B, C)).flatten(3).permute(0, 3, 1, 2)

    def folded(self, x, rows, columns):
        """(B, M, C, 9) -> (B, C, H', W')."""
        parts = x.permute(0, 2, 3, 1).flatten(0, 1)                             # (B * C, 9, M)
        parts = parts.unflatten(2, (rows, columns))                             # (B * C, 9, H', W')
        folded = F.conv_transpose2d(parts, self.fold["weights"], padding=1)
        return folded.view(x.shape[0], -1, rows, columns)


class TheirFFN(nn.Module):
    def __init__(self, dim, shortcut):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)
        self.conv = TheirResidualConv(4 * dim, shortcut)

    def forward(self, x):
        return self.fc2(self.conv(F.gelu(self.fc1(x))))


class TheirBlock(nn.Module):
    def __init__(self, dim, heads, grid, scale, shortcut):
        super().__init__()
        self.pos_embed = TheirResidualConv(dim, shortcut)
        self.norm1 = TheirNorm(dim)
        self.attn = TheirAttention(dim, heads, grid)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = TheirFFN(dim, shortcut)
        self.gamma_1 = nn.Parameter(torch.rand(1, dim, 1, 1)) if scale else None
        self.gamma_2 = nn.Parameter(torch.rand(1, dim, 1, 1)) if scale else None

    def forward(self, x):
        x = self.pos_embed(x)
        attended = self.attn(self.norm1(x))
        x = x + attended * (1 if self.gamma_1 is None else self.gamma_1)
        hidden = self.mlp2(self.norm2(x))
        return x + hidden * (1 if self.gamma_2 is None else self.gamma_2)


def their_stem(dim):
    half = dim // 2
    stem = nn.Sequential()
    for in_dim, out_dim, stride in ((3, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
        stem.append(nn.Conv2d(in_dim, out_dim, 3, stride, 1))
        stem.append(nn.GELU())
        stem.append(nn.BatchNorm2d(out_dim))
    return stem


class TheirSTViT(nn.Module):
    """The released model, channels-first.

    Its state dict has the names and shapes of the released files.
    """

    def __init__(self, num_classes, depths, dims, heads, grids, layer_scale, shortcut):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": their_stem(dims[0])})
        self.layers = nn.ModuleList()
        for i in range(4):
            blocks = nn.Sequential()
            for _ in range(depths[i]):
                blocks.append(TheirBlock(dims[i], heads[i], grids[i], layer_scale[i], shortcut))
            layer = nn.ModuleDict({"blocks": blocks})
            if i < 3:
                conv = nn.Conv2d(dims[i], dims[i + 1], 3, 2, 1)
                merge = nn.Sequential(conv, nn.BatchNorm2d(dims[i + 1]))
                layer["downsample"] = nn.ModuleDict({"proj": merge})
            self.layers.append(layer)
        self.proj = nn.Conv2d(dims[3], 1024, 1)
        self.norm = nn.BatchNorm2d(1024)
        self.head = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x)
        for layer in self.layers:
            x = layer["blocks"](x)
            if "downsample" in layer:
                x = layer["downsample"]["proj"](x)
        x = F.silu(self.norm(self.proj(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module", params=["identity", "shortcut"])
def theirs(request):
    """A small model of the last and of the first release.

    Every weight and statistic is away from its initial value.
    """
    torch.manual_seed(1)
    model = TheirSTViT(5, **TINY, shortcut=request.param == "shortcut").double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor += 0.1 * torch.rand_like(tensor)
        elif tensor.is_floating_point() and not name.endswith(("fold.weights", "shortcut")):
            tensor += 0.1 * torch.randn_like(tensor)
    return model


@pytest.mark.parametrize("H, W", [(64, 96), (50, 100)])
def test_load_released_gives_the_released_outputs(theirs, H, W, device):
    ours = tiny().double().eval()
    ours.load_released(theirs.state_dict())
    images = torch.randn(2, 3, H, W, dtype=torch.float64)
    assert_close(ours.to(device)(images.to(device)).cpu(), theirs(images))


def test_load_released_leaves_the_given_dict_as_it_was(theirs):
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    tiny().double().load_released(state)
    assert_close(state, dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("removed, missing", [
    ("layers.1.blocks.1.attn.stoken_refine.qkv.bias", "stages.1.1.attn.qkv.bias"),
    ("head.weight", "head.weight"),
])
def test_load_released_names_missing_tensors(theirs, removed, missing):
    state = theirs.state_dict()
    del state[removed]
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        tiny().load_released(state)


@pytest.mark.parametrize("added, message", [
    ({"layers.0.blocks.0.extra": torch.zeros(1)}, "Unexpected key.*stages.0.0.extra"),
    ({"proj.bias": torch.zeros(7)}, "size mismatch for proj.0.bias"),
])
def test_load_released_names_wrong_tensors(theirs, added, message):
    with pytest.raises(RuntimeError, match=message):
        tiny().load_released({**theirs.state_dict(), **added})


def tiny_factory(num_classes, **overrides):
    options = {**TINY, **overrides}
    return stvit.STViT(num_classes=num_classes, drop_path_rate=0.1, **options)


def checkpoint(state):
    return {"model": state, "step": 3}


@pytest.mark.parametrize("wrap", [dict, checkpoint])
def test_load_weights_reads_our_files(wrap, tmp_path):
    model = tiny_factory(3).eval()
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pt")
    loaded = stvit.load_weights(tiny_factory, tmp_path / "weights.pt")
    images = torch.randn(1, 3, 32, 64)
    assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_load_weights_gives_a_model_in_eval_mode(tmp_path):
    torch.save(tiny_factory(3).state_dict(), tmp_path / "weights.pt")
    assert not stvit.load_weights(tiny_factory, tmp_path / "weights.pt").training


def test_load_weights_reads_the_authors_file(theirs, tmp_path):
    torch.save({"model": theirs.state_dict()}, tmp_path / "released.pth")
    loaded = stvit.load_weights(tiny_factory, tmp_path / "released.pth")
    images = torch.randn(1, 3, 64, 96)
    assert_close(loaded(images).double(), theirs(images.double()), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ drawing
@pytest.mark.parametrize("panel", [1, 2])
def test_drawn_super_tokens_have_their_mean_colour(panel):
    """A uniform image keeps its colour, up to the yellow outlines.

    Its 100 x 60 pixels are no whole number of cells.
    """
    sheet = stvit.draw_super_tokens(tiny().eval(), Image.new("RGB", (100, 60), (90, 120, 40)))
    drawn = sheet.crop((panel * 108, 20, panel * 108 + 100, 80))
    colours = {colour for _, colour in drawn.getcolors()}
    assert colours == {(90, 120, 40), (255, 255, 0)}


@pytest.mark.parametrize("grid, bias_side", [((2, 3), None), ((1, 1), None), ((2, 2), 3)])
def test_attention_map_is_what_the_layer_does(grid, bias_side):
    """With one head and no biases, the layer's output is the map times the values, projected."""
    H, W = 5, 7
    attn = stvit.SuperTokenAttention(6, 1, grid, bias_side=bias_side).double()
    nn.init.zeros_(attn.qkv.bias)
    nn.init.zeros_(attn.proj.bias)
    x = torch.randn(1, H, W, 6, dtype=torch.float64)
    values = F.linear(x, attn.qkv.weight[12:]).view(H * W, 6)
    output = attn(x)
    for row, column in product(range(H), range(W)):
        weights = stvit.attention_map(attn, x, row, column)
        assert weights.shape == (H, W)
        assert_close(attn.proj(weights.flatten() @ values), output[0, row, column])


# ------------------------------------------------------------------------------------- command line
def exif_block(orientation, resolution=(72, 1)):
    """EXIF data with an orientation and the numerator and denominator of a signed resolution."""
    entries = struct.pack("<HHLHH", 0x112, 3, 1, orientation, 0)
    entries += struct.pack("<HHLL", 0x11A, 10, 1, 38)           # its value starts at byte 38
    header = b"II*\0" + struct.pack("<LH", 8, 2)                # first directory, two entries
    return b"Exif\0\0" + header + entries + struct.pack("<Lll", 0, *resolution)


@pytest.fixture
def photo():
    """40 x 80 pixels, each quarter of another colour."""
    image = Image.new("RGB", (40, 80), (255, 0, 0))
    image.paste((0, 255, 0), (20, 0, 40, 40))
    image.paste((0, 0, 255), (0, 40, 20, 80))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_image_turns_upright(orientation, photo, tmp_path):
    """As Pillow's own function, which writes the EXIF data back and fails on odd ones."""
    photo.save(tmp_path / "photo.png", exif=exif_block(orientation))
    with Image.open(tmp_path / "photo.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    loaded = stvit.load_image(tmp_path / "photo.png", longer_side=80)
    assert (np.asarray(loaded) == expected).all()


def test_odd_exif_data_do_not_hide_the_orientation(photo, tmp_path):
    """A resolution of -1/0, on which exif_transpose raises struct.error."""
    photo.save(tmp_path / "photo.jpg", exif=exif_block(6, resolution=(-1, 0)))
    assert stvit.load_image(tmp_path / "photo.jpg").size == (512, 256)


def test_image_with_unreadable_exif_data_stays_as_stored(photo, tmp_path):
    path = tmp_path / "photo.webp"
    photo.save(path, exif=exif_block(6))
    path.write_bytes(path.read_bytes().replace(b"II*\0", b"XX*\0"))
    assert stvit.load_image(path).size == (256, 512)


@pytest.mark.parametrize("error", [KeyError, TypeError, SyntaxError, struct.error])
def test_damaged_images_are_a_value_error(error, photo, tmp_path, monkeypatch):
    def load(_image):
        raise error("odd")

    photo.save(tmp_path / "photo.bmp")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match=f"damaged image .{error.__name__}: .*odd"):
        stvit.load_image(tmp_path / "photo.bmp")
