"""Torch: param groups, arguments, and what is saved."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedbun
from benchmarks.behaviour.in_torch import (
    assert_moved,
    assert_same,
    loss,
    network,
    stepped,
    train,
    trained,
    values,
    vectors,
)
from benchmarks.behaviour.torch_schedules import FIXED
from benchmarks.behaviour.uses import EVERYONE, Contender, Part, is_ours, takes

PART = Part("Groups and arguments")
SAVED = Part("Saving and copying")
UNDECAYED = {
    "SM3": "It has no weight decay, and says so of one that is not 0.",
    "TernaryVote": "Weights of -1, 0 and +1 do not decay.",
}
ONE_WAY = {EVERYONE: "Kernels are chosen for each parameter by themselves; `implementation=` asks for one by name."}


@PART.use("`model.named_parameters()`")
def named(contender: Contender) -> None:
    """The groups keep the names, and the parameters move."""
    model = network(contender)
    optimizer = contender(model.named_parameters())
    train(model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == list(values(model))
    assert_moved(model, contender)


@PART.use("`add_param_group`")
def added(contender: Contender) -> None:
    """A group that joins later is stepped, and what it has is its own."""
    params = vectors(contender, (4, 3), (5,))
    optimizer = stepped(contender, params[:1], 1)
    optimizer.add_param_group({"params": params[1:], "maximize": True})
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool((p != q).any()) for p, q in zip(params, before, strict=True))
    assert [group["maximize"] for group in optimizer.param_groups] == [False, True]


@PART.use("a learning rate for each group", reasons=FIXED)
def rates(contender: Contender) -> None:
    """Each group is stepped by its own; 0 does not move it."""
    params = vectors(contender, (4, 3), (5,))
    optimizer = contender([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}])
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [bool((p != q).any()) for p, q in zip(params, before, strict=True)] == [True, False]


def _decayed(contender: Contender, groups: Callable[[nn.Module], list[dict[str, Any]]]) -> None:
    model, plain = network(contender), network(contender)
    optimizer = contender(groups(model))
    train(model, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    train(plain, contender(plain.parameters(), weight_decay=0.0))
    assert all(bool((p != q).any()) for p, q in zip(model.parameters(), plain.parameters(), strict=True) if p.ndim > 1)


@PART.use("groups with and without `weight_decay`, as Trainer makes them", reasons=UNDECAYED)
def trainer_groups(contender: Contender) -> None:
    """Matrices decay by the group's number, and biases and norms by none."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == is_one] for is_one in (True, False))
        return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]

    _decayed(contender, groups)


@PART.use("groups as timm makes them", reasons=UNDECAYED)
def timm_groups(contender: Contender) -> None:
    """With `lr_scale` and `param_names` beside the parameters, which are the user's own."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        found = []
        for decay in (0.1, 0.0):
            those = [(name, p) for name, p in named if (p.ndim > 1) == bool(decay)]
            names = [name for name, _ in those]
            params = [p for _, p in those]
            found.append({"params": params, "param_names": names, "weight_decay": decay, "lr_scale": 0.5})
        return found

    _decayed(contender, groups)


@PART.use("`fusedbun.param_groups` by patterns on names", applies=is_ours, reasons=FIXED)
def patterns(contender: Contender) -> None:
    """A pattern sets its group's learning rate."""
    model = network(contender)
    optimizer = contender(fusedbun.param_groups(model, {"3.*": {"lr": 1e-3}}))
    train(model, optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2, 1e-3}


def argument(name: str) -> Callable[[Contender], None]:
    """The use of one of torch's arguments that say how a step is computed."""

    def given(contender: Contender) -> None:
        model = network(contender)
        train(model, contender(model.parameters(), **{name: True}))
        assert_same(model, trained(contender), off=1e-5)

    return given


for name in ("foreach", "fused", "capturable"):
    PART.use(f"`{name}=True`", reasons=ONE_WAY, works_if="The run is the one without it.")(argument(name))


@PART.use("`foreach=`, `fused=`, `capturable=` and `differentiable=` of None or False in a group")
def absent(contender: Contender) -> None:
    """What asks for nothing is taken, and the run is the one without it."""
    model = network(contender)
    asked = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    optimizer = contender([{"params": list(model.parameters()), **asked}])
    train(model, optimizer)
    assert_same(model, trained(contender))


@PART.use(
    "`differentiable=True`",
    reasons={EVERYONE: "A step writes into its parameters; in JAX gradients flow through `tx.update`."},
)
def differentiable(contender: Contender) -> None:
    """A gradient flows through the step to the gradients."""
    start = vectors(contender, (4, 3))[0]
    p = start.clone()
    optimizer = contender([p], differentiable=True)
    grad = torch.ones(4, 3, requires_grad=True)
    p.grad = grad
    optimizer.step()
    p.sum().backward()
    assert grad.grad is not None


@PART.use("an argument that is misspelt")
def misspelt(contender: Contender) -> None:
    """It is an error that names it, and no optimizer is made."""
    try:
        contender(vectors(contender, (3,)), weight_decai=0.1)
    except TypeError as error:
        said = str(error)
    else:
        raise AssertionError("it is taken")
    assert "weight_decai" in said


@PART.use("a hyper-parameter out of its range")
def out_of_range(contender: Contender) -> None:
    """It is a ValueError when the optimizer is made."""
    try:
        contender(vectors(contender, (3,)), **({"threshold": -1} if contender.ternary else {"lr": -1.0}))
    except ValueError:
        return
    raise AssertionError("it is taken")


def resumed(contender: Contender, through: Callable[[Any], Any]) -> None:
    """A run whose model and optimizer go through something in its middle, and end as the whole one."""
    model = network(contender)
    optimizer = contender(model.named_parameters())
    train(model, optimizer, 3)
    saved = through({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = network(contender)
    again = contender(other.named_parameters())
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(other, again, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert_same(other, model)


@SAVED.use("`torch.save`, `torch.load(weights_only=True)`")
def through_file(contender: Contender) -> None:
    """A run that is saved and loaded in its middle ends the same to the bit."""

    def file(saved: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    resumed(contender, file)


@SAVED.use("`pickle` of the `state_dict`")
def through_pickle(contender: Contender) -> None:
    """A run that goes through it in its middle ends the same to the bit."""
    resumed(contender, lambda saved: pickle.loads(pickle.dumps(saved)))


@SAVED.use("`load_state_dict` of a dict that is kept")
def unshared(contender: Contender) -> None:
    """The dict stays as it was while the optimizer that has loaded it steps."""
    optimizer = stepped(contender, vectors(contender, (4, 3)))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"])
    params = vectors(contender, (4, 3))
    other = contender(params)
    other.load_state_dict(saved)
    params[0].grad = torch.ones(4, 3)
    other.step()
    assert_same(saved["state"], kept)


@SAVED.use("`copy.deepcopy`, `pickle` of the optimizer")
def copied(contender: Contender) -> None:
    """The copy, with its own parameters, goes on as the original does."""
    for clone in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        model = network(contender)
        optimizer = contender(model.parameters())
        train(model, optimizer)
        other, again = clone((model, optimizer))
        train(other, again, range(3, 5))
        train(model, optimizer, range(3, 5))
        assert_same(other, model)


@SAVED.use("a `state_dict` in another order, by names")
def by_names(contender: Contender) -> None:
    """Reordered by a hook that goes by `param_names`, as torch's tutorial does, it continues the run to the bit."""
    shapes = {"a": (4, 3), "b": (5,)}
    params = dict(zip(shapes, vectors(contender, *shapes.values()), strict=True))
    optimizer = contender(list(params.items()))
    turned = {name: nn.Parameter(params[name].detach().clone()) for name in ("b", "a")}
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = contender(list(turned.items()))

    def by_name(owner: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        saved = copy.deepcopy(saved)
        (group,) = saved["param_groups"]
        at = {name: index for index, name in zip(group["params"], group["param_names"], strict=True)}
        names = owner.param_groups[0]["param_names"]
        state = {i: saved["state"][at[name]] for i, name in enumerate(names) if at[name] in saved["state"]}
        return {"state": state, "param_groups": [{**group, "param_names": names, "params": [*range(len(names))]}]}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for name, p in turned.items():
        p.data.copy_(params[name])
        p.grad = torch.ones_like(p)
        params[name].grad = torch.ones_like(p)
    optimizer.step()
    other.step()
    assert_same({n: p.detach() for n, p in turned.items()}, {n: params[n].detach() for n in turned})


@SAVED.use("`state_dict` of a model that does not fit")
def misfit(contender: Contender) -> None:
    """It is an error, and the optimizer is as it was."""
    optimizer = stepped(contender, vectors(contender, (4, 3)))
    other = stepped(contender, vectors(contender, (4, 3), (5,)))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    try:
        optimizer.load_state_dict(other.state_dict())
    except ValueError:
        assert_same(optimizer.state_dict()["state"], before)
    else:
        raise AssertionError("it is taken")


@SAVED.use("`fusedbun.save_state`, `fusedbun.load_state`", applies=is_ours)
def own_file(contender: Contender) -> None:
    """A run that is saved and loaded in its middle ends the same to the bit."""
    model, other = network(contender), network(contender)
    optimizer, again = (contender(x.named_parameters()) for x in (model, other))
    train(model, optimizer)
    other.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        fusedbun.save_state(optimizer, Path(folder) / "state.safetensors")
        fusedbun.load_state(again, Path(folder) / "state.safetensors")
    train(other, again, range(3, 5))
    train(model, optimizer, range(3, 5))
    assert_same(other, model)


@SAVED.use("moments in int8 and int4", applies=takes("momentum_dtype"))
def fewer_bits(contender: Contender) -> None:
    """Runs in both are saved and loaded in their middle, and end the same to the bit."""
    for code in ("int8", "int4"):
        model, other = (network(contender, 64) for _ in range(2))
        optimizer, again = (contender(x.named_parameters(), momentum_dtype=code) for x in (model, other))
        for step in range(2):
            loss(model, step).backward()
            optimizer.step()
        other.load_state_dict(model.state_dict())
        again.load_state_dict(optimizer.state_dict())
        for one, stepper in ((model, optimizer), (other, again)):
            train(one, stepper, range(2, 4))
        assert_same(other, model)
