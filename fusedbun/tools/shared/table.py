"""The table of results on stdout."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from fusedbun.tools.train.results import Results


def show(results: Results, *remarks: str) -> None:
    """Prints a row for every run, and remarks below, a line each."""
    settings = results.settings
    title = f"{results.parameters:,} {settings.dtype} parameters, epochs: {settings.epochs}"
    title += ", interrupted" if results.interrupted else ""
    title += "\nlearning rate: " + ", ".join(f"{rate:g} for {name}" for name, rate in settings.learning_rates.items())
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("optimizer", vertical="bottom", no_wrap=True)
    table.add_column("framework", vertical="bottom", no_wrap=True)
    for head in ("steps", "test\naccuracy", "test\nloss", "state\nbytes", "ms a\nstep"):
        table.add_column(head, justify="right", no_wrap=True)
    if len(settings.frameworks) == 2:
        table.add_column("weights\ndiffer by", justify="right", no_wrap=True)
    for run in results.runs:
        cells = [
            f"{len(run.losses):,}",
            cell(run.score and run.score.accuracy, ".2%"),
            cell(run.score and run.score.loss, ".4f"),
            cell(run.state_bytes, ",d"),
            cell(run.ms_per_step, ".2f"),
        ]
        if len(settings.frameworks) == 2:
            cells.append(cell(results.difference(run.optimizer), ".1e"))
        table.add_row(run.optimizer, run.framework, *cells)
    console = Console(highlight=False)
    console.print(table)
    for remark in remarks:
        console.print(remark, markup=False, soft_wrap=True)  # a long path stays whole


def cell(value: float | None, form: str) -> str:
    """A number in a table, or a dash where there is none."""
    return "-" if value is None else format(value, form)
