"""The tables of memory, and of how good training in fewer bits is."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from benchmarks.tables.results import finished, load, marked, paragraph, table
from fusedbun.tools.shared.table import cell

# What the README shows of the memory: with most of our ways to save, and what one would use without them.
MEMORY = (
    *("SM3", "SM3, tied", "Fusedbun, int4", "Fusedbun, int8", "DecoupledLionW, int8"),
    *("SM3, gradients kept", "Fusedbun, float32"),
    *("AdamW, fused, bfloat16", "AdamW, fused", "AdamW, foreach", "Adafactor", "torch-SM3"),
)


@cache
def planned(model: str) -> dict[str, float]:
    """What `fusedbun.plan` says of the contenders that it knows, in bytes a parameter."""
    import torch

    import fusedbun
    from benchmarks.memory.training import CONTENDERS, SIZES, Model
    from fusedbun.recipes import RECIPES
    from fusedbun.tools.plan import Setting

    recipes = {recipe.torch_class: name for name, recipe in RECIPES.items()}
    with torch.device("meta"):
        net = Model(SIZES[model], tied=False)
    found = {}
    for title, contender in CONTENDERS.items():
        given, rounds = dict(contender.settings), False
        if contender.module == "fusedbun":
            rounds = given.pop("stochastic_rounding", False)
            setting = Setting(recipes[contender.name], given)
        elif contender.name == "AdamW" and given == {"fused": True}:
            setting = Setting("adamw", {"weights": "param"})
        else:
            continue
        of = fusedbun.plan(net, setting, dtype=contender.dtype, stochastic_rounding=rounds, threads=1)
        if of.refusals:
            raise ValueError(f"fusedbun.plan refuses {title!r}: {of.refusals[0].reason}")
        (found[title],) = (x.bytes_per_parameter for x in of.estimates if x.gradient_release == contender.releases)
    return found


def _memory_rows(model: str) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in load("memory.json")["results"] if row["model"] == model}


def memory_in_short() -> str:
    """The peak beside the plan, for GPT-2."""
    from benchmarks.memory.training import CONTENDERS

    rows = []
    for title in MEMORY:
        row, contender = _memory_rows("gpt2")[title], CONTENDERS[title]
        name = re.sub(", (gradients kept|bfloat16|float32)$", "", title)  # the columns say so
        name = marked(name) if contender.module == "fusedbun" else name
        release = "released" if contender.releases else "kept"
        peak = f"{row['bytes_per_parameter']:.2f}"
        rows.append([name, contender.dtype, release, peak, cell(planned("gpt2").get(title), ".2f")])
    heads = ("", "weights", "gradients", "measured", "`fusedbun plan`")
    said = "Bytes a parameter at the peak of training GPT-2 small, everything counted, and as planned:"
    return f"{said}\n\n{table(heads, rows, left=3)}"


def memory_whole() -> str:
    """Everything that was measured."""
    from benchmarks.memory.training import BARE, CONTENDERS

    heads = (
        *("", "weights", "gradients", "peak, MiB", "bytes a parameter", "without activations"),
        *("`fusedbun plan`", "over the plan"),
    )
    parts = []
    for model in dict.fromkeys(row["model"] for row in load("memory.json")["results"]):
        rows, missing, count = [], [], 0
        for title, row in _memory_rows(model).items():
            if row["status"] != "measured":
                missing.append(f"{title}: {row['status']}")
                continue
            contender, plan, count = CONTENDERS[title], planned(model).get(title), row["parameters"]
            above = row["above_activations"]
            gradients = "dropped" if title == BARE else "released" if contender.releases else "kept"
            rows.append(
                [
                    *(title, contender.dtype, gradients),
                    f"{(row['peak_bytes'] - row['without_model_bytes']) / 2**20:,.0f}",
                    f"{row['bytes_per_parameter']:.2f}",
                    f"{above:.2f}",
                    cell(plan, ".2f"),
                    cell(plan and above / plan - 1, "+.1%"),
                ]
            )
        versions = load("memory.json")["versions"]
        said = f"{model}: {count:,} parameters, on one thread, with torch {versions['torch']}."
        said += f" Not measured: {'; '.join(missing)}." if missing else ""
        parts.append(f"{paragraph(said)}\n\n{table(heads, rows, left=3)}")
    return "\n\n".join(parts)


def low_precision() -> str:
    """The quality in fewer bits; nothing before the benchmark has come to its end."""
    if (file := finished("low_precision.json", "summary")) is None:
        return ""
    protocol, rows = file["protocol"], []
    for row in file["summary"]:
        (full,) = (r for r in file["summary"] if (r["optimizer"], r["setting"]) == (row["optimizer"], "float32"))
        is_first = row["setting"] == "float32"
        rows.append(
            [
                *(f"`{row['optimizer']}`" if is_first else "", row["setting"], f"{row['lr']:g}"),
                "diverged" if row["mean"] is None else f"{row['mean']:.4f} ± {row['deviation']:.4f}",
                "" if is_first or row["mean"] is None else f"{row['mean'] / full['mean'] - 1:+.2%}",
            ]
        )
    said = (
        f"A character transformer ({protocol['layers']} layers of width {protocol['width']}) on Shakespeare, "
        f"{protocol['steps']:,} steps of {protocol['batch']} texts of {protocol['context']} characters, "
        f"{len(protocol['seeds'])} seeds. The learning rate of each optimizer is the best of a grid for its float32 "
        f"run with the first seed, and serves all of its settings. The loss is that of validation text; ± is the "
        f"standard deviation between seeds. Momentum is float32 where nothing else is said."
    )
    heads = ("", "setting", "learning rate", "validation loss", "against float32")
    return (
        f"## How good training in fewer bits is\n\n{paragraph(said)}\n\n```sh\npython -m benchmarks.low_precision\n```"
        f"\n\n{table(heads, rows, left=2)}"
    )


def low_precision_in_short() -> str:
    """For each optimizer the loss in float32, and how far off it is in fewer bits."""
    if (file := finished("low_precision.json", "summary")) is None:
        return ""
    found = {(row["optimizer"], row["setting"]): row for row in file["summary"]}
    settings = list(dict.fromkeys(setting for _, setting in found if setting != "float32"))
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        full = found[name, "float32"]
        cells = [found.get((name, setting), {}).get("mean") for setting in settings]
        off = ["-" if mean is None else f"{mean / full['mean'] - 1:+.2%}" for mean in cells]
        rows.append([f"`{name}`", f"{full['mean']:.3f} ± {full['deviation']:.3f}", *off])
    steps, seeds = file["protocol"]["steps"], len(file["protocol"]["seeds"])
    said = (
        f"Validation loss of a character transformer after {steps:,} steps in float32, the mean of {seeds} seeds and "
        f"its standard deviation, and how much higher it is in fewer bits:"
    )
    return f"{paragraph(said)}\n\n{table(('', 'float32', *settings), rows)}"
