"""Mask R-CNN's chapter of train_dense.py against slow loops that follow mmdetection 2.x."""
import argparse
import json
import math
import re
from functools import partial
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from test_detection import (
    as_assignment,
    fake_detector,
    loop_assign,
    loop_multiclass_nms,
    loop_nms,
    random_boxes,
)
from torch.testing import assert_close

import train_dense

STRIDES = (4, 8, 16, 32)
KINDS = {  # the three models, by the loss of their boxes
    "l1": dict(box_head="2fc"),
    "smooth_l1": dict(cascade=True, box_head="2fc"),
    "giou": dict(cascade=True, box_head="4conv1fc"),
}


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape):
    """Random float64 numbers that need a gradient."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def one_row(values, device):
    """Numbers as a float32 tensor of one row."""
    return torch.tensor([values], dtype=torch.float32, device=device)


def assert_same_gradients(fast, slow, variables):
    """Of two scalars; variables that do not matter have a gradient of 0."""
    fast_grads = torch.autograd.grad(fast, variables, retain_graph=True, materialize_grads=True)
    slow_grads = torch.autograd.grad(slow, variables, retain_graph=True, materialize_grads=True)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads):
        assert_close(fast_grad, slow_grad)


# ------------------------------------------------------------------------------------- RoIAlign
def loop_roi_align(maps, box, S, scale):
    """Aligned RoIAlign of one box: maps (C, H, W) -> (C, S, S).

    The loop computes each bin's weights of the pixels, the rest is one product.
    """
    C, H, W = maps.shape
    x1, y1, x2, y2 = (v * scale - 0.5 for v in box)
    bin_width = (x2 - x1) / S
    bin_height = (y2 - y1) / S
    columns = math.ceil(bin_width)
    rows = math.ceil(bin_height)
    weights = torch.zeros(S * S, H * W, dtype=maps.dtype)
    for p, q, i, j in product(range(S), range(S), range(rows), range(columns)):
        y = y1 + p * bin_height + (i + 0.5) * bin_height / rows
        x = x1 + q * bin_width + (j + 0.5) * bin_width / columns
        if not (-1 <= y <= H and -1 <= x <= W):
            continue
        y = min(max(y, 0.0), H - 1.0)
        x = min(max(x, 0.0), W - 1.0)
        top = int(y)
        left = int(x)
        for row, column in product((top, top + 1), (left, left + 1)):
            if row < H and column < W:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                pixel = row * W + column
                weights[p * S + q, pixel] += weight / (rows * columns)
    return (maps.flatten(1) @ weights.T).view(C, S, S)


def boxes_in_pixels(H, W, S):
    """Boxes in pixels of an H x W map.

    No sample lies just on -1 or on the side, where rounding would decide.
    """
    boxes = random_boxes(6, side=min(H, W)).tolist()
    return boxes + [
        [0, 0, W, H],
        [2, 1, 8, 5],
        [W - 2.2, H - 3.3, W, H],
        [1.25, 2.125, 1.25 + 2 * S, 2.125 + 3 * S],         # bins of exactly 2 x 3 pixels
        [3.3, 2.2, 3.31, 2.21],                             # tiny
        [-0.3, -0.2, -0.29, -0.19],
        [W - 0.01, H - 0.01, W, H],
        [-3.107, -2.342, 4.513, 3.731],                     # partly outside
        [W - 1.204, H - 0.708, W + 6.109, H + 4.309],
        [-1.117, -1.213, 0.309, 0.219],
        [-9.1, -9.2, -4.3, -4.4],                           # outside
        [W + 3.1, 1, W + 9.2, 5],
        [2, -7.7, 6, -3.1],
        [0.4, 3.1, W - 0.3, 3.4],                           # long
        [5.2, -8.113, 5.5, H + 9.307],
        [-40.313, -30.617, W + 50.109, H + 60.719],         # huge
    ]


def roi_align(features, rois, S, scale):
    """All RoIs on one level."""
    level = torch.zeros(len(rois), dtype=torch.long, device=rois.device)
    return train_dense.align_levels([features], level, rois, S, [scale])


@pytest.mark.parametrize("scale, S", [(1.0, 2), (0.25, 7), (0.5, 5), (0.125, 1)])
def test_roi_align_matches_loops(scale, S, device):
    features = normal(3, 2, 7, 10)
    boxes = doubles(boxes_in_pixels(7, 10, S)) / scale
    image = torch.randint(0, 3, (len(boxes), 1))
    slow = []
    for i, box in zip(image[:, 0], boxes.tolist()):
        pooled = loop_roi_align(features[i], box, S, scale)
        slow.append(pooled)
    slow = torch.stack(slow)
    rois = torch.cat([image, boxes], 1).to(device)
    fast = roi_align(features.to(device), rois, S, scale).cpu()
    assert_close(fast, slow)
    weight = torch.randn_like(slow)
    assert_same_gradients((fast * weight).sum(), (slow * weight).sum(), [features])


@pytest.mark.parametrize("roi", [[0., 4., 2., 16., 14.], [0., 1., 1., 23., 17.]])
def test_roi_align_by_hand(roi, device):
    """A constant stays, a ramp gives the centres of the bins; pixel i is at i + 1/2."""
    y = torch.arange(9.)[:, None].expand(9, 12)
    x = torch.arange(12.).expand(9, 12)
    maps = torch.stack([torch.full_like(x, 5), 2 * x + 3 * y + 1])[None]
    rois = torch.tensor([roi], device=device)               # pixels of the map are 2 x 2
    constant, ramp = roi_align(maps.to(device), rois, 3, 0.5)[0].cpu()
    assert_close(constant, torch.full((3, 3), 5.))
    centres = (torch.arange(3) + 0.5) / 3
    _, x1, y1, x2, y2 = roi
    u = (x1 + centres * (x2 - x1)) / 2 - 0.5
    v = (y1 + centres * (y2 - y1)) / 2 - 0.5
    assert_close(ramp, 2 * u + 3 * v[:, None] + 1)


@pytest.mark.parametrize("shift, expected", [
    (0, (1, 1, 2, 3, 3)),
    (-0.25, (0, 1, 1.75, 2.75, 3)),
    (0.25, (1, 1.25, 2.25, 3, 0)),
])
def test_roi_align_keeps_samples_up_to_one_pixel_outside(shift, expected, device):
    """One sample per bin, at -1, 0, 1, 2, 3 but for the shift; the map is 3 pixels wide."""
    maps = torch.tensor([1., 2., 3.], device=device).view(1, 1, 1, 3)
    rois = torch.tensor([[0, shift - 1., 0, shift + 4., 1]], device=device)
    pooled = roi_align(maps, rois, 5, 1.0)
    assert pooled[0, 0].tolist() == [list(expected)] * 5


def test_roi_align_of_nothing(device):
    features = torch.randn(2, 3, 5, 6, device=device)
    rois = torch.zeros(0, 5, device=device)
    assert roi_align(features, rois, 4, 0.25).shape == (0, 3, 4, 4)


def test_roi_align_of_flat_boxes_is_finite(device):
    features = torch.randn(2, 3, 5, 6, device=device)
    rois = torch.tensor([
        [0., 8., 8., 8., 8.],
        [1., 4., 4., 4., 16.],
        [1., 4., 4., 16., 4.],
    ])
    assert roi_align(features, rois.to(device), 4, 0.25).isfinite().all()


def loop_level(w, h):
    level = math.floor(math.log2(math.sqrt(w * h) / 56 + 1e-6))
    return min(max(level, 0), 3)


SIDES = [  # width, height, level; 1e-5 pixels are within the rule's 1e-6, 1e-3 are not
    (0.01, 0.01, 0),
    (3., 2., 0),
    (30., 70., 0),
    (112 - 1e-3, 112 - 1e-3, 0),
    (112 - 1e-5, 112 - 1e-5, 1),
    (112., 112., 1),
    (113., 113., 1),
    (56., 224., 1),
    (300., 90., 1),
    (224 - 1e-3, 224 - 1e-3, 1),
    (224 - 1e-5, 224 - 1e-5, 2),
    (224., 224., 2),
    (225., 225., 2),
    (896., 56., 2),
    (150., 800., 2),
    (448 - 1e-3, 448 - 1e-3, 2),
    (448 - 1e-5, 448 - 1e-5, 3),
    (448., 448., 3),
    (449., 449., 3),
    (1792., 112., 3),
    (1500., 900., 3),
]


def pyramid():
    sides = [(41, 61), (21, 31), (11, 16), (6, 8)]
    return [normal(2, 2, h, w) for h, w in sides]


def test_rois_are_pooled_from_the_level_of_their_size(device):
    maps = pyramid()
    rois = []
    slow = []
    for i, (w, h, level) in enumerate(SIDES):
        assert loop_level(w, h) == level
        x, y = (torch.randint(-20, 120, (2,)) + 0.375).tolist()     # see boxes_in_pixels
        box = [x, y, x + w, y + h]
        image = i % 2
        rois.append([image, *box])
        slow.append(loop_roi_align(maps[level][image], box, 3, 1 / STRIDES[level]))
    slow = torch.stack(slow)
    on_device = [x.to(device) for x in maps]
    fast = train_dense.pool_rois(on_device, doubles(rois).to(device), 3, STRIDES).cpu()
    assert_close(fast, slow)
    weight = torch.randn_like(slow)
    assert_same_gradients((fast * weight).sum(), (slow * weight).sum(), maps)
    last_roi = doubles(rois[-1:]).to(device)                # three levels without any RoI
    last = train_dense.pool_rois(on_device, last_roi, 3, STRIDES)
    assert_close(last.cpu(), slow[-1:])


def test_no_rois_are_pooled_to_nothing(device):
    maps = [x.to(device) for x in pyramid()]
    rois = torch.zeros(0, 5, dtype=torch.float64, device=device)
    assert train_dense.pool_rois(maps, rois, 3, STRIDES).shape == (0, 2, 3, 3)


# ---------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("side, dtype", [(3, torch.bool), (28, torch.uint8)])
def test_mask_targets_match_loops(side, dtype, device):
    """Boxes inside, partly outside, larger, smaller; means within 1e-4 of 1/2 do not count."""
    noise = torch.randn(1, 3, 6, 7)
    blobs = F.interpolate(noise, size=(45, 61), mode="bilinear")[0] > 0
    pixels = torch.rand(1, 45, 61) < 0.5
    masks = torch.cat([blobs, pixels]).to(dtype)
    boxes = torch.cat([random_boxes(8, side=44).float(), torch.tensor([
        [-8.3, -5.1, 30.7, 20.2],
        [40.6, 20.9, 75.3, 60.4],
        [-20.1, -30.2, 90.3, 80.4],
        [20.17, 13.3, 22.29, 14.11],
        [1.31, 2.77, 60.13, 5.21],
    ])])
    index = torch.arange(len(boxes)) % 4
    means = []
    for box, i in zip(boxes.tolist(), index):
        mask = masks[i][None].double()
        clipped = loop_clip(box, (45.0, 61.0))
        means.append(loop_roi_align(mask, clipped, side, 1.0)[0])
    mean = torch.stack(means)
    clear = (mean - 0.5).abs() > 1e-4
    assert clear.double().mean() > 0.99
    targets = train_dense.mask_targets(
        masks.to(device), boxes.to(device), index.to(device), side
    ).cpu()
    assert targets.dtype == torch.bool
    assert targets.shape == (len(boxes), side, side)
    assert 0.2 < targets.double().mean() < 0.8
    assert torch.equal(targets[clear], mean[clear] >= 0.5)


@pytest.mark.parametrize("row, expected", [
    ([0, 1, 0, 0], [True, False]),
    ([1, 1, 0, 1], [True, True]),
])
def test_a_mean_of_one_half_is_inside(row, expected, device):
    """Two samples per bin, on 0 and 1."""
    masks = torch.tensor([[row] * 2], dtype=torch.uint8, device=device)
    boxes = torch.tensor([[0., 0., 4., 2.]], device=device)
    index = torch.tensor([0], device=device)
    targets = train_dense.mask_targets(masks, boxes, index, 2)
    assert targets.tolist() == [[expected] * 2]


@pytest.mark.parametrize("boxes", [
    [[0., 0., 0., 0.]],
    [
        [4., 1., 4., 2.],
        [0., 0., 4., 2.],                                   # this one has an extent
    ],
])
def test_mask_targets_of_a_box_without_extent_are_empty(boxes, device):
    masks = torch.ones(1, 2, 4, dtype=torch.bool, device=device)
    index = torch.zeros(len(boxes), dtype=torch.long, device=device)
    targets = train_dense.mask_targets(masks, torch.tensor(boxes, device=device), index, 3)
    assert not targets[0].any()
    assert targets[1:].all()


@pytest.mark.parametrize("masks", [0, 2])
def test_mask_targets_of_no_box(masks, device):
    boxes = torch.zeros(0, 4, device=device)
    index = torch.zeros(0, dtype=torch.long, device=device)
    masks = torch.zeros(masks, 2, 4, dtype=torch.bool, device=device)
    assert train_dense.mask_targets(masks, boxes, index, 28).shape == (0, 28, 28)


def loop_paste(mask, box, H, W):
    """Bilinear in the mask's cells, whose centres are at 1/2, 3/2, ...; zeros all around."""
    S = len(mask)
    x1, y1, x2, y2 = box
    image = torch.zeros(H, W, dtype=torch.float64)
    for y, x in product(range(H), range(W)):
        v = (y + 0.5 - y1) / (y2 - y1) * S - 0.5
        u = (x + 0.5 - x1) / (x2 - x1) * S - 0.5
        top = math.floor(v)
        left = math.floor(u)
        for i, j in product((top, top + 1), (left, left + 1)):
            if 0 <= i < S and 0 <= j < S:
                weight = (1 - abs(v - i)) * (1 - abs(u - j))
                image[y, x] += weight * mask[i][j]
    return image


@pytest.fixture
def masks_to_paste():
    """Masks (12, 5, 5) and their boxes on an image of 19 x 26 pixels."""
    boxes = torch.cat([random_boxes(6, side=18), doubles([
        [-6.3, -4.2, 9.7, 30.1],
        [20.2, 12.1, 40.3, 17.7],
        [30., 30., 40., 45.],                               # 8: outside
        [5.49, 6.48, 5.51, 6.53],                           # 9: in a pixel, around its centre
        [0., 0., 26., 19.],
        [3., 7.4, 24., 7.6],
    ])])
    return torch.rand(12, 5, 5, dtype=torch.float64), boxes


def test_pasted_masks_match_loops(masks_to_paste, device):
    masks, boxes = masks_to_paste
    fast = train_dense.paste_masks(masks.to(device), boxes.to(device), (19, 26)).cpu()
    slow = []
    for mask, box in zip(masks.tolist(), boxes.tolist()):
        slow.append(loop_paste(mask, box, 19, 26))
    assert_close(fast, torch.stack(slow))
    assert fast[8].eq(0).all()
    assert fast[9, 6, 5] > 0


def test_pasted_masks_of_nothing(device):
    masks = torch.zeros(0, 28, 28, device=device)
    boxes = torch.zeros(0, 4, device=device)
    assert train_dense.paste_masks(masks, boxes, (7, 9)).shape == (0, 7, 9)


def test_pasted_masks_of_flat_boxes_are_finite(device):
    """Also where they lie on pixel centres."""
    flat = torch.tensor([
        [2.5, 1., 2.5, 5.],
        [1., 3., 8., 3.],
        [9., 2., 9., 2.],
    ])
    masks = torch.ones(3, 4, 4, device=device)
    pasted = train_dense.paste_masks(masks, flat.to(device), (7, 9))
    assert ((pasted >= 0) & (pasted <= 1)).all()


@pytest.mark.parametrize("box, rows, columns", [
    ((0, 0, 0, 0), [0], [0]),
    ((9, 7, 9, 7), [6], [8]),
    ((4, 7, 4, 7), [6], [3, 4]),                            # on the edge of two pixels
    ((4.25, 0, 4.25, 7), [1, 2, 3, 4, 5], [3, 4, 5]),       # the rows as of any other box
])
def test_a_box_without_extent_shows_the_middle_of_its_mask(box, rows, columns, device):
    mask = torch.zeros(1, 5, 5, device=device)
    mask[0, 1:4, 2] = 1
    boxes = one_row(box, device)
    pasted = train_dense.paste_masks(mask, boxes, (7, 9))[0] >= 0.5
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[np.ix_(rows, columns)] = True
    assert pasted.tolist() == expected.tolist()


# -------------------------------------------------------------------------------- random samples
def test_samples_are_positives_then_negatives_then_unused(device):
    for trial in range(100):
        torch.manual_seed(trial)
        B = 3
        N, count = torch.randint(1, 30, (2,)).tolist()
        max_positive = torch.randint(0, count + 1, ()).item()
        fraction = torch.rand(B, 1) * (trial % 4 > 0)
        number = torch.rand(B, N)
        positive = number < fraction
        negative = (number >= fraction) & (torch.rand(B, N) < 0.7)
        sample = train_dense.random_sample(
            positive.to(device), negative.to(device), count, max_positive
        )
        index, is_positive, is_negative = (x.cpu() for x in sample)
        n = min(count, N)
        assert index.shape == is_positive.shape == is_negative.shape == (B, n)
        assert ((index >= 0) & (index < N)).all()           # also unused ones can be gathered
        for b in range(B):
            positives = min(max_positive, int(positive[b].sum()))
            negatives = min(count - positives, int(negative[b].sum()))
            used = positives + negatives
            assert is_positive[b].tolist() == [i < positives for i in range(n)]
            assert is_negative[b].tolist() == [positives <= i < used for i in range(n)]
            assert len(set(index[b, :used].tolist())) == used
            assert positive[b, index[b, :positives]].all()
            assert negative[b, index[b, positives:used]].all()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind, sampled", [("positive", 2), ("negative", 3)])
def test_samples_are_uniform(kind, sampled, size, device):
    """4000 samples of 2 of 5 positives and 3 of 6 negatives.

    Five standard deviations around the frequency of every candidate and of every pair.
    """
    positives = [0, 3, 4, 8, 11]
    negatives = [1, 2, 5, 6, 7, 10]
    candidates = torch.zeros(2, 4000, 12, dtype=torch.bool, device=device)
    candidates[0, :, positives] = True
    candidates[1, :, negatives] = True
    sample = train_dense.random_sample(*candidates, 5, 2)
    rows = sample.index[getattr(sample, kind)].view(4000, sampled).cpu()
    members = positives if kind == "positive" else negatives
    p = math.comb(sampled, size) / math.comb(len(members), size)
    deviation = math.sqrt(4000 * p * (1 - p))
    for group in combinations(members, size):
        together = torch.ones(4000, dtype=torch.bool)
        for member in group:
            together &= (rows == member).any(1)
        assert abs(together.sum().item() - 4000 * p) < 5 * deviation, group


def test_samples_follow_the_seed(device):
    positive = torch.rand(2, 50, device=device) < 0.5
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(torch.stack(train_dense.random_sample(positive, ~positive, 20, 10)))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


# --------------------------------------------------------------------------- proposals and deltas
def loop_decode(box, delta):
    limit = math.log(1000 / 16)
    starts = []
    ends = []
    for start, end, shift, growth in zip(box[:2], box[2:], delta[:2], delta[2:]):
        centre = (start + end) / 2 + shift * (end - start)
        size = (end - start) * math.e ** min(max(growth, -limit), limit)
        starts.append(centre - size / 2)
        ends.append(centre + size / 2)
    return starts + ends


def loop_clip(box, size):
    H, W = size
    x1, y1, x2, y2 = (max(v, 0.0) for v in box)
    return [
        min(x1, W),
        min(y1, H),
        min(x2, W),
        min(y2, H),
    ]


def loop_encode(start, box):
    w = start[2] - start[0]
    h = start[3] - start[1]
    box_w = box[2] - box[0]
    box_h = box[3] - box[1]
    x = (box[0] + box_w / 2 - start[0] - w / 2) / w
    y = (box[1] + box_h / 2 - start[1] - h / 2) / h
    return [
        x,
        y,
        math.log(box_w / w),
        math.log(box_h / h),
    ]


@pytest.mark.parametrize("class_specific", [True, False])
def test_applied_deltas_match_loops(class_specific, device):
    """Labels of all classes and background, also where background has the largest logit."""
    R = 60
    K = 5
    stds = (0.1, 0.05, 0.2, 0.25)
    boxes = random_boxes(R)
    labels = torch.randint(0, K + 1, (R,))
    logits = torch.randn(R, K + 1, dtype=torch.float64)
    deltas = 8 * normal(R, 4 * K if class_specific else 4)
    assert ((labels == K) & (logits.argmax(1) == K)).any()
    assert (deltas.abs() * 0.25 > math.log(1000 / 16)).any()            # beyond the limit
    expected = []
    for r in range(R):
        label = labels[r].item()
        if label == K:
            label = logits[r, :K].argmax().item()
        first = 4 * label if class_specific else 0
        delta = deltas[r, first:first + 4].tolist()
        scaled = [d * std for d, std in zip(delta, stds)]
        expected.append(loop_decode(boxes[r].tolist(), scaled))
    given = [x.to(device) for x in (boxes, deltas, labels, logits)]
    moved = train_dense.apply_deltas(*given, stds)
    assert not moved.requires_grad
    assert_close(moved.cpu(), doubles(expected))


def loop_proposals(scores, deltas, anchors, counts, size, per_level, max_keep):
    """Boxes, and how many were empty, suppressed and left over."""
    kept = []
    empty = 0
    suppressed = 0
    first = 0
    for count in counts:
        members = range(first, first + count)
        best = sorted(members, key=lambda a: -scores[a])[:per_level]
        candidates = []
        for a in best:
            box = loop_clip(loop_decode(anchors[a], deltas[a]), size)
            if box[2] > box[0] and box[3] > box[1]:
                candidates.append((scores[a], box))
        level_boxes = [box for _, box in candidates]
        level_scores = [score for score, _ in candidates]
        winners = loop_nms(level_boxes, level_scores, 0.7)
        kept += [candidates[i] for i in winners]
        empty += len(best) - len(candidates)
        suppressed += len(candidates) - len(winners)
        first += count
    kept.sort(key=lambda candidate: -candidate[0])
    return [box for _, box in kept[:max_keep]], empty, suppressed, len(kept) - max_keep


@pytest.mark.parametrize("per_level, max_keep, shift", [
    (20, 15, (0., -200.)),
    (30, 1000, (200., 0.)),
    (1000, 1000, (0., -200.)),
    (20, 4, (200., 0.)),
])
def test_proposals_match_loops(per_level, max_keep, shift, device):
    """Three levels, two images; a quarter of the anchors, with the best scores, lies off both."""
    counts = [60, 40, 9]
    sizes = [(70, 100), (60, 80)]
    anchors = (20 + random_boxes(12, side=60))[torch.randint(0, 12, (109,))]
    off = torch.rand(109) < 0.25
    anchors[off] += torch.tensor(shift * 2)
    deltas = 0.1 * torch.randn(2, 109, 4, dtype=torch.float64)
    scores = 2 * torch.randn(2, 109, dtype=torch.float64) + 3 * off
    given = [x.to(device) for x in (scores, deltas, anchors)]
    proposals = train_dense.select_proposals(
        *given, counts, torch.tensor(sizes, device=device), per_level=per_level, max_keep=max_keep
    )
    for image, image_proposals in enumerate(proposals):
        expected, empty, suppressed, left_over = loop_proposals(
            scores[image].tolist(), deltas[image].tolist(), anchors.tolist(), counts,
            sizes[image], per_level, max_keep,
        )
        assert empty
        assert suppressed
        assert left_over > 0 or max_keep == 1000
        assert_close(image_proposals.cpu(), doubles(expected))


def test_proposals_of_anchors_off_the_image(device):
    """None in the first image; in the second one, which is larger, all of them."""
    anchors = 1000 + 10 * torch.arange(12., device=device)[:, None].repeat(1, 4)
    anchors[:, 2:] += 10
    sizes = torch.tensor([[70, 100], [2000, 2000]], device=device)
    scores = torch.randn(2, 12, device=device)
    proposals = train_dense.select_proposals(
        scores, torch.zeros(2, 12, 4, device=device), anchors, [12], sizes,
        per_level=20, max_keep=20,
    )
    assert [len(boxes) for boxes in proposals] == [0, 12]


def test_proposals_are_padded():
    boxes = random_boxes(3)
    padded, valid = train_dense.pad_proposals([boxes[:0], boxes, boxes[:1]])
    assert valid.tolist() == [[False] * 3, [True] * 3, [True, False, False]]
    assert torch.equal(padded[1], boxes)
    assert torch.equal(padded[2, 0], boxes[0])


def test_padded_proposals_keep_a_slot():
    padded, valid = train_dense.pad_proposals([torch.zeros(0, 4)] * 2)
    assert padded.shape == (2, 1, 4)
    assert not valid.any()


# --------------------------------------------------------------------------------------- losses
def loop_giou(a, b):
    """Of two boxes, floats or scalar tensors."""
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    intersection = w * h if w > 0 and h > 0 else 0 * w
    enclosing_w = max(a[2], b[2]) - min(a[0], b[0])
    enclosing_h = max(a[3], b[3]) - min(a[1], b[1])
    enclosing = enclosing_w * enclosing_h
    union = area_a + area_b - intersection
    return intersection / union - (enclosing - union) / enclosing


def test_giou_loss_matches_loops(device):
    """Random boxes, and three pairs: apart, within, around."""
    boxes = random_boxes(40, side=30)
    targets = random_boxes(40, side=30)
    boxes[0] = doubles([0, 0, 2, 2])
    targets[0] = doubles([5, 6, 7, 9])
    boxes[1] = doubles([1, 1, 2, 3])
    targets[1] = doubles([0.5, 0.5, 8, 9])
    boxes[2] = doubles([40, 50, 60, 70])
    targets[2] = doubles([42, 51, 50, 60])
    boxes.requires_grad_()
    fast = train_dense.giou_loss(boxes.to(device), targets.to(device)).cpu()
    slow = torch.stack([1 - loop_giou(a, b) for a, b in zip(boxes, targets)])
    assert fast.shape == (40,)
    assert (slow > 1).any()
    assert (slow < 1).any()
    assert_close(fast, slow)
    weight = torch.rand(40, dtype=torch.float64)
    assert_same_gradients((fast * weight).sum(), (slow * weight).sum(), [boxes])


@pytest.mark.parametrize("box, target, expected", [
    ((3, 4, 9, 8), (3, 4, 9, 8), 0),
    ((0, 0, 1, 1), (2, 0, 3, 1), 4 / 3),                    # enclosing area 3, union 2
    ((0, 0, 1, 1), (0, 0, 2, 1), 1 / 2),                    # half covered
])
def test_giou_loss_by_hand(box, target, expected, device):
    boxes = one_row(box, device)
    targets = one_row(target, device)
    loss = train_dense.giou_loss(boxes, targets)
    assert_close(loss, torch.tensor([expected], dtype=torch.float32, device=device))


@pytest.mark.parametrize("box, target", [
    ((5, 5, 5, 5), (5, 5, 5, 5)),
    ((2, 2, 2, 6), (2, 2, 4, 6)),
    ((1, 1, 1, 1), (4, 4, 4, 4)),
])
def test_giou_loss_without_area_is_finite(box, target, device):
    boxes = one_row(box, device).requires_grad_()
    targets = one_row(target, device)
    loss = train_dense.giou_loss(boxes, targets)
    assert loss.isfinite().all()
    grad, = torch.autograd.grad(loss.sum(), boxes)
    assert grad.isfinite().all()


def test_giou_loss_of_nothing():
    assert train_dense.giou_loss(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def loop_smooth_l1(difference, beta):
    if abs(difference) >= beta:
        return abs(difference) - beta / 2
    return difference ** 2 / 2 / beta


@pytest.mark.parametrize("box_loss, beta", [("l1", 0), ("smooth_l1", 1 / 9)])
def test_rpn_losses_match_loops(box_loss, beta, device):
    """Too many positives, no object, too few anchors.

    The divisor is the number of sampled anchors; no positive one counts as one.
    """
    labels = torch.tensor([[1, 0], [-1, -1], [2, 0]])
    boxes = random_boxes(3, 2, side=60) * (labels >= 0)[..., None]
    boxes[2, 1] = doubles([11, 12, 13, 14])                 # no anchor overlaps it by 0.3
    near = boxes[0].repeat(140, 1) + torch.randn(280, 4, dtype=torch.float64)
    anchors = torch.cat([near, random_boxes(420, side=60, grid=5)])
    scores = normal(3, 700)
    deltas = normal(3, 700, 4)
    valid = torch.rand(3, 700) < torch.tensor([[0.9], [0.9], [0.1]])
    targets = {"boxes": boxes.to(device), "labels": labels.to(device)}
    given = [x.to(device) for x in (scores, deltas, anchors, valid)]
    torch.manual_seed(7)
    fast = train_dense.rpn_losses(*given, targets, box_loss)

    matched = []
    for b in range(3):
        matched.append(loop_assign(boxes[b], labels[b], anchors, valid[b], 0.7, 0.3, 0.3))
    assigned = as_assignment(matched, device)
    torch.manual_seed(7)
    sample = train_dense.random_sample(assigned.positive, assigned.negative, 256, 128)
    index, positive, negative = (x.cpu() for x in sample)
    used = positive | negative
    count = used.sum(1).tolist()
    assert count[:2] == [256, 256]
    assert 0 < count[2] < 256
    positives = positive.sum(1).tolist()
    assert positives[:2] == [128, 0]
    assert positives[2]
    classification = 0
    regression = 0
    for b, i in used.nonzero().tolist():
        a = index[b, i].item()
        p = 1 / (1 + (-scores[b, a]).exp())
        classification = classification - (p if positive[b, i] else 1 - p).log()
        if positive[b, i]:
            box = boxes[b, matched[b][a]]
            target = loop_encode(anchors[a].tolist(), box.tolist())
            for delta, value in zip(deltas[b, a], target):
                regression = regression + loop_smooth_l1(delta - value, beta)
    assert list(fast) == ["loss_rpn_cls", "loss_rpn_box"]
    divisor = sum(count) + 1                                # the second image has no positive
    for loss, slow in zip(fast.values(), (classification, regression)):
        assert_close(loss.cpu(), slow / divisor)
        assert_same_gradients(loss, slow / divisor, [scores, deltas])


def loop_box_losses(logits, deltas, roi, label, box, stds, box_loss):
    """Of one RoI: classification and box loss. Logits and deltas are tensors, boxes numbers."""
    classification = logits.exp().sum().log() - logits[label]
    if label == len(logits) - 1:
        return classification, 0
    if box_loss != "smooth_l1":                             # that one is class-agnostic here
        deltas = deltas[4 * label:4 * label + 4]
    if box_loss == "giou":
        moved = loop_decode(roi, [d * std for d, std in zip(deltas, stds)])
        return classification, 10 * (1 - loop_giou(moved, box))
    regression = 0
    for delta, value, std in zip(deltas, loop_encode(roi, box), stds):
        beta = 1 if box_loss == "smooth_l1" else 0
        regression = regression + loop_smooth_l1(delta - value / std, beta)
    return classification, regression


@pytest.mark.parametrize("box_loss", KINDS)
def test_box_losses_of_nothing_are_0(box_loss, device):
    deltas = torch.zeros(0, 4, device=device)
    logits = torch.zeros(0, 3, device=device)
    labels = torch.zeros(0, dtype=torch.long, device=device)
    boxes = torch.zeros(0, 4, device=device)
    losses = train_dense.box_losses(
        logits, deltas, boxes, labels, labels, boxes, (1, 1, 1, 1), box_loss
    )
    assert losses == (0, 0)


# ---------------------------------------------------------------------------------- whole models
@pytest.fixture
def tiny_model(monkeypatch, device):
    """Builds models with a tiny backbone and box head, few proposals and detections."""
    select = train_dense.select_proposals
    multiclass_nms = train_dense.multiclass_nms

    def few_proposals(*given, per_level, max_keep):
        return select(*given, per_level=per_level, max_keep=min(max_keep, 20))
    monkeypatch.setattr(train_dense, "BoxHead", partial(train_dense.BoxHead, hidden=16))
    monkeypatch.setattr(train_dense, "select_proposals", few_proposals)
    monkeypatch.setattr(train_dense, "multiclass_nms", partial(multiclass_nms, max_keep=10))

    def build(**options):
        backbone = train_dense.Backbone("secvit_t", (0, 1, 2, 3), frozen_bn=False, **TINY)
        return train_dense.MaskRCNN(backbone, 5, rois=16, **options).to(device)
    return build


@pytest.fixture
def train_batch(device):
    """Two images of different size, the first with two objects, the second with none."""
    masks = torch.zeros(2, 70, 99, dtype=torch.bool, device=device)
    masks[0, 10:50, 5:60] = True
    masks[1, 30:64, 40:90] = True
    boxes = torch.zeros(2, 2, 4, device=device)
    boxes[0, 0] = torch.tensor([5., 10., 60., 50.])
    boxes[0, 1] = torch.tensor([40., 30., 90., 64.])
    labels = torch.tensor([[3, 0], [-1, -1]], device=device)
    images = torch.randn(2, 3, 70, 99, device=device)
    sizes = torch.tensor([[70, 99], [60, 64]], device=device)
    return images, sizes, {"boxes": boxes, "labels": labels, "masks": masks}


def loss_names(cascade):
    names = ["loss_rpn_cls", "loss_rpn_box"]
    for prefix in ("stage1_", "stage2_", "stage3_") if cascade else ("",):
        for name in ("loss_cls", "loss_box", "loss_mask"):
            names.append(prefix + name)
    return names


@pytest.mark.parametrize("with_objects", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_models_train_every_parameter(tiny_model, kind, train_batch, with_objects):
    model = tiny_model(**KINDS[kind]).train()
    images, sizes, targets = train_batch
    if not with_objects:
        targets = {
            "boxes": targets["boxes"] * 0,
            "labels": torch.full_like(targets["labels"], -1),
            "masks": targets["masks"][:0],
        }
    losses = model(images, sizes, targets)
    assert list(losses) == loss_names(model.cascade)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_detections_of_a_batch(tiny_model, kind, train_batch):
    """Well-formed, and the first image's are the same without the second one."""
    model = tiny_model(**KINDS[kind]).double().eval()       # so that no rounding decides the order
    images, sizes, _ = train_batch
    images = images.double()
    with torch.no_grad():
        batch = model(images, sizes)
        alone = model(images[:1], sizes[:1])[0]
    for boxes, scores, labels, masks in batch:
        assert boxes.shape == (len(scores), 4)
        assert masks.shape == (len(scores), 28, 28)
        assert ((labels >= 0) & (labels < 5)).all()
        assert (scores.diff() <= 0).all()
        assert ((masks >= 0) & (masks <= 1)).all()
    assert len(alone[0]) > 0
    for x, y in zip(alone, batch[0]):
        assert_close(x, y)


@pytest.mark.parametrize("kind", ["l1", "giou"])
@pytest.mark.parametrize("part", ["rpn", "box_heads", "mask_heads"])
def test_diverged_weights_give_a_loss_that_is_not_finite(tiny_model, kind, part, train_batch):
    """No proposals, or boxes that are not finite: the training loop must report it."""
    model = tiny_model(**KINDS[kind]).train()
    with torch.no_grad():
        for parameter in getattr(model, part).parameters():
            parameter.fill_(math.nan)
    assert sum(model(*train_batch).values()).isnan()


def test_unknown_box_heads_are_refused():
    with pytest.raises(ValueError, match="unknown box_head '3fc', expected '2fc' or '4conv1fc'"):
        train_dense.MaskRCNN(SimpleNamespace(channels=[1] * 4), 3, rois=16, box_head="3fc")


# ------------------------------------------------------------------------------ stages of the heads
STAGES = [  # IoU of a positive, units of the deltas, weight of the losses
    (0.5, (0.1, 0.1, 0.2, 0.2), 1),
    (0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    (0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
]


@pytest.fixture
def small_heads(monkeypatch, device):
    """Builds a MaskRCNN of tiny heads without a norm, in float64, and maps of three images.

    Strides are doubled, since loops are slow.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(train_dense.MaskRCNN, "strides", (8, 16, 32, 64, 128))

    def build(kind, classes):
        backbone = torch.nn.Module()
        backbone.channels = [1] * 4
        with torch.device("meta"):
            model = train_dense.MaskRCNN(backbone, classes, rois=20, **KINDS[kind])
        class_specific = kind != "smooth_l1"
        for i in range(len(model.stages)):
            model.box_heads[i] = train_dense.BoxHead(
                classes, "2fc", class_specific, dim=2, hidden=8
            )
            model.mask_heads[i] = train_dense.mask_head(classes, dim=2)
        for heads in (model.box_heads, model.mask_heads):
            for name, parameter in heads.to(device, torch.float64).named_parameters():
                torch.nn.init.normal_(parameter, std=2 if "classifier" in name else 0.3)
        maps = []
        for h, w in ((25, 33), (13, 17), (7, 9), (4, 5)):
            shape = 3, 2, h, w
            x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
            maps.append(x)
        return model, STAGES[:len(model.stages)], maps
    return build


def loop_pool(maps, image, box, side):
    level = loop_level(box[2] - box[0], box[3] - box[1])
    scale = 1 / train_dense.MaskRCNN.strides[level]
    pooled = loop_roi_align(maps[level][image].cpu(), box, side, scale)
    return pooled[None].to(maps[0].device)


def loop_refine(box, logits, deltas, label, stds, size):
    """A box moved by its label's deltas (those of the best class for background) and clipped."""
    scores = logits.tolist()[:-1]
    if label == len(scores):
        label = scores.index(max(scores))
    deltas = deltas.tolist()
    if len(deltas) > 4:
        deltas = deltas[4 * label:4 * label + 4]
    moved = loop_decode(box, [d * std for d, std in zip(deltas, stds)])
    return loop_clip(moved, size)


def loop_match(proposals, boxes, labels, iou, kind):
    """Of one image: objects first, then proposals, of which some are None: unused slots."""
    matched = [g if label >= 0 else "unused" for g, label in enumerate(labels.tolist())]
    valid = [box is not None for box in proposals]
    filled = doubles([box or [0.] * 4 for box in proposals])
    min_pos_iou = 0.5 if kind == "l1" else None
    return matched + loop_assign(boxes, labels, filled, valid, iou, iou, min_pos_iou)


def loop_mask_loss(x, mask, roi):
    """Mean cross-entropy of a RoI's mask logits (28, 28), given the object's whole mask."""
    first = torch.tensor([0])
    target = train_dense.mask_targets(mask[None], doubles([roi]), first, 28)[0]
    return ((1 + x.exp()).log() - x * target).mean()


def loop_stages(model, stages, kind, maps, proposals, sizes, boxes, labels, masks):
    """Losses, and the number of positive proposals of each stage.

    Boxes are plain numbers, so that no gradient can flow through them.
    """
    B, G = labels.shape
    K = model.classes
    losses = {}
    positive_proposals = []
    longest = max(map(len, proposals))
    slots = [x.tolist() + [None] * (longest - len(x)) for x in proposals]
    for s, (iou, stds, weight) in enumerate(stages):
        matched = []
        for b in range(B):
            matched.append(loop_match(slots[b], boxes[b], labels[b], iou, kind))
            slots[b] = boxes[b].tolist() + slots[b]
        assigned = as_assignment(matched, maps[0].device)
        sample = train_dense.random_sample(assigned.positive, assigned.negative, 20, 5)
        index, positive, negative = (x.cpu() for x in sample)
        used = (positive | negative).nonzero().tolist()
        positives = int(positive.sum())
        positive_proposals.append(int((positive & (index >= G)).sum()))
        totals = [0, 0, 0]
        next_slots = [[None] * index.shape[1] for _ in range(B)]
        for b, i in used:
            number = index[b, i].item()
            roi = slots[b][number]
            g = matched[b][number] if positive[b, i] else 0
            label = labels[b, g].item() if positive[b, i] else K
            pooled = loop_pool(maps, b, roi, 7)
            logits, deltas = (x[0] for x in model.box_heads[s](pooled))
            classification, regression = loop_box_losses(
                logits, deltas, roi, label, boxes[b, g].tolist(), stds, kind
            )
            totals[0] = totals[0] + weight / len(used) * classification
            totals[1] = totals[1] + weight / len(used) * regression
            if positive[b, i]:
                pooled = loop_pool(maps, b, roi, 14)
                mask_logits = model.mask_heads[s](pooled)[0, label]
                loss = loop_mask_loss(mask_logits.cpu(), masks[b, g], roi)
                totals[2] = totals[2] + weight / positives * loss
            if number >= G:                                 # objects do not come back
                next_slots[b][i] = loop_refine(roi, logits, deltas, label, stds, sizes[b])
        slots = next_slots
        prefix = f"stage{s + 1}_" if len(stages) > 1 else ""
        for name, total in zip(("loss_cls", "loss_box", "loss_mask"), totals):
            losses[prefix + name] = total
    return losses, positive_proposals


@pytest.fixture
def three_images():
    """Of several sizes (H, W), the second without objects: sizes, boxes, masks and proposals.

    In the third the second object's best proposal is nearer to the first object.
    """
    sizes = [(200, 260), (150, 250), (190, 180)]
    boxes = doubles([
        [[20.3, 30.1, 181.4, 169.2], [1.3, 1.1, 258.8, 199.3]],
        [[0.] * 4] * 2,
        [[3.1, 5.2, 88.4, 78.3], [10.2, 10.3, 99.9, 90.4]],
    ])
    masks = torch.rand(3, 2, 7, 9) < 0.5
    masks = masks.repeat_interleave(31, 2).repeat_interleave(31, 3)[..., :200, :260]
    first, second = boxes[2]
    between = 0.6 * first + 0.4 * second
    near = [boxes[0].repeat(5, 1), boxes[1, :0], between.repeat(3, 1)]
    proposals = []
    for b, (H, W) in enumerate(sizes):
        noise = (10 - 5 * b) * torch.randn(near[b].shape, dtype=torch.float64)
        some = random_boxes(6 + 8 * b, side=min(H, W)) + 20
        candidates = torch.cat([near[b] + noise, some]).clamp(min=0)
        proposals.append(torch.minimum(candidates, torch.tensor([W, H, W, H])))
    return sizes, boxes, masks, proposals


@pytest.mark.parametrize("kind, classes", [("l1", 3), ("l1", 1), ("smooth_l1", 3), ("giou", 3)])
def test_losses_of_all_stages_match_loops(kind, classes, small_heads, three_images, device):
    model, stages, maps = small_heads(kind, classes)
    sizes, boxes, masks, proposals = three_images
    labels = torch.tensor([[2, 0], [-1, -1], [1, 2]]).clamp(max=classes - 1)
    targets = {
        "boxes": boxes.to(device),
        "labels": labels.to(device),
        "masks": masks[labels >= 0].to(device),
    }
    on_device = [x.to(device) for x in proposals]
    torch.manual_seed(7)
    fast = model.head_losses(maps, on_device, torch.tensor(sizes, device=device), targets)
    torch.manual_seed(7)
    slow, positive_proposals = loop_stages(
        model, stages, kind, maps, proposals, sizes, boxes, labels, masks
    )
    assert all(positive_proposals)
    assert list(fast) == list(slow)
    for name in slow:
        assert_close(fast[name].cpu(), slow[name].cpu())
    variables = [*maps, *model.box_heads.parameters(), *model.mask_heads.parameters()]
    slow_total = sum(x.cpu() for x in slow.values())
    assert_same_gradients(sum(fast.values()), slow_total, variables)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_match_loops(kind, small_heads, device):
    """Mean logits of all stages, the last stage's boxes, the mean of all stages' masks on these."""
    K = 3
    size = (190, 250)
    model, stages, maps = small_heads(kind, K)
    whole_image = doubles([[0, 0, 250, 190]])
    proposals = torch.cat([random_boxes(9, side=150) + 30, whole_image]).repeat(2, 1)
    proposals[10:] += 2 * torch.rand(10, 1, dtype=torch.float64)        # a little aside
    candidates = []
    for box in proposals.tolist():
        total = 0
        for (_, stds, _), head in zip(stages, model.box_heads):
            logits, deltas = (x[0] for x in head(loop_pool(maps, 1, box, 7)))
            total = total + logits / len(stages)
            refine = partial(loop_refine, box, logits, deltas, stds=stds, size=size)
            box = refine(label=K)
        for label, score in enumerate(total.softmax(0)[:K].tolist()):
            if score > 0.05:
                candidates.append((score, label, refine(label=label)))
    kept = loop_multiclass_nms(candidates, K)
    assert 3 < len(kept) < len(candidates) < K * len(proposals)
    masks = []
    for _, label, box in kept:
        pooled = loop_pool(maps, 1, box, 14)
        probabilities = [head(pooled)[0, label].sigmoid() for head in model.mask_heads]
        masks.append(sum(probabilities) / len(stages))
    fast = model.detect(maps, 1, proposals.to(device), torch.tensor(size, device=device))
    boxes, scores, labels, fast_masks = fast
    assert labels.tolist() == [label for _, label, _ in kept]
    assert_close(scores.cpu(), doubles([score for score, _, _ in kept]))
    assert_close(boxes.cpu(), doubles([box for _, _, box in kept]))
    assert_close(fast_masks, torch.stack(masks))


# ----------------------------------------------------------------------------------------- task
@pytest.mark.parametrize("task, masks", [("retinanet", 0), ("mask_rcnn", 1)])
def test_attention_needs_no_plan_per_image_size(task, masks):
    """cuDNN's kernels are off while a detector's losses are computed, and on again afterwards."""
    enabled = []

    def net(*_):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())

    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    boxes = torch.zeros(1, 1, 4)
    labels = torch.zeros(1, 1, dtype=torch.long)
    batch = [images, torch.tensor([[32, 32]]), boxes, labels] + [images[..., 0]] * masks
    train_dense.TASKS[task].losses(None, net, batch)
    assert enabled == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def make_task():
    args = argparse.Namespace(
        task="mask_rcnn", backbone="secvit_t", schedule="1x", img_size=64, amp="none"
    )
    return train_dense.InstanceSegmentation(args, torch.device("cpu"))


def test_masks_of_a_batch_are_padded():
    samples = []
    for count, h, w in ((2, 20, 30), (0, 40, 25), (1, 33, 12)):
        boxes = np.ones((count, 4), np.float32)
        masks = np.ones((count, h, w), bool)
        image = np.zeros((h, w, 3), np.uint8)
        samples.append((image, boxes, np.arange(count), masks))
    images, sizes, boxes, labels, masks = make_task().collate(samples)
    assert images.shape == (3, 64, 32, 3)
    assert sizes.tolist() == [[20, 30], [40, 25], [33, 12]]
    assert boxes.shape == (3, 2, 4)
    assert labels.tolist() == [[0, 1], [-1, -1], [0, -1]]
    assert masks.shape == (3, 64, 32)
    assert masks.dtype == torch.bool
    assert masks.sum((1, 2)).tolist() == [600, 600, 33 * 12]
    assert masks[:2, :20, :30].all()
    assert masks[2, :33, :12].all()


@pytest.fixture
def one_object():
    """A source of one image with one annotated object, and a task, an image, a mask model."""
    image = Image.new("RGB", (100, 50))
    polygon = [10, 5, 40, 5, 40, 25, 10, 25]
    annotation = dict(id=8, image_id=5, category_id=4, bbox=[10, 5, 30, 20], area=600, iscrowd=0)
    annotation["segmentation"] = [polygon]
    source = SimpleNamespace(
        path="instances.json",
        categories=[4],
        entries=[{"image": dict(id=5, width=100, height=50)}],
        annotations={5: [annotation]},
    )
    box = torch.tensor([[10., 5., 40., 25.]])
    detect = fake_detector(box, torch.tensor([0]), image)

    def model(images, sizes):
        return [(*detect(images, sizes)[0], torch.ones(1, 28, 28))]
    return source, image, model


def test_boxes_and_masks_are_evaluated(one_object):
    source, image, model = one_object
    task = make_task()
    *_, masks = task.predict(model, image)
    assert masks.shape == (1, 50, 100)
    assert masks[0, 5:25, 10:40].all()
    assert masks.sum() == 600
    sample = 0, (image, None, None)
    record = task.record(source, sample, task.infer(model, sample))
    metrics = task.summarize(source, [record])
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    expected = [f"box_{name}" for name in names] + [f"mask_{name}" for name in names]
    assert list(metrics) == expected
    assert metrics["box_AP"] == pytest.approx(1)
    assert metrics["mask_AP"] == pytest.approx(1)


MALFORMED = {
    "a number": 3,
    "odd": [[1, 2, 3]],
    "ragged": [[[1, 2], [3]]],
    "words": [["a"] * 6],
    "infinite": [[math.inf] * 6],
    "another size": {"size": [3, 3], "counts": [9]},
    "too short": {"size": [50, 100], "counts": [9]},
    "no counts": {"size": [50, 100]},
}


@pytest.fixture
def coco_with_mask(tmp_path):
    """Writes COCO files of both splits, one image with one object of a given segmentation."""
    def write(segmentation):
        image = dict(id=5, file_name="a.png", width=100, height=50)
        annotation = dict(id=8, image_id=5, category_id=4, bbox=[10, 5, 30, 20], area=600)
        annotation["segmentation"] = segmentation
        data = dict(
            images=[image], annotations=[annotation], categories=[dict(id=4, name="thing")]
        )
        (tmp_path / "annotations").mkdir()
        for split in ("train", "val"):
            path = tmp_path / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(data))
            (tmp_path / f"{split}2017").mkdir()
            Image.new("RGB", (100, 50)).save(tmp_path / f"{split}2017" / "a.png")
        return tmp_path
    return write


@pytest.mark.parametrize("segmentation", [
    [[10, 5, 40, 5, 40, 25, 10, 25]],
    {"size": [50, 100], "counts": [505, 20, *[30, 20] * 29, 5000 - 505 - 20 - 50 * 29]},
])
def test_coco_reads_masks_for_training(segmentation, coco_with_mask):
    """Polygons and run lengths, down each column."""
    task = make_task()
    folder = coco_with_mask(segmentation)
    image, boxes, labels, masks = task.open_split(folder, "train").read(0)
    assert image.size == (100, 50)
    assert boxes.tolist() == [[10, 5, 40, 25]]
    assert labels.tolist() == [0]
    assert masks.shape == (1, 50, 100)
    assert masks[0, 5:25, 10:40].all()
    assert masks.sum() == 600
    assert len(task.open_split(folder, "val").read(0)) == 3


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_masks_are_named_when_they_are_read(name, coco_with_mask):
    source = make_task().open_split(coco_with_mask(MALFORMED[name]), "train")
    message = f"{source.path}: image 5, annotation 8: segmentation: "
    with pytest.raises(train_dense.InputError, match=re.escape(message)):
        source.read(0)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_masks_are_named_when_they_are_evaluated(name, coco_with_mask, one_object):
    _, image, model = one_object
    task = make_task()
    source = task.open_split(coco_with_mask(MALFORMED[name]), "val")
    message = f"{source.path}: image 5, annotation 8: segmentation: "
    sample = 0, (image, None, None)
    prediction = task.infer(model, sample)
    with pytest.raises(train_dense.InputError, match=re.escape(message)):
        task.record(source, sample, prediction)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_masks_are_named_when_results_are_scored(name, coco_with_mask, tmp_path):
    """With the annotation's masks in order."""
    task = make_task()
    source = task.open_split(coco_with_mask([[10, 5, 40, 5, 40, 25, 10, 25]]), "val")
    result = dict(image_id=5, category_id=4, score=1, bbox=[10, 5, 30, 20])
    path = tmp_path / "results.json"
    path.write_text(json.dumps([result | dict(segmentation=MALFORMED[name])]))
    message = "results.json.*image 5.*segmentation"
    with pytest.raises(train_dense.InputError, match=message):
        task.score_results(source, path)


def test_boxes_and_masks_of_results_files_are_scored(coco_with_mask, tmp_path):
    """The right box, a mask of half its width."""
    task = make_task()
    source = task.open_split(coco_with_mask([[10, 5, 40, 5, 40, 25, 10, 25]]), "val")
    half = [[10, 5, 25, 5, 25, 25, 10, 25]]
    result = dict(image_id=5, category_id=4, score=1, bbox=[10, 5, 30, 20], segmentation=half)
    path = tmp_path / "results.json"
    path.write_text(json.dumps([result]))
    metrics = task.score_results(source, path)
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    kinds = [f"box_{name}" for name in names], [f"mask_{name}" for name in names]
    assert list(metrics) == [*kinds[0], *kinds[1]]
    assert metrics["box_AP"] == pytest.approx(1)
    assert metrics["mask_AP"] == pytest.approx(0.1)                     # IoU 0.5


@pytest.mark.parametrize("fields, kind", [(["bbox"], "box"), (["segmentation"], "mask")])
def test_results_of_one_kind_are_scored(coco_with_mask, tmp_path, fields, kind):
    task = make_task()
    mask = [[10, 5, 40, 5, 40, 25, 10, 25]]
    source = task.open_split(coco_with_mask(mask), "val")
    values = dict(bbox=[10, 5, 30, 20], segmentation=mask)
    result = dict(image_id=5, category_id=4, score=1) | {name: values[name] for name in fields}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([result]))
    metrics = task.score_results(source, path)
    assert len(metrics) == 12
    assert metrics[f"{kind}_AP"] == pytest.approx(1)


@pytest.mark.parametrize("field", ["bbox", "segmentation"])
def test_results_without_box_or_mask_are_named(coco_with_mask, tmp_path, field):
    task = make_task()
    mask = [[10, 5, 40, 5, 40, 25, 10, 25]]
    source = task.open_split(coco_with_mask(mask), "val")
    result = dict(image_id=5, category_id=4, score=1, bbox=[10, 5, 30, 20], segmentation=mask)
    without = {name: value for name, value in result.items() if name != field}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([result, without]))
    message = re.escape(f"{path}: result 1, image 5: expected a {field}")
    with pytest.raises(train_dense.InputError, match=message):
        task.score_results(source, path)
