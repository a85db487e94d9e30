"""The picture: a bar for every contender, in the reference's steps, grouped by path."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fusedbun.tools.bench.contenders import JAX_OURS, LIMIT, TORCH_OURS
from fusedbun.tools.bench.results import Case, Results
from fusedbun.tools.shared.picture import BLACK, BLUE, ORANGE, style_bars, to_png

_WIDTH, _ROW, _MARGIN = 5.0, 0.24, 1.6  # inches: of a panel, of a bar, of titles and axes

Row = tuple[str, str]


def draw(results: Results) -> bytes:
    """A panel for every case, as PNG."""
    cases = results.measured
    rows = _rows(cases)
    paths = [path for path, _ in groupby(rows, key=lambda row: row[0])]
    height = _MARGIN + _ROW * (len(rows) + len(paths))
    figure = Figure(figsize=(2.5 + _WIDTH * len(cases), height), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    places = _places(rows)
    for axes, case in zip(panels, cases, strict=True):
        _draw_case(axes, case, places)
    panels[0].set_yticks(list(places.values()), [name for _, name in places])
    panels[0].set_ylim(max(places.values()) + 0.7, -1.7)
    for path in paths:
        first = min(place for row, place in places.items() if row[0] == path)
        panels[0].text(
            -0.01, first - 1, path, transform=panels[0].get_yaxis_transform(), weight="bold", ha="right", va="center"
        )
    interrupted = " (interrupted)" if results.interrupted else ""
    figure.suptitle(f"Time of an optimizer's step{interrupted}, {results.machine['cpu']}")
    return to_png(figure, dpi=110)


def _rows(cases: list[Case]) -> list[Row]:
    """Everyone who has a ratio in some case: path by path, in a path from fast to slow in the first case."""
    rows: dict[str, dict[Row, float]] = {}
    for case in cases:
        for path, members in case.by_path().items():
            for one in members:
                ratio = case.ratio(one)
                if ratio is not None:
                    rows.setdefault(path, {}).setdefault((path, one.contender.name), ratio)
    return [row for ratios in rows.values() for row in sorted(ratios, key=ratios.__getitem__)]


def _places(rows: list[Row]) -> dict[Row, float]:
    """How far down each bar is: a line for every row, and one for the name of a path before its rows."""
    places: dict[Row, float] = {}
    line = -1.0
    for _, members in groupby(rows, key=lambda row: row[0]):
        line += 1
        for row in members:
            places[row] = line
            line += 1
    return places


def _draw_case(axes: Axes, case: Case, places: dict[Row, float]) -> None:
    found = {(one.contender.path, one.contender.name): case.ratio(one) for one in case.measurements}
    ratios = {row: ratio for row, ratio in found.items() if ratio is not None}
    for row, ratio in ratios.items():  # a bar begins at the reference: on a log scale there is no zero to begin at
        axes.barh(places[row], ratio - 1, left=1, height=0.7, color=_colour(row[0]))
        offset, side = ((-3, "right"), (3, "left"))[ratio >= 1]
        at: dict[str, Any] = {"xytext": (offset, 0), "textcoords": "offset points", "ha": side, "va": "center"}
        axes.annotate(f"{ratio:.2f}", (ratio, places[row]), fontsize=8, **at)
    axes.axvline(1, color="#666666", linewidth=1)
    axes.set(
        xscale="log", xlim=(min(ratios.values()) / 2, max(ratios.values()) * 2), title=case.title.replace(": ", "\n", 1)
    )
    axes.title.set_fontsize(10)
    axes.set_xlabel(f"← faster   times {case.reference.contender.label} (log scale)   slower →")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style_bars(axes)


def _colour(path: str) -> str:
    if path == LIMIT:
        return BLACK
    return BLUE if path.startswith((TORCH_OURS, JAX_OURS)) else ORANGE
