"""What `fusedbun bench` measured, and how it is shown: tables on stdout, progress on stderr, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from fusedbun.tools.bench.contenders import JAX_OURS, LIMIT, TORCH_OURS
from fusedbun.tools.bench.measure import MEASURED, PENDING, Measurement
from fusedbun.tools.bench.shapes import Workload
from fusedbun.tools.shared.picture import BLACK, BLUE, ORANGE, style_bars, to_png
from fusedbun.tools.shared.table import Bars, cell, new_table, print_all

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
_IDLE_LOAD = 0.3  # this command itself, starting
_PANEL, _ROW, _MARGIN = 5.0, 0.24, 1.6  # inches: of a panel, of a bar, of titles and axes

Row = tuple[str, str]  # path and name


@dataclass
class Case:
    """The measurements of a workload on a number of threads; the first is the reference, whom all are divided by."""

    workload: Workload
    threads: int
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def reference(self) -> Measurement:
        return self.measurements[0]

    @property
    def title(self) -> str:
        workload, threads = self.workload, f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{workload.title}: {workload.parameters:,} parameters in {len(workload.shapes)} tensors, {threads}"

    def by_path(self) -> dict[str, list[Measurement]]:
        """Those with times, path by path; the machine's limit is the first of the paths."""
        order = dict.fromkeys([LIMIT, *(one.contender.path for one in [*self.measurements[1:], self.reference])])
        timed = [one for one in self.measurements if one.seconds]
        found = {path: [one for one in timed if one.contender.path == path] for path in order}
        return {path: members for path, members in found.items() if members}

    def median(self, one: Measurement) -> float | None:
        """The median of its times, in seconds."""
        return statistics.median(one.seconds.values()) if one.seconds else None

    def spread(self, one: Measurement) -> float | None:
        """The distance between the quartiles of its times, in seconds."""
        if len(one.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(one.seconds.values(), n=4, method="inclusive")
        return high - low

    def ratio(self, one: Measurement) -> float | None:
        """Its time over the reference's: the median of the rounds in which both stepped."""
        return quotient(one.seconds, self.reference.seconds)

    def state(self, one: Measurement) -> float | None:
        """The bytes of state per parameter."""
        return None if one.state_bytes is None else one.state_bytes / self.workload.parameters

    def traffic(self, one: Measurement) -> float | None:
        """The bytes per parameter that the step has to move."""
        state = self.state(one)
        return None if state is None else one.contender.bytes_per_parameter(state)

    def bandwidth(self, one: Measurement) -> float | None:
        """These bytes over the median time, in bytes a second."""
        traffic, seconds = self.traffic(one), self.median(one)
        return None if traffic is None or not seconds else traffic * self.workload.parameters / seconds

    def share(self, one: Measurement) -> float | None:
        """Its bandwidth over that of the limit whose bytes are nearest, in the rounds in which both stepped."""
        traffic, limits = self.traffic(one), self.by_path().get(LIMIT)
        if traffic is None or not limits:
            return None
        nearest = min(limits, key=lambda limit: abs((self.traffic(limit) or 0) - traffic))
        slower = quotient(one.seconds, nearest.seconds)
        return traffic / (self.traffic(nearest) or 0) / slower if slower else None

    def report(self) -> dict[str, Any]:
        """The case for a JSON file."""
        return {
            "workload": self.workload.name,
            "title": self.workload.title,
            "tensors": len(self.workload.shapes),
            "parameters": self.workload.parameters,
            "threads": self.threads,
            "reference": self.reference.contender.label,
            "contenders": [self.numbers(one) for one in self.measurements],
        }

    def numbers(self, one: Measurement) -> dict[str, Any]:
        """A contender for a JSON file."""
        return {
            "path": one.contender.path,
            "name": one.contender.name,
            "status": one.status,
            "reason": one.reason,
            "median_ms": _times(1e3, self.median(one)),
            "interquartile_ms": _times(1e3, self.spread(one)),
            "bytes_per_parameter": self.traffic(one),
            "gigabytes_per_second": _times(1e-9, self.bandwidth(one)),
            "share_of_limit": self.share(one),
            "ratio_to_reference": self.ratio(one),
            "temporary_bytes": one.temporaries,
            "first_step_ms": _times(1e3, one.first_step),
            "state_bytes_per_parameter": self.state(one),
            "rounds": list(one.seconds),
            "ms": [round(1e3 * seconds, 6) for seconds in one.seconds.values()],
        }


@dataclass
class Results:
    """Every case so far; `interrupted` where some are missing or not finished."""

    settings: Mapping[str, Any]  # as a JSON file has them
    machine: Mapping[str, Any]
    cases: list[Case] = field(default_factory=list)
    interrupted: bool = False

    @property
    def measured(self) -> list[Case]:
        """The cases with a time."""
        return [case for case in self.cases if any(one.seconds for one in case.measurements)]

    def report(self) -> dict[str, Any]:
        """The results for a JSON file."""
        return {
            "command": "fusedbun bench",
            "settings": self.settings,
            "machine": self.machine,
            "interrupted": self.interrupted,
            "cases": [case.report() for case in self.measured],
        }


def quotient(times: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """The median of the quotients of two contenders' times in the rounds that both have; None where there is none."""
    both = [seconds / others[k] for k, seconds in times.items() if others.get(k)]
    return statistics.median(both) if both else None


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


class Display(Bars):
    """Progress: a bar for every case on a terminal, elsewhere a line where it and each of its stages begins."""

    def __init__(self) -> None:
        super().__init__(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[case]}: {task.description}"),
        )
        self._total, self._is_new_stage = 0, False

    def begin(self, case: Case) -> None:
        for bar in self.task_ids:
            self.remove_task(bar)
        self.add_task("", total=0, case=f"{case.workload.name}, {case.threads} threads")
        self._total = 0
        self.say(f"measuring {case.title}")

    def expect(self, steps: int) -> None:
        """So many more calls of `proceed` are to come."""
        self._total += steps
        self._is_new_stage = True
        self.update(self.task_ids[0], total=self._total)

    def proceed(self, doing: str) -> None:
        """A part is done; this is the next."""
        self.update(self.task_ids[0], advance=1, description=doing)
        if self._is_new_stage:
            self.say(f"  {doing}")
        self._is_new_stage = False


def show(results: Results, *remarks: str) -> None:
    """Prints a table for every case with a line for everyone who has no times, and remarks below, a line each."""
    parts: list[RenderableType] = []
    for case in results.measured:
        title = f"{case.title}{', interrupted' * results.interrupted}\nreference: {case.reference.contender.label}"
        table = new_table(title, ["optimizer"], [head for _, head, _ in _COLUMNS])
        for path, members in case.by_path().items():
            table.add_row(f"[bold]{path}")
            for one in members:
                numbers = case.numbers(one)
                cells = (_cell(name, numbers[name], form) for name, _, form in _COLUMNS)
                table.add_row(f"  {one.contender.name}", *cells)
        without = [one for one in case.measurements if one.status not in (MEASURED, PENDING)]
        parts += [table, *(f"{one.contender.label}: {one.status} ({one.reason})" for one in without), ""]
    load, cpus = results.machine["load_average"], results.machine["cpus"]
    if load is not None and load[0] > cpus - max(results.settings["threads"]) + _IDLE_LOAD:
        busy = f"other processes ran at the beginning (load {load[0]}, {cpus} CPUs)"
        parts.append(f"{busy}: trust quotients, and repeat when idle")
    print_all([*parts, *remarks], _WIDTH)


def _cell(name: str, value: float | None, form: str) -> str:
    if value is not None and name == "temporary_bytes":
        value /= 2**20
    return cell(value, ",.0f" if name.endswith("_ms") and value is not None and value >= 1e3 else form)


def draw(results: Results) -> bytes:
    """A panel for every case, as PNG."""
    cases = results.measured
    places, titles = _places(cases)
    height = _MARGIN + _ROW * (len(places) + len(titles))
    figure = Figure(figsize=(2.5 + _PANEL * len(cases), height), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        _draw_case(axes, case, places)
    panels[0].set_yticks(list(places.values()), [name for _, name in places])
    panels[0].set_ylim(max(places.values()) + 0.7, -1.7)
    beside: dict[str, Any] = {"transform": panels[0].get_yaxis_transform(), "ha": "right", "va": "center"}
    for path, place in titles.items():
        panels[0].text(-0.01, place, path, weight="bold", **beside)
    interrupted = " (interrupted)" if results.interrupted else ""
    figure.suptitle(f"Time of an optimizer's step{interrupted}, {results.machine['cpu']}")
    return to_png(figure, dpi=110)


def _places(cases: list[Case]) -> tuple[dict[Row, int], dict[str, int]]:
    """How far down everyone is who has a ratio in some case, from fast to slow in the first, and their path's name."""
    ratios: dict[str, dict[Row, float]] = {}
    for case in cases:
        for path, members in case.by_path().items():
            for one in members:
                if (ratio := case.ratio(one)) is not None:
                    ratios.setdefault(path, {}).setdefault((path, one.contender.name), ratio)
    places: dict[Row, int] = {}
    titles: dict[str, int] = {}
    for path, rows in ratios.items():
        titles[path] = len(places) + len(titles) - 1
        for row in sorted(rows, key=rows.__getitem__):
            places[row] = len(places) + len(titles) - 1
    return places, titles


def _draw_case(axes: Axes, case: Case, places: dict[Row, int]) -> None:
    found = {(one.contender.path, one.contender.name): case.ratio(one) for one in case.measurements}
    ratios = {row: ratio for row, ratio in found.items() if ratio is not None}
    for row, ratio in ratios.items():  # a bar begins at the reference: on a log scale there is no zero to begin at
        colour = BLUE if row[0].startswith((TORCH_OURS, JAX_OURS)) else BLACK if row[0] == LIMIT else ORANGE
        axes.barh(places[row], ratio - 1, left=1, height=0.7, color=colour)
        offset, side = ((-3, "right"), (3, "left"))[ratio >= 1]
        at: dict[str, Any] = {"xytext": (offset, 0), "textcoords": "offset points", "ha": side, "va": "center"}
        axes.annotate(f"{ratio:.2f}", (ratio, places[row]), fontsize=8, **at)
    axes.axvline(1, color="#666666", linewidth=1)
    axes.set_title(case.title.replace(": ", "\n", 1), fontsize=10)
    axes.set(xscale="log", xlim=(min(ratios.values()) / 2, max(ratios.values()) * 2))
    axes.set_xlabel(f"← faster   times {case.reference.contender.label} (log scale)   slower →")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style_bars(axes)
