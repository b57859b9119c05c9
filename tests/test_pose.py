"""Pose in train_dense.py: crops, heat maps, decoding, OKS and the part-wise evaluation against slow loops, whole runs, errors.

Order as in the script. Letters as there; loops are written from the definitions (COCO's, and mmpose's of the whole body).
"""
import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scenes import PAIRS
from torch.testing import assert_close

import train_dense as T

ROOT = Path(T.__file__).parent
CPU = torch.device("cpu")
# COCO-WholeBody's sigmas: body, feet, face, a hand
SHEET = """
.026 .025 .025 .035 .035 .079 .079 .072 .072 .062 .062 .107 .107 .087 .087 .089 .089 .068 .066 .066 .092 .094 .094
.042 .043 .044 .043 .040 .035 .031 .025 .020 .023 .029 .032 .037 .038 .043 .041 .045 .013 .012 .011 .011 .012 .012
.011 .011 .013 .015 .009 .007 .007 .007 .012 .009 .008 .016 .010 .017 .011 .009 .011 .009 .007 .013 .008 .011 .012
.010 .034 .008 .008 .009 .008 .008 .007 .010 .008 .009 .009 .009 .007 .007 .008 .011 .008 .008 .008 .010 .008 .029
.022 .035 .037 .047 .026 .025 .024 .035 .018 .024 .022 .026 .017 .021 .021 .032 .020 .019 .022 .031"""
FLIP_PAIRS = [tuple(map(int, pair.split("-"))) for pair in PAIRS.split()] + [(i, i + 21) for i in range(91, 112)]


class Draws(random.Random):
    """A generator whose draws are written down: lists by method; a list that is empty is an error."""

    def __init__(self, random=(), uniform=(), gauss=()):
        super().__init__()
        self.lists = {name: list(values) for name, values in (("random", random), ("uniform", uniform), ("gauss", gauss))}

    def random(self):
        return self.lists["random"].pop(0)

    def uniform(self, _low, _high):
        return self.lists["uniform"].pop(0)

    def gauss(self, _mean, _deviation):
        return self.lists["gauss"].pop(0)


# ------------------------------------------------------------------------------------------------------ the human body
def test_the_mirror_swaps_the_pairs_and_is_an_involution():
    expected = list(range(133))
    for a, b in FLIP_PAIRS:
        expected[a], expected[b] = b, a
    assert T.FLIP.tolist() == expected and T.FLIP[T.FLIP].tolist() == list(range(133))
    assert sorted(T.FLIP[:17]) == list(range(17))
    assert [i for i in range(133) if T.FLIP[i] == i] == [0, 31, 50, 51, 52, 53, 56, 74, 80, 85, 89]


def test_sigmas_and_lines():
    sigmas = [float(sigma) for sigma in SHEET.split()]
    assert T.SIGMAS.tolist() == sigmas + sigmas[-21:] and len(sigmas) == 112 and list(T.BODY_SIGMAS) == sigmas[:17]
    edges = [frozenset(edge) for path in T.LINES for edge in zip(path, path[1:])]
    assert len(edges) == len(set(edges)) == 16 + 6 + 2 * 20
    assert {frozenset(T.FLIP[list(edge)].tolist()) for edge in edges} == set(edges)                     # symmetric
    assert set().union(*edges) == set(range(23)) | set(range(91, 133))


# ------------------------------------------------------------------------------------------------ data sets, transforms
@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pose") / "scenes"
    T.write_scenes(folder, (12, 5))
    return folder


@pytest.fixture
def broken(scenes, tmp_path):
    """A copy of the scenes that a test may spoil."""
    shutil.copytree(scenes, tmp_path / "data")
    return tmp_path / "data"


def annotations(folder, split):
    return json.loads((folder / "annotations" / f"coco_wholebody_{split}_v1.0.json").read_text())


def table(person):
    fields = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
    return np.concatenate([np.reshape(person[name], (-1, 3)) for name in fields]).astype(float)


def write_people(folder, people, size=(100, 60), name="coco_wholebody_{}_v1.0.json"):
    """Both splits: image 7 with `people` (annotations without ids), image 5 with none."""
    image = dict(width=size[0], height=size[1], file_name="a.png")
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (9, 9, 9)).save(folder / f"{split}2017" / "a.png")
        (folder / "annotations").mkdir(exist_ok=True)
        data = dict(images=[dict(image, id=7), dict(image, id=5)], categories=[dict(id=1, name="person"), dict(id=3, name="car")],
                    annotations=[dict(person, id=i) for i, person in enumerate(people)])
        (folder / "annotations" / name.format(split)).write_text(json.dumps(data))


def person(rng, image_id=7, **changes):
    """A whole-body annotation with all points labelled."""
    points = np.concatenate([rng.uniform(5, 50, (133, 2)).round(1), np.full((133, 1), 2)], 1)
    fields = {field: points[T.PARTS[part]].ravel().tolist() for part, field in T.FIELDS.items()}
    return dict(fields, image_id=image_id, category_id=1, bbox=[5, 5, 46, 46], area=900, iscrowd=0, num_keypoints=17, **{}) | changes


def test_persons_keep_the_rules_people(tmp_path):
    rng = np.random.default_rng(0)
    out = [person(rng, iscrowd=1), person(rng, area=0), person(rng, bbox=[99.5, 5, 20, 20]), person(rng, bbox=[5, 5, 1, 9]),
           person(rng, keypoints=[0] * 51), person(rng, category_id=3)]
    kept = [person(rng), person(rng, bbox=[-10, 50, 30, 30]), person(rng, bbox=[90, -5, 30, 8.5])]
    write_people(tmp_path, [kept[0], *out, *kept[1:]])
    train, val = (T.Persons(tmp_path, split, 133) for split in ("train", "val"))
    assert len(train) == 3 and len(val) == 2 and len(train.names) == 133 and train.annotations == {}
    boxes = [[5, 5, 45, 45, 1], [0, 50, 19, 9, 1], [90, 0, 9, 2.5, 1]]      # right edge x + w - 1, at most W - 1
    assert train.boxes.tolist() == boxes and np.array_equal(train.points, np.array([table(p) for p in kept], np.float32))
    assert val.ids == [5, 7] and len(val.read(0)[1]) == 0 and val.read(1)[1].tolist() == boxes
    assert len(val.annotations[7]) == 8                                     # the car is nobody
    assert train.read(2)[1].shape == (1, 5) and train.name(0).endswith("train2017/a.png")


def test_seventeen_keypoints_come_from_their_own_file_or_the_whole_body(scenes, tmp_path):
    source, whole = T.Persons(scenes, "train", 17), T.Persons(scenes, "train", 133)
    assert len(source.names) == 17 and np.array_equal(source.points, whole.points[:, :17])
    rng = np.random.default_rng(0)
    write_people(tmp_path, [person(rng)])
    write_people(tmp_path, [{k: v for k, v in person(rng).items() if "_kpts" not in k}] * 2, name="person_keypoints_{}2017.json")
    assert len(T.Persons(tmp_path, "val", 17).boxes) == 2 and len(T.Persons(tmp_path, "val", 133).boxes) == 1


def test_frames_have_the_crops_shape():
    corner, size = np.array([[10., 20.], [0., 0.]]), np.array([[30., 20.], [10., 100.]])
    centre, frame = T.crop_frame(corner, size, 1.25)
    assert centre.tolist() == [[25, 30], [5, 50]] and np.allclose(frame, [[37.5, 50], [93.75, 125]])


@pytest.mark.parametrize("angle", [0.0, 0.3, -1.2])
@pytest.mark.parametrize("size", [(30, 40), (120, 160)])
def test_a_dot_lands_where_its_keypoint_says(angle, size):
    """The crop of a smooth dot has its centre of mass at the point the transform gives, to a tenth of a pixel of the image."""
    spot, (x, y) = np.array([[61., 43., 2.]]), np.meshgrid(np.arange(120), np.arange(90))
    picture = 255 * np.exp(-((x - 61) ** 2 + (y - 43) ** 2) / (2 * 3 ** 2))
    centre = np.array([57.3, 46.1])
    crop, points = T.crop_person(Image.fromarray(picture.astype(np.uint8)).convert("RGB"), spot, centre, np.array(size, float), angle, 128)
    assert crop.shape == (128, 96, 3) and crop.dtype == np.uint8 and points.shape == (1, 3) and points[0, 2] == 2
    mass = crop[..., 0].astype(float)
    rows, columns = np.mgrid[:128, :96]
    found = np.array([(columns * mass).sum(), (rows * mass).sum()]) / mass.sum()
    assert np.abs(found - points[0, :2]).max() < 0.1 * 96 / size[0]
    cos, sin, factor = math.cos(-angle), math.sin(-angle), 96 / size[0]     # by the definition: factor x Rot(-angle)(p - centre) + middle
    dx, dy = spot[0, :2] - centre
    assert np.allclose(points[0, :2], (factor * (cos * dx - sin * dy) + 48, factor * (sin * dx + cos * dy) + 64))


def test_what_lies_outside_the_image_is_black():
    crop, _ = T.crop_person(Image.new("RGB", (40, 40), "white"), np.zeros((1, 3)), np.array([0., 20.]), np.array([48., 64.]), 0.0, 128)
    assert (crop[30:100, :46] == 0).all() and (crop[30:100, 50:] == 255).all()


def slow_augment(points, box, width, draws, height):
    """TCFormer's pipeline, point by point. Returns the points in the crop and the frame."""
    (x, y, w, h), rnd, uni, gauss = box, *(iter(draws[k]) for k in ("random", "uniform", "gauss"))
    centre, size = [x + w / 2, y + h / 2], [max(w, 0.75 * h) * 1.25, max(h, w / 0.75) * 1.25]
    if next(rnd) < 0.3:
        centre = [c + next(uni) * 0.16 * s for c, s in zip(centre, size)]
    points = [list(p) for p in points]
    if next(rnd) < 0.5:
        points, swapped = [[width - 1 - x, y, v] for x, y, v in points], [None] * len(points)
        partner = dict(FLIP_PAIRS) | {b: a for a, b in FLIP_PAIRS}
        for i, point in enumerate(points):
            swapped[partner.get(i, i)] = point
        points, centre[0] = swapped, width - 1 - centre[0]
    seen = [i for i, p in enumerate(points) if p[2] > 0]
    if len(seen) > 8 and next(rnd) < 0.3:
        upper, lower = [points[i] for i in seen if i <= 10], [points[i] for i in seen if i > 10]
        if next(gauss) < 0.5 and len(upper) > 2:
            chosen = upper
        else:
            chosen = lower if len(lower) > 2 else upper
        if len(chosen) >= 2:
            centre = [sum(p[i] for p in chosen) / len(chosen) for i in (0, 1)]
            w, h = (max(p[i] for p in chosen) - min(p[i] for p in chosen) for i in (0, 1))
            size = [max(w, 0.75 * h) * 1.5, max(h, w / 0.75) * 1.5]
    scale = 1 + 0.5 * next(gauss)
    size = [s * (0.5 if scale < 0.5 else 1.5 if scale > 1.5 else scale) for s in size]
    angle = 0.0
    if next(rnd) < 0.6:
        angle = math.radians(max(-80, min(80, 40 * next(gauss))))
    factor, result = 0.75 * height / size[0], []
    for x, y, v in points:
        dx, dy = x - centre[0], y - centre[1]
        result.append((factor * (math.cos(angle) * dx + math.sin(angle) * dy) + 0.75 * height / 2,
                       factor * (-math.sin(angle) * dx + math.cos(angle) * dy) + height / 2, v))
    return result


@pytest.mark.parametrize("keypoints", [133, 17])
def test_augmentation_matches_the_table(keypoints):
    rng, seen = np.random.default_rng(0), set()
    image = Image.new("RGB", (100, 60))
    for trial in range(150):
        points = np.concatenate([rng.uniform(0, 60, (keypoints, 2)), rng.integers(0, 3, (keypoints, 1))], 1)
        few = rng.choice(keypoints, (0, 1, 4, 9, 12, keypoints)[trial % 6], replace=False)          # hardly any point labelled, or only
        points[np.setdiff1d(np.arange(keypoints), few)] = 0
        if trial % 5 == 0:
            points[11:] = 0                                                 # ... those of one half
        elif trial % 5 == 1:
            points[2:11] = 0
        box = [5., 8., *rng.uniform(10, 60, 2)]
        draws = dict(random=rng.random(4), uniform=rng.uniform(-1, 1, 2), gauss=rng.normal(0, 1.5, 3))
        raw = image, np.array([[*box, 1]]), points[None].astype(np.float32)
        crop, fast = T.augment_person(raw, Draws(**draws), height=128, jitter=1.0)
        slow = slow_augment(points.astype(np.float32), box, 100, draws, 128)
        assert crop.shape == (128, 96, 3) and fast.dtype == np.float32
        labelled = fast[:, 2] > 0                                           # others may be anywhere
        assert np.allclose(fast, slow, atol=2e-3, rtol=1e-5)
        seen.add((int(labelled.sum()) > 8, *(draws["random"][:2] < (0.3, 0.5)).tolist()))
    assert len(seen) == 8


def test_augmentation_depends_on_the_generator_only(scenes):
    source = T.Persons(scenes, "train", 133)
    crops = [T.augment_person(source.read(0), random.Random(seed), height=128, jitter=1.0) for seed in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(*crops[:2])) and not np.array_equal(crops[0][0], crops[2][0])


def test_without_jitter_only_mirroring_is_random(scenes):
    source = T.Persons(scenes, "train", 133)
    crops = [T.augment_person(source.read(0), random.Random(seed), height=128, jitter=0.0) for seed in range(12)]
    assert len({crop.tobytes() for crop, _ in crops}) == 2
    centre, size = T.crop_frame(source.boxes[0, :2], source.boxes[0, 2:4], 1.25)
    with Image.open(source.name(0)) as image:
        plain, points = T.crop_person(image, source.points[0], centre, size, 0.0, 128)
    assert any(np.array_equal(crop, plain) and np.allclose(own, points, atol=1e-4) for crop, own in crops)


# ----------------------------------------------------------------------------------------------------- necks and heads
@pytest.mark.parametrize("backbone", ["clustr_s", "secvit_s", "stvit_s", "linglo_b2"])
def test_head_parameters(backbone):
    with torch.device("meta"):
        model = T.build_model("pose", backbone, 133)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.backbone.parameters()) == 4230021


def test_head_starts_small():
    model = T.build_model("pose", "linglo_b0", 17)
    for weight in (*(deconv.weight for deconv, *_ in model.deconvs), model.classifier.weight):
        assert weight.std().item() == pytest.approx(0.001, rel=0.05) and abs(weight.mean().item()) < 1e-4
    assert not model.classifier.bias.any()


def test_every_parameter_learns(device):
    model = T.build_model("pose", "linglo_b0", 133, frozen_bn=False, drop_path_rate=0.0).to(device)
    maps = model(torch.randn(2, 3, 128, 96, device=device))
    assert maps.shape == (2, 133, 32, 24)
    (maps * torch.randn_like(maps)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# -------------------------------------------------------------------------------------------------------------- losses
def slow_maps(points, h, w):
    """One person's targets and weights, pixel by pixel."""
    maps, weights = np.zeros((len(points), h, w)), []
    for k, (x, y, v) in enumerate(points):
        mx, my = int(x + 0.5), int(y + 0.5)
        weights.append(float(v > 0 and mx + 6 >= 0 and my + 6 >= 0 and mx - 6 < w and my - 6 < h))
        for row, column in product(range(h), range(w)):
            if weights[-1] and abs(row - my) <= 6 and abs(column - mx) <= 6:
                maps[k, row, column] = math.exp(-((row - my) ** 2 + (column - mx) ** 2) / (2 * 2 ** 2))
    return maps, weights


def test_targets_and_loss_match_loops(device):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-12, 36, (3, 40, 2)), rng.choice([0, 0.008, 1, 2], (3, 40, 1))], 2)
    points[0, :8, 2], points[0, :8, :2] = 1, [(-0.7, 5), (-1.2, 5), (-6.6, 5), (-7, 5), (25.4, 5), (25.6, 5), (3, 21.6), (3, -7.4)]
    expected = [slow_maps(person, 16, 20) for person in points]             # (h, w) neither square nor a crop's
    assert [weights[:8] for _, weights in expected][0] == [1, 1, 1, 1, 1, 0, 0, 1]
    maps, weight = T.gaussian_maps(torch.tensor(points, device=device), (16, 20), stride=1)
    assert weight.tolist() == [weights for _, weights in expected] and 20 < weight.sum() < 100
    slow = torch.tensor(np.stack([maps for maps, _ in expected]))
    assert_close(maps.cpu(), slow)
    assert maps.amax() == 1
    predicted = torch.randn(3, 40, 16, 20, dtype=torch.float64, requires_grad=True)
    total = 0
    for k in range(40):                                                     # mean over joints of the mean over batch and pixels
        error = [weight[b, k].cpu() * predicted[b, k] - weight[b, k].cpu() * slow[b, k] for b in range(3)]
        total = total + (torch.stack(error) ** 2).mean()
    scaled = torch.tensor(points, device=device) * torch.tensor([4, 4, 1], device=device)
    fast = T.pose_loss(predicted.to(device), scaled)
    assert_close(fast.cpu().double(), total / 40, rtol=1e-5, atol=0)
    assert_close(*(torch.autograd.grad(loss, predicted)[0] for loss in (fast, total / 40)), rtol=1e-4, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- inference
def slow_peak(values):
    h, w = values.shape
    y, x = np.unravel_index(values.argmax(), values.shape)
    best = values[y, x]
    if best <= 0:
        return -1, -1, best
    if 1 < x < w - 1 and 1 < y < h - 1:
        x, y = (x + 0.25 * np.sign(values[y, x + 1] - values[y, x - 1]), y + 0.25 * np.sign(values[y + 1, x] - values[y - 1, x]))
    return x, y, best


def test_peaks_match_loops(device):
    torch.manual_seed(0)
    maps = torch.randn(2, 300, 5, 6).double().round(decimals=1)             # small, so many are at the border, and ties of neighbours
    maps[0, :3] = torch.tensor([-1., 0., -2.])[:, None, None]
    expected = [[slow_peak(m) for m in person.numpy()] for person in maps]
    assert_close(T.peaks(maps.to(device)).cpu().double(), torch.tensor(np.array(expected, float)))


def test_decoding_returns_what_was_drawn():
    """Targets of points -> peaks -> points: the rounding of the target is all that is lost."""
    points = torch.cat([torch.rand(2, 133, 2) * torch.tensor([17., 25.]) + 3, torch.ones(2, 133, 1)], -1)
    found = T.peaks(T.gaussian_maps(points, (32, 24), stride=1)[0])
    assert (found[..., :2] - points[..., :2]).abs().max() <= 0.5 and (found[..., 2] == 1).all()
    assert_close(found[..., :2], (points[..., :2] + 0.5).floor())           # a symmetric peak does not move


class Painter(torch.nn.Module):
    """A model that answers a crop with bright dots of fixed colours by maps of where these are: K colours, stride 4."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def forward(self, images):
        mean, std = 0.485, 0.229
        red = images[:, 0] * std + mean                                     # (B, H, W), 0 to 1
        maps = torch.stack([(-((red - level) * 40) ** 2).exp() for level in self.levels], 1)
        return torch.nn.functional.avg_pool2d(maps, 5, stride=4, padding=2)     # its pixel (i, j) is centred on (4 i, 4 j)


@pytest.mark.parametrize("box", [[20., 30., 60., 80., 0.5], [10., 25., 100., 70., 0.5]])
def test_poses_return_to_the_images_pixels(box):
    """Dots in a picture are found at their place; those of a pair of points change places in the mirror and must be put back."""
    places, picture = np.random.default_rng(1).permutation(12)[:17 - 5], np.zeros((120, 130), np.uint8)
    levels, true = [(40 + 12 * i) / 255 for i in range(17)], np.zeros((17, 2))
    for i in range(17):
        x, y = 30 + 11 * (i % 4), 40 + 12 * (i // 4)
        true[i], picture[y - 3:y + 4, x - 3:x + 4] = (x, y), 40 + 12 * i
    assert len(places) == 12
    flips = []

    class Model(Painter):
        def forward(self, images):
            flips.append(images)
            mirrored = len(flips) % 2 == 0
            maps = super().forward(images)
            return maps[:, T.FLIP[:17]] if mirrored else maps               # a model cannot tell: what was left is right now
    args = argparse.Namespace(img_size=256, keypoints=17, amp="none")
    points, scores = T.estimate_pose(Model(levels), Image.fromarray(picture).convert("RGB"), np.array([box]), args, CPU)
    assert_close(flips[1], flips[0].flip(3))
    _, frame = T.crop_frame(np.array(box[:2]), np.array(box[2:4]), 1.25)
    assert points.shape == (1, 17, 3) and np.abs(points[0, :, :2] - true).max() < 2 * frame[1] / 64     # two pixels of the map
    assert scores[0] == pytest.approx(0.5 * points[0, points[0, :, 2] > 0.2, 2].mean())


def test_the_mirrored_map_is_shifted_and_averaged():
    """From random maps: pairs swapped, mirrored back, moved right by one, column 0 kept, averaged; the scores by hand."""
    torch.manual_seed(0)
    answers = torch.randn(2, 70, 17, 32, 24, dtype=torch.float64)
    partner, expected = dict(FLIP_PAIRS) | {b: a for a, b in FLIP_PAIRS}, []
    for b in range(70):
        maps = np.zeros((17, 32, 24))
        for k, x in product(range(17), range(24)):
            maps[k, :, x] = (answers[0, b, k, :, x] + answers[1, b, partner.get(k, k), :, 23 - max(x - 1, 0)]) / 2
        expected.append([slow_peak(m.astype(np.float32)) for m in maps])
    expected, calls = np.array(expected), []

    def model(images):
        calls.append(len(images))
        first = sum(calls[:-1:2]) if len(calls) % 2 else sum(calls[:-2:2])
        return answers[(len(calls) + 1) % 2, first:first + len(images)]
    boxes = np.concatenate([np.random.default_rng(0).uniform(10, 100, (70, 4)), np.linspace(1, 0.1, 70)[:, None]], 1)
    args = argparse.Namespace(img_size=128, keypoints=17, amp="none")
    points, scores = T.estimate_pose(model, Image.new("RGB", (90, 80)), boxes, args, CPU)
    assert calls == [32, 32, 32, 32, 6, 6] and len(points) == 70
    order = []
    for b, (x, y, w, h, score) in enumerate(boxes):
        w, h = 1.25 * max(w, 0.75 * h), 1.25 * max(h, w / 0.75)
        cx, cy = x + boxes[b, 2] / 2, y + boxes[b, 3] / 2
        expected[b, :, 0], expected[b, :, 1] = expected[b, :, 0] * w / 24 + cx - w / 2, expected[b, :, 1] * h / 32 + cy - h / 2
        sure = [c for c in expected[b, :, 2] if c > 0.2]
        order.append((-score * sum(sure) / len(sure), b))
    order.sort()
    assert np.allclose(scores, [-score for score, _ in order]) and np.allclose(points, expected[[b for _, b in order]])


def test_nobody_and_unsure_persons():
    args = argparse.Namespace(img_size=128, keypoints=133, amp="none")
    points, scores = T.estimate_pose(None, Image.new("RGB", (90, 80)), np.zeros((0, 5)), args, CPU)
    assert points.shape == (0, 133, 3) and scores.shape == (0,)
    args.keypoints = 17
    model = lambda images: torch.full((len(images), 17, 32, 24), 0.1)       # noqa: E731
    points, scores = T.estimate_pose(model, Image.new("RGB", (90, 80)), np.array([[0, 0, 9, 9, 1.]]), args, CPU)
    assert points.shape == (1, 17, 3) and scores.tolist() == [0]            # no point above 0.2


def loop_oks(a, b, area, sigmas):
    total = 0
    for (xa, ya, _), (xb, yb, _), sigma in zip(a, b, sigmas):
        total += math.exp(-((xa - xb) ** 2 + (ya - yb) ** 2) / (8 * sigma ** 2 * area))
    return total / len(sigmas)


def test_oks_nms_matches_the_greedy_loop():
    rng, dropped = np.random.default_rng(0), 0
    for _ in range(10):
        poses = rng.uniform(0, 50, (4, 1, 133, 3)) + rng.normal(0, 0.3, (4, 6, 133, 3))                 # six of each person
        poses, scores, areas = poses.reshape(24, 133, 3), rng.integers(0, 6, 24) / 5, rng.uniform(200, 3000, 24)
        rest, kept = sorted(range(24), key=lambda i: (-scores[i], i)), []
        while rest:
            best, *rest = rest
            kept.append(best)
            rest = [i for i in rest if loop_oks(poses[best], poses[i], (areas[best] + areas[i]) / 2, T.SIGMAS) <= 0.9]
        dropped += 24 - len(kept)
        assert T.oks_nms(poses, scores, areas, T.SIGMAS).tolist() == kept
    assert 20 < dropped < 200


def test_only_sure_points_are_drawn():
    people = np.zeros((2, 133, 3))
    people[..., :2] = np.random.default_rng(0).uniform(10, 90, (2, 133, 2))
    image = Image.new("RGB", (100, 100))
    people[0, :, 2], people[1, :, 2] = 0.29, -1
    assert not np.array(T.draw_people(image, people)).any()
    drawn = []
    for part in (slice(5, 8), slice(15, 23), T.PARTS["face"], T.PARTS["lefthand"]):
        people[0, :, 2], people[0, part, 2] = 0, 0.3
        picture = T.draw_people(image, people[:1])
        assert picture.size == image.size
        drawn.append(np.array(picture).any(-1))
    assert all(mask.any() for mask in drawn) and not np.array(image).any()
    assert not np.array_equal(*(np.array(T.draw_people(image, p)) for p in (people[:, :17] + (0, 0, 1), people + (0, 0, 1))))


# ------------------------------------------------------------------------------------------------------ COCO evaluation
def result_of(points, **more):
    return {field: points[T.PARTS[part]].ravel().tolist() for part, field in T.FIELDS.items()} | more


def test_oks_by_hand():
    """One point of the nose and one of a hip, each off by one: exp(-1 / (8 sigma^2 area)) each."""
    truth, found = np.zeros((1, 17, 3)), np.zeros((1, 17, 3))
    truth[0, 0], truth[0, 11] = (10, 10, 2), (20, 30, 1)
    found[0, 0, :2], found[0, 11, :2] = (11, 10), (20, 29)
    value = T.oks(found, truth, np.array([[0, 0, 40, 40.]]), np.array([400.]), T.BODY_SIGMAS)
    assert value[0, 0] == pytest.approx((math.exp(-1 / (8 * 0.026 ** 2 * 400)) + math.exp(-1 / (8 * 0.107 ** 2 * 400))) / 2)
    assert value[0, 0] == pytest.approx((0.63000 + 0.97307) / 2, abs=1e-4)


def part_runs(truth, results, ids):
    """Six runs of the keypoint evaluation, each on files of its own, written out."""
    fields = [("body", "keypoints", "score"), ("foot", "foot_kpts", "foot_score"), ("face", "face_kpts", "face_score"),
              ("lefthand", "lefthand_kpts", "lefthand_score"), ("righthand", "righthand_kpts", "righthand_score"),
              ("whole", None, "wholebody_score")]
    figures = {}
    for run, field, score in fields:
        own, found = [], []
        for a in truth:
            points = a[field] if field else table(a).ravel().tolist()
            own.append({k: a[k] for k in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")}
                       | dict(keypoints=points, num_keypoints=sum(v > 0 for v in points[2::3])))
        for r in results:
            points = r[field] if field else table(r).ravel().tolist()
            if any(v > 0 for v in points[2::3]):
                x, y = r["keypoints"][::3], r["keypoints"][1::3]
                found.append(dict(image_id=r["image_id"], category_id=1, keypoints=points, score=r.get(score, r["score"]),
                                  area=(max(x) - min(x)) * (max(y) - min(y))))
        sigmas = T.SIGMAS[T.PARTS[run]] if field else T.SIGMAS
        figures[run] = T.evaluate_coco([dict(id=i) for i in ids], own, found, "keypoints", [1], sigmas)
    return figures


def random_people(rng):
    """Annotations of images 1 to 6 and noisy results, some parts unlabelled or without confidence, some with scores of their own."""
    truth, results = [], []
    for image, _ in product(range(1, 7), range(3)):
        a = person(rng, image, id=len(truth), iscrowd=int(rng.random() < 0.1), area=float(rng.uniform(500, 12000)))
        points = table(a)
        for part in T.FIELDS:
            if rng.random() < 0.3:
                points[T.PARTS[part]] = 0
        truth.append(a | {field: points[T.PARTS[part]].ravel().tolist() for part, field in T.FIELDS.items()})
        for _ in range(rng.integers(0, 3)):
            found = table(a) + np.concatenate([rng.normal(0, rng.choice([0.2, 1, 4]), (133, 2)), rng.uniform(-2, -1, (133, 1))], 1)
            found[T.PARTS[str(rng.choice(list(T.FIELDS)))], 2] = 0
            scored = [run for run in ("foot", "face", "lefthand", "righthand", "wholebody") if rng.random() < 0.5]
            more = {f"{run}_score": float(rng.random()) for run in scored}
            results.append(result_of(found, image_id=image, category_id=1, score=float(rng.random()), **more))
    return truth, results


def test_part_wise_evaluation_is_six_runs(tmp_path, capsys):
    for seed in range(3):
        truth, results = random_people(np.random.default_rng(seed))
        runs = part_runs(truth, results, range(1, 7))
        expected = {"AP": runs["whole"]["AP"], "AR": runs["whole"]["AR"]}
        for run in ("body", "foot", "face", "lefthand", "righthand"):
            expected |= {f"{run}_{name}": runs[run][name] for name in ("AP", "AR")}
        expected |= {f"hand_{name}": (runs["lefthand"][name] + runs["righthand"][name]) / 2 for name in ("AP", "AR")}
        assert 0.05 < min(expected.values()) and max(expected.values()) < 0.95
        write_people(tmp_path, truth)
        file = tmp_path / "annotations" / "coco_wholebody_val_v1.0.json"
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | dict(images=[dict(data["images"][0], id=i) for i in range(6, 0, -1)])))
        (tmp_path / "results.json").write_text(json.dumps(results))
        score = ["--task", "pose", "--data", str(tmp_path), "--score", str(tmp_path / "results.json")]
        T.main(score)
        printed = json.loads(capsys.readouterr().out)
        assert printed == expected and list(printed) == list(expected)
        T.main([*score, "--keypoints", "17"])
        plain = [{k: r[k] for k in ("image_id", "category_id", "score", "keypoints")} for r in results]
        assert json.loads(capsys.readouterr().out) == T.evaluate_coco([dict(id=i) for i in range(1, 7)], [
            a | dict(num_keypoints=sum(v > 0 for v in a["keypoints"][2::3])) for a in truth], plain, "keypoints", [1])


def test_parts_by_hand():
    """Two persons; the second has no labelled feet, the result of the first no feet that it believes in."""
    rng = np.random.default_rng(0)
    a, b = person(rng, id=1), person(rng, id=2, foot_kpts=[0] * 18)
    first, second = table(a) + (500, 0, 0), table(b)                        # the first result is wrong everywhere, and most sure
    first[17:23, 2] = 0
    matches = T.match_people(7, [a, b], [result_of(p, score=s) for p, s in ((first, 0.9), (second, 0.5))], 133)
    figures = T.people_figures([matches])
    # whole, body, ...: one false, then one true of two: recall 0.5 (51 of 101 points) at precision 0.5
    assert figures["AP"] == figures["body_AP"] == figures["hand_AP"] == pytest.approx(51 / 101 / 2) and figures["face_AR"] == 0.5
    # feet: one person to find, whose only detection is dropped; the other's feet are nowhere near
    assert (figures["foot_AP"], figures["foot_AR"]) == (0, 0)
    figures = T.people_figures([T.match_people(7, [b], [], 133)])
    assert figures["foot_AP"] == -1 and figures["face_AP"] == 0             # nothing to find, nothing found


# ---------------------------------------------------------------------------------------------------------- whole runs
FAST = "--task pose --backbone linglo_b0 --img-size 128 --batch-size 4 --micro-batch 2 --iters 3 --workers 0 --log-every 1".split()


def fails(flags, message):
    with pytest.raises(T.InputError, match=message) as error:
        T.main(flags)
    return str(error.value)


def truth_as_results(folder):
    return [result_of(table(a), image_id=a["image_id"], category_id=1, score=0.9) for a in annotations(folder, "val")["annotations"]]


def test_score_of_the_truth_is_perfect(scenes, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(truth_as_results(scenes)))
    T.main(["--task", "pose", "--data", str(scenes), "--score", str(tmp_path / "results.json")])
    assert set(json.loads(capsys.readouterr().out).values()) == {1.0}
    T.main(["--task", "pose", "--keypoints", "17", "--data", str(scenes), "--score", str(tmp_path / "results.json")])
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == "AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl".split() and scores["AP"] == scores["AR"] == 1


@pytest.fixture(scope="session")
def run(scenes, tmp_path_factory):
    """A short run of two processes, and the same of one: the folder, and their logs."""
    folder, logs = tmp_path_factory.mktemp("runs"), []
    for world in (1, 2):
        command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if world > 1 else []),
                   str(ROOT / "train_dense.py"), *FAST, "--data", str(scenes), "--output", str(folder / str(world)), "--eval-every", "3"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        logs.append([json.loads(line) for line in (folder / str(world) / "log.jsonl").read_text().splitlines()])
    return folder, logs


def test_two_processes_equal_one(run):
    losses = [[r["loss"] for r in log if "lr" in r] for log in run[1]]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert run[1][0][-1].keys() == run[1][1][-1].keys() >= {"AP", "AR", "body_AP", "hand_AR", "best"}


def test_a_run_can_be_tested_and_drawn(run, scenes, tmp_path, capsys):
    weights = str(run[0] / "1" / "last.pt")
    T.main(["--eval", "--weights", weights])
    printed = json.loads(capsys.readouterr().out)
    assert printed == {k: run[1][0][-1][k] for k in printed} and len(printed) == 14
    boxes = [dict(image_id=i, category_id=c, bbox=[5, 5, 60, 60], score=0.5) for i, c in ((1, 1), (1, 1), (2, 1), (3, 4))]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    T.main(["--eval", "--weights", weights, "--boxes", str(tmp_path / "boxes.json")])
    assert json.loads(capsys.readouterr().out).keys() == printed.keys()
    pictures = [str(scenes / "val2017" / f"00000000000{i}.jpg") for i in (1, 3)]
    T.main(["--predict", *pictures, "--weights", weights, "--output", str(tmp_path), "--boxes", str(tmp_path / "boxes.json")])
    for i, picture in zip((1, 3), pictures):
        assert Image.open(tmp_path / f"00000000000{i}_pose.png").size == Image.open(picture).size
    fails(["--eval", "--weights", weights, "--keypoints", "17"], "the checkpoint is one of 133, --keypoints says 17")
    Image.open(pictures[0]).save(tmp_path / "photo.jpg")
    fails(["--predict", str(tmp_path / "photo.jpg"), "--weights", weights, "--boxes", str(tmp_path / "boxes.json")], "must be its id")
    T.main(["--predict", str(tmp_path / "photo.jpg"), "--weights", weights, "--output", str(tmp_path)])
    assert (tmp_path / "photo_pose.png").exists()


def test_persons_from_a_detection_file(scenes, tmp_path):
    """Persons alone, in their images, with their scores; boxes without extent and of other images are left out."""
    boxes = [dict(image_id=3, category_id=1, bbox=[1, 2, 30, 40], score=0.5), dict(image_id=1, category_id=1, bbox=[0, 0, 9, 9], score=0.1),
             dict(image_id=3, category_id=4, bbox=[1, 2, 3, 4], score=0.9), dict(image_id=3, category_id=1, bbox=[5, 5, 0, 9], score=1),
             dict(image_id=999, category_id=1, bbox=[1, 2, 3, 4], score=0.9), dict(image_id=3, category_id=1, bbox=[-4, 2, 6, 8], score=0)]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(boxes))
    source = T.Persons(scenes, "val", 133, file)
    assert len(source) == 5 and source.read(2)[1].tolist() == [[1, 2, 30, 40, 0.5], [-4, 2, 6, 8, 0]]
    assert [len(source.read(i)[1]) for i in range(5)] == [1, 0, 2, 0, 0]
    assert np.array_equal(T.Persons(scenes, "train", 133, file).boxes, T.Persons(scenes, "train", 133).boxes)           # testing only
    for change, message in (({"bbox": [1, 2, 3]}, "image 3: bbox"), ({"score": math.nan}, "image 3: expected a bbox"),
                            ({"bbox": None, "segmentation": []}, "image 3: expected a bbox"), ({"score": None}, "no COCO results file"),
                            ({"image_id": [3]}, "no COCO results file"), ({"image_id": 99}, "no person in an image"),
                            ({"category_id": None}, "no COCO results file")):
        file.write_text(json.dumps([boxes[0] | change]))
        with pytest.raises(T.InputError, match=message):
            T.Persons(scenes, "val", 133, file)


def test_seventeen_keypoints_train_and_go_on(scenes, tmp_path):
    T.main([*FAST, "--data", str(scenes), "--keypoints", "17", "--output", str(tmp_path), "--max-steps", "2"])
    T.main(["--task", "pose", "--resume", "auto", "--output", str(tmp_path), "--backbone", "linglo_b0"])
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and {"AP", "AP50", "ARl"} <= last.keys()
    fails(["--task", "pose", "--resume", "auto", "--output", str(tmp_path), "--backbone", "linglo_b0", "--keypoints", "133"], "one of 17")


def test_settings():
    args = argparse.Namespace(task="pose", lr=5e-4, warmup_iters=500, schedule="pose")
    rates = [T.rate_at(step, args, 21000) for step in (0, 250, 500, 16999, 17000, 19999, 20000)]
    assert rates == pytest.approx([5e-7, 5e-4 * (1 - 0.5 * 0.999), 5e-4, 5e-4, 5e-5, 5e-5, 5e-6])
    args = T.parse_args(["--task", "pose", "--backbone", "clustr_s", "--data", "x"])
    T.settle(args)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay, args.img_size, args.drop_path) == (210, 512, 5e-4, 0.01, 256, 0)
    assert args.keypoints == 133 and args.boxes is None and not args.frozen_bn
    model = T.build_model("pose", "linglo_b0", 17)
    groups = T.decay_groups(model, 0.01, norms=True)
    assert len(groups[0]["params"]) == len(list(model.parameters())) and groups[1]["params"] == []


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("change, message", [
    ({"keypoints": [0] * 48}, "keypoints must be 51 finite numbers"), ({"lefthand_kpts": None}, "lefthand_kpts must be 63"),
    ({"face_kpts": [math.nan] * 204}, "face_kpts must be 204"), ({"foot_kpts": ["1"] * 18}, "foot_kpts must be 18"),
    ({"foot_kpts": [[1, 2, 3]] * 6}, "foot_kpts"), ({"bbox": [1, 2]}, "bbox"), ({"image_id": 999}, "unknown image id 999")])
def test_broken_annotations_name_file_and_id(broken, change, message):
    file, data = broken / "annotations" / "coco_wholebody_val_v1.0.json", annotations(broken, "val")
    data["annotations"][1].update(change)
    file.write_text(json.dumps(data))
    text = fails([*FAST, "--data", str(broken)], message)
    assert f"{file}: annotation {data['annotations'][1]['id']}: " in text


@pytest.mark.parametrize("change, message", [
    ({"keypoints": [0] * 48}, "image 1: keypoints must be 51"), ({"foot_kpts": [0.0]}, "image 1: foot_kpts must be 18"),
    ({"image_id": 77}, "unknown image id 77"), ({"category_id": 3}, "unknown category id 3"), ({"score": math.inf}, "not finite"),
    ({"face_score": "high"}, "results.json"), ({"score": None}, "no COCO results file")])
def test_broken_results_are_refused(scenes, tmp_path, change, message):
    result = result_of(np.ones((133, 3)), image_id=1, category_id=1, score=0.5) | change
    (tmp_path / "results.json").write_text(json.dumps([result]))
    fails(["--task", "pose", "--data", str(scenes), "--score", str(tmp_path / "results.json")], message)


def test_bad_input_is_named(scenes, broken, tmp_path):
    fails([*FAST, "--data", str(scenes), "--img-size", "192"], "--img-size 192: pose needs a multiple of 128")
    fails([*FAST, "--data", str(scenes), "--keypoints", "18"], "--keypoints: invalid choice")
    fails(["--task", "retinanet", "--data", str(scenes), "--boxes", "x"], "--boxes is for pose, not for retinanet")
    fails([*FAST, "--data", str(scenes), "--boxes", str(tmp_path / "x")], "cannot read .*x")
    fails([*FAST, "--data", str(tmp_path / "nowhere")], "cannot read .*coco_wholebody_train_v1.0.json")
    data = annotations(broken, "train")
    file = broken / "annotations" / "coco_wholebody_train_v1.0.json"
    file.write_text(json.dumps(data | dict(annotations=[dict(a, area=0) for a in data["annotations"]])))
    assert str(file) in fails([*FAST, "--data", str(broken)], "holds no person with keypoints")
    shutil.rmtree(broken / "train2017")
    fails([*FAST, "--data", str(broken)], "train2017 is not a folder")
