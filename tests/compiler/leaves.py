"""A leaf and its state in NumPy, and one step of it: by the definition, in tiles, and by a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fusedbun import namespace as in_numpy
from fusedbun.chain import Chain, step
from fusedbun.compiler.cpp import native
from fusedbun.compiler.tiles import ELEMENTS, Tiles, schedule_for
from fusedbun.compiler.trace import UPDATE, evaluate, hyperparameters
from fusedbun.storage.storage import Storage
from fusedbun.transform import Shape

Arrays = dict[str, Any]  # "param", "grad" and the slots by name
LR = 0.5
LOW = (np.dtype(ml_dtypes.bfloat16), np.dtype("float16"))  # stored so, and computed with in float32


class Precise:
    """NumPy, but means, expm1 and log are computed in double precision and rounded once.

    Kernels compute functions so. They do not add up so, but NumPy's own sums of float32 are less accurate than theirs.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(in_numpy, name)

    def mean(self, x: Any, *, axis: tuple[int, ...], keepdims: bool) -> Any:
        return np.mean(x, axis=axis, keepdims=keepdims, dtype=np.float64).astype(x.dtype) if axis else x

    def sum(self, x: Any, *, axis: tuple[int, ...], keepdims: bool) -> Any:
        return np.sum(x, axis=axis, keepdims=keepdims, dtype=np.float64).astype(x.dtype) if axis else x

    def expm1(self, x: Any) -> Any:
        return np.vectorize(math.expm1, otypes=[np.float64])(x).astype(x.dtype)

    def log(self, x: Any) -> Any:
        return np.log(np.float64(x)).astype(x.dtype)


def computed(dtype: Any) -> np.dtype[Any]:
    """What a leaf of this dtype is computed in."""
    dtype = np.dtype(dtype)
    return np.dtype("float32") if dtype in LOW else dtype


def leaf(chain: Chain, shape: Shape, dtype: str = "float64", seed: int = 3, ternary: bool = False) -> Arrays:
    """A leaf in the middle of its training."""
    rng = np.random.default_rng(seed)
    param = rng.integers(-1, 2, shape) if ternary else rng.standard_normal(shape)
    arrays = {"param": np.asarray(param, dtype), "grad": np.asarray(rng.standard_normal(shape), dtype)}
    for key, stored in chain.arrays(shape, dtype).items():
        size = stored.shape(shape)
        if "int" not in stored.dtype:
            arrays[key] = rng.uniform(0.5, 1.5, size).astype(stored.dtype)
        elif stored.part == "block":
            arrays[key] = rng.integers(120, 130, size).astype(stored.dtype)
        else:
            few = 4 if stored.dtype == "int32" or (stored.part == "element" and "vote" in key) else 120
            arrays[key] = rng.integers(0, few, size).astype(stored.dtype)
    return arrays


@np.errstate(all="ignore")
def by_definition(chain: Chain, arrays: Arrays, xp: Any = in_numpy, lr: float = LR, as_update: bool = False) -> Arrays:
    """The parameter, or the update in its place, and the state after a step."""
    param = arrays["param"]
    dtype = computed(param.dtype)
    p = param.astype(dtype)
    storage = Storage(xp, chain.rounding, p, param.dtype.name)
    new, after = step(chain, storage, lr, p, arrays["grad"].astype(dtype), arrays, as_update)
    kinds = {key: stored.dtype for key, stored in chain.arrays(param.shape, param.dtype.name).items()}
    state = {key: after[key].astype(kind) for key, kind in kinds.items()}
    if as_update:
        return {UPDATE: new.astype(chain.rounding.of_updates(param.dtype.name)), **state}
    return {"param": new.astype(param.dtype), **state}


@np.errstate(all="ignore")
def by_tiles(chain: Chain, arrays: Arrays, elements: int = ELEMENTS) -> Arrays:
    """The same, of a copy of the arrays with their strides."""
    after = {name: array.copy(order="K") for name, array in arrays.items()}
    param = after["param"]
    schedule = schedule_for(chain, param.shape, param.strides, dtype=param.dtype.name, elements=elements)
    scalars = evaluate(schedule.program.scalars, hyperparameters(schedule.program, chain, LR))
    Tiles(schedule, in_numpy).run(scalars, after, computed(param.dtype), elements)
    del after["grad"]
    return after


def step_in_place(
    leaves: Sequence[tuple[Chain, Arrays]],
    threads: int = 1,
    lrs: Sequence[float] | None = None,
    absent: Sequence[int] = (),
    maximize: bool = False,
    as_update: bool = False,
) -> None:
    """Steps leaves with their kernels, all in one call, but leaves out those that are `absent`."""
    described, numbers = [], []
    for n, ((chain, arrays), lr) in enumerate(zip(leaves, lrs or [LR] * len(leaves), strict=True)):
        param = arrays["param"]
        order = native.memory_order(param.shape, param.strides)
        kernel = native.kernel(chain, param.ndim, order, param.dtype.name, maximize, as_update=as_update)
        numbers.append(evaluate(kernel.program.scalars, hyperparameters(kernel.program, chain, lr)))
        found = [arrays[name] for name in ("param", "grad", *kernel.program.arrays)]
        seen = [native.Array(x.ctypes.data, x.itemsize, x.strides) for x in found]
        described.append(native.Description(kernel, param.shape, seen, n))
    stepped = native.Leaves(described, len(leaves))
    for n, values in enumerate(numbers):
        stepped.set_numbers(n, values)
    addresses = [leaf.arrays[1].address for leaf in described]
    stepped.set_gradients([native.ABSENT if n in absent else at for n, at in enumerate(addresses)])
    stepped.step(threads)


def by_kernel(chain: Chain, arrays: Arrays, threads: int = 1) -> Arrays:
    """The parameter and the state after a step with a kernel, of a copy of the arrays with their strides."""
    after = {name: array.copy(order="K") for name, array in arrays.items()}
    step_in_place([(chain, after)], threads)
    del after["grad"]
    return after


def updated_by_kernel(chain: Chain, arrays: Arrays, threads: int = 1) -> Arrays:
    """The update and the state, likewise; the update is in the gradient's memory where that has its dtype."""
    after = {name: array.copy(order="K") for name, array in arrays.items()}
    dtype = chain.rounding.of_updates(after["param"].dtype.name)
    grad = after["grad"]
    after[UPDATE] = grad if grad.dtype == dtype else np.empty_like(grad, dtype)
    step_in_place([(chain, after)], threads, as_update=True)
    np.testing.assert_array_equal(after.pop("param"), arrays["param"])
    del after["grad"]
    return after


def has_sums(chain: Chain, ndim: int) -> bool:
    """Whether a step adds up elements, which blocks do in another order."""
    schedule = schedule_for(chain, (1,) * ndim, (1,) * ndim)
    return any(v.detail == "sum" for v in schedule.program.graph.values)


def assert_near(got: Arrays, want: Arrays, tolerance: float) -> None:
    """Equal within `tolerance` of each array's largest number; NaN and infinities in the same places."""
    assert got.keys() == want.keys()
    for name in want:
        finite = np.abs(want[name][np.isfinite(want[name])])
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=tolerance * finite.max(initial=0), err_msg=name)


def assert_same(got: Arrays, want: Arrays) -> None:
    """Equal to the bit; a NaN equals a NaN."""
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
