"""What prefix tuning and LLaMA-Adapter cannot serve is refused before anything changes, by one of our own errors whose
words name the value, the place and the way out; and nothing takes a prefix away in silence."""

import pytest
import torch

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import quietly, result
from tests.prefix_pair import DECODERS, prefixed, real, settings_of, task_of


def refused(call, model, error, *words) -> None:
    """The call raises this error with all of these words, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        quietly(call)
    assert isinstance(caught.value, fastpeft.FastpeftError) and isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert differences(before, snapshot(model)) == []


CONFIG, TARGET, PATCH = fastpeft.ConfigError, fastpeft.TargetError, fastpeft.PatchError
PREFIXES = [
    ("llama", {"num_virtual_tokens": 0}, CONFIG, ("num_virtual_tokens=0", "at least 1")),
    ("llama", {"num_virtual_tokens": -4}, CONFIG, ("num_virtual_tokens=-4",)),
    ("llama", {"num_virtual_tokens": 2.5}, CONFIG, ("num_virtual_tokens=2.5", "int")),
    ("llama", {"num_virtual_tokens": True}, CONFIG, ("num_virtual_tokens=True",)),
    ("llama", {"num_virtual_tokens": "5"}, CONFIG, ("num_virtual_tokens='5'",)),
    ("llama", {"num_virtual_tokens": None}, CONFIG, ("num_virtual_tokens=None",)),
    ("llama", {"num_virtual_tokens": 10**12}, CONFIG, ("num_virtual_tokens=1000000000000", "at most")),
    ("llama", {"encoder_hidden_size": 0, "prefix_projection": True}, CONFIG, ("encoder_hidden_size=0",)),
    ("llama", {"prefix_projection": "yes"}, CONFIG, ("prefix_projection='yes'",)),
    ("llama", {"init_weights": "ones"}, CONFIG, ("init_weights='ones'", "zero")),
    ("llama", {"prefix_window": "both"}, CONFIG, ("prefix_window='both'", "pin")),
    # of another model
    ("llama", {"num_layers": 32}, CONFIG, ("num_layers=32", "this llama has 2")),
    ("llama", {"token_dim": 4096}, CONFIG, ("token_dim=4096", "this llama has 16")),
    ("gpt2", {"num_attention_heads": 3}, CONFIG, ("num_attention_heads=3", "this gpt2 has 4")),
    ("bloom", {"token_dim": 64}, CONFIG, ("token_dim=64", "this bloom has 32")),
    ("llama", {"num_transformer_submodules": 2}, CONFIG, ("num_transformer_submodules=2", "one stack")),
    ("bloom", {"legacy_bloom_layout": True}, CONFIG, ("legacy_bloom_layout=True", "leave it out")),
    ("bert", {"encoder_prefix": True}, CONFIG, ("encoder_prefix=True", "bert")),
    # of another task
    ("llama", {"task_type": "SEQ_2_SEQ_LM"}, CONFIG, ("task_type='SEQ_2_SEQ_LM'", "CAUSAL_LM")),
    ("t5", {"task_type": "CAUSAL_LM"}, CONFIG, ("task_type='CAUSAL_LM'", "SEQ_2_SEQ_LM")),
    ("llama", {"task_type": None}, CONFIG, ("task_type=None",)),
    ("llama", {"task_type": "CHAT"}, CONFIG, ("task_type='CHAT'",)),
    ("llama", {"modules_to_save": ["lm_hed"]}, TARGET, ("lm_hed", "lm_head")),
]


@pytest.mark.parametrize("form", ["config", "dict", "another adapter"])
@pytest.mark.parametrize(("family", "settings", "error", "words"), PREFIXES, ids=lambda value: str(value)[:40])
def test_a_prefix_that_does_not_fit(family, settings, error, words, form):
    settings = {**settings_of(family), **settings}
    model = prefixed(family) if form == "another adapter" else tiny(family, task_of(family)).train()
    if form == "dict":
        call = lambda: fastpeft.patch(model, {"peft_type": "PREFIX_TUNING", **settings})  # noqa: E731
    elif form == "config":
        call = lambda: fastpeft.patch(model, fastpeft.PrefixTuningConfig(**settings))  # noqa: E731
    else:
        call = lambda: model.add_adapter("b", fastpeft.PrefixTuningConfig(**settings))  # noqa: E731
    refused(call, model, error, *words)


PROMPTS = [
    ("llama", {"adapter_len": 0}, CONFIG, ("adapter_len=0", "at least 1")),
    ("llama", {"adapter_len": 10**12}, CONFIG, ("adapter_len=1000000000000", "at most")),
    ("llama", {"adapter_len": None}, CONFIG, ("adapter_len=None",)),
    ("llama", {"adapter_layers": 0}, CONFIG, ("adapter_layers=0",)),
    ("llama", {"adapter_layers": 3}, TARGET, ("adapter_layers=3", "has 2 attention modules")),
    ("llama", {"target_modules": "attn"}, TARGET, ("target_modules='attn'", "'self_attn'")),
    ("llama", {"target_modules": "model.layers"}, CONFIG, ("target_modules='model.layers'",)),
    ("llama", {"modules_to_save": ["lm_hed"]}, TARGET, ("lm_hed", "lm_head")),
    ("xglm", {}, TARGET, ("XGLMForCausalLM", "XGLMAttention")),
]


@pytest.mark.parametrize(("family", "settings", "error", "words"), PROMPTS, ids=lambda value: str(value)[:40])
def test_a_gated_prompt_that_does_not_fit(family, settings, error, words):
    settings = {"task_type": "CAUSAL_LM", "adapter_len": 3, "adapter_layers": 1, **settings}
    model = tiny(family)
    refused(lambda: fastpeft.patch(model, fastpeft.AdaptionPromptConfig(**settings)), model, error, *words)
    refused(lambda: fastpeft.patch(model, {"peft_type": "ADAPTION_PROMPT", **settings}), model, error, *words)


# Calls.

# The other models take (B, T) alone, and MPT's makes booleans of numbers before they are seen here.
MASKED = [family for family in DECODERS if family not in ("bloom", "falcon-alibi", "mpt", "opt")]


@pytest.mark.parametrize("family", MASKED)
def test_a_matrix_for_a_mask_is_over_the_real_tokens(family):
    """peft's has columns for the prefix, which is refused; of the right shape it does what the vector does."""
    model = prefixed(family)
    inputs = batch()
    inputs.pop("labels")
    rows, length = inputs["input_ids"].shape
    for shape in ((rows, 1, length, length + 5), (rows, 1, length + 1, length), (rows, 1, 1, length + 5)):
        wrong = {**inputs, "attention_mask": torch.zeros(shape)}
        with pytest.raises((fastpeft.FastpeftError, RuntimeError, ValueError), match="mask|size|shape"):
            model(**wrong)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & inputs["attention_mask"].bool()[:, None, None, :]
    expected = real(result(model, inputs), inputs)
    if getattr(model.config, "sliding_window", None) is None and family != "gpt_neo":
        least = torch.finfo(torch.float32).min
        numbers = torch.zeros(seen.shape).masked_fill(~seen, least)
        found = real(result(model, {**inputs, "attention_mask": numbers}), inputs)
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert torch.equal(real(result(model, inputs), inputs), expected)


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "codegen", "gpt_neo", "falcon", "bert", "t5"])
def test_the_weights_of_attention_cannot_be_had(family):
    model, inputs = prefixed(family), batch(task_of(family))
    expected = result(model, inputs)
    with pytest.raises(fastpeft.PatchError, match="output_attentions=True: .* never computed"):
        model(**inputs, output_attentions=True)
    with model.disable_adapter():
        model(**inputs, output_attentions=True)
    assert torch.equal(result(model, inputs), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "bloom"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_does_not_lose_the_prefix(family, implementation):
    model, inputs = prefixed(family), batch(task_of(family))
    expected = result(model, inputs)
    stack = model.decoder if family == "t5" else model
    quietly(stack.set_attn_implementation, implementation)
    if family == "bloom":  # which transformers leaves alone
        assert torch.equal(result(model, inputs), expected)
        return
    with pytest.raises(fastpeft.PatchError, match=f"set to '{implementation}' after patching"):
        result(model, inputs)
    fastpeft.unpatch(model)
    assert stack.config._attn_implementation == implementation
    result(model, inputs)


def test_a_table_of_positions_takes_no_second_adapter():
    model = prefixed("gpt2")
    config = fastpeft.LoraConfig(target_modules=["wpe", "c_attn"], r=2)
    refused(lambda: model.add_adapter("lora", config), model, TARGET, "transformer.wpe", "of another method")
    config = fastpeft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wpe"], r=2)
    refused(lambda: model.add_adapter("lora", config), model, TARGET, "transformer.wpe already carries an adapter")
    model.add_adapter("lora", fastpeft.LoraConfig(target_modules=["c_attn"], r=2))


def test_names_that_are_taken_or_unknown():
    model = prefixed()
    refused(lambda: model.add_adapter("default", fastpeft.PrefixTuningConfig(**settings_of("llama"))), model, PATCH)
    refused(lambda: model.set_adapter("other"), model, PATCH, "'other'", "'default'")
    refused(lambda: model.delete_adapter("other"), model, PATCH, "'other'")


def test_a_cache_of_pefts_is_a_past_like_any_other():
    """The prefix as peft puts it into the cache is P tokens of the past to us, before which ours stands."""
    from tests.prefix_pair import prefix_pair

    hf, ours = prefix_pair("llama")
    ids = batch()["input_ids"][:1]
    with torch.no_grad():
        past = hf.get_prompt(1)
        length = past.get_seq_length()
        found = ours(input_ids=ids, past_key_values=past).logits
        assert past.get_seq_length() == length + ids.shape[1]
        with ours.disable_adapter():
            without = ours(input_ids=ids, past_key_values=hf.get_prompt(1)).logits
        assert torch.allclose(without, hf(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(found, without)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "t5"])
def test_files_of_another_geometry_are_refused(family, tmp_path):
    model = prefixed(family)
    model.save_pretrained(tmp_path)
    base = tiny("bart" if family == "t5" else "gpt2" if family == "llama" else "llama", task_of(family))
    if family == "t5":  # otherwise of one geometry, as mistral is but for this
        base.config.d_model = 64
    elif family == "mistral":
        base.config.num_hidden_layers = 3
    refused(lambda: fastpeft.load_adapter(base, tmp_path), base, fastpeft.FastpeftError)
