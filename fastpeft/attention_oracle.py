"""How right `prefix_attention` and `gated_prompt_attention` are, by the yardstick of `fastpeft.oracle`: random problems
with any modifiers, and their results beside the definition's in the same dtype and in float64."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.dispatch import prefix_attention_plan
from fastpeft.ops import gated_prompt_attention as gated
from fastpeft.ops import gated_prompt_attention_reference, prefix_attention, prefix_attention_reference
from fastpeft.ops._prefix_attention_scores import Tensors, make_scores, prefix_visible, visible
from fastpeft.ops.prefix_attention import _path
from fastpeft.oracle import Difference, compare, seed_generators

AT_ONCE = 8  # draws whose references are computed in one go: more of them leave the caches
GRADIENTS = ("query", "key", "value", "prefix_key", "prefix_value", "bias", "prefix_bias", "sinks", "gate")

MODIFIERS = {
    "bidirectional": "causal=False",
    "left": "samples padded on the left, by different amounts",
    "right": "samples padded on the right",
    "holes": "keys left out at random, and one sample without any",
    "packed": "three runs of segment ids in a sample",
    "window": "a sliding window over about a third of the keys, out of which the prefix slides",
    "pin": "the same, with the prefix always visible",
    "alibi": "slopes that are not powers of two",
    "positions": "ALiBi with given key positions",
    "bias": "an additive bias for each head, shared by the batch",
    "bias-by-sample": "an additive bias for each sample, shared by the heads",
    "prefix-bias": "an additive bias on the virtual keys",
    "softcap": "a cap that bends the scores",
    "sinks": "a sink for each head",
    "scale": "a scale that is not D ** -0.5",
    "by-sample": "a prefix for each sample",
    "dropout": "of 0.3",
}


@dataclass(frozen=True)
class AttentionProblem:
    """One call with the gradient of its result, dout (B, H, S, D). The tensors are named as in `prefix_attention`; with
    a gate it is a call of `gated_prompt_attention`, whose prompt is the prefix. options: the other arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    dout: Tensor
    bias: Tensor | None = None
    prefix_bias: Tensor | None = None
    sinks: Tensor | None = None
    gate: Tensor | None = None
    dropout: float = 0.0
    options: dict = dataclasses.field(default_factory=dict)

    def present(self) -> tuple[str, ...]:
        """The tensors that may want a gradient."""
        return tuple(name for name in GRADIENTS if getattr(self, name) is not None)


def random_attention_problem(
    modifiers: Sequence[str] = (),
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    queries: int = 19,
    keys: int | None = None,
    depth: int = 16,
    prefix: int = 5,
    gate: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> AttentionProblem:
    """Normal tensors with the modifiers of these names in `MODIFIERS`; keys: `queries` by default."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype).to(device)

    sizes = (batch, groups, prefix, depth) if "by-sample" in modifiers else (groups, prefix, depth)
    tensors = {
        "query": normal(batch, heads, queries, depth),
        "key": normal(batch, groups, keys, depth),
        "value": normal(batch, groups, keys, depth),
        "prefix_key": normal(*sizes),
        "prefix_value": normal(*sizes),
        "dout": normal(batch, heads, queries, depth),
        "gate": None if gate is None else normal(*gate),
    }
    if "bias" in modifiers:
        tensors["bias"] = normal(1, heads, queries, keys)
    if "bias-by-sample" in modifiers:
        tensors["bias"] = normal(batch, 1, queries, keys)
    if "prefix-bias" in modifiers:
        tensors["prefix_bias"] = normal(1, heads, queries, prefix)
    if "sinks" in modifiers:
        tensors["sinks"] = normal(heads)
    options = _options(modifiers, batch, heads, keys, generator, device)
    return AttentionProblem(**tensors, dropout=0.3 if "dropout" in modifiers else 0.0, options=options)


def _options(modifiers, batch, heads, keys, generator, device) -> dict:
    unknown = set(modifiers) - set(MODIFIERS)
    assert not unknown, f"no modifiers {unknown}"
    at, sample = torch.arange(keys, device=device), torch.arange(batch, device=device)[:, None]
    options = {"causal": "bidirectional" not in modifiers}
    padding = {
        "left": at >= 1 + 3 * sample,
        "right": at < keys - 2 - 3 * sample,
        "holes": (torch.rand(batch, keys, generator=generator) < 0.6).to(device) & (sample > 0),
    }
    for name in padding.keys() & set(modifiers):
        options["padding_mask"] = padding[name] & options.get("padding_mask", torch.tensor(True, device=device))
    if "packed" in modifiers:
        options["segment_ids"] = (at >= keys // 3).int() + (at >= keys // 3 + 5 + sample).int()
    if "window" in modifiers or "pin" in modifiers:
        options["sliding_window"] = max(2, keys // 3)
        options["prefix_window"] = "pin" if "pin" in modifiers else "slide"
    if "alibi" in modifiers or "positions" in modifiers:
        options["alibi_slopes"] = torch.linspace(0.05, 0.4, heads, device=device)
    if "positions" in modifiers:
        options["key_positions"] = at.flip(0) % 7 + sample
    if "softcap" in modifiers:
        options["softcap"] = 1.5
    if "scale" in modifiers:
        options["scale"] = 0.4
    return options


def _tensors(leaves: dict) -> Tensors:
    prefix = [leaves[name] if leaves[name].ndim == 4 else leaves[name][None] for name in ("prefix_key", "prefix_value")]
    own = [leaves[name] for name in ("query", "key", "value")]
    return Tensors(*own, *prefix, leaves["bias"], leaves["prefix_bias"], leaves["sinks"])


def _scores(problem: AttentionProblem):
    given = {"causal": True, **problem.options}
    pin = given.pop("prefix_window", "slide") == "pin"
    names = ("scale", "padding_mask", "segment_ids", "query_start", "alibi_slopes", "key_positions", "sliding_window",
             "softcap")  # fmt: skip
    rest = {name: given.pop(name, None) for name in names}
    tensors = _tensors({name: getattr(problem, name) for name in GRADIENTS})
    return make_scores("attention_oracle", tensors, given.pop("causal"), **rest)._replace(pin=pin)


def _op(problem: AttentionProblem, leaves: dict) -> Tensor:
    options = {"dropout": problem.dropout, "training": True, **problem.options}
    five = [leaves[name] for name in GRADIENTS[:5]]
    extras = {name: leaves[name] for name in ("bias", "sinks")}
    if problem.gate is None:
        return prefix_attention(*five, prefix_bias=leaves["prefix_bias"], **extras, **options)
    return gated(*five, leaves["gate"], **extras, **options)


def _reference(problem: AttentionProblem, leaves: dict, keep, p: float) -> Tensor:
    if problem.gate is None:
        return prefix_attention_reference(_tensors(leaves), _scores(problem), keep, p)
    return gated_prompt_attention_reference(_tensors(leaves), leaves["gate"].view(-1), _scores(problem), keep, p)


def sdpa(problem: AttentionProblem, leaves: dict) -> Tensor:
    """As HF computes it with SDPA: the two sets of keys next to each other, heads repeated, one additive mask. A sink
    is a key of zeros with the score of the sink. With a gate: the sequence's part and the gated prompt's, each by SDPA.
    No dropout; a softcap behind a gate only, and then the sequence's part is the reference's."""
    if problem.gate is not None:
        return _gated_sdpa(problem, leaves)
    q, k, v, pk, pv, bias, pbias, sinks = _tensors(leaves)
    scores, wide = _scores(problem), torch.promote_types(q.dtype, torch.float32)
    (batch, heads, queries), keys, prefix = q.shape[:3], k.shape[2], pk.shape[2]
    by_head = scores.slopes_H is not None or any(t is not None for t in (bias, pbias, sinks))
    shape = (batch, heads if by_head else 1, queries)
    a = torch.zeros(*shape, prefix, dtype=wide) if pbias is None else pbias.to(wide).expand(*shape, -1)
    s = torch.zeros(*shape, keys, dtype=wide) if bias is None else bias.to(wide).expand(*shape, -1)
    if scores.slopes_H is not None:
        slopes = scores.slopes_H.to(wide)[:, None, None]
        a, s = a + slopes * torch.arange(-prefix, 0), s + slopes * scores.positions_BT[:, None, None].to(wide)
    see = prefix_visible(scores, queries, prefix, q.device)
    a = a if see is None else a.masked_fill(~see, -torch.inf)
    s = s.masked_fill(~visible(scores, queries, keys, q.device), -torch.inf)
    mask = [a, s] if sinks is None else [a, s, sinks.to(wide)[:, None, None].expand(*shape, 1)]
    rows = [[pk.expand(batch, -1, -1, -1), k], [pv.expand(batch, -1, -1, -1), v]]
    if sinks is not None:
        rows = [[*each, torch.zeros_like(each[0][:, :, :1])] for each in rows]
    k, v = (torch.cat(each, 2).repeat_interleave(heads // each[0].shape[1], 1) for each in rows)
    mask = torch.cat(mask, -1).to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale)


def _gated_sdpa(problem: AttentionProblem, leaves: dict) -> Tensor:
    ungated = dataclasses.replace(problem, gate=None)
    alone = {**leaves, **{name: leaves[name][..., :0, :] for name in ("prefix_key", "prefix_value")}}
    by_hand = problem.options.get("softcap") is not None
    own = _reference(ungated, alone, None, 0.0) if by_hand else sdpa(ungated, alone)
    q, _, _, pk, pv, *_ = _tensors(leaves)
    pk, pv = (t.expand(len(q), -1, -1, -1) for t in (pk, pv))
    scale = problem.options.get("scale")
    of = torch.nn.functional.scaled_dot_product_attention(q, pk, pv, scale=scale, enable_gqa=True)
    return (own + leaves["gate"].view(-1, 1, 1) * of).to(own.dtype)


def plain_attention(
    query, key, value, prefix_key, prefix_value, gate=None, *, bias=None, prefix_bias=None, sinks=None, dropout=0.0,
    training=False, patched_backend=None, by_sdpa=False, **options,
) -> Tensor:  # fmt: skip
    """The definition behind the signatures of `prefix_attention` and `gated_prompt_attention`, for autograd, in the
    tensors' dtype; `by_sdpa`: SDPA where it serves the call. Dropout is refused."""
    assert not (training and dropout), "there is no mask to share"
    five = (query, key, value, prefix_key, prefix_value)
    problem = AttentionProblem(*five, query, bias, prefix_bias, sinks, gate, options={"causal": True, **options})
    leaves = {name: getattr(problem, name) for name in GRADIENTS}
    if by_sdpa and (options.get("softcap") is None or gate is not None):
        return sdpa(problem, leaves)
    return _reference(problem, leaves, None, 0.0)


def op_dropout(problem: AttentionProblem) -> tuple[Tensor | None, float]:
    """The mask (B, H, S, P + T) that the op would draw now, and its exact probability of dropping."""
    if not problem.dropout:
        return None, 0.0
    tensors, scores = _tensors({name: getattr(problem, name) for name in GRADIENTS}), _scores(problem)
    triton = prefix_attention_plan(tensors, scores, problem.dropout) is not None
    path, q, keys = _path(triton), problem.query, problem.key.shape[2]
    prefix = problem.prefix_key.shape[-2] if problem.gate is None or triton else 0
    keep = path.keep_mask(path.draw_seed(q), problem.dropout, *q.shape[:3], prefix, keys, q.device)
    if problem.gate is not None:  # a prompt's weights are never dropped
        keep = keep[..., prefix:]
    return keep, round(problem.dropout * 65536) / 65536 if triton else problem.dropout


def outcome(function, problem: AttentionProblem, wanted: Sequence[str], dtype: torch.dtype | None = None) -> dict:
    """{"out": result, "dquery": gradient, ...} of function(problem, leaves), in `dtype` or as given."""
    leaves = {name: getattr(problem, name) for name in GRADIENTS}
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(name in wanted)
        for name, t in leaves.items()
    }
    out = function(problem, leaves)
    if not wanted:
        return {"out": out}
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], problem.dout.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": t for name, t in zip(wanted, gradients, strict=True)}}


def _op_outcome(problem: AttentionProblem, wanted: Sequence[str], seed: int) -> tuple[dict, Tensor | None, float]:
    """Of the op; and the mask that it draws, and its probability of dropping."""
    with torch.random.fork_rng([problem.query.device] if problem.query.is_cuda else []):
        seed_generators(seed, problem.query.device)
        keep, p = op_dropout(problem)
        seed_generators(seed, problem.query.device)
        return outcome(_op, problem, wanted), keep, p


def attention_outcomes(
    problem: AttentionProblem, wanted: Sequence[str], seed: int = 0, eager=None
) -> tuple[dict, dict, dict]:
    """Of the op, of its reference in the same dtypes (or of `eager`) and in float64, with the mask that the op draws:
    {"out": result, "dquery": gradient, ...}. Runs on the backend in force, and leaves torch's generators as they were.
    """
    got, keep, p = _op_outcome(problem, wanted, seed)

    def reference(problem, leaves):
        return _reference(problem, leaves, keep, p)

    return got, outcome(eager or reference, problem, wanted), outcome(reference, problem, wanted, torch.float64)


def _references(
    problems: Sequence[AttentionProblem], wanted: Sequence[str], keeps: Sequence[Tensor | None], p: float, dtype=None
) -> dict:
    """Of the reference, of all draws at once: {"out": results, ...} with a dimension for the draws in front."""
    first = problems[0]
    given = {name: torch.stack([getattr(problem, name) for problem in problems]) for name in first.present()}
    given = {name: t.to(dtype or t.dtype).requires_grad_(name in wanted) for name, t in given.items()}
    masks = {name for name, option in first.options.items() if isinstance(option, Tensor)}
    masks = {name: torch.stack([problem.options[name] for problem in problems]) for name in masks}
    keep = None if keeps[0] is None else torch.stack(list(keeps))

    def reference(given, masks, keep):
        leaves = {name: given.get(name) for name in GRADIENTS}
        return _reference(dataclasses.replace(first, **leaves, options=first.options | masks), leaves, keep, p)

    out = torch.vmap(reference, in_dims=(0, 0, None if keep is None else 0))(given, masks, keep)
    if not wanted:
        return {"out": out}
    dout = torch.stack([problem.dout for problem in problems]).to(out.dtype)
    gradients = torch.autograd.grad(out, [given[name] for name in wanted], dout)
    return {"out": out.detach(), **{f"d{name}": t for name, t in zip(wanted, gradients, strict=True)}}


def _stacked(outcomes: Sequence[dict]) -> dict:
    return {name: torch.stack([each[name] for each in outcomes]) for name in outcomes[0]}


def attention_draws(problems: Sequence[AttentionProblem], wanted: Sequence[str], eager=None) -> tuple[dict, dict, dict]:
    """`attention_outcomes` of problems of one shape and the same modifiers, with their places as seeds: in every tensor
    a dimension for the draws in front."""
    got, keeps, (p, *_) = zip(*(_op_outcome(each, wanted, seed) for seed, each in enumerate(problems)), strict=True)

    def references(dtype=None) -> dict:
        starts = range(0, len(problems), AT_ONCE)
        pieces = [(problems[i : i + AT_ONCE], wanted, keeps[i : i + AT_ONCE], p, dtype) for i in starts]
        found = [_references(*piece) for piece in pieces]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    beside = references() if eager is None else _stacked([outcome(eager, problem, wanted) for problem in problems])
    return _stacked(got), beside, references(torch.float64)


def attention_differences(
    problems: Sequence[AttentionProblem], wanted: Sequence[str] | None = None, eager=None
) -> list[Difference]:
    """How far the result and its gradients, all or those `wanted`, are from the truth, pooled over problems of one
    shape and the same modifiers, beside the materialised reference, or `eager` (`sdpa`)."""
    wanted = problems[0].present() if wanted is None else wanted
    draws = attention_draws(problems, wanted, eager)
    return [compare(name, *(each[name] for each in draws)) for name in draws[0]]
