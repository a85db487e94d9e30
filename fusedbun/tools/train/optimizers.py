"""The optimizers of the command line, by name: how each is made in torch and in optax, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
    """An optimizer in both frameworks.

    Args:
        learning_rate: a learning rate that suits the small network of `fusedbun train`.
        settings: the hyper-parameters that are not its defaults.
        hyperparameters: all of them, for the record; what follows from the network or the framework is not among them.
        in_torch: makes the torch optimizer of a network's named parameters, with a learning rate.
        in_optax: makes the optax optimizer of a Flax network, with a schedule of the learning rate.
    """

    learning_rate: float
    settings: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    in_torch: Callable[[NamedParams, float], torch.optim.Optimizer]
    in_optax: Callable[[optax.Schedule], optax.GradientTransformation]


def mup_type(path: tuple[str, ...], param: Any) -> Type:
    """The u-muP type of a parameter of the network, from its name in torch or in Flax."""
    if path[-1] == "bias":
        return "bias"
    return "output" if "output" in path else "weight"


def ours(recipe: Recipe, learning_rate: float) -> Entry:
    """One of fusedbun's, with the recommended settings; where it takes a channel axis, a Flax network gets Flax's."""
    settings, defaults = recipe.recommended, recipe.defaults
    of_network = {"mup": mup_type} if "mup" in defaults else {}
    of_flax = "channel_axis" in defaults
    hyperparameters = {name: x for name, x in defaults.items() if name not in ("mup", "channel_axis")}

    def in_torch(params: NamedParams, lr: float) -> Any:
        return getattr(import_module("fusedbun.torch"), recipe.torch_class)(params, lr, **settings, **of_network)

    def in_optax(schedule: optax.Schedule) -> Any:
        library = import_module("fusedbun_jax")
        layout = {"channel_axis": library.flax_channel_axis} if of_flax else {}
        return getattr(library, recipe.name)(schedule, **settings, **of_network, **layout)

    return Entry(learning_rate, settings, {**hyperparameters, **settings}, in_torch, in_optax)


def adamw(learning_rate: float, b1: float, b2: float, eps: float, weight_decay: float) -> Entry:
    """AdamW as torch and as optax have it."""

    def in_torch(params: NamedParams, lr: float) -> Any:
        library = import_module("torch.optim")
        return library.AdamW(params, lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay)

    def in_optax(schedule: optax.Schedule) -> Any:
        return import_module("optax").adamw(schedule, b1, b2, eps, weight_decay=weight_decay)

    hyperparameters = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    return Entry(learning_rate, {"weight_decay": weight_decay}, hyperparameters, in_torch, in_optax)


OPTIMIZERS = {name: ours(r, r.training_lr) for name, r in RECIPES.items() if r.training_lr is not None}
# AdamW's learning rate is older than the grid of the others (`fusedbun.recipe`) and was kept: four times as much has a
# loss 0.011 lower.
OPTIMIZERS["adamw"] = adamw(3e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
