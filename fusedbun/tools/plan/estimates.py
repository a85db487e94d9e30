"""What a plan says: the bytes of each setting, as numbers for a file and as a table for a reader."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fusedbun.tools.plan.settings import Setting
from fusedbun.tools.plan.sizes import in_unit, readable, unit_of
from fusedbun.tools.plan.sources import Tensor

TOKENS = 4096  # rows of a sparse gradient
_WIDTH = 100  # of the remarks below the table
_COLUMNS = (
    *("optimizer", "setting", "weights", "gradients", "state", "a step's\ntemporary", "total"),
    *("bytes a\nparameter", "with\nrelease", "bytes a\nparameter"),
)
_LEFT = 2  # columns of text, which begin at the left; so does what fits in a budget


@dataclass(frozen=True)
class Estimate:
    """What training with one setting needs beside activations.

    Args:
        setting: the optimizer and its hyper-parameters.
        stochastic_rounding: whether bfloat16 weights are rounded without a bias, which keeps 4 bytes for each of them.
        gradient_release: whether each parameter is stepped as soon as its gradient is complete.
        parameters: how many numbers the model's parameters are.
        weights: the bytes of all parameters and buffers.
        gradients: the bytes of all gradients; of the largest under gradient release.
        state: the bytes of the optimizer's state after its first step.
        temporaries: the bytes that a step takes beside all that, at most: in fusedbun's kernels on the CPU, or in the
            definition's rules where there is none. What an allocator keeps of memory that was freed is not counted.
    """

    setting: Setting
    stochastic_rounding: bool
    gradient_release: bool
    parameters: int
    weights: int
    gradients: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        """The bytes of everything."""
        return self.weights + self.gradients + self.state + self.temporaries

    @property
    def bytes_per_parameter(self) -> float:
        """The bytes of everything for each of the parameters."""
        return self.total / self.parameters

    def as_dict(self) -> dict[str, Any]:
        """The numbers for a JSON file."""
        given = {key: str(x) if callable(x) else x for key, x in self.setting.hyperparameters.items()}
        numbers = {name: x for name, x in vars(self).items() if name != "setting"}
        sums = {"total": self.total, "bytes_per_parameter": self.bytes_per_parameter}
        return {**self.setting.named, "hyperparameters": given, **numbers, **sums}


Pair: TypeAlias = tuple[Estimate | None, Estimate | None]  # without and with gradient release


@dataclass(frozen=True)
class Refusal:
    """A setting that cannot train the model.

    Args:
        setting: the optimizer and its hyper-parameters.
        reason: why not.
    """

    setting: Setting
    reason: str


@dataclass(frozen=True)
class Plan:
    """What training a model needs beside activations, with each of some optimizers. As text it is a table.

    Args:
        tensors: the model's tensors.
        estimates: what each setting needs; those with gradient release follow the ones without.
        refusals: the settings that cannot train the model.
        threads: how many threads step.
        tokens: how many rows a sparse gradient has.
        sparse: the names of the parameters with sparse gradients.
        tied: the names of the parameters that the model has in several places; None where only shapes are known.
        budget: the bytes that there are; None where that is not said.
    """

    tensors: tuple[Tensor, ...]
    estimates: tuple[Estimate, ...]
    refusals: tuple[Refusal, ...] = ()
    threads: int = 1
    tokens: int = TOKENS
    sparse: tuple[str, ...] = ()
    tied: tuple[str, ...] | None = None
    budget: int | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the model's parameters are."""
        return sum(tensor.elements for tensor in self.tensors if tensor.role != "buffer")

    def fits(self, estimate: Estimate) -> bool:
        """Whether it is within the budget, or there is none."""
        return self.budget is None or estimate.total <= self.budget

    def fitting(self) -> Plan:
        """The plan with those settings alone that fit in the budget."""
        return replace(self, estimates=tuple(filter(self.fits, self.estimates)))

    def as_dict(self) -> dict[str, Any]:
        """The numbers for a JSON file; all sizes are in bytes."""
        return {
            "parameters": self.parameters,
            "tensors": len(self.tensors),
            **{name: getattr(self, name) for name in ("threads", "tokens", "sparse", "budget")},
            "estimates": [
                one.as_dict() | ({} if self.budget is None else {"fits": self.fits(one)}) for one in self.estimates
            ],
            "refused": [{**one.setting.named, "reason": one.reason} for one in self.refusals],
        }

    def pairs(self) -> list[tuple[Setting, Pair]]:
        """The estimates of each setting, without and with gradient release."""
        found: dict[int, dict[bool, Estimate]] = {}
        for one in self.estimates:
            found.setdefault(id(one.setting), {})[one.gradient_release] = one
        return [(next(iter(by.values())).setting, (by.get(False), by.get(True))) for by in found.values()]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(plan: Plan) -> Iterator[str]:
    """A line for every setting, and what the numbers are below."""
    rows = plan.pairs()
    unit = unit_of(max((one.total for one in plan.estimates), default=0) // 8)  # so that small numbers are seen
    yield from [_title(plan) + (f"; sizes in {unit}" if rows else ""), ""]
    if rows:
        yield from [*_table(plan, rows, unit), ""]
    elif plan.budget is not None:
        yield from [f"Nothing fits in {readable(plan.budget)}.", ""]
    refused: dict[tuple[str, str], list[str]] = {}
    for one in plan.refusals:
        refused.setdefault((one.setting.title, one.reason), []).append(one.setting.label)
    for (title, reason), labels in refused.items():
        text = f"{title} ({'; '.join(labels)}): not possible, for {reason}"
        yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
    if refused:
        yield ""
    for remark in _remarks(plan):
        yield from textwrap.wrap(remark, _WIDTH)


def _title(plan: Plan) -> str:
    parameters = [tensor for tensor in plan.tensors if tensor.role != "buffer"]
    sizes: Counter[str] = Counter()
    for tensor in parameters:
        sizes[tensor.dtype] += tensor.elements
    dtypes = " and ".join(dtype for dtype, _ in sizes.most_common())
    frozen = sum(tensor.elements for tensor in parameters if tensor.role == "frozen")
    frozen_too = f", {frozen:,} of them frozen" if frozen else ""
    return f"{plan.parameters:,} {dtypes} parameters in {len(parameters):,} tensors{frozen_too}"


def _table(plan: Plan, rows: list[tuple[Setting, Pair]], unit: str) -> Iterator[str]:
    columns = [*_COLUMNS, *([] if plan.budget is None else [f"fits in\n{readable(plan.budget)}"])]
    heads = list(zip(*(column.rpartition("\n")[::2] for column in columns), strict=True))
    cells = [_cells(plan, setting, pair, unit) for setting, pair in rows]
    widths = [max(map(len, column)) for column in zip(*heads, *cells, strict=True)]
    sides = ["<" if i < _LEFT or i == len(_COLUMNS) else ">" for i in range(len(columns))]
    for row in (*heads, ["-" * width for width in widths], *cells):
        texts = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        yield "  ".join(texts).rstrip()


def _cells(plan: Plan, setting: Setting, pair: Pair, unit: str) -> list[str]:
    def sums(one: Estimate | None) -> list[str]:
        return ["-"] * 2 if one is None else [in_unit(one.total, unit), f"{one.bytes_per_parameter:.2f}"]

    usual, released = pair
    parts = ["-"] * 4
    if usual is not None:
        parts = [in_unit(size, unit) for size in (usual.weights, usual.gradients, usual.state)]
        parts.append(readable(usual.temporaries))
    fits = [] if plan.budget is None else [_fits(plan.budget, pair, unit)]
    return [setting.title, setting.label, *parts, *sums(usual), *sums(released), *fits]


def _fits(budget: int, pair: Pair, unit: str) -> str:
    """Whether a setting fits, and how much is left or missing, without gradient release if that will do."""
    for one, yes in zip(pair, ("yes", "released"), strict=True):
        if one is not None and one.total <= budget:
            return f"{yes}, {in_unit(budget - one.total, unit)} left"
    least = min(one.total for one in pair if one is not None)
    return f"no, {in_unit(least - budget, unit)} over"


def _remarks(plan: Plan) -> Iterator[str]:
    """What is counted, and what is not."""
    yield (
        "Not counted: activations, which grow with the batch, and what the framework takes for itself. "
        "Leave room for them."
    )
    threads = f"{plan.threads} thread{'s' if plan.threads > 1 else ''}"
    yield f"A step's temporary arrays are an upper bound, of fusedbun's kernels on the CPU with {threads}."
    if any(one.gradient_release for one in plan.estimates):
        largest = max(one.gradients for one in plan.estimates if one.gradient_release)
        yield (
            f"With (gradient) release each parameter is stepped as soon as its gradient is there, which is freed then: "
            f"at most the largest, {readable(largest)}, is held. Adding up several batches keeps all."
        )
    if plan.tied is None:
        yield (
            "Not counted: the further gradients of a tied weight, which shapes do not show. As GPT-2 was published its "
            "embedding is the output too."
        )
    elif plan.tied:
        tied = ", ".join(plan.tied)
        yield f"Not counted: the further gradients of a tied weight ({tied}), which pass beside the first."
    if any(one.stochastic_rounding for one in plan.estimates):
        yield "Weights in bfloat16 are rounded stochastically, which takes 4 bytes for each tensor."
    if plan.sparse:
        yield (
            f"Sparse gradients ({', '.join(plan.sparse)}) have {plan.tokens:,} rows, of which a step takes several "
            f"copies; their parameters have no momentum."
        )
    if any(one.setting.is_torch_adamw for one in plan.estimates):
        yield (
            "torch AdamW is counted with fused=True, which takes no temporaries (foreach=True takes about as much as "
            "the weights). All in float32: weights, gradients and both moments, 16 bytes a parameter, as mixed "
            "precision by autocast has it."
        )
