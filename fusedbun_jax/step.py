"""Whole chains as optax optimizers, with a step that changes the parameters in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fusedbun.chain import Chain
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.hyper import check, plain
from fusedbun.storage.rounding import Rounding
from fusedbun_jax import leaf, primitive
from fusedbun_jax.definition import arrays_by_state, transformation
from fusedbun_jax.lift import Descend, lift
from fusedbun_jax.primitive import Given
from fusedbun_jax.rounding import SEED
from fusedbun_jax.state import TransformState

Implementation = Literal["kernel", "definition"]


class IrregularError(Exception):
    """The definition must take the step, or say what is wrong; the message says why."""


class SteppingTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """An optimizer of optax's, made from a chain, that can also step the parameters itself.

    params, state = tx.step(grads, state, params)
    """

    def step(
        self,
        grads: optax.Updates,
        state: optax.OptState,
        params: optax.Params,
        *,
        implementation: Implementation | None = None,
    ) -> tuple[optax.Params, optax.OptState]:
        """What `update` and `optax.apply_updates` do, with the same state, in one pass over memory on CPUs.

            @partial(jax.jit, donate_argnums=(0, 1))
            def train(params, state, batch):
                return tx.step(jax.grad(loss)(params, batch), state, params)

        On one CPU a generated kernel steps all parameters; what is donated to `jit` is changed in place. (JAX gives
        the first donated buffer of a shape to the first result of that shape, so donate the parameters before the
        state, as above, where they are also returned so: otherwise they trade places, which takes copies.)

        Everywhere else it is the definition that runs, as XLA compiles it: on GPUs and TPUs, on several devices, under
        vmap, for derivatives, without a C++ compiler, and for a chain that no plan expresses.

        Args:
            grads: the gradients.
            state: the state, of `init`, `update` or `step`.
            params: the parameters.
            implementation: "kernel" or "definition"; None: a kernel where there is one.

        Returns:
            The new parameters and the new state.

        Raises:
            KernelError: a kernel is asked for where there is none; the message says why.
        """
        if implementation not in (None, "kernel", "definition"):
            raise ValueError(f'implementation must be "kernel", "definition" or None, but it is {implementation!r}')
        if implementation != "definition":
            try:
                found: tuple[optax.Params, optax.OptState] = self.update.__self__.step(
                    grads, state, params, implementation == "kernel"
                )
                return found
            except IrregularError as error:
                if implementation == "kernel":
                    raise KernelError(f"these arrays cannot be stepped by a kernel: {error}") from error
        updates, state = self.update(grads, state, params)
        return optax.apply_updates(params, updates), state


ROUNDING = {"stochastic_rounding": bool, **SEED}  # as `fusedbun.hyper.check` reads it


def from_chain(
    chain: Chain, learning_rate: optax.ScalarOrSchedule, *, stochastic_rounding: bool = False, seed: int = 0
) -> SteppingTransformation:
    """An optimizer from a chain of transformations: `p = p - learning_rate*u`.

    Args:
        chain: the chain, `fusedbun.chain(...)`.
        learning_rate: a number in [0, inf), or a schedule.
        stochastic_rounding: round bfloat16 parameters without a bias, by float32 updates, instead of to the nearest.
        seed: any integer; it decides the noise of all rounding.
    """
    check("from_chain", ROUNDING, {"stochastic_rounding": stochastic_rounding, "seed": seed})
    rounded = replace(chain, rounding=Rounding(bool(stochastic_rounding), int(seed)))
    return driven(Driver(rounded, learning_rate))


def driven(driver: Driver) -> SteppingTransformation:
    """The optimizer that a driver runs."""
    return SteppingTransformation(driver.init, driver.update)


class Driver:
    """A chain and its learning rate.

    Args:
        chain: the chain.
        learning_rate: a number, or a schedule.
        made_by: the name and the arguments of the recipe that made the chain; None: they are the chain's own.
    """

    def __init__(
        self,
        chain: Chain,
        learning_rate: optax.ScalarOrSchedule,
        made_by: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.chain, self.learning_rate, self.made_by = chain, learning_rate, made_by
        if callable(learning_rate):
            scale = optax.chain(lift(Descend(1.0)), optax.scale_by_schedule(learning_rate))
        else:
            scale = lift(Descend(learning_rate))
        self._definition = transformation(chain, scale)

    def init(self, params: optax.Params) -> Any:
        return self._definition.init(params)

    def update(self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any) -> Any:
        return self._definition.update(updates, state, params, **extra)

    def step(self, grads: Any, state: Any, params: Any, needs_kernels: bool) -> tuple[Any, Any]:
        """The step as one primitive. What it cannot take is an IrregularError: `update` takes it, or refuses it."""
        tree: Any
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
        if tree != jax.tree.structure(params):
            raise IrregularError("the gradients and the parameters are different trees")
        parts, scale, last = self.parts(state)
        try:
            slots = (
                zip(*(tree.flatten_up_to(part.slots) for part in parts), strict=True) if parts else ((),) * len(leaves)
            )
            owned = [[*stored] for stored in slots]
        except (TypeError, ValueError) as error:
            raise IrregularError("the state and the parameters are different trees") from error
        numbers = _Numbers()
        rate, scale = self._rate(scale)
        rate = numbers.stand_in(rate)
        found = [
            _Leaf(self.chain, path, param, grad, stored)
            for (path, grad), param, stored in zip(leaves, jax.tree.leaves(params), owned, strict=True)
        ]
        full = [x for x in found if x.param.size]
        described = tuple(primitive.Leaf(numbers.without(x.chain), rate, len(x.arrays)) for x in full)
        step = primitive.Step(described, len(numbers.values), needs_kernels)
        try:
            hash(step)
        except TypeError as error:
            raise IrregularError(f"a hyper-parameter is no key: {error}") from error
        after = iter(primitive.run(*numbers.values, *(a for x in full for a in x.arrays), step=step))
        stepped = [x.after(after) for x in found]
        new = [TransformState(tree.unflatten([slots[i] for _, slots in stepped])) for i in range(len(parts))]
        count = len(self.chain.transforms)
        return tree.unflatten([param for param, _ in stepped]), (*new[:count], scale, *new[count:], *last)

    def parts(self, state: Any) -> tuple[list[TransformState], Any, list[Any]]:
        """The states of the chain's transformations and of stochastic rounding, the learning rate's, and others."""
        count = len(self.chain.transforms)
        if not isinstance(state, tuple) or len(state) != count + 2:
            raise IrregularError("the state is another optimizer's")
        parts, last = [*state[:count], *state[count + 1 :]], []
        if not self.chain.rounding.stochastic:
            last.append(parts.pop())
        if not all(isinstance(part, TransformState) for part in parts):
            raise IrregularError("the state is another optimizer's")
        return parts, state[count], last

    def _rate(self, state: Any) -> tuple[Any, Any]:
        """The learning rate of this step, and its state after it."""
        if not callable(self.learning_rate):
            return plain(self.learning_rate), state
        descend, counted = state
        _, after = optax.scale_by_schedule(lambda _: 1.0).update((), counted)
        return jnp.asarray(self.learning_rate(counted.count)), (descend, after)


class _Leaf:
    """A leaf as the primitive takes it: checked, and its gradient in the parameter's dtype."""

    def __init__(self, chain: Chain, path: leaf.KeyPath, param: Any, grad: Any, stored: list[dict[str, Any]]) -> None:
        try:
            self.param, grad = leaf.as_array(path, "parameter", param), leaf.as_array(path, "update", grad)
            computed = leaf.computed_in(path, "parameter", self.param)
            leaf.computed_in(path, "update", grad)
            self.chain = chain.at(leaf.names(path), self.param)
            self.chain.arrays(self.param.shape, self.param.dtype.name)  # refuses what cannot be rounded so
            declared = arrays_by_state(self.chain, self.param)
        except (TypeError, ValueError) as error:
            raise IrregularError(str(error)) from error
        if grad.shape != self.param.shape:
            raise IrregularError(f"a gradient of {leaf.title(path)} has another shape")
        if grad.dtype != self.param.dtype and self.param.dtype != computed:
            raise IrregularError(f"the parameter at {leaf.title(path)} has fewer bits than its gradient")
        self.stored = stored
        for needed, arrays in zip(declared, stored, strict=True):
            kept = {name: (x.shape, x.dtype.name) for name, x in arrays.items()}
            if kept != {name: (x.shape(self.param.shape), x.dtype) for name, x in needed.items()}:
                raise IrregularError(f"the state of {leaf.title(path)} is not as it is declared")
        self.order = [(i, name) for i, needed in enumerate(declared) for name in needed]
        self.arrays = [jnp.asarray(self.param), grad.astype(self.param.dtype), *(stored[i][n] for i, n in self.order)]

    def after(self, results: Iterator[Any]) -> tuple[Any, list[dict[str, Any]]]:
        """The parameter and the slots after the step, taken from its results; an empty leaf has none there."""
        if not self.param.size:
            return self.param, self.stored
        param, slots = next(results), [dict(arrays) for arrays in self.stored]
        for i, name in self.order:
            slots[i][name] = next(results)
        return param, slots


class _Numbers:
    """The hyper-parameters that are arrays, which become operands."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[int, int] = {}
        self._chains: dict[int, tuple[Chain, Chain]] = {}

    def stand_in(self, value: Any) -> Any:
        """The number, or what stands for it."""
        if not isinstance(value, jax.Array):
            return value
        if id(value) not in self._places:
            self._places[id(value)] = len(self.values)
            self.values.append(value)
        return Given(self._places[id(value)], value.dtype.name)

    def without(self, chain: Chain) -> Chain:
        """The chain with what stands for its arrays."""
        if id(chain) not in self._chains:
            arrays = [{name: x for name, x in vars(t).items() if isinstance(x, jax.Array)} for t in chain]
            if any(arrays):
                stand_ins = [{name: self.stand_in(x) for name, x in named.items()} for named in arrays]
                made = Chain(
                    tuple(replace(t, **named) for t, named in zip(chain, stand_ins, strict=True)), chain.rounding
                )
            else:
                made = chain
            self._chains[id(chain)] = chain, made
        return self._chains[id(chain)][1]
