"""LinGlo's core and layers against slow references written from the paper.

Equivalence tests run in float64 with B > 1 and compare outputs and the gradients of all inputs. Order as in linglo.py: references,
core, layers, deployment, ablations, drawing. Letters as in linglo.py.
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

from linglo import (
    CPE,
    FFN,
    RPCPE,
    DotProductAttention,
    KeyOnlyAttention,
    PatchEmbedding,
    PositionTable,
    draw_saliency,
    key_only_attention,
    linglo_b0,
    linglo_b1,
    linglo_b2,
    load_weights,
    salience,
)

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "heads": (1, 2, 2, 4)}


# ---------------------------------------------------------------------------------------------------------- references
def loop_key_only(k, v, saliency):
    """Eq. 2 and 3 and the gate of Eq. 4, sample by sample, head by head, token by token: (B, h, N, d)."""
    B, h, N, d = k.shape
    samples = []
    for b, i in product(range(B), range(h)):
        logits = torch.stack([k[b, i, n] @ saliency[i] / math.sqrt(d) for n in range(N)])
        weights = logits.exp() / logits.exp().sum()
        context = sum(weights[n] * k[b, i, n] for n in range(N))
        samples.append(torch.stack([context * v[b, i, n] for n in range(N)]))
    return torch.stack(samples).view(B, h, N, d)


def loop_rpcpe(module, x):
    """The input plus each branch, tap by tap, with the batch's statistics: (B, H, W, C)."""
    _, H, W, _ = x.shape
    padded, y = F.pad(x, (0, 0, 1, 1, 1, 1)), x if module.skip else 0
    for conv, norm in module.branches:
        taps = sum(padded[:, i:i + H, j:j + W] * conv.weight[:, 0, i, j] for i, j in product(range(3), repeat=2))
        mean, variance = taps.mean((0, 1, 2)), taps.var((0, 1, 2), correction=0)
        y = y + (taps - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return y


def assert_same(fast, slow, inputs):
    """Equal outputs, and equal gradients of all inputs for one random cotangent."""
    assert_close(fast, slow)
    cotangent = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, inputs, cotangent), torch.autograd.grad(slow, inputs, cotangent), strict=True):
        assert_close(a, b)


def random_leaves(*shapes, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]


# ---------------------------------------------------------------------------------------------------------------- core
@pytest.mark.parametrize("B, h, N, d", [(2, 3, 7, 4), (3, 1, 35, 5), (2, 2, 1, 3)])
def test_key_only_attention_matches_loops(B, h, N, d, device):
    k, v, saliency = random_leaves((B, h, N, d), (B, h, N, d), (h, d), device=device)
    assert_same(key_only_attention(k, v, saliency), loop_key_only(k, v, saliency), [k, v, saliency])
    context = (salience(k, saliency)[..., None] * k).sum(2, keepdim=True)
    assert_close(context * v, loop_key_only(k, v, saliency))


def test_core_takes_any_strides(device):
    k, v, saliency = random_leaves((2, 7, 3, 4), (4, 2, 7, 3), (4, 3), device=device)
    given = k.transpose(1, 2), v.permute(1, 3, 2, 0), saliency.mT
    assert_same(key_only_attention(*given), loop_key_only(*given), [k, v, saliency])


def test_nothing_is_larger_than_the_token_map(device):
    k, v, saliency = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 500, 4), (2, 3, 500, 4), (3, 4)))
    with LargestTensor() as largest:
        key_only_attention(k, v, saliency).square().sum().backward()
    assert largest.numel == k.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, device):
    k, v, saliency = (torch.randn(shape, device=device) for shape in ((2, 3, 50, 8), (2, 3, 50, 8), (3, 8)))
    y = key_only_attention(k.to(dtype), v.to(dtype), saliency)
    assert y.dtype == dtype
    assert_close(y.float(), key_only_attention(k, v, saliency), rtol=0, atol=0.05)


# -------------------------------------------------------------------------------------------------------------- layers
def test_key_only_attention_module_is_equation_4(device):
    module = KeyOnlyAttention(12, 3).to(device).double()
    nn.init.normal_(module.saliency)
    x, = random_leaves((2, 4, 5, 12), device=device)
    tokens = x.flatten(1, 2)
    k, v = (tokens @ linear.weight.mT + linear.bias for linear in (module.k, module.v))
    gated = loop_key_only(*(t.unflatten(2, (3, 4)).transpose(1, 2) for t in (k, v)), module.saliency)
    slow = (gated.transpose(1, 2).flatten(2) @ module.u1.weight.mT + module.u1.bias + k) @ module.u2.weight.mT + module.u2.bias
    assert_same(module(x), slow.view_as(x), [x, *module.parameters()])


def randomise(module):
    """Give norms weights, biases and running statistics that matter."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 2)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
    return module


@pytest.mark.parametrize("cpe", CPE)
def test_rpcpe_matches_loops(cpe, device):
    module = randomise(RPCPE(6, *CPE[cpe])).to(device).double()
    x, = random_leaves((2, 4, 5, 6), device=device)
    assert_same(module(x), loop_rpcpe(module, x), [x, *module.parameters()])


def test_ffn_order():
    """The position encoding sits between the first linear layer and the GELU."""
    ffn = FFN(3, 2, "rp").double()
    x, = random_leaves((2, 4, 5, 3))
    wide = F.linear(x, ffn.fc1.weight, ffn.fc1.bias)
    assert_same(ffn(x), F.linear(F.gelu(loop_rpcpe(ffn.cpe, wide)), ffn.fc2.weight, ffn.fc2.bias), [x, *ffn.parameters()])


def test_block_and_model_order():
    """Fig. 3b with LayerNorm first, and the classifier on the mean of the last map."""
    model = linglo_b0(num_classes=3, layout="HHHC", **TINY).double().eval()
    block, x = model.stages[0][0], torch.randn(2, 5, 7, 8, dtype=torch.float64)
    z = block.attn(block.norm1(x)) + x
    assert_close(block(x), block.ffn(block.norm2(z)) + z)
    conv, x = model.stages[3][0], torch.randn(2, 5, 7, 32, dtype=torch.float64)
    y = conv.convs(x.permute(0, 3, 1, 2))
    gate = torch.stack([conv.gate(sample.mean((1, 2))) for sample in y])                                # squeeze, excitation
    assert_close(conv(x), x + (y * gate[:, :, None, None]).permute(0, 2, 3, 1))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert_close(model(images), model.head(model.forward_features(images)[3].flatten(2).mean(2)))


def test_initial_weights():
    model = linglo_b1()
    assert_close(model.embeds[1][0].conv.weight.std(), torch.tensor(math.sqrt(2 / (9 * 128))), rtol=0.02, atol=0)
    assert_close(model.stages[0][0].ffn.cpe.branches[0][0].weight.std(), torch.tensor(math.sqrt(2 / 9)), rtol=0.05, atol=0)
    assert_close(model.stages[3][0].attn.saliency.std(), torch.tensor(0.02), rtol=0.1, atol=0)


# ---------------------------------------------------------------------------------------------------------- deployment
@pytest.mark.parametrize("cpe", CPE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_reparameterised_model_is_the_same(cpe, dtype, tolerance, device):
    model = randomise(linglo_b0(num_classes=7, cpe=cpe, **TINY)).to(device, dtype).eval()
    images = torch.randn(2, 3, 45, 70, dtype=dtype, device=device)
    expected = model(images), *model.forward_features(images)
    assert model.reparameterize() is model
    for got, slow in zip((model(images), *model.forward_features(images)), expected, strict=True):
        assert (got - slow).abs().max() <= tolerance * slow.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) or module.training for module in model.modules())
    folded = {key: value.clone() for key, value in model.state_dict().items()}
    assert_close(model.reparameterize().state_dict(), folded, rtol=0, atol=0)                           # a second time changes nothing
    model(images).sum().backward()                                                                      # and it can be trained on
    assert model.stages[0][0].ffn.cpe.branches[0].weight.grad.count_nonzero()


def test_deployed_weights_load(tmp_path):
    def factory(num_classes):
        return linglo_b0(num_classes=num_classes, **TINY)
    model, images = randomise(factory(7)).eval(), torch.randn(1, 3, 32, 48)
    expected = model(images)
    torch.save({"model": model.state_dict()}, tmp_path / "training.pt")
    torch.save(model.reparameterize().state_dict(), tmp_path / "deployed.pt")
    for name in ("training.pt", "deployed.pt"):
        assert_close(load_weights(factory, tmp_path / name)(images), expected)


# ----------------------------------------------------------------------------------------------------------- ablations
def test_dot_product_attention_is_plain_attention(device):
    module = DotProductAttention(12, 3).to(device).double()
    plain = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, device=device)
    plain.in_proj_weight, plain.in_proj_bias, plain.out_proj = module.qkv.weight, module.qkv.bias, module.proj
    x, = random_leaves((2, 5, 7, 12), device=device)
    tokens = x.flatten(1, 2)
    assert_same(module(x), plain(tokens, tokens, tokens)[0].view_as(x), [x, *module.parameters()])


def test_patches_without_overlap_see_every_pixel():
    module = PatchEmbedding(2, 4, 3, 3).double()
    x, = random_leaves((2, 7, 5, 2))
    y = module(x)
    assert y.shape == (2, 3, 2, 4)
    padded = F.pad(x, (0, 0, 0, 1, 0, 2))
    corner = torch.einsum("bijc,ocij->bo", padded[:, 6:, 3:], module.conv.weight) + module.conv.bias
    assert_close(y[:, 2, 1], module.norm(corner))


def test_position_table_is_interpolated():
    table = PositionTable(2, 4)
    nn.init.normal_(table.weight)
    assert_close(table(torch.zeros(2, 4, 4, 2)), table.weight.permute(0, 2, 3, 1).expand(2, -1, -1, -1))
    halves = table(torch.zeros(1, 2, 2, 2))[0].permute(2, 0, 1)
    assert_close(halves, F.avg_pool2d(table.weight[0], 2))                                              # bilinear at half the size


FLAT = {"convolutions": False, "hierarchical": False, "dims": (150,) * 4, "heads": (3,) * 4}
ABLATIONS = [   # paper's table or figure, factory, overrides, parameters deployed in M
    ("Table 2", linglo_b0, {}, 3.60), ("Table 2", linglo_b1, {}, 13.73), ("Table 2", linglo_b2, {}, 25.14),
    ("Table 5", linglo_b0, {"layout": "CHHH"}, 3.59), ("Table 5", linglo_b0, {"layout": "CCHH"}, 3.56),
    ("Table 6", linglo_b0, {"cpe": "cpe"}, 3.60), ("Table 6", linglo_b0, {"cpe": "r"}, 3.60), ("Table 6", linglo_b0, {"cpe": "p"}, 3.60),
    ("Fig. 4", linglo_b0, {"attention": "dot"}, 3.60),
    ("Fig. 5", linglo_b0, {"convolutions": False}, 3.47), ("Fig. 5", linglo_b0, FLAT, 3.92),
]


@pytest.mark.parametrize("table, factory, overrides, millions", ABLATIONS)
def test_every_row_of_the_papers_tables(table, factory, overrides, millions):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in factory(**overrides).reparameterize().parameters()) / 1e6, 2) == millions, table


@pytest.mark.parametrize("factory, cpe, millions", [
    (linglo_b0, "rp", 3.78), (linglo_b1, "rp", 14.09), (linglo_b2, "rp", 25.87),
    (linglo_b0, "p", 3.78), (linglo_b0, "r", 3.60), (linglo_b0, "cpe", 3.60)])
def test_training_time_parameters(factory, cpe, millions):
    """Counting from the paper's text gives branches with biases and no BN; ours have a scale and a shift instead of a bias."""
    with torch.device("meta"):
        model = factory(cpe=cpe)
    scales = sum(norm.weight.numel() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    assert round((sum(p.numel() for p in model.parameters()) - scales) / 1e6, 2) == millions


@pytest.mark.parametrize("overrides", [{k: v for k, v in overrides.items() if k != "dims"} for *_, overrides, _ in ABLATIONS if overrides])
def test_ablations_train_at_any_size(overrides, device):
    flat = not overrides.get("hierarchical", True)
    model = linglo_b0(num_classes=3, **{**TINY, **({"dims": (12,) * 4} if flat else {}), **overrides}).to(device)
    images = torch.randn(2, 3, 45, 70, device=device)
    model(images).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.count_nonzero() for p in model.parameters() if p.ndim > 1)
    sides = [tuple(m.shape[2:]) for m in model.forward_features(images)]
    assert sides == [(3, 5)] * 4 if flat else [(12, 18), (6, 9), (3, 5), (2, 3)]


@pytest.mark.parametrize("given, message", [
    ({"attention": "query"}, "attention = 'query'"), ({"layout": "HHH"}, "layout = 'HHH'"), ({"layout": "HHHX"}, "layout = 'HHHX'"),
    ({"attention": "dot", "heads": (1, 2, 3, 4)}, "dim = 16 does not split into 3 heads"),
    ({"cpe": "rpp"}, "cpe = 'rpp'"), ({"heads": (1, 2, 3, 4)}, "dim = 16 does not split into 3 heads"),
    ({"hierarchical": False}, "hierarchical=False needs"), ({"hierarchical": False, "convolutions": False}, "hierarchical=False needs")])
def test_wrong_arguments_raise(given, message):
    with pytest.raises(ValueError, match=message):
        linglo_b0(**{**TINY, **given})


# ------------------------------------------------------------------------------------------------------------- drawing
def test_drawing_shows_the_salient_half():
    """Keys that are large where the picture is bright, and a saliency that likes them: the bright half is drawn red, the dark one blue."""
    model = linglo_b0(**TINY).eval()
    picture = Image.new("RGB", (128, 96))
    picture.paste((255, 255, 255), (64, 0, 128, 96))
    seen = []
    attn = model.stages[0][-1].attn
    hook = attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    draw_saliency(model, picture)
    hook.remove()
    difference = seen[0][0, 12, 24] - seen[0][0, 12, 8]                                                 # of a bright and a dark token
    with torch.no_grad():
        attn.k.weight.copy_(torch.eye(8))
        attn.saliency.copy_(100 * difference[None])
    panel = draw_saliency(model, picture).crop((136, 20, 136 + 128, 116))
    dark, bright = panel.getpixel((30, 48)), panel.getpixel((96, 48))
    assert dark[2] > dark[0] and bright[0] > bright[2]


@pytest.mark.parametrize("overrides, panels", [({}, 5), ({"attention": "dot"}, 1), ({"layout": "CCHH"}, 3)])
def test_drawing_has_a_panel_for_each_stage_with_saliency(overrides, panels):
    sheet = draw_saliency(linglo_b0(**TINY, **overrides).eval(), Image.effect_noise((128, 96), 80).convert("RGB"))
    assert sheet.size == (panels * 136 - 8, 116)
