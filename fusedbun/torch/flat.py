"""Parameters that FSDP1 has flattened: several in one vector, or one's share of it, so that their axes are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fusedbun.chain import Chain, Slice
from fusedbun.compiler.cpp.native import structure
from fusedbun.compiler.graph import REDUCTIONS, UnschedulableError
from fusedbun.compiler.trace import trace, used

# What a rule that does not look at a parameter's shape says the same of.
_SHAPES = ((6,), (4, 6), (5, 3, 2, 7))
_READERS: dict[Any, list[str]] = {}  # by what decides the code


def is_of_fsdp1(param: Tensor) -> bool:
    """Whether torch's FullyShardedDataParallel has put it, or what it was made of, into a flat parameter."""
    return getattr(param, "_fsdp_flattened", False)


def check_axes(owner: str, name: str, path: Sequence[str], group: Chain, chain: Chain, param: Tensor) -> None:
    """Raises a TypeError where a parameter's axes are gone, and the chain that steps it needs them.

    Where FSDP1 shards nothing (NO_SHARD, use_orig_params=True) parameters have their axes; that those of one axis have
    theirs too does not show.

    Args:
        owner: the optimizer's class.
        name: what a message calls the parameter.
        path: the names that lead to it.
        group: the chain of its param group, with its rules.
        chain: its own.
        param: the parameter.
    """
    if not is_of_fsdp1(param) or param.ndim > 1:
        return
    if readers := [*(["stacked"] if chain.stacked else []), *_of_shapes(group, path, param), *_of_axes(chain)]:
        raise TypeError(
            f"{owner} cannot step {name}, which FullyShardedDataParallel has flattened: {', '.join(readers)} must see "
            f"a parameter's axes; shard the model with torch.distributed.fsdp.fully_shard, which keeps them, or take "
            f"an optimizer that steps each element by itself, such as DecoupledLionW or ScaledOptum"
        )


def _of_shapes(chain: Chain, path: Sequence[str], param: Tensor) -> list[str]:
    """The hyper-parameters that are rules which look at the shape of the parameter."""
    if not chain.has_rules:
        return []
    asked = [[t.at(tuple(path), Slice(param, shape)) for t in chain] for shape in _SHAPES]
    return [t.name for t, *others in zip(*asked, strict=True) if any(other != t for other in others)]


def _of_axes(chain: Chain) -> list[str]:
    """The transformations that keep something for some of the axes, or reduce along them."""
    try:
        key = structure(chain)
    except UnschedulableError:
        return [t.name for t in chain]  # nothing is known of it
    if key not in _READERS:
        found: list[str] = []
        known = 0
        for n, transform in enumerate(chain, 1):
            try:
                program = trace(replace(chain, transforms=chain.transforms[:n], stacked=0), 2)
            except UnschedulableError:
                found.append(transform.name)
                break
            reads = sum(v.op in (*REDUCTIONS, "count") for v in used(program.outputs.values()))
            # what makes a second moment has reductions that only show where it is read
            is_anothers = transform.reads_second_moment and chain.transforms[n - 2].name in found
            keeps = any(len(slot.axes) == 1 for slot in transform.slots((4, 6)).values())
            if keeps or (reads > known and not is_anothers):
                found.append(transform.name)
            known = reads
        _READERS[key] = found
    return _READERS[key]
