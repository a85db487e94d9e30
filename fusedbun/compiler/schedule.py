"""From a graph to an order of work: what is computed in which pass over memory, and in which sweep along a block.

A *pass* reads the parameter's arrays from their first element to their last. It goes block by block; a block is a few
rows, short enough to stay in the cache, and within a block there may be several *sweeps* from its first column to its
last. A value that needs the reduction across its own row waits for the next sweep. One that needs a reduction down the
rows waits for the next pass, for that is known only when every block has been seen. Between the passes come the small
values, one number for each column or one in all.

The roles of rows and columns can be swapped (`blocks="columns"`): then a block is a few columns with all their rows.
That serves matrices of few and very long rows.

Nothing of full size is stored but what the step writes. A value of full size that is needed again is computed again,
from the arrays in memory; only within a block, where a division or a root would be repeated, it is kept in a buffer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from fusedbun.compiler.graph import REDUCTIONS, Span, UnplannableError, Value
from fusedbun.compiler.trace import Program, used

Blocks = Literal["rows", "columns"]
Time = tuple[int, int]  # a pass, and a sweep of it
WIDE = (Span.FULL, Span.BLOCK)  # what a sweep computes
DEAR = ("div", "sqrt")  # operations that cost more than to store their result in the cache and load it again


@dataclass
class Sweep:
    """One run along a block.

    Args:
        block: the values of one number for each of the block's rows that it needs, computed before it starts.
        full: the values of full size and of blocks, in the order in which they are computed.
        saved: of these, the ones put into the block's buffer for a later sweep.
        reductions: the reductions whose operands are taken up.
        stores: what is written to memory: the array's name and the value.
    """

    block: list[Value] = field(default_factory=list)
    full: list[Value] = field(default_factory=list)
    saved: list[Value] = field(default_factory=list)
    reductions: list[Value] = field(default_factory=list)
    stores: list[tuple[str, Value]] = field(default_factory=list)


@dataclass
class Pass:
    """One pass over memory.

    Args:
        sweeps: the sweeps along each block.
        buffer: the values kept in a block's buffer from one sweep to another.
        after: the values of one number for each of the block's rows that are computed after the last sweep.
        keeps: the reductions along a block that later passes need.
        totals: the reductions of these to one number in all.
        stores: what is written to memory for each of the block's rows.
    """

    sweeps: list[Sweep]
    buffer: list[Value] = field(default_factory=list)
    after: list[Value] = field(default_factory=list)
    keeps: list[Value] = field(default_factory=list)
    totals: list[Value] = field(default_factory=list)
    stores: list[tuple[str, Value]] = field(default_factory=list)


@dataclass
class Schedule:
    """The work of a step, in order.

    Args:
        program: what is computed.
        blocks: whether blocks are rows or columns.
        passes: the passes over memory.
        between: the small values computed before each pass and, in the last entry, after all of them.
        kept: the reductions along a block that are kept for later passes, one number for each row.
        partials: the reductions that every block adds to.
        stores: the small outputs, written at the end.
    """

    program: Program
    blocks: Blocks
    passes: list[Pass]
    between: list[list[Value]]
    kept: list[Value]
    partials: list[Value]
    stores: list[tuple[str, Value]]

    @property
    def is_elementwise(self) -> bool:
        """Whether an element depends on no other, so that the leaf may be taken as one long row."""
        values = used(self.program.outputs.values())
        reduces = any(v.op in REDUCTIONS for v in values)
        return not reduces and not any(v.span in (Span.ROW, Span.COLUMN, Span.BLOCK) for v in values)

    @property
    def small(self) -> list[Value]:
        """The small values that have a place in memory."""
        return [v for values in self.between for v in values]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def schedule(program: Program, blocks: Blocks = "rows") -> Schedule:
    """Puts a program's values in order.

    Raises:
        UnplannableError: the order that was asked for does not suit the program; blocks of rows suit every program.
    """
    return _Scheduler(program, blocks).run()


class _Scheduler:
    def __init__(self, program: Program, blocks: Blocks) -> None:
        self.program, self.blocks = program, blocks
        self.along = "across" if blocks == "rows" else "down"  # the reduction that ends within a block
        self.block = Span.ROW if blocks == "rows" else Span.COLUMN
        self.values = used(program.outputs.values())
        if blocks == "columns" and any(v.op in ("within", "expand") for v in self.values):
            raise UnplannableError("blocks of columns do not suit reductions along some of the columns")
        if blocks == "columns" and any(v.span == Span.BLOCK for v in self.values):
            raise UnplannableError("blocks of columns do not suit codes that share an exponent along a row")
        self.dear = _dear(self.values)
        self.times: dict[Value, Time] = {}
        for v in self.values:
            self.times[v] = self._time(v)
        self.partials = [v for v in self.values if self._crosses(v)]
        outputs = program.outputs.items()
        self.full_stores = [(name, v) for name, v in outputs if v.span in WIDE]
        self.block_stores = [(name, v) for name, v in outputs if v.span == self.block]
        self.small_stores = [(name, v) for name, v in outputs if self._is_small(v)]

    def run(self) -> Schedule:
        ends = [self.times[v.args[0]] for v in self.partials]
        ends += [self.times[v] for _, v in (*self.full_stores, *self.block_stores)]
        ends += [self.times[v] for v in self.values if self._reads_slots(v)]  # before the last pass writes to them
        last = max((t for t, _ in ends), default=0)
        passes = [self._pass(t, t == last) for t in range(last + 1)]
        for t, work in enumerate(passes):
            later = [v for p in passes[t + 1 :] for values in (p.after, *(s.block for s in p.sweeps)) for v in values]
            ended = [v for sweep in work.sweeps for v in sweep.reductions if not self._crosses(v)]
            work.keeps = [v for v in ended if v in later]
        kept = [v for work in passes for v in work.keeps]
        between = self._between(last + 2)
        return Schedule(self.program, self.blocks, passes, between, kept, self.partials, self.small_stores)

    def _is_small(self, v: Value) -> bool:
        return v.span not in (*WIDE, self.block)

    def _crosses(self, v: Value) -> bool:
        """Whether it is a reduction that takes up something of every block."""
        return v.op in ("across", "down") and self._is_small(v) and _is_of(v.args[0], Span.FULL, self.along, self.block)

    def _reads_slots(self, v: Value) -> bool:
        """Whether it is a small value made of slots that have a number for each of the rows."""
        return self._is_small(v) and not self._crosses(v) and not all(map(self._is_small, v.args))

    def _time(self, v: Value) -> Time:
        """The pass and the sweep in which the value is ready."""
        before = [self.times[a] for a in v.args]
        t = max((at for at, _ in before), default=0)
        s = max((sweep for at, sweep in before if at == t), default=0)
        if self._crosses(v):
            return t + 1, 0
        if self._is_small(v):
            return t, 0
        return (t, s + 1) if v.op == self.along else (t, s)

    def _pass(self, t: int, is_last: bool) -> Pass:
        sweeps: dict[int, Sweep] = defaultdict(Sweep)
        for v in self.values:
            if v.op in ("across", "down") and v.args[0].span == Span.FULL and self.times[v.args[0]][0] == t:
                sweeps[self.times[v.args[0]][1]].reductions.append(v)
        if is_last:
            ready = [s for at, s in (self.times[v] for _, v in self.full_stores) if at == t]
            # in the last sweep, for the others read what it overwrites
            sweeps[max([0, *ready, *sweeps])].stores += self.full_stores
        work = Pass([sweeps[s] for s in sorted(sweeps)])
        work.totals = [v for v in self.partials if v.args[0].span == self.block and self.times[v.args[0]][0] == t]
        work.stores = self.block_stores if is_last else []
        self._fill(work)
        return work

    def _fill(self, work: Pass) -> None:
        """Adds the values that each sweep needs, and those of the block."""
        first: dict[Value, int] = {}  # the sweep that first computes a full value
        for s, sweep in enumerate(work.sweeps):
            goals = [*(v.args[0] for v in sweep.reductions), *(v for _, v in sweep.stores)]
            sweep.full = _made_of(goals, WIDE, stop=lambda v: v in first and v in self.dear)
            for v in sweep.full:
                if first.setdefault(v, s) < s and v in self.dear and v not in work.buffer:
                    work.buffer.append(v)
                    work.sweeps[first[v]].saved.append(v)
            known = {v for earlier in work.sweeps[:s] for v in earlier.block}
            computed = [v for v in sweep.full if v not in work.buffer or v in sweep.saved]
            sweep.block = [v for v in self._of_block(a for v in computed for a in v.args) if v not in known]
        known = {v for sweep in work.sweeps for v in sweep.block}
        goals = [*(v.args[0] for v in work.totals), *(v for _, v in work.stores)]
        work.after = [v for v in self._of_block(goals) if v not in known]

    def _of_block(self, goals: Iterable[Value]) -> list[Value]:
        """The values of the block among what these are made of; a reduction along the block stands for itself."""
        return _made_of(goals, (self.block,), stop=lambda v: v.op == self.along)

    def _between(self, count: int) -> list[list[Value]]:
        """The small values that need a place in memory, by the pass before which they are computed."""
        outputs = [v for _, v in self.small_stores]
        read = [a for v in self.values if not self._is_small(v) for a in v.args]
        placed = [
            v
            for v in self.values
            if self._is_small(v)
            and v.span != Span.HOST
            and v.op not in ("input", "count")
            and (v in outputs or v in read or v.op in REDUCTIONS or v.op == "expand")
        ]
        return [[v for v in placed if self.times[v][0] == t] for t in range(count)]


def _made_of(goals: Iterable[Value], spans: tuple[Span, ...], stop: Callable[[Value], bool]) -> list[Value]:
    """The values of some spans that these are made of, in order; those that `stop` names stand for themselves."""
    found: dict[Value, None] = {}

    def visit(v: Value) -> None:
        if v.span in spans and v not in found:
            for a in () if stop(v) else v.args:
                visit(a)
            found[v] = None

    for v in goals:
        visit(v)
    return list(found)


def _is_of(v: Value, full: Span, along: str, block: Span) -> bool:
    """Whether the value is known only while a pass goes over memory: full, or made of a reduction along a block."""
    if v.span == full:
        return True
    return v.span == block and (v.op == along or any(_is_of(a, full, along, block) for a in v.args))


def _dear(values: list[Value]) -> set[Value]:
    """The values of full size that are made with a dear operation; `values` come after their operands."""
    dear: set[Value] = set()
    for v in values:
        if v.span == Span.FULL and (v.op in DEAR or any(a in dear for a in v.args)):
            dear.add(v)
    return dear


def _lines(schedule: Schedule) -> Iterator[str]:
    def listed(title: str, values: Iterable[Value]) -> Iterator[str]:
        text = " ".join(f"%{v.number}" for v in values)
        return iter([f"  {title:11}{text}"] if text else [])

    def written(stores: list[tuple[str, Value]]) -> Iterator[str]:
        return (f"  store      {name} <- %{v.number}" for name, v in stores)

    row = "row" if schedule.blocks == "rows" else "column"
    yield f"blocks of {schedule.blocks}"
    for t, work in enumerate(schedule.passes):
        yield f"before pass {t}"
        yield from listed("compute", schedule.between[t])
        for s, sweep in enumerate(work.sweeps):
            yield f"pass {t}, sweep {s}"
            yield from listed(f"each {row}", sweep.block)
            yield from listed("elements", sweep.full)
            yield from listed("buffer", sweep.saved)
            yield from listed("reduce", sweep.reductions)
            yield from written(sweep.stores)
        if work.after or work.totals or work.stores or work.keeps:
            yield f"pass {t}, after each block"
            yield from listed(f"each {row}", work.after)
            yield from listed("keep", work.keeps)
            yield from listed("reduce", work.totals)
            yield from written(work.stores)
    yield "at the end"
    yield from listed("compute", schedule.between[-1])
    yield from written(schedule.stores)
