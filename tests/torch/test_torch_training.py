"""The optimizers train: losses fall, frozen parameters rest, and parameters may join later."""

import pytest
import torch
from makers import MAKERS, SHAPES, assert_same, assert_same_run, copies, every_optimizer, gradient, parameters, run

from fusedbun import Fusedbun

# Learning rates that suit a small network, and ten times as much a parabola.
RATES = {"sm3": 0.1, "mup-adam": 0.1, "mup-adamw": 0.1, "mup-sgd": 0.3}
every_optimizer_at_its_rate = pytest.mark.parametrize(
    ("make", "lr"), [(make, RATES.get(name, 0.01)) for name, make in MAKERS.items()], ids=MAKERS.keys()
)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)
    )


def train(model, optimizer, steps):
    """Fits fixed random images to fixed labels; returns the loss before each step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 1, 8, 8, generator=generator)
    labels = torch.randint(3, (24,), generator=generator)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_optimizer_at_its_rate
def test_a_network_learns(make, lr):
    model = network()
    losses = train(model, make(model.parameters(), lr=lr), 40)
    assert losses[-1] < 0.25 * losses[0]


@every_optimizer_at_its_rate
def test_a_parabola_is_descended_to_its_minimum(make, lr):
    (x,) = parameters((3, 2), dtype=torch.float64)
    minimum = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)
    optimizer = make([x], lr=10 * lr)
    still = {"Lambda": 0.0, "weight_decay": 0.0, "centralize": False}  # these move or hold the minimum
    optimizer.param_groups[0].update({name: value for name, value in still.items() if name in optimizer.defaults})
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=400)
    for _ in range(400):
        x.grad = (x - minimum).detach()
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(x.detach(), minimum, rtol=0.0, atol=2e-3)


@every_optimizer
def test_two_runs_are_equal(make):
    models = network(), network()
    optimizers = [make(model.parameters(), lr=0.01) for model in models]
    assert train(models[0], optimizers[0], 5) == train(models[1], optimizers[1], 5)
    assert_same_run(*optimizers)


@every_optimizer
def test_a_frozen_parameter_has_no_state_and_does_not_move(make):
    model = network()
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model[0].parameters()]
    optimizer = make(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    assert_same([p.detach() for p in model[0].parameters()], before)
    assert set(optimizer.state) == set(model[3].parameters())


@every_optimizer
def test_a_parameter_starts_when_it_first_has_a_gradient(make):
    """And rests, with its state, while it has none."""
    params = parameters((4, 3), (2, 3, 4))
    optimizer, late = make(params, lr=0.1), make(copies(params[1:]), lr=0.1)
    (q,) = late.param_groups[0]["params"]
    for step, present in enumerate([False, False, True, True, False, True]):
        params[0].grad = gradient(params[0], step)
        params[1].grad = gradient(params[1], step) if present else None
        optimizer.step()
        assert (params[1] in optimizer.state) == (step >= 2)
        if present:
            q.grad = gradient(q, step)
            late.step()
    assert_same(params[1].detach(), q.detach())
    assert_same(optimizer.state[params[1]], late.state[q])
    alone = make(parameters((4, 3)), lr=0.1)
    run(alone, 6)
    assert_same(params[0].detach(), alone.param_groups[0]["params"][0].detach())


@every_optimizer
def test_a_parameter_shared_by_two_layers_is_stepped_once(make):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    (other,) = copies([model[0].weight])
    optimizer, wanted = make(model.parameters(), lr=0.1), make([other], lr=0.1)
    run(optimizer, 2)
    run(wanted, 2)
    assert_same_run(optimizer, wanted)


@every_optimizer
def test_parameters_are_stepped_in_place(make):
    """So that views and other holders of their memory, such as a flattened buffer, see the step."""
    flat = torch.randn(10)
    views = [flat[:6].view(2, 3), flat[6:]]
    params = [view.detach().requires_grad_() for view in views]
    optimizer, wanted = make(params, lr=0.1), make(copies(params), lr=0.1)
    run(optimizer, 2)
    run(wanted, 2)
    assert_same(flat, torch.cat([p.detach().flatten() for p in wanted.param_groups[0]["params"]]))


@every_optimizer
def test_state_is_written_in_place(make):
    """Its memory stays where it is, as captured graphs need."""
    optimizer = make(parameters(*SHAPES), lr=0.1)
    run(optimizer, 1)
    before = {(p, key): value.data_ptr() for p, slots in optimizer.state.items() for key, value in slots.items()}
    run(optimizer, range(1, 3))
    after = {(p, key): value.data_ptr() for p, slots in optimizer.state.items() for key, value in slots.items()}
    assert after == before


def test_recommended_settings_train_better_than_none():
    """Scaled updates reach in 15 steps what unscaled ones, with the same learning rate, do not."""
    plain, scaled = network(), network()
    bare = train(plain, Fusedbun(plain.parameters(), 1e-3), 15)
    rms = train(scaled, Fusedbun(scaled.parameters(), 1e-3, centralize=True, use_rms=True, nesterov=True), 15)
    assert rms[-1] < bare[-1]
