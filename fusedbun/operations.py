"""The table of operations on elements: one row says what Python, the libraries of arrays, C++ and Triton make of each.

Whatever deals with operations reads it: the namespaces that rules are written over, the graph and its symbols, the
printers of kernels, and tests, which compare all of them on every row. A row is all that a new function needs if NumPy,
torch and JAX have it under one name. A library that has not defines it in its namespace; what does not fit into an
expression is a helper in `cpp/runtime/vectors.h` or in `HELPERS` of `triton/text.py`, which the row names.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Kind = Literal["number", "condition", "word"]


class Functions(Protocol):
    """The functions of the table, which every namespace has by their names: `xp.sqrt(x)`, `xp.where(x > 0, x, 0.0)`.

    Those of two or three operands also take Python numbers, but not for all of them.
    """

    def __getattr__(self, name: str, /) -> Any: ...


@dataclass(frozen=True)
class Operation:
    """An operation on elements.

    Args:
        name: its name in the graph and, of a function, in a namespace.
        operands: how many it has.
        host: computes it on numbers that are made of hyper-parameters.
        cpp: how C++ writes it, with operands {0}, {1} and {2}; {V} is the type of the result, of one or of a register.
        triton: how Triton writes it; T is the type that is computed in.
        takes: the kind of its operands (of the last two of `where`): "number", "word", or "any" of the two, but one.
        gives: the kind of its result; "same": that of its operands.
        sign: the infix operator that it is.
        method: the method of Python's, without underscores, that it is.
        commutes: whether the operands of the infix operator may change places.
        costly: whether it takes longer than to store its result in the cache and load it again.
    """

    name: str
    operands: int
    host: Callable[..., Any]
    cpp: str
    triton: str
    takes: Literal["number", "word", "any"] = "number"
    gives: Kind | Literal["same"] = "same"
    sign: str = ""
    method: str = ""
    commutes: bool = False
    costly: bool = False


def _infix(name: str, sign: str, *, method: str = "", triton: str = "", **more: Any) -> Operation:
    """A row of an operator between two operands; of the method that is called so, unless it is said."""
    text, method = f"{{0}} {sign} {{1}}", method or name
    host = getattr(operator, f"__{method}__")
    return Operation(name, 2, host, text, triton or text, sign=sign, method=method, **more)


def _chosen(condition: bool, a: float, b: float) -> float:
    return a if condition else b


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))


def _float(word: int) -> float:
    return float(np.int32(word).view(np.float32))


_OPERATORS = (
    _infix("add", "+", takes="any", commutes=True),
    _infix("sub", "-", takes="any"),
    _infix("mul", "*", takes="any", commutes=True),
    _infix("div", "/", method="truediv", triton="divide({0}, {1}, T)", costly=True),
    Operation("neg", 1, operator.neg, "-{0}", "-{0}", takes="any", method="neg"),
    _infix("eq", "==", takes="any", gives="condition", commutes=True),
    _infix("ne", "!=", takes="any", gives="condition", commutes=True),
    _infix("lt", "<", takes="any", gives="condition"),
    _infix("le", "<=", takes="any", gives="condition"),
    _infix("gt", ">", takes="any", gives="condition"),
    _infix("ge", ">=", takes="any", gives="condition"),
    _infix("and", "&", takes="word", commutes=True),
    _infix("or", "|", takes="word", commutes=True),
    _infix("xor", "^", takes="word", commutes=True),
    _infix("lshift", "<<", takes="word"),
    _infix("rshift", ">>", takes="word"),
)
_FUNCTIONS = (
    Operation("abs", 1, abs, "absolute({0})", "tl.abs({0})", method="abs"),
    Operation("sign", 1, lambda x: 1.0 if x > 0 else -1.0 if x < 0 else x, "sign({0})", "sign({0})"),  # NaN of NaN
    Operation("sqrt", 1, math.sqrt, "root({0})", "sqrt({0}, T)", costly=True),
    Operation("expm1", 1, math.expm1, "expm1_of({0})", "expm1({0}, T)"),
    Operation("log", 1, lambda x: math.log(x) if x else -math.inf, "log_of({0})", "log({0}, T)"),
    Operation("floor", 1, lambda x: float(np.floor(x)), "floor_of({0})", "tl.floor({0})"),
    Operation("minimum", 2, min, "minimum<{V}>({0}, {1})", "minimum({0}, {1})", takes="any"),
    Operation("maximum", 2, max, "maximum<{V}>({0}, {1})", "maximum({0}, {1})", takes="any"),
    Operation("where", 3, _chosen, "select<{V}>({0}, {1}, {2})", "tl.where({0}, {1}, {2})", takes="any"),
    # a float32's bits as a word, and back; a whole number as a word, and back
    Operation("bits", 1, _bits, "bits_of<{V}>({0})", "{0}.to(tl.int32, bitcast=True)", gives="word"),
    Operation("from_bits", 1, _float, "from_bits<{V}>({0})", "{0}.to(T, bitcast=True)", takes="word", gives="number"),
    Operation("whole", 1, int, "whole<{V}>({0})", "{0}.to(tl.int32)", gives="word"),
    Operation("real", 1, float, "real<{V}>({0})", "{0}.to(T)", takes="word", gives="number"),
)
OPERATIONS = {row.name: row for row in (*_OPERATORS, *_FUNCTIONS)}
FUNCTIONS = tuple(row.name for row in _FUNCTIONS)


def functions_of(library: Any) -> dict[str, Callable[..., Any]]:
    """The functions of the table that a library of arrays has under the same names."""
    return {name: getattr(library, name) for name in FUNCTIONS if hasattr(library, name)}
