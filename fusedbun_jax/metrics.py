"""Metrics of an optax update, recorded in its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import export

from fusedbun import metrics
from fusedbun.storage import codes
from fusedbun.transform import Shape
from fusedbun_jax import leaf
from fusedbun_jax import namespace as xp
from fusedbun_jax.layout import TransformState, field_of
from fusedbun_jax.lift import over_stack
from fusedbun_jax.state import Arrays, absent

FUNCTIONS = metrics.functions(xp)
BLOCKED = 3  # the axes of an array by blocks: rows, blocks, and what is in one


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
    moments = _moments(state)
    measured: dict[str, jax.Array] = {}
    for (path, p), q, g in zip(leaves, *map(tree.flatten_up_to, (after, grads)), strict=True):
        p, q, g = (leaf.as_array(path, what, x) for what, x in (("parameter", p), ("parameter", q), ("gradient", g)))
        if not jnp.issubdtype(p.dtype, jnp.floating):
            continue  # masked, or the optimizer inside would have refused it
        _, dtype = leaf.floating(path, "parameter", p)
        p, q, g = p.astype(dtype), q.astype(dtype), g.astype(dtype)
        vectors = {"param": q, "update": p - q, "grad": g}
        if moment := _present(moments.get(path, {}), p):
            vectors["moment"] = _decoded(moment, p.shape, dtype)
        products = {pair: x.reshape(()) for pair, x in metrics.inner_products(xp, vectors).items()}
        measured |= metrics.measured(FUNCTIONS, products, leaf.name(path))
    return measured


def _moments(state: Any) -> dict[leaf.KeyPath, Arrays]:
    """The arrays of every leaf's moment, by what follows its name."""
    parts = {field_of(f"moment{part}"): part for code in codes.CODES.values() for part in code.arrays(())}
    moments: dict[leaf.KeyPath, Arrays] = {}
    for node in jax.tree.leaves(state, is_leaf=_has_moment):
        for name in node._fields if _has_moment(node) else ():
            for path, x in leaf.flatten(getattr(node, name))[0] if name in parts else ():
                moments.setdefault(path, {})[parts[name]] = x
    return moments


def _has_moment(node: Any) -> bool:
    return isinstance(node, TransformState) and "moment" in node._fields


def _decoded(moment: Arrays, shape: Shape, dtype: Any) -> Any:
    """The numbers of a leaf's moment; of a stack, whose arrays have its axes in front, slice by slice."""
    stacked = moment[codes.EXPONENTS].ndim - BLOCKED if codes.EXPONENTS in moment else 0
    of = shape[stacked:]

    def decode(_: Any, of_slice: Arrays) -> Any:
        return codes.recognised(of_slice, of).decode(xp, of_slice, of, dtype)

    return over_stack(decode, shape[:stacked])(moment)


def _present(moment: Arrays, param: Any) -> Arrays:
    """The arrays that a leaf has of these."""
    none, own = absent(param), {"": param.shape}
    lacking = none.dtype, none.shape(param.shape)
    return {part: x for part, x in moment.items() if (x.dtype.name, x.shape) != lacking or x.shape == own.get(part)}
