"""The optax driver: lifts a transformation to an `optax.GradientTransformationExtraArgs`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, ClassVar, ParamSpec

import jax
import jax.numpy as jnp
import optax

from fusedbun.chain import advance, arrays_of, entries_of, slots_of
from fusedbun.hyper import NonNegative, check
from fusedbun.storage.codes import STEP, Stored
from fusedbun.storage.rounding import Rounding
from fusedbun.transform import Array, Namespace, Signal, State, Transform
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp
from fusedbun_jax.layout import (
    COUNT,
    apart,
    by_field,
    count_of,
    counts,
    field_of,
    make_state,
    over_leaves,
    start,
    trees_of,
)
from fusedbun_jax.rounding import SEED
from fusedbun_jax.second_moment import WithSecondMoment
from fusedbun_jax.state import Arrays, Differentiable, check_state, no_steps

P = ParamSpec("P")


def lift(transform: Transform, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """A transformation as one of optax's, to be chained with any of them.

    Its updates are float32 (float64 for float64 parameters) whatever the parameters' dtype, so that nothing is
    rounded between one transformation and the next. An accumulator's updates go to `rms_scale` directly: the second
    moment travels with them in an object that other transformations refuse.

    Args:
        transform: the transformation. A hyper-parameter declared as an axis may be a rule `(path, param) -> int`,
            where `path` is the tuple of the names that lead to the leaf.
        seed: any integer; with the leaf's path, joined by dots, and the number of steps it decides the noise with
            which state of fewer bits is rounded.
    """
    check(transform.name, SEED, {"seed": seed})
    counted = counts(transform)

    def init(params: optax.Params) -> Any:
        leaves, tree = leaf.flatten(params)
        made = [leaf.floating(path, "parameter", param) for path, param in leaves]
        needed = [by_field(_at_leaf(transform, path, *x)[1]) for (path, _), x in zip(leaves, made, strict=True)]
        params = [param for param, _ in made]
        return make_state(transform, start(transform, tree, params, needed), no_steps(params) if counted else None)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, Any]:
        trees = trees_of(transform.name, state)
        count = count_of(trees.pop(COUNT, None)) if counted else None
        step, counts = partial(update_leaf, transform, seed), apart(count, len(jax.tree.leaves(updates)))
        updates, trees = over_leaves(transform.name, step, updates, trees, params, counts)
        return updates, make_state(transform, trees, None if count is None else count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def lifted(transform: Callable[P, Transform]) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """The function that takes a transformation's hyper-parameters and returns it lifted."""

    @wraps(transform, updated=())
    def make(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        return lift(transform(*args, **kwargs))

    signature = inspect.signature(transform)
    # to mypy a function has no signature of its own to set
    make.__signature__ = signature.replace(return_annotation=optax.GradientTransformationExtraArgs)  # type: ignore[attr-defined]
    return make


@dataclass(frozen=True)
class Descend(Transform):
    """`u = -learning_rate*u`, in the precision of the chain before it, and without a second moment."""

    name: ClassVar[str] = "scale_by_learning_rate"
    learning_rate: NonNegative

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        return Signal(-self.learning_rate * signal.update), state


def update_leaf(
    transform: Transform, seed: int, path: leaf.KeyPath, update: Any, param: Any, arrays: Arrays, count: Any
) -> tuple[Any, Arrays]:
    """One leaf's update, and its state after it.

    Args:
        transform: the transformation, with its rules.
        seed: of the noise.
        path: the leaf's.
        update: what the transformation before it hands on.
        param: the parameter, or None.
        arrays: its state's, by field.
        count: the steps so far; None where nothing asks for them.
    """
    if param is None and transform.reads_param:
        raise ValueError(f"{transform.name} needs the parameters: call update(updates, state, params)")
    signal = update.signal if isinstance(update, WithSecondMoment) else Signal(update)
    u, dtype = leaf.floating(path, "update", signal.update)
    like = u
    if param is not None:
        like, dtype = leaf.floating(path, "parameter", param)
    leaf.check_shape(path, u, like)
    u = u.astype(dtype)
    if not u.size:
        return u, arrays
    transform, needed = _at_leaf(transform, path, like, dtype)
    if param is None and any(slot.code == "param" for slot in transform.slots(like.shape).values()):
        raise ValueError(
            f"{transform.name} keeps state in the parameters' dtype: call update(updates, state, params) with them"
        )
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    check_state(transform.name, path, by_field(needed), like, arrays, by_dtype=param is not None)
    before = {f"{transform.name}.{key}": arrays[field_of(key)] for key in needed if key != STEP}
    if STEP in needed:
        before[STEP] = jnp.broadcast_to(count, needed[STEP].shape(like.shape))
    storage = Differentiable(xp, Rounding(seed=seed, name=leaf.name(path)), u, like.dtype.name)
    p = None if param is None else like.astype(dtype)
    signal, after = advance(transform, storage, signal._replace(update=u), before, p)
    u = signal.update if signal.second_moment is signal.root is None else WithSecondMoment(signal)
    return u, {**arrays, **{field_of(key): x for key, x in entries_of(transform, after).items()}}


def _at_leaf(transform: Transform, path: leaf.KeyPath, param: Any, dtype: Any) -> tuple[Transform, dict[str, Stored]]:
    """The transformation for one leaf, its arrays among the hyper-parameters in the leaf's dtype, and its state's."""
    with leaf.noted(path):
        transform = transform.at(leaf.names(path), param)
        arrays = {name: jnp.asarray(x, dtype) for name, x in vars(transform).items() if isinstance(x, jax.Array)}
        transform = replace(transform, **arrays) if arrays else transform
        return transform, arrays_of(slots_of(transform, param.shape), param.dtype.name, transform.counts)
