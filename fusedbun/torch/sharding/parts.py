"""Parameters that are DTensors: every process steps its parts, and only vectors cross the network.

A step goes phase by phase (`fusedbun.compiler.shards`), all parameters together: a phase is run on every part, and what
crosses is combined in one collective for each way of combining, however many parameters there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.compiler import tiles
from fusedbun.compiler.cpp import native
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.compiler.shards import START, Crossing, Phase, phases
from fusedbun.compiler.trace import FIRST, GRAD, SIZE, evaluate, hyperparameters, trace
from fusedbun.storage.rounding import PARAM
from fusedbun.torch import namespace
from fusedbun.torch.implementation import Implementation
from fusedbun.torch.kernel import described, is_of_numbers
from fusedbun.torch.leaf import Leaf
from fusedbun.torch.openmp import parallel
from fusedbun.torch.sharding.placement import Cut, cut, local
from fusedbun.torch.state import compute_dtype, dtype_name, stored_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Runner = native.Kernel | tiles.Tiles
Phases = tuple[list[Phase], list[Runner]]  # those of a step, and what runs each

_PHASES: dict[Any, Phases] = {}  # by what decides them


@dataclass(eq=False)
class Part:
    """What a process steps of a parameter. Where it has no elements its arrays have one for none."""

    cut: Cut
    shape: tuple[int, ...]  # of the arrays that are stepped
    phases: list[Phase]  # of a step
    runners: list[Runner]  # of the phases
    arrays: dict[str, Tensor] = field(default_factory=dict)  # in a step, by name


class Collective(NamedTuple):
    """What is combined over processes at once: the parts' arrays follow one another in its memory."""

    groups: tuple[ProcessGroup, ...]
    function: str
    memory: Tensor


class Sharded(Implementation):
    """Phases of kernels or tiles on every process's part of a DTensor."""

    name = "sharded"
    error = "{owner} cannot step {leaf} part by part"

    def refusal(self, leaf: Leaf) -> str | None:
        if leaf.asked == "kernel" and not _suits_kernels(leaf):
            return "its device, the dtype of its gradient or a hyper-parameter that is a tensor does not suit it"
        return None

    def prepare(self, leaf: Leaf) -> Part:
        """The phases of the leaf's step, and what runs them."""
        at, by_kernel = cut(leaf.param), _suits_kernels(leaf) and leaf.asked in (None, "kernel")
        # by what all processes have in common, for what crosses must be the same in all of them
        shape, strides, dtype = tuple(leaf.param.shape), leaf.param.stride(), dtype_name(leaf.param.dtype)
        order, along = native.memory_order(shape, strides), frozenset(at.groups)
        key = (native.structure(leaf.chain), order, dtype, leaf.group.maximize, along, by_kernel or shape)
        if key not in _PHASES:
            _PHASES[key] = _phases(leaf, order, along, by_kernel)
        return Part(at, tuple(max(1, n) for n in at.shape), *_PHASES[key])

    def step(self, leaves: Sequence[Leaf]) -> None:
        """Steps these DTensors; every process has to call it, with all the same parameters."""
        for leaf in leaves:
            _take_arrays(leaf)
        for t in range(max(len(leaf.prepared.phases) for leaf in leaves)):
            working = [leaf for leaf in leaves if t < len(leaf.prepared.phases)]
            collectives = _collectives([leaf.prepared for leaf in working], t)
            _run_phase(working, t)
            for collective in collectives:
                _combine(collective)
        torch.autograd.graph.increment_version([x for leaf in leaves for x in (leaf.param, *leaf.state.values())])


def _suits_kernels(leaf: Leaf) -> bool:
    return (
        leaf.param.device.type == "cpu"
        and leaf.grad.dtype == leaf.param.dtype
        and not isinstance(leaf.lr, Tensor)
        and is_of_numbers(leaf.chain)
    )


def _phases(leaf: Leaf, order: tuple[int, ...], cut_along: frozenset[int], by_kernel: bool) -> Phases:
    param, maximize, dtype = leaf.param, leaf.group.maximize, dtype_name(leaf.param.dtype)
    if by_kernel:
        try:
            steps = phases(trace(leaf.chain, param.ndim, order, maximize, dtype), cut_along)
            return steps, [native.compiled(phase.program) for phase in steps]
        except (KernelError, UnschedulableError):
            if leaf.asked:
                raise
    whole = tiles.schedule_for(leaf.chain, tuple(param.shape), param.stride(), maximize, dtype)
    steps = phases(whole.program, cut_along)
    return steps, [tiles.Tiles(tiles.schedule_of(phase.program), namespace) for phase in steps]


def _take_arrays(leaf: Leaf) -> None:
    """Takes up the arrays that a step is made on; the gradient is brought to where the parameter is."""
    part: Part = leaf.prepared
    param: Any = leaf.param
    if leaf.grad.placements != param.placements:
        leaf.grad = leaf.grad.redistribute(param.device_mesh, param.placements)
    for name, x in {PARAM: param, GRAD: leaf.grad, **leaf.state}.items():
        here = local(x)
        part.arrays[name] = here if here.numel() else here.new_zeros([max(1, n) for n in here.shape])
    for phase in part.phases:
        for name in phase.program.arrays.keys() - part.arrays.keys() - phase.crossings.keys():
            stored = phase.program.arrays[name]
            part.arrays[name] = torch.empty(stored.shape(part.shape), dtype=stored_dtype(stored), device=param.device)


def _collectives(parts: Sequence[Part], t: int) -> list[Collective]:
    """Makes the arrays of what crosses after a phase, those that are combined alike in one piece of memory."""
    together: dict[Any, list[tuple[Part, str, Crossing]]] = {}
    for part in parts:
        for name, crossing in part.phases[t].crossings.items():
            groups = tuple(group for axis in sorted(crossing.over) for group in part.cut.groups[axis])
            key = (groups, crossing.function, crossing.stored.dtype, part.arrays[PARAM].device)
            together.setdefault(key, []).append((part, name, crossing))
    collectives = []
    for (groups, function, dtype, device), crossings in together.items():
        shapes = [crossing.stored.shape(part.shape) for part, _, crossing in crossings]
        sizes = [*map(math.prod, shapes)]
        memory = torch.empty(sum(sizes), dtype=getattr(torch, dtype), device=device)
        for (part, name, _), shape, piece in zip(crossings, shapes, torch.split(memory, sizes), strict=True):
            part.arrays[name] = piece.view(shape)
        collectives.append(Collective(groups, function, memory))
    return collectives


def _combine(collective: Collective) -> None:
    """Combines the parts of all processes.

    Of two numbers of which one is NaN a collective's maximum is either. So what is compared is whole numbers in the
    order of the numbers, NaN being the largest; and a minimum is the negative of the negatives' maximum.
    """
    import torch.distributed as dist

    x, function = collective.memory, collective.function
    if function == "min":
        x.neg_()
    sent = x if function == "sum" else _ordered(x)
    for group in collective.groups:
        dist.all_reduce(sent, dist.ReduceOp.SUM if function == "sum" else dist.ReduceOp.MAX, group=group)
    if sent is not x:
        x.copy_(_in_order(sent).view(x.dtype))
    if function == "min":
        x.neg_()


def _ordered(x: Tensor) -> Tensor:
    """Whole numbers in the order of these, of which NaN is the largest."""
    x = torch.where(x.isnan(), torch.nan, x)  # without a sign
    return _in_order(x.view(torch.int32 if x.dtype == torch.float32 else torch.int64))


def _in_order(bits: Tensor) -> Tensor:
    """A number's bits as a whole number in the same order, and back."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _run_phase(leaves: Sequence[Leaf], t: int) -> None:
    """Runs a phase of each of these leaves: kernels all at once, tiles one leaf after the other."""
    by_kernel = [leaf for leaf in leaves if isinstance(leaf.prepared.runners[t], native.Kernel)]
    if by_kernel:
        _run_kernels(by_kernel, t)
    for leaf in leaves:
        part: Part = leaf.prepared
        if isinstance(runner := part.runners[t], tiles.Tiles):
            runner.run(_numbers(leaf, t), part.arrays, compute_dtype(leaf.param.dtype))
        if 0 in part.cut.shape:
            for name, crossing in part.phases[t].crossings.items():
                part.arrays[name].fill_(START[crossing.function])


def _run_kernels(leaves: Sequence[Leaf], t: int) -> None:
    parts: list[Part] = [leaf.prepared for leaf in leaves]
    descriptions = []
    for row, part in enumerate(parts):
        kernel: Any = part.runners[t]
        arrays = [described(part.arrays[name]) for name in (PARAM, GRAD, *kernel.program.arrays)]
        descriptions.append(native.Description(kernel, part.shape, arrays, row))
    together = native.Leaves(descriptions, len(descriptions))
    together.set_gradients([part.arrays[GRAD].data_ptr() for part in parts])
    for row, leaf in enumerate(leaves):
        together.set_numbers(row, _numbers(leaf, t))
    together.step(torch.get_num_threads(), parallel())
    torch.autograd.graph.increment_version(
        [part.arrays[name] for part in parts for name in part.phases[t].program.outputs]
    )


def _numbers(leaf: Leaf, t: int) -> list[Any]:
    """The numbers that a phase is run with, among them what it has to know of the whole parameter."""
    part: Part = leaf.prepared
    program = part.phases[t].program
    values = hyperparameters(program, leaf.chain, leaf.lr)
    for axis, (size, first) in enumerate(zip(leaf.param.shape, part.cut.first, strict=True)):
        values |= {SIZE.format(axis): size, FIRST.format(axis): first}
    if not leaf.param.ndim:  # it is traced as one element
        values |= {SIZE.format(0): 1, FIRST.format(0): 0}
    xp: Any = namespace
    return evaluate(program.scalars, values, xp)
