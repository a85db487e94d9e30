"""Updates of parameters that have fewer bits than the updates are computed in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def round_to_params() -> optax.GradientTransformationExtraArgs:
    """Gives the updates the parameters' dtype in such a way that `optax.apply_updates` rounds the sum once.

        u = round(p + u) - p, or its neighbour whose sum with p is nearer      for parameters of fewer bits than u

    The difference of two numbers within a factor of two of one another is a number of their format (Sterbenz), so for
    such a step `p + u` is exactly the once-rounded result; for a larger one it is that or a neighbour of it.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: Any = None, **_: Any) -> Any:
        if params is not None:
            updates = jax.tree.map(lambda u, p: _round_to(u, jnp.asarray(p)), updates, params)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _round_to(update: Any, param: Any) -> Any:
    if param.dtype.itemsize >= update.dtype.itemsize:
        return update.astype(param.dtype)
    return _nearest(update, param)


@jax.custom_jvp
def _nearest(update: Any, param: Any) -> Any:
    """The update in the parameter's dtype whose sum with it, rounded to that dtype, is nearest to `param + update`."""
    wide, narrow = update.dtype, param.dtype
    p = param.astype(wide)

    def rounded(x: Any) -> Any:
        # Inside jit a cast and its way back may be simplified to nothing; behind a barrier it is not.
        return jax.lax.optimization_barrier(x.astype(narrow)).astype(wide)

    def miss(u: Any) -> Any:
        return jnp.abs(rounded(p + u.astype(wide)) - (p + update))

    best = (rounded(p + update) - p).astype(narrow)
    for other in jnp.nextafter(best, -jnp.inf), jnp.nextafter(best, jnp.inf):
        best = jnp.where(miss(other) < miss(best), other, best)
    return best


# A neighbouring number has no derivative: that of the plain cast stands for it.
_nearest.defjvp(lambda primals, tangents: (_nearest(*primals), tangents[0].astype(primals[1].dtype)))
