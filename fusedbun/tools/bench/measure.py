"""Taking the times in turns: in every round each contender makes one step, so that the machine's drift hits all alike.

What is measured at a time has to fit in memory beside one another. Contenders that do not are measured in batches,
one after another, and the anchors (the reference and the machine's limits) take part in every batch.
"""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fusedbun.tools.bench.contenders import Arena, Contender, Stepper
from fusedbun.tools.shared.machine import resident_memory

T = TypeVar("T")

LEAST_ROUNDS = 3
MEASURED, NOT_INSTALLED, FAILED, PENDING = "measured", "not installed", "failed", "not reached"


@dataclass(eq=False)
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

    def expect(self, steps: int) -> None: ...  # so many more calls of `proceed` are to come
    def proceed(self, doing: str) -> None: ...  # a part is done; this is the next


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    rounds: int  # of every batch
    budget: float  # about so many seconds for each contender; a slow one takes part in fewer rounds
    memory: int | None = None  # the bytes that this process may hold; None: any

    def rounds_of(self, seconds: float) -> int:
        """The rounds of a contender whose step takes so long."""
        return min(self.rounds, max(LEAST_ROUNDS, int(self.budget / max(seconds, 1e-9))))


def draw_turns(rounds_of: Mapping[T, int], rounds: int, seed: int = 0) -> Iterator[list[T]]:
    """Who steps in each round: everyone at most once, in an order drawn anew, for each follows others then.

    Each takes part in so many of the rounds, spread out evenly.
    """
    draw = random.Random(seed)
    for k in range(rounds):
        due = [one for one, n in rounds_of.items() if (k + 1) * n // rounds > k * n // rounds]
        draw.shuffle(due)
        yield due


class Session:
    """Measures contenders on an arena, some of them, the anchors, in every batch."""

    def __init__(
        self, arena: Arena, anchors: list[Contender], others: list[Contender], effort: Effort, progress: Progress
    ) -> None:
        self.measurements = [Measurement(contender) for contender in (*anchors, *others)]
        self._anchors = self.measurements[: len(anchors)]
        self._arena, self._effort, self._progress = arena, effort, progress
        self._round = 0

    def run(self) -> None:
        """Measures; whatever interrupts it, the measurements are valid as far as they are."""
        self._progress.expect(len(self.measurements))
        anchors: dict[Measurement, Stepper] = {}
        for one in self._anchors:
            self._set_up(one, anchors)
        waiting = self.measurements[len(self._anchors) :]
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

    def _set_up(self, one: Measurement, batch: dict[Measurement, Stepper]) -> None:
        """Adds a contender to a batch if it can be set up."""
        self._progress.proceed(f"set up {one.contender.label}")
        if not one.contender.installed:
            one.status, one.reason = NOT_INSTALLED, f"pip install {one.contender.package}"
            return
        with warnings.catch_warnings(), _fault_of(one):
            warnings.simplefilter("ignore")  # other packages' remarks on themselves
            stepper = one.contender.make(self._arena)
            one.first_step = _timed(stepper)
            one.state_bytes = stepper.state_bytes()
            _timed(stepper)  # some compile a second time, for state that is there now
            one.temporaries = stepper.temporaries()
            batch[one] = stepper

    def _take_turns(self, batch: Mapping[Measurement, Stepper]) -> None:
        rounds = self._effort.rounds
        rounds_of = {one: self._rounds_of(one, stepper) for one, stepper in batch.items()}
        self._progress.expect(rounds)
        gc.collect()
        gc.disable()
        try:
            for k, turn in enumerate(draw_turns(rounds_of, rounds, seed=self._round)):
                self._progress.proceed(f"round {k + 1} of {rounds}, {len(batch)} contenders")
                for one in turn:
                    if one.status != FAILED:
                        with _fault_of(one):
                            one.seconds[self._round] = _timed(batch[one])
                            one.status = MEASURED
                self._round += 1
        finally:
            gc.enable()

    def _rounds_of(self, one: Measurement, stepper: Stepper) -> int:
        expected = 0.0
        if one not in self._anchors:
            with _fault_of(one):
                expected = min(_timed(stepper) for _ in range(2))
        return self._effort.rounds_of(expected)


@contextmanager
def _fault_of(one: Measurement) -> Iterator[None]:
    """One contender's fault does not end the others' run."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        one.status, one.reason = FAILED, f"{type(error).__name__}: {lines[0]}"


def _timed(stepper: Stepper) -> float:
    """The seconds of one step, without its preparation."""
    stepper.prepare()
    began = time.perf_counter()
    stepper.step()
    return time.perf_counter() - began
