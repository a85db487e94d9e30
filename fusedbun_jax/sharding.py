"""Where the state of an optimizer lies on a mesh of devices: with its parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fusedbun_jax import leaf


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    shardings: Any = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> Any:
    """The shardings of the state that `tx.init(params)` gives, as a tree like it; nothing is allocated.

        of_state = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=of_state)(params)
        train = jax.jit(step, out_shardings=(param_shardings, of_state))

    An array that has its parameter's size along an axis is cut along it as the parameter is; along others, and what
    belongs to no parameter, it is replicated. In the state of optax's own transformations, and of those around
    fusedbun's, what `init` makes of a parameter, as `jnp.zeros_like` does, lies as the parameter does, and what it
    makes of a shape alone is replicated.

    Args:
        tx: any optimizer.
        params: arrays, or `jax.ShapeDtypeStruct`s.
        shardings: of each parameter a NamedSharding, or with `mesh` a PartitionSpec; one for all parameters below a
            branch may stand in its place. None: those that `params` have.
        mesh: what PartitionSpecs cut over.

    Raises:
        TypeError: a parameter has no NamedSharding, or is no array.
        ValueError: a sharding does not fit a parameter's shape, two parameters lie on different meshes, or there are
            none.
    """
    leaves, tree = leaf.flatten(params)
    placed = [
        _placed(path, leaf.as_array(path, "parameter", x), s, mesh)
        for (path, x), s in zip(leaves, tree.flatten_up_to(_of_each(params, shardings)), strict=True)
    ]
    if not placed:
        raise ValueError("state_shardings needs a parameter: it is their sharding that the state's follows from")
    common = placed[0].sharding.mesh
    for (path, _), x in zip(leaves, placed, strict=True):
        if x.sharding.mesh != common:
            raise ValueError(
                f"all parameters must lie on one mesh, but that of {leaf.title(path)} is {x.sharding.mesh} and that of "
                f"{leaf.title(leaves[0][0])} is {common}"
            )
    # Explicit axes are part of an array's type: tracing `init` with them shows where it puts what it makes.
    names = common.axis_names
    explicit = AbstractMesh(common.axis_sizes, names, axis_types=(AxisType.Explicit,) * len(names))
    typed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(explicit, x.sharding.spec)) for x in placed]
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, tree.unflatten(typed))
    return jax.tree.map(lambda x: NamedSharding(common, x.sharding.spec if x.sharding else PartitionSpec()), state)


def _of_each(params: Any, shardings: Any) -> Any:
    """What says each parameter's sharding: the parameter, or from a tree the entry for it or for its branch."""
    if shardings is None:
        return params
    try:
        return jax.tree.broadcast(
            shardings, params, is_leaf=lambda x: isinstance(x, (jax.sharding.Sharding, PartitionSpec))
        )
    except ValueError as error:
        raise ValueError(f"the shardings must be a tree of the parameters', or the head of one: {error}") from error


def _placed(path: leaf.KeyPath, param: Any, sharding: Any, mesh: Mesh | AbstractMesh | None) -> jax.ShapeDtypeStruct:
    """The parameter's shape, dtype and sharding."""
    if isinstance(sharding, PartitionSpec):
        if mesh is None:
            raise TypeError(f"the sharding of {leaf.title(path)} is {sharding}, which needs a mesh: pass mesh=")
        sharding = NamedSharding(mesh, sharding)
    elif not isinstance(sharding, jax.sharding.Sharding):
        sharding = None if isinstance(sharding, jax.core.Tracer) else getattr(sharding, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"the parameter of {leaf.title(path)} must have a NamedSharding, but its sharding is {sharding!r}; place "
            f"it with jax.device_put, or pass shardings="
        )
    unfit = f"the sharding {sharding.spec} of {leaf.title(path)} does not fit its shape {param.shape}"
    if len(sharding.spec) > param.ndim:
        raise ValueError(f"{unfit}: it has {len(sharding.spec)} axes, and the parameter {param.ndim}")
    try:
        sharding.shard_shape(param.shape)
    except ValueError as error:
        raise ValueError(f"{unfit} on a mesh of {dict(sharding.mesh.shape)}: {error}") from error
    return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding)
