"""Steps of JAX's beside those of the definition in NumPy, array by array."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusedbun import namespace as in_numpy
from fusedbun.chain import Chain, step
from fusedbun.storage.codes import STEP
from fusedbun.storage.rounding import Rounding
from fusedbun.storage.storage import Storage

Arrays = dict[str, Any]  # "param" and the state's arrays by name
Tree = dict[str, Any]
SHAPES = {"matrix": (5, 75), "vector": (33,), "scalar": (), "cube": (3, 4, 9)}


def stepper(tx: Any, how: str) -> Callable[..., tuple[Any, Any]]:
    """A jitted `step(params, state, grads)`: by "update" and `apply_updates`, or by `tx.step`."""

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step_(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return tx.step(grads, state, params, implementation=how)

    return jax.jit(update if how == "update" else step_)


def tree(dtype: str, seed: int, shapes: Any = None, size: float = 1.0) -> Tree:
    """Random arrays by name, the same for the same seed."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {name: jnp.asarray(size * rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def rounding(chain: Chain, stochastic: bool, seed: int) -> Chain:
    """The chain, with how its results are rounded."""
    return replace(chain, rounding=Rounding(stochastic, seed))


def arrays(chain: Chain, name: str, params: Tree, state: Any) -> Arrays:
    """The arrays of one parameter in the state of an optimizer made from the chain, by the definition's names."""
    param = np.asarray(params[name])
    found, parts = {"param": param}, dict(zip((t.name for t in chain), state, strict=False))
    for key, stored in chain.arrays(param.shape, param.dtype.name).items():
        owner, _, slot = key.partition(".")
        if key == STEP:
            found[key] = np.full(stored.shape(param.shape), optax.tree.get(state, "count"))
        else:
            found[key] = np.asarray(getattr(parts[owner], slot.replace(".", "_"))[name])
    return found


@np.errstate(all="ignore")
def by_definition(chain: Chain, lr: float, grad: Any, before: Arrays, path: tuple[str, ...]) -> Arrays:
    """The parameter and the state's arrays after a step of the parameter at this path."""
    param, chain = before["param"], chain.at(path, before["param"])
    dtype = np.float64 if param.dtype == np.float64 else np.float32
    p = param.astype(dtype)
    storage = Storage(in_numpy, chain.rounding, p, param.dtype.name)
    state = {key: x for key, x in before.items() if key != "param"}
    rounded, after = step(chain, storage, dtype(lr), p, np.asarray(grad).astype(dtype), state)
    assert after.keys() == state.keys()
    return {"param": rounded.astype(param.dtype), **{key: x.astype(before[key].dtype) for key, x in after.items()}}


def assert_same_bits(got: Arrays, want: Arrays) -> None:
    for key, x in want.items():
        assert (got[key].dtype, got[key].shape) == (x.dtype, x.shape), key
        np.testing.assert_array_equal(got[key], x, key)


def assert_near(got: Arrays, want: Arrays, codes: set[str]) -> None:
    """Equal but for float32's rounding, which moves one code in a few thousands to its neighbour.

    Args:
        got: some arrays.
        want: what they should be.
        codes: the names of those that are rounded with noise.
    """
    for key, x in want.items():
        assert (got[key].dtype, got[key].shape) == (x.dtype, x.shape), key
        if key not in codes:
            np.testing.assert_allclose(got[key], x, rtol=2e-5, atol=2e-6, err_msg=key)
        elif x.dtype == np.uint8:
            assert_codes_near(*(np.stack([(y & 15 ^ 8) - 8, (y >> 4 ^ 8) - 8]) for y in map(np.int32, (got[key], x))))
        elif x.dtype == np.int8:
            assert_codes_near(np.int32(got[key]), np.int32(x))
        else:  # the bits of two neighbours lie one apart
            assert_codes_near(*(np.int32(y.view(np.int16)) for y in (got[key], x)))


def assert_codes_near(got: Any, want: Any) -> None:
    assert np.abs(got - want).max(initial=0) <= 1
    assert (got != want).sum() <= math.ceil(1e-3 * want.size)
