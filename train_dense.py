"""Train, evaluate and use the backbones for semantic segmentation, object detection and pose.

    python train_dense.py                          # no data needed: Semantic FPN on drawn scenes
    python train_dense.py --task retinanet
    torchrun --nproc-per-node 8 train_dense.py --task upernet --backbone stvit_s \\
        --backbone-weights runs/s/best.pt --data /data/ade20k --resume auto
    python train_dense.py --eval --ms-test --weights runs/upernet_stvit_s/best.pt
    python train_dense.py --predict a.jpg folder --weights runs/upernet_stvit_s/best.pt
    python train_dense.py --task retinanet --score results.json --data /data/coco
    python train_dense.py --eval --boxes detections.json --weights runs/pose_clustr_s/best.pt

One chapter per task: settings and what all tasks share; segmentation; RetinaNet; Mask R-CNN; pose;
COCO's files, masks and metrics; drawn scenes; command line. A chapter follows the data: files,
augmentation, model, loss, inference, task. The training loop is train_imagenet.py's; a task object
gives it data, model, losses and metrics. So randomness depends on seed, epoch, step and sample
only, a resumed run continues exactly, and a user's mistake ends in one line on stderr.

Letters: B batch, C channels, H x W a map, K classes, A anchors, G objects of an image (padded to
the largest number in the batch). Boxes are float x1, y1, x2, y2 in pixels, their width x2 - x1;
COCO's files hold x, y, width, height. Keypoints are x, y, v: pixels, (0, 0) the centre of the first
one, and visibility (labelled if > 0) or, in results, confidence.

Rules are those of mmsegmentation 0.x, mmdetection 2.x and mmpose 0.x, which the papers used;
tests/test_golden.py compares them, see "Checked against" in the README. Known differences:

    resizing     Pillow smooths images that it shrinks. Of labels and masks it takes the pixel that
                 is nearest to the centre, OpenCV the one above and to the left of it (1.8 % of a
                 mask's area differ).
    person crop  Pillow cuts fractions of a value off, OpenCV rounds: on average 0.5 of 255 darker.
    hue          Pillow has 256 steps per turn, OpenCV 180.
    sampling     `GroupSampler` fills the last micro-batch of each orientation, mmdetection that of
                 all GPUs: up to 14 images more per orientation and epoch with 8 GPUs and 16 images
                 per update.
    candidates   RetinaNet's are a level's best anchors, as in mmdetection 2.11 (which Swin used);
                 2.28 takes the best pairs of anchor and class.
    mask heads   of the cascade start like Mask R-CNN's, as in 2.11. In 2.28 deconvolution and
                 classifier have a deviation of 0.018 and 0.036 instead of 0.044 and 0.158.
    test sizes   Segmentation is tested at mmsegmentation's; PVT's code, which the papers follow for
                 Semantic FPN, enlarges both sides to multiples of 32.
    decay        SecViT's three down-sampling norms decay with the weights; mmdetection exempts them
                 where it exempts norms, since the authors' names for them hold "norm".

ClusTR's paper does not say which head its pose result has; ours is mmpose's plain one.
"""
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # as in train_imagenet.py
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

import train_imagenet
from train_imagenet import (
    COUNT,
    FRACTION,
    MODELS,
    NOT_NEGATIVE,
    ON_OFF,
    RUN_FLAGS,
    Flag,
    InputError,
    OnceFlag,
    StepSampler,
    autocast,
    bounded,
    nonempty,
    normalize,
    read_image,
    replace_flags,
)

# ----------------------------------------------------------------------------------------- settings
SEGMENTATION = ("semfpn", "upernet")
DETECTION = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")
SCHEDULES = {  # epochs in all, and the epochs after which the learning rate is divided by ten
    "1x": (12, (8, 11)),
    "3x": (36, (27, 33)),
    "pose": (210, (170, 200)),
}
POWERS = {"semfpn": 0.9, "upernet": 1.0}  # of the polynomial by which the learning rate decays
MAX_MICRO_BATCH = {  # unless --micro-batch is given
    "semfpn": 16,
    "upernet": 16,
    "retinanet": 2,  # detection: the papers' losses are means over two images
    "mask_rcnn": 2,
    "cascade_mask_rcnn": 2,
    "pose": 64,
    "drawn detection": 16,
}
FLAGS = {
    "task": Flag(nonempty, "semfpn",
                 f"one of {', '.join((*SEGMENTATION, *DETECTION, 'pose'))}"),
    "backbone": Flag(nonempty, "secvit_s", f"one of {', '.join(MODELS)}"),
    "backbone_weights": Flag(nonempty, None, "classification weights to start from: "
                             "train_imagenet.py's, whose model is then the default, or an authors' "
                             "file"),
    "data": OnceFlag(nonempty, None, "folder in ADE20K's layout (segmentation) or COCO's; default: "
                     "drawn scenes"),
    "iters": Flag(COUNT, None, "length of training in updates"),
    "epochs": Flag(COUNT, None, "length of training in epochs; default: the schedule's"),
    **RUN_FLAGS,
    "drop_path": RUN_FLAGS["drop_path"]._replace(
        default=0.1, help="stochastic depth of the last block; default of SecViT and SEC-*: the "
                          "classifier's"),
    "weights": OnceFlag(nonempty, None, "checkpoint of this script to evaluate or predict with, or "
                        "to start from on other data; heads of other classes are left out"),
    "batch_size": Flag(COUNT, 16, "images (pose: persons) per update, over all processes"),
    "lr": Flag(NOT_NEGATIVE, 1e-4, "peak learning rate, never rescaled"),
    "min_lr": Flag(NOT_NEGATIVE, 0.0, "learning rate at the end of segmentation's polynomial"),
    "warmup_iters": Flag(bounded(int, 0), 500, "linear warm-up"),
    "weight_decay": Flag(NOT_NEGATIVE, 1e-4, "AdamW's weight decay"),
    "norm_decay": Flag(ON_OFF, True, "whether it applies to norms, too"),
    "img_size": Flag(bounded(int, 64, 8192), 800, "crop side (segmentation), crop height "
                     "(pose), shorter side (detection)"),
    "frozen_bn": Flag(ON_OFF, None, "backbone BatchNorm statistics fixed; default on with "
                      "--backbone-weights and --weights"),
    "sync_bn": Flag(ON_OFF, False, "batch statistics over all GPUs"),
    "eval_every": Flag(COUNT, None, "updates between evaluations; default a tenth of --iters, or "
                       "an epoch"),
    "schedule": Flag(("1x", "3x"), None, "detection: 12 epochs at one size, or 36 at many and "
                     "cropped; sets --epochs"),
    "rois": Flag(bounded(int, 4), None, "regions per image that Mask R-CNN's heads learn from"),
    "box_head": Flag(("4conv1fc", "2fc"), None, "the cascade's: that of the published results, or "
                     "mmdetection's base one"),
    "zero_is_class": Flag(bool, False, "segmentation: label 0 of the PNGs is the first class, not "
                          "ignored (mmsegmentation's reduce_zero_label=False)"),
    "ms_test": OnceFlag(bool, False, "evaluate segmentation at six scales, each also mirrored"),
    "keypoints": Flag((133, 17), None, "pose: the whole body, or COCO's 17"),
    "jitter": Flag(FRACTION, None, "strength of pose's augmentation; weak on small data sets"),
    "boxes": OnceFlag(nonempty, None, "COCO results file; pose uses its person boxes instead of "
                      "the annotated ones"),
    "results": OnceFlag(nonempty, None, "with --eval: write what was predicted to this file in "
                        "COCO's format (Mask R-CNN: NAME.bbox.json and NAME.segm.json), or to this "
                        "folder as label PNGs (segmentation)"),
    "predict": OnceFlag(nonempty, None, "write overlays of these images, or of all images in these "
                        "folders, to --output; print what they show as JSON lines", several=True),
    "threshold": OnceFlag(FRACTION, 0.3, "with --predict: score from which on objects, or "
                          "keypoints, are shown and counted"),
    "score": OnceFlag(nonempty, None, "score a COCO results file, or a folder of label PNGs, "
                      "without a model"),
}
TASK_FLAGS = {  # flags that only some tasks have, and these tasks
    "schedule": DETECTION,
    "rois": ("mask_rcnn", "cascade_mask_rcnn"),
    "box_head": ("cascade_mask_rcnn",),
    "zero_is_class": SEGMENTATION,
    "ms_test": SEGMENTATION,
    "keypoints": ("pose",),
    "boxes": ("pose",),
    "jitter": ("pose",),
    "threshold": (*DETECTION, "pose"),
    "compile": ("semfpn", "upernet", "retinanet", "pose"),  # the others' regions vary in number
}
ARCHITECTURE = ("task", "backbone", "released", "option", "box_head")  # what --weights decides
OVERRIDES = {  # defaults of a backbone, a task, a family's paper, the drawn scenes; last one wins
    "secvit": dict(drop_path=None),                              # the classifier's
    "sec": dict(drop_path=None),
    "stvit_b": dict(drop_path=0.3),
    "stvit_l": dict(drop_path=0.3),
    # Semantic FPN, RetinaNet: PVT's settings; UPerNet, Cascade Mask R-CNN: Swin's; pose: TCFormer's
    "semfpn": dict(iters=80000, warmup_iters=0, img_size=512, sync_bn=True),
    "upernet": dict(iters=160000, lr=6e-5, weight_decay=0.01, norm_decay=False, warmup_iters=1500,
                    img_size=512, sync_bn=True, drop_path=0.3),
    "retinanet": dict(schedule="1x"),
    "mask_rcnn": dict(schedule="1x", weight_decay=0.05, norm_decay=False, rois=512,
                      box_head="2fc"),
    "cascade_mask_rcnn": dict(schedule="3x", weight_decay=0.05, norm_decay=False, rois=512,
                              box_head="4conv1fc", sync_bn=True),
    "pose": dict(schedule="pose", batch_size=512, lr=5e-4, weight_decay=0.01,
                 img_size=256, keypoints=133, jitter=1.0, drop_path=0.0),
    "secvit upernet": dict(drop_path=None),
    "sec upernet": dict(drop_path=None),
    "linglo semfpn": dict(iters=40000, batch_size=32),           # its sec. 4.3
    # PVT's, since LinGlo's paper has none, and PVTv2's, whose defaults ClusTR's paper uses
    "linglo mask_rcnn": dict(lr=2e-4, weight_decay=1e-4, norm_decay=True),
    "clustr mask_rcnn": dict(lr=2e-4, weight_decay=1e-4, norm_decay=True),
    "drawn scenes": dict(backbone="linglo_b0", batch_size=4, lr=3e-4, img_size=128,
                         warmup_iters=100, drop_path=0.0),
    "drawn semfpn": dict(iters=660, lr=1e-3, img_size=96, warmup_iters=50, eval_every=220),
    "drawn upernet": dict(iters=300, lr=1e-3, img_size=80, warmup_iters=50, eval_every=150),
    "drawn retinanet": dict(epochs=8, eval_every=192, clip_grad=1.0),
    "drawn mask_rcnn": dict(epochs=5, eval_every=240, rois=32, clip_grad=1.0),
    "drawn cascade_mask_rcnn": dict(epochs=5, eval_every=480, schedule="1x", rois=16,
                                    clip_grad=1.0, box_head="2fc"),  # 4conv1fc: nine times the work
    "drawn pose": dict(epochs=36, batch_size=8, lr=1e-3, warmup_iters=50, eval_every=600,
                       jitter=0.2),
}


def resolve_args(argv=None):
    """The command line with all flags filled in, and its checkpoint or None. Raises: InputError."""
    description = "Train or evaluate a backbone on ADE20K- or COCO-like data."
    typed = train_imagenet.make_parser(description, FLAGS, OVERRIDES).parse_args(argv)
    checkpoint = open_checkpoint(typed)
    saved = checkpoint["args"] if checkpoint else read_architecture(typed)
    typed = replace_flags(typed, data=typed.data or saved.get("data"))
    task, backbone = name_run(typed, saved)
    typed = replace_flags(typed, task=task, backbone=backbone)
    check_flags(typed, saved)
    if typed.resume:
        typed = replace_flags(typed, boxes=typed.boxes or saved.get("boxes"))
    if typed.iters or typed.epochs:  # a typed length replaces the recipe's and the checkpoint's
        saved = saved | dict(iters=None, epochs=None)
    args = train_imagenet.fill_defaults(typed, FLAGS, list_overrides(typed), saved)
    args = train_imagenet.resolve_run(args, saved, task, backbone)
    if args.frozen_bn is None:
        args = replace_flags(args, frozen_bn=bool(args.backbone_weights or args.weights))
    option = train_imagenet.resolve_options(args.backbone, args.option)
    args = replace_flags(args, option=option)
    check_model(args)
    if not (args.eval or args.predict or args.score):
        args = replace_flags(args, micro_batch=choose_micro_batch(args))
        check_batch(args)
    return args, checkpoint


def name_run(typed, saved):
    """Task and backbone: as typed, as in the checkpoint's arguments `saved`, or the defaults."""
    drawn = OVERRIDES["drawn scenes"]["backbone"]
    default_backbone = FLAGS["backbone"].default if typed.data else drawn
    task = typed.task or saved.get("task") or FLAGS["task"].default
    return task, typed.backbone or saved.get("backbone") or default_backbone


def list_overrides(typed):
    """Dicts of defaults for a task, backbone, schedule and data; the last one wins."""
    task = typed.task
    family = typed.backbone.split("_")[0]
    names = [family, typed.backbone, task, f"{family} {task}"]
    overrides = [OVERRIDES[name] for name in names if name in OVERRIDES]
    schedule = typed.schedule or OVERRIDES[task].get("schedule")
    if schedule:
        overrides.append(dict(epochs=SCHEDULES[schedule][0]))
    if not typed.data:
        overrides += [OVERRIDES["drawn scenes"], OVERRIDES[f"drawn {task}"]]
    return overrides


def open_checkpoint(typed):
    """The checkpoint that --eval, --predict or --resume needs, or None. Raises: InputError."""
    train_imagenet.check_commands(typed, "eval", "predict", "score", "resume")
    if typed.weights and typed.backbone_weights:
        raise InputError("--weights and --backbone-weights are mutually exclusive")
    if typed.eval or typed.predict:
        return read_dense_checkpoint(typed.weights)
    if not typed.resume:
        return None
    output = typed.output or train_imagenet.default_output(*name_run(typed, saved={}))
    return train_imagenet.find_checkpoint(typed.resume, output, "task")


def read_dense_checkpoint(path):
    """A checkpoint of this script. Raises: InputError for any other file."""
    checkpoint = train_imagenet.read_checkpoint(path)
    if not train_imagenet.is_checkpoint(checkpoint, "task"):
        raise InputError(f"{path} is no checkpoint of this script; classification weights are for "
                         "--backbone-weights")
    return checkpoint


def read_architecture(typed):
    """What the file of --weights or --backbone-weights says about its model: {flag: value}."""
    if typed.weights:
        saved = read_dense_checkpoint(typed.weights)["args"]
        return {name: saved[name] for name in ARCHITECTURE if name in saved}
    if not typed.backbone_weights:
        return {}
    state = train_imagenet.read_classifier(typed.backbone_weights)
    saved = train_imagenet.saved_arguments(state, "model", "option")
    _, backbone = name_run(typed, {"backbone": saved.get("model")})
    architecture = {"backbone": backbone}
    architecture["released"] = bool(train_imagenet.is_released(backbone, state))
    if backbone == saved.get("model"):
        architecture["option"] = saved.get("option")
    if train_imagenet.is_deployed(backbone, state):
        architecture["option"] = {**(architecture.get("option") or {}), "cpe": "folded"}
    return architecture


def check_flags(typed, saved):
    """Raise InputError for an unknown name and for flags that do not fit the task or checkpoint."""
    for flag, names in (("task", TASKS), ("backbone", MODELS)):
        name = getattr(typed, flag)
        if name not in names:
            raise InputError(f"unknown --{flag} {name!r}, expected one of {', '.join(names)}")
    for flag, tasks in TASK_FLAGS.items():
        if typed.task not in tasks and getattr(typed, flag) is not None:
            raise InputError(f"--{flag.replace('_', '-')} is for {' and '.join(tasks)}, "
                             f"not for {typed.task}")
    for flag in ("task", "backbone", "schedule", "keypoints"):
        given = getattr(typed, flag)
        if given not in (None, saved.get(flag, given)):
            raise InputError(f"the checkpoint holds {saved[flag]}, but --{flag} is {given}")
    if typed.iters and typed.epochs:
        raise InputError("--iters and --epochs are mutually exclusive")
    if typed.threshold is not None and not typed.predict:
        raise InputError("--threshold is for --predict")


def check_model(args):
    """Raise InputError for flags that the backbone or the task cannot follow."""
    if args.released and not args.backbone.startswith("secvit_"):
        raise InputError(f"--released is a variant of SecViT, not of {args.backbone}")
    if args.task == "pose" and args.img_size % 128:
        raise InputError(f"--img-size {args.img_size}: pose needs a multiple of 128, so that the "
                         "width, 3/4 of it, is a multiple of 32")


def choose_micro_batch(args):
    """--micro-batch, by default as large as the task's limit allows. Raises: InputError."""
    is_drawn_detection = args.task in DETECTION and not args.data
    limit = MAX_MICRO_BATCH["drawn detection" if is_drawn_detection else args.task]
    return train_imagenet.choose_micro_batch(args, limit)


def check_batch(args):
    """Raise InputError if UPerNet cannot be trained with these flags."""
    if args.task != "upernet":
        return
    cuda = torch.cuda.is_available()
    world = train_imagenet.environment_number("WORLD_SIZE", 1, low=1)
    syncs_bn = args.sync_bn and cuda and world > 1
    if args.micro_batch == 1 and not syncs_bn:
        raise InputError("--micro-batch 1 leaves batch norm a single value per channel of "
                         "UPerNet's coarsest pool; use 2 or more")
    if args.deterministic and cuda:
        raise InputError("--deterministic: UPerNet's adaptive pooling has no deterministic "
                         "gradient on a GPU")


# ------------------------------------------------------------------------------------------- shared
class DenseTask:
    """What the training loop asks of a task, see `Classification`; each task adds:

    metric: name of the metric that picks best.pt, larger is better
    open_split(folder, split) -> source with __len__, name(index), read(index), classes (names)
    augment(raw, rng) -> training sample; raw is what source.read(index) returns
    collate(samples) -> tuple of tensors; losses(net, batch) -> {name: scalar}
    predict(model, image) -> prediction; overlay(image, prediction, classes) -> image
    describe(prediction, classes) -> dict, what the overlay shows, in numbers
    record(source, sample, prediction) -> what the metrics need of one image
    summarize(source, records) -> {metric: value}; score_results(source, path) -> the same
    summarize_classes(source, records) -> a value for each class, NaN if it does not occur, or []
    results(source, sample, prediction) -> what a results file holds of one image, a list
    write_results(path, results): write the file, or folder, that score_results reads
    """

    train_mode = True  # argument of model.train()
    test_batch = 1     # images differ in size
    decimals = 3
    metric_limit = 1.0
    small_batch = 4
    small_data = "--iters 1000 --warmup-iters 100"

    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.identity = {"task": args.task, "backbone": args.backbone}

    def open_data(self, procs, *splits):
        """The splits ("train", "val") of --data, or of scenes drawn beside --output.

        Raises: InputError now, not at the first evaluation, for a missing validation image.
        """
        folder = self.args.data
        if folder is None:
            folder = Path(self.args.output).parent / "scenes"
            if procs.rank == 0:
                print(f"no --data given: scenes drawn here are in {folder}", file=sys.stderr)
                write_scenes(folder)
            procs.wait()
        sources = [self.open_split(folder, split) for split in splits]
        val_set = sources[-1]
        files = [] if self.args.score else map(val_set.name, range(len(val_set)))
        for file in files:
            if not os.path.isfile(file):
                raise InputError(f"validation image {file} is missing")
        for source in sources if procs.rank == 0 else ():
            for reason, count in source.left_out.items():
                print(f"{source.path}: {count} objects left out: {reason}", file=sys.stderr)
        return sources

    def sampler(self, source, **schedule):
        return StepSampler(images=len(source), repeats=1, **schedule)

    def train_sample(self, source, index, rng):
        return self.augment(source.read(index), rng)

    def test_sample(self, source, index, _rng):
        return index, source.read(index)

    def collate_test(self, samples):
        return samples[0]

    def infer(self, model, sample):
        """The prediction for a test sample."""
        _, (image, *_) = sample
        return self.predict(model, image)

    def build_model(self, classes):
        """The model that the flags name, for these class names."""
        args = self.args
        flags = {"rois": args.rois, "box_head": args.box_head}
        options = {name: value for name, value in flags.items() if value is not None}
        overrides = self.backbone_options()
        if args.drop_path is not None:
            overrides["drop_path_rate"] = args.drop_path
        return build_model(args.task, args.backbone, len(classes), frozen_bn=args.frozen_bn,
                           options=options, **overrides)

    def backbone_options(self):
        """Arguments of the backbone that decide which weights fit it."""
        released = {"released": True} if self.args.released else {}
        return released | self.args.option

    def load_pretrained(self, model):
        """Load --weights or --backbone-weights, if given, averaged ones if the file has them.

        Returns: a line to print, or None. Raises: InputError for another model's weights.
        """
        path = self.args.backbone_weights
        if self.args.weights:
            return self.load_checkpoint(model, self.args.weights)
        if not path:
            return None
        classifier = MODELS[self.args.backbone](**self.backbone_options())
        checkpoint = train_imagenet.read_checkpoint(path)
        entry = "ema" if checkpoint.get("ema") else "model"
        train_imagenet.load_weights(classifier, checkpoint, entry)
        weights = classifier.state_dict()
        needed = model.backbone.net.state_dict().keys()
        model.backbone.net.load_state_dict({name: weights[name] for name in needed})
        unused = {name.split(".")[0] for name in weights.keys() - needed}
        return f"{path}: loaded, without {' and '.join(sorted(unused))}"

    def load_checkpoint(self, model, path):
        """Load a checkpoint of this task, but for layers of another number of classes."""
        checkpoint = train_imagenet.read_checkpoint(path)
        source = self.build_model(checkpoint["classes"])
        train_imagenet.load_weights(source, checkpoint, "ema" if checkpoint["ema"] else "model")
        weights = source.state_dict()
        expected = model.state_dict()
        matching = {name: t for name, t in weights.items() if t.shape == expected[name].shape}
        model.load_state_dict(expected | matching)
        layers = {name.rpartition(".")[0] for name in weights.keys() - matching.keys()}
        without = f", without {' and '.join(sorted(layers))}: other classes" if layers else ""
        return f"{path}: loaded{without}"

    def summarize_classes(self, _source, _records):
        return []  # pose has one class

    def param_groups(self, model):
        """AdamW's groups: all parameters decay, or all but the norms'."""
        norm_decay = self.args.norm_decay
        named = list(model.named_parameters())
        decayed = [p for name, p in named if norm_decay or "norm" not in name]
        exempt = [p for name, p in named if "norm" in name and not norm_decay]
        decay = self.args.weight_decay
        return [dict(params=decayed, weight_decay=decay), dict(params=exempt, weight_decay=0.0)]

    def total_updates(self, per_epoch):
        return self.args.iters or self.args.epochs * per_epoch

    def eval_every(self, per_epoch, total):
        default = per_epoch if self.args.epochs else math.ceil(total / 10)
        return self.args.eval_every or default

    def lr_at(self, step, total, _per_epoch):
        """Learning rate of update `step` of `total`: linear warm-up, then --schedule's steps.

        Without a schedule (segmentation) it decays by a polynomial.
        """
        args = self.args
        if args.schedule:
            epochs, milestones = SCHEDULES[args.schedule]
            rate = args.lr * 0.1 ** sum(step >= total * epoch / epochs for epoch in milestones)
            start = 1e-3  # fraction of the rate at update 0
        else:
            fraction = (1 - step / total) ** POWERS[args.task]
            rate = (args.lr - args.min_lr) * fraction + args.min_lr
            start = 1e-6
        if step >= args.warmup_iters:
            return rate
        return rate * (1 - (1 - step / args.warmup_iters) * (1 - start))


def build_model(task, backbone, num_classes, *, frozen_bn=True, options=None, **overrides):
    """The model of a task around a backbone named as in train_imagenet.py.

    options: arguments of Mask R-CNN, rois and box_head, if not as in OVERRIDES; overrides: the
    backbone's.
    """
    architecture, levels = ARCHITECTURES[task]
    net = Backbone(backbone, levels, frozen_bn, **overrides)
    recipe = OVERRIDES[task]
    defaults = {name: recipe[name] for name in ("rois", "box_head") if name in recipe}
    return architecture(net, num_classes, **defaults | (options or {}))


class Backbone(nn.Module):
    """A classification model without its classifier: images (B, 3, H, W) -> maps, finest first.

    levels: the stages (0 to 3) whose maps are returned; frozen_bn: keep BatchNorm's statistics.
    SecViT, SEC-* and STViT, which end their stages without a norm, get a LayerNorm on each map.
    """

    def __init__(self, name, levels, frozen_bn, **overrides):
        super().__init__()
        self.net = MODELS[name](**overrides)
        self.levels = levels
        self.frozen_bn = frozen_bn
        self.channels = [self.net.channels[i] for i in levels]
        self.net.head = nn.Identity()
        needs_norm = hasattr(self.net, "proj")
        if needs_norm:
            self.net.proj = nn.Identity()
        norms = (nn.LayerNorm(c) if needs_norm else nn.Identity() for c in self.channels)
        self.norms = nn.ModuleList(norms)

    def forward(self, images):
        maps = self.net.forward_features(images)
        maps = [maps[i].permute(0, 2, 3, 1) for i in self.levels]       # each (B, H, W, C)
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps)]

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if self.frozen_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def conv_norm(in_dim, dim, kernel_size):
    """Convolution without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(in_dim, dim, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU(inplace=True))


def init_head(module):
    """Kaiming normal (fan-out) for convolutions that precede a norm."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_classifier(conv, std=0.01, bias=0.0):
    """Normal weights of a small deviation and a constant bias, for an output layer."""
    nn.init.normal_(conv.weight, std=std)
    nn.init.constant_(conv.bias, bias)


class FPN(nn.Module):
    """Feature pyramid (arXiv 1612.03144): maps, finest first -> as many maps of `dim` channels.

    extra_levels: 0 or 2 coarser maps, by strided convolutions on the coarsest input without ReLU
    between them.
    """

    def __init__(self, channels, extra_levels=0, dim=256):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        extra_dims = (channels[-1], dim)[:extra_levels]
        extra = [nn.Conv2d(c, dim, 3, stride=2, padding=1) for c in extra_dims]
        self.extra = nn.ModuleList(extra)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps):
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        for i in reversed(range(len(maps) - 1)):
            size = laterals[i].shape[2:]
            coarser = F.interpolate(laterals[i + 1], size=size, mode="nearest")
            laterals[i] = laterals[i] + coarser
        outputs = [output(x) for output, x in zip(self.outputs, laterals)]
        x = maps[-1]
        for layer in self.extra:
            x = layer(x)
            outputs.append(x)
        return outputs


def read_annotated_image(path, width, height):
    """An image file as RGB, turned by its EXIF orientation if its annotations' size needs that.

    Raises: InputError if it has another size, which its boxes and points then do not fit.
    """
    for upright in (False, True):
        image = read_image(path, upright)
        if image.size == (width, height):
            return image
    raise InputError(f"{path} is {image.width} x {image.height}, its annotations are for "
                     f"{width} x {height}")


def fit_size(size, longer, shorter):
    """The size (W, H) scaled to fit into longer x shorter pixels, in either orientation."""
    scale = min(longer / max(size), shorter / min(size))
    W, H = size
    return max(1, int(W * scale + 0.5)), max(1, int(H * scale + 0.5))


def pad_images(images, multiple, min_size=0):
    """uint8 images (h, w, 3) of several sizes, padded right and bottom to one size, a multiple.

    Returns: batch (B, H, W, 3) uint8 and sizes (B, 2), h and w of each image.
    """
    sizes = torch.tensor([image.shape[:2] for image in images])
    H, W = (max(min_size, -(-side // multiple) * multiple) for side in sizes.amax(0).tolist())
    batch = torch.zeros(len(images), H, W, 3, dtype=torch.uint8)
    for padded, image in zip(batch, images):
        h, w, _ = image.shape
        padded[:h, :w] = torch.from_numpy(np.array(image))
    return batch, sizes


def normalize_padded(images, sizes):
    """`pad_images`' batch and sizes -> float (B, 3, H, W), 0 (the mean colour) in the padding."""
    row = torch.arange(images.shape[1], device=images.device)
    column = torch.arange(images.shape[2], device=images.device)
    inside_rows = row[:, None] < sizes[:, :1, None]             # (B, H, 1)
    inside_columns = column < sizes[:, 1:, None]                # (B, 1, W)
    return normalize(images) * (inside_rows & inside_columns)[:, None]


@contextmanager
def images_of_many_sizes():
    """A block without cuDNN's attention, which plans every new size for up to a second."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


class Figure:
    """A copy of an image to plot on, with lines and text in proportion to it.

    Small images are enlarged, by a whole number, so that text can be read. Positions are in pixels
    of the image.
    """

    min_side = 320  # pixels of the longer side

    def __init__(self, image):
        self.scale = math.ceil(self.min_side / max(image.size))
        size = [side * self.scale for side in image.size]
        self.image = image.resize(size, Image.Resampling.NEAREST)
        self.canvas = ImageDraw.Draw(self.image)
        side = math.sqrt(size[0] * size[1])
        self.thick = max(2, round(side / 180))     # width of a line
        self.thin = max(1, round(self.thick / 3))
        self.font = ImageFont.load_default(max(11, round(side / 40)))

    def pixels(self, points):
        """Points (n, 2) of the image as a flat list of pixels of the figure."""
        return (np.asarray(points) * self.scale).ravel().tolist()

    def label(self, point, text, colour, centred):
        """Text on a box in a colour, moved into the figure: around a point, or above it."""
        text = " ".join(text.split())
        x, y = self.pixels(point)
        padding = self.thick
        width = math.ceil(self.font.getlength(text)) + 2 * padding
        height = sum(self.font.getmetrics())
        x -= width / 2 if centred else 0
        y -= height / 2 if centred else height
        x = max(0, min(round(x), self.image.width - width))
        y = max(0, min(round(y), self.image.height - height))
        self.canvas.rectangle((x, y, x + width - 1, y + height - 1), colour)
        self.canvas.text((x + padding, y), text, contrast(colour), font=self.font)


def contrast(colour):
    """The one of black and white that can be read on a colour, by its luminance (BT.601)."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"


def palette(count):
    """Colours (count, 3) uint8, all different: hues in steps of the golden ratio."""
    i = np.arange(count)
    hues = 255 * i * 0.618034 % 256
    hsv = np.stack([hues, 160 + 95 * (i % 2), 255 - 60 * (i % 3)], 1).astype(np.uint8)
    return np.array(Image.fromarray(hsv[None], "HSV").convert("RGB"))[0]


# ------------------------------------------------------------------------------------- segmentation
# Semantic FPN (arXiv 1901.02446) and UPerNet (arXiv 1807.10221) on data in ADE20K's layout (arXiv
# 1608.05442). Letters: S side of a training crop (--img-size), K classes. A label map (H, W) uint8
# holds one class per pixel, 0 to K - 1, or IGNORED.
IGNORED = 255  # label of pixels that are not evaluated


class Ade20k:
    """Images and label maps of folder/images/SPLIT and folder/annotations/SPLIT, sorted by name.

    The label PNGs hold 1 to K for the classes and 0 and 255 for ignored pixels, with
    `zero_is_class` 0 to K - 1 and 255. split: "train" or "val".
    Raises: InputError for a missing folder or file, more classes than 8 bits hold, no labels.
    """

    left_out = {}  # nothing is

    def __init__(self, folder, split, zero_is_class=False):
        split = {"train": "training", "val": "validation"}[split]
        self.first_label = 0 if zero_is_class else 1  # value of the first class in the PNGs
        images = Path(folder) / "images" / split
        self.label_folder = Path(folder) / "annotations" / split
        for part in (images, self.label_folder):
            if not part.is_dir():
                expected = "DIR/images/{training,validation} and DIR/annotations/..."
                raise InputError(f"{part} is not a folder; expected {expected}")
        self.files = [images / name for name in train_imagenet.image_files(images)]
        if not self.files:
            raise InputError(f"{images} holds no image")
        missing = [file.name for file in self.files if not self.label_path(file).is_file()]
        if missing:
            count = f"{len(missing)} of {len(self.files)} are missing"
            raise InputError(f"{self.label_folder} lacks the label map of {missing[0]}; {count}")
        self.classes = read_class_names(Path(folder), self.first_label)
        label_maps = (self.read_labels(self.label_path(file)) for file in self.files)
        if all((labels == IGNORED).all() for labels in label_maps):  # mostly stops at the first
            ignored = "255 is" if zero_is_class else "0 and 255 are"
            raise InputError(f"{self.label_folder} has no pixel of any class; {ignored} ignored")

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.files[index])

    def label_path(self, file):
        return self.label_folder / f"{file.stem}.png"

    def read(self, index):
        """RGB image (PIL) and its label map. Raises: InputError if their sizes differ."""
        file = self.files[index]
        image = read_image(file)
        labels = self.read_labels(self.label_path(file))
        H, W = labels.shape
        if image.size != (W, H):
            raise InputError(f"{file} is {image.width} x {image.height}, its label map {W} x {H}")
        return image, labels

    def read_labels(self, path):
        """The label map of a PNG, classes counted from 0. Raises: InputError."""
        try:
            with Image.open(path) as image:
                labels = np.array(image)
        except Exception as error:  # Pillow raises nearly anything for a broken file
            raise InputError(f"{path}: {error}") from None
        if labels.ndim != 2 or labels.dtype != np.uint8:
            raise InputError(f"{path}: expected a label map of 8 bits")
        largest = labels[labels != IGNORED].max(initial=0)
        count = len(self.classes)
        if largest >= count + self.first_label:
            raise InputError(f"{path}: label {largest} out of range, there are {count} classes, "
                             f"the first one is {self.first_label}")
        return np.where(labels == IGNORED, IGNORED, labels - self.first_label)  # 0 - 1 is IGNORED


def read_class_names(folder, first_label):
    """Class names of a folder, in order of their labels.

    They are the first synonyms in the last column of objectInfo*.txt, below its title line, the
    lines of classes.txt, or without either file 150 numbers from `first_label` on.
    """
    files = [*sorted(folder.glob("objectInfo*.txt")), *folder.glob("classes.txt")]
    if not files:
        return [str(first_label + i) for i in range(150)]
    with reading(files[0], "text file of class names"):
        rows = files[0].read_text("utf-8-sig").splitlines()
    if files[0].name == "classes.txt":
        names = [row.strip() for row in rows if row.strip()]
    else:
        synonyms = [row.split("\t")[-1] for row in rows[1:] if row]
        names = [words.split(",")[0].strip() for words in synonyms]
    if not 0 < len(names) < IGNORED:
        raise InputError(f"{files[0]} names {len(names)} classes, label maps of 8 bits hold 1 to "
                         f"{IGNORED - 1}")
    return names


def augment_segmentation(raw, rng, size):
    """Random scale, crop, flip and colours of `raw`, an RGB PIL image and its label map.

    size: S; the image is resized to fit into 4 S x S, times 0.5 to 2, and cropped to S x S.
    Returns: uint8 pixels (h, w, 3) and labels (h, w), h and w at most S.
    """
    image, labels = raw
    scaled = size * rng.uniform(0.5, 2.0)
    W, H = fit_size(image.size, int(4 * scaled), int(scaled))
    image = image.resize((W, H), Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(labels).resize((W, H), Image.Resampling.NEAREST))
    x, y = choose_crop(labels, size, rng)
    image = image.crop((x, y, min(x + size, W), min(y + size, H)))
    labels = labels[y:y + size, x:x + size]
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
        labels = labels[:, ::-1]
    return distort(np.asarray(image), rng), labels


def choose_crop(labels, size, rng):
    """Corner (x, y) of a random crop in which no class fills 75 % or more, or of the 11th try."""
    H, W = labels.shape
    for _ in range(11):
        y = rng.randint(0, max(H - size, 0))
        x = rng.randint(0, max(W - size, 0))
        crop = labels[y:y + size, x:x + size]
        pixels = np.bincount(crop[crop != IGNORED], minlength=1)  # per class
        if pixels.max() < 0.75 * pixels.sum():
            break
    return x, y


def distort(pixels, rng):
    """Random brightness, contrast, saturation and hue of uint8 RGB (H, W, 3).

    Each changes with probability 1/2; contrast comes before or after saturation and hue.
    """
    if rng.random() < 0.5:
        pixels = scale_and_shift(pixels, shift=rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    if contrast_first:
        pixels = scale_and_shift(pixels, scale=contrast)
    pixels = distort_hue_and_saturation(pixels, rng)
    if not contrast_first:
        pixels = scale_and_shift(pixels, scale=contrast)
    return pixels


def distort_hue_and_saturation(pixels, rng):
    """The saturation and hue part of `distort`."""
    change_saturation = rng.random() < 0.5
    change_hue = rng.random() < 0.5
    if not change_saturation and not change_hue:
        return pixels
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    if change_saturation:
        hsv[..., 1] = scale_and_shift(hsv[..., 1], scale=rng.uniform(0.5, 1.5))
    if change_hue:
        steps = rng.randint(-18, 17)  # mmsegmentation's, 180 per turn; Pillow has 256
        hsv[..., 0] += np.uint8(round(steps * 256 / 180) % 256)  # wraps around
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def scale_and_shift(pixels, scale=1.0, shift=0.0):
    """pixels * scale + shift, in float32, clipped to uint8."""
    return (pixels * np.float32(scale) + np.float32(shift)).clip(0, 255).astype(np.uint8)


def resize(x, size):
    """Bilinear interpolation of maps (B, C, H, W), corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class SemanticFPN(nn.Module):
    """Semantic FPN (arXiv 1901.02446, fig. 3): images (B, 3, H, W) -> logits (B, K, H/4, W/4).

    Level i of the pyramid, of stride 4 * 2^i, passes i times through a convolution and upsampling
    by 2, level 0 through a convolution only; the sum of the four maps is classified.
    """

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.neck = FPN(backbone.channels)
        self.scales = nn.ModuleList()
        for level in range(4):
            in_dims = [256] + [128] * (level - 1)               # level 0: [256]
            self.scales.append(nn.ModuleList(conv_norm(c, 128, 3) for c in in_dims))
        self.scales.apply(init_head)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(128, classes, 1)
        init_classifier(self.classifier)

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        total = 0
        for level, (x, blocks) in enumerate(zip(maps, self.scales)):
            for block in blocks:
                x = block(x)
                if level > 0:
                    x = resize(x, [2 * side for side in x.shape[2:]])
            if level > 0:  # the maps' sides are rounded up, so twice a side can be too large
                x = resize(x, maps[0].shape[2:])
            total = total + x                                   # (B, 128, H/4, W/4)
        return self.classifier(self.dropout(total))


class UPerNet(nn.Module):
    """UPerNet (arXiv 1807.10221) with an auxiliary FCN head on the third stage.

    Images (B, 3, H, W) -> logits (B, K, H/4, W/4), in train mode also the auxiliary logits
    (B, K, H/16, W/16). dim: channels of pyramid and fusion.
    """

    pool_sides = (1, 2, 3, 6)  # of pyramid pooling (arXiv 1612.01105)

    def __init__(self, backbone, classes, dim=512):
        super().__init__()
        self.backbone = backbone
        *finer, coarsest = backbone.channels
        self.pools = nn.ModuleList(conv_norm(coarsest, dim, 1) for _ in self.pool_sides)
        self.bottleneck = conv_norm(coarsest + len(self.pools) * dim, dim, 3)
        self.laterals = nn.ModuleList(conv_norm(c, dim, 1) for c in finer)
        self.outputs = nn.ModuleList(conv_norm(dim, dim, 3) for _ in finer)
        self.fusion = conv_norm(4 * dim, dim, 3)
        self.auxiliary = conv_norm(finer[2], 256, 3)
        for head in self.children():
            if head is not backbone:
                head.apply(init_head)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(dim, classes, 1)
        self.auxiliary_classifier = nn.Conv2d(256, classes, 1)
        init_classifier(self.classifier)
        init_classifier(self.auxiliary_classifier)

    def forward(self, images):
        maps = self.backbone(images)
        logits = self.classifier(self.dropout(self.fuse(maps)))
        if not self.training:
            return logits
        auxiliary = self.dropout(self.auxiliary(maps[2]))
        return logits, self.auxiliary_classifier(auxiliary)

    def fuse(self, maps):
        """Maps of the four stages -> one map (B, dim, H/4, W/4)."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        levels.append(self.pool_pyramid(maps[3]))               # as many maps of dim channels
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
        outputs = [output(x) for output, x in zip(self.outputs, levels)]
        outputs.append(levels[3])
        resized = [resize(x, levels[0].shape[2:]) for x in outputs]
        return self.fusion(torch.cat(resized, 1))

    def pool_pyramid(self, x):
        """Pyramid pooling of the coarsest map: (B, C, h, w) -> (B, dim, h, w)."""
        branches = [x]
        for conv, side in zip(self.pools, self.pool_sides):
            pooled = conv(F.adaptive_avg_pool2d(x, side))       # (B, dim, side, side)
            branches.append(resize(pooled, x.shape[2:]))
        return self.bottleneck(torch.cat(branches, 1))


def segmentation_losses(outputs, labels):
    """Losses of a model's training outputs, logits (B, K, h, w) or UPerNet's pair of them.

    labels (B, H, W). A mean is over all pixels: ignored ones add 0 and still count.
    """
    if not isinstance(outputs, tuple):
        return {"loss_seg": sum_cross_entropy(outputs, labels) / labels.numel()}
    logits, auxiliary = outputs
    loss_seg = sum_cross_entropy(logits, labels) / labels.numel()
    loss_aux = 0.4 * sum_cross_entropy(auxiliary, labels) / labels.numel()
    return {"loss_seg": loss_seg, "loss_aux": loss_aux}


def sum_cross_entropy(logits, labels):
    """Sum over the pixels that are not ignored; the logits are resized to the labels' size."""
    logits = resize(logits.float(), labels.shape[1:])           # (B, K, H, W)
    logits = logits.permute(0, 2, 3, 1).flatten(0, 2)           # (B*H*W, K)
    labels = labels.flatten().long()  # flat, since the 2-D CUDA kernel is not deterministic
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def count_pixels(prediction, labels, classes):
    """Pixels per class of two label maps (H, W), without those that `labels` ignores.

    Returns: int (3, K): intersection of prediction and labels, prediction, labels.
    """
    evaluated = labels != IGNORED
    prediction = prediction[evaluated]
    labels = labels[evaluated]
    groups = (labels[prediction == labels], prediction, labels)
    return np.stack([np.bincount(x, minlength=256)[:classes] for x in groups])


def mean_iou(counts):
    """mIoU and mAcc, means over the classes that occur, and aAcc, over all pixels, as fractions.

    counts: sum of the images' `count_pixels`. All three are -1 if no pixel is labelled.
    """
    intersection, _, labelled = counts.astype(np.float64)
    if not labelled.any():
        return {"mIoU": -1.0, "mAcc": -1.0, "aAcc": -1.0}
    iou = class_iou(counts)
    iou = iou[~np.isnan(iou)]
    accuracy = intersection[labelled > 0] / labelled[labelled > 0]
    total_accuracy = float(intersection.sum() / labelled.sum())
    return {"mIoU": float(iou.mean()), "mAcc": float(accuracy.mean()), "aAcc": total_accuracy}


def class_iou(counts):
    """IoU (K,) of each class, from the sum of `count_pixels`; NaN for one that does not occur."""
    intersection, predicted, labelled = counts.astype(np.float64)
    union = predicted + labelled - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), np.nan)


class Segmentation(DenseTask):
    """Semantic FPN and UPerNet on ADE20K's layout."""

    metric = "mIoU"

    def open_split(self, folder, split):
        return Ade20k(folder, split, self.args.zero_is_class)

    def augment(self, raw, rng):
        return augment_segmentation(raw, rng, self.args.img_size)

    def collate(self, samples):
        """Images (B, S, S, 3), labels (B, S, S), sizes (B, 2) of crops before padding."""
        images, label_maps = zip(*samples)
        batch, sizes = pad_images(images, multiple=1, min_size=self.args.img_size)
        labels = torch.full(batch.shape[:3], IGNORED, dtype=torch.uint8)
        for padded, label_map in zip(labels, label_maps):
            h, w = label_map.shape
            padded[:h, :w] = torch.from_numpy(np.array(label_map))
        return batch, labels, sizes

    def losses(self, net, batch):
        images, labels, sizes = batch
        return segmentation_losses(net(normalize_padded(images, sizes)), labels)

    @torch.no_grad()
    @images_of_many_sizes()
    def predict(self, model, image):
        """Label map (H, W) of a PIL image; --ms-test averages six scales, each also mirrored."""
        if self.args.ms_test:
            scores = 0
            for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
                for mirror in (False, True):
                    scores += self.image_logits(model, image, scale, mirror).softmax(1)
        else:
            scores = self.image_logits(model, image, scale=1.0, mirror=False)
        return scores[0].argmax(0).to(torch.uint8).cpu().numpy()

    def image_logits(self, model, image, scale, mirror):
        """Logits (1, K, height, width) of the whole image, computed at `scale` times --img-size."""
        size = self.args.img_size * scale
        W, H = fit_size(image.size, int(4 * size), int(size))
        resized = image.resize((max(W, 32), max(H, 32)), Image.Resampling.BILINEAR)
        x = normalize(torch.from_numpy(np.array(resized))[None].to(self.device))
        if mirror:
            x = x.flip(3)
        with autocast(self.args, self.device):
            logits = model(x)                                   # (1, K, H/4, W/4)
        logits = resize(resize(logits.float(), x.shape[2:]), (image.height, image.width))
        return logits.flip(3) if mirror else logits

    def overlay(self, image, prediction, classes):
        """The image blended with its classes' colours; up to eight classes are named."""
        colours = np.zeros((256, 3), np.uint8)
        colours[:len(classes)] = palette(len(classes))
        figure = Figure(Image.blend(image, Image.fromarray(colours[prediction]), 0.5))
        count = np.bincount(prediction.ravel(), minlength=len(classes))[:len(classes)]
        for label in count.argsort()[::-1][:8]:
            if count[label] > prediction.size / 200:
                y, x = (prediction == label).nonzero()
                nearest = np.hypot(y - y.mean(), x - x.mean()).argmin()  # to the class's centre
                position = (x[nearest], y[nearest])
                colour = tuple(colours[label].tolist())
                figure.label(position, classes[label], colour, centred=True)
        return figure.image

    def describe(self, prediction, classes):
        """The fraction of the pixels of each class that occurs, largest first."""
        count = np.bincount(prediction.ravel(), minlength=len(classes))
        order = [label for label in count.argsort()[::-1] if count[label] > 0]
        fractions = {classes[label]: round(count[label] / prediction.size, 4) for label in order}
        return {"pixels": fractions}

    def record(self, source, sample, prediction):
        """Pixel counts of one image, see `count_pixels`."""
        _, (_, labels) = sample
        return count_pixels(prediction, labels, len(source.classes))

    def summarize(self, _source, records):
        return mean_iou(sum(records))

    def summarize_classes(self, _source, records):
        """IoU of each class."""
        return class_iou(sum(records)).tolist()

    def results(self, source, sample, prediction):
        """[(name, content)] of the image's label PNG, numbered like those of the data."""
        index, _ = sample
        file = io.BytesIO()
        Image.fromarray(prediction + source.first_label).save(file, "PNG")
        return [(f"{source.files[index].stem}.png", file.getvalue())]

    def write_results(self, path, results):
        """Write the label PNGs into a folder."""
        Path(path).mkdir(exist_ok=True)
        for name, content in results:
            (Path(path) / name).write_bytes(content)

    def score_results(self, source, path):
        """Metrics of a folder of label PNGs named like the images. Raises: InputError."""
        records = []
        for file in source.files:
            result = Path(path) / f"{file.stem}.png"
            if not result.is_file():
                expected = "a folder with a label map of every validation image"
                raise InputError(f"{path} lacks {result.name}; expected {expected}")
            prediction = source.read_labels(result)
            labels = source.read_labels(source.label_path(file))
            if prediction.shape != labels.shape:
                h, w = prediction.shape
                H, W = labels.shape
                raise InputError(f"{result}: {w} x {h}, its image {W} x {H}")
            records.append(count_pixels(prediction, labels, len(source.classes)))
        return self.summarize(source, records)


# ------------------------------------------------------------------------------ boxes and RetinaNet
# Object detection on COCO's layout: files, augmentation, boxes, anchors, their assignment to
# objects, non-maximum suppression (NMS), RetinaNet (arXiv 1708.02002), its losses and its task.
# Mask R-CNN, the next chapter, uses all of it but the model. Letters: G objects per image,
# A anchors, n detections, IoU intersection over union; four "deltas" move an anchor onto a box.
class Coco:
    """Images of folder/SPLIT2017, objects of folder/annotations/instances_SPLIT2017.json.

    The training split keeps what mmdetection keeps: images that have annotations and sides of at
    least 32 pixels, and objects that are no crowds, see `unusable`, whose reasons `left_out`
    counts. The validation split keeps all images, and `annotations` {image id: [...]} as they are
    in the file. masks: `read` returns masks, too, in training. Raises: InputError for a malformed
    annotation file, naming it and the offending id, and for one without anything to train on.
    """

    def __init__(self, folder, split, masks=False):
        self.folder = Path(folder) / f"{split}2017"
        self.path = Path(folder) / "annotations" / f"instances_{split}2017.json"
        self.split = split
        self.masks = masks
        data = read_annotations(self.path)
        if not self.folder.is_dir():
            expected = "DIR/{train,val}2017 and DIR/annotations/*.json"
            raise InputError(f"{self.folder} is not a folder; expected {expected}")
        names = {category["id"]: category["name"] for category in data["categories"]}
        self.categories = sorted(names)
        self.classes = [names[category] for category in self.categories]
        images = sorted(data["images"], key=lambda image: image["id"])
        annotations = {image["id"]: [] for image in images}
        for annotation in data["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        if split == "train":
            images = [image for image in images if annotations[image["id"]]]
            images = [image for image in images if min(image["width"], image["height"]) >= 32]
        if not images:
            kind = "image with annotations" if split == "train" else "image"
            raise InputError(f"{self.path} holds no {kind}")
        self.left_out = Counter()
        entries = [self.make_entry(image, annotations[image["id"]]) for image in images]
        if split == "train" and not any(entry["boxes"] for entry in entries):
            reasons = ", ".join(self.left_out) or "all are crowds"
            raise InputError(f"{self.path} holds no object to train on: {reasons}")
        self.entries = Packed(entries)
        self.is_landscape = np.array([image["width"] > image["height"] for image in images])
        self.annotations = annotations if split == "val" else {}  # 1 GB for COCO's training split
        if masks and split == "val":
            without = sum(not has_segmentation(a) for a in data["annotations"])
            if without:
                self.left_out[f"{NO_MASK}, of the mask metrics"] = without

    def make_entry(self, image, annotations):
        """An image's dict, and boxes (x, y, w, h), labels and, for masks, dicts of its objects."""
        kept = []
        for annotation in annotations:
            if annotation["iscrowd"] or annotation.get("ignore"):
                continue
            reason = unusable(annotation, image, self.masks)
            if reason is None:
                kept.append(annotation)
            elif self.split == "train":     # metrics take all but those of `annotations_for`
                self.left_out[reason] += 1
        return {
            "image": image,
            "boxes": [annotation["bbox"] for annotation in kept],
            "labels": [self.categories.index(annotation["category_id"]) for annotation in kept],
            "objects": kept if self.masks else [],
        }

    def __len__(self):
        return len(self.entries)

    def name(self, index):
        return str(self.folder / self.entries[index]["image"]["file_name"])

    def read(self, index):
        """RGB image, boxes (G, 4), labels (G,) and, with masks, these (G, H, W) bool."""
        entry = self.entries[index]
        size = entry["image"]["width"], entry["image"]["height"]
        image = read_annotated_image(self.name(index), *size)
        boxes = np.array(entry["boxes"], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        sample = image, boxes.astype(np.float32), np.array(entry["labels"], np.int64)
        if self.masks and self.split == "train":
            sample = *sample, self.read_masks(entry, *size)
        return sample

    def read_masks(self, entry, W, H):
        try:
            runs = [segmentation_runs(a, entry["image"]) for a in entry["objects"]]
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from None
        masks = [rle_decode({"size": (H, W), "counts": counts}) for counts in runs]
        return np.array(masks, bool).reshape(-1, H, W)


NO_MASK = "without segmentation"


def unusable(annotation, image, masks):
    """Why an object cannot be trained on, with `masks` if its mask is needed; None if it can."""
    x, y, w, h = annotation["bbox"]
    overlap_width = min(x + w, image["width"]) - max(x, 0)
    overlap_height = min(y + h, image["height"]) - max(y, 0)
    if min(w, h) < 1 or annotation["area"] <= 0:
        return "narrower than a pixel or without area"
    if min(overlap_width, overlap_height) <= 0:
        return "outside the image"
    if masks and not has_segmentation(annotation):
        return NO_MASK
    return None


def has_segmentation(annotation):
    """Whether the field is there and not empty: an RLE, or a list of polygons that hold points."""
    segmentation = annotation.get("segmentation")
    return any(segmentation) if isinstance(segmentation, list) else segmentation is not None


def annotations_for(kind, annotations):
    """The annotations of an image that the metrics of `kind` compare with."""
    if kind == "segm":
        return [a for a in annotations if has_segmentation(a)]
    return annotations


class Packed:
    """Dicts as JSON in one shared array; reference counting would copy a list into each process."""

    def __init__(self, entries):
        encoded = [json.dumps(entry).encode() for entry in entries]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        entry = self.bytes[self.ends[index]:self.ends[index + 1]]
        return json.loads(entry.tobytes())


class GroupSampler(StepSampler):
    """StepSampler whose micro-batches hold images of one orientation, so that padding is small.

    In every epoch each orientation is padded to whole micro-batches by repeating its first images,
    as in mmdetection; then the micro-batches are shuffled. is_landscape (N,): whether an image is
    wider than high; schedule: StepSampler's arguments except `images`.
    """

    def __init__(self, *, is_landscape, **schedule):
        super().__init__(images=len(is_landscape), **schedule)
        self.is_landscape = is_landscape
        self.micro = self.batch // self.count
        landscape = math.ceil(is_landscape.sum() / self.micro)
        portrait = math.ceil((~is_landscape).sum() / self.micro)
        self.used = (landscape + portrait) * self.micro
        self.per_epoch = self.used // self.batch

    def order(self, epoch):
        """(used, 2): image and copy (0); a micro-batch is every `count`-th entry of its update."""
        rng = np.random.default_rng((train_imagenet.ORDER, self.seed, epoch))
        images = rng.permutation(self.images)
        is_landscape = self.is_landscape[images]
        groups = []
        for group in (images[is_landscape], images[~is_landscape]):
            count = math.ceil(len(group) / self.micro)
            groups.append(np.resize(group, (count, self.micro)))
        rows = rng.permutation(np.concatenate(groups))          # (micro-batches, micro)
        whole = len(rows) // self.count * self.count            # those of complete updates
        updates = rows[:whole].reshape(-1, self.count, self.micro).swapaxes(1, 2)
        order = np.concatenate([updates.ravel(), rows[whole:].ravel()])
        return np.stack([order, np.zeros_like(order)], 1)


def resize_objects(image, boxes, masks, longer, shorter):
    """Resize a PIL image with its boxes and masks to fit into longer x shorter pixels."""
    W, H = fit_size(image.size, longer, shorter)
    scale = np.array([W / image.width, H / image.height], np.float32)
    resized = np.zeros((len(masks), H, W), bool)
    for i, mask in enumerate(masks):
        resized[i] = Image.fromarray(mask).resize((W, H), Image.Resampling.NEAREST)
    image = image.resize((W, H), Image.Resampling.BILINEAR)
    return image, boxes * np.tile(scale, 2), resized


def random_crop(image, boxes, masks, rng, shortest, longest):
    """Crop a PIL image with its boxes and masks, to sides of `shortest` to `longest` pixels."""
    W, H = image.size
    height = rng.randint(min(H, shortest), min(H, longest))
    width = rng.randint(min(W, shortest), min(W, longest))
    top = rng.randint(0, H - height)
    left = rng.randint(0, W - width)
    right = left + width
    bottom = top + height
    boxes = boxes - np.array([left, top] * 2, np.float32)
    boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
    masks = masks[:, top:bottom, left:right]
    return image.crop((left, top, right, bottom)), boxes, masks


def augment_detection(raw, rng, *, size, multi_scale):
    """Mirror and resize what `Coco.read` returns at random.

    The shorter side gets `size` pixels, the longer one at most 1333 / 800 times as many. With
    `multi_scale` the shorter side gets 0.6 to 1 times `size` instead, and half of the images are
    cropped at random before (the 3x schedule of Swin, arXiv 2103.14030).
    Returns: uint8 (H, W, 3), boxes (G, 4) clipped to the image, labels (G,) and the masks, if any.
    """
    image, boxes, labels, *masks = raw
    has_masks = bool(masks)
    masks = masks[0] if has_masks else np.zeros((0, image.height, image.width), bool)
    scale = size / 800                                      # the recipe is for images of 800 pixels
    longer = size * 1333 / 800
    if rng.random() < 0.5:
        x1, y1, x2, y2 = boxes.T
        boxes = np.stack([image.width - x2, y1, image.width - x1, y2], 1)
        image = ImageOps.mirror(image)
        masks = masks[..., ::-1]
    if multi_scale and rng.random() < 0.5:
        shorter = rng.choice((400, 500, 600)) * scale
        image, boxes, masks = resize_objects(image, boxes, masks, longer, shorter)
        sides = round(384 * scale), round(600 * scale)
        image, boxes, masks = random_crop(image, boxes, masks, rng, *sides)
    shorter = rng.choice(range(480, 801, 32)) * scale if multi_scale else size
    image, boxes, masks = resize_objects(image, boxes, masks, longer, shorter)
    boxes = boxes.clip(0, np.array(image.size * 2, np.float32))
    keep = box_size(boxes).min(1) > 0.01                    # encode() takes the size's logarithm
    sample = np.asarray(image), boxes[keep], labels[keep]
    return (*sample, masks[keep]) if has_masks else sample


def box_size(boxes):
    """Width and height (..., 2) of boxes (..., 4)."""
    return boxes[..., 2:] - boxes[..., :2]


def box_iou(a, b):
    """IoU (..., A, G) of boxes a (..., A, 4) and b (..., G, 4); 0 where the union is empty."""
    a_x1, a_y1, a_x2, a_y2 = a[..., :, None, :].unbind(-1)              # each (..., A, 1)
    b_x1, b_y1, b_x2, b_y2 = b[..., None, :, :].unbind(-1)              # each (..., 1, G)
    width = torch.minimum(a_x2, b_x2) - torch.maximum(a_x1, b_x1)       # (..., A, G)
    height = torch.minimum(a_y2, b_y2) - torch.maximum(a_y1, b_y1)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    area_a = (a_x2 - a_x1) * (a_y2 - a_y1)
    area_b = (b_x2 - b_x1) * (b_y2 - b_y1)
    union = area_a + area_b - intersection
    return intersection / union.clamp(min=1e-6)


def encode(anchors, boxes):
    """Deltas (..., 4) that move anchors (..., 4) onto boxes (..., 4) (arXiv 1311.2524, appendix C).

    They are the shift of the centre over the anchor's size and the logarithm of the size's ratio.
    """
    anchor_start, anchor_end = anchors.chunk(2, -1)
    start, end = boxes.chunk(2, -1)
    size = box_size(anchors)
    shift = (start + end - anchor_start - anchor_end) / 2 / size
    return torch.cat([shift, (box_size(boxes) / size).log()], -1)


def decode(anchors, deltas):
    """The inverse of `encode`; sizes change by at most a factor of 1000 / 16."""
    start, end = anchors.chunk(2, -1)
    shift, growth = deltas.chunk(2, -1)
    anchor_size = end - start
    limit = math.log(1000 / 16)
    centre = (start + end) / 2 + shift * anchor_size
    size = anchor_size * growth.clamp(-limit, limit).exp()
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def clip_boxes(boxes, size):
    """Boxes (..., 4) clipped to an image of size (H, W), or each to its own, a tensor (..., 2)."""
    H, W = size.unbind(-1) if isinstance(size, torch.Tensor) else size
    x1, y1, x2, y2 = boxes.clamp(min=0).unbind(-1)
    clipped = [x1.clamp(max=W), y1.clamp(max=H), x2.clamp(max=W), y2.clamp(max=H)]
    return torch.stack(clipped, -1)


def constant(values, like):
    """Python numbers as a tensor with the type and device of `like`.

    Unlike torch.tensor(values, device=...), a copy from pinned memory does not wait for the GPU.
    """
    values = torch.tensor(values, dtype=like.dtype)
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values


def base_anchors(strides, scales):
    """Anchors of area (stride * scale) ** 2 around the origin: (levels, num_anchors, 4)."""
    boxes = []
    for stride in strides:
        for ratio in (0.5, 1.0, 2.0):                                   # height / width
            for scale in scales:
                w = stride * scale / math.sqrt(ratio)
                h = stride * scale * math.sqrt(ratio)
                boxes.append((-w / 2, -h / 2, w / 2, h / 2))
    return torch.tensor(boxes).view(len(strides), -1, 4)


def anchor_boxes(base, levels, strides):
    """Anchors (A, 4), ordered by level, row, column, base anchor; levels: size (h, w) of each."""
    anchors = []
    for level_base, (h, w), stride in zip(base, levels, strides):
        y = torch.arange(h, device=base.device) * stride
        x = torch.arange(w, device=base.device) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")                  # each (h, w)
        corners = torch.stack([x, y, x, y], -1)[:, :, None]         # (h, w, 1, 4)
        anchors.append((corners + level_base).flatten(0, 2))
    return torch.cat(anchors)


def cells_inside(levels, strides, sizes, num_anchors):
    """Whether anchors' cells lie on images of sizes (B, 2), padded to a multiple of 32: (B, A)."""
    H, W = ((sizes + 31) // 32 * 32).split(1, 1)                    # each (B, 1)
    inside = []
    for (h, w), stride in zip(levels, strides):
        inside_rows = torch.arange(h, device=sizes.device) * stride < H         # (B, h)
        inside_columns = torch.arange(w, device=sizes.device) * stride < W      # (B, w)
        is_inside = inside_rows[:, :, None] & inside_columns[:, None]           # (B, h, w)
        inside.append(is_inside.flatten(1).repeat_interleave(num_anchors, 1))
    return torch.cat(inside, 1)


def best_anchors(scores, deltas, anchors, counts, size, per_level=1000):
    """Boxes of the anchors of the highest scores in each level, clipped to the image's size (H, W).

    Args: scores ([B,] A), deltas ([B,] A, 4), anchors (A, 4); counts: number of anchors of each
    level; size: one for all images, or (B, 1, 2).
    Returns: boxes ([B,] n, 4), and for each the anchor's index and level ([B,] n).
    """
    index = []
    level = []
    first = 0
    for i, level_scores in enumerate(scores.split(counts, -1)):
        best = level_scores.topk(min(per_level, counts[i])).indices
        index.append(first + best)
        level.append(torch.full_like(best, i))
        first += counts[i]
    index = torch.cat(index, -1)
    deltas = deltas.take_along_dim(index[..., None], -2)
    boxes = clip_boxes(decode(anchors[index], deltas), size)
    return boxes, index, torch.cat(level, -1)


class Assignment(NamedTuple):
    """Which object each anchor (or RoI) is matched to; an anchor of neither kind is not used.

    object_index (B, A): the object's number, arbitrary unless positive; positive (B, A): whether
    the anchor has an object; negative (B, A): whether it is background.
    """

    object_index: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor


def assign(boxes, labels, anchors, valid, *, positive_iou, negative_iou, min_pos_iou,
           match_low_quality):
    """Max-IoU assignment of mmdetection: an `Assignment` of anchors to objects.

    Args:
        boxes (B, G, 4), labels (B, G): objects, label -1 where padded; anchors ([B,] A, 4).
        valid (B, A): anchors that take part.
        positive_iou: an anchor whose best IoU is at least this gets that object.
        negative_iou: an anchor whose best IoU is below this is background.
        match_low_quality: whether every object also gets the anchors that tie for its best IoU, if
            that is at least `min_pos_iou`; of several objects the last one wins.
    """
    iou = box_iou(anchors, boxes)                                   # (B, A, G)
    ignored = (labels < 0)[:, None] | ~valid[..., None]
    iou = iou.masked_fill(ignored, -1)
    best_iou, object_index = iou.max(2)                             # (B, A)
    positive = best_iou >= positive_iou
    negative = best_iou < negative_iou
    if match_low_quality:
        object_iou = iou.amax(1, keepdim=True)                      # (B, 1, G)
        is_best = (iou == object_iou) & (object_iou >= min_pos_iou)
        object_number = torch.arange(1, boxes.shape[1] + 1, device=boxes.device)
        last_number = (is_best * object_number).amax(2)             # (B, A), 0 without any
        low_quality = last_number > 0
        object_index = torch.where(low_quality, last_number - 1, object_index)
        positive = positive | low_quality
        negative = negative & ~low_quality
    return Assignment(object_index, positive & valid, negative & valid)


NMS_BLOCK = {"cuda": 2048, "cpu": 256}  # boxes whose overlaps are computed at once: the larger a
NMS_ROUNDS = 8  # block, and the more rounds between two tests, the fewer waits for the GPU


def nms(boxes, scores, iou_threshold, max_keep):
    """Exact greedy NMS: a box goes if its IoU with a better box that stays is above the threshold.

    Args: boxes (n, 4), scores (n,); max_keep: the number of boxes that are returned at most.
    Returns: indices of the boxes that stay, best first.
    """
    valid = torch.ones_like(scores, dtype=torch.bool)
    return batched_nms(boxes[None], scores[None], valid[None], iou_threshold, max_keep)[0]


def batched_nms(boxes, scores, valid, iou_threshold, max_keep):
    """`nms` of the valid ones (B, n) among the boxes (B, n, 4) of B images: a list of indices.

    Blocks of boxes are taken in order of falling score, of all images at once.
    """
    order = scores.argsort(descending=True, stable=True)                # (B, n)
    boxes = boxes.take_along_dim(order[..., None], 1)
    valid = valid.gather(1, order)
    keep = torch.zeros_like(valid)
    position = order[:, :0]                                             # of the boxes that stay
    counts = [0] * len(boxes)                                           # their number per image
    block_size = NMS_BLOCK[boxes.device.type]
    for start in range(0, boxes.shape[1], block_size):
        if min(counts) >= max_keep:
            break
        members = slice(start, start + block_size)
        block = boxes[:, members]
        kept = boxes.take_along_dim(position[..., None], 1)
        kept = kept * keep.gather(1, position)[..., None]               # padding overlaps nothing
        suppressed = (box_iou(block, kept) > iou_threshold).any(2)
        overlaps = (box_iou(block, block) > iou_threshold).tril(-1)     # (B, worse, better)
        keep[:, members] = greedy_choice(valid[:, members] & ~suppressed, overlaps)
        counts = keep.sum(1).tolist()
        kept_first = keep.byte().argsort(descending=True, stable=True)
        position = kept_first[:, :max(counts)]
    chosen = order.gather(1, position)
    return [index[:min(count, max_keep)] for index, count in zip(chosen, counts)]


def greedy_choice(candidates, overlaps):
    """The candidates (B, n) that no better one which stays overlaps; overlaps (B, worse, better).

    They are the fixed point of this rule. It is unique, and iterating from "all stay" reaches it,
    since after i rounds the first i boxes are final.
    """
    keep = candidates
    previous = None
    while previous is None or not torch.equal(keep, previous):
        for _ in range(NMS_ROUNDS):
            previous = keep
            keep = candidates & ~(overlaps & keep[:, None]).any(2)
    return keep


def separate_classes(boxes, labels):
    """Boxes (..., n, 4) moved by an offset per class, so that those of two classes never overlap.

    It is added in float64, so that no IoU changes.
    """
    if boxes.numel() == 0:
        return boxes.double()
    offset = boxes.amax((-2, -1)) + 1
    return boxes.double() + (labels * offset[..., None])[..., None]


def nms_by_class(boxes, scores, labels, iou_threshold, max_keep):
    """`nms` inside each class."""
    return nms(separate_classes(boxes, labels), scores, iou_threshold, max_keep)


def multiclass_nms(boxes, scores, score_threshold=0.05, max_keep=100):
    """Detections of one image: the best pairs of box and class, after NMS in each class.

    Args: boxes (n, K, 4), or (n, 1, 4) if all classes share them; scores (n, K).
    Returns: boxes (m, 4), scores (m,) above the threshold, labels (m,), best first.
    """
    row, label = (scores > score_threshold).nonzero().unbind(1)
    boxes = boxes.expand(-1, scores.shape[1], -1)[row, label]
    scores = scores[row, label]
    keep = nms_by_class(boxes, scores, label, 0.5, max_keep)
    return boxes[keep], scores[keep], label[keep]


class RetinaNet(nn.Module):
    """RetinaNet (arXiv 1708.02002): a classifier and a box regressor on five levels of an FPN.

    Args of forward: images (B, 3, H, W), normalised; sizes (B, 2), h and w of each without padding;
    targets: in train mode {"boxes": (B, G, 4), "labels": (B, G)}, labels padded with -1.
    Returns: in train mode {"loss_cls", "loss_box"}; in eval mode for each image boxes (n, 4),
    scores (n,) and labels (n,), best first.
    """

    strides = (8, 16, 32, 64, 128)

    def __init__(self, backbone, classes, dim=256):
        super().__init__()
        self.backbone = backbone
        self.neck = FPN(backbone.channels, extra_levels=2, dim=dim)
        self.classes = classes
        scales = [4 * 2 ** (i / 3) for i in range(3)]
        self.register_buffer("base", base_anchors(self.strides, scales), persistent=False)
        self.num_anchors = self.base.shape[1]
        prior = 0.01                                            # initial probability, sec. 4.1
        bias = -math.log((1 - prior) / prior)
        self.classifier = conv_tower(dim, self.num_anchors * classes, bias)
        self.regressor = conv_tower(dim, self.num_anchors * 4, bias=0.0)

    def forward(self, images, sizes, targets=None):
        maps = self.neck(self.backbone(images))
        logits = self.run_tower(self.classifier, maps, self.classes)    # (B, A, K)
        deltas = self.run_tower(self.regressor, maps, 4)                # (B, A, 4)
        levels = [tuple(x.shape[2:]) for x in maps]
        anchors = anchor_boxes(self.base, levels, self.strides)         # (A, 4)
        if self.training:
            valid = cells_inside(levels, self.strides, sizes, self.num_anchors)
            return retinanet_losses(logits, deltas, anchors, valid, targets)
        counts = [h * w * self.num_anchors for h, w in levels]
        detections = []
        for scores, image_deltas, size in zip(logits.sigmoid(), deltas, sizes):
            best_score = scores.amax(1)
            boxes, index, _ = best_anchors(best_score, image_deltas, anchors, counts, size)
            detections.append(multiclass_nms(boxes[:, None], scores[index]))
        return detections

    def run_tower(self, tower, maps, dim):
        """Outputs of a tower for all levels, `dim` numbers per anchor: (B, A, dim) float32."""
        outputs = [tower(x).permute(0, 2, 3, 1) for x in maps]  # (B, h, w, num_anchors * dim)
        outputs = [x.reshape(len(x), -1, dim) for x in outputs]
        return torch.cat(outputs, 1).float()


def conv_tower(dim, out_dim, bias):
    """Four 3 x 3 convolutions with ReLU and an output convolution with an initial bias."""
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(inplace=True)]
    layers.append(nn.Conv2d(dim, out_dim, 3, padding=1))
    for conv in layers[::2]:
        init_classifier(conv)
    nn.init.constant_(layers[-1].bias, bias)
    return nn.Sequential(*layers)


FOCAL_GAMMA = 2.0
FOCAL_ALPHA = 0.25


def focal_loss(logits, targets):
    """Sigmoid focal loss (arXiv 1708.02002, Eq. 5) of each element; targets are 0 or 1."""
    targets = targets.to(logits.dtype)
    p = logits.sigmoid()
    missed = p + targets - 2 * p * targets                      # 1 - p_t
    alpha_t = 1 - FOCAL_ALPHA + (2 * FOCAL_ALPHA - 1) * targets
    weight = alpha_t * missed ** FOCAL_GAMMA
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def retinanet_losses(logits, deltas, anchors, valid, targets):
    """Focal loss of all anchors and L1 loss of the positive anchors' deltas.

    Both are divided by the number of positive anchors, where an image without any counts as one.
    Nothing here waits for the GPU. Args: logits (B, A, K), deltas (B, A, 4), anchors (A, 4),
    valid (B, A); targets as of `RetinaNet`.
    """
    boxes = targets["boxes"]
    labels = targets["labels"]
    object_index, positive, negative = assign(
        boxes, labels, anchors, valid,
        positive_iou=0.5, negative_iou=0.4, min_pos_iou=0.0, match_low_quality=True,
    )                                                           # each (B, A)
    num_positive = positive.sum(1).clamp(min=1).sum()

    anchor_labels = labels.gather(1, object_index).masked_fill(~positive, -1)
    classes = torch.arange(logits.shape[2], device=logits.device)
    is_class = anchor_labels[..., None] == classes              # (B, A, K)
    evaluated = (positive | negative)[..., None]
    classification = (focal_loss(logits, is_class) * evaluated).sum()

    matched_boxes = boxes.take_along_dim(object_index[..., None], 1)
    positive = positive[..., None]
    matched_boxes = torch.where(positive, matched_boxes, anchors)   # avoids log(0) on padding
    distance = (deltas - encode(anchors, matched_boxes)).abs()
    regression = (distance * positive).sum()
    return {"loss_cls": classification / num_positive, "loss_box": regression / num_positive}


@torch.no_grad()
@images_of_many_sizes()
def detect_image(model, image, args, device):
    """Run a detector on a PIL image, resized to --img-size; its boxes are in the image's pixels."""
    W, H = fit_size(image.size, args.img_size * 1333 / 800, args.img_size)
    resized = image.resize((W, H), Image.Resampling.BILINEAR)
    batch, sizes = pad_images([np.asarray(resized)], 32)
    sizes = sizes.to(device)
    images = normalize_padded(batch.to(device), sizes)
    with autocast(args, device):
        boxes, *others = model(images, sizes)[0]
    scale = constant([W / image.width, H / image.height] * 2, like=boxes)
    return boxes / scale, *others


def collate_boxes(images, boxes, labels):
    """Batch: images (B, H, W, 3), sizes (B, 2), boxes (B, G, 4), labels (B, G) padded with -1."""
    G = max(1, *map(len, labels))
    padded_boxes = torch.zeros(len(images), G, 4)
    padded_labels = torch.full((len(images), G), -1)
    for i, count in enumerate(map(len, labels)):
        padded_boxes[i, :count] = torch.from_numpy(boxes[i])
        padded_labels[i, :count] = torch.from_numpy(labels[i])
    return *pad_images(images, 32), padded_boxes, padded_labels


def detection_results(source, index, detections):
    """One image's detections as entries of a COCO results file, masks as compressed RLE."""
    boxes, scores, labels, *masks = detections
    boxes = np.concatenate([boxes[:, :2], box_size(boxes)], 1)
    image_id = source.entries[index]["image"]["id"]
    results = []
    for box, score, label in zip(boxes.tolist(), scores.tolist(), labels):
        ids = {"image_id": image_id, "category_id": source.categories[label]}
        results.append(ids | {"bbox": box, "score": score})
    for image_masks in masks:
        for result, mask in zip(results, image_masks):
            result["segmentation"] = rle_encode(mask)
    return results


def match_objects(source, index, results, kind):
    """`match_image` of one image's results. Raises: InputError for malformed annotations."""
    image = source.entries[index]["image"]
    try:
        annotations = annotations_for(kind, source.annotations[image["id"]])
        return match_image(image, annotations, results, kind)
    except ValueError as error:
        raise InputError(f"{source.path}: {error}") from None


def match_results(source, path, kinds):
    """{kind: [`match_image` of each image's results]} of a COCO results file.

    Kinds that no result has a field for are left out, unless there is nothing else.
    """
    results = {entry["image"]["id"]: [] for entry in source.entries}
    entries = read_results(path, results.keys(), source.categories)
    fields = set().union(*entries)
    present = [kind for kind in kinds if RESULT_FIELDS[kind] in fields]
    matches = {kind: [] for kind in present or kinds}
    check_fields(path, entries, [RESULT_FIELDS[kind] for kind in matches])
    for result in entries:
        results[result["image_id"]].append(result)
    for entry in source.entries:
        image = entry["image"]
        annotations = source.annotations[image["id"]]
        try:
            for kind in matches:
                pair = annotations_for(kind, annotations), results[image["id"]]
                matches[kind].append(match_image(image, *pair, kind))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
    return matches


def plot_detections(image, detections, classes, threshold):
    """A PIL image with the boxes, names and, if there are any, masks of its detections.

    Each detection has its own colour. Those that score less than the threshold are left out.
    """
    overlay = image.copy()
    boxes, scores, labels, *masks = detections
    colours = [tuple(colour) for colour in palette(len(boxes)).tolist()]
    shown = np.flatnonzero(scores >= threshold)[::-1]       # the best one is on top
    for i in shown if masks else ():
        opacity = Image.fromarray(masks[0][i].astype(np.uint8) * 128)
        overlay.paste(colours[i], mask=opacity)
    figure = Figure(overlay)
    for i in shown:
        figure.canvas.rectangle(figure.pixels(boxes[i]), outline=colours[i], width=figure.thick)
    for i in shown:
        caption = f"{classes[labels[i]]} {scores[i]:.2f}"
        figure.label(boxes[i, :2], caption, colours[i], centred=False)
    return figure.image


def count_objects(prediction, classes, threshold):
    """Number of objects of each class that reach the threshold, those of the best score first."""
    _, scores, labels, *_ = prediction
    return {"objects": Counter(classes[label] for label in labels[scores >= threshold])}


class Detection(DenseTask):
    """RetinaNet on COCO's layout."""

    metric = "AP"

    def open_split(self, folder, split):
        return Coco(folder, split)

    def sampler(self, source, **schedule):
        return GroupSampler(is_landscape=source.is_landscape, repeats=1, **schedule)

    def augment(self, raw, rng):
        multi_scale = self.args.schedule == "3x"
        return augment_detection(raw, rng, size=self.args.img_size, multi_scale=multi_scale)

    def collate(self, samples):
        return collate_boxes(*zip(*samples))

    @images_of_many_sizes()
    def losses(self, net, batch):
        images, sizes, boxes, labels = batch
        targets = {"boxes": boxes, "labels": labels}
        return net(normalize_padded(images, sizes), sizes, targets)

    def predict(self, model, image):
        """Boxes (n, 4), scores (n,), labels (n,) of a PIL image, best first."""
        detections = detect_image(model, image, self.args, self.device)
        return tuple(x.cpu().numpy() for x in detections)

    def overlay(self, image, prediction, classes):
        return plot_detections(image, prediction, classes, self.args.threshold)

    def describe(self, prediction, classes):
        return count_objects(prediction, classes, self.args.threshold)

    def record(self, source, sample, prediction):
        """The image's detections, matched with its annotations."""
        index, _ = sample
        return match_objects(source, index, self.results(source, sample, prediction), "bbox")

    def summarize(self, source, records):
        return accumulate(records, "bbox", source.categories)

    def summarize_classes(self, source, records):
        """AP of each category."""
        return category_ap(records, "bbox", source.categories)

    def results(self, source, sample, prediction):
        index, _ = sample
        return detection_results(source, index, prediction)

    def write_results(self, path, results):
        write_coco_results(path, results)

    def score_results(self, source, path):
        """Metrics of the boxes of a COCO results file."""
        matches = match_results(source, path, ["bbox"])
        return {"kind": "bbox"} | self.summarize(source, matches["bbox"])


# --------------------------------------------------------------------------------------- Mask R-CNN
# Instance segmentation: Mask R-CNN (arXiv 1703.06870) and Cascade Mask R-CNN (arXiv 1712.00726)
# with a region proposal network (RPN, arXiv 1506.01497). Files, augmentation, boxes, assignment and
# NMS are those of RetinaNet's chapter. Letters as there; R regions of interest (RoIs) of all
# images, S x S bins or pixels per RoI, T samples of all bins. A RoI is a row of five numbers: the
# image's number in the batch, x1, y1, x2, y2.
class RPN(nn.Module):
    """Region proposal network: maps -> scores (B, A), deltas (B, A, 4) of all levels' anchors."""

    def __init__(self, num_anchors, dim=256):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.scores = nn.Conv2d(dim, num_anchors, 1)
        self.deltas = nn.Conv2d(dim, 4 * num_anchors, 1)
        for conv in (self.conv, self.scores, self.deltas):
            init_classifier(conv)

    def forward(self, maps):
        scores = []
        deltas = []
        for x in maps:
            hidden = F.relu(self.conv(x))
            level_scores = self.scores(hidden).permute(0, 2, 3, 1)      # (B, h, w, num_anchors)
            level_deltas = self.deltas(hidden).permute(0, 2, 3, 1)      # (B, h, w, num_anchors * 4)
            scores.append(level_scores.flatten(1))
            deltas.append(level_deltas.reshape(len(x), -1, 4))
        return torch.cat(scores, 1).float(), torch.cat(deltas, 1).float()


def select_proposals(scores, deltas, anchors, counts, sizes, *, per_level, max_keep):
    """Proposals of B images, best first: a list of (n, 4). Arguments as of `best_anchors`.

    At most `per_level` anchors of each level go through NMS, boxes without area are dropped, and at
    most `max_keep` remain of all levels. sizes: (B, 2).
    """
    boxes, index, level = best_anchors(scores, deltas, anchors, counts, sizes[:, None], per_level)
    has_area = (box_size(boxes) > 0).all(2)                             # (B, n)
    boxes = boxes.masked_fill(~has_area[..., None], 0)
    apart = separate_classes(boxes, level)
    indices = batched_nms(apart, scores.gather(1, index), has_area, 0.7, max_keep)
    return [image_boxes[kept] for image_boxes, kept in zip(boxes, indices)]


def pad_proposals(proposals):
    """A list of (n, 4) per image as one tensor (B, P, 4), P > 0, and which are valid (B, P)."""
    length = max(1, *map(len, proposals))
    padded = proposals[0].new_zeros(len(proposals), length, 4)
    valid = torch.zeros_like(padded[..., 0], dtype=torch.bool)
    for i, boxes in enumerate(proposals):
        padded[i, :len(boxes)] = boxes
        valid[i, :len(boxes)] = True
    return padded, valid


class RandomSample(NamedTuple):
    """Random choice among candidates: positive ones, then negative ones, then unused entries.

    index (B, n): of the candidate; positive, negative (B, n): what it is, neither if unused.
    """

    index: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor


def random_sample(positive, negative, count, max_positive):
    """Sample `count` of N candidates per image: up to `max_positive` positive ones, then negatives.

    Args: positive, negative (B, N): bool. Returns: a `RandomSample` of n = min(count, N) entries.
    """
    candidates = positive.shape[1]
    key = torch.rand(positive.shape, device=positive.device)            # in [0, 1); the largest win
    top = key.masked_fill(~positive, -1).topk(min(max_positive, candidates))
    chosen = torch.zeros_like(positive).scatter(1, top.indices, top.values >= 0)
    key = key.masked_fill(~negative, -1).masked_fill(chosen, 2)
    key, index = key.topk(min(count, candidates))
    return RandomSample(index, positive=key > 1, negative=(key >= 0) & (key <= 1))


def delta_loss(deltas, targets, kind, beta):
    """Loss of each delta: "l1", or "smooth_l1", which is quadratic below `beta`."""
    if kind == "l1":
        return F.l1_loss(deltas, targets, reduction="none")
    return F.smooth_l1_loss(deltas, targets, reduction="none", beta=beta)


def rpn_losses(scores, deltas, anchors, valid, targets, box_loss):
    """Losses of 256 random anchors per image: cross-entropy of the score, box loss of the deltas.

    Both are divided by the number of sampled anchors; an image without any positive one counts as
    having one, likewise for negative ones. Args: scores (B, A), deltas (B, A, 4), anchors (A, 4);
    valid (B, A): anchors that take part; targets as of `MaskRCNN`; box_loss: "l1", or "smooth_l1"
    with beta 1/9.
    """
    boxes = targets["boxes"]
    assigned = assign(
        boxes, targets["labels"], anchors, valid,
        positive_iou=0.7, negative_iou=0.3, min_pos_iou=0.3, match_low_quality=True,
    )                                                                   # each (B, A)
    sample = random_sample(assigned.positive, assigned.negative, 256, 128)
    index, positive, negative = sample                                  # each (B, 256)
    used = positive | negative
    object_index = assigned.object_index.gather(1, index)
    start = anchors[index]                                              # (B, 256, 4)
    end = boxes.take_along_dim(object_index[..., None], 1)
    end = torch.where(positive[..., None], end, start)                  # avoids log(0) on padding
    classification = F.binary_cross_entropy_with_logits(
        scores.gather(1, index), positive.to(scores.dtype), reduction="none"
    )
    deltas = deltas.take_along_dim(index[..., None], 1)
    regression = delta_loss(deltas, encode(start, end), box_loss, beta=1 / 9)
    num_positive = positive.sum(1).clamp(min=1)                         # (B,)
    num_negative = negative.sum(1).clamp(min=1)
    count = (num_positive + num_negative).sum()
    return {
        "loss_rpn_cls": (classification * used).sum() / count,
        "loss_rpn_box": (regression * positive[..., None]).sum() / count,
    }


@torch.no_grad()
def sample_proposals(proposals, valid, targets, count, iou, *, match_low_quality):
    """Sample `count` of an image's proposals and ground-truth boxes to train a stage on.

    At most a quarter of them are positive: boxes that overlap an object by `iou` or more.
    Args: proposals (B, P, 4), valid (B, P): whether a slot holds a proposal.
    Returns: proposals (B, n, 4), their `Assignment` (B, n), neither positive nor negative in unused
    slots, and is_object (B, n): whether the box is ground truth.
    """
    boxes = targets["boxes"]
    is_real = targets["labels"] >= 0                                    # (B, G), not padding
    assigned = assign(
        boxes, targets["labels"], proposals, valid,
        positive_iou=iou, negative_iou=iou, min_pos_iou=iou, match_low_quality=match_low_quality,
    )                                                                   # each (B, P)
    object_number = torch.arange(boxes.shape[1], device=boxes.device).expand_as(is_real)
    object_index = torch.cat([object_number, assigned.object_index], 1)     # (B, G + P)
    positive = torch.cat([is_real, assigned.positive], 1)
    negative = torch.cat([torch.zeros_like(is_real), assigned.negative], 1)
    sample = random_sample(positive, negative, count, count // 4)       # each (B, n)
    proposals = torch.cat([boxes, proposals], 1)                        # (B, G + P, 4)
    proposals = proposals.take_along_dim(sample.index[..., None], 1)    # (B, n, 4)
    object_index = object_index.gather(1, sample.index)
    assigned = Assignment(object_index, sample.positive, sample.negative)
    return proposals, assigned, sample.index < boxes.shape[1]


def pool_rois(maps, rois, S, strides):
    """RoIAlign of RoIs (R, 5) on the pyramid level that suits their size (arXiv 1612.03144, Eq. 1).

    By the square root of the area, levels change at 112, 224 and 448 pixels.
    """
    size = box_size(rois[:, 1:]).clamp(min=0)
    side = size.prod(1).sqrt()
    level = (side / 56 + 1e-6).log2().floor()
    level = level.clamp(0, len(maps) - 1).long()
    scales = [1 / stride for stride in strides]
    return align_levels(maps, level, rois, S, scales)


def align_levels(maps, level, rois, S, scales):
    """RoIAlign (arXiv 1703.06870), each RoI on its own level, shifted by half a pixel ("aligned").

    A RoI is divided into S x S equal bins; a bin is the mean of bilinear samples, as many along
    each axis as it has pixels, rounded up. So a bin is a weighted sum of pixels, four per sample.
    `embedding_bag` computes weighted sums of table rows: the flattened maps are the table, so
    samples are never stored.

    Args: maps: list of (B, C, H, W); level (R,): index of each RoI's map; rois (R, 5); scales: size
    of each map over size of the image. Returns: (R, C, S, S).
    """
    C = maps[0].shape[1]
    table = [x.permute(0, 2, 3, 1).reshape(-1, C) for x in maps]
    table = torch.cat(table).to(rois.dtype)                             # (rows of all levels, C)
    shapes = [(x.shape[3], x.shape[2], x.shape[0]) for x in maps]
    shapes = constant(shapes, like=level)                               # (levels, 3): W, H, B
    rows = shapes.prod(1)                                               # (levels,) of the table
    level_start = rows.cumsum(0) - rows
    map_size = shapes[level, :2]                                        # (R, 2): W, H
    image = rois[:, 0].long()
    first_row = level_start[level] + image * map_size.prod(1)           # (R,)
    scale = constant(scales, like=rois)[level, None]
    corner = rois[:, 1:3] * scale - 0.5                                 # (R, 2), pixels of the map
    bin_size = box_size(rois[:, 1:]).clamp(min=0) * scale / S           # (R, 2)
    samples_per_bin = bin_size.ceil()                                   # (R, 2): across, down
    bin_id, bin_start, bin_xy = sample_bins(samples_per_bin, S)
    roi = bin_id // S ** 2                                              # (T,)
    point = corner[roi] + bin_xy * bin_size[roi]                        # (T, 2): x, y
    pixel, weight = bilinear_pixels(point, map_size[roi])               # each (T, 4)
    row = (first_row[roi, None] + pixel).flatten()
    sample_weight = 1 / samples_per_bin.prod(1)                         # (R,): for the bin's mean
    weight = (weight * sample_weight[roi, None]).flatten()
    bins = F.embedding_bag(row, table, 4 * bin_start, mode="sum", per_sample_weights=weight)
    return bins.view(-1, S, S, C).permute(0, 3, 1, 2)


def sample_bins(samples_per_bin, S):
    """Where the samples of RoIs lie, given their number (R, 2) across and down each of S x S bins.

    Returns: bin_id (T,), the sample's bin of all R * S * S; bin_start (R * S * S,), the first
    sample of each bin; bin_xy (T, 2), the sample's position in its RoI, in bins.
    """
    device = samples_per_bin.device
    count = samples_per_bin.prod(1).long().repeat_interleave(S ** 2)    # of each bin
    bin_start = count.cumsum(0) - count
    bin_id = torch.arange(len(count), device=device).repeat_interleave(count)
    number = torch.arange(len(bin_id), device=device) - bin_start[bin_id]   # inside its bin
    across, down = samples_per_bin[bin_id // S ** 2].unbind(1)
    x = bin_id % S + (number % across + 0.5) / across
    y = bin_id // S % S + (number // across + 0.5) / down
    return bin_id, bin_start, torch.stack([x, y], 1)


def bilinear_pixels(point, map_size):
    """Pixels (T, 4) of row-major maps and their weights (T, 4), for points x, y (T, 2) on each.

    Points up to one pixel outside of their map (W, H) (T, 2) take the border's value, others 0.
    """
    inside = ((point >= -1) & (point <= map_size)).all(1)
    point = torch.minimum(point.clamp(min=0), map_size - 1)
    top_left = point.long()
    bottom_right = torch.minimum(top_left + 1, map_size - 1)
    left, top = top_left.unbind(1)                                      # columns and rows
    right, bottom = bottom_right.unbind(1)
    top = top * map_size[:, 0]                                          # now a row's first pixel
    bottom = bottom * map_size[:, 0]
    pixel = torch.stack([top + left, top + right, bottom + left, bottom + right], 1)
    w_right, w_bottom = point.frac().unbind(1)
    w_left = 1 - w_right
    w_top = 1 - w_bottom
    weight = [w_left * w_top, w_right * w_top, w_left * w_bottom, w_right * w_bottom]
    weight = torch.stack(weight, 1)
    return pixel, weight * inside[:, None]


class BoxHead(nn.Module):
    """Pooled RoIs (R, 256, 7, 7) -> class logits (R, K + 1), background last, and deltas.

    kind: "2fc", two linear layers, or "4conv1fc", four convolutions and one linear layer. Deltas
    are (R, K * 4) if `class_specific`, otherwise (R, 4), which all classes share.
    """

    def __init__(self, classes, kind, class_specific, dim=256, hidden=1024):
        super().__init__()
        num_convs = 4 if kind == "4conv1fc" else 0
        convs = [conv_norm(dim, dim, 3) for _ in range(num_convs)]
        self.convs = nn.Sequential(*convs).apply(init_head)
        layers = [nn.Linear(dim * 7 ** 2, hidden), nn.ReLU(inplace=True)]
        if kind == "2fc":
            layers += [nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
        for linear in layers[::2]:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.linears = nn.Sequential(*layers)
        self.classifier = nn.Linear(hidden, classes + 1)
        self.regressor = nn.Linear(hidden, 4 * classes if class_specific else 4)
        init_classifier(self.classifier)
        init_classifier(self.regressor, std=0.001)

    def forward(self, pooled):
        x = self.linears(self.convs(pooled).flatten(1))
        return self.classifier(x).float(), self.regressor(x).float()


def class_deltas(deltas, labels):
    """The deltas (R, 4) of labels (R,), from (R, K * 4) or from (R, 4), which all classes share."""
    deltas = deltas.unflatten(1, (-1, 4))                               # (R, K or 1, 4)
    labels = labels.clamp(max=deltas.shape[1] - 1)
    return deltas.take_along_dim(labels[:, None, None], 1)[:, 0]


def apply_deltas(boxes, deltas, labels, logits, stds):
    """Boxes (R, 4) moved by deltas (R, 4 or K * 4) in units of `stds`, without gradient.

    Class-specific deltas are selected by label (R,), those of background (K) by the largest of the
    logits (R, K + 1) of the classes.
    """
    background = logits.shape[1] - 1
    best_class = logits[:, :-1].argmax(1)
    labels = torch.where(labels < background, labels, best_class)
    deltas = class_deltas(deltas.detach(), labels)
    return decode(boxes, deltas * constant(stds, like=deltas))


def giou_loss(boxes, targets):
    """1 - generalized IoU (arXiv 1902.09630) of boxes (R, 4), one target (R, 4) each: (R,)."""
    start, end = boxes.chunk(2, 1)
    target_start, target_end = targets.chunk(2, 1)
    top_left = torch.maximum(start, target_start)
    bottom_right = torch.minimum(end, target_end)
    enclosing_size = torch.maximum(end, target_end) - torch.minimum(start, target_start)
    enclosing_area = side_product(enclosing_size).clamp(min=1e-6)
    intersection = side_product((bottom_right - top_left).clamp(min=0))
    area_pred = side_product(end - start)
    area_target = side_product(target_end - target_start)
    union = (area_pred + area_target - intersection).clamp(min=1e-6)
    return 1 - intersection / union + (enclosing_area - union) / enclosing_area


def side_product(size):
    """Width * height of sizes (R, 2). The gradient of prod() would wait for the GPU."""
    return size[:, 0] * size[:, 1]


def box_losses(logits, deltas, boxes, labels, positive, object_boxes, stds, box_loss):
    """Cross-entropy of one stage's RoIs and box loss of those with an object, both divided by R.

    Args: logits (R, K + 1), deltas (R, 4 or K * 4), boxes (R, 4) of the RoIs, labels (R,): K for
    background; positive (P,): indices of the RoIs with an object; object_boxes (R, 4); stds: units
    of the deltas; box_loss: "l1" or "smooth_l1" (beta 1) of the deltas, or "giou" of the boxes,
    times 10.
    """
    start = boxes[positive]
    end = object_boxes[positive]
    deltas = class_deltas(deltas[positive], labels[positive])
    stds = constant(stds, like=deltas)
    if box_loss == "giou":
        regression = 10 * giou_loss(decode(start, deltas * stds), end)
    else:
        regression = delta_loss(deltas, encode(start, end) / stds, box_loss, beta=1.0)
    classification = F.cross_entropy(logits, labels, reduction="sum")
    count = max(len(labels), 1)
    return classification / count, regression.sum() / count


def mask_head(classes, dim=256):
    """Pooled RoIs (R, 256, 14, 14) -> mask logits of every class (R, K, 28, 28)."""
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(inplace=True)]
    layers += [nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.ReLU(inplace=True)]
    layers.append(nn.Conv2d(dim, classes, 1))
    for conv in layers[::2]:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)
    return nn.Sequential(*layers)


@torch.no_grad()
def roi_targets(image, boxes, object_index, positive, targets, background):
    """What the heads are trained to predict for RoIs, given the object matched to each.

    Args: image (R,): its number in the batch; boxes (R, 4); object_index, positive (R,): as of
    `Assignment`. Returns: labels (R,), objects' boxes (R, 4), positive (P,): indices of the RoIs
    with an object, and mask targets (P, 28, 28) of these.
    """
    labels = targets["labels"][image, object_index].masked_fill(~positive, background)
    positive = positive.nonzero()[:, 0]
    masks_per_image = (targets["labels"] >= 0).sum(1)
    mask_offset = masks_per_image.cumsum(0) - masks_per_image           # (B,)
    mask_index = mask_offset[image] + object_index
    masks = mask_targets(targets["masks"], boxes[positive], mask_index[positive], 28)
    return labels, targets["boxes"][image, object_index], positive, masks


@torch.no_grad()
def mask_targets(masks, boxes, mask_index, side):
    """Mask targets (R, side, side) bool: whether RoIAlign of each box's mask is at least 1/2.

    Its two axes are two matrix products, since large boxes hold too many samples to list. Boxes go
    in chunks, since each one takes a float copy of its mask. Args: masks (objects, H, W): bool or
    uint8; boxes (R, 4): clipped to the masks; mask_index (R,): the mask of each.
    """
    if not len(boxes):
        return masks.new_zeros(0, side, side, dtype=torch.bool)
    H, W = masks.shape[1:]
    x1, y1, x2, y2 = clip_boxes(boxes, (H, W)).unbind(1)
    across = axis_weights(x1, x2, side, W)                              # (R, side, W)
    down = axis_weights(y1, y2, side, H)                                # (R, side, H)
    targets = []
    with torch.autocast(masks.device.type, enabled=False):
        for chunk in torch.arange(len(boxes), device=boxes.device).split(32):
            chunk_masks = masks[mask_index[chunk]].to(boxes.dtype)
            aligned = down[chunk] @ chunk_masks @ across[chunk].mT
            targets.append(aligned >= 0.5)
    return torch.cat(targets)


def axis_weights(start, end, bins, length):
    """Matrix (R, bins, length): RoIAlign of intervals (R,) inside of one axis's `length` pixels."""
    start = start[:, None, None]
    bin_size = (end[:, None, None] - start) / bins                      # (R, 1, 1)
    samples = bin_size.ceil()                                           # per bin
    sample = torch.arange(math.ceil(length / bins), device=start.device)    # at most
    bin_number = torch.arange(bins, device=start.device)[:, None]
    divisor = samples.clamp(min=1)                                      # of no sample, too
    point = start - 0.5 + (bin_number + (sample + 0.5) / divisor) * bin_size    # (R, bins, samples)
    inside = (sample < samples) & (point >= -1) & (point <= length)
    sample_weight = inside / divisor
    point = point.clamp(0, length - 1)
    pixel = point.long()
    next_pixel = (pixel + 1).clamp(max=length - 1)
    frac = point.frac()
    weights = start.new_zeros(len(start), bins, length)
    weights.scatter_add_(2, pixel, (1 - frac) * sample_weight)
    return weights.scatter_add_(2, next_pixel, frac * sample_weight)


def mask_loss(mask_logits, labels, targets):
    """Mean cross-entropy of the labels' (P,) mask logits (P, K, 28, 28); targets (P, 28, 28)."""
    mask_logits = mask_logits.take_along_dim(labels[:, None, None, None], 1)[:, 0]
    loss = F.binary_cross_entropy_with_logits(mask_logits, targets.float(), reduction="sum")
    return loss / max(targets.numel(), 1)


def paste_masks(probabilities, boxes, size):
    """Masks (n, S, S) resized into boxes (n, 4) of an image (H, W), 0 outside: (n, H, W)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    rows = tent_weights(y1, y2, probabilities.shape[1], size[0])        # (n, H, S)
    columns = tent_weights(x1, x2, probabilities.shape[2], size[1])     # (n, W, S)
    return rows @ probabilities @ columns.mT


def tent_weights(start, end, cells, length):
    """Bilinear weights (n, length, cells) of an interval's cells in each of `length` pixels.

    An interval without extent shows the middle of the cells in the pixels that mmdetection looks
    at (on a CPU): its own and one more on each side; at the border of the image that is one pixel.
    """
    start = start[:, None]
    end = end[:, None]
    extent = (end - start).clamp(min=1e-6)
    pixel = torch.arange(length, device=start.device)
    cell = torch.arange(cells, device=start.device)
    point = (pixel + 0.5 - start) / extent * cells - 0.5                # (n, length), in cells
    near = (pixel >= start.floor() - 1) & (pixel < end.ceil() + 1)
    point = point.masked_fill((start == end) & near, (cells - 1) / 2)
    return (1 - (point[..., None] - cell).abs()).clamp(min=0)


class MaskRCNN(nn.Module):
    """Mask R-CNN or, with `cascade`, Cascade Mask R-CNN, whose three stages refine the boxes.

    box_head: "2fc", or "4conv1fc" as in the cascade's published results, which learns one box per
    class by GIoU; the cascade's "2fc" has one box for all classes. rois: number of RoIs per image
    that each stage is trained on. dim: channels of pyramid and heads.
    Args of forward: as of `RetinaNet`; `targets` also has "masks" (objects, H, W) of all images.
    Returns: in train mode {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"},
    the last three as "stage1_loss_cls" and so on if `cascade`; in eval mode for each image boxes
    (n, 4), scores (n,), labels (n,) and mask probabilities (n, 28, 28), best first.
    """

    strides = (4, 8, 16, 32, 64)
    stages = (  # IoU from which a RoI is positive, units of the deltas, weight of the losses
        {"iou": 0.5, "stds": (0.1, 0.1, 0.2, 0.2), "weight": 1.0},
        {"iou": 0.6, "stds": (0.05, 0.05, 0.1, 0.1), "weight": 0.5},
        {"iou": 0.7, "stds": (0.033, 0.033, 0.067, 0.067), "weight": 0.25},
    )

    def __init__(self, backbone, classes, *, rois, box_head, cascade=False, dim=256):
        super().__init__()
        if box_head not in ("2fc", "4conv1fc"):
            raise ValueError(f"unknown box_head {box_head!r}, expected '2fc' or '4conv1fc'")
        self.backbone = backbone
        self.neck = FPN(backbone.channels, dim=dim)
        self.classes = classes
        self.cascade = cascade
        self.rois = rois
        self.rpn_box_loss = "smooth_l1" if cascade else "l1"
        self.box_loss = "giou" if box_head == "4conv1fc" else self.rpn_box_loss
        if not cascade:
            self.stages = self.stages[:1]
        self.register_buffer("base", base_anchors(self.strides, [8]), persistent=False)
        self.num_anchors = self.base.shape[1]
        self.rpn = RPN(self.num_anchors, dim)
        class_specific = not cascade or box_head == "4conv1fc"
        box_heads = [BoxHead(classes, box_head, class_specific, dim) for _ in self.stages]
        self.box_heads = nn.ModuleList(box_heads)
        self.mask_heads = nn.ModuleList(mask_head(classes, dim) for _ in self.stages)

    def forward(self, images, sizes, targets=None):
        maps = self.neck(self.backbone(images))
        rpn_maps = [*maps, F.max_pool2d(maps[-1], 1, stride=2)]
        levels = [tuple(x.shape[2:]) for x in rpn_maps]
        scores, deltas = self.rpn(rpn_maps)
        anchors = anchor_boxes(self.base, levels, self.strides)         # (A, 4)
        proposals = self.propose(scores, deltas, anchors, levels, sizes)
        if not self.training:
            return [self.detect(maps, i, proposals[i], size) for i, size in enumerate(sizes)]
        valid = cells_inside(levels, self.strides, sizes, self.num_anchors)
        if self.cascade:                                # only anchors fully inside of their image
            start, end = anchors.chunk(2, 1)
            image_size = sizes.flip(1)[:, None]                         # (B, 1, 2): w, h
            inside = (start >= 0) & (end < image_size)                  # (B, A, 2)
            valid = valid & inside.all(2)
        losses = rpn_losses(scores, deltas, anchors, valid, targets, self.rpn_box_loss)
        return losses | self.head_losses(maps, proposals, sizes, targets)

    @torch.no_grad()
    def propose(self, scores, deltas, anchors, levels, sizes):
        """A list of proposals (n, 4), one per image."""
        per_level = 2000 if self.training else 1000
        max_keep = 2000 if self.training and self.cascade else 1000
        counts = [h * w * self.num_anchors for h, w in levels]
        return select_proposals(
            scores, deltas, anchors, counts, sizes, per_level=per_level, max_keep=max_keep
        )

    def head_losses(self, maps, proposals, sizes, targets):
        """Losses of all stages; the boxes that a stage refines are the next one's proposals.

        Refined ground-truth boxes, which every stage adds itself, and non-finite ones are dropped.
        """
        proposals, valid = pad_proposals(proposals)
        losses = {}
        for i, stage in enumerate(self.stages):
            proposals, assigned, is_object = sample_proposals(
                proposals, valid, targets, self.rois, stage["iou"],
                match_low_quality=not self.cascade,
            )
            used = assigned.positive | assigned.negative                # (B, n)
            image, slot = used.nonzero().unbind(1)                      # (R,)
            boxes = proposals[image, slot]                              # (R, 4)
            rois = torch.cat([image[:, None], boxes], 1)                # (R, 5)
            labels, object_boxes, positive, masks = roi_targets(
                image, boxes, assigned.object_index[image, slot], assigned.positive[image, slot],
                targets, background=self.classes,
            )
            logits, deltas = self.box_heads[i](pool_rois(maps, rois, 7, self.strides))
            mask_logits = self.mask_heads[i](pool_rois(maps, rois[positive], 14, self.strides))
            loss_mask = mask_loss(mask_logits.float(), labels[positive], masks)
            loss_cls, loss_box = box_losses(
                logits, deltas, boxes, labels, positive, object_boxes, stage["stds"],
                self.box_loss,
            )
            prefix = f"stage{i + 1}_" if self.cascade else ""
            losses[prefix + "loss_cls"] = stage["weight"] * loss_cls
            losses[prefix + "loss_box"] = stage["weight"] * loss_box
            losses[prefix + "loss_mask"] = stage["weight"] * loss_mask
            if i + 1 < len(self.stages):
                refined = apply_deltas(boxes, deltas, labels, logits, stage["stds"])
                refined = clip_boxes(refined, sizes[image])
                proposals = proposals.index_put((image, slot), refined)
                keep = ~is_object[image, slot] & refined.isfinite().all(1)
                valid = torch.zeros_like(is_object).index_put((image, slot), keep)
        return losses

    def detect(self, maps, image, boxes, size):
        """Detections of image number `image` of the batch, size (h, w), from proposals `boxes`."""
        background = torch.full_like(boxes[:, 0], self.classes, dtype=torch.long)
        logits_sum = 0
        for stage, box_head in zip(self.stages, self.box_heads):
            start = boxes
            rois = F.pad(start, (1, 0), value=image)                    # (n, 5)
            logits, deltas = box_head(pool_rois(maps, rois, 7, self.strides))
            logits_sum = logits_sum + logits
            refined = apply_deltas(start, deltas, background, logits, stage["stds"])
            boxes = clip_boxes(refined, size)
        deltas = deltas.unflatten(1, (-1, 4)) * constant(stage["stds"], like=deltas)
        class_boxes = clip_boxes(decode(start[:, None], deltas), size)  # (n, K or 1, 4)
        probabilities = (logits_sum / len(self.stages)).softmax(1)
        boxes, scores, labels = multiclass_nms(class_boxes, probabilities[:, :-1])
        rois = F.pad(boxes, (1, 0), value=image)
        pooled = pool_rois(maps, rois, 14, self.strides)
        masks = [head(pooled).float().sigmoid() for head in self.mask_heads]
        masks = torch.stack(masks).mean(0)                              # (n, K, 28, 28)
        masks = masks.take_along_dim(labels[:, None, None, None], 1)[:, 0]
        return boxes, scores, labels, masks


class InstanceSegmentation(DenseTask):
    """Mask R-CNN and Cascade Mask R-CNN on COCO's layout."""

    metric = "mask_AP"

    def open_split(self, folder, split):
        return Coco(folder, split, masks=True)

    def sampler(self, source, **schedule):
        return GroupSampler(is_landscape=source.is_landscape, repeats=1, **schedule)

    def augment(self, raw, rng):
        multi_scale = self.args.schedule == "3x"
        return augment_detection(raw, rng, size=self.args.img_size, multi_scale=multi_scale)

    def collate(self, samples):
        """As `collate_boxes`, and the masks of all images' objects: (objects, H, W) bool."""
        images, boxes, labels, masks = zip(*samples)
        batch, *others = collate_boxes(images, boxes, labels)
        H, W = batch.shape[1:3]
        padded = []
        for image_masks in masks:
            _, h, w = image_masks.shape
            padded.append(F.pad(torch.from_numpy(image_masks), (0, W - w, 0, H - h)))
        return batch, *others, torch.cat(padded)

    @images_of_many_sizes()
    def losses(self, net, batch):
        images, sizes, boxes, labels, masks = batch
        targets = {"boxes": boxes, "labels": labels, "masks": masks}
        return net(normalize_padded(images, sizes), sizes, targets)

    def predict(self, model, image):
        """Boxes (n, 4), scores (n,), labels (n,), masks (n, H, W) bool, best first."""
        boxes, scores, labels, masks = detect_image(model, image, self.args, self.device)
        chunk = max(1, 2 ** 24 // (image.width * image.height))     # masks that are pasted at once
        pasted = []
        for some_masks, some_boxes in zip(masks.split(chunk), boxes.split(chunk)):
            image_masks = paste_masks(some_masks, some_boxes, (image.height, image.width))
            pasted.append(image_masks >= 0.5)
        detections = boxes, scores, labels, torch.cat(pasted)
        return tuple(x.cpu().numpy() for x in detections)

    def overlay(self, image, prediction, classes):
        return plot_detections(image, prediction, classes, self.args.threshold)

    def describe(self, prediction, classes):
        return count_objects(prediction, classes, self.args.threshold)

    def results(self, source, sample, prediction):
        index, _ = sample
        return detection_results(source, index, prediction)

    def record(self, source, sample, prediction):
        """The image's detections, matched with its annotations by boxes and by masks."""
        index, _ = sample
        results = self.results(source, sample, prediction)
        return [match_objects(source, index, results, kind) for kind in ("bbox", "segm")]

    def summarize(self, source, records):
        return self.metrics_of(source, dict(zip(("bbox", "segm"), zip(*records))))

    def metrics_of(self, source, matches):
        """The metrics of {kind: matches of all images}."""
        metrics = {}
        for kind, prefix in (("bbox", "box"), ("segm", "mask")):
            if kind in matches:
                values = accumulate(matches[kind], kind, source.categories)
                metrics |= {f"{prefix}_{name}": value for name, value in values.items()}
        return metrics

    def summarize_classes(self, source, records):
        """AP of the masks of each category."""
        _, mask_records = zip(*records)
        return category_ap(mask_records, "segm", source.categories)

    def score_results(self, source, path):
        """Metrics of the boxes and of the masks of a COCO results file, or of what it holds."""
        return self.metrics_of(source, match_results(source, path, ["bbox", "segm"]))

    def write_results(self, path, results):
        """Write NAME.bbox.json and NAME.segm.json for NAME.json.

        COCO's server would take the sizes of masks from boxes that stand beside them.
        """
        for kind, field in RESULT_FIELDS.items():
            names = "image_id", "category_id", "score", field
            entries = [dict(zip(names, itemgetter(*names)(result))) for result in results]
            write_coco_results(Path(path).with_suffix(f".{kind}.json"), entries)


# --------------------------------------------------------------------------------------------- pose
# Keypoints of persons, top-down: a detector gives boxes, and the network sees one crop per person.
# SimpleBaseline (arXiv 1804.06208) on the 133 keypoints of COCO-WholeBody (arXiv 2007.11858), or on
# the first 17 of them, which are COCO's, with TCFormer's recipe (arXiv 2204.08680) by mmpose 0.x.
# Letters: P persons of an image, K keypoints (133 or 17), H x W crops, h x w heat maps, H/4 x W/4.
# A person's box is x, y, w, h, score. Its frame, given by centre, size and angle, is the region of
# the image that becomes the crop: its box, enlarged to the aspect of a crop.
PERSON = 1              # COCO's category
ASPECT = 3 / 4          # width of a crop divided by its height
BOX_PADDING = 1.25      # size of a frame divided by that of its box
CROPS_PER_BATCH = 32    # in inference
STRIDE = 4              # pixels of the crop per pixel of a heat map
PARTS = {
    "body": slice(0, 17), "foot": slice(17, 23), "face": slice(23, 91),
    "lefthand": slice(91, 112), "righthand": slice(112, 133),
}
FIELDS = {part: f"{part}_kpts" for part in PARTS} | {"body": "keypoints"}   # names in the files

# COCO-WholeBody's sigmas: how much annotators disagree, in thousandths of the person's size. Rows:
# body, feet, contour of the face, eyebrows and nose, eyes, mouth, hands.
SIGMAS = np.array("""
    26 25 25 35 35 79 79 72 72 62 62 107 107 87 87 89 89
    68 66 66 92 94 94
    42 43 44 43 40 35 31 25 20 23 29 32 37 38 43 41 45
    13 12 11 11 12 12 11 11 13 15 9 7 7 7 12 9 8 16 10
    17 11 9 11 9 7 13 8 11 12 10 34
    8 8 9 8 8 7 10 8 9 9 9 7 7 8 11 8 8 8 10 8
    29 22 35 37 47 26 25 24 35 18 24 22 26 17 21 21 32 20 19 22 31
    29 22 35 37 47 26 25 24 35 18 24 22 26 17 21 21 32 20 19 22 31
""".split(), float) / 1000
MIRROR_ORDER = np.r_[   # the keypoint that each of the 133 becomes in a mirror
    0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15,       # left and right alternate
    20:23, 17:20,                                                   # feet
    39:22:-1, 49:39:-1,                                             # contour, eyebrows
    50:54, 58:53:-1,                                                # bridge of the nose, nostrils
    68, 67, 66, 65, 70, 69, 62, 61, 60, 59, 64, 63,                 # eyes
    77:70:-1, 82:77:-1, 87:82:-1, 90:87:-1,                         # outer and inner lips
    112:133, 91:112,                                                # hands
]
LINES = [               # of an overlay, each through several keypoints
    (15, 13, 11, 5, 7, 9), (16, 14, 12, 6, 8, 10),                  # ankle to hip to wrist
    (11, 12), (5, 6), (3, 1, 0, 2, 4),                              # hips, shoulders, ear to ear
    (17, 15, 18), (15, 19), (20, 16, 21), (16, 22),                 # toes and heels to ankles
]
LINES += [(91, *range(i, i + 4)) for i in range(92, 112, 4)]         # fingers
LINES += [(112, *range(i, i + 4)) for i in range(113, 133, 4)]


class Persons:
    """Persons of folder/SPLIT2017 with 133 keypoints (COCO-WholeBody's file) or COCO's 17.

    The 17 come from COCO's own file, or from COCO-WholeBody's if there is none. A training sample
    is a person, a validation sample an image with all its persons: the annotated ones or, if
    `boxes` names a COCO results file, the detected ones. Persons are in arrays, which loader
    processes share.
    Only in validation, `ids` holds the samples' image ids, and `annotations` {image id: [dicts]}.
    Raises: InputError if a file is missing or malformed (names the id) or has no usable person.
    """

    def __init__(self, folder, split, keypoints, boxes=None):
        self.split = split
        self.folder = Path(folder) / f"{split}2017"
        path = Path(folder) / "annotations" / f"person_keypoints_{split}2017.json"
        if keypoints == 133 or not path.is_file():
            path = path.with_name(f"coco_wholebody_{split}_v1.0.json")
        self.path = path
        data = read_annotations(path)
        if not self.folder.is_dir():
            expected = "DIR/{train,val}2017 and DIR/annotations/*.json"
            raise InputError(f"{self.folder} is not a folder; expected {expected}")
        images = {image["id"]: image for image in data["images"]}
        persons = [a for a in data["annotations"] if a["category_id"] == PERSON]
        self.left_out = Counter()
        rows = annotated_persons(persons, images, keypoints, path, self.left_out)
        problem = f"{path} holds no person with keypoints"
        if split == "val" and boxes:
            no_points = np.zeros((keypoints, 3))
            rows = [(i, box, no_points) for i, box in read_person_boxes(boxes) if i in images]
            self.left_out.clear()
            problem = f"{boxes} holds no person in an image of {path}"
        if not rows:
            raise InputError(problem)
        self.store(rows, images)
        self.annotations = {image_id: [] for image_id in self.ids}
        if split == "val":
            for person in persons:
                self.annotations[person["image_id"]].append(person)
        names = []
        for part, indices in PARTS.items():
            names += [f"{part} {i}" for i in range(indices.stop - indices.start)]
        self.classes = names[:keypoints]

    def store(self, rows, images):
        """Turn persons, rows (image id, box, points), into arrays, ordered by image id."""
        rows.sort(key=lambda row: row[0])                       # stable: keeps the file's order
        image_ids, boxes, points = zip(*rows)
        self.image_ids = np.array(image_ids)                    # (persons of all images,)
        self.boxes = np.array(boxes, np.float64)                # (persons of all images, 5)
        self.points = np.array(points, np.float32)              # (persons of all images, K, 3)
        self.ids = sorted(images) if self.split == "val" else []
        files = [os.fsencode(images[i]["file_name"]) for i in self.ids or image_ids]
        self.files = np.array(files)                            # (samples,)
        sizes = [(images[i]["width"], images[i]["height"]) for i in self.ids or image_ids]
        self.sizes = np.array(sizes)                            # (samples, 2)

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.folder / os.fsdecode(bytes(self.files[index])))

    def read(self, index):
        """RGB image, boxes (P, 5), points (P, K, 3), which are all 0 for detections."""
        persons = slice(index, index + 1)
        if self.split == "val":
            persons = self.image_ids == self.ids[index]
        image = read_annotated_image(self.name(index), *self.sizes[index].tolist())
        return image, self.boxes[persons], self.points[persons]


def annotated_persons(persons, images, keypoints, path, left_out):
    """Rows (image id, box (5,), points (K, 3)) of the annotations that mmpose keeps.

    They are not crowds, and have an area, an extent inside the image and a body keypoint not all 0;
    the others are counted in `left_out`, a Counter of reasons, crowds excepted. As in mmpose, a
    clipped box is one pixel short at the right and the bottom.
    """
    rows = []
    for person in persons:
        points = read_points(person, keypoints, f"{path}: annotation {person.get('id')}")
        image = images[person["image_id"]]
        x, y, w, h = person["bbox"]
        left = max(x, 0)
        top = max(y, 0)
        width = min(x + w, image["width"]) - 1 - left
        height = min(y + h, image["height"]) - 1 - top
        if person["iscrowd"]:
            continue
        if min(width, height, person["area"]) <= 0:
            left_out["without area inside the image"] += 1
        elif not points[PARTS["body"]].any():
            left_out["without body keypoints"] += 1
        else:
            box = left, top, width, height, 1.0
            rows.append((image["id"], box, points.astype(np.float32)))
    return rows


def read_points(entry, keypoints, where):
    """Points (K, 3) of an annotation or result, or InputError that begins with `where`."""
    points = []
    for part in ("body",) if keypoints == 17 else PARTS:
        values = entry.get(FIELDS[part])
        size = 3 * (PARTS[part].stop - PARTS[part].start)
        is_complete = isinstance(values, list) and len(values) == size
        if not (is_complete and all(map(is_position, values))):
            raise InputError(f"{where}: {FIELDS[part]} must be {size} numbers x, y, v of at most "
                             f"{MAX_POSITION}")
        points += values
    return np.array(points, np.float64).reshape(-1, 3)


def read_person_boxes(path):
    """Persons with an extent in a COCO results file: list of (image id, box (5,)).

    Raises: InputError that names the file and the image of a malformed detection.
    """
    persons = []
    for result in read_results(path):
        image_id = result["image_id"]
        box = result.get("bbox")
        if box is None:
            raise InputError(f"{path}: image {image_id}: expected a bbox x, y, width, height")
        if result["category_id"] == PERSON and min(box[2:]) > 0:
            persons.append((image_id, (*box, result["score"])))
    return persons


def crop_frame(boxes, padding):
    """Centres and sizes (..., 2) of the frames of boxes (..., 4 or 5).

    One side grows to a crop's aspect, then both grow by the factor `padding`.
    """
    corner = boxes[..., :2]
    size = boxes[..., 2:4]
    w, h = np.maximum(size, 1e-3).T
    sides = np.stack([np.maximum(w, ASPECT * h), np.maximum(h, w / ASPECT)], -1)
    return corner + size / 2, padding * sides


def crop_person(image, points, centre, size, angle, height):
    """Cut a frame, tilted by `angle` (radians, clockwise), out of a PIL image and resize it.

    Returns: uint8 crop (height, 3/4 height, 3), black outside the image, and the points (K, 3) of
    the image in pixels of the crop.
    """
    cos = np.cos(angle)
    sin = np.sin(angle)
    width = int(ASPECT * height)
    middle = np.array([width, height]) / 2
    to_crop = width / size[0] * np.array([[cos, -sin], [sin, cos]])     # of row vectors
    to_image = np.linalg.inv(to_crop)
    offset = centre + 0.5 - (middle + 0.5) @ to_image   # Pillow's pixels are centred at 0.5, 1.5
    affine = np.column_stack([to_image.T, offset]).ravel().tolist()
    bilinear = Image.Resampling.BILINEAR
    crop = image.transform((width, height), Image.Transform.AFFINE, affine, bilinear)
    xy = (points[:, :2] - centre) @ to_crop + middle
    return np.array(crop), np.concatenate([xy, points[:, 2:]], 1)


def augment_person(raw, rng, *, height, jitter):
    """Random shift, mirroring, half body, scale and rotation of a training sample of `Persons`.

    jitter: 1 is TCFormer's recipe; 0 leaves only mirroring.
    Returns: uint8 crop (height, 3/4 height, 3), float32 points (K, 3) in its pixels.
    """
    image, boxes, (points,) = raw
    centre, size = crop_frame(boxes[0], BOX_PADDING)
    if rng.random() < 0.3:
        shift = [rng.uniform(-1, 1), rng.uniform(-1, 1)]
        centre = centre + jitter * 0.16 * size * shift
    if rng.random() < 0.5:
        last = image.width - 1
        image = ImageOps.mirror(image)
        points = points[MIRROR_ORDER[:len(points)]] * (-1, 1, 1) + (last, 0, 0)
        centre = centre * (-1, 1) + (last, 0)
    labelled = points[:, 2] > 0
    if labelled.sum() > 8 and rng.random() < 0.3 * jitter:
        half = half_body(points, labelled, rng)                 # (n, 2)
        if len(half) >= 2:
            half_box = np.append(half.min(0), np.ptp(half, 0))
            centre = half.mean(0)
            _, size = crop_frame(half_box, 1.5)
    zoom = 1 + jitter * 0.5 * rng.gauss(0, 1)
    size = size * min(max(zoom, 0.5), 1.5)
    degrees = 0
    if rng.random() < 0.6:
        degrees = jitter * 40 * rng.gauss(0, 1)
    angle = math.radians(min(max(degrees, -80), 80))
    crop, points = crop_person(image, points, centre, size, angle, height)
    return crop, points.astype(np.float32)


def half_body(points, labelled, rng):
    """The labelled keypoints (n, 2) of one half of the body, at random unless one has too few.

    As in mmpose, the lower half is all from index 11 on, which includes face and hands.
    """
    is_upper = np.arange(len(points)) < 11
    upper = points[is_upper & labelled, :2]
    lower = points[~is_upper & labelled, :2]
    prefer_upper = rng.gauss(0, 1) < 0.5
    if (prefer_upper and len(upper) > 2) or len(lower) <= 2:
        return upper
    return lower


class SimpleBaseline(nn.Module):
    """Three deconvolutions on the backbone's coarsest map (arXiv 1804.06208, sec. 2).

    forward: images (B, 3, H, W), normalised -> heat maps (B, K, H/4, W/4); in train mode, with
    points (B, K, 3) in pixels of the images -> {"loss_heatmap": scalar}.
    """

    def __init__(self, backbone, classes, dim=256):
        super().__init__()
        self.backbone = backbone
        self.deconvs = nn.Sequential()
        for in_dim in (*backbone.channels, dim, dim):           # each doubles height and width
            deconv = nn.ConvTranspose2d(in_dim, dim, 4, stride=2, padding=1, bias=False)
            self.deconvs.append(nn.Sequential(deconv, nn.BatchNorm2d(dim), nn.ReLU(inplace=True)))
        self.classifier = nn.Conv2d(dim, classes, 1)
        for deconv, *_ in self.deconvs:
            nn.init.normal_(deconv.weight, std=0.001)
        init_classifier(self.classifier, std=0.001)

    def forward(self, images, points=None):
        coarsest, = self.backbone(images)                       # (B, C, H/32, W/32)
        heat_maps = self.classifier(self.deconvs(coarsest))     # (B, K, H/4, W/4)
        if not self.training:
            return heat_maps
        targets, weights = gaussian_maps(points, heat_maps.shape[2:])
        weighted = heat_maps.float() * weights[..., None, None]
        loss = F.mse_loss(weighted, targets)    # maps of weight 0 count in the mean, as in mmpose
        return {"loss_heatmap": loss}


def gaussian_maps(points, size):
    """Target heat maps of points (B, K, 3) in pixels of the crop; size: h and w of the maps.

    Returns: maps (B, K, h, w), Gaussians of peak 1 cut off at 3 sigma along both axes, and weights
    (B, K), 1 if the point is labelled and its Gaussian overlaps the map. Maps of weight 0 are 0.
    As in mmpose, one pixel to the left or above of what overlaps still has weight 1.
    """
    sigma = 2.0                                                 # in pixels of the map
    reach = 3 * sigma
    peak = (points[..., :2] / STRIDE + 0.5).trunc()             # towards 0, as in mmpose
    weights = points[..., 2] > 0
    factors = []
    for side, position in zip(size, peak.flip(-1).unbind(-1)):  # y, then x
        distance = torch.arange(side, device=points.device) - position[..., None]   # (B, K, side)
        gaussian = (-distance ** 2 / (2 * sigma ** 2)).exp()
        factors.append(gaussian * (distance.abs() <= reach))
        weights = weights & (position >= -reach - 1) & (position < side + reach)
    rows, columns = factors                                     # (B, K, h), (B, K, w)
    weights = weights.to(points.dtype)
    return weights[..., None, None] * rows[..., None] * columns[..., None, :], weights


def mean_of_mirrored(model, x):
    """Mean heat maps (B, K, h, w) of crops (B, 3, H, W) and of the mirrored crops, mirrored back.

    At stride 4 the latter lie 3/4 of a pixel too far left; as in mmpose they are moved by one.
    """
    maps = model(x).float()
    mirrored = model(x.flip(3)).float().flip(3)
    mirrored = mirrored[:, MIRROR_ORDER[:maps.shape[1]]]
    shifted = torch.cat([mirrored[..., :1], mirrored[..., :-1]], 3)
    return (maps + shifted) / 2


def peaks(maps):
    """Maximum of each heat map (B, K, h, w) -> (B, K, 3): x, y, value.

    x and y move by a quarter of a pixel towards the larger neighbour, unless at the border; they
    are -1 if the value is not above 0.
    """
    h, w = maps.shape[2:]
    values = maps.flatten(2)                                            # (B, K, h * w)
    value, index = values.max(2)                                        # (B, K)
    xy = torch.stack([index % w, index // w], -1)                       # (B, K, 2)
    offsets = constant([1, w, -1, -w], like=index)                      # right, below, left, above
    neighbours = values.gather(2, (index[..., None] + offsets).clamp(0, h * w - 1))     # (B, K, 4)
    direction = (neighbours[..., :2] - neighbours[..., 2:]).sign()      # (B, K, 2)
    last = constant([w - 1, h - 1], like=index)
    inside = ((xy > 1) & (xy < last)).all(-1, keepdim=True)             # (B, K, 1)
    xy = xy + 0.25 * direction * inside
    xy = xy.masked_fill((value <= 0)[..., None], -1)
    return torch.cat([xy, value[..., None]], -1)


OKS_NMS_THRESHOLD = 0.9


def oks_nms(points, scores, areas, sigmas):
    """Greedy suppression: indices, best first, of the persons (P, K, 3) to keep.

    A person is dropped if its OKS with a better one that is kept exceeds the threshold. This OKS
    counts all keypoints, and its area is the mean of both persons' areas (P,).
    """
    distance = ((points[:, None, :, :2] - points[:, :, :2]) ** 2).sum(-1)   # (P, P, K), squared
    area = (areas[:, None] + areas)[..., None] / 2                          # (P, P, 1)
    similarity = np.exp(-distance / (2 * sigmas) ** 2 / area / 2).mean(-1)  # (P, P)
    keep = []
    for i in np.argsort(-scores, kind="stable"):
        if not (similarity[i, keep] > OKS_NMS_THRESHOLD).any():
            keep.append(i)
    return np.array(keep, np.int64)


def match_persons(image_id, annotations, results, keypoints):
    """Match one image's results, pairs (COCO dict, points (K, 3)), with its annotations.

    Returns: {part: what `match_image` returns}, for 17 keypoints of the body only, for 133 of each
    part and "wholebody". There, as in COCO-WholeBody's evaluation, a part leaves out results
    without a keypoint of confidence > 0 in it and prefers its own score, such as "foot_score".
    """
    gt_points = [read_points(a, keypoints, f"image {image_id}") for a in annotations]
    parts = {"body": PARTS["body"]}
    if keypoints == 133:
        parts = PARTS | {"wholebody": slice(0, 133)}
    matches = {}
    for part, indices in parts.items():
        gt = []
        for annotation, points in zip(annotations, gt_points):
            num_keypoints = (points[indices, 2] > 0).sum()
            fields = {"keypoints": points[indices], "num_keypoints": num_keypoints}
            gt.append(annotation | fields)
        dt = []
        for result, points in results:
            score = result["score"]
            if part != "body":
                score = result.get(f"{part}_score", score)
            area = np.ptp(points[PARTS["body"], :2], axis=0).prod()     # also of the other parts
            entry = {"category_id": PERSON, "keypoints": points[indices]}
            if keypoints == 17 or (points[indices, 2] > 0).any():
                dt.append(entry | {"score": score, "area": area})
        matches[part] = match_image({"id": image_id}, gt, dt, "keypoints", SIGMAS[indices])
    return matches


class Pose(DenseTask):
    """Keypoints of persons on COCO's layout."""

    metric = "AP"

    def open_split(self, folder, split):
        return Persons(folder, split, self.args.keypoints, self.args.boxes)

    def augment(self, raw, rng):
        return augment_person(raw, rng, height=self.args.img_size, jitter=self.args.jitter)

    def collate(self, samples):
        """[(crop, points), ...] -> crops (B, H, W, 3) uint8, points (B, K, 3)."""
        return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples))

    def losses(self, net, batch):
        crops, points = batch
        return net(normalize(crops), points)

    @torch.no_grad()
    def predict(self, model, image, boxes=None):
        """Poses of the persons in boxes (P, 5) of a PIL image; by default it is one person.

        A pose's score is the box's times the mean confidence of the keypoints above 0.2.
        Returns: points (n, K, 3) in pixels of the image, scores (n,), best first.
        """
        if boxes is None:
            boxes = np.array([[0, 0, image.width, image.height, 1.0]])
        K = self.args.keypoints
        H = self.args.img_size
        centres, sizes = crop_frame(boxes, BOX_PADDING)
        no_points = np.zeros((0, 3))
        points = np.zeros((len(boxes), K, 3))                           # x, y, confidence
        for first in range(0, len(boxes), CROPS_PER_BATCH):
            batch = slice(first, first + CROPS_PER_BATCH)
            frames = zip(centres[batch], sizes[batch])
            crops = [crop_person(image, no_points, *frame, 0.0, H)[0] for frame in frames]
            x = normalize(torch.from_numpy(np.stack(crops)).to(self.device))    # (n, 3, H, W)
            with autocast(self.args, self.device):
                maps = mean_of_mirrored(model, x)                       # (n, K, h, w)
            points[batch] = peaks(maps).double().cpu().numpy()          # in pixels of the maps
        in_frame = points[..., :2] / (ASPECT * H / STRIDE, H / STRIDE) - 0.5
        points[..., :2] = in_frame * sizes[:, None] + centres[:, None]
        confidence = points[..., 2]                                     # (P, K)
        confident = confidence > 0.2
        total = (confidence * confident).sum(1)
        scores = boxes[:, 4] * total / np.maximum(confident.sum(1), 1)
        keep = oks_nms(points, scores, sizes.prod(1), SIGMAS[:K])
        return points[keep], scores[keep]

    def boxes_of(self, files):
        """{image file: person boxes (P, 5) in the file of --boxes}. Raises: InputError if none."""
        person_boxes = read_person_boxes(self.args.boxes)
        boxes = {path: self.boxes_in(path, person_boxes) for path in files}
        if not any(map(len, boxes.values())):
            raise InputError(f"{self.args.boxes} holds no person in these images")
        return boxes

    def boxes_in(self, path, person_boxes):
        """Those of `read_person_boxes` (P, 5) for an image file whose name ends in the image id."""
        numbers = re.findall("[0-9]+", Path(path).stem)
        if not numbers:
            rule = "with --boxes the last number in an image's name must be its id"
            raise InputError(f"{path}: {rule}")
        boxes = [box for image_id, box in person_boxes if image_id == int(numbers[-1])]
        return np.array(boxes, np.float64).reshape(-1, 5)

    def overlay(self, image, prediction, _classes):
        """Lines of body, feet and fingers and dots of the face, where keypoints are confident.

        Each person has one colour; the lines have black borders.
        """
        figure = Figure(image)
        radius = figure.thick // 4
        face = PARTS["face"]
        points, _ = prediction
        for person, colour in zip(points, palette(len(points)).tolist()):
            visible = person[:, 2] >= self.args.threshold
            segments = []
            for line in LINES:
                width = figure.thick if max(line) < face.start else figure.thin
                for a, b in zip(line, line[1:]):
                    if max(a, b) < len(person) and visible[a] and visible[b]:
                        ends = figure.pixels(person[[a, b], :2] + 0.5)  # of the pixels' centres
                        segments.append((ends, width))
            for ends, width in segments:
                figure.canvas.line(ends, "black", width + 2)
            for ends, width in segments:
                figure.canvas.line(ends, tuple(colour), width)
            for point in person[face, :2][visible[face]]:
                x, y = figure.pixels(point + 0.5)
                dot = x - radius, y - radius, x + radius, y + radius
                figure.canvas.rectangle(dot, "white")
        return figure.image

    def describe(self, prediction, _classes):
        """The number of persons of whom a keypoint is shown."""
        points, _ = prediction
        visible = points[..., 2] >= self.args.threshold                 # (n, K)
        return {"objects": {"person": int(visible.any(1).sum())}}

    def infer(self, model, sample):
        _, (image, boxes, _) = sample
        return self.predict(model, image, boxes)

    def record(self, source, sample, prediction):
        """What the metrics need of one image: its poses matched with its persons."""
        index, _ = sample
        image_id = source.ids[index]
        results = self.results(source, sample, prediction)
        pairs = [(result, points) for result, points in zip(results, prediction[0])]
        return match_persons(image_id, source.annotations[image_id], pairs, self.args.keypoints)

    def results(self, source, sample, prediction):
        """The poses of one image as entries of a results file of COCO or COCO-WholeBody."""
        index, _ = sample
        results = []
        for points, score in zip(*prediction):
            result = {"image_id": source.ids[index], "category_id": PERSON, "score": float(score)}
            for part in ("body",) if self.args.keypoints == 17 else PARTS:
                result[FIELDS[part]] = points[PARTS[part]].ravel().tolist()
            results.append(result)
        return results

    def write_results(self, path, results):
        write_coco_results(path, results)

    def summarize(self, _source, records):
        """COCO's ten metrics for 17 keypoints; for 133 AP and AR of the whole body ("AP", "AR"),
        of each part ("foot_AP", ...), and their means over both hands ("hand_AP", "hand_AR").
        """
        metrics_of = {}
        for part in records[0]:
            matches = [record[part] for record in records]
            metrics_of[part] = accumulate(matches, "keypoints", [PERSON])
        if self.args.keypoints == 17:
            return metrics_of["body"]
        metrics = {name: metrics_of["wholebody"][name] for name in ("AP", "AR")}
        for part in PARTS:
            metrics[f"{part}_AP"] = metrics_of[part]["AP"]
            metrics[f"{part}_AR"] = metrics_of[part]["AR"]
        for name in ("AP", "AR"):
            hands = np.array([metrics[f"lefthand_{name}"], metrics[f"righthand_{name}"]])
            metrics[f"hand_{name}"] = mean_of_valid(hands)
        return metrics

    def score_results(self, source, path):
        """Metrics of a COCO or COCO-WholeBody keypoint results file."""
        K = self.args.keypoints
        results = {image_id: [] for image_id in source.ids}
        for result in read_results(path, set(source.ids), {PERSON}):
            image_id = result["image_id"]
            points = read_points(result, K, f"{path}: image {image_id}")
            results[image_id].append((result, points))
        persons = source.annotations
        try:
            records = [match_persons(i, persons[i], results[i], K) for i in persons]
        except (ValueError, TypeError) as error:                # a part's own score is no number
            raise InputError(f"{path}: {error}") from None
        return self.summarize(source, records)


# --------------------------------------------------------------------- COCO's files, masks, metrics
# Annotation and results files, checked when read; run-length masks and polygons; average precision
# and recall of boxes, masks and keypoints. Rules and ties are those of pycocotools 2.0.11, with one
# exception: there an object with id 0 never counts as matched; here it does, as in xtcocotools.
# Letters: D detections (dt), G objects (gt, the annotations), A area ranges, T thresholds of IoU,
# R recalls, E edges, P points.

MAX_SIDE = 65535        # pixels; a larger side is a mistake in the file
MAX_POSITION = 2 ** 20  # pixels, of boxes, polygons and keypoints; the same


def is_integer(value):
    return type(value) is int and abs(value) < 2 ** 63


def is_side(value):
    return is_integer(value) and 1 <= value <= MAX_SIDE


def is_finite(value):
    """Whether a value is a number that float64 can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_position(value):
    return is_finite(value) and abs(value) <= MAX_POSITION


def is_box(value):
    return isinstance(value, list) and len(value) == 4 and all(map(is_position, value))


def is_text(value):
    """Whether a value is a string that UTF-8 can encode: one without lone surrogates."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def is_inner_path(value):
    """Whether a value is a path that stays inside the folder it starts from."""
    if not is_text(value) or "\0" in value or os.path.isabs(value):
        return False
    return os.path.normpath(value).split(os.sep)[0] not in (".", "..")


# Rules of fields: (test of the value, what a message says is expected).
WHOLE = (is_integer, "a whole number")
SIDE = (is_side, f"a whole number from 1 to {MAX_SIDE}")
ZERO_ONE = (lambda value: value in (0, 1), "0 or 1")
REAL = (is_finite, "a finite number")
BOX = (is_box, f"x, y, width, height, numbers of at most {MAX_POSITION}")
NAME = (is_text, "a name")
PATH = (is_inner_path, "a path inside the image folder")
IDS = {"image_id": WHOLE, "category_id": WHOLE}
RULES = {  # type of entry: {field: rule}
    "image": {"id": WHOLE, "width": SIDE, "height": SIDE, "file_name": PATH},
    "category": {"id": WHOLE, "name": NAME},
    "annotation": {"id": WHOLE, **IDS, "bbox": BOX, "area": REAL, "iscrowd": ZERO_ONE},
    "result": {**IDS, "score": REAL, "bbox": BOX},
}
RESULT_FIELDS = {"bbox": "bbox", "segm": "segmentation"}  # kind of metrics: what it needs
OPTIONAL_FIELDS = (("annotation", "id"), ("annotation", "iscrowd"), ("result", "bbox"))


def to_integer(value):
    """The int that "12" or 12.0 stands for; any other value unchanged."""
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,18}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def entry_error(path, entry_type, index, entry, problem):
    """InputError that names the file and the entry by its id, a result by its image's."""
    name = f"{entry_type} {entry.get('id')!r:.60}"
    if entry_type == "result":
        name = f"result {index}, image {entry.get('image_id')!r:.60}"
    elif entry.get("id") is None:
        name = f"{entry_type} without id at index {index}"
    return InputError(f"{path}: {name}: {problem}")


def check_entries(path, entry_type, entries, known_ids):
    """Check the dicts of one list of a COCO file; whole numbers like "12" or 12.0 become ints.

    known_ids: {field: the ids it may hold}. Raises: InputError that names file, entry and field.
    """
    taken = set()
    for index, entry in enumerate(entries):
        for field, rule in RULES[entry_type].items():
            value = entry.get(field)
            if value is None and (entry_type, field) in OPTIONAL_FIELDS:
                continue
            if rule in (WHOLE, SIDE, ZERO_ONE):
                value = to_integer(value)
                entry[field] = value
            is_valid, expected = rule
            problem = None
            if not is_valid(value):
                problem = f"{field} {value!r:.60}, expected {expected}"
            elif field in known_ids and value not in known_ids[field]:
                problem = f"unknown {field.replace('_', ' ')} {value}"
            elif field == "id" and value in taken:
                problem = f"another {entry_type} has the same id"
            if problem:
                raise entry_error(path, entry_type, index, entry, problem)
            if field == "id":
                taken.add(value)


@contextmanager
def reading(path, file_type):
    """Turn any error while a file is read and checked into an InputError that names the file."""
    try:
        yield
    except InputError:                                      # which is a ValueError, too
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is no {file_type} ({reason})") from None


def read_annotations(path):
    """A COCO annotation file, checked: a dict with lists of images, categories and annotations.

    A missing iscrowd becomes 0. Raises: InputError that names the file and the wrong entry's id.
    """
    with reading(path, "COCO annotation file"):
        data = json.loads(Path(path).read_bytes())
        check_entries(path, "image", data["images"], {})
        check_entries(path, "category", data["categories"], {})
        known_ids = {
            "image_id": {image["id"] for image in data["images"]},
            "category_id": {category["id"] for category in data["categories"]},
        }
        check_entries(path, "annotation", data["annotations"], known_ids)
        for annotation in data["annotations"]:
            if annotation.get("iscrowd") is None:
                annotation["iscrowd"] = 0
    return data


def read_results(path, image_ids=None, category_ids=None):
    """A COCO results file, checked: a list of dicts with image_id, category_id and score.

    image_ids, category_ids: sets that the results' ids must be in, if given.
    Raises: InputError that names the file and the wrong result's image.
    """
    known_ids = {"image_id": image_ids, "category_id": category_ids}
    known_ids = {field: ids for field, ids in known_ids.items() if ids is not None}
    with reading(path, "COCO results file"):
        results = json.loads(Path(path).read_bytes())
        if not isinstance(results, list):
            raise ValueError("expected a list of results")
        check_entries(path, "result", results, known_ids)
    return results


def check_fields(path, results, fields):
    """Raise InputError for a result without one of the fields, named as in `read_results`."""
    for index, result in enumerate(results):
        for field in fields:
            if result.get(field) is None:
                raise entry_error(path, "result", index, result, f"expected a {field}")


def write_coco_results(path, results):
    """Write what `read_results` reads, in order of the images' ids."""
    in_order = sorted(results, key=lambda result: result["image_id"])
    Path(path).write_text(json.dumps(in_order))


# Run-length masks (RLE): pixels are scanned down each column, columns from left to right. Runs of
# unset and set pixels alternate, unset ones first.


def mask_runs(mask):
    """Boolean mask (H, W) -> run lengths (n,); the first is 0 if the first pixel is set."""
    changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=False))
    return np.diff(changes, prepend=0, append=mask.size)


def compress_runs(runs):
    """Run lengths (n,) -> COCO's string: 5 bits per character, the lowest first.

    From the fourth on, a run is written as its difference from the run two before.
    """
    values = runs.copy()
    values[3:] -= runs[1:-2]
    groups = values[:, None] >> 5 * np.arange(7)            # (n, 7): 35 bits hold any image's runs
    more = ~np.isin(groups >> 4, (0, -1))                   # not just the sign bit from here on
    written = np.pad(more[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    codes = (groups & 31) + 32 * more + 48
    return bytes(codes[written].astype(np.uint8)).decode()


def decompress_runs(text):
    """COCO's string or bytes -> run lengths (n,). Raises: ValueError if malformed."""
    encoded = text.encode() if isinstance(text, str) else text
    codes = np.frombuffer(encoded, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any():
        raise ValueError("RLE string holds a character outside '0' to 'o'")
    last = codes < 32                                       # bit 32: the value goes on
    if not last[-1:].any():
        raise ValueError("RLE string is cut off: its last value is not complete")
    start = np.flatnonzero(np.append(True, last[:-1]))
    length = np.diff(start, append=codes.size)
    if length.max() > 7:
        raise ValueError(f"RLE string holds a value of {length.max()} characters, at most 7 fit")
    shift = 5 * (np.arange(codes.size) - start.repeat(length))
    values = np.add.reduceat((codes & 31) << shift, start)
    values -= (codes[last] & 16) << shift[last] + 1         # highest bit set: negative
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()                    # the first value is no difference
    return values


def rle_runs(rle):
    """RLE dict (size [H, W]; counts a string, bytes or list) -> run lengths (n,).

    Raises: ValueError if the counts are malformed or do not fill the mask.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    runs = decompress_runs(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any():
        raise ValueError("RLE counts must be a list of whole numbers >= 0")
    pixels = height * width
    total = sum(runs.tolist())                              # Python's ints do not overflow
    if total != pixels:
        raise ValueError(f"RLE counts add up to {total}, a {height}x{width} mask has {pixels}")
    return runs


def rle_encode(mask):
    """Boolean mask (H, W) -> RLE dict, compressed. Raises: ValueError for any other array."""
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"expected a boolean mask (H, W), not {mask.dtype} {mask.shape}")
    return {"size": list(mask.shape), "counts": compress_runs(mask_runs(mask))}


def rle_decode(rle):
    """RLE dict, compressed or not -> boolean mask (H, W). Raises: ValueError if malformed."""
    runs = rle_runs(rle)
    height, width = rle["size"]
    is_set = np.arange(len(runs)) % 2 == 1
    return is_set.repeat(runs).reshape(width, height).T


def polygon_outline(polygon):
    """Polygon (x, y, x, y, ...) in pixels -> points u, v, each (P,), of its closed outline.

    They lie on a grid 5 times finer, edge after edge. An edge steps along its longer axis; the
    other coordinate is always rounded from the end that is lower on the longer axis.
    """
    start = np.trunc(5 * np.reshape(polygon, (-1, 2)) + 0.5).astype(np.int64)   # (E, 2): x, y
    end = np.roll(start, -1, 0)
    upright = np.diff(abs(end - start)) > 0                 # (E, 1)
    start = np.where(upright, start[:, ::-1], start)        # (E, 2): longer axis, other
    end = np.where(upright, end[:, ::-1], end)
    low = np.where(start[:, :1] < end[:, :1], start, end)
    run, rise = (end - start).T                             # (E,) each, along longer and other axis
    direction = np.sign(run)
    points = abs(run) + 1                                   # of each edge, both ends included
    slope = direction * rise / np.maximum(abs(run), 1)
    edge = np.arange(len(start)).repeat(points)             # (P,)
    step = np.arange(len(edge)) - (points.cumsum() - points)[edge]
    longer = start[edge, 0] + direction[edge] * step
    other = low[edge, 1] + slope[edge] * (longer - low[edge, 0])
    other = np.trunc(other + 0.5).astype(np.int64)
    return np.where(upright[edge, 0], (other, longer), (longer, other))


def polygon_crossings(polygon, height, width):
    """Positions (n,), unsorted, in the column-major scan at which a polygon's outline is crossed.

    A position that occurs twice is no crossing.
    """
    u, v = polygon_outline(polygon)
    left = np.minimum(u[:-1], u[1:])                        # of each step from point to point
    top = np.minimum(v[:-1], v[1:])
    x = left // 5
    y = ((top + 2) // 5).clip(0, height)                    # (top + 0.5) / 5 - 0.5, rounded up
    at_centre = left % 5 == 2                               # of a pixel: its third fine column
    return (x * height + y)[(u[:-1] != u[1:]) & at_centre & (x >= 0) & (x < width)]


def polygons_to_mask(polygons, height, width):
    """COCO polygons, lists (x, y, x, y, ...) in pixels -> union of their areas (H, W) bool.

    If the first list has four numbers, all are boxes x, y, w, h. Fewer than 3 points cover nothing.
    Raises: ValueError for an odd length, a coordinate beyond MAX_POSITION, or boxes among polygons.
    """
    if polygons and len(polygons[0]) == 4:
        polygons = [(x, y, x, y + h, x + w, y + h, x + w, y) for x, y, w, h in polygons]
    mask = np.zeros(height * width, bool)
    for polygon in polygons:
        if not (np.abs(polygon) <= MAX_POSITION).all():     # False for NaN, too
            raise ValueError(f"polygon {polygon!r:.60} has a coordinate beyond {MAX_POSITION}")
        crossed = np.zeros(height * width + 1, bool)        # one more: after the last pixel
        np.logical_xor.at(crossed, polygon_crossings(polygon, height, width), True)
        mask |= np.logical_xor.accumulate(crossed)[:-1]
    return mask.reshape(width, height).T


def segmentation_runs(entry, image):
    """Run lengths (n,) of the segmentation, polygons or RLE, of an annotation or result.

    entry, image: COCO dicts. Raises: ValueError that names image and entry if the segmentation is
    malformed or has another size than the image.
    """
    size = [image["height"], image["width"]]
    try:
        segmentation = entry["segmentation"]
        if isinstance(segmentation, list):
            return mask_runs(polygons_to_mask(segmentation, *size))
        if list(segmentation["size"]) != size:
            raise ValueError(f"RLE of size {segmentation['size']} in an image of size {size}")
        return rle_runs(segmentation)
    except (ValueError, KeyError, TypeError) as error:
        name = "a result" if entry.get("id") is None else f"annotation {entry['id']}"
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"image {image['id']}, {name}: segmentation: {reason}") from None


# Metrics: match_image for each image, in any process, then accumulate over all images. The kind,
# bbox, segm or keypoints, decides which AREAS have metrics of their own, and with how many of the
# best detections per image and category recall is measured.

THRESHOLDS = np.linspace(0.5, 0.95, 10)                     # (T,), IoU or OKS of a match
RECALLS = np.linspace(0, 1, 101)                            # (R,)
AT_50 = 0                                                   # index in THRESHOLDS
AT_75 = 5
AREA_RANGES = {  # of all, small, medium, large objects, in pixels, both ends included
    "": (0, 1e10),
    "s": (0, 32 ** 2),
    "m": (32 ** 2, 96 ** 2),
    "l": (96 ** 2, 1e10),
}
AREAS = {"bbox": ("s", "m", "l"), "segm": ("s", "m", "l"), "keypoints": ("m", "l")}
MAX_DETECTIONS = {"bbox": (1, 10, 100), "segm": (1, 10, 100), "keypoints": (20,)}


def crowd_iou(intersection, dt_area, gt_area, crowd):
    """Intersections (D, G), areas (D,) and (G,), crowd (G,) bool -> IoU (D, G).

    For crowd regions the divisor is the detection's area instead of the union.
    """
    union = dt_area[:, None] + gt_area - intersection
    union = np.where(crowd, dt_area[:, None], union)
    zeros = np.zeros(intersection.shape)
    return np.divide(intersection, union, out=zeros, where=intersection > 0)


def box_overlaps(dt, gt, crowd):
    """IoU (D, G) of boxes (D, 4), (G, 4) given as x, y, w, h in pixels; crowd (G,) bool."""
    x, y, w, h = dt.T[..., None]                            # each (D, 1)
    gt_x, gt_y, gt_w, gt_h = gt.T                           # each (G,)
    width = np.minimum(x + w, gt_x + gt_w) - np.maximum(x, gt_x)
    height = np.minimum(y + h, gt_y + gt_h) - np.maximum(y, gt_y)
    intersection = width.clip(0) * height.clip(0)
    return crowd_iou(intersection, (w * h)[:, 0], gt_w * gt_h, crowd)


def runs_area(runs):
    """Number of set pixels of a mask given by its run lengths."""
    return int(runs[1::2].sum())


def runs_intersection(a, b):
    """Number of pixels set in both masks of one image, given by their run lengths."""
    set_in_b = (b * (np.arange(len(b)) % 2)).cumsum()       # up to the end of each run of b
    at_ends_of_a = np.interp(a.cumsum(), b.cumsum(), set_in_b)  # exact: all slopes are 0 or 1
    return np.diff(at_ends_of_a)[::2].sum()                 # gained over the set runs of a


def mask_overlaps(dt, gt, crowd):
    """IoU (D, G) of masks, lists of run lengths; crowd (G,) bool."""
    intersection = np.zeros((len(dt), len(gt)))
    for i, dt_runs in enumerate(dt):
        for j, gt_runs in enumerate(gt):
            intersection[i, j] = runs_intersection(dt_runs, gt_runs)
    dt_area = np.array([runs_area(runs) for runs in dt])
    gt_area = np.array([runs_area(runs) for runs in gt])
    return crowd_iou(intersection, dt_area, gt_area, crowd)


def oks(dt, gt, boxes, areas, sigmas):
    """Object keypoint similarity (D, G) of points dt (D, P, 3) and gt (G, P, 3).

    Points are x, y in pixels; gt's third value is > 0 if labelled. boxes (G, 4) as x, y, w, h and
    areas (G,) of the objects; sigmas (P,): each point's deviation relative to the object's size.
    Without a labelled point, distance counts from the box enlarged by its size on every side.
    """
    similarity = np.zeros((len(dt), len(gt)))
    variances = (2 * np.asarray(sigmas)) ** 2
    detected = dt[..., :2]                                  # (D, P, 2)
    for j, (points, box, area) in enumerate(zip(gt, boxes, areas)):
        used = points[:, 2] > 0
        offset = detected - points[:, :2]
        if not used.any():
            used = ~used
            low = box[:2] - box[2:]
            high = box[:2] + 2 * box[2:]
            offset = np.maximum(low - detected, 0) + np.maximum(detected - high, 0)
        e = (offset ** 2).sum(-1) / variances / (area + np.spacing(1)) / 2
        similarity[:, j] = np.exp(-e[:, used]).mean(-1)
    return similarity


def stack_field(entries, field, *shape):
    """A field of all entries as one array (len(entries), *shape)."""
    return np.array([entry[field] for entry in entries], float).reshape(len(entries), *shape)


def overlaps(dt, gt, crowd, kind, image, sigmas):
    """Result and annotation dicts of one image and category -> IoU or OKS (D, G), dt areas (D,)."""
    if kind == "bbox":
        dt_boxes = stack_field(dt, "bbox", 4)
        gt_boxes = stack_field(gt, "bbox", 4)
        return box_overlaps(dt_boxes, gt_boxes, crowd), dt_boxes[:, 2:].prod(-1)
    if kind == "segm":
        dt_runs = [segmentation_runs(d, image) for d in dt]
        gt_runs = [segmentation_runs(g, image) for g in gt]
        dt_areas = np.array([runs_area(runs) for runs in dt_runs])
        return mask_overlaps(dt_runs, gt_runs, crowd), dt_areas
    dt_points = stack_field(dt, "keypoints", len(sigmas), 3)
    gt_points = stack_field(gt, "keypoints", len(sigmas), 3)
    gt_boxes = stack_field(gt, "bbox", 4)
    gt_areas = stack_field(gt, "area")
    extents = np.ptp(dt_points[..., :2], axis=1).prod(-1)   # (D,): if a result has no area
    dt_areas = np.array([d.get("area", extent) for d, extent in zip(dt, extents)])
    return oks(dt_points, gt_points, gt_boxes, gt_areas, sigmas), dt_areas


def match_detections(iou, ignored, crowd, gt_area, dt_area, ranges):
    """Greedy matching in one image and category, for all area ranges and thresholds at once.

    Args: iou (D, G), detections by descending score; ignored and crowd (G,) bool; gt_area (G,),
    dt_area (D,) and ranges (A, 2), all in pixels.
    Returns: outcome (A, T, D) int8: 1 true positive, 0 false positive, -1 counted as neither;
    positives (A,): the number of objects to detect.
    """
    low, high = np.array(ranges, float).T[..., None]        # each (A, 1)
    excluded = ignored | (gt_area < low) | (gt_area > high)  # (A, G)
    outside = (dt_area < low) | (dt_area > high)            # (A, D)
    unmatched = -outside[:, None].astype(np.int8)
    outcome = np.repeat(unmatched, len(THRESHOLDS), 1)      # (A, T, D)
    free = np.ones((len(low), len(THRESHOLDS), len(crowd)), bool)  # (A, T, G)
    for d in np.flatnonzero((iou >= THRESHOLDS[0]).any(1)):
        possible = (free | crowd) & (iou[d] >= THRESHOLDS[:, None])  # crowds match repeatedly
        counted = possible & ~excluded[:, None]
        possible = np.where(counted.any(-1, keepdims=True), counted, possible)
        reversed_iou = np.where(possible, iou[d], -1)[..., ::-1]
        best = len(crowd) - 1 - reversed_iou.argmax(-1)     # (A, T), the last one on ties
        a, t = possible.any(-1).nonzero()
        matched = best[a, t]
        free[a, t, matched] = False
        outcome[a, t, d] = np.where(excluded[a, matched], -1, 1)
    return outcome, (~excluded).sum(1)


def match_image(image, annotations, results, kind, sigmas=()):
    """Match one image's results to its annotations, both lists of COCO dicts.

    image: COCO dict; its height and width are read for segm only. sigmas (P,): see `oks`, needed
    for keypoints only. A keypoint result may hold an `area` in pixels, else that of the box around
    its points counts.
    Returns: (image id, {category: (scores (D,), outcome, positives)}), see match_detections.
    Raises: ValueError for a score that is not finite or a malformed mask.
    """
    if not all(math.isfinite(r["score"]) for r in results):
        raise ValueError(f"a result in image {image['id']} has a score that is not finite")
    ranges = [AREA_RANGES[name] for name in ("", *AREAS[kind])]
    best_first = sorted(results, key=lambda r: -r["score"])     # equal scores stay in order
    matches = {}
    for category in {x["category_id"] for x in (*annotations, *results)}:
        gt = [a for a in annotations if a["category_id"] == category]
        dt = [r for r in best_first if r["category_id"] == category]
        dt = dt[:MAX_DETECTIONS[kind][-1]]
        crowd = stack_field(gt, "iscrowd") > 0
        ignored = crowd
        if kind == "keypoints":
            ignored = crowd | (stack_field(gt, "num_keypoints") == 0)
        iou, dt_area = overlaps(dt, gt, crowd, kind, image, sigmas)
        gt_area = stack_field(gt, "area")
        outcome, positives = match_detections(iou, ignored, crowd, gt_area, dt_area, ranges)
        matches[category] = stack_field(dt, "score"), outcome, positives
    return image["id"], matches


def interpolated_precision(outcome, positives):
    """Precision (R,) at RECALLS of ranked detections, outcome (D,), of `positives` objects."""
    tp = np.cumsum(outcome == 1)
    fp = np.cumsum(outcome == 0)
    precision = tp / (tp + fp + np.spacing(1))
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(tp / positives, RECALLS)
    return np.append(best_from_here, 0)[reached]            # 0 where a recall is not reached


def mean_of_valid(cells):
    """Mean of the cells that are not -1, or -1 if all are."""
    valid = cells[cells > -1]
    return float(valid.mean()) if valid.size else -1.0


def category_curves(matches, limits):
    """Precision (A, T, R) and recall (A, len(limits), T) of one category, -1 without an object.

    matches: (scores, outcome, positives) of the images, ordered by image id.
    """
    scores, outcomes, positives = zip(*matches)
    positives = sum(positives)                              # (A,)
    rank = np.concatenate([np.arange(len(s)) for s in scores])  # within the image
    order = np.argsort(-np.concatenate(scores), kind="stable")  # equal scores: by image
    outcome = np.concatenate(outcomes, -1)                  # (A, T, D of all images)
    precision = np.full((len(positives), len(THRESHOLDS), len(RECALLS)), -1.0)
    recall = np.full((len(positives), len(limits), len(THRESHOLDS)), -1.0)
    for a in np.flatnonzero(positives):
        for i, limit in enumerate(limits):
            tp = outcome[a][:, rank < limit] == 1
            recall[a, i] = tp.sum(-1) / positives[a]
        for t in range(len(THRESHOLDS)):
            precision[a, t] = interpolated_precision(outcome[a, t, order], positives[a])
    return precision, recall


def accumulate(matches, kind, categories):
    """Results of match_image for all images, in any order -> {AP, AP50, ...: fraction}.

    A metric without any object to detect is -1. categories: ids to average over. APs, APm, APl: by
    area; ARn: with n detections per image and category; AR of keypoints: with 20.
    """
    names = AREAS[kind]
    limits = MAX_DETECTIONS[kind]
    categories = sorted(set(categories))
    images = [by_category for _, by_category in sorted(matches, key=lambda pair: pair[0])]
    precision = np.full((1 + len(names), len(THRESHOLDS), len(RECALLS), len(categories)), -1.0)
    recall = np.full((1 + len(names), len(limits), len(THRESHOLDS), len(categories)), -1.0)
    for k, category in enumerate(categories):
        of_category = [by_category[category] for by_category in images if category in by_category]
        if of_category:
            precision[..., k], recall[..., k] = category_curves(of_category, limits)
    cells = {"AP": precision[0], "AP50": precision[0, AT_50], "AP75": precision[0, AT_75]}
    for a, name in enumerate(names, 1):
        cells[f"AP{name}"] = precision[a]
    if kind == "keypoints":
        cells |= {"AR": recall[0, 0], "AR50": recall[0, 0, AT_50], "AR75": recall[0, 0, AT_75]}
    else:
        for i, limit in enumerate(limits):
            cells[f"AR{limit}"] = recall[0, i]
    for a, name in enumerate(names, 1):
        cells[f"AR{name}"] = recall[a, -1]
    return {name: mean_of_valid(values) for name, values in cells.items()}


def category_ap(matches, kind, categories):
    """AP of each category as in `accumulate`, NaN without any object."""
    values = [accumulate(matches, kind, [category])["AP"] for category in categories]
    return [math.nan if value == -1 else value for value in values]


# ------------------------------------------------------------------------------------- drawn scenes
# Random shapes and people in the layouts of ADE20K and COCO, so that each task runs without data.
# Points are complex numbers x + iy, y downwards; a factor exp(ia) turns them clockwise by a.
SHAPES = ("disc", "square", "triangle", "cross", "ring")
SCENE_CLASSES = ("background", *SHAPES, "person")  # labels 1 to 7; label 0 is "other"
SCENE_CATEGORIES = {"person": 1, "disc": 3, "square": 4, "triangle": 7, "cross": 9, "ring": 10}
SCENE_VERSION = 3  # scenes of another version are replaced


def arc(count, x, y, radius_x, radius_y, turns):
    """`count` points on an ellipse: from its left end on, first over the top if turns > 0."""
    angle = np.pi + 2 * np.pi * np.linspace(0, turns, count)
    return x + 1j * y + radius_x * np.cos(angle) + 1j * radius_y * np.sin(angle)


DISC = arc(33, 0, 0, 1, 1, turns=1)
CROSS_ARM = (0.95 + 0.28j, 0.28 + 0.28j, 0.28 + 0.95j)
OUTLINES = {  # of radius 1
    "disc": DISC,
    "square": DISC[::8],
    "triangle": arc(4, 0, 0, 1, 1, turns=1),
    "cross": np.outer((1, 1j, -1, -1j), CROSS_ARM).ravel(),
    "ring": np.append(DISC, DISC[::-1] / 2),                        # around it, back in its hole
}
# Arcs of the face, of radius 1: points, centre x and y, radii, 24ths of a turn. Contour, brows,
# nostrils, eyes, outer and inner lips, each from the image's left.
FACE_ARCS = np.array("""
    17   0.00  0.00  1.00 1.00  -12
     5  -0.42 -0.35  0.26 0.12   12
     5   0.42 -0.35  0.26 0.12   12
     5   0.00  0.35  0.17 0.07  -12
     6  -0.42 -0.10  0.20 0.13   20
     6   0.42 -0.10  0.20 0.13   20
    12   0.00  0.63  0.40 0.17   22
     8   0.00  0.63  0.26 0.06   21
""".split(), float).reshape(-1, 6)
FACE_LINES = [arc(int(row[0]), *row[1:5], row[5] / 24) for row in FACE_ARCS]
FACE_LINES.insert(3, np.linspace(-0.1j, 0.3j, 4))                   # bridge of the nose
FACE = np.concatenate(FACE_LINES)                                   # (68,)
FOOT = np.array((0.045 + 0.055j, 0.085 + 0.035j, -0.01 + 0.045j))   # from the ankle
FINGER_ANGLES = (1.15, 0.45, 0.05, -0.35, -0.75)                    # to the arm, thumb first
FINGER_JOINTS = (0.055, 0.08, 0.1, 0.12)                            # from the wrist
TORSO = [5, 31, 6, 12, 11]                                          # shoulders, chin, hips
HEAD = [*range(23, 40), 49, 47, 42, 40]                             # contour and brows


def person_points(rng):
    """The 133 keypoints, of height 1, of a person who faces the viewer; 0 is between the hips."""
    low = ((0.25, -0.9), (-0.05, -0.5))                             # arm, leg: angles of two bones
    high = ((2.4, 0.9), (0.5, 0.1))                                 # 0 is downwards, > 0 outwards
    angles = rng.uniform(low, high, (2, 2, 2)).cumsum(2)            # sides, limbs, bones
    bones = 1j * np.exp(-1j * angles) * ((0.15,), (0.19,))
    joints = np.insert(bones, 0, (0.115 - 0.28j, 0.065), 2)         # from shoulders and hips
    limbs = joints.cumsum(2).reshape(2, 6)
    feet = limbs[:, 5:] + FOOT
    spread = angles[:, 0, 1:] + FINGER_ANGLES                       # (2, 5)
    fingers = 1j * np.exp(-1j * spread)[..., None] * FINGER_JOINTS  # (2, 5, 4)
    hands = limbs[:, 2:3] + np.insert(fingers.reshape(2, 20), 0, 0, 1)
    for sides in (limbs, feet, hands):
        sides[1] = -sides[1].conj()                                 # the person's right
    left_eye = FACE[42:48].mean()
    right_eye = FACE[36:42].mean()
    head = np.append((FACE[30], left_eye, right_eye, 1, -1), FACE)  # nose, eyes, ears, face
    head = 0.115 * head * np.exp(1j * rng.uniform(-0.3, 0.3)) - 0.43j
    body = (head[:5], limbs.T.ravel(), feet.ravel())
    return np.concatenate([*body, head[5:], hands.ravel()])


def render_person(rng, width, height):
    """Colours (H, W, 3), 0 outside, and keypoints, complex (133,), of a random person."""
    size = rng.uniform(60, 100)
    top_left = (0.2 * width, 0.5 * size)
    hips = rng.uniform(top_left, (0.8 * width, height - 0.4 * size)).view(complex)
    figure = size * person_points(rng)
    points = np.round(hips + figure * np.exp(1j * rng.uniform(-0.3, 0.3)))
    xy = points.view(float).reshape(-1, 2)
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    draw.polygon(xy[TORSO].ravel().tolist(), "grey")
    draw.polygon(xy[HEAD].ravel().tolist(), "tan")
    for path, colour in zip(LINES, map(tuple, palette(len(LINES)).tolist())):
        is_limb = 4 < max(path) < 17
        thickness = round(0.06 * size) if is_limb else 2
        joints = xy[list(path)].tolist()
        draw.line(np.ravel(joints).tolist(), colour, thickness)
        for joint in joints:
            draw.circle(joint, thickness // 2, colour)
    draw.point(xy[PARTS["face"]].ravel().tolist(), "navy")
    return np.array(image), points


def render_shape(rng, name, crowd, width, height):
    """Colours (H, W, 3), 0 outside, and COCO polygons of a shape or of a crowd of small shapes."""
    radius = rng.uniform(12, 32)
    margin = 0.5 * radius
    centres = rng.uniform(margin, (width - margin, height - margin)).view(complex)
    if crowd:
        radius = 4
        centres = centres + rng.uniform(-28, 28, (20, 2)).view(complex)
    turn = np.exp(1j * rng.uniform(0, 2 * np.pi))
    points = centres.reshape(-1, 1) + radius * turn * OUTLINES[name]
    polygons = np.round(points, 2).view(float).tolist()
    colour = palette(len(SHAPES))[SHAPES.index(name)] * rng.uniform(0.5, 1)
    mask = polygons_to_mask(polygons, height, width)
    return mask[..., None] * colour, polygons


def annotate(name, crowd, geometry, visible):
    """COCO annotation, without ids, of a person or shape with `visible` pixels (H, W)."""
    y, x = visible.nonzero()
    corner = [int(x.min()), int(y.min())]
    size = [int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
    runs = mask_runs(visible).tolist()
    entry = {
        "category_id": SCENE_CATEGORIES[name],
        "iscrowd": int(crowd),
        "area": len(x),
        "bbox": corner + size,
        "segmentation": {"size": list(visible.shape), "counts": runs},
    }
    if name == "person":
        return entry | annotate_keypoints(geometry, visible, entry["bbox"])
    is_whole = np.array_equal(polygons_to_mask(geometry, *visible.shape), visible)
    return entry | {"segmentation": geometry} if is_whole and not crowd else entry


def annotate_keypoints(points, visible, box):
    """The fields of a person's keypoints; those outside of its box are not labelled."""
    left, top, width, height = box
    x = points.real.astype(int)
    y = points.imag.astype(int)
    inside_x = (left <= x) & (x < left + width)
    valid = inside_x & (top <= y) & (y < top + height)
    visibility = 1 + visible[y * valid, x * valid]                  # 1 if hidden, otherwise 2
    table = np.stack([x, y, visibility], 1) * valid[:, None]
    fields = {"num_keypoints": int(valid[PARTS["body"]].sum())}
    for part, indices in PARTS.items():
        fields[FIELDS[part]] = table[indices].ravel().tolist()
        fields[f"{part}_valid"] = bool(valid[indices].any())
    return fields


def render_scene(rng, empty, with_crowd):
    """Image (H, W, 3) and labels (H, W), both uint8, and COCO annotations without ids."""
    width, height = rng.integers((144, 112), (177, 145)).tolist()
    blobs = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    image = np.array(blobs.resize((width, height)), float)
    labels = np.zeros((height, width), np.uint8)
    kinds = [*rng.choice(SHAPES, rng.integers(2, 7)), *["person"] * rng.integers(3)]
    kinds += ["crowd"] * with_crowd
    annotations = []
    for kind in [] if empty else rng.permutation(kinds).tolist():   # from front to back
        crowd = kind == "crowd"
        name = "disc" if crowd else kind
        if name == "person":
            colours, geometry = render_person(rng, width, height)
        else:
            colours, geometry = render_shape(rng, name, crowd, width, height)
        visible = (labels == 0) & colours.any(2)
        if visible.sum() >= 30:                                     # else it is left out
            image[visible] = colours[visible]
            labels[visible] = 1 + SCENE_CLASSES.index(name)
            annotations.append(annotate(name, crowd, geometry, visible))
    inside = labels[2:-2, 2:-2]
    inside[inside == 0] = 1                                         # a frame remains unlabelled
    image += rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels, annotations


def write_split(root, split, seed, count):
    """Write split "train" or "val"; each 20th scene is empty, each 8th has a crowd."""
    ade = {"train": "training", "val": "validation"}[split]
    for folder in (f"images/{ade}", f"annotations/{ade}", f"{split}2017"):
        (root / folder).mkdir(parents=True)
    images = []
    annotations = []
    for image_id in range(1, count + 1):
        rng = np.random.default_rng((seed, split == "val", image_id))
        image, labels, entries = render_scene(rng, image_id % 20 == 7, image_id % 8 == 4)
        name = f"{image_id:012}.jpg"
        stem = f"{ade}/ADE_{split}_{image_id:08}"
        path = root / f"{split}2017" / name
        Image.fromarray(image).save(path, quality=90)
        shutil.copyfile(path, root / f"images/{stem}.jpg")
        Image.fromarray(labels).save(root / f"annotations/{stem}.png")
        height, width = labels.shape
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for entry in entries:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id} | entry)
    people = [entry for entry in annotations if entry["category_id"] == PERSON]
    categories = [{"id": key, "name": name} for name, key in SCENE_CATEGORIES.items()]
    files = {f"instances_{split}2017": annotations, f"coco_wholebody_{split}_v1.0": people}
    for name, entries in files.items():
        data = {"images": images, "annotations": entries, "categories": categories}
        (root / f"annotations/{name}.json").write_text(json.dumps(data))


def write_scenes(folder, images=(400, 80), seed=0):
    """Write scenes into `folder`, all or none. Raises: InputError if it holds other files."""
    folder = Path(folder)
    settings = {"version": SCENE_VERSION, "images": list(images), "seed": seed}
    record = folder / "scenes.json"
    if record.exists() and json.loads(record.read_text()) == settings:
        return
    if folder.exists() and not record.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} contains other files; name another folder for drawn scenes")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        for split, count in zip(("train", "val"), images):
            write_split(new, split, seed, count)
        rows = [f"{label}\t{name}" for label, name in enumerate(SCENE_CLASSES, 1)]
        (new / "objectInfo.txt").write_text("\n".join(["Idx\tName", *rows]))
        (new / record.name).write_text(json.dumps(settings))
        if folder.exists():
            os.rename(folder, Path(temporary) / "old")              # deleted with `temporary`
        os.rename(new, folder)


# ------------------------------------------------------------------------------------- command line
TASKS = {
    "semfpn": Segmentation,
    "upernet": Segmentation,
    "retinanet": Detection,
    "mask_rcnn": InstanceSegmentation,
    "cascade_mask_rcnn": InstanceSegmentation,
    "pose": Pose,
}
ARCHITECTURES = {  # of each task: the model, the backbone's stages (0 to 3) that it reads
    "semfpn": (SemanticFPN, (0, 1, 2, 3)),
    "upernet": (UPerNet, (0, 1, 2, 3)),
    "retinanet": (RetinaNet, (1, 2, 3)),
    "mask_rcnn": (MaskRCNN, (0, 1, 2, 3)),
    "cascade_mask_rcnn": (partial(MaskRCNN, cascade=True), (0, 1, 2, 3)),
    "pose": (SimpleBaseline, (3,)),
}


def predict(task, args, procs, checkpoint):
    """--predict: write an overlay of every image to --output, print what it shows as JSON."""
    files = train_imagenet.list_images(args.predict)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    boxes = task.boxes_of(files) if args.boxes else {}
    classes = checkpoint["classes"]
    entry = "ema" if checkpoint["ema"] else "model"
    model = train_imagenet.load_trained(task, checkpoint, entry, classes).to(procs.device)
    names = overlay_names(files, args.task)
    for path, image in train_imagenet.read_images(files, procs):
        options = {"boxes": boxes[path]} if args.boxes else {}
        prediction = task.predict(model, image, **options)
        overlay = output / names[path]
        task.overlay(image, prediction, classes).save(overlay)
        facts = {"image": path, "overlay": str(overlay)}
        print(json.dumps(facts | task.describe(prediction, classes)))


def overlay_names(files, task):
    """{image: file name of its overlay}; a name that is taken gets a number."""
    names = {}
    taken = set()
    for path in files:
        stem = Path(path).stem
        name = f"{stem}_{task}.png"
        copies = 0
        while name in taken:
            copies += 1
            name = f"{stem}_{copies}_{task}.png"
        taken.add(name)
        names[path] = name
    return names


def main(argv=None):
    """Resolve the arguments, then train, evaluate, predict or score."""
    args, checkpoint = resolve_args(argv)
    command = train_imagenet.test if args.eval else train_imagenet.train
    if args.predict:
        command = predict
    elif args.score:
        command = train_imagenet.score
    train_imagenet.launch(command, TASKS[args.task], args, checkpoint)


if __name__ == "__main__":
    train_imagenet.run_main(main, "train_dense.py")
