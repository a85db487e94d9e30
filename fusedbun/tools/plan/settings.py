"""The optimizers to plan for: every recipe under its usual settings, and torch's AdamW."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedbun.chain import Chain
from fusedbun.recipes import RECIPES

ADAMW = "adamw"
_TYPED = {"mup": lambda path, param: "norm"}  # u-muP's type of every parameter, for its state does not depend on it
_TITLES = {name: recipe.torch_class for name, recipe in RECIPES.items()} | {ADAMW: "torch AdamW"}
_BY_CLASS = {recipe.torch_class.lower(): name for name, recipe in RECIPES.items()}


@dataclass(frozen=True)
class Setting:
    """An optimizer and hyper-parameters that decide what it stores.

    Args:
        optimizer: a recipe's name such as "fusedbun", its torch class's such as "Fusedbun", or "adamw" for torch's.
        hyperparameters: those that are not the recipe's defaults.
        label: what they are called in a table; "": their names and values, or "defaults".

    Raises:
        TypeError: the optimizer has no such hyper-parameter, or a value is of a wrong type.
        ValueError: there is no such optimizer, or a value is not allowed.
    """

    optimizer: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        name = _known(self.optimizer)
        object.__setattr__(self, "optimizer", name)
        object.__setattr__(self, "label", self.label or listed(self.hyperparameters) or "defaults")
        if name != ADAMW:
            self.chain(False)
        elif self.hyperparameters.keys() - {"weights"}:
            raise TypeError(f'adamw takes "weights" only, but it is given {listed(self.hyperparameters)}')
        elif self.hyperparameters.get("weights", "float32") not in ("float32", "param"):
            raise ValueError(f'adamw: weights must be "float32" or "param", but it is {listed(self.hyperparameters)}')

    @property
    def title(self) -> str:
        """The optimizer's name in a table."""
        return _TITLES[self.optimizer]

    @property
    def named(self) -> dict[str, str]:
        """What it is called in a JSON file."""
        return {"optimizer": self.optimizer, "setting": self.label}

    @property
    def is_torch_adamw(self) -> bool:
        """Whether it is torch's AdamW and none of fusedbun's."""
        return self.optimizer == ADAMW

    def chain(self, stochastic_rounding: bool) -> Chain:
        """The chain of one of fusedbun's optimizers."""
        recipe = RECIPES[self.optimizer]
        recipe.bind(f"{self.optimizer}:", recipe.signature(), **self.hyperparameters)
        typed = _TYPED if "mup" in recipe.defaults else {}
        return recipe.chain({**typed, **self.hyperparameters}, 1.0, stochastic_rounding)


def _known(name: str) -> str:
    found = name if name in _TITLES else _BY_CLASS.get(str(name).lower(), str(name).lower())
    if found not in _TITLES:
        near = difflib.get_close_matches(found, [*_TITLES, *_BY_CLASS], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the optimizer must be one of {', '.join(_TITLES)}, but it is {name!r}{hint}")
    return found


def listed(hyperparameters: Mapping[str, Any]) -> str:
    """Their names and values, for a reader."""
    return ", ".join(f"{name}={value!r}" for name, value in hyperparameters.items())


USUAL = (
    *(Setting(name, settings, label) for name, r in RECIPES.items() for label, settings in r.planned.items()),
    Setting(ADAMW, {"weights": "float32"}, "all in float32"),
    Setting(ADAMW, {"weights": "param"}, "all as the weights"),
)


def chosen(optimizers: Iterable[str | Setting] | str | Setting | None) -> tuple[Setting, ...]:
    """The settings that are meant: of a name its usual ones, of None all; a ValueError where the name is none."""
    if optimizers is None:
        return USUAL
    wanted = [optimizers] if isinstance(optimizers, (str, Setting)) else optimizers
    found: list[Setting] = []
    for one in wanted:
        found += [one] if isinstance(one, Setting) else [s for s in USUAL if s.optimizer == _known(one)]
    return tuple(found)
