"""An optimizer by its name, for configuration files."""

from __future__ import annotations

from typing import Any

import optax

from fusedbun.recipe import named
from fusedbun_jax.optimizers import FACTORIES
from fusedbun_jax.step import SteppingTransformation


def create(name: str, learning_rate: optax.ScalarOrSchedule | None = None, **arguments: Any) -> SteppingTransformation:
    """The optimizer of a name, as a configuration file gives it.

        tx = create("fusedbunw", 1e-3, weight_decay=0.1)

    Args:
        name: the factory's name, or one of its torch class's.
        learning_rate: a number or a schedule; None: the factory's default.
        arguments: the factory's other arguments.

    Raises:
        TypeError: the factory has no such argument.
        ValueError: there is no such optimizer; the message says which names are nearest, and all that there are.
    """
    make = FACTORIES[named("fusedbun_jax.create", name).name]
    return make(**(arguments if learning_rate is None else {"learning_rate": learning_rate, **arguments}))
