"""What the site says of each optimizer, written from its recipe."""

from __future__ import annotations

import json
import re

from fusedbun.recipes import RECIPES
from fusedbun.tools.cli.listing import listing


def family() -> str:
    """The table of the optimizers, in Markdown."""
    lines = ["{.family}", "| torch, JAX | | state, bytes a parameter |", "|---|---|---|"]
    for optimizer in json.loads(listing(as_json=True))["optimizers"]:
        name, recipe = optimizer["name"], RECIPES[optimizer["name"]]
        usual, *others = optimizer["state_bytes_per_parameter"]
        state = [f"{usual['bytes']:.2f}"]
        for other in others:
            given = ", ".join(f"{key}={value!r}" for key, value in other["settings"].items())
            state.append(f"{other['bytes']:.2f} with `{given}`")
        says = (recipe.make.__doc__ or "").split("\n", 1)[0]
        names = f"{{py:class}}`~fusedbun.{recipe.torch_class}` {{py:func}}`~fusedbun_jax.{name}`"
        lines.append(f"| {names} | {says} | {'; '.join(state)} |")
    return "\n".join(lines)


def chains() -> str:
    """The table of the chains that their docstrings state, in Markdown."""
    lines = ["| optimizer | chain |", "|---|---|"]
    for recipe in RECIPES.values():
        (stated,) = re.findall(r"^ {4}(\w+(?: → \w+)*)$", recipe.make.__doc__ or "", re.MULTILINE)
        lines.append(f"| `{recipe.torch_class}` | {' → '.join(f'`{name}`' for name in stated.split(' → '))} |")
    return "\n".join(lines)


def torch() -> str:
    """The torch classes with what each has of its own, in reStructuredText."""
    import fusedbun.torch as package

    lines: list[str] = []
    for recipe in RECIPES.values():
        own = [
            name for name in dir(getattr(package, recipe.torch_class)) if not hasattr(package.TransformOptimizer, name)
        ]
        lines += [
            f".. autoclass:: fusedbun.{recipe.torch_class}",
            *([f"   :members: {', '.join(own)}"] if own else []),
            "",
        ]
        lines += [line for alias in recipe.aliases for line in (f"``fusedbun.{alias}`` is the same class.", "")]
    return "\n".join(lines)


def jax() -> str:
    """The optax factories, in reStructuredText."""
    return "".join(f".. autofunction:: fusedbun_jax.{name}\n\n" for name in RECIPES)
