"""What the commands' options are made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from fusedbun.hyper import Interval


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with the message and exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Text(argparse.RawDescriptionHelpFormatter):
    """Help as it is written, with room for the longest option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


AS_JSON = "the same as JSON, for a program to read"
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(commands: Commands, name: str, summary: str, description: str, epilog: str) -> Parser:
    """The parser of a new command, for its options."""
    return commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=Text, allow_abbrev=False
    )


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
