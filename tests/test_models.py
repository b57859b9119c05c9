"""What all model files promise alike: sizes, arguments, gradients, maps, compiling, memory, plots.

A new model file joins by an entry in CASES and rows in FACTORIES.
"""
import math
import os
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import clustr
import linglo
import secvit
import stvit


class Case(NamedTuple):
    """A model that the tests build in a small size."""
    module: ModuleType
    factory: str
    options: dict   # overrides that make the factory's model small
    panels: int     # panels of the figure that `main` writes for the small model


PYRAMID = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 32), "heads": (1, 2, 2, 4)}
SCALED = {**PYRAMID, "layer_scale": (None, None, 0.5, 0.5)}
CLUSTERED = {**SCALED, "clusters": (32, 8, 2, 1)}
RELEASED = {**CLUSTERED, "released": True}
ABLATED = {**SCALED, "heads": (2, 2, 4, 4), "attention": "csw", "conv_stem": False}
CASES = {
    "clustr": Case(clustr, "clustr_t", PYRAMID, 6),
    "secvit": Case(secvit, "secvit_t", CLUSTERED, 4),
    "secvit_released": Case(secvit, "secvit_t", RELEASED, 4),
    "secvit_ablated": Case(secvit, "secvit_t", ABLATED, 0),
    # one cluster in stage 1 is quick with symbolic sizes
    "sec_swin": Case(secvit, "sec_swin_t", {**PYRAMID, "clusters": (1, 8, 2, 1)}, 3),
    "sec_fastervit": Case(secvit, "sec_fastervit_0", {**PYRAMID, "stem_dim": 8}, 2),
    "linglo": Case(linglo, "linglo_b0", PYRAMID, 5),
    "stvit": Case(stvit, "stvit_s", SCALED, 3),
}
FACTORIES = [  # factory, overrides, parameters, stochastic depth of the last block
    (secvit.secvit_t, {}, 14870440, 0.1),
    (secvit.secvit_t, {"released": True}, 14981800, 0.1),
    (secvit.secvit_s, {}, 26555304, 0.15),
    (secvit.secvit_s, {"released": True}, 26776104, 0.15),
    (secvit.secvit_b, {}, 54262296, 0.4),
    (secvit.secvit_b, {"released": True}, 54682776, 0.4),
    (secvit.secvit_l, {}, 95924856, 0.5),
    (secvit.secvit_l, {"released": True}, 96495096, 0.5),
    (secvit.sec_swin_t, {}, 28379848, 0.2),
    (secvit.sec_swin_s, {}, 49793224, 0.3),
    (secvit.sec_fastervit_0, {}, 25044776, 0.2),
    (secvit.sec_fastervit_1, {}, 40830248, 0.2),
    (clustr.clustr_t, {}, 11682740, 0.1),
    (clustr.clustr_s, {}, 22691781, 0.2),
    (clustr.clustr_b, {}, 40247050, 0.3),
    (linglo.linglo_b0, {}, 3807880, 0.1),
    (linglo.linglo_b1, {}, 14135592, 0.1),
    (linglo.linglo_b2, {}, 25971880, 0.15),
    (stvit.stvit_s, {}, 25495624, 0.1),
    (stvit.stvit_b, {}, 51691288, 0.4),
    (stvit.stvit_l, {}, 94971096, 0.6),
]
each_case = pytest.mark.parametrize("name", CASES)
each_file = pytest.mark.parametrize("name", ["clustr", "secvit", "linglo", "stvit"])


def small_model(name, **overrides):
    """The model of a case with 7 classes and, unless overridden, without stochastic depth."""
    case = CASES[name]
    factory = getattr(case.module, case.factory)
    options = {"num_classes": 7, "drop_path_rate": 0.0, **case.options, **overrides}
    return factory(**options)


def drop_path_rates(model):
    return [module.rate for module in model.modules() if type(module).__name__ == "DropPath"]


# -------------------------------------------------------------------------- construction, gradients
def factory_name(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("factory, overrides, parameters, rate", FACTORIES, ids=factory_name)
def test_default_sizes(factory, overrides, parameters, rate):
    with torch.device("meta"):  # shapes only
        model = factory(**overrides)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert drop_path_rates(model)[-1] == pytest.approx(rate)
    assert model.head.out_features == 1000


@each_case
def test_unknown_override_is_a_type_error(name):
    with pytest.raises(TypeError, match="depth_"):
        small_model(name, depth_=(1, 1, 1, 1))


@each_file
@pytest.mark.parametrize("values", [(2, 2, 2), (2, 2, 2, 2, 2), (0, 2, 2, 2), (2, 2, 2, -2)])
@pytest.mark.parametrize("argument", ["depths", "dims", "heads"])
def test_stages_are_four_of_at_least_one(name, argument, values):
    with pytest.raises(ValueError, match=f"{argument} = .*expected 4 values of at least 1"):
        small_model(name, **{argument: values})


@each_file
@pytest.mark.parametrize("argument, value, rule", [
    ("num_classes", -1, "at least 0"),
    ("drop_path_rate", -0.1, "0 <= rate < 1"),
    ("drop_path_rate", 1, "0 <= rate < 1"),
    ("drop_path_rate", math.nan, "0 <= rate < 1"),
])
def test_model_refuses_values_out_of_range(name, argument, value, rule):
    with pytest.raises(ValueError, match=f"{argument} = {value}, expected {rule}"):
        small_model(name, **{argument: value})


@each_case
@pytest.mark.parametrize("option, value", [
    ("num_classes", -1),
    ("drop_path_rate", 1.0),
    ("drop_path_rate", -0.1),
    ("depths", (1, 0, 1, 1)),
    ("depths", (1, 1, 1)),
    ("dims", (8, 16, 16, 0)),
    ("heads", (1, 2, 2, 4, 4)),
])
def test_wrong_option_raises(name, option, value):
    with pytest.raises(ValueError, match=option):
        small_model(name, **{option: value})


@each_case
def test_heads_that_do_not_divide_the_channels_raise(name):
    with pytest.raises(ValueError, match="dim = 18 does not split into 4 heads"):
        small_model(name, dims=(8, 16, 16, 18))


@each_case
def test_without_classes_the_output_is_the_pooled_features(name):
    model = small_model(name).eval()
    features_only = small_model(name, num_classes=0).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    features_only.load_state_dict(state)
    images = torch.randn(2, 3, 33, 47)
    assert_close(model.head(features_only(images)), model(images))


@each_case
def test_every_parameter_gets_a_gradient(name, device):
    model = small_model(name).to(device).train()
    logits = model(torch.randn(2, 3, 64, 96, device=device))
    (logits * torch.randn_like(logits)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if parameter.ndim > 1:  # biases before a norm have no gradient in exact arithmetic
            assert parameter.grad.count_nonzero() > 0, key


# ---------------------------------------------------------------------------- maps, inputs, batches
@each_case
@pytest.mark.parametrize("H, W", [(32, 32), (33, 47), (64, 96), (50, 100)])
@pytest.mark.parametrize("precision", ["float32", "autocast", "float64"])
def test_feature_maps(name, H, W, precision, device):
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = small_model(name).to(device, dtype)
    images = torch.randn(2, 3, H, W, device=device, dtype=dtype)
    expected = []
    for dim, stride in zip(model.channels, (4, 8, 16, 32), strict=True):
        expected.append((2, dim, math.ceil(H / stride), math.ceil(W / stride)))
    for training in (True, False):
        model.train(training)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            maps = model.forward_features(images)
            logits = model(images)
        assert [tuple(x.shape) for x in maps] == expected
        assert logits.shape == (2, 7)
        for x in (*maps, logits):
            assert x.isfinite().all()


@each_case
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fill", ["zero", "constant", "half"])
def test_flat_images_stay_finite(name, training, fill, device):
    value = 2.5 if fill == "constant" else 0.0
    images = torch.full((2, 3, 64, 72), value, device=device)
    if fill == "half":
        images[..., :32] = torch.randn(2, 3, 64, 32)
    model = small_model(name).to(device).train(training)
    maps = model.forward_features(images)
    sum(x.square().sum() for x in maps).backward()
    for x in maps:
        assert x.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@each_case
@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 31), (1, 4, 64, 64), (3, 64, 64)])
def test_wrong_shape_raises(name, shape):
    with pytest.raises(ValueError, match=", ".join(map(str, shape))):
        small_model(name)(torch.zeros(shape))


@each_case
def test_samples_do_not_see_each_other(name, device):
    model = small_model(name).to(device).double().eval()
    factor = torch.tensor([1.0, 30.0, 0.0], device=device).view(3, 1, 1, 1)
    images = factor * torch.randn(3, 3, 50, 64, dtype=torch.float64, device=device)
    batched = model(images)
    for i in range(3):
        assert_close(batched[i:i + 1], model(images[i:i + 1]))
    assert not torch.allclose(batched[0], batched[1])


class Command:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@each_file
def test_a_file_of_weights_runs_no_code(name, tmp_path):
    torch.save({"model": Command(str(tmp_path / "made"))}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="no weights in it"):
        CASES[name].module.read_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "made").exists()


# --------------------------------------------------------------------------------- stochastic depth
@each_file
def test_drop_path(name):
    x = torch.randn(20000, 2, 1, 3)
    branch = torch.randn(20000, 2, 1, 3)
    y = CASES[name].module.DropPath(0.3)(x, branch)
    kept = y[:, 0, 0, 0] != x[:, 0, 0, 0]
    assert_close(y, torch.where(kept.view(-1, 1, 1, 1), x + branch / 0.7, x))
    assert abs(kept.float().mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 20000)


@each_file
def test_drop_path_that_drops_nothing_is_an_addition(name):
    x, branch = torch.randn(2, 4, 2, 1, 3)
    DropPath = CASES[name].module.DropPath
    assert DropPath(0.3).eval()(x, branch).equal(x + branch)
    assert DropPath(0.0)(x, branch).equal(x + branch)


@each_file
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_keeps_the_type(name, dtype, device):
    """With the statistics of at least float32, inside autocast and outside."""
    norm = CASES[name].module.LayerNorm(48).to(device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 30 + torch.randn(2, 5, 48, device=device).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    norm = norm.to(wide)
    weight = norm.weight.to(dtype).to(wide)
    bias = norm.bias.to(dtype).to(wide)
    expected = F.layer_norm(x.to(wide), (48,), weight, bias, norm.eps).to(dtype)
    assert_close(norm(x), expected)
    if dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype):
            assert_close(norm(x), expected)


@each_case
def test_drop_path_rates_rise_linearly(name):
    model = small_model(name, drop_path_rate=0.4)
    expected = torch.linspace(0, 0.4, sum(PYRAMID["depths"]))
    assert_close(torch.tensor(drop_path_rates(model)), expected)


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_only_training_is_random(name, training):
    model = small_model(name, drop_path_rate=0.4).train(training)
    images = torch.randn(4, 3, 32, 64)
    assert model(images).equal(model(images)) != training


# ------------------------------------------------------------------------------ compilation, memory
def keep_blocks(model, stages):
    """The model with one block in each of `stages` and none in the others."""
    for i, stage in enumerate(model.stages):
        del stage[1 if i in stages else 0:]
    return model


def outputs_and_gradients(function, model, images):
    logits = function(images)
    loss = (logits * torch.arange(7)).sum()
    return logits, *torch.autograd.grad(loss, [*model.parameters()])


@each_case
def test_compiled_equals_eager(name):
    """Sides that cells and clusters divide; stage 2 has the same kind of block as stage 1."""
    torch._dynamo.reset()
    model = keep_blocks(small_model(name), stages=(0, 2, 3)).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = outputs_and_gradients(compiled, model, images)
    assert_close(result, outputs_and_gradients(model, model, images))


@torch._dynamo.config.patch(fake_tensor_cache_enabled=False)    # slower with symbolic sizes
@each_case
def test_one_compilation_serves_several_sizes(name):
    """Sides that cells and clusters do not divide.

    Symbolic sizes are slow, hence one block, and stripes without patch merging, which SEC-Swin has.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    overrides = {"conv_stem": True} if name == "secvit_ablated" else {}
    model = keep_blocks(small_model(name, **overrides), stages=(0,)).double()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in ((50, 100), (60, 84)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        torch._dynamo.mark_dynamic(images, (2, 3))
        result = outputs_and_gradients(compiled, model, images)
        assert_close(result, outputs_and_gradients(model, model, images))
    assert len(graphs) == 1


@each_case
def test_exported_equals_eager(name):
    model = small_model(name, depths=(1, 1, 1, 1)).eval()
    images = torch.randn(2, 3, 50, 64)
    exported = torch.export.export(model, (images,)).module()
    assert_close(exported(images), model(images))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that an operation returned."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@each_case
def test_no_tensor_of_tokens_by_tokens(name):
    """N = 4096 tokens in stage 1; maps have at most N^2 / 64 elements.

    Explicit attention weights of SecViT's 32 clusters would have N^2 / 32. ClusTR's clustering is
    one operator, into which this cannot look; test_clustr.py tests its function.
    """
    model = small_model(name).eval()
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad(), LargestTensor() as largest:
        model.forward_features(images)
    assert images.numel() <= largest.numel <= 4096 ** 2 / 64


# ------------------------------------------------------------------------------------- command line
ORIENTATION_TAG = 0x0112  # of EXIF
ROTATED = 6  # its value if the stored left side is the top
DEFAULT_IMAGE_SIZE = (480, 320)
GAP = 8  # between the panels of a figure
CAPTION_HEIGHT = 20


def save_image(path, mode):
    """A 48 x 32 image in the mode, 64 in the left half and 192 in the right."""
    grey = np.full((32, 48), 64, np.uint8)
    grey[:, 24:] = 192
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) << 8)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    assert image.mode == mode
    image.save(path)


def rotated_exif():
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = ROTATED
    return exif


def run_main(name, monkeypatch, *arguments):
    """Run `main` of the model's file with a small model as its default factory."""
    case = CASES[name]
    factory = getattr(case.module, case.factory)
    monkeypatch.setattr(case.module, case.factory, partial(factory, **case.options))
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    case.module.main()


@each_file
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "1"])
def test_load_image_reads_the_mode(name, mode, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    save_image(path, mode)
    image = CASES[name].module.load_image(path)
    assert image.mode == "RGB"
    assert image.size == (512, 341)
    pixels = np.asarray(image, float)
    dark, bright = (0, 255) if mode == "I;16" else (64, 192)  # 16-bit values are stretched
    assert abs(pixels[:, :240].mean() - dark) < 10
    assert abs(pixels[:, -240:].mean() - bright) < 10


@each_file
def test_load_image_turns_the_image_upright(name, tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    image.save(tmp_path / "rotated.jpg", exif=rotated_exif())
    upright = CASES[name].module.load_image(tmp_path / "rotated.jpg")
    assert upright.size == (256, 512)
    assert upright.getpixel((128, 100))[0] > 200
    assert upright.getpixel((128, 400))[2] > 200


@each_file
def test_load_image_ignores_unreadable_exif_data(name, tmp_path):
    """An EXIF block without a TIFF header: the image stays as it is stored."""
    path = tmp_path / "exif.webp"
    Image.new("RGB", (40, 20)).save(path, exif=rotated_exif())
    damaged = path.read_bytes().replace(b"MM\0*", b"XX\0*")
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert CASES[name].module.load_image(path).size == (512, 256)


@each_file
@pytest.mark.parametrize("size, shown", [
    ((5, 3), (512, 307)),
    ((900, 40), (512, 32)),
    ((40, 900), (32, 512)),
    (None, DEFAULT_IMAGE_SIZE),
])
def test_main_writes_a_figure(name, size, shown, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.png"
    arguments = ["-o", output]
    if size:
        Image.new("RGB", size, (200, 40, 90)).save(tmp_path / "in.png")
        arguments.append(tmp_path / "in.png")
    run_main(name, monkeypatch, *arguments)
    width, height = shown
    with Image.open(output) as figure:
        assert figure.format == "PNG"
        assert figure.width == CASES[name].panels * (width + GAP) - GAP
        assert figure.height == height + CAPTION_HEIGHT
    assert capsys.readouterr().out == f"wrote {output}\n"


@pytest.mark.parametrize("name", ["clustr", "secvit", "stvit"])
def test_main_plots_the_attention_of_a_token(name, tmp_path, monkeypatch):
    """At two places: two figures of the same size, neither the one without a token."""
    figures = set()
    for i, token in enumerate([(0, 0), (0.4, 0.999), ()]):
        output = tmp_path / f"{i}.png"
        flags = ["--token", *token] if token else []
        run_main(name, monkeypatch, "-o", output, *flags)
        figures.add(output.read_bytes())
    assert len(figures) == 3


@pytest.mark.parametrize("name", ["clustr", "secvit", "stvit"])
@pytest.mark.parametrize("place", [(-0.1, 0.5), (0.5, 1), (0.5, "nan"), ("x", 0.5)])
def test_main_refuses_a_token_outside_the_image(name, place, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(name, monkeypatch, "--token", *place)
    assert "--token" in capsys.readouterr().err


@each_file
def test_averaged_weights_are_loaded(name, tmp_path):
    """If the file has them, as the scripts' --predict does."""
    case = CASES[name]
    factory = partial(getattr(case.module, case.factory), **case.options)
    models = [factory(num_classes=7), factory(num_classes=7)]
    state = {"model": models[0].state_dict(), "ema": models[1].state_dict()}
    torch.save(state, tmp_path / "weights.pt")
    loaded = case.module.load_weights(factory, tmp_path / "weights.pt")
    assert_close(loaded.state_dict(), models[1].state_dict(), rtol=0, atol=0)


@each_file
@pytest.mark.parametrize("arguments", [[""], ["--weights", ""], ["-o", ""]])
def test_main_refuses_an_empty_file_name(name, arguments, monkeypatch, capsys):
    """Not a default: a shell variable may be unset."""
    with pytest.raises(SystemExit):
        run_main(name, monkeypatch, *arguments)
    assert "a file name is empty" in capsys.readouterr().err


@each_file
def test_main_loads_weights(name, tmp_path, monkeypatch):
    torch.manual_seed(3)  # `main` seeds its random weights with 0
    torch.save({"model": small_model(name).state_dict()}, tmp_path / "weights.pt")
    trained = tmp_path / "trained.png"
    random = tmp_path / "random.png"
    run_main(name, monkeypatch, "-o", trained, "--weights", tmp_path / "weights.pt")
    run_main(name, monkeypatch, "-o", random)
    assert trained.read_bytes() != random.read_bytes()


def do_not_write(_path):
    pass


def write_text(path):
    path.write_bytes(b"text")


def write_truncated_image(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])


def write_list(path):
    torch.save([1, 2], path)


def write_whole_module(path):
    torch.save(torch.nn.Linear(1, 1), path)


def write_other_weights(path):
    torch.save({"head.weight": torch.zeros(7, 1024)}, path)


def write_scalar_classifier(path):
    torch.save({"head.weight": torch.tensor(1.0)}, path)


BROKEN = {  # file -> how it is written
    "missing.png": do_not_write,
    "garbage.png": write_text,
    "empty.png": lambda path: path.touch(),
    "truncated.png": write_truncated_image,
    "missing.pt": do_not_write,
    "garbage.pt": write_text,
    "empty.pt": lambda path: path.touch(),
    "list.pt": write_list,
    "model.pt": write_whole_module,
    "other.pt": write_other_weights,
    "scalar.pt": write_scalar_classifier,
}


@each_file
@pytest.mark.parametrize("file", BROKEN)
def test_main_names_a_broken_file_in_one_line(name, file, tmp_path, monkeypatch, capsys):
    BROKEN[file](tmp_path / file)
    arguments = ["-o", tmp_path / "out.png"]
    if file.endswith(".pt"):
        arguments.append("--weights")
    arguments.append(tmp_path / file)
    with pytest.raises(SystemExit) as stop:
        run_main(name, monkeypatch, *arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert file in message
    assert message.endswith("\n")
    assert message.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
