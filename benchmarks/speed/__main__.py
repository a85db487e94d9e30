"""`fusedbun bench` with its results in benchmarks/results/, as speed.json and speed.png.

    python -m benchmarks.speed

It takes the options of `fusedbun bench`, which `--help` lists.
"""

import sys
from pathlib import Path

from fusedbun.tools.cli import main

RESULTS = Path(__file__).parent.parent / "results"

if __name__ == "__main__":
    sys.exit(main(["bench", "--output", str(RESULTS), *sys.argv[1:]]))
