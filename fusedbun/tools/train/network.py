"""The data and the network that every framework trains on: shapes, initial weights and batches, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]  # by torch's names, `<layer>.weight` and `<layer>.bias`, in torch's layouts

# Two 3x3 convolutions, the second with stride 2 (8x8 pixels to 4x4), and two dense layers, with ReLU between them.
LAYERS = {"conv1": (16, 1, 3, 3), "conv2": (32, 16, 3, 3), "hidden": (64, 32 * 4 * 4), "output": (10, 64)}
STRIDES = {"conv1": 1, "conv2": 2}


class Images(NamedTuple):
    """Images with their labels, and the batches made of them: (n, 8, 8, 1) in [0, 1], and (n,)."""

    pixels: Array
    labels: NDArray[np.int64]


class Score(NamedTuple):
    """How well a network does on images: the share it gets right, and the mean cross-entropy."""

    accuracy: float
    loss: float


def digits(seed: int, shares: Sequence[float]) -> list[Images]:
    """Scikit-learn's digits, shuffled and cut into parts of these shares and a last one with the rest."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, labels = data.images[..., None] / 16, data.target
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    cuts = np.rint(np.cumsum(shares) * len(labels)).astype(int)
    return [Images(pixels[part], labels[part]) for part in np.split(order, cuts)]


def initial_weights(seed: int) -> Weights:
    """He et al.'s initialisation (arXiv 1502.01852): normal, of variance 2 / fan-in; biases zero."""
    generator = np.random.default_rng([seed, 1])
    weights = {}
    for layer, shape in LAYERS.items():
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        weights[f"{layer}.weight"] = deviation * generator.standard_normal(shape)
        weights[f"{layer}.bias"] = np.zeros(shape[0])
    return weights


def batches(images: Images, batch_size: int, epochs: int, seed: int) -> Iterator[Images]:
    """Every epoch's images in a new order, cut into batches of one size; the few that are left over wait."""
    generator = np.random.default_rng([seed, 2])
    for _ in range(epochs):
        order = generator.permutation(len(images.labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            yield Images(images.pixels[batch], images.labels[batch])


def cosine(learning_rate: float, steps: int) -> Array:
    """The learning rate of every step, falling from `learning_rate` to zero (Loshchilov, Hutter, arXiv 1608.03983)."""
    return learning_rate * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
