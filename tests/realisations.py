"""The realisations that the table of cases drives: each takes a case's parameters through all steps."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from cases import Case

from fusedbun.reference import Tree


def torch_definition(case: Case, dtype: str, params: Tree, steps: list[Tree]) -> Iterator[Tree]:
    leaves = _leaves(dtype, params)
    yield from _torch(case.torch(leaves.values(), implementation="definition").step, leaves, steps)


def torch_kernel(case: Case, dtype: str, params: Tree, steps: list[Tree]) -> Iterator[Tree]:
    leaves = _leaves(dtype, params)
    yield from _torch(case.torch(leaves.values(), implementation="kernel").step, leaves, steps)


def torch_compiled(case: Case, dtype: str, params: Tree, steps: list[Tree]) -> Iterator[Tree]:
    torch.compiler.reset()
    leaves = _leaves(dtype, params)
    yield from _torch(torch.compile(case.torch(leaves.values()).step), leaves, steps)


def _leaves(dtype: str, params: Tree) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.tensor(p, dtype=getattr(torch, dtype))) for name, p in params.items()}


def _torch(step, leaves: dict[str, torch.nn.Parameter], steps: list[Tree]) -> Iterator[Tree]:
    for grads in steps:
        for name, p in leaves.items():
            p.grad = torch.tensor(grads[name], dtype=p.dtype)
        step()
        yield {name: p.detach().double().numpy() for name, p in leaves.items()}


def optax_jitted(case: Case, dtype: str, params: Tree, steps: list[Tree]) -> Iterator[Tree]:
    with jax.enable_x64(dtype == "float64"):
        tx = case.optax()

        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        p = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        state = tx.init(p)
        for grads in steps:
            p, state = step(p, state, jax.tree.map(lambda x: jnp.asarray(x, dtype), grads))
            yield {name: np.asarray(x, np.float64) for name, x in p.items()}
