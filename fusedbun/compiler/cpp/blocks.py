"""The C++ of a sweep along rows whose codes share an exponent: 32 columns at a time, in stages.

What is reduced within a block of codes is known at the end of a stage, for all of the block's registers; the next one
uses it. Each stage goes over all rows, for one row's chain of operations is long and leaves the processor waiting.

Of the block's elements x7 is a register, or x7[k][r] where a later stage needs it: register r of row k. A number that
the block has once, in every lane, is b7 or b7[k].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from fusedbun.compiler.cpp.passes import INLINED, LOOP
from fusedbun.compiler.cpp.text import REDUCE, Arrays
from fusedbun.compiler.cpp.ways import Rows
from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.printer import has_blocks, name_of
from fusedbun.compiler.schedule import Pass, Schedule

PLACE = "const auto lanes = lanes_of(r); const Index j = b * BLOCK + r * LANES<T>; (void)lanes; (void)j;"


class CodedRows(Rows):
    """Blocks of rows, some of whose sweeps read or make codes."""

    def __init__(self, schedule: Schedule, arrays: Arrays) -> None:
        super().__init__(schedule, arrays)
        self._held: set[Value] = set()  # what a later stage needs

    def go_over(self, asks: list[str]) -> None:
        sweep = self.sweep
        if not has_blocks(sweep):
            super().go_over(asks)
            return
        by_stage, crossing = _stages(sweep.full), self.crossing([sweep])
        stage_of = {v: stage for stage, values in by_stage.items() for v in values}
        self._held = {a for v in sweep.full for a in v.args if stage_of.get(a, stage_of[v]) < stage_of[v]}
        self._held |= {v for _, v in self.stores()}
        with self.braces(f"blocks<T>(n, [&](auto lanes_of, Index b) {INLINED} {{", "});"):
            self.line("constexpr int R = BLOCK / LANES<T>;")
            self._load(self.small_vectors(Pass([sweep])), crossing)
            for v in sorted(self._held, key=lambda v: v.number):
                self.line(f"{self.type(v)} {name_of(v)}[K]{'[R]' if v.span == Span.FULL else ''};")
            for stage in sorted(by_stage):
                with self._rows():
                    self._stage(by_stage[stage], crossing, asks if stage == 0 else [])
            with self._rows():
                for number, v in self.stores():
                    self._put(number, v)
            if crossing:
                with self._registers():
                    self.line(*(f"lanes.store(a{v.number}_ + j, a{v.number}[r]);" for v in crossing))
        self._held = set()

    def _load(self, vectors: list[Value], crossing: list[Value]) -> None:
        """What there is of the block's columns, for all rows."""
        self.line(*(f"{self.type(v)} {name_of(v)}[R];" for v in vectors))
        self.line(*(f"Vector<T> a{v.number}[R];" for v in crossing))
        if vectors or crossing:
            with self._registers():
                self.line(*(f"{name_of(v)}[r] = {self.loaded(v)};" for v in vectors))
                self.line(*(f"a{v.number}[r] = lanes.template load<T>(a{v.number}_ + j);" for v in crossing))
        self.names |= {v: f"{name_of(v)}[r]" for v in vectors}

    @contextmanager
    def _rows(self) -> Iterator[None]:
        with self.braces("for (int k = 0; k < K; k++) {"):
            yield

    @contextmanager
    def _registers(self) -> Iterator[None]:
        with self.braces(LOOP.format("R", "r"), "});"):
            self.line(PLACE)
            yield

    def _stage(self, values: list[Value], crossing: list[Value], asks: list[str]) -> None:
        full = [v for v in values if v.span == Span.FULL]
        for v in values:
            if v.span == Span.BLOCK:
                self._assign(v)
        if full:
            with self._registers():
                self.line(*asks)
                for v in full:
                    self._assign(v)
                    self.save(v)
                for v in (v for v in self.sweep.reductions if v.args[0] in full):
                    into = f"a{v.number}[r]" if v in crossing else f"q{v.number}[k]"
                    x = self.read(v.args[0])
                    self.line(f"{into} = lanes.only({REDUCE[v.detail]}::of({into}, {x}), {into});")

    def _assign(self, v: Value) -> None:
        if v in self._held:
            self.line(f"{self.read(v)} = {self.text(v)};")
        else:
            self.read(v)

    def _put(self, number: int, v: Value) -> None:
        kind, bits = self.arrays.type(self.arrays.names[number]), self.arrays.bits(self.arrays.names[number])
        if v.span == Span.BLOCK:
            self.line(f"p{number}[k][b] = {kind}({self.read(v)}[0]);")
        elif bits:
            self.line(f"to_packed<T, {bits}>(p{number}[k], b, {name_of(v)}[k], lanes_of);")
        else:
            with self._registers():
                self.line(f"lanes.store(p{number}{self.spots[Span.FULL]}, {self.read(v)});")

    def read(self, v: Value) -> str:
        if v in self._held:
            return f"{name_of(v)}[k][r]" if v.span == Span.FULL else f"{name_of(v)}[k]"
        return super().read(v)

    def loaded(self, v: Value) -> str:
        number = self.arrays.number(v.detail) if v.op == "input" and v.span >= Span.BLOCK else None
        if v.span == Span.BLOCK:
            return f"wide<Words<T>>(Word(p{number}[k][b]))"
        if number is not None and (bits := self.arrays.bits(v.detail)):
            return f"from_packed<T, {bits}>(p{number}[k], b, r)"
        return super().loaded(v)

    def computed(self, v: Value) -> str:
        return f"largest<T>({name_of(v.args[0])}[k], lanes_of)" if v.op == "block_max" else super().computed(v)


def _stages(values: list[Value]) -> dict[int, list[Value]]:
    """The values by the number of reductions within a block after which each is ready."""
    found: dict[Value, int] = {}
    stages: dict[int, list[Value]] = defaultdict(list)
    for v in values:
        found[v] = max((found.get(a, 0) for a in v.args), default=0) + (v.op == "block_max")
        stages[found[v]].append(v)
    return stages
