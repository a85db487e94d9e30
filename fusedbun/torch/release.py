"""Gradient release: parameters are stepped in the backward pass, so that gradients are never in memory together."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache, wraps
from typing import Annotated, Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import clip_grad

from fusedbun.hyper import Positive, Whole, check
from fusedbun.metrics import Products
from fusedbun.torch.definition import touched_rows
from fusedbun.torch.dispatch import Stepper
from fusedbun.torch.driver import TransformOptimizer
from fusedbun.torch.leaf import Group, Place, read_group, read_groups

OWNER = "release_gradients"
ARGUMENTS = {"accumulate": Annotated[int, Whole(1)], "clip_norm": Positive | None}
# What reduces gradients over processes after they are complete, by the module that is loaded where there is one.
SPREAD = {
    "torch.nn.parallel": "DistributedDataParallel",
    "torch.distributed.fsdp": "FullyShardedDataParallel",
    "torch.distributed.tensor": "DTensor",
}
_ATTACHED: WeakSet[GradientRelease] = WeakSet()


def release_gradients(
    model: nn.Module, optimizer: TransformOptimizer, *, accumulate: int = 1, clip_norm: float | None = None
) -> GradientRelease:
    """Steps each parameter in the backward pass, as soon as its gradient is complete, and frees the gradient.

        loss.backward()    # each parameter in turn: g = p.grad, p = p - lr*u(g), p.grad = None
        optimizer.step()   # ends the step: what has a gradient still is stepped
        scheduler.step()

    The numbers are those of the ordinary step, to the last bit. Gradients never take more memory than the largest
    parameter's; of a parameter that is used twice (tied weights) autograd adds up two before it is stepped.

    `optimizer.step()` is called once after the backward passes of a step, as always. It steps what nothing else has
    stepped: the optimizer's parameters that are not in the model, or did not require a gradient or had no shape when
    the release began, and those that fewer than `accumulate` passes reached. Until then a second gradient of a
    parameter that has been stepped is refused. `zero_grad` is not needed. The learning rate and all hyper-parameters
    are read when a parameter is stepped; hooks on the optimizer's step run in `optimizer.step()`. Parameters of the
    model that the optimizer does not step keep their gradients.

    Every backward pass steps what it reaches: freeze a network that another one is trained through with
    `requires_grad_(False)`, and look at gradients with `torch.autograd.grad`, which steps nothing, or in hooks that the
    parameters had before.

    `accumulate=k` adds up the gradients of k backward passes in `p.grad`, and steps each parameter in the k-th. This
    keeps all gradients, each of its parameter's size and dtype, from the first pass to the k-th, as without release;
    the k-th frees them one by one. Nothing else is kept, and the step is that of the ordinary accumulation, to the last
    bit. After fewer passes, at the end of the data, `optimizer.step()` steps with what there is.

    `clip_norm=c` scales the gradient of each parameter by itself, before it is stepped, to a norm of c at most:

        g = g * min(1, c / (norm(g) + 1e-6))

    as `torch.nn.utils.clip_grad_norm_([p], c)` does: a norm that is NaN makes all of g NaN; an infinite one makes g 0,
    and NaN where it was infinite. A gradient that is scaled is in memory twice for a moment. The norm of all gradients
    together is known only when all of them are: `clip_grad_norm_` of parameters under release raises a RuntimeError.

    torch.compile of a step is for all parameters together. Where the ordinary step is compiled (on a GPU, unless
    `implementation` says otherwise) this one is run by tiles, which may round the last bit differently. A model that
    is compiled gives all its gradients at once: they are in memory together until each has been used. Activation
    checkpointing needs `use_reentrant=False`.

    >>> import fusedbun, torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = fusedbun.SM3(model.parameters(), lr=0.1)
    >>> with fusedbun.release_gradients(model, optimizer, clip_norm=1.0):
    ...     model(torch.ones(4, 3)).sum().backward()
    ...     print(model.weight.grad)
    ...     optimizer.step()
    None

    Args:
        model: the module.
        optimizer: one of this package's optimizers, which steps parameters of the module.
        accumulate: how many backward passes make a step, from 1 up.
        clip_norm: the largest norm of a single parameter's gradient, in (0, inf); None: no clipping.

    Returns:
        A handle; its `remove()`, or leaving it as a context manager, brings the ordinary step back.

    Raises:
        TypeError: the optimizer is not this package's, or the model is spread over processes (DistributedDataParallel,
            FSDP, DTensor), which reduce gradients when they are complete.
        ValueError: an argument is out of range, the optimizer steps no parameter of the model that needs a gradient, or
            it has implementation="compiled".
        RuntimeError: the optimizer or a parameter is under gradient release already.
    """
    check(OWNER, ARGUMENTS, {"accumulate": accumulate, "clip_norm": clip_norm})
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OWNER}: model must be a torch.nn.Module, but it is {model!r} ({type(model).__name__})")
    if not isinstance(optimizer, TransformOptimizer):
        raise TypeError(
            f"{OWNER}: optimizer must be one of fusedbun's, such as fusedbun.SM3, but it is a "
            f"{type(optimizer).__name__}, which cannot step one parameter at a time"
        )
    if optimizer.implementation == "compiled":
        raise ValueError(
            f"{OWNER}: the {type(optimizer).__name__} has implementation='compiled', which compiles the step of all "
            f"parameters together; leave implementation out, or take 'kernel', 'tiles' or 'definition'"
        )
    kinds = tuple(getattr(sys.modules[home], kind) for home, kind in SPREAD.items() if home in sys.modules)
    for name, part in (*model.named_modules(), *model.named_parameters()):
        if isinstance(part, kinds):
            raise TypeError(
                f"{OWNER}: {repr(name) if name else 'the model'} is a {type(part).__name__}, whose gradients are "
                f"reduced over processes after they are complete: a release would step with this process's before. "
                f"Step it without release, or release the plain module, with parameters that average their gradients "
                f"over the processes in hooks of their own (Tensor.register_hook), which run before the release's"
            )
    places = _places(optimizer)
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad and not is_lazy(p))
    names: dict[Tensor, str] = {p: name for name, p in trained if p in places}
    if not names:
        raise ValueError(
            f"{OWNER}: the optimizer steps none of the model's {len(list(model.parameters()))} parameters that need a "
            f"gradient; make it of this model's parameters()"
        )
    advice = "call remove() on the handle of the first release before the second"
    if optimizer.gradient_release is not None:
        raise RuntimeError(f"{OWNER}: this {type(optimizer).__name__} is under gradient release already; {advice}")
    for param, name in names.items():
        if _is_released(param):
            raise RuntimeError(f"{OWNER}: {name!r} is under gradient release by another optimizer already; {advice}")
    _refuse_clipping_by_global_norm()
    released = {p: _Released(name, places[p]) for p, name in names.items()}
    return GradientRelease(optimizer, released, accumulate, clip_norm)


@dataclass(eq=False)
class _Released:
    """A parameter that is stepped in the backward pass."""

    name: str  # in the model
    place: Place  # among the optimizer's param groups
    stepper: Stepper | None = None  # None before its first step, and where what it has kept is out of date
    passes: int = 0  # how many backward passes of this step have reached it


class GradientRelease:
    """Gradient release at work, as `release_gradients` returns it; a context manager that ends with `remove`.

    It ends with its optimizer too; gradients are kept then, and nothing is stepped.
    """

    def __init__(
        self, optimizer: TransformOptimizer, released: dict[Tensor, _Released], accumulate: int, clip_norm: float | None
    ) -> None:
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self._released = released
        self._groups: list[Group] = []
        self._products: dict[Tensor, Products] = {}
        # Weak references, both: Python does not find cycles that lead through a hook, and would never free them.
        self._optimizer, reference = ref(optimizer), ref(self)

        def hook(param: Tensor) -> None:
            if (release := reference()) is not None:
                release.complete(param)

        register: Any = Tensor.register_post_accumulate_grad_hook
        self._hooks = [register(param, hook) for param in released]
        optimizer.gradient_release = self
        _ATTACHED.add(self)

    def remove(self) -> None:
        """Brings the ordinary step back, which finds the gradients that have not been used; twice is as once."""
        for hook in self._hooks:
            hook.remove()
        self._released, self._hooks, self._products = {}, [], {}
        self.forget()
        _ATTACHED.discard(self)
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.gradient_release is self:
            optimizer.gradient_release = None

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __contains__(self, param: Tensor) -> bool:
        """Whether a parameter is stepped in the backward pass."""
        return self._optimizer() is not None and param in self._released

    def finish(self) -> dict[Tensor, Products]:
        """Ends a step, as `optimizer.step()` does first of all: what is left of these parameters' gradients is used.

        Returns what was recorded of these parameters in this step.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        attributes = vars(optimizer)
        if "grad_scale" in attributes:  # torch's GradScaler, which makes the step, says so by attributes
            del attributes["grad_scale"], attributes["found_inf"]
            raise RuntimeError(
                "gradient release: GradScaler cannot be used with it, for the parameters have been stepped in the "
                "backward pass, with scaled gradients that it could neither unscale nor check; begin again without "
                "it, in bfloat16, which needs no scaler, or call remove() on the release's handle"
            )
        for param, released in self._released.items():
            if param.grad is not None:
                self._step(optimizer, param, released)
        for released in self._released.values():
            released.passes = 0
        products, self._products = self._products, {}
        return products

    def forget(self) -> None:
        """Lets go of the state that parameters were stepped with, for it has been replaced."""
        self._groups = []
        for released in self._released.values():
            released.stepper = None

    def complete(self, param: Tensor) -> None:
        """Takes up a parameter's gradient, which a backward pass has just completed."""
        optimizer, released = self._optimizer(), self._released[param]
        if optimizer is None:
            return
        if released.passes == self.accumulate:
            param.grad = None
            raise RuntimeError(
                f"gradient release: {released.name!r} gets another gradient after it has been stepped, which is done "
                f"in backward pass {self.accumulate} of a step (accumulate={self.accumulate}); call optimizer.step() "
                f"once after a step's backward passes, also after one that failed, or give as accumulate how many they "
                f"are. Activation checkpointing with use_reentrant=True gives several gradients in one pass: use "
                f"use_reentrant=False. This gradient has been dropped, and no parameter has been stepped with it"
            )
        released.passes += 1
        if released.passes == self.accumulate:
            try:
                self._step(optimizer, param, released)
            except Exception as error:
                error.add_note(
                    f"This happened in the backward pass, when the gradient of {released.name!r} was complete: it has "
                    f"not been stepped and keeps its gradient, those whose gradients came before it have been stepped, "
                    f"and the others have none. To leave this step, call optimizer.zero_grad() and then "
                    f"optimizer.step()."
                )
                raise

    @torch.no_grad()
    def _step(self, optimizer: TransformOptimizer, param: Tensor, released: _Released) -> None:
        """Steps a parameter and frees its gradient."""
        self._find(optimizer, param, released)
        g, entries = released.place[0], optimizer.param_groups
        if len(self._groups) != len(entries):
            self._groups = read_groups(optimizer, self._groups)
        self._groups[g] = read_group(optimizer, entries[g], self._groups[g])
        if self.clip_norm is not None:
            assert param.grad is not None
            param.grad = clipped(param.grad, self.clip_norm)
        measures = bool(optimizer.record_metrics)
        if released.stepper is None or released.stepper.measures != measures:
            released.stepper = Stepper(released.place, measures)
        self._products |= released.stepper.step(optimizer, self._groups)
        param.grad = None

    def _find(self, optimizer: TransformOptimizer, param: Tensor, released: _Released) -> None:
        """Brings a parameter's place up to date, for param groups may have been taken away."""
        (g, i), groups = released.place, optimizer.param_groups
        if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is param:
            return
        places = _places(optimizer)
        if param not in places:
            raise RuntimeError(
                f"gradient release: {released.name!r} is no longer among the optimizer's parameters; end the release "
                f"with remove() and begin it again"
            )
        released.place, released.stepper, self._groups = places[param], None, []


def _places(optimizer: TransformOptimizer) -> dict[Tensor, Place]:
    return {p: (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}


def _is_released(param: Tensor) -> bool:
    return any(param in release for release in _ATTACHED)


def clipped(grad: Tensor, norm: float) -> Tensor:
    """A gradient, scaled to at most this norm; the same tensor where it is not scaled.

    It is never scaled in place, for another gradient that is still on its way may share its memory.
    """
    if grad.is_sparse:
        values = grad._values() * _scale(touched_rows(grad)[1], norm)
        return torch.sparse_coo_tensor(grad._indices(), values, grad.shape, check_invariants=False)
    scale = _scale(grad, norm)
    return grad if grad.is_cpu and float(scale) == 1 else grad * scale


def _scale(values: Tensor, norm: float) -> Tensor:
    return torch.clamp(norm / (torch.linalg.vector_norm(values) + 1e-6), max=1.0)


@cache
def _refuse_clipping_by_global_norm() -> None:
    """Has `torch.nn.utils.clip_grad_norm_` raise a RuntimeError for parameters under release.

    It would find no gradients, and do nothing. Whoever has imported it before calls this inner function of torch's.
    """
    scale_in_torch = getattr(clip_grad, "_clip_grads_with_norm_", None)
    if scale_in_torch is None:
        return

    @wraps(scale_in_torch)
    def scale(parameters: Any, *args: Any, **kwargs: Any) -> None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if any(map(_is_released, parameters)):
            raise RuntimeError(
                "gradient release: gradients cannot be clipped by their global norm, for each has been used and freed "
                "before the last is known; give release_gradients(..., clip_norm=...), which clips each parameter's "
                "gradient by itself, or call remove() on the release's handle"
            )
        scale_in_torch(parameters, *args, **kwargs)

    clip_grad._clip_grads_with_norm_ = scale
