"""A run that is begun in one framework goes on in the other with the same next updates, and nothing loads by half."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cases import CASES, FEW, by_size
from sweeps import NOISY, only, sweep
from test_equivalence import TOLERANCE

import fusedbun
import fusedbun_jax as fj
from fusedbun import SM3, ChainOptimizer, DecoupledLionW, Fusedbun, MupAdamW, param_groups
from fusedbun.portable import file

SHAPES = {"scalar": (), "bias": (17,), "layer.weight": (8, 16), "layer.conv": (6, 3, 3, 3)}
HALF = 10
BITS = {"stochastic_rounding": True, "seed": 3}
RECOMMENDED = {"centralize": True, "use_rms": True, "nesterov": True}
# With every way to store a moment: the torch class, the factory's name, their arguments, and the ways there are.
STORED = {
    "fusedbun": (Fusedbun, RECOMMENDED, (None, *NOISY)),
    "sm3": (SM3, {"momentum": 0.9}, (None, *NOISY)),
    "decoupled_lionw": (DecoupledLionW, {}, (None, "bfloat16", "int8")),
    "mup_adamw": (MupAdamW, {"mup": by_size, "second_moment_dtype": "bfloat16"}, (None, *NOISY)),
}


def start(ternary=False):
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: np.rint(x.clip(-1, 1)) if ternary else x for name, x in values.items()}


def gradient(step):
    rng = np.random.default_rng(100 + step)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def to_tree(params):
    """Parameters by dotted name as a tree of JAX's whose paths are those names."""
    tree = {}
    for name, x in params.items():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = x
    return tree


class Torch:
    def __init__(self, make, params, dtype="float32"):
        self.dtype = getattr(torch, dtype)
        self.params = {name: torch.nn.Parameter(torch.tensor(x).to(self.dtype)) for name, x in params.items()}
        self.optimizer = make(list(self.params.items()))

    def run(self, steps):
        for step in steps:
            for name, g in gradient(step).items():
                self.params[name].grad = torch.tensor(g).to(self.dtype)
            self.optimizer.step()
        return self

    def save(self, path):
        fusedbun.save_state(self.optimizer, path)

    def load(self, path, *args, **options):
        fusedbun.load_state(self.optimizer, path, *args, **options)
        return self

    def values(self):
        return {name: p.detach().double().numpy().copy() for name, p in self.params.items()}


class Jax:
    def __init__(self, make, params, dtype="float32"):
        self.dtype, self.tx = dtype, make()
        self.params = to_tree({name: jnp.asarray(x, dtype) for name, x in params.items()})
        self.state = self.tx.init(self.params)

    def run(self, steps):
        for step in steps:
            grads = to_tree({name: jnp.asarray(g, self.dtype) for name, g in gradient(step).items()})
            self.params, self.state = self.tx.step(grads, self.state, self.params)
        return self

    def save(self, path):
        fj.save_state(path, self.tx, self.state, self.params)

    def load(self, path, *args, **options):
        self.state = fj.load_state(path, self.tx, self.state, self.params, *args, **options)
        return self

    def values(self):
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        return {".".join(k.key for k in path): np.array(x, np.float64) for path, x in leaves}


def check_continuation(torch_run, jax_run, params, dtype, tolerance, path):
    """Ten steps here and ten there end where twenty do, in either order."""
    makers = {"torch": partial(Torch, torch_run, dtype=dtype), "jax": partial(Jax, jax_run, dtype=dtype)}
    whole = {name: make(params).run(range(HALF)) for name, make in makers.items()}
    for name, begun in whole.items():
        begun.save(path / name)
    halves = {name: begun.values() for name, begun in whole.items()}
    ends = {name: begun.run(range(HALF, 2 * HALF)).values() for name, begun in whole.items()}
    for first, second in (("torch", "jax"), ("jax", "torch"), ("torch", "torch"), ("jax", "jax")):
        end = makers[second](halves[first]).load(path / first).run(range(HALF, 2 * HALF)).values()
        for name in SHAPES:
            largest = np.abs(ends["torch"][name] - halves["torch"][name]).max() or 1.0
            for other in ends.values():
                error = np.abs(end[name] - other[name]).max() / largest
                assert error <= tolerance, f"{first} and then {second}, {name}: {error}"


@sweep("case", [case for case in CASES if not case.cancels], short=lambda case: case.name in FEW, ids=str)
def test_a_run_goes_on_in_the_other_framework(case, tmp_path):
    check_continuation(case.torch, case.optax, start(case.ternary), "float32", TOLERANCE["float32"], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_a_run_in_float64_goes_on(case, tmp_path, x64):
    check_continuation(case.torch, case.optax, start(case.ternary), "float64", TOLERANCE["float64"], tmp_path)


@sweep(
    ("name", "moment", "stochastic"),
    [(name, m, stochastic) for name, (*_, ways) in STORED.items() for m in ways for stochastic in (False, True)],
    short=only(("fusedbun", "int4", True), ("sm3", "int8", True), ("decoupled_lionw", "bfloat16", False)),
)
def test_a_run_in_fewer_bits_goes_on_with_its_noise(name, moment, stochastic, tmp_path):
    cls, arguments, _ = STORED[name]
    options = BITS if stochastic else {}
    given = {**arguments, **options, "momentum_dtype": moment}
    dtype = "bfloat16" if options else "float32"
    # To the bit, where the two frameworks' whole runs are the same: what is left is float32's rounding before codes.
    make = partial(getattr(fj, name), 0.01, **given)
    check_continuation(partial(cls, lr=0.01, **given), make, start(), dtype, TOLERANCE["float32"], tmp_path)


@pytest.mark.parametrize("moment", NOISY)
def test_what_is_stored_comes_back_bit_for_bit(moment, tmp_path):
    given = {"momentum": 0.9, "momentum_dtype": moment, **BITS}
    begun = Torch(partial(SM3, **given), start(), "bfloat16").run(range(3))
    begun.save(tmp_path / "a")
    there = Jax(partial(fj.sm3, **given), start(), "bfloat16").load(tmp_path / "a")
    there.save(tmp_path / "b")
    with file.opened(tmp_path / "a") as a, file.opened(tmp_path / "b") as b:
        assert a.entries.keys() == b.entries.keys()
        for name, (entry, _) in a.entries.items():
            assert (entry, a.read(name).tobytes()) == (b.entries[name][0], b.read(name).tobytes())
    back = Torch(partial(SM3, **given), start(), "bfloat16").load(tmp_path / "b")
    for p, q in zip(begun.params.values(), back.params.values(), strict=True):
        ours, theirs = begun.optimizer.state[p], back.optimizer.state[q]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def saved(path, make=SM3, **arguments):
    begun = Torch(partial(make, **arguments), start()).run(range(2))
    begun.save(path)
    return begun


def test_torch_takes_the_saved_hyperparameters_and_keeps_what_belongs_to_its_model(tmp_path):
    saved(tmp_path / "a", Fusedbun, lr=0.3, eps=1e-5, seed=7, momentum_beta=0.5, channel_axis=-1, maximize=True)
    here = Torch(partial(Fusedbun, lr=torch.tensor(0.1)), start()).load(tmp_path / "a")
    (group,) = here.optimizer.param_groups
    assert (group["eps"], group["seed"], group["momentum_beta"], group["maximize"]) == (1e-5, 7, 0.5, True)
    assert group["channel_axis"] == 0
    assert isinstance(group["lr"], torch.Tensor)
    assert group["lr"].item() == pytest.approx(0.3)


def test_the_first_learning_rate_goes_along(tmp_path):
    begun = Jax(lambda: fj.decoupled_lionw(0.5, weight_decay=1e-4), start()).run(range(2))
    begun.save(tmp_path / "a")
    here = Torch(partial(DecoupledLionW, lr=0.1), start()).load(tmp_path / "a")
    assert {here.optimizer.param_groups[0][name] for name in ("lr", "first_lr")} == {0.5}


def unchanged(run, path, *args, **options):
    """The error of loading, which must have changed nothing."""
    if isinstance(run, Torch):
        before = {name: dict(run.optimizer.state.get(p, {})) for name, p in run.params.items()}
        groups = [dict(group) for group in run.optimizer.param_groups]
        with pytest.raises(ValueError, match="nothing was loaded") as caught:
            run.load(path, *args, **options)
        assert groups == [dict(group) for group in run.optimizer.param_groups]
        for name, p in run.params.items():
            now = run.optimizer.state.get(p, {})
            assert now.keys() == before[name].keys()
            assert all(now[key] is before[name][key] for key in now)
    else:
        with pytest.raises(ValueError, match="nothing was loaded") as caught:
            run.load(path, *args, **options)
    return str(caught.value)


KINDS = {"torch": (Torch, SM3), "jax": (Jax, fj.sm3)}


def runs(kind, params, **arguments):
    """A run of SM3 in one framework that has state already."""
    cls, make = KINDS[kind]
    return cls(partial(make, **arguments), params)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_does_not_fit_is_in_one_error_by_name(kind, tmp_path):
    saved(tmp_path / "a", momentum=0.9)
    params = start()
    params["bias"] = np.zeros(18)
    params["other"] = params.pop("scalar")
    message = unchanged(runs(kind, params, momentum=0.9), tmp_path / "a")
    assert "'scalar' is in the file, but not here" in message
    assert "'other' is here, but not in the file" in message
    assert "'bias' has shape (17,) in the file, but (18,) here" in message


@pytest.mark.parametrize("kind", KINDS)
def test_partial_loads_what_is_both_here_and_there_and_refuses_other_shapes(kind, tmp_path):
    saved(tmp_path / "a", momentum=0.9)
    params = start()
    params["other"] = params.pop("scalar")
    here = runs(kind, params, momentum=0.9).load(tmp_path / "a", partial=True)
    here.save(tmp_path / "b")
    with file.opened(tmp_path / "a") as a, file.opened(tmp_path / "b") as b:
        name = "bias/momentum.moment"
        np.testing.assert_array_equal(a.read(name), b.read(name))
        if kind == "jax":
            assert not b.read("other/momentum.moment").any()
    params["bias"] = np.zeros(18)
    assert "'bias' has shape" in unchanged(runs(kind, params, momentum=0.9), tmp_path / "a", partial=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_otherwise_is_named(kind, tmp_path):
    saved(tmp_path / "a", momentum=0.9, momentum_dtype="int8")
    message = unchanged(runs(kind, start(), momentum=0.9, momentum_dtype="int4"), tmp_path / "a", partial=True)
    assert "'momentum.moment' of 'layer.weight' is stored as block8 in the file, but as block4 here" in message
    half = KINDS[kind][0](partial(KINDS[kind][1], momentum=0.9, momentum_dtype="int8"), start(), "bfloat16")
    assert "'bias' is float32 in the file, but bfloat16 here" in unchanged(half, tmp_path / "a")
    rounded = partial(KINDS[kind][1], momentum=0.9, momentum_dtype="int8", stochastic_rounding=True)
    saved_rounded = KINDS[kind][0](rounded, start(), "bfloat16").run(range(1))
    saved_rounded.save(tmp_path / "b")
    assert "'step' of 'bias' is in the file, but not kept here" in unchanged(half, tmp_path / "b")


def test_other_transformations_are_named(tmp_path):
    saved(tmp_path / "a", Fusedbun, lr=0.1)
    other = Jax(lambda: fj.fusedbun(0.1, centralize=True), start())
    assert "but here centralize → sparse_mask" in unchanged(other, tmp_path / "a")
    lagged = Jax(lambda: fj.fusedbun(0.1, lagged=True), start())
    assert "sm3_accumulate.lagged is False in the file, but True here" in unchanged(lagged, tmp_path / "a")
    sm3 = Torch(partial(SM3, lr=0.1), start())
    assert "the recipe in the file is 'fusedbun', but here 'sm3'" in unchanged(sm3, tmp_path / "a")


def test_groups_must_agree_on_their_hyperparameters(tmp_path):
    def groups(named):
        return [{"params": named[:2], "lr": 0.1}, {"params": named[2:], "lr": 0.2}]

    saved(tmp_path / "a", lambda named: SM3(groups(named)))
    assert "lr of these parameters is 0.1 and 0.2" in unchanged(Torch(SM3, start()), tmp_path / "a")
    apart = Torch(lambda named: SM3(groups(named), lr=9.0), start()).load(tmp_path / "a")
    assert [group["lr"] for group in apart.optimizer.param_groups] == [0.1, 0.2]


def test_parameters_must_have_names(tmp_path):
    model = torch.nn.Linear(2, 2)
    for make in (lambda: SM3(model.parameters()), lambda: SM3([{"params": [*model.parameters()]}])):
        with pytest.raises(ValueError, match=r"has none; make the optimizer from model.named_parameters\(\)"):
            fusedbun.save_state(make(), tmp_path / "a")
    fusedbun.save_state(SM3(model.parameters()), tmp_path / "a", names=model.named_parameters())
    fusedbun.load_state(SM3(param_groups(model)), tmp_path / "a")
    with pytest.raises(TypeError, match=r"must be one of fusedbun's"):
        fusedbun.save_state(torch.optim.SGD(model.parameters()), tmp_path / "a")


@pytest.mark.long
def test_by_name_and_wrappers_and_schedules(tmp_path):
    """Groups by pattern, inside optax's chain and accumulation, with a schedule: saved, loaded, and the same."""
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = fj.by_name(fj.fusedbun, {"layer.*": {"eps": 1e-4}}, no_decay="Lambda", learning_rate=schedule)
    whole = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), tx), 2)
    params = to_tree({name: jnp.asarray(x, "float32") for name, x in start().items()})
    state = whole.init(params)
    for step in range(4):
        grads = to_tree({name: jnp.asarray(g, "float32") for name, g in gradient(step).items()})
        updates, state = whole.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    fj.save_state(tmp_path / "a", tx, state, params)
    found = fj.load_state(tmp_path / "a", tx, whole.init(params), params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(found.inner_opt_state), jax.tree.leaves(state.inner_opt_state), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(TypeError, match=r"of a wrapper such as optax\.chain give the optimizer inside"):
        fj.save_state(tmp_path / "a", optax.chain(tx), state, params)
    with pytest.raises(ValueError, match="is it another optimizer's"):
        fj.save_state(tmp_path / "a", fj.sm3(0.1), state, params)


def test_a_schedule_is_told_how_many_steps_came_before(tmp_path):
    saved(tmp_path / "a", lr=0.1)
    here = Jax(lambda: fj.sm3(optax.linear_schedule(0.1, 0.0, 10)), start())
    assert "give steps=" in unchanged(here, tmp_path / "a")
    assert int(here.load(tmp_path / "a", steps=2).state.count) == 2
    here.save(tmp_path / "b")
    assert Torch(partial(SM3, lr=0.7), start()).load(tmp_path / "b").optimizer.param_groups[0]["lr"] == 0.7


def test_one_count_stands_for_the_counters_of_all_parameters(tmp_path):
    run = Torch(partial(fusedbun.FusedbunW, lr=0.1), start()).run(range(2))
    run.save(tmp_path / "even")
    for p in run.params.values():
        p.grad = None
    run.params["bias"].grad = torch.ones(17)
    run.optimizer.step()
    run.save(tmp_path / "uneven")
    here = Jax(partial(fj.fusedbunw, 0.1), start())
    said = unchanged(here, tmp_path / "uneven")
    for part in ("different numbers of steps", "3 of 'bias'", "2 of 'scalar'", "one count; give steps="):
        assert part in said
    assert here.load(tmp_path / "uneven", steps=3).state.count == 3
    assert here.load(tmp_path / "even").state.count == 2
    here.run(range(2, 4)).save(tmp_path / "back")
    back = Torch(partial(fusedbun.FusedbunW, lr=0.1), start()).load(tmp_path / "back")
    assert {int(back.optimizer.state[p]["step"].max()) for p in back.params.values()} == {4}


def test_what_has_no_elements_is_not_asked_for_its_steps(tmp_path):
    run = Torch(partial(fusedbun.FusedbunW, lr=0.1), {"empty": np.zeros((0, 3)), "w": np.ones(3)})
    for p in run.params.values():
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    run.save(tmp_path / "a")
    here = Jax(partial(fj.fusedbunw, 0.1), {"empty": np.zeros((0, 3)), "w": np.ones(3)}).load(tmp_path / "a")
    assert here.state.count == 1


def test_a_parameter_without_a_step_begins_at_the_start(tmp_path):
    run = Torch(partial(SM3, momentum=0.9), start())
    run.params["bias"].grad = torch.ones(17)
    run.optimizer.step()
    run.save(tmp_path / "a")
    there = Jax(partial(fj.sm3, momentum=0.9), start()).run(range(1)).load(tmp_path / "a")
    assert not np.asarray(there.state.sm3_accumulate.axis0["scalar"]).any()
    back = Torch(partial(SM3, momentum=0.9), start()).run(range(1)).load(tmp_path / "a")
    assert [*back.optimizer.state] == [back.params["bias"]]


def test_a_chain_of_ones_own_takes_its_hyperparameters(tmp_path):
    chain = fusedbun.chain(fusedbun.transforms.Centralize(1), fusedbun.transforms.Momentum(0.5))
    params = {name: x for name, x in start().items() if x.ndim > 1}
    begun = Jax(lambda: fj.from_chain(chain, 0.25), params)
    begun.save(tmp_path / "a")
    other = [fusedbun.transforms.Centralize(0), fusedbun.transforms.Momentum(0.9)]
    here = Torch(lambda named: ChainOptimizer(named, other, lr=1.0), params).load(tmp_path / "a")
    group = here.optimizer.param_groups[0]
    assert (group["lr"], group["momentum.beta"], group["centralize.channel_axis"]) == (0.25, 0.5, 0)
