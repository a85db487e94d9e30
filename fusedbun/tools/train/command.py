"""`fusedbun train`: its texts, and how it is run."""

from __future__ import annotations

from fusedbun.tools.shared.command import EXIT_CODES, Command, libraries_for
from fusedbun.tools.train.optimizers import OPTIMIZERS
from fusedbun.tools.train.settings import Settings

_DESCRIPTION = """\
Train a small convolutional network on scikit-learn's handwritten digits (1,797 real
images of 8x8 pixels, no download) with one of fusedbun's optimizers, and with others to
compare. In torch, in Flax, or in both: from the same initial weights and with the same
batches, so that both end with the same weights, up to rounding (which Adam's kind
magnifies, and a momentum of few bits too: --dtype float64, which keeps no momentum in
few bits, shows that no more than that is behind it). The learning rate falls to zero
along a cosine.

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
  fusedbun train                          torch and Flax; FusedbunW, AdamW and Fusedbun
  fusedbun train --dtype float64          the same, with less rounding
  fusedbun train --optimizer sm3 --compare fusedbunw
  fusedbun train --framework torch --lr 1e-3 --epochs 5
  fusedbun train --optimizer adamw --framework flax

{exit_codes}"""


def _run(settings: Settings) -> int:
    with libraries_for(f"training in {' and '.join(settings.frameworks)}", *settings.frameworks, "train"):
        from fusedbun.tools.train.run import train

        return train(settings)


_OPTIMIZERS = "\n".join(
    f"  {name:<17}{entry.learning_rate:<9g}{', '.join(f'{key}={x}' for key, x in entry.settings.items())}".rstrip()
    for name, entry in OPTIMIZERS.items()
)
COMMAND = Command(
    "train",
    "train a small network on real digits, in torch, in Flax, or in both",
    _DESCRIPTION,
    _EPILOG.format(optimizers=_OPTIMIZERS, exit_codes=EXIT_CODES),
    Settings,
    _run,
)
