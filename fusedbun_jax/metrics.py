"""Metrics of an optax update, recorded in its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import export

from fusedbun import metrics
from fusedbun.storage import codes
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp
from fusedbun_jax.state import TransformState

FUNCTIONS = metrics.functions(xp)


class MetricsState(NamedTuple):
    """The state of the transformation inside, and the metrics of the last update by `<metric>/<parameter's name>`."""

    inner_state: Any
    metrics: dict[str, jax.Array]


export.register_namedtuple_serialization(MetricsState, serialized_name="fusedbun_jax.MetricsState")


def with_metrics(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Records what each update does to each parameter, in the state's `metrics`.

        l2_norm/{param, update, grad, moment}/<name>, cosine/{update_grad, moment_grad}/<name>

    `param` and `moment` are those after the update, `update` is the parameter before it less the one after it; an
    optimizer without a moment has no moment metrics, and a cosine with a zero vector is 0. Names are the parameter's
    path, joined by dots. Sharded parameters need nothing more: JAX sums over all of an array.

    Args:
        inner: the whole optimizer, learning rate included.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> MetricsState:
        state = inner.init(params)
        shapes = jax.eval_shape(_measure, params, params, params, state)
        return MetricsState(state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def update(
        grads: optax.Updates, state: MetricsState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, MetricsState]:
        if params is None:
            raise ValueError("with_metrics needs the parameters: call update(updates, state, params)")
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        after = optax.apply_updates(params, updates)
        return updates, MetricsState(inner_state, _measure(params, after, grads, inner_state))

    return optax.GradientTransformationExtraArgs(init, update)


def _measure(params: Any, after: Any, grads: Any, state: Any) -> dict[str, jax.Array]:
    leaves, tree = leaf.flatten(params)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, TransformState))
    slots = [x.slots for x in nodes if isinstance(x, TransformState)]
    measured: dict[str, jax.Array] = {}
    for (path, p), q, g, *stored in zip(leaves, *map(tree.flatten_up_to, (after, grads, *slots)), strict=True):
        arrays = [item for x in stored for item in dict(x).items()]  # none where the leaf is masked
        moment = {name.removeprefix("moment"): x for name, x in arrays if name.split(".")[0] == "moment"}
        p, q, g = (leaf.as_array(path, what, x) for what, x in (("parameter", p), ("parameter", q), ("gradient", g)))
        if not jnp.issubdtype(p.dtype, jnp.floating):
            continue  # masked, or the optimizer inside would have refused it
        _, dtype = leaf.floating(path, "parameter", p)
        p, q, g = p.astype(dtype), q.astype(dtype), g.astype(dtype)
        vectors = {"param": q, "update": p - q, "grad": g}
        if moment:
            vectors["moment"] = codes.recognised(moment, p.shape).decode(xp, moment, p.shape, dtype)
        products = {pair: x.reshape(()) for pair, x in metrics.inner_products(xp, vectors).items()}
        measured |= metrics.measured(FUNCTIONS, products, leaf.name(path))
    return measured
