"""The kernels that are compiled when the package is installed: the family's optimizers under their usual settings.

They are compiled in bundles, for a kernel alone takes about as long to compile as the files that it includes. What is
not among them is compiled when it is first used.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fusedbun.chain import Chain
from fusedbun.compiler.cpp.build import DRIVER, BuildError, bundle, bundle_prefix, compile_in, jax_handler
from fusedbun.compiler.cpp.module import TYPES, emit
from fusedbun.compiler.cpp.native import registers as own_registers
from fusedbun.compiler.trace import trace
from fusedbun.recipes import RECIPES
from fusedbun.storage.rounding import Rounding

Settings = dict[str, Any]
Order = tuple[int, ...]


def _every(**values: tuple[Any, ...]) -> list[Settings]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


_RECOMMENDED = {"centralize": (True,), "use_rms": (True,)}
_DECAY = {"weight_decay": (0.0, 0.1)}
# By recipe, what decides a chain's code: a number that is 0 leaves something out, and any other is as good as the next.
USUAL: dict[str, list[Settings]] = {
    "fusedbun": [
        {},
        *_every(**_RECOMMENDED, nesterov=(True,), Lambda=(0.01, 0.0)),
        *_every(**_RECOMMENDED, nesterov=(False,)),
        *_every(**_RECOMMENDED, nesterov=(True, False), lagged=(True,)),
        *_every(**_RECOMMENDED, nesterov=(True,), clip_rms=(1.0,)),
        *_every(**_RECOMMENDED, nesterov=(True,), channel_axis=(-1,)),  # of Flax's layers
        *_every(**_RECOMMENDED, momentum_beta=(0.0,)),
    ],
    "sm3": _every(momentum=(0.0, 0.9), beta=(0.0, 0.9)),
    "scaled_optum": _every(**_DECAY),
    "ternary_vote": [{}],
    "mup_adam": _every(**_DECAY, amsgrad=(False, True)),
    "mup_adamw": _every(**_DECAY, amsgrad=(False, True)),
    "mup_sgd": [*_every(**_DECAY, momentum=(0.0, 0.9)), *_every(**_DECAY, momentum=(0.9,), nesterov=(True,))],
    "decoupled_lionw": _every(**_DECAY),
}
LESS_USUAL: dict[str, list[Settings]] = {
    "fusedbun": [
        *_every(Lambda=(0.0,), momentum_beta=(0.9, 0.0)),
        *_every(use_rms=(True,), nesterov=(True, False), Lambda=(0.01, 0.0)),
        *_every(**_RECOMMENDED, nesterov=(True, False), lagged=(True, False), Lambda=(0.0,)),
        *_every(**_RECOMMENDED, nesterov=(True, False), clip_rms=(1.0,), Lambda=(0.0,)),
        *_every(**_RECOMMENDED, momentum_beta=(0.0,), lagged=(True, False), Lambda=(0.0,)),
    ],
    "sm3": _every(momentum=(0.0, 0.9), beta=(0.9,), statistic=("mean",)),
}
# Of bfloat16 parameters, with fewer bits a moment, and rounded to the nearest or stochastically.
FEWER_BITS: dict[str, list[Settings]] = {
    "fusedbun": _every(
        **_RECOMMENDED, nesterov=(True, False), momentum_dtype=("int8", "int4"), stochastic_rounding=(False, True)
    ),
    "sm3": [
        {"stochastic_rounding": True},
        *_every(momentum=(0.9,), momentum_dtype=("param", "int8"), stochastic_rounding=(True,)),
    ],
    "decoupled_lionw": _every(momentum_dtype=("param", "int8"), stochastic_rounding=(True,)),
}
# A parameter's axes from the slowest in memory to the fastest.
VECTOR, MATRIX, CUBE, CONVOLUTION, CHANNELS_LAST = (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 1)
STRIP = ("-s",)
BUNDLE = 24  # kernels: the shorter, the more even the work of many processors; the longer, the less to read


def chain_of(name: str, settings: Settings, ndim: int) -> Chain:
    """The chain of a recipe for a weight with so many axes."""
    recipe, numbers = RECIPES[name], {**settings}
    rounding = Rounding(stochastic=numbers.pop("stochastic_rounding", False))
    initial = {"initial_lr": 0.1} if recipe.wants_initial_lr else {}
    typed = {"mup": {"w": "weight"}} if name.startswith("mup") else {}
    chain = replace(recipe.make(**numbers, **initial, **typed), rounding=rounding)
    return chain.at(("w",), SimpleNamespace(shape=(2,) * ndim))


def sources(dtype: str) -> list[str]:
    """The code of the kernels for one dtype, each once."""
    for_networks = dtype in ("float32", "bfloat16")
    wanted = list(_programs(USUAL, [VECTOR, MATRIX]))
    if for_networks:
        wanted += _programs(USUAL, [CUBE, CONVOLUTION, CHANNELS_LAST])
        wanted += _programs(LESS_USUAL, [VECTOR, MATRIX])
    if dtype == "bfloat16":
        wanted += _programs(FEWER_BITS, [VECTOR, MATRIX, CONVOLUTION])
    return list(dict.fromkeys(emit(trace(chain, len(order), order, dtype=dtype)) for chain, order in wanted))


def widths() -> list[int]:
    """The widths of registers to compile for: of x86 without the processors from before 2013."""
    return [3, 2] if platform.machine().lower() in ("x86_64", "amd64") else [1]


def build(folder: Path, for_this_machine: bool = False) -> None:
    """Compiles what a folder lacks and takes away what is out of date; prints a line where something is not compiled.

    Args:
        folder: where the libraries are put.
        for_this_machine: compile for the registers of this machine only.
    """
    try:
        made = {compile_in(folder, DRIVER.read_text(), extra=STRIP)}
        chosen = [own_registers()] if for_this_machine else widths()
    except BuildError as error:
        print(f"fusedbun: no kernels are compiled now: {str(error).splitlines()[0]}")
        return
    jobs = [(code, 1, "") for code in (jax_handler(),) if code]  # where the build environment has jaxlib
    for registers, dtype in product(chosen, TYPES):
        jobs += [(code, registers, bundle_prefix(registers)) for code in bundles(dtype, registers)]
    with ThreadPoolExecutor(_processors()) as pool:
        waiting = [pool.submit(compile_in, folder, *job, STRIP) for job in jobs]
    failures = [job.exception() for job in waiting if isinstance(job.exception(), BuildError)]
    if failures:
        reason = str(failures[0]).splitlines()[0]
        print(f"fusedbun: {len(failures)} of {len(jobs)} libraries of kernels did not compile: {reason}")
    made |= {job.result() for job in waiting if job.exception() not in failures}
    for path in set(folder.glob("*.so")) - made:
        path.unlink()


def bundles(dtype: str, registers: int) -> list[str]:
    """The code of the kernels for one dtype and one width of registers, in a few libraries."""
    kernels = sources(dtype)
    count = -(-len(kernels) // BUNDLE)
    return [bundle(kernels[i::count], registers) for i in range(count)]


def _programs(settings: dict[str, list[Settings]], orders: list[Order]) -> Iterator[tuple[Chain, Order]]:
    for name, chosen in settings.items():
        for values, order in product(chosen, orders):
            yield chain_of(name, values, len(order)), order


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
