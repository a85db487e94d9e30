"""The generated code and the driver under sanitizers: no access beyond an array, nothing undefined, no race."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import CASES
from sanitized import Job

from fusedbun import recipes
from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.cpp.module import TYPES, emit
from fusedbun.compiler.trace import trace
from fusedbun.storage.rounding import Rounding

FLAGS = "-fno-sanitize-recover=all -O0 -g1"
DENSE = [(), (1,), (17,), (40_000,), (0,), (0, 5), (8, 16), (9, 2), (5, 1), (1, 5), (130, 257), (1000, 31), (2, 40_001)]
STRIDED = [(40_000,), (17, 9), (130, 257)]
NARROW = [(700, 3), (33, 17)]  # rows that are shorter than a register
FEW = ("fusedbun recommended", "sm3 momentum", "decoupled_lionw", "ternary_vote")  # reductions and slots of all kinds
STOCHASTIC = Rounding(stochastic=True, seed=1, name="w")
CODED = (  # codes and noise of all kinds
    (recipes.sm3(momentum=0.9, momentum_dtype="int8"), "float32"),
    (replace(recipes.sm3(momentum=0.9, momentum_dtype="int8"), rounding=STOCHASTIC), "bfloat16"),
    (recipes.fusedbun(use_rms=True, centralize=True, momentum_dtype="int4"), "float16"),
    (replace(recipes.decoupled_lionw(initial_lr=0.1, momentum_dtype="bfloat16"), rounding=STOCHASTIC), "bfloat16"),
)


def jobs_of_all():
    """Every case in float32, and a few of them in every dtype, layout and width of registers.

    Most are for the narrowest registers: wider ones load and store a part of a register with instructions of their own,
    which the sanitizer does not look at.
    """
    for case in CASES:
        for shape in [*DENSE, *NARROW]:
            yield job(case, shape, threads=3 if shape == (130, 257) else 1)
    for case in (case for case in CASES if case.name in FEW):
        for shape in [(3, 4, 5), (8, 3, 3, 3), (1, 1, 4)]:
            yield job(case, shape)
        for shape, layout in product(STRIDED, ("shifted", "other")):
            yield job(case, shape, layout=layout, threads=2)
        yield job(case, (130, 257), layout="last")
        for shape, dtype in product([(130, 257), *NARROW], TYPES):
            yield job(case, shape, dtype=dtype)
        for shape, registers in product([(17,), (130, 257), *NARROW], range(2, native.registers() + 1)):
            yield job(case, shape, registers=registers)

    for (chain, dtype), registers in product(CODED, range(1, native.registers() + 1)):
        for shape in [(), (17,), (9, 2), (130, 257), (33, 17), (700, 3), (2, 4001), (8, 3, 3, 3)]:
            yield Job(chain, shape, dtype=dtype, registers=registers)


def jobs_of_threads():
    """Chunks of several leaves on three threads, in each way of going over memory."""
    for case in (case for case in CASES if case.name in (*FEW, "fusedbun clipped")):
        for shape in [(100_000,), (1000, 257), (2, 40_001), (20_000, 3)]:
            yield job(case, shape, registers=native.registers(), threads=3)
    for chain, dtype in CODED:
        for shape in [(1000, 257), (20_000, 3)]:
            yield Job(chain, shape, dtype=dtype, registers=native.registers(), threads=3)


def jobs_of_few():
    """One small kernel: with the sanitizers, the others take minutes to compile."""
    (case,) = (case for case in CASES if case.name == "decoupled_lionw")
    for shape, layout in product([(17,), (0,), (40_000,)], ("dense", "shifted", "other")):
        yield job(case, shape, layout=layout, threads=2)


def job(case, shape, registers=1, **about):
    chain = case.chain.at((), SimpleNamespace(shape=shape))
    return Job(chain, shape, ternary=case.ternary, registers=registers, **about)


def code(job):
    program = trace(job.chain, len(job.shape), job.order or None, dtype=job.dtype)
    return emit(program)


def compiled(folder, jobs, sanitizers, change=lambda text: text):
    """Compiles the driver and the jobs' kernels, each once; `change` is done to the kernels' code."""
    wanted = list(dict.fromkeys((job.registers, code(job)) for job in jobs))
    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setenv("FUSEDBUN_CXXFLAGS", f"-fsanitize={sanitizers} {FLAGS}")
        patched.setattr(build, "TIME_LIMIT", 600)
        waiting = [pool.submit(build.compile_in, folder, build.DRIVER.read_text())]
        for registers in sorted({registers for registers, _ in wanted}):
            kernels = [source for width, source in wanted if width == registers]
            for i in range(0, len(kernels), 4):
                text = change(build.bundle(kernels[i : i + 4], registers))
                prefix = build.bundle_prefix(registers)
                waiting.append(pool.submit(build.compile_in, folder, text, registers, prefix))
        for done in waiting:
            done.result()


def stepped(folder, jobs, sanitizers):
    """Runs the jobs in a process of their own, where nothing can be compiled."""
    file = folder / "jobs"
    file.write_bytes(pickle.dumps(jobs))
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime("tsan" if sanitizers == "thread" else "asan"),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "FUSEDBUN_CXXFLAGS": f"-fsanitize={sanitizers} {FLAGS}",
        "FUSEDBUN_CACHE": str(folder / "cache"),
        "CXX": "no-compiler",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(file), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def runtime(name):
    """The path of a sanitizer's library."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    asked = subprocess.run([*compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True)
    if not Path(asked.stdout.strip()).is_absolute():
        pytest.skip(f"the compiler has no lib{name}.so")
    return asked.stdout.strip()


@pytest.mark.parametrize(
    ("jobs", "sanitizers"),
    [
        (jobs_of_few, "address,undefined"),
        pytest.param(jobs_of_all, "address,undefined", marks=pytest.mark.long),
        pytest.param(jobs_of_threads, "thread", marks=pytest.mark.long),
    ],
    ids=["few", "memory", "threads"],
)
def test_nothing_is_found(tmp_path, jobs, sanitizers):
    runtime("asan")
    made = list(jobs())
    compiled(tmp_path, made, sanitizers)
    done = stepped(tmp_path, made, sanitizers)
    assert (done.returncode, done.stdout) == (0, f"{3 * len(made)} steps\n"), done.stderr[-5000:]


def test_an_element_too_far_is_found(tmp_path):
    (case,) = (case for case in CASES if case.name == "decoupled_lionw")
    jobs = [job(case, (17,))]
    runtime("asan")
    compiled(tmp_path, jobs, "address,undefined", lambda text: text.replace("(end - begin,", "(end - begin + 1,"))
    done = stepped(tmp_path, jobs, "address,undefined")
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr
