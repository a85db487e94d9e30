"""The same network, trained on the same batches in torch and in Flax, has the same weights in the end."""

from dataclasses import replace
from itertools import islice

import numpy as np
from sweeps import sweep

import fusedbun_jax
from fusedbun.recipes import RECIPES
from fusedbun.tools.train import in_flax, in_torch
from fusedbun.tools.train.network import batches, digits, initial_weights
from fusedbun.tools.train.optimizers import OPTIMIZERS, in_dtype, with_settings

STEPS = 50


def trained(framework, entry, learning_rate, dtype):
    (images,) = digits(0, [])
    with framework.session(dtype):
        trainer = framework.Trainer(entry, initial_weights(0), np.full(STEPS, learning_rate), dtype)
        for batch in islice(batches(images, batch_size=16, epochs=1, seed=0), STEPS):
            trainer.step(batch)
        return trainer.weights()


def difference(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(a[name] - b[name]).max() for name in a)


# A sign that rounding turns moves a weight by twice the learning rate. In float64 none of the 50 steps has a gradient
# so close to zero (one that is zero, of a dead unit, is zero in both); in float32 that hangs on the processor.
BY_SIGNS = ("scaled_optum", "decoupled_lionw")
# So is Adam's first step, where a gradient is not large beside eps, whose default, 1e-8, is lost in float32's rounding.
BY_ADAM = ("mup_adam", "mup_adamw")
BOUNDS = [(name, "float64", 1e-9) for name in OPTIMIZERS] + [
    (name, "float32", 1e-3) for name in OPTIMIZERS if name not in BY_SIGNS
]


@sweep(
    ("optimizer", "dtype", "tolerance"),
    BOUNDS,
    short=lambda optimizer, dtype, tolerance: (optimizer, dtype) == ("fusedbun", "float64"),
)
def test_torch_and_flax_train_to_the_same_weights(optimizer, dtype, tolerance):
    entry = in_dtype(optimizer, "float64")  # codes share exponents along rows, which Flax lays out otherwise
    if optimizer in BY_ADAM and dtype == "float32":
        entry = with_settings(optimizer, eps=1e-6)
    in_both = [trained(framework, entry, entry.learning_rate, dtype) for framework in (in_torch, in_flax)]
    moved = min(np.abs(value - initial_weights(0)[name]).max() for name, value in in_both[0].items())
    assert moved > 1e-2  # so every weight took part
    assert difference(*in_both) < tolerance


def test_every_optimizer_that_steps_real_weights_is_there():
    assert set(OPTIMIZERS) == {*RECIPES, "adamw"} - {"ternary_vote"}


def test_without_the_rule_on_channel_axes_the_weights_differ():
    def in_optax(schedule):
        return fusedbun_jax.fusedbun(schedule, centralize=True, use_rms=True, nesterov=True, channel_axis=0)

    entry = OPTIMIZERS["fusedbun"]
    in_both = [
        trained(in_torch, entry, 1e-4, "float64"),
        trained(in_flax, replace(entry, in_optax=in_optax), 1e-4, "float64"),
    ]
    assert difference(*in_both) > 1e-3
