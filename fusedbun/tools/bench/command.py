"""`fusedbun bench`: its texts, and how it is run."""

from __future__ import annotations

from fusedbun.tools.bench.settings import Settings
from fusedbun.tools.shared.command import EXIT_CODES, Command, libraries_for

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


def _run(settings: Settings) -> int:
    remedy = ", or give --framework one framework" if settings.framework == "both" else ""
    with libraries_for("measuring this", *settings.frameworks, "bench", remedy=remedy):
        from fusedbun.tools.bench.run import measure

        return measure(settings)


COMMAND = Command(
    "bench",
    "measure the time of a step beside the machine's limit and other packages",
    _DESCRIPTION,
    _EPILOG,
    Settings,
    _run,
)
