"""Saving and loading: a run continues to the last bit; what does not fit is refused and changes nothing."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from makers import (
    SHAPES,
    WITH_STATE,
    assert_same,
    assert_same_run,
    copies,
    every_optimizer,
    every_optimizer_with_state,
    floating,
    full_size,
    parameters,
    recommended,
    run,
    states,
    sweep_of_dtypes,
    sweep_of_optimizers_with_state,
    unchanged,
)

from fusedbun import ChainOptimizer, Fusedbun
from fusedbun.transforms import Momentum


def through_file(saved):
    """What torch.load gives back of what torch.save wrote, with code execution off."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(make, dtype=torch.float32, steps=3):
    optimizer = make(parameters(*SHAPES, dtype=dtype), lr=0.1)
    run(optimizer, steps)
    return optimizer


def untrained(make, optimizer, **options):
    """An optimizer without state over copies of the other's parameters."""
    return make(copies([p for group in optimizer.param_groups for p in group["params"]]), **{"lr": 0.5, **options})


# Continuing


@sweep_of_dtypes((torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_a_saved_run_continues_to_the_last_bit(make, dtype):
    whole = trained(make, dtype)
    resumed = untrained(make, whole)
    resumed.load_state_dict(through_file(whole.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.1
    assert_same_run(resumed, whole)
    run(whole, range(3, 6))
    run(resumed, range(3, 6))
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@every_optimizer
def test_a_copied_optimizer_continues_to_the_last_bit(make, clone):
    whole = trained(make)
    other = clone(whole)
    assert type(other) is type(whole)
    assert_same_run(other, whole)
    run(whole, range(3, 6))
    assert all((p != q).any() for p, q in zip(*(o.param_groups[0]["params"] for o in (whole, other)), strict=True))
    run(other, range(3, 6))
    assert_same_run(other, whole)
    other.param_groups[0]["lr"] = -1.0
    with unchanged(other), pytest.raises(ValueError, match="lr must lie in"):
        other.step()


@sweep_of_dtypes((torch.bfloat16, torch.float16), WITH_STATE)
def test_the_float32_state_of_smaller_parameters_is_not_rounded(make, dtype):
    whole = trained(make, dtype)
    resumed = untrained(make, whole)
    resumed.load_state_dict(whole.state_dict())
    for state in states(whole):
        assert all(value.dtype == torch.float32 for value in floating(state))
        assert any((value != value.to(dtype)).any() for value in floating(state))  # rounding would show
    assert_same(states(resumed), states(whole))


@every_optimizer
def test_loaded_state_shares_no_memory_with_the_saved(make):
    whole = trained(make)
    saved = whole.state_dict()
    kept = copy.deepcopy(saved)
    resumed = untrained(make, whole)
    resumed.load_state_dict(saved)
    run(resumed, range(3, 6))
    assert_same(saved["state"], kept["state"])
    assert saved["param_groups"] == kept["param_groups"]
    resumed.param_groups[0]["lr"] = 0.7
    assert whole.param_groups[0]["lr"] == 0.1


@every_optimizer
def test_loaded_state_has_its_parameters_strides(make):
    (saved,), (param,) = parameters((2, 3, 4, 5)), parameters((2, 3, 4, 5))
    param = param.detach().to(memory_format=torch.channels_last).requires_grad_()
    whole, resumed = make([saved], lr=0.1), make([param], lr=0.1)
    run(whole, 2)
    resumed.load_state_dict(whole.state_dict())
    assert all(value.stride() == param.stride() for value in full_size(resumed, param))
    assert_same(states(resumed), states(whole))


@every_optimizer
def test_state_moves_between_precisions(make):
    """State saved for float32 parameters serves float64 ones in float64, if that is asked for."""
    whole = trained(make)
    double = make([p.detach().double().requires_grad_() for p in whole.param_groups[0]["params"]], lr=0.1)
    if any(x.is_floating_point() for state in states(whole) for x in state.values()):
        with unchanged(double), pytest.raises(ValueError, match=r"is float32, but it is stored in float64; .*convert"):
            double.load_state_dict(whole.state_dict())
        with pytest.warns(UserWarning, match="the saved state is converted"):
            double.load_state_dict(whole.state_dict(), convert=True)
    else:
        double.load_state_dict(whole.state_dict())
    assert_same(
        states(double),
        [{k: v.double() if v.is_floating_point() else v for k, v in state.items()} for state in states(whole)],
    )


@every_optimizer
def test_state_saved_before_the_first_step_is_empty(make):
    optimizer = make(parameters(*SHAPES), lr=0.1)
    saved = through_file(optimizer.state_dict())
    assert saved["state"] == {}
    run(optimizer, 2)
    optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_groups_saved_before_an_argument_existed_get_its_default():
    whole = trained(recommended)
    saved = whole.state_dict()
    del saved["param_groups"][0]["clip_rms"], saved["param_groups"][0]["maximize"]
    resumed = untrained(recommended, whole)
    resumed.load_state_dict(saved)
    assert_same_run(resumed, whole)
    assert resumed.param_groups[0]["clip_rms"] is None
    assert resumed.param_groups[0]["maximize"] is False


@pytest.mark.parametrize(
    ("make", "beta", "kept"),
    [
        (Fusedbun, "momentum_beta", {"sm3_accumulate.axis0"}),
        (partial(ChainOptimizer, transforms=[Momentum(0.9)]), "momentum.beta", set()),
    ],
)
def test_state_follows_the_loaded_hyper_parameters(make, beta, kept):
    """A momentum in the file is left out where the file's groups have none."""
    whole = trained(make)
    saved = whole.state_dict()
    saved["param_groups"][0][beta] = 0.0
    resumed = untrained(make, whole)
    resumed.load_state_dict(saved)
    assert [state.keys() & {"momentum.moment", "sm3_accumulate.axis0"} for state in states(resumed)] == [kept] * len(
        SHAPES
    )


# Hooks


@sweep_of_optimizers_with_state
def test_load_hooks_of_the_users_run(make):
    """A pre-hook's dict is the one that is loaded; a post-hook sees the state as it stays."""
    whole = trained(make, torch.bfloat16)
    resumed, seen = untrained(make, whole), []

    def unwrap(optimizer, saved):
        return {**saved["model"], "state": {k: v for k, v in saved["model"]["state"].items() if k != 1}}

    def look(optimizer):
        seen.append((optimizer is resumed, {v.dtype for state in states(optimizer) for v in floating(state)}))

    resumed.load_state_dict(whole.state_dict())  # leaves nothing behind that would run before the hooks
    resumed.register_load_state_dict_pre_hook(unwrap)
    resumed.register_load_state_dict_post_hook(look)
    resumed.load_state_dict({"model": whole.state_dict()})
    assert seen == [(True, {torch.float32})]
    assert_same(states(resumed), [state for i, state in enumerate(states(whole)) if i != 1])
    resumed.load_state_dict({"model": whole.state_dict()})  # and again, each hook once
    assert len(seen) == 2


@every_optimizer
def test_a_pre_hook_that_fails_changes_nothing(make):
    whole, resumed = trained(make), trained(make, steps=1)
    handle = resumed.register_load_state_dict_pre_hook(lambda o, saved: 1 / 0)
    with unchanged(resumed), pytest.raises(ZeroDivisionError):
        resumed.load_state_dict(whole.state_dict())
    handle.remove()
    resumed.load_state_dict(whole.state_dict())
    assert_same(states(resumed), states(whole))


# What does not fit


def another_optimizer(saved):
    optimizer = torch.optim.AdamW(parameters(*SHAPES))
    run(optimizer, 1)
    return optimizer.state_dict()


def first_slot(saved):
    return saved["state"][2], next(iter(saved["state"][2]))


def other_shape(saved):
    state, key = first_slot(saved)
    state[key] = torch.zeros(4, 4)
    return saved


def no_tensor(saved):
    state, key = first_slot(saved)
    state[key] = 0.0
    return saved


def other_slot(saved):
    saved["state"][2]["second_moment.full"] = torch.zeros(4, 3)
    return saved


def other_value(name, value):
    def change(saved):
        saved["param_groups"][0][name] = value
        return saved

    return change


BAD_STATES = {
    "another optimizer's": (another_optimizer, ValueError, "'exp_avg', which no transformation.*another optimizer"),
    "a model's": (lambda saved: torch.nn.Linear(2, 2).state_dict(), ValueError, "'state' and 'param_groups'.*'weight'"),
    "another slot": (other_slot, ValueError, "second_moment.full"),
    "negative lr": (other_value("lr", -0.25), ValueError, r"lr must lie in \[0, inf\), but it is -0.25"),
    "maximize in words": (other_value("maximize", "yes"), TypeError, "maximize must be True or False, but it is 'yes'"),
    "fewer groups": (lambda saved: {**saved, "param_groups": []}, ValueError, r"\[\] parameters.*have \[4\]"),
    "fewer parameters": (other_value("params", [0, 1]), ValueError, r"\[2\] parameters.*have \[4\]"),
}


BAD_SLOTS = {
    "another shape": (other_shape, ValueError, r"\(4, 4\).*\(4, 3\)"),
    "no tensor": (no_tensor, ValueError, r"has shape None.*\(4, 3\)"),
}


@pytest.mark.parametrize("case", BAD_SLOTS)
@every_optimizer_with_state
def test_a_slot_that_does_not_fit_is_refused_and_changes_nothing(make, case):
    refuses_and_continues(make, *BAD_SLOTS[case])


@pytest.mark.parametrize("case", BAD_STATES)
@every_optimizer
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(make, case):
    refuses_and_continues(make, *BAD_STATES[case])


def refuses_and_continues(make, spoil, error, message):
    saved = spoil(copy.deepcopy(trained(make).state_dict()))
    optimizer, wanted = trained(make, steps=2), trained(make, steps=2)
    with unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    run(optimizer, range(2, 4))
    run(wanted, range(2, 4))
    assert_same_run(optimizer, wanted)


def test_a_saved_hyper_parameter_out_of_range_is_refused():
    saved = trained(Fusedbun).state_dict()
    saved["param_groups"][0]["beta_decay"] = 1.5
    optimizer = trained(Fusedbun, steps=1)
    with unchanged(optimizer), pytest.raises(ValueError, match=r"beta_decay must lie in \[0, 1\), but it is 1.5"):
        optimizer.load_state_dict(saved)
