"""What Flax calls parameters and how it lays them out, where that differs from torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax

from fusedbun.portable.match import Target
from fusedbun_jax import leaf


def flax_channel_axis(path: tuple[str, ...], param: Any) -> int:
    """The channel axis of a Flax parameter: the last for a kernel, the first for everything else.

    Flax stores a Dense kernel as (in, out), a Conv kernel as (…, in, out) and an embedding as (vocabulary, width);
    torch stores (out, in), (out, in, …) and (vocabulary, width). With this rule as `channel_axis`, `centralize` does
    to a Flax network what it does to the same network in torch. Attention is the exception: of its kernels
    (in, heads, width) one axis can be kept, the width, and its biases (heads, width) have two axes and keep the heads.

    >>> flax_channel_axis(("Dense_0", "kernel"), None), flax_channel_axis(("Embed_0", "embedding"), None)
    (-1, 0)
    """
    return -1 if "kernel" in path else 0


def flax_stacked(path: tuple[str, ...], param: Any, names: Sequence[str] = ("Scan*", "Vmap*")) -> int:
    """The rule for `stacked` by which the layers of `nn.scan` and `nn.vmap` are stacks: one axis for each around them.

    Linen calls such modules `ScanBlock_0` and `VmapDense_0` and puts their axis in front, where you say
    `variable_axes={"params": 0}`. Where they have names of your own, and under `nnx.scan` and `nnx.vmap`, whose layers
    are called as the attribute that holds them, say which: `stacked=partial(flax_stacked, names=("blocks",))`.

    >>> flax_stacked(("ScanBlock_0", "Dense_0", "kernel"), None), flax_stacked(("Dense_0", "kernel"), None)
    (1, 0)

    Args:
        path: the names that lead to the parameter.
        param: the parameter.
        names: patterns of the names of modules that hold a stack.
    """
    return sum(any(fnmatchcase(part, name) for name in names) for part in path[:-1])


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
    mapping: dict[str, Target] = {}
    used = set()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = leaf.name(path)
        module, _, kind = name.rpartition(".")
        if module not in modules:
            raise ValueError(f"{name!r} is in {module!r}, but modules has {', '.join(map(repr, modules)) or 'none'}")
        used.add(module)
        of_torch = f"{modules[module]}.{'weight' if kind in ('kernel', 'scale', 'embedding') else kind}".lstrip(".")
        axes = (*range(2, x.ndim), 1, 0)
        mapping[of_torch] = (name, axes) if kind == "kernel" and x.ndim > 1 else name
    if unused := [module for module in modules if module not in used]:
        raise ValueError(f"{', '.join(map(repr, unused))} of modules has no parameters; give the names of params")
    return mapping
