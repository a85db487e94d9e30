"""What the tables are made of: the benchmarks' files, and a few ways to write numbers."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from fusedbun.tools.shared.table import cell

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks/results"
SPEED, SHAPES = "speed.json", "shapes/speed.json"
Label: TypeAlias = tuple[str, str]  # a contender's path and name
OURS, STEP, PACKAGES = "fusedbun", "fusedbun_jax step", "packages for torch"
ADAMW, OPTAX_ADAMW = ("torch", "AdamW, fused"), ("optax", "adamw")


@dataclass(frozen=True)
class Case:
    """What `fusedbun bench` measured of a workload on a number of threads.

    Args:
        workload: its name.
        title: its name for a reader.
        tensors: how many it has.
        parameters: the elements of all.
        threads: on how many.
        runs: a row of the file for each contender that was measured.
    """

    workload: str
    title: str
    tensors: int
    parameters: int
    threads: int
    runs: dict[Label, dict[str, Any]]

    @property
    def on_threads(self) -> str:
        """The number of threads in words."""
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    def quotients(self, label: Label, reference: Label = ADAMW) -> list[float]:
        """The quartiles of its time over the reference's, in the rounds in which both stepped."""
        one, other = (dict(zip(self.runs[x]["rounds"], self.runs[x]["ms"], strict=True)) for x in (label, reference))
        both = [ms / other[k] for k, ms in one.items() if k in other]
        return statistics.quantiles(both, n=4, method="inclusive")

    def over_median(self, label: Label, reference: Label) -> list[float]:
        """Its quartiles, over the reference's median."""
        low, _, high = statistics.quantiles(self.runs[label]["ms"], n=4, method="inclusive")
        return [x / self.runs[reference]["median_ms"] for x in (low, self.runs[label]["median_ms"], high)]

    def per_byte(self, label: Label) -> float:
        """The time for each byte that has to be moved, up to a factor that all cases share."""
        run = self.runs[label]
        return float(run["median_ms"] / (run["bytes_per_parameter"] * self.parameters))

    def of_path(self, path: str, fewer_bits: bool | None = None) -> list[Label]:
        """The contenders of a path; with or without those on bfloat16 parameters, where that is said."""
        return [x for x in self.runs if x[0] == path and (fewer_bits is None or ("bfloat16" in x[1]) == fewer_bits)]


def load(name: str) -> dict[str, Any]:
    """A file of results."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def finished(name: str, key: str) -> dict[str, Any] | None:
    """A file of results, if there is one and it has this entry, which a benchmark writes at its end."""
    found = load(name) if (RESULTS / name).exists() else {}
    return found if key in found else None


@cache
def cases(name: str) -> dict[tuple[str, int], Case]:
    """The cases of a speed benchmark, by workload and threads."""
    file = load(name)
    if file["interrupted"]:
        raise ValueError(f"{RESULTS / name} must be of a run that came to its end, but that was interrupted")
    found = {}
    for case in file["cases"]:
        runs = {(run["path"], run["name"]): run for run in case["contenders"] if run["status"] == "measured"}
        about = {key: case[key] for key in ("workload", "title", "tensors", "parameters", "threads")}
        found[case["workload"], case["threads"]] = Case(**about, runs=runs)
    return found


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown whose first columns begin at the left."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def paragraph(text: str) -> str:
    """Text in lines."""
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def quartiles(low: float, middle: float, high: float) -> str:
    """A quotient with its quartiles."""
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def ms(value: float | None) -> str:
    """A time with three digits or so."""
    return cell(value, ",.0f" if value and value >= 100 else ".1f" if value and value >= 10 else ".2f")


def titled(label: Label) -> str:
    """The name of an optimizer in torch, with the package if it is not ours."""
    path, name = label
    package, _, optimizer = name.partition(" ")
    return name if path == OURS else f"{optimizer} ({package})" if path == PACKAGES else f"{name} ({path})"


def marked(name: str) -> str:
    """One of ours, its class as code."""
    cls, comma, setting = name.partition(",")
    return f"`{cls}`{comma}{setting}"
