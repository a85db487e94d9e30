"""Where Flax keeps a parameter's output channels."""

from __future__ import annotations

from typing import Any


def flax_channel_axis(path: tuple[str, ...], param: Any) -> int:
    """The channel axis of a Flax parameter: the last for a kernel, the first for everything else.

    Flax stores a Dense kernel as (in, out), a Conv kernel as (…, in, out) and an embedding as (vocabulary, width);
    torch stores (out, in), (out, in, …) and (vocabulary, width). With this rule as `channel_axis`, `centralize` does
    to a Flax network what it does to the same network in torch. Attention is the exception: of its kernels
    (in, heads, width) one axis can be kept, the width, and its biases (heads, width) have two axes and keep the heads.

    >>> flax_channel_axis(("Dense_0", "kernel"), None), flax_channel_axis(("Embed_0", "embedding"), None)
    (-1, 0)
    """
    return -1 if "kernel" in path else 0
