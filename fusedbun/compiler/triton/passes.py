"""The Triton that goes over memory: a kernel for each pass of a schedule.

A program has a stretch of rows. In it i are the rows, j the columns of a tile, and m says which of its elements there
are. Where codes share an exponent, b are the blocks of 32 columns; a tile then holds whole blocks.
"""

from __future__ import annotations

from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.printer import has_blocks, is_single
from fusedbun.compiler.schedule import Pass, Schedule, Sweep
from fusedbun.compiler.triton.dialect import START, Writer
from fusedbun.compiler.triton.text import Kernel, Table
from fusedbun.storage.codes import BLOCK

SPOTS = {
    Span.ROW: (" + i", ", rows"),
    Span.COLUMN: (" + j", ", columns"),
    Span.BLOCK: (" + i * N + b", ", blocks"),
    Span.FULL: (" + at", ", m"),
}
# until all threads have read what is overwritten next: several read a number that many elements share
WAIT = "tl.debug_barrier()"


def flat(schedule: Schedule, table: Table) -> Kernel:
    """The kernel of a pass in which no element depends on another."""
    k = Writer("pass_0", table, {Span.FULL: SPOTS[Span.FULL]}, dict.fromkeys(table.graph.every, "at"))
    stores = schedule.passes[0].sweeps[0].stores
    k.line("at = stretch.to(tl.int64) * (BR * BC) + tl.arange(0, BR * BC)")
    k.line(f"m = at < {k.size('R', 'C')}")
    k.hoist((v for _, v in stores), is_single)
    for _, v in stores:
        k.read(v)
    for name, v in stores:
        k.store(name, v)
    return k.finish("elements")


class OfRows(Writer):
    """The kernel of a pass over memory, by stretches of rows."""

    def __init__(self, name: str, table: Table) -> None:
        along = {axis: "i" if axis in table.graph.row else "j" for axis in table.graph.every}
        super().__init__(name, table, SPOTS, along)

    def kernel(self, work: Pass) -> Kernel:
        self.line("i = stretch * BR + tl.arange(0, BR)[:, None]")
        self.line(f"rows = i < {self.size('R')}")
        is_coded = has_blocks(self.table.program, work.sweeps)
        if is_coded:
            self.line(f"N = ({self.size('C')} + {BLOCK - 1}) // {BLOCK}")
        for sweep in work.sweeps:
            self._sweep(sweep, is_coded)
        for v in work.keeps:
            self.keep(v)
        for v in (*(total.args[0] for total in work.totals), *(v for _, v in work.stores)):
            self.read(v)
        for v in work.totals:
            x = f"tl.where(rows, {self.read(v.args[0])}, {START[v.detail]})"
            self.line(f"tl.store({self.pointer(self.table.parts[v])} + stretch, {self.reduced(v, x, None)})")
        if work.stores:
            self.line(WAIT)
        for name, v in work.stores:
            self.store(name, v)
        return self.finish("rows")

    def _sweep(self, sweep: Sweep, is_coded: bool) -> None:
        goals = [*(v.args[0] for v in sweep.reductions), *(v for _, v in sweep.stores)]
        across = [v for v in sweep.reductions if v.op == "across"]
        self.hoist(goals, lambda v: v.span == Span.ROW or is_single(v))
        for v in across:
            self.start(v, "(BR, BC)")
        with self.within(f"for j0 in range(0, {self.size('C')}, BC):"):
            self.line("j = j0 + tl.arange(0, BC)[None, :]", "columns = j < C", "m = rows & columns", "at = i * C + j")
            if is_coded:
                self.line(f"b = j0 // {BLOCK} + tl.arange(0, BC // {BLOCK})[None, :]", "blocks = rows & (b < N)")
            for v in goals:
                self.read(v)
            for v in sweep.reductions:
                if v.op == "across":
                    self.accumulate(v, self.read(v.args[0]), "m")
                else:
                    self._down(v)
            if is_coded and sweep.stores:
                self.line(WAIT)
            for name, v in sweep.stores:
                self.store(name, v)
        for v in across:
            self.declare(v, self.reduced(v, f"q{v.number}", 1))

    def _down(self, v: Value) -> None:
        q, parts = f"q{v.number}", self.pointer(self.table.parts[v])
        self.line(f"{q} = tl.where(m, {self.read(v.args[0])}, {START[v.detail]})")
        self.line(f"tl.store({parts} + stretch * C + j, {self.reduced(v, q, 0)}, columns)")

    def load(self, v: Value, name: str) -> str:
        if name not in self.table.bits:
            return super().load(v, name)
        bits = self.table.bits[name]
        size = BLOCK * bits // 8  # bytes of a block
        at = f"i * (N * {size}) + j // {BLOCK} * {size} + j % {size}"
        return f"{self.helper('from_packed')}(tl.load({self.pointer(name)} + {at}, m), j, {bits})"

    def store(self, name: str, v: Value) -> None:
        if name not in self.table.bits:
            super().store(name, v)
            return
        bits = self.table.bits[name]
        size = BLOCK * bits // 8
        self.line(f"p = j0 // {8 // bits} + tl.arange(0, BC // {8 // bits})[None, :]")
        packed = f"{self.helper('to_packed')}(tl.where(m, {self.read(v)}, 0), j, {bits}, BR, BC)"
        packed = f"{packed}.to({self.table.dtype[name]})"
        self.line(f"tl.store({self.pointer(name)} + i * (N * {size}) + p, {packed}, rows & (p < N * {size}))")

    def computed(self, v: Value) -> str:
        if v.op == "block_max":
            return f"{self.helper('block_max')}(tl.where(m, {self.read(v.args[0])}, 0), BR, BC)"
        return super().computed(v)

    def operand(self, v: Value, of: Value) -> str:
        text = super().operand(v, of)
        is_spread = v.span == Span.BLOCK and of.span == Span.FULL
        return f"{self.helper('spread')}({text}, BR, BC)" if is_spread else text
