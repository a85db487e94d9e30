"""What one parameter and its state are between steps, and while they are computed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from fusedbun.chain import COUNTER, PARAM
from fusedbun.storage import codes
from fusedbun.storage import noise as rounding
from fusedbun.storage.codes import Storing
from fusedbun.transform import Array, Slot, State


class Starts(Protocol):
    """Where the noise of arrays begins: `fusedbun.chain.Rounding`, or what stands for it while a step is traced."""

    @property
    def stochastic(self) -> bool: ...
    def start(self, key: str) -> Any: ...


@dataclass(frozen=True)
class Storage:
    """How one parameter and its state are stored.

    Args:
        xp: the functions.
        rounding: how the parameter is rounded, and where noise begins.
        like: an array of its shape, on its device.
        dtype: its dtype's name.
        places: the elements' places along each of its axes, where it is a part of a parameter; None: from 0 up.
    """

    xp: Storing
    rounding: Starts
    like: Array
    dtype: str
    places: Sequence[Array] | None = None

    @cached_property
    def _index(self) -> Sequence[Array]:
        return self.xp.index(self.like, range(self.like.ndim)) if self.places is None else self.places

    def decode(self, key: str, slot: Slot, stored: State, dtype: Any) -> Array:
        """A slot's numbers, in the framework's dtype that is computed in.

        Args:
            key: the slot's name.
            slot: the slot.
            stored: the state's arrays by name.
            dtype: the dtype.
        """
        return codes.decode(self.xp, self._code(slot), self._parts(key, slot, stored), self.like.shape, dtype)

    def encode(self, key: str, slot: Slot, value: Array, stored: State) -> dict[str, Array]:
        """The new arrays of a slot, by name, still to be cast to their dtypes."""
        code, parts = self._code(slot), self._parts(key, slot, stored)
        start = self.rounding.start(key) if codes.is_noisy(code) else 0
        new = codes.encode(self.xp, code, value, parts, start, self._index if codes.is_noisy(code) else ())
        return {key + part: array for part, array in new.items()}

    def round(self, param: Array, stored: State) -> tuple[Array, dict[str, Array]]:
        """The parameter after a step, ready to be cast to its dtype, and the state that rounding it keeps."""
        if not self.rounding.stochastic:
            return param, {}
        step = stored[COUNTER]
        noise = rounding.noise(self.rounding.start(PARAM), step, self._index)
        return rounding.to_bfloat16(self.xp, param, noise), {COUNTER: step + 1}

    def _code(self, slot: Slot) -> str:
        return codes.resolved(slot.code, self.dtype)

    def _parts(self, key: str, slot: Slot, stored: Mapping[str, Array]) -> dict[str, Array]:
        return {part: stored[key + part] for part in codes.arrays(slot, self.dtype) if key + part in stored}
