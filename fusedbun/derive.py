"""What a driver's optimizer takes from its recipe: the signature and the documentation, with arguments of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from fusedbun.hyper import hints, is_structural

POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


INITIAL_LR = "initial_lr"  # a recipe's argument that its driver fills in


def defaults(recipe: Callable[..., Any]) -> dict[str, Any]:
    """The recipe's hyper-parameters and their defaults."""
    return {name: p.default for name, p in _parameters(recipe).items()}


def structural(recipe: Callable[..., Any]) -> tuple[str, ...]:
    """The hyper-parameters that choose code or state, so that they must be known when a step is traced."""
    declared = hints(recipe)
    return tuple(name for name in defaults(recipe) if is_structural(declared[name]))


def signature(
    recipe: Callable[..., Any], before: Sequence[inspect.Parameter], after: Sequence[inspect.Parameter] = ()
) -> inspect.Signature:
    """The recipe's signature between a driver's own arguments."""
    return inspect.Signature([*before, *_parameters(recipe).values(), *after])


def documentation(recipe: Callable[..., Any], before: str, after: str = "") -> str:
    """The recipe's docstring with the driver's arguments at the head of its `Args:` and its remarks at the end."""
    head, args, rest = inspect.getdoc(recipe).partition("Args:\n")  # type: ignore[union-attr]
    return f"{head}{args}{before}{rest}\n{after}"


def _parameters(recipe: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(recipe).parameters.items() if name != INITIAL_LR}
