"""What `fusedbun bench` measured, as numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedbun.tools.bench.contenders import LIMIT
from fusedbun.tools.bench.measure import Measurement
from fusedbun.tools.bench.shapes import Workload


@dataclass
class Case:
    """The measurements of a workload on a number of threads; the first is the reference, whom all are divided by."""

    workload: Workload
    threads: int
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def reference(self) -> Measurement:
        return self.measurements[0]

    @property
    def title(self) -> str:
        workload, threads = self.workload, f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{workload.title}: {workload.parameters:,} parameters in {len(workload.shapes)} tensors, {threads}"

    def by_path(self) -> dict[str, list[Measurement]]:
        """Those with times, path by path; the machine's limit is the first of the paths."""
        order = dict.fromkeys([LIMIT, *(one.contender.path for one in [*self.measurements[1:], self.reference])])
        timed = [one for one in self.measurements if one.seconds]
        found = {path: [one for one in timed if one.contender.path == path] for path in order}
        return {path: members for path, members in found.items() if members}

    def median(self, one: Measurement) -> float | None:
        """The median of its times, in seconds."""
        return statistics.median(one.seconds.values()) if one.seconds else None

    def spread(self, one: Measurement) -> float | None:
        """The distance between the quartiles of its times, in seconds."""
        if len(one.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(one.seconds.values(), n=4, method="inclusive")
        return high - low

    def ratio(self, one: Measurement) -> float | None:
        """Its time over the reference's: the median of the rounds in which both stepped."""
        return quotient(one.seconds, self.reference.seconds)

    def state(self, one: Measurement) -> float | None:
        """The bytes of state per parameter."""
        return None if one.state_bytes is None else one.state_bytes / self.workload.parameters

    def traffic(self, one: Measurement) -> float | None:
        """The bytes per parameter that the step has to move."""
        state = self.state(one)
        return None if state is None else one.contender.bytes_per_parameter(state)

    def bandwidth(self, one: Measurement) -> float | None:
        """These bytes over the median time, in bytes a second."""
        traffic, seconds = self.traffic(one), self.median(one)
        return None if traffic is None or not seconds else traffic * self.workload.parameters / seconds

    def share(self, one: Measurement) -> float | None:
        """Its bandwidth over that of the limit whose bytes are nearest, in the rounds in which both stepped."""
        traffic, limits = self.traffic(one), self.by_path().get(LIMIT)
        if traffic is None or not limits:
            return None
        nearest = min(limits, key=lambda limit: abs((self.traffic(limit) or 0) - traffic))
        slower = quotient(one.seconds, nearest.seconds)
        return traffic / (self.traffic(nearest) or 0) / slower if slower else None

    def report(self) -> dict[str, Any]:
        """The case for a JSON file."""
        return {
            "workload": self.workload.name,
            "title": self.workload.title,
            "tensors": len(self.workload.shapes),
            "parameters": self.workload.parameters,
            "threads": self.threads,
            "reference": self.reference.contender.label,
            "contenders": [self.numbers(one) for one in self.measurements],
        }

    def numbers(self, one: Measurement) -> dict[str, Any]:
        """A contender for a JSON file."""
        return {
            "path": one.contender.path,
            "name": one.contender.name,
            "status": one.status,
            "reason": one.reason,
            "median_ms": _times(1e3, self.median(one)),
            "interquartile_ms": _times(1e3, self.spread(one)),
            "bytes_per_parameter": self.traffic(one),
            "gigabytes_per_second": _times(1e-9, self.bandwidth(one)),
            "share_of_limit": self.share(one),
            "ratio_to_reference": self.ratio(one),
            "temporary_bytes": one.temporaries,
            "first_step_ms": _times(1e3, one.first_step),
            "state_bytes_per_parameter": self.state(one),
            "rounds": list(one.seconds),
            "ms": [round(1e3 * seconds, 6) for seconds in one.seconds.values()],
        }


@dataclass
class Results:
    """Every case so far; `interrupted` where some are missing or not finished."""

    settings: Mapping[str, Any]  # as a JSON file has them
    machine: Mapping[str, Any]
    cases: list[Case] = field(default_factory=list)
    interrupted: bool = False

    @property
    def measured(self) -> list[Case]:
        """The cases with a time."""
        return [case for case in self.cases if any(one.seconds for one in case.measurements)]

    def report(self) -> dict[str, Any]:
        """The results for a JSON file."""
        return {
            "command": "fusedbun bench",
            "settings": self.settings,
            "machine": self.machine,
            "interrupted": self.interrupted,
            "cases": [case.report() for case in self.measured],
        }


def quotient(times: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """The median of the quotients of two contenders' times in the rounds that both have; None where there is none."""
    both = [seconds / others[k] for k, seconds in times.items() if others.get(k)]
    return statistics.median(both) if both else None


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
