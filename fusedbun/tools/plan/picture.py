"""The plan as a bar chart."""

from __future__ import annotations

from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fusedbun.tools.plan.estimates import Plan
from fusedbun.tools.plan.sizes import UNITS, readable, unit_of
from fusedbun.tools.shared.picture import BLACK, BLUE, GREEN, ORANGE, VERMILION, style_bars, to_png

_PARTS: dict[str, Any] = {"weights": BLUE, "gradients": ORANGE, "state": GREEN, "temporaries": VERMILION}
_PALER: dict[str, Any] = {part: tuple(0.5 + x / 2 for x in to_rgb(colour)) for part, colour in _PARTS.items()}
_ROW, _MARGIN = 0.42, 1.9  # inches: of a setting, of titles and axes


def draw(plan: Plan) -> bytes:
    """A bar for every setting, and a paler one below it with gradient release, as PNG."""
    rows = plan.pairs()
    unit = unit_of(max((one.total for one in plan.estimates), default=1))
    scale = UNITS[unit]
    figure = Figure(figsize=(10, _MARGIN + _ROW * len(rows)), layout="constrained")
    axes = figure.subplots()
    longest = max((one.total for one in plan.estimates), default=1) / scale
    for place, (_, pair) in enumerate(rows):
        for one, offset, colours in zip(pair, (-0.2, 0.2), (_PARTS, _PALER), strict=True):
            if one is None:
                continue
            at, begin = place + (0.0 if None in pair else offset), 0.0
            for part, colour in colours.items():
                size = getattr(one, part) / scale
                axes.barh(at, size, left=begin, height=0.36, color=colour)
                begin += size
            text = axes.text(begin + 0.008 * longest, at, f"{begin:,.2f}", va="center", fontsize=7)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # in front of the budget's line
    axes.set_yticks(range(len(rows)), [f"{setting.title}, {setting.label}" for setting, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.08 * longest)
    handles: list[Any] = [Patch(color=colour, label=part) for part, colour in _PARTS.items()]
    handles.append(Patch(color="#BBBBBB", label="paler: with gradient release"))
    if plan.budget is not None:
        axes.axvline(plan.budget / scale, color=BLACK, linewidth=1.2, linestyle="--")
        handles.append(Line2D([], [], color=BLACK, linestyle="--", label=f"budget: {readable(plan.budget)}"))
    axes.set_xlabel(f"{unit}, without activations")
    style_bars(axes)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Memory of training {plan.parameters:,} parameters")
    return to_png(figure, dpi=110)
