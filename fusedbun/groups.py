"""Hyper-parameters by patterns on parameter names, and which parameters are stacks: which parameter gets what."""

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


def stacked_experts(path: tuple[str, ...], param: Any) -> int:
    """The rule for `stacked` by which experts kept as one tensor are stacks of them: 1 for such a tensor, else 0.

    Such are the tensors of two or more axes that a module called `experts` holds itself, the expert first: matrices
    (experts, in, out) and biases (experts, out) of GPT-OSS, Llama 4, Mixtral and Qwen3-MoE in transformers, and of
    torchtitan. Layers in a list, `experts.0.weight`, are parameters of their own already.

    >>> from types import SimpleNamespace
    >>> stacked_experts(("mlp", "experts", "gate_up_proj"), SimpleNamespace(ndim=3))
    1
    >>> stacked_experts(("mlp", "experts", "0", "weight"), SimpleNamespace(ndim=2))
    0

    Args:
        path: the names that lead to the parameter: give a torch optimizer `model.named_parameters()`.
        param: the parameter.
    """
    return int(path[-2:-1] == ("experts",) and param.ndim > 1)
