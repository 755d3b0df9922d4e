"""Error texts stay short, whatever stands in them: names, paths and values from outside are cut."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft.errors import FastpeftError
from tests.error_recording import LONGEST
from tests.models import tiny
from tests.test_error_triggers import lora, patched

LONG = "a" * 800  # that names of tensors may have; longer ones are refused for that
HUGE = "a" * 20_000
LIST = [f"{number}{'b' * 200}" for number in range(500)]


def file_with(path, change=None, **fields):
    """An adapter's directory, of which `change` has changed the tensors, and the configuration has other fields."""
    fastpeft.save_adapter(patched(), path)
    weights = path / "adapter_model.safetensors"
    if change is not None:
        save_file(change(load_file(weights)), weights)
    values = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**values, **fields}))
    (path / "fastpeft.json").unlink()
    return path


def more(tensors):
    return {**tensors, **{f"{LONG}{number}": torch.zeros(2) for number in range(40)}}


def others(tensors):
    return {f"{LONG}{number}": torch.zeros(2) for number in range(40)}


CALLS = {
    "tensors besides": lambda path: fastpeft.load_adapter(tiny(), file_with(path, more)),
    "other tensors": lambda path: fastpeft.load_adapter(tiny(), file_with(path, others)),
    "a tensor's name": lambda path: fastpeft.load_adapter(tiny(), file_with(path, lambda t: {HUGE: torch.zeros(2)})),
    "a field's name": lambda path: fastpeft.load_adapter(tiny(), file_with(path, **{HUGE: 1})),
    "names of fields": lambda path: fastpeft.load_adapter(tiny(), file_with(path, **dict.fromkeys(LIST, 1))),
    "a method": lambda path: fastpeft.load_adapter(tiny(), file_with(path, peft_type=HUGE)),
    "a task": lambda path: fastpeft.load_adapter(tiny(), file_with(path, task_type=HUGE)),
    "a base model": lambda path: fastpeft.AutoPeftModelForCausalLM.from_pretrained(
        file_with(path, task_type="CAUSAL_LM", base_model_name_or_path="", auto_mapping={"a": HUGE})
    ),
    "an automatic class": lambda path: fastpeft.AutoPeftModel.from_pretrained(
        file_with(path, base_model_name_or_path="x", auto_mapping={"base_model_class": HUGE})
    ),
    "targets": lambda path: fastpeft.load_adapter(tiny(), file_with(path, target_modules=LIST)),
    "a target": lambda path: fastpeft.load_adapter(tiny(), file_with(path, target_modules=[HUGE])),
    "modules to save": lambda path: fastpeft.load_adapter(tiny(), file_with(path, modules_to_save=LIST)),
    "a rank": lambda path: fastpeft.load_adapter(tiny(), file_with(path, r=HUGE)),
    "a pattern's rank": lambda path: fastpeft.load_adapter(tiny(), file_with(path, rank_pattern={HUGE[:900]: "x"})),
    "layers": lambda path: fastpeft.load_adapter(tiny(), file_with(path, layers_to_transform=list(range(9, 9999)))),
    "a list of layers": lambda path: fastpeft.load_adapter(
        tiny(), file_with(path, layers_to_transform=[0], layers_pattern=[HUGE[:900]])
    ),
    "an adapter's name": lambda path: fastpeft.load_adapter(tiny(), file_with(path), adapter_name=HUGE),
    "a name that is none": lambda path: patched().set_adapter(HUGE),
    "names that are none": lambda path: patched().set_adapter(LIST),
    "a name to delete": lambda path: patched().delete_adapter(HUGE),
    "a flag": lambda path: fastpeft.patch(tiny(), lora(), hf_quirks=HUGE),
    "a backend": lambda path: fastpeft.patch(tiny(), lora(), backend=HUGE),
    "a combination": lambda path: fastpeft.add_weighted_adapter(patched(), ["default"], [1.0], "b", HUGE),
    "weights": lambda path: fastpeft.add_weighted_adapter(patched(), ["default"], [float("nan")] * 9999, "b"),
    "a directory": lambda path: fastpeft.load_adapter(tiny(), "\0" + HUGE),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_error_is_short(name, tmp_path):
    with pytest.raises(FastpeftError) as caught:
        CALLS[name](tmp_path)
    assert len(str(caught.value)) <= LONGEST, str(caught.value)[:300]
