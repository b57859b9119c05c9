"""Inductor, torch.compile's default backend, with dynamic=False as the README recommends on a CPU.

Code generation and g++ take more than a second per kernel, and a whole model has dozens of kernels
per size. Hence one block of each model, and only on request, before a release:
    EVERY_MODEL=1 python -m pytest tests/test_inductor.py       # 11 minutes on 2 cores
"""
import os
import shutil

import pytest
import torch
import torch._inductor.config as inductor
from test_models import each_file, small_model
from torch.testing import assert_close

NARROW = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "heads": (1, 1, 1, 1)}
SIZES = ((34, 50), (64, 64), (40, 72))  # maps of 9 x 13, 16 x 16 and 10 x 18 tokens
takes_minutes = pytest.mark.skipif(
    "EVERY_MODEL" not in os.environ, reason="takes minutes; EVERY_MODEL=1 runs it")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Nothing that an earlier run compiled, and no worker processes."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor.patch(compile_threads=2):
        yield


def first_stage(name):
    """A model that ends after its first block, in float64: rounding may move tokens to clusters."""
    model = small_model(name, **NARROW).double()
    model.stages = model.stages[:1]
    return model


def compiled_map(model):
    return torch.compile(model.forward_features, dynamic=False, fullgraph=True)


def map_and_gradients(function, model, images):
    """The only map and the gradients of all parameters that have one."""
    model.zero_grad()
    x, = function(images)                                               # (B, 8, H / 4, W / 4)
    (x.flatten() @ torch.linspace(-1, 1, x.numel(), dtype=x.dtype)).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return x, gradients


@takes_minutes
@each_file
def test_inductor_compiles_each_size(name, compiler):
    model = first_stage(name).eval()
    compiled = compiled_map(model)
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            assert_close(compiled(images), model.forward_features(images))


@takes_minutes
@each_file
def test_inductor_compiles_gradients_of_each_size(name, compiler):
    model = first_stage(name)
    compiled = compiled_map(model)
    for size in SIZES:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        result = map_and_gradients(compiled, model, images)
        assert_close(result, map_and_gradients(model.forward_features, model, images))
