"""What `fusedbun train` measures."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fusedbun.tools.shared.files import finite
from fusedbun.tools.shared.machine import versions
from fusedbun.tools.train.network import Score, Weights
from fusedbun.tools.train.optimizers import OPTIMIZERS
from fusedbun.tools.train.settings import Settings


@dataclass
class Run:
    """One training, by one optimizer in one framework; it grows while it runs."""

    optimizer: str
    framework: str
    learning_rate: float  # at the start
    losses: list[float] = field(default_factory=list)  # of every step
    seconds: list[float] = field(default_factory=list)  # of every step
    scores: list[tuple[int, Score]] = field(default_factory=list)  # after how many steps it was tested
    state_bytes: int | None = None
    weights: Weights | None = None  # after the last step

    @property
    def title(self) -> str:
        """For a reader."""
        return f"{self.optimizer} in {self.framework}"

    @property
    def score(self) -> Score | None:
        """The last test's."""
        return self.scores[-1][1] if self.scores else None

    @property
    def ms_per_step(self) -> float | None:
        """The median without the first step, which compiles and allocates."""
        return 1e3 * statistics.median(self.seconds[1:]) if self.seconds[1:] else None

    def report(self) -> dict[str, Any]:
        """The run for a JSON file."""
        return {
            "optimizer": self.optimizer,
            "framework": self.framework,
            "learning_rate": self.learning_rate,
            "hyperparameters": dict(OPTIMIZERS[self.optimizer].hyperparameters),
            "finished": self.weights is not None,
            "test_accuracy": self.score and self.score.accuracy,
            "test_loss": self.score and finite(self.score.loss),
            "state_bytes": self.state_bytes,
            "ms_per_step": self.ms_per_step,
            "curves": {
                "train": {"step": list(range(1, len(self.losses) + 1)), "loss": list(map(finite, self.losses))},
                "test": {
                    "step": [step for step, _ in self.scores],
                    "accuracy": [score.accuracy for _, score in self.scores],
                    "loss": [finite(score.loss) for _, score in self.scores],
                },
            },
        }


@dataclass
class Results:
    """Every run so far; `interrupted` where some are missing or not finished."""

    settings: Settings
    parameters: int
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False

    def difference(self, optimizer: str) -> float | None:
        """The largest absolute difference between the weights of two frameworks; None where there are not two."""
        ends = [run.weights for run in self.runs if run.optimizer == optimizer and run.weights is not None]
        if len(ends) != 2:
            return None
        a, b = ends
        return float(max(np.abs(a[name] - b[name]).max() for name in a))

    def report(self) -> dict[str, Any]:
        """The results for a JSON file."""
        differences = {name: self.difference(name) for name in self.settings.learning_rates}
        return {
            "command": "fusedbun train",
            "interrupted": self.interrupted,
            "settings": {name: x for name, x in asdict(self.settings).items() if name != "output"},
            "versions": versions(),
            "parameters": self.parameters,
            "weight_difference": {name: finite(value) for name, value in differences.items() if value is not None},
            "runs": [run.report() for run in self.runs],
        }
