"""The stress benchmark runs, in small: every ordeal is one, and what goes wrong is counted."""

import math
from dataclasses import replace

import pytest
import torch
from sweeps import only, sweep

from benchmarks import stress

SMALL = {"rare rows": stress.rare_rows, "waking": stress.waking, "thin": stress.thin}


@sweep("make", stress.CONTENDERS.values(), short=only(stress.CONTENDERS["FusedbunW"]), ids=stress.CONTENDERS)
@pytest.mark.parametrize("trial", SMALL.values(), ids=SMALL)
def test_a_small_problem_is_learnt(trial, make):
    found = stress.run(stress.Ordeal("", trial, 1e-2, 50, share=stress.constant), make, 0)
    assert not found["diverged"]
    assert 0 < found["largest_step"] < 20
    assert math.isfinite(found["loss"])


def test_what_wakes_has_slept():
    trial = stress.waking(0)
    for step, is_awake in ((999, False), (1000, True)):
        ((_, weight),) = trial.params
        weight.grad = None
        trial.loss(step).backward()
        assert bool(weight.grad[:, 3].any()) == is_awake
        assert bool(weight.grad[5].any()) == is_awake


def test_gradients_are_spoilt_in_the_step_that_is_said():
    task = next(x for x in stress.ordeals() if x.title == "no warm-up, digits").trial.args[0]
    short = replace(task, steps=4)
    ones = torch.ones(2)
    assert stress.jumping(short, 0).spoil(2, ones).tolist() == [1000.0, 1000.0]
    assert stress.jumping(short, 0).spoil(1, ones).tolist() == [1.0, 1.0]
    assert stress.of_task(short, 0, zeros=0).spoil(0, ones).tolist() == [0.0, 0.0]


def test_divergence_is_counted():
    def make(params, lr):
        return torch.optim.SGD([p for _, p in params], 1e6)

    ordeal = stress.Ordeal("", stress.thin, 1e6, 5, share=stress.constant)
    found = stress.summary([stress.run(ordeal, make, seed) for seed in range(2)])
    assert found["diverged"] == found["trials"] == 2
    assert "2 of 2" in stress.cell(found)


def test_every_ordeal_has_a_title_of_its_own():
    ordeals = [*stress.ordeals()]
    assert len(ordeals) == len({x.title for x in ordeals})
    assert any(x.seeds == 100 for x in ordeals)
