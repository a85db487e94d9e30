"""What optax.inject_hyperparams leaves as it is given: what chooses code or state, of which it would make arrays.

It binds a factory's arguments by the factory's signature, makes an array of every number, calls every function as a
schedule, and hands on the rest. Our signatures bind what must stay as it is as `Known`, which is neither a number nor a
function to optax; the factory takes the value out again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from fusedbun.hyper import is_concrete_zero, is_stateless_at_0, is_structural
from fusedbun.recipe import own_names

P = ParamSpec("P")
R = TypeVar("R")
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """A value that is to stay as it is given."""

    value: Any


def value_of(x: Any) -> Any:
    """The value, taken out where it is kept."""
    return x.value if isinstance(x, Known) else x


class Signature(inspect.Signature):
    """A signature that binds with the defaults, by all names, and as `Known` what `known` says of the arguments."""

    known: Callable[[Arguments], Arguments] = staticmethod(lambda arguments: {})
    other_names: Mapping[str, str] = MappingProxyType({})  # of arguments, and which they are of

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **own_names("inject_hyperparams", self.other_names, kwargs))
        bound.apply_defaults()
        arguments = {name: value_of(x) for name, x in bound.arguments.items()}
        bound.arguments |= {name: Known(x) for name, x in self.known(arguments).items()}
        return bound

    def replace(self, **changes: Any) -> Signature:
        """The signature with changes, as functools.partial makes them."""
        return _with(super().replace(**changes), self.known, self.other_names)


def _with(signature: Signature, known: Callable[[Arguments], Arguments], other_names: Mapping[str, str]) -> Signature:
    signature.known, signature.other_names = known, other_names
    return signature


def injectable(
    known: Callable[[Arguments], Arguments], other_names: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function fit for optax.inject_hyperparams without `static_args`.

    Args:
        known: the arguments, of those that are bound, that must stay as they are, with their values.
        other_names: other names of arguments, and which they are of.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        @wraps(make)
        def injected(*args: P.args, **kwargs: P.kwargs) -> R:
            values: Any = {name: value_of(x) for name, x in kwargs.items()}
            return make(*map(value_of, args), **values)

        plain = inspect.signature(make)
        signature = Signature(list(plain.parameters.values()), return_annotation=plain.return_annotation)
        # to mypy a function has no signature of its own to set
        injected.__signature__ = _with(signature, known, other_names)  # type: ignore[attr-defined]
        return injected

    return decorate


def choosing(declared: Mapping[str, Any]) -> Callable[[Arguments], Arguments]:
    """The arguments so declared that choose code or state, for `injectable`: by what they are, or by being 0."""

    def known(arguments: Arguments) -> Arguments:
        return {name: x for name, x in arguments.items() if name in declared and _chooses(declared[name], x)}

    return known


def _chooses(hint: Any, value: Any) -> bool:
    return is_structural(hint) or (is_stateless_at_0(hint) and is_concrete_zero(value))
