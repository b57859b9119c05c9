"""Train or evaluate any of the backbones as an image classifier. Plain PyTorch, one visible loop.

    python train_imagenet.py                                            # no data needed: draws its own, minutes on a CPU
    python train_imagenet.py --model secvit_t --released --data /data/imagenet --output runs/t
    torchrun --nproc-per-node 8 train_imagenet.py --model stvit_s --data /data/imagenet --output runs/s
    torchrun --nproc-per-node 8 --max-restarts 3 train_imagenet.py ... --output runs/s --resume auto
    python train_imagenet.py --eval --weights runs/s/best.pt --data /data/imagenet
    # STViT at 384:
    torchrun --nproc-per-node 8 train_imagenet.py --model stvit_s --data /data/imagenet --weights runs/s/last.pt --output runs/s384 \\
        --frozen-bn --img-size 384 --epochs 30 --batch-size 512 --lr 5e-6 --min-lr 5e-6 --warmup-epochs 0 --weight-decay 1e-8

Reading order is the order of the run: settings, processes, data, augmentation, schedule, checkpoints, log, evaluation, loop.
Defaults are the papers' (DeiT's recipe); each model's own values are in RECIPES, those of the built-in data in BUILT_IN.
Randomness is stateless: a sample's draws depend on (seed, epoch, sample), a micro-batch's on (seed, step, its place in the
step). So the run is the same for any number of workers and after any interruption, and any number of processes with the same
--micro-batch (and no SyncBN) have the same training loss; BN's running statistics are those of the first process.

Against the authors' scripts, on purpose: --batch-size is global; the rate is a function of the step, not of the epoch; a
plain run reshuffles every epoch; layer-scale vectors are exempt from weight decay (theirs are 4-D tensors and decayed);
evaluation counts each image once. SecViT's peak rate 2e-3 is from the authors' logs, the paper gives none.
"""
import argparse
import copy
import datetime
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clustr
import linglo
import secvit
import stvit

MODELS = {name: getattr(module, name) for module in (clustr, secvit, linglo, stvit) for name in module.VARIANTS}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLE, BATCH, ORDER, DRAWING = range(4)  # first entry of every seed, so that no two streams share one

# ------------------------------------------------------------------------------------------------------------ settings
DEIT = dict(  # arXiv 2012.12877, as the papers' authors use it; see each flag's help
    epochs=300, batch_size=1024, lr=1e-3, min_lr=1e-5, warmup_epochs=5, weight_decay=0.05, img_size=224, mixup=0.8, cutmix=1.0,
    label_smoothing=0.1, randaug="rand-m9-mstd0.5-inc1", random_erase=0.25, repeated_aug=3, min_crop=0.08, ema=0.0, sync_bn=False)
RECIPES = dict.fromkeys(("secvit", "sec"), dict(lr=2e-3, ema=0.99992, sync_bn=True))  # what differs, by the first part of the model's name
BUILT_IN = dict(epochs=12, batch_size=32, lr=1e-3, warmup_epochs=1, img_size=64, mixup=0.0, cutmix=0.0, randaug="none", random_erase=0.0,
                repeated_aug=1, min_crop=0.9, test_crop=1.0, ema=0.0, drop_path=0.0)
OPTIONAL = dict(test_crop=None, drop_path=None, clip_grad=None, micro_batch=None, seed=0, log_every=50, released=False, compile=False,
                channels_last=False, frozen_bn=False, deterministic=False)


class InputError(ValueError):
    """Something the user gave is wrong; the message names the value and the rule and is all that is printed."""


def number(kind, low, high=math.inf, *, above=False):
    """Parser type: an int or float from `low` to `high`, or above `low`."""
    def parse(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            limit = f", at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}, expected {'above' if above else 'at least'} {low}{limit}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def refuse(message):
    """What the parser does with an error."""
    raise InputError(message)


def parse_args(argv=None):
    """The command line; flags that were not given are None, so that checkpoint, preset and recipe can fill them."""
    p = argparse.ArgumentParser(description="Train or test a backbone on ImageNet-like folders, or on images drawn here.",
                                formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=120))
    p.error = refuse
    count, share, size = number(int, 1), number(float, 0, 1), number(float, 0)
    switch = dict(action="store_true", default=None)
    p.add_argument("--model", help=f"one of {', '.join(MODELS)} (default linglo_b0)")
    p.add_argument("--released", **switch, help="SecViT as the authors released it, which the paper's accuracies belong to")
    p.add_argument("--data", help="folder with train/<class>/* and val/<class>/*; without it images are drawn")
    p.add_argument("--output", help="folder for log.jsonl, last.pt, best.pt, curves.png (default runs/MODEL)")
    p.add_argument("--epochs", type=count, help="length of training and of the cosine; 300")
    p.add_argument("--batch-size", type=count, help="images an update, over all processes and accumulation; 1024")
    p.add_argument("--micro-batch", type=count, help="images a process computes at once, the rest is accumulated; a divisor up to 128")
    p.add_argument("--lr", type=size, help="peak learning rate at this --batch-size, never rescaled; 1e-3, SecViT and SEC-* 2e-3")
    p.add_argument("--min-lr", type=size, help="learning rate the cosine ends at; 1e-5")
    p.add_argument("--warmup-epochs", type=size, help="linear warm-up from 1e-6; 5")
    p.add_argument("--weight-decay", type=size, help="AdamW decay of weights with two or more axes; 0.05")
    p.add_argument("--clip-grad", type=number(float, 0, above=True), help="largest gradient norm, larger ones are scaled down; off")
    p.add_argument("--img-size", type=number(int, 32), help="side of the square images the model sees; 224")
    p.add_argument("--drop-path", type=number(float, 0, 0.99), help="stochastic depth of the last block; the paper's for each model")
    p.add_argument("--mixup", type=size, help="Beta parameter of mixup, 0 is off; 0.8")
    p.add_argument("--cutmix", type=size, help="Beta parameter of CutMix, 0 is off; 1.0")
    p.add_argument("--label-smoothing", type=number(float, 0, 0.99), help="share of each target spread over all classes; 0.1")
    p.add_argument("--randaug", help="RandAugment as timm writes it, or none; rand-m9-mstd0.5-inc1")
    p.add_argument("--random-erase", type=share, help="probability of replacing a box of an image by noise; 0.25")
    p.add_argument("--repeated-aug", type=count, help="copies of each image an epoch, with as many fewer images, 1 is off; 3")
    p.add_argument("--min-crop", type=number(float, 0, 1, above=True), help="smallest share of the area a random crop keeps; 0.08")
    p.add_argument("--test-crop", type=number(float, 0.1, 1), help="tested share of the resized shorter side; 0.875, from 384 on 1.0")
    p.add_argument("--ema", type=number(float, 0, 0.9999999), help="decay of averaged weights, 0 is off; SecViT, SEC-* 0.99992, else off")
    p.add_argument("--amp", choices=("none", "bf16", "fp16"), help="autocast type of training and testing; bf16 on a GPU, else none")
    p.add_argument("--compile", **switch, help="torch.compile the model for training")
    p.add_argument("--channels-last", **switch, help="store convolution weights channels-last")
    p.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, help="batch statistics over all GPUs; on for SecViT and SEC-*")
    p.add_argument("--frozen-bn", **switch, help="train in eval mode: BN statistics fixed, drop path off (STViT at 384)")
    p.add_argument("--workers", type=number(int, 0), help="loader processes a process; changes speed only; its CPU cores, at most 10")
    p.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), help="of weights, order, augmentation; 0")
    p.add_argument("--resume", help="checkpoint to go on from exactly, or auto: the newest readable one of --output if any")
    p.add_argument("--weights", help="start from these weights: our checkpoint, a bare state dict or an authors' file")
    p.add_argument("--eval", action="store_true", help="only test --weights (the average too if it holds one), print one JSON line")
    p.add_argument("--max-steps", type=count, help="save and stop after this many updates; the schedule is not shortened")
    p.add_argument("--log-every", type=count, help="updates between log lines; 50")
    p.add_argument("--deterministic", **switch, help="only deterministic GPU kernels: slower, repeatable bit for bit")
    return p.parse_args(argv)


def settle(args, checkpoint=None):
    """Fill every flag not given: from the checkpoint if one is continued or tested, then preset, recipe, DeiT's values.

    Raises: InputError for an unknown model and flags that contradict each other.
    """
    saved = checkpoint.get("args") if checkpoint else None
    saved = saved if isinstance(saved, dict) and saved.get("model") in MODELS else {}  # authors' files hold other arguments
    args.model = args.model or saved.get("model") or "linglo_b0"
    if args.model not in MODELS:
        raise InputError(f"unknown --model {args.model!r}, expected one of {', '.join(MODELS)}")
    args.data, args.output = args.data or saved.get("data"), args.output or saved.get("output") or f"runs/{args.model}"
    defaults = dict(DEIT, **RECIPES.get(args.model.split("_")[0], {}), **OPTIONAL, amp="bf16" if torch.cuda.is_available() else "none")
    for name, value in {**defaults, **({} if args.data else BUILT_IN), **{k: v for k, v in saved.items() if k in defaults}}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.released and not args.model.startswith("secvit_"):
        raise InputError(f"--released is a variant of SecViT, not of {args.model}")
    parse_randaug(args.randaug)
    if args.workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(10, cores) if args.data else 0


# ----------------------------------------------------------------------------------------------------------- processes
class Processes:
    """The processes of this run: one when started plainly, torchrun's otherwise; NCCL on GPUs, gloo on CPUs.

    `patience`: seconds after which a process that waits for another gives up.
    """

    def __init__(self, patience=60):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
        if cuda and local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU: {torch.cuda.device_count()} found, one needed for each process")
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(local)
        self.control = self.writing = None
        if self.world > 1:
            timeout = datetime.timedelta(seconds=patience)
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
            self.control = dist.new_group(backend="gloo", timeout=timeout)      # never waits for a GPU
            self.writing = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))

    def together(self, collective, *args, **options):
        """Call a collective operation; exit with a message if another process is gone."""
        if self.world > 1:
            try:
                collective(*args, **options)
            except RuntimeError as error:
                sys.exit(f"process {self.rank}: another process is gone or silent, stopping ({str(error).splitlines()[0]})")

    def reduce(self, numbers, operation=dist.ReduceOp.SUM):
        """Element-wise sum (or another reduction) of a float64 tensor over all processes, as a list."""
        numbers = numbers.cpu()
        self.together(dist.all_reduce, numbers, operation, group=self.control)
        return numbers.tolist()

    def any(self, flag):
        """True on every process if `flag` is true on one."""
        return bool(self.reduce(torch.tensor([float(flag)]), dist.ReduceOp.MAX)[0])

    def agree(self, step):
        """Raise InputError unless all processes go on from the same update."""
        if self.reduce(torch.tensor([step, -step], dtype=torch.float64), dist.ReduceOp.MAX) != [step, -step]:
            raise InputError("the processes found different checkpoints; --output must be on a disk that all of them share")

    def share_buffers(self, *models):
        """Copy the first process's BatchNorm statistics to all."""
        if self.world > 1:
            for model in models:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def gather(self, items):
        """All processes' lists in one."""
        lists = [items] * self.world
        self.together(dist.all_gather_object, lists, items, group=self.control)
        return [item for part in lists for item in part]

    def wait(self):
        """Wait until all processes are here, however long the first one writes."""
        self.together(dist.barrier, group=self.writing)

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


class StopSignal:
    """Remembers SIGTERM or SIGINT so that the loop can finish its step; a second Ctrl-C acts at once."""

    def __init__(self):
        self.caught = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, _frame):
        self.caught = True
        if number == signal.SIGINT:  # schedulers send SIGTERM several times
            signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------- data
class ImageFolder:
    """Labelled image files of folder/<class>/*, classes in order of name. Paths sit in one array, which workers share."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder} is not a folder; expected DIR/train/<class>/* and DIR/val/<class>/*")
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        Image.init()
        paths, labels = [], []
        for label, name in enumerate(self.classes):
            files = sorted(e.name for e in os.scandir(self.folder / name) if Path(e.name).suffix.lower() in Image.EXTENSION)
            paths += [os.fsencode(f"{name}/{file}") for file in files]
            labels += [label] * len(files)
        if not paths:
            raise InputError(f"{folder} holds no image in any <class> folder")
        self.paths, self.labels = np.array(paths), np.array(labels)

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return str(self.folder / os.fsdecode(bytes(self.paths[index])))

    def read(self, index):
        with Image.open(self.name(index)) as image:
            return image.convert("RGB")


class DrawnShapes:
    """Images drawn here: a shape filled with a texture on clutter, 64 x 64; 5 shapes x 2 textures make 10 classes."""

    shapes, textures = ("disc", "square", "triangle", "cross", "ring"), ("stripes", "dots")

    def __init__(self, split, images):
        self.classes = [f"{shape}-{texture}" for shape in self.shapes for texture in self.textures]
        self.labels = np.arange(images) % len(self.classes)
        self.images = [self.draw(np.random.default_rng((DRAWING, split == "val", i)), label) for i, label in enumerate(self.labels)]

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"drawn image {index}"

    def read(self, index):
        return self.images[index]

    @classmethod
    def draw(cls, rng, label, side=64):
        """One image of class `label`: colours, size, place, angle, clutter and noise are random and tell nothing."""
        image = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(5):  # clutter: lines and small blobs
            x, y, w, h = rng.integers(0, side, 2).tolist() + rng.integers(2, side // 4, 2).tolist()
            colour = tuple(rng.integers(0, 256, 3))
            draw.line((x, y, *rng.integers(0, side, 2)), colour, 2) if rng.random() < 0.5 else draw.rectangle((x, y, x + w, y + h), colour)
        radius = rng.uniform(0.3, 0.45) * side
        centre = rng.uniform(radius, side - radius, 2)
        turn = rng.uniform(-0.5, 0.5)
        y, x = np.mgrid[:side, :side] - centre[::-1, None, None]
        u, v = (x * np.cos(turn) + y * np.sin(turn)) / radius, (y * np.cos(turn) - x * np.sin(turn)) / radius
        distance = np.hypot(u, v)
        mask = {"disc": distance < 1, "square": np.maximum(abs(u), abs(v)) < 0.75,
                "triangle": (v < 0.5) & (v > 1.7 * abs(u) - 1), "ring": (distance < 1) & (distance > 0.5),
                "cross": (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.95)}[cls.shapes[label // 2]]
        period, phase = rng.uniform(5, 8), rng.uniform(0, 2 * np.pi, 2)
        waves = np.sin(2 * np.pi * x / period + phase[0]), np.sin(2 * np.pi * y / period + phase[1])
        lit = waves[rng.integers(2)] > 0 if cls.textures[label % 2] == "stripes" else (waves[0] > 0.1) & (waves[1] > 0.1)
        dark = rng.uniform(0, 110, 3)
        pixels = np.where(mask[..., None], np.where(lit[..., None], 255 - rng.uniform(0, 80, 3), dark), np.asarray(image))
        return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


def open_data(folder):
    """Training and validation images: of `folder`, or drawn. Raises InputError if the two name different classes."""
    if folder is None:
        return DrawnShapes("train", 1000), DrawnShapes("val", 300)
    train, val = ImageFolder(Path(folder) / "train"), ImageFolder(Path(folder) / "val")
    if train.classes != val.classes:
        raise InputError(f"train and val of {folder} differ in classes {sorted(set(train.classes) ^ set(val.classes))}")
    return train, val


class Samples(torch.utils.data.Dataset):
    """Decoded and augmented images by key (epoch, index, copy): (uint8 (S, S, 3) array or None, label, unreadable files).

    A file that cannot be decoded is replaced by the next one, at most `replace` times in a row; after that the image is None.
    """

    def __init__(self, source, transform, seed, replace):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __getitem__(self, key):
        epoch, index, _ = key
        unreadable = []
        while True:
            try:
                image = self.source.read(index)
            except InputError:
                raise
            except Exception as error:  # broken files make Pillow raise nearly anything
                unreadable.append(f"{self.source.name(index)}: {error}")
                if len(unreadable) > self.replace:
                    return None, 0, unreadable
                index = (index + 1) % len(self.source)
                continue
            return *self.prepare(image, index, key), unreadable

    def prepare(self, image, index, key):
        """What the loader gets of a decoded image: augmented pixels and label."""
        image = self.transform(image, random.Random(repr((SAMPLE, self.seed, *key))))
        return np.asarray(image), int(self.source.labels[index])


def collate(items):
    """List of samples -> uint8 images (B, S, S, 3) or None if one is missing, labels (B,), all unreadable files."""
    images, labels, unreadable = zip(*items)
    unreadable = [file for files in unreadable for file in files]
    return None if any(i is None for i in images) else torch.from_numpy(np.stack(images)), torch.tensor(labels), unreadable


class StepSampler:
    """Keys of the micro-batches that one process runs in updates `first` to `last`, in order.

    Each update takes the next `batch` entries of its epoch's order; micro-batch j of the J in an update holds every J-th of
    them, process r of W runs j = r, r + W, ... So the micro-batches do not depend on the number of processes.
    With `repeats` > 1 (repeated augmentation, arXiv 1902.05509) every image stands that many times in a row in the order, which
    ends after N // 256 * 256 entries: an epoch shows 1 / `repeats` of the images, and with at least that many micro-batches an
    update no micro-batch sees an image twice.
    """

    def __init__(self, *, images, batch, micro, rank, world, seed, repeats, first=0, last=0):
        self.images, self.batch, self.count, self.rank, self.world = images, batch, batch // micro, rank, world
        self.seed, self.repeats, self.first, self.last = seed, repeats, first, last
        self.used = images // 256 * 256 if repeats > 1 and images >= 256 else images
        self.per_epoch = self.used // batch

    def order(self, epoch):
        """(used, 2): image and number of the copy."""
        images = np.random.default_rng((ORDER, self.seed, epoch)).permutation(self.images)
        return np.stack([images.repeat(self.repeats), np.tile(np.arange(self.repeats), self.images)], 1)[:self.used]

    def __iter__(self):
        epoch, order = None, None
        for step in range(self.first, self.last):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                order = self.order(epoch)
            start = step % self.per_epoch * self.batch
            for j in range(self.rank, self.count, self.world):
                yield [(epoch, int(i), int(turn)) for i, turn in order[start + j:start + self.batch:self.count]]


def loader(samples, batches, workers, device, collate=collate):
    """DataLoader over lists of keys."""
    return torch.utils.data.DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                                       pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def ignore_signals(_worker):
    """Worker start: Ctrl-C and SIGTERM are for the training process, which ends its workers itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# -------------------------------------------------------------------------------------------------------- augmentation
def random_resized_crop(image, size, min_share, rng):
    """Crop of U(min_share, 1) of the area with sides' ratio in [3/4, 4/3], resized to size x size (arXiv 1409.4842)."""
    W, H = image.size
    for _ in range(10):
        area = rng.uniform(min_share, 1.0) * W * H
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= W and 0 < h <= H:
            x, y = rng.randint(0, W - w), rng.randint(0, H - h)
            break
    else:  # very elongated images: the whole shorter side
        w, h = min(W, round(H * 4 / 3)), min(H, round(W / (3 / 4)))
        x, y = (W - w) // 2, (H - h) // 2
    return image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)


def center_crop(image, _rng=None, *, size, share):
    """Resize the shorter side to size / share and cut the central size x size."""
    W, H = image.size
    if max(W, H) > 8 * min(W, H):  # nothing near the ends is looked at, and a 30000 x 1 image would be enlarged to gigabytes
        w, h = min(W, 8 * H), min(H, 8 * W)
        x, y = (W - w) // 2, (H - h) // 2
        image, W, H = image.crop((x, y, x + w, y + h)), w, h
    short = int(size / share)
    w, h = (short, int(short * H / W)) if W < H else (int(short * W / H), short)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((x, y, x + size, y + size))


FILL = tuple(round(255 * m) for m in MEAN)


def affine(image, *coefficients):
    """Pillow's affine map, output -> input pixels, bicubic, mean colour outside."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=FILL)


def posterize(image, bits):
    """Keep the upper bits; Pillow 13 refuses 0 bits, which older versions turn black."""
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def solarize_add(image, amount):
    """Add to the values below 128."""
    return image.point([min(255, v + amount) if v < 128 else v for v in range(256)] * 3)


def enhance(kind):
    """An operation (image, m, sign) that moves one of Pillow's enhancers away from 1 by 0.9 m / 10."""
    return lambda image, m, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * m / 10))


RANDAUGMENT = (  # (image, magnitude m in [0, 10], sign) -> image; timm's "increasing" set in its order
    lambda image, m, sign: ImageOps.autocontrast(image),
    lambda image, m, sign: ImageOps.equalize(image),
    lambda image, m, sign: ImageOps.invert(image),
    lambda image, m, sign: image.rotate(sign * 30 * m / 10, Image.Resampling.BICUBIC, fillcolor=FILL),
    lambda image, m, sign: posterize(image, 4 - int(4 * m / 10)),
    lambda image, m, sign: ImageOps.solarize(image, 256 - min(256, int(256 * m / 10))),
    lambda image, m, sign: solarize_add(image, min(128, int(110 * m / 10))),
    enhance(ImageEnhance.Color),
    enhance(ImageEnhance.Contrast),
    enhance(ImageEnhance.Brightness),
    enhance(ImageEnhance.Sharpness),
    lambda image, m, sign: affine(image, 1, sign * 0.3 * m / 10, 0, 0, 1, 0),                       # shear x
    lambda image, m, sign: affine(image, 1, 0, 0, sign * 0.3 * m / 10, 1, 0),                       # shear y
    lambda image, m, sign: affine(image, 1, 0, sign * 0.45 * m / 10 * image.width, 0, 1, 0),        # translate x
    lambda image, m, sign: affine(image, 1, 0, 0, 0, 1, sign * 0.45 * m / 10 * image.height),       # translate y
)


def parse_randaug(text):
    """"rand-m9-mstd0.5-inc1" -> (magnitude, its standard deviation, layers); "none" -> None. Raises InputError otherwise."""
    if text == "none":
        return None
    found = re.fullmatch(r"rand-m(\d+(?:\.\d+)?)(?:-n(\d+))?(?:-mstd(\d+(?:\.\d+)?))?-inc1", text)
    if not found or float(found[1]) > 10:
        raise InputError(f"--randaug {text!r}, expected none or rand-mM[-nLAYERS][-mstdS]-inc1 with M at most 10")
    return float(found[1]), float(found[3] or 0), int(found[2] or 2)


def randaugment(image, magnitude, deviation, layers, rng):
    """`layers` operations drawn with replacement, each carried out with probability 1/2 (arXiv 1909.13719, timm's form)."""
    for operation in rng.choices(RANDAUGMENT, k=layers):
        if rng.random() <= 0.5:
            m = min(10.0, max(0.0, rng.gauss(magnitude, deviation)))
            image = operation(image, m, rng.choice((1, -1)))
    return image


def augment(image, rng, *, size, min_crop, randaug):
    """Random crop, flip and RandAugment (`parse_randaug`'s result) of an RGB image; `rng` makes all draws."""
    image = random_resized_crop(image, size, min_crop, rng)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return randaugment(image, *randaug, rng) if randaug else image


def normalize(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) with ImageNet's mean and deviation, channels-last in memory."""
    mean, std = pixel_statistics(images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)


@cache
def pixel_statistics(device):
    """255 * ImageNet's mean and deviation, copied to the device once: every copy would wait for it."""
    return tuple(255 * torch.tensor(t, device=device) for t in (MEAN, STD))


def erase(x, probability, rng):
    """Random erasing (arXiv 1708.04896) of x (B, C, H, W): with `probability` an image gets one box of N(0, 1) noise a pixel."""
    if probability == 0:
        return x
    B, _, H, W = x.shape
    boxes = np.zeros((B, 4, 1, 1, 1), np.int64)             # top, bottom, left, right
    for i in range(B):
        if rng.random() > probability:
            continue
        for _ in range(10):
            area, ratio = rng.uniform(0.02, 1 / 3) * H * W, math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < H and w < W:
                top, left = rng.randint(0, H - h), rng.randint(0, W - w)
                boxes[i, :, 0, 0, 0] = top, top + h, left, left + w
                break
    boxes = torch.from_numpy(boxes)
    boxes = (boxes.pin_memory() if x.is_cuda else boxes).to(x.device, non_blocking=True)
    top, bottom, left, right = boxes.unbind(1)                                                       # each (B, 1, 1, 1)
    row, column = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)                     # (B, 1, H, W)
    return torch.where(inside, torch.randn_like(x), x)


def mix(x, labels, *, classes, smoothing, mixup, cutmix, rng):
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with its reverse, one draw a batch.

    Args: x (B, C, H, W); labels (B,); mixup, cutmix: Beta parameters, 0 is off, both on means a fair coin.
    Returns: x and soft targets (B, classes), label smoothing included.
    """
    targets = torch.full((len(x), classes), smoothing / classes, device=x.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    if not (mixup or cutmix):
        return x, targets
    if cutmix and (not mixup or rng.random() < 0.5):
        H, W = x.shape[2:]
        cut = math.sqrt(1 - rng.betavariate(cutmix, cutmix))
        h, w, y, x0 = int(H * cut), int(W * cut), rng.randrange(H), rng.randrange(W)
        top, bottom, left, right = max(0, y - h // 2), min(H, y + h // 2), max(0, x0 - w // 2), min(W, x0 + w // 2)
        other, x = x.flip(0), x.clone()
        x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (H * W)
    else:
        keep = rng.betavariate(mixup, mixup)
        x = x * keep + x.flip(0) * (1 - keep)
    return x, targets * keep + targets.flip(0) * (1 - keep)


# ------------------------------------------------------------------------------------------------ schedule and weights
def lr_at(step, *, peak, floor, warmup, total, start=1e-6):
    """Learning rate of an update: linear from `start` over `warmup` updates, then a cosine that began at update 0."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / total)) / 2


def decay_groups(model, weight_decay):
    """AdamW groups: decay for weights with two axes or more, none for biases, norms and layer-scale vectors."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [dict(params=weights, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]


@torch.no_grad()
def update_average(average, model, decay):
    """Exponential moving average of all weights and statistics, in place; integer buffers are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    averaged, current = zip(*[pair for pair in pairs if pair[0].is_floating_point()])
    torch._foreach_lerp_(averaged, current, 1 - decay)
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)


# --------------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(path, state):
    """Write to a temporary file, sync, rename: whatever happens, `path` is whole. Raises InputError if the disk refuses."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({str(error).splitlines()[0]}); the previous checkpoint is untouched") from None


def read_checkpoint(path):
    """A checkpoint or weight file on the CPU, tensors and plain types only. Raises InputError if missing or damaged."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):        # the authors' files hold one
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for damaged files
        raise InputError(f"cannot read {path}: damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def find_checkpoint(resume, output):
    """The checkpoint that `--resume` means: the file itself; for "auto" the newest readable one of `output`, or None."""
    if resume != "auto":
        return read_checkpoint(resume)
    for path in sorted(Path(output).glob("*.pt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            state = read_checkpoint(path)
            if "step" in state:
                return state
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return None


def load_weights(model, state, entry="model"):
    """Copy a weight file into `model`; all must fit but the classifier, which another number of classes leaves out.

    Args: state, our checkpoint (`entry` of it), a bare state dict, or the authors' released file.
    Returns: names of the classifier's tensors left as they were. Raises: InputError if the weights are another model's.
    """
    state = state[entry] if isinstance(state.get(entry), dict) else state
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if "patch_embed.proj.0.weight" in state and hasattr(model, "convert_released"):
        state = model.convert_released(state)
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    odd = [k for k in own.keys() ^ fits.keys() | state.keys() ^ fits.keys() if not k.startswith("head.")]
    if odd:
        raise InputError(f"the weights do not fit {type(model).__name__}: {len(odd)} tensors are missing, left over or of another shape, "
                         f"first {min(odd)}; another model's, or is --released wrong?")
    model.load_state_dict({**own, **fits})
    return sorted(own.keys() - fits.keys())


# ----------------------------------------------------------------------------------------------------------------- log
def append(path, **record):
    """Add one JSON line to a log, on a line of its own even after a write that was cut off."""
    with open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def describe_run(args, procs, model):
    """The first record of a log: arguments, versions, commit, device, parameters."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    device = torch.cuda.get_device_name() if procs.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return dict(args=vars(args), commit=commit, python=sys.version.split()[0], torch=torch.__version__,
                numpy=np.__version__, pillow=PIL.__version__, device=device, processes=procs.world,
                parameters=sum(p.numel() for p in model.parameters()))


def draw_curves(output, metrics):
    """Draw curves.png of a run's log: training and validation loss, and the `metrics` of its epochs, over updates."""
    records = []
    for line in (output / "log.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # a kill or a full disk leaves half a line
            continue
    steps = {r["step"]: r for r in records if "step" in r and "lr" in r}
    epochs = {r["step"]: r for r in records if "step" in r and "lr" not in r}
    panels = [{"training loss": {s: r["loss"] for s, r in steps.items()},
               "validation loss": {s: r["loss"] for s, r in epochs.items() if "loss" in r}},
              {m: {s: r[m] for s, r in epochs.items() if m in r} for m in metrics}]
    sheet = Image.new("RGB", (1000, 380), "white")
    draw = ImageDraw.Draw(sheet)
    for left, lines in zip((60, 560), panels):
        lines = {name: {s: v for s, v in line.items() if math.isfinite(v)} for name, line in lines.items()}
        points = [(s, v) for line in lines.values() for s, v in line.items()]
        if not points:
            continue
        (s0, s1), (v0, v1) = ((min(axis), max(axis)) for axis in zip(*points))
        place = lambda s, v: (left + 400 * (s - s0) / max(s1 - s0, 1), 340 - 290 * (v - v0) / max(v1 - v0, 1e-9))  # noqa: B023, E731
        draw.rectangle((left, 50, left + 400, 340), outline="black")
        for value in (v0, (v0 + v1) / 2, v1):
            draw.text((left - 6, place(s0, value)[1]), f"{value:.3g}", "black", anchor="rm")
        for s in (s0, s1):
            draw.text((place(s, v0)[0], 346), f"update {s}", "black", anchor="ma")
        for i, (name, line) in enumerate(lines.items()):
            colour = ("#1f6fb4", "#d9541e", "#3a923a", "#7d4fa0")[i]
            draw.text((left + 130 * i, 30), name, colour)
            line = [place(s, v) for s, v in sorted(line.items())]
            draw.line(line, colour, 2)
            for x, y in line if len(line) < 60 else ():
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
    sheet.save(output / "curves.png")


# ---------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, source, args, procs):
    """Top-1 and top-5 (per cent) and mean loss of `model` over all images of `source`, each counted once on any number of processes.

    Raises: InputError for an unreadable image; testing never substitutes.
    """
    model.eval()
    share = range(procs.rank, len(source), procs.world)
    batches = [[(0, i, 0) for i in share[start:start + args.micro_batch]] for start in range(0, len(share), args.micro_batch)]
    crop = args.test_crop or (0.875 if args.img_size < 384 else 1.0)
    samples = Samples(source, partial(center_crop, size=args.img_size, share=crop), args.seed, replace=0)
    sums, seen = torch.zeros(3, dtype=torch.float64, device=procs.device), 0        # top-1, top-5, loss; images
    for images, labels, unreadable in loader(samples, batches, args.workers, procs.device):
        if images is None:
            raise InputError(f"validation image cannot be decoded: {unreadable[0]}")
        labels = labels.to(procs.device, non_blocking=True)
        with autocast(args, procs.device):
            logits = model(normalize(images.to(procs.device, non_blocking=True)))
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]      # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums, seen = sums + torch.stack([best[:, 0].sum(), best.sum(), loss]).double(), seen + len(labels)
    top1, top5, loss, images = procs.reduce(torch.cat([sums.cpu(), torch.tensor([seen], dtype=torch.float64)]))
    assert images == len(source), f"{images} images counted, {len(source)} exist"
    return dict(top1=100 * top1 / images, top5=100 * top5 / images, loss=loss / images)


def autocast(args, device):
    """The autocast context that --amp asks for."""
    return torch.autocast(device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16, enabled=args.amp != "none")


# ---------------------------------------------------------------------------------------------------------------- loop
def build_model(args, classes):
    """The backbone that the flags name, with its paper's drop path unless --drop-path is given."""
    options = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    return MODELS[args.model](num_classes=classes, **options, **({"released": True} if args.released else {}))


def split_batch(args, world, most=128):
    """Settle --micro-batch: the largest divisor of each process's share up to `most` unless given. Raises InputError if uneven."""
    share, rest = divmod(args.batch_size, world)
    if rest:
        raise InputError(f"--batch-size {args.batch_size} does not split over {world} processes")
    args.micro_batch = args.micro_batch or max(m for m in range(1, min(share, most) + 1) if share % m == 0)
    if share % args.micro_batch:
        raise InputError(f"--batch-size {args.batch_size} is not a multiple of --micro-batch {args.micro_batch} x {world} processes")
    if args.micro_batch == 1 and args.img_size == 32 and not args.frozen_bn:
        raise InputError("--micro-batch 1 at --img-size 32 leaves batch norm a single value a channel; use 2 or more")


def train(args, procs, checkpoint):
    """The run: data, model, optimizer, then update after update until the last epoch, --max-steps or a signal."""
    train_set, val_set = open_data(args.data)
    procs.wait()                                                            # listing a million files takes nodes unequal times
    classes = len(train_set.classes)
    split_batch(args, procs.world)
    schedule = dict(images=len(train_set), batch=args.batch_size, micro=args.micro_batch, rank=procs.rank, world=procs.world,
                    seed=args.seed, repeats=args.repeated_aug)
    sampler = StepSampler(**schedule)
    per_epoch = sampler.per_epoch
    if per_epoch == 0:
        raise InputError(f"--batch-size {args.batch_size} is larger than the {sampler.used} training images of an epoch")
    total = args.epochs * per_epoch
    last = min(total, args.max_steps or total)

    torch.manual_seed(args.seed)
    model = build_model(args, classes)
    if args.weights and not checkpoint:
        left = load_weights(model, read_checkpoint(args.weights))
        if procs.rank == 0:
            print(f"{args.weights}: loaded{', without ' + ' and '.join(left) + ': other classes' if left else ''}")
    if args.sync_bn and procs.world > 1 and procs.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(procs.device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    average = copy.deepcopy(model).eval().requires_grad_(False) if args.ema else None
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(procs.device.type, enabled=args.amp == "fp16")
    step, evaluated, best, epoch_loss, unreadable = 0, 0, -1.0, 0.0, 0
    resumed = bool(checkpoint)                                              # restore() empties it
    if resumed:
        step, evaluated, best, epoch_loss, unreadable = restore(checkpoint, model, average, optimizer, scaler, args, per_epoch)
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
        log(**describe_run(args, procs, model), resumed_at=step)
        print(f"{args.model}: batch {args.batch_size}, {args.micro_batch} at once on each of {procs.world} processes, "
              f"peak rate {args.lr:g}, {total} updates in {args.epochs} epochs of {per_epoch}, on {procs.device.type}, amp {args.amp}")
    saved_at = step if resumed else None

    def save(name):
        nonlocal saved_at
        if not math.isfinite(sum(p.detach().double().sum() for p in model.parameters())):
            raise InputError(not_finite("weights", step, lr, output, saved_at))
        procs.share_buffers(*(m for m in (model, average) if m))
        if procs.rank == 0:
            save_checkpoint(output / name, dict(
                model=model.state_dict(), ema=average.state_dict() if average else None, optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(), step=step, evaluated=evaluated, best=best, epoch_loss=epoch_loss, unreadable=unreadable,
                per_epoch=per_epoch, args=vars(args)))
        procs.wait()
        saved_at = step

    samples = Samples(train_set, partial(augment, size=args.img_size, min_crop=args.min_crop, randaug=parse_randaug(args.randaug)),
                      args.seed, replace=9)
    batches = iter(loader(samples, StepSampler(**schedule, first=step, last=last), args.workers, procs.device))
    stop, scores, named = StopSignal(), {}, set()                           # named: unreadable files reported so far
    lr, losses, broken, clock, seconds = 0.0, [], [], 0.0, 0.0              # losses, broken, clock: since the last log line
    with tqdm(total=last * args.batch_size, initial=step * args.batch_size, unit="img", disable=procs.rank > 0) as bar:
        while True:
            stopping = procs.any(stop.caught)
            epoch_ends = step // per_epoch > evaluated
            if losses and (len(losses) >= args.log_every or epoch_ends or stopping or step == last):
                values = [v / procs.world for v in procs.reduce(torch.stack(losses).double())]
                for i, value in enumerate(values):
                    if not math.isfinite(value):
                        failed = step - len(values) + i
                        rate = lr_at(failed, peak=args.lr, floor=args.min_lr, warmup=args.warmup_epochs * per_epoch, total=total)
                        raise InputError(not_finite(f"loss {value}", failed + 1, rate, output, saved_at))
                elapsed = time.perf_counter() - clock
                seconds, epoch_loss = seconds + elapsed, epoch_loss + sum(values)
                files = procs.gather(broken)
                unreadable += len(files)
                for file in sorted(set(files) - named) if procs.rank == 0 else ():
                    log(unreadable_file=file)
                    tqdm.write(f"cannot decode {file}; using the next file", file=sys.stderr)
                named.update(files)
                log(step=step, epoch=step / per_epoch, loss=sum(values) / len(values), lr=lr, time=time.time(),
                    images_per_s=len(values) * args.batch_size / elapsed)
                bar.set_postfix(loss=f"{values[-1]:.3f}", lr=f"{lr:.1e}", **{k: f"{v:.1f}" for k, v in scores.items() if "top1" in k})
                losses, broken = [], []
            if epoch_ends and not stopping:
                save("last.pt")                                             # first of all: testing takes a while and may be killed
                scores = evaluate(model, val_set, args, procs)
                if average:
                    scores |= {f"ema_{k}": v for k, v in evaluate(average, val_set, args, procs).items()}
                evaluated, score = step // per_epoch, max(scores["top1"], scores.get("ema_top1", 0.0))
                improved, best = score > best, max(score, best)
                state = optimizer.state[next(model.parameters())]           # fp16: an overflow skips an update and halves the scale
                log(step=step, epoch=evaluated, train_loss=epoch_loss / per_epoch, **scores, best=best, unreadable=unreadable,
                    scaler_skips=step - int(state["step"]), train_seconds=seconds, time=time.time())
                epoch_loss, unreadable, seconds = 0.0, 0, 0.0
                for name in ("best.pt", "last.pt") if improved else ("last.pt",):
                    save(name)
                if procs.rank == 0:
                    draw_curves(output, [m for m in ("top1", "ema_top1") if m in scores])
                continue
            if step >= last or stopping:
                break
            if not losses:
                clock = time.perf_counter()
            lr = lr_at(step, peak=args.lr, floor=args.min_lr, warmup=args.warmup_epochs * per_epoch, total=total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, files = update(net, optimizer, scaler, batches, step, classes, args, procs)
            if average:
                update_average(average, model, args.ema)
            losses.append(loss)
            broken += files
            step += 1
            bar.update(args.batch_size)
            bar.set_description(f"epoch {step / per_epoch:.1f}/{args.epochs}")
    if saved_at != step:
        save("last.pt")
    if procs.rank == 0:
        if stopping and (step < total or epoch_ends):                       # the last epoch may be untested
            print(f"stopped after update {step}; resume with --resume {output / 'last.pt'}")
        else:
            print(f"update {step}: " + "".join(f"{k} {v:.2f} %, " for k, v in scores.items() if "top" in k)
                  + (f"best {best:.2f} %; see {output}/log.jsonl, last.pt, best.pt, curves.png" if best >= 0
                     else f"not tested yet; see {output}/log.jsonl, last.pt"))


def update(net, optimizer, scaler, batches, step, classes, args, procs):
    """One update of the weights from this process's micro-batches.

    Returns: mean loss (a tensor, so that nothing waits for the device) and the files that could not be decoded.
    """
    net.train(not args.frozen_bn)
    accumulate = args.batch_size // (args.micro_batch * procs.world)
    total, unreadable = torch.zeros((), device=procs.device), []
    for i in range(accumulate):
        images, labels, broken = next(batches)
        unreadable += broken
        if images is None:
            raise InputError(f"ten files in a row cannot be decoded, the last one {broken[-1]}")
        rng = random.Random(repr((BATCH, args.seed, step, i * procs.world + procs.rank)))
        torch.manual_seed(rng.getrandbits(63))                              # for erasing noise and drop path
        x = erase(normalize(images.to(procs.device, non_blocking=True)), args.random_erase, rng)
        x, targets = mix(x, labels.to(procs.device, non_blocking=True), classes=classes, smoothing=args.label_smoothing,
                         mixup=args.mixup, cutmix=args.cutmix, rng=rng)
        if procs.world > 1:
            net.require_backward_grad_sync = i == accumulate - 1            # DDP exchanges gradients once an update
        with autocast(args, procs.device):
            loss = F.cross_entropy(net(x).float(), targets) / accumulate
        scaler.scale(loss).backward()
        total += loss.detach()
    if args.clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return total, unreadable


def restore(checkpoint, model, average, optimizer, scaler, args, per_epoch):
    """Put a checkpoint's states back, strictly, and empty it.

    Returns: step, evaluated epochs, best score, sums of the unfinished epoch. Raises: InputError if it is another run's.
    """
    if checkpoint["per_epoch"] != per_epoch:
        raise InputError(f"epochs of the checkpoint have {checkpoint['per_epoch']} updates, of this run {per_epoch}: other data or batch?")
    try:
        model.load_state_dict(checkpoint["model"])
        if average:
            average.load_state_dict(checkpoint["ema"] or checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        counters = [checkpoint[k] for k in ("step", "evaluated", "best", "epoch_loss", "unreadable")]
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint does not fit this run: {' '.join(str(error).split())[:200]}") from None
    for group, decay in zip(optimizer.param_groups, (args.weight_decay, 0.0)):
        group["weight_decay"] = decay
        for p in group["params"]:                                           # fused AdamW needs moments in their weights' layout
            state = optimizer.state[p]
            state.update({k: torch.empty_like(p).copy_(state[k]) for k in ("exp_avg", "exp_avg_sq") if k in state})
    checkpoint.clear()
    return counters


def not_finite(what, step, lr, output, saved_at):
    """The message of a run that stops because something became infinite or not a number."""
    return (f"{what} at update {step} not finite, learning rate {lr:.3g}; last finite checkpoint: "
            f"{'none yet' if saved_at is None else f'{output}/last.pt of update {saved_at}'}")


def test(args, procs, checkpoint):
    """--eval: print one JSON line with the scores of the weights, and of their average if the file holds one."""
    _, val_set = open_data(args.data)
    args.micro_batch = args.micro_batch or 128
    scores = {}
    for entry in ("model", "ema") if checkpoint.get("ema") else ("model",):
        model = build_model(args, len(val_set.classes))
        if load_weights(model, checkpoint, entry):
            raise InputError(f"the classifier of {args.weights} is not one of {len(val_set.classes)} classes")
        result = evaluate(model.to(procs.device), val_set, args, procs)
        scores |= {f"ema_{k}" if entry == "ema" else k: v for k, v in result.items()}
    if procs.rank == 0:
        print(json.dumps(dict(model=args.model, weights=args.weights, images=len(val_set), **scores)))


def main(argv=None):
    """Settle the arguments, start the processes, train or test."""
    args = parse_args(argv)
    checkpoint = None
    if args.eval:
        if not args.weights:
            raise InputError("--eval needs --weights FILE")
        checkpoint = read_checkpoint(args.weights)
    elif args.resume:
        checkpoint = find_checkpoint(args.resume, args.output or f"runs/{args.model or 'linglo_b0'}")
        if checkpoint and not {"step", "args", "per_epoch"} <= checkpoint.keys():
            raise InputError(f"{args.resume} is no checkpoint of this script; to start from its weights use --weights")
        if checkpoint and args.model and args.model != checkpoint["args"]["model"]:
            raise InputError(f"the checkpoint is one of {checkpoint['args']['model']}, --model says {args.model}")
    settle(args, checkpoint)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    procs = Processes(patience=600 if args.compile else 60)
    if procs.rank == 0 and not args.data:
        print("no --data given: drawing 1000 training and 300 validation images of 10 classes", file=sys.stderr)
    (test if args.eval else train)(args, procs, checkpoint)
    procs.close()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"train_imagenet.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
