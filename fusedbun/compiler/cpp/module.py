"""Prints a program as C++: one translation unit with the code that `runtime/kernel.h` describes.

It has a plan for every way of going over memory that suits the program (`cpp_ways`, on the skeleton in `cpp_passes`),
each made from a schedule, with the small values in between (`cpp_between`).
"""

from __future__ import annotations

from fusedbun.compiler.cpp.between import Between
from fusedbun.compiler.cpp.passes import Way, has_blocks
from fusedbun.compiler.cpp.text import REDUCE, Arrays, Places, indented
from fusedbun.compiler.cpp.ways import Columns, Flat, PackedRows, Rows
from fusedbun.compiler.graph import UnplannableError
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
        UnplannableError: the program cannot be written so.
    """
    computed, stored = TYPES[program.dtype]
    rows = schedule(program)
    _check_order(program)
    lines = ['#include "vectors.h"', "", *(f"// {line}" for line in str(program).splitlines()), ""]
    lines += ["namespace {", f"using T = {computed};", f"using P = {stored};", ""]
    plans = {"flat": "nullptr", "rows": "nullptr", "packed": "nullptr", "columns": "nullptr"}
    if rows.is_elementwise:
        lines += _plan("flat", rows, [Flat])
        plans["flat"] = "&flat::plan"
    else:
        is_coded = any(has_blocks(sweep) for work in rows.passes for sweep in work.sweeps)
        is_one_row = program.graph.ndim == 1
        by_row: list[type[Way]] = [Rows] if is_coded or is_one_row else [Rows, PackedRows]
        lines += _plan("rows", rows, by_row)
        plans |= {"rows": "&rows::plan", **({"packed": "&rows::packed_plan"} if PackedRows in by_row else {})}
        try:
            columns = schedule(program, "columns")
        except UnplannableError:
            pass
        else:
            lines += _plan("columns", columns, [Columns])
            plans["columns"] = "&columns::plan"
    return "\n".join(
        [
            *lines,
            f"const Kernel kernel = {{sizeof(T), LANES<T>, {', '.join(plans.values())}}};",
            "}  // namespace",
            "",
            "EXPORT const Kernel* fusedbun_kernel() { return &kernel; }",
            "",
        ]
    )


def _check_order(program: Program) -> None:
    """An array of more than one axis, but not all, is read as it lies in memory: in the order of its own axes."""
    order = program.graph.order
    for key, array in program.arrays.items():
        axes = [axis for axis in order if axis in array.axes]
        if 1 < len(axes) < program.graph.ndim and axes != sorted(axes):
            raise UnplannableError(f"the state {key} has the axes {sorted(axes)}, but in memory they follow as {axes}")


def _plan(name: str, schedule: Schedule, ways: list[type[Way]]) -> list[str]:
    """A namespace with the functions of one schedule, and a `Plan` for every way of going over memory."""
    arrays, places = Arrays(schedule.program), Places(schedule)
    between, passes = Between(schedule, arrays), range(len(schedule.passes))
    lines = [f"namespace {name} {{", *(f"// {line}" for line in str(schedule).splitlines()), ""]
    for t in range(len(schedule.passes) + 1):
        lines += [*between.function(t), ""]
    for t in passes:
        lines += [*_begin(schedule, places, t), ""]
    written = [way(schedule, arrays) for way in ways]
    for way in written:
        for t in passes:
            lines += [*way.function(t), ""]
    lines += [_table("between", "void (*const {}[])(const Work&)", [f"between{t}" for t in [*passes, len(passes)]])]
    lines += [_table("begin", "void (*const {}[])(const Work&)", [f"begin{t}" for t in passes])]
    vectors, scalars = places.counts(places.small)
    partial_vectors, partial_scalars = places.counts(places.partial)
    sizes = f"{len(passes)}, {vectors}, {scalars}, {partial_vectors}, {partial_scalars}, {len(places.kept)}"
    for way in written:
        prefix = "" if way.name == "pass" else f"{way.name}_"
        functions = [f"{way.name}{t}" for t in passes]
        lines += [
            _table(f"{way.name}es", "void (*const {}[])(const Work&, Index, Index)", functions),
            f"Index {prefix}buffer(const Leaf& leaf) {{ {way.buffer_size()} }}",
            f"const Plan {prefix}plan = {{{sizes}, between, begin, {way.name}es, {prefix}buffer}};",
        ]
    return [*lines, f"}}  // namespace {name}", ""]


def _table(name: str, kind: str, functions: list[str]) -> str:
    return f"{kind.format(name)} = {{{', '.join(functions)}}};"


def _begin(schedule: Schedule, places: Places, t: int) -> list[str]:
    """The function that starts the reductions of a chunk in one pass."""
    work = schedule.passes[t]
    started = [v for sweep in work.sweeps for v in sweep.reductions if v in places.partial] + work.totals
    lines = [
        f"fill({places.of_partial(v)}, {f'w.leaf->{places.row}' if v.axes else '1'}, {REDUCE[v.detail]}::start<T>);"
        for v in started
    ]
    return [f"void begin{t}(const Work& w) {{", *indented(lines or ["(void)w;"]), "}"]
