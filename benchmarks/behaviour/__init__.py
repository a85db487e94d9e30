"""What can be done with each optimizer: uses, each of which is run with every class and with AdamW beside them.

    python -m benchmarks.behaviour

`uses.py` says what a use is, and what a cell of the table; the modules `torch_*` and `jax_*` have the uses. A use that
works with AdamW but not with one of ours has the reason written beside it.
"""
