"""An optimizer's state in one file that every framework reads: `file.py` is the format, `entries.py` what is in it,
`match.py` how that finds its place in an optimizer, by name and layout.

It needs NumPy only. `fusedbun.save_state` and `fusedbun_jax.save_state` write such files.
"""

from fusedbun.portable.match import inverse

__all__ = ["inverse"]
