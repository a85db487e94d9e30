"""The file: safetensors, with a checksum of every byte, written as a whole or not at all, and read with distrust.

    8 bytes    the header's length, from the low byte up
    header     {"__metadata__":{"sha256":"…","<key>":"<text>",…},"<name>":{"dtype":…,"shape":…,"data_offsets":…},…}
    data       the arrays in the header's order, without gaps

Any reader of safetensors reads it. What is read here has to be in the very form that is written here, which takes no
general parser: what the header says is believed where it fits the file's size, and nothing is allocated for the rest.
The checksum is the SHA-256 of the file with zeros for its own 64 digits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedbun.transform import Shape

Numbers = np.ndarray[Any, Any]
# safetensors' names for dtypes, and NumPy's; bfloat16, which NumPy has not, is kept as the words it is made of.
DTYPES = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "int32": ("I32", "<i4"),
    "int8": ("I8", "|i1"),
    "uint8": ("U8", "|u1"),
}
_NAMES = {code.encode(): name for name, (code, _) in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes: as much as safetensors allows
_CHUNK = 1 << 20
_BEGIN = b'{"__metadata__":{"sha256":"'
_DIGITS = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + 64)  # where the checksum stands in the file
_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_METADATA = re.compile(rb",(%b):(%b)" % (_TEXT, _TEXT))
_ENTRY = re.compile(
    rb',(%b):\{"dtype":"(%b)","shape":\[((?:[0-9]{1,18}(?:,[0-9]{1,18}){0,63})?)\],"data_offsets"'
    % (_TEXT, b"|".join(_NAMES))
)


class Entry(NamedTuple):
    """An array of the file: its name, its dtype's name and its shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize


def write(path: Path, metadata: Mapping[str, str], entries: Sequence[Entry], content: Callable[[int], Numbers]) -> None:
    """Writes the file beside its place and moves it there when it is whole and on the disk.

    Whatever ends the process, there is the old file or the new one; killed, it may leave a `.<name>.<process>.part`.

    Args:
        path: the file.
        metadata: texts by key.
        entries: what the arrays are.
        content: the numbers of the i-th array, of its shape, called once for each in order; only one is held.
    """
    header = _header(metadata, entries)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(header)
            digest = hashlib.sha256(header)
            for i, entry in enumerate(entries):
                numbers = np.ascontiguousarray(content(i), DTYPES[entry.dtype][1])
                data: Any = numbers.reshape(-1).view(np.uint8)
                assert data.size == entry.bytes, entry
                file.write(data)
                digest.update(data)
            file.seek(_DIGITS.start)
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


def _header(metadata: Mapping[str, str], entries: Sequence[Entry]) -> bytes:
    described, end = {}, 0
    for entry in entries:
        if entry.name in described:
            raise ValueError(f"two arrays would be called {entry.name!r} in the file; rename a parameter")
        described[entry.name] = {
            "dtype": DTYPES[entry.dtype][0],
            "shape": entry.shape,
            "data_offsets": (end, end := end + entry.bytes),
        }
    text = json.dumps({"__metadata__": {"sha256": "0" * 64, **metadata}, **described}, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"the file's header must have at most {_LARGEST_HEADER:,} bytes, but it has {len(text):,}")
    return len(text).to_bytes(8, "little") + text.encode()


def _sync(folder: Path) -> None:
    """Has the folder's entry written to the disk too, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Opened:
    """A file whose bytes are those that were written, open for reading."""

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, tuple[Entry, int]]  # by name, each with the place of its first byte
    source: BufferedReader

    def read(self, name: str) -> Numbers:
        """The numbers of an array; those of bfloat16 as words of 16 bits."""
        entry, at = self.entries[name]
        numbers = np.empty(entry.shape, DTYPES[entry.dtype][1])
        self.source.seek(at)
        buffer: Any = numbers.reshape(-1).view(np.uint8)
        if self.source.readinto(buffer) != entry.bytes:
            raise ValueError(f"{self.path} has become shorter while it was read")
        return numbers


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Opens a file and checks all of it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or not as it was written.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file, but it is something else")
    with path.open("rb") as source:
        size = os.fstat(source.fileno()).st_size
        start = source.read(_DIGITS.stop)
        length = int.from_bytes(start[:8], "little")
        if start[8 : _DIGITS.start] != _BEGIN or len(start) < _DIGITS.stop:
            raise ValueError(
                f"{path} is not a file of fusedbun's optimizer state, or only the start of one ({size:,} bytes); give "
                f"one that save_state wrote"
            )
        if not _DIGITS.stop - 8 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                f"{path} is damaged: its header is said to have {length:,} bytes, but the file has {size:,}; copy it "
                f"again"
            )
        _check_digest(path, source, start)
        source.seek(0)
        metadata, entries = _parsed(path, source.read(8 + length), size - 8 - length)
        offsets = accumulate((entry.bytes for entry in entries), initial=8 + length)
        yield Opened(path, metadata, {e.name: (e, at) for e, at in zip(entries, offsets, strict=False)}, source)


def _check_digest(path: Path, source: BufferedReader, start: bytes) -> None:
    digest = hashlib.sha256(start[: _DIGITS.start] + b"0" * 64)
    source.seek(_DIGITS.stop)
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest().encode() != start[_DIGITS]:
        raise ValueError(f"{path} is damaged: its checksum is not that of its bytes; copy or save it again")


def _parsed(path: Path, header: bytes, size: int) -> tuple[dict[str, str], list[Entry]]:
    """The metadata and the arrays of a header.

    Only what is written here is sought in it, so nothing is allocated for the rest. That there is no rest shows when
    what was found is written again: it must be the header, and the arrays must take up the data, of `size` bytes.
    """
    try:
        texts = {json.loads(text[1]): json.loads(text[2]) for text in _METADATA.finditer(header)}
        metadata = {"sha256": header[_DIGITS].decode()} | texts
        entries = [
            Entry(json.loads(entry[1]), _NAMES[entry[2]], tuple(int(n) for n in entry[3].split(b",") if n))
            for entry in _ENTRY.finditer(header)
        ]
        if _header(metadata, entries)[8:].rstrip(b" ") != header[8:].rstrip(b" "):
            raise ValueError("its entries are not all that it holds, or not as they should be")
        if (needed := sum(entry.bytes for entry in entries)) != size:
            raise ValueError(f"its arrays take {needed:,} bytes, but it has {size:,}")
    except ValueError as error:
        raise ValueError(f"{path} has a header that fusedbun does not write: {error}") from None
    return metadata, entries
