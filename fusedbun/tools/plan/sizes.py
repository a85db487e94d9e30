"""Sizes in bytes: of numbers by dtype, and as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction

UNITS = {"B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for middle, base in (("i", 1024), ("", 1000))
}
SIZE = f"a size above 0, a number and one of the units {', '.join(UNITS)}, such as 24GiB"
_BINARY = ("TiB", "GiB", "MiB", "KiB", "B")
_LARGEST = 1 << 63  # no machine counts further

# The bits of a number, by the dtype's name.
BITS = {
    "float64": 64,
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "complex64": 64,
    "complex128": 128,
    **{f"float8_{kind}": 8 for kind in ("e4m3fn", "e5m2", "e4m3", "e3m4", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz")},
    "float8_e8m0fnu": 8,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
    "float4_e2m1fn": 4,
    **{f"{sign}int{bits}": bits for sign in ("", "u") for bits in (2, 4, 8, 16, 32, 64)},
    **{f"q{sign}int{bits}": bits for sign, bits in (("", 8), ("u", 8), ("", 32))},  # torch's quantized tensors
    "bool": 8,
}
STEPPED = ("float64", "float32", "bfloat16", "float16")  # what the optimizers step


def size_of(shape: Iterable[int], dtype: str) -> int:
    """The bytes of an array."""
    return -(-math.prod(shape) * BITS[dtype] // 8)


def parse_size(text: str) -> int:
    """The bytes of a size such as "24GiB" or "1.5 gb"; a ValueError where it is none.

    Its unit is B, KiB, MiB, GiB, TiB (of 1024) or KB, MB, GB, TB (of 1000), in any case.
    """
    found = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = int(Fraction(found[1]) * units.get(found[2].lower(), 0)) if found else 0
    if not 0 < size < _LARGEST:
        raise ValueError(f"must be {SIZE}, but it is {text!r}")
    return size


def unit_of(size: int) -> str:
    """The largest of B, KiB, MiB, GiB and TiB that the size has one of."""
    return next((unit for unit in _BINARY if size >= UNITS[unit]), "B")


def in_unit(size: int, unit: str) -> str:
    """The size as a number of this unit."""
    return f"{size:,}" if unit == "B" else f"{size / UNITS[unit]:,.2f}"


def readable(size: int) -> str:
    """The size with its unit, such as "23.50 GiB"."""
    unit = unit_of(size)
    return f"{in_unit(size, unit)} {unit}"
