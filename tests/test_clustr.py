"""ClusTR's core and layers against slow references written from the paper.

Equivalence tests run in float64 with B > 1 and compare outputs and the gradients of all inputs.
Order and letters as in clustr.py: references, core, layers, block, model, ablations, drawing,
command line.
"""
import math
import struct
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from test_models import LargestTensor
from torch import nn
from torch.testing import assert_close

import clustr

TINY = dict(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 16, 16, 32), heads=(1, 2, 2, 4))


# --------------------------------------------------------------------------------------- references
def loop_density_peaks(x, k):
    """Eq. 1 and 2 for one sample (N, C), token by token: log density, delta, parent."""
    N, C = x.shape
    squared = torch.stack([((x - token) ** 2).sum(1) / C for token in x])   # (N, N)
    density = [-row.sort().values[:k].mean().item() for row in squared]
    rank = sorted(range(N), key=lambda i: (-density[i], i))                 # densest first
    delta = [squared[rank[0]].max().sqrt()] * N
    parent = [rank[0]] * N
    for position in range(1, N):
        i = rank[position]
        denser = rank[:position]
        distances = [squared[i, j].item() for j in denser]
        parent[i] = denser[distances.index(min(distances))]                 # first, densest on ties
        delta[i] = squared[i, parent[i]].sqrt()
    return torch.tensor(density, dtype=x.dtype), torch.stack(delta), torch.tensor(parent)


def loop_assign(log_density, delta, parent, clusters):
    """The clusters of one sample, following parents one by one; numbered by falling gamma."""
    N = len(parent)
    root = [i for i in range(N) if parent[i] == i][0]
    log_gamma = (log_density + delta.log()).tolist()
    log_gamma[root] = math.inf
    centres = sorted(range(N), key=lambda i: (-log_gamma[i], i))[:clusters]
    labels = []
    for i in range(N):
        while i not in centres:
            i = parent[i].item()
        labels.append(centres.index(i))
    return torch.tensor(labels)


def loop_clusters(x, k, clusters):
    """Clusters (B, N) of x (B, N, C)."""
    samples = [loop_assign(*loop_density_peaks(tokens, k), clusters) for tokens in x.detach()]
    return torch.stack(samples)


def loop_aggregate(x, score, index, clusters):
    """Eq. 3: softmax-weighted sums over the tokens of each cluster, one by one: (B, M, C)."""
    B, _, C = x.shape
    merged = x.new_zeros(B, clusters, C)
    for b, m in product(range(B), range(clusters)):
        members = index[b] == m
        weight = score[b, members].softmax(0)
        merged[b, m] = (weight[:, None] * x[b, members]).sum(0)
    return merged


def loop_attention(module, x):
    """Eq. 8 on x (B, H, W, C), scale by scale and head by head, K and V clustered as in Eq. 5."""
    B, H, W, C = x.shape
    d = C // module.heads
    tokens = x.flatten(1, 2)
    scores = iter(module.reduce)
    q = module.q(tokens)
    y = torch.zeros_like(q)
    for ratio, kv in zip(module.ratios, module.kv, strict=True):
        k, v = kv(tokens).split(C, -1)
        if ratio > 1:
            clusters = math.ceil(H * W / ratio)
            index = loop_clusters(tokens, module.neighbours, clusters)
            score = next(scores)(tokens).squeeze(-1)
            k = loop_aggregate(k, score, index, clusters)
            v = loop_aggregate(v, score, index, clusters)
        heads = []
        for i in range(module.heads):
            head = slice(i * d, (i + 1) * d)
            logits = q[..., head] @ k[..., head].mT / math.sqrt(d)          # (B, N, M)
            heads.append(logits.softmax(-1) @ v[..., head])
        y = y + torch.cat(heads, -1)
    return module.proj(y).view(B, H, W, C)


def assert_same(fast, slow, inputs):
    """Equal outputs, and equal gradients of all inputs for one random cotangent."""
    assert_close(fast, slow)
    cotangent = torch.randn_like(slow)
    fast_grads = torch.autograd.grad(fast, inputs, cotangent)
    slow_grads = torch.autograd.grad(slow, inputs, cotangent)
    assert_close(fast_grads, slow_grads)


def random_leaf(*shape, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def separated_tokens(*shape, scale, device):
    """LayerNorm-ed tokens, `scale` times as far from each other as those of the model."""
    x = torch.randn(shape, device=device)
    return scale * F.layer_norm(x, shape[-1:])


def assert_valid(index, clusters):
    """Every token is in a cluster, every cluster has a token."""
    for sample in index:
        assert sample.unique().tolist() == list(range(clusters))


# --------------------------------------------------------------------------------------------- core
PEAKS = [  # N, C, neighbours, chunk
    (1, 3, 5, 4),
    (3, 2, 5, 256),
    (16, 3, 5, 4),
    (37, 5, 5, 256),
    (40, 8, 3, 7),
    (50, 4, 1, 16),
]


@pytest.mark.parametrize("N, C, k, chunk", PEAKS)
def test_density_peaks_match_loops(N, C, k, chunk, device):
    x = torch.randn(3, N, C, dtype=torch.float64, device=device) + 5
    log_density, delta, parent = clustr.density_peaks(x, k, chunk)
    for i in range(3):
        slow_density, slow_delta, slow_parent = loop_density_peaks(x[i].cpu(), k)
        assert_close(log_density[i].cpu(), slow_density)
        assert_close(delta[i].cpu(), slow_delta)
        assert_close(parent[i].cpu(), slow_parent)


def test_density_peaks_match_the_docstring(device):
    """The short form with all distances at once, which clustr.density_peaks shows."""
    x = torch.randn(37, 5, dtype=torch.float64, device=device)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / 5 ** 0.5
    nearest = distance.topk(4, largest=False).values
    log_density = -nearest.square().mean(1)
    denser = log_density[None, :] > log_density[:, None]
    delta, parent = distance.where(denser, torch.inf).min(1)
    densest = log_density.argmax()
    delta[densest] = distance[densest].max()
    parent[densest] = densest
    expected = (log_density[None], delta[None], parent[None])
    assert_close(clustr.density_peaks(x[None], neighbours=4), expected)


@pytest.mark.parametrize("k, chunk", [(5, 256), (1, 16), (4, 11)])
def test_ties_go_to_the_smaller_index_and_the_denser_parent(k, chunk, device):
    """64 tokens at 3^4 positions: duplicates, equal densities, equal distances, all exact."""
    x = torch.randint(0, 3, (4, 64, 4), device=device).double()
    log_density, delta, parent = clustr.density_peaks(x, k, chunk)
    for i in range(4):
        slow_density, slow_delta, slow_parent = loop_density_peaks(x[i].cpu(), k)
        assert log_density[i].tolist() == slow_density.tolist()
        assert parent[i].tolist() == slow_parent.tolist()
        assert_close(delta[i].cpu(), slow_delta)    # vectorised square roots round differently


@pytest.mark.parametrize("chunk", [1, 64, 299, 1000])
def test_density_peaks_do_not_depend_on_the_chunk(chunk, device):
    x = torch.randn(2, 300, 6, dtype=torch.float64, device=device)
    in_one_chunk = clustr.density_peaks(x, chunk=300)
    assert_close(clustr.density_peaks(x, chunk=chunk), in_one_chunk)


def test_density_peaks_hold_no_map_of_tokens_by_tokens(device):
    x = torch.randn(2, 2000, 4, device=device)
    with LargestTensor() as largest:
        clustr.density_peaks(x, chunk=10)
    assert x.numel() < largest.numel <= 2 * 2016 * 10       # 2000 columns, in pairs of groups of 14


@pytest.mark.parametrize("shape, rows", [
    ((128, 3136, 64), 167),     # 2^26 entries
    ((128, 784, 128), 196),     # a quarter of the rows
    ((128, 196, 256), 196),     # all rows
    ((2, 67200, 64), 499),
    ((128, 49, 512), 160),
])
def test_rows_per_chunk_on_a_gpu(shape, rows):
    class GpuTokens:
        is_cuda = True
    GpuTokens.shape = shape
    assert clustr.rows_per_chunk(GpuTokens) == rows


def near_duplicates(device):
    x = 100 + torch.randn(1, 64, 8, device=device)
    x[:, 32:] = x[:, :32] + 1e-3 * torch.randn(1, 32, 8, device=device)
    return x


def test_distances_of_near_duplicates_survive_in_float32(device):
    """The expanded square cancels: distances of 1e-3 at coordinates around 100."""
    x = near_duplicates(device)
    log_density, _, _ = clustr.density_peaks(x, neighbours=2)
    expected, _, _ = loop_density_peaks(x[0].double().cpu(), 2)
    assert_close(log_density[0].double().cpu(), expected, rtol=0.2, atol=3e-7)


def test_distances_of_near_duplicates_are_not_negative(device):
    log_density, delta, _ = clustr.density_peaks(near_duplicates(device), neighbours=2)
    assert (log_density <= 0).all()
    assert (delta >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_density_peaks_run_in_float32_inside_autocast(dtype, device):
    x = torch.randn(2, 200, 16, device=device).to(dtype)
    expected = clustr.density_peaks(x.float())
    with torch.autocast(device.type, torch.bfloat16):
        peaks = clustr.density_peaks(x)
    assert_close(peaks, expected)


def test_a_cpu_converts_bfloat16_tokens_to_float32_inside_autocast():
    x = torch.randn(2, 200, 16).bfloat16()
    expected = clustr.density_peaks(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        peaks = clustr.density_peaks(x)
    assert_close(peaks, expected)


def truncated(values, exponent, bits):
    """Values rounded towards 0 to multiples of 2^(exponent - bits)."""
    shift = bits - exponent
    return torch.ldexp(torch.ldexp(values, shift).trunc(), -shift)


def emulated_similarities(rows, columns, products_per_sum, extra_bits):
    """As on tensor cores: exact products, several of which are added to the total at a time.

    Before each addition all addends are truncated to the last bit of the largest one, which has 24
    bits and `extra_bits`. After it the total is truncated to 24 bits.
    """
    B, R, channels = rows.shape
    total = rows.new_zeros(B, R, columns.shape[1], dtype=torch.float64)
    for start in range(0, channels, products_per_sum):
        stop = start + products_per_sum
        left = rows[:, :, None, start:stop].double()
        right = columns[:, None, :, start:stop].double()
        addends = torch.cat([total[..., None], left * right], 3)
        _, exponent = addends.abs().amax(3, keepdim=True).frexp()
        total = truncated(addends, exponent, 24 + extra_bits).sum(3)
        _, exponent = total.frexp()
        total = truncated(total, exponent, 24)
    return total.float()


EMULATED = {  # products added at a time, extra bits
    "A100-like": (8, 1),
    "H100-like": (16, 2),
}


@pytest.fixture(params=[*EMULATED, "cuda"] if torch.cuda.is_available() else EMULATED)
def tensor_cores(request, monkeypatch):
    """A device that multiplies bfloat16 tokens: a CPU that emulates tensor cores, or a GPU."""
    if request.param == "cuda":
        return torch.device("cuda")
    products_per_sum, extra_bits = EMULATED[request.param]

    def similarities(rows, columns):
        return emulated_similarities(rows, columns, products_per_sum, extra_bits)

    monkeypatch.setattr(clustr, "multiplies_bfloat16", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(clustr, "similarities", similarities)
    return torch.device("cpu")


def test_density_peaks_in_bfloat16_are_the_same_inside_autocast(tensor_cores):
    x = torch.randn(2, 50, 16, device=tensor_cores).bfloat16()
    expected = clustr.density_peaks(x)
    with torch.autocast(tensor_cores.type, torch.bfloat16):
        peaks = clustr.density_peaks(x)
    assert_close(peaks, expected)


def test_bfloat16_pieces_are_exact():
    values = torch.randn(2, 1000) * 2.0 ** torch.randint(-60, 60, (2, 1000))
    pieces = clustr.bfloat16_pieces(values)
    assert pieces.dtype == torch.bfloat16
    assert pieces.double().sum(2).tolist() == values.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA has these products")
@pytest.mark.parametrize("B, R, N, channels", [
    (1, 16, 16, 520),           # one block of results, for which cuBLAS may split the sum
    (3, 70, 50, 328),
    (8, 196, 196, 264),
])
def test_cuda_products_in_bfloat16_are_float32_sums(B, R, N, channels):
    rows = torch.randint(-8, 9, (B, R, channels), device="cuda").bfloat16()
    columns = torch.randint(-8, 9, (B, N, channels), device="cuda").bfloat16()
    if not clustr.multiplies_bfloat16(rows):
        pytest.skip("ROCm, or torch before 2.8")
    expected = torch.bmm(rows.double(), columns.double().mT)
    assert clustr.similarities(rows, columns).tolist() == expected.tolist()


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("N, C, k, chunk", [
    (3, 2, 5, 256), (37, 5, 5, 256), (50, 64, 1, 16), (70, 320, 5, 33),
])
def test_density_peaks_in_bfloat16_match_loops(N, C, k, chunk, offset, tensor_cores):
    """Around 100 the spacing of bfloat16 is 0.5, so that float32 holds all sums exactly."""
    x = (offset + F.layer_norm(torch.randn(3, N, C), (C,))).bfloat16()
    log_density, delta, parent = clustr.density_peaks(x.to(tensor_cores), k, chunk)
    for i in range(3):
        slow_density, slow_delta, slow_parent = loop_density_peaks(x[i].double(), k)
        assert_close(log_density[i].cpu().double(), slow_density, rtol=1e-5, atol=1e-6)
        assert_close(delta[i].cpu().double(), slow_delta, rtol=1e-5, atol=1e-6)
        assert parent[i].tolist() == slow_parent.tolist()


@pytest.mark.parametrize("C", [64, 320])
def test_a_common_outlier_channel_in_bfloat16_costs_little(C, tensor_cores):
    """Tokens are not centred: errors grow with their norm, of which one channel is 30^2."""
    x = F.layer_norm(torch.randn(2, 70, C), (C,))
    x[:, :, 3] = 30
    x = x.bfloat16()
    log_density, _, _ = clustr.density_peaks(x.to(tensor_cores))
    for i in range(2):
        slow_density, _, _ = loop_density_peaks(x[i].double(), 5)
        assert_close(log_density[i].cpu().double(), slow_density, rtol=0, atol=2e-5)


def test_ties_in_bfloat16_go_to_the_smaller_index_and_the_denser_parent(tensor_cores):
    """As in float64: 64 tokens at 3^4 positions."""
    x = torch.randint(0, 3, (4, 64, 4), device=tensor_cores).bfloat16()
    _, _, parent = clustr.density_peaks(x, 4, 11)
    for i in range(4):
        _, _, slow_parent = loop_density_peaks(x[i].cpu().double(), 4)
        assert parent[i].tolist() == slow_parent.tolist()


@pytest.mark.parametrize("C", [64, 320, 512])
@pytest.mark.parametrize("outlier", [0, 30])
def test_copies_in_bfloat16_have_distance_zero(C, outlier, tensor_cores):
    """What tensor cores truncate counts as rounding errors, a common large channel included."""
    x = F.layer_norm(torch.randn(2, 98, C), (C,))
    x[:, :, 0] += outlier
    x = x.bfloat16().to(tensor_cores)
    x[:, 50:] = x[:, :1].clone()
    log_density, delta, _ = clustr.density_peaks(x)
    assert log_density[:, 50:].count_nonzero() == 0
    assert delta[:, 50:].count_nonzero() == 0


def test_density_peaks_have_no_gradient():
    log_density, delta, _ = clustr.density_peaks(torch.randn(2, 20, 4, requires_grad=True))
    assert not log_density.requires_grad
    assert not delta.requires_grad


@pytest.mark.parametrize("argument", ["neighbours", "chunk"])
def test_density_peaks_reject_less_than_one(argument):
    with pytest.raises(ValueError, match=f"{argument} = 0.*expected at least 1"):
        clustr.density_peaks(torch.randn(1, 10, 2), **{argument: 0})


CLUSTERS = [(1, 1), (10, 1), (10, 10), (37, 5), (37, 36)]     # N, M


@pytest.mark.parametrize("N, clusters", CLUSTERS)
def test_clusters_match_loops(N, clusters, device):
    x = torch.randn(3, N, 4, dtype=torch.float64, device=device)
    index = clustr.assign_clusters(*clustr.density_peaks(x), clusters)
    assert index.tolist() == loop_clusters(x.cpu(), 5, clusters).tolist()
    assert_valid(index, clusters)


@pytest.mark.parametrize("cut", [1, 20])
def test_the_longest_chain_is_followed(cut, device):
    """35 tokens, each the parent of the next; the chain is cut in front of one token."""
    parent = torch.arange(-1, 34, device=device).clamp(min=0)[None]
    log_density = -torch.arange(35., device=device)[None]
    delta = torch.ones(1, 35, device=device)
    delta[0, cut] = 1e30
    index = clustr.assign_clusters(log_density, delta, parent, 2)
    assert index.tolist() == [[0] * cut + [1] * (35 - cut)]


def test_equal_gamma_goes_to_the_smaller_index(device):
    """A star of 300 equal tokens with token 3 as the parent of all."""
    ones = torch.ones(1, 300, device=device)
    parent = torch.full((1, 300), 3, device=device)
    index = clustr.assign_clusters(-ones, ones, parent, 100)
    centres = [3, 0, 1, 2, *range(4, 100)]
    assert index[0, centres].tolist() == list(range(100))
    assert index[0, 100:].unique().tolist() == [0]


def test_gamma_does_not_underflow(device):
    """Tokens so far from each other that every density is 0 in float32."""
    x = separated_tokens(2, 37, 64, scale=10, device=device)
    log_density, delta, parent = clustr.density_peaks(x)
    assert log_density.exp().max() == 0
    index = clustr.assign_clusters(log_density, delta, parent, 9)
    assert index.tolist() == loop_clusters(x.double().cpu(), 5, 9).tolist()


def test_copies_of_a_token_are_no_centres(device):
    """48 copies have gamma 0 but for rounding, which must not lift them above other tokens."""
    x = separated_tokens(1, 98, 64, scale=5, device=device)
    x[:, 50:] = x[:, :1].clone()
    index = clustr.assign_clusters(*clustr.density_peaks(x), 25)
    assert len(index[0, 50:].unique()) == 1


def make_identical(x):
    x[:] = x[:, :1].clone()


def zero_half(x):
    x[:, 40:] = 0


def make_pairs(x):
    x[:, 1::2] = x[:, ::2]


def scale_some(factor):
    def scale(x):
        x[:, ::7] *= factor
    return scale


FINITE_FILLS = {
    "identical": make_identical,
    "half zero": zero_half,
    "pairs": make_pairs,
    "huge": scale_some(1e6),
}
BROKEN_FILLS = {
    "nan": scale_some(math.nan),
    "inf": scale_some(math.inf),
    "overflow": scale_some(1e20),
}


@pytest.mark.parametrize("fill", FINITE_FILLS.values(), ids=FINITE_FILLS)
def test_density_peaks_of_odd_tokens_are_finite(fill, device):
    x = torch.randn(2, 98, 6, device=device)
    fill(x)
    log_density, delta, _ = clustr.density_peaks(x)
    assert log_density.isfinite().all()
    assert delta.isfinite().all()


@pytest.mark.parametrize("clusters", [1, 7, 49, 98])
@pytest.mark.parametrize(
    "fill",
    [*FINITE_FILLS.values(), *BROKEN_FILLS.values()],
    ids=[*FINITE_FILLS, *BROKEN_FILLS],
)
def test_odd_and_broken_tokens_give_valid_clusters(fill, clusters, device):
    x = torch.randn(2, 98, 6, device=device)
    fill(x)
    torch.full((10 ** 6,), -1, device=device)   # what uninitialised memory holds afterwards
    index = clustr.assign_clusters(*clustr.density_peaks(x), clusters)
    assert_valid(index, clusters)


@pytest.mark.parametrize("fill", FINITE_FILLS.values(), ids=FINITE_FILLS)
def test_density_peaks_in_bfloat16_of_odd_tokens_are_finite(fill, tensor_cores):
    x = torch.randn(2, 98, 6, device=tensor_cores)
    fill(x)
    log_density, delta, _ = clustr.density_peaks(x.bfloat16())
    assert log_density.isfinite().all()
    assert delta.isfinite().all()


@pytest.mark.parametrize("fill", BROKEN_FILLS.values(), ids=BROKEN_FILLS)
def test_broken_tokens_in_bfloat16_give_valid_clusters(fill, tensor_cores):
    x = torch.randn(2, 98, 6, device=tensor_cores)
    fill(x)
    index = clustr.assign_clusters(*clustr.density_peaks(x.bfloat16()), 7)
    assert_valid(index, 7)


@pytest.mark.parametrize("clusters", [0, 11])
def test_impossible_number_of_clusters_raises(clusters):
    peaks = clustr.density_peaks(torch.randn(1, 10, 2))
    with pytest.raises(ValueError, match=f"clusters = {clusters}, expected 1 to 10"):
        clustr.assign_clusters(*peaks, clusters)


def test_cluster_tokens_passes_torchs_checks(device):
    x = torch.randn(2, 30, 4, device=device)
    torch.library.opcheck(clustr.cluster_tokens, (x, 5, [15, 4]))


def test_cluster_tokens_assigns_each_number_of_clusters(device):
    x = torch.randn(2, 30, 4, device=device)
    peaks = clustr.density_peaks(x, 3)
    expected = [clustr.assign_clusters(*peaks, clusters) for clusters in (15, 4)]
    assert_close(clustr.cluster_tokens(x, 3, [15, 4]), torch.stack(expected))


@pytest.mark.parametrize("N, clusters", CLUSTERS)
def test_aggregation_matches_loops(N, clusters, device):
    x = random_leaf(3, N, 4, device=device)
    score = random_leaf(3, N, device=device)
    index = loop_clusters(x.cpu(), 5, clusters).to(device)
    fast = clustr.aggregate(x, score, index, clusters)
    slow = loop_aggregate(x, score, index, clusters)
    assert_same(fast, slow, [x, score])


def test_aggregation_survives_extreme_scores(device):
    x = torch.randn(1, 4, 3, device=device)
    index = torch.tensor([[0, 0, 1, 1]], device=device)
    score = torch.tensor([[1e4, -1e4, -1e4, -1e4]], device=device, requires_grad=True)
    merged = clustr.aggregate(x, score, index, 2)
    assert_close(merged, torch.stack([x[:, 0], x[:, 2:].mean(1)], 1))
    merged.sum().backward()
    assert score.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aggregation_of_half_precision_sums_in_float32(dtype, device):
    """2000 tokens in two clusters: sums in half precision would stop growing."""
    x = torch.rand(1, 2000, 3, device=device).to(dtype)
    score = torch.rand(1, 2000, device=device).to(dtype)
    index = (torch.arange(2000, device=device) % 2)[None]
    merged = clustr.aggregate(x, score, index, 2)
    expected = clustr.aggregate(x.float(), score.float(), index, 2)
    assert merged.dtype == dtype
    assert_close(merged.float(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one CPU thread sums in one order")
@pytest.mark.usefixtures("deterministic")
def test_aggregation_is_deterministic_on_request():
    x = torch.randn(4, 500, 8, device="cuda", requires_grad=True)
    score = torch.randn(4, 500, device="cuda", requires_grad=True)
    index = torch.randint(0, 3, (4, 500), device="cuda")

    def output_and_gradients():
        merged = clustr.aggregate(x, score, index, 3)
        return merged, *torch.autograd.grad(merged.square().sum(), (x, score))

    first = output_and_gradients()
    for _ in range(5):
        assert_close(output_and_gradients(), first, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("ratios, neighbours", [
    ((4, 2), 3), ((16, 1), 3), ((1,), 3), ((3,), 3), ((100, 7), 3), ((4, 2), 1),
])
@pytest.mark.parametrize("H, W", [(5, 7), (4, 4)])
def test_clustering_guided_attention_matches_loops(ratios, neighbours, H, W, device):
    module = clustr.ClusteringGuidedAttention(12, 3, ratios, neighbours)
    module = module.to(device).double()
    x = random_leaf(2, H, W, 12, device=device)
    assert_same(module(x), loop_attention(module, x), [x, *module.parameters()])


def test_ratio_one_is_plain_attention(device):
    """Eq. 4."""
    module = clustr.ClusteringGuidedAttention(12, 3, (1,)).to(device).double()
    plain = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, device=device)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([module.q.weight, module.kv[0].weight]))
        plain.in_proj_bias.copy_(torch.cat([module.q.bias, module.kv[0].bias]))
    plain.out_proj = module.proj
    x = random_leaf(2, 5, 7, 12, device=device)
    tokens = x.flatten(1, 2)
    expected = plain(tokens, tokens, tokens)[0].view_as(x)
    assert_same(module(x), expected, [x])


def test_one_clustering_serves_all_ratios(monkeypatch):
    shapes = []
    density_peaks = clustr.density_peaks

    def counted(x, neighbours, chunk):
        shapes.append(x.shape)
        return density_peaks(x, neighbours, chunk)

    monkeypatch.setattr(clustr, "density_peaks", counted)
    clustr.ClusteringGuidedAttention(12, 3, (8, 4, 2, 1))(torch.randn(2, 5, 7, 12))
    assert shapes == [(2, 35, 12)]


def test_conv_ffn_order():
    """The convolution is between the first linear layer and the GELU, without a shortcut."""
    ffn = clustr.ConvFFN(3, 2).double()
    x = random_leaf(2, 4, 5, 3)
    hidden = F.linear(x, ffn.fc1.weight, ffn.fc1.bias)
    padded = F.pad(hidden, (0, 0, 1, 1, 1, 1))                              # (B, H+2, W+2, 6)
    conv = ffn.conv.bias
    for i, j in product(range(3), repeat=2):
        conv = conv + padded[:, i:i + 4, j:j + 5] * ffn.conv.weight[:, 0, i, j]
    expected = F.linear(F.gelu(conv), ffn.fc2.weight, ffn.fc2.bias)
    assert_same(ffn(x), expected, [x, *ffn.parameters()])


WRONG_ARGUMENTS = [
    ({"heads": 5}, "dim = 12 does not split into 5 heads"),
    ({"ratios": ()}, "ratios = "),
    ({"ratios": (4, 0)}, "ratios = "),
    ({"ratios": (2.5,)}, "ratios = .*whole numbers"),
    ({"neighbours": 0}, "neighbours = 0"),
    ({"neighbours": 2.5}, "neighbours = 2.5, expected a whole number"),
    ({"aggregation": "mean"}, "aggregation = 'mean'"),
    ({"aggregation": "grid", "ratios": (8,)}, "ratio = 8"),
]


@pytest.mark.parametrize("arguments, message", WRONG_ARGUMENTS)
def test_attention_rejects_wrong_arguments(arguments, message):
    arguments = {"dim": 12, "heads": 3, "ratios": (4,), **arguments}
    with pytest.raises(ValueError, match=message):
        clustr.ClusteringGuidedAttention(**arguments)


# ---------------------------------------------------------------------------------- block and model
def test_block_order():
    """Eq. 9."""
    block = clustr.clustr_t(**TINY).double().eval().stages[0][0]
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    z = block.attn(block.norm1(x)) + x
    assert_close(block(x), block.ffn(block.norm2(z)) + z)


def test_classifier_takes_the_mean_of_the_last_map():
    model = clustr.clustr_t(**TINY).double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    pooled = model.forward_features(images)[3].flatten(2).mean(2)
    assert_close(model(images), model.head(pooled))


def test_without_classes_the_model_returns_pooled_features():
    model = clustr.clustr_t(**{**TINY, "num_classes": 0}).eval()
    images = torch.randn(2, 3, 64, 96)
    pooled = model.forward_features(images)[3].mean((2, 3))
    assert_close(model(images), pooled)


WRONG_OPTIONS = [
    ({"depths": (1, 1, 1)}, "depths = "),
    ({"depths": (1, 1, 0, 1)}, "depths = "),
    ({"dims": (8, 16, 16, -32)}, "dims = "),
    ({"heads": (1, 2, 2, 4, 4)}, "heads = "),
    ({"heads": (0, 2, 2, 4)}, "heads = "),
    ({"heads": (1, 2, 3, 4)}, "dim = 16 does not split into 3 heads"),
    ({"ratios": ((16,), (4,), (1,))}, "ratios = .*4 tuples"),
    ({"num_classes": -1}, "num_classes = -1"),
    ({"drop_path_rate": 1.0}, "drop_path_rate = 1.0"),
    ({"drop_path_rate": -0.1}, "drop_path_rate = -0.1"),
]


@pytest.mark.parametrize("overrides, message", WRONG_OPTIONS)
def test_model_rejects_wrong_options(overrides, message):
    with pytest.raises(ValueError, match=message):
        clustr.clustr_t(**{**TINY, **overrides})


@pytest.fixture(scope="module")
def untrained():
    return clustr.clustr_t()


def test_initial_weights_of_convolutions(untrained):
    weight = untrained.embeds[1].conv.weight
    assert_close(weight.std(), torch.tensor(math.sqrt(2 / (9 * 128))), rtol=0.02, atol=0)


def test_initial_weights_of_depthwise_convolutions(untrained):
    weight = untrained.stages[0][0].ffn.conv.weight
    assert_close(weight.std(), torch.tensor(math.sqrt(2 / 9)), rtol=0.05, atol=0)


def test_initial_weights_of_linear_layers(untrained):
    weight = untrained.stages[3][0].attn.q.weight
    assert_close(weight.std(), torch.tensor(0.02), rtol=0.02, atol=0)


def gradient_norm(images):
    """Of the loss of an untrained clustr_t, over all its parameters."""
    torch.manual_seed(0)
    model = clustr.clustr_t(num_classes=10)
    F.cross_entropy(model(images), torch.tensor([1, 3])).backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters()]
    return torch.stack(squares).sum().sqrt()


@pytest.mark.parametrize("first_zero_column", [0, 32])
def test_zero_pixels_give_gradients_of_ordinary_size(first_zero_column):
    """With biases of 0 in the patch embeddings: NaN for a zero image, 2e4 for a half-padded one."""
    images = torch.randn(2, 3, 64, 64)
    ordinary = gradient_norm(images)
    images[..., first_zero_column:] = 0
    assert gradient_norm(images) < 3 * ordinary


# -------------------------------------------------------------------------- ablations and relatives
@pytest.mark.parametrize("H, W", [(4, 6), (5, 7), (2, 3)])
def test_grid_reduction_matches_loops(H, W, device):
    module = clustr.GridReduction(4, 4).to(device).double()
    x = random_leaf(2, H, W, 4, device=device)
    padded = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    reduced = []
    for i, j in product(range(0, H, 2), range(0, W, 2)):
        cell = padded[:, i:i + 2, j:j + 2]                                  # (B, 2, 2, C)
        merged = torch.einsum("bijc,ocij->bo", cell, module.conv.weight) + module.conv.bias
        reduced.append(module.norm(merged))
    assert_same(module(x), torch.stack(reduced, 1), [x, *module.parameters()])


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_nearest_keys_attention_matches_loops(keep, device):
    q = random_leaf(2, 3, 5, 4, device=device)
    k = random_leaf(2, 3, 6, 4, device=device)
    v = random_leaf(2, 3, 6, 4, device=device)
    slow = torch.zeros_like(q)
    for b, h, n in product(range(2), range(3), range(5)):
        logits = k[b, h] @ q[b, h, n] / 2                                   # (M,)
        kept = logits.argsort(descending=True)[:keep]
        slow[b, h, n] = logits[kept].softmax(0) @ v[b, h, kept]
    assert_same(clustr.nearest_keys_attention(q, k, v, keep), slow, [q, k, v])


SINGLE_SCALE = ((64,), (16,), (4,), (1,))
FINER_SINGLE_SCALE = ((16,), (4,), (1,), (1,))
ABLATIONS = {
    "Table 7": {"ratios": SINGLE_SCALE, "aggregation": "grid"},
    "Table 8": {"ratios": SINGLE_SCALE, "aggregation": "knn"},
    "Table 9, row 1": {"ratios": SINGLE_SCALE},
    "Table 9, row 2": {"ratios": FINER_SINGLE_SCALE},
}
SIZES = [  # factory, overrides, parameters in M as printed
    pytest.param("clustr_t", {}, 11.7, id="Table 2, T"),
    pytest.param("clustr_s", {}, 22.7, id="Table 2, S"),
    pytest.param("clustr_b", {}, 40.2, id="Table 2, B"),
    pytest.param("clustr_t", ABLATIONS["Table 7"], 13.2, id="Table 7"),
    pytest.param("clustr_t", ABLATIONS["Table 8"], 13.2, id="Table 8"),
    pytest.param("clustr_t", ABLATIONS["Table 9, row 1"], 10.8, id="Table 9, row 1"),
    pytest.param("clustr_t", ABLATIONS["Table 9, row 2"], 10.8, id="Table 9, row 2"),
]


@pytest.mark.parametrize("factory, overrides, millions", SIZES)
def test_sizes_are_those_of_the_papers_tables(factory, overrides, millions):
    with torch.device("meta"):
        model = getattr(clustr, factory)(**overrides)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e6, 1) == millions


@pytest.mark.parametrize("overrides", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations_train_at_any_size(overrides, device):
    model = clustr.clustr_t(**TINY, **overrides).to(device)
    model(torch.randn(2, 3, 45, 70, device=device)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if parameter.ndim > 1:
            assert parameter.grad.count_nonzero(), name


# ------------------------------------------------------------------------------------------ drawing
def draw_noise():
    model = clustr.clustr_t(**TINY).eval()
    return clustr.draw_clusters(model, Image.effect_noise((128, 96), 80).convert("RGB"))


def test_drawing_has_a_panel_per_ratio_above_one():
    assert draw_noise().size == (6 * 136 - 8, 116)      # with the image


def test_panels_have_a_colour_per_cluster():
    sheet = draw_noise()
    clusters = [12, 48, 12, 48, 12]     # 768, 768, 192, 192, 48 tokens, ratios 64, 16, 16, 4, 4
    for i, count in enumerate(clusters, 1):
        panel = sheet.crop((136 * i, 20, 136 * i + 128, 116))
        assert len(panel.getcolors()) == count


@pytest.mark.parametrize("ratios", [(4, 2), (16, 1), (1,), (3, 3)])
def test_attention_maps_are_what_the_layer_does(ratios):
    """With one head and no biases: the maps of all scales times the values, projected (Eq. 8)."""
    H, W = 5, 7
    attn = clustr.ClusteringGuidedAttention(6, 1, ratios).double()
    nn.init.zeros_(attn.proj.bias)
    x = torch.randn(1, H, W, 6, dtype=torch.float64)
    tokens = x.view(H * W, 6)
    output = loop_attention(attn, x).view(H * W, 6)
    for token in range(H * W):
        maps = clustr.attention_maps(attn, x, token)
        y = 0
        for weights, to_kv in zip(maps, attn.kv, strict=True):
            y = y + weights @ to_kv(tokens)[:, 6:]
        assert_close(attn.proj(y), output[token])


def test_attention_maps_sum_to_one():
    attn = clustr.ClusteringGuidedAttention(12, 3, (4, 1))
    maps = clustr.attention_maps(attn, 10 * torch.randn(1, 5, 7, 12), token=9)
    for weights in maps:
        assert_close(weights.sum().double(), torch.ones((), dtype=torch.float64))


def test_a_panel_per_ratio_shows_the_attention_of_a_token():
    model = clustr.clustr_t(**TINY).eval()
    image = Image.effect_noise((128, 96), 80).convert("RGB")
    sheet = clustr.draw_attention(model, image, (0.99, 0))
    assert sheet.size == (8 * 136 - 8, 116)             # with the image


# ------------------------------------------------------------------------------------- command line
def exif_with_broken_rational(orientation):
    """EXIF data with an orientation and a resolution of -1 / 0, which Pillow cannot write."""
    orientation_entry = struct.pack("<HHLHH", 0x112, 3, 1, orientation, 0)
    resolution_entry = struct.pack("<HHLL", 0x11A, 10, 1, 38)
    entries = struct.pack("<H", 2) + orientation_entry + resolution_entry
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + entries + struct.pack("<Lll", 0, -1, 0)


def save_half_red(path, **options):
    """A 40 x 20 image, red in its left half and blue in its right half."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    image.save(path, **options)


def test_odd_exif_data_still_turns_the_image(tmp_path):
    save_half_red(tmp_path / "odd.jpg", exif=exif_with_broken_rational(orientation=6))
    image = clustr.load_image(tmp_path / "odd.jpg")
    assert image.size == (256, 512)
    assert image.getpixel((128, 100))[0] > 200      # red above


def test_unreadable_exif_data_leaves_the_image_as_stored(tmp_path):
    path = tmp_path / "unreadable.webp"
    save_half_red(path, exif=b"Exif\0\0XX*\0" + bytes(20))
    assert clustr.load_image(path).size == (512, 256)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_pillows(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    save_half_red(path, exif=exif)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored)
    turned = clustr.turn_upright(Image.open(path))
    assert turned.tobytes() == expected.tobytes()


PILLOW_ERRORS = [struct.error, SyntaxError, Image.DecompressionBombError, OSError]


@pytest.mark.parametrize("error", PILLOW_ERRORS)
def test_whatever_pillow_raises_becomes_one_line(error, tmp_path, monkeypatch, capsys):
    def raise_error(_):
        raise error("two\nlines")

    monkeypatch.setattr(Image, "open", raise_error)
    monkeypatch.setattr("sys.argv", ["clustr.py", str(tmp_path / "photo.jpg")])
    with pytest.raises(SystemExit):
        clustr.main()
    message = capsys.readouterr().err
    assert "photo.jpg" in message
    assert message.count("\n") == 1
