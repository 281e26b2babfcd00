"""Fixtures: every test starts from the same seed, and leaves nothing in Pyro's param store."""

import os
from pathlib import Path

import pyro
import pytest
import torch

from pyro_vae import data

torch.set_num_threads(1)  # all is small here, and threads that wait for each other cost more than they do

MNIST_ROOT = Path(os.environ.get("PYRO_VAE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _clean():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    assert not list(pyro.get_param_store()), "left in the param store"


@pytest.fixture
def cleared_store():
    """For tests that use the param store themselves."""
    yield
    pyro.clear_param_store()


@pytest.fixture(scope="session")
def digits():
    return data.load("digits", binarize="dynamic")


@pytest.fixture(scope="session")
def mnist_root():
    if not (MNIST_ROOT / "MNIST" / "raw").is_dir():
        pytest.skip(f"needs MNIST in {MNIST_ROOT} (set PYRO_VAE_DATA)")
    return MNIST_ROOT


@pytest.fixture(params=["cuda", "mps"])
def accelerator(request):
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not available[request.param]():
        pytest.skip(f"needs {request.param}")
    return request.param
