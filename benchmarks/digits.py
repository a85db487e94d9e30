"""Quality: test accuracy on scikit-learn's digits, Fusedbun in its recommended setting beside AdamW, in torch.

    python -m benchmarks.digits

The protocol, which was fixed before anything was run:

- The network of `fusedbun train`. Every seed has its own split (half to train on, 15% to validate, the rest to
  test), its own initial weights and its own batches; both optimizers get the same ones.
- Both train for the same number of steps, the learning rate falls to zero along a cosine, and weight decay is 0.01.
- Both are tried with the same number of learning rates, a factor of two apart. The one of the highest validation
  accuracy, mean of the seeds, is chosen; of equals, the one of the lowest validation loss. If it stands at the edge
  of the grid, both grids are to be extended.
- The test images are looked at once: after the choice, with the chosen learning rate.

Writes benchmarks/results/digits.json.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fusedbun.cli.files import write_json
from fusedbun.cli.in_torch import Trainer, session
from fusedbun.cli.network import Images, batches, cosine, digits, initial_weights
from fusedbun.cli.optimizers import OPTIMIZERS
from fusedbun.cli.results import finite, versions

SEEDS = range(5)
SHARES = (0.5, 0.15)
EPOCHS = 40
BATCH_SIZE = 64
FACTORS = tuple(2.0**k for k in range(-4, 5))  # of the learning rate that `fusedbun train` takes
NAMES = ("fusedbun", "adamw")
RESULTS = Path(__file__).parent / "results" / "digits.json"


class Trial(NamedTuple):
    """The networks, one for each seed, that an optimizer trained with one learning rate, and how they validate."""

    learning_rate: float
    networks: list[Trainer]
    accuracy: float
    loss: float


def main() -> None:
    """Runs the benchmark, prints a table and writes the numbers."""
    splits = [digits(seed, SHARES) for seed in SEEDS]
    rates = {name: [OPTIMIZERS[name].learning_rate * factor for factor in FACTORS] for name in NAMES}
    pairs = [(name, rate) for name in NAMES for rate in rates[name]]
    trials: dict[str, list[Trial]] = {name: [] for name in NAMES}
    with session("float32"):
        for name, rate in track(pairs, "training"):
            trials[name].append(_try(name, rate, splits))
        results = {name: _test(name, trials[name], splits) for name in NAMES}
    _show(results)
    protocol = {
        "seeds": list(SEEDS),
        "shares": SHARES,
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "schedule": "cosine",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {"protocol": protocol, "versions": versions(), "results": results})
    print(f"numbers: {RESULTS}")


def _try(name: str, learning_rate: float, splits: list[list[Images]]) -> Trial:
    networks = [_train(name, learning_rate, seed, train) for seed, (train, _, _) in zip(SEEDS, splits, strict=True)]
    scores = [network.evaluate(validation) for network, (_, validation, _) in zip(networks, splits, strict=True)]
    accuracy, loss = (statistics.fmean(values) for values in zip(*scores, strict=True))
    return Trial(learning_rate, networks, accuracy, loss)


def _train(name: str, learning_rate: float, seed: int, images: Images) -> Trainer:
    steps = EPOCHS * (len(images.labels) // BATCH_SIZE)
    trainer = Trainer(OPTIMIZERS[name], initial_weights(seed), cosine(learning_rate, steps), "float32")
    for batch in batches(images, BATCH_SIZE, EPOCHS, seed):
        trainer.step(batch)
    return trainer


def _test(name: str, trials: list[Trial], splits: list[list[Images]]) -> dict[str, Any]:
    best = max(trials, key=lambda trial: (trial.accuracy, -trial.loss))
    scores = [network.evaluate(test) for network, (_, _, test) in zip(best.networks, splits, strict=True)]
    accuracies = [score.accuracy for score in scores]
    return {
        "hyperparameters": dict(OPTIMIZERS[name].hyperparameters),
        "learning_rate": best.learning_rate,
        "inside_grid": best not in (trials[0], trials[-1]),
        "test_accuracy": accuracies,
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_deviation": statistics.stdev(accuracies),
        "test_loss_mean": finite(statistics.fmean(score.loss for score in scores)),
        "validation": [
            {"learning_rate": trial.learning_rate, "accuracy": trial.accuracy, "loss": finite(trial.loss)}
            for trial in trials
        ],
    }


def _show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"digits, {len(SEEDS)} seeds, {len(FACTORS)} learning rates each, chosen by validation")
    for head in ("optimizer", "learning rate", "inside grid", "test accuracy", "deviation", "test loss"):
        table.add_column(head)
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['learning_rate']:.2g}",
            "yes" if result["inside_grid"] else "NO: extend both grids",
            f"{result['test_accuracy_mean']:.2%}",
            f"{result['test_accuracy_deviation']:.2%}",
            f"{result['test_loss_mean']:.4f}",
        )
    Console(highlight=False).print(table)
    ours, adamw = (results[name]["test_accuracy"] for name in NAMES)
    ahead = [a - b for a, b in zip(ours, adamw, strict=True)]
    error = statistics.stdev(ahead) / len(ahead) ** 0.5
    print(f"fusedbun - adamw, seed by seed: {statistics.fmean(ahead):+.2%}, standard error {error:.2%}")


if __name__ == "__main__":
    main()
