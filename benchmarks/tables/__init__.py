"""The tables of README.md and of the documents in docs, from the files that the benchmarks wrote.

    python -m benchmarks.tables

Between `<!-- table: NAME -->` and `<!-- end -->` stands what `TABLES[NAME]` makes, and nothing else: this command puts
it there, and `tests/test_readme.py` fails where a document says anything else. A table of a benchmark that has not
been run to its end is empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module

from benchmarks.tables import behaviour, memory, speed
from benchmarks.tables.results import SHAPES, SPEED

DOCUMENTS = ("README.md", "docs/performance.md", "docs/memory.md", "docs/quality.md", "docs/behaviour.md")
_BLOCK = re.compile(r"(?P<begin><!-- table: (?P<name>[\w ]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def quality(part: str, module: str = "document") -> Callable[[], str]:
    """A table of quality, which a module of `benchmarks.quality` makes."""

    def make() -> str:
        return str(getattr(import_module(f"benchmarks.quality.{module}"), part)())

    return make


TABLES: dict[str, Callable[[], str]] = {
    "speed in short": speed.speed_in_short,
    "speed": speed.speed_whole,
    "speed measured": lambda: speed.how_measured(SPEED),
    "shapes measured": lambda: speed.how_measured(SHAPES),
    "drift": speed.drift,
    "jax": speed.jax_whole,
    "slower": speed.slower,
    "fewer bits": speed.fewer_bits,
    "odd shapes": speed.odd_shapes,
    "by size": speed.by_size,
    "state by shape": speed.state_by_shape,
    "memory in short": memory.memory_in_short,
    "memory": memory.memory_whole,
    "low precision": memory.low_precision,
    "low precision in short": memory.low_precision_in_short,
    "quality in a few rows": quality("in_a_few_rows"),
    "quality in short": quality("in_short"),
    "quality in Flax": quality("in_flax"),
    "quality who": quality("who"),
    "quality rates": quality("rates"),
    "quality settings": quality("settings"),
    "quality as reported": quality("as_reported"),
    "quality measured": quality("measured"),
    "quality whole": quality("whole"),
    "quality in place": quality("in_short", "in_place"),
    "behaviour measured": behaviour.behaviour_measured,
    "behaviour in torch": lambda: behaviour.behaviour_of("torch"),
    "behaviour in JAX": lambda: behaviour.behaviour_of("jax"),
    "quality in place whole": quality("whole", "in_place"),
}


def blocks(text: str) -> list[str]:
    """The names of the tables in a document."""
    return [found["name"] for found in _BLOCK.finditer(text)]


def typed(text: str) -> str:
    """What is not a table of the benchmarks."""
    return _BLOCK.sub("", text)


def updated(text: str) -> str:
    """The document with the tables that the results make; raises a KeyError for a table that there is not."""

    def block(found: re.Match[str]) -> str:
        made = TABLES[found["name"]]()
        return f"{found['begin']}\n{made}\n\n{found['end']}" if made else f"{found['begin']}{found['end']}"

    return _BLOCK.sub(block, text)
