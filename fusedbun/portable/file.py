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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
_NAMES = {code: name for name, (code, _) in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes: as much as safetensors allows
_CHUNK = 1 << 20
_BEGIN = '{"__metadata__":{"sha256":"'
_DIGITS = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + 64)  # where the checksum stands in the file
_ENTRY = re.compile(
    r':\{"dtype":"([A-Z0-9]{1,8})","shape":\[((?:[0-9]{1,18}(?:,[0-9]{1,18}){0,63})?)\],'
    r'"data_offsets":\[([0-9]{1,18}),([0-9]{1,18})\]\}'
)
_STRINGS = json.JSONDecoder()


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
        entries: the arrays.
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
    found, at = {}, 0
    for entry in entries:
        if entry.name in found:
            raise ValueError(f"two arrays would be called {entry.name!r} in the file; rename a parameter")
        found[entry.name] = {
            "dtype": DTYPES[entry.dtype][0],
            "shape": entry.shape,
            "data_offsets": (at, at := at + entry.bytes),
        }
    text = json.dumps({"__metadata__": {"sha256": "0" * 64, **metadata}, **found}, separators=(",", ":"))
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
    """A file whose bytes are those that were written, open for reading.

    Args:
        path: where it is.
        metadata: its texts by key.
        entries: its arrays by name, each with the place of its first byte.
        source: the open file.
    """

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, tuple[Entry, int]]
    source: BinaryIO

    def read(self, name: str) -> Numbers:
        """The numbers of an array; those of bfloat16 as words of 16 bits."""
        entry, at = self.entries[name]
        numbers = np.empty(entry.shape, DTYPES[entry.dtype][1])
        self.source.seek(at)
        if _fill(self.source, numbers) != entry.bytes:
            raise ValueError(f"{self.path} has become shorter while it was read")
        return numbers


def _fill(source: BinaryIO, numbers: Numbers) -> int:
    """Reads into an array; returns how many bytes there were."""
    buffer: Any = numbers.reshape(-1).view(np.uint8)
    view, done = memoryview(buffer), 0
    while done < len(view) and (count := source.readinto(view[done:])):  # type: ignore[attr-defined]
        done += count
    return done


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
        if start[8 : _DIGITS.start] != _BEGIN.encode() or len(start) < _DIGITS.stop:
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
        source.seek(8)
        header = source.read(length)
        try:
            metadata, entries = _parsed(header.decode("ascii"), size - 8 - length)
        except ValueError as error:
            raise ValueError(f"{path} has a header that fusedbun does not write: {error}") from None
        yield Opened(path, metadata, {e.name: (e, 8 + length + at) for e, at in entries}, source)


def _check_digest(path: Path, source: BinaryIO, start: bytes) -> None:
    digest = hashlib.sha256(start[: _DIGITS.start] + b"0" * 64)
    source.seek(_DIGITS.stop)
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest().encode() != start[_DIGITS]:
        raise ValueError(f"{path} is damaged: its checksum is not that of its bytes; copy or save it again")


def _parsed(text: str, size: int) -> tuple[dict[str, str], list[tuple[Entry, int]]]:
    """The metadata, and the arrays with their places in the data, of a header.

    Args:
        text: the header.
        size: how many bytes of data there are.
    """
    metadata: dict[str, str] = {}
    entries: list[tuple[Entry, int]] = []
    names: set[str] = set()
    at, end = _DIGITS.stop - 8, 0
    if text[at : at + 1] != '"':
        raise ValueError("its checksum has more than 64 digits")
    at += 1
    while text[at : at + 1] == ",":
        key, at = _string(text, at + 1)
        if text[at : at + 1] != ":" or key in metadata or key == "sha256":
            raise ValueError(f"the key {key!r:.100} of its metadata has no value or stands there twice")
        metadata[key], at = _string(text, at + 1)
    if text[at : at + 1] != "}":
        raise ValueError(f"its metadata does not end at byte {at}")
    at += 1
    while text[at : at + 1] == ",":
        name, at = _string(text, at + 1)
        found = _ENTRY.match(text, at)
        if found is None or name in names or found[1] not in _NAMES:
            raise ValueError(f"the array {name!r:.100} is described wrongly, or twice, or has an unknown dtype")
        entry = Entry(name, _NAMES[found[1]], tuple(int(n) for n in found[2].split(",") if n))
        begin, at = end, found.end()
        end = int(found[4])
        if int(found[3]) != begin or end > size or end - begin != entry.bytes:
            raise ValueError(f"the array {name!r:.100} of shape {entry.shape} does not lie where it should")
        names.add(name)
        entries.append((entry, begin))
    if text[at : at + 1] != "}" or text[at + 1 :].strip(" "):
        raise ValueError(f"there is something else at byte {at}")
    if end != size:
        raise ValueError(f"its arrays take {end:,} bytes, but it has {size:,}")
    return metadata, entries


def _string(text: str, at: int) -> tuple[str, int]:
    """The string that begins here, and where it ends."""
    if text[at : at + 1] != '"':
        raise ValueError(f"there is no string at byte {at}")
    found, end = _STRINGS.raw_decode(text, at)
    return found, end
