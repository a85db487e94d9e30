"""The peak memory of training steps, in bytes a parameter: weights, gradients, state and temporaries.

    python -m benchmarks.memory [MODEL …]

MODEL is "gpt2" (GPT-2's 124 million parameters) or "1b" (1 billion); default: gpt2.

Each contender trains in a process of its own (`training.py`), and the system says how much memory that held at most
(the high-water mark of its resident memory). From this the same process's peak with next to no model is taken away:
Python, torch and the kernels. What remains is for the model, over its parameters. The activations are those of four
tokens. How much they are is measured without an optimizer, every gradient being dropped at once: what that holds beside
the weights and the largest gradient. A contender that is not installed is listed so, and one of a second model that
would hold more than the memory that is free, by what it held of the first.

Writes benchmarks/results/memory.json and benchmarks/results/memory.png.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.memory.training import BARE, CONTENDERS, SIZES, STEPS, TOKENS, parameters
from fusedbun.tools.shared.files import write_json
from fusedbun.tools.shared.machine import available_memory, versions

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "results"


def peak(model: str, contender: str) -> tuple[int, str]:
    """The most memory that such a training held, in bytes, and what it printed; raises a RuntimeError if it failed."""
    command = [sys.executable, "-m", "benchmarks.memory.training", model, contender]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        printed, said = out.read(), err.read().strip()
    if process.returncode:
        raise RuntimeError(said.splitlines()[-1] if said else f"it ended with {process.returncode}")
    return usage.ru_maxrss * 1024, printed


def measure(model: str, contender: str, before: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table; `before` are those above it."""
    row: dict[str, Any] = {"model": model, "contender": contender}
    if find_spec(CONTENDERS[contender].module.partition(".")[0]) is None:
        return {**row, "status": "not installed"}
    held, free = [r["bytes_per_parameter"] for r in before if _is_of(r, contender)], available_memory()
    if held and free is not None and (needed := held[0] * parameters(SIZES[model])) > free:
        return {**row, "status": f"not tried: about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB were free"}
    try:
        (held, printed), (without, _) = peak(model, contender), peak("none", contender)
    except RuntimeError as error:
        return {**row, "status": f"failed: {error}"}
    count, share = printed.split()
    found = {
        "parameters": int(count),
        "largest_share": float(share),
        "peak_bytes": held,
        "without_model_bytes": without,
    }
    return {**row, "status": "measured", **found, "bytes_per_parameter": (held - without) / int(count)}


def _is_of(row: dict[str, Any], contender: str) -> bool:
    return row["contender"] == contender and row["status"] == "measured"


def add_activations(rows: list[dict[str, Any]]) -> None:
    """Adds to every row what it holds above its model's activations, for each parameter."""
    for row in rows:
        if row["status"] == "measured":
            (bare,) = (x for x in rows if (x["model"], x["contender"]) == (row["model"], BARE))
            activations = bare["bytes_per_parameter"] - 2 * (1 + bare["largest_share"])  # bfloat16's two bytes
            row["above_activations"] = row["bytes_per_parameter"] - activations


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    heads = ("model", "optimizer", "peak, MiB", "bytes a parameter", "above activations")
    table = Table(*heads, title="Peak memory of training steps")
    for row in rows:
        known = row["status"] == "measured"
        peak_of = f"{(row['peak_bytes'] - row['without_model_bytes']) / 2**20:,.0f}" if known else ""
        table.add_row(
            row["model"],
            row["contender"],
            peak_of,
            f"{row['bytes_per_parameter']:.2f}" if known else row["status"],
            f"{row['above_activations']:.2f}" if known else "",
        )
    Console().print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars, the least first."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(7 * len(models), 5), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        known = [row for row in rows if row["model"] == model and row["status"] == "measured"]
        known.sort(key=lambda row: -row["bytes_per_parameter"])
        ours = [CONTENDERS[row["contender"]].module == "fusedbun" for row in known]
        bars = axis.barh(
            [row["contender"] for row in known],
            [row["bytes_per_parameter"] for row in known],
            color=["#0072b2" if is_ours else "#e69f00" for is_ours in ours],
        )
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set(
            title=f"{model}: {known[0]['parameters'] / 1e6:,.0f} million parameters", xlabel="peak bytes a parameter"
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints, and writes the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="*", choices=[name for name in SIZES if name != "none"], default=["gpt2"])
    models = parser.parse_args().model
    models = [models] if isinstance(models, str) else models
    cases = [(model, contender) for model in models for contender in CONTENDERS]
    rows: list[dict[str, Any]] = []
    for model, contender in track(cases, "training"):
        rows.append(measure(model, contender, rows))
    add_activations(rows)
    show(rows)
    protocol = {"tokens": TOKENS, "steps": STEPS, "threads": 1}
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "memory.json", {"protocol": protocol, "results": rows, "versions": versions()})
    draw(rows, RESULTS / "memory.png")


if __name__ == "__main__":
    main()
