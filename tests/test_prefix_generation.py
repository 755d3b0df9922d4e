"""Generation with a prefix: the tokens of Hugging Face peft where it is right, and those of step-by-step argmax where
it fails (static caches, use_cache=False, inputs_embeds, feeding a cache by hand)."""

import functools

import pytest
import torch

from tests.models import VOCABULARY, tiny
from tests.peft_pair import quietly
from tests.prefix_pair import DECODERS, SEQ2SEQ, prefix_pair, prefixed

NEW = 8
GENERATORS = (*DECODERS, *SEQ2SEQ)


def prompts(rows: int = 3, length: int = 7) -> dict:
    """The first two rows are padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def unpadded(rows: int = 2, length: int = 6) -> dict:
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(8))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def generate(model, seed: int = 3, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    return quietly(model.generate, **options)


@functools.cache
def pair(family: str):
    """Shared by the tests of this file, which do not change it. The prefix is strong, so that it decides on tokens."""
    models = prefix_pair(family)
    with torch.no_grad():
        for model in models:
            model.prompt_encoder["default"].embedding.weight.mul_(4)
    return models


INPUTS = {"padded": prompts, "plain": unpadded}


@functools.cache
def greedy(family: str, inputs: str = "plain") -> torch.Tensor:
    """Our tokens of `pair`, which many tests compare with."""
    return generate(pair(family)[1], **INPUTS[inputs]())


MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.7},
}


@pytest.mark.parametrize("family", GENERATORS)
def test_tokens_are_those_of_peft(family):
    hf, ours = pair(family)
    inputs = prompts()
    for name, options in MODES.items():
        found = generate(ours, **inputs, **options) if options else greedy(family, "padded")
        assert torch.equal(found, generate(hf, **inputs, **options)), name
    assert torch.equal(greedy(family), generate(hf, **unpadded()))
    # without a cache everything is computed anew for each token, which must come to the same
    assert torch.equal(generate(ours, **inputs, use_cache=False), greedy(family, "padded"))


@torch.no_grad()
def argmax_by_steps(model, ids: torch.Tensor) -> torch.Tensor:
    """Greedy generation of unpadded prompts, with a whole forward pass for each token and no cache."""
    for _ in range(NEW):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # the end of the sequence, which `min_new_tokens` forbids
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize("family", DECODERS)
def test_every_way_through_a_prompt_is_one(family):
    """Greedy tokens by a cache, without one, from embeddings; and logits of chunks and single tokens."""
    _, ours = pair(family)
    inputs = unpadded()
    ids = inputs["input_ids"]
    expected = argmax_by_steps(ours, ids)
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
            assert cache.get_seq_length() == expected.shape[1]  # the prefix is not in it


# In transformers Falcon with ALiBi takes no static cache, prefix or not.
STATIC = [family for family in DECODERS if family != "falcon-alibi"]


@pytest.mark.parametrize("family", STATIC)
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(family):
    _, ours = pair(family)
    for name, inputs in INPUTS.items():
        assert torch.equal(generate(ours, **inputs(), cache_implementation="static"), greedy(family, name))
    assert torch.equal(generate(ours, **unpadded()), greedy(family))  # nothing of it has stayed behind


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3", "opt", "t5", "bart"])
@pytest.mark.parametrize("settings", [{"prefix_projection": True}, {"num_virtual_tokens": 1}], ids=["mlp", "one"])
def test_variants_give_the_tokens_of_peft(family, settings):
    hf, ours = prefix_pair(family, **settings)
    inputs = prompts()
    assert torch.equal(generate(ours, **inputs), generate(hf, **inputs))
    assert torch.equal(generate(ours, **inputs, **MODES["beam"]), generate(hf, **inputs, **MODES["beam"]))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in ("llama", "gpt2", "bloom", "opt", "falcon", "gptj")),
        # A window that slides counts padding, as in peft; here the prefix stays.
        *((family, {"prefix_window": "pin"}) for family in ("gemma3", "mistral", "gpt_neo")),
    ],
)
def test_left_padding_changes_nothing(family, settings):
    """A padded row gives the tokens of the same row alone."""
    ours = prefixed(family, **settings)
    inputs = prompts()
    together = generate(ours, **inputs)
    for row, begin in enumerate((3, 1, 0)):
        alone = generate(ours, input_ids=inputs["input_ids"][row : row + 1, begin:])
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


def test_a_long_generation_leaves_the_prefix_behind_a_window():
    for family in ("mistral", "gemma3", "cohere2"):
        _, ours = pair(family)
        inputs = {"input_ids": unpadded()["input_ids"][:, :2]}
        expected = generate(ours, **inputs, max_new_tokens=20, min_new_tokens=20, use_cache=False)
        for options in ({}, {"cache_implementation": "static"}):
            found = generate(ours, **inputs, max_new_tokens=20, min_new_tokens=20, **options)
            assert torch.equal(found, expected)


def test_a_cache_is_continued():
    ours = prefixed("llama")
    inputs = unpadded()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = quietly(ours.generate, **inputs, **options)
    longer = torch.cat((first.sequences, first.sequences.new_full((2, 1), 9)), 1)
    continued = generate(ours, input_ids=longer, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(ours, input_ids=longer))


def test_the_tokens_are_not_those_of_the_base_model():
    """So that none of the above compares models that ignore their prefix; and without it they are."""
    same = []
    for family in GENERATORS:
        _, ours = pair(family)
        inputs = unpadded()
        with ours.disable_adapter():
            without = generate(ours, **inputs)
        base = tiny(family, "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM")
        assert torch.equal(without, generate(base, **inputs))
        same += [family] if torch.equal(without, greedy(family)) else []
    assert len(same) <= 3, same
