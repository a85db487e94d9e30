"""The options of `fusedbun train`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedbun.hyper import Interval
from fusedbun.recipes import RECIPES
from fusedbun.tools.shared.command import converter, count, option, output
from fusedbun.tools.train.optimizers import OPTIMIZERS

_FRAMEWORKS = ("torch", "flax")


def _optimizer(name: str) -> str:
    if name in RECIPES and name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"{name} steps weights of -1, 0 and +1, and this network's are real numbers; examples/ternary.py in "
            f"fusedbun's repository trains a network that has such weights"
        )
    return name


_NAME: dict[str, Any] = {"type": _optimizer, "choices": OPTIMIZERS, "metavar": "NAME"}
_RATES = Interval(0, open_low=True)
_RATE = converter(float, _RATES.__contains__, f"a number in {_RATES}")


@dataclass(frozen=True)
class Settings:
    """The options, as `fusedbun train --help` describes them."""

    framework: str = option("where to train", choices=[*_FRAMEWORKS, "both"], default="both")
    optimizer: str = option("the optimizer, one of those below", default="fusedbunw", **_NAME)
    compare: list[str] | None = option(
        "others, each at its default --lr (default: adamw fusedbun)",
        default=["adamw", "fusedbun"],
        nargs="+",
        no="train with --optimizer only",
        **_NAME,
    )
    lr: float | None = option("its learning rate at the start (default: see below)", type=_RATE)
    epochs: int = count("passes over the training images", 20)
    batch_size: int = count("images in a step", 64)
    seed: int = count("draws the split, the initial weights and the batches", 0, low=0)
    dtype: str = option("of weights and arithmetic", choices=["float32", "float64"], default="float32")
    output: Path = output("results.json and curves.png", "fusedbun-train")

    @property
    def frameworks(self) -> tuple[str, ...]:
        return _FRAMEWORKS if self.framework == "both" else (self.framework,)

    @property
    def learning_rates(self) -> dict[str, float]:
        """The optimizers to train with, and the learning rate that each starts from."""
        names = [self.optimizer, *(self.compare or ())]
        defaults = {name: OPTIMIZERS[name].learning_rate for name in names}
        return defaults if self.lr is None else {**defaults, self.optimizer: self.lr}
