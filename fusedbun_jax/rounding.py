"""Updates of parameters that have fewer bits than the updates are computed in."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fusedbun.hyper import Seed, check, plain
from fusedbun.storage.codes import STEP
from fusedbun.storage.rounding import Rounding, nearest_update
from fusedbun.storage.storage import Storage
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp
from fusedbun_jax.injected import choosing, injectable
from fusedbun_jax.layout import COUNT, apart, count_of, over_leaves, state_type, trees_of
from fusedbun_jax.state import Arrays, no_steps, with_derivative_of

SEED = {"seed": Seed}  # as `fusedbun.hyper.check` reads it
NAME = "round_stochastically"
_STATE = state_type("RoundStochasticallyState", (COUNT,))


def round_to_params() -> optax.GradientTransformationExtraArgs:
    """Gives the updates the parameters' dtype in such a way that `optax.apply_updates` rounds the sum once.

        u = round(p + u) - p, or its neighbour whose sum with p is nearer      for parameters of fewer bits than u

    For a step that changes a parameter by less than half or than twice of it, `p + u` is exactly the once-rounded
    result; for a larger one it is that or a neighbour of it.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: Any = None, **_: Any) -> Any:
        if params is not None:
            updates = jax.tree.map(lambda u, p: _round_to_nearest(u, jnp.asarray(p)), updates, params)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def to_nearest(path: leaf.KeyPath, update: Any, param: Any, arrays: Arrays, count: Any) -> tuple[Any, Arrays]:
    """One leaf's update as `round_to_params` makes it."""
    return update if param is None or not update.size else _round_to_nearest(update, jnp.asarray(param)), arrays


@injectable(choosing(SEED))
def round_stochastically(seed: int | jax.Array = 0) -> optax.GradientTransformationExtraArgs:
    """Updates with which `optax.apply_updates` rounds bfloat16 parameters to either neighbour, without a bias.

        u = q - p      in float32, q being p + u rounded up as often as it lies near to the number above

    Other parameters are rounded as by `round_to_params`.

    `p + u` is computed in float32 then, and is q exactly, except where a number of the parameter's changes its sign
    and both are so large that their difference is infinite. So it must be the last transformation of a chain, with the
    learning rate before it.

    Args:
        seed: any integer, or a 0-d array of one; with a leaf's path, joined by dots, and the number of steps it
            decides the noise.

    State: one int32 number, of steps.
    """
    check(NAME, SEED, {"seed": seed})
    word = as_word(seed)

    def init(params: optax.Params) -> Any:
        return _STATE(no_steps([leaf.floating(path, "parameter", param)[0] for path, param in leaf.flatten(params)[0]]))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, Any]:
        count = count_of(trees_of(NAME, state).get(COUNT))
        counts = apart(count, len(jax.tree.leaves(updates)))
        updates, _trees = over_leaves(NAME, partial(to_either, word), updates, {}, params, counts)
        return updates, _STATE(count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def as_word(seed: Any) -> Any:
    """A seed as noise begins with it: an integer, or an array of a word, whose value may not be known yet."""
    seed = plain(seed)
    return seed if isinstance(seed, int) else seed.astype(jnp.int32)


def to_either(seed: Any, path: leaf.KeyPath, update: Any, param: Any, arrays: Arrays, count: Any) -> tuple[Any, Arrays]:
    """One leaf's update as `round_stochastically` makes it, after so many steps."""
    if param is None:
        raise ValueError("stochastic rounding needs the parameters: call update(updates, state, params)")
    (param, _), update = leaf.floating(path, "parameter", param), leaf.as_array(path, "update", update)
    leaf.check_shape(path, update, param)
    rounding = Rounding(True, seed, leaf.name(path)).at(param)
    if not rounding.stochastic:
        return to_nearest(path, update, param, arrays, count)
    update = update.astype(jnp.float32)
    if not update.size:
        return update, arrays
    p = param.astype(jnp.float32)
    storage = Storage(xp, rounding, p, "bfloat16")
    # The choice keeps the sum with p apart from a product before it: contracted the two would have bits that the
    # update has no place for.
    change = jnp.where(update == update, update, jnp.nan)
    return with_derivative_of(update, storage.update(p, change, {STEP: count})), arrays


def _round_to_nearest(update: Any, param: Any) -> Any:
    if param.dtype.itemsize >= update.dtype.itemsize:
        return update.astype(param.dtype)
    return _nearest(update, param)


@jax.custom_jvp
def _nearest(update: Any, param: Any) -> Any:
    """`nearest_update` for a dtype of JAX's."""
    wide, narrow = update.dtype, param.dtype
    p = param.astype(wide)

    def rounded(x: Any) -> Any:
        # Inside jit a cast and its way back may be simplified to nothing; behind a barrier it is not.
        return jax.lax.optimization_barrier(x.astype(narrow)).astype(wide)

    def neighbours(x: Any) -> list[Any]:
        return [jnp.nextafter(x.astype(narrow), to).astype(wide) for to in (-jnp.inf, jnp.inf)]

    return nearest_update(jnp, p, update, rounded, neighbours).astype(narrow)


# A neighbouring number has no derivative: that of the plain cast stands for it.
_nearest.defjvp(lambda primals, tangents: (_nearest(*primals), tangents[0].astype(primals[1].dtype)))
