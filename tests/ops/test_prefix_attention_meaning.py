"""What the arguments of `prefix_attention` mean, by other means than its reference: which keys a query sees, key by
key, and calls that must agree with others: Hugging Face's concatenation, packed sequences with separate ones,
padded with unpadded, steps of decoding with one pass."""

import itertools

import pytest
import torch

from fastpeft.attention_oracle import GRADIENTS, _scores, sdpa
from fastpeft.ops import prefix_attention
from fastpeft.ops._prefix_attention_scores import default_positions, positions_within, prefix_visible, visible
from tests.ops.attention_cases import FIVE, draws, path

BOTH = ("flash", "blocks")
DOUBLE = {"dtype": torch.float64}


def same(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def given_of(problem, **changes):
    five = {name: getattr(problem, name) for name in problem.present()}
    return five | problem.options | changes


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("start", [0, 4])
def test_which_keys_a_query_sees(start, packed, window, causal):
    queries, keys, prefix = 6, 10, 4
    (problem,) = draws(("left",), queries=queries, keys=keys, prefix=prefix)
    ids = torch.tensor([[1, 1, 1, 4, 4, 4, 4, 4, 9, 9], [0] * 10])
    problem.options.update(causal=causal, sliding_window=window, query_start=start)
    problem.options.update({"segment_ids": ids} if packed else {})
    scores, padding = _scores(problem), problem.options["padding_mask"]
    sees = visible(scores, queries, keys, "cpu").expand(2, 1, -1, -1)
    see_prefix = prefix_visible(scores, queries, prefix, "cpu")
    for b, i in itertools.product(range(2), range(queries)):
        at = start + i
        for j in range(keys):
            order = j <= at if causal else True
            near = window is None or (at - window < j <= at if causal else abs(at - j) < window)
            own = not packed or ids[b, j] == ids[b, at]
            assert sees[b, 0, i, j] == bool(order and near and own and padding[b, j]), (b, i, j)
        if see_prefix is not None:
            # The prefix stands directly before the query's own sequence.
            local = at - ids[b].tolist().index(ids[b, at]) if packed else at
            for j in range(prefix):
                assert see_prefix[b if len(see_prefix) > 1 else 0, 0, i, j] == (local - (j - prefix) < window), (
                    b,
                    i,
                    j,
                )


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("queries", [9, 1])
def test_a_window_over_the_prefix_counts_from_the_first_token(queries, name):
    """Padding in front of a sample, told by its keys' positions, changes nothing for its own queries."""
    keys, prefix, window, front = 9, 4, 7, 3
    (problem,) = draws((), queries=queries, keys=keys, prefix=prefix, **DOUBLE)
    given = given_of(problem, causal=True, sliding_window=window)
    start = torch.tensor([0, front])[:, None]
    at = torch.arange(keys)
    options = {"padding_mask": at >= start, "key_positions": at - start}
    with path(name):
        found = prefix_attention(**{**given, **options})
        same(found[:1], prefix_attention(**given)[:1])
        alone = {"query": -min(queries, keys - front), "key": -(keys - front), "value": -(keys - front)}
        cut = {key: given[key][1:, :, count:] for key, count in alone.items()}
        expected = prefix_attention(**{**given, **cut})
        same(found[1:, :, alone["query"] :], expected)
        assert not torch.allclose(found, prefix_attention(**given, padding_mask=options["padding_mask"]))


def test_positions():
    ids = torch.tensor([[7, 7, 7, 2, 2, 7], [0, 1, 2, 3, 4, 5]])
    local = positions_within(ids)
    assert local.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
    padding = torch.tensor([[False, False, True, True, True], [True, True, True, False, True]])
    assert default_positions(2, 5, padding, None, "cpu").tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 0, 3]]
    assert default_positions(2, 3, None, None, "cpu").tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "modifiers", [(), ("left",), ("window",), ("pin",), ("alibi",), ("sinks",), ("bias", "prefix-bias")], ids="-".join
)
def test_as_the_keys_next_to_each_other(modifiers, half):
    (problem,) = draws(modifiers, **DOUBLE)
    with path(half):
        same(prefix_attention(**given_of(problem)), sdpa(problem, {name: getattr(problem, name) for name in GRADIENTS}))


@pytest.mark.parametrize("half", BOTH)
def test_a_window_slides_over_the_prefix_as_over_earlier_tokens(half):
    """Hugging Face's prefix in a cache: with the prefix as P real tokens before, in one causal sequence."""
    (problem,) = draws((), **DOUBLE, queries=11, prefix=5, groups=4)
    q, k, v, pk, pv = (getattr(problem, name) for name in FIVE)
    for window in (2, 4, 5, 9, 30):
        at, key = 5 + torch.arange(11)[:, None], torch.arange(16)[None]
        mask = (key <= at) & (key > at - window)
        long = [torch.cat((p.expand(2, -1, -1, -1), t), 2) for p, t in ((pk, k), (pv, v))]
        expected = torch.nn.functional.scaled_dot_product_attention(q, *long, attn_mask=mask)
        with path(half):
            same(prefix_attention(q, k, v, pk, pv, sliding_window=window), expected)


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "modifiers", [(), ("window",), ("alibi",), ("softcap", "sinks"), ("bidirectional",)], ids="-".join
)
def test_packed_sequences_are_as_alone(modifiers, half):
    (problem,) = draws(modifiers, **DOUBLE, batch=1, queries=21)
    lengths, given = (5, 9, 7), given_of(problem)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    with path(half):
        packed = prefix_attention(**(given | {"segment_ids": ids}))
        first = 0
        for length in lengths:
            own = slice(first, first + length)
            alone = prefix_attention(**(given | {name: given[name][:, :, own] for name in FIVE[:3]}))
            same(packed[:, :, own], alone)
            first += length


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("modifiers", [(), ("window",), ("alibi",), ("sinks", "softcap")], ids="-".join)
def test_left_padded_samples_are_as_without_padding(modifiers, half):
    """But for a window, which counts places in the row: there the prefix's distance grows with the padding."""
    (problem,) = draws(modifiers, **DOUBLE, queries=17)
    given = given_of(problem, padding_mask=torch.arange(17) >= torch.tensor([[3], [8]]))
    if "window" in modifiers:
        given["prefix_window"] = "pin"
    with path(half):
        padded = prefix_attention(**given)
        for b, first in enumerate((3, 8)):
            short = {name: given[name][b : b + 1, :, first:] for name in FIVE[:3]}
            same(padded[b : b + 1, :, first:], prefix_attention(**(given | short | {"padding_mask": None})))


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "modifiers", [(), ("window",), ("alibi",), ("left", "sinks"), ("softcap",), ("packed", "window")], ids="-".join
)
def test_steps_are_as_one_pass(modifiers, half):
    (problem,) = draws(modifiers, **DOUBLE, queries=15, batch=3)
    given = given_of(problem)
    vectors = [name for name in ("padding_mask", "segment_ids") if name in given]
    with path(half):
        whole = prefix_attention(**given)
        for first, last in ((0, 6), (6, 14), (14, 15)):
            step = {"query": given["query"][:, :, first:last]}
            step |= {name: given[name][:, :, :last] for name in ("key", "value")}
            step |= {name: given[name][:, :last] for name in vectors}
            same(prefix_attention(**(given | step)), whole[:, :, first:last])
        # A static cache, longer than what it holds so far.
        at = {"query": given["query"][:, :, 6:9], "query_start": 6}
        same(prefix_attention(**(given | at)), whole[:, :, 6:9])
