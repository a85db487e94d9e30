"""One leaf of a tree: its name, its array, and the precision it is computed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KeyPath = tuple[Any, ...]


def flatten(tree: Any) -> tuple[list[tuple[KeyPath, Any]], Any]:
    """The leaves of a tree with their paths, and its structure."""
    return jax.tree_util.tree_flatten_with_path(tree)


def names(path: KeyPath) -> tuple[str, ...]:
    """The names that lead to a leaf.

    The `value` of an nnx variable is none of them: nnx.Optimizer gives `init` the variables, but `update` their values.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(str(next((getattr(k, a) for a in ("key", "name", "idx") if hasattr(k, a)), k)) for k in path)


def name(path: KeyPath) -> str:
    """The parameter's name, which decides the noise of its rounding: the names that lead to it, joined by dots."""
    return ".".join(names(path))


def title(path: KeyPath) -> str:
    """A leaf as messages name it."""
    return f"leaf {jax.tree_util.keystr(path)!r}" if path else "the only leaf"


@contextmanager
def noted(path: KeyPath) -> Iterator[None]:
    """Adds to a TypeError or ValueError at which leaf it is."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(f"This is at {title(path)}.")
        raise


def as_array(path: KeyPath, what: str, x: Any) -> Any:
    """The leaf as a JAX array.

    Raises:
        TypeError: it is no array and no number.
        ValueError: under `shard_map` it is not the same on all devices.
    """
    if isinstance(x, (int, float, complex, np.ndarray, np.generic)):
        return jnp.asarray(x)
    if not hasattr(x, "shape"):
        raise TypeError(f"the {what} of {title(path)} must be an array, but it is {x!r} ({type(x).__name__})")
    if axes := _varying_over(x):
        raise ValueError(
            f"the {what} of {title(path)} varies over {', '.join(map(repr, axes))} of the mesh: in shard_map a "
            f"device sees its own part only, but an optimizer needs the whole for its statistics and its noise. Step "
            f"under jax.jit with sharded arrays instead (fusedbun_jax.state_shardings), or give shard_map whole "
            f"parameters and state (in_specs=P()) and average the gradients (jax.lax.pmean)"
        )
    return x


def _varying_over(x: Any) -> list[str]:
    """The axes of a mesh along which the devices of `shard_map` have different values; with check_vma=False, none."""
    if not isinstance(x, jax.core.Tracer):
        return []
    kind = jax.typeof(x)
    kind = getattr(kind, "manual_axis_type", kind)  # from JAX 0.10 on it holds what the type itself held
    axes: frozenset[str] = kind.varying if hasattr(kind, "varying") else kind.vma
    return sorted(axes)


def floating(path: KeyPath, what: str, x: Any) -> tuple[Any, Any]:
    """The leaf as a JAX array, and the dtype it is computed in: float64 for float64, else float32.

    Raises:
        TypeError, ValueError: it cannot be stepped (`as_array`), or is not real floating-point.
    """
    x = as_array(path, what, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"the {what} of {title(path)} is {x.dtype.name}, but only real floating-point ones can be stepped; "
            f"leave it out with optax.masked"
        )
    return x, x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.dtype(jnp.float32)


def check_shape(path: KeyPath, update: Any, param: Any) -> None:
    """Raises a ValueError for an update that does not have its parameter's shape."""
    if update.shape != param.shape:
        raise ValueError(f"the update of {title(path)} has shape {update.shape}, but the parameter has {param.shape}")
