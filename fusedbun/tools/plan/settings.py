"""The optimizers to plan for: every recipe under its usual settings, and torch's AdamW."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fusedbun import derive
from fusedbun.chain import Chain
from fusedbun.recipes import RECIPES
from fusedbun.storage.rounding import Rounding

ADAMW = "adamw"
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
        object.__setattr__(self, "label", self.label or _listed(self.hyperparameters) or "defaults")
        if name != ADAMW:
            self.chain(False)
        elif self.hyperparameters.keys() - {"weights"}:
            raise TypeError(f'adamw takes "weights" only, but it is given {_listed(self.hyperparameters)}')
        elif self.hyperparameters.get("weights", "float32") not in ("float32", "param"):
            raise ValueError(f'adamw: weights must be "float32" or "param", but it is {_listed(self.hyperparameters)}')

    @property
    def title(self) -> str:
        """The optimizer's name in a table."""
        return _TITLES[self.optimizer]

    @property
    def is_torch_adamw(self) -> bool:
        """Whether it is torch's AdamW and none of fusedbun's."""
        return self.optimizer == ADAMW

    @property
    def makes_gradients_dense(self) -> bool:
        """Whether it takes sparse gradients by making them dense, which takes memory."""
        return self.optimizer == "scaled_optum"

    def chain(self, stochastic_rounding: bool) -> Chain:
        """The chain of one of fusedbun's optimizers."""
        recipe = RECIPES[self.optimizer]
        given = dict(self.hyperparameters)
        if "mup" in derive.defaults(recipe.make):
            given.setdefault("mup", _untyped)
        if recipe.wants_initial_lr:
            given.setdefault(derive.INITIAL_LR, 1.0)
        try:
            inspect.signature(recipe.make).bind(**given)
        except TypeError as error:
            allowed = ", ".join(derive.defaults(recipe.make))
            raise TypeError(f"{self.optimizer}: {error}; its arguments are {allowed}") from None
        return replace(recipe.make(**given), rounding=Rounding(stochastic_rounding))


def _untyped(path: tuple[str, ...], param: Any) -> str:
    """u-muP's type of every parameter, for its state does not depend on it."""
    return "norm"


def _known(name: str) -> str:
    found = name if name in _TITLES else _BY_CLASS.get(str(name).lower(), str(name).lower())
    if found not in _TITLES:
        near = difflib.get_close_matches(found, [*_TITLES, *_BY_CLASS], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the optimizer must be one of {', '.join(_TITLES)}, but it is {name!r}{hint}")
    return found


def _listed(hyperparameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in hyperparameters.items())


def _with_moment(optimizer: str, dtypes: Iterable[str], **others: Any) -> list[Setting]:
    return [Setting(optimizer, {**others, "momentum_dtype": d}, f"momentum {d}") for d in dtypes]


def _adam(optimizer: str) -> list[Setting]:
    pairs = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16"))
    names = "momentum_dtype", "second_moment_dtype"
    return [
        Setting(optimizer, dict(zip(names, p, strict=True)), f"moments {', '.join(dict.fromkeys(p))}") for p in pairs
    ]


_RECOMMENDED = {"centralize": True, "use_rms": True, "nesterov": True}
_EVERY = ("float32", "bfloat16", "int8", "int4")

USUAL = (
    Setting("sm3", {}, "no momentum"),
    *_with_moment("sm3", _EVERY, momentum=0.9),
    Setting("fusedbun", {"centralize": True, "use_rms": True, "momentum_beta": 0.0}, "no momentum"),
    *_with_moment("fusedbun", _EVERY, **_RECOMMENDED),
    *_with_moment("decoupled_lionw", ("float32", "bfloat16", "int8")),
    *_adam("mup_adam"),
    *_adam("mup_adamw"),
    Setting("mup_sgd", {}, "no momentum"),
    *_with_moment("mup_sgd", ("float32", "bfloat16", "int8"), momentum=0.9),
    Setting("scaled_optum", {}, "no state"),
    Setting("ternary_vote", {}, "votes int8"),
    Setting(ADAMW, {"weights": "float32"}, "all in float32"),
    Setting(ADAMW, {"weights": "param"}, "all as the weights"),
)


def chosen(optimizers: Iterable[str | Setting] | str | Setting | None) -> tuple[Setting, ...]:
    """The settings that are meant: of a name the usual ones; None stands for all that are usual.

    Raises:
        ValueError: there is no optimizer of a name.
    """
    if optimizers is None:
        return USUAL
    wanted = [optimizers] if isinstance(optimizers, (str, Setting)) else optimizers
    found: list[Setting] = []
    for one in wanted:
        found += [one] if isinstance(one, Setting) else [s for s in USUAL if s.optimizer == _known(one)]
    return tuple(found)
