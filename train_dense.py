"""Train, test and use the backbones for semantic segmentation, object detection and pose. Plain PyTorch, one visible loop.

    python train_dense.py                                       # no data needed: draws its own scenes, Semantic FPN, minutes on a CPU
    python train_dense.py --task retinanet
    torchrun --nproc-per-node 8 train_dense.py --task upernet --backbone stvit_s --backbone-weights runs/s/best.pt --data /data/ade20k
    torchrun --nproc-per-node 8 train_dense.py --task retinanet --backbone linglo_b1 --data /data/coco --resume auto
    python train_dense.py --eval --ms-test --weights runs/upernet_stvit_s/best.pt --data /data/ade20k
    python train_dense.py --predict a.jpg b.jpg --weights runs/upernet_stvit_s/best.pt --output pictures
    python train_dense.py --task retinanet --score results.json --data /data/coco
    python train_dense.py --eval --boxes detections.json --weights runs/pose_clustr_s/best.pt --data /data/coco

Reading order is the order in which data flow: settings, scenes, the human body, data sets and transforms, boxes, regions of interest,
necks and heads, losses, inference, metrics, tasks, loop. A task knows how to build its data, its model, its loss, its predictions and
their score, nothing else. Processes, schedule of samples, checkpoints and log are those of train_imagenet.py, and so are its promises:
draws depend only on seed, epoch, step and sample, a resumed run goes on exactly, one line on stderr for what the user got wrong.

Letters: B batch, C channels, H x W a map, K classes, A anchors, G boxes of an image (padded to the largest number in the batch).
Boxes are float x1, y1, x2, y2 in pixels without "+ 1"; COCO files hold x, y, width, height.
Keypoints are x, y, v: pixels, (0, 0) the middle of the first one, and visibility (labelled if > 0) or, of results, confidence.
Rules follow mmsegmentation 0.x, mmdetection 2.x and mmpose 0.x, which the papers' dense figures were made with. Known differences: images
are resized by Pillow (which smooths when it shrinks), hue is shifted in Pillow's 256 steps a turn.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train_imagenet
from train_imagenet import MODELS, InputError, Processes, StepSampler, StopSignal, append, autocast, loader, normalize, number, refuse

# ------------------------------------------------------------------------------------------------------------ settings
IGNORED = 255  # label of pixels that are not evaluated
RECIPES = {  # by task; what the papers leave open is PVT's (Semantic FPN, RetinaNet) or Swin's (UPerNet)
    "semfpn": dict(iters=80000, batch_size=16, lr=1e-4, weight_decay=1e-4, warmup_iters=0, img_size=512),
    "upernet": dict(iters=160000, batch_size=16, lr=6e-5, weight_decay=0.01, warmup_iters=1500, img_size=512),
    "retinanet": dict(epochs=12, schedule="1x", batch_size=16, lr=1e-4, weight_decay=1e-4, warmup_iters=500, img_size=800),
    "mask_rcnn": dict(epochs=12, schedule="1x", batch_size=16, lr=1e-4, weight_decay=0.05, warmup_iters=500, img_size=800, rois=512),
    "cascade_mask_rcnn": dict(epochs=36, schedule="3x", batch_size=16, lr=1e-4, weight_decay=0.05, warmup_iters=500, img_size=800, rois=512,
                              box_head="4conv1fc"),
    "pose": dict(epochs=210, batch_size=512, lr=5e-4, weight_decay=0.01, warmup_iters=500, img_size=256, schedule="pose",
                 keypoints=133, jitter=1.0, drop_path=0.0),                                                     # TCFormer's
}
FAMILY_RECIPES = {  # what a paper does its own way
    ("linglo", "semfpn"): dict(iters=40000, batch_size=32),                         # its sec. 4.3
    ("clustr", "mask_rcnn"): dict(lr=2e-4, weight_decay=1e-4),                      # PVTv2's configuration: it uses its defaults
    ("linglo", "mask_rcnn"): dict(weight_decay=1e-4),                               # PVT's
}
SCHEDULES = {  # epochs, and those after which the rate falls to a tenth
    "1x": (12, (8, 11)), "3x": (36, (27, 33)), "pose": (210, (170, 200))}
ONLY = {  # flags of some tasks
    "schedule": ("retinanet", "mask_rcnn", "cascade_mask_rcnn"), "rois": ("mask_rcnn", "cascade_mask_rcnn"),
    "box_head": ("cascade_mask_rcnn",), "ms_test": ("semfpn", "upernet"), "keypoints": ("pose",), "boxes": ("pose",),
    "jitter": ("pose",), "compile": ("semfpn", "upernet", "retinanet", "pose")}
BUILT_IN = {  # for the scenes drawn here, about 160 x 128 pixels
    "semfpn": dict(backbone="linglo_b0", iters=660, batch_size=4, lr=1e-3, img_size=96, warmup_iters=50, eval_every=220, drop_path=0.0),
    "upernet": dict(backbone="linglo_b0", iters=300, batch_size=4, lr=1e-3, img_size=80, warmup_iters=50, eval_every=150, drop_path=0.0),
    "retinanet": dict(backbone="linglo_b0", epochs=8, batch_size=4, lr=3e-4, img_size=128, warmup_iters=100, eval_every=192, drop_path=0.0,
                      clip_grad=1.0),
    "mask_rcnn": dict(backbone="linglo_b0", epochs=5, batch_size=4, lr=3e-4, img_size=128, warmup_iters=100, eval_every=240, drop_path=0.0,
                      rois=32, clip_grad=1.0),
    "cascade_mask_rcnn": dict(backbone="linglo_b0", epochs=5, batch_size=4, lr=3e-4, img_size=128, warmup_iters=100, eval_every=480,
                              drop_path=0.0, schedule="1x", rois=16, clip_grad=1.0, box_head="2fc"),      # 4conv1fc: nine times the work
    "pose": dict(backbone="linglo_b0", epochs=36, batch_size=8, lr=1e-3, img_size=128, warmup_iters=50, eval_every=600, jitter=0.2),
}
OPTIONAL = dict(min_lr=0.0, clip_grad=None, micro_batch=None, drop_path=None, eval_every=None, released=False, frozen_bn=None, sync_bn=None,
                compile=False, deterministic=False, seed=0, log_every=50)


def parse_args(argv=None):
    """The command line; flags that were not given are None, so that checkpoint, preset and recipe can fill them."""
    p = argparse.ArgumentParser(description="Train or test a backbone on ADE20K- or COCO-like data, or on scenes drawn here.",
                                formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=120))
    p.error = refuse
    count, size = number(int, 1), number(float, 0)
    switch = dict(action="store_true", default=None)
    p.add_argument("--task", help=f"one of {', '.join(RECIPES)} (default semfpn)")
    p.add_argument("--backbone", help=f"one of {', '.join(MODELS)} (default secvit_s, on drawn scenes linglo_b0)")
    p.add_argument("--released", **switch, help="SecViT as the authors released it")
    p.add_argument("--backbone-weights", help="classification weights to start from: train_imagenet.py's or an authors' file")
    p.add_argument("--data", help="folder in ADE20K's layout (semfpn, upernet) or COCO's; without it scenes are drawn")
    p.add_argument("--keypoints", type=int, choices=(133, 17), help="of pose: the whole body, or COCO's 17; 133")
    p.add_argument("--jitter", type=number(float, 0, 1), help="strength of pose's random shifts, sizes, turns and half bodies; 1")
    p.add_argument("--boxes", metavar="FILE", help="COCO detections whose persons pose tests or draws instead of the annotated ones")
    p.add_argument("--output", help="folder for log.jsonl, last.pt, best.pt, curves.png, pictures (default runs/TASK_BACKBONE)")
    p.add_argument("--iters", type=count, help="updates of the whole run; semfpn 80000 (LinGlo 40000), upernet 160000")
    p.add_argument("--epochs", type=count, help="length in epochs instead; detection 12, with --schedule 3x 36, pose 210")
    p.add_argument("--batch-size", type=count, help="images or persons an update, over all processes; 16, LinGlo's semfpn 32, pose 512")
    p.add_argument("--micro-batch", type=count, help="images a process computes at once, then accumulates; up to 16, detection 2, pose 64")
    p.add_argument("--lr", type=size, help="peak learning rate, never rescaled; 1e-4, upernet 6e-5, pose 5e-4, ClusTR's mask_rcnn 2e-4")
    p.add_argument("--min-lr", type=size, help="rate that the polynomial of segmentation ends at; 0")
    p.add_argument("--warmup-iters", type=number(int, 0), help="linear warm-up; semfpn 0, upernet 1500, others 500")
    p.add_argument("--weight-decay", type=size, help="AdamW's; 1e-4, upernet, pose 0.01, (cascade_)mask_rcnn 0.05, ClusTR's and LinGlo's "
                   "1e-4; from 0.01 on norms are exempt, but not pose's")
    p.add_argument("--clip-grad", type=number(float, 0, above=True), help="largest gradient norm, larger ones are scaled down; off")
    p.add_argument("--img-size", type=number(int, 64), help="side of crops, of pose's the height, shorter side to detect in; 512, 256, 800")
    p.add_argument("--drop-path", type=number(float, 0, 0.99), help="stochastic depth of the last block; papers', 0.1, upernet 0.3, pose 0")
    p.add_argument("--frozen-bn", action=argparse.BooleanOptionalAction, help="backbone BN statistics fixed; on with --backbone-weights")
    p.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, help="batch statistics over all GPUs; on for segmentation")
    p.add_argument("--amp", choices=("none", "bf16", "fp16"), help="autocast type of training and testing; bf16 on a GPU, else none")
    p.add_argument("--compile", **switch, help="torch.compile the model for training; not of Mask R-CNN, whose regions vary in number")
    p.add_argument("--workers", type=number(int, 0), help="loader processes a process; changes speed only; its CPU cores, at most 10")
    p.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), help="of weights, order, augmentation; 0")
    p.add_argument("--resume", help="checkpoint to go on from exactly, or auto: the newest readable one of --output if any")
    p.add_argument("--weights", help="a checkpoint of this script, to test or to predict with")
    p.add_argument("--eval", action="store_true", help="only test --weights, print one JSON line")
    p.add_argument("--schedule", choices=("1x", "3x"), help="detection: 12 epochs at one size, or 36 at many and cropped (default of "
                   "cascade_mask_rcnn)")
    p.add_argument("--rois", type=number(int, 4), help="regions of an image that Mask R-CNN's heads learn from; 512")
    p.add_argument("--box-head", choices=("4conv1fc", "2fc"), help="cascade's: the published figures' one, or mmdetection's base one")
    p.add_argument("--ms-test", action="store_true", help="test segmentation at six scales, each also mirrored")
    p.add_argument("--predict", nargs="+", metavar="IMAGE", help="write overlays of these images to --output")
    p.add_argument("--score", metavar="RESULTS", help="score a COCO results file, or a folder of label PNGs, without a model")
    p.add_argument("--eval-every", type=count, help="updates between tests; a tenth of --iters, or an epoch")
    p.add_argument("--max-steps", type=count, help="save and stop after this many updates; the schedule is not shortened")
    p.add_argument("--log-every", type=count, help="updates between log lines; 50")
    p.add_argument("--deterministic", **switch, help="only deterministic GPU kernels: slower, repeatable bit for bit")
    return p.parse_args(argv)


def settle(args, checkpoint=None):
    """Fill every flag not given: from the checkpoint if one is continued or tested, then preset, recipe, common values.

    Raises: InputError for an unknown task or backbone and flags that contradict each other.
    """
    saved = checkpoint["args"] if checkpoint else {}
    args.task = args.task or saved.get("task") or "semfpn"
    if args.task not in RECIPES:
        raise InputError(f"unknown --task {args.task!r}, expected one of {', '.join(RECIPES)}")
    args.data = args.data or saved.get("data")
    preset = {} if args.data else BUILT_IN[args.task]
    args.backbone = args.backbone or saved.get("backbone") or preset.get("backbone", "secvit_s")
    if args.backbone not in MODELS:
        raise InputError(f"unknown --backbone {args.backbone!r}, expected one of {', '.join(MODELS)}")
    args.boxes = args.boxes or (saved.get("boxes") if args.resume else None)
    args.output = args.output or saved.get("output") or f"runs/{args.task}_{args.backbone}"
    if args.iters and args.epochs:
        raise InputError("--iters and --epochs are two names of one length, give one")
    for flag, tasks in ONLY.items():
        if args.task not in tasks and not (getattr(args, flag) is None or getattr(args, flag) is False):
            raise InputError(f"--{flag.replace('_', '-')} is for {' and '.join(tasks)}, not for {args.task}")
    for name in ("task", "backbone", "schedule", "keypoints"):
        if saved and getattr(args, name) not in (None, saved[name]):
            raise InputError(f"the checkpoint is one of {saved[name]}, --{name} says {getattr(args, name)}")
    family = args.backbone.split("_")[0]
    defaults = OPTIONAL | dict(iters=None, epochs=None, amp="bf16" if torch.cuda.is_available() else "none", backbone_weights=None)
    defaults |= RECIPES[args.task] | FAMILY_RECIPES.get((family, args.task), {})
    if args.schedule:
        defaults["epochs"] = SCHEDULES[args.schedule][0]
    defaults |= preset
    defaults |= {k: v for k, v in saved.items() if k in defaults}
    if args.iters or args.epochs:                                           # a length that is given replaces the recipe's
        defaults |= dict(iters=None, epochs=None)
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.drop_path is None and family not in ("secvit", "sec"):          # these repeat the rates of classification
        args.drop_path = 0.3 if args.task == "upernet" or args.backbone in ("stvit_b", "stvit_l") else 0.1
    if args.frozen_bn is None:
        args.frozen_bn = bool(args.backbone_weights)
    if args.sync_bn is None:
        args.sync_bn = args.task in ("semfpn", "upernet", "cascade_mask_rcnn")
    if args.released and family != "secvit":
        raise InputError(f"--released is a variant of SecViT, not of {args.backbone}")
    if args.task == "pose" and args.img_size % 128:
        raise InputError(f"--img-size {args.img_size}: pose needs a multiple of 128, so that 3/4 of it, the width, is one of 32")
    if args.workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(10, cores) if args.data else 0


def rate_at(step, args, total):
    """Learning rate of update `step` of `total`: polynomial decay (segmentation) or steps (others), after a linear warm-up."""
    if args.schedule:
        epochs, falls = SCHEDULES[args.schedule]
        rate = args.lr * 0.1 ** sum(step >= total * epoch / epochs for epoch in falls)
        start = 1e-3
    else:
        power, start = (0.9, 1e-6) if args.task == "semfpn" else (1.0, 1e-6)
        rate = (args.lr - args.min_lr) * (1 - step / total) ** power + args.min_lr
    return rate * (1 - (1 - step / args.warmup_iters) * (1 - start)) if step < args.warmup_iters else rate


def decay_groups(model, weight_decay, norms=False):
    """AdamW groups: with Swin's settings (decay from 0.01 on) norms are exempt unless `norms`, with PVT's nothing is."""
    named = list(model.named_parameters())
    exempt = [p for name, p in named if weight_decay >= 0.01 and not norms and "norm" in name]
    ids = {id(p) for p in exempt}
    return [dict(params=[p for _, p in named if id(p) not in ids], weight_decay=weight_decay), dict(params=exempt, weight_decay=0.0)]


# -------------------------------------------------------------------------------------------------------------- scenes
SHAPES = ("disc", "square", "triangle", "cross", "ring")
SCENE_CLASSES = ("background", *SHAPES, "person")  # values 1 to 7 of a label PNG; 0 is "other"
SCENE_CATEGORIES = dict(zip(("person", *SHAPES), (1, 3, 4, 7, 9, 10)))  # ids with gaps, as COCO's
SCENE_VERSION = 2  # scenes drawn by another version are drawn anew
PARTS = {"body": slice(0, 17), "foot": slice(17, 23), "face": slice(23, 91), "lefthand": slice(91, 112), "righthand": slice(112, 133)}


def arc(corners, centre, radii, sweep):
    """(corners, 2) points of an ellipse from its left end on; a positive sweep, in radians, passes the top first (y points down)."""
    angle = np.pi + np.linspace(0, sweep, corners, endpoint=abs(sweep) < 2 * np.pi)
    return np.array(centre) + np.array(radii) * np.stack([np.cos(angle), np.sin(angle)], 1)


def rotation(angle):
    """For row vectors times matrix: positive turns x towards y."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def shape_outline(kind):
    """Rings of a shape in units of its radius; a ring inside another one is a hole."""
    circle, (a, b) = arc(32, (0, 0), (1, 1), 2 * np.pi), (0.95, 0.28)
    cross = [(b, a), (b, b), (a, b), (a, -b), (b, -b), (b, -a), (-b, -a), (-b, -b), (-a, -b), (-a, b), (-b, b), (-b, a)]
    return {"disc": [circle], "ring": [circle, circle / 2], "square": [circle[::8]], "cross": [np.array(cross)],
            "triangle": [arc(3, (0, 0), (1, 1), 2 * np.pi)]}[kind]


def inside(rings, width, height):
    """(height, width) bool: pixels whose centre is within the rings by the even-odd rule; pixel (i, j) spans x from j to j + 1."""
    x, y, mask = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5, np.zeros((height, width), bool)
    for ring in rings:
        for (xa, ya), (xb, yb) in zip(ring, np.roll(ring, -1, axis=0)):
            if ya != yb:  # a level edge has no row of centres on two sides
                mask ^= ((ya <= y) != (yb <= y)) & (x < xa + (y - ya) * ((xb - xa) / (yb - ya)))
    return mask


def texture(rng, kind, width, height):
    """The pattern of a kind of shape in two random colours, (height, width, 3): dots, stripes, checks, a grid, nothing."""
    xy = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1) @ rotation(rng.uniform(0, 2 * np.pi))
    u, v = np.moveaxis(np.sin(2 * np.pi / rng.uniform(7, 11) * xy + rng.uniform(0, 2 * np.pi, 2)), -1, 0)
    lit = {"disc": (u > 0) & (v > 0), "square": u > 0, "triangle": (u > 0) ^ (v > 0), "cross": (u > 0) | (v > 0), "ring": u < 2}[kind]
    return np.where(lit[..., None], 255 - rng.uniform(0, 80, 3), rng.uniform(0, 110, 3))


def clutter(rng, width, height):
    """Background (height, width, 3): lines, and blobs smaller than any shape."""
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        (x, y, u, v), (w, h) = rng.integers(0, (width, height, width, height)).tolist(), rng.integers(2, 12, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3))
        draw.line((x, y, u, v), colour, 2) if rng.random() < 0.5 else draw.rectangle((x, y, x + w, y + h), colour)
    return np.array(image, np.float64)


def draw_shape(rng, kind, width, height):
    """Mask, texture and outline of a shape, which may stick out of the image."""
    radius = rng.uniform(12, 32)
    centre = rng.uniform(0.5 * radius, np.array([width, height]) - 0.5 * radius)
    turn = radius * rotation(rng.uniform(0, 2 * np.pi))
    outline = [np.round(ring @ turn + centre, 2) for ring in shape_outline(kind)]  # the mask is of what the file will say
    return inside(outline, width, height), texture(rng, kind, width, height), outline


def draw_swarm(rng, width, height):
    """Many small discs, too many to annotate one by one; no outline."""
    centre, mask = rng.uniform(35, (width - 35, height - 35)), np.zeros((height, width), bool)
    for _ in range(rng.integers(16, 28)):
        mask |= inside([arc(16, centre + rng.uniform(-28, 28, 2), [rng.uniform(3, 5)] * 2, 2 * np.pi)], width, height)
    return mask, texture(rng, "disc", width, height), []


def face_points():
    """The usual 68 points in units of the head, whose lower half is a half circle; each group starts at the picture's left."""
    eyes = [arc(6, (x, -0.1), (0.2, 0.13), 2 * np.pi) for x in (-0.42, 0.42)]
    brows = [arc(5, (x, -0.35), (0.26, 0.12), np.pi) for x in (-0.42, 0.42)]
    nose = [[(0, y) for y in (-0.1, 0.03, 0.16, 0.3)], arc(5, (0, 0.35), (0.17, 0.07), -np.pi)]
    mouth = [arc(n, (0, 0.63), radii, 2 * np.pi) for n, radii in ((12, (0.4, 0.17)), (8, (0.26, 0.06)))]
    return np.concatenate([arc(17, (0, 0), (1, 1), -np.pi), *brows, *nose, *eyes, *mouth])


def half_person(rng, side):
    """Arm and leg (6, 2), foot (3, 2) and hand (21, 2) in a random pose, from the hips' middle in units of the body height.
    Side 1 is the person's left, at the picture's right; side -1 is its mirror image. Angle 0 hangs down, positive turns outwards."""
    def chain(start, lengths, *angles):
        return start + np.cumsum(np.array(lengths)[:, None] * np.stack([np.sin(angles), np.cos(angles)], 1), axis=0)

    upper, lower, bend, thigh, knee = rng.uniform((0.25, -0.9, -0.4, -0.05, -0.5), (2.4, 0.9, 0.4, 0.5, 0.1))
    shoulder, hip = np.array([0.115, -0.28]), np.array([0.065, 0])
    arm = chain(shoulder, (0.16, 0.14), upper, upper + lower)
    leg = chain(hip, (0.19, 0.19), thigh, thigh + knee)
    foot = leg[1] + [(0.045, 0.055), (0.085, 0.035), (-0.01, 0.045)]  # big toe, small toe, heel
    rays = upper + lower + bend + rng.uniform(0.85, 1.15) * np.array([1.15, 0.45, 0.05, -0.35, -0.75])  # thumb, ..., little finger
    bones = ((0.03, 0.02, 0.02, 0.015), *[(0.055, 0.025, 0.02, 0.02)] * 3, (0.05, 0.02, 0.015, 0.015))
    hand = np.concatenate([arm[1:], *(chain(arm[1], row, *[ray] * 4) for row, ray in zip(bones, rays))])  # its root is the wrist
    return [part * (side, 1) for part in (np.concatenate([[shoulder], arm, [hip], leg]), foot, hand)]


def person_points(rng, width, height):
    """The 133 keypoints (x, y) of a figure that faces the viewer, in whole pixels, not all within the image, and its height."""
    face, (left, right) = face_points(), (half_person(rng, side) for side in (1, -1))
    front = [face[30], face[42:48].mean(0), face[36:42].mean(0), (1.05, 0), (-1.05, 0)]  # nose, eyes, ears
    head = np.concatenate([front, face]) * (0.1, 0.125) @ rotation(rng.uniform(-0.3, 0.3)) - (0, 0.43)
    limbs = np.stack([left[0], right[0]], 1).reshape(-1, 2)  # left, right, left, ...
    points = np.concatenate([head[:5], limbs, left[1], right[1], head[5:], left[2], right[2]])
    size = rng.uniform(60, 100)
    hips = rng.uniform((0.2 * width, 0.5 * size), (0.8 * width, height - 0.4 * size))
    return np.round(size * points @ rotation(rng.uniform(-0.3, 0.3)) + hips).astype(int), size


def draw_figure(points, size, colours, width, height):
    """Mask (height, width) and colours (height, width, 3) of a figure, drawn from nothing but its keypoints."""
    image = Image.new("L", (width, height))  # holds 1 + the index into `colours`
    draw, (hair, skin, shirt, trousers, shoes, eyes, nose, mouth) = ImageDraw.Draw(image), range(1, 9)

    def fill(corners, part):
        draw.polygon([tuple(corner) for corner in np.round(corners).astype(int).tolist()], part)

    def stroke(indices, part, thickness):
        path, thick = [tuple(point) for point in points[list(indices)].tolist()], max(1, round(thickness * size))
        draw.line(path, part, thick)
        draw.point(path, part)  # which a line two pixels thick may leave out
        r = (thick - 1) // 2
        for x, y in path:  # round joints and ends
            draw.ellipse((x - r, y - r, x + r, y + r), part)

    def skull(reach):  # upper half of the ellipse that the face's contour begins
        centre = (points[23] + points[39]) / 2
        return centre + arc(9, (0, 0), (1, reach), np.pi) @ [points[39] - centre, points[31] - centre]

    for hip, heel in ((11, 19), (12, 22)):
        stroke((hip, hip + 2, hip + 4), trousers, 0.07)
        stroke((hip + 4, heel, heel - 2, heel - 1, heel), shoes, 0.03)
    fill(points[[5, 31, 6, 12, 11]], shirt)  # shoulders, chin, hips
    stroke((3, 4), skin, 0.04)  # from ear to ear
    fill(np.concatenate([points[23:40], skull(1)[::-1]]), skin)
    fill(np.concatenate([skull(1.1), skull(0.65)[::-1]]), hair)
    for first, last, part in ((40, 45, hair), (45, 50, hair), (50, 54, nose), (54, 59, nose)):
        stroke(range(first, last), part, 0.01)
    for first, last, part in ((59, 65, eyes), (65, 71, eyes), (71, 83, mouth)):
        fill(points[first:last], part)
    for shoulder, root in ((5, 91), (6, 112)):
        stroke((shoulder + 2, shoulder + 4), skin, 0.05)
        stroke((shoulder, shoulder + 2), shirt, 0.06)
        for finger in range(root + 1, root + 21, 4):
            stroke((root, *range(finger, finger + 4)), skin, 0.018)
    parts = np.array(image)
    return parts > 0, colours[parts - (parts > 0)]


def draw_person(rng, width, height):
    """Mask, colours and keypoints of a person."""
    points, size = person_points(rng, width, height)
    skin = np.array([255, 215, 180]) * rng.uniform(0.45, 1) + rng.uniform(-15, 15, 3)
    colours = np.stack([rng.uniform(0, 130, 3), skin, *rng.uniform(0, 255, (3, 3)), np.full(3, 20), 0.7 * skin, [190, 20, 40]])
    return *draw_figure(points, size, colours, width, height), points


def draw_scene(rng, empty, crowd):
    """Picture (H, W, 3) uint8, owner (H, W) of each pixel (0 none, n the n-th thing), things (kind, mask, outline or keypoints)."""
    width, height = (rng.integers(s - 16, s + 17).item() for s in (160, 128))
    picture, owner, things = clutter(rng, width, height), np.zeros((height, width), int), []
    kinds = [*rng.choice(SHAPES, rng.integers(2, 7)).tolist(), *["person"] * rng.integers(0, 3), *["swarm"] * crowd]
    for kind in [] if empty else rng.permutation(kinds).tolist():  # later ones cover earlier ones
        draw = {"person": draw_person, "swarm": draw_swarm}.get(kind, partial(draw_shape, kind=kind))
        mask, pixels, known = draw(rng, width=width, height=height)
        things.append((kind, mask, known))
        picture, owner = np.where(mask[..., None], pixels, picture), np.where(mask, len(things), owner)
    return (picture + rng.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8), owner, things


def segmentation(outline, mask, visible):
    """A polygon if that says all (nothing is hidden, no hole, all in the image), else run lengths of the visible pixels."""
    corners = outline[0] if len(outline) == 1 else np.array([[-1, -1]])
    if (corners >= 0).all() and (corners <= visible.shape[::-1]).all() and (visible == mask).all():
        return [corners.ravel().tolist()]
    return {"size": list(visible.shape), "counts": mask_runs(visible).tolist()}


def box_of(x, y):
    """x, y, w, h around whole pixels; zeros around none."""
    return [int(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)] if len(x) else [0, 0, 0, 0]


def keypoint_fields(points, visible, box):
    """Whole-body fields of a person. A hidden point far from all that is seen is not labelled: nobody could guess it."""
    size, low, (w, h), margin = visible.shape[::-1], np.array(box[:2]), box[2:], 0.1 * max(box[2:])
    near = ((points >= 0) & (points < size) & (points >= low - margin) & (points < low + (w, h) + margin)).all(1)
    seen = visible[tuple(points.clip(0, np.array(size) - 1).T[::-1])]
    table = np.column_stack([points, 1 + seen]) * near[:, None]  # (133, 3), zeros where not labelled
    fields = {"keypoints": table[PARTS["body"]].ravel().tolist(), "num_keypoints": int(near[PARTS["body"]].sum())}
    for name in ("foot", "face", "lefthand", "righthand"):
        part, valid = points[PARTS[name]], near[PARTS[name]]
        fields |= {f"{name}_kpts": table[PARTS[name]].ravel().tolist(), f"{name}_valid": bool(valid.any())}
        fields |= {} if name == "foot" else {f"{name}_box": box_of(*part[valid].T)}  # there is no foot_box
    return fields


def annotate(owner, things, least=30):
    """Label map (H, W) uint8, COCO annotations, keypoints of the persons; what shows less than `least` pixels is unlabelled in all."""
    labels, found, people = np.zeros(owner.shape, np.uint8), [], []
    labels[2:-2, 2:-2] = owner[2:-2, 2:-2] == 0  # background, but for a thin frame that is nothing
    for place, (kind, mask, known) in enumerate(things, 1):
        visible, crowd, name = owner == place, kind == "swarm", "disc" if kind == "swarm" else kind
        if visible.sum() < least:
            continue
        labels[visible] = 1 + SCENE_CLASSES.index(name)
        box = box_of(*np.nonzero(visible)[::-1])
        found.append({"category_id": SCENE_CATEGORIES[name], "bbox": box, "area": int(visible.sum()), "iscrowd": int(crowd),
                      "segmentation": segmentation([] if kind == "person" else known, mask, visible)})
        people.append(keypoint_fields(known, visible, box) if kind == "person" else None)
    return labels, found, people


def write_split(root, split, seed, count):
    """Split "train" or "val" in both layouts; every 20th scene is empty, every 8th has a crowd."""
    ade, coco = {"train": "training", "val": "validation"}[split], f"{split}2017"
    for folder in (f"images/{ade}", f"annotations/{ade}", coco):
        (root / folder).mkdir(parents=True)
    images, objects, people = [], [], []
    for index in range(count):
        picture, owner, things = draw_scene(np.random.default_rng((seed, split == "val", index)), index % 20 == 6, index % 8 == 3)
        labels, found, keypoints = annotate(owner, things)
        name, ade_name = f"{index + 1:012}.jpg", f"ADE_{split}_{index + 1:08}"
        Image.fromarray(picture).save(root / coco / name, quality=90)
        shutil.copyfile(root / coco / name, root / "images" / ade / f"{ade_name}.jpg")
        Image.fromarray(labels).save(root / "annotations" / ade / f"{ade_name}.png")
        images.append({"id": index + 1, "file_name": name, "width": labels.shape[1], "height": labels.shape[0]})
        objects += [{"id": len(objects) + k, "image_id": index + 1, **entry} for k, entry in enumerate(found, 1)]
        people += [{**entry, **fields} for entry, fields in zip(objects[len(objects) - len(found):], keypoints) if fields]
    kinds = [{"id": i, "name": name} for name, i in SCENE_CATEGORIES.items()]
    for file, entries, categories in (("instances_{}2017", objects, kinds), ("coco_wholebody_{}_v1.0", people, kinds[:1])):
        text = json.dumps({"images": images, "annotations": entries, "categories": categories})
        (root / "annotations" / f"{file.format(split)}.json").write_text(text)


def write_scenes(folder, images=(400, 80), seed=0):
    """Draw scenes of shapes and people, write them in the layouts of ADE20K and COCO, unless they are there already.

    They get their name only when complete, so a killed run leaves no half data set.
    """
    folder, drawn = Path(folder), {"version": SCENE_VERSION, "images": list(images), "seed": seed}
    record = folder / "scenes.json"
    if record.exists() and json.loads(record.read_text()) == drawn:
        return
    if folder.exists() and not record.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else than drawn scenes: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as workplace:
        new = Path(workplace) / "new"
        for split, count in zip(("train", "val"), images):
            write_split(new, split, seed, count)
        (new / "objectInfo.txt").write_text("\n".join(["Idx\tName", *(f"{i}\t{name}" for i, name in enumerate(SCENE_CLASSES, 1))]))
        (new / record.name).write_text(json.dumps(drawn))
        if folder.exists():  # other scenes: they go with the workplace
            os.rename(folder, Path(workplace) / "old")
        os.rename(new, folder)


# ------------------------------------------------------------------------------------------------------ the human body
PERSON = 1  # COCO's category
FIELDS = {part: "keypoints" if part == "body" else f"{part}_kpts" for part in PARTS}
BODY_SIGMAS = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089)
FOOT_SIGMAS = (0.068, 0.066, 0.066, 0.092, 0.094, 0.094)
FACE_SIGMAS = (
    0.042, 0.043, 0.044, 0.043, 0.040, 0.035, 0.031, 0.025, 0.020, 0.023, 0.029, 0.032, 0.037, 0.038, 0.043, 0.041, 0.045,     # contour
    0.013, 0.012, 0.011, 0.011, 0.012, 0.012, 0.011, 0.011, 0.013, 0.015, 0.009, 0.007, 0.007, 0.007, 0.012, 0.009, 0.008, 0.016, 0.010,
    0.017, 0.011, 0.009, 0.011, 0.009, 0.007, 0.013, 0.008, 0.011, 0.012, 0.010, 0.034, 0.008, 0.008, 0.009, 0.008, 0.008, 0.007, 0.010,
    0.008, 0.009, 0.009, 0.009, 0.007, 0.007, 0.008, 0.011, 0.008, 0.008, 0.008, 0.010, 0.008)
HAND_SIGMAS = (0.029, 0.022, 0.035, 0.037, 0.047, 0.026, 0.025, 0.024, 0.035, 0.018, 0.024, 0.022, 0.026, 0.017, 0.021, 0.021, 0.032,
               0.020, 0.019, 0.022, 0.031)
SIGMAS = np.array([*BODY_SIGMAS, *FOOT_SIGMAS, *FACE_SIGMAS, *HAND_SIGMAS, *HAND_SIGMAS])   # (133,), of COCO-WholeBody
LINES = [(15, 13, 11, 5, 7, 9), (16, 14, 12, 6, 8, 10), (11, 12), (5, 6), (3, 1, 0, 2, 4), (17, 15, 18), (15, 19), (20, 16, 21), (16, 22),
         *((root, *range(finger, finger + 4)) for root in (91, 112) for finger in range(root + 1, root + 21, 4))]   # drawn through points


def mirror_order():
    """(133,): the point that each one becomes in a mirror; the first 17 are a permutation of their own."""
    order = np.arange(133)
    order[1:17] += np.tile((1, -1), 8)                                                  # left, right, left, ...
    order[17:23] += np.repeat((3, -3), 3)
    for first, end in ((23, 40), (40, 50), (54, 59), (71, 78), (78, 83), (83, 88), (88, 91)):               # lines across the face
        order[first:end] = order[first:end][::-1]
    order[59:71] = (68, 67, 66, 65, 70, 69, 62, 61, 60, 59, 64, 63)                     # eyes
    order[91:133] += np.repeat((21, -21), 21)
    return order


FLIP = mirror_order()


# -------------------------------------------------------------------------------------------- data sets and transforms
class Ade20k:
    """Images and label maps of folder/images/SPLIT and folder/annotations/SPLIT (ADE20K's layout), in order of name.

    Labels in the PNGs: 0 is not evaluated, 1 to K are the classes. `names` come from objectInfo*.txt, else K is 150 and they are numbers.
    Raises: InputError for missing folders or files.
    """

    def __init__(self, folder, split):
        split = {"train": "training", "val": "validation"}[split]
        images, self.labels = Path(folder) / "images" / split, Path(folder) / "annotations" / split
        for part in (images, self.labels):
            if not part.is_dir():
                raise InputError(f"{part} is not a folder; expected DIR/images/{{training,validation}} and DIR/annotations/...")
        Image.init()
        self.files = sorted(file for file in images.iterdir() if file.suffix.lower() in Image.EXTENSION)
        if not self.files:
            raise InputError(f"{images} holds no image")
        missing = [file.name for file in self.files if not (self.labels / f"{file.stem}.png").is_file()]
        if missing:
            raise InputError(f"{self.labels} lacks the label map of {missing[0]}" + f" and {len(missing) - 1} others" * (len(missing) > 1))
        info = sorted(Path(folder).glob("objectInfo*.txt"))
        rows = [line.split("\t") for line in info[0].read_text().splitlines()[1:] if line] if info else []
        self.names = [row[-1].split(",")[0].strip() for row in rows] or [str(i) for i in range(1, 151)]
        if len(self.names) > 254:
            raise InputError(f"{info[0]} names {len(self.names)} classes, label maps of 8 bits hold at most 254")

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.files[index])

    def read(self, index):
        """RGB image and its label map."""
        with Image.open(self.files[index]) as image:
            image = image.convert("RGB")
        labels = self.truth(index)
        if labels.shape != (image.height, image.width):
            raise InputError(f"{self.files[index]} is {image.width} x {image.height}, its label map {labels.shape[1]} x {labels.shape[0]}")
        return image, labels

    def truth(self, index):
        return self.read_labels(self.labels / f"{self.files[index].stem}.png")

    def read_labels(self, path):
        """A label PNG as uint8 (H, W): classes 0 to K - 1, 255 not evaluated."""
        try:
            with Image.open(path) as labels:
                labels = np.array(labels)
        except (OSError, ValueError, SyntaxError) as error:                             # SyntaxError: Pillow on broken files
            raise InputError(f"{path}: {error}") from None
        if labels.ndim != 2 or labels.dtype != np.uint8:
            raise InputError(f"{path}: expected a label map of 8 bits")
        if (labels[labels != IGNORED] > len(self.names)).any():
            raise InputError(f"{path}: label {labels[labels != IGNORED].max()} out of range, there are {len(self.names)} classes")
        return np.where(labels == IGNORED, IGNORED, labels - 1)     # 0 wraps to 255


class Coco:
    """Images of folder/SPLIT2017 with the objects of folder/annotations/instances_SPLIT2017.json (COCO's layout).

    Training keeps what mmdetection keeps: boxes of at least 1 x 1 pixels that overlap the image, no crowds, images
    with annotations and sides of at least 32; with `masks` also their segmentations. Testing keeps all images; `annotations` holds the
    file's own. Raises: InputError for a file that is no such annotation file, with the offending id.
    """

    def __init__(self, folder, split, masks=False):
        self.folder, path = Path(folder) / f"{split}2017", Path(folder) / "annotations" / f"instances_{split}2017.json"
        data = read_annotations(path)
        self.categories = sorted(category["id"] for category in data["categories"])
        names = {category["id"]: category["name"] for category in data["categories"]}
        self.names = [names[i] for i in self.categories]
        label = {category: i for i, category in enumerate(self.categories)}
        images = {image["id"]: image for image in data["images"]}
        annotations = {i: [] for i in images}
        for annotation in data["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        self.annotations = annotations if split == "val" else {}            # a gigabyte in COCO's training file
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder; expected DIR/{{train,val}}2017 and DIR/annotations/*.json")
        self.path, self.masks, entries = path, masks and split == "train", []
        for i in sorted(images):
            W, H = images[i]["width"], images[i]["height"]
            if split == "train" and (not annotations[i] or min(W, H) < 32):
                continue
            entry = dict(image=images[i], boxes=[], labels=[], objects=[])
            for annotation in annotations[i]:
                x, y, w, h = annotation["bbox"]
                overlap = max(0, min(x + w, W) - max(x, 0)) * max(0, min(y + h, H) - max(y, 0))
                if overlap > 0 and w >= 1 and h >= 1 and annotation["area"] > 0 and not (annotation["iscrowd"] or annotation.get("ignore")):
                    entry["boxes"].append((x, y, x + w, y + h))
                    entry["labels"].append(label[annotation["category_id"]])
                    entry["objects"].append(annotation if self.masks else None)
            entries.append(entry)
        if not entries:
            raise InputError(f"{path} holds no image" + " with annotations" * (split == "train"))
        self.entries = Packed(entries)
        self.wide = np.array([entry["image"]["width"] > entry["image"]["height"] for entry in entries])

    def __len__(self):
        return len(self.entries)

    def name(self, index):
        return str(self.folder / self.entries[index]["image"]["file_name"])

    def read(self, index):
        """RGB image, boxes (G, 4), labels (G,) and, for training with masks, these (G, H, W) bool."""
        with Image.open(self.name(index)) as image:
            image = image.convert("RGB")
        entry = self.entries[index]
        objects = np.array(entry["boxes"], np.float32).reshape(-1, 4), np.array(entry["labels"], np.int64)
        if not self.masks:
            return image, *objects
        size = dict(entry["image"], height=image.height, width=image.width)
        masks = np.zeros((len(objects[0]), image.height, image.width), bool)
        for mask, annotation in zip(masks, entry["objects"]):
            try:
                mask[:] = rle_decode(dict(size=mask.shape, counts=segmentation_runs(annotation, size)))
            except ValueError as error:
                raise InputError(f"{self.path}: {error}") from None
        return image, *objects, masks


class Packed:
    """Entries as JSON texts in one array: of lists and dicts every loader process would make a copy by counting references."""

    def __init__(self, entries):
        texts = [json.dumps(entry).encode() for entry in entries]
        self.ends, self.text = np.cumsum([0, *map(len, texts)]), np.frombuffer(b"".join(texts), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return json.loads(self.text[self.ends[index]:self.ends[index + 1]].tobytes())


class Persons:
    """Persons of folder/SPLIT2017 with their keypoints: COCO-WholeBody's 133, or COCO's 17 (of the same file if there is no other).

    A training sample is a person, a validation sample an image with all its persons: those annotated, or those of the COCO detection
    file `boxes`. Annotated ones must not be crowds and need an area, a box that is left after clipping, something in the body's
    values. What training needs is kept in arrays; `annotations` holds the validation file's own.
    Raises: InputError for a file that is no such annotation file, with the offending id.
    """

    def __init__(self, folder, split, keypoints, boxes=None):
        self.folder, files = Path(folder) / f"{split}2017", Path(folder) / "annotations"
        path = files / f"person_keypoints_{split}2017.json"
        if keypoints == 133 or not path.is_file():
            path = files / f"coco_wholebody_{split}_v1.0.json"
        data = read_annotations(path)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder; expected DIR/{{train,val}}2017 and DIR/annotations/*.json")
        self.names = [f"{part} {i}" for part, own in PARTS.items() for i in range(own.stop - own.start)][:keypoints]
        images = sorted(data["images"], key=lambda image: image["id"])
        place = {image["id"]: i for i, image in enumerate(images)}
        self.annotations = {image["id"]: [] for image in images} if split == "val" else {}
        rows = []                                                           # image, box with a score, points
        for annotation in data["annotations"]:
            if annotation["category_id"] == PERSON:
                points = read_points(annotation, keypoints, f"{path}: annotation {annotation.get('id')}")
                if split == "val":
                    self.annotations[annotation["image_id"]].append(annotation)
                i, (x, y, w, h) = place[annotation["image_id"]], annotation["bbox"]
                left, top = max(x, 0), max(y, 0)
                w, h = min(x + w, images[i]["width"]) - 1 - left, min(y + h, images[i]["height"]) - 1 - top
                if w > 0 and h > 0 and annotation["area"] > 0 and not annotation["iscrowd"] and points[PARTS["body"]].any():
                    rows.append((i, (left, top, w, h, 1.0), points.astype(np.float32)))
        if boxes and split == "val":
            found, unknown = read_boxes(boxes), np.zeros((keypoints, 3), np.float32)
            rows = [(place[i], box, unknown) for i, image_boxes in found.items() if i in place for box in image_boxes.tolist()]
            if not rows:
                raise InputError(f"{boxes} holds no person in an image of {path}")
        if not rows:
            raise InputError(f"{path} holds no person with keypoints")
        self.ids, self.files = [image["id"] for image in images], np.array([os.fsencode(image["file_name"]) for image in images])
        owner, self.boxes, self.points = (np.array(column, kind) for column, kind in zip(zip(*rows), (np.int64, np.float64, np.float32)))
        order = owner.argsort(kind="stable")
        owner, self.boxes, self.points = owner[order], self.boxes[order], self.points[order]
        ends = np.searchsorted(owner, np.arange(len(images) + 1))
        number = np.arange(len(owner))
        self.samples = np.stack([owner, number, number + 1] if split == "train" else [np.arange(len(images)), ends[:-1], ends[1:]], 1)

    def __len__(self):
        return len(self.samples)

    def name(self, index):
        return str(self.folder / os.fsdecode(bytes(self.files[self.samples[index, 0]])))

    def read(self, index):
        """RGB image, boxes (P, 5) as x, y, w, h, score, points (P, K, 3), all 0 in detections."""
        _, first, end = self.samples[index]
        with Image.open(self.name(index)) as image:
            return image.convert("RGB"), self.boxes[first:end], self.points[first:end]


def read_points(entry, keypoints, where):
    """Points (K, 3) of an annotation or result. Raises: InputError that begins with `where` if they are malformed."""
    parts = []
    for part, field in FIELDS.items():
        values, size = entry.get(field), 3 * (PARTS[part].stop - PARTS[part].start)
        if not (isinstance(values, list) and len(values) == size and {*map(type, values)} <= {int, float} and np.isfinite(values).all()):
            raise InputError(f"{where}: {field} must be {size} finite numbers: x, y, v")
        parts.append(np.array(values, np.float64).reshape(-1, 3))
        if keypoints == 17:
            break
    return np.concatenate(parts)


def read_boxes(path):
    """Persons of a COCO detection file: {image id: (P, 5) x, y, w, h, score}; those without extent are left out."""
    found = {}
    for result in read_results(path):
        if not (is_box(result.get("bbox")) and math.isfinite(float(result["score"]))):
            raise InputError(f"{path}: image {result['image_id']}: expected a bbox x, y, width, height and a finite score")
        if result["category_id"] == PERSON and min(result["bbox"][2:]) > 0:
            found.setdefault(result["image_id"], []).append((*result["bbox"], float(result["score"])))
    return {image: np.array(boxes, np.float64) for image, boxes in found.items()}


def is_box(box):
    """Whether something read from a file is four finite numbers."""
    return isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)


@contextmanager
def reading(path, what):
    """Raises: InputError that names the file for whatever goes wrong in the block."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no {what} ({type(error).__name__}: {error})") from None


def read_annotations(path):
    """A COCO annotation file, checked. Raises: InputError that names the file and the offending id."""
    with reading(path, "COCO annotation file"):
        data = json.loads(Path(path).read_text())
        images, categories = ({int(entry["id"]) for entry in data[key]} for key in ("images", "categories"))
        for category in data["categories"]:
            if not isinstance(category["name"], str):
                raise InputError(f"{path}: category {category['id']} has no name")
        for image in data["images"]:
            if not (image["width"] > 0 and image["height"] > 0 and isinstance(image["file_name"], str)):
                raise InputError(f"{path}: image {image['id']} lacks its size or name")
        for annotation in data["annotations"]:
            where = f"{path}: annotation {annotation.get('id')}"
            if annotation.get("image_id") not in images:
                raise InputError(f"{where}: unknown image id {annotation.get('image_id')}")
            if annotation.get("category_id") not in categories:
                raise InputError(f"{where}: unknown category id {annotation.get('category_id')}")
            if not is_box(annotation.get("bbox")):
                raise InputError(f"{where}: bbox {annotation.get('bbox')}, expected x, y, width, height")
            if not isinstance(annotation.get("area"), (int, float)):
                raise InputError(f"{where}: no area")
            annotation.setdefault("iscrowd", 0)
    return data


def read_results(path, images=None, categories=None):
    """A COCO results file, checked against the sets of known ids if given. Raises: InputError that names file and offending id."""
    with reading(path, "COCO results file"):
        results = json.loads(Path(path).read_text())
        if not isinstance(results, list):
            raise InputError(f"{path} is no COCO results file: expected a list of results")
        for result in results:
            if not {"segmentation", "keypoints"} & result.keys() and not is_box(result["bbox"]):
                raise InputError(f"{path}: image {result['image_id']}: bbox {result['bbox']}, expected x, y, width, height")
            if images is not None and result["image_id"] not in images:
                raise InputError(f"{path}: unknown image id {result['image_id']}")
            if categories is not None and result["category_id"] not in categories:
                raise InputError(f"{path}: image {result['image_id']}: unknown category id {result['category_id']}")
            int(result["image_id"]), int(result["category_id"]), float(result["score"])
    return results


class Samples(train_imagenet.Samples):
    """Samples by key (epoch, index, copy): (what the transform makes of source.read(index) or None, index, unreadable files)."""

    def prepare(self, raw, index, key):
        return self.transform(raw, random.Random(repr((train_imagenet.SAMPLE, self.seed, *key)))), index


class GroupSampler(StepSampler):
    """StepSampler whose micro-batches hold either wide or tall images, so that padding them to one size wastes little.

    Each group of an epoch is filled up with its own first images to whole micro-batches, as in mmdetection, and those are shuffled.
    """

    def __init__(self, *, wide, **schedule):
        self.wide = wide
        super().__init__(images=len(wide), **schedule)
        self.used = sum(-(-int(n) // self.micro) for n in (wide.sum(), (~wide).sum())) * self.micro
        self.per_epoch = self.used // self.batch

    @property
    def micro(self):
        return self.batch // self.count

    def order(self, epoch):
        rng = np.random.default_rng((train_imagenet.ORDER, self.seed, epoch))
        images, groups = rng.permutation(self.images), []
        for group in (images[self.wide[images]], images[~self.wide[images]]):
            if len(group):
                groups.append(np.resize(group, (-(-len(group) // self.micro), self.micro)))
        groups = rng.permutation(np.concatenate(groups))                                # (micro-batches, micro)
        whole = len(groups) // self.count * self.count
        windows = groups[:whole].reshape(-1, self.count, self.micro).transpose(0, 2, 1) # entry j + J t of a window is micro-batch j's
        order = np.concatenate([windows.reshape(-1), groups[whole:].reshape(-1)])
        return np.stack([order, np.zeros_like(order)], 1)


def fit(size, longer, shorter):
    """The size (W, H) scaled to fit into longer x shorter, whichever way it lies."""
    scale = min(longer / max(size), shorter / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def augment_segmentation(raw, rng, *, size):
    """Random scale, crop, flip and colour of an image and its label map: uint8 (h, w, 3) and (h, w) of at most `size`."""
    image, labels = raw
    scale = rng.uniform(0.5, 2.0)
    W, H = fit(image.size, int(4 * size * scale), int(size * scale))
    image = image.resize((W, H), Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(labels).resize((W, H), Image.Resampling.NEAREST))
    for _ in range(11):                                     # the first draw and at most ten redraws, the last one unchecked
        y, x = rng.randint(0, max(H - size, 0)), rng.randint(0, max(W - size, 0))
        crop = labels[y:y + size, x:x + size]
        count = np.bincount(crop[crop != IGNORED])
        if (count > 0).sum() > 1 and count.max() < 0.75 * count.sum():
            break
    image, labels = image.crop((x, y, min(x + size, W), min(y + size, H))), crop
    if rng.random() < 0.5:
        image, labels = ImageOps.mirror(image), labels[:, ::-1]
    return distort(np.asarray(image), rng), labels


def distort(pixels, rng):
    """Photometric distortion of uint8 RGB pixels (H, W, 3): brightness, contrast, saturation, hue, each with probability 1/2."""
    def linear(pixels, scale, shift):
        return (pixels * np.float32(scale) + np.float32(shift)).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        pixels = linear(pixels, 1, rng.uniform(-32, 32))
    contrast_first, contrast = rng.random() < 0.5, rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    if contrast_first:
        pixels = linear(pixels, contrast, 0)
    saturate, turn = rng.random() < 0.5, rng.random() < 0.5
    if saturate or turn:
        hsv = np.array(Image.fromarray(pixels).convert("HSV"))
        if saturate:
            hsv[..., 1] = linear(hsv[..., 1], rng.uniform(0.5, 1.5), 0)
        if turn:
            hsv[..., 0] += np.uint8(round(rng.randint(-18, 17) * 256 / 180) % 256)      # wraps around
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return pixels if contrast_first else linear(pixels, contrast, 0)


def augment_detection(raw, rng, *, size, multi_scale):
    """Flip and resize at random: uint8 (H, W, 3), boxes (G, 4) clipped to the image, labels (G,), masks (G, H, W) if there are any.

    The shorter side becomes `size`; with `multi_scale` 0.6 to 1 of it, half of the time of a random crop (Swin's recipe).
    """
    image, boxes, labels, *masks = raw
    boxes, unit = boxes.copy(), size / 800                  # the recipe's numbers are of images of 800 pixels

    def rescale(shorter):
        nonlocal image, boxes, masks
        W, H = fit(image.size, size * 1333 / 800, shorter)
        boxes = boxes * np.array([W / image.width, H / image.height] * 2, np.float32)
        masks = [np.stack([Image.fromarray(one).resize((W, H), Image.Resampling.NEAREST) for one in mask]) if len(mask)
                 else np.zeros((0, H, W), bool) for mask in masks]
        image = image.resize((W, H), Image.Resampling.BILINEAR)

    if rng.random() < 0.5:
        image, masks = ImageOps.mirror(image), [mask[..., ::-1] for mask in masks]
        boxes = np.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1)
    if multi_scale and rng.random() < 0.5:
        rescale(rng.choice((400, 500, 600)) * unit)
        (W, H), (low, high) = image.size, (round(384 * unit), round(600 * unit))
        h, w = (rng.randint(min(side, low), min(side, high)) for side in (H, W))
        y, x = rng.randint(0, H - h), rng.randint(0, W - w)
        image, masks = image.crop((x, y, x + w, y + h)), [mask[:, y:y + h, x:x + w] for mask in masks]
        boxes = (boxes - np.array([x, y, x, y], np.float32)).clip(0, np.array([w, h, w, h], np.float32))
    rescale(rng.choice(range(480, 801, 32)) * unit if multi_scale else size)
    boxes = boxes.clip(0, np.array(image.size * 2, np.float32))
    there = (boxes[:, 2:] - boxes[:, :2]).min(1) > 0.01     # a sliver's size has no logarithm
    return np.asarray(image), boxes[there], labels[there], *(mask[there] for mask in masks)


def crop_frame(corner, size, padding):
    """Centre (..., 2) and size (..., 2) of boxes given by corner and size, grown to a width of 3/4 of the height, then `padding` times."""
    w, h = np.moveaxis(np.maximum(size, 1e-3), -1, 0)
    return corner + size / 2, padding * np.stack([np.maximum(w, 0.75 * h), np.maximum(h, w / 0.75)], -1)


def crop_person(image, points, centre, size, angle, height):
    """Turn the frame of `centre`, `size` (2,) upright by `angle` and resize it: uint8 (height, 3/4 height, 3) and points (K, 3) in it."""
    middle, matrix = np.array([0.75 * height, height]) / 2, 0.75 * height / size[0] * rotation(-angle)
    back = np.linalg.inv(matrix)                                            # row vectors: p = (crop's - middle) @ back + centre
    offset = centre + 0.5 - (middle + 0.5) @ back                           # Pillow's (0, 0) is the corner of the first pixel
    crop = image.transform((height * 3 // 4, height), Image.Transform.AFFINE, np.column_stack([back.T, offset]).ravel().tolist(),
                           Image.Resampling.BILINEAR)
    return np.array(crop), np.concatenate([(points[:, :2] - centre) @ matrix + middle, points[:, 2:]], 1)


def augment_person(raw, rng, *, height, jitter):
    """Shifted, mirrored, half, scaled, turned at random: uint8 crop (height, 3/4 height, 3), float32 points (K, 3).

    `jitter` 1 is TCFormer's recipe, 0 leaves only mirroring.
    """
    image, ((x, y, w, h, _),), (points,) = raw
    centre, size = crop_frame(np.array([x, y]), np.array([w, h]), 1.25)
    if rng.random() < 0.3:
        centre = centre + jitter * 0.16 * size * [rng.uniform(-1, 1), rng.uniform(-1, 1)]
    if rng.random() < 0.5:
        image, points = ImageOps.mirror(image), points[FLIP[:len(points)]] * (-1, 1, 1) + (image.width - 1, 0, 0)
        centre = centre * (-1, 1) + (image.width - 1, 0)
    labelled = points[:, 2] > 0
    if labelled.sum() > 8 and rng.random() < 0.3 * jitter:
        upper, lower = (points[own & labelled, :2] for own in (np.arange(len(points)) < 11, np.arange(len(points)) >= 11))
        half = upper if (rng.gauss(0, 1) < 0.5 and len(upper) > 2) or len(lower) <= 2 else lower
        if len(half) >= 2:
            centre, (_, size) = half.mean(0), crop_frame(half.min(0), np.ptp(half, 0), 1.5)
    size = size * min(max(1 + jitter * 0.5 * rng.gauss(0, 1), 0.5), 1.5)
    angle = math.radians(min(max(jitter * 40 * rng.gauss(0, 1), -80), 80)) if rng.random() < 0.6 else 0.0
    crop, points = crop_person(image, points, centre, size, angle, height)
    return crop, points.astype(np.float32)


def pad_images(images, multiple, least=0):
    """uint8 images (h, w, 3) -> one batch (B, H, W, 3), padded right and bottom to a multiple, and sizes (B, 2) as h, w."""
    sizes = torch.tensor([image.shape[:2] for image in images])
    H, W = (max(least, -(-int(side) // multiple) * multiple) for side in sizes.amax(0))
    batch = torch.zeros(len(images), H, W, 3, dtype=torch.uint8)
    for place, image in zip(batch, images):
        place[:image.shape[0], :image.shape[1]] = torch.from_numpy(np.array(image))
    return batch, sizes


def normalize_padded(images, sizes):
    """uint8 (B, H, W, 3) with sizes (B, 2) -> float (B, 3, H, W), 0 (the mean colour) in the padding."""
    row, column = (torch.arange(side, device=images.device) for side in images.shape[1:3])
    inside = (row[:, None] < sizes[:, :1, None]) & (column < sizes[:, 1:, None])        # (B, H, W)
    return normalize(images) * inside[:, None]


# --------------------------------------------------------------------------------------------------------------- boxes
def box_iou(a, b):
    """Intersection over union of boxes a (..., A, 4) and b (..., G, 4): (..., A, G), 0 where the union is empty."""
    low, high = torch.maximum(a[..., :, None, :2], b[..., None, :, :2]), torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((t[..., 2:] - t[..., :2]).prod(-1) for t in (a, b))
    return inter / (area_a[..., :, None] + area_b[..., None, :] - inter).clamp(min=1e-6)


def encode(anchors, boxes):
    """Deltas (..., 4) that move anchors (..., 4) onto boxes (..., 4): shift over size, logarithm of the ratio of sizes."""
    size, target = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + boxes[..., 2:] - anchors[..., :2] - anchors[..., 2:]) / 2 / size
    return torch.cat([shift, (target / size).log()], -1)


def decode(anchors, deltas):
    """The inverse of `encode`; sizes change by at most a factor of 1000 / 16."""
    size, centre = anchors[..., 2:] - anchors[..., :2], (anchors[..., :2] + anchors[..., 2:]) / 2
    limit = math.log(1000 / 16)
    centre, size = centre + deltas[..., :2] * size, size * deltas[..., 2:].clamp(-limit, limit).exp()
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def clip_boxes(boxes, size):
    """Boxes (..., 4) clipped to an image of size (H, W), or each to its own: (..., 2)."""
    size = torch.as_tensor(size, dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), torch.stack([size[..., 1], size[..., 0]] * 2, -1))


def assign(boxes, labels, anchors, there, *, positive, negative, least):
    """Max-IoU assignment (mmdetection): for each anchor the number of its box, -1 negative, -2 neither.

    Args: boxes (B, G, 4) and labels (B, G), -1 where padded; anchors (A, 4) or (B, A, 4); there (B, A): the anchors that count, others
    get -2; positive, negative: IoU from and below which an anchor is; least: every box also takes the anchors that tie its best
    IoU if that is at least `least`, later boxes first (above 1: none does).
    Returns: (B, A).
    """
    iou = box_iou(anchors, boxes).masked_fill((labels < 0)[:, None] | ~there[..., None], -1)            # (B, A, G)
    best, index = iou.max(2)
    index = index.masked_fill(best < positive, -2).masked_fill(best < negative, -1)     # scalars in torch.where wait for a GPU
    top = iou.amax(1, keepdim=True)                                                     # (B, 1, G)
    numbers = torch.arange(1, boxes.shape[1] + 1, device=boxes.device)
    own = (((iou == top) & (top >= max(least, 0))) * numbers).amax(2) - 1                # the last box that ties, -1 if none
    return torch.where(own >= 0, own, index).masked_fill(~there, -2)


def sample(positive, negative, count, most):
    """A random choice among candidates: at most `most` positive ones, then negative ones up to `count` in all.

    Args: positive, negative (B, N) bool. Returns: index (B, n) and role (B, n) of n = min(count, N) places: 1 the positive ones, which
    come first, 0 the negative ones, -1 unused. Drawn from torch's generator.
    """
    key = torch.rand(positive.shape, device=positive.device)                            # below 1
    drawn = key.masked_fill(~positive, -1).topk(min(most, key.shape[1]))
    chosen = torch.zeros_like(positive).scatter(1, drawn.indices, drawn.values >= 0)
    key = key.masked_fill(~negative, -1).masked_fill(chosen, 2)
    key, index = key.topk(min(count, key.shape[1]))
    return index, (key >= 0).long() + (key > 1).long() - 1


def nms(boxes, scores, iou_threshold, most, block=1024):
    """Exact greedy non-maximum suppression: boxes (n, 4), scores (n,) -> indices of the `most` best kept ones, best first.

    A box goes when its IoU with a kept better one is above the threshold. Boxes are taken in blocks of falling score. Within a block
    "kept" is the one fixed point of "no kept better box suppresses me", and iterating from all kept reaches it: after i rounds the
    first i boxes are settled.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, kept = boxes[order], []
    for part in torch.arange(len(boxes), device=boxes.device).split(block):
        if sum(map(len, kept)) >= most:
            break
        if kept:
            part = part[~(box_iou(boxes[part], boxes[torch.cat(kept)]) > iou_threshold).any(1)]
        over = (box_iou(boxes[part], boxes[part]) > iou_threshold).triu(1).to(boxes.dtype)      # (better, worse)
        keep, settled = torch.ones_like(part, dtype=boxes.dtype), False
        while not settled:
            new = (keep @ over == 0).to(boxes.dtype)
            settled, keep = bool((new == keep).all()), new
        kept.append(part[keep > 0])
    return order[torch.cat(kept)[:most]] if kept else order


def nms_by_class(boxes, scores, labels, iou_threshold, most):
    """`nms` inside each class: classes are moved apart, in float64 so that no IoU changes."""
    apart = boxes.double() + (labels * (boxes.max() + 1 if len(boxes) else 1))[:, None]
    return nms(apart, scores, iou_threshold, most)


def anchor_boxes(base, sizes, strides):
    """Anchors of all levels, (A, 4): base (levels, a, 4) around the origin; sizes, (h, w) of the levels' maps; rows, columns, anchors."""
    levels = []
    for around, (h, w), stride in zip(base, sizes, strides):
        y, x = (torch.arange(side, device=base.device) * stride for side in (h, w))
        corner = torch.stack([x.expand(h, w), y[:, None].expand(h, w)] * 2, -1)         # (h, w, 4)
        levels.append((corner[:, :, None] + around).flatten(0, 2))
    return torch.cat(levels)


def base_anchors(strides, scales, ratios=(0.5, 1.0, 2.0)):
    """(levels, ratios * scales, 4): boxes of stride * scale pixels a side around the origin, ratio = height / width."""
    sides = [(stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio))
             for stride in strides for ratio in ratios for scale in scales]
    return torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides]).view(len(strides), -1, 4)


def proposals(scores, deltas, anchors, counts, size, *, per_level, most):
    """Boxes (n, 4), best first, that an RPN proposes for one image of size (H, W).

    Args: scores (A,), any monotone ones; deltas, anchors (A, 4); counts: anchors of each level. The `per_level` best of a level, clipped
    and not empty, go through NMS of their own at an IoU of 0.7; the `most` best of all levels remain.
    """
    kept = []
    for level, (score, delta, anchor) in enumerate(zip(scores.split(counts), deltas.split(counts), anchors.split(counts))):
        score, best = score.topk(min(per_level, len(score)))
        kept.append((clip_boxes(decode(anchor[best], delta[best]), size), score, torch.full_like(best, level)))
    boxes, scores, levels = (torch.cat(parts) for parts in zip(*kept))
    solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, scores, levels = boxes[solid], scores[solid], levels[solid]
    return boxes[nms_by_class(boxes, scores, levels, 0.7, most)]


def refine(boxes, deltas, labels, scores, stds):
    """Boxes (R, 4) moved by a stage's deltas (R, 4 or K * 4) times `stds`, without gradient.

    Of class-specific deltas those of the label (R,) count; where that is K, the background, those of the best class by scores (R, K + 1).
    """
    deltas = deltas.detach().unflatten(1, (-1, 4))
    labels = torch.where(labels < scores.shape[1] - 1, labels, scores[:, :-1].argmax(1)).clamp(max=deltas.shape[1] - 1)
    return decode(boxes, deltas.take_along_dim(labels[:, None, None], 1)[:, 0] * deltas.new_tensor(stds))


# ------------------------------------------------------------------------------------------------- regions of interest
def align_levels(maps, level, rois, output_size, scales, sampling_ratio):
    """`roi_align` of each RoI on its own one, level (R,), of several maps (B, C, H, W) with their scales.

    An output is a weighted sum of pixels, four for each sample. Sums of rows of a table in bags are what an embedding bag computes:
    all maps are the table, no sample is ever stored.
    """
    S, C, device = output_size, maps[0].shape[1], rois.device
    table = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, C) for x in maps]).to(rois.dtype)
    shapes = torch.tensor([(x.shape[3], x.shape[2], x.shape[0]) for x in maps], device=device)          # (levels, 3): W, H, B
    side = shapes[level, :2]                                                            # (R, 2)
    row = (shapes.prod(1).cumsum(0) - shapes.prod(1))[level] + rois[:, 0].long() * side.prod(1)         # where its map begins
    scale = rois.new_tensor(scales)[level, None]
    corner, size = rois[:, 1:3] * scale - 0.5, (rois[:, 3:] - rois[:, 1:3]).clamp(min=0) * scale / S    # of the first bin
    grid = torch.full_like(size, sampling_ratio) if sampling_ratio else size.ceil()     # (R, 2): samples across and down a bin
    count = grid.prod(1).long().repeat_interleave(S * S)                                # of each bin
    bag = torch.arange(len(count), device=device).repeat_interleave(count)              # (T,): the bin of each sample
    place, roi = torch.arange(len(bag), device=device) - (count.cumsum(0) - count)[bag], bag // S ** 2
    across, down = grid[roi].unbind(1)
    cell = torch.stack([bag % S + (place % across + 0.5) / across, bag // S % S + (place // across + 0.5) / down], 1)
    point, side = corner[roi] + cell * size[roi], side[roi]                             # each (T, 2)
    inside = ((point >= -1) & (point <= side)).all(1)
    point = torch.minimum(point.clamp(min=0), side - 1)
    low, part = point.long(), point.frac()
    (x, y), (x1, y1) = low.unbind(1), torch.minimum(low + 1, side - 1).unbind(1)
    pixel = row[roi, None] + torch.stack([y * side[:, 0] + x, y * side[:, 0] + x1, y1 * side[:, 0] + x, y1 * side[:, 0] + x1], 1)
    (u, v), share = part.unbind(1), inside / (across * down)
    weight = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v], 1) * share[:, None]      # (T, 4)
    bins = F.embedding_bag(pixel.flatten(), table, 4 * (count.cumsum(0) - count), mode="sum", per_sample_weights=weight.flatten())
    return bins.view(-1, S, S, C).permute(0, 3, 1, 2)


def roi_align(features, rois, output_size, spatial_scale, sampling_ratio):
    """RoIAlign (arXiv 1703.06870), shifted by half a pixel ("aligned"): mean of bilinear samples in S x S equal bins of each RoI.

    Args: features (B, C, H, W); rois (R, 5): number of the image, x1, y1, x2, y2 in its pixels; output_size: S; spatial_scale: map over
    image; sampling_ratio: samples of a bin along each axis, 0 for as many as it has pixels, rounded up.
    Returns: (R, C, S, S). Samples more than a pixel outside count as 0, those on the border take the border's value.
    """
    return align_levels([features], torch.zeros_like(rois[:, 0], dtype=torch.long), rois, output_size, [spatial_scale], sampling_ratio)


def pool_rois(maps, rois, output_size, strides):
    """`roi_align` of RoIs (R, 5) on the pyramid's map of their size: from 112 pixels a side on the second one, from 224 on the third."""
    sides = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).prod(1).sqrt()
    level = (sides / 56 + 1e-6).log2().floor().clamp(0, len(maps) - 1).long()
    return align_levels(maps, level, rois, output_size, [1 / stride for stride in strides], 0)


def axis_weights(low, high, bins, length):
    """RoIAlign along one axis as a matrix (R, bins, length), adaptive samples, of intervals low, high (R,) on `length` pixels."""
    size = (high - low) / bins
    grid = size.ceil()[:, None, None]                                                   # samples of a bin
    i = torch.arange(int(grid.max()), device=low.device)
    point = low[:, None, None] - 0.5 + (torch.arange(bins, device=low.device)[:, None] + (i + 0.5) / grid) * size[:, None, None]
    share = ((i < grid) & (point >= -1) & (point <= length)) / grid.clamp(min=1)        # (R, bins, samples)
    point = point.clamp(0, length - 1)
    pixel, part = point.long(), point.frac()
    weights = low.new_zeros(len(low), bins, length).scatter_add_(2, pixel, (1 - part) * share)
    return weights.scatter_add_(2, (pixel + 1).clamp(max=length - 1), part * share)


@torch.no_grad()
def mask_targets(masks, boxes, index, side):
    """What mask heads should say of boxes (R, 4), each with the bitmap index (R,) of masks (G, H, W): bool (R, side, side).

    RoIAlign of the bitmap by the box clipped to it, at least 1/2. Its two axes are two matrix products, since large
    boxes hold too many samples to list; a few boxes at a time, since each takes a float copy of its bitmap.
    """
    if not len(boxes):
        return masks.new_zeros(0, side, side, dtype=torch.bool)
    boxes = clip_boxes(boxes, masks.shape[1:])
    across, down = (axis_weights(boxes[:, i], boxes[:, i + 2], side, masks.shape[2 - i]) for i in (0, 1))
    with torch.autocast(masks.device.type, enabled=False):
        parts = [y @ masks[i].to(boxes.dtype) @ x.mT >= 0.5 for x, y, i in zip(across.split(32), down.split(32), index.split(32))]
    return torch.cat(parts)


def paste_masks(probabilities, boxes, size):
    """Masks (n, S, S) of boxes (n, 4) on an image of size (H, W): (n, H, W), bilinear at the middles of its pixels, 0 outside."""
    def tents(low, high, length):
        """(n, length, S): the weights of a box's S cells in each pixel."""
        S = probabilities.shape[2]
        point = (torch.arange(length, device=low.device) + 0.5 - low[:, None]) / (high - low).clamp(min=1e-6)[:, None] * S - 0.5
        return (1 - (point[..., None] - torch.arange(S, device=low.device)).abs()).clamp(min=0)
    (x1, y1, x2, y2), (H, W) = boxes.unbind(1), size
    return tents(y1, y2, H) @ probabilities @ tents(x1, x2, W).mT


# ----------------------------------------------------------------------------------------------------- necks and heads
class Backbone(nn.Module):
    """A classification model without its classifier: images (B, 3, H, W) -> the maps of `levels` (0 to 3), finest first.

    SecViT, SEC-* and STViT, which end their stages without one, get a LayerNorm on each map. `frozen_bn` keeps the statistics of
    its BatchNorms fixed.
    """

    def __init__(self, name, levels, frozen_bn, **overrides):
        super().__init__()
        self.net, self.levels, self.frozen_bn = MODELS[name](**overrides), levels, frozen_bn
        self.net.head = nn.Identity()
        self.channels = [self.net.channels[i] for i in levels]
        fresh = hasattr(self.net, "proj")
        if fresh:
            self.net.proj = nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if fresh else nn.Identity() for dim in self.channels)

    def forward(self, images):
        maps = self.net.forward_features(images)
        return [norm(maps[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for i, norm in zip(self.levels, self.norms)]

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.frozen_bn:
                module.eval()
        return self


def conv_norm(in_dim, dim, kernel_size):
    """Convolution without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(in_dim, dim, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU(inplace=True))


def resize(x, size):
    """Bilinear, corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def init_head(module):
    """Kaiming normal (fan-out) for convolutions before a norm; classifiers and necks are initialised by those who own them."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_classifier(conv, std=0.01, bias=0.0):
    """Normal weights of a small deviation, one bias, for an output layer."""
    nn.init.normal_(conv.weight, std=std)
    nn.init.constant_(conv.bias, bias)


class FPN(nn.Module):
    """Feature pyramid (arXiv 1612.03144): maps, finest first -> as many of 256 channels, plus two coarser ones if `extra`.

    The extra levels are strided convolutions on the coarsest input, as RetinaNet has them here, without ReLU between.
    """

    def __init__(self, channels, extra=False, dim=256):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.extra = nn.ModuleList(nn.Conv2d(c, dim, 3, stride=2, padding=1) for c in (channels[-1], dim)[:2 * extra])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps):
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        for i in range(len(maps) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:], mode="nearest")
        outputs, x = [output(x) for output, x in zip(self.outputs, laterals)], maps[-1]
        for layer in self.extra:
            x = layer(x)
            outputs.append(x)
        return outputs


class SemanticFPN(nn.Module):
    """Semantic FPN (arXiv 1901.02446): images -> logits (B, K, H/4, W/4)."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.neck = backbone, FPN(backbone.channels)
        self.scales = nn.ModuleList(
            nn.ModuleList(conv_norm(128 if j else 256, 128, 3) for j in range(max(1, i))) for i in range(4))
        self.scales.apply(init_head)
        self.dropout, self.classifier = nn.Dropout2d(0.1), nn.Conv2d(128, classes, 1)
        init_classifier(self.classifier)

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        total = 0
        for i, (x, units) in enumerate(zip(maps, self.scales)):
            for unit in units:
                x = unit(x)
                if i:
                    x = resize(x, [2 * side for side in x.shape[2:]])
            total = total + (resize(x, maps[0].shape[2:]) if i else x)                  # ceil'd odd sides overshoot
        return self.classifier(self.dropout(total))


class UPerNet(nn.Module):
    """UPerNet with an auxiliary FCN head (arXiv 1807.10221): images -> logits (B, K, H/4, W/4).

    In train mode also the auxiliary logits (B, K, H/16, W/16).
    """

    def __init__(self, backbone, classes, dim=512):
        super().__init__()
        self.backbone, *_, coarsest = backbone, *backbone.channels
        self.pools = nn.ModuleList(conv_norm(coarsest, dim, 1) for _ in (1, 2, 3, 6))
        self.bottleneck = conv_norm(coarsest + 4 * dim, dim, 3)
        self.laterals = nn.ModuleList(conv_norm(c, dim, 1) for c in backbone.channels[:3])
        self.outputs = nn.ModuleList(conv_norm(dim, dim, 3) for _ in range(3))
        self.fusion = conv_norm(4 * dim, dim, 3)
        self.auxiliary = conv_norm(backbone.channels[2], 256, 3)
        for head in (self.pools, self.bottleneck, self.laterals, self.outputs, self.fusion, self.auxiliary):
            head.apply(init_head)
        self.dropout, self.classifier, self.auxiliary_classifier = nn.Dropout2d(0.1), nn.Conv2d(dim, classes, 1), nn.Conv2d(256, classes, 1)
        init_classifier(self.classifier)
        init_classifier(self.auxiliary_classifier)

    def forward(self, images):
        maps = self.backbone(images)
        pooled = [resize(conv(F.adaptive_avg_pool2d(maps[3], side)), maps[3].shape[2:]) for conv, side in zip(self.pools, (1, 2, 3, 6))]
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps)] + [self.bottleneck(torch.cat([maps[3], *pooled], 1))]
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + resize(laterals[i + 1], laterals[i].shape[2:])
        outputs = [output(x) for output, x in zip(self.outputs, laterals)] + laterals[3:]
        fused = self.fusion(torch.cat([resize(x, laterals[0].shape[2:]) for x in outputs], 1))
        logits = self.classifier(self.dropout(fused))
        if not self.training:
            return logits
        return logits, self.auxiliary_classifier(self.dropout(self.auxiliary(maps[2])))


class RetinaNet(nn.Module):
    """RetinaNet (arXiv 1708.02002): images -> class logits (B, A, K), deltas (B, A, 4), level sizes [(h, w)]."""

    strides = (8, 16, 32, 64, 128)

    def __init__(self, backbone, classes, dim=256):
        super().__init__()
        self.backbone, self.neck, self.classes = backbone, FPN(backbone.channels, extra=True), classes
        self.register_buffer("base", base_anchors(self.strides, [4 * 2 ** (i / 3) for i in range(3)]), persistent=False)
        a = self.base.shape[1]

        def tower(out_dim, bias):
            layers = [layer for _ in range(4) for layer in (nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(inplace=True))]
            layers.append(nn.Conv2d(dim, out_dim, 3, padding=1))
            for conv in layers[::2]:
                init_classifier(conv, bias=bias if conv is layers[-1] else 0.0)
            return nn.Sequential(*layers)
        self.classifier = tower(a * classes, -math.log(99))                             # a probability of 0.01
        self.regressor = tower(a * 4, 0.0)

    def forward(self, images):
        maps = self.neck(self.backbone(images))
        logits, deltas = ([tower(x).permute(0, 2, 3, 1).reshape(len(x), -1, width) for x in maps]
                          for tower, width in ((self.classifier, self.classes), (self.regressor, 4)))
        return torch.cat(logits, 1), torch.cat(deltas, 1), [tuple(x.shape[2:]) for x in maps]

    def objects(self, images, sizes):
        """Boxes (n, 4), scores (n,), labels (n,) of a batch of one image, best first."""
        logits, deltas, levels = self(images)
        return retinanet_objects(logits[0].float(), deltas[0].float(), levels, sizes[0], self.base, self.strides)


class RPN(nn.Module):
    """Region proposal network (arXiv 1506.01497): maps of 256 channels -> scores (B, A), deltas (B, A, 4), level sizes [(h, w)]."""

    def __init__(self, anchors, dim=256):
        super().__init__()
        self.conv, self.scores, self.deltas = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, anchors, 1), nn.Conv2d(dim, 4 * anchors, 1)
        for conv in (self.conv, self.scores, self.deltas):
            init_classifier(conv)

    def forward(self, maps):
        hidden = [F.relu(self.conv(x)) for x in maps]
        scores = torch.cat([self.scores(x).permute(0, 2, 3, 1).flatten(1) for x in hidden], 1)
        deltas = torch.cat([self.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in hidden], 1)
        return scores, deltas, [tuple(x.shape[2:]) for x in maps]


class BoxHead(nn.Module):
    """Pooled RoIs (R, 256, 7, 7) -> class logits (R, K + 1), background last, and deltas (R, 4 or K * 4).

    kind: two linear layers ("2fc"), or four convolutions with BatchNorm and one linear layer ("4conv1fc").
    """

    def __init__(self, classes, kind, class_specific, dim=256, hidden=1024):
        super().__init__()
        convs = 4 if kind == "4conv1fc" else 0
        self.convs = nn.Sequential(*(conv_norm(dim, dim, 3) for _ in range(convs)))
        self.convs.apply(init_head)
        widths = [dim * 7 ** 2, hidden] + [hidden] * (not convs)
        self.linears = nn.Sequential(*(layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.ReLU(inplace=True))))
        for linear in self.linears[::2]:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.classifier, self.regressor = nn.Linear(hidden, classes + 1), nn.Linear(hidden, 4 * classes if class_specific else 4)
        init_classifier(self.classifier)
        init_classifier(self.regressor, std=0.001)

    def forward(self, pooled):
        x = self.linears(self.convs(pooled).flatten(1))
        return self.classifier(x), self.regressor(x)


def mask_head(classes, dim=256):
    """Pooled RoIs (R, 256, 14, 14) -> mask logits of every class (R, K, 28, 28)."""
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(inplace=True))]
    layers += [nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.ReLU(inplace=True), nn.Conv2d(dim, classes, 1)]
    for conv in layers[::2]:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)
    return nn.Sequential(*layers)


class MaskRCNN(nn.Module):
    """Mask R-CNN (arXiv 1703.06870) or, with `cascade`, Cascade Mask R-CNN (arXiv 1712.00726).

    Train mode: images (B, 3, H, W), sizes (B, 2), boxes (B, G, 4), labels (B, G) padded with -1, masks (objects of all images, H, W)
    -> the loss. Eval mode: images, sizes -> for each image boxes (n, 4), scores (n,), labels (n,), mask probabilities (n, 28, 28).
    box_head: "2fc" or "4conv1fc". The cascade's published figures belong to the latter, which regresses for each class, by GIoU; its
    "2fc" regresses for all classes at once. samples: RoIs of an image that are trained on.
    """

    strides = (4, 8, 16, 32, 64)
    stages = ((0.5, (0.1, 0.1, 0.2, 0.2), 1.0),         # IoU of a positive, unit of the deltas, weight of the losses
              (0.6, (0.05, 0.05, 0.1, 0.1), 0.5), (0.7, (0.033, 0.033, 0.067, 0.067), 0.25))

    def __init__(self, backbone, classes, cascade=False, box_head="2fc", samples=512):
        super().__init__()
        if box_head not in ("2fc", "4conv1fc"):
            raise ValueError(f"unknown box_head {box_head!r}, expected '2fc' or '4conv1fc'")
        self.backbone, self.neck, self.classes, self.cascade, self.samples = backbone, FPN(backbone.channels), classes, cascade, samples
        self.stages = self.stages if cascade else self.stages[:1]
        self.beta = None if box_head == "4conv1fc" else 1.0 if cascade else 0.0         # of `box_loss`
        self.register_buffer("base", base_anchors(self.strides, [8]), persistent=False)
        self.rpn = RPN(self.base.shape[1])
        self.box_heads = nn.ModuleList(BoxHead(classes, box_head, not cascade or box_head == "4conv1fc") for _ in self.stages)
        self.mask_heads = nn.ModuleList(mask_head(classes) for _ in self.stages)

    def forward(self, images, sizes, boxes=None, labels=None, masks=None):
        maps = self.neck(self.backbone(images))
        scores, deltas, levels = self.rpn([*maps, F.max_pool2d(maps[-1], 1, stride=2)])
        scores, deltas = scores.float(), deltas.float()
        anchors = anchor_boxes(self.base, levels, self.strides)
        counts = [h * w * self.base.shape[1] for h, w in levels]
        limits = dict(per_level=2000, most=2000 if self.cascade else 1000) if self.training else dict(per_level=1000, most=1000)
        with torch.no_grad():
            found = [proposals(*one, anchors, counts, size, **limits) for *one, size in zip(scores, deltas, sizes.tolist())]
        if not self.training:
            return [self.find(maps, i, *one) for i, one in enumerate(zip(found, sizes))]
        there = cells_inside(levels, self.strides, sizes, self.base.shape[1])
        if self.cascade:                                                                # no anchor touches the end of its image
            there = there & ((anchors[:, :2] >= 0) & (anchors[:, 2:] < sizes.flip(1)[:, None])).all(2)
        loss = rpn_loss(scores, deltas, anchors, there, boxes, labels, beta=1 / 9 if self.cascade else 0)
        return loss + self.train_heads(maps, found, sizes, boxes, labels, masks)

    def objects(self, images, sizes):
        """Boxes (n, 4), scores (n,), labels (n,), mask probabilities (n, 28, 28) of a batch of one image, best first."""
        return self(images, sizes)[0]

    def train_heads(self, maps, found, sizes, boxes, labels, masks):
        """The losses of all stages; each one's boxes are the next one's proposals.

        Args: maps: of the neck; found: proposals (n, 4) of each image; the others as in `forward`.
        """
        G, numbers = boxes.shape[1], torch.arange(boxes.shape[1], device=boxes.device)
        first = (labels >= 0).sum(1).cumsum(0) - (labels >= 0).sum(1)                   # number of an image's first mask
        candidates = nn.utils.rnn.pad_sequence([*found, boxes[0, :1]], batch_first=True)[:-1]               # (B, P, 4), P > 0
        there = torch.arange(candidates.shape[1], device=boxes.device) < torch.tensor([[len(x)] for x in found], device=boxes.device)
        total = 0
        for stage, (box_head, mask_head) in enumerate(zip(self.box_heads, self.mask_heads), 1):
            iou, stds, weight = self.stages[stage - 1]
            with torch.no_grad():
                index = assign(boxes, labels, candidates, there, positive=iou, negative=iou, least=2.0 if self.cascade else iou)
                index = torch.cat([torch.where(labels >= 0, numbers, -2), index], 1)    # objects are proposals, too
                candidates = torch.cat([boxes, candidates], 1)
                pick, role = sample(index >= 0, index == -1, self.samples, self.samples // 4)           # (B, n)
                candidates, index = candidates.take_along_dim(pick[..., None], 1), index.gather(1, pick)
                image, place = (role >= 0).nonzero().unbind(1)                          # each (R,)
                role, index = role[image, place], index[image, place].clamp(min=0)
                label = labels[image, index].masked_fill(role == 0, self.classes)
                rois = torch.cat([image[:, None], candidates[image, place]], 1)         # (R, 5)
                positive = role.nonzero()[:, 0]
                target = mask_targets(masks, rois[positive, 1:], (first[image] + index)[positive], 28)
            logits, deltas = (x.float() for x in box_head(pool_rois(maps, rois, 7, self.strides)))
            mask_logits = mask_head(pool_rois(maps, rois[positive], 14, self.strides)).float()              # (positives, K, 28, 28)
            mask_logits = mask_logits.take_along_dim(label[positive, None, None, None], 1)[:, 0]
            mask_loss = F.binary_cross_entropy_with_logits(mask_logits, target.float(), reduction="sum") / max(target.numel(), 1)
            total = total + weight * (box_loss(logits, deltas, rois[:, 1:], label, boxes[image, index], stds, self.beta) + mask_loss)
            if stage < len(self.stages):
                refined = clip_boxes(refine(rois[:, 1:], deltas, label, logits, stds), sizes[image])
                candidates = candidates.index_put((image, place), refined)
                kept = (pick[image, place] >= G) & refined.isfinite().all(1)            # not the objects; what diverged has no place
                there = torch.zeros_like(pick, dtype=torch.bool).index_put((image, place), kept)
        return total

    def find(self, maps, image, boxes, size):
        """Objects as of `forward` of one image of a batch: maps of all, its number, its proposals (n, 4), its size (2,)."""
        def pool(boxes, side):
            return pool_rois(maps, F.pad(boxes, (1, 0), value=image), side, self.strides)
        background, total = torch.full_like(boxes[:, 0], self.classes, dtype=torch.long), 0
        for (_, stds, _), head in zip(self.stages, self.box_heads):
            start = boxes
            logits, deltas = (x.float() for x in head(pool(start, 7)))
            total, boxes = total + logits, clip_boxes(refine(start, deltas, background, logits, stds), size)
        moved = decode(start[:, None], deltas.unflatten(1, (-1, 4)) * deltas.new_tensor(stds))          # (n, K or 1, 4)
        boxes, scores, labels = best_pairs(clip_boxes(moved, size), (total / len(self.stages)).softmax(1)[:, :-1])
        pooled = pool(boxes, 14)
        masks = torch.stack([head(pooled).float().sigmoid() for head in self.mask_heads]).mean(0)
        return boxes, scores, labels, masks.take_along_dim(labels[:, None, None, None], 1)[:, 0]


class SimpleBaseline(nn.Module):
    """Three deconvolutions on the coarsest map (arXiv 1804.06208): images -> heat maps (B, K, H/4, W/4)."""

    def __init__(self, backbone, classes, dim=256):
        super().__init__()
        self.backbone = backbone
        self.deconvs = nn.Sequential(*(
            nn.Sequential(nn.ConvTranspose2d(c, dim, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True))
            for c in (*backbone.channels, dim, dim)))
        self.classifier = nn.Conv2d(dim, classes, 1)
        for deconv, *_ in self.deconvs:
            nn.init.normal_(deconv.weight, std=0.001)
        init_classifier(self.classifier, std=0.001)

    def forward(self, images):
        return self.classifier(self.deconvs(self.backbone(images)[0]))


ARCHITECTURES = {
    "semfpn": (SemanticFPN, (0, 1, 2, 3)), "upernet": (UPerNet, (0, 1, 2, 3)), "retinanet": (RetinaNet, (1, 2, 3)),
    "mask_rcnn": (MaskRCNN, (0, 1, 2, 3)), "cascade_mask_rcnn": (partial(MaskRCNN, cascade=True, box_head="4conv1fc"), (0, 1, 2, 3)),
    "pose": (SimpleBaseline, (3,)),
}


def build_model(task, backbone, num_classes, frozen_bn=True, options=None, **overrides):
    """The model of a task around a backbone named as in train_imagenet.py.

    options: arguments of the task's own class, such as {"box_head": "2fc"}; `overrides` go to the backbone's factory.
    """
    architecture, levels = ARCHITECTURES[task]
    return architecture(Backbone(backbone, levels, frozen_bn, **overrides), num_classes, **(options or {}))


def load_backbone(backbone, args):
    """Load --backbone-weights, averaged ones if the file has them, into a Backbone.

    Returns: what the file holds and a backbone does not need. Raises: InputError if the weights are another model's.
    """
    whole = MODELS[args.backbone](**({"released": True} if args.released else {}))
    state = train_imagenet.read_checkpoint(args.backbone_weights)
    train_imagenet.load_weights(whole, state, "ema" if state.get("ema") else "model")
    state, own = whole.state_dict(), backbone.net.state_dict()
    backbone.net.load_state_dict({name: state[name] for name in own})
    return sorted({name.split(".")[0] for name in state.keys() - own.keys()})


# -------------------------------------------------------------------------------------------------------------- losses
def segmentation_loss(outputs, labels):
    """Cross-entropy of logits resized to the label maps (B, H, W); the auxiliary head's counts 0.4.

    The mean is over all pixels: those of label 255 add 0 to the sum and still count in the divisor, as in mmsegmentation.
    """
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [F.cross_entropy(resize(logits.float(), labels.shape[1:]).permute(0, 2, 3, 1).flatten(0, 2), labels.flatten().long(),
                              ignore_index=IGNORED, reduction="sum") for logits in outputs]    # flat: the 2-D kernel is not deterministic
    return sum(weight * loss for weight, loss in zip((1.0, 0.4), losses)) / labels.numel()


def focal_loss(logits, targets, gamma=2.0, alpha=0.25):
    """Sigmoid focal loss (arXiv 1708.02002, Eq. 5), element by element; targets are 0 or 1."""
    p, targets = logits.sigmoid(), targets.to(logits.dtype)
    missed = p + targets - 2 * p * targets                                              # 1 - p where the target is 1, else p
    weight = (1 - alpha + (2 * alpha - 1) * targets) * missed ** gamma
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def retinanet_loss(outputs, boxes, labels, sizes, base, strides):
    """Focal loss of all anchors plus L1 loss of the positive ones' deltas, over the number of positives.

    Args: the model's outputs; boxes (B, G, 4), labels (B, G), -1 where padded; sizes (B, 2), h and w of each image; base anchors.
    An image without positives counts as one in the divisor. Nothing here waits for the device.
    """
    logits, deltas, levels = outputs
    logits, deltas = logits.float(), deltas.float()
    anchors = anchor_boxes(base, levels, strides)                                       # (A, 4)
    there = cells_inside(levels, strides, sizes, base.shape[1])                         # (B, A)
    index = assign(boxes, labels, anchors, there, positive=0.5, negative=0.4, least=0.0)
    positive = index >= 0
    matched = index.clamp(min=0)
    target = labels.gather(1, matched).masked_fill(~positive, -1)                       # (B, A)
    hit = target[..., None] == torch.arange(logits.shape[2], device=logits.device)
    classification = (focal_loss(logits, hit) * (index != -2)[..., None]).sum()
    box = boxes.gather(1, matched[..., None].expand(-1, -1, 4))
    box = torch.where(positive[..., None], box, anchors)                                # no logarithm of a padded box
    regression = ((deltas - encode(anchors, box)).abs() * positive[..., None]).sum()
    return (classification + regression) / positive.sum(1).clamp(min=1).sum()


def rpn_loss(scores, deltas, anchors, there, boxes, labels, *, beta):
    """Binary cross-entropy and smooth L1 loss (L1 if beta is 0) of 256 anchors of each image, over their number.

    Args: scores (B, A), deltas (B, A, 4), anchors (A, 4), there (B, A): those that count; boxes (B, G, 4), labels (B, G), -1 where padded.
    """
    index = assign(boxes, labels, anchors, there, positive=0.7, negative=0.3, least=0.3)                # (B, A)
    pick, role = sample(index >= 0, index == -1, 256, 128)                              # (B, 256)
    positive, start = role > 0, anchors[pick]
    box = boxes.take_along_dim(index.gather(1, pick).clamp(min=0)[..., None], 1)
    box = torch.where(positive[..., None], box, start)                                  # no logarithm of a padded box
    classification = F.binary_cross_entropy_with_logits(scores.gather(1, pick), positive.to(scores.dtype), reduction="none")
    regression = F.smooth_l1_loss(deltas.take_along_dim(pick[..., None], 1), encode(start, box), reduction="none", beta=beta)
    total = (classification * (role >= 0)).sum() + (regression * positive[..., None]).sum()
    return total / (role >= 0).sum().clamp(min=1)


def giou_loss(boxes, targets):
    """1 - generalized IoU (arXiv 1902.09630) of boxes (R, 4) with one target (R, 4) each: (R,), from 0 to 2."""
    low, high = torch.maximum(boxes[:, :2], targets[:, :2]), torch.minimum(boxes[:, 2:], targets[:, 2:])
    span = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    around, inter, own, other = (                           # the gradient of prod() would wait for the device
        size[:, 0] * size[:, 1] for size in (span, (high - low).clamp(min=0), boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]))
    around, union = around.clamp(min=1e-6), (own + other - inter).clamp(min=1e-6)
    return 1 - inter / union + (around - union) / around


def box_loss(logits, deltas, rois, labels, boxes, stds, beta):
    """Loss of one stage's sampled RoIs (R, 4): cross-entropy and, of those with an object, that of the deltas.

    Args: logits (R, K + 1), deltas (R, 4 or K * 4), labels (R,), K where background, boxes (R, 4) of the objects. Both are divided by R.
    beta: of smooth L1 on the deltas, 0 for L1, None for ten times the GIoU loss of the moved boxes.
    """
    positive = (labels < logits.shape[1] - 1).nonzero()[:, 0]
    start, target, label, deltas = rois[positive], boxes[positive], labels[positive], deltas[positive].unflatten(1, (-1, 4))
    deltas = deltas.take_along_dim(label.clamp(max=deltas.shape[1] - 1)[:, None, None], 1)[:, 0]
    unit = deltas.new_tensor(stds)
    if beta is None:
        regression = 10 * giou_loss(decode(start, deltas * unit), target).sum()
    else:
        regression = F.smooth_l1_loss(deltas, encode(start, target) / unit, reduction="sum", beta=beta)
    return (F.cross_entropy(logits, labels, reduction="sum") + regression) / max(len(labels), 1)


def cells_inside(levels, strides, sizes, anchors):
    """(B, A): whether an anchor's cell lies on its image, padded to a multiple of 32."""
    padded = (sizes + 31) // 32 * 32                                                    # (B, 2)
    inside = []
    for (h, w), stride in zip(levels, strides):
        rows, columns = (-(-padded[:, i] // stride) for i in (0, 1))
        row, column = (torch.arange(side, device=sizes.device) for side in (h, w))
        cells = (row[:, None] < rows[:, None, None]) & (column < columns[:, None, None])                    # (B, h, w)
        inside.append(cells.flatten(1).repeat_interleave(anchors, 1))
    return torch.cat(inside, 1)


def gaussian_maps(points, size, stride=4, sigma=2.0, reach=6):
    """Target heat maps (B, K, h, w) of peak 1 in windows of 2 reach + 1 pixels, and weights (B, K), of points (B, K, 3) in the crop.

    A weight is 1 if the point is labelled and its window is not wholly outside; the maps of others are 0.
    """
    mean = (points[..., :2] / stride + 0.5).trunc()                                          # as int() does, towards 0
    weight = points[..., 2] > 0
    lines = []
    for side, at in zip(size, mean.flip(-1).unbind(-1)):
        distance = torch.arange(side, device=points.device) - at[..., None]             # (B, K, side)
        lines.append((-distance ** 2 / (2 * sigma ** 2)).exp() * (distance.abs() <= reach))
        weight = weight & (at >= -reach) & (at < side + reach)
    weight = weight.to(points.dtype)
    return weight[..., None, None] * lines[0][..., None] * lines[1][..., None, :], weight


def pose_loss(heat_maps, points):
    """Squared error of heat maps (B, K, h, w), mean over all pixels; points (B, K, 3) in the crop, those without weight add 0."""
    target, weight = gaussian_maps(points, heat_maps.shape[2:])
    return F.mse_loss(heat_maps.float() * weight[..., None, None], target)


# ----------------------------------------------------------------------------------------------------------- inference
@torch.no_grad()
def segment(model, image, args, device):
    """Class of every pixel of a PIL image, uint8 (H, W): the whole image at once, or the mean over scales and mirrorings.

    Logits are resized to the network's input, then to the image.
    """
    total = 0
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if args.ms_test else (1.0,):
        W, H = fit(image.size, int(4 * args.img_size * ratio), int(args.img_size * ratio))
        resized = np.array(image.resize((max(W, 32), max(H, 32)), Image.Resampling.BILINEAR))
        x = normalize(torch.from_numpy(resized)[None].to(device))                       # (1, 3, H, W)
        for mirrored in (False, True)[:1 + args.ms_test]:
            with autocast(args, device):
                logits = model(x.flip(3) if mirrored else x)
            logits = resize(resize(logits.float(), x.shape[2:]), (image.height, image.width))
            if args.ms_test:                                                            # one map needs no softmax for its largest
                total += (logits.flip(3) if mirrored else logits).softmax(1)
            else:
                total = logits
    return total[0].argmax(0).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def detect(model, image, args, device):
    """Objects of a PIL image: boxes (n, 4) in its pixels, scores (n,), labels (n,), best first.

    Mask R-CNN's also have masks (n, H, W) bool.
    """
    W, H = fit(image.size, args.img_size * 1333 / 800, args.img_size)
    batch, sizes = (t.to(device) for t in pad_images([np.asarray(image.resize((W, H), Image.Resampling.BILINEAR))], 32))
    with autocast(args, device):
        boxes, scores, labels, *masks = model.objects(normalize_padded(batch, sizes), sizes)
    boxes = boxes / boxes.new_tensor([W / image.width, H / image.height] * 2)
    few = max(1, 2 ** 24 // (image.width * image.height))                               # are pasted at once
    masks = [torch.cat([paste_masks(*part, image.size[::-1]) >= 0.5 for part in zip(mask.split(few), boxes.split(few))]) for mask in masks]
    return tuple(t.cpu().numpy() for t in (boxes, scores, labels, *masks))


def retinanet_objects(logits, deltas, levels, size, base, strides, *, candidates=1000, least=0.05, most=100):
    """Post-processing of one image: logits (A, K), deltas (A, 4) -> boxes (n, 4), scores (n,), labels (n,), best first.

    The `best_pairs` of the `candidates` anchors of largest score in each level.
    """
    anchors, counts = anchor_boxes(base, levels, strides), [h * w * base.shape[1] for h, w in levels]
    kept = []
    for scores, delta, anchor in zip(logits.sigmoid().split(counts), deltas.split(counts), anchors.split(counts)):
        best = scores.amax(1).topk(min(candidates, len(scores))).indices
        kept.append((clip_boxes(decode(anchor[best], delta[best]), size), scores[best]))
    boxes, scores = (torch.cat(parts) for parts in zip(*kept))
    return best_pairs(boxes[:, None], scores, least, most)


def best_pairs(boxes, scores, least=0.05, most=100):
    """Objects of one image: boxes (n, K or 1, 4), scores (n, K) -> boxes (m, 4), scores (m,), labels (m,), best first.

    All pairs of box and class above `least`, NMS in each class at an IoU of 0.5, the `most` best.
    """
    row, label = (scores > least).nonzero().unbind(1)
    boxes, scores = boxes.expand(-1, scores.shape[1], -1)[row, label], scores[row, label]
    keep = nms_by_class(boxes, scores, label, 0.5, most)
    return boxes[keep], scores[keep], label[keep]


@torch.no_grad()
def estimate_pose(model, image, boxes, args, device):
    """Keypoints of the persons of a PIL image: boxes (P, 5) -> points (n, K, 3) in its pixels, scores (n,), best first.

    Each crop and its mirror image are averaged; a person's score is the box's times the mean confidence of its points
    above 0.2. Persons found twice are left out.
    """
    centres, sizes = crop_frame(boxes[:, :2], boxes[:, 2:4], 1.25)
    flip, nowhere, points = FLIP[:args.keypoints], np.zeros((1, 3)), [np.zeros((0, args.keypoints, 3))]
    for first in range(0, len(boxes), 32):                                              # so many persons at once
        frames = centres[first:first + 32], sizes[first:first + 32]
        crops = np.stack([crop_person(image, nowhere, centre, size, 0.0, args.img_size)[0] for centre, size in zip(*frames)])
        x = normalize(torch.from_numpy(crops).to(device))
        with autocast(args, device):
            maps, mirrored = model(x).float(), model(x.flip(3)).float().flip(3)[:, flip]
        maps = (maps + torch.cat([mirrored[..., :1], mirrored[..., :-1]], 3)) / 2       # mirrored, a map of stride 4 is off by 3/4
        h, w = maps.shape[2:]
        found = peaks(maps).double().cpu().numpy()
        found[..., :2] = (found[..., :2] / (w, h) - 0.5) * frames[1][:, None] + frames[0][:, None]
        points.append(found)
    points = np.concatenate(points)
    sure = points[..., 2] * (points[..., 2] > 0.2)
    scores = boxes[:, 4] * sure.sum(1) / np.maximum((sure > 0).sum(1), 1)
    kept = oks_nms(points, scores, sizes.prod(1), SIGMAS[:args.keypoints])
    return points[kept], scores[kept]


def peaks(maps):
    """Heat maps (B, K, h, w) -> (B, K, 3): x, y of the largest value, a quarter pixel towards its larger neighbours, and the value.

    Where the largest value is not above 0, x and y are -1; next to the border they stay whole.
    """
    B, K, h, w = maps.shape
    value, place = maps.flatten(2).max(2)                                               # (B, K)
    x, y = place % w, place // w
    inner = (x > 1) & (x < w - 1) & (y > 1) & (y < h - 1)
    left, right, up, down = (maps.flatten(2).gather(2, (place + step).clamp(0, h * w - 1)[..., None])[..., 0] for step in (-1, 1, -w, w))
    xy = torch.stack([x, y], -1) + 0.25 * torch.stack([right - left, down - up], -1).sign() * inner[..., None]
    return torch.cat([xy.masked_fill((value <= 0)[..., None], -1), value[..., None]], -1)


def oks_nms(points, scores, areas, sigmas, most=0.9):
    """Greedy suppression of people (P, K, 3): indices, best first, of those whose OKS with no kept better one is above `most`.

    The area (P,) in OKS is the mean of the two, and all points count.
    """
    distance = ((points[:, None, :, :2] - points[:, :, :2]) ** 2).sum(-1)               # (P, P, K)
    area = (areas[:, None] + areas)[..., None] / 2
    similarity, kept = np.exp(-distance / (2 * sigmas) ** 2 / area / 2).mean(-1), []
    for i in np.argsort(-scores, kind="stable"):
        if not (similarity[i, kept] > most).any():
            kept.append(i)
    return np.array(kept, np.int64)


def palette(count):
    """Colours (count, 3) that no two classes share, hues in golden steps."""
    hues = [(255 * i * 0.618034 % 256, 160 + 95 * (i % 2), 255 - 60 * (i % 3)) for i in range(count)]
    return np.array(Image.fromarray(np.array([hues], np.float32).astype(np.uint8), "HSV").convert("RGB"))[0]


def draw_labels(image, labels, names):
    """Overlay of a label map (H, W) with the names of the classes that cover the most, each at its middle."""
    colours = np.vstack([palette(len(names)), np.zeros((256 - len(names), 3), np.uint8)])
    picture = Image.blend(image, Image.fromarray(colours[labels]), 0.5)
    draw = ImageDraw.Draw(picture)
    for label in np.bincount(labels.ravel(), minlength=len(names))[:len(names)].argsort()[::-1][:8]:
        y, x = (labels == label).nonzero()
        if len(y) > labels.size / 200:
            middle = np.hypot(y - y.mean(), x - x.mean()).argmin()                      # a pixel of the class
            draw.text((x[middle], y[middle]), names[label], "white", anchor="mm", stroke_width=1, stroke_fill="black")
    return picture


def draw_objects(image, objects, names, least=0.3):
    """Overlay of the objects, with masks or without, of score `least` or more."""
    picture, colours = image.copy(), palette(len(names))
    draw = ImageDraw.Draw(picture)
    for box, score, label, *masks in reversed(list(zip(*objects))):
        if score >= least:
            colour = tuple(colours[label].tolist())
            for mask in masks:
                picture.paste(colour, mask=Image.fromarray(mask.astype(np.uint8) * 128))
            draw.rectangle(box.tolist(), outline=colour, width=2)
            place, text = (max(box[0], 0), max(box[1], 0)), f"{names[label]} {score:.2f}"
            draw.rectangle(draw.textbbox(place, text), colour)
            draw.text(place, text, "black")
    return picture


def draw_people(image, points, least=0.3):
    """Overlay of people (P, K, 3): lines of body, feet and fingers, dots of the face, where the confidence is `least` or more."""
    picture, thick = image.copy(), max(1, round(max(image.size) / 250))
    draw, colours = ImageDraw.Draw(picture), [tuple(colour) for colour in palette(len(LINES)).tolist()]
    for person in points:
        place, there = [tuple(xy) for xy in person[:, :2].tolist()], person[:, 2] >= least
        for path, colour in zip(LINES, colours):
            for a, b in zip(path, path[1:]):
                if max(a, b) < len(person) and there[a] and there[b]:
                    draw.line((place[a], place[b]), colour, thick if max(a, b) < 23 else max(1, thick // 3))
        for x, y in person[PARTS["face"], :2][there[PARTS["face"]]].round():
            r = thick // 4
            draw.rectangle((x - r, y - r, x + r, y + r), "white")
    return picture


# ------------------------------------------------------------------------------------------------------------- metrics
def count_pixels(prediction, labels, classes):
    """Pixels of each class (3, K) that are right, predicted, true, of label maps (H, W); where the true one is 255 nothing counts."""
    evaluated = labels != IGNORED
    prediction, labels = prediction[evaluated], labels[evaluated]
    return np.stack([np.bincount(x, minlength=256)[:classes] for x in (labels[prediction == labels], prediction, labels)])


def mean_iou(counts):
    """{mIoU, mAcc, aAcc}, fractions, of the `count_pixels` (3, K) of a data set: means over the classes that occur; -1 if none does."""
    right, predicted, true = counts.astype(np.float64)
    union = predicted + true - right
    if not true.any():
        return dict(mIoU=-1.0, mAcc=-1.0, aAcc=-1.0)
    return dict(mIoU=float((right[union > 0] / union[union > 0]).mean()), mAcc=float((right[true > 0] / true[true > 0]).mean()),
                aAcc=float(right.sum() / true.sum()))


# --------------------------------------------------------------------------------------------------------------- masks
# COCO's run-length form: pixels are scanned down each column, columns left to right; runs alternate, unset ones first.


def mask_runs(mask):
    """Boolean mask (H, W) -> run lengths (n,); the first is 0 if the first pixel is set."""
    flips = np.flatnonzero(np.diff(mask.ravel("F"), prepend=False))
    return np.diff(flips, prepend=0, append=mask.size)


def compress_runs(runs):
    """Run lengths -> COCO's string: from the fourth on as difference to the last but one, 5 bits a character, lowest first."""
    values = runs.copy()
    values[3:] -= runs[1:-2]
    groups = values[:, None] >> 5 * np.arange(7)            # (n, 7): 35 bits, more than any image's pixels need
    more = ~np.isin(groups >> 4, (0, -1))                   # what follows is not just the group's sign bit repeated
    written = np.pad(more[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return bytes(((groups & 31) + 32 * more + 48)[written].astype(np.uint8)).decode()


def decompress_runs(text):
    """COCO's string or bytes -> run lengths (n,). Raises: ValueError for a character that is none of its 64, or a cut-off end."""
    codes = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any():
        raise ValueError("RLE string holds a character outside '0' to 'o'")
    last = codes < 32                                       # bit 32: another group of the same value follows
    if not last[-1:].any():
        raise ValueError("RLE string is cut off: its last value is not complete")
    start = np.flatnonzero(np.append(True, last[:-1]))
    length = np.diff(start, append=codes.size)
    if length.max() > 7:
        raise ValueError(f"RLE string holds a value of {length.max()} characters, expected at most 7")
    shift = 5 * (np.arange(codes.size) - start.repeat(length))
    values = np.add.reduceat((codes & 31) << shift, start)
    values -= (codes[last] & 16) << shift[last] + 1         # highest bit set: negative
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()                    # the first value belongs to no chain of differences
    return values


def rle_runs(rle):
    """RLE dict (size [H, W], counts a string, bytes or list) -> run lengths (n,).

    Raises: ValueError if the counts are malformed or do not fill the mask.
    """
    (height, width), counts = rle["size"], rle["counts"]
    runs = decompress_runs(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any():
        raise ValueError("RLE counts must be a list of whole numbers from 0 on")
    if runs.sum() != height * width:
        raise ValueError(f"RLE counts add up to {runs.sum()} pixels, a {height}x{width} mask has {height * width}")
    return runs


def rle_encode(mask):
    """Boolean mask (H, W) -> dict(size=[H, W], counts=compressed string). Raises: ValueError for any other array."""
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"expected a boolean mask (H, W), not {mask.dtype} {mask.shape}")
    return dict(size=list(mask.shape), counts=compress_runs(mask_runs(mask)))


def rle_decode(rle):
    """RLE dict, compressed or not -> boolean mask (H, W). Raises: ValueError if it is malformed."""
    runs, (height, width) = rle_runs(rle), rle["size"]
    return (np.arange(len(runs)) % 2 == 1).repeat(runs).reshape(width, height).T


def polygon_outline(polygon):
    """Polygon (x, y, x, y, ...) in pixels -> points u, v (P,) of its closed outline on a grid 5 times finer, in ring order.

    Each edge steps along its longer axis; the other coordinate is always rounded from the end that is lower on the longer axis.
    """
    points = np.trunc(5 * np.reshape(polygon, (-1, 2)) + 0.5).astype(np.int64)
    edges = np.stack([points, np.roll(points, -1, 0)])                      # (2, E, 2): start and end; edge; x and y
    dx, dy = abs(edges[1] - edges[0]).T
    upright, length = dx < dy, np.maximum(dx, dy)                           # each (E,)
    edges = np.where(upright[:, None], edges[..., ::-1], edges)             # last axis: longer and other coordinate
    back = edges[0, :, 0] > edges[1, :, 0]
    low, high = np.where(back[:, None], edges[::-1], edges)                 # each (E, 2)
    slope = (high - low)[:, 1] / np.maximum(length, 1)
    edge = np.arange(len(points)).repeat(length + 1)                        # (P,): every edge has both its ends
    t = np.arange(len(edge)) - (np.cumsum(length + 1) - length - 1)[edge]
    t = np.where(back[edge], length[edge] - t, t)
    longer, other = low[edge, 0] + t, np.trunc(low[edge, 1] + slope[edge] * t + 0.5).astype(np.int64)
    return np.where(upright[edge], (other, longer), (longer, other))


def polygon_flips(polygon, height, width):
    """Positions in the column-major scan (n,), unsorted, where the outline of a polygon is crossed; those met twice cancel."""
    u, v = polygon_outline(polygon)
    step = np.flatnonzero(np.diff(u)) + 1
    left, top = np.where(u[step] < u[step - 1], u[step], u[step] - 1), np.minimum(v[step], v[step - 1])
    x, y = left // 5, ((top + 2) // 5).clip(0, height)                      # (top + 0.5) / 5 - 0.5, rounded up
    return (x * height + y)[(left % 5 == 2) & (x >= 0) & (x < width)]       # the middle of a pixel: fine column 2 of its 5


def polygons_to_mask(polygons, height, width):
    """COCO polygons, lists (x, y, x, y, ...) in pixels -> union of their rasters (H, W) bool, exactly the one of COCO's tools.

    If the first list holds four numbers, all are boxes (x, y, w, h). Polygons of fewer than 3 points cover nothing. Raises: ValueError
    for an odd length, a number that is not finite, or boxes among polygons.
    """
    if polygons and len(polygons[0]) == 4:
        polygons = [(x, y, x, y + h, x + w, y + h, x + w, y) for x, y, w, h in polygons]
    mask = np.zeros(height * width, bool)
    for polygon in polygons:
        if not np.isfinite(polygon).all():
            raise ValueError(f"polygon {polygon} is not finite")
        flips = np.zeros(height * width + 1, bool)                          # an outline may be crossed behind the last pixel
        np.logical_xor.at(flips, polygon_flips(polygon, height, width), True)
        mask |= np.logical_xor.accumulate(flips)[:-1]
    return mask.reshape(width, height).T


def segmentation_runs(entry, image):
    """Run lengths (n,) of the segmentation, polygons or RLE, of an annotation or result of an image, both COCO dicts.

    Raises: ValueError that names the entry if it is malformed or of another size.
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
        name = f"annotation {entry['id']}" if "id" in entry else "a result"
        raise ValueError(f"image {image['id']}, {name}: segmentation: {type(error).__name__} {error}") from None


# ------------------------------------------------------------------------------------------------------ COCO evaluation
# Every rule and tie as in pycocotools 2.0.11, except for one bug: there an object whose id is 0 never counts as matched. Here
# it does, as in xtcocotools. Letters: D detections, G objects (annotations), A area ranges, T thresholds, K categories.
THRESHOLDS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
AT_50, AT_75 = 0, 5                                                         # places in THRESHOLDS
AREAS = {"": (0, 1e10), "s": (0, 32 ** 2), "m": (32 ** 2, 96 ** 2), "l": (96 ** 2, 1e10)}   # in pixels, both ends inclusive
SETTINGS = {"bbox": ("sml", (1, 10, 100)), "segm": ("sml", (1, 10, 100)), "keypoints": ("ml", (20,))}  # AREAS, detections counted


def crowd_iou(inter, dt_area, gt_area, crowd):
    """Intersections (D, G) and areas (D,), (G,) -> IoU (D, G); of a crowd region (G,) any part may be found: divided by (D,)."""
    union = np.where(crowd, dt_area[:, None], dt_area[:, None] + gt_area - inter)
    return np.divide(inter, union, out=np.zeros(inter.shape), where=inter > 0)


def box_overlaps(dt, gt, crowd):
    """IoU (D, G) of boxes (D, 4), (G, 4) given as x, y, w, h in pixels; crowd (G,) bool."""
    low = np.maximum(dt[:, None, :2], gt[:, :2])
    high = np.minimum(dt[:, None, :2] + dt[:, None, 2:], gt[:, :2] + gt[:, 2:])
    return crowd_iou((high - low).clip(0).prod(-1), dt[:, 2:].prod(-1), gt[:, 2:].prod(-1), crowd)


def runs_area(runs):
    """Set pixels of a mask given by its run lengths."""
    return int(runs[1::2].sum())


def runs_intersection(a, b):
    """Pixels set in both masks of one image, given by their run lengths."""
    set_in_b = (b * (np.arange(len(b)) % 2)).cumsum()                       # up to the end of each run of b
    before = np.interp(a.cumsum(), b.cumsum(), set_in_b)                    # of a: exact, all slopes are 0 or 1
    return np.diff(before)[::2].sum()                                       # what the set runs of a, 1, 3, ..., add


def mask_overlaps(dt, gt, crowd):
    """IoU (D, G) of masks, lists of run lengths; crowd (G,) bool."""
    inter = np.array([[runs_intersection(d, g) for g in gt] for d in dt], float).reshape(len(dt), len(gt))
    return crowd_iou(inter, np.array([runs_area(d) for d in dt]), np.array([runs_area(g) for g in gt]), crowd)


def oks(dt, gt, boxes, areas, sigmas):
    """Object keypoint similarity (D, G) of points dt (D, P, 3), gt (G, P, 3): x, y in pixels, gt's third > 0 if labelled.

    boxes (G, 4) as x, y, w, h, areas (G,) of the objects; sigmas (P,), deviation of each point relative to the object's size.
    Without a labelled point, distance counts from the box enlarged by its size on every side.
    """
    result, variances = np.zeros((len(dt), len(gt))), (2 * np.asarray(sigmas)) ** 2
    for j, (points, box, area) in enumerate(zip(gt, boxes, areas)):
        used = points[:, 2] > 0
        if used.any():
            offset = dt[..., :2] - points[:, :2]                            # (D, P, 2)
        else:
            low, high = box[:2] - box[2:], box[:2] + 2 * box[2:]
            offset = np.maximum(low - dt[..., :2], 0) + np.maximum(dt[..., :2] - high, 0)
            used = ~used
        e = (offset ** 2).sum(-1) / variances / (area + np.spacing(1)) / 2  # (D, P)
        result[:, j] = np.exp(-e[:, used]).mean(-1)
    return result


def overlaps(dt, gt, crowd, kind, image, sigmas):
    """Result and annotation dicts of one image and category -> IoU or OKS (D, G), areas of the detections (D,)."""
    if kind == "bbox":
        dt_boxes, gt_boxes = (np.array([x["bbox"] for x in xs], float).reshape(len(xs), 4) for xs in (dt, gt))
        return box_overlaps(dt_boxes, gt_boxes, crowd), dt_boxes[:, 2:].prod(-1)
    if kind == "segm":
        dt_runs, gt_runs = ([segmentation_runs(x, image) for x in xs] for xs in (dt, gt))
        return mask_overlaps(dt_runs, gt_runs, crowd), np.array([runs_area(runs) for runs in dt_runs])
    dt_points, gt_points = (np.array([x["keypoints"] for x in xs], float).reshape(len(xs), len(sigmas), 3) for xs in (dt, gt))
    extent = np.ptp(dt_points[..., :2], axis=1).prod(-1)
    areas = np.array([d.get("area", e) for d, e in zip(dt, extent)])        # parts of a body are ranked by the whole body's area
    return oks(dt_points, gt_points, np.array([g["bbox"] for g in gt], float), np.array([g["area"] for g in gt]), sigmas), areas


def match_detections(iou, ignored, crowd, gt_area, dt_area, ranges):
    """Greedy matching of one image and category, for all area ranges and thresholds at once.

    iou (D, G), detections by descending score; ignored, crowd (G,) bool; gt_area (G,), dt_area (D,); ranges (A, 2).
    Returns outcome (A, T, D) int8: 1 true positive, 0 false positive, -1 counted as neither; positives (A,): objects to find.
    """
    low, high = np.array(ranges, float).T[..., None]                        # each (A, 1)
    out = ignored | (gt_area < low) | (gt_area > high)                      # (A, G)
    outside = (dt_area < low) | (dt_area > high)                            # (A, D)
    outcome = np.repeat(-outside[:, None].astype(np.int8), len(THRESHOLDS), 1)              # as long as nothing matches
    free = np.ones((len(low), len(THRESHOLDS), len(crowd)), bool)           # (A, T, G)
    for d in np.flatnonzero((iou >= THRESHOLDS[0]).any(1)):
        possible = (free | crowd) & (iou[d] >= THRESHOLDS[:, None])         # crowd regions match again and again
        counted = possible & ~out[:, None]
        possible = np.where(counted.any(-1, keepdims=True), counted, possible)              # any counted object goes first
        best = len(crowd) - 1 - np.where(possible, iou[d], -1)[..., ::-1].argmax(-1)        # (A, T), the last of equal ones
        a, t = possible.any(-1).nonzero()
        free[a, t, best[a, t]] = False
        outcome[a, t, d] = np.where(out[a, best[a, t]], -1, 1)
    return outcome, (~out).sum(1)


def match_image(image, truth, results, kind, sigmas=BODY_SIGMAS):
    """Match one image's results to its annotations, both COCO dicts: (image id, {category: (scores (D,), outcome, positives)}).

    kind: bbox, segm or keypoints; image: COCO dict, `height` and `width` are read for segm only. A keypoint result may hold an
    `area` in pixels, else that of the box around its points is taken. See `match_detections` for outcome and positives.
    Raises: ValueError for a score that is not finite, for a malformed mask.
    """
    names, limits = SETTINGS[kind]
    ranges, matches = [AREAS[name] for name in ("", *names)], {}
    if not all(math.isfinite(r["score"]) for r in results):
        raise ValueError(f"a result in image {image['id']} has a score that is not finite")
    for category in {x["category_id"] for x in (*truth, *results)}:
        gt = [g for g in truth if g["category_id"] == category]
        dt = [r for r in results if r["category_id"] == category]
        dt = sorted(dt, key=lambda r: -r["score"])[:limits[-1]]             # stable: equal scores stay in order
        crowd = np.array([g["iscrowd"] for g in gt], bool)
        empty = np.array([kind == "keypoints" and g["num_keypoints"] == 0 for g in gt], bool)
        iou, dt_area = overlaps(dt, gt, crowd, kind, image, sigmas)
        outcome, positives = match_detections(iou, crowd | empty, crowd, np.array([g["area"] for g in gt]), dt_area, ranges)
        matches[category] = np.array([r["score"] for r in dt], float), outcome, positives
    return image["id"], matches


def interpolated_precision(outcome, positives):
    """Precision at RECALLS (101,) of a ranking, outcome (D,) as from `match_detections`, that should find `positives` objects."""
    tp, fp = np.cumsum(outcome == 1), np.cumsum(outcome == 0)
    precision = tp / (tp + fp + np.spacing(1))
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return np.append(best_from_here, 0)[np.searchsorted(tp / positives, RECALLS)]            # 0 where recall is not reached


def mean_of_valid(cells):
    """Mean of the cells that are not -1, or -1 if all are."""
    return float(cells[cells > -1].mean()) if (cells > -1).any() else -1.0


def accumulate(matches, kind, categories):
    """All images' results of `match_image`, in any order, -> {AP, AP50, ...: fraction, or -1 without any object}.

    categories: ids to average over. APs, APm, APl: by area; ARn: with n detections an image and category; keypoints' AR: with 20.
    """
    names, limits = SETTINGS[kind]
    A, T, K = 1 + len(names), len(THRESHOLDS), len(set(categories))
    precision, recall = np.full((A, T, len(RECALLS), K), -1.0), np.full((A, len(limits), T, K), -1.0)
    images = [m for _, m in sorted(matches, key=lambda pair: pair[0])]      # equal scores are ranked by image
    for k, category in enumerate(sorted(set(categories))):
        found = [m[category] for m in images if category in m]
        if not found:
            continue
        scores, outcomes, positives = zip(*found)
        positives = sum(positives)                                          # (A,)
        place = np.concatenate([np.arange(len(s)) for s in scores])         # in the own image's ranking
        order = np.argsort(-np.concatenate(scores), kind="stable")
        outcome = np.concatenate(outcomes, -1)                              # (A, T, D of all images)
        for a in np.flatnonzero(positives):
            recall[a, :, :, k] = [(outcome[a][:, place < n] == 1).sum(-1) / positives[a] for n in limits]
            precision[a, :, :, k] = [interpolated_precision(o[order], positives[a]) for o in outcome[a]]
    cells = {"AP": precision[0], "AP50": precision[0, AT_50], "AP75": precision[0, AT_75]}
    cells |= {f"AP{name}": precision[a] for a, name in enumerate(names, 1)}
    if kind == "keypoints":
        cells |= {"AR": recall[0, -1], "AR50": recall[0, -1, AT_50], "AR75": recall[0, -1, AT_75]}
    else:
        cells |= {f"AR{n}": recall[0, i] for i, n in enumerate(limits)}
    cells |= {f"AR{name}": recall[a, -1] for a, name in enumerate(names, 1)}
    return {name: mean_of_valid(values) for name, values in cells.items()}


def evaluate_coco(images, truth, results, kind, categories, sigmas=BODY_SIGMAS):
    """COCO's metrics of `results` in `images`, in one process; see `match_image` and `accumulate`, which share the work.

    images, truth, results: lists of COCO dicts of images, annotations, results; those of other images or categories are left out.
    """
    by_image = {image["id"]: ([], []) for image in images}
    for i, xs in enumerate((truth, results)):
        for x in xs:
            if x["image_id"] in by_image:
                by_image[x["image_id"]][i].append(x)
    matches = [match_image(image, *by_image[image["id"]], kind, sigmas) for image in images]
    return accumulate(matches, kind, categories)


def match_people(image_id, truth, results, keypoints):
    """Match one image's poses, annotation and result dicts: {run: see `match_image`}, of all parts and "whole" or of COCO's 17 points.

    Each run sees its own points and sigmas and, if a result has one, its own score ("foot_score", ..., "wholebody_score"). Detections
    without a point of confidence > 0 are left out, but not of plain COCO. The body's extent is the area in all.
    Raises: InputError for malformed points.
    """
    gt, dt = ([read_points(x, keypoints, f"image {image_id}") for x in xs] for xs in (truth, results))
    matches = {}
    for run, part in {**PARTS, "whole": slice(0, 133)}.items() if keypoints == 133 else [("body", PARTS["body"])]:
        score = "wholebody_score" if run == "whole" else f"{run}_score"
        own = [dict(a, keypoints=points[part], num_keypoints=(points[part, 2] > 0).sum()) for a, points in zip(truth, gt)]
        found = [dict(category_id=PERSON, keypoints=points[part], score=r["score"] if run == "body" else r.get(score, r["score"]),
                      area=np.ptp(points[PARTS["body"], :2], axis=0).prod())
                 for r, points in zip(results, dt) if keypoints == 17 or (points[part, 2] > 0).any()]
        matches[run] = match_image(dict(id=image_id), own, found, "keypoints", SIGMAS[part])
    return matches


def people_figures(records):
    """All images' results of `match_people` -> COCO's ten figures; of the whole body AP and AR, those of the parts, hands' means."""
    runs = {run: accumulate([record[run] for record in records], "keypoints", [PERSON]) for run in records[0]}
    if "whole" not in runs:
        return runs["body"]
    runs["hand"] = {name: mean_of_valid(np.array([runs[f"{side}hand"][name] for side in ("left", "right")])) for name in ("AP", "AR")}
    whole = runs.pop("whole")
    return {name: whole[name] for name in ("AP", "AR")} | {f"{run}_{name}": runs[run][name] for run in runs for name in ("AP", "AR")}


# --------------------------------------------------------------------------------------------------------------- tasks
class Segmentation:
    """Semantic FPN and UPerNet on ADE20K's layout."""

    metric = "mIoU"

    def __init__(self, args):
        self.args, self.data = args, Ade20k
        self.transform = partial(augment_segmentation, size=args.img_size)

    def sampler(self, source, **schedule):
        return StepSampler(images=len(source), repeats=1, **schedule)

    def collate(self, samples):
        """[(image, labels), ...] -> images (B, S, S, 3), label maps (B, S, S) padded with 255, sizes (B, 2)."""
        images, labels = zip(*samples)
        batch, sizes = pad_images(images, 1, least=self.args.img_size)
        maps = torch.full(batch.shape[:3], IGNORED, dtype=torch.uint8)
        for place, label in zip(maps, labels):
            place[:label.shape[0], :label.shape[1]] = torch.from_numpy(np.array(label))
        return batch, maps, sizes

    def loss(self, net, images, labels, sizes):
        return segmentation_loss(net(normalize_padded(images, sizes)), labels)

    def predict(self, model, device, image):
        return segment(model, image, self.args, device)

    def draw(self, image, prediction, names):
        return draw_labels(image, prediction, names)

    def record(self, source, _index, raw, predict):
        """What the score needs of one image, as read: pixels of each class that are right, predicted, true."""
        image, labels = raw
        return count_pixels(predict(image), labels, len(source.names))

    def summary(self, _source, records):
        return mean_iou(sum(records))

    def score_results(self, source, path):
        """The scores of a folder of label PNGs named like the images."""
        records = []
        for index, file in enumerate(source.files):
            if not (Path(path) / f"{file.stem}.png").is_file():
                raise InputError(f"{path} lacks {file.stem}.png; expected a folder with a label map of every validation image")
            prediction, labels = source.read_labels(Path(path) / f"{file.stem}.png"), source.truth(index)
            if prediction.shape != labels.shape:
                raise InputError(f"{path}/{file.stem}.png: {prediction.shape[1]} x {prediction.shape[0]}, its image "
                                 f"{labels.shape[1]} x {labels.shape[0]}")
            records.append(count_pixels(prediction, labels, len(source.names)))
        return self.summary(source, records)


class Detection:
    """RetinaNet on COCO's layout."""

    metric = "AP"
    kinds = {"": "bbox"}  # what is evaluated, by the prefix of its figures

    def __init__(self, args):
        self.args, self.data = args, Coco
        self.transform = partial(augment_detection, size=args.img_size, multi_scale=args.schedule == "3x")

    def sampler(self, source, **schedule):
        return GroupSampler(wide=source.wide, repeats=1, **schedule)

    def collate(self, samples):
        """[(image, boxes, labels), ...] -> images (B, H, W, 3), boxes (B, G, 4), labels (B, G) padded with -1, sizes (B, 2)."""
        images, boxes, labels = zip(*samples)
        batch, sizes = pad_images(images, 32)
        most = max([1, *map(len, labels)])
        padded, numbers = torch.zeros(len(images), most, 4), torch.full((len(images), most), -1)
        for i, (box, label) in enumerate(zip(boxes, labels)):
            padded[i, :len(box)], numbers[i, :len(label)] = torch.from_numpy(box), torch.from_numpy(label)
        return batch, padded, numbers, sizes

    def loss(self, net, images, boxes, labels, sizes):
        model = getattr(net, "module", net)
        return retinanet_loss(net(normalize_padded(images, sizes)), boxes, labels, sizes, model.base, model.strides)

    def predict(self, model, device, image):
        return detect(model, image, self.args, device)

    def draw(self, image, prediction, names):
        return draw_objects(image, prediction, names)

    def record(self, source, index, raw, predict):
        """What the score needs of one image, as read: its detections matched with its objects."""
        boxes, scores, labels, *masks = predict(raw[0])
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        results = [dict(category_id=source.categories[label], bbox=box, score=float(score))
                   for box, score, label in zip(boxes, scores, labels)]
        for result, mask in zip(results, masks[0] if masks else ()):
            result["segmentation"] = dict(size=mask.shape, counts=mask_runs(mask))
        image = source.entries[index]["image"]
        try:
            return [match_image(image, source.annotations[image["id"]], results, kind) for kind in self.kinds.values()]
        except ValueError as error:
            raise InputError(f"{source.path}: {error}") from None

    def summary(self, source, records):
        return {prefix + name: value for (prefix, kind), matches in zip(self.kinds.items(), zip(*records))
                for name, value in accumulate(matches, kind, source.categories).items()}

    def score_results(self, source, path):
        """The scores of a COCO results file: of its masks if it holds any, else of its boxes."""
        images = [entry["image"] for entry in source.entries]
        results = read_results(path, {image["id"] for image in images}, set(source.categories))
        kind = "segm" if any("segmentation" in result for result in results) else "bbox"
        truth = [annotation for annotations in source.annotations.values() for annotation in annotations]
        try:
            return evaluate_coco(images, truth, results, kind, source.categories)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, scored as {kind}: {type(error).__name__} {error}") from None


class InstanceSegmentation(Detection):
    """Mask R-CNN and Cascade Mask R-CNN on COCO's layout."""

    metric = "mask_AP"
    kinds = {"box_": "bbox", "mask_": "segm"}

    def __init__(self, args):
        super().__init__(args)
        self.data = partial(Coco, masks=True)

    def collate(self, samples):
        """As for detection, and the masks of all objects, image after image: (objects, H, W) bool."""
        batch, *others = super().collate([sample[:3] for sample in samples])
        masks = [mask for *_, group in samples for mask in group]
        padded = torch.zeros(len(masks), *batch.shape[1:3], dtype=torch.bool)
        for place, mask in zip(padded, masks):
            place[:mask.shape[0], :mask.shape[1]] = torch.from_numpy(np.array(mask))
        return batch, *others, padded

    def loss(self, net, images, boxes, labels, sizes, masks):
        return net(normalize_padded(images, sizes), sizes, boxes, labels, masks)


class Pose:
    """Keypoints of persons on COCO's layout, top-down: each one is a crop of its own."""

    metric = "AP"

    def __init__(self, args):
        self.args, self.data = args, partial(Persons, keypoints=args.keypoints, boxes=args.boxes)
        self.transform = partial(augment_person, height=args.img_size, jitter=args.jitter)

    def sampler(self, source, **schedule):
        return StepSampler(images=len(source), repeats=1, **schedule)

    def collate(self, samples):
        """[(crop, points), ...] -> crops (B, H, W, 3), points (B, K, 3)."""
        return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples))

    def loss(self, net, crops, points):
        return pose_loss(net(normalize(crops)), points)

    def predict(self, model, device, image, boxes=None):
        """Without boxes (P, 5) the whole image is one person."""
        whole = np.array([[0, 0, image.width, image.height, 1.0]])
        return estimate_pose(model, image, whole if boxes is None else boxes, self.args, device)

    def boxes_in(self, path, found):
        """Persons (P, 5) of those `read_boxes` found that are in the image whose id is the number in its name."""
        numbers = re.findall("[0-9]+", Path(path).stem)
        if not numbers:
            raise InputError(f"{path}: with --boxes the last number in an image's name must be its id")
        return found.get(int(numbers[-1]), np.zeros((0, 5)))

    def draw(self, image, prediction, _names):
        return draw_people(image, prediction[0])

    def record(self, source, index, raw, predict):
        """What the score needs of one image, as read: its poses matched with its persons."""
        results = [{field: person[PARTS[part]].ravel().tolist() for part, field in FIELDS.items()} | dict(score=float(score))
                   for person, score in zip(*predict(raw[0], raw[1]))]
        image_id = source.ids[index]
        return match_people(image_id, source.annotations[image_id], results, self.args.keypoints)

    def summary(self, _source, records):
        return people_figures(records)

    def score_results(self, source, path):
        """The scores of a COCO or COCO-WholeBody keypoint results file."""
        by_image = {i: [] for i in source.ids}
        for result in read_results(path, set(source.ids), {PERSON}):
            by_image[result["image_id"]].append(result)
        try:
            return people_figures([match_people(i, source.annotations[i], by_image[i], self.args.keypoints) for i in source.ids])
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}") from None


TASKS = {"semfpn": Segmentation, "upernet": Segmentation, "retinanet": Detection, "mask_rcnn": InstanceSegmentation,
         "cascade_mask_rcnn": InstanceSegmentation, "pose": Pose}


# ---------------------------------------------------------------------------------------------------------------- loop
def open_data(task, args, procs, *splits):
    """The splits ("train", "val") of --data, or of scenes drawn into a folder beside --output's."""
    folder = args.data
    if folder is None:
        folder = Path(args.output).parent / "scenes"
        if procs.rank == 0:
            print(f"no --data given: scenes drawn here are in {folder}", file=sys.stderr)
            write_scenes(folder)
        procs.wait()
    return [task.data(folder, split) for split in splits]


@torch.no_grad()
def evaluate(task, model, source, args, procs):
    """The task's metrics over all images of `source`, each counted once on any number of processes.

    Raises: InputError for an unreadable image; testing never substitutes.
    """
    model.eval()
    share = [[(0, i, 0)] for i in range(procs.rank, len(source), procs.world)]
    samples, records = Samples(source, as_read, args.seed, replace=0), []
    for raw, index, unreadable in loader(samples, share, args.workers, procs.device, collate=only_item):
        if unreadable:
            raise InputError(f"validation image cannot be read: {unreadable[0]}")
        records.append(task.record(source, index, raw, partial(task.predict, model, procs.device)))
    return task.summary(source, procs.gather(records))


def require_images(source):
    """Raise InputError now rather than at the first test if an image of `source` is missing."""
    for index in range(len(source)):
        if not os.path.isfile(source.name(index)):
            raise InputError(f"validation image {source.name(index)} is missing")


def as_read(raw, _rng):
    """Transform of a validation sample: none."""
    return raw


def only_item(items):
    """Collate function of batches of one."""
    return items[0]


def make_model(args, classes, frozen_bn):
    """The model that the flags name."""
    overrides = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    options = {name: value for name, value in (("samples", args.rois), ("box_head", args.box_head)) if value}
    return build_model(args.task, args.backbone, classes, frozen_bn, options, **overrides, **({"released": True} if args.released else {}))


def train(args, procs, checkpoint):
    """The run: data, model, optimizer, then update after update until the last one, --max-steps or a signal."""
    task = TASKS[args.task](args)
    train_set, val_set = open_data(task, args, procs, "train", "val")
    most = 64 if args.task == "pose" else 2 if args.schedule and args.data else 16      # detection: the papers' divisors are of two images
    train_imagenet.split_batch(args, procs.world, most)
    shared_bn = args.sync_bn and procs.world > 1 and procs.device.type == "cuda"
    if args.task == "upernet" and args.micro_batch == 1 and not shared_bn:
        raise InputError("--micro-batch 1 leaves batch norm a single value a channel of UPerNet's coarsest pool; use 2 or more")
    if args.task == "upernet" and args.deterministic and procs.device.type == "cuda":
        raise InputError("--deterministic: UPerNet's adaptive pooling has no deterministic gradient on a GPU")
    require_images(val_set)
    schedule = dict(batch=args.batch_size, micro=args.micro_batch, rank=procs.rank, world=procs.world, seed=args.seed)
    per_epoch = task.sampler(train_set, **schedule).per_epoch
    if per_epoch == 0:
        raise InputError(f"--batch-size {args.batch_size} is larger than the {len(train_set)} training images")
    total = args.iters or args.epochs * per_epoch
    last = min(total, args.max_steps or total)
    every = args.eval_every = args.eval_every or (per_epoch if args.epochs else -(-total // 10))

    torch.manual_seed(args.seed)
    model = make_model(args, len(train_set.names), args.frozen_bn)
    if args.backbone_weights and not checkpoint:
        left = load_backbone(model.backbone, args)
        if procs.rank == 0:
            print(f"{args.backbone_weights}: loaded, without {' and '.join(left)}")
    if shared_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(procs.device)
    groups = decay_groups(model, args.weight_decay, norms=args.task == "pose")
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(procs.device.type, enabled=args.amp == "fp16")
    step, tested, best, period_loss, unreadable = 0, 0, -math.inf, 0.0, 0
    resumed = bool(checkpoint)                                              # restore() empties it
    if resumed:
        if checkpoint["names"] != train_set.names:
            raise InputError(f"the checkpoint is of a run with {len(checkpoint['names'])} other classes, not of this data")
        before = checkpoint["args"]["eval_every"]
        step, tested, best, period_loss, unreadable = train_imagenet.restore(checkpoint, model, None, optimizer, scaler, args, per_epoch)
        tested = tested * before // every                                   # --eval-every may be another now
    procs.agree(step)
    net = torch.compile(model) if args.compile else model
    if procs.world > 1 and args.compile:
        torch._dynamo.config.optimize_ddp = False                           # torch 2.6 cannot split graphs around our gradients
    if procs.world > 1:
        net = DistributedDataParallel(net, device_ids=[procs.device.index] if procs.device.type == "cuda" else None)

    output = Path(args.output)
    log = partial(append, output / "log.jsonl") if procs.rank == 0 else lambda **record: None
    if procs.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        if not resumed:
            (output / "log.jsonl").unlink(missing_ok=True)
        log(**train_imagenet.describe_run(args, procs, model), resumed_at=step)
        print(f"{args.task} with {args.backbone}: batch {args.batch_size}, {args.micro_batch} at once on each of {procs.world} processes, "
              f"peak rate {args.lr:g}, {total} updates, {per_epoch} an epoch, on {procs.device.type}, amp {args.amp}")
    saved_at = step if resumed else None

    def save(name):
        nonlocal saved_at
        if not math.isfinite(sum(p.detach().double().sum() for p in model.parameters())):
            raise InputError(train_imagenet.not_finite("weights", step, lr, output, saved_at))
        procs.share_buffers(model)
        if procs.rank == 0:
            train_imagenet.save_checkpoint(output / name, dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, evaluated=tested,
                best=best, epoch_loss=period_loss, unreadable=unreadable, per_epoch=per_epoch, names=train_set.names, args=vars(args)))
        procs.wait()
        saved_at = step

    samples = Samples(train_set, task.transform, args.seed, replace=9)
    batches = iter(loader(samples, task.sampler(train_set, **schedule, first=step, last=last), args.workers, procs.device,
                          collate=partial(collate, task)))
    stop, scores, named = StopSignal(), {}, set()                           # named: unreadable files reported so far
    lr, losses, broken, clock, seconds = 0.0, [], [], 0.0, 0.0              # losses, broken, clock: since the last log line
    with tqdm(total=last * args.batch_size, initial=step * args.batch_size, unit="img", disable=procs.rank > 0) as bar:
        while True:
            stopping = procs.any(stop.caught)
            test_due = step // every > tested or (step == total and step > tested * every)
            if losses and (len(losses) >= args.log_every or test_due or stopping or step == last):
                values = [v / procs.world for v in procs.reduce(torch.stack(losses).double())]
                for i, value in enumerate(values):
                    if not math.isfinite(value):
                        failed = step - len(values) + i
                        rate = rate_at(failed, args, total)
                        raise InputError(train_imagenet.not_finite(f"loss {value}", failed + 1, rate, output, saved_at))
                elapsed = time.perf_counter() - clock
                seconds, period_loss = seconds + elapsed, period_loss + sum(values)
                files = procs.gather(broken)
                unreadable += len(files)
                for file in sorted(set(files) - named) if procs.rank == 0 else ():
                    log(unreadable_file=file)
                    tqdm.write(f"cannot read {file}; using the next file", file=sys.stderr)
                named.update(files)
                log(step=step, epoch=step / per_epoch, loss=sum(values) / len(values), lr=lr, time=time.time(),
                    images_per_s=len(values) * args.batch_size / elapsed)
                bar.set_postfix(loss=f"{values[-1]:.3f}", lr=f"{lr:.1e}", **({task.metric: f"{scores[task.metric]:.3f}"} if scores else {}))
                losses, broken = [], []
            if test_due and not stopping:
                save("last.pt")                                             # first of all: testing takes a while and may be killed
                scores = evaluate(task, model, val_set, args, procs)
                period, tested = step - tested * every, -(-step // every)
                improved, best = scores[task.metric] > best, max(best, scores[task.metric])
                state = optimizer.state[next(model.parameters())]           # fp16: an overflow skips an update and halves the scale
                log(step=step, epoch=step / per_epoch, train_loss=period_loss / period, **scores, best=best, unreadable=unreadable,
                    scaler_skips=step - int(state["step"]), train_seconds=seconds, time=time.time())
                period_loss, unreadable, seconds = 0.0, 0, 0.0
                for name in ("best.pt", "last.pt") if improved else ("last.pt",):
                    save(name)
                if procs.rank == 0:
                    train_imagenet.draw_curves(output, [task.metric])
                continue
            if step >= last or stopping:
                break
            if not losses:
                clock = time.perf_counter()
            lr = rate_at(step, args, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, files = update(task, net, optimizer, scaler, batches, step, args, procs)
            losses.append(loss)
            broken += files
            step += 1
            bar.update(args.batch_size)
            bar.set_description(f"update {step}/{total}")
    if saved_at != step:
        save("last.pt")
    if procs.rank == 0:
        if stopping and (step < total or test_due):                         # the last update may be untested
            print(f"stopped after update {step}; resume with --resume {output / 'last.pt'}")
        else:
            print(f"update {step}: " + "".join(f"{k} {v:.3f}, " for k, v in scores.items())
                  + (f"best {task.metric} {best:.3f}; see {output}/log.jsonl, last.pt, best.pt, curves.png" if best > -math.inf
                     else f"not tested yet; see {output}/log.jsonl, last.pt"))


def collate(task, items):
    """List of samples -> the task's batch or None if one is missing, and all unreadable files."""
    samples, _, unreadable = zip(*items)
    unreadable = [file for files in unreadable for file in files]
    return None if any(sample is None for sample in samples) else task.collate(samples), unreadable


def update(task, net, optimizer, scaler, batches, step, args, procs):
    """One update of the weights from this process's micro-batches.

    Returns: mean loss (a tensor, so that nothing waits for the device) and the files that could not be read.
    """
    net.train()
    accumulate = args.batch_size // (args.micro_batch * procs.world)
    total, unreadable = torch.zeros((), device=procs.device), []
    for i in range(accumulate):
        batch, broken = next(batches)
        unreadable += broken
        if batch is None:
            raise InputError(f"ten files in a row cannot be read, the last one {broken[-1]}")
        rng = random.Random(repr((train_imagenet.BATCH, args.seed, step, i * procs.world + procs.rank)))
        torch.manual_seed(rng.getrandbits(63))                              # for dropout and drop path
        if procs.world > 1:
            net.require_backward_grad_sync = i == accumulate - 1            # DDP exchanges gradients once an update
        with autocast(args, procs.device):
            loss = task.loss(net, *(t.to(procs.device, non_blocking=True) for t in batch)) / accumulate
        scaler.scale(loss).backward()
        total += loss.detach()
    if args.clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return total, unreadable


def load_model(args, procs, checkpoint):
    """The model of a checkpoint of this script, ready to test, and its class names. Raises: InputError if it is none."""
    names = checkpoint["names"]
    model = make_model(args, len(names), args.frozen_bn)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise InputError(f"{args.weights} does not fit {args.task} with {args.backbone}: {' '.join(str(error).split())[:200]}") from None
    return model.to(procs.device).eval(), names


def test(args, procs, checkpoint):
    """--eval: print one JSON line with the scores of the weights."""
    task = TASKS[args.task](args)
    val_set, = open_data(task, args, procs, "val")
    require_images(val_set)
    model, names = load_model(args, procs, checkpoint)
    if names != val_set.names:
        known, asked = (f"{len(x)} ({', '.join(x[:5])}, ...)" for x in (names, val_set.names))
        raise InputError(f"{args.weights} knows the classes {known}, the data has {asked}")
    scores = evaluate(task, model, val_set, args, procs)
    if procs.rank == 0:
        print(json.dumps(scores))


def predict(args, procs, checkpoint):
    """--predict: write an overlay of every image to --output."""
    task, output, found = TASKS[args.task](args), Path(args.output), read_boxes(args.boxes) if args.boxes else None
    model, names = load_model(args, procs, checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    for i, path in list(enumerate(args.predict))[procs.rank::procs.world]:
        twin = any(Path(other).stem == Path(path).stem for other in args.predict[:i])
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:   # SyntaxError: Pillow on broken files
            raise InputError(f"{path}: {error}") from None
        target = output / (f"{Path(path).stem}_{i}" * twin or Path(path).stem)
        target = target.with_name(f"{target.name}_{args.task}.png")
        known = [task.boxes_in(path, found)] if args.boxes else []
        task.draw(image, task.predict(model, procs.device, image, *known), names).save(target)
        print(f"wrote {target}")


def score(args, procs):
    """--score: print one JSON line with the scores of a results file or folder."""
    task = TASKS[args.task](args)
    val_set, = open_data(task, args, procs, "val")
    if procs.rank == 0:
        print(json.dumps(task.score_results(val_set, args.score)))


def main(argv=None):
    """Settle the arguments, start the processes, train, test, predict or score."""
    args = parse_args(argv)
    checkpoint = None
    if sum(map(bool, (args.eval, args.predict, args.score, args.resume))) > 1:
        raise InputError("--eval, --predict, --score and --resume do different things, give one")
    if args.weights and not (args.eval or args.predict):
        raise InputError("--weights is for --eval and --predict; training starts from --backbone-weights or goes on with --resume")
    if args.eval or args.predict:
        if not args.weights:
            raise InputError(f"--{'eval' if args.eval else 'predict'} needs --weights FILE")
        checkpoint = train_imagenet.read_checkpoint(args.weights)
    elif args.resume:
        usual = f"runs/{args.task or 'semfpn'}_{args.backbone or ('secvit_s' if args.data else 'linglo_b0')}"
        checkpoint = train_imagenet.find_checkpoint(args.resume, args.output or usual)
    if checkpoint and not ({"step", "model", "per_epoch", "names"} <= checkpoint.keys() and isinstance(checkpoint.get("args"), dict)):
        raise InputError(f"{args.weights or args.resume} is no checkpoint of this script")
    settle(args, checkpoint)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    procs = Processes(patience=600 if args.compile else 60)
    if args.score:
        score(args, procs)
    else:
        (test if args.eval else predict if args.predict else train)(args, procs, checkpoint)
    procs.close()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        message = str(error).split("InputError: ")[-1]                      # a loader process wraps it in its traceback
        print(f"train_dense.py: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
