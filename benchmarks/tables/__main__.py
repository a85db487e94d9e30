"""Writes the tables into the documents: `python -m benchmarks.tables`."""

from __future__ import annotations

from benchmarks.tables import DOCUMENTS, blocks, updated
from benchmarks.tables.results import ROOT
from fusedbun.tools.shared.files import write_atomically


def main() -> None:
    """Writes the documents."""
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = updated(before)
        if after != before:
            write_atomically(path, after.encode())
        print(f"{name}: {', '.join(blocks(after))}{'' if after != before else ' (as it was)'}")


if __name__ == "__main__":
    main()
