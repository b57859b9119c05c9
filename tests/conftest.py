"""Fixtures of all tests: devices at hand, a fixed seed before each test, shrunk models, scenes."""
import signal
from functools import partial

import pytest
import torch

import secvit
import train_dense

# Tensors are tiny here; on two busy cores a second thread made the tests 20 times slower.
torch.set_num_threads(1)

TINY = dict(depths=(1, 1, 1, 2), dims=(16, 16, 32, 32), heads=(2, 2, 2, 2))


def tiny_backbone(**options):
    """SecViT shrunk to milliseconds per update."""
    return secvit.SecViT(**{"num_classes": 7, "drop_path_rate": 0.1, **TINY, **options})


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def handlers():
    """Signal handlers and deterministic mode are put back after a run in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny(monkeypatch, handlers):
    """train_dense.py with a tiny secvit_t, narrow heads and few regions."""
    shrink_dense(monkeypatch.setitem, monkeypatch.setattr)


def shrink_dense(set_item, set_attribute):
    """Shrink train_dense.py's models with the given setters of dict items and attributes."""
    proposals = train_dense.select_proposals
    detections = train_dense.multiclass_nms

    def few_proposals(*args, **limits):
        return proposals(*args, **{**limits, "max_keep": 20})

    def few_detections(boxes, scores):
        return detections(boxes, scores, 0.05, 10)

    set_item(train_dense.MODELS, "secvit_t", tiny_backbone)
    for task in ("upernet", "retinanet", "mask_rcnn", "cascade_mask_rcnn", "pose"):
        architecture, levels = train_dense.ARCHITECTURES[task]
        set_item(train_dense.ARCHITECTURES, task, (partial(architecture, dim=32), levels))
    set_attribute(train_dense, "BoxHead", partial(train_dense.BoxHead, hidden=16))
    set_attribute(train_dense, "select_proposals", few_proposals)
    set_attribute(train_dense, "multiclass_nms", few_detections)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """12 training and 5 validation scenes in both layouts."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    train_dense.write_scenes(folder, (12, 5))
    return folder
