"""The C++ of a sweep along rows whose codes share an exponent: 32 columns at a time, in stages.

What is reduced within a block of codes is known at the end of a stage, for all of the block's registers; the next one
uses it. Each stage goes over all rows, for one row's chain of operations is long and leaves the processor waiting.

Of the block's elements x7 is a register, or x7[k][r] where a later stage needs it: register r of row k. A number that
the block has once, in every lane, is x7 or x7[k].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from fusedbun.compiler.cpp.passes import INLINED, Way
from fusedbun.compiler.cpp.text import LANES, PAIR, REDUCE, expression, indented, kind_of
from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.schedule import Pass, Sweep

PLACE = "const auto lanes = lanes_of(r); const Index j = b * BLOCK + r * LANES<T>; (void)lanes; (void)j;"


def by_blocks(way: Way, work: Pass, sweep: Sweep, asked: list[str]) -> Iterator[str]:
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
        self.stores = way.stores(sweep)
        later = {a for v in sweep.full for a in v.args if self.stages.get(a, 0) < self.stages[v]}
        self.held = {v for v in sweep.full if v in later or v in {stored for _, stored in self.stores}}

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
        for v in sorted(self.held, key=lambda v: v.number):
            body.append(f"{kind_of(v, LANES)} x{v.number}[K]{'[R]' if v.span == Span.FULL else ''};")
        for lines in (*map(self._stage, self.order), self._stores()):
            body += ["for (int k = 0; k < K; k++) {", *indented(lines), "}"]
        if self.crossing:
            body += registers(f"lanes.store({way.chunk(v)}, a{v.number}[r]);" for v in self.crossing)
        return [f"blocks<T>(n, [&](auto lanes_of, Index b) {INLINED} {{", *indented(body), "});"]

    def _stage(self, stage: int) -> Iterator[str]:
        for v in self.by_stage[stage]:
            if v.span == Span.BLOCK:
                yield f"{'' if v in self.held else 'const auto '}{self._name(v)} = {self._of_block(v)};"
        if lines := [*self._elements(stage)]:
            yield from registers(lines)

    def _stores(self) -> Iterator[str]:
        for name, v in self.stores:
            yield from self._store(name, v)

    def _of_block(self, v: Value) -> str:
        if v.op == "input":
            return f"wide<Words<T>>(Word(p{self.way.arrays.number(v.detail)}[k][b]))"
        if v.op == "block_max":
            return f"largest<T>(x{v.args[0].number}[k], lanes_of)"
        return expression(v, self._name, LANES)

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
        name = self.way.operand(v) + ("[k]" if v in self.held else "")
        return f"{name}[r]" if v.span == Span.COLUMN or (v in self.held and v.span == Span.FULL) else name

    def _store(self, name: str, v: Value) -> Iterator[str]:
        number = self.way.arrays.number(name)
        if v.span == Span.BLOCK:
            yield f"p{number}[k][b] = {self.way.arrays.type(name)}(x{v.number}[k][0]);"
        elif self.way.arrays.type(name) == PAIR:
            yield f"to_pairs<T>(p{number}[k] + b * (BLOCK / 2), x{v.number}[k], lanes_of);"
        else:
            yield from registers([f"lanes.store({self.way.element(number)}, x{v.number}[k][r]);"])


def _stages(values: list[Value]) -> dict[Value, int]:
    """After how many reductions within a block each value is ready."""
    found: dict[Value, int] = {}
    for v in values:
        found[v] = max((found.get(a, 0) for a in v.args), default=0) + (v.op == "block_max")
    return found
