"""Settings that every test runs under."""

import os
import socket

# Tests run in several processes: one thread each, or they would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fusedbun", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("fusedbun")


@pytest.fixture
def x64():
    """JAX with 64-bit types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_torchrun(tmp_path, monkeypatch):
    """An empty working directory, and the environment that torchrun gives the only process of a run."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
