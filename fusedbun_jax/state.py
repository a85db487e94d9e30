"""The arrays of states in JAX, made and checked as transformations declare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fusedbun.storage.codes import BLOCK, COUNT, Stored, computed_in
from fusedbun.storage.storage import Storage
from fusedbun.transform import Shape, Slot, State
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp

Arrays = dict[str, Any]  # of one leaf's state, by the names of their fields


def absent(param: Any) -> Stored:
    """What a leaf has where it has no such array as others have in a tree: one 0, in what it is computed in."""
    return Stored(computed_in(param.dtype.name), ())


def zeros(stored: Stored, param: Any) -> jax.Array:
    """The array at its start, split over devices along the parameter's axes as the parameter is."""
    if stored.is_full(param.ndim):
        return jnp.zeros_like(param, dtype=stored.dtype)  # keeps the parameter's sharding
    return jnp.zeros(stored.shape(param.shape), stored.dtype, device=_sharding(stored, param))


def no_steps(params: Sequence[Any]) -> jax.Array:
    """The count of steps at its start, on the devices of these parameters."""
    shardings = filter(None, (_sharding(COUNT, param) for param in params))
    device = next((NamedSharding(x.mesh, PartitionSpec()) for x in shardings), None)
    return jnp.zeros((), jnp.int32, device=device)


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
        before = stored.stacked + 1  # the stack's axes and a slice's leading one
        along_a_row = _along_a_row(param.shape[stored.stacked :], spec[before:], mesh.shape)
        return NamedSharding(mesh, PartitionSpec(*spec[:before], *along_a_row))
    return NamedSharding(mesh, PartitionSpec(*(axis if i in stored.along else None for i, axis in enumerate(spec))))


def _along_a_row(shape: Shape, trailing: tuple[Any, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """How the blocks of a row are split: as the axis behind the leading one is, where each part has whole blocks."""
    if not trailing or any(axis is not None for axis in trailing[1:]):
        return ()
    names = trailing[0] if isinstance(trailing[0], tuple) else (trailing[0],)
    parts = math.prod(sizes[name] for name in names if name is not None)
    return () if math.prod(shape[1:]) % (parts * BLOCK) else (trailing[0],)


def check_state(
    owner: str, path: leaf.KeyPath, needed: Mapping[str, Stored], param: Any, arrays: Arrays, by_dtype: bool
) -> None:
    """Raises a ValueError where the arrays of a transformation's state do not have the shapes that it declares.

    Args:
        owner: the transformation's name.
        path: the leaf's.
        needed: what the transformation declares for the leaf, by field; what it has of other fields is `absent`.
        param: the parameter, or an array of its shape.
        arrays: the state's.
        by_dtype: compare dtypes as well.
    """
    declared = {**dict.fromkeys(arrays, absent(param)), **needed}
    shapes, right = {n: x.shape for n, x in arrays.items()}, {n: x.shape(param.shape) for n, x in declared.items()}
    if wrong := [name for name in right if shapes.get(name) != right[name]]:
        raise ValueError(
            f"{owner}: the state of {leaf.title(path)} holds {_only(wrong, shapes)}, but "
            f"{_only([name for name in wrong if name in needed], right)} is needed; it belongs to other parameters or "
            f"other hyper-parameters, so make one with init"
        )
    for name, stored in declared.items():
        if by_dtype and (dtype := arrays[name].dtype.name) != stored.dtype:
            raise ValueError(
                f"{owner}: the state {name!r} of {leaf.title(path)} is {dtype}, but {stored.dtype} is "
                f"stored now; what it is stored in must not change in a run, so make one with init"
            )


def _only(names: Sequence[str], shapes: Mapping[str, Shape]) -> str:
    return str({name: shapes[name] for name in names if name in shapes} or "nothing")


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
