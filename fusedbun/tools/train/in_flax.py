"""The network in Flax, and its training. Linen, because its parameters are a plain tree, which is what optax steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from fusedbun.tools.train.network import LAYERS, STRIDES, Array, Images, Score, Weights
from fusedbun.tools.train.optimizers import Entry

Params = dict[str, dict[str, jax.Array]]


class Network(linen.Module):
    """The network that `LAYERS` describes."""

    dtype: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (n, 8, 8, 1) to logits (n, 10)."""
        for name, (outputs, _, *kernel) in LAYERS.items():
            if name in STRIDES:
                x = linen.Conv(outputs, kernel, STRIDES[name], padding=1, dtype=self.dtype, name=name)(x)
            else:
                x = linen.Dense(outputs, dtype=self.dtype, name=name)(x.reshape(len(x), -1))
            x = x if name == "output" else linen.relu(x)
        return x


class Trainer:
    """Trains the network as torch's does; in float64 inside `session("float64")` alone."""

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
        self._params = {
            layer: {
                "kernel": jnp.asarray(np.moveaxis(weights[f"{layer}.weight"], (0, 1), (-1, -2)), dtype),
                "bias": jnp.asarray(weights[f"{layer}.bias"], dtype),
            }
            for layer in LAYERS
        }
        self._state = optimizer.init(self._params)

    def step(self, batch: Images) -> float:
        self._params, self._state, loss = jax.block_until_ready(self._step(self._params, self._state, *batch))
        return float(loss)

    def evaluate(self, images: Images) -> Score:
        right, loss = self._evaluate(self._params, *images)
        return Score(int(right) / len(images.labels), float(loss))

    def weights(self) -> Weights:
        """The weights as they are now, in torch's layout: (out, in, …), where Flax's is (…, in, out)."""
        found = {}
        for layer, leaves in self._params.items():
            kernel, bias = (np.asarray(leaves[name], np.float64) for name in ("kernel", "bias"))
            found[f"{layer}.weight"], found[f"{layer}.bias"] = np.moveaxis(kernel, (-1, -2), (0, 1)), bias
        return found

    def state_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))


def session(dtype: str) -> Any:
    """JAX set up for this network: with float64, where that is asked for."""
    return jax.enable_x64(dtype == "float64")
