"""All uses, and the rows of the table that they make."""

from __future__ import annotations

from typing import Any

from benchmarks.behaviour import (
    in_jax,
    in_torch,
    jax_programs,
    jax_state,
    jax_wrappers,
    torch_libraries,
    torch_models,
    torch_schedules,
    torch_state,
    torch_tensors,
    torch_training,
)
from benchmarks.behaviour.uses import Contender, Part, Use, cell, is_failing

PARTS: dict[str, list[Part]] = {
    "torch": [
        torch_training.PART,
        torch_schedules.PART,
        torch_state.PART,
        torch_state.SAVED,
        torch_tensors.PART,
        torch_models.COMPILED,
        torch_models.MODELS,
        torch_models.SPREAD,
        torch_libraries.ADAPTERS,
        torch_libraries.LIBRARIES,
    ],
    "jax": [
        jax_programs.PROGRAMS,
        jax_wrappers.PART,
        jax_wrappers.SCHEDULED,
        jax_state.STATE,
        jax_programs.TREES,
        jax_state.FLAX,
    ],
}
CONTENDERS: dict[str, list[Contender]] = {  # AdamW first
    "torch": in_torch.contenders(),
    "jax": in_jax.contenders(),
}
USES: dict[tuple[str, str], tuple[Part, Use]] = {  # by framework and title
    (framework, use.title): (part, use) for framework, parts in PARTS.items() for part in parts for use in part.uses
}


def row(framework: str, title: str) -> dict[str, Any]:
    """A use, what becomes of it with each contender, and why it does not work where it does not."""
    part, use = USES[framework, title]
    cells = {contender.name: cell(use, contender) for contender in CONTENDERS[framework]}
    reasons = {x.name: use.reason(x.name) for x in CONTENDERS[framework] if x.ours and is_failing(cells[x.name])}
    return {
        "framework": framework,
        "part": part.title,
        "use": title,
        "works_if": use.works_if,
        "cells": cells,
        "reasons": {name: reason for name, reason in reasons.items() if reason},
    }
