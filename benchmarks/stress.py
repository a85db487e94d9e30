"""What goes wrong, and how often: FusedbunW beside AdamW where training is made difficult.

    python -m benchmarks.stress

All have AdamW's learning rate, the best of `benchmarks.quality` where the network is one of its, and nobody decays
weights. The seed of a trial draws its weights and batches, the same for all. A trial diverges when its loss at the end
is not finite, or is higher than before the first step. Of every step the largest change of an element is taken, in
units of the learning rate.

Writes benchmarks/results/stress.json.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import fusedbun
from benchmarks.quality import data, in_torch
from benchmarks.quality.contenders import ADAMW
from fusedbun.tools.shared.files import write_json
from fusedbun.tools.shared.machine import versions

RESULTS = Path(__file__).parent / "results"
Loss = Callable[[int], Tensor]  # of a step; the last is the one that is judged


@dataclass(frozen=True)
class Trial:
    """Something to train.

    Args:
        params: the parameters, by name.
        loss: the loss in a step, counted from 0.
        judged: the loss that says how it went, before and after.
        spoil: changes the gradients of a step.
    """

    params: list[tuple[str, nn.Parameter]]
    loss: Loss
    judged: Callable[[], float]
    spoil: Callable[[int, Tensor], Tensor] = lambda step, grad: grad


@dataclass(frozen=True)
class Ordeal:
    """What makes it difficult.

    Args:
        title: for the table.
        trial: the trial of a seed.
        lr: the learning rate.
        steps: of a trial.
        seeds: how many trials.
        share: the share of the learning rate in a step, of all.
    """

    title: str
    trial: Callable[[int], Trial]
    lr: float
    steps: int
    seeds: int = 10
    share: Callable[[int, int], float] = in_torch.linear


Make = Callable[[list[tuple[str, nn.Parameter]], float], torch.optim.Optimizer]
CONTENDERS: dict[str, Make] = {
    "AdamW": lambda params, lr: torch.optim.AdamW([p for _, p in params], lr, weight_decay=0.0),
    "FusedbunW": lambda params, lr: fusedbun.FusedbunW(params, lr, weight_decay=0.0),
    "FusedbunW, momentum float32": lambda params, lr: fusedbun.FusedbunW(
        params, lr, weight_decay=0.0, momentum_dtype=None
    ),
    "FusedbunW, momentum int4": lambda params, lr: fusedbun.FusedbunW(
        params, lr, weight_decay=0.0, momentum_dtype="int4"
    ),
}


def run(ordeal: Ordeal, make: Make, seed: int) -> dict[str, Any]:
    """One trial: its loss before and after, and the largest step of an element over the learning rate."""
    torch.manual_seed(seed)
    trial = ordeal.trial(seed)
    optimizer = make(trial.params, ordeal.lr)
    before, largest = trial.judged(), 0.0
    for step in range(ordeal.steps):
        lr = ordeal.lr * ordeal.share(step, ordeal.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        trial.loss(step).backward()
        for _, p in trial.params:
            p.grad = trial.spoil(step, p.grad)
        old = [p.detach().clone() for _, p in trial.params]
        optimizer.step()
        optimizer.zero_grad()
        changes = [((p.detach() - q).abs().max() / lr).item() for (_, p), q in zip(trial.params, old, strict=True)]
        largest = max(largest, *(x if math.isfinite(x) else math.inf for x in changes))
    loss = trial.judged()
    return {
        "diverged": not loss <= before,
        "loss": loss if math.isfinite(loss) else None,
        "largest_step": largest if math.isfinite(largest) else None,
    }


def constant(step: int, steps: int) -> float:
    """The whole learning rate in every step."""
    return 1.0


# ---- the networks of the quality benchmark


def of_task(task: in_torch.Task, seed: int, scale: float = 1.0, zeros: int | None = None) -> Trial:
    """A network on its data; its first weights multiplied, or the gradients of one step zero."""
    network, batches, held_out = task.network(seed, False), task.batches(seed), task.parts("test")
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(scale)

    def judged() -> float:
        loss = in_torch.score(task, network, held_out)["loss"]
        return math.inf if loss is None else loss

    return Trial(
        list(network.named_parameters()),
        lambda step: task.loss(network, next(batches))[0],
        judged,
        lambda step, grad: torch.zeros_like(grad) if step == zeros else grad,
    )


def jumping(task: in_torch.Task, seed: int) -> Trial:
    """A network whose gradients are a thousand times as large in the middle step."""
    trial = of_task(task, seed)
    return Trial(
        trial.params, trial.loss, trial.judged, lambda step, grad: 1000 * grad if step == task.steps // 2 else grad
    )


def any_weights(task: in_torch.Task, seed: int) -> Trial:
    """A network whose first weights are too small or too large by a factor of up to ten."""
    return of_task(task, seed, scale=10.0 ** np.random.default_rng([seed, 7]).uniform(-1, 1))


# ---- small problems


def rare_rows(seed: int) -> Trial:
    """An embedding of 10,000 words drawn from Zipf's law, each to come to a vector of its own."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 10_001)
    share /= share.sum()
    words, wanted = nn.Embedding(10_000, 16), torch.from_numpy(rng.standard_normal((10_000, 16)).astype(np.float32))
    weight = torch.from_numpy(share.astype(np.float32))[:, None]

    def loss(step: int) -> Tensor:
        batch = torch.from_numpy(rng.choice(10_000, 256, p=share))
        return functional.mse_loss(words(batch), wanted[batch])

    return Trial([("weight", words.weight)], loss, lambda: ((words.weight - wanted) ** 2 * weight).sum().item() / 16)


def waking(seed: int) -> Trial:
    """A matrix one column and one row of which have no gradient for a thousand steps."""
    rng = np.random.default_rng(seed)
    layer = nn.Linear(48, 32, bias=False)
    wanted = torch.from_numpy(rng.standard_normal((32, 48)).astype(np.float32))

    def loss(step: int) -> Tensor:
        x = torch.from_numpy(rng.standard_normal((16, 48)).astype(np.float32))
        error = layer(x) - x @ wanted.T
        if step < 1000:
            x[:, 3] = 0
            error = (layer(x) - x @ wanted.T)[:, torch.arange(32) != 5]
        return error.square().mean()

    return Trial([("weight", layer.weight)], loss, lambda: functional.mse_loss(layer.weight, wanted).item())


def thin(seed: int) -> Trial:
    """Parameters of 1 x 1, 1 x n, n x 1 and 3 x 3 x 1 x 64, each to come to numbers of its own, through noise."""
    rng = np.random.default_rng(seed)
    shapes = ((1, 1), (1, 300), (300, 1), (3, 3, 1, 64), (64, 1, 3, 3))
    wanted = [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]

    def loss(step: int) -> Tensor:
        noisy = (w + torch.from_numpy(rng.standard_normal(w.shape).astype(np.float32)) for w in wanted)
        return torch.stack([(p - w).square().mean() for p, w in zip(params, noisy, strict=True)]).sum()

    def judged() -> float:
        return sum(functional.mse_loss(p, w).item() for p, w in zip(params, wanted, strict=True))

    return Trial([(f"p{i}", p) for i, p in enumerate(params)], loss, judged)


def best_rate(workload: str) -> float:
    """AdamW's best learning rate in the quality benchmark."""
    file = json.loads((RESULTS / f"quality_{workload}.json").read_text())
    rate: float = file["results"][ADAMW]["learning_rate"]
    return rate


def ordeals() -> Iterator[Ordeal]:
    """All of them."""
    tasks = {
        "digits": in_torch.images(data.digits, in_torch.convolutional, 64, 280),
        "fashion": in_torch.images(data.fashion, in_torch.Perceptron, 256, 600),
        "shakespeare": in_torch.shakespeare(width=64, layers=2, context=64, size=8, steps=400),
    }
    titles = {"digits": "digits", "fashion": "Fashion-MNIST", "shakespeare": "Shakespeare"}
    for name, task in tasks.items():
        lr, trial = best_rate(name), partial(of_task, task)
        yield Ordeal(f"no warm-up, {titles[name]}", trial, lr, task.steps, share=constant)
        yield Ordeal(f"4 times the rate, {titles[name]}", trial, 4 * lr, task.steps)
    for name in ("digits", "shakespeare"):
        lr, task = best_rate(name), tasks[name]
        middle, jump = partial(of_task, task, zeros=task.steps // 2), partial(jumping, task)
        yield Ordeal(f"gradients a thousand times as large in one step, {titles[name]}", jump, lr, task.steps)
        yield Ordeal(f"zeros in the first step, {titles[name]}", partial(of_task, task, zeros=0), lr, task.steps)
        yield Ordeal(f"zeros in the middle, {titles[name]}", middle, lr, task.steps)
    yield Ordeal("rare rows: 10,000 words by Zipf's law", rare_rows, 1e-2, 3000)
    yield Ordeal("a row and a column that wake after 1,000 steps", waking, 1e-2, 2000, share=constant)
    yield Ordeal("1 x 1, 1 x n, n x 1, 3 x 3 x 1 x 64", thin, 1e-2, 1000)
    task = tasks["digits"]
    yield Ordeal("100 initialisations, digits", partial(any_weights, task), best_rate("digits"), task.steps, seeds=100)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many trials diverged, the median loss, and the largest step of all."""
    losses = [math.inf if x["loss"] is None else x["loss"] for x in runs]
    steps = [math.inf if x["largest_step"] is None else x["largest_step"] for x in runs]
    middle, largest = statistics.median(losses), max(steps)
    return {
        "trials": len(runs),
        "diverged": sum(x["diverged"] for x in runs),
        "median_loss": middle if math.isfinite(middle) else None,
        "largest_step": largest if math.isfinite(largest) else None,
    }


def main() -> None:
    """Runs all of it, writes the numbers and prints a table."""
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    todo = list(ordeals())
    with Progress() as progress:
        task = progress.add_task("", total=sum(x.seeds for x in todo) * len(CONTENDERS))
        for ordeal in todo:
            row: dict[str, Any] = {"title": ordeal.title, "learning_rate": ordeal.lr, "steps": ordeal.steps}
            for name, make in CONTENDERS.items():
                progress.update(task, description=f"{ordeal.title}: {name}")
                runs = []
                for seed in range(ordeal.seeds):
                    runs.append(run(ordeal, make, seed))
                    progress.advance(task)
                row[name] = summary(runs)
            found.append(row)
    write_json(RESULTS / "stress.json", {"results": found, "versions": versions()})
    table = Table("", *CONTENDERS, title="diverged, median loss, largest step of an element in learning rates")
    for row in found:
        table.add_row(row["title"], *(cell(row[name]) for name in CONTENDERS))
    Console().print(table)


def cell(of: dict[str, Any]) -> str:
    """What became of the trials, in short."""
    loss, step = (f"{x:.3g}" if x is not None else "inf" for x in (of["median_loss"], of["largest_step"]))
    return f"{of['diverged']} of {of['trials']}, {loss}, {step}"


if __name__ == "__main__":
    main()
