"""The tensors of a tree: names, shapes and dtypes, from arrays and from shapes alone."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from fusedbun.hyper import dtype_name
from fusedbun.tools.plan.sizes import BITS
from fusedbun.transform import Shape

Role = Literal["trained", "frozen", "buffer"]
_MOST_ELEMENTS = 1 << 59  # so that the bytes of a tensor, and of its state, are numbers that a machine counts with
_KINDS = (
    "a torch module, a tree of arrays, a shape such as (768, 768), a list or mapping of shapes, each alone or as a "
    "pair (shape, dtype), or the path of a file"
)


class Tensor(NamedTuple):
    """A tensor of a model.

    Args:
        name: its name.
        shape: its shape.
        dtype: its dtype's name.
        role: "trained"; "frozen" for a parameter that no optimizer steps; "buffer" for what is no parameter.
    """

    name: str
    shape: Shape
    dtype: str
    role: Role = "trained"

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return -(-self.elements * BITS[self.dtype] // 8)


def of_tree(tree: Any, path: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """The tensors of a tree of shapes, pairs (shape, dtype), and what has a shape and a dtype."""
    name = ".".join(path) or "the tensor"
    if tree is None:
        return
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield of_array(name, tree)
    elif _is_shape(tree) and (path or tree):  # () is the shape of a single number, but not a model
        yield Tensor(name, checked_shape(name, tree), "float32")
    elif _is_pair(tree):
        shape, dtype = tree
        yield Tensor(name, checked_shape(name, shape), checked_dtype(name, dtype))
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from of_tree(child, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for index, child in enumerate(tree):
            yield from of_tree(child, (*path, str(index)))
    else:
        yield from _of_registered(tree, path)


def _of_registered(tree: Any, path: tuple[str, ...]) -> Iterator[Tensor]:
    """The tensors of a node that only JAX can take apart."""
    jax = sys.modules.get("jax")
    leaves = jax.tree_util.tree_leaves_with_path(tree) if jax else []
    for keys, leaf in leaves:
        here = (*path, *(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys))
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise _not_understood(here, leaf)
        yield of_array(".".join(here) or "the tensor", leaf)
    if not leaves and not jax:
        raise _not_understood(path, tree)


def _not_understood(path: tuple[str, ...], found: Any) -> TypeError:
    where = f"at {'.'.join(path)!r} there" if path else "it"
    return TypeError(f"a model must be {_KINDS}, but {where} is {found!r:.200} ({type(found).__name__})")


def of_array(name: str, array: Any) -> Tensor:
    """The tensor of an array, or of anything with a shape and a dtype."""
    try:
        shape = tuple(array.shape)
    except RuntimeError as error:  # a lazy module's
        raise ValueError(f"{name!r} has no shape yet; give its module a batch first") from error
    return Tensor(name, checked_shape(name, shape), checked_dtype(name, array.dtype))


def _is_shape(value: Any) -> bool:
    """Whether it is a tuple or list of whole numbers, which need not be valid."""
    return type(value) in (tuple, list) and all(hasattr(n, "__index__") and not hasattr(n, "ndim") for n in value)


def _is_pair(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not _is_shape(value[0]):
        return False
    return isinstance(value[1], str) or dtype_name(value[1]) is not None


def checked_shape(name: str, shape: Any) -> Shape:
    """The shape as a tuple; raises a ValueError where it is none of a tensor."""
    sizes = tuple(map(operator.index, shape))
    if any(n < 0 or isinstance(size, bool) for n, size in zip(sizes, shape, strict=True)):
        raise ValueError(f"the shape of {name!r} must be of whole numbers from 0 up, but it is {sizes}")
    if math.prod(n or 1 for n in sizes) > _MOST_ELEMENTS:
        raise ValueError(f"{name!r} must have at most 2**59 elements, but its shape is {sizes}"[:300])
    return sizes


def checked_dtype(name: str, dtype: Any) -> str:
    """The dtype's name; raises a ValueError where it is none that is known."""
    found = dtype_name(dtype) or str(dtype)
    if found not in BITS:
        raise ValueError(f"the dtype of {name!r} must be one of {', '.join(BITS)}, but it is {found!r:.100}")
    return found
