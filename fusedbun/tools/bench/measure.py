"""Taking the times in turns: in every round each contender makes one step, so that the machine's drift hits all alike.

What is measured at a time has to fit in memory beside one another. Contenders that do not are measured in batches,
one after another, and the anchors (the reference and the machine's limits) take part in every batch.
"""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fusedbun.tools.bench.contenders import Arena, Contender, Stepper
from fusedbun.tools.shared.machine import resident_memory

LEAST_ROUNDS = 3
MEASURED, NOT_INSTALLED, FAILED, PENDING = "measured", "not installed", "failed", "not reached"


@dataclass
class Measurement:
    """What is known of a contender; it grows."""

    contender: Contender
    status: str = PENDING  # one of the four above
    reason: str | None = None  # why there are no times, in one line
    first_step: float | None = None  # seconds; it allocates and compiles
    state_bytes: int | None = None
    temporaries: int | None = None  # bytes, of a step
    seconds: dict[int, float] = field(default_factory=dict)  # of a step, by the number of the round


class Progress(Protocol):
    """Who is told how far the measuring is."""

    def expect(self, steps: int) -> None:
        """So many more calls of `proceed` are to come."""

    def proceed(self, doing: str) -> None:
        """A part is done; this is the next."""


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    rounds: int  # of every batch
    budget: float  # about so many seconds for each contender; a slow one takes part in fewer rounds
    memory: int | None = None  # the bytes that this process may hold; None: any

    def rounds_of(self, seconds: float) -> int:
        """The rounds of a contender whose step takes so long."""
        return min(self.rounds, max(LEAST_ROUNDS, int(self.budget / max(seconds, 1e-9))))


def draw_turns(rounds_of: Mapping[int, int], rounds: int, seed: int = 0) -> Iterator[list[int]]:
    """Who steps in each round: everyone at most once, in an order drawn anew, for each follows others then.

    Args:
        rounds_of: in how many of the rounds each takes part; these are spread out evenly.
        rounds: how many rounds there are.
        seed: draws the orders.
    """
    draw = random.Random(seed)
    for k in range(rounds):
        due = [one for one, n in rounds_of.items() if (k + 1) * n // rounds > k * n // rounds]
        draw.shuffle(due)
        yield due


class Session:
    """Measures contenders on an arena.

    Args:
        arena: what they step.
        anchors: those who take part in every batch.
        others: the rest.
        effort: how much to measure.
        progress: who is told.
    """

    def __init__(
        self,
        arena: Arena,
        anchors: Sequence[Contender],
        others: Sequence[Contender],
        effort: Effort,
        progress: Progress,
    ) -> None:
        self.measurements = [Measurement(contender) for contender in (*anchors, *others)]
        self._anchors = range(len(anchors))
        self._arena, self._effort, self._progress = arena, effort, progress
        self._round = 0

    def run(self) -> None:
        """Measures; whatever interrupts it, the measurements are valid as far as they are."""
        self._progress.expect(len(self.measurements))
        anchors: dict[int, Stepper] = {}
        for one in self._anchors:
            self._set_up(one, anchors)
        waiting = list(range(len(self._anchors), len(self.measurements)))
        while True:
            batch = dict(anchors)
            while waiting and (len(batch) == len(anchors) or self._has_room()):
                self._set_up(waiting.pop(0), batch)
            self._take_turns(batch)
            if not waiting:
                return
            del batch
            gc.collect()

    def _has_room(self) -> bool:
        held = resident_memory()
        return held is None or self._effort.memory is None or held < self._effort.memory

    def _set_up(self, one: int, batch: dict[int, Stepper]) -> None:
        """Adds a contender to a batch if it can be set up."""
        measurement = self.measurements[one]
        contender = measurement.contender
        self._progress.proceed(f"set up {contender.label}")
        if not contender.installed:
            measurement.status, measurement.reason = NOT_INSTALLED, f"pip install {contender.package}"
            return
        with warnings.catch_warnings(), _fault_of(measurement):
            warnings.simplefilter("ignore")  # other packages' remarks on themselves
            stepper = contender.make(self._arena)
            measurement.first_step = _timed(stepper)
            measurement.state_bytes = stepper.state_bytes()
            _timed(stepper)  # some compile a second time, for state that is there now
            measurement.temporaries = stepper.temporaries()
            batch[one] = stepper

    def _take_turns(self, batch: Mapping[int, Stepper]) -> None:
        rounds = self._effort.rounds
        rounds_of = {one: self._rounds_of(one, stepper) for one, stepper in batch.items()}
        self._progress.expect(rounds)
        gc.collect()
        gc.disable()
        try:
            for k, turn in enumerate(draw_turns(rounds_of, rounds, seed=self._round)):
                self._progress.proceed(f"round {k + 1} of {rounds}, {len(batch)} contenders")
                for measurement, stepper in ((self.measurements[one], batch[one]) for one in turn):
                    if measurement.status != FAILED:
                        with _fault_of(measurement):
                            measurement.seconds[self._round] = _timed(stepper)
                            measurement.status = MEASURED
                self._round += 1
        finally:
            gc.enable()

    def _rounds_of(self, one: int, stepper: Stepper) -> int:
        if one in self._anchors:
            return self._effort.rounds
        expected = 0.0
        with _fault_of(self.measurements[one]):
            expected = min(_timed(stepper) for _ in range(2))
        return self._effort.rounds_of(expected)


@contextmanager
def _fault_of(measurement: Measurement) -> Iterator[None]:
    """One contender's fault does not end the others' run."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        measurement.status, measurement.reason = FAILED, f"{type(error).__name__}: {lines[0]}"


def _timed(stepper: Stepper) -> float:
    """The seconds of one step, without its preparation."""
    stepper.prepare()
    began = time.perf_counter()
    stepper.step()
    return time.perf_counter() - began
