"""The definition run by JAX: a whole chain as one transformation of optax's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fusedbun.chain import Chain
from fusedbun.storage.codes import STEP
from fusedbun_jax import leaf
from fusedbun_jax.layout import (
    COUNT,
    Needed,
    Trees,
    apart,
    by_field,
    count_of,
    make_state,
    over_leaves,
    start,
    state_type,
    trees_of,
)
from fusedbun_jax.lift import Descend, update_leaf
from fusedbun_jax.rounding import to_either, to_nearest
from fusedbun_jax.state import no_steps


class IrregularError(Exception):
    """The definition must take the step, or say what is wrong; the message says why."""


def transformation(chain: Chain, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """The chain, what scales by the negative learning rate, and rounding.

    Its state has that of every transformation under the transformation's name, and one count of the steps, which is
    also what a schedule is asked with.
    """
    seed = chain.rounding.seed
    descend = Descend(1.0 if callable(learning_rate) else learning_rate)

    def init(params: optax.Params) -> Any:
        leaves, tree = leaf.flatten(params)
        made = [leaf.floating(path, "parameter", param)[0] for path, param in leaves]
        needed = [_needed(chain, path, param) for (path, _), param in zip(leaves, made, strict=True)]
        trees = [start(t, tree, made, [arrays[t.name] for arrays in needed]) for t in chain]
        return join_state(chain, trees, no_steps(made))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, Any]:
        trees, count = split_state(chain, state)
        count = count_of(count)
        counts = apart(count, len(jax.tree.leaves(updates)))
        for i, transform in enumerate(chain):
            step = partial(update_leaf, transform, seed, chain.stacked)
            updates, trees[i] = over_leaves(transform.name, step, updates, trees[i], params, counts)
        updates, _ = over_leaves(descend.name, partial(update_leaf, descend, seed, 0), updates, {}, params, counts)
        if callable(learning_rate):
            updates = _scaled(updates, learning_rate(count))
        rounded = partial(to_either, seed) if chain.rounding.stochastic else to_nearest
        updates, _ = over_leaves(STEP, rounded, updates, {}, params, counts)
        return updates, join_state(chain, trees, count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(updates: optax.Updates, by: Any) -> optax.Updates:
    return jax.tree.map(lambda u: jnp.asarray(by, u.dtype) * u, updates)


def _needed(chain: Chain, path: leaf.KeyPath, param: Any) -> dict[str, Needed]:
    """The arrays of a leaf in the state of each transformation."""
    with leaf.noted(path):
        return needed_by_state(chain.at(leaf.names(path), param), param)


def join_state(chain: Chain, trees: Sequence[Trees], count: Any) -> Any:
    """The state of `transformation`, of the trees of each transformation and the count of steps."""
    states = {t.name: make_state(t, of) for t, of in zip(chain, trees, strict=True)}
    return state_type("ChainState", (*states, COUNT))(**states, count=count)


def split_state(chain: Chain, state: Any) -> tuple[list[dict[str, Any]], Any]:
    """What `join_state` has joined.

    Raises:
        ValueError: it is another optimizer's.
    """
    names = (*(t.name for t in chain), COUNT)
    if getattr(state, "_fields", None) != names:
        raise ValueError(
            f"the state is another optimizer's: it must have {', '.join(names)}, but it is {state!r:.200}; make one "
            f"with init"
        )
    *states, count = state
    return [trees_of(t.name, x) for t, x in zip(chain, states, strict=True)], count


def needed_by_state(chain: Chain, param: Any) -> dict[str, Needed]:
    """The arrays of a parameter in the state of each transformation, by the transformation's name and by field."""
    by_state: dict[str, dict[str, Any]] = {t.name: {} for t in chain}
    for key, stored in chain.arrays(param.shape, param.dtype.name).items():
        if key != STEP:
            owner, _, name = key.partition(".")
            by_state[owner][name] = stored
    return {owner: by_field(arrays) for owner, arrays in by_state.items()}
