"""The Triton that goes over memory: a kernel for each pass of a schedule.

A program has a block of rows. In it i are the rows, j the columns of a tile, and m says which of its elements there
are. Where codes share an exponent, b are the blocks of 32 columns; a tile then holds whole blocks.
"""

from __future__ import annotations

from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.schedule import Pass, Schedule, Sweep
from fusedbun.compiler.triton.text import START, Kernel, Table, name_of, reduced
from fusedbun.compiler.triton.writer import Writer
from fusedbun.storage.codes import BLOCK

HALF = BLOCK // 2  # bytes of a block of pairs
SPOTS = {  # where a value lies in its array, and masked by what
    Span.ROW: (" + i", ", rows"),
    Span.COLUMN: (" + j", ", columns"),
    Span.BLOCK: (" + i * N + b", ", blocks"),
    Span.FULL: (" + at", ", m"),
}


def has_blocks(work: Pass) -> bool:
    """Whether codes are read or made in it that share an exponent."""
    return any(v.span == Span.BLOCK for sweep in work.sweeps for v in sweep.full)


def flat(schedule: Schedule, table: Table) -> Kernel:
    """The kernel of a pass in which no element depends on another."""
    k = Writer("pass_0", table)
    stores = schedule.passes[0].sweeps[0].stores
    k.spot = lambda v: (" + at", ", m") if v.span == Span.FULL else ("", "")
    k.along = lambda axis: "at"
    k.line("at = block.to(tl.int64) * (BR * BC) + tl.arange(0, BR * BC)")
    k.line(f"m = at < {k.size('R * C')}")
    k.hoist((v for _, v in stores), (Span.HOST, Span.SCALAR))
    for _, v in stores:
        k.read(v)
    for name, v in stores:
        k.store(name, v)
    return k.finish("elements")


class OfRows(Writer):
    """The kernel of a pass over memory, by blocks of rows."""

    def kernel(self, work: Pass) -> Kernel:
        self.spot = lambda v: SPOTS.get(v.span, ("", ""))
        self.along = lambda axis: "i" if axis in self.table.graph.row else "j"
        self.line("i = block * BR + tl.arange(0, BR)[:, None]")
        self.line(f"rows = i < {self.size('R')}")
        if has_blocks(work):
            self.line(f"N = ({self.size('C')} + {BLOCK - 1}) // {BLOCK}")
        for sweep in work.sweeps:
            self._sweep(sweep, has_blocks(work))
        for v in work.keeps:
            self.keep(v)
        for v in (*(total.args[0] for total in work.totals), *(v for _, v in work.stores)):
            self.read(v)
        for v in work.totals:
            x = f"tl.where(rows, {self.read(v.args[0])}, {START[v.detail]})"
            self.line(f"tl.store({self.pointer(self.table.parts[v])} + block, {reduced(v, x, 'None')})")
        if work.stores:
            self._wait()
        for name, v in work.stores:
            self.store(name, v)
        return self.finish("rows")

    def _sweep(self, sweep: Sweep, has_blocks: bool) -> None:
        goals = [*(v.args[0] for v in sweep.reductions), *(v for _, v in sweep.stores)]
        across = [v for v in sweep.reductions if v.op == "across"]
        self.hoist(goals, (Span.HOST, Span.SCALAR, Span.ROW))
        for v in across:
            self.start(v, "(BR, BC)")
        with self.loop("j0", "C", "BC"):
            self.line("j = j0 + tl.arange(0, BC)[None, :]")
            self.line("columns = j < C")
            self.line("m = rows & columns")
            self.line("at = i * C + j")
            if has_blocks:
                self.line(f"b = j0 // {BLOCK} + tl.arange(0, BC // {BLOCK})[None, :]")
                self.line("blocks = rows & (b < N)")
            for v in goals:
                self.read(v)
            for v in sweep.reductions:
                if v.op == "across":
                    self.accumulate(v, self.read(v.args[0]), "m")
                else:
                    self._down(v)
            if has_blocks and sweep.stores:
                self._wait()
            for name, v in sweep.stores:
                self.store(name, v)
        for v in across:
            self.line(f"{name_of(v)} = {reduced(v, f'q{v.number}', 1)}")
            self.names[v] = name_of(v)

    def _wait(self) -> None:
        """Until all threads have read what is overwritten next: several read a number that many elements share."""
        self.line("tl.debug_barrier()")

    def _down(self, v: Value) -> None:
        self.line(f"q{v.number} = tl.where(m, {self.read(v.args[0])}, {START[v.detail]})")
        parts = self.pointer(self.table.parts[v])
        self.line(f"tl.store({parts} + block * C + j, {reduced(v, f'q{v.number}', 0)}, columns)")

    def load(self, v: Value, name: str) -> str:
        if name not in self.table.pairs:
            return super().load(v, name)
        at = f"i * (N * {HALF}) + j // {BLOCK} * {HALF} + j % {HALF}"
        return f"from_pairs(tl.load({self.pointer(name)} + {at}, m), j)"

    def store(self, name: str, v: Value) -> None:
        if name not in self.table.pairs:
            super().store(name, v)
            return
        self.line("p = j0 // 2 + tl.arange(0, BC // 2)[None, :]")
        pairs = f"to_pairs(tl.where(m, {self.read(v)}, 0), j, BR, BC).to({self.table.dtype[name]})"
        self.line(f"tl.store({self.pointer(name)} + i * (N * {HALF}) + p, {pairs}, rows & (p < N * {HALF}))")

    def computed(self, v: Value) -> str:
        if v.op == "block_max":
            return f"block_max(tl.where(m, {self.read(v.args[0])}, 0), BR, BC)"
        return super().computed(v)

    def operand(self, v: Value, of: Value) -> str:
        text = super().operand(v, of)
        return f"spread({text}, BR, BC)" if v.span == Span.BLOCK and of.span == Span.FULL else text
