"""What a use is, and how it is run with an optimizer.

A use is a function of a contender, whose docstring says when it works. Its cell is

    works             the function returned
    refused: …        it raised this
    wrong: …          it asserted what does not hold
    not applicable    the use has a condition, which the contender does not meet
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

WORKS, NOT_APPLICABLE = "works", "not applicable"
EVERYONE = "*"  # in the reasons of a use: the contenders of this package that have none of their own


@dataclass(frozen=True)
class Contender:
    """An optimizer, called as `contender(params, **settings)` in torch and as `contender(**settings)` in JAX.

    Args:
        name: the class or the factory.
        make: the class or the factory itself.
        settings: its own settings, the learning rate among them where it takes one.
        ours: whether it is of this package.
        ternary: whether it steps weights of -1, 0 and +1.
    """

    name: str
    make: Callable[..., Any]
    settings: Mapping[str, Any]
    ours: bool = True
    ternary: bool = False

    def __call__(self, *params: Any, **changed: Any) -> Any:
        return self.make(*params, **{**self.settings, **changed})

    def has(self, argument: str) -> bool:
        """Whether it takes an argument of this name."""
        return argument in inspect.signature(self.make).parameters


def is_ours(contender: Contender) -> bool:
    """The condition of what only this package has."""
    return contender.ours


def takes(argument: str) -> Callable[[Contender], bool]:
    """The condition of uses of an argument."""
    return lambda contender: contender.has(argument)


@dataclass(frozen=True)
class Use:
    """A use.

    Args:
        title: its name in the table.
        function: of a contender; raises where it does not work.
        works_if: what the function sees to.
        applies: the condition under which a contender is asked at all.
        reasons: why it does not work with an optimizer of this package, by the contender's name.
    """

    title: str
    function: Callable[[Contender], None]
    works_if: str
    applies: Callable[[Contender], bool]
    reasons: Mapping[str, str]

    def reason(self, contender: str) -> str | None:
        """Why it does not work with one of ours, if anything is written."""
        return self.reasons.get(contender, self.reasons.get(EVERYONE))


@dataclass(frozen=True)
class Part:
    """The uses of one subject, in the order in which they are written.

    Args:
        title: the subject.
        uses: what `use` added.
    """

    title: str
    uses: list[Use] = field(default_factory=list)

    def use(
        self,
        title: str,
        applies: Callable[[Contender], bool] = lambda contender: True,
        reasons: Mapping[str, str] | None = None,
        works_if: str | None = None,
    ) -> Callable[[Callable[[Contender], None]], Callable[[Contender], None]]:
        """Adds a function as a use; `works_if` is by default its docstring."""

        def add(function: Callable[[Contender], None]) -> Callable[[Contender], None]:
            said = " ".join((works_if or inspect.getdoc(function) or "").split())
            self.uses.append(Use(title, function, said, applies, reasons or {}))
            return function

        return add


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what frameworks say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def cell(use: Use, contender: Contender) -> str:
    """What becomes of a use with a contender."""
    if not use.applies(contender):
        return NOT_APPLICABLE
    try:
        with _quiet():
            use.function(contender)
    except AssertionError as error:
        return f"wrong: {_line(error)}"
    except Exception as error:
        return f"refused: {type(error).__name__}: {_line(error)}"
    return WORKS


def _line(error: Exception) -> str:
    """The first line of a message, without what differs from run to run."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "what it sees to does not hold")
    return re.sub(r"0x[0-9a-f]+", "0x…", first.replace(tempfile.gettempdir(), "…"))


def is_failing(found: str) -> bool:
    """Whether a cell says that a use does not work."""
    return found not in (WORKS, NOT_APPLICABLE)


def faults(use: Use, cells: Mapping[str, str], reference: str) -> list[str]:
    """What is wrong with the reasons of a use: one that is missing, or that nothing needs any more."""
    failing = [name for name, found in cells.items() if is_failing(found) and name != reference]
    missing = [name for name in failing if cells[reference] == WORKS and use.reason(name) is None]
    needless = [name for name in use.reasons if not (failing if name == EVERYONE else name in failing)]
    return [
        *(f"{use.title}: it works with {reference} but not with {name}, and no reason is written" for name in missing),
        *(f"{use.title}: the reason for {name} is needless, for it works" for name in needless),
    ]
