"""Tables on stdout, and progress on stderr: bars on a terminal, elsewhere lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn
from rich.table import Table

Heads = Literal["top", "bottom"]


def new_table(title: str, texts: Iterable[str], numbers: Iterable[str], heads: Heads = "bottom") -> Table:
    """A table without rows: heads of the columns of text, and then of those of numbers, at the "top" or "bottom"."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for head in texts:
        table.add_column(head, vertical="bottom", no_wrap=True)
    for head in numbers:
        table.add_column(head, justify="right", vertical=heads, no_wrap=True)
    return table


def print_all(parts: Iterable[RenderableType], width: int | None = None) -> None:
    """Prints tables and lines of text; a line breaks nowhere, so that a long path stays whole."""
    console = Console(highlight=False, width=width)
    for part in parts:
        is_line = isinstance(part, str)
        console.print(part, markup=not is_line, soft_wrap=is_line)


def cell(value: float | None, form: str) -> str:
    """A number in a table, or a dash where there is none."""
    return "-" if value is None else format(value, form)


class Bars(Progress):
    """Bars of some columns on a terminal; elsewhere the lines that are said beside them."""

    def __init__(self, *columns: ProgressColumn) -> None:
        console = Console(stderr=True, highlight=False)
        super().__init__(*columns, console=console, disable=not console.is_terminal)

    def say(self, line: str) -> None:
        """A line in the place of the bars, where there is no terminal."""
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)
