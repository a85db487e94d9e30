"""The threads that torch computes with, for generated code to share: two pools would crowd one another out."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

MAPS = Path("/proc/self/maps")  # on Linux, the libraries that this process has loaded


@cache
def parallel() -> int:
    """The address of `GOMP_parallel` in the OpenMP library that torch has loaded; 0 where there is none."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return 0
    lines = MAPS.read_text().splitlines() if MAPS.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    # torch's own first: its file's name may have a hash in it
    for name in (*sorted(paths, key=lambda path: ("torch" not in path, path)), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0
