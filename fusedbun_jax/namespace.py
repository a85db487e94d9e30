"""JAX's functions as the namespace that rules, rounding and codes are written over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fusedbun import namespace as in_numpy
from fusedbun.operations import functions_of
from fusedbun.storage import codes
from fusedbun.transform import Array

globals().update(functions_of(jnp))
astype, max, mean, min, sum = jnp.astype, jnp.max, jnp.mean, jnp.min, jnp.sum
# written with methods that JAX's arrays have as well
single, real, whole, block_max = in_numpy.single, in_numpy.real, in_numpy.whole, in_numpy.block_max
from_blocks, pack = codes.from_blocks, codes.pack


@jax.custom_jvp
def sqrt(x: Array, /) -> Array:
    """The root, whose derivative at 0 is 0: an infinite one makes NaN of all that it is multiplied by 0 for."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = sqrt(*primals)
    is_zero = root == 0
    return root, jnp.where(is_zero, 0.0, 0.5 / jnp.where(is_zero, 1.0, root)) * tangents[0]


def bits(x: Array, /) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_bits(word: Array, /) -> Array:
    return jax.lax.bitcast_convert_type(word, jnp.float32)


def index(like: Array, axes: Sequence[int], /) -> list[Array]:
    return [jax.lax.broadcasted_iota(jnp.int32, codes.along(like.shape, i), i) for i in axes]


def to_blocks(x: Array, /) -> Array:
    return codes.to_blocks(x, lambda rows, n: jnp.pad(rows, ((0, 0), (0, n))))


def unpack(stored: Array, bits: int, /) -> Array:
    return codes.unpack(whole(stored), bits, jnp.concatenate)


def __getattr__(name: str) -> Any:
    """What else a rule of one's own takes from jax.numpy."""
    return getattr(jnp, name)
