"""A step of many leaves as one primitive of JAX: by kernels where XLA can call them, by the definition elsewhere.

Which of the two is decided when a program is lowered, for only then are its devices known: kernels on one CPU, under
jit and its control flow. On several devices XLA partitions the definition, on GPUs and TPUs it compiles it, and vmap
and derivatives are those of the definition. So is what jax.export keeps: whoever runs it may not have the kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fusedbun.compiler.cpp.build import BuildError
from fusedbun.compiler.cpp.native import KernelError
from fusedbun_jax import kernels
from fusedbun_jax.definition import join_state, split_state, transformation
from fusedbun_jax.layout import apart
from fusedbun_jax.operands import Leaf, pack, unpack


@dataclass(frozen=True, repr=False)
class Step:
    """What of a step is known when it is traced.

    Args:
        leaves: its leaves, packed.
        as_update: whether it gives what is to be added to each parameter instead of the new parameter.
        needs_kernels: whether to do without kernels is an error.
    """

    leaves: tuple[Leaf, ...]
    as_update: bool
    needs_kernels: bool

    def __repr__(self) -> str:
        return f"<{len(self.leaves)} leaves>"


def step(leaves: Sequence[Leaf], as_update: bool = False, needs_kernels: bool = False) -> list[list[Any]]:
    """What a step makes of each leaf's parameter and of its state's arrays.

    Args:
        leaves: the leaves.
        as_update: give what is to be added to each parameter instead of the new parameter.
        needs_kernels: do not do without kernels.
    """
    operands, packed = pack([leaf for leaf in leaves if leaf.param.size])
    changed = iter(_jitted(*operands, step=Step(packed, as_update, needs_kernels)))

    def made(leaf: Leaf) -> list[Any]:
        if leaf.param.size:
            return [next(changed) for _ in (leaf.param, *leaf.stored)]
        update = leaf.grad.astype(leaf.chain.rounding.of_updates(leaf.grad.dtype.name))
        return [update if as_update else leaf.param, *leaf.stored]  # there is nothing to step

    return [made(leaf) for leaf in leaves]


@partial(jax.jit, static_argnames="step", inline=True)
def _jitted(*operands: Any, step: Step) -> list[Any]:
    changed: list[Any] = _step.bind(*operands, step=step)
    return changed


def _by_kernels(*operands: Any, step: Step) -> list[Any]:
    return kernels.step(unpack(step.leaves, operands), step.as_update)


def _by_definition(*operands: Any, step: Step) -> list[Any]:
    leaves = unpack(step.leaves, operands)
    counts = apart(leaves[0].count, len(leaves)) if leaves else ()
    counted = [replace(leaf, count=count) for leaf, count in zip(leaves, counts, strict=True)]
    return [x for leaf in counted for x in _by_update(leaf, step.as_update)]


def _by_update(leaf: Leaf, as_update: bool) -> list[Any]:
    """The update, or what `optax.apply_updates` makes with it of the parameter, and the state's arrays after it."""
    chain, param = leaf.chain, leaf.param
    name = chain.rounding.name  # decides the noise
    tx = transformation(chain, leaf.lr)
    trees = [{field: {name: x} for field, x in arrays.items()} for arrays in leaf.by_state(leaf.stored)]
    updates, after = tx.update({name: leaf.grad}, join_state(chain, trees, leaf.count), {name: param})
    arrays = [x[name] for trees in split_state(chain, after)[0] for x in trees.values()]
    return [(updates if as_update else optax.apply_updates({name: param}, updates))[name], *arrays]


def _abstract(*operands: Any, step: Step) -> list[Any]:
    return [x for leaf in step.leaves for x in _changed(leaf, operands, step.as_update)]


def _changed(leaf: Leaf, operands: Sequence[Any], as_update: bool) -> list[Any]:
    """The types of what a leaf's step gives."""
    param, grad, *stored = (operands[x.place].update(weak_type=False) for x in leaf.arrays)
    update = grad.update(dtype=jnp.dtype(leaf.chain.rounding.of_updates(grad.dtype.name)))
    return [update if as_update else param, *stored]


def _definition(step: Step, where: str) -> Any:
    """The definition, for what has no kernels; raises a KernelError where they are needed."""
    if step.needs_kernels:
        raise KernelError(f'step(…, implementation="kernel"): there are no kernels {where}')
    return partial(_by_definition, step=step)


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, step: Step, where: str = "for this platform") -> Any:
    return mlir.lower_fun(_definition(step, where), multiple_results=True)(ctx, *operands)


def _lower_for_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, step: Step) -> Any:
    where = "for more than one device, or under shard_map"
    if ctx.module_context.lowering_parameters.for_export:
        where = "in what jax.export keeps, for who runs it may not have them"
    elif getattr(ctx.module_context.axis_context, "num_devices", None) == 1:
        try:
            return mlir.lower_fun(_by_kernels, multiple_results=True)(ctx, *operands, step=step)
        except BuildError as error:
            _warn(f"the definition stands in for kernels: {error}")
            where = f"here: {error}"
        except KernelError as error:
            where = f"for this chain: {error}"
    return _lower(ctx, *operands, step=step, where=where)


@cache
def _warn(message: str) -> None:
    warnings.warn(f"fusedbun_jax: {message}", stacklevel=2)


def _batched(operands: Sequence[Any], axes: Sequence[int | None], *, step: Step) -> tuple[list[Any], list[int]]:
    changed = jax.vmap(_definition(step, "under vmap"), in_axes=tuple(axes))(*operands)
    return changed, [0] * len(changed)


def _differentiated(primals: Sequence[Any], tangents: Sequence[Any], *, step: Step) -> tuple[list[Any], list[Any]]:
    definition, values = _definition(step, "for derivatives"), list(primals)
    varied = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_varied(*some: Any) -> list[Any]:
        for i, x in zip(varied, some, strict=True):
            values[i] = x
        changed: list[Any] = definition(*values)
        return changed

    after, derivatives = jax.jvp(of_varied, [primals[i] for i in varied], [tangents[i] for i in varied])
    return after, [_or_zero(x, d) for x, d in zip(after, derivatives, strict=True)]


def _or_zero(x: Any, tangent: Any) -> Any:
    """The tangent of a result; that of integers is none."""
    return ad.Zero(jax.typeof(x).to_tangent_aval()) if tangent.dtype == jax.dtypes.float0 else tangent


_step = Primitive("fusedbun_step")
_step.multiple_results = True
_step.def_impl(_by_definition)  # where jit is switched off
_step.def_abstract_eval(_abstract)
batching.primitive_batchers[_step] = _batched
ad.primitive_jvps[_step] = _differentiated
mlir.register_lowering(_step, _lower)
mlir.register_lowering(_step, _lower_for_cpu, platform="cpu")
