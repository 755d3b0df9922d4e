"""The switch to our attention function, and what happens when somebody moves it."""

import pytest
import torch

import fastpeft
from tests.models import batch, tiny

SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16, "sparse_step": 0}


def patched(family="llama"):
    config = fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return fastpeft.patch(tiny(family), config).eval()


@torch.no_grad()
def test_another_implementation_after_patching_does_not_lose_the_prefix_silently():
    model, inputs = patched(), batch()
    model.set_attn_implementation("eager")
    with pytest.raises(fastpeft.PatchError, match="set to 'eager' after patching"):
        model(**inputs)
    with fastpeft.disable_adapter(model):
        base = tiny("llama")
        base.set_attn_implementation("eager")
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@torch.no_grad()
def test_a_model_that_shares_the_configuration_computes_what_it_did():
    base, inputs = tiny("llama"), batch()
    other = type(base)(base.config).eval()
    before = other(**inputs).logits
    fastpeft.patch(base, fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert torch.equal(other(**inputs).logits, before)
    fastpeft.unpatch(base)
    assert base.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_mask_of_numbers_for_mpt_is_not_read_the_wrong_way_round():
    model, inputs = patched("mpt"), batch()
    mask = inputs["attention_mask"]
    queries, least = mask.shape[1], torch.finfo(torch.float32).min
    hidden = torch.ones(queries, queries, dtype=torch.bool).triu(1)[None, None] | (mask[:, None, None] == 0)
    numbers = torch.zeros(hidden.shape).masked_fill(hidden, least)
    by_matrix = model(input_ids=inputs["input_ids"], attention_mask=numbers).logits
    by_vector = model(input_ids=inputs["input_ids"], attention_mask=mask).logits
    assert torch.equal(by_matrix[mask.bool()], by_vector[mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize("family", ["mpt", "gpt2", "llama", "bloom"])
def test_weights_of_attention_are_refused_at_the_model(family):
    model, ids = patched(family), batch()["input_ids"]
    with pytest.raises(fastpeft.PatchError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)
    with fastpeft.disable_adapter(model):
        model(input_ids=ids, output_attentions=True)


def test_more_virtual_tokens_than_a_table_has_positions():
    model = tiny("gpt2")
    with pytest.raises(fastpeft.ConfigError, match="transformer.wpe has 64 positions"):
        fastpeft.patch(model, fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=64))
    assert not hasattr(model, "peft_config")


def test_a_family_whose_own_code_wants_a_matrix_is_refused_by_name():
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = {f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in SIZES.items()}
    config = AutoConfig.for_model("nllb-moe", vocab_size=31, d_model=16, num_experts=2, **sizes)
    with pytest.raises(fastpeft.TargetError, match="NllbMoeForConditionalGeneration cannot carry a prefix"):
        fastpeft.patch(
            AutoModelForSeq2SeqLM.from_config(config),
            fastpeft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
        )
