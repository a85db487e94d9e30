"""What is trained: the tensors of modules, trees and shapes, and of files, of which no tensor is loaded."""

from __future__ import annotations

import json
import math
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fusedbun.hyper import dtype_name
from fusedbun.tools.plan.sizes import BITS, STEPPED, size_of
from fusedbun.transform import Shape

Role = Literal["trained", "frozen", "buffer"]
_MOST_ELEMENTS = 1 << 59  # so that the bytes of a tensor, and of its state, are numbers that a machine counts with
_KINDS = (
    "a torch module, a tree of arrays, a shape such as (768, 768), a list or mapping of shapes, each alone or as a "
    "pair (shape, dtype), or the path of a file"
)
INDEX = ".safetensors.index.json"
_LARGEST_JSON = 100_000_000  # bytes: as much as safetensors allows a header
_POINTER = b"version https://git-lfs"
# safetensors' names for dtypes.
_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn",
    **{f"{sign}{bits}": f"{'u' * (sign == 'U')}int{bits}" for sign in "IU" for bits in (8, 16, 32, 64)},
}


class Tensor(NamedTuple):
    """A tensor of a model."""

    name: str
    shape: Shape
    dtype: str
    role: Role = "trained"  # "frozen" for a parameter that no optimizer steps; "buffer" for what is no parameter

    @classmethod
    def of(cls, name: str, shape: Iterable[Any], dtype: Any = "float32", role: Role = "trained") -> Tensor:
        """A tensor whose shape and dtype are checked; raises a ValueError where they are none of a tensor."""
        shape = tuple(shape)
        sizes = tuple(map(operator.index, shape))
        if any(n < 0 or isinstance(size, bool) for n, size in zip(sizes, shape, strict=True)):
            raise ValueError(f"the shape of {name!r} must be of whole numbers from 0 up, but it is {sizes}")
        if math.prod(n or 1 for n in sizes) > _MOST_ELEMENTS:
            raise ValueError(f"{name!r} must have at most 2**59 elements, but its shape is {sizes}"[:300])
        found = dtype_name(dtype) or str(dtype)
        if found not in BITS:
            raise ValueError(f"the dtype of {name!r} must be one of {', '.join(BITS)}, but it is {found!r:.100}")
        return cls(name, sizes, found, role)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return size_of(self.shape, self.dtype)


def tensors_of(model: Any, dtype: str | None = None) -> tuple[Tensor, ...]:
    """The tensors of a model, as `plan` takes it and with its errors; those of floating point in another dtype."""
    if dtype is not None and (dtype := dtype_name(dtype) or dtype) not in STEPPED:
        raise ValueError(f"dtype must be one of {', '.join(STEPPED)}, but it is {dtype!r}")
    tensors = _read(Path(model)) if isinstance(model, (str, os.PathLike)) else _of_tree(model)
    found = [_in_dtype(tensor, dtype) for tensor in tensors]
    if not any(tensor.role == "trained" and tensor.elements for tensor in found):
        raise ValueError("the model has no floating-point parameters that are trained, so there is nothing to plan")
    return tuple(found)


def tied_parameters(model: Any) -> tuple[str, ...] | None:
    """The names of a torch module's parameters that it has more than once, each once; None of any other model."""
    if not _is_module(model):
        return None
    first = {id(param): name for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return tuple(dict.fromkeys(first[id(param)] for name, param in every if first[id(param)] != name))


def _in_dtype(tensor: Tensor, dtype: str | None) -> Tensor:
    """The tensor as it is planned with; raises a ValueError where it is trained but cannot be stepped."""
    is_floating = tensor.dtype.startswith("float") or tensor.dtype == "bfloat16"
    if is_floating and dtype is not None:
        return tensor._replace(dtype=dtype)
    if tensor.role != "trained" or tensor.dtype in STEPPED:
        return tensor
    if is_floating or tensor.dtype.startswith("complex"):
        raise ValueError(
            f"{tensor.name!r} is {tensor.dtype}, but the optimizers step {', '.join(STEPPED)}; "
            f"plan with another dtype, such as bfloat16"
        )
    return tensor._replace(role="buffer")  # whole numbers: they have no gradients


def _is_module(model: Any) -> bool:
    """Whether it is torch's, which is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _of_tree(tree: Any, path: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """The tensors of a torch module, or of a tree of shapes, pairs (shape, dtype), and what has a shape and a dtype."""
    name = ".".join(path) or "the tensor"
    if not path and _is_module(tree):
        for part, param in tree.named_parameters():
            yield _of_array(part, param, "trained" if param.requires_grad else "frozen")
        for part, buffer in tree.named_buffers():
            yield _of_array(part, buffer, "buffer")
    elif _is_array(tree):
        yield _of_array(name, tree)
    elif _is_shape(tree) and (path or tree):  # () is the shape of a single number, but not a model
        yield Tensor.of(name, tree)
    elif isinstance(tree, (tuple, list)) and len(tree) == 2 and _is_shape(tree[0]) and _is_dtype(tree[1]):
        yield Tensor.of(name, *tree)
    elif isinstance(tree, (Mapping, list, tuple)):
        for key, child in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _of_tree(child, (*path, str(key)))
    elif tree is not None:
        yield from _of_registered(tree, path)


def _of_registered(tree: Any, path: tuple[str, ...]) -> Iterator[Tensor]:
    """The tensors of a node that only JAX can take apart."""
    jax = sys.modules.get("jax")
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree) if jax else [((), tree)]:
        here = (*path, *(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys))
        if not _is_array(leaf):
            where = f"at {'.'.join(here)!r} there" if here else "it"
            raise TypeError(f"a model must be {_KINDS}, but {where} is {leaf!r:.200} ({type(leaf).__name__})")
        yield _of_array(".".join(here) or "the tensor", leaf)


def _of_array(name: str, array: Any, role: Role = "trained") -> Tensor:
    try:
        shape = tuple(array.shape)
    except RuntimeError as error:  # a lazy module's
        raise ValueError(f"{name!r} has no shape yet; give its module a batch first") from error
    return Tensor.of(name, shape, array.dtype, role)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_shape(value: Any) -> bool:
    """Whether it is a tuple or list of whole numbers, which need not be valid."""
    return type(value) in (tuple, list) and all(hasattr(n, "__index__") and not hasattr(n, "ndim") for n in value)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) or dtype_name(value) is not None


def _read(path: Path) -> Iterable[Tensor]:
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{path} must be a file or a folder, but it is neither")
    if path.name.endswith(INDEX):
        return _read_index(path)
    if path.suffix != ".json":
        return _read_header(path)
    try:
        return list(_of_tree(_with_dtypes(_read_json(path))))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no shapes by name: {error}") from error


def _read_folder(folder: Path) -> list[Tensor]:
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) > 1:
        raise ValueError(f"{folder} has {len(indices)} indices; name one: {', '.join(p.name for p in indices)}")
    if indices:
        return _read_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors files; give a folder that has some, or a file")
    found: dict[str, Tensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in found:
                raise ValueError(f"{folder} has {tensor.name!r} in several files and no index; name one file")
            found[tensor.name] = tensor
    return list(found.values())


def _read_index(path: Path) -> list[Tensor]:
    """The tensors that the index lists, from the files beside it that it names."""
    content = _read_json(path)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f'{path} is not an index of safetensors files: it has no "weight_map" from names to files')
    headers: dict[str, dict[str, Tensor]] = {}
    for file in dict.fromkeys(files.values()):
        if Path(file).name != file:
            raise ValueError(f"{path} names {file!r:.200}, but an index names files beside it")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path} names {file!r:.200}, but there is no such file beside it; is all downloaded?")
        headers[file] = {tensor.name: tensor for tensor in _read_header(path.parent / file)}
    for name, file in files.items():
        if name not in headers[file]:
            raise ValueError(
                f"{path} says that {name!r:.200} is in {file!r}, but it is not; the two do not belong together"
            )
    return [headers[file][name] for name, file in files.items()]


def _read_header(path: Path) -> list[Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            f"safetensors is not installed; reading {path} needs: pip install 'fusedbun[plan]'", name="safetensors"
        ) from error
    try:  # the file is mapped, and of that only the header read
        with safe_open(path, framework="numpy") as header:
            parts = [(name, header.get_slice(name)) for name in header.keys()]  # noqa: SIM118 - not a mapping
            found = [(name, part.get_shape(), part.get_dtype()) for name, part in parts]
    except SafetensorError as error:
        reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
        with path.open("rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
        advice = "it stands for a file of Git LFS: run git lfs pull" if is_pointer else "download it again"
        raise ValueError(f"{path} is no safetensors file, or a part of one: {reason:.300}; {advice}") from error
    return [Tensor.of(name, shape, _DTYPES.get(dtype, dtype)) for name, shape, dtype in found]


def _with_dtypes(tree: Any) -> Any:
    """The tree with pairs in the place of mappings from "shape" and "dtype"."""
    if not isinstance(tree, dict):
        return tree
    if isinstance(tree.get("shape"), list) and tree.keys() <= {"shape", "dtype"}:
        return tree["shape"], str(tree.get("dtype", "float32"))
    return {name: _with_dtypes(child) for name, child in tree.items()}


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} must have at most {_LARGEST_JSON:,} bytes, but it has {path.stat().st_size:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
