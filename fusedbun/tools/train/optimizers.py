"""The optimizers of the command line, by name: how each is made in torch and in optax, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusedbun.mup import Type
from fusedbun.recipe import Recipe
from fusedbun.recipes import RECIPES

if TYPE_CHECKING:
    import optax
    import torch

    NamedParams = Iterable[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class Entry:
    """An optimizer, and what makes it in torch and, for a Flax network, in optax."""

    learning_rate: float  # that suits the small network of `fusedbun train`
    settings: Mapping[str, Any]  # the hyper-parameters that are not its defaults
    hyperparameters: Mapping[str, Any]  # all of them but those that follow from the network or the framework
    in_torch: Callable[[NamedParams, float], torch.optim.Optimizer]
    in_optax: Callable[[optax.Schedule], optax.GradientTransformation]


def mup_type(path: tuple[str, ...], param: Any) -> Type:
    """The u-muP type of a parameter of the network, from its name in torch or in Flax."""
    if path[-1] == "bias":
        return "bias"
    return "output" if "output" in path else "weight"


def _ours(recipe: Recipe, learning_rate: float) -> Entry:
    """One of fusedbun's, with the recommended settings; where it takes a channel axis, a Flax network gets Flax's."""
    settings, defaults = recipe.recommended, recipe.defaults
    of_network = {**settings, "mup": mup_type} if "mup" in defaults else settings
    hyperparameters = {name: x for name, x in defaults.items() if name not in ("mup", "channel_axis")}

    def in_torch(params: NamedParams, lr: float) -> Any:
        return getattr(import_module("fusedbun.torch"), recipe.torch_class)(params, lr, **of_network)

    def in_optax(schedule: optax.Schedule) -> Any:
        library = import_module("fusedbun_jax")
        layout = {"channel_axis": library.flax_channel_axis} if "channel_axis" in defaults else {}
        return getattr(library, recipe.name)(schedule, **of_network, **layout)

    return Entry(learning_rate, settings, {**hyperparameters, **settings}, in_torch, in_optax)


def _adamw() -> Entry:
    """AdamW as torch and as optax have it."""
    decay = {"weight_decay": 0.01}
    given = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, **decay}

    def in_torch(params: NamedParams, lr: float) -> Any:
        library = import_module("torch.optim")
        return library.AdamW(params, lr, betas=(given["b1"], given["b2"]), eps=given["eps"], **decay)

    return Entry(3e-3, decay, given, in_torch, lambda schedule: import_module("optax").adamw(schedule, **given))


def in_dtype(name: str, dtype: str) -> Entry:
    """The optimizer for a network of this dtype: in float64, which is to leave no rounding, no moment is in codes."""
    if dtype == "float64" and OPTIMIZERS[name].hyperparameters.get("momentum_dtype"):
        return with_settings(name, momentum_dtype=None)
    return OPTIMIZERS[name]


def with_settings(name: str, **settings: Any) -> Entry:
    """One of fusedbun's optimizers with these hyper-parameters beside its recommended ones."""
    recipe = RECIPES[name]
    return _ours(replace(recipe, recommended={**recipe.recommended, **settings}), OPTIMIZERS[name].learning_rate)


OPTIMIZERS = {name: _ours(r, r.training_lr) for name, r in RECIPES.items() if r.training_lr is not None}
# AdamW's learning rate is older than the grid of the others (`fusedbun.recipe`) and was kept: four times as much has a
# loss 0.011 lower.
OPTIMIZERS["adamw"] = _adamw()
