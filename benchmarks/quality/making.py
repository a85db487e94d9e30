"""How optimizers are made, each with a text that says it: results are kept with it, and those of another are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from torch import Tensor

import fusedbun
from benchmarks.quality.altered import Altered
from fusedbun import Transform

Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Make:
    """Makes an optimizer.

    Args:
        text: what it makes, with all settings.
        function: makes it: in torch of named parameters and a learning rate, in JAX of a schedule.
    """

    text: str
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def own(name: str, **given: Any) -> Make:
    """A torch class of this package."""
    return Make(_call("fusedbun", name, given), lambda params, lr: getattr(fusedbun, name)(params, lr=lr, **given))


def own_chain(*parts: Transform) -> Make:
    """A chain of transformations, in torch."""
    text = f"fusedbun.chain({', '.join(map(_described, parts))})"
    return Make(text, lambda params, lr: fusedbun.ChainOptimizer(params, fusedbun.chain(*parts), lr=lr))


def of(module: str, name: str, **given: Any) -> Make:
    """A torch class of another package, which takes parameters without names."""

    def make(params: Named, lr: float) -> Any:
        return getattr(import_module(module), name)([p for _, p in params], lr=lr, **given)

    return Make(_call(module, name, given), make)


def altered(how: type[Altered], make: Make, **given: Any) -> Make:
    """An optimizer with something done beside its step."""
    settings = f", {_spelled(given)}" if given else ""
    return Make(f"{how.__name__}({make.text}{settings})", lambda params, lr: how(make(params, lr), **given))


def in_jax(name: str, **given: Any) -> Make:
    """A factory of this package, of layers as Flax keeps them."""

    def make(schedule: Any) -> Any:
        library = import_module("fusedbun_jax")
        axis = {"channel_axis": library.flax_channel_axis} if name in ("fusedbun", "mup_adamw") else {}
        return getattr(library, name)(schedule, **given, **axis)

    return Make(_call("fusedbun_jax", name, given), make)


def in_optax(name: str, **given: Any) -> Make:
    """A factory of optax."""
    return Make(_call("optax", name, given), lambda schedule: getattr(import_module("optax"), name)(schedule, **given))


def _described(part: Transform) -> str:
    given = {f.name: x for f in fields(part) if (x := getattr(part, f.name)) != f.default}
    return f"{type(part).__name__}({_spelled(given)})"


def _call(module: str, name: str, given: Mapping[str, Any]) -> str:
    return f"{module}.{name}({_spelled(given)})"


def _spelled(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={getattr(value, '__name__', repr(value))}" for name, value in given.items())
