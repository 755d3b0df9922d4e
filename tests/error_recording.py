"""Which of fastpeft's error texts a run raises. A pytest plugin, which tests/conftest.py registers.

With FASTPEFT_ERROR_TEXTS=FILE every process that loads it appends to FILE a line of JSON for each text and test. With
FASTPEFT_WHOLE_RUN=1, which `make test` sets, a run that is green fails if it has not raised every text of the table, or
has raised one that is long because a value stands in it that the user cannot read.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastpeft.errors import FastpeftError
from tests import error_texts
from tests.error_texts import HOW, ROOT, UNREACHED, Row, Text

RECORDING = "FASTPEFT_ERROR_TEXTS"
WHOLE = "FASTPEFT_WHOLE_RUN"
LONGEST = 2000  # characters: room for the longest words and a few values, each cut at 100
DEEPEST = 5  # frames from the error's own up to the one that has the text

_faults = pytest.StashKey[list[str]]()
_whole = pytest.StashKey[bool]()
_seen: set[tuple[Text, str, bool]] = set()
_skipped: set[str] = set()


def _recording_init(self, *args):
    self.args = args  # all that BaseException's does, whose name torch.compile does not trace
    if not torch.compiler.is_compiling() and os.environ.get(RECORDING):
        _record(str(self), sys._getframe(1))


def install() -> None:
    """Record in this process, if FASTPEFT_ERROR_TEXTS is set."""
    if os.environ.get(RECORDING):
        FastpeftError.__init__ = _recording_init


def _record(said: str, frame) -> None:
    text = _text(said, frame)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0].split("[")[0]
    key = text, test, len(said) > LONGEST
    if text is None or key in _seen:
        return
    _seen.add(key)
    with contextlib.suppress(OSError), open(os.environ[RECORDING], "a", encoding="utf-8") as file:
        file.write(json.dumps([*text, test, said[: LONGEST + 1]]) + "\n")


def _text(said: str, frame) -> Text | None:
    """The text of the sources that an error has which was made in this frame, or for it by one that it called."""
    for _ in range(DEEPEST):
        if frame is None:
            return None
        for text in _texts_at(frame.f_code.co_filename, frame.f_lineno):
            if error_texts.says(text.template, said):
                return text
        frame = frame.f_back
    return None


def _texts_at(file: str, line: int) -> list[Text]:
    """Those that the innermost call on the line can make, the most particular first."""
    path = os.path.relpath(os.path.realpath(file), ROOT)
    if not path.startswith(error_texts.FOLDERS):
        return []
    around = [site for site in error_texts.sites(Path(path).as_posix()) if site.first <= line <= site.last]
    return sorted(around[0].texts, key=lambda text: -len(text.template)) if around else []


def pytest_configure(config):
    config.stash[_whole] = os.environ.pop(WHOLE, "") == "1"  # not for the runs that tests start
    if config.stash[_whole]:
        handle, os.environ[RECORDING] = tempfile.mkstemp(prefix="fastpeft-error-texts-")
        os.close(handle)
    install()
    if os.environ.get(RECORDING):
        error_texts.all_texts()  # read now, not while a test is timed


def pytest_runtest_logreport(report):
    if report.skipped:
        _skipped.add(report.nodeid.split("[")[0])


def pytest_collectreport(report):
    if report.skipped:
        _skipped.add(report.nodeid)


def lacking(raised: set[Text], skipped: set[str]) -> list[Row]:
    """The rows of the table that a run should have raised: their test, or its file, was not skipped."""
    rows = [row for row in error_texts.read_table() if row.text not in raised]
    return [row for row in rows if not row.test.startswith(UNREACHED) and not {row.test, _file(row)} & skipped]


def _file(row: Row) -> str:
    return row.test.partition("::")[0]


def overlong(recording: str) -> list[str]:
    """What was said at too great a length, and by which test."""
    lines = map(json.loads, Path(recording).read_text(encoding="utf-8").splitlines())
    return [f"{place}: {said[:200]}... ({test})" for place, _, _, test, said in lines if len(said) > LONGEST]


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if not config.stash[_whole]:
        return
    recording = os.environ.pop(RECORDING)
    if exitstatus == pytest.ExitCode.OK:
        rows = lacking(set(error_texts.recorded([recording])), _skipped)
        missed = [f"{row.text.place}: {row.text.kind}: {row.text.template} ({row.test})" for row in rows]
        config.stash[_faults] = [f"not raised: {each}" for each in missed]
        config.stash[_faults] += [f"too long: {each}" for each in overlong(recording)]
        if config.stash[_faults]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    os.remove(recording)


def pytest_terminal_summary(terminalreporter, config):
    if faults := config.stash.get(_faults, []):
        terminalreporter.section("error texts")
        for fault in faults:
            terminalreporter.line(fault)
        terminalreporter.line(HOW)
