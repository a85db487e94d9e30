"""Chooses the contenders, measures them case by case, and writes what came of it."""

from __future__ import annotations

import gc
import itertools
from contextlib import ExitStack
from importlib import import_module

from fusedbun.tools.bench.contenders import OPTAX, PEERS, TORCH, Arena
from fusedbun.tools.bench.limits import limits
from fusedbun.tools.bench.measure import Effort, Session
from fusedbun.tools.bench.results import Case, Display, Results, draw, show
from fusedbun.tools.bench.settings import Settings
from fusedbun.tools.bench.shapes import workloads
from fusedbun.tools.shared import machine
from fusedbun.tools.shared.command import CommandError
from fusedbun.tools.shared.files import make_directory, save, write_json, writing

_MEMORY_SHARE = 0.7  # of what is free at the beginning; the rest is for temporaries and for the last that was set up
_ARRAYS = 9  # of the parameters' size that the anchors need: parameters, gradients, and state of the loops and of AdamW


def measure(settings: Settings) -> int:
    """Measures, prints the tables and writes the files, which Ctrl-C does not keep it from; returns the exit code."""
    modules = {name: import_module(f"fusedbun.tools.bench.contenders_{name}") for name in settings.frameworks}
    everyone = [one for module in modules.values() for one in module.contenders()]
    path, module = (TORCH, modules["torch"]) if "torch" in modules else (OPTAX, modules["jax"])
    (reference,) = (one for one in everyone if (one.path, one.name) == (path, module.REFERENCE))
    wanted = [one for one in everyone if settings.only is None or settings.only.search(one.label)]
    if not wanted and settings.only is not None:
        known = ", ".join(dict.fromkeys(one.path for one in everyone))
        raise CommandError(
            f"argument --only: no contender's path and name match {settings.only.pattern!r}; the paths are {known}"
        )
    anchors, others = [reference, *limits()], [one for one in wanted if one is not reference]
    chosen = workloads(settings.workload, settings.elements, settings.largest)
    available = machine.available_memory()
    largest = max(chosen, key=lambda workload: workload.parameters)
    need = 4 * largest.parameters * (_ARRAYS + 2 * (len(modules) - 1))
    if available is not None and need > available:
        raise CommandError(
            f"argument --workload: {largest.name} needs {need / 2**30:,.0f} GiB of memory, "
            f"and {available / 2**30:,.0f} GiB are free"
        )
    make_directory(settings.output)
    results = Results(settings.report(), machine.description(list(settings.threads), PEERS))
    effort = Effort(settings.rounds, settings.budget, None if available is None else int(_MEMORY_SHARE * available))
    numbers, bars = settings.output / "speed.json", settings.output / "speed.png"
    with Display() as display:
        try:
            for workload, threads in itertools.product(chosen, settings.threads):
                with ExitStack() as sessions:
                    for module in modules.values():
                        sessions.enter_context(module.session(threads))
                    case = Case(workload, threads)
                    display.begin(case)
                    results.cases.append(case)
                    session = Session(Arena.of(workload.shapes, threads), anchors, others, effort, display)
                    case.measurements = session.measurements
                    session.run()
                    del session  # with the arrays
                gc.collect()
                with writing(settings.output):  # no more than a case is lost whatever happens
                    write_json(numbers, results.report())
        except KeyboardInterrupt:
            if not results.measured:
                raise
            results.interrupted = True
    return save(results, numbers, "bars", bars, draw, show)
