"""What one parameter and its state are between steps, and while they are computed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fusedbun.storage import codes, noise
from fusedbun.storage.codes import STEP
from fusedbun.storage.rounding import PARAM, nearest_update, neighbours, to_bfloat16, to_nearest_bfloat16
from fusedbun.transform import Array, Slot, State


class Starts(Protocol):
    """Where the noise of arrays begins: `Rounding`, or what stands for it while a step is traced."""

    @property
    def stochastic(self) -> bool: ...
    @property
    def place(self) -> Sequence[Any]: ...
    def start(self, key: str) -> Any: ...


@dataclass(frozen=True)
class Storage:
    """How one parameter and its state are stored.

    Nothing is written to; where a library's arrays can be, a driver's subclass commits to them in place.
    """

    xp: Any  # the functions: `fusedbun.transform.Namespace` and `fusedbun.storage.codes.Storing`
    rounding: Starts  # how the parameter is rounded, and where noise begins
    like: Array  # an array of the parameter's shape, on its device, in the precision that is computed in
    dtype: str  # the name of the parameter's dtype
    places: Sequence[Array] | None = None  # along each axis, of a part of a parameter; None: from 0 up

    def decode(self, key: str, slot: Slot, stored: State) -> Array:
        """The numbers of the slot of this name, from the state's arrays by name."""
        code = codes.code_of(slot, self.dtype)
        parts = {part: stored[key + part] for part in code.arrays(slot.axes)}
        return code.decode(self.xp, parts, self.like.shape, self.like.dtype)

    def number(self, stored: State) -> Array:
        """The number of the step that is made now, from 1 on."""
        return self.xp.astype(stored[STEP], self.like.dtype) + 1

    def encode(self, key: str, slot: Slot, value: Array, stored: State) -> dict[str, Array]:
        """The new arrays of a slot, by name, still to be cast to their dtypes."""
        code = codes.code_of(slot, self.dtype)
        drawn = self._noise(key, stored) if code.is_noisy else None
        return {key + part: array for part, array in code.encode(self.xp, value, drawn).items()}

    def round(self, param: Array, stored: State) -> Array:
        """The parameter after a step, ready to be cast to its dtype."""
        return to_bfloat16(self.xp, param, self._noise(PARAM, stored)) if self.rounding.stochastic else param

    def update(self, param: Array, change: Array, stored: State) -> Array:
        """What is to be added to a parameter for it to become what `round` makes of `param + change`."""
        if self.rounding.stochastic:
            q = self.round(param + change, stored)
            return self.xp.where(q == param, -0.0, q - param)  # an infinite parameter stays what it is, and so does -0
        if self.dtype == "bfloat16":
            xp = self.xp
            return nearest_update(xp, param, change, partial(to_nearest_bfloat16, xp), partial(neighbours, xp))
        return change

    def commit(self, stored: State, changed: Mapping[str, Array]) -> State:
        """The state's arrays with the changed ones among them."""
        return {**stored, **changed}

    def subtract(self, param: Array, change: Array) -> Array:
        """The parameter less the change."""
        return param - change

    def _noise(self, key: str, stored: State) -> Array:
        """A word for each element of an array."""
        # not a cached property, whose lock torch's compiler does not enter
        index = self.xp.index(self.like, range(self.like.ndim)) if self.places is None else self.places
        return noise.draw(self.rounding.start(key), stored[STEP], index, self.rounding.place)
