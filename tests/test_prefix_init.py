"""A prefix made of a text continues it as the base model does; the same table as HF peft's helpers make."""

import pytest
import torch

import fastpeft
from tests.models import VOCABULARY, tiny
from tests.peft_pair import quietly

DECODERS = ("llama", "qwen3", "gemma3", "gpt2", "bloom", "opt", "gpt_neox", "mistral", "mixtral", "phi")
LENGTH = 6


class Tokens:
    """Stands in for a tokenizer: a text is the numbers of its tokens."""

    chat_template = None

    def __call__(self, text, return_tensors, **options):
        return {"input_ids": torch.tensor([[int(number) for number in text.split()]])}


def ids(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def patched(family: str, **settings):
    config = fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **settings)
    return fastpeft.patch(tiny(family), config).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix_of_a_text_continues_it(family):
    base, model = tiny(family), patched(family)
    text, rest = ids(LENGTH), ids(5, seed=4)
    before = model(input_ids=rest).logits
    fastpeft.initialize_kv_prefix_from_text(model, Tokens(), text=" ".join(map(str, text[0].tolist())))
    found, expected = model(input_ids=rest).logits, base(input_ids=torch.cat((text, rest), 1)).logits[:, LENGTH:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (found - before).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_table_is_peft_s(family):
    import peft
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    text = ids(LENGTH + 3)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    hf, ours = quietly(peft.get_peft_model, tiny(family), config), patched(family)
    cache = tiny(family)(input_ids=text, use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    expected = initialize_kv_prefix_from_past_key_values(hf, past_key_values=pairs)
    found = fastpeft.initialize_kv_prefix_from_past_key_values(ours, past_key_values=cache)
    assert torch.equal(found, expected)
    assert torch.equal(ours.prompt_encoder["default"].table(), hf.prompt_encoder["default"].embedding.weight)


@torch.no_grad()
def test_a_cache_of_a_decoder_goes_where_its_layers_look():
    config = fastpeft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    model, base = fastpeft.patch(tiny("t5", "SEQ_2_SEQ_LM"), config).eval(), tiny("t5", "SEQ_2_SEQ_LM")
    source, target = ids(7), ids(8, seed=4)
    cache = base(input_ids=source, decoder_input_ids=target[:, :3], use_cache=True).past_key_values
    with pytest.raises(fastpeft.ConfigError, match="its prefix is the decoder's"):
        fastpeft.initialize_kv_prefix_from_text(model, Tokens(), text="1 2 3 4")
    fastpeft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    # Two layers share a prefix in HF's layout (their blocks are counted around), so only the last one written is right.
    encoder, last = model.prompt_encoder["default"], cache.self_attention_cache.layers[-1]
    keys, _ = encoder.blocks(0, 1)
    assert torch.equal(keys, last.keys[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m: fastpeft.initialize_kv_prefix_from_text(m, Tokens(), text="4 5"),
            "2 tokens, and adapter 'default' has 6",
        ),
        (lambda m: fastpeft.initialize_kv_prefix_from_past_key_values(m, past_key_values=None), "NoneType"),
        (lambda m: fastpeft.initialize_kv_prefix_from_past_key_values(m, past_key_values=[]), "list without keys"),
        (
            lambda m: fastpeft.initialize_kv_prefix_from_past_key_values(
                m, past_key_values=[(torch.ones(1, 2, 4, 8),) * 2] * 2
            ),
            "layer 0 has 4 tokens, num_virtual_tokens is 6",
        ),
        (
            lambda m: fastpeft.initialize_kv_prefix_from_past_key_values(
                m, past_key_values=[(torch.ones(3, 2, 9, 8),) * 2] * 2
            ),
            "of one sequence",
        ),
        (
            lambda m: fastpeft.initialize_kv_prefix_from_past_key_values(
                m, past_key_values=[(torch.ones(1, 2, 9, 8),) * 2] * 3
            ),
            "is the cache of another model",
        ),
        (
            lambda m: fastpeft.initialize_kv_prefix_from_past_key_values(
                m, past_key_values=[(torch.ones(1, 2, 9, 8),) * 2] * 2, num_virtual_tokens=5
            ),
            "num_virtual_tokens=5",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(call, words):
    model = patched("llama")
    before = model.prompt_encoder["default"].table().detach().clone()
    with pytest.raises(fastpeft.FastpeftError, match=words):
        call(model)
    assert torch.equal(model.prompt_encoder["default"].table(), before)


def test_only_a_table_can_be_set():
    with pytest.raises(fastpeft.ConfigError, match="prefix_projection=True"):
        fastpeft.initialize_kv_prefix_from_text(patched("llama", prefix_projection=True), Tokens(), text="4 5")
    lora = fastpeft.patch(tiny("llama"), fastpeft.LoraConfig())
    with pytest.raises(fastpeft.PatchError, match="'default' is LORA"):
        fastpeft.initialize_kv_prefix_from_text(lora, Tokens(), text="4 5")
