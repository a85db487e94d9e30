"""One record for each class: its signature, inputs to try, inputs that are errors, what it takes; and tests of all.

torch does the like for its own optimizers (`torch.testing._internal.common_optimizers`). Points that hold whatever the
hyper-parameters are tested through `makers.MAKERS` in the other files.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from makers import SM3_CHAIN, assert_same, assert_same_run, copies, gradient, parameters, run, states, unchanged
from sweeps import sweep
from test_torch_ternary_vote import ternary
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

import fusedbun
from fusedbun import (
    SM3,
    ChainOptimizer,
    DecoupledLionW,
    Fusedbun,
    FusedbunW,
    FusionOptimizer,
    MupAdam,
    MupAdamW,
    MupSGD,
    ScaledOptum,
    SignSGD,
    TernaryVote,
)

SHAPES = ((), (5,), (4, 3))
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class OptimizerInfo:
    """What the tests need to know of a class.

    Args:
        make: the class, or a call of it that gives what it cannot do without.
        signature: its arguments, as Python writes them.
        inputs: hyper-parameters to try, each with the state that a matrix then has.
        errors: hyper-parameters that are refused, with what the message says of them.
        sparse: what becomes of a sparse gradient: its "rows" are stepped, it is made "dense", or it is "refused".
        params: makes parameters of given shapes that it can step.
        fixed: what a group may not change.
    """

    make: Callable[..., Any]
    signature: str
    inputs: list[tuple[dict[str, Any], str]]
    errors: list[tuple[dict[str, Any], type[Exception], str]]
    sparse: str = "refused"
    params: Callable[..., list[torch.Tensor]] = parameters
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type:
        return getattr(self.make, "func", self.make)

    def __call__(self, params: Any, **options: Any) -> Any:
        return self.make(params, **{**self.options, **options})


UNIT = r"must lie in \[0, 1\), but it is"
NUMBER = r"must lie in \[0, inf\), but it is"
BETAS = [
    ({"betas": (1.0, 0.9)}, ValueError, rf"betas\[0\] {UNIT} 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, rf"betas\[1\] {UNIT} -0.1"),
    ({"betas": (0.9, NAN)}, ValueError, rf"betas\[1\] {UNIT} nan"),
    ({"betas": 0.9}, TypeError, "betas must be a tuple of 2 numbers, but it is 0.9"),
    ({"betas": (0.9,)}, TypeError, "betas must be a tuple of 2 numbers"),
]
DECAY = [
    ({"weight_decay": -0.1}, ValueError, f"weight_decay {NUMBER} -0.1"),
    ({"weight_decay": INF}, ValueError, f"weight_decay {NUMBER} inf"),
    ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a number"),
]
MUP = [
    ({"independent_weight_decay": 1}, TypeError, "independent_weight_decay must be True or False, but it is 1"),
    ({"allow_non_unit_scaling_params": "yes"}, TypeError, "allow_non_unit_scaling_params must be True or False"),
    ({"mup": "weight"}, TypeError, "mup must be a mapping from names to types, a rule"),
    ({"mup": lambda path, param: "embedding"}, ValueError, "type of a parameter without a name .* it is 'embedding'"),
    ({"channel_axis": 0.5}, TypeError, "channel_axis must be an integer or a rule, but it is 0.5"),
    *DECAY,
]
ADAM = [*BETAS, ({"eps": -1.0}, ValueError, f"eps {NUMBER} -1.0"), ({"amsgrad": 1}, TypeError, "amsgrad must be True")]
OWN = "maximize=False, stochastic_rounding=False, seed=0, stacked=0, implementation=None"  # of every optimizer
MUP_SIGNATURE = "independent_weight_decay=True, allow_non_unit_scaling_params=False, mup=None, channel_axis=0"
ADAM_SIGNATURE = (
    f"params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, *, {MUP_SIGNATURE}, "
    f"momentum_dtype=None, second_moment_dtype=None, {OWN}"
)
ADAM_MOMENTS = "scale_by_adam.moment scale_by_adam.second_moment"
ADAM_STATE = f"{ADAM_MOMENTS} step"
ADAM_INPUTS: list[tuple[dict[str, Any], str]] = [
    ({}, ADAM_STATE),
    ({"weight_decay": 0.1}, ADAM_STATE),
    ({"weight_decay": 0.1, "independent_weight_decay": False}, ADAM_STATE),
    ({"amsgrad": True}, f"{ADAM_MOMENTS} scale_by_adam.largest step"),
    ({"betas": (0.0, 0.0), "eps": 0.1}, ADAM_STATE),
]
AXES = "sm3_accumulate.axis0 sm3_accumulate.axis1"
MOMENT = "momentum.moment"
TYPES = {"mup": lambda path, param: ("weight", 4) if param.ndim > 1 else "bias"}

INFOS = [
    OptimizerInfo(
        Fusedbun,
        "params, lr, eps=1e-08, beta_decay=0.8, Lambda=0.01, momentum_beta=0.9, centralize=False, use_rms=False, *, "
        f"nesterov=False, clip_rms=None, lagged=False, channel_axis=0, momentum_dtype=None, {OWN}",
        [
            ({}, f"{AXES} {MOMENT}"),
            ({"momentum_beta": 0.0}, AXES),
            ({"centralize": True, "use_rms": True, "nesterov": True}, f"{AXES} {MOMENT}"),
            ({"use_rms": True, "clip_rms": 0.5, "lagged": True, "Lambda": 0.0, "beta_decay": 0.5}, f"{AXES} {MOMENT}"),
        ],
        [({"beta_decay": 1.0}, ValueError, f"beta_decay {UNIT} 1.0")],  # the others: test_torch_errors.py
        options={"lr": 0.01},
    ),
    OptimizerInfo(
        FusedbunW,
        "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, *, nesterov=True, lagged=True, clip=10.0, "
        f"momentum_dtype='int8', channel_axis=0, {OWN}",
        [
            ({}, f"{AXES} {MOMENT} step"),
            ({"weight_decay": 0.1, "lagged": False}, f"{AXES} {MOMENT} step"),
            ({"betas": (0.0, 0.9), "clip": None}, f"{AXES} step"),
            ({"nesterov": False, "eps": 0.1}, f"{AXES} {MOMENT} step"),
        ],
        [
            *BETAS,
            *DECAY,
            ({"eps": -1.0}, ValueError, f"eps {NUMBER} -1.0"),
            ({"clip": 0.0}, ValueError, r"clip must lie in \(0, inf\) or None, but it is 0.0"),
            ({"lagged": 1}, TypeError, "lagged must be True or False"),
        ],
        options={"momentum_dtype": None},  # int8 rounds by noise of names and steps: test_torch_storage.py
    ),
    OptimizerInfo(
        SM3,
        f"params, lr=0.1, momentum=0.0, beta=0.0, eps=1e-30, *, statistic='max', momentum_dtype=None, {OWN}",
        [
            ({}, AXES),
            ({"beta": 0.9}, AXES),
            ({"momentum": 0.9}, f"{AXES} {MOMENT}"),
            ({"eps": 0.1}, AXES),
            ({"statistic": "mean", "beta": 0.9}, AXES),
        ],
        [
            ({"statistic": "median"}, ValueError, "statistic must be one of 'max', 'mean', but it is 'median'"),
            ({"momentum": 1.0}, ValueError, f"momentum {UNIT} 1.0"),
            ({"momentum": None}, TypeError, "momentum must be a number"),
            ({"beta": -0.5}, ValueError, f"beta {UNIT} -0.5"),
            ({"eps": NAN}, ValueError, f"eps {NUMBER} nan"),
        ],
        sparse="rows",
    ),
    OptimizerInfo(
        ScaledOptum,
        f"params, lr=0.01, weight_decay=0.0, *, {OWN}",
        [({}, ""), ({"weight_decay": 0.5}, "")],
        DECAY,
        sparse="dense",
    ),
    OptimizerInfo(
        TernaryVote,
        f"params, threshold=8, *, {OWN}",
        [({"threshold": 1}, "vote.votes"), ({"threshold": 2}, "vote.votes")],
        [({"threshold": 0}, ValueError, "threshold must be an integer"), ({"threshold": 2.5}, TypeError, "threshold")],
        params=ternary,
    ),
    OptimizerInfo(MupAdam, ADAM_SIGNATURE, ADAM_INPUTS, [*ADAM, *MUP], options=TYPES),
    OptimizerInfo(MupAdamW, ADAM_SIGNATURE, ADAM_INPUTS, [*ADAM, *MUP], options=TYPES),
    OptimizerInfo(
        MupSGD,
        "params, lr=0.001, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, *, readout_constraint=None, "
        f"{MUP_SIGNATURE}, momentum_dtype=None, {OWN}",
        [
            ({}, ""),
            ({"weight_decay": 0.1, "dampening": 0.5}, ""),
            ({"momentum": 0.9}, MOMENT),
            ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, MOMENT),
            ({"momentum": 0.9, "dampening": 0.5}, f"{MOMENT} step"),
            ({"readout_constraint": "to_output_scale"}, ""),
        ],
        [
            ({"momentum": 1.0}, ValueError, f"momentum {UNIT} 1.0"),
            ({"dampening": -0.1}, ValueError, f"dampening {UNIT} -0.1"),
            ({"nesterov": 1}, TypeError, "nesterov must be True or False"),
            ({"nesterov": True}, ValueError, "nesterov=True needs a momentum above 0"),
            ({"readout_constraint": "other"}, ValueError, "readout_constraint must be one of 'to_output_scale'"),
            *MUP,
        ],
        options=TYPES,
    ),
    OptimizerInfo(
        DecoupledLionW,
        f"params, lr=0.0001, betas=(0.9, 0.99), weight_decay=0.0, *, momentum_dtype=None, {OWN}",
        [({}, "scale_by_lion.moment"), ({"weight_decay": 5e-4, "betas": (0.5, 0.6)}, "scale_by_lion.moment")],
        [*BETAS, *DECAY],
    ),
    OptimizerInfo(
        partial(ChainOptimizer, transforms=SM3_CHAIN, lr=0.01),
        f"params, transforms, lr, *, {OWN}, **unset",
        [({}, f"{AXES} {MOMENT}")],
        [],
        sparse="rows",
    ),
]
INPUTS = [(info, options, state) for info in INFOS for options, state in info.inputs]
ERRORS = [(info, *error) for info in INFOS for error in info.errors]
each_class = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.cls.__name__)
each_input = pytest.mark.parametrize(
    ("info", "options", "state"), INPUTS, ids=[f"{i.cls.__name__}-{'-'.join(o) or 'defaults'}" for i, o, _ in INPUTS]
)
sweep_of_inputs = sweep(  # many of their kernels do not come with the package, and take a second to compile
    ("info", "options", "state"),
    INPUTS,
    short=lambda info, options, state: options == info.inputs[0][0],
    ids=[f"{i.cls.__name__}-{'-'.join(o) or 'defaults'}" for i, o, _ in INPUTS],
)
each_error = pytest.mark.parametrize(
    ("info", "options", "error", "message"), ERRORS, ids=[f"{i.cls.__name__}-{next(iter(o))}" for i, o, _, _ in ERRORS]
)


def test_every_class_has_its_record():
    classes = {c for c in vars(fusedbun.torch).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    classes -= {fusedbun.torch.TransformOptimizer}
    assert {info.cls for info in INFOS} == classes
    assert FusionOptimizer is Fusedbun
    assert SignSGD is ScaledOptum


# Arguments


@each_class
def test_signature_and_documentation(info):
    arguments = inspect.signature(info.cls).parameters
    bare = inspect.Signature([p.replace(annotation=p.empty) for p in arguments.values()])
    assert str(bare) == f"({info.signature})"
    for name in arguments:
        assert re.search(rf"^ *{name}: |`{name}=", info.cls.__doc__, re.MULTILINE), name
    assert "initial_lr: " not in info.cls.__doc__


@each_class
def test_arguments_by_position(info):
    """In the order of the signature, as far as it goes."""
    positional = [p for p in inspect.signature(info.cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    values = [p.default for p in positional if p.default is not p.empty]
    params = info.params(*SHAPES)
    if "transforms" in (p.name for p in positional):
        optimizer = info.cls(params, SM3_CHAIN, 0.01)
        values, positional = [0.01], positional[2:]
    else:
        values, positional = (values, positional[1:]) if info.cls is not Fusedbun else ([0.01, *values], positional[1:])
        mup = {k: v for k, v in info.options.items() if k == "mup"}
        optimizer = info.cls(params, *values, **mup)
    assert [optimizer.param_groups[0][p.name] for p in positional] == values


@each_error
def test_error_inputs(info, options, error, message):
    """In the constructor, in a group, in a group added later, and between steps."""
    params, newcomer = info.params((4, 3)), info.params((2,))
    with pytest.raises(error, match=message):
        info(params, **options)
    with pytest.raises(error, match=message):
        info([{"params": params, **options}])
    optimizer = info(params)
    run(optimizer, 1)
    with unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.add_param_group({"params": newcomer, **options})
    optimizer.param_groups[0].update(options)
    with unchanged(optimizer, groups=False), pytest.raises(error, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        *((flag, "chooses an implementation") for flag in ("foreach", "fused", "capturable", "differentiable")),
        ("amsgrad", "keeps the largest mean of squares"),
    ],
)
@each_class
def test_torchs_flags_are_refused_by_name_or_mean_nothing(info, flag, said):
    params = info.params((4, 3))
    if f" {flag}=" in info.signature:
        return
    message = f"{info.cls.__name__}: {flag}=True {said}"
    with pytest.raises(TypeError, match=message):
        info(params, **{flag: True})
    with pytest.raises(TypeError, match=message):
        info([{"params": params, flag: True}])
    for value in (None, False):
        assert flag not in info(params, **{flag: value}).defaults
        run(info([{"params": params, flag: value}]), 1)


@each_class
def test_an_unknown_argument_is_told_the_known_ones(info):
    with pytest.raises(TypeError, match=rf"{info.cls.__name__}\(\) .*'weightdecay'; its arguments are params, "):
        info(info.params((2,)), weightdecay=0.1)


# Steps


@sweep_of_inputs
def test_goes_in_the_right_direction(info, options, state):
    """The loss of a bowl falls, and its opposite's climbs with maximize=True."""
    for maximize in (False, True):
        (p,) = info.params((4, 3))
        centre = torch.where(p.detach() > 0, -1.0, 1.0)
        optimizer, losses = info([p], **options, maximize=maximize), []
        for _ in range(8):
            p.grad = (-1 if maximize else 1) * (p.detach() - centre)
            optimizer.step()
            losses.append((p.detach() - centre).pow(2).sum().item())
        assert all(later < sooner for sooner, later in pairwise(losses)) or losses[-1] == 0


@each_input
def test_state(info, options, state):
    optimizer = info(info.params((4, 3)), **options)
    run(optimizer, 2)
    assert [" ".join(slots) for slots in states(optimizer)] == [state]


@each_input
def test_inputs_of_a_group_are_those_of_an_optimizer_of_its_own(info, options, state):
    own, usual, alone = (info.params(*SHAPES) for _ in range(3))
    together = info([{"params": usual}, {"params": own, **options}])
    wanted = info(alone, **options)
    for step in range(3):
        for leaves in (own, usual, alone):
            for i, p in enumerate(leaves):
                p.grad = gradient(p, step, i)
        together.step()
        wanted.step()
    assert_same([p.detach() for p in own], [p.detach() for p in alone])


@each_input
def test_a_copied_state_dict_continues_to_the_last_bit(info, options, state):
    """A copy, for the dict itself holds the state of the run that goes on. Its hyper-parameters replace ours."""
    whole = info(info.params(*SHAPES), **options)
    run(whole, 3)
    saved = copy.deepcopy(whole.state_dict())
    resumed = info(copies(whole.param_groups[0]["params"]))
    run(whole, range(3, 5))
    resumed.load_state_dict(saved)
    run(resumed, range(3, 5))
    assert_same_run(resumed, whole)


def conversion_of(saved):
    """Expects a warning where an optimizer has state whose dtype depends on its parameters'."""
    floating = any(x.is_floating_point() for state in states(saved) for x in state.values())
    return pytest.warns(UserWarning, match="is converted") if floating else nullcontext()


@sweep_of_inputs
def test_the_declared_dtypes_win_when_loading_across_precisions(info, options, state):
    """float64 state into float32 and bfloat16 parameters, and back."""
    double = info(info.params(*SHAPES, dtype=torch.float64), **options)
    run(double, 2)
    for dtype in (torch.float32, torch.bfloat16):
        low = info(info.params(*SHAPES, dtype=dtype), **options)
        with conversion_of(double):
            low.load_state_dict(double.state_dict(), convert=True)
        rounded = [{k: v.float() if v.dtype == torch.float64 else v for k, v in s.items()} for s in states(double)]
        assert_same(states(low), rounded)
        back = info(info.params(*SHAPES, dtype=torch.float64), **options)
        with conversion_of(low):
            back.load_state_dict(low.state_dict(), convert=True)
        assert_same(
            states(back), [{k: v.double() if v.is_floating_point() else v for k, v in s.items()} for s in rounded]
        )
        run(low, range(2, 3))
        run(back, range(2, 3))


@each_class
def test_a_sparse_gradient(info):
    param, other = (info.params((6, 3))[0] for _ in range(2))
    optimizer, before = info([param]), param.detach().clone()
    param.grad = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 3), (6, 3), check_invariants=True)
    if info.sparse == "refused":
        with unchanged(optimizer), pytest.raises(TypeError, match=r"parameter 0 of group 0 is sparse .* takes dense"):
            optimizer.step()
    elif info.sparse == "dense":
        optimizer.step()
        other.grad = param.grad.to_dense()
        info([other]).step()
        assert_same(param.detach(), other.detach())
    else:
        fewer = [t for t in SM3_CHAIN if t.name != "momentum"]
        optimizer = ChainOptimizer([param], fewer, 0.01) if info.cls is ChainOptimizer else optimizer
        optimizer.step()
        assert (param.detach() != before).any(1).tolist() == [False, True, False, False, True, False]
        assert list(optimizer.state[param]) == ["sm3_accumulate.axis0"]


@pytest.mark.parametrize("shape", [(40, 30), (6, 5, 4), (3, 4, 2, 5)])
def test_sm3_without_momentum_has_nothing_of_a_parameters_size(shape):
    (param,) = parameters(shape)
    optimizer = SM3([param], beta=0.9)
    run(optimizer, 2)
    sizes = [value.untyped_storage().nbytes() // 4 for value in optimizer.state[param].values()]
    assert sizes == list(shape)


BY_BETAS = (FusedbunW, MupAdam, MupAdamW, DecoupledLionW)
MOMENTA = [(SM3, "momentum"), (MupSGD, "momentum"), *((cls, "betas") for cls in BY_BETAS)]


@pytest.mark.parametrize(("cls", "name"), MOMENTA, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("cycle", ["CyclicLR", "OneCycleLR"])
def test_torchs_schedulers_cycle_the_momentum(cls, name, cycle):
    """Under the names by which torch knows it; each step takes the momentum of its moment."""
    info = next(info for info in INFOS if info.cls is cls)
    optimizer, by_hand = info(parameters(*SHAPES), lr=0.01), info(parameters(*SHAPES), lr=0.01)
    make = {
        "CyclicLR": partial(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
        "OneCycleLR": partial(OneCycleLR, max_lr=0.1, total_steps=6),
    }
    scheduler, seen = make[cycle](optimizer), []
    for step in range(5):
        group = optimizer.param_groups[0]
        by_hand.param_groups[0].update({key: group[key] for key in ("lr", name)})
        seen.append(group[name] if name == "momentum" else group[name][0])
        run(optimizer, range(step, step + 1))
        run(by_hand, range(step, step + 1))
        scheduler.step()
    assert len({round(value, 6) for value in seen}) >= 3
    assert_same_run(optimizer, by_hand)
