"""How states lie in memory in JAX: NamedTuples of trees that have the structure of the parameters', as optax's own."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import export

from fusedbun.chain import arrays_of, slots_of
from fusedbun.storage.codes import BLOCK, STEP, Stored
from fusedbun.transform import Transform
from fusedbun_jax import leaf
from fusedbun_jax.boxes import fitted
from fusedbun_jax.state import Arrays, absent, zeros

COUNT = "count"  # the field with the number of steps: one for all leaves
AXES = 4  # a state has the fields of parameters of up to so many axes, whatever parameters it is made for
Needed = dict[str, Stored]  # of one leaf, by field
Trees = Mapping[str, Any]  # by the names of their fields


class TransformState:
    """What the states of transformations have in common; `state_type` makes each a NamedTuple.

    Every array of a slot is a field, a tree of the parameters' structure: `moment`, and where its code is of several
    `moment_exponents` beside it. Of a parameter that has no such array there is a single 0 in its place. By itself a
    transformation that counts its steps has them in `count`; a chain has one `count` for all.
    """

    __slots__ = ()
    _fields: tuple[str, ...]
    _asdict: Callable[[], dict[str, Any]]

    def __reduce__(self) -> Any:  # copies and pickles find the type by what it was made of
        return _restored, (type(self).__name__, self._asdict())


@cache
def state_type(name: str, names: tuple[str, ...]) -> Any:
    """The type of states with these fields, the same one for the same names."""
    try:
        fields = namedtuple(name, names)  # type: ignore[misc]
    except ValueError as error:
        raise ValueError(
            f"{name} cannot have the fields {', '.join(map(repr, names))}: {error}; they are called as transformations "
            f"and slots are, so choose other names for these"
        ) from None
    made = type(name, (fields, TransformState), {"__slots__": ()})
    export.register_namedtuple_serialization(made, serialized_name=f"fusedbun_jax.{name}({', '.join(names)})")
    return made


def _restored(name: str, values: Mapping[str, Any]) -> Any:
    return state_type(name, (*values,))(**values)


def field_of(key: str) -> str:
    """The field of an array, from the slot's name and what its code appends."""
    return key.replace(".", "_")


def by_field(needed: Mapping[str, Stored]) -> Needed:
    """The arrays that a transformation declares for a leaf, the counter not among them, by field."""
    return {field_of(key): stored for key, stored in needed.items() if key != STEP}


def make_state(transform: Transform, trees: Trees, count: Any = None) -> Any:
    """A transformation's state; optax's own for one that keeps nothing."""
    values = {**trees} if count is None else {**trees, COUNT: count}
    return state_type(f"{type(transform).__name__}State", (*values,))(**values) if values else optax.EmptyState()


def start(transform: Transform, tree: Any, params: Sequence[Any], needed: Sequence[Needed]) -> dict[str, Any]:
    """The trees of a transformation's state at their start.

    Args:
        transform: the transformation, with its rules.
        tree: the structure of the parameters.
        params: their leaves.
        needed: for each of them the arrays that are declared, by field.
    """
    made = {}
    for name in dict.fromkeys([*_possible(transform), *(name for arrays in needed for name in arrays)]):
        stored = [arrays.get(name, absent(param)) for arrays, param in zip(needed, params, strict=True)]
        arrays = [zeros(x, param) for x, param in zip(stored, params, strict=True)]
        made[name] = fitted(tree.unflatten(arrays), stored)
    return made


def _possible(transform: Transform) -> list[str]:
    """The fields of a transformation's state for parameters of up to `AXES` axes.

    They follow from the transformation alone: what walks over states, such as `optax.tree_map_params`, makes one for
    parameters that it does not know.
    """
    return [field_of(key) for key in _arrays(transform) if key != STEP]


def counts(transform: Transform) -> bool:
    """Whether a transformation by itself counts its steps."""
    return STEP in _arrays(transform)


def _arrays(transform: Transform) -> dict[str, Stored]:
    defaults = {f.name: f.default for f in fields(transform) if f.default is not MISSING}
    asked = {name: defaults[name] for name, x in vars(transform).items() if callable(x) and name in defaults}
    transform = replace(transform, **asked) if asked else transform
    found: dict[str, Stored] = {}
    for ndim in range(AXES, -1, -1):
        try:
            slots = slots_of(transform, (BLOCK,) * ndim)
        except (TypeError, ValueError):  # not for such parameters, or not without the rule's answer
            continue
        for dtype in ("float32", "bfloat16"):
            found |= arrays_of(slots, dtype, transform.counts)
    return found


def at_leaves(owner: str, trees: Trees, tree: Any, paths: Sequence[leaf.KeyPath]) -> list[Arrays]:
    """For every leaf its arrays in these trees, by field.

    Args:
        owner: the transformation's name.
        trees: the trees of its state.
        tree: the structure of the parameters or updates.
        paths: of their leaves.

    Raises:
        ValueError: the trees are other ones.
    """
    columns = {}
    for name, of in trees.items():
        columns[name], structure = jax.tree.flatten(of)
        if structure != tree:  # boxes with names of axes are others, and so are their names
            _check_paths(owner, name, [path for path, _ in leaf.flatten(of)[0]], paths)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(paths))]


def _check_paths(owner: str, name: str, found: Sequence[leaf.KeyPath], paths: Sequence[leaf.KeyPath]) -> None:
    if [*found] == [*paths]:
        return
    missing, extra = [x for x in paths if x not in found], [x for x in found if x not in paths]
    wrong = f"has nothing for {leaf.title(missing[0])}" if missing else f"has {leaf.title((extra or paths)[0])} too"
    raise ValueError(
        f"{owner}: the state {name!r} {wrong}; it belongs to another tree of parameters, so make one with init"
    )


def over_leaves(
    owner: str,
    step: Callable[[leaf.KeyPath, Any, Any, Arrays, Any], tuple[Any, Arrays]],
    updates: optax.Updates,
    trees: Trees,
    params: optax.Params | None,
    counts: Sequence[Any],
) -> tuple[optax.Updates, dict[str, Any]]:
    """The updates and trees that `step(path, update, parameter or None, arrays by field, count)` gives leaf by leaf."""
    leaves, tree = leaf.flatten(updates)
    owners = [None] * len(leaves) if params is None else tree.flatten_up_to(params)
    stored = at_leaves(owner, trees, tree, [path for path, _ in leaves])
    stepped = [step(path, u, *rest) for (path, u), *rest in zip(leaves, owners, stored, counts, strict=True)]
    return tree.unflatten([u for u, _ in stepped]), with_arrays(trees, [arrays for _, arrays in stepped])


def with_arrays(trees: Trees, arrays: Sequence[Arrays]) -> dict[str, Any]:
    """The trees with other arrays, given for every leaf by field."""
    return {name: jax.tree.unflatten(jax.tree.structure(of), [x[name] for x in arrays]) for name, of in trees.items()}


def count_of(count: Any) -> Any:
    """The number of steps in a state, checked."""
    count = jnp.asarray(count)
    if count.shape or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"the state's count of steps must be one int32, but it is {count.dtype.name} of shape "
            f"{count.shape}; it belongs to another optimizer, so make one with init"
        )
    return count.astype(jnp.int32)


def apart(count: Any, number: int) -> Sequence[Any]:
    """The count for each of so many leaves, and to the compiler another one.

    What follows from one count it would compute once for all leaves, and then otherwise than for each: the last bits of
    a leaf's numbers would depend on what other leaves there are.
    """
    counts: Sequence[Any] = (None,) * number if count is None else jax.lax.optimization_barrier((count,) * number)
    return counts


def trees_of(owner: str, state: Any) -> dict[str, Any]:
    """The trees of a transformation's state by field, and the count where it has one."""
    if not isinstance(state, (TransformState, optax.EmptyState)):
        raise ValueError(
            f"{owner}: the state must be as init makes it, but it is {state!r:.200}; it belongs to another optimizer, "
            f"so make one with init"
        )
    return dict(state._asdict())
