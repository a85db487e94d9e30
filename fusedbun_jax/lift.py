"""The optax driver: lifts a transformation, or a whole chain, to an `optax.GradientTransformationExtraArgs`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax

from fusedbun import codes
from fusedbun.chain import Chain
from fusedbun.hyper import NonNegative, check
from fusedbun.transform import Signal, Slot, Transform
from fusedbun_jax.second_moment import WithSecondMoment

P = ParamSpec("P")
KeyPath = tuple[Any, ...]


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
        if params is None and transform.reads_param:
            raise ValueError(f"{transform.name} needs the parameters: call update(updates, state, params)")
        tree: Any
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
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


def round_to_params() -> optax.GradientTransformationExtraArgs:
    """Gives the updates the parameters' dtype in such a way that `optax.apply_updates` rounds the sum once.

        u = round(p + u) - p          for parameters of fewer bits than the updates; else unchanged

    The difference of two neighbouring numbers of a format is a number of that format (Sterbenz), so `p + u` is then
    exactly `round(p + u)` for every element that a step leaves within a factor of two of where it was.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: Any = None, **_: Any) -> Any:
        if params is not None:
            updates = jax.tree.map(_round_to, updates, params)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def from_chain(chain: Chain, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """An optimizer from a chain of transformations: `p = p - learning_rate*u`.

    Args:
        chain: the chain, `fusedbun.chain(...)`.
        learning_rate: a number in [0, inf), or a schedule.
    """
    if not callable(learning_rate):
        check("from_chain", {"learning_rate": NonNegative}, {"learning_rate": learning_rate})
    return optax.chain(*map(lift, chain), optax.scale_by_learning_rate(learning_rate), round_to_params())


def _zeros(transform: Transform, path: KeyPath, param: Any) -> dict[str, jax.Array]:
    dtype = _compute_dtype(path, "parameter", param)
    slots = _at_leaf(transform, path, param, dtype).slots(param.shape)
    return {name: _slot_zeros(slot, param, dtype) for name, slot in slots.items()}


def _slot_zeros(slot: Slot, param: Any, dtype: Any) -> jax.Array:
    stored = codes.storage_dtype(slot, dtype.name)
    if len(slot.axes) == param.ndim:
        return jnp.zeros_like(param, dtype=stored)  # keeps the parameter's sharding
    return jnp.zeros(slot.shape(param.shape), stored)


def _update(
    transform: Transform, path: KeyPath, update: Any, stored: dict[str, jax.Array], param: Any
) -> tuple[Any, dict[str, jax.Array]]:
    signal = update.signal if isinstance(update, WithSecondMoment) else Signal(update)
    u = signal.update
    dtype = _compute_dtype(path, "update", u)
    if param is not None:
        dtype = _compute_dtype(path, "parameter", param)
        if u.shape != param.shape:
            raise ValueError(f"the update of {_name(path)} has shape {u.shape}, but the parameter has {param.shape}")
        param = param.astype(dtype)
    signal = Signal(u.astype(dtype), signal.second_moment)
    if not u.size:
        return signal.update, stored
    here = _at_leaf(transform, path, u if param is None else param, dtype)
    slots = here.slots(u.shape)
    before = {name: codes.decode(jnp, slot, stored[name], dtype) for name, slot in slots.items()}
    signal, after = here.update(jnp, signal, before, param)
    new = {name: codes.encode(jnp, slot, after[name], stored[name].dtype) for name, slot in slots.items()}
    return (signal.update if signal.second_moment is None else WithSecondMoment(signal)), new


def _at_leaf(transform: Transform, path: KeyPath, param: Any, dtype: Any) -> Transform:
    """The transformation for one leaf: rules are asked, and hyper-parameters that are arrays get the leaf's dtype."""
    here = {}
    for f in fields(transform):
        value = getattr(transform, f.name)
        if callable(value):
            here[f.name] = value(tuple(map(_key_name, path)), param)
        elif isinstance(value, jax.Array):
            here[f.name] = value.astype(dtype)
    return replace(transform, **here) if here else transform


def _compute_dtype(path: KeyPath, what: str, x: Any) -> Any:
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"the {what} of {_name(path)} is {dtype.name}, but only real floating-point ones can be stepped; "
            f"leave it out with optax.masked"
        )
    return jnp.promote_types(dtype, jnp.float32)


def _round_to(update: Any, param: Any) -> Any:
    to: Any = jnp.finfo(param.dtype)
    if param.dtype.itemsize >= update.dtype.itemsize:
        return update.astype(param.dtype)
    p = param.astype(update.dtype)
    # `astype` and back may be simplified away inside jit; `reduce_precision` is kept.
    return (jax.lax.reduce_precision(p + update, to.nexp, to.nmant) - p).astype(param.dtype)


def _key_name(key: Any) -> str:
    return str(next((getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)), key))


def _name(path: KeyPath) -> str:
    return f"leaf {jax.tree_util.keystr(path)!r}" if path else "the only leaf"
