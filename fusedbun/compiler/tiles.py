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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from fusedbun.chain import Chain
from fusedbun.compiler.graph import REDUCTIONS, Span, UnschedulableError, Value
from fusedbun.compiler.schedule import Pass, Schedule, Store, is_small, schedule
from fusedbun.compiler.trace import Program, trace, used
from fusedbun.hyper import choose
from fusedbun.operations import OPERATIONS
from fusedbun.storage.rounding import PARAM
from fusedbun.transform import Array, Shape

ELEMENTS = 1 << 17  # in a tile: few enough for its buffers to stay in the cache, many enough to be worth a call
ARITHMETIC = ("add", "sub", "mul", "div")  # what Python computes in place
VIEWS = ("bits", "from_bits", "whole", "real")  # their results may be their operand's memory
Cut = tuple[slice, ...]  # a tile, as slices of an array that spans the axis which is cut; () for the whole
LIKE = -1  # the place, after all values, of an array of the columns' shape


def schedule_for(
    chain: Chain, shape: Shape, strides: Shape, maximize: bool = False, dtype: str = "float32", elements: int = ELEMENTS
) -> Schedule:
    """The schedule that suits tiles of a parameter of this shape and layout.

    Rows are taken along the slowest axis in memory of which one index is no more than a tile (where there is none,
    along the longest), or along another if the rules ask for it. A parameter of one axis is cut into columns.

    Raises:
        UnschedulableError: the chain has no schedule.
    """
    in_memory = sorted(range(len(shape)), key=lambda axis: -abs(strides[axis]))
    fitting = [axis for axis in in_memory if math.prod(shape) <= elements * shape[axis]]
    longest = sorted(in_memory, key=lambda axis: -shape[axis])
    refusals = []
    for row in dict.fromkeys((*(fitting or longest)[:1], *in_memory)) or [0]:
        order = (row, *(axis for axis in in_memory if axis != row))
        try:
            return schedule_of(trace(chain, len(shape), order, maximize, dtype))
        except UnschedulableError as error:  # another axis may suit the rules
            refusals.append(error)
    raise refusals[-1]


def schedule_of(program: Program) -> Schedule:
    """The schedule of a program whose order of axes suits tiles already."""
    return schedule(program, "rows" if program.graph.ndim > 1 else "columns")


class Tiles:
    """A schedule made ready to be run with an array library, on any leaf that it suits.

    Args:
        schedule: made by `schedule_for` or `schedule_of`.
        xp: the library's functions. Its arrays can be sliced, and written by assigning to a slice.
    """

    def __init__(self, schedule: Schedule, xp: Any) -> None:
        self.schedule, self.xp = schedule, xp
        graph, arrays = schedule.program.graph, schedule.program.arrays
        self.axis = graph.order[0]
        small = [v for v in graph.values if is_small(v, schedule.tiles)]
        self.inputs = [v for v in small if v.op == "input" and v.span > Span.HOST]
        self.counts = [v for v in small if v.op == "count"]
        self.bits = {name: stored.bits for name, stored in arrays.items() if stored.bits}  # of packed numbers
        # what is given, or computed before what is looked at
        self._known = {*self.inputs, *self.counts, *(v for v in small if v.span == Span.HOST)}
        self._viewed = {v.args[0] for v in graph.values if v.op in VIEWS}
        self.between = [self._small(schedule.between[0])]
        self.passes: list[_Work] = []
        for work, goals in zip(schedule.passes, schedule.between[1:], strict=True):
            self.passes.append(self._work(work))
            self.between.append(self._small(goals))

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

    def _small(self, goals: list[Value]) -> list[_Step]:
        """The steps to small values. They may lead over values of the leaf's rows, where these are made of slots."""
        found = used(goals, lambda v: v not in self._known)
        small = {v for v in found if is_small(v, self.schedule.tiles)}
        self._known |= small
        return list(self._steps(found, keep=small))

    def _work(self, work: Pass) -> _Work:
        stored = [v for _, v in work.all_stores]
        found = used([*work.all_reductions, *stored], lambda v: v not in self._known)
        partials = [v for v in work.all_reductions if v in self.schedule.partials]
        self._known |= {*work.keeps, *partials}
        steps = list(self._steps(found, keep={*work.keeps, *partials, *stored}))
        return _Work(steps, partials, work.all_stores, work.keeps)

    def _steps(self, values: list[Value], keep: set[Value]) -> Iterator[_Step]:
        """The computation of these values in their order; those that are not kept end where they are last needed."""
        last = {a: v for v in values for a in v.args}
        passing = set(values) - keep
        for v in values:
            ends = {a for a in v.args if a in passing and last[a] is v}
            function, args = self._function(v, ends)
            yield _Step(v, function, args, tuple(a.number for a in ends))

    def _function(self, v: Value, ends: set[Value]) -> tuple[Callable[..., Array] | None, tuple[int, ...]]:
        """What computes a value, and of which arguments; None for what is loaded."""
        args, xp = tuple(a.number for a in v.args), self.xp
        if v.op in ("input", "index"):
            return None, args
        if v.op in REDUCTIONS:
            return partial(getattr(xp, v.detail), axis=tuple(sorted(v.args[0].axes - v.axes)), keepdims=True), args
        if v.op == "block_max":
            return lambda x: xp.block_max(xp.to_blocks(x)), args
        if v.op == "expand":
            return lambda x, like: xp.where(like == like, x, x), (*args, LIKE)
        if v.op == "real" and self.schedule.program.dtype == "float64":
            return lambda x, like: xp.astype(x, like.dtype), (*args, LIKE)
        if v.op == "where" and not v.args[0].axes:  # what is counted and what is given are Python's numbers
            return partial(choose, xp), args
        operation = OPERATIONS[v.op]
        function = operation.host if operation.method else getattr(xp, v.op)
        if v.span == Span.FULL and any(a.span == Span.BLOCK for a in v.args):
            return self._over_blocks(v, function), args
        if v.op in ARITHMETIC:  # in place of an argument that ends, if it can be: that spares the cache a tile
            for operands in (v.args, v.args[::-1]) if operation.commutes else (v.args,):
                if operands[0] in ends and _is_buffer(operands[0]) and operands[0] not in self._viewed:
                    return getattr(operator, f"__i{operation.method}__"), tuple(a.number for a in operands)
        return function, args

    def _over_blocks(self, v: Value, function: Callable[..., Array]) -> Callable[..., Array]:
        """What computes a value of full size from numbers of blocks among others: it repeats them for the elements."""
        xp, spans = self.xp, [a.span for a in v.args]

        def spread(x: Array, like: Array) -> Array:
            of_elements = xp.to_blocks(like != like)
            return xp.from_blocks(xp.where(of_elements, x, x), like.shape)

        def over_blocks(*args: Array) -> Array:
            like = args[spans.index(Span.FULL)]
            return function(
                *(spread(x, like) if span == Span.BLOCK else x for x, span in zip(args, spans, strict=True))
            )

        return over_blocks


class _Step(NamedTuple):
    """The computation of one value; its arguments are numbers of values."""

    value: Value
    function: Callable[..., Array] | None  # None for what is loaded
    args: tuple[int, ...]
    ends: tuple[int, ...]  # the arguments that no later step needs


class _Work(NamedTuple):
    """What a pass does with each tile."""

    steps: list[_Step]  # of all its sweeps in one
    partials: list[Value]  # the reductions that every tile adds to
    stores: list[Store]
    keeps: list[Value]  # what is kept of each tile for later passes


class _Run:
    """One step of one leaf."""

    def __init__(self, tiles: Tiles, scalars: Sequence[Any], arrays: Mapping[str, Array], dtype: Any) -> None:
        self.tiles, self.xp, self.arrays, self.dtype = tiles, tiles.xp, arrays, dtype
        program = tiles.schedule.program
        self.shape: Shape = tuple(arrays[PARAM].shape)
        self.values: list[Any] = [v.detail for v in program.graph.values]  # a constant's is its number
        self.values.append(arrays[PARAM][_slice(tiles.axis, 0, 1)])
        for v in tiles.counts:
            self.values[v.number] = math.prod(self.shape[axis] for axis in v.detail)
        for v, number in zip(program.scalars, scalars, strict=True):
            self.values[v.number] = number
        for v in tiles.inputs:
            self.values[v.number] = self._load(v, ())
        self.kept: dict[Value, list[Array]] = {v: [] for v in tiles.schedule.kept}  # of every tile
        self.combine = {"sum": operator.add, "max": self.xp.maximum, "min": self.xp.minimum}

    def run(self, elements: int) -> None:
        length = self.shape[self.tiles.axis]
        size = max(1, elements * length // math.prod(self.shape))
        cuts = [_slice(self.tiles.axis, start, start + size) for start in range(0, length, size)]
        for small, work in zip(self.tiles.between, self.tiles.passes, strict=False):
            self._compute(small, ())
            for v, total in zip(work.partials, self._pass(work, cuts, range(len(cuts))), strict=True):
                self.values[v.number] = total
        self._compute(self.tiles.between[-1], ())
        self._store(self.tiles.schedule.stores, ())

    def _pass(self, work: _Work, cuts: list[Cut], some: range) -> list[Array]:
        """Goes over some tiles; returns what they add to, combined two by two, so that long sums stay accurate."""
        if len(some) > 1:
            half = 1 << (len(some) - 1).bit_length() - 1
            before, after = (self._pass(work, cuts, part) for part in (some[:half], some[half:]))
            return [self.combine[v.detail](a, b) for v, a, b in zip(work.partials, before, after, strict=True)]
        (number,) = some
        for v, of_tiles in self.kept.items():
            if number < len(of_tiles):  # an earlier pass has kept it
                self.values[v.number] = of_tiles[number]
        self._compute(work.steps, cuts[number])
        for v in work.keeps:
            self.kept[v].append(self.values[v.number])
        self._store(work.stores, cuts[number])
        return [self.values[v.number] for v in work.partials]

    def _compute(self, steps: list[_Step], cut: Cut) -> None:
        values = self.values
        for v, function, args, ends in steps:
            values[v.number] = self._load(v, cut) if function is None else function(*[values[a] for a in args])
            for number in ends:
                values[number] = None

    def _place(self, name: str, v: Value, cut: Cut) -> Array:
        """A tile's part of an array that a value is read from, or written to."""
        array = self.arrays[name]
        return array[cut] if self.tiles.axis in v.axes and cut else array

    def _load(self, v: Value, cut: Cut) -> Array:
        xp, axis = self.xp, self.tiles.axis
        if v.op == "index":
            (places,) = xp.index(self.arrays[PARAM][cut], [v.detail])
            return places + cut[axis].start if cut and v.detail == axis else places
        stored = self._place(v.detail, v, cut)
        if bits := self.tiles.bits.get(v.detail):
            return xp.from_blocks(xp.unpack(stored, bits), (len(stored), *self.shape[1:]))
        if v.is_word:
            return xp.whole(stored)
        return stored if stored.dtype == self.dtype else xp.astype(stored, self.dtype)

    def _store(self, stores: list[Store], cut: Cut) -> None:
        xp, values = self.xp, self.values
        for _, v in stores:
            if v.op == "input":  # a view of what another store may write
                values[v.number] = xp.maximum(values[v.number], values[v.number])
        for name, v in stores:
            place, value = self._place(name, v, cut), values[v.number]
            place[...] = xp.pack(xp.to_blocks(value), bits) if (bits := self.tiles.bits.get(name)) else value
        for _, v in stores:
            values[v.number] = None


def _slice(axis: int, start: int, stop: int) -> Cut:
    return (*(slice(None),) * axis, slice(start, stop))


def _is_buffer(v: Value) -> bool:
    """Whether it is an array of a tile's size, no view of the leaf, and of the dtype that is computed in."""
    numbers = v.args[1:] if v.op == "where" else v.args  # what a library makes of Python's has its default dtype
    return v.span == Span.FULL and v.op not in ("input", "index", *VIEWS) and any(a.span > Span.HOST for a in numbers)
