"""u-muP's scales, types and independent decay in torch. That the numbers are unit-scaling's: test_torch_oracles.py."""

import math
from functools import partial

import pytest
import torch
import unit_scaling as uu
from makers import assert_same, copies, gradient, parameters, run, set_gradients, unchanged
from test_torch_checkpoint import through_file
from torch.optim.lr_scheduler import LambdaLR

from fusedbun import MupAdam, MupAdamW, MupSGD

every_mup = pytest.mark.parametrize("make", [MupAdam, MupAdamW, MupSGD])
to_output_scale = partial(MupSGD, readout_constraint="to_output_scale")


def typed(param, kind, depth=None):
    param.mup_type, param.mup_scaling_depth = kind, depth
    return param


def scale(make, param, **options):
    """By how much a step of the optimizer is larger than that of one without types."""
    other = copies([param])
    optimizers = make([param], lr=0.01, **options), make(other, lr=0.01, allow_non_unit_scaling_params=True)
    steps = []
    for p, optimizer in zip((param, *other), optimizers, strict=True):
        before, p.grad = p.detach().clone(), torch.ones_like(p)
        optimizer.step()
        steps.append((p.detach() - before).mean().item())
    return steps[0] / steps[1]


SHAPES = [((), 1), ((6,), 6), ((6, 4), 4), ((6, 4, 5), 20), ((6, 4, 5, 2), 40), ((6, 4, 1, 2, 2), 16)]


@pytest.mark.parametrize("depth", [None, 1, 9])
@pytest.mark.parametrize(("shape", "fan_in"), SHAPES)
@every_mup
def test_scales(make, shape, fan_in, depth):
    """unit-scaling refuses four axes and more; here the fan-in goes on as the product of all but the first."""
    by_depth = (depth or 1) ** -0.5
    for kind, wanted in (("weight", fan_in**-0.5), ("bias", 1.0), ("norm", 1.0), ("output", 1.0)):
        (param,) = parameters(shape, dtype=torch.float64)
        assert scale(make, typed(param, kind, depth)) == pytest.approx(wanted * by_depth, rel=1e-12)


@pytest.mark.parametrize("depth", [None, 9])
@pytest.mark.parametrize(("shape", "fan_in"), SHAPES)
def test_scales_with_a_readout_constraint(shape, fan_in, depth):
    by_depth, n = (depth or 1) ** -0.5, shape[0] if shape else 1
    for kind, wanted in (("weight", fan_in**0.5), ("bias", n), ("norm", n), ("output", 1.0)):
        (param,) = parameters(shape, dtype=torch.float64)
        assert scale(to_output_scale, typed(param, kind, depth)) == pytest.approx(wanted * by_depth, rel=1e-12)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("make", [MupAdam, MupAdamW, MupSGD, to_output_scale])
def test_an_empty_parameter_has_a_scale(make, kind, shape):
    param = typed(torch.zeros(shape, requires_grad=True), kind)
    run(make([param], weight_decay=0.1), 2)


def test_the_channel_axis_is_what_a_fan_in_leaves_out():
    (param,) = parameters((6, 4, 5), dtype=torch.float64)
    for axis, fan_in in ((0, 20), (-1, 24), (1, 30), (lambda path, p: 2, 24)):
        found = scale(MupAdam, typed(copies([param])[0], "weight"), channel_axis=axis)
        assert found == pytest.approx(fan_in**-0.5, rel=1e-12)
    with pytest.raises(ValueError, match=r"channel_axis must lie in \[-3, 3\) for a parameter.*\(6, 4, 5\).* it is 3"):
        MupAdam([typed(param, "weight")], channel_axis=3)


# Where types come from


def test_types_by_name_by_rule_and_by_attribute_are_the_same():
    names, shapes = ("body.weight", "body.bias", "head"), ((4, 3), (4,), (2, 4))
    by_name = {"body.weight": ("weight", 4), "body.bias": "bias", "head": "output"}
    in_a_tree = {"body": {"weight": ("weight", 4), "bias": "bias"}, "head": "output"}

    def by_rule(path, param):
        return "output" if path == ("head",) else ("weight", 4) if param.ndim > 1 else "bias"

    found = []
    for mup in (by_name, in_a_tree, by_rule, None):
        params = parameters(*shapes)
        if mup is None:
            for p, kind in zip(params, (("weight", 4), ("bias",), ("output",)), strict=True):
                typed(p, *kind)
        run(MupAdamW(zip(names, params, strict=True), lr=0.1, weight_decay=0.1, mup=mup), 2)
        found.append([p.detach() for p in params])
    assert found[0][0].shape == (4, 3)
    for other in found[1:]:
        assert_same(other, found[0])


def test_what_mup_says_goes_before_the_attributes():
    (param,) = parameters((6, 4), dtype=torch.float64)
    assert scale(MupAdam, typed(param, "weight", 9), mup=lambda path, p: ("output", 4)) == pytest.approx(0.5)
    (param,) = parameters((6, 4), dtype=torch.float64)
    assert scale(MupAdam, typed(param, "weight", 9), mup=lambda path, p: None) == pytest.approx(1 / 6)


@every_mup
def test_a_parameter_without_a_type_is_named(make):
    good, bad = typed(parameters((3,))[0], "bias"), parameters((4, 3))[0]
    wanted = r"of shape \(4, 3\) has no u-muP type; give it one in `mup`.*allow_non_unit_scaling_params=True"
    with pytest.raises(ValueError, match=f"parameter 'layer.bad' {wanted}"):
        make([("good", good), ("layer.bad", bad)])
    with pytest.raises(ValueError, match=f"a parameter without a name {wanted}"):
        make([good, bad])
    with pytest.raises(ValueError, match=f"parameter 'layer.bad' {wanted}"):
        make([("good", good), ("layer.bad", bad)], mup={"layer": {"good": "weight"}, "good": "bias"})
    optimizer = make([good])
    with unchanged(optimizer), pytest.raises(ValueError, match=wanted):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    make([good, bad], allow_non_unit_scaling_params=True)


@pytest.mark.parametrize("kind", ["embedding", 3, ("weight", 2, 3), ["weight", 2]])
def test_an_unknown_type(kind):
    with pytest.raises(
        ValueError, match=r"type of parameter 'w' of shape \(2,\) must be 'weight', 'bias', .* but it is"
    ):
        MupAdam([("w", parameters((2,))[0])], mup={"w": kind})


@pytest.mark.parametrize("depth", [0, -1, 2.0, "two"])
def test_a_depth_that_is_none(depth):
    with pytest.raises(ValueError, match=f"depth of parameter 'w' must be an integer from 1 up, but it is {depth!r}"):
        MupAdam([("w", parameters((2,))[0])], mup={"w": ("weight", depth)})


@pytest.mark.parametrize("mup", ["weight", 3, ["weight"]])
def test_mup_of_another_kind(mup):
    with pytest.raises(TypeError, match="mup must be a mapping from names to types, a rule"):
        MupAdam(parameters((2,)), mup=mup)


def test_one_group_stays_one_and_has_one_learning_rate():
    params = list(uu.Linear(4, 3, bias=True).parameters())
    optimizer = MupAdamW(params, lr=0.1, weight_decay=0.1)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["params"] == params


def test_a_rule_stays_with_the_optimizer_and_a_mapping_is_saved():
    """A rule is code: it is neither in the file nor lost by loading, in each group its own."""

    def weights(path, param):
        return "weight"

    params = parameters((4, 3), (4, 3), (4, 3))
    mapping = {"0": "weight"}

    def make(params):
        names = [(str(i), p) for i, p in enumerate(params)]
        groups = [{"params": names[:1], "mup": weights}, {"params": names[1:2], "mup": lambda path, p: "output"}]
        return MupAdam([*groups, {"params": names[2:], "mup": {"2": "norm"}}], lr=0.1, mup=mapping)

    whole, resumed = make(params), make(copies(params))
    run(whole, 2)
    saved = through_file(whole.state_dict())
    assert ["mup" in group for group in saved["param_groups"]] == [False, False, True]
    resumed.load_state_dict(saved)
    assert [group["mup"] for group in resumed.param_groups][2] == {"2": "norm"}
    assert resumed.param_groups[0]["mup"] is weights
    for p, q in zip(params, (q for group in resumed.param_groups for q in group["params"]), strict=True):
        q.data.copy_(p)
    for optimizer in (whole, resumed):
        run(optimizer, range(2, 4))
    assert_same(*([p.detach() for group in o.param_groups for p in group["params"]] for o in (whole, resumed)))


# Independent decay


def decays(make, lr, weight_decay=0.01, schedule=None, steps=3, **options):
    """The share that each step takes from a weight of fan-in 4 whose gradient is 0."""
    param = typed(torch.full((2, 4), 8.0, dtype=torch.float64, requires_grad=True), "weight")
    optimizer = make([param], lr=lr, weight_decay=weight_decay, **options)
    scheduler, shares = LambdaLR(optimizer, schedule or (lambda step: 1.0)), []
    for _ in range(steps):
        before, param.grad = param.detach().clone(), torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        shares.append(1 - (param.detach() / before)[0, 0].item())
    return shares


@pytest.mark.parametrize("make", [MupAdamW, MupSGD])
@pytest.mark.parametrize("lr", [0.5, 1e-3, torch.tensor(0.25)])
def test_independent_decay_follows_the_schedule_but_not_the_learning_rate(make, lr):
    assert decays(make, lr) == pytest.approx([0.01] * 3, rel=1e-6)
    halved = decays(make, lr, schedule=lambda step: 0.5**step)
    assert halved == pytest.approx([0.01, 0.005, 0.0025], rel=1e-6)
    rate = float(lr) / 2  # of fan-in 4
    dependent = decays(make, lr, schedule=lambda step: 0.5**step, independent_weight_decay=False)
    assert dependent == pytest.approx([0.01 * rate, 0.005 * rate, 0.0025 * rate], rel=1e-5)


@every_mup
def test_an_initial_learning_rate_of_zero(make):
    (param,) = parameters((4, 3))
    typed(param, "weight")
    message = r"initial learning rate, which must lie in \(0, inf\), but it is 0.0"
    for lr in (0.0, torch.tensor(0.0)):
        with pytest.raises(ValueError, match=message):
            make([param], lr=lr, weight_decay=0.1)
        with pytest.raises(ValueError, match=message):
            make([{"params": [param], "weight_decay": 0.1}], lr=lr)
        run(make(copies([param]), lr=lr, allow_non_unit_scaling_params=True), 1)
        make([param], lr=lr, weight_decay=0.1, independent_weight_decay=False)


@every_mup
def test_each_group_has_the_first_learning_rate_of_its_own(make):
    params = [typed(p, "weight") for p in parameters((4, 3), (4, 3), (4, 3))]
    optimizer = make([{"params": params[0], "lr": 0.5}, {"params": params[1]}], lr=torch.tensor(0.25), weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.param_groups[1]["lr"].fill_(0.0)
    optimizer.add_param_group({"params": params[2], "lr": 0.75})
    run(optimizer, 2)
    assert [group["first_lr"] for group in optimizer.param_groups] == [0.5, 0.25, 0.75]
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.0, 0.75]
    other = make([{"params": p} for p in params], lr=1.0, weight_decay=0.1)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert [group["first_lr"] for group in other.param_groups] == [0.5, 0.25, 0.75]


@every_mup
def test_a_tensor_learning_rate_is_a_number(make):
    params = [typed(p, "weight", 4) for p in parameters((4, 3), (), (2, 3, 4), dtype=torch.float64)]
    other = [typed(p, "weight", 4) for p in copies(params)]
    lr = torch.tensor(0.125, dtype=torch.float64)
    optimizers = make(params, lr=lr, weight_decay=0.1), make(other, lr=0.125, weight_decay=0.1)
    for step in range(4):
        for optimizer, leaves in zip(optimizers, (params, other), strict=True):
            set_gradients(leaves, step)
            optimizer.step()
        lr.mul_(0.5)
        optimizers[1].param_groups[0]["lr"] *= 0.5
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=0)


# SGD's own


def test_the_first_step_of_sgd_is_not_dampened():
    (param,) = parameters((3,), dtype=torch.float64)
    optimizer, before = MupSGD([typed(param, "bias")], 0.5, momentum=0.9, dampening=0.75), param.detach().clone()
    first, second = gradient(param, 0), gradient(param, 1)
    for g, wanted in ((first, first), (second, 0.9 * first + 0.25 * second)):
        param.grad = g
        optimizer.step()
        torch.testing.assert_close(before - param.detach(), 0.5 * wanted)
        before = param.detach().clone()


@pytest.mark.parametrize("options", [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_a_momentum_without_dampening(options):
    with pytest.raises(ValueError, match="nesterov=True needs a momentum above 0 and a dampening of 0"):
        MupSGD(parameters((2,)), **options)


def test_the_readout_constraint_is_one_of_unit_scalings():
    with pytest.raises(ValueError, match=r"readout_constraint must be one of 'to_output_scale' or None.* 'other'"):
        MupSGD(parameters((2,)), readout_constraint="other")


@pytest.mark.parametrize(("momentum", "numbers"), [(0.0, 0), (0.9, 12)])
def test_sgd_keeps_nothing_without_momentum(momentum, numbers):
    (param,) = parameters((4, 3))
    optimizer = MupSGD([typed(param, "weight")], momentum=momentum)
    run(optimizer, 2)
    assert sum(math.prod(value.shape) for value in optimizer.state[param].values()) == numbers
