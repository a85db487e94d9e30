"""The file of a portable state: whole or not at all, every byte checked, and nothing in it believed unchecked."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch

import fusedbun
from fusedbun.portable import file
from fusedbun.portable.file import Entry, opened, write

DIGITS = slice(8 + len('{"__metadata__":{"sha256":"'), 8 + len('{"__metadata__":{"sha256":"') + 64)


def make(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = fusedbun.SM3(model.named_parameters(), lr=0.1, momentum=0.9)
    return model, optimizer


def stepped(seed=0):
    model, optimizer = make(seed)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("content") / "state.safetensors"
    fusedbun.save_state(stepped(), path)
    return path.read_bytes()


def sealed(content):
    """The file with the checksum of what it holds now."""
    blank = content[: DIGITS.start] + b"0" * 64 + content[DIGITS.stop :]
    return content[: DIGITS.start] + hashlib.sha256(blank).hexdigest().encode() + content[DIGITS.stop :]


def with_header(text, data=b""):
    """A sealed file with this behind its checksum."""
    header = ('{"__metadata__":{"sha256":"' + "0" * 64 + '"' + text).encode()
    return sealed(len(header).to_bytes(8, "little") + header + data)


def outcome(optimizer, path, content):
    """Tries to load; returns the message of the ValueError, or None. A failure must have changed nothing."""
    with path.open("r+b" if path.exists() else "wb") as found:  # emptying a file has the disk waited for
        found.write(content)
        found.truncate()
    groups, state = optimizer.param_groups, optimizer.state
    try:
        fusedbun.load_state(optimizer, path)
    except ValueError as error:
        assert optimizer.param_groups is groups
        assert optimizer.state is state
        return str(error)
    return None


def test_every_truncation_is_refused(content, tmp_path):
    _, optimizer = make()
    for length in range(len(content)):
        assert outcome(optimizer, tmp_path / "file", content[:length])
    assert outcome(optimizer, tmp_path / "file", content + b"\0")
    assert outcome(optimizer, tmp_path / "file", content) is None


def corrupted(rng, content, start=0):
    changed = bytearray(content)
    for at in rng.sample(range(start, len(content)), rng.randint(1, 8)):
        changed[at] ^= rng.randint(1, 255)
    return bytes(changed)


def test_ten_thousand_corruptions_are_refused(content, tmp_path):
    rng, (_, optimizer) = random.Random(0), make()
    for _ in range(10_000):
        assert outcome(optimizer, tmp_path / "file", corrupted(rng, content))


def test_corruptions_under_a_right_checksum_load_as_a_whole_or_are_value_errors(content, tmp_path):
    rng, (_, optimizer) = random.Random(1), make()
    length = 8 + int.from_bytes(content[:8], "little")
    printable = b'0123456789"\\{}[],:.abcdefFIU -'
    seen = set()
    for _ in range(4000):
        changed = bytearray(content[:length])
        for at in rng.sample(range(DIGITS.stop, length), rng.randint(1, 4)):
            changed[at] = rng.choice(printable)
        seen.add(outcome(optimizer, tmp_path / "file", sealed(bytes(changed) + content[length:])) is None)
    assert False in seen


def entry(name="a", dtype="F32", shape="[1]", offsets="[0,4]"):
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


NAMED = ',"format":"fusedbun optimizer state","version":"1","steps":"null"'
HOSTILE = {
    "negative offset": with_header("}," + entry(offsets="[-4,0]") + "}", bytes(4)),
    "overlap": with_header("}," + entry() + "," + entry("b") + "}", bytes(4)),
    "gap": with_header("}," + entry(offsets="[4,8]") + "}", bytes(8)),
    "backwards": with_header("}," + entry(offsets="[4,0]") + "}", bytes(4)),
    "beyond": with_header("}," + entry(shape="[1000000000000]", offsets="[0,4000000000000]") + "}", bytes(4)),
    "too large for its place": with_header("}," + entry(shape="[999999999,999999999]") + "}", bytes(4)),
    "huge and empty": with_header("}," + entry(shape="[0,999999999999999999]", offsets="[0,0]") + "}"),
    "too many axes": with_header("}," + entry(shape=str([1] * 65).replace(" ", "")) + "}", bytes(4)),
    "no number": with_header("}," + entry(shape="[NaN]") + "}", bytes(4)),
    "negative shape": with_header("}," + entry(shape="[-1]") + "}", bytes(4)),
    "fraction": with_header("}," + entry(shape="[1.0]") + "}", bytes(4)),
    "unknown dtype": with_header("}," + entry(dtype="F99") + "}", bytes(4)),
    "twice": with_header("}," + entry(offsets="[0,0]", shape="[0]") + "," + entry(offsets="[0,0]", shape="[0]") + "}"),
    "metadata twice": with_header(',"a":"","a":""}}'),
    "second checksum": with_header(',"sha256":""}}'),
    "metadata that is no text": with_header(',"a":[]}}'),
    "not closed": with_header(',"a":"'),
    "data without an array": with_header("}}", bytes(4)),
    "text behind it": with_header("}} x"),
    "brackets": with_header("}," + "[" * 1_000_000),
    "no format": with_header("}}"),
    "a later version": with_header(NAMED.replace('"1"', '"2"') + "}}"),
    "arrays without parameters": with_header(NAMED + "}," + entry() + "}", bytes(4)),
    **{
        f"group {i}": with_header(NAMED + f',"group 0":{json.dumps(text)}}}}}')
        for i, text in enumerate(
            (
                *("", "[", "[" * 500_000, "{" * 100, '{"a":' * 100_000, "1" * 500_000, "NaN", '{"a":1,"a":2}', "null"),
                *("[]", "x" * 2_000_000, '{"recipe":1}', "1e999", '"\\ud800"'),
            )
        )
    },
    **{
        f"parameter {i}": with_header(NAMED + f',"parameter a":{json.dumps(text)}}}}}')
        for i, text in enumerate(['{"shape":[NaN]}', '{"shape":[-1]}', '{"shape":[1e3]}', '{"shape":"1"}', "[1]", "{}"])
    },
    "nothing": b"",
    "zeros": bytes(4096),
    "a pickle": b"\x80\x04\x95" + bytes(200),
    "the largest header": b"\xff" * 8 + with_header("}}")[8:],
    "a header of gigabytes": (99_999_999).to_bytes(8, "little") + with_header("}}")[8:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly_and_in_little_memory(name, tmp_path):
    _, optimizer = make()
    tracemalloc.start()
    start = time.perf_counter()
    message = outcome(optimizer, tmp_path / "file", HOSTILE[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message
    assert len(message) < 1000
    assert time.perf_counter() - start < 2
    # Two passes over the header, which is bytes, text and then strings; a megabyte for the chunks of the checksum.
    assert peak < 4 * len(HOSTILE[name]) + 3_000_000, f"{peak:,} bytes"


def test_other_things_than_files_are_named(tmp_path):
    _, optimizer = make()
    with pytest.raises(FileNotFoundError):
        fusedbun.load_state(optimizer, tmp_path / "nothing")
    with pytest.raises(ValueError, match="must be a file"):
        fusedbun.load_state(optimizer, tmp_path)


def test_safetensors_reads_it(content, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "file").write_bytes(content)
    optimizer = stepped()
    arrays = load_file(tmp_path / "file")
    (group,) = optimizer.param_groups
    state = {
        f"{name}/{key}": value
        for name, param in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[param].items()
    }
    assert arrays.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(arrays[name], value, rtol=0, atol=0)


def test_every_dtype_and_shape_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    entries = [
        Entry(f"{dtype} {shape}", dtype, shape)
        for dtype in file.DTYPES
        for shape in [(), (0,), (3, 0, 2), (7,), (2, 5)]
    ]
    arrays = [
        rng.integers(0, 255, (e.bytes,), np.uint8).view(file.DTYPES[e.dtype][1]).reshape(e.shape) for e in entries
    ]
    write(tmp_path / "file", {"ä\n": 'x"\\'}, entries, lambda i: arrays[i])
    with opened(tmp_path / "file") as found:
        assert {k: v for k, v in found.metadata.items() if k != "sha256"} == {"ä\n": 'x"\\'}
        for e, array in zip(entries, arrays, strict=True):
            assert found.entries[e.name][0] == e
            assert found.read(e.name).tobytes() == array.tobytes()


def test_what_fails_leaves_the_old_file(content, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(content)

    def fails(i):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write(path, {}, [Entry("a", "float32", (2,))], fails)
    assert path.read_bytes() == content
    assert [*tmp_path.iterdir()] == [path]


def test_two_arrays_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two arrays would be called 'a'"):
        write(tmp_path / "file", {}, [Entry("a", "int8", ())] * 2, lambda i: np.zeros((), np.int8))


WRITES = """
import sys
import numpy as np
from pathlib import Path
from fusedbun.portable.file import Entry, write
entries = [Entry(str(i), "float32", (64, 1024)) for i in range(8)]
for n in range(10**6):
    write(Path(sys.argv[1]), {"n": str(n)}, entries, lambda i: np.full((64, 1024), n, np.float32))
    print(n, flush=True)
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path, rng = tmp_path / "state", random.Random(2)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE, text=True)
        last = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        last = int((process.stdout.read().split() or [last])[-1])
        process.wait()
        process.stdout.close()
        with opened(path) as found:
            n = int(found.metadata["n"])
            assert n in (last, last + 1)
            assert all((found.read(str(i)) == n).all() for i in range(8))
