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
from jax.sharding import NamedSharding, PartitionSpec

from fusedbun.chain import Stacked, advance, arrays_of, entries_of, slice_of, slots_of, stacked_at
from fusedbun.hyper import NonNegative, check, hints
from fusedbun.storage.codes import STEP, Stored
from fusedbun.storage.rounding import Rounding
from fusedbun.transform import Array, Namespace, Signal, State, Transform
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp
from fusedbun_jax.injected import choosing, injectable
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
from fusedbun_jax.rounding import SEED, as_word
from fusedbun_jax.second_moment import WithSecondMoment
from fusedbun_jax.state import Arrays, Differentiable, check_state, no_steps

P = ParamSpec("P")
STACKED = {"stacked": Stacked}  # as `fusedbun.hyper.check` reads it


def lift(
    transform: Transform, seed: int | jax.Array = 0, stacked: Stacked = 0
) -> optax.GradientTransformationExtraArgs:
    """A transformation as one of optax's, to be chained with any of them.

    Its updates are float32 (float64 for float64 parameters) whatever the parameters' dtype, so that nothing is
    rounded between one transformation and the next. An accumulator's updates go to `rms_scale` directly: the second
    moment travels with them in an object that other transformations refuse.

    Args:
        transform: the transformation. A hyper-parameter declared as an axis may be a rule `(path, param) -> int`,
            where `path` is the tuple of the names that lead to the leaf.
        seed: any integer, or a 0-d array of one; with the leaf's path, joined by dots, and the number of steps it
            decides the noise with which state of fewer bits is rounded.
        stacked: how many leading axes make a parameter a stack, each slice of which is stepped as a parameter of its
            own: a number, or a rule `(path, param) -> int`.
    """
    check(transform.name, {**SEED, **STACKED}, {"seed": seed, "stacked": stacked})
    word = as_word(seed)
    counted = counts(transform)

    def init(params: optax.Params) -> Any:
        leaves, tree = leaf.flatten(params)
        made = [leaf.floating(path, "parameter", param) for path, param in leaves]
        at_leaves = [_at_leaf(transform, path, *x, stacked) for (path, _), x in zip(leaves, made, strict=True)]
        needed = [by_field(arrays) for _, arrays, _ in at_leaves]
        params = [param for param, _ in made]
        return make_state(transform, start(transform, tree, params, needed), no_steps(params) if counted else None)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, Any]:
        trees = trees_of(transform.name, state)
        count = count_of(trees.pop(COUNT, None)) if counted else None
        step, counts = partial(update_leaf, transform, word, stacked), apart(count, len(jax.tree.leaves(updates)))
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
    return injectable(choosing(hints(transform)))(make)


@dataclass(frozen=True)
class Descend(Transform):
    """`u = -learning_rate*u`, in the precision of the chain before it, and without a second moment."""

    name: ClassVar[str] = "scale_by_learning_rate"
    learning_rate: NonNegative

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        return Signal(-self.learning_rate * signal.update), state


def update_leaf(
    transform: Transform,
    seed: Any,
    stacked: Stacked,
    path: leaf.KeyPath,
    update: Any,
    param: Any,
    arrays: Arrays,
    count: Any,
) -> tuple[Any, Arrays]:
    """One leaf's update, and its state after it.

    Args:
        transform: the transformation, with its rules.
        seed: of the noise.
        stacked: how many of its leading axes are a stack's, or a rule.
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
    transform, needed, stack = _at_leaf(transform, path, like, dtype, stacked)
    if param is None and any(slot.code == "param" for slot in transform.slots(like.shape[stack:]).values()):
        raise ValueError(
            f"{transform.name} keeps state in the parameters' dtype: call update(updates, state, params) with them"
        )
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    check_state(transform.name, path, by_field(needed), like, arrays, by_dtype=param is not None)
    before = {f"{transform.name}.{key}": arrays[field_of(key)] for key in needed if key != STEP}
    counter = {STEP: count} if STEP in needed else {}
    rounding = Rounding(seed=seed, name=leaf.name(path))

    def of_slice(place: tuple[Any, ...], signal: Signal, before: Arrays, p: Any) -> tuple[Signal, Arrays]:
        storage = Differentiable(xp, replace(rounding, place=place), signal.update, like.dtype.name)
        signal, after = advance(transform, storage, signal, {**before, **counter}, p)
        return signal, entries_of(transform, after)

    p = None if param is None else like.astype(dtype)
    signal, after = over_stack(of_slice, like.shape[:stack])(signal._replace(update=u), before, p)
    u = signal.update if signal.second_moment is signal.root is None else WithSecondMoment(signal)
    return u, {**arrays, **{field_of(key): x for key, x in after.items()}}


def _at_leaf(
    transform: Transform, path: leaf.KeyPath, param: Any, dtype: Any, stacked: Stacked
) -> tuple[Transform, dict[str, Stored], int]:
    """The transformation for one leaf, the arrays of its state, and how many of the leaf's axes are a stack's.

    Arrays among the hyper-parameters are in the leaf's dtype.
    """
    with leaf.noted(path):
        stack = stacked_at(stacked, leaf.names(path), param)
        of = slice_of(param, stack)
        transform = transform.at(leaf.names(path), of)
        arrays = {name: jnp.asarray(x, dtype) for name, x in vars(transform).items() if isinstance(x, jax.Array)}
        transform = replace(transform, **arrays) if arrays else transform
        slots = slots_of(transform, of.shape)
        return transform, arrays_of(slots, param.dtype.name, transform.counts, stack), stack


def over_stack(function: Callable[..., Any], sizes: tuple[int, ...], place: tuple[Any, ...] = ()) -> Callable[..., Any]:
    """What gives `function(place, *trees)` for every slice along the leading axes, which have these sizes, at once."""
    if not sizes:
        return partial(function, place)

    def over_axis(*trees: Any) -> Any:
        places = jnp.arange(sizes[0], dtype=jnp.int32)
        sharding = jax.typeof(jax.tree.leaves(trees)[0]).sharding
        if any(sharding.spec[:1]):  # along an explicit axis of a mesh, which all that is mapped must lie along
            places = jax.sharding.reshard(places, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])))
        return jax.vmap(lambda at, *of: over_stack(function, sizes[1:], (*place, at))(*of))(places, *trees)

    return over_axis
