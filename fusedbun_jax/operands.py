"""The leaves of a step, and how their arrays become operands of one primitive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedbun.chain import Chain
from fusedbun_jax.definition import IrregularError, needed_by_state
from fusedbun_jax.leaf import KeyPath, check_shape, floating, names, title
from fusedbun_jax.state import Arrays, check_state


@dataclass(frozen=True)
class Leaf:
    """One parameter of a step.

    `make_leaf` makes it with its arrays. `pack` puts `Operand`s in their place, so that the leaf can be hashed and is
    what JAX keeps of a step when it is traced; `unpack` puts the operands' values there.

    Args:
        chain: the chain for it.
        lr: the learning rate.
        count: the steps so far.
        arrays: the parameter, the gradient, and those of the state in the order in which they are declared.
        names: the fields of the state's arrays, for every transformation.
    """

    chain: Chain
    lr: Any
    count: Any
    arrays: tuple[Any, ...]
    names: tuple[tuple[str, ...], ...]

    @property
    def param(self) -> Any:
        return self.arrays[0]

    @property
    def grad(self) -> Any:
        return self.arrays[1]

    @property
    def stored(self) -> tuple[Any, ...]:
        """The state's arrays."""
        return self.arrays[2:]

    def by_state(self, stored: Sequence[Any]) -> list[Arrays]:
        """The state's arrays by field, for every transformation."""
        arrays = iter(stored)
        return [{name: next(arrays) for name in names} for names in self.names]


def make_leaf(
    chain: Chain, lr: Any, count: Any, path: KeyPath, param: Any, grad: Any, by_state: Sequence[Arrays]
) -> Leaf:
    """The leaf at a path, its gradient in the parameter's dtype; an IrregularError where something does not fit."""
    try:
        param, dtype = floating(path, "parameter", param)
        grad, _ = floating(path, "update", grad)
        check_shape(path, grad, param)
        chain = chain.at(names(path), param)
        needed = needed_by_state(chain, param)
    except (TypeError, ValueError) as error:
        raise IrregularError(str(error)) from error
    try:
        for owner, arrays in zip(needed, by_state, strict=True):
            check_state(owner, path, needed[owner], param, arrays, by_dtype=True)
    except ValueError as error:
        raise IrregularError(f"the state is not as it is declared: {error}") from error
    if grad.dtype != param.dtype and param.dtype != dtype:
        raise IrregularError(f"the parameter at {title(path)} has fewer bits than its gradient")
    stored = [arrays[name] for owner, arrays in zip(needed, by_state, strict=True) for name in needed[owner]]
    state_names = tuple(map(tuple, needed.values()))
    return Leaf(chain, lr, count, (jnp.asarray(param), grad.astype(param.dtype), *stored), state_names)


class Operand(NamedTuple):
    """Stands for an array, whose value may not be known yet, by its place among the operands."""

    place: int

    @property
    def shape(self) -> tuple[int, ...]:
        """A number's, for hyper-parameters are checked to be numbers."""
        return ()


def pack(leaves: Sequence[Leaf]) -> tuple[list[Any], tuple[Leaf, ...]]:
    """The arrays of leaves, each once, and the leaves with `Operand`s for them.

    Raises:
        IrregularError: a hyper-parameter that is no array cannot be hashed.
    """
    operands: list[Any] = []
    places: dict[int, Operand] = {}

    def operand(value: Any) -> Any:
        if not isinstance(value, (jax.Array, np.ndarray)):
            return value
        if id(value) not in places:
            places[id(value)] = Operand(len(operands))
            operands.append(value)
        return places[id(value)]

    packed = _mapped(operand, leaves)
    try:
        hash(packed)
    except TypeError as error:
        raise IrregularError(f"a hyper-parameter is no key: {error}") from error
    return operands, packed


def unpack(leaves: Sequence[Leaf], operands: Sequence[Any]) -> tuple[Leaf, ...]:
    """The leaves with the operands' values."""
    return _mapped(lambda x: operands[x.place] if isinstance(x, Operand) else x, leaves)


def _mapped(function: Callable[[Any], Any], leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """The leaves with a function of every array, seed and hyper-parameter; who shared a chain shares one again."""
    chains = {id(leaf.chain): leaf.chain for leaf in leaves}
    for key, chain in chains.items():
        changed = {name: y for name, x in chain.hyperparameters().items() if (y := function(x)) is not x}
        chain = chain.with_hyperparameters(**changed) if changed else chain
        if (seed := function(chain.rounding.seed)) is not chain.rounding.seed:
            starts = tuple((name, function(start)) for name, start in chain.rounding.starts)
            chain = replace(chain, rounding=replace(chain.rounding, seed=seed, starts=starts))
        chains[key] = chain
    return tuple(
        Leaf(chains[id(x.chain)], function(x.lr), function(x.count), tuple(map(function, x.arrays)), x.names)
        for x in leaves
    )
