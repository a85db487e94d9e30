"""Stochastic rounding of bfloat16 parameters: the bits of the definition in NumPy, and no bias."""

import os
import subprocess
import sys
import textwrap
from itertools import product
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from factories import described, gradients, jitted, run, sweep_of_factories
from numpy_steps import arrays, assert_same_bits, by_definition, rounding, stepper, tree
from sweeps import long, only, sweep

import fusedbun
import fusedbun_jax as fj
from fusedbun import namespace as in_numpy
from fusedbun import recipes
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.storage.noise import draw
from fusedbun.storage.rounding import Rounding, to_bfloat16

COUNT = 2**14
OFF = {"stochastic_rounding": False}


def rounded(p, exact, step, seed=0, name=""):
    """What the definition rounds a parameter to, in float32."""
    index = in_numpy.index(p, range(p.ndim))
    noise = draw(Rounding(True, seed, name).start("param"), np.full((1,) * p.ndim, step, np.int32), index)
    with np.errstate(all="ignore"):
        return to_bfloat16(in_numpy, exact, noise)


def numbers(seed):
    """Parameters and updates of very different sizes: tiny ones, large ones, and such as nearly cancel."""
    rng = np.random.default_rng(seed)
    p = rng.standard_normal(COUNT) * 10.0 ** rng.uniform(-20, 20, COUNT)
    p = p.astype(ml_dtypes.bfloat16).astype(np.float32)
    sizes = np.concatenate([10.0 ** rng.uniform(-9, 9, COUNT // 2), 1 + 10.0 ** -rng.uniform(0, 8, COUNT // 2)])
    return p, (-p * rng.permutation(sizes)).astype(np.float32)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_apply_updates_gives_the_rounded_sum_whatever_the_sizes(compiled):
    tx = fj.round_stochastically(seed=5)

    def both(p, u, state):
        updates, state = tx.update(u, state, p)
        return optax.apply_updates(p, updates), updates, state

    both = jax.jit(both) if compiled else both
    state = tx.init(jnp.zeros(COUNT, jnp.bfloat16))
    for step in range(4):
        p, u = numbers(step)
        got, updates, state = both(jnp.asarray(p, jnp.bfloat16), jnp.asarray(u), state)
        assert updates.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(got).astype(np.float32), rounded(p, p + u, step, 5))


@pytest.mark.parametrize("how", ["update", "definition", "kernel"])
def test_a_step_that_nearly_cancels_the_parameter(how):
    """Contracted, its product and its sum have bits that no update can carry."""
    tx = fj.from_chain(fj.chain(), 0.1, stochastic_rounding=True)
    rng = np.random.default_rng(0)
    p = rng.standard_normal(COUNT).astype(ml_dtypes.bfloat16)
    grad = (p.astype(np.float32) / np.float32(0.1)).astype(ml_dtypes.bfloat16)
    after, _ = stepper(tx, how)(jnp.asarray(p), tx.init(jnp.asarray(p)), jnp.asarray(grad))
    wide = p.astype(np.float32)
    want = rounded(wide, wide - np.float32(0.1) * grad.astype(np.float32), 0)
    np.testing.assert_array_equal(np.asarray(after).astype(np.float32), want)


def test_infinities_nan_and_zeros():
    odd = [np.inf, -np.inf, np.nan, 1.0, 1.0, 1.0, -0.0, 0.0, 3.3e38, np.inf]
    steps = [1.0, 1.0, 1.0, np.inf, -np.inf, np.nan, -0.0, 0.0, 3.3e38, -np.inf]
    p, u = np.array(odd, np.float32).astype(ml_dtypes.bfloat16), np.array(steps, np.float32)
    tx = fj.round_stochastically()
    updates, _ = jax.jit(tx.update)(u, tx.init(jnp.asarray(p)), jnp.asarray(p))
    after = np.asarray(optax.apply_updates(jnp.asarray(p), updates))
    with np.errstate(all="ignore"):
        want = rounded(p.astype(np.float32), p.astype(np.float32) + u, 0).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(after.astype(np.float32), want.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(after[[6, 7]]), [True, False])


@sweep_of_factories
def test_every_optimizer_rounds_to_a_neighbour_of_the_exact_step(factory):
    """By `update` and by `step`; the state is that of a run without it, and the counters."""
    params = factory.parameters(jnp.bfloat16)
    grads, wide = gradients(params), jax.tree.map(jnp.float32, params)
    plain, tx = factory(), factory(stochastic_rounding=True, seed=1)
    exact, _ = jitted(plain)(wide, plain.init(wide), jax.tree.map(jnp.float32, grads))
    for how in ("update", "definition", "kernel"):
        got, state = stepper(tx, how)(params, tx.init(params), grads)
        assert described((got, state)) == described((params, tx.init(params)))
        for q, x in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            q, x = np.asarray(q), np.asarray(x)
            near = np.abs(q.astype(np.float32) - x) <= np.maximum(np.abs(x) * 2.0**-7 * (1 + 1e-4), 1e-6)
            assert near.all(), (how, q, x)
        assert {n.item() for n in jax.tree.leaves(state[-1])} == {1}


@pytest.mark.parametrize("how", ["update", "kernel"])
def test_steps_smaller_than_the_precision_move_the_mean(how):
    """A plain step is lost. 256 steps of 2^-12 from 1 add up to 1/16; each is rounded to 1 + 2^-7 or not at all."""
    params = {"w": jnp.ones(COUNT, jnp.bfloat16)}
    for stochastic in (False, True):
        tx = fj.scaled_optum(2.0**-12, stochastic_rounding=stochastic)
        after, state, step = params, tx.init(params), stepper(tx, how)
        for _ in range(256):
            after, state = step(after, state, jax.tree.map(lambda p: -p, params))
        moved = np.asarray(after["w"]).astype(np.float64) - 1
        if stochastic:
            deviation = np.sqrt(256 * 2.0**-5 * (1 - 2.0**-5)) * 2.0**-7
            assert abs(moved.mean() - 2.0**-4) < 4 * deviation / np.sqrt(COUNT)
            assert moved.std() == pytest.approx(deviation, rel=0.05)
        else:
            assert (moved == 0).all()


def test_the_seed_and_the_name_decide_the_bits():
    params = {name: jnp.ones(COUNT, jnp.bfloat16) for name in ("a", "b")}
    grads = jax.tree.map(lambda p: p / 3, params)

    def after(seed, tree=params):
        tx = fj.sm3(0.01, stochastic_rounding=True, seed=seed)
        return jax.jit(lambda g, p: tx.step(g, tx.init(p), p)[0])({k: grads[k] for k in tree}, tree)

    got = after(0)
    chex.assert_trees_all_equal(after(0), got)
    chex.assert_trees_all_equal(after(0, {"a": params["a"]})["a"], got["a"])  # whatever else is in the tree
    chex.assert_trees_all_equal(after(2**32), got)  # of a seed 32 bits count
    assert (got["a"] != got["b"]).any()
    assert (after(1)["a"] != got["a"]).any()
    assert (after(-1)["a"] != after(1)["a"]).any()


OF_TORCH = {  # eager torch's square root is not always the nearest number, which that of kernels is
    "sm3": (fusedbun.SM3, "kernel", {"momentum": 0.9, "beta": 0.9}),
    "decoupled_lionw": (fusedbun.DecoupledLionW, "definition", {"weight_decay": 1e-4}),
}


@sweep(
    ("name", "dtype"),
    [*product(OF_TORCH, ("int8", "bfloat16", "param", None))],
    short=only(("sm3", "int8"), ("decoupled_lionw", "bfloat16")),
)
def test_the_bits_are_those_of_torch(name, dtype):
    """Of the same names, gradients and seed, where nothing is added up."""
    shapes = {"layer": {"weight": (24, 50), "bias": (24,)}, "scale": ()}
    leaves, kind = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    names = ["layer.bias", "layer.weight", "scale"]
    rng = np.random.default_rng(0)
    start, *steps = [
        [rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16) for shape in leaves] for _ in range(5)
    ]
    theirs_of, implementation, settings = OF_TORCH[name]
    settings = {**settings, "momentum_dtype": dtype, "stochastic_rounding": True, "seed": 11}

    def to_torch(x):
        return torch.tensor(x.astype(np.float32), dtype=torch.bfloat16)

    theirs = [torch.nn.Parameter(to_torch(x)) for x in start]
    optimizer = theirs_of(list(zip(names, theirs, strict=True)), lr=0.1, implementation=implementation, **settings)
    tx = getattr(fj, name)(0.1, **settings)
    params = kind.unflatten([jnp.asarray(x) for x in start])
    state, step = tx.init(params), stepper(tx, "kernel")
    for grads in steps:
        for p, g in zip(theirs, grads, strict=True):
            p.grad = to_torch(g)
        optimizer.step()
        params, state = step(params, state, kind.unflatten([jnp.asarray(g) for g in grads]))
    for p, q in zip(theirs, jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(p.detach().float().numpy(), np.asarray(q).astype(np.float32))
    for index, (leaf, p) in enumerate(zip(names, theirs, strict=True)):
        for key, x in optimizer.state[p].items():
            transform, _, slot = key.partition(".")
            part = state[{"momentum": 2, "step": -1}.get(transform, 0)].slots
            mine = kind.flatten_up_to(part)[index][slot or "step"]
            np.testing.assert_array_equal(x.float().numpy(), np.asarray(mine).astype(np.float32), f"{leaf} {key}")


def test_many_steps_are_those_of_numpy():
    chain = rounding(recipes.sm3(momentum=0.5), True, 9)
    tx = fj.sm3(0.125, momentum=0.5, stochastic_rounding=True, seed=9)
    params = tree("bfloat16", 1)
    state, steps = tx.init(params), [stepper(tx, how) for how in ("update", "kernel", "definition")]
    want = {leaf: arrays(chain, leaf, params, state) for leaf in params}
    for i in range(30):
        grads = tree("bfloat16", i, size=10.0 ** (i % 5 - 2))
        params, state = steps[i % 3](params, state, grads)
        want = {leaf: by_definition(chain, 0.125, grads[leaf], want[leaf], (leaf,)) for leaf in params}
    for leaf in params:
        assert_same_bits(arrays(chain, leaf, params, state), want[leaf])


# ---- what it costs


def test_off_it_costs_nothing_and_on_an_int32_for_each_parameter():
    params = tree("bfloat16", 1)
    off, default, on = (fj.sm3(0.1, **given) for given in (OFF, {}, {"stochastic_rounding": True}))
    assert described(off.init(params)) == described(default.init(params))
    assert not jax.tree.leaves(off.init(params)[-1])
    assert described(on.init(params)[:-1]) == described(off.init(params)[:-1])
    counters = on.init(params)[-1]
    found = {key: (slots["step"].dtype.name, slots["step"].size) for key, slots in counters.slots.items()}
    assert found == dict.fromkeys(params, ("int32", 1))


# ---- errors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_parameters_are_refused(dtype):
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, dtype)}
    message = rf"stochastic rounding is for bfloat16 parameters, but the parameter of leaf .*'b'.* is {dtype}"
    for tx in (
        fj.sm3(0.1, stochastic_rounding=True),
        fj.from_chain(fj.chain(), 0.1, stochastic_rounding=True),
        fj.by_name(fj.sm3, learning_rate=0.1, stochastic_rounding=True),
        fj.round_stochastically(),
    ):
        with pytest.raises(ValueError, match=message):
            tx.init(params)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(tx.init, params)
    narrow = {"a": params["a"], "b": params["a"]}
    tx = fj.sm3(0.1, stochastic_rounding=True)
    state = tx.init(narrow)
    for how in ("update", "definition", None):
        with pytest.raises(ValueError, match=message):
            stepper(tx, how)(params, state, params)
    with pytest.raises(KernelError, match=f"for bfloat16 parameters, but this one is {dtype}"):
        tx.step(params, state, params, implementation="kernel")


def test_other_parameters_may_be_left_out_by_name():
    params = {"norm": jnp.ones(3), "w": jnp.ones((3, 40), jnp.bfloat16)}
    rules = {"norm": {"stochastic_rounding": False}}
    tx = fj.by_name(fj.sm3, rules, learning_rate=0.1, stochastic_rounding=True)
    assert described(run(tx, params)[0]) == described(params)
    got = [stepper(tx, how)(params, tx.init(params), params) for how in ("update", "kernel", "definition")]
    chex.assert_trees_all_equal(got[0], got[1], got[2])


def test_state_of_an_optimizer_without_it():
    params = {"w": jnp.ones((3, 40), jnp.bfloat16)}
    tx, plain = fj.sm3(0.1, stochastic_rounding=True), fj.sm3(0.1)
    for how in ("update", None):
        with pytest.raises(
            ValueError, match=r"the state of leaf .*'w'.* holds nothing, but .*'step'.* make one with init"
        ):
            stepper(tx, how)(params, plain.init(params), params)
    with pytest.raises(ValueError, match=r"needs the parameters: call update\(updates, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"the update of leaf .*'w'.* has shape \(40,\)"):
        fj.round_stochastically().update({"w": jnp.ones(40)}, tx.init(params)[-1], params)


# ---- among JAX's and optax's own


@long
def test_wrappers_of_optaxs():
    params = tree("bfloat16", 1)
    tx = fj.fusedbun(0.1, momentum_dtype="int8", stochastic_rounding=True)
    wide = jax.tree.map(jnp.float32, tree("bfloat16", 2))
    for wrapped in (
        optax.apply_if_finite(tx, 3),
        optax.masked(tx, dict.fromkeys(params, True)),
        optax.partition({"all": tx}, dict.fromkeys(params, "all")),
        optax.chain(optax.clip_by_global_norm(1e9), tx),
    ):
        got = jitted(wrapped)(params, wrapped.init(params), wide)[0]
        chex.assert_trees_all_equal(got, jitted(tx)(params, tx.init(params), wide)[0])


def test_its_derivative_is_that_of_a_plain_cast():
    def end(scale, stochastic):
        params = tree("bfloat16", 1)
        tx = fj.from_chain(fj.chain(), 0.1, stochastic_rounding=stochastic)
        updates, _ = tx.update(jax.tree.map(lambda g: scale * g, tree("float32", 2)), tx.init(params), params)
        return sum(
            jnp.sum(u.astype(jnp.float32) * p.astype(jnp.float32))
            for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
        )

    slopes = [jax.jit(jax.grad(end), static_argnums=1)(1.0, stochastic) for stochastic in (True, False)]
    np.testing.assert_allclose(*slopes, rtol=0.01)


@long
def test_under_vmap_and_inside_a_loop():
    tx = fj.sm3(0.1, momentum=0.9, momentum_dtype="int8", stochastic_rounding=True)
    params = tree("bfloat16", 1)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    want = params, tx.init(params)
    for _ in range(3):
        want = stepper(tx, "definition")(*want, params)

    def loop(params, start, how):
        def body(carry, _):
            return tx.step(start, carry[1], carry[0], implementation=how), None

        return jax.lax.scan(body, (params, tx.init(params)), length=3)[0]

    assert_near_bits(jax.jit(loop, static_argnums=2)(params, params, "definition"), want)
    assert_near_bits(jax.jit(loop, static_argnums=2)(params, params, "kernel"), want)
    of_each = jax.jit(jax.vmap(lambda p: loop(p, p, None)))(stacked)
    assert_near_bits(jax.tree.map(lambda x: x[1], of_each), want)


def assert_near_bits(got, want):
    """Where XLA contracts products and sums, one number in a hundred may be rounded to its other neighbour."""
    assert described(got) == described(want)
    for x, y in zip(*(jax.tree.leaves(z) for z in (got, want)), strict=True):
        x, y = (np.asarray(z).astype(np.float64) for z in (x, y))
        assert (np.abs(x - y) > 1e-6 * np.abs(y)).sum() <= max(1, 0.01 * x.size)


FOUR_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np, chex
import fusedbun_jax as fj
from numpy_steps import stepper, tree
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
specs = {"both": P("a", "b"), "rows": P("a"), "columns": P(None, "b"), "cut": P(None, "b"), "bias": P("b")}
shapes = {"both": (4, 64), "rows": (8, 40), "columns": (3, 128), "cut": (3, 40), "bias": (6,)}
exponents = {"both": P("a", "b"), "rows": P("a"), "columns": P(None, "b"), "cut": P()}

def place(tree):
    return {name: jax.device_put(tree[name], NamedSharding(mesh, specs[name])) for name in tree}

for dtype in sys.argv[1:]:
    tx = fj.sm3(0.125, momentum=0.5, momentum_dtype=dtype, stochastic_rounding=True)
    plain = tree("bfloat16", 1, shapes)
    placed = place(plain)
    one, many = (plain, tx.init(plain)), (placed, tx.init(placed))
    if dtype != "bfloat16":
        for name, spec in exponents.items():
            for part in ("moment.exponents", *(["moment"] if dtype == "int4" else [])):
                x = many[1][2].slots[name][part]
                assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (name, part, x.sharding)
    for how in ("update", None):
        step = stepper(tx, how)
        for i in range(2):
            grads = tree("bfloat16", 10 + i, shapes)
            one, many = step(*one, grads), step(*many, place(grads))
    chex.assert_trees_all_equal(*jax.device_get((one, many)))
"""


@sweep("dtype", ["int8", "int4", "bfloat16"], short=only("bfloat16"))
def test_four_devices_round_as_one_does(dtype):
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(FOUR_DEVICES), dtype],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
