"""`fusedbun train`: its options, and how it is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusedbun.hyper import Interval
from fusedbun.recipes import RECIPES
from fusedbun.tools.shared.command import DEFAULT, EXIT_CODES, INTERRUPTED, Commands, add_command
from fusedbun.tools.shared.errors import libraries_for
from fusedbun.tools.shared.options import number, whole
from fusedbun.tools.train.optimizers import OPTIMIZERS
from fusedbun.tools.train.settings import FRAMEWORKS, Settings

_DESCRIPTION = """\
Train a small convolutional network on scikit-learn's handwritten digits (1,797 real
images of 8x8 pixels, no download) with one of fusedbun's optimizers, and with another
to compare. In torch, in Flax, or in both: from the same initial weights and with the
same batches, so that both end with the same weights, up to rounding (which Adam's
kind magnifies; --dtype float64 shows that no more than that is behind it). The
learning rate falls to zero along a cosine.

Prints test accuracy and loss, the bytes of optimizer state, the time of a step, and
how far apart the weights of the two frameworks are. Writes the same with the whole
curves to DIR/results.json, and a picture of the curves to DIR/curves.png.
"""

_EPILOG = """\
optimizers, with the learning rate that each starts from and what is not its default:
{optimizers}

ternary_vote is not among them: its weights are -1, 0 and +1, and this network's are
real numbers. examples/ternary.py trains a network that has such weights.

examples:
  fusedbun train                          torch and Flax, Fusedbun and AdamW
  fusedbun train --dtype float64          the same, with less rounding
  fusedbun train --optimizer sm3 --compare fusedbun
  fusedbun train --framework torch --lr 1e-3 --epochs 5
  fusedbun train --optimizer adamw --framework flax

{exit_codes}"""


def register(commands: Commands) -> None:
    """Adds the command to the parser of all commands."""
    summary = "train a small network on real digits, in torch, in Flax, or in both"
    epilog = _EPILOG.format(optimizers=_optimizers(), exit_codes=EXIT_CODES)
    add = add_command(commands, "train", run, summary, _DESCRIPTION, epilog)
    add("--framework", choices=[*FRAMEWORKS, "both"], default="both", help=f"where to train {DEFAULT}")
    optimizer: Any = {"type": _optimizer, "choices": OPTIMIZERS, "metavar": "NAME"}
    add("--optimizer", **optimizer, default="fusedbun", help=f"the optimizer, one of those below {DEFAULT}")
    add("--compare", **optimizer, default="adamw", help=f"a second one, at its default --lr {DEFAULT}")
    add("--no-compare", dest="compare", action="store_const", const=None, help="train with --optimizer only")
    add("--lr", type=number(Interval(0, open_low=True)), help="its learning rate at the start (default: see below)")
    add("--epochs", type=whole(1), default=20, metavar="N", help=f"passes over the training images {DEFAULT}")
    add("--batch-size", type=whole(1), default=64, metavar="N", help=f"images in a step {DEFAULT}")
    seed = f"draws the split, the initial weights and the batches {DEFAULT}"
    add("--seed", type=whole(0), default=0, metavar="N", help=seed)
    add("--dtype", choices=["float32", "float64"], default="float32", help=f"of weights and arithmetic {DEFAULT}")
    output = "where results.json and curves.png go; made if need be (default: %(default)s/)"
    add("--output", type=Path, default=Path("fusedbun-train"), metavar="DIR", help=output)


def run(**options: Any) -> int:
    """Trains, and returns the exit code."""
    settings = Settings(**options)
    with libraries_for(f"training in {' and '.join(settings.frameworks)}", *settings.frameworks, "train"):
        from fusedbun.tools.train.run import train

        return INTERRUPTED if train(settings).interrupted else 0


def _optimizers() -> str:
    """A line for each optimizer of `fusedbun train`."""
    lines = []
    for name, entry in OPTIMIZERS.items():
        settings = ", ".join(f"{key}={value}" for key, value in entry.settings.items())
        lines.append(f"  {name:<17}{entry.learning_rate:<9g}{settings}".rstrip())
    return "\n".join(lines)


def _optimizer(name: str) -> str:
    if name in RECIPES and name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"{name} steps weights of -1, 0 and +1, and this network's are real numbers; examples/ternary.py in "
            f"fusedbun's repository trains a network that has such weights"
        )
    return name
