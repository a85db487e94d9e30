"""Models of mixed precision: in one group bfloat16 parameters are rounded stochastically, and others to the nearest."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.distributed as dist
from makers import assert_same, gradient, parameters
from processes import placed
from sweeps import long, sweep
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fusedbun
import fusedbun_jax
from fusedbun import SM3, DecoupledLionW, FusedbunW, ScaledOptum, release_gradients
from fusedbun.tools.plan import Setting
from fusedbun.torch import IMPLEMENTATIONS

LEAVES = {
    "weight": ((6, 40), torch.bfloat16),
    "adapter": ((4, 33), torch.float32),
    "norm": ((9,), torch.float32),
    "sixteen": ((5, 3), torch.float16),
    "precise": ((3, 4), torch.float64),
    "head": ((7, 5), torch.bfloat16),
}
MAKE = {
    "sm3": partial(SM3, lr=0.01, momentum=0.9),
    "sm3 int8": partial(SM3, lr=0.01, momentum=0.9, momentum_dtype="int8", seed=3),
    "fusedbunw": partial(FusedbunW, lr=0.01, momentum_dtype=None),
    "scaled_optum": partial(ScaledOptum, lr=0.01),
    "decoupled_lionw": partial(DecoupledLionW, lr=0.01, momentum_dtype="param"),
}
CHANGES = ({}, {"lr": 0.02}, {"seed": 9}, {"lr": 0.005})  # of the group, before each step


def leaves_of(name):
    """The leaves for one of `MAKE`: codes are computed in float32, which a float64 parameter is not."""
    return [leaf for leaf in LEAVES if leaf != "precise" or "int8" not in name]


def made(make, names, split=torch.clone, **options):
    """An optimizer of these leaves, which are the same whichever others there are; and the leaves."""
    leaves = {name: parameters(LEAVES[name][0], dtype=LEAVES[name][1])[0] for name in names}
    params = {name: torch.nn.Parameter(split(p.detach())) for name, p in leaves.items()}
    return make(params.items(), **options), params


def gradient_of(name, step):
    shape, dtype = LEAVES[name]
    return gradient(torch.empty(shape, dtype=dtype), step, [*LEAVES].index(name))


def run(optimizer, params, split=torch.clone, changes=CHANGES):
    for step, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        for name, p in params.items():
            p.grad = split(gradient_of(name, step))
        optimizer.step()


def run_released(optimizer, params, split):
    with release_gradients(torch.nn.ParameterDict(params), optimizer):
        for step, change in enumerate(CHANGES):
            optimizer.param_groups[0].update(change)
            sum((p * gradient_of(name, step)).sum().double() for name, p in params.items()).backward()
            optimizer.step()


def check_mixed(make, names, split=torch.clone, run=run):
    """In one group every parameter becomes what it becomes in a group of its kind, and so does its state."""
    optimizer, params = made(make, names, split, stochastic_rounding=True)
    run(optimizer, params, split)
    kinds = {True: [name for name in names if LEAVES[name][1] == torch.bfloat16]}
    kinds[False] = [name for name in names if name not in kinds[True]]
    for is_rounded, of_kind in kinds.items():
        alone, same = made(make, of_kind, split, stochastic_rounding=is_rounded)
        run(alone, same, split)
        for name, p in same.items():
            assert_same(params[name].detach(), p.detach())
            assert list(optimizer.state[params[name]]) == list(alone.state[p])
            assert_same(dict(optimizer.state[params[name]]), dict(alone.state[p]))
            assert "step" in alone.state[p] or not is_rounded


@sweep(
    ("name", "implementation"),
    [
        (name, implementation)
        for name in MAKE
        for implementation in (None, *IMPLEMENTATIONS)
        if implementation != "compiled"
    ],
    short=lambda name, implementation: name == "sm3",
)
def test_each_is_rounded_as_in_a_group_of_its_kind(name, implementation):
    check_mixed(partial(MAKE[name], implementation=implementation), leaves_of(name))


@long
def test_compiled_too():
    make, leaves = partial(MAKE["scaled_optum"], implementation="compiled"), ["weight", "adapter", "norm"]
    check_mixed(make, leaves, run=partial(run, changes=CHANGES[:2]))


@sweep("name", MAKE, short=lambda name: name == "sm3")
def test_under_gradient_release(name):
    check_mixed(MAKE[name], leaves_of(name), run=run_released)


@pytest.fixture
def split():
    """Makes DTensors of one process."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield lambda x: placed(x, init_device_mesh("cpu", (1,)), [Shard(0)])
    dist.destroy_process_group()


@sweep(
    ("name", "implementation"),
    [(name, implementation) for name in MAKE for implementation in (None, "tiles")],
    short=lambda name, implementation: name == "sm3 int8",
)
def test_part_by_part(name, implementation, split):
    check_mixed(partial(MAKE[name], implementation=implementation), leaves_of(name), split)


def test_a_parameter_that_is_cast_is_rounded_by_its_new_dtype():
    optimizer, params = made(MAKE["scaled_optum"], ["weight", "adapter"], stochastic_rounding=True)
    run(optimizer, params, changes=({}, {}))
    weight, adapter = params.values()
    assert [optimizer.state[p].get("step") for p in (weight, adapter)] == [torch.full((1, 1), 2), None]
    weight.data, adapter.data = weight.data.float(), adapter.data.bfloat16()
    for p in (weight, adapter):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [optimizer.state[p].get("step") for p in (weight, adapter)] == [None, torch.full((1, 1), 1)]


def test_a_state_dict_goes_on():
    begun, params = made(MAKE["sm3 int8"], leaves_of("sm3 int8"), stochastic_rounding=True)
    run(begun, params)
    resumed, same = made(MAKE["sm3 int8"], leaves_of("sm3 int8"), stochastic_rounding=True)
    for name, p in same.items():
        p.data.copy_(params[name].data)
    resumed.load_state_dict(begun.state_dict())
    for optimizer, leaves in ((begun, params), (resumed, same)):
        run(optimizer, leaves)
    for name, p in same.items():
        assert_same((p.detach(), dict(resumed.state[p])), (params[name].detach(), dict(begun.state[params[name]])))


def test_a_file_goes_on_in_jax_to_the_bit(tmp_path):
    names = ["weight", "adapter", "norm", "head"]
    optimizer, params = made(MAKE["sm3 int8"], names, stochastic_rounding=True)
    run(optimizer, params, changes=({}, {}))
    fusedbun.save_state(optimizer, tmp_path / "state")
    tx = fusedbun_jax.sm3(0.01, 0.9, momentum_dtype="int8", stochastic_rounding=True, seed=3)
    theirs = {name: jnp.array(p.detach().float().numpy(), str(p.dtype)[6:]) for name, p in params.items()}
    state = fusedbun_jax.load_state(tmp_path / "state", tx, tx.init(theirs), theirs)
    grads = {}
    for name, p in params.items():
        p.grad = gradient_of(name, 7)
        grads[name] = jnp.array(p.grad.float().numpy(), theirs[name].dtype)
    optimizer.step()
    theirs, _ = tx.step(grads, state, theirs)
    for name, p in params.items():
        np.testing.assert_array_equal(np.asarray(theirs[name], np.float32), p.detach().float().numpy(), name)


@pytest.mark.parametrize("name", MAKE)
def test_the_plan_is_what_is_kept(name):
    optimizer, params = made(partial(MAKE[name], implementation="definition"), LEAVES, stochastic_rounding=True)
    run(optimizer, params)
    kept = sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values())
    shapes = {leaf: (shape, str(dtype).removeprefix("torch.")) for leaf, (shape, dtype) in LEAVES.items()}
    given = {key: x for key, x in MAKE[name].keywords.items() if key not in ("lr", "seed")}
    plan = fusedbun.plan(shapes, Setting(name.partition(" ")[0], given))
    assert [one.state for one in plan.estimates] == [kept] * 2
