"""Fixtures of all tests: the devices at hand, a fixed seed before each test, and a shrunk backbone for whole runs."""
import signal
from functools import partial

import pytest
import torch

import secvit
import train_dense

torch.set_num_threads(1)    # tensors are tiny here; on two busy cores a second thread made the tests 20 times slower (116 s, 6 s)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny(monkeypatch):
    """train_dense.py with a shrunk secvit_t, UPerNet and box heads, and few RoIs; signal handlers put back afterwards."""
    small = dict(num_classes=7, drop_path_rate=0.1, depths=(1, 1, 1, 2), dims=(16, 16, 32, 32), heads=(2, 2, 2, 2))
    proposals, best_pairs = train_dense.proposals, train_dense.best_pairs
    monkeypatch.setitem(train_dense.MODELS, "secvit_t", lambda **options: secvit.SecViT(**{**small, **options}))
    monkeypatch.setitem(train_dense.ARCHITECTURES, "upernet", (partial(train_dense.UPerNet, dim=32), (0, 1, 2, 3)))
    monkeypatch.setattr(train_dense, "BoxHead", partial(train_dense.BoxHead, hidden=16))
    monkeypatch.setattr(train_dense, "proposals", lambda *one, **limits: proposals(*one, **{**limits, "most": 20}))
    monkeypatch.setattr(train_dense, "best_pairs", lambda boxes, scores, *_: best_pairs(boxes, scores, 0.05, 10))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])
    torch.use_deterministic_algorithms(False)
