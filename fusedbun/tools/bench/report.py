"""The tables on stdout, and the progress on stderr."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fusedbun.tools.bench.measure import MEASURED, PENDING
from fusedbun.tools.bench.results import Case, Results
from fusedbun.tools.shared.progress import print_line, progress_bars
from fusedbun.tools.shared.table import cell, new_table, print_all

# The numbers of a row: their names in a JSON file, the heads of their columns, and how they are written.
_COLUMNS = (
    ("median_ms", "median\nms", ".2f"),
    ("interquartile_ms", "quartiles\nms apart", ".2f"),
    ("bytes_per_parameter", "bytes a\nparam.", ".2f"),
    ("gigabytes_per_second", "GB/s", ".2f"),
    ("share_of_limit", "of the\nlimit", ".0%"),
    ("ratio_to_reference", "times\nref.", ".2f"),
    ("temporary_bytes", "temp.\nMiB", ",.1f"),
    ("first_step_ms", "first step\nms", ".2f"),
    ("state_bytes_per_parameter", "state bytes\na param.", ".2f"),
)
_WIDTH = 200  # more than any table needs: on a narrower terminal a line breaks, and no number is cut


def show(results: Results, *remarks: str) -> None:
    """Prints a table for every case, and remarks below, a line each."""
    print_all([*(part for case in results.measured for part in _parts(case, results.interrupted)), *remarks], _WIDTH)


def _parts(case: Case, interrupted: bool) -> Iterator[RenderableType]:
    """The table of a case, and a line for everyone who has no times."""
    yield _table(case, interrupted)
    for one in case.measurements:
        if one.status not in (MEASURED, PENDING):
            yield f"{one.contender.label}: {one.status} ({one.reason})"
    yield ""


def _table(case: Case, interrupted: bool) -> Table:
    title = f"{case.title}{', interrupted' if interrupted else ''}\nreference: {case.reference.contender.label}"
    table = new_table(title, ["optimizer"], [head for _, head, _ in _COLUMNS])
    for path, members in case.by_path().items():
        table.add_row(f"[bold]{path}")
        for one in members:
            numbers = case.numbers(one)
            table.add_row(f"  {one.contender.name}", *(_cell(name, numbers[name], form) for name, _, form in _COLUMNS))
    return table


def _cell(name: str, value: float | None, form: str) -> str:
    if value is not None and name == "temporary_bytes":
        value /= 2**20
    return cell(value, ",.0f" if name.endswith("_ms") and value is not None and value >= 1e3 else form)


class Display:
    """Progress: a bar for every case on a terminal, elsewhere a line where it and each of its stages begins."""

    def __init__(self) -> None:
        self.bars = progress_bars(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[case]}: {task.description}"),
        )
        self._bar: TaskID | None = None
        self._total = 0
        self._is_new_stage = False

    def start(self, case: Case) -> None:
        """A case begins."""
        name = f"{case.workload.name}, {case.threads} threads"
        if self._bar is not None:
            self.bars.remove_task(self._bar)
        self._bar, self._total = self.bars.add_task("", total=0, case=name), 0
        print_line(self.bars, f"measuring {case.title}")

    def expect(self, steps: int) -> None:
        """So many more calls of `advance` are to come."""
        self._total += steps
        self._is_new_stage = True
        if self._bar is not None:
            self.bars.update(self._bar, total=self._total)

    def advance(self, doing: str) -> None:
        """A part is done; this is the next."""
        if self._bar is not None:
            self.bars.update(self._bar, advance=1, description=doing)
        if self._is_new_stage:
            print_line(self.bars, f"  {doing}")
        self._is_new_stage = False
