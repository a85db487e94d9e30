"""Makes the plan: what each optimizer needs for a model, part by part."""

from __future__ import annotations

import fnmatch
import heapq
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from fusedbun.chain import Chain, Stacked, slice_shape
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.recipes import RECIPES
from fusedbun.storage.rounding import Rounding
from fusedbun.tools.plan import temporaries
from fusedbun.tools.plan.estimates import TOKENS, Estimate, Plan, Refusal
from fusedbun.tools.plan.settings import Setting, chosen
from fusedbun.tools.plan.sizes import parse_size, size_of
from fusedbun.tools.plan.sources import Tensor, tensors_of, tied_parameters
from fusedbun.tools.plan.temporaries import Room
from fusedbun.tools.shared.machine import cpus
from fusedbun.transform import Shape

_PLACE = 8  # bytes of the number that says which row of an embedding a row of a sparse gradient belongs to
_ADAMW_STEP = 4  # bytes of torch's step counter, one for every parameter


class _Kind(NamedTuple):
    """What decides the bytes of a trained parameter: all of a kind take as much."""

    shape: tuple[int, ...]
    dtype: str
    is_sparse: bool
    stacked: int  # its leading axes that are a stack's


class _Needs(NamedTuple):
    """The bytes that one parameter of a kind needs."""

    gradient: int
    state: int
    room: Room = Room(0, 0)  # while a kernel steps it
    definition: int = 0  # while its rules are run as they are written, where there is no kernel
    densified: int = 0  # a sparse gradient made dense; that of all parameters is held at once
    leaves: int = 1  # that it is stepped as, each with such a room: the slices of a stack


def plan(
    model: Any,
    optimizers: Iterable[str | Setting] | str | Setting | None = None,
    *,
    dtype: Any = None,
    stochastic_rounding: bool = True,
    sparse: str | Iterable[str] = (),
    tokens: int = TOKENS,
    stacked: Stacked = 0,
    threads: int | None = None,
    budget: int | str | None = None,
) -> Plan:
    """How much memory training a model takes, with and without gradient release. Allocates nothing.

    Activations are not counted, nor what the framework itself takes and what its allocator leaves unused.

    >>> import fusedbun
    >>> [small, _] = fusedbun.plan({"weight": (1000, 1000)}, fusedbun.tools.plan.Setting("sm3")).estimates
    >>> small.weights, small.gradients, small.state
    (4000000, 4000000, 8000)

    Args:
        model: a torch module, on the meta device too; a tree of JAX's arrays or of ShapeDtypeStruct; a shape, or a
            list or mapping of shapes, each alone (then float32) or as a pair (shape, dtype); or the path of a
            safetensors file, of a folder of them, or of a JSON file of shapes. Of a file every floating-point tensor
            is taken for a trained parameter.
        optimizers: names ("sm3", "fusedbun", …, "adamw" for torch's), each for its usual settings, or settings of
            one's own; None: all of them.
        dtype: plan with floating-point weights in this dtype; None: their own.
        stochastic_rounding: round bfloat16 weights without a bias.
        sparse: patterns such as "embed*" of parameters whose gradients are sparse rows
            (`torch.nn.Embedding(sparse=True)`); they match a name from its beginning or from behind a dot.
        tokens: how many rows such a gradient has: the tokens of a batch, repeated ones too.
        stacked: how many leading axes make a parameter a stack of several, as the optimizers take it: a number, or a
            rule `(path, param) -> number`, where `path` is the tuple of the names between the dots.
        threads: on so many threads the step runs; None: on as many as this process has CPUs.
        budget: the memory that there is, in bytes or as text such as "24GiB".

    Raises:
        OSError: a file cannot be read.
        TypeError: the model or a setting is of a wrong type.
        ValueError: a value is not allowed, a file is not what it should be, or a pattern matches nothing.
        ModuleNotFoundError: a library that is needed to read a file is not installed.
    """
    if isinstance(budget, str):
        try:
            budget = parse_size(budget)
        except ValueError as error:
            raise ValueError(f"budget {error}") from None
    threads = cpus() if threads is None else threads
    for name, number in {"threads": threads, "tokens": tokens, "budget": 1 if budget is None else budget}.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, but it is {number!r}")
    tensors = tensors_of(model, dtype)
    settings = chosen(optimizers)
    if all(tensor.dtype == "float32" for tensor in tensors if tensor.role == "trained"):
        first = next((one for one in settings if one.is_torch_adamw), None)  # in float32 the other one is the same
        settings = tuple(one for one in settings if one is first or not one.is_torch_adamw)
    embeddings = matching(tensors, (sparse,) if isinstance(sparse, str) else tuple(sparse), "sparse")
    planner = _Planner(tensors, embeddings, tokens, threads, stochastic_rounding, Chain((), stacked=stacked))
    estimates: list[Estimate] = []
    refusals: list[Refusal] = []
    for setting in settings:
        try:
            estimates += planner.estimates(setting)
        except (TypeError, ValueError) as error:
            refusals.append(Refusal(setting, str(error)))
    return Plan(tensors, tuple(estimates), tuple(refusals), threads, tokens, embeddings, tied_parameters(model), budget)


def matching(tensors: Iterable[Tensor], patterns: Iterable[str], argument: str) -> tuple[str, ...]:
    """The names of the parameters that a pattern matches, from the beginning or from behind a dot.

    Raises a ValueError where a pattern, which this argument gave, matches none.
    """
    found: dict[str, None] = {}
    names = [tensor.name for tensor in tensors if tensor.role == "trained" and len(tensor.shape) > 1]
    for pattern in patterns:
        expression = re.compile(r"(?:.*\.)?" + fnmatch.translate(pattern))
        names_now = [name for name in names if expression.match(name)]
        if not names_now:
            known = ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")
            raise ValueError(
                f"{argument} must match trained parameters of two or more axes, but {pattern!r} matches none "
                f"of the {len(names)}: {known or 'there are none'}"
            )
        found |= dict.fromkeys(names_now)
    return tuple(found)


class _Planner:
    """A model, and how it is stepped."""

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        sparse: Iterable[str],
        tokens: int,
        threads: int,
        stochastic_rounding: bool,
        stacking: Chain,
    ) -> None:
        self.tensors, self.tokens, self.threads, self.rounding = tensors, tokens, threads, Rounding(stochastic_rounding)
        self.parameters = sum(tensor.elements for tensor in tensors if tensor.role != "buffer")
        self.named: dict[_Kind, list[str]] = {}
        rows = set(sparse)
        for t in tensors:
            if t.role == "trained":
                stacked = stacking.at(tuple(t.name.split(".")), _like(t.shape, t.dtype)).stacked
                self.named.setdefault(_Kind(t.shape, t.dtype, t.name in rows, stacked), []).append(t.name)
        self.trained = sum(map(len, self.named.values()))

    def estimates(self, setting: Setting) -> list[Estimate]:
        """What the setting needs; raises a TypeError or ValueError where it cannot train the model."""
        if setting.is_torch_adamw:
            return [self._adamw(setting)]
        chain = setting.chain(self.rounding.stochastic)
        needs = {kind: self._needs(setting, chain, kind) for kind in self.named}
        rounds = any(self.rounding.at(kind).stochastic for kind in self.named)
        weights = sum(tensor.size for tensor in self.tensors)
        gradients, state = (
            sum(len(names) * getattr(needs[kind], part) for kind, names in self.named.items())
            for part in ("gradient", "state")
        )
        parts = {False: (gradients, self._temporaries(needs)), True: self._released(needs)}
        return [
            Estimate(setting, rounds, releases, self.parameters, weights, held, state, most)
            for releases, (held, most) in parts.items()
        ]

    def _needs(self, setting: Setting, chain: Chain, kind: _Kind) -> _Needs:
        name, shape, dtype = self.named[kind][-1], kind.shape, kind.dtype
        chain = replace(chain, stacked=kind.stacked)
        chain = chain.at(tuple(name.split(".")), _like(shape, dtype), name)
        size = size_of(shape, dtype)
        if kind.is_sparse:
            rows, densified = (self.tokens, *shape[1:]), size
            gradient = size_of(rows, dtype) + self.tokens * _PLACE
            if RECIPES[setting.optimizer].densifies_sparse_gradients:  # by making them dense
                rows = shape
            else:
                chain, densified = chain.for_rows(), 0
            definition = temporaries.definition(chain, rows, dtype)
            return _Needs(gradient, state_bytes(chain, shape, dtype), definition=definition, densified=densified)
        state = state_bytes(chain, shape, dtype)
        if not size:  # there is nothing to step
            return _Needs(0, state)
        of, leaves = slice_shape(shape, chain.stacked), math.prod(shape[: chain.stacked])
        chain = chain.slice((0,) * chain.stacked)
        try:
            return _Needs(size, state, temporaries.room(chain, of, dtype), leaves=leaves)
        except UnschedulableError:
            return _Needs(size, state, definition=leaves * temporaries.definition(chain, of, dtype))

    def _temporaries(self, needs: Mapping[_Kind, _Needs]) -> int:
        """The most while all parameters are stepped: as many leaves are under way as there are threads."""
        leaves = {kind: len(self.named[kind]) * n.leaves for kind, n in needs.items()}
        held = [n.room.held for kind, n in needs.items() for _ in range(min(self.threads, leaves[kind]))]
        buffers = self.threads * max(n.room.buffer for n in needs.values())
        kernels = sum(heapq.nlargest(self.threads, held)) + buffers + temporaries.RECORD * sum(leaves.values())
        densified = sum(len(names) * needs[kind].densified for kind, names in self.named.items())
        return densified + max(kernels, *(n.definition for n in needs.values()))

    def _released(self, needs: Mapping[_Kind, _Needs]) -> tuple[int, int]:
        """The largest gradient, and the most while one parameter is stepped."""
        each = needs.values()
        rooms = [
            min(self.threads, n.leaves) * n.room.held + self.threads * n.room.buffer + n.leaves * temporaries.RECORD
            for n in each
        ]
        return max(n.gradient for n in each), max(*rooms, *(n.definition + n.densified for n in each))

    def _adamw(self, setting: Setting) -> Estimate:
        """torch's AdamW with fused=True, which takes no temporaries."""
        if any(kind.is_sparse for kind in self.named):
            raise TypeError("torch's AdamW takes dense gradients")
        in_float32 = setting.hyperparameters.get("weights", "float32") == "float32"
        trained = [t._replace(dtype="float32") if in_float32 else t for t in self.tensors if t.role == "trained"]
        gradients = sum(t.size for t in trained)
        others = sum(t.size for t in self.tensors if t.role != "trained")
        state = 2 * gradients + _ADAMW_STEP * self.trained
        return Estimate(setting, False, False, self.parameters, gradients + others, gradients, state, 0)


def _like(shape: Shape, dtype: str) -> SimpleNamespace:
    """A parameter of this shape, as a rule sees it."""
    return SimpleNamespace(shape=shape, ndim=len(shape), dtype=dtype)


def state_bytes(chain: Chain, shape: Shape, dtype: str) -> int:
    """The bytes of the arrays that a parameter's state is stored in."""
    return sum(size_of(array.shape(shape), array.dtype) for array in chain.arrays(shape, dtype).values())
