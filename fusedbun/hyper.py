"""Hyper-parameters: what a value may be, said once as the type it is declared with.

A transformation's fields and a recipe's arguments are annotated with these types, and `check` reads
the annotations. So `beta: UnitInterval = 0.9` is the declaration, its documentation and its validation.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Scalar = Any  # a Python or NumPy number, or a framework's 0-d array whose value may not be known yet


@dataclass(frozen=True)
class Interval:
    """The real numbers from `low` to `high`; `high` itself is outside, `low` only where `open_low`."""

    low: float
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and value < self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g})"


@dataclass(frozen=True)
class Whole:
    """The whole numbers from `low` to `high`, both inside; any without bounds."""

    low: int | None = None
    high: int | None = None

    def __contains__(self, value: int) -> bool:
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is None:
            return "an integer"
        return f"an integer from {self.low} " + ("up" if self.high is None else f"to {self.high}")


@dataclass(frozen=True)
class Dtypes:
    """Some dtypes, by name; a framework's own objects for them are taken too."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.names))


NonNegative = Annotated[Scalar, Interval(0)]
Positive = Annotated[Scalar, Interval(0, open_low=True)]
UnitInterval = Annotated[Scalar, Interval(0, 1)]
StateAbove0 = Annotated[UnitInterval, "no state at 0"]  # so whether it is a plain 0 decides which arrays there are
Seed = Annotated[Scalar, Whole(), "or an array"]  # of a framework, whose value may not be known yet
Axis = Annotated[int, Whole()]  # from the front, or from the back where it is negative
# What may differ between parameters: a value, or a rule (the names that lead to a parameter, the parameter) -> value.
PerParam = Annotated[T, "or a rule"]
Votes = Annotated[int, Whole(1, 127)]  # as many as an int8 counts


@cache
def hints(declared: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields or of a function's arguments, with `Annotated` kept."""
    return get_type_hints(declared, include_extras=True)


def check(owner: str, declared: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises a TypeError or a ValueError that names the first value that is not what its annotation allows.

    Args:
        owner: what the values belong to, for the message ("sm3_accumulate", "Fusedbun").
        declared: each name's annotation, `Annotated` kept. A name without one is not looked at.
        values: each name's value.
    """
    for name, value in values.items():
        if name in declared:
            _check_one(f"{owner}: {name}", declared[name], value)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Checks a function's arguments by their annotations before it is called."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        check(function.__name__, hints(function), bound.arguments)
        return function(*args, **kwargs)

    return call


def is_structural(hint: Any) -> bool:
    """Whether a hyper-parameter so annotated chooses code or state, so that it must be known when a step is traced."""
    kinds = [option for option in _options(hint) if option is not type(None)]
    return not all(get_origin(kind) is Annotated and isinstance(kind.__metadata__[0], Interval) for kind in kinds)


def is_stateless_at_0(hint: Any) -> bool:
    """Whether a hyper-parameter so annotated needs no state where it is 0."""
    return get_origin(hint) is Annotated and "no state at 0" in hint.__metadata__


def plain(value: Any) -> Any:
    """The value as every framework takes it: NumPy's scalars and fractions become Python's numbers, dtypes names."""
    if (name := dtype_name(value)) is not None:
        return name
    if isinstance(value, (np.generic, np.ndarray)) and value.shape == ():
        return value.item()
    if isinstance(value, Real) and not isinstance(value, (Integral, float)):
        return float(value)
    return value


def dtype_name(value: Any) -> str | None:
    """The name of a dtype of NumPy's, torch's or JAX's; None for anything else."""
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    value = getattr(value, "dtype", None) if callable(value) else value  # of JAX's scalar types
    return value.name if isinstance(value, np.dtype) else None


def is_concrete_zero(value: Any) -> bool:
    """True for a Python or NumPy number equal to 0; a framework's array is never known to be 0.

    This decides whether a buffer exists, so it must give the same answer when a step is traced as before.
    """
    return isinstance(value, Real) and value == 0


def choose(xp: Any, condition: Any, a: Any, b: Any) -> Any:
    """`xp.where` for hyper-parameters: decided at once where the condition is a plain bool."""
    if isinstance(condition, (bool, np.bool_)):
        return a if condition else b
    return xp.where(condition, a, b)


def log(xp: Any, x: Scalar) -> Scalar:
    """`xp.log` for hyper-parameters: in double precision where the number is known; -inf for 0."""
    if isinstance(x, Real):
        return math.log(x) if x else -math.inf
    return xp.log(x)


def sqrt(xp: Any, x: Scalar) -> Scalar:
    """`xp.sqrt` for hyper-parameters: in double precision where the number is known."""
    return math.sqrt(x) if isinstance(x, Real) else xp.sqrt(x)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _check_one(label: str, hint: Any, value: Any) -> None:
    kinds = [option for option in _options(hint) if option is not type(None)]
    takes_none = type(None) in _options(hint)
    kind, origin = kinds[0], get_origin(kinds[0])
    takes_rules = origin is Annotated and "or a rule" in kind.__metadata__
    if len(kinds) > 1 or (value is None and takes_none) or (callable(value) and takes_rules):
        return  # a union of several types is checked by whoever uses it
    also = " or None" * takes_none + " or a rule" * takes_rules
    if origin is tuple:
        parts = get_args(kind)
        if not isinstance(value, (tuple, list)) or len(value) != len(parts):
            raise TypeError(f"{label} must be a tuple of {len(parts)} numbers{also}{_but(value)}")
        for i, (part, item) in enumerate(zip(parts, value, strict=True)):
            _check_one(f"{label}[{i}]", part, item)
    elif kind is bool or origin in (Literal, Annotated):
        allowed, is_kind, is_within = _compared(kind, value)
        is_number = isinstance(allowed, Interval)
        if not is_kind:
            what, why = (f"a number in {allowed}", "") if is_number else (allowed, _static(value))
            raise TypeError(f"{label} must be {what}{also}{_but(value)}{why}")
        if not is_within:
            raise ValueError(f"{label} must {'lie in' if is_number else 'be'} {allowed}{also}, but it is {value!r}")


def _compared(kind: Any, value: Any) -> tuple[Any, bool, bool]:
    """What is allowed, whether the value is of that kind, and, if so, whether it is one of the allowed."""
    if kind is bool:
        return "True or False", isinstance(value, (bool, np.bool_)), True
    if get_origin(kind) is Literal:
        allowed: Any = Dtypes(get_args(kind))
        return allowed, isinstance(value, str), isinstance(value, str) and value in allowed.names
    allowed = kind.__metadata__[0]
    if isinstance(allowed, Dtypes):
        name = dtype_name(value) or value
        return allowed, isinstance(name, str), isinstance(name, str) and name in allowed.names
    if isinstance(allowed, Whole):
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if "or an array" in kind.__metadata__ and getattr(value, "shape", None) == () and _is_of_integers(value):
            return allowed, True, True
        return allowed, is_whole, is_whole and int(value) in allowed
    is_array = getattr(value, "shape", None) == () and not isinstance(value, np.generic)
    is_number = not isinstance(value, (bool, np.bool_)) and (isinstance(value, Real) or is_array)
    try:
        return allowed, is_number, is_number and float(value) in allowed
    except (TypeError, RuntimeError):  # a framework has not computed it yet
        return allowed, is_number, True


def _is_of_integers(array: Any) -> bool:
    return getattr(array.dtype, "kind", "") in ("i", "u")


def _but(value: Any) -> str:
    return f", but it is {value!r} ({type(value).__name__})"


def _static(value: Any) -> str:
    """Why a framework's array cannot be a hyper-parameter that chooses code or state."""
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return ""
    return "; it chooses code or state, so it must be known before a step is traced: give a Python value"
