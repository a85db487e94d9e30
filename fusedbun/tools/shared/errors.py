"""What stops a command with one line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The libraries of the extras, by the name they are imported under.
LIBRARIES = {
    "torch": "PyTorch",
    "jax": "JAX",
    "optax": "optax",
    "flax": "Flax",
    "sklearn": "scikit-learn",
    "rich": "rich",
    "matplotlib": "matplotlib",
}


class CommandError(Exception):
    """The command cannot be run as it was given; the message is one line that says why."""


@contextmanager
def libraries_for(purpose: str, *extras: str, remedy: str = "") -> Iterator[None]:
    """Names the library that is missing, and how to install all; another module's error stays as it is.

    Args:
        purpose: what the libraries are for, such as "a chart".
        extras: fusedbun's extras that bring them.
        remedy: what may be done instead, for the end of the line.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = LIBRARIES.get((error.name or "").partition(".")[0])
        if library is None:
            raise
        install = f"pip install 'fusedbun[{','.join(extras)}]'"
        raise CommandError(f"{library} is not installed; {purpose} needs: {install}{remedy}") from error
