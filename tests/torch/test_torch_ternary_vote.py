"""TernaryVote: weights of -1, 0 and +1 that step when enough gradients agree. And ScaledOptum's own: it keeps nothing.

TernaryVote is not in the table of makers: its learning rate is fixed, it takes no weights but these three, and few of
them move in a step. So the points that hold for every optimizer are made for it here.
"""

import copy
import functools
import pickle

import pytest
import torch
from makers import SHAPES, assert_same, assert_same_run, copies, gradient, parameters, run, states, unchanged
from sweeps import only, sweep
from test_torch_checkpoint import through_file

from fusedbun import ScaledOptum, TernaryVote


def ternary(*shapes, dtype=torch.float32):
    return [p.detach().mul(1.5).round().clamp(-1, 1).requires_grad_() for p in parameters(*shapes, dtype=dtype)]


def vote(optimizer, param, values, times=1):
    for _ in range(times):
        param.grad = torch.as_tensor(values, dtype=param.dtype).expand(param.shape).clone()
        optimizer.step()


def one_weight(value=0.0, threshold=3, **options):
    param = torch.tensor([value], requires_grad=True)
    return TernaryVote([param], threshold, **options), param


def votes(optimizer, param):
    return optimizer.state[param]["vote.votes"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@sweep("threshold", [1, 3, 127], short=only(3))
def test_is_its_formula(threshold, dtype):
    """In whole numbers, so to the last bit."""
    params = ternary(*SHAPES, dtype=dtype)
    optimizer = TernaryVote(params, threshold)
    mine, sums = [p.detach().clone() for p in params], [torch.zeros(p.shape, dtype=torch.int64) for p in params]
    steps = 12 if threshold < 127 else 140
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(p, step, i) if threshold < 127 else torch.full_like(p, 0.1)
            sums[i] = (sums[i] + p.grad.sign().long()).clamp(-127, 127)
            fires = sums[i].abs() >= threshold
            mine[i] = (mine[i] - (sums[i].sign() * fires).to(dtype)).clamp(-1, 1)
            sums[i][fires] = 0
        optimizer.step()
        assert_same([p.detach() for p in params], mine)
        assert_same([votes(optimizer, p) for p in params], [s.to(torch.int8) for s in sums])
        assert all(((p == 0) | (p.abs() == 1)).all() for p in params)
    assert any((p != q).any() for p, q in zip(params, ternary(*SHAPES, dtype=dtype), strict=True))


def test_a_weight_steps_when_its_sum_reaches_the_threshold_and_the_sum_starts_again():
    optimizer, param = one_weight(1.0)
    seen = []
    for _ in range(9):
        vote(optimizer, param, 0.5)
        seen.append((param.item(), votes(optimizer, param).item()))
    assert seen == [(1, 1), (1, 2), (0, 0), (0, 1), (0, 2), (-1, 0), (-1, 1), (-1, 2), (-1, 0)]


def test_gradients_that_disagree_take_votes_back():
    optimizer, param = one_weight()
    for g, wanted in ((1.0, 1), (1.0, 2), (-0.1, 1), (0.0, 1), (-5.0, 0), (-1.0, -1), (-1.0, -2)):
        vote(optimizer, param, g)
        assert (param.item(), votes(optimizer, param).item()) == (0, wanted)
    vote(optimizer, param, -1.0)
    assert (param.item(), votes(optimizer, param).item()) == (1, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_votes_saturate_and_never_wrap(sign):
    """A sum below the threshold cannot pass it, so a saved one of a larger threshold shows the ends."""
    optimizer, param = one_weight(threshold=127)
    vote(optimizer, param, sign * 1.0, times=126)
    assert votes(optimizer, param).item() == sign * 126
    votes(optimizer, param).fill_(sign * 127)
    for change, wanted in ((sign * 1.0, 0), (sign * 1.0, sign)):
        vote(optimizer, param, change)
        assert votes(optimizer, param).item() == wanted
    assert param.item() == -sign


def test_a_nan_votes_nothing_and_shows_in_its_weight():
    param = torch.tensor([0.0, 1.0, -1.0, 0.0], requires_grad=True)
    optimizer = TernaryVote([param], threshold=2)
    vote(optimizer, param, [1.0, 1.0, 1.0, 1.0])
    vote(optimizer, param, [torch.nan, -1.0, 1.0, torch.inf])
    assert_same(param.detach(), torch.tensor([torch.nan, 1.0, -1.0, -1.0]))
    assert votes(optimizer, param).tolist() == [1, 0, 0, 0]
    vote(optimizer, param, [1.0, 1.0, 1.0, 1.0])
    assert param.isnan().tolist() == [True, False, False, False]  # as every other NaN it stays until it is replaced


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_is_one_byte_for_each_weight(dtype):
    params = ternary(*SHAPES, dtype=dtype)
    optimizer = TernaryVote(params)
    run(optimizer, 2)
    assert [{k: (v.dtype, v.shape) for k, v in state.items()} for state in states(optimizer)] == [
        {"vote.votes": (torch.int8, p.shape)} for p in params
    ]
    assert sum(v.untyped_storage().nbytes() for s in states(optimizer) for v in s.values()) == sum(
        p.numel() for p in params
    )


def loaded(optimizer):
    other = TernaryVote(copies(optimizer.param_groups[0]["params"]))
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


@pytest.mark.parametrize("clone", [loaded, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_run_continues_to_the_last_bit(dtype, clone):
    whole = TernaryVote(ternary(*SHAPES, dtype=dtype), threshold=5)
    run(whole, 4)
    other = clone(whole)
    assert_same_run(other, whole)
    for optimizer in (whole, other):
        run(optimizer, range(4, 12))
    assert_same_run(other, whole)
    assert all(v.dtype == torch.int8 for s in states(other) for v in s.values())


def test_groups_have_thresholds_of_their_own_which_may_change():
    params = ternary((4, 3), (4, 3))
    optimizer = TernaryVote([{"params": params[0], "threshold": 1}, {"params": params[1]}], threshold=100)
    run(optimizer, 3)
    assert (params[0] != ternary((4, 3))[0]).any()
    assert_same(params[1].detach(), ternary((4, 3), (4, 3))[1].detach())
    optimizer.param_groups[1]["threshold"] = 1
    run(optimizer, range(3, 4))
    assert (params[1] != ternary((4, 3), (4, 3))[1]).any()


def test_maximize_frozen_and_empty_parameters_and_strides():
    up, down = TernaryVote(ternary(*SHAPES), 1, maximize=True), TernaryVote(ternary(*SHAPES), 1)
    for i, (p, q) in enumerate(zip(*(o.param_groups[0]["params"] for o in (up, down)), strict=True)):
        p.grad = gradient(p, 0, i)
        q.grad = -p.grad
    up.step()
    down.step()
    assert_same_run(up, down)

    (plain,), empty, frozen = ternary((2, 3, 4, 5)), torch.zeros(0, 3, requires_grad=True), torch.ones(2)
    strided = plain.detach().to(memory_format=torch.channels_last).requires_grad_()
    optimizer = TernaryVote([plain, strided, empty, frozen], 1)
    for step in range(2):
        plain.grad, strided.grad, empty.grad = gradient(plain, step), gradient(strided, step), torch.zeros(0, 3)
        optimizer.step()
    assert_same(strided.detach(), plain.detach())
    assert votes(optimizer, strided).stride() == strided.stride()
    assert frozen not in optimizer.state
    assert_same(frozen, torch.ones(2))


# What is refused


@pytest.mark.parametrize("lr", [0.5, 0.0, torch.tensor(1.0)])
def test_its_learning_rate_is_fixed(lr):
    with pytest.raises(
        TypeError, match=r"TernaryVote\(\) got an unexpected keyword argument 'lr'; .* params, threshold"
    ):
        TernaryVote(ternary((2,)), lr=lr)
    with pytest.raises(ValueError, match=r"lr is fixed at 1, but it is .*; leave out the scheduler"):
        TernaryVote([{"params": ternary((2,)), "lr": lr}])
    optimizer = TernaryVote(ternary((2,), (4, 3)))
    run(optimizer, 1)
    optimizer.param_groups[0]["lr"] = lr
    with unchanged(optimizer), pytest.raises(ValueError, match="lr is fixed at 1"):
        run(optimizer, 1)


def test_a_scheduler_that_changes_it_is_an_error_before_anything_changes():
    optimizer = TernaryVote(ternary((4, 3)), 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    for _ in range(2):  # at 1 it may be there
        run(optimizer, 1)
        scheduler.step()
    with unchanged(optimizer), pytest.raises(ValueError, match=r"lr is fixed at 1, but it is 0\.1"):
        run(optimizer, 1)


@pytest.mark.parametrize("value", [0.5, -2.0, torch.nan, 1.0001])
def test_other_weights_are_refused(value):
    good, bad = ternary((3,), (4, 3))
    bad.data[1, 1] = value
    with pytest.raises(
        ValueError, match=r"steps weights of -1, 0 and \+1, but parameter 1 of group 0 of shape \(4, 3\)"
    ):
        TernaryVote([good, bad])
    with pytest.raises(ValueError, match=r"but parameter 'layer\.bad' of shape"):
        TernaryVote([("good", good), ("layer.bad", bad)])
    optimizer = TernaryVote([good])
    with unchanged(optimizer), pytest.raises(ValueError, match="round it first"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (128, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_threshold_out_of_range(value, error):
    message = rf"threshold must be an integer .*1.* 127.*, but it is {value!r}"
    with pytest.raises(error, match=message):
        TernaryVote(ternary((2,)), value)
    optimizer = TernaryVote(ternary((2,)))
    optimizer.param_groups[0]["threshold"] = value
    with unchanged(optimizer), pytest.raises(error, match=message):
        run(optimizer, 1)


# ScaledOptum


@pytest.mark.parametrize("implementation", ["kernel", "tiles", "definition"])
def test_slices_of_a_stack_vote_by_themselves(implementation):
    (stack,) = parameters((3, 4, 5))
    stack.data.sign_()
    slices = [x.clone().requires_grad_() for x in stack.detach()]
    one = TernaryVote([stack], threshold=2, stacked=1, implementation=implementation)
    many = TernaryVote(slices, threshold=2, implementation=implementation)
    for step in range(4):
        stack.grad = gradient(stack, step)
        for p, grad in zip(slices, stack.grad, strict=True):
            p.grad = grad.clone()
        one.step()
        many.step()
    assert torch.equal(stack, torch.stack(slices))


def test_scaled_optum_keeps_nothing():
    params = parameters(*SHAPES)
    optimizer = ScaledOptum(params, weight_decay=0.1)
    run(optimizer, 2)
    saved = optimizer.state_dict()
    assert not any(saved["state"].values())
    assert not any(optimizer.state.values())
    options = {"maximize", "stochastic_rounding", "seed", "stacked"}
    assert set(saved["param_groups"][0]) == {"lr", "weight_decay", "params"} | options


def test_the_memory_of_scaled_optum_is_its_parameters():
    params = [torch.zeros(256, 1024), torch.zeros(512, 1024, dtype=torch.bfloat16)]
    optimizer = ScaledOptum([{"params": params[:1]}, {"params": params[1:]}])
    assert optimizer.get_memory_mb() == 2.0
    assert optimizer.get_memory_mb(params[:1]) == 1.0
    assert optimizer.get_memory_mb(iter(params)) == 2.0
    assert optimizer.get_memory_mb([]) == 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_scaled_optum_makes_sparse_gradients_dense(weight_decay):
    """Every row decays, the touched ones or not."""
    dense, other = parameters((6, 3)) + parameters((6, 3))
    optimizers = [ScaledOptum([p], weight_decay=weight_decay) for p in (dense, other)]
    sparse = functools.partial(torch.sparse_coo_tensor, size=(6, 3), check_invariants=True)
    for step in range(3):
        dense.grad = sparse([[1, 4, 1]], gradient(dense, step)[:3])
        other.grad = dense.grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_run(*optimizers)


def test_a_nan_shows_in_scaled_optum():
    (param,) = parameters((3,))
    param.grad = torch.tensor([torch.nan, 0.0, -torch.inf])
    before = param.detach().clone()
    ScaledOptum([param], lr=0.5).step()
    assert_same(param.detach(), before + torch.tensor([torch.nan, 0.0, 0.5]))
