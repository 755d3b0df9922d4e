"""What LoRA on parameters (`target_parameters`) does not go with, in words, and without a trace."""

import pytest
import torch
from torch import nn

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.parameters_pair import EXPERTS, Outer, patched, settings_for


def integers() -> nn.Module:
    model = tiny("qwen3_moe")
    experts_ = model.model.layers[0].mlp.experts
    experts_.down_proj = nn.Parameter(experts_.down_proj.to(torch.int8), requires_grad=False)
    return model


def elsewhere() -> nn.Module:
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    return model


def on_meta() -> nn.Module:
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts.to("meta")
    return model


def empty() -> nn.Module:
    model = Outer()
    model.experts.up = nn.Parameter(torch.empty(0, 4, 6))
    return model


def odd() -> nn.Module:
    model = Outer()
    model.experts.up = nn.Parameter(torch.empty(1, 3, 4, 6))
    return model


def adapted() -> nn.Module:
    return patched("mixtral", target_parameters=["experts.down_proj"])


def whole() -> nn.Module:
    config = fastpeft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    return fastpeft.patch(tiny("mixtral"), config)


REFUSED = {
    "one dimension": (lambda: tiny("llama"), {"target_parameters": ["norm.weight"]}, "has 1 dimensions"),
    "four dimensions": (odd, {"target_parameters": ["up"]}, "has 4 dimensions"),
    "no elements": (empty, {"target_parameters": ["up"]}, "without elements"),
    "integers": (integers, {}, "down_proj is a Parameter of torch.int8"),
    "the meta device": (on_meta, {}, "is on the meta device, or offloaded"),
    "a part of the experts": (elsewhere, {}, "load without expert parallelism"),
    "a rank beyond all": (lambda: tiny("mixtral"), {"rank_pattern": {"down_proj": 70_000}}, "r=70000 for"),
    "a scaling beyond all": (lambda: tiny("mixtral"), {"alpha_pattern": {"down_proj": 1e6}}, "lower lora_alpha"),
    "a target's": (lambda: tiny("llama"), {"target_parameters": ["q_proj.weight"]}, "is in target_modules; choose one"),
    "trained whole": (lambda: tiny("mixtral"), {"modules_to_save": ["mlp"]}, "trained whole by modules_to_save"),
    "trained whole before": (whole, {}, "trained whole by modules_to_save"),
    "an adapter of its own": (
        lambda: fastpeft.patch(tiny("llama"), fastpeft.LoraConfig(target_modules=["k_proj"])),
        {"target_parameters": ["k_proj.weight"]},
        "carries an adapter of its own already",
    ),
    "other parameters": (adapted, {}, "and adapter 'default' has down_proj"),
    "nothing": (
        lambda: tiny("mixtral"),
        {"target_modules": [], "target_parameters": ["experts.gate_up_prok"]},
        "(model type 'mixtral'); give whole paths, or their ends; did you mean 'gate_up_proj'?",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_nothing_changed(case):
    build, more, words = REFUSED[case]
    model = build()
    before = snapshot(model)
    config = fastpeft.LoraConfig(**settings_for(**{"target_modules": ["q_proj"], **more}))
    with pytest.raises((fastpeft.TargetError, fastpeft.ConfigError)) as refusal:
        if "_fastpeft" in vars(model):
            model.add_adapter("other", config)
        else:
            fastpeft.patch(model, config)
    assert words in str(refusal.value)
    assert differences(before, snapshot(model)) == []


def test_calls_and_verbs_that_parameters_do_not_go_with(tmp_path):
    model = patched("mixtral")
    with pytest.raises(fastpeft.PatchError, match="adapts parameters"):
        model(**batch(), adapter_names=["default", "__base__"])
    with pytest.raises(fastpeft.PatchError, match="parameters are not added up"):
        fastpeft.add_weighted_adapter(model, ["default"], [1.0], "sum")
    fastpeft.save_adapter(model, tmp_path)
    with pytest.raises(fastpeft.ConfigError, match="parameters are not swapped"):
        fastpeft.hotswap_adapter(model, tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.lora_B["default"]["down_proj"].weight.fill_(torch.inf)
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    with pytest.raises(fastpeft.PatchError, match="would put NaN or Inf into down_proj"):
        fastpeft.merge(model)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, before)
    with pytest.raises(fastpeft.ConfigError, match="target_parameters=.*AdaLoRA adapts modules alone"):
        fastpeft.AdaLoraConfig(total_step=9, target_parameters=EXPERTS)


def test_a_parameter_that_its_module_does_not_read_is_refused():
    model = Outer()
    model.experts.unused = nn.Parameter(torch.randn(3, 4))
    fastpeft.patch(model, fastpeft.LoraConfig(target_modules=[], target_parameters=["unused"]))
    with pytest.raises(fastpeft.PatchError, match="LoraMixture has not read unused from itself"):
        model(torch.tensor([1]))
