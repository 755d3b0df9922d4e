"""peft's wrappers of experts (`target_parameters`) in a model that is patched: peft's names, files and verbs, and the
experts' arithmetic; what that does not know is left to peft."""

import copy

import pytest
import torch

import fastpeft
from tests.models import batch, tiny
from tests.parameters_pair import EXPERTS, FAMILIES, settings_for
from tests.peft_pair import close, quietly, result

INNER, OUTER = ".base_layer", ""


def by_peft(family: str, **more):
    import peft

    torch.manual_seed(1)
    return quietly(peft.get_peft_model, tiny(family), peft.LoraConfig(**settings_for(**more))).eval()


def step(model) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    return output.logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, other, rtol: float = 2e-5) -> None:
    (logits, grads), (expected_logits, expected) = step(model), step(other)
    close(logits, expected_logits, rtol)
    assert grads.keys() == expected.keys()
    for name, each in expected.items():
        close(grads[name], each, rtol)


def ops(model) -> dict[str, str]:
    """The op of each wrapper in the first layer, by the end of its path."""
    start = "base_model.model.model.layers.0.mlp.experts"
    return {each.path.removeprefix(start): each.op for each in fastpeft.report(model).layers if start in each.path}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_model_s_life(family):
    model, plain = by_peft(family), by_peft(family)
    fastpeft.patch(model)
    assert ops(model) == {INNER: "expert_lora_linear", OUTER: "expert_lora_linear"}
    assert_same_step(model, plain)
    for each in (model, plain):
        torch.manual_seed(2)
        each.add_adapter("two", copy.deepcopy(plain.peft_config["default"]))
        each.base_model.set_adapter(["default", "two"])
    assert_same_step(model, plain)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(result(model, batch()), result(plain, batch()))
    expected = result(model, batch())
    for each in (model, plain):
        quietly(each.merge_adapter)
    assert torch.equal(result(model, batch()), result(plain, batch()))
    model.unmerge_adapter()
    close(result(model, batch()), expected, 1e-5)
    kinds = {type(each) for each in plain.modules()}
    fastpeft.unpatch(model)
    assert {type(each) for each in model.modules()} == kinds
    close(result(model, batch()), expected, 1e-5)


def test_what_is_left_to_peft():
    import peft

    model, plain = (by_peft("qwen3_moe", target_parameters=[*EXPERTS, "gate.weight"]) for _ in range(2))
    fastpeft.patch(model)
    gate = next(each for each in fastpeft.report(model).layers if each.path.endswith("layers.0.mlp.gate"))
    assert gate.op == "peft's own forward" and "the forward of Qwen3MoeTopKRouter is not known" in gate.reason
    assert_same_step(model, plain)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    calls = []
    handle = wrapper.base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert "hooks on the experts" in next(e.reason for e in fastpeft.report(model).layers if "0.mlp.experts" in e.path)
    assert_same_step(model, plain)
    assert calls
    handle.remove()
    assert ops(model)[OUTER] == "expert_lora_linear"
    biases = by_peft("gpt_oss", target_parameters=[*EXPERTS, "experts.down_proj_bias"])
    fastpeft.patch(biases)
    reasons = {each.reason for each in fastpeft.report(biases).layers if each.path.endswith("mlp.experts")}
    assert reasons == {"down_proj_bias is not what the experts' products read"}
    assert_same_step(biases, by_peft("gpt_oss", target_parameters=[*EXPERTS, "experts.down_proj_bias"]))
    assert issubclass(type(wrapper), peft.tuners.lora.layer.ParamWrapper)
