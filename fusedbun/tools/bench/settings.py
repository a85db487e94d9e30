"""The options of `fusedbun bench`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FRAMEWORKS = ("torch", "jax")


@dataclass(frozen=True)
class Settings:
    """The options, as `fusedbun bench --help` describes them."""

    framework: str
    workload: Sequence[str]
    only: re.Pattern[str] | None
    threads: Sequence[int]
    rounds: int
    budget: int
    elements: int
    largest: int
    output: Path

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks to measure."""
        return FRAMEWORKS if self.framework == "both" else (self.framework,)

    def report(self) -> dict[str, Any]:
        """The options for a JSON file."""
        plain = {name: value for name, value in vars(self).items() if name not in ("only", "output")}
        return {**plain, "only": self.only and self.only.pattern}
