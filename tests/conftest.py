"""What all tests need: libraries to compare with, and each test in the same state of torch."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import experiments.torchvision_import  # noqa: F401, the libraries import torchvision


@pytest.fixture(autouse=True)
def kernels():
    """A command chooses torch's kernels for its process. Tests run commands in theirs, so each puts
    back what it found."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
