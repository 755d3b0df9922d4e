"""The method that CONTRIBUTING.md adds, (IA)³, has what every method has, beside HF peft's own."""

import peft
import pytest
import torch

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.new_tuner import Ia3Config
from tests.peft_pair import close, quietly, result

TARGETS = ["k_proj", "v_proj"]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The one entry; of a method of the package it stands in `fastpeft.configs`."""
    monkeypatch.setitem(fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING, "IA3", Ia3Config)


def adapted():
    model = fastpeft.patch(tiny(), Ia3Config(target_modules=TARGETS, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.rand_like(parameter))
    return model


def test_training_saving_and_loading_beside_peft(tmp_path):
    model = adapted()
    fastpeft.save_adapter(model, tmp_path)
    theirs = quietly(peft.get_peft_model, tiny(), peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]))
    quietly(peft.set_peft_model_state_dict, theirs, fastpeft.adapter_state_dict(model))
    close(result(model, batch()), result(theirs, batch()), 1e-6)
    for each in (model, theirs):
        result(each, batch()).square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(TARGETS)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".ia3_l." not in name)
        if parameter.grad is not None:
            close(parameter.grad, gradients[f"base_model.model.{name}"], 1e-6)
    loaded = fastpeft.load_adapter(tiny(), tmp_path)
    assert torch.equal(result(loaded, batch()), result(model, batch()))
    assert type(loaded.peft_config["default"]) is Ia3Config


def test_it_is_disabled_combined_deleted_and_taken_out():
    base = tiny()
    before, plain = snapshot(base), result(base, batch())
    model = fastpeft.patch(base, Ia3Config(target_modules=TARGETS, task_type="CAUSAL_LM"))
    assert torch.equal(result(model, batch()), plain)  # ones
    model.add_adapter("lora", fastpeft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("second", Ia3Config(target_modules=["o_proj"], task_type="CAUSAL_LM"))
    model.set_adapter(["default", "lora", "second"])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.5)
    assert not torch.allclose(result(model, batch()), plain)
    with model.disable_adapter():
        assert torch.equal(result(model, batch()), plain)
    assert "ScaledLinear" in str(fastpeft.report(model))
    model.delete_adapter("second")
    fastpeft.unpatch(model)
    assert not differences(before, snapshot(model))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, fastpeft.ConfigError, "target_modules=None: name the linear layers"),
        ({"target_modules": ["up_proj"], "feedforward_modules": ["up_proj"]}, fastpeft.ConfigError, "leave it empty"),
        ({"target_modules": ["norm"]}, fastpeft.TargetError, "norm is a LlamaRMSNorm"),
        ({"target_modules": ["none"]}, fastpeft.TargetError, "matches nothing in LlamaForCausalLM"),
    ],
    ids=["missing", "feedforward", "class", "nothing"],
)
def test_refusals_leave_the_model_as_it_was(settings, error, message):
    model = tiny()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fastpeft.patch(model, Ia3Config(**settings))
    assert not differences(before, snapshot(model))
