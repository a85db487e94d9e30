"""Writing files where an option says, so that a reader finds the old one or the new one, never a part of it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusedbun.tools.shared.errors import CommandError


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


def make_directory(path: Path) -> None:
    """Makes the directory that `--output` names; a CommandError where nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(directory: Path, error: OSError) -> CommandError:
    """The error to be shown where a file cannot be written to the directory that `--output` names."""
    return CommandError(f"argument --output: cannot write in {str(directory)!r}: {error.strerror}")


def save(
    numbers: Path,
    report: Mapping[str, Any],
    picture: Path,
    draw: Callable[[], bytes],
    show: Callable[..., None],
    *remarks: str,
) -> None:
    """Writes numbers and their picture where `--output` says, and shows them whether or not they can be written.

    Args:
        numbers: the JSON file.
        report: what is written to it.
        picture: the file of the picture, in the same directory.
        draw: makes the picture.
        show: prints the results, and lines below.
        remarks: these lines, where the files can be written.
    """
    try:
        write_json(numbers, report)
        write_atomically(picture, draw())
    except OSError as error:
        show()
        raise cannot_write(numbers.parent, error) from None
    show(*remarks)
