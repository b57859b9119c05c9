"""train_dense.py as users run it: settings, whole runs, exact resume, processes, errors."""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_imagenet import (
    assert_same_state,
    last_state,
    logged_updates,
    read_records,
    write_checkpoint,
)

import linglo
import secvit
import train_dense
import train_imagenet

ROOT = Path(train_dense.__file__).parent
FAST = (
    "--img-size 64 --batch-size 4 --micro-batch 2 --iters 5 --lr 1e-3 --workers 0 --log-every 1 "
    "--eval-every 2 --backbone secvit_t"
).split()
EXTRA = {
    "mask_rcnn": ["--rois", "16"],
    "cascade_mask_rcnn": ["--rois", "16"],
    "pose": ["--img-size", "128"],
}


def run(*flags):
    train_dense.main([str(flag) for flag in flags])


def run_flags(task, data, output, *more):
    flags = ["--task", task, "--data", data, "--output", output]
    flags += [*FAST, *EXTRA.get(task, []), *more]
    return [str(flag) for flag in flags]


def evaluations_of(output):
    return [record for record in read_records(output) if "best" in record]


def fails(flags, message):
    errors = (train_dense.InputError, OSError)
    with pytest.raises(errors, match=message):
        run(*flags)


# -------------------------------------------------------------------------------------- settings
def resolve(*flags):
    return train_dense.resolve_args(flags)[0]


def test_defaults_of_a_task():
    args = resolve("--task", "cascade_mask_rcnn", "--data", "coco")
    assert (args.schedule, args.epochs) == ("3x", 36)
    assert (args.box_head, args.rois) == ("4conv1fc", 512)
    assert args.sync_bn


def test_a_schedule_brings_its_epochs():
    flags = ("--task", "cascade_mask_rcnn", "--data", "coco", "--schedule", "1x")
    args = resolve(*flags, "--box-head", "2fc")
    assert (args.schedule, args.epochs, args.box_head) == ("1x", 12, "2fc")


def test_a_typed_length_replaces_the_recipes():
    flags = ("--task", "mask_rcnn", "--data", "coco")
    args = resolve(*flags, "--schedule", "3x", "--iters", "9")
    assert (args.schedule, args.epochs, args.iters) == ("3x", None, 9)


@pytest.mark.parametrize("backbone", ["clustr_s", "linglo_b1"])
def test_a_familys_recipe_overrides_the_task(backbone):
    args = resolve("--task", "mask_rcnn", "--data", "coco", "--backbone", backbone)
    assert (args.lr, args.weight_decay) == (2e-4, 1e-4)


def test_drawn_scenes_override_the_task():
    args = resolve("--task", "semfpn")
    assert (args.backbone, args.iters) == ("linglo_b0", 660)
    assert (args.img_size, args.micro_batch) == (96, 4)


def test_a_typed_flag_overrides_everything():
    assert resolve("--task", "semfpn", "--img-size", "64").img_size == 64


@pytest.mark.parametrize("task, micro", [("semfpn", 16), ("retinanet", 2), ("pose", 64)])
def test_micro_batch_of_a_task(task, micro):
    assert resolve("--task", task, "--data", "x").micro_batch == micro


def test_micro_batch_of_drawn_detection():
    assert resolve("--task", "retinanet").micro_batch == 4


@pytest.mark.parametrize("backbone, rate", [
    ("secvit_t", None), ("sec_swin_s", None), ("stvit_b", 0.3), ("clustr_t", 0.1)])
def test_drop_path_of_a_family(backbone, rate):
    """None: the factory's own, as in classification."""
    args = resolve("--task", "retinanet", "--data", "x", "--backbone", backbone)
    assert args.drop_path == rate


@pytest.mark.parametrize("task, backbone, rate", [
    ("upernet", "clustr_t", 0.3),
    ("upernet", "secvit_t", None),
    ("upernet", "sec_swin_s", None),
    ("pose", "secvit_t", 0.0),
    ("pose", "stvit_l", 0.0),
])
def test_drop_path_of_a_task(task, backbone, rate):
    args = resolve("--task", task, "--data", "x", "--backbone", backbone)
    assert args.drop_path == rate


@pytest.mark.parametrize("task, backbone, norm_decay", [
    ("semfpn", "secvit_t", True),
    ("upernet", "secvit_t", False),
    ("mask_rcnn", "stvit_s", False),
    ("mask_rcnn", "linglo_b1", True),
    ("mask_rcnn", "clustr_t", True),
    ("cascade_mask_rcnn", "linglo_b1", False),
    ("pose", "clustr_t", True),
])
def test_norms_are_exempt_from_decay_with_swins_recipes_only(task, backbone, norm_decay):
    args = resolve("--task", task, "--data", "x", "--backbone", backbone)
    assert args.norm_decay == norm_decay


# ------------------------------------------------------------------------------------ whole runs
@pytest.mark.parametrize("task", ["semfpn", "upernet", "retinanet", "mask_rcnn", "pose"])
def test_a_run_resumes_exactly_evaluates_and_predicts(tiny, scenes, tmp_path, task, capsys):
    whole = tmp_path / "whole"
    run(*run_flags(task, scenes, whole))
    check_resumed(task, scenes, tmp_path, last_state(whole))
    records = read_records(whole)
    assert [record["step"] for record in records[1:]] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert (whole / "curves.png").exists()
    check_evaluated(task, whole, capsys)
    check_predicted(task, scenes, whole, capsys)
    check_results(task, scenes, whole, capsys)


def check_resumed(task, scenes, tmp_path, expected):
    output = tmp_path / "parts"
    run(*run_flags(task, scenes, output, "--max-steps", 3))
    resume = ["--resume", "auto", "--output", output, "--task", task]
    resume += ["--backbone", "secvit_t", "--workers", "1"]
    run(*resume, "--max-steps", "9")
    assert_same_state(expected, last_state(output))


def check_evaluated(task, output, capsys):
    last = evaluations_of(output)[-1]
    capsys.readouterr()
    run("--eval", "--weights", output / "last.pt")
    printed = json.loads(capsys.readouterr().out)
    assert train_dense.TASKS[task].metric in printed
    if task != "pose":
        check_per_class(printed, train_dense.TASKS[task].metric)
    for name in printed.keys() - {"task", "backbone", "weights", "images", "per_class"}:
        assert printed[name] == last[name], name


def check_per_class(printed, metric):
    """The metric of a run is the mean over its classes, whose values are rounded."""
    values = list(printed["per_class"].values())
    assert np.mean(values) == pytest.approx(printed[metric], abs=6e-4)


def check_predicted(task, scenes, output, capsys):
    image = scenes / "val2017" / "000000000001.jpg"
    weights = output / "last.pt"
    flags = [] if task in train_dense.SEGMENTATION else ["--threshold", "0"]
    run("--predict", image, "--weights", weights, "--output", output, *flags)
    overlay = output / f"000000000001_{task}.png"
    width, height = Image.open(image).size
    assert Image.open(overlay).size in [(2 * width, 2 * height), (3 * width, 3 * height)]
    line = json.loads(capsys.readouterr().out)
    assert line.pop("image") == str(image)
    assert line.pop("overlay") == str(overlay)
    assert list(line) == ["pixels" if task in train_dense.SEGMENTATION else "objects"]


RESULTS = {  # of each task: the names that --score's names have in --eval, by file
    "semfpn": "labels",
    "upernet": "labels",
    "retinanet": "results.json",
    "mask_rcnn": "results.{}.json",
    "pose": "results.json",
}


def check_results(task, scenes, output, capsys, *score_flags):
    """What --eval --results writes scores with --score what --eval prints."""
    given = output / RESULTS[task].replace(".{}", "")
    run("--eval", "--weights", output / "last.pt", "--results", given)
    evaluated = json.loads(capsys.readouterr().out)
    kinds = ("bbox", "segm") if "{}" in RESULTS[task] else ("",)
    scores = {}
    for kind in kinds:
        file = output / RESULTS[task].format(kind)
        run("--task", task, "--data", scenes, "--score", file, *score_flags)
        scores |= json.loads(capsys.readouterr().out)
    scores.pop("kind", None)
    metrics = evaluated.keys() - {"task", "backbone", "weights", "images", "per_class"}
    assert scores == {name: evaluated[name] for name in metrics}


LOSSES = {
    "semfpn": ["loss_seg"],
    "upernet": ["loss_seg", "loss_aux"],
    "retinanet": ["loss_cls", "loss_box"],
    "mask_rcnn": ["loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"],
    "pose": ["loss_heatmap"],
}


@pytest.mark.parametrize("task", LOSSES)
def test_every_loss_is_logged_and_they_add_up(tiny, scenes, tmp_path, task):
    run(*run_flags(task, scenes, tmp_path, "--max-steps", 1))
    record = read_records(tmp_path)[1]
    assert list(record["losses"]) == LOSSES[task]
    assert sum(record["losses"].values()) == pytest.approx(record["loss"])


def test_cascade_trains_evaluates_and_predicts(tiny, scenes, tmp_path, capsys):
    run(*run_flags("cascade_mask_rcnn", scenes, tmp_path, "--iters", 1))
    stages = []
    for i in (1, 2, 3):
        stages += [f"stage{i}_loss_{kind}" for kind in ("cls", "box", "mask")]
    names = list(read_records(tmp_path)[1]["losses"])
    assert names == ["loss_rpn_cls", "loss_rpn_box", *stages]
    metrics = evaluations_of(tmp_path)[0]
    assert sum(name.startswith("mask_A") for name in metrics) == 12
    check_evaluated("cascade_mask_rcnn", tmp_path, capsys)
    check_predicted("cascade_mask_rcnn", scenes, tmp_path, capsys)


def test_label_0_is_a_class_from_training_to_evaluation(tiny, scenes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    (data / "objectInfo.txt").unlink()
    names = ["frame", *train_dense.SCENE_CLASSES]
    (data / "classes.txt").write_text("\n".join(names))
    run(*run_flags("semfpn", data, tmp_path / "run", "--zero-is-class", "--iters", 1))
    state = last_state(tmp_path / "run")
    assert state["classes"] == names
    assert len(state["model"]["classifier.weight"]) == 8
    check_evaluated("semfpn", tmp_path / "run", capsys)
    check_results("semfpn", data, tmp_path / "run", capsys, "--zero-is-class")
    truth = data / "annotations" / "validation"
    score = ["--task", "semfpn", "--data", data, "--score", truth]
    run(*score, "--zero-is-class")
    assert json.loads(capsys.readouterr().out)["mIoU"] == 1


def test_resume_refuses_another_batch(tiny, scenes, tmp_path):
    run(*run_flags("semfpn", scenes, tmp_path, "--max-steps", 2))
    resume = ["--resume", tmp_path / "last.pt", "--output", tmp_path]
    other = ["--batch-size", 2, "--micro-batch", 1]
    fails([*resume, *other], "have 3 updates, of this run 6")


def test_resume_refuses_other_classes(tiny, scenes, tmp_path):
    run(*run_flags("semfpn", scenes, tmp_path / "run", "--max-steps", 2))
    shutil.copytree(scenes, tmp_path / "other")
    names = tmp_path / "other" / "objectInfo.txt"
    names.write_text("Idx\tName\n" + "1\tall\n" * 10)
    resume = ["--resume", tmp_path / "run" / "last.pt"]
    resume += ["--data", tmp_path / "other"]
    fails([*resume, "--output", tmp_path], "has the classes 7 .*, the data has 10")


def test_a_resumed_run_may_be_evaluated_more_often(tiny, scenes, tmp_path):
    run(*run_flags("semfpn", scenes, tmp_path, "--max-steps", 2))
    resume = ["--resume", tmp_path / "last.pt", "--output", tmp_path]
    run(*resume, "--eval-every", "1", "--iters", "4")
    steps = [record["step"] for record in evaluations_of(tmp_path)]
    assert steps == [2, 3, 4]


# ---------------------------------------------------------------------------------- fine-tuning
def run_other_classes(scenes, folder, task, *flags):
    """An update on the scenes with names for seven classes more, or without category 10."""
    data = folder / "other"
    shutil.copytree(scenes, data)
    (data / "objectInfo.txt").write_text("Idx\tName\n" + "".join(f"1\t{i}\n" for i in range(14)))
    for path in (data / "annotations").glob("instances_*.json"):
        content = json.loads(path.read_text())
        content["categories"].pop()
        kept = [a for a in content["annotations"] if a["category_id"] != 10]
        path.write_text(json.dumps(content | {"annotations": kept}))
    output = folder / "fine"
    fast = [*FAST[:FAST.index("--backbone")], *EXTRA.get(task, []), "--lr", "0", "--iters", "1"]
    run("--data", data, "--output", output, *fast, *flags)
    return last_state(output)


LEFT_OUT = {
    "semfpn": {"classifier"},
    "retinanet": {"classifier.8"},
    "mask_rcnn": {"box_heads.0.classifier", "box_heads.0.regressor", "mask_heads.0.10"},
}


@pytest.mark.parametrize("task", LEFT_OUT)
def test_training_starts_from_a_checkpoint_of_other_classes(tiny, scenes, tmp_path, task, capsys):
    """Task and backbone are the checkpoint's; heads of another number of classes are new."""
    run(*run_flags(task, scenes, tmp_path / "first", "--iters", "1"))
    first = last_state(tmp_path / "first")["model"]
    capsys.readouterr()
    fine = run_other_classes(scenes, tmp_path, task, "--weights", tmp_path / "first" / "last.pt")
    report = capsys.readouterr().out.splitlines()[0]
    path = tmp_path / "first" / "last.pt"
    names = " and ".join(sorted(LEFT_OUT[task]))
    assert report == f"{path}: loaded, without {names}: other classes"
    assert (fine["args"]["task"], fine["args"]["backbone"]) == (task, "secvit_t")
    assert fine["args"]["frozen_bn"]
    for name, tensor in fine["model"].items():
        layer, _, kind = name.rpartition(".")
        if layer not in LEFT_OUT[task] and kind in ("weight", "bias"):
            assert torch.equal(tensor, first[name]), name


def test_training_starts_from_a_checkpoint_of_the_same_classes(tiny, scenes, tmp_path, capsys):
    run(*run_flags("semfpn", scenes, tmp_path / "a", "--iters", 1))
    capsys.readouterr()
    start = tmp_path / "a" / "last.pt"
    run(*run_flags("semfpn", scenes, tmp_path / "b", "--iters", 1, "--weights", start))
    assert capsys.readouterr().out.startswith(f"{start}: loaded\n")


def test_a_checkpoint_of_another_task_is_refused(tiny, scenes, tmp_path):
    run(*run_flags("semfpn", scenes, tmp_path, "--iters", 1))
    flags = ["--task", "upernet", "--weights", tmp_path / "last.pt", "--data", scenes]
    fails(flags, "the checkpoint holds semfpn, but --task is upernet")


def test_options_reach_the_backbone_and_are_restored(tiny, scenes, tmp_path, capsys):
    """Those of a checkpoint of either script, too."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split / "a").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(data / split / "a" / "a.png")
    flags = "--model secvit_t --img-size 64 --batch-size 1 --repeated-aug 1 --epochs 1 --workers 0"
    flags = [*flags.split(), "--data", data, "--output", tmp_path / "first"]
    train_imagenet.main([*map(str, flags), "--option", "lce=false"])
    weights = tmp_path / "first" / "last.pt"
    output = tmp_path / "run"
    run(*run_flags("semfpn", scenes, output, "--iters", 1, "--backbone-weights", weights))
    assert not any("lce" in name for name in last_state(output)["model"])
    check_evaluated("semfpn", output, capsys)
    args = resolve("--weights", str(output / "last.pt"), "--data", str(scenes))
    assert args.option == {"lce": False}


@pytest.mark.parametrize("released", [False, True])
def test_backbone_weights_say_whether_they_are_released(tmp_path, released):
    """And which model they are."""
    model = secvit.secvit_t(num_classes=2, released=released)
    args = {"model": "secvit_t", "released": released}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "own.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    from_own = resolve("--data", "x", "--backbone-weights", str(tmp_path / "own.pt"))
    assert (from_own.backbone, from_own.released) == ("secvit_t", released)
    flags = ("--backbone", "secvit_t", "--backbone-weights", str(tmp_path / "bare.pt"))
    assert resolve("--data", "x", *flags).released == released


@pytest.mark.parametrize("bare", [False, True])
def test_backbone_weights_may_be_deployed(tmp_path, bare):
    """By `linglo.py --deploy`, or as a state dict after `reparameterize`."""
    classifier = linglo.linglo_b0(num_classes=2).reparameterize()
    path = tmp_path / "deployed.pt"
    torch.save(classifier.state_dict(), path)
    if not bare:
        torch.save(linglo.deploy("linglo_b0", path), path)
    backbone = ["--backbone", "linglo_b0"] if bare else []
    args = resolve("--task", "semfpn", "--data", "x", *backbone, "--backbone-weights", str(path))
    assert (args.backbone, args.option) == ("linglo_b0", {"cpe": "folded"})
    task = train_dense.Segmentation(args, torch.device("cpu"))
    model = task.build_model(["a", "b"])
    task.load_pretrained(model)
    expected = classifier.state_dict()
    for name, tensor in model.backbone.net.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_resume_refuses_another_schedule(tiny, scenes, tmp_path):
    """Its rates and crops would be others, its length the old one."""
    run(*run_flags("retinanet", scenes, tmp_path, "--max-steps", 1))
    flags = ["--resume", tmp_path / "last.pt", "--schedule", "3x"]
    fails(flags, "the checkpoint holds 1x, but --schedule is 3x")


@pytest.mark.parametrize("task, losses", [("semfpn", 1), ("retinanet", 2)])
def test_a_compiled_model_trains(tiny, scenes, tmp_path, task, losses, monkeypatch):
    compiled = []

    def compile_nothing(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    run(*run_flags(task, scenes, tmp_path, "--compile", "--max-steps", 1))
    assert len(compiled) == 1
    assert len(read_records(tmp_path)[1]["losses"]) == losses


def test_predict_reads_any_image_and_keeps_equal_names_apart(tiny, scenes, tmp_path):
    run(*run_flags("retinanet", scenes, tmp_path / "run", "--iters", 1))
    weights = str(tmp_path / "run" / "last.pt")
    sizes = {"L": (400, 30), "P": (3000, 1), "RGBA": (5, 900)}
    images = []
    for mode, size in sizes.items():
        (tmp_path / mode).mkdir()
        images.append(str(tmp_path / mode / "image.png"))
        Image.new(mode, size).save(images[-1])
    output = tmp_path / "overlays"
    run("--predict", *images, "--weights", weights, "--output", output)
    for suffix, size in zip(("", "_1", "_2"), sizes.values()):
        overlay = output / f"image{suffix}_retinanet.png"
        assert Image.open(overlay).size == size


@pytest.fixture
def retinanet(tiny, scenes, tmp_path):
    """A checkpoint of a RetinaNet after one update."""
    run(*run_flags("retinanet", scenes, tmp_path / "run", "--iters", 1))
    return str(tmp_path / "run" / "last.pt")


def test_predict_takes_folders(retinanet, tmp_path, capsys):
    """At any depth, but no hidden ones; other files are left alone."""
    folder = tmp_path / "photos"
    for name in ("b.jpg", "deep/a.png", ".hidden/c.jpg", "._b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    capsys.readouterr()
    run("--predict", folder, folder / "b.jpg", "--weights", retinanet, "--output", tmp_path)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(folder / "b.jpg"), str(folder / "deep/a.png")]


def test_predict_names_an_unreadable_image_and_goes_on(retinanet, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"no image")
    Image.new("RGB", (50, 40)).save(photos / "b.jpg")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run("--predict", photos, "--weights", retinanet, "--output", tmp_path)
    output = capsys.readouterr()
    assert exit.value.code == 2
    assert output.err.startswith(f"cannot decode {photos / 'a.jpg'}: ")
    assert output.err.count("\n") == 1
    assert json.loads(output.out)["image"] == str(photos / "b.jpg")


def test_the_threshold_decides_what_is_counted():
    args = argparse.Namespace(task="retinanet", backbone="secvit_t", threshold=0.5)
    prediction = np.zeros((4, 4)), np.array([0.9, 0.6, 0.5, 0.4]), np.array([1, 0, 1, 0])
    task = train_dense.Detection(args, torch.device("cpu"))
    assert task.describe(prediction, ["cat", "dog"]) == {"objects": {"dog": 2, "cat": 1}}


# A process of its own has no fixtures: it shrinks the models, then does what the script does.
LAUNCHER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, train_dense
conftest.shrink_dense(dict.__setitem__, setattr)
train_dense.train_imagenet.run_main(train_dense.main, "train_dense.py")
"""


def launch(folder, world, *flags):
    """train_dense.py with tiny models, in `world` processes; its output folder."""
    launcher = folder / "launcher.py"
    tests = str(Path(__file__).parent)
    launcher.write_text(LAUNCHER.format(root=str(ROOT), tests=tests))
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command.append(f"--nproc-per-node={world}")
    command += [str(launcher), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU")
@pytest.mark.parametrize("task", ["retinanet", "mask_rcnn", "pose"])
def test_two_processes_equal_one(scenes, tmp_path, task):
    for world in (1, 2):
        output = tmp_path / str(world)
        launch(tmp_path, world, *run_flags(task, scenes, output, "--iters", 2))
    one, two = (logged_losses(tmp_path / world) for world in ("1", "2"))
    assert one == pytest.approx(two, rel=1e-4)
    one, two = (read_records(tmp_path / world)[-1] for world in ("1", "2"))
    assert one.keys() == two.keys()


def logged_losses(output):
    return [record["loss"] for record in logged_updates(output)]


# --------------------------------------------------------------------------------------- scoring
def test_score_of_true_label_maps_is_perfect(scenes, capsys):
    truth = str(scenes / "annotations" / "validation")
    run("--task", "semfpn", "--data", scenes, "--score", truth)
    assert json.loads(capsys.readouterr().out) == dict(mIoU=1, mAcc=1, aAcc=1)


def test_score_of_true_boxes_is_perfect(scenes, tmp_path, capsys):
    write_results(scenes, tmp_path / "results.json", "bbox")
    flags = ["--task", "retinanet", "--data", scenes]
    run(*flags, "--score", tmp_path / "results.json")
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == "kind AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    assert (scores["kind"], scores["AP"], scores["AR100"]) == ("bbox", 1, 1)


def write_results(scenes, path, *kinds):
    """The annotated validation objects as a results file with the given fields."""
    data = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    results = []
    for annotation in data["annotations"]:
        if not annotation["iscrowd"]:
            fields = ("image_id", "category_id", *kinds)
            results.append({name: annotation[name] for name in fields} | {"score": 0.9})
    path.write_text(json.dumps(results))


def shaken_truth(task, source, rng):
    """A `predict` that returns one image after the other: objects that are moved or left out."""
    def boxes_of(index):
        _, boxes, labels, *_ = source.read(index)
        keep = rng.random(len(boxes)) < 0.8
        boxes = boxes + rng.normal(0, 3, boxes.shape).astype(np.float32)
        scores = rng.random(len(boxes)).astype(np.float32)
        return boxes[keep], scores[keep], labels[keep]

    def predict_objects(_model, image):
        boxes, scores, labels = boxes_of(next(indices))
        masks = np.zeros((len(boxes), image.height, image.width), bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.clip(0).astype(int)):
            mask[top:bottom, left:right] = True
        masks &= rng.random(masks.shape) < 0.9
        detections = boxes, scores, labels
        return (*detections, masks) if task == "mask_rcnn" else detections

    def predict_poses(_model, _image, boxes):
        points = source.read(next(indices))[2].astype(np.float64)
        points += rng.normal(0, 0.5, points.shape)
        return points, rng.random(len(boxes))

    indices = iter(range(len(source)))
    return predict_poses if task == "pose" else predict_objects


@pytest.mark.parametrize("task", ["retinanet", "mask_rcnn", "pose"])
def test_results_score_what_their_evaluation_prints(scenes, tmp_path, monkeypatch, task):
    """To the last digit."""
    args = argparse.Namespace(task=task, backbone="secvit_t", keypoints=133, boxes=None)
    a_task = train_dense.TASKS[task](args, torch.device("cpu"))
    source = a_task.open_split(scenes, "val")
    monkeypatch.setattr(a_task, "predict", shaken_truth(task, source, np.random.default_rng(0)))
    records = []
    results = []
    for index in range(len(source)):
        sample = a_task.test_sample(source, index, None)
        prediction = a_task.infer(None, sample)
        records.append(a_task.record(source, sample, prediction))
        results += a_task.results(source, sample, prediction)
    expected = a_task.summarize(source, records)
    a_task.write_results(tmp_path / "results.json", results)
    scores = {}
    for file in sorted(tmp_path.glob("*.json")):
        scores |= a_task.score_results(source, file)
    scores.pop("kind", None)
    assert scores == expected
    assert 0.05 < expected[a_task.metric] < 0.95


# ---------------------------------------------------------------------------------------- errors
@pytest.fixture
def copied(scenes, tmp_path):
    """A copy of the scenes that a test may damage."""
    shutil.copytree(scenes, tmp_path / "copied")
    return tmp_path / "copied"


def test_files_that_are_no_json(copied):
    (copied / "annotations" / "instances_val2017.json").write_text('{"images": [')
    (copied / "results.json").write_text("[]")
    score = ["--score", copied / "results.json"]
    fails(["--task", "retinanet", "--data", copied, *score], "no COCO annotation file")


@pytest.mark.parametrize("task, message", [
    ("retinanet", "cannot read .*nowhere"), ("semfpn", "nowhere.* is not a folder")])
def test_missing_folders(tmp_path, task, message):
    fails(["--task", task, "--data", tmp_path / "nowhere"], message)


@pytest.mark.parametrize("labels, message", [
    (np.full((9, 9), 8, np.uint8), "label 8 out of range, there are 7 classes"),
    (np.full((9, 9), 7, np.uint8), "9 x 9, its image"),
    (None, "results lacks .*png")])
def test_broken_predictions_of_segmentation(scenes, tmp_path, labels, message):
    shutil.copytree(scenes / "annotations" / "validation", tmp_path / "results")
    first = sorted((tmp_path / "results").iterdir())[0]
    first.unlink()
    if labels is not None:
        Image.fromarray(labels).save(first)
    score = ["--score", tmp_path / "results"]
    fails(["--task", "semfpn", "--data", scenes, *score], message)


def test_a_missing_label_map(copied):
    sorted((copied / "annotations" / "validation").iterdir())[0].unlink()
    fails(["--task", "semfpn", "--data", copied], "validation lacks the label map of")


@pytest.mark.parametrize("change, message", [
    ({"image_id": 77}, "unknown image id 77"),
    ({"category_id": 5}, "unknown category id 5"),
    ({"score": None}, "score None, expected a finite number"),
    ({"bbox": [1, 2, 3, float("nan")]}, "expected x, y, width, height")])
def test_broken_results_are_refused(scenes, tmp_path, change, message):
    result = dict(image_id=1, category_id=1, score=0.5, bbox=[1, 2, 3, 4]) | change
    (tmp_path / "results.json").write_text(json.dumps([result]))
    score = ["--score", tmp_path / "results.json"]
    fails(["--task", "retinanet", "--data", scenes, *score], message)


def test_an_unreadable_training_image_is_replaced(tiny, copied, tmp_path):
    (copied / "train2017" / "000000000001.jpg").write_bytes(b"no image")
    run(*run_flags("retinanet", copied, tmp_path, "--iters", 3, "--eval-every", 3))
    assert sum("unreadable_file" in record for record in read_records(tmp_path)) == 1


def test_an_unreadable_validation_image_is_an_error(tiny, copied, tmp_path):
    (copied / "val2017" / "000000000001.jpg").write_bytes(b"no image")
    flags = run_flags("retinanet", copied, tmp_path, "--iters", 1)
    fails(flags, "validation image cannot be decoded")


def test_a_missing_validation_image_is_an_error_at_the_start(tiny, copied, tmp_path):
    (copied / "val2017" / "000000000001.jpg").unlink()
    flags = run_flags("retinanet", copied, tmp_path)
    fails(flags, "validation image .*000000000001.jpg is missing")
    assert not (tmp_path / "log.jsonl").exists()


BAD = {
    "--task sem": "unknown --task 'sem', expected one of semfpn",
    "--backbone resnet": "unknown --backbone 'resnet'",
    "--iters 5 --epochs 2": "--iters and --epochs are mutually exclusive",
    "--backbone stvit_s --released": "--released is a variant of SecViT",
    "--task retinanet --ms-test": "--ms-test is for semfpn and upernet, not for retinanet",
    "--schedule 3x": "--schedule is for retinanet and mask_rcnn and cascade_mask_rcnn",
    "--task mask_rcnn --box-head 2fc": "--box-head is for cascade_mask_rcnn, not for mask_rcnn",
    "--task retinanet --rois 64": "--rois is for mask_rcnn",
    "--task mask_rcnn --compile": "--compile is for .*, not for mask_rcnn",
    "--task mask_rcnn --jitter 0": "--jitter is for pose",
    "--task pose --img-size 200": "--img-size 200: pose needs a multiple of 128",
    "--eval": "--eval needs --weights",
    "--weights x.pt": "no checkpoint x.pt",
    "--weights x.pt --backbone-weights y.pt": "--weights and --backbone-weights are mutually",
    "--backbone-weights {d}/dense.pt": "dense.pt is a checkpoint of train_dense.py, not of a cl",
    "--weights {d}/bare.pt": "bare.pt is no checkpoint of this script; .* --backbone-weights",
    "--backbone stvit_s --option grid=8": "--option grid: stvit_s has only depths, dims, heads, gr",
    "--results x.json": "--results is for --eval",
    "--task retinanet --threshold 0.5": "--threshold is for --predict",
    "--eval --predict a.jpg --weights x.pt": "mutually exclusive",
    "--predict a.jpg": "--predict needs --weights",
    "--data {d} --batch-size 3 --micro-batch 2": "not a multiple of --micro-batch",
    "--data {d} --batch-size 64": "64 is larger than the 12 .* for small data: --batch-size 4",
    "--data {d} --task upernet --batch-size 2 --micro-batch 1": "single value per channel",
    "--weights {d}/nothing.pt --eval": "no checkpoint",
    "--data {d} --task retinanet --score {d}/nothing.json": "cannot read",
    "--img-size 8": "expected at least 64, at most 8192",
    "--img-size 100000": "expected at least 64, at most 8192",
    "--workers 100000": "expected at least 0, at most 256",
    "--iter 5": "unrecognized arguments: --iter 5",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_named(scenes, tiny, tmp_path, typed):
    torch.save({"weight": torch.zeros(2)}, scenes / "bare.pt")
    write_checkpoint(scenes / "dense.pt", task="semfpn")
    fails([*typed.format(d=scenes).split(), "--output", tmp_path], BAD[typed])


def test_errors_are_one_line_and_status_2(tmp_path):
    script = str(ROOT / "train_dense.py")
    command = [sys.executable, script, "--task", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train_dense.py: unknown --task")
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------ predictions
def test_overlays_of_any_images_have_names_of_their_own():
    images = ["a.jpg", "x/a.jpg", "a_1.jpg", "a.jpg"]
    names = train_dense.overlay_names(images, "semfpn")
    assert len(set(names.values())) == len(names) == 3


def test_prediction_uses_averaged_weights(tiny, scenes, tmp_path, monkeypatch):
    run(*run_flags("semfpn", scenes, tmp_path, "--ema", 0.5, "--max-steps", 2))
    loaded = []
    load = train_imagenet.load_weights

    def record_entry(model, state, entry="model"):
        loaded.append(entry)
        return load(model, state, entry)

    monkeypatch.setattr(train_imagenet, "load_weights", record_entry)
    image = scenes / "val2017" / "000000000001.jpg"
    run("--predict", image, "--weights", tmp_path / "last.pt", "--output", tmp_path)
    assert loaded == ["ema"]
