"""From a graph to an order of work: what is computed in which pass over memory, and in which sweep along a tile.

A *pass* reads the parameter's arrays from their first element to their last. It goes tile by tile; a tile is a few
rows, short enough to stay in the cache, and within a tile there may be several *sweeps* from its first column to its
last. A value that needs the reduction across its own row waits for the next sweep. One that needs a reduction down the
rows waits for the next pass, for that is known only when every tile has been seen. Between the passes come the small
values, one number for each column or one in all.

The roles of rows and columns can be swapped (`tiles="columns"`): then a tile is a few columns with all their rows.
That serves matrices of few and very long rows.

Nothing of full size is stored but what the step writes. A value of full size that is needed again is computed again,
from the arrays in memory; only within a tile, where a division or a root would be repeated, it is kept in a buffer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from fusedbun.compiler.graph import REDUCTIONS, Span, UnschedulableError, Value
from fusedbun.compiler.trace import Program, used
from fusedbun.operations import OPERATIONS

Tiles = Literal["rows", "columns"]
Store = tuple[str, Value]  # the name of an array, and what is written to it
Time = tuple[int, int]  # a pass, and a sweep of it
COSTLY = frozenset(row.name for row in OPERATIONS.values() if row.costly)
WIDE = (Span.FULL, Span.BLOCK)  # what a sweep computes
OF_TILES = {"rows": Span.ROW, "columns": Span.COLUMN}  # the span of one number for each row, or column, of the tiles


@dataclass
class Sweep:
    """One run along a tile."""

    reductions: list[Value] = field(default_factory=list)  # those whose operands are taken up
    stores: list[Store] = field(default_factory=list)  # what is written to memory
    full: list[Value] = field(default_factory=list)  # what these need of full size and of blocks, in order
    saved: list[Value] = field(default_factory=list)  # of `full`, what is put into the tile's buffer for a later sweep
    tile: list[Value] = field(default_factory=list)  # what `full` needs of each row, computed before the sweep starts


@dataclass
class Pass:
    """One pass over memory: the sweeps along each tile, and what is done with the tile's rows after them."""

    sweeps: list[Sweep]
    totals: list[Value] = field(default_factory=list)  # the reductions of what each row has to one number in all
    stores: list[Store] = field(default_factory=list)  # what is written to memory for each row
    after: list[Value] = field(default_factory=list)  # what these need of each row, computed after the last sweep
    keeps: list[Value] = field(default_factory=list)  # the reductions along a tile that later passes need
    buffer: list[Value] = field(default_factory=list)  # what a tile's buffer holds from one sweep to another

    @property
    def all_reductions(self) -> list[Value]:
        """Those of its sweeps, and the totals."""
        return [*(v for sweep in self.sweeps for v in sweep.reductions), *self.totals]

    @property
    def all_stores(self) -> list[Store]:
        """Those of its sweeps, and those of each row."""
        return [*(store for sweep in self.sweeps for store in sweep.stores), *self.stores]


@dataclass
class Schedule:
    """The work of a step, in order."""

    program: Program  # what is computed
    tiles: Tiles  # what a tile is made of; where it is columns, it is they that are called rows above
    passes: list[Pass]
    between: list[list[Value]]  # the small values computed before each pass and, in the last entry, after all of them
    partials: list[Value]  # the reductions that every tile adds to
    stores: list[Store]  # the small outputs, written at the end

    @property
    def is_elementwise(self) -> bool:
        """Whether an element depends on no other, so that the leaf may be taken as one long row."""
        values = used(self.program.outputs.values())
        return all(v.op not in REDUCTIONS and v.span in (Span.HOST, Span.SCALAR, Span.FULL) for v in values)

    @property
    def small(self) -> list[Value]:
        """The small values that have a place in memory."""
        return [v for values in self.between for v in values]

    @property
    def kept(self) -> list[Value]:
        """The reductions along a tile that are kept for later passes, one number for each row."""
        return [v for work in self.passes for v in work.keeps]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def schedule(program: Program, tiles: Tiles = "rows") -> Schedule:
    """Puts a program's values in order.

    Raises:
        UnschedulableError: the order that was asked for does not suit the program; tiles of rows suit every program.
    """
    return _Scheduler(program, tiles).run()


def is_small(v: Value, tiles: Tiles) -> bool:
    """Whether a value is computed between the passes over such tiles, or given."""
    return v.span not in (*WIDE, OF_TILES[tiles])


class _Scheduler:
    def __init__(self, program: Program, tiles: Tiles) -> None:
        self.program, self.tiles = program, tiles
        self.along = "across" if tiles == "rows" else "down"  # the reduction that ends within a tile
        self.tile = OF_TILES[tiles]
        self.values = used(program.outputs.values())
        if tiles == "columns" and any(v.op in ("within", "expand") for v in self.values):
            raise UnschedulableError("tiles of columns do not suit reductions along some of the columns")
        if tiles == "columns" and any(v.span == Span.BLOCK for v in self.values):
            raise UnschedulableError("tiles of columns do not suit codes that share an exponent along a row")
        self.small = {v for v in self.values if is_small(v, tiles)}
        # the small values that are reductions of something of every tile
        self.partials = [v for v in self.values if v in self.small and v.op in REDUCTIONS and self._needs_pass(v)]
        self.costly: set[Value] = set()  # the values of full size that take a costly operation
        self.times: dict[Value, Time] = {}  # the pass and the sweep in which a value can be computed
        for v in self.values:
            t, s = max((self.times[a] for a in v.args), default=(0, 0))
            self.times[v] = (t + (v in self.partials), 0) if v in self.small else (t, s + (v.op == self.along))
            if v.span == Span.FULL and (v.op in COSTLY or not self.costly.isdisjoint(v.args)):
                self.costly.add(v)
        outputs = program.outputs.items()
        self.full_stores = [(name, v) for name, v in outputs if v.span in WIDE]
        self.tile_stores = [(name, v) for name, v in outputs if v.span == self.tile]
        self.small_stores = [(name, v) for name, v in outputs if v in self.small]

    def run(self) -> Schedule:
        ends = [v.args[0] for v in self.partials]
        ends += [v for _, v in (*self.full_stores, *self.tile_stores)]
        # what reads arrays that have a number for each of the rows, before the last pass writes to them
        ends += [v for v in self.small if v not in self.partials and not self.small.issuperset(v.args)]
        last = max((self.times[v][0] for v in ends), default=0)
        passes = [self._pass(t, t == last) for t in range(last + 1)]
        for t, work in enumerate(passes):
            later = {v for p in passes[t + 1 :] for values in (p.after, *(s.tile for s in p.sweeps)) for v in values}
            work.keeps = [v for v in work.all_reductions if v in later and v not in self.partials]
        return Schedule(self.program, self.tiles, passes, self._between(last + 2), self.partials, self.small_stores)

    def _needs_pass(self, v: Value) -> bool:
        """Whether it is made of something that is known only while a pass goes over memory."""
        return any(
            a.span == Span.FULL or (a.span == self.tile and (a.op == self.along or self._needs_pass(a))) for a in v.args
        )

    def _pass(self, t: int, is_last: bool) -> Pass:
        sweeps: dict[int, Sweep] = defaultdict(Sweep)
        for v in self.values:
            if v.op in REDUCTIONS and v.args[0].span == Span.FULL and self.times[v.args[0]][0] == t:
                sweeps[self.times[v.args[0]][1]].reductions.append(v)
        if is_last:  # in the last sweep, for the others read what it overwrites
            computed = [self.times[v][1] for _, v in self.full_stores if self.times[v][0] == t]
            sweeps[max([0, *computed, *sweeps])].stores += self.full_stores
        totals = [v for v in self.partials if v.args[0].span == self.tile and self.times[v.args[0]][0] == t]
        work = Pass([sweeps[s] for s in sorted(sweeps)], totals, self.tile_stores if is_last else [])
        self._fill(work)
        return work

    def _fill(self, work: Pass) -> None:
        """Adds the values that the reductions and the stores of a pass need."""
        first: dict[Value, Sweep] = {}  # the sweep that first computes a full value
        known: set[Value] = set()  # the values of the tile that earlier sweeps need
        for sweep in work.sweeps:
            goals = [*(v.args[0] for v in sweep.reductions), *(v for _, v in sweep.stores)]
            sweep.full = used(goals, lambda v: v.span in WIDE, is_end=lambda v: v in first and v in self.costly)
            for v in sweep.full:
                if first.setdefault(v, sweep) is not sweep and v in self.costly and v not in work.buffer:
                    work.buffer.append(v)
                    first[v].saved.append(v)
            computed = [v for v in sweep.full if v not in work.buffer or v in sweep.saved]
            sweep.tile = [v for v in self._of_tile(a for v in computed for a in v.args) if v not in known]
            known.update(sweep.tile)
        goals = [*(v.args[0] for v in work.totals), *(v for _, v in work.stores)]
        work.after = [v for v in self._of_tile(goals) if v not in known]

    def _of_tile(self, goals: Iterable[Value]) -> list[Value]:
        """The values of the tile that these are made of; a reduction along the tile is not looked into."""
        return used(goals, lambda v: v.span == self.tile, is_end=lambda v: v.op == self.along)

    def _between(self, count: int) -> list[list[Value]]:
        """The small values that need a place in memory, by the pass before which they are computed."""
        read = {a for v in self.values if v not in self.small for a in v.args} | {v for _, v in self.small_stores}
        placed = [
            v
            for v in self.values
            if v in self.small
            and not _is_given(v)
            and v.op != "input"
            and (v in read or v.op in (*REDUCTIONS, "expand"))
        ]
        return [[v for v in placed if self.times[v][0] == t] for t in range(count)]


def _is_given(v: Value) -> bool:
    """Whether a number is made of hyper-parameters and counts alone, so that it is computed wherever it is read."""
    return v.span == Span.HOST or v.op == "count" or (not v.axes and bool(v.args) and all(map(_is_given, v.args)))


def _lines(schedule: Schedule) -> Iterator[str]:
    each = f"each {schedule.tiles.removesuffix('s')}"
    yield f"tiles of {schedule.tiles}"
    for t, work in enumerate(schedule.passes):
        yield from _section(f"before pass {t}", {"compute": schedule.between[t]})
        for s, sweep in enumerate(work.sweeps):
            listed = {each: sweep.tile, "elements": sweep.full, "buffer": sweep.saved, "reduce": sweep.reductions}
            yield from _section(f"pass {t}, sweep {s}", listed, sweep.stores)
        if work.after or work.totals or work.stores or work.keeps:
            listed = {each: work.after, "keep": work.keeps, "reduce": work.totals}
            yield from _section(f"pass {t}, after each tile", listed, work.stores)
    yield from _section("at the end", {"compute": schedule.between[-1]}, schedule.stores)


def _section(title: str, listed: dict[str, list[Value]], stores: Iterable[Store] = ()) -> Iterator[str]:
    yield title
    for what, values in listed.items():
        if values:
            yield f"  {what:11}{' '.join(f'%{v.number}' for v in values)}"
    yield from (f"  store      {name} <- %{v.number}" for name, v in stores)
