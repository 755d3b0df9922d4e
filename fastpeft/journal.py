"""Replacing several files of a directory as one: after a crash at any instant, a reader finds all old or all new files.

A set of files cannot be renamed at once, so it is announced first:

1. each new file is written beside its final name, under a temporary name that no loader looks for, and synced;
2. JOURNAL, which lists them with their digests, is written the same way and renamed into place: the commit;
3. each temporary is renamed onto its final name, in the order given; JOURNAL is removed.

Interrupted before the commit, the old files are as they were, and the next save removes the temporaries. Interrupted
after it, the next reader or writer finishes step 3; a reader that may not write reads from the temporaries instead.
The journal also holds the digests of the old files, so that what another program has saved here in the meantime is
recognised and kept.

Writers exclude one another (`durable.locked`). Where a file system has no locks (some network ones), crashes are
covered all the same, two writers at once are not.
"""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, TypeVar

from fastpeft.durable import locked, make_directory, sync_directory, write_synced
from fastpeft.errors import AdapterFileError, FastpeftError
from fastpeft.untrusted import open_regular, parse_json_object

# What a journal may name; a stranger's must not reach for other files.
WEIGHTS, SIDE, CONFIG = "adapter_model.safetensors", "fastpeft.json", "adapter_config.json"
ENCODER = "fastpeft_encoder.safetensors"
JOURNAL = ".fastpeft-journal.json"
SCHEMA = 1
MAX_JOURNAL_BYTES = 16_384

_TEMPORARY = re.compile(r"\.fastpeft-tmp-([1-9][0-9]{0,9})-[0-9a-f]{16}")  # the number: the process that wrote it
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
# A reader meets a writer's renames for microseconds; two seconds of misses mean that something else goes on.
_ATTEMPTS, _PAUSE = 200, 0.01

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One file of a set: what it becomes, from where, and what it was. None: no file."""

    final: str
    temporary: str | None
    sha256: str | None
    size: int
    previous: str | None  # sha256 of the file that stood under the final name


class _Undecidable(AdapterFileError):
    """Neither the old nor the new set of files can be put together."""


def replace_files(directory: str, contents: Mapping[str, bytes | None]) -> None:
    """Gives the files of `directory` (made if need be) new contents, all or none; None removes a file.

    They are renamed in the mapping's order. Raises AdapterFileError, which says what is on disk afterwards.
    """
    try:
        make_directory(directory)
        with locked(directory, wait=True):
            _replace_locked(directory, contents)
    except OSError as error:
        raise AdapterFileError(
            f"cannot save to {directory}: {error.strerror or error}. What it held before is as it was; "
            "make room or permit writing there, or save elsewhere."
        ) from error


def read_files(directory: str, names: Iterable[str], read: Callable[[dict[str, BinaryIO | None]], T]) -> T:
    """`read`'s result for the open files `names` of `directory` (None: not there), all from one and the same save.

    `read` is called again if another process has replaced files meanwhile, so it must have no effects of its own; what
    it raises of FastpeftError is passed on only if the files stood still. Raises AdapterFileError.
    """
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            snapshot = _Snapshot(directory, stack)
            try:
                if snapshot.entries and _recovered(directory):
                    continue
                files = snapshot.open(names)
                result = read(files)
            except FastpeftError:
                if snapshot.still_true():
                    raise
            else:
                if snapshot.still_true():
                    return result
        time.sleep(_PAUSE)
    raise AdapterFileError(f"the files of {directory} are being replaced without end. Read them when that is over.")


class _Snapshot:
    """Open files of a directory, and whether they still are its files. An open file's inode cannot be given away."""

    def __init__(self, directory: str, stack: ExitStack):
        self.directory, self.stack = directory, stack
        self.stamps: list[tuple[str, tuple[int, ...] | None]] = []
        self.incomplete = False
        # Looked at first here and first in still_true: a set that is being replaced keeps its journal until the end,
        # so a journal that is absent, or the same, at the second look vouches for what was read between the two.
        journal = self._open(JOURNAL)
        self.entries = [] if journal is None else _parse_journal(journal, os.path.join(directory, JOURNAL))

    def open(self, names: Iterable[str]) -> dict[str, BinaryIO | None]:
        place = _locate(self.directory, self.entries)
        sources = place.sources if place else {}
        files = {name: self._open(sources.get(name, name)) for name in names}
        self.incomplete = any(file is None and sources.get(name) for name, file in files.items())
        return files

    def _open(self, name: str | None) -> BinaryIO | None:
        if name is None:
            return None
        path = os.path.join(self.directory, name)
        file = open_regular(path, self.directory)
        if file is not None:
            self.stack.enter_context(file)
        self.stamps.append((path, None if file is None else _stamp(os.fstat(file.fileno()))))
        return file

    def still_true(self) -> bool:
        return not self.incomplete and all(_stamp_of(path) == stamp for path, stamp in self.stamps)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stamp_of(path: str) -> tuple[int, ...] | None:
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _replace_locked(directory: str, contents: Mapping[str, bytes | None]) -> None:
    undoable = True
    try:
        _recover(directory)
        _sweep(directory)
    except AdapterFileError:
        # What cannot be finished is replaced as a whole; its journal stays, as a warning, until the new one commits.
        undoable = False
    entries: list[Entry] = []
    try:
        for final, data in contents.items():
            entries.append(_entry(directory, final, data))
            if data is not None:
                write_synced(os.path.join(directory, entries[-1].temporary), data)
        _announce(directory, entries)
    except BaseException:
        _remove(directory, (entry.temporary for entry in entries))
        raise
    try:
        sync_directory(directory)
        _finish(directory, entries)
    except OSError as error:
        if undoable and _undone(directory, entries):
            raise
        raise AdapterFileError(
            f"saving to {directory} was interrupted: {error.strerror or error}. The new adapter is complete on disk; "
            "the next load or save there puts it in place."
        ) from error
    with suppress(OSError):
        _sweep(directory)


def _entry(directory: str, final: str, data: bytes | None) -> Entry:
    previous = _digest(directory, final)
    if data is None:
        return Entry(final, None, None, 0, previous)
    temporary = f".fastpeft-tmp-{os.getpid()}-{secrets.token_hex(8)}"
    return Entry(final, temporary, hashlib.sha256(data).hexdigest(), len(data), previous)


def _announce(directory: str, entries: list[Entry]) -> None:
    """Step 2. The sync makes the temporaries' names durable before the journal that relies on them."""
    sync_directory(directory)
    journal = {"schema": SCHEMA, "files": [asdict(entry) for entry in entries]}
    temporary = os.path.join(directory, f".fastpeft-tmp-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        write_synced(temporary, json.dumps(journal, indent=2).encode())
        os.replace(temporary, os.path.join(directory, JOURNAL))
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _finish(directory: str, entries: list[Entry], done: Iterable[str] = ()) -> None:
    """Step 3. The renames are durable before the journal goes; another process may have done some of it already."""
    for entry in entries:
        path = os.path.join(directory, entry.final)
        if entry.final in done:
            _remove(directory, [entry.temporary])
        elif entry.temporary is None:
            with suppress(FileNotFoundError):
                os.unlink(path)
        else:
            try:
                os.replace(os.path.join(directory, entry.temporary), path)
            except FileNotFoundError:
                if _digest(directory, entry.final) != entry.sha256:
                    raise
    sync_directory(directory)
    _remove_journal(directory)


def _recover(directory: str) -> None:
    """Finishes or forgets what an interrupted save left; needs the lock. Raises _Undecidable if it can do neither."""
    with ExitStack() as stack:
        entries = _Snapshot(directory, stack).entries
    if not entries:
        return
    place = _locate(directory, entries)
    if place is None:
        _forget(directory, entries)
    else:
        _finish(directory, entries, place.done)


def _recovered(directory: str) -> bool:
    """Whether a reader could `_recover`: not without the right to write, nor while a writer is at work."""
    try:
        with locked(directory, wait=False) as mine:
            if mine:
                _recover(directory)
            return mine
    except OSError:
        return False


@dataclass(frozen=True)
class _Place:
    """Where the files of a new set are, and which of them are already what they shall be."""

    sources: dict[str, str | None]
    done: list[str]


def _locate(directory: str, entries: list[Entry]) -> _Place | None:
    """The new set's files, or None if the old set stands. Raises _Undecidable where neither is whole.

    The old set stands if a temporary is lost or another program has saved here since, and no file was replaced yet.
    """
    place = _Place({}, [])
    lost, replaced = [], []
    for entry in entries:
        # The temporary first: were it renamed between the two looks, the second finds it.
        staged = entry.temporary is None or _digest(directory, entry.temporary, entry.size) == entry.sha256
        current = _digest(directory, entry.final)
        if current == entry.sha256:
            place.sources[entry.final] = None if current is None else entry.final
            place.done.append(entry.final)
            # SIDE names the weights that it belongs to, so beside others it is ignored, not mistaken.
            if current != entry.previous and entry.final != SIDE:
                replaced.append(entry.final)
        elif staged and current == entry.previous:
            place.sources[entry.final] = entry.temporary
        else:
            lost.append(entry.final)
    if not lost:
        return place
    if not replaced:
        return None
    raise _Undecidable(
        f"a save to {directory} was interrupted and cannot be finished: {', '.join(replaced)} is new, but the new "
        f"{', '.join(lost)} is lost. Save the adapter there again, or load another checkpoint."
    )


def _digest(directory: str, name: str, size: int | None = None) -> str | None:
    """sha256 of a file, None if it is not there or has not the given size."""
    file = open_regular(os.path.join(directory, name), directory)
    if file is None:
        return None
    with file:
        if size is not None and os.fstat(file.fileno()).st_size != size:
            return None
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _undone(directory: str, entries: list[Entry]) -> bool:
    """Whether a committed set of which no file is in place yet could be taken back."""
    try:
        for entry in entries:
            if _digest(directory, entry.final) != entry.previous:
                return False
        _forget(directory, entries)
    except (OSError, AdapterFileError):
        return False
    return True


def _forget(directory: str, entries: list[Entry]) -> None:
    _remove_journal(directory)
    _remove(directory, (entry.temporary for entry in entries))


def _remove_journal(directory: str) -> None:
    """Not synced: should the journal come back with the power, there is nothing left to do by it."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, JOURNAL))


def _remove(directory: str, temporaries: Iterable[str | None]) -> None:
    for name in temporaries:
        if name is not None:
            with suppress(OSError):
                os.unlink(os.path.join(directory, name))


def _sweep(directory: str) -> None:
    """Removes the temporaries of dead processes, and of this one: it holds the lock and none is in use."""
    for name in os.listdir(directory):
        match = _TEMPORARY.fullmatch(name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            _remove(directory, [name])


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill(pid, 0) is no question there: it sends Ctrl-C
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _parse_journal(file: BinaryIO, where: str) -> list[Entry]:
    """The journal may come with a stranger's adapter: it may name only our files, in its own directory."""
    data = file.read(MAX_JOURNAL_BYTES + 1)
    journal = parse_json_object(data, where, max_bytes=MAX_JOURNAL_BYTES, max_marks=MAX_JOURNAL_BYTES)
    if journal.get("schema") != SCHEMA:
        raise AdapterFileError(
            f"{where} has schema {journal.get('schema')!r}, not {SCHEMA}. Load with a newer fastpeft."
        )
    files = journal.get("files")
    entries = [_parse_entry(item) for item in files] if type(files) is list else [None]
    if not entries or None in entries or len({entry.final for entry in entries}) != len(entries):
        raise AdapterFileError(f"{where} is no journal of a save by fastpeft. Delete it, or save the adapter again.")
    return entries


def _parse_entry(item: Any) -> Entry | None:
    try:
        entry = Entry(**item)
        safe = (
            entry.final in (WEIGHTS, ENCODER, SIDE, CONFIG)
            and (entry.temporary is None) == (entry.sha256 is None)
            and (entry.temporary is None or _TEMPORARY.fullmatch(entry.temporary))
            and all(digest is None or _DIGEST.fullmatch(digest) for digest in (entry.sha256, entry.previous))
            and type(entry.size) is int
        )
    except TypeError:
        return None
    return entry if safe else None
