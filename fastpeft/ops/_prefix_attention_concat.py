"""`prefix_attention` by the vendor's flash alone (design C): the prefix in front of the keys, and a causal mask that
ends at the bottom right.

Keys and values are copied, for the forward pass and again for backward, which keeps neither copy.
"""

import torch
from torch import Tensor

from fastpeft.ops import _vendor_flash as vendor
from fastpeft.ops._prefix_attention_scores import Scores, Tensors


def joined(prefix: Tensor, sequence: Tensor) -> Tensor:
    """[B, G, P + T, D] of [B or 1, G, P, D] and [B, G, T, D], stored heads last but one."""
    batch, heads, keys, depth = sequence.shape
    out = sequence.new_empty(batch, prefix.shape[2] + keys, heads, depth)
    both = (prefix.expand(batch, -1, -1, -1), sequence)
    return torch.cat([t.transpose(1, 2) for t in both], 1, out=out).transpose(1, 2)


def forward(tensors: Tensors, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out [B, H, S, D], stored heads last but one; L [B, H, S] in fp32, natural, contiguous)."""
    q, k, v, pk, pv, *_ = tensors
    out, lse = vendor.forward(q, joined(pk, k), joined(pv, v), scores.causal, scores.scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def backward(dout: Tensor, tensors: Tensors, out: Tensor, lse: Tensor, scores: Scores, needs: Tensors) -> tuple:
    """The gradients of `Tensors`, None where not needed."""
    if not any(needs):
        return (None,) * len(tensors)
    q, k, v, pk, pv, *_ = tensors
    dq, dk, dv = vendor.backward(dout, q, joined(pk, k), joined(pv, v), out, lse, scores.causal, scores.scale)
    prefix = pk.shape[2]
    return (
        dq if needs.q_BHSD else None,
        dk[:, :, prefix:] if needs.k_BGTD else None,
        dv[:, :, prefix:] if needs.v_BGTD else None,
        _of_prefix(dk, pk) if needs.pk_BGPD else None,
        _of_prefix(dv, pv) if needs.pv_BGPD else None,
        *(None, None, None),
    )


def _of_prefix(gradient: Tensor, prefix: Tensor) -> Tensor:
    """Of the first P rows, in storage of its own; summed in fp32 over a batch that shares the prefix."""
    rows = gradient[:, :, : prefix.shape[2]]
    if len(rows) == len(prefix):
        return rows.clone(memory_format=torch.contiguous_format)
    return rows.sum(0, keepdim=True, dtype=torch.float32).to(prefix.dtype)
