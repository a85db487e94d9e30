"""Hyper-parameters of an optax optimizer by patterns on parameter names, and no decay where it does harm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from fusedbun.chain import slice_of, stacked_at
from fusedbun.groups import Rules, overrides
from fusedbun.recipe import own_names
from fusedbun_jax import leaf
from fusedbun_jax.definition import IrregularError
from fusedbun_jax.step import SteppingTransformation


def by_name(
    make: Callable[..., optax.GradientTransformation],
    rules: Rules | None = None,
    *,
    no_decay: str | None = None,
    **hyperparameters: Any,
) -> SteppingTransformation:
    """An optimizer whose hyper-parameters depend on the parameters' names.

        tx = by_name(fusedbun, {"head.*": {"learning_rate": 1e-4}}, no_decay="Lambda", learning_rate=1e-3, use_rms=True)

    A `step` takes one pass over memory for each group of parameters that have the same hyper-parameters.

    Args:
        make: the factory, one of fusedbun's or of optax's.
        rules: hyper-parameters by pattern ("encoder.*", "*.bias") on the path joined by dots; of several that match, a
            later one prevails.
        no_decay: the factory's name for weight decay ("weight_decay" or Fusedbun's "Lambda"), which is set to 0 for
            biases, norms and embeddings, of a stack by its slices, unless a rule says otherwise; None: decay is left
            as it is.
        hyperparameters: what every parameter has where no rule says otherwise.

    Raises:
        TypeError: `make` is no factory, or a hyper-parameter is given under two of its names.
        ValueError: the factory has no argument called as `no_decay` says, or a pattern matches no parameter (when the
            optimizer sees the parameters).
    """
    if not callable(make):
        raise TypeError(f"by_name: make must be a factory, such as fusedbun_jax.sm3, but it is {make!r}")
    title, names = getattr(make, "__name__", "make"), getattr(make, "other_names", {})
    rules = {pattern: own_names(title, names, given) for pattern, given in (rules or {}).items()}
    if no_decay is not None:
        no_decay = names.get(no_decay, no_decay)
        arguments = inspect.signature(make).parameters
        if no_decay not in arguments and not any(a.kind is a.VAR_KEYWORD for a in arguments.values()):
            raise ValueError(
                f"by_name: no_decay={no_decay!r} is no argument of {title}, which has {', '.join(arguments)}; name its "
                f"weight decay, or leave no_decay out where it has none"
            )
    groups = Groups(make, rules, no_decay, own_names(title, names, hyperparameters))
    return SteppingTransformation(groups.init, groups.update)


@dataclass(frozen=True, eq=False)
class Groups:
    """An optimizer for each group of parameters that have the same hyper-parameters; the arguments are `by_name`'s."""

    make: Callable[..., Any]
    rules: Rules
    no_decay: str | None
    hyperparameters: Mapping[str, Any]

    def init(self, params: optax.Params) -> Any:
        return self._partition(params).init(params)

    def update(self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any) -> Any:
        return self._partition(updates).update(updates, state, params, **extra)

    def step(self, grads: Any, state: Any, params: Any, needs_kernels: bool) -> tuple[Any, Any]:
        """The steps of the groups, each by itself; see `SteppingTransformation.step`."""
        _, tree = leaf.flatten(grads)
        if tree != jax.tree.structure(params):
            raise IrregularError("the gradients and the parameters are different trees")
        labels, optimizers = self.groups(grads)
        if not isinstance(state, optax.transforms.PartitionState) or state.inner_states.keys() != optimizers.keys():
            raise IrregularError("the state is another optimizer's")
        if not all(isinstance(tx, SteppingTransformation) for tx in optimizers.values()):
            raise IrregularError("the optimizer is not one of fusedbun's")
        leaves, states = jax.tree.leaves(params), {}
        for label, tx in optimizers.items():
            masked = state.inner_states[label]
            of_group = [only_group(label, labels, x) for x in (grads, params)]
            stepped, inner = tx.driver.step(of_group[0], masked.inner_state, of_group[1], needs_kernels)
            states[label] = masked._replace(inner_state=inner)
            new = iter(jax.tree.leaves(stepped))
            leaves = [next(new) if of == label else x for of, x in zip(labels, leaves, strict=True)]
        return tree.unflatten(leaves), state._replace(inner_states=states)

    def _partition(self, tree: Any) -> optax.GradientTransformationExtraArgs:
        labels, optimizers = self.groups(tree)
        return optax.partition(optimizers, leaf.flatten(tree)[1].unflatten(labels))

    def groups(self, tree: Any) -> tuple[list[str], dict[str, Any]]:
        """The group of each leaf, and the optimizers by group."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = [leaf.name(path) for path, _ in leaves]
        settings = overrides(names, self.rules)
        for name, (path, x) in zip(names, leaves, strict=True):
            if self.no_decay is not None and is_spared_from_decay(name, self._slice(path, x, settings[name])):
                settings[name] = {self.no_decay: 0.0} | settings[name]
        labels = [repr(sorted(settings[name].items())) for name in names]
        by_label = {label: settings[name] for label, name in zip(labels, names, strict=True)}
        return labels, {label: self.make(**{**self.hyperparameters, **x}) for label, x in by_label.items()}

    def _slice(self, path: leaf.KeyPath, param: Any, settings: Mapping[str, Any]) -> Any:
        """What is asked whether a parameter decays: of a stack, a slice."""
        with leaf.noted(path):
            stacked = {**self.hyperparameters, **settings}.get("stacked", 0)
            return slice_of(param, stacked_at(stacked, leaf.names(path), param))


def only_group(label: str, labels: list[str], tree: Any) -> Any:
    """The tree with the leaves of one group, and what optax has in the place of others."""
    leaves, structure = leaf.flatten(tree)
    return structure.unflatten(
        x if of == label else optax.MaskedNode() for of, (_, x) in zip(labels, leaves, strict=True)
    )


def is_spared_from_decay(name: str, param: Any) -> bool:
    """Whether a parameter is a bias, a norm's scale or an embedding, by its shape and by Flax's names."""
    return param.ndim < 2 or "embed" in name.lower()
