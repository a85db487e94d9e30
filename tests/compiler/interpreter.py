"""Triton's interpreter: a process has to ask for it before it imports Triton, and so before it imports anything."""

import os


def interpret(cache: str) -> None:
    """Prepares a process; the tiles are small, so that small leaves have many stretches."""
    os.environ.update(TRITON_INTERPRET="1", FUSEDBUN_CACHE=cache)
    import numpy as np

    from fusedbun.torch import gpu

    np.seterr(all="ignore")
    gpu.TILES, gpu.SMALL_TILE = (gpu.Tile(16, 4), gpu.Tile(4, 16)), gpu.Tile(4, 8)
    gpu.TILE_OF_BLOCKS = gpu.Tile(2, 32)
    _spoil_what_masks_leave_out()


def _spoil_what_masks_leave_out() -> None:
    """On a GPU a masked load may give anything; the interpreter's own gives zeros, which hide a missing mask."""
    import numpy as np
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def spoiled(builder, pointers, mask, other, *options):
        if other is None:
            element = pointers.get_element_ty()
            kind = np.dtype(interpreter._get_np_dtype(element))
            rubbish = np.full((pointers.data.size, kind.itemsize), 0xFF, np.uint8)  # NaN, -1
            rubbish[1::2] = 0x7B  # large numbers
            other = interpreter.TensorHandle(rubbish.view(kind).reshape(pointers.data.shape), element)
        return load(builder, pointers, mask, other, *options)

    interpreter.InterpreterBuilder.create_masked_load = spoiled
