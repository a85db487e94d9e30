"""Progress on stderr: bars on a terminal, elsewhere lines."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Bars of these columns, which are shown on a terminal alone."""
    console = Console(stderr=True, highlight=False)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def print_line(bars: Progress, line: str) -> None:
    """A line in the place of the bars, where there is no terminal."""
    if not bars.console.is_terminal:
        bars.console.print(line, soft_wrap=True)
