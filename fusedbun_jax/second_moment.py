"""The object in which the second moment crosses an optax chain, from an accumulator to `rms_scale`."""

from __future__ import annotations

from typing import Any, NoReturn

from fusedbun.transform import Signal

_ADJACENT = (
    "an accumulator's updates carry a second moment, which only rms_scale may read; put rms_scale (or another of "
    "fusedbun's transformations) directly after it, and transformations of other libraries before or behind the two"
)


class WithSecondMoment:
    """One leaf's update with its second moment.

    It is not a pytree node, so a foreign transformation sees it as a leaf, and cannot scale the second moment by
    accident. Everything such a transformation would do with a leaf raises an error that says what to do instead.
    """

    __slots__ = ("signal",)

    def __init__(self, signal: Signal) -> None:
        self.signal = signal

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r} here: {_ADJACENT}")

    def __repr__(self) -> str:
        return f"WithSecondMoment({self.signal.update!r})"

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(_ADJACENT)

    __jax_array__ = __array__ = __float__ = __bool__ = __len__ = __iter__ = __getitem__ = _refuse
    __neg__ = __pos__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
