"""Adapter directories that are damaged or made to do harm: nothing gets further than a message."""

import hashlib
import json
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch

from fastpeft.errors import AdapterFileError
from fastpeft.files import read_adapter, read_config, write_adapter
from fastpeft.safetensors_header import MAX_TENSORS
from tests.adapter_dirs import CONFIG, SETTINGS, SIDE, WEIGHTS, assert_same_tensors, some_tensors, tree
from tests.counting import count


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter"
    write_adapter(path, some_tensors(), SETTINGS)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def blob(header, data=b"", length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one(dtype="F32", shape=(2,), begin=0, end=8, data=bytes(8), name="a", **more):
    return blob({name: entry(dtype, list(shape), begin, end), **more}, data)


def refused(path, *parts, read=read_adapter):
    """Reading fails with a message that has these parts, in under a second, in little memory, changing nothing."""
    before = tree(path) if os.path.isdir(path) else None
    start = time.process_time()
    with pytest.raises(AdapterFileError) as caught:
        read(path)
    assert time.process_time() - start < 1.0
    tracemalloc.start()
    with pytest.raises(AdapterFileError):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    message = str(caught.value)
    for part in (str(path), *parts):
        assert part in message
    assert len(message) < 1000 + 3 * len(str(path))
    if before is not None:
        assert tree(path) == before
    count("hostile files refused")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
DEEP = 100_000  # levels; the parser would recurse as deep, on the C stack
CONFIGS = {
    "empty": (b"", "is not valid JSON", "line 1, column 1"),
    "truncated": (b'{"peft_type": "LO', "is not valid JSON", "fetch it again"),
    "not-utf8": (b'{"peft_type": "\xff"}', "is not UTF-8", "byte 15"),
    "utf16": ('{"peft_type": "LORA"}'.encode("utf-16"), "is not UTF-8"),
    "list": (b'["peft_type"]', "must be a JSON object", "['peft_type']"),
    "deep-lists": (b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested more than 64 levels"),
    "deep-objects": (b'{"a":' * (DEEP // 2) + b"1" + b"}" * (DEEP // 2), "nested more than 64 levels"),
    "deep-hidden": (b'{"a": "]]]\\"]]' + b"]" * 500 + b'", "b": ' + b"[" * 500, "nested more than 64 levels"),
    "large": (b'{"peft_type": "LORA", "a": "' + b"x" * 1_000_000 + b'"}', "longer than 1000000 bytes"),
    "values": (b'{"peft_type": "LORA", "a": [' + b"0," * 300_000 + b"0]}", "too many values"),
    "quotes": (b'"\\"' * 333_000, "too many values"),
    "duplicate": (b'{"peft_type": "LORA", "r": 1, "r": 2}', "the key 'r' occurs twice"),
    "duplicate-inside": (b'{"peft_type": "LORA", "p": {"x": 1, "x": 2}}', "the key 'x' occurs twice"),
    "nan": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not a number"),
    "infinity": (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is not a number"),
    "overflow": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "'1e999' is not finite"),
    "long-number": (b'{"peft_type": "LORA", "r": ' + b"9" * 500_000 + b"}", "is too large"),
    "surrogate": (b'{"peft_type": "LORA", "a": "\\ud800"}', "lone surrogate"),
    "no-type": (b'{"r": 8}', "peft_type is missing", '"LORA"'),
    "type-null": (b'{"peft_type": null}', "peft_type is None"),
    "type-list": (b'{"peft_type": ["LORA"]}', "peft_type is ['LORA']"),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("read", [read_adapter, read_config])
def test_hostile_config(adapter, case, read):
    content, *parts = CONFIGS[case]
    (adapter / CONFIG).write_bytes(content)
    refused(adapter, CONFIG, *parts, read=read)


def tiny_tensors(count):
    each = '"t%d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    return blob(f"{{{','.join(each % (i, 4 * i, 4 * i + 4) for i in range(count))}}}".encode(), bytes(4 * count))


WEIGHT_FILES = {
    "0-bytes": (b"", "is cut off", "0 bytes"),
    "4-bytes": (b"\0\0\0\0", "is cut off", "4 bytes"),
    "8-bytes": (bytes(8), "is cut off", "8 bytes"),
    "no-header": (blob(b"", b"{}"), "not valid JSON"),
    "longer-than-file": (blob(b"{}", length=999), "is cut off or damaged", "999 bytes, 2 are there"),
    "over-the-limit": (blob(b"{}", length=100_000_001), "100000001 bytes long, the limit is"),
    "2**63": (blob(b"{}", length=2**63), "9223372036854775808 bytes long, the limit is"),
    "2**64-1": (blob(b"{}", length=2**64 - 1), "the limit is"),
    "pickle-2": (pickle.dumps({"a": [1.0] * 100}, protocol=2), "a Python pickle", "weights_only=True"),
    "pickle-5": (pickle.dumps({"a": [1.0] * 100}, protocol=5), "a Python pickle", "weights_only=True"),
    "git-lfs": (LFS_POINTER, "Git LFS pointer", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html></html>", "is not a safetensors file"),
    "not-json": (blob(b"{nonsense}"), "the header of", "is not valid JSON"),
    "not-utf8": (blob(b'{"\xff": 1}'), "is not UTF-8"),
    "list": (blob(b"[1, 2, 3]"), "begins with b'['"),
    "deep": (blob(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "nested more than 64 levels"),
    "duplicate-key": (
        blob(
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            bytes(8),
        ),
        "the key 'a' occurs twice",
    ),
    "overlap": (
        blob({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "'b' at bytes 4:12 overlaps",
    ),
    "gap": (blob({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, bytes(20)), "leaves a gap", "12:20"),
    "gap-in-front": (one(begin=4, end=12, data=bytes(12)), "leaves a gap"),
    "reversed": (one(begin=8, end=0), "span -8"),
    "negative-offset": (one(begin=-8, end=0), "has the data_offsets [-8, 0]"),
    "wrong-span": (one(end=4, data=bytes(4)), "needs 8 bytes", "span 4"),
    "data-truncated": (one(data=bytes(7)), "is cut off", "promises 8 bytes of data, 7 are there"),
    "trailing-bytes": (one(data=bytes(9)), "1 bytes after its last tensor"),
    "unknown-dtype": (one(dtype="F31"), "dtype 'F31'", "adapters hold"),
    "dtype-number": (one(dtype=32), "dtype 32"),
    "dtype-list": (one(dtype=["F32"]), "dtype ['F32']"),
    "negative-shape": (one(shape=(-2,)), "has the shape [-2]"),
    "negative-shapes": (one(shape=(-1, -2)), "has the shape [-1, -2]"),
    "overflowing-shape": (one(shape=(2**33, 2**33)), "needs 295147905179352825856 bytes"),
    "wrapping-shape": (one(shape=(2**63, 2)), "needs 73786976294838206464 bytes"),
    "huge-number": (one(shape=(10**30,)), "is too large"),
    "shape-float": (one(shape=(2.0,)), "has the shape [2.0]"),
    "shape-true": (one(shape=(True, 2)), "has the shape [True, 2]"),
    "shape-text": (blob({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, bytes(8)), "has the shape '2'"),
    "many-dimensions": (one(shape=(1,) * 70 + (2,)), "which no tensor has"),
    "three-offsets": (
        blob({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
        "has the data_offsets [0, 8, 8]",
    ),
    "no-offsets": (blob({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "is not described by dtype, shape"),
    "more-fields": (blob({"a": entry("F32", [2], 0, 8) | {"x": 1}}, bytes(8)), "is not described by dtype, shape"),
    "entry-list": (blob({"a": [1, 2]}, bytes(8)), "is not described by dtype, shape"),
    "metadata-number": (one(__metadata__={"format": 1}), "__metadata__", "text to text"),
    "metadata-text": (one(__metadata__="pt"), "__metadata__", "text to text"),
    "int64": (one(dtype="I64", shape=(1,)), "dtype 'I64'", "Cast it"),
    "bool": (one(dtype="BOOL", shape=(8,)), "dtype 'BOOL'"),
    "complex64": (one(dtype="C64", shape=(1,)), "dtype 'C64'"),
    "float8": (one(dtype="F8_E4M3", shape=(8,)), "dtype 'F8_E4M3'"),
    "no-tensors": (blob({"__metadata__": {"format": "pt"}}), "has no tensors"),
    "zero-numel": (one(shape=(0,), end=0, data=b""), "'a' holds no values", "ZeRO-3"),
    "zero-numel-overflow": (one(shape=(2**63, 2**63, 0), end=0, data=b""), "'a' holds no values"),
    "nan": (one(data=struct.pack("<2f", 1.0, float("nan"))), "1 of the 2 values of tensor 'a' are NaN or infinite"),
    "inf": (one(data=struct.pack("<2f", float("inf"), float("-inf"))), "2 of the 2 values of tensor 'a'"),
    "bf16-nan": (one("BF16", (4,), data=b"\xc0\x7f" * 4), "4 of the 4 values of tensor 'a'"),
    "100k-tensors": (tiny_tensors(100_000), f"more than {MAX_TENSORS} tensors"),
    "100k-entries": (blob(b"{" + b",".join(b'"t%d":0' % i for i in range(800_000)) + b"}"), "too many values"),
    "long-header": (blob(b'{"' + b"a" * 25_000_000 + b'": 1}'), "the limit is"),
    "name-up": (one(name="../../evil"), "tensor named '../../evil'", "not paths of files"),
    "name-dots": (one(name="a..b"), "not paths of files"),
    "name-slash": (one(name="/etc/passwd"), "not paths of files"),
    "name-backslash": (one(name="a\\b"), "not paths of files"),
    "name-nul": (one(name="a\0b"), "'a\\x00b'", "printable"),
    "name-escape": (one(name="\x1b[31mred"), "\\x1b", "printable"),
    "name-bidi": (one(name="a\u202eb"), "printable"),
    "name-empty": (one(name=""), "tensor named ''"),
    "name-long": (one(name="x" * 5000), "... (5002 characters)"),
    "name-surrogate": (one(name="\ud800"), "lone surrogate"),
}


@pytest.mark.parametrize("case", WEIGHT_FILES)
def test_hostile_weights(adapter, case):
    content, *parts = WEIGHT_FILES[case]
    (adapter / WEIGHTS).write_bytes(content)
    refused(adapter, WEIGHTS, *parts)


def test_as_many_tensors_as_are_allowed_still_load(adapter):
    (adapter / WEIGHTS).write_bytes(tiny_tensors(MAX_TENSORS))
    assert len(read_adapter(adapter).tensors) == MAX_TENSORS


@pytest.mark.parametrize("extra", ["trailing", "none"])
def test_header_length_with_the_first_byte_of_a_pickle_is_no_pickle(adapter, extra):
    """0x80 begins every binary pickle, and every header of 128, 384, ... bytes."""
    header = json.dumps({"a": entry("F32", [2], 0, 8)}).encode()
    (adapter / WEIGHTS).write_bytes(blob(header.ljust(128), bytes(8) + b"!" * (extra == "trailing")))
    assert (adapter / WEIGHTS).read_bytes()[0] == 0x80
    if extra == "none":
        assert torch.equal(read_adapter(adapter).tensors["a"], torch.zeros(2))
    else:
        refused(adapter, "bytes after its last tensor")


def test_validate_spares_the_data(adapter):
    # 256 GB, of which the disk holds one block: refused from its header alone.
    values = 1 << 36
    (adapter / WEIGHTS).write_bytes(blob({"a": entry("F32", [values], 0, 4 * values)}))
    os.truncate(adapter / WEIGHTS, (adapter / WEIGHTS).stat().st_size + 4 * values)

    def refuse(config, header, side):
        raise AdapterFileError(f"expected (2, 8), found {header['a'].shape}")

    with pytest.raises(AdapterFileError, match=r"expected \(2, 8\), found \(68719476736,\)"):
        read_adapter(adapter, validate=refuse)


def test_zip_dressed_as_safetensors(adapter):
    torch.save(some_tensors(), adapter / WEIGHTS)
    assert zipfile.is_zipfile(adapter / WEIGHTS)
    refused(adapter, WEIGHTS, "is a zip archive", "weights_only=True", "save_file")


def test_only_a_pickle_is_there(adapter):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(adapter / "owned"),)

    os.unlink(adapter / WEIGHTS)
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(adapter, WEIGHTS, "is missing", "adapter_model.bin", "weights_only=True", "safetensors.torch.save_file")
    assert not (adapter / "owned").exists()


def test_the_conversion_that_the_message_gives_works(adapter):
    import safetensors.torch

    os.unlink(adapter / WEIGHTS)
    torch.save(some_tensors(), adapter / "adapter_model.bin")
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(adapter)
    advice = re.search(r"convert it: (tensors = .*), then (safetensors.*)\.$", str(caught.value))
    exec("\n".join(advice.groups()), {"torch": torch, "safetensors": safetensors})
    assert_same_tensors(read_adapter(adapter).tensors, some_tensors())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SIDE, ".fastpeft-journal.json"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "link-out", "link-device", "link-dangling"])
def test_not_a_regular_file(adapter, tmp_path, name, kind):
    path = adapter / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
        words = "is a named pipe"
    elif kind == "directory":
        path.mkdir()
        words = "is a directory"
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("making a device needs root")
        words = "is a device"
    elif kind == "link-out":
        (tmp_path / "outside").write_text("{}")
        os.symlink("../outside", path)
        words = "outside the adapter's directory"
    elif kind == "link-device":
        os.symlink("/dev/zero", path)
        words = "is a link to /dev/zero"
    else:
        os.symlink("nowhere", path)
        words = "cannot be read: No such file"
    refused(adapter, name, words)


def test_links_inside_the_directory_are_followed(adapter):
    os.rename(adapter / WEIGHTS, adapter / "weights-7")
    os.symlink("weights-7", adapter / WEIGHTS)
    assert_same_tensors(read_adapter(adapter).tensors, some_tensors())


def test_missing_files(adapter, tmp_path):
    os.unlink(adapter / WEIGHTS)
    refused(adapter, WEIGHTS, "is missing", "no weights")
    os.unlink(adapter / CONFIG)
    refused(adapter, CONFIG, "is missing", "it holds []")
    write_adapter(adapter / "checkpoint-7", some_tensors(), SETTINGS)
    refused(adapter, "the folders checkpoint-7 are")
    refused(adapter / "checkpoint-7" / CONFIG, "is not a directory")
    refused(tmp_path / "nothing", "does not exist")


@pytest.mark.parametrize("read", [read_adapter, read_config])
def test_nothing_is_downloaded(monkeypatch, read):
    import socket

    def connect(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    refused("meta-llama/some-lora", "does not exist", "nothing is downloaded", "snapshot_download", read=read)


@pytest.mark.parametrize("path", ["", "a\0b", b"bytes"])
def test_paths_that_are_none(path):
    for call in (lambda: read_config(path), lambda: write_adapter(path, some_tensors(), SETTINGS)):
        with pytest.raises(AdapterFileError, match="is not the path of a directory"):
            call()


@pytest.mark.parametrize(
    ("side", "words"),
    [(b"{", "not valid JSON"), (b"[]", "must be a JSON object"), (b'{"a": 1}', "does not say which weights")],
)
def test_hostile_side_file(adapter, side, words):
    (adapter / SIDE).write_bytes(side)
    refused(adapter, SIDE, words)


def test_hub_cache_links_are_followed_and_no_others(tmp_path, adapter):
    cache = tmp_path / "models--user--name"
    snapshot = cache / "snapshots" / "0123abc" / "sub"
    for folder in (snapshot, cache / "blobs", tmp_path / "elsewhere" / "blobs"):
        os.makedirs(folder)
    for name in (CONFIG, WEIGHTS):
        digest = hashlib.sha256((adapter / name).read_bytes()).hexdigest()
        os.rename(adapter / name, cache / "blobs" / digest)
        os.symlink(f"../../../blobs/{digest}", snapshot / name)
    assert_same_tensors(read_adapter(snapshot).tensors, some_tensors())

    os.rename(cache / "blobs" / digest, tmp_path / "elsewhere" / "blobs" / digest)
    os.unlink(snapshot / WEIGHTS)
    os.symlink(tmp_path / "elsewhere" / "blobs" / digest, snapshot / WEIGHTS)
    refused(snapshot, "is a link to", "outside the adapter's directory", "Copy the file itself")
