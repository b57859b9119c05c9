"""Pose in train_dense.py: data, crops, heat maps, decoding, metrics against slow loops, errors.

The order is the chapter's, and so are the letters. The loops are written from the definitions:
COCO's, and mmpose's of the whole body.
"""
import argparse
import json
import math
import random
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import train_dense

CPU = torch.device("cpu")
KEYPOINTS_FILE = "coco_wholebody_{}_v1.0.json"

# COCO-WholeBody's sigmas: body, feet, face, a hand
SHEET = """
.026 .025 .025 .035 .035 .079 .079 .072 .072 .062 .062 .107 .107 .087 .087 .089 .089
.068 .066 .066 .092 .094 .094
.042 .043 .044 .043 .040 .035 .031 .025 .020 .023 .029 .032 .037 .038 .043 .041 .045
.013 .012 .011 .011 .012 .012 .011 .011 .013 .015 .009 .007 .007 .007 .012 .009 .008
.016 .010 .017 .011 .009 .011 .009 .007 .013 .008 .011 .012 .010 .034 .008 .008 .009
.008 .008 .007 .010 .008 .009 .009 .009 .007 .007 .008 .011 .008 .008 .008 .010 .008
.029 .022 .035 .037 .047 .026 .025 .024 .035 .018 .024 .022 .026 .017 .021 .021 .032
.020 .019 .022 .031"""

# Keypoints that change places in a mirror: body, feet, face
PAIRS = """
1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16
17-20 18-21 19-22
23-39 24-38 25-37 26-36 27-35 28-34 29-33 30-32
40-49 41-48 42-47 43-46 44-45 54-58 55-57
59-68 60-67 61-66 62-65 63-70 64-69
71-77 72-76 73-75 78-82 79-81 83-87 84-86 88-90"""


def mirror_partners():
    """{keypoint: its partner} for every keypoint that has one."""
    pairs = [tuple(map(int, pair.split("-"))) for pair in PAIRS.split()]
    pairs += [(i, i + 21) for i in range(91, 112)]
    partner = {}
    for a, b in pairs:
        partner[a] = b
        partner[b] = a
    return partner


PARTNER = mirror_partners()


class Scripted(random.Random):
    """A generator that returns given values: one list per method, popping an empty one fails."""

    def __init__(self, values):
        super().__init__()
        self.values = {name: list(numbers) for name, numbers in values.items()}

    def random(self):
        return self.values["random"].pop(0)

    def uniform(self, _low, _high):
        return self.values["uniform"].pop(0)

    def gauss(self, _mean, _deviation):
        return self.values["gauss"].pop(0)


def fields_of(points):
    """Points (133, 3) as the fields of an annotation or a result."""
    fields = {}
    for part, field in train_dense.FIELDS.items():
        fields[field] = points[train_dense.PARTS[part]].ravel().tolist()
    return fields


def points_of(entry):
    """The inverse: (133, 3)."""
    names = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
    parts = [np.reshape(entry[name], (-1, 3)) for name in names]
    return np.concatenate(parts).astype(float)


def person(rng, **changes):
    """A whole-body annotation with all points labelled."""
    xy = rng.uniform(5, 50, (133, 2)).round(1)
    entry = fields_of(np.concatenate([xy, np.full((133, 1), 2)], 1))
    entry |= {"image_id": 7, "category_id": 1, "bbox": [5, 5, 46, 46], "area": 900}
    entry |= {"iscrowd": 0, "num_keypoints": 17}
    return entry | changes


def detection(image_id, bbox, score=0.5, category_id=1):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def write_people(folder, people, image_ids=(7, 5), name=KEYPOINTS_FILE):
    """Both splits: images of 100 x 60 noise; `people` are annotations without ids."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    image = {"width": 100, "height": 60, "file_name": "a.png"}
    data = {
        "images": [image | {"id": image_id} for image_id in image_ids],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": [entry | {"id": i} for i, entry in enumerate(people)],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{split}2017" / "a.png")
        (folder / "annotations" / name.format(split)).write_text(json.dumps(data))
    return folder


@pytest.fixture
def three_people(tmp_path):
    """A folder with three persons in image 7."""
    rng = np.random.default_rng(0)
    return write_people(tmp_path, [person(rng) for _ in range(3)])


def make_task(**changes):
    args = {"task": "pose", "backbone": "linglo_b0", "img_size": 128, "jitter": 1.0}
    args |= {"keypoints": 133, "boxes": None, "amp": "none", "threshold": 0.3}
    return train_dense.Pose(argparse.Namespace(**args | changes), CPU)


# ------------------------------------------------------------------------------------- the body
def test_mirror_order_swaps_the_pairs():
    expected = [PARTNER.get(i, i) for i in range(133)]
    assert train_dense.MIRROR_ORDER.tolist() == expected


def test_mirror_order_is_an_involution():
    order = train_dense.MIRROR_ORDER
    assert order[order].tolist() == list(range(133))
    assert sorted(order[:17]) == list(range(17))


def test_mirror_order_leaves_the_middle_of_the_face():
    middle = [i for i in range(133) if train_dense.MIRROR_ORDER[i] == i]
    assert middle == [0, 31, 50, 51, 52, 53, 56, 74, 80, 85, 89]


def test_sigmas_are_those_of_the_sheet():
    sigmas = [float(sigma) for sigma in SHEET.split()]
    assert len(sigmas) == 112
    assert train_dense.SIGMAS.tolist() == sigmas + sigmas[-21:]


def test_lines_are_symmetric_and_reach_all_but_the_face():
    edges = []
    for line in train_dense.LINES:
        edges += [frozenset(edge) for edge in zip(line, line[1:])]
    mirrored = {frozenset(train_dense.MIRROR_ORDER[list(edge)].tolist()) for edge in edges}
    assert len(edges) == len(set(edges)) == 16 + 6 + 2 * 20
    assert mirrored == set(edges)
    without_face = set(range(133)) - set(range(23, 91))
    assert set().union(*edges) == without_face


# ----------------------------------------------------------------------------------------- data
@pytest.fixture
def mixed_people(tmp_path):
    """A folder with usable persons, clipped boxes, and entries to skip; and the usable ones."""
    rng = np.random.default_rng(0)
    usable = [
        person(rng),
        person(rng, bbox=[-10, 50, 30, 30]),
        person(rng, bbox=[90, -5, 30, 8.5]),
    ]
    skipped = [
        person(rng, iscrowd=1),
        person(rng, area=0),
        person(rng, bbox=[99.5, 5, 20, 20]),
        person(rng, bbox=[5, 5, 1, 9]),
        person(rng, keypoints=[0] * 51),
        person(rng, category_id=3),
    ]
    return write_people(tmp_path, [usable[0], *skipped, *usable[1:]]), usable


# The right edge is x + w - 1, at most W - 1.
CLIPPED_BOXES = [
    [5, 5, 45, 45, 1],
    [0, 50, 19, 9, 1],
    [90, 0, 9, 2.5, 1],
]


def test_training_samples_are_the_usable_persons(mixed_people):
    folder, usable = mixed_people
    source = train_dense.Persons(folder, "train", 133)
    expected = np.array([points_of(entry) for entry in usable], np.float32)
    assert len(source) == 3
    assert source.boxes.tolist() == CLIPPED_BOXES
    assert np.array_equal(source.points, expected)
    assert source.annotations == {}


def test_persons_that_are_left_out_are_counted(mixed_people):
    """A crowd and an object of another category are no persons to count."""
    folder, _ = mixed_people
    counts = {"without area inside the image": 3, "without body keypoints": 1}
    assert train_dense.Persons(folder, "train", 133).left_out == counts


def test_a_training_sample_is_one_person(mixed_people):
    folder, usable = mixed_people
    source = train_dense.Persons(folder, "train", 133)
    image, boxes, points = source.read(2)
    assert image.size == (100, 60)
    assert boxes.tolist() == CLIPPED_BOXES[2:]
    assert np.array_equal(points, points_of(usable[2])[None].astype(np.float32))
    assert source.name(0).endswith("train2017/a.png")


def test_a_validation_sample_is_an_image(mixed_people):
    folder, _ = mixed_people
    source = train_dense.Persons(folder, "val", 133)
    assert source.ids == [5, 7]
    assert len(source) == 2
    assert len(source.read(0)[1]) == 0
    assert source.read(1)[1].tolist() == CLIPPED_BOXES


def test_validation_keeps_all_annotations_of_persons(mixed_people):
    folder, _ = mixed_people
    annotations = train_dense.Persons(folder, "val", 133).annotations
    assert [len(annotations[image_id]) for image_id in (5, 7)] == [0, 8]


def test_classes_are_the_keypoints(three_people):
    whole = train_dense.Persons(three_people, "train", 133).classes
    assert len(whole) == len(set(whole)) == 133
    assert (whole[16], whole[17], whole[132]) == ("body 16", "foot 0", "righthand 20")
    assert train_dense.Persons(three_people, "train", 17).classes == whole[:17]


def test_seventeen_keypoints_are_the_first_of_the_whole_body(three_people):
    source = train_dense.Persons(three_people, "train", 17)
    whole = train_dense.Persons(three_people, "train", 133)
    assert np.array_equal(source.points, whole.points[:, :17])


def test_seventeen_keypoints_prefer_their_own_file(tmp_path):
    rng = np.random.default_rng(0)
    body = {name: v for name, v in person(rng).items() if "_kpts" not in name}
    write_people(tmp_path, [person(rng)])
    write_people(tmp_path, [body, body], name="person_keypoints_{}2017.json")
    assert len(train_dense.Persons(tmp_path, "val", 17).boxes) == 2
    assert len(train_dense.Persons(tmp_path, "val", 133).boxes) == 1


DETECTIONS = [
    detection(3, [1, 2, 30, 40]),
    detection(1, [0, 0, 9, 9], score=0.1),
    detection(3, [1, 2, 3, 4], category_id=4),
    detection(3, [5, 5, 0, 9]),
    detection(999, [1, 2, 3, 4]),
    detection(3, [-4, 2, 6, 8], score=0),
]


@pytest.fixture
def detections(tmp_path):
    """A folder with images 1 to 5, one of them with a person, and a file of detections."""
    people = [person(np.random.default_rng(0), image_id=2)]
    write_people(tmp_path, people, image_ids=range(1, 6))
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(DETECTIONS))
    return tmp_path, file


def test_detections_replace_the_persons_of_validation(detections):
    """Those of other categories, without extent, or of other images are left out."""
    source = train_dense.Persons(detections[0], "val", 133, detections[1])
    assert [len(source.read(i)[1]) for i in range(5)] == [1, 0, 2, 0, 0]
    _, boxes, points = source.read(2)
    assert boxes.tolist() == [[1, 2, 30, 40, 0.5], [-4, 2, 6, 8, 0]]
    assert points.shape == (2, 133, 3)
    assert not points.any()


def test_detections_need_no_annotated_person(detections):
    folder, file = detections
    write_people(folder, [], image_ids=range(1, 6))
    assert len(train_dense.Persons(folder, "val", 133, file).boxes) == 3


def test_detections_do_not_change_training(detections):
    folder, file = detections
    source = train_dense.Persons(folder, "train", 133, file)
    assert np.array_equal(source.boxes, train_dense.Persons(folder, "train", 133).boxes)


@pytest.mark.parametrize("change, message", [
    ({"bbox": [1, 2, 3]}, "image 3: bbox"),
    ({"score": math.nan}, "image 3: score nan"),
    ({"bbox": None, "segmentation": []}, "image 3: expected a bbox"),
    ({"score": None}, "image 3: score None"),
    ({"image_id": [3]}, "image_id .3."),
    ({"image_id": 99}, "no person in an image"),
    ({"category_id": None}, "image 3: category_id None"),
])
def test_broken_detections_are_refused(detections, change, message):
    folder, file = detections
    file.write_text(json.dumps([DETECTIONS[0] | change]))
    with pytest.raises(train_dense.InputError, match=message):
        train_dense.Persons(folder, "val", 133, file)


@pytest.mark.parametrize("change, message", [
    ({"keypoints": [0] * 48}, "keypoints must be 51 numbers x, y, v"),
    ({"keypoints": [10 ** 30] * 51}, "keypoints must be 51 numbers x, y, v of at most 1048576"),
    ({"lefthand_kpts": None}, "lefthand_kpts must be 63"),
    ({"face_kpts": [math.nan] * 204}, "face_kpts must be 204"),
    ({"foot_kpts": ["1"] * 18}, "foot_kpts must be 18"),
    ({"foot_kpts": [[1, 2, 3]] * 6}, "foot_kpts"),
    ({"bbox": [1, 2]}, "bbox"),
    ({"image_id": 999}, "unknown image id 999"),
])
@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_annotations_name_file_and_id(tmp_path, split, change, message):
    rng = np.random.default_rng(0)
    write_people(tmp_path, [person(rng), person(rng, **change)])
    file = tmp_path / "annotations" / KEYPOINTS_FILE.format(split)
    with pytest.raises(train_dense.InputError, match=message) as error:
        train_dense.Persons(tmp_path, split, 133)
    assert f"{file}: annotation 1: " in str(error.value)


def test_a_file_without_usable_person_is_named(tmp_path):
    write_people(tmp_path, [person(np.random.default_rng(0), area=0)])
    with pytest.raises(train_dense.InputError, match="holds no person with keypoints") as error:
        train_dense.Persons(tmp_path, "train", 133)
    assert KEYPOINTS_FILE.format("train") in str(error.value)


def test_a_missing_image_folder_is_named(three_people):
    (three_people / "train2017" / "a.png").unlink()
    (three_people / "train2017").rmdir()
    with pytest.raises(train_dense.InputError, match="train2017 is not a folder"):
        train_dense.Persons(three_people, "train", 133)


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(train_dense.InputError, match="cannot read .*wholebody_train_v1.0.json"):
        train_dense.Persons(tmp_path / "nowhere", "train", 133)


# ---------------------------------------------------------------------------------------- crops
def test_frames_have_the_aspect_of_a_crop():
    boxes = np.array([[10., 20., 30., 20.], [0., 0., 10., 100.]])
    centre, frame = train_dense.crop_frame(boxes, 1.25)
    assert centre.tolist() == [[25, 30], [5, 50]]
    assert np.allclose(frame, [[37.5, 50], [93.75, 125]])


def centre_of_mass(pixels):
    rows, columns = np.mgrid[:pixels.shape[0], :pixels.shape[1]]
    mass = pixels.astype(float)
    x = (columns * mass).sum() / mass.sum()
    y = (rows * mass).sum() / mass.sum()
    return np.array([x, y])


@pytest.mark.parametrize("angle", [0.0, 0.3, -1.2])
@pytest.mark.parametrize("size", [(30, 40), (120, 160)])
def test_crop_and_points_move_alike(angle, size):
    """A smooth dot's centre of mass moves to where its keypoint does, by the definition:

    scale * rotation(-angle) (p - centre) + middle of the crop.
    """
    x, y = np.meshgrid(np.arange(120), np.arange(90))
    distance = (x - 61) ** 2 + (y - 43) ** 2
    dot = 255 * np.exp(-distance / (2 * 3 ** 2))
    image = Image.fromarray(dot.astype(np.uint8)).convert("RGB")
    centre = np.array([57.3, 46.1])
    frame = np.array(size, float)
    keypoint = np.array([[61., 43., 2.]])
    crop, points = train_dense.crop_person(image, keypoint, centre, frame, angle, 128)
    scale = 96 / size[0]
    dx, dy = keypoint[0, :2] - centre
    expected_x = scale * (math.cos(angle) * dx + math.sin(angle) * dy) + 48
    expected_y = scale * (math.cos(angle) * dy - math.sin(angle) * dx) + 64
    assert crop.shape == (128, 96, 3) and crop.dtype == np.uint8
    assert np.allclose(points, [[expected_x, expected_y, 2]])
    error = centre_of_mass(crop[..., 0]) - points[0, :2]
    assert np.abs(error).max() < 0.1 * scale                    # a tenth of a pixel of the image


def test_outside_of_the_image_a_crop_is_black():
    image = Image.new("RGB", (40, 40), "white")
    centre = np.array([0., 20.])
    size = np.array([48., 64.])
    crop, _ = train_dense.crop_person(image, np.zeros((0, 3)), centre, size, 0.0, 128)
    assert (crop[30:100, :46] == 0).all()
    assert (crop[30:100, 50:] == 255).all()


def slow_mirror(points, centre, width):
    swapped = [None] * len(points)
    for i, (x, y, v) in enumerate(points):
        swapped[PARTNER.get(i, i)] = (width - 1 - x, y, v)
    return swapped, [width - 1 - centre[0], centre[1]]


def slow_half_body(points, gauss):
    """Centre and size of the frame of half the labelled points, or None."""
    upper = [p for p in points[:11] if p[2] > 0]
    lower = [p for p in points[11:] if p[2] > 0]
    if next(gauss) < 0.5 and len(upper) > 2:
        chosen = upper
    else:
        chosen = lower if len(lower) > 2 else upper
    if len(chosen) < 2:
        return None
    xs, ys, _ = zip(*chosen)
    w = max(xs) - min(xs)
    h = max(ys) - min(ys)
    centre = [sum(xs) / len(xs), sum(ys) / len(ys)]
    return centre, [max(w, 0.75 * h) * 1.5, max(h, w / 0.75) * 1.5]


def slow_augment(points, box, width, values, height):
    """TCFormer's pipeline, point by point: the points in the crop of an image of `width`."""
    draw = iter(values["random"])
    uniform = iter(values["uniform"])
    gauss = iter(values["gauss"])
    x, y, w, h = box
    centre = [x + w / 2, y + h / 2]
    size = [max(w, 0.75 * h) * 1.25, max(h, w / 0.75) * 1.25]
    points = [tuple(point) for point in points]
    if next(draw) < 0.3:
        centre = [c + next(uniform) * 0.16 * s for c, s in zip(centre, size)]
    if next(draw) < 0.5:
        points, centre = slow_mirror(points, centre, width)
    labelled = sum(v > 0 for _, _, v in points)
    if labelled > 8 and next(draw) < 0.3:
        centre, size = slow_half_body(points, gauss) or (centre, size)
    scale = min(max(1 + 0.5 * next(gauss), 0.5), 1.5)
    angle = 0.0
    if next(draw) < 0.6:
        angle = math.radians(max(-80, min(80, 40 * next(gauss))))
    factor = 0.75 * height / (scale * size[0])
    moved = []
    for x, y, v in points:
        dx = x - centre[0]
        dy = y - centre[1]
        turned_x = math.cos(angle) * dx + math.sin(angle) * dy
        turned_y = math.cos(angle) * dy - math.sin(angle) * dx
        crop_x = factor * turned_x + 0.75 * height / 2
        crop_y = factor * turned_y + height / 2
        moved.append((crop_x, crop_y, v))
    return moved


def sparse_points(rng, keypoints, trial):
    """Random points, of which few, or only those of one half, may be labelled."""
    xy = rng.uniform(0, 60, (keypoints, 2))
    points = np.concatenate([xy, rng.integers(0, 3, (keypoints, 1))], 1)
    count = (0, 1, 4, 9, 12, keypoints)[trial % 6]
    labelled = rng.choice(keypoints, count, replace=False)
    points[np.setdiff1d(np.arange(keypoints), labelled)] = 0
    if trial % 5 == 0:
        points[11:] = 0
    elif trial % 5 == 1:
        points[2:11] = 0
    return points.astype(np.float32)


@pytest.mark.parametrize("keypoints", [133, 17])
def test_augmentation_matches_the_loop(keypoints):
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (100, 60))
    cases = set()
    for trial in range(150):
        points = sparse_points(rng, keypoints, trial)
        box = [5., 8., *rng.uniform(10, 60, 2)]
        values = {
            "random": rng.random(4),
            "uniform": rng.uniform(-1, 1, 2),
            "gauss": rng.normal(0, 1.5, 3),
        }
        raw = image, np.array([[*box, 1]]), points[None]
        crop, fast = train_dense.augment_person(raw, Scripted(values), height=128, jitter=1.0)
        slow = slow_augment(points, box, 100, values, 128)
        assert crop.shape == (128, 96, 3) and fast.dtype == np.float32
        assert np.allclose(fast, slow, atol=2e-3, rtol=1e-5)
        enough = int((fast[:, 2] > 0).sum()) > 8
        cases.add((enough, *(values["random"][:2] < (0.3, 0.5)).tolist()))
    assert len(cases) == 8


def test_augmentation_depends_on_the_generator_only(three_people):
    raw = train_dense.Persons(three_people, "train", 133).read(0)
    first, again, other = (
        train_dense.augment_person(raw, random.Random(seed), height=128, jitter=1.0)
        for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_without_jitter_only_mirroring_is_random(three_people):
    source = train_dense.Persons(three_people, "train", 133)
    image, boxes, points = source.read(0)
    centre, size = train_dense.crop_frame(boxes[0], 1.25)
    plain, moved = train_dense.crop_person(image, points[0], centre, size, 0.0, 128)
    samples = []
    for seed in range(12):
        rng = random.Random(seed)
        samples.append(train_dense.augment_person(source.read(0), rng, height=128, jitter=0.0))
    unmirrored = [points for crop, points in samples if np.array_equal(crop, plain)]
    assert len({crop.tobytes() for crop, _ in samples}) == 2
    assert 0 < len(unmirrored) < 12
    assert all(np.allclose(points, moved, atol=1e-4) for points in unmirrored)


# ---------------------------------------------------------------------------------------- model
def build_model(backbone, keypoints, **overrides):
    backbone = train_dense.Backbone(backbone, (3,), frozen_bn=False, **overrides)
    return train_dense.SimpleBaseline(backbone, keypoints)


@pytest.mark.parametrize("backbone", ["clustr_s", "secvit_s", "stvit_s", "linglo_b2"])
def test_head_parameters(backbone):
    with torch.device("meta"):
        model = build_model(backbone, 133)
    total = sum(p.numel() for p in model.parameters())
    assert total - sum(p.numel() for p in model.backbone.parameters()) == 4230021


def test_head_starts_small():
    model = build_model("linglo_b0", 17)
    for weight in (*(deconv.weight for deconv, *_ in model.deconvs), model.classifier.weight):
        assert weight.std().item() == pytest.approx(0.001, rel=0.05)
        assert abs(weight.mean().item()) < 1e-4
    assert not model.classifier.bias.any()


def test_train_mode_returns_the_loss(device):
    model = build_model("linglo_b0", 17, drop_path_rate=0.0).to(device)
    images = torch.randn(2, 3, 128, 96, device=device)
    points = 96 * torch.rand(2, 17, 3, device=device)
    losses = model(images, points)
    heat_maps = model.classifier(model.deconvs(model.backbone(images)[0]))
    assert list(losses) == ["loss_heatmap"]
    targets, weights = train_dense.gaussian_maps(points, (32, 24))
    expected = ((heat_maps * weights[..., None, None] - targets) ** 2).mean()
    assert_close(losses["loss_heatmap"], expected)


def test_eval_mode_returns_heat_maps(device):
    model = build_model("linglo_b0", 133, drop_path_rate=0.0).to(device).eval()
    heat_maps = model(torch.randn(2, 3, 128, 96, device=device))
    assert heat_maps.shape == (2, 133, 32, 24)


def test_every_parameter_learns(device):
    model = build_model("linglo_b0", 133, drop_path_rate=0.0).to(device)
    points = 96 * torch.rand(2, 133, 3, device=device)
    model(torch.randn(2, 3, 128, 96, device=device), points)["loss_heatmap"].backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


# ----------------------------------------------------------------------------------------- loss
def slow_maps(points, h, w):
    """One person's targets and weights, pixel by pixel; points in pixels of the map."""
    maps = np.zeros((len(points), h, w))
    weights = []
    for k, (x, y, v) in enumerate(points):
        mx = int(x + 0.5)
        my = int(y + 0.5)
        overlaps_x = mx + 7 >= 0 and mx - 6 < w         # mmpose's window is one pixel off
        overlaps_y = my + 7 >= 0 and my - 6 < h
        weights.append(float(v > 0 and overlaps_x and overlaps_y))
        for row, column in product(range(h), range(w)):
            if weights[-1] and abs(row - my) <= 6 and abs(column - mx) <= 6:
                distance = (row - my) ** 2 + (column - mx) ** 2
                maps[k, row, column] = math.exp(-distance / (2 * 2 ** 2))
    return maps, weights


BORDER_POINTS = [  # x, y in a map of 20 x 16 pixels
    (-0.7, 5),
    (-1.2, 5),
    (-6.6, 5),
    (-7, 5),
    (25.4, 5),
    (25.6, 5),      # outside at the right
    (3, 21.6),      # outside at the bottom
    (3, -7.4),
    (-7.6, 5),      # outside at the left, and counts
    (3, -8.5),
]
BORDER_WEIGHTS = [1, 1, 1, 1, 1, 0, 0, 1, 1, 0]


@pytest.fixture
def targets():
    """Points (3, 40, 3) in pixels of the map, float64, and the loop's maps and weights."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(-12, 36, (3, 40, 2))
    points = np.concatenate([xy, rng.choice([0, 0.008, 1, 2], (3, 40, 1))], 2)
    points[0, :10, :2] = BORDER_POINTS
    points[0, :10, 2] = 1
    maps, weights = zip(*(slow_maps(person, 16, 20) for person in points))
    in_crop = torch.tensor(points) * torch.tensor([4, 4, 1])    # stride 4
    return in_crop, torch.tensor(np.stack(maps)), torch.tensor(weights, dtype=torch.float64)


def test_targets_match_loops(device, targets):
    points, slow, slow_weights = targets
    maps, weights = train_dense.gaussian_maps(points.to(device), (16, 20))
    assert slow_weights[0, :10].tolist() == BORDER_WEIGHTS
    assert weights.tolist() == slow_weights.tolist()
    assert 20 < weights.sum() < 100
    assert maps.amax() == 1
    assert_close(maps.cpu(), slow)


def heatmap_loss(heat_maps, points):
    """The loss of given heat maps: a model whose layers change nothing."""
    backbone = torch.nn.Identity()
    backbone.channels = [1]
    model = train_dense.SimpleBaseline(backbone, heat_maps.shape[1])
    model.deconvs = torch.nn.Identity()
    model.classifier = torch.nn.Identity()
    return model([heat_maps], points)["loss_heatmap"]


def test_loss_and_gradient_match_loops(device, targets):
    points, maps, weights = targets
    predicted = torch.randn(3, 40, 16, 20, dtype=torch.float64, requires_grad=True)
    slow = 0
    for k in range(40):                                 # mean over keypoints, batch and pixels
        for b in range(3):
            error = weights[b, k] * (predicted[b, k] - maps[b, k])
            slow = slow + (error ** 2).mean() / (3 * 40)
    fast = heatmap_loss(predicted.to(device), points.to(device))
    slow_gradient, = torch.autograd.grad(slow, predicted)
    fast_gradient, = torch.autograd.grad(fast, predicted)
    assert_close(fast.cpu().double(), slow, rtol=1e-5, atol=0)
    assert_close(fast_gradient, slow_gradient, rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------------------------ inference
def slow_peak(values):
    h, w = values.shape
    y, x = np.unravel_index(values.argmax(), values.shape)
    best = values[y, x]
    if best <= 0:
        return -1, -1, best
    if not (1 < x < w - 1 and 1 < y < h - 1):
        return x, y, best
    slope_x = values[y, x + 1] - values[y, x - 1]
    slope_y = values[y + 1, x] - values[y - 1, x]
    return x + 0.25 * np.sign(slope_x), y + 0.25 * np.sign(slope_y), best


def test_peaks_match_loops(device):
    """Maps are small, so that many peaks are at the border; rounding makes neighbours equal."""
    maps = torch.randn(2, 300, 5, 6).double().round(decimals=1)
    maps[0, :3] = torch.tensor([-1., 0., -2.])[:, None, None]
    expected = np.zeros((2, 300, 3))
    for b, k in product(range(2), range(300)):
        expected[b, k] = slow_peak(maps[b, k].numpy())
    assert_close(train_dense.peaks(maps.to(device)).cpu().double(), torch.tensor(expected))


def test_peaks_of_targets_are_the_points():
    """Only the rounding of the target is lost: a symmetric peak does not move."""
    xy = torch.rand(2, 133, 2) * torch.tensor([17., 25.]) + 3       # in pixels of the map
    points = torch.cat([4 * xy, torch.ones(2, 133, 1)], -1)
    found = train_dense.peaks(train_dense.gaussian_maps(points, (32, 24))[0])
    assert_close(found[..., :2], (xy + 0.5).floor())
    assert (found[..., 2] == 1).all()


class DotModel(torch.nn.Module):
    """Answers with one map per grey level of `levels`: bright where the crop has that level.

    A model that sees a mirrored crop names the points of a pair the other way round. So every
    second call, which gets the mirrored crops, swaps them.
    """

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        self.inputs = []

    def forward(self, images):
        self.inputs.append(images)
        red = images[:, 0] * 0.229 + 0.485                      # (B, H, W), 0 to 1
        maps = [(-((red - level) * 40) ** 2).exp() for level in self.levels]
        maps = torch.stack(maps, 1)                             # (B, K, H, W)
        if len(self.inputs) % 2 == 0:
            maps = maps[:, train_dense.MIRROR_ORDER[:17]]
        # Pixel (i, j) of the map is centred on (4 i, 4 j).
        return torch.nn.functional.avg_pool2d(maps, 5, stride=4, padding=2)


@pytest.mark.parametrize("box", [[20., 30., 60., 80., 0.5], [10., 25., 100., 70., 0.5]])
def test_poses_return_to_the_pixels_of_the_image(box):
    pixels = np.zeros((120, 130), np.uint8)
    true = np.zeros((17, 2))
    for i in range(17):
        x = 30 + 11 * (i % 4)
        y = 40 + 12 * (i // 4)
        true[i] = x, y
        pixels[y - 3:y + 4, x - 3:x + 4] = 40 + 12 * i
    image = Image.fromarray(pixels).convert("RGB")
    model = DotModel([(40 + 12 * i) / 255 for i in range(17)])
    task = make_task(img_size=256, keypoints=17)
    points, scores = task.predict(model, image, np.array([box]))
    map_pixel = 1.25 * max(box[3], box[2] / 0.75) / 64
    assert points.shape == (1, 17, 3)
    assert np.abs(points[0, :, :2] - true).max() < 2 * map_pixel
    confidence = points[0, :, 2]
    assert scores[0] == pytest.approx(0.5 * confidence[confidence > 0.2].mean())
    assert_close(model.inputs[1], model.inputs[0].flip(3))


def slow_mirrored_mean(maps, mirrored):
    """Mirrored maps (K, h, w): pairs swapped, mirrored back, moved right by one, averaged."""
    mean = np.zeros(maps.shape, np.float32)
    for k, x in product(range(17), range(24)):
        partner = PARTNER.get(k, k)
        column = 23 - max(x - 1, 0)                             # column 0 stays
        total = maps[k, :, x] + mirrored[partner, :, column]
        mean[k, :, x] = total / 2
    return mean


def slow_pose(maps, mirrored, box):
    """One person: points (K, 3) and score, by hand."""
    x, y, w, h, score = box
    frame_w = 1.25 * max(w, 0.75 * h)
    frame_h = 1.25 * max(h, w / 0.75)
    points = []
    for heat_map in slow_mirrored_mean(maps, mirrored):
        px, py, confidence = slow_peak(heat_map)
        left = x + w / 2 - frame_w / 2
        top = y + h / 2 - frame_h / 2
        image_x = px * frame_w / 24 + left
        image_y = py * frame_h / 32 + top
        points.append((image_x, image_y, confidence))
    sure = [confidence for _, _, confidence in points if confidence > 0.2]
    return points, score * sum(sure) / len(sure)


def test_poses_match_the_loop():
    """Random maps of 70 persons, which take three batches, first the crops, then mirrored."""
    answers = torch.randn(2, 70, 17, 32, 24, dtype=torch.float64)
    queue = []
    for crops, mirrored in zip(answers[0].split(32), answers[1].split(32)):
        queue += [crops, mirrored]
    sizes = []

    def model(images):
        sizes.append(len(images))
        return queue[len(sizes) - 1]

    rng = np.random.default_rng(0)
    box_scores = np.linspace(1, 0.1, 70)
    boxes = np.column_stack([rng.uniform(10, 100, (70, 4)), box_scores])
    slow = [slow_pose(*maps, box) for *maps, box in zip(*answers.numpy(), boxes)]
    slow.sort(key=lambda pose: -pose[1])
    points, scores = make_task(keypoints=17).predict(model, Image.new("RGB", (90, 80)), boxes)
    assert sizes == [32, 32, 32, 32, 6, 6]
    assert np.allclose(scores, [score for _, score in slow])
    assert np.allclose(points, [points for points, _ in slow])


def test_nobody_has_no_pose():
    image = Image.new("RGB", (90, 80))
    points, scores = make_task().predict(None, image, np.zeros((0, 5)))
    assert points.shape == (0, 133, 3)
    assert scores.shape == (0,)


def flat_model(images):
    return torch.full((len(images), 17, 32, 24), 0.1)


def test_a_pose_without_confident_point_scores_zero():
    task = make_task(keypoints=17)
    box = np.array([[0, 0, 9, 9, 1.]])
    points, scores = task.predict(flat_model, Image.new("RGB", (90, 80)), box)
    assert points.shape == (1, 17, 3)
    assert scores.tolist() == [0]


def test_without_boxes_the_image_is_one_person():
    task = make_task(keypoints=17)
    image = Image.new("RGB", (90, 80))
    points, _ = task.predict(flat_model, image)
    expected, _ = task.predict(flat_model, image, np.array([[0, 0, 90, 80, 1.]]))
    assert np.array_equal(points, expected)


def loop_oks(a, b, area, sigmas):
    total = 0
    for (xa, ya, _), (xb, yb, _), sigma in zip(a, b, sigmas):
        distance = (xa - xb) ** 2 + (ya - yb) ** 2
        total += math.exp(-distance / (8 * sigma ** 2 * area))
    return total / len(sigmas)


def greedy_nms(poses, scores, areas):
    rest = sorted(range(len(poses)), key=lambda i: (-scores[i], i))
    keep = []
    while rest:
        best, *others = rest
        keep.append(best)
        rest = []
        for i in others:
            area = (areas[best] + areas[i]) / 2
            if loop_oks(poses[best], poses[i], area, train_dense.SIGMAS) <= 0.9:
                rest.append(i)
    return keep


def test_oks_nms_matches_the_greedy_loop():
    rng = np.random.default_rng(0)
    dropped = 0
    for _ in range(10):
        people = rng.uniform(0, 50, (4, 1, 133, 3))
        poses = people + rng.normal(0, 0.3, (4, 6, 133, 3))     # six of each person
        poses = poses.reshape(24, 133, 3)
        scores = rng.integers(0, 6, 24) / 5
        areas = rng.uniform(200, 3000, 24)
        slow = greedy_nms(poses, scores, areas)
        fast = train_dense.oks_nms(poses, scores, areas, train_dense.SIGMAS)
        assert fast.tolist() == slow
        dropped += 24 - len(slow)
    assert 20 < dropped < 200


# -------------------------------------------------------------------------------------- overlay
def overlay_mask(people):
    """Pixels (400, 400) that an overlay of people (P, K, 3) changes in a black image."""
    return plot(people).any(-1)


def plot(people):
    """Pixels (400, 400, 3) of an overlay of people on a black image of 100 x 100 pixels."""
    image = Image.new("RGB", (100, 100))
    figure = make_task().overlay(image, (people, np.ones(len(people))), [])
    assert figure.size == (400, 400) and not np.array(image).any()
    return np.array(figure)


@pytest.fixture
def two_people():
    points = np.zeros((2, 133, 3))
    points[..., :2] = np.random.default_rng(0).uniform(10, 90, (2, 133, 2))
    return points


def test_unsure_points_are_not_shown(two_people):
    two_people[0, :, 2] = 0.29
    two_people[1, :, 2] = -1
    assert not overlay_mask(two_people).any()


@pytest.mark.parametrize("part", [
    slice(5, 8), slice(15, 23), train_dense.PARTS["face"], train_dense.PARTS["lefthand"],
])
def test_confident_points_are_shown(two_people, part):
    two_people[0, part, 2] = 0.3
    assert overlay_mask(two_people[:1]).any()


def test_each_person_has_one_colour(two_people):
    two_people[..., 2] = 1
    two_people[..., train_dense.PARTS["face"], 2] = 0       # its dots are white
    colours = np.unique(plot(two_people).reshape(-1, 3), axis=0).tolist()
    assert colours == sorted([[0, 0, 0], *train_dense.palette(2).tolist()])


def test_seventeen_points_have_fewer_lines(two_people):
    two_people[..., 2] = 1
    body = overlay_mask(two_people[:, :17])
    whole = overlay_mask(two_people)
    assert body.any() and whole.sum() > body.sum()


# -------------------------------------------------------------------------------------- metrics
def test_oks_by_hand():
    """A point of the nose and one of a hip, each off by one: exp(-1 / (8 sigma^2 area)) each."""
    truth = np.zeros((1, 17, 3))
    truth[0, 0] = 10, 10, 2
    truth[0, 11] = 20, 30, 1
    found = np.zeros((1, 17, 3))
    found[0, 0, :2] = 11, 10
    found[0, 11, :2] = 20, 29
    box = np.array([[0, 0, 40, 40.]])
    value = train_dense.oks(found, truth, box, np.array([400.]), train_dense.SIGMAS[:17])
    nose = math.exp(-1 / (8 * 0.026 ** 2 * 400))
    hip = math.exp(-1 / (8 * 0.107 ** 2 * 400))
    assert value[0, 0] == pytest.approx((nose + hip) / 2)
    assert value[0, 0] == pytest.approx((0.63000 + 0.97307) / 2, abs=1e-4)


RUNS = {  # of the evaluation of the whole body: names of the field and of the score
    "body": ("keypoints", "score"),
    "foot": ("foot_kpts", "foot_score"),
    "face": ("face_kpts", "face_score"),
    "lefthand": ("lefthand_kpts", "lefthand_score"),
    "righthand": ("righthand_kpts", "righthand_score"),
    "whole": (None, "wholebody_score"),
}


def run_points(entry, field):
    return entry[field] if field else points_of(entry).ravel().tolist()


def run_annotation(annotation, field):
    points = run_points(annotation, field)
    num_keypoints = sum(v > 0 for v in points[2::3])
    return annotation | {"keypoints": points, "num_keypoints": num_keypoints}


def run_results(results, field, score):
    found = []
    for result in results:
        points = run_points(result, field)
        x = result["keypoints"][::3]
        y = result["keypoints"][1::3]
        if any(v > 0 for v in points[2::3]):
            entry = {"image_id": result["image_id"], "category_id": 1, "keypoints": points}
            entry["score"] = result.get(score, result["score"])
            entry["area"] = (max(x) - min(x)) * (max(y) - min(y))
            found.append(entry)
    return found


def keypoint_metrics(image_ids, annotations, results, sigmas):
    """COCO's metrics of keypoints, image by image."""
    matches = []
    for i in image_ids:
        gt = [a for a in annotations if a["image_id"] == i]
        dt = [r for r in results if r["image_id"] == i]
        matches.append(train_dense.match_image({"id": i}, gt, dt, "keypoints", sigmas))
    return train_dense.accumulate(matches, "keypoints", [1])


def separate_runs(truth, results, image_ids):
    """Six runs of the keypoint evaluation, each on its own files, written out."""
    metrics = {}
    for run, (field, score) in RUNS.items():
        sigmas = train_dense.SIGMAS[train_dense.PARTS[run]] if field else train_dense.SIGMAS
        metrics[run] = keypoint_metrics(
            image_ids,
            [run_annotation(annotation, field) for annotation in truth],
            run_results(results, field, score),
            sigmas,
        )
    return metrics


def random_annotation(rng, image_id, annotation_id):
    """A person some of whose parts are not labelled."""
    is_crowd = int(rng.random() < 0.1)
    area = float(rng.uniform(500, 12000))
    entry = person(rng, image_id=image_id, id=annotation_id, iscrowd=is_crowd, area=area)
    points = points_of(entry)
    for part in train_dense.PARTS.values():
        if rng.random() < 0.3:
            points[part] = 0
    return entry | fields_of(points)


def random_result(rng, annotation):
    """Noisy points, one part without confidence, some parts with their own score."""
    noise = rng.normal(0, rng.choice([0.2, 1, 4]), (133, 2))
    doubt = rng.uniform(-2, -1, (133, 1))
    points = points_of(annotation) + np.concatenate([noise, doubt], 1)
    unsure = str(rng.choice(list(train_dense.PARTS)))
    points[train_dense.PARTS[unsure], 2] = 0
    result = fields_of(points) | {"image_id": annotation["image_id"], "category_id": 1}
    result["score"] = float(rng.random())
    for run in ("foot", "face", "lefthand", "righthand", "wholebody"):
        if rng.random() < 0.5:
            result[f"{run}_score"] = float(rng.random())
    return result


def random_people(rng):
    """Three annotations for each of the images 1 to 6, and up to two results of each person."""
    truth = []
    results = []
    for image_id, _ in product(range(1, 7), range(3)):
        annotation = random_annotation(rng, image_id, len(truth))
        truth.append(annotation)
        for _ in range(rng.integers(0, 3)):
            results.append(random_result(rng, annotation))
    return truth, results


def score(folder, results, keypoints):
    """Metrics of a results file, as --score computes them."""
    file = folder / "results.json"
    file.write_text(json.dumps(results))
    task = make_task(keypoints=keypoints)
    return task.score_results(task.open_split(folder, "val"), file)


@pytest.mark.parametrize("seed", range(3))
def test_whole_body_metrics_are_six_separate_runs(tmp_path, seed):
    truth, results = random_people(np.random.default_rng(seed))
    write_people(tmp_path, truth, image_ids=range(6, 0, -1))
    runs = separate_runs(truth, results, range(1, 7))
    expected = {"AP": runs["whole"]["AP"], "AR": runs["whole"]["AR"]}
    for run, name in product(list(RUNS)[:5], ("AP", "AR")):
        expected[f"{run}_{name}"] = runs[run][name]
    for name in ("AP", "AR"):
        hands = runs["lefthand"][name], runs["righthand"][name]
        expected[f"hand_{name}"] = sum(hands) / 2
    metrics = score(tmp_path, results, 133)
    assert 0.05 < min(expected.values()) and max(expected.values()) < 0.95
    assert metrics == expected
    assert list(metrics) == list(expected)


def plain_result(result):
    names = ("image_id", "category_id", "score", "keypoints")
    return {name: result[name] for name in names}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_seventeen_keypoints_are_those_of_coco(tmp_path, seed):
    truth, results = random_people(np.random.default_rng(seed))
    write_people(tmp_path, truth, image_ids=range(6, 0, -1))
    expected = keypoint_metrics(
        range(1, 7),
        [run_annotation(annotation, "keypoints") for annotation in truth],
        [plain_result(result) for result in results],
        train_dense.SIGMAS[:17],
    )
    assert score(tmp_path, results, 17) == expected


def test_metrics_by_hand():
    """The first of two results is wrong everywhere, and the surest; its feet are not confident.

    The second person has no labelled feet. So feet: one person to find, whose only detection is
    dropped, and the other's feet are nowhere near. All others: one false, then one true of two,
    that is recall 0.5 (51 of 101 points) at precision 0.5.
    """
    rng = np.random.default_rng(0)
    first = person(rng, id=1)
    second = person(rng, id=2, foot_kpts=[0] * 18)
    wrong = points_of(first) + (500, 0, 0)
    wrong[17:23, 2] = 0
    results = [({"score": 0.9}, wrong), ({"score": 0.5}, points_of(second))]
    matches = train_dense.match_persons(7, [first, second], results, 133)
    metrics = make_task().summarize(None, [matches])
    for name in ("AP", "body_AP", "hand_AP"):
        assert metrics[name] == pytest.approx(51 / 101 / 2)
    assert metrics["face_AR"] == 0.5
    assert (metrics["foot_AP"], metrics["foot_AR"]) == (0, 0)


def test_metrics_without_results():
    """Of a person without labelled feet: nothing to find is -1, nothing found is 0."""
    truth = [person(np.random.default_rng(0), id=2, foot_kpts=[0] * 18)]
    metrics = make_task().summarize(None, [train_dense.match_persons(7, truth, [], 133)])
    assert (metrics["foot_AP"], metrics["face_AP"]) == (-1, 0)


def test_the_truth_scores_one(three_people):
    source = train_dense.Persons(three_people, "val", 133)
    results = [entry | {"score": 0.9} for entry in source.annotations[7]]
    whole = score(three_people, results, 133)
    body = score(three_people, results, 17)
    assert set(whole.values()) == {1.0}
    assert list(body) == "AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl".split()
    assert body["AP"] == body["AR"] == 1


@pytest.mark.parametrize("change, message", [
    ({"keypoints": [0] * 48}, "image 7: keypoints must be 51"),
    ({"foot_kpts": [0.0]}, "image 7: foot_kpts must be 18"),
    ({"image_id": 77}, "unknown image id 77"),
    ({"category_id": 3}, "unknown category id 3"),
    ({"score": math.inf}, "image 7: score inf, expected a finite number"),
    ({"face_score": "high"}, "results.json"),
    ({"score": None}, "image 7: score None"),
])
def test_broken_results_are_refused(three_people, change, message):
    result = fields_of(np.ones((133, 3))) | {"image_id": 7, "category_id": 1, "score": 0.5}
    with pytest.raises(train_dense.InputError, match=message):
        score(three_people, [result | change], 133)


# ----------------------------------------------------------------------------------------- task
def test_collate_stacks_crops_and_points(three_people):
    task = make_task()
    source = task.open_split(three_people, "train")
    samples = [task.augment(source.read(i), random.Random(i)) for i in range(3)]
    crops, points = task.collate(samples)
    assert crops.shape == (3, 128, 96, 3) and crops.dtype == torch.uint8
    assert points.shape == (3, 133, 3) and points.dtype == torch.float32
    assert np.array_equal(crops[1].numpy(), samples[1][0])
    assert np.array_equal(points[1].numpy(), samples[1][1])


def test_losses_are_those_of_the_normalised_crops():
    model = build_model("linglo_b0", 133, drop_path_rate=0.0)
    crops = torch.randint(0, 256, (2, 128, 96, 3), dtype=torch.uint8)
    points = 96 * torch.rand(2, 133, 3)
    losses = make_task().losses(model, (crops, points))
    expected = model(train_dense.normalize(crops), points)
    assert losses.keys() == expected.keys()
    assert torch.equal(losses["loss_heatmap"], expected["loss_heatmap"])


@pytest.mark.parametrize("keypoints", [133, 17])
def test_perfect_poses_are_recorded_as_such(three_people, monkeypatch, keypoints):
    task = make_task(keypoints=keypoints)
    source = task.open_split(three_people, "val")

    def perfect(model, image, boxes):
        assert model == "model"
        assert isinstance(image, Image.Image)
        assert np.array_equal(boxes, source.boxes[:len(boxes)])
        return source.points[:len(boxes)].astype(float), boxes[:, 4]

    monkeypatch.setattr(task, "predict", perfect)
    records = []
    for i in range(len(source)):
        sample = task.test_sample(source, i, None)
        prediction = task.infer("model", sample)
        records.append(task.record(source, sample, prediction))
    metrics = task.summarize(source, records)
    assert metrics["AP"] == metrics["AR"] == 1


@pytest.mark.parametrize("file, count", [
    ("val/000000000003.jpg", 2), ("7/x4_1.png", 1), ("2.png", 0),
])
def test_boxes_of_a_file_are_found_by_its_last_number(file, count):
    person_boxes = [(3, (1, 2, 3, 4, 1)), (1, (5, 6, 7, 8, 1)), (3, (0, 0, 9, 9, 0.5))]
    assert make_task().boxes_in(file, person_boxes).shape == (count, 5)


def test_a_file_without_number_has_no_boxes():
    with pytest.raises(train_dense.InputError, match="photo.jpg: .* must be its id"):
        make_task().boxes_in("1/photo.jpg", [])


def write_person(path, image_id):
    result = {"image_id": image_id, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    path.write_text(json.dumps([result]))
    return str(path)


def test_boxes_of_files_come_from_a_results_file(tmp_path):
    task = make_task(boxes=write_person(tmp_path / "boxes.json", image_id=2))
    boxes = task.boxes_of(["1.jpg", "2.jpg"])
    assert boxes["1.jpg"].shape == (0, 5)
    assert boxes["2.jpg"].tolist() == [[1, 2, 3, 4, 0.5]]


def test_boxes_of_other_images_are_an_error(tmp_path):
    task = make_task(boxes=write_person(tmp_path / "boxes.json", image_id=3))
    with pytest.raises(train_dense.InputError, match="boxes.json holds no person in these images"):
        task.boxes_of(["1.jpg", "2.jpg"])
