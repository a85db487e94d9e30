"""From a chain to its graph: the rules are called once, with values of a graph instead of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from typing import Any

import numpy as np

from fusedbun import metrics
from fusedbun.chain import Chain, step
from fusedbun.compiler.graph import Graph, UnschedulableError, Value
from fusedbun.operations import FUNCTIONS, OPERATIONS, Operation
from fusedbun.storage import codes
from fusedbun.storage.codes import Stored
from fusedbun.storage.rounding import PARAM, Rounding, to_nearest_bfloat16
from fusedbun.storage.storage import Storage
from fusedbun.transform import Namespace

GRAD, LR, UPDATE = "grad", "lr", "update"
# The names of hyper-parameters beside those of a chain: where the noise of an array begins, and of a shard, along an
# axis, the size of the whole parameter and the place of the first element, and of a slice, its place in the stack.
START = ".start"
SIZE, FIRST, PLACE = "size.{}", "first.{}", "place.{}"


@dataclass(frozen=True)
class Program:
    """The graph of one step of a chain, for parameters of some number of axes."""

    graph: Graph
    dtype: str  # the parameters'
    arrays: Mapping[str, Stored]  # the state's, by `<transformation>.<slot>` and what its code appends
    outputs: Mapping[str, Value]  # what is written, by name: the parameter and the arrays that change

    @cached_property
    def scalars(self) -> tuple[Value, ...]:
        """The numbers made of hyper-parameters that the rest is computed with, in the order of the graph."""
        found = {a for v in used(self.outputs.values()) if v.span for a in v.args if not a.span and a.op != "const"}
        return tuple(sorted(found, key=lambda v: v.number))

    def __str__(self) -> str:
        """The values that are used, one on each line, and what is written."""
        needed = set(used(self.outputs.values()))
        lines = [f"{v!s:44} {v.span.name}" for v in self.graph.values if v in needed]
        return "\n".join([*lines, *(f"{name} <- %{v.number}" for name, v in self.outputs.items())])


def trace(
    chain: Chain,
    ndim: int,
    order: tuple[int, ...] | None = None,
    maximize: bool = False,
    dtype: str = "float32",
    measures: bool = False,
    as_update: bool = False,
) -> Program:
    """Traces one step of a chain.

    A hyper-parameter that is a float other than 0 is an input, so that the program serves any value of it. Everything
    else is part of the program: that a number is 0, for a rule may then leave a slot out, and what chooses code.

    Args:
        chain: the chain for one parameter; it holds no rules (`Chain.at`).
        ndim: the parameter's number of axes; one of none is traced as one of one element.
        order: its axes from the slowest in memory to the fastest; None: as they are.
        maximize: climb instead of descend.
        dtype: the parameter's dtype.
        measures: the step also computes the inner products of its metrics (`fusedbun.metrics`), which go to arrays of
            one number, called as `product_of` says.
        as_update: leave the parameter as it is, and write what is to be added to it to an array called `UPDATE`.

    Raises:
        UnschedulableError: the chain has no schedule; the message says why.
    """
    graph = Graph(max(1, ndim), order)
    like = np.empty((0,) * graph.ndim)
    slots, arrays = chain.slots(like.shape), chain.arrays(like.shape, dtype)
    if dtype == "float64" and any(codes.code_of(slot, dtype).is_noisy for slot in slots.values()):
        raise UnschedulableError("noise and codes are computed in float32, but a float64 parameter is not")
    if as_update and dtype == "float16":
        raise UnschedulableError("float16 is rounded when it is stored, but its updates are found by rounding")
    inputs = {name: graph.input(name, graph.every) for name in (PARAM, GRAD)}
    inputs |= {key: graph.input(key, x.axes, x.is_whole, x.part) for key, x in arrays.items()}
    stored = {name: Symbol(graph, value) for name, value in inputs.items()}
    param, grad = stored.pop(PARAM), stored.pop(GRAD)
    lr = Symbol(graph, graph.hyperparameter(LR))
    changing = [name for name, x in chain.hyperparameters().items() if is_input(x)]
    symbolic = chain.with_hyperparameters(**{name: Symbol(graph, graph.hyperparameter(name)) for name in changing})
    storage = Storage(Symbolic(graph, bool(ndim)), _Starts(graph, chain.rounding), like, dtype)
    ascended = Symbol(graph, graph.apply("neg", grad.value)) if maximize else grad
    measured: Mapping[tuple[str, str], Any] = {}
    try:
        new_param, new = step(symbolic, storage, lr, param, ascended, stored, as_update)
        if measures:
            measured = _measured(symbolic, storage, param, new_param, grad, new)
    except (TypeError, AttributeError) as error:
        raise UnschedulableError(f"a rule does to an array what the compiler does not know: {error}") from error
    outputs = {PARAM: new_param.value, **{key: new[key].value for key in arrays}}
    outputs = {name: value for name, value in outputs.items() if value is not inputs[name]}
    if as_update:
        outputs[UPDATE] = outputs.pop(PARAM)
        arrays[UPDATE] = Stored(chain.rounding.of_updates(dtype), tuple(graph.every))
    for name, value in outputs.items():
        if value.axes != (graph.every if name == UPDATE else inputs[name].axes):
            raise UnschedulableError(f"the new {name} does not have the axes that it is declared with")
    outputs |= {product_of(*pair): x.value for pair, x in measured.items()}
    arrays |= {product_of(*pair): Stored(codes.computed_in(dtype), ()) for pair in measured}
    return Program(graph, dtype, arrays, outputs)


def product_of(a: str, b: str) -> str:
    """The name of the array with the inner product of two vectors of a step."""
    return f"product.{a}.{b}"


def _measured(
    chain: Chain, storage: Storage, before: Symbol, param: Symbol, grad: Symbol, state: Mapping[str, Symbol]
) -> Mapping[tuple[str, str], Any]:
    """The inner products of what a step did, as it is stored."""
    if storage.dtype == "float16":
        raise UnschedulableError("float16 is rounded when it is stored, after a kernel has measured")
    if storage.dtype == "bfloat16" and not storage.rounding.stochastic:
        param = to_nearest_bfloat16(storage.xp, param)
    vectors = {"param": param, "update": before - param, "grad": grad}  # type: ignore[operator]  # from the table
    for key, slot in metrics.moments(chain.slots(storage.like.shape)).items():
        vectors["moment"] = storage.decode(key, slot, state)
    return metrics.inner_products(storage.xp, vectors)


def hyperparameters(program: Program, chain: Chain, lr: Any) -> dict[str, Any]:
    """The values of a traced program's hyper-parameters, for this chain."""
    noise = [v.detail for v in program.scalars if v.is_word and v.detail.endswith(START)]
    starts = {name: chain.rounding.start(name.removesuffix(START)) for name in noise}
    places = {PLACE.format(axis): at for axis, at in enumerate(chain.rounding.place)}
    return {LR: lr, **starts, **places, **{name: x for name, x in chain.hyperparameters().items() if is_input(x)}}


def evaluate(scalars: tuple[Value, ...], hyperparameters: Mapping[str, Any], xp: Namespace | None = None) -> list[Any]:
    """The values of `Program.scalars`, made of these values of hyper-parameters.

    Where some of them may be arrays, `xp` computes with those; with numbers Python does.
    """
    known: dict[Value, Any] = {}
    for v in used(scalars):
        if not v.args:
            known[v] = v.detail if v.op == "const" else hyperparameters[v.detail]
            continue
        args = [known[a] for a in v.args]
        if xp is None or OPERATIONS[v.op].method or all(isinstance(x, Real) for x in args):
            known[v] = OPERATIONS[v.op].host(*args)
        else:
            known[v] = getattr(xp, v.op)(*args)
    return [known[v] for v in scalars]


def used(
    goals: Iterable[Value],
    belongs: Callable[[Value], bool] = lambda v: True,
    is_end: Callable[[Value], bool] = lambda v: False,
) -> list[Value]:
    """The values that these are made of, themselves among them, each after its own operands.

    Args:
        goals: the values.
        belongs: whether a value is one of them; what only others are made of is left out with them.
        is_end: whether what a value is made of is left out, though it is not.
    """
    found: dict[Value, None] = {}

    def visit(v: Value) -> None:
        if v not in found and belongs(v):
            for a in () if is_end(v) else v.args:
                visit(a)
            found[v] = None

    for v in goals:
        visit(v)
    return list(found)


@dataclass(frozen=True)
class _Starts:
    """The rounding of a step that is traced: where noise begins is a number that is given with every step.

    So is the place of a slice in its stack.
    """

    graph: Graph
    rounding: Rounding

    @property
    def stochastic(self) -> bool:
        return self.rounding.stochastic

    @property
    def place(self) -> list[Symbol]:
        axes = range(len(self.rounding.place))
        return [Symbol(self.graph, self.graph.hyperparameter(PLACE.format(axis), is_word=True)) for axis in axes]

    def start(self, key: str) -> Symbol:
        return Symbol(self.graph, self.graph.hyperparameter(f"{key}{START}", is_word=True))


class Symbol:
    """What a rule sees in the place of an array: arithmetic on it adds to the graph."""

    def __init__(self, graph: Graph, value: Value) -> None:
        self.graph, self.value = graph, value
        self.ndim = graph.ndim if value.span else 0

    @property
    def shape(self) -> tuple[Symbol, ...]:
        return tuple(Symbol(self.graph, self.graph.count([axis])) for axis in range(self.ndim))

    def __bool__(self) -> bool:
        raise UnschedulableError("a rule branches on an array's value")


class Symbolic:
    """The namespace (`fusedbun.transform.Namespace`, `fusedbun.storage.codes.Storing`) whose arrays are symbols."""

    def __init__(self, graph: Graph, has_axes: bool = True) -> None:
        self._graph = graph
        self._has_axes = has_axes  # whether the parameter has any; one of none is traced as one of one element

    def astype(self, x: Symbol, dtype: Any) -> Symbol:
        """In the precision that is computed in, which numbers are in already."""
        return _apply("real", x) if x.value.is_word else x

    def whole(self, x: Symbol) -> Symbol:
        return x if x.value.is_word else _apply("whole", x)

    def index(self, like: Symbol, axes: Any) -> list[Symbol]:
        return [Symbol(self._graph, self._graph.index(axis)) for axis in axes] if self._has_axes else []

    def block_max(self, words: Symbol) -> Symbol:
        return Symbol(words.graph, words.graph.block_max(words.value))

    def _unchanged(self, x: Symbol, *_: Any) -> Symbol:
        """Symbols have no shape, and kernels pack words where they store them, and unpack where they load them."""
        return x

    single = to_blocks = from_blocks = pack = unpack = _unchanged

    def _reduce(self, function: str, x: Symbol, *, axis: tuple[int, ...], keepdims: bool) -> Symbol:
        if not isinstance(axis, tuple) or not keepdims:
            raise UnschedulableError("a rule reduces without a tuple of axes, or without keepdims=True")
        graph, over = self._graph, x.value.axes & {i % self._graph.ndim for i in axis}
        if function == "mean" and over:
            return Symbol(graph, graph.apply("div", graph.reduce("sum", x.value, over), graph.count(over)))
        return Symbol(graph, graph.reduce(function, x.value, over))

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return partial(_apply, name)
        if name in ("mean", "sum", "max", "min"):
            return partial(self._reduce, name)
        raise UnschedulableError(f"a rule uses xp.{name}, which the compiler does not know")


def _apply(op: str, *operands: Any) -> Symbol:
    graph = next(x.graph for x in operands if isinstance(x, Symbol))
    return Symbol(graph, graph.apply(op, *(x.value if isinstance(x, Symbol) else x for x in operands)))


def _define_operator(operation: Operation) -> None:
    setattr(Symbol, f"__{operation.method}__", lambda *operands: _apply(operation.name, *operands))
    if operation.sign and operation.gives == "same":  # Python turns comparisons round by itself
        setattr(Symbol, f"__r{operation.method}__", lambda x, other: _apply(operation.name, other, x))


for operation in OPERATIONS.values():
    if operation.method:
        _define_operator(operation)


def is_input(value: Any) -> bool:
    """Whether a hyper-parameter is a number that may change from step to step."""
    is_array = getattr(value, "shape", None) == () and hasattr(value, "dtype")
    return is_array or (isinstance(value, float) and value != 0)
