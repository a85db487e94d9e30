"""A step on a shard of a parameter: a program cut into phases, with all that has to cross the network between them.

A shard is a part of the parameter, cut along some of its axes. A reduction over such an axis *crosses*: every shard
computes its part, and the parts are combined over the network. The program is cut there. A phase reads the shard's
arrays and what crossed before it, and leaves parts to be combined for the next; each is a program of its own, so that
whatever runs programs runs phases.

Only the last phase with work of full size writes to arrays of full size, for what came before it reads them as they
were. What is left after that is made of vectors. So a chain of n passes takes n phases of full size, an elementwise one
a single one. In a phase, a shard differs from a whole parameter in two ways: its elements' places begin at its first
element's, and what is counted is the whole parameter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce

from fusedbun.compiler.graph import REDUCTIONS, Graph, Value
from fusedbun.compiler.schedule import WIDE
from fusedbun.compiler.trace import FIRST, SIZE, Program, used
from fusedbun.storage import codes
from fusedbun.storage.codes import Stored

START = {"sum": 0.0, "max": float("-inf"), "min": float("inf")}  # the part of a shard without elements


@dataclass(frozen=True)
class Crossing:
    """A reduction that crosses the network."""

    function: str  # "sum", "max" or "min", which combines the shards' parts
    over: frozenset[int]  # the axes among those that the parameter is cut along whose shards are combined
    stored: Stored  # the array that holds a shard's part, and then the result


@dataclass(frozen=True)
class Phase:
    """What is computed before the network is waited for, or at the end."""

    program: Program  # parts that cross are among its outputs, and afterwards among later phases' inputs
    crossings: Mapping[str, Crossing]  # what is combined when it has been computed, by the array's name


def phases(program: Program, cut: frozenset[int]) -> list[Phase]:
    """The phases of a step on a shard, made of the step on the whole parameter, which is cut along these axes."""
    return _Cutter(program, cut).run() if cut else [Phase(program, {})]


class _Cutter:
    def __init__(self, program: Program, cut: frozenset[int]) -> None:
        self.program, self.cut = program, cut
        self.values = used(program.outputs.values())
        self.over = self._crossing()
        self.time: dict[Value, int] = {}  # the phase in which a value is known
        self.is_local: dict[Value, bool] = {}  # made of arrays of full size, with nothing in between that crosses
        for v in self.values:
            self.time[v] = max((self.time[a] for a in v.args), default=0) + (v in self.over)
            self.is_local[v] = v not in self.over and (v.span in WIDE or any(self.is_local[a] for a in v.args))
        ends = [a for v in self.over for a in v.args] + list(program.outputs.values())
        self.full = max((self.time[v] for v in ends if self.is_local[v]), default=0)  # the last phase of full size
        self.last = max(self.time.values(), default=0)

    def run(self) -> list[Phase]:
        outputs = self.program.outputs
        # what the phases after the last one of full size are made for
        crossing = [v for v in sorted(self.over, key=self.time.__getitem__) if self.time[v] > self.full + 1]
        late = {name for name, v in outputs.items() if self.time[v] > self.full}  # what the last phase writes
        while True:
            goals = [*(a for v in crossing for a in v.args), *(v for name, v in outputs.items() if name in late)]
            needed = used(goals, lambda v: v not in self.over, is_end=self.is_local.__getitem__)
            carried = [v for v in needed if self.is_local[v]]
            read = {v.detail for v in needed if v.op == "input" and v.span and not self.is_local[v]}
            if late >= read & outputs.keys():
                break
            late |= read & outputs.keys()  # what these phases read is not written before them
        return [self._phase(t, late, carried) for t in range(self.last + 1)]

    def _crossing(self) -> dict[Value, frozenset[int]]:
        """The reductions that cross, and over which axes.

        One that is only reduced further, by the same function, waits for that: so fewer numbers cross.
        """
        users = [(a, v) for v in self.values for a in v.args]
        used_as_is = {a for a, v in users if v.op not in REDUCTIONS or v.detail != a.detail}
        used_as_is |= {*self.program.outputs.values()}
        over: dict[Value, frozenset[int]] = {}
        waiting: dict[Value, frozenset[int]] = {}
        for v in self.values:
            if v.op in REDUCTIONS:
                (x,) = v.args
                axes = ((x.axes - v.axes) & self.cut) | waiting.get(x, frozenset())
                if axes:
                    (over if v in used_as_is else waiting)[v] = axes
        return over

    def _phase(self, t: int, late: set[str], carried: list[Value]) -> Phase:
        """One phase: the last writes the `late` outputs, the last one of full size hands the `carried` values on."""
        made = _PhaseBuilder(self, t)
        for v in self.over:
            if self.time[v] == t + 1:
                made.hand_on(v)
        for name, v in self.program.outputs.items():
            if t == (self.last if name in late else self.full):
                made.outputs[name] = made.value(v)
        if t == self.full:
            for v in carried:
                made.hand_on(v)
        arrays = {**self.program.arrays, **made.arrays}
        return Phase(Program(made.graph, self.program.dtype, arrays, made.outputs), made.crossings)


class _PhaseBuilder:
    """Copies what a phase computes of the program into a graph of its own."""

    def __init__(self, cutter: _Cutter, t: int) -> None:
        self.cutter, self.t = cutter, t
        self.graph = Graph(cutter.program.graph.ndim, cutter.program.graph.order)
        self.outputs: dict[str, Value] = {}
        self.arrays: dict[str, Stored] = {}
        self.crossings: dict[str, Crossing] = {}
        self._copies: dict[Value, Value] = {}

    def hand_on(self, v: Value) -> None:
        """Has the phase put out a value for later ones; of a reduction that crosses, the shard's part."""
        name = self._array(v)
        if v in self.cutter.over:
            self.outputs[name] = self._copy(v)
            self.crossings[name] = Crossing(v.detail, self.cutter.over[v], self.arrays[name])
        else:
            self.outputs[name] = self.value(v)

    def value(self, v: Value) -> Value:
        """The value in this phase's graph."""
        if v not in self._copies:
            self._copies[v] = self._build(v)
        return self._copies[v]

    def _build(self, v: Value) -> Value:
        is_carried = self.t > self.cutter.full and self.cutter.is_local[v]
        if is_carried or v in self.cutter.over:
            return self.graph.input(self._array(v), v.axes, v.is_word)
        if v.op == "count":
            sizes = (self.graph.hyperparameter(SIZE.format(axis)) for axis in v.detail)
            return reduce(partial(self.graph.apply, "mul"), sizes)
        if v.op == "index":
            place = self._copy(v)
            first = self.graph.hyperparameter(FIRST.format(v.detail), is_word=True)
            return self.graph.apply("add", place, first) if v.detail in self.cutter.cut else place
        return self._copy(v)

    def _copy(self, v: Value) -> Value:
        return self.graph.adopt(v, tuple(self.value(a) for a in v.args))

    def _array(self, v: Value) -> str:
        """The name of the array in which a value is handed on from phase to phase."""
        name = f"{'crossed' if v in self.cutter.over else 'carried'}.{v.number}"
        dtype = "int32" if v.is_word else codes.computed_in(self.cutter.program.dtype)
        self.arrays[name] = Stored(dtype, tuple(sorted(v.axes)))
        return name
