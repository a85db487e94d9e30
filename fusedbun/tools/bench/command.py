"""`fusedbun bench`: its options, and how it is run."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from fusedbun.tools.bench import shapes
from fusedbun.tools.bench.settings import FRAMEWORKS, Settings
from fusedbun.tools.shared.command import DEFAULT, EXIT_CODES, INTERRUPTED, Commands, add_command
from fusedbun.tools.shared.errors import libraries_for
from fusedbun.tools.shared.machine import cpus
from fusedbun.tools.shared.options import whole

_DESCRIPTION = """\
Measure how long an optimizer's step takes: of fusedbun on each of its paths, of torch's
own and of other packages, and of bare C loops over the same bytes, which are what the
machine allows. All of them run in one process and take turns, in an order drawn anew
for every round, so that a drift of the machine hits all alike.

Prints a table for every workload: the median time and the distance of its quartiles,
the bytes that a step has to move for each parameter, the GB/s, the share of the limit,
the time in steps of the reference (torch's fused AdamW, or optax's adamw without torch;
the median of the rounds' quotients), the peak of temporary memory, the first step, and
the state. Writes the same with every time to DIR/speed.json, and bars to DIR/speed.png.
"""

_EPILOG = f"""\
workloads, and how many tensors they have:
  gpt2          GPT-2 small, 124.4 million parameters in 148
  resnet50      ResNet-50, 25.6 million in 161
  small         200 of 64 x 64 and 200 of 64
  networks      the three above
  square, tall, wide, vocabulary, convolutions
                hard shapes, each of about --elements
  odd           these five
  linear        one matrix of 1e5, 1e6 … elements, up to --largest
  all           everything

The packages to compare with that are not installed are listed as such:
pip install 'fusedbun[torch,jax,bench]' brings all of them.

examples:
  fusedbun bench
  fusedbun bench --workload resnet50 --only 'SM3|Lion'
  fusedbun bench --workload gpt2 --framework torch --threads 1 2
  fusedbun bench --workload odd --only '^fusedbun|^torch' --rounds 30

{EXIT_CODES}"""


def register(commands: Commands) -> None:
    """Adds the command to the parser of all commands."""
    summary = "measure the time of a step beside the machine's limit and other packages"
    add = add_command(commands, "bench", run, summary, _DESCRIPTION, _EPILOG)
    add("--framework", choices=[*FRAMEWORKS, "both"], default="both", help=f"whose optimizers {DEFAULT}")
    workload: Any = {"nargs": "+", "choices": [*shapes.NAMES, *shapes.GROUPS], "metavar": "NAME"}
    add("--workload", **workload, default=["networks"], help="what is stepped, of those below (default: networks)")
    only = "measure those alone whose path and name this is found in, beside limit and reference"
    add("--only", type=_pattern, metavar="REGEX", help=only)
    threads: Any = {"nargs": "+", "type": _threads, "metavar": "N", "default": [1]}
    add("--threads", **threads, help="measure on so many threads, one after another (default: 1)")
    add("--rounds", type=whole(1), default=15, metavar="N", help=f"steps of each contender {DEFAULT}")
    budget = f"about so much for each contender; a slow one makes fewer steps {DEFAULT}"
    add("--budget", type=whole(1), default=10, metavar="SECONDS", help=budget)
    elements: Any = {"type": whole(shapes.SMALLEST), "metavar": "N"}
    add("--elements", **elements, default=shapes.ELEMENTS, help=f"of each odd shape {DEFAULT}")
    add("--largest", **elements, default=shapes.LARGEST, help=f"the end of the linear series {DEFAULT}")
    output = "where speed.json and speed.png go; made if need be (default: %(default)s/)"
    add("--output", type=Path, default=Path("fusedbun-bench"), metavar="DIR", help=output)


def run(**options: Any) -> int:
    """Measures, and returns the exit code."""
    settings = Settings(**options)
    remedy = ", or give --framework one framework" if settings.framework == "both" else ""
    with libraries_for("measuring this", *settings.frameworks, "bench", remedy=remedy):
        from fusedbun.tools.bench.run import measure

        return INTERRUPTED if measure(settings).interrupted else 0


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
