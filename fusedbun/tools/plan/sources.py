"""What is trained: the tensors of modules, of trees of arrays, of lists of shapes, and of files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedbun.hyper import dtype_name
from fusedbun.tools.plan.files import read
from fusedbun.tools.plan.sizes import STEPPED
from fusedbun.tools.plan.trees import Tensor, of_array, of_tree


def tensors_of(model: Any, dtype: str | None = None) -> tuple[Tensor, ...]:
    """The tensors of a model.

    Args:
        model: a torch module; a tree of arrays, or of anything with a shape and a dtype; a shape; a list or mapping of
            shapes or of pairs (shape, dtype); or a path (`fusedbun.tools.plan.files`).
        dtype: the dtype that its floating-point tensors are taken to be in; None: their own, float32 for shapes.

    Raises:
        TypeError: it is something else.
        ValueError: a shape or dtype is not valid, or there is nothing to train.
    """
    if dtype is not None and (dtype := dtype_name(dtype) or dtype) not in STEPPED:
        raise ValueError(f"dtype must be one of {', '.join(STEPPED)}, but it is {dtype!r}")
    found = [_in_dtype(tensor, dtype) for tensor in _tensors(model)]
    if not any(tensor.role == "trained" and tensor.elements for tensor in found):
        raise ValueError("the model has no floating-point parameters that are trained, so there is nothing to plan")
    return tuple(found)


def _tensors(model: Any) -> Iterator[Tensor]:
    if isinstance(model, (str, os.PathLike)):
        return iter(read(Path(model)))
    return _of_module(model) if _is_module(model) else of_tree(model)


def _is_module(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _in_dtype(tensor: Tensor, dtype: str | None) -> Tensor:
    """The tensor as it is planned with; raises a ValueError where it is trained but cannot be stepped."""
    is_floating = tensor.dtype.startswith("float") or tensor.dtype == "bfloat16"
    if is_floating and dtype is not None:
        return tensor._replace(dtype=dtype)
    if tensor.role == "trained" and tensor.dtype not in STEPPED:
        if is_floating or tensor.dtype.startswith("complex"):
            raise ValueError(
                f"{tensor.name!r} is {tensor.dtype}, but the optimizers step {', '.join(STEPPED)}; "
                f"plan with another dtype, such as bfloat16"
            )
        return tensor._replace(role="buffer")  # whole numbers: they have no gradients
    return tensor


def _of_module(module: Any) -> Iterator[Tensor]:
    for name, param in module.named_parameters():
        yield of_array(name, param)._replace(role="trained" if param.requires_grad else "frozen")
    for name, buffer in module.named_buffers():
        yield of_array(name, buffer)._replace(role="buffer")


def tied_parameters(model: Any) -> tuple[str, ...] | None:
    """The names of a torch module's parameters that it has more than once, each once; None of any other model."""
    if not _is_module(model):
        return None
    first = {id(param): name for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return tuple(dict.fromkeys(first[id(param)] for name, param in every if first[id(param)] != name))
