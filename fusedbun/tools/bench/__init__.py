"""How long an optimizer's step takes, beside the machine's limit and the other packages: `fusedbun bench`.

`shapes` says what is stepped, `contenders` who steps it (`contenders_torch`, `contenders_jax`, `limits`), `measure`
takes the times in turns, `results` makes numbers of them and shows them, and `run` joins these.
Importing this package imports neither torch nor JAX.
"""
