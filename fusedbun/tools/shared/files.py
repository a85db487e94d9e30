"""Writing files where an option says, so that a reader finds the old one or the new one, never a part of it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fusedbun.tools.shared.errors import CommandError


class Results(Protocol):
    """What a command measured."""

    def report(self) -> dict[str, Any]:
        """The results for a JSON file."""


R = TypeVar("R", bound=Results)


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
    results: R,
    numbers: Path,
    title: str,
    picture: Path,
    draw: Callable[[R], bytes],
    show: Callable[..., None],
    remarks: Iterable[str] = (),
) -> None:
    """Writes the results and their picture, and shows them whether or not they can be written.

    Args:
        results: what was measured.
        numbers: the JSON file, in the directory that `--output` names.
        title: what the picture shows.
        picture: the file of the picture, in the same directory.
        draw: makes the picture.
        show: prints the results, and lines below.
        remarks: lines to print above those that name the files.
    """
    try:
        write_json(numbers, results.report())
        write_atomically(picture, draw(results))
    except OSError as error:
        show(results)
        raise cannot_write(numbers.parent, error) from None
    show(results, *remarks, f"numbers: {numbers}", f"{title + ':':8} {picture}")
