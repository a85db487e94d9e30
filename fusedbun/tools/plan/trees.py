"""The tensors of a tree: names, shapes and dtypes, from arrays and from shapes alone."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from fusedbun.hyper import dtype_name
from fusedbun.tools.plan.sizes import BITS, size_of
from fusedbun.transform import Shape

Role = Literal["trained", "frozen", "buffer"]
_MOST_ELEMENTS = 1 << 59  # so that the bytes of a tensor, and of its state, are numbers that a machine counts with
_KINDS = (
    "a torch module, a tree of arrays, a shape such as (768, 768), a list or mapping of shapes, each alone or as a "
    "pair (shape, dtype), or the path of a file"
)


class Tensor(NamedTuple):
    """A tensor of a model."""

    name: str
    shape: Shape
    dtype: str
    role: Role = "trained"  # "frozen" for a parameter that no optimizer steps; "buffer" for what is no parameter

    @classmethod
    def of(cls, name: str, shape: Iterable[Any], dtype: Any = "float32", role: Role = "trained") -> Tensor:
        """A tensor whose shape and dtype are checked; raises a ValueError where they are none of a tensor."""
        shape = tuple(shape)
        sizes = tuple(map(operator.index, shape))
        if any(n < 0 or isinstance(size, bool) for n, size in zip(sizes, shape, strict=True)):
            raise ValueError(f"the shape of {name!r} must be of whole numbers from 0 up, but it is {sizes}")
        if math.prod(n or 1 for n in sizes) > _MOST_ELEMENTS:
            raise ValueError(f"{name!r} must have at most 2**59 elements, but its shape is {sizes}"[:300])
        found = dtype_name(dtype) or str(dtype)
        if found not in BITS:
            raise ValueError(f"the dtype of {name!r} must be one of {', '.join(BITS)}, but it is {found!r:.100}")
        return cls(name, sizes, found, role)

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return size_of(self.shape, self.dtype)


def is_module(model: Any) -> bool:
    """Whether it is torch's, which is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def of_tree(tree: Any, path: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """The tensors of a torch module, or of a tree of shapes, pairs (shape, dtype), and what has a shape and a dtype."""
    name = ".".join(path) or "the tensor"
    if not path and is_module(tree):
        for part, param in tree.named_parameters():
            yield _of_array(part, param, "trained" if param.requires_grad else "frozen")
        for part, buffer in tree.named_buffers():
            yield _of_array(part, buffer, "buffer")
    elif _is_array(tree):
        yield _of_array(name, tree)
    elif _is_shape(tree) and (path or tree):  # () is the shape of a single number, but not a model
        yield Tensor.of(name, tree)
    elif _is_pair(tree):
        yield Tensor.of(name, *tree)
    elif isinstance(tree, (Mapping, list, tuple)):
        for key, child in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from of_tree(child, (*path, str(key)))
    elif tree is not None:
        yield from _of_registered(tree, path)


def _of_registered(tree: Any, path: tuple[str, ...]) -> Iterator[Tensor]:
    """The tensors of a node that only JAX can take apart."""
    jax = sys.modules.get("jax")
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree) if jax else [((), tree)]:
        here = (*path, *(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys))
        if not _is_array(leaf):
            where = f"at {'.'.join(here)!r} there" if here else "it"
            raise TypeError(f"a model must be {_KINDS}, but {where} is {leaf!r:.200} ({type(leaf).__name__})")
        yield _of_array(".".join(here) or "the tensor", leaf)


def _of_array(name: str, array: Any, role: Role = "trained") -> Tensor:
    try:
        shape = tuple(array.shape)
    except RuntimeError as error:  # a lazy module's
        raise ValueError(f"{name!r} has no shape yet; give its module a batch first") from error
    return Tensor.of(name, shape, array.dtype, role)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_shape(value: Any) -> bool:
    """Whether it is a tuple or list of whole numbers, which need not be valid."""
    return type(value) in (tuple, list) and all(hasattr(n, "__index__") and not hasattr(n, "ndim") for n in value)


def _is_pair(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not _is_shape(value[0]):
        return False
    return isinstance(value[1], str) or dtype_name(value[1]) is not None
