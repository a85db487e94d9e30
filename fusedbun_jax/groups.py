"""Hyper-parameters of an optax optimizer by patterns on parameter names, and no decay where it does harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from fusedbun.groups import Rules, overrides
from fusedbun_jax import leaf
from fusedbun_jax.operands import IrregularError
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
        no_decay: the factory's name for weight decay ("weight_decay", Fusedbun's "Lambda"), which is set to 0 for
            biases, norms and embeddings unless a rule says otherwise; None: decay is left as it is.
        hyperparameters: what every parameter has where no rule says otherwise.

    Raises:
        ValueError: a pattern matches no parameter (when the optimizer sees the parameters).
    """

    groups = Groups(make, rules or {}, no_decay, hyperparameters)
    return SteppingTransformation(groups.init, groups.update)


class Groups:
    """An optimizer for each group of parameters that have the same hyper-parameters."""

    def __init__(
        self, make: Callable[..., Any], rules: Rules, no_decay: str | None, hyperparameters: Mapping[str, Any]
    ) -> None:
        self._make, self._rules, self._no_decay, self._hyperparameters = make, rules, no_decay, hyperparameters

    def init(self, params: optax.Params) -> Any:
        return self._partition(params).init(params)

    def update(self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any) -> Any:
        return self._partition(updates).update(updates, state, params, **extra)

    def step(self, grads: Any, state: Any, params: Any, needs_kernels: bool) -> tuple[Any, Any]:
        """The steps of the groups, each by itself; see `SteppingTransformation.step`."""
        tree: Any = jax.tree.structure(grads)
        if tree != jax.tree.structure(params):
            raise IrregularError("the gradients and the parameters are different trees")
        labels, transforms = self.groups(grads)
        if not isinstance(state, optax.transforms.PartitionState) or state.inner_states.keys() != transforms.keys():
            raise IrregularError("the state is another optimizer's")
        steps = {
            label: tx.update.__self__.step for label, tx in transforms.items() if isinstance(tx, SteppingTransformation)
        }
        if steps.keys() != transforms.keys():
            raise IrregularError("the optimizer is not one of fusedbun's")
        leaves, states = jax.tree.leaves(params), {}
        for label, step in steps.items():
            held = state.inner_states[label]
            places = [i for i, of in enumerate(labels) if of == label]
            masked = [masked_except({*places}, tree, x) for x in (grads, params)]
            after, inner = step(masked[0], held.inner_state, masked[1], needs_kernels)
            states[label] = held._replace(inner_state=inner)
            for i, x in zip(places, jax.tree.leaves(after), strict=True):
                leaves[i] = x
        return tree.unflatten(leaves), state._replace(inner_states=states)

    def _partition(self, tree: Any) -> optax.GradientTransformationExtraArgs:
        labels, transforms = self.groups(tree)
        return optax.partition(transforms, jax.tree.unflatten(jax.tree.structure(tree), labels))

    def groups(self, tree: Any) -> tuple[list[str], dict[str, Any]]:
        """The group of each leaf, and the optimizers by group."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = [leaf.name(path) for path, _ in leaves]
        found = overrides(names, self._rules)
        if self._no_decay is not None:
            for name, (_, x) in zip(names, leaves, strict=True):
                spared = {self._no_decay: 0.0} if is_spared_from_decay(name, x) else {}
                found[name] = spared | found[name]
        labels = [repr(sorted(found[name].items())) for name in names]
        of_labels = {label: found[name] for label, name in zip(labels, names, strict=True)}
        return labels, {label: self._make(**{**self._hyperparameters, **x}) for label, x in of_labels.items()}


def masked_except(places: set[int], tree: Any, whole: Any) -> Any:
    """The tree with the leaves at these places, and what optax has in the place of others."""
    return tree.unflatten([x if i in places else optax.MaskedNode() for i, x in enumerate(jax.tree.leaves(whole))])


def is_spared_from_decay(name: str, param: Any) -> bool:
    """Whether a parameter is a bias, a norm's scale or an embedding, by its shape and by Flax's names."""
    return param.ndim < 2 or "embed" in name.lower()
