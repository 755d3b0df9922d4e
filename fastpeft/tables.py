"""Which tables of measured choices there are, and what they say of a device.

Looked for in the user's directory ($FASTPEFT_CACHE, or $XDG_CACHE_HOME/fastpeft, or ~/.cache/fastpeft), where `fastpeft
tune` writes, then among those that ship in fastpeft/measured. A table serves the devices of its name; its tiles only
under the Triton and with the kernels that they were measured with. A file that is no table is left out, with one
warning; nothing here raises in a training step. Read once per process and device: a call then costs the making of its
bucket and one lookup.
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from fastpeft.errors import FastpeftError
from fastpeft.plans import Plan
from fastpeft.table_file import (
    TILE_FIELDS,
    AttentionTileBucket,
    Entry,
    LoraBucket,
    PrefixBucket,
    Table,
    TableError,
    TileBucket,
    read,
)

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "measured")
MAX_FILES = 100  # of a directory
INTERPRETER = "interpreter"  # the device of a rehearsal's table, which no device is called

logger = logging.getLogger("fastpeft")
_lock = threading.Lock()
_plans: dict[torch.device, Mapping[tuple, Plan]] = {}
_used: dict[torch.device, tuple[Table, ...]] = {}
_files: list[Table] | None = None
generation = 0  # counts what has changed in the above


def user_directory() -> str:
    """Where the user's tables are; it need not exist."""
    if given := os.environ.get("FASTPEFT_CACHE"):
        return os.path.abspath(os.path.expanduser(given))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which the XDG specification wants ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "fastpeft")


def file_name(device: str) -> str:
    """The name of the file that `fastpeft tune` writes for a device."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in device.lower()).split()) + ".json"


def measured(device: torch.device) -> Mapping[tuple, Plan]:
    """What was measured on GPUs of this device's name: bucket -> plan. Measured tiles are the kernels' from then on."""
    found = _plans.get(device)
    return _load(device) if found is None else found


def tables_of(device: torch.device) -> tuple[Table, ...]:
    """The tables of the device's name, the user's last."""
    measured(device)
    return _used.get(device, ())


def use_none(device: torch.device) -> None:
    """From now on this process takes no table on the device, as it must be to measure what is predicted."""
    global generation
    with _lock:
        _plans[device], _used[device] = {}, ()
        generation += 1


def forget() -> None:
    """The next call on each device reads the files again."""
    global _files, generation
    with _lock:
        _plans.clear()
        _used.clear()
        _files = None
        generation += 1


def power_of_two(size: int) -> int:
    """The nearest by ratio; 0 stays."""
    return 1 << round(math.log2(size)) if size > 0 else 0


def block(size: int) -> int:
    """As the kernels round a rank or a head dimension up (`kernels._common.rank_block`)."""
    return max(16, 1 << (size - 1).bit_length())


def lora_bucket(dtype, adapter_dtype, rows: int, columns: int, outputs: int, rank: int, dropout: float) -> LoraBucket:
    """Of a call with x [rows, columns] and weight [outputs, columns]."""
    sizes = (power_of_two(rows), power_of_two(columns), power_of_two(outputs))
    return LoraBucket(dtype, adapter_dtype, *sizes, block(rank), dropout > 0)


def prefix_bucket(tensors, scores, dropout: float) -> PrefixBucket:
    """Of a call of `prefix_attention` (`Tensors`, `Scores`)."""
    (_, heads, queries, depth), (_, groups, keys, _) = tensors.q_BHSD.shape, tensors.k_BGTD.shape
    modifiers = (
        tensors.bias_BHST, tensors.pbias_BHSP, tensors.sinks_H, scores.slopes_H, scores.softcap, scores.window,
        scores.padding_BT, scores.segments_BT, dropout or None,
    )  # fmt: skip
    modified = any(each is not None for each in modifiers)
    sizes = (power_of_two(queries), power_of_two(keys), power_of_two(tensors.pk_BGPD.shape[2]))
    return PrefixBucket(tensors.q_BHSD.dtype, *sizes, block(depth), heads // groups, scores.causal, modified)


@functools.cache
def kernels_digest() -> str:
    """SHA-256 over the kernels' sources, tiles included; "" where there are none to read."""
    import fastpeft.kernels

    digest = hashlib.sha256()
    try:
        sources = sorted(path for folder in fastpeft.kernels.__path__ for path in Path(folder).glob("*.py"))
        for path in (path for path in sources if path.name != "__init__.py"):  # which only a checkout has
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError:
        return ""
    return digest.hexdigest() if sources else ""


def triton_version() -> str:
    """Of the Triton that is installed; "" where none is."""
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _load(device: torch.device) -> Mapping[tuple, Plan]:
    global generation
    with _lock:
        if device not in _plans:
            name = torch.cuda.get_device_name(device)
            tables = tuple(table for table in _all_tables() if table.device == name)
            chosen = {entry.bucket: (entry, table) for table in tables for entry in _valid(table)}
            tiles = [entry for entry, _ in chosen.values() if entry.op in TILE_FIELDS]
            if tiles:
                adopt_tiles(device, f"measured on {name}", tiles)
            if not tables:
                hint = "no measured table for %s, so choices are predicted; `fastpeft tune` measures them on this GPU"
                logger.info(hint, name)
            _used[device] = tables
            _plans[device] = {
                bucket: Plan(**entry.choice, source=f"measured on {name}, {entry.date}")
                for bucket, (entry, _) in chosen.items()
                if entry.op not in TILE_FIELDS
            }
            generation += 1
        return _plans[device]


def _valid(table: Table) -> list[Entry]:
    """The entries that hold under the software that is here."""
    if (table.triton, table.kernels) == (triton_version(), kernels_digest()) and table.kernels:
        return list(table.entries)
    kept = [entry for entry in table.entries if entry.op not in TILE_FIELDS]
    if len(kept) < len(table.entries):
        logger.info("tiles of %s were measured with another Triton or other kernels; `fastpeft tune`", table.device)
    return kept


def adopt_tiles(device: torch.device, name: str, entries: list[Entry]) -> None:
    """Puts measured tiles in front of the predicted ones of the device's family, under `name`. Those that the compile
    gate has not seen on this family are left out, with one warning. The interpreter takes none."""
    from fastpeft.kernels import _attention_tiles, _tiles

    family = _tiles.family_of(device)
    if family == INTERPRETER:
        return
    rows: dict[type, list] = {TileBucket: [], AttentionTileBucket: []}
    unseen = []
    for entry in entries:
        module = _tiles if type(entry.bucket) is TileBucket else _attention_tiles
        row = module.measured_row(*entry.bucket, entry.choice, family)
        if row is None:
            unseen.append(entry)
        else:
            rows[type(entry.bucket)].append(row)
    _tiles.register(name, family, rows[TileBucket])
    _attention_tiles.register(name, family, rows[AttentionTileBucket])
    _tiles.adopt(device, name)
    if unseen:
        first = unseen[0]
        _warn(f"{len(unseen)} measured tiles are no candidates on {family} and are not used: {first.bucket.kernel} "
              f"{first.choice}")  # fmt: skip


def _all_tables() -> list[Table]:
    """Those that ship, then the user's, in each the newest last."""
    global _files
    if _files is None:
        _files = [table for folder in (SHIPPED, user_directory()) for table in _tables_in(folder)]
    return _files


def _tables_in(folder: str) -> list[Table]:
    try:
        with os.scandir(folder) as found:
            names = sorted(each.name for each in found if each.name.endswith(".json") and each.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _warn(f"{folder} is left out: {error.strerror}")
        return []
    if len(names) > MAX_FILES:
        _warn(f"{folder} holds {len(names)} files; those after the first {MAX_FILES} are left out")
    tables = []
    for name in names[:MAX_FILES]:
        path = os.path.join(folder, name)
        try:
            table = read(path, folder)
        except FastpeftError as error:
            _warn(f"{path} is left out: {_reason(error, path)}")
            continue
        if table is not None:
            tables.append(table)
    return sorted(tables, key=lambda table: table.date)


def _reason(error: FastpeftError, path: str) -> str:
    return str(error).removeprefix(f"{path} ") if not isinstance(error, TableError) else str(error)


def _warn(text: str) -> None:
    """A warning that stays one where warnings are errors: a training step does not end for a table's sake."""
    try:
        warnings.warn(f"fastpeft: measured table: {text}", stacklevel=2)
    except UserWarning as raised:
        with contextlib.suppress(Exception):
            logger.warning("%s", raised)
