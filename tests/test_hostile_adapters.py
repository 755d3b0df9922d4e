"""Adapters from strangers, at the doors where users bring them in: each is refused by an error of ours, in a second and
200 megabytes, with the model bit for bit as it was, and with nothing run, unpickled or fetched."""

import json
import os
import pickle
import queue
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest

import fastpeft
from tests.counting import count, how_many
from tests.hostile import CONFIG, SIDE, SOUND, config, lay_out, mined, options, sound
from tests.hostile_cases import CASES, TENSORS, TOKENIZERS
from tests.hostile_victim import DEEDS, SPOILS

SECONDS = 1.0  # of the processor
MEGABYTES = 200
PATIENCE = 120  # on the clock, where many processes share a core
ROOT = Path(__file__).resolve().parent.parent


class Child:
    """The victim. It is started again if it dies or hangs, which fails the test that it died of."""

    def __init__(self, folder):
        self.folder, self.process = folder, None

    def start(self):
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        self.log = open(self.folder / "victim.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile_victim"],
            **{"cwd": ROOT, "env": {**env, "OMP_NUM_THREADS": "1"}, "text": True},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log},
        )
        self.answers = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process.stdout, self.answers), daemon=True).start()
        try:
            self.warm_up()
        except BaseException:
            self.stop()
            raise

    def warm_up(self):
        """What is imported, or made, when it is first needed is there afterwards; and no pickle is read any more."""
        for method in SOUND:
            directory = self.folder / method
            if not directory.exists():
                lay_out(directory, method)
            for verb in ("load", "beside", "restore") + (("hotswap", "set") if method == "lora" else ()):
                answer = self.send(directory=str(directory), method=method, verb=verb)
                assert answer["error"] is None and answer["loaded"] == [], answer
        assert self.send(close=True) == {}

    @staticmethod
    def listen(stream, answers):
        for line in stream:
            answers.put(line)
        answers.put(None)

    def send(self, **task):
        print(json.dumps(task), file=self.process.stdin, flush=True)
        try:
            line = self.answers.get(timeout=PATIENCE)
        except queue.Empty:
            line = None
        if line is None:
            self.stop()
            pytest.fail(f"the process hung or died: {(self.folder / 'victim.log').read_text()[-2000:]}")
        return json.loads(line)

    def ask(self, directory, method, verb="load", **more):
        if self.process is None:
            self.start()
        return self.send(directory=str(directory), method=method, verb=verb, **more)

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.log.close()
            self.process = None


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    process = Child(tmp_path_factory.mktemp("victim"))
    yield process
    process.stop()


@pytest.fixture
def directory(tmp_path):
    """Where an adapter is laid out; removed at once, as there are many."""
    yield tmp_path / "adapter"
    shutil.rmtree(tmp_path)


def check_quiet(answer, directory):
    """Nothing was done besides, and not much of that."""
    assert answer["events"] == []
    assert answer["printed"] == ""
    assert answer["megabytes"] < MEGABYTES  # first: pages take time, on some machines more than a second for 300 MB
    assert answer["seconds"] < SECONDS
    assert not (directory / "owned").exists()


def check_refused(answer, directory, errors=None, words=()):
    assert answer["error"] is not None, f"it was loaded: {answer}"
    assert answer["typed"], answer
    if errors is not None:
        assert set(errors) & set(answer["classes"]), answer
    message = answer["message"]
    for word in words:
        assert word in message, message
    assert len(message) < 1000 + 3 * len(str(directory)), message[:2000]
    assert message.isprintable(), repr(message)
    assert answer["changed"] == []
    check_quiet(answer, directory)


def check_either(answer, directory):
    """Refused as above, or loaded as the file is."""
    if answer["error"] is not None:
        check_refused(answer, directory)
        return True
    assert answer["loaded"] == []
    check_quiet(answer, directory)
    return False


def laid_out(directory, name):
    method, damage, errors, *words = CASES[name]
    lay_out(directory, method)
    damage(directory)
    return method, (errors if isinstance(errors, tuple) else (errors,)), words


def test_there_are_many():
    assert len(CASES) > 250


@pytest.mark.parametrize("name", CASES)
def test_refused_by_load_adapter(child, directory, name):
    method, errors, words = laid_out(directory, name)
    check_refused(child.ask(directory, method), directory, errors, words)
    count("hostile files refused")


def some_of(cases, quick):
    """Few of them in `make test`, spread over the table; all of them in `make reliability`."""
    cases = list(cases)
    return cases[:: how_many(max(len(cases) // quick, 1), 1)]


@pytest.mark.parametrize("name", some_of(CASES, 12))
@pytest.mark.parametrize("verb", ["beside", "restore"])
def test_refused_by_patched_models(child, directory, name, verb):
    method, _, _ = laid_out(directory, name)
    check_refused(child.ask(directory, method, verb), directory)
    count("hostile files refused")


@pytest.mark.parametrize("name", some_of((name for name, case in CASES.items() if case[0] == "lora"), 12))
def test_refused_by_hotswap_adapter(child, directory, name):
    method, _, _ = laid_out(directory, name)
    check_refused(child.ask(directory, method, "hotswap"), directory)
    count("hostile files refused")


# What a program that hands over tensors may replace, as with peft: the embeddings of a resized vocabulary.
EMBEDDINGS = [f"overwrites base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]


@pytest.mark.parametrize("name", TENSORS)
def test_refused_by_set_peft_model_state_dict(child, directory, name):
    method, errors, _ = laid_out(directory, name)
    answer = child.ask(directory, method, "set")
    if name in EMBEDDINGS:
        assert answer["error"] is None
        return
    check_refused(answer, directory, errors)
    count("hostile files refused")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tests.models import tiny

    path = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", some_of(CASES, 10))
def test_refused_by_auto_classes(child, base, directory, name):
    method, damage, *_ = CASES[name]
    lay_out(directory, method)
    written = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps({**written, "base_model_name_or_path": str(base)}))
    damage(directory)
    answer = child.ask(directory, method, "auto", base=str(base))
    assert answer["error"] is not None and answer["typed"], answer
    assert not (directory / "owned").exists()
    count("hostile files refused")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_beside_the_adapter(child, base, directory, name):
    lay_out(directory, "lora")
    written = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps({**written, "base_model_name_or_path": str(base)}))
    TOKENIZERS[name](directory)
    answer = child.ask(directory, "lora", "auto", base=str(base))
    assert answer["error"] == "AdapterFileError" and "tokenizer" in answer["message"], answer
    assert not (directory / "owned").exists()
    count("hostile files refused")


@pytest.mark.parametrize("family", ["gpt2", "bert", "bloom", "small"])
def test_an_adapter_of_another_base_model(child, directory, family):
    lay_out(directory, "lora")
    (directory / SIDE).unlink()
    check_refused(child.ask(directory, "lora", family=family), directory)
    count("hostile files refused")


@pytest.mark.parametrize("method", SOUND)
def test_a_sound_adapter_among_mines_is_loaded_and_none_goes_off(child, directory, method):
    lay_out(directory, method)
    mined(directory)
    answer = child.ask(directory, method)
    assert answer["error"] is None and answer["loaded"] == [], answer
    check_quiet(answer, directory)


# Every field of every configuration, with values that are of the wrong type, or absurd.

WRONG = [[{"a": 1}]]
ABSURD = [True, -1, 0, 1.5, 10**19, 1e308, "x" * 3000, "", [], {}, {"a": []}, {"": None}, [[1]], [None], [True], None]
CLASSES = {method: fastpeft.get_peft_config(SOUND[method]) for method in SOUND}
FIELDS = [
    (method, each.name) for method, one in CLASSES.items() for each in fields(one) if each.metadata.get("stored", True)
]


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_no_field_of_a_wrong_type_does_harm(child, directory, method, field):
    chance = random.Random(f"{method} {field}")
    own = any(each.name == field and each.metadata.get("own") for each in fields(CLASSES[method]))
    for value in WRONG + chance.sample(ABSURD, how_many(1, len(ABSURD))):
        shutil.rmtree(directory, ignore_errors=True)
        lay_out(directory, method)
        (options if own else config)(**{field: value})(directory)
        refused = check_either(child.ask(directory, method), directory)
        assert refused or value not in WRONG, f"{field}={value!r} is honoured"
        if refused:
            count("hostile files refused")


# Files that something has damaged, at random.

TOKENS = [b"-1", b"1e999", b"null", b"true", b"[]", b"{}", b'"', b"\\", b"\x00", b"\xff", b"9" * 20, b'"r": 4,', b"NaN"]


def damaged(chance, contents, name):
    """The content of one of the files with bits flipped, bytes taken out, put in, moved or taken from another file."""
    data = bytearray(contents[name])
    header = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else len(data)
    end = chance.choice([header, len(data)])  # half of the damage is to what is parsed
    kind = chance.choice(["flip", "cut", "drop", "repeat", "zero", "token", "splice", "swap"])
    at = chance.randrange(max(end, 1))
    length = min(chance.choice([1, 2, 7, 64, 500]), len(data) - at)
    if kind == "flip":
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "drop":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "zero":
        data[at : at + length] = bytes(length)
    elif kind == "token":
        data[at : at + chance.choice([0, 1, length])] = chance.choice(TOKENS)
    elif kind == "splice":
        other = contents[chance.choice(sorted(contents))]
        start = chance.randrange(len(other))
        data[at : at + chance.choice([0, length])] = other[start : start + length]
    else:
        there = chance.randrange(max(end, 1))
        data[at], data[there] = data[there], data[at]
    return bytes(data)


@pytest.mark.parametrize("method", SOUND)
def test_files_that_are_damaged_at_random(child, directory, method):
    chance = random.Random(f"damage of {method}")
    contents = sound(method)
    refused = loaded = 0
    for _ in range(how_many(12, 600)):
        shutil.rmtree(directory, ignore_errors=True)
        lay_out(directory, method)
        for name in chance.sample(sorted(contents), chance.choice([1, 1, 1, 2])):
            (directory / name).write_bytes(damaged(chance, contents, name))
        if check_either(child.ask(directory, method), directory):
            refused += 1
        else:
            loaded += 1
        count("byte flips survived")
    assert refused > loaded


def test_a_pickle_is_what_it_would_have_been(tmp_path):
    """That the mines are live: who opens one makes a directory."""
    lay_out(tmp_path / "adapter", "lora")
    mined(tmp_path / "adapter")
    pickle.loads((tmp_path / "adapter" / "adapter_model.bin").read_bytes())
    assert (tmp_path / "adapter" / "owned").is_dir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [("changes a bit", "lm_head.weight"), ("takes 300 megabytes", "< 200"), ("takes 2.5 seconds", "< 1.0")],
)
def test_what_is_measured_is_measured(child, directory, spoil, words):
    assert spoil in SPOILS
    lay_out(directory, "lora")
    with pytest.raises(AssertionError, match=words):
        check_refused(child.ask(directory, "lora", spoil), directory)


@pytest.mark.parametrize("deed", DEEDS)
def test_the_watch_sees_each_deed(tmp_path, child, deed):
    """The proof that it is not blind; for one deed the process ends, as it does when a pickle is opened."""
    lay_out(tmp_path / "adapter", "lora")
    mined(tmp_path / "adapter")
    (tmp_path / "adapter-evil").touch()
    if deed == "unpickles a file":
        with pytest.raises(pytest.fail.Exception, match="a pickle was opened"):
            child.ask(tmp_path / "adapter", "lora", deed)
    else:
        answer = child.ask(tmp_path / "adapter", "lora", deed)
        assert answer["events"], answer
