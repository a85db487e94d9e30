"""An optimizer by its name, for configuration files."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from fusedbun.recipe import named
from fusedbun.torch import optimizers
from fusedbun.torch.driver import TransformOptimizer


def create(
    name: str, params: nn.Module | ParamsT, lr: float | Tensor | None = None, **arguments: Any
) -> TransformOptimizer:
    """The optimizer of a name, as a configuration file gives it.

    >>> from torch import nn
    >>> optimizer = create("fusedbunw", nn.Linear(2, 2), 1e-3, weight_decay=0.1)
    >>> type(optimizer).__name__, optimizer.param_groups[0]["param_names"]
    ('FusedbunW', ['weight', 'bias'])

    Args:
        name: the class's name, another one that it has, or its optax factory's.
        params: a module, whose parameters keep their names; or parameters, named parameters or param groups.
        lr: the learning rate; None: the class's default.
        arguments: the class's other arguments.

    Raises:
        TypeError: the class has no such argument.
        ValueError: there is no such optimizer; the message says which names are nearest, and all that there are.
    """
    make = getattr(optimizers, named("fusedbun.create", name).torch_class)
    given = arguments if lr is None else {"lr": lr, **arguments}
    optimizer: TransformOptimizer
    optimizer = make(params.named_parameters() if isinstance(params, nn.Module) else params, **given)
    return optimizer
