"""Flax: nnx and linen train with it, and `flax_channel_axis` finds the output channels of their parameters."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import RECOMMENDED, gradients, over, run, stepper
from flax import nnx
from flax.training.train_state import TrainState

import fusedbun_jax
from fusedbun_jax import flax_channel_axis, fusedbun

X = np.random.default_rng(5).standard_normal((16, 5)).astype(np.float32)
Y = (X[:, :1] * X[:, 1:2] > 0).astype(np.float32)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


def nnx_loss(model):
    return jnp.mean((model(X) - Y) ** 2)


@over(["recommended", "sm3-momentum", "mup_adamw"], ["recommended"])
def test_nnx_trains(factory):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, factory(factory.learning_rate / 5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(nnx_loss)(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_nnx_equals_plain_optax():
    tx = fusedbun(0.02, channel_axis=flax_channel_axis, **RECOMMENDED)
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    step, state = jax.jit(stepper(tx)), tx.init(params)

    @nnx.jit
    def by_nnx(optimizer, model):
        grads = nnx.grad(nnx_loss)(model)
        optimizer.update(model, grads)
        return nnx.to_pure_dict(grads)

    for _ in range(2):
        params, state = step(params, state, by_nnx(optimizer, model))
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, rtol=1e-6)


@over(["recommended", "sm3-momentum", "mup_adamw"], ["recommended"])
def test_linen_trains(factory):
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.LayerNorm()(nn.Dense(16)(x))))

    model = Linen()
    params = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=factory(factory.learning_rate / 5))

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn(p, X) - Y) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(loss)
    assert losses[-1] < 0.7 * losses[0]
    assert state.step == 30


class LinenZoo(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 8, name="embed")(tokens)  # (batch, time, 8)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.RNN(nn.LSTMCell(6), name="lstm")(x)
        x = nn.Conv(3, (2,), name="conv")(x)
        return nn.Dense(4, name="dense")(x)


class NnxZoo(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.lstm = nnx.LSTMCell(8, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 3, (2, 2), rngs=rngs)
        self.dense = nnx.Linear(3, 4, rngs=rngs)


def linen_parameters():
    variables = jax.eval_shape(LinenZoo().init, jax.random.key(0), jnp.zeros((1, 3), int))
    return gradients(variables["params"], 7)


def nnx_parameters():
    return gradients(nnx.eval_shape(lambda: nnx.state(NnxZoo(nnx.Rngs(0)), nnx.Param)), 7)


@pytest.mark.parametrize("make", [linen_parameters, nnx_parameters])
def test_the_rule_keeps_the_output_channels(make):
    """The axis of (vocabulary, width), (in, out), (…, in, out); of attention's (in, heads, width) the width.

    An attention's biases (heads, width) have two axes as well, and keep the heads.
    """
    params = make()
    tx = fusedbun_jax.centralize(flax_channel_axis)
    updates, _ = jax.jit(tx.update)(gradients(params), tx.init(params), params)
    centred = {}
    for path, u in jax.tree.leaves_with_path(updates):
        u = np.asarray(u)
        name = ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path).removesuffix(".value")
        axes = [
            i
            for i in range(u.ndim)
            if np.allclose(u.mean(axis=tuple(j for j in range(u.ndim) if j != i)), 0, atol=1e-6)
        ]
        centred[name] = (u.ndim, axes)
    assert centred["embed.embedding"] == (2, [0])
    assert centred["dense.kernel"] == (2, [1])
    assert centred["conv.kernel"] == ((3, [2]) if make is linen_parameters else (4, [3]))
    for part in ("query", "key", "value", "out"):
        assert centred[f"attention.{part}.kernel"] == (3, [2])
    assert centred["attention.query.bias"] == (2, [0])
    lstm = [found for name, found in centred.items() if "lstm" in name or "LSTM" in name]
    assert len(lstm) == 12
    assert set(map(str, lstm)) == {"(2, [1])", "(1, [])"}
    assert centred["norm.scale"] == centred["dense.bias"] == (1, [])


def test_a_network_trains_to_the_same_weights_whichever_way_its_kernels_lie(x64):
    """(in, out) with the rule, and (out, in) without it; (height, width, in, out) and (out, in, height, width)."""
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (3, 4), "bias": (4,)}, "conv": {"kernel": (2, 2, 3, 5), "bias": (5,)}}

    def is_shape(x):
        return isinstance(x, tuple)

    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s)), shapes, is_leaf=is_shape)
    steps = [jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s)), shapes, is_leaf=is_shape) for _ in range(3)]

    def to_torch(tree):
        order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
        return jax.tree.map(lambda x: x.transpose(order[x.ndim]), tree)

    def train(tx, params, steps):
        step, state = jax.jit(stepper(tx)), tx.init(params)
        for grads in steps:
            params, state = step(params, state, grads)
        return params

    ours = train(fusedbun(0.1, channel_axis=flax_channel_axis, clip_rms=1.0, **RECOMMENDED), params, steps)
    theirs = train(fusedbun(0.1, clip_rms=1.0, **RECOMMENDED), to_torch(params), list(map(to_torch, steps)))
    chex.assert_trees_all_close(to_torch(ours), theirs, rtol=1e-12)
    without = train(fusedbun(0.1, clip_rms=1.0, **RECOMMENDED), params, steps)
    assert not np.allclose(without["dense"]["kernel"], ours["dense"]["kernel"], rtol=1e-3)


def test_a_rule_is_asked_with_the_names_that_lead_to_a_leaf():
    asked = {}

    def rule(path, param):
        asked[path] = param.shape
        return 0

    params = {"a": [jnp.ones((2, 3))], "b": nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)}
    tx = fusedbun(0.1, centralize=True, channel_axis=rule)
    jax.eval_shape(tx.init, params)
    once = dict(asked)
    assert once == {("a", "0"): (2, 3), ("b", "kernel"): (3, 4), ("b", "bias"): (4,)}
    asked.clear()
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert asked == once


def test_a_rule_chooses_leaf_by_leaf():
    params = {"first": jnp.ones((3, 4)), "last": jnp.ones((3, 4))}
    tx = fusedbun_jax.centralize(lambda path, param: 0 if path == ("first",) else -1)
    updates, _ = tx.update(gradients(params), tx.init(params), params)
    np.testing.assert_allclose(updates["first"].mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(updates["last"].mean(axis=0), 0, atol=1e-6)
    assert abs(updates["first"].mean(axis=0)).max() > 0.01


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_the_rule_sees_the_same_names_inside_a_wrapper(wrap):
    params = {name: p for name, p in linen_parameters().items() if name in ("embed", "conv", "dense")}
    tx = fusedbun(0.1, channel_axis=flax_channel_axis, **RECOMMENDED)
    labels = {name: "rest" if name == "embed" else "ours" for name in params}
    if wrap == "masked":
        wrapped = optax.masked(tx, {name: label == "ours" for name, label in labels.items()})
    else:
        wrapped = optax.partition({"ours": tx, "rest": optax.set_to_zero()}, labels)
    got, expected = run(wrapped, params, 1)[0], run(tx, params, 1)[0]
    del got["embed"], expected["embed"]
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
