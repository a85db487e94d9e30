"""The optimizers that the torch tests run over, and what those tests share: parameters, gradients, comparison.

An optimizer gets all the generic tests with its recommended settings, or with those of its lines in `MAKERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from sweeps import sweep
from torch import Tensor

import fusedbun
from fusedbun import (
    SM3,
    ChainOptimizer,
    DecoupledLionW,
    Fusedbun,
    FusedbunW,
    MupAdam,
    MupAdamW,
    MupSGD,
    ScaledOptum,
)
from fusedbun.recipes import RECIPES
from fusedbun.torch import TransformOptimizer
from fusedbun.transforms import Momentum, RMSScale, SM3Accumulate

Maker = Callable[..., TransformOptimizer]

SM3_CHAIN = (SM3Accumulate(0.9), RMSScale(0.0, 1e-30), Momentum(0.9, 0.9))


def mup_types(path: tuple[str, ...], param: Any) -> tuple[str, int]:
    """A type and a depth for any parameter, with a name or without."""
    return ("weight", 4) if param.ndim > 1 else ("bias", 9)


recommended: Maker = partial(Fusedbun, **RECIPES["fusedbun"].recommended)

# Each is called as make(params, lr=…, …). TernaryVote has no learning rate to give and rounds no weights, so that most
# of what is said here of numbers does not hold for it: test_torch_ternary_vote.py has its like.
MAKERS: dict[str, Maker] = {
    "fusedbun": Fusedbun,
    "fusedbun-recommended": recommended,
    "fusedbun-clipped-lagged": partial(Fusedbun, use_rms=True, clip_rms=0.5, lagged=True),
    "chain": partial(ChainOptimizer, transforms=SM3_CHAIN),
    "fusedbunw": partial(FusedbunW, momentum_dtype=None),  # int8 rounds with noise: test_torch_storage.py has it
    "sm3": SM3,
    "sm3-momentum": partial(SM3, momentum=0.9, beta=0.9),
    "scaled-optum": partial(ScaledOptum, weight_decay=0.1),
    "mup-adam": partial(MupAdam, weight_decay=0.01, amsgrad=True, mup=mup_types, independent_weight_decay=False),
    "mup-adamw": partial(MupAdamW, weight_decay=1e-4, mup=mup_types),
    "mup-sgd": partial(MupSGD, momentum=0.9, dampening=0.1, weight_decay=1e-4, mup=mup_types),
    "decoupled-lionw": partial(DecoupledLionW, weight_decay=1e-4),
}
_LISTED = {getattr(make, "func", make) for make in MAKERS.values()}
for name, recipe in RECIPES.items():
    cls = getattr(fusedbun, recipe.torch_class)
    if cls not in _LISTED and not recipe.fixed_lr:
        types = {"mup": mup_types} if "mup" in recipe.defaults else {}
        MAKERS[name] = partial(cls, **recipe.recommended, **types)

STATELESS = {"scaled-optum"}
WITH_STATE = {name: make for name, make in MAKERS.items() if name not in STATELESS}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
every_optimizer_with_state = pytest.mark.parametrize("make", WITH_STATE.values(), ids=WITH_STATE.keys())
# For what needs kernels of its own, other than those of a plain step in float32: each takes a second to compile
FEW = [MAKERS[name] for name in ("fusedbun", "sm3-momentum", "mup-adamw")]
sweep_of_optimizers, sweep_of_optimizers_with_state = (
    sweep("make", makers.values(), short=lambda make: make in FEW, ids=makers) for makers in (MAKERS, WITH_STATE)
)


def sweep_of_dtypes(dtypes: Iterable[torch.dtype], makers: Mapping[str, Maker] = MAKERS) -> pytest.MarkDecorator:
    """Runs a test with every optimizer in each of these dtypes, in `make test` in float32, and a few in the others."""
    pairs = {f"{name}-{str(d).removeprefix('torch.')}": (make, d) for name, make in makers.items() for d in dtypes}
    return sweep(
        ("make", "dtype"), pairs.values(), short=lambda make, dtype: dtype == torch.float32 or make in FEW, ids=pairs
    )


# Few, for every number of axes is a kernel of its own, and takes a second to compile on a fresh machine.
SHAPES = ((), (5,), (4, 3), (2, 1, 3, 2))
EVERY_SHAPE = (*SHAPES, (2, 3, 4), (2, 2, 1, 3, 2))


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters with random values, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradient(param: Tensor, step: int, index: int = 0) -> Tensor:
    """A random gradient, of the parameter's strides: the same for the same step and index."""
    generator = torch.Generator().manual_seed(1000 * step + index + 1)
    values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    return torch.empty_like(param, requires_grad=False).copy_(values)


def set_gradients(params: Iterable[Tensor], step: int) -> None:
    for index, param in enumerate(params):
        param.grad = gradient(param, step, index)


def run(optimizer: torch.optim.Optimizer, steps: int | range) -> None:
    """Steps with fresh gradients in every parameter: for these step numbers, or for the first so many."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps) if isinstance(steps, int) else steps:
        set_gradients(params, step)
        optimizer.step()


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    """New parameters with the same values and strides."""
    return [param.detach().clone().requires_grad_() for param in params]


def assert_same(found: Any, wanted: Any) -> None:
    """Asserts equality to the last bit, dtypes and shapes included; a NaN equals a NaN."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The state of every parameter that has one, in the parameters' order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [dict(optimizer.state[param]) for param in params if param in optimizer.state]


def first_lr(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The entry of the first group that decay is relative to, where there is one."""
    return {name: value for name, value in optimizer.param_groups[0].items() if name == "first_lr"}


def floating(state: Mapping[str, Tensor]) -> list[Tensor]:
    """The state that is not a counter."""
    return [value for value in state.values() if value.is_floating_point()]


def full_size(optimizer: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    """The parameter's state of its own shape."""
    return [value for value in optimizer.state[param].values() if value.shape == param.shape]


def assert_same_run(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Asserts that two optimizers have the same parameters and the same state, to the last bit."""
    ours, theirs = ([p.detach() for group in o.param_groups for p in group["params"]] for o in (optimizer, other))
    assert_same(ours, theirs)
    assert_same(states(optimizer), states(other))


@contextmanager
def unchanged(optimizer: torch.optim.Optimizer, groups: bool = True):
    """Asserts that the block changes no parameter, no state and (with `groups`) no param group, to the last bit."""

    def look() -> Any:
        entries = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        params = [[param.detach().clone() for param in group["params"]] for group in optimizer.param_groups]
        state = {param: {k: v.clone() for k, v in slots.items()} for param, slots in optimizer.state.items()}
        return params, state, entries

    params, state, entries = look()
    yield
    new_params, new_state, new_entries = look()
    assert_same(new_params, params)
    assert list(new_state) == list(state)
    assert_same(list(new_state.values()), list(state.values()))
    if groups:
        assert new_entries == entries
