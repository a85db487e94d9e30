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

from fusedbun.chain import Chain
from fusedbun.portable import entries
from fusedbun.portable.entries import Group, Parameter
from fusedbun.portable.file import Numbers
from fusedbun.portable.match import Loading, Match, Names
from fusedbun.recipe import INITIAL_LR
from fusedbun.storage.codes import STEP
from fusedbun_jax import leaf
from fusedbun_jax.definition import needed_by_state, split_state
from fusedbun_jax.groups import Groups, only_group
from fusedbun_jax.layout import at_leaves, field_of
from fusedbun_jax.state import check_state
from fusedbun_jax.step import Driver

Address = str  # of an array of a state: the keys that lead to it


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
    located = Located("save_state", tx, state, params, check_arrays=True)
    steps = max((int(located.arrays[address]) for address in located.counts.values()), default=None)

    def content(parameter: Parameter, key: str) -> Numbers:
        if key == STEP:
            count = located.arrays[located.counts[parameter.group]]
            return np.broadcast_to(count, parameter.arrays()[STEP].shape(parameter.shape))
        return _numbers(parameter.name, located.arrays[located.addresses[parameter.name][key]])

    entries.write(Path(path), located.groups, located.parameters, content, steps)


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
        partial: load the parameters that are both here and in the file, and leave the state of the others. The count
            of steps is the file's.
        steps: how many steps came before, which a schedule, bias corrections and noise go on from; None: what the file
            says. One of torch's may not know it, or have another number for each parameter.

    Returns:
        The whole state, with the saved one in its place.

    Raises:
        TypeError: the optimizer is not fusedbun's.
        ValueError: the file is damaged or none of fusedbun's, or something does not fit: all of it is listed by name.
        OSError: the file cannot be read.
    """
    located = Located("load_state", tx, state, params, check_arrays=False)
    arrays = located.arrays
    with entries.saved(Path(path)) as file:
        loading = Loading(file, [*located.addresses], mapping, partial)
        matches = loading.matches(located.parameters, located.groups, lambda parameter: [parameter.slots or {}])
        counts = {x: _count(located, x, loading, matches) if steps is None else steps for x in located.counts}
        loading.refuse("optimizer")
        for name, match in matches.items():
            addresses = located.addresses[name]
            if match.slots is None:
                arrays |= {address: jnp.zeros_like(arrays[address]) for address in addresses.values()}
            for key, numbers in match.arrays(file):
                if key != STEP:
                    arrays[addresses[key]] = _placed(numbers, arrays[addresses[key]])
    for group, count in counts.items():
        address = located.counts[group]
        arrays[address] = _placed(np.asarray(count, np.int32), arrays[address])
    loaded = leaf.flatten(located.node)[1].unflatten([arrays[address] for address in _by_address(located.node)])
    return jax.tree.map(lambda x: loaded if x is located.node else x, state, is_leaf=lambda x: x is located.node)


def _count(located: Located, group: int, loading: Loading, matches: Mapping[str, Match]) -> int:
    """How many steps a group's state has counted, by the file; where it does not say, a problem more."""
    file = loading.file
    taken = {p.name: matches[p.name] for p in located.parameters if p.group == group and p.name in matches}
    counting = {name: x for name, x in taken.items() if STEP in x.origins and 0 not in x.saved.shape}
    counters = {name: file.opened.read(f"{x.saved.name}/{x.origins[STEP]}") for name, x in counting.items()}
    counted = {name: int(counter.max()) for name, counter in counters.items()}
    numbers = {*counted.values()} | ({file.steps} if taken and file.steps is not None else set())
    if len(numbers) > 1:
        told = ", ".join(f"{n} of {name!r}" for n, name in {n: name for name, n in counted.items()}.items())
        loading.problems.append(
            f"the file has counted different numbers of steps ({told}), but here all parameters have one count; give "
            f"steps="
        )
    elif taken and not numbers and located.groups[group].lr is None:
        loading.problems.append("the file counts no steps, but the learning rate is a schedule here; give steps=")
    return numbers.pop() if numbers else int(located.arrays[located.counts[group]])


class Located:
    """What of a state is an optimizer's own, and where in it each parameter's arrays are.

    Args:
        owner: the function that asks, for messages.
        tx: the optimizer.
        state: its state, or that of what wraps it.
        params: the parameters.
        check_arrays: compare the arrays with those that are declared.

    Attributes:
        node: the node of the state that is the optimizer's; None where it keeps nothing.
        arrays: the arrays there, by address.
        groups: the hyper-parameters of each chain.
        parameters: the parameters.
        addresses: by the parameters' names the addresses of their arrays, by the arrays' names in the file.
        counts: by the places of the chains among the groups the addresses of their counts of steps.
    """

    def __init__(self, owner: str, tx: Any, state: Any, params: Any, check_arrays: bool) -> None:
        driver = getattr(tx.update, "__self__", None)
        if not isinstance(driver, (Driver, Groups)):
            raise TypeError(
                f"{owner}: tx must be an optimizer of fusedbun_jax's factories, of from_chain or of by_name, but it is "
                f"{tx!r:.200}; of a wrapper such as optax.chain give the optimizer inside as tx, and its whole state"
            )
        made = jax.eval_shape(tx.init, params)
        addresses, (_, tree) = [*_by_address(made)], leaf.flatten(made)
        self.node = _node(owner, state, addresses)
        self.arrays = _by_address(self.node)
        self.groups: list[Group] = []
        self.parameters: list[Parameter] = []
        self.addresses: dict[str, dict[str, Address]] = {}
        self.counts: dict[int, Address] = {}
        for part in _parts(owner, driver, tree.unflatten(addresses), params):
            chain = part.driver.chain
            states, self.counts[len(self.groups)] = split_state(chain, part.state)
            leaves, tree = leaf.flatten(part.params)
            paths = [path for path, _ in leaves]
            by_state = {t.name: at_leaves(t.name, of, tree, paths) for t, of in zip(chain, states, strict=True)}
            for i, (path, x) in enumerate(leaves):
                self._add(owner, chain, path, x, {name: of[i] for name, of in by_state.items()}, check_arrays)
            self.groups.append(_group(part.driver))

    def _add(
        self,
        owner: str,
        chain: Chain,
        path: leaf.KeyPath,
        x: Any,
        by_state: Mapping[str, dict[str, Address]],
        check_arrays: bool,
    ) -> None:
        param, _ = leaf.floating(path, "parameter", x)
        name, shape, dtype = leaf.name(path), tuple(param.shape), param.dtype.name
        if name in self.addresses:
            raise ValueError(f"{owner}: several parameters are called {name!r}; state is kept by name")
        chain = chain.at(leaf.names(path), param)
        needed = needed_by_state(chain, param)
        for title, addresses in by_state.items() if check_arrays else ():
            stored = {field: self.arrays[address] for field, address in addresses.items()}
            check_state(title, path, needed[title], param, stored, by_dtype=True)
        keys = (key for key in chain.arrays(shape, dtype) if key != STEP)
        split = ((key, *key.split(".", 1)) for key in keys)
        self.addresses[name] = {key: by_state[title][field_of(slot)] for key, title, slot in split}
        of_chain = entries.slots_of(chain, shape, dtype)
        self.parameters.append(Parameter(name, shape, dtype, len(self.groups), of_chain, chain.stacked))


def _node(owner: str, state: Any, addresses: list[Address]) -> Any:
    """The node of a state with leaves at these addresses, for flax.nnx has nodes of its own in a state."""

    def is_sought(x: Any) -> bool:
        return leaf.flatten(x)[1].num_leaves == len(addresses) and _by_address(x).keys() == {*addresses}

    if not addresses:
        return None
    nodes = [x for x in jax.tree.leaves(state, is_leaf=is_sought) if is_sought(x)]
    if len(nodes) != 1:
        raise ValueError(
            f"{owner}: the state must hold this optimizer's, as tx.init(params) makes it, once, but it does so "
            f"{len(nodes)} times; " + ("give one of them by itself" if nodes else "is it another optimizer's?")
        )
    return nodes[0]


def _by_address(tree: Any) -> dict[Address, Any]:
    """The leaves by the keys that lead to them; the `value` of an nnx variable is none of them."""
    value = jax.tree_util.GetAttrKey("value")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(tuple(key for key in path if key != value)): x for path, x in leaves}


class Part(NamedTuple):
    """What one chain steps, of `by_name` one group: what runs the chain, its state and its parameters."""

    driver: Driver
    state: Any
    params: Any


def _parts(owner: str, driver: Driver | Groups, state: Any, params: Any) -> list[Part]:
    if isinstance(driver, Driver):
        return [Part(driver, state, params)]
    parts = []
    labels, optimizers = driver.groups(params)
    for label, tx in optimizers.items():
        inner = getattr(tx.update, "__self__", None)
        if not isinstance(inner, Driver):
            raise TypeError(f"{owner}: of by_name's optimizers each must be fusedbun's, but one is {tx!r:.200}")
        parts.append(Part(inner, state.inner_states[label].inner_state, only_group(label, labels, params)))
    return parts


def _group(driver: Driver) -> Group:
    """A chain's hyper-parameters as the file has them."""
    recipe, named = driver.made_by or (None, driver.chain.hyperparameters())
    arguments = {**named}
    initial_lr = arguments.pop(INITIAL_LR, None)
    return entries.group_of(driver.chain, recipe, arguments, driver.learning_rate, initial_lr)


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
