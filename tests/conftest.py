"""Fixtures of all tests: the devices at hand, and a fixed seed before each test."""
import pytest
import torch

torch.set_num_threads(1)    # tensors are tiny here; on two busy cores a second thread made the tests 20 times slower (116 s, 6 s)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
