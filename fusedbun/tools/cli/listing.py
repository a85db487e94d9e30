"""`fusedbun list`: the optimizers, as their recipes declare them. Needs NumPy only."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import textwrap
from typing import Any

import numpy as np

from fusedbun.recipe import Recipe
from fusedbun.recipes import RECIPES

SHAPE = (1024, 1024)  # the parameter whose state is counted: a weight matrix of middling size


def listing(as_json: bool) -> str:
    """The optimizers as a table, or as JSON."""
    optimizers = [_describe(name, recipe) for name, recipe in RECIPES.items()]
    if as_json:
        return json.dumps({"shape": SHAPE, "optimizers": optimizers}, indent=1)
    return _table(optimizers)


def bytes_per_parameter(recipe: Recipe, **settings: Any) -> float:
    """The bytes of state for each element of a float32 parameter of the shape `SHAPE`."""
    arrays = recipe.make(**settings).arrays(SHAPE, "float32").values()
    return sum(math.prod(x.shape(SHAPE)) * np.dtype(x.dtype).itemsize for x in arrays) / math.prod(SHAPE)


def _describe(name: str, recipe: Recipe) -> dict[str, Any]:
    return {
        "name": name,
        "torch_class": f"fusedbun.{recipe.torch_class}",
        "optax_factory": f"fusedbun_jax.{name}",
        "state_bytes_per_parameter": [
            {"settings": settings, "bytes": bytes_per_parameter(recipe, **settings)}
            for settings in ({}, *recipe.listed)
        ],
        "lr": recipe.lr,
        "lr_is_fixed": recipe.fixed_lr,
        "defaults": recipe.defaults,
        "source": _source(recipe),
    }


def _source(recipe: Recipe) -> str | None:
    """The docstring's `Source:`, without its line breaks."""
    _, found, text = (inspect.getdoc(recipe.make) or "").partition("Source:")
    return " ".join(text.split()) if found else None


def _table(optimizers: list[dict[str, Any]]) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    heads = ("torch class", "optax factory", "bytes of state a parameter")
    rows = [(o["torch_class"], o["optax_factory"], _bytes(o)) for o in optimizers]
    first, second = (max(len(row[i]) for row in [heads, *rows]) + 2 for i in (0, 1))
    lines = [f"{heads[0]:{first}}{heads[1]:{second}}{heads[2]}"]
    for optimizer, (torch_class, factory, state) in zip(optimizers, rows, strict=True):
        lines += ["", f"{torch_class:{first}}{factory:{second}}{state}"]
        lines += _paragraph("defaults: ", _defaults(optimizer), width)
        lines += _paragraph("source:   ", optimizer["source"] or "fusedbun's own", width)
    shape = " x ".join(map(str, SHAPE))
    note = (
        f"The bytes are counted from the declared state of a float32 matrix of {shape}; the parameter itself takes 4."
    )
    return "\n".join([*lines, "", *textwrap.wrap(note, width)])


def _bytes(optimizer: dict[str, Any]) -> str:
    usual, *others = optimizer["state_bytes_per_parameter"]
    also = ", ".join(f"{other['bytes']:.2f} with {_arguments(other['settings'])}" for other in others)
    return f"{usual['bytes']:.2f}" + (f" ({also})" if also else "")


def _defaults(optimizer: dict[str, Any]) -> str:
    lr = "required" if optimizer["lr"] is None else f"{optimizer['lr']:g}"
    rate = f"lr {'fixed at ' if optimizer['lr_is_fixed'] else ''}{lr}"
    return f"{rate}, {_arguments(optimizer['defaults'])}"


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _paragraph(title: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=f"  {title}", subsequent_indent=" " * (len(title) + 2))
