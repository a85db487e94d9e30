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


# A number is a Python or NumPy scalar, or a 0-d array of a framework whose value may not be known yet.
NonNegative = Annotated[Any, Interval(0)]
Positive = Annotated[Any, Interval(0, open_low=True)]
UnitInterval = Annotated[Any, Interval(0, 1)]
# An axis counts from the front, or from the back where it is negative; JAX also takes a rule on a leaf's path.
Axis = Annotated[int, "axis"]


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


def is_concrete_zero(value: Any) -> bool:
    """True for a Python or NumPy number equal to 0; a framework's array is never known to be 0.

    This decides whether a buffer exists, so it must give the same answer when a step is traced as before.
    """
    return isinstance(value, Real) and value == 0


def choose(xp: Any, condition: Any, a: Any, b: Any) -> Any:
    """`xp.where` for hyper-parameters: settled at once where the condition is a plain bool."""
    if isinstance(condition, (bool, np.bool_)):
        return a if condition else b
    return xp.where(condition, a, b)


def _check_one(label: str, hint: Any, value: Any) -> None:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return
        (hint,) = [option for option in get_args(hint) if option is not type(None)]
        allowed = " or None"
    else:
        allowed = ""
    if hint is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{label} must be True or False{_but(value)}")
    elif get_origin(hint) is Literal:
        options = get_args(hint)
        if not isinstance(value, str):
            raise TypeError(f"{label} must be one of {_listed(options)}{allowed}{_but(value)}")
        if value not in options:
            raise ValueError(f"{label} must be one of {_listed(options)}{allowed}, but it is {value!r}")
    elif hint == Axis:
        if not callable(value) and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise TypeError(f"{label} must be an integer{_but(value)}")
    elif get_origin(hint) is Annotated:
        _check_number(label, hint.__metadata__[0], allowed, value)


def _check_number(label: str, interval: Interval, allowed: str, value: Any) -> None:
    is_scalar_array = getattr(value, "shape", None) == () and not isinstance(value, np.generic)
    if isinstance(value, (bool, np.bool_)) or not (isinstance(value, Real) or is_scalar_array):
        raise TypeError(f"{label} must be a number in {interval}{allowed}{_but(value)}")
    number = _concrete(value)
    if number is not None and number not in interval:
        raise ValueError(f"{label} must lie in {interval}{allowed}, but it is {value!r}")


def _concrete(value: Any) -> float | None:
    """The number behind `value`, or None where a framework has not computed it yet (a traced value)."""
    try:
        return float(value)
    except (TypeError, RuntimeError):
        return None


def _but(value: Any) -> str:
    """The end of a type error: what the value is, and where it is an array, why that cannot be."""
    text = f", but it is {value!r} ({type(value).__name__})"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        text += (
            "; it chooses code or state, so it must be known before a step is traced: give a Python value, "
            "and name it in `static_args` under optax.inject_hyperparams"
        )
    return text


def _listed(options: tuple[Any, ...]) -> str:
    return ", ".join(repr(option) for option in options)
