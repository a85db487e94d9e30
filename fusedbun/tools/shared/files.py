"""Writing files where an option says, so that a reader finds the old one or the new one, never a part of it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusedbun.tools.shared.command import INTERRUPTED, CommandError


def write_atomically(path: Path, content: bytes) -> None:
    """Writes the file beside its place and moves it there when it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON that every parser reads: a number that is not finite must be given as None."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def finite(value: float) -> float | None:
    """The number, or None where it is not finite, for JSON has no name for that."""
    return value if math.isfinite(value) else None


@contextmanager
def writing(path: Path, option: str = "--output", what: str = "write in") -> Iterator[None]:
    """Says of an error what cannot be done with the path that an option names."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"argument {option}: cannot {what} {str(path)!r}: {error.strerror}") from error


def make_directory(path: Path) -> None:
    """Makes the directory that `--output` names; a CommandError where nothing can be written to it."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def save(
    results: Any, numbers: Path, title: str, picture: Path, draw: Callable[[Any], bytes], show: Callable[..., None]
) -> int:
    """Writes what was measured, and its picture beside it, and shows it even if that fails; returns the exit code.

    The results have a `report()` for the JSON file and may be `interrupted`; `show` prints lines below them too.
    """
    try:
        with writing(numbers.parent):
            write_json(numbers, results.report())
            write_atomically(picture, draw(results))
    except CommandError:
        show(results)
        raise
    show(results, f"numbers: {numbers}", f"{title + ':':8} {picture}")
    return INTERRUPTED if results.interrupted else 0
