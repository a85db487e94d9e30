"""Parameters that FSDP1 has flattened: elementwise rules step them, and what needs a parameter's axes is refused."""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from makers import MAKERS, assert_same, gradient, unchanged
from processes import run_in_processes
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fusedbun import ChainOptimizer, DecoupledLionW, MupAdam, MupSGD, ScaledOptum, Signal, TernaryVote, Transform
from fusedbun.transforms import Centralize, Clip, ClipRMS, Momentum, SM3Accumulate


@dataclass(frozen=True)
class Unknown(Transform):
    """A rule by a method of torch's, which cannot be traced: nothing is known of what it reads."""

    name: ClassVar[str] = "unknown"
    weights: Any = 1.0

    def update(self, xp, signal, state, param):
        return Signal(signal.update.abs()), state


@dataclass(frozen=True)
class Counted(Transform):
    """A rule that reads how long an axis is."""

    name: ClassVar[str] = "counted"

    def update(self, xp, signal, state, param):
        return Signal(signal.update / param.shape[0]), state


def chain(*transforms, **options):
    return partial(ChainOptimizer, transforms=transforms, **options)


SERVED = {
    "lion": partial(DecoupledLionW, weight_decay=1e-4),
    "lion int8": partial(DecoupledLionW, momentum_dtype="int8"),
    "scaled-optum": partial(ScaledOptum, weight_decay=0.1),
    "adam": partial(MupAdam, weight_decay=0.1, mup=lambda path, param: ("norm", 4)),
    "sgd": partial(MupSGD, momentum=0.9, mup=lambda path, param: "output"),
    "chain": chain(Clip(0.5), Momentum(0.9, bias_correction=True, dampening=0.9)),
}
# Others, with what needs the axes of a parameter.
REFUSED = {
    "fusedbun": (MAKERS["fusedbun"], "sm3_accumulate"),
    "fusedbun-recommended": (MAKERS["fusedbun-recommended"], "centralize, sm3_accumulate"),
    "fusedbun-clipped-lagged": (MAKERS["fusedbun-clipped-lagged"], "sm3_accumulate, clip_rms"),
    "sm3-momentum": (MAKERS["sm3-momentum"], "sm3_accumulate"),
    "fusedbunw": (MAKERS["fusedbunw"], "sm3_accumulate"),
    "adam": (partial(MupAdam, mup=lambda path, param: "weight"), "scale_by_mup"),
    "adam by axes": (MAKERS["mup-adam"], "scale_by_mup"),
    "sgd": (partial(MupSGD, mup=lambda path, param: "norm", readout_constraint="to_output_scale"), "scale_by_mup"),
    "rows": (chain(SM3Accumulate(0.9, covers="rows")), "sm3_accumulate"),
    "centralize": (chain(Centralize(), Momentum(0.9)), "centralize"),
    "clip_rms": (chain(Momentum(0.9), ClipRMS(0.5)), "clip_rms"),
    "counted": (chain(Counted()), "counted"),
    "unknown": (chain(Momentum(0.9), Unknown(), implementation="definition"), "unknown"),
    "no key": (chain(Momentum(0.9), Unknown([1.0]), implementation="definition"), "momentum, unknown"),
    "stacked": (partial(DecoupledLionW, stacked=1), "stacked"),
}


TRAINED = ("lion", "adam", "chain")  # with FSDP1 itself


def flattened(size=6, ndim=1):
    """A parameter as FSDP1 marks it, with a gradient."""
    param = nn.Parameter(torch.ones((size,) * ndim))
    param._fsdp_flattened = True
    param.grad = gradient(param, 0)
    return param


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
def test_what_steps_each_element_by_itself_is_served(make):
    param, plain = flattened(), nn.Parameter(torch.ones(6))
    plain.grad = param.grad.clone()
    for p in (param, plain):
        make([p], lr=0.1).step()
    assert_same(param.detach(), plain.detach())


def test_ternary_weights_are_served():
    param = flattened()
    TernaryVote([param], threshold=1).step()
    assert_same(param.detach(), torch.where(param.grad > 0, 0.0, 1.0))


@pytest.mark.parametrize(("make", "readers"), REFUSED.values(), ids=REFUSED)
def test_what_needs_axes_is_refused_when_it_first_has_a_gradient(make, readers):
    param = flattened()
    grad, param.grad = param.grad, None
    whole = nn.Parameter(torch.ones(6))
    optimizer = make([("flat", param), ("whole", whole)], lr=0.1)
    optimizer.step()
    param.grad, whole.grad = grad, grad.clone()
    message = (
        rf"{type(optimizer).__name__} cannot step parameter 'flat', which FullyShardedDataParallel has flattened: "
        rf"{readers} must see a parameter's axes; shard the model with torch.distributed.fsdp.fully_shard"
    )
    with unchanged(optimizer), pytest.raises(TypeError, match=message):
        optimizer.step()
    param.grad = None
    optimizer.step()
    assert (whole != 1).any()


@pytest.mark.parametrize("name", MAKERS)
def test_every_optimizer_is_served_or_refused(name):
    """As its step is the same, or another, for what has been flattened and for what has not."""
    matrix = nn.Parameter(torch.ones(4, 3))
    matrix.grad = gradient(matrix, 0)
    flat = nn.Parameter(matrix.detach().flatten().clone())
    flat.grad = matrix.grad.flatten()
    optimizers = [MAKERS[name]([p], lr=0.1) for p in (matrix, flat)]
    for optimizer in optimizers:
        optimizer.step()
    kept = [
        {key: x.numel() for key, x in optimizer.state_dict()["state"].get(0, {}).items()} for optimizer in optimizers
    ]
    is_same = torch.equal(matrix.flatten(), flat) and kept[0] == kept[1]
    optimizer = MAKERS[name]([flattened()], lr=0.1)
    if is_same:
        optimizer.step()
    else:
        with pytest.raises(TypeError, match="has flattened"):
            optimizer.step()


def test_parameters_that_are_not_sharded_have_their_axes():
    """As under NO_SHARD with use_orig_params=True."""
    param = flattened(3, 2)
    MAKERS["fusedbun-recommended"]([param], lr=0.1).step()
    assert (param != 1).any()


# With FSDP1 itself


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(model, optimizer, steps=3):
    for step in range(steps):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(make, use_orig_params, backwards=False):
    wrap = ModuleWrapPolicy({nn.Linear})
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(network(), auto_wrap_policy=wrap, use_orig_params=use_orig_params, device_id=cpu)
    return model, make([*model.named_parameters()][:: -1 if backwards else 1], lr=0.01)


def whole(model):
    with FullyShardedDataParallel.summon_full_params(model):
        return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def check_checkpoint(model, optimizer, again, resumed):
    """FSDP1 numbers the parameters itself, and leaves `param_names` in the order that was saved."""
    saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, resumed, saved))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert_same(dict(optimizer.state.get(p, {})), dict(resumed.state.get(q, {})))


def under_fsdp1(rank):
    found = {}
    for name, use_orig_params in product(TRAINED, (False, True)):
        model, optimizer = sharded(SERVED[name], use_orig_params)
        train(model, optimizer)
        found[name, use_orig_params] = [*whole(model).values()]
        if name == "lion":
            check_checkpoint(model, optimizer, *sharded(SERVED[name], use_orig_params, backwards=True))
    for use_orig_params in (False, True):
        model, optimizer = sharded(MAKERS["fusedbun-recommended"], use_orig_params)
        with pytest.raises(
            TypeError, match=r"'.*', which FullyShardedDataParallel has flattened: centralize, sm3_accu"
        ):
            train(model, optimizer)
    return found


def test_a_network_trains_under_fsdp1_as_it_does_alone(tmp_path):
    """In flat parameters, and in the views of them that the parameters become with use_orig_params=True."""
    (found, _) = run_in_processes(2, under_fsdp1, tmp_path)
    for (name, _), params in found.items():
        model = network()
        train(model, SERVED[name](model.named_parameters(), lr=0.01))
        assert_same(params, [p.detach() for p in model.parameters()])
