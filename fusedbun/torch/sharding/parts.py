"""Parameters that are DTensors: every process steps its parts, and only vectors cross the network.

A step goes phase by phase (`fusedbun.compiler.shards`), all parameters together: a phase is run on every part, and what
crosses is combined in one collective for each way of combining, however many parameters there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.compiler import tiles
from fusedbun.compiler.cpp import native
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.compiler.graph import UnplannableError
from fusedbun.compiler.shards import START, Crossing, Phase, phases
from fusedbun.compiler.trace import FIRST, GRAD, SIZE, Program, evaluate, hyperparameters, trace
from fusedbun.storage.rounding import PARAM
from fusedbun.torch import namespace
from fusedbun.torch.definition import Leaf
from fusedbun.torch.kernels import described_array, is_of_numbers
from fusedbun.torch.openmp import parallel
from fusedbun.torch.sharding.placement import Cut, cut, local
from fusedbun.torch.state import compute_dtype, name_of_dtype, stored_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Runner = native.Kernel | tiles.Blocks


class Plan(NamedTuple):
    """How a parameter is stepped: how it is cut, the phases of a step, and what runs each."""

    cut: Cut
    phases: list[Phase]
    runners: list[Runner]


class Part(NamedTuple):
    """A process's part of a parameter.

    Args:
        leaf: the parameter.
        cut: how it is cut.
        shape: of the arrays that are stepped: the part's, with 1 for 0.
        phases: the phases of its step.
        runners: what runs each.
        arrays: the part's arrays by name. Where the part has no elements something else stands in their place.
    """

    leaf: Leaf
    cut: Cut
    shape: tuple[int, ...]
    phases: list[Phase]
    runners: list[Runner]
    arrays: dict[str, Tensor]


class Batch(NamedTuple):
    """What is combined in one collective: the parts' arrays follow one another in its memory."""

    groups: tuple[ProcessGroup, ...]
    function: str
    memory: Tensor


def step(parts: Sequence[Part]) -> None:
    """One step of each of these DTensors; every process has to call it, with all the same parameters."""
    for t in range(max((len(part.phases) for part in parts), default=0)):
        working = [part for part in parts if t < len(part.phases)]
        batches = _batches(working, t)
        _run([part for part in working if isinstance(part.runners[t], native.Kernel)], t)
        for part in working:
            if isinstance(part.runners[t], tiles.Blocks):
                _run_blocks(part, t)
            if not math.prod(part.cut.shape):
                for name, crossing in part.phases[t].crossings.items():
                    part.arrays[name].fill_(START[crossing.function])
        for batch in batches:
            _combine(batch)
    torch.autograd.graph.increment_version([x for part in parts for x in (part.leaf.param, *part.leaf.state.values())])


def plan(leaf: Leaf, asked: str | None) -> Plan:
    """The plan for a DTensor.

    Args:
        leaf: the parameter.
        asked: the implementation that was asked for; None: kernels where there are some.

    Raises:
        KernelError, UnplannableError: it cannot be stepped.
    """
    suits = _suits_kernels(leaf)
    if asked == "kernel" and not suits:
        raise KernelError(
            "its device, the dtype of its gradient or a hyper-parameter that is a tensor does not suit it"
        )
    at, by_kernel = cut(leaf.param), suits and asked in (None, "kernel")
    # by what all processes have in common, for what crosses must be the same in all of them
    shape, strides, dtype = tuple(leaf.param.shape), leaf.param.stride(), name_of_dtype(leaf.param.dtype)
    order, along = native.memory_order(shape, strides), frozenset(at.groups)
    key = (native.structure(leaf.chain), order, dtype, leaf.maximize, along, by_kernel or shape)
    if key not in _PLANS:
        _PLANS[key] = _planned(leaf, order, along, by_kernel, asked)
    return Plan(at, *_PLANS[key])


def part(leaf: Leaf, found: Plan) -> Part:
    """A process's part of a parameter, ready to be stepped; its gradient is brought to where the parameter is."""
    shape = tuple(max(1, n) for n in local(leaf.param).shape)
    param: Any = leaf.param
    grad: Any = leaf.grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    tensors = {PARAM: param, GRAD: grad, **leaf.state}
    arrays = {name: _filled(local(x)) for name, x in tensors.items()}
    for phase in found.phases:
        for name in phase.program.arrays.keys() - arrays.keys() - phase.crossings.keys():
            stored = phase.program.arrays[name]
            arrays[name] = torch.empty(stored.shape(shape), dtype=stored_dtype(stored), device=param.device)
    return Part(leaf, found.cut, shape, found.phases, found.runners, arrays)


def _filled(x: Tensor) -> Tensor:
    """The tensor, or one of the same kind with one index for none."""
    return x if x.numel() else x.new_zeros([max(1, n) for n in x.shape])


_PLANS: dict[Any, tuple[list[Phase], list[Runner]]] = {}  # by what decides them


def _planned(
    leaf: Leaf, order: tuple[int, ...], cut_along: frozenset[int], by_kernel: bool, asked: str | None
) -> tuple[list[Phase], list[Runner]]:
    param, dtype = leaf.param, name_of_dtype(leaf.param.dtype)
    if by_kernel:
        try:
            steps = phases(trace(leaf.chain, param.ndim, order, leaf.maximize, dtype), cut_along)
            return steps, [native.compiled(phase.program) for phase in steps]
        except (KernelError, UnplannableError):
            if asked:
                raise
    whole = tiles.plan(leaf.chain, tuple(param.shape), param.stride(), leaf.maximize, dtype)
    steps = phases(whole.program, cut_along)
    return steps, [tiles.Blocks(tiles.scheduled(phase.program), namespace) for phase in steps]


def _suits_kernels(leaf: Leaf) -> bool:
    return (
        leaf.param.device.type == "cpu"
        and leaf.grad.dtype == leaf.param.dtype
        and not isinstance(leaf.lr, Tensor)
        and is_of_numbers(leaf.chain)
    )


def _batches(parts: Sequence[Part], t: int) -> list[Batch]:
    """Makes the arrays of what crosses after a phase, those that are combined alike in one piece of memory."""
    together: dict[Any, list[tuple[Part, str, Crossing]]] = {}
    for part in parts:
        for name, crossing in part.phases[t].crossings.items():
            groups = tuple(group for axis in sorted(crossing.over) for group in part.cut.groups[axis])
            key = (groups, crossing.function, crossing.stored.dtype, part.leaf.param.device)
            together.setdefault(key, []).append((part, name, crossing))
    batches = []
    for (groups, function, _, device), crossings in together.items():
        sizes = [math.prod(crossing.stored.shape(part.shape)) for part, _, crossing in crossings]
        memory = torch.empty(sum(sizes), dtype=stored_dtype(crossings[0][2].stored), device=device)
        for (part, name, crossing), piece in zip(crossings, torch.split(memory, sizes), strict=True):
            part.arrays[name] = piece.view(crossing.stored.shape(part.shape))
        batches.append(Batch(groups, function, memory))
    return batches


def _combine(batch: Batch) -> None:
    """Combines the parts of all processes.

    Of two numbers of which one is NaN a collective's maximum is either. So what is compared is whole numbers in the
    order of the numbers, NaN being the largest; and a minimum is the negative of the negatives' maximum.
    """
    import torch.distributed as dist

    x = batch.memory
    if batch.function == "min":
        x.neg_()
    sent = x if batch.function == "sum" else _ordered(x)
    for group in batch.groups:
        dist.all_reduce(sent, dist.ReduceOp.SUM if batch.function == "sum" else dist.ReduceOp.MAX, group=group)
    if sent is not x:
        x.copy_(_in_order(sent).view(x.dtype))
    if batch.function == "min":
        x.neg_()


def _ordered(x: Tensor) -> Tensor:
    """Whole numbers in the order of these, of which NaN is the largest."""
    x = torch.where(x.isnan(), torch.nan, x)  # without a sign
    return _in_order(x.view(torch.int32 if x.dtype == torch.float32 else torch.int64))


def _in_order(bits: Tensor) -> Tensor:
    """A number's bits as a whole number in the same order, and back."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _run(parts: Sequence[Part], t: int) -> None:
    """Runs a phase with kernels."""
    if not parts:
        return
    descriptions = []
    for row, part in enumerate(parts):
        kernel = part.runners[t]
        assert isinstance(kernel, native.Kernel)
        arrays = [described_array(part.arrays[name]) for name in (PARAM, GRAD, *kernel.program.arrays)]
        descriptions.append(native.Description(kernel, part.shape, arrays, row))
    leaves = native.Leaves(descriptions, len(parts))
    leaves.set_gradients([part.arrays[GRAD].data_ptr() for part in parts])
    known: dict[tuple[int, int], dict[str, Any]] = {}
    for row, part in enumerate(parts):
        leaves.set_numbers(row, _numbers(part, part.phases[t].program, known))
    leaves.step(torch.get_num_threads(), parallel())
    written = [part.arrays[name] for part in parts for name in part.phases[t].program.outputs]
    torch.autograd.graph.increment_version(written)


def _run_blocks(part: Part, t: int) -> None:
    runner = part.runners[t]
    assert isinstance(runner, tiles.Blocks)
    runner.run(_numbers(part, part.phases[t].program, {}), part.arrays, compute_dtype(part.leaf.param.dtype))


def _numbers(part: Part, program: Program, known: dict[tuple[int, int], dict[str, Any]]) -> list[Any]:
    """The numbers that a phase is run with, among them what it has to know of the whole parameter.

    Args:
        part: the part.
        program: the phase's.
        known: the hyper-parameters that were evaluated already, by chain and program.
    """
    chain, lr, param = part.leaf.chain, part.leaf.lr, part.leaf.param
    key = (id(chain), id(program))
    if key not in known:
        known[key] = hyperparameters(program, chain, lr)
    values = {**known[key]}
    whole = (param.shape, part.cut.first) if param.ndim else ((1,), (0,))  # one of no axes is traced as one element
    for axis, (size, first) in enumerate(zip(*whole, strict=True)):
        values |= {SIZE.format(axis): size, FIRST.format(axis): first}
    xp: Any = namespace if any(isinstance(value, Tensor) for value in values.values()) else math
    return evaluate(program.scalars, values, xp)
