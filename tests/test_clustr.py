"""ClusTR's core and layers against slow references written from the paper.

Equivalence tests run in float64 with B > 1 and compare outputs and the gradients of all inputs. Order as in clustr.py: references,
core, layers, ablations, drawing. Letters as in clustr.py.
"""
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_models import LargestTensor
from torch import nn
from torch.testing import assert_close

from clustr import (
    ClusteringGuidedAttention,
    ConvFFN,
    GridReduction,
    aggregate,
    assign_clusters,
    cluster_tokens,
    clustr_b,
    clustr_s,
    clustr_t,
    density_peaks,
    draw_clusters,
    nearest_keys_attention,
)


# ---------------------------------------------------------------------------------------------------------- references
def loop_density_peaks(x, k):
    """Eq. 1 and 2 for one sample (N, C), token by token: log density, delta, parent."""
    N, C = x.shape
    squared = torch.stack([((x - token) ** 2).sum(1) / C for token in x])                               # (N, N)
    density = [-row.sort().values[:k].mean().item() for row in squared]
    rank = sorted(range(N), key=lambda i: (-density[i], i))                                             # the strict order
    delta, parent = [], []
    for i in range(N):
        denser = rank[:rank.index(i)]
        nearest = min(denser, key=lambda j: (squared[i, j].item(), rank.index(j)), default=i)
        delta.append(math.sqrt(squared[i, nearest] if denser else squared[i].max()))
        parent.append(nearest)
    return torch.tensor(density, dtype=x.dtype), torch.tensor(delta, dtype=x.dtype), torch.tensor(parent)


def loop_assign(log_density, delta, parent, clusters):
    """The partition of one sample, following parents one by one; clusters numbered by falling log gamma, the densest token's first."""
    N = len(parent)
    root = next(i for i in range(N) if parent[i] == i)
    gamma = [math.inf if i == root else log_density[i].item() + (math.log(delta[i]) if delta[i] > 0 else -math.inf) for i in range(N)]
    centres = sorted(range(N), key=lambda i: (-gamma[i], i))[:clusters]

    def follow(i):
        while i not in centres:
            i = parent[i].item()
        return centres.index(i)
    return torch.tensor([follow(i) for i in range(N)])


def loop_clusters(x, k, clusters):
    """Clusters (B, N) of x (B, N, C)."""
    return torch.stack([loop_assign(*loop_density_peaks(tokens.detach(), k), clusters) for tokens in x])


def loop_aggregate(x, score, index, clusters):
    """Softmax-weighted sums of the tokens of each cluster, one cluster at a time: (B, M, C)."""
    samples = []
    for tokens, s, members in zip(x, score, index, strict=True):
        rows = [(members == m).nonzero().flatten().tolist() for m in range(clusters)]
        samples.append(torch.stack([(s[row].softmax(0)[:, None] * tokens[row]).sum(0) for row in rows]))
    return torch.stack(samples)


def loop_attention(module, x):
    """Eq. 8 on x (B, H, W, C), scale by scale and head by head, K and V projected first and then clustered as in Eq. 5."""
    B, H, W, C = x.shape
    tokens, d, y, scores = x.flatten(1, 2), C // module.heads, 0, iter(module.reduce)
    q = module.q(tokens)
    for ratio, kv in zip(module.ratios, module.kv, strict=True):
        k, v = kv(tokens).split(C, -1)
        if ratio > 1:
            clusters = math.ceil(H * W / ratio)
            index, score = loop_clusters(tokens, module.k, clusters), next(scores)(tokens).squeeze(-1)
            k, v = (loop_aggregate(t, score, index, clusters) for t in (k, v))
        heads = []
        for i in range(module.heads):
            part = slice(i * d, (i + 1) * d)
            weights = (q[..., part] @ k[..., part].mT / math.sqrt(d)).softmax(-1)                       # (B, N, M)
            heads.append(weights @ v[..., part])
        y = y + torch.cat(heads, -1)
    return module.proj(y).view(B, H, W, C)


def assert_same(fast, slow, inputs):
    """Equal outputs, and equal gradients of all inputs for one random cotangent."""
    assert_close(fast, slow)
    cotangent = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, inputs, cotangent), torch.autograd.grad(slow, inputs, cotangent), strict=True):
        assert_close(a, b)


def random_leaves(*shapes, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]


def assert_valid(index, clusters):
    """Every token is in a cluster, every cluster has a token."""
    assert all(sample.unique().tolist() == list(range(clusters)) for sample in index)


# ---------------------------------------------------------------------------------------------------------------- core
@pytest.mark.parametrize("N, C, k, chunk", [(1, 3, 5, 4), (3, 2, 5, 256), (16, 3, 5, 4), (37, 5, 5, 256), (40, 8, 3, 7), (50, 4, 1, 16)])
def test_density_peaks_match_loops(N, C, k, chunk, device):
    x = torch.randn(3, N, C, dtype=torch.float64, device=device) + 5
    fast = density_peaks(x, k, chunk)
    for slow in (torch.stack(each).to(device) for each in zip(*(loop_density_peaks(tokens, k) for tokens in x), strict=True)):
        same, *fast = fast
        assert_close(same, slow)
    assert not fast


@pytest.mark.parametrize("k, chunk", [(5, 256), (1, 16), (4, 11)])
def test_ties_go_to_the_smaller_index_and_the_denser_parent(k, chunk, device):
    """64 tokens on a grid of 3^4 places: many duplicates, equal densities and equal distances, all exact in floating point."""
    x = torch.randint(0, 3, (4, 64, 4), device=device).double()
    for log_density, delta, parent, tokens in zip(*density_peaks(x, k, chunk), x, strict=True):
        slow = loop_density_peaks(tokens, k)
        assert (log_density.tolist(), parent.tolist()) == (slow[0].tolist(), slow[2].tolist())
        assert_close(delta, slow[1].to(device))                                                         # torch's sqrt rounds otherwise


def test_density_peaks_do_not_depend_on_the_chunk(device):
    x = torch.randn(2, 300, 6, dtype=torch.float64, device=device)
    whole = density_peaks(x, chunk=300)
    for chunk in (1, 64, 299, 1000):
        assert_close(density_peaks(x, chunk=chunk), whole)


def test_density_peaks_hold_no_map_of_tokens_by_tokens(device):
    x = torch.randn(2, 2000, 4, device=device)
    with LargestTensor() as largest:
        density_peaks(x, chunk=10)
    assert x.numel() < largest.numel <= 2 * 2016 * 10           # columns in whole groups of 32


def test_near_duplicates_far_from_the_origin(device):
    """Expanding the square cancels: distances of 1e-3 at coordinates around 100 survive in float32, none is negative or NaN."""
    x = 100 + torch.randn(1, 64, 8, device=device)
    x[:, 32:] = x[:, :32] + 1e-3 * torch.randn(1, 32, 8, device=device)
    log_density, delta, _ = density_peaks(x, k=2)
    expected = loop_density_peaks(x[0].double().cpu(), 2)[0]
    assert_close(log_density[0].double().cpu(), expected, rtol=0.2, atol=3e-7)
    assert (delta >= 0).all() and (log_density <= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_density_peaks_run_in_float32_inside_autocast(dtype, device):
    x = torch.randn(2, 200, 16, device=device).to(dtype).requires_grad_()
    exact = density_peaks(x.float())
    with torch.autocast(device.type, torch.bfloat16):
        log_density, delta, parent = density_peaks(x)
    assert log_density.dtype == delta.dtype == torch.float32 and not log_density.requires_grad
    assert_close((log_density, delta, parent), exact)


CLUSTERS = [(1, 1), (10, 1), (10, 10), (37, 5), (37, 36)]     # N, M


@pytest.mark.parametrize("N, clusters", CLUSTERS)
def test_clusters_match_loops(N, clusters, device):
    x = torch.randn(3, N, 4, dtype=torch.float64, device=device)
    index = assign_clusters(*density_peaks(x), clusters)
    assert index.tolist() == loop_clusters(x, 5, clusters).tolist()
    assert_valid(index, clusters)


def test_the_longest_chain_is_followed(device):
    """35 tokens, each the parent of the next, cut behind the first and in the middle."""
    parent = torch.arange(-1, 34, device=device).clamp(min=0)[None]
    log_density = -torch.arange(35., device=device)[None]
    for cut in (1, 20):
        delta = torch.ones(1, 35, device=device)
        delta[0, cut] = 1e30
        assert assign_clusters(log_density, delta, parent, 2).tolist() == [[0] * cut + [1] * (35 - cut)]


def test_equal_gamma_goes_to_the_smaller_index(device):
    """A star: all hang on token 3, all alike."""
    ones, parent = torch.ones(1, 300, device=device), torch.full((1, 300), 3, device=device)
    index = assign_clusters(-ones, ones, parent, 100)[0].tolist()
    centres = [3, *(i for i in range(101) if i != 3)][:100]
    assert [index[i] for i in centres] == list(range(100)) and set(index[100:]) == {0}


def test_gamma_does_not_underflow(device):
    """Tokens so far apart that every density is 0 in float32."""
    x = 10 * F.layer_norm(torch.randn(2, 37, 64, device=device), (64,))
    log_density, delta, parent = density_peaks(x)
    assert log_density.exp().max() == 0
    assert assign_clusters(log_density, delta, parent, 9).tolist() == loop_clusters(x.double().cpu(), 5, 9).tolist()


def test_copies_of_a_token_are_no_centres(device):
    """48 copies among far tokens: gamma 0 but for rounding, which must not lift them over the others."""
    x = 5 * F.layer_norm(torch.randn(1, 98, 64, device=device), (64,))
    x[:, 50:] = x[:, :1].clone()
    index = assign_clusters(*density_peaks(x), 25)
    assert len(index[0, 50:].unique()) == 1


@pytest.mark.parametrize("clusters", [1, 7, 49, 98])
@pytest.mark.parametrize("fill", ["constant", "half", "pairs", "huge", "nan", "inf", "overflow"])
def test_identical_and_broken_tokens_give_valid_clusters(fill, clusters, device):
    x = torch.randn(2, 98, 6, device=device)
    torch.empty(10 ** 6, dtype=torch.int64, device=device).fill_(-1)    # what an uninitialised tensor would hold then
    if fill == "constant":
        x[:] = x[:, :1].clone()
    elif fill == "half":
        x[:, 40:] = 0
    elif fill == "pairs":
        x[:, 1::2] = x[:, ::2]
    else:
        x[:, ::7] *= {"huge": 1e6, "nan": math.nan, "inf": math.inf, "overflow": 1e20}[fill]
    log_density, delta, parent = density_peaks(x)
    if fill in ("constant", "half", "pairs", "huge"):
        assert log_density.isfinite().all() and delta.isfinite().all()
    assert_valid(assign_clusters(log_density, delta, parent, clusters), clusters)


@pytest.mark.parametrize("given", [{"k": 0}, {"chunk": 0}])
def test_density_peaks_raise(given):
    with pytest.raises(ValueError, match="expected at least 1"):
        density_peaks(torch.randn(1, 10, 2), **given)


@pytest.mark.parametrize("clusters", [0, 11])
def test_impossible_number_of_clusters_raises(clusters):
    with pytest.raises(ValueError, match=f"clusters = {clusters}, expected 1 to 10"):
        assign_clusters(*density_peaks(torch.randn(1, 10, 2)), clusters)


def test_cluster_tokens_is_a_sound_operator(device):
    x = torch.randn(2, 30, 4, device=device)
    torch.library.opcheck(cluster_tokens, (x, 5, [15, 4]))
    peaks = density_peaks(x)
    assert_close(cluster_tokens(x, 5, [15, 4]), torch.stack([assign_clusters(*peaks, 15), assign_clusters(*peaks, 4)]))


@pytest.mark.parametrize("N, clusters", CLUSTERS)
def test_aggregation_matches_loops(N, clusters, device):
    x, score = random_leaves((3, N, 4), (3, N), device=device)
    index = loop_clusters(x, 5, clusters).to(device)
    assert_same(aggregate(x, score, index, clusters), loop_aggregate(x, score, index, clusters), [x, score])


def test_aggregation_survives_extreme_scores(device):
    x, index = torch.randn(1, 4, 3, device=device), torch.tensor([[0, 0, 1, 1]], device=device)
    score = torch.tensor([[1e4, -1e4, -1e4, -1e4]], device=device, requires_grad=True)
    y = aggregate(x, score, index, 2)
    assert_close(y, torch.stack([x[:, 0], x[:, 2:].mean(1)], 1))
    y.sum().backward()
    assert score.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aggregation_of_half_precision_sums_in_float32(dtype, device):
    """2000 tokens in two clusters: summed in half precision they would stop growing."""
    x, score = torch.rand(1, 2000, 3, device=device).to(dtype), torch.rand(1, 2000, device=device).to(dtype)
    index = (torch.arange(2000, device=device) % 2)[None]
    y = aggregate(x, score, index, 2)
    assert y.dtype == dtype
    assert_close(y.float(), aggregate(x.float(), score.float(), index, 2), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sums have one order on one CPU thread")
def test_aggregation_is_deterministic_on_request():
    x, score = torch.randn(4, 500, 8, device="cuda", requires_grad=True), torch.randn(4, 500, device="cuda", requires_grad=True)
    index = torch.randint(0, 3, (4, 500), device="cuda")

    def run():
        y = aggregate(x, score, index, 3)
        return y, *torch.autograd.grad(y.square().sum(), (x, score))
    torch.use_deterministic_algorithms(True)
    try:
        first = run()
        for _ in range(5):
            assert all(a.equal(b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# -------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("ratios", [(4, 2), (16, 1), (1,), (3,), (100, 7)])
@pytest.mark.parametrize("H, W", [(5, 7), (4, 4)])
def test_clustering_guided_attention_matches_loops(ratios, H, W, device):
    module = ClusteringGuidedAttention(12, 3, ratios, k=3).to(device).double()
    x, = random_leaves((2, H, W, 12), device=device)
    assert_same(module(x), loop_attention(module, x), [x, *module.parameters()])


def test_ratio_one_is_plain_attention(device):
    module = ClusteringGuidedAttention(12, 3, (1,)).to(device).double()
    plain = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, device=device)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([module.q.weight, module.kv[0].weight]))
        plain.in_proj_bias.copy_(torch.cat([module.q.bias, module.kv[0].bias]))
    plain.out_proj = module.proj
    x, = random_leaves((2, 5, 7, 12), device=device)
    tokens = x.flatten(1, 2)
    assert_same(module(x), plain(tokens, tokens, tokens)[0].view_as(x), [x])


def test_one_clustering_serves_all_ratios(monkeypatch):
    seen = []
    monkeypatch.setattr("clustr.density_peaks", lambda *given: seen.append(given[0].shape) or density_peaks(*given))
    ClusteringGuidedAttention(12, 3, (8, 4, 2, 1))(torch.randn(2, 5, 7, 12))
    assert seen == [(2, 35, 12)]


def test_conv_ffn_order():
    """The convolution sits between the first linear layer and the GELU, without a shortcut."""
    ffn = ConvFFN(3, 2).double()
    x, = random_leaves((2, 4, 5, 3))
    wide = F.pad(F.linear(x, ffn.fc1.weight, ffn.fc1.bias), (0, 0, 1, 1, 1, 1))                         # (B, H+2, W+2, 6)
    conv = sum(wide[:, i:i + 4, j:j + 5] * ffn.conv.weight[:, 0, i, j] for i, j in product(range(3), repeat=2)) + ffn.conv.bias
    assert_same(ffn(x), F.linear(F.gelu(conv), ffn.fc2.weight, ffn.fc2.bias), [x, *ffn.parameters()])


def test_block_and_model_order():
    """Eq. 9, and the classifier on the mean of the last map."""
    model = clustr_t(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 16, 16, 32), heads=(1, 2, 2, 4)).double().eval()
    block, x = model.stages[0][0], torch.randn(2, 5, 7, 8, dtype=torch.float64)
    z = block.attn(block.norm1(x)) + x
    assert_close(block(x), block.ffn(block.norm2(z)) + z)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert_close(model(images), model.head(model.forward_features(images)[3].flatten(2).mean(2)))


def test_initial_weights():
    model = clustr_t()
    assert_close(model.embeds[1].conv.weight.std(), torch.tensor(math.sqrt(2 / (9 * 128))), rtol=0.02, atol=0)
    assert_close(model.stages[0][0].ffn.conv.weight.std(), torch.tensor(math.sqrt(2 / 9)), rtol=0.05, atol=0)      # depth-wise
    assert_close(model.stages[3][0].attn.q.weight.std(), torch.tensor(0.02), rtol=0.02, atol=0)


# ----------------------------------------------------------------------------------------------------------- ablations
@pytest.mark.parametrize("H, W", [(4, 6), (5, 7), (2, 3)])
def test_grid_reduction_matches_loops(H, W, device):
    module = GridReduction(4, 4).to(device).double()
    x, = random_leaves((2, H, W, 4), device=device)
    padded, cells = F.pad(x, (0, 0, 0, W % 2, 0, H % 2)), []
    for i, j in product(range(0, H, 2), range(0, W, 2)):
        cell = padded[:, i:i + 2, j:j + 2]                                                              # (B, 2, 2, C)
        cells.append(module.norm(torch.einsum("bijc,ocij->bo", cell, module.conv.weight) + module.conv.bias))
    assert_same(module(x), torch.stack(cells, 1), [x, *module.parameters()])


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_nearest_keys_attention_matches_loops(keep, device):
    q, k, v = random_leaves((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), device=device)
    slow = torch.zeros_like(q)
    for b, h, n in product(range(2), range(3), range(5)):
        logits = k[b, h] @ q[b, h, n] / 2
        kept = sorted(range(6), key=lambda m: -logits[m].item())[:keep]
        slow[b, h, n] = logits[kept].softmax(0) @ v[b, h, kept]
    assert_same(nearest_keys_attention(q, k, v, keep), slow, [q, k, v])


SINGLE = ((64,), (16,), (4,), (1,))
ABLATIONS = [   # paper's table, factory, overrides, parameters in M to the paper's digits
    ("Table 2", clustr_t, {}, 11.7), ("Table 2", clustr_s, {}, 22.7), ("Table 2", clustr_b, {}, 40.2),
    ("Table 9", clustr_t, {"ratios": SINGLE}, 10.8), ("Table 9", clustr_t, {"ratios": ((16,), (4,), (1,), (1,))}, 10.8),
    ("Table 7", clustr_t, {"ratios": SINGLE, "aggregation": "grid"}, 13.2),
    ("Table 8", clustr_t, {"ratios": SINGLE, "aggregation": "knn"}, 13.2),
]


@pytest.mark.parametrize("table, factory, overrides, millions", ABLATIONS)
def test_every_row_of_the_papers_tables(table, factory, overrides, millions):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in factory(**overrides).parameters()) / 1e6, 1) == millions, table


@pytest.mark.parametrize("overrides", [overrides for *_, overrides, _ in ABLATIONS if overrides])
def test_ablations_train_at_any_size(overrides, device):
    model = clustr_t(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 16, 16, 32), heads=(1, 2, 2, 4), **overrides).to(device)
    model(torch.randn(2, 3, 45, 70, device=device)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.count_nonzero() for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("given, message", [
    ({"heads": 5}, "dim = 12 does not split into 5 heads"), ({"ratios": ()}, "ratios = "), ({"ratios": (4, 0)}, "ratios = "),
    ({"k": 0}, "k = 0"), ({"aggregation": "mean"}, "aggregation = 'mean'"), ({"aggregation": "grid", "ratios": (8,)}, "ratio = 8")])
def test_wrong_arguments_raise(given, message):
    with pytest.raises(ValueError, match=message):
        ClusteringGuidedAttention(**{"dim": 12, "heads": 3, "ratios": (4,), **given})


# ------------------------------------------------------------------------------------------------------------- drawing
def test_drawing_has_a_panel_for_each_ratio_and_a_colour_for_each_cluster():
    model = clustr_t(depths=(1, 1, 1, 1), dims=(8, 16, 16, 32), heads=(1, 2, 2, 4)).eval()
    sheet = draw_clusters(model, Image.effect_noise((128, 96), 80).convert("RGB"))
    clusters = [12, 48, 12, 48, 12]     # of 768, 768, 192, 192 and 48 tokens at ratios 64, 16, 16, 4 and 4
    assert sheet.size == (6 * 136 - 8, 116)
    for i, count in enumerate(clusters, 1):
        panel = sheet.crop((136 * i, 20, 136 * i + 128, 116))
        assert len(panel.getcolors()) == count
