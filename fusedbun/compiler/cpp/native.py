"""Runs generated C++ on leaves: finds a chain's kernel, describes leaves to the driver, and steps them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from itertools import chain as joined
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fusedbun.chain import Chain
from fusedbun.compiler.cpp.build import DRIVER, BuildError, digest, entry, loaded
from fusedbun.compiler.cpp.module import TYPES, emit
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.compiler.trace import Program, is_input, trace
from fusedbun.storage.codes import Stored

Shape = tuple[int, ...]
SCATTERED = -1  # as in runtime/kernel.h
WORD = 8  # bytes of everything that a leaf is described with
ABSENT = 0  # the address of the gradient of a leaf that is left out of a step


class KernelError(Exception):
    """There is no kernel for a chain; the message says why."""


class Kernel(NamedTuple):
    """A chain's compiled code, for leaves of one number of axes, one order in memory and one dtype."""

    program: Program
    address: int
    name: str  # the digest of its code


class Array(NamedTuple):
    """An array as the driver sees it."""

    address: int
    width: int  # bytes of an element
    strides: Shape  # bytes from one element to the next along each axis


class Description(NamedTuple):
    """A leaf as the driver sees it."""

    kernel: Kernel
    shape: Shape
    # the parameter, the gradient, and the state's in the program's order; those that do not have a number for every
    # element are contiguous
    arrays: Sequence[Array]
    numbers: int  # which of the lists of numbers it is stepped with


_KERNELS: dict[Any, Kernel | str] = {}  # by what decides the code; a reason where there is none


def kernel(
    chain: Chain,
    ndim: int,
    order: tuple[int, ...],
    dtype: str,
    maximize: bool = False,
    measures: bool = False,
    as_update: bool = False,
) -> Kernel:
    """A chain's kernel, from memory, from a file, or compiled now.

    Args:
        chain: the chain for one parameter (`Chain.at`).
        ndim: the number of the parameter's axes.
        order: its axes from the slowest in memory to the fastest (`memory_order`).
        dtype: its dtype, such as "bfloat16".
        maximize: climb instead of descend.
        measures: it also computes the inner products of its metrics.
        as_update: it writes what is to be added to the parameter instead.

    Raises:
        KernelError: there is none; the message says why.
    """
    try:
        key = (structure(chain), ndim, order, dtype, maximize, measures, as_update)
    except UnschedulableError as error:
        raise KernelError(str(error)) from error
    if key not in _KERNELS:
        try:
            _KERNELS[key] = compiled(trace(chain, ndim, order or None, maximize, dtype, measures, as_update))
        except (UnschedulableError, KernelError) as error:
            _KERNELS[key] = str(error)
    found = _KERNELS[key]
    if isinstance(found, str):
        raise KernelError(found)
    return found


def compiled(program: Program) -> Kernel:
    """The kernel of any program; raises a KernelError where there is none."""
    if program.dtype not in TYPES:
        raise KernelError(f"there are kernels for {', '.join(TYPES)}, but not for {program.dtype}")
    try:
        source = emit(program)
        function = entry(source, registers())
    except (UnschedulableError, BuildError) as error:
        raise KernelError(str(error)) from error
    function.restype = ctypes.c_void_p
    return Kernel(program, function(), digest(source, registers()))


def structure(chain: Chain) -> tuple[Any, ...]:
    """What of a chain decides its code: everything but the values of the numbers that are given with each step.

    Raises an UnschedulableError where a hyper-parameter cannot be a key.
    """
    known = vars(chain)
    if "structure" not in known:  # kept with the chain, as a cached property is
        values = [float if is_input(x) else x for x in chain.hyperparameters().values()]
        found = (chain.rounding.stochastic, len(chain.rounding.place), *map(type, chain), *values)
        try:
            hash(found)
        except TypeError as error:
            raise UnschedulableError(f"a hyper-parameter that chooses code must be hashable: {error}") from error
        known["structure"] = found
    structure: tuple[Any, ...] = known["structure"]
    return structure


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

    There are so many lists of `numbers`, of which each leaf names one.
    """

    def __init__(self, leaves: Sequence[Description], numbers: int) -> None:
        words: list[int] = []
        records = [describe(leaf, words) for leaf in leaves]
        self._words = np.array(words, np.int64)
        start = self._words.ctypes.data
        self._records = np.array(records, np.int64).reshape(-1, 10)
        self._grads = self._records[:, 0] + 1  # the places of their addresses among the words
        # places among the words become addresses, those of scattered arrays' steps too
        steps = [place for record in records for place in range(record[3], record[4])]
        self._words[steps] = np.where(self._words[steps] < 0, 0, self._words[steps] * WORD + start)
        self._records[:, :5] = self._records[:, :5] * WORD + start
        longest = max((len(leaf.kernel.program.scalars) for leaf in leaves), default=0)
        self._numbers = np.zeros((numbers, max(1, longest)))
        lists = np.array([leaf.numbers for leaf in leaves], np.int64)
        self._records[:, 5] = self._numbers.ctypes.data + lists * self._numbers.strides[0]
        self._kernels = np.array([leaf.kernel.address for leaf in leaves], np.int64)
        self._pointers = tuple(ctypes.c_void_p(a.ctypes.data) for a in (self._records, self._kernels))

    def set_gradients(self, addresses: Sequence[int]) -> None:
        """Where the leaves' gradients are; `ABSENT` leaves a leaf out."""
        self._words[self._grads] = addresses

    def set_numbers(self, index: int, numbers: Sequence[float]) -> None:
        """The numbers of a program that some leaves are stepped with (`trace.evaluate`)."""
        self._numbers[index, : len(numbers)] = numbers

    def step(self, threads: int, parallel: int = 0) -> None:
        """Steps every leaf once.

        Args:
            threads: at most so many work at it.
            parallel: the address of a function like OpenMP's GOMP_parallel that runs them, or 0 to start them here.
        """
        leaves, kernels = self._pointers
        count = ctypes.c_int64(len(self._records))
        driver().fusedbun_step(leaves, kernels, count, ctypes.c_int(threads), ctypes.c_void_p(parallel))


def describe(leaf: Description, words: list[int]) -> list[int]:
    """Adds what a `Leaf` of runtime/kernel.h points to to the words, and returns its fields.

    Fields that are addresses are places among the words instead, and so are the addresses of scattered arrays' steps
    among the words, where -1 stands for null. That of the numbers is left as 0.
    """
    program, arrays = leaf.kernel.program, leaf.arrays
    order, count = program.graph.order, len(arrays)
    sizes = [leaf.shape[axis] for axis in order] if leaf.shape else [1]
    rows, columns = (sizes[0], math.prod(sizes[1:])) if len(sizes) > 1 else (1, sizes[0])
    start = len(words)
    steps = start + 3 * count
    described: list[tuple[int, int, int, int]] = []  # of each array: address, width, stride, the place of its steps
    scattered: list[int] = []
    for array, stored in zip(arrays, [*[Stored(program.dtype, order)] * 2, *program.arrays.values()], strict=True):
        place = -1
        if stored.is_full(len(sizes)):
            along = [array.strides[axis] for axis in order] if leaf.shape else [array.width]
            stride = _row_stride(sizes, along, array.width)
            if not _is_contiguous(sizes, along, array.width):
                place = steps + count + len(sizes) + len(scattered)
                scattered += along
        else:
            stride = array.strides[0] if stored.is_by_blocks else 0
        described.append((array.address, array.width, stride, place))
    words += [*joined.from_iterable(zip(*described, strict=True)), *sizes, *scattered]
    return [start, start + count, start + 2 * count, steps, steps + count, 0, count, len(sizes), rows, columns]


def _is_contiguous(sizes: list[int], steps: list[int], width: int) -> bool:
    """Whether elements follow one another in the order of the axes."""
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if size != 1 and step != width:
            return False
        width *= size
    return True


def _row_stride(sizes: list[int], steps: list[int], width: int) -> int:
    """The bytes from one row to the next, or `SCATTERED` where a row's elements do not follow one another."""
    first = len(sizes) > 1  # the axis that a row's elements begin at: a parameter of one axis is one row
    if not _is_contiguous(sizes[first:], steps[first:], width):
        return SCATTERED
    return steps[0] if first and sizes[0] != 1 else math.prod(sizes[first:]) * width
