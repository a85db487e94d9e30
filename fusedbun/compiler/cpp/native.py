"""Runs generated C++ on leaves: finds a chain's kernel, describes leaves to the driver, and steps them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fusedbun.chain import Chain
from fusedbun.compiler.cpp.build import DRIVER, BuildError, digest, entry, loaded
from fusedbun.compiler.cpp.module import TYPES, emit
from fusedbun.compiler.graph import UnplannableError
from fusedbun.compiler.trace import Program, is_input, trace

Shape = tuple[int, ...]
SCATTERED = -1  # as in runtime/kernel.h
WORD = 8  # bytes of everything that a leaf is described with
NO_PARALLEL = 0
ABSENT = 0  # the address of the gradient of a leaf that is left out of a step


class KernelError(Exception):
    """There is no kernel for a chain; the message says why."""


class Kernel(NamedTuple):
    """A chain's compiled code, for leaves of one number of axes, one order in memory and one dtype."""

    program: Program
    address: int
    name: str  # the digest of its code


class Array(NamedTuple):
    """An array as the driver sees it: its address, the bytes of an element, and the bytes from one to the next."""

    address: int
    width: int
    strides: Shape


class Description(NamedTuple):
    """A leaf as the driver sees it.

    Args:
        kernel: what steps it.
        shape: its shape.
        arrays: the parameter, the gradient, and the state's in the program's order; those that do not have a number
            for every element are contiguous.
        numbers: which of the lists of numbers it is stepped with.
    """

    kernel: Kernel
    shape: Shape
    arrays: Sequence[Array]
    numbers: int


def kernel(chain: Chain, ndim: int, order: tuple[int, ...], dtype: str, maximize: bool = False) -> Kernel:
    """A chain's kernel, from memory, from a file, or compiled now.

    Args:
        chain: the chain for one parameter (`Chain.at`).
        ndim: the number of the parameter's axes.
        order: its axes from the slowest in memory to the fastest (`memory_order`).
        dtype: its dtype, such as "bfloat16".
        maximize: climb instead of descend.

    Raises:
        KernelError: there is none; the message says why.
    """
    try:
        key = (structure(chain), ndim, order, dtype, maximize)
    except UnplannableError as error:
        raise KernelError(str(error)) from error
    if key not in _KERNELS:
        try:
            _KERNELS[key] = _kernel(trace(chain, ndim, order or None, maximize, dtype))
        except (UnplannableError, BuildError) as error:
            _KERNELS[key] = str(error)
    found = _KERNELS[key]
    if isinstance(found, str):
        raise KernelError(found)
    return found


_KERNELS: dict[Any, Kernel | str] = {}  # by what decides the code; a reason where there is none


def compiled(program: Program) -> Kernel:
    """The kernel of any program; raises a KernelError where there is none."""
    try:
        return _kernel(program)
    except (UnplannableError, BuildError) as error:
        raise KernelError(str(error)) from error


def _kernel(program: Program) -> Kernel:
    if program.dtype not in TYPES:
        raise UnplannableError(f"there are kernels for {', '.join(TYPES)}, but not for {program.dtype}")
    source = emit(program)
    function = entry(source, registers())
    function.restype = ctypes.c_void_p
    return Kernel(program, function(), digest(source, registers()))


def structure(chain: Chain) -> tuple[Any, ...]:
    """What of a chain decides its code: everything but the values of the numbers that are given with each step.

    Raises an UnplannableError where a hyper-parameter cannot be a key.
    """
    known = vars(chain)
    if "structure" not in known:  # as a cached property does
        known["structure"] = _structure(chain)
    found: tuple[Any, ...] = known["structure"]
    return found


def _structure(chain: Chain) -> tuple[Any, ...]:
    transforms = ((type(t), *(_of_code(getattr(t, f.name)) for f in fields(t))) for t in chain)
    found = (chain.rounding.stochastic, *transforms)
    try:
        hash(found)
    except TypeError as error:
        raise UnplannableError(f"a hyper-parameter that chooses code must be hashable: {error}") from error
    return found


def _of_code(value: Any) -> Any:
    return float if is_input(value) else value


@cache
def driver() -> ctypes.CDLL:
    """The compiled driver; raises a BuildError where there is none."""
    return loaded(DRIVER.read_text())


@cache
def registers() -> int:
    """How wide this machine's registers are: 3 for AVX-512, 2 for AVX2, 1 for what every machine has."""
    return int(driver().fusedbun_registers())


def memory_order(shape: Shape, strides: Shape) -> tuple[int, ...]:
    """The axes from the slowest in memory to the fastest; as they are where that is right for them."""
    axes = range(len(shape))
    long = [axis for axis in axes if shape[axis] != 1]
    if all(strides[a] >= strides[b] for a, b in pairwise(long)):
        return tuple(axes)
    return tuple(sorted(axes, key=lambda axis: -strides[axis]))


class Leaves:
    """Leaves that are described once and stepped many times; between steps only gradients and numbers change.

    Args:
        leaves: the leaves.
        numbers: how many lists of numbers there are.
    """

    def __init__(self, leaves: Sequence[Description], numbers: int) -> None:
        words: list[int] = []
        records: list[list[int]] = []
        self._grads: list[int] = []
        for leaf in leaves:
            self._grads.append(len(words) + 1)
            records.append(describe(leaf, words))
        longest = max((len(leaf.kernel.program.scalars) for leaf in leaves), default=0)
        self._numbers = np.zeros((numbers, max(1, longest)))
        self._words = np.array(words, np.int64)
        self._records = np.array(records, np.int64).reshape(-1, 10)
        self._records[:, :5] = self._records[:, :5] * WORD + self._words.ctypes.data
        rows = np.array([leaf.numbers for leaf in leaves], np.int64)
        self._records[:, 5] = self._numbers.ctypes.data + rows * self._numbers.strides[0]
        # the places of the steps of scattered arrays among the words, which become addresses
        places = [i for record in records for i in range(record[3], record[3] + record[6])]
        steps = self._words[places]
        self._words[places] = np.where(steps < 0, 0, steps * WORD + self._words.ctypes.data)
        self._kernels = np.array([leaf.kernel.address for leaf in leaves], np.int64)
        self._pointers = tuple(ctypes.c_void_p(a.ctypes.data) for a in (self._records, self._kernels))

    def set_gradients(self, addresses: Sequence[int]) -> None:
        """Where the leaves' gradients are; `ABSENT` leaves a leaf out."""
        self._words[self._grads] = addresses

    def set_numbers(self, index: int, numbers: Sequence[float]) -> None:
        """The numbers of a program that some leaves are stepped with (`trace.evaluate`)."""
        self._numbers[index, : len(numbers)] = numbers

    def step(self, threads: int, parallel: int = NO_PARALLEL) -> None:
        """Steps every leaf once.

        Args:
            threads: at most so many work at it.
            parallel: the address of a function like OpenMP's GOMP_parallel that runs them, or 0 to start them here.
        """
        leaves, kernels = self._pointers
        count = ctypes.c_int64(len(self._records))
        driver().fusedbun_step(leaves, kernels, count, ctypes.c_int(threads), ctypes.c_void_p(parallel))


def describe(leaf: Description, words: list[int]) -> list[int]:
    """Adds what a record points to to the words, and returns the record, with places among the words as addresses."""
    order = leaf.kernel.program.graph.order
    sizes = [leaf.shape[axis] for axis in order] if leaf.shape else [1]
    columns = math.prod(sizes[1:]) if len(sizes) > 1 else sizes[0]
    rows = sizes[0] if len(sizes) > 1 else 1
    count = len(leaf.arrays)
    stored = leaf.kernel.program.arrays.values()
    full = [True, True] + [x.is_full(len(sizes)) for x in stored]
    parts = [False, False] + [x.is_by_blocks for x in stored]
    steps = [
        [] if in_parts else [array.strides[axis] for axis in order] if leaf.shape else [array.width] if is_full else []
        for array, is_full, in_parts in zip(leaf.arrays, full, parts, strict=True)
    ]
    at = len(words)
    words += [array.address for array in leaf.arrays]
    words += [array.width for array in leaf.arrays]
    words += [
        _row_stride(sizes, step, array.width) if is_full else array.strides[0] if in_parts else 0
        for array, step, is_full, in_parts in zip(leaf.arrays, steps, full, parts, strict=True)
    ]
    place = at + 4 * count + len(sizes)
    scattered: list[int] = []
    for array, step, is_full in zip(leaf.arrays, steps, full, strict=True):
        if is_full and not _is_contiguous(sizes, step, array.width):
            words.append(place + len(scattered))
            scattered += step
        else:
            words.append(-1)
    words += sizes
    words += scattered
    return [at, at + count, at + 2 * count, at + 3 * count, at + 4 * count, 0, count, len(sizes), rows, columns]


def _is_contiguous(sizes: list[int], step: list[int], width: int) -> bool:
    """Whether elements follow one another in the order of the axes."""
    for size, bytes_between in zip(reversed(sizes), reversed(step), strict=True):
        if size != 1 and bytes_between != width:
            return False
        width *= size
    return True


def _row_stride(sizes: list[int], step: list[int], width: int) -> int:
    """The bytes from one row to the next, or `SCATTERED` where a row's elements do not follow one another."""
    if len(sizes) == 1:
        return sizes[0] * width if step[0] == width or sizes[0] == 1 else SCATTERED
    if not _is_contiguous(sizes[1:], step[1:], width):
        return SCATTERED
    return step[0] if sizes[0] != 1 else math.prod(sizes[1:]) * width
