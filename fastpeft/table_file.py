"""The file of a table of measured choices: one JSON object, checked value by value, written as a whole.

    {"schema": 1, "device": "NVIDIA H100 80GB HBM3", "family": "sm_90", "triton": "3.6.0", "kernels": "<sha256>",
     "torch": "2.11.0", "date": "2026-01-31", "commit": "...", "entries": [
       {"op": "lora_linear", "bucket": {"dtype": "bfloat16", "adapter_dtype": "float32", "M": 8192, "K": 4096,
        "N": 4096, "rank": 16, "dropout": false}, "choice": {"forward": "addmm", "backward": "prewrite", "reads": 1},
        "confirmed": false, "median_ms": {"prewrite forward": 1.5, ...}, "wrong": {}, "source": "measured",
        "date": "2026-01-31"}, ...]}

`reads` (see plans.py) is `lora_linear`'s alone and may be left out. `BUCKETS` lists the ops and what a bucket of each
holds. Sizes are powers of two, a rank is that of its block.
"""

import contextlib
import json
import os
import secrets
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import torch

from fastpeft.durable import locked, make_directory, sync_directory, write_synced
from fastpeft.errors import FastpeftError
from fastpeft.plans import ATTENTION_STRATEGIES, LORA_STRATEGIES
from fastpeft.untrusted import open_regular, parse_json_object, shown

SCHEMA = 1
MAX_BYTES = 4 << 20
MAX_MARKS = 400_000
MAX_TEXT = 200
MAX_SIZE = 1 << 40
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODES = ("half", "split", "tf32x3", "tf32", "ieee")


class TableError(FastpeftError):
    """A file is no table of measured choices, or not one that may be written to; the message says why."""


class LoraBucket(NamedTuple):
    """Calls of `lora_linear` that one choice serves: x [M, K], weight [N, K]."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    M: int
    K: int
    N: int
    rank: int
    dropout: bool


class PrefixBucket(NamedTuple):
    """Calls of `prefix_attention` that one choice serves: S queries, T keys, P virtual keys, head dimension D, `group`
    query heads for each key head. modified: some modifier is in force that no vendor's flash has."""

    dtype: torch.dtype
    S: int
    T: int
    P: int
    D: int
    group: int
    causal: bool
    modified: bool


class TileBucket(NamedTuple):
    """Launches of one of `lora_linear`'s kernels, as `kernels._tiles.tiles_for` asks."""

    kernel: str
    rank: int
    mode: str
    dropout: bool


class AttentionTileBucket(NamedTuple):
    """Launches of one of attention's kernels, as `kernels._attention_tiles.attention_tiles` asks."""

    kernel: str
    depth: int
    mode: str
    burdened: bool


BUCKETS = {
    "lora_linear": LoraBucket,
    "prefix_attention": PrefixBucket,
    "tiles": TileBucket,
    "attention_tiles": AttentionTileBucket,
}
STRATEGIES = {"lora_linear": LORA_STRATEGIES, "prefix_attention": (*ATTENTION_STRATEGIES, "decode")}
TILE_FIELDS = {
    "tiles": ("rows", "columns", "depth", "ranks", "warps", "stages"),
    "attention_tiles": ("queries", "keys", "prefix", "warps", "stages"),
}


class Entry(NamedTuple):
    """One choice. confirmed: the predicted one, which no other beat. choice: a plan's fields, or a tile's numbers.
    wrong: variants that did not compute what they should, or could not run, and what was wrong."""

    bucket: NamedTuple
    choice: dict
    median_ms: dict[str, float]
    confirmed: bool
    date: str
    wrong: dict[str, str]

    @property
    def op(self) -> str:
        return next(op for op, kind in BUCKETS.items() if type(self.bucket) is kind)

    def as_json(self) -> dict:
        bucket = {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in self.bucket._asdict().items()
        }
        return {
            "op": self.op, "bucket": bucket, "choice": self.choice, "confirmed": self.confirmed,
            "median_ms": self.median_ms, "wrong": self.wrong, "source": "measured", "date": self.date,
        }  # fmt: skip


@dataclass(frozen=True)
class Table:
    """What one device was measured to do best, and with which software. kernels: a digest of the kernels' sources."""

    device: str
    family: str
    triton: str
    kernels: str
    torch: str
    date: str
    commit: str
    entries: tuple[Entry, ...]

    def as_json(self) -> dict:
        stamp = {name: getattr(self, name) for name in STAMP}
        return {"schema": SCHEMA, **stamp, "entries": [entry.as_json() for entry in self.entries]}


STAMP = ("device", "family", "triton", "kernels", "torch", "date", "commit")


def read(path: str, root: str | None = None) -> Table | None:
    """The table in the file, or None if there is none of that name. Raises a FastpeftError if it is not one."""
    file = open_regular(path, root or os.path.dirname(os.path.abspath(path)))
    if file is None:
        return None
    with file:
        try:
            data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise TableError(f"{path} cannot be read: {error.strerror}") from error
    return parsed(parse_json_object(data, path, max_bytes=MAX_BYTES, max_marks=MAX_MARKS))


def parsed(document: dict) -> Table:
    """Raises TableError."""
    if document.get("schema") != SCHEMA or type(document["schema"]) is not int:
        raise TableError(f"its schema is {shown(document.get('schema'))}, known is {SCHEMA}")
    stamp = {name: _text(document, name) for name in STAMP}
    _day(stamp["date"])
    entries = document.get("entries")
    if type(entries) is not list:
        raise TableError(f"its entries are {shown(entries)}; a list is needed")
    return Table(**stamp, entries=tuple(_entry(number, each) for number, each in enumerate(entries)))


def _entry(number: int, found) -> Entry:
    try:
        if type(found) is not dict:
            raise TableError(f"{shown(found)} is no object, which is needed")
        if (op := found.get("op")) not in tuple(BUCKETS):
            raise TableError(f"op is {shown(op)}, known are {', '.join(BUCKETS)}")
        if found.get("source") != "measured":
            raise TableError(f"source is {shown(found.get('source'))}; only what was measured belongs here")
        if type(confirmed := found.get("confirmed")) is not bool:
            raise TableError(f"confirmed is {shown(confirmed)}; true or false is needed")
        bucket = _bucket(BUCKETS[op], found.get("bucket"))
        choice = _tile(TILE_FIELDS[op], found.get("choice")) if op in TILE_FIELDS else _plan(op, found.get("choice"))
        times = _mapping(found, "median_ms", (int, float))
        if any(time <= 0 for time in times.values()):
            raise TableError(f"median_ms has {shown(min(times.values()))}, not above 0 as is needed")
        return Entry(bucket, choice, times, confirmed, _day(_text(found, "date")), _mapping(found, "wrong", (str,)))
    except TableError as error:
        raise TableError(f"entry {number}: {error}") from error


def _bucket(kind, found):
    if type(found) is not dict or found.keys() != set(kind._fields):
        raise TableError(f"bucket is {shown(found)}; {', '.join(kind._fields)} are needed")
    return kind(**{name: _field(name, found[name], kind.__annotations__[name]) for name in kind._fields})


def _field(name: str, value, kind: type):
    if kind is torch.dtype and type(value) is str and value in DTYPES:
        return DTYPES[value]
    if kind is int and type(value) is int and 0 <= value <= MAX_SIZE:
        return value
    if kind is bool and type(value) is bool:
        return value
    if kind is str and type(value) is str and len(value) <= MAX_TEXT and (name != "mode" or value in MODES):
        return value
    raise TableError(f"{name} is {shown(value)}; {kind.__name__} of a value that occurs is needed")


def _plan(op: str, found) -> dict[str, str | int]:
    optional = {"reads"} if op == "lora_linear" else set()
    if type(found) is not dict or found.keys() - optional != {"forward", "backward"}:
        raise TableError(f"choice is {shown(found)}; forward and backward are needed")
    if "reads" in found and (type(found["reads"]) is not int or found["reads"] not in (1, 2)):
        raise TableError(f"reads is {shown(found['reads'])}; 1 or 2 is needed")
    for passed, name in ((passed, found[passed]) for passed in ("forward", "backward")):
        if type(name) is not str or name not in STRATEGIES[op]:
            raise TableError(f"{passed} is {shown(name)}, known are {', '.join(STRATEGIES[op])}")
    backward = "fused" if found["forward"] == "decode" else found["forward"]
    if op == "prefix_attention" and found["backward"] != backward:
        raise TableError(f"backward is {found['backward']!r}; with forward {found['forward']!r} it is {backward!r}")
    return found


def _tile(fields: tuple[str, ...], found) -> dict[str, int]:
    """Of the right kind; whether it is one that the compile gate has seen is for the kernels' tables to say."""
    if type(found) is not dict or found.keys() != set(fields):
        raise TableError(f"choice is {shown(found)}; {', '.join(fields)} are needed")
    for name, value in found.items():
        if type(value) is not int or not 0 <= value <= 1024:
            raise TableError(f"{name} is {shown(value)}; an int from 0 to 1024 is needed")
    return found


def _text(found: dict, name: str) -> str:
    value = found.get(name)
    if type(value) is not str or len(value) > MAX_TEXT or not value.isprintable():
        raise TableError(f"{name} is {shown(value)}; a short text is needed")
    return value


def _mapping(found: dict, name: str, kinds: tuple[type, ...]) -> dict:
    value = found.get(name)
    if type(value) is not dict or any(type(each) not in kinds for each in value.values()):
        of = " or ".join(kind.__name__ for kind in kinds)
        raise TableError(f"{name} is {shown(value)}; an object whose values are {of} is needed")
    return value


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise TableError(f"date is {shown(text)}; one as 2026-01-31 is needed") from None


def merged(old: Table, new: Table) -> Table:
    """`new`, and what `old` knows beside it and the new software has not made stale: strategies stay, tiles only of the
    same Triton and kernels."""
    known = {entry.bucket for entry in new.entries}
    same = (old.triton, old.kernels) == (new.triton, new.kernels)
    kept = [e for e in old.entries if e.bucket not in known and (same or e.op not in TILE_FIELDS)]
    return Table(**{name: getattr(new, name) for name in STAMP}, entries=(*kept, *new.entries))


def existing(path: str, device: str) -> Table | None:
    """The device's table that is in the file, if there is a file. Raises a FastpeftError if it is something else."""
    try:
        found = read(path)
    except TableError as error:
        raise TableError(f"{path} is no table of measured choices and is left as it is: {error}") from error
    if found is not None and found.device != device:
        raise TableError(f"{path} is a table of {shown(found.device)}, not of {shown(device)}; choose another file")
    return found


def write(path: str, table: Table) -> Table:
    """Puts `table` into the file, which holds the old or the new whole at any time; what an older table there knows
    beside it stays, also if several processes write at once. Returns what was written.

    Raises a FastpeftError, and leaves the file as it was, if it is no table, or another device's.
    """
    path = os.path.abspath(path)
    directory, name = os.path.split(path)
    make_directory(directory)
    with locked(directory, wait=True):
        if (old := existing(path, table.device)) is not None:
            table = merged(old, table)
        temporary = os.path.join(directory, f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            write_synced(temporary, json.dumps(table.as_json(), indent=1).encode() + b"\n")
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_directory(directory)
    return table
