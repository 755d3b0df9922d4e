"""What the tests of `prefix_attention` have in common: problems with every modifier, and how a result is judged."""

import contextlib
import itertools
from typing import NamedTuple

import torch

from fastpeft.dispatch import ATTENTION_STRATEGIES, Plan, backend, override_plan
from fastpeft.kernels._common import dropout_threshold
from fastpeft.ops._prefix_attention_scores import Scores, Tensors, make_scores
from fastpeft.ops.prefix_attention import apply_prefix_attention, prefix_attention_reference
from fastpeft.oracle import Bounds, compare

# Two whole tiles of the interpreter's 16 and a tail, of queries, keys and virtual keys; D is no power of two.
QUERIES, PREFIX, DEPTH = 37, 35, 20
NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "bias", "prefix_bias", "sinks")
PLANS = {name: Plan(name, name, "forced by a test") for name in ATTENTION_STRATEGIES}


class Problem(NamedTuple):
    """One call of the op, with the gradient of its result."""

    tensors: Tensors
    scores: Scores
    dropout: float
    dout_BHSD: torch.Tensor


def _left(batch, keys):
    """The first sample begins at key 19, in the middle of a tile and after a whole one; the second everywhere."""
    start = torch.tensor([19, 0] * batch)[:batch, None]
    return torch.arange(keys)[None] >= start


def _gaps(batch, keys):
    at = torch.arange(keys)[None] + 5 * torch.arange(batch)[:, None]
    return at % 7 > 1


def _segments(batch, keys):
    """Of 11 and more keys, the second sample's at other places."""
    return (torch.arange(keys)[None] + 4 * torch.arange(batch)[:, None]) // 15


def behind_padding(batch, keys):
    """A window that slides over the prefix from each sample's first token on, and not from the padding before it."""
    positions = torch.arange(keys)[None] - (~_left(batch, keys)).sum(1, keepdim=True)
    return {"window": 21, "padding": _left(batch, keys), "positions": positions}


# name: arguments of the op that make it, from (batch, heads, queries, keys, prefix)
MODIFIERS = {
    "bidirectional": lambda *_: {"causal": False},
    "window": lambda *_: {"window": 21},
    "pinned": lambda *_: {"window": 21, "pin": True},
    "left-padding": lambda b, h, s, t, p: {"padding": _left(b, t)},
    "gaps": lambda b, h, s, t, p: {"padding": _gaps(b, t)},
    "segments": lambda b, h, s, t, p: {"segments": _segments(b, t)},
    "alibi": lambda b, h, s, t, p: {"slopes": 0.5 ** torch.arange(3.0, h + 3)},
    "bias": lambda b, h, s, t, p: {"bias": torch.randn(1, h, s, t)},
    "prefix-bias": lambda b, h, s, t, p: {"prefix_bias": torch.randn(b, 1, s, p)},
    "softcap": lambda *_: {"softcap": 1.5},
    "sinks": lambda b, h, s, t, p: {"sinks": torch.randn(h)},
    "scale": lambda *_: {"scale": 0.15},
    "dropout": lambda *_: {"dropout": 0.3},
    "own-prefixes": lambda *_: {"own": True},
    "cached": lambda *_: {},
}
EXCLUSIVE = [{"window", "pinned"}, {"left-padding", "gaps"}]
PAIRS = [pair for pair in itertools.combinations(MODIFIERS, 2) if set(pair) not in EXCLUSIVE]


def _covering(size=4) -> list[tuple[str, ...]]:
    """Sets of modifiers in which every pair occurs, each chosen greedily for the pairs that are still missing."""
    missing, chosen = set(map(frozenset, PAIRS)), []
    allowed = [c for c in itertools.combinations(MODIFIERS, size) if not any(e <= set(c) for e in EXCLUSIVE)]
    while missing:
        best = max(allowed, key=lambda c: sum(frozenset(pair) in missing for pair in itertools.combinations(c, 2)))
        missing -= set(map(frozenset, itertools.combinations(best, 2)))
        chosen.append(best)
    return chosen


TOGETHER = _covering()


def problem(
    *modifiers: str, seed=0, batch=2, heads=4, kv_heads=2, queries=QUERIES, keys=None, prefix=PREFIX, depth=DEPTH,
    dtype=torch.float32, **changes,
) -> Problem:  # fmt: skip
    """Random tensors of these shapes; "cached": the queries are the last of more keys."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        keys = keys or queries + ("cached" in modifiers) * 17
        made = {}
        for name in modifiers:
            made |= MODIFIERS[name](batch, heads, queries, keys, prefix)
        made |= changes
        own = batch if made.pop("own", False) else 1
        shapes = (heads, queries, depth), (kv_heads, keys, depth), (kv_heads, keys, depth)
        tensors = [torch.randn(batch, *shape) for shape in shapes]
        tensors += [torch.randn(own, kv_heads, prefix, depth) for _ in range(2)]
        extras = [made.pop(name, None) for name in ("bias", "prefix_bias", "sinks")]
        tensors = Tensors(*(t.to(dtype) for t in tensors), *(None if t is None else t.to(dtype) for t in extras))
        pin, dropout = made.pop("pin", False), made.pop("dropout", 0.0)
        order = ("causal", "scale", "padding", "segments", "start", "slopes", "positions", "window", "softcap")
        arguments = [made.pop(name, True if name == "causal" else None) for name in order]
        assert not made, made
        scores = make_scores("test", tensors, *arguments)._replace(pin=pin)
        return Problem(tensors, scores, dropout, torch.randn(batch, heads, queries, depth).to(dtype))


@contextlib.contextmanager
def on(name: str, strategy: str | None = None):
    """The backend in force, and for Triton the strategy."""
    with backend(name), override_plan(PLANS[strategy]) if strategy else contextlib.nullcontext():
        yield


def _outcome(function, case: Problem, wanted, dtype) -> dict:
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype)
        for name, t in zip(NAMES, case.tensors, strict=True)
    }
    wanted = [name for name in wanted if leaves[name] is not None]
    for name in wanted:
        leaves[name].requires_grad_()
    out = function(Tensors(*leaves.values()))
    if not wanted:
        return {"out": out.detach()}
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], case.dout_BHSD.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": each for name, each in zip(wanted, gradients, strict=True)}}


def op_outcome(case: Problem, wanted=NAMES, seed: int = 0) -> dict:
    """{"out": result, "dquery": gradient, ...} of the op on the backend in force."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _outcome(lambda t: apply_prefix_attention(t, case.scores, case.dropout, None), case, wanted, None)


def triton_keep(case: Problem, seed: int):
    """The mask that the kernels draw, and the probability that they honour."""
    if not case.dropout:
        return None, 0.0
    from fastpeft.ops import _prefix_attention_triton as path

    (batch, heads, queries, _), prefix = case.tensors.q_BHSD.shape, case.tensors.pk_BGPD.shape[2]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = path.draw_seed(case.tensors.q_BHSD)
    mask = path.keep_mask(drawn, case.dropout, batch, heads, queries, prefix, case.tensors.k_BGTD.shape[2], "cpu")
    return mask, dropout_threshold(case.dropout) / 65536


def outcomes(case: Problem, wanted=NAMES, seed: int = 0) -> tuple[dict, dict, dict]:
    """Of the op, of the reference in the same dtype and in float64, with the mask that the kernels draw."""
    keep, p = triton_keep(case, seed)

    def reference(tensors):
        return prefix_attention_reference(tensors, case.scores, keep, p)

    got = op_outcome(case, wanted, seed)
    return got, _outcome(reference, case, wanted, None), _outcome(reference, case, wanted, torch.float64)


def heads_of(name: str, tensor: torch.Tensor, by_row: bool) -> list[torch.Tensor]:
    """Every sample and head is a draw. Not `by_row`: it is also a row.

    The error of a row of u, hence of a bias's gradient, is mostly one number, that of its δ; and so it is of every row
    in fp32. The quotient of two such numbers says nothing. A row that is wrong is found by its peak.
    """
    heads = tensor.flatten(0, -3) if tensor.ndim > 2 else tensor[None]
    return list(heads if by_row and "bias" not in name else heads.flatten(1))


def differences(cases, wanted=NAMES):
    """How far the result and the wanted gradients are from the truth, pooled over problems of one shape, their samples
    and heads."""
    draws = [outcomes(case, wanted, seed) for seed, case in enumerate(cases)]
    by_row = cases[0].tensors.q_BHSD.dtype != torch.float32
    return [
        compare(name, *([head for draw in draws for head in heads_of(name, draw[i][name], by_row)] for i in range(3)))
        for name in draws[0][0]
    ]


# The gradients of two sinks are two numbers, whose error beside eager's is a matter of luck; the gain shows what is
# wrong, and `test_gradients_of_sinks` judges many.
FEW = Bounds(rms=10, peak=10, row=10)


def assert_right(cases, wanted=NAMES, bounds: Bounds = Bounds()) -> None:  # noqa: B008
    """Result and wanted gradients obey the criterion on the backend in force."""
    found = differences(cases, wanted)
    faults = [fault for each in found for fault in each.faults(FEW if each.name == "dsinks" else bounds)]
    assert not faults, "\n".join([*faults, *map(str, found)])
