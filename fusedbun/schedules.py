"""SM3's learning-rate schedule (Anil, Gupta, Koren, Singer 2019, arXiv 1901.11150), once for every framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from fusedbun.hyper import Whole, checked
from fusedbun.transform import Array, Namespace

Steps = Annotated[int, Whole(1)]
Warmup = Annotated[int, Whole(0)]


def multiplier(xp: Namespace, t: Array, warmup: int, total: int) -> Array:
    """The share of the learning rate in step t: a quadratic rise, and a linear fall over the last tenth.

    min((t/warmup)**2, (total - t) / (0.1*total)), kept within [0, 1]          no rise where warmup is 0
    """
    rise = (t / warmup) ** 2 if warmup else 1.0
    fall = (total - t) / (0.1 * total)
    return xp.minimum(xp.maximum(xp.minimum(fall, rise), 0.0), 1.0)


@checked
def sm3_schedule(warmup: Warmup, total: Steps) -> Callable[[int], float]:
    """SM3's schedule for `torch.optim.lr_scheduler.LambdaLR`, which multiplies each group's learning rate by it.

        min((t/warmup)**2, (total - t) / (0.1*total)), kept within [0, 1]

    >>> schedule = sm3_schedule(warmup=10, total=100)
    >>> [schedule(t) for t in (0, 5, 10, 95, 100, 200)]
    [0.0, 0.25, 1.0, 0.5, 0.0, 0.0]

    Args:
        warmup: the steps of the rise, from 0 (none) up.
        total: all steps, from 1 up; from then on the learning rate is 0.
    """
    namespace: Any = np
    return lambda t: float(multiplier(namespace, t, warmup, total))
