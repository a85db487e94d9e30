"""A small convolutional network with Flax nnx: at least 97% of handwritten digits that it has not seen.

python examples/flax_nnx.py --optimizer fusedbunw
"""

import argparse

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fusedbun_jax import fusedbunw

OPTIMIZERS = {"adamw": optax.adamw, "fusedbunw": fusedbunw}
parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
make = OPTIMIZERS[parser.parse_args().optimizer]

digits = load_digits()
images = (digits.images[..., None] / 8 - 1).astype(np.float32)  # 8 x 8 of one channel, in [-1, 1]
train, test, train_labels, test_labels = train_test_split(images, digits.target, test_size=0.3, random_state=0)

rngs = nnx.Rngs(0)
convolution, head = nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.Linear(4 * 4 * 16, 10, rngs=rngs)
model = nnx.Sequential(convolution, nnx.relu, lambda x: nnx.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1), head)
tx = make(2e-3, weight_decay=0.1)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, images, labels):
    """One step on a batch."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


for epoch in range(20):
    order = np.random.default_rng(epoch).permutation(len(train))
    for batch in order[:1248].reshape(39, 32):
        step(model, optimizer, train[batch], train_labels[batch])
print(f"test accuracy {(model(test).argmax(1) == test_labels).mean():.2%}")
