"""The tasks in torch, and a run of one of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.memory.training import Block
from benchmarks.quality import data
from benchmarks.quality.contenders import Contender
from fusedbun.tools.train import in_torch
from fusedbun.tools.train.network import initial_weights

POINTS = 20
Batch = tuple[Tensor, ...]


def linear(step: int, steps: int) -> float:
    """A linear rise over a tenth of the steps, and a linear fall to zero over the last half."""
    return min(1.0, (step + 1) / (steps / 10), 2 * (steps - step) / steps)


def cosine(step: int, steps: int) -> float:
    """A linear rise over a tenth of the steps, and a fall to zero along a cosine."""
    rise = steps // 10
    return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        network: makes the network, with weights drawn from a seed; for sparse gradients if that is said.
        batches: the endless batches of a seed.
        parts: what to validate or test on, in pieces of one size, by the part's name.
        loss: the mean loss of a batch, and its accuracy where it has one.
        steps: how many steps a run has.
        share: the share of the learning rate in a step, of all.
        points: how often the loss on the test data is taken in a run that reports it.
    """

    network: Callable[[int, bool], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    parts: Callable[[str], list[Batch]]
    loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor | None]]
    steps: int
    share: Callable[[int, int], float] = linear
    points: int = POINTS


def score(task: Task, network: nn.Module, part: list[Batch]) -> dict[str, float | None]:
    """The mean loss and accuracy, in float32; a loss that is not finite is None."""
    if next(network.parameters()).dtype != torch.float32:
        network = copy.deepcopy(network).float()
    with torch.no_grad():
        found = [task.loss(network, batch) for batch in part]
    loss = float(np.mean([x.item() for x, _ in found]))
    known = [x.item() for _, x in found if x is not None]
    return {"loss": loss if math.isfinite(loss) else None, "accuracy": float(np.mean(known)) if known else None}


def run(task: Task, contender: Contender, lr: float, seed: int, part: str, advance: Callable[[], None]) -> dict:
    """Trains a network, and says how it does on a part of the data; with a curve if that is the test's.

    Seconds are those in which the processor worked on the steps, whole ones: other processes do not count.
    """
    torch.manual_seed(seed)
    network = task.network(seed, contender.sparse).to(getattr(torch, contender.dtype))
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    optimizer = contender.make(trained, lr)
    shares = contender.schedule or task.share
    batches, held_out = task.batches(seed), task.parts(part)
    seconds, curve = 0.0, []
    for step in range(task.steps):
        batch = next(batches)
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * shares(step, task.steps)
        loss, _ = task.loss(network, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - began
        advance()
        if part == "test" and (step + 1) * task.points // task.steps != step * task.points // task.steps:
            curve.append([step + 1, score(task, network, held_out)["loss"]])
    held = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    about: dict[str, Any] = {}
    if part == "test":
        about = {"curve": curve, "validation_loss": score(task, network, task.parts("validation"))["loss"]}
    return {
        **score(task, network, held_out),
        **about,
        "seconds": seconds,
        "state_bytes": sum(x.nbytes for x in held),
        "parameters": sum(p.numel() for _, p in trained),
    }


def classified(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cross-entropy of images and the share that is right."""
    logits = network(batch[0].to(next(network.parameters()).dtype)).float()
    return functional.cross_entropy(logits, batch[1]), (logits.argmax(1) == batch[1]).float().mean()


def image_order(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """The images of every batch: each epoch in a new order, without the few that are left over."""
    rng = np.random.default_rng([seed, 2])
    while True:
        order = rng.permutation(count)
        yield from (order[k : k + size] for k in range(0, count - size + 1, size))


def images(
    read: Callable[[], dict[str, data.Images]], network: Callable[[int], nn.Module], size: int, steps: int
) -> Task:
    """The classification of images in batches of one size."""

    def tensors(part: str) -> Batch:
        return torch.from_numpy(read()[part].pixels).permute(0, 3, 1, 2), torch.from_numpy(read()[part].labels)

    def batches(seed: int) -> Iterator[Batch]:
        pixels, labels = tensors("train")
        return ((pixels[k], labels[k]) for k in image_order(len(labels), size, seed))

    return Task(lambda seed, sparse: network(seed), batches, lambda part: [tensors(part)], classified, steps)


def convolutional(seed: int) -> nn.Module:
    """The network of `fusedbun train`."""
    network = in_torch.Network()
    network.load_state_dict({name: torch.from_numpy(x) for name, x in initial_weights(seed).items()})
    return network


class Perceptron(nn.Module):
    """The network of AlgoPerf's MNIST: 784 pixels, 128 hidden units, 10 classes.

    Args:
        seed: of the weights: truncated normal of variance `gain / fan_in`; biases are zero.
        activation: of the hidden units.
        gain: 2 for ReLU.
    """

    def __init__(self, seed: int, activation: Callable[[Tensor], Tensor] = functional.relu, gain: float = 2.0) -> None:
        super().__init__()
        self.hidden, self.output, self.activation = nn.Linear(784, 128), nn.Linear(128, 10), activation
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.hidden, self.output):
            deviation = (gain / layer.in_features) ** 0.5 / 0.8796  # of a normal that is cut at twice its deviation
            nn.init.trunc_normal_(layer.weight, 0, deviation, -2 * deviation, 2 * deviation, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.output(self.activation(self.hidden(x.flatten(1))))


class Characters(nn.Module):
    """A transformer that predicts each character of a text from those before it.

    `benchmarks.low_precision` has one of its own: the noise of its results goes by the names of its parameters.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, texts: Tensor) -> Tensor:
        """The mean loss of some texts, one character longer than the context."""
        x = self.characters(texts[:, :-1]) + self.places.weight
        scores = self.output(self.norm(self.blocks(x))).float()
        return functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten())


def shakespeare(width: int, layers: int, context: int, size: int, steps: int) -> Task:
    """The next character of Shakespeare's works."""

    def batches(part: str, seed: int) -> Iterator[Batch]:
        numbers, rng = data.characters()[0][part], np.random.default_rng([seed, 2])
        while True:
            starts = rng.integers(0, len(numbers) - context - 1, size)
            texts = np.stack([numbers[at : at + context + 1] for at in starts])
            yield (torch.from_numpy(texts.astype(np.int64)),)

    def parts(part: str) -> list[Batch]:
        stream = batches(part, 0)
        return [next(stream) for _ in range(32)]

    def network(seed: int, sparse: bool) -> nn.Module:
        return Characters(data.characters()[1], width, layers, context)

    return Task(network, partial(batches, "train"), parts, lambda network, batch: (network(*batch), None), steps)


class Factors(nn.Module):
    """Points from what a student and a lecturer are: the mean, one number of each, and a product of vectors."""

    def __init__(self, students: int, lecturers: int, mean: float, width: int, sparse: bool) -> None:
        super().__init__()
        self.students, self.lecturers = (nn.Embedding(n, width + 1, sparse=sparse) for n in (students, lecturers))
        self.mean = mean
        for embedding in (self.students, self.lecturers):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, students: Tensor, lecturers: Tensor) -> Tensor:
        """The points that are expected."""
        a, b = self.students(students), self.lecturers(lecturers)
        return self.mean + a[:, 0] + b[:, 0] + (a[:, 1:] * b[:, 1:]).sum(1)


def ratings(width: int, size: int, steps: int) -> Task:
    """The points that students give their lecturers; the loss is the mean square."""

    def tensors(part: str) -> Batch:
        return tuple(torch.from_numpy(x) for x in data.ratings()[part])

    def network(seed: int, sparse: bool) -> nn.Module:
        found = data.ratings().values()
        students, lecturers = (1 + max(int(part[k].max()) for part in found) for k in (0, 1))
        return Factors(students, lecturers, float(data.ratings()["train"].points.mean()), width, sparse)

    def batches(seed: int) -> Iterator[Batch]:
        whole = tensors("train")
        return (tuple(x[k] for x in whole) for k in image_order(len(whole[0]), size, seed))

    def loss(network: nn.Module, batch: Batch) -> tuple[Tensor, None]:
        return functional.mse_loss(network(*batch[:2]).float(), batch[2]), None

    return Task(network, batches, lambda part: [tensors(part)], loss, steps)
