"""LinGlo's core and layers against slow references written from the paper.

Equivalence tests run in float64 with B > 1 and compare outputs and the gradients of all inputs.
Sections and symbols are those of linglo.py, after the references.
"""
import math
import struct
from functools import partial
from itertools import product

import bench
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from test_models import LargestTensor
from torch import nn
from torch.testing import assert_close

import linglo

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "heads": (1, 2, 2, 4)}


# --------------------------------------------------------------------------------------- references
def loop_context(k, saliency):
    """Eq. 2 and 3 for one head, token by token: k (N, d), saliency (d,) -> global context (d,)."""
    scores = torch.stack([key @ saliency / math.sqrt(len(key)) for key in k])
    attention_map = scores.exp() / scores.exp().sum()                           # (N,), Eq. 2
    return sum(weight * key for weight, key in zip(attention_map, k))           # Eq. 3


def loop_key_only(k, v, saliency):
    """Eq. 2, 3 and the product in Eq. 4, head by head and token by token: (B, h, N, d)."""
    B, h, _, _ = k.shape
    gated = []
    for b, i in product(range(B), range(h)):
        global_context = loop_context(k[b, i], saliency[i])
        gated.append(torch.stack([global_context * value for value in v[b, i]]))
    return torch.stack(gated).view(v.shape)


def loop_conv(conv, x):
    """3x3 depth-wise convolution, tap by tap: (B, H, W, C) -> the same."""
    _, H, W, _ = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    total = 0
    for i, j in product(range(3), range(3)):
        total = total + padded[:, i:i + H, j:j + W] * conv.weight[:, 0, i, j]
    return total


def loop_rpcpe(module, x):
    """The input, if it is skipped, plus each branch, normalised as by BatchNorm."""
    y = x if module.skip else 0
    for conv, norm in module.branches:
        branch = loop_conv(conv, x)
        mean = norm.running_mean
        variance = norm.running_var
        if norm.training:
            mean = branch.mean((0, 1, 2))
            variance = branch.var((0, 1, 2), correction=0)
        normalised = (branch - mean) / (variance + norm.eps).sqrt()
        y = y + normalised * norm.weight + norm.bias
    return y


def split_heads(x, heads):
    """(B, N, C) -> (B, h, N, d)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def assert_same(fast, slow, inputs):
    """Equal outputs, and equal gradients of all inputs for one random cotangent."""
    assert_close(fast, slow)
    cotangent = torch.randn_like(slow)
    fast_gradients = torch.autograd.grad(fast, inputs, cotangent)
    slow_gradients = torch.autograd.grad(slow, inputs, cotangent)
    for fast_gradient, slow_gradient in zip(fast_gradients, slow_gradients, strict=True):
        assert_close(fast_gradient, slow_gradient)


def random_leaf(*shape, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def parameters_in_millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


# --------------------------------------------------------------------------------------------- core
@pytest.mark.parametrize("B, h, N, d", [(2, 3, 7, 4), (3, 1, 35, 5), (2, 2, 1, 3)])
def test_key_only_attention_matches_loops(B, h, N, d, device):
    k = random_leaf(B, h, N, d, device=device)
    v = random_leaf(B, h, N, d, device=device)
    saliency = random_leaf(h, d, device=device)
    fast = linglo.key_only_attention(k, v, saliency)
    assert_same(fast, loop_key_only(k, v, saliency), [k, v, saliency])


@pytest.mark.parametrize("B, h, N, d", [(2, 3, 7, 4), (3, 1, 35, 5), (2, 2, 1, 3)])
def test_attention_map_gives_the_global_context(B, h, N, d, device):
    k = random_leaf(B, h, N, d, device=device)
    v = random_leaf(B, h, N, d, device=device)
    saliency = random_leaf(h, d, device=device)
    attention_map = linglo.attention_map(k, saliency)                           # (B, h, N)
    global_context = (attention_map[..., None] * k).sum(2, keepdim=True)
    assert_close(global_context * v, loop_key_only(k, v, saliency))


def test_core_takes_any_strides(device):
    k = random_leaf(2, 7, 3, 4, device=device)
    v = random_leaf(4, 2, 7, 3, device=device)
    saliency = random_leaf(4, 3, device=device)
    strided = k.transpose(1, 2), v.permute(1, 3, 2, 0), saliency.mT             # (B, h, N, d)
    fast = linglo.key_only_attention(*strided)
    assert_same(fast, loop_key_only(*strided), [k, v, saliency])


def test_nothing_is_larger_than_the_token_map(device):
    k = torch.randn(2, 3, 500, 4, device=device, requires_grad=True)
    v = torch.randn(2, 3, 500, 4, device=device, requires_grad=True)
    saliency = torch.randn(3, 4, device=device, requires_grad=True)
    with LargestTensor() as largest:
        linglo.key_only_attention(k, v, saliency).square().sum().backward()
    assert largest.numel == k.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, device):
    k = torch.randn(2, 3, 50, 8, device=device)
    v = torch.randn(2, 3, 50, 8, device=device)
    saliency = torch.randn(3, 8, device=device)
    half = linglo.key_only_attention(k.to(dtype), v.to(dtype), saliency)
    full = linglo.key_only_attention(k, v, saliency)
    assert half.dtype == dtype
    assert_close(half.float(), full, rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("layer", [linglo.KeyOnlyAttention, linglo.DotProductAttention])
@pytest.mark.parametrize("heads", [0, 3])
def test_attention_refuses_heads_that_do_not_divide(layer, heads):
    with pytest.raises(ValueError, match=f"dim = 8 does not split into {heads} heads"):
        layer(8, heads)


def test_key_only_attention_module_is_equation_4(device):
    module = linglo.KeyOnlyAttention(12, 3).to(device).double()
    nn.init.normal_(module.saliency)
    x = random_leaf(2, 4, 5, 12, device=device)
    tokens = x.flatten(1, 2)                                                    # (B, N, C)
    k = tokens @ module.k.weight.mT + module.k.bias
    v = tokens @ module.v.weight.mT + module.v.bias
    gated = loop_key_only(split_heads(k, 3), split_heads(v, 3), module.saliency)
    gated = gated.transpose(1, 2).flatten(2)                                    # (B, N, C), G * V
    inner = gated @ module.u1.weight.mT + module.u1.bias + k
    slow = inner @ module.u2.weight.mT + module.u2.bias                         # Eq. 4
    assert_same(module(x), slow.view_as(x), [x, *module.parameters()])


def randomise(module):
    """Move the weights, biases and running statistics of norms away from 0 and 1."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
    return module


@pytest.mark.parametrize("cpe", linglo.CPE)
@pytest.mark.parametrize("frozen", [0, 1, 4])     # branches with running statistics
def test_rpcpe_matches_loops(cpe, frozen, device):
    branches, skip = linglo.CPE[cpe]
    module = randomise(linglo.RPCPE(6, branches, skip)).to(device).double()
    for _, norm in module.branches[:frozen]:
        norm.eval()
    x = random_leaf(2, 4, 5, 6, device=device)
    assert_same(module(x), loop_rpcpe(module, x), [x, *module.parameters()])


def test_ffn_encodes_positions_before_the_gelu():
    ffn = linglo.FFN(3, 2, "rp").double()
    x = random_leaf(2, 4, 5, 3)
    hidden = F.linear(x, ffn.fc1.weight, ffn.fc1.bias)
    hidden = F.gelu(loop_rpcpe(ffn.cpe, hidden))
    slow = F.linear(hidden, ffn.fc2.weight, ffn.fc2.bias)
    assert_same(ffn(x), slow, [x, *ffn.parameters()])


# ---------------------------------------------------------------------------------- block and model
def test_block_applies_layer_norm_first():
    block = linglo.Block(8, 2, 4, "key-only", "rp", drop_path=0.0).double()
    block.apply(linglo.init_weights)
    x = random_leaf(2, 5, 7, 8)
    z = block.attn(block.norm1(x)) + x
    assert_same(block(x), block.ffn(block.norm2(z)) + z, [x, *block.parameters()])


def test_classifier_sees_the_mean_of_the_last_map():
    model = linglo.linglo_b0(num_classes=3, **TINY).double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    last = model.forward_features(images)[3]
    assert_close(model(images), model.head(last.flatten(2).mean(2)))


def test_no_classes_give_the_mean_of_the_last_map():
    model = linglo.linglo_b0(num_classes=0, **TINY).eval()
    images = torch.randn(2, 3, 64, 96)
    assert model(images).equal(model.forward_features(images)[3].mean((2, 3)))


@pytest.mark.parametrize("name, std, rtol", [
    ("embeds.1.0.conv", math.sqrt(2 / (9 * 128)), 0.02),
    ("stages.0.0.ffn.cpe.branches.0.0", math.sqrt(2 / 9), 0.05),    # depth-wise
    ("stages.3.0.ffn.fc1", 0.02, 0.02),
])
def test_initial_weights(name, std, rtol):
    weight = linglo.linglo_b1().get_submodule(name).weight
    assert_close(weight.std(), torch.tensor(std), rtol=rtol, atol=0)


def test_initial_saliency():
    saliency = linglo.linglo_b1().stages[3][0].attn.saliency
    assert_close(saliency.std(), torch.tensor(0.02), rtol=0.1, atol=0)


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


@pytest.mark.parametrize("blank_columns", [32, 64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convolutions", [True, False])
def test_blank_pixels_give_gradients_of_ordinary_size(
        convolutions, training, blank_columns, device):
    """With biases of 0 in the patch embeddings: 1e6 and more for padding, NaN for zero images."""
    model = linglo.linglo_b0(drop_path_rate=0.0, convolutions=convolutions)
    model = model.to(device).train(training)
    images = torch.randn(2, 3, 64, 64, device=device)
    ordinary = gradient_norm(model, images)
    images[..., 64 - blank_columns:] = 0
    assert gradient_norm(model, images) <= 5 * ordinary


@pytest.mark.parametrize("cpe", linglo.CPE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_folded_outputs_are_those_of_the_branches(cpe, dtype, tolerance, device, monkeypatch):
    model = randomise(linglo.linglo_b0(num_classes=7, cpe=cpe, **TINY)).to(device, dtype).eval()
    images = torch.randn(2, 3, 45, 70, dtype=dtype, device=device)
    with monkeypatch.context() as patch:
        patch.setattr(linglo.RPCPE, "has_fixed_statistics", lambda self: False)
        expected = [model(images), *model.forward_features(images)]
    folded = [model(images), *model.forward_features(images)]
    model.reparameterize()
    deployed = [model(images), *model.forward_features(images)]
    for outputs in (folded, deployed):
        for output, original in zip(outputs, expected, strict=True):
            assert (output - original).abs().max() <= tolerance * original.abs().max()


def reparameterised(cpe):
    model = randomise(linglo.linglo_b0(num_classes=7, cpe=cpe, **TINY)).eval()
    assert model.reparameterize() is model
    return model


@pytest.mark.parametrize("cpe", linglo.CPE)
def test_reparameterised_model_has_no_batch_norm(cpe):
    assert not any(isinstance(module, nn.BatchNorm2d) for module in reparameterised(cpe).modules())


@pytest.mark.parametrize("cpe", linglo.CPE)
def test_reparameterised_model_stays_in_eval_mode(cpe):
    assert not any(module.training for module in reparameterised(cpe).modules())


@pytest.mark.parametrize("cpe", linglo.CPE)
def test_reparameterising_twice_changes_nothing(cpe):
    model = reparameterised(cpe)
    once = {key: value.clone() for key, value in model.state_dict().items()}
    assert_close(model.reparameterize().state_dict(), once, rtol=0, atol=0)


@pytest.mark.parametrize("cpe", linglo.CPE)
def test_reparameterised_model_can_be_trained(cpe, device):
    model = reparameterised(cpe).to(device)
    model(torch.randn(2, 3, 45, 70, device=device)).sum().backward()
    folded = model.stages[0][0].ffn.cpe.branches[0]
    assert folded.weight.grad.count_nonzero()


# -------------------------------------------------------------------------- ablations and relatives
@pytest.mark.parametrize("layer", [linglo.DotProductAttention, bench.PlainDotProductAttention])
def test_dot_product_attention_is_plain_attention(layer, device):
    module = layer(12, 3).to(device).double()
    plain = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, device=device)
    plain.in_proj_weight = module.qkv.weight
    plain.in_proj_bias = module.qkv.bias
    plain.out_proj = module.proj
    x = random_leaf(2, 5, 7, 12, device=device)
    tokens = x.flatten(1, 2)
    slow, _ = plain(tokens, tokens, tokens)
    assert_same(module(x), slow.view_as(x), [x, *module.parameters()])


def test_convolution_block_is_squeeze_and_excitation():
    block = linglo.ConvBlock(8, drop_path=0.0).double().eval()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    y = block.convs(x.permute(0, 3, 1, 2))                                      # (B, C, H, W)
    gates = torch.stack([block.gate(sample.mean((1, 2))) for sample in y])      # (B, C)
    expected = x + (y * gates[:, :, None, None]).permute(0, 2, 3, 1)
    assert_close(block(x), expected)


def test_separate_patches_see_every_pixel():
    module = linglo.SeparatePatches(2, 4, 3).double()
    y = module(random_leaf(2, 7, 5, 2))
    assert y.shape == (2, 3, 2, 4)


def test_separate_patches_are_padded_right_and_bottom():
    module = linglo.SeparatePatches(2, 4, 3).double()
    x = random_leaf(2, 7, 5, 2)
    padded = F.pad(x, (0, 0, 0, 1, 0, 2))                                       # (B, 9, 6, 2)
    patch = padded[:, 6:, 3:]                                                   # (B, 3, 3, 2)
    corner = torch.einsum("bijc,ocij->bo", patch, module.conv.weight) + module.conv.bias
    assert_same(module(x)[:, 2, 1], module.norm(corner), [x, *module.parameters()])


def random_table():
    table = linglo.PositionTable(2, 4)
    nn.init.normal_(table.weight)
    return table


def test_position_table_of_its_own_side_is_added_as_it_is():
    table = random_table()
    positions = table.weight.permute(0, 2, 3, 1)
    assert_close(table(torch.zeros(2, 4, 4, 2)), positions.expand(2, -1, -1, -1))


def test_position_table_is_interpolated():
    table = random_table()
    halves = table(torch.zeros(1, 2, 2, 2))[0].permute(2, 0, 1)                 # (C, 2, 2)
    assert_close(halves, F.avg_pool2d(table.weight[0], 2))      # bilinear at half the size


SEPARATE = {"convolutions": False}                                              # LinGlo-w/o-C
FLAT = {**SEPARATE, "hierarchical": False, "dims": (150,) * 4, "heads": (3,) * 4}  # LinGlo-w/o-CH
DEPLOYED = [  # table or figure of the paper, factory, overrides, parameters deployed in M
    ("Table 2", linglo.linglo_b0, {}, 3.60),
    ("Table 2", linglo.linglo_b1, {}, 13.73),
    ("Table 2", linglo.linglo_b2, {}, 25.14),
    ("Table 5", linglo.linglo_b0, {"layout": "CHHH"}, 3.59),
    ("Table 5", linglo.linglo_b0, {"layout": "CCHH"}, 3.56),
    ("Table 6", linglo.linglo_b0, {"cpe": "cpe"}, 3.60),
    ("Table 6", linglo.linglo_b0, {"cpe": "r"}, 3.60),
    ("Table 6", linglo.linglo_b0, {"cpe": "p"}, 3.60),
    ("Fig. 4", linglo.linglo_b0, {"attention": "dot"}, 3.60),
    ("Fig. 5", linglo.linglo_b0, SEPARATE, 3.47),
    ("Fig. 5", linglo.linglo_b0, FLAT, 3.92),
]


@pytest.mark.parametrize("table, factory, overrides, millions", DEPLOYED)
def test_every_row_of_the_papers_tables(table, factory, overrides, millions):
    with torch.device("meta"):
        model = factory(**overrides).reparameterize()
    assert round(parameters_in_millions(model), 2) == millions, table


@pytest.mark.parametrize("factory, cpe, millions", [
    (linglo.linglo_b0, "rp", 3.78),
    (linglo.linglo_b1, "rp", 14.09),
    (linglo.linglo_b2, "rp", 25.87),
    (linglo.linglo_b0, "p", 3.78),
    (linglo.linglo_b0, "r", 3.60),
    (linglo.linglo_b0, "cpe", 3.60),
])
def test_training_time_parameters(factory, cpe, millions):
    """The text alone has branches with a bias; ours have BatchNorm's scale and shift instead."""
    with torch.device("meta"):
        model = factory(cpe=cpe)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    scales = sum(norm.weight.numel() for norm in norms) / 1e6
    assert round(parameters_in_millions(model) - scales, 2) == millions


ABLATIONS = {
    "CHHH": {"layout": "CHHH"},
    "CCHH": {"layout": "CCHH"},
    "cpe": {"cpe": "cpe"},
    "r": {"cpe": "r"},
    "p": {"cpe": "p"},
    "dot": {"attention": "dot"},
    "w/o-C": SEPARATE,
    "w/o-CH": {**FLAT, "dims": (12,) * 4},
}
each_ablation = pytest.mark.parametrize("ablation", ABLATIONS)


def tiny_ablation(ablation, device):
    options = {**TINY, **ABLATIONS[ablation]}
    return linglo.linglo_b0(num_classes=3, **options).to(device)


@each_ablation
def test_ablations_train_at_any_size(ablation, device):
    model = tiny_ablation(ablation, device)
    model(torch.randn(2, 3, 45, 70, device=device)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        if parameter.ndim > 1:      # biases before a norm have none in exact arithmetic
            assert parameter.grad.count_nonzero() > 0, key


@each_ablation
def test_sizes_of_the_ablations_maps(ablation, device):
    model = tiny_ablation(ablation, device)
    maps = model.forward_features(torch.randn(2, 3, 45, 70, device=device))
    strides = (16,) * 4 if ablation == "w/o-CH" else (4, 8, 16, 32)
    expected = [(math.ceil(45 / s), math.ceil(70 / s)) for s in strides]
    assert [tuple(m.shape[2:]) for m in maps] == expected


@pytest.mark.parametrize("given, message", [
    ({"attention": "query"}, "attention = 'query'"),
    ({"layout": "HHH"}, "layout = 'HHH'"),
    ({"layout": "HHHX"}, "layout = 'HHHX'"),
    ({"cpe": "rpp"}, "cpe = 'rpp'"),
    ({"heads": (1, 2, 3, 4)}, "dim = 16 does not split into 3 heads"),
    ({"heads": (1, 2, 3, 4), "attention": "dot"}, "dim = 16 does not split into 3 heads"),
    ({"hierarchical": False}, "hierarchical=False needs"),
    ({"hierarchical": False, "convolutions": False}, "hierarchical=False needs"),
])
def test_wrong_arguments_raise(given, message):
    with pytest.raises(ValueError, match=message):
        linglo.linglo_b0(**{**TINY, **given})


# --------------------------------------------------------------------------------- released weights
@pytest.mark.parametrize("deployed", [False, True])
def test_load_weights_reads_training_and_deployed_files(deployed, tmp_path):
    def factory(num_classes):
        return linglo.linglo_b0(num_classes=num_classes, **TINY)

    model = randomise(factory(7)).eval()
    images = torch.randn(1, 3, 32, 48)
    expected = model(images)
    if deployed:
        torch.save(model.reparameterize().state_dict(), tmp_path / "weights.pt")
    else:
        torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    loaded = linglo.load_weights(factory, tmp_path / "weights.pt")
    assert_close(loaded(images), expected)


def run_main(monkeypatch, *arguments):
    monkeypatch.setitem(linglo.VARIANTS, "linglo_b0", TINY)
    monkeypatch.setattr("sys.argv", ["linglo.py", *map(str, arguments)])
    linglo.main()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("option", [{}, {"cpe": "r", "layout": "CHHH"}])
def test_deploy_writes_the_folded_weights(average, option, tmp_path, monkeypatch, capsys):
    """Averaged weights, if the file has them, for a model of the same arguments and classes."""
    factory = partial(linglo.linglo_b0, num_classes=2, **{**TINY, **option})
    models = [randomise(factory()).eval(), randomise(factory()).eval()]
    ema = models[1].state_dict() if average else None
    state = {
        "model": models[0].state_dict(), "ema": ema, "classes": ["cat", "dog"],
        "args": {"img_size": 64, "option": option},
    }
    torch.save(state, tmp_path / "best.pt")
    deployed = tmp_path / "deployed.pt"
    run_main(monkeypatch, "--weights", tmp_path / "best.pt", "--deploy", deployed)
    assert capsys.readouterr().out == f"wrote {deployed}\n"
    images = torch.randn(1, 3, 32, 48)
    loaded = linglo.load_weights(linglo.linglo_b0, deployed)
    assert_close(loaded(images), models[average](images))
    assert not any("branches.0.0" in name for name in loaded.state_dict())
    file = torch.load(deployed)
    assert file.keys() == {"model", "args", "classes"}
    option = {**option, "cpe": "folded"}
    assert file["args"] == {"img_size": 64, "model": "linglo_b0", "option": option}
    run_main(monkeypatch, "--weights", deployed, "-o", tmp_path / "figure.png")


def test_deploy_reads_a_bare_state_dict_and_a_deployed_file(tmp_path, monkeypatch):
    model = randomise(linglo.linglo_b0(num_classes=2, **TINY))
    torch.save(model.state_dict(), tmp_path / "0.pt")
    for i in range(2):
        files = tmp_path / f"{i}.pt", tmp_path / f"{i + 1}.pt"
        run_main(monkeypatch, "--weights", files[0], "--deploy", files[1])
    once = torch.load(tmp_path / "1.pt")
    twice = torch.load(tmp_path / "2.pt")
    assert_close(twice["model"], once["model"], rtol=0, atol=0)
    assert twice["args"] == once["args"]


def test_deploy_needs_weights(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--deploy", "deployed.pt")
    assert "--deploy needs --weights" in capsys.readouterr().err


def test_deploy_names_a_file_that_it_cannot_write(tmp_path, monkeypatch, capsys):
    torch.save(linglo.linglo_b0(num_classes=2, **TINY).state_dict(), tmp_path / "best.pt")
    output = tmp_path / "missing" / "deployed.pt"
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--weights", tmp_path / "best.pt", "--deploy", output)
    assert capsys.readouterr().err.startswith(f"{output}: ")


# ------------------------------------------------------------------------------------------ drawing
def test_drawing_shows_large_attention_in_red():
    """Keys and a saliency vector that prefer the bright half: it is red, the dark half blue."""
    model = linglo.linglo_b0(**TINY).eval()
    image = Image.new("RGB", (128, 96))
    image.paste((255, 255, 255), (64, 0, 128, 96))
    attn = model.stages[0][-1].attn
    with torch.no_grad():
        x, = linglo.layer_inputs(model, [attn], image)                          # (1, 24, 32, 8)
        attn.k.weight.copy_(torch.eye(8))
        bright_minus_dark = x[0, 12, 24] - x[0, 12, 8]
        attn.saliency.copy_(100 * bright_minus_dark[None])
    sheet = linglo.draw_saliency(model, image)
    panel = sheet.crop((136, 20, 136 + 128, 116))
    dark_red, _, dark_blue = panel.getpixel((30, 48))
    bright_red, _, bright_blue = panel.getpixel((96, 48))
    assert dark_blue > dark_red
    assert bright_red > bright_blue


@pytest.mark.parametrize("overrides, panels", [
    ({}, 5),
    ({"attention": "dot"}, 1),
    ({"layout": "CCHH"}, 3),
])
def test_drawing_has_a_panel_per_stage_with_key_only_attention(overrides, panels):
    model = linglo.linglo_b0(**TINY, **overrides).eval()
    sheet = linglo.draw_saliency(model, Image.effect_noise((128, 96), 80).convert("RGB"))
    assert sheet.size == (panels * 136 - 8, 116)


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
    loaded = linglo.load_image(tmp_path / "photo.png", longer_side=80)
    assert (np.asarray(loaded) == expected).all()


def test_odd_exif_data_do_not_hide_the_orientation(photo, tmp_path):
    """A resolution of -1/0, on which exif_transpose raises struct.error."""
    photo.save(tmp_path / "photo.jpg", exif=exif_block(6, resolution=(-1, 0)))
    assert linglo.load_image(tmp_path / "photo.jpg").size == (512, 256)


def test_image_with_unreadable_exif_data_stays_as_stored(photo, tmp_path):
    path = tmp_path / "photo.webp"
    photo.save(path, exif=exif_block(6))
    path.write_bytes(path.read_bytes().replace(b"II*\0", b"XX*\0"))
    assert linglo.load_image(path).size == (256, 512)


@pytest.mark.parametrize("error", [KeyError, TypeError, SyntaxError, struct.error])
def test_damaged_images_are_a_value_error(error, photo, tmp_path, monkeypatch):
    def load(_image):
        raise error("odd")

    photo.save(tmp_path / "photo.bmp")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match=f"damaged image .{error.__name__}: .*odd"):
        linglo.load_image(tmp_path / "photo.bmp")
