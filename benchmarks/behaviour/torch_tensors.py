"""Torch: what parameters and gradients may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.behaviour.in_torch import (
    INPUTS,
    OUTPUTS,
    assert_same,
    batch,
    loss,
    network,
    ready,
    stepped,
    train,
    values,
    vectors,
)
from benchmarks.behaviour.uses import EVERYONE, Contender, Part, is_ours

PART = Part("Parameters and gradients")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
    "part of a larger one": lambda x: torch.cat([x, x])[: len(x)],
}


def in_dtype(dtype: torch.dtype) -> Callable[[Contender], None]:
    """The use of a dtype."""

    def given(contender: Contender) -> None:
        params = vectors(contender, (4, 3), (5,), (2, 3, 4), dtype=dtype)
        optimizer = stepped(contender, params)
        assert {p.dtype for p in params} == {dtype}
        assert all(x.isfinite().all() for state in optimizer.state.values() for x in state.values())

    return given


for dtype in (torch.float64, torch.bfloat16, torch.float16):
    PART.use(
        f"{str(dtype).removeprefix('torch.')} parameters",
        works_if="Every step moves every parameter, which keeps its dtype, and state is finite.",
    )(in_dtype(dtype))


@PART.use("several precisions in one group")
def mixed(contender: Contender) -> None:
    """Each is stepped as it is by itself."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [vectors(contender, (4, 3), dtype=dtype)[0] for dtype in dtypes]
    optimizer = contender([(f"p{i}", p) for i, p in enumerate(params)])
    alone = [vectors(contender, (4, 3), dtype=dtype)[0] for dtype in dtypes]
    others = [contender([(f"p{i}", p)]) for i, p in enumerate(alone)]
    for p in (*params, *alone):
        p.grad = torch.linspace(-1, 1, 12).reshape(4, 3).to(p.dtype)
    for one in (optimizer, *others):
        one.step()
    assert_same([p.detach() for p in params], [p.detach() for p in alone])


@PART.use("stochastic rounding of bfloat16 parameters", applies=is_ours)
def rounded(contender: Contender) -> None:
    """Steps that are too small for a parameter's last bit add up in the mean."""
    p = _ones()
    settings = {} if contender.ternary else {"lr": 1e-4}
    optimizer = contender([p], stochastic_rounding=True, **settings)
    for _ in range(4):
        p.grad = torch.linspace(-1, 1, 64).expand(64, 64).to(p.dtype)
        optimizer.step()
    falls, rises = p[:, 32:].float().mean(), p[:, :32].float().mean()
    assert falls < rises, "small steps are lost"


def _ones() -> nn.Parameter:
    return nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))


@PART.use("stochastic rounding of bfloat16 parameters beside float32 ones in one group", applies=is_ours)
def rounded_beside(contender: Contender) -> None:
    """float32 is stepped as without it."""
    params, plain = [*vectors(contender, (4, 3)), _ones()], vectors(contender, (4, 3))
    optimizer, wanted = contender(params, stochastic_rounding=True), contender(plain)
    for p in (*params, *plain):
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype)
    optimizer.step()
    wanted.step()
    assert_same(params[0].detach(), plain[0].detach())


@PART.use("0-d and empty parameters")
def tiny(contender: Contender) -> None:
    """Scalars move, and parameters without elements are no trouble."""
    stepped(contender, vectors(contender, (), (0,), (3, 0), (4, 3)))


@PART.use("five axes")
def axes(contender: Contender) -> None:
    """Kernels of convolutions in three dimensions move."""
    stepped(contender, vectors(contender, (4, 3, 2, 2, 2)))


@PART.use("channels_last, transposed and sliced parameters")
def layouts(contender: Contender) -> None:
    """The numbers are those of the same parameters laid out as usual."""
    for layout in LAYOUTS.values():
        (start,) = vectors(contender, (4, 3, 2, 2))
        p = nn.Parameter(layout(start.detach()))
        q = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
        for x in (p, q):
            optimizer = contender([("p", x)])
            for step in range(2):
                x.grad = torch.linspace(-1, 1 + step, 48).reshape(x.shape)
                optimizer.step()
        assert_same(p.detach(), q.detach(), off=1e-5)


@PART.use("tied parameters")
def tied(contender: Contender) -> None:
    """A weight that two layers share is stepped once."""
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, OUTPUTS))
    model[2].weight = model[0].weight
    ready(contender, model)
    p = nn.Parameter(model[0].weight.detach().clone())
    optimizer, wanted = contender([*model.parameters()]), contender([p])
    loss(model, 0).backward()
    p.grad = model[0].weight.grad.clone()
    optimizer.step()
    wanted.step()
    assert_same(model[0].weight.detach(), p.detach(), off=1e-6)


@PART.use("frozen parameters, thawed later")
def frozen(contender: Contender) -> None:
    """They rest and have no state until they require a gradient; the optimizer is given all of them at once."""
    model = network(contender)
    model[0].requires_grad_(False)
    optimizer, before = contender(model.parameters()), model[0].weight.detach().clone()
    train(model, optimizer, 1)
    assert_same(model[0].weight.detach(), before)
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    train(model, optimizer, range(1, 2))
    assert bool((model[0].weight != before).any())


@PART.use("integer, boolean and quantized parameters among others")
def integers(contender: Contender) -> None:
    """They are handed over, and the run is the one without them."""
    model = network(contender)
    model.register_parameter("codes", nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False))
    model.register_parameter("mask", nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False))
    model.register_parameter("bits", nn.Parameter(torch.ones(3, 1, dtype=torch.uint8), requires_grad=False))
    plain = network(contender)
    train(model, contender(model.named_parameters()))
    train(plain, contender(plain.named_parameters()))
    assert_same(nn.Sequential(*model), plain)


@PART.use("lazy parameters")
def lazy(contender: Contender) -> None:
    """An optimizer made before the first forward pass steps them behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(OUTPUTS))
    optimizer = contender(model.parameters())
    model(batch(0)[0])
    ready(contender, model)
    before = {name: p.clone() for name, p in values(model).items()}
    train(model, optimizer, 1)
    assert all(bool((p != before[name]).any()) for name, p in values(model).items())


@PART.use("parameters on meta, which become real later")
def meta(contender: Contender) -> None:
    """An optimizer is made for a model without memory; for the one with memory it is made anew, and steps."""
    with torch.device("meta"):
        planned = nn.Sequential(nn.Linear(INPUTS, 8), nn.Linear(8, OUTPUTS))
    contender(planned.parameters())
    model = planned.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    train(ready(contender, model), contender(model.parameters()))


@PART.use("sparse gradients (`nn.Embedding(sparse=True)`)", reasons={EVERYONE: "Only `SM3` has a rule for rows."})
def sparse(contender: Contender) -> None:
    """The touched rows move, and no others."""
    torch.manual_seed(0)
    table = ready(contender, nn.Embedding(10, 4, sparse=True))
    optimizer, before = contender(table.parameters()), table.weight.detach().clone()
    table(torch.tensor([1, 3])).cos().sum().backward()
    optimizer.step()
    moved = (table.weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 3]


@PART.use(
    "complex parameters",
    reasons={EVERYONE: "Second moments and signs of complex numbers mean other things; use `torch.view_as_real`."},
)
def complex_numbers(contender: Contender) -> None:
    """They are stepped."""
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = contender([p])
    p.grad = torch.full((3,), 1 + 1j, dtype=torch.complex64)
    optimizer.step()
    assert bool((p != 1).all())


@PART.use("`torch.view_as_real` of complex parameters")
def as_real(contender: Contender) -> None:
    """They are stepped through the view."""
    numbers = torch.ones(3, dtype=torch.complex64)
    view = torch.view_as_real(numbers).requires_grad_()
    stepped(contender, [view], 1)
    assert bool((numbers != 1).any())


class Named(Tensor):
    """A subclass of tensors that changes no operation."""


@PART.use("subclasses of tensors")
def subclasses(contender: Contender) -> None:
    """A parameter of a subclass is stepped to the numbers of a plain one, and stays what it is."""
    plain, odd = vectors(contender, (4, 3)), vectors(contender, (4, 3))
    params = [nn.Parameter(odd[0].detach().as_subclass(Named))]
    for p in (*plain, *params):
        optimizer = contender([("p", p)])
        p.grad = torch.linspace(-1, 1, 12).reshape(4, 3).as_subclass(type(p.data))
        optimizer.step()
    assert isinstance(params[0].data, Named)
    assert_same(params[0].detach().as_subclass(Tensor), plain[0].detach(), off=1e-6)


@PART.use("gradients that are expanded, or views of one buffer")
def views(contender: Contender) -> None:
    """The numbers are those of the same gradients in memory of their own."""
    found = []
    for make in (lambda x: x, lambda x: x.clone()):
        (p,) = vectors(contender, (4, 3))
        optimizer = contender([("p", p)])
        p.grad = make(torch.ones(3).expand(4, 3))
        optimizer.step()
        p.grad = make(torch.linspace(-1, 1, 20)[4:16].view(4, 3))
        optimizer.step()
        found.append(p.detach())
    assert_same(*found)


@PART.use("parameters that are views of one buffer")
def flat(contender: Contender) -> None:
    """They are stepped in their place."""
    buffer = torch.zeros(10)
    params = [nn.Parameter(buffer[:6].view(2, 3)), nn.Parameter(buffer[6:])]
    stepped(contender, params, 1)
    assert_same(buffer, torch.cat([p.detach().flatten() for p in params]))


@PART.use("a gradient in another dtype than its parameter's (`grad_dtype`)")
def other_dtype(contender: Contender) -> None:
    """A bfloat16 parameter with a float32 gradient moves."""
    (p,) = vectors(contender, (4, 3), dtype=torch.bfloat16)
    p.grad_dtype = torch.float32
    before = p.detach().clone()
    optimizer = contender([p])
    p.grad = torch.linspace(-1, 1, 12).reshape(4, 3)
    optimizer.step()
    assert bool((p != before).any())


@PART.use("weights that another module replaces (`p.data = …`)")
def replaced(contender: Contender) -> None:
    """The step is taken from the new numbers, in the new memory."""
    (p,) = vectors(contender, (4, 3))
    optimizer = stepped(contender, [p], 1)
    kept = p.data
    p.data = torch.ones(4, 3)
    p.grad = torch.ones(4, 3)
    before = kept.clone()
    optimizer.step()
    assert_same(kept, before)
    assert bool((p != 1).all())
