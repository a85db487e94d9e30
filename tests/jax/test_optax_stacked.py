"""Stacks in JAX: each slice is stepped as a parameter of its own, and only noise sees the whole."""

from functools import partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from factories import FACTORIES
from flax import linen, nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import CODED, only, sweep

import fusedbun
import fusedbun_jax as fj
from fusedbun.chain import Chain
from fusedbun.recipes import RECIPES
from fusedbun.reference import Reference
from fusedbun.transforms import Decay, Momentum, RMSScale, SM3Accumulate

STACKS = (((3, 4, 33), 1), ((2, 2, 3, 4), 2), ((3, 5), 1), ((4,), 1), ((2, 0, 3), 1))
# Noise sees the whole stack, so slices are compared without it.
QUIET = {
    name: partial(factory, momentum_dtype=None) if factory.settings.get("momentum_dtype") else factory
    for name, factory in FACTORIES.items()
}


def numbers(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def values(name, shape, dtype="float32"):
    x = numbers(shape, 0, dtype)
    return jnp.sign(x) if getattr(FACTORIES[name], "ternary", False) else x


def stepper(tx, how):
    if how != "update":
        return jax.jit(partial(tx.step, implementation=how))

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def trained(tx, p, how, steps=3, at=...):
    """A parameter and its state after steps with the same gradients, or those of the slice `at` a place."""
    params = {"p": p[at]}
    state, step = tx.init(params), stepper(tx, how)
    for i in range(steps):
        params, state = step({"p": numbers(p.shape, 1 + i, p.dtype)[at]}, state, params)
    return params["p"], state


def arrays(state):
    return [x for x in jax.tree.leaves(state) if x.ndim]


@sweep(
    ("name", "dtype"),
    [*product(QUIET, ("float32", "bfloat16"))],
    short=only(("recommended", "float32"), ("fusedbunw", "bfloat16"), ("mup_adamw", "float32")),
)
def test_slices_are_parameters_of_their_own(name, dtype):
    for shape, stacked in STACKS:
        p = values(name, shape, dtype)
        stack, state = trained(QUIET[name](stacked=stacked), p, "kernel")
        for place in product(*map(range, shape[:stacked])) if p.size else ():
            one, of_one = trained(QUIET[name](), p, "kernel", at=place)
            chex.assert_trees_all_equal(stack[place], one)
            got = jax.tree.map(lambda x, place=place: x[place] if x.ndim else x, state)
            # what a slice has no array for is one 0, whatever its axes are
            chex.assert_trees_all_equal([x.ravel() for x in arrays(got)], [x.ravel() for x in arrays(of_one)])


@sweep("name", QUIET, short=only("recommended", "fusedbunw", "mup_adamw"))
def test_equals_vmap_of_the_optimizer(name):
    for shape, stacked in (((3, 4, 33), 1), ((2, 2, 3, 4), 2), ((3, 5), 1)):
        params, grads = {"p": values(name, shape)}, {"p": numbers(shape, 1)}

        def vmapped(function, n=stacked):
            return vmapped(jax.vmap(function), n - 1) if n else jax.jit(function)

        stack, one = QUIET[name](stacked=stacked), QUIET[name]()
        state, states = stack.init(params), vmapped(one.init)(params)
        for _ in range(2):
            updates, state = jax.jit(stack.update)(grads, state, params)
            wanted, states = vmapped(one.update)(grads, states, params)
            chex.assert_trees_all_equal(updates, wanted)
        assert state.count == 2


NOISY = {
    "fusedbunw": fj.fusedbunw,
    "fusedbun int4": partial(fj.fusedbun, **RECIPES["fusedbun"].recommended, momentum_dtype="int4"),
    "sm3 bfloat16": partial(fj.sm3, momentum=0.9, momentum_dtype="bfloat16"),
    "lion int8": partial(fj.decoupled_lionw, momentum_dtype="int8"),
}


@sweep("name", NOISY, short=only("fusedbunw"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_draw_the_definitions_noise(name, dtype):
    for shape, stacked in (((3, 4, 40), 1), ((2, 2, 3, 40), 2)):
        tx = NOISY[name](0.01, stacked=stacked, stochastic_rounding=True, seed=3)
        found = [trained(tx, numbers(shape, 0, dtype), how) for how in ("kernel", "update")]
        (p, state), (q, other) = found
        np.testing.assert_allclose(*(np.float32(x) for x in (p, q)), rtol=2e-2, atol=2e-2)
        for x, y in zip(arrays(state), arrays(other), strict=True):
            if jnp.issubdtype(x.dtype, jnp.floating):
                np.testing.assert_allclose(*(np.float32(z) for z in (x, y)), rtol=2e-2, atol=1e-6)
            else:
                assert np.mean(np.asarray(x) == np.asarray(y)) > 0.9


@pytest.mark.parametrize("how", ["kernel", "update"])
def test_noise_sees_the_whole_stack(how):
    """To a rule on elements a stack is nothing special; so neither are the bits that it is rounded to."""
    make = partial(fj.decoupled_lionw, 0.01, momentum_dtype="bfloat16", stochastic_rounding=True)
    p = numbers((3, 4, 5), 0, "bfloat16")
    found = [trained(make(stacked=stacked), p, how) for stacked in (0, 1, 2)]
    assert len(np.unique(np.float32(found[0][0]))) > 30
    for other in found[1:]:
        chex.assert_trees_all_equal(found[0], other)


def test_has_torchs_numbers():
    values, grads = ([numbers((2, 3, 40), seed + i) for i in range(3)] for seed in (0, 5))
    for dtype in (None, *CODED):
        params = {"p": values[0]}
        tx = fj.fusedbunw(0.01, stacked=1, momentum_dtype=dtype)
        state = tx.init(params)
        tensor = torch.nn.Parameter(torch.tensor(np.asarray(values[0])))
        optimizer = fusedbun.FusedbunW([("p", tensor)], 0.01, stacked=1, momentum_dtype=dtype)
        for grad in grads:
            params, state = tx.step({"p": grad}, state, params, implementation="kernel")
            tensor.grad = torch.tensor(np.asarray(grad))
            optimizer.step()
        np.testing.assert_array_equal(params["p"], tensor.detach())


def test_equals_the_reference():
    transforms = (SM3Accumulate(0.8, "mean", "product", lagged=True), RMSScale(), Momentum(0.9), Decay(0.1))
    with jax.enable_x64(True):
        p = numbers((2, 3, 4, 5), 0, "float64")
        reference = Reference({"p": np.asarray(p)}, Chain(transforms, stacked=1), 0.01)
        got, _ = trained(fj.from_chain(Chain(transforms), 0.01, stacked=1), p, "update")
        for i in range(3):
            reference.step({"p": np.asarray(numbers(p.shape, 1 + i, "float64"))})
        np.testing.assert_allclose(got, reference.params["p"], rtol=1e-12, atol=1e-12)


@pytest.mark.long
def test_a_transformation_by_itself():
    p, grad = numbers((3, 4, 5), 0), numbers((3, 4, 5), 1)
    tx = optax.chain(*(fj.lift(t, stacked=1) for t in (SM3Accumulate(0.9), RMSScale(), Momentum(0.9))))
    updates, _ = tx.update(grad, tx.init(p), p)
    one = optax.chain(*(fj.lift(t) for t in (SM3Accumulate(0.9), RMSScale(), Momentum(0.9))))
    for i in range(3):
        chex.assert_trees_all_close(updates[i], one.update(grad[i], one.init(p[i]), p[i])[0], rtol=1e-6)


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(x.shape[-1])(x), None


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        layers = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = layers()(x, None)
        experts = linen.vmap(linen.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        return linen.Dense(1)(experts(3)(jnp.stack([x, x])).mean(0))


def test_layers_of_linen():
    x = jnp.ones((2, 6))
    params = Network().init(jax.random.key(0), x)["params"]
    tx = fj.fusedbun(0.1, centralize=True, use_rms=True, channel_axis=fj.flax_channel_axis, stacked=fj.flax_stacked)
    grads = jax.grad(lambda p: jnp.square(Network().apply({"params": p}, x)).sum())(params)
    stepped, state = tx.step(grads, tx.init(params), params, implementation="kernel")
    accumulators = state.sm3_accumulate
    for key, stack in ((("ScanLayer_0", "Dense_0"), 4), (("VmapDense_0",), 2)):
        of = [params, grads, stepped, accumulators.axis0, accumulators.axis1]
        for name in key:
            of = [tree[name] for tree in of]
        before, grad, after, rows, columns = (tree["kernel"] for tree in of)
        assert (rows.shape, columns.shape) == ((stack, 6, 1), (stack, 1, before.shape[-1]))
        one = fj.fusedbun(0.1, centralize=True, use_rms=True, channel_axis=-1)
        for i in range(stack):
            alone, _ = one.step(grad[i], one.init(before[i]), before[i], implementation="kernel")
            chex.assert_trees_all_equal(after[i], alone)


@pytest.mark.long
def test_layers_of_nnx():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return nnx.Linear(4, 4, rngs=rngs)

            self.blocks, self.out = make(rngs), nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            through = nnx.scan(lambda x, block: x + block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.out(through(x, self.blocks))

    model = Stack(nnx.Rngs(0))
    tx = fj.sm3(0.1, stacked=partial(fj.flax_stacked, names=("blocks",)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.square(model(jnp.ones((2, 4)))).sum())(model)
    optimizer.update(model, grads)
    shapes = {tuple(x.shape) for x in jax.tree.leaves(optimizer.opt_state) if x.size > 1}
    assert {(3, 4, 1), (3, 1, 4), (3, 4)} <= shapes


def test_where_its_state_lies():
    tx = fj.fusedbunw(0.1, stacked=1)
    params = {"p": jax.ShapeDtypeStruct((4, 8, 64), jnp.float32)}
    mesh = AbstractMesh((2, 2), ("layers", "rows"))
    found = fj.state_shardings(tx, params, {"p": P("layers", "rows")}, mesh=mesh)
    arrays = {**found.sm3_accumulate._asdict(), **found.momentum._asdict()}
    axes = {"axis0": ("layers", "rows"), "axis1": ("layers",), "moment": ("layers", "rows")}
    for name, spec in axes.items():
        assert tuple(axis for axis in arrays[name]["p"].spec if axis) == spec, name


def test_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((1, 1), ("layers", "rows"), axis_types=(AxisType.Explicit,) * 2)
    p, grad, tx = numbers((3, 4, 40), 0), numbers((3, 4, 40), 1), fj.fusedbunw(0.1, stacked=1)
    with jax.sharding.set_mesh(mesh):
        placed, of = (jax.device_put(x, NamedSharding(mesh, P("layers", "rows"))) for x in (p, grad))
        got, _ = jax.jit(tx.update)(of, tx.init(placed), placed)
    chex.assert_trees_all_close(got, jax.jit(tx.update)(grad, tx.init(p), p)[0], rtol=1e-6)


@pytest.mark.long
def test_metrics_of_a_stack_in_codes():
    p, grad = {"p": numbers((3, 4, 40), 0)}, {"p": numbers((3, 4, 40), 1)}
    found = {}
    for dtype in (None, "int8"):
        tx = fj.with_metrics(fj.fusedbunw(0.1, stacked=1, momentum_dtype=dtype))
        found[dtype] = tx.update(grad, tx.init(p), p)[1].metrics
    for name, x in found[None].items():
        np.testing.assert_allclose(found["int8"][name], x, rtol=0.02)


def test_files_of_both_frameworks(tmp_path):
    values, grad = numbers((3, 4, 40), 0), numbers((3, 4, 40), 1)
    tensor = torch.nn.Parameter(torch.tensor(np.asarray(values)))
    optimizer = fusedbun.FusedbunW([("p", tensor)], 0.01, stacked=1)
    tensor.grad = torch.tensor(np.asarray(grad))
    optimizer.step()
    fusedbun.save_state(optimizer, tmp_path / "state")
    params, tx = {"p": jnp.asarray(tensor.detach().numpy())}, fj.fusedbunw(0.01, stacked=1)
    state = fj.load_state(tmp_path / "state", tx, tx.init(params), params)
    _, alone = tx.step({"p": grad}, tx.init(params), {"p": values}, implementation="kernel")
    chex.assert_trees_all_equal(state, alone)
    fj.save_state(tmp_path / "back", tx, state, params)
    again = fusedbun.FusedbunW([("p", tensor)], 0.01, stacked=1)
    fusedbun.load_state(again, tmp_path / "back")
    for key, x in optimizer.state[tensor].items():
        assert torch.equal(x, again.state[tensor][key]), key
    flat = fj.fusedbunw(0.01)
    with pytest.raises(ValueError, match=r"'p' is kept with stacked=1 in the file, but with stacked=0 here"):
        fj.load_state(tmp_path / "state", flat, flat.init(params), params)


def test_under_inject_hyperparams_and_by_name():
    params = {"layers": numbers((3, 4, 5), 0), "out": numbers((4, 5), 1)}
    for tx in (
        optax.inject_hyperparams(fj.sm3)(0.1, stacked=lambda path, param: int("layers" in path)),
        fj.by_name(fj.sm3, {"layers": {"stacked": 1}}, learning_rate=0.1),
    ):
        shapes = {x.shape for x in jax.tree.leaves(tx.init(params)) if x.size > 1}
        assert shapes == {(3, 4, 1), (3, 1, 5), (4, 1), (1, 5)}


@pytest.mark.parametrize("stacked", [1, lambda path, param: int("layers" in path)], ids=["number", "rule"])
def test_biases_and_norms_of_stacked_layers_are_spared_from_decay(stacked):
    params = {"layers": {"kernel": numbers((3, 4, 5), 0), "bias": numbers((3, 5), 1)}}
    given = {"learning_rate": 0.1, "weight_decay": 0.5}
    rules = {"layers.*": {"stacked": stacked}}
    txs = [
        fj.by_name(fj.fusedbunw, no_decay="weight_decay", stacked=stacked, **given),
        fj.by_name(fj.fusedbunw, rules, no_decay="weight_decay", **given),
        fj.by_name(fj.fusedbunw, {"*.bias": {"weight_decay": 0.0}}, stacked=stacked, **given),
    ]
    found = [tx.update(params, tx.init(params), params)[0] for tx in txs]
    for updates in found[:2]:
        jax.tree.map(np.testing.assert_array_equal, updates, found[2])


@pytest.mark.parametrize("answer", [-1, 1.0, True, None, "all"])
def test_a_rule_that_gives_no_number_of_axes(answer):
    for tx in (fj.sm3(0.1, stacked=lambda path, param: answer), fj.lift(Momentum(), stacked=lambda *_: answer)):
        with pytest.raises(
            (TypeError, ValueError), match=f"stacked must be an integer from 0 up, but it is {answer!r}"
        ) as raised:
            tx.init({"kernel": jnp.ones((3, 4))})
        assert "leaf \"['kernel']\"" in "".join(raised.value.__notes__)


@pytest.mark.parametrize(
    ("stacked", "error", "message"),
    [
        (-1, ValueError, "stacked must be an integer from 0 up or a rule, but it is -1"),
        (1.0, TypeError, "stacked must be an integer from 0 up or a rule"),
        (True, TypeError, "stacked must be an integer from 0 up or a rule"),
    ],
)
def test_wrong_numbers(stacked, error, message):
    for make in (
        partial(fj.sm3, 0.1),
        partial(fj.from_chain, Chain((Momentum(),)), 0.1),
        partial(fj.lift, Momentum()),
    ):
        with pytest.raises(error, match=message):
            make(stacked=stacked)


def test_more_axes_than_there_are():
    for tx in (fj.sm3(0.1, stacked=2), fj.lift(Momentum(), stacked=2)):
        with pytest.raises(ValueError, match=r"stacked=2 says how many.*of shape \(3,\) has 1; give a rule"):
            tx.init({"bias": jnp.ones(3)})
