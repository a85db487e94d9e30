"""Draws all pictures of behaviour.

    python -m benchmarks.pictures

Writes rosenbrock.png and rastrigin.png (see `trajectories`), and covers_made_up.png, covers_digits.png and
covers_digits.gif (see `covers`) to docs/pictures. Nothing is downloaded. The same numbers are drawn every time.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.pictures import covers, trajectories
from fusedbun.tools.shared.files import write_atomically

FOLDER = Path(__file__).parent.parent.parent / "docs/pictures"


def main() -> None:
    """Draws all pictures, and says how long each took."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    made_up, digits = covers.made_up(), covers.of_digits()
    pictures = {
        "rosenbrock.png": lambda: trajectories.draw(trajectories.ROSENBROCK),
        "rastrigin.png": lambda: trajectories.draw(trajectories.RASTRIGIN),
        "covers_made_up.png": lambda: covers.draw(made_up),
        "covers_digits.png": lambda: covers.draw(digits),
        "covers_digits.gif": lambda: covers.animate(digits),
    }
    for name, draw in pictures.items():
        start = time.perf_counter()
        write_atomically(FOLDER / name, draw())
        print(f"{(FOLDER / name).relative_to(FOLDER.parent.parent)}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
