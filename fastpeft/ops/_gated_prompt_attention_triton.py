"""`gated_prompt_attention` on the Triton kernels: the sequence by them or by the vendor's flash, then the prompt.

Nothing of the prompt's softmax is kept for backward: the kernel of dq makes it again, and dgate with it.
"""

from fastpeft.kernels import prefix_attention as kernels
from fastpeft.ops import _prefix_attention_triton as attention
from fastpeft.ops import _vendor_flash as vendor

draw_seed, keep_mask = attention.draw_seed, attention.keep_mask


def forward(tensors, gate, call, seed):
    """(out, the sequence's own out, and what is kept of its softmax); gate (1,) or (H,)."""
    q, k, v, *_ = tensors
    scores, dropout = call.scores, attention._dropout(seed, call.dropout)
    if call.plan.forward == "merge":
        own = vendor.forward(q, k, v, scores.causal, scores.scale)
        own, lse = kernels.forward(tensors, scores, prefix=False, sequence=False, first=own)  # with the sinks
    else:
        own, lse = kernels.forward(tensors, scores, dropout, prefix=False)
    gates = _for_every_head(gate, q)
    out, _ = kernels.forward(tensors, scores.of_prompt(), sequence=False, first=(own, None), gate=gates)
    return out, own, lse


def backward(dout, tensors, gate, own, lse, call, seed, needs, need_gate: bool):
    """(dgate, the gradients of `Tensors`), None where not needed."""
    q, k, v, *_ = tensors
    scores, dropout = call.scores, attention._dropout(seed, call.dropout)
    dq = dk = dv = dpk = dpv = dbias = dsinks = delta = None
    if call.plan.forward == "merge":
        if needs.q_BHSD or needs.k_BGTD or needs.v_BGTD:
            natural = kernels.natural_lse(lse)
            dq, dk, dv = vendor.backward(dout, q, k, v, own, natural, scores.causal, scores.scale)
        if needs.sinks_H:
            alone = {"prefix": False, "sequence": False}  # δ from own
            delta, _ = kernels.grad_query(dout, own, lse, tensors, scores, wanted=False, **alone)
    elif any((*needs[:3], needs.bias_BHST, needs.sinks_H)):
        delta, dq = kernels.grad_query(dout, own, lse, tensors, scores, dropout, wanted=needs.q_BHSD, prefix=False)
        given = (dout, lse, delta, tensors, scores, dropout)
        if needs.k_BGTD or needs.v_BGTD:
            dk, dv = kernels.grad_keys(*given, prefix=False)
        if needs.bias_BHST:
            dbias = kernels.grad_bias(*given, prefix=False)
    if needs.sinks_H:
        dsinks = attention.grad_sinks(tensors.sinks_H, lse, delta)
    dgate = None
    if need_gate or needs.q_BHSD or needs.pk_BGPD or needs.pv_BGPD:
        prompt, gates = scores.of_prompt(), _for_every_head(gate, q)
        lse, delta, dq = kernels.grad_gated_query(dout, tensors, prompt, gates, wanted=needs.q_BHSD, before=dq)
        dgate = delta.sum((0, 2)).to(gate.dtype) if len(gate) > 1 else delta.sum().to(gate.dtype)[None]
        if needs.pk_BGPD or needs.pv_BGPD:
            dpk, dpv = kernels.grad_keys(dout, lse, delta, tensors, prompt, prefix=True, gate=gates)
    gradients = (dq, dk, dv, dpk, dpv, dbias, None, dsinks)
    return dgate if need_gate else None, *(g if need else None for g, need in zip(gradients, needs, strict=True))


def _for_every_head(gate, q):
    return gate.expand(q.shape[1]).contiguous()
