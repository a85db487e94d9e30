"""u-muP's scale of a parameter's learning rate, from its type, its shape and its depth (arXiv 2407.17465, table 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fusedbun.hyper import Axis, PerParam, Scalar, is_concrete_zero
from fusedbun.transform import Shape

Type = Literal["weight", "bias", "norm", "output"]
Typed = Type | tuple[Type, int] | None  # a type, with the number of layers its depth is scaled by where there is one
Types = Mapping[str, Any] | Callable[[tuple[str, ...], Any], Typed] | None

Constraint = Literal["to_output_scale"] | None


@dataclass(frozen=True)
class MupScale:
    """A rule `(path, param) -> scale` for u-muP's learning rates.

        weight:             depth_scale / sqrt(fan_in)
        bias, norm, output: depth_scale                        depth_scale = 1 / sqrt(depth), 1 without a depth

    With `readout_constraint="to_output_scale"` (SGD): `depth_scale*sqrt(fan_in)` for a weight, `depth_scale*shape[0]`
    for a bias or norm, `depth_scale` for an output.

    Args:
        types: the parameters' types by name ("layer.weight"), as a tree of names, or as a rule `(path, param) -> type`.
            A type is "weight", "bias", "norm" or "output", or a pair of it and a depth. Where there is none, the
            attributes `mup_type` and `mup_scaling_depth` of the parameter are read, which unit-scaling's modules set.
        channel_axis: the output channels' axis; `fan_in` is the product of the others (of one axis: its size).
        allow_untyped: give a parameter without a type the scale 1 instead of raising a ValueError.
        readout_constraint: the constraint of the readout layer that the model uses, for SGD.

    unit-scaling refuses a parameter of four or more axes; here the same product is its fan-in. A 0-d or empty one has
    fan-in 1.
    """

    types: Types
    channel_axis: PerParam[Axis] = 0
    allow_untyped: bool = False
    readout_constraint: Constraint = None

    def __post_init__(self) -> None:
        if not (self.types is None or isinstance(self.types, Mapping) or callable(self.types)):
            raise TypeError(
                f"mup must be a mapping from names to types, a rule `(path, param) -> type` or None, "
                f"but it is {self.types!r} ({type(self.types).__name__})"
            )

    def __call__(self, path: tuple[str, ...], param: Any) -> float:
        kind, depth = self.type_and_depth(path, param)
        if kind is None:
            return 1.0
        depth_scale: float = depth**-0.5
        if kind == "output":
            return depth_scale
        if kind == "weight":
            root = math.sqrt(self.fan_in(path, param))
            return depth_scale / root if self.readout_constraint is None else depth_scale * root
        size = int(param.shape[0]) if param.shape else 1
        return depth_scale if self.readout_constraint is None else depth_scale * (size or 1)

    def type_and_depth(self, path: tuple[str, ...], param: Any) -> tuple[Type | None, int]:
        """The parameter's type and depth; raises a ValueError where they are not valid."""
        typed = entry_of(self.types, path, param)
        if typed is None:
            typed = getattr(param, "mup_type", None), getattr(param, "mup_scaling_depth", None)
        kind, depth = typed if isinstance(typed, tuple) and len(typed) == 2 else (typed, None)
        name, shape = describe(path), tuple(param.shape)
        if kind is None and not self.allow_untyped:
            raise ValueError(
                f"{name} of shape {shape} has no u-muP type; give it one in `mup` ({_NAMES}), make it with "
                f"unit-scaling's modules, or set allow_non_unit_scaling_params=True to leave its learning rate as it is"
            )
        if kind is not None and kind not in get_args(Type):
            raise ValueError(
                f"the u-muP type of {name} of shape {shape} must be {_NAMES}, or a pair of one and a depth, "
                f"but it is {kind!r}"
            )
        if depth is not None and (not isinstance(depth, int) or depth < 1):
            raise ValueError(f"the u-muP depth of {name} must be an integer from 1 up, but it is {depth!r}")
        return kind, depth or 1

    def fan_in(self, path: tuple[str, ...], param: Any) -> int:
        """How many inputs each of the parameter's outputs has."""
        shape: Shape = tuple(param.shape)
        k = len(shape)
        if k < 2:
            return math.prod(shape) or 1
        axis = self.channel_axis(path, param) if callable(self.channel_axis) else self.channel_axis
        if not -k <= axis < k:
            raise ValueError(
                f"channel_axis must lie in [{-k}, {k}) for {describe(path)} of shape {shape}, but it is {axis}"
            )
        return math.prod(n for i, n in enumerate(shape) if i != axis % k) or 1


_NAMES = ", ".join(map(repr, get_args(Type)))


@dataclass(frozen=True)
class IndependentDecay:
    """A rule for a weight decay that does not depend on the learning rate's size: `weight_decay / (initial_lr*scale)`.

    It then follows the schedule, but neither the learning rate nor its scale.
    """

    weight_decay: Scalar
    initial_lr: Scalar
    scale: MupScale

    def __call__(self, path: tuple[str, ...], param: Any) -> Scalar:
        return self.weight_decay / (self.initial_lr * self.scale(path, param))


def independent(weight_decay: Scalar, initial_lr: Scalar | None, scale: MupScale) -> Scalar | IndependentDecay:
    """The rule of `IndependentDecay`, or 0 where there is no decay."""
    if is_concrete_zero(weight_decay):
        return 0.0
    if is_concrete_zero(initial_lr):
        raise ValueError(
            "independent weight decay divides by the initial learning rate, which must lie in (0, inf), but it is "
            f"{initial_lr!r}; begin above 0, or set independent_weight_decay=False"
        )
    return IndependentDecay(weight_decay, _required(initial_lr), scale)


def relative_decay(weight_decay: Scalar, initial_lr: Scalar | None) -> Scalar:
    """`weight_decay / initial_lr`, and 0 where either is."""
    if is_concrete_zero(weight_decay) or is_concrete_zero(initial_lr):
        return 0.0
    return weight_decay / _required(initial_lr)


def _required(initial_lr: Scalar | None) -> Scalar:
    if initial_lr is None:
        raise ValueError(
            "this weight decay is relative to the initial learning rate, which a schedule does not tell: give "
            "initial_learning_rate, the learning rate that the weight decay is meant for"
        )
    return initial_lr


def describe(path: tuple[str, ...]) -> str:
    """What a message calls a parameter."""
    return f"parameter {'.'.join(path)!r}" if path else "a parameter without a name"


def entry_of(types: Types, path: tuple[str, ...], param: Any) -> Any:
    """A parameter's entry: what the rule says, or what the mapping has under its dotted name or along its path."""
    if types is None:
        return None
    if not isinstance(types, Mapping):
        return types(path, param)
    if (name := ".".join(path)) in types:
        return types[name]
    entry: Any = types
    for key in path:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return None if isinstance(entry, Mapping) else entry
