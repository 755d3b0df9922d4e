"""How large the sums are of which attention's result and gradients are made: the error analysis behind the properties.

In the letters of `fastpeft.ops.prefix_attention`, with the magnitude of every factor in its place. A score that is
wrong by ε makes a weight wrong by ε times the weight, so scores count with their own magnitude.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops._prefix_attention_scores import Scores, Tensors, of_prompt, of_sequence
from fastpeft.ops.prefix_attention import prefix_attention_reference


class Softmax(NamedTuple):
    """One softmax over virtual and real keys in float64. keep: 0, or 1 / (1 - p), for each weight."""

    tensors: Tensors
    scores: Scores
    keep: Tensor | float


def weights_of(of: Softmax) -> Tensor:
    """(B, H, S, P + T), as the definition gives them of values that are the unit vectors."""
    q, k, _, pk, *rest = of.tensors
    prefix, keys = pk.shape[2], k.shape[2]
    unit = torch.eye(prefix + keys, dtype=q.dtype)
    pv, v = (rows.expand(*like.shape[:2], -1, -1) for rows, like in ((unit[:prefix], pk), (unit[prefix:], k)))
    return prefix_attention_reference(Tensors(q, k, v, pk, pv, *rest[1:]), of.scores)


def largest_score(of: Softmax) -> float:
    """What a score is made of at the most."""
    q, k, _, pk, _, *extras = of.tensors
    depth = q.shape[3]
    rows = [t.abs().amax() for t in (k, pk) if t.numel()]
    total = abs(of.scores.scale) * depth * float(q.abs().amax() * max(rows)) if q.numel() and rows else 0.0
    total += sum(float(t.abs().amax()) for t in extras if t is not None and t.numel())
    if of.scores.slopes_H is not None:
        positions = [pk.shape[2], *of.scores.positions_BT.abs().flatten().tolist()]
        total += float(of.scores.slopes_H.abs().max()) * max(positions)
    return total


def _over_keys(matrix: Tensor, shape: torch.Size) -> Tensor:
    """(B, H, n, D) added up over a group's heads, and over the batch where it is shared."""
    grouped = matrix.unflatten(1, (shape[1], matrix.shape[1] // shape[1])).sum(2)
    return grouped if len(grouped) == shape[0] else grouped.sum(0, keepdim=True)


def sizes_of(of: Softmax, dout: Tensor) -> dict[str, Tensor]:
    """Of the result and every gradient, by the names of the op's arguments."""
    q, k, v, pk, pv, *extras = of.tensors
    group, prefix = q.shape[1] // k.shape[1], pk.shape[2]
    q, dout, scale = q.abs(), dout.abs(), abs(of.scores.scale)
    keys, values = (
        torch.cat([t.abs().expand(len(q), -1, -1, -1) for t in pair], 2).repeat_interleave(group, 1)
        for pair in ((pk, k), (pv, v))
    )
    weights = weights_of(of)
    kept = weights * of.keep
    out = kept @ values
    delta = (dout * out).sum(-1, keepdim=True)
    u = kept * (dout @ values.transpose(-1, -2)) + weights * delta
    dk, dv = scale * u.transpose(-1, -2) @ q, kept.transpose(-1, -2) @ dout
    found = {"out": out, "dquery": scale * u @ keys}
    for key, value, columns, like in (("key", "value", slice(prefix, None), k), (
            "prefix_key", "prefix_value", slice(0, prefix), pk)):  # fmt: skip
        found[f"d{key}"] = _over_keys(dk[:, :, columns], like.shape)
        found[f"d{value}"] = _over_keys(dv[:, :, columns], like.shape)
    bias, prefix_bias, sinks = extras
    for name, extra, part in (("bias", bias, u[..., prefix:]), ("prefix_bias", prefix_bias, u[..., :prefix])):
        if extra is not None:
            found[f"d{name}"] = part.sum_to_size(extra.shape)
    if sinks is not None:
        found["dsinks"] = ((1 - weights.sum(-1)).clamp(0, 1) * delta[..., 0]).sum((0, 2))
    return found


def gated_sizes_of(of: Softmax, gate: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """The sequence's, and what the prompt's softmax behind its gate adds to them."""
    found = sizes_of(of._replace(tensors=of_sequence(of.tensors)), dout)
    factor = gate.abs().view(-1, 1, 1)
    prompt = Softmax(of_prompt(of.tensors), of.scores.of_prompt(), 1.0)
    own = sizes_of(prompt, dout * factor)
    by_head = (dout.abs() * sizes_of(prompt, dout)["out"]).sum((0, 2, 3))
    found |= {name: own[name] for name in ("dprefix_key", "dprefix_value")}
    found["out"] = found["out"] + factor * own["out"]
    found["dquery"] = found["dquery"] + own["dquery"]
    found["dgate"] = (by_head if gate.numel() > 1 else by_head.sum()).reshape(gate.shape)
    return found
