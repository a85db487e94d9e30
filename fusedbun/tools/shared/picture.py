"""What pictures have in common."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which colour-blind readers tell apart.
BLACK, BLUE, ORANGE, GREEN, VERMILION = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00"


def style_bars(axes: Axes) -> None:
    """A grid behind horizontal bars, and no frame."""
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def to_png(figure: Figure, dpi: int) -> bytes:
    """The picture as PNG, with so many pixels an inch."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return png.getvalue()
