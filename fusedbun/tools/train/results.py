"""What `fusedbun train` measures, and how it is shown: a table on stdout, progress on stderr, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from fusedbun.tools.shared.files import finite
from fusedbun.tools.shared.machine import versions
from fusedbun.tools.shared.picture import BLUE, GREEN, ORANGE, VERMILION, to_png
from fusedbun.tools.shared.table import Bars, cell, new_table, print_all
from fusedbun.tools.train.network import Score, Weights
from fusedbun.tools.train.settings import Settings

# An optimizer has a colour, and a framework a style, such that two curves that coincide are both seen.
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE)
_STYLES: dict[str, dict[str, Any]] = {
    "torch": {"linestyle": "-", "linewidth": 4, "alpha": 0.4, "markersize": 6},
    "flax": {"linestyle": (0, (4, 2)), "linewidth": 1.6, "markersize": 3},
}
_WINDOW = 20  # steps: long enough to see one curve behind another, short beside a run


@dataclass
class Run:
    """One training, by one optimizer in one framework; it grows while it runs."""

    optimizer: str
    framework: str
    learning_rate: float  # at the start
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # of every step
    seconds: list[float] = field(default_factory=list)  # of every step
    scores: list[tuple[int, Score]] = field(default_factory=list)  # after how many steps it was tested
    state_bytes: int | None = None
    weights: Weights | None = None  # after the last step

    @property
    def title(self) -> str:
        return f"{self.optimizer} in {self.framework}"

    @property
    def score(self) -> Score | None:
        """The last test's."""
        return self.scores[-1][1] if self.scores else None

    @property
    def ms_per_step(self) -> float | None:
        """The median without the first step, which compiles and allocates."""
        return 1e3 * statistics.median(self.seconds[1:]) if self.seconds[1:] else None

    def report(self) -> dict[str, Any]:
        """The run for a JSON file."""
        return {
            "optimizer": self.optimizer,
            "framework": self.framework,
            "learning_rate": self.learning_rate,
            "hyperparameters": dict(self.hyperparameters),
            "finished": self.weights is not None,
            "test_accuracy": self.score and self.score.accuracy,
            "test_loss": self.score and finite(self.score.loss),
            "state_bytes": self.state_bytes,
            "ms_per_step": self.ms_per_step,
            "curves": {
                "train": {"step": list(range(1, len(self.losses) + 1)), "loss": list(map(finite, self.losses))},
                "test": {
                    "step": [step for step, _ in self.scores],
                    "accuracy": [score.accuracy for _, score in self.scores],
                    "loss": [finite(score.loss) for _, score in self.scores],
                },
            },
        }


@dataclass
class Results:
    """Every run so far; `interrupted` where some are missing or not finished."""

    settings: Settings
    parameters: int
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False

    def difference(self, optimizer: str) -> float | None:
        """The largest absolute difference between the weights of two frameworks; None where there are not two."""
        ends = [run.weights for run in self.runs if run.optimizer == optimizer and run.weights is not None]
        if len(ends) != 2:
            return None
        a, b = ends
        return float(max(np.abs(a[name] - b[name]).max() for name in a))

    def report(self) -> dict[str, Any]:
        """The results for a JSON file."""
        differences = {name: self.difference(name) for name in self.settings.learning_rates}
        return {
            "command": "fusedbun train",
            "interrupted": self.interrupted,
            "settings": {name: x for name, x in asdict(self.settings).items() if name != "output"},
            "versions": versions(),
            "parameters": self.parameters,
            "weight_difference": {name: finite(value) for name, value in differences.items() if value is not None},
            "runs": [run.report() for run in self.runs],
        }


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
        self._epochs = epochs

    def begin(self, run: Run) -> None:
        self.add_task(run.title, total=self._epochs, score="")

    def end_epoch(self, run: Run) -> None:
        """An epoch of the run is over, and its test."""
        score = f"test accuracy {run.scores[-1][1].accuracy:.1%}"
        self.update(self.task_ids[-1], advance=1, score=score)
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
    colours = dict(zip(results.settings.learning_rates, cycle(_COLOURS), strict=False))
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
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center", ncols=max(2, len(results.settings.learning_rates)), handlelength=4, frameon=False
    )
    figure.suptitle("A small network on handwritten digits" + (" (interrupted)" if results.interrupted else ""))
    return to_png(figure, dpi=150)
