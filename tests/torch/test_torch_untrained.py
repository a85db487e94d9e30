"""Parameters that are never trained: they are handed over, saved and loaded, and judged when one gets a gradient."""

import copy

import pytest
import torch
from makers import assert_same_run, copies, every_optimizer, parameters, run, set_gradients, unchanged
from torch import nn

import fusedbun
from fusedbun import FusedbunW, MupAdamW, ScaledOptum, TernaryVote, release_gradients

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch will remove them one day
ODD = {
    "int": lambda: nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False),
    "4 bits": lambda: nn.Parameter(torch.ones(3, 1, dtype=torch.uint8), requires_grad=False),
    "quantized": lambda: nn.Parameter(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), False),
    "lazy": nn.UninitializedParameter,
    "meta": lambda: nn.Parameter(torch.ones(2, 2, device="meta")),
    "complex": lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)),
    "float8": lambda: nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False),
    "frozen": lambda: nn.Parameter(torch.full((2, 2), 0.3), requires_grad=False),
}


class Model(nn.Module):
    """The parameters, and the odd ones between them."""

    def __init__(self, params):
        super().__init__()
        for i, p in enumerate(params):
            self.register_parameter(f"w{i}", nn.Parameter(p.detach().clone()))
            for name, make in ODD.items():
                self.register_parameter(f"{name} {i}", make())


@every_optimizer
def test_they_change_nothing_for_the_others(make):
    params = parameters((4, 3), (5,))
    models = [Model(copies(params)) for _ in range(2)]
    alone, among = (
        make([(f"w{i}", p) for i, p in enumerate(copies(params))], lr=0.1),
        make(models[0].named_parameters(), lr=0.1),
    )
    trained = [models[0].w0, models[0].w1]
    for step in range(3):
        set_gradients(alone.param_groups[0]["params"], step)
        set_gradients(trained, step)
        alone.step()
        among.step()
    for p, q in zip(trained, alone.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert set(among.state) <= set(trained)
    assert repr(among)


@every_optimizer
def test_they_are_saved_loaded_and_copied_with_the_others(make, tmp_path):
    model = Model(parameters((4, 3)))
    optimizer = make(model.named_parameters(), lr=0.1)
    model.w0.grad = torch.ones(4, 3)
    optimizer.step()
    others = [make(Model(copies([model.w0])).named_parameters(), lr=0.1) for _ in range(2)]
    others[0].load_state_dict(optimizer.state_dict())
    fusedbun.save_state(optimizer, tmp_path / "state.safetensors")
    fusedbun.load_state(others[1], tmp_path / "state.safetensors")
    for other in others:
        (p, *_), (w, *_) = (o.param_groups[0]["params"] for o in (other, optimizer))
        p.grad = w.grad = torch.full((4, 3), 0.5)
        for key, value in optimizer.state[w].items():
            assert torch.equal(other.state[p][key], value)
    copy.deepcopy(optimizer).step()


@every_optimizer
def test_release_takes_them_for_what_they_are(make):
    model = Model(parameters((4, 3)))
    wanted = make([("w0", *copies([model.w0]))], lr=0.1)
    optimizer = make(model.named_parameters(), lr=0.1)
    (w,) = wanted.param_groups[0]["params"]
    with release_gradients(model, optimizer):
        for _ in range(2):
            for p in (model.w0, w):
                (p * torch.arange(12.0).reshape(4, 3)).sum().backward()
            assert model.w0.grad is None
            optimizer.step()
            wanted.step()
            wanted.zero_grad()
    torch.testing.assert_close(model.w0, w, rtol=0, atol=0)


@every_optimizer
def test_a_lazy_parameter_is_trained_once_it_has_a_shape(make):
    layer, plain = nn.LazyLinear(2), nn.Linear(3, 2)
    optimizer = make(layer.parameters(), lr=0.1)
    optimizer.step()
    layer(torch.ones(1, 3))
    layer.load_state_dict(plain.state_dict())
    wanted = make(plain.parameters(), lr=0.1)
    run(optimizer, 2)
    run(wanted, 2)
    assert_same_run(optimizer, wanted)
    late = make(nn.LazyLinear(2).parameters(), lr=0.1)
    if wanted.state:
        with pytest.raises(ValueError, match="parameter 0 of group 0, which has no shape yet"):
            late.load_state_dict(wanted.state_dict())
        assert not late.state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: TernaryVote(params), "steps weights of -1, 0 and .1, but parameter 'frozen' "),
        (lambda params: MupAdamW(params, mup={"w": "weight"}), "parameter 'frozen' .* has no u-muP type"),
        (lambda params: FusedbunW(params, channel_axis=lambda path, p: {"w": 0}.get(path[0], 9)), r"channel_axis must"),
    ],
)
def test_rules_and_values_are_asked_of_a_parameter_that_is_unfrozen(make, message):
    w, frozen = nn.Parameter(torch.ones(3, 2)), ODD["frozen"]()
    optimizer = make([("w", w), ("frozen", frozen)])
    for _ in range(2):
        w.grad = torch.ones(3, 2)
        optimizer.step()
    frozen.requires_grad_().grad = torch.ones(2, 2)
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


def test_what_has_no_shape_has_no_memory():
    optimizer = ScaledOptum([nn.Parameter(torch.ones(2**18)), nn.UninitializedParameter()])
    assert optimizer.get_memory_mb() == 1.0


def test_plans_count_quantized_parameters():
    model = Model(parameters((4, 3)))
    del model._parameters["lazy 0"], model._parameters["complex 0"]
    (plan, *_) = fusedbun.plan(model, "fusedbunw").estimates
    assert plan.weights == 4 * 12 + 4 * 3 + 3 + 3 + 4 * 4 + 2 + 4 * 4
