"""The kernels that are compiled when the package is installed: the family's optimizers under their usual settings.

They are compiled in bundles, for a kernel alone takes about as long to compile as the files that it includes. What is
not among them is compiled when it is first used.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from fusedbun.chain import Chain
from fusedbun.compiler.cpp.build import DRIVER, BuildError, bundle, bundle_prefix, compile_in, jax_handler
from fusedbun.compiler.cpp.module import TYPES, emit
from fusedbun.compiler.cpp.native import registers as registers_here
from fusedbun.compiler.trace import trace
from fusedbun.recipe import Settings
from fusedbun.recipes import RECIPES

Order = tuple[int, ...]  # a parameter's axes from the slowest in memory to the fastest
VECTOR, MATRIX, CUBE, CONVOLUTION, CHANNELS_LAST = (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 1)
STRIP = ("-s",)
BUNDLE = 24  # kernels: the shorter, the more even the work of many processors; the longer, the less to read


def chain_of(name: str, settings: Settings, ndim: int, dtype: str = "float32") -> Chain:
    """The chain of a recipe for a weight with so many axes, of this dtype."""
    recipe = RECIPES[name]
    typed = {"mup": {"w": "weight"}} if "mup" in recipe.defaults else {}
    numbers = {**typed, **settings}
    stochastic = numbers.pop("stochastic_rounding", False)
    chain = recipe.chain(numbers, initial_lr=0.1, stochastic_rounding=stochastic)
    return chain.at(("w",), SimpleNamespace(shape=(2,) * ndim, dtype=dtype))


def sources(dtype: str) -> list[str]:
    """The code of the kernels for one dtype, each once."""
    # fields of recipes that hold settings, and the parameters that they are compiled for
    fields: list[tuple[str, list[Order]]] = [("compiled", [VECTOR, MATRIX])]
    if dtype in ("float32", "bfloat16"):  # what networks are trained in
        fields += [("compiled", [CUBE, CONVOLUTION, CHANNELS_LAST]), ("compiled_for_networks", [VECTOR, MATRIX])]
    if dtype == "bfloat16":
        fields += [("compiled_for_bfloat16", [VECTOR, MATRIX, CONVOLUTION])]
    codes: dict[str, None] = {}
    for field, orders in fields:
        for name, recipe in RECIPES.items():
            for settings, order in product(getattr(recipe, field), orders):
                chain = chain_of(name, settings, len(order), dtype)
                by_blocks = any(x.is_by_blocks for x in chain.arrays((2,) * len(order), dtype).values())
                if by_blocks and order != (*range(len(order)),):
                    continue  # blocks lie along the rows of the axes as they are
                if by_blocks and dtype == "float64":
                    continue  # codes are computed in float32
                codes[emit(trace(chain, len(order), order, dtype=dtype))] = None
    return list(codes)


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
        chosen = [registers_here()] if for_this_machine else widths()
    except BuildError as error:
        print(f"fusedbun: no kernels are compiled now: {str(error).splitlines()[0]}")
        return
    handler = jax_handler()  # where the build environment has jaxlib
    jobs = [(handler, 1, "")] if handler else []
    for registers, dtype in product(chosen, TYPES):
        jobs += [(code, registers, bundle_prefix(registers)) for code in bundles(dtype, registers)]
    with ThreadPoolExecutor(_processors()) as pool:
        waiting = [pool.submit(compile_in, folder, *job, STRIP) for job in jobs]
    failures = []
    for job in waiting:
        try:
            made.add(job.result())
        except BuildError as error:
            failures.append(str(error).splitlines()[0])
    if failures:
        print(f"fusedbun: {len(failures)} of {len(jobs)} libraries of kernels did not compile: {failures[0]}")
    for path in set(folder.glob("*.so")) - made:
        path.unlink()


def bundles(dtype: str, registers: int) -> list[str]:
    """The code of the kernels for one dtype and one width of registers, in a few libraries."""
    kernels = sources(dtype)
    count = -(-len(kernels) // BUNDLE)
    return [bundle(kernels[i::count], registers) for i in range(count)]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
