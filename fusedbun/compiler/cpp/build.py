"""Finds compiled code for generated code: in what came with the package, in the user's cache, or by compiling it.

A library's name is made of its code and of the flags that it is compiled with, so that it is never stale, and it is
put in its place in one move, so that processes that compile the same at once do not disturb one another. Of the kernels
that come with the package many share a library, a bundle (`family`); in it each has a function of such a name.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RUNTIME = Path(__file__).parent / "runtime"
HEADERS = "".join(path.read_text() for path in sorted(RUNTIME.glob("*.h")))
DRIVER = RUNTIME / "driver.cpp"
XLA_HEADER = "xla/ffi/api/c_api.h"
BUILT = Path(__file__).parent / "built"
ENTRY = "fusedbun_kernel"  # the function that a kernel's code has
COMMON = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-w")
# By how wide the machine's registers are (`fusedbun_registers` in runtime/driver.cpp).
REGISTERS = {3: ("-march=x86-64-v4", "-mprefer-vector-width=512"), 2: ("-march=x86-64-v3",), 1: ()}
TIME_LIMIT = 120  # seconds for one compilation


class BuildError(Exception):
    """Generated code could not be compiled or loaded; the message says why."""


def entry(source: str, registers: int) -> Any:
    """The function of a kernel's code, from a bundle, from a library of its own, or compiled now.

    Raises:
        BuildError: there is none.
    """
    return _in_bundle(source, registers) or loaded(source, registers)[ENTRY]


def origin(source: str, registers: int = 1) -> str | None:
    """Where the compiled code is: "package" or "cache", or None where it would have to be compiled."""
    name = f"{digest(source, registers)}.so"
    if (BUILT / name).exists() or _in_bundle(source, registers):
        return "package"
    return "cache" if (cache_folder() / name).exists() else None


def library(source: str, registers: int = 1) -> Path:
    """The compiled library of some C++.

    Args:
        source: the code; it may include the files in `runtime`.
        registers: the width of the registers that it may use, a key of `REGISTERS`.

    Raises:
        BuildError: it did not come with the package, is not in the cache, and cannot be compiled.
    """
    built = BUILT / f"{digest(source, registers)}.so"
    return built if built.exists() else compile_in(cache_folder(), source, registers)


def loaded(source: str, registers: int = 1) -> ctypes.CDLL:
    """The same, loaded; a library that is damaged, or made for another machine, is compiled again."""
    path = library(source, registers)
    try:
        return load(path)
    except BuildError:
        return load(_compile(cache_folder() / path.name, source, registers))


def load(path: Path) -> ctypes.CDLL:
    """Loads a library; raises a BuildError where that fails."""
    try:
        if not _is_whole(path):
            raise OSError("it is cut short")
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def _is_whole(path: Path) -> bool:
    """Whether a library has all of its bytes; to load one of Linux's that is cut short would end the process.

    The table of its sections comes last. Its place, and the size and the number of its entries, stand in the header.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, the lowest byte first
        return True
    place, size, number = struct.unpack_from("<Q10xHH", header.ljust(64, b"\xff"), 40)
    return bool(path.stat().st_size >= place + size * number)


def compile_in(folder: Path, source: str, registers: int = 1, prefix: str = "", extra: tuple[str, ...] = ()) -> Path:
    """The library of some C++ in a folder, compiled unless it is there, perhaps with a prefix to its name.

    Flags in `extra` do not change what the code does. Raises a BuildError where it cannot be compiled.
    """
    path = folder / f"{prefix}{digest(source, registers)}.so"
    return path if path.exists() else _compile(path, source, registers, extra)


def _compile(path: Path, source: str, registers: int, extra: tuple[str, ...] = ()) -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "there is no C++ compiler: install g++ or clang++, or name one in the environment variable CXX"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compile-") as folder:
            code, made = Path(folder, "code.cpp"), Path(folder, "code.so")
            code.write_text(source)
            command = [*compiler, *_flags(registers), *extra, f"-I{RUNTIME}", str(code), "-o", str(made)]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
            if ran.returncode:
                raise BuildError(f"{' '.join(compiler)} failed: {ran.stderr.strip()[-2000:]}")
            os.replace(made, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"compiling to {path.parent} failed: {error}") from error
    return path


def bundle(sources: Iterable[str], registers: int) -> str:
    """The C++ of several kernels in one library; each is as it was, in a namespace of its own."""
    lines = ['#include "vectors.h"', ""]
    for source in sources:
        name = f"{ENTRY}_{digest(source, registers)}"
        lines += [f"#define {ENTRY} {name}", f"namespace of_{name} {{", source, "}", f"#undef {ENTRY}", ""]
    return "\n".join(lines)


def bundle_prefix(registers: int) -> str:
    """What the names of bundles for registers of some width begin with."""
    return f"kernels-{registers}-"


def jax_handler() -> str | None:
    """The code of the call that XLA makes (`runtime/jax_ffi.cpp`) with jaxlib's header in it, if that is there."""
    jaxlib = find_spec("jaxlib")
    header = Path(jaxlib.origin).with_name("include") / XLA_HEADER if jaxlib and jaxlib.origin else None
    if header is None or not header.exists():
        return None
    return (RUNTIME / "jax_ffi.cpp").read_text().replace(f'#include "{XLA_HEADER}"', header.read_text())


@cache
def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command, or None where there is none."""
    if named := os.environ.get("CXX"):
        return tuple(named.split())
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return (found,) if found else None


def cache_folder() -> Path:
    """Where compiled libraries are kept: `FUSEDBUN_CACHE`, or `fusedbun` in the user's cache folder."""
    if named := os.environ.get("FUSEDBUN_CACHE"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "fusedbun")


def _in_bundle(source: str, registers: int) -> Any:
    name = f"{ENTRY}_{digest(source, registers)}"
    return next((loaded[name] for loaded in _bundles(registers) if hasattr(loaded, name)), None)


@cache
def _bundles(registers: int) -> list[ctypes.CDLL]:
    found = []
    for path in sorted(BUILT.glob(f"{bundle_prefix(registers)}*.so")):
        with suppress(BuildError):  # made for another machine: its kernels are compiled again
            found.append(load(path))
    return found


def _flags(registers: int) -> tuple[str, ...]:
    """The compiler's flags. `FUSEDBUN_CXXFLAGS` adds to them, as a sanitizer needs."""
    return (*COMMON, *REGISTERS[registers], *shlex.split(os.environ.get("FUSEDBUN_CXXFLAGS", "")))


def digest(source: str, registers: int) -> str:
    """What compiled code is known by, made of its source, the runtime, the flags and the kind of machine."""
    flags = " ".join([*_flags(registers), sys.platform, platform.machine()])
    return hashlib.sha256("\0".join([source, HEADERS, flags]).encode()).hexdigest()[:40]
