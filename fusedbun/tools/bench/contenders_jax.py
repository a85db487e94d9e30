"""The optax optimizers, ours and optax's own, each compiled with its buffers donated. Imports JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.extend.backend
import optax

import fusedbun_jax
from fusedbun.tools.bench.arena import Arena
from fusedbun.tools.bench.contenders import JAX_OURS, LEARNING_RATE, OPTAX, Contender

Tree = dict[str, jax.Array]
Factory = Callable[[], Any]

REFERENCE = "adamw"  # of the path `OPTAX`: what times are divided by where torch is not measured
STEP_PATH = f"{JAX_OURS} step"  # for transformations that know how to step at once, without updates in between

# Factory, name, arguments, how often more than once the gradient has to be read.
_OURS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("sm3", "sm3", {}, 0),
    ("sm3", "sm3, momentum", {"momentum": 0.9}, 0),
    ("fusedbun", "fusedbun", {"centralize": True, "use_rms": True}, 1),
    ("fusedbun", "fusedbun, lagged", {"centralize": True, "use_rms": True, "lagged": True}, 0),
    ("decoupled_lionw", "decoupled_lionw", {}, 0),
    ("mup_adamw", "mup_adamw", {"mup": lambda path, param: "weight"}, 0),
    ("scaled_optum", "scaled_optum", {}, 0),
)
_OPTAX = (("adamw", 0), ("sm3", 0), ("lion", 0), ("adafactor", 1), ("sgd", 0))


class JaxStepper:
    """An optax transformation on an arena's parameters.

    Args:
        factory: makes the transformation.
        whole: call its `step` rather than `update` and `apply_updates`.
        arena: what it steps.
    """

    def __init__(self, factory: Factory, whole: bool, arena: Arena) -> None:
        self._arena = _shared(arena)
        tx = factory()
        self._state = jax.block_until_ready(jax.jit(tx.init)(self._arena["params"]))
        self._step = jax.jit(partial(_stepped if whole else _updated, tx), donate_argnums=(0, 1))

    def prepare(self) -> None:
        """Nothing: the gradients are not donated."""

    def step(self) -> None:
        """One step; the parameters are donated, and the next contender steps what came back."""
        self._arena["params"], self._state = self._step(self._arena["params"], self._state, self._arena["grads"])
        jax.block_until_ready((self._arena["params"], self._state))

    def state_bytes(self) -> int:
        """The bytes of the state's arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    def temporaries(self) -> int | None:
        """As XLA planned them."""
        lowered = self._step.lower(self._arena["params"], self._state, self._arena["grads"])
        analysis = lowered.compile().memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)


def contenders() -> list[Contender]:
    """All of them."""
    ours = []
    for factory, name, settings, rereads in _OURS:
        make = partial(getattr(fusedbun_jax, factory), LEARNING_RATE, **settings)
        ours.append(Contender(JAX_OURS, name, partial(JaxStepper, make, False), rereads=rereads))
        if hasattr(make(), "step"):
            ours.append(Contender(STEP_PATH, name, partial(JaxStepper, make, True), rereads=rereads))
    ours.sort(key=lambda contender: contender.path)
    return ours + [
        Contender(
            OPTAX, name, partial(JaxStepper, partial(getattr(optax, name), LEARNING_RATE), False), rereads=rereads
        )
        for name, rereads in _OPTAX
    ]


@contextmanager
def session(threads: int) -> Iterator[None]:
    """XLA on so many threads.

    It starts as many as there are CPUs for it when it is first used, and keeps them: so it is started anew, with as
    many CPUs as there are to be threads, and gets all of them back.
    """
    jax.clear_caches()
    jax.extend.backend.clear_backends()
    with _on_cpus(threads):
        jax.devices()
    yield


@contextmanager
def _on_cpus(number: int) -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):  # elsewhere than on Linux XLA takes what it finds
        yield
        return
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:number])
    try:
        yield
    finally:
        for thread in os.listdir("/proc/self/task"):
            try:
                os.sched_setaffinity(int(thread), every)
            except ProcessLookupError:
                continue  # it has ended


# The parameters are donated before the state, in the order of the results, so that none of them trade places.


def _updated(tx: Any, params: Tree, state: Any, grads: Tree) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _stepped(tx: Any, params: Tree, state: Any, grads: Tree) -> tuple[Any, Any]:
    params, state = tx.step(grads, state, params)
    return params, state


def _shared(arena: Arena) -> dict[str, Tree]:
    """Copies of the arena's arrays, made once, and anew where a step that failed has taken the parameters along."""
    shared: dict[str, Tree] = arena.shared.setdefault("jax", {})
    if "grads" not in shared:
        shared["grads"] = _tree(arena.grads)
    if "params" not in shared or any(array.is_deleted() for array in shared["params"].values()):
        shared["params"] = _tree(arena.params)
    return shared


def _tree(arrays: list[Any]) -> Tree:
    return {f"p{k:04}": jax.numpy.array(array) for k, array in enumerate(arrays)}
