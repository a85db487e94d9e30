"""The optax optimizers, ours and optax's own, each compiled with its buffers donated. Imports JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax
import jax.extend.backend
import optax

import fusedbun_jax
from fusedbun.tools.bench.contenders import JAX_OURS, LEARNING_RATE, OPTAX, OURS, Arena, Contender, Stepper

Tree = dict[str, jax.Array]

REFERENCE = "adamw"  # of the path `OPTAX`: what times are divided by where torch is not measured
STEP_PATH = f"{JAX_OURS} step"  # for transformations that know how to step at once, without updates in between

# Optax's own, and how often more than once the gradient has to be read.
_OPTAX = (("adamw", 0), ("sm3", 0), ("lion", 0), ("adafactor", 1), ("sgd", 0))


class JaxStepper(Stepper):
    """An optax transformation on an arena's parameters; `advance` is how it steps them."""

    def __init__(self, make: Callable[[], Any], advance: Callable[..., Any], arena: Arena) -> None:
        self._arena = _shared(arena)
        tx = make()
        self._state = jax.block_until_ready(jax.jit(tx.init)(self._arena["params"]))
        self._step = jax.jit(partial(advance, tx), donate_argnums=(0, 1))

    def step(self) -> None:
        """The parameters are donated, and the next contender steps what came back."""
        self._arena["params"], self._state = self._step(self._arena["params"], self._state, self._arena["grads"])
        jax.block_until_ready((self._arena["params"], self._state))

    def state_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    def temporaries(self) -> int | None:
        """As XLA planned them."""
        lowered = self._step.lower(self._arena["params"], self._state, self._arena["grads"])
        analysis = lowered.compile().memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)


# The parameters are donated before the state, in the order of the results, so that none of them trade places.


def _updated(tx: Any, params: Tree, state: Any, grads: Tree) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _stepped(tx: Any, params: Tree, state: Any, grads: Tree) -> Any:
    return tx.step(grads, state, params)


def contenders() -> list[Contender]:
    """All of them."""
    found: dict[str, list[Contender]] = {JAX_OURS: [], STEP_PATH: [], OPTAX: []}

    def add(path: str, name: str, make: Callable[[], Any], advance: Callable[..., Any], rereads: int) -> None:
        found[path].append(Contender(path, name, partial(JaxStepper, make, advance), rereads=rereads))

    for recipe, suffix, settings, rereads in OURS:
        make = partial(getattr(fusedbun_jax, recipe), LEARNING_RATE, **settings)
        add(JAX_OURS, recipe + suffix, make, _updated, rereads)
        if hasattr(make(), "step"):
            add(STEP_PATH, recipe + suffix, make, _stepped, rereads)
    for name, rereads in _OPTAX:
        add(OPTAX, name, partial(getattr(optax, name), LEARNING_RATE), _updated, rereads)
    return [one for path in found.values() for one in path]


@contextmanager
def session(threads: int) -> Iterator[None]:
    """XLA on so many threads.

    It starts as many as there are CPUs for it when it is first used, and keeps them: so it is started anew, with as
    many CPUs as there are to be threads, and gets all of them back. Elsewhere than on Linux it takes what it finds.
    """
    jax.clear_caches()
    jax.extend.backend.clear_backends()
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:threads])
    try:
        jax.devices()
    finally:
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), every)
    yield


def _shared(arena: Arena) -> dict[str, Tree]:
    """Copies of the arena's arrays, made once, and anew where a step that failed has taken the parameters along."""
    shared: dict[str, Tree] = arena.shared.setdefault("jax", {})
    for name, arrays in (("grads", arena.grads), ("params", arena.params)):
        if name not in shared or any(array.is_deleted() for array in shared[name].values()):
            shared[name] = {f"p{k:04}": jax.numpy.array(array) for k, array in enumerate(arrays)}
    return shared
