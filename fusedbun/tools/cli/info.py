"""`fusedbun info`: what steps an optimizer on this machine, and why. Compiles nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedbun.compiler import UnschedulableError, trace
from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.cpp.family import chain_of
from fusedbun.compiler.cpp.module import emit
from fusedbun.recipes import RECIPES
from fusedbun.tools.shared.command import Command, Shown, print_out
from fusedbun.tools.shared.machine import cpu_model, cpus, versions

_DESCRIPTION = """\
Show what steps an optimizer on this machine, and why: the versions, the devices, the
compiler, and for each optimizer at its defaults whether the code that steps a float32
parameter came with the package, was compiled before, or would be compiled at the first
step. Where there is none, torch goes over tiles of rows itself and JAX runs the
definition: the same numbers, more slowly. Needs neither torch nor JAX, and compiles
nothing.
"""

_EPILOG = """\
examples:
  fusedbun info
  fusedbun info --json

environment:
  CXX                 the C++ compiler
  FUSEDBUN_CACHE      the folder for what is compiled (default: fusedbun in the user's
                      cache folder)
  FUSEDBUN_CXXFLAGS   more flags for the compiler
"""

_SHAPES = {"vector": (0,), "matrix": (0, 1), "convolution": (0, 1, 2, 3)}  # axes in their order in memory
_REGISTERS = {3: "AVX-512", 2: "AVX2", 1: "baseline"}
_MEANING = {
    "package": "came with the package",
    "cache": "was compiled before",
    "compile": "is compiled at the first step",
    "definition": "no code: tiles of rows in torch, the definition in JAX",
}


def _run(settings: Shown) -> int:
    found = _found()
    return print_out(json.dumps(found, indent=1) if settings.json else "\n".join(_lines(found)))


def _found() -> dict[str, Any]:
    """What is found, for a JSON file."""
    driver = _origin(build.DRIVER.read_text(), 1)
    registers = native.registers() if driver in ("package", "cache") else None
    return {
        "versions": versions(),
        "cpu": {"model": cpu_model(), "count": cpus(), "registers": registers and _REGISTERS[registers]},
        "compiler": _compiler(),
        "driver": driver,
        "package": _held(build.BUILT),
        "cache": _held(build.cache_folder()),
        "torch": _torch(),
        "jax": _jax(),
        "optimizers": {name: {shape: _kernel(name, shape, registers) for shape in _SHAPES} for name in RECIPES},
    }


def _kernel(name: str, shape: str, registers: int | None) -> dict[str, str]:
    """What steps a parameter of a shape, and why where it is the definition."""
    order = _SHAPES[shape]
    try:
        code = emit(trace(chain_of(name, {}, len(order)), len(order), order))
    except UnschedulableError as error:
        return {"from": "definition", "reason": str(error)}
    # where not even the driver is compiled, this machine's registers are not known, and nor are a kernel's flags
    found = "compile" if registers is None and build.find_compiler() else _origin(code, registers or 1)
    return {"from": found} | ({"reason": "there is no C++ compiler"} if found == "definition" else {})


def _origin(code: str, registers: int) -> str:
    return build.origin(code, registers) or ("compile" if build.find_compiler() else "definition")


def _compiler() -> dict[str, str] | None:
    command = build.find_compiler()
    if command is None:
        return None
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"does not run: {error}"
    return {"command": " ".join(command), "version": said.partition("\n")[0]}


def _held(folder: Path) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in folder.glob("*.so")]
    return {"folder": str(folder), "libraries": len(sizes), "bytes": sum(sizes)}


def _torch() -> dict[str, Any] | None:
    try:
        import torch
    except ModuleNotFoundError:
        return None
    from fusedbun.torch.openmp import parallel

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"devices": ["cpu", *names], "threads": torch.get_num_threads(), "shares_openmp": bool(parallel())}


def _jax() -> dict[str, Any] | None:
    try:
        import jax
    except ModuleNotFoundError:
        return None
    handler = build.jax_handler()
    return {
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "handler": "definition" if handler is None else _origin(handler, 1),
    }


def _lines(found: dict[str, Any]) -> Iterator[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    for title, text in _facts(found):
        yield from textwrap.wrap(text, width, initial_indent=f"{title:12}", subsequent_indent=" " * 12)
    yield ""
    rows = {name: [kernel["from"] for kernel in kernels.values()] for name, kernels in found["optimizers"].items()}
    for title, cells in {"at its defaults, float32": list(_SHAPES), **rows}.items():
        yield f"{title:26}" + "".join(f"{cell:12}" for cell in cells).rstrip()
    yield ""
    shown = [kernel for kernels in found["optimizers"].values() for kernel in kernels.values()]
    for origin, meaning in _MEANING.items():
        here = [kernel for kernel in shown if kernel["from"] == origin]
        reasons = sorted({kernel["reason"] for kernel in here if "reason" in kernel})
        if here:
            yield from textwrap.wrap("; ".join([f"{origin}: {meaning}", *reasons]), width, subsequent_indent="  ")


def _facts(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, compiler, torch, jax = found["cpu"], found["compiler"], found["torch"], found["jax"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield "processor", f"{cpu['model']}, CPUs: {cpu['count']}, registers: {cpu['registers'] or 'unknown'}"
    yield "compiler", f"{compiler['command']}: {compiler['version']}" if compiler else "none"
    yield "driver", _MEANING[found["driver"]]
    for title in ("package", "cache"):
        held = found[title]
        yield title, f"{held['libraries']} libraries, {held['bytes'] / 1e6:.1f} MB in {held['folder']}"
    if torch:
        threads = "OpenMP's, as torch has" if torch["shares_openmp"] else "the driver's own"
        yield "torch", f"{', '.join(torch['devices'])}; threads: at most {torch['threads']}, {threads}"
    if jax:
        yield "jax", f"{jax['backend']}: {', '.join(jax['devices'])}; the call from XLA: {_MEANING[jax['handler']]}"


COMMAND = Command("info", "show what steps an optimizer here, and why", _DESCRIPTION, _EPILOG, Shown, _run)
