"""What all model files promise alike: counts, gradients, feature maps, bad input, stochastic depth, compile, memory, command line.

A new model file joins by an entry in CASES and lines in FACTORIES.
"""
import math
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import clustr
import linglo
import secvit
import stvit


class Case(NamedTuple):
    module: ModuleType
    factory: str
    tiny: dict      # overrides that make the factory's model small
    panels: int     # pictures side by side that `main` draws of the tiny model


SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 32), "heads": (1, 2, 2, 4), "layer_scale": (None, None, 0.5, 0.5)}
PYRAMID = {key: value for key, value in SMALL.items() if key != "layer_scale"}
CASES = {
    "clustr": Case(clustr, "clustr_t", PYRAMID, 6),
    "secvit": Case(secvit, "secvit_t", {**SMALL, "clusters": (32, 8, 2, 1)}, 4),
    "secvit_released": Case(secvit, "secvit_t", {**SMALL, "clusters": (32, 8, 2, 1), "released": True}, 4),
    "secvit_ablated": Case(secvit, "secvit_t", {**SMALL, "heads": (2, 2, 4, 4), "attention": "csw", "conv_stem": False}, 0),
    "sec_swin": Case(secvit, "sec_swin_t", {**PYRAMID, "clusters": (1, 8, 2, 1)}, 3),         # symbolic shapes: one cluster is quick
    "sec_fastervit": Case(secvit, "sec_fastervit_0", {**PYRAMID, "stem_dim": 8}, 2),
    "linglo": Case(linglo, "linglo_b0", PYRAMID, 5),
    "stvit": Case(stvit, "stvit_s", SMALL, 3),
}
FACTORIES = [   # factory, overrides, parameters, stochastic depth of the last block
    (secvit.secvit_t, {}, 14870440, 0.1), (secvit.secvit_t, {"released": True}, 14981800, 0.1),
    (secvit.secvit_s, {}, 26555304, 0.15), (secvit.secvit_s, {"released": True}, 26776104, 0.15),
    (secvit.secvit_b, {}, 54262296, 0.4), (secvit.secvit_b, {"released": True}, 54682776, 0.4),
    (secvit.secvit_l, {}, 95924856, 0.5), (secvit.secvit_l, {"released": True}, 96495096, 0.5),
    (secvit.sec_swin_t, {}, 28379848, 0.2), (secvit.sec_swin_s, {}, 49793224, 0.3),
    (secvit.sec_fastervit_0, {}, 25044776, 0.2), (secvit.sec_fastervit_1, {}, 40830248, 0.2),
    (clustr.clustr_t, {}, 11682740, 0.1), (clustr.clustr_s, {}, 22691781, 0.2), (clustr.clustr_b, {}, 40247050, 0.3),
    (linglo.linglo_b0, {}, 3807880, 0.1), (linglo.linglo_b1, {}, 14135592, 0.1), (linglo.linglo_b2, {}, 25971880, 0.15),
    (stvit.stvit_s, {}, 25495624, 0.1), (stvit.stvit_b, {}, 51691288, 0.4), (stvit.stvit_l, {}, 94971096, 0.6),
]
each_case = pytest.mark.parametrize("name", CASES)
each_file = pytest.mark.parametrize("name", [name for name, case in CASES.items() if name == case.module.__name__])


def tiny(name, **overrides):
    case = CASES[name]
    return getattr(case.module, case.factory)(num_classes=7, **{"drop_path_rate": 0., **case.tiny, **overrides})


def rates(model):
    return [module.rate for module in model.modules() if type(module).__name__ == "DropPath"]


# ----------------------------------------------------------------------------------------------- construction, gradients
@pytest.mark.parametrize("factory, overrides, parameters, rate", FACTORIES, ids=lambda value: getattr(value, "__name__", ""))
def test_parameter_count(factory, overrides, parameters, rate, monkeypatch):
    for rule in ("trunc_normal_", "kaiming_uniform_", "uniform_"):      # values do not matter here, filling them takes seconds
        monkeypatch.setattr(torch.nn.init, rule, lambda tensor, *_, **__: tensor)
    model = factory(**overrides)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert rates(model)[-1] == pytest.approx(rate)
    assert model.head.out_features == 1000


@each_case
def test_unknown_override_is_a_type_error(name):
    with pytest.raises(TypeError, match="depth_"):
        tiny(name, depth_=(1, 1, 1, 1))


@each_case
def test_every_parameter_gets_a_gradient(name, device):
    model = tiny(name).to(device).train()
    logits = model(torch.randn(2, 3, 64, 96, device=device))
    (logits * torch.randn_like(logits)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if parameter.ndim > 1:      # biases in front of a norm have none in exact arithmetic
            assert parameter.grad.count_nonzero() > 0, key


# -------------------------------------------------------------------------------------------------- maps, input, batches
@each_case
@pytest.mark.parametrize("H, W", [(32, 32), (33, 47), (64, 96), (50, 100)])
@pytest.mark.parametrize("precision", ["float32", "autocast", "float64"])
def test_feature_maps(name, H, W, precision, device):
    model, images = tiny(name).to(device), torch.randn(2, 3, H, W, device=device)
    if precision == "float64":
        model, images = model.double(), images.double()
    expected = [(2, c, math.ceil(H / s), math.ceil(W / s)) for c, s in zip(model.channels, (4, 8, 16, 32), strict=True)]
    for mode in (True, False):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            maps, logits = model.train(mode).forward_features(images), model(images)
        assert [tuple(m.shape) for m in maps] == expected
        assert logits.shape == (2, 7)
        assert all(t.isfinite().all() for t in (*maps, logits))


@each_case
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fill", ["zero", "constant", "half"])
def test_flat_images_stay_finite(name, mode, fill, device):
    images = torch.full((2, 3, 64, 72), {"zero": 0., "constant": 2.5, "half": 0.}[fill], device=device)
    if fill == "half":
        images[..., :32] = torch.randn(2, 3, 64, 32)
    model = tiny(name).to(device).train(mode)
    maps = model.forward_features(images)
    sum(m.square().sum() for m in maps).backward()
    assert all(m.isfinite().all() for m in maps)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@each_case
@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 31), (1, 4, 64, 64), (3, 64, 64)])
def test_wrong_shape_raises(name, shape):
    with pytest.raises(ValueError, match=", ".join(map(str, shape))):
        tiny(name)(torch.zeros(shape))


@each_case
def test_samples_do_not_see_each_other(name, device):
    model = tiny(name).to(device).double().eval()
    images = torch.randn(3, 3, 50, 64, dtype=torch.float64, device=device) * torch.tensor([1., 30., 0.], device=device).view(3, 1, 1, 1)
    together = model(images)
    for i in range(3):
        assert_close(together[i:i + 1], model(images[i:i + 1]))
    assert not torch.allclose(together[0], together[1])


# ------------------------------------------------------------------------------------------------------ stochastic depth
@each_file
def test_drop_path(name):
    x, layer = torch.randn(20000, 2, 1, 3), CASES[name].module.DropPath(0.3)
    y = layer(x)
    kept = y[:, 0, 0, 0] != 0
    assert_close(y, torch.where(kept.view(-1, 1, 1, 1), x / 0.7, 0))
    assert abs(kept.float().mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 20000)
    assert layer.eval()(x) is x
    assert CASES[name].module.DropPath(0.)(x) is x


@each_case
def test_drop_path_in_the_model(name):
    model, images = tiny(name, drop_path_rate=0.4), torch.randn(4, 3, 32, 64)
    assert_close(torch.tensor(rates(model)), torch.linspace(0, 0.4, sum(SMALL["depths"])))
    model.train()
    assert not model(images).equal(model(images))
    model.eval()
    assert model(images).equal(model(images))


# ------------------------------------------------------------------------------------------------------- compile, memory
def outputs_and_gradients(function, model, images):
    logits = function(images)
    return logits, *torch.autograd.grad((logits * torch.arange(7)).sum(), [*model.parameters()])


@each_case
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    model, images = tiny(name).double(), torch.randn(2, 3, 50, 64, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, model, images), outputs_and_gradients(model, model, images))


@each_case
def test_compiled_with_dynamic_sizes_equals_eager(name):
    """One block and no aot: torch's symbolic shapes are slow, minutes for a whole model."""
    torch._dynamo.reset()
    model = tiny(name, depths=(1, 0, 0, 0)).double()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in ((64, 96), (50, 100)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        assert_close(outputs_and_gradients(compiled, model, images), outputs_and_gradients(model, model, images))


@each_case
def test_exported_equals_eager(name):
    model, images = tiny(name).eval(), torch.randn(2, 3, 50, 64)
    assert_close(torch.export.export(model, (images,)).module()(images), model(images))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that an operation returned."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@each_case
def test_no_tensor_of_tokens_by_tokens(name):
    """N = 4096 tokens in stage 1. Maps have N^2 / 64 at most; explicit attention weights of SecViT's 32 clusters have N^2 / 32.

    ClusTR's clustering is one operator, which this cannot look into; test_clustr.py looks at its function.
    """
    model, images = tiny(name).eval(), torch.randn(1, 3, 256, 256)
    with torch.no_grad(), LargestTensor() as largest:
        model.forward_features(images)
    assert images.numel() <= largest.numel <= 4096 ** 2 / 64


# ---------------------------------------------------------------------------------------------------------- command line
ORIENTATION = 0x0112    # EXIF tag


def save_picture(path, mode):
    """A 48 x 32 picture in the mode, 64 in the left half and 192 in the right."""
    grey = np.full((32, 48), 64, np.uint8)
    grey[:, 24:] = 192
    picture = Image.fromarray(grey.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(grey).convert("RGB").convert(mode)
    assert picture.mode == mode
    picture.save(path)


def run_main(name, monkeypatch, *arguments):
    """Run `main` of the model's file with its default factory made small."""
    case = CASES[name]
    monkeypatch.setattr(case.module, case.factory, partial(getattr(case.module, case.factory), **case.tiny))
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    case.module.main()


@each_file
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "1"])
def test_load_picture_reads_the_mode(name, mode, tmp_path):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    save_picture(path, mode)
    picture = CASES[name].module.load_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (512, 341))
    pixels = np.asarray(picture, float)
    dark, bright = (0, 255) if mode == "I;16" else (64, 192)       # deep grey is stretched
    assert abs(pixels[:, :240].mean() - dark) < 10 and abs(pixels[:, -240:].mean() - bright) < 10


@each_file
def test_load_picture_turns_upright(name, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6                                          # the stored left side is the top
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (20, 0, 40, 20))
    picture.save(tmp_path / "turned.jpg", exif=exif)
    upright = CASES[name].module.load_picture(tmp_path / "turned.jpg")
    assert upright.size == (256, 512)
    assert upright.getpixel((128, 100))[0] > 200 and upright.getpixel((128, 400))[2] > 200


@each_file
@pytest.mark.parametrize("size, expected", [((5, 3), (512, 307)), ((900, 40), (512, 32)), ((40, 900), (32, 512)), (None, (480, 320))])
def test_main_draws(name, size, expected, tmp_path, monkeypatch, capsys):
    arguments = ["-o", tmp_path / "out.png"]
    if size:
        Image.new("RGB", size, (200, 40, 90)).save(tmp_path / "in.png")
        arguments.append(tmp_path / "in.png")
    run_main(name, monkeypatch, *arguments)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.format == "PNG"
        assert drawn.size == (CASES[name].panels * (expected[0] + 8) - 8, expected[1] + 20)      # 8 between panels, 20 for captions
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out.png'}\n"


@each_file
def test_main_loads_weights(name, tmp_path, monkeypatch):
    torch.manual_seed(3)    # `main` takes 0 for random weights
    torch.save({"model": tiny(name).state_dict()}, tmp_path / "weights.pt")
    run_main(name, monkeypatch, "-o", tmp_path / "out.png", "--weights", tmp_path / "weights.pt")
    run_main(name, monkeypatch, "-o", tmp_path / "random.png")
    assert (tmp_path / "out.png").read_bytes() != (tmp_path / "random.png").read_bytes()


def truncated(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])


def with_broken_exif(path):
    """An EXIF block whose first bytes are no TIFF header."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    path.write_bytes(path.read_bytes().replace(b"MM\0*", b"XX\0*"))


BROKEN = {
    "missing.png": lambda _: None,
    "garbage.png": lambda path: path.write_bytes(b"no picture"),
    "empty.png": lambda path: path.touch(),
    "truncated.png": truncated,
    "exif.webp": with_broken_exif,
    "missing.pt": lambda _: None,
    "garbage.pt": lambda path: path.write_bytes(b"no weights"),
    "empty.pt": lambda path: path.touch(),
    "list.pt": lambda path: torch.save([1, 2], path),
    "model.pt": lambda path: torch.save(torch.nn.Linear(1, 1), path),
    "other.pt": lambda path: torch.save({"head.weight": torch.zeros(7, 1024)}, path),
}


@each_file
@pytest.mark.parametrize("file", BROKEN)
def test_main_names_a_broken_file_in_one_line(name, file, tmp_path, monkeypatch, capsys):
    BROKEN[file](tmp_path / file)
    with pytest.raises(SystemExit) as stop:
        run_main(name, monkeypatch, "-o", tmp_path / "out.png", *["--weights"] * file.endswith(".pt"), tmp_path / file)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert file in message
    assert message.endswith("\n") and message.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
