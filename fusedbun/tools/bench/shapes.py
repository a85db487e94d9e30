"""What is stepped: the shapes of real networks, and shapes that are hard for an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusedbun.tools.shared.networks import gpt2, resnet50
from fusedbun.transform import Shape

ELEMENTS = 6_200_000  # of an odd shape: 25 MB in float32, more than a core's own caches hold
LARGEST = 100_000_000  # the end of the linear series, which begins at `SMALLEST`
SMALLEST = 100_000


@dataclass(frozen=True)
class Workload:
    """Tensors that are stepped together."""

    name: str  # how options and files call it
    title: str  # for a reader
    shapes: tuple[Shape, ...]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def _convolutions(elements: int) -> tuple[Shape, ...]:
    """Ten convolutions of the proportions of 64 x 3 x 7 x 7."""
    scale = math.sqrt(elements / (10 * 64 * 3 * 7 * 7))
    return ((max(1, round(64 * scale)), max(1, round(3 * scale)), 7, 7),) * 10


def _matrix(rows: int, columns: int) -> tuple[Shape, ...]:
    return ((max(1, rows), max(1, columns)),)


# What a reader calls it, and its shapes, of about so many elements where it is no network.
_SHAPED: dict[str, tuple[str, Callable[[int], tuple[Shape, ...]]]] = {
    "gpt2": ("GPT-2 small", lambda n: gpt2()),
    "resnet50": ("ResNet-50", lambda n: resnet50()),
    "small": ("400 small tensors", lambda n: ((64, 64), (64,)) * 200),  # so small that what a call costs is seen
    "square": ("a square matrix", lambda n: _matrix(math.isqrt(n), math.isqrt(n))),
    "tall": ("a matrix of 3 columns", lambda n: _matrix(n // 3, 3)),
    "wide": ("a matrix of 3 rows", lambda n: _matrix(3, n // 3)),
    "vocabulary": ("a matrix of 50257 columns", lambda n: _matrix(n // 50257, min(n, 50257))),
    "convolutions": ("ten 7 x 7 convolutions", _convolutions),
}
_SERIES = "linear"
NAMES = (*_SHAPED, _SERIES)
GROUPS = {"networks": NAMES[:3], "odd": NAMES[3:-1], "all": NAMES}


def workloads(names: Sequence[str], elements: int = ELEMENTS, largest: int = LARGEST) -> list[Workload]:
    """The workloads of some of `NAMES` and `GROUPS`, each once: odd shapes of about so many elements, and a series."""
    found: list[Workload] = []
    for name in dict.fromkeys(single for group in names for single in GROUPS.get(group, (group,))):
        if name == _SERIES:
            exponents = range(round(math.log10(SMALLEST)), len(str(largest)))
            found += [Workload(f"{name} 1e{k}", f"{10**k:,} elements", _matrix(10**k // 1000, 1000)) for k in exponents]
        else:
            title, shapes = _SHAPED[name]
            found.append(Workload(name, title, shapes(elements)))
    return found
