"""The machine's own limit: C loops with the access pattern of a step, compiled where they are run."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

from fusedbun.tools.bench.contenders import LIMIT, Arena, Array, Contender, Stepper, held_bytes, zeros
from fusedbun.tools.shared.command import CommandError
from fusedbun.tools.shared.files import make_directory, write_atomically
from fusedbun.tools.shared.machine import cpu_model

_SOURCE = Path(__file__).with_name("limits.c")
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-shared", "-pthread")
_FASTER = ("-funroll-loops", "-mprefer-vector-width=512")  # which not every compiler and machine has

# Name, number in limits.c, arrays of state.
_LOOPS = (("p += s*g", 0, 0), ("momentum", 1, 1), ("momentum, two passes", 2, 1), ("Adam", 3, 2))


class NoCompilerError(Exception):
    """The loops cannot be compiled here; the message says why in one line."""


def limits() -> list[Contender]:
    """The loops as contenders."""
    return [Contender(LIMIT, name, partial(Loop, k, arrays), rereads=int(k == 2)) for name, k, arrays in _LOOPS]


class Loop(Stepper):
    """A loop of limits.c over an arena's arrays, with as many arrays of state of its own, from 0 to 2."""

    def __init__(self, number: int, arrays: int, arena: Arena) -> None:
        self._function = library().fusedbun_step
        self._state = [[zeros(p.shape) for p in arena.params] for _ in range(arrays)]
        self._arena = arena  # its arrays have to live as long as the pointers to them
        unused: list[list[Array]] = [[]] * (2 - arrays)
        sizes = (ctypes.c_size_t * len(arena.params))(*(p.size for p in arena.params))
        pointers = [
            (ctypes.c_void_p * max(1, len(arrays)))(*(array.ctypes.data for array in arrays))
            for arrays in (arena.params, arena.grads, *self._state, *unused)
        ]
        self._arguments = (number, arena.threads, ctypes.c_size_t(len(sizes)), sizes, *pointers)

    def step(self) -> None:
        if error := self._function(*self._arguments):
            raise OSError(error, "cannot start a thread")

    def state_bytes(self) -> int:
        return held_bytes(self._state)

    def temporaries(self) -> int | None:
        return 0


@cache
def library() -> ctypes.CDLL:
    """The compiled loops, from the cache where they are in it."""
    compiler = os.environ.get("CC") or "cc"
    command = shutil.which(compiler)
    if command is None:
        raise NoCompilerError(f"no C compiler: {compiler!r} was not found; install one, or name it in CC")
    made_by = "\n".join([_SOURCE.read_text(), command, *_FLAGS, *_FASTER, platform.machine(), cpu_model()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusedbun")
    try:
        make_directory(folder)
    except CommandError:  # a new one, for a library in a folder that others can write to might be theirs
        folder = Path(tempfile.mkdtemp(prefix="fusedbun-"))
    path = folder / f"limits-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        write_atomically(path, _compiled(command))
    return ctypes.CDLL(str(path))


def _compiled(command: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "limits.so")
        for flags in ((*_FLAGS, *_FASTER), _FLAGS):
            done = subprocess.run([command, *flags, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
            if done.returncode == 0:
                return made.read_bytes()
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    raise NoCompilerError(f"the C compiler {command} failed: {lines[0]}")
