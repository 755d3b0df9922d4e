"""The journal of an interrupted save: who finishes it, who only reads by it, and who does not trust it."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import tempfile

import pytest

from fastpeft import journal
from fastpeft.errors import AdapterFileError
from fastpeft.files import read_adapter, read_config
from tests.adapter_dirs import (
    ADAPTERS,
    CONFIG,
    SIDE,
    WEIGHTS,
    assert_next_save_is_whole,
    disk,
    own_files,
    read,
    save,
    survivors,
    tree,
)
from tests.failing_disk import Crash, FailingOs


@pytest.fixture(autouse=True)
def unsynced():
    """Without waiting for the medium, which nothing here looks at."""
    with disk(FailingOs()):
        yield


def crashed_after(directory, step, new):
    """Leaves the directory as a crash does right after the named step (`replace` number 0 is the commit)."""

    class After(FailingOs):
        replaced = -1

        def done(self, name, real, *args, **kwargs):
            result = super().done(name, real, *args, **kwargs)
            if name == "replace":
                self.replaced += 1
                if self.replaced == step:
                    self.at = self.count
            return result

    with disk(After()), pytest.raises(Crash):
        save(directory, new)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_reader_without_the_right_to_write_reads_the_new_adapter(step):
    # Not tmp_path: its parents are closed to other users.
    directory = tempfile.mkdtemp()
    try:
        save(directory, "A")
        crashed_after(directory, step, "B")
        os.chmod(directory, 0o555)
        before = tree(directory)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            assert not os.access(directory, os.W_OK, effective_ids=True)
            assert read(directory, "A", "B") == "B"
            assert read_config(directory) == ADAPTERS["B"][1]
        finally:
            os.seteuid(os.getuid())
        assert tree(directory) == before
        os.chmod(directory, 0o755)
        assert read(directory, "B") == "B"
        assert own_files(directory) == []
    finally:
        os.chmod(directory, 0o755)
        shutil.rmtree(directory)


def damage_staged(directory, final, damage):
    """Does what bad media do to the file that was to become `final`."""
    entries = json.loads((directory / journal.JOURNAL).read_bytes())["files"]
    path = directory / next(entry["temporary"] for entry in entries if entry["final"] == final)
    content = path.read_bytes()
    os.unlink(path)
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else content.replace(b"2", b"3"))
        assert path.read_bytes() != content


DAMAGES = pytest.mark.parametrize("damage", ["gone", "cut", "changed"])


@DAMAGES
def test_a_lost_file_rolls_back_if_none_was_replaced(tmp_path, damage):
    save(tmp_path, "A")
    crashed_after(tmp_path, 0, "B")
    damage_staged(tmp_path, CONFIG, damage)
    assert read(tmp_path, "A", "B") == "A"
    assert own_files(tmp_path) == []


@DAMAGES
def test_a_lost_file_that_had_not_changed_is_not_missed(tmp_path, damage):
    save(tmp_path, "same-config")
    crashed_after(tmp_path, 0, "A")
    damage_staged(tmp_path, CONFIG, damage)
    assert read(tmp_path, "A") == "A"
    assert own_files(tmp_path) == []


@DAMAGES
def test_a_lost_file_is_an_error_if_another_was_replaced(tmp_path, damage):
    """The weights are new, their configuration is lost: no adapter, until a save of one succeeds."""
    broken, directory = tmp_path / "broken", tmp_path / "adapter"
    save(broken, "A")
    crashed_after(broken, 1, "B")
    damage_staged(broken, CONFIG, damage)
    words = f"{WEIGHTS} is new, but the new {CONFIG} is lost. Save the adapter"
    outcomes = set()
    for at, once in itertools.product(range(40), [True, False]):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(broken, directory)
        failing = FailingOs(at, lambda: OSError(errno.ENOSPC, "full"), once)
        with disk(failing), contextlib.suppress(AdapterFileError):
            save(directory, "plain")
        try:
            outcomes.add(read(directory, "plain"))
        except AdapterFileError as error:
            assert words in str(error)
            outcomes.add("lost")
    assert not failing.fired
    assert outcomes == {"lost", "plain"}
    assert_next_save_is_whole(directory)


def test_power_lost_over_a_mixture(tmp_path):
    """As above: what a save leaves when the power goes must not make the mixture look whole either."""
    broken = tmp_path / "broken"
    save(broken, "A")
    crashed_after(broken, 1, "B")
    damage_staged(broken, CONFIG, "gone")
    outcomes = set()
    for _, left in survivors(broken, tmp_path, "plain"):
        try:
            outcomes.add(read(left, "plain"))
        except AdapterFileError as error:
            assert f"the new {CONFIG} is lost" in str(error)
            outcomes.add("lost")
    assert outcomes == {"lost", "plain"}


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_rename_that_is_not_permitted(tmp_path, nth):
    """Refused the first, nothing has happened, and the error says so; refused a later one, the save has."""

    class Sticky(FailingOs):
        replaced = -1

        def step(self, name, real, *args, **kwargs):
            self.replaced += name == "replace"
            if name == "replace" and self.replaced == nth:
                raise PermissionError(errno.EPERM, "not permitted")
            return super().step(name, real, *args, **kwargs)

    save(tmp_path, "A")
    words, expected = ("is as it was", "A") if nth == 1 else ("the next load or save there puts it in place", "B")
    with disk(Sticky()), pytest.raises(AdapterFileError, match=f"not permitted.*{words}"):
        save(tmp_path, "B")
    assert (own_files(tmp_path) == []) == (nth == 1)
    assert read(tmp_path, "A", "B") == expected
    assert own_files(tmp_path) == []


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_what_another_program_saved_after_the_crash_is_kept(tmp_path, step):
    """However many files were renamed before the crash; peft knows nothing of the journal."""
    (tmp_path / "theirs").mkdir()
    save(tmp_path / "theirs", "plain")
    directory = tmp_path / "ours"
    save(directory, "A")
    crashed_after(directory, step, "B")
    assert (directory / journal.JOURNAL).exists()
    for name in (WEIGHTS, CONFIG):
        shutil.copy(tmp_path / "theirs" / name, directory / name)
    with pytest.warns(UserWarning, match="is ignored"):
        assert read(directory, "plain") == "plain"
    assert own_files(directory) == []


NAME = ".fastpeft-tmp-1-0123456789abcdef"
ENTRY = {"final": CONFIG, "temporary": NAME, "sha256": "0" * 64, "size": 2, "previous": None}
JOURNALS = {
    "empty": "",
    "list": "[]",
    "nan": '{"schema": NaN}',
    "large": '{"schema": 1, "files": [' + " " * 20_000 + "]}",
    "newer": {"schema": 2, "files": [ENTRY]},
    "no-files": {"schema": 1, "files": []},
    "files-text": {"schema": 1, "files": "all"},
    "entry-text": {"schema": 1, "files": ["all"]},
    "entry-short": {"schema": 1, "files": [{"final": CONFIG}]},
    "entry-long": {"schema": 1, "files": [ENTRY | {"mode": 0o777}]},
    "other-final": {"schema": 1, "files": [ENTRY | {"final": "../victim"}]},
    "final-list": {"schema": 1, "files": [ENTRY | {"final": [CONFIG]}]},
    "other-temporary": {"schema": 1, "files": [ENTRY | {"temporary": "../victim"}]},
    "temporary-below": {"schema": 1, "files": [ENTRY | {"temporary": f"{NAME}/../../victim"}]},
    "temporary-number": {"schema": 1, "files": [ENTRY | {"temporary": 1}]},
    "temporary-missing": {"schema": 1, "files": [ENTRY | {"temporary": None}]},
    "digest": {"schema": 1, "files": [ENTRY | {"sha256": "x"}]},
    "size": {"schema": 1, "files": [ENTRY | {"size": True}]},
    "twice": {"schema": 1, "files": [ENTRY, ENTRY]},
}


@pytest.mark.parametrize("case", JOURNALS)
def test_hostile_journal(tmp_path, case):
    (tmp_path / "victim").write_text("mine")
    directory = tmp_path / "adapter"
    save(directory, "A")
    content = JOURNALS[case]
    (directory / journal.JOURNAL).write_text(content if isinstance(content, str) else json.dumps(content))
    before = tree(tmp_path)
    with pytest.raises(AdapterFileError, match=f"{directory}/{journal.JOURNAL} "):
        read_adapter(directory)
    assert tree(tmp_path) == before
    assert_next_save_is_whole(directory)
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_save_sweeps_up_after_the_dead_only(tmp_path):
    save(tmp_path, "A")
    child = subprocess.Popen(["true"])
    child.wait()
    temporary = ".fastpeft-tmp-{}-0123456789abcdef".format
    dead = [temporary(child.pid), temporary(os.getpid()), temporary(2**32)]
    kept = [temporary(os.getppid()), ".fastpeft-tmp-x", "mine.txt", temporary(os.getpid()) + ".mine"]
    for name in dead + kept:
        (tmp_path / name).write_text("x")
    assert read(tmp_path, "A") == "A"
    assert set(dead + kept) < set(os.listdir(tmp_path)), "a load leaves them alone"
    save(tmp_path, "B")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, CONFIG, WEIGHTS, SIDE])
