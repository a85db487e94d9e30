"""The table on stdout, and the progress on stderr."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from fusedbun.tools.shared.progress import print_line, progress_bars
from fusedbun.tools.shared.table import cell, new_table, print_all
from fusedbun.tools.train.results import Results, Run


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
        difference = [cell(results.difference(run.optimizer), ".1e")] * is_compared
        table.add_row(
            run.optimizer,
            run.framework,
            f"{len(run.losses):,}",
            cell(run.score and run.score.accuracy, ".2%"),
            cell(run.score and run.score.loss, ".4f"),
            cell(run.state_bytes, ",d"),
            cell(run.ms_per_step, ".2f"),
            *difference,
        )
    print_all([table, *remarks])


class Display:
    """Progress: a bar for every run on a terminal, elsewhere a line where it begins and one where it ends.

    Args:
        epochs: the epochs of every run.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self.bars = progress_bars(
            TextColumn("{task.description:<17}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("epochs {task.fields[score]}"),
            TimeElapsedColumn(),
        )
        self._bar = TaskID(0)

    def start(self, run: Run) -> None:
        """A run begins."""
        self._bar = self.bars.add_task(run.title, total=self._epochs, score="")

    def epoch(self, run: Run) -> None:
        """An epoch of the run is over, and its test."""
        score = f"test accuracy {run.scores[-1][1].accuracy:.1%}"
        self.bars.update(self._bar, advance=1, score=score)
        if len(run.scores) in (1, self._epochs):
            print_line(self.bars, f"{run.title}: epoch {len(run.scores)} of {self._epochs}, {score}")
