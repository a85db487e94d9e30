"""The plan as text."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator

from fusedbun.tools.plan.planner import Estimate, Plan
from fusedbun.tools.plan.settings import Setting
from fusedbun.tools.plan.sizes import in_unit, readable, unit_of

_WIDTH = 100  # of the remarks below the table
_GAP = "  "
_LEFT = 2  # columns of text, which begin at the left
_HEADS = (
    ("", "", "", "", "", "a step's", "", "bytes a", "with", "bytes a"),
    (
        "optimizer",
        "setting",
        "weights",
        "gradients",
        "state",
        "temporary",
        "total",
        "parameter",
        "release",
        "parameter",
    ),
)

Pair = tuple[Estimate | None, Estimate | None]  # without and with gradient release


def table(plan: Plan) -> str:
    """A line for every setting, and what the numbers are below."""
    rows = pairs(plan)
    unit = unit_of(max((one.total for one in plan.estimates), default=0) // 8)  # so that small numbers are seen
    lines = [f"{_title(plan)}; sizes in {unit}", ""] if rows else [_title(plan), ""]
    if rows:
        lines += [*_lines(plan, rows, unit), ""]
    elif plan.budget is not None:
        lines += [f"Nothing fits in {readable(plan.budget)}.", ""]
    refused: dict[tuple[str, str], list[str]] = {}
    for one in plan.refusals:
        refused.setdefault((one.setting.title, one.reason), []).append(one.setting.label)
    for (title, reason), labels in refused.items():
        text = f"{title} ({'; '.join(labels)}): not possible, for {reason}"
        lines += textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
    lines += [""] if refused else []
    for remark in _remarks(plan):
        lines += textwrap.wrap(remark, _WIDTH)
    return "\n".join(lines)


def pairs(plan: Plan) -> list[tuple[Setting, Pair]]:
    """The estimates of each setting, without and with gradient release."""
    found: dict[int, tuple[Setting, list[Estimate | None]]] = {}
    for one in plan.estimates:
        found.setdefault(id(one.setting), (one.setting, [None, None]))[1][one.gradient_release] = one
    return [(setting, (usual, released)) for setting, (usual, released) in found.values()]


def _title(plan: Plan) -> str:
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.role != "buffer":
            sizes[tensor.dtype] += tensor.elements
    dtypes = " and ".join(dtype for dtype, _ in sizes.most_common())
    parameters = [tensor for tensor in plan.tensors if tensor.role != "buffer"]
    frozen = sum(tensor.elements for tensor in parameters if tensor.role == "frozen")
    title = f"{plan.parameters:,} {dtypes} parameters in {len(parameters):,} tensors"
    return title + (f", {frozen:,} of them frozen" if frozen else "")


def _lines(plan: Plan, rows: list[tuple[Setting, Pair]], unit: str) -> Iterator[str]:
    heads = [list(head) for head in _HEADS]
    if plan.budget is not None:
        heads[0].append("fits in")
        heads[1].append(readable(plan.budget))
    cells = [_cells(plan, setting, pair, unit) for setting, pair in rows]
    widths = [max(map(len, column)) for column in zip(*heads, *cells, strict=True)]
    left = {*range(_LEFT), len(heads[0]) - 1 if plan.budget is not None else 0}
    for row in (*heads, ["-" * width for width in widths], *cells):
        texts = (
            f"{cell:{'<' if i in left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield _GAP.join(texts).rstrip()


def _cells(plan: Plan, setting: Setting, pair: Pair, unit: str) -> list[str]:
    usual, released = pair
    cells = [setting.title, setting.label]
    if usual is None:
        cells += ["-"] * 6
    else:
        cells += [in_unit(size, unit) for size in (usual.weights, usual.gradients, usual.state)]
        cells += [readable(usual.temporaries), in_unit(usual.total, unit), f"{usual.bytes_per_parameter:.2f}"]
    cells += ["-", "-"] if released is None else [in_unit(released.total, unit), f"{released.bytes_per_parameter:.2f}"]
    return cells if plan.budget is None else [*cells, _fits(plan.budget, pair, unit)]


def _fits(budget: int, pair: Pair, unit: str) -> str:
    """Whether a setting fits, and how much is left or missing, without gradient release if that will do."""
    usual, released = pair
    if usual is not None and usual.total <= budget:
        return f"yes, {in_unit(budget - usual.total, unit)} left"
    if released is not None and released.total <= budget:
        return f"released, {in_unit(budget - released.total, unit)} left"
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
        names = ", ".join(plan.sparse)
        yield (
            f"Sparse gradients ({names}) have {plan.tokens:,} rows, of which a step takes several copies; their "
            f"parameters have no momentum."
        )
    if any(one.setting.is_torch_adamw for one in plan.estimates):
        yield (
            "torch AdamW is counted with fused=True, which takes no temporaries (foreach=True takes about as much as "
            "the weights). All in float32: weights, gradients and both moments, 16 bytes a parameter, as mixed "
            "precision by autocast has it."
        )
