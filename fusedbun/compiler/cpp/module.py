"""Prints a program as C++: one translation unit with the code that `runtime/kernel.h` describes.

It has a schedule for every way of going over memory that suits the program (`ways.py`, on the skeleton in `passes.py`),
each made from a schedule, with the small values in between (`between.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from fusedbun.compiler.cpp.between import Between
from fusedbun.compiler.cpp.blocks import CodedRows
from fusedbun.compiler.cpp.dialect import REDUCE, Places
from fusedbun.compiler.cpp.passes import Way
from fusedbun.compiler.cpp.ways import Columns, Flat, PackedRows, Rows
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.compiler.printer import is_coded
from fusedbun.compiler.schedule import Schedule, schedule
from fusedbun.compiler.trace import Program

# By a parameter's dtype: the type that is computed with, and the one that the parameter and its gradient are stored in.
TYPES = {
    "float32": ("float", "float"),
    "float64": ("double", "double"),
    "bfloat16": ("float", "bfloat16"),
    "float16": ("float", "float16"),
}


def emit(program: Program) -> str:
    """The C++ of a program.

    Raises:
        UnschedulableError: the program cannot be written so.
    """
    computed, stored = TYPES[program.dtype]
    rows = schedule(program)
    _check_order(program)
    found: dict[str, tuple[Schedule, list[type[Way]]]] = {}  # schedules, by the namespace of their code
    if is_coded(rows):
        found["rows"] = rows, [CodedRows]
    elif rows.is_elementwise:
        found["flat"] = rows, [Flat]
    else:
        found["rows"] = rows, [Rows] if program.graph.ndim == 1 else [Rows, PackedRows]
        with suppress(UnschedulableError):
            found["columns"] = schedule(program, "columns"), [Columns]
    lines = ['#include "vectors.h"', "", *(f"// {line}" for line in str(program).splitlines()), ""]
    lines += ["namespace {", f"using T = {computed};", f"using P = {stored};", ""]
    schedules = dict.fromkeys(("flat", "rows", "packed", "columns"), "nullptr")
    for name, (scheduled, ways) in found.items():
        lines += _plans(name, scheduled, ways)
        schedules |= {way.name: f"&{name}::{way.name}_schedule" for way in ways}
    lines += [f"const Kernel kernel = {{sizeof(T), LANES<T>, {', '.join(schedules.values())}}};", "}  // namespace", ""]
    return "\n".join([*lines, "EXPORT const Kernel* fusedbun_kernel() { return &kernel; }", ""])


def _check_order(program: Program) -> None:
    """An array of more than one axis, but not all, is read as it lies in memory: in the order of its own axes."""
    order = program.graph.order
    for key, array in program.arrays.items():
        axes = [axis for axis in order if axis in array.axes]
        if 1 < len(axes) < program.graph.ndim and axes != sorted(axes):
            raise UnschedulableError(
                f"the state {key} has the axes {sorted(axes)}, but in memory they follow as {axes}"
            )


def _plans(name: str, schedule: Schedule, ways: list[type[Way]]) -> list[str]:
    """A namespace with the functions of one schedule, and a `Schedule` for every way of going over memory."""
    places, passes = Places(schedule), range(len(schedule.passes))
    functions = [Between(schedule).function(t) for t in (*passes, len(passes))]
    functions += [_begin(schedule, places, t) for t in passes]
    functions += [way(schedule).function(t) for way in ways for t in passes]
    lines = [f"namespace {name} {{", *(f"// {line}" for line in str(schedule).splitlines()), ""]
    for function in functions:
        lines += [*function, ""]
    lines += [_table("between", "", (f"between{t}" for t in (*passes, len(passes))))]
    lines += [_table("begin", "", (f"begin{t}" for t in passes))]
    counts = (*places.counts(places.small), *places.counts(places.partial), len(places.kept))
    sizes = ", ".join(map(str, (len(passes), *counts)))
    for way in ways:
        lines += [
            _table(f"{way.name}_passes", ", Index, Index", (f"{way.name}{t}" for t in passes)),
            f"Index {way.name}_buffer(const Leaf& leaf) {{ {way(schedule).buffer_size()} }}",
            f"const Schedule {way.name}_schedule = {{{sizes}, between, begin, {way.name}_passes, {way.name}_buffer}};",
        ]
    return [*lines, f"}}  // namespace {name}", ""]


def _table(name: str, others: str, functions: Iterable[str]) -> str:
    """Pointers to functions of some work and other arguments."""
    return f"void (*const {name}[])(const Work&{others}) = {{{', '.join(functions)}}};"


def _begin(schedule: Schedule, places: Places, t: int) -> list[str]:
    """The function that starts the reductions of a chunk in one pass."""
    work = schedule.passes[t]
    started = [v for sweep in work.sweeps for v in sweep.reductions if v in places.partial] + work.totals
    lines = [
        f"  fill({places.partial[v]}, {f'w.leaf->{places.row}' if v.axes else '1'}, {REDUCE[v.detail]}::start<T>);"
        for v in started
    ]
    return [f"void begin{t}(const Work& w) {{", *(lines or ["  (void)w;"]), "}"]
