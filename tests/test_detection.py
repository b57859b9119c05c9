"""RetinaNet's chapter of train_dense.py against slow loops that follow mmdetection box by box."""
import argparse
import json
import math
import random
import re
from itertools import product

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch.testing import assert_close

import train_dense


def make_task(task_class, **changes):
    args = dict(task="retinanet", backbone="secvit_t", schedule="1x", img_size=64, amp="none")
    args["threshold"] = 0.3
    return task_class(argparse.Namespace(**(args | changes)), torch.device("cpu"))


def tiny_retinanet(classes):
    backbone = train_dense.Backbone("secvit_t", (1, 2, 3), frozen_bn=False, **TINY)
    return train_dense.RetinaNet(backbone, classes)


# ---------------------------------------------------------------------------------------- boxes
def loop_iou(a, b):
    left, top, right, bottom = a
    x1, y1, x2, y2 = b
    w = min(right, x2) - max(left, x1)
    h = min(bottom, y2) - max(top, y1)
    intersection = max(0.0, w) * max(0.0, h)
    area_a = (right - left) * (bottom - top)
    area_b = (x2 - x1) * (y2 - y1)
    union = area_a + area_b - intersection
    return intersection / union if union > 0 else 0.0


def random_boxes(*shape, side=100, grid=None):
    """Boxes (*shape, 4) inside side x side; with `grid` corners are multiples of it, for ties."""
    corners = torch.rand(*shape, 2, 2, dtype=torch.float64) * side
    if grid:
        corners = (corners / grid).round() * grid
    end = corners.amax(-2) + (grid or 1)
    return torch.cat([corners.amin(-2), end], -1)


def test_box_iou_matches_loops(device):
    a = random_boxes(2, 5, grid=10)
    b = random_boxes(2, 7, grid=10)
    expected = torch.zeros(2, 5, 7, dtype=torch.float64)
    for image, i, j in product(range(2), range(5), range(7)):
        box = a[image, i].tolist()
        other = b[image, j].tolist()
        expected[image, i, j] = loop_iou(box, other)
    iou = train_dense.box_iou(a.to(device), b.to(device))
    assert_close(iou.cpu(), expected)
    assert_close(train_dense.box_iou(a[0], b[0]), expected[0])


def test_iou_of_empty_boxes_is_0():
    empty = torch.zeros(1, 4)
    assert train_dense.box_iou(empty, empty).item() == 0


def test_encode_by_hand():
    anchors = torch.tensor([[10., 20., 30., 60.]])
    boxes = torch.tensor([[15., 10., 55., 20.]])
    expected = torch.tensor([[15 / 20, -25 / 40, math.log(2), math.log(1 / 4)]])
    assert_close(train_dense.encode(anchors, boxes), expected)


def test_decode_inverts_encode():
    anchors = random_boxes(50)
    boxes = random_boxes(50)
    deltas = train_dense.encode(anchors, boxes)
    assert_close(train_dense.decode(anchors, deltas), boxes)


def test_decoded_sizes_are_limited():
    anchor = torch.tensor([0., 0., 2., 2.])
    deltas = torch.tensor([0., 0., 100., -100.])
    x1, y1, x2, y2 = train_dense.decode(anchor, deltas).tolist()
    assert x2 - x1 == pytest.approx(2 * 1000 / 16, rel=1e-6)
    assert y2 - y1 == pytest.approx(2 * 16 / 1000, abs=1e-5)


@pytest.mark.parametrize("size, expected", [
    ((20, 40), [[0, 0, 40, 20], [30, 5, 40, 20]]),
    (torch.tensor([20, 40]), [[0, 0, 40, 20], [30, 5, 40, 20]]),
    (torch.tensor([[20, 40], [15, 80]]), [[0, 0, 40, 20], [30, 5, 80, 15]]),    # one per box
])
def test_clip_boxes(size, expected):
    boxes = torch.tensor([
        [-5., -5., 50., 50.],
        [30., 5., 90., 20.],
    ])
    assert train_dense.clip_boxes(boxes, size).tolist() == expected


# ------------------------------------------------------------------------- assignment and anchors
def loop_assign(boxes, labels, anchors, valid, positive, negative, min_pos_iou=None):
    """mmdetection's rule for one image, anchor by anchor, then object by object.

    Anchors that are not valid take no part. min_pos_iou: None for no low-quality matches.
    Returns: of each anchor the number of its object, "negative" or "unused".
    """
    count = int((labels >= 0).sum())
    objects = boxes[:count].tolist()
    ious = {}
    for a, anchor in enumerate(anchors.tolist()):
        if valid[a]:
            ious[a] = [loop_iou(anchor, box) for box in objects]
    result = ["unused"] * len(anchors)
    for a, row in ious.items():
        best = max(row, default=-1.)
        if best < negative:
            result[a] = "negative"
        elif best >= positive:
            result[a] = row.index(best)
    if min_pos_iou is None:
        return result
    for g in range(count):
        best = max((row[g] for row in ious.values()), default=-1.)
        for a, row in ious.items():
            if row[g] == best and best >= min_pos_iou:
                result[a] = g
    return result


def as_assignment(rows, device):
    """What `loop_assign` returns for each image -> train_dense.Assignment."""
    matched = np.array(rows, object)
    negative = matched == "negative"
    positive = ~negative & (matched != "unused")
    object_index = np.where(positive, matched, 0).astype(int)
    fields = (object_index, positive, negative)
    return train_dense.Assignment(*(torch.from_numpy(x).to(device) for x in fields))


@pytest.mark.parametrize("anchors_per_image", [False, True])
@pytest.mark.parametrize("positive, negative, min_pos_iou", [
    (0.5, 0.4, 0.0),
    (0.7, 0.3, 0.3),
    (0.5, 0.5, 0.5),
    (0.6, 0.6, None),
])
def test_assignment_matches_loops(positive, negative, min_pos_iou, anchors_per_image, device):
    for trial in range(20):
        torch.manual_seed(trial)
        anchors = random_boxes(60, side=40, grid=10)
        boxes = random_boxes(3, 4, side=40, grid=10)
        labels = torch.tensor([
            [0, 1, 2, 0],
            [1, 2, -1, -1],
            [-1, -1, -1, -1],
        ])
        boxes = boxes * (labels >= 0)[..., None]
        valid = torch.rand(3, 60) < (0.1, 0.5, 1)[trial % 3]
        expected = []
        for b in range(3):
            rule = positive, negative, min_pos_iou
            expected.append(loop_assign(boxes[b], labels[b], anchors, valid[b], *rule))
        if anchors_per_image:
            anchors = anchors.expand(3, -1, -1)
        expected = as_assignment(expected, device)
        assigned = train_dense.assign(
            boxes.to(device), labels.to(device), anchors.to(device), valid.to(device),
            positive_iou=positive,
            negative_iou=negative,
            min_pos_iou=min_pos_iou or 0.0,
            match_low_quality=min_pos_iou is not None,
        )
        assert torch.equal(assigned.positive, expected.positive)
        assert torch.equal(assigned.negative, expected.negative)
        given = expected.positive
        assert torch.equal(assigned.object_index[given], expected.object_index[given])
        assert ((assigned.object_index >= 0) & (assigned.object_index < 4)).all()


def test_base_anchors_by_hand():
    base = train_dense.base_anchors((8, 16), [4, 4 * 2 ** (1 / 3)])
    assert base.shape == (2, 6, 4)
    square = base[0, 2]                                             # stride 8, ratio 1, scale 4
    assert square.tolist() == [-16, -16, 16, 16]
    x = 32 / math.sqrt(0.5) / 2                                     # ratio 0.5: twice as wide
    y = 32 * math.sqrt(0.5) / 2                                     # as high
    assert_close(base[0, 0], torch.tensor([-x, -y, x, y]))
    assert_close(base[1], 2 * base[0])


def test_anchors_are_ordered_by_level_row_and_column():
    base = train_dense.base_anchors((8, 16), [4, 4 * 2 ** (1 / 3)])
    anchors = train_dense.anchor_boxes(base, [(2, 3), (1, 1)], (8, 16))
    assert anchors.shape == ((6 + 1) * 6, 4)
    for row, column, a in product(range(2), range(3), range(6)):
        x = 8. * column
        y = 8. * row
        anchor = anchors[(row * 3 + column) * 6 + a]
        assert_close(anchor, base[0, a] + torch.tensor([x, y, x, y]))
    assert_close(anchors[-6:], base[1])


def loop_cells_inside(levels, strides, size, num_anchors):
    """Of one image: whether the cell begins inside of it, padded to a multiple of 32."""
    H = -(-size[0] // 32) * 32
    W = -(-size[1] // 32) * 32
    inside = []
    for (h, w), stride in zip(levels, strides):
        for row, column, _ in product(range(h), range(w), range(num_anchors)):
            inside.append(row * stride < H and column * stride < W)
    return inside


def test_cells_inside_match_loops(device):
    levels = [(12, 13), (6, 7)]
    strides = (8, 16)
    sizes = [[60, 40], [96, 104], [33, 64]]
    inside = train_dense.cells_inside(levels, strides, torch.tensor(sizes, device=device), 3)
    assert inside.tolist() == [loop_cells_inside(levels, strides, size, 3) for size in sizes]


# ------------------------------------------------------------------------ non-maximum suppression
def loop_nms(boxes, scores, threshold):
    """The greedy algorithm."""
    rest = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    kept = []
    while rest:
        best = rest[0]
        kept.append(best)
        rest = [i for i in rest[1:] if loop_iou(boxes[best], boxes[i]) <= threshold]
    return kept


def loop_multiclass_nms(candidates, classes, threshold=0.5):
    """Of (score, label, box): those left by NMS in each class, best first."""
    kept = []
    for label in range(classes):
        members = [candidate for candidate in candidates if candidate[1] == label]
        boxes = [box for _, _, box in members]
        scores = [score for score, _, _ in members]
        kept += [members[i] for i in loop_nms(boxes, scores, threshold)]
    return sorted(kept, key=lambda candidate: -candidate[0])


@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
def test_nms_matches_the_greedy_loop(threshold, block, device, monkeypatch):
    monkeypatch.setitem(train_dense.NMS_BLOCK, device.type, block)
    for trial in range(10):
        torch.manual_seed(trial)
        boxes = random_boxes(60, side=50, grid=5)
        scores = (10 * torch.rand(60, dtype=torch.float64)).round()
        expected = loop_nms(boxes.tolist(), scores.tolist(), threshold)
        for max_keep in (1, 5, 60):
            kept = train_dense.nms(boxes.to(device), scores.to(device), threshold, max_keep)
            assert kept.tolist() == expected[:max_keep]


def test_nms_of_a_long_chain(device):
    """Each box suppresses only the next one, so every other one stays: as many rounds as boxes."""
    left = torch.arange(40.)
    top = torch.zeros(40)
    boxes = torch.stack([left, top, left + 2, top + 1], 1)
    kept = train_dense.nms(boxes.to(device), -left.to(device), 0.3, 40)
    assert kept.tolist() == list(range(0, 40, 2))


def test_nms_of_nothing(device):
    boxes = torch.zeros(0, 4, device=device)
    assert train_dense.nms(boxes, torch.zeros(0, device=device), 0.5, 9).tolist() == []


def test_nms_by_class_matches_the_loop_of_each_class(device):
    boxes = random_boxes(80, side=40, grid=5)
    scores = torch.rand(80, dtype=torch.float64)
    labels = torch.randint(0, 3, (80,))
    expected = []
    for label in range(3):
        members = (labels == label).nonzero().flatten()
        kept = loop_nms(boxes[members].tolist(), scores[members].tolist(), 0.4)
        expected += members[kept].tolist()
    expected = sorted(expected, key=lambda i: -scores[i].item())
    kept = train_dense.nms_by_class(
        boxes.to(device), scores.to(device), labels.to(device), 0.4, len(boxes)
    )
    assert kept.tolist() == expected


@pytest.mark.parametrize("score_threshold, max_keep", [(0.05, 100), (0.2, 12), (0.9999, 100)])
@pytest.mark.parametrize("class_specific", [True, False])
def test_multiclass_nms_matches_loops(class_specific, score_threshold, max_keep, device):
    """Scores are a softmax with background, which is no detection however likely."""
    K = 3
    logits = 2 * torch.randn(50, K + 1, dtype=torch.float64)
    boxes = random_boxes(50, K if class_specific else 1, side=40, grid=5)
    candidates = []
    for row, row_boxes in zip(logits.tolist(), boxes.tolist()):
        total = sum(math.exp(logit) for logit in row)
        for label in range(K):
            score = math.exp(row[label]) / total
            if score > score_threshold:
                candidates.append((score, label, row_boxes[label if class_specific else 0]))
    kept = loop_multiclass_nms(candidates, K)
    assert score_threshold > 0.9 or len(kept) < len(candidates)
    assert score_threshold != 0.2 or len(kept) > max_keep
    kept = kept[:max_keep]
    scores = logits.softmax(1)[:, :-1].to(device)
    detections = train_dense.multiclass_nms(boxes.to(device), scores, score_threshold, max_keep)
    boxes, scores, labels = (x.cpu() for x in detections)
    assert labels.tolist() == [label for _, label, _ in kept]
    assert_close(scores, torch.tensor([score for score, _, _ in kept], dtype=torch.float64))
    expected = torch.tensor([box for _, _, box in kept], dtype=torch.float64)
    assert_close(boxes, expected.view(-1, 4))


def test_multiclass_nms_of_nothing(device):
    boxes = torch.zeros(0, 3, 4, device=device)
    scores = torch.zeros(0, 3, device=device)
    shapes = [x.shape for x in train_dense.multiclass_nms(boxes, scores)]
    assert shapes == [(0, 4), (0,), (0,)]


# ------------------------------------------------------------------------------------- losses
# -------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("H, W", [(64, 64), (70, 99)])
def test_retinanet_takes_any_size_and_trains_every_parameter(H, W, device):
    model = tiny_retinanet(5).to(device).train()
    boxes = torch.zeros(2, 2, 4, device=device)
    boxes[0, 0] = torch.tensor([5., 10., 60., 50.])
    boxes[0, 1] = torch.tensor([40., 30., 90., 64.])
    labels = torch.tensor([[3, 0], [-1, -1]], device=device)
    targets = {"boxes": boxes, "labels": labels}
    sizes = torch.tensor([[H, W], [60, 50]], device=device)
    losses = model(torch.randn(2, 3, H, W, device=device), sizes, targets)
    assert list(losses) == ["loss_cls", "loss_box"]
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_retinanet_detections_of_a_batch_are_those_of_its_images(device):
    model = tiny_retinanet(5).to(device).double().eval()    # so that no rounding decides the order
    torch.nn.init.normal_(model.classifier[-1].weight)
    torch.nn.init.zeros_(model.classifier[-1].bias)
    images = torch.randn(2, 3, 70, 99, dtype=torch.float64, device=device)
    sizes = torch.tensor([[70, 99], [70, 99]], device=device)
    with torch.no_grad():
        batch = model(images, sizes)
        first = model(images[:1], sizes[:1])
        second = model(images[1:], sizes[1:])
    for detections, expected in zip(batch, first + second):
        assert len(detections[0]) > 0
        for x, y in zip(detections, expected):
            assert_close(x, y)


def test_towers_are_laid_out_like_the_anchors():
    """The number of a tower's output for a cell and base anchor, as `anchor_boxes` orders them."""
    model = tiny_retinanet(2)
    fine = torch.randn(2, 256, 3, 4)
    coarse = torch.randn(2, 256, 2, 2)
    logits = model.run_tower(model.classifier, [fine, coarse], 2)
    assert logits.shape == (2, 9 * (12 + 4), 2)
    output = model.classifier(fine)                         # row 2, column 3, base anchor 5
    cell = 2 * 4 + 3
    assert_close(logits[1, cell * 9 + 5], output[1, 10:12, 2, 3])
    output = model.classifier(coarse)                       # row 1, column 0, base anchor 8
    cell = 3 * 4 + 1 * 2
    assert_close(logits[0, cell * 9 + 8], output[0, 16:18, 1, 0])


# ---------------------------------------------------------------------------------- inference
def test_best_anchors_match_loops(device):
    """Two levels; the second one has fewer anchors than are asked for."""
    strides = (8, 16)
    levels = [(3, 4), (2, 2)]
    counts = [36, 12]
    anchors = train_dense.anchor_boxes(train_dense.base_anchors(strides, [2]), levels, strides)
    scores = torch.randn(48)
    deltas = 0.3 * torch.randn(48, 4)
    expected = []
    for i, members in enumerate((range(36), range(36, 48))):
        best = sorted(members, key=lambda a: -scores[a].item())[:20]
        expected += [(a, i) for a in best]
    boxes, index, level = train_dense.best_anchors(
        scores.to(device), deltas.to(device), anchors.to(device), counts, (20, 30), per_level=20
    )
    assert list(zip(index.tolist(), level.tolist())) == expected
    for box, a in zip(boxes.cpu(), index.tolist()):
        decoded = train_dense.decode(anchors[a], deltas[a])
        assert_close(box, train_dense.clip_boxes(decoded, (20, 30)))


def test_retinanet_detections_match_loops(device, monkeypatch):
    """Candidates are the anchors of the best class scores; then NMS class by class."""
    model = tiny_retinanet(3).to(device).eval()
    count = 9 * (16 + 4 + 1 + 1 + 1)
    logits = torch.randn(1, count, 3)
    deltas = 0.3 * torch.randn(1, count, 4)
    levels = [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]
    anchors = train_dense.anchor_boxes(model.base.cpu(), levels, model.strides)
    candidates = []
    for a, label in product(range(count), range(3)):
        score = logits[0, a, label].sigmoid().item()
        box = train_dense.decode(anchors[a], deltas[0, a])
        box = train_dense.clip_boxes(box, (20, 30)).tolist()
        if score > 0.05:
            candidates.append((score, label, box))
    kept = loop_multiclass_nms(candidates, 3)[:100]

    def run_tower(tower, _maps, _dim):
        return (logits if tower is model.classifier else deltas).to(device)
    monkeypatch.setattr(model, "run_tower", run_tower)
    sizes = torch.tensor([[20, 30]], device=device)
    images = torch.zeros(1, 3, 32, 32, device=device)
    boxes, scores, labels = model(images, sizes)[0]
    assert labels.tolist() == [label for _, label, _ in kept]
    assert_close(scores.cpu(), torch.tensor([score for score, _, _ in kept]))
    assert_close(boxes.cpu(), torch.tensor([box for _, _, box in kept]))


def test_detections_are_in_the_images_pixels():
    """A model that finds one box, and an image that is resized and padded for it."""
    image = Image.new("RGB", (80, 50))
    assert train_dense.fit_size(image.size, 64 * 1333 / 800, 64) == (102, 64)

    def model(images, sizes):
        assert images.shape[2:] == (64, 128)                # padded to multiples of 32
        assert sizes.tolist() == [[64, 102]]
        boxes = torch.tensor([[24., 8., 56., 40.]])
        return [(boxes, torch.tensor([0.9]), torch.tensor([1]))]
    boxes, scores, labels = make_task(train_dense.Detection).predict(model, image)
    x = 80 / 102
    y = 50 / 64
    assert labels.tolist() == [1]
    assert scores == pytest.approx([0.9])
    assert np.allclose(boxes, [[24 * x, 8 * y, 56 * x, 40 * y]])


def test_retinanet_finds_the_anchor_that_its_logits_name(monkeypatch):
    """Row 3, column 5 of stride 8, ratio 1, scale 4: a square of 32 pixels around (40, 24)."""
    model = tiny_retinanet(2).eval()
    count = 9 * (128 + 32 + 8 + 2 + 1)
    cell = 3 * 16 + 5
    logits = torch.full((1, count, 2), -10.)
    logits[0, cell * 9 + 3, 1] = 10.

    def run_tower(tower, _maps, _dim):
        return logits if tower is model.classifier else torch.zeros(1, count, 4)
    monkeypatch.setattr(model, "run_tower", run_tower)
    sizes = torch.tensor([[64, 128]])
    boxes, scores, labels = model(torch.zeros(1, 3, 64, 128), sizes)[0]
    assert labels.tolist() == [1]
    assert scores[0] > 0.99
    assert boxes.tolist() == [[24, 8, 56, 40]]


@pytest.mark.parametrize("with_masks", [False, True])
def test_overlay_shows_what_reaches_the_threshold(with_masks):
    image = Image.new("RGB", (60, 40))
    boxes = np.array([
        [5., 12., 25., 30.],
        [35., 12., 55., 30.],
    ], np.float32)
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 15:28, 8:22] = True
    masks[1, 15:28, 38:52] = True
    scores = np.array([0.8, 0.2], np.float32)
    detections = boxes, scores, np.array([1, 0])
    if with_masks:
        detections = *detections, masks
    task = make_task(train_dense.Detection)
    overlay = np.array(task.overlay(image, detections, ["a", "b"]))
    assert overlay.shape == (6 * 40, 6 * 60, 3)             # enlarged to 320 pixels or more
    assert overlay[6 * 12, 6 * 18].any()                    # the first box's outline
    assert overlay[6 * 27, 6 * 15].any() == with_masks      # inside of it
    assert not overlay[:, 6 * 35:].any()
    assert not np.array(image).any()                        # the image itself is left alone


def test_instances_of_one_class_have_colours_of_their_own():
    """That of a mask is that of its box, blended with the black image."""
    boxes = np.array([[20., 20., 380., 180.], [20., 220., 380., 380.]], np.float32)
    masks = np.zeros((2, 400, 400), bool)
    masks[0, 30:170, 30:370] = True
    masks[1, 230:370, 30:370] = True
    detections = boxes, np.array([0.9, 0.8]), np.array([0, 0]), masks
    task = make_task(train_dense.Detection)
    overlay = np.array(task.overlay(Image.new("RGB", (400, 400)), detections, ["a"])).astype(int)
    for box, inside, colour in zip((180, 380), (100, 300), train_dense.palette(2)):
        assert (overlay[box, 200] == colour).all()
        assert np.abs(overlay[inside, 200] - colour / 2).max() <= 1


# ----------------------------------------------------------------------- files and augmentation
@pytest.fixture
def coco_folder(tmp_path):
    """Four images, and annotations of which COCO's readers keep only some for training."""
    image = dict(file_name="a.jpg", width=100, height=50)
    images = [
        dict(image, id=7),
        dict(image, id=5),
        dict(image, id=6, width=31),
        dict(image, id=9),
    ]
    annotation = dict(category_id=4, bbox=[90, 40, 20, 20], area=400, iscrowd=0)
    annotations = [
        dict(annotation, image_id=5),
        dict(annotation, image_id=5, category_id=2),
        dict(annotation, image_id=5, iscrowd=1),
        dict(annotation, image_id=5, ignore=1),
        dict(annotation, image_id=5, bbox=[100, 10, 5, 5]),
        dict(annotation, image_id=5, bbox=[1, 1, 0.5, 9]),
        dict(annotation, image_id=5, area=0),
        dict(annotation, image_id=6),
        dict(annotation, image_id=9, iscrowd=1),
    ]
    for i, entry in enumerate(annotations):
        entry["id"] = i
    categories = [dict(id=4, name="b"), dict(id=2, name="a")]
    data = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(data)
    pixels = Image.new("RGB", (100, 50), (9, 8, 7))
    pixels.save(tmp_path / "train2017" / "a.jpg")
    return tmp_path


def image_ids(source):
    return [source.entries[i]["image"]["id"] for i in range(len(source))]


def test_coco_trains_on_what_mmdetection_keeps(coco_folder):
    source = train_dense.Coco(coco_folder, "train")
    assert source.classes == ["a", "b"]
    assert image_ids(source) == [5, 9]
    image, boxes, labels = source.read(0)
    assert image.getpixel((3, 4)) == pytest.approx((9, 8, 7), abs=2)
    assert boxes.tolist() == [[90, 40, 110, 60]] * 2
    assert labels.tolist() == [1, 0]
    _, boxes, labels = source.read(1)
    assert boxes.shape == (0, 4) and labels.shape == (0,)


def test_coco_counts_the_objects_that_it_leaves_out(coco_folder):
    source = train_dense.Coco(coco_folder, "train")
    assert source.left_out == {"narrower than a pixel or without area": 2, "outside the image": 1}
    assert train_dense.Coco(coco_folder, "val").left_out == {}


@pytest.mark.parametrize("change, reason", [
    ({"iscrowd": 1}, "all are crowds"),
    ({"area": 0}, "narrower than a pixel or without area"),
    ({"bbox": [100, 0, 9, 9]}, "outside the image"),
])
def test_a_file_without_anything_to_train_on_is_refused(coco_folder, change, reason):
    path = coco_folder / "annotations" / "instances_train2017.json"
    data = json.loads(path.read_text())
    for entry in data["annotations"]:
        entry |= change
    path.write_text(json.dumps(data))
    with pytest.raises(train_dense.InputError, match=f"no object to train on: .*{reason}"):
        train_dense.Coco(coco_folder, "train")


@pytest.mark.parametrize("empty", [None, [], [[]]])
def test_objects_without_segmentation_only_lack_masks(coco_folder, empty):
    """Of nine objects two can be trained on, and one of these has a segmentation."""
    for split in ("train", "val"):
        path = coco_folder / "annotations" / f"instances_{split}2017.json"
        data = json.loads(path.read_text())
        for entry in data["annotations"]:
            entry["segmentation"] = empty
        data["annotations"][1]["segmentation"] = [[90, 40, 100, 40, 100, 50]]
        path.write_text(json.dumps(data))
    assert len(train_dense.Coco(coco_folder, "train").read(0)[1]) == 2
    source = train_dense.Coco(coco_folder, "train", masks=True)
    assert [len(values) for values in source.read(0)[1:]] == [1, 1, 1]
    assert source.left_out["without segmentation"] == 1
    source = train_dense.Coco(coco_folder, "val", masks=True)
    assert source.left_out == {"without segmentation, of the mask metrics": 8}
    annotations = source.annotations[5]
    assert [a["id"] for a in train_dense.annotations_for("segm", annotations)] == [1]
    assert train_dense.annotations_for("bbox", annotations) == annotations


def test_coco_evaluates_all_images(coco_folder):
    source = train_dense.Coco(coco_folder, "val")
    assert image_ids(source) == [5, 6, 7, 9]
    assert source.is_landscape.tolist() == [True, False, True, True]
    counts = {image_id: len(entries) for image_id, entries in source.annotations.items()}
    assert counts == {5: 7, 6: 1, 7: 0, 9: 1}


def test_coco_names_what_is_missing(coco_folder):
    path = coco_folder / "annotations" / "instances_train2017.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(data, annotations=[])))
    with pytest.raises(train_dense.InputError, match="holds no image with annotations"):
        train_dense.Coco(coco_folder, "train")
    (coco_folder / "val2017").rmdir()
    with pytest.raises(train_dense.InputError, match="val2017 is not a folder; expected DIR"):
        train_dense.Coco(coco_folder, "val")


def blue_image_with_red_box(size, box):
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), box)
    return image


def extent(mask):
    """The box around the pixels of a mask (H, W)."""
    y, x = mask.nonzero()
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_detection_augmentation_moves_boxes_with_the_image():
    image = blue_image_with_red_box((100, 60), (10, 20, 30, 50))
    boxes = np.array([
        [10, 20, 30, 50],
        [90, 0, 130, 90],
    ], np.float32)
    raw = image, boxes, np.array([3, 1])
    flips = set()
    for seed in range(8):
        rng = random.Random(seed)
        pixels, moved, labels = train_dense.augment_detection(
            raw, rng, size=120, multi_scale=False
        )
        assert pixels.shape == (120, 200, 3)
        assert labels.tolist() == [3, 1]
        red = pixels[..., 0] > 127
        assert np.abs(moved[0] - extent(red)).max() <= 1
        flipped = bool(moved[0, 0] > 100)
        clipped = [0, 0, 20, 120] if flipped else [180, 0, 200, 120]
        assert moved[1].tolist() == clipped
        flips.add(flipped)
    assert flips == {True, False}


@pytest.fixture(scope="module")
def multi_scale_samples():
    """40 samples of an image whose second object lies in a corner that a crop may lose."""
    image = blue_image_with_red_box((1000, 600), (100, 200, 300, 500))
    boxes = np.array([
        [100, 200, 300, 500],
        [980, 590, 1000, 600],
    ], np.float32)
    masks = np.zeros((2, 600, 1000), bool)
    masks[0, 200:500, 100:300] = True
    masks[1, 590:, 980:] = True
    raw = image, boxes, np.array([3, 1]), masks
    samples = []
    for seed in range(40):
        rng = random.Random(seed)
        samples.append(train_dense.augment_detection(raw, rng, size=200, multi_scale=True))
    return samples


def test_multi_scale_crops_move_boxes_and_masks_with_the_image(multi_scale_samples):
    for pixels, boxes, labels, masks in multi_scale_samples:
        assert masks.shape == (len(labels), *pixels.shape[:2])
        assert masks.dtype == bool
        assert len(boxes) == len(labels)
        for box, label, mask in zip(boxes, labels, masks):
            if mask.any():
                assert np.abs(box - extent(mask)).max() <= 1.5
            if label == 3:
                assert ((pixels[..., 0] > 127) == mask).mean() > 0.96


def test_multi_scale_crops_lose_objects(multi_scale_samples):
    kept = [labels.tolist() for _, _, labels, _ in multi_scale_samples]
    assert [3, 1] in kept and [3] in kept


def test_multi_scale_sizes(multi_scale_samples):
    sizes = [pixels.shape[:2] for pixels, *_ in multi_scale_samples]
    shorter = {min(size) for size in sizes}
    assert shorter <= set(range(120, 201))
    assert len(shorter) > 8
    assert max(max(size) for size in sizes) <= 334
    shapes = [round(w / h, 1) for h, w in sizes]
    assert 8 < shapes.count(1.7) < 32                       # half are not cropped, so keep 10 : 6
    assert len(set(shapes)) > 5


def test_augmentation_of_an_image_without_objects():
    image = Image.new("RGB", (1000, 600))
    no_boxes = np.zeros((0, 4), np.float32)
    no_labels = np.zeros(0, np.int64)
    raw = image, no_boxes, no_labels, np.zeros((0, 600, 1000), bool)
    for seed in range(4):
        rng = random.Random(seed)
        pixels, boxes, _, masks = train_dense.augment_detection(
            raw, rng, size=200, multi_scale=True
        )
        assert masks.shape == (0, *pixels.shape[:2])
        assert boxes.shape == (0, 4)


def test_slivers_left_by_clipping_are_dropped():
    boxes = np.array([
        [100 - 1e-6, 5, 120, 20],
        [10, 10, 30, 30],
    ], np.float32)
    raw = Image.new("RGB", (100, 60)), boxes, np.array([3, 1])
    for seed in range(4):
        rng = random.Random(seed)
        _, kept, labels = train_dense.augment_detection(raw, rng, size=64, multi_scale=False)
        assert labels.tolist() == [1]
        assert len(kept) == 1


def empty_sample(h, w):
    image = np.zeros((h, w, 3), np.uint8)
    return image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def test_batches_are_padded():
    boxes = np.array([
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ], np.float32)
    image = np.full((40, 25, 3), 8, np.uint8)
    samples = [empty_sample(20, 30), (image, boxes, np.array([4, 2]))]
    batch = make_task(train_dense.Detection).collate(samples)
    images, sizes, padded_boxes, padded_labels = batch
    assert images.shape == (2, 64, 32, 3)
    assert sizes.tolist() == [[20, 30], [40, 25]]
    assert padded_boxes[0].eq(0).all()
    assert padded_boxes[1].tolist() == boxes.tolist()
    assert padded_labels.tolist() == [[-1, -1], [4, 2]]


def test_batches_without_objects_keep_a_slot():
    task = make_task(train_dense.Detection)
    _, _, boxes, labels = task.collate([empty_sample(20, 30)] * 2)
    assert boxes.shape == (2, 1, 4)
    assert labels.tolist() == [[-1], [-1]]


# ------------------------------------------------------------------------------------- sampler
@pytest.fixture
def schedule():
    is_landscape = np.arange(23) % 3 > 0
    return dict(is_landscape=is_landscape, batch=8, micro=2, seed=0, repeats=1, first=0, last=20)


def test_groups_do_not_depend_on_the_number_of_processes(schedule):
    one = list(train_dense.GroupSampler(**schedule, rank=0, world=1))
    two = [list(train_dense.GroupSampler(**schedule, rank=rank, world=2)) for rank in range(2)]
    interleaved = []
    for pair in zip(*two, strict=True):
        interleaved += pair
    assert one == interleaved


def test_groups_have_one_orientation(schedule):
    is_landscape = schedule["is_landscape"]
    sampler = train_dense.GroupSampler(**schedule, rank=0, world=1)
    assert sampler.per_epoch == 24 // 8
    batches = list(sampler)
    assert len(batches) == 20 * 4
    for batch in batches:
        assert len(batch) == 2
        assert len({is_landscape[index] for _, index, _ in batch}) == 1


def test_groups_show_every_image_in_an_epoch(schedule):
    seen = set()
    for batch in train_dense.GroupSampler(**schedule, rank=0, world=1):
        seen |= {index for epoch, index, _ in batch if epoch == 0}
    assert seen == set(range(23))


def test_micro_batches_of_an_incomplete_step_come_last(schedule):
    """Seven micro-batches per orientation, four per step: two are left over."""
    schedule["is_landscape"] = np.arange(26) % 2 > 0
    sampler = train_dense.GroupSampler(**schedule, rank=0, world=1)
    order = sampler.order(0)[:, 0]
    assert sampler.per_epoch == 3
    assert len(order) == 28
    assert set(order.tolist()) == set(range(26))


# ------------------------------------------------------------------------------------- metrics
def fake_detector(boxes, labels, image):
    """A model that finds boxes (n, 4) of a PIL image at any size, with falling scores."""
    def model(_images, sizes):
        H, W = sizes[0]
        x_scale = W / image.width
        y_scale = H / image.height
        scale = torch.stack([x_scale, y_scale, x_scale, y_scale])
        return [(boxes * scale, torch.linspace(0.9, 0.5, len(boxes)), labels)]
    return model


@pytest.fixture
def two_objects(coco_folder):
    """A validation split of which one image has two objects, and the boxes of these."""
    source = train_dense.Coco(coco_folder, "val")
    objects = []
    for x, category in ((10, 4), (60, 2)):
        entry = dict(id=x, image_id=5, category_id=category, bbox=[x, 5, 30, 20])
        objects.append(dict(entry, area=600, iscrowd=0))
    source.annotations = {5: objects, 6: [], 7: [], 9: []}
    boxes = torch.tensor([
        [10., 5., 40., 25.],
        [60., 5., 90., 25.],
    ])
    return source, boxes


@pytest.mark.parametrize("labels, expected", [((1, 0), 1), ((0, 1), 0)])
def test_ap_of_perfect_boxes_depends_on_their_classes(two_objects, labels, expected):
    source, boxes = two_objects
    task = make_task(train_dense.Detection)
    image = Image.new("RGB", (100, 50))
    model = fake_detector(boxes, torch.tensor(labels), image)
    sample = 0, (image, None, None)
    record = task.record(source, sample, task.infer(model, sample))
    metrics = task.summarize(source, [record])
    assert list(metrics) == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    assert metrics["AP"] == pytest.approx(expected)


@pytest.mark.parametrize("masks", [{}, {"segmentation": [[0, 0, 5, 0, 5, 5]]}])
def test_boxes_of_results_files_are_scored(two_objects, tmp_path, masks):
    """Whether the results have masks, too, or not."""
    source, _ = two_objects
    results = [dict(entry, score=0.5, **masks) for entry in source.annotations[5]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    task = make_task(train_dense.Detection)
    metrics = task.score_results(source, tmp_path / "results.json")
    assert metrics["kind"] == "bbox"
    assert metrics["AP"] == pytest.approx(1)


def test_results_without_a_box_are_named(two_objects, tmp_path):
    source, _ = two_objects
    result = dict(image_id=5, category_id=4, score=0.5, segmentation=[[0, 0, 5, 0, 5, 5]])
    path = tmp_path / "results.json"
    path.write_text(json.dumps([dict(result, bbox=[1, 2, 3, 4]), result]))
    task = make_task(train_dense.Detection)
    message = re.escape(f"{path}: result 1, image 5: expected a bbox")
    with pytest.raises(train_dense.InputError, match=message):
        task.score_results(source, path)


def save_with_orientation(path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif.tobytes())


def test_an_image_is_turned_if_its_annotations_are_of_the_upright_one(tmp_path):
    save_with_orientation(tmp_path / "a.jpg", (96, 80), 6)
    image = train_dense.read_annotated_image(tmp_path / "a.jpg", 80, 96)
    assert image.size == (80, 96)


def test_an_image_stays_as_stored_if_its_annotations_are_of_the_stored_one(tmp_path):
    save_with_orientation(tmp_path / "a.jpg", (96, 80), 6)
    image = train_dense.read_annotated_image(tmp_path / "a.jpg", 96, 80)
    assert image.size == (96, 80)


def test_an_image_of_another_size_than_annotated_is_an_error(tmp_path):
    Image.new("RGB", (96, 80)).save(tmp_path / "a.jpg")
    message = "a.jpg is 96 x 80, its annotations are for 50 x 40"
    with pytest.raises(train_dense.InputError, match=message):
        train_dense.read_annotated_image(tmp_path / "a.jpg", 50, 40)
