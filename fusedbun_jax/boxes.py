"""Parameters that lie in boxes: Flax keeps names of mesh axes beside an array, in linen's metadata or nnx's variables.

A box is known by what it can do, for Flax need not be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fusedbun.storage.codes import Stored

_OF_VARIABLES = ("out_sharding", "optimizer_sharding")  # what of nnx's metadata names mesh axes


def fitted(tree: Any, stored: Sequence[Stored]) -> Any:
    """The tree of a state's arrays in the parameters' boxes, with those names of axes that an array has numbers along.

    Args:
        tree: the tree.
        stored: what each of its leaves is.
    """
    structure: Any
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_box)
    each = iter(stored)
    of = [[next(each) for _ in jax.tree.leaves(node)] for node in nodes]  # none in the box of a masked parameter
    return structure.unflatten(
        [_fitted(node, x[0]) if x and _is_box(node) else node for node, x in zip(nodes, of, strict=True)]
    )


def _is_box(node: Any) -> bool:
    return _is_variable(node) or (hasattr(node, "replace_boxed") and hasattr(node, "names"))


def _is_variable(node: Any) -> bool:
    return hasattr(node, "get_metadata") and hasattr(node, "set_metadata")


def _fitted(box: Any, stored: Stored) -> Any:
    if not _is_variable(box):
        return dataclasses.replace(box, names=spec_along(stored, box.names))
    metadata = box.get_metadata()
    for key in _OF_VARIABLES:
        if metadata.get(key) is not None:
            box.set_metadata(key, spec_along(stored, metadata[key]))
    return box


def spec_along(stored: Stored, spec: Any) -> Any:
    """What names the mesh axis, or none, of each axis of a parameter, for one of its state's arrays."""
    axes = stored.along[: stored.stacked + 1] if stored.is_by_blocks else stored.along
    kept = (name if axis in axes else None for axis, name in enumerate(spec))
    return PartitionSpec(*kept) if isinstance(spec, PartitionSpec) else tuple(kept)
