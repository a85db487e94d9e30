"""The torch driver: runs any recipe as a `torch.optim.Optimizer`, parameter by parameter, with its state in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedbun import codes, derive
from fusedbun.chain import Chain, own
from fusedbun.hyper import NonNegative, check, plain
from fusedbun.metrics import Products, measured
from fusedbun.optim import loading, metrics, sparse
from fusedbun.optim import namespace as xp
from fusedbun.optim.checks import check_gradient, check_parameter, check_state, name_of, path_of, warn_user
from fusedbun.optim.state import State, compute_dtype, follow
from fusedbun.recipes import Recipe
from fusedbun.transform import Signal, Transform

# A group's first learning rate has a key of its own: OneCycleLR puts another number under `initial_lr`, and CyclicLR
# takes one that it finds there for its own.
FIRST_LR = "first_lr"


class Leaf(NamedTuple):
    """A parameter about to be stepped, and what it is stepped with; its state by `<transformation>.<slot>`."""

    chain: Chain
    lr: float | Tensor
    maximize: bool
    param: Tensor
    grad: Tensor
    state: State


class TransformOptimizer(torch.optim.Optimizer):
    """Steps parameters with the chain that a recipe makes from the hyper-parameters of their param group.

    The param groups hold the recipe's arguments under their own names, beside `lr` and `maximize`; they may be
    changed between steps, by a scheduler or by hand. State is float32 (float64 for float64 parameters), is made when
    a parameter first has a gradient, and follows a change of hyper-parameters: a slot that comes into being starts at
    zero, one that goes is freed. Everything is checked before anything is changed.

    Args:
        params: parameters, named parameters, or param groups, as for every torch optimizer.
        lr: the learning rate, in [0, inf); a float or a tensor of one element.
        recipe: makes the chain from hyper-parameters given by name; where it wants the initial learning rate, a group
            keeps that as `first_lr`.
        hyperparameters: their values for groups that do not give their own.
        maximize: climb instead of descend.
    """

    densifies_sparse_gradients = False
    metric_functions = metrics.FUNCTIONS
    record_metrics = False  # set to True, each step records what `report_per_parameter_metrics` reports
    _saved: loading.Saved | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        recipe: Recipe,
        hyperparameters: Mapping[str, Any],
        *,
        maximize: bool = False,
    ) -> None:
        self.recipe = recipe
        self._products: dict[Tensor, Products] = {}
        self._warned: set[str] = set()
        self._hyperparameters = tuple(hyperparameters)
        defaults = {"lr": lr, **hyperparameters, "maximize": maximize}
        self.chain(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; one that is not valid is refused and leaves the optimizer as it was."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            chain = self.chain(group)
            if self.recipe.wants_initial_lr:
                group.setdefault(FIRST_LR, float(group.get("initial_lr", group["lr"])))
            for index, param in enumerate(group["params"]):
                self._check_parameter(name_of(group, len(self.param_groups) - 1, index), param)
                chain.at(path_of(group, index), param).slots(tuple(param.shape))
        except Exception:
            self.param_groups.pop()
            raise
        if notice := self.recipe.notice(group):
            self._warn_once(notice)

    def _check_parameter(self, name: str, param: Tensor) -> None:
        """Raises a TypeError or ValueError for a parameter that cannot be stepped."""
        check_parameter(type(self).__name__, name, param)

    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups, as for every torch optimizer.

        A rule among the hyper-parameters is code, and is left out; the optimizer that loads the dict keeps its own.
        """
        # The first of the post-hooks, so that the others see the dict as it is returned.
        hook = self.register_state_dict_post_hook(loading.without_rules, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, each state tensor in the dtype its slot declares.

        Raises a ValueError that says what does not fit, before anything is changed.
        """
        # The last of the pre-hooks sees the dict that torch will load.
        hook = self.register_load_state_dict_pre_hook(self._keep_saved)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._saved = None

    def _keep_saved(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = loading.with_rules(self, state_dict)
        self._saved = loading.saved_state(self, state_dict)
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        kept = ("recipe", "record_metrics", "_hyperparameters", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._products = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if self._saved is not None:  # called by load_state_dict, before its post-hooks
            loading.restore(self, self._saved)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss; it is called once, with gradients enabled.

        Returns:
            The closure's loss, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for leaf in self._prepare(torch.compiler.is_compiling()):
            step_leaf(leaf)
        return loss

    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Adds what the last step did to a parameter, if `record_metrics` was set for it.

            l2_norm/{param, update, grad, moment}/<name>, cosine/{update_grad, moment_grad}/<name>

        `update` is the parameter before the step less the one after it, `moment` the one after the step (none where
        the optimizer keeps none); a cosine with a zero vector is 0. Of a sharded parameter these are the shard's.

        Args:
            param: the parameter.
            name: its name in the keys.
            optimizer_metrics: what is added to, and returned.
        """
        if param in self._products:
            optimizer_metrics |= measured(self.metric_functions, self._products[param], name)
        return optimizer_metrics

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Reported metrics as what can be summed over processes: squared norms, and inner products for cosines."""
        return metrics.to_products(optimizer_metrics)

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics of whole parameters, from what `pre_reduce_metrics` gave on each process for its shards.

        Every process must call it, with the same keys in the same order.
        """
        return metrics.from_products(optimizer_metrics)

    def chain(self, group: Mapping[str, Any]) -> Chain:
        """The chain that steps a param group; raises a TypeError or ValueError where a hyper-parameter is not valid."""
        lr, owner = group["lr"], type(self).__name__
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{owner}: a tensor lr must have one element, but it has shape {tuple(lr.shape)}")
        if not isinstance(lr, Tensor) or lr.device.type == "cpu":  # reading it elsewhere would wait for the device
            check(owner, {"lr": NonNegative}, {"lr": lr.item() if isinstance(lr, Tensor) else lr})
        if self.recipe.fixed_lr and (isinstance(lr, Tensor) or lr != self.recipe.lr):
            raise ValueError(f"{owner}: lr is fixed at {self.recipe.lr:g}, but it is {lr!r}; leave out the scheduler")
        check(owner, {"maximize": bool}, {"maximize": group["maximize"]})
        given = {name: group[name] for name in self._hyperparameters}
        if self.recipe.wants_initial_lr:
            given[derive.INITIAL_LR] = float(group.get(FIRST_LR, lr))
        return self.recipe.make(**given)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepare(self, compiling: bool) -> list[Leaf]:
        """Checks every group and gradient, then brings the state of the parameters to be stepped up to date.

        A compiled step gets its learning rates as tensors, for a graph specialises on a Python float, and finds 0-d
        parameters stepped: torch 2.13 drops in-place changes of 0-d float64 tensors in code compiled for the CPU.
        """
        self._products = {}
        found = []
        without: dict[str, None] = {}
        for g, group in enumerate(self.param_groups):
            chain, lr = self.chain(group), learning_rate(group["lr"], compiling)
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    name = name_of(group, g, i)
                    check_gradient(type(self).__name__, name, param)
                    here, grad = self._for_layout(chain.at(path_of(group, i), param), name, param.grad)
                    slots = here.slots(tuple(param.shape))
                    check_state(here, name, param, self.state.get(param, {}), slots)
                    found.append((Leaf(here, lr, group["maximize"], param, grad, {}), slots))
                    if grad.is_sparse:
                        without |= dict.fromkeys(sparse.left_out(chain))
        if without:
            self._warn_once(
                f"{', '.join(without)} is left out for parameters with sparse gradients, for it would go on in rows "
                f"that no gradient touches"
            )
        leaves = [leaf._replace(state=follow(self.state[leaf.param], leaf.param, slots)) for leaf, slots in found]
        if self.record_metrics:
            self._products = {leaf.param: step_recorded(leaf) for leaf in leaves}
            return []
        if not compiling:
            return leaves
        for leaf in leaves:
            if not compilable(leaf):
                step_leaf(leaf)
        return [leaf for leaf in leaves if compilable(leaf)]

    def _for_layout(self, chain: Chain, name: str, grad: Tensor) -> tuple[Chain, Tensor]:
        """The chain and the gradient, where that is sparse, as this optimizer takes it."""
        if not grad.is_sparse:
            return chain, grad
        if self.densifies_sparse_gradients:
            return chain, grad.to_dense()
        return sparse.rows_chain(chain, name, grad, type(self).__name__), grad

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn_user(f"{type(self).__name__}: {message}")


def learning_rate(lr: Any, compiling: bool) -> float | Tensor:
    """The learning rate as a step takes it: a tensor of one element loses its axes, to broadcast to any shape."""
    if isinstance(lr, Tensor):
        return lr.reshape(())
    number: float = plain(lr)
    return torch.tensor(number, dtype=torch.float64) if compiling else number


def compilable(leaf: Leaf) -> bool:
    """Whether the leaf may be stepped in compiled code."""
    return bool(leaf.param.ndim) and not leaf.grad.is_sparse


def step_recorded(leaf: Leaf) -> Products:
    """One step of one parameter, with the inner products of its metrics."""
    before = leaf.param.clone()
    step_leaf(leaf)
    return metrics.record(before, leaf.param, leaf.grad, leaf.state)


def step_leaf(leaf: Leaf) -> None:
    """One step of one parameter: computed in `compute_dtype`, rounded once when the parameter is written.

    Where the gradient is sparse the rows that it touches are stepped as a parameter of their own.
    """
    chain, lr, maximize, param, grad, state = leaf
    if not param.numel():
        return
    if grad.is_sparse:
        rows, values = sparse.touched(grad)
        part = Leaf(chain, lr, maximize, param[rows], values, {key: stored[rows] for key, stored in state.items()})
        step_leaf(part)
        for whole, new in ((param, part.param), *((state[key], part.state[key]) for key in state)):
            whole.index_copy_(0, rows, new)
        return
    dtype = compute_dtype(param.dtype)
    p, g = param.to(dtype), grad.to(dtype)
    signal = Signal(-g if maximize else g)
    for transform in chain:
        signal = advance(transform, signal, state, p)
    p -= lr * signal.update
    if p is not param:
        param.copy_(p)


def advance(transform: Transform, signal: Signal, state: State, p: Tensor) -> Signal:
    """Runs one transformation and commits its state in place, so that the new state's memory is free on return."""
    slots, stored = transform.slots(tuple(p.shape)), own(transform, state)
    before = {name: codes.decode(xp, slot, stored[name], p.dtype) for name, slot in slots.items()}
    signal, after = transform.update(xp, signal, before, p)
    for name, slot in slots.items():
        stored[name].copy_(codes.encode(xp, slot, after[name], stored[name].dtype))
    return signal
