"""Taking the times in turns: in every round each contender makes one step, so that the machine's drift hits all alike.

What is measured at a time has to fit in memory beside one another. Contenders that do not are measured in batches,
one after another, and the anchors (the reference and the machine's limits) take part in every batch.
"""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fusedbun.tools.bench.arena import Arena
from fusedbun.tools.bench.contenders import Contender, Stepper
from fusedbun.tools.shared.machine import resident_memory

LEAST_ROUNDS = 3
MEASURED, NOT_INSTALLED, FAILED, PENDING = "measured", "not installed", "failed", "not reached"


@dataclass
class Measurement:
    """What is known of a contender; it grows.

    Args:
        contender: who it is.
        status: one of the four above.
        reason: why there are no times, in one line.
        first_step: the seconds of the first step, which allocates and compiles.
        state_bytes: the bytes of state.
        temporaries: the bytes of temporaries of a step.
        seconds: the time of a step, by the number of the round.
    """

    contender: Contender
    status: str = PENDING
    reason: str | None = None
    first_step: float | None = None
    state_bytes: int | None = None
    temporaries: int | None = None
    seconds: dict[int, float] = field(default_factory=dict)


class Progress(Protocol):
    """Who is told how far the measuring is."""

    def expect(self, steps: int) -> None:
        """So many more calls of `advance` are to come."""

    def advance(self, doing: str) -> None:
        """A part is done; this is the next."""


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Args:
        rounds: rounds of every batch.
        budget: about so many seconds for each contender; a slow one takes part in fewer rounds.
        memory: the bytes that this process may hold; None: any.
    """

    rounds: int
    budget: float
    memory: int | None = None

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
        self._progress.advance(f"set up {contender.label}")
        if not contender.installed:
            measurement.status, measurement.reason = NOT_INSTALLED, f"pip install {contender.package}"
            return
        with warnings.catch_warnings(), self._fault_of(measurement):
            warnings.simplefilter("ignore")  # other packages' remarks on themselves
            stepper = contender.make(self._arena)
            measurement.first_step = timed(stepper)
            measurement.state_bytes = stepper.state_bytes()
            timed(stepper)  # some compile a second time, for state that is there now
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
                self._progress.advance(f"round {k + 1} of {rounds}, {len(batch)} contenders")
                for one in turn:
                    self._take_turn(self.measurements[one], batch[one])
                self._round += 1
        finally:
            gc.enable()

    def _take_turn(self, measurement: Measurement, stepper: Stepper) -> None:
        if measurement.status == FAILED:
            return
        with self._fault_of(measurement):
            measurement.seconds[self._round] = timed(stepper)
            measurement.status = MEASURED

    def _rounds_of(self, one: int, stepper: Stepper) -> int:
        if one in self._anchors:
            return self._effort.rounds
        expected = 0.0
        with self._fault_of(self.measurements[one]):
            expected = min(timed(stepper) for _ in range(2))
        return self._effort.rounds_of(expected)

    @contextmanager
    def _fault_of(self, measurement: Measurement) -> Iterator[None]:
        """One contender's fault does not end the others' run."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            measurement.status, measurement.reason = FAILED, f"{type(error).__name__}: {lines[0]}"


def timed(stepper: Stepper, clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds of one step, without its preparation."""
    stepper.prepare()
    began = clock()
    stepper.step()
    return clock() - began
