"""Saves by processes of their own: killed at each step, out of room, without rights, beside each other. What is read
afterwards is the old adapter or the new one; a reader that does not know the journal, HF peft, is shown what it meets.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch

import fastpeft
from fastpeft.files import read_adapter
from tests.adapter_dirs import CONFIG, WEIGHTS, own_files, read, save
from tests.counting import count, how_many
from tests.models import batch, tiny

ROOT = Path(__file__).resolve().parent.parent
# What differs from the old adapter: ranks, targets, the scale alone, the values alone.
OLD = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
NEW = {
    "ranks": {**OLD, "r": 8},
    "targets": {**OLD, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "scale": {**OLD, "lora_alpha": 16},
    "values": OLD,
}


class Saver:
    """Tasks for `tests.saving_process`."""

    def __enter__(self):
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.saving_process"],
            **{"cwd": ROOT, "env": {**env, "OMP_NUM_THREADS": "1"}, "text": True},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def do(self, what, directory, **task):
        task = {key: str(value) if isinstance(value, Path) else value for key, value in task.items()}
        print(json.dumps({"do": what, "directory": str(directory), **task}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def saver():
    with Saver() as process:
        yield process


@pytest.fixture
def place():
    """A directory that every user may enter, unlike tmp_path; it belongs to nobody where tests run as root."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for folder, *_ in os.walk(path):
        os.chmod(folder, 0o755)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Real adapters, of a model that peft can load too."""
    root = tmp_path_factory.mktemp("sources")
    for seed, (name, settings) in enumerate({"old": OLD, **NEW}.items()):
        model = fastpeft.patch(tiny(), fastpeft.LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        fastpeft.save_adapter(model, root / name)
    return root


def pair(directory, sources, names):
    """Whose weights and whose configuration somebody sees who looks at nothing else; of equal ones, the first's."""
    found = []
    for file in (WEIGHTS, CONFIG):
        path = directory / file
        content = path.read_bytes() if path.exists() else None
        found.append(next((n for n in names if content == (sources / n / file).read_bytes()), content and "a mixture"))
    return tuple(found)


def ours(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_adapter(directory)
    return found.config, {key: tensor.tolist() for key, tensor in found.tensors.items()}


def by_peft(directory):
    """The logits under peft, None if it refuses, and what it says."""
    import peft

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = peft.PeftModel.from_pretrained(tiny(), directory)
        except Exception as error:
            return None, str(error)
    with torch.no_grad():
        return model(**batch()).logits, " ".join(str(each.message) for each in said)


def killed_at_each_step(saver, sources, target, new, old):
    """(weights, configuration) after a kill at each step of a save, as they lie there."""
    for at in range(100):
        shutil.rmtree(target, ignore_errors=True)
        if old:
            shutil.copytree(sources / "old", target)
        ended = saver.do("save", target, source=sources / new, kill_at=at)
        assert ended["signal"] in (None, signal.SIGKILL), ended
        yield ended["signal"], (pair(target, sources, ("old", new)) if target.exists() else (None, None))
        if ended["signal"] is None:
            assert ended["error"] is None
            assert not ended["fired"]
            return


@pytest.mark.parametrize("new", list(NEW)[:: how_many(2, 1)])
def test_killed_over_an_old_adapter(saver, sources, tmp_path, new):
    """In HF peft's layout, of two files, there is one window: the new weights lie beside the old configuration."""
    config = "old" if new == "values" else new
    seen = []
    for killed, found in killed_at_each_step(saver, sources, tmp_path / "adapter", new, old=True):
        seen.append(found)
        if killed:
            loaded = ours(tmp_path / "adapter")
            assert loaded in (ours(sources / "old"), ours(sources / new))
            assert own_files(tmp_path / "adapter") == [] or found == ("old", "old")
            count("kills survived")
    window = [("old", "old"), (new, "old"), (new, config)]
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(window))
    assert len(seen) > 15


def test_killed_in_a_new_directory(saver, sources, tmp_path):
    seen = []
    for killed, found in killed_at_each_step(saver, sources, tmp_path / "adapter", "ranks", old=False):
        seen.append(found)
        if found == ("ranks", None):
            logits, words = by_peft(tmp_path / "adapter")
            assert logits is None and "adapter_config.json" in words
        if killed and (tmp_path / "adapter").exists():
            try:
                assert ours(tmp_path / "adapter") == ours(sources / "ranks")
            except fastpeft.AdapterFileError as error:
                assert "adapter_config.json is missing" in str(error)
                assert found == (None, None)
            count("kills survived")
    assert list(dict.fromkeys(seen)) == [(None, None), ("ranks", None), ("ranks", "ranks")]


@pytest.mark.parametrize("new", NEW)
def test_what_peft_makes_of_the_window(sources, tmp_path, new):
    """New weights and old configuration: it refuses other ranks, leaves out new targets with a warning or without, and
    does not notice another scale. Nowhere does it fill an adapted layer at random, as it would in the other order."""
    shutil.copytree(sources / "old", tmp_path / "window")
    shutil.copy(sources / new / WEIGHTS, tmp_path / "window" / WEIGHTS)
    (tmp_path / "window" / "fastpeft.json").unlink()
    logits, words = by_peft(tmp_path / "window")
    if new == "ranks":
        assert logits is None and "size mismatch" in words
        return
    again, _ = by_peft(tmp_path / "window")
    assert torch.equal(logits, again), "nothing in it is random"
    whole, _ = by_peft(sources / new)
    assert torch.equal(logits, whole) is (new == "values")
    assert "missing" not in words


def test_the_other_order_would_be_worse(sources, tmp_path):
    """Old weights and a new configuration of more targets: peft makes the layers that are missing, at random or not
    trained, and says so in a warning at most; that is why the configuration is renamed last."""
    shutil.copytree(sources / "targets", tmp_path / "window")
    shutil.copy(sources / "old" / WEIGHTS, tmp_path / "window" / WEIGHTS)
    _, words = by_peft(tmp_path / "window")
    assert "missing" in words
    with pytest.raises(fastpeft.AdapterFileError, match="are missing"):
        (tmp_path / "window" / "fastpeft.json").unlink()
        fastpeft.load_adapter(tiny(), tmp_path / "window")


def give_to_nobody(path):
    if os.geteuid() == 0:
        for folder, _, names in os.walk(path):
            for name in [folder, *(os.path.join(folder, name) for name in names)]:
                os.chown(name, 65534, 65534)


@pytest.mark.parametrize("old", ["A", None])
def test_rights_that_are_lost_at_each_step(saver, place, old):
    """The directory turns read-only while a process without root's rights saves to it."""
    save(place / "B", "B")
    reports = set()
    for at in range(0, 100, how_many(2, 1)):
        directory = place / "adapter"
        if directory.exists():
            os.chmod(directory, 0o755)
            shutil.rmtree(directory)
        directory.mkdir()
        if old:
            save(directory, old)
        give_to_nobody(place)
        ended = saver.do("save", directory, source=place / "B", chmod_at=at, nobody=True)
        assert ended["signal"] is None
        if ended["error"] is None:
            expected = "B"
        else:
            assert ended["error"] == "AdapterFileError" and "Permission denied" in ended["message"], ended
            complete = "The new adapter is complete on disk" in ended["message"]
            assert complete or "What it held before is as it was" in ended["message"]
            expected = "B" if complete else old
            reports.add(complete)
            count("failed saves survived")
        seen = saver.do("read", directory, nobody=True)  # while it is read-only
        if expected is None:
            assert seen["error"] == "AdapterFileError" and "is missing" in seen["message"]
        else:
            assert seen["error"] is None, seen
        os.chmod(directory, 0o755)
        assert read(directory, "A", "B") == expected
        if ended.get("fired") is False:
            break
    assert reports == {True, False}


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=oct)
def test_a_directory_that_may_not_be_written_or_entered(saver, place, mode):
    save(place / "B", "B")
    save(place / "adapter", "A")
    give_to_nobody(place)
    os.chmod(place / "adapter", mode)
    ended = saver.do("save", place / "adapter", source=place / "B", nobody=True)
    assert ended["error"] == "AdapterFileError"
    assert "Permission denied" in ended["message"] and str(place / "adapter") in ended["message"]
    seen = saver.do("read", place / "adapter", nobody=True)
    if mode == 0o000:
        assert seen["error"] == "AdapterFileError" and "cannot be read: Permission denied" in seen["message"]
    else:
        assert seen["error"] is None
    os.chmod(place / "adapter", 0o755)
    assert read(place / "adapter", "A", "B") == "A"
    assert own_files(place / "adapter") == []
    count("failed saves survived")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "fastpeft.json"])
def test_a_file_that_may_not_be_read(saver, place, name):
    save(place / "adapter", "A")
    give_to_nobody(place)
    os.chmod(place / "adapter" / name, 0o000)
    seen = saver.do("read", place / "adapter", nobody=True)
    assert seen["error"] == "AdapterFileError" and f"{name} cannot be read: Permission denied" in seen["message"]


@pytest.mark.parametrize("old", ["A", None])
def test_a_file_that_may_not_grow(saver, tmp_path, old):
    """A write that the kernel cuts short, at each size up to that of the whole."""
    save(tmp_path / "B", "B")
    failed = 0
    for size in range(0, 4001, how_many(500, 25)):  # the journal, the largest of them, has about 1,300 bytes
        directory = tmp_path / "adapter"
        shutil.rmtree(directory, ignore_errors=True)
        if old:
            save(directory, old)
        ended = saver.do("save", directory, source=tmp_path / "B", bytes_in_a_file=size)
        if ended["error"] is not None:
            assert ended["error"] == "AdapterFileError" and "File too large" in ended["message"], ended
            failed += 1
            count("failed saves survived")
        assert read(directory, "A", "B") == (old if ended["error"] else "B")
        assert not directory.exists() or own_files(directory) == []
    assert failed > 1 and ended["error"] is None


# A file system of a few pages for each line of `sizes`, in a mount namespace that ends with its process.
FULL_DISK = """
set -e
while read number size; do
    mkdir mounted-$number
    mount -t tmpfs -o size=$size none mounted-$number
    cp -r A mounted-$number/adapter
done < sizes
(cd {root}; {python} -m tests.saving_process) < tasks > answers
while read number size; do
    cp -r mounted-$number/adapter left-$number
done < sizes
"""


def test_a_disk_that_is_full(tmp_path):
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    mount = [*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    save(tmp_path / "A", "A")
    save(tmp_path / "B", "B")
    pages = range(4, 12)  # three files, the directory, and some of the new ones
    page = os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "sizes").write_text("".join(f"{number} {number * page}\n" for number in pages))
    places = {number: str(tmp_path / f"mounted-{number}" / "adapter") for number in pages}
    tasks = [{"do": "save", "directory": place, "source": str(tmp_path / "B")} for place in places.values()]
    (tmp_path / "tasks").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    script = FULL_DISK.format(root=ROOT, python=sys.executable)
    ran = subprocess.run([*unshare, "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    for number, ended in zip(pages, answers, strict=True):
        left = tmp_path / f"left-{number}"
        if ended["error"] is not None:
            assert ended["error"] == "AdapterFileError" and "No space left on device" in ended["message"]
            assert "What it held before is as it was" in ended["message"]
            assert own_files(left) == []
            count("failed saves survived")
        assert read(left, "A", "B") == ("A" if ended["error"] else "B")
    assert {each["error"] for each in answers} == {"AdapterFileError", None}


def test_processes_that_save_to_one_directory_take_turns(saver, tmp_path):
    for name in ("A", "B"):
        save(tmp_path / name, name)
    directory, ended, seen = tmp_path / "adapter", [], []
    save(directory, "A")
    task = {"source": tmp_path / "B", "times": how_many(60, 600)}
    other = threading.Thread(target=lambda: ended.append(saver.do("save", directory, **task)))
    other.start()
    while other.is_alive():
        save(directory, "A")
        seen.append(read(directory, "A", "B"))
    other.join()
    assert ended[0]["error"] is None and ended[0]["signal"] is None
    assert set(seen) == {"A", "B"}
    for at in range(0, 24, how_many(4, 1)):  # the one is killed, another goes on
        killed = saver.do("save", directory, source=tmp_path / "B", kill_at=at)
        save(directory, "A")
        assert read(directory, "A") == "A"
        count("kills survived", int(killed["signal"] == signal.SIGKILL))
    assert own_files(directory) == []
