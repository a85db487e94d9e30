"""Settings that every test runs under."""

import os

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
