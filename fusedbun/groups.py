"""Hyper-parameters by patterns on parameter names: which parameter gets what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

Rules = Mapping[str, Mapping[str, Any]]


def overrides(names: Iterable[str], rules: Rules) -> dict[str, dict[str, Any]]:
    """The hyper-parameters that each parameter gets from the rules; of several that match, a later one prevails.

    Args:
        names: the parameters' dotted names.
        rules: hyper-parameters by pattern; `*` stands for any characters, `?` for one, `[…]` for one of several.

    Raises:
        ValueError: a pattern matches no name.
    """
    by_name: dict[str, dict[str, Any]] = {name: {} for name in names}
    for pattern, hyperparameters in rules.items():
        matching = [name for name in by_name if fnmatchcase(name, pattern)]
        if not matching:
            near = get_close_matches(pattern, by_name, n=3, cutoff=0.3) or list(by_name)[:3]
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter; there are {len(by_name)}, such as "
                f"{', '.join(map(repr, near)) or 'none'}"
            )
        for name in matching:
            by_name[name] |= hyperparameters
    return by_name
