"""The optax driver: lifts a transformation to an `optax.GradientTransformationExtraArgs`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ClassVar, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fusedbun import codes
from fusedbun.hyper import NonNegative
from fusedbun.transform import Array, Namespace, Signal, Slot, State, Transform
from fusedbun_jax import leaf
from fusedbun_jax.second_moment import WithSecondMoment

P = ParamSpec("P")


class TransformState(NamedTuple):
    """A lifted transformation's state: the tree of the parameters, with `{slot: array}` at every leaf."""

    slots: Any


def lift(transform: Transform) -> optax.GradientTransformationExtraArgs:
    """A transformation as one of optax's, to be chained with any of them.

    Its updates are float32 (float64 for float64 parameters) whatever the parameters' dtype, so that nothing is
    rounded between one transformation and the next. An accumulator's updates go to `rms_scale` directly: the second
    moment travels with them in an object that other transformations refuse.

    Args:
        transform: the transformation. A hyper-parameter declared as an axis may be a rule `(path, param) -> int`,
            where `path` is the tuple of the names that lead to the leaf.
    """

    def init(params: optax.Params) -> TransformState:
        return TransformState(jax.tree_util.tree_map_with_path(lambda path, p: _zeros(transform, path, p), params))

    def update(
        updates: optax.Updates, state: TransformState, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, TransformState]:
        tree: Any
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        if leaves and params is None and transform.reads_param:
            raise ValueError(f"{transform.name} needs the parameters: call update(updates, state, params)")
        slots = tree.flatten_up_to(state.slots)
        owners = [None] * len(leaves) if params is None else tree.flatten_up_to(params)
        new = [_update(transform, path, u, s, p) for (path, u), s, p in zip(leaves, slots, owners, strict=True)]
        return tree.unflatten([u for u, _ in new]), TransformState(tree.unflatten([s for _, s in new]))

    return optax.GradientTransformationExtraArgs(init, update)


def lifted(transform: Callable[P, Transform]) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """The function that takes a transformation's hyper-parameters and returns it lifted."""

    @wraps(transform, updated=())
    def make(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        return lift(transform(*args, **kwargs))

    signature = inspect.signature(transform)
    make.__signature__ = signature.replace(return_annotation=optax.GradientTransformationExtraArgs)  # type: ignore[attr-defined]
    return make


@dataclass(frozen=True)
class Descend(Transform):
    """`u = -learning_rate*u`, in the precision of the chain before it, and without a second moment."""

    name: ClassVar[str] = "scale_by_learning_rate"
    learning_rate: NonNegative

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        return Signal(-self.learning_rate * signal.update), state


def _zeros(transform: Transform, path: leaf.KeyPath, param: Any) -> dict[str, jax.Array]:
    param = leaf.as_array(path, "parameter", param)
    dtype = leaf.computed_in(path, "parameter", param)
    _, slots = _at_leaf(transform, path, param, dtype)
    return {name: _slot_zeros(slot, param, dtype) for name, slot in slots.items()}


def _slot_zeros(slot: Slot, param: Any, dtype: Any) -> jax.Array:
    stored = codes.storage_dtype(slot, dtype.name)
    if len(slot.axes) == param.ndim:
        return jnp.zeros_like(param, dtype=stored)  # keeps the parameter's sharding
    return jnp.zeros(slot.shape(param.shape), stored, device=_sharding(slot, param))


def _sharding(slot: Slot, param: Any) -> NamedSharding | None:
    """Where a slot that spans some of the parameter's axes lies: split along these as the parameter is."""
    if not isinstance(param, jax.Array) or isinstance(param, jax.core.Tracer):
        return None
    if not isinstance(param.sharding, NamedSharding):
        return None
    mesh, spec = param.sharding.mesh, param.sharding.spec
    return NamedSharding(mesh, PartitionSpec(*(axis if i in slot.axes else None for i, axis in enumerate(spec))))


def _update(
    transform: Transform, path: leaf.KeyPath, update: Any, stored: dict[str, jax.Array], param: Any
) -> tuple[Any, dict[str, jax.Array]]:
    signal = update.signal if isinstance(update, WithSecondMoment) else Signal(update)
    u = leaf.as_array(path, "update", signal.update)
    dtype = leaf.computed_in(path, "update", u)
    if param is not None:
        param = leaf.as_array(path, "parameter", param)
        dtype = leaf.computed_in(path, "parameter", param)
        if u.shape != param.shape:
            raise ValueError(
                f"the update of {leaf.title(path)} has shape {u.shape}, but the parameter has {param.shape}"
            )
        param = param.astype(dtype)
    u = u.astype(dtype)
    if not u.size:
        return u, stored
    here, slots = _at_leaf(transform, path, u if param is None else param, dtype)
    _check_state(transform, path, {name: slot.shape(u.shape) for name, slot in slots.items()}, stored)
    before = {name: codes.decode(jnp, slot, stored[name], dtype) for name, slot in slots.items()}
    signal, after = here.update(jnp, Signal(u, signal.second_moment), before, param)
    new = {name: codes.encode(jnp, slot, after[name], stored[name].dtype) for name, slot in slots.items()}
    return (signal.update if signal.second_moment is None else WithSecondMoment(signal)), new


def _at_leaf(transform: Transform, path: leaf.KeyPath, param: Any, dtype: Any) -> tuple[Transform, Mapping[str, Slot]]:
    """The transformation for one leaf, its arrays among the hyper-parameters in the leaf's dtype, and its slots."""
    try:
        here = transform.at(leaf.names(path), param)
        arrays = {name: jnp.asarray(value, dtype) for name, value in vars(here).items() if isinstance(value, jax.Array)}
        here = replace(here, **arrays) if arrays else here
        return here, here.slots(param.shape)
    except (TypeError, ValueError) as error:
        error.add_note(f"This is at {leaf.title(path)}.")
        raise


def _check_state(
    transform: Transform, path: leaf.KeyPath, needed: dict[str, tuple[int, ...]], stored: dict[str, jax.Array]
) -> None:
    kept = {name: x.shape for name, x in stored.items()}
    if kept != needed:
        raise ValueError(
            f"{transform.name}: the state of {leaf.title(path)} holds {kept or 'nothing'}, but {needed or 'nothing'} "
            f"is needed; it belongs to other parameters or other hyper-parameters, so make one with init"
        )
