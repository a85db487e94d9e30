"""Progress on stderr: a bar for every run on a terminal, elsewhere a line where it begins and one where it ends."""

from __future__ import annotations

from types import TracebackType

from rich import progress
from rich.console import Console

from fusedbun.tools.train.results import Run


class Display:
    """Shows how far the runs are.

    Args:
        epochs: the epochs of every run.
    """

    def __init__(self, epochs: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._epochs = epochs
        self._bars = progress.Progress(
            progress.TextColumn("{task.description:<17}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("epochs {task.fields[score]}"),
            progress.TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar = progress.TaskID(0)

    def __enter__(self) -> Display:
        self._bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.__exit__(kind, error, traceback)

    def start(self, run: Run) -> None:
        """A run begins."""
        self._bar = self._bars.add_task(_name(run), total=self._epochs, score="")

    def epoch(self, run: Run) -> None:
        """An epoch of the run is over, and its test."""
        score = f"test accuracy {run.scores[-1][1].accuracy:.1%}"
        self._bars.update(self._bar, advance=1, score=score)
        if not self._console.is_terminal and (len(run.scores) in (1, self._epochs)):
            self._console.print(f"{_name(run)}: epoch {len(run.scores)} of {self._epochs}, {score}", soft_wrap=True)


def _name(run: Run) -> str:
    return f"{run.optimizer} in {run.framework}"
