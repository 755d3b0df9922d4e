"""Saves that fail, crash, are killed or lose power at any step: what is read is the old adapter or the new one."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastpeft import durable, journal
from fastpeft.errors import AdapterFileError
from fastpeft.files import read_adapter
from tests.adapter_dirs import assert_next_save_is_whole, disk, own_files, read, save, survivors
from tests.counting import count, how_many
from tests.failing_disk import Crash, FailingOs

CHANGES = [(None, "A"), ("A", "B"), ("A", "plain"), ("plain", "A"), ("same-config", "A"), ("A", "same")]


@pytest.fixture(autouse=True)
def unsynced():
    """Without waiting for the medium, which nothing here looks at."""
    with disk(FailingOs()):
        yield


@pytest.fixture
def prepared(tmp_path):
    """Makes directories that hold one of ADAPTERS, copies of one that was saved once."""

    def prepare(name, target):
        shutil.rmtree(target, ignore_errors=True)
        if name is None:
            return target
        if not (tmp_path / name).exists():
            save(tmp_path / name, name)
        return shutil.copytree(tmp_path / name, target)

    return prepare


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_crash_at_every_step(tmp_path, prepared, old, new):
    seen = []
    for at in range(100):
        directory = prepared(old, tmp_path / "adapter")
        with disk(FailingOs(at)) as failing, contextlib.suppress(Crash):
            save(directory, new)
        seen.append(read(directory, *filter(None, (old, new))))
        if os.path.isdir(directory):
            assert not (directory / journal.JOURNAL).exists(), "the load finishes what was committed"
        assert_next_save_is_whole(directory)
        if not failing.fired:
            break
    assert seen[0] == old
    assert seen[-1] == ("A" if new == "same" else new)
    assert len(seen) > 15
    committed = seen.index(seen[-1])
    assert set(seen[committed:]) == {seen[-1]}, "once the new adapter was seen, it stays"


@pytest.mark.parametrize(("old", "new"), CHANGES[:3])
def test_a_second_crash_while_the_first_is_made_good(tmp_path, prepared, old, new):
    allowed = [name for name in (old, new) if name]
    for at in range(100):
        prepared(old, tmp_path / "crashed")
        with disk(FailingOs(at)) as failing, contextlib.suppress(Crash):
            save(tmp_path / "crashed", new)
        if not (tmp_path / "crashed" / journal.JOURNAL).exists():
            if not failing.fired:
                break
            continue
        for then in range(100):
            directory = tmp_path / "adapter"
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(tmp_path / "crashed", directory)
            with disk(FailingOs(then)) as again, contextlib.suppress(Crash):
                read_adapter(directory)
            assert read(directory, *allowed) == new
            if not again.fired:
                break
        assert then > 3
    assert at > 15


@pytest.mark.parametrize("once", [True, False], ids=["once", "from-then-on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize(("old", "new"), CHANGES[:3])
def test_error_at_every_step(tmp_path, prepared, old, new, code, once):
    """Unlike a crash, an error is reported, with what is on disk, and cleaned up after where that is possible."""
    reports = set()
    for at in range(100):
        directory = prepared(old, tmp_path / "adapter")
        with disk(FailingOs(at, lambda: OSError(code, os.strerror(code)), once)) as failing:
            try:
                save(directory, new)
                expected = new
            except AdapterFileError as error:
                assert str(directory) in str(error)
                assert os.strerror(code) in str(error)
                complete = "The new adapter is complete on disk" in str(error)
                assert complete or "What it held before is as it was" in str(error)
                expected = new if complete else old
                reports.add(complete)
        if once and expected == old and directory.exists():
            assert own_files(directory) == []
        assert read(directory, *filter(None, (old, new))) == expected
        assert_next_save_is_whole(directory)
        count("failed saves survived", int(failing.fired))
        if not failing.fired:
            break
    assert expected == new
    assert at > 15
    assert reports == {True, False}


@pytest.mark.parametrize(("old", "new"), [("A", "B"), ("A", "plain"), ("plain", "A")])
def test_power_loss_at_every_step(tmp_path, prepared, old, new):
    """Unsynced data is gone, unsynced renames and removals in any combination: stricter than any real file system."""
    count, seen = 0, set()
    for fired, left in survivors(prepared(old, tmp_path / "before"), tmp_path, new):
        found = read(left, old, new)
        save(left, "B")
        assert fired or found == new, "a save that returned has happened"
        # Temporaries of another process would be left if that lives; these are of this one.
        assert own_files(left) == []
        seen.add(found)
        count += 1
    assert seen == {old, new}
    assert count > 60


@pytest.mark.filterwarnings("ignore:.*is ignored")
@pytest.mark.parametrize("broken", ["no-directory-sync", "no-file-sync", "no-journal", "journal-removed-early"])
def test_the_models_catch_a_writer_that_is_wrong(tmp_path, prepared, monkeypatch, broken):
    if broken == "no-directory-sync":
        monkeypatch.setattr(journal, "sync_directory", lambda directory: None)
    elif broken == "no-file-sync":
        monkeypatch.setattr(journal, "write_synced", lambda path, data: write_unsynced(path, data))
    elif broken == "no-journal":
        monkeypatch.setattr(journal, "_announce", lambda directory, entries: None)
    else:
        finish = journal._finish

        def finish_early(directory, entries, done=()):
            journal._remove_journal(directory)
            finish(directory, entries, done)

        monkeypatch.setattr(journal, "_finish", finish_early)
    with pytest.raises((AssertionError, AdapterFileError)):
        for _, left in survivors(prepared("A", tmp_path / "before"), tmp_path, "B"):
            read(left, "A", "B")


def write_unsynced(path, data):
    descriptor = durable.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    durable.os.write(descriptor, data)
    os.close(descriptor)


def test_threads_that_save_to_one_directory_take_turns(tmp_path):
    failures = []

    def work(name):
        try:
            for _ in range(15):
                save(tmp_path, name)
                read(tmp_path, "A", "B")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("A", "B", "A")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert read(tmp_path, "A", "B") in ("A", "B")
    assert own_files(tmp_path) == []


# One process imports torch; its forks write without end, and are killed.
NURSERY = """
import os, sys
from tests.adapter_dirs import save
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        turn = 0
        while True:
            turn += 1
            save(line.strip(), "AB"[turn % 2])
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_kill_at_random_instants_with_a_reader_beside(tmp_path):
    chance = random.Random(0)
    directory = tmp_path / "adapter"
    save(directory, "A")
    found, interrupted = [], 0
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as nursery:
        for _ in range(how_many(20, 50)):
            print(directory, file=nursery.stdin, flush=True)
            child = int(nursery.stdout.readline())
            end = time.monotonic() + chance.uniform(0.05, 0.25)
            while time.monotonic() < end:
                found.append(read(directory, "A", "B"))
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == "dead\n"
            interrupted += own_files(directory) != []
            found.append(read(directory, "A", "B"))
            save(directory, "A")
            assert own_files(directory) == []
            count("kills survived")
        nursery.stdin.close()
    assert set(found) == {"A", "B"}
    assert interrupted > 0, "no kill came in the middle of a save: the test shows nothing"
