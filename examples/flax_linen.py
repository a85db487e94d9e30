"""A small network with Flax linen and its TrainState: at least 95% of handwritten digits that it has not seen.

python examples/flax_linen.py --optimizer fusedbunw
"""

import argparse

import jax
import numpy as np
import optax
from flax import linen
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusedbun_jax import fusedbunw

OPTIMIZERS = {"adamw": optax.adamw, "fusedbunw": fusedbunw}
parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
make = OPTIMIZERS[parser.parse_args().optimizer]

digits = load_digits()
pixels = (digits.data / 8 - 1).astype(np.float32)  # in [-1, 1]
train, test, train_labels, test_labels = train_test_split(pixels, digits.target, test_size=0.3, random_state=0)

model = linen.Sequential([linen.Dense(128), linen.relu, linen.Dense(10)])
tx = make(2e-3, weight_decay=0.1)
state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), train[:1])["params"], tx=tx)


@jax.jit
def step(state, inputs, labels):
    """The state after one step on a batch."""

    def loss(params):
        logits = state.apply_fn({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


for epoch in range(20):
    order = np.random.default_rng(epoch).permutation(len(train))
    for batch in order[:1248].reshape(39, 32):
        state = step(state, train[batch], train_labels[batch])
print(f"test accuracy {(model.apply({'params': state.params}, test).argmax(1) == test_labels).mean():.2%}")
