"""The numbers that stand for a mask: they give exactly the matrix that transformers makes of the same mask function."""

import dataclasses

import pytest
import torch
from transformers import masking_utils as theirs
from transformers.masking_utils import sdpa_mask

from fastpeft.attention.interface import NAME, plain_mask, register
from fastpeft.attention.masks import Mask, mask_function, pattern_of
from fastpeft.ops._prefix_attention_scores import Scores, visible
from tests.models import tiny

ROWS, KEYS = 3, 9
PACKED = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3, 3], [0] * 9, [0, 1, 2, 3, 4, 5, 5, 5, 5]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0, 1], list(range(9)), [0, 0, 0, 0, 0, 0, 1, 2, 3]])


def packed(function):
    """As this release of transformers joins them: later ones also count positions from each sequence's start."""
    if hasattr(theirs, "packed_sequence_compatibility_function"):
        return theirs.packed_sequence_compatibility_function(function, POSITIONS, PACKED)
    return theirs.and_masks(function, theirs.packed_sequence_mask_function(PACKED))


KNOWN = {
    "causal": theirs.causal_mask_function,
    "bidirectional": theirs.bidirectional_mask_function,
    "window-4": theirs.sliding_window_causal_mask_function(4),
    "window-1": theirs.sliding_window_causal_mask_function(1),
    "window-20": theirs.sliding_window_causal_mask_function(20),
    "both-ways-3": theirs.sliding_window_bidirectional_mask_function(3),
    "both-ways-0": theirs.sliding_window_bidirectional_mask_function(0),
}
KNOWN |= {f"packed-{name}": packed(function) for name, function in KNOWN.items()}

PADDING = {
    "none": torch.ones(ROWS, KEYS, dtype=torch.bool),
    "right": torch.arange(KEYS) < torch.tensor([[9], [6], [1]]),
    "left": torch.arange(KEYS) >= torch.tensor([[0], [4], [8]]),
    "holes": torch.arange(KEYS) % torch.tensor([[2], [3], [9]]) != 1,
    "short": torch.ones(ROWS, 5, dtype=torch.bool),  # the rest is padding
}
# q_length, kv_length, q_offset, kv_offset: whole, chunks, single tokens, caches that have dropped keys.
SLICES = [(9, 9, 0, 0), (4, 9, 5, 0), (1, 9, 8, 0), (3, 9, 2, 0), (2, 5, 7, 4), (1, 4, 8, 5)]


def arguments_of(function, padding=None, slices=SLICES[0], **more) -> dict:
    queries, keys, q_offset, kv_offset = slices
    return {
        "batch_size": ROWS, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": function, "attention_mask": padding, "device": "cpu", "dtype": torch.float32, **more,
    }  # fmt: skip


def matrix_of(arguments: dict) -> torch.Tensor:
    return sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def matrix_by_numbers(mask: Mask, queries: int, keys: int) -> torch.Tensor:
    scores = Scores(
        causal=mask.causal, scale=1.0, start=mask.q_offset - mask.kv_offset, window=mask.window,
        padding_BT=mask.padding, segments_BT=mask.segments,
    )  # fmt: skip
    return visible(scores, queries, keys, "cpu").expand(ROWS, 1, queries, keys)


@pytest.mark.parametrize("padding", [None, *PADDING])
@pytest.mark.parametrize("name", KNOWN)
def test_the_numbers_give_the_matrix(name, padding):
    attention_mask = None if padding is None else PADDING[padding]
    for slices in SLICES:
        if "packed" in name and (slices != SLICES[0] or padding not in (None, "none")):
            continue  # transformers knows packed sequences without a cache and without padding alone
        arguments = arguments_of(KNOWN[name], attention_mask, slices)
        mask = mask_function(**arguments)
        assert isinstance(mask, Mask)
        queries, keys, q_offset, _ = slices
        expected = matrix_of(arguments)
        assert torch.equal(matrix_by_numbers(mask, queries, keys), expected), slices
        if mask.behind:  # no token sees more without it
            at = torch.arange(q_offset, q_offset + queries)
            tokens = torch.nn.functional.pad(attention_mask, (0, KEYS))[:, None, at, None]
            found = matrix_by_numbers(dataclasses.replace(mask, padding=None), queries, keys)
            assert torch.equal(found & tokens, expected & tokens)


def test_padding_that_hides_nothing_is_known():
    """So that training on padded batches can run as fast as without padding."""
    for function, padding, present, behind in (
        (KNOWN["causal"], "none", False, False),
        (KNOWN["causal"], "right", True, True),
        (KNOWN["window-4"], "right", True, True),
        (KNOWN["causal"], "left", True, False),
        (KNOWN["causal"], "holes", True, False),
        (KNOWN["bidirectional"], "none", False, False),
        (KNOWN["bidirectional"], "right", True, False),
    ):
        mask = mask_function(**arguments_of(function, PADDING[padding]))
        assert (mask.padding is not None, mask.behind) == (present, behind)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", ["causal", "bidirectional", "window-4", "window-20", "packed-causal"])
def test_modules_without_a_prefix_get_the_mask_that_they_would_have_had(name, padding, implementation):
    if "packed" in name and padding:
        return
    attention_mask = None if padding is None else PADDING[padding]
    more = {"local_size": 4} if name == "window-4" else {"local_size": 20} if name == "window-20" else {}
    if name == "bidirectional":
        more = {"allow_is_bidirectional_skip": True}
    arguments = arguments_of(KNOWN[name], attention_mask, **more)
    make = theirs.ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    expected, found = make(**arguments), plain_mask(mask_function(**arguments), implementation, torch.float32)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found.dtype == expected.dtype and torch.equal(found, expected)


LEFT = torch.tensor([0, 2, 5])
UNKNOWN = {
    "chunked": theirs.chunked_causal_mask_function(3, LEFT),
    "blockwise": theirs.or_masks(
        theirs.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1]] * ROWS)), theirs.causal_mask_function
    ),
    "or": theirs.or_masks(theirs.causal_mask_function, theirs.sliding_window_bidirectional_overlay(2)),
    "three": theirs.and_masks(
        theirs.sliding_window_overlay(4), theirs.causal_mask_function, theirs.padding_mask_function(PADDING["holes"])
    ),
    "padding": theirs.and_masks(theirs.padding_mask_function(PADDING["left"]), theirs.causal_mask_function),
    "swapped": theirs.and_masks(theirs.causal_mask_function, theirs.sliding_window_overlay(4)),
    "window-both-ways-of-causal": theirs.and_masks(
        theirs.sliding_window_bidirectional_overlay(2), theirs.causal_mask_function
    ),
    "window-of-bidirectional": theirs.and_masks(theirs.sliding_window_overlay(3), theirs.bidirectional_mask_function),
    "window-of-window": theirs.and_masks(theirs.sliding_window_overlay(3), KNOWN["window-4"]),
    "window-of-packed": theirs.and_masks(theirs.sliding_window_overlay(3), KNOWN["packed-causal"]),
    "packed-of-packed": packed(KNOWN["packed-causal"]),
    "packed-chunked": packed(theirs.chunked_causal_mask_function(3, LEFT)),
    "own": lambda batch, head, q, kv: (kv <= q) & ((q + kv) % 3 != 1),
    "offset": theirs.add_offsets_to_mask_function(theirs.causal_mask_function, 2, 0),
}


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_numbers_is_a_matrix(name, padding):
    assert pattern_of(UNKNOWN[name]) is None
    arguments = arguments_of(UNKNOWN[name], None if padding is None else PADDING[padding])
    found = mask_function(**arguments)
    assert isinstance(found, torch.Tensor) and torch.equal(found, matrix_of(arguments))


def test_offsets_that_are_tensors_give_a_matrix_of_the_whole_cache():
    """As in generation with a static cache."""
    for padding in (None, PADDING["left"]):
        arguments = arguments_of(KNOWN["causal"], padding, (2, 9, torch.tensor(3), 0))
        found = mask_function(**arguments)
        assert isinstance(found, torch.Tensor) and torch.equal(found, matrix_of(arguments))
        assert found.shape[-2:] == (2, 9)


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_transformers_own_makers_call_it(family, padding):
    """With what they put together today: a change of theirs must show here and not as a silent matrix."""
    register()
    config = tiny(family, "SEQ_CLS" if family == "bert" else "CAUSAL_LM").config
    config._attn_implementation_internal = NAME
    embeds = torch.zeros(ROWS, KEYS, 32)
    attention_mask = None if padding is None else PADDING[padding].long()
    common = {"config": config, "inputs_embeds": embeds, "attention_mask": attention_mask}
    if family == "bert":
        found = theirs.create_bidirectional_mask(**common)
        assert isinstance(found, Mask) and not found.causal and found.window is None
        assert (found.padding is None) == (padding is None)
        return
    make = theirs.create_sliding_window_causal_mask if family == "mistral" else theirs.create_causal_mask
    found = make(**common, past_key_values=None)
    assert isinstance(found, Mask) and found.causal and found.window == (4 if family == "mistral" else None)
    assert (found.padding is None, found.behind) == (padding is None, padding == "right")
    if padding is None:
        found = make(**common, past_key_values=None, position_ids=POSITIONS)
        assert isinstance(found, Mask) and torch.equal(found.segments, PACKED)
    found = make(**common, past_key_values=None, or_mask_function=theirs.blockwise_overlay(PACKED))
    assert isinstance(found, torch.Tensor) and found.shape == (ROWS, 1, KEYS, KEYS)


def test_a_mask_is_a_mask_to_models_that_ask():
    mask = mask_function(**arguments_of(KNOWN["causal"], PADDING["left"]))
    assert mask.ndim == 2 and mask.to(torch.bool) is mask and mask.to("cpu", torch.float32) is mask
