"""The options of `fusedbun train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fusedbun.tools.train.optimizers import OPTIMIZERS

FRAMEWORKS = ("torch", "flax")


@dataclass(frozen=True)
class Settings:
    """The options, as `fusedbun train --help` describes them."""

    framework: str
    optimizer: str
    compare: str | None
    lr: float | None
    epochs: int
    batch_size: int
    seed: int
    dtype: str
    output: Path

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks to train in."""
        return FRAMEWORKS if self.framework == "both" else (self.framework,)

    @property
    def learning_rates(self) -> dict[str, float]:
        """The optimizers to train with, and the learning rate that each starts from."""
        names = [self.optimizer] if self.compare is None else [self.optimizer, self.compare]
        defaults = {name: OPTIMIZERS[name].learning_rate for name in names}
        return defaults if self.lr is None else {**defaults, self.optimizer: self.lr}
