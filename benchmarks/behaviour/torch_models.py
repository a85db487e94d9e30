"""Torch: what is done with a model, and the libraries that train it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import LinearLR

from benchmarks.behaviour.in_torch import (
    assert_moved,
    assert_same,
    batch,
    loss,
    network,
    ready,
    train,
    trained,
    values,
)
from benchmarks.behaviour.torch_schedules import FIXED
from benchmarks.behaviour.uses import EVERYONE, Contender, Part

COMPILED = Part("torch.compile")
MODELS = Part("Models")
SPREAD = Part("Several processes")


# torch.compile


@COMPILED.use("`torch.compile(optimizer.step)`")
def compiled_step(contender: Contender) -> None:
    """The run is the eager one."""
    torch.compiler.reset()
    model = network(contender)
    optimizer = contender(model.parameters())
    step = torch.compile(optimizer.step)
    for i in range(3):
        optimizer.zero_grad()
        loss(model, i).backward()
        step()
    assert_same(model, trained(contender), off=1e-5)


@COMPILED.use(
    "`torch.compile(optimizer.step, fullgraph=True)`",
    reasons={EVERYONE: "Checks and kernels stand outside of the graph; leave `fullgraph` out."},
)
def compiled_whole(contender: Contender) -> None:
    """The step is one graph, and is the eager one."""
    torch.compiler.reset()
    model = network(contender)
    optimizer = contender(model.parameters())
    loss(model, 0).backward()
    torch.compile(optimizer.step, fullgraph=True)()
    assert_same(model, trained(contender, 1), off=1e-5)


def compiled_training(contender: Contender, schedule: Callable[[Any], Any] | None, steps: int) -> nn.Module:
    """The network after training steps in code that is compiled."""
    torch.compiler.reset()
    model = network(contender)
    optimizer = contender(model.parameters())
    scheduler = schedule and schedule(optimizer)

    @torch.compile
    def step(inputs: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    for i in range(steps):
        step(*batch(i))
        if scheduler is not None:
            scheduler.step()
    return model


@COMPILED.use(
    "`torch.compile` of a whole training step",
    reasons={
        "TernaryVote": "A compiled backward pass rounds otherwise; where a gradient is 0 but for that, so is a vote."
    },
)
def compiled_loop(contender: Contender) -> None:
    """The run is the eager one."""
    assert_same(compiled_training(contender, None, 3), trained(contender), off=1e-4)


@COMPILED.use("`torch.compile` of a whole training step, under a schedule", reasons=FIXED)
def compiled_schedule(contender: Contender) -> None:
    """The run is the eager one, and nothing is compiled anew as the rate moves more often than torch allows."""
    found = compiled_training(contender, LinearLR, 12)
    model = network(contender)
    optimizer = contender(model.parameters())
    train(model, optimizer, 12, LinearLR(optimizer))
    assert_same(found, model, off=1e-4)


@COMPILED.use("`model.compile()`, stepped eagerly")
def compiled_model(contender: Contender) -> None:
    """The run is the eager one."""
    torch.compiler.reset()
    model = network(contender)
    model.compile()
    train(model, contender(model.parameters()))
    assert_same(model, trained(contender), off=1e-4)


# Models


@MODELS.use("`torch.func.functional_call`, `torch.func.grad`")
def functional(contender: Contender) -> None:
    """Gradients that `torch.func.grad` gives are stepped to the plain run."""
    model = network(contender)
    optimizer = contender(model.parameters())
    for step in range(3):
        params = dict(model.named_parameters())
        inputs, labels = batch(step)

        def of(params: Any, inputs: Any = inputs, labels: Any = labels) -> torch.Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(model, params, inputs), labels)

        for name, grad in torch.func.grad(of)(params).items():
            params[name].grad = grad
        optimizer.step()
    assert_same(model, trained(contender), off=1e-5)


@MODELS.use("an ensemble under `torch.vmap` (`stack_module_state`)")
def ensemble(contender: Contender) -> None:
    """The stacked parameters are stepped."""
    models = [network(contender), network(contender)]
    params, _ = torch.func.stack_module_state(models)
    optimizer, before = contender(list(params.items())), {name: p.detach().clone() for name, p in params.items()}

    def of(params: Any, inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(models[0], params, (inputs,))

    torch.vmap(of, (0, None))(params, batch(0)[0]).square().mean().backward()
    optimizer.step()
    assert all(bool((p != before[name]).any()) for name, p in params.items())


@MODELS.use("`parametrizations.weight_norm`", reasons={"TernaryVote": "A magnitude is no ternary weight."})
def weight_norm(contender: Contender) -> None:
    """The magnitudes and directions behind the weight move."""
    _parametrized(contender, parametrizations.weight_norm)


@MODELS.use("`parametrizations.spectral_norm`")
def spectral_norm(contender: Contender) -> None:
    """The weight behind the normalized one moves."""
    _parametrized(contender, parametrizations.spectral_norm)


def _parametrized(contender: Contender, by: Callable[[nn.Module], nn.Module]) -> None:
    model = network(contender)
    by(model[0])
    ready(contender, model[3])
    optimizer = contender(model.named_parameters())
    before = {name: p.clone() for name, p in values(model).items()}
    train(model, optimizer, 1)
    moved = {name for name, p in values(model).items() if bool((p != before[name]).any())}
    assert {name for name in before if name.startswith("0.parametrizations")} <= moved


@MODELS.use("activation checkpointing")
def checkpointed(contender: Contender) -> None:
    """The run is the plain one."""
    model = network(contender)
    optimizer = contender(model.parameters())

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)

    for step in range(3):
        optimizer.zero_grad()
        loss(forward, step).backward()
        optimizer.step()
    assert_same(model, trained(contender))


@MODELS.use("`model.to(torch.float64)` between steps")
def converted(contender: Contender) -> None:
    """Training goes on in the new dtype, with finite numbers."""
    model = network(contender)
    optimizer = contender(model.parameters())
    train(model, optimizer, 2)
    model.to(torch.float64)
    train(model, optimizer, range(2, 3))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# Several processes, of which there is one


@contextmanager
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@SPREAD.use("`DistributedDataParallel`")
def ddp(contender: Contender) -> None:
    """The run is the plain one."""
    with alone():
        model = nn.parallel.DistributedDataParallel(network(contender))
        train(model, contender(model.parameters()))
        assert_same(model.module, trained(contender))


@SPREAD.use("`fully_shard` (FSDP2)")
def fsdp2(contender: Contender) -> None:
    """The run is the plain one."""
    with alone():
        model = network(contender)
        mesh = init_device_mesh("cpu", (1,))
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
        train(model, contender(model.named_parameters()))
        plain = network(contender)
        train(plain, contender(plain.named_parameters()))
        assert_same(model, plain, off=1e-5)


@SPREAD.use("`fully_shard`, saved by `torch.distributed.checkpoint`")
def fsdp2_saved(contender: Contender) -> None:
    """A run that is saved and loaded in its middle ends the same."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    with alone(), tempfile.TemporaryDirectory() as folder:
        models = [network(contender) for _ in range(2)]
        mesh = init_device_mesh("cpu", (1,))
        for model in models:
            fully_shard(model, mesh=mesh)
        optimizers = [contender(model.named_parameters()) for model in models]
        train(models[0], optimizers[0], 2)
        weights, state = get_state_dict(models[0], optimizers[0])
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        weights, state = get_state_dict(models[1], optimizers[1])
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(models[1], optimizers[1], model_state_dict=weights, optim_state_dict=state)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(2, 4))
        assert_same(models[1], models[0])


def _fsdp1(model: nn.Module, original: bool) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)


FLATTENED = {
    **dict.fromkeys(
        ("FusedbunW", "Fusedbun", "SM3"),
        "an axis' statistic of a flattened matrix is another optimizer's: shard with `fully_shard`",
    ),
    **dict.fromkeys(
        ("MupAdam", "MupAdamW", "MupSGD"), "the rule that gives u-μP's types here goes by the parameters' axes"
    ),
}


@SPREAD.use("`FullyShardedDataParallel` (FSDP1), `use_orig_params=True`", reasons=FLATTENED)
def fsdp1(contender: Contender) -> None:
    """The parameters, which are flat there, move, and are finite."""
    with alone():
        model = _fsdp1(network(contender), original=True)
        train(model, contender(model.parameters()))
        with FullyShardedDataParallel.summon_full_params(model):
            assert_moved(copy.deepcopy(model.module), contender)


@SPREAD.use("`FullyShardedDataParallel` (FSDP1), one flat parameter", reasons=FLATTENED)
def fsdp1_flat(contender: Contender) -> None:
    """It moves, and is finite."""
    with alone():
        model = _fsdp1(network(contender), original=False)
        train(model, contender(model.parameters()))
        with FullyShardedDataParallel.summon_full_params(model):
            assert_moved(copy.deepcopy(model.module), contender)


@SPREAD.use("`ZeroRedundancyOptimizer`")
def zero(contender: Contender) -> None:
    """The run is the plain one, but for the noise of rounding, which goes by a parameter's place."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with alone():
        model = network(contender)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), contender.make, **contender.settings)
        train(model, optimizer)
        assert_same(model, trained(contender), off=2e-3)
