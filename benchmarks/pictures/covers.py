"""How a vector per axis stands in for a second moment of every element: SM3's cover and the product of means.

Each row of the stepwise picture is one way to keep second moments, each column a moment in time. There are two
exact ones: the sum of squares so far, which SM3 stands in for, and their running mean, which Fusedbun stands in for.
The stand-ins are what `SM3Accumulate` hands on, from accumulators that are drawn at the edges of the matrix. Under each
stands its relative error, norm(stand-in - exact) / norm(exact), over all elements.

The gradients are of two kinds: made up, normal with a variance that is a row's factor times a column's, and real: those
of the first layer of a small network while it learns scikit-learn's digits.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import fusedbun
from benchmarks.pictures.style import BLUE, VERMILION, image, png
from fusedbun.tools.train.network import batches, digits
from fusedbun.transforms import SM3Accumulate

Array = NDArray[np.float64]

STEPS = 128
SHOWN = (1, 4, 16, 64, 128)  # steps of the stepwise picture
FRAMES = (*range(1, 17), *range(18, 65, 2), *range(68, STEPS + 1, 4))  # of the animated one
BETA = 0.8  # Fusedbun's
ROWS, COLUMNS = 32, 64  # hidden units x pixels of the network
SHADES = "viridis"


class Gradients(NamedTuple):
    """The gradients of every step, (steps, rows, columns), what they are, and what rows and columns are."""

    values: Array
    title: str
    rows: str
    columns: str


@dataclass(frozen=True)
class Way:
    """A way to keep second moments, step by step.

    Args:
        title: what the picture calls it.
        moments: the second moment of every element after every step, (steps, rows, columns).
        accumulators: the accumulators of rows and of columns after every step; none where all elements are kept.
        of: what this stands in for, or None.
    """

    title: str
    moments: Array
    accumulators: list[tuple[Array, Array]]
    of: Way | None = None

    def error(self, step: int) -> float:
        """The relative error after so many steps."""
        exact = self.of.moments[step - 1]
        return float(np.linalg.norm(self.moments[step - 1] - exact) / np.linalg.norm(exact))


def made_up() -> Gradients:
    """Normal numbers with a variance of a row's factor times a column's."""
    draw = np.random.default_rng(0)
    rows, columns = (np.exp(1.5 * draw.standard_normal(n)) for n in (ROWS, COLUMNS))
    values = np.sqrt(np.outer(rows, columns)) * draw.standard_normal((STEPS, ROWS, COLUMNS))
    return Gradients(values, "made-up gradients, of variance row x column", "rows", "columns")


def of_digits() -> Gradients:
    """The gradients of a network's first layer, which Fusedbun trains."""
    (images,) = digits(0, [])
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.ReLU(), nn.Linear(ROWS, 10))
    for param in network.parameters():
        nn.init.normal_(param, std=0.15, generator=generator)
    optimizer = fusedbun.Fusedbun(network.parameters(), lr=1e-3, centralize=True, use_rms=True, nesterov=True)
    values = []
    for _, batch in zip(range(STEPS), batches(images, 64, 5, seed=0), strict=False):
        optimizer.zero_grad()
        pixels = torch.from_numpy(batch.pixels).float().flatten(1)
        nn.functional.cross_entropy(network(pixels), torch.from_numpy(batch.labels)).backward()
        values.append(network[0].weight.grad.double().numpy().copy())
        optimizer.step()
    title = f"gradients of a small network on digits: {ROWS} hidden units x {COLUMNS} pixels"
    return Gradients(np.array(values), title, "units", "pixels")


def ways(gradients: Array) -> list[Way]:
    """Both exact ones, each followed by what stands in for it."""
    squares = gradients**2
    total = Way("exact: the sum of squares", np.cumsum(squares, axis=0), [])
    running, means = np.zeros_like(squares[0]), []
    for square in squares:
        running = BETA * running + (1 - BETA) * square
        means.append(running)
    mean = Way("exact: their running mean", np.array(means), [])
    return [
        total,
        Way("SM3: min(row, column)\nof largest", *_stand_in(SM3Accumulate(), gradients), of=total),
        mean,
        Way("Fusedbun: row x column\nof means", *_stand_in(SM3Accumulate(BETA, "mean", "product"), gradients), of=mean),
        Way("min(row, column)\nof means", *_stand_in(SM3Accumulate(BETA, "mean"), gradients), of=mean),
    ]


def _stand_in(rule: SM3Accumulate, gradients: Array) -> tuple[Array, list[tuple[Array, Array]]]:
    param = np.zeros_like(gradients[0])
    state = {name: np.zeros(slot.shape(param.shape)) for name, slot in rule.slots(param.shape).items()}
    moments, accumulators = [], []
    for gradient in gradients:
        signal, state = rule.update(np, fusedbun.Signal(gradient), state, param)
        moments.append(signal.second_moment if signal.root is None else signal.root**2)
        accumulators.append((state["axis0"], state["axis1"]))
    return np.array(moments), accumulators


def draw(gradients: Gradients) -> bytes:
    """A row for every way and a column for every step that is shown, as PNG."""
    kept = ways(gradients.values)
    figure = Figure(figsize=(2.75 * len(SHOWN) + 1.4, 1.75 * len(kept) + 1), dpi=100, layout="constrained")
    panels = figure.subplots(len(kept), len(SHOWN))
    for way, row in zip(kept, panels, strict=True):
        for step, axes in zip(SHOWN, row, strict=True):
            _draw_moment(axes, way, step)
            if way is kept[0]:
                axes.set_title(f"step {step}", fontsize=11, pad=10)
        row[0].set_ylabel(way.title, rotation=0, ha="right", va="center", fontsize=10, labelpad=16)
    figure.suptitle(f"Second moments of {gradients.title}\n{_LEGEND}", fontsize=12)
    return png(figure)


_LEGEND = (
    "bright is large (logarithmic, the same shades for a stand-in as for what it stands in for); at the edges: "
    "all that is kept"
)


def animate(gradients: Gradients) -> bytes:
    """Both exact ones over what stands in for them, and the errors so far, as animated GIF."""
    total, cover, mean, product, _ = ways(gradients.values)
    figure = Figure(figsize=(10.5, 4.1), dpi=80, layout="constrained")
    frames = []
    for step in FRAMES:
        figure.clear()
        panels = figure.subplot_mosaic([["total", "mean", "errors"], ["cover", "product", "errors"]])
        for name, way in {"total": total, "mean": mean, "cover": cover, "product": product}.items():
            _draw_moment(panels[name], way, step)
            panels[name].set_title(way.title.replace("\n", " "), fontsize=10, pad=10)
        errors = panels["errors"]
        for way, colour in ((cover, VERMILION), (product, BLUE)):
            name, steps = way.title.split(":")[0], range(1, step + 1)
            errors.plot(steps, [way.error(s) for s in steps], color=colour, label=name)
            errors.plot(step, way.error(step), "o", color=colour)
        largest = max(way.error(s) for way in (cover, product) for s in range(1, STEPS + 1))
        errors.set(title="relative error", xlim=(0, STEPS), ylim=(0, 1.05 * largest), xlabel="step")
        errors.grid(alpha=0.3)
        errors.spines[["top", "right"]].set_visible(False)
        errors.legend(loc="upper right", frameon=False, fontsize=9)
        figure.suptitle(f"Step {step:>3}: second moments of {gradients.title}", fontsize=11)
        frames.append(image(figure))
    palette = frames[-1].quantize(96, Image.Quantize.MAXCOVERAGE)  # the few pixels of a line count, too
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    gif = io.BytesIO()
    pauses = [120] * (len(frames) - 1) + [2500]  # milliseconds
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=pauses, loop=0, optimize=True)
    return gif.getvalue()


def _draw_moment(axes: Axes, way: Way, step: int) -> None:
    exact = (way.of or way).moments[step - 1]
    top = exact.max()
    norm = LogNorm(top / 1e4, top, clip=True)
    axes.imshow(way.moments[step - 1], norm=norm, cmap=SHADES, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    if way.of is None:
        axes.set_xlabel("every element is kept", fontsize=9)
        return
    rows, columns = way.accumulators[step - 1]
    strips = {(-0.055, 0.0, 0.04, 1.0): rows, (0.0, 1.03, 1.0, 0.07): columns}
    for place, accumulator in strips.items():
        strip = axes.inset_axes(place)
        strip.imshow(accumulator, norm=norm, cmap=SHADES, aspect="auto", interpolation="nearest")
        strip.set(xticks=[], yticks=[])
        for spine in strip.spines.values():
            spine.set_color(BLUE)
    axes.set_xlabel(f"relative error {way.error(step):.2f}", fontsize=9)
