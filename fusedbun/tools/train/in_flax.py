"""The network in Flax, and its training. Linen, because its parameters are a plain tree, which is what optax steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from fusedbun.tools.train.network import LAYERS, Array, Images, Score, Weights
from fusedbun.tools.train.optimizers import Entry

Params = dict[str, dict[str, jax.Array]]


class Network(linen.Module):
    """The network that `LAYERS` describes."""

    dtype: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (n, 8, 8, 1) to logits (n, 10)."""
        x = linen.relu(self._convolution("conv1")(x))
        x = linen.relu(self._convolution("conv2", stride=2)(x))
        x = x.reshape(len(x), -1)
        x = linen.relu(self._dense("hidden")(x))
        return self._dense("output")(x)

    def _convolution(self, layer: str, stride: int = 1) -> linen.Conv:
        channels, _, *kernel = LAYERS[layer]
        return linen.Conv(channels, kernel, stride, padding=1, dtype=self.dtype, name=layer)

    def _dense(self, layer: str) -> linen.Dense:
        return linen.Dense(LAYERS[layer][0], dtype=self.dtype, name=layer)


class Trainer:
    """Trains the network from its initial weights, with a learning rate for every step.

    Weights and arithmetic are float32, or float64 inside `session("float64")`.
    """

    def __init__(self, entry: Entry, weights: Weights, learning_rates: Array, dtype: str) -> None:
        network = Network(dtype)
        optimizer = entry.in_optax(lambda count: jnp.asarray(learning_rates, dtype)[count])

        def loss_and_logits(params: Params, pixels: Array, labels: Array) -> tuple[jax.Array, jax.Array]:
            # flax: `apply` may also give what a module has changed
            logits: jax.Array = network.apply({"params": params}, pixels)  # type: ignore[assignment]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        @jax.jit
        def step(params: Params, state: Any, pixels: Array, labels: Array) -> tuple[Params, Any, jax.Array]:
            (loss, _), gradients = jax.value_and_grad(loss_and_logits, has_aux=True)(params, pixels, labels)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        @jax.jit
        def evaluate(params: Params, pixels: Array, labels: Array) -> tuple[jax.Array, jax.Array]:
            loss, logits = loss_and_logits(params, pixels, labels)
            return (logits.argmax(1) == labels).sum(), loss

        self._step, self._evaluate = step, evaluate
        self._params = jax.tree.map(lambda value: jnp.asarray(value, dtype), _to_flax(weights))
        self._state = optimizer.init(self._params)

    def step(self, batch: Images) -> float:
        """One step on a batch; returns the loss before it."""
        done = jax.block_until_ready(self._step(self._params, self._state, *batch))
        self._params, self._state, loss = done
        return float(loss)

    def evaluate(self, images: Images) -> Score:
        """How well the network does on images."""
        right, loss = self._evaluate(self._params, *images)
        return Score(int(right) / len(images.labels), float(loss))

    def weights(self) -> Weights:
        """The weights as they are now, in torch's layouts."""
        return _to_torch(self._params)

    def state_bytes(self) -> int:
        """The bytes of the optimizer's state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))


def session(dtype: str) -> Any:
    """JAX set up for this network: with float64, where that is asked for."""
    return jax.enable_x64(dtype == "float64")


def _to_flax(weights: Weights) -> dict[str, dict[str, Array]]:
    """Torch's (out, in, …) as Flax's (…, in, out)."""
    return {
        layer: {"kernel": np.moveaxis(weights[f"{layer}.weight"], (0, 1), (-1, -2)), "bias": weights[f"{layer}.bias"]}
        for layer in LAYERS
    }


def _to_torch(params: Params) -> Weights:
    weights = {}
    for layer, leaves in params.items():
        kernel, bias = (np.asarray(leaves[name], np.float64) for name in ("kernel", "bias"))
        weights[f"{layer}.weight"] = np.moveaxis(kernel, (-1, -2), (0, 1))
        weights[f"{layer}.bias"] = bias
    return weights
