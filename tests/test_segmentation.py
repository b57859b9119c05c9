"""train_dense.py, shared chapter and segmentation: against slow loops, definitions and tiny data.

Order as in the script, first what the tasks share. Letters as there.
"""
import argparse
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

import train_dense
import train_imagenet

CPU = torch.device("cpu")
LEVELS = (0, 1, 2, 3)
SMALL = {"depths": (1, 1, 1, 2), "dims": (16, 16, 32, 32), "heads": (2, 2, 2, 2)}


def small_backbone(levels=LEVELS, frozen_bn=False):
    return train_dense.Backbone("secvit_t", levels, frozen_bn, **SMALL)


def make_task(img_size=64, ms_test=False):
    args = argparse.Namespace(
        task="upernet",
        backbone="secvit_t",
        img_size=img_size,
        ms_test=ms_test,
        zero_is_class=False,
        amp="none",
    )
    return train_dense.Segmentation(args, CPU)


# ------------------------------------------------------------------------------------------- shared
@pytest.mark.parametrize("size, expected", [
    ((80, 50), (102, 64)),      # the shorter side decides
    ((50, 80), (64, 102)),
    ((300, 50), (107, 18)),     # the longer side decides
    ((3000, 1), (107, 1)),      # no side of 0 pixels
    ((1, 3000), (1, 107)),
])
def test_fit_size(size, expected):
    assert train_dense.fit_size(size, longer=107, shorter=64) == expected


def test_padding_goes_right_and_bottom():
    images = [np.full((40, 50, 3), 7, np.uint8), np.full((33, 70, 3), 9, np.uint8)]
    batch, sizes = train_dense.pad_images(images, 32)
    assert sizes.tolist() == [[40, 50], [33, 70]]
    expected = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    expected[0, :40, :50] = 7
    expected[1, :33, :70] = 9
    assert torch.equal(batch, expected)


def test_padding_reaches_the_smallest_size():
    batch, _ = train_dense.pad_images([np.zeros((40, 70, 3), np.uint8)], 1, min_size=64)
    assert batch.shape == (1, 64, 70, 3)


def test_normalized_padding_is_the_mean_colour(device):
    images = torch.full((2, 64, 96, 3), 255, dtype=torch.uint8, device=device)
    sizes = torch.tensor([[40, 50], [33, 70]], device=device)
    x = train_dense.normalize_padded(images, sizes)
    for slot, (h, w) in zip(x, sizes.tolist()):
        assert (slot[:, :h, :w] > 1).all()
        assert slot.count_nonzero() == 3 * h * w


def test_palette_has_no_colour_twice():
    colours = train_dense.palette(150)
    assert colours.shape == (150, 3) and colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == 150


def test_pyramid_adds_the_coarser_level():
    neck = train_dense.FPN([3, 5])
    fine = torch.randn(1, 3, 5, 7)
    coarse = torch.randn(1, 5, 3, 4)
    outputs = neck([fine, coarse])

    top = neck.laterals[1](coarse)
    rows = [int(i * 3 / 5) for i in range(5)]                               # nearest
    columns = [int(i * 4 / 7) for i in range(7)]
    sums = neck.laterals[0](fine) + top[:, :, rows][..., columns]
    assert len(outputs) == 2
    assert_close(outputs[0], neck.outputs[0](sums))
    assert_close(outputs[1], neck.outputs[1](top))


def test_extra_levels_of_the_pyramid():
    neck = train_dense.FPN([3, 5], extra_levels=2)
    coarse = torch.randn(1, 5, 3, 4)
    outputs = neck([torch.randn(1, 3, 5, 7), coarse])
    assert len(outputs) == 4
    assert_close(outputs[2], neck.extra[0](coarse))                         # the backbone's map
    assert_close(outputs[3], neck.extra[1](outputs[2]))                     # no ReLU between
    assert [x.shape[2:] for x in outputs[2:]] == [(2, 2), (1, 1)]           # halves, rounded up


@pytest.mark.parametrize("frozen", [True, False])
def test_backbone_keeps_its_statistics_when_frozen(frozen):
    backbone = small_backbone(frozen_bn=frozen).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    backbone(torch.randn(2, 3, 64, 64))
    assert norms
    for norm in norms:
        assert bool(norm.running_mean.any()) != frozen
        assert norm.weight.requires_grad


@pytest.mark.parametrize("name", ["secvit_t", "sec_swin_t", "sec_fastervit_0", "stvit_s"])
def test_backbones_that_end_stages_without_a_norm_get_one(name):
    with torch.device("meta"):
        backbone = train_dense.Backbone(name, LEVELS, frozen_bn=True)
    assert all(isinstance(norm, nn.LayerNorm) for norm in backbone.norms)
    assert isinstance(backbone.net.proj, nn.Identity)


@pytest.mark.parametrize("name", ["clustr_t", "linglo_b0"])
def test_backbones_with_norms_get_no_other(name):
    with torch.device("meta"):
        backbone = train_dense.Backbone(name, LEVELS, frozen_bn=True)
    assert all(isinstance(norm, nn.Identity) for norm in backbone.norms)


def test_backbone_returns_the_maps_of_its_levels():
    torch.manual_seed(1)
    backbone = small_backbone().eval()
    torch.manual_seed(1)
    subset = small_backbone(levels=(1, 3)).eval()
    images = torch.randn(2, 3, 70, 99)
    maps = backbone(images)
    assert [tuple(x.shape) for x in maps] == [
        (2, 16, 18, 25), (2, 16, 9, 13), (2, 32, 5, 7), (2, 32, 3, 4)]
    for x, y in zip(subset(images), (maps[1], maps[3]), strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def small_secvit(monkeypatch):
    """MODELS["secvit_t"] shrunk, as whole models of 7 classes need it."""
    options = {**SMALL, "num_classes": 7}
    factory = partial(train_dense.MODELS["secvit_t"], **options)
    monkeypatch.setitem(train_dense.MODELS, "secvit_t", factory)


@pytest.mark.parametrize("flags, options", [
    (["--released"], {"released": True}),
    (["--drop-path", "0.25"], {"drop_path_rate": 0.25}),
])
def test_the_backbone_is_built_as_the_flags_say(small_secvit, monkeypatch, flags, options):
    built = []
    factory = train_dense.MODELS["secvit_t"]

    def remember(**given):
        built.append(given)
        return factory(**given)
    monkeypatch.setitem(train_dense.MODELS, "secvit_t", remember)
    args, _ = train_dense.resolve_args(["--backbone", "secvit_t", "--data", "x", *flags])
    train_dense.Segmentation(args, CPU).build_model(["a"])
    assert built == [options]


def weights_task(backbone, path):
    """A task that starts from --backbone-weights."""
    args = argparse.Namespace(
        task="semfpn", backbone=backbone, weights=None, backbone_weights=str(path),
        released=False, option={})
    return train_dense.Segmentation(args, CPU)


@pytest.mark.parametrize("entry", ["model", "ema"])
def test_backbone_weights_load_with_a_report(small_secvit, tmp_path, entry):
    """Averaged weights, if the file has them."""
    classifiers = {"model": train_dense.MODELS["secvit_t"]()}
    if entry == "ema":
        classifiers["ema"] = train_dense.MODELS["secvit_t"]()
    path = tmp_path / "weights.pt"
    torch.save({name: net.state_dict() for name, net in classifiers.items()}, path)
    model = train_dense.build_model("semfpn", "secvit_t", 3)
    report = weights_task("secvit_t", path).load_pretrained(model)
    assert report == f"{path}: loaded, without head and proj"
    expected = classifiers[entry].state_dict()
    for name, tensor in model.backbone.net.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_weights_of_another_family_are_refused(tmp_path):
    weights = {"patch_embed.proj.0.weight": torch.zeros(3), "head.weight": torch.zeros(5, 3)}
    path = tmp_path / "released.pt"
    torch.save({"model": weights}, path)
    model = train_dense.build_model("semfpn", "clustr_t", 3)
    with pytest.raises(train_dense.InputError, match="do not fit ClusTR"):
        weights_task("clustr_t", path).load_pretrained(model)


@pytest.mark.parametrize("norm_decay", [True, False])
def test_decay_of_norms(small_secvit, norm_decay):
    model = train_dense.build_model("upernet", "secvit_t", 3)
    args = argparse.Namespace(
        task="upernet", backbone="secvit_t", weight_decay=0.01, norm_decay=norm_decay)
    decayed, exempt = train_dense.DenseTask(args, CPU).param_groups(model)
    assert decayed["weight_decay"] == 0.01 and exempt["weight_decay"] == 0
    ids = {id(p) for p in exempt["params"]}
    assert (id(model.backbone.net.stages[0][0].norm1.weight) in ids) != norm_decay
    assert id(model.bottleneck[1].weight) not in ids                        # not named a norm
    assert len(ids) + len(decayed["params"]) == len(list(model.parameters()))


def rates(steps, total, **flags):
    """Learning rates of some updates of a run."""
    args = argparse.Namespace(backbone="secvit_t", **flags)
    task = train_dense.DenseTask(args, CPU)
    return [task.lr_at(step, total, None) for step in steps]


def test_learning_rate_of_semantic_fpn():
    flags = dict(task="semfpn", lr=1e-4, min_lr=1e-6, warmup_iters=0, schedule=None)
    expected = [1e-4, 99e-6 * 0.4 ** 0.9 + 1e-6]
    assert rates([0, 60], 100, **flags) == pytest.approx(expected)


def test_learning_rate_of_upernet():
    flags = dict(task="upernet", lr=6e-5, min_lr=0.0, warmup_iters=1500, schedule=None)
    expected = [6e-11, 6e-5 * (1 - 750 / 160000) * (1 - 0.5 * (1 - 1e-6))]
    assert rates([0, 750], 160000, **flags) == pytest.approx(expected)


@pytest.mark.parametrize("schedule, total, expected", [
    ("1x", 12000, {0: 1e-7, 250: 1e-4 * (1 - 0.5 * 0.999), 500: 1e-4, 7999: 1e-4, 8000: 1e-5,
                   10999: 1e-5, 11000: 1e-6}),
    ("3x", 36000, {26999: 1e-4, 27000: 1e-5, 32999: 1e-5, 33000: 1e-6}),
])
def test_learning_rates_of_detection(schedule, total, expected):
    flags = dict(task="retinanet", lr=1e-4, warmup_iters=500, schedule=schedule)
    assert rates(expected, total, **flags) == pytest.approx(list(expected.values()))


# --------------------------------------------------------------------------------------------- data
@pytest.fixture
def ade20k(tmp_path):
    """Three training and two validation images of unequal sizes, labels 0 to 3 and 255."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 3), ("validation", 2)):
        images = tmp_path / "images" / split
        annotations = tmp_path / "annotations" / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for i in range(count):
            shape = (30 + i, 40 - 5 * i)
            pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            labels = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), shape)
            Image.fromarray(pixels).save(images / f"{i}.jpg")
            Image.fromarray(labels).save(annotations / f"{i}.png")
    (tmp_path / "objectInfo3.txt").write_text(
        "Idx\tStuff\tName\n1\t1\twall\n2\t1\tbuilding, edifice\n3\t0\tcar, auto\n")
    return tmp_path


def test_ade20k_reads_labels(ade20k):
    source = train_dense.Ade20k(ade20k, "train")
    for i in range(3):
        image, labels = source.read(i)
        path = ade20k / "annotations" / "training" / f"{i}.png"
        stored = np.array(Image.open(path)).astype(int)
        expected = np.where(stored == 0, 255, stored - 1)
        expected[stored == 255] = 255
        assert image.size == (40 - 5 * i, 30 + i)
        assert labels.dtype == np.uint8
        assert (labels == expected).all()


def test_ade20k_lists_images_in_order_of_name(ade20k):
    folder = ade20k / "images" / "validation"
    (folder / "notes.txt").write_text("no image")
    source = train_dense.Ade20k(ade20k, "val")
    names = [source.name(i) for i in range(len(source))]
    assert names == [str(folder / "0.jpg"), str(folder / "1.jpg")]


def test_ade20k_reads_class_names(ade20k):
    assert train_dense.Ade20k(ade20k, "val").classes == ["wall", "building", "car"]


def test_ade20k_numbers_classes_without_names(ade20k):
    (ade20k / "objectInfo3.txt").unlink()
    classes = train_dense.Ade20k(ade20k, "val").classes
    assert classes == [str(i) for i in range(1, 151)]


@pytest.mark.parametrize("name, text, count", [
    ("objectInfo3.txt", "Name\n" + "wall\n" * 255, 255),
    ("objectInfo3.txt", "Name\n", 0),
    ("classes.txt", "wall\n" * 255, 255),
    ("classes.txt", "\n", 0),
])
def test_too_many_or_no_classes_are_refused(ade20k, name, text, count):
    (ade20k / "objectInfo3.txt").unlink()
    (ade20k / name).write_text(text)
    with pytest.raises(train_dense.InputError, match=f"{name} names {count} classes"):
        train_dense.Ade20k(ade20k, "val")


def test_class_names_are_lines_of_a_file(ade20k):
    (ade20k / "objectInfo3.txt").unlink()
    text = "wall\r\n big building, grey\r\nStra\u00dfe\r\n\r\n"
    (ade20k / "classes.txt").write_bytes(text.encode("utf-8-sig"))
    classes = train_dense.Ade20k(ade20k, "val").classes
    assert classes == ["wall", "big building, grey", "Stra\u00dfe"]


def test_class_names_that_are_no_text_are_refused(ade20k):
    (ade20k / "objectInfo3.txt").write_bytes(b"Name\n\xff\xfe")
    with pytest.raises(train_dense.InputError, match="objectInfo3.txt is no text file"):
        train_dense.Ade20k(ade20k, "val")


def test_label_0_can_be_a_class(ade20k):
    (ade20k / "objectInfo3.txt").unlink()
    (ade20k / "classes.txt").write_text("wall\nbuilding\ncar\nsky\n")
    source = train_dense.Ade20k(ade20k, "train", zero_is_class=True)
    for i in range(3):
        stored = np.array(Image.open(ade20k / "annotations" / "training" / f"{i}.png"))
        _, labels = source.read(i)
        assert labels.dtype == np.uint8
        assert (labels == stored).all()


def test_label_k_is_out_of_range_if_0_is_a_class(ade20k):
    with pytest.raises(train_dense.InputError, match="label 3 out of range, there are 3 classes"):
        train_dense.Ade20k(ade20k, "train", zero_is_class=True)


def test_classes_without_names_are_numbered_from_0_if_it_is_one(ade20k):
    (ade20k / "objectInfo3.txt").unlink()
    classes = train_dense.Ade20k(ade20k, "val", zero_is_class=True).classes
    assert classes == [str(i) for i in range(150)]


def test_missing_folder(tmp_path):
    with pytest.raises(train_dense.InputError, match="nowhere.* is not a folder"):
        train_dense.Ade20k(tmp_path / "nowhere", "val")


def test_folder_without_images(ade20k):
    for file in (ade20k / "images" / "validation").iterdir():
        file.unlink()
    with pytest.raises(train_dense.InputError, match="validation holds no image"):
        train_dense.Ade20k(ade20k, "val")


@pytest.mark.parametrize("missing, message", [
    ([1], "lacks the label map of 1.jpg; 1 of 3 are missing"),
    ([0, 1, 2], "lacks the label map of 0.jpg; 3 of 3 are missing"),
])
def test_missing_label_maps(ade20k, missing, message):
    for i in missing:
        (ade20k / "annotations" / "training" / f"{i}.png").unlink()
    with pytest.raises(train_dense.InputError, match=message):
        train_dense.Ade20k(ade20k, "train")


@pytest.mark.parametrize("labels, message", [
    (np.full((30, 40), 4, np.uint8), "0.png: label 4 out of range, there are 3 classes"),
    (np.full((30, 40), 4, np.uint16), "0.png: expected a label map of 8 bits"),
    (np.zeros((30, 40, 3), np.uint8), "0.png: expected a label map of 8 bits"),
    (np.zeros((9, 8), np.uint8), "0.jpg is 40 x 30, its label map 8 x 9"),
])
def test_wrong_label_maps(ade20k, labels, message):
    source = train_dense.Ade20k(ade20k, "val")
    Image.fromarray(labels).save(ade20k / "annotations" / "validation" / "0.png")
    with pytest.raises(train_dense.InputError, match=message):
        source.read(0)


def test_broken_label_map(ade20k):
    source = train_dense.Ade20k(ade20k, "val")
    (ade20k / "annotations" / "validation" / "0.png").write_bytes(b"no image")
    with pytest.raises(train_dense.InputError, match="0.png: "):
        source.read(0)


def test_broken_image(ade20k):
    """The training loop replaces it, so it is no InputError."""
    source = train_dense.Ade20k(ade20k, "train")
    (ade20k / "images" / "training" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(train_imagenet.UnreadableImage, match="0.jpg"):
        source.read(0)


# ------------------------------------------------------------------------------------- augmentation
def red_where_one(labels):
    colours = np.array([(20, 20, 220), (220, 20, 20)], np.uint8)
    return Image.fromarray(colours[labels])


def test_augmentation_keeps_labels_on_their_pixels():
    """Red where the label is 1; distortion and resizing blur the colours a little."""
    labels = np.zeros((60, 100), np.uint8)
    labels[10:40, 20:60] = 1
    raw = red_where_one(labels), labels
    rng = random.Random(0)
    shapes = set()
    for _ in range(40):
        pixels, crop = train_dense.augment_segmentation(raw, rng, size=64)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*crop.shape, 3)
        is_red = pixels[..., 0] > pixels[..., 2]
        assert (is_red == (crop == 1)).mean() > 0.9
        shapes.add(crop.shape)
    assert len(shapes) > 1 and (64, 64) in shapes
    assert max(max(shape) for shape in shapes) == 64


def test_crops_are_sampled_again_while_one_class_fills_them():
    labels = np.zeros((64, 256), np.uint8)
    labels[:, :24] = 1
    image = Image.fromarray(labels).convert("RGB")
    mixed = 0
    for seed in range(60):
        rng = random.Random(seed)
        _, crop = train_dense.augment_segmentation((image, labels), rng, size=64)
        count = np.bincount(crop.ravel(), minlength=2)
        mixed += count.max() < 0.75 * crop.size
    assert mixed > 30                                                       # else about 7 of 60


def test_crop_of_one_class_is_taken_in_the_end():
    labels = np.zeros((90, 80), np.uint8)
    x, y = train_dense.choose_crop(labels, 64, random.Random(0))
    assert 0 <= x <= 80 - 64 and 0 <= y <= 90 - 64


def test_crop_of_ignored_pixels_only():
    labels = np.full((9, 8), train_dense.IGNORED, np.uint8)
    assert train_dense.choose_crop(labels, 64, random.Random(0)) == (0, 0)


def random_pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_distortion_changes_most_images():
    pixels = random_pixels()
    unchanged = 0
    for seed in range(60):
        result = train_dense.distort(pixels, random.Random(seed))
        assert result.dtype == np.uint8 and result.shape == pixels.shape
        unchanged += np.array_equal(result, pixels)
    assert 1 <= unchanged < 20


class ScriptedRandom(random.Random):
    """random() returns the given values, uniform and randint a constant."""

    def __init__(self, values, constant):
        super().__init__()
        self.values = iter(values)
        self.constant = constant

    def random(self):
        return next(self.values)

    def uniform(self, _low, _high):
        return self.constant

    def randint(self, _low, _high):
        return self.constant


# brightness, contrast first, contrast, saturation, hue; each happens below 0.5
@pytest.mark.parametrize("first", [0.1, 0.9])
def test_brightness_is_a_clipped_sum(first):
    pixels = random_pixels()
    rng = ScriptedRandom([0.1, first, 0.9, 0.9, 0.9], constant=20.0)
    expected = (pixels.astype(int) + 20).clip(0, 255)
    assert np.array_equal(train_dense.distort(pixels, rng), expected)


@pytest.mark.parametrize("first", [0.1, 0.9])
def test_contrast_is_a_clipped_product(first):
    pixels = random_pixels()
    rng = ScriptedRandom([0.9, first, 0.1, 0.9, 0.9], constant=1.5)
    expected = (pixels * 1.5).clip(0, 255).astype(np.uint8)
    assert np.array_equal(train_dense.distort(pixels, rng), expected)


@pytest.mark.parametrize("degrees", [30, -30])
def test_hue_turns_by_pillows_steps(degrees):
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    rng = ScriptedRandom([0.9, 0.9, 0.9, 0.9, 0.1], constant=degrees // 2)
    pixels = train_dense.distort(red, rng)
    hue, saturation, value = np.array(Image.fromarray(pixels).convert("HSV"))[0, 0].tolist()
    expected = round(degrees * 256 / 360) % 256
    assert abs(hue - expected) <= 1                                         # rounded once more
    assert saturation == value == 255


def test_saturation_moves_colours_to_grey():
    pixels = np.full((2, 2, 3), (200, 100, 100), np.uint8)
    rng = ScriptedRandom([0.9, 0.9, 0.9, 0.1, 0.9], constant=0.5)
    result = train_dense.distort(pixels, rng)[0, 0]
    assert np.abs(result.astype(int) - (200, 150, 150)).max() <= 2


# ------------------------------------------------------------------------------------------- models
HEADS = [   # parameters of Semantic FPN, of UPerNet with its auxiliary head
    ("clustr_s", 4250262, 30307628),
    ("secvit_t", 4250262, 30307628),
    ("secvit_b", 4278934, 30512428),
    ("secvit_l", 4369046, 31773996),
    ("linglo_b0", 4135574, 28284204),
    ("linglo_b1", 4266646, 30487852),
    ("stvit_s", 4266646, 30487852),
    ("stvit_b", 4307606, 30717228),
    ("stvit_l", 4356758, 31749420),
    ("sec_fastervit_0", 4250262, 30307628),
]
SEGMENTERS = [  # parameters in M: ClusTR's as printed, LinGlo's from the description, deployed
    ("clustr_s", "SemanticFPN", {}, "26.4"),
    ("clustr_s", "UPerNet", {}, "52.5"),
    ("secvit_t", "SemanticFPN", {"released": True}, "17.68"),
    ("secvit_s", "SemanticFPN", {"released": True}, "29.47"),
    ("secvit_s", "UPerNet", {"released": True}, "55.53"),
    ("secvit_b", "SemanticFPN", {"released": True}, "57.41"),
    ("secvit_b", "UPerNet", {"released": True}, "83.64"),
    ("secvit_l", "SemanticFPN", {"released": True}, "99.18"),
    ("secvit_l", "UPerNet", {"released": True}, "126.59"),
    ("stvit_s", "UPerNet", {}, "54.43"),
    ("stvit_b", "UPerNet", {}, "80.86"),
    ("stvit_l", "UPerNet", {}, "125.04"),
    ("linglo_b0", "SemanticFPN", {}, "7.48"),
    ("linglo_b1", "SemanticFPN", {}, "17.48"),
    ("linglo_b2", "SemanticFPN", {}, "28.90"),
]


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(architecture, backbone, **overrides):
    """A segmenter of 150 classes without memory."""
    with torch.device("meta"):
        net = train_dense.Backbone(backbone, LEVELS, frozen_bn=True, **overrides)
        return getattr(train_dense, architecture)(net, 150)


@pytest.mark.parametrize("backbone, semantic_fpn, upernet", HEADS)
def test_head_parameters(backbone, semantic_fpn, upernet):
    for architecture, expected in (("SemanticFPN", semantic_fpn), ("UPerNet", upernet)):
        model = on_meta(architecture, backbone)
        assert count_parameters(model) - count_parameters(model.backbone) == expected


@pytest.mark.parametrize("backbone, architecture, overrides, millions", SEGMENTERS)
def test_head_and_backbone_parameters(backbone, architecture, overrides, millions):
    """The papers count the norms that end the stages nowhere."""
    model = on_meta(architecture, backbone, **overrides)
    if backbone.startswith("linglo"):
        with torch.device("meta"):
            model.backbone.net.reparameterize()
    total = count_parameters(model) - count_parameters(model.backbone.norms)
    digits = len(millions.split(".")[1])
    assert f"{total / 1e6:.{digits}f}" == millions


def small_model(architecture):
    if architecture == "UPerNet":
        return train_dense.UPerNet(small_backbone(), 5, dim=32)
    return train_dense.SemanticFPN(small_backbone(), 5)


@pytest.mark.parametrize("architecture", ["SemanticFPN", "UPerNet"])
@pytest.mark.parametrize("size, quarter, sixteenth", [
    ((64, 64), (16, 16), (4, 4)),
    ((70, 99), (18, 25), (5, 7)),
])
def test_models_take_any_size(architecture, size, quarter, sixteenth, device):
    model = small_model(architecture).to(device)
    images = torch.randn(2, 3, *size, device=device)
    assert model.eval()(images).shape == (2, 5, *quarter)
    outputs = model.train()(images)
    if architecture == "SemanticFPN":
        assert outputs.shape == (2, 5, *quarter)
    else:
        shapes = [tuple(x.shape) for x in outputs]
        assert shapes == [(2, 5, *quarter), (2, 5, *sixteenth)]


@pytest.mark.parametrize("architecture", ["SemanticFPN", "UPerNet"])
def test_every_parameter_gets_a_gradient(architecture, device):
    model = small_model(architecture).to(device).train()
    outputs = model(torch.randn(2, 3, 70, 99, device=device))
    labels = torch.randint(0, 5, (2, 70, 99), dtype=torch.uint8, device=device)
    losses = train_dense.segmentation_losses(outputs, labels)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_semantic_fpn_matches_its_definition():
    """Semantic FPN's head in mmsegmentation, from the pyramid's maps on, block by block."""
    backbone = train_dense.Backbone("linglo_b0", LEVELS, frozen_bn=False)
    model = train_dense.SemanticFPN(backbone, 4).eval()
    images = torch.randn(2, 3, 64, 96)
    maps = model.neck(model.backbone(images))
    total = 0
    for level, count in enumerate((1, 1, 2, 3)):
        blocks = model.scales[level]
        assert len(blocks) == count
        x = maps[level]
        for block in blocks:
            x = block(x)
            if level > 0:
                x = F.interpolate(x, scale_factor=2, mode="bilinear")
        total = total + x
    assert_close(model(images), model.classifier(total))


def test_upernet_matches_its_definition():
    """UPerNet's heads in mmsegmentation, from the backbone's maps on, level by level."""
    model = small_model("UPerNet").eval()
    images = torch.randn(2, 3, 70, 99)
    c2, c3, c4, c5 = model.backbone(images)

    def grow(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear")

    pooled = [c5]
    for conv, side in zip(model.pools, (1, 2, 3, 6), strict=True):
        pooled.append(grow(conv(nn.AdaptiveAvgPool2d(side)(c5)), c5))
    p5 = model.bottleneck(torch.cat(pooled, 1))
    p4 = model.laterals[2](c4) + grow(p5, c4)
    p3 = model.laterals[1](c3) + grow(p4, c3)
    p2 = model.laterals[0](c2) + grow(p3, c2)
    p4 = grow(model.outputs[2](p4), c2)
    p3 = grow(model.outputs[1](p3), c2)
    p2 = model.outputs[0](p2)
    fused = model.fusion(torch.cat([p2, p3, p4, grow(p5, c2)], 1))
    assert_close(model(images), model.classifier(fused))


# --------------------------------------------------------------------------------------------- loss
def test_logits_alone_have_the_first_of_the_two_losses():
    """Both are compared with mmsegmentation's in test_golden.py."""
    logits = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 6, 7), dtype=torch.uint8)
    labels[:, :2] = train_dense.IGNORED
    both = train_dense.segmentation_losses((logits, logits), labels)
    assert train_dense.segmentation_losses(logits, labels) == {"loss_seg": both["loss_seg"]}


# ---------------------------------------------------------------------------------------- inference
def halves(images):
    """A model that says 0 on the dark and 1 on the bright half of images, mirrored or not."""
    _, _, H, W = images.shape
    right = torch.arange(W // 4) >= W // 8
    logits = torch.stack([~right, right]).float()                           # (2, W/4)
    if images[0, 0, 0, 0] > 0:
        logits = -logits
    return logits[None, :, None].expand(1, 2, H // 4, W // 4)


@pytest.mark.parametrize("ms_test", [False, True])
def test_segmentation_of_a_whole_image(ms_test):
    image = Image.new("RGB", (90, 60))
    image.paste((255, 255, 255), (45, 0, 90, 60))
    labels = make_task(ms_test=ms_test).predict(halves, image)
    assert labels.shape == (60, 90) and labels.dtype == np.uint8
    assert (labels[:, :40] == 0).all()
    assert (labels[:, 50:] == 1).all()


def test_multi_scale_test_averages_twelve_probabilities():
    """At one scale class 1 is very likely, at five class 0 a little: the mean logit would say 1."""
    shapes = []

    def model(images):
        shapes.append(tuple(images.shape[2:]))
        logits = [0.0, 100.0] if images.shape[2] == 32 else [1.0, 0.0]
        return torch.tensor(logits).view(1, 2, 1, 1).expand(1, 2, 4, 4)

    labels = make_task(ms_test=True).predict(model, Image.new("RGB", (200, 100)))
    assert (labels == 0).all()
    expected = []
    for side in (32, 48, 64, 80, 96, 112):
        expected += [(side, 2 * side)] * 2
    assert shapes == expected


def test_slivers_reach_the_model_with_sides_of_32():
    shapes = []

    def model(images):
        shapes.append(tuple(images.shape[2:]))
        return torch.zeros(1, 2, 8, 8)

    labels = make_task().predict(model, Image.new("RGB", (3000, 1)))
    assert labels.shape == (1, 3000)
    assert shapes == [(32, 256)]


def test_overlay_colours_and_names_classes():
    labels = np.zeros((200, 400), np.uint8)
    labels[:, 200:] = 1
    labels[0, 0] = train_dense.IGNORED
    image = Image.new("RGB", (400, 200), (100, 100, 100))
    overlay = np.array(make_task().overlay(image, labels, ["wall", "car"])).astype(int)
    assert overlay.shape == (200, 400, 3)
    colours = train_dense.palette(2).astype(int)
    for position, colour in (((190, 2), colours[0]), ((190, 388), colours[1]), ((0, 0), 0)):
        assert np.abs(overlay[position] - (colour + 100) / 2).max() <= 1
    for columns, colour in ((slice(0, 200), colours[0]), (slice(200, 400), colours[1])):
        is_label = (overlay[90:110, columns] == colour).all(-1)             # of the full colour
        assert is_label.any()
    assert image.getcolors() == [(400 * 200, (100, 100, 100))]              # not changed


def test_overlay_does_not_name_small_classes():
    labels = np.full((60, 90), train_dense.IGNORED, np.uint8)
    labels[10:15, 20:25] = 1                                                # 25 of 5400 pixels
    image = Image.new("RGB", (90, 60), (100, 100, 100))
    overlay = np.array(make_task().overlay(image, labels, ["wall", "car"]))
    colours = np.unique(overlay.reshape(-1, 3), axis=0)
    assert len(colours) == 2                                                # and no text


@pytest.mark.parametrize("size, expected", [
    ((64, 48), (320, 240)),
    ((1, 1), (320, 320)),
    ((319, 100), (638, 200)),
    ((320, 200), (320, 200)),
    ((4000, 3000), (4000, 3000)),
])
def test_small_images_are_enlarged_by_whole_numbers(size, expected):
    assert train_dense.Figure(Image.new("RGB", size)).image.size == expected


def test_lines_and_text_grow_with_the_image():
    small, large = (train_dense.Figure(Image.new("RGB", (side, side))) for side in (720, 3600))
    assert large.thick == 5 * small.thick
    assert large.font.size == 5 * small.font.size


@pytest.mark.parametrize("colour, text", [
    ((255, 255, 0), "black"),
    ((0, 255, 0), "black"),
    ((0, 0, 255), "white"),
    ((200, 0, 0), "white"),
])
def test_text_contrasts_with_its_box(colour, text):
    assert train_dense.contrast(colour) == text


@pytest.mark.parametrize("point", [(0, 0), (399, 0), (0, 299), (399, 299)])
@pytest.mark.parametrize("centred", [False, True])
def test_labels_are_whole_at_the_border(point, centred):
    """As many pixels as in the middle."""
    count = []
    for position in (point, (150, 150)):
        figure = train_dense.Figure(Image.new("RGB", (400, 300)))
        figure.label(position, "a dog\nand a cat", (255, 0, 0), centred)
        count.append(np.array(figure.image).any(-1).sum())
    assert count[0] == count[1]


# ------------------------------------------------------------------------------------------ metrics
def example_counts():
    labels = np.array([[0, 0, 1, 255], [0, 1, 1, 255]], np.uint8)
    prediction = np.array([[0, 1, 1, 0], [0, 255, 1, 2]], np.uint8)         # 255: no class
    return train_dense.count_pixels(prediction, labels, 4)


def test_pixel_counts_by_hand():
    assert example_counts().tolist() == [[2, 2, 0, 0], [2, 3, 0, 0], [3, 3, 0, 0]]


def test_mean_iou_by_hand():
    expected = {"mIoU": (2 / 3 + 2 / 4) / 2, "mAcc": (2 / 3 + 2 / 3) / 2, "aAcc": 4 / 6}
    assert train_dense.mean_iou(example_counts()) == pytest.approx(expected)


def test_iou_per_class_by_hand():
    expected = [2 / 3, 2 / 4, math.nan, math.nan]
    assert train_dense.class_iou(example_counts()) == pytest.approx(expected, nan_ok=True)


def test_mean_iou_of_a_class_that_is_only_predicted():
    counts = example_counts()
    counts[1, 3] = 3
    expected = (2 / 3 + 2 / 4 + 0) / 3
    assert train_dense.mean_iou(counts)["mIoU"] == pytest.approx(expected)


def test_mean_iou_without_labels():
    expected = {"mIoU": -1.0, "mAcc": -1.0, "aAcc": -1.0}
    assert train_dense.mean_iou(np.zeros((3, 4), int)) == expected


# --------------------------------------------------------------------------------------------- task
def test_batches_are_padded_with_ignored_pixels():
    images = [np.full((40, 64, 3), 7, np.uint8), np.full((64, 30, 3), 9, np.uint8)]
    labels = [np.full((40, 64), 1, np.uint8), np.full((64, 30), 2, np.uint8)[:, ::-1]]
    batch, maps, sizes = make_task().collate(list(zip(images, labels)))
    assert batch.shape == (2, 64, 64, 3)
    assert sizes.tolist() == [[40, 64], [64, 30]]
    expected = torch.full((2, 64, 64), train_dense.IGNORED, dtype=torch.uint8)
    expected[0, :40] = 1
    expected[1, :, :30] = 2
    assert torch.equal(maps, expected)


def test_small_batches_are_padded_to_the_crop():
    sample = np.zeros((40, 30, 3), np.uint8), np.zeros((40, 30), np.uint8)
    batch, maps, _ = make_task().collate([sample, sample])
    assert batch.shape == (2, 64, 64, 3)
    assert maps.shape == (2, 64, 64)


def test_task_from_files_to_losses(ade20k):
    task = make_task()
    source = task.open_split(ade20k, "train")
    rng = random.Random(0)
    samples = [task.augment(source.read(i), rng) for i in range(3)]
    model = small_model("UPerNet").train()
    losses = task.losses(model, task.collate(samples))
    assert list(losses) == ["loss_seg", "loss_aux"]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_records_add_up_to_the_metrics(ade20k):
    """A model that always says class 1: its accuracy is that class's fraction of the pixels."""
    task = make_task()
    source = task.open_split(ade20k, "val")

    def model(_images):
        return torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)

    samples = [(i, source.read(i)) for i in range(2)]
    records = []
    for sample in samples:
        records.append(task.record(source, sample, task.infer(model, sample)))
    labels = np.concatenate([labels.ravel() for _, (_, labels) in samples])
    fraction = (labels == 1).sum() / (labels != train_dense.IGNORED).sum()
    expected = {"mIoU": fraction / 3, "mAcc": 1 / 3, "aAcc": fraction}
    assert task.summarize(source, records) == pytest.approx(expected)


def test_score_of_the_labels_is_perfect(ade20k):
    source = train_dense.Ade20k(ade20k, "val")
    scores = make_task().score_results(source, ade20k / "annotations" / "validation")
    assert scores == {"mIoU": 1, "mAcc": 1, "aAcc": 1}


def test_score_of_results_without_a_label_map(ade20k, tmp_path):
    source = train_dense.Ade20k(ade20k, "val")
    with pytest.raises(train_dense.InputError, match="results lacks 0.png; expected a folder"):
        make_task().score_results(source, tmp_path / "results")


@pytest.mark.parametrize("label, message", [
    (4, "label 4 out of range, there are 3 classes"),
    (3, "0.png: 8 x 9, its image 40 x 30"),
])
def test_score_of_wrong_results(ade20k, tmp_path, label, message):
    source = train_dense.Ade20k(ade20k, "val")
    (tmp_path / "results").mkdir()
    Image.fromarray(np.full((9, 8), label, np.uint8)).save(tmp_path / "results" / "0.png")
    with pytest.raises(train_dense.InputError, match=message):
        make_task().score_results(source, tmp_path / "results")


def test_labels_of_nothing_but_ignored_pixels_are_an_error(ade20k):
    for path in (ade20k / "annotations" / "training").iterdir():
        with Image.open(path) as labels:
            binary = np.where(np.array(labels) > 0, 255, 0).astype(np.uint8)
        Image.fromarray(binary).save(path)
    message = "has no pixel of any class; 0 and 255 are ignored"
    with pytest.raises(train_dense.InputError, match=message):
        train_dense.Ade20k(ade20k, "train")
