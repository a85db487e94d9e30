"""What every command is made of: a parser, a function that runs it, and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

INTERRUPTED = 128 + 2  # what a shell reports for a process that SIGINT ended
AS_JSON = "the same as JSON, for a program to read"
DEFAULT = "(default: %(default)s)"

EXIT_CODES = """\
exit codes:
  0    done
  2    an option is not valid, a library is not installed, or nothing can be written
       to DIR; one line on stderr says which
  130  interrupted by Ctrl-C: what was measured is printed and written, and marked so
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with the message and exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Text(argparse.RawDescriptionHelpFormatter):
    """Help as it is written, with room for the longest option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    commands: Commands, name: str, run: Callable[..., int], summary: str, description: str, epilog: str
) -> Callable[..., Any]:
    """Adds a command; returns what adds an option to it.

    Args:
        commands: where it is added.
        name: its name.
        run: takes its options by name, and returns the exit code; a CommandError or a KeyboardInterrupt ends it.
        summary: a line about it.
        description: the help above its options.
        epilog: the help below them.
    """
    texts: Any = {"help": summary, "description": description, "epilog": epilog}
    parser = commands.add_parser(name, formatter_class=Text, allow_abbrev=False, **texts)
    parser.set_defaults(run=run)
    return parser.add_argument


def print_out(text: str) -> int:
    """Prints a command's result; returns its exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has gone, as `head` does; Python's own flush at the end is to be silent too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
