"""What the runs say: rows for tables, and the picture."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.quality.contenders import ADAMW, FUSEDBUN, INT4, OF_MEANS, SM3, WITHOUT_MOMENTUM
from benchmarks.quality.workloads import LEARNT

RESULTS = Path(__file__).parent.parent / "results"
PICTURE = RESULTS / "quality.png"
DRAWN = tuple(workload.name for workload in LEARNT)
HEADS = (
    *("", "learning rate", "of AdamW's", "test loss", "test accuracy"),
    *("steps to AdamW's loss", "seconds to it", "state, bytes a parameter"),
)
# Okabe and Ito's, for the curves; the others are only among the points.
COLOURS = {
    ADAMW: "#000000",
    "NAdamW": "#999999",
    FUSEDBUN: "#D55E00",
    WITHOUT_MOMENTUM: "#E69F00",
    OF_MEANS: "#0072B2",
    "SM3": "#56B4E9",
    "DecoupledLionW": "#009E73",
    "Adafactor": "#CC79A7",
}


@dataclass(frozen=True)
class Row:
    """An optimizer's results in a workload.

    Args:
        title: its name.
        of: the results, as they are in the file.
        adamw: AdamW's; None where it has none.
        steps: of a run.
    """

    title: str
    of: dict[str, Any]
    adamw: dict[str, Any] | None
    steps: int

    @property
    def is_stable(self) -> bool:
        """Whether every seed came to an end, and none so far from the others that the mean means nothing."""
        return self.of["loss"] is not None and self.of["loss_deviation"] < self.of["loss"]

    @property
    def relative_rate(self) -> float | None:
        """The best learning rate over AdamW's."""
        return self.of["learning_rate"] / self.adamw["learning_rate"] if self.adamw else None

    @property
    def steps_to_adamw(self) -> int | None:
        """After how many steps its mean loss is as low as AdamW's at the end; None if it never is."""
        if self.adamw is None or self.adamw["loss"] is None:
            return None
        return next((step for step, loss in self.of["curve"] if loss is not None and loss <= self.adamw["loss"]), None)

    @property
    def seconds_to_adamw(self) -> float | None:
        """The processor's time until then."""
        steps = self.steps_to_adamw
        return None if steps is None else steps / self.steps * float(self.of["seconds"])

    def cells(self) -> list[str]:
        """The row, without the title."""
        loss, accuracy = self.of["loss"], self.of["accuracy"]
        steps, seconds, relative = self.steps_to_adamw, self.seconds_to_adamw, self.relative_rate
        return [
            f"{self.of['learning_rate']:.3g}" + ("" if self.of["inside_grid"] else " (edge)"),
            "-" if relative is None else f"{relative:.3g}",
            "diverged" if loss is None else f"{loss:.4f} ± {self.of['loss_deviation']:.4f}",
            "-" if accuracy is None else f"{accuracy:.2%} ± {self.of['accuracy_deviation']:.2%}",
            "-" if steps is None else str(steps),
            "-" if seconds is None else f"{seconds:.2f}",
            f"{self.of['state_bytes_per_parameter']:.2f}",
        ]


def load(name: str) -> dict[str, Any] | None:
    """The file of a workload; None where it has not been run to its end."""
    path = RESULTS / f"quality_{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("results") else None


def rows(name: str) -> list[Row]:
    """The optimizers of a workload, the best first; beside those of an ablation the ones that it varies."""
    file = load(name)
    if file is None:
        return []
    results = dict(file["results"])
    beside = load(file["protocol"]["beside"]) if "beside" in file["protocol"] else None
    if beside:
        results |= {x: beside["results"][x] for x in (ADAMW, FUSEDBUN, INT4, WITHOUT_MOMENTUM, SM3, OF_MEANS)}
    adamw = results.get(ADAMW)
    found = [Row(title, of, adamw, file["protocol"]["steps"]) for title, of in results.items()]
    return sorted(found, key=lambda row: math.inf if row.of["loss"] is None else row.of["loss"])


def show(name: str) -> Table:
    """The table for a terminal."""
    file = load(name)
    if file is None:
        return Table(title=f"{name}: not run to its end")
    protocol = file["protocol"]
    title = f"{protocol['title']}: {protocol['about']}; {protocol['steps']} steps of {protocol['batch']}, "
    table = Table(*HEADS, title=f"{title}{len(protocol['seeds'])} seeds")
    for row in rows(name):
        table.add_row(f"[bold]{row.title}[/]" if row.of["ours"] else row.title, *row.cells())
    return table


def draw() -> bytes:
    """A row for each workload: the losses as they fall, and where they end, with one standard deviation, as PNG."""
    names = [name for name in DRAWN if load(name)]
    figure = Figure(figsize=(12, 4.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for (curves, points), name in zip(panels, names, strict=True):
        file, found = load(name), rows(name)
        assert file is not None
        for row in found:
            if row.title in COLOURS and row.is_stable:
                steps, losses = zip(*row.of["curve"], strict=True)
                heights = [math.nan if loss is None else loss for loss in losses]
                curves.plot(steps, heights, color=COLOURS[row.title], label=row.title, linewidth=1.6)
        curves.set_yscale("log")
        curves.set(title=f"{file['protocol']['title']}: test loss", xlabel="step", ylabel="loss (log scale)")
        curves.legend(frameon=False, fontsize=8)
        ended = [row for row in reversed(found) if row.is_stable]
        for k, row in enumerate(ended):
            colour = COLOURS.get(row.title, "#444444")
            points.errorbar(row.of["loss"], k, xerr=row.of["loss_deviation"], fmt="o", color=colour, capsize=3)
        points.set_yticks(range(len(ended)), [row.title for row in ended], fontsize=8)
        for label, row in zip(points.get_yticklabels(), ended, strict=True):
            label.set_fontweight("bold" if row.of["ours"] else "normal")
        adamw = found[0].adamw
        if adamw and adamw["loss"] is not None:
            points.axvline(adamw["loss"], color=COLOURS[ADAMW], linewidth=0.8, linestyle=":")
        points.set(title="at the end, ± one standard deviation (bold: ours)", xlabel="test loss")
        for axes in (curves, points):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
