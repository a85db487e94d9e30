"""The object in which the second moment crosses an optax chain, from an accumulator to `rms_scale`."""

from __future__ import annotations

from typing import Any, NoReturn

from fusedbun.transform import Signal

_ADJACENT = (
    "an accumulator's updates carry a second moment, which only rms_scale may read; put rms_scale directly after the "
    "accumulator, and transformations of other libraries before or behind the two (where no rms_scale is wanted, any "
    "other of fusedbun's transformations there drops the second moment)"
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
        # `hasattr(x, "shape")` must not find a non-array here and go on: so a TypeError, except for Python's protocols.
        raise (AttributeError if name.startswith("_") else TypeError)(_ADJACENT)

    def __repr__(self) -> str:
        return f"<{_ADJACENT}>"  # others' messages quote what they cannot use

    @property
    def __jax_array__(self) -> NoReturn:
        raise ValueError(_ADJACENT)  # `jit` asks for it, and lets a ValueError through

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(_ADJACENT)

    __array__ = __float__ = __bool__ = __len__ = __iter__ = __getitem__ = _refuse
    __neg__ = __pos__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
