"""Quality in fewer bits: a character transformer on Shakespeare, trained in float32 and with every way to save memory.

    python -m benchmarks.low_precision

- The network has 2 layers of width 128; 1,200 steps of 16 texts of 64 characters, with a warm-up over a tenth and a
  linear decay over the last half; 3 seeds, which draw the weights and the texts, the same for every setting.
- Each optimizer's learning rate is the best of a grid for its float32 run with seed 0, on validation text; every other
  setting of it uses the same one.
- The loss is the mean over 200 batches of validation text, the same for all.

What is compared: float32; bfloat16 weights rounded to the nearest, and stochastically; float32 weights with the
momentum in int8; and for Fusedbun also in int4, and bfloat16 weights rounded stochastically with such a momentum.

Runs that are done are kept: what is interrupted goes on where it was. Writes benchmarks/results/low_precision.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fusedbun
from benchmarks.memory.training import Block
from benchmarks.shakespeare import characters
from fusedbun.tools.shared.files import write_json
from fusedbun.tools.shared.machine import versions

WIDTH, LAYERS, CONTEXT, BATCH = 128, 2, 64, 16
STEPS = 1200
SEEDS = (0, 1, 2)
VALIDATION_BATCHES = 200
RATES = {
    "Fusedbun": (1e-4, 2e-4, 4e-4, 8e-4),
    "SM3": (0.0125, 0.025, 0.05, 0.1),
    "DecoupledLionW": (1e-4, 2e-4, 4e-4, 8e-4),
}
GIVEN: dict[str, dict[str, Any]] = {
    "Fusedbun": {"centralize": True, "use_rms": True, "nesterov": True},
    "SM3": {"momentum": 0.9},
    "DecoupledLionW": {},
}
ROUNDED = {"stochastic_rounding": True}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16, to the nearest": ("bfloat16", {}),
    "bfloat16, stochastic": ("bfloat16", ROUNDED),
    "momentum int8": ("float32", {"momentum_dtype": "int8"}),
    "momentum int4": ("float32", {"momentum_dtype": "int4"}),
    "bfloat16, stochastic, momentum int8": ("bfloat16", {**ROUNDED, "momentum_dtype": "int8"}),
    "bfloat16, stochastic, momentum int4": ("bfloat16", {**ROUNDED, "momentum_dtype": "int4"}),
}
FOR_FUSEDBUN = ("momentum int4", "bfloat16, stochastic, momentum int8", "bfloat16, stochastic, momentum int4")
RESULTS = Path(__file__).parent / "results/low_precision.json"


class Network(nn.Module):
    """Predicts each character from those before it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, texts: Tensor) -> Tensor:
        """The mean loss of some texts, one character longer than the context."""
        x = self.characters(texts[:, :-1]) + self.places.weight
        scores = self.head(self.norm(self.blocks(x))).float()
        return nn.functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten())


def batches(numbers: np.ndarray, count: int, seed: int) -> Iterator[Tensor]:
    """Texts drawn from anywhere."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(numbers) - CONTEXT - 1, BATCH)
        yield torch.from_numpy(np.stack([numbers[at : at + CONTEXT + 1] for at in starts]).astype(np.int64))


def schedule(step: int) -> float:
    """The share of the learning rate in a step."""
    return min(1.0, (step + 1) / (STEPS / 10), 2 * (STEPS - step) / STEPS)


def trained_loss(optimizer: str, setting: str, lr: float, seed: int, advance: Callable[[], None]) -> float | None:
    """The validation loss after training; None where it is not finite."""
    train, validation, vocabulary = characters()
    dtype, given = SETTINGS[setting]
    torch.manual_seed(seed)
    network = Network(vocabulary).to(getattr(torch, dtype))
    made = getattr(fusedbun, optimizer)(network.named_parameters(), lr=lr, seed=seed, **GIVEN[optimizer], **given)
    rate = torch.optim.lr_scheduler.LambdaLR(made, schedule)
    for texts in batches(train, STEPS, 1000 + seed):
        network(texts).backward()
        made.step()
        made.zero_grad()
        rate.step()
        advance()
    network.float()
    with torch.no_grad():
        loss = statistics.fmean(network(texts).item() for texts in batches(validation, VALIDATION_BATCHES, 0))
    return loss if np.isfinite(loss) else None


def allowed(optimizer: str, setting: str) -> bool:
    """Whether the setting is tried with this optimizer."""
    return optimizer == "Fusedbun" or setting not in FOR_FUSEDBUN


def main() -> None:
    """Runs what is not done yet, prints a table and writes the numbers."""
    protocol = {"steps": STEPS, "width": WIDTH, "layers": LAYERS, "context": CONTEXT, "batch": BATCH, "seeds": SEEDS}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs = before.get("runs", {}) if before.get("protocol") == json.loads(json.dumps(protocol)) else {}
    torch.set_num_threads(1)
    with Progress() as progress:
        settings = sum(allowed(name, setting) for name in RATES for setting in SETTINGS)
        count = sum(map(len, RATES.values())) + len(SEEDS) * settings - len(RATES)
        task = progress.add_task("training", total=STEPS * count)

        def loss(optimizer: str, setting: str, lr: float, seed: int) -> float:
            key = f"{optimizer}|{setting}|{lr:g}|{seed}"
            progress.update(task, description=key)
            if key not in runs:
                runs[key] = trained_loss(optimizer, setting, lr, seed, lambda: progress.advance(task))
                write_json(RESULTS, {"protocol": protocol, "runs": runs, "versions": versions()})
            found = runs[key]
            return float("inf") if found is None else found

        best = {name: min(rates, key=lambda lr: loss(name, "float32", lr, 0)) for name, rates in RATES.items()}
        summary = [
            {
                "optimizer": name,
                "setting": setting,
                "lr": best[name],
                **summarized([loss(name, setting, best[name], seed) for seed in SEEDS]),
            }
            for name in RATES
            for setting in SETTINGS
            if allowed(name, setting)
        ]
    write_json(RESULTS, {"protocol": protocol, "runs": runs, "summary": summary, "versions": versions()})
    show(summary)


def summarized(losses: list[float]) -> dict[str, Any]:
    """The losses of all seeds, mean and standard deviation; None where a run diverged."""
    found = [loss if np.isfinite(loss) else None for loss in losses]
    if None in found:
        return {"losses": found, "mean": None, "deviation": None}
    return {"losses": found, "mean": statistics.fmean(losses), "deviation": statistics.stdev(losses)}


def show(summary: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table("optimizer", "setting", "learning rate", "validation loss", "against float32")
    for row in summary:
        (full,) = (r for r in summary if (r["optimizer"], r["setting"]) == (row["optimizer"], "float32"))
        table.add_row(
            row["optimizer"],
            row["setting"],
            f"{row['lr']:g}",
            "diverged" if row["mean"] is None else f"{row['mean']:.4f} ± {row['deviation']:.4f}",
            "" if row["mean"] is None else f"{row['mean'] / full['mean'] - 1:+.2%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
