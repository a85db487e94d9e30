"""Optax's wrappers, all at once: at least 95% of handwritten digits that it has not seen.

Gradients are accumulated and clipped, the rate is injected, biases have another optimizer, the weights are averaged.
"""

import jax
import numpy as np
import optax
from flax import linen
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusedbun_jax import fusedbunw

digits = load_digits()
pixels = (digits.data / 8 - 1).astype(np.float32)  # in [-1, 1]
train, test, train_labels, test_labels = train_test_split(pixels, digits.target, test_size=0.3, random_state=0)
model = linen.Sequential([linen.Dense(128), linen.relu, linen.Dense(10)])
params = model.init(jax.random.key(0), train[:1])
rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 40, 390)
ours = optax.inject_hyperparams(fusedbunw)(rate, weight_decay=0.1)
by_axes = optax.partition({1: optax.adam(rate), 2: ours}, lambda params: jax.tree.map(np.ndim, params))
tx = optax.MultiSteps(optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), by_axes), 5), 2)


@jax.jit
def step(params, state, mean, x, y):
    """The parameters, the optimizer's state and the running mean after a batch of pixels `x` and labels `y`."""
    grads = jax.grad(lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, x), y).mean())(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, optax.incremental_update(params, mean, 0.02)


state, mean = tx.init(params), params
for epoch in range(20):
    for batch in np.random.default_rng(epoch).permutation(len(train))[:1248].reshape(39, 32):
        params, state, mean = step(params, state, mean, train[batch], train_labels[batch])
print(f"test accuracy {(model.apply(mean, test).argmax(1) == test_labels).mean():.2%}")
