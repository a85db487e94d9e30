"""Centralization of channels of one element: every implementation leaves the gradient as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from leaves import assert_near, by_definition, by_kernel, by_tiles, leaf
from numpy.testing import assert_allclose, assert_array_equal
from test_shards import compared, in_parts

import fusedbun
from fusedbun import Chain, ChainOptimizer, chain
from fusedbun.reference import Reference
from fusedbun.transforms import Centralize, Momentum
from fusedbun_jax import from_chain

ALONE = [
    *[((n, 1), 0) for n in (1, 5)],
    *[((1, n), 1) for n in (1, 5)],
    *[((5, 1, 1), 0), ((1, 5, 1), 1), ((1, 1, 5), 2), ((1, 1, 1), 1)],
    *[((7, 1, 1, 1), 0), ((1, 1, 7, 1), -2), ((1, 1, 1, 7), -1)],
]
SHARED = [
    ((5, 1), 1),
    ((1, 5), 0),
    ((4, 2), 0),
    ((3, 3, 1, 1), 0),
    ((3, 3, 1, 1), 1),
    ((3, 3, 1, 1), -1),
    ((5, 1, 1), 2),
]
STEADY = Momentum(0.5)


def stepped_in_torch(transforms: Chain, param, grads, implementation):
    w = torch.nn.Parameter(torch.tensor(param))
    optimizer = ChainOptimizer([w], transforms, lr=0.5, implementation=implementation)
    for grad in grads:
        w.grad = torch.tensor(grad)
        optimizer.step()
    return w.detach().numpy()


def stepped_in_jax(transforms: Chain, param, grads, implementation):
    tx = from_chain(transforms, 0.5)
    params = jnp.array(param)
    state = tx.init(params)
    step = jax.jit(lambda grads, state, params: tx.step(grads, state, params, implementation=implementation))
    for grad in grads:
        params, state = step(jnp.array(grad), state, params)
    return np.asarray(params)


def stepped_in_numpy(transforms: Chain, param, grads, implementation):
    reference = Reference({"w": param}, transforms, 0.5)
    return reference.run({"w": grad} for grad in grads)["w"].astype(np.float32)


def problem(shape):
    rng = np.random.default_rng(0)
    param, *grads = rng.integers(-64, 64, (3, *shape)).astype(np.float32)  # whose sums are exact
    return param, grads


@pytest.mark.parametrize(
    ("stepped", "implementation"),
    [
        (stepped_in_numpy, "reference"),
        *[(stepped_in_torch, name) for name in ("definition", "tiles", "kernel")],
        *[(stepped_in_jax, name) for name in ("definition", "kernel")],
    ],
)
@pytest.mark.parametrize(("shape", "axis"), ALONE, ids=str)
def test_is_left_as_it_is(shape, axis, stepped, implementation):
    param, grads = problem(shape)
    got = stepped(chain(Centralize(axis), STEADY), param, grads, implementation)
    assert_array_equal(got, stepped(chain(STEADY), param, grads, implementation))
    assert (got != param).any()


@pytest.mark.parametrize(("shape", "axis"), SHARED, ids=str)
def test_of_more_elements_the_mean_is_taken(shape, axis):
    param, grads = problem(shape)
    own = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    centred = [g - g.mean(axis=own, keepdims=True) for g in grads]
    for stepped, implementation in ((stepped_in_torch, "kernel"), (stepped_in_jax, "kernel")):
        got = stepped(chain(Centralize(axis), STEADY), param, grads, implementation)
        assert_allclose(got, stepped(chain(STEADY), param, centred, implementation), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("realised", [by_tiles, by_kernel])
@pytest.mark.parametrize(("shape", "axis"), [*ALONE, *SHARED], ids=str)
def test_infinities_stay_in_their_channel(shape, axis, realised):
    transforms = chain(Centralize(axis), STEADY)
    arrays = leaf(transforms, shape, "float32")
    arrays["grad"].flat[0] = np.inf
    want, got = by_definition(transforms, arrays), realised(transforms, arrays)
    for name in want:
        assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "cuts"),
    [((4, 2), 0, (1, 2)), ((4, 1), 0, (2, 1)), ((2, 2), 1, (2, 2)), ((1, 4, 1), 1, (1, 2, 1))],
)
def test_a_shard_counts_the_whole(shape, axis, cuts):
    transforms = chain(Centralize(axis), STEADY)
    arrays = leaf(transforms, shape)
    want = by_definition(transforms, arrays)
    compared(in_parts(transforms, arrays, cuts), want, lambda a, b: assert_near(a, b, 1e-12))


def test_every_parameter_of_fusedbun_moves():
    for shape in ((5, 1), (1, 1), (5, 1, 1), (3, 3, 1, 1), (1, 5)):
        w = torch.nn.Parameter(torch.ones(shape))
        optimizer = fusedbun.Fusedbun([w], lr=0.1, centralize=True, use_rms=True, nesterov=True, Lambda=0)
        w.grad = torch.arange(1.0, 1 + w.numel()).reshape(shape)
        optimizer.step()
        assert (w != 1).any(), shape
