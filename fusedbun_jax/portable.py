"""Saving the state of optax optimizers to a file that torch reads too, and loading it (`fusedbun.portable`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusedbun.chain import Chain
from fusedbun.portable import entries
from fusedbun.portable.entries import Group, Parameter, Saved
from fusedbun.portable.file import Numbers
from fusedbun.portable.match import Match, Names, Target, compare_groups, matched, pairs, refuse
from fusedbun.recipe import INITIAL_LR
from fusedbun_jax import leaf
from fusedbun_jax.definition import arrays_by_state
from fusedbun_jax.groups import Groups, only
from fusedbun_jax.rounding import NAME
from fusedbun_jax.state import TransformState, check_state
from fusedbun_jax.step import Driver


class Place(NamedTuple):
    """A parameter: its path and name, its chain's place among the parts, its chain, itself, and its arrays by key."""

    path: leaf.KeyPath
    name: str
    part: int
    chain: Chain
    param: Any
    arrays: dict[str, Any]


class Part(NamedTuple):
    """What one chain steps: of `by_name` the parameters of one label, of others all.

    Args:
        label: the label; None where there are none.
        driver: what runs the chain.
        state: its state.
        params: the parameters that it steps, in the tree of all.
    """

    label: str | None
    driver: Driver
    state: Any
    params: Any


def save_state(
    path: str | os.PathLike[str], tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> None:
    """Saves an optimizer's state to a safetensors file that torch and JAX go on from.

    The file is written beside its place and moved there when it is whole. It holds the state by the parameters' names
    and slots, and the hyper-parameters, but not the parameters. Of a schedule it holds the count of steps.

        nnx: save_state(path, tx, optimizer.opt_state, nnx.state(model, nnx.Param))

    Args:
        path: the file; one that is there is replaced.
        tx: the optimizer: of one of fusedbun's factories, of `from_chain` or of `by_name`.
        state: its state, or that of what wraps it, such as optax.chain.
        params: the parameters; a name is the names that lead to a leaf, joined by dots.

    Raises:
        TypeError: the optimizer is not fusedbun's.
        ValueError: the state is not the optimizer's, two parameters have the same name, or an array is not on this
            machine.
        OSError: the file cannot be written.
    """
    parts = list(_parts("save_state", tx, _own("save_state", tx, state, params).tree, params))
    places = _places("save_state", parts)
    parameters = []
    for place in places:
        shape, dtype = tuple(place.param.shape), place.param.dtype.name
        parameters.append(Parameter(place.name, shape, dtype, place.part, entries.slots_of(place.chain, shape, dtype)))
    kept = {place.name: place.arrays for place in places}
    steps = [int(count) for part in parts if (count := _count(part)) is not None]
    entries.write(
        Path(path),
        [_group(part) for part in parts],
        parameters,
        lambda parameter, key: _numbers(parameter.name, kept[parameter.name][key]),
        max(steps, default=None),
    )


def load_state(
    path: str | os.PathLike[str],
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    mapping: Names | None = None,
    *,
    partial: bool = False,
    steps: int | None = None,
) -> optax.OptState:
    """The state that `fusedbun.save_state` or `fusedbun_jax.save_state` wrote: the next steps are those of the run.

    Hyper-parameters are the factory's, as everywhere in optax: give it the saved run's. Those that choose what is
    computed or stored, such as `use_rms`, `statistic` and `momentum_dtype`, are compared with the file's; numbers, such
    as the learning rate, are not, nor is torch's `maximize`. Noise goes on where names and seed are the same; under a
    mapping that renames parameters it is another, as good. Everything is checked before anything is made.

        nnx: optimizer.opt_state = nnx.data(load_state(path, tx, optimizer.opt_state, nnx.state(model, nnx.Param)))

    Args:
        path: the file.
        tx: the optimizer: of one of fusedbun's factories, of `from_chain` or of `by_name`.
        state: the state to put the saved one in, `tx.init(params)`, or that of what wraps the optimizer, such as
            optax.chain. It is left as it is; its arrays say where the new ones are placed.
        params: the parameters; a name is the names that lead to a leaf, joined by dots.
        mapping: where parameters are called or laid out otherwise: `{name in the file: name here}` or `{name in the
            file: (name here, axes)}`, the axes as numpy.transpose takes them: (1, 0) for the weight (out, in) of a
            Linear that becomes the kernel (in, out) of a Dense layer, (2, 3, 1, 0) for that of a convolution. Or a
            rule from a name in the file to either. Names that are not in it stay as they are. `flax_mapping` makes
            one. Codes of 8 and 4 bits stay what they are bit for bit in one layout; from one to another they are
            rounded to the nearest.
        partial: load the parameters that are both here and in the file, and leave the state of the others.
        steps: for a learning rate that is a schedule, how many steps came before; None: what the file says, which a
            file of torch's does not.

    Returns:
        The whole state, with the saved one in its place.

    Raises:
        TypeError: the optimizer is not fusedbun's.
        ValueError: the file is damaged or none of fusedbun's, or something does not fit: all of it is listed by name.
        OSError: the file cannot be read.
    """
    own = _own("load_state", tx, state, params)
    parts = list(_parts("load_state", tx, own.tree, params))
    places = _places("load_state", parts, checked=False)
    with entries.saved(Path(path)) as file:
        count = file.steps if steps is None else steps
        problems: list[str] = []
        if count is None and any(_count(part) is not None for part in parts):
            problems.append("the file counts no steps, but the learning rate is a schedule here; give steps=")
        matches = _matches(file, parts, places, mapping, partial, problems)
        refuse(file.path, "optimizer", problems)
        arrays = {
            place.name: _loaded(place, matches[place.name], file) if place.name in matches else place.arrays
            for place in places
        }
    new = [_with(part, [arrays[p.name] for p in places if p.part == i], count) for i, part in enumerate(parts)]
    if own.node is None:
        return state
    tree = new[0]
    if parts[0].label is not None:
        held = own.tree.inner_states
        inner = {part.label: held[part.label]._replace(inner_state=x) for part, x in zip(parts, new, strict=True)}
        tree = own.tree._replace(inner_states={**held, **inner})
    replaced = _filled(own.node, _by_place(tree))
    return jax.tree.map(lambda x: replaced if x is own.node else x, state, is_leaf=lambda x: x is own.node)


def flax_mapping(params: optax.Params, modules: Mapping[str, str]) -> dict[str, Target]:
    """The mapping for `load_state` from a torch model's parameters to a Flax model's; `inverse` leads back.

    `kernel` is `weight` with its axes turned round: (out, in) to (in, out), (out, in, h, w) to (h, w, in, out).
    `scale` and `embedding` are `weight`, other names the same ones.

    For Linear, Conv, Embedding and norms. What Flax lays out in another number of axes (attention), or torch with its
    channels the other way round (ConvTranspose), and a Linear behind flattened images, whose inputs are in another
    order, it does not know.

    >>> import jax.numpy as jnp
    >>> flax_mapping({"Dense_0": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}, {"Dense_0": "fc"})
    {'fc.bias': 'Dense_0.bias', 'fc.weight': ('Dense_0.kernel', (1, 0))}

    Args:
        params: the Flax model's parameters.
        modules: the names of Flax's modules, as they lead to a leaf, and of torch's: `{"Dense_0": "fc"}`.

    Raises:
        ValueError: a module holds no parameter, or a parameter is in none.
    """
    found: dict[str, Target] = {}
    used = set()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = leaf.name(path)
        module, _, kind = name.rpartition(".")
        if module not in modules:
            raise ValueError(f"{name!r} is in {module!r}, but modules has {', '.join(map(repr, modules)) or 'none'}")
        used.add(module)
        here = f"{modules[module]}.{'weight' if kind in ('kernel', 'scale', 'embedding') else kind}".lstrip(".")
        axes = (*range(2, x.ndim), 1, 0)
        found[here] = (name, axes) if kind == "kernel" and x.ndim > 1 else name
    if unused := [module for module in modules if module not in used]:
        raise ValueError(f"{', '.join(map(repr, unused))} of modules has no parameters; give the names of params")
    return found


class Own(NamedTuple):
    """The part of a state that is an optimizer's.

    Args:
        node: as it stands in the state; None where the optimizer keeps nothing.
        tree: the same as the optimizer makes it: flax.nnx has nodes of its own in it.
    """

    node: Any
    tree: Any


def _own(owner: str, tx: Any, state: Any, params: Any) -> Own:
    """The part of a state that is this optimizer's: that whose leaves are at the places where `tx.init` has them."""
    if not isinstance(getattr(tx.update, "__self__", None), (Driver, Groups)):
        raise TypeError(
            f"{owner}: tx must be an optimizer of fusedbun_jax's factories, of from_chain or of by_name, but it is "
            f"{tx!r:.200}; of a wrapper such as optax.chain give the optimizer inside as tx, and its whole state"
        )
    wanted = jax.eval_shape(tx.init, params)
    places = _by_place(wanted)
    if not places:
        return Own(None, wanted)

    def is_own(x: Any) -> bool:
        tree: Any = jax.tree.structure(x)
        return tree.num_leaves == len(places) and _by_place(x).keys() == places.keys()

    found = [x for x in jax.tree.leaves(state, is_leaf=is_own) if is_own(x)]
    if len(found) != 1:
        raise ValueError(
            f"{owner}: the state must hold this optimizer's, as tx.init(params) makes it, once, but it does so "
            f"{len(found)} times; " + ("give one of them by itself" if found else "is it another optimizer's?")
        )
    return Own(found[0], _filled(wanted, _by_place(found[0])))


def _by_place(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves by the names that lead to them; the `value` of an nnx variable is none of them."""
    value = jax.tree_util.GetAttrKey("value")
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(key) for key in path if key != value): x for path, x in found}


def _filled(tree: Any, leaves: Mapping[tuple[str, ...], Any]) -> Any:
    """The tree with other leaves, given by their places."""
    structure: Any = jax.tree.structure(tree)
    return structure.unflatten([leaves[place] for place in _by_place(tree)])


def _parts(owner: str, tx: Any, state: Any, params: Any) -> Iterator[Part]:
    """The chains of an optimizer, each with its state and its parameters."""
    driver = tx.update.__self__
    if isinstance(driver, Driver):
        yield Part(None, driver, state, params)
        return
    labels, transforms = driver.groups(params)
    tree: Any = jax.tree.structure(params)
    for label, inner in transforms.items():
        if not isinstance(getattr(inner.update, "__self__", None), Driver):
            raise TypeError(f"{owner}: of by_name's optimizers each must be fusedbun's, but one is {inner!r:.200}")
        masked = only({i for i, of in enumerate(labels) if of == label}, tree, params)
        yield Part(label, inner.update.__self__, state.inner_states[label].inner_state, masked)


def _places(owner: str, parts: list[Part], checked: bool = True) -> list[Place]:
    """The parameters of all parts, with their arrays; a ValueError where two have one name.

    Args:
        owner: who asks, for messages.
        parts: the parts.
        checked: see that the arrays are those that are declared.
    """
    found: dict[str, Place] = {}
    for i, part in enumerate(parts):
        leaves, tree = _leaves(part)
        states, _, _ = part.driver.parts(part.state)
        kept = [tree.flatten_up_to(state.slots) for state in states]
        for n, (path, x) in enumerate(leaves):
            param, name = leaf.as_array(path, "parameter", x), leaf.name(path)
            leaf.computed_in(path, "parameter", param)
            if name in found:
                raise ValueError(f"{owner}: several parameters are called {name!r}; state is kept by name")
            chain = part.driver.chain.at(leaf.names(path), param)
            titles = [*(t.name for t in chain), NAME]
            arrays: dict[str, Any] = {}
            for title, needed, of in zip(titles, arrays_by_state(chain, param), kept, strict=False):
                if checked:
                    check_state(title, path, needed, param, of[n], by_dtype=True)
                arrays |= {f"{title}.{key}": value for key, value in of[n].items()}
            found[name] = Place(path, name, i, chain, param, arrays)
    return list(found.values())


def _leaves(part: Part) -> tuple[list[tuple[leaf.KeyPath, Any]], Any]:
    leaves, tree = jax.tree_util.tree_flatten_with_path(part.params)
    return leaves, tree


def _group(part: Part) -> Group:
    """A part's hyper-parameters as the file has them."""
    driver = part.driver
    name, given = driver.made_by or (None, driver.chain.hyperparameters())
    arguments = {key: value for key, value in given.items() if key != INITIAL_LR or name is None}
    initial = given.get(INITIAL_LR) if name is not None else None
    return entries.group_of(driver.chain, name, arguments, driver.learning_rate, initial)


def _count(part: Part) -> Any:
    """How many steps the schedule has counted; None where the learning rate is none."""
    if not callable(part.driver.learning_rate):
        return None
    _, (_, counted), _ = part.driver.parts(part.state)
    return counted.count


def _numbers(name: str, x: Any) -> Numbers:
    """An array's numbers; those of bfloat16 as words."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"save_state: the state of {name!r} is spread over several machines; gather it first, for example with "
            f"jax.experimental.multihost_utils.process_allgather(state, tiled=True)"
        )
    numbers: Numbers = np.asarray(x)
    return numbers.view(np.uint16) if numbers.dtype == jnp.bfloat16 else numbers


def _matches(
    file: Saved, parts: list[Part], places: list[Place], mapping: Names | None, partial: bool, problems: list[str]
) -> dict[str, Match]:
    """What each parameter takes of the file, by its name."""
    found = pairs(file, [place.name for place in places], mapping, partial, problems)
    together: dict[tuple[int, int], list[str]] = {}
    for place in places:
        if place.name in found:
            together.setdefault((found[place.name].saved.group, place.part), []).append(place.name)
    here = [_group(part) for part in parts]
    alike = {both: compare_groups(file.groups[both[0]], here[both[1]], of, problems) for both, of in together.items()}
    matches = {}
    for place in places:
        pair = found.get(place.name)
        if pair is not None and alike[pair.saved.group, place.part]:
            shape, dtype = tuple(place.param.shape), place.param.dtype.name
            match = matched(pair, shape, dtype, [entries.slots_of(place.chain, shape, dtype)], problems)
            if match is not None:
                matches[place.name] = match
    return matches


def _loaded(place: Place, match: Match, file: Saved) -> dict[str, Any]:
    """The arrays of a parameter, each placed as the one that it replaces."""
    if match.slots is None:
        return {key: jnp.zeros_like(x) for key, x in place.arrays.items()}
    return {key: _placed(numbers, place.arrays[key]) for key, numbers in match.arrays(file)}


def _placed(numbers: Numbers, like: Any) -> jax.Array:
    """The array, on the devices of another; none of NumPy's memory is shared, for steps may write to theirs."""
    found = numbers.view(jnp.bfloat16) if numbers.dtype == np.uint16 else numbers
    placed: jax.Array = jax.device_put(found, getattr(like, "sharding", None), may_alias=False)
    return placed


def _with(part: Part, arrays: list[dict[str, Any]], count: int | None) -> Any:
    """A part's state with other arrays."""
    _, tree = _leaves(part)
    states, scale, last = part.driver.parts(part.state)
    chain = part.driver.chain
    titles = [*(t.name for t in chain), NAME]
    new = []
    for title, state in zip(titles, states, strict=False):
        slots = [
            {key: of[f"{title}.{key}"] for key in old}
            for of, old in zip(arrays, tree.flatten_up_to(state.slots), strict=True)
        ]
        new.append(TransformState(tree.unflatten(slots)))
    if (old := _count(part)) is not None:
        descend, counted = scale
        scale = (descend, counted._replace(count=jnp.asarray(count, old.dtype)))
    n = len(chain.transforms)
    return (*new[:n], scale, *new[n:], *last)
