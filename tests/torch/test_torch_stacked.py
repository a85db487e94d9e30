"""Stacks: each slice is stepped as a parameter of its own, whatever steps it, and only noise sees the whole."""

import copy
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from makers import MAKERS, gradient, mup_types, parameters, recommended, sweep_of_dtypes
from processes import placed, run_in_processes
from sweeps import CODED, long, only, sweep
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import fusedbun
from fusedbun import SM3, ChainOptimizer, DecoupledLionW, Fusedbun, FusedbunW, MupAdamW
from fusedbun.chain import Chain
from fusedbun.recipes import RECIPES
from fusedbun.reference import Reference
from fusedbun.torch.sharding import placement
from fusedbun.transforms import Momentum

STACKS = (((3, 4, 33), 1), ((2, 2, 3, 4), 2), ((3, 5), 1), ((4,), 1), ((2, 0, 3), 1), ((0, 3, 2), 1))
NOISY = {
    "fusedbunw": FusedbunW,
    "fusedbun int4": partial(recommended, momentum_dtype="int4"),
    "sm3 bfloat16": partial(SM3, momentum=0.9, momentum_dtype="bfloat16"),
    "lion int8": partial(DecoupledLionW, momentum_dtype="int8"),
    "adam": partial(MupAdamW, mup=mup_types, momentum_dtype="int8", second_moment_dtype="bfloat16"),
}


def places(shape, stacked):
    return [*product(*map(range, shape[:stacked]))]


def stack_and_slices(make, shape, stacked, dtype=torch.float32, steps=3):
    """A stack after some steps, and its slices, stepped as parameters of their own, with both optimizers."""
    (stack,) = parameters(shape, dtype=dtype)
    slices = [stack.detach()[place].clone().requires_grad_() for place in places(shape, stacked)]
    one = make([stack], lr=0.01, stacked=stacked)
    many = make(slices, lr=0.01) if slices else None
    for step in range(steps):
        stack.grad = gradient(stack, step)
        for place, p in zip(places(shape, stacked), slices, strict=True):
            p.grad = stack.grad[place].clone()
        one.step()
        if many:
            many.step()
    return stack, slices, one, many


@pytest.mark.parametrize("implementation", ["kernel", "tiles", "definition"])
@sweep_of_dtypes((torch.float32, torch.bfloat16, torch.float64))
def test_slices_are_parameters_of_their_own(make, dtype, implementation):
    for shape, stacked in STACKS:
        given = implementation if 0 not in shape else None
        stack, slices, one, many = stack_and_slices(partial(make, implementation=given), shape, stacked, dtype)
        for place, p in zip(places(shape, stacked), slices, strict=True):
            assert torch.equal(stack.detach()[place], p.detach()), (shape, place)
            of_slice = many.state[p]
            assert one.state[stack].keys() == of_slice.keys()
            for key, x in one.state[stack].items():
                assert torch.equal(x[place], of_slice[key]), (shape, place, key)


@sweep("name", NOISY, short=only("fusedbunw", "lion int8"))
def test_every_implementation_draws_the_same_noise(name):
    make = partial(NOISY[name], stochastic_rounding=True, seed=5)
    for shape, stacked in (((3, 4, 40), 1), ((2, 2, 3, 40), 2)):
        found = [
            stack_and_slices(partial(make, implementation=i), shape, stacked, torch.bfloat16)[::2]
            for i in ("kernel", "tiles", "definition")
        ]
        (p, kernel), *others = found
        for q, other in others:
            torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)
            for key, x in kernel.state[p].items():
                if x.is_floating_point():
                    torch.testing.assert_close(x, other.state[q][key], rtol=2e-2, atol=1e-6)
                else:
                    same = (x == other.state[q][key]).double().mean().item()
                    assert same > 0.97, f"{key} of {shape}: {same:.3f} of the numbers are the same"


@pytest.mark.parametrize("implementation", ["kernel", "tiles", "definition"])
def test_noise_sees_the_whole_stack(implementation):
    """To a rule on elements a stack is nothing special; so neither are the bits that it is rounded to."""
    make = partial(DecoupledLionW, momentum_dtype="bfloat16", stochastic_rounding=True, implementation=implementation)
    stack, _, optimizer, _ = stack_and_slices(make, (3, 4, 5), 1, torch.bfloat16)
    whole, _, other, _ = stack_and_slices(make, (3, 4, 5), 0, torch.bfloat16)
    assert torch.equal(stack, whole)
    moments = [o.state[p]["scale_by_lion.moment"] for o, p in ((optimizer, stack), (other, whole))]
    assert torch.equal(*moments)
    assert len(moments[0].unique()) > 30


def test_equals_the_reference():
    chain = Fusedbun([torch.zeros(1)], lr=0.1, centralize=True, use_rms=True, lagged=True, clip_rms=1.0)
    transforms = chain.chain(chain.param_groups[0]).transforms
    (p,) = parameters((2, 3, 4, 5), dtype=torch.float64)
    reference = Reference({"p": p.detach().numpy()}, Chain(transforms, stacked=1), 0.01)
    optimizer = ChainOptimizer([("p", p)], transforms, 0.01, stacked=1)
    for step in range(4):
        p.grad = gradient(p, step)
        reference.step({"p": p.grad.numpy()})
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.from_numpy(reference.params["p"]), rtol=1e-12, atol=1e-12)


def test_a_rule_says_which_parameters_are_stacks():
    experts, layer = parameters((3, 4, 5), (4, 5))
    asked = []

    def rule(path, param):
        asked.append((path, tuple(param.shape)))
        return param.ndim - 2

    groups = [("mlp.experts.up", experts), ("mlp.router.weight", layer)]
    optimizer = FusedbunW(groups, lr=0.1, stacked=rule)
    for p in (experts, layer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (("mlp", "experts", "up"), (3, 4, 5)) in asked
    shapes = {key: tuple(x.shape) for key, x in optimizer.state[experts].items()}
    assert shapes["sm3_accumulate.axis0"] == (3, 4, 1)
    assert shapes["sm3_accumulate.axis1"] == (3, 1, 5)
    assert shapes["momentum.moment.exponents"] == (3, 4, 1, 1)
    assert optimizer.state[layer]["sm3_accumulate.axis0"].shape == (4, 1)


def test_experts_kept_as_one_tensor():
    experts, bias, router, listed = parameters((3, 4, 5), (3, 5), (3, 4), (4, 5))
    names = ("experts.gate_up_proj", "experts.gate_up_proj_bias", "router.weight", "experts.0.weight")
    named = [(f"mlp.{name}", p) for name, p in zip(names, (experts, bias, router, listed), strict=True)]
    optimizer = SM3(named, lr=0.1, stacked=fusedbun.stacked_experts)
    for _, p in named:
        p.grad = gradient(p, 0)
    optimizer.step()
    shapes = [[tuple(x.shape) for x in optimizer.state[p].values()] for _, p in named]
    assert shapes == [[(3, 4, 1), (3, 1, 5)], [(3, 5)], [(3, 1), (1, 4)], [(4, 1), (1, 5)]]


def test_a_rule_on_a_hyper_parameter_sees_one_slice():
    seen = []

    def types(path, param):
        seen.append((tuple(param.shape), param.ndim, param.kind))
        return "weight"

    (p,) = parameters((3, 4, 5))
    p.kind = "of the model's own"
    MupAdamW([p], lr=0.1, mup=types, stacked=1)
    assert set(seen) == {((4, 5), 2, "of the model's own")}


def test_groups_have_their_own():
    stack, matrix = parameters((3, 4, 5), (4, 5))
    optimizer = FusedbunW([{"params": [stack], "stacked": 1}, {"params": [matrix]}], lr=0.1)
    for p in (stack, matrix):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert "sm3_accumulate.axis2" not in optimizer.state[stack]


def test_a_stack_takes_part_in_later_steps_with_other_numbers():
    """What is described to the kernels once is stepped on with another learning rate, and gradients elsewhere."""
    make = partial(FusedbunW, momentum_dtype=None)
    stack, slices, one, many = stack_and_slices(make, (3, 4, 33), 1)
    for optimizer in (one, many):
        optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.9))
    keep = []
    for step in range(3, 6):
        stack.grad = gradient(stack, step)
        keep.append(stack.grad)
        for place, p in zip(places((3, 4, 33), 1), slices, strict=True):
            p.grad = stack.grad[place].clone()
        one.step()
        many.step()
    assert all(torch.equal(stack.detach()[place], p.detach()) for place, p in enumerate(slices))


def test_any_layout_in_memory():
    (p,) = parameters((4, 3, 5))
    stack = p.detach().permute(1, 0, 2)
    assert not stack.is_contiguous()
    stack.requires_grad_()
    slices = [stack.detach()[i].contiguous().requires_grad_() for i in range(3)]
    one, many = (FusedbunW(x, lr=0.1, momentum_dtype=None, stacked=n) for x, n in (([stack], 1), (slices, 0)))
    for step in range(2):
        stack.grad = gradient(stack, step)
        for i, q in enumerate(slices):
            q.grad = stack.grad[i].contiguous()
        one.step()
        many.step()
    for i, q in enumerate(slices):
        torch.testing.assert_close(stack.detach()[i], q.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [FusedbunW, MAKERS["sm3-momentum"]])
def test_state_is_saved_and_loaded(make, tmp_path):
    stack, _, optimizer, _ = stack_and_slices(make, (3, 4, 40), 1)
    copies = []
    for load in ("state_dict", "file"):
        p = stack.detach().clone().requires_grad_()
        other = make([("p", p)], lr=0.01, stacked=1)
        if load == "file":
            named = make([("p", stack)], lr=0.01, stacked=1)
            named.load_state_dict(optimizer.state_dict())
            fusedbun.save_state(named, tmp_path / "state")
            fusedbun.load_state(other, tmp_path / "state")
        else:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        copies.append(other.state[p])
    for state in copies:
        assert state.keys() == optimizer.state[stack].keys()
        assert all(torch.equal(state[key], x) for key, x in optimizer.state[stack].items())


def test_a_file_says_what_is_a_stack(tmp_path):
    stack, _, _, _ = stack_and_slices(FusedbunW, (3, 4, 40), 1)
    optimizer = FusedbunW([("p", stack)], lr=0.1, stacked=1)
    stack.grad = torch.ones_like(stack)
    optimizer.step()
    fusedbun.save_state(optimizer, tmp_path / "state")
    with pytest.raises(ValueError, match=r"stacked=1 in the file, but with stacked=0 here"):
        fusedbun.load_state(FusedbunW([("p", stack)], lr=0.1), tmp_path / "state")
    other = FusedbunW([("p", stack.detach().permute(1, 0, 2).requires_grad_())], lr=0.1, stacked=1)
    with pytest.raises(ValueError, match="leave a stack's axes in front"):
        fusedbun.load_state(other, tmp_path / "state", {"p": ("p", (1, 0, 2))})
    turned = stack.detach().permute(0, 2, 1).contiguous().requires_grad_()
    other = FusedbunW([("p", turned)], lr=0.1, stacked=1, channel_axis=1)
    fusedbun.load_state(other, tmp_path / "state", {"p": ("p", (0, 2, 1))})
    before, after = optimizer.state[stack], other.state[turned]
    assert torch.equal(before["sm3_accumulate.axis1"].transpose(1, 2), after["sm3_accumulate.axis0"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_state_is_converted_slice_by_slice(dtype):
    stack, _, optimizer, _ = stack_and_slices(partial(recommended, momentum_dtype="int8"), (3, 4, 40), 1)
    other = recommended([stack], lr=0.01, stacked=1, momentum_dtype=dtype)
    with pytest.warns(UserWarning, match="converted"):
        other.load_state_dict(optimizer.state_dict(), convert=True)
    stack.grad = torch.ones_like(stack)
    other.step()
    one = next(key for key in other.state[stack] if key.startswith("momentum"))
    assert other.state[stack][one].shape[0] == 3


def test_gradients_can_be_released():
    layers = [torch.nn.Linear(4, 5), torch.nn.Linear(4, 5)]
    results = []
    for release in (False, True):
        stack = torch.stack([x.weight.detach() for x in layers]).requires_grad_()
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(stack)
        optimizer = FusedbunW(model.named_parameters(), lr=0.1, stacked=1)
        handle = fusedbun.release_gradients(model, optimizer) if release else None
        for _ in range(2):
            (model.weight * model.weight.detach().cos()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.weight.detach().clone())
        if handle:
            handle.remove()
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("stacked", "error", "text"),
    [
        (3, ValueError, r"stacked=3 says how many leading axes are a stack's, but a parameter of shape \(4, 5\) has 2"),
        (-1, ValueError, "stacked must be an integer from 0 up or a rule, but it is -1"),
        (1.0, TypeError, "stacked must be an integer from 0 up or a rule"),
        (lambda path, param: "all", TypeError, "stacked must be an integer"),
    ],
)
def test_what_is_no_number_of_axes_is_refused(stacked, error, text):
    with pytest.raises(error, match=text) as raised:
        FusedbunW([("weight", *parameters((4, 5)))], lr=0.1, stacked=stacked)
    if callable(stacked) or stacked == 3:
        assert raised.value.__notes__ == ["This is at parameter 'weight'."]


@pytest.mark.parametrize("implementation", ["kernel", "tiles", "definition"])
def test_what_was_stepped_as_a_stack_stays_one(implementation):
    (param,) = parameters((3, 4, 5))
    optimizer = FusedbunW([param], lr=0.1, stacked=1, implementation=implementation)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["stacked"] = 0
    with pytest.raises(ValueError, match=r"or what chooses its state \(stacked, channel_axis\), has changed"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_gradients_of_a_stack_are_dense():
    table = torch.nn.Embedding(6, 4, sparse=True)
    optimizer = SM3(table.parameters(), lr=0.1, stacked=1)
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(TypeError, match=r"a stack.*whose gradient must be dense"):
        optimizer.step()


@long
@pytest.mark.parametrize("momentum_dtype", [None, *CODED])
def test_compiled(momentum_dtype):
    make = partial(FusedbunW, momentum_dtype=momentum_dtype)
    found = [
        stack_and_slices(partial(make, implementation=i), (3, 4, 40), 1)[0].detach() for i in ("compiled", "kernel")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def cut_and_whole(rank):
    failures = []
    for name, make in {"fusedbunw": FusedbunW, "sm3": partial(SM3, momentum=0.9), "recommended": recommended}.items():
        for shape, stacked in (((5, 6, 64), 1), ((2, 2, 6, 64), 2), ((1, 4, 64), 1)):
            for cut in (Shard(0), Shard(1), Shard(2), Replicate()):
                mesh, results = init_device_mesh("cpu", (2,)), []
                for split in (partial(placed, mesh=mesh, placements=(cut,)), torch.clone):
                    p = split(parameters(shape)[0].detach()).requires_grad_()
                    optimizer = make([("p", p)], lr=0.01, stacked=stacked)
                    for step in range(3):
                        p.grad = split(gradient(torch.empty(shape), step))
                        optimizer.step()
                    results.append({"p": p.detach(), **optimizer.state[p]})
                    if name == "fusedbunw":  # whose codes are the same whole numbers, however they come about
                        other = make([("p", p)], lr=0.01, stacked=stacked, momentum_dtype="bfloat16")
                        other.load_state_dict(optimizer.state_dict(), convert=True)
                        results[-1]["converted"] = other.state[p]["momentum.moment"]
                is_exact = cut.is_replicate() or cut.dim < stacked
                for key, whole in results[1].items():
                    part = results[0][key]
                    if isinstance(part, torch.distributed.tensor.DTensor):
                        at = placement.cut(part)
                        whole = whole[tuple(slice(f, f + n) for f, n in zip(at.first, at.shape, strict=True))]
                        part = part.to_local()
                    near = torch.equal if is_exact else partial(torch.allclose, rtol=1e-4, atol=1e-5)
                    if part.shape != whole.shape or not near(part.float(), whole.float()):
                        failures.append(f"{name}, {shape}, {cut}: {key}")
    return failures


def test_two_processes_are_as_one(tmp_path: Path):
    assert run_in_processes(2, cut_and_whole, tmp_path) == [[], []]


def test_every_class_takes_it():
    for recipe in RECIPES.values():
        assert "stacked" in getattr(fusedbun, recipe.torch_class).__init__.__signature__.parameters
    ChainOptimizer([torch.zeros(2, 3)], [Momentum(0.9)], 0.1, stacked=1)
