"""Optimizers with something done beside their step: settings that are tried out before anyone builds them in."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedbun.storage.codes import from_words, to_words
from fusedbun.torch import namespace

MOMENT = "momentum.moment"


class Altered:
    """An optimizer that does something beside its step.

    Args:
        optimizer: the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    @property
    def params(self) -> list[Tensor]:
        """All parameters."""
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad()


class Cautious(Altered):
    """Leaves out the elements of an update whose sign is not the gradient's, and makes the others larger by as much.

    Source: Liang et al. 2024 (arXiv 2411.16085).
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        before = [p.clone() for p in self.params]
        self.optimizer.step()
        for p, old in zip(self.params, before, strict=True):
            update = old - p
            agree = (update * p.grad > 0).to(p.dtype)
            p.copy_(old - update * agree / agree.mean().clamp(min=1e-3))


class RoundedMomentum(Altered):
    """Rounds the momentum of matrices after each step as codes of some bits would keep it; it stays in float32.

    Args:
        optimizer: the optimizer.
        bits: of a code.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, bits: int) -> None:
        super().__init__(optimizer)
        self.bits, self.generator = bits, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        self.optimizer.step()
        for p in self.params:
            if p.ndim > 1:
                blocks = namespace.to_blocks(self.state[p][MOMENT])
                noise = torch.randint(2**16, blocks.shape, generator=self.generator, dtype=torch.int32)
                rounded = from_words(namespace, *to_words(namespace, blocks, noise, self.bits), self.bits)
                self.state[p][MOMENT].copy_(namespace.from_blocks(rounded, p.shape))
