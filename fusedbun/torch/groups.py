"""Param groups of a torch module by patterns on parameter names, and without decay where it does harm."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedbun.groups import Rules, overrides


def param_groups(model: nn.Module, rules: Rules | None = None, *, no_decay: str | None = None) -> list[dict[str, Any]]:
    """Named param groups, for any torch optimizer, with hyper-parameters by pattern on the parameters' names.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> groups = param_groups(model, {"3.*": {"lr": 1e-4}}, no_decay="weight_decay")
    >>> [({k: v for k, v in group.items() if k != "params"}, [name for name, _ in group["params"]]) for group in groups]
    ... # doctest: +NORMALIZE_WHITESPACE
    [({'weight_decay': 0.0}, ['0.weight', '1.bias', '2.weight', '2.bias']),
     ({}, ['1.weight']),
     ({'lr': 0.0001}, ['3.weight']),
     ({'weight_decay': 0.0, 'lr': 0.0001}, ['3.bias'])]

    Args:
        model: the module; a parameter that it uses twice is in one group, once.
        rules: hyper-parameters by pattern ("encoder.*", "*.bias"); of several that match, a later one prevails.
        no_decay: the optimizer's name for weight decay ("weight_decay" or Fusedbun's "Lambda"), which is set to 0 for
            biases, norms and embeddings unless a rule says otherwise; None: decay is left as it is.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    params = dict(model.named_parameters())
    changes = overrides(params, rules or {})
    if no_decay is not None:
        spared = spared_from_decay(model)
        changes = {name: ({no_decay: 0.0} if name in spared else {}) | changed for name, changed in changes.items()}
    settings: list[dict[str, Any]] = []  # of the groups
    groups: list[dict[str, Any]] = []
    for name, changed in changes.items():
        if changed not in settings:
            settings.append(changed)
            groups.append({"params": [], **changed})
        groups[settings.index(changed)]["params"].append((name, params[name]))
    return groups


def spared_from_decay(model: nn.Module) -> set[str]:
    """The names of biases, of everything in a norm, and of embeddings."""
    return {
        name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(prefix, recurse=False)
        if "bias" in name.rpartition(".")[2]
        or "norm" in type(module).__name__.lower()
        or isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
