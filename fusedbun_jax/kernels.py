"""Generated kernels as a call that XLA makes on CPUs: one call for all leaves, in place.

The call (`fusedbun/compiler/cpp/runtime/jax_ffi.cpp`) knows kernels by name, so that a compiled program may be kept in
a file.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.trace import START, evaluate, hyperparameters
from fusedbun_jax import namespace
from fusedbun_jax.leaf import floating
from fusedbun_jax.operands import Leaf

GRAD = 1  # its place among a leaf's arrays
NUMBERS = 5  # the place of its numbers in a leaf's record


def step(leaves: Sequence[Leaf]) -> list[Any]:
    """Every leaf's parameter and the state's arrays after a step, in the memory of those before it.

    Raises:
        BuildError: the call cannot be compiled.
        KernelError: there is no kernel for a leaf's chain.
    """
    target, library = _target()
    kernels = _kernels(leaves)
    named = {kernel.name: kernel for kernel in kernels}
    for kernel in named.values():
        library.fusedbun_jax_kernel(kernel.name.encode(), ctypes.c_void_p(kernel.address))
    words: list[int] = []
    records = []
    places, numbers = _numbers(leaves, kernels)
    for leaf, kernel, place in zip(leaves, kernels, places, strict=True):
        arrays = [native.Array(0, x.dtype.itemsize, _strides(x)) for x in leaf.arrays]
        record = native.describe(native.Description(kernel, leaf.param.shape, arrays, 0), words)
        steps, count = record[3], record[6]
        words[steps : steps + count] = [0] * count  # the elements of every array follow one another
        record[NUMBERS] = place
        records.append(record)
    operands = [x for leaf in leaves for x in leaf.arrays]
    written = [i for i, a in enumerate(a for leaf in leaves for a in range(len(leaf.arrays))) if a != GRAD]
    call = jax.ffi.ffi_call(
        target,
        [jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in written],
        input_output_aliases={1 + i: out for out, i in enumerate(written)},
    )
    return list(
        call(
            numbers,
            *operands,
            kernels="".join(f"{name} " for name in named),
            kinds=np.array([list(named).index(kernel.name) for kernel in kernels], np.int64),
            lists=np.int64(1),
            records=np.array(records, np.int64).ravel(),
            words=np.array(words, np.int64),
        )
    )


def _kernels(leaves: Sequence[Leaf]) -> list[native.Kernel]:
    """The kernel of every leaf; those that have to be compiled are compiled at once."""
    kinds = [(native.structure(leaf.chain), leaf.param.ndim, leaf.param.dtype.name) for leaf in leaves]
    one_of_each = dict(zip(kinds, leaves, strict=True))
    with ThreadPoolExecutor() as pool:
        kernels = dict(zip(one_of_each, pool.map(_kernel, one_of_each.values()), strict=True))
    return [kernels[kind] for kind in kinds]


def _kernel(leaf: Leaf) -> native.Kernel:
    param, dtype = leaf.param, leaf.param.dtype.name
    kernel = native.kernel(leaf.chain, param.ndim, tuple(range(param.ndim)), dtype)
    if list(kernel.program.arrays) != list(leaf.chain.arrays(param.shape, dtype)):
        raise native.KernelError(f"the state of a parameter of shape {param.shape} is not that of its kernel")
    return kernel


def _strides(x: Any) -> tuple[int, ...]:
    """The bytes from one element to the next along each axis, as XLA lays arrays out here."""
    return tuple(x.dtype.itemsize * math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))


def _numbers(leaves: Sequence[Leaf], kernels: Sequence[native.Kernel]) -> tuple[list[int], Any]:
    """Where each leaf's numbers begin, and all numbers; leaves of one chain, learning rate and kernel share theirs."""
    places: dict[Any, int] = {}
    numbers: list[Any] = []
    keys = [(id(leaf.chain), id(leaf.lr), kernel.name) for leaf, kernel in zip(leaves, kernels, strict=True)]
    for key, leaf, kernel in zip(keys, leaves, kernels, strict=True):
        if key not in places:
            places[key] = len(numbers)
            _, dtype = floating((), "parameter", leaf.param)
            named = hyperparameters(kernel.program, leaf.chain, leaf.lr)
            cast = {
                name: x.astype(dtype) if isinstance(x, jax.Array) and not name.endswith(START) else x
                for name, x in named.items()
            }
            numbers += evaluate(kernel.program.scalars, cast, namespace)
    with jax.enable_x64(True):  # the driver takes float64, whatever JAX's own precision: float32 cannot hold words
        if any(isinstance(x, jax.Array) for x in numbers):
            return [places[key] for key in keys], jnp.stack([jnp.asarray(x, np.float64) for x in numbers])
        return [places[key] for key in keys], jnp.asarray(np.array(numbers, np.float64))


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
