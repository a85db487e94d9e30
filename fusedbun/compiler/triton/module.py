"""Prints a schedule as Triton, for GPUs: few kernels, each for all leaves that share the program.

    pass_0      a pass over memory; a program has a stretch of rows and loops over its columns, once for each sweep
    combine_1   what the stretches of pass 0 reduced, put together in their order, so that the same bits come every time
    between_1   the small values that pass 1 needs, or that are written at the end; a program has a leaf

What there is nothing to do in is not printed. A program finds its leaf and its stretch in `work`, and everything about
the leaf, addresses and sizes, in a row of `leaves` (`Table`). Nothing of full size is kept between two sweeps: on a GPU
a division costs less than memory. Words are int32, whose products and sums wrap.
"""

from __future__ import annotations

from fusedbun.compiler.graph import Span
from fusedbun.compiler.schedule import Schedule
from fusedbun.compiler.triton.between import Between, combine
from fusedbun.compiler.triton.passes import OfRows, flat
from fusedbun.compiler.triton.text import HELPERS, Kernel, Table


def emit(schedule: Schedule) -> str:
    """The source of a module with every kernel of a schedule.

    Args:
        schedule: with tiles of rows.
    """
    printed = kernels(schedule)
    used = frozenset[str]().union(*(kernel.helpers for kernel in printed))
    helpers = [f"@triton.jit{text}" for name, text in HELPERS.items() if name in used]
    comment = [f"# {line}".rstrip() for line in f"{schedule.program}\n\n{schedule}".split("\n")]
    table = f"# a leaf's row: {', '.join(Table(schedule).names)}"
    head = "\n".join([*comment, "#", table, "", "import triton", "import triton.language as tl"])
    return "\n\n\n".join([head, *helpers, *(kernel.source for kernel in printed)]) + "\n"


def kernels(schedule: Schedule) -> list[Kernel]:
    """The kernels of a schedule, in the order in which they are launched."""
    if schedule.tiles != "rows":
        raise ValueError(f"Triton is printed for tiles of rows, but these are of {schedule.tiles}")
    table, found = Table(schedule), []
    for t in range(len(schedule.passes) + 1):
        sums = [v for v in schedule.between[t] if v in schedule.partials and v.span == Span.COLUMN]
        small = [v for v in schedule.between[t] if v not in sums]
        stores = schedule.stores if t == len(schedule.passes) else []
        if sums:
            found.append(combine(f"combine_{t}", table, sums))
        if small or stores:
            found.append(Between(f"between_{t}", table).kernel(small, stores))
        if t < len(schedule.passes):
            is_flat = schedule.is_elementwise and not table.is_coded
            of_rows = OfRows(f"pass_{t}", table)
            found.append(flat(schedule, table) if is_flat else of_rows.kernel(schedule.passes[t]))
    return found
