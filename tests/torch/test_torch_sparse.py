"""SM3 with sparse gradients: a step reads and writes the touched rows only. What it computes: test_torch_oracles.py."""

import copy
import functools
import math
import pickle
import warnings

import pytest
import torch
from makers import assert_same, assert_same_run, copies, gradient, parameters, states, unchanged
from test_torch_checkpoint import through_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedbun import SM3, ChainOptimizer, MupSGD
from fusedbun.transforms import RMSScale, SM3Accumulate

sparse = functools.partial(torch.sparse_coo_tensor, check_invariants=True)


def touch(param, rows, step=0):
    """Gives the parameter a gradient in these rows."""
    param.grad = sparse([rows], gradient(param, step).repeat(4, *[1] * (param.ndim - 1))[: len(rows)], param.shape)


def stepped(rows_of_steps, shape=(6, 3), **options):
    """An optimizer of one parameter, after steps that touch these rows."""
    (param,) = parameters(shape)
    optimizer = SM3([param], **options)
    for step, rows in enumerate(rows_of_steps):
        touch(param, rows, step)
        optimizer.step()
    return optimizer, param


class Allocations(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, those apart that exist already."""

    def __init__(self, *existing):
        super().__init__()
        self.existing, self.largest = {x.untyped_storage().data_ptr() for x in existing}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in (x for x in tree_leaves(made) if isinstance(x, torch.Tensor)):
            for part in (x._indices(), x._values()) if x.is_sparse else (x,):
                if part.untyped_storage().data_ptr() not in self.existing:
                    self.largest = max(self.largest, part.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_step_on_a_large_table_takes_memory_for_the_touched_rows_only(kind):
    """A million rows of 64, of which a thousand are touched: no tensor above 256 kB; the dense rule's are whole."""
    n, width, touched = {"sparse": 1_000_000, "dense": 100_000}[kind], 64, 1_000
    param = torch.zeros(n, width, requires_grad=True)
    optimizer = SM3([param], implementation="definition")
    rows = torch.arange(touched) * (n // touched)
    param.grad = sparse(rows[None], torch.ones(touched, width), (n, width))
    if kind == "dense":
        param.grad = param.grad.to_dense()
    optimizer.step()
    state = optimizer.state[param].values()
    with Allocations(param, param.grad, *state) if kind == "dense" else Allocations(param, *state) as made:
        optimizer.step()
    size = {"sparse": touched, "dense": n}[kind] * width * 4
    assert made.largest == size
    assert sum(x.untyped_storage().nbytes() for x in state) == 4 * {"sparse": n, "dense": n + width}[kind]
    assert int((param != 0).any(1).sum()) == touched


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2)])
def test_the_state_is_one_number_for_each_row(shape):
    optimizer, param = stepped([[0, 2]], shape)
    assert {key: value.shape for key, value in optimizer.state[param].items()} == {
        "sm3_accumulate.axis0": (6, *[1] * (len(shape) - 1))
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_repeated_rows_are_summed_first(dtype):
    """In float32 at least: a sum of ones in bfloat16 ends at 256."""
    often, once = (torch.zeros(3, 2, dtype=dtype, requires_grad=True) for _ in range(2))
    often.grad = sparse([[1] * 1000], torch.ones(1000, 2, dtype=dtype), (3, 2))
    once.grad = sparse([[1]], torch.full((1, 2), 1000.0, dtype=dtype), (3, 2))
    optimizers = [SM3([p], lr=0.5) for p in (often, once)]
    for optimizer in optimizers:
        optimizer.step()
    assert_same_run(*optimizers)
    assert optimizers[0].state[often]["sm3_accumulate.axis0"].flatten().tolist() == [0, 1e6, 0]
    assert not often.grad.is_coalesced()  # a gradient is only read


def test_an_embedding_trains():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer, wanted = SM3(embedding.parameters(), lr=0.3), torch.randn(3, 4)
    start, losses = embedding.weight.detach().clone(), []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (embedding(torch.tensor([1, 5, 9])) - wanted).pow(2).mean()
        loss.backward()
        assert embedding.weight.grad.is_sparse
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]
    untouched = [row for row in range(10) if row not in (1, 5, 9)]
    assert_same(embedding.weight.detach()[untouched], start[untouched])


def test_momentum_is_left_out_with_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer, param = stepped([[0, 1], [1, 2], [3]], momentum=0.9)
        other = parameters((4, 2))[0]
        optimizer.add_param_group({"params": other})
        touch(other, [1])
        optimizer.step()
    assert [str(warning.message) for warning in caught] == [
        "SM3: momentum is left out for parameters with sparse gradients, for it would go on in rows that no gradient "
        "touches"
    ]
    assert caught[0].filename == __file__
    assert list(optimizer.state[param]) == ["sm3_accumulate.axis0"]
    # The update is what SM3 does without a momentum, but for its damping, which goes with it.
    plain, alone = stepped([[0, 1], [1, 2], [3]])
    touch(alone, [3], 2)
    plain.step()
    assert_same(param.detach(), alone.detach())


def test_dense_parameters_of_the_same_group_keep_their_momentum():
    dense, table = parameters((4, 3), (6, 3))
    optimizer, alone = SM3([dense, table], momentum=0.9), SM3(copies([dense]), momentum=0.9)
    (wanted,) = alone.param_groups[0]["params"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SM3: momentum is left out")
        for step in range(3):
            dense.grad, wanted.grad = gradient(dense, step), gradient(dense, step)
            touch(table, [step], step)
            optimizer.step()
            alone.step()
    assert_same(dense.detach(), wanted.detach())
    assert_same(optimizer.state[dense], alone.state[wanted])


def test_an_empty_gradient_changes_nothing():
    optimizer, param = stepped([[0, 2]])
    param.grad = sparse(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 3), (6, 3))
    with unchanged(optimizer):
        optimizer.step()
    assert states(SM3([param])) == []


@pytest.mark.parametrize("first", ["sparse", "dense"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2)])
def test_a_gradient_of_the_other_kind_is_refused_and_changes_nothing(shape, first):
    (param,), (other,) = parameters(shape), parameters((2, 2))
    optimizer = SM3([other, param])

    def give(kind, step):
        other.grad, param.grad = gradient(other, step), gradient(param, step)
        if kind == "sparse":
            touch(param, [0, 2], step)

    give(first, 0)
    optimizer.step()
    second = {"sparse": "dense", "dense": "sparse"}[first]
    give(second, 1)
    with unchanged(optimizer), pytest.raises(ValueError, match=r"parameter 1 of group 0 .* all dense or all sparse"):
        optimizer.step()
    del optimizer.state[param]  # as the message advises
    optimizer.step()


def test_a_tied_embedding_is_dense_where_both_its_uses_are_in_the_loss():
    """And refused where, in a later step, only one is."""
    embedding, readout = torch.nn.Embedding(6, 3, sparse=True), torch.nn.Linear(3, 6, bias=False)
    readout.weight = embedding.weight
    optimizer = SM3(embedding.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        readout(embedding(torch.tensor([1, 2]))).pow(2).sum().backward()
        assert not embedding.weight.grad.is_sparse
        optimizer.step()
    optimizer.zero_grad()
    embedding(torch.tensor([1])).sum().backward()
    with unchanged(optimizer), pytest.raises(ValueError, match="all dense or all sparse"):
        optimizer.step()


@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "saved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_run_continues_to_the_last_bit(dtype, clone):
    (param,) = parameters((6, 3), dtype=dtype)
    whole = SM3([param], beta=0.9)
    for step in range(3):
        touch(param, [step, 5], step)
        whole.step()
    if clone == "saved":
        other = SM3(copies([param]))
        other.load_state_dict(through_file(whole.state_dict()))
    else:
        other = copy.deepcopy(whole) if clone == "deepcopy" else pickle.loads(pickle.dumps(whole))
    assert_same_run(other, whole)
    for optimizer in (whole, other):
        (p,) = optimizer.param_groups[0]["params"]
        touch(p, [1, 4], 3)
        optimizer.step()
    assert_same_run(other, whole)
    assert whole.state[param]["sm3_accumulate.axis0"].dtype == torch.float32


def test_a_warning_given_is_not_given_again_by_a_copy():
    with pytest.warns(UserWarning, match="momentum"):
        optimizer, _ = stepped([[0]], momentum=0.9)
    other = copy.deepcopy(optimizer)
    touch(other.param_groups[0]["params"][0], [1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.step()


def test_a_bfloat16_table_is_computed_in_float32_and_rounded_once():
    (low,) = parameters((6, 3), dtype=torch.bfloat16)
    high = low.detach().float().requires_grad_()
    optimizer, wanted = SM3([low]), SM3([high])
    for step in range(4):
        touch(low, [step, 5], step)
        high.grad = low.grad.float()
        optimizer.step()
        wanted.step()
        high.data.copy_(high.to(torch.bfloat16))
        assert_same(low.detach().float(), high.detach())
        assert_same(optimizer.state[low], wanted.state[high])


def test_maximize_climbs():
    down, up = stepped([[0, 2], [2, 3]]), stepped([], maximize=True)
    for step, rows in enumerate([[0, 2], [2, 3]]):
        touch(up[1], rows, step)
        up[1].grad = -up[1].grad
        up[0].step()
    assert_same_run(down[0], up[0])


def test_a_closures_sparse_gradient_is_stepped():
    embedding = torch.nn.Embedding(6, 3, sparse=True)
    optimizer, before = SM3(embedding.parameters()), embedding.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = embedding(torch.tensor([4])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before[4].sum()
    assert (embedding.weight.detach() != before).any(1).tolist() == [row == 4 for row in range(6)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(value):
    optimizer, param = stepped([[0, 2]])
    touch(param, [2, 4], 1)
    param.grad._values()[0, 1] = value
    optimizer.step()
    finite = param.detach().isfinite()
    assert finite.all(1).tolist() == [row != 2 for row in range(6)]
    assert finite[2].tolist() == [True, False, True]
    assert optimizer.state[param]["sm3_accumulate.axis0"].isfinite().flatten().tolist() == [
        row != 2 for row in range(6)
    ]


def test_parameters_of_one_axis_and_empty_ones():
    _, param = stepped([[0, 2], [2]], shape=(6,))
    assert (param.detach() != parameters((6,))[0]).tolist() == [True, False, True, False, False, False]
    _, param = stepped([[]], shape=(0, 3))
    assert param.shape == (0, 3)


def test_sparsity_in_more_than_the_rows_is_refused():
    (param,) = parameters((4, 3))
    param.grad = gradient(param, 0).to_sparse()
    optimizer = SM3([param])
    with unchanged(optimizer), pytest.raises(TypeError, match=r"sparse along 2 axes.*whose rows are sparse.*to_dense"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: ChainOptimizer(p, [SM3Accumulate(0.9, "mean"), RMSScale()], 0.1), "means forget in every row"),
        (lambda p: SM3(p, beta=0.95, statistic="mean"), "means forget in every row"),
        (lambda p: MupSGD(p, allow_non_unit_scaling_params=True), "decay needs every row"),
    ],
)
def test_what_needs_every_row_says_so(make, reason):
    (param,) = parameters((4, 3))
    optimizer = make([param])
    touch(param, [1])
    with unchanged(optimizer), pytest.raises(TypeError, match=f"takes dense gradients: .*{reason}.*sparse=False"):
        optimizer.step()
