"""Which implementation steps which parameter, and a step of them all.

    kernel       generated code, on the CPU
    compiled     torch.compile of the definition
    tiles        the schedule of the kernel, run tile by tile with eager torch
    definition   the rules as they are written, a whole parameter at a time

All of them do what the definition says, and differ in speed and memory only. The definition serves what is no plain
array of numbers: sparse gradients, tensor subclasses, and empty parameters. DTensors are stepped part by part, with
kernels or by tiles (`fusedbun.torch.sharding.parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.compiler.cpp.native import KernelError
from fusedbun.compiler.graph import UnplannableError
from fusedbun.metrics import Products
from fusedbun.torch import kernels, metrics, tiles
from fusedbun.torch.definition import Leaf, compilable, learning_rate, step_leaf, step_leaves
from fusedbun.torch.kernels import Batch, Described
from fusedbun.torch.overlap import Written, check_overlap
from fusedbun.torch.prepare import Group, Place, Prepared, prepare, ready
from fusedbun.torch.sharding import parts as sharded
from fusedbun.torch.sharding.placement import is_sharded

if TYPE_CHECKING:
    from fusedbun.torch.driver import TransformOptimizer

KERNEL, COMPILED, TILES, DEFINITION = IMPLEMENTATIONS = ("kernel", "compiled", "tiles", "definition")
SHARDED = "sharded"  # what steps DTensors
# By the type of device, the best first. CUDA has no kernels in use yet.
BEST = {"cpu": (KERNEL, TILES, DEFINITION), "cuda": (COMPILED, TILES, DEFINITION)}
ELSEWHERE = (TILES, DEFINITION)


class Chosen(NamedTuple):
    """What steps a parameter: an implementation and what it found for this parameter."""

    prepared: Prepared
    implementation: str
    found: Any


def check_implementation(owner: str, name: str | None) -> None:
    """Raises a ValueError for a name that is none of an implementation."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"{owner}: implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, or None for the best "
            f"that there is, but it is {name!r}"
        )


def step(optimizer: TransformOptimizer, groups: list[Group], batch: Batch) -> Batch:
    """Steps every parameter that has a gradient; everything is checked before anything is changed.

    Args:
        optimizer: the optimizer.
        groups: its param groups, as they are now.
        batch: the leaves that its kernels stepped last; it says where only one parameter is to be stepped.

    Returns:
        Those that they step now.
    """
    if not batch.holds(groups, optimizer.state):
        batch = Batch(groups, [], batch.only)
    found, alone = prepare(optimizer, groups, batch.others_with_gradient()), batch.only is not None
    chosen = [choose(optimizer, p, groups, alone) for p in found]
    check_memory(optimizer, batch, chosen)
    leaves = [ready(optimizer, one.prepared) for one in chosen]
    batch = batch.extended(described(chosen, leaves))
    parts = parts_of(chosen, leaves)
    batch.step()
    step_without_kernels(chosen, leaves, parts)
    return batch


def step_recorded(
    optimizer: TransformOptimizer, groups: list[Group], places: Iterable[Place]
) -> dict[Tensor, Products]:
    """The same step of some parameters, one after the other, with the inner products of their metrics."""
    chosen = [choose(optimizer, p, groups) for p in prepare(optimizer, groups, places)]
    check_memory(optimizer, Batch(groups, []), chosen)
    leaves = [ready(optimizer, one.prepared) for one in chosen]
    products = {}
    for one, leaf in zip(chosen, leaves, strict=True):
        before = leaf.param.clone()
        if one.implementation == COMPILED:  # which is for all parameters together
            step_leaf(leaf)
        else:
            Batch(groups, []).extended(described([one], [leaf])).step()
            step_without_kernels([one], [leaf], parts_of([one], [leaf]))
        products[leaf.param] = metrics.record(before, leaf.param, leaf.grad, leaf.state)
    return products


def choose(optimizer: TransformOptimizer, prepared: Prepared, groups: list[Group], alone: bool = False) -> Chosen:
    """What steps a parameter.

    Args:
        optimizer: the optimizer.
        prepared: the parameter.
        groups: its param groups.
        alone: it is stepped by itself, so that compiling, which is for all parameters together, is left out.

    Raises:
        KernelError: what was asked for by name does not serve it.
    """
    param, asked = prepared.leaf.param, optimizer.implementation
    if is_sharded(param):
        return Chosen(prepared, SHARDED, _planned(optimizer, prepared))
    if not (kernels.is_dense(param) and kernels.is_dense(param.grad)):
        return Chosen(prepared, DEFINITION, None)
    options = (asked,) if asked else BEST.get(param.device.type, ELSEWHERE)
    for name in options:
        if alone and name == COMPILED:
            continue
        try:
            return Chosen(prepared, name, _find(name, optimizer, prepared, groups))
        except (KernelError, UnplannableError) as error:
            if asked:
                owner = type(optimizer).__name__
                raise KernelError(f"{owner}: implementation={asked!r} cannot step {prepared.name}: {error}") from error
            if not isinstance(error, kernels.UnsuitedError):
                optimizer.warn_once(f"its steps take longer than they need to, for {error}")
    raise AssertionError("the definition serves everything")


def _planned(optimizer: TransformOptimizer, prepared: Prepared) -> sharded.Plan:
    """The plan of a sharded parameter; raises a KernelError where it cannot be stepped."""
    try:
        return sharded.plan(prepared.leaf, optimizer.implementation)
    except (KernelError, UnplannableError) as error:
        raise KernelError(f"{type(optimizer).__name__} cannot step {prepared.name} part by part: {error}") from error


def _find(name: str, optimizer: TransformOptimizer, prepared: Prepared, groups: list[Group]) -> Any:
    leaf = prepared.leaf
    if name == KERNEL:
        return kernels.find(prepared, groups[prepared.place[0]], optimizer.state.get(leaf.param, {}))
    if name == COMPILED and leaf.param.is_cuda and find_spec("triton") is None:
        raise KernelError("torch.compile needs triton, which is not installed")
    return tiles.find(leaf) if name == TILES else None


def check_memory(optimizer: TransformOptimizer, batch: Batch, chosen: list[Chosen]) -> None:
    """Raises a ValueError where new leaves of kernels share memory with others, or with themselves."""
    arrays = []
    for one in chosen:
        if one.implementation == KERNEL:
            name, param, grad = one.prepared.name, one.prepared.leaf.param, one.prepared.leaf.grad
            arrays += [Written(name, param), Written(f"the gradient of {name}", grad, is_written=False)]
            state = optimizer.state.get(param, {})
            arrays += [
                Written(f"the state {key!r} of {name}", state[key]) for key in one.prepared.arrays if key in state
            ]
    if arrays:
        check_overlap([*arrays, *batch.written()])


def described(chosen: Sequence[Chosen], leaves: Sequence[Leaf]) -> list[Described]:
    """Those of the leaves that kernels step."""
    return [
        Described(
            one.prepared.place, one.prepared.name, one.found, leaf.chain, leaf.param, leaf.state, leaf.grad.stride()
        )
        for one, leaf in zip(chosen, leaves, strict=True)
        if one.implementation == KERNEL
    ]


def parts_of(chosen: Sequence[Chosen], leaves: Sequence[Leaf]) -> list[sharded.Part]:
    """This process's parts of those of the leaves that are sharded."""
    return [
        sharded.part(leaf, one.found) for one, leaf in zip(chosen, leaves, strict=True) if one.implementation == SHARDED
    ]


def step_without_kernels(chosen: Sequence[Chosen], leaves: Sequence[Leaf], parts: Sequence[sharded.Part]) -> None:
    """Steps the leaves that other implementations serve, `parts` being those of the sharded ones."""
    rates: dict[int, Any] = {}
    to_compile = []
    for (_, implementation, found), leaf in zip(chosen, leaves, strict=True):
        if implementation == TILES:
            tiles.step_leaf(leaf, found)
        elif implementation == COMPILED and compilable(leaf):
            lr = rates.setdefault(id(leaf.lr), learning_rate(leaf.lr, compiling=True))
            to_compile.append(leaf._replace(lr=lr))
        elif implementation not in (KERNEL, SHARDED):
            step_leaf(leaf)
    if parts:
        sharded.step(parts)
    if to_compile:
        compiled()(to_compile)


@cache
def compiled() -> Callable[[list[Leaf]], None]:
    """`step_leaves`, compiled by torch when it is first called."""
    return torch.compile(step_leaves)
