"""Pairs of what people put around an optimizer, drawn at random, with every factory and code, on digits."""

import random
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from sweeps import long

import fusedbun_jax as fj
from fusedbun.recipes import RECIPES
from fusedbun.storage.codes import MOMENTS
from fusedbun.tools.train.network import batches, digits
from fusedbun.tools.train.optimizers import OPTIMIZERS

COUNT, STEPS = 100, 24


@cache
def data():
    (images, _) = digits(0, [0.5])
    found = [*batches(images, 64, 3, 0)][:STEPS]
    return jnp.asarray([x.reshape(64, -1) for x, _ in found], jnp.float32), jnp.asarray([y for _, y in found])


def loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


# ---- transformations around it


def clipped(make, lr):
    return optax.chain(optax.clip_by_global_norm(1.0), make(lr))


def accumulated(make, lr):
    return optax.MultiSteps(make(lr), 2)


def if_finite(make, lr):
    return optax.apply_if_finite(make(lr), 3)


def masked(make, lr):
    matrices, vectors = (partial(jax.tree.map, lambda p, ndim=ndim: p.ndim == ndim) for ndim in (2, 1))
    return optax.chain(optax.masked(make(lr), matrices), optax.masked(optax.set_to_zero(), vectors))


def partitioned(make, lr):
    labels = partial(jax.tree.map, lambda p: "matrix" if p.ndim > 1 else "vector")
    return optax.partition({"matrix": make(lr), "vector": make(lr / 2)}, labels)


def flattened(make, lr):
    return optax.flatten(make(lr))


def injected(make, lr):
    return optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(lr)  # or bfloat16's rounds betas to 1


def scheduled(make, lr):
    return make(optax.warmup_cosine_decay_schedule(0.0, lr, 4, STEPS))


def conditional(make, lr):
    return optax.transforms.conditionally_mask(make(lr), lambda step, *_, **__: step % 8 != 7)


def frozen_and_trained(make, lr):
    labels = partial(jax.tree_util.tree_map_with_path, lambda path, p: "no" if "first" in str(path) else "yes")
    return optax.partition({"yes": make(lr), "no": optax.set_to_zero()}, labels)


def plain(make, lr):
    return make(lr)


WRAPPERS = (clipped, accumulated, if_finite, masked, partitioned, flattened, injected, scheduled, conditional)
WRAPPERS += (frozen_and_trained,)

# ---- loops


class Network(linen.Module):
    param_dtype: str = "float32"

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(32, param_dtype=self.param_dtype, name="first")(x))
        return linen.Dense(10, param_dtype=self.param_dtype, name="second")(x)


def with_train_state(tx, dtype):
    network = Network(dtype)
    params = network.init(jax.random.key(0), data()[0][0])["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    @jax.jit
    def step(state, x, y):
        value, grads = jax.value_and_grad(lambda p: loss(state.apply_fn({"params": p}, x), y))(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for x, y in zip(*data(), strict=True):
        state, value = step(state, x, y)
        losses.append(float(value))
    return losses


def under_scan(tx, dtype):
    network = Network(dtype)
    params = network.init(jax.random.key(0), data()[0][0])["params"]

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: loss(network.apply({"params": p}, batch[0]), batch[1]))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), data())[1])().tolist()


def with_nnx(tx, dtype):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(64, 32, param_dtype=dtype, rngs=rngs)
            self.second = nnx.Linear(32, 10, param_dtype=dtype, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(lambda model: loss(model(x), y))(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer, x, y)) for x, y in zip(*data(), strict=True)]


def ensemble(tx, dtype):
    """Two members, whose losses are averaged."""
    network = Network(dtype)
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.vmap(lambda key: network.init(key, data()[0][0])["params"])(keys)
    state = jax.vmap(tx.init)(params)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None, None))
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(lambda p: loss(network.apply({"params": p}, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for x, y in zip(*data(), strict=True):
        params, state, values = step(params, state, x, y)
        losses.append(float(values.mean()))
    return losses


LOOPS = (with_train_state, under_scan, with_nnx, ensemble)


def drawn(seed):
    """Two transformations around it or one, a loop, a factory, and how it is set up."""
    generator = random.Random(seed)
    pair = generator.sample(WRAPPERS, 2)
    if injected in pair or scheduled in pair:  # which make the optimizer, so they are inside
        pair = [pair[0] if pair[0] not in (injected, scheduled) else plain, injected if injected in pair else scheduled]
    name = generator.choice([name for name in OPTIMIZERS if name in RECIPES])
    codes = [None, *MOMENTS] if "momentum_dtype" in RECIPES[name].defaults else [None]
    codes = [code for code in codes if (name, code) != ("decoupled_lionw", "int4")]  # refused: its sign needs more
    settings = {"momentum_dtype": code} if (code := generator.choice(codes)) else {}
    dtype = generator.choice(["float32", "float32", "bfloat16"])
    if dtype == "bfloat16" and generator.random() < 0.5 and conditional not in pair:
        settings["stochastic_rounding"] = True  # whose updates are float32: `cond` takes the gradients' dtype alone
    return pair, generator.choice(LOOPS), name, settings, dtype


def of_network(name):
    """What a factory is told of the network."""
    defaults = RECIPES[name].defaults
    types = {"mup": lambda path, p: "weight" if p.ndim > 1 else "bias"} if "mup" in defaults else {}
    return types | ({"channel_axis": fj.flax_channel_axis} if "channel_axis" in defaults else {})


def train(pair, loop, make, lr, dtype):
    outer, inner = pair
    losses = loop(outer(lambda rate: inner(make, rate), lr), dtype)
    return np.mean(losses[:3]), np.mean(losses[-3:])


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n in (0, 50) else long) for n in range(COUNT)])
@pytest.mark.filterwarnings("ignore")
def test_what_works_with_adamw_works_with_ours(seed):
    """Where it raises, AdamW in the same place does too; where it trains, the loss falls."""
    pair, loop, name, settings, dtype = drawn(seed)
    entry, adamw = OPTIMIZERS[name], OPTIMIZERS["adamw"]
    make = partial(getattr(fj, name), **{**entry.settings, **of_network(name), **settings})
    try:
        first, last = train(pair, loop, make, entry.learning_rate, dtype)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is
            train(pair, loop, optax.adamw, adamw.learning_rate, dtype)
        return
    assert last < first, (pair, loop, name, settings)
