"""Generated kernels as a call that XLA makes on CPUs: one call for all leaves, in place.

The call (`fusedbun/compiler/cpp/runtime/jax_ffi.cpp`) knows kernels by name, so that a compiled program may be kept in
a file.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from operator import mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedbun.chain import Chain
from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.trace import START, UPDATE, evaluate, hyperparameters
from fusedbun.storage.codes import STEP, computed_in
from fusedbun_jax import namespace
from fusedbun_jax.operands import Leaf

NUMBERS = 5  # the place of its numbers in a leaf's record


class Slice(NamedTuple):
    """What a kernel steps at a time: a parameter, or a slice of one that is a stack."""

    chain: Chain
    lr: Any
    shape: tuple[int, ...]
    dtype: str
    arrays: list[native.Array]  # their addresses are counted from where their buffers begin
    buffers: list[int]
    numbers: tuple[Any, ...]  # what decides, with the kernel, the numbers that it is stepped with


def step(leaves: Sequence[Leaf], as_update: bool) -> list[Any]:
    """Every leaf's parameter and the state's arrays after a step, in the memory of those before it.

    Args:
        leaves: the leaves.
        as_update: give what is to be added to each parameter instead, in the memory of the gradient where it has the
            same dtype.

    Raises:
        BuildError: the call cannot be compiled.
        KernelError: there is no kernel for a leaf's chain.
    """
    target, library = _target()
    call = Call([None], [])  # the first operand is that of the numbers
    by_leaf = [_arrays(leaf, as_update, call) for leaf in leaves]
    slices = [one for leaf, of in zip(leaves, by_leaf, strict=True) for one in _slices(leaf, of)]
    kernels = _kernels(slices, as_update)
    named = {kernel.name: kernel for kernel in kernels}
    for kernel in named.values():
        library.fusedbun_jax_kernel(kernel.name.encode(), ctypes.c_void_p(kernel.address))
    words: list[int] = []
    records = []
    places, call.operands[0] = _numbers(slices, kernels)
    for one, kernel, place in zip(slices, kernels, places, strict=True):
        record = native.describe(native.Description(kernel, one.shape, one.arrays, 0), words)
        steps, count = record[3], record[6]
        words[steps : steps + count] = [0] * count  # the elements of every array follow one another
        record[NUMBERS] = place
        records.append(record)
    order = {name: n for n, name in enumerate(named)}
    results = iter(
        jax.ffi.ffi_call(
            target,
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in call.results],
            input_output_aliases={x.buffer: out for out, x in enumerate(call.results) if x.buffer >= 0},
        )(
            *call.operands,
            kernels="".join(f"{name} " for name in named),
            kinds=np.array([order[kernel.name] for kernel in kernels], np.int64),
            buffers=np.array([buffer for one in slices for buffer in one.buffers], np.int64),
            written=np.array([x.buffer for x in call.results], np.int64),
            lists=np.int64(1),
            records=np.array(records, np.int64).ravel(),
            words=np.array(words, np.int64),
        )
    )
    return [x for leaf in leaves for x in _made(leaf, results)]


@dataclass(frozen=True)
class Array:
    """What of an array is known where the call is made, and the operand that it is; ~n where it is result n alone."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    buffer: int


class Call(NamedTuple):
    """The operands of a call, and its results, of which most are in the memory of operands."""

    operands: list[Any]
    results: list[Array]

    def operand(self, x: Any) -> Array:
        self.operands.append(x)
        return Array(x.shape, x.dtype, len(self.operands) - 1)

    def result(self, x: Array) -> Array:
        self.results.append(x)
        return x


def _arrays(leaf: Leaf, as_update: bool, call: Call) -> list[Array]:
    """The arrays that a kernel takes: those of the leaf, its counter where it has one, and its update."""
    param, grad, *others = map(call.operand, (*leaf.arrays, *_counter(leaf)))
    if not as_update:
        return [call.result(param), grad, *map(call.result, others)]
    dtype = np.dtype(leaf.chain.rounding.of_updates(grad.dtype.name))
    update = call.result(grad if dtype == grad.dtype else Array(grad.shape, dtype, ~len(call.results)))
    return [param, grad, *map(call.result, others), update]


def _counter(leaf: Leaf) -> list[Any]:
    shape, dtype = leaf.param.shape, leaf.param.dtype.name
    declared = leaf.chain.arrays(shape, dtype)
    return [jnp.broadcast_to(leaf.count, declared[STEP].shape(shape))] if STEP in declared else []


def _made(leaf: Leaf, results: Iterator[Any]) -> list[Any]:
    """The next results of a call: what is made of the leaf's parameter, and the state's arrays but for the counter."""
    made = [next(results) for _ in (leaf.param, *leaf.stored, *_counter(leaf))]
    return made[: 1 + len(leaf.stored)]


def _slices(leaf: Leaf, arrays: Sequence[Array]) -> Iterator[Slice]:
    """The leaf, or of a stack every slice, its arrays being parts of the stack's."""
    chain, shape, dtype, n = leaf.chain, leaf.param.shape, leaf.param.dtype.name, leaf.chain.stacked
    strides, buffers = [_strides(x) for x in arrays], [x.buffer for x in arrays]
    for place in np.ndindex(shape[:n]):
        one = chain.slice(place) if n else chain
        starts = [sum(map(mul, place, steps)) for steps in strides]
        seen = [
            native.Array(start, x.dtype.itemsize, steps[n:])
            for start, x, steps in zip(starts, arrays, strides, strict=True)
        ]
        numbers = (id(chain), one.rounding.place, id(leaf.lr))
        yield Slice(one, leaf.lr, shape[n:], dtype, seen, buffers, numbers)


def _kernels(slices: Sequence[Slice], as_update: bool) -> list[native.Kernel]:
    """The kernel of every slice; those that have to be compiled are compiled at once."""
    kinds = [(native.structure(one.chain), len(one.shape), one.dtype) for one in slices]
    one_of_each = dict(zip(kinds, slices, strict=True))
    with ThreadPoolExecutor() as pool:
        kernels = dict(zip(one_of_each, pool.map(partial(_kernel, as_update), one_of_each.values()), strict=True))
    return [kernels[kind] for kind in kinds]


def _kernel(as_update: bool, one: Slice) -> native.Kernel:
    kernel = native.kernel(one.chain, len(one.shape), tuple(range(len(one.shape))), one.dtype, as_update=as_update)
    if [key for key in kernel.program.arrays if key != UPDATE] != [*one.chain.arrays(one.shape, one.dtype)]:
        raise native.KernelError(f"the state of a parameter of shape {one.shape} is not that of its kernel")
    return kernel


def _strides(x: Array) -> tuple[int, ...]:
    """The bytes from one element to the next along each axis, as XLA lays arrays out here."""
    return tuple(x.dtype.itemsize * math.prod(x.shape[axis + 1 :]) for axis in range(len(x.shape)))


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
