"""The header of a safetensors file, read and checked without touching the data behind it.

Layout: 8 bytes little-endian header length, the header (JSON: name -> dtype, shape, data_offsets), the data; see
https://github.com/huggingface/safetensors#format. The checks are at least as strict as the official reader's, which
still reads the data itself (`fastpeft.files`); what it lets pass and an adapter never has is refused here.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from fastpeft.errors import AdapterFileError
from fastpeft.untrusted import open_regular, parse_json_object, shown

MAX_TENSORS = 50_000  # where no model says how many it could need
MAX_BYTES_EACH = 500  # of the header, for each tensor that it may have
MAX_NAME = 1024
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MAX_MARKS_EACH = 25  # 21 quotes, commas and brackets, and one comma for each dimension beyond the second
_ZERO_NUMEL = "holds no values (saved under ZeRO-3 or FSDP without gathering the parameters first?)"
_TRIPLETS = re.compile(r"\.lora_[AEB]$")
_DISGUISES = {
    b"PK\x03\x04": "a zip archive, as torch.save writes; it can run code when it is opened. If you trust it, convert "
    "it: torch.load(path, weights_only=True), then safetensors.torch.save_file",
    b"\x80": "a Python pickle, as torch.save writes; it can run code when it is opened. If you trust it, convert it: "
    "torch.load(path, weights_only=True), then safetensors.torch.save_file",
    b"version ": "a Git LFS pointer, not the weights. Run `git lfs pull` where it was cloned",
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike[str], max_tensors: int = MAX_TENSORS) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in the safetensors file `path`, in the order of their data; reads no data.

    Raises AdapterFileError if the file is missing, is not a regular safetensors file, or holds what an adapter cannot:
    no tensors or more than `max_tensors`, or MAX_BYTES_EACH of a header for each of these; a dtype outside F64, F32,
    F16 and BF16; a tensor without values. How long that takes is bounded by `max_tensors`, not by the file.
    """
    where = os.fspath(path)
    file = open_regular(where, os.path.dirname(where) or ".")
    if file is None:
        raise AdapterFileError(f"{where} does not exist. Give the path of a safetensors file.")
    with file:
        return parse_header(file, where, max_tensors)


def parse_header(file: BinaryIO, where: str, max_tensors: int = MAX_TENSORS) -> dict[str, TensorInfo]:
    """As `read_header`, from an open file, whose position it moves; `where` names it in errors."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    if size < 9 or len(start) < 9:
        raise AdapterFileError(f"{where} is cut off: it has {size} bytes, less than a header. Fetch or save it again.")
    length = int.from_bytes(start[:8], "little")
    max_bytes = max_tensors * MAX_BYTES_EACH
    if start[8:] != b"{" or length > min(size - 8, max_bytes):
        raise AdapterFileError(f"{where} {_why_no_header(start, length, size, max_bytes)}.")
    file.seek(8)
    data = file.read(length)
    count = data.count(b'"data_offsets"')  # of those that are not hidden behind escapes
    if count <= max_tensors:
        max_marks = max_tensors * _MAX_MARKS_EACH
        found = parse_json_object(data, f"the header of {where}", max_bytes=max_bytes, max_marks=max_marks)
        _check_metadata(found.pop("__metadata__", {}), where)
        count = len(found)
    if count > max_tensors:
        raise AdapterFileError(
            f"{where} has more than {max_tensors} tensors, {count}, and no adapter of this model needs as many. Is it "
            "the right base model?"
        )
    if not found:
        raise AdapterFileError(f"{where} has no tensors, so it is not a trained adapter. Save it again.")
    return _check_tensors(found, size - 8 - length, where)


def check_tensor_name(name: str, where: str) -> None:
    """Raises AdapterFileError unless `name` could be that of a parameter: no path, no unprintable character."""
    if not name or name == "__metadata__" or len(name) > MAX_NAME or not name.isprintable():
        reason = f"names are printable, 1 to {MAX_NAME} characters"
    elif "/" in name or "\\" in name or ".." in name:
        reason = "names are parameter paths like layers.0.weight, not paths of files"
    else:
        return
    raise AdapterFileError(f"{where} has a tensor named {shown(name)}; {reason}.")


def check_tensor_kind(name: str, dtype: object, allowed: bool, shape: Sequence[int], where: str) -> None:
    """Raises AdapterFileError for a dtype that adapters do not have, or no values; `dtype` is only for the message.
    AdaLoRA alone may have matrices without values, in layers that have lost all their triplets."""
    if not allowed:
        raise AdapterFileError(
            f"{where}: tensor {shown(name)} has dtype {shown(dtype)}; adapters hold float64, float32, float16 or "
            "bfloat16. Cast it to one of them, or leave it out if it is not a weight."
        )
    if 0 in shape and not (len(shape) == 2 and _TRIPLETS.search(name)):
        raise AdapterFileError(f"{where}: tensor {shown(name)} {_ZERO_NUMEL}. Gather, then save again.")


def _why_no_header(start: bytes, length: int, size: int, max_bytes: int) -> str:
    for magic, words in _DISGUISES.items():
        if start.startswith(magic):
            return f"is {words}"
    if length > max_bytes:
        return f"is not a safetensors file: its header would be {length} bytes long, the limit is {max_bytes}"
    if length > size - 8:
        return f"is cut off or damaged: its header should have {length} bytes, {size - 8} are there. Fetch it again"
    return f"is not a safetensors file: its header begins with {start[8:]!r}, not with '{{'. Give another"


def _check_metadata(metadata: Any, where: str) -> None:
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise AdapterFileError(f"{where}: __metadata__ in the header must map text to text, not {shown(metadata)}.")


def _check_tensors(found: dict[str, Any], data_bytes: int, where: str) -> dict[str, TensorInfo]:
    spans: list[tuple[int, int, str]] = []
    infos: dict[str, TensorInfo] = {}
    for name, entry in found.items():
        check_tensor_name(name, where)
        infos[name], begin, end = _check_tensor(name, entry, where)
        spans.append((begin, end, name))
    spans.sort()
    reached = 0
    for begin, end, name in spans:
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            raise AdapterFileError(
                f"{where}: tensor {shown(name)} at bytes {begin}:{end} {what} (ends at {reached}). Save it again."
            )
        reached = end
    if reached > data_bytes:
        raise AdapterFileError(
            f"{where} is cut off: the header promises {reached} bytes of data, {data_bytes} are there. Fetch it again."
        )
    if reached < data_bytes:
        raise AdapterFileError(f"{where} has {data_bytes - reached} bytes after its last tensor. Fetch it again.")
    return {name: infos[name] for _, _, name in spans}


def _check_tensor(name: str, entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    """The tensor's info and the bytes it occupies in the data, as far as its own entry can tell."""
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFileError(
            f"{where}: tensor {shown(name)} is not described by dtype, shape and data_offsets. Save it again."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > 64:
        raise AdapterFileError(
            f"{where}: tensor {shown(name)} has the shape {shown(shape)}, which no tensor has. Save it again."
        )
    if not _counts(offsets) or len(offsets) != 2:
        raise AdapterFileError(f"{where}: tensor {shown(name)} has the data_offsets {shown(offsets)}. Two are needed.")
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    numel = math.prod(shape)
    check_tensor_kind(name, entry["dtype"], dtype is not None, shape, where)
    begin, end = offsets
    if end - begin != numel * dtype.itemsize:
        raise AdapterFileError(
            f"{where}: tensor {shown(name)} of {entry['dtype']} {shown(shape)} needs {numel * dtype.itemsize} bytes, "
            f"its data_offsets {offsets} span {end - begin}."
        )
    return TensorInfo(dtype, tuple(shape)), begin, end


def _counts(value: Any) -> bool:
    """Whether `value` is a list of whole numbers from 0 up; a JSON `true` is not a number."""
    return type(value) is list and set(map(type, value)) <= {int} and min(value, default=0) >= 0
