"""An upper bound of what a step takes in memory beside its arrays, from the schedules of the kernels for the CPU.

The sizes are those of `runtime/driver.cpp` and of the generated code (`compiler/cpp/ways.py`), whichever way of going
over memory serves a shape; they hold for arrays whose elements follow one another in the order of their axes.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, NamedTuple

from fusedbun.chain import Chain
from fusedbun.compiler.cpp.dialect import Places
from fusedbun.compiler.cpp.native import structure
from fusedbun.compiler.cpp.ways import PackedRows
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.compiler.printer import is_coded
from fusedbun.compiler.schedule import WIDE, Schedule, schedule
from fusedbun.compiler.trace import trace, used
from fusedbun.storage.codes import BLOCK, computed_in
from fusedbun.tools.plan.sizes import BITS
from fusedbun.transform import Shape

# As in runtime/driver.cpp and runtime/vectors.h.
_MOST_CHUNKS, _CHUNK_ELEMENTS, _CHUNK_ROWS = 64, 1 << 15, 128
_SUMMED, _THIN_CHUNKS = 256, 4096
_FEW_ROWS, _LONG_ROW = 32, 1 << 15
_ALIGNMENT, _ROWS = 64, 4
_REGISTERS = (64, 32, 16)  # bytes: of AVX-512, of AVX2, and of every machine
RECORD = 256  # bytes that the driver describes a leaf's task with

# Where rules are run as they are written, at most so many arrays of the parameter's size are held at a time, and for
# noise and codes so many bytes more for each element. (What was measured: 13 arrays, and 113 bytes in all.)
_MOST_ARRAYS, _NOISE = 14, 72


class Room(NamedTuple):
    """The bytes that one leaf takes while it is stepped."""

    held: int  # from its first chunk to its last
    buffer: int  # while a chunk is worked at, by each thread


class _Sizes(NamedTuple):
    """A schedule's needs, as `Plan` in runtime/kernel.h counts them, and of what its buffers are made."""

    vectors: int
    scalars: int
    partial_vectors: int
    partial_scalars: int
    kept: int
    partials: int
    buffered: int
    packed_blocks: int


class Program(NamedTuple):
    """The ways of going over memory that a chain's kernel has."""

    is_flat: bool
    has_packed: bool
    rows: _Sizes
    columns: _Sizes | None


_PROGRAMS: dict[Any, Program] = {}  # by what decides the code


def room(chain: Chain, shape: Shape, dtype: str) -> Room:
    """The bytes that a parameter takes while a kernel steps it: at most so many on any machine.

    Raises:
        UnschedulableError: there is no kernel.
    """
    key = structure(chain), len(shape), dtype
    if key not in _PROGRAMS:
        _PROGRAMS[key] = _program(chain, len(shape), dtype)
    program, element = _PROGRAMS[key], BITS[computed_in(dtype)] // 8
    found = [_room(program, *_matrix(shape), element, register) for register in _REGISTERS]
    return Room(*map(max, zip(*found, strict=True)))


def definition(chain: Chain, shape: Shape, dtype: str) -> int:
    """The bytes that a parameter takes at most while its rules are run as they are written."""
    is_noisy, width = bool(chain.noisy(shape)), BITS[computed_in(dtype)] // 8
    arrays = _MOST_ARRAYS
    if not is_noisy:
        with suppress(UnschedulableError):  # the values of the parameter's size that its rules compute
            values = used(trace(chain, len(shape), dtype=dtype).outputs.values())
            arrays = min(arrays, sum(value.span in WIDE for value in values))
    rows, columns = _matrix(shape)
    elements: int = rows * _up(columns, BLOCK)  # codes fill their rows' last block
    return (arrays * width + is_noisy * _NOISE) * elements


def _program(chain: Chain, ndim: int, dtype: str) -> Program:
    by_row = schedule(trace(chain, ndim, dtype=dtype))
    if by_row.is_elementwise:
        return Program(True, False, _sizes(by_row), None)
    try:
        columns = _sizes(schedule(by_row.program, "columns"))
    except UnschedulableError:
        columns = None
    return Program(False, not is_coded(by_row), _sizes(by_row), columns)


def _sizes(plan: Schedule) -> _Sizes:
    places = Places(plan)
    counts = (*places.counts(places.small), *places.counts(places.partial), len(places.kept))
    return _Sizes(*counts, len(plan.partials), places.buffered, PackedRows(plan).repeated())


def _room(program: Program, rows: int, columns: int, element: int, register: int) -> Room:
    """The same on a machine with registers of so many bytes; `Task::start` and the `buffer` functions."""
    lanes, plan, length, across = register // element, program.rows, columns, rows
    if program.is_flat:
        chunks, buffer = _divided(rows * columns, _CHUNK_ELEMENTS), 0
    elif program.columns and rows <= _FEW_ROWS and columns >= _LONG_ROW:
        plan, length, across = program.columns, rows, columns
        few = min(_SUMMED * lanes, _divided(_CHUNK_ELEMENTS, rows))
        chunks = _divided(columns, _up(max(few, _divided(columns, _MOST_CHUNKS)), 64))
        buffer = (plan.partials + plan.buffered * _ROWS) * _up(rows * register, _ALIGNMENT)
    else:
        packed = program.has_packed and columns < 2 * lanes and rows >= lanes
        most = max(_MOST_CHUNKS, _THIN_CHUNKS // columns)
        few = min(_SUMMED * (max(1, lanes // columns) if packed else 1), _divided(_CHUNK_ELEMENTS, columns))
        chunks = _divided(rows, _up(max(_CHUNK_ROWS, few, _divided(rows, most)), 16))
        buffer = plan.buffered * _ROWS * _up(columns, lanes) * element
        if packed:
            buffer += plan.packed_blocks * _up(columns * register, _ALIGNMENT)
    vector = _up(length * element, _ALIGNMENT)
    small = plan.vectors * vector + _up(plan.scalars * element, _ALIGNMENT)
    kept = _up(plan.kept * across * element, _ALIGNMENT)
    partial = plan.partial_vectors * vector + _up(plan.partial_scalars * element, _ALIGNMENT)
    return Room(small + kept + partial * max(1, chunks), buffer)


def _matrix(shape: Shape) -> tuple[int, int]:
    """The rows and columns that it is stepped as."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _divided(n: int, by: int) -> int:
    return -(-n // by)


def _up(n: int, to: int) -> int:
    return _divided(n, to) * to
