"""Whole chains as optax optimizers, with a step that changes the parameters in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusedbun.chain import Chain, Stacked
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.hyper import check, plain
from fusedbun.storage.rounding import Rounding
from fusedbun_jax import primitive
from fusedbun_jax.definition import IrregularError, join_state, split_state, transformation
from fusedbun_jax.injected import choosing, injectable
from fusedbun_jax.layout import at_leaves, count_of, with_arrays
from fusedbun_jax.leaf import flatten, names
from fusedbun_jax.lift import STACKED
from fusedbun_jax.operands import make_leaf
from fusedbun_jax.rounding import SEED, as_word

Implementation = Literal["kernel", "definition"]


class SteppingTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """An optimizer of optax's, made from a chain, that can also step the parameters itself.

    params, state = tx.step(grads, state, params)
    """

    @property
    def driver(self) -> Any:
        """What `init`, `update` and `step` are done by: a `Driver`, or the `Groups` of `by_name`."""
        return self.update.__self__

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
        vmap, for derivatives, in what jax.export keeps, without a C++ compiler, and for a chain that no schedule
        expresses.

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
                stepped: tuple[optax.Params, optax.OptState]
                stepped = self.driver.step(grads, state, params, implementation == "kernel")
                return stepped
            except IrregularError as error:
                if implementation == "kernel":
                    raise KernelError(f"these arrays cannot be stepped by a kernel: {error}") from error
        updates, state = self.update(grads, state, params)
        return optax.apply_updates(params, updates), state


OPTIONS = {"stochastic_rounding": bool, **SEED, **STACKED}  # as `fusedbun.hyper.check` reads it


@injectable(choosing(OPTIONS))
def from_chain(
    chain: Chain,
    learning_rate: optax.ScalarOrSchedule,
    *,
    stochastic_rounding: bool = False,
    seed: int | jax.Array = 0,
    stacked: Stacked = 0,
) -> SteppingTransformation:
    """An optimizer from a chain of transformations: `p = p - learning_rate*u`.

    Args:
        chain: the chain, `fusedbun.chain(...)`.
        learning_rate: a number in [0, inf), or a schedule.
        stochastic_rounding: round bfloat16 parameters without a bias, by float32 updates, instead of to the nearest.
        seed: any integer, or a 0-d array of one; it decides the noise of all rounding.
        stacked: how many leading axes make a parameter a stack, each slice of which is stepped as a parameter of its
            own: a number, or a rule `(path, param) -> number`. 0: what the chain says.
    """
    if not isinstance(chain, Chain):
        raise TypeError(
            f"from_chain takes a chain, `fusedbun.chain(...)`, but it is {chain!r} ({type(chain).__name__})"
        )
    check("from_chain", OPTIONS, {"stochastic_rounding": stochastic_rounding, "seed": seed, "stacked": stacked})
    rounding = Rounding(bool(stochastic_rounding), as_word(seed))
    return Driver(replace(chain, rounding=rounding, stacked=plain(stacked) or chain.stacked), learning_rate).optimizer()


class Driver:
    """A chain and its learning rate.

    Args:
        chain: the chain.
        learning_rate: a number, or a schedule.
        made_by: the name and the arguments of the recipe that made the chain; None: they are the chain's own.
    """

    def __init__(
        self, chain: Chain, learning_rate: optax.ScalarOrSchedule, made_by: tuple[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.chain, self.learning_rate, self.made_by = chain, learning_rate, made_by
        self._definition = transformation(chain, learning_rate)

    def optimizer(self) -> SteppingTransformation:
        """The optimizer that it runs."""
        return SteppingTransformation(self.init, self.update)

    def init(self, params: optax.Params) -> Any:
        return self._definition.init(params)

    def update(self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any) -> Any:
        return self._definition.update(updates, state, params, **extra)

    def step(self, grads: Any, state: Any, params: Any, needs_kernels: bool) -> tuple[Any, Any]:
        """The step as one primitive. What it cannot take is an IrregularError: `update` takes it, or refuses it."""
        with_paths, tree = flatten(grads)
        if tree != jax.tree.structure(params):
            raise IrregularError("the gradients and the parameters are different trees")
        try:
            states, count = split_state(self.chain, state)
            count = count_of(count)
            paths = [path for path, _ in with_paths]
            by_state = [at_leaves(t.name, of, tree, paths) for t, of in zip(self.chain, states, strict=True)]
        except ValueError as error:
            raise IrregularError(str(error)) from error
        by_leaf = [[arrays[i] for arrays in by_state] for i in range(len(paths))]
        lr = jnp.asarray(self.learning_rate(count)) if callable(self.learning_rate) else plain(self.learning_rate)
        leaves = [
            make_leaf(self.chain, lr, count, path, param, grad, arrays)
            for (path, grad), param, arrays in zip(with_paths, jax.tree.leaves(params), by_leaf, strict=True)
        ]
        stepped = primitive.step(leaves, needs_kernels=needs_kernels)
        after = [x.by_state(stored) for x, (_, *stored) in zip(leaves, stepped, strict=True)]
        trees = [
            with_arrays(of, [before[i] | arrays[i] for before, arrays in zip(by_leaf, after, strict=True)])
            for i, of in enumerate(states)
        ]
        return tree.unflatten([param for param, *_ in stepped]), join_state(self.chain, trees, count + 1)


class Masked(Driver):
    """A chain whose decay leaves out some parameters; its state is the chain's.

    Args:
        mask: the parameters that decay, as optax.adamw has it: a tree of booleans like theirs or a prefix of it, or a
            function from the parameters to one.
    """

    def __init__(self, chain: Chain, learning_rate: Any, made_by: tuple[str, Mapping[str, Any]], mask: Any) -> None:
        super().__init__(chain, learning_rate, made_by)
        self.mask = mask

    def init(self, params: optax.Params) -> Any:
        return self._of(params).init(params)

    def update(self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any) -> Any:
        return self._of(updates).update(updates, state, params, **extra)

    def step(self, grads: Any, state: Any, params: Any, needs_kernels: bool) -> tuple[Any, Any]:
        return self._of(grads).step(grads, state, params, needs_kernels)

    def _of(self, tree: Any) -> Driver:
        """The driver with a decay that is a rule, for such a tree."""
        decays = {names(path): x for path, x in flatten(self.mask(tree) if callable(self.mask) else self.mask)[0]}
        if wrong := [x for x in decays.values() if not isinstance(x, (bool, np.bool_))]:
            raise TypeError(f"the mask must be a tree of True and False, but it holds {wrong[0]!r}")

        def share(path: tuple[str, ...], param: Any) -> Any:
            prefix = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in decays), None)
            if prefix is None:
                raise ValueError(f"the mask says nothing of {'.'.join(path)!r}; it must be a tree like the parameters'")
            return weight_decay if decays[prefix] else 0.0

        weight_decay = self.chain.hyperparameters()["decay.weight_decay"]
        return Driver(
            self.chain.with_hyperparameters(**{"decay.weight_decay": share}), self.learning_rate, self.made_by
        )
