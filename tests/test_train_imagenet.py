"""train_imagenet.py: augmentation against its definition, flags, exact resume, processes, errors.

Whole runs use secvit_t shrunk to milliseconds per update; runs in processes of their own use it
through a small launcher script.
"""
import argparse
import copy
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_backbone
from PIL import Image, ImageOps

import linglo
import secvit
import train_imagenet

ROOT = Path(train_imagenet.__file__).parent
SMALL = {**TINY, "layer_scale": (None, None, 1e-6, 1e-6)}
FAST = (  # 3 updates per epoch of the 14 images, 6 in all
    "--model secvit_t --img-size 32 --batch-size 4 --micro-batch 2 --epochs 2 "
    "--warmup-epochs 0.5 --lr 1e-3 --workers 0 --log-every 1"
).split()
FULL = (
    "--mixup 0.8 --cutmix 1 --random-erase 0.5 --randaug rand-m9-mstd0.5-inc1 "
    "--ema 0.9 --drop-path 0.3 --repeated-aug 1"
).split()


small_model = partial(tiny_backbone, **SMALL)  # what MODELS holds instead of secvit_t
pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_imagenet.MODELS, "secvit_t", small_model)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """14 training and 7 validation images of 2 classes, of several sizes and modes."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, images in (("train", 14), ("val", 7)):
        for i in range(images):
            path = root / split / ("cat", "dog")[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20 + 5 * i, 90 - 5 * i, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            image.convert(("RGB", "L", "P", "RGBA")[i % 4]).save(path)
    return root


@pytest.fixture(scope="module")
def finished(tiny, folder, tmp_path_factory):
    """The output folder of a whole run with every augmentation; not to be changed."""
    output = tmp_path_factory.mktemp("finished")
    run(*FAST, *FULL, "--data", folder, "--output", output)
    return output


def run(*arguments):
    train_imagenet.main([str(argument) for argument in arguments])


def resolve(*arguments):
    """The resolved flags of a command line."""
    args, _ = train_imagenet.resolve_args([str(argument) for argument in arguments])
    return args


def read_records(output):
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged_updates(output):
    return [record for record in read_records(output) if "lr" in record]


def last_state(output):
    return torch.load(output / "last.pt", weights_only=True)


def assert_same_state(a, b):
    """Model, average, optimizer and counters are equal bit for bit."""
    for part in ("model", "ema") if a["ema"] else ("model",):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name
    moments = b["optimizer"]["state"]
    for key, entry in a["optimizer"]["state"].items():
        for name in entry:
            assert torch.equal(entry[name], moments[key][name]), (key, name)
    for counter in train_imagenet.TrainState.counters:
        assert a[counter] == b[counter], counter


def random_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_image(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8))).save(path)


def values(image):
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------------------------------ sampler
def make_sampler(images=50, repeats=1, rank=0, world=1, **limits):
    return train_imagenet.StepSampler(
        images=images, batch=12, micro=3, rank=rank, world=world, seed=5, repeats=repeats, **limits)


def two_epochs(images, repeats, **place):
    """Micro-batches of two epochs."""
    steps = 2 * make_sampler(images, repeats).per_epoch
    return list(make_sampler(images, repeats, last=steps, **place))


def first_epoch(images, repeats):
    batches = two_epochs(images, repeats)
    return batches[:len(batches) // 2]


def join(batches):
    keys = []
    for batch in batches:
        keys += batch
    return keys


orders = pytest.mark.parametrize("images, repeats", [(50, 1), (50, 3), (600, 3)])


@orders
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_micro_batches_of_one(images, repeats, world):
    parts = [two_epochs(images, repeats, rank=rank, world=world) for rank in range(world)]
    assert join(zip(*parts)) == two_epochs(images, repeats)


def test_sampler_starts_at_any_update():
    later = list(make_sampler(first=3, last=8))
    assert later == list(make_sampler(last=8))[3 * 4:]


@orders
def test_an_epoch_holds_every_key_once(images, repeats):
    keys = join(first_epoch(images, repeats))
    used = 512 if images == 600 else images
    assert len(keys) == used // 12 * 12
    assert len(set(keys)) == len(keys)
    assert {epoch for epoch, _, _ in keys} == {0}


@orders
def test_every_image_comes_as_often_as_asked(images, repeats):
    keys = join(first_epoch(images, repeats))
    distinct = {index for _, index, _ in keys}
    assert abs(len(distinct) - len(keys) / repeats) <= 1


@pytest.mark.parametrize("images", [50, 600])
def test_copies_of_an_image_are_in_different_micro_batches(images):
    for batch in first_epoch(images, repeats=3)[:8]:
        assert len({index for _, index, _ in batch}) == 3


@orders
def test_each_epoch_has_its_own_order(images, repeats):
    batches = two_epochs(images, repeats)
    half = len(batches) // 2
    first = [key[1:] for key in join(batches[:half])]
    second = [key[1:] for key in join(batches[half:])]
    assert first != second


# --------------------------------------------------------------------------------------------- data
def open_folder(folder):
    return train_imagenet.open_data(folder, "train", "val", announce=False)


def test_splits_have_the_same_classes(folder):
    train, val = open_folder(folder)
    assert train.classes == val.classes == ["cat", "dog"]
    assert len(train) == 14
    assert len(val) == 7


def test_images_are_listed_by_class(folder):
    train, _ = open_folder(folder)
    assert train.labels.tolist() == [0] * 7 + [1] * 7
    assert train.name(7).endswith("dog/01.png")


def test_images_of_any_mode_are_read_as_rgb(folder):
    train, _ = open_folder(folder)
    assert {train.read(i).mode for i in range(len(train))} == {"RGB"}


def test_grey_of_16_bits_is_stretched(tmp_path):
    grey = np.arange(1000, 1000 + 12 * 9, dtype=np.uint16).reshape(9, 12)
    save_image(tmp_path / "a" / "0.png", Image.fromarray(grey))
    image = train_imagenet.ImageFolder(tmp_path).read(0)
    expected = (grey - 1000.0) * 255 / (12 * 9 - 1)
    assert image.mode == "RGB"
    for channel in range(3):
        assert abs(values(image)[..., channel] - expected).max() <= 1


def test_grey_of_16_bits_and_one_value_is_read(tmp_path):
    save_image(tmp_path / "0.png", Image.fromarray(np.full((4, 4), 3000, np.uint16)))
    assert train_imagenet.read_image(tmp_path / "0.png").size == (4, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_if_asked(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / "photo.png"
    random_image(7, 5).save(path, exif=exif)
    upright = train_imagenet.read_image(path, upright=True)
    assert upright.tobytes() == ImageOps.exif_transpose(Image.open(path)).tobytes()
    assert train_imagenet.read_image(path).tobytes() == random_image(7, 5).tobytes()


def test_only_the_orientation_of_exif_matters(tmp_path):
    """A resolution of -1/0, which exif_transpose cannot write back."""
    orientation = struct.pack("<HHLHH", 0x112, 3, 1, 6, 0)
    resolution = struct.pack("<HHLL", 0x11A, 10, 1, 38) + struct.pack("<Lll", 0, -1, 0)
    header = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2)
    random_image(7, 5).save(tmp_path / "a.jpg", exif=header + orientation + resolution)
    assert train_imagenet.read_image(tmp_path / "a.jpg", upright=True).size == (5, 7)


def test_hidden_folders_are_no_classes(tmp_path):
    for name in ("cat", "dog", ".ipynb_checkpoints"):
        save_image(tmp_path / name / "0.png")
    source = train_imagenet.ImageFolder(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert len(source) == 2


def test_other_files_are_no_images(tmp_path):
    save_image(tmp_path / "cat" / "0.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no class")
    source = train_imagenet.ImageFolder(tmp_path)
    assert source.classes == ["cat"]
    assert len(source) == 1


@pytest.fixture
def broken(tmp_path):
    """A folder of one class, whose first 10 of 13 files are no images."""
    for i in range(13):
        path = tmp_path / "a" / f"{i:02}.png"
        if i < 10:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"no image")
        else:
            save_image(path, Image.new("RGB", (8, 8), (i, i, i)))
    return train_imagenet.ImageFolder(tmp_path)


def read_pixel(source, index, _rng):
    return source.read(index).getpixel((0, 0))


def test_unreadable_files_are_replaced_by_the_next(broken):
    samples = train_imagenet.Samples(broken, read_pixel, seed=0, max_replacements=9)
    sample, unreadable = samples[(0, 8, 0)]
    assert sample == (10, 10, 10)
    assert [re.search(r"\d+\.png", file)[0] for file in unreadable] == ["08.png", "09.png"]


def test_after_the_last_replacement_the_sample_is_missing(broken):
    samples = train_imagenet.Samples(broken, read_pixel, seed=0, max_replacements=9)
    sample, unreadable = samples[(0, 0, 0)]
    assert sample is None
    assert len(unreadable) == 10


def test_a_batch_with_a_missing_sample_is_none(broken):
    samples = train_imagenet.Samples(broken, read_pixel, seed=0, max_replacements=0)
    items = [samples[(0, 11, 0)], samples[(0, 3, 0)]]
    batch, unreadable = train_imagenet.collate(list, items)
    assert batch is None
    assert len(unreadable) == 1


def test_a_sample_depends_on_its_key_alone(broken):
    def number(_source, _index, rng):
        return rng.random()

    samples = train_imagenet.Samples(broken, number, seed=0, max_replacements=0)
    other_seed = train_imagenet.Samples(broken, number, seed=1, max_replacements=0)
    sampled = [samples[key][0] for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert samples[(0, 0, 0)][0] == sampled[0]
    assert len({*sampled, other_seed[(0, 0, 0)][0]}) == 5


def test_drawn_images_are_the_same_every_time():
    first = train_imagenet.DrawnShapes("train", 20)
    second = train_imagenet.DrawnShapes("train", 20)
    for i in range(20):
        assert first.read(i).tobytes() == second.read(i).tobytes()


def test_drawn_images_of_the_splits_differ():
    train = train_imagenet.DrawnShapes("train", 1)
    val = train_imagenet.DrawnShapes("val", 1)
    assert train.read(0).tobytes() != val.read(0).tobytes()


def test_drawn_images_have_ten_classes():
    source = train_imagenet.DrawnShapes("train", 20)
    assert len(source.classes) == 10
    assert sorted(set(source.labels.tolist())) == list(range(10))


# ------------------------------------------------------------------------------------- augmentation
@pytest.fixture
def crop_boxes(monkeypatch):
    """The boxes that were cropped, in order."""
    boxes = []

    def crop(image, box):
        boxes.append(box)
        return image

    monkeypatch.setattr(Image.Image, "crop", crop)
    return boxes


def test_random_crops_have_all_areas_and_ratios(crop_boxes):
    rng = random.Random(0)
    image = Image.new("RGB", (200, 150))
    for _ in range(500):
        assert train_imagenet.random_resized_crop(image, 24, 0.08, rng).size == (24, 24)
    left, top, right, bottom = np.array(crop_boxes).T
    area = (right - left) * (bottom - top) / (200 * 150)
    ratio = (right - left) / (bottom - top)
    assert 0.07 < area.min() < 0.15
    assert area.max() > 0.85
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.37


def test_random_crops_are_inside_of_the_image(crop_boxes):
    rng = random.Random(0)
    for _ in range(500):
        train_imagenet.random_resized_crop(Image.new("RGB", (200, 150)), 24, 0.08, rng)
    left, top, right, bottom = np.array(crop_boxes).T
    assert (left >= 0).all() and (right <= 200).all() and (left < right).all()
    assert (top >= 0).all() and (bottom <= 150).all() and (top < bottom).all()


@pytest.mark.parametrize("size, box", [
    ((1000, 6), (496, 0, 504, 6)),
    ((6, 1000), (0, 496, 6, 504)),
])
def test_elongated_images_are_cropped_in_the_middle(crop_boxes, size, box):
    """No crop of half the area has an allowed ratio of sides."""
    train_imagenet.random_resized_crop(Image.new("RGB", size), 24, 0.5, random.Random(0))
    assert crop_boxes == [box]


def test_center_crop_follows_torchvisions_rule():
    image = random_image(500, 375)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    expected = resized.crop((58, 16, 282, 240))                    # round(58.5) = 58
    assert train_imagenet.center_crop(image, 224, 0.875).tobytes() == expected.tobytes()


def test_center_crop_of_an_upright_image():
    assert train_imagenet.center_crop(random_image(375, 500), 384, 1.0).size == (384, 384)


def test_center_crop_of_a_long_image_stays_small(monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def noting_resize(image, size, *options):
        sizes.append(size)
        return resize(image, size, *options)

    monkeypatch.setattr(Image.Image, "resize", noting_resize)
    assert train_imagenet.center_crop(Image.new("RGB", (30000, 1)), 32, 1.0).size == (32, 32)
    assert max(sizes[0]) <= 8 * 32


NAMES = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
    "colour", "contrast", "brightness", "sharpness", "shear_x", "shear_y",
    "translate_x", "translate_y",
)
OPERATIONS = dict(zip(NAMES, train_imagenet.RANDAUGMENT))
magnitudes = pytest.mark.parametrize("m", [0.0, 9.0, 10.0])
PHOTO = random_image(30, 20, seed=1)


def operate(name, m, sign=1):
    return values(OPERATIONS[name](PHOTO, m, sign))


def test_randaugment_has_fifteen_operations():
    assert len(train_imagenet.RANDAUGMENT) == len(NAMES) == 15


@magnitudes
@pytest.mark.parametrize("name", NAMES)
def test_operations_keep_the_size(name, m):
    assert operate(name, m).shape == values(PHOTO).shape


@magnitudes
def test_invert(m):
    assert (operate("invert", m) == 255 - values(PHOTO)).all()


@pytest.mark.parametrize("m, bits", [(0.0, 4), (9.0, 1), (10.0, 0)])
def test_posterize_keeps_the_upper_bits(m, bits):
    step = 2 ** (8 - bits)
    assert (operate("posterize", m) == values(PHOTO) // step * step).all()


@pytest.mark.parametrize("m, threshold", [(0.0, 256), (9.0, 26), (10.0, 0)])
def test_solarize_inverts_from_a_threshold_on(m, threshold):
    x = values(PHOTO)
    assert (operate("solarize", m) == np.where(x < threshold, x, 255 - x)).all()


@pytest.mark.parametrize("m, amount", [(0.0, 0), (9.0, 99), (10.0, 110)])
def test_solarize_add_brightens_dark_values(m, amount):
    x = values(PHOTO)
    expected = np.where(x < 128, np.minimum(x + amount, 255), x)
    assert (operate("solarize_add", m) == expected).all()


@magnitudes
def test_brightness_blends_with_black(m):
    expected = np.clip(values(PHOTO) * (1 + 0.09 * m), 0, 255)
    assert abs(operate("brightness", m) - expected).max() <= 1


@pytest.mark.parametrize("name", [NAMES[i] for i in (3, 5, *range(7, 15))])
def test_operations_of_magnitude_0_change_nothing(name):
    assert (operate(name, 0.0) == values(PHOTO)).all()


@pytest.mark.parametrize("m", [9.0, 10.0])
@pytest.mark.parametrize("name, corner", [
    ("shear_x", (-1, -1)),
    ("shear_y", (-1, -1)),
    ("translate_x", (0, -1)),
    ("translate_y", (-1, 0)),
])
def test_what_moves_in_has_the_mean_colour(name, corner, m):
    assert (operate(name, m)[corner] == train_imagenet.FILL).all()


def test_translation_of_positive_sign_moves_left():
    x = values(PHOTO)
    moved = operate("translate_x", 10)                             # by 13.5 pixels
    assert abs(moved[5, 3] - (x[5, 16] + x[5, 17]) / 2).max() < 64


@magnitudes
def test_rotation_follows_the_sign(m):
    differs = (operate("rotate", m, 1) != operate("rotate", m, -1)).any()
    assert differs == (m > 0)


@pytest.fixture
def randaugment_calls(monkeypatch):
    """4000 runs of RandAugment: per run the (operation, magnitude, sign) that were applied."""
    calls = []

    def note(image, m, sign, operation):
        calls[-1].append((operation, m, sign))
        return image

    operations = tuple(partial(note, operation=i) for i in range(15))
    monkeypatch.setattr(train_imagenet, "RANDAUGMENT", operations)
    rng = random.Random(0)
    for _ in range(4000):
        calls.append([])
        train_imagenet.randaugment(None, 9, 0.5, 2, rng)
    return calls


def test_randaugment_applies_each_operation_half_of_the_time(randaugment_calls):
    counts = np.bincount([len(applied) for applied in randaugment_calls])
    assert abs(counts / 4000 - (0.25, 0.5, 0.25)).max() < 0.03


def test_randaugment_samples_operations_magnitudes_and_signs(randaugment_calls):
    operations, sampled, signs = np.array(join(randaugment_calls)).T
    assert np.bincount(operations.astype(int), minlength=15).min() > 4000 / 15 * 0.75
    assert abs(sampled.mean() - 9) < 0.03
    assert abs(sampled.std() - 0.49) < 0.03                        # 0.5, clipped at 10
    assert sampled.max() == 10
    assert abs(signs.mean()) < 0.06


@pytest.mark.parametrize("text, expected", [
    ("rand-m9-mstd0.5-inc1", (9, 0.5, 2)),
    ("rand-m7.5-n3-inc1", (7.5, 0, 3)),
    ("none", None),
])
def test_randaugment_notation(text, expected):
    assert train_imagenet.parse_randaug(text) == expected


def test_normalize_matches_numpy():
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    channels_last = (images.numpy() / 255 - train_imagenet.MEAN) / train_imagenet.STD
    expected = torch.from_numpy(channels_last.transpose(0, 3, 1, 2)).float()
    torch.testing.assert_close(train_imagenet.normalize(images), expected)


def erase_sevens(probability):
    """300 images of sevens, erased: the result and where it changed, (300, 24, 40)."""
    x = torch.full((300, 3, 24, 40), 7.0)
    torch.manual_seed(0)
    erased = train_imagenet.erase(x, probability, random.Random(0))
    return erased, (erased != x).all(1)


def test_erase_hits_a_fraction_of_the_images():
    _, changed = erase_sevens(0.25)
    assert 0.18 < changed.flatten(1).any(1).float().mean() < 0.32


def test_erase_changes_one_box_per_image():
    _, changed = erase_sevens(0.25)
    for mask in changed[changed.flatten(1).any(1)]:
        rows = mask.any(1).nonzero().flatten()
        columns = mask.any(0).nonzero().flatten()
        h = len(rows)
        w = len(columns)
        assert rows[-1] - rows[0] == h - 1
        assert columns[-1] - columns[0] == w - 1
        assert mask.sum() == h * w
        assert h < 24 and w < 40
        assert 0.01 < h * w / (24 * 40) < 0.36
        assert 0.2 < h / w < 4.5


def test_erase_puts_in_noise():
    erased, _ = erase_sevens(0.25)
    noise = erased[erased != 7]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_erase_repeats():
    assert torch.equal(erase_sevens(0.25)[0], erase_sevens(0.25)[0])


def test_erase_of_probability_0_changes_nothing():
    assert not erase_sevens(0.0)[1].any()


IMAGES = torch.randn(5, 3, 12, 20, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 1])


def mix(seed=0, mixup=0.0, cutmix=0.0, smoothing=0.1):
    rng = random.Random(seed)
    return train_imagenet.mix(
        IMAGES, LABELS, classes=4, smoothing=smoothing, mixup=mixup, cutmix=cutmix, rng=rng)


def expected_target(i, kept):
    """Smoothed targets of sample i and of its partner, added up in a loop."""
    target = torch.full((4,), 0.1 / 4)
    target[LABELS[i]] += 0.9 * kept
    target[LABELS[4 - i]] += 0.9 * (1 - kept)
    return target


def pasted_pixels(mixed, i):
    """Where sample i became its partner, (12, 20)."""
    return (mixed[i] == IMAGES[4 - i]).all(0)


def is_cutmix(mixed):
    kept_pixels = (mixed[0] == IMAGES[0]).all(0)
    return bool((kept_pixels | pasted_pixels(mixed, 0)).all())


@pytest.mark.parametrize("seed", range(20))
def test_mixup_matches_a_loop(seed):
    mixed, targets = mix(seed, mixup=0.8)
    kept = float(((mixed[0] - IMAGES[4]) / (IMAGES[0] - IMAGES[4])).median())
    for i in range(5):
        image = kept * IMAGES[i] + (1 - kept) * IMAGES[4 - i]
        torch.testing.assert_close(mixed[i], image, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(targets[i], expected_target(i, kept), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_matches_a_loop(seed):
    mixed, targets = mix(seed, cutmix=1.0)
    box = pasted_pixels(mixed, 0)
    kept = 1 - float(box.float().mean())                           # exactly the kept area
    assert is_cutmix(mixed)
    assert box.sum() == box.any(1).sum() * box.any(0).sum()
    for i in range(5):
        image = torch.where(box, IMAGES[4 - i], IMAGES[i])
        assert torch.equal(mixed[i], image)
        torch.testing.assert_close(targets[i], expected_target(i, kept), atol=1e-3, rtol=1e-3)


def test_a_coin_chooses_between_mixup_and_cutmix():
    kinds = [is_cutmix(mix(seed, mixup=0.8, cutmix=1.0)[0]) for seed in range(40)]
    assert 8 < sum(kinds) < 32


def test_without_mixing_the_batch_stays():
    images, targets = mix(smoothing=0.0)
    assert images is IMAGES
    assert torch.equal(targets, torch.eye(4)[LABELS])


# -------------------------------------------------------------------------------------------- flags
FLAGS = train_imagenet.FLAGS
OVERRIDES = train_imagenet.OVERRIDES


def write_checkpoint(path, step=1, **args):
    """A file with all fields of a checkpoint and the given arguments, without tensors."""
    fields = dict(
        model={}, ema=None, optimizer={}, scaler={}, step=step, evaluated_at=0, best=0.0,
        period_losses={}, unreadable=0, per_epoch=1, classes=["cat", "dog"], args=args,
    )
    torch.save(fields, path)
    return path


@pytest.mark.parametrize("name", FLAGS)
def test_help_names_a_default_once(name):
    flag = FLAGS[name]
    text = train_imagenet.help_text(name, flag, OVERRIDES)
    assert text.count("default") <= 1
    if flag.default is not None and flag.type is not bool:
        assert f"(default {flag.default}" in text


def test_help_names_what_overrides_a_default():
    text = train_imagenet.help_text("ema", FLAGS["ema"], OVERRIDES)
    assert text.endswith("(default 0.0; secvit 0.99992; sec 0.99992; drawn images 0.0)")


def test_help_names_no_default_that_cannot_be_typed():
    flag = train_imagenet.Flag(("1x", "3x"), None, "epochs")
    overrides = {"detection": {"schedule": "3x"}, "pose": {"schedule": "pose"}}
    assert train_imagenet.help_text("schedule", flag, overrides) == "epochs (detection 3x)"


@pytest.mark.parametrize("group", OVERRIDES)
def test_overrides_name_flags(group):
    assert OVERRIDES[group].keys() <= FLAGS.keys()


def test_help_lists_every_flag():
    parser = train_imagenet.make_parser("", FLAGS, OVERRIDES)
    listed = set(re.findall(r"^ +(--[a-z-]+)", parser.format_help(), re.M))
    assert {f"--{name.replace('_', '-')}" for name in FLAGS} <= listed


@pytest.mark.parametrize("typed", ["--epoch 3", "--img 64", "--no-sync", "--deter"])
def test_flags_have_no_abbreviations(typed):
    with pytest.raises(train_imagenet.InputError, match="unrecognized arguments"):
        resolve(*typed.split())


def test_a_list_flag_takes_several_values():
    flags = {"size": train_imagenet.Flag(int, (1, 2), "sizes", several=True)}
    parser = train_imagenet.make_parser("", flags, {})
    assert parser.parse_args(["--size", "3", "4"]).size == [3, 4]


@pytest.mark.parametrize("text, expected", [
    ("aggregation=grid", ("aggregation", "grid")),
    ("lce=false", ("lce", False)),
    ("iterations=0", ("iterations", 0)),
    ("grids=8,4,1,1", ("grids", (8, 4, 1, 1))),
    ("layer_scale=none,none,1e-6,0.5", ("layer_scale", (None, None, 1e-6, 0.5))),
    ("ratios=64:16,4", ("ratios", ((64, 16), 4))),
    ("position=None", ("position", None)),
    ("name=a=b", ("name", "a=b")),
])
def test_options_are_parsed(text, expected):
    assert train_imagenet.option(text) == expected


def test_options_of_tuples_of_tuples_may_be_numbers():
    args = resolve("--model", "clustr_t", "--option", "ratios=64,16,4,1", "--option",
                   "aggregation=grid")
    assert args.option == {"ratios": ((64,), (16,), (4,), (1,)), "aggregation": "grid"}


ABLATIONS = {  # a row of every table of ablations
    "clustr_t": "aggregation=knn ratios=16,4,1,1 neighbours=3",
    "secvit_t": "attention=csw lce=false cpe=false conv_stem=false",
    "linglo_b0": "layout=CCHH cpe=r attention=dot",
    "stvit_s": "stem=patch projection=false position=rpe iterations=2 grids=8,4,2,1",
    "sec_fastervit_0": "stage4_attention=sec",
}


@pytest.mark.parametrize("model", ABLATIONS)
def test_options_are_the_models_arguments(model):
    args = resolve("--model", model, "--option", *ABLATIONS[model].split())
    train_imagenet.Classification(args, "cpu").build_model(["cat", "dog"])


@pytest.mark.parametrize("name", ["clustr_t", "secvit_t", "linglo_b0", "stvit_s"])
def test_model_files_load_weights_with_their_options(name, tmp_path):
    module = sys.modules[name.split("_")[0]]
    factory = getattr(module, name)
    options = resolve("--model", name, "--option", *ABLATIONS[name].split()).option
    model = factory(num_classes=2, **options)
    state = {"model": model.state_dict(), "args": {"option": options}}
    torch.save(state, tmp_path / "weights.pt")
    loaded = module.load_weights(factory, tmp_path / "weights.pt")
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("bare", [False, True])
def test_deployed_linglo_is_recognised(bare, tmp_path):
    """By the option that `linglo.py --deploy` saves, and by the names of the tensors."""
    model = linglo.linglo_b0(num_classes=2).reparameterize().eval()
    path = tmp_path / "deployed.pt"
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save(linglo.deploy("linglo_b0", tmp_path / "bare.pt"), path)
    if bare:
        path = tmp_path / "bare.pt"
    for command in (["--eval"], ["--predict", "x"], ["--batch-size", 2]):
        args = resolve("--model", "linglo_b0", "--weights", path, "--data", "x", *command)
        assert args.option == {"cpe": "folded"}
    task = train_imagenet.Classification(args, "cpu")
    loaded = task.build_model(["cat", "dog"]).eval()
    task.load_pretrained(loaded)
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(loaded(images), model(images))


def test_options_are_saved_and_restored(tiny, folder, tmp_path, capsys):
    """By --eval, --predict, --resume and a run that starts from the weights."""
    flags = ("--data", folder, "--output", tmp_path / "run", "--max-steps", 1)
    run(*FAST, *flags, "--repeated-aug", 1, "--option", "lce=false")
    weights = tmp_path / "run" / "last.pt"
    assert not any("lce" in name for name in last_state(tmp_path / "run")["model"])
    assert evaluate(capsys, "--weights", weights)["images"] == 7
    assert len(predict(capsys, folder / "val", "--weights", weights)) == 7
    run("--resume", weights, "--max-steps", 2)
    assert last_state(tmp_path / "run")["step"] == 2
    args = resolve("--weights", weights, "--data", folder, "--batch-size", 2)
    assert args.option == {"lce": False}
    args = resolve("--weights", weights, "--data", folder, "--batch-size", 2, "--model", "stvit_s")
    assert args.option == {}


@pytest.mark.parametrize("model, expected", [
    ("secvit_t", (1e-3, 0.99992, True)),
    ("sec_swin_t", (1e-3, 0.99992, True)),
    ("sec_fastervit_1", (1e-3, 0.99992, True)),
    ("stvit_s", (1e-3, 0, False)),
])
def test_recipe_of_a_family(model, expected):
    args = resolve("--model", model, "--data", "images")
    assert (args.lr, args.ema, args.sync_bn) == expected


def test_drawn_images_override_the_family():
    args = resolve("--model", "secvit_t")
    assert (args.lr, args.ema, args.epochs) == (1e-3, 0.0, 12)
    assert args.sync_bn


def test_a_checkpoint_overrides_drawn_images_and_family(tmp_path):
    saved = write_checkpoint(tmp_path / "a.pt", model="secvit_t", data=None, lr=7e-4, epochs=5)
    args = resolve("--resume", saved)
    assert (args.model, args.lr, args.epochs) == ("secvit_t", 7e-4, 5)
    assert args.ema == 0.0


def test_typed_flags_override_the_checkpoint(tmp_path):
    saved = write_checkpoint(tmp_path / "a.pt", model="secvit_t", lr=7e-4, epochs=5)
    args = resolve("--resume", saved, "--lr", "3e-4", "--no-sync-bn")
    assert (args.lr, args.epochs) == (3e-4, 5)
    assert args.sync_bn is False


def test_flags_of_one_start_are_not_restored(tmp_path):
    once = dict(workers=7, max_steps=3, weights="w.pt", eval=True, resume="auto")
    args = resolve("--resume", write_checkpoint(tmp_path / "a.pt", model="stvit_s", **once))
    assert (args.workers, args.max_steps, args.weights, args.eval) == (0, None, None, False)


def test_data_and_output_are_those_of_the_checkpoint(tmp_path):
    args = resolve("--resume", write_checkpoint(
        tmp_path / "a.pt", model="stvit_s", data="images", output="runs/x"))
    assert (args.data, args.output) == ("images", "runs/x")


def test_micro_batch_is_the_largest_divisor(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = argparse.Namespace(batch_size=600, micro_batch=None)
    assert train_imagenet.choose_micro_batch(args, max_micro_batch=128) == 100


def test_a_batch_splits_over_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(train_imagenet.InputError, match="10 does not split over 3 processes"):
        resolve("--batch-size", 10)


# ----------------------------------------------------------------------------- schedule and weights
@pytest.mark.parametrize("step, rate", [  # published, recipe, section 7
    (0, 1e-6), (1, 2.008e-4), (2, 4.006e-4), (4, 8.002e-4), (5, 9.99322e-4), (6, 9.99023e-4),
    (298, 1.01086e-5), (300, 1e-5),
])
def test_learning_rate_at_start_peak_and_end(step, rate):
    ours = train_imagenet.lr_at(step, peak=1e-3, floor=1e-5, warmup=5, total=300)
    assert ours == pytest.approx(rate, rel=1e-5)


def test_learning_rate_of_fine_tuning_is_constant():
    rate = train_imagenet.lr_at(7, peak=5e-6, floor=5e-6, warmup=0, total=10)
    assert rate == pytest.approx(5e-6)


def test_decay_skips_vectors_layer_scale_included():
    model = small_model(num_classes=3)
    decayed, exempt = train_imagenet.decay_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    for p in decayed["params"]:
        assert names[id(p)].endswith("weight")
        assert p.ndim > 1
    assert any("scale1" in names[id(p)] for p in exempt["params"])
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0)
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_averaged_weights_get_no_gradient():
    model = torch.nn.Linear(2, 3)
    state = train_imagenet.TrainState(model, None, None, ema=0.9, per_epoch=1, classes=["a"])
    assert not any(p.requires_grad for p in state.average.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_average_of_weights_and_statistics_matches_a_loop():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = copy.deepcopy(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model(torch.randn(4, 2)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        train_imagenet.update_average(average, model, 0.9)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value
            else:
                expected[name] = value.clone()
    torch.testing.assert_close(dict(average.state_dict()), expected)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_weights_of_another_class_count_load_but_for_the_head(key):
    model = small_model(num_classes=3)
    other = small_model(num_classes=5)
    named = {f"module._orig_mod.{name}": t for name, t in other.state_dict().items()}
    missing = train_imagenet.load_weights(model, {key: named, "epoch": 3})
    assert missing == ["head.bias", "head.weight"]
    assert torch.equal(model.stem[0].weight, other.stem[0].weight)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state, "arch": "secvit_t"}])
def test_weights_load_bare_or_wrapped(wrap):
    model = small_model(num_classes=3)
    other = small_model(num_classes=3)
    assert train_imagenet.load_weights(model, wrap(other.state_dict())) == []
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("state", [
    {"a": torch.zeros(1)},
    small_model(num_classes=3, depths=(1, 1, 1, 3)).state_dict(),  # one block more
    {"model": None, 3: 4},
])
def test_weights_of_another_model_are_refused(state):
    model = small_model(num_classes=3)
    with pytest.raises(train_imagenet.InputError, match="do not fit SecViT.*another model's"):
        train_imagenet.load_weights(model, state)


# -------------------------------------------------------------------------------------- checkpoints
def test_auto_takes_the_highest_step_not_the_newest_file(tmp_path):
    write_checkpoint(tmp_path / "a.pt", step=9, model="stvit_s")
    write_checkpoint(tmp_path / "b.pt", step=5, model="stvit_s")
    later = time.time() + 5
    os.utime(tmp_path / "b.pt", (later, later))
    assert train_imagenet.find_checkpoint("auto", tmp_path, "model")["step"] == 9


def test_auto_passes_over_files_of_the_other_script(tmp_path):
    write_checkpoint(tmp_path / "dense.pt", step=9, task="pose")
    write_checkpoint(tmp_path / "own.pt", step=5, model="stvit_s")
    assert train_imagenet.find_checkpoint("auto", tmp_path, "model")["step"] == 5


def test_auto_of_an_empty_folder_is_none(tmp_path):
    assert train_imagenet.find_checkpoint("auto", tmp_path / "nowhere", "model") is None


def test_auto_skips_damaged_files(finished, tmp_path, capsys):
    shutil.copy(finished / "best.pt", tmp_path)
    whole = (finished / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[:len(whole) // 2])
    best = torch.load(finished / "best.pt", weights_only=True)
    assert train_imagenet.find_checkpoint("auto", tmp_path, "model")["step"] == best["step"]
    assert "skipped: cannot read" in capsys.readouterr().err


def test_a_damaged_file_is_refused(finished, tmp_path):
    (tmp_path / "cut.pt").write_bytes((finished / "last.pt").read_bytes()[:1000])
    with pytest.raises(train_imagenet.InputError, match="cannot read .*cut.pt"):
        train_imagenet.find_checkpoint(str(tmp_path / "cut.pt"), tmp_path, "model")


class Command:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"model": Command(str(tmp_path / "made"))}, tmp_path / "last.pt")
    with pytest.raises(train_imagenet.InputError, match="cannot read"):
        train_imagenet.read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "made").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    train_imagenet.replace_file(path, partial(torch.save, {"step": 1}))

    def full(_state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with pytest.raises(train_imagenet.InputError, match="No space left.*file is untouched"):
        train_imagenet.replace_file(path, partial(full, {"step": 2}))
    assert torch.load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_by_the_log(tmp_path, monkeypatch):
    """/dev/full: every write fails."""
    monkeypatch.setattr(train_imagenet, "open_no_link", lambda *_: os.open("/dev/full", os.O_RDWR))
    with pytest.raises(train_imagenet.InputError, match="log.jsonl: No space left on device"):
        train_imagenet.append(tmp_path / "log.jsonl", step=1)


def test_the_cause_of_a_failed_checkpoint_is_named(tmp_path):
    """torch.save itself would say "unexpected pos"."""
    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if self.file.tell() > 1000:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    def save(file):
        torch.save({"model": torch.ones(1000)}, FullDisk(file))

    with pytest.raises(train_imagenet.InputError, match="last.pt .*No space left on device"):
        train_imagenet.replace_file(tmp_path / "last.pt", save)


@pytest.mark.parametrize("name", ["last.pt", "last.tmp"])
def test_checkpoints_do_not_follow_links(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_bytes(b"another file")
    output = tmp_path / "output"
    output.mkdir()
    (output / name).symlink_to(outside)
    train_imagenet.replace_file(output / "last.pt", partial(torch.save, {"step": 2}))
    assert outside.read_bytes() == b"another file"
    assert [path.name for path in output.iterdir()] == ["last.pt"]
    assert torch.load(output / "last.pt")["step"] == 2


def test_the_log_does_not_follow_links(tmp_path):
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(train_imagenet.InputError, match="cannot write .*symbolic links"):
        train_imagenet.append(tmp_path / "log.jsonl", step=1)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("counter, value", [
    ("step", -5), ("step", "6"), ("best", torch.ones(3)), ("period_losses", None),
    ("unreadable", None),
])
def test_counters_of_another_type_are_no_checkpoint(tmp_path, counter, value):
    path = write_checkpoint(tmp_path / "last.pt", model="secvit_t")
    torch.save({**torch.load(path), counter: value}, path)
    assert train_imagenet.find_checkpoint("auto", tmp_path, "model") is None
    with pytest.raises(train_imagenet.InputError, match="is no checkpoint of this script"):
        train_imagenet.find_checkpoint(str(path), tmp_path, "model")


def test_a_dangling_link_does_not_hide_a_checkpoint(tmp_path, capsys):
    write_checkpoint(tmp_path / "best.pt", step=3, model="secvit_t")
    (tmp_path / "last.pt").symlink_to(tmp_path / "nowhere")
    assert train_imagenet.find_checkpoint("auto", tmp_path, "model")["step"] == 3
    assert "skipped: no checkpoint" in capsys.readouterr().err


def test_resume_in_mid_epoch_equals_an_uninterrupted_run(finished, folder, tmp_path):
    common = [*FAST, *FULL, "--data", folder, "--output", tmp_path]
    run(*common, "--max-steps", 2)
    run(*common, "--resume", "auto", "--max-steps", 4, "--workers", 2)
    run("--resume", tmp_path / "last.pt", "--workers", 0)          # flags from the file
    state = last_state(tmp_path)
    assert state["step"] == 6
    assert state["evaluated_at"] == 6
    assert_same_state(last_state(finished), state)
    records = read_records(tmp_path)
    assert [r["resumed_at"] for r in records if "args" in r] == [0, 2, 4]
    assert [r["step"] for r in records if "step" in r] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_resume_takes_over_every_flag(tiny, folder, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    options = [*FULL, "--frozen-bn", "--channels-last", "--released"]
    common = [*FAST, *options, "--data", folder]
    run(*common, "--output", whole, "--max-steps", 4)
    run(*common, "--output", parts, "--max-steps", 2)
    run("--resume", parts / "last.pt", "--workers", 0, "--max-steps", 1)  # nothing to do
    run("--resume", parts / "last.pt", "--workers", 0, "--max-steps", 4)
    assert_same_state(last_state(whole), last_state(parts))


def test_resume_refuses_epochs_of_another_length(finished):
    message = "epochs of the checkpoint have 3 updates, of this run 7"
    with pytest.raises(train_imagenet.InputError, match=message):
        run("--resume", finished / "last.pt", "--batch-size", 2)


def test_resume_refuses_weights_that_do_not_fit(finished, tmp_path):
    state = last_state(finished)
    del state["model"]["head.bias"]
    torch.save(state, tmp_path / "last.pt")
    message = "the checkpoint does not fit this run: .*head.bias"
    with pytest.raises(train_imagenet.InputError, match=message):
        run("--resume", tmp_path / "last.pt", "--output", tmp_path)


@pytest.fixture
def renamed(folder, tmp_path):
    """The data with a class of another name."""
    root = shutil.copytree(folder, tmp_path / "renamed")
    for split in ("train", "val"):
        (root / split / "dog").rename(root / split / "wolf")
    return root


def test_resume_refuses_classes_of_other_names(finished, renamed, tmp_path):
    message = r"checkpoint has the classes 2 \(cat, dog.*the data has 2 \(cat, wolf"
    with pytest.raises(train_imagenet.InputError, match=message):
        run("--resume", finished / "last.pt", "--data", renamed, "--output", tmp_path / "o")


def test_eval_refuses_classes_of_other_names(finished, renamed):
    message = r"last.pt has the classes 2 \(cat, dog.*the data has 2 \(cat, wolf"
    with pytest.raises(train_imagenet.InputError, match=message):
        run("--eval", "--weights", finished / "last.pt", "--data", renamed)


# ------------------------------------------------------------------------------- log and evaluation
def test_the_first_record_describes_the_run(finished):
    record = read_records(finished)[0]
    parameters = sum(p.numel() for p in small_model(num_classes=2).parameters())
    assert record["args"]["model"] == "secvit_t"
    assert record["parameters"] == parameters
    assert record["torch"] == torch.__version__
    assert record["resumed_at"] == 0


def test_every_update_and_evaluation_is_logged(finished):
    records = read_records(finished)[1:]
    assert [record["step"] for record in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"top1", "ema_top1", "best"} <= records[-1].keys()
    for record in logged_updates(finished):
        assert {"lr", "loss", "images_per_s", "time"} <= record.keys()


def test_named_losses_are_logged(finished):
    for record in logged_updates(finished):
        assert record["losses"] == {"loss_cls": record["loss"]}


def test_an_evaluation_has_the_mean_losses_since_the_last_one(finished):
    records = read_records(finished)
    mean = np.mean([record["loss"] for record in logged_updates(finished)[3:]])
    assert records[-1]["train_loss"] == pytest.approx(mean)
    assert records[-1]["train_losses"] == {"loss_cls": pytest.approx(mean)}


def test_curves_are_plotted(finished):
    assert Image.open(finished / "curves.png").size == (1000, 400)


@pytest.fixture
def plotted(monkeypatch):
    """The lines of each panel that was plotted."""
    panels = []

    def plot_lines(_draw, _left, lines, _high=0.0):
        panels.append(lines)

    monkeypatch.setattr(train_imagenet, "plot_lines", plot_lines)
    return panels


def test_curves_show_every_term_of_several(plotted, tmp_path):
    log = tmp_path / "log.jsonl"
    for step in (1, 2):
        terms = {"loss_a": 1.0 * step, "loss_b": 2.0}
        train_imagenet.append(log, step=step, lr=0.1, loss=1.0 * step + 2, losses=terms)
    train_imagenet.append(log, step=2, top1=50.0, loss=5.0)
    train_imagenet.plot_curves(tmp_path, ["top1"], 100.0)
    assert plotted[0] == {
        "training loss": {1: 3.0, 2: 4.0},
        "validation loss": {2: 5.0},
        "loss_a": {1: 1.0, 2: 2.0},
        "loss_b": {1: 2.0, 2: 2.0},
    }
    assert plotted[1] == {"top1": {2: 50.0}}


def test_curves_show_a_single_term_once(plotted, tmp_path):
    train_imagenet.append(tmp_path / "log.jsonl", step=1, lr=0.1, loss=2.0, losses={"loss_a": 2.0})
    train_imagenet.plot_curves(tmp_path, ["top1"], 100.0)
    assert plotted[0].keys() == {"training loss", "validation loss"}


@pytest.mark.parametrize("low, high, ticks", [
    (0, 100, [0, 20, 40, 60, 80, 100]),
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (0, 2.31, [0, 0.5, 1, 1.5, 2, 2.5]),
    (0, 7, [0, 2, 4, 6, 8]),
    (-0.3, 0.9, [-0.5, 0, 0.5, 1]),
    (0, 0.031, [0, 0.01, 0.02, 0.03, 0.04]),
    (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (0, 93600, [0, 20000, 40000, 60000, 80000, 100000]),
])
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert train_imagenet.round_ticks(low, high) == ticks


class Texts:
    """Collects the texts of a plot."""

    def __init__(self):
        self.texts = []

    def text(self, _position, text, *_options, **_named):
        self.texts.append(text)

    def line(self, *_options, **_named):
        pass

    rectangle = line
    ellipse = line


def test_57_per_cent_are_not_the_ceiling():
    canvas = Texts()
    train_imagenet.plot_lines(canvas, 60, {"top1": {10: 31.0, 20: 57.2}}, 100.0)
    assert canvas.texts == [
        "0", "20", "40", "60", "80", "100", "0", "5", "10", "15", "20", "update", "top1",
    ]


def test_an_undefined_metric_is_not_plotted(plotted, tmp_path):
    for step, value in ((1, -1), (2, 0.5)):
        train_imagenet.append(tmp_path / "log.jsonl", step=step, AP=value)
    train_imagenet.plot_curves(tmp_path, ["AP"], 1.0)
    assert plotted[1] == {"AP": {2: 0.5}}


def test_a_cut_off_log_line_is_passed_over(tmp_path):
    log = tmp_path / "log.jsonl"
    train_imagenet.append(log, step=1, lr=0.1, loss=2.0)
    with open(log, "a") as file:
        file.write('{"step": 2, "lr": 0.1, "lo')
    train_imagenet.append(log, step=2, loss=float("inf"), top1=50.0)
    assert json.loads(log.read_text().splitlines()[-1])["top1"] == 50
    train_imagenet.plot_curves(tmp_path, ["top1"], 100.0)
    assert Image.open(tmp_path / "curves.png").size == (1000, 400)


def evaluate(capsys, *arguments):
    """What --eval prints."""
    capsys.readouterr()
    run("--eval", "--workers", 0, *arguments)
    return json.loads(capsys.readouterr().out)


def test_eval_repeats_the_metrics_of_the_run(finished, capsys):
    scores = evaluate(capsys, "--weights", finished / "last.pt")
    record = read_records(finished)[-1]
    assert scores["images"] == 7
    for name in ("top1", "loss", "ema_top1", "ema_loss"):
        assert scores[name] == pytest.approx(record[name]), name


def test_eval_needs_only_the_validation_images(finished, folder, tmp_path, capsys):
    shutil.copytree(folder / "val", tmp_path / "val")
    scores = evaluate(capsys, "--weights", finished / "last.pt", "--data", tmp_path)
    assert scores["images"] == 7


def test_eval_counts_hits_like_a_loop(finished, folder, capsys):
    scores = evaluate(capsys, "--weights", finished / "last.pt")
    model = small_model(num_classes=2).eval()
    model.load_state_dict(last_state(finished)["model"])
    source = train_imagenet.ImageFolder(folder / "val")
    hits = {"cat": 0, "dog": 0}
    for i, label in enumerate(source.labels):
        image = train_imagenet.center_crop(source.read(i), 32, 0.875)
        images = torch.from_numpy(np.array(image))[None]
        is_hit = int(model(train_imagenet.normalize(images)).argmax()) == label
        hits[source.classes[label]] += is_hit
    assert scores["top1"] == pytest.approx(100 * sum(hits.values()) / 7)
    expected = {"cat": round(100 * hits["cat"] / 4, 2), "dog": round(100 * hits["dog"] / 3, 2)}
    assert scores["per_class"] == expected
    assert scores["ema_per_class"].keys() == expected.keys()


def test_eval_of_many_classes_leaves_each_one_out(finished, capsys, monkeypatch):
    monkeypatch.setattr(train_imagenet, "MAX_PER_CLASS", 1)
    assert "per_class" not in evaluate(capsys, "--weights", finished / "last.pt")


def test_an_evaluation_in_training_has_no_values_per_class(finished):
    assert "per_class" not in read_records(finished)[-1]


@pytest.mark.parametrize("classes", [5, 6])
def test_metrics_match_a_loop(classes):
    args = argparse.Namespace(model="secvit_t", frozen_bn=False, amp="none")
    task = train_imagenet.Classification(args, torch.device("cpu"))
    task.num_classes = classes
    logits = torch.randn(23, classes, dtype=torch.float64)
    labels = torch.randint(classes - 1, (23,))              # none of the last class
    records = []
    for rows in torch.arange(23).split(9):
        batch = None, labels[rows], rows
        records.append(task.record(None, batch, logits[rows]))
    hits1 = torch.zeros(classes)
    hits5 = 0
    for row, label in zip(logits, labels.tolist()):
        rank = int((row > row[label]).sum())
        hits1[label] += rank < 1
        hits5 += rank < 5
    metrics = task.summarize(range(23), records)
    assert metrics["top1"] == pytest.approx(100 * float(hits1.sum()) / 23)
    assert metrics.get("top5") == (pytest.approx(100 * hits5 / 23) if classes == 6 else None)
    values = task.summarize_classes(range(23), records)
    count = labels.bincount(minlength=classes)
    assert values[:-1] == pytest.approx((100 * hits1 / count)[:-1].tolist())
    assert math.isnan(values[-1])


def test_values_of_classes_are_named_apart():
    values = [50.123, math.nan, 25.0, 75.0]
    named = train_imagenet.name_values(["cat", "dog", "owl", "cat"], values, 2)
    assert named == {"cat (0)": 50.12, "owl": 25.0, "cat (3)": 75.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, log_seconds, rank, shown", [
    (Terminal, 60, 0, True),
    (Terminal, 60, 1, False),
    (io.StringIO, 0, 0, True),
    (io.StringIO, 0, 1, False),
    (io.StringIO, 60, 0, False),    # a short test leaves no trace in a log file
])
def test_an_evaluation_shows_a_bar(monkeypatch, stream, log_seconds, rank, shown):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(train_imagenet, "LOG_SECONDS", log_seconds)
    items = train_imagenet.show_progress("abc", [[1, 2], [3, 4], [5]], rank)
    assert list(items) == ["a", "b", "c"]
    assert ("testing: " in stderr.getvalue() and "/5 " in stderr.getvalue()) == shown
    assert bool(stderr.getvalue()) == shown


@pytest.mark.parametrize("log_seconds, writings", [(0, 101), (60, 1)])
def test_a_bar_in_a_file_is_written_rarely(monkeypatch, log_seconds, writings):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(train_imagenet, "LOG_SECONDS", log_seconds)
    bar = train_imagenet.tqdm(total=100, file=stderr, **train_imagenet.bar_intervals())
    for _ in range(100):
        bar.update(1)
    assert stderr.getvalue().count("\r") == writings


def predict(capsys, *arguments):
    """The JSON lines that --predict prints."""
    capsys.readouterr()
    run("--predict", *arguments)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_names_the_classes_of_images_and_folders(finished, folder, capsys):
    """By the averaged weights, which `finished` has."""
    first = folder / "val" / "cat" / "00.png"
    lines = predict(capsys, first, folder / "val", "--weights", finished / "last.pt")
    assert len(lines) == 7
    model = small_model(num_classes=2).eval()
    model.load_state_dict(last_state(finished)["ema"])
    for line in lines:
        image = train_imagenet.center_crop(train_imagenet.read_image(line["image"]), 32, 0.875)
        images = torch.from_numpy(np.array(image))[None]
        cat, dog = model(train_imagenet.normalize(images)).softmax(1)[0].tolist()
        expected = {"cat": pytest.approx(cat, abs=1e-5), "dog": pytest.approx(dog, abs=1e-5)}
        assert line["probabilities"] == expected
        assert list(line["probabilities"]) == sorted(expected, key={"cat": -cat, "dog": -dog}.get)


def test_predict_numbers_the_classes_of_a_bare_file(tiny, folder, tmp_path, capsys):
    torch.save(small_model(num_classes=8).state_dict(), tmp_path / "eight.pt")
    flags = ("--model", "secvit_t", "--weights", tmp_path / "eight.pt")
    line, = predict(capsys, folder / "val" / "cat" / "00.png", *flags)
    assert len(line["probabilities"]) == 5
    assert set(line["probabilities"]) <= set("01234567")


def test_predict_sees_what_an_evaluation_sees(tmp_path):
    """224 pixels even without --data, as a recipe and not as the drawn images have it."""
    torch.save({}, tmp_path / "bare.pt")
    assert resolve("--predict", "a.jpg", "--weights", tmp_path / "bare.pt").img_size == 224


def test_predict_turns_photos_upright(finished, tmp_path, capsys):
    image = random_image(40, 60)
    image.save(tmp_path / "a.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6                                        # shown after a quarter turn clockwise
    turned.save(tmp_path / "b.png", exif=exif)
    first, second = predict(capsys, tmp_path, "--weights", finished / "last.pt")
    assert first["probabilities"] == second["probabilities"]


def test_results_of_an_evaluation_give_its_accuracy(finished, tmp_path, capsys):
    """That of the averaged weights, recomputed from the file."""
    path = tmp_path / "new" / "results.jsonl"
    scores = evaluate(capsys, "--weights", finished / "last.pt", "--results", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    hits = [max(x["probabilities"], key=x["probabilities"].get) == x["class"] for x in lines]
    assert len(lines) == 7
    assert 100 * sum(hits) / len(hits) == scores["ema_top1"]


def test_results_score_like_their_evaluation(finished, tmp_path, capsys, folder):
    """Of two classes, so without top-5."""
    path = tmp_path / "results.jsonl"
    metrics = evaluate(capsys, "--weights", finished / "last.pt", "--results", path)
    run("--score", path, "--data", folder)
    assert json.loads(capsys.readouterr().out) == {"top1": metrics["ema_top1"]}


def test_scores_by_hand(tmp_path):
    """Seven classes; the images' own are first, fifth, and not among the five."""
    names = ["x/a/1.jpg", "x/b/1.jpg", "x/c/1.jpg"]

    class Source(list):
        classes = list("abcdefg")
        labels = [0, 1, 2]
        name = list.__getitem__

    lines = []
    for name, best in zip(names, ("abcde", "cdefb", "abdef")):
        probabilities = dict.fromkeys(best, 0.1)
        lines.append(json.dumps({"image": f"y{name[1:]}", "probabilities": probabilities}))
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines))
    task = argparse.Namespace(num_classes=7)
    metrics = train_imagenet.Classification.score_results(task, Source(names), path)
    assert metrics == {"top1": pytest.approx(100 / 3), "top5": pytest.approx(200 / 3)}


@pytest.mark.parametrize("classes", [None, 7])
def test_classes_of_a_foreign_type_are_refused(classes):
    with pytest.raises(train_imagenet.InputError, match="a.pt holds no list of class names"):
        train_imagenet.check_classes("a.pt", classes, ["b", "c"])


@pytest.mark.parametrize("content, message", [
    ("{}", "holds no results"),
    ("[1]", "holds no results"),
    ('{"image": "a/b.jpg", "probabilities": {"a": 1}}', "lacks the image"),
])
def test_other_files_are_no_results(finished, tmp_path, folder, content, message):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(train_imagenet.InputError, match=message):
        run("--score", path, "--data", folder)


def test_results_that_cannot_be_written_are_refused_before_the_evaluation(finished, tmp_path):
    with pytest.raises(OSError, match="Is a directory"):
        run("--eval", "--weights", finished / "last.pt", "--results", tmp_path)


def test_fine_tuning_takes_the_model_of_its_weights(finished, folder):
    """Not its other flags."""
    args = resolve("--weights", finished / "last.pt", "--data", folder, "--batch-size", 2)
    assert args.model == "secvit_t"
    assert (args.img_size, args.epochs) == (224, 300)


@pytest.mark.parametrize("flags", ["--eval", "--data x", "--resume auto --data x"])
@pytest.mark.parametrize("released", [False, True])
def test_weights_say_whether_they_are_released(tmp_path, flags, released):
    model = secvit.secvit_t(num_classes=2, released=released)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    flags = ("--model", "secvit_t", "--weights", tmp_path / "bare.pt", *flags.split())
    assert resolve(*flags, "--output", tmp_path / "none").released == released


def test_files_of_the_authors_with_a_namespace_load(tiny, folder, tmp_path, capsys):
    model = small_model(num_classes=2).state_dict()
    theirs = argparse.Namespace(model="SecViT_T", lr=5e-4)
    torch.save({"model": model, "args": theirs}, tmp_path / "theirs.pth")
    scores = evaluate(
        capsys, "--weights", tmp_path / "theirs.pth", "--model", "secvit_t",
        "--data", folder, "--img-size", 32)
    assert scores["images"] == 7


# ---------------------------------------------------------------------------------------- the loop
class Numbers:
    """Eight numbers, as a source of images."""

    classes = ["number"]

    def __len__(self):
        return 8

    def read(self, index):
        return float(index)


class TwoLosses:
    """A task with two losses: a line is fitted to 2 x + 1. It is all that `train` may ask for."""

    metric = "closeness"
    decimals = 3
    metric_limit = 0.0
    train_mode = True
    test_batch = 3
    identity = {"task": "line"}

    def open_data(self, _procs, *splits):
        return [Numbers() for _ in splits]

    def sampler(self, source, **schedule):
        return train_imagenet.StepSampler(images=len(source), repeats=1, **schedule)

    def train_sample(self, source, index, _rng):
        return source.read(index)

    test_sample = train_sample

    def collate(self, samples):
        return (torch.tensor(samples)[:, None],)

    collate_test = collate

    def build_model(self, _classes):
        return torch.nn.Linear(1, 1)

    def load_pretrained(self, _model):
        return None

    def param_groups(self, model):
        return train_imagenet.decay_groups(model, 0.0)

    def total_updates(self, per_epoch):
        return 2 * per_epoch

    def eval_every(self, per_epoch, _total):
        return per_epoch

    def lr_at(self, _step, _total, _per_epoch):
        return 0.01

    def losses(self, net, batch):
        error = net(batch[0]) - (2 * batch[0] + 1)
        return {"loss_square": (error ** 2).mean(), "loss_absolute": error.abs().mean()}

    def infer(self, model, batch):
        return model(batch[0])

    def record(self, _source, batch, prediction):
        return float((prediction - (2 * batch[0] + 1)).abs().sum())

    def summarize(self, source, records):
        return {"closeness": -sum(records) / len(source)}


def train_line(output):
    """Train with `TwoLosses`; all flags but these are those of both scripts."""
    given = argparse.Namespace(
        output=str(output), data=None, batch_size=4, micro_batch=2, log_every=1, lr=0.01,
        sync_bn=False, amp="none", workers=0)
    args = train_imagenet.fill_defaults(given, train_imagenet.RUN_FLAGS, [], {})
    procs = train_imagenet.Processes()
    torch.manual_seed(0)
    train_imagenet.train(TwoLosses(), args, procs, None)


def test_the_loop_runs_any_task_with_named_losses(tmp_path):
    train_line(tmp_path)
    updates = logged_updates(tmp_path)
    assert [record["step"] for record in updates] == [1, 2, 3, 4]
    for record in updates:
        assert list(record["losses"]) == ["loss_square", "loss_absolute"]
        assert record["loss"] == pytest.approx(sum(record["losses"].values()))


def test_losses_of_a_task_are_those_of_its_batches(tmp_path):
    train_line(tmp_path)
    torch.manual_seed(0)
    line = torch.nn.Linear(1, 1)
    sampler = train_imagenet.StepSampler(
        images=8, batch=4, micro=2, rank=0, world=1, seed=0, repeats=1, last=1)
    x = torch.tensor([float(index) for _, index, _ in join(sampler)])[:, None]
    error = (line(x) - (2 * x + 1)).abs()
    first = logged_updates(tmp_path)[0]["losses"]
    assert first["loss_absolute"] == pytest.approx(error.mean().item(), rel=1e-6)
    assert first["loss_square"] == pytest.approx((error ** 2).mean().item(), rel=1e-6)


def test_the_fraction_of_time_that_data_took_is_logged(tmp_path, monkeypatch):
    """Updates of two micro-batches: each waits 3 s for its data and computes for 1 s."""
    clock = [0.0]
    monkeypatch.setattr(train_imagenet.time, "perf_counter", lambda: clock[0])
    args = argparse.Namespace(output=str(tmp_path), batch_size=2)
    model = torch.nn.Linear(1, 1)
    state = train_imagenet.TrainState(model, None, None, 0, per_epoch=2, classes=[])
    log = train_imagenet.RunLog(args, train_imagenet.Processes(), state, 2)

    def load():
        for item in range(4):
            clock[0] += 3
            yield item

    batches = load()
    for _ in range(2):
        log.start_update(0.1)
        for _ in range(2):
            log.next_batch(batches)
            clock[0] += 1
            log.add({"loss_a": torch.tensor(1.0)}, 0.5)
        log.end_update(state)
        log.flush(state)
        clock[0] += 100                                     # an evaluation does not count
    log.close()
    assert [record["data_wait"] for record in read_records(tmp_path)] == [0.75, 0.75]


def test_a_task_is_evaluated_by_its_metric(tmp_path):
    train_line(tmp_path)
    evaluations = [r for r in read_records(tmp_path) if "closeness" in r]
    assert [record["step"] for record in evaluations] == [2, 4]
    assert evaluations[-1]["best"] == max(record["closeness"] for record in evaluations)
    for record in evaluations:
        assert list(record["train_losses"]) == ["loss_square", "loss_absolute"]
        assert record["train_loss"] == pytest.approx(sum(record["train_losses"].values()))


def test_the_curves_of_a_task_show_its_terms(plotted, tmp_path):
    train_line(tmp_path)
    assert {"training loss", "loss_square", "loss_absolute"} <= plotted[0].keys()
    assert list(plotted[1]) == ["closeness"]


def test_micro_batches_add_up_to_the_batch(tiny, folder, tmp_path):
    """Without batch statistics the split into micro-batches does not change the update."""
    plain = "--mixup 0 --cutmix 0 --random-erase 0 --drop-path 0 --repeated-aug 1".split()
    losses = []
    for micro in (1, 4):
        output = tmp_path / str(micro)
        common = [*FAST, *plain, "--frozen-bn", "--max-steps", 2, "--data", folder]
        run(*common, "--micro-batch", micro, "--output", output)
        losses.append([record["loss"] for record in logged_updates(output)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_frozen_statistics_do_not_change(tiny, folder, tmp_path):
    run(*FAST, "--frozen-bn", "--max-steps", 1, "--data", folder, "--output", tmp_path)
    state = last_state(tmp_path)["model"]
    assert state["stem.1.num_batches_tracked"] == 0
    assert state["stem.1.running_mean"].abs().max() == 0


@pytest.mark.parametrize("flags", [
    "--amp bf16 --channels-last",
    "--amp fp16 --clip-grad 1 --deterministic",
    "--released --clip-grad 0.5",
    "--repeated-aug 3 --sync-bn",
])
def test_options_run(tiny, folder, tmp_path, flags):
    run(*FAST, "--max-steps", 2, "--data", folder, "--output", tmp_path, *flags.split())
    for name, value in last_state(tmp_path)["model"].items():
        assert value.isfinite().all(), name


def test_a_loss_that_is_not_finite_stops_the_run(tiny, folder, tmp_path):
    message = (r"loss (nan|inf) at update [23] not finite, learning rate .*; "
               "last finite checkpoint: none yet")
    with pytest.raises(train_imagenet.InputError, match=message):
        run(*FAST, "--lr", "1e30", "--warmup-epochs", 0, "--data", folder, "--output", tmp_path)


# ------------------------------------------------------------------------------ processes and stops
LAUNCHER = """
import multiprocessing
import os
import signal

import secvit
import secvit
import train_imagenet


class SmallModel(secvit.SecViT):
    calls = 0

    def __init__(self, **options):
        super().__init__(**{**SMALL, "drop_path_rate": 0.1, **options})

    def forward(self, x):
        SmallModel.calls += 1
        if SmallModel.calls == CALL:
            EVENT
        return super().forward(x)


train_imagenet.MODELS["secvit_t"] = SmallModel
SETUP
train_imagenet.run_main(train_imagenet.main, "train_imagenet.py")
"""
two_on_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU")


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start train_imagenet.py with the small model in a process of its own.

    torchrun: with that many processes, restarted up to `restarts` times; event: what happens in
    forward pass `call`, by default the first one of the second update; setup: what happens before.
    """
    def start(*arguments, torchrun=0, restarts=0, event="pass", call=3, setup="", **environment):
        script = tmp_path_factory.mktemp("launcher") / "launcher.py"
        text = LAUNCHER.replace("SMALL,", f"{SMALL},").replace("SETUP", setup)
        script.write_text(text.replace("CALL", str(call)).replace("EVENT", event))
        command = [sys.executable]
        if torchrun:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={torchrun}", f"--max-restarts={restarts}"]
        command += [str(script), *map(str, arguments)]
        variables = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **environment)
        return subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env=variables)
    return start


def finish(process):
    """Output and errors of a process; one that hangs is killed."""
    try:
        return process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def start_processes(start, world, *arguments, **options):
    """What torchrun does, in fewer processes."""
    shared = dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world))
    processes = []
    for rank in range(world):
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank))
        processes.append(start(*arguments, **options, **shared, **place))
    return processes


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory, start):
    """The output folder of a whole run of two processes; not to be changed."""
    output = tmp_path_factory.mktemp("two")
    process = start(*FAST, *FULL, "--data", folder, "--output", output, torchrun=2)
    _, errors = finish(process)
    assert process.returncode == 0, errors
    assert "strides" not in errors  # DistributedDataParallel's warning on the layout of gradients
    return output


@two_on_a_gpu
def test_two_processes_equal_one(finished, two):
    one = [record["loss"] for record in logged_updates(finished)[:3]]
    losses = [record["loss"] for record in logged_updates(two)[:3]]
    assert len(one) == 3
    assert one == pytest.approx(losses, rel=2e-5)


@two_on_a_gpu
def test_torchrun_restarts_a_killed_process_exactly(two, folder, tmp_path, start):
    """Killed in its eighth forward pass: three updates, four batches of an evaluation, this one."""
    event = (
        'os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" '
        "and os.kill(os.getpid(), signal.SIGKILL)")
    common = [*FAST, *FULL, "--data", folder, "--output", tmp_path / "out", "--resume", "auto"]
    process = start(*common, torchrun=2, restarts=2, event=event, call=8)
    output, errors = finish(process)
    assert process.returncode == 0, errors
    assert "continuing from update 3" in output
    assert_same_state(last_state(two), last_state(tmp_path / "out"))


@two_on_a_gpu
def test_three_processes_evaluate_like_one(finished, tmp_path, start):
    """7 images: 3, 2 and 2."""
    flags = ("--eval", "--workers", 0, "--weights", finished / "last.pt")
    processes = start_processes(start, 3, *flags, "--results", tmp_path / "results.jsonl")
    (output, errors), *_ = [finish(process) for process in processes]
    assert processes[0].returncode == 0, errors
    scores = json.loads(output.splitlines()[-1])
    record = read_records(finished)[-1]
    assert scores["images"] == 7
    for name in ("top1", "loss", "ema_top1", "ema_loss"):
        assert scores[name] == pytest.approx(record[name]), name
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize("call, step", [(3, 1), (4, 2)], ids=["mid-update", "last micro-batch"])
def test_sigterm_saves_and_the_resumed_run_is_exact(finished, folder, tmp_path, start, call, step):
    """Loader processes get the signal, too, as under a scheduler."""
    common = [*FAST, *FULL, "--workers", 2, "--data", folder, "--output", tmp_path / "stopped"]
    process = start(*common, event="os.killpg(0, signal.SIGTERM)", call=call)
    output, errors = finish(process)
    assert process.returncode == 0, errors
    assert "dropping this update, then saving; again: stop now" in errors
    assert "resume with --resume" in output
    assert last_state(tmp_path / "stopped")["step"] == step
    run(*common, "--resume", "auto", "--workers", 0)
    assert_same_state(last_state(finished), last_state(tmp_path / "stopped"))


def test_a_second_interrupt_ends_at_once(folder, tmp_path, start):
    twice = "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]"
    process = start(*FAST, "--data", folder, "--output", tmp_path / "out", event=twice)
    _, errors = finish(process)
    assert process.returncode == 130
    assert errors.splitlines()[-1].endswith(": stopped by SIGINT")


@pytest.mark.parametrize("number, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_before_the_first_update_is_one_line(tmp_path, start, number, status):
    signalled = f"train_imagenet.open_data = lambda *_, **_2: os.kill(0, signal.{number})"
    process = start(*FAST, "--output", tmp_path / "out", setup=signalled)
    _, errors = finish(process)
    assert process.returncode == status
    assert errors.strip() == f"launcher.py: stopped by {number}"


# What a process does in the given place: it stops, its threads included.
STOPPED = """
train_imagenet.SILENT = 3
def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)
if os.environ["RANK"] == "{rank}":
    train_imagenet.{function} = stop
"""


@two_on_a_gpu
@pytest.mark.parametrize("rank, function", [(0, "replace_file"), (1, "Classification.losses")])
def test_a_stopped_process_ends_the_other(folder, tmp_path, start, rank, function):
    """While the other one waits for a checkpoint, or in the backward pass."""
    common = [*FAST, "--data", folder, "--output", tmp_path / "out"]
    setup = STOPPED.format(rank=rank, function=function)
    processes = start_processes(start, 2, *common, setup=setup)
    _, errors = finish(processes[1 - rank])
    processes[rank].kill()
    finish(processes[rank])
    assert processes[1 - rank].returncode == 1
    message = f"process {1 - rank}: no sign of life from process {rank} for 3 s, stopping"
    assert errors.splitlines()[-1].endswith(message)
    assert "Traceback" not in errors


@pytest.fixture
def ended(monkeypatch):
    """The processes that Heartbeats have called lost; SILENT is 0.4 s."""
    lost = []
    monkeypatch.setattr(train_imagenet, "SILENT", 0.4)
    monkeypatch.setattr(train_imagenet.Heartbeat, "end", lambda beat, rank: lost.append(rank))
    others = threading.enumerate()
    yield lost
    for thread in set(threading.enumerate()).difference(others):
        thread.join()  # one that outlived this test would end pytest


def test_living_processes_hear_each_other(ended):
    store = torch.distributed.HashStore()
    beats = [train_imagenet.Heartbeat(store, rank, 3) for rank in range(3)]
    time.sleep(1)
    for beat in beats:
        beat.finished.set()
    assert ended == []


def test_a_silent_process_is_named_to_all(ended):
    """Rank 2 never starts: rank 1 misses it and tells rank 0, which hears rank 1."""
    store = torch.distributed.HashStore()
    beats = [train_imagenet.Heartbeat(store, rank, 3) for rank in range(2)]
    time.sleep(1)
    for beat in beats:
        beat.finished.set()
    assert 2 in {int(rank) for rank in ended}
    assert store.get("lost") == b"2"


def test_a_silent_store_is_noticed(ended):
    class SilentStore:
        def add(self, _key, _amount):
            time.sleep(2)
            return 0

        def check(self, _keys):
            return False

        set = add

    beat = train_imagenet.Heartbeat(SilentStore(), 0, 2)
    time.sleep(1)
    beat.finished.set()
    assert 1 in ended


@two_on_a_gpu
def test_a_process_that_dies_ends_the_other(folder, tmp_path, start):
    death = 'os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGKILL)'
    common = [*FAST, "--data", folder, "--output", tmp_path / "out"]
    first, second = start_processes(start, 2, *common, event=death)
    finish(second)
    output, errors = finish(first)
    assert first.returncode == 1, output
    assert "another process died" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_killed_loader_process_ends_the_run(folder, tmp_path, start):
    common = [*FAST, "--workers", 2, "--data", folder, "--output", tmp_path / "out"]
    process = start(*common, event="multiprocessing.active_children()[0].kill()")
    _, errors = finish(process)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("train_imagenet.py: a loader process died")
    assert "Traceback" not in errors


def test_a_traceback_ends_a_run_with_loader_processes(folder, tmp_path, start):
    common = [*FAST, "--workers", 2, "--data", folder, "--output", tmp_path / "out"]
    process = start(*common, event='raise RuntimeError("out of memory")')
    _, errors = finish(process)
    assert process.returncode == 1
    assert "RuntimeError: out of memory" in errors


def test_fewer_gpus_than_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    message = "process 1 of this machine has no GPU: 1 found"
    with pytest.raises(train_imagenet.InputError, match=message):
        train_imagenet.Processes()


@pytest.mark.parametrize("variables, message", [
    ("RANK=2 WORLD_SIZE=2", "RANK is 2, but WORLD_SIZE is 2"),
    ("RANK=one WORLD_SIZE=2", "RANK is 'one', expected a whole number, at least 0"),
    ("RANK=-1 WORLD_SIZE=2", "RANK is '-1', expected a whole number, at least 0"),
    ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE is '0', expected a whole number, at least 1"),
    ("RANK=0 WORLD_SIZE=", "WORLD_SIZE is '', expected a whole number, at least 1"),
    ("WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1", "RANK is not set"),
    ("RANK=0 WORLD_SIZE=2 MASTER_PORT=1", "MASTER_ADDR is not set"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost", "MASTER_PORT is not set"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x", "MASTER_PORT is 'x', expected"),
    ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=nowhere.invalid MASTER_PORT=1", "at nowhere.invalid, port 1"),
    ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=99999", "at localhost, port 99999"),
])
def test_an_environment_of_no_sense_is_an_error(monkeypatch, variables, message):
    monkeypatch.setattr(train_imagenet, "SILENT", 0.1)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(train_imagenet.InputError, match=message):
        train_imagenet.Processes()


def test_the_start_line_is_not_appended_to_the_progress_bar(tiny, folder, tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    run(*FAST, "--data", folder, "--output", tmp_path, "--max-steps", 1)
    assert re.search(r"[\r\n]secvit_t: batch ", terminal.getvalue())


def test_the_reader_of_a_pipe_sees_every_line_at_once():
    reader, writer = os.pipe()
    with open(reader) as lines, open(writer, "w") as pipe:
        print("seen", file=train_imagenet.Terminal(pipe))
        assert lines.readline() == "seen\n"


def test_a_closed_pipe_ends_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        stream = train_imagenet.Terminal(pipe)
        print("nobody reads this", file=stream)
        print("nor this", file=stream, flush=True)


# --------------------------------------------------------------------------------- errors of a user
BAD = {  # what is typed -> what the one line says; {d}: the data, {t}: a folder of wrong things
    "--model resnet50":
        "unknown --model 'resnet50', expected one of clustr_t",
    "--data {t}/nowhere":
        "nowhere.*is not a folder",
    "--data {t}":
        "train is not a folder",
    "--data {t}/empty":
        "holds no image",
    "--data {t}/nested":
        "nested/train/dog holds no image; expected image files directly in each class folder",
    "--data {t}/differ":
        r"differ in classes \['cat', 'wolf'\]",
    "--data {d} --batch-size 6 --micro-batch 4":
        "6 is not a multiple of --micro-batch 4 x 1 processes",
    "--data {d} --batch-size 512":
        "512 is larger than the 14 .* for small data: --batch-size 14 --repeated-aug 1",
    "--data {d} --img-size 16":
        "--img-size: 16, expected at least 32",
    "--data {d} --epochs 0":
        "--epochs: 0, expected at least 1",
    "--data {d} --micro-batch 0":
        "--micro-batch: 0, expected at least 1",
    "--data {d} --drop-path 1.5":
        "--drop-path: 1.5, expected at least 0, at most 0.99",
    "--data {d} --lr nan":
        "--lr: nan, expected at least 0",
    "--data {d} --lr inf":
        "--lr: inf, expected at least 0",
    "--data {d} --clip-grad 0":
        "--clip-grad: 0, expected above 0",
    "--data {d} --batch-size 1 --img-size 32":
        "leaves batch norm a single value",
    "--data {d} --randaug rand-m9":
        "'rand-m9', expected none or rand-m",
    "--epochs ten":
        "invalid int value: 'ten'",
    "--no-such-flag":
        "unrecognized arguments: --no-such-flag",
    "--amp fp8":
        "--amp: invalid choice: 'fp8'",
    "--model stvit_s --released":
        "--released is a variant of SecViT",
    "--model sec_swin_t --released":
        "--released is a variant of SecViT, not of sec_swin_t",
    "--eval":
        "--eval needs --weights",
    "--predict a.jpg":
        "--predict needs --weights",
    "--eval --predict a.jpg --weights {t}/five.pt":
        "--eval, --predict, --score, --resume are mutually exclusive",
    "--model clustr_t --option aggregation":
        "--option: 'aggregation', expected NAME=VALUE",
    "--model clustr_t --option aggregate=grid":
        r"aggregate: clustr_t has only depths, dims, heads, ratios=\(\(64, 16\), .*neighbours=5",
    "--model secvit_t --option released=true":
        "--option released: secvit_t has only",
    "--model clustr_t --option neighbours=2.5":
        "--option neighbours: 2.5, expected a whole number",
    "--model clustr_t --option aggregation=3":
        "--option aggregation: 3, expected a name",
    "--model secvit_t --option lce=0":
        "--option lce: 0, expected true or false",
    "--model secvit_t --option clusters=8":
        "--option clusters: 8, expected values separated by commas",
    "--model clustr_t --option aggregation=all":
        "--option: aggregation = 'all', expected 'cluster', 'grid' or 'knn'",
    "--model clustr_t --option depths=3":
        "--option: a value of another type than in depths, dims, heads",
    "--results a.json":
        "--results is for --eval",
    "--predict {t}/nowhere.jpg --weights {t}/five.pt --model secvit_t":
        "no file or folder .*nowhere.jpg",
    "--predict {t}/empty --weights {t}/five.pt --model secvit_t":
        "empty holds no image",
    "--predict {d} --weights {t}/headless.pt --model secvit_t":
        "headless.pt has no classifier",
    "--resume {t}/none.pt":
        "no checkpoint .*none.pt",
    "--model secvit_t --weights {t}/cut.pt --data {d} --batch-size 2":
        "cannot read .*cut.pt",
    "--resume {t}/of_stvit.pt --model secvit_t":
        "holds stvit_s, but --model is secvit_t",
    "--eval --weights {t}/of_stvit.pt --model secvit_t --data {d}":
        "holds stvit_s, but --model is secvit_t",
    "--eval --weights {t}/dense.pt --data {d}":
        "dense.pt is a checkpoint of train_dense.py, not of a classifier",
    "--weights {t}/dense.pt --data {d} --batch-size 2":
        "dense.pt is a checkpoint of train_dense.py, not of a classifier",
    "--weights {t}/of_stvit.pt --model secvit_t --data {d} --batch-size 2":
        "do not fit SecViT",
    "--eval --weights {t}/part.pt --model secvit_t --data {d} --batch-size 2":
        "do not fit SecViT: [0-9]+ tensors are missing",
    "--eval --weights {t}/five.pt --model secvit_t --data {d}":
        "the classifier of .*five.pt is not one of 2 classes",
    "--resume {t}/part.pt":
        "part.pt is no checkpoint of this script",
    "--resume {t}/tensor.pt":
        "tensor.pt holds a Tensor, expected a dict of tensors",
    "--model secvit_t --data {d} --batch-size 2 --output {t}/cut.pt":
        ": [^ ]*/cut.pt: File exists",
    "--model secvit_t --data {t}/broken --batch-size 1 --repeated-aug 1 --workers 0":
        "ten files in a row cannot be decoded",
    "--model secvit_t --data {t}/broken --batch-size 1 --repeated-aug 1 --workers 1":
        "ten files in a row cannot be decoded",
}


@pytest.fixture(scope="session")
def wrong(tmp_path_factory):
    """A folder of wrong things."""
    root = tmp_path_factory.mktemp("wrong")
    for split, classes in (("train", ("cat", "dog")), ("val", ("dog", "wolf"))):
        for name in classes:
            save_image(root / "differ" / split / name / "a.png")
            (root / "empty" / split / name).mkdir(parents=True)
    for split in ("train", "val"):
        save_image(root / "nested" / split / "cat" / "a.png")
        save_image(root / "nested" / split / "dog" / "images" / "a.png")
        save_image(root / "broken" / split / "x" / "a.png")
    for i in range(12):
        (root / "broken" / "train" / "x" / f"{i}.png").write_bytes(b"x")
    (root / "broken" / "train" / "x" / "a.png").unlink()
    (root / "cut.pt").write_bytes(b"PK\x03\x04 not all of it")
    write_checkpoint(root / "of_stvit.pt", model="stvit_s")
    write_checkpoint(root / "dense.pt", task="semfpn")
    torch.save({"stem.0.weight": torch.zeros(8, 3, 3, 3)}, root / "part.pt")
    torch.save(small_model(num_classes=5).state_dict(), root / "five.pt")
    torch.save(torch.zeros(2), root / "tensor.pt")
    torch.save(small_model(num_classes=0).state_dict(), root / "headless.pt")
    return root


def error_lines(capsys):
    """What a run printed to stderr, but for its progress bar and the announcement of its data."""
    lines = []
    for line in capsys.readouterr().err.splitlines():
        if line.strip() and "img/s" not in line and "no --data" not in line:
            lines.append(line)
    return lines


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line_and_status_2(
        tiny, folder, wrong, tmp_path, monkeypatch, capsys, typed):
    words = typed.format(d=folder, t=wrong).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *words])
    with pytest.raises(SystemExit) as exit:
        train_imagenet.run_main(train_imagenet.main, "train_imagenet.py")
    lines = error_lines(capsys)
    assert exit.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("train_imagenet.py: ")
    assert re.search(BAD[typed], lines[0]), lines[0]


def test_the_script_itself_calls_main(monkeypatch, capsys):
    script = str(ROOT / "train_imagenet.py")
    monkeypatch.setattr(sys, "argv", [script, "--eval"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(script, run_name="__main__")
    assert exit.value.code == 2
    assert error_lines(capsys) == ["train_imagenet.py: --eval needs --weights FILE"]


def test_an_unreadable_validation_image_is_an_error(tiny, tmp_path):
    for split in ("train", "val"):
        save_image(tmp_path / split / "a" / "0.png")
    (tmp_path / "val" / "a" / "1.png").write_bytes(b"x")
    one = "--img-size 64 --batch-size 1 --micro-batch 1 --repeated-aug 1".split()
    message = "validation image cannot be decoded: .*1.png"
    with pytest.raises(train_imagenet.InputError, match=message):
        run(*FAST, *one, "--data", tmp_path, "--output", tmp_path / "out")


def test_an_unreadable_training_image_is_named_and_counted(tiny, folder, tmp_path, capsys):
    root = shutil.copytree(folder, tmp_path / "data")
    (root / "train" / "cat" / "00.png").write_bytes(b"x")
    run(*FAST, "--repeated-aug", 1, "--data", root, "--output", tmp_path / "out")
    records = read_records(tmp_path / "out")
    named = [r["unreadable_file"] for r in records if "unreadable_file" in r]
    evaluations = [r for r in records if "unreadable" in r]
    assert len(named) == 1
    assert "cat/00.png" in named[0]
    assert sum(record["unreadable"] for record in evaluations) == 2
    assert capsys.readouterr().err.count("using the next file") == 1


# ------------------------------------------------------------------------------ an earlier run
def test_a_new_run_does_not_overwrite_another(tiny, folder, tmp_path):
    run(*FAST, "--max-steps", 1, "--data", folder, "--output", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    message = "holds a run: .*--resume auto.*--overwrite"
    with pytest.raises(train_imagenet.InputError, match=message):
        run(*FAST, "--max-steps", 2, "--data", folder, "--output", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_overwrite_removes_the_other_runs_files(tiny, folder, tmp_path):
    (tmp_path / "best.pt").write_bytes(b"of another run")
    run(*FAST, "--max-steps", 1, "--data", folder, "--output", tmp_path, "--overwrite")
    assert not (tmp_path / "best.pt").exists()
    assert (tmp_path / "last.pt").exists()


def test_another_folders_run_does_not_continue_over_this_one(tiny, finished, folder, tmp_path):
    run(*FAST, "--max-steps", 1, "--data", folder, "--output", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(train_imagenet.InputError, match="holds a run"):
        run("--resume", finished / "last.pt", "--output", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_eval_and_resume_exclude_each_other(finished):
    with pytest.raises(train_imagenet.InputError, match="mutually exclusive"):
        resolve("--eval", "--weights", finished / "last.pt", "--resume", "auto")


def test_a_loss_that_is_not_finite_is_reported_with_its_own_rate():
    args = argparse.Namespace(output="run", batch_size=1)
    procs = train_imagenet.Processes()
    state = argparse.Namespace(step=0, per_epoch=9, lr=0.0, saved_at=None)
    log = train_imagenet.RunLog(args, procs, state, last_step=3)
    for rate, loss in ((0.1, 1.0), (0.2, float("nan")), (0.3, 1.0)):
        log.start_update(rate)
        log.add({"loss": torch.tensor(loss)}, weight=1.0)
        state.step += 1
    with pytest.raises(train_imagenet.InputError, match="update 2 not finite, learning rate 0.2;"):
        log.flush(state)
