"""Saving the state of optax optimizers to a file that torch reads too, and loading it (`fusedbun.portable`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusedbun.portable import entries
from fusedbun.portable.entries import Group, Parameter
from fusedbun.portable.file import Numbers
from fusedbun.portable.match import Loading, Names, Target
from fusedbun.recipe import INITIAL_LR
from fusedbun_jax import leaf
from fusedbun_jax.definition import arrays_by_state
from fusedbun_jax.groups import Groups, masked_except
from fusedbun_jax.rounding import NAME
from fusedbun_jax.state import check_state
from fusedbun_jax.step import Driver

Address = tuple[str, ...]  # of an array of a state: the names that lead to it


class Part(NamedTuple):
    """What one chain steps: of `by_name` the parameters of one group, of others all.

    Args:
        driver: what runs the chain.
        state: its state, with the address of each array in the array's place.
        params: the parameters that it steps, in the tree of all.
    """

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
    node, addresses = _located("save_state", tx, state, params)
    parts, arrays = _parts("save_state", tx, addresses, params), _by_address(node)
    parameters, places = _parameters("save_state", parts, arrays)
    entries.write(
        Path(path),
        [_group(part.driver) for part in parts],
        parameters,
        lambda parameter, key: _numbers(parameter.name, arrays[places[parameter.name][key]]),
        max((int(arrays[address]) for address in _counts(parts)), default=None),
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
    node, addresses = _located("load_state", tx, state, params)
    parts, arrays = _parts("load_state", tx, addresses, params), _by_address(node)
    parameters, places = _parameters("load_state", parts)
    counts = _counts(parts)
    with entries.saved(Path(path)) as file:
        loading = Loading(file, [*places], mapping, partial)
        count = file.steps if steps is None else steps
        if count is None and counts:
            problem = "the file counts no steps, but the learning rate is a schedule here; give steps="
            loading.problems.insert(0, problem)
        groups = [_group(part.driver) for part in parts]
        matches = loading.matches(parameters, groups, lambda parameter: [parameter.slots or {}])
        loading.refuse("optimizer")
        for name, match in matches.items():
            if match.slots is None:
                arrays |= {address: jnp.zeros_like(arrays[address]) for address in places[name].values()}
            for key, numbers in match.arrays(file):
                arrays[places[name][key]] = _placed(numbers, arrays[places[name][key]])
    arrays |= {address: jnp.asarray(count, arrays[address].dtype) for address in counts}
    loaded = _filled(node, arrays)
    return jax.tree.map(lambda x: loaded if x is node else x, state, is_leaf=lambda x: x is node)


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


def _located(owner: str, tx: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """The node of a state that is this optimizer's, and its arrays' addresses in a tree as `tx.init` makes it.

    It is the one with leaves at the addresses where `tx.init` has them, for flax.nnx has nodes of its own in a state;
    None where the optimizer keeps nothing.
    """
    if not isinstance(getattr(tx.update, "__self__", None), (Driver, Groups)):
        raise TypeError(
            f"{owner}: tx must be an optimizer of fusedbun_jax's factories, of from_chain or of by_name, but it is "
            f"{tx!r:.200}; of a wrapper such as optax.chain give the optimizer inside as tx, and its whole state"
        )
    made = jax.eval_shape(tx.init, params)
    addresses = {address: address for address in _by_address(made)}
    located = _filled(made, addresses)
    if not addresses:
        return None, located

    def is_sought(x: Any) -> bool:
        tree: Any = jax.tree.structure(x)
        return tree.num_leaves == len(addresses) and _by_address(x).keys() == addresses.keys()

    found = [x for x in jax.tree.leaves(state, is_leaf=is_sought) if is_sought(x)]
    if len(found) != 1:
        raise ValueError(
            f"{owner}: the state must hold this optimizer's, as tx.init(params) makes it, once, but it does so "
            f"{len(found)} times; " + ("give one of them by itself" if found else "is it another optimizer's?")
        )
    return found[0], located


def _by_address(tree: Any) -> dict[Address, Any]:
    """The leaves by the names that lead to them; the `value` of an nnx variable is none of them."""
    value = jax.tree_util.GetAttrKey("value")
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(key) for key in path if key != value): x for path, x in found}


def _filled(tree: Any, leaves: Mapping[Address, Any]) -> Any:
    """The tree with other leaves, given by their addresses."""
    structure: Any = jax.tree.structure(tree)
    return structure.unflatten([leaves[address] for address in _by_address(tree)])


def _parts(owner: str, tx: Any, state: Any, params: Any) -> list[Part]:
    """The chains of an optimizer, each with its state and its parameters."""
    driver = tx.update.__self__
    if isinstance(driver, Driver):
        return [Part(driver, state, params)]
    labels, transforms = driver.groups(params)
    tree: Any = jax.tree.structure(params)
    found = []
    for label, inner in transforms.items():
        if not isinstance(getattr(inner.update, "__self__", None), Driver):
            raise TypeError(f"{owner}: of by_name's optimizers each must be fusedbun's, but one is {inner!r:.200}")
        masked = masked_except({i for i, of in enumerate(labels) if of == label}, tree, params)
        found.append(Part(inner.update.__self__, state.inner_states[label].inner_state, masked))
    return found


def _parameters(
    owner: str, parts: list[Part], arrays: Mapping[Address, Any] | None = None
) -> tuple[list[Parameter], dict[str, dict[str, Address]]]:
    """The parameters, and by their names the addresses of their arrays by the arrays' names in the file.

    Args:
        owner: who asks, for messages.
        parts: the parts.
        arrays: the arrays of the state, to see that they are those that are declared; None: they are not looked at.
    """
    parameters = []
    places: dict[str, dict[str, Address]] = {}
    for i, part in enumerate(parts):
        tree: Any
        leaves, tree = jax.tree_util.tree_flatten_with_path(part.params)
        slots = [tree.flatten_up_to(state.slots) for state in part.driver.states(part.state)[0]]
        for n, (path, x) in enumerate(leaves):
            param, name = leaf.as_array(path, "parameter", x), leaf.name(path)
            leaf.computed_in(path, "parameter", param)
            if name in places:
                raise ValueError(f"{owner}: several parameters are called {name!r}; state is kept by name")
            chain = part.driver.chain.at(leaf.names(path), param)
            places[name] = {}
            for transform, needed, of in zip((*chain, None), arrays_by_state(chain, param), slots, strict=False):
                title = NAME if transform is None else transform.name
                if arrays is not None:
                    kept = {key: arrays[address] for key, address in of[n].items()}
                    check_state(title, path, needed, param, kept, by_dtype=True)
                places[name] |= {f"{title}.{key}": address for key, address in of[n].items()}
            shape, dtype = tuple(param.shape), param.dtype.name
            parameters.append(Parameter(name, shape, dtype, i, entries.slots_of(chain, shape, dtype)))
    return parameters, places


def _group(driver: Driver) -> Group:
    """A chain's hyper-parameters as the file has them."""
    recipe, named = driver.made_by or (None, driver.chain.hyperparameters())
    arguments = {key: value for key, value in named.items() if recipe is None or key != INITIAL_LR}
    initial_lr = named.get(INITIAL_LR) if recipe is not None else None
    return entries.group_of(driver.chain, recipe, arguments, driver.learning_rate, initial_lr)


def _counts(parts: list[Part]) -> list[Address]:
    """Where learning-rate schedules count their steps."""
    rates = [part.driver.states(part.state)[1] for part in parts if callable(part.driver.learning_rate)]
    return [counted.count for _, counted in rates]


def _numbers(name: str, x: Any) -> Numbers:
    """An array's numbers; those of bfloat16 as words."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"save_state: the state of {name!r} is spread over several machines; gather it first, for example with "
            f"jax.experimental.multihost_utils.process_allgather(state, tiled=True)"
        )
    numbers: Numbers = np.asarray(x)
    return numbers.view(np.uint16) if numbers.dtype == jnp.bfloat16 else numbers


def _placed(numbers: Numbers, like: Any) -> jax.Array:
    """The array, on the devices of another; none of NumPy's memory is shared, for steps may write to theirs."""
    array = numbers.view(jnp.bfloat16) if numbers.dtype == np.uint16 else numbers
    placed: jax.Array = jax.device_put(array, getattr(like, "sharding", None), may_alias=False)
    return placed
