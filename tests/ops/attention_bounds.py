"""Between which two forms of eager attention NaN and infinities in an attention op must lie.

Eager's own forms differ by where 0 times NaN is still computed. `each_alone`: a query with the keys it sees and no
others; what is not finite there must not be finite in the op, so that nothing is hidden. `all_at_once`: one product
with all keys under a mask of -inf that is added; what is finite there must be finite in the op, so that nothing spreads
to other samples or heads. Without a mask the two are one.
"""

import torch
from torch import Tensor

from fastpeft.attention_oracle import AttentionProblem, _scores, _tensors
from fastpeft.ops import gated_prompt_attention_reference, prefix_attention_reference
from fastpeft.ops._prefix_attention_scores import Scores, Tensors, of_prompt, prefix_visible, visible
from fastpeft.oracle import _kind


def _attention(tensors: Tensors, scores: Scores, gate: Tensor | None) -> Tensor:
    """The definition, where either set of keys may be empty."""
    if gate is None:
        empty = tensors.k_BGTD.shape[2] + tensors.pk_BGPD.shape[2] == 0
        return torch.zeros_like(tensors.q_BHSD) if empty else prefix_attention_reference(tensors, scores)
    if tensors.k_BGTD.shape[2]:
        return gated_prompt_attention_reference(tensors, gate.view(-1), scores)
    return gate.view(-1, 1, 1) * prefix_attention_reference(of_prompt(tensors), scores.of_prompt())


def _unmasked(scores: Scores, **changes) -> Scores:
    return scores._replace(causal=False, window=None, padding_BT=None, segments_BT=None, local_BT=None, **changes)


def _masks(tensors: Tensors, scores: Scores, gated: bool) -> tuple[Tensor, Tensor]:
    """(B, S, T) and (B, S, P) booleans, True where a query sees a key."""
    (batch, _, queries, _), keys, prefix = tensors.q_BHSD.shape, tensors.k_BGTD.shape[2], tensors.pk_BGPD.shape[2]
    see = visible(scores, queries, keys, "cpu").expand(batch, 1, -1, -1)[:, 0]
    of_prefix = None if gated else prefix_visible(scores, queries, prefix, "cpu")
    if of_prefix is None:
        return see, torch.ones(batch, queries, prefix, dtype=torch.bool)
    return see, of_prefix.expand(batch, 1, -1, -1)[:, 0]


def all_at_once(problem: AttentionProblem, leaves: dict) -> Tensor:
    tensors, scores, gate = _tensors(leaves), _scores(problem), leaves["gate"]
    added = [torch.where(see, 0.0, -torch.inf)[:, None] for see in _masks(tensors, scores, gate is not None)]
    biases = (tensors.bias_BHST, None if gate is not None else tensors.pbias_BHSP)
    bias, pbias = (mask if own is None else own + mask for own, mask in zip(biases, added, strict=True))
    return _attention(tensors._replace(bias_BHST=bias, pbias_BHSP=pbias), _unmasked(scores), gate)


def each_alone(problem: AttentionProblem, leaves: dict) -> Tensor:
    tensors, scores, gate = _tensors(leaves), _scores(problem), leaves["gate"]
    see, of_prefix = _masks(tensors, scores, gate is not None)
    batch, _, queries, _ = tensors.q_BHSD.shape
    q, k, v, pk, pv, bias, pbias, sinks = tensors

    def own(t: Tensor | None, b: int) -> Tensor | None:
        return t if t is None or len(t) == 1 else t[b : b + 1]

    rows = []
    for b in range(batch):
        for i in range(queries):
            keys, virtual = see[b, i].nonzero()[:, 0], of_prefix[b, i].nonzero()[:, 0]
            alone = Tensors(
                q[b : b + 1, :, i : i + 1],
                *(own(t, b)[:, :, keys] for t in (k, v)),
                *(own(t, b)[:, :, virtual] for t in (pk, pv)),
                None if bias is None else own(bias, b)[:, :, i : i + 1, keys],
                None if pbias is None else own(pbias, b)[:, :, i : i + 1, virtual],
                sinks,
            )
            positions = None if scores.positions_BT is None else scores.positions_BT[b : b + 1, keys]
            rows.append(_attention(alone, _unmasked(scores, positions_BT=positions), gate))
    return torch.cat(rows).unflatten(0, (batch, queries)).squeeze(3).transpose(1, 2)


def faults_of(got: dict, alone: dict, together: dict) -> list[str]:
    """What breaks a bound, in words. In the result NaN and infinities are told apart; in gradients they are not, where
    infinities may cancel in δ."""
    found = []
    for name, t in got.items():
        ours, low, high = _kind(t), _kind(alone[name]), _kind(together[name])
        if name != "out":
            ours, low, high = (kind != 0 for kind in (ours, low, high))
        if hidden := int(((ours == 0) & (low != 0)).sum()):
            found.append(f"{name}: {hidden} elements are finite that are not")
        if spread := int(((ours != 0) & (high == 0)).sum()):
            found.append(f"{name}: {spread} finite elements are not")
        if other := int(((ours != 0) & (low == high) & (low != 0) & (ours != low)).sum()):
            found.append(f"{name}: {other} elements are NaN for infinite or the reverse")
    return found
