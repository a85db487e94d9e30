"""The picture of the curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fusedbun.tools.shared.picture import BLUE, VERMILION, style_curves, to_png
from fusedbun.tools.train.network import Array
from fusedbun.tools.train.results import Results, Run

# An optimizer has a colour, and a framework a style, such that two curves that coincide are both seen.
_COLOURS = (BLUE, VERMILION)
_STYLES: dict[str, dict[str, Any]] = {
    "torch": {"linestyle": "-", "linewidth": 4, "alpha": 0.4, "markersize": 6},
    "flax": {"linestyle": (0, (4, 2)), "linewidth": 1.6, "markersize": 3},
}
_WINDOW = 20  # steps: long enough to see one curve behind another, short beside a run


def draw(results: Results) -> bytes:
    """The training loss and the test accuracy over the steps, as PNG."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(results.settings.learning_rates, _COLOURS, strict=False))
    for run in results.runs:
        _draw_run(run, {"color": colours[run.optimizer], **_STYLES[run.framework]}, left, right)
    left.set(title=f"Training loss, mean of the last {_WINDOW} steps", ylabel="cross-entropy (log scale)", yscale="log")
    right.set(title="Test accuracy, after every epoch", ylabel="images classified correctly")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        style_curves(axes)
    figure.legend(loc="outside lower center", ncols=2, handlelength=4, frameon=False)
    figure.suptitle("A small network on handwritten digits" + (" (interrupted)" if results.interrupted else ""))
    return to_png(figure, dpi=150)


def _draw_run(run: Run, style: dict[str, Any], left: Axes, right: Axes) -> None:
    name = run.title + (f": {run.score.accuracy:.2%}" if run.score else "")
    left.plot(np.arange(1, len(run.losses) + 1), _trailing_mean(run.losses), **style)
    steps, accuracies = [step for step, _ in run.scores], [score.accuracy for _, score in run.scores]
    right.plot(steps, accuracies, marker="o", label=name, **style)


def _trailing_mean(losses: list[float]) -> Array:
    """The mean of every loss and the ones before it, of as many as there are up to `_WINDOW`."""
    return np.array([np.mean(losses[max(0, end - _WINDOW) : end]) for end in range(1, len(losses) + 1)])
