"""Steps that jax.export keeps: by the definition, for whoever runs them may not have our kernels, or not even us."""

import contextlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import FACTORIES, gradients, over, parameters
from jax import export

import fusedbun_jax as fj
from fusedbun.compiler.cpp.native import KernelError

few = over(["recommended", "mup_adamw", "ternary_vote"], ["recommended"])


def step_of(tx, implementation=None):
    return jax.jit(lambda grads, state, params: tx.step(grads, state, params, implementation=implementation))


@few
def test_an_exported_step_is_the_definitions(factory):
    tx, params = factory(), factory.parameters()
    arguments = gradients(params), tx.init(params), params
    kept = export.export(step_of(tx))(*arguments)
    assert "@fusedbun_step" not in kept.mlir_module()
    chex.assert_trees_all_close(jax.jit(kept.call)(*arguments), step_of(tx, "definition")(*arguments), rtol=1e-6)


def test_what_is_not_exported_still_runs_a_kernel():
    tx, params = FACTORIES["recommended"](), parameters()
    step, arguments = step_of(tx), (gradients(params), tx.init(params), params)
    export.export(step)(*arguments)
    assert "@fusedbun_step" in step.lower(*arguments).as_text()


def test_it_is_kept_for_other_platforms_too():
    tx, params = FACTORIES["recommended"](), parameters()
    platforms = ("cpu", "cuda", "tpu")
    kept = export.export(step_of(tx), platforms=platforms)(gradients(params), tx.init(params), params)
    assert kept.platforms == platforms


def test_a_kernel_that_is_asked_for_is_an_error():
    tx, params = FACTORIES["recommended"](), parameters()
    with pytest.raises(KernelError, match=r"no kernels in what jax\.export keeps"):
        export.export(step_of(tx, "kernel"))(gradients(params), tx.init(params), params)


@pytest.mark.long
def test_derivatives_of_an_exported_step():
    tx, params = FACTORIES["mup_adamw"](), parameters()
    grads = gradients(params)
    _, state = tx.step(gradients(params, 1), tx.init(params), params)  # those of a first step are noise of rounding

    def end(step):
        return jax.grad(lambda g: sum(jnp.sum(p**2) for p in jax.tree.leaves(step(g, state, params)[0])))

    kept = export.export(step_of(tx))(grads, state, params)
    chex.assert_trees_all_close(end(kept.call)(grads), end(step_of(tx))(grads), rtol=1e-5)


def test_states_are_kept_in_the_file():
    """Beside optax's own type, which who exports it has to name, as with optax.adamw."""
    with contextlib.suppress(ValueError):  # where another test has done it
        export.register_namedtuple_serialization(optax.EmptyState, serialized_name="optax.EmptyState")
    params = parameters()
    for tx in (FACTORIES["recommended"](), fj.with_metrics(FACTORIES["recommended"]())):
        arguments = gradients(params), tx.init(params), params
        update = jax.jit(tx.update)
        kept = export.deserialize(export.export(update)(*arguments).serialize())
        chex.assert_trees_all_close(jax.jit(kept.call)(*arguments), update(*arguments), rtol=1e-6)


ELSEWHERE = """
import sys
from pathlib import Path
import jax.export, numpy as np
sys.modules["fusedbun"] = sys.modules["fusedbun_jax"] = None
folder = Path(sys.argv[1])
kept = jax.export.deserialize(bytearray((folder / "step").read_bytes()))
given = np.load(folder / "arrays.npz")
np.savez(folder / "after.npz", *kept.call(*(given[name] for name in given.files)))
"""


@pytest.mark.long
def test_an_exported_step_runs_where_we_are_not(tmp_path):
    tx, params = fj.fusedbunw(0.125, momentum_dtype="int4"), {"w": jnp.ones((8, 40))}
    arrays, tree = jax.tree.flatten((gradients(params), tx.init(params), params))
    step = jax.jit(lambda *arrays: jax.tree.leaves(tx.step(*tree.unflatten(arrays))))
    (tmp_path / "step").write_bytes(export.export(step)(*arrays).serialize())
    np.savez(tmp_path / "arrays.npz", *map(np.asarray, arrays))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)],
        text=True,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    after = np.load(tmp_path / "after.npz")
    want = jax.jit(lambda *arrays: jax.tree.leaves(tx.step(*tree.unflatten(arrays), implementation="definition")))(
        *arrays
    )
    for name, expected in zip(after.files, want, strict=True):
        np.testing.assert_allclose(after[name].astype(float), np.asarray(expected).astype(float), rtol=1e-6, atol=1e-6)
