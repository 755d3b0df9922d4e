"""Opening and parsing files that a stranger may have made: nothing hangs, recurses or allocates without a bound."""

import json
import math
import os
import re
import stat
from typing import Any, BinaryIO

from fastpeft.errors import AdapterFileError

MAX_DEPTH = 64

_ESCAPE, _TEXT, _BRACKET = re.compile(rb"\\.", re.DOTALL), re.compile(rb'"[^"]*"?'), re.compile(rb"[\[\]{}]")
_BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def shown(text: object) -> str:
    """`repr` of a value that came out of a file, cut to a length that fits into a message."""
    words = repr(text)
    return words if len(words) <= 120 else f"{words[:100]}... ({len(words)} characters)"


def open_regular(path: str, root: str) -> BinaryIO | None:
    """Opens `path`, a regular file in the directory `root`, for reading; None if there is nothing of that name.

    A link is followed only to a file inside `root`, or to the blob store of the Hugging Face cache that `root` is a
    snapshot of. Raises AdapterFileError for everything else: a pipe would block, a link could lead anywhere.
    """
    try:
        linked = stat.S_ISLNK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror}") from error
    target = _followed(path, root) if linked else path
    # O_NONBLOCK: should a pipe take the file's place between the two looks at it, opening it must not hang.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        _require_regular(path, os.stat(target).st_mode)
        file = os.fdopen(os.open(target, flags), "rb")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not linked:
            return None  # removed between the two looks
        raise AdapterFileError(f"{path} cannot be read: {error.strerror}") from error
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)
    except AdapterFileError:
        file.close()
        raise
    return file


def _require_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a file")
        raise AdapterFileError(f"{path} is {kind}; expected a regular file. Replace it by the file itself.")


def _followed(path: str, root: str) -> str:
    target, base = os.path.realpath(path), os.path.realpath(root)
    if _inside(target, base) or _is_blob_of(target, base):
        return target
    raise AdapterFileError(
        f"{path} is a link to {target}, outside the adapter's directory; links are followed only inside it or to "
        "the blobs of the Hugging Face cache it lies in. Copy the file itself here."
    )


def _is_blob_of(target: str, snapshot: str) -> bool:
    """Whether `target` is repo/blobs/<hash> and `snapshot` lies in repo/snapshots/, as the cache lays them out."""
    folder, name = os.path.split(target)
    if os.path.basename(folder) != "blobs" or not _BLOB_NAME.fullmatch(name):
        return False
    return _inside(snapshot, os.path.join(os.path.dirname(folder), "snapshots"))


def _inside(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def parse_json_object(data: bytes, where: str, *, max_bytes: int, max_marks: int) -> dict[str, Any]:
    """The JSON object in `data` as a dict; `where` names its file in errors.

    Stricter than `json`: at most `max_bytes` long, at most `max_marks` quotes, commas and brackets, MAX_DEPTH levels,
    UTF-8, no key twice in one object, numbers finite (no NaN, no Infinity, no 1e999), text without lone surrogates.
    Raises AdapterFileError.
    """
    if len(data) > max_bytes:
        raise AdapterFileError(f"{where} is longer than {max_bytes} bytes; nothing that belongs here is.")
    # Counted before parsing: each mark may become an object of 50 bytes and more.
    marks = sum(data.count(mark) for mark in (b'"', b",", b"[", b"{", b"\\"))
    if marks > max_marks:
        raise AdapterFileError(f"{where} has too many values ({marks} quotes, commas and brackets, limit {max_marks}).")
    _require_shallow(data, where)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            parse_constant=_refuse_constant,
        )
        if rb"\u" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone \ud800 would fail later, where it is used
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{where} is not UTF-8 (byte {error.start}). It is damaged: fetch it again.") from error
    except UnicodeEncodeError as error:
        raise AdapterFileError(f"{where} contains a lone surrogate, which is no character. Save it again.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise AdapterFileError(f"{where} is not valid JSON ({place}). It is damaged: fetch it again.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where} is refused: {error}") from error
    if type(value) is not dict:
        raise AdapterFileError(f"{where} must be a JSON object, not {shown(value)}.")
    return value


def _require_shallow(data: bytes, where: str) -> None:
    """Nesting is measured before parsing: the parser recurses, on the C stack."""
    depth = 0
    for mark in _BRACKET.findall(_TEXT.sub(b"", _ESCAPE.sub(b"", data))):
        if mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise AdapterFileError(
                    f"{where} is nested more than {MAX_DEPTH} levels deep; nothing that belongs here is."
                )
        else:
            depth -= 1


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} occurs twice, and readers differ in which one they take")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > 20:  # 2**64 has 20 digits; long ones take quadratic time
        raise ValueError(f"the number {shown(digits)} is too large")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(digits)} is not finite")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON or an adapter knows")
