"""State in fewer bits and stochastic rounding in torch: the same bits as NumPy's, whatever steps the parameters."""

import copy
import io
import pickle
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from sweeps import CODED, NOISY, long, only, sweep

import fusedbun
from fusedbun import ChainOptimizer, Slot, Transform
from fusedbun import namespace as in_numpy
from fusedbun.chain import step
from fusedbun.storage import codes
from fusedbun.storage.codes import MOMENTS
from fusedbun.storage.rounding import Rounding
from fusedbun.storage.storage import Storage
from fusedbun.torch import IMPLEMENTATIONS
from fusedbun.transforms import Momentum

TYPED = {"mup": lambda path, param: "weight"}
# Those whose steps add nothing up, so that every bit is the same. (But eager torch's roots are not rounded right.)
EXACT = {
    "SM3": (fusedbun.SM3, {"lr": 0.1, "momentum": 0.9}),
    "DecoupledLionW": (fusedbun.DecoupledLionW, {"lr": 1e-2}),
    "MupSGD": (fusedbun.MupSGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, **TYPED}),
}
OTHERS = {
    "FusedbunW": (fusedbun.FusedbunW, {"lr": 1e-2}),
    "Fusedbun": (fusedbun.Fusedbun, {"lr": 1e-2, "centralize": True, "use_rms": True}),
    "MupAdamW": (fusedbun.MupAdamW, {"lr": 1e-2, **TYPED}),
    "ScaledOptum": (fusedbun.ScaledOptum, {"lr": 1e-2}),
}
EVERY = EXACT | OTHERS
SHAPES = [(), (5,), (40, 70), (6, 3, 3, 3)]
ROUNDED = {"stochastic_rounding": True, "seed": 3}
torch_names = ["0", "1", "2", "3"]


def parameters(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def run(optimizer, steps, dtype=torch.bfloat16):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i in steps if isinstance(steps, range) else range(steps):
        for param, grad in zip(params, gradients(i, dtype), strict=True):
            param.grad = grad
        optimizer.step()
    return params


def bits(x):
    x = x.detach()
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def assert_same(one, other):
    """Parameters and state, to the bit."""
    for a, b in zip(one.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert {key: x.dtype for key, x in a.items()} == {key: x.dtype for key, x in b.items()}
        for key in a:
            np.testing.assert_array_equal(bits(a[key]), bits(b[key]), err_msg=key)
    for a, b in zip(*([p for g in o.param_groups for p in g["params"]] for o in (one, other)), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def numpy_steps(optimizer, params, steps):
    """The same steps by the definition, in NumPy."""
    chain = optimizer.chain(optimizer.param_groups[0])
    found = []
    for i, param in enumerate(params):
        p = param.detach().float().numpy()
        here = chain.at((), param, str(i))
        state = {
            key: np.zeros(x.shape(p.shape), np.int32 if "int" in x.dtype else np.float32)
            for key, x in here.arrays(p.shape, "bfloat16").items()
        }
        for t in range(steps):
            storage = Storage(in_numpy, here.rounding, p, "bfloat16")
            lr = np.float32(optimizer.param_groups[0]["lr"])
            p, state = step(here, storage, lr, p, gradients(t)[i].float().numpy(), state)
            p, state = np.asarray(p), {key: np.asarray(x) for key, x in state.items()}
        found.append((p, state))
    return found


@sweep("momentum_dtype", MOMENTS, short=only("int8"))
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(n, i) for n in EXACT for i in IMPLEMENTATIONS if i == "kernel" or (i != "compiled" and n != "SM3")],
)
@np.errstate(over="ignore")
def test_gives_numpys_bits(name, implementation, momentum_dtype):
    cls, given = EXACT[name]
    if (name, momentum_dtype) == ("DecoupledLionW", "int4"):
        with pytest.raises(ValueError, match='momentum_dtype="int4" is too coarse'):
            cls(parameters(), **given, momentum_dtype=momentum_dtype)
        return
    params = parameters()
    optimizer = cls(params, **given, momentum_dtype=momentum_dtype, implementation=implementation, **ROUNDED)
    want = numpy_steps(optimizer, params, 4)
    run(optimizer, 4)
    for param, (p, state) in zip(params, want, strict=True):
        np.testing.assert_array_equal(param.detach().float().numpy(), p)
        for key, x in optimizer.state[param].items():
            np.testing.assert_array_equal(x.float().numpy(), np.float32(state[key]), err_msg=key)


@long
@pytest.mark.parametrize("momentum_dtype", NOISY)
def test_compiled_it_is_the_same_but_for_multiplying_and_adding_at_once(momentum_dtype):
    """A compiler may round `a*b + c` once: then a moment's last bit differs, and now and then a rounding."""
    cls, given = EXACT["SM3"]
    one, other = (
        cls(parameters(), **given, momentum_dtype=momentum_dtype, implementation=implementation, **ROUNDED)
        for implementation in ("compiled", "definition")
    )
    for param, reference in zip(run(one, 3), run(other, 3), strict=True):
        assert torch.count_nonzero(param != reference) <= max(1, 0.01 * param.numel())


@sweep(
    ("name", "momentum_dtype"),
    [(name, dtype) for name in EVERY for dtype in (None, *MOMENTS)],
    short=only(("SM3", "int8"), ("Fusedbun", "int4"), ("MupAdamW", None)),
)
def test_a_resumed_run_goes_on_to_the_bit(name, momentum_dtype):
    cls, given = EVERY[name]
    if name == "ScaledOptum" or (name, momentum_dtype) == ("DecoupledLionW", "int4"):
        given = given if name == "ScaledOptum" else {**given, "momentum_dtype": "int8"}
    else:
        given = {**given, "momentum_dtype": momentum_dtype}
    whole = cls(parameters(), **given, **ROUNDED)
    run(whole, 3)
    saved = copy.deepcopy(whole.state_dict())
    resumed = cls(copy.deepcopy(whole.param_groups[0]["params"]), **{**given, **ROUNDED})
    resumed.load_state_dict(saved)
    assert_same(resumed, whole)
    run(whole, range(3, 6))
    run(resumed, range(3, 6))
    assert_same(resumed, whole)


def test_torch_save_and_pickle_keep_every_dtype():
    given = {**OTHERS["Fusedbun"][1], "momentum_dtype": "int4", **ROUNDED}
    optimizer = fusedbun.Fusedbun(parameters(), **given)
    run(optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = fusedbun.Fusedbun(copy.deepcopy(optimizer.param_groups[0]["params"]), **given)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert_same(loaded, optimizer)
    assert_same(pickle.loads(pickle.dumps(optimizer)), optimizer)


def test_a_counter_is_kept_where_it_is_all_that_there_is():
    params = parameters()
    optimizer = fusedbun.ScaledOptum(params, **ROUNDED)
    run(optimizer, 3)
    again = fusedbun.ScaledOptum(params, **ROUNDED)
    again.load_state_dict(optimizer.state_dict())
    assert [again.state[p]["step"].item() for p in params] == [3] * len(params)


def test_what_is_stored():
    (_, vector, matrix, convolution) = params = parameters()
    optimizer = fusedbun.Fusedbun(params, **OTHERS["Fusedbun"][1], momentum_dtype="int4", **ROUNDED)
    run(optimizer, 1)
    kept = {key: (x.dtype, tuple(x.shape)) for key, x in optimizer.state[matrix].items()}
    assert kept == {
        "sm3_accumulate.axis0": (torch.float32, (40, 1)),
        "sm3_accumulate.axis1": (torch.float32, (1, 70)),
        "momentum.moment": (torch.uint8, (40, 3, 16)),
        "momentum.moment.exponents": (torch.uint8, (40, 3, 1)),
        "step": (torch.int32, (1, 1)),
    }
    assert optimizer.state[vector]["momentum.moment"].dtype == torch.float32
    assert set(optimizer.state[vector]) == {"sm3_accumulate.axis0", "momentum.moment", "step"}
    assert optimizer.state[convolution]["momentum.moment.exponents"].shape == (6, 1, 1)
    plain = fusedbun.SM3(parameters(), momentum_dtype="int8")  # which has no momentum
    run(plain, 1)
    assert all(x.dtype == torch.float32 for state in plain.state.values() for x in state.values())


@pytest.mark.parametrize(
    ("network", "momentum_dtype", "most"),
    [
        ("gpt2", "int8", 1.04),
        ("gpt2", "int4", 0.55),
        ("gpt2", "bfloat16", 2.01),
        ("resnet50", "int8", 1.04),
        ("resnet50", "int4", 0.57),  # many of its rows are no whole blocks
        ("resnet50", "bfloat16", 2.01),
    ],
)
def test_bytes_a_parameter(network, momentum_dtype, most):
    from fusedbun.tools.shared import networks

    sizes = getattr(networks, network)()
    chain = fusedbun.recipes.fusedbun(momentum_dtype=momentum_dtype)
    total = sum(
        np.prod(x.shape(shape), dtype=np.int64) * np.dtype(x.dtype if x.dtype != "bfloat16" else "int16").itemsize
        for shape in sizes
        for key, x in chain.arrays(shape, "bfloat16").items()
        if key.startswith("momentum")
    )
    assert total / sum(np.prod(shape, dtype=np.int64) for shape in sizes) <= most


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"momentum_dtype": "int7"},
            ValueError,
            f"must be one of {', '.join(map(repr, MOMENTS))} or None",
        ),
        ({"momentum_dtype": 8}, TypeError, "momentum_dtype must be one of"),
        ({"momentum_dtype": torch.float64}, ValueError, "but it is torch.float64"),
        ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True or False"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_errors(given, error, message):
    with pytest.raises(error, match=message):
        fusedbun.Fusedbun(parameters(), 1e-2, **given)


def test_int8_is_too_coarse_for_a_second_moment():
    with pytest.raises(ValueError, match="second_moment_dtype must be one of 'param', 'float32', 'bfloat16' or None"):
        fusedbun.MupAdamW(parameters(), **TYPED, second_moment_dtype="int8")


@sweep("dtype", [torch.bfloat16, np.dtype("float32"), "bfloat16", torch.int8], short=only(torch.int8))
def test_dtypes_as_frameworks_write_them(dtype):
    optimizer = fusedbun.DecoupledLionW(parameters(), momentum_dtype=dtype, **ROUNDED)
    run(optimizer, 1)
    name = str(dtype).removeprefix("torch.")
    assert optimizer.state[optimizer.param_groups[0]["params"][2]]["scale_by_lion.moment"].dtype == getattr(torch, name)


def test_the_seed_and_the_names_decide_the_noise():
    def after(names=None, **given):
        params = parameters()
        named = zip(names, params, strict=True) if names else params
        run(fusedbun.SM3([*named], lr=1e-3, stochastic_rounding=True, **given), 2)
        return params[2].detach().clone()

    assert torch.equal(after(), after(torch_names))
    assert not torch.equal(after(), after(seed=1))
    assert not torch.equal(after(), after(["a", "b", "c", "d"]))


@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i != "compiled"])
def test_a_seed_of_numpys_is_the_same_integer(implementation):
    def after(seed):
        params = parameters()
        given = {"momentum_dtype": "int8", "stochastic_rounding": True, "implementation": implementation}
        run(fusedbun.DecoupledLionW(params, lr=1e-2, seed=seed, **given), 2)
        return params

    for seed in (np.int64(2**31 - 5), np.uint8(200)):
        assert all(map(torch.equal, after(seed), after(int(seed))))


def test_rounded_without_bias_small_steps_add_up():
    """Steps of 1/100 of the spacing: to the nearest nothing moves."""
    shape, steps = (64, 64), 200
    moved = {}
    for stochastic in (False, True):
        param = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = fusedbun.ScaledOptum([param], lr=2.0**-8 / 100, stochastic_rounding=stochastic)
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = 1 - param.detach().double().mean().item()
    assert moved[False] == 0
    assert abs(moved[True] / (steps * 2.0**-8 / 100) - 1) < 0.05


def test_rows_of_a_sparse_gradient_are_rounded_as_in_the_whole():
    """With every row touched it is the dense step of one accumulator; with few, the others stay."""
    noise = {}
    for rows in ([0, 1, 2, 3, 4, 5], [1, 4]):
        param = torch.nn.Parameter(torch.linspace(1, 2, 60).reshape(6, 10).to(torch.bfloat16))
        optimizer = fusedbun.SM3([param], lr=1e-3, **ROUNDED)
        values = torch.full((len(rows), 10), 0.5, dtype=torch.bfloat16)
        param.grad = torch.sparse_coo_tensor([rows], values, (6, 10), check_invariants=True)
        optimizer.step()
        assert optimizer.state[param]["step"].item() == 1
        noise[len(rows)] = param.detach().clone()
    assert torch.equal(noise[6][[1, 4]], noise[2][[1, 4]])
    before = torch.linspace(1, 2, 60).reshape(6, 10).to(torch.bfloat16)
    assert torch.equal(noise[2][[0, 2, 3, 5]], before[[0, 2, 3, 5]])


@dataclass(frozen=True)
class Kept(Transform):
    """Keeps the update in a code."""

    name: ClassVar[str] = "kept"
    code_dtype: Literal["block4", "block5"] = "block4"

    def slots(self, shape):
        return {"moment": Slot.full(len(shape), self.code_dtype)}

    def update(self, xp, signal, state, param):
        return signal, {"moment": signal.update}


class TestLoading:
    def saved(self, **given):
        optimizer = fusedbun.Fusedbun(parameters(), 1e-2, use_rms=True, **given)
        run(optimizer, 3)
        return optimizer

    def test_another_dtype_is_an_error(self):
        saved = self.saved().state_dict()
        other = fusedbun.Fusedbun(parameters(), 1e-2, momentum_dtype="int8")
        with pytest.raises(ValueError, match=r"the saved state has momentum_dtype=None, .* has 'int8'; .*convert=True"):
            other.load_state_dict(saved)
        assert not other.state

    @sweep(
        ("before", "now"),
        [*product((None, *NOISY), repeat=2)],
        short=only((None, "int8"), ("int8", None), ("int8", "int8")),
    )
    def test_is_converted_when_asked_for(self, before, now):
        saved = self.saved(momentum_dtype=before)
        other = fusedbun.Fusedbun(copy.deepcopy(saved.param_groups[0]["params"]), 0.5, momentum_dtype=now)
        if before == now:
            other.load_state_dict(saved.state_dict(), convert=True)
            assert_same(other, saved)
            return
        with pytest.warns(UserWarning, match=r"is converted .* momentum.moment of . parameters"):
            other.load_state_dict(saved.state_dict(), convert=True)
        group = other.param_groups[0]
        assert (group["momentum_dtype"], group["lr"], group["use_rms"]) == (now, 1e-2, True)
        for param, was in zip(group["params"], saved.param_groups[0]["params"], strict=True):
            decoded = [
                Storage(fusedbun.torch.namespace, Rounding(), p.float(), "bfloat16").decode(
                    "momentum.moment", Momentum(dtype=dtype).slots(p.shape)["moment"], optimizer.state[p]
                )
                for optimizer, p, dtype in ((other, param, now), (saved, was, before))
            ]
            coarse = 2.0 ** (2 - MOMENTS[now].bits) if now in CODED else {None: 0.0, "bfloat16": 2.0**-7}[now]
            apart, largest = (decoded[0] - decoded[1]).abs().max(), decoded[1].abs().max()
            assert apart <= coarse * largest
        run(other, range(3, 5))

    def test_is_converted_to_fewer_arrays(self, monkeypatch):
        """All arrays of the new code are among those of the old one, so the one that is left over has to tell."""
        monkeypatch.setitem(codes.CODES, "block5", codes.Blocks("block5", bits=5))
        param = torch.nn.Parameter(torch.zeros(4, 70))
        param.grad = gradients(0)[2][:4].float()
        saved, other = (ChainOptimizer([param], [Kept(code)], 0.1) for code in ("block5", "block4"))
        saved.step()
        with pytest.warns(UserWarning, match=r"is converted .* kept.moment of 1 parameters"):
            other.load_state_dict(saved.state_dict(), convert=True)
        assert set(saved.state[param]) - set(other.state[param]) == {"kept.moment.plane1"}

    def test_of_parameters_of_another_dtype(self):
        """In the parameter's dtype, that was float32: there was no noise, and so no count of steps."""
        params = parameters(torch.float32)
        saved = fusedbun.SM3(params, momentum=0.9, momentum_dtype="param")
        run(saved, 2, torch.float32)
        low = [torch.nn.Parameter(p.detach().to(torch.bfloat16)) for p in params]
        other = fusedbun.SM3(low, momentum=0.9, momentum_dtype="param")
        with pytest.raises(ValueError, match="is float32, but it is stored in bfloat16"):
            other.load_state_dict(saved.state_dict())
        with pytest.warns(UserWarning, match=r"is converted .* momentum.moment of 4 parameters"):
            other.load_state_dict(saved.state_dict(), convert=True)
        assert other.state[low[2]]["step"].item() == 0
        run(other, 1)

    def test_codes_without_their_exponents(self):
        saved = self.saved(momentum_dtype="int8")
        state = copy.deepcopy(saved.state_dict())
        del state["state"][2]["momentum.moment.exponents"]
        for convert, now in ((False, "int8"), (True, "int8"), (True, None)):
            other = fusedbun.Fusedbun(parameters(), 1e-2, momentum_dtype=now)
            with pytest.raises(ValueError, match=r"parameter 2 lacks 'momentum.moment.exponents'"):
                other.load_state_dict(state, convert=convert)
            assert not other.state

    def test_stochastic_rounding_is_the_optimizers_own(self):
        saved = self.saved()
        other = fusedbun.Fusedbun(parameters(), 1e-2, use_rms=True, **ROUNDED)
        with pytest.raises(ValueError, match="the saved state has stochastic_rounding=False"):
            other.load_state_dict(saved.state_dict())
        other.load_state_dict(saved.state_dict(), convert=True)
        assert other.param_groups[0]["stochastic_rounding"] is True
        run(other, 1)


def test_a_chain_of_ones_own_stores_in_fewer_bits_too():
    params = parameters()
    optimizer = ChainOptimizer(params, [Momentum(0.9, dtype="int8")], lr=1e-2, **ROUNDED)
    run(optimizer, 2)
    assert optimizer.state[params[2]]["momentum.moment"].dtype == torch.int8
    assert optimizer.param_groups[0]["momentum.dtype"] == "int8"


@pytest.mark.parametrize("implementation", ["kernel", "definition"])
def test_hyper_parameters_may_change_in_a_run(implementation):
    """Each parameter keeps noise of its own."""
    params = parameters()
    given = {"lr": 1e-2, "momentum_dtype": "int8", **ROUNDED}
    optimizer = fusedbun.DecoupledLionW(params, implementation=implementation, **given)
    fresh = fusedbun.DecoupledLionW(copy.deepcopy(params), implementation="definition", **given)
    for changes in ({}, {"betas": (0.5, 0.75)}, {"seed": 9}, {"weight_decay": 1e-4}):
        for one in (optimizer, fresh):
            one.param_groups[0].update(changes)
            run(one, 1)
    assert_same(optimizer, fresh)
