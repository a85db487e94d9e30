"""The words of generated C++: names, types and expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.schedule import Schedule
from fusedbun.compiler.trace import GRAD, Program
from fusedbun.operations import OPERATIONS
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
PAIR = "Pair"  # two codes of 4 bits
REDUCE = {"sum": "Sum", "max": "Max", "min": "Min"}


class Arrays:
    """A leaf's arrays as the code numbers and types them: the parameter, the gradient, and the state in its order."""

    def __init__(self, program: Program) -> None:
        self.names = [PARAM, GRAD, *program.arrays]
        self._dtype = program.dtype
        self._types = {PARAM: "P", GRAD: "P"}
        self._in_parts = {key for key, x in program.arrays.items() if x.is_by_blocks}
        for key, x in program.arrays.items():
            self._types[key] = PAIR if x.bits else STORED[x.dtype]

    def type(self, name: str) -> str:
        return self._types[name]

    def has_every_element(self, name: str) -> bool:
        return name not in self._in_parts

    def is_bfloat16(self, name: str) -> bool:
        return "bfloat16" in (self._types[name], self._dtype if self._types[name] == "P" else None)

    def number(self, name: str) -> int:
        return self.names.index(name)

    def pointer(self, name: str) -> str:
        return f"(({self._types[name]}*)w.arrays[{self.number(name)}])"


class Places:
    """Where a schedule's small values, and the reductions of a chunk, lie in memory."""

    def __init__(self, schedule: Schedule) -> None:
        self.program = schedule.program
        self.row = "rows" if schedule.blocks == "columns" else "columns"  # what a vector has a number for
        self.small = _numbered(schedule.small)
        self.partial = _numbered(schedule.partials)
        self.kept = {v: n for n, v in enumerate(schedule.kept)}
        self.buffered = max((len(p.buffer) for p in schedule.passes), default=0)

    def of_small(self, v: Value) -> str:
        return self._place("w.small", self.small, v)

    def of_partial(self, v: Value) -> str:
        return self._place("w.partial", self.partial, v)

    def counts(self, placed: dict[Value, int]) -> tuple[int, int]:
        """How many of them are vectors, and how many are single numbers."""
        vectors = sum(is_vector(v) for v in placed)
        return vectors, len(placed) - vectors

    def _place(self, memory: str, placed: dict[Value, int], v: Value) -> str:
        vectors, _ = self.counts(placed)
        if is_vector(v):
            text = f"vector<T>({memory}, w.leaf->{self.row}, {placed[v]})"
        else:
            text = f"single<T>({memory}, w.leaf->{self.row}, {vectors}, {placed[v]})"
        return f"((Word*){text})" if v.is_word else text


def is_vector(v: Value) -> bool:
    """Whether a small value is more than one number."""
    return bool(v.axes)


def _numbered(values: Iterable[Value]) -> dict[Value, int]:
    """A number for each, counted among the vectors and among the single numbers apart."""
    counts = {True: 0, False: 0}
    placed = {}
    for v in values:
        placed[v] = counts[is_vector(v)]
        counts[is_vector(v)] += 1
    return placed


ONE, LANES = ("T", "Word"), ("Vector<T>", "Words<T>")  # the types of one number and one word, and of a register of them
Kind = tuple[str, str]


def kind_of(v: Value, kind: Kind) -> str:
    """The type of a value, computed one by one or a register at a time."""
    number, word = kind
    if v.is_condition:
        of = word if v.args[0].is_word else number
        return f"decltype({of}{{}} == {of}{{}})"
    return word if v.is_word else number


def expression(v: Value, name: Callable[[Value], str], kind: Kind) -> str:
    """The C++ for one operation, computed in `ONE` or `LANES` of operands that `name` writes."""
    args = [name(a) for a in v.args]
    if _is_masked_shift(v):
        return args[0]  # words have no sign here, so nothing is left to mask
    return OPERATIONS[v.op].cpp.format(*args, V=kind_of(v, kind))


def _is_masked_shift(v: Value) -> bool:
    """Whether it is `(x >> n) & mask`, of all bits that the shift may leave."""
    if v.op != "and" or v.args[0].op != "rshift":
        return False
    n, mask = v.args[0].args[1], v.args[1]
    return n.op == mask.op == "const" and mask.detail == (1 << (32 - n.detail)) - 1


def literal(v: Value) -> str:
    """A constant as C++ writes it, in the type that is computed with."""
    if v.is_word:
        return f"Word({v.detail & 0xFFFFFFFF:#x})"
    number = v.detail
    if number != number:
        return "T(NAN)"
    if number in (float("inf"), float("-inf")):
        return f"T({'-' if number < 0 else ''}INFINITY)"
    return f"T({number!r})"


def singles(program: Program, values: Iterable[Value], arrays: Arrays, places: Places) -> dict[Value, str]:
    """Declarations of the single numbers that these values are computed with."""
    found: dict[Value, str] = {}
    order = program.graph.order
    for v in sorted({a for v in values for a in v.args}, key=lambda v: v.number):
        if v.op == "const" or v.span not in (Span.HOST, Span.SCALAR):
            continue
        if v.span == Span.HOST:
            text = given(program, v)
        elif v.op == "count":
            text = "T(" + " * ".join(f"w.leaf->sizes[{order.index(axis)}]" for axis in v.detail) + ")"
        elif v.op == "input":
            text = loaded(v, arrays.pointer(v.detail))
        else:
            text = f"*{places.of_small(v)}"
        found[v] = f"const {'Word' if v.is_word else 'T'} s{v.number} = {text};"
    return found


def given(program: Program, v: Value) -> str:
    """A number that Python gives with every step."""
    place = f"w.leaf->scalars[{program.scalars.index(v)}]"
    return f"Word(int64_t({place}))" if v.is_word else f"T({place})"


def loaded(v: Value, pointer: str) -> str:
    """One number or word, read from memory."""
    return f"Word(*({pointer}))" if v.is_word else f"number<T>({pointer})"


def scalar_name(v: Value) -> str:
    """How a single number is written in an expression."""
    if v.op == "const":
        return literal(v)
    return f"(s{v.number} != T(0))" if v.is_condition else f"s{v.number}"


def indented(lines: Iterable[str], by: int = 1) -> list[str]:
    """Lines moved to the right."""
    return ["  " * by + line if line else line for line in lines]
