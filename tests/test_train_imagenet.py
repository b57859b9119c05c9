"""train_imagenet.py: augmentation against its definition, exact resume, processes, workers, errors as users see them."""
import argparse
import copy
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import secvit
import train_imagenet as T

ROOT = Path(T.__file__).parent
TINY = dict(depths=(1, 1, 1, 2), dims=(16, 16, 32, 32), heads=(2, 2, 2, 2), layer_scale=(None, None, 1e-6, 1e-6))
FAST = "--img-size 32 --batch-size 4 --micro-batch 2 --epochs 2 --warmup-epochs 0.5 --lr 1e-3 --workers 0 --log-every 1".split()
FULL = "--mixup 0.8 --cutmix 1 --random-erase 0.5 --randaug rand-m9-mstd0.5-inc1 --ema 0.9 --drop-path 0.3 --repeated-aug 1".split()


@pytest.fixture
def tiny(monkeypatch):
    """secvit_t shrunk to milliseconds an update; signal handlers put back afterwards."""
    monkeypatch.setitem(T.MODELS, "secvit_t", lambda **options: secvit.SecViT(**{**TINY, "drop_path_rate": 0.1, **options}))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """14 training and 7 validation photos of 2 classes, of several sizes and modes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, images in (("train", 14), ("val", 7)):
        for i in range(images):
            path = root / split / ("cat", "dog")[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (20 + 5 * i, 90 - 5 * i, 3), dtype=np.uint8))
            image.convert(("RGB", "L", "P", "RGBA")[i % 4]).save(path)
    return root


def rng_of(seed):
    return random.Random(seed)


def last_state(output):
    return torch.load(output / "last.pt", weights_only=True)


def assert_same_state(a, b):
    """Model, average, optimizer and counters are equal bit for bit."""
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name
    for key, entry in a["optimizer"]["state"].items():
        assert all(torch.equal(entry[k], b["optimizer"]["state"][key][k]) for k in entry)
    assert all(a[k] == b[k] for k in ("step", "evaluated", "best", "epoch_loss"))


# ---------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("repeats, images", [(1, 50), (3, 50), (3, 600)])
def test_micro_batches_do_not_depend_on_processes(repeats, images):
    make = partial(T.StepSampler, images=images, batch=12, micro=3, seed=5, repeats=repeats)
    steps = 2 * make(rank=0, world=1).per_epoch
    alone = list(make(rank=0, world=1, last=steps))
    for world in (2, 4):
        parts = [list(make(rank=r, world=world, last=steps)) for r in range(world)]
        assert [batch for turn in zip(*parts) for batch in turn] == alone
    assert list(make(rank=0, world=1, first=3, last=steps)) == alone[3 * 4:]
    keys = [key for batch in alone[:len(alone) // 2] for key in batch]
    used = images // 256 * 256 if repeats > 1 and images >= 256 else images
    assert len(keys) == used // 12 * 12 and len(set(keys)) == len(keys) and {key[0] for key in keys} == {0}
    distinct = {index for _, index, _ in keys}
    assert abs(len(distinct) - len(keys) / repeats) <= 1                   # every image `repeats` times
    if repeats > 1:
        assert all(len({index for _, index, _ in batch}) == 3 for batch in alone[:8])   # copies in different micro-batches
    assert [key[1:] for key in keys] != [key[1:] for batch in alone[len(alone) // 2:] for key in batch]     # reshuffled


def test_folder_reads_any_mode_and_names_classes(folder):
    train, val = T.open_data(folder)
    assert train.classes == val.classes == ["cat", "dog"] and (len(train), len(val)) == (14, 7)
    assert {train.read(i).mode for i in range(14)} == {"RGB"}
    assert train.labels.tolist() == [0] * 7 + [1] * 7 and train.name(7).endswith("dog/01.png")


def test_unreadable_files_are_replaced_by_the_next(tmp_path):
    for i in range(13):
        path = tmp_path / "a" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image") if i < 10 else Image.new("RGB", (8, 8), (i, i, i)).save(path)
    source = T.ImageFolder(tmp_path)
    keep = lambda image, rng: image                                        # noqa: E731
    image, label, unreadable = T.Samples(source, keep, 0, replace=9)[(0, 8, 0)]
    assert image[0, 0, 0] == 10 and label == 0 and [f.split(":")[0][-6:] for f in unreadable] == ["08.png", "09.png"]
    image, _, unreadable = T.Samples(source, keep, 0, replace=9)[(0, 0, 0)]
    assert image is None and len(unreadable) == 10
    images, _, unreadable = T.collate([T.Samples(source, keep, 0, replace=0)[(0, i, 0)] for i in (11, 3)])
    assert images is None and len(unreadable) == 1


def test_drawn_images_are_the_same_every_time_and_differ_between_splits():
    a, b = T.DrawnShapes("train", 20), T.DrawnShapes("train", 20)
    assert all(a.read(i).tobytes() == b.read(i).tobytes() for i in range(20))
    assert a.read(0).tobytes() != T.DrawnShapes("val", 1).read(0).tobytes()
    assert len(a.classes) == 10 and sorted(set(a.labels.tolist())) == list(range(10))


# -------------------------------------------------------------------------------------------------------- augmentation
def test_random_resized_crop_shares_and_ratios(monkeypatch):
    boxes = []
    image = Image.new("RGB", (200, 150))
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or self)
    rng = rng_of(0)
    for _ in range(500):
        assert T.random_resized_crop(image, 24, 0.08, rng).size == (24, 24)
    w, h = np.array([(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes]).T
    share, ratio = w * h / 30000, w / h
    assert 0.07 < share.min() < 0.15 and share.max() > 0.85 and 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.37
    assert all(0 <= x0 < x1 <= 200 and 0 <= y0 < y1 <= 150 for x0, y0, x1, y1 in boxes)
    boxes.clear()
    T.random_resized_crop(Image.new("RGB", (1000, 6)), 24, 0.5, rng)       # no crop of half the area has an allowed ratio
    T.random_resized_crop(Image.new("RGB", (6, 1000)), 24, 0.5, rng)
    assert boxes == [(496, 0, 504, 6), (0, 496, 6, 504)]


def test_center_crop_follows_torchvisions_rule():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))
    expected = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))      # round(58.5) = 58
    assert T.center_crop(image, size=224, share=0.875).tobytes() == expected.tobytes()
    assert T.center_crop(image.transpose(Image.Transpose.ROTATE_90), size=384, share=1.0).size == (384, 384)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("m", [0.0, 9.0, 10.0])
def test_randaugment_operations_match_their_definition(m):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    x = pixels(image)
    results = [pixels(op(image, m, 1)) for op in T.RANDAUGMENT]
    assert len(results) == 15 and {r.shape for r in results} == {x.shape}
    bits, threshold, add = 4 - int(0.4 * m), 256 - min(256, int(25.6 * m)), min(128, int(11 * m))
    assert (results[2] == 255 - x).all()
    assert (results[4] == (x & ~(2 ** (8 - bits) - 1) if bits else 0 * x)).all()                # 0 bits: black
    assert (results[5] == np.where(x < threshold, x, 255 - x)).all()
    assert (results[6] == np.where(x < 128, np.minimum(x + add, 255), x)).all()
    assert abs(results[9] - np.clip(x * (1 + 0.09 * m), 0, 255)).max() <= 1                     # brightness blends with black
    if m == 0:
        for i in (3, 5, 7, 8, 9, 10, 11, 12, 13, 14):
            assert (results[i] == x).all(), i
    else:                                                                                       # fill colour, and direction
        for i, corner in ((11, (-1, -1)), (12, (-1, -1)), (13, (0, -1)), (14, (-1, 0))):
            assert (results[i][corner] == T.FILL).all(), i
        moved = pixels(T.RANDAUGMENT[13](image, 10, 1))
        assert abs(moved[5, 3] - (x[5, 16] + x[5, 17]) / 2).max() < 64                          # 13.5 pixels, content moves left
    assert (results[3] != pixels(T.RANDAUGMENT[3](image, m, -1))).any() == (m > 0)


def test_randaugment_draws(monkeypatch):
    seen = []
    monkeypatch.setattr(T, "RANDAUGMENT", tuple(lambda image, m, sign, i=i: seen.append((i, m, sign)) or image for i in range(15)))
    rng, counts = rng_of(0), []
    for _ in range(4000):
        before = len(seen)
        T.randaugment(None, 9, 0.5, 2, rng)
        counts.append(len(seen) - before)
    operations, magnitudes, signs = (np.array(t) for t in zip(*seen))
    assert abs(np.bincount(counts) / 4000 - (0.25, 0.5, 0.25)).max() < 0.03
    assert np.bincount(operations, minlength=15).min() > 4000 / 15 * 0.75
    assert abs(magnitudes.mean() - 9) < 0.03 and abs(magnitudes.std() - 0.49) < 0.03 and magnitudes.max() == 10 and abs(signs.mean()) < 0.06
    assert T.parse_randaug("rand-m9-mstd0.5-inc1") == (9, 0.5, 2) and T.parse_randaug("rand-m7.5-n3-inc1") == (7.5, 0, 3)
    assert T.parse_randaug("none") is None


def test_normalize_matches_numpy():
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    expected = ((images.numpy() / 255 - T.MEAN) / T.STD).transpose(0, 3, 1, 2)
    torch.testing.assert_close(T.normalize(images), torch.from_numpy(expected).float())


def test_erase_puts_noise_in_one_box():
    x = torch.full((300, 3, 24, 40), 7.0)
    torch.manual_seed(0)
    y = T.erase(x, 0.25, rng_of(0))
    changed = (y != x).all(1)                                              # (B, H, W)
    hit = changed.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    for box in changed[hit]:
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        h, w = len(rows), len(columns)
        assert rows[-1] - rows[0] == h - 1 and columns[-1] - columns[0] == w - 1 and box.sum() == h * w and h < 24 and w < 40
        assert 0.01 < h * w / 960 < 0.36 and 0.2 < h / w < 4.5
    noise = y[(y != x)]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    torch.manual_seed(0)
    assert torch.equal(T.erase(x, 0.25, rng_of(0)), y) and torch.equal(T.erase(x, 0.0, rng_of(0)), x)


def test_mix_matches_loops():
    x, labels = torch.randn(5, 3, 12, 20), torch.tensor([0, 1, 2, 3, 1])
    on, off = 0.9 + 0.1 / 4, 0.1 / 4
    one_hot = lambda label: torch.tensor([on if c == label else off for c in range(4)])         # noqa: E731
    kinds = set()
    for seed in range(40):
        y, t = T.mix(x, labels, classes=4, smoothing=0.1, mixup=0.8, cutmix=1.0, rng=rng_of(seed))
        torch.testing.assert_close(t.sum(1), torch.ones(5))
        for i in range(5):
            own, other = x[i], x[4 - i]
            pasted = (y[i] == other).all(0)
            if i != 2 and not (pasted | (y[i] == own).all(0)).all():       # mixup: solve for lam, then everything must fit
                lam = float(((y[i] - other) / (own - other)).median())
                torch.testing.assert_close(y[i], lam * own + (1 - lam) * other, atol=1e-4, rtol=1e-4)
                kinds.add("mixup")
            elif i != 2:                                                   # CutMix: lam is exactly the kept area
                lam = 1 - float(pasted.float().mean())
                rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
                assert pasted.sum() == rows * columns
                kinds.add("cutmix")
            else:
                lam = 0.5                                                  # the middle sample is its own partner
            expected = lam * one_hot(labels[i]) + (1 - lam) * one_hot(labels[4 - i])
            torch.testing.assert_close(t[i], expected, atol=1e-3, rtol=1e-3)
    assert kinds == {"mixup", "cutmix"}
    y, t = T.mix(x, labels, classes=4, smoothing=0.0, mixup=0.0, cutmix=0.0, rng=rng_of(0))
    assert y is x and torch.equal(t, torch.eye(4)[labels])


# ------------------------------------------------------------------------------------------------ schedule and weights
@pytest.mark.parametrize("model, expected", [
    ("secvit_t", (2e-3, 0.99992, True)), ("sec_swin_t", (2e-3, 0.99992, True)), ("sec_fastervit_1", (2e-3, 0.99992, True)),
    ("stvit_s", (1e-3, 0, False))])
def test_recipe_of_the_family(model, expected):
    args = T.parse_args(["--model", model, "--data", "images"])
    T.settle(args)
    assert (args.lr, args.ema, args.sync_bn) == expected


def test_learning_rate_at_start_peak_and_end():
    rate = partial(T.lr_at, peak=1e-3, floor=1e-5, warmup=5, total=300)
    published = {0: 1e-6, 1: 2.008e-4, 2: 4.006e-4, 4: 8.002e-4, 5: 9.99322e-4, 6: 9.99023e-4}   # recipe, section 7
    for step, value in published.items():
        assert rate(step) == pytest.approx(value, rel=1e-5)
    assert rate(298) == pytest.approx(1.01086e-5, rel=1e-5) and rate(300) == pytest.approx(1e-5)
    assert T.lr_at(7, peak=5e-6, floor=5e-6, warmup=0, total=10) == pytest.approx(5e-6)          # constant, fine-tuning


def test_decay_skips_vectors_layer_scale_included():
    model = secvit.SecViT(num_classes=3, drop_path_rate=0, **TINY)
    decayed, exempt = T.decay_groups(model, 0.05)
    named = {id(p): n for n, p in model.named_parameters()}
    assert all(n.endswith("weight") and p.ndim > 1 for p in decayed["params"] for n in [named[id(p)]])
    assert any("scale1" in named[id(p)] for p in exempt["params"]) and exempt["weight_decay"] == 0
    assert len(decayed["params"]) + len(exempt["params"]) == len(named)


def test_ema_averages_weights_and_statistics():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average, expected = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(3):
        model(torch.randn(4, 2)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        T.update_average(average, model, 0.9)
        for k, v in model.state_dict().items():
            expected[k] = 0.9 * expected[k] + 0.1 * v if v.is_floating_point() else v.clone()
    torch.testing.assert_close(dict(average.state_dict()), expected)


def test_weights_of_another_class_count_load_but_for_the_head(capsys):
    model, other = (secvit.SecViT(num_classes=n, drop_path_rate=0, **TINY) for n in (3, 5))
    wrapped = {"model": {f"module._orig_mod.{k}": v for k, v in other.state_dict().items()}}
    assert T.load_weights(model, wrapped) == ["head.bias", "head.weight"]
    assert torch.equal(model.stem[0].weight, other.stem[0].weight)
    partly = secvit.SecViT(num_classes=3, drop_path_rate=0, **{**TINY, "depths": (1, 1, 1, 3)})     # one block more
    for state in ({"a": torch.zeros(1)}, partly.state_dict(), {"model": None, 3: 4}):
        with pytest.raises(T.InputError, match="do not fit SecViT.*another model's"):
            T.load_weights(model, state)


# ------------------------------------------------------------------------------------------------------------ the runs
def test_resume_in_mid_epoch_equals_an_uninterrupted_run(tiny, folder, tmp_path):
    common = ["--model", "secvit_t", "--data", str(folder), *FAST, *FULL]                        # 3 updates an epoch, 6 in all
    T.main([*common, "--output", str(tmp_path / "a")])
    T.main([*common, "--output", str(tmp_path / "b"), "--max-steps", "2"])
    T.main([*common, "--output", str(tmp_path / "b"), "--resume", "auto", "--max-steps", "4", "--workers", "2"])
    T.main(["--output", str(tmp_path / "b"), "--resume", str(tmp_path / "b" / "last.pt"), "--max-steps", "100"])     # flags from the file
    a, b = last_state(tmp_path / "a"), last_state(tmp_path / "b")
    assert a["step"] == 6 and a["evaluated"] == 2
    assert_same_state(a, b)
    records = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert records[0]["args"]["model"] == "secvit_t" and records[0]["parameters"] > 0 and records[0]["torch"] == torch.__version__
    assert [r["step"] for r in records[1:]] == [1, 2, 3, 3, 4, 5, 6, 6] and {"top1", "top5", "ema_top1"} <= records[-1].keys()
    assert all({"lr", "loss", "images_per_s", "time"} <= r.keys() for r in records[1:] if "lr" in r)
    assert Image.open(tmp_path / "a" / "curves.png").size == (1000, 380)
    resumed = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [r["resumed_at"] for r in resumed if "args" in r] == [0, 2, 4]
    assert [r["step"] for r in resumed if "step" in r] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_a_cut_off_log_line_is_passed_over(tmp_path):
    T.append(tmp_path / "log.jsonl", step=1, lr=0.1, loss=2.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lr": 0.1, "lo')
    T.append(tmp_path / "log.jsonl", step=2, loss=float("inf"), top1=50.0)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["top1"] == 50
    T.draw_curves(tmp_path, ["top1"])
    assert Image.open(tmp_path / "curves.png").size == (1000, 380)


def test_resume_takes_over_every_flag(tiny, folder, tmp_path):
    common = ["--model", "secvit_t", "--data", str(folder), *FAST, *FULL, "--frozen-bn", "--channels-last", "--released"]
    T.main([*common, "--output", str(tmp_path / "a"), "--max-steps", "4"])
    T.main([*common, "--output", str(tmp_path / "b"), "--max-steps", "2"])
    last = str(tmp_path / "b" / "last.pt")
    T.main(["--resume", last, "--max-steps", "1"])                                               # already further: nothing to do
    T.main(["--resume", last, "--max-steps", "4"])
    assert_same_state(last_state(tmp_path / "a"), last_state(tmp_path / "b"))
    with pytest.raises(T.InputError, match="epochs of the checkpoint have 3 updates, of this run 7"):
        T.main(["--resume", last, "--batch-size", "2"])


def test_files_with_a_namespace_load(tiny, folder, tmp_path, capsys):
    """The authors' scripts save argparse's namespace beside the model."""
    model = T.MODELS["secvit_t"](num_classes=2)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="SecViT_T", lr=5e-4)}, tmp_path / "theirs.pth")
    T.main(["--eval", "--weights", str(tmp_path / "theirs.pth"), "--model", "secvit_t", "--data", str(folder), "--img-size", "32"])
    assert json.loads(capsys.readouterr().out)["images"] == 7


def test_eval_repeats_the_runs_figures(tiny, folder, tmp_path, capsys):
    T.main(["--model", "secvit_t", "--data", str(folder), *FAST, *FULL, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    T.main(["--eval", "--weights", str(tmp_path / "last.pt")])
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 7 and all(scores[k] == pytest.approx(record[k]) for k in ("top1", "top5", "loss", "ema_top1", "ema_loss"))


def test_accumulated_micro_batches_add_up_to_the_batch(tiny, folder, tmp_path):
    """Without batch statistics (frozen BN) the split into micro-batches does not change the update."""
    common = ["--model", "secvit_t", "--data", str(folder), *FAST, "--frozen-bn", "--max-steps", "2", "--repeated-aug", "1",
              *"--mixup 0 --cutmix 0 --random-erase 0 --drop-path 0".split()]
    losses = []
    for micro in ("1", "4"):
        T.main([*common, "--micro-batch", micro, "--output", str(tmp_path / micro)])
        losses.append([json.loads(line)["loss"] for line in (tmp_path / micro / "log.jsonl").read_text().splitlines()[1:3]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    state = last_state(tmp_path / "4")["model"]
    assert state["stem.1.num_batches_tracked"] == 0 and state["stem.1.running_mean"].abs().max() == 0      # statistics untouched


@pytest.mark.parametrize("flags", [["--amp", "bf16", "--channels-last"], ["--amp", "fp16", "--clip-grad", "1", "--deterministic"],
                                   ["--released", "--clip-grad", "0.5"], ["--repeated-aug", "3", "--sync-bn"]])
def test_options_run(tiny, folder, tmp_path, flags):
    T.main(["--model", "secvit_t", "--data", str(folder), *FAST, "--max-steps", "2", "--output", str(tmp_path), *flags])
    assert all(v.isfinite().all() for v in last_state(tmp_path)["model"].values())


def test_damaged_checkpoints_are_skipped_or_refused(tiny, folder, tmp_path, capsys):
    common = ["--model", "secvit_t", "--data", str(folder), *FAST, "--output", str(tmp_path)]
    T.main([*common, "--max-steps", "3"])
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[:len(whole) // 2])
    os.utime(tmp_path / "last.pt", (time.time() + 5,) * 2)
    T.main([*common, "--max-steps", "4", "--resume", "auto"])                                    # goes on from best.pt
    assert "skipped" in capsys.readouterr().err and last_state(tmp_path)["step"] == 4
    (tmp_path / "cut.pt").write_bytes(whole[:1000])
    with pytest.raises(T.InputError, match="cannot read .*cut.pt"):
        T.main([*common, "--resume", str(tmp_path / "cut.pt")])


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    T.save_checkpoint(path, {"step": 1})

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(T.InputError, match="previous checkpoint is untouched"):
        T.save_checkpoint(path, {"step": 2})
    assert torch.load(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_stops_the_run(tiny, folder, tmp_path):
    with pytest.raises(T.InputError, match=r"loss (nan|inf) at update [23] not finite, learning rate .*; last finite checkpoint: none yet"):
        T.main(["--model", "secvit_t", "--data", str(folder), *FAST, "--lr", "1e30", "--warmup-epochs", "0", "--output", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------- as users start it
def launch(*arguments, world=0, **environment):
    """train_imagenet.py in a process of its own, under torchrun if `world`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world else []
    command = [sys.executable, *torchrun, str(ROOT / "train_imagenet.py"), *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def losses_of(output):
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "lr" in r], [r["top5"] for r in records if "top5" in r]


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU")
def test_two_processes_equal_one(folder, tmp_path):
    common = ["--model", "secvit_t", "--data", folder, *FAST, *FULL, "--max-steps", 3]
    for world in (1, 2):
        run = launch(*common, "--output", tmp_path / str(world), world=world)
        assert run.wait() == 0, run.stderr.read()
    (one, _), (two, _) = (losses_of(tmp_path / str(world)) for world in (1, 2))
    assert len(one) == 3 and one == pytest.approx(two, rel=2e-5)
    run = launch("--eval", "--weights", tmp_path / "2" / "last.pt", world=3)                     # 7 images: 3, 2, 2
    out, err = run.communicate()
    assert run.returncode == 0, err
    evaluated = json.loads(out.splitlines()[-1])
    log = json.loads((tmp_path / "2" / "log.jsonl").read_text().splitlines()[-1])
    assert evaluated["images"] == 7 and evaluated["top1"] == pytest.approx(log["top1"]) and evaluated["loss"] == pytest.approx(log["loss"])


def test_sigterm_saves_and_the_resumed_run_is_exact(folder, tmp_path):
    common = ["--model", "secvit_t", "--data", folder, *FAST, *FULL, "--workers", 2]
    run = launch(*common, "--output", tmp_path / "stopped")
    log = tmp_path / "stopped" / "log.jsonl"
    while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGTERM)                                     # loader workers get it too, as under a scheduler
    out, err = run.communicate()
    assert run.returncode == 0 and "resume with --resume" in out, err
    assert last_state(tmp_path / "stopped")["step"] < 6
    for output in ("stopped", "whole"):
        run = launch(*common, "--output", tmp_path / output, "--resume", "auto")
        assert run.wait() == 0, run.stderr.read()
    assert_same_state(last_state(tmp_path / "stopped"), last_state(tmp_path / "whole"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU")
def test_a_process_that_dies_ends_the_other(folder, tmp_path):
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    common = ["--model", "secvit_t", "--data", folder, *FAST, "--epochs", 500, "--output", tmp_path]
    runs = [launch(*common, **shared, RANK=str(r), LOCAL_RANK=str(r)) for r in (0, 1)]
    log = tmp_path / "log.jsonl"
    while runs[0].poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.05)
    runs[1].kill()
    out, err = runs[0].communicate(timeout=60)
    assert runs[0].returncode != 0 and err.strip(), out


BAD = {  # what is typed -> what the one line says; {d} a good folder, {t} an empty one
    "--model resnet50": "unknown --model 'resnet50', expected one of clustr_t",
    "--data {t}/nowhere": "nowhere.*is not a folder",
    "--data {t}": "train is not a folder",
    "--data {t}/empty": "holds no image",
    "--data {t}/differ": r"differ in classes \['cat', 'wolf'\]",
    "--data {d} --batch-size 6 --micro-batch 4": "6 is not a multiple of --micro-batch 4 x 1 processes",
    "--data {d} --batch-size 512": "512 is larger than the 14 training images",
    "--data {d} --img-size 16": "--img-size: 16, expected at least 32",
    "--data {d} --epochs 0": "--epochs: 0, expected at least 1",
    "--data {d} --micro-batch 0": "--micro-batch: 0, expected at least 1",
    "--data {d} --drop-path 1.5": "--drop-path: 1.5, expected at least 0, at most 0.99",
    "--data {d} --lr nan": "--lr: nan, expected at least 0",
    "--data {d} --clip-grad 0": "--clip-grad: 0, expected above 0",
    "--data {d} --batch-size 1 --img-size 32": "leaves batch norm a single value",
    "--data {d} --randaug rand-m9": "'rand-m9', expected none or rand-m",
    "--epochs ten": "invalid int value: 'ten'",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--model stvit_s --released": "--released is a variant of SecViT",
    "--model sec_swin_t --released": "--released is a variant of SecViT, not of sec_swin_t",
    "--eval": "--eval needs --weights",
    "--resume {t}/none.pt": "no checkpoint .*none.pt",
    "--model secvit_t --weights {t}/cut.pt --data {d} --batch-size 2": "cannot read .*cut.pt",
    "--resume {t}/of_stvit.pt --model secvit_t": "one of stvit_s, --model says secvit_t",
    "--weights {t}/of_stvit.pt --model secvit_t --data {d} --batch-size 2": "do not fit SecViT",
    "--eval --weights {t}/part.pt --model secvit_t --data {d} --batch-size 2": "do not fit SecViT: [0-9]+ tensors are missing",
    "--resume {t}/part.pt": "part.pt is no checkpoint of this script",
    "--model secvit_t --data {d} --batch-size 2 --output {t}/cut.pt": "File exists",
    "--model secvit_t --data {t}/broken_train --batch-size 1 --repeated-aug 1 --workers 0": "ten files in a row cannot be decoded",
}


@pytest.fixture(scope="session")
def bad(tmp_path_factory, folder):
    """A folder of wrong things."""
    root = tmp_path_factory.mktemp("bad")
    for split, names in (("train", ("cat", "dog")), ("val", ("dog", "wolf"))):
        for name in names:
            (root / "differ" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / "differ" / split / name / "a.png")
            (root / "empty" / split / name).mkdir(parents=True)
            (root / "broken_train" / split / "x").mkdir(parents=True, exist_ok=True)
    for i in range(12):
        (root / "broken_train" / "train" / "x" / f"{i}.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(root / "broken_train" / "val" / "x" / "a.png")
    (root / "cut.pt").write_bytes(b"PK\x03\x04 not all of it")
    state = {"step": 1, "per_epoch": 1, "args": {"model": "stvit_s"}, "model": {"stem.0.weightless": torch.zeros(2)}}
    torch.save(state, root / "of_stvit.pt")
    torch.save({"stem.0.weight": torch.zeros(8, 3, 3, 3)}, root / "part.pt")
    return root


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line_and_status_2(tiny, folder, bad, tmp_path, monkeypatch, capsys, typed):
    words = typed.format(d=folder, t=bad).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *words])
    monkeypatch.setitem(sys.modules, "secvit", secvit)
    monkeypatch.setattr(secvit, "secvit_t", T.MODELS["secvit_t"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "train_imagenet.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "img/s" not in line and "no --data" not in line]
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("train_imagenet.py: "), lines
    assert re.search(BAD[typed], lines[0]), lines[0]


def test_an_unreadable_validation_image_is_an_error(tiny, bad, folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "0.png")
    (tmp_path / "val" / "a" / "1.png").write_bytes(b"x")
    with pytest.raises(T.InputError, match="validation image cannot be decoded: .*1.png"):
        T.main(["--model", "secvit_t", "--data", str(tmp_path), *FAST, "--img-size", "64", "--batch-size", "1", "--micro-batch", "1",
                "--repeated-aug", "1", "--output", str(tmp_path / "o")])


def test_fewer_gpus_than_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(T.InputError, match="process 1 of this machine has no GPU: 1 found"):
        T.Processes()
