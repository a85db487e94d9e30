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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fusedbun.compiler.cpp.native import KernelError
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.metrics import Products
from fusedbun.torch import metrics
from fusedbun.torch.compiled import Compiled, compilable_arguments, is_compilable
from fusedbun.torch.definition import Definition
from fusedbun.torch.implementation import Implementation
from fusedbun.torch.kernel import Batch, Kernel
from fusedbun.torch.leaf import Arguments, Group, Leaf, Owner, Place, all_places, identical, make_leaves
from fusedbun.torch.overlap import arrays_in, check_overlap
from fusedbun.torch.sharding.parts import Sharded
from fusedbun.torch.sharding.placement import is_sharded
from fusedbun.torch.state import update_state
from fusedbun.torch.tiles import Tiles

KERNEL, COMPILED, TILES, DEFINITION, SHARDED = Kernel(), Compiled(), Tiles(), Definition(), Sharded()
MEASURING = Kernel(measures=True)
REGISTRY: dict[str, Implementation] = {one.name: one for one in (KERNEL, COMPILED, TILES, DEFINITION)}
IMPLEMENTATIONS = tuple(REGISTRY)  # those that can be asked for by name
# By the type of device, the best first. CUDA has no kernels in use yet.
BEST = {"cpu": ("kernel", "tiles", "definition"), "cuda": ("compiled", "tiles", "definition")}
ELSEWHERE = ("tiles", "definition")

Chosen = dict[Implementation, list[Leaf]]


def options(
    leaf: Leaf, again: bool = False, alone: bool = False, compiling: bool = False, measures: bool = False
) -> list[Implementation]:
    """The implementations that may step a leaf, the best first.

    Again means that another leaf is of the same parameter, which its group then has twice; alone, without what is for
    all parameters together; compiling, in code that the user compiles; measures, that the step's metrics are recorded,
    which a kernel does as it goes and others have done for them.
    """
    if is_sharded(leaf.param):
        return [SHARDED]
    if again or compiling or not leaf.is_dense:
        return [DEFINITION]
    names = (leaf.asked,) if leaf.asked else BEST.get(leaf.param.device.type, ELSEWHERE)
    found = [REGISTRY[name] for name in names if not (alone and name == COMPILED.name)]
    return [MEASURING, *found] if measures and KERNEL in found else found


def choose(owner: Owner, leaf: Leaf, implementations: Sequence[Implementation]) -> Implementation:
    """The first of these that serves a leaf, which has prepared it; raises a KernelError where the only one cannot."""
    for implementation in implementations:
        error = None
        if (reason := implementation.refusal(leaf)) is None:
            try:
                leaf.prepared = implementation.prepare(leaf)
                return implementation
            except (KernelError, UnschedulableError) as raised:
                reason, error = str(raised), raised
        if len(implementations) == 1:
            text = implementation.error.format(owner=type(owner).__name__, asked=leaf.asked, leaf=leaf.name)
            raise KernelError(f"{text}: {reason}") from error
        if error:
            owner.warn_once(f"its steps take longer than they need to, for {reason}")
    raise AssertionError("the definition serves everything")


def prepare(
    owner: Owner,
    groups: list[Group],
    places: Iterable[Place],
    batch: Batch | None = None,
    *,
    alone: bool = False,
    compiling: bool = False,
    measures: bool = False,
) -> Chosen:
    """The leaves of those of these parameters that have a gradient, ready, by what steps them (see `options`).

    Everything is checked before state is made, also against the batch of leaves that kernels step beside them.
    """
    leaves = make_leaves(owner, groups, places)
    beside = batch.leaves() if batch and leaves else ()
    chosen: Chosen = {}
    params = {leaf.param for leaf in beside}
    for leaf in leaves:
        implementations = options(leaf, leaf.param in params, alone, compiling, measures)
        chosen.setdefault(choose(owner, leaf, implementations), []).append(leaf)
        params.add(leaf.param)
    if by_kernel := [leaf for one in (KERNEL, MEASURING) for leaf in chosen.get(one, ())]:
        at_once = [*by_kernel, *beside]
        check_overlap([array for leaf in at_once for array in arrays_in(leaf)])
    for leaf in leaves:
        leaf.state = update_state(owner.state, leaf.param, leaf.arrays)
    return chosen


class Stepper:
    """Steps an optimizer's parameters, or only the one at this place, and keeps what the next step can repeat.

    Args:
        only: the place; None: all.
        measures: whether it records the inner products of the steps' metrics.
    """

    def __init__(self, only: Place | None = None, measures: bool = False) -> None:
        self.measures = measures
        self.groups: list[Group] = []  # as the last step found them
        self._only = [only] if only else []
        self._batch: Batch | None = None  # what kernels stepped
        self._others: list[Place] = []  # the parameters that are not in the batch

    def step(self, owner: Owner, groups: list[Group]) -> dict[Tensor, Products]:
        """Steps every parameter that has a gradient; everything is checked before anything is changed.

        Returns:
            What was measured.
        """
        batch, others = self._batch, self._others
        if batch is None or not self._can_repeat(batch, groups, owner.state):
            batch, others = None, self._only or all_places(groups)
        alone, measures = bool(self._only), self.measures
        chosen = prepare(owner, groups, others, batch, alone=alone, measures=measures) if others else {}
        if new := chosen.pop(MEASURING if measures else KERNEL, None):
            batch = Batch([*batch.leaves(), *new] if batch else new)
            taken = {leaf.place for leaf in new}
            others = [place for place in others if place not in taken]
        products = batch.step() if batch else {}
        for implementation, leaves in chosen.items():
            if measures:
                products |= _measured(implementation, leaves)
            else:
                implementation.step(leaves)
        self.groups, self._batch, self._others = groups, batch, others
        return products

    def _can_repeat(self, batch: Batch, groups: list[Group], state: Mapping[Tensor, Any]) -> bool:
        """Whether the batch can be stepped again, and the other parameters are those that they were."""
        params, before = ([group.params for group in read] for read in (groups, self.groups))
        return identical(params, before) and batch.holds(groups, state)


def _measured(implementation: Implementation, leaves: Sequence[Leaf]) -> dict[Tensor, Products]:
    """A step of these leaves, one after the other, with the inner products of their metrics."""
    products = {}
    step_one = (DEFINITION if implementation is COMPILED else implementation).step
    for leaf in leaves:
        before, grad = leaf.param.clone(), leaf.grad
        step_one([leaf])
        leaf.grad = grad  # which a kernel lets go of
        products[leaf.param] = metrics.record(before, leaf)
    return products


def is_for_the_compiler(owner: Owner) -> bool:
    """Whether code that the user compiles takes up the definition: kernels are faster than what becomes of it."""
    if owner.implementation:
        return owner.implementation in (COMPILED.name, DEFINITION.name)
    devices = {param.device.type for group in owner.param_groups for param in group["params"]}
    return any(BEST.get(device, ELSEWHERE)[0] != KERNEL.name for device in devices)


def step_uncompiled(owner: Owner, groups: list[Group]) -> list[Arguments]:
    """Steps what cannot be stepped in code that the user compiles; what the definition steps the rest with."""
    chosen = prepare(owner, groups, all_places(groups), compiling=True)
    leaves = chosen.pop(DEFINITION, [])
    chosen[DEFINITION] = [leaf for leaf in leaves if not is_compilable(leaf)]
    for implementation, uncompiled in chosen.items():
        implementation.step(uncompiled)
    return compilable_arguments(leaves)
