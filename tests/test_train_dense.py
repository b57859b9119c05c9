"""train_dense.py: boxes, losses, heads and metrics against slow loops, whole runs on tiny data, errors a user can make.

Order as in the script, data and whole runs last. COCO's evaluation and the drawn scenes have files of their own. Letters as there.
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
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

import train_dense as T

ROOT = Path(T.__file__).parent


# --------------------------------------------------------------------------------------------------------------- boxes
def loop_iou(a, b):
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(0.0, w) * max(0.0, h)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def random_boxes(*shape, side=100, grid=None):
    """Boxes (*shape, 4) inside side x side; on a grid, so that there are ties, if given."""
    corners = torch.rand(*shape, 2, 2, dtype=torch.float64) * side
    if grid:
        corners = (corners / grid).round() * grid
    low, high = corners.amin(-2), corners.amax(-2)
    return torch.cat([low, high + (grid or 1)], -1)


def test_box_iou_matches_loops(device):
    a, b = random_boxes(2, 5, grid=10), random_boxes(2, 7, grid=10)
    expected = torch.tensor([[[loop_iou(x, y) for y in b[i].tolist()] for x in a[i].tolist()] for i in range(2)], dtype=torch.float64)
    assert_close(T.box_iou(a.to(device), b.to(device)).cpu(), expected)
    assert_close(T.box_iou(a[0], b[0]), expected[0])
    assert T.box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_encode_by_hand_and_back():
    anchors, boxes = torch.tensor([[10., 20., 30., 60.]]), torch.tensor([[15., 10., 55., 20.]])
    assert_close(T.encode(anchors, boxes), torch.tensor([[15 / 20, -25 / 40, math.log(2), math.log(1 / 4)]]))
    a, b = random_boxes(50), random_boxes(50)
    assert_close(T.decode(a, T.encode(a, b)), b)


def test_decoded_sizes_are_limited():
    grown = T.decode(torch.tensor([[0., 0., 2., 2.]]), torch.tensor([[0., 0., 100., -100.]]))[0]
    assert_close(grown[2] - grown[0], torch.tensor(2 * 1000 / 16))
    assert_close(grown[3] - grown[1], torch.tensor(2 * 16 / 1000), atol=1e-5, rtol=0)


def test_clip_boxes():
    assert T.clip_boxes(torch.tensor([[-5., -5., 50., 50.], [30., 5., 90., 20.]]), (20, 40)).tolist() == [[0, 0, 40, 20], [30, 5, 40, 20]]


def loop_assign(boxes, labels, anchors, there, positive, negative, least):
    """mmdetection's rule for one image, anchor by anchor, then box by box; anchors that are not there take no part."""
    count = int((labels >= 0).sum())
    ious = {a: [loop_iou(anchor, box) for box in boxes[:count].tolist()] for a, anchor in enumerate(anchors.tolist()) if there[a]}
    result = [-2] * len(anchors)
    for a, row in ious.items():
        best = max(row, default=-1.)
        result[a] = row.index(best) if best >= positive and row else -1 if best < negative else -2
    for g in range(count):
        top = max((row[g] for row in ious.values()), default=-1.)
        if top >= least:
            for a, row in ious.items():
                if row[g] == top:
                    result[a] = g
    return result


@pytest.mark.parametrize("positive, negative, least", [(0.5, 0.4, 0.0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.5), (0.6, 0.6, 2.0)])
def test_assignment_matches_loops(positive, negative, least, device):
    for trial in range(20):
        torch.manual_seed(trial)
        anchors, boxes = random_boxes(60, side=40, grid=10), random_boxes(3, 4, side=40, grid=10)
        labels = torch.tensor([[0, 1, 2, 0], [1, 2, -1, -1], [-1, -1, -1, -1]])
        boxes, there = boxes * (labels >= 0)[..., None], torch.rand(3, 60) < (0.1, 0.5, 1)[trial % 3]
        given, rule = [t.to(device) for t in (boxes, labels, anchors, there)], (positive, negative, least)
        expected = [loop_assign(boxes[i], labels[i], anchors, there[i], *rule) for i in range(3)]
        assert T.assign(*given, positive=positive, negative=negative, least=least).tolist() == expected
        given[2] = given[2].expand(3, -1, -1)               # each image's own
        assert T.assign(*given, positive=positive, negative=negative, least=least).tolist() == expected


def loop_nms(boxes, scores, threshold):
    """Greedy, by the book."""
    rest, kept = sorted(range(len(boxes)), key=lambda i: (-scores[i], i)), []
    while rest:
        best, *rest = rest
        kept.append(best)
        rest = [i for i in rest if loop_iou(boxes[best], boxes[i]) <= threshold]
    return kept


@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
def test_nms_matches_the_greedy_loop(threshold, block, device):
    for trial in range(10):
        torch.manual_seed(trial)
        boxes, scores = random_boxes(60, side=50, grid=5), (10 * torch.rand(60, dtype=torch.float64)).round()
        kept = loop_nms(boxes.tolist(), scores.tolist(), threshold)
        for most in (1, 5, 60):
            assert T.nms(boxes.to(device), scores.to(device), threshold, most, block).tolist() == kept[:most]


def test_nms_of_a_long_chain_and_of_nothing(device):
    """Each box suppresses only the next one, so every other one stays: as many rounds as boxes."""
    left = torch.arange(40.)
    boxes = torch.stack([left, torch.zeros(40), left + 2, torch.ones(40)], 1)
    assert T.nms(boxes.to(device), -left.to(device), 0.3, 40).tolist() == list(range(0, 40, 2))
    assert T.nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5, 9).tolist() == []


def test_nms_by_class(device):
    boxes, scores, labels = random_boxes(80, side=40, grid=5), torch.rand(80, dtype=torch.float64), torch.randint(0, 3, (80,))
    kept = T.nms_by_class(boxes.to(device), scores.to(device), labels.to(device), 0.4, len(boxes)).tolist()
    expected = set()
    for label in range(3):
        members = (labels == label).nonzero().flatten()
        expected |= {members[i].item() for i in loop_nms(boxes[members].tolist(), scores[members].tolist(), 0.4)}
    assert set(kept) == expected
    assert kept == sorted(kept, key=lambda i: -scores[i].item())


def test_anchors_by_hand():
    base = T.base_anchors((8, 16), [4, 4 * 2 ** (1 / 3)])
    assert base.shape == (2, 6, 4)
    assert_close(base[0, 2], torch.tensor([-16., -16., 16., 16.]))                      # stride 8, ratio 1, scale 4
    wide = 32 / math.sqrt(0.5) / 2, 32 * math.sqrt(0.5) / 2                             # ratio 0.5: twice as wide as high
    assert_close(base[0, 0], torch.tensor([-wide[0], -wide[1], wide[0], wide[1]]))
    assert_close(base[1], 2 * base[0])
    anchors = T.anchor_boxes(base, [(2, 3), (1, 1)], (8, 16))
    assert anchors.shape == ((6 + 1) * 6, 4)
    for row, column, a in product(range(2), range(3), range(6)):
        assert_close(anchors[(row * 3 + column) * 6 + a], base[0, a] + torch.tensor([8. * column, 8. * row] * 2))
    assert_close(anchors[-6:], base[1])


# -------------------------------------------------------------------------------------------------------------- losses
def test_segmentation_loss_counts_ignored_pixels_in_the_divisor():
    logits, auxiliary = (torch.randn(2, 3, h, h, dtype=torch.float64, requires_grad=True) for h in (3, 2))
    labels = torch.randint(0, 3, (2, 6, 7), dtype=torch.uint8)
    labels[:, :2] = 255

    def slow(logits):
        wide, total = F.interpolate(logits, size=(6, 7), mode="bilinear"), 0
        for b, y, x in product(range(2), range(6), range(7)):
            if labels[b, y, x] != 255:
                total = total - wide[b, :, y, x].log_softmax(0)[labels[b, y, x].item()]
        return total / (2 * 6 * 7)
    assert_close(T.segmentation_loss(logits, labels).double(), slow(logits), rtol=1e-5, atol=0)     # float32 inside
    both = T.segmentation_loss((logits, auxiliary), labels)
    assert_close(both.double(), slow(logits) + 0.4 * slow(auxiliary), rtol=1e-5, atol=0)
    expected = torch.autograd.grad(slow(logits) + 0.4 * slow(auxiliary), (logits, auxiliary))
    for a, b in zip(torch.autograd.grad(both, (logits, auxiliary)), expected):
        assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_focal_loss_is_equation_5():
    logits, targets = torch.randn(50, dtype=torch.float64, requires_grad=True), torch.rand(50) < 0.3
    slow = []
    for x, positive in zip(logits, targets):
        p = 1 / (1 + (-x).exp())
        pt, alpha = (p, 0.25) if positive else (1 - p, 0.75)
        slow.append(-alpha * (1 - pt) ** 2 * pt.log())
    slow = torch.stack(slow)
    assert_close(T.focal_loss(logits, targets), slow)
    assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (T.focal_loss(logits, targets), slow)))


def test_retinanet_loss_matches_loops(device):
    """Two images, one without boxes, the other smaller than the batch: cells beyond its own padding do not count."""
    strides, levels = (8, 16), [(12, 12), (6, 6)]
    base = T.base_anchors(strides, [2, 3]).double()
    anchors = T.anchor_boxes(base, levels, strides)
    A, sizes = len(anchors), torch.tensor([[60, 40], [96, 96]])
    boxes, labels = torch.zeros(2, 3, 4, dtype=torch.float64), torch.tensor([[2, 0, -1], [-1, -1, -1]])
    boxes[0, :2] = torch.tensor([[3., 5., 30., 40.], [20., 20., 38., 33.]])
    logits, deltas = torch.randn(2, A, 3, dtype=torch.float64), torch.randn(2, A, 4, dtype=torch.float64)
    loss, positives = 0, []
    for b in range(2):
        padded = [-(-side // 32) * 32 for side in sizes[b].tolist()]
        there = [row * stride < padded[0] and column * stride < padded[1] for (h, w), stride in zip(levels, strides)
                 for row, column, _ in product(range(h), range(w), range(base.shape[1]))]
        count = 0
        for a, index in enumerate(loop_assign(boxes[b], labels[b], anchors, there, 0.5, 0.4, 0.0)):
            if index != -2:
                loss += T.focal_loss(logits[b, a], torch.arange(3) == (labels[b, index] if index >= 0 else -1)).sum()
                if index >= 0:
                    count += 1
                    loss += (deltas[b, a] - T.encode(anchors[a], boxes[b, index])).abs().sum()
        positives.append(count)
    assert positives[0] > 1 and positives[1] == 0
    given = [t.to(device) for t in (boxes, labels, sizes, base)]
    fast = T.retinanet_loss((logits.to(device), deltas.to(device), levels), *given, strides)
    assert_close(fast.cpu().double(), loss / (positives[0] + 1), rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------------------- necks and heads
HEADS = [   # channels, RetinaNet, Mask R-CNN, Cascade with 2fc and 4conv1fc, Semantic FPN, UPerNet + auxiliary head
    ("clustr_s", 10233588, 20151024, 53079294, 57986226, 4250262, 30307628),
    ("secvit_t", 10233588, 20151024, 53079294, 57986226, 4250262, 30307628),
    ("secvit_b", 10258164, 20179696, 53107966, 58014898, 4278934, 30512428),
    ("secvit_l", 10634996, 20269808, 53198078, 58105010, 4369046, 31773996),
    ("linglo_b0", 9537268, 20036336, 52964606, 57871538, 4135574, 28284204),
    ("linglo_b1", 10249972, 20167408, 53095678, 58002610, 4266646, 30487852),
    ("stvit_s", 10249972, 20167408, 53095678, 58002610, 4266646, 30487852),
    ("stvit_b", 10282740, 20208368, 53136638, 58043570, 4307606, 30717228),
    ("stvit_l", 10626804, 20257520, 53185790, 58092722, 4356758, 31749420),
    ("sec_fastervit_0", 10233588, 20151024, 53079294, 57986226, 4250262, 30307628),
]
WHOLE = [   # head and backbone in M: ClusTR's as the paper prints it, LinGlo's from the description, deployed
    ("clustr_s", "retinanet", {}, "32.4"), ("clustr_s", "semfpn", {}, "26.4"), ("clustr_s", "upernet", {}, "52.5"),
    ("clustr_s", "mask_rcnn", {}, "42.3"), ("secvit_t", "mask_rcnn", {"released": True}, "33.58"),
    ("secvit_s", "mask_rcnn", {"released": True}, "45.37"), ("secvit_s", "cascade_mask_rcnn", {"released": True}, "83.21"),
    ("secvit_s", "cascade_mask_rcnn", {"released": True, "options": {"box_head": "2fc"}}, "78.30"),
    ("secvit_b", "mask_rcnn", {"released": True}, "73.31"), ("secvit_b", "cascade_mask_rcnn", {"released": True}, "111.15"),
    ("secvit_l", "mask_rcnn", {"released": True}, "115.08"), ("stvit_s", "mask_rcnn", {}, "44.11"), ("stvit_b", "mask_rcnn", {}, "70.35"),
    ("stvit_b", "cascade_mask_rcnn", {}, "108.18"), ("stvit_b", "cascade_mask_rcnn", {"options": {"box_head": "2fc"}}, "103.28"),
    ("stvit_l", "mask_rcnn", {}, "113.55"),
    ("secvit_t", "retinanet", {"released": True}, "23.66"), ("secvit_t", "semfpn", {"released": True}, "17.68"),
    ("secvit_s", "retinanet", {"released": True}, "35.46"), ("secvit_s", "semfpn", {"released": True}, "29.47"),
    ("secvit_s", "upernet", {"released": True}, "55.53"), ("secvit_b", "retinanet", {"released": True}, "63.39"),
    ("secvit_b", "semfpn", {"released": True}, "57.41"), ("secvit_b", "upernet", {"released": True}, "83.64"),
    ("secvit_l", "retinanet", {"released": True}, "105.45"), ("secvit_l", "semfpn", {"released": True}, "99.18"),
    ("secvit_l", "upernet", {"released": True}, "126.59"),
    ("stvit_s", "upernet", {}, "54.43"), ("stvit_b", "upernet", {}, "80.86"), ("stvit_l", "upernet", {}, "125.04"),
    ("linglo_b0", "retinanet", {}, "12.88"), ("linglo_b0", "semfpn", {}, "7.48"), ("linglo_b1", "retinanet", {}, "23.46"),
    ("linglo_b1", "semfpn", {}, "17.48"), ("linglo_b2", "retinanet", {}, "34.88"), ("linglo_b2", "semfpn", {}, "28.90"),
]


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("backbone, retinanet, mask, two, four, semfpn, upernet", HEADS)
def test_head_parameters(backbone, retinanet, mask, two, four, semfpn, upernet):
    for task, classes, options, parameters in (
            ("retinanet", 80, None, retinanet), ("mask_rcnn", 80, None, mask), ("cascade_mask_rcnn", 80, {"box_head": "2fc"}, two),
            ("cascade_mask_rcnn", 80, None, four), ("semfpn", 150, None, semfpn), ("upernet", 150, None, upernet)):
        with torch.device("meta"):
            model = T.build_model(task, backbone, classes, options=options)
        assert count(model) - count(model.backbone) == parameters, task


@pytest.mark.parametrize("backbone, task, overrides, millions", WHOLE)
def test_head_and_backbone_parameters(backbone, task, overrides, millions):
    with torch.device("meta"):
        model = T.build_model(task, backbone, 150 if task in ("semfpn", "upernet") else 80, **overrides)
        if backbone.startswith("linglo"):
            model.backbone.net.reparameterize()
    fresh = count(model.backbone.norms)                                                 # the page counts them nowhere
    assert f"{(count(model) - fresh) / 1e6:.{len(millions.split('.')[1])}f}" == millions


@pytest.mark.parametrize("task", ["semfpn", "upernet", "retinanet"])
@pytest.mark.parametrize("H, W", [(64, 64), (70, 99)])
def test_models_take_any_size_and_train_every_parameter(tiny, task, H, W, device):
    model = T.build_model(task, "secvit_t", 5, frozen_bn=False).to(device).train()
    outputs = model(torch.randn(2, 3, H, W, device=device))
    if task == "retinanet":
        logits, deltas, levels = outputs
        cells = [tuple(math.ceil(side / stride) for side in (H, W)) for stride in model.strides]
        assert levels == cells and logits.shape == (2, 9 * sum(h * w for h, w in cells), 5) and deltas.shape == (*logits.shape[:2], 4)
        outputs = logits, deltas
    else:
        sizes = [tuple(math.ceil(side / stride) for side in (H, W)) for stride in (4, 16)]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert [tuple(x.shape) for x in outputs] == [(2, 5, *size) for size in sizes[:len(outputs)]]
        assert len(outputs) == (2 if task == "upernet" else 1)
        assert isinstance(model.eval()(torch.randn(1, 3, H, W, device=device)), torch.Tensor)
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_semantic_fpn_matches_its_definition():
    """Semantic FPN's head in mmsegmentation, from the neck's maps on, unit by unit."""
    model = T.build_model("semfpn", "linglo_b0", 4, frozen_bn=False).eval()
    images = torch.randn(1, 3, 64, 96)
    maps, total = model.neck(model.backbone(images)), 0
    for i, units in enumerate(model.scales):
        x = maps[i]
        assert len(units) == (1, 1, 2, 3)[i]
        for unit in units:
            x = unit(x)
            x = x if i == 0 else F.interpolate(x, scale_factor=2, mode="bilinear")
        total = total + x
    assert_close(model(images), model.classifier(total))


def test_pyramid_adds_the_coarser_level():
    neck = T.FPN([3, 5], extra=True)
    fine, coarse = torch.randn(1, 3, 5, 7), torch.randn(1, 5, 3, 4)
    top = neck.laterals[1](coarse)
    rows, columns = [int(i * 3 / 5) for i in range(5)], [int(i * 4 / 7) for i in range(7)]              # nearest
    outputs = neck([fine, coarse])
    assert_close(outputs[0], neck.outputs[0](neck.laterals[0](fine) + top[:, :, rows][..., columns]))
    assert_close(outputs[1], neck.outputs[1](top))
    assert_close(outputs[2], neck.extra[0](coarse))                                     # of the backbone's map, not of the pyramid's
    assert_close(outputs[3], neck.extra[1](outputs[2]))                                 # no ReLU between


def test_backbone_keeps_its_statistics_when_frozen(tiny):
    for frozen in (True, False):
        backbone = T.build_model("semfpn", "secvit_t", 3, frozen_bn=frozen).backbone.train()
        norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        backbone(torch.randn(2, 3, 64, 64))
        assert norms and all(bool(norm.running_mean.any()) != frozen and norm.weight.requires_grad for norm in norms)
    assert all(isinstance(norm, nn.LayerNorm) for norm in backbone.norms)               # SecViT and STViT end their stages without one
    for name in ("sec_swin_t", "sec_fastervit_0"):                                      # and so do these
        with torch.device("meta"):
            backbone = T.build_model("semfpn", name, 3).backbone
        assert all(isinstance(norm, nn.LayerNorm) for norm in backbone.norms) and isinstance(backbone.net.proj, nn.Identity)
    assert all(isinstance(norm, nn.Identity) for norm in T.build_model("semfpn", "clustr_t", 3).backbone.norms)


def test_backbone_weights_load_with_a_report(tiny, tmp_path, capsys):
    whole = T.MODELS["secvit_t"](num_classes=7)
    torch.save({"model": whole.state_dict()}, tmp_path / "weights.pt")
    args = T.parse_args(["--backbone-weights", str(tmp_path / "weights.pt"), "--backbone", "secvit_t"])
    args.released = False
    backbone = T.build_model("semfpn", "secvit_t", 3).backbone
    assert T.load_backbone(backbone, args) == ["head", "proj"]
    assert_close(backbone.net.stem[0].weight, whole.stem[0].weight)
    assert_close(backbone.net.stages[3][0].ffn.fc1.weight, whole.stages[3][0].ffn.fc1.weight)


# ----------------------------------------------------------------------------------------------------------- inference
def test_retinanet_objects_match_loops(device):
    """Two levels; candidates by their best class, pairs above the threshold, NMS class by class, the best few."""
    strides, levels = (8, 16), [(3, 4), (2, 2)]
    base = T.base_anchors(strides, [2])
    anchors = T.anchor_boxes(base, levels, strides)
    logits, deltas = 2 * torch.randn(len(anchors), 3), 0.3 * torch.randn(len(anchors), 4)
    expected = []
    for part in (range(36), range(36, 48)):
        best = sorted(part, key=lambda a: -logits[a].max().item())[:10]
        for a, label in product(best, range(3)):
            score = logits[a, label].sigmoid().item()
            if score > 0.4:
                expected.append((score, label, T.clip_boxes(T.decode(anchors[a], deltas[a]), (20, 30)).tolist()))
    kept = []
    for label in range(3):
        own = [e for e in expected if e[1] == label]
        kept += [own[i] for i in loop_nms([e[2] for e in own], [e[0] for e in own], 0.5)]
    kept = sorted(kept, key=lambda e: -e[0])[:8]
    given = logits.to(device), deltas.to(device), levels, (20, 30), base.to(device), strides
    boxes, scores, labels = T.retinanet_objects(*given, candidates=10, least=0.4, most=8)
    assert labels.tolist() == [e[1] for e in kept]
    assert_close(scores.cpu(), torch.tensor([e[0] for e in kept]))
    assert_close(boxes.cpu(), torch.tensor([e[2] for e in kept]))


def test_detection_returns_to_the_images_pixels(tiny, monkeypatch):
    """A model that finds one anchor exactly: its box comes back in the pixels of an image of another size."""
    model = T.build_model("retinanet", "secvit_t", 2).eval()
    args = argparse.Namespace(img_size=64, amp="none")

    image = Image.new("RGB", (80, 50))
    W, H = T.fit(image.size, 64 * 1333 / 800, 64)
    assert (W, H) == (102, 64)

    def found(images):
        assert images.shape[2:] == (64, 128)                                            # padded to multiples of 32
        levels = [(math.ceil(64 / s), math.ceil(128 / s)) for s in model.strides]
        count = 9 * sum(h * w for h, w in levels)
        logits = torch.full((1, count, 2), -10.)
        logits[0, (3 * 16 + 5) * 9 + 3, 1] = 10.                                        # row 3, column 5 of stride 8, ratio 1, scale 4
        return logits, torch.zeros(1, count, 4), levels
    monkeypatch.setattr(model, "forward", found)
    boxes, scores, labels = T.detect(model, image, args, torch.device("cpu"))
    x, y = 80 / 102, 50 / 64
    assert labels.tolist() == [1] and scores[0] > 0.99
    assert np.allclose(boxes, [[24 * x, 8 * y, 56 * x, 40 * y]])


def test_segmentation_of_a_whole_image(tiny, monkeypatch):
    """Left half class 0, right half class 1: sizes return, and mirroring at six scales changes nothing."""
    def halves(images):
        _, _, H, W = images.shape
        right = torch.arange(W // 4) >= W // 8
        return torch.stack([~right, right]).float()[None, :, None].expand(1, 2, H // 4, W // 4) * (1 if images[0, 0, 0, 0] < 0 else -1)
    image = Image.new("RGB", (90, 60))
    image.paste((255, 255, 255), (45, 0, 90, 60))
    for ms_test in (False, True):
        labels = T.segment(halves, image, argparse.Namespace(img_size=64, ms_test=ms_test, amp="none"), torch.device("cpu"))
        assert labels.shape == (60, 90) and labels.dtype == np.uint8
        assert (labels[:, :40] == 0).all() and (labels[:, 50:] == 1).all()


def test_multi_scale_test_averages_twelve_probabilities():
    """One scale is very sure of class 1, the other ten maps a little of class 0: probabilities say 0, logits would say 1."""
    seen = []

    def model(images):
        seen.append(tuple(images.shape[2:]))
        sure = images.shape[2] == 32
        return torch.tensor([0. if sure else 1., 100. if sure else 0.]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    args = argparse.Namespace(img_size=64, ms_test=True, amp="none")
    assert (T.segment(model, Image.new("RGB", (200, 100)), args, torch.device("cpu")) == 0).all()
    assert seen == [(side, 2 * side) for side in (32, 48, 64, 80, 96, 112) for _ in range(2)]


def test_predict_reads_any_picture_and_keeps_twins_apart(tiny, scenes, tmp_path, capsys):
    T.main(["--task", "retinanet", "--data", str(scenes), *FAST, "--iters", "1", "--output", str(tmp_path / "run")])
    for i, (mode, size) in enumerate((("L", (40, 30)), ("P", (3000, 1)), ("RGBA", (5, 90)))):
        (tmp_path / str(i)).mkdir()
        Image.new(mode, size).save(tmp_path / str(i) / "picture.png")
    pictures = [str(tmp_path / str(i) / "picture.png") for i in range(3)]
    T.main(["--predict", *pictures, "--weights", str(tmp_path / "run" / "last.pt"), "--output", str(tmp_path / "drawn")])
    names = ["picture_retinanet.png", "picture_1_retinanet.png", "picture_2_retinanet.png"]
    assert [Image.open(tmp_path / "drawn" / name).size for name in names] == [(40, 30), (3000, 1), (5, 90)]
    fails(["--predict", str(scenes / "scenes.json"), "--weights", str(tmp_path / "run" / "last.pt")], "scenes.json")


# ------------------------------------------------------------------------------------------------------------- metrics
def test_mean_iou_by_hand():
    labels = np.array([[0, 0, 1, 255], [0, 1, 1, 255]], np.uint8)
    prediction = np.array([[0, 1, 1, 0], [0, 255, 1, 2]], np.uint8)                     # 255: predicted as nothing
    counts = T.count_pixels(prediction, labels, 4)
    assert counts.tolist() == [[2, 2, 0, 0], [2, 3, 0, 0], [3, 3, 0, 0]]
    assert T.mean_iou(counts) == pytest.approx(dict(mIoU=(2 / 3 + 2 / 4) / 2, mAcc=(2 / 3 + 2 / 3) / 2, aAcc=4 / 6))
    assert T.mean_iou(counts + np.array([[0] * 4, [0, 0, 0, 3], [0] * 4]))["mIoU"] == pytest.approx((2 / 3 + 2 / 4) / 3)    # only predicted


# ------------------------------------------------------------------------------------------------ data sets, transforms
@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    T.write_scenes(folder, (12, 5))
    return folder


def test_ade20k_reads_labels(scenes):
    source = T.Ade20k(scenes, "train")
    assert len(source) == 12 and source.names == list(T.SCENE_CLASSES)
    image, labels = source.read(0)
    stored = np.array(Image.open(sorted((scenes / "annotations" / "training").iterdir())[0])).astype(int)
    assert labels.shape == (image.height, image.width) == stored.shape
    assert (labels == np.where(stored == 0, 255, stored - 1)).all() and (labels == 255).any()


def test_coco_keeps_what_mmdetection_keeps(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        image = dict(file_name="a.jpg", width=100, height=50)
        images = [dict(image, id=7), dict(image, id=5), dict(image, id=6, width=31), dict(image, id=9)]
        good = dict(category_id=4, bbox=[90, 40, 20, 20], area=400, iscrowd=0)
        annotations = [dict(good, image_id=5), dict(good, image_id=5, category_id=2), dict(good, image_id=5, iscrowd=1),
                       dict(good, image_id=5, bbox=[100, 10, 5, 5]), dict(good, image_id=5, bbox=[1, 1, 0.5, 9]),
                       dict(good, image_id=5, area=0), dict(good, image_id=6), dict(good, image_id=9, iscrowd=1)]
        data = dict(images=images, annotations=[dict(a, id=i) for i, a in enumerate(annotations)],
                    categories=[dict(id=4, name="b"), dict(id=2, name="a")])
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
    train, val = T.Coco(tmp_path, "train"), T.Coco(tmp_path, "val")
    assert train.names == ["a", "b"] and [entry["image"]["id"] for entry in train.entries] == [5, 9]
    assert [entry["image"]["id"] for entry in val.entries] == [5, 6, 7, 9]
    assert train.entries[0]["boxes"] == [[90, 40, 110, 60]] * 2 and train.entries[0]["labels"] == [1, 0]
    assert train.entries[1]["boxes"] == []


def test_segmentation_augmentation_keeps_labels_on_their_pixels():
    """Red exactly where the label is 1, through scaling, cropping, mirroring (colours off by a little at edges and by distortion)."""
    rng, seen = random.Random(0), []
    labels = np.zeros((60, 100), np.uint8)
    labels[10:40, 20:60] = 1
    image = Image.fromarray(np.where(labels[..., None] == 1, (220, 20, 20), (20, 20, 220)).astype(np.uint8))
    for _ in range(40):
        pixels, crop = T.augment_segmentation((image, labels), rng, size=64)
        assert pixels.shape[:2] == crop.shape and max(crop.shape) <= 64 and pixels.dtype == np.uint8
        seen.append(crop.shape)
        agree = (pixels[..., 0] > pixels[..., 2]) == (crop == 1)
        assert agree.mean() > 0.9
    assert len(set(seen)) > 1 and (64, 64) in seen


def test_crops_are_redrawn_while_one_class_fills_them():
    labels = np.zeros((64, 256), np.uint8)
    labels[:, :24] = 1                                                                  # in few crops, and there under a quarter... or more
    image, shares = Image.fromarray(labels).convert("RGB"), []
    for seed in range(60):
        crop = T.augment_segmentation((image, labels), random.Random(seed), size=64)[1]
        shares.append(np.bincount(crop.ravel(), minlength=2).max() / crop.size)
    assert np.mean(np.array(shares) < 0.75) > 0.5                                       # about one in nine without redraws


def test_detection_augmentation_moves_boxes_with_the_image():
    image, flips = Image.new("RGB", (100, 60), (0, 0, 255)), set()
    image.paste((255, 0, 0), (10, 20, 30, 50))
    for seed in range(8):
        pixels, boxes, labels = T.augment_detection((image, np.array([[10, 20, 30, 50.], [90, 0, 130, 90]], np.float32), np.array([3, 1])),
                                                    random.Random(seed), size=120, multi_scale=False)
        assert pixels.shape == (120, 200, 3) and labels.tolist() == [3, 1]
        y, x = (pixels[..., 0] > 127).nonzero()
        assert np.abs(boxes[0] - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 1
        flips.add(boxes[0, 0] > 100)
        assert boxes[1].tolist() == ([0, 0, 20, 120] if boxes[0, 0] > 100 else [180, 0, 200, 120])      # clipped
    assert flips == {True, False}


def test_multi_scale_crops_move_boxes_and_masks_with_the_image():
    """Half of the samples are crops; a box of the picture is its mask's unless the crop cuts it, and what a crop loses is lost in all."""
    image, whole, sizes, kept = Image.new("RGB", (1000, 600), (0, 0, 255)), np.zeros((2, 600, 1000), bool), [], []
    image.paste((255, 0, 0), (100, 200, 300, 500))
    whole[0, 200:500, 100:300], whole[1, 590:, 980:] = True, True
    raw = image, np.array([[100, 200, 300, 500.], [980, 590, 1000, 600]], np.float32), np.array([3, 1]), whole
    for seed in range(40):
        pixels, boxes, labels, masks = T.augment_detection(raw, random.Random(seed), size=200, multi_scale=True)
        sizes.append(pixels.shape[:2])
        kept.append(labels.tolist())
        assert masks.shape == (len(labels), *pixels.shape[:2]) and len(boxes) == len(labels) and masks.dtype == bool
        for box, label, mask in zip(boxes, labels, masks):
            y, x = mask.nonzero()
            if len(x):
                assert np.abs(box - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 1.5
            if label == 3:
                assert ((pixels[..., 0] > 127) == mask).mean() > 0.96
    assert {min(size) for size in sizes} <= set(range(120, 201)) and max(max(size) for size in sizes) <= 334
    assert len({min(size) for size in sizes}) > 8
    shapes = [round(w / h, 1) for h, w in sizes]
    assert 8 < shapes.count(1.7) < 32 and len(set(shapes)) > 5                          # uncropped ones keep the image's
    assert [3, 1] in kept and [3] in kept
    nothing = image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), whole[:0]
    for seed in range(4):
        pixels, boxes, _, masks = T.augment_detection(nothing, random.Random(seed), size=200, multi_scale=True)
        assert masks.shape == (0, *pixels.shape[:2]) and boxes.shape == (0, 4)


def test_distortion():
    """Nothing drawn changes nothing, most draws change something, and brightness is a sum that is clipped."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    seen = [T.distort(pixels, random.Random(seed)) for seed in range(60)]
    assert sum(np.array_equal(x, pixels) for x in seen) >= 1 and sum(not np.array_equal(x, pixels) for x in seen) > 40
    assert all(x.dtype == np.uint8 and x.shape == pixels.shape for x in seen)

    class Draws(random.Random):
        """Only brightness, by +20."""
        def __init__(self):
            super().__init__()
            self.draws = iter([0.0] + [0.9] * 20)

        def random(self):
            return next(self.draws)

        def uniform(self, _low, _high):
            return 20.0
    assert np.array_equal(T.distort(pixels, Draws()), (pixels.astype(int) + 20).clip(0, 255))


def test_slivers_left_by_clipping_are_dropped():
    boxes = np.array([[100 - 1e-6, 5, 120, 20], [10, 10, 30, 30]], np.float32)
    for seed in range(4):
        _, kept, labels = T.augment_detection((Image.new("RGB", (100, 60)), boxes, np.array([3, 1])), random.Random(seed), size=64,
                                              multi_scale=False)
        assert labels.tolist() == [1] and len(kept) == 1


def test_padding_is_the_mean_colour(device):
    batch, sizes = T.pad_images([np.full((40, 50, 3), 255, np.uint8), np.full((33, 70, 3), 255, np.uint8)], 32)
    assert batch.shape == (2, 64, 96, 3) and sizes.tolist() == [[40, 50], [33, 70]]
    x = T.normalize_padded(batch.to(device), sizes.to(device))
    for i, (h, w) in enumerate(sizes.tolist()):
        assert (x[i, :, :h, :w] > 1).all() and x[i].count_nonzero() == 3 * h * w


def test_groups_share_an_orientation_and_do_not_depend_on_processes():
    wide = np.arange(23) % 3 > 0
    schedule = dict(wide=wide, batch=8, seed=0, repeats=1, first=0, last=20)
    one = list(T.GroupSampler(**schedule, micro=2, rank=0, world=1))
    two = [list(T.GroupSampler(**schedule, micro=2, rank=r, world=2)) for r in range(2)]
    assert one == [batch for pair in zip(*two, strict=True) for batch in pair]
    assert T.GroupSampler(**schedule, micro=2, rank=0, world=1).per_epoch == 24 // 8 and len(one) == 20 * 4
    for batch in one:
        assert len({wide[i] for _, i, _ in batch}) == 1 and len(batch) == 2
    assert {i for epoch, i, _ in sum(one, []) if epoch == 0} == set(range(23))


def test_learning_rates():
    args = argparse.Namespace(task="semfpn", lr=1e-4, min_lr=1e-6, warmup_iters=0, schedule=None)
    assert T.rate_at(0, args, 100) == pytest.approx(1e-4)
    assert T.rate_at(60, args, 100) == pytest.approx(99e-6 * 0.4 ** 0.9 + 1e-6)
    args = argparse.Namespace(task="upernet", lr=6e-5, min_lr=0.0, warmup_iters=1500, schedule=None)
    assert T.rate_at(0, args, 160000) == pytest.approx(6e-11)
    assert T.rate_at(750, args, 160000) == pytest.approx(6e-5 * (1 - 750 / 160000) * (1 - 0.5 * (1 - 1e-6)))
    args = argparse.Namespace(task="retinanet", lr=1e-4, warmup_iters=500, schedule="1x")
    rates = [T.rate_at(step, args, 12000) for step in (0, 250, 500, 7999, 8000, 10999, 11000)]
    assert rates == pytest.approx([1e-7, 1e-4 * (1 - 0.5 * 0.999), 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    args.schedule = "3x"
    assert [T.rate_at(step, args, 36000) for step in (26999, 27000, 32999, 33000)] == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])


def settled(*flags):
    """The arguments as the script settles them."""
    args = T.parse_args(flags)
    T.settle(args)
    return args


def test_schedules_and_recipes_of_detection():
    args = settled("--task", "cascade_mask_rcnn", "--data", "coco")
    assert (args.schedule, args.epochs, args.box_head, args.rois, args.sync_bn) == ("3x", 36, "4conv1fc", 512, True)
    args = settled("--task", "cascade_mask_rcnn", "--data", "coco", "--schedule", "1x", "--box-head", "2fc")
    assert (args.schedule, args.epochs, args.box_head) == ("1x", 12, "2fc")
    args = settled("--task", "mask_rcnn", "--data", "coco", "--schedule", "3x", "--iters", "9")
    assert (args.schedule, args.epochs, args.iters, args.weight_decay, args.sync_bn) == ("3x", None, 9, 0.05, False)
    args = settled("--task", "mask_rcnn", "--data", "coco", "--backbone", "clustr_s")
    assert (args.lr, args.weight_decay, args.schedule) == (2e-4, 1e-4, "1x")
    for flags, message in ((["--schedule", "3x"], "--schedule is for retinanet and mask_rcnn and cascade_mask_rcnn, not for semfpn"),
                           (["--task", "mask_rcnn", "--box-head", "2fc"], "--box-head is for cascade_mask_rcnn, not for mask_rcnn"),
                           (["--task", "retinanet", "--rois", "64"], "--rois is for mask_rcnn"),
                           (["--task", "mask_rcnn", "--compile"], "--compile is for .*, not for mask_rcnn"),
                           (["--task", "mask_rcnn", "--jitter", "0"], "--jitter is for pose")):
        with pytest.raises(T.InputError, match=message):
            settled(*flags)


def test_decay_exempts_norms_in_swins_settings_only(tiny):
    model = T.build_model("upernet", "secvit_t", 3)
    for decay, exempt in ((0.01, True), (1e-4, False)):
        groups = T.decay_groups(model, decay)
        ids = {id(p) for p in groups[1]["params"]}
        assert (id(model.backbone.net.stages[0][0].norm1.weight) in ids) == exempt
        assert id(model.bottleneck[1].weight) not in ids and groups[1]["weight_decay"] == 0
        assert len(ids) + len(groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("backbone, rate", [
    ("secvit_t", None), ("sec_swin_s", None), ("sec_fastervit_0", None), ("stvit_b", 0.3), ("clustr_t", 0.1)])
def test_drop_path_of_the_family(backbone, rate):
    """None: the factory's, as in classification."""
    args = T.parse_args(["--task", "retinanet", "--backbone", backbone, "--data", "images"])
    T.settle(args)
    assert args.drop_path == rate


# ---------------------------------------------------------------------------------------------------------- whole runs
FAST = "--img-size 64 --batch-size 4 --micro-batch 2 --iters 5 --lr 1e-3 --workers 0 --log-every 1 --eval-every 2 --backbone".split()
FAST.append("secvit_t")
EXTRA = {"mask_rcnn": ["--rois", "16"], "pose": ["--img-size", "128"]}


@pytest.mark.parametrize("task", ["semfpn", "upernet", "retinanet", "mask_rcnn", "pose"])
def test_resume_equals_an_uninterrupted_run(tiny, scenes, tmp_path, task, capsys):
    common = ["--task", task, "--data", str(scenes), *FAST, *EXTRA.get(task, [])]
    T.main([*common, "--output", str(tmp_path / "a")])
    T.main([*common, "--output", str(tmp_path / "b"), "--max-steps", "3"])
    T.main(["--resume", "auto", "--output", str(tmp_path / "b"), "--task", task, "--max-steps", "9", "--workers", "1"])
    a, b = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in "ab")
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert all(a[k] == b[k] for k in ("step", "evaluated", "best", "epoch_loss"))
    records = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records[1:]] == [1, 2, 2, 3, 4, 4, 5, 5]
    metric = T.TASKS[task].metric
    assert metric in records[-1] and metric in records[3] and (tmp_path / "a" / "curves.png").exists()
    capsys.readouterr()
    T.main(["--eval", "--weights", str(tmp_path / "a" / "last.pt")])
    printed = json.loads(capsys.readouterr().out)
    assert printed == {k: records[-1][k] for k in printed} and metric in printed
    T.main(["--predict", str(scenes / "val2017" / "000000000001.jpg"), "--weights", str(tmp_path / "a" / "last.pt"),
            "--output", str(tmp_path / "drawn")])
    with Image.open(tmp_path / "drawn" / f"000000000001_{task}.png") as drawn, Image.open(scenes / "val2017" / "000000000001.jpg") as image:
        assert drawn.size == image.size


def test_cascade_trains_tests_and_draws(tiny, scenes, tmp_path, capsys):
    run = ["--task", "cascade_mask_rcnn", "--data", str(scenes), *FAST, "--rois", "16", "--iters", "1", "--output", str(tmp_path)]
    T.main(run)
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    T.main(["--eval", "--weights", str(tmp_path / "last.pt")])
    assert json.loads(capsys.readouterr().out) == {k: v for k, v in record.items() if k.startswith(("box_", "mask_"))}
    assert len([k for k in record if k.startswith("mask_A")]) == 12
    T.main(["--predict", str(scenes / "val2017" / "000000000001.jpg"), "--weights", str(tmp_path / "last.pt"), "--output", str(tmp_path)])
    assert (tmp_path / "000000000001_cascade_mask_rcnn.png").exists()


def test_resume_refuses_another_run_and_takes_other_tests(tiny, scenes, tmp_path):
    run = ["--task", "semfpn", "--data", str(scenes), *FAST, "--output", str(tmp_path / "run")]
    T.main([*run, "--max-steps", "2"])
    resume = ["--resume", "auto", "--output", str(tmp_path / "run")]
    fails([*resume, "--batch-size", "2", "--micro-batch", "1"], "epochs of the checkpoint have 3 updates, of this run 6")
    (tmp_path / "other").mkdir()
    shutil.copytree(scenes, tmp_path / "other", dirs_exist_ok=True)
    (tmp_path / "other" / "objectInfo.txt").write_text("Idx\tName\n1\tall\n" * 10)
    fails([*resume, "--data", str(tmp_path / "other")], "other classes")
    T.main([*resume, "--eval-every", "1", "--iters", "4"])
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "mIoU" in r] == [2, 3, 4]


def test_resume_refuses_another_schedule():
    """Its rates and crops would be others, its length the old one."""
    args = T.parse_args(["--task", "retinanet", "--data", "images"])
    T.settle(args)
    with pytest.raises(T.InputError, match="the checkpoint is one of 1x, --schedule says 3x"):
        T.settle(T.parse_args(["--resume", "x", "--schedule", "3x"]), {"args": vars(args)})


def test_released_weights_of_another_family_are_refused(tmp_path):
    torch.save({"model": {"patch_embed.proj.0.weight": torch.zeros(3), "head.weight": torch.zeros(5, 3)}}, tmp_path / "released.pt")
    args = argparse.Namespace(backbone="clustr_t", backbone_weights=tmp_path / "released.pt", released=False)
    with pytest.raises(T.InputError, match="do not fit ClusTR"):
        T.load_backbone(T.build_model("semfpn", "clustr_t", 3).backbone, args)


def test_score_of_the_truth_is_perfect(scenes, tmp_path, capsys):
    T.main(["--task", "semfpn", "--data", str(scenes), "--score", str(scenes / "annotations" / "validation")])
    assert json.loads(capsys.readouterr().out) == dict(mIoU=1, mAcc=1, aAcc=1)
    truth = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())["annotations"]
    for kind in ("bbox", "segmentation"):
        results = [{key: a[key] for key in ("image_id", "category_id", kind)} | {"score": 0.9} for a in truth if not a["iscrowd"]]
        (tmp_path / "results.json").write_text(json.dumps(results))
        T.main(["--task", "retinanet", "--data", str(scenes), "--score", str(tmp_path / "results.json")])
        scores = json.loads(capsys.readouterr().out)
        assert list(scores) == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
        assert scores["AP"] == scores["AR100"] == 1


@pytest.mark.parametrize("task", ["retinanet", "mask_rcnn"])
def test_two_processes_equal_one(scenes, tmp_path, task):
    flags = ["--task", task, "--data", str(scenes), *FAST[:-1], "linglo_b0", "--iters", "2", "--eval-every", "2", *EXTRA.get(task, [])]
    runs = []
    for world in (1, 2):
        command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if world > 1 else []),
                   str(ROOT / "train_dense.py"), *flags, "--output", str(tmp_path / str(world))]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append([json.loads(line) for line in (tmp_path / str(world) / "log.jsonl").read_text().splitlines()])
    losses = [[r["loss"] for r in run if "lr" in r] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs[0][-1].keys() == runs[1][-1].keys()


# -------------------------------------------------------------------------------------------------------------- errors
def change(key, value):
    """A change of the annotation file: entry `value` added to, or put into the first item of, `key`."""
    def apply(data):
        data[key][0].update(value)
    return apply


BROKEN = {  # what happens to instances_val2017.json -> what the message holds
    "unknown image": (change("annotations", {"image_id": 999}), "unknown image id 999"),
    "unknown category": (change("annotations", {"category_id": 99}), "unknown category id 99"),
    "short box": (change("annotations", {"bbox": [1, 2, 3]}), r"bbox \[1, 2, 3\]"),
    "infinite box": (change("annotations", {"bbox": [1, 2, 3, math.inf]}), "bbox"),
    "no area": (change("annotations", {"area": None}), "no area"),
    "no size": (change("images", {"width": 0}), "lacks its size"),
    "no images": (lambda data: data.pop("images"), "no COCO annotation file"),
    "no annotations": (lambda data: data.pop("annotations"), "no COCO annotation file"),
    "a number": (lambda data: data["annotations"].insert(0, 7), "no COCO annotation file"),
    "a list as id": (change("annotations", {"image_id": [1]}), "no COCO annotation file"),
    "no name": (change("categories", {"name": None}), "has no name"),
}


@pytest.fixture
def broken(scenes, tmp_path):
    """A copy of the scenes that a test may spoil."""
    shutil.copytree(scenes, tmp_path / "data")
    return tmp_path / "data"


def fails(flags, message):
    with pytest.raises((T.InputError, OSError), match=message) as error:
        T.main(flags)
    return str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_annotations_name_file_and_id(broken, name):
    file = broken / "annotations" / "instances_val2017.json"
    data = json.loads(file.read_text())
    spoil, message = BROKEN[name]
    spoil(data)
    file.write_text(json.dumps(data))
    assert str(file) in fails(["--task", "retinanet", "--data", str(broken)], message)


MALFORMED = {
    "nothing": None, "a number": 3, "odd": [[1, 2, 3]], "ragged": [[[1, 2], [3]]], "words": [["a"] * 6], "infinite": [[math.inf] * 6],
    "another size": {"size": [3, 3], "counts": [9]}, "too short": {"size": None, "counts": [9]}, "no counts": {"size": None}}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_masks_name_file_and_annotation(broken, tmp_path, name):
    """When a training image is read, when a validation image is scored, and when a file of results is."""
    for split in ("train", "val"):
        file = broken / "annotations" / f"instances_{split}2017.json"
        data = json.loads(file.read_text())
        image, annotation = data["images"][0], next(a for a in data["annotations"] if a["image_id"] == data["images"][0]["id"])
        annotation["segmentation"] = MALFORMED[name]
        if isinstance(MALFORMED[name], dict) and name != "another size":
            annotation["segmentation"] = dict(MALFORMED[name], size=[image["height"], image["width"]])
        file.write_text(json.dumps(data))
        task, source = T.InstanceSegmentation(argparse.Namespace(schedule="1x", img_size=64)), T.Coco(broken, split, masks=True)
        with pytest.raises(T.InputError, match=f"{file}: image {image['id']}, annotation {annotation['id']}: segmentation: "):
            task.record(source, 0, source.read(0), lambda image: (np.zeros((0, 4)), [], [], []))
    result = dict(image_id=image["id"], category_id=annotation["category_id"], score=1, segmentation={"size": [1, 1], "counts": [1]})
    (tmp_path / "results.json").write_text(json.dumps([result]))
    flags = ["--task", "mask_rcnn", "--data", str(broken), "--score", str(tmp_path / "results.json")]
    assert "results.json" in fails(flags, f"image {image['id']}, (annotation {annotation['id']}|a result): segmentation: ")


def test_malformed_files(broken, tiny, tmp_path):
    for path in ("annotations/instances_val2017.json", "results.json"):
        (broken / path).write_text('{"images": [')
    data = ["--data", str(broken)]
    fails(["--task", "retinanet", *data], "no COCO annotation file")
    fails(["--task", "retinanet", "--data", str(tmp_path / "nowhere")], "cannot read .*nowhere")
    fails(["--task", "semfpn", "--data", str(tmp_path / "nowhere")], "nowhere.* is not a folder")
    truth = broken / "annotations" / "validation"
    shutil.copytree(truth, tmp_path / "results")
    score = ["--task", "semfpn", *data, "--score", str(tmp_path / "results")]
    result = sorted((tmp_path / "results").iterdir())[0]
    Image.fromarray(np.full((9, 9), 8, np.uint8)).save(result)
    fails(score, "label 8 out of range, there are 7 classes")
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(result)
    fails(score, "9 x 9, its image")
    result.unlink()
    fails(score, "results lacks .*png")
    (truth / result.name).unlink()
    fails(score, "validation lacks the label map of")


@pytest.mark.parametrize("change, message", [({"image_id": 77}, "unknown image id 77"), ({"category_id": 5}, "unknown category id 5"),
                                             ({"score": None}, "no COCO results file"), ({"score": math.nan}, "not finite"),
                                             ({"bbox": [1, 2, 3, math.nan]}, "expected x, y, width, height")])
def test_broken_results_are_refused(scenes, tmp_path, change, message):
    result = dict(image_id=1, category_id=1, score=0.5, bbox=[1, 2, 3, 4]) | change
    (tmp_path / "results.json").write_text(json.dumps([result]))
    fails(["--task", "retinanet", "--data", str(scenes), "--score", str(tmp_path / "results.json")], message)


def test_an_unreadable_training_image_is_replaced_and_a_validation_image_is_an_error(broken, tiny, tmp_path):
    for split in ("train2017", "val2017"):
        (broken / split / "000000000001.jpg").write_bytes(b"no image")
    flags = ["--task", "retinanet", "--data", str(broken), *FAST, "--output", str(tmp_path / "run")]
    fails([*flags, "--iters", "3", "--eval-every", "3"], "validation image cannot be read")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum("unreadable_file" in r for r in records) == 1
    (broken / "val2017" / "000000000001.jpg").unlink()
    fails(flags, "validation image .*000000000001.jpg is missing")


BAD = {
    "--task sem": "unknown --task 'sem', expected one of semfpn",
    "--backbone resnet": "unknown --backbone 'resnet'",
    "--iters 5 --epochs 2": "two names of one length",
    "--backbone stvit_s --released": "--released is a variant of SecViT",
    "--task retinanet --ms-test": "--ms-test is for semfpn and upernet, not for retinanet",
    "--eval": "--eval needs --weights",
    "--weights x.pt": "--weights is for --eval and --predict",
    "--eval --predict a.jpg --weights x.pt": "do different things",
    "--predict a.jpg": "--predict needs --weights",
    "--data {d} --batch-size 3 --micro-batch 2": "not a multiple of --micro-batch",
    "--data {d} --batch-size 64": "64 is larger than the 12 training images",
    "--data {d} --task upernet --batch-size 2 --micro-batch 1": "single value a channel",
    "--weights {d}/nothing.pt --eval": "no checkpoint",
    "--data {d} --task retinanet --score {d}/nothing.json": "cannot read",
    "--img-size 8": "expected at least 64",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_named(scenes, tiny, tmp_path, typed):
    fails([*typed.format(d=scenes).split(), "--output", str(tmp_path)], BAD[typed])


def test_errors_are_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train_dense.py"), "--task", "x"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train_dense.py: unknown --task")
