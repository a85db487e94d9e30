"""`fusedbun bench`: chooses the contenders, measures them case by case, and writes what came of it."""

from __future__ import annotations

import gc
import itertools
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from fusedbun.tools.bench import picture, report
from fusedbun.tools.bench.arena import Arena
from fusedbun.tools.bench.command import Settings
from fusedbun.tools.bench.contenders import OPTAX, TORCH, Contender, select
from fusedbun.tools.bench.limits import limits
from fusedbun.tools.bench.measure import Plan, Session
from fusedbun.tools.bench.results import Case, Results
from fusedbun.tools.bench.shapes import Workload, workloads
from fusedbun.tools.shared import machine
from fusedbun.tools.shared.errors import CommandError
from fusedbun.tools.shared.files import cannot_write, make_directory, write_atomically, write_json

NUMBERS, BARS = "speed.json", "speed.png"

_MEMORY_SHARE = 0.7  # of what is free at the beginning; the rest is for temporaries and for the last that was set up
_IDLE_LOAD = 0.3  # this command itself, starting
_ARRAYS = 9  # of the parameters' size that the anchors need: parameters, gradients, and state of the loops and of AdamW


def run(settings: Settings) -> Results:
    """Measures as the settings say, prints the tables and writes the files; Ctrl-C ends the measuring, not the rest."""
    modules = {name: import_module(f"fusedbun.tools.bench.contenders_{name}") for name in settings.frameworks}
    reference_path = TORCH if "torch" in modules else OPTAX
    reference_name = modules["torch" if "torch" in modules else "jax"].REFERENCE
    everyone = [one for module in modules.values() for one in module.contenders()]
    (reference,) = (one for one in everyone if (one.path, one.name) == (reference_path, reference_name))
    others = select([one for one in everyone if one is not reference], settings.only)
    if not others and settings.only is not None and not settings.only.search(reference.label):
        known = ", ".join(dict.fromkeys(one.path for one in everyone))
        raise CommandError(
            f"argument --only: no contender's path and name match {settings.only.pattern!r}; the paths are {known}"
        )
    chosen = workloads(list(settings.workload), settings.elements, settings.largest)
    _check_memory(chosen, len(modules))
    make_directory(settings.output)
    results = Results(settings.report(), machine.description(list(settings.threads)))
    available = machine.available_memory()
    plan = Plan(settings.rounds, settings.budget, None if available is None else int(_MEMORY_SHARE * available))
    with report.Display() as display:
        try:
            for workload, threads in itertools.product(chosen, settings.threads):
                with ExitStack() as sessions:
                    for module in modules.values():
                        sessions.enter_context(module.session(threads))
                    _measure(Case(workload, threads), [reference, *limits()], others, plan, results, display)
                gc.collect()
                _write(results, settings.output)
        except KeyboardInterrupt:
            if not results.measured:
                raise
            results.interrupted = True
    _save(results, settings.output)
    return results


def _measure(
    case: Case,
    anchors: list[Contender],
    others: list[Contender],
    plan: Plan,
    results: Results,
    display: report.Display,
) -> None:
    display.start(case)
    session = Session(Arena.of(case.workload.shapes, case.threads), anchors, others, plan, display)
    case.measurements = session.measurements
    results.cases.append(case)
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


def _write(results: Results, directory: Path) -> None:
    """Writes the numbers so far, so that no more than a case is lost whatever happens."""
    try:
        write_json(directory / NUMBERS, results.report())
    except OSError as error:
        raise cannot_write(directory, error) from None


def _save(results: Results, directory: Path) -> None:
    """Writes the files, and prints the tables whether or not they can be written."""
    numbers, bars = directory / NUMBERS, directory / BARS
    try:
        _write(results, directory)
        write_atomically(bars, picture.draw(results))
    except (CommandError, OSError) as error:
        report.show(results)
        raise error if isinstance(error, CommandError) else cannot_write(directory, error) from None
    report.show(results, *_warnings(results), f"numbers: {numbers}", f"bars:    {bars}")


def _warnings(results: Results) -> list[str]:
    """What makes the times doubtful."""
    load, cpus = results.machine["load_average"], results.machine["cpus"]
    free = cpus - max(results.settings["threads"])
    if load is None or load[0] <= free + _IDLE_LOAD:
        return []
    return [
        f"other processes ran at the beginning (load {load[0]}, {cpus} CPUs): trust quotients, and repeat when idle"
    ]
