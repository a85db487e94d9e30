"""The optimizers equal those that others wrote, step by step; and where they must not, a test shows the other's fault.

The largest differences seen, relative to a parameter's largest element: 5e-15 in float64 (Adam, for torch rounds
`1 - 0.999**n`; 1e-15 elsewhere) and 9e-7 in float32.
"""

import copy
import functools

import pytest
import SM3 as torch_sm3  # noqa: N811
import torch
import unit_scaling as uu
from lion_pytorch import Lion
from makers import gradient, parameters
from sweeps import only, sweep
from torch.optim.lr_scheduler import LambdaLR
from unit_scaling.parameter import has_parameter_data

from fusedbun import SM3, DecoupledLionW, MupAdam, MupAdamW, MupSGD, ScaledOptum, chain
from fusedbun.reference import Reference
from fusedbun.transforms import RMSScale, SM3Accumulate

SHAPES = ((), (17,), (5, 4), (1, 6), (3, 4, 5), (4, 3, 2, 2))
STEPS = 20
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-15}, torch.float32: {"rtol": 2e-6, "atol": 1e-6}}


def up_and_down(step):
    """A schedule with a warmup that starts at 1, so that the first learning rate is the given one."""
    return 1.0 + 0.2 * step if step < 5 else 2.0 * 0.8 ** (step - 5)


def assert_equal_runs(make_ours, make_theirs, params, schedule=None):
    """Steps both with equal gradients, under one schedule, and compares their parameters after every step."""
    start, others = copy.deepcopy(params), copy.deepcopy(params)
    ours, theirs = make_ours(params), make_theirs(others)
    schedulers = [LambdaLR(o, schedule) for o in (ours, theirs)] if schedule else []
    for step in range(STEPS):
        scale = 10.0 ** (step % 5 - 2)
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = scale * gradient(p, step, i)
            q.grad = p.grad.clone()
        for part in (ours, theirs, *schedulers):
            part.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), **CLOSE[p.dtype])
    assert all((p != q).any() for p, q in zip(params, start, strict=True))


# SM3


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sm3_equals_torch_sm3(momentum, beta, dtype):
    options = {"lr": 0.1, "momentum": momentum, "beta": beta}
    assert_equal_runs(
        lambda p: SM3(p, **options),
        lambda p: torch_sm3.SM3(p, **options),
        parameters(*SHAPES, dtype=dtype),
        up_and_down,
    )


def test_the_defaults_of_sm3_are_torch_sm3s():
    assert_equal_runs(SM3, torch_sm3.SM3, parameters(*SHAPES, dtype=torch.float64))


sparse = functools.partial(torch.sparse_coo_tensor, check_invariants=True)


def lookup(embedding, rows):
    embedding.zero_grad()
    embedding(torch.tensor(rows)).pow(2).sum().backward()


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_torch_sm3_fails_on_an_embeddings_sparse_gradients(beta):
    """Its accumulators are one number for each row, which it then adds to whole rows; ours steps."""
    embedding = torch.nn.Embedding(7, 4, sparse=True)
    theirs, ours = torch_sm3.SM3(embedding.parameters(), beta=beta), SM3(embedding.parameters(), beta=beta)
    lookup(embedding, [1, 4, 4])
    with pytest.raises(RuntimeError):
        theirs.step()
    ours.step()


def test_torch_sm3_forgets_the_rows_that_a_sparse_gradient_leaves_out():
    """With beta 0, seen where it does not fail: in a parameter of one axis. Ours keeps them."""
    (p,) = parameters((5,), dtype=torch.float64)
    theirs, ours = torch_sm3.SM3([p]), SM3([p])
    for rows in ([0, 1], [1, 2]):
        p.grad = sparse([rows], torch.ones(2, dtype=torch.float64), (5,))
        theirs.step()
        ours.step()
    assert theirs.state[p]["accumulator_0"].tolist() == [0, 2, 1, 0, 0]
    assert ours.state[p]["sm3_accumulate.axis0"].tolist() == [1, 2, 1, 0, 0]


@pytest.mark.parametrize("shape", [(9,), (9, 4), (9, 3, 2)])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_sparse_sm3_is_the_dense_rule_with_the_row_cover(beta, shape):
    (p,) = parameters(shape, dtype=torch.float64)
    optimizer = SM3([p], lr=0.3, beta=beta)
    wanted = Reference({"p": p.detach().numpy()}, chain(SM3Accumulate(beta, covers="rows"), RMSScale(0.0, 1e-30)), 0.3)
    for step in range(STEPS):
        rows = torch.randint(9, (4,), generator=torch.Generator().manual_seed(step))  # some of them twice
        p.grad = sparse(rows[None], gradient(p, step)[:4], shape)
        untouched = [row for row in range(9) if row not in rows]
        before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
        wanted.step({"p": p.grad.to_dense().numpy()})
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor(wanted.params["p"]), rtol=1e-13, atol=1e-15)
        assert torch.equal(p.detach()[untouched], before[untouched])
        assert (p.detach()[rows] != before[rows]).all()
        for key, old in state.items():
            assert torch.equal(optimizer.state[p][key][untouched], old[untouched])
    accumulator = optimizer.state[p]["sm3_accumulate.axis0"]
    assert accumulator.numel() == 9
    torch.testing.assert_close(accumulator, torch.tensor(wanted.state["p"]["sm3_accumulate.axis0"]), rtol=1e-13, atol=0)


# u-muP


class Network(torch.nn.Module):
    """Every kind of parameter that unit-scaling makes, with and without a depth."""

    def __init__(self):
        super().__init__()
        self.embedding = uu.Embedding(11, 8)
        self.layers = uu.DepthSequential(*(uu.Linear(8, 8, bias=True) for _ in range(3)))
        self.norm = uu.LayerNorm(8, elementwise_affine=True)
        self.convolution = uu.Conv1d(8, 6, kernel_size=3, bias=True)
        self.readout = uu.LinearReadout(6, 5)


def unit_scaled_parameters(dtype):
    torch.manual_seed(0)
    params = list(Network().to(dtype).parameters())
    assert all(has_parameter_data(p) for p in params)
    assert {p.mup_type for p in params} == {"weight", "bias", "norm", "output"}
    assert {p.mup_scaling_depth for p in params} == {None, 3}
    assert {p.ndim for p in params} == {1, 2, 3}
    return params


ADAM = [{}, {"amsgrad": True}, {"betas": (0.8, 0.9), "eps": 1e-3}, {"maximize": True}]
SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"dampening": 0.5},
    {"momentum": 0.9, "readout_constraint": "to_output_scale"},
    {"readout_constraint": "to_output_scale", "maximize": True},
]
FAMILY = [
    *((MupAdam, uu.optim.Adam, options) for options in ADAM),
    *((MupAdamW, uu.optim.AdamW, options) for options in ADAM),
    *((MupSGD, uu.optim.SGD, options) for options in SGD),
]
every_one_of_unit_scaling = pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    FAMILY,
    ids=[f"{theirs.__name__}-{'-'.join(options)}" for _, theirs, options in FAMILY],
)


@pytest.mark.parametrize("independent", [True, False])
@sweep("weight_decay", [0.0, 0.01], short=only(0.01))
@every_one_of_unit_scaling
def test_mup_equals_unit_scaling(ours, theirs, options, weight_decay, independent):
    """Under a schedule, which the decay follows in either mode."""
    options = {"lr": 0.02, "weight_decay": weight_decay, "independent_weight_decay": independent, **options}
    assert_equal_runs(
        lambda p: ours(p, **options), lambda p: theirs(p, **options), unit_scaled_parameters(torch.float64), up_and_down
    )


@every_one_of_unit_scaling
def test_mup_equals_unit_scaling_in_float32(ours, theirs, options):
    assert_equal_runs(
        lambda p: ours(p, **options), lambda p: theirs(p, **options), unit_scaled_parameters(torch.float32)
    )


def test_mup_equals_unit_scaling_in_groups():
    """Each with a learning rate and a decay of its own; theirs makes one group of each parameter, ours keeps two."""

    def groups(params):
        return [{"params": params[:4], "lr": 0.05, "weight_decay": 0.03}, {"params": params[4:]}]

    assert_equal_runs(
        lambda p: MupAdamW(groups(p), lr=0.01),
        lambda p: uu.optim.AdamW(groups(p), lr=0.01),
        unit_scaled_parameters(torch.float64),
        up_and_down,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        *((MupAdam, torch.optim.Adam, options) for options in ADAM),
        *((MupAdamW, torch.optim.AdamW, options) for options in ADAM),
        *((MupSGD, torch.optim.SGD, options) for options in SGD if "readout_constraint" not in options),
    ],
)
def test_without_types_mup_is_torchs_own(ours, theirs, options, weight_decay):
    options = {"lr": 0.02, "weight_decay": weight_decay, **options}
    assert_equal_runs(
        lambda p: ours(p, independent_weight_decay=False, allow_non_unit_scaling_params=True, **options),
        lambda p: theirs(p, **options),
        parameters(*SHAPES, dtype=torch.float64),
        up_and_down,
    )


# Lion and signs


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_decoupled_lionw_equals_lion_pytorch(weight_decay, decoupled):
    """lion-pytorch multiplies by `1 - lr*weight_decay`, where ours is relative to the first learning rate."""
    lr, betas = 0.003, (0.85, 0.97)
    theirs = {"weight_decay": weight_decay if decoupled else weight_decay / lr, "decoupled_weight_decay": decoupled}
    assert_equal_runs(
        lambda p: DecoupledLionW(p, lr, betas, weight_decay),
        lambda p: Lion(p, lr, betas, **theirs),
        parameters(*SHAPES, dtype=torch.float64),
        up_and_down,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_scaled_optum_is_its_formula(weight_decay):
    params = parameters(*SHAPES, dtype=torch.float64)
    optimizer = ScaledOptum(params, 0.03, weight_decay)
    for step in range(STEPS):
        wanted = []
        for i, p in enumerate(params):
            p.grad = gradient(p, step, i)
            wanted.append(p.detach() + -0.03 * (torch.sign(p.grad) + weight_decay * torch.sign(p.detach())))
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in params], wanted, rtol=1e-15, atol=1e-17)
