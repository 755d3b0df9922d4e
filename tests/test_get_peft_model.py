"""`fastpeft.get_peft_model`: peft's PeftModel, patched, where peft is installed; else the natively patched model."""

import importlib.util

import pytest
import torch

import fastpeft
from fastpeft import LoraConfig, TaskType, get_peft_model
from tests.models import batch, tiny

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")

CONFIGS = {
    "lora": {"kind": "LoraConfig", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
    "adalora": {"kind": "AdaLoraConfig", "total_step": 9, "target_modules": ["q_proj"]},
    "prefix": {"kind": "PrefixTuningConfig", "num_virtual_tokens": 3},
    "prompt": {"kind": "PromptTuningConfig", "num_virtual_tokens": 3},
    "p-tuning": {"kind": "PromptEncoderConfig", "num_virtual_tokens": 3},
    "adapter": {"kind": "AdaptionPromptConfig", "adapter_len": 3, "adapter_layers": 2},
}


def config(library, name):
    settings = dict(CONFIGS[name])
    return getattr(library, settings.pop("kind"))(task_type="CAUSAL_LM", **settings)


@pytest.fixture
def without_peft(monkeypatch):
    """As where peft is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find(name, *args))


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_peft_s_model_of_the_same_start(name, capsys):
    models = []
    for library, wrap in ((peft, peft.get_peft_model), (fastpeft, get_peft_model)):
        torch.manual_seed(11)
        models.append(wrap(tiny(), config(library, name)))
    theirs, ours = models
    assert type(theirs) in type(ours).__mro__ and isinstance(ours, peft.PeftModelForCausalLM)
    assert type(ours.peft_config["default"]) is type(theirs.peft_config["default"])
    for (found, mine), (expected, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert found == expected and mine.requires_grad == other.requires_grad
        assert torch.equal(mine, other), found
    for model in models:
        model.print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert fastpeft.report(ours).layers


@pytest.mark.parametrize("name", CONFIGS)
def test_without_peft_it_is_the_model_itself(name, without_peft, tmp_path):
    base = tiny()
    model = get_peft_model(base, config(fastpeft, name), adapter_name="mine", autocast_adapter_dtype=False)
    assert model is base and list(model.peft_config) == ["mine"]
    model(**batch()).loss.backward()
    model.print_trainable_parameters()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "mine" / "adapter_model.safetensors").exists()


def test_peft_s_arguments_mean_what_they_mean_there():
    given = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(
        tiny(dtype=torch.bfloat16), peft_config=given, adapter_name="x", autocast_adapter_dtype=False
    )
    assert model.active_adapters == ["x"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    mixed = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    assert isinstance(mixed, peft.PeftMixedModel) and fastpeft.report(mixed).layers
    by_dict = get_peft_model(tiny(), {"peft_type": "LORA", "r": 2, "task_type": TaskType.CAUSAL_LM})
    assert by_dict.peft_config["default"].r == 2


def test_bad_calls_are_refused_with_the_model_as_it_was(without_peft, monkeypatch):
    model, given = tiny(), LoraConfig(r=4, target_modules=["q_proj"])
    names = [name for name, _ in model.named_parameters()]
    calls = {
        "one configuration": lambda: get_peft_model(model),
        "one configuration is": lambda: get_peft_model(model, given, peft_config=given),
        "mixed=True": lambda: get_peft_model(model, given, mixed=True),
    }
    for words, call in calls.items():
        with pytest.raises(fastpeft.ConfigError, match=words):
            call()
    monkeypatch.undo()
    with pytest.raises(fastpeft.ConfigError, match="prefix_window='pin': peft has no such option"):
        get_peft_model(
            model, fastpeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", prefix_window="pin")
        )
    with pytest.raises(fastpeft.BackendError, match="unknown backend 'tritn'"):
        get_peft_model(model, given, backend="tritn")
    assert [name for name, _ in model.named_parameters()] == names
