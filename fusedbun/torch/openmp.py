"""The threads that torch computes with, for generated code to share: two pools would crowd one another out."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

MAPS = Path("/proc/self/maps")  # on Linux, the libraries that this process has loaded
NONE = 0


@cache
def parallel() -> int:
    """The address of `GOMP_parallel` in the OpenMP library that torch has loaded; 0 where there is none."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return NONE
    for name in _loaded():
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or NONE
        except (OSError, AttributeError):
            continue
    return NONE


def _loaded() -> list[str]:
    """OpenMP libraries by name or path, torch's own first: its file's name may have a hash in it."""
    lines = MAPS.read_text().splitlines() if MAPS.exists() else []
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    return [*sorted(paths, key=lambda path: "torch" not in path), "libgomp.so.1"]
