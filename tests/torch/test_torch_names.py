"""State belongs to names: a saved run goes on whatever order its parameters are given in, or says what is missing."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from makers import assert_same, assert_same_run, every_optimizer, gradient, parameters, recommended, unchanged
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusedbun import SM3, Fusedbun

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (4, 3), "b.bias": (4,), "scale": ()}
NAMES = [*SHAPES]
OTHER = ["b.bias", "b.weight", "scale", "a.weight", "a.bias"]


def named(names=NAMES):
    """Parameters by name, the same ones in whatever order."""
    values = dict(zip(SHAPES, parameters(*SHAPES.values()), strict=True))
    return {name: values[name] for name in names}


def run(optimizer, params, steps):
    for step in steps:
        for name, p in params.items():
            p.grad = gradient(p, step, NAMES.index(name))
        optimizer.step()


def begun(make, groups=lambda named: named.items(), names=NAMES):
    params = named(names)
    optimizer = make(groups(params), lr=0.1)
    run(optimizer, params, range(3))
    return optimizer, params


def goes_on(make, saved, params, groups=lambda named: named.items(), names=OTHER, **options):
    """A new optimizer that has loaded the state of these parameters, which are given in another order."""
    same = {name: params[name].detach().clone().requires_grad_() for name in names}
    optimizer = make(groups(same), lr=0.5)
    optimizer.load_state_dict(saved, **options)
    return optimizer, same


def assert_by_name(optimizer, params, other, others):
    for name, p in params.items():
        assert_same(p.detach(), others[name].detach())
        assert_same(dict(optimizer.state[p]), dict(other.state[others[name]]))


@pytest.mark.parametrize("convert", [False, True])
@every_optimizer
def test_another_order_of_the_same_names(make, convert):
    whole, params = begun(make)
    saved = whole.state_dict()
    kept = copy.deepcopy(saved)
    resumed, same = goes_on(make, saved, params, convert=convert)
    assert resumed.param_groups[0]["param_names"] == OTHER
    assert resumed.param_groups[0]["lr"] == 0.1
    assert saved["param_groups"] == kept["param_groups"]
    assert_by_name(resumed, same, whole, params)
    run(whole, params, range(3, 5))
    run(resumed, same, range(3, 5))
    assert_by_name(resumed, same, whole, params)


def test_what_is_converted_belongs_to_names_too():
    make = partial(SM3, momentum=0.9)
    whole, params = begun(partial(make, momentum_dtype="int8"))
    with pytest.warns(UserWarning, match="is converted"):
        resumed, same = goes_on(make, whole.state_dict(), params, convert=True)
    plain, plainly = begun(make)
    for name, p in same.items():
        moment = resumed.state[p]["momentum.moment"]
        torch.testing.assert_close(moment, plain.state[plainly[name]]["momentum.moment"], rtol=0, atol=0.05)


def decayed(of_weights, of_others):
    """Makes groups of weights, and of the others, with these learning rates."""

    def groups(named):
        weights = [(name, p) for name, p in named.items() if p.ndim > 1]
        others = [(name, p) for name, p in named.items() if p.ndim < 2]
        return [{"params": weights, "lr": of_weights}, {"params": others, "lr": of_others}]

    return groups


def test_groups_in_another_order_keep_their_hyper_parameters():
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    whole, params = begun(SM3, decayed(0.2, 0.3), names)
    resumed, same = goes_on(SM3, whole.state_dict(), params, lambda named: decayed(7.0, 8.0)(named)[::-1], names[::-1])
    assert [group["lr"] for group in resumed.param_groups] == [0.3, 0.2]
    assert [group["param_names"] for group in resumed.param_groups] == [["b.bias", "a.bias"], ["b.weight", "a.weight"]]
    assert_by_name(resumed, same, whole, params)


def test_across_other_groups_state_follows_the_names_and_hyper_parameters_the_place():
    def halves(named):
        items = [*named.items()]
        return [{"params": items[:2], "lr": 0.2}, {"params": items[2:], "lr": 0.3}]

    whole, params = begun(SM3, halves)
    resumed, same = goes_on(
        SM3, whole.state_dict(), params, halves, ["a.weight", "scale", "b.weight", "b.bias", "a.bias"]
    )
    assert [group["lr"] for group in resumed.param_groups] == [0.2, 0.3]
    assert_by_name(resumed, same, whole, params)


@pytest.mark.parametrize("convert", [False, True])
def test_other_names_are_listed_and_nothing_is_changed(convert):
    whole, _ = begun(recommended)
    saved = whole.state_dict()
    saved["param_groups"][0]["param_names"] = ["a.weight", "bias", "b.weight", "b.bias", "shift"]
    message = r"other names \(missing in it: 'scale', 'a.bias'; unexpected: 'bias', 'shift'\); make the optimizer from"
    optimizer, _ = begun(recommended, names=OTHER)
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved, convert=convert)
    few, _ = begun(recommended, names=OTHER[:4])
    with unchanged(few), pytest.raises(ValueError, match=r"other names \(unexpected: 'a.bias'\)"):
        few.load_state_dict(whole.state_dict(), convert=convert)
    with unchanged(whole), pytest.raises(ValueError, match=r"other names \(missing in it: 'a.bias'\)"):
        whole.load_state_dict(few.state_dict(), convert=convert)


def test_of_many_names_some_are_listed():
    layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(40))
    saved = SM3(layers.named_parameters()).state_dict()
    saved["param_groups"][0]["param_names"] = [f"module.{name}" for name, _ in layers.named_parameters()]
    with pytest.raises(ValueError, match=r"'24.bias' and 30 more; unexpected: 'module.0.weight'"):
        SM3(layers.named_parameters()).load_state_dict(saved)


def test_names_that_several_have():
    def twice(order):
        pairs = {"first": ("weight", (4, 3)), "second": ("weight", (4, 3)), "bias": ("bias", (4,))}
        return SM3([(pairs[key][0], parameters(pairs[key][1])[0]) for key in order], lr=0.1)

    saved = twice(["first", "second", "bias"]).state_dict()
    twice(["first", "second", "bias"]).load_state_dict(saved)
    with pytest.raises(
        ValueError, match="several parameters are called 'weight', and they were saved in another order"
    ):
        twice(["bias", "first", "second"]).load_state_dict(saved)


def test_without_names_on_either_side_state_belongs_to_places():
    whole, params = begun(SM3)
    unnamed = SM3([p.detach().clone().requires_grad_() for p in params.values()], lr=0.5)
    fresh = set(unnamed.param_groups[0])
    unnamed.load_state_dict(whole.state_dict())
    assert set(unnamed.param_groups[0]) == set(copy.deepcopy(unnamed).param_groups[0]) == fresh
    assert_same_run(unnamed, whole)
    unnamed.add_param_group({"params": parameters((2,))})  # without names, which all groups have or none has
    again, _ = begun(SM3)
    again.load_state_dict({**whole.state_dict(), "param_groups": [unnamed.state_dict()["param_groups"][0]]})
    assert again.param_groups[0]["param_names"] == NAMES
    assert_same_run(again, whole)


def test_hooks_see_names_as_they_were_saved_and_may_change_them():
    whole, params = begun(SM3)
    saved = whole.state_dict()
    saved["param_groups"][0]["param_names"] = [f"module.{name}" for name in NAMES]
    seen = []

    def rename(optimizer, saved):
        (group,) = saved["param_groups"]
        return {**saved, "param_groups": [{**group, "param_names": [n[7:] for n in group["param_names"]]}]}

    same = {name: params[name].detach().clone().requires_grad_() for name in OTHER}
    resumed = SM3(same.items(), lr=0.5)
    resumed.register_load_state_dict_pre_hook(rename)
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["param_names"]))
    resumed.load_state_dict(saved)
    assert seen == [OTHER]
    assert_by_name(resumed, same, whole, params)


@pytest.fixture
def process():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("is_full", [False, True])
def test_what_torchs_distributed_checkpoints_have_put_in_place_stays_there(is_full, process):
    """They match by the model's names, and leave `param_names` in the order that was saved."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    options = StateDictOptions(full_state_dict=is_full)
    first, second = model(), model()
    whole = Fusedbun(first.named_parameters(), lr=0.1)
    for step in range(2):
        for index, p in enumerate(first.parameters()):
            p.grad = gradient(p, step, index)
        whole.step()
    saved = get_optimizer_state_dict(first, whole, options=options)
    resumed = Fusedbun([*second.named_parameters()][::-1], lr=0.5)
    set_optimizer_state_dict(second, resumed, saved, options=options)
    assert resumed.param_groups[0]["param_names"] == [name for name, _ in second.named_parameters()][::-1]
    assert resumed.param_groups[0]["lr"] == 0.1
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert_same(dict(whole.state[p]), dict(resumed.state[q]))
