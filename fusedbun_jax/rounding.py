"""Updates of parameters that have fewer bits than the updates are computed in."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fusedbun.chain import counted
from fusedbun.hyper import Seed, check, plain
from fusedbun.storage.codes import COUNT, STEP
from fusedbun.storage.rounding import Rounding
from fusedbun.storage.storage import Storage
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp
from fusedbun_jax.injected import choosing, injectable
from fusedbun_jax.state import Arrays, TransformState, check_state, over_leaves, with_derivative_of, zeros

SEED = {"seed": Seed}  # as `fusedbun.hyper.check` reads it
NAME = "round_stochastically"


def round_to_params() -> optax.GradientTransformationExtraArgs:
    """Gives the updates the parameters' dtype in such a way that `optax.apply_updates` rounds the sum once.

        u = round(p + u) - p, or its neighbour whose sum with p is nearer      for parameters of fewer bits than u

    The difference of two numbers within a factor of two of one another is a number of their format (Sterbenz), so for
    such a step `p + u` is exactly the once-rounded result; for a larger one it is that or a neighbour of it.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: Any = None, **_: Any) -> Any:
        if params is not None:
            updates = jax.tree.map(lambda u, p: _round_to_nearest(u, jnp.asarray(p)), updates, params)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def to_nearest(path: leaf.KeyPath, update: Any, param: Any, stored: Arrays) -> tuple[Any, Arrays]:
    """One leaf's update as `round_to_params` makes it, and its counter one further."""
    if not update.size:
        return update, stored
    return update if param is None else _round_to_nearest(update, jnp.asarray(param)), counted(stored)


@injectable(choosing(SEED))
def round_stochastically(seed: int | jax.Array = 0) -> optax.GradientTransformationExtraArgs:
    """Updates with which `optax.apply_updates` rounds bfloat16 parameters to either neighbour, without a bias.

        u = q - p      in float32, q being p + u rounded up as often as it lies near to the number above

    `p + u` is computed in float32 then, and is q exactly, except where a number of the parameter's changes its sign
    and both are so large that their difference is infinite. So it must be the last transformation of a chain, with the
    learning rate before it.

    Args:
        seed: any integer, or a 0-d array of one; with a leaf's path, joined by dots, and the number of steps it
            decides the noise.

    State: one int32 number for each parameter, the number of steps.

    Raises:
        ValueError: a parameter is not bfloat16 (when it sees the parameters).
    """
    check(NAME, SEED, {"seed": seed})
    word = as_word(seed)

    def init(params: optax.Params) -> TransformState:
        return TransformState(
            jax.tree_util.tree_map_with_path(lambda path, p: {STEP: zeros(COUNT, as_bfloat16(path, p))}, params)
        )

    def update(
        updates: optax.Updates, state: TransformState, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, TransformState]:
        if not isinstance(state, TransformState):
            raise ValueError(
                f"stochastic rounding counts the steps of each parameter in its state, but that is {state!r}; "
                f"it belongs to an optimizer without it, so make one with init"
            )
        return over_leaves(partial(to_either, word), updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def as_word(seed: Any) -> Any:
    """A seed as noise begins with it: an integer, or an array of a word, whose value may not be known yet."""
    seed = plain(seed)
    return seed if isinstance(seed, int) else seed.astype(jnp.int32)


def as_bfloat16(path: leaf.KeyPath, param: Any) -> Any:
    """The parameter as an array; one that is not bfloat16 is a ValueError."""
    param, _ = leaf.floating(path, "parameter", param)
    if param.dtype != jnp.bfloat16:
        raise ValueError(
            f"stochastic rounding is for bfloat16 parameters, but the parameter of {leaf.title(path)} is "
            f"{param.dtype.name}; leave it out with by_name(…, {{pattern: {{'stochastic_rounding': False}}}})"
        )
    return param


def to_either(seed: Any, path: leaf.KeyPath, update: Any, param: Any, stored: Arrays) -> tuple[Any, Arrays]:
    """One leaf's update as `round_stochastically` makes it."""
    if param is None:
        raise ValueError("stochastic rounding needs the parameters: call update(updates, state, params)")
    param, update = as_bfloat16(path, param), leaf.as_array(path, "update", update)
    leaf.check_shape(path, update, param)
    update = update.astype(jnp.float32)
    if not update.size:
        return update, stored
    check_state(NAME, path, {STEP: COUNT}, param, stored, by_dtype=True)
    p = param.astype(jnp.float32)
    storage = Storage(xp, Rounding(True, seed, leaf.name(path)), p, "bfloat16")
    # The choice keeps the sum apart from a product before it: contracted the two would have bits that the difference
    # below has no place for.
    exact = p + jnp.where(update == update, update, jnp.nan)
    before = {STEP: jnp.asarray(stored[STEP])}
    q = storage.round(exact, before)
    stepped = jnp.where(q == p, -0.0, q - p)  # an infinite parameter stays what it is, and so does -0
    return with_derivative_of(update, stepped), counted(before)


def _round_to_nearest(update: Any, param: Any) -> Any:
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
