"""`fusedbun bench`: its options, and what it says when it cannot run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedbun.tools.bench import shapes
from fusedbun.tools.shared.errors import LIBRARIES, CommandError
from fusedbun.tools.shared.options import Commands, add_command, whole

FRAMEWORKS = ("torch", "jax")
INTERRUPTED = 128 + 2  # what a shell reports for a process that SIGINT ended

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

_EPILOG = """\
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

exit codes:
  0    done
  2    an option is not valid, a library is not installed, or nothing can be written
       to DIR; one line on stderr says which
  130  interrupted by Ctrl-C: what was measured is printed and written, and marked so
"""


@dataclass(frozen=True)
class Settings:
    """The options of `fusedbun bench`."""

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


def register(commands: Commands) -> None:
    """Adds the command to the parser of all commands."""
    summary = "measure the time of a step beside the machine's limit and other packages"
    parser = add_command(commands, "bench", summary, _DESCRIPTION, _EPILOG)
    default = "(default: %(default)s)"
    add = parser.add_argument
    add("--framework", choices=[*FRAMEWORKS, "both"], default="both", help=f"whose optimizers {default}")
    names = [*shapes.NAMES, *shapes.GROUPS]
    workload: Any = {"nargs": "+", "choices": names, "metavar": "NAME", "default": ["networks"]}
    add("--workload", **workload, help="what is stepped, of those below (default: networks)")
    only = "measure those alone whose path and name this is found in, beside limit and reference"
    add("--only", type=_pattern, metavar="REGEX", help=only)
    threads: Any = {"nargs": "+", "type": _threads, "metavar": "N", "default": [1]}
    add("--threads", **threads, help="measure on so many threads, one after another (default: 1)")
    add("--rounds", type=whole(1), default=15, metavar="N", help=f"steps of each contender {default}")
    budget = f"about so much for each contender; a slow one makes fewer steps {default}"
    add("--budget", type=whole(1), default=10, metavar="SECONDS", help=budget)
    elements: Any = {"type": whole(shapes.SMALLEST), "metavar": "N"}
    add("--elements", **elements, default=shapes.ELEMENTS, help=f"of each odd shape {default}")
    add("--largest", **elements, default=shapes.LARGEST, help=f"the end of the linear series {default}")
    output = "where speed.json and speed.png go; made if need be (default: %(default)s/)"
    add("--output", type=Path, default=Path("fusedbun-bench"), metavar="DIR", help=output)


def main(options: dict[str, Any]) -> int:
    """Runs the command with its options and returns its exit code."""
    settings = Settings(**options)
    try:
        from fusedbun.tools.bench.run import run

        return INTERRUPTED if run(settings).interrupted else 0
    except CommandError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(_missing_library(error, settings))
    except KeyboardInterrupt:
        print("fusedbun bench: interrupted", file=sys.stderr)
        return INTERRUPTED


def _missing_library(error: ModuleNotFoundError, settings: Settings) -> str:
    library = LIBRARIES.get((error.name or "").partition(".")[0])
    if library is None:
        raise error
    extras = ",".join([*settings.frameworks, "bench"])
    reason = f"{library} is not installed; measuring this needs: pip install 'fusedbun[{extras}]'"
    return reason + (", or give --framework one framework" if settings.framework == "both" else "")


def _refuse(reason: str) -> int:
    print(f"fusedbun bench: error: {reason}", file=sys.stderr)
    return 2


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, but {text!r} is none: {error}") from None


def _threads(text: str) -> int:
    from fusedbun.tools.shared.machine import cpus

    threads = whole(1)(text)
    if threads > cpus():
        raise argparse.ArgumentTypeError(f"must be at most {cpus()}, the CPUs that there are, but it is {text!r}")
    return threads
