"""optax's wrappers around every factory, in nnx.Optimizer and linen's TrainState: they compute what they do alone."""

from itertools import product

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from factories import FACTORIES, described, gradients, jitted, representative_descending, stepper
from flax import nnx
from flax.training.train_state import TrainState
from sweeps import sweep

import fusedbun_jax as fj


def every_other(step, **_):
    return step % 2 == 0


def is_matrix(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, every_other),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, every_other),
    "masked": lambda tx: optax.masked(tx, is_matrix),
    "partition": lambda tx: optax.partition({True: tx, False: optax.sgd(0.5)}, is_matrix),
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("ours", tx)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "flatten": optax.flatten,
    "with_metrics": fj.with_metrics,
}
OF_EACH_KIND = ["recommended", "sm3-momentum", "mup_adamw", "ternary_vote"]
FEW = {
    ("recommended", "MultiSteps", "nnx"),
    ("recommended", "partition", "nnx"),
    ("mup_adamw", "schedule_free", "nnx"),
    ("sm3-momentum", "conditionally_mask", "linen"),
    ("ternary_vote", "masked", "nnx"),
}


class Layer(nnx.Module):
    def __init__(self, params):
        for name, x in params.items():
            setattr(self, name, nnx.Param(x))


class Model(nnx.Module):
    def __init__(self, params):
        self.layer = Layer(params["layer"])


def in_nnx(tx, params, steps):
    model = Model(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, grads):
        def loss(model):
            products = jax.tree.map(jnp.vdot, nnx.to_pure_dict(nnx.state(model, nnx.Param)), grads)
            return sum(jax.tree.leaves(products))

        optimizer.update(model, nnx.grad(loss)(model))

    before = described(nnx.as_pure(optimizer.opt_state))
    for i in range(steps):
        step(model, optimizer, gradients(params, i))
    assert described(nnx.as_pure(optimizer.opt_state)) == before
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)


def in_linen(tx, params, steps):
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for i in range(steps):
        before = described(state.opt_state)
        state = step(state, gradients(params, i))
        assert described(state.opt_state) == before
    return state.params, state.opt_state


@sweep(
    ("name", "wrapper", "framework"),
    [*product(FACTORIES, WRAPPERS, ["nnx"]), *product(OF_EACH_KIND, WRAPPERS, ["linen"])],
    short=lambda *case: case in FEW,
)
def test_it_computes_what_plain_optax_does(name, wrapper, framework):
    factory, steps = FACTORIES[name], 4
    tx, params = WRAPPERS[wrapper](factory()), factory.parameters()
    got, got_state = (in_linen if framework == "linen" else in_nnx)(tx, params, steps)
    step, want, state = jax.jit(stepper(tx)), params, tx.init(params)
    for i in range(steps):
        want, state = step(want, state, gradients(params, i))
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-6)
    pairs = zip(jax.tree.leaves(got_state), jax.tree.leaves(state), strict=True)
    for x, y in pairs:
        chex.assert_trees_all_close(x, y, rtol=2e-5, atol=1e-5)
    assert any(jnp.any(x != y) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True))


@representative_descending
def test_a_step_that_is_left_out_leaves_the_state(factory):
    tx, params = optax.conditionally_mask(factory(), every_other), factory.parameters()
    got, alone = (params, tx.init(params)), (params, factory().init(params))
    for i in range(4):
        grads = gradients(params, i)
        got = jitted(tx)(*got, grads)
        alone = alone if i % 2 else jitted(factory())(*alone, grads)
        chex.assert_trees_all_close((got[0], got[1].inner_state), alone, rtol=1e-5, atol=1e-7)


@representative_descending
def test_lookahead_steps_its_fast_parameters(factory):
    tx, params = optax.lookahead(factory(), sync_period=2, slow_step_size=0.5), factory.parameters()
    both = optax.LookaheadParams.init_synced(params)
    state, slow, alone = tx.init(both), params, (params, factory().init(params))
    for i in range(4):
        grads = gradients(params, i)
        updates, state = jax.jit(tx.update)(grads, state, both)
        both = optax.apply_updates(both, updates)
        fast, inner = jitted(factory())(*alone, grads)
        if i % 2:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
        alone = fast, inner
        chex.assert_trees_all_close((both.fast, both.slow), (fast, slow), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_map_params_goes_through(wrapper):
    if wrapper in ("flatten", "with_metrics"):
        pytest.skip("its state follows from the parameters that it is made for")
    params = FACTORIES["recommended"].parameters()
    tx = WRAPPERS[wrapper](FACTORIES["recommended"]())
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: "array", state, transform_non_params=lambda x: "other")
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    kinds = {jax.tree_util.keystr(path): kind for path, kind in jax.tree.leaves_with_path(mapped)}
    assert {kind for path, kind in kinds.items() if "['kernel']" in path} == {"array"}
    assert {kind for path, kind in kinds.items() if "kernel" not in path and "bias" not in path} <= {"other"}
