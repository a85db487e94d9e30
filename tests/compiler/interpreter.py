"""Triton's interpreter: a process has to ask for it before it imports Triton, and so before it imports anything."""

import os


def interpret(cache: str) -> None:
    """Prepares a process; the tiles are small, so that small leaves have many blocks."""
    os.environ.update(TRITON_INTERPRET="1", FUSEDBUN_CACHE=cache)
    import numpy as np

    from fusedbun.compiler import gpu

    np.seterr(all="ignore")
    gpu.TILES, gpu.SMALL_TILE = (gpu.Tile(16, 4), gpu.Tile(4, 16)), gpu.Tile(4, 8)
