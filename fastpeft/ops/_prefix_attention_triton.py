"""`prefix_attention` on the Triton kernels or the vendor's, by the plan of `dispatch.prefix_attention_plan`.

fused: the kernels do everything (design A). merge: the vendor's flash does the sequence, a kernel merges the prefix
into its result, and in backward the vendor is given the merged result and L, with which its own formulas are exact
(design B). concat: no kernel of ours, see `_prefix_attention_concat` (design C). decode: kernels for one query a
sample; its gradients are those of fused.
"""

import torch

from fastpeft.kernels import _prefix_attention_decode as decode
from fastpeft.kernels import prefix_attention as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.ops import _prefix_attention_concat as concat
from fastpeft.ops import _vendor_flash as vendor
from fastpeft.ops._lora_linear_triton import draw_seed as draw_seed
from fastpeft.ops._lora_linear_triton import honoured as honoured
from fastpeft.ops._lora_linear_triton import keep_mask as rows_of_mask


def _dropout(seed, p) -> Dropout | None:
    return None if seed is None else Dropout(seed, p)


def keep_mask(seed, p: float, batch: int, heads: int, queries: int, prefix: int, keys: int, device) -> torch.Tensor:
    """(B, H, S, P + T) booleans: the mask that the kernels generate, element by element."""
    start = kernels.mask_start(prefix)
    mask = rows_of_mask(seed, p, batch * heads * queries, start + keys, device).view(batch, heads, queries, -1)
    return torch.cat((mask[..., :prefix], mask[..., start:]), -1)


def forward(tensors, call, seed):
    """(out (B, H, S, D) over (B, S, H, D) storage, L (B, H, S) in fp32, or what the kernels keep of fp32 data)."""
    if call.plan.forward == "concat":
        return concat.forward(tensors, call.scores)
    if call.plan.forward == "decode":
        return decode.forward(tensors, call.scores)
    if call.plan.forward == "merge":
        q, k, v, *_ = tensors
        own = vendor.forward(q, k, v, call.scores.causal, call.scores.scale)
        return kernels.forward(tensors, call.scores, sequence=False, first=own)
    return kernels.forward(tensors, call.scores, _dropout(seed, call.dropout))


def backward(dout, tensors, out, lse, call, seed, needs):
    """The gradients of `Tensors`, None where not needed."""
    if call.plan.forward == "concat":
        return concat.backward(dout, tensors, out, lse, call.scores, needs)
    dropout, scores, merged = _dropout(seed, call.dropout), call.scores, call.plan.forward == "merge"
    q, k, v, *_ = tensors
    before = dk = dv = dpk = dpv = dbias = dpbias = dsinks = None
    if merged and (needs.q_BHSD or needs.k_BGTD or needs.v_BGTD):
        natural = kernels.natural_lse(lse)
        before, dk, dv = vendor.backward(dout, q, k, v, out, natural, scores.causal, scores.scale)
    delta, dq = kernels.grad_query(
        dout, out, lse, tensors, scores, dropout, wanted=needs.q_BHSD, sequence=not merged, before=before
    )
    given = (dout, lse, delta, tensors, scores, dropout)
    if not merged and (needs.k_BGTD or needs.v_BGTD):
        dk, dv = kernels.grad_keys(*given, prefix=False)
    if needs.pk_BGPD or needs.pv_BGPD:
        dpk, dpv = kernels.grad_keys(*given, prefix=True)
    if needs.bias_BHST:
        dbias = kernels.grad_bias(*given, prefix=False)
    if needs.pbias_BHSP:
        dpbias = kernels.grad_bias(*given, prefix=True)
    if needs.sinks_H:
        dsinks = grad_sinks(tensors.sinks_H, lse, delta)
    gradients = (dq, dk, dv, dpk, dpv, dbias, dpbias, dsinks)
    return tuple(each if need else None for each, need in zip(gradients, needs, strict=True))


def grad_sinks(sinks, lse, delta):
    """-Σ exp(sink - L) δ, where a row saw something at all; for fp32 data `lse` is two numbers for each row."""
    lse, share = (lse, 1.0) if lse.ndim == 3 else lse
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.float()[:, None] - lse) * share)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
