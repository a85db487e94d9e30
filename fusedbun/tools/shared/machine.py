"""The machine, as far as it matters for times, and the memory of this process."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from fusedbun.version import __version__

_LIBRARIES = ("numpy", "torch", "jax", "optax", "flax", "scikit-learn")
_CLEAR_PEAK = "5"  # see proc(5), /proc/pid/clear_refs


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name."""
    return _said("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """The versions of Python, of fusedbun, and of the libraries and some packages, as far as they are installed."""
    found = {"python": platform.python_version(), "fusedbun": __version__}
    for package in (*_LIBRARIES, *packages):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def description(threads: list[int], packages: Iterable[str]) -> dict[str, Any]:
    """The machine, the numbers of threads that are measured, and versions, of some packages too, for a JSON file."""
    return {
        "cpu": cpu_model(),
        "cpus": cpus(),
        "threads": threads,
        "memory_bytes": _kibibytes("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": versions(packages),
    }


def available_memory() -> int | None:
    """The bytes that can be taken without swapping; None where the system does not say."""
    return _kibibytes("/proc/meminfo", "MemAvailable")


def resident_memory() -> int | None:
    """The bytes that this process holds; None where the system does not say."""
    return _kibibytes("/proc/self/status", "VmRSS")


def peak_during(action: Callable[[], None]) -> int | None:
    """The most memory that an action holds at a time beyond what was held before; None where it cannot be measured."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed but kept would serve the action unseen
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    except (AttributeError, OSError):
        return None
    before = resident_memory()
    action()
    peak = _kibibytes("/proc/self/status", "VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _kibibytes(path: str, name: str) -> int | None:
    found = _said(path, name)
    return None if found is None else 1024 * int(found.split()[0])


def _said(path: str, name: str) -> str | None:
    """What a file of the system says of something."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    said = ((key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines))
    return next((value for key, value in said if key == name), None)
