"""The command `fusedbun`. Only NumPy is imported until a command needs more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

from fusedbun.tools.bench import command as bench
from fusedbun.tools.cli import info, listing
from fusedbun.tools.plan import command as plan
from fusedbun.tools.shared.command import INTERRUPTED, Command, CommandError
from fusedbun.tools.train import command as train
from fusedbun.version import __version__

COMMANDS: dict[str, Command] = {
    command.name: command for command in (listing.COMMAND, train.COMMAND, bench.COMMAND, plan.COMMAND, info.COMMAND)
}

_DESCRIPTION = """\
Memory-efficient optimizers, defined once, for PyTorch and for JAX.
"""

_EPILOG = """\
examples:
  fusedbun list      every optimizer: its classes, its state, its defaults, its source
  fusedbun train     train a small network in torch and in Flax, and compare
  fusedbun bench     measure how long a step takes, beside other packages
  fusedbun plan      how much memory training a model takes with each optimizer
  fusedbun info      what steps an optimizer on this machine, and why

`fusedbun COMMAND --help` describes the options of a command.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help stands as it is written, with room for the longest option."""

    def __init__(self, **texts: Any) -> None:
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        super().__init__(**texts, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Ends the command with the message and exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; bad options raise SystemExit(2) after one line on stderr."""
    root = parser()
    options = vars(root.parse_args(argv))
    name = options.pop("command")
    if name is None:
        root.print_help()
        return 0
    command = COMMANDS[name]
    try:
        return command.run(command.settings(**options))
    except CommandError as error:
        reason, code = f"error: {error}", 2
    except KeyboardInterrupt:
        reason, code = "interrupted", INTERRUPTED
    print(f"fusedbun {name}: {reason}", file=sys.stderr)
    return code


def parser() -> Parser:
    """The parser of the whole command."""
    root = Parser(prog="fusedbun", description=_DESCRIPTION, epilog=_EPILOG)
    root.add_argument("--version", action="version", version=f"fusedbun {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        about, below = command.description, command.epilog
        own = commands.add_parser(name, help=command.summary, description=about, epilog=below)
        for setting in fields(command.settings):
            dashed, how = setting.name.replace("_", "-"), dict(setting.metadata)
            flag, no = how.pop("flag", f"--{dashed}"), how.pop("no", None)
            if flag != setting.name:  # which is an argument without a flag
                how["dest"] = setting.name
            own.add_argument(flag, **how)
            if no is not None:
                own.add_argument(f"--no-{dashed}", dest=setting.name, action="store_const", const=None, help=no)
    return root
