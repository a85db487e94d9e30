"""JAX: the programs that a step stands in, and the trees that it steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.behaviour.in_jax import (
    RATE,
    assert_moved,
    assert_same,
    gradients,
    made,
    one,
    parameters,
    run,
    stepper,
)
from benchmarks.behaviour.jax_wrappers import FIXED
from benchmarks.behaviour.uses import EVERYONE, Contender, Part, is_ours, takes

PROGRAMS = Part("Programs")
TREES = Part("Trees of parameters")
BY_SIGN = "A step by signs does not change with small changes of a gradient, so its derivative is 0."


@PROGRAMS.use("`jit`")
def jitted(contender: Contender) -> None:
    """The run is the one that is not compiled, and is compiled once."""
    params = parameters(contender)
    step, after, state = stepper(contender()), params, contender().init(params)
    for i in range(3):
        after, state = step(after, state, gradients(params, i))
    assert step._cache_size() == 1
    assert_same(after, run(contender(), params)[0], off=1e-4)


@PROGRAMS.use("`jit`, donated")
def donated(contender: Contender) -> None:
    """Parameters and state are given away, and the run is the plain one."""
    params = parameters(contender)
    step = jax.jit(lambda params, state, grads: one(contender(), params, grads, state), donate_argnums=(0, 1))
    after, state = parameters(contender), contender().init(params)
    for i in range(2):
        given, (after, state) = after, step(after, state, gradients(params, i))
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert_same(after, run(contender(), params, 2)[0], off=1e-4)


@PROGRAMS.use("`tx.step`, which steps in place on a CPU", applies=is_ours)
def in_place(contender: Contender) -> None:
    """The run is the one of `update` and `apply_updates`."""
    params = after = parameters(contender)
    tx = contender()
    step, state = jax.jit(tx.step), tx.init(params)
    for i in range(2):
        after, state = step(gradients(params, i), state, after)
    assert_same(after, run(tx, params, 2)[0], off=1e-4)


@PROGRAMS.use("`lax.scan` over steps")
def scanned(contender: Contender) -> None:
    """The run is the plain one."""
    params, tx = parameters(contender), contender()
    grads = jax.tree.map(lambda *x: jnp.stack(x), *(gradients(params, i) for i in range(3)))

    def body(carry: Any, grads: Any) -> Any:
        return one(tx, carry[0], grads, carry[1]), None

    (after, _), _ = jax.lax.scan(body, (params, tx.init(params)), grads)
    assert_same(after, run(tx, params)[0], off=1e-4)


@PROGRAMS.use("`lax.cond`, `lax.fori_loop`")
def control_flow(contender: Contender) -> None:
    """The run is the plain one."""
    params, tx = parameters(contender), contender()
    grads = gradients(params)

    def body(i: Any, carry: Any) -> Any:
        return jax.lax.cond(i < 2, lambda: one(tx, carry[0], grads, carry[1]), lambda: carry)

    after, _ = jax.lax.fori_loop(0, 4, body, (params, tx.init(params)))
    wanted, state = one(tx, params, grads)
    assert_same(after, one(tx, wanted, grads, state)[0], off=1e-4)


@PROGRAMS.use("`vmap` over an ensemble")
def mapped(contender: Contender) -> None:
    """Each member is stepped as by itself."""
    params, tx = parameters(contender), contender(**_without_noise(contender))
    grads = [gradients(params, i) for i in range(2)]
    both = [jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in ((params, params), grads)]
    after = jax.vmap(lambda params, grads: one(tx, params, grads)[0])(*both)
    for i in range(2):
        assert_same(jax.tree.map(lambda x, i=i: x[i], after), one(tx, params, grads[i])[0], off=1e-5)


def _without_noise(contender: Contender) -> dict[str, Any]:
    """Members would draw other noise than one by itself."""
    return {"momentum_dtype": None} if contender.has("momentum_dtype") else {}


@PROGRAMS.use("`pmap` on one device")
def over_devices(contender: Contender) -> None:
    """The step is the plain one."""
    params, tx = parameters(contender), contender()
    many = jax.tree.map(lambda x: x[None], (params, gradients(params)))

    def step(params: Any, grads: Any) -> Any:
        return one(tx, params, jax.lax.pmean(grads, "devices"))[0]

    after = jax.pmap(step, axis_name="devices", devices=jax.devices()[:1])(*many)
    assert_same(jax.tree.map(lambda x: jnp.asarray(x[0]), after), one(tx, params, gradients(params))[0], off=1e-5)


def _mesh() -> Any:
    return jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))


@PROGRAMS.use("`shard_map` on one device, gradients averaged")
def in_shards(contender: Contender) -> None:
    """Replicated parameters are stepped as in a plain step."""
    params, tx = parameters(contender), contender()

    def step(params: Any, grads: Any) -> Any:
        return one(tx, params, jax.lax.pmean(jax.tree.map(lambda g: g[0], grads), "data"))[0]

    inside = jax.shard_map(step, mesh=_mesh(), in_specs=(P(), P("data")), out_specs=P())
    after = jax.jit(inside)(params, jax.tree.map(lambda g: g[None], gradients(params)))
    assert_same(after, one(tx, params, gradients(params))[0], off=1e-5)


@PROGRAMS.use("parameters that are sharded, under `jit`")
def sharded(contender: Contender) -> None:
    """Parameters keep their sharding, and the step is the plain one."""
    sharding = NamedSharding(_mesh(), P("data"))
    params, tx = jax.device_put(parameters(contender), sharding), contender()
    after, _ = stepper(tx)(params, jax.jit(tx.init)(params), jax.device_put(gradients(params), sharding))
    assert_same(after, one(tx, parameters(contender), gradients(params))[0], off=1e-5)
    assert all(x.sharding.device_set == sharding.device_set for x in jax.tree.leaves(after))


@PROGRAMS.use("`jax.export`")
def exported(contender: Contender) -> None:
    """The exported step is the plain one."""
    params, tx = parameters(contender), contender()
    grads, state = gradients(params), tx.init(params)
    flat, tree = jax.tree.flatten((params, state, grads))

    def step(*flat: Any) -> Any:
        params, state, grads = jax.tree.unflatten(tree, flat)
        return jax.tree.leaves(one(tx, params, grads, state)[0])

    after = jax.export.export(jax.jit(step))(*flat).call(*flat)
    assert_same(list(after), jax.tree.leaves(one(tx, params, grads, state)[0]), off=1e-5)


def _derivative(contender: Contender) -> Any:
    params = parameters(contender)
    tx = contender()

    def after(grads: Any) -> Any:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(one(tx, params, grads)[0]))

    return jax.jit(jax.grad(after))(gradients(params))


@PROGRAMS.use(
    "`grad` through `update`",
    reasons={"scaled_optum": BY_SIGN, "decoupled_lionw": BY_SIGN, "ternary_vote": BY_SIGN},
)
def differentiated(contender: Contender) -> None:
    """A derivative flows to the gradients; it is finite, and not 0."""
    found = jax.tree.leaves(_derivative(contender))
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    assert any(bool(x.any()) for x in found), "the derivative is 0"


@PROGRAMS.use("`grad` to the learning rate, through a step", reasons=FIXED)
def rate_differentiated(contender: Contender) -> None:
    """The derivative of the parameters' change is the change over the rate."""
    params = parameters(contender)
    grads, weights = gradients(params), gradients(params, 1)

    def change(rate: Any) -> Any:
        after, _ = one(contender(learning_rate=rate, **_without_noise(contender)), params, grads)
        return sum(
            jnp.sum((x - p) * w) for x, p, w in zip(*map(jax.tree.leaves, (after, params, weights)), strict=True)
        )

    assert np.isclose(float(jax.grad(change)(RATE)), float(change(RATE)) / RATE, rtol=1e-2)


@PROGRAMS.use("`jax.eval_shape` of `init` and `update`")
def abstract(contender: Contender) -> None:
    """Shapes and dtypes are those of a real step, and nothing is allocated."""
    params, tx = parameters(contender), contender()
    shapes = jax.eval_shape(lambda: one(tx, params, gradients(params)))
    found = one(tx, params, gradients(params))
    assert jax.tree.structure(shapes) == jax.tree.structure(found)
    for x, y in zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@PROGRAMS.use("`jax.debug_nans`")
def debugged(contender: Contender) -> None:
    """A compiled step is the plain one."""
    params, tx = parameters(contender), contender()
    with jax.debug_nans(True):
        after, _ = stepper(tx)(params, tx.init(params), gradients(params))
    assert_same(after, one(tx, params, gradients(params))[0], off=1e-5)


@PROGRAMS.use(
    "`jax.debug_nans` under `jax.disable_jit`",
    reasons={"fusedbunw": "A code of a NaN is a NaN in its formula; `momentum_dtype=None` has none."},
)
def debugged_uncompiled(contender: Contender) -> None:
    """The step is the plain one."""
    params, tx = parameters(contender), contender()
    with jax.disable_jit(), jax.debug_nans(True):
        after, _ = one(tx, params, gradients(params))
    assert_same(after, one(tx, params, gradients(params))[0], off=1e-5)


# Trees


@TREES.use("a bare array, tuples, named tuples, and None among them")
def trees(contender: Contender) -> None:
    """Each leaf moves, and the tree is the same."""

    class Pair(NamedTuple):
        first: Any
        second: Any

    x = parameters(contender)["kernel"]
    for params in (x, (x, [x, {"a": x}]), Pair(x, (None, x)), {"a": x, "b": None}):
        assert_moved(one(contender(), params, gradients(params))[0], params)


@TREES.use("scalars, empty arrays and five axes")
def ranks(contender: Contender) -> None:
    """Each leaf moves, and what has no elements is no trouble."""
    shapes = {"scalar": (), "empty": (0, 3), "cube": (2, 3, 2, 1, 2)}
    params = made(shapes, 0, jnp.float32, contender.ternary)
    assert_moved(one(contender(), params, params)[0], params)


def in_dtype(dtype: str) -> Callable[[Contender], None]:
    """The use of a dtype."""

    def given(contender: Contender) -> None:
        with jax.enable_x64(dtype == "float64"):
            params = parameters(contender, dtype)
            step, after, state = stepper(contender()), params, contender().init(params)
            for i in range(2):
                after, state = step(after, state, gradients(params, i))
            assert_moved(after, params)
            assert step._cache_size() == 1

    return given


for dtype in ("bfloat16", "float16", "float64"):
    TREES.use(
        f"{dtype} parameters",
        works_if="Parameters move and keep their dtype, and nothing is compiled anew in the second step.",
    )(in_dtype(dtype))


@TREES.use("several precisions in one tree")
def mixed(contender: Contender) -> None:
    """Each leaf is stepped as it is by itself."""
    params = {name: parameters(contender, name)["kernel"] for name in ("float32", "bfloat16")}
    tx = contender(**_without_noise(contender))
    grads = {name: gradients(x) for name, x in params.items()}
    together, _ = one(tx, params, grads)
    for name, x in params.items():
        assert_same(together[name], one(tx, x, grads[name])[0], off=1e-2)


@TREES.use("stochastic rounding of bfloat16 parameters", applies=takes("stochastic_rounding"))
def rounded(contender: Contender) -> None:
    """Steps that are too small for a parameter's last bit add up in the mean."""
    params = jnp.ones((64, 64), jnp.bfloat16)
    tx = contender(stochastic_rounding=True, **({} if contender.ternary else {"learning_rate": 1e-4}))
    grads, state, after = jnp.linspace(-1, 1, 64).astype(jnp.bfloat16) * jnp.ones((64, 1), jnp.bfloat16), None, params
    for _ in range(3):
        after, state = one(tx, after, grads, state)
    assert after.dtype == jnp.bfloat16
    assert float(after[:, 32:].astype("float32").mean()) < float(after[:, :32].astype("float32").mean())


@TREES.use("bfloat16 gradients of float32 parameters, and the reverse")
def other_dtype(contender: Contender) -> None:
    """Parameters move and keep their dtype."""
    for dtype, of in (("float32", "bfloat16"), ("bfloat16", "float32")):
        params = parameters(contender, dtype)
        grads = jax.tree.map(lambda g, of=of: g.astype(of), gradients(params))
        assert_moved(one(contender(), params, grads)[0], params)


@TREES.use(
    "complex parameters",
    reasons={EVERYONE: "Signs of complex numbers mean other things; use `optax.contrib.split_real_and_imaginary`."},
)
def complex_numbers(contender: Contender) -> None:
    """They move."""
    params = jnp.ones(3, jnp.complex64)
    assert_moved(one(contender(), params, (1 + 1j) * params)[0], params)


@TREES.use("complex parameters, by `contrib.split_real_and_imaginary`")
def split(contender: Contender) -> None:
    """They move."""
    params = (1 + 1j) * jnp.ones((3, 2), jnp.complex64)
    grads = (1 + 1j) * jnp.arange(1.0, 7.0).reshape(3, 2).astype(jnp.complex64) * jnp.array([-1.0, 1.0])
    tx = optax.contrib.split_real_and_imaginary(contender())
    assert_moved(one(tx, params, grads)[0], params) if not contender.ternary else one(tx, params, grads)


@TREES.use("moments in int8 and int4", applies=takes("momentum_dtype"))
def fewer_bits(contender: Contender) -> None:
    """Parameters move."""
    params = parameters(contender)
    for code in ("int8", "int4"):
        assert_moved(run(contender(momentum_dtype=code), params, 2)[0], params)


@TREES.use("gradients that are not finite")
def not_finite(contender: Contender) -> None:
    """A NaN shows in the leaf that has it, and in no other."""
    params = parameters(contender)
    grads = gradients(params)
    after, _ = one(contender(), params, {**grads, "kernel": grads["kernel"] * jnp.nan})
    assert bool(jnp.isfinite(after["bias"]).all())


@TREES.use("rules by names: `mask` of the decay", applies=takes("mask"))
def decay_mask(contender: Contender) -> None:
    """What is masked does not decay: of a gradient of 0 it does not move."""
    params = parameters(contender)
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = contender(weight_decay=0.1, mask={"bias": False, "kernel": True})
    after, _ = one(tx, params, zero)
    assert_same(after["bias"], params["bias"])
    assert bool((after["kernel"] != params["kernel"]).any())
