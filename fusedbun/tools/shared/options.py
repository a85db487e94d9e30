"""Converters of options."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from fusedbun.hyper import Interval


def number(interval: Interval) -> Callable[[str], float]:
    """A converter to a number in an interval."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if value not in interval:
            raise argparse.ArgumentTypeError(f"must be a number in {interval}, but it is {text!r}")
        return value

    return convert


def whole(low: int) -> Callable[[str], int]:
    """A converter to a whole number of at least `low`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, but it is {text!r}")
        return value

    return convert
