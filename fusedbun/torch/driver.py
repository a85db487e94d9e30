"""The torch driver: runs any recipe as a `torch.optim.Optimizer`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedbun.chain import Chain, Stacked
from fusedbun.hyper import NonNegative, Whole, check, plain
from fusedbun.metrics import Products, measured
from fusedbun.recipe import INITIAL_LR, Recipe
from fusedbun.storage.rounding import Rounding
from fusedbun.torch import dispatch, loading, metrics
from fusedbun.torch.definition import step_leaves
from fusedbun.torch.dispatch import IMPLEMENTATIONS, Stepper
from fusedbun.torch.entries import Entries, check_keys
from fusedbun.torch.leaf import FLOATING, Arguments, chain_at, is_real, name_of, read_groups
from fusedbun.torch.sharding.placement import check_placement, is_sharded
from fusedbun.torch.state import arrays_of, filled, update_state

# A group's first learning rate has a key of its own: OneCycleLR puts another number under `initial_lr`, and CyclicLR
# takes one that it finds there for its own.
FIRST_LR = "first_lr"
_KEYS = {"params", "param_names", FIRST_LR}  # in a group, beside the defaults
# the driver's own, in a group
OPTIONS = {"maximize": bool, "stochastic_rounding": bool, "seed": Annotated[int, Whole()], "stacked": Stacked}


class TransformOptimizer(torch.optim.Optimizer):
    """Steps parameters with the chain that a recipe makes from the hyper-parameters of their param group.

    The param groups hold the recipe's arguments under their own names, beside `lr` and `maximize`; they may be
    changed between steps, by a scheduler or by hand. State is float32 (float64 for float64 parameters), is made when
    a parameter first has a gradient (of a DTensor at once), and follows a change of hyper-parameters: a slot that
    comes into being starts at zero, one that goes is freed. Everything is checked before anything is changed, but a
    parameter that does not require a gradient, or is no real floating-point one with a shape, when it first has one.

    Args:
        params: parameters, named parameters, or param groups, as for every torch optimizer.
        lr: the learning rate, in [0, inf); a float or a tensor of one element.
        recipe: makes the chain from hyper-parameters given by name; where it wants the initial learning rate, a group
            keeps that as `first_lr`.
        hyperparameters: their values for groups that do not give their own.
        maximize: climb instead of descend.
        stochastic_rounding: round bfloat16 parameters without a bias instead of to the nearest.
        seed: any integer; it decides the noise of all rounding.
        stacked: how many leading axes make a parameter a stack, each slice of which is stepped as a parameter of its
            own, or a rule `(path, param) -> number`.
        implementation: what steps the parameters (`fusedbun.torch.dispatch`); None: the best that there is.
    """

    densifies_sparse_gradients = False
    metric_functions = metrics.FUNCTIONS
    record_metrics = False  # set to True, each step records what `report_per_parameter_metrics` reports
    gradient_release: Any = None  # the `GradientRelease` that `fusedbun.release_gradients` has attached
    _saved: loading.Saved | None = None  # what is being loaded

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        recipe: Recipe,
        hyperparameters: Mapping[str, Any],
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        stacked: Stacked = 0,
        implementation: str | None = None,
    ) -> None:
        if implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"{type(self).__name__}: implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, or "
                f"None for the best that there is, but it is {implementation!r}"
            )
        self.recipe = recipe
        self._implementation = implementation
        self._steppers = self._new_steppers()
        self._products: dict[Tensor, Products] = {}
        self._warned: set[str] = set()
        self._hyperparameters = tuple(hyperparameters)
        options = {"maximize": maximize, "stochastic_rounding": stochastic_rounding, "seed": seed, "stacked": stacked}
        defaults = self._entries({"lr": lr, **hyperparameters, **options})
        self.chain(defaults)
        super().__init__(params, defaults)

    @property
    def implementation(self) -> str | None:
        """What steps the parameters: one of `IMPLEMENTATIONS`, or None for the best that there is for each."""
        return self._implementation

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Has torch's GradScaler leave unscaling to `step`, which under gradient release refuses it."""
        return self.gradient_release is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; one that is not valid is refused and leaves the optimizer as it was."""
        super().add_param_group(self._entries(param_group) if isinstance(param_group, Mapping) else param_group)
        group, g = self.param_groups[-1], len(self.param_groups) - 1
        arrays = {}
        try:
            self.check_keys(group)
            chain = self.chain(group)
            if self.recipe.wants_initial_lr:
                group.setdefault(FIRST_LR, float(group.get("initial_lr", group["lr"])))
            for i, param in enumerate(group["params"]):
                if not (param.requires_grad and is_real(param)):
                    continue  # it may never have a gradient, and is judged when it has
                name = name_of(group, g, i)
                self.check_parameter(name, param)
                arrays[param] = arrays_of(chain_at(chain, self.param_groups, g, i), param)
                if is_sharded(param):
                    check_placement(type(self).__name__, name, param, arrays[param])
        except Exception:
            self.param_groups.pop()
            raise
        # torch.distributed.checkpoint makes a step before it reads state that is not there yet; so it is there.
        for param in filter(is_sharded, arrays):
            if not param.is_meta:
                update_state(self.state, param, arrays[param])
        if notice := self.recipe.notice(group):
            self.warn_once(notice)

    def check_parameter(self, name: str, param: Tensor) -> None:
        """Raises a TypeError or ValueError for a parameter that cannot be stepped."""
        if param.dtype not in FLOATING:
            raise TypeError(
                f"{name} is {param.dtype}, but {type(self).__name__} steps real floating-point parameters only "
                f"({', '.join(map(str, FLOATING))}); a complex one can be given as torch.view_as_real(param)"
            )

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

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Loads what `state_dict` returned.

        The optimizer keeps its own `stochastic_rounding` and dtypes of state, and takes all other hyper-parameters.
        Where parameters had names and have some now, state belongs to names, in whatever order they are, and a group's
        hyper-parameters go with its parameters; otherwise each takes what was saved in its place.

        Args:
            state_dict: the saved dict.
            convert: convert state that was stored in another dtype, and warn of it; otherwise it is an error.

        Raises a ValueError that says what does not fit, before anything is changed.
        """

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            saved = loading.in_place(self, saved)
            merged = loading.with_own_settings(self, saved, convert)
            self._saved = loading.saved_state(self, saved, merged, convert)
            for group in merged["param_groups"]:
                self.check_keys(group)
            return merged

        hook = self.register_load_state_dict_pre_hook(check)  # the last of them sees the dict that torch will load
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._saved = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("recipe", "record_metrics", "_implementation", "_hyperparameters", "_products", "_warned")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in kept if name in vars(self)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch sets for its own optimizers
        self._steppers, self._products = self._new_steppers(), state.get("_products", {})
        if self.gradient_release:
            self.gradient_release.forget()
        self.param_groups = [self._entries(group) for group in self.param_groups]
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for param, entries in (self._saved or {}).items():  # called by load_state_dict, before its post-hooks
            self.state[param] = {key: filled(stored, param, value) for key, (stored, value) in entries.items()}

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
        if torch.compiler.is_compiling():
            step_leaves(self._step_uncompiled())
        else:
            self._step()
        return loss

    def _step(self) -> None:
        products: dict[Tensor, Products] = self.gradient_release.finish() if self.gradient_release else {}
        stepper = self._steppers[bool(self.record_metrics)]
        self._products = products | stepper.step(self, read_groups(self, stepper.groups))

    @staticmethod
    def _new_steppers() -> dict[bool, Stepper]:
        """What steps the parameters, without metrics and with them."""
        return {measures: Stepper(measures=measures) for measures in (False, True)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def _step_uncompiled(self) -> list[Arguments]:
        """Steps what is not for code that the user compiles, and returns what is, as the definition takes it."""
        if self.record_metrics or not dispatch.is_for_the_compiler(self):
            self._step()
            return []
        self._products = self.gradient_release.finish() if self.gradient_release else {}
        return dispatch.step_uncompiled(self, read_groups(self, []))

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
        self.check_lr(group["lr"])
        check(type(self).__name__, OPTIONS, {name: group[name] for name in OPTIONS})
        arguments = {name: group[name] for name in self._hyperparameters}
        if self.recipe.wants_initial_lr:
            arguments[INITIAL_LR] = float(group.get(FIRST_LR, group["lr"]))
        rounding = Rounding(group["stochastic_rounding"], plain(group["seed"]))
        return replace(self.recipe.make(**arguments), rounding=rounding, stacked=plain(group["stacked"]))

    def _entries(self, entries: Mapping[str, Any]) -> Entries:
        """A param group, or the defaults, that can be asked by other names of the hyper-parameters."""
        return Entries(type(self).__name__, self.recipe.other_names, entries)

    def check_keys(self, group: Mapping[str, Any]) -> None:
        """Raises a TypeError for an entry of a param group that is none of the optimizer's, but taken for one."""
        if unknown := group.keys() - self.defaults.keys() - _KEYS:
            names = (*self.defaults, *self.recipe.other_names)
            check_keys(type(self).__name__, names, {key: group[key] for key in sorted(unknown)})

    def check_lr(self, lr: Any) -> None:
        """Raises a TypeError or ValueError for a learning rate that is not valid."""
        owner = type(self).__name__
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{owner}: a tensor lr must have one element, but it has shape {tuple(lr.shape)}")
        if not isinstance(lr, Tensor) or lr.device.type == "cpu":  # reading it elsewhere would wait for the device
            check(owner, {"lr": NonNegative}, {"lr": lr.item() if isinstance(lr, Tensor) else lr})
        if self.recipe.fixed_lr and (isinstance(lr, Tensor) or lr != self.recipe.lr):
            raise ValueError(f"{owner}: lr is fixed at {self.recipe.lr:g}, but it is {lr!r}; leave out the scheduler")

    def chain_arguments(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the chains of a group's parameters are made of, and how they are stepped, beside the learning rate."""
        first = (group.get(FIRST_LR, group["lr"]),) if self.recipe.wants_initial_lr else ()
        return (*first, *(group[name] for name in (*OPTIONS, *self._hyperparameters)))

    def warn_once(self, message: str) -> None:
        """Warns of something that is the same in every step, at the line that called into torch or this package."""
        if message in self._warned:
            return
        self._warned.add(message)
        frame, level = sys._getframe(), 1
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedbun", "torch"):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"{type(self).__name__}: {message}", stacklevel=level)
