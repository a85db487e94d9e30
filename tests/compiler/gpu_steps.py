"""Steps with the Triton kernels, as functions that another process can be asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from leaves import LR, Arrays

from fusedbun.chain import Chain
from fusedbun.compiler import schedule, trace
from fusedbun.compiler.trace import evaluate, hyperparameters
from fusedbun.compiler.triton.text import numbers, words
from fusedbun.storage.codes import computed_in
from fusedbun.torch import gpu
from fusedbun.transform import Signal, Slot, Transform

INTEGERS = (torch.int8, torch.uint8, torch.int32)


def prepare(
    chains: list[Chain], leaves: list[Arrays], dtype: str, device: str, order: tuple[int, ...] | None
) -> tuple[gpu.GpuStep, list[gpu.Leaf], torch.Tensor]:
    """The step of leaves whose chains have one program, their tensors, and the scalars."""
    program = trace(chains[0], leaves[0]["param"].ndim, order, dtype=dtype)
    made = []
    for n, (chain, arrays) in enumerate(zip(chains, leaves, strict=True)):
        kinds = {name: getattr(torch, stored.dtype) for name, stored in program.arrays.items()}
        parts = {name for name, stored in program.arrays.items() if stored.part != "element"}
        slots = {name: tensor(arrays[name], k, device, None if name in parts else order) for name, k in kinds.items()}
        known = hyperparameters(program, chain, LR)
        given = {v.detail: known[v.detail] for v in words(program)}
        made.append(gpu.Leaf(tensor(arrays["param"], getattr(torch, dtype), device, order), slots, n, given))
    computed = torch.float64 if dtype == "float64" else torch.float32
    scalars = torch.empty(len(chains), len(numbers(program)), dtype=computed, device=device)
    return gpu.GpuStep(schedule(program), made, scalars), made, scalars


def tensor(array: Any, dtype: torch.dtype, device: str, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The array as a tensor of its own memory, dense along the axes in this order."""
    order = order or tuple(range(array.ndim))
    known = array if dtype in INTEGERS else np.asarray(array, np.float64)  # not every dtype of NumPy's is torch's
    x = torch.tensor(np.ascontiguousarray(known.transpose(order)), device=device).to(dtype)
    return x.reshape([array.shape[axis] for axis in order]).permute(np.argsort(order).tolist())


def take(
    chains: list[Chain],
    leaves: list[Arrays],
    steps: list[list[Any]],
    dtype: str = "float64",
    device: str = "cpu",
    order: tuple[int, ...] | None = None,
    lrs: tuple[float, ...] = (LR, LR, LR, LR),
) -> list[list[Arrays]]:
    """The leaves after each step; what has fewer bits than float32 is widened.

    Args:
        chains: for each leaf; they have one program.
        leaves: their arrays at the start.
        steps: for each step the leaves' gradients.
        dtype: of the parameters.
        device: "cpu" for the interpreter.
        order: the axes from the slowest in memory to the fastest.
        lrs: the learning rates of the steps.
    """
    step, made, scalars = prepare(chains, leaves, dtype, device, order)
    program = trace(chains[0], leaves[0]["param"].ndim, order, dtype=dtype)
    after = []
    for grads, lr in zip(steps, lrs, strict=False):
        values = [evaluate(numbers(program), hyperparameters(program, chain, lr)) for chain in chains]
        scalars.copy_(torch.tensor(values, dtype=scalars.dtype).reshape(scalars.shape))
        step([tensor(g, getattr(torch, dtype), device, order) for g in grads])
        after.append([{"param": array(leaf.param), **{k: array(x) for k, x in leaf.slots.items()}} for leaf in made])
    return after


def array(x: torch.Tensor) -> Any:
    """A copy in NumPy, which has no bfloat16 of its own."""
    return (x if x.dtype in (*INTEGERS, torch.float64) else x.float()).cpu().numpy().copy()


def launches(chain: Chain, leaves: list[Arrays], device: str = "cpu") -> int:
    """How many launches a step of the leaves takes."""
    return len(prepare([chain] * len(leaves), leaves, "float32", device, None)[0].launches)


@dataclass(frozen=True)
class Everything(Transform):
    """A rule with the operations, reductions and codes that the family leaves out, and numbers float32 cannot hold."""

    name: ClassVar[str] = "every-thing"

    def slots(self, shape):
        every, last = len(shape), len(shape) - 1
        return {
            "steps": Slot((), "int32"),
            "votes": Slot.full(every, "int8"),
            "last": Slot((last,)),
            "least": Slot((0,)),
            "behind": Slot(tuple(range(1, every))),
        }

    def update(self, xp, signal, state, param):
        u, every = signal.update, tuple(range(len(param.shape)))
        largest = xp.max(xp.abs(u), axis=every, keepdims=True)
        late = state["steps"] != 2
        u = xp.where(late, xp.minimum(xp.log(xp.abs(u) + 0.1), 0.3), xp.expm1(0.1 * u)) / xp.maximum(largest, 0.7)
        total = xp.sum(state["least"], axis=(0,), keepdims=True)
        mean = xp.mean(state["last"], axis=every, keepdims=True)
        small = xp.min(u, axis=every[:-1], keepdims=True)
        return Signal(u * total - xp.where(u > mean, -0.1, u * 0.1)), {
            "steps": state["steps"] + 1,
            "votes": xp.minimum(xp.maximum(state["votes"] + xp.sign(u), -3.0), 3.0),
            "last": xp.minimum(state["last"], small * mean),
            "least": state["least"] - xp.min(xp.abs(param), axis=every[1:], keepdims=True),
            "behind": state["last"] + xp.max(u, axis=(0,), keepdims=True) * state["behind"],
        }


def compile_for(
    capability: int, chain: Chain, ndim: int, cache: str, dtypes: tuple[str, ...]
) -> dict[tuple[str, str], str]:
    """The assembly of each kernel, by dtype and name, for a GPU of this capability; none has to be there."""
    os.environ.update(FUSEDBUN_CACHE=cache, TRITON_CACHE_DIR=cache)
    import triton
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusedbun.compiler.triton.module import emit, kernels

    made = {}
    for dtype in dtypes:
        planned = schedule(trace(chain, ndim, dtype=dtype))
        module = gpu.load(emit(planned))
        for kernel in kernels(planned):
            rows, columns = gpu.TILES[-1] if kernel.work in ("rows", "elements") else gpu.SMALL_TILE
            given = {"P": getattr(tl, dtype), "T": getattr(tl, computed_in(dtype)), "BR": rows, "BC": columns}
            kinds = {"leaves": "*i64", "work": "*i32", **dict.fromkeys(given, "constexpr")}
            source = ASTSource(getattr(module, kernel.name), signature=kinds, constexprs=given)
            options = {"num_warps": gpu.WARPS, "enable_fp_fusion": False}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert compiled.asm["cubin"]
            made[dtype, kernel.name] = compiled.asm["ptx"]
    return made
