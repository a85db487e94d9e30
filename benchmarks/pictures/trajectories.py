"""The paths that the optimizers take on Rosenbrock's and Rastrigin's functions.

The protocol, which is the same for all:

- `STEPS` steps from one start, with the exact gradient, in float64, without weight decay. The learning rate falls to
  zero along a cosine.
- Every optimizer tries the learning rates `RATES`, a factor of the square root of two apart. The one whose mean value
  of the function over the last tenth of the steps is the lowest is drawn: passing by the minimum does not count, nor
  does a path that leaves the picture.
- `TernaryVote` knows the values -1, 0 and +1 only. It starts at the nearest of them, and has no learning rate: its
  threshold is chosen in the same way, among `THRESHOLDS`.
- Both numbers are one vector, as a bias is: it has a second moment for each number, and is not centralized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from lion_pytorch import Lion
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

import fusedbun
from benchmarks.pictures.style import BLUE, VERMILION, YELLOW, png
from fusedbun.recipe import Recipe
from fusedbun.recipes import RECIPES
from fusedbun.tools.train.network import cosine

Array = NDArray[np.float64]
Point = tuple[float, float]

STEPS = 500
RATES = tuple(2.0 ** (k / 2) for k in range(-40, 13))
THRESHOLDS = tuple(2**k for k in range(7))
OURS, OTHERS = BLUE, VERMILION


@dataclass(frozen=True)
class Surface:
    """A function of two numbers.

    Args:
        name: what it is called.
        formula: as its picture shows it.
        value: the function, of arrays too.
        gradient: its gradient.
        start: where the paths start.
        minimum: where it is 0.
        window: the part of the plane that is drawn, (from, to) for x and for y.
        levels: of the contour lines.
    """

    name: str
    formula: str
    value: Callable[[Any, Any], Any]
    gradient: Callable[[float, float], Point]
    start: Point
    minimum: Point
    window: tuple[Point, Point]
    levels: Array


def _rosenbrock_gradient(x: float, y: float) -> Point:
    return -2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)


def _rastrigin_gradient(x: float, y: float) -> Point:
    slope = [2 * z + 20 * math.pi * math.sin(2 * math.pi * z) for z in (x, y)]
    return slope[0], slope[1]


ROSENBROCK = Surface(
    "Rosenbrock",
    "f = (1 - x)² + 100 (y - x²)²",
    lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
    _rosenbrock_gradient,
    start=(-2.0, 2.0),
    minimum=(1.0, 1.0),
    window=((-2.4, 2.4), (-1.3, 3.5)),
    levels=np.logspace(-0.5, 3.5, 11),
)
RASTRIGIN = Surface(
    "Rastrigin",
    "f = 20 + x² - 10 cos 2πx + y² - 10 cos 2πy",
    lambda x, y: 20 + x * x - 10 * np.cos(2 * np.pi * x) + y * y - 10 * np.cos(2 * np.pi * y),
    _rastrigin_gradient,
    start=(-2.2, 3.4),  # not where steps of 1/2 or 1 lead to the minimum by chance
    minimum=(0.0, 0.0),
    window=((-4.4, 4.4), (-4.4, 4.4)),
    levels=np.array([2.0, 10.0, 20.0, 35.0, 50.0, 65.0]),
)


@dataclass(frozen=True)
class Contender:
    """An optimizer of the picture.

    Args:
        title: what the picture calls it.
        make: the optimizer of one parameter, with a learning rate or what is searched in its place.
        searched: what that is called.
        values: those that are tried.
        ours: whether it is one of fusedbun's.
        ternary: whether it knows the values -1, 0 and +1 only.
    """

    title: str
    make: Callable[[torch.Tensor, float], torch.optim.Optimizer]
    searched: str = "lr"
    values: tuple[float, ...] = RATES
    ours: bool = True
    ternary: bool = False


def _made(recipe: Recipe, param: torch.Tensor, lr: float) -> torch.optim.Optimizer:
    """The torch optimizer of a recipe under its recommended settings."""
    made: torch.optim.Optimizer = getattr(fusedbun, recipe.torch_class)([param], lr, **recipe.recommended)
    return made


_PLAIN = {"allow_non_unit_scaling_params": True}  # no types and so no scales: u-muP's Adam is Adam here
_FUSEDBUN = {"Lambda": 0.0, "centralize": True, "use_rms": True}
_OURS = (
    Contender("Fusedbun", lambda p, lr: fusedbun.Fusedbun([p], lr, nesterov=True, **_FUSEDBUN)),
    Contender("Fusedbun, no momentum", lambda p, lr: fusedbun.Fusedbun([p], lr, momentum_beta=0.0, **_FUSEDBUN)),
    Contender("SM3", lambda p, lr: fusedbun.SM3([p], lr)),
    Contender("SM3, momentum 0.9", lambda p, lr: fusedbun.SM3([p], lr, momentum=0.9)),
    Contender("MupAdam, MupAdamW", lambda p, lr: fusedbun.MupAdamW([p], lr, **_PLAIN)),
    Contender("MupSGD, momentum 0.9", lambda p, lr: fusedbun.MupSGD([p], lr, momentum=0.9, **_PLAIN)),
    Contender("DecoupledLionW", lambda p, lr: fusedbun.DecoupledLionW([p], lr)),
    Contender("ScaledOptum (SignSGD)", lambda p, lr: fusedbun.ScaledOptum([p], lr)),
    Contender(
        "TernaryVote",
        lambda p, threshold: fusedbun.TernaryVote([p], threshold=int(threshold)),
        "threshold",
        THRESHOLDS,
        ternary=True,
    ),
)
_TITLES = " ".join(contender.title for contender in _OURS)
CONTENDERS = (
    *_OURS,
    *(Contender(r.torch_class, partial(_made, r)) for r in RECIPES.values() if r.torch_class not in _TITLES),
    Contender("AdamW (torch)", lambda p, lr: torch.optim.AdamW([p], lr, weight_decay=0.0), ours=False),
    Contender("SGD (torch)", lambda p, lr: torch.optim.SGD([p], lr), ours=False),
    Contender("Lion (lion-pytorch)", lambda p, lr: Lion([p], lr), ours=False),
)


class Path(NamedTuple):
    """The points that an optimizer visits, (STEPS + 1, 2), with what was found by the search, and its score."""

    points: Array
    chosen: float
    score: float


def walk(surface: Surface, contender: Contender, value: float) -> Array:
    """The points from the start on, until they leave the window."""
    start = np.array(surface.start)
    if contender.ternary:
        start = np.clip(np.rint(start), -1, 1)
    param = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    param.grad = torch.zeros_like(param)
    optimizer = contender.make(param, value)
    points = [start.tolist()]
    (group,) = optimizer.param_groups
    for rate in cosine(value, STEPS).tolist():
        if not contender.ternary:
            group["lr"] = rate
        x, y = points[-1]
        param.grad.copy_(torch.tensor(surface.gradient(x, y), dtype=torch.float64))
        optimizer.step()
        points.append(param.tolist())
        if not all(low <= z <= high for z, (low, high) in zip(points[-1], surface.window, strict=True)):
            break
    return np.array(points)


def score(surface: Surface, points: Array) -> float:
    """The mean value over the last tenth of the steps; infinity for a path that left the window."""
    if len(points) <= STEPS:  # it was cut off
        return math.inf
    return float(np.mean(surface.value(*points[-(STEPS // 10) :].T)))


def search(surface: Surface, contender: Contender) -> Path:
    """The best path; of equals, that of the lower value searched."""
    tried = [(value, walk(surface, contender, value)) for value in contender.values]
    best, value, points = min(((score(surface, points), value, points) for value, points in tried), key=lambda t: t[:2])
    return Path(points, value, best)


def draw(surface: Surface) -> bytes:
    """A panel for every optimizer, as PNG."""
    rows, columns = math.ceil(len(CONTENDERS) / 4), 4
    figure = Figure(figsize=(13, 3.45 * rows + 0.9), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True)
    grid = np.meshgrid(*(np.linspace(*ends, 300) for ends in surface.window))
    values = surface.value(*grid)
    shades = [str(grey) for grey in np.linspace(1, 0.8, len(surface.levels) + 1)]
    for axes, contender in zip(panels.flat, CONTENDERS, strict=False):
        axes.contourf(*grid, values, surface.levels, colors=shades, extend="both")
        axes.contour(*grid, values, surface.levels, colors="#b0b0b0", linewidths=0.4)
        _draw_path(axes, surface, contender, search(surface, contender))
        axes.set(xlim=surface.window[0], ylim=surface.window[1], aspect="equal")
    handles = [
        panels.flat[0].plot([], [], linestyle="none", color=color, markersize=size, label=label, **style)[0]
        for label, color, size, style in (
            ("start", "black", 8, {"marker": "o", "markerfacecolor": "white"}),
            ("minimum", "black", 13, _STAR),
            (f"after {STEPS} steps", "black", 8, {"marker": "X", "markeredgecolor": "white"}),
            ("every step, ours", OURS, 5, {"marker": "."}),
            ("every step, for comparison", OTHERS, 5, {"marker": "."}),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"{surface.name}: {surface.formula}\n{STEPS} steps, the learning rate falling to 0; of {len(RATES)} the one "
        f"with the lowest mean of f over the last {STEPS // 10} steps; both stand over each panel",
        fontsize=12,
    )
    return png(figure)


_STAR = {"marker": "*", "markerfacecolor": YELLOW, "markeredgecolor": "black"}


def _draw_path(axes: Axes, surface: Surface, contender: Contender, path: Path) -> None:
    colour = OURS if contender.ours else OTHERS
    x, y = path.points.T
    axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.55)
    axes.plot(x, y, linestyle="none", marker=".", markersize=3, color=colour, alpha=0.8)
    axes.plot(*surface.minimum, linestyle="none", markersize=15, **_STAR)
    axes.plot(x[0], y[0], "o", color="black", markerfacecolor="white", markersize=7)
    axes.plot(x[-1], y[-1], "X", color="black", markeredgecolor="white", markersize=8)
    axes.set_title(contender.title, fontsize=11, fontweight="bold", pad=17, color=colour)
    found = f"{contender.searched} {path.chosen:.2g},  f → {path.score:.2g}"
    axes.text(0.5, 1.02, found, transform=axes.transAxes, ha="center", va="bottom", fontsize=9)
