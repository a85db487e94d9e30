"""What torch's own suite asks of saved states and of copies, asked of every class with each of its inputs."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
from makers import assert_same, assert_same_run, copies, parameters, run, sweep_of_optimizers
from test_torch_checkpoint import through_file
from test_torch_optimizer_info import each_input
from test_torch_optimizer_suite import by_definition


@pytest.mark.parametrize("named", list(product((False, True), repeat=2)), ids=str)
@each_input
def test_a_loaded_state_continues_and_is_the_same(info, options, state, named):
    """With names or without; who has names keeps them."""
    params = info.params((2, 3), (2,))
    pairs = [
        [(f"name{i}", p) for i, p in enumerate(leaves)] if is_named else leaves
        for leaves, is_named in zip((params, copies(params)), named, strict=True)
    ]
    whole, resumed = (by_definition(info, leaves, **options) for leaves in pairs)
    run(whole, 3)
    with torch.no_grad():
        for p, q in zip(*(o.param_groups[0]["params"] for o in (resumed, whole)), strict=True):
            p.copy_(q)
    saved = copy.deepcopy(whole.state_dict())
    resumed.load_state_dict(saved)
    keys = [optimizer.param_groups[0].keys() - {"param_names"} for optimizer in (resumed, whole)]
    assert keys[0] == keys[1]
    if named[1]:
        assert resumed.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]
    for optimizer in (whole, resumed):
        run(optimizer, range(3, 6))
    assert_same_run(resumed, whole)
    dicts = [optimizer.state_dict() for optimizer in (whole, resumed)]
    for one in dicts:
        one["param_groups"][0].pop("param_names", None)
    assert_same(*(one["state"] for one in dicts))
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    resumed.param_groups.extend(resumed.param_groups)  # a group that is there twice is written alike
    first, last = resumed.state_dict()["param_groups"]
    assert first == last


@each_input
def test_a_state_from_before_later_options_is_loaded(info, options, state):
    optimizer = by_definition(info, info.params((2, 3), (2,)), **options)
    run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in ("maximize", "stochastic_rounding", "seed", "stacked", "channel_axis", "momentum_dtype"):
            group.pop(name, None)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0].keys() == optimizer.defaults.keys() | {"params"} | keeps_first_rate(optimizer)
    run(optimizer, range(2, 3))


def keeps_first_rate(optimizer):
    return {"first_lr"} if "first_lr" in optimizer.param_groups[0] else set()


@each_input
def test_a_state_goes_through_a_file_without_code(info, options, state):
    optimizer = by_definition(info, info.params((2, 3), (2,)), **options)
    run(optimizer, 2)
    saved = optimizer.state_dict()
    again = through_file(saved)
    assert_same(again["state"], saved["state"])
    assert again["param_groups"] == saved["param_groups"]


@each_input
def test_a_counter_that_is_no_tensor_is_refused(info, options, state):
    """Torch's own took numbers once and take them still; ours never did."""
    optimizer = by_definition(info, info.params((2, 3)), **options)
    run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    if "step" not in saved["state"][0]:
        return
    saved["state"][0]["step"] = saved["state"][0]["step"].item()
    with pytest.raises(ValueError, match="the saved 'step' of parameter 0 has shape None"):
        optimizer.load_state_dict(saved)


def attributes(optimizer):
    return {name: value for name, value in vars(optimizer).items() if "warned_capturable" not in name}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@sweep_of_optimizers
def test_a_copy_equals_its_original_in_every_attribute(make, clone):
    """But for torch's note that it has warned, which its own optimizers lose too, and what the last step prepared."""
    optimizer = make(parameters((4, 3), (5,)), lr=0.1)
    run(optimizer, 2)
    optimizer.record_metrics = True
    run(optimizer, range(2, 3))
    other = clone(optimizer)
    mine, theirs = (attributes(o) for o in (other, optimizer))
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"_steppers", "_products", "state", "param_groups", "recipe"}:
        assert mine[name] == theirs[name], name
    assert repr(other.recipe) == repr(optimizer.recipe)  # methods of equal chains are not equal to Python
    assert_same_run(other, optimizer)
    ((params, *entries), (_, *wanted)) = (
        [group.pop("params"), *group.items()] for group in (dict(o.param_groups[0]) for o in (other, optimizer))
    )
    assert sorted(entries) == sorted(wanted)
    assert list(other.state) == [p for p in params if p in other.state]
    assert repr(other) == repr(optimizer)
    reports = [o.report_per_parameter_metrics(o.param_groups[0]["params"][0], "w", {}) for o in (other, optimizer)]
    assert "l2_norm/update/w" in reports[0]
    assert_same(*reports)
    fresh = make(parameters((2,)), lr=0.1)
    assert attributes(clone(fresh)).keys() == attributes(fresh).keys()
