"""Writing files so that a reader finds the old one or the new one, never a part of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
