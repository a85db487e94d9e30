"""The options of `fusedbun bench`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedbun.tools.bench import shapes
from fusedbun.tools.shared.command import count, option, output, whole
from fusedbun.tools.shared.machine import cpus

_FRAMEWORKS = ("torch", "jax")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, but {text!r} is none: {error}") from None


def _threads(text: str) -> int:
    threads = whole(1)(text)
    if threads > cpus():
        raise argparse.ArgumentTypeError(f"must be at most {cpus()}, the CPUs that there are, but it is {text!r}")
    return threads


_WORKLOAD = {"nargs": "+", "choices": [*shapes.NAMES, *shapes.GROUPS], "metavar": "NAME", "default": ["networks"]}
_ONLY = "measure those alone whose path and name this is found in, beside limit and reference"
_THREADS = {"nargs": "+", "type": _threads, "metavar": "N", "default": [1]}


@dataclass(frozen=True)
class Settings:
    """The options, as `fusedbun bench --help` describes them."""

    framework: str = option("whose optimizers", choices=[*_FRAMEWORKS, "both"], default="both")
    workload: Sequence[str] = option("what is stepped, of those below (default: networks)", **_WORKLOAD)
    only: re.Pattern[str] | None = option(_ONLY, type=_pattern, metavar="REGEX")
    threads: Sequence[int] = option("measure on so many threads, one after another (default: 1)", **_THREADS)
    rounds: int = count("steps of each contender", 15)
    budget: int = count("about so much for each contender; a slow one makes fewer steps", 10, metavar="SECONDS")
    elements: int = count("of each odd shape", shapes.ELEMENTS, shapes.SMALLEST)
    largest: int = count("the end of the linear series", shapes.LARGEST, shapes.SMALLEST)
    output: Path = output("speed.json and speed.png", "fusedbun-bench")

    @property
    def frameworks(self) -> tuple[str, ...]:
        return _FRAMEWORKS if self.framework == "both" else (self.framework,)

    def report(self) -> dict[str, Any]:
        """The options for a JSON file."""
        plain = {name: value for name, value in vars(self).items() if name not in ("only", "output")}
        return {**plain, "only": self.only and self.only.pattern}
