"""What is refused: each error names the argument, its value and what is allowed, before anything has changed."""

import re

import pytest
import torch
from makers import (
    MAKERS,
    SHAPES,
    every_optimizer,
    every_optimizer_with_state,
    gradient,
    parameters,
    recommended,
    run,
    set_gradients,
    unchanged,
)

from fusedbun import ChainOptimizer, Fusedbun, chain
from fusedbun.transforms import Centralize, Momentum, RMSScale, SM3Accumulate

NAN, INF = float("nan"), float("inf")
NO_NUMBER = (None, True, "0.1", [0.1], 1j, torch.tensor([0.1, 0.2]))
NO_BOOL = (None, 1, 0.0, "yes", [True])

# Each hyper-parameter: what its error says is allowed, values of other types, values out of range.
REFUSED = {
    "lr": ("[0, inf)", NO_NUMBER[:-1], (-0.1, NAN, INF)),
    "eps": ("[0, inf)", NO_NUMBER, (-1e-8, NAN, INF)),
    "beta_decay": ("[0, 1)", NO_NUMBER, (-0.1, 1, 1.0, 1.5, NAN, INF)),
    "Lambda": ("[0, inf)", NO_NUMBER, (-0.1, NAN, INF)),
    "momentum_beta": ("[0, 1)", NO_NUMBER, (-0.1, 1, 1.0, 1.5, NAN, INF)),
    "clip_rms": ("(0, inf)", NO_NUMBER[1:], (0, 0.0, -1.0, NAN, INF)),
    "centralize": ("True or False", NO_BOOL, ()),
    "use_rms": ("True or False", NO_BOOL, ()),
    "nesterov": ("True or False", NO_BOOL, ()),
    "lagged": ("True or False", NO_BOOL, ()),
    "maximize": ("True or False", NO_BOOL, ()),
    "channel_axis": ("an integer", (None, True, 0.5, "0", [0]), ()),
}
BAD_VALUES = [
    pytest.param(name, value, allowed, error, id=f"{name}={value!r}")
    for name, (allowed, types, values) in REFUSED.items()
    for error, bad in ((TypeError, types), (ValueError, values))
    for value in bad
]
BAD_RATES = {
    "two elements": (torch.tensor([0.1, 0.2]), ValueError, r"one element, but it has shape \(2,\)"),
    "no elements": (torch.zeros(0), ValueError, r"one element, but it has shape \(0,\)"),
    "negative": (torch.tensor(-0.5), ValueError, r"lr must lie in \[0, inf\), but it is -0.5"),
    "NaN": (torch.tensor(NAN), ValueError, r"lr must lie in \[0, inf\), but it is nan"),
    "infinite": (torch.tensor([INF]), ValueError, r"lr must lie in \[0, inf\), but it is inf"),
    "complex": (torch.tensor(1j), TypeError, r"lr must be a number in \[0, inf\), but it is 1j"),
    "bool": (torch.tensor(True), TypeError, r"lr must be a number in \[0, inf\), but it is True"),
}


def two_groups(make):
    """An optimizer in the middle of a run, with two groups and a third without state; one parameter has no gradient."""
    params = parameters(*SHAPES)
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    run(optimizer, 1)
    newcomer = parameters((2,))
    optimizer.add_param_group({"params": newcomer})
    set_gradients([*params, *newcomer], 1)
    params[0].grad = None
    return optimizer, params


# Hyper-parameters


@pytest.mark.parametrize(("name", "value", "allowed", "error"), BAD_VALUES)
def test_fusedbun_refuses_it_as_argument_in_a_group_and_between_steps(name, value, allowed, error):
    message = f"{name} must .*{re.escape(allowed)}.*, but it is {re.escape(repr(value))}"
    params = parameters((4, 3))
    with pytest.raises(error, match=message):
        Fusedbun(params, **{"lr": 0.1, name: value})
    with pytest.raises(error, match=message):
        Fusedbun([{"params": params, name: value}], lr=0.1)
    good = recommended(params, lr=0.1).defaults[name]
    with pytest.raises(error, match=message):  # also where no group would use it yet
        Fusedbun([{"params": params, name: good}], **{"lr": 0.1, name: value})
    optimizer, _ = two_groups(recommended)
    optimizer.param_groups[1][name] = value
    with unchanged(optimizer, groups=False), pytest.raises(error, match=message):
        optimizer.step()
    optimizer.param_groups[1][name] = good
    optimizer.step()


@pytest.mark.parametrize("case", BAD_RATES)
@every_optimizer
def test_a_bad_tensor_learning_rate(make, case):
    lr, error, message = BAD_RATES[case]
    with pytest.raises(error, match=message):
        make(parameters((4, 3)), lr=lr)
    optimizer, _ = two_groups(make)
    optimizer.param_groups[1]["lr"] = lr
    with unchanged(optimizer, groups=False), pytest.raises(error, match=message):
        optimizer.step()


@pytest.mark.parametrize("value", [-0.5, NAN, "0.1", None, True])
@every_optimizer
def test_a_bad_learning_rate_between_steps(make, value):
    optimizer, _ = two_groups(make)
    optimizer.param_groups[-1]["lr"] = value
    with (
        unchanged(optimizer, groups=False),
        pytest.raises((TypeError, ValueError), match=re.escape(f"but it is {value!r}")),
    ):
        optimizer.step()


def test_a_chains_field_is_named_with_its_transformation():
    optimizer, _ = two_groups(MAKERS["chain"])
    optimizer.param_groups[1]["momentum.beta"] = 1.0
    with (
        unchanged(optimizer),
        pytest.raises(ValueError, match=r"momentum: beta must lie in \[0, 1\), but it is 1.0"),
    ):
        optimizer.step()


def test_an_unknown_argument_is_told_the_known_ones():
    with pytest.raises(
        TypeError, match=r"Fusedbun\(\).*'betas'; its arguments are params, lr, eps, beta_decay, Lambda"
    ):
        Fusedbun(parameters((2,)), 0.1, betas=(0.9, 0.99))


@every_optimizer
def test_no_parameters(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([], lr=0.1)
    with pytest.raises(TypeError, match="iterable of Tensors"):
        make(torch.zeros(3), lr=0.1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn])
@every_optimizer
def test_a_parameter_that_is_no_real_number(make, dtype):
    params = [*parameters((2,)), torch.zeros(2).to(dtype)]
    optimizer = make(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with (
        unchanged(optimizer),
        pytest.raises(TypeError, match=f"parameter 1 of group 0 is {dtype}, but .* real floating-point.*torch.float64"),
    ):
        optimizer.step()
    params[1].grad = None
    optimizer.step()


# Chains


@pytest.mark.parametrize(
    ("transforms", "error", "message"),
    [
        ([RMSScale()], ValueError, "rms_scale reads the second moment.* nothing; put an accumulator"),
        ([SM3Accumulate(), Momentum(), RMSScale()], ValueError, "rms_scale reads .* but that is momentum"),
        ([Momentum(0.9), Momentum(0.5)], ValueError, "one transformation of each name.*'momentum' stands in it twice"),
        ([Momentum(), torch.nn.ReLU()], TypeError, r"made of fusedbun's transformations, but ReLU\(\) is a ReLU"),
        ([None], TypeError, "but None is a NoneType"),
        ([Momentum], TypeError, "is a type"),
    ],
)
def test_a_chain_that_cannot_be(transforms, error, message):
    with pytest.raises(error, match=message):
        ChainOptimizer(parameters((2,)), transforms, lr=0.1)
    if None not in transforms:  # chain() leaves it out
        with pytest.raises(error, match=message):
            chain(*transforms)


def test_a_rule_is_asked_with_each_parameters_own_name():
    layer = torch.nn.Linear(3, 2)
    asked = []

    def last_axis_of_weights(path, param):
        asked.append((path, tuple(param.shape)))
        return -1 if path == ("weight",) else 0

    optimizer = ChainOptimizer(layer.named_parameters(), [Centralize(last_axis_of_weights)], lr=1.0)
    before = layer.weight.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    optimizer.step()
    assert set(asked) == {(("weight",), (2, 3)), (("bias",), (2,))}
    torch.testing.assert_close(before - layer.weight.detach(), torch.tensor([[-1.5] * 3, [1.5] * 3]))


def test_an_axis_that_a_parameter_lacks():
    optimizer, _ = two_groups(recommended)
    optimizer.param_groups[1]["channel_axis"] = 2  # its parameters have 2 to 5 axes
    message = r"channel_axis must lie in \[-2, 2\) for a parameter of shape \(4, 3\), but it is 2"
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


# Gradients and state


def sparse(param):
    embedding = torch.nn.Embedding(*param.shape, sparse=True)
    embedding(torch.tensor([1, 1, 0])).sum().backward()
    param.grad = embedding.weight.grad


def complex_valued(param):
    param.grad.data = param.grad.data + 1j


def integer_valued(param):
    param.grad.data = param.grad.data.to(torch.int32)


def of_another_shape(param):
    param.data = torch.zeros(5, 3)


def broadcastable(param):
    param.data = torch.zeros(1, 3)


BAD_GRADIENTS = {
    "complex": (complex_valued, TypeError, "is torch.complex64.*real floating-point gradients.*torch.float64"),
    "integer": (integer_valued, TypeError, "is torch.int32.*real floating-point gradients.*torch.float64"),
    "of another shape": (of_another_shape, ValueError, r"has shape \(4, 3\), but the parameter has \(5, 3\)"),
    "that broadcasts": (broadcastable, ValueError, r"has shape \(4, 3\), but the parameter has \(1, 3\)"),
}


@pytest.mark.parametrize("case", BAD_GRADIENTS)
@every_optimizer
def test_a_bad_gradient_stops_the_whole_step(make, case):
    """Every parameter and all state stay as they were: those before it, after it, and in the other groups."""
    spoil, error, message = BAD_GRADIENTS[case]
    optimizer, params = two_groups(make)
    spoil(params[2])
    with unchanged(optimizer), pytest.raises(error, match=f"the gradient of parameter 0 of group 1 {message}"):
        optimizer.step()
    params[2].grad = None
    optimizer.step()
    assert len(optimizer.state) == len(params) + 1


ALL_OR_NONE = (ValueError, "parameter 0 of group 1 has .*axis1.* must be all dense or all sparse")
TAKES_SPARSE = {"chain": ALL_OR_NONE, "sm3": ALL_OR_NONE, "sm3-momentum": ALL_OR_NONE}
NEEDS_DENSE = (
    TypeError,
    r"parameter 0 of group 1 is sparse \(torch.sparse_coo\).*dense gradients.*sparse=False.*to_dense",
)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "scaled-optum"])  # it makes them dense
def test_a_sparse_gradient_after_a_dense_one_stops_the_whole_step(name):
    error, message = TAKES_SPARSE.get(name, NEEDS_DENSE)
    optimizer, params = two_groups(MAKERS[name])
    sparse(params[2])
    with unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.step()


@every_optimizer_with_state
def test_a_parameter_of_a_new_shape_needs_new_state(make):
    optimizer, params = two_groups(make)
    params[2].data = torch.zeros(5, 3)
    params[2].grad = gradient(params[2], 1)
    message = r"state '[a-z0-9_.]+' of parameter 0 of group 1 has shape \(4, (.)\).*\(5, 3\) keeps \(5, \1\)"
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()
    del optimizer.state[params[2]]
    optimizer.step()
    assert any(value.shape[0] == 5 for value in optimizer.state[params[2]].values())


@every_optimizer
def test_a_first_step_that_fails_makes_no_state(make):
    params = parameters((4, 3), (5,))
    optimizer = make(params, lr=0.1)
    set_gradients(params, 0)
    integer_valued(params[1])
    with unchanged(optimizer), pytest.raises(TypeError, match="int32"):
        optimizer.step()
    assert len(optimizer.state) == 0
