"""Parameters that are DTensors: every process steps its parts, and only vectors cross the network.

A step goes phase by phase (`fusedbun.compiler.shards`), all parameters together: a phase is run on every part, and what
crosses is combined in one collective for each way of combining, however many parameters there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.chain import Chain
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
    """What a process steps of a parameter, or of a slice. Where it has no elements its arrays have one for none."""

    chain: Chain
    lr: float | Tensor
    dtype: torch.dtype
    whole: tuple[int, ...]  # the shape of what it is a part of
    cut: Cut
    phases: list[Phase]  # of a step
    runners: list[Runner]  # of the phases
    arrays: dict[str, Tensor]  # by name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the arrays that are stepped."""
        return tuple(max(1, n) for n in self.cut.shape)


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

    def prepare(self, leaf: Leaf) -> tuple[Cut, Phases]:
        """How a slice of it is cut, and the phases of its step with what runs them."""
        by_kernel, stacked = _suits_kernels(leaf) and leaf.asked in (None, "kernel"), leaf.chain.stacked
        at, chain = cut(leaf.param).behind(stacked), leaf.chain.slice((0,) * stacked)
        # by what all processes have in common, for what crosses must be the same in all of them
        shape, strides, dtype = tuple(leaf.param.shape), leaf.param.stride(), dtype_name(leaf.param.dtype)
        shape, strides = shape[stacked:], strides[stacked:]
        order, along = native.memory_order(shape, strides), frozenset(at.groups)
        key = (native.structure(chain), order, dtype, leaf.group.maximize, along, by_kernel or (shape, strides))
        if key not in _PHASES:
            whole = _Whole(chain, shape, strides, dtype, leaf.group.maximize)
            _PHASES[key] = _phases(whole, order, along, by_kernel, is_asked=leaf.asked is not None)
        return at, _PHASES[key]

    def step(self, leaves: Sequence[Leaf]) -> None:
        """Steps these DTensors; every process has to call it, with all the same parameters."""
        parts = [part for leaf in leaves for part in _parts(leaf)]
        for t in range(max((len(part.phases) for part in parts), default=0)):
            working = [part for part in parts if t < len(part.phases)]
            collectives = _collectives(working, t)
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


class _Whole(NamedTuple):
    """What is cut: a parameter, or a slice of a stack."""

    chain: Chain
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    maximize: bool


def _phases(
    whole: _Whole, order: tuple[int, ...], cut_along: frozenset[int], by_kernel: bool, is_asked: bool
) -> Phases:
    chain, shape, strides, dtype, maximize = whole
    if by_kernel:
        try:
            steps = phases(trace(chain, len(shape), order, maximize, dtype), cut_along)
            return steps, [native.compiled(phase.program) for phase in steps]
        except (KernelError, UnschedulableError):
            if is_asked:
                raise
    steps = phases(tiles.schedule_for(chain, shape, strides, maximize, dtype).program, cut_along)
    return steps, [tiles.Tiles(tiles.schedule_of(phase.program), namespace) for phase in steps]


def _parts(leaf: Leaf) -> Iterator[Part]:
    """This process's parts of the slices that it has of a stack, or of the parameter, with their arrays."""
    at, (steps, runners) = leaf.prepared
    param: Any = leaf.param
    if leaf.grad.placements != param.placements:  # the gradient is brought to where the parameter is
        leaf.grad = leaf.grad.redistribute(param.device_mesh, param.placements)
    here, whole = {name: local(x) for name, x in {PARAM: param, GRAD: leaf.grad, **leaf.state}.items()}, cut(param)
    for place in product(*map(range, whole.shape[: leaf.chain.stacked])):
        chain = leaf.chain.slice(tuple(first + i for first, i in zip(whole.first, place, strict=False)))
        of_slice = {name: x[place] for name, x in here.items()}
        arrays = {name: x if x.numel() else x.new_zeros([max(1, n) for n in x.shape]) for name, x in of_slice.items()}
        shape = tuple(param.shape[leaf.chain.stacked :])
        part = Part(chain, leaf.lr, param.dtype, shape, at, steps, runners, arrays)
        for phase in steps:
            for name in phase.program.arrays.keys() - arrays.keys() - phase.crossings.keys():
                stored = phase.program.arrays[name]
                arrays[name] = torch.empty(stored.shape(part.shape), dtype=stored_dtype(stored), device=param.device)
        yield part


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


def _run_phase(parts: Sequence[Part], t: int) -> None:
    """Runs a phase of each of these parts: kernels all at once, tiles one part after the other."""
    by_kernel = [part for part in parts if isinstance(part.runners[t], native.Kernel)]
    if by_kernel:
        _run_kernels(by_kernel, t)
    for part in parts:
        if isinstance(runner := part.runners[t], tiles.Tiles):
            runner.run(_numbers(part, t), part.arrays, compute_dtype(part.dtype))
        if 0 in part.cut.shape:
            for name, crossing in part.phases[t].crossings.items():
                part.arrays[name].fill_(START[crossing.function])


def _run_kernels(parts: Sequence[Part], t: int) -> None:
    descriptions = []
    for row, part in enumerate(parts):
        kernel: Any = part.runners[t]
        arrays = [described(part.arrays[name]) for name in (PARAM, GRAD, *kernel.program.arrays)]
        descriptions.append(native.Description(kernel, part.shape, arrays, row))
    together = native.Leaves(descriptions, len(descriptions))
    together.set_gradients([part.arrays[GRAD].data_ptr() for part in parts])
    for row, part in enumerate(parts):
        together.set_numbers(row, _numbers(part, t))
    together.step(torch.get_num_threads(), parallel())
    torch.autograd.graph.increment_version(
        [part.arrays[name] for part in parts for name in part.phases[t].program.outputs]
    )


def _numbers(part: Part, t: int) -> list[Any]:
    """The numbers that a phase is run with, among them what it has to know of the whole parameter."""
    program = part.phases[t].program
    values = hyperparameters(program, part.chain, part.lr)
    for axis, (size, first) in enumerate(zip(part.whole, part.cut.first, strict=True)):
        values |= {SIZE.format(axis): size, FIRST.format(axis): first}
    if not part.whole:  # it is traced as one element
        values |= {SIZE.format(0): 1, FIRST.format(0): 0}
    xp: Any = namespace
    return evaluate(program.scalars, values, xp)
