"""What `torch.optim.Optimizer` promises of every optimizer: ours and torch's own are given the same, and do the same.

Beside the suites of single classes: what parameters may be handed over as, groups, hooks, profiles, wrappers.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from importlib import import_module

import pytest
import torch
from makers import assert_same, copies, every_optimizer, gradient, parameters, run, unchanged
from test_torch_optimizer_info import each_class
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import profile


def torchs_own(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, **options})


# What parameters are handed over as; of two, of the shapes (2, 3) and (2,)

TAKEN = {
    "a list": lambda p, q: [p, q],
    "a generator": lambda p, q: (x for x in (p, q)),
    "a view of a dict": lambda p, q: {"weight": p, "bias": q}.values(),
    "a module's": lambda p, q: nn.ParameterList([p, q]).parameters(),
    "a tensor for a group": lambda p, q: [{"params": p}, {"params": q}],
    "a generator for a group": lambda p, q: [{"params": (x for x in (p, q))}],
    "a generator of groups": lambda p, q: ({"params": [x]} for x in (p, q)),
    "pairs with names": lambda p, q: [("weight", p), ("bias", q)],
    "groups of pairs": lambda p, q: [{"params": [("weight", p)]}, {"params": [("bias", q)]}],
    "a group without parameters": lambda p, q: [{"params": [p, q]}, {"params": []}],
    "what is no leaf, and keeps its gradient": lambda p, q: [p, kept(q)],
}
REFUSED = {
    "a tensor": lambda p, q: p,
    "none": lambda p, q: [],
    "none of a generator": lambda p, q: (x for x in ()),
    "None": lambda p, q: None,
    "text": lambda p, q: "pq",
    "a number": lambda p, q: [p, 1],
    "one group that is in no list": lambda p, q: {"params": [p]},
    "a set as a group": lambda p, q: [{"params": {p, q}}],
    "a group of nothing": lambda p, q: [{"lr": 0.1}],
    "what is no leaf": lambda p, q: [p, q * 2],
    "one in two groups": lambda p, q: [{"params": [p]}, {"params": [q, p]}],
    "a name for one of two": lambda p, q: [("weight", p), q],
    "names for one group of two": lambda p, q: [{"params": [p]}, {"params": [("bias", q)]}],
}
OF_ONE_GROUP = ("None", "text", "a number", "what is no leaf", "a name for one of two")
ADDED = {
    "no dict": lambda p, q: [q],
    "nothing": lambda p, q: {"lr": 0.1},
    "a set": lambda p, q: {"params": {p, q}},
    "one that is there": lambda p, q: {"params": [q, THERE]},
    "names where there are none": lambda p, q: {"params": [("weight", p)]},
    **{name: lambda p, q, params=REFUSED[name]: {"params": params(p, q)} for name in OF_ONE_GROUP},
}
THERE = nn.Parameter(torch.ones(2))


def kept(param):
    made = param * 1.0
    made.retain_grad()
    return made


def two(info):
    return info.params((2, 3), (2,))


@pytest.mark.parametrize("kind", TAKEN)
@each_class
def test_parameters_may_be_handed_over_so(info, kind):
    params, theirs = two(info), two(info)
    ours, own = info(TAKEN[kind](*params)), torchs_own(TAKEN[kind](*theirs))
    names = [group.get("param_names") for group in ours.param_groups]
    assert names == [group.get("param_names") for group in own.param_groups]
    index = {id(p): i for leaves in (params, theirs) for i, p in enumerate(leaves)}
    places = [[[index.get(id(p)) for p in group["params"]] for group in o.param_groups] for o in (ours, own)]
    assert places[0] == places[1]
    run(ours, 2)


@pytest.mark.parametrize("kind", REFUSED)
@each_class
def test_parameters_are_refused_as_torch_does(info, kind):
    with pytest.raises((TypeError, ValueError, KeyError)) as wanted:
        torchs_own(REFUSED[kind](*two(info)))
    with pytest.raises(wanted.type) as found:
        info(REFUSED[kind](*two(info)))
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("kind", ADDED)
@each_class
def test_a_group_that_is_added_is_refused_as_torch_does(info, kind):
    optimizer, own = info([THERE]), torchs_own([THERE])
    with pytest.raises((TypeError, ValueError, KeyError)) as wanted:
        own.add_param_group(ADDED[kind](*two(info)))
    with unchanged(optimizer), pytest.raises(wanted.type) as found:
        optimizer.add_param_group(ADDED[kind](*two(info)))
    assert str(found.value) == str(wanted.value)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("lr", [-0.1, torch.tensor(-0.1), torch.tensor([0.1, 0.1])], ids=str)
@every_optimizer
def test_a_learning_rate_that_cannot_be_is_refused_before_parameters_are_looked_at(make, lr):
    for start in (torchs_own, make):
        with pytest.raises(ValueError, match=r"learning rate|lr"):
            start(None, lr=lr)


@each_class
def test_groups_hold_the_defaults_which_groups_that_come_later_take(info):
    params, later = two(info), info.params((3,))
    optimizer = info(params)
    assert all(optimizer.param_groups[0][name] is value for name, value in optimizer.defaults.items())
    optimizer.defaults["maximize"] = True
    optimizer.add_param_group({"params": later})
    assert [group["maximize"] for group in optimizer.param_groups] == [False, True]
    assert isinstance(optimizer.state, defaultdict)
    assert optimizer.state == {}
    lines = repr(optimizer).splitlines()
    assert lines[0] == f"{info.cls.__name__} ("
    assert [line for line in lines if line.startswith("Parameter Group")] == ["Parameter Group 0", "Parameter Group 1"]


# Hooks


def hooked(optimizer, params):
    """What hooks see of two steps, in their order; those that were removed see nothing."""
    seen = []

    def note(name):
        return lambda o, args, kwargs: seen.append((name, o is optimizer, len(args), sorted(kwargs)))

    handles = [
        register_optimizer_step_pre_hook(note("before all")),
        register_optimizer_step_post_hook(note("after all")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        optimizer.step()
        optimizer.step(closure=lambda: 1.0)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    return seen


@each_class
def test_step_hooks_see_what_they_see_of_torchs_own(info):
    params, theirs = two(info), two(info)
    seen = hooked(info(params), params)
    assert [name for name, *_ in seen] == 2 * ["before all", "before", "after", "after all"]
    assert seen == hooked(torchs_own(theirs), theirs)


@each_class
def test_a_step_pre_hook_may_change_the_arguments(info):
    optimizer = info(two(info))
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 7.0}))
    assert optimizer.step() == 7.0
    handle.remove()
    assert optimizer.step() is None
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    with unchanged(optimizer), pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def saved_with_hooks(optimizer, others):
    """A dict as hooks change it, and what an optimizer has loaded of it as hooks change that."""
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "ran": saved["state"].pop("test")})
    saved, rates = optimizer.state_dict(), []

    def set_rate(rate, in_place):
        def change(o, state_dict):
            changed = state_dict if in_place else copy.deepcopy(state_dict)
            changed["param_groups"][0]["maximize"] = rate
            return None if in_place else changed

        return change

    others.register_load_state_dict_pre_hook(set_rate(True, in_place=True))
    others.load_state_dict(saved)
    rates.append(others.param_groups[0]["maximize"])
    others.register_load_state_dict_pre_hook(set_rate(False, in_place=False), prepend=True)
    others.register_load_state_dict_post_hook(lambda o: o.state.update(seen=o.param_groups[0]["maximize"]))
    others.load_state_dict(saved)
    rates.append(others.param_groups[0]["maximize"])
    return saved["ran"], sorted(saved), rates, others.state["seen"]


@each_class
def test_hooks_of_state_dicts_do_what_they_do_to_torchs_own(info):
    ours = saved_with_hooks(info(two(info)), info(two(info)))
    assert ours == saved_with_hooks(torchs_own(two(info)), torchs_own(two(info)))
    assert ours == (1, ["param_groups", "ran", "state"], [True, True], True)


# Around the optimizer


@each_class
def test_a_profile_shows_steps_by_the_name_of_the_class(info):
    optimizer = info(two(info))
    run(optimizer, 1)
    with profile() as recorded:
        optimizer.step()
        optimizer.zero_grad()
    names, title = {event.key for event in recorded.key_averages()}, info.cls.__name__
    assert {f"Optimizer.step#{title}.step", f"Optimizer.zero_grad#{title}.zero_grad"} <= names
    assert optimizer.step.__name__ == "step"


@every_optimizer
def test_plateaus_move_tensors_and_numbers_alike(make):
    """A learning rate for each group, a tensor and a number: each stays what it is."""
    p, q = parameters((2,), (3,))
    optimizer = make([{"params": [p], "lr": torch.tensor([0.1])}, {"params": [q], "lr": 0.2}], lr=0.3)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=1e-3)
    for _ in range(2):
        run(optimizer, 1)
        scheduler.step(1.0)
    tensor, number = (group["lr"] for group in optimizer.param_groups)
    assert_same(tensor, torch.tensor([0.05]))
    assert number == 0.1


@every_optimizer
def test_a_schedule_starts_from_the_first_learning_rate_whatever_becomes_of_the_tensor(make):
    optimizer = make(parameters((2,)), lr=torch.tensor(0.1))
    scheduler = StepLR(optimizer, 1)
    optimizer.param_groups[0]["lr"].add_(1.0)
    assert float(scheduler.base_lrs[0]) == pytest.approx(0.1)


@every_optimizer
def test_a_saved_dict_is_the_optimizers_own_until_it_is_loaded(make):
    """It holds the state itself, as torch's does; a loaded state is a copy."""
    (p,), (q,) = parameters((4, 3)), parameters((4, 3))
    whole, other = make([p], lr=0.1), make([q], lr=0.1)
    run(whole, 1)
    saved = whole.state_dict()
    assert all(saved["state"][0][key] is value for key, value in whole.state[p].items())
    other.load_state_dict(saved)
    before = {key: value.clone() for key, value in whole.state[p].items()}
    q.grad = 2 * gradient(q, 1)
    other.step()
    assert_same(dict(whole.state[p]), before)


@pytest.fixture(scope="module")
def distributed():
    """torch.distributed.optim, which uses what torch itself calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return import_module("torch.distributed.optim")


@pytest.fixture
def alone(as_torchrun):
    """A group of one process."""
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


@every_optimizer
def test_torchs_zero_redundancy_optimizer_takes_it(make, distributed, alone):
    params, plain = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    cls, given = getattr(make, "func", make), getattr(make, "keywords", {})
    optimizers = [
        distributed.ZeroRedundancyOptimizer(params, optimizer_class=cls, lr=0.1, **given),
        make(plain, lr=0.1),
    ]
    schedulers = [StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    for step in range(3):
        for leaves, optimizer, scheduler in zip((params, plain), optimizers, schedulers, strict=True):
            for i, p in enumerate(leaves):
                p.grad = gradient(p, step, i)
            optimizer.step()
            scheduler.step()
    assert_same([p.detach() for p in params], [p.detach() for p in plain])
    optimizers[0].consolidate_state_dict()
    resumed = make(copies(params), lr=0.7)
    resumed.load_state_dict(optimizers[0].state_dict())
    assert resumed.param_groups[0]["lr"] == 0.1 / 8


@every_optimizer
def test_torch_can_step_it_in_the_backward_pass(make, distributed):
    torch.manual_seed(0)
    layer, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(layer.state_dict())
    cls, given = getattr(make, "func", make), getattr(make, "keywords", {})
    distributed._apply_optimizer_in_backward(cls, layer.parameters(), {"lr": 0.1, **given})
    wanted = make(plain.parameters(), lr=0.1)
    for _ in range(2):
        for model in (layer, plain):
            model(torch.ones(3)).pow(2).sum().backward()
        wanted.step()
        wanted.zero_grad()
    assert all(p.grad is None for p in layer.parameters())
    assert_same([p.detach() for p in layer.parameters()], [p.detach() for p in plain.parameters()])
