"""Quality: how good the networks are that each optimizer trains, on real data, in torch and in JAX.

    python -m benchmarks.quality [WORKLOAD …]

Without names all workloads are run. The protocol; what of it was changed after a first look stands in docs/quality.md:

- Everyone has the same budget. Five learning rates are tried, a factor of two apart, around one that is usual for the
  optimizer; while the best stands at an edge, one more is tried beyond it. The best is that of the lowest loss on
  validation data. One seed chooses, and for the few digits the mean of three.
- With the best learning rate, three or five other seeds train again. Only these are tested, on data that was not looked
  at before. A seed draws the weights and the batches, and is the same for all optimizers.
- All learning rates follow one schedule, the other settings are the optimizer's own defaults or those of its name, and
  nothing decays the weights. In `as_reported` the learning rates, the schedule and the decay are those that were
  published.
- In `…_in_place` nobody is tuned: everybody is given AdamW's best learning rate, half of it and twice of it, as someone
  would who puts an optimizer where AdamW stood.
- The loss on the test data is also taken during these runs, twenty times: from this is known after how many steps an
  optimizer has, in the mean, the loss with which AdamW ends. Time is the processor's, on one thread, for whole steps.

Runs that are done are kept: what is interrupted goes on where it was. Writes benchmarks/results/quality_WORKLOAD.json,
and the picture benchmarks/results/quality.png of all that are there.
"""

from __future__ import annotations

import argparse
import os

# JAX on one thread, as torch is; it reads this when it is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.fetch import MissingError
from benchmarks.quality import in_place
from benchmarks.quality.protocol import FIRST, Study
from benchmarks.quality.report import DRAWN, PICTURE, draw, load, show
from benchmarks.quality.workloads import WORKLOADS
from fusedbun.tools.shared.files import write_atomically


def main(names: list[str]) -> int:
    """Runs what is not done yet, prints tables, writes the numbers and the picture."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    missing = []
    bar = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        for name in names:
            workload = WORKLOADS[name]
            tried = len(workload.rates or range(FIRST)) * len(workload.tuning_seeds)
            runs = len(workload.shares) * len(workload.seeds) if workload.shares else tried + len(workload.seeds)
            task = progress.add_task(workload.title, total=len(workload.contenders) * runs * workload.steps)

            def report(title: str, steps: int, task: object = task) -> None:
                found = progress.tasks[progress.task_ids.index(task)]
                total = max(found.total or 0, found.completed + steps)  # learning rates beyond an edge come on top
                progress.update(task, description=title or None, advance=steps, total=total)

            try:
                Study(workload, report).complete()
            except MissingError as error:
                missing.append(f"{workload.title}: {error}")
    for name in names:
        console.print(in_place.show(name) if WORKLOADS[name].shares else show(name))
    if any(load(name) for name in DRAWN):
        write_atomically(PICTURE, draw())
    for reason in missing:
        console.print(f"not run: {reason}")
    return 1 if missing else 0


def chosen() -> list[str]:
    """The workloads that the command line names; all of them where it names none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="Quality on real data.")
    parser.add_argument("workload", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default: all")
    names: list[str] = parser.parse_args().workload
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        parser.error(f"there is no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    return names or list(WORKLOADS)


if __name__ == "__main__":
    raise SystemExit(main(chosen()))
