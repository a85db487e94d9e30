"""Hyper-parameters of an optax optimizer by patterns on parameter names, and no decay where it does harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from fusedbun.groups import Rules, overrides
from fusedbun_jax import leaf


def by_name(
    make: Callable[..., optax.GradientTransformation],
    rules: Rules | None = None,
    *,
    no_decay: str | None = None,
    **hyperparameters: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose hyper-parameters depend on the parameters' names.

        tx = by_name(fusedbun, {"head.*": {"learning_rate": 1e-4}}, no_decay="Lambda", learning_rate=1e-3, use_rms=True)

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

    def partitioned(tree: Any) -> optax.GradientTransformationExtraArgs:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        names = [".".join(leaf.names(path)) for path, _ in leaves]
        found = overrides(names, rules or {})
        if no_decay is not None:
            for name, (_, x) in zip(names, leaves, strict=True):
                found[name] = ({no_decay: 0.0} if is_spared_from_decay(name, x) else {}) | found[name]
        labels = [repr(sorted(found[name].items())) for name in names]
        transforms = {label: make(**hyperparameters | found[name]) for label, name in zip(labels, names, strict=True)}
        return optax.partition(transforms, jax.tree.unflatten(structure, labels))

    def init(params: optax.Params) -> Any:
        return partitioned(params).init(params)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any) -> Any:
        return partitioned(updates).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def is_spared_from_decay(name: str, param: Any) -> bool:
    """Whether a parameter is a bias, a norm's scale or an embedding, by its shape and by Flax's names."""
    return param.ndim < 2 or "embed" in name.lower()
