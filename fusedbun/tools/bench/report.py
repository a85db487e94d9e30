"""The tables on stdout, and the progress on stderr."""

from __future__ import annotations

from types import TracebackType

from rich import box, progress
from rich.console import Console
from rich.table import Table

from fusedbun.tools.bench.measure import MEASURED, PENDING
from fusedbun.tools.bench.results import Case, Results
from fusedbun.tools.shared.table import cell

_HEADS = (
    *("median\nms", "quartiles\nms apart", "bytes a\nparam.", "GB/s", "of the\nlimit", "times\nref."),
    *("temp.\nMiB", "first step\nms", "state bytes\na param."),
)
_WIDTH = 200  # more than any table needs: on a narrower terminal a line breaks, and no number is cut


def show(results: Results, *remarks: str) -> None:
    """Prints a table for every case, and remarks below, a line each."""
    console = Console(highlight=False, width=_WIDTH)
    for case in results.measured:
        console.print(_table(case, results.interrupted))
        for line in _missing(case):
            console.print(line, markup=False, soft_wrap=True)
        console.print()
    for remark in remarks:
        console.print(remark, markup=False, soft_wrap=True)  # a long path stays whole


def _table(case: Case, interrupted: bool) -> Table:
    title = f"{case.title}{', interrupted' if interrupted else ''}\nreference: {case.reference.contender.label}"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("optimizer", vertical="bottom", no_wrap=True)
    for head in _HEADS:
        table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    for path, members in case.by_path().items():
        table.add_row(f"[bold]{path}")
        for one in members:
            table.add_row(
                f"  {one.contender.name}",
                _ms(case.median(one)),
                _ms(case.spread(one)),
                cell(case.traffic(one), ".2f"),
                cell(_scaled(case.bandwidth(one), 1e-9), ".2f"),
                cell(case.share(one), ".0%"),
                cell(case.ratio(one), ".2f"),
                cell(_scaled(one.temporaries, 2**-20), ",.1f"),
                _ms(one.first_step),
                cell(case.state(one), ".2f"),
            )
    return table


def _missing(case: Case) -> list[str]:
    """A line for everyone who has no times."""
    without = [one for one in case.measurements if one.status not in (MEASURED, PENDING)]
    return [f"{one.contender.label}: {one.status} ({one.reason})" for one in without]


def _ms(seconds: float | None) -> str:
    return cell(_scaled(seconds, 1e3), ",.0f" if seconds and seconds >= 1 else ".2f")


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


class Display:
    """Progress: a bar for every case on a terminal, elsewhere a line where it and each of its stages begins."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = progress.Progress(
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[case]}: {task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar: progress.TaskID | None = None
        self._total = 0
        self._is_new_stage = False

    def __enter__(self) -> Display:
        self._bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.__exit__(kind, error, traceback)

    def start(self, case: Case) -> None:
        """A case begins."""
        name = f"{case.workload.name}, {case.threads} threads"
        if self._bar is not None:
            self._bars.remove_task(self._bar)
        self._bar, self._total = self._bars.add_task("", total=0, case=name), 0
        if not self._console.is_terminal:
            self._console.print(f"measuring {case.title}", soft_wrap=True)

    def expect(self, steps: int) -> None:
        """So many more calls of `advance` are to come."""
        self._total += steps
        self._is_new_stage = True
        if self._bar is not None:
            self._bars.update(self._bar, total=self._total)

    def advance(self, doing: str) -> None:
        """A part is done; this is the next."""
        if self._bar is not None:
            self._bars.update(self._bar, advance=1, description=doing)
        if self._is_new_stage and not self._console.is_terminal:
            self._console.print(f"  {doing}", soft_wrap=True)
        self._is_new_stage = False
