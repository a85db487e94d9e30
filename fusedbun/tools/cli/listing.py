"""`fusedbun list`: the optimizers, as their recipes declare them. Needs NumPy only."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import textwrap
from typing import Any

import numpy as np

from fusedbun.recipe import Recipe, Settings
from fusedbun.recipes import RECIPES
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
    optimizers = [_described(name, recipe) for name, recipe in RECIPES.items()]
    return json.dumps({"shape": SHAPE, "optimizers": optimizers}, indent=1) if as_json else _table(optimizers)


def _described(name: str, recipe: Recipe) -> dict[str, Any]:
    _, has_source, source = (inspect.getdoc(recipe.make) or "").partition("Source:")
    return {
        "name": name,
        "torch_class": f"fusedbun.{recipe.torch_class}",
        "optax_factory": f"fusedbun_jax.{name}",
        "state_bytes_per_parameter": [
            {"settings": settings, "bytes": _state(recipe, settings)} for settings in ({}, *recipe.listed)
        ],
        "lr": recipe.lr,
        "lr_is_fixed": recipe.fixed_lr,
        "defaults": recipe.defaults,
        "source": " ".join(source.split()) if has_source else None,
    }


def _state(recipe: Recipe, settings: Settings) -> float:
    """The bytes for each element of a float32 parameter of the shape `SHAPE`."""
    arrays = recipe.make(**settings).arrays(SHAPE, "float32").values()
    return sum(math.prod(x.shape(SHAPE)) * np.dtype(x.dtype).itemsize for x in arrays) / math.prod(SHAPE)


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
        for name, text in (
            ("defaults:", f"{rate}, {_arguments(optimizer['defaults'])}"),
            ("source:", optimizer["source"] or "fusedbun's own"),
        ):
            lines += textwrap.wrap(text, width, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
    note = (
        f"The bytes are counted from the declared state of a float32 matrix of {' x '.join(map(str, SHAPE))}; "
        f"the parameter itself takes 4."
    )
    return "\n".join([*lines, "", *textwrap.wrap(note, width)])


def _bytes(usual: dict[str, Any], *others: dict[str, Any]) -> str:
    also = ", ".join(f"{other['bytes']:.2f} with {_arguments(other['settings'])}" for other in others)
    return f"{usual['bytes']:.2f}" + (f" ({also})" if also else "")


def _arguments(values: Settings) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


COMMAND = Command(
    "list",
    "list the optimizers with their classes, state, defaults and sources",
    _DESCRIPTION,
    _EPILOG,
    Shown,
    lambda settings: print_out(listing(settings.json)),
)
