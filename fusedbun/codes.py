"""How a slot's numbers are stored between steps. A rule never sees a code: it computes on decoded values."""

from __future__ import annotations

from typing import Any

from fusedbun.transform import Array, Namespace, Slot

COMPUTE = "compute"  # stored as computed: float32, or float64 for float64 parameters
CODES = (COMPUTE, "int8", "int32")


def storage_dtype(slot: Slot, compute: str) -> str:
    """The name of the dtype that the slot's array has, where the leaf is computed in `compute`."""
    if slot.code not in CODES:
        raise ValueError(f"a slot's code must be one of {', '.join(CODES)}, but it is {slot.code!r}")
    return compute if slot.code == COMPUTE else slot.code


def decode(xp: Namespace, slot: Slot, stored: Array, dtype: Any) -> Array:
    """The slot's numbers in `dtype`, the precision that is computed in."""
    return stored if slot.code == COMPUTE else xp.astype(stored, dtype)


def encode(xp: Namespace, slot: Slot, value: Array, dtype: Any) -> Array:
    """The array to store for `value`; `dtype` is the framework's own for `storage_dtype`."""
    return value if slot.code == COMPUTE else xp.astype(value, dtype)
