"""A patched model on the meta device says what shapes it gives, as one of HF peft's does: nothing is computed or drawn
there, and every gradient has its shape."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft

KINDS = {
    "lora": dict(lora_dropout=0.1),
    "dora": dict(use_dora=True),
    "dora with dropout": dict(use_dora=True, lora_dropout=0.1),
    "bias": dict(lora_bias=True),
}


def llama() -> LlamaForCausalLM:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))


def shapes(model) -> dict[str, torch.Size]:
    """Of the logits, and of every gradient."""
    model = model.to("meta").train()
    for _ in range(2):  # layers that share their input are known after the first call
        logits = model(input_ids=torch.zeros(2, 5, dtype=torch.long, device="meta")).logits
        logits.sum().backward()
    assert logits.is_meta
    grads = {name: each.grad.shape for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": logits.shape} | {name.removeprefix("base_model.model."): shape for name, shape in grads.items()}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_the_meta_device_as_in_peft(kind, fused, autocast):
    options = dict(r=4, target_modules="all-linear", **KINDS[kind])
    patched = fastpeft.patch(llama(), fastpeft.LoraConfig(**options))
    if fused:
        fastpeft.fuse(patched)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = shapes(patched)
        theirs = shapes(peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options)))
    assert found == theirs and len(found) > 28


@pytest.mark.parametrize(
    "config",
    [
        fastpeft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10),
        fastpeft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_tuners_on_the_meta_device(config):
    found = shapes(fastpeft.patch(llama(), config))
    assert found.pop("logits") == (2, 5, 64) and found
