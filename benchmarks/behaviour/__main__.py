"""Runs every use with every contender: `python -m benchmarks.behaviour`.

Writes benchmarks/results/behaviour.json, and says which reasons are missing or needless.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.behaviour.running import CONTENDERS, USES, row
from benchmarks.behaviour.uses import faults
from fusedbun.tools.shared.files import write_json
from fusedbun.tools.shared.machine import versions

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("peft", "bitsandbytes", "transformers", "accelerate", "pytorch-lightning")


def main() -> int:
    """Runs, writes, and returns 1 where a reason is missing or needless."""
    torch.set_num_threads(1)
    rows = [row(*key) for key in track(USES, "uses")]
    write_json(RESULTS / "behaviour.json", {"rows": rows, "versions": versions(PACKAGES)})
    found = [
        fault
        for (framework, title), one in zip(USES, rows, strict=True)
        for fault in faults(USES[framework, title][1], one["cells"], CONTENDERS[framework][0].name)
    ]
    print(*found, sep="\n", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
