"""Chooses the contenders, measures them case by case, and writes what came of it."""

from __future__ import annotations

import gc
import itertools
from contextlib import ExitStack
from functools import partial
from importlib import import_module

from fusedbun.tools.bench import picture, report
from fusedbun.tools.bench.arena import Arena
from fusedbun.tools.bench.contenders import OPTAX, PEERS, TORCH, Contender, select
from fusedbun.tools.bench.limits import limits
from fusedbun.tools.bench.measure import Effort, Session
from fusedbun.tools.bench.results import Case, Results
from fusedbun.tools.bench.settings import Settings
from fusedbun.tools.bench.shapes import Workload, workloads
from fusedbun.tools.shared import machine
from fusedbun.tools.shared.errors import CommandError
from fusedbun.tools.shared.files import cannot_write, make_directory, save, write_json

_MEMORY_SHARE = 0.7  # of what is free at the beginning; the rest is for temporaries and for the last that was set up
_IDLE_LOAD = 0.3  # this command itself, starting
_ARRAYS = 9  # of the parameters' size that the anchors need: parameters, gradients, and state of the loops and of AdamW


def measure(settings: Settings) -> Results:
    """Measures as the settings say, prints the tables and writes the files; Ctrl-C ends the measuring, not the rest."""
    modules = {name: import_module(f"fusedbun.tools.bench.contenders_{name}") for name in settings.frameworks}
    everyone = [one for module in modules.values() for one in module.contenders()]
    path, module = (TORCH, modules["torch"]) if "torch" in modules else (OPTAX, modules["jax"])
    (reference,) = (one for one in everyone if (one.path, one.name) == (path, module.REFERENCE))
    others = select([one for one in everyone if one is not reference], settings.only)
    if not others and settings.only is not None and not settings.only.search(reference.label):
        known = ", ".join(dict.fromkeys(one.path for one in everyone))
        raise CommandError(
            f"argument --only: no contender's path and name match {settings.only.pattern!r}; the paths are {known}"
        )
    chosen = workloads(list(settings.workload), settings.elements, settings.largest)
    _check_memory(chosen, len(modules))
    make_directory(settings.output)
    results = Results(settings.report(), machine.description(list(settings.threads), PEERS))
    available = machine.available_memory()
    effort = Effort(settings.rounds, settings.budget, None if available is None else int(_MEMORY_SHARE * available))
    numbers, bars = settings.output / "speed.json", settings.output / "speed.png"
    display = report.Display()
    with display.bars:
        try:
            for workload, threads in itertools.product(chosen, settings.threads):
                with ExitStack() as sessions:
                    for module in modules.values():
                        sessions.enter_context(module.session(threads))
                    case = Case(workload, threads)
                    display.start(case)
                    results.cases.append(case)
                    _measure(case, [reference, *limits()], others, effort, display)
                gc.collect()
                try:  # no more than a case is lost whatever happens
                    write_json(numbers, results.report())
                except OSError as error:
                    raise cannot_write(settings.output, error) from None
        except KeyboardInterrupt:
            if not results.measured:
                raise
            results.interrupted = True
    remarks = *_warnings(results), f"numbers: {numbers}", f"bars:    {bars}"
    save(numbers, results.report(), bars, partial(picture.draw, results), partial(report.show, results), *remarks)
    return results


def _measure(
    case: Case, anchors: list[Contender], others: list[Contender], effort: Effort, display: report.Display
) -> None:
    session = Session(Arena.of(case.workload.shapes, case.threads), anchors, others, effort, display)
    case.measurements = session.measurements
    session.run()


def _check_memory(chosen: list[Workload], frameworks: int) -> None:
    available = machine.available_memory()
    largest = max(chosen, key=lambda workload: workload.parameters)
    need = 4 * largest.parameters * (_ARRAYS + 2 * (frameworks - 1))
    if available is not None and need > available:
        raise CommandError(
            f"argument --workload: {largest.name} needs {need / 2**30:,.0f} GiB of memory, "
            f"and {available / 2**30:,.0f} GiB are free"
        )


def _warnings(results: Results) -> list[str]:
    """What makes the times doubtful."""
    load, cpus = results.machine["load_average"], results.machine["cpus"]
    free = cpus - max(results.settings["threads"])
    if load is None or load[0] <= free + _IDLE_LOAD:
        return []
    return [
        f"other processes ran at the beginning (load {load[0]}, {cpus} CPUs): trust quotients, and repeat when idle"
    ]
