"""How a workload is run: the same rule for every optimizer, and nothing that is done is done again."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality.contenders import ADAMW, Contender
from benchmarks.quality.workloads import Workload
from fusedbun.tools.shared.files import write_json
from fusedbun.tools.shared.machine import versions

FACTOR, FIRST, MOST = 2.0, 5, 13  # between learning rates; how many are tried first, and at the most
RESULTS = Path(__file__).parent.parent / "results"
Report = Callable[[str, int], None]  # of what runs now, and after how many more steps


class Study:
    """The runs of a workload, kept in a file; those of other settings, or of another protocol, are made again.

    Args:
        workload: what is run.
        report: called with a title before a run, and as it goes on with the steps that were made.
    """

    def __init__(self, workload: Workload, report: Report) -> None:
        self.workload, self.report = workload, report
        self.path = RESULTS / f"quality_{workload.name}.json"
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = all(before.get("protocol", {}).get(name) == value for name, value in workload.protocol.items())
        self.settings = {x.title: x.settings for x in workload.contenders}
        known = before.get("settings", {})
        runs = before.get("runs", {}) if same else {}
        titles = {title for title, now in self.settings.items() if known.get(title) == now}
        self.runs: dict[str, Any] = {key: run for key, run in runs.items() if key.split("|")[0] in titles}
        tuned = not (workload.rates or workload.shares)
        rule = {"factor": FACTOR, "first": FIRST, "most": MOST} if tuned else {}
        self.protocol: dict[str, Any] = {**workload.protocol, **workload.choices, **rule}

    def complete(self) -> dict[str, Any]:
        """Makes every run that is missing, and writes the file with its summary."""
        if self.workload.shares:
            return self.write({x.title: self.in_place(x) for x in self.workload.contenders})
        found = {}
        for contender in self.workload.contenders:
            rates = self.tune(contender)
            best = min(rates, key=lambda rate: rates[rate])
            found[contender.title] = {
                "ours": contender.ours,
                "learning_rate": best,
                "inside_grid": min(rates) < best < max(rates),
                "tried": [[rate, None if math.isinf(loss) else loss] for rate, loss in sorted(rates.items())],
                **summary([self.run(contender, best, seed, "test") for seed in self.workload.seeds]),
            }
        return self.write(found)

    def in_place(self, contender: Contender) -> dict[str, Any]:
        """The results at the shares of AdamW's learning rate, by the share."""
        tuned = json.loads((RESULTS / f"quality_{self.workload.beside}.json").read_text())
        rate = tuned["results"][ADAMW]["learning_rate"]
        return {
            "ours": contender.ours,
            "learning_rate": rate,
            "at": {
                f"{share:g}": summary([self.run(contender, share * rate, seed, "test") for seed in self.workload.seeds])
                for share in self.workload.shares
            },
        }

    def tune(self, contender: Contender) -> dict[float, float]:
        """The validation loss at every learning rate: the first ones, and more beyond an edge while it is the best."""

        def loss(rate: float) -> float:
            found = [self.run(contender, rate, seed, "validation")["loss"] for seed in self.workload.tuning_seeds]
            return math.inf if None in found else statistics.fmean(found)

        if self.workload.rates:
            return {rate: loss(rate) for rate in self.workload.rates}
        first = range(-(FIRST // 2), FIRST // 2 + 1)
        losses = {contender.rate * FACTOR**k: 0.0 for k in first}
        losses = {rate: loss(rate) for rate in losses}
        while len(losses) < MOST:
            best = min(losses, key=lambda rate: losses[rate])
            if best not in (min(losses), max(losses)):
                break
            beyond = best * FACTOR if best == max(losses) else best / FACTOR
            losses[beyond] = loss(beyond)
        return losses

    def run(self, contender: Contender, rate: float, seed: int, part: str) -> dict[str, Any]:
        """One run, if it has not been made; and the file with it."""
        key = f"{contender.title}|{rate:.6g}|{seed}|{part}"
        self.report(f"{self.workload.title}: {contender.title}", 0)
        if key not in self.runs:
            run = self.workload.run(contender, rate, seed, part, lambda: self.report("", 1))
            self.runs[key] = {name: x for name, x in run.items() if name != "curve" or not self.workload.shares}
            self.write(None)
        else:
            self.report("", self.workload.steps)
        return self.runs[key]

    def write(self, results: dict[str, Any] | None) -> dict[str, Any]:
        """Writes the file; without results where runs are missing."""
        about = {"protocol": self.protocol, "settings": self.settings, "versions": versions()}
        content = {**about, "results": results, "runs": self.runs}
        RESULTS.mkdir(exist_ok=True)
        write_json(self.path, content)
        return content


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds; None where a run diverged."""
    found: dict[str, Any] = {}
    for name in ("loss", "accuracy"):
        values = [run[name] for run in runs]
        known = None not in values
        found[name] = statistics.fmean(values) if known else None
        found[f"{name}_deviation"] = statistics.stdev(values) if known else None
    if "validation_loss" in runs[0]:
        found["validation_losses"] = [run["validation_loss"] for run in runs]
    found["losses"] = [run["loss"] for run in runs]
    found["seconds"] = statistics.fmean(run["seconds"] for run in runs)
    found["state_bytes_per_parameter"] = runs[0]["state_bytes"] / runs[0]["parameters"]
    if "curve" in runs[0]:
        found["curve"] = [
            [point[0][0], None if None in (x := [loss for _, loss in point]) else statistics.fmean(x)]
            for point in zip(*(run["curve"] for run in runs), strict=True)
        ]
    return found
