"""The optax factories, one for each recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, cast

import optax

from fusedbun import derive, recipes
from fusedbun.chain import Chain
from fusedbun_jax.lift import from_chain

P = ParamSpec("P")
Factory = Callable[Concatenate[optax.ScalarOrSchedule, P], optax.GradientTransformationExtraArgs]

_ARGUMENTS = "    learning_rate: a number in [0, inf), or a schedule.\n"
_REMARK = """
Under optax.inject_hyperparams give static_args={static}: these choose code or state, and cannot be scheduled.
For parameters of 16 bits also give it hyperparam_dtype=jnp.float32, or it rounds the numbers to the parameters' dtype.
A momentum that is scheduled keeps its state where it passes through 0.
"""


def factory(recipe: Callable[P, Chain]) -> Factory[P]:
    """The optax factory of a recipe: its arguments behind a learning rate, spelled out in the signature."""

    def make(
        learning_rate: optax.ScalarOrSchedule, *args: P.args, **kwargs: P.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        return from_chain(recipe(*args, **kwargs), learning_rate)

    make.__name__ = make.__qualname__ = recipe.__name__
    make.__signature__ = derive.signature(recipe, [inspect.Parameter("learning_rate", derive.POSITIONAL)])  # type: ignore[attr-defined]
    make.__doc__ = derive.documentation(recipe, _ARGUMENTS, _REMARK.format(static=derive.structural(recipe)))
    return cast(Factory[P], make)


fusedbun = factory(recipes.fusedbun)
