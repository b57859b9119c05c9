"""Train or evaluate any of the backbones as an image classifier. Plain PyTorch, one visible loop.

    python train_imagenet.py                                    # no data needed: renders its own
    python train_imagenet.py --model secvit_t --released --data /data/imagenet --output runs/t
    torchrun --nproc-per-node 8 train_imagenet.py --model stvit_s --data /data/imagenet \\
        --output runs/s
    torchrun --nproc-per-node 8 --max-restarts 3 train_imagenet.py ... --resume auto
    python train_imagenet.py --eval --weights runs/s/best.pt --data /data/imagenet
    python train_imagenet.py --predict photo.jpg folder --weights runs/s/best.pt
    # STViT at 384:
    torchrun --nproc-per-node 8 train_imagenet.py --model stvit_s --data /data/imagenet \\
        --weights runs/s/last.pt --output runs/s384 --frozen-bn --img-size 384 --epochs 30 \\
        --batch-size 512 --lr 5e-6 --min-lr 5e-6 --warmup-epochs 0 --weight-decay 1e-8

Reading order: settings, processes, data, augmentation, checkpoints, log, the task, the training
loop (`train`), command line. train_dense.py runs the same loop with other task objects.

Defaults are DeiT's (arXiv 2012.12877); OVERRIDES holds what a model family and the drawn images
change. Randomness is stateless: augmentation depends on (seed, epoch, sample), mixing and drop path
on (seed, step, micro-batch). So a run is the same for any number of workers and after any
interruption, and with one --micro-batch and no SyncBN any number of processes has the same loss;
BatchNorm's running statistics are those of the first process.

Deliberate differences from the authors' scripts: --batch-size is global; the rate is a function of
the step; a plain run reshuffles every epoch; layer-scale vectors are exempt from weight decay;
evaluation counts each image once. CutMix rounds half of a box's side down at both ends, as timm
0.4.12, which the authors used, and not, as timm 1.0.31, up at the far one (a box of an odd side is
one pixel larger there). SecViT's peak rate is DeiT's 1e-3 for batches of 1024, as its paper says;
the authors' logs, 2e-3, fit batches of 2048 by the same rule.
"""
import argparse
import copy
import ctypes
import datetime
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # set before torch is imported, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)           # Ctrl-C ends without a traceback
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # lost connections: one line, not C++'s

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clustr
import linglo
import secvit
import stvit

MODELS = {}
for module in (clustr, secvit, linglo, stvit):
    MODELS |= {name: getattr(module, name) for name in module.VARIANTS}
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
SAMPLE, BATCH, ORDER, RENDERING = range(4)  # first entry of every seed: no two streams share one


# ----------------------------------------------------------------------------------------- settings
class InputError(ValueError):
    """A user's mistake; the message names the value and the rule and is all that is printed."""


class Flag(NamedTuple):
    """One row of a table of flags.

    type: bool for a switch, argparse.BooleanOptionalAction for --name and --no-name, a tuple of
    choices, or a function from the typed text to the value; default: a value, or None if it
    depends on other flags, which `help` then explains; restored: whether a resumed run
    takes it from the checkpoint; several: whether it takes a list.
    """

    type: object
    default: object
    help: str
    restored: bool = True
    several: bool = False


OnceFlag = partial(Flag, restored=False)  # not restored from a checkpoint


def bounded(kind, low, high=math.inf, *, above=False):
    """Flag type: an int or float from `low` to `high`, or above `low`."""
    def parse(typed):
        value = kind(typed)
        too_low = not (low < value if above else low <= value)  # true for nan
        if too_low or value > high or value == math.inf:
            rule = f"{'above' if above else 'at least'} {low}"
            if high < math.inf:
                rule += f", at most {high}"
            raise argparse.ArgumentTypeError(f"{typed}, expected {rule}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def nonempty(value):
    """Flag type: a string that is neither empty, as an unset shell variable, nor undecodable."""
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def option(typed):
    """Flag type: "grids=8,4,1,1" -> ("grids", (8, 4, 1, 1)), see `parse_value`."""
    name, equals, value = typed.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{typed!r}, expected NAME=VALUE")
    return name, parse_value(value)


def parse_value(typed):
    """A number, true, false, none or a name; with commas a tuple, whose entries may be tuples, too.

    The inner ones are written with colons: "64:16,4" -> ((64, 16), 4).
    """
    for separator in ",:":
        if separator in typed:
            return tuple(parse_value(part) for part in typed.split(separator) if part)
    words = {"true": True, "false": False, "none": None}
    if typed.lower() in words:
        return words[typed.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(typed)
    return typed


COUNT = bounded(int, 1)
POSITIVE = bounded(float, 0, above=True)
NOT_NEGATIVE = bounded(float, 0)
FRACTION = bounded(float, 0, 1)
BELOW_ONE = bounded(float, 0, 0.99)
ON_OFF = argparse.BooleanOptionalAction

# Images per process and forward pass, unless --micro-batch is given. It does not follow a GPU's
# memory, since BatchNorm's statistics, mixing and drop path depend on it, and so would the results.
MAX_MICRO_BATCH = 128
TEST_CROP = 0.875  # default of --test-crop; larger images are evaluated whole
WHOLE_TEST_IMAGE = 384  # pixels from which on they are
MAX_PER_CLASS = 200  # classes, up to which --eval prints a metric of each; ADE20K has 150
LOG_SECONDS = 30  # between two writings of a progress bar into a file
WARMUP_START = 1e-6  # learning rate of update 0 if there is a warm-up

RUN_FLAGS = {  # of both scripts
    "released": Flag(bool, False, "the architecture of SecViT's released weights; found out from "
                     "weights, if any"),
    "option": Flag(option, None, "NAME=VALUE, an argument of the model's class, such as "
                   "aggregation=grid or ratios=64:16,16:4,4:1,1; an unknown name prints them all",
                   several=True),
    "output": OnceFlag(nonempty, None, "folder for log.jsonl, last.pt, best.pt, curves.png"),
    "micro_batch": Flag(COUNT, None, "images per process and forward pass; gradients accumulate "
                        "up to --batch-size; default: a divisor of it"),
    "clip_grad": Flag(POSITIVE, None, "clip gradients to this norm; default off"),
    "drop_path": Flag(BELOW_ONE, None, "stochastic depth of the last block; default: the paper's"),
    "ema": Flag(bounded(float, 0, 0.9999999), 0.0, "decay of averaged weights, 0 is off"),
    "amp": Flag(("none", "bf16", "fp16"), None, "autocast type of training and evaluation; "
                "default bf16 on a GPU, else none"),
    "compile": Flag(bool, False, "torch.compile the model for training"),
    "channels_last": Flag(bool, False, "store convolution weights channels-last"),
    "deterministic": Flag(bool, False, "only deterministic GPU kernels: slower, repeatable"),
    "workers": OnceFlag(bounded(int, 0, 256), None, "loader processes per process; changes speed "
                        "only; default: its CPU cores, at most 10"),
    "seed": Flag(bounded(int, 0, 2 ** 63 - 1), 0, "random seed of initialisation, order and "
                 "augmentation"),
    "log_every": Flag(COUNT, 50, "updates between log lines"),
    "max_steps": OnceFlag(COUNT, None, "save and stop after this many updates, without "
                          "changing the schedule"),
    "resume": OnceFlag(nonempty, None, "checkpoint to continue exactly; it restores every flag you "
                       "do not override; auto: the latest one in --output, if any"),
    "overwrite": OnceFlag(bool, False, "replace an earlier run in --output"),
    "eval": OnceFlag(bool, False, "only evaluate --weights and print one JSON line"),
}
FLAGS = {
    "model": Flag(nonempty, "linglo_b0", f"one of {', '.join(MODELS)}"),
    "data": OnceFlag(nonempty, None, "folder with train/<class>/* and val/<class>/*; default: "
                     "drawn images"),
    "epochs": Flag(COUNT, 300, "length of training and of the cosine"),
    **RUN_FLAGS,
    "weights": OnceFlag(nonempty, None, "start from these weights: a checkpoint, whose model is "
                        "then the default, a bare state dict or an authors' file"),
    "batch_size": Flag(COUNT, 1024, "images per update, over all processes and accumulation"),
    "lr": Flag(NOT_NEGATIVE, 1e-3, "peak learning rate at this --batch-size, never rescaled"),
    "weight_decay": Flag(NOT_NEGATIVE, 0.05, "AdamW's weight decay"),
    "min_lr": Flag(NOT_NEGATIVE, 1e-5, "learning rate at the end of the cosine"),
    "warmup_epochs": Flag(NOT_NEGATIVE, 5.0, f"linear warm-up from {WARMUP_START:g}"),
    "img_size": Flag(bounded(int, 32, 8192), 224, "side of the square images"),
    "mixup": Flag(bounded(float, 0, 100), 0.8, "Beta parameter of mixup, 0 is off"),
    "cutmix": Flag(bounded(float, 0, 100), 1.0, "Beta parameter of CutMix, 0 is off"),
    "label_smoothing": Flag(BELOW_ONE, 0.1, "fraction of a target spread over all classes"),
    "randaug": Flag(nonempty, "rand-m9-mstd0.5-inc1", "RandAugment in timm's notation, or none"),
    "random_erase": Flag(FRACTION, 0.25, "probability of replacing a box of an image by noise"),
    "repeated_aug": Flag(bounded(int, 1, 100), 3, "copies of each image per epoch, of fewer "
                         "images, 1 is off"),
    "min_crop": Flag(bounded(float, 0, 1, above=True), 0.08, "smallest area of a random crop"),
    "test_crop": Flag(bounded(float, 0.1, 1), None, "evaluated fraction of the resized shorter "
                      f"side; default {TEST_CROP}, from {WHOLE_TEST_IMAGE} pixels on 1"),
    "sync_bn": Flag(ON_OFF, False, "batch statistics over all GPUs"),
    "frozen_bn": Flag(bool, False, "train in eval mode: BatchNorm statistics fixed, no drop path"),
    "results": OnceFlag(nonempty, None, "with --eval: write the class and the five most probable "
                        "classes of each image to this file, a JSON line each"),
    "score": OnceFlag(nonempty, None, "print the accuracies of a file of --results on --data"),
    "predict": OnceFlag(nonempty, None, "print the five most probable classes of these images, or "
                        "of all images in these folders, as JSON lines", several=True),
}
SECVIT = dict(ema=0.99992, sync_bn=True)
OVERRIDES = {  # what a model family, then the drawn images, set differently
    "secvit": SECVIT,
    "sec": SECVIT,  # SEC-Swin and SEC-FasterViT
    "drawn images": dict(
        epochs=12, batch_size=32, lr=1e-3, warmup_epochs=1.0, img_size=64, mixup=0.0, cutmix=0.0,
        randaug="none", random_erase=0.0, repeated_aug=1, min_crop=0.9, test_crop=1.0, ema=0.0,
        drop_path=0.0),
}


def raise_input_error(message):
    raise InputError(message)


def make_parser(description, flags, overrides):
    """The parser of a table of flags; what is not given is None, see `fill_defaults`."""
    formatter = partial(argparse.HelpFormatter, max_help_position=28, width=100)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=formatter)
    parser.error = raise_input_error
    for name, flag in flags.items():
        options = dict(default=None, help=help_text(name, flag, overrides))
        if flag.type in (bool, ON_OFF):
            options["action"] = "store_true" if flag.type is bool else ON_OFF
        elif isinstance(flag.type, tuple):
            options["choices"] = flag.type
            options["type"] = type(flag.type[0])
        else:
            options["type"] = flag.type
        if flag.several:
            options["action"] = "extend"  # the flag may also be repeated
            options["nargs"] = "+"
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser


def help_text(name, flag, overrides):
    """A flag's help with its default and what each group of `overrides` sets instead."""
    defaults = []
    if flag.default is not None and flag.type is not bool:
        defaults.append(f"default {flag.default}")
    for group, values in overrides.items():
        value = values.get(name)
        typable = not isinstance(flag.type, tuple) or value in flag.type
        if value is not None and typable:
            defaults.append(f"{group} {value}")
    return flag.help + (f" ({'; '.join(defaults)})" if defaults else "")


def fill_defaults(args, flags, overrides, saved):
    """A copy of `args` in which every flag that was not given has its value.

    In rising order of preference: the table's default, the `overrides` (dicts) in their order, the
    `saved` arguments of a checkpoint, what the user typed.
    """
    values = {name: flag.default for name, flag in flags.items()}
    for override in overrides:
        values |= override
    values |= {k: v for k, v in saved.items() if k in flags and flags[k].restored}
    values |= {k: v for k, v in vars(args).items() if v is not None}
    return argparse.Namespace(**values)


def replace_flags(args, **values):
    """A copy of `args` with other values of some flags."""
    return argparse.Namespace(**{**vars(args), **values})


def default_output(*names):
    """The folder of a run without --output."""
    return f"runs/{'_'.join(names)}"


def resolve_run(args, saved, *names):
    """A copy of `args` with the flags of both scripts that depend on the machine or on `names`."""
    cores = (os.cpu_count() or 1) // environment_number("LOCAL_WORLD_SIZE", 1, low=1)
    defaults = {
        "output": saved.get("output") or default_output(*names),
        "amp": "bf16" if torch.cuda.is_available() else "none",
        "workers": min(10, cores) if args.data else 0,
    }
    missing = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    return replace_flags(args, **missing)


def choose_micro_batch(args, max_micro_batch):
    """--micro-batch, or the largest divisor of each process's part of --batch-size up to a limit.

    Raises: InputError if the batch does not split evenly.
    """
    world = environment_number("WORLD_SIZE", 1, low=1)
    part, remainder = divmod(args.batch_size, world)
    if remainder:
        raise InputError(f"--batch-size {args.batch_size} does not split over {world} processes")
    if args.micro_batch is None:
        return max(m for m in range(1, min(part, max_micro_batch) + 1) if part % m == 0)
    if part % args.micro_batch:
        raise InputError(f"--batch-size {args.batch_size} is not a multiple of "
                         f"--micro-batch {args.micro_batch} x {world} processes")
    return args.micro_batch


def resolve_args(argv=None):
    """The command line with every flag filled in, and the checkpoint it names, if any.

    Raises: InputError for an unknown model and for flags that contradict each other.
    """
    parser = make_parser("Train or evaluate a backbone on ImageNet-like folders.", FLAGS, OVERRIDES)
    typed = parser.parse_args(argv)
    checkpoint = open_checkpoint(typed)
    start = None
    if checkpoint is None and typed.weights:
        start = read_classifier(typed.weights)
    saved = saved_arguments(checkpoint) if checkpoint else saved_arguments(start, "model", "option")
    model = typed.model or saved.get("model") or FLAGS["model"].default
    if checkpoint and model != saved.get("model", model):
        raise InputError(f"the checkpoint holds {saved['model']}, but --model is {model}")
    if model not in MODELS:
        raise InputError(f"unknown --model {model!r}, expected one of {', '.join(MODELS)}")
    if model != saved.get("model"):
        saved.pop("option", None)
    if is_deployed(model, checkpoint or start):
        saved["option"] = {**(saved.get("option") or {}), "cpe": "folded"}
    released = typed.released or is_released(model, checkpoint or start)
    typed = replace_flags(typed, data=typed.data or saved.get("data"), released=released)
    overrides = [OVERRIDES.get(model.split("_")[0], {})]
    if not (typed.data or typed.predict):
        overrides.append(OVERRIDES["drawn images"])
    args = fill_defaults(typed, FLAGS, overrides, saved)
    args = resolve_run(args, saved, args.model)
    args = replace_flags(args, option=resolve_options(args.model, args.option))
    if args.eval or args.predict or args.score:
        args = replace_flags(args, micro_batch=args.micro_batch or MAX_MICRO_BATCH)
    else:
        args = replace_flags(args, micro_batch=choose_micro_batch(args, MAX_MICRO_BATCH))
    check_args(args)
    return args, checkpoint


def check_args(args):
    """Raise InputError for values that no run can use."""
    if args.released and not args.model.startswith("secvit_"):
        raise InputError(f"--released is a variant of SecViT, not of {args.model}")
    parse_randaug(args.randaug)
    is_single_value = args.micro_batch == 1 and args.img_size == 32
    if is_single_value and not (args.frozen_bn or args.eval or args.predict):
        raise InputError("--micro-batch 1 at --img-size 32 leaves batch norm a single value per "
                         "channel; use 2 or more")


def check_commands(typed, *names):
    """Raise InputError unless the flags ask for at most one of the commands in `names`."""
    given = [name for name in names if getattr(typed, name)]
    if len(given) > 1:
        flags = ", ".join(f"--{name}" for name in names)
        raise InputError(f"{flags} are mutually exclusive")
    for name in given:
        if name in ("eval", "predict") and not typed.weights:
            raise InputError(f"--{name} needs --weights FILE")
    if typed.results and not typed.eval:
        raise InputError("--results is for --eval")


ARGUMENTS_WITH_FLAGS = ("num_classes", "drop_path_rate", "released")


def resolve_options(model, options):
    """{name: value} of --option, pairs or such a dict, as the constructor of `model` takes it.

    Raises: InputError for an unknown name, which lists the model's, and for a wrong value.
    """
    options = dict(options or {})
    if not options:
        return options
    with torch.device("meta"):  # without memory for weights, so fast
        network = MODELS[model](num_classes=1)
        parameters = dict(inspect.signature(type(network)).parameters)
        for name in ARGUMENTS_WITH_FLAGS:
            parameters.pop(name, None)
        arguments = ", ".join(map(str, parameters.values()))
        for name, value in options.items():
            if name not in parameters:
                raise InputError(f"--option {name}: {model} has only {arguments}")
            options[name] = fit_value(name, value, parameters[name].default)
        try:
            MODELS[model](num_classes=1, **options)
        except ValueError as error:
            raise InputError(f"--option: {error}") from None
        except TypeError as error:
            raise InputError(f"--option: a value of another type than in {arguments} "
                             f"({error})") from None
    return options


def fit_value(name, value, default):
    """`value`, entries of tuples of tuples turned into tuples. Raises: InputError for a wrong type.

    default: the constructor's, or inspect.Parameter.empty.
    """
    expected = type(default)
    if default is inspect.Parameter.empty or (value is None and expected is str):
        return value
    if type(value) is not expected:
        kinds = {bool: "true or false", int: "a whole number", str: "a name",
                 tuple: "values separated by commas"}
        raise InputError(f"--option {name}: {value!r}, expected {kinds[expected]}, "
                         f"default {default}")
    if expected is tuple and isinstance(default[0], tuple):
        return tuple(entry if isinstance(entry, tuple) else (entry,) for entry in value)
    return value


def saved_arguments(state, *names):
    """The arguments, or those of these names, in a checkpoint of this script; of others, none."""
    saved = state.get("args") if state else None
    if not isinstance(saved, dict) or str(saved.get("model")) not in MODELS:
        return {}  # the authors' files hold other arguments
    return {name: saved[name] for name in names or saved if name in saved}


def is_released(model, state):
    """True if a file, or None, holds weights of SecViT's released architecture, else None."""
    if state is None or not model.startswith("secvit_"):
        return None
    names = checkpoint_tensors(state).keys()
    released = {"stages.0.0.ffn.conv.weight", "patch_embed.proj.0.weight"} & names
    return bool(released) or None


def is_deployed(model, state):
    """Whether a file, or None, holds weights of LinGlo whose RP-CPE is folded."""
    if state is None or not model.startswith("linglo_"):
        return False
    return any(name.endswith("cpe.branches.0.weight") for name in checkpoint_tensors(state))


def open_checkpoint(typed):
    """The file that --eval, --predict or --resume reads, or None. Raises: InputError."""
    check_commands(typed, "eval", "predict", "score", "resume")
    if typed.resume:
        output = typed.output or default_output(typed.model or FLAGS["model"].default)
        return find_checkpoint(typed.resume, output, "model")
    return read_classifier(typed.weights) if typed.eval or typed.predict else None


def read_classifier(path):
    """The dict in a file of weights. Raises: InputError for a checkpoint of train_dense.py."""
    state = read_checkpoint(path)
    if is_checkpoint(state, "task"):
        raise InputError(f"{path} is a checkpoint of train_dense.py, not of a classifier")
    return state


# ---------------------------------------------------------------------------------------- processes
SILENT = 60     # seconds without a sign of life after which a process counts as lost
SLOW = 30 * 60  # seconds that a process which is alive may keep the others waiting


def environment_number(name, default, low=0):
    """A whole number that torchrun or a scheduler sets. Raises: InputError."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < low:
        raise InputError(f"the environment variable {name} is {value!r}, expected a whole number, "
                         f"at least {low}")
    return int(value)


class Processes:
    """The processes of this run: one when started plainly, torchrun's otherwise.

    NCCL on GPUs, gloo on CPUs. A process that is slow is waited for, one that is lost ends all.
    """

    def __init__(self):
        self.world = environment_number("WORLD_SIZE", 1, low=1)
        self.rank = environment_number("RANK", 0)
        if self.rank >= self.world:
            raise InputError(f"RANK is {self.rank}, but WORLD_SIZE is {self.world}: ranks count "
                             "from 0")
        local = environment_number("LOCAL_RANK", 0)
        cuda = torch.cuda.is_available()
        if cuda and local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU: "
                             f"{torch.cuda.device_count()} found, one needed per process")
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(local)
        self.gloo_group = None
        if self.world > 1:
            self.connect("nccl" if cuda else "gloo")

    def connect(self, backend):
        """Start the process groups and the heartbeat. Raises: InputError."""
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
            if not os.environ.get(name):
                raise InputError(f"WORLD_SIZE is {self.world}, but {name} is not set: start "
                                 "several processes with torchrun")
        address = os.environ["MASTER_ADDR"]
        port = environment_number("MASTER_PORT", 0)
        # torchrun's store survives a restart: the keys of a dead attempt must not be read again
        attempt = "attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        silent = datetime.timedelta(seconds=SILENT)
        slow = datetime.timedelta(seconds=SLOW)
        try:
            if self.rank > 0:
                await_server(address, port)
            store, _, _ = next(dist.rendezvous("env://", timeout=silent))
            second = dist.TCPStore(address, port, is_master=False, timeout=silent)
        except (OSError, OverflowError, ValueError, dist.DistError) as error:
            raise InputError(f"cannot meet the other processes at {address}, port {port} "
                             f"({first_line(error)})") from None
        self.heartbeat = Heartbeat(dist.PrefixStore(attempt, second), self.rank, self.world)
        dist.init_process_group(backend, store=dist.PrefixStore(attempt, store), rank=self.rank,
                                world_size=self.world, timeout=slow)
        self.gloo_group = dist.new_group(backend="gloo", timeout=slow)  # never waits for a GPU

    def reduce(self, values, operation=dist.ReduceOp.SUM):
        """Sum (or another reduction) of a float64 tensor over all processes, as lists."""
        values = values.cpu()
        if self.world > 1:
            dist.all_reduce(values, operation, group=self.gloo_group)
        return values.tolist()

    def any(self, flag):
        """True on every process if `flag` is true on one."""
        return bool(self.reduce(torch.tensor([float(flag)]), dist.ReduceOp.MAX)[0])

    def check_same_step(self, step):
        """Raise InputError unless all processes continue from the same update."""
        extremes = torch.tensor([step, -step], dtype=torch.float64)
        if self.reduce(extremes, dist.ReduceOp.MAX) != [step, -step]:
            raise InputError("the processes found different checkpoints; --output must be on a "
                             "disk that all of them share")

    def share_buffers(self, *models):
        """Copy the first process's BatchNorm statistics to all."""
        for model in models if self.world > 1 else ():
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def gather(self, items):
        """All processes' lists, joined, tensors on the CPU."""
        items = [item.cpu() if isinstance(item, torch.Tensor) else item for item in items]
        lists = [items] * self.world
        if self.world > 1:
            dist.all_gather_object(lists, items, group=self.gloo_group)
        return sum(lists, [])

    def wait(self):
        """Wait until all processes are here, however long the first one writes."""
        if self.world > 1:
            dist.barrier(group=self.gloo_group)

    def close(self):
        """Wait for the others, so that nobody misses this process's heartbeat, and disconnect."""
        if self.world > 1:
            self.wait()
            self.heartbeat.finished.set()
            dist.destroy_process_group()


def await_server(address, port):
    """Wait at most SILENT seconds for the store's server. Raises: OSError."""
    end = time.monotonic() + SILENT
    while True:
        try:
            return socket.create_connection((address, port), timeout=SILENT).close()
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


class Heartbeat:
    """Ends this process when another one has given no sign of life for SILENT seconds.

    Each process counts up its own key of the store and watches that of the next rank. A process
    that writes a large checkpoint or compiles still counts; one that is stopped, or whose machine
    is gone, does not, whatever the others are waiting for: a collective operation would wait SLOW
    seconds.
    """

    def __init__(self, store, rank, world):
        self.store = store
        self.rank = rank
        self.watched = (rank + 1) % world
        self.alive = threading.Event()     # the watched process has counted up since the last look
        self.finished = threading.Event()
        self.interval = SILENT / 20
        for method in (self.count, self.watch):
            threading.Thread(target=method, daemon=True).start()

    def count(self):
        """Count up this process's key, look at the watched one; both may block."""
        latest = 0
        while not self.finished.is_set():
            with suppress(dist.DistError):  # a lost store is silence, too
                self.store.add(f"heartbeat {self.rank}", 1)
                count = self.store.add(f"heartbeat {self.watched}", 0)
                if count > latest:
                    latest = count
                    self.alive.set()
                if self.store.check(["lost"]):
                    self.end(self.store.get("lost").decode())
            self.finished.wait(self.interval)

    def watch(self):
        """Sum the intervals of silence. No clock: this process may have been stopped itself."""
        silent = 0.0
        while not self.finished.wait(self.interval):
            silent = 0.0 if self.alive.is_set() else silent + self.interval
            self.alive.clear()
            if silent >= SILENT:
                tell = threading.Thread(target=self.store.set, daemon=True,
                                        args=("lost", str(self.watched)))
                tell.start()
                tell.join(self.interval)  # the store may be what is silent
                self.end(self.watched)

    def end(self, lost):
        end_process(f"process {self.rank}: no sign of life from process {lost} for {SILENT:g} s, "
                    "stopping", 1)


def first_line(error):
    return str(error).strip().split("\n")[0]


def is_lost_process(error):
    """Whether a collective operation failed, anywhere, because another process is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_process(message, status):
    """End from any thread or signal handler, without clean-up: one line. Linux ends the workers."""
    with suppress(OSError):
        os.write(2, f"\n{Path(sys.argv[0]).name}: {message}\n".encode())
    os._exit(status)


def end_by_signal(number, _frame):
    """The signal handler as long as there is nothing to save."""
    end_process(f"stopped by {signal.Signals(number).name}", 128 + number)


class StopSignal:
    """Remembers SIGTERM or SIGINT, instead of ending the process, until `close`.

    A second Ctrl-C ends it at once. answer: what is said on the terminal, on rank 0.
    """

    def __init__(self, rank, answer):
        self.caught = False
        self.answer = f"\n{answer}; again: stop now\n".encode() if rank == 0 else b""
        self.previous = {number: signal.signal(number, self.catch) for number in STOP_SIGNALS}

    def catch(self, number, frame):
        if not self.caught:
            with suppress(OSError):
                os.write(2, self.answer)  # print must not be used in a handler
        elif number == signal.SIGINT:     # schedulers send SIGTERM several times
            end_by_signal(number, frame)
        self.caught = True

    def close(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------- data
class UnreadableImage(InputError):
    """An image file that cannot be decoded; the message names the file and the reason."""


def read_image(path, upright=False):
    """An image file as RGB, with `upright` turned by its EXIF orientation. Raises: UnreadableImage.

    Grey of more than 8 bits is stretched from its darkest to its brightest value; Pillow's own
    conversion would clip it to white.
    """
    try:
        with Image.open(path) as image:
            if upright:
                turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
                image = image if turn is None else image.transpose(turn)
            if image.mode.startswith(("I", "F")):
                values = np.asarray(image, np.float32)
                grey = 255 * (values - values.min()) / max(np.ptp(values), 1e-9)
                image = Image.fromarray(grey.astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # broken files make Pillow raise nearly anything
        raise UnreadableImage(f"{path}: {error}") from None


# How to turn an image upright; ImageOps.exif_transpose rewrites all tags, which can fail.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFolder:
    """Labelled image files of folder/<class>/*, classes in order of name.

    Paths are stored in one array, which the loader's workers share. Hidden folders are left out.
    Raises: InputError for a missing folder and for a class without images.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder} is not a folder; expected DIR/train/<class>/* and "
                             "DIR/val/<class>/*")
        folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
        self.classes = sorted(name for name in folders if not name.startswith("."))
        paths = []
        labels = []
        for label, name in enumerate(self.classes):
            files = image_files(self.folder / name)
            paths += [os.fsencode(f"{name}/{file}") for file in files]
            labels += [label] * len(files)
        if not paths:
            raise InputError(f"{folder} holds no image in any <class> folder")
        empty = sorted(set(range(len(self.classes))) - set(labels))
        if empty:
            raise InputError(f"{self.folder / self.classes[empty[0]]} holds no image; expected "
                             "image files directly in each class folder")
        self.paths = np.array(paths)
        self.labels = np.array(labels)

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return str(self.folder / os.fsdecode(bytes(self.paths[index])))

    def read(self, index):
        return read_image(self.name(index))


def image_files(folder):
    """Sorted names of the files in a folder whose extension Pillow knows."""
    Image.init()
    names = (entry.name for entry in os.scandir(folder))
    return sorted(name for name in names if Path(name).suffix.lower() in Image.EXTENSION)


def list_images(paths):
    """The files among `paths` and the image files in its folders, at any depth, each once.

    Hidden files and folders are left out. Raises: InputError for a path that does not exist and
    for a folder without images.
    """
    files = {}
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"no file or folder {path}")
        if not os.path.isdir(path):
            files[path] = None
            continue
        images = []
        for folder, subfolders, _ in os.walk(path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            names = [name for name in image_files(folder) if not name.startswith(".")]
            images += [os.path.join(folder, name) for name in names]
        if not images:
            raise InputError(f"{path} holds no image")
        files |= dict.fromkeys(sorted(images))
    return list(files)


def read_images(files, procs):
    """(file, upright RGB image) of this process's part of the files.

    A file that cannot be decoded is named on stderr; after all the others the exit status is 2.
    """
    unreadable = False
    for file in files[procs.rank::procs.world]:
        try:
            image = read_image(file, upright=True)
        except UnreadableImage as error:
            print(f"cannot decode {error}", file=sys.stderr)
            unreadable = True
        else:
            yield file, image
    procs.wait()
    if procs.any(unreadable):
        sys.exit(2)


class DrawnShapes:
    """Images rendered here: a textured shape on clutter, 10 classes of shape and texture."""

    shapes = ("disc", "square", "triangle", "cross", "ring")
    textures = ("stripes", "dots")
    side = 64  # pixels

    def __init__(self, split, images):
        pairs = itertools.product(self.shapes, self.textures)
        self.classes = [f"{shape}-{texture}" for shape, texture in pairs]
        self.labels = np.arange(images) % len(self.classes)
        self.images = []
        for i, label in enumerate(self.labels):
            rng = np.random.default_rng((RENDERING, split == "val", i))
            self.images.append(self.render(rng, label))

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"drawn image {index}"

    def read(self, index):
        return self.images[index]

    @classmethod
    def render(cls, rng, label):
        """An image of class `label`; everything else about it is random."""
        side = cls.side
        image = render_clutter(rng, side)
        radius = rng.uniform(0.3, 0.45) * side
        centre = rng.uniform(radius, side - radius, 2)
        angle = rng.uniform(-0.5, 0.5)
        y, x = np.mgrid[:side, :side] - centre[::-1, None, None]
        u = (x * np.cos(angle) + y * np.sin(angle)) / radius
        v = (y * np.cos(angle) - x * np.sin(angle)) / radius
        inside = shape_mask(cls.shapes[label // 2], u, v)
        period = rng.uniform(5, 8)
        phase = rng.uniform(0, 2 * np.pi, 2)
        waves = [np.sin(2 * np.pi * t / period + p) for t, p in zip((x, y), phase)]
        if cls.textures[label % 2] == "stripes":
            bright = waves[rng.integers(2)] > 0
        else:
            bright = (waves[0] > 0.1) & (waves[1] > 0.1)
        dark_colour = rng.uniform(0, 110, 3)
        texture = np.where(bright[..., None], 255 - rng.uniform(0, 80, 3), dark_colour)
        pixels = np.where(inside[..., None], texture, np.asarray(image))
        noisy = pixels + rng.normal(0, 8, pixels.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def shape_mask(shape, u, v):
    """Boolean mask of a shape in coordinates u, v, in units of its radius."""
    distance = np.hypot(u, v)
    longer = np.maximum(abs(u), abs(v))
    shorter = np.minimum(abs(u), abs(v))
    masks = {
        "disc": distance < 1,
        "square": longer < 0.75,
        "triangle": (v < 0.5) & (v > 1.7 * abs(u) - 1),
        "cross": (shorter < 0.28) & (longer < 0.95),
        "ring": (distance < 1) & (distance > 0.5),
    }
    return masks[shape]


def render_clutter(rng, side):
    """A plain image with random lines and small rectangles."""
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = rng.integers(0, side, 2).tolist()
        w, h = rng.integers(2, side // 4, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            draw.line((x, y, *rng.integers(0, side, 2)), colour, 2)
        else:
            draw.rectangle((x, y, x + w, y + h), colour)
    return image


class Samples(torch.utils.data.Dataset):
    """What `prepare(source, index, rng)` makes of each key (epoch, index, copy).

    An item is (sample, unreadable files). A file that cannot be decoded is replaced by the next
    one, at most `max_replacements` times in a row; after that the sample is None.
    """

    def __init__(self, source, prepare, seed, max_replacements):
        self.source = source
        self.prepare = prepare
        self.seed = seed
        self.max_replacements = max_replacements

    def __getitem__(self, key):
        _, index, _ = key
        unreadable = []
        for _ in range(self.max_replacements + 1):
            rng = random.Random(repr((SAMPLE, self.seed, *key)))
            try:
                return self.prepare(self.source, index, rng), unreadable
            except UnreadableImage as error:
                unreadable.append(str(error))
                index = (index + 1) % len(self.source)
        return None, unreadable


def collate(collate_samples, items):
    """`Samples` items -> batch, or None if a sample is missing; all unreadable files."""
    samples, file_lists = zip(*items)
    unreadable = sum(file_lists, [])
    complete = all(sample is not None for sample in samples)
    return collate_samples(samples) if complete else None, unreadable


class StepSampler:
    """Keys of the micro-batches that one process runs in updates `first` to `last`, in order.

    Each update takes the next `batch` entries of its epoch's order; micro-batch j of the J in an
    update holds every J-th of them, process r of W runs j = r, r + W, ... So the micro-batches do
    not depend on the number of processes. With `repeats` > 1 (repeated augmentation, arXiv
    1902.05509) every image appears that many times in a row in the order, which ends after
    N // 256 * 256 entries: an epoch shows 1 / `repeats` of the images, and with at least that many
    micro-batches per update no micro-batch sees an image twice.
    """

    def __init__(self, *, images, batch, micro, rank, world, seed, repeats, first=0, last=0):
        self.images = images
        self.batch = batch
        self.count = batch // micro  # micro-batches per update
        self.rank = rank
        self.world = world
        self.seed = seed
        self.repeats = repeats
        self.first = first
        self.last = last
        self.used = images // 256 * 256 if repeats > 1 and images >= 256 else images
        self.per_epoch = self.used // batch

    def order(self, epoch):
        """(used, 2): image and number of the copy."""
        images = np.random.default_rng((ORDER, self.seed, epoch)).permutation(self.images)
        copies = np.tile(np.arange(self.repeats), self.images)
        return np.stack([images.repeat(self.repeats), copies], 1)[:self.used]

    def __iter__(self):
        epoch = None
        for step in range(self.first, self.last):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                order = self.order(epoch)
            start = step % self.per_epoch * self.batch
            for j in range(self.rank, self.count, self.world):
                entries = order[start + j:start + self.batch:self.count]
                yield [(epoch, int(i), int(copy)) for i, copy in entries]


def start_loader(samples, batches, collate_samples, workers, device):
    """Iterator of a DataLoader over lists of keys, with its processes started."""
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=batches, collate_fn=partial(collate, collate_samples),
        num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=follow_parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # workers inherit it
    iterator = iter(loader)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return iterator


def follow_parent(_worker):
    """Ctrl-C and SIGTERM are for the training process; its workers live exactly as long as it.

    They are killed by `kill_workers` at its exit, or by Linux if it was killed itself.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if multiprocessing.parent_process() is None or not multiprocessing.parent_process().is_alive():
        os._exit(1)  # it died before the line above


def kill_workers():
    """End the loader's processes, which ignore SIGTERM; Python would wait for them at its exit."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for each killed one
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


# ------------------------------------------------------------------------------------- augmentation
def random_resized_crop(image, size, min_area, rng):
    """A random crop resized to size x size (arXiv 1409.4842).

    It keeps U(min_area, 1) of the area with a ratio of sides in [3/4, 4/3].
    """
    W, H = image.size
    for _ in range(10):
        w, h = random_sides(rng, W * H, min_area, 1.0, 3 / 4)
        if 0 < w <= W and 0 < h <= H:
            x = rng.randint(0, W - w)
            y = rng.randint(0, H - h)
            break
    else:  # very elongated images: the whole shorter side
        w = min(W, round(H * 4 / 3))
        h = min(H, round(W / (3 / 4)))
        x = (W - w) // 2
        y = (H - h) // 2
    return image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC)


def random_sides(rng, total, low, high, min_ratio):
    """Sides of a box of U(low, high) of an area, their ratio from min_ratio to its inverse."""
    area = rng.uniform(low, high) * total
    ratio = math.exp(rng.uniform(math.log(min_ratio), math.log(1 / min_ratio)))
    return round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))


def center_crop(image, size, fraction):
    """Resize the shorter side to size / fraction and cut the central size x size."""
    W, H = image.size
    if max(W, H) > 8 * min(W, H):  # else a 30000 x 1 image would be enlarged to gigabytes
        w = min(W, 8 * H)
        h = min(H, 8 * W)
        x = (W - w) // 2
        y = (H - h) // 2
        image = image.crop((x, y, x + w, y + h))
        W, H = image.size
    shorter = int(size / fraction)
    if W < H:
        w, h = shorter, int(shorter * H / W)
    else:
        w, h = int(shorter * W / H), shorter
    x = round((w - size) / 2)
    y = round((h - size) / 2)
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    return resized.crop((x, y, x + size, y + size))


FILL = tuple(round(255 * m) for m in MEAN)  # colour outside of a turned or shifted image
BICUBIC = Image.Resampling.BICUBIC


def affine(image, *coefficients):
    """Pillow's affine map, output -> input pixels, bicubic, mean colour outside."""
    method = Image.Transform.AFFINE
    return image.transform(image.size, method, coefficients, BICUBIC, fillcolor=FILL)


def posterize(image, bits):
    """Keep the upper bits; Pillow 13 refuses 0 bits, which older versions turn black."""
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def solarize_add(image, amount):
    """Add to the values below 128."""
    table = [min(255, v + amount) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


def enhance(kind):
    """An operation that moves one of Pillow's enhancers away from 1 by 0.9 m / 10."""
    return lambda image, m, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * m / 10))


RANDAUGMENT = (  # (image, magnitude m in [0, 10], sign) -> image; timm's "increasing" set in order
    lambda image, m, sign: ImageOps.autocontrast(image),
    lambda image, m, sign: ImageOps.equalize(image),
    lambda image, m, sign: ImageOps.invert(image),
    lambda image, m, sign: image.rotate(sign * 30 * m / 10, resample=BICUBIC, fillcolor=FILL),
    lambda image, m, sign: posterize(image, 4 - int(4 * m / 10)),
    lambda image, m, sign: ImageOps.solarize(image, 256 - min(256, int(256 * m / 10))),
    lambda image, m, sign: solarize_add(image, min(128, int(110 * m / 10))),
    enhance(ImageEnhance.Color),
    enhance(ImageEnhance.Contrast),
    enhance(ImageEnhance.Brightness),
    enhance(ImageEnhance.Sharpness),
    lambda image, m, sign: affine(image, 1, sign * 0.3 * m / 10, 0, 0, 1, 0),   # shear x
    lambda image, m, sign: affine(image, 1, 0, 0, sign * 0.3 * m / 10, 1, 0),   # shear y
    lambda image, m, sign: affine(image, 1, 0, sign * 0.45 * m / 10 * image.width, 0, 1, 0),
    lambda image, m, sign: affine(image, 1, 0, 0, 0, 1, sign * 0.45 * m / 10 * image.height),
)


def parse_randaug(notation):
    """"rand-m9-mstd0.5-inc1" -> (magnitude, its standard deviation, layers); "none" -> None.

    Raises: InputError for anything else.
    """
    if notation == "none":
        return None
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"rand-m{number}(?:-n(\d+))?(?:-mstd{number})?-inc1", notation)
    if not match or float(match[1]) > 10 or int(match[2] or 2) > 15:
        raise InputError(f"--randaug {notation!r}, expected none or rand-mM[-nLAYERS][-mstdS]-inc1 "
                         "with M at most 10 and at most 15 layers")
    return float(match[1]), float(match[3] or 0), int(match[2] or 2)


def randaugment(image, magnitude, deviation, layers, rng):
    """`layers` operations sampled with replacement, each applied with probability 1/2.

    arXiv 1909.13719 in timm's form.
    """
    for operation in rng.choices(RANDAUGMENT, k=layers):
        if rng.random() <= 0.5:
            m = min(10.0, max(0.0, rng.gauss(magnitude, deviation)))
            image = operation(image, m, rng.choice((1, -1)))
    return image


def augment(image, rng, *, size, min_crop, randaug):
    """Random crop, flip and RandAugment (`parse_randaug`'s result) of an RGB image."""
    image = random_resized_crop(image, size, min_crop, rng)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return randaugment(image, *randaug, rng) if randaug else image


def normalize(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), ImageNet's mean 0 and deviation 1.

    The result is channels-last in memory.
    """
    mean, std = pixel_statistics(images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)


@cache
def pixel_statistics(device):
    """255 * ImageNet's mean and deviation, copied to the device once: a copy waits for the GPU."""
    return 255 * torch.tensor(MEAN, device=device), 255 * torch.tensor(STD, device=device)


def erase(x, probability, rng):
    """Random erasing (arXiv 1708.04896) of x (B, C, H, W): a box of N(0, 1) noise per image."""
    if probability == 0:
        return x
    B, _, H, W = x.shape
    nothing = (0, 0, 0, 0)
    boxes = [random_box(H, W, rng) if rng.random() <= probability else nothing for _ in range(B)]
    boxes = torch.tensor(boxes, pin_memory=x.is_cuda).to(x.device, non_blocking=True)
    top, bottom, left, right = boxes[:, :, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    row = torch.arange(H, device=x.device)[:, None]
    column = torch.arange(W, device=x.device)
    inside_rows = (row >= top) & (row < bottom)
    inside_columns = (column >= left) & (column < right)
    return torch.where(inside_rows & inside_columns, torch.randn_like(x), x)


def random_box(H, W, rng):
    """Top, bottom, left, right of a box of 2 to 33 % of the area; zeros if ten tries do not fit."""
    for _ in range(10):
        h, w = random_sides(rng, H * W, 0.02, 1 / 3, 0.3)
        if h < H and w < W:
            top = rng.randint(0, H - h)
            left = rng.randint(0, W - w)
            return top, top + h, left, left + w
    return 0, 0, 0, 0


def mix(x, labels, *, classes, smoothing, mixup, cutmix, rng):
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with its reverse.

    Args: x (B, C, H, W); labels (B,); smoothing: label smoothing; mixup, cutmix: Beta parameters,
    0 is off, if both are on a fair coin chooses, once per batch.
    Returns: x and soft targets (B, classes).
    """
    targets = torch.full((len(x), classes), smoothing / classes, device=x.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    if not (mixup or cutmix):
        return x, targets
    if cutmix and (not mixup or rng.random() < 0.5):
        x, kept = cut_and_paste(x, rng.betavariate(cutmix, cutmix), rng)
    else:
        kept = rng.betavariate(mixup, mixup)
        x = x * kept + x.flip(0) * (1 - kept)
    return x, targets * kept + targets.flip(0) * (1 - kept)


def cut_and_paste(x, kept, rng):
    """CutMix of x (B, C, H, W) with its reverse, in a random box of about (1 - kept) of the area.

    Returns: the new x and the exact fraction of the area that was kept.
    """
    H, W = x.shape[2:]
    side = math.sqrt(1 - kept)
    h = int(H * side)
    w = int(W * side)
    y = rng.randrange(H)
    x_centre = rng.randrange(W)
    top, bottom = max(0, y - h // 2), min(H, y + h // 2)
    left, right = max(0, x_centre - w // 2), min(W, x_centre + w // 2)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (H * W)


# ----------------------------------------------------------------------------------------- schedule
def lr_at(step, *, peak, floor, warmup, total):
    """Learning rate of an update: linear over `warmup` updates, then a cosine.

    The cosine begins at update 0, so it has already fallen a little when the warm-up ends.
    """
    if step < warmup:
        return WARMUP_START + (peak - WARMUP_START) * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / total)) / 2


def decay_groups(model, weight_decay):
    """AdamW groups: decay for weights of two or more axes, none for biases, norms, layer scales."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [dict(params=weights, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]


@torch.no_grad()
def update_average(average, model, decay):
    """Exponential moving average of all weights and statistics, in place; integers are copied."""
    averaged = []
    current = []
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values()):
        if ours.is_floating_point():
            averaged.append(ours)
            current.append(theirs)
        else:
            ours.copy_(theirs)
    torch._foreach_lerp_(averaged, current, 1 - decay)


# -------------------------------------------------------------------------------------- checkpoints
class TrainState:
    """All that a checkpoint holds: model, averaged weights, optimizer, scaler, counters.

    step: updates done; evaluated_at: the step of the last evaluation; best: best metric so far;
    period_losses: sums of each loss since the last evaluation; unreadable: files since then;
    per_epoch and classes: what a run that continues must agree with.
    """

    counters = {  # and their types
        "step": int,
        "evaluated_at": int,
        "best": (int, float),
        "period_losses": dict,
        "unreadable": int,
    }

    def __init__(self, model, optimizer, scaler, ema, per_epoch, classes):
        self.model = model
        self.average = copy.deepcopy(model).eval().requires_grad_(False) if ema else None
        self.optimizer = optimizer
        self.scaler = scaler
        self.per_epoch = per_epoch
        self.classes = classes
        self.step = 0
        self.evaluated_at = 0
        self.best = -math.inf
        self.period_losses = {}
        self.unreadable = 0
        self.lr = 0.0         # of the last update
        self.saved_at = None  # step of the last checkpoint

    def save(self, name, args, procs):
        """Write output/name on rank 0."""
        total = sum(p.detach().double().sum() for p in self.model.parameters())
        if not math.isfinite(total):
            raise InputError(not_finite("weights", self.step, self.lr, args.output, self.saved_at))
        procs.share_buffers(*(model for model in (self.model, self.average) if model))
        if procs.rank == 0:
            fields = (*self.counters, "per_epoch", "classes")
            state = {field: getattr(self, field) for field in fields}
            for part in ("model", "optimizer", "scaler"):
                state[part] = getattr(self, part).state_dict()
            state["ema"] = self.average.state_dict() if self.average else None
            state["args"] = vars(args)
            replace_file(Path(args.output) / name, partial(torch.save, state))
        procs.wait()
        self.saved_at = self.step

    def restore(self, checkpoint, args):
        """Put a checkpoint's states back, strictly, and empty it to free its memory.

        Raises: InputError if it belongs to another run.
        """
        if checkpoint["per_epoch"] != self.per_epoch:
            raise InputError(f"epochs of the checkpoint have {checkpoint['per_epoch']} updates, of "
                             f"this run {self.per_epoch}: other data or batch size?")
        check_classes("the checkpoint", checkpoint["classes"], self.classes)
        try:
            self.model.load_state_dict(checkpoint["model"])
            if self.average:
                self.average.load_state_dict(checkpoint["ema"] or checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
            for name in self.counters:
                setattr(self, name, checkpoint[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the checkpoint does not fit this run: {reason}") from None
        for group, decay in zip(self.optimizer.param_groups, (args.weight_decay, 0.0)):
            group["weight_decay"] = decay
        for p, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # fused AdamW needs them in p's memory layout
                moments[name] = torch.empty_like(p).copy_(moments[name])
        self.saved_at = self.step
        checkpoint.clear()


def not_finite(what, step, lr, output, saved_at):
    """The message of a run that stops because something became infinite or not a number."""
    checkpoint = "none yet" if saved_at is None else f"{output}/last.pt of update {saved_at}"
    return (f"{what} at update {step} not finite, learning rate {lr:.3g}; "
            f"last finite checkpoint: {checkpoint}")


def check_classes(what, classes, expected):
    """Raise InputError unless two lists of class names agree."""
    if not isinstance(classes, list):
        raise InputError(f"{what} holds no list of class names")
    if classes != expected:
        ours, theirs = (f"{len(c)} ({', '.join(c[:5])}, ...)" for c in (classes, expected))
        raise InputError(f"{what} has the classes {ours}, the data has {theirs}")


def replace_file(path, write):
    """Call write(file) on a temporary file, sync, rename: whatever happens, `path` is whole.

    A symbolic link in the place of either file is replaced, never followed.
    Raises: InputError if the disk refuses.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_dead_worker(error):
            raise
        if isinstance(error.__context__, OSError):  # torch.save hides it behind an error of its own
            error = error.__context__
        raise InputError(f"cannot write {path} ({first_line(error)}); the previous file is "
                         "untouched") from None


def read_checkpoint(path):
    """A checkpoint or weight file on the CPU, tensors and plain types only.

    Raises: InputError if it is missing or damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):
            damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare checksums
            if damaged:
                raise ValueError(f"{damaged} is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files hold one
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # half a dozen types for damaged files
        reason = re.sub(r"\x1b\[\d*m", "", str(error))
        unsupported = re.search(r"Unsupported global: GLOBAL \S+", reason)
        reason = unsupported[0] if unsupported else reason.split(". ")[0][:120]
        raise InputError(f"cannot read {path}: damaged or not a checkpoint "
                         f"({type(error).__name__}: {reason})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def find_checkpoint(resume, output, script_key):
    """The checkpoint that --resume means: the file itself; for "auto" the latest one of `output`.

    script_key: the argument, "model" or "task", that only this script's checkpoints hold.
    Returns: None if there is none for "auto". Raises: InputError for a file that is no checkpoint.
    """
    if resume != "auto":
        state = read_checkpoint(resume)
        if not is_checkpoint(state, script_key):
            raise InputError(f"{resume} is no checkpoint of this script; "
                             "to start from its weights use --weights")
        return state
    latest = None
    for path in sorted(Path(output).glob("*.pt")):
        try:
            state = read_checkpoint(path)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        if is_checkpoint(state, script_key) and (latest is None or state["step"] > latest["step"]):
            latest = state
    return latest


def is_checkpoint(state, script_key):
    """Whether a file's dict is a whole checkpoint whose arguments include `script_key`."""
    fields = {"model", "ema", "optimizer", "scaler", "per_epoch", "classes", "args"}
    if not fields | set(TrainState.counters) <= state.keys():
        return False
    if not all(isinstance(state[name], kind) for name, kind in TrainState.counters.items()):
        return False
    if state["step"] < 0:
        return False
    return isinstance(state["args"], dict) and script_key in state["args"]


def checkpoint_tensors(state, entry="model"):
    """{name: tensor} of a file's dict, see `load_weights`, without wrappers' prefixes."""
    dicts = [state[key] for key in (entry, "state_dict") if isinstance(state.get(key), dict)]
    state = dicts[0] if dicts else state
    tensors = {str(name): t for name, t in state.items() if isinstance(t, torch.Tensor)}
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): t for name, t in tensors.items()}


def load_weights(model, state, entry="model"):
    """Copy a weight file into `model`; a classifier of another number of classes is left out.

    Args: state, our checkpoint (`entry` of it), a bare state dict, one under "state_dict", or the
    authors' released file.
    Returns: names of the classifier's tensors that were not loaded.
    Raises: InputError if anything else does not fit.
    """
    weights = checkpoint_tensors(state, entry)
    if "patch_embed.proj.0.weight" in weights and hasattr(model, "convert_released"):
        weights = model.convert_released(weights)
    expected = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    matching = {name: t for name, t in weights.items() if shapes.get(name) == t.shape}
    missing = expected.keys() - matching.keys()
    different = missing | (weights.keys() - matching.keys())
    mismatched = [name for name in different if not name.startswith("head.")]
    if mismatched:
        raise InputError(f"the weights do not fit {type(model).__name__}: {len(mismatched)} "
                         "tensors are missing, left over or of another shape, first "
                         f"{min(mismatched)}; another model's, or is --released wrong?")
    model.load_state_dict({**expected, **matching})
    return sorted(missing)


# ---------------------------------------------------------------------------------------------- log
def append(path, **record):
    """Add one JSON line to a log, on a line of its own even if the previous write was truncated."""
    try:
        with open(path, "ab+", opener=open_no_link) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def open_no_link(path, flags):
    """Opener that refuses a symbolic link, which may lead out of --output."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def describe_run(args, procs, model):
    """The first record of a log: arguments, versions, commit, device, parameters."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    if procs.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return dict(args=vars(args), commit=commit, python=sys.version.split()[0],
                torch=torch.__version__, numpy=np.__version__, pillow=PIL.__version__,
                device=device, processes=procs.world,
                parameters=sum(p.numel() for p in model.parameters()))


def bar_intervals():
    """tqdm's options for the time between two writings of a bar; a file keeps all of them."""
    seconds = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    return dict(mininterval=seconds, miniters=1)    # every update looks at the clock


class RunLog:
    """log.jsonl and the progress bar; only rank 0 writes.

    `add` collects the losses of micro-batches without waiting for the device; `flush` waits.
    """

    def __init__(self, args, procs, state, last_step):
        self.args = args
        self.procs = procs
        self.path = Path(args.output) / "log.jsonl" if procs.rank == 0 else None
        self.losses = []          # {name: scalar} of each update since the last line
        self.rates = []           # their learning rates
        self.unreadable = []      # files that could not be decoded since the last line
        self.new_unreadable = []  # those of the current update
        self.reported = set()     # those already named
        self.train_seconds = 0.0
        self.data_seconds = 0.0  # spent waiting for the loader since the last line
        self.clock = time.perf_counter()
        self.bar = tqdm(total=last_step * args.batch_size, initial=state.step * args.batch_size,
                        unit="img", disable=procs.rank > 0, **bar_intervals())

    def close(self):
        self.bar.close()

    def write(self, **record):
        if self.path:
            append(self.path, **record)

    def start_update(self, lr):
        if not self.losses:  # images per second leave out what happened since the last line
            self.clock = time.perf_counter()
        self.losses.append({})
        self.rates.append(lr)
        self.new_unreadable = []

    def next_batch(self, batches):
        """The loader's next item; the time that it takes is counted."""
        start = time.perf_counter()
        item = next(batches)
        self.data_seconds += time.perf_counter() - start
        return item

    def add(self, losses, weight):
        """Add a micro-batch's losses, each times `weight`, to those of the current update."""
        update = self.losses[-1]
        for name, value in losses.items():
            update[name] = update.get(name, 0) + value.detach() * weight

    def drop_update(self):
        self.losses.pop()
        self.rates.pop()

    def end_update(self, state):
        self.unreadable += self.new_unreadable
        self.bar.set_description(f"epoch {state.step / state.per_epoch:.1f}", refresh=False)
        self.bar.update(self.args.batch_size)

    def flush(self, state):
        """Write one line of what was added. Raises: InputError if a loss is not finite."""
        if not self.losses:
            return
        names = list(self.losses[0])
        table = torch.stack([torch.stack(list(update.values())) for update in self.losses])
        rows = np.array(self.procs.reduce(table.double())) / self.procs.world     # (updates, terms)
        totals = rows.sum(1)
        if not np.isfinite(totals).all():
            index = int(np.isfinite(totals).argmin())
            step = state.step - len(rows) + index + 1
            raise InputError(not_finite(f"loss {totals[index]}", step, self.rates[index],
                                        self.args.output, state.saved_at))
        elapsed = time.perf_counter() - self.clock
        self.train_seconds += elapsed
        fraction = torch.tensor([self.data_seconds / elapsed], dtype=torch.float64)
        data_wait, = self.procs.reduce(fraction, dist.ReduceOp.MAX)  # all wait for the slowest
        for name, value in zip(names, rows.sum(0).tolist()):
            state.period_losses[name] = state.period_losses.get(name, 0.0) + value
        self.report_unreadable(state)
        means = dict(zip(names, rows.mean(0).tolist()))
        self.write(step=state.step, epoch=state.step / state.per_epoch, loss=float(totals.mean()),
                   losses=means, lr=state.lr, time=time.time(),
                   images_per_s=len(rows) * self.args.batch_size / elapsed, data_wait=data_wait)
        terms = means if len(means) > 1 else {}
        self.bar.set_postfix(loss=f"{totals.mean():.3f}", lr=f"{state.lr:.1e}",
                             data_wait=f"{data_wait:.2f}", refresh=False,
                             **{name: f"{value:.3f}" for name, value in terms.items()})
        self.losses = []
        self.rates = []
        self.data_seconds = 0.0

    def report_unreadable(self, state):
        """Name each file that could not be decoded once."""
        files = self.procs.gather(self.unreadable)
        state.unreadable += len(files)
        for file in sorted(set(files) - self.reported):
            self.write(unreadable_file=file)
            if self.path:
                tqdm.write(f"cannot decode {file}; using the next file", file=sys.stderr)
        self.reported.update(files)
        self.unreadable = []

    def write_evaluation(self, state, metrics):
        """Write the metrics and the mean losses since the last evaluation; begin a new period."""
        updates = state.step - state.evaluated_at
        means = {name: value / updates for name, value in state.period_losses.items()}
        moments = state.optimizer.state[next(state.model.parameters())]  # of any parameter
        self.write(step=state.step, epoch=state.step / state.per_epoch,
                   train_loss=sum(means.values()), train_losses=means, **metrics, best=state.best,
                   unreadable=state.unreadable,
                   scaler_skips=state.step - int(moments["step"]),  # fp16 overflows
                   train_seconds=self.train_seconds, time=time.time())
        self.train_seconds = 0.0
        state.evaluated_at = state.step
        state.period_losses = {}
        state.unreadable = 0


COLOURS = ("#1f6fb4", "#d9541e", "#3a923a", "#7d4fa0", "#8c564b", "#c44e8c", "#7f7f7f", "#17a2b0")


def plot_curves(output, metrics, limit):
    """Plot curves.png of a run's log: losses and the `metrics` of its evaluations, over updates.

    limit: the largest possible value of a metric, where its axis ends.
    """
    records = []
    for line in (output / "log.jsonl").read_text().splitlines():
        with suppress(ValueError):  # a kill or a full disk can leave half a line
            records.append(json.loads(line))
    updates = [r for r in records if "step" in r]
    logged = {r["step"]: r for r in updates if "lr" in r}
    evaluated = {r["step"]: r for r in updates if "lr" not in r}
    losses = {"training loss": {s: r["loss"] for s, r in logged.items()}}
    losses["validation loss"] = {s: r["loss"] for s, r in evaluated.items() if "loss" in r}
    names = list(next(iter(logged.values()), {}).get("losses", {}))
    if len(names) == 1:  # equal to their sum
        names = []
    for name in names:
        losses[name] = {s: r["losses"][name] for s, r in logged.items() if name in r["losses"]}
    lines = {}
    for metric in metrics:  # -1: not defined
        lines[metric] = {s: r[metric] for s, r in evaluated.items() if r.get(metric, -1) != -1}
    sheet = Image.new("RGB", (1000, 400), "white")
    draw = ImageDraw.Draw(sheet)
    plot_lines(draw, 60, losses)
    plot_lines(draw, 560, lines, limit)
    replace_file(output / "curves.png", partial(sheet.save, format="png"))


def plot_lines(draw, left, lines, high=0.0):
    """Plot {name: {step: value}} into a panel of 400 x 290 pixels; both axes begin at 0.

    high: smallest upper end of the axis of values.
    """
    finite = {}
    for name, line in lines.items():
        points = sorted((s, v) for s, v in line.items() if math.isfinite(v))
        if points:
            finite[name] = points
    if not finite:
        return
    steps, values = np.concatenate(list(finite.values())).T
    last = steps.max()
    ticks = round_ticks(min(0.0, values.min()), max(high, values.max()))

    def position(step, value):
        x = left + 400 * step / max(last, 1)
        return x, 340 - 290 * (value - ticks[0]) / (ticks[-1] - ticks[0])

    plot_axes(draw, left, position, ticks, [s for s in round_ticks(0, last) if s <= last])
    for i, (name, points) in enumerate(finite.items()):
        colour = COLOURS[i % len(COLOURS)]
        draw.text((left + 130 * (i % 3), 4 + 14 * (i // 3)), name, colour)
        path = [position(*point) for point in points]
        draw.line(path, colour, 2)
        if len(path) < 60:
            for x, y in path:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)


def plot_axes(draw, left, position, values, steps):
    """The frame of a panel, with labels at some values and steps."""
    for value in values:
        y = position(0, value)[1]
        draw.line((left, y, left + 400, y), "#dddddd")
        draw.text((left - 6, y), f"{value:.12g}", "black", anchor="rm")
    for step in steps:
        x = position(step, 0)[0]
        draw.line((x, 340, x, 344), "black")
        draw.text((x, 348), f"{step:.12g}", "black", anchor="ma")
    draw.text((left + 200, 368), "update", "black", anchor="ma")
    draw.rectangle((left, 50, left + 400, 340), outline="black")


def round_ticks(low, high):
    """About five equidistant round numbers, the first at most `low`, the last at least `high`."""
    if high - low < 1e-9:
        high = low + 1
    step = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(step))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.999 * step)
    first = math.floor(low / step + 1e-6)
    last = math.ceil(high / step - 1e-6)
    return [round(i * step, 12) for i in range(first, last + 1)]


# --------------------------------------------------------------------------------------------- task
class Classification:
    """What the loop asks of a task, in its order; train_dense.py's tasks have the same methods.

    identity                           names of model and task in what the run prints
    open_data(procs, *splits)          sources with len(), name(index), read(index) and classes
    sampler(source, **schedule)        keys of the micro-batches, and per_epoch, updates per epoch
    total_updates(per_epoch)           length of the run
    eval_every(per_epoch, total)       updates between evaluations
    build_model(classes)               the model that the flags name, for these class names
    load_pretrained(model)             load initial weights; returns a line to print, or None
    param_groups(model)                AdamW's groups, the one with weight decay first
    train_sample(source, index, rng)   an augmented training sample
    collate(samples)                   a batch: tuple of tensors
    lr_at(step, total, per_epoch)      learning rate of an update
    train_mode                         argument of model.train() in training
    losses(net, batch)                 {name: scalar}; their sum is minimised
    test_sample(source, index, rng)    a sample of an evaluation, which holds `test_batch` per batch
    collate_test(samples)              a batch of an evaluation
    infer(model, batch)                the model's prediction for this batch
    record(source, batch, prediction)  what the metrics need of it
    results(source, batch, prediction) what --results writes of it, a list
    write_results(path, results)       write the file of --results
    score_results(source, path)        {metric: value} of such a file, for --score
    summarize(source, records)         {metric: value} of all batches' records
    summarize_classes(source, records) a value for each class, NaN if it does not occur, or []
    small_batch, small_data            --batch-size, other flags for less data than a default batch
    metric, decimals, metric_limit     name of the metric that picks best.pt, larger is better;
                                       digits of printed metrics; its largest possible value
    """

    metric = "top1"
    decimals = 2
    metric_limit = 100.0
    small_batch = 16
    small_data = "--repeated-aug 1 --epochs 20 --warmup-epochs 1 --lr 1e-4 --ema 0"

    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.train_mode = not args.frozen_bn
        self.identity = {"model": args.model}

    def open_data(self, procs, *splits):
        """Sources of the splits "train" and "val", with read(index), labels and classes."""
        sources = open_data(self.args.data, *splits, announce=procs.rank == 0)
        self.num_classes = len(sources[0].classes)
        return sources

    def sampler(self, source, **schedule):
        return StepSampler(images=len(source), repeats=self.args.repeated_aug, **schedule)

    def train_sample(self, source, index, rng):
        """An augmented image (S, S, 3) uint8 and its label."""
        image = augment(source.read(index), rng, size=self.args.img_size,
                        min_crop=self.args.min_crop, randaug=parse_randaug(self.args.randaug))
        return np.asarray(image), int(source.labels[index])

    def test_sample(self, source, index, _rng):
        """The central crop, its label and its index."""
        return self.test_pixels(source.read(index)), int(source.labels[index]), index

    def test_pixels(self, image):
        """What the model sees of a PIL image in an evaluation: (S, S, 3) uint8."""
        size = self.args.img_size
        default = TEST_CROP if size < WHOLE_TEST_IMAGE else 1.0
        return np.asarray(center_crop(image, size, self.args.test_crop or default))

    def collate(self, samples):
        """Samples -> images (B, S, S, 3) uint8, labels (B,), in an evaluation also indices (B,)."""
        images, *numbers = zip(*samples)
        return torch.from_numpy(np.stack(images)), *map(torch.tensor, numbers)

    collate_test = collate

    @property
    def test_batch(self):
        """Images per forward pass of an evaluation."""
        return self.args.micro_batch

    def build_model(self, classes):
        """The backbone that the flags name, with its paper's drop path unless the flag is given."""
        options = {"num_classes": len(classes), **self.args.option}
        if self.args.drop_path is not None:
            options["drop_path_rate"] = self.args.drop_path
        if self.args.released:
            options["released"] = True
        return MODELS[self.args.model](**options)

    def load_pretrained(self, model):
        """Load --weights, if given. Returns: one line that says so, or None."""
        if not self.args.weights:
            return None
        missing = load_weights(model, read_checkpoint(self.args.weights))
        without = f", without {' and '.join(missing)}: other classes" if missing else ""
        return f"{self.args.weights}: loaded{without}"

    def param_groups(self, model):
        return decay_groups(model, self.args.weight_decay)

    def total_updates(self, per_epoch):
        return self.args.epochs * per_epoch

    def eval_every(self, per_epoch, _total):
        return per_epoch

    def lr_at(self, step, total, per_epoch):
        return lr_at(step, peak=self.args.lr, floor=self.args.min_lr,
                     warmup=self.args.warmup_epochs * per_epoch, total=total)

    def losses(self, net, batch):
        """Named losses of a micro-batch; mixing uses `random`, which the loop has seeded."""
        images, labels = batch
        x = erase(normalize(images), self.args.random_erase, random)
        x, targets = mix(x, labels, classes=self.num_classes, smoothing=self.args.label_smoothing,
                         mixup=self.args.mixup, cutmix=self.args.cutmix, rng=random)
        return {"loss_cls": F.cross_entropy(net(x).float(), targets)}

    def infer(self, model, batch):
        """Logits (B, K) float32 of a batch whose first entry is its images."""
        images = batch[0].to(self.device, non_blocking=True)
        with autocast(self.args, self.device):
            return model(normalize(images)).float()

    def record(self, _source, batch, logits):
        """Sums over a batch (4 + 2 K,) float64: top-1 and top-5 hits, loss, images.

        Then per class its top-1 hits, and per class its images.
        """
        labels = batch[1].to(self.device, non_blocking=True)
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]      # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums = torch.stack([top5[:, 0].sum(), top5.sum(), loss]).double()
        sums = F.pad(sums, (0, 1), value=len(labels))
        is_class = labels[:, None] == torch.arange(self.num_classes, device=self.device)  # (B, K)
        hits = is_class & top5[:, :1]
        return torch.cat([sums, hits.sum(0), is_class.sum(0)])

    def summarize(self, source, records):
        """Top-1 and top-5 in per cent, mean loss, of all processes' records.

        Without top-5, which says nothing, if there are at most five classes.
        """
        top1, top5, loss, images, *_ = sum(records).tolist()
        assert images == len(source), f"{images} images counted, {len(source)} exist"
        metrics = dict(top1=100 * top1 / images, top5=100 * top5 / images, loss=loss / images)
        if self.num_classes <= 5:
            del metrics["top5"]
        return metrics

    def summarize_classes(self, _source, records):
        """Top-1 of the images of each class, in per cent."""
        hits, images = sum(records)[4:].reshape(2, -1)
        return (100 * hits / images).tolist()

    def results(self, source, batch, logits):
        """A dict for each image of a batch: its file, its class, the most probable classes."""
        _, labels, indices = batch
        entries = []
        for index, label, row in zip(indices.tolist(), labels.tolist(), logits):
            image = {"image": source.name(index), "class": source.classes[label]}
            entries.append(image | {"probabilities": best_classes(row, source.classes)})
        return entries

    def write_results(self, path, results):
        """Write one JSON line for each image."""
        lines = [json.dumps(entry) + "\n" for entry in results]
        Path(path).write_text("".join(sorted(lines)))

    def score_results(self, source, path):
        """Top-1 and top-5, as of `summarize`, of a file of `write_results`.

        Images are told apart by class folder and file. Raises: InputError for a file that is none
        and one without some image.
        """
        predicted = read_results(path)
        ranks = []
        for index in range(len(source)):
            image = source.name(index)
            names = predicted.get(Path(image).parts[-2:])
            if names is None:
                raise InputError(f"{path} lacks the image {image}")
            label = source.classes[source.labels[index]]
            ranks.append(names.index(label) if label in names else len(source.classes))
        metrics = {}
        for name, limit in {"top1": 1, "top5": 5}.items():
            hits = sum(rank < limit for rank in ranks)
            metrics[name] = 100 * hits / len(ranks)
        if self.num_classes <= 5:
            del metrics["top5"]
        return metrics


def read_results(path):
    """A file of `Classification.write_results`: {(class folder, file): class names, best first}.

    Raises: InputError for any other file.
    """
    predicted = {}
    try:
        for line in Path(path).read_text().splitlines():
            entry = json.loads(line)
            predicted[Path(entry["image"]).parts[-2:]] = list(entry["probabilities"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results ({type(error).__name__}: {error})") from None
    return predicted


def best_classes(logits, classes):
    """{name: probability} of the five most probable classes, best first; logits (K,)."""
    best = logits.softmax(0).topk(min(5, len(logits)))
    values = [round(value, 6) for value in best.values.tolist()]
    return dict(zip([classes[label] for label in best.indices.tolist()], values))


def open_data(folder, *splits, announce):
    """The splits "train" and "val" of `folder`, or drawn images if it is None.

    Raises: InputError if the splits name different classes.
    """
    if folder is None:
        counts = {"train": 1000, "val": 300}
        if announce:
            print("no --data given: rendering 1000 training and 300 validation images of 10 "
                  "classes", file=sys.stderr)
        return [DrawnShapes(split, counts[split]) for split in splits]
    sources = [ImageFolder(Path(folder) / split) for split in splits]
    names = [set(source.classes) for source in sources]
    if names[0] != names[-1]:
        raise InputError(f"train and val of {folder} differ in classes "
                         f"{sorted(names[0] ^ names[-1])}")
    return sources


def autocast(args, device):
    """The autocast context that --amp asks for."""
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=args.amp != "none")


# --------------------------------------------------------------------------------------------- loop
def train(task, args, procs, checkpoint):
    """The run of either script: update after update until the end, --max-steps or a signal.

    task: see `Classification`; checkpoint: that of the run to continue, or None.
    """
    train_set, val_set = task.open_data(procs, "train", "val")
    procs.wait()                # listing a million files takes different times on different nodes
    schedule = dict(batch=args.batch_size, micro=args.micro_batch, rank=procs.rank,
                    world=procs.world, seed=args.seed)
    per_epoch = task.sampler(train_set, **schedule).per_epoch
    if per_epoch == 0:
        batch = min(task.small_batch, len(train_set))
        raise InputError(f"--batch-size {args.batch_size} is larger than the {len(train_set)} "
                         f"training images of an epoch; for small data: --batch-size {batch} "
                         f"{task.small_data}")
    total = task.total_updates(per_epoch)
    last_step = min(total, args.max_steps or total)
    eval_every = task.eval_every(per_epoch, total)

    torch.manual_seed(args.seed)
    model = task.build_model(train_set.classes)
    report = None if checkpoint else task.load_pretrained(model)
    if args.sync_bn and procs.world > 1 and procs.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    model.to(procs.device, memory_format=layout)
    optimizer = torch.optim.AdamW(task.param_groups(model), lr=args.lr, betas=(0.9, 0.999),
                                  eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(procs.device.type, enabled=args.amp == "fp16")
    state = TrainState(model, optimizer, scaler, args.ema, per_epoch, train_set.classes)
    if checkpoint:
        state.restore(checkpoint, args)
    check_output(args)
    procs.check_same_step(state.step)
    net = wrap_model(model, args, procs)

    accumulate = args.batch_size // (args.micro_batch * procs.world)
    answer = f"{'finishing' if accumulate == 1 else 'dropping'} this update, then saving"
    log = RunLog(args, procs, state, last_step)
    stop = StopSignal(procs.rank, answer)
    with closing(log), closing(stop):
        start_run(task, log, state, total, report)
        samples = Samples(train_set, task.train_sample, args.seed, max_replacements=9)
        sampler = task.sampler(train_set, **schedule, first=state.step, last=last_step)
        batches = start_loader(samples, sampler, task.collate, args.workers, procs.device)
        stopping = False
        metrics = {}
        if evaluation_due(state, eval_every, total):  # killed during an evaluation, after its save
            metrics = evaluate_and_save(task, state, val_set, log)
            stopping = procs.any(stop.caught)

        while state.step < last_step and not stopping:
            state.lr = task.lr_at(state.step, total, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = state.lr
            net.train(task.train_mode)
            log.start_update(state.lr)
            buffers = [b.clone() for b in model.buffers()] if accumulate > 1 else []
            for i in range(accumulate):
                stopping = i > 0 and procs.any(stop.caught)
                if stopping:
                    break
                batch, unreadable = log.next_batch(batches)
                log.new_unreadable += unreadable
                if batch is None:
                    raise InputError(f"ten files in a row cannot be decoded, last {unreadable[-1]}")
                batch = [t.to(procs.device, non_blocking=True) for t in batch]
                seed_micro_batch(args.seed, state.step, i * procs.world + procs.rank)
                if procs.world > 1:
                    net.require_backward_grad_sync = i == accumulate - 1  # once per update
                with autocast(args, procs.device):
                    losses = task.losses(net, batch)
                    loss = sum(losses.values()) / accumulate
                scaler.scale(loss).backward()
                log.add(losses, 1 / accumulate)
            if stopping:  # in mid-update: nothing has changed but the statistics of BatchNorm
                for buffer, before in zip(model.buffers(), buffers):
                    buffer.copy_(before)
                log.drop_update()
                break
            if args.clip_grad:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if state.average:
                update_average(state.average, model, args.ema)
            state.step += 1
            log.end_update(state)

            stopping = procs.any(stop.caught)
            due = evaluation_due(state, eval_every, total)
            if due or stopping or state.step == last_step or len(log.losses) >= args.log_every:
                log.flush(state)
            if due and not stopping:
                metrics = evaluate_and_save(task, state, val_set, log)
                stopping = procs.any(stop.caught)
        log.flush(state)
        if state.saved_at != state.step:
            state.save("last.pt", args, procs)
    if procs.rank == 0:
        unfinished = stopping and state.evaluated_at < total
        print(last_words(task, args, state, unfinished, metrics))


def wrap_model(model, args, procs):
    """The model as the loop calls it: compiled and wrapped for gradient exchange as asked."""
    # No CUDA graphs (mode="reduce-overhead"): their replays reuse the memory of the gradients,
    # which accumulate over micro-batches, and that mode has not been run on a GPU.
    net = torch.compile(model) if args.compile else model
    if procs.world == 1:
        return net
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # torch 2.6 cannot split graphs at our gradients
    for parameter in model.parameters():
        if 1 in parameter.shape:
            parameter.register_hook(contiguous_strides)
    devices = [procs.device.index] if procs.device.type == "cuda" else None
    # statistics are shared where they are read: before an evaluation or a checkpoint
    return DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)


def contiguous_strides(grad):
    """The same gradient with its parameter's strides, which DistributedDataParallel expects.

    For weights (C, 1, k, k) of channels-last depth-wise convolutions autograd gives the axis of
    size 1 another stride.
    """
    return grad.flatten().view_as(grad)


def seed_micro_batch(seed, step, index):
    """Seed a micro-batch's randomness: `random` for mixing, torch for noise and drop path."""
    random.seed(repr((BATCH, seed, step, index)))
    torch.manual_seed(random.getrandbits(63))


RUN_FILES = ("log.jsonl", "last.pt", "best.pt", "curves.png")


def continues_output(args):
    """Whether --resume continues the run in --output, not that of another folder."""
    if args.resume in (None, "auto"):
        return args.resume == "auto"
    return Path(args.resume).resolve().parent == Path(args.output).resolve()


def check_output(args):
    """Raise InputError if a run on a user's data would overwrite the files of another one."""
    holds_run = any(os.path.lexists(Path(args.output) / name) for name in RUN_FILES)
    if holds_run and args.data and not (continues_output(args) or args.overwrite):
        raise InputError(f"{args.output} holds a run: continue it with --resume auto, replace it "
                         "with --overwrite, or name another --output")


def start_run(task, log, state, total, report):
    """Open the log and say what starts, on rank 0, above the progress bar."""
    args = log.args
    procs = log.procs
    if procs.rank > 0:
        return
    Path(args.output).mkdir(parents=True, exist_ok=True)
    if args.resume == "auto" and state.saved_at is None:
        tqdm.write(f"{args.output} holds no checkpoint of this run: starting from the beginning")
    elif args.resume:
        tqdm.write(f"continuing from update {state.step}")
    if not continues_output(args):
        for name in RUN_FILES:  # those of an earlier run
            (Path(args.output) / name).unlink(missing_ok=True)
    log.write(**describe_run(args, procs, state.model), resumed_at=state.step)
    if report:
        tqdm.write(report)
    name = " with ".join(task.identity.values())
    tqdm.write(f"{name}: batch {args.batch_size}, {args.micro_batch} at once on each of "
               f"{procs.world} processes, peak rate {args.lr:g}, {total} updates, "
               f"{state.per_epoch} per epoch, on {procs.device.type}, amp {args.amp}")


def evaluation_due(state, eval_every, total):
    """Whether `eval_every` updates, or all of them, were completed since the last evaluation."""
    periods = state.step // eval_every - state.evaluated_at // eval_every
    return periods > 0 or state.evaluated_at < state.step == total


def evaluate_and_save(task, state, val_set, log):
    """Evaluate the model and its average, log the metrics, save last.pt and, if best, best.pt."""
    args = log.args
    procs = log.procs
    state.save("last.pt", args, procs)  # save first: evaluation is slow and may be killed
    metrics = evaluate(task, state.model, val_set, args, procs)
    if state.average:
        averaged = evaluate(task, state.average, val_set, args, procs)
        metrics |= {f"ema_{name}": value for name, value in averaged.items()}
    names = [name for name in (task.metric, f"ema_{task.metric}") if name in metrics]
    previous = state.best
    state.best = max(previous, *(metrics[name] for name in names))
    log.write_evaluation(state, metrics)
    if state.best > previous:
        state.save("best.pt", args, procs)
    state.save("last.pt", args, procs)
    if procs.rank == 0:
        plot_curves(Path(args.output), names, task.metric_limit)
    return metrics


def last_words(task, args, state, stopped, metrics):
    """The last line of a run."""
    if stopped:
        return (f"stopped after update {state.step}; "
                f"resume with --resume {Path(args.output) / 'last.pt'}")
    if state.best == -math.inf:
        return f"update {state.step}: not evaluated yet; see {args.output}/log.jsonl, last.pt"
    values = [f"{name} {value:.{task.decimals}f}" for name, value in metrics.items()]
    values.append(f"best {task.metric} {state.best:.{task.decimals}f}")
    return (f"update {state.step}: {', '.join(values)}; see {args.output}/log.jsonl, last.pt, "
            "best.pt, curves.png")


@torch.no_grad()
def evaluate(task, model, source, args, procs, results=None, per_class=False):
    """The task's metrics over all images of `source`, each counted once by any number of processes.

    results: a list to which this process's part of the task's results is added, if given;
    per_class: add "per_class", the values of each class that occurs, by name.
    Raises: InputError for an unreadable image; evaluation never substitutes.
    """
    model.eval()
    keys = [(0, index, 0) for index in range(procs.rank, len(source), procs.world)]
    size = task.test_batch
    batches = [keys[start:start + size] for start in range(0, len(keys), size)]
    samples = Samples(source, task.test_sample, args.seed, max_replacements=0)
    records = []
    loader = start_loader(samples, batches, task.collate_test, args.workers, procs.device)
    for batch, unreadable in show_progress(loader, batches, procs.rank):
        if unreadable:
            raise InputError(f"validation image cannot be decoded: {unreadable[0]}")
        prediction = task.infer(model, batch)
        records.append(task.record(source, batch, prediction))
        if results is not None:
            results += task.results(source, batch, prediction)
    records = procs.gather(records)
    metrics = task.summarize(source, records)
    if per_class:
        values = task.summarize_classes(source, records)
        named = name_values(source.classes, values, task.decimals)
        metrics |= {"per_class": named} if named else {}
    return metrics


def name_values(classes, values, decimals):
    """{class: rounded value} without NaN; a name that several classes have gets their number."""
    named = {}
    for label, (name, value) in enumerate(zip(classes, values)):
        if not math.isnan(value):
            key = name if classes.count(name) == 1 else f"{name} ({label})"
            named[key] = round(value, decimals)
    return named


def show_progress(loader, batches, rank):
    """The loader's items, with a progress bar on rank 0 for its images.

    In a file it appears only if the test takes longer than LOG_SECONDS.
    batches: the lists of keys that the loader reads.
    """
    total = sum(map(len, batches))
    if sys.stderr.isatty():
        place = dict(delay=0)
    else:
        place = dict(delay=LOG_SECONDS, position=0)     # no cursor moves to below another bar
    with tqdm(total=total, desc="testing", unit="img", leave=False, disable=rank > 0,
              **place, **bar_intervals()) as bar:
        for item, keys in zip(loader, batches):
            yield item
            bar.update(len(keys))


def test(task, args, procs, checkpoint):
    """--eval: print one JSON line with the metrics of the weights, and of their average if any.

    They include one for each class, from two to MAX_PER_CLASS classes.
    --results then holds what the last of them, the average if there is one, predicts.
    """
    val_set, = task.open_data(procs, "val")
    check_classes(args.weights, checkpoint.get("classes", val_set.classes), val_set.classes)
    if args.results and procs.rank == 0:
        Path(args.results).parent.mkdir(parents=True, exist_ok=True)
        task.write_results(args.results, [])  # fails now rather than after the evaluation
    metrics = {}
    for entry in ("model", "ema") if checkpoint.get("ema") else ("model",):
        model = load_trained(task, checkpoint, entry, val_set.classes)
        results = [] if args.results else None
        per_class = 1 < len(val_set.classes) <= MAX_PER_CLASS
        model.to(procs.device)
        result = evaluate(task, model, val_set, args, procs, results, per_class)
        prefix = "ema_" if entry == "ema" else ""
        metrics |= {prefix + name: value for name, value in result.items()}
    if args.results:
        results = procs.gather(results)
    if procs.rank == 0:
        if args.results:
            task.write_results(args.results, results)
        facts = dict(task.identity, weights=args.weights, images=len(val_set))
        print(json.dumps(facts | metrics))


def load_trained(task, checkpoint, entry, classes):
    """The task's model with the weights of a checkpoint, in eval mode.

    Raises: InputError if they do not fit, or if their classifier is of another number of classes.
    """
    model = task.build_model(classes)
    if load_weights(model, checkpoint, entry):
        raise InputError(f"the classifier of {task.args.weights} is not one of {len(classes)} "
                         "classes")
    return model.eval()


def score(task, args, procs, _checkpoint):
    """--score: print one JSON line with the metrics of a file, or folder, of results."""
    val_set, = task.open_data(procs, "val")
    if procs.rank == 0:
        print(json.dumps(task.score_results(val_set, args.score)))


@torch.no_grad()
def predict(task, args, procs, checkpoint):
    """--predict: print one JSON line with the most probable classes of each image."""
    files = list_images(args.predict)
    classes = checkpoint.get("classes")
    if classes is None:  # a bare file of weights names none
        weights = checkpoint_tensors(checkpoint)
        classes = [str(label) for label in range(len(weights.get("head.weight", ())))]
        if not classes:
            raise InputError(f"{args.weights} has no classifier")
    entry = "ema" if checkpoint.get("ema") else "model"
    model = load_trained(task, checkpoint, entry, classes).to(procs.device)
    for file, image in read_images(files, procs):
        batch = task.collate([(task.test_pixels(image),)])
        logits, = task.infer(model, batch)
        print(json.dumps({"image": file, "probabilities": best_classes(logits, classes)}))


# ------------------------------------------------------------------------------------- command line
def launch(command, make_task, args, checkpoint):
    """Start the processes, run `command(task, args, procs, checkpoint)`, end them."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads such memory
    torch.use_deterministic_algorithms(args.deterministic)
    procs = Processes()
    try:
        command(make_task(args, procs.device), args, procs, checkpoint)
    finally:
        kill_workers()
    procs.close()


def main(argv=None):
    """Resolve the arguments, then train, evaluate, predict or score."""
    args, checkpoint = resolve_args(argv)
    command = test if args.eval else train
    if args.predict:
        command = predict
    elif args.score:
        command = score
    launch(command, Classification, args, checkpoint)


class Terminal:
    """stdout or stderr; a pipe's reader, too, sees every line at once.

    What is written after the reader has gone is dropped.
    Neither `| head -1` nor a `| tee` that Ctrl-C has ended ends a training run.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_main(main, script):
    """Call a script's main; a user's mistake ends in one line on stderr and status 2."""
    for number in STOP_SIGNALS:
        signal.signal(number, end_by_signal)
    sys.stdout = Terminal(sys.stdout)
    sys.stderr = Terminal(sys.stderr)
    status = 1
    try:
        main()
        return
    except InputError as error:
        message = str(error).split("InputError: ")[-1]  # a loader process adds its traceback
        status = 2
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        status = 2
    except RuntimeError as error:
        if is_dead_worker(error):
            message = f"a loader process died, out of memory perhaps ({error})"
        elif is_lost_process(error):
            reason = first_line(error).split(". ")[0]
            message = f"another process died or timed out ({reason})"
        else:
            raise
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def is_dead_worker(error):
    """Whether torch's handler of SIGCHLD raised this, anywhere, for a loader process."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


if __name__ == "__main__":
    run_main(main, "train_imagenet.py")
