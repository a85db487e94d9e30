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
from fusedbun.compiler.graph import UnplannableError
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

_PHASES: dict[Any, tuple[list[Phase], list[Runner]]] = {}  # by what decides them


@dataclass(eq=False)
class Part:
    """What a process steps of a parameter.

    Args:
        cut: how the parameter is cut.
        shape: of the arrays that are stepped: the part's, with 1 for 0.
        phases: the phases of a step.
        runners: what runs each.
        arrays: the part's arrays by name, in a step. Where it has no elements something else stands in their place.
    """

    cut: Cut
    shape: tuple[int, ...]
    phases: list[Phase]
    runners: list[Runner]
    arrays: dict[str, Tensor] = field(default_factory=dict)


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
        """Serves all DTensors, but not all of them with kernels."""
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
        return Part(at, tuple(max(1, n) for n in local(leaf.param).shape), *_PHASES[key])

    def step(self, leaves: Sequence[Leaf]) -> None:
        """Steps these DTensors; every process has to call it, with all the same parameters."""
        for leaf in leaves:
            _take_arrays(leaf)
        for t in range(max((len(leaf.prepared.phases) for leaf in leaves), default=0)):
            working = [leaf for leaf in leaves if t < len(leaf.prepared.phases)]
            collectives = _collectives([leaf.prepared for leaf in working], t)
            _run_phase(working, t)
            for collective in collectives:
                _combine(collective)
        changed = [x for leaf in leaves for x in (leaf.param, *leaf.state.values())]
        torch.autograd.graph.increment_version(changed)


def _suits_kernels(leaf: Leaf) -> bool:
    return (
        leaf.param.device.type == "cpu"
        and leaf.grad.dtype == leaf.param.dtype
        and not isinstance(leaf.lr, Tensor)
        and is_of_numbers(leaf.chain)
    )


def _phases(
    leaf: Leaf, order: tuple[int, ...], cut_along: frozenset[int], by_kernel: bool
) -> tuple[list[Phase], list[Runner]]:
    param, maximize, dtype = leaf.param, leaf.group.maximize, dtype_name(leaf.param.dtype)
    if by_kernel:
        try:
            steps = phases(trace(leaf.chain, param.ndim, order, maximize, dtype), cut_along)
            return steps, [native.compiled(phase.program) for phase in steps]
        except (KernelError, UnplannableError):
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
    tensors = {PARAM: param, GRAD: leaf.grad, **leaf.state}
    part.arrays = {name: _filled(local(x)) for name, x in tensors.items()}
    for phase in part.phases:
        for name in phase.program.arrays.keys() - part.arrays.keys() - phase.crossings.keys():
            stored = phase.program.arrays[name]
            part.arrays[name] = torch.empty(stored.shape(part.shape), dtype=stored_dtype(stored), device=param.device)


def _filled(x: Tensor) -> Tensor:
    """The tensor, or one of the same kind with one index for none."""
    return x if x.numel() else x.new_zeros([max(1, n) for n in x.shape])


def _collectives(parts: Sequence[Part], t: int) -> list[Collective]:
    """Makes the arrays of what crosses after a phase, those that are combined alike in one piece of memory."""
    together: dict[Any, list[tuple[Part, str, Crossing]]] = {}
    for part in parts:
        for name, crossing in part.phases[t].crossings.items():
            groups = tuple(group for axis in sorted(crossing.over) for group in part.cut.groups[axis])
            key = (groups, crossing.function, crossing.stored.dtype, part.arrays[PARAM].device)
            together.setdefault(key, []).append((part, name, crossing))
    found = []
    for (groups, function, _, device), crossings in together.items():
        sizes = [math.prod(crossing.stored.shape(part.shape)) for part, _, crossing in crossings]
        memory = torch.empty(sum(sizes), dtype=stored_dtype(crossings[0][2].stored), device=device)
        for (part, name, crossing), piece in zip(crossings, torch.split(memory, sizes), strict=True):
            part.arrays[name] = piece.view(crossing.stored.shape(part.shape))
        found.append(Collective(groups, function, memory))
    return found


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
    known: dict[tuple[int, int], dict[str, Any]] = {}
    descriptions: list[native.Description] = []
    with_kernel = [leaf for leaf in leaves if isinstance(leaf.prepared.runners[t], native.Kernel)]
    for leaf in with_kernel:
        part: Part = leaf.prepared
        kernel: Any = part.runners[t]
        arrays = [described(part.arrays[name]) for name in (PARAM, GRAD, *kernel.program.arrays)]
        descriptions.append(native.Description(kernel, part.shape, arrays, len(descriptions)))
    if with_kernel:
        together = native.Leaves(descriptions, len(descriptions))
        together.set_gradients([leaf.prepared.arrays[GRAD].data_ptr() for leaf in with_kernel])
        for row, leaf in enumerate(with_kernel):
            together.set_numbers(row, _numbers(leaf, t, known))
        together.step(torch.get_num_threads(), parallel())
        parts: list[Part] = [leaf.prepared for leaf in with_kernel]
        written = [part.arrays[name] for part in parts for name in part.phases[t].program.outputs]
        torch.autograd.graph.increment_version(written)
    for leaf in leaves:
        part = leaf.prepared
        if isinstance(runner := part.runners[t], tiles.Tiles):
            runner.run(_numbers(leaf, t, known), part.arrays, compute_dtype(leaf.param.dtype))
        if not math.prod(part.cut.shape):
            for name, crossing in part.phases[t].crossings.items():
                part.arrays[name].fill_(START[crossing.function])


def _numbers(leaf: Leaf, t: int, known: dict[tuple[int, int], dict[str, Any]]) -> list[Any]:
    """The numbers that a phase is run with, among them what it has to know of the whole parameter.

    Args:
        leaf: the leaf.
        t: the phase.
        known: the hyper-parameters that were evaluated already, by chain and program.
    """
    part: Part = leaf.prepared
    program = part.phases[t].program
    key = (id(leaf.chain), id(program))
    if key not in known:
        known[key] = hyperparameters(program, leaf.chain, leaf.lr)
    values = {**known[key]}
    # one of no axes is traced as one element
    whole = (leaf.param.shape, part.cut.first) if leaf.param.ndim else ((1,), (0,))
    for axis, (size, first) in enumerate(zip(*whole, strict=True)):
        values |= {SIZE.format(axis): size, FIRST.format(axis): first}
    xp: Any = namespace
    return evaluate(program.scalars, values, xp)
