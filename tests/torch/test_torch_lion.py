"""DecoupledLionW: its decay, its warning, its step in place. That the rest is Lion: test_torch_oracles.py."""

import copy
import warnings

import pytest
import torch
from makers import SHAPES, assert_same, copies, gradient, parameters, run
from torch.optim.lr_scheduler import ExponentialLR

from fusedbun import DecoupledLionW


def factors(lr, weight_decay, **group):
    """What each of three steps multiplies a weight without gradient by, under a schedule that halves."""
    param = torch.full((2,), 8.0, dtype=torch.float64, requires_grad=True)
    optimizer = DecoupledLionW([{"params": param, "lr": lr, **group}], lr=3.0, weight_decay=weight_decay)
    scheduler, found = ExponentialLR(optimizer, 0.5), []
    for _ in range(3):
        before, param.grad = param.detach().clone(), torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        found.append((param.detach() / before)[0].item())
    return found


@pytest.mark.parametrize("lr", [1e-4, 0.5, torch.tensor(0.25)])
def test_decay_follows_the_schedule_but_not_the_learning_rates_size(lr):
    assert factors(lr, 5e-4) == pytest.approx([1 - 5e-4, 1 - 2.5e-4, 1 - 1.25e-4], rel=1e-12)


def test_decay_is_relative_to_the_groups_own_first_learning_rate():
    assert factors(0.1, 5e-4, initial_lr=0.2) == pytest.approx([1 - 2.5e-4, 1 - 1.25e-4, 1 - 0.625e-4], rel=1e-12)


def test_nothing_decays_where_the_first_learning_rate_is_zero():
    assert factors(0.0, 5e-4) == [1.0, 1.0, 1.0]
    (param,) = parameters((3,), dtype=torch.float64)
    optimizer, before = DecoupledLionW([param], lr=0.0, weight_decay=5e-4), param.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.5
    run(optimizer, 1)
    torch.testing.assert_close(before - param.detach(), 0.5 * gradient(param, 0).sign(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("add", ["to the constructor", "in a group", "in a group added later"])
@pytest.mark.parametrize(("weight_decay", "factor"), [(1e-3, "0.999"), (0.01, "0.99"), (0.25, "0.75")])
def test_a_decay_of_a_thousandth_or_more_gives_one_warning_that_says_the_factor(weight_decay, factor, add):
    params = parameters((3,), (4,), (5,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if add == "to the constructor":
            optimizer = DecoupledLionW([{"params": p} for p in params], weight_decay=weight_decay)
        elif add == "in a group":
            optimizer = DecoupledLionW([{"params": params[0]}, {"params": params[1:], "weight_decay": weight_decay}])
        else:
            optimizer = DecoupledLionW(params[:1])
            optimizer.add_param_group({"params": params[1:], "weight_decay": weight_decay})
        run(optimizer, 3)
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
    (warning,) = caught
    assert str(warning.message).startswith(
        f"DecoupledLionW: weight_decay={weight_decay} multiplies every weight by {factor} in each step"
    )
    assert warning.filename == __file__


def test_a_small_decay_and_one_that_no_group_uses_give_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DecoupledLionW(parameters((3,)), weight_decay=9.99e-4)
        DecoupledLionW([{"params": parameters((3,)), "weight_decay": 0.0}], weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initial_lr", [0.1, 0.4, 0.0])
def test_lionw_in_place_is_the_class(initial_lr, dtype):
    params = parameters(*SHAPES, dtype=dtype)
    mine, moments = [p.detach().clone() for p in params], []
    group = {"params": params, "initial_lr": initial_lr}
    optimizer = DecoupledLionW([group], lr=0.1, betas=(0.8, 0.95), weight_decay=5e-4)
    for step in range(5):
        run(optimizer, range(step, step + 1))
        moments = moments or [torch.zeros_like(optimizer.state[p]["scale_by_lion.moment"]) for p in params]
        for i, (p, m) in enumerate(zip(mine, moments, strict=True)):
            where = p.data_ptr(), m.data_ptr()
            assert DecoupledLionW.lionw(p, gradient(p, step, i), m, 0.1, initial_lr, 5e-4, 0.8, 0.95) is None
            assert (p.data_ptr(), m.data_ptr()) == where
    assert_same(mine, [p.detach() for p in params])
    assert_same(moments, [optimizer.state[p]["scale_by_lion.moment"] for p in params])


def test_lionw_steps_a_parameter_that_requires_a_gradient():
    (param,) = parameters((3,))
    (other,) = copies([param])
    DecoupledLionW.lionw(param, gradient(param, 0), torch.zeros(3), 0.1, 0.1, 0.0, 0.9, 0.99)
    run(DecoupledLionW([other], lr=0.1), 1)
    assert_same(param.detach(), other.detach())


@pytest.mark.parametrize(
    ("betas", "message"), [((0.9, 1.0), r"betas\[1\] must lie in \[0, 1\)"), (0.9, "a tuple of 2")]
)
def test_betas_out_of_range(betas, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DecoupledLionW(parameters((3,)), betas=betas)
