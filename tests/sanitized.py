"""Steps leaves of all kinds with compiled kernels, with NumPy alone; `test_sanitizers.py` runs it under sanitizers.

    python sanitized.py JOBS FOLDER

JOBS is a pickled list of `Job`; FOLDER holds the compiled driver and bundles of kernels. Prints how many steps it made.
"""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusedbun import Chain
from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.trace import evaluate, hyperparameters


@dataclass(frozen=True)
class Job:
    """A leaf and its chain.

    Args:
        chain: the chain for this leaf.
        shape: the leaf's shape.
        dtype: its dtype.
        layout: how its arrays lie in memory: "dense", "shifted" by an element, every "other" element, or "last" with
            the second axis behind all others, so that the axes have another order.
        registers: the width of the registers.
        threads: how many threads step it.
        ternary: its numbers are -1, 0 and +1.
    """

    chain: Chain
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "dense"
    registers: int = 1
    threads: int = 1
    ternary: bool = False

    @property
    def order(self) -> tuple[int, ...]:
        """The axes from the slowest in memory to the fastest."""
        axes = tuple(range(len(self.shape)))
        return (axes[0], *axes[2:], axes[1]) if self.layout == "last" else axes


def array(job: Job, values: np.ndarray, dtype: str) -> np.ndarray:
    """The values in the job's layout, in memory that ends where the array does."""
    if dtype == "bfloat16":  # which NumPy does not have: its bits
        values, dtype = values.astype(np.float32).view(np.uint32) >> 16, "uint16"
    if job.layout == "shifted":
        held = np.empty(values.size + 1, dtype)[1:].reshape(values.shape)
    elif job.layout == "other":
        held = np.empty((*values.shape, 2), dtype)[..., 1]
    elif job.layout == "last":
        held = np.moveaxis(np.empty([values.shape[axis] for axis in job.order], dtype), -1, 1)
    else:
        held = np.empty(values.shape, dtype)
    held[...] = values
    return held


def described(x: np.ndarray) -> native.Array:
    """The array as the driver sees it."""
    return native.Array(x.ctypes.data, x.itemsize, x.strides)


def run(job: Job, rng: np.random.Generator) -> None:
    """Three steps of two such leaves, the last with NaN and infinities among the gradients."""
    native.registers = lambda: job.registers
    native._KERNELS.clear()  # of other registers
    kernel = native.kernel(job.chain, len(job.shape), job.order, job.dtype)
    leaves = []
    for _ in range(2):
        values = rng.standard_normal(job.shape)
        leaf = [array(job, x, job.dtype) for x in (np.sign(values) if job.ternary else values, values)]
        for stored in kernel.program.arrays.values():
            dtype, zeros = stored.dtype, np.zeros(stored.shape(job.shape))
            leaf.append(array(job, zeros, dtype) if zeros.shape == job.shape else zeros.astype(dtype))
        leaves.append(leaf)
    for t in range(3):
        for leaf in leaves:
            values = np.asarray(rng.standard_normal(job.shape))
            if t == 2 and values.size > 2:
                values.flat[:3] = np.nan, np.inf, -np.inf
            leaf[1] = array(job, values, job.dtype)
        told = [native.Description(kernel, job.shape, [described(x) for x in leaf], 0) for leaf in leaves]
        batch = native.Leaves(told, 1)
        batch.set_numbers(0, evaluate(kernel.program.scalars, hyperparameters(kernel.program, job.chain, 0.1)))
        batch.step(job.threads)


if __name__ == "__main__":
    jobs = pickle.loads(Path(sys.argv[1]).read_bytes())
    build.BUILT = Path(sys.argv[2])
    for number, job in enumerate(jobs):
        run(job, np.random.default_rng(number))
    print(f"{3 * len(jobs)} steps")
