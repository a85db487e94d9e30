"""The tasks in JAX, with Flax's networks, the initial weights and the batches of torch; and a run of one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from benchmarks.quality import data, in_torch
from benchmarks.quality.contenders import Contender
from fusedbun.tools.train import in_flax


@dataclass(frozen=True)
class Task:
    """The classification of images.

    Args:
        name: of the workload.
        network: in Flax.
        like: the same network in torch, whose initial weights it gets.
        read: reads the images.
        size: of a batch.
        steps: of a run.
    """

    name: str
    network: linen.Module
    like: Callable[[int], Any]
    read: Callable[[], dict[str, data.Images]]
    size: int
    steps: int


class Perceptron(linen.Module):
    """The network of AlgoPerf's MNIST, with ReLU."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images to logits."""
        x = linen.relu(linen.Dense(128, name="hidden")(x.reshape(len(x), -1)))
        return linen.Dense(10, name="output")(x)


TASKS: dict[str, Callable[[int, int], Task]] = {
    "digits_jax": lambda size, steps: Task(
        "digits_jax", in_flax.Network("float32"), in_torch.convolutional, data.digits, size, steps
    ),
    "mnist_jax": lambda size, steps: Task("mnist_jax", Perceptron(), in_torch.Perceptron, data.mnist, size, steps),
}


def initial(task: Task, seed: int) -> dict[str, dict[str, jax.Array]]:
    """Torch's (out, in, …) as Flax's (…, in, out)."""
    params: dict[str, dict[str, jax.Array]] = {}
    for name, value in task.like(seed).state_dict().items():
        layer, kind = name.split(".")
        moved = np.moveaxis(value.numpy(), (0, 1), (-1, -2)) if kind == "weight" else value.numpy()
        params.setdefault(layer, {})["kernel" if kind == "weight" else kind] = jnp.asarray(moved)
    return params


def score(task: Task, params: Any, images: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The mean cross-entropy of images and the share that is right."""
    logits: Any = task.network.apply({"params": params}, images[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, images[1]).mean()
    return loss, (logits.argmax(1) == images[1]).mean()


@lru_cache(maxsize=1)
def compiled(task: Task, contender: Contender) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """What makes the state, what makes a step, and what tests: for one learning rate and seed after the other."""
    shares = jnp.asarray([in_torch.linear(step, task.steps) for step in range(task.steps)], jnp.float32)

    def optimizer(rate: Any) -> Any:
        return contender.make(lambda count: rate * shares[count])

    def step(params: Any, state: Any, rate: jax.Array, images: Any, batch: jax.Array) -> tuple[Any, Any]:
        gradients = jax.grad(lambda p: score(task, p, (images[0][batch], images[1][batch]))[0])(params)
        updates, state = optimizer(rate).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer(jnp.float32(0)).init, jax.jit(step), jax.jit(lambda params, part: score(task, params, part))


@lru_cache(maxsize=3)
def _on_device(task: Task, part: str) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(task.read()[part].pixels), jnp.asarray(task.read()[part].labels)


def run(task: Task, contender: Contender, lr: float, seed: int, part: str, advance: Callable[[], None]) -> dict:
    """Trains a network, and says how it does on a part of the data; as `in_torch.run`.

    What is compiled first is not counted among the seconds.
    """
    init, step, test = compiled(task, contender)
    params = initial(task, seed)
    state, rate = init(params), jnp.float32(lr)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    images, held_out = _on_device(task, "train"), _on_device(task, part)
    order = list(islice(in_torch.image_order(len(images[1]), task.size, seed), task.steps))
    jax.block_until_ready(step(params, state, rate, images, order[0]))  # compiles
    seconds, curve = 0.0, []
    for last in range(task.steps // in_torch.POINTS, task.steps + 1, task.steps // in_torch.POINTS):
        began = time.process_time()
        for batch in order[last - task.steps // in_torch.POINTS : last]:
            params, state = step(params, state, rate, images, batch)
            advance()
        jax.block_until_ready(params)
        seconds += time.process_time() - began
        if part == "test":
            curve.append([last, _finite(test(params, held_out)[0])])
    loss, accuracy = test(params, held_out)
    return {
        "loss": _finite(loss),
        "accuracy": float(accuracy),
        **({"curve": curve} if part == "test" else {}),
        "seconds": seconds,
        "state_bytes": state_bytes,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }


def _finite(loss: Any) -> float | None:
    return float(loss) if np.isfinite(loss) else None
