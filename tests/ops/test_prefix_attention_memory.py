"""What `prefix_attention` keeps for backward and allocates on the way, on the torch path, beside Hugging Face's way.

At sizes where each thing that must not be there (keys next to the prefix, keys repeated for all heads, a mask of rows
× keys) is larger than everything that may be, or of a size of its own.
"""

import pytest
import torch

from fastpeft.attention_oracle import sdpa
from fastpeft.ops import _prefix_attention_blocks as blocks
from fastpeft.ops import _prefix_attention_flash as flash
from fastpeft.ops import prefix_attention
from tests.memory import Allocations, saved_for_backward
from tests.ops.attention_cases import FIVE, draws, path

BOTH = ("flash", "blocks")
BATCH, HEADS, GROUPS, ROWS, DEPTH, PREFIX = 2, 8, 2, 1500, 16, 30
RESULT = BATCH * HEADS * ROWS * DEPTH * 4
KEYS = BATCH * GROUPS * ROWS * DEPTH * 4
LOGARITHMS = BATCH * HEADS * ROWS * 4


def call_of(*modifiers, dtype=torch.float32, **options):
    """(the arguments, those that want a gradient, dout)."""
    sizes = {"batch": BATCH, "heads": HEADS, "groups": GROUPS, "queries": ROWS, "depth": DEPTH, "prefix": PREFIX}
    (problem,) = draws(modifiers, dtype=dtype, **(sizes | options))
    leaves = {name: getattr(problem, name).requires_grad_() for name in problem.present()}
    given = leaves | problem.options | {"dropout": problem.dropout, "training": True}
    return given, list(leaves.values()), problem


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "modifiers", [(), ("left", "window"), ("packed",), ("dropout",), ("softcap", "sinks")], ids=str
)
def test_backward_keeps_the_result_and_a_number_for_each_row_and_head(modifiers, half):
    given, leaves, _ = call_of(*modifiers, queries=300)
    known = [*leaves, *(given[name] for name in ("padding_mask", "segment_ids") if name in given)]
    with path(half), saved_for_backward(besides=known) as saved:
        out = prefix_attention(**given)
    assert out.nbytes == RESULT // 5
    assert sorted(saved.values()) == sorted([out.nbytes, LOGARITHMS // 5] + [8] * ("dropout" in modifiers))


def step(given, leaves, dout):
    """(peak of forward, peak of the step, all sizes) in bytes."""
    with Allocations() as allocations:
        out = prefix_attention(**given)
        forward = allocations.peak
        gradients = torch.autograd.grad(out, leaves, dout)
    assert all(g is not None for g in gradients)
    return forward, allocations.peak, set(allocations.sizes)


@pytest.mark.parametrize("modifiers", [(), ("left",), ("bidirectional", "right"), ("alibi",), ("sinks",)], ids=str)
def test_flash_attention_allocates_results_only(modifiers):
    given, leaves, problem = call_of(*modifiers)
    with path("flash"):
        forward, peak, sizes = step(given, leaves, problem.dout)
    # Of the sequence and of the prefix, merged in place; statistics in float64, and their temporaries.
    assert forward <= 2 * RESULT + 12 * LOGARITHMS
    # dq twice, dk and dv; the prefix's are small.
    assert peak <= RESULT + 2 * RESULT + 2 * KEYS + 14 * LOGARITHMS
    assert max(sizes) == RESULT
    assert not sizes & {KEYS * (ROWS + PREFIX) // ROWS, RESULT * (ROWS + PREFIX) // ROWS}


@pytest.mark.parametrize("modifiers", [("window",), ("packed",), ("window", "left"), ("bias", "left")], ids=str)
def test_masks_are_made_for_some_rows_at_a_time(modifiers):
    given, leaves, problem = call_of(*modifiers)
    if problem.bias is not None:  # whose gradient is the blocks' business
        leaves = [leaf for leaf in leaves if leaf is not problem.bias]
        problem.bias.requires_grad_(False)
    with path("flash"):
        forward, peak, sizes = step(given, leaves, problem.dout)
    mask = BATCH * ROWS * (ROWS + PREFIX)
    samples = 2 if "left" in modifiers or "packed" in modifiers else 1
    a_block = min(flash.MASK_BYTES, samples * flash.MASK_ROWS * ROWS * 4 * (HEADS if problem.bias is not None else 1))
    assert forward <= 3 * RESULT + 14 * LOGARITHMS + 3 * a_block
    assert peak <= 5 * RESULT + 4 * KEYS + 14 * LOGARITHMS + 3 * a_block
    assert max(sizes) <= max(RESULT, a_block) < mask or problem.bias is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "modifiers", [("softcap",), ("dropout",), ("prefix-bias", "alibi"), ("window", "sinks")], ids=str
)
def test_products_in_blocks_allocate_some_blocks(modifiers, dtype):
    given, leaves, problem = call_of(*modifiers, dtype=dtype)
    with path("blocks"):
        forward, peak, sizes = step(given, leaves, problem.dout)
    block = 4 * blocks.BLOCK_ELEMENTS
    bias = 0 if problem.prefix_bias is None else 2 * problem.prefix_bias.numel() * 4
    assert forward <= RESULT + LOGARITHMS + 4 * block
    # Sums in fp32 and gradients as they are returned, of keys and values and of q.
    assert peak <= 2 * RESULT + 6 * KEYS + bias + LOGARITHMS + 9 * block
    assert max(sizes) <= max(block, RESULT)


def test_many_virtual_keys_make_no_scores():
    """4096 of them: all scores of the prefix would be 48 times the result."""
    given, leaves, problem = call_of(queries=300, prefix=4096)
    with path("flash"):
        forward, peak, sizes = step(given, leaves, problem.dout)
    prefix = given["prefix_key"].nbytes
    assert 10 * max(sizes) < BATCH * HEADS * 300 * 4096 * 4
    assert peak <= 3 * RESULT + 2 * prefix * (BATCH + 2) + 14 * LOGARITHMS


def test_beside_hugging_faces_way(capsys):
    saved, peaks = {}, {}
    for name in ("ours", "theirs"):
        given, leaves, problem = call_of()
        with path("flash"), saved_for_backward(besides=leaves) as kept, Allocations() as allocations:
            tensors = {name: given.get(name) for name in (*FIVE, "bias", "prefix_bias", "sinks")}
            out = prefix_attention(**given) if name == "ours" else sdpa(problem, tensors)
            torch.autograd.grad(out, leaves, problem.dout)
        saved[name], peaks[name] = sum(kept.values()), allocations.peak
    with capsys.disabled():
        print(
            f"\nsaved {saved['ours']:,} B, HF {saved['theirs']:,} B; peak {peaks['ours']:,} B, HF {peaks['theirs']:,} B"
        )
    assert saved["ours"] * 8 <= saved["theirs"]
    assert peaks["ours"] * 6 <= peaks["theirs"]
