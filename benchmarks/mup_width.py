"""u-muP: does the learning rate that is best for a narrow network serve a wide one? Beside plain Adam, in torch.

    python -m benchmarks.mup_width

The protocol, which was fixed before it was run:

- The task: scikit-learn's digits, 70% to train on, the rest to validate. The network: three hidden layers of one width
  with GELU. Every seed has its own split, initial weights and batches.
- u-muP: unit-scaling's own modules (`uu.Linear`, `uu.GELU`, `uu.LinearReadout`, `uu.CrossEntropyLoss`) and `MupAdam`.
- Plain Adam: the same network of torch's modules, with their own initialisation, and `torch.optim.Adam`.
- Both have the defaults of Adam, no biases and no weight decay, as many steps, learning rates a factor of two apart,
  and the learning rate falls to zero along a cosine.
- The best learning rate of a width has the lowest validation loss (plain cross-entropy), mean of the seeds. One at the
  edge of its grid is marked. A loss that is not finite counts as infinite.
- The claim: between the narrowest and the widest network the best learning rate moves by a factor of two at the most
  with u-muP, and by more with plain Adam. `transfer_cost` is the price of tuning the narrowest network instead of the
  widest: the widest's validation loss at the narrowest's best learning rate, divided by its own best.

The best learning rate turned out to scatter between seeds by up to a factor of eight, for the losses form wide valleys.
So a steadier measure was added after the first run: the least learning rate of the grid whose mean loss is at most 1.5
times the width's best (`least_learning_rate`).

Writes benchmarks/results/mup_width.json and docs/mup_width.png.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import unit_scaling as uu
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from fusedbun import MupAdam
from fusedbun.tools.shared.files import finite, write_atomically, write_json
from fusedbun.tools.shared.machine import versions
from fusedbun.tools.train.in_torch import session
from fusedbun.tools.train.network import Images, batches, cosine, digits

WIDTHS = (64, 128, 256, 512)
SEEDS = range(3)
STEPS = 300
BATCH_SIZE = 64
TRAINING_SHARE = 0.7
LEARNING_RATES = {
    "plain Adam": tuple(2.0**k for k in range(-13, -4)),
    "u-muP": tuple(2.0**k for k in range(-6, 3)),
}
ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks/results/mup_width.json", ROOT / "docs/mup_width.png"
COLOURS = ("#56B4E9", "#009E73", "#E69F00", "#D55E00")  # Okabe and Ito's, from narrow to wide


class Trial(NamedTuple):
    """One training."""

    method: str
    width: int
    learning_rate: float
    seed: int


def main() -> None:
    """Runs the benchmark, prints a table, writes the numbers and draws the picture."""
    trials = [
        Trial(method, width, learning_rate, seed)
        for width in sorted(WIDTHS, reverse=True)  # the long ones first, so that the processes end together
        for method, rates in LEARNING_RATES.items()
        for learning_rate in rates
        for seed in SEEDS
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        done = track(pool.map(validation_loss, trials), "training", total=len(trials))
        losses = dict(zip(trials, done, strict=True))
    results = {method: _summary(method, losses) for method in LEARNING_RATES}
    _show(results)
    protocol = {
        "task": "digits",
        "training_share": TRAINING_SHARE,
        "widths": WIDTHS,
        "seeds": list(SEEDS),
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "schedule": "cosine",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(
        RESULTS, {"protocol": protocol, "versions": versions(), "unit_scaling": uu.__version__, "results": results}
    )
    write_atomically(PICTURE, draw(results))
    print(f"numbers: {RESULTS.relative_to(ROOT)}\npicture: {PICTURE.relative_to(ROOT)}")


def validation_loss(trial: Trial) -> float:
    """Trains a network and returns its cross-entropy on the validation images; infinity where it is not finite."""
    train, validation = digits(trial.seed, [TRAINING_SHARE])
    mean, deviation = train.pixels.mean(), train.pixels.std()

    def tensors(images: Images) -> tuple[Tensor, Tensor]:
        pixels = (images.pixels.reshape(len(images.labels), -1) - mean) / deviation
        return torch.from_numpy(pixels).float(), torch.from_numpy(images.labels)

    epochs = math.ceil(STEPS / (len(train.labels) // BATCH_SIZE))
    torch.manual_seed(trial.seed)
    network, loss, optimizer = _parts(trial)
    stream = batches(train, BATCH_SIZE, epochs, trial.seed)
    with session("float32"):
        for learning_rate, batch in zip(cosine(trial.learning_rate, STEPS).tolist(), stream, strict=False):
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.zero_grad()
            pixels, labels = tensors(batch)
            loss(network(pixels), labels).backward()
            optimizer.step()
        with torch.no_grad():
            pixels, labels = tensors(validation)
            value = nn.functional.cross_entropy(network(pixels), labels).item()
    return value if math.isfinite(value) else math.inf


def _parts(trial: Trial) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    width, classes, pixels = trial.width, 10, 64
    if trial.method == "u-muP":
        linear, gelu, readout = uu.Linear, uu.GELU, uu.LinearReadout
    else:
        linear, gelu, readout = nn.Linear, nn.GELU, nn.Linear
    sizes = (pixels, width, width)
    layers = [layer for size in sizes for layer in (linear(size, width, bias=False), gelu())]
    network = nn.Sequential(*layers, readout(width, classes, bias=False))
    if trial.method == "u-muP":
        return network, uu.CrossEntropyLoss(), MupAdam(network.parameters(), lr=trial.learning_rate)
    return network, nn.CrossEntropyLoss(), torch.optim.Adam(network.parameters(), lr=trial.learning_rate)


def _summary(method: str, losses: dict[Trial, float]) -> dict[str, Any]:
    rates = LEARNING_RATES[method]
    mean = {
        (width, rate): statistics.fmean(losses[Trial(method, width, rate, seed)] for seed in SEEDS)
        for width in WIDTHS
        for rate in rates
    }
    best = {width: min((mean[width, rate], rate) for rate in rates)[1] for width in WIDTHS}
    best_of_seeds = {
        width: [min((losses[Trial(method, width, rate, seed)], rate) for rate in rates)[1] for seed in SEEDS]
        for width in WIDTHS
    }
    least = {width: min(r for r in rates if mean[width, r] <= 1.5 * mean[width, best[width]]) for width in WIDTHS}
    narrow, wide = WIDTHS[0], WIDTHS[-1]
    return {
        "widths": [
            {
                "width": width,
                "best_learning_rate": best[width],
                "best_learning_rates_of_seeds": best_of_seeds[width],
                "least_learning_rate": least[width],
                "inside_grid": best[width] not in (rates[0], rates[-1]),
                "best_loss": mean[width, best[width]],
                "learning_rates": rates,
                "losses": [finite(mean[width, rate]) for rate in rates],
                "losses_of_seeds": [
                    [finite(losses[Trial(method, width, rate, seed)]) for seed in SEEDS] for rate in rates
                ],
            }
            for width in WIDTHS
        ],
        "best_learning_rate_moves_by": max(best[narrow] / best[wide], best[wide] / best[narrow]),
        "least_learning_rate_moves_by": max(least[narrow] / least[wide], least[wide] / least[narrow]),
        "transfer_cost": finite(mean[wide, best[narrow]] / mean[wide, best[wide]]),
    }


def _show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"digits, {len(SEEDS)} seeds, {STEPS} steps: the learning rate of the lowest validation loss")
    for head in ("method", "width", "learning rate", "of each seed", "inside grid", "validation loss"):
        table.add_column(head)
    for method, result in results.items():
        for row in result["widths"]:
            rate, inside = f"{row['best_learning_rate']:.2g}", "yes" if row["inside_grid"] else "NO: extend the grid"
            seeds = ", ".join(f"{best:.2g}" for best in row["best_learning_rates_of_seeds"])
            table.add_row(method, str(row["width"]), rate, seeds, inside, f"{row['best_loss']:.4f}")
    Console(highlight=False).print(table)
    for method, result in results.items():
        moved, cost = result["best_learning_rate_moves_by"], result["transfer_cost"]
        paid = "no finite loss" if cost is None else f"{cost:.2f} times the best loss"
        print(
            f"{method}: from width {WIDTHS[0]} to {WIDTHS[-1]} the best learning rate moves by a factor of {moved:g}, "
            f"the least that will do by {result['least_learning_rate_moves_by']:g}; "
            f"width {WIDTHS[-1]} at the best learning rate of width {WIDTHS[0]} has {paid}"
        )


def draw(results: dict[str, dict[str, Any]]) -> bytes:
    """The validation loss over the learning rate, a line for each width and a panel for each method, as PNG."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True)
    for axes, (method, result) in zip(panels, results.items(), strict=True):
        for row, colour in zip(result["widths"], COLOURS, strict=True):
            losses = [math.nan if loss is None else loss for loss in row["losses"]]
            axes.plot(row["learning_rates"], losses, marker="o", markersize=4, color=colour, label=str(row["width"]))
            axes.plot(row["best_learning_rate"], row["best_loss"], marker="*", markersize=15, color=colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=method, xlabel="learning rate at the start")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (log scale)")
    panels[0].legend(title="width", frameon=False)
    figure.suptitle(f"Digits, three hidden layers, {STEPS} steps, mean of {len(SEEDS)} seeds; a star marks the best")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


if __name__ == "__main__":
    main()
