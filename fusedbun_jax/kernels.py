"""Generated kernels as a call that XLA makes on CPUs: one call for all leaves, in place.

The call (`fusedbun/compiler/cpp/runtime/jax_ffi.cpp`) knows kernels by name, so that a compiled program may be kept in
a file.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from itertools import chain as joined
from operator import mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedbun.chain import Chain
from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.trace import START, evaluate, hyperparameters
from fusedbun.storage.codes import STEP, computed_in
from fusedbun_jax import namespace
from fusedbun_jax.operands import Leaf

GRAD = 1  # its place among a leaf's arrays
NUMBERS = 5  # the place of its numbers in a leaf's record


class Slice(NamedTuple):
    """What a kernel steps at a time: a parameter, or a slice of one that is a stack."""

    chain: Chain
    lr: Any
    shape: tuple[int, ...]
    dtype: str
    first: int  # the operand that its parameter lies in; those of its other arrays follow
    arrays: list[native.Array]  # their addresses are counted from their operands'
    numbers: tuple[Any, ...]  # what decides, with the kernel, the numbers that it is stepped with


def step(leaves: Sequence[Leaf]) -> list[Any]:
    """Every leaf's parameter and the state's arrays after a step, in the memory of those before it.

    Raises:
        BuildError: the call cannot be compiled.
        KernelError: there is no kernel for a leaf's chain.
    """
    target, library = _target()
    by_leaf = [_arrays(leaf) for leaf in leaves]
    firsts = [*accumulate(map(len, by_leaf), initial=1)]  # the numbers are the first operand
    slices = [one for leaf, of, first in zip(leaves, by_leaf, firsts, strict=False) for one in _slices(leaf, of, first)]
    kernels = _kernels(slices)
    named = {kernel.name: kernel for kernel in kernels}
    for kernel in named.values():
        library.fusedbun_jax_kernel(kernel.name.encode(), ctypes.c_void_p(kernel.address))
    words: list[int] = []
    records = []
    places, numbers = _numbers(slices, kernels)
    for one, kernel, place in zip(slices, kernels, places, strict=True):
        record = native.describe(native.Description(kernel, one.shape, one.arrays, 0), words)
        steps, count = record[3], record[6]
        words[steps : steps + count] = [0] * count  # the elements of every array follow one another
        record[NUMBERS] = place
        records.append(record)
    operands = [numbers, *joined.from_iterable(by_leaf)]
    written = [first + a for first, of in zip(firsts, by_leaf, strict=False) for a in range(len(of)) if a != GRAD]
    order = {name: n for n, name in enumerate(named)}
    call = jax.ffi.ffi_call(
        target,
        [jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in written],
        input_output_aliases={i: out for out, i in enumerate(written)},
    )
    results = iter(
        call(
            *operands,
            kernels="".join(f"{name} " for name in named),
            kinds=np.array([order[kernel.name] for kernel in kernels], np.int64),
            firsts=np.array([one.first for one in slices], np.int64),
            written=np.array(written, np.int64),
            lists=np.int64(1),
            records=np.array(records, np.int64).ravel(),
            words=np.array(words, np.int64),
        )
    )
    changed = [(leaf, [next(results) for _ in of[1:]]) for leaf, of in zip(leaves, by_leaf, strict=True)]
    return [x for leaf, of in changed for x in of[: len(leaf.changed)]]


def _arrays(leaf: Leaf) -> list[Any]:
    """The arrays that a kernel takes: those of the leaf, and its counter where it has one."""
    declared = leaf.chain.arrays(leaf.param.shape, leaf.param.dtype.name)
    counter = [jnp.broadcast_to(leaf.count, x.shape(leaf.param.shape)) for key, x in declared.items() if key == STEP]
    return [*leaf.arrays, *counter]


def _slices(leaf: Leaf, arrays: Sequence[Any], first: int) -> Iterator[Slice]:
    """The leaf, or of a stack every slice, its arrays being parts of the stack's."""
    chain, shape, dtype, n = leaf.chain, leaf.param.shape, leaf.param.dtype.name, leaf.chain.stacked
    strides = [_strides(x) for x in arrays]
    for place in np.ndindex(shape[:n]):
        one = chain.slice(place) if n else chain
        starts = [sum(map(mul, place, steps)) for steps in strides]
        seen = [
            native.Array(start, x.dtype.itemsize, steps[n:])
            for start, x, steps in zip(starts, arrays, strides, strict=True)
        ]
        yield Slice(one, leaf.lr, shape[n:], dtype, first, seen, (id(chain), one.rounding.place, id(leaf.lr)))


def _kernels(slices: Sequence[Slice]) -> list[native.Kernel]:
    """The kernel of every slice; those that have to be compiled are compiled at once."""
    kinds = [(native.structure(one.chain), len(one.shape), one.dtype) for one in slices]
    one_of_each = dict(zip(kinds, slices, strict=True))
    with ThreadPoolExecutor() as pool:
        kernels = dict(zip(one_of_each, pool.map(_kernel, one_of_each.values()), strict=True))
    return [kernels[kind] for kind in kinds]


def _kernel(one: Slice) -> native.Kernel:
    kernel = native.kernel(one.chain, len(one.shape), tuple(range(len(one.shape))), one.dtype)
    if list(kernel.program.arrays) != list(one.chain.arrays(one.shape, one.dtype)):
        raise native.KernelError(f"the state of a parameter of shape {one.shape} is not that of its kernel")
    return kernel


def _strides(x: Any) -> tuple[int, ...]:
    """The bytes from one element to the next along each axis, as XLA lays arrays out here."""
    return tuple(x.dtype.itemsize * math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))


def _numbers(slices: Sequence[Slice], kernels: Sequence[native.Kernel]) -> tuple[list[int], Any]:
    """Where each slice's numbers begin, and all numbers; those of one chain, learning rate and kernel share theirs."""
    places: dict[Any, int] = {}
    numbers: list[Any] = []
    keys = [(*one.numbers, kernel.name) for one, kernel in zip(slices, kernels, strict=True)]
    for key, one, kernel in zip(keys, slices, kernels, strict=True):
        if key not in places:
            places[key] = len(numbers)
            named = hyperparameters(kernel.program, one.chain, one.lr)
            dtype = computed_in(one.dtype)
            cast = {
                name: x.astype(dtype) if isinstance(x, jax.Array) and not name.endswith(START) else x
                for name, x in named.items()
            }
            numbers += evaluate(kernel.program.scalars, cast, namespace)
    traced = [i for i, x in enumerate(numbers) if isinstance(x, jax.Array)]
    known = np.array([0.0 if isinstance(x, jax.Array) else x for x in numbers], np.float64)
    with jax.enable_x64(True):  # the driver takes float64, whatever JAX's own precision: float32 cannot hold words
        array = jnp.asarray(known)
        if traced:
            array = array.at[np.array(traced)].set(jnp.stack([numbers[i].astype(np.float64) for i in traced]))
    return [places[key] for key in keys], array


@cache
def _target() -> tuple[str, ctypes.CDLL]:
    """The name under which XLA knows the call, and its library."""
    source = build.jax_handler()  # with XLA's header in it, so that its version is part of the name
    assert source, "jaxlib brings the header"
    library, driver = build.load(build.library(source)), native.driver()
    functions = (driver.fusedbun_job, driver.fusedbun_work, driver.fusedbun_end)
    library.fusedbun_jax_driver(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    name = f"fusedbun_step_{build.digest(source, 1)}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library.fusedbun_jax_step), platform="cpu")
    return name, library
