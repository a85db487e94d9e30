"""Settings that every test runs under."""

import gc
import os
import shlex
import socket
import subprocess

# Tests run in several processes: one thread each, or they would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # nor processes that compile beside them

import jax
import pytest
import torch
from hypothesis import settings

from fusedbun.compiler.cpp import build, native

torch.set_num_threads(1)
settings.register_profile("fusedbun", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("fusedbun")


def pytest_configure(config):
    """Compiles the header of all kernels before the workers start, which takes half of a kernel's time.

    A kernel is compiled with the same flags as ever; only a compiler that stands before the others in PATH looks for
    the header where it lies compiled. It takes that where the flags are the same, and the source where they are not.
    """
    compiler = build.find_compiler()
    if hasattr(config, "workerinput") or compiler is None or os.environ.get("CXX"):
        return
    registers = native.registers()
    folder = config.cache.mkdir(f"header-{build.digest('', registers)}")
    header, wrapper = folder / "vectors.h.gch", folder / "bin" / "c++"
    if not header.exists():
        made, source = folder / f"{os.getpid()}.gch", folder / "vectors.h"
        source.unlink(missing_ok=True)
        source.symlink_to(build.RUNTIME / "vectors.h")
        flags = [*build._flags(registers), f"-I{build.RUNTIME}"]
        command = [*compiler, *flags, "-x", "c++-header", str(source), "-o", str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return
        os.replace(made, header)
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} -I{shlex.quote(str(folder))} "$@"\n')
    wrapper.chmod(0o755)
    os.environ["PATH"] = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"
    build.find_compiler.cache_clear()


def pytest_collection_finish():
    """Spares the garbage collector the modules and the tests, which stay: going over them takes most of a second."""
    gc.collect()
    gc.freeze()


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
