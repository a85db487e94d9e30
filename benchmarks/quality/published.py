"""The rules of the first public Fusedbun, as baselines. They keep two arrays of a parameter's size, as AdamW does.

With `g` the gradient, centralized for parameters of two or more axes:

    m = momentum_beta*m + g;  u = where(abs(m) > eps, m, 0)
    v = beta_decay*v + (1 - beta_decay)*u*u  where abs(m) > eps
    p = (1 - lr*Lambda)*p - lr*u / (sqrt(v) + eps)

So it is described. As it was written, `v` of a parameter of two or more axes is computed and not kept: it is zero
before every step, and the update is the momentum's sign over `sqrt(1 - beta_decay)`. The accuracy that was reported is
older than the mask. The rule before it has no mask and takes a mean over the leading axis for `v`:

    v = b*v + (1 - b)*mean(g*g over the leading axis),  b = 1 - t**-beta_decay
    m = momentum_beta*m + (1 - momentum_beta)*g / (sqrt(v) + eps);  p = p - lr*m

Source: the repository aloobun/fusedbun, of March 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class FirstFusedbun(torch.optim.Optimizer):
    """The first public Fusedbun, with `centralize` and `use_rms`.

    Args:
        params: the parameters.
        lr: the learning rate.
        rule: "described", "written" or "before the mask", see above.
        eps: the mask's threshold, and added to the root.
        beta_decay: the share of the past that the second moment keeps.
        Lambda: the decoupled weight decay.
        momentum_beta: the share of the past that the momentum keeps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        rule: str = "described",
        eps: float = 1e-8,
        beta_decay: float = 0.8,
        Lambda: float = 0.01,
        momentum_beta: float = 0.9,
    ) -> None:
        if rule not in ("described", "written", "before the mask"):
            raise ValueError(f'rule must be "described", "written" or "before the mask", but is {rule!r}')
        given = {"eps": eps, "beta_decay": beta_decay, "Lambda": Lambda, "momentum_beta": momentum_beta}
        super().__init__(params, {"lr": lr, "rule": rule, **given})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step; a closure is not taken."""
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad
                if p.ndim > 1:
                    grad = grad - grad.mean(tuple(range(1, p.ndim)), keepdim=True)
                state = self.state[p]
                state.setdefault("m", torch.zeros_like(p))
                state.setdefault("v", torch.zeros_like(p))
                if group["rule"] == "before the mask":
                    state["t"] = state.get("t", 0) + 1
                    self._before_the_mask(group, p, grad, state)
                else:
                    self._masked(group, p, grad, state)

    def _masked(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        state["m"] = m = group["momentum_beta"] * state["m"] + grad
        kept, beta = (m.abs() > group["eps"]) | (m.ndim < 2), group["beta_decay"]  # vectors have no mask
        v = torch.where(kept, beta * state["v"] + (1 - beta) * m * m, state["v"])
        if group["rule"] == "described" or p.ndim < 2:
            state["v"] = v
        p.mul_(1 - group["lr"] * group["Lambda"])
        p.sub_(group["lr"] * torch.where(kept, m, 0) / (v.sqrt() + group["eps"]))

    def _before_the_mask(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        b, square = 1 - state["t"] ** -group["beta_decay"], grad * grad
        state["v"] = b * state["v"] + (1 - b) * (square.mean(0) if p.ndim > 1 else square)
        beta = group["momentum_beta"]
        state["m"] = beta * state["m"] + (1 - beta) * grad / (state["v"].sqrt() + group["eps"])
        p.sub_(group["lr"] * state["m"])
