"""`gated_prompt_attention` in plain torch: `prefix_attention` twice, without virtual keys and without real ones."""

import torch
from torch import Tensor

from fastpeft.ops import _prefix_attention_torch as attention
from fastpeft.ops._prefix_attention_scores import Tensors, of_prompt, of_sequence

draw_seed, keep_mask = attention.draw_seed, attention.keep_mask


def forward(tensors: Tensors, gate: Tensor, call, seed) -> tuple[Tensor, Tensor, Tensor]:
    """(out, the sequence's own out and L): gate (1,) or (H,)."""
    own, own_lse = attention.forward(of_sequence(tensors), call, seed)
    of, _ = attention.forward(*_prompt(tensors, call), None)
    gate = gate.to(torch.promote_types(gate.dtype, own.dtype)).view(-1, 1, 1)
    return torch.addcmul(own.to(gate.dtype), gate, of.to(gate.dtype)).to(own.dtype), own, own_lse


def backward(dout, tensors: Tensors, gate, own, own_lse, call, seed, needs: Tensors, need_gate: bool):
    """(dgate, the gradients of `Tensors`), None where not needed."""
    needs = Tensors(*map(bool, needs))
    grads = [None] * len(tensors)
    if any((*needs[:3], needs.bias_BHST, needs.sinks_H)):
        of = needs._replace(pk_BGPD=False, pv_BGPD=False)
        grads = list(attention.backward(dout, of_sequence(tensors), own, own_lse, call, seed, of))
    dgate = None
    if need_gate or needs.q_BHSD or needs.pk_BGPD or needs.pv_BGPD:
        prompt, prompt_call = _prompt(tensors, call)
        out, lse = attention.forward(prompt, prompt_call, None)
        if need_gate:
            dgate = _gate_gradient(dout, out, gate)
        if needs.q_BHSD or needs.pk_BGPD or needs.pv_BGPD:
            gated = (dout * gate.view(-1, 1, 1)).to(dout.dtype)
            only = Tensors(needs.q_BHSD, False, False, needs.pk_BGPD, needs.pv_BGPD, None, None, None)
            dq, _, _, *dprompt, _, _, _ = attention.backward(gated, prompt, out, lse, prompt_call, None, only)
            grads[3:5] = dprompt
            if needs.q_BHSD:
                grads[0] = grads[0].add_(dq)
    return dgate, *grads


def _prompt(tensors: Tensors, call):
    return of_prompt(tensors), call._replace(scores=call.scores.of_prompt(), dropout=0.0)


def _gate_gradient(dout, out, gate) -> Tensor:
    wide = torch.promote_types(dout.dtype, torch.float32)
    by_head = (dout.to(wide) * out.to(wide)).sum(-1).sum((0, 2))
    return (by_head if len(gate) > 1 else by_head.sum(0, keepdim=True)).view(gate.shape).to(gate.dtype)
