"""`fusedbun list`: the optimizers, as their recipes declare them. Needs NumPy only."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import textwrap
from typing import Any

from fusedbun.recipe import Recipe
from fusedbun.recipes import RECIPES
from fusedbun.tools.plan.planner import state_bytes
from fusedbun.tools.plan.settings import listed
from fusedbun.tools.shared.command import Command, Shown, print_out

_DESCRIPTION = """\
List the optimizers: the torch class, the optax factory, the bytes of state that each
parameter costs (of a float32 matrix of 1024 x 1024, counted from the declared state),
the defaults and the source. Needs neither torch nor JAX.
"""

_EPILOG = """\
examples:
  fusedbun list
  fusedbun list --json
"""

SHAPE = (1024, 1024)  # the parameter whose state is counted: a weight matrix of middling size


def listing(as_json: bool) -> str:
    """The optimizers as a table, or as JSON."""
    optimizers = [_described(recipe) for recipe in RECIPES.values()]
    return json.dumps({"shape": SHAPE, "optimizers": optimizers}, indent=1) if as_json else _table(optimizers)


def _described(recipe: Recipe) -> dict[str, Any]:
    _, has_source, source = (inspect.getdoc(recipe.make) or "").partition("Source:")
    return {
        "name": recipe.name,
        "torch_class": f"fusedbun.{recipe.torch_class}",
        "optax_factory": f"fusedbun_jax.{recipe.name}",
        "state_bytes_per_parameter": [
            {"settings": given, "bytes": state_bytes(recipe.make(**given), SHAPE, "float32") / math.prod(SHAPE)}
            for given in ({}, *recipe.listed)
        ],
        "lr": recipe.lr,
        "lr_is_fixed": recipe.fixed_lr,
        "defaults": recipe.defaults,
        "source": " ".join(source.split()) if has_source else None,
    }


def _table(optimizers: list[dict[str, Any]]) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    rows = [("torch class", "optax factory", "bytes of state a parameter")]
    rows += [(o["torch_class"], o["optax_factory"], _bytes(*o["state_bytes_per_parameter"])) for o in optimizers]
    first, second = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
    head, *titles = [f"{torch_class:{first}}{factory:{second}}{state}" for torch_class, factory, state in rows]
    lines = [head]
    for optimizer, title in zip(optimizers, titles, strict=True):
        lr = "required" if optimizer["lr"] is None else f"{optimizer['lr']:g}"
        rate = f"lr {'fixed at ' if optimizer['lr_is_fixed'] else ''}{lr}"
        lines += ["", title]
        defaults, source = f"{rate}, {listed(optimizer['defaults'])}", optimizer["source"] or "fusedbun's own"
        for name, text in (("defaults:", defaults), ("source:", source)):
            lines += textwrap.wrap(text, width, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
    note = (
        f"The bytes are counted from the declared state of a float32 matrix of {' x '.join(map(str, SHAPE))}; "
        f"the parameter itself takes 4."
    )
    return "\n".join([*lines, "", *textwrap.wrap(note, width)])


def _bytes(usual: dict[str, Any], *others: dict[str, Any]) -> str:
    also = ", ".join(f"{other['bytes']:.2f} with {listed(other['settings'])}" for other in others)
    return f"{usual['bytes']:.2f}" + (f" ({also})" if also else "")


COMMAND = Command(
    "list",
    "list the optimizers with their classes, state, defaults and sources",
    _DESCRIPTION,
    _EPILOG,
    Shown,
    lambda settings: print_out(listing(settings.json)),
)
