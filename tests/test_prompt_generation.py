"""Generation with a prompt in front: the tokens of step-by-step argmax by every way, and of each row alone."""

import functools

import pytest
import torch

import fastpeft
from tests.models import _DECODER, MORE_FAMILIES, VOCABULARY, tiny
from tests.prefix_pair import DECODERS, SEQ2SEQ, task_of
from tests.prompt_pair import LENGTH, oracle, prompted, rows_of, with_prompt
from tests.test_prefix_generation import INPUTS, NEW, generate, prompts, unpadded

EVERY = (*DECODERS, "xglm")


@functools.cache
def strong(family: str, method: str = "prompt"):
    """Shared by the tests of this file, which do not change it. The prompt is strong, so that it decides on tokens."""
    model = prompted(family, task_of(family) if family != "t5-wide" else "SEQ_2_SEQ_LM", method)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(4)
    return model


@functools.cache
def greedy(family: str, inputs: str = "plain") -> torch.Tensor:
    """The tokens of `strong`, which many tests compare with."""
    return generate(strong(family), **INPUTS[inputs]())


@torch.no_grad()
def argmax_by_steps(model, inputs: dict, given: bool = True, steps: int = NEW) -> torch.Tensor:
    """Greedy generation with a whole forward pass for each token and no cache; of the oracle, if it is given virtual
    tokens already."""
    inputs = dict(inputs)
    for _ in range(steps):
        logits = model(**inputs, use_cache=False).logits[:, -1, :VOCABULARY].clone()
        logits[:, 2] = -torch.inf  # the end of the sequence, which `min_new_tokens` forbids
        inputs["input_ids"] = torch.cat((inputs["input_ids"], logits.argmax(-1, keepdim=True)), 1)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        if "position_ids" in inputs:
            inputs["position_ids"] = torch.cat((inputs["position_ids"], inputs["position_ids"][:, -1:] + 1), 1)
    return inputs["input_ids"]


@pytest.mark.parametrize("family", EVERY)
def test_every_way_is_one(family):
    """Greedy tokens by a cache, without one, from embeddings; and logits of chunks and single tokens."""
    ours, inputs = strong(family), unpadded()
    ids = inputs["input_ids"]
    model = oracle(family, "CAUSAL_LM", rows_of(ours))
    expected = argmax_by_steps(model, with_prompt(inputs))[:, LENGTH:]
    assert torch.equal(argmax_by_steps(ours, inputs), expected)
    assert torch.equal(greedy(family), expected)
    assert torch.equal(generate(ours, **inputs, use_cache=False), expected)
    assert torch.equal(generate(ours, input_ids=ids), expected)
    embeds = ours.get_input_embeddings()(ids).detach()
    by_embeds = generate(ours, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(by_embeds, expected[:, -by_embeds.shape[1] :]) and by_embeds.shape[1] >= NEW
    with torch.no_grad():
        whole = ours(input_ids=expected, use_cache=False).logits
        bound = 2e-6 * float(whole.abs().max())
        for sizes in ([4] + [1] * 10, [5, 9], [1, 6, 7], [14]):
            parts, cache = [], None
            for chunk in expected.split(sizes, 1):
                out = ours(input_ids=chunk, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            assert (torch.cat(parts, 1) - whole).abs().max() <= bound, sizes


# In transformers Falcon with ALiBi takes no static cache, and GPT-Neo gives other tokens with one, prompt or not.
STATIC = [family for family in EVERY if family not in ("falcon-alibi", "gpt_neo")]


@pytest.mark.parametrize("family", STATIC)
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(family):
    ours = strong(family)
    for name, inputs in INPUTS.items():
        assert torch.equal(generate(ours, **inputs(), cache_implementation="static"), greedy(family, name))
    assert torch.equal(generate(ours, **unpadded()), greedy(family))  # nothing of it has stayed behind


COUNTING = ("mistral", "gemma2", "gemma3", "cohere2", "starcoder2", "gpt_oss", "gpt_neo", "mpt", "codegen")


@pytest.mark.parametrize("family", [family for family in EVERY if family not in COUNTING])
def test_left_padding_changes_nothing(family):
    """A padded row gives the tokens of the same row alone; but for windows, which slide over padding too."""
    ours, inputs = strong(family), prompts()
    together = greedy(family, "padded")
    without = generate(ours, **inputs, use_cache=False)
    assert torch.equal(without, together)
    for row, begin in enumerate((3, 1, 0)):
        alone = generate(ours, input_ids=inputs["input_ids"][row : row + 1, begin:])
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("family", EVERY)
def test_a_padded_batch_is_the_oracles(family):
    ours, inputs = strong(family), prompts()
    fed = with_prompt(inputs)
    model = oracle(family, "CAUSAL_LM", rows_of(ours))
    expected = generate(model, **fed)
    assert torch.equal(greedy(family, "padded")[:, -NEW:], expected[:, -NEW:])
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(ours, **inputs, **options)[:, -NEW:], generate(model, **fed, **options)[:, -NEW:])


@pytest.mark.parametrize("family", [*SEQ2SEQ, "t5-wide"])
def test_an_encoder_and_a_decoder(family):
    ours, inputs = strong(family), prompts()
    model = oracle(family, "SEQ_2_SEQ_LM", rows_of(ours))
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
        assert torch.equal(generate(ours, **inputs, **options), generate(model, **with_prompt(inputs), **options))
    assert torch.equal(generate(ours, **inputs, cache_implementation="static"), greedy(family, "padded"))
    assert torch.equal(generate(ours, input_ids=unpadded()["input_ids"]), greedy(family))
    encoded = ours.get_encoder()(**inputs)
    by_states = generate(ours, encoder_outputs=encoded, attention_mask=inputs["attention_mask"])
    assert torch.equal(by_states, greedy(family, "padded"))
    embeds = ours.get_encoder().get_input_embeddings()(inputs["input_ids"]).detach()
    by_embeds = generate(ours, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(by_embeds, greedy(family, "padded"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3", "opt"])
def test_a_cache_is_continued(family):
    ours = strong(family)
    for inputs in (unpadded(), prompts()):
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        first = ours.generate(**inputs, **options)
        more = first.sequences.new_full((len(first.sequences), 1), 9)
        ids = torch.cat((first.sequences, more), 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        continued = generate(ours, input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values)
        assert torch.equal(continued, generate(ours, input_ids=ids, attention_mask=mask))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_guessed_tokens_change_nothing(family):
    """Assisted generation takes back from the cache what was guessed wrongly."""
    ours, inputs = strong(family), {key: value[1:2] for key, value in unpadded().items()}
    expected = generate(ours, **inputs)
    assert torch.equal(generate(ours, **inputs, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(ours, **inputs, assistant_model=tiny(family)), expected)
    assert torch.equal(generate(ours, **inputs, prefill_chunk_size=4), expected)


@pytest.mark.parametrize("method", ["mlp", "lstm"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_p_tuning_generates(family, method):
    ours, inputs = strong(family, method), prompts()
    model = oracle(family, ours.peft_config["default"].task_type.value, rows_of(ours))
    assert torch.equal(generate(ours, **inputs)[:, -NEW:], generate(model, **with_prompt(inputs))[:, -NEW:])


def test_sampling_draws_as_the_oracle_does():
    ours, inputs = strong("llama"), prompts()
    options = {"do_sample": True, "top_k": 20, "temperature": 0.7}
    expected = generate(oracle("llama", "CAUSAL_LM", rows_of(ours)), **with_prompt(inputs), **options)
    assert torch.equal(generate(ours, **inputs, **options)[:, -NEW:], expected[:, -NEW:])


def test_scores_and_a_limit_of_length_are_of_tokens():
    ours, inputs = strong("llama"), unpadded()
    found = ours.generate(
        **inputs, max_length=10, do_sample=False, output_scores=True, output_hidden_states=True,
        return_dict_in_generate=True, min_length=10,
    )  # fmt: skip
    assert found.sequences.shape == (2, 10) and len(found.scores) == 4
    assert [each[1].shape[1] for each in found.hidden_states] == [6, 1, 1, 1]


_STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
RECURRENT = {  # whose caches hold states, beside keys and values or alone
    "mamba": {**_STATES, "state_size": 4, "bos_token_id": 1, "eos_token_id": 2},
    "rwkv": {**_STATES, "attention_hidden_size": 32, "context_length": 64, "bos_token_id": 1, "eos_token_id": 2},
    "lfm2": _DECODER,
    "jamba": {**_DECODER, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_states_know_of_the_prompt(family, monkeypatch):
    monkeypatch.setitem(MORE_FAMILIES, family, (family, RECURRENT[family]))
    heads = {"num_attention_heads": 4} if family in ("mamba", "rwkv") else {}  # which they have none of
    ours = prompted(family, "CAUSAL_LM", **heads)
    model = oracle(family, "CAUSAL_LM", rows_of(ours))
    for inputs in (unpadded(), prompts()):
        assert torch.equal(generate(ours, **inputs)[:, -NEW:], generate(model, **with_prompt(inputs))[:, -NEW:])


# Models that see.

PICTURE = 2  # the token in whose place a part of a picture stands


def seeing(family: str) -> torch.nn.Module:
    import transformers

    text = {key: value for key, value in tiny().config.to_dict().items() if key in _DECODER}
    if family == "llava":
        sight = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        vision = transformers.CLIPVisionConfig(**sight, image_size=8, patch_size=4, projection_dim=16)
        config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**text))
        config.image_token_id = PICTURE
        kind = transformers.LlavaForConditionalGeneration
    else:
        turns = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        sight = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "mlp_ratio": 1}
        config = transformers.Qwen2VLConfig(text_config={**text, "rope_parameters": turns}, vision_config=sight)
        kind = transformers.Qwen2VLForConditionalGeneration
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_models_that_see(family):
    """LLaVA finds by an id where its picture goes; Qwen2-VL counts positions of text and of two sides of pictures."""
    inputs = prompts()
    if family == "llava":
        inputs["input_ids"][:, 3:] = torch.tensor([5, 7, 9, 8])
        inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([[PICTURE] * 4 + [11]] * 3)), 1)
        inputs["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones(3, 5, dtype=torch.int64)), 1)
        inputs["pixel_values"] = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = prompted("llama", base=seeing(family))
    model = oracle("llama", "CAUSAL_LM", rows_of(ours), seeing(family))
    with torch.no_grad():
        found, expected = ours(**inputs).logits[:, -1], model(**with_prompt(inputs)).logits[:, -1]
    torch.testing.assert_close(found, expected)
    tokens = generate(ours, **inputs)[:, -NEW:]
    assert torch.equal(tokens, generate(model, **with_prompt(inputs))[:, -NEW:])
    assert torch.equal(tokens, generate(ours, **inputs, use_cache=False)[:, -NEW:])


@torch.no_grad()
def test_without_the_prompt_it_is_the_base_model():
    """So that none of the above compares models that ignore their prompt."""
    same = []
    for family in (*EVERY, *SEQ2SEQ):
        ours, inputs, base = strong(family), unpadded(), tiny(family, task_of(family))
        with fastpeft.disable_adapter(ours):
            without = generate(ours, **inputs)
        assert torch.equal(without, generate(base, **inputs))
        same += [family] if torch.equal(without, greedy(family)) else []
        if family not in SEQ2SEQ:
            assert not torch.allclose(ours(**inputs).logits, base(**inputs).logits, rtol=1e-2)
    assert len(same) <= 15, same  # in most a few random rows decide on tokens
