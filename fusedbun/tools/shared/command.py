"""What every command is made of: texts, options, a function that runs it, and errors of one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTERRUPTED = 128 + 2  # what a shell reports for a process that SIGINT ended

EXIT_CODES = """\
exit codes:
  0    done
  2    an option is not valid, a library is not installed, or nothing can be written
       to DIR; one line on stderr says which
  130  interrupted by Ctrl-C: what was measured is printed and written, and marked so
"""

_TITLES = {"torch": "PyTorch", "jax": "JAX", "flax": "Flax", "sklearn": "scikit-learn"}
# The libraries of the extras, by the name they are imported under.
_LIBRARIES = {name: _TITLES.get(name, name) for name in (*_TITLES, "optax", "rich", "matplotlib")}


class CommandError(Exception):
    """The command cannot be run as it was given; the message is one line that says why."""


@dataclass(frozen=True)
class Command:
    """A command."""

    name: str
    summary: str  # a line about it
    description: str  # the help above its options
    epilog: str  # the help below them
    settings: type[Any]  # a dataclass whose fields are its options
    run: Callable[[Any], int]  # takes the settings, returns the exit code; a CommandError or KeyboardInterrupt ends it


def option(text: str, **how: Any) -> Any:
    """A field of a command's settings.

    Args:
        text: the option's help; its default is added unless something is said of it.
        how: what argparse's `add_argument` is given; `flag`, where it is not the field's name; and `no`, the help of
            an option that sets the field to None.
    """
    is_said = "(default" in text or how.get("default") in (None, [])
    return field(metadata={"help": text if is_said else f"{text} (default: %(default)s)", **how})


def count(text: str, default: int | None, low: int = 1, metavar: str = "N") -> Any:
    """A whole number of at least `low` among a command's settings."""
    return option(text, type=whole(low), default=default, metavar=metavar)


def output(files: str, default: str) -> Any:
    """The directory that a command writes some files to, among its settings."""
    text = f"where {files} go; made if need be (default: %(default)s/)"
    return option(text, type=Path, default=Path(default), metavar="DIR")


@dataclass(frozen=True)
class Shown:
    """The options of a command that only shows what is there."""

    json: bool = option("the same as JSON, for a program to read", action="store_true")


def print_out(text: str) -> int:
    """Prints a command's result; returns its exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has gone, as `head` does; Python's own flush at the end is to be silent too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def converter(kind: Callable[[str], Any], is_valid: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """A converter of an option's text to what `kind` makes of it, where that is valid."""

    def convert(text: str) -> Any:
        with suppress(ValueError):
            if is_valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {what}, but it is {text!r}")

    return convert


def whole(low: int) -> Callable[[str], int]:
    """A converter to a whole number of at least `low`."""
    return converter(int, low.__le__, f"a whole number of at least {low}")


@contextmanager
def libraries_for(purpose: str, *extras: str, remedy: str = "") -> Iterator[None]:
    """Names the library that is missing, and the extras that bring all, or another remedy.

    The error of a module that is none of the extras' stays as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = _LIBRARIES.get((error.name or "").partition(".")[0])
        if library is None:
            raise
        install = f"pip install 'fusedbun[{','.join(extras)}]'"
        raise CommandError(f"{library} is not installed; {purpose} needs: {install}{remedy}") from error
