"""The torch uses' contenders, and what they share: a network, its batches, a loop, comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedbun
from benchmarks.behaviour.uses import Contender
from fusedbun.recipes import RECIPES

INPUTS, OUTPUTS, BATCH = 6, 3, 8


def by_axes(path: tuple[str, ...], param: Any) -> str:
    """u-muP's type of any parameter."""
    return "weight" if param.ndim > 1 else "bias"


def contenders() -> list[Contender]:
    """torch's AdamW, and every class of this package at the settings that its recipe recommends."""
    found = [Contender("AdamW", torch.optim.AdamW, {"lr": 1e-2}, ours=False)]
    for recipe in RECIPES.values():
        settings: dict[str, Any] = {} if recipe.fixed_lr else {"lr": 1e-2}
        settings |= {"mup": by_axes} if "mup" in recipe.defaults else {}
        settings |= {"threshold": 1} if recipe.fixed_lr else {}
        make = getattr(fusedbun, recipe.torch_class)
        found.append(Contender(recipe.torch_class, make, {**settings, **recipe.recommended}, ternary=recipe.fixed_lr))
    return found


def ready(contender: Contender, module: nn.Module) -> nn.Module:
    """The module with weights that the contender steps."""
    if contender.ternary:
        for p in module.parameters():
            p.data = p.data.sign()
    return module


def network(contender: Contender, width: int = 8) -> nn.Module:
    """A small network, the same in every call."""
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, OUTPUTS)]
    return ready(contender, nn.Sequential(*layers))


def vectors(contender: Contender, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters without a network, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [nn.Parameter(x.sign() if contender.ternary else x) for x in found]


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and labels, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, INPUTS, generator=generator)
    return inputs.to(dtype), torch.randint(OUTPUTS, (BATCH,), generator=generator)


def loss(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    """The loss on a batch."""
    parameters = getattr(model, "parameters", list)()
    inputs, labels = batch(step, next((p.dtype for p in parameters if p.is_floating_point()), torch.float32))
    return functional.cross_entropy(model(inputs).float(), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int | range = 3, schedule: Any = None) -> None:
    """A plain loop."""
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def trained(contender: Contender, steps: int = 3, **settings: Any) -> nn.Module:
    """The network after a plain loop."""
    model = network(contender)
    train(model, contender(model.parameters(), **settings), steps)
    return model


def stepped(contender: Contender, params: Iterable[Tensor], steps: int = 2, **settings: Any) -> torch.optim.Optimizer:
    """The optimizer after steps with random gradients, each of which moved every parameter."""
    params = list(params)
    optimizer = contender(params, **settings)
    for step in range(steps):
        before = [p.detach().clone() for p in params]
        for index, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + index)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        for p, q in zip(params, before, strict=True):
            assert not p.numel() or bool((p != q).any()), f"a parameter of shape {tuple(p.shape)} did not move"
            assert bool(p.isfinite().all())
    return optimizer


def values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, whole."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in found.items()}


def assert_same(found: Any, wanted: Any, off: float = 0.0) -> None:
    """Equality, to the last bit or to within `off` of 1."""
    found, wanted = (values(x) if isinstance(x, nn.Module) else x for x in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=off, atol=off)


def assert_moved(model: nn.Module, contender: Contender) -> None:
    """The network is not what it was before training, and is finite."""
    assert all(bool(p.isfinite().all()) for p in values(model).values())
    start = values(network(contender))
    assert any(bool((p != start[name]).any()) for name, p in values(model).items())
