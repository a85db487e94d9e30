"""The command `fusedbun`. Only NumPy is imported until a command needs more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fusedbun.tools.bench import command as bench
from fusedbun.tools.cli import info
from fusedbun.tools.cli.listing import listing
from fusedbun.tools.plan import command as plan
from fusedbun.tools.shared.command import AS_JSON, INTERRUPTED, Commands, Parser, Text, add_command, print_out
from fusedbun.tools.shared.errors import CommandError
from fusedbun.tools.train import command as train
from fusedbun.version import __version__

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

_LIST_DESCRIPTION = """\
List the optimizers: the torch class, the optax factory, the bytes of state that each
parameter costs (of a float32 matrix of 1024 x 1024, counted from the declared state),
the defaults and the source. Needs neither torch nor JAX.
"""

_LIST_EPILOG = """\
examples:
  fusedbun list
  fusedbun list --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; bad options raise SystemExit(2) after one line on stderr."""
    root = parser()
    options = vars(root.parse_args(argv))
    command, run = options.pop("command"), options.pop("run", None)
    if run is None:
        root.print_help()
        return 0
    try:
        return int(run(**options))
    except CommandError as error:
        reason, code = f"error: {error}", 2
    except KeyboardInterrupt:
        reason, code = "interrupted", INTERRUPTED
    print(f"fusedbun {command}: {reason}", file=sys.stderr)
    return code


def parser() -> Parser:
    """The parser of the whole command."""
    root = Parser("fusedbun", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=Text, allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"fusedbun {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _register_list(commands)
    for command in (train, bench, plan, info):
        command.register(commands)
    return root


def _register_list(commands: Commands) -> None:
    summary = "list the optimizers with their classes, state, defaults and sources"
    add = add_command(commands, "list", _list, summary, _LIST_DESCRIPTION, _LIST_EPILOG)
    add("--json", action="store_true", dest="as_json", help=AS_JSON)


def _list(as_json: bool) -> int:
    return print_out(listing(as_json))
