"""The C++ of a sweep along a row whose codes share an exponent: 32 columns at a time, in stages.

What is reduced within a block of codes is known at the end of a stage, for all of the block's registers; the next one
uses it. Of the block's elements x7[r] is register r, and x7 alone is the block's one number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fusedbun.compiler.cpp_passes import INLINED, Way
from fusedbun.compiler.cpp_text import LANES, ONE, PAIR, REDUCE, expression, indented, kind_of
from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.schedule import Pass, Sweep

if TYPE_CHECKING:
    from fusedbun.compiler.cpp_ways import Rows

PLACE = "const auto lanes = lanes_of(r); const Index j = b * BLOCK + r * LANES<T>; (void)lanes; (void)j;"


def by_blocks(way: Rows, work: Pass, sweep: Sweep, asked: list[str]) -> Iterator[str]:
    """The loop of such a sweep.

    Args:
        way: blocks of rows.
        work: the pass.
        sweep: the sweep.
        asked: the lines that ask memory for what is needed soon.
    """
    return iter(_Sweep(way, work, sweep, asked).lines())


def registers(lines: Iterable[str]) -> list[str]:
    """Lines for every register r of a block."""
    return [f"each<R>([&](auto r) {INLINED} {{", *indented([PLACE, *lines]), "});"]


class _Sweep:
    def __init__(self, way: Way, work: Pass, sweep: Sweep, asked: list[str]) -> None:
        self.way, self.work, self.sweep, self.asked = way, work, sweep, asked
        self.stages = _stages(sweep.full)
        self.crossing = way.crossing(sweep)
        last = max(self.stages.values())
        self.by_stage: dict[int, list[Value]] = defaultdict(list)
        for v, stage in self.stages.items():
            self.by_stage[stage].append(v)
        self.order = range(last + 1)
        stored = {v for _, v in sweep.stores}
        later = {a for v in sweep.full for a in v.args if self.stages.get(a, 0) < self.stages[v]}
        self.held = {v for v in sweep.full if v.span == Span.FULL and (v in stored or v in later)}

    def lines(self) -> list[str]:
        way = self.way
        vectors = way.small_vectors(Pass([self.sweep]))
        body = ["constexpr int R = BLOCK / LANES<T>;"]
        body += [f"{kind_of(v, LANES)} v{v.number}[R];" for v in vectors]
        body += [f"Vector<T> a{v.number}[R];" for v in self.crossing]
        loads = [f"v{v.number}[r] = {way.small(v)};" for v in vectors]
        loads += [f"a{v.number}[r] = lanes.template load<T>({way.chunk(v)});" for v in self.crossing]
        if loads:
            body += registers(loads)
        body += ["for (int k = 0; k < K; k++) {", *indented(self._row()), "}"]
        if self.crossing:
            body += registers(f"lanes.store({way.chunk(v)}, a{v.number}[r]);" for v in self.crossing)
        return [f"blocks<T>(n, [&](auto lanes_of, Index b) {INLINED} {{", *indented(body), "});"]

    def _row(self) -> Iterator[str]:
        yield from (f"{kind_of(v, LANES)} x{v.number}[R];" for v in self.sweep.full if v in self.held)
        for stage in self.order:
            for v in self.by_stage[stage]:
                if v.span == Span.BLOCK:
                    yield f"const auto x{v.number} = {self._of_block(v)};"
            if lines := [*self._elements(stage)]:
                yield from registers(lines)
        for name, v in self.sweep.stores:
            yield from self._store(name, v)

    def _of_block(self, v: Value) -> str:
        if v.op == "input":
            return f"Word(p{self.way.arrays.number(v.detail)}[k][b])"
        if v.op == "block_max":
            return f"largest<T>(x{v.args[0].number}, lanes_of)"
        return expression(v, self.way.operand, ONE)

    def _elements(self, stage: int) -> Iterator[str]:
        way, work, sweep = self.way, self.work, self.sweep
        if stage == 0:
            yield from self.asked
        for v in self.by_stage[stage]:
            if v.span == Span.FULL:
                yield f"{'' if v in self.held else 'const auto '}{self._name(v)} = {self._element(v)};"
                if v in sweep.saved:
                    yield way.save(v, work, self._name(v))
        for v in sweep.reductions:
            if self.stages[v.args[0]] == stage:
                function, x = REDUCE[v.detail], self._name(v.args[0])
                into = f"a{v.number}[r]" if v in self.crossing else f"q{v.number}[k]"
                yield f"{into} = lanes.only({function}::of({into}, {x}), {into});"

    def _element(self, v: Value) -> str:
        number = self.way.arrays.number(v.detail) if v.op == "input" else None
        if number is not None and self.way.arrays.type(v.detail) == PAIR:
            return f"from_pairs<T>(p{number}[k] + b * (BLOCK / 2), r)"
        return self.way.computed(v, self.work, self.sweep, self._name)

    def _name(self, v: Value) -> str:
        is_register = v in self.held or (v.span == Span.COLUMN)
        return f"{self.way.operand(v)}{'[r]' if is_register else ''}"

    def _store(self, name: str, v: Value) -> Iterator[str]:
        number = self.way.arrays.number(name)
        if v.span == Span.BLOCK:
            yield f"p{number}[k][b] = {self.way.arrays.type(name)}(x{v.number});"
        elif self.way.arrays.type(name) == PAIR:
            yield f"to_pairs<T>(p{number}[k] + b * (BLOCK / 2), x{v.number}, lanes_of);"
        else:
            yield from registers([f"lanes.store({self.way.element(number)}, x{v.number}[r]);"])


def _stages(values: list[Value]) -> dict[Value, int]:
    """After how many reductions within a block each value is ready."""
    found: dict[Value, int] = {}
    for v in values:
        found[v] = max((found.get(a, 0) for a in v.args), default=0) + (v.op == "block_max")
    return found
