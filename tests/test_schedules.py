"""SM3's schedule, one definition for both frameworks."""

import jax
import numpy as np
import pytest
import torch

import fusedbun
import fusedbun_jax

WARMUP, TOTAL = 20, 200


def by_hand(t):
    return max(0.0, min(1.0, (t / WARMUP) ** 2, (TOTAL - t) / (0.1 * TOTAL)))


@pytest.mark.parametrize("t", [0, 1, 10, 19, 20, 21, 100, 180, 181, 190, 199, 200, 201, 1000])
def test_is_the_formula_in_both_frameworks(t):
    assert fusedbun.sm3_schedule(WARMUP, TOTAL)(t) == pytest.approx(by_hand(t), rel=1e-12)
    in_optax = jax.jit(fusedbun_jax.sm3_schedule(3.0, WARMUP, TOTAL))(t)
    assert float(in_optax) == pytest.approx(3.0 * by_hand(t), rel=1e-6)


def test_without_warmup():
    schedule = fusedbun.sm3_schedule(0, 100)
    assert [schedule(t) for t in (0, 50, 90, 95, 100)] == [1.0, 1.0, 1.0, 0.5, 0.0]
    assert float(fusedbun_jax.sm3_schedule(1.0, 0, 100)(0)) == 1.0


def test_drives_a_torch_optimizer():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedbun.SM3([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, fusedbun.sm3_schedule(WARMUP, TOTAL))
    rates = []
    for _ in range(TOTAL + 2):
        rates.append(optimizer.param_groups[0]["lr"])
        p.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates, [0.5 * by_hand(t) for t in range(TOTAL + 2)])


@pytest.mark.parametrize(
    ("warmup", "total", "error", "message"),
    [
        (-1, 10, ValueError, "warmup must be an integer from 0 up, but it is -1"),
        (1.5, 10, TypeError, "warmup must be an integer from 0 up, but it is 1.5"),
        (1, 0, ValueError, "total must be an integer from 1 up, but it is 0"),
    ],
)
def test_bad_arguments(warmup, total, error, message):
    with pytest.raises(error, match=message):
        fusedbun.sm3_schedule(warmup, total)
    with pytest.raises(error, match=message):
        fusedbun_jax.sm3_schedule(0.1, warmup, total)
