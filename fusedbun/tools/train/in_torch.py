"""The network in torch, and its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedbun.tools.train.network import LAYERS, STRIDES, Array, Images, Score, Weights
from fusedbun.tools.train.optimizers import Entry


class Network(nn.Module):
    """The network that `LAYERS` describes."""

    def __init__(self) -> None:
        super().__init__()
        for name, (outs, ins, *kernel) in LAYERS.items():
            layer = nn.Conv2d(ins, outs, kernel[0], STRIDES[name], padding=1) if kernel else nn.Linear(ins, outs)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, 10)."""
        for name, layer in self.named_children():
            if name == "hidden":
                x = x.permute(0, 2, 3, 1).flatten(1)  # in Flax's order, so that it is Flax's kernel, transposed
            x = layer(x) if name == "output" else functional.relu(layer(x))
        return x


class Trainer:
    """Trains the network from its initial weights, in float32 or float64, with a learning rate for every step."""

    def __init__(self, entry: Entry, weights: Weights, learning_rates: Array, dtype: str) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._network = Network().to(self._dtype)
        self._network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        self._learning_rates = iter(learning_rates.tolist())
        self._optimizer = entry.in_torch(self._network.named_parameters(), learning_rates[0])

    def step(self, batch: Images) -> float:
        """One step on a batch; returns the loss before it."""
        (group,) = self._optimizer.param_groups
        group["lr"] = next(self._learning_rates)
        self._optimizer.zero_grad()
        logits, labels = self._predict(batch)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._optimizer.step()
        return loss.item()

    def evaluate(self, images: Images) -> Score:
        """How well the network does on images."""
        with torch.no_grad():
            logits, labels = self._predict(images)
            right = (logits.argmax(1) == labels).sum()
            return Score(int(right) / len(labels), functional.cross_entropy(logits, labels).item())

    def weights(self) -> Weights:
        """The weights as they are now."""
        return {name: value.double().numpy().copy() for name, value in self._network.state_dict().items()}

    def state_bytes(self) -> int:
        states = self._optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def _predict(self, images: Images) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images.pixels).to(self._dtype)
        return self._network(pixels.permute(0, 3, 1, 2)), torch.from_numpy(images.labels)


@contextmanager
def session(dtype: str) -> Iterator[None]:
    """Torch set up for this network: on one thread, for its operations are too small to be shared out."""
    del dtype  # torch computes in float64 as it is
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
