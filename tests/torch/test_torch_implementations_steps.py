"""Between the steps of an implementation everything may change, and what has changed is seen."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from makers import MAKERS, copies, parameters, run, set_gradients
from twins import assert_near_run, sweep_of_makes, twins

from fusedbun import ChainOptimizer, Fusedbun, MupAdamW
from fusedbun.compiler.cpp import native
from fusedbun.transforms import Centralize

# What changes between steps


def some_without_gradient(optimizer, params):
    params[1].grad = params[3].grad = None


def none_with_gradient(optimizer, params):
    optimizer.zero_grad()


def state_deleted(optimizer, params):
    del optimizer.state[params[2]]


def all_state_deleted(optimizer, params):
    optimizer.state.clear()


def state_replaced(optimizer, params):
    optimizer.state[params[2]] = {key: 2 * value for key, value in optimizer.state[params[2]].items()}


def state_moved(optimizer, params):
    for value in optimizer.state[params[2]].values():
        value.data = value.data.clone()


def state_transposed_in_place(optimizer, params):
    """Another tensor at the same address."""
    for key, value in optimizer.state[params[4]].items():
        if value.shape == params[4].shape:
            optimizer.state[params[4]][key] = value.T


def state_loaded(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def data_reassigned(optimizer, params):
    params[2].data = 2 * params[2].data


def data_transposed_in_place(optimizer, params):
    """At the same address with other strides, as its state and gradient."""
    square = params[4]
    square.data = square.data.T


def strides_changed(optimizer, params):
    params[3].data = params[3].data.transpose(0, 1).contiguous().transpose(0, 1)


def gradient_of_other_strides(optimizer, params):
    params[3].grad = params[3].grad.transpose(0, 1).contiguous().transpose(0, 1)


def rate_changed(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.03


def rate_a_tensor(optimizer, params):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.03, dtype=torch.float64)


def rate_filled(optimizer, params):
    rate_a_tensor(optimizer, params)
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.5)


def numbers_changed(optimizer, params):
    group = optimizer.param_groups[0]
    for name in ("betas", "momentum_beta", "beta_decay", "momentum.beta", "momentum"):
        if name in group:
            group[name] = (0.5, 0.75) if name == "betas" else 0.5


def momentum_switched_off(optimizer, params):
    for name in {"momentum_beta", "momentum.beta", "momentum"} & optimizer.param_groups[0].keys():
        optimizer.param_groups[0][name] = 0.0


def climbing(optimizer, params):
    optimizer.param_groups[0]["maximize"] = True


def group_added(optimizer, params):
    params += parameters((3, 2))
    set_gradients(params[-1:], 9)
    optimizer.add_param_group({"params": params[-1:], "lr": 0.3})


def parameter_removed(optimizer, params):
    del optimizer.state[optimizer.param_groups[0]["params"].pop(1)]


CHANGES = [
    some_without_gradient,
    none_with_gradient,
    state_deleted,
    all_state_deleted,
    state_replaced,
    state_moved,
    state_transposed_in_place,
    state_loaded,
    data_reassigned,
    data_transposed_in_place,
    strides_changed,
    gradient_of_other_strides,
    rate_changed,
    rate_a_tensor,
    rate_filled,
    numbers_changed,
    momentum_switched_off,
    climbing,
    group_added,
    parameter_removed,
]


@pytest.mark.parametrize("change", CHANGES)
@sweep_of_makes
def test_a_change_between_steps_is_seen(make, change):
    """At once, and when it is taken back by the next gradients."""
    optimizers = twins(make, parameters((), (5,), (4, 3), (2, 3, 4), (3, 3)))
    for optimizer in optimizers:
        params = list(optimizer.param_groups[0]["params"])
        run(optimizer, 2)
        set_gradients(params, 2)
        change(optimizer, params)
        optimizer.step()
        run(optimizer, range(3, 5))
    assert_near_run(*optimizers)


def test_parameters_get_their_first_gradients_one_by_one():
    optimizers = twins(MAKERS["sm3-momentum"], parameters((4, 3), (5,), (2, 2)))
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        for step in range(4):
            set_gradients(params[: step + 1], step)
            optimizer.step()
    assert_near_run(*optimizers)


def test_hyper_parameters_that_changed_before_another_parameter_joins():
    """Those that were stepped before keep to the new ones."""
    optimizers = twins(Fusedbun, parameters((4, 3), (5,)), Lambda=0.1)
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        set_gradients(params[:1], 0)
        optimizer.step()
        optimizer.param_groups[0]["Lambda"] = 0.5
        for step in (1, 2, 3):
            set_gradients(params[:step], step)
            optimizer.step()
    assert_near_run(*optimizers)


def test_each_parameter_may_have_numbers_of_its_own_with_one_kernel():
    """Rules that say something else of each parameter; hyper-parameters that move with every step."""
    types = {f"p{i}": ("weight", i + 1) for i in range(6)}
    values = parameters(*[(4, 3)] * 6)
    optimizers = []
    for implementation in ("kernel", "definition"):
        named = list(zip(types, copies(values), strict=True))
        optimizers.append(MupAdamW(named, lr=0.1, mup=types, weight_decay=0.1, implementation=implementation))
        run(optimizers[-1], 1)
    known = len(native._KERNELS)
    for step in range(1, 4):
        for optimizer in optimizers:
            optimizer.param_groups[0].update(lr=0.1 / step, betas=(0.9 - 0.1 * step, 0.99))
            run(optimizer, range(step, step + 1))
    assert_near_run(*optimizers)
    assert len(native._KERNELS) == known


def test_a_steady_step_asks_no_rule_and_calls_the_driver_once(monkeypatch):
    asked, calls = [], []

    def rule(path, param):
        asked.append(path)
        return "weight"

    params = parameters((4, 3), (5,), (2, 2))
    optimizer = MupAdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], lr=0.1, mup=rule)
    step = native.Leaves.step
    monkeypatch.setattr(native.Leaves, "step", lambda self, *args: (calls.append(args), step(self, *args)))
    run(optimizer, 1)
    asked.clear()
    for rate in (0.1, 0.2, 0.3):
        optimizer.param_groups[0]["lr"] = rate
        run(optimizer, 1)
    assert asked == []
    assert len(calls) == 4


def test_leaves_are_not_described_anew_for_other_numbers(monkeypatch):
    """As schedules give them that cycle the momentum."""
    described, describe = [], native.Leaves.__init__
    monkeypatch.setattr(
        native.Leaves, "__init__", lambda self, *args: (described.append(args), describe(self, *args))[1]
    )
    optimizer = Fusedbun(parameters((4, 3), (5,)), lr=0.1)
    for step in range(4):
        optimizer.param_groups[0].update(lr=0.1 / (step + 1), momentum=0.9 - 0.1 * step)
        run(optimizer, range(step, step + 1))
    assert len(described) == 1


def test_what_keeps_no_state_may_become_a_stack():
    optimizers = twins(partial(ChainOptimizer, transforms=[Centralize()], lr=0.1), parameters((3, 4, 5)))
    for optimizer in optimizers:
        for step, stacked in enumerate((0, 1, 1, 0)):
            optimizer.param_groups[0]["stacked"] = stacked
            run(optimizer, range(step, step + 1))
    assert_near_run(*optimizers)


def test_gradients_are_let_go_after_the_step():
    (p,) = parameters((4, 3))
    optimizer = Fusedbun([p], 0.1)
    run(optimizer, 2)
    gone = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert gone() is None


def test_an_optimizer_is_let_go():
    optimizer = Fusedbun(parameters((4, 3)), 0.1)
    run(optimizer, 2)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
