"""The table on stdout, the progress on stderr, and the picture of the curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from fusedbun.tools.shared.picture import BLUE, VERMILION, style_curves, to_png
from fusedbun.tools.shared.table import Bars, cell, new_table, print_all
from fusedbun.tools.train.results import Results, Run

# An optimizer has a colour, and a framework a style, such that two curves that coincide are both seen.
_COLOURS = (BLUE, VERMILION)
_STYLES: dict[str, dict[str, Any]] = {
    "torch": {"linestyle": "-", "linewidth": 4, "alpha": 0.4, "markersize": 6},
    "flax": {"linestyle": (0, (4, 2)), "linewidth": 1.6, "markersize": 3},
}
_WINDOW = 20  # steps: long enough to see one curve behind another, short beside a run


class Display(Bars):
    """Progress: a bar for every run on a terminal, elsewhere a line for its first and its last epoch."""

    def __init__(self, epochs: int) -> None:
        super().__init__(
            TextColumn("{task.description:<17}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("epochs {task.fields[score]}"),
            TimeElapsedColumn(),
        )
        self._epochs, self._bar = epochs, TaskID(0)

    def begin(self, run: Run) -> None:
        """A run begins."""
        self._bar = self.add_task(run.title, total=self._epochs, score="")

    def end_epoch(self, run: Run) -> None:
        """An epoch of the run is over, and its test."""
        score = f"test accuracy {run.scores[-1][1].accuracy:.1%}"
        self.update(self._bar, advance=1, score=score)
        if len(run.scores) in (1, self._epochs):
            self.say(f"{run.title}: epoch {len(run.scores)} of {self._epochs}, {score}")


def show(results: Results, *remarks: str) -> None:
    """Prints a row for every run, and remarks below, a line each."""
    settings = results.settings
    title = f"{results.parameters:,} {settings.dtype} parameters, epochs: {settings.epochs}"
    title += ", interrupted" if results.interrupted else ""
    title += "\nlearning rate: " + ", ".join(f"{rate:g} for {name}" for name, rate in settings.learning_rates.items())
    heads = ["steps", "test\naccuracy", "test\nloss", "state\nbytes", "ms a\nstep"]
    is_compared = len(settings.frameworks) == 2
    table = new_table(title, ("optimizer", "framework"), [*heads, *["weights\ndiffer by"] * is_compared], "top")
    for run in results.runs:
        table.add_row(
            run.optimizer,
            run.framework,
            f"{len(run.losses):,}",
            cell(run.score and run.score.accuracy, ".2%"),
            cell(run.score and run.score.loss, ".4f"),
            cell(run.state_bytes, ",d"),
            cell(run.ms_per_step, ".2f"),
            *[cell(results.difference(run.optimizer), ".1e")] * is_compared,
        )
    print_all([table, *remarks])


def draw(results: Results) -> bytes:
    """The training loss and the test accuracy over the steps, as PNG."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(results.settings.learning_rates, _COLOURS, strict=False))
    for run in results.runs:
        style = {"color": colours[run.optimizer], **_STYLES[run.framework]}
        ends = range(1, len(run.losses) + 1)
        left.plot(ends, [np.mean(run.losses[max(0, end - _WINDOW) : end]) for end in ends], **style)
        steps, accuracies = [step for step, _ in run.scores], [score.accuracy for _, score in run.scores]
        name = run.title + (f": {run.score.accuracy:.2%}" if run.score else "")
        right.plot(steps, accuracies, marker="o", label=name, **style)
    left.set(title=f"Training loss, mean of the last {_WINDOW} steps", ylabel="cross-entropy (log scale)", yscale="log")
    right.set(title="Test accuracy, after every epoch", ylabel="images classified correctly")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        style_curves(axes)
    figure.legend(loc="outside lower center", ncols=2, handlelength=4, frameon=False)
    figure.suptitle("A small network on handwritten digits" + (" (interrupted)" if results.interrupted else ""))
    return to_png(figure, dpi=150)
