"""Files and directories whose state survives the loss of power: written in full, synced, one writer at a time."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(directory: str, wait: bool) -> Iterator[bool]:
    """Holds the directory's lock; yields False if another process holds it and `wait` is False.

    It is an flock, which the kernel releases when its process dies, and which leaves no file behind.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # no locks on this file system; see `fastpeft.journal`
        yield mine
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # close alone would leave it with a child forked meanwhile
        os.close(descriptor)


def make_directory(directory: str) -> None:
    """Makes the directory and its missing parents, each durable in the one above it."""
    missing, above = [], os.path.abspath(directory)
    while not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(directory, exist_ok=True)
    for path in missing:
        sync_directory(os.path.dirname(path))


def write_synced(path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: str) -> None:
    if os.name == "nt":
        return  # directories cannot be opened there
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync files only
            raise
    finally:
        os.close(descriptor)
