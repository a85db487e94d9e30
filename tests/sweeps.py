"""What of a sweep `make test` runs: a short cut through it, while `make test-long` runs the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fusedbun.storage.codes import MOMENTS, Blocks

long = pytest.mark.long
CODED = tuple(name for name, code in MOMENTS.items() if isinstance(code, Blocks))  # momentum_dtype of few bits
NOISY = ("bfloat16", *CODED)  # what is rounded with noise, whatever the parameter's dtype


def sweep(
    names: str | tuple[str, ...], values: Iterable[Any], short: Callable[..., bool], ids: Any = None
) -> pytest.MarkDecorator:
    """Parametrizes a test as `pytest.mark.parametrize` does.

    Args:
        names: the name of the test's argument, or a tuple of several.
        values: their values: of several, tuples.
        short: called with an argument's value, or with those of several: whether `make test` runs it.
        ids: as of `pytest.mark.parametrize`.
    """
    given = [(value,) if isinstance(names, str) else tuple(value) for value in values]
    params = [pytest.param(*one, marks=() if short(*one) else long) for one in given]
    return pytest.mark.parametrize(names, params, ids=ids)


def only(*chosen: Any) -> Callable[..., bool]:
    """For `sweep`: these values, or these tuples of values, are the short cut."""
    return lambda *value: (value[0] if len(value) == 1 else value) in chosen
