"""The entries of param groups: the names that a hyper-parameter goes by, and keys that are refused.

A key is refused where it is no entry of the optimizer's groups, but another optimizer of this package, torch's or
optax's has an argument of this name, or an entry of these groups is called nearly so: whoever wrote it believes that it
does something. 0, False and None are taken where the optimizer has nothing of the kind. All other keys are the user's
own, a scheduler's, or those of an optimizer around this one.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from fusedbun.recipe import own_names
from fusedbun.recipes import RECIPES

_CHOICE = "chooses an implementation of torch's own optimizers; this one chooses by itself"
# Arguments of torch's own optimizers that are accepted where they are not set, and what is said where they are.
OF_TORCH = {
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), _CHOICE),
    "amsgrad": "keeps the largest mean of squares of every element, but this one keeps none for every element",
}
_CALLED = {  # what one thing is called by one or another
    "learning rate": ("lr", "learning_rate"),
    "weight decay": ("weight_decay", "Lambda", "wd", "decay"),
    "momentum": ("momentum", "momentum_beta", "betas", "beta1", "b1"),
}
# What optimizers around another keep of their own in groups that they share with it, as SAM and its like do.
_OF_WRAPPERS = frozenset({"rho", "alpha", "lmbda"})
_NEAR = 0.9  # schedulers' `max_momentum` and `base_momentum` are at most 0.8 near to `momentum`


class Entries(dict[str, Any]):
    """A param group, or an optimizer's defaults, in which other names of a hyper-parameter stand for its own.

    torch's schedulers cycle `momentum`, and others set `weight_decay`, where the group's own names may be different. It
    holds own names only, so that no two can be out of step.
    """

    _names: Mapping[str, str] = MappingProxyType({})  # own names by the others; without them while it is unpickled

    def __init__(self, owner: str, names: Mapping[str, str], entries: Mapping[str, Any]) -> None:
        super().__init__(own_names(owner, names, dict(entries)))
        self._names = names

    def __missing__(self, key: str) -> Any:
        if key not in self._names:
            raise KeyError(key)
        return self[self._names[key]]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(self._names.get(key, key), value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(self._names.get(key, key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._names.get(key, key))  # type: ignore[call-overload]  # any object is asked for

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(self._names.get(key, key), default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        return super().setdefault(self._names.get(key, key), default)

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(self._names.get(key, key), *default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Entries:  # type: ignore[override, misc]  # a dict's has overloads
        self.update(other)
        return self


def without_flags(owner: str, names: Collection[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those of torch's own optimizers that this one, whose names these are, does not have.

    Raises:
        TypeError: one of them is set.
    """
    for flag in OF_TORCH.keys() - names:
        check_flag(owner, flag, arguments.get(flag))
    return {name: value for name, value in arguments.items() if name in names or name not in OF_TORCH}


def check_flag(owner: str, flag: str, value: Any) -> None:
    """Raises a TypeError where an argument of torch's own optimizers that this one does not have is set."""
    if value:
        raise TypeError(f"{owner}: {flag}={value!r} {OF_TORCH[flag]}, so leave it out")


def check_keys(owner: str, names: Collection[str], unknown: Mapping[str, Any]) -> None:
    """Raises a TypeError for an entry of a param group that its user takes for a hyper-parameter; see above.

    Args:
        owner: the optimizer's class.
        names: the entries that it has, by all their names.
        unknown: the others.
    """
    for key, value in unknown.items():
        if key in _OF_WRAPPERS:
            continue
        if key in OF_TORCH:
            check_flag(owner, key, value)
            continue
        kind = next((kind for kind, called in _CALLED.items() if key in called), None)
        here = [name for name in names if name in _CALLED.get(kind or "", ())]
        near = get_close_matches(key.lower(), {name.lower(): name for name in names}, 1, _NEAR)
        if not (here or near or value):
            continue
        if kind or near or key in _arguments():
            hint = (f"; its {kind} is {here[0]!r}" if here else f"; it has no {kind}") if kind else ""
            hint = hint or "".join(f"; did you mean {name!r}?" for name in names if [name.lower()] == near)
            raise TypeError(
                f"{owner} does not read {key}={value!r} of a param group{hint}{'' if hint.endswith('?') else ';'} "
                f"its own are {', '.join(names)}"
            )


@cache
def _arguments() -> frozenset[str]:
    """What optimizers call their arguments, here and in torch."""
    of_torch = [x for x in vars(torch.optim).values() if inspect.isclass(x) and issubclass(x, torch.optim.Optimizer)]
    torchs = {name for one in of_torch for name in inspect.signature(one).parameters}
    ours = {name for recipe in RECIPES.values() for name in (*recipe.defaults, *recipe.other_names)}
    return frozenset(torchs | ours | {"b2", "beta2", "implementation"} - {"params"})
