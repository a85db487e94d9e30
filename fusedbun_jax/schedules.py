"""SM3's learning-rate schedule for optax."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from fusedbun.hyper import NonNegative, checked
from fusedbun.schedules import Steps, Warmup, multiplier


@checked
def sm3_schedule(learning_rate: NonNegative, warmup: Warmup, total: Steps) -> optax.Schedule:
    """SM3's schedule: a quadratic rise to the learning rate, and a linear fall to 0 over the last tenth.

        learning_rate * min((t/warmup)**2, (total - t) / (0.1*total)), the factor kept within [0, 1]

    Args:
        learning_rate: the largest learning rate, in [0, inf).
        warmup: the steps of the rise, from 0 (none) up.
        total: all steps, from 1 up; from then on the learning rate is 0.
    """
    namespace: Any = jnp
    return lambda count: learning_rate * multiplier(namespace, count, warmup, total)
