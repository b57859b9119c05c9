"""Our functions against other people's software, on the inputs and outputs in tests/golden.

The table CHECKS names file, array, function and the largest difference allowed; golden/README.md
says which software made each file. Below the table, one function per file computes our values.
`PYTHONPATH=. python tests/test_golden.py` prints the differences.
"""
import json
import math
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import train_dense
import train_imagenet

FOLDER = Path(__file__).parent / "golden"
RELATIVE = "relative"  # to the largest absolute value of the array
CHECKS = [  # file, arrays, what of ours is compared, largest difference
    ("retinanet_loss", "anchors", "anchor_boxes", 1e-4),
    ("retinanet_loss", "loss_*", "RetinaNet, retinanet_losses", (1e-5, RELATIVE)),
    ("retinanet_loss", "grad_*", "RetinaNet, retinanet_losses", (1e-5, RELATIVE)),
    ("retinanet_predict", "boxes_*", "RetinaNet, best_anchors", 1e-3),
    ("retinanet_predict", "scores_*", "multiclass_nms", 1e-6),
    ("retinanet_predict", "labels_*", "multiclass_nms", 0),
    ("retinanet_predict", "pairs_above_*", "RetinaNet", 0),
    ("rpn_proposals", "proposals_*", "select_proposals", 1e-3),
    ("rpn_proposals", "probabilities_*", "select_proposals", 1e-6),
    ("rpn_loss", "*_anchors", "anchor_boxes", 1e-4),
    ("rpn_loss", "*_positive", "cells_inside, assign, random_sample", 0),
    ("rpn_loss", "*_negative", "cells_inside, assign, random_sample", 0),
    ("rpn_loss", "*_divisor", "rpn_losses", 0),
    ("rpn_loss", "*_loss_*", "rpn_losses", (1e-5, RELATIVE)),
    ("rpn_loss", "*_grad_*", "rpn_losses", (1e-5, RELATIVE)),
    ("box_loss", "*_loss_*", "box_losses, giou_loss", (1e-5, RELATIVE)),
    ("box_loss", "*_grad_*", "box_losses, giou_loss", (1e-5, RELATIVE)),
    ("box_predict", "*_stds", "MaskRCNN.stages", 0),
    ("box_predict", "*_stage_rois", "MaskRCNN.detect, apply_deltas", 1e-3),
    ("box_predict", "*_boxes", "MaskRCNN.detect, multiclass_nms", 1e-3),
    ("box_predict", "*_scores", "MaskRCNN.detect, multiclass_nms", 1e-5),
    ("box_predict", "*_labels", "MaskRCNN.detect, multiclass_nms", 0),
    ("box_predict", "mask_ensemble", "MaskRCNN.detect", 1e-6),
    ("assign", "iou", "box_iou", 1e-6),
    ("assign", "*_index*", "assign", 0),
    ("deltas", "encoded*", "encode", (1e-5, RELATIVE)),
    ("deltas", "decoded*", "decode, clip_boxes", (1e-5, RELATIVE)),
    ("nms", "keep_*", "nms", 0),
    ("roi_align", "output_*", "align_levels", 1e-10),
    ("roi_align", "grad_*", "align_levels", 1e-10),
    ("roi_levels", "*levels", "pool_rois", 0),
    ("roi_levels", "output", "pool_rois", 1e-10),
    ("roi_levels", "grad_*", "pool_rois", 1e-10),
    ("masks", "targets", "mask_targets", 0),
    ("masks", "pasted", "paste_masks", 1e-5),
    ("masks", "pasted_set", "paste_masks", 0),
    ("masks", "loss", "mask_loss", (1e-5, RELATIVE)),
    ("torchvision_ops", "keep_*", "nms, nms_by_class", 0),
    ("torchvision_ops", "giou_*", "giou_loss", 1e-8),
    ("torchvision_ops", "focal_*", "focal_loss", 1e-12),
    ("torchvision_ops", "roi_*", "align_levels", 1e-10),

    ("segmentation_loss", "*_loss*", "segmentation_losses", (1e-6, RELATIVE)),
    ("segmentation_loss", "*_grad_*", "segmentation_losses", (1e-5, RELATIVE)),
    ("segmentation_metrics", "*_*", "count_pixels, mean_iou", 1e-6),
    ("segmentation_scales", "ratios", "Segmentation.predict", 0.04),
    ("segmentation_scales", "inputs", "Segmentation.predict, fit_size", 0),
    ("segmentation_scales", "labels*", "Segmentation.predict", 0),

    ("pose_body", "mirrored_*", "MIRROR_ORDER", 0),
    ("pose_body", "sigmas_*", "SIGMAS", 1e-9),
    ("pose_body", "upper_body_*", "half_body", 0),
    ("pose_frames", "*", "crop_frame", 1e-3),
    ("pose_affine", "crop_points", "crop_person", 5e-3),
    ("pose_targets", "targets", "gaussian_maps", 1e-6),
    ("pose_targets", "weights", "gaussian_maps", 0),
    ("pose_targets", "loss", "SimpleBaseline", (1e-5, RELATIVE)),
    ("pose_targets", "grad", "SimpleBaseline", (1e-5, RELATIVE)),
    ("pose_targets", "edge_*", "gaussian_maps", 1e-6),
    ("pose_decode", "points", "peaks, Pose.predict", 1e-3),
    ("pose_decode", "confidences", "peaks", 0),
    ("pose_estimate_*", "merged", "mean_of_mirrored", 1e-6),
    ("pose_estimate_*", "points", "Pose.predict", 1e-3),
    ("pose_estimate_*", "areas", "Pose.predict, crop_frame", (1e-6, RELATIVE)),
    ("pose_estimate_*", "kept", "Pose.predict, oks_nms", 0),
    ("pose_estimate_*", "scores", "Pose.predict", 1e-6),
    ("pose_nms", "keep_*", "oks_nms", 0),
    ("pose_nms", "similarity_*", "oks_nms", 1e-6),

    ("schedules", "*_rates", "train_dense.py's flags, DenseTask.lr_at", (1e-9, RELATIVE)),
    ("cosine", "rates_*", "train_imagenet.lr_at", (1e-9, RELATIVE)),

    ("coco_bbox", "figures*", "match_image, accumulate", 1e-12),
    ("coco_segm", "figures", "match_image, accumulate", 1e-12),
    ("coco_keypoints", "figures", "match_persons, accumulate", 1e-12),
    ("coco_wholebody", "figures_*", "match_persons, accumulate", 1e-12),
    ("rle", "counts", "rle_encode", 0),
    ("rle", "bits", "rle_decode", 0),
    ("polygons", "rasters", "polygons_to_mask", 0),

    ("randaugment", "results", "RANDAUGMENT", 0),
    ("randaugment", "fill", "FILL", 0),
    ("mixing", "boxes*", "cut_and_paste", 0),
    ("mixing", "kept*", "cut_and_paste", 1e-12),
    ("mixing", "targets", "mix", 1e-6),
    ("mixing", "mixed", "mix", 1e-6),
    ("soft_targets", "loss*", "mix, F.cross_entropy", (1e-6, RELATIVE)),
    ("soft_targets", "grad", "F.cross_entropy", (1e-6, RELATIVE)),
    ("moving_average", "average_*", "update_average", 1e-6),
    ("eval_transform", "result_*", "center_crop", 0),
    ("resized_crop", "results", "random_resized_crop", 0),
    ("resized_crop", "long_boxes", "random_resized_crop", 0),
]


# ---------------------------------------------------------------------------------------- the files
class Golden:
    """The arrays of one file, which remembers which of them were read."""

    def __init__(self, name):
        self.name = name
        if (FOLDER / f"{name}.npz").exists():
            self.arrays = dict(np.load(FOLDER / f"{name}.npz"))
        else:
            self.arrays = flatten(json.loads((FOLDER / f"{name}.json").read_text()))
        self.read = set()

    def __getitem__(self, key):
        """Numbers stored as float16 or in few bits become float32 and int64."""
        self.read.add(key)
        array = self.arrays[key]
        if isinstance(array, np.ndarray) and array.dtype in (np.float16, np.int16, np.int32):
            array = array.astype(np.float32 if array.dtype == np.float16 else np.int64)
        return array

    def tensor(self, key):
        return torch.from_numpy(np.asarray(self[key]))

    def double(self, key):
        return self.tensor(key).double()

    def variable(self, key):
        """A tensor that gets a gradient."""
        return self.tensor(key).requires_grad_()

    def numbers(self, prefix):
        """The 0, 1, ... that end the keys with a prefix."""
        ends = [key.removeprefix(prefix) for key in self.arrays if key.startswith(prefix)]
        return sorted(int(end) for end in ends if end.isdigit())

    def names(self, ending):
        """What precedes an ending in the keys."""
        return [key.removesuffix(ending) for key in self.arrays if key.endswith(ending)]


def flatten(data):
    """{"figures": {"body": {...}}} as {"figures_body": {...}}, as is if there is one level."""
    flat = {}
    for key, value in data.items():
        if key == "figures" and isinstance(next(iter(value.values())), dict):
            flat |= {f"figures_{part}": figures for part, figures in value.items()}
        else:
            flat[key] = value
    return flat


def to_array(values):
    if isinstance(values, torch.Tensor):
        values = values.detach()
    return np.asarray(values)


def difference(ours, theirs, scale=None):
    """Largest difference of two arrays, by the largest of theirs if `scale` is RELATIVE."""
    ours = to_array(ours)
    theirs = to_array(theirs)
    if ours.shape != theirs.shape:
        return math.inf
    if theirs.dtype.kind in "SU":
        return 0.0 if (ours == theirs).all() else math.inf
    ours = ours.astype(np.float64)
    theirs = theirs.astype(np.float64)
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return math.inf
    distance = np.nan_to_num(np.abs(ours - theirs)).max(initial=0)
    if distance and scale == RELATIVE:
        distance /= max(np.abs(theirs).max(), 1e-30)
    return float(distance)


FILES = sorted(path.stem for path in FOLDER.glob("*.*") if path.suffix in (".npz", ".json"))


@cache
def compute(name):
    """A file, and [(array, ours, theirs), ...] of what our functions make of it.

    The function of the file yields array and ours; theirs, too, if it is a part of the array.
    """
    golden = Golden(name)
    stem = name if name in globals() else name.rsplit("_", 1)[0]
    triples = []
    for key, ours, *theirs in globals()[stem](golden):
        expected = theirs[0] if theirs else golden[key]
        triples.append((key, ours, expected))
    return golden, triples


def find(name, pattern):
    """The (array, ours, theirs) of a file whose array's name fits a pattern."""
    triples = compute(name)[1]
    return [triple for triple in triples if fnmatch(triple[0], pattern)]


def rows():
    """(file, arrays, what of ours, limit, scale) of CHECKS, one row per file."""
    for files, arrays, ours, limit in CHECKS:
        limit, scale = limit if isinstance(limit, tuple) else (limit, None)
        for name in FILES:
            if fnmatch(name, files):
                yield name, arrays, ours, limit, scale


def row_name(value):
    return value if isinstance(value, str) and value != RELATIVE else ""


@pytest.mark.parametrize("name, arrays, ours, limit, scale", list(rows()), ids=row_name)
def test_ours_equals_theirs(name, arrays, ours, limit, scale):
    differences = {}
    for key, values, expected in find(name, arrays):
        differences[key] = difference(values, expected, scale)
    assert differences, f"{name} has no {arrays}"
    assert max(differences.values()) <= limit, f"{ours}: {differences}"


@pytest.mark.parametrize("name", FILES)
def test_every_array_is_used(name):
    golden, _ = compute(name)
    assert golden.arrays.keys() - golden.read == set()


@pytest.mark.parametrize("name", FILES)
def test_every_comparison_has_a_row(name):
    patterns = [arrays for row, arrays, *_ in rows() if row == name]
    for key, *_ in compute(name)[1]:
        assert any(fnmatch(key, pattern) for pattern in patterns), key


# ---------------------------------------------------------------------------------------- stand-ins
class Says(nn.Module):
    """A module whose output is given, whatever its input."""

    def __init__(self, output, channels=()):
        super().__init__()
        self.output = output
        self.channels = channels

    def forward(self, *_):
        return self.output


def say(values):
    """A function that returns the values one by one, whatever it is given."""
    values = iter(values)
    return lambda *_: next(values)


class Recorder:
    """Calls a function and remembers arguments and results, or calls `instead`."""

    def __init__(self, function, instead=None):
        self.function = instead or function
        self.calls = []
        self.results = []

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        self.results.append(self.function(*args, **kwargs))
        return self.results[-1]


def record(name, instead=None):
    """Put a Recorder in the place of train_dense.py's function."""
    recorder = Recorder(getattr(train_dense, name), instead)
    return patch.object(train_dense, name, recorder)


def make_task(*flags):
    """A task of train_dense.py, by its command line, in float32 on the CPU."""
    args, _ = train_dense.resolve_args([*flags, "--data", "x", "--amp", "none"])
    return train_dense.TASKS[args.task](args, torch.device("cpu"))


def level_sizes(height, width, strides):
    return [(math.ceil(height / s), math.ceil(width / s)) for s in strides]


def empty_maps(sizes, images=1):
    return [torch.zeros(images, 1, h, w) for h, w in sizes]


def gradients(total, *variables):
    return torch.autograd.grad(total, variables, retain_graph=True, materialize_grads=True)


# ---------------------------------------------------------------------------------------- detection
def make_retinanet(logits, deltas, sizes):
    """RetinaNet whose towers say `logits` and `deltas` of maps of the given sizes."""
    backbone = Says(None, channels=(1, 1, 1))
    model = train_dense.RetinaNet(backbone, logits.shape[2], dim=1)
    model.neck = Says(empty_maps(sizes, len(logits)))

    def run_tower(tower, _maps, _dim):
        return logits if tower is model.classifier else deltas
    model.run_tower = run_tower
    return model


def retinanet_loss(g):
    logits = g.variable("logits")
    deltas = g.variable("deltas")
    model = make_retinanet(logits, deltas, g["level_sizes"].tolist())
    images = torch.zeros(len(logits), 3, *g["batch_size"])
    targets = {"boxes": g.tensor("boxes"), "labels": g.tensor("labels")}
    with record("retinanet_losses") as recorder:
        losses = model.train()(images, g.tensor("sizes"), targets)
    yield "anchors", recorder.calls[0][2]
    yield "loss_cls", losses["loss_cls"]
    yield "loss_bbox", losses["loss_box"]
    yield "grad_logits", *gradients(losses["loss_cls"], logits)
    yield "grad_deltas", *gradients(losses["loss_box"], deltas)


def best_pairs(scores, counts, per_level):
    """The scores (A, K) with all but each level's best pairs of anchor and class set to 0."""
    kept = torch.zeros_like(scores)
    for ours, theirs in zip(kept.split(counts), scores.split(counts)):
        best = theirs.flatten().topk(min(per_level, theirs.numel())).indices
        ours.view(-1)[best] = theirs.flatten()[best]
    return kept


def retinanet_predict(g):
    """2.11.0 takes the best anchors of a level, as we do, 2.28.2 the best pairs with a class."""
    names = ("boxes", "scores", "labels")
    for case, (*size, H, W, per_level) in enumerate(g["cases"].tolist()):
        logits = g.tensor(f"logits_{case}")
        deltas = g.tensor(f"deltas_{case}")
        sizes = level_sizes(H, W, train_dense.RetinaNet.strides)
        model = make_retinanet(logits[None], deltas[None], sizes).eval()
        some_anchors = partial(train_dense.best_anchors, per_level=per_level)
        with record("best_anchors", some_anchors) as recorder:
            found = model(torch.zeros(1, 3, H, W), torch.tensor([size]))[0]
        for name, ours in zip(names, found):
            yield f"{name}_2_11_{case}", ours

        _, _, anchors, counts, _ = recorder.calls[0]
        scores = logits.sigmoid()
        above = [(level > 0.05).sum() for level in scores.split(counts)]
        yield f"pairs_above_{case}", above
        boxes = train_dense.clip_boxes(train_dense.decode(anchors, deltas), size)
        scores = best_pairs(scores, counts, per_level)
        of_pairs = train_dense.multiclass_nms(boxes[:, None], scores)
        for name, ours in zip(names, of_pairs):
            yield f"{name}_{case}", ours


def rpn_proposals(g):
    strides = train_dense.MaskRCNN.strides
    base = train_dense.base_anchors(strides, [8])
    for case, (*size, H, W, per_level, max_keep) in enumerate(g["cases"].tolist()):
        sizes = level_sizes(H, W, strides)
        counts = [h * w * base.shape[1] for h, w in sizes]
        anchors = train_dense.anchor_boxes(base, sizes, strides)
        scores = g.tensor(f"scores_{case}")
        deltas = g.tensor(f"deltas_{case}")
        with record("batched_nms") as recorder:
            proposals, = train_dense.select_proposals(
                scores[None], deltas[None], anchors, counts, torch.tensor([size]),
                per_level=per_level, max_keep=max_keep,
            )
        (_, candidate_scores, *_), = recorder.calls
        (kept,), = recorder.results
        kept_scores = candidate_scores[0, kept]
        yield f"proposals_{case}", proposals
        yield f"probabilities_{case}", kept_scores.sigmoid()


def make_mask_rcnn(kind, classes):
    """The model of "mask_rcnn", "cascade_mask_rcnn" or "cascade_BOXHEAD", all but empty."""
    backbone = Says(None, channels=(1, 1, 1, 1))
    box_head = "4conv1fc" if kind == "cascade_4conv1fc" else "2fc"
    cascade = kind.startswith("cascade")
    return train_dense.MaskRCNN(
        backbone, classes, rois=1, box_head=box_head, cascade=cascade, dim=1
    )


def rpn_loss(g):
    for name in g.names("_divisor"):
        model = make_mask_rcnn(name, classes=1).train()
        scores = g.variable(f"{name}_scores")
        deltas = g.variable(f"{name}_deltas")
        sizes = g[f"{name}_level_sizes"].tolist()
        model.neck = Says(empty_maps(sizes[:-1], len(scores)))
        model.rpn = Says((scores, deltas))
        model.propose = say([None])
        model.head_losses = say([{}])
        labels = g.tensor(f"{name}_labels")
        targets = {"boxes": g.tensor(f"{name}_boxes"), "labels": labels}
        images = torch.zeros(len(scores), 3, *g[f"{name}_batch_size"])
        with record("rpn_losses") as losses, record("random_sample") as sample:
            values = model(images, g.tensor(f"{name}_sizes"), targets)
        positive, negative, *_ = sample.calls[0]
        yield f"{name}_anchors", losses.calls[0][2]
        yield f"{name}_positive", positive
        yield f"{name}_negative", negative
        divisor = positive.sum(1).clamp(min=1).sum() + negative.sum(1).clamp(min=1).sum()
        yield f"{name}_divisor", divisor
        for ours, theirs, variable in (("cls", "scores", scores), ("box", "deltas", deltas)):
            loss = values[f"loss_rpn_{ours}"]
            key = f"{name}_loss_{ours}".replace("box", "bbox")
            yield key, loss
            key = f"{name}_grad_{theirs}"
            yield key, *gradients(loss, variable)


def box_loss(g):
    for name in g.names("_stds"):
        model = make_mask_rcnn(name, classes=1)
        cases = [key for key in g.names("_logits") if key.startswith(name) and "grad" not in key]
        for case in cases:
            logits = g.variable(f"{case}_logits")
            deltas = g.variable(f"{case}_deltas")
            labels = g.tensor(f"{case}_labels")
            positive = (labels < logits.shape[1] - 1).nonzero()[:, 0]
            loss_cls, loss_box = train_dense.box_losses(
                logits, deltas, g.tensor(f"{case}_rois"), labels, positive,
                g.tensor(f"{case}_targets"), g[f"{name}_stds"].tolist(), model.box_loss,
            )
            yield f"{case}_loss_cls", loss_cls
            yield f"{case}_loss_bbox", loss_box
            grad_logits, = gradients(loss_cls, logits)
            grad_deltas, = gradients(loss_box, deltas)
            yield f"{case}_grad_logits", grad_logits
            yield f"{case}_grad_deltas", grad_deltas


def detect(model, proposals, size):
    """`MaskRCNN.detect`, and the RoIs of each call of `pool_rois`."""
    def pool_nothing(_maps, rois, S, _strides):
        return torch.zeros(len(rois), 1, S, S)
    with record("pool_rois", pool_nothing) as recorder:
        detections = model.detect([], 0, proposals, size)
    return detections, [rois[:, 1:] for _, rois, *_ in recorder.calls]


def box_predict(g):
    size = g["size"].tolist()
    for name in g.names("_proposals"):
        logits = g.tensor(f"{name}_logits")
        deltas = g.tensor(f"{name}_deltas")
        model = make_mask_rcnn(name, classes=logits.shape[2] - 1)
        model.box_heads = nn.ModuleList(Says(pair) for pair in zip(logits, deltas))
        stds = [stage["stds"] for stage in model.stages]
        yield f"{name}_stds", stds, g["stds"][:len(stds)]
        (boxes, scores, labels, _), rois = detect(model, g.tensor(f"{name}_proposals"), size)
        yield f"{name}_boxes", boxes
        yield f"{name}_scores", scores
        yield f"{name}_labels", labels
        if model.cascade:
            refined = torch.stack(rois[1:len(logits)])
            yield f"{name}_stage_rois", refined
    yield "mask_ensemble", ensemble_masks(model, g.tensor("mask_logits"))


def ensemble_masks(cascade, mask_logits):
    """The masks (n, K, S, S) of a cascade whose mask heads say `mask_logits` (3, n, K, S, S)."""
    masks = []
    n, K = mask_logits.shape[1:3]
    cascade.mask_heads = nn.ModuleList(Says(x) for x in mask_logits)
    proposals = torch.zeros(len(cascade.box_heads[0].output[0]), 4)
    for label in range(K):
        kept = torch.zeros(n, 4), torch.zeros(n), torch.full((n,), label)
        with patch.object(train_dense, "multiclass_nms", say([kept])):
            detections, _ = detect(cascade, proposals, (1, 1))
        masks.append(detections[3])
    return torch.stack(masks, 1)


def assign(g):
    boxes = g.tensor("boxes")
    objects = g.tensor("objects")
    yield "iou", train_dense.box_iou(boxes, objects)
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    for name in g.names("_setting"):
        positive, negative, min_pos_iou, match_low_quality = g[f"{name}_setting"].tolist()
        for label, ending in ((0, "index"), (-1, "index_without_objects")):     # -1: padding
            labels = torch.full((1, len(objects)), label)
            matched = train_dense.assign(
                objects[None], labels, boxes, valid,
                positive_iou=positive, negative_iou=negative, min_pos_iou=min_pos_iou,
                match_low_quality=bool(match_low_quality),
            )
            number = matched.object_index[0] + 1
            number[~matched.positive[0]] = -1
            number[matched.negative[0]] = 0
            yield f"{name}_{ending}", number


def deltas(g):
    boxes = g.tensor("boxes")
    stds = torch.tensor(g["stds"].tolist())
    encoded = train_dense.encode(boxes, g.tensor("targets"))
    yield "encoded", encoded
    yield "encoded_stds", encoded / stds
    decoded = train_dense.decode(boxes, g.tensor("deltas"))
    yield "decoded", decoded
    clipped = train_dense.clip_boxes(decoded, g["clip_size"].tolist())
    yield "decoded_clipped", clipped
    decoded = train_dense.decode(boxes, g.tensor("deltas") * stds)
    yield "decoded_stds", decoded


def nms(g):
    boxes = g.tensor("boxes")
    for threshold in (0.5, 0.7):
        keep = train_dense.nms(boxes, g.tensor("scores"), threshold, len(boxes))
        yield f"keep_{threshold}", keep


def align(g, prefix, S, ratio, rois):
    """Output and gradient of RoIAlign; ratio: samples of a bin along each axis, 0 is adaptive."""
    features = g.double("features").requires_grad_()
    level = torch.zeros(len(rois), dtype=torch.long)
    samples = torch.Tensor.ceil
    if ratio:           # a bin has as many samples as its size, rounded up by the only ceil()
        samples = partial(torch.full_like, fill_value=ratio)
    with patch.object(torch.Tensor, "ceil", lambda size: samples(size)):
        output = train_dense.align_levels([features], level, rois, S, [float(g["spatial_scale"])])
    upstream = g.double(f"{prefix}upstream_{S}_{ratio}")
    grad, = gradients((output * upstream).sum(), features)
    return output, grad


def roi_align(g, prefix=""):
    for name in g.arrays:
        if name.startswith(f"{prefix}output_"):
            S, ratio = map(int, name.split("_")[-2:])
            rois = g.double("rois")
            if len(g[name]) < len(rois):
                rois = rois[2:5]
            output, grad = align(g, prefix, S, ratio, rois)
            yield name, output
            name = name.replace("output", "grad")
            yield name, grad


def roi_levels(g):
    strides = g["strides"].tolist()
    rois = g.double("rois")
    maps = [g.double(f"features_{i}").requires_grad_() for i in range(len(strides))]
    with record("align_levels") as recorder:
        output = train_dense.pool_rois(maps, rois, g["output"].shape[2], strides)
        train_dense.pool_rois(maps, g.double("more_rois"), 1, strides)
    yield "levels", recorder.calls[0][1]
    yield "more_levels", recorder.calls[1][1]
    yield "output", output
    grads = gradients((output * g.double("upstream")).sum(), *maps)
    for i, grad in enumerate(grads):
        yield f"grad_{i}", grad


def masks(g):
    """Where theirs is `undecided`, within rounding of 1/2, either answer is right."""
    side = g["targets"].shape[1]
    targets = train_dense.mask_targets(
        g.tensor("bitmaps"), g.tensor("boxes"), g.tensor("index"), side
    )
    decided = ~g["undecided"]
    yield "targets", targets[decided], g["targets"][decided]
    logits = g.tensor("paste_logits")
    size = g["paste_size"].tolist()
    pasted = train_dense.paste_masks(logits.sigmoid(), g.tensor("paste_boxes"), size)
    yield "pasted", pasted[:len(g["pasted"])]
    decided = ~g["paste_undecided"]
    yield "pasted_set", (pasted >= 0.5)[decided], g["pasted_set"][decided]
    labels = torch.zeros(len(logits), dtype=torch.long)
    loss = train_dense.mask_loss(logits[:, None], labels, g.tensor("loss_targets"))
    yield "loss", loss[None]


def torchvision_ops(g):
    boxes = g.tensor("boxes")
    scores = g.tensor("scores")
    yield "keep_05", train_dense.nms(boxes, scores, 0.5, len(boxes))
    yield "keep_07", train_dense.nms(boxes, scores, 0.7, len(boxes))
    keep = train_dense.nms_by_class(boxes, scores, g.tensor("classes"), 0.5, len(boxes))
    yield "keep_by_class_05", keep

    logits = g.double("focal_logits").requires_grad_()
    loss = train_dense.focal_loss(logits, g.tensor("focal_targets"))
    yield "focal_loss", loss
    yield "focal_grad", *gradients(loss.sum(), logits)

    boxes = g.double("giou_boxes").requires_grad_()
    targets = g.double("giou_targets")
    loss = train_dense.giou_loss(boxes, targets)
    yield "giou_loss", loss
    grad, = gradients(loss.sum(), boxes)
    unique = ~has_shared_edge(boxes, targets)
    yield "giou_grad", grad[unique], g["giou_grad"][unique]
    yield from roi_align(g, "roi_")


def has_shared_edge(boxes, targets):
    """Whether two edges lie on one line, where the gradient of GIoU is not unique: (n,)."""
    start, end = boxes.detach().chunk(2, 1)
    target_start, target_end = targets.chunk(2, 1)
    same = (start == target_start) | (end == target_end)
    return (same | (start == target_end) | (end == target_start)).any(1)


# ------------------------------------------------------------------------------------- segmentation
def segmentation_loss(g):
    for name in g.names("_labels"):
        logits = g.variable(f"{name}_logits")
        auxiliary = g.variable(f"{name}_auxiliary")
        losses = train_dense.segmentation_losses((logits, auxiliary), g.tensor(f"{name}_labels"))
        yield f"{name}_loss", losses["loss_seg"]
        yield f"{name}_loss_auxiliary", losses["loss_aux"]
        grad_logits, = gradients(losses["loss_seg"], logits)
        grad_auxiliary, = gradients(losses["loss_aux"], auxiliary)
        yield f"{name}_grad_logits", grad_logits
        yield f"{name}_grad_auxiliary", grad_auxiliary


def segmentation_metrics(g):
    classes = int(g["classes"])
    for case in range(g["cases"]):
        counts = 0
        for i in range(g["images"]):
            prediction = g[f"{case}_prediction_{i}"]
            truth = g[f"{case}_truth_{i}"]
            counts = counts + train_dense.count_pixels(prediction, truth, classes)
        intersection, predicted, labelled = counts
        with np.errstate(invalid="ignore"):
            iou = intersection / (predicted + labelled - intersection)
            accuracy = intersection / labelled
        yield f"{case}_IoU", iou
        yield f"{case}_Acc", accuracy
        for name, value in train_dense.mean_iou(counts).items():
            yield f"{case}_{name}", value


def segmentation_scales(g):
    """A network that says the given logits of each input in turn."""
    image = Image.new("RGB", tuple(g["image_size"].tolist()))
    logits = [g.tensor(f"logits_{i}") for i in g.numbers("logits_")]
    size = int(g["network_size"])

    def predict(outputs, *flags):
        model = Recorder(say(outputs))
        task = make_task("--task", "semfpn", "--img-size", str(size), *flags)
        labels = task.predict(model, image)
        return labels, [x.shape[2:] for x, in model.calls]
    labels, inputs = predict(logits, "--ms-test")
    decided = ~g["undecided"]
    yield "labels", labels[decided], g["labels"][decided]
    yield "inputs", inputs
    ratios = np.min(inputs, 1)[::2] / size      # rounded to whole pixels
    yield "ratios", ratios
    unscaled = 2 * g["ratios"].tolist().index(1)
    labels, _ = predict(logits[unscaled:])
    decided = ~g["undecided_single"]
    yield "labels_single", labels[decided], g["labels_single"][decided]


# --------------------------------------------------------------------------------------------- pose
def pose_body(g):
    for K in g.numbers("sigmas_"):
        yield f"mirrored_{K}", train_dense.MIRROR_ORDER[:K]
        yield f"sigmas_{K}", train_dense.SIGMAS[:K]
        numbered = np.arange(K)[:, None].repeat(3, 1)
        prefer_upper = SimpleNamespace(gauss=lambda *_: 0)
        upper = train_dense.half_body(numbered, np.ones(K, bool), prefer_upper)
        yield f"upper_body_{K}", upper[:, 0]


def pose_frames(g):
    centres, sizes = train_dense.crop_frame(g["boxes"].astype(float), train_dense.BOX_PADDING)
    yield "centres", centres
    yield "sizes", sizes


def pose_affine(g):
    image = Image.new("RGB", (8, 8))
    points = F.pad(g.double("points"), (0, 1)).numpy()      # with visibility
    frames = zip(points, g["centres"], g["sizes"], np.radians(g["degrees"]))
    crops = []
    for person, centre, size, angle in frames:
        frame = person, centre.astype(float), size.astype(float), angle
        _, moved = train_dense.crop_person(image, *frame, int(g["crop_height"]))
        crops.append(moved[:, :2])
    yield "crop_points", crops


def pose_targets(g):
    points = g.tensor("points")
    W, H = g["crop_size"].tolist()
    size = (H // train_dense.STRIDE, W // train_dense.STRIDE)
    targets, weights = train_dense.gaussian_maps(points, size)
    yield "targets", targets
    yield "weights", weights
    heat_maps = g.variable("heat_maps")
    model = train_dense.SimpleBaseline(Says([heat_maps], channels=(1,)), points.shape[1], dim=1)
    model.deconvs = nn.Identity()
    model.classifier = nn.Identity()
    loss = model.train()(None, points)["loss_heatmap"]
    yield "loss", loss
    grad, = gradients(loss, heat_maps)
    yield "grad", grad[:, :g["grad"].shape[1]]
    targets, weights = train_dense.gaussian_maps(g.tensor("edge_points")[None], size)
    yield "edge_weights", weights[0]
    yield "edge_map_sums", targets[0].sum((1, 2))


def predict_pose(model, boxes, K, height):
    """`Pose.predict` on an empty image, with recorders of `mean_of_mirrored` and `oks_nms`."""
    task = make_task("--task", "pose", "--keypoints", str(K))
    task.args.img_size = height         # which the command line wants to be a multiple of 128
    image = Image.new("RGB", (8, 8))
    with record("mean_of_mirrored") as merge, record("oks_nms") as suppress:
        points, scores = task.predict(model, image, boxes)
    return merge, suppress, points, scores


def pose_decode(g):
    maps = g.tensor("heat_maps")
    sizes = g["sizes"].astype(float) / train_dense.BOX_PADDING
    corners = g["centres"].astype(float) - sizes / 2
    boxes = np.concatenate([corners, sizes, np.ones((len(maps), 1))], 1)
    height = train_dense.STRIDE * maps.shape[2]
    with patch.object(train_dense, "mean_of_mirrored", say([maps])):
        _, suppress, *_ = predict_pose(None, boxes, maps.shape[1], height)
    points = suppress.calls[0][0]
    yield "points", points[..., :2]
    yield "confidences", points[..., 2]


def pose_estimate(g):
    maps = [g.tensor("heat_maps"), g.tensor("heat_maps_mirrored")]
    K, h = maps[0].shape[1:3]
    height = train_dense.STRIDE * h
    merge, suppress, _, scores = predict_pose(say(maps), g["boxes"], K, height)
    yield "merged", merge.results[0][:len(g["merged"])]
    points, _, areas, _ = suppress.calls[0]
    yield "points", points
    yield "areas", areas
    yield "kept", suppress.results[0]
    yield "scores", scores


def pose_nms(g):
    for K in g.numbers("points_"):
        points = g[f"points_{K}"].astype(float)
        areas = g[f"areas_{K}"]
        sigmas = train_dense.SIGMAS[:K]
        keep = train_dense.oks_nms(points, g[f"scores_{K}"], areas, sigmas)
        yield f"keep_{K}", keep
        theirs = g[f"similarity_{K}"]
        ours = np.full(theirs.shape, np.nan)
        for i, j in np.ndindex(*theirs.shape):
            pair = [i, j]
            ours[i, j] = bracket(points[pair], areas[pair], sigmas, theirs[i, j])
        yield f"similarity_{K}", ours, theirs


def bracket(points, areas, sigmas, similarity):
    """`similarity` if the second of two persons is dropped just below it and kept just above."""
    count = []
    for threshold in (similarity - 1e-6, similarity + 1e-6):
        with patch.object(train_dense, "OKS_NMS_THRESHOLD", threshold):
            keep = train_dense.oks_nms(points, np.array([1.0, 0.5]), areas, sigmas)
        count.append(len(keep))
    return similarity if count == [1, 2] else np.nan


# -------------------------------------------------------------------------------------------- rates
FLAGS = {  # of train_dense.py, for each of the schedules
    "semfpn": ("--task", "semfpn"),
    "upernet": ("--task", "upernet"),
    "retinanet_1x": ("--task", "retinanet", "--schedule", "1x"),
    "mask_rcnn_1x": ("--task", "mask_rcnn", "--schedule", "1x"),
    "cascade_3x": ("--task", "cascade_mask_rcnn", "--schedule", "3x"),
    "pose": ("--task", "pose"),
}


def schedules(g):
    for name in g.names("_rates"):
        total = int(g[f"{name}_total"])
        first = str(g[f"{name}_first"])
        task = make_task(*FLAGS[name], "--lr", first)
        updates = g[f"{name}_updates"].tolist()
        rates = [task.lr_at(step, total, None) for step in updates]
        yield f"{name}_rates", rates


def cosine(g):
    for case in g.numbers("setting_"):
        peak, floor, total, warmup, start = g[f"setting_{case}"].tolist()
        rates = []
        for step in g[f"updates_{case}"].tolist():
            with patch.object(train_imagenet, "WARMUP_START", start):
                schedule = dict(peak=peak, floor=floor, warmup=warmup, total=total)
                rates.append(train_imagenet.lr_at(step, **schedule))
        yield f"rates_{case}", rates


# --------------------------------------------------------------------------------------------- COCO
def by_image(entries, images):
    groups = {image["id"]: [] for image in images}
    for entry in entries:
        groups[entry["image_id"]].append(entry)
    return groups


def score(truth, results, kind):
    """The metrics of results of boxes or masks."""
    annotations = by_image(truth["annotations"], truth["images"])
    results = by_image(results, truth["images"])
    matches = []
    for image in truth["images"]:
        pair = annotations[image["id"]], results[image["id"]]
        matches.append(train_dense.match_image(image, *pair, kind))
    categories = [category["id"] for category in truth["categories"]]
    return train_dense.accumulate(matches, kind, categories)


def score_persons(truth, results, K):
    """The metrics of each part of the body."""
    annotations = by_image(truth["annotations"], truth["images"])
    results = by_image(results, truth["images"])
    records = []
    for image_id, persons in annotations.items():
        pairs = [(r, train_dense.read_points(r, K, "result")) for r in results[image_id]]
        records.append(train_dense.match_persons(image_id, persons, pairs, K))
    metrics = {}
    for part in records[0]:
        matches = [record[part] for record in records]
        metrics[part] = train_dense.accumulate(matches, "keypoints", [train_dense.PERSON])
    return metrics


def aligned(ours, theirs):
    """Two dicts of numbers as lists, in the order of theirs."""
    assert ours.keys() == theirs.keys()
    return [ours[name] for name in theirs], list(theirs.values())


def coco_bbox(g):
    truth = g["truth"]
    yield "figures", *aligned(score(truth, g["results"], "bbox"), g["figures"])
    first = truth["annotations"][:3]
    crowds = [annotation | {"iscrowd": 1} for annotation in first]
    ours = score(truth | {"annotations": crowds}, g["results"], "bbox")
    key = "figures_of_first_three_as_crowds"
    yield key, *aligned(ours, g[key])


def coco_segm(g):
    yield "figures", *aligned(score(g["truth"], g["results"], "segm"), g["figures"])


def coco_keypoints(g):
    ours = score_persons(g["truth"], g["results"], 17)["body"]
    yield "figures", *aligned(ours, g["figures"])


def coco_wholebody(g):
    for part, ours in score_persons(g["truth"], g["results"], 133).items():
        yield f"figures_{part}", *aligned(ours, g[f"figures_{part}"])


def split_masks(pixels, sizes):
    """Masks stored row by row, one after the other."""
    ends = np.cumsum(sizes.prod(1))
    flat = np.split(pixels, ends[:-1])
    return [mask.reshape(*size) for mask, size in zip(flat, sizes)]


def rle(g):
    bitmaps = split_masks(g["bits"], g["sizes"])
    counts = [train_dense.rle_encode(mask)["counts"].encode() for mask in bitmaps]
    yield "counts", counts
    decoded = []
    for size, text in zip(g["sizes"].tolist(), g["counts"].tolist()):
        mask = train_dense.rle_decode({"size": size, "counts": text})
        decoded.append(mask.ravel())
    yield "bits", np.concatenate(decoded)


def polygons(g):
    ends = np.cumsum(g["lengths"])
    outlines = np.split(g["coordinates"], ends[:-1])
    ours = []
    for number, size in enumerate(g["sizes"].tolist()):
        of_mask = np.flatnonzero(g["owners"] == number)
        coordinates = [outlines[i].tolist() for i in of_mask]
        ours.append(train_dense.polygons_to_mask(coordinates, *size).ravel())
    yield "rasters", np.concatenate(ours)


# ----------------------------------------------------------------------------------- classification
def randaugment(g):
    image = Image.fromarray(g["image"])
    order = g["order"].tolist()
    assert len(order) == len(train_imagenet.RANDAUGMENT)
    results = []
    for name, m, sign in zip(g["names"], g["magnitudes"].tolist(), g["signs"].tolist()):
        operation = train_imagenet.RANDAUGMENT[order.index(name)]
        results.append(np.asarray(operation(image, m, sign)))
    yield "results", results
    yield "fill", train_imagenet.FILL


def rectangles(boxes, size):
    """Boolean maps of boxes (n, 4): top, bottom, left, right."""
    H, W = size
    maps = np.zeros((len(boxes), H, W), bool)
    for inside, (top, bottom, left, right) in zip(maps, boxes):
        inside[top:bottom, left:right] = True
    return maps


def mixing(g):
    """timm 1.0.31 cuts boxes of an odd side one pixel larger at the far end, 0.4.12 as we do."""
    size = g["size"].tolist()
    pair = torch.stack([torch.zeros(1, *size), torch.ones(1, *size)])
    pasted = []
    kept = []
    for lam, y, x in zip(g["lam"], g["centre_y"].tolist(), g["centre_x"].tolist()):
        rng = SimpleNamespace(randrange=say([y, x]))
        mixed, fraction = train_imagenet.cut_and_paste(pair, lam, rng)
        pasted.append(mixed[0, 0].bool().numpy())
        kept.append(fraction)
    boxes = g["boxes_0_4_12"]
    yield "boxes_0_4_12", pasted, rectangles(boxes, size)
    yield "kept_0_4_12", kept

    sides = np.sqrt(1 - g["lam"])[:, None] * size               # (n, 2): h, w
    larger = np.minimum(boxes[:, 1::2] + sides.astype(int) % 2, size)
    newer = np.stack([boxes[:, 0], larger[:, 0], boxes[:, 2], larger[:, 1]], 1)
    yield "boxes", newer
    area = (newer[:, 1] - newer[:, 0]) * (newer[:, 3] - newer[:, 2])
    yield "kept", 1 - area / np.prod(size)
    yield from mixup(g)


def mixup(g):
    images = g.tensor("images")
    mixed = []
    targets = []
    for weight in g["weights"].tolist():
        rng = SimpleNamespace(betavariate=say([weight]))
        x, target = train_imagenet.mix(
            images, g.tensor("labels"), classes=int(g["classes"]),
            smoothing=float(g["smoothing"]), mixup=1.0, cutmix=0.0, rng=rng,
        )
        mixed.append(x.numpy())
        targets.append(target.numpy())
    yield "mixed", mixed[:len(g["mixed"])]
    yield "targets", targets


def soft_targets(g):
    logits = g.variable("logits")
    loss = F.cross_entropy(logits, g.tensor("targets"))
    yield "loss", loss
    yield "grad", *gradients(loss, logits)
    _, targets = train_imagenet.mix(
        logits, g.tensor("labels"), classes=logits.shape[1], smoothing=float(g["smoothing"]),
        mixup=0.0, cutmix=0.0, rng=None,
    )
    yield "loss_smoothed", F.cross_entropy(logits, targets)


def moving_average(g):
    """timm averages the number of batches, too, and cuts it to a whole number; we copy it."""
    decay = float(g["decay"])
    average = nn.BatchNorm1d(len(g["start.weight"]))
    current = nn.BatchNorm1d(len(g["start.weight"]))
    average.load_state_dict({key: g.tensor(f"start.{key}") for key in average.state_dict()})
    count = int(g["start.num_batches_tracked"])
    for update in range(len(g.names("num_batches_tracked")) // 2):
        prefix = f"current_{update}."
        current.load_state_dict({key: g.tensor(prefix + key) for key in current.state_dict()})
        train_imagenet.update_average(average, current, decay)
        for key, ours in average.state_dict().items():
            if key == "num_batches_tracked":
                assert ours == current.num_batches_tracked
                count = int(decay * count + (1 - decay) * int(ours))
                ours = torch.tensor(count)
            ours = ours.clone()                 # since the next update changes it
            yield f"average_{update}.{key}", ours


def eval_transform(g):
    for case in g.numbers("image_"):
        image = Image.fromarray(g[f"image_{case}"])
        size = int(g[f"size_{case}"])
        cropped = train_imagenet.center_crop(image, size, float(g[f"share_{case}"]))
        yield f"result_{case}", np.asarray(cropped)


def crop(image, size, box):
    """`random_resized_crop` of a box: top, left, height, width."""
    top, left, height, width = box
    rng = SimpleNamespace(randint=say([left, top]))
    with patch.object(train_imagenet, "random_sides", lambda *_: (width, height)):
        return train_imagenet.random_resized_crop(image, size, 0.08, rng)


def resized_crop(g):
    image = Image.fromarray(g["image"])
    size = int(g["size"])
    results = [np.asarray(crop(image, size, box)) for box in g["boxes"].tolist()]
    yield "results", results
    boxes = []
    for W, H in g["long_sizes"].tolist():
        with patch.object(Image.Image, "crop", return_value=Image.new("RGB", (9, 9))) as cut:
            crop(Image.new("RGB", (W, H)), size, (0, 0, H + 1, W + 1))  # never fits
        left, top, right, bottom = cut.call_args.args[0]
        boxes.append((top, left, bottom - top, right - left))
    yield "long_boxes", boxes


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, arrays, ours, limit, scale in rows():
        seen = max(difference(*pair, scale) for _, *pair in find(name, arrays))
        print(f"{name:22s} {arrays:16s} {ours:40s} {seen:8.1e} of {limit:g} {scale or ''}")
