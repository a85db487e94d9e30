"""The dialect of generated C++, and where the things that it computes with lie in memory."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.printer import Printer, name_of
from fusedbun.compiler.schedule import Schedule
from fusedbun.compiler.trace import GRAD
from fusedbun.operations import OPERATIONS
from fusedbun.storage.codes import Stored
from fusedbun.storage.rounding import PARAM

STORED = {  # by dtype
    "float32": "float",
    "float64": "double",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int32": "int32_t",
}
REDUCE = {"sum": "Sum", "max": "Max", "min": "Min"}
SPECIAL = {"nan": "NAN", "inf": "INFINITY", "-inf": "-INFINITY"}


class Places:
    """Where a schedule's small values, and the reductions of a chunk, lie in memory."""

    def __init__(self, schedule: Schedule) -> None:
        self.row = "rows" if schedule.tiles == "columns" else "columns"  # what a vector has a number for
        self.small = self._placed("w.small", schedule.small)
        self.partial = self._placed("w.partial", schedule.partials)
        self.kept = {v: n for n, v in enumerate(schedule.kept)}
        self.buffered = max((len(p.buffer) for p in schedule.passes), default=0)

    def counts(self, placed: Iterable[Value]) -> tuple[int, int]:
        """How many of them are vectors, and how many are single numbers."""
        is_vector = [bool(v.axes) for v in placed]
        return sum(is_vector), len(is_vector) - sum(is_vector)

    def _placed(self, memory: str, values: list[Value]) -> dict[Value, str]:
        """Pointers to them: first come the vectors, then the single numbers."""
        vectors, singles = [v for v in values if v.axes], [v for v in values if not v.axes]
        start = f"<T>({memory}, w.leaf->{self.row}"
        found = {v: f"vector{start}, {n})" for n, v in enumerate(vectors)}
        found |= {v: f"single{start}, {len(vectors)}, {n})" for n, v in enumerate(singles)}
        return {v: f"((Word*){text})" if v.is_word else text for v, text in found.items()}


class Cpp(Printer):
    """The lines of one function of C++.

    The leaf's arrays are numbered: the parameter, the gradient, and the state in its order.

    Args:
        schedule: what is done.
    """

    tab = "  "
    declaration = "const auto {} = {};"

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.program, self.places = schedule, schedule.program, Places(schedule)
        super().__init__(self.places.small)
        given = Stored(self.program.dtype, tuple(self.program.graph.every))
        self.arrays = {PARAM: given, GRAD: given, **self.program.arrays}
        self.numbers = {name: number for number, name in enumerate(self.arrays)}

    def is_register(self, v: Value) -> bool:
        """Whether it is computed a register at a time."""
        return False

    def type(self, v: Value) -> str:
        number, word = ("Vector<T>", "Words<T>") if self.is_register(v) else ("T", "Word")
        if v.is_condition:
            of = word if v.args[0].is_word else number
            return f"decltype({of}{{}} == {of}{{}})"
        return word if v.is_word else number

    def literal(self, v: Value) -> str:
        if v.is_word:
            return f"Word({v.detail & 0xFFFFFFFF:#x})"
        return f"T({SPECIAL.get(repr(v.detail), repr(v.detail))})"

    def expression(self, v: Value, args: list[str]) -> str:
        if _is_masked_shift(v):
            return args[0]  # words have no sign here, so nothing is left to mask
        return OPERATIONS[v.op].cpp.format(*args, V=self.type(v))

    def declare(self, v: Value, text: str) -> None:
        if not v.axes and self.is_loaded(v) and not v.is_condition:
            self.names[v] = name_of(v)
            self.line(f"const {self.type(v)} {name_of(v)} = {text};")
        else:
            super().declare(v, text)

    def hoisted(self, values: list[Value]) -> list[Value]:
        return sorted(values, key=lambda v: v.number if self.is_loaded(v) else inf)

    def loaded(self, v: Value) -> str:
        if v.op == "count":
            return f"T({' * '.join(map(self.size, v.detail))})"
        if v.span == Span.HOST:
            place = f"w.leaf->scalars[{self.program.scalars.index(v)}]"
            return f"Word(int64_t({place}))" if v.is_word else f"T({place})"
        if v.op == "input":
            return self.load(v, self.pointer(v))
        return f"*{self.pointer(v)}{' != T(0)' if v.is_condition else ''}"

    def load(self, v: Value, pointer: str) -> str:
        """One number or word, or a register of them, read from memory."""
        if self.is_register(v):
            text = f"lanes.template {'words' if v.is_word else 'load'}<T>({pointer})"
        else:
            text = f"Word(*({pointer}))" if v.is_word else f"number<T>({pointer})"
        return f"{text} != T(0)" if v.is_condition else text

    def pointer(self, v: Value) -> str:
        """Where a small value begins."""
        return self.array(v.detail) if v.op == "input" else self.placed[v]

    def array(self, name: str) -> str:
        return f"(({self.stored(name)}*)w.arrays[{self.numbers[name]}])"

    def stored(self, name: str) -> str:
        """The type of an array's elements."""
        return "P" if name in (PARAM, GRAD) else STORED[self.arrays[name].dtype]

    def size(self, axis: int) -> str:
        return f"w.leaf->sizes[{self.program.graph.order.index(axis)}]"


def _is_masked_shift(v: Value) -> bool:
    """Whether it is `(x >> n) & mask`, of all bits that the shift may leave."""
    if v.op != "and" or v.args[0].op != "rshift":
        return False
    n, mask = v.args[0].args[1], v.args[1]
    return n.op == mask.op == "const" and mask.detail == (1 << (32 - n.detail)) - 1
