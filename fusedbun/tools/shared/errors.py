"""What stops a command with one line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Sequence

# The libraries of the extras that `fusedbun train` uses, by the name they are imported under.
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


def missing_library(error: ModuleNotFoundError, frameworks: Sequence[str]) -> str:
    """Which library is missing and how to install all that the frameworks need; another module's error is raised."""
    library = LIBRARIES.get((error.name or "").partition(".")[0])
    if library is None:
        raise error
    extras = ",".join([*frameworks, "train"])
    return f"{library} is not installed; training in {' and '.join(frameworks)} needs: pip install 'fusedbun[{extras}]'"
