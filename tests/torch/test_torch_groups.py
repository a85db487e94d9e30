"""Param groups: hyper-parameters of their own, changed between steps; groups added later; named parameters."""

import copy
import pickle
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from makers import (
    SHAPES,
    SM3_CHAIN,
    assert_same,
    assert_same_run,
    copies,
    every_optimizer,
    first_lr,
    gradient,
    parameters,
    recommended,
    run,
    set_gradients,
    unchanged,
)

from fusedbun import (
    SM3,
    ChainOptimizer,
    DecoupledLionW,
    Fusedbun,
    FusedbunW,
    ScaledOptum,
    TernaryVote,
    param_groups,
    recipes,
)
from fusedbun.transforms import Sign


@every_optimizer
def test_a_group_steps_as_an_optimizer_of_its_own(make):
    params = parameters((4, 3), (5,))
    together = make([{"params": params[0], "lr": 0.5}, {"params": [params[1]]}], lr=0.01)
    assert [group["lr"] for group in together.param_groups] == [0.5, 0.01]
    alone = copies(params)
    optimizers = [make([alone[0]], lr=0.5), make([alone[1]], lr=0.01)]
    for step in range(3):
        set_gradients(params, step)
        set_gradients(alone, step)
        together.step()
        for optimizer in optimizers:
            optimizer.step()
    assert_same([p.detach() for p in params], [p.detach() for p in alone])


OWN = {
    "eps": 0.3,
    "beta_decay": 0.5,
    "Lambda": 0.2,
    "momentum_beta": 0.0,
    "centralize": False,
    "use_rms": False,
    "nesterov": False,
    "clip_rms": 0.4,
    "lagged": True,
    "channel_axis": 1,
    "maximize": True,
}


@pytest.mark.parametrize("name", OWN)
def test_each_hyper_parameter_of_fusedbun_can_be_a_groups_own(name):
    own, usual, alone = (parameters((4, 3)) for _ in range(3))
    optimizer = recommended([{"params": own, name: OWN[name]}, {"params": usual}], lr=0.1)
    wanted = recommended(alone, **{"lr": 0.1, name: OWN[name]})
    for step in range(3):
        for p in (*own, *usual, *alone):
            p.grad = gradient(p, step)
        optimizer.step()
        wanted.step()
    assert_same(own[0].detach(), alone[0].detach())
    assert (own[0] != usual[0]).any()


def test_a_chains_fields_are_hyper_parameters_of_the_groups():
    params = parameters((4, 3), (4, 3))
    groups = [{"params": params[0], "momentum.beta": 0.0, "momentum.dampening": 0.0}, {"params": params[1]}]
    optimizer = ChainOptimizer(groups, SM3_CHAIN, lr=0.1)
    run(optimizer, 2)
    assert [group["momentum.beta"] for group in optimizer.param_groups] == [0.0, 0.9]
    assert ["momentum.moment" in optimizer.state[p] for p in params] == [False, True]


@every_optimizer
def test_a_step_takes_the_hyper_parameters_of_its_moment(make):
    """Two steps with one learning rate and two with another, as an optimizer made with the other continues."""
    params = parameters(*SHAPES)
    optimizer = make(params, lr=0.1)
    run(optimizer, 2)
    later = make([{"params": copies(params), **first_lr(optimizer)}], lr=0.03)
    for p, q in zip(params, later.param_groups[0]["params"], strict=True):
        later.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.param_groups[0]["lr"] = 0.03
    run(optimizer, range(2, 4))
    run(later, range(2, 4))
    assert_same_run(optimizer, later)


@pytest.mark.parametrize(
    "value", [np.float32(0.25), np.float64(0.25), np.array(0.25), Fraction(1, 4), torch.tensor(0.25)]
)
@pytest.mark.parametrize("name", ["lr", "eps", "beta_decay", "Lambda", "momentum_beta", "clip_rms"])
def test_numbers_of_other_kinds_are_numbers(name, value):
    params = parameters(*SHAPES)
    options = {"lr": 0.1, "use_rms": True}
    wanted, optimizer = (
        Fusedbun(copies(params), **{**options, name: 0.25}),
        Fusedbun(params, **{**options, name: value}),
    )
    run(wanted, 3)
    run(optimizer, 3)
    for p, q in zip(params, wanted.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)


# Momentum and accumulators that come and go


def test_momentum_switched_on_starts_at_zero():
    params = parameters(*SHAPES)
    optimizer = recommended(params, lr=0.1, momentum_beta=0.0)
    run(optimizer, 3)
    assert all("momentum.moment" not in optimizer.state[p] for p in params)
    accumulators = {p: dict(optimizer.state[p]) for p in params}
    fresh = recommended(copies(params), lr=0.1)  # has no momentum yet either
    for p, q in zip(params, fresh.param_groups[0]["params"], strict=True):
        fresh.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.param_groups[0]["momentum_beta"] = 0.9
    run(optimizer, range(3, 6))
    run(fresh, range(3, 6))
    assert_same_run(optimizer, fresh)
    for p in params:
        assert all(optimizer.state[p][key] is value for key, value in accumulators[p].items())
        assert optimizer.state[p]["momentum.moment"].shape == p.shape


def test_momentum_switched_off_is_freed_and_starts_again_at_zero():
    params = parameters(*SHAPES)
    optimizer = recommended(params, lr=0.1)
    run(optimizer, 2)
    optimizer.param_groups[0]["momentum_beta"] = 0.0
    run(optimizer, range(2, 3))
    assert not any("moment" in key for p in params for key in optimizer.state[p])
    optimizer.param_groups[0].update(momentum_beta=0.9, lr=0.0)
    set_gradients(params, 3)
    for p in params:
        p.grad.zero_()
    optimizer.step()
    assert not any(optimizer.state[p]["momentum.moment"].any() for p in params)


def test_rms_switched_on_uses_the_accumulators_kept_so_far():
    params, others = parameters(*SHAPES), parameters(*SHAPES)
    late, always = Fusedbun(params, 0.0, Lambda=0.0), Fusedbun(others, 0.0, Lambda=0.0, use_rms=True)
    run(late, 5)
    run(always, 5)
    for optimizer in (late, always):
        optimizer.param_groups[0].update(lr=0.1, use_rms=True, momentum_beta=0.0)
        run(optimizer, range(5, 6))
    assert_same_run(late, always)
    fresh = Fusedbun(parameters(*SHAPES), 0.1, Lambda=0.0, use_rms=True, momentum_beta=0.0)
    run(fresh, range(5, 6))
    assert all((p != q).any() for p, q in zip(params, fresh.param_groups[0]["params"], strict=True))


# Groups added later, and names


@every_optimizer
def test_add_param_group(make):
    p, q = parameters((4, 3), (5,))
    optimizer = make([p], lr=0.1)
    run(optimizer, 2)
    optimizer.add_param_group({"params": [q], "lr": 0.01})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert optimizer.param_groups[0].keys() == optimizer.param_groups[1].keys()
    (wanted,) = copies([q])
    for step in range(2, 4):
        p.grad, q.grad = gradient(p, step), gradient(q, step, 1)
        optimizer.step()
    alone = make([wanted], lr=0.01)
    for step in range(2, 4):
        wanted.grad = gradient(wanted, step, 1)
        alone.step()
    assert_same(q.detach(), wanted.detach())


BAD_GROUPS = {
    "negative lr": (lambda p: {"params": parameters((2,)), "lr": -0.5}, ValueError, r"lr .*\[0, inf\).*-0.5"),
    "lr of words": (lambda p: {"params": parameters((2,)), "lr": "fast"}, TypeError, "lr .*'fast'"),
    "maximize as number": (lambda p: {"params": parameters((2,)), "maximize": 1}, TypeError, "maximize .*1"),
    "parameter twice": (lambda p: {"params": [*parameters((2,)), p]}, ValueError, "more than one parameter group"),
    "parameter with a name": (lambda p: {"params": [("w", *parameters((2,)))]}, ValueError, "names"),
    "no leaf": (lambda p: {"params": [p * 2]}, ValueError, "non-leaf"),
    "no tensor": (lambda p: {"params": [0.5]}, TypeError, "Tensors"),
    "no group": (lambda p: [p], TypeError, "dict"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
@every_optimizer
def test_a_bad_group_is_refused_and_leaves_the_optimizer_unchanged(make, case):
    group, error, message = BAD_GROUPS[case]
    params = parameters((4, 3), (5,))
    optimizer, wanted = make(params, lr=0.1), make(copies(params), lr=0.1)
    run(optimizer, 1)
    run(wanted, 1)
    with unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.add_param_group(group(params[0]))
    assert len(optimizer.param_groups) == 1
    run(optimizer, range(1, 3))
    run(wanted, range(1, 3))
    assert_same_run(optimizer, wanted)


def test_a_bad_hyper_parameter_of_a_later_group_stops_construction():
    p, q = parameters((2,), (3,))
    with pytest.raises(ValueError, match=r"beta_decay must lie in \[0, 1\), but it is 1.0"):
        Fusedbun([{"params": p}, {"params": q, "beta_decay": 1.0}], 0.1)
    with pytest.raises(ValueError, match=r"channel_axis must lie in \[-2, 2\)"):
        Fusedbun([{"params": parameters((2, 3))}], 0.1, centralize=True, channel_axis=2)


@every_optimizer
def test_named_parameters(make):
    layer = torch.nn.Linear(3, 2)
    optimizer, unnamed = make(layer.named_parameters(), lr=0.1), make(copies(list(layer.parameters())), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    run(optimizer, 2)
    run(unnamed, 2)
    assert_same_run(optimizer, unnamed)
    layer.bias.grad.data = torch.zeros(2, dtype=torch.int32)
    with unchanged(optimizer), pytest.raises(TypeError, match="'bias'"):
        optimizer.step()


@every_optimizer
def test_entries_of_the_users_own_stay_in_the_groups(make):
    optimizer = make([{"params": parameters((2,)), "stage": "head"}], lr=0.1)
    run(optimizer, 1)
    assert optimizer.param_groups[0]["stage"] == "head"
    assert optimizer.state_dict()["param_groups"][0]["stage"] == "head"


# Other names, and keys that are refused

OF_TORCH_AND_FRAMEWORKS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum", "lr_scale")
OF_TORCH_AND_FRAMEWORKS += ("param_names", "name", "group_name", "lr_mult", "initial_weight_decay", "is_last_layer")


@every_optimizer
def test_a_weight_decay_of_0_is_no_error_as_the_trainer_of_transformers_gives_it(make):
    run(make([{"params": parameters((4, 3)), "weight_decay": 0.0}], lr=0.1), 2)


@pytest.mark.parametrize("make", [SM3, TernaryVote, partial(ChainOptimizer, transforms=[Sign()], lr=0.1)])
def test_a_weight_decay_that_there_is_none_for(make):
    (p,) = parameters((4, 3))
    p.data.sign_()
    with pytest.raises(TypeError, match=r"does not read weight_decay=0.1 of a param group; it has no weight decay; "):
        make([{"params": p, "weight_decay": 0.1}])
    optimizer = make([p])
    run(optimizer, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with unchanged(optimizer, groups=False), pytest.raises(TypeError, match="it has no weight decay"):
        optimizer.step()


def test_weight_decay_is_lambda_in_the_constructor_in_groups_and_between_steps():
    params = parameters(*SHAPES)
    optimizers = [
        Fusedbun(copies(params), 0.1, Lambda=0.3),
        Fusedbun(copies(params), 0.1, weight_decay=0.3),
        Fusedbun([{"params": copies(params), "weight_decay": 0.3}], 0.1),
        Fusedbun(copies(params), 0.1),
        ChainOptimizer(copies(params), recipes.fusedbun(), 0.1),
    ]
    for optimizer in optimizers[3:]:
        optimizer.param_groups[0]["weight_decay"] = 0.3
    for optimizer in optimizers:
        run(optimizer, 2)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
        assert "weight_decay" not in optimizer.state_dict()["param_groups"][0]
        assert_same_run(optimizer, optimizers[0])
    for again in (copy.deepcopy(optimizers[1]), pickle.loads(pickle.dumps(optimizers[1]))):
        again.load_state_dict(optimizers[2].state_dict())
        again.param_groups[0].update(weight_decay=0.0, momentum=0.5)
        assert (again.param_groups[0]["Lambda"], again.param_groups[0]["momentum_beta"]) == (0.0, 0.5)
        again.param_groups[0] |= {"weight_decay": 0.25}
        assert again.param_groups[0]["Lambda"] == 0.25


def test_one_thing_under_two_names():
    message = r"Fusedbun.*: weight_decay is another name for Lambda, and both are given"
    with pytest.raises(TypeError, match=message):
        Fusedbun(parameters((2,)), 0.1, Lambda=0.1, weight_decay=0.1)
    with pytest.raises(TypeError, match=message):
        Fusedbun([{"params": parameters((2,)), "Lambda": 0.1, "weight_decay": 0.1}], 0.1)


@pytest.mark.parametrize(
    ("make", "key", "said"),
    [
        (Fusedbun, "momentun_beta", "did you mean 'momentum_beta'"),
        (Fusedbun, "betas", "its momentum is 'momentum_beta'"),
        (Fusedbun, "learning_rate", "its learning rate is 'lr'"),
        (Fusedbun, "lambda", "did you mean 'Lambda'"),
        (Fusedbun, "implementation", "its own are lr, eps"),
        (FusedbunW, "Lambda", "its weight decay is 'weight_decay'"),
        (ScaledOptum, "wd", "its weight decay is 'weight_decay'"),
        (SM3, "nesterov", "its own are lr, momentum"),
        (DecoupledLionW, "momentum_dtpye", "did you mean 'momentum_dtype'"),
    ],
)
def test_a_key_that_no_argument_has_is_told_what_it_is_called(make, key, said):
    params = parameters((4, 3))
    for value in (0.5,) if "its own" in said else (0.0, 0.5):
        with pytest.raises(TypeError, match=f"{make.__name__} does not read {key}={value} .*{said}"):
            make([{"params": params, key: value}], lr=0.1)
        optimizer = make(copies(params), lr=0.1)
        run(optimizer, 1)
        with pytest.raises(TypeError, match=said):
            optimizer.add_param_group({"params": parameters((2,)), key: value})
        assert len(optimizer.param_groups) == 1
        optimizer.param_groups[0][key] = value
        with unchanged(optimizer, groups=False), pytest.raises(TypeError, match=said):
            optimizer.step()
        saved = optimizer.state_dict()
        fresh = make(copies(params), lr=0.1)
        with unchanged(fresh), pytest.raises(TypeError, match=said):
            fresh.load_state_dict(saved)


@pytest.mark.parametrize("no_decay", ["Lambda", "weight_dekay", "wd"])
def test_a_no_decay_that_the_class_does_not_own(no_decay):
    groups = param_groups(torch.nn.Linear(3, 2), no_decay=no_decay)
    with pytest.raises(TypeError, match=f"FusedbunW does not read {no_decay}=0.0 of a param group"):
        FusedbunW(groups)
    groups = param_groups(torch.nn.Linear(3, 2), no_decay="weight_decay")
    assert [group["Lambda"] for group in Fusedbun(groups, 0.1).param_groups] == [0.01, 0.0]


@pytest.mark.parametrize("key", OF_TORCH_AND_FRAMEWORKS)
@every_optimizer
def test_what_schedulers_and_frameworks_write_is_no_error(make, key):
    value = ["w"] if key == "param_names" else 0.5
    run(make([{"params": parameters((4, 3)), key: value}], lr=0.1), 1)
