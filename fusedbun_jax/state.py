"""The state of transformations in JAX, made from the arrays that they declare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from fusedbun.storage.codes import BLOCK, Stored
from fusedbun.storage.storage import Storage
from fusedbun.transform import Shape, Slot, State
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp

Arrays = dict[str, jax.Array]  # of one leaf's state, by name


class TransformState(NamedTuple):
    """A transformation's state: the tree of the parameters, at every leaf with the arrays that its slots are stored in.

    A slot has one array under its own name, or codes there beside `<slot>.exponents` (`fusedbun.storage.codes`). Of a
    transformation by itself `step` counts the steps, where that is needed; a whole chain has one counter, in a state of
    its own behind the others.
    """

    slots: Any


export.register_namedtuple_serialization(TransformState, serialized_name="fusedbun_jax.TransformState")


def over_leaves(
    step: Callable[[leaf.KeyPath, Any, Any, Arrays], tuple[Any, Arrays]],
    updates: optax.Updates,
    state: TransformState,
    params: optax.Params | None,
    counter: TransformState | None = None,
) -> tuple[optax.Updates, TransformState]:
    """The updates and the state that `step(path, update, parameter or None, arrays)` gives leaf by leaf.

    A counter apart from the state is among the arrays that `step` is given, but not among those that it gives.
    """
    leaves, tree = leaf.flatten(updates)
    owners = [None] * len(leaves) if params is None else tree.flatten_up_to(params)
    stored = tree.flatten_up_to(state.slots)
    counts: list[Arrays] = [{}] * len(leaves) if counter is None else tree.flatten_up_to(counter.slots)
    stepped = [
        step(path, u, p, {**arrays, **count})
        for (path, u), p, arrays, count in zip(leaves, owners, stored, counts, strict=True)
    ]
    after = [{name: new[name] for name in arrays} for (_, new), arrays in zip(stepped, stored, strict=True)]
    return tree.unflatten([u for u, _ in stepped]), TransformState(tree.unflatten(after))


def zeros(stored: Stored, param: Any) -> jax.Array:
    """The array at its start, split over devices along the parameter's axes as the parameter is."""
    if stored.is_full(param.ndim):
        return jnp.zeros_like(param, dtype=stored.dtype)  # keeps the parameter's sharding
    return jnp.zeros(stored.shape(param.shape), stored.dtype, device=_sharding(stored, param))


def _sharding(stored: Stored, param: Any) -> NamedSharding | None:
    """The array's sharding; None where the parameter's is not known: under jit the compiler chooses then.

    That of a traced parameter is known along the explicit axes of its mesh, which `state_shardings` makes use of.
    """
    if not isinstance(param, jax.Array):
        return None
    sharding = jax.typeof(param).sharding if isinstance(param, jax.core.Tracer) else param.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    mesh, spec = sharding.mesh, sharding.spec
    if isinstance(param, jax.core.Tracer) and all(axis is None for axis in spec):
        return None
    if stored.is_by_blocks:
        return NamedSharding(mesh, PartitionSpec(*spec[:1], *_along_a_row(param.shape, spec[1:], mesh.shape)))
    return NamedSharding(mesh, PartitionSpec(*(axis if i in stored.axes else None for i, axis in enumerate(spec))))


def _along_a_row(shape: Shape, trailing: tuple[Any, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """How the blocks of a row are split: as the axis behind the leading one is, where each part has whole blocks."""
    if not trailing or any(axis is not None for axis in trailing[1:]):
        return ()
    names = trailing[0] if isinstance(trailing[0], tuple) else (trailing[0],)
    parts = math.prod(sizes[name] for name in names if name is not None)
    return () if math.prod(shape[1:]) % (parts * BLOCK) else (trailing[0],)


def check_state(
    owner: str, path: leaf.KeyPath, needed: Mapping[str, Stored], param: Any, arrays: Mapping[str, Any], by_dtype: bool
) -> None:
    """Raises a ValueError where the arrays of a transformation's state do not have the shapes that it declares.

    Args:
        owner: the transformation's name.
        path: the leaf's.
        needed: what the transformation declares.
        param: the parameter, or an array of its shape.
        arrays: the state's.
        by_dtype: compare dtypes as well.
    """
    shapes, right = {n: x.shape for n, x in arrays.items()}, {n: x.shape(param.shape) for n, x in needed.items()}
    if shapes != right:
        raise ValueError(
            f"{owner}: the state of {leaf.title(path)} holds {shapes or 'nothing'}, but {right or 'nothing'} "
            f"is needed; it belongs to other parameters or other hyper-parameters, so make one with init"
        )
    for name, stored in needed.items():
        if by_dtype and (dtype := arrays[name].dtype.name) != stored.dtype:
            raise ValueError(
                f"{owner}: the state {name!r} of {leaf.title(path)} is {dtype}, but {stored.dtype} is "
                f"stored now; what it is stored in must not change in a run, so make one with init"
            )


@jax.custom_jvp
def with_derivative_of(x: Any, value: Any) -> Any:
    """The value, with the derivative of `x`, which it is a rounding of."""
    return value


with_derivative_of.defjvp(lambda primals, tangents: (primals[1], tangents[0].astype(primals[1].dtype)))


class Differentiable(Storage):
    """Casts the arrays to their dtypes, where a rounded number has the derivative of what it was rounded from."""

    def encode(self, key: str, slot: Slot, value: Any, stored: State) -> dict[str, jax.Array]:
        new = {name: xp.astype(x, stored[name].dtype) for name, x in super().encode(key, slot, value, stored).items()}
        if jnp.issubdtype(new[key].dtype, jnp.floating):
            new[key] = with_derivative_of(value, new[key])
        return new
