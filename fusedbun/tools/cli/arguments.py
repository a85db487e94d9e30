"""The options of the command, their ranges and their help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusedbun
from fusedbun.hyper import Interval
from fusedbun.recipes import RECIPES
from fusedbun.tools.bench import command as bench
from fusedbun.tools.cli import info
from fusedbun.tools.plan import command as plan
from fusedbun.tools.shared.options import AS_JSON, Commands, Parser, Text, add_command, number, whole
from fusedbun.tools.train.optimizers import OPTIMIZERS

FRAMEWORKS = ("torch", "flax")

_DESCRIPTION = """\
Memory-efficient optimizers, defined once, for PyTorch and for JAX.
"""

_EPILOG = """\
examples:
  fusedbun list      every optimizer: its classes, its state, its defaults, its source
  fusedbun train     train a small network in torch and in Flax, and compare
  fusedbun bench     measure how long a step takes, beside other packages
  fusedbun plan      how much memory training a model takes with each optimizer
  fusedbun info      what steps an optimizer on this machine, and why

`fusedbun COMMAND --help` describes the options of a command.
"""

_LIST_DESCRIPTION = """\
List the optimizers: the torch class, the optax factory, the bytes of state that each
parameter costs (of a float32 matrix of 1024 x 1024, counted from the declared state),
the defaults and the source. Needs neither torch nor JAX.
"""

_LIST_EPILOG = """\
examples:
  fusedbun list
  fusedbun list --json
"""

_TRAIN_DESCRIPTION = """\
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

_TRAIN_EPILOG = """\
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

exit codes:
  0    done
  2    an option is not valid, a library is not installed, or nothing can be written
       to DIR; one line on stderr says which
  130  interrupted by Ctrl-C: what was measured is printed and written, and marked so
"""


@dataclass(frozen=True)
class Settings:
    """The options of `fusedbun train`."""

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


def parser() -> Parser:
    """The parser of the whole command."""
    root = Parser("fusedbun", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=Text, allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"fusedbun {fusedbun.__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_list(commands)
    _add_train(commands)
    bench.register(commands)
    plan.register(commands)
    info.register(commands)
    return root


def _add_list(commands: Commands) -> None:
    summary = "list the optimizers with their classes, state, defaults and sources"
    parser = add_command(commands, "list", summary, _LIST_DESCRIPTION, _LIST_EPILOG)
    parser.add_argument("--json", action="store_true", help=AS_JSON)


def _optimizers() -> str:
    """A line for each optimizer of `fusedbun train`."""
    lines = []
    for name, entry in OPTIMIZERS.items():
        settings = ", ".join(f"{key}={value}" for key, value in entry.settings.items())
        lines.append(f"  {name:<17}{entry.learning_rate:<9g}{settings}".rstrip())
    return "\n".join(lines)


def _add_train(commands: Commands) -> None:
    summary = "train a small network on real digits, in torch, in Flax, or in both"
    epilog = _TRAIN_EPILOG.format(optimizers=_optimizers())
    train = add_command(commands, "train", summary, _TRAIN_DESCRIPTION, epilog)
    default = "(default: %(default)s)"
    add = train.add_argument
    add("--framework", choices=[*FRAMEWORKS, "both"], default="both", help=f"where to train {default}")
    optimizer: Any = {"type": _optimizer, "choices": OPTIMIZERS, "metavar": "NAME"}
    add("--optimizer", **optimizer, default="fusedbun", help=f"the optimizer, one of those below {default}")
    add("--compare", **optimizer, default="adamw", help=f"a second one, at its default --lr {default}")
    add("--no-compare", dest="compare", action="store_const", const=None, help="train with --optimizer only")
    add("--lr", type=number(Interval(0, open_low=True)), help="its learning rate at the start (default: see below)")
    add("--epochs", type=whole(1), default=20, metavar="N", help=f"passes over the training images {default}")
    add("--batch-size", type=whole(1), default=64, metavar="N", help=f"images in a step {default}")
    seed = f"draws the split, the initial weights and the batches {default}"
    add("--seed", type=whole(0), default=0, metavar="N", help=seed)
    add("--dtype", choices=["float32", "float64"], default="float32", help=f"of weights and arithmetic {default}")
    output = "where results.json and curves.png go; made if need be (default: %(default)s/)"
    add("--output", type=Path, default=Path("fusedbun-train"), metavar="DIR", help=output)


def _optimizer(name: str) -> str:
    if name in RECIPES and name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"{name} steps weights of -1, 0 and +1, and this network's are real numbers; examples/ternary.py in "
            f"fusedbun's repository trains a network that has such weights"
        )
    return name
