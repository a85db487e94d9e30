"""The planner reads files of weights: good ones without loading them, bad ones with one clear error."""

import json
import math
import re
import struct

import pytest
from memory_plans import SM3, the_one

import fusedbun

# ---- files


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def written(path, header, data, length=None):
    """A safetensors file of a header, as JSON or as bytes, and so many bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def sharded(folder, shards):
    """A folder of shards, each a mapping from names to shapes, and their index."""
    places = {}
    for number, shapes in enumerate(shards):
        file, header, at = f"model-{number}.safetensors", {}, 0
        for name, shape in shapes.items():
            header[name] = tensor(shape, at, at := at + 2 * math.prod(shape), "BF16")
            places[name] = file
        written(folder / file, header, at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_a_file_and_a_folder_of_files(tmp_path):
    folder = sharded(tmp_path, [{"embed": [50, 8], "norm": [8]}, {"head": [50, 8]}])
    for path in (folder, folder / "model.safetensors.index.json", str(folder)):
        plan = fusedbun.plan(path, SM3)
        assert [(t.name, t.shape, t.dtype) for t in plan.tensors] == [
            ("embed", (50, 8), "bfloat16"),
            ("norm", (8,), "bfloat16"),
            ("head", (50, 8), "bfloat16"),
        ]
    assert fusedbun.plan(folder / "model-0.safetensors", SM3).parameters == 50 * 8 + 8
    (folder / "model.safetensors.index.json").unlink()
    assert fusedbun.plan(folder, SM3).parameters == 2 * 50 * 8 + 8


def test_a_large_file_is_not_read(tmp_path):
    size = 1 << 36
    path = written(tmp_path / "large.safetensors", {"w": tensor([1 << 17, 1 << 17], 0, size)}, 0)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)  # a hole, which takes no room
    assert the_one(path)[0].weights == size


def test_a_json_file_of_shapes(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text('{"a": [2, 3], "b": {"shape": [4], "dtype": "bfloat16"}, "c": {"scale": []}}')
    assert [tuple(t[:3]) for t in fusedbun.plan(path, SM3).tensors] == [
        ("a", (2, 3), "float32"),
        ("b", (4,), "bfloat16"),
        ("c.scale", (), "float32"),
    ]


GOOD = {"w": tensor([2, 2], 0, 16)}
CORRUPT = {
    "empty": (b"", None),
    "shorter than a length": (b"\0\0\0", None),
    "data cut off": (GOOD, 8),
    "data behind the end": (GOOD, 32),
    "no JSON": (b"{nope", 0),
    "no UTF-8": (b"\xff\xfe{}", 0),
    "a list": (b"[1, 2]", 0),
    "deep": (b'{"a":' * 100_000, 0),
    "overlapping": ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, 12),
    "oversized": ({"a": tensor([2], 0, 1 << 60)}, 8),
    "reversed": ({"a": tensor([2], 8, 0)}, 8),
    "negative offset": ({"a": tensor([2], -8, 0)}, 8),
    "negative shape": ({"a": tensor([-2], 0, 8)}, 8),
    "shape of another size": ({"a": tensor([3], 0, 8)}, 8),
    "more than a machine counts": ({"a": tensor([1 << 40, 1 << 40], 0, 8)}, 8),
    "unknown dtype": ({"a": tensor([2], 0, 8, "Q4")}, 8),
    "text for a shape": ({"a": tensor("2", 0, 8)}, 8),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_one_clear_error(tmp_path, content):
    header, data = content
    path = tmp_path / "model.safetensors"
    path.write_bytes(header) if data is None else written(path, header, data)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or a part of one: .+download it"):
        fusedbun.plan(path, SM3)


@pytest.mark.parametrize("length", [1 << 30, 90_000_000, 1 << 63, (1 << 64) - 1])
def test_a_header_that_claims_to_be_longer_than_the_file(tmp_path, length):
    path = written(tmp_path / "model.safetensors", GOOD, 16, length)
    with pytest.raises(ValueError, match="is no safetensors file, or a part of one"):
        fusedbun.plan(path, SM3)


def test_every_file_cut_short_is_an_error(tmp_path):
    whole = written(tmp_path / "whole", GOOD, 16).read_bytes()
    for length in range(len(whole)):
        part = tmp_path / "part.safetensors"
        part.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no safetensors file, or a part of one"):
            fusedbun.plan(part, SM3)


def test_other_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        fusedbun.plan(tmp_path / "absent.safetensors", SM3)
    with pytest.raises(ValueError, match="has no safetensors files"):
        fusedbun.plan(tmp_path, SM3)
    with pytest.raises(ValueError, match="must be a file or a folder"):
        fusedbun.plan("/dev/null", SM3)
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        fusedbun.plan(pointer, SM3)
    for name in ("a", "b"):
        written(tmp_path / f"{name}.safetensors", GOOD, 16)
    pointer.unlink()
    with pytest.raises(ValueError, match="has 'w' in several files and no index"):
        fusedbun.plan(tmp_path, SM3)
    with pytest.raises(ValueError, match="nothing to plan"):
        fusedbun.plan(written(tmp_path / "nothing.safetensors", {}, 0), SM3)


INDICES = {
    '{"weight_map": {"w": "absent.safetensors"}}': "there is no such file beside it",
    '{"weight_map": {"w": "../model-0.safetensors"}}': "names files beside it",
    '{"weight_map": {"w": "/etc/passwd"}}': "names files beside it",
    '{"weight_map": {"other": "model-0.safetensors"}}': "says that 'other' is in 'model-0.safetensors', but it is not",
    '{"weight_map": {"w": 3}}': 'it has no "weight_map"',
    '{"weight_map": ["w"]}': 'it has no "weight_map"',
    "[]": 'it has no "weight_map"',
    "{": "is not JSON",
    "[" * 100_000: "is not JSON",
}


@pytest.mark.parametrize(("text", "reason"), INDICES.items(), ids=[text[:40] for text in INDICES])
def test_a_wrong_index_is_one_clear_error(tmp_path, text, reason):
    sharded(tmp_path, [{"w": [2, 2]}])
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)):
        fusedbun.plan(tmp_path, SM3)
