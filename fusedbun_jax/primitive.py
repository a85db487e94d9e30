"""A step of many leaves as one primitive of JAX: by kernels where XLA can call them, by the definition elsewhere.

Which of the two it is shows when a program is lowered, for then its devices are known: kernels on one CPU, under jit
and its control flow. On several devices XLA partitions the definition, on GPUs and TPUs it compiles it, and vmap and
derivatives are those of the definition.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any, ClassVar

import jax
import optax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fusedbun.chain import Chain
from fusedbun.compiler.cpp.build import BuildError
from fusedbun.compiler.cpp.native import KernelError
from fusedbun_jax import kernels
from fusedbun_jax.definition import arrays_by_state, transformation
from fusedbun_jax.lift import Descend, lift
from fusedbun_jax.state import TransformState


@dataclass(frozen=True)
class Given:
    """Stands for a number that is an operand of the step, for its value may not be known when the step is traced.

    Args:
        place: which of the operands.
        dtype: its dtype, by name.
    """

    place: int
    dtype: str
    shape: ClassVar[tuple[int, ...]] = ()


@dataclass(frozen=True)
class Leaf:
    """A leaf of a step, without its arrays.

    Args:
        chain: the chain for it; `Given` stands for numbers that are operands.
        lr: the learning rate, a number or a `Given`.
        arrays: how many arrays it has: the parameter, the gradient and the slots.
    """

    chain: Chain
    lr: Any
    arrays: int

    def filled(self, given: Sequence[Any]) -> tuple[Chain, Any]:
        """The chain and the learning rate, with numbers for every `Given`."""

        def fill(value: Any) -> Any:
            return given[value.place] if isinstance(value, Given) else value

        filled = {
            i: replace(t, **changed)
            for i, t in enumerate(self.chain)
            if (changed := {name: fill(x) for name, x in vars(t).items() if isinstance(x, Given)})
        }
        chain = Chain(tuple(filled.get(i, t) for i, t in enumerate(self.chain))) if filled else self.chain
        return chain, fill(self.lr)


@dataclass(frozen=True, repr=False)
class Step:
    """What of a step is known when it is traced.

    Args:
        leaves: its leaves.
        given: how many of the operands are numbers; the leaves' arrays follow.
        needs_kernels: an error is raised where there are none.
    """

    leaves: tuple[Leaf, ...]
    given: int
    needs_kernels: bool

    def split(self, operands: Sequence[Any]) -> tuple[Sequence[Any], list[list[Any]]]:
        """The numbers, and the arrays of every leaf."""
        arrays = iter(operands[self.given :])
        return operands[: self.given], [list(islice(arrays, leaf.arrays)) for leaf in self.leaves]

    def __repr__(self) -> str:
        return f"<{len(self.leaves)} leaves>"


@partial(jax.jit, static_argnames="step", inline=True)
def run(*operands: Any, step: Step) -> list[Any]:
    """Every leaf's parameter and the state's arrays after the step."""
    found: list[Any] = _step.bind(*operands, step=step)
    return found


def _by_definition(*operands: Any, step: Step) -> list[Any]:
    given, leaves = step.split(operands)
    return [x for leaf, arrays in zip(step.leaves, leaves, strict=True) for x in _updated(*leaf.filled(given), *arrays)]


def _updated(chain: Chain, lr: Any, param: Any, grad: Any, *stored: Any) -> list[Any]:
    """The parameter and the state's arrays after `update` and `optax.apply_updates`, of a tree of this leaf."""
    name, tx = chain.rounding.name, transformation(chain, lift(Descend(lr)))  # the leaf's name decides the noise
    left = iter(stored)
    before = [TransformState({name: {key: next(left) for key in arrays}}) for arrays in arrays_by_state(chain, param)]
    others = TransformState({name: {}}), *(() if chain.rounding.stochastic else (optax.EmptyState(),))
    count, params = len(chain.transforms), {name: param}
    updates, after = tx.update({name: grad}, (*before[:count], *others, *before[count:]), params)
    states = [state.slots[name] for state in (*after[:count], *after[count + 1 :]) if isinstance(state, TransformState)]
    return [optax.apply_updates(params, updates)[name], *(x for state in states for x in state.values())]


def _by_kernels(*operands: Any, step: Step) -> list[Any]:
    given, leaves = step.split(operands)
    return kernels.step(
        [kernels.Leaf(*leaf.filled(given), *arrays) for leaf, arrays in zip(step.leaves, leaves, strict=True)]
    )


def _abstract(*operands: Any, step: Step) -> list[Any]:
    _, leaves = step.split(operands)
    return [x.update(weak_type=False) for param, _, *stored in leaves for x in (param, *stored)]


def _instead(step: Step, where: str) -> Any:
    """The definition, where there are no kernels; raises a KernelError where they are needed."""
    if step.needs_kernels:
        raise KernelError(f'step(…, implementation="kernel"): there are no kernels {where}')
    return partial(_by_definition, step=step)


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, step: Step) -> Any:
    return mlir.lower_fun(_instead(step, "for this platform"), multiple_results=True)(ctx, *operands)


def _lower_for_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, step: Step) -> Any:
    if getattr(ctx.module_context.axis_context, "num_devices", None) != 1:
        where = "for more than one device, or under shard_map"
        return mlir.lower_fun(_instead(step, where), multiple_results=True)(ctx, *operands)
    try:
        return mlir.lower_fun(_by_kernels, multiple_results=True)(ctx, *operands, step=step)
    except BuildError as error:
        _warn(f"the definition stands in for kernels: {error}")
        instead = _instead(step, f"here: {error}")
    except KernelError as error:
        instead = _instead(step, f"for this chain: {error}")
    return mlir.lower_fun(instead, multiple_results=True)(ctx, *operands)


@cache
def _warn(message: str) -> None:
    warnings.warn(f"fusedbun_jax: {message}", stacklevel=2)


def _batched(operands: Sequence[Any], axes: Sequence[int | None], *, step: Step) -> tuple[list[Any], list[int]]:
    found = jax.vmap(_instead(step, "under vmap"), in_axes=tuple(axes))(*operands)
    return found, [0] * len(found)


def _differentiated(primals: Sequence[Any], tangents: Sequence[Any], *, step: Step) -> tuple[list[Any], list[Any]]:
    definition, values = _instead(step, "for derivatives"), list(primals)
    varied = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_varied(*some: Any) -> list[Any]:
        for i, x in zip(varied, some, strict=True):
            values[i] = x
        found: list[Any] = definition(*values)
        return found

    after, moved = jax.jvp(of_varied, [primals[i] for i in varied], [tangents[i] for i in varied])
    return after, [_or_zero(x, d) for x, d in zip(after, moved, strict=True)]


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
