"""An adapter and a model of another name: HF peft loads it and says nothing; here it is said, once."""

import json
import warnings

import pytest
import torch

import fastpeft
from fastpeft.restoring import restore_adapter
from tests.counting import count, how_many
from tests.hostile import CONFIG, SIDE, lay_out
from tests.models import differences, snapshot, tiny

BASE = "somebody/Some-Model-7B"
WORDS = "was trained on 'somebody/Some-Model-7B', and this model is {!r}"
SAME = [
    BASE,
    "another/Some-Model-7B",
    "somebody/some-model-7b",
    "/data/models/Some-Model-7B/",
    "./Some-Model-7B/.",
    r"C:\models\Some-Model-7B",
    "/home/somebody/.cache/huggingface/hub/models--somebody--Some-Model-7B/snapshots/0123abcd",
    "models--Some-Model-7B/snapshots/main/",
]
NAMELESS = ["", ".", "..", "/", "../..", None, 7]
OTHERS = ["somebody/Some-Model-8B", "/data/Some-Model-7B/checkpoint-5", "hub/models--a--other/snapshots/Some-Model-7B"]


@pytest.fixture
def directory(tmp_path):
    """A LoRA adapter that was trained on BASE."""
    path = tmp_path / "adapter"
    lay_out(path, "lora")
    return path


def says(directory, base):
    written = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps({**written, "base_model_name_or_path": base}))


def called(name, model=None):
    model = tiny() if model is None else model
    model.name_or_path = name
    return model


def said(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [(str(each.message), each.filename) for each in caught]


@pytest.mark.parametrize("name", SAME + NAMELESS)
def test_the_same_model_under_any_path_and_one_without_a_name_are_none(directory, name):
    says(directory, BASE)
    assert said(lambda: fastpeft.load_adapter(called(name), directory)) == []
    if name != 7:  # which the configuration may not hold
        says(directory, name)
        assert said(lambda: fastpeft.load_adapter(called(BASE), directory)) == []


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_that_it_fits_is_a_warning_with_both_names(directory, name):
    says(directory, BASE)
    model = called(name)
    ((text, file),) = said(lambda: fastpeft.load_adapter(model, directory))
    assert text.startswith(f"{directory}: the adapter {WORDS.format(name)};") and file == __file__
    named = called(BASE)
    fastpeft.load_adapter(named, directory)
    mine, theirs = (fastpeft.adapter_state_dict(each, "default") for each in (model, named))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert model.peft_config["default"].base_model_name_or_path == BASE


@pytest.mark.parametrize("verb", ["beside", "restore", "hotswap"])
def test_every_way_to_load_warns_once(directory, verb):
    says(directory, BASE)
    model = fastpeft.load_adapter(called(BASE), directory)
    called("a/b", model)
    acts = {
        "beside": lambda: fastpeft.load_adapter(model, directory, adapter_name="other"),
        "restore": lambda: restore_adapter(model, directory),
        "hotswap": lambda: fastpeft.hotswap_adapter(model, directory),
    }
    ((text, file),) = said(acts[verb])
    assert WORDS.format("a/b") in text and file == __file__


def test_peft_says_nothing(directory):
    import peft

    says(directory, BASE)
    texts = said(lambda: peft.PeftModel.from_pretrained(called("a/b"), directory))
    assert not [text for text, _ in texts if BASE in text or "base" in text]


def test_a_warning_that_is_an_error_changes_nothing(directory):
    says(directory, BASE)
    model = called("a/b")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is it the right base model"):
            fastpeft.load_adapter(model, directory)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("family", "change", "error"),
    [
        ("llama", {"r": 8}, fastpeft.AdapterFileError),
        ("gpt2", {}, fastpeft.TargetError),
        ("bert", {"target_modules": ["query"], "task_type": None}, fastpeft.AdapterFileError),
    ],
)
def test_another_model_that_it_does_not_fit_is_an_error_with_both_names(directory, family, change, error):
    (directory / SIDE).unlink()
    says(directory, BASE)
    written = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps({**written, **change}))
    model = called("a/b", tiny(family))
    before = snapshot(model)
    with pytest.raises(error) as caught:
        fastpeft.load_adapter(model, directory)
    assert str(caught.value).count(WORDS.format("a/b")) == 1
    assert differences(before, snapshot(model)) == []
    with pytest.raises(error) as caught:
        fastpeft.load_adapter(called("", model), directory)
    assert "was trained on" not in str(caught.value)
    count("hostile files refused")


def test_long_names_stay_short(directory):
    says(directory, "x" * 100_000)
    ((text, _),) = said(lambda: fastpeft.load_adapter(called("y" * 100_000 + "\x1b[31m"), directory))
    assert len(text) < 1000 and text.isprintable()


class Experts(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(number))


def test_a_model_of_many_modules_has_as_many_tensors(tmp_path):
    """More than any small model may have; in full, as many as 50,000 experts have."""
    number = how_many(1_100, 50_001)
    config = fastpeft.LoraConfig(r=1, target_modules=r"experts\.\d+")
    model = fastpeft.patch(Experts(number), config)
    fastpeft.save_adapter(model, tmp_path)
    again = fastpeft.load_adapter(Experts(number), tmp_path)
    mine, theirs = (fastpeft.adapter_state_dict(each, "default") for each in (model, again))
    assert len(theirs) == 2 * number and all(torch.equal(mine[key], theirs[key]) for key in mine)
    with pytest.raises(fastpeft.AdapterFileError, match=f"more than 2000 tensors, {2 * number}|the limit is 1000000"):
        fastpeft.load_adapter(Experts(3), tmp_path)
