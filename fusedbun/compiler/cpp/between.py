"""The C++ that computes a schedule's small values: one number for each column, or one in all."""

from __future__ import annotations

from collections.abc import Iterator

from fusedbun.compiler.cpp.text import (
    ONE,
    REDUCE,
    Arrays,
    Places,
    expression,
    given,
    indented,
    is_vector,
    literal,
    loaded,
)
from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.schedule import Schedule


class Between:
    """The functions of a schedule that run before each pass and, the last of them, at the end."""

    def __init__(self, schedule: Schedule, arrays: Arrays) -> None:
        self.schedule, self.arrays, self.places = schedule, arrays, Places(schedule)
        self.order = schedule.program.graph.order

    def function(self, t: int) -> list[str]:
        lines = [line for v in self.schedule.between[t] for line in self._place(v)]
        if t == len(self.schedule.passes):
            moved = [(name, v) for name, v in self.schedule.stores if v.op == "input"]
            lines += [*self._moves(moved)]
            lines += [self._store(name, v) for name, v in self.schedule.stores if v.op != "input"]
        return [f"void between{t}(const Work& w) {{", *indented(lines or ["(void)w;"]), "}"]

    def _place(self, v: Value) -> Iterator[str]:
        yield f"{{  // %{v.number}"
        target = "out" if v.axes else "*out"
        kind = "Word" if v.is_word else "T"
        yield f"  {kind}* const out = {self.places.of_small(v)};"
        if v in self.places.partial:
            count = f"w.leaf->{self.places.row}" if is_vector(v) else "1"
            partial = self.places.of_partial(v)
            yield f"  combine<{REDUCE[v.detail]}>(out, {partial}, {count}, w.chunks, w.partial_bytes);"
        elif v.op in ("within", "down"):
            yield from indented(self._reduction(v))
        else:
            inline = self._inline(v.args)
            yield from indented(self._declarations([*inline, v], [x for x in inline if not x.axes]))
            inner = [f"const auto {self._name(x)} = {self._text(x)};" for x in inline if x.axes]
            text = self._name(v.args[0]) if v.op == "expand" else self._text(v)
            at = self._index(v.axes)
            yield from indented(
                self._nest(v.axes, [*inner, f"{target}{f'[{at}]' if v.axes else ''} = {kind}({text});"])
            )
        yield "}"

    def _reduction(self, v: Value) -> Iterator[str]:
        (x,) = v.args
        function = REDUCE[v.detail]
        inline = self._inline([x])
        yield from self._declarations([*inline, v], [i for i in inline if not i.axes])
        inner = [f"const auto {self._name(i)} = {self._text(i)};" for i in inline if i.axes]
        if v.axes:
            yield from self._nest(v.axes, [f"out[{self._index(v.axes)}] = {function}::start<T>;"])
            slot = f"T& into = out[{self._index(v.axes)}];"
            yield from self._nest(x.axes, [*inner, slot, f"into = {function}::of(into, T({self._name(x)}));"])
        else:  # one number is added up in double precision
            yield f"double total = {function}::start<double>;"
            yield from self._nest(x.axes, [*inner, f"total = {function}::of(total, double({self._name(x)}));"])
            yield "*out = T(total);"

    def _moves(self, moved: list[tuple[str, Value]]) -> Iterator[str]:
        """Slots become what other slots were: of each element all are read before any is written."""
        for axes in dict.fromkeys(v.axes for _, v in moved):
            group = [(name, v) for name, v in moved if v.axes == axes]
            sources = dict.fromkeys(v for _, v in group)
            reads = [f"const T m{v.number} = number<T>({self.arrays.pointer(v.detail)} + j);" for v in sources]
            writes = [f"put({self.arrays.pointer(name)} + j, m{v.number});" for name, v in group]
            yield f"for (Index j = 0; j < {self._count(axes)}; j++) {{"
            yield from indented([*reads, *writes])
            yield "}"

    def _store(self, name: str, v: Value) -> str:
        return f"copy({self.arrays.pointer(name)}, {self.places.of_small(v)}, {self._count(v.axes)});"

    def _count(self, axes: frozenset[int]) -> str:
        return " * ".join(map(self._size, sorted(axes))) or "1"

    def _inline(self, goals: tuple[Value, ...] | list[Value]) -> list[Value]:
        """The values without a place of their own that these are made of, themselves among them."""
        found: dict[Value, None] = {}

        def visit(v: Value) -> None:
            if v.span == Span.HOST or v.op in ("input", "count", "index") or v in self.places.small or v in found:
                return
            for a in v.args:
                visit(a)
            found[v] = None

        for v in goals:
            visit(v)
        return list(found)

    def _declarations(self, values: list[Value], singles: list[Value]) -> Iterator[str]:
        """The single numbers that these values are computed with."""
        given = {a for v in values for a in (v.args or [v]) if not a.axes and a not in singles and a.op != "const"}
        for v in sorted(given, key=lambda v: v.number):
            yield f"const {'Word' if v.is_word else 'T'} s{v.number} = {self._single(v)};"
        for v in singles:
            yield f"const auto s{v.number} = {self._text(v)};"

    def _single(self, v: Value) -> str:
        if v.span == Span.HOST:
            return given(self.schedule.program, v)
        if v.op == "count":
            return f"T({' * '.join(map(self._size, v.detail))})"
        if v.op == "input":
            return loaded(v, self.arrays.pointer(v.detail))
        return f"*{self.places.of_small(v)}"

    def _name(self, v: Value) -> str:
        """How an operand is written inside a loop over its axes."""
        if v.op == "const":
            return literal(v)
        if not v.axes:
            return f"s{v.number}"
        if v.op == "input":
            return loaded(v, f"{self.arrays.pointer(v.detail)} + {self._index(v.axes)}")
        if v.op == "index":
            return f"Word(i{v.detail})"
        if v in self.places.small:
            return f"{self.places.of_small(v)}[{self._index(v.axes)}]"
        return f"c{v.number}"

    def _text(self, v: Value) -> str:
        if v.op == "index":
            return f"Word(i{v.detail})"
        return expression(v, self._name, ONE)

    def _nest(self, axes: frozenset[int], body: list[str]) -> list[str]:
        """Loops over some of the parameter's axes around some lines."""
        loops = [
            f"for (Index i{axis} = 0; i{axis} < {self._size(axis)}; i{axis}++)"
            for axis in sorted(axes, key=self.order.index)
        ]
        if not loops:
            return body
        return [*loops, "{", *indented(body), "}"]

    def _index(self, axes: frozenset[int]) -> str:
        """The place of an element in an array that spans these axes."""
        text = "0"
        for axis in sorted(axes, key=self.order.index):
            text = f"i{axis}" if text == "0" else f"({text} * {self._size(axis)} + i{axis})"
        return text

    def _size(self, axis: int) -> str:
        return f"w.leaf->sizes[{self.order.index(axis)}]"
