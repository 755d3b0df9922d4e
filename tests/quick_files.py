"""Saving without waiting for the disk, which no test here could tell: what a killed process has written is kept by the
system, what a lost power loses is played by `failing_disk`, and processes that are started anew do wait."""

import os


def install() -> None:
    os.fsync = _known


def _known(file) -> None:
    """As it, of what is not open an error."""
    os.fstat(file if isinstance(file, int) else file.fileno())
