"""A schedule run with an array library's own functions, tile by tile and in place, so that no copy of a leaf is held.

It serves wherever no kernel can be compiled: eager torch on any device, and NumPy. Arrays keep all the parameter's
axes, with size 1 along those that a value does not span, and broadcasting repeats what has to be repeated. A tile is
cut from one axis. What a later sweep of the same tile needs again is kept until then, for to compute it again would
cost as much here as the first time; and every value is let go after its last use, so that no more than a handful of
tiles are held at any time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fusedbun.chain import Chain
from fusedbun.compiler.graph import REDUCTIONS, Span, UnplannableError, Value
from fusedbun.compiler.schedule import WIDE, Pass, Schedule, schedule
from fusedbun.compiler.trace import Program, trace
from fusedbun.operations import OPERATIONS
from fusedbun.storage.rounding import PARAM
from fusedbun.transform import Array, Shape

ELEMENTS = 1 << 17  # in a tile: few enough for its buffers to stay in the cache, many enough to be worth a call
ARITHMETIC = ("add", "sub", "mul", "div")  # what Python computes in place
VIEWS = ("bits", "from_bits", "whole", "real")  # their results may be their operand's memory
LIKE = -1  # the place, after all values, of an array of the columns' shape


def schedule_for(
    chain: Chain,
    shape: Shape,
    strides: Sequence[int],
    maximize: bool = False,
    dtype: str = "float32",
    elements: int = ELEMENTS,
) -> Schedule:
    """The schedule that suits tiles of a parameter of this shape and layout.

    Rows are taken along the slowest axis in memory of which one index is no more than a tile (where there is none,
    along the longest), or along another if the rules ask for it. A parameter of one axis is cut into columns.

    Raises:
        UnplannableError: the chain has no schedule.
    """
    in_memory = sorted(range(len(shape)), key=lambda axis: -abs(strides[axis]))
    fitting = [axis for axis in in_memory if math.prod(shape) <= elements * shape[axis]]
    longest = sorted(in_memory, key=lambda axis: -shape[axis])[:1]
    *rows, last = dict.fromkeys((*(fitting or longest)[:1], *in_memory)) or [0]
    for row in rows:
        try:
            return _schedule(chain, in_memory, row, maximize, dtype)
        except UnplannableError:
            pass  # another axis may suit the rules
    return _schedule(chain, in_memory, last, maximize, dtype)


def schedule_of(program: Program) -> Schedule:
    """The schedule of a program whose order of axes suits tiles already."""
    return schedule(program, "rows" if program.graph.ndim > 1 else "columns")


class Tiles:
    """A schedule made ready to be run with an array library, on any leaf that it suits.

    Args:
        schedule: the schedule.
        xp: the library's functions. Its arrays can be sliced, and written by assigning to a slice.
    """

    def __init__(self, schedule: Schedule, xp: Any) -> None:
        self.schedule, self.xp = schedule, xp
        graph = schedule.program.graph
        self.axis = graph.order[schedule.blocks == "columns" and graph.ndim > 1]
        self._tile_span = Span.ROW if schedule.blocks == "rows" else Span.COLUMN
        self.inputs = [v for v in graph.values if v.op == "input" and v.span > Span.HOST and self._is_small(v)]
        self.counts = [v for v in graph.values if v.op == "count"]
        self._known = set(self.inputs)
        self._viewed = {v.args[0] for v in graph.values if v.op in VIEWS}
        self.between = [self._small(schedule.between[0])]
        self.passes: list[_Work] = []
        for work, small in zip(schedule.passes, schedule.between[1:], strict=True):
            self.passes.append(self._work(work))
            self.between.append(self._small(small))

    def run(self, scalars: Sequence[Any], arrays: Mapping[str, Array], dtype: Any, elements: int = ELEMENTS) -> None:
        """Steps one leaf.

        Args:
            scalars: the values of `Program.scalars`.
            arrays: the parameter, its gradient and its slots, by name. What the program puts out is written to them.
            dtype: the library's own for what is computed in.
            elements: how many elements of the parameter make a tile, as nearly as its axis allows.
        """
        shape = arrays[PARAM].shape
        if 0 not in shape:
            # an array of no axes is one of one element here, as it was traced
            _Run(self, scalars, arrays if shape else {k: a[None] for k, a in arrays.items()}, dtype).run(elements)

    def _is_small(self, v: Value) -> bool:
        return v.span not in (*WIDE, self._tile_span)

    def _small(self, goals: list[Value]) -> list[_Step]:
        """The steps to small values. They may lead over values of the leaf's rows, where these are made of slots."""
        found = _made_of(goals, lambda v: v in self._known)
        small = {v for v in found if self._is_small(v)}
        self._known |= small
        return list(self._steps(found, keep=small))

    def _work(self, work: Pass) -> _Work:
        reductions = [*(v for sweep in work.sweeps for v in sweep.reductions), *work.totals]
        partials = [v for v in reductions if v in self.schedule.partials]
        stores = [*(store for sweep in work.sweeps for store in sweep.stores), *work.stores]
        stored = [v for _, v in stores]
        kept = [v for earlier in self.passes for v in earlier.keeps]
        found = _made_of([*reductions, *stored], lambda v: v in kept or (self._is_small(v) and v not in partials))
        self._known |= set(partials)
        return _Work(list(self._steps(found, {*partials, *work.keeps, *stored})), partials, stores, work.keeps, kept)

    def _steps(self, values: list[Value], keep: set[Value]) -> Iterator[_Step]:
        last = {a: v for v in values for a in v.args}
        passing = set(values) - keep
        for v in values:
            ends = {a for a in v.args if a in passing and last[a] is v}
            function, args = self._function(v, ends)
            yield _Step(v, function, args, tuple(a.number for a in ends))

    def _function(self, v: Value, ends: set[Value]) -> tuple[Callable[..., Array] | None, tuple[int, ...]]:
        """What computes a value, and of which arguments."""
        args = tuple(a.number for a in v.args)
        if v.op in ("input", "index"):
            return None, args
        if v.op in REDUCTIONS:
            return self._reduction(v), args
        if v.op == "block_max":
            return lambda x: self.xp.block_max(self.xp.to_blocks(x)), args
        if v.span == Span.FULL and any(a.span == Span.BLOCK for a in v.args):
            return self._over_blocks(v), args
        if v.op == "expand":
            return lambda x, like: self.xp.where(like == like, x, x), (*args, LIKE)
        if v.op == "real" and self.schedule.program.dtype == "float64":
            return lambda x, like: self.xp.astype(x, like.dtype), (*args, LIKE)
        return self._arithmetic(v, ends) if v.op in ARITHMETIC else (self._plain(v), args)

    def _plain(self, v: Value) -> Callable[..., Array]:
        """What computes a value from new arrays of its arguments."""
        operation = OPERATIONS[v.op]
        function: Callable[..., Array] = operation.host if operation.method else getattr(self.xp, v.op)
        return function

    def _over_blocks(self, v: Value) -> Callable[..., Array]:
        """What computes a value of full size from numbers of blocks among others: it repeats them for the elements."""
        compute, xp = self._plain(v), self.xp
        of_blocks = [a.span == Span.BLOCK for a in v.args]
        like = next(i for i, a in enumerate(v.args) if a.span == Span.FULL)

        def over_blocks(*args: Array) -> Array:
            zeros = xp.to_blocks(args[like] != args[like])
            spread = [
                xp.from_blocks(xp.where(zeros, x, x), args[like].shape) if is_block else x
                for x, is_block in zip(args, of_blocks, strict=True)
            ]
            return compute(*spread)

        return over_blocks

    def _arithmetic(self, v: Value, ends: set[Value]) -> tuple[Callable[..., Array], tuple[int, ...]]:
        """In place of an argument that ends, if it can be: that spares the cache a tile."""
        operation = OPERATIONS[v.op]
        for args in (v.args, v.args[::-1]) if operation.commutes else (v.args,):
            if args[0] in ends and _is_buffer(args[0]) and args[0] not in self._viewed:
                return getattr(operator, f"__i{operation.method}__"), tuple(a.number for a in args)
        return operation.host, tuple(a.number for a in v.args)

    def _reduction(self, v: Value) -> Callable[[Array], Array]:
        reduce = getattr(self.xp, v.detail)
        axis = tuple(sorted(v.args[0].axes - v.axes))
        return lambda x: reduce(x, axis=axis, keepdims=True)


class _Step(NamedTuple):
    """The computation of one value. Values are given by their number in the graph.

    Args:
        value: the value.
        function: what computes it from the arguments; None for an input.
        args: the arguments.
        ends: those that no later step needs.
    """

    value: Value
    function: Callable[..., Array] | None
    args: tuple[int, ...]
    ends: tuple[int, ...]


class _Work(NamedTuple):
    """What a pass does with each tile.

    Args:
        steps: the steps, of all its sweeps in one.
        partials: the reductions that every tile adds to.
        stores: what is written, by name.
        keeps: the values of each tile that are kept for later passes.
        kept: those that earlier passes kept.
    """

    steps: list[_Step]
    partials: list[Value]
    stores: list[tuple[str, Value]]
    keeps: list[Value]
    kept: list[Value]


class _Run:
    """One step of one leaf."""

    def __init__(self, tiles: Tiles, scalars: Sequence[Any], arrays: Mapping[str, Array], dtype: Any) -> None:
        self.tiles, self.arrays, self.dtype = tiles, arrays, dtype
        program = tiles.schedule.program
        self.shape: Shape = tuple(arrays[PARAM].shape)
        self.values: list[Any] = [v.detail for v in program.graph.values]  # a constant's is its number
        self.values.append(arrays[PARAM][_slice(program.graph.order[0], 0, 1)])
        for v in tiles.counts:
            self.values[v.number] = math.prod(self.shape[axis] for axis in v.detail)
        for v, number in zip(program.scalars, scalars, strict=True):
            self.values[v.number] = number
        for v in tiles.inputs:
            self.values[v.number] = self._load(v, ())
        self.kept: dict[Value, list[Array]] = {v: [] for v in tiles.schedule.kept}

    def run(self, elements: int) -> None:
        cuts = self._cuts(elements)
        for small, work in zip(self.tiles.between, self.tiles.passes, strict=False):
            self._compute(small, ())
            self._pass(work, cuts)
        self._compute(self.tiles.between[-1], ())
        self._store(self.tiles.schedule.stores, ())

    def _cuts(self, elements: int) -> list[tuple[slice, ...]]:
        """The tiles, as slices of an array that spans the axis which is cut."""
        length = self.shape[self.tiles.axis]
        size = max(1, elements * length // math.prod(self.shape))
        return [_slice(self.tiles.axis, start, start + size) for start in range(0, length, size)]

    def _pass(self, work: _Work, cuts: list[tuple[slice, ...]]) -> None:
        totals = [_Total(self._combination(v)) for v in work.partials]
        for number, cut in enumerate(cuts):
            for v in work.kept:
                self.values[v.number] = self.kept[v][number]
            self._compute(work.steps, cut)
            for v in work.keeps:
                self.kept[v].append(self.values[v.number])
            for v, total in zip(work.partials, totals, strict=True):
                total.add(self.values[v.number])
            self._store(work.stores, cut)
        for v, total in zip(work.partials, totals, strict=True):
            self.values[v.number] = total.result()

    def _compute(self, steps: list[_Step], cut: tuple[slice, ...]) -> None:
        values = self.values
        for v, function, args, ends in steps:
            values[v.number] = self._load(v, cut) if function is None else function(*[values[a] for a in args])
            for number in ends:
                values[number] = None

    def _place(self, name: str, v: Value, cut: tuple[slice, ...]) -> Array:
        array = self.arrays[name]
        return array[cut] if self.tiles.axis in v.axes and cut else array

    def _load(self, v: Value, cut: tuple[slice, ...]) -> Array:
        xp, axis = self.tiles.xp, self.tiles.axis
        if v.op == "index":
            (places,) = xp.index(self.arrays[PARAM][cut], [v.detail])
            return places + cut[axis].start if cut and v.detail == axis else places
        stored = self._place(v.detail, v, cut)
        if bits := self._packed(v.detail):
            return xp.from_blocks(xp.unpack(stored, bits), (len(stored), *self.shape[1:]))
        if v.is_word:
            return xp.whole(stored)
        return stored if stored.dtype == self.dtype else xp.astype(stored, self.dtype)

    def _packed(self, name: str) -> int | None:
        """The bits of its numbers, where they are packed."""
        arrays = self.tiles.schedule.program.arrays
        return arrays[name].bits if name in arrays else None

    def _store(self, stores: list[tuple[str, Value]], cut: tuple[slice, ...]) -> None:
        xp, values = self.tiles.xp, self.values
        for _, v in stores:
            if v.op == "input":  # a view of what another store may write
                values[v.number] = xp.maximum(values[v.number], values[v.number])
        for name, v in stores:
            place, value = self._place(name, v, cut), values[v.number]
            place[...] = xp.pack(xp.to_blocks(value), bits) if (bits := self._packed(name)) else value
        for _, v in stores:
            values[v.number] = None

    def _combination(self, v: Value) -> Callable[[Array, Array], Array]:
        xp = self.tiles.xp
        combinations: dict[str, Callable[[Array, Array], Array]]
        combinations = {"sum": operator.add, "max": xp.maximum, "min": xp.minimum}
        return combinations[v.detail]


class _Total:
    """A reduction over all tiles: theirs are combined two by two, so that long sums stay accurate."""

    def __init__(self, combine: Callable[[Array, Array], Array]) -> None:
        self._combine = combine
        self._parts: list[tuple[int, Array]] = []  # each of more tiles than the next

    def add(self, part: Array) -> None:
        tiles = 1
        while self._parts and self._parts[-1][0] == tiles:
            _, before = self._parts.pop()
            tiles, part = 2 * tiles, self._combine(before, part)
        self._parts.append((tiles, part))

    def result(self) -> Array:
        _, total = self._parts.pop()
        while self._parts:
            total = self._combine(self._parts.pop()[1], total)
        return total


def _schedule(chain: Chain, in_memory: list[int], row: int, maximize: bool, dtype: str) -> Schedule:
    order = (row, *(axis for axis in in_memory if axis != row))
    return schedule_of(trace(chain, len(in_memory), order, maximize, dtype))


def _slice(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))


def _is_buffer(v: Value) -> bool:
    """Whether it is an array of a tile's size, no view of the leaf, and of the dtype that is computed in."""
    numbers = v.args[1:] if v.op == "where" else v.args  # what a library makes of Python's has its default dtype
    return v.span == Span.FULL and v.op not in ("input", "index", *VIEWS) and any(a.span > Span.HOST for a in numbers)


def _made_of(goals: Iterable[Value], stop: Callable[[Value], bool]) -> list[Value]:
    """The values that these are made of, each after its own arguments; none that `stop` names, nor what is given."""
    found: dict[Value, None] = {}

    def visit(v: Value) -> None:
        if v not in found and v.span != Span.HOST and v.op != "count" and not stop(v):
            for a in v.args:
                visit(a)
            found[v] = None

    for v in goals:
        visit(v)
    return list(found)
