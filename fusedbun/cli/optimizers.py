"""The optimizers of the command line, by name: how each is made in torch and in optax, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import fusedbun
from fusedbun import derive, recipes

if TYPE_CHECKING:
    import optax
    import torch


@dataclass(frozen=True)
class Entry:
    """An optimizer in both frameworks.

    Args:
        learning_rate: a learning rate that suits the small network of `fusedbun train`.
        settings: the hyper-parameters, for the record; what follows from the framework is not among them.
        in_torch: makes the torch optimizer of a network's parameters, with a learning rate.
        in_optax: makes the optax optimizer of a Flax network, with a schedule of the learning rate.
    """

    learning_rate: float
    settings: Mapping[str, Any]
    in_torch: Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]
    in_optax: Callable[[optax.Schedule], optax.GradientTransformation]


def ours(recipe: str, torch_class: str, learning_rate: float, **settings: Any) -> Entry:
    """One of fusedbun's recipes; where it takes a channel axis, a Flax network gets Flax's."""
    defaults = derive.defaults(getattr(recipes, recipe))
    takes_axis = defaults.pop("channel_axis", None) is not None

    def in_torch(params: Iterable[torch.nn.Parameter], lr: float) -> Any:
        return getattr(fusedbun, torch_class)(params, lr, **settings)

    def in_optax(schedule: optax.Schedule) -> Any:
        library = import_module("fusedbun_jax")
        layout = {"channel_axis": library.flax_channel_axis} if takes_axis else {}
        return getattr(library, recipe)(schedule, **settings, **layout)

    return Entry(learning_rate, {**defaults, **settings}, in_torch, in_optax)


def adamw(learning_rate: float, b1: float, b2: float, eps: float, weight_decay: float) -> Entry:
    """AdamW as torch and as optax have it."""

    def in_torch(params: Iterable[torch.nn.Parameter], lr: float) -> Any:
        library = import_module("torch.optim")
        return library.AdamW(params, lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay)

    def in_optax(schedule: optax.Schedule) -> Any:
        return import_module("optax").adamw(schedule, b1, b2, eps, weight_decay=weight_decay)

    return Entry(learning_rate, {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}, in_torch, in_optax)


OPTIMIZERS = {
    "fusedbun": ours("fusedbun", "Fusedbun", 3e-4, centralize=True, use_rms=True, nesterov=True),
    "adamw": adamw(3e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01),
}
