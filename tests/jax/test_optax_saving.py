"""State that is saved in the middle of a run and restored goes on bit for bit."""

import chex
import flax.serialization
import jax
import optax
import orbax.checkpoint as ocp
from factories import described, representative, run, sweep_of_factories

SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


def check_that_it_goes_on(tx, params, state, restored):
    assert described(restored) == described((params, state))
    chex.assert_trees_all_equal(restored, (params, state))
    params, state = run(tx, params, range(2, 4), state)
    chex.assert_trees_all_equal(run(tx, restored[0], range(2, 4), restored[1]), (params, state))


@sweep_of_factories
def test_flax_serialization(factory):
    check_flax_serialization(factory, "float32")


@representative
def test_flax_serialization_of_16_bits(factory):
    check_flax_serialization(factory, "bfloat16")


def check_flax_serialization(factory, dtype):
    tx = factory(SCHEDULE)
    params, state = run(tx, factory.parameters(dtype), 2)
    data = flax.serialization.to_bytes((params, state))
    fresh = factory.parameters(dtype)
    restored = jax.tree.map(jax.numpy.asarray, flax.serialization.from_bytes((fresh, tx.init(fresh)), data))
    check_that_it_goes_on(tx, params, state, restored)


@representative
def test_orbax(factory, tmp_path):
    tx = factory(SCHEDULE)
    params, state = run(tx, factory.parameters(), 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: (params, state)))
    check_that_it_goes_on(tx, params, state, restored)
