"""Generated kernels as a call that XLA makes on CPUs: one call for all leaves, in place.

The call (`fusedbun/compiler/cpp/runtime/jax_ffi.cpp`) knows kernels by name, so that a compiled program may be kept in
a file.
"""

from __future__ import annotations

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedbun.chain import Chain
from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.trace import evaluate, hyperparameters
from fusedbun_jax import leaf as leaves_of_trees
from fusedbun_jax import namespace

HEADER = "xla/ffi/api/c_api.h"
GRAD = 1  # its place among a leaf's arrays
NUMBERS = 5  # the place of its numbers in a leaf's record


class Leaf:
    """A leaf with its arrays, which may be traced.

    Args:
        chain: the chain for it.
        lr: the learning rate.
        arrays: the parameter, the gradient and those of the state, in the chain's order.
    """

    def __init__(self, chain: Chain, lr: Any, *arrays: Any) -> None:
        self.chain, self.lr, self.arrays = chain, lr, arrays
        self.param = arrays[0]
        self.kind = native.structure(chain), self.param.ndim, self.param.dtype.name
        self.computed = leaves_of_trees.computed_in((), "parameter", self.param)

    def kernel(self) -> native.Kernel:
        found = native.kernel(self.chain, self.param.ndim, tuple(range(self.param.ndim)), self.param.dtype.name)
        needed = self.chain.arrays(self.param.shape, self.param.dtype.name)
        if list(found.program.arrays) != list(needed):
            raise native.KernelError(f"the state of a parameter of shape {self.param.shape} is not the one planned for")
        return found

    def numbers(self, kernel: native.Kernel) -> list[Any]:
        """The numbers that a step is computed with, Python's or in the dtype that is computed in."""
        named = hyperparameters(kernel.program, self.chain, self.lr)
        cast = {name: x.astype(self.computed) if isinstance(x, jax.Array) else x for name, x in named.items()}
        return evaluate(kernel.program.scalars, cast, namespace)

    def description(self, kernel: native.Kernel) -> native.Description:
        arrays = [native.Array(0, x.dtype.itemsize, _strides(x)) for x in self.arrays]
        return native.Description(kernel, self.param.shape, arrays, 0)


def step(leaves: list[Leaf]) -> list[Any]:
    """Every leaf's parameter and the state's arrays after a step, in the memory of those before it.

    Raises:
        BuildError: the call cannot be compiled.
        KernelError: there is no kernel for a leaf's chain.
    """
    target, library = _target()
    known = _kernels(leaves)
    named = {kernel.name: kernel for kernel in known.values()}
    for kernel in named.values():
        library.fusedbun_jax_kernel(kernel.name.encode(), ctypes.c_void_p(kernel.address))
    words: list[int] = []
    records, numbers = [], _List()
    for leaf in leaves:
        kernel = known[leaf.kind]
        record = native.describe(leaf.description(kernel), words)
        steps, count = record[3], record[6]
        words[steps : steps + count] = [0] * count  # the elements of every array follow one another
        record[NUMBERS] = numbers.place(leaf, kernel)
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
            numbers.array(),
            *operands,
            kernels="".join(f"{name} " for name in named),
            kinds=np.array([list(named).index(known[leaf.kind].name) for leaf in leaves], np.int64),
            lists=np.int64(1),
            records=np.array(records, np.int64).ravel(),
            words=np.array(words, np.int64),
        )
    )


class _List:
    """The numbers of all leaves; leaves of one chain, one learning rate and one kernel share theirs."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._places: dict[Any, int] = {}

    def place(self, leaf: Leaf, kernel: native.Kernel) -> int:
        """Where a leaf's numbers begin."""
        key = (id(leaf.chain), id(leaf.lr), kernel.name)
        if key not in self._places:
            self._places[key] = len(self._values)
            self._values += leaf.numbers(kernel)
        return self._places[key]

    def array(self) -> Any:
        """The numbers as the driver takes them, whatever JAX's own precision is: float32 has no place for words."""
        with jax.enable_x64(True):
            if any(isinstance(x, jax.Array) for x in self._values):
                return jnp.stack([jnp.asarray(x, np.float64) for x in self._values])
            return jnp.asarray(np.array(self._values, np.float64))


def _strides(x: Any) -> tuple[int, ...]:
    """The bytes from one element to the next along each axis, as XLA lays arrays out here."""
    return tuple(x.dtype.itemsize * math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))


def _kernels(leaves: list[Leaf]) -> dict[Any, native.Kernel]:
    """The kernels by the leaves' kinds; those that have to be compiled are compiled at once."""
    kinds = {leaf.kind: leaf for leaf in leaves}
    with ThreadPoolExecutor() as pool:
        return dict(zip(kinds, pool.map(Leaf.kernel, kinds.values()), strict=True))


@cache
def _target() -> tuple[str, ctypes.CDLL]:
    """The name under which XLA knows the call, and its library."""
    header = Path(jax.ffi.include_dir(), HEADER).read_text()  # in the code, so that its version is part of the name
    source = (build.RUNTIME / "jax_ffi.cpp").read_text().replace(f'#include "{HEADER}"', header)
    library, driver = build.load(build.library(source)), native.driver()
    functions = (driver.fusedbun_job, driver.fusedbun_work, driver.fusedbun_end)
    library.fusedbun_jax_driver(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    name = f"fusedbun_step_{build.digest(source, 1)}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library.fusedbun_jax_step), platform="cpu")
    return name, library
