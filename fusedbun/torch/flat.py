"""Parameters that FSDP1 has flattened: several in one vector, or one's share of it, so that their axes are gone."""

from __future__ import annotations

from torch import Tensor


def is_of_fsdp1(param: Tensor) -> bool:
    """Whether torch's FullyShardedDataParallel has put it, or what it was made of, into a flat parameter."""
    return getattr(param, "_fsdp_flattened", False)
