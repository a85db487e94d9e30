"""The command `fusedbun`. Only NumPy is imported until a command needs more."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fusedbun.tools.bench import command as bench
from fusedbun.tools.cli import info
from fusedbun.tools.cli.arguments import Settings, parser
from fusedbun.tools.cli.listing import listing
from fusedbun.tools.plan import command as plan
from fusedbun.tools.shared.errors import CommandError, missing_library

INTERRUPTED = 128 + 2  # what a shell reports for a process that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; bad options raise SystemExit(2) after one line on stderr."""
    commands = parser()
    options = vars(commands.parse_args(argv))
    command = options.pop("command")
    if command is None:
        commands.print_help()
        return 0
    if command == "list":
        return _print(listing(options["json"]))
    if command == "info":
        return _print(info.info(options["json"]))
    if command == "plan":
        shown = plan.run(options)
        return 2 if shown is None else _print(shown)
    if command == "bench":
        return bench.main(options)
    settings = Settings(**options)
    try:
        from fusedbun.tools.train.train import train

        return INTERRUPTED if train(settings).interrupted else 0
    except CommandError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(missing_library(error, settings.frameworks))
    except KeyboardInterrupt:
        print("fusedbun train: interrupted", file=sys.stderr)
        return INTERRUPTED


def _print(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has gone, as `head` does; Python's own flush at the end is to be silent too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _refuse(reason: str) -> int:
    print(f"fusedbun train: error: {reason}", file=sys.stderr)
    return 2
