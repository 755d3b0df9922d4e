"""A training step with a prefix, whole model: what is kept for backward beyond the step without one, beside HF peft."""

import copy

import pytest
import torch

import fastpeft
from tests.memory import Allocations, saved_for_backward
from tests.peft_pair import quietly

BATCH, TOKENS, LENGTH, LAYERS, HEADS, GROUPS, DEPTH = 2, 192, 24, 3, 8, 2, 16
ROWS = BATCH * HEADS * TOKENS  # one number for each row and head
SIZES = dict(
    vocab_size=61, hidden_size=HEADS * DEPTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=GROUPS, intermediate_size=160, max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).train()


def kept(model, ids, **options) -> int:
    """Bytes that a forward pass keeps for backward, weights aside."""
    known = [*model.parameters(), *model.buffers(), ids]
    with saved_for_backward(besides=known) as saved:
        loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    model.zero_grad()
    return sum(saved.values())


def transient(model, ids, **options) -> set[int]:
    """The sizes of all storages of a training step."""
    with Allocations() as allocations:
        model(input_ids=ids, labels=ids, **options).loss.backward()
    model.zero_grad()
    return set(allocations.sizes)


def trio(base):
    """The frozen model, of which the embeddings' outputs want a gradient; HF peft's; ours."""
    import peft

    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.enable_input_require_grads()
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH}
    theirs = quietly(peft.get_peft_model, copy.deepcopy(base), peft.PrefixTuningConfig(**settings)).train()
    ours = fastpeft.patch(copy.deepcopy(base), fastpeft.PrefixTuningConfig(**settings))
    return frozen, theirs, ours


def test_a_step_keeps_statistics_and_the_prefix_and_no_more(base):
    frozen, theirs, ours = trio(base)
    ids = torch.randint(0, 61, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    floor, hf, found = kept(frozen, ids, use_cache=False), kept(theirs, ids), kept(ours, ids)
    table = ours.prompt_encoder["default"].embedding.weight.nbytes
    print(f"kept for backward: without a prefix {floor:,d} bytes, ours {found - floor:+,d}, HF peft {hf - floor:+,d}")
    assert found - floor <= LAYERS * ROWS * 4 + table
    assert hf - floor >= 5 * (LAYERS * ROWS * 4 + table)  # keys and values next to the prefix, a mask for each layer


def test_no_copy_of_the_keys_and_no_mask_comes_into_being(base):
    _, theirs, ours = trio(base)
    ids = torch.randint(0, 61, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    beside = BATCH * GROUPS * (LENGTH + TOKENS) * DEPTH * 4  # keys behind the prefix
    mask = BATCH * TOKENS * (LENGTH + TOKENS)
    expanded = BATCH * HEADS * (LENGTH + TOKENS) * DEPTH * 4
    forbidden = {beside, expanded, mask, 4 * mask}
    assert forbidden & transient(theirs, ids)  # what is looked for is there to be found
    assert not forbidden & transient(ours, ids)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with Allocations() as allocations:
        ours(input_ids=ids, attention_mask=padded, labels=ids).loss.backward()
    assert not forbidden & set(allocations.sizes)
