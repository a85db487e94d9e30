"""JAX: state that is looked at, saved and loaded, and the libraries that train."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import fusedbun_jax
from benchmarks.behaviour.in_jax import (
    RATE,
    assert_moved,
    assert_same,
    gradients,
    one,
    parameters,
    run,
)
from benchmarks.behaviour.jax_wrappers import FIXED
from benchmarks.behaviour.uses import Contender, Part, is_ours

STATE = Part("State")
FLAX = Part("Flax")


def resumed(contender: Contender, through: Callable[[Any, Any], Any]) -> None:
    """A run goes through something in its middle, which is given the state and one that is new."""
    params = parameters(contender)
    middle, state = run(contender(), params, 2)
    restored = jax.tree.map(jnp.asarray, through((middle, state), (params, contender().init(params))))
    wanted = run(contender(), middle, range(2, 4), state)
    assert_same(run(contender(), restored[0], range(2, 4), restored[1]), wanted)


@STATE.use("`flax.serialization`")
def by_flax(contender: Contender) -> None:
    """A run that is saved and restored in its middle ends the same to the bit, state included."""
    resumed(contender, lambda kept, new: flax.serialization.from_bytes(new, flax.serialization.to_bytes(kept)))


@STATE.use("Orbax")
def by_orbax(contender: Contender) -> None:
    """A run that is saved and restored in its middle ends the same to the bit, state included."""

    def through(kept: Any, new: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "state", kept)
            checkpointer.wait_until_finished()
            return checkpointer.restore(Path(folder) / "state", jax.eval_shape(lambda: new))

    resumed(contender, through)


@STATE.use("`pickle`, `copy.deepcopy`")
def by_pickle(contender: Contender) -> None:
    """A run whose state goes through both in its middle ends the same to the bit."""
    resumed(contender, lambda kept, _: copy.deepcopy(pickle.loads(pickle.dumps(kept))))


@STATE.use("`save_state`, `load_state`", applies=is_ours)
def own_file(contender: Contender) -> None:
    """A run that is saved and restored in its middle ends the same to the bit, state included."""

    def through(kept: Any, new: Any) -> Any:
        params, state = kept
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            fusedbun_jax.save_state(path, contender(), state, params)
            return params, fusedbun_jax.load_state(path, contender(), new[1], params)

    resumed(contender, through)


@STATE.use("`optax.tree_map_params`")
def mapped(contender: Contender) -> None:
    """The state's arrays of parameters are visited, and nothing else: the structure stays."""
    params = parameters(contender)
    state = contender().init(params)
    found = optax.tree_map_params(contender(), lambda x: x + 1, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)


@STATE.use("`optax.tree_utils.tree_get` of the learning rate's count, `tree_set`", reasons=FIXED)
def found(contender: Contender) -> None:
    """A schedule's `count` is found by its name, and can be set."""
    params = parameters(contender)
    schedule = optax.linear_schedule(RATE, 0.0, 10)
    tx = optax.chain(optax.identity(), contender(learning_rate=schedule))
    _, state = run(tx, params, 2)
    counts = [int(x) for _, x in optax.tree_utils.tree_get_all_with_path(state, "count")]
    assert 2 in counts
    state = optax.tree_utils.tree_set(state, count=jnp.int32(10))
    assert all(int(x) == 10 for _, x in optax.tree_utils.tree_get_all_with_path(state, "count"))


@STATE.use("the state's types from step to step")
def stable(contender: Contender) -> None:
    """Structure, shapes, dtypes and weak types of the state are the same before and behind a step."""
    params = parameters(contender)
    before = contender().init(params)
    _, after = one(contender(), params, gradients(params), before)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


@STATE.use("metrics of each step (`with_metrics`)", applies=is_ours)
def metrics(contender: Contender) -> None:
    """Each leaf's norms are recorded, and recording them changes nothing."""
    params = parameters(contender)
    after, state = run(fusedbun_jax.with_metrics(contender()), params)
    assert_same(after, run(contender(), params)[0], off=1e-5)
    assert any("l2_norm" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))


# Flax

INPUTS = jnp.linspace(-1, 1, 30).reshape(5, 6)


def _descends(step: Callable[[], Any], contender: Contender) -> None:
    losses = [float(step()) for _ in range(20)]
    assert all(loss == loss for loss in losses), "the loss is not a number"
    assert contender.ternary or losses[-1] < losses[0], "the loss does not fall"


def _ready(contender: Contender, params: Any) -> Any:
    return jax.tree.map(jnp.sign, params) if contender.ternary else params


def _squares(x: Any) -> Any:
    return jnp.mean((x - 1) ** 2)


@FLAX.use("`nnx.Optimizer`, `nnx.jit`")
def nnx_optimizer(contender: Contender) -> None:
    """The loss falls."""
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
    nnx.update(model, _ready(contender, nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, contender(), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: _squares(model(INPUTS)))(model)
        optimizer.update(model, grads)
        return loss

    _descends(lambda: step(model, optimizer), contender)


@FLAX.use("linen's `TrainState`")
def train_state(contender: Contender) -> None:
    """The loss falls, and the state counts the steps."""
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
    params = _ready(contender, model.init(jax.random.key(0), INPUTS))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=contender())

    @jax.jit
    def step(state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda params: _squares(state.apply_fn(params, INPUTS)))(state.params)
        return state.apply_gradients(grads=grads), loss

    def advance() -> Any:
        nonlocal state
        state, loss = step(state)
        return loss

    _descends(advance, contender)
    assert state.step == 20


@FLAX.use("`nn.scan` over layers")
def scanned_layers(contender: Contender) -> None:
    """Parameters of all layers, which are stacked in one leaf, move."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return jnp.tanh(nn.Dense(6)(x)), None

    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = _ready(contender, layers.init(jax.random.key(0), INPUTS, None))

    @jax.jit
    def step(params: Any) -> Any:
        grads = jax.grad(lambda params: _squares(layers.apply(params, INPUTS, None)[0]))(params)
        return one(contender(), params, grads)[0]

    assert_moved(step(params), params)


@FLAX.use("`FrozenDict`")
def frozen_dict(contender: Contender) -> None:
    """The tree stays frozen, and each leaf moves."""
    params = freeze(parameters(contender))
    assert_moved(one(contender(), params, gradients(params))[0], params)
