"""Attention over a learned prefix and a sequence, which are never put next to each other (prefix tuning, Li & Liang,
arXiv 2101.00190; the softmax over two sets of keys is merged as in FlashAttention, arXiv 2205.14135, section 3.1):

    a = cap(scale·q Kpᵀ) + slope·(j - P) + prefix_bias            the prefix's scores, P virtual keys
    s = cap(scale·q Kᵀ) + slope·position(j) + bias                the sequence's, where the masks allow
    L = log(Σ exp a + Σ exp s + exp sink)        out = Σ exp(a - L) Vp + Σ exp(s - L) V

with cap(z) = softcap·tanh(z / softcap) where there is one. A row that sees nothing gives zeros, and L = -inf.

With p = exp(score - L), δ = Σ dout∘out and u = p∘(dout Vᵀ - δ), in either region:

    dV = pᵀ dout      dbias = u      dK = scale·(u∘cap')ᵀ q      dq = scale·Σ (u∘cap') K      dsink = -Σ exp(sink - L) δ

The prefix's gradients are summed over the batch, where it is shared, and over the heads of a group, in fixed order.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.dispatch import Plan, prefix_attention_plan
from fastpeft.errors import OpError
from fastpeft.fallback import is_demanded, kernels_or_torch, mask_of_kernels
from fastpeft.ops import _prefix_attention_torch as torch_path
from fastpeft.ops._autocast import autocast_dtype, without_autocast
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops._prefix_attention_scores import (
    Scores,
    Tensors,
    check_tensors,
    make_scores,
    prefix_visible,
    visible,
)

# Letters of the shape suffixes in this file: B batch, H query heads, G key/value heads, S queries, T keys, P virtual
# keys, D head dimension.


def prefix_attention_reference(tensors: Tensors, scores: Scores, keep: Tensor | None = None, p: float = 0.0) -> Tensor:
    """The definition, for autograd, as eager attention computes it: products in the tensors' dtype, the softmax in fp32
    (or float64). keep: (B, H, S, P + T), where dropout leaves a weight, or None."""
    q, k, v, pk, pv, bias, pbias, sinks = tensors
    (_, heads, queries, _), keys, prefix = q.shape, k.shape[2], pk.shape[2]
    k, v, pk, pv = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v, pk, pv))
    wide = torch.promote_types(q.dtype, torch.float32)

    def score(keys_of, extra, positions):
        s = (q @ keys_of.transpose(-1, -2)).to(wide) * scores.scale
        if scores.softcap is not None:
            s = scores.softcap * torch.tanh(s / scores.softcap)
        if scores.slopes_H is not None:
            s = s + scores.slopes_H.to(wide)[:, None, None] * positions.to(wide)[:, None, None, :]
        return s if extra is None else s + extra.to(wide)

    a = score(pk, pbias, torch.arange(-prefix, 0, device=q.device)[None])
    s = score(k, bias, scores.positions_BT)
    see = prefix_visible(scores, queries, prefix, q.device)
    a = a if see is None else a.masked_fill(~see, -torch.inf)
    s = s.masked_fill(~visible(scores, queries, keys, q.device), -torch.inf)
    weights = softmax(torch.cat((a, s), -1), None if sinks is None else sinks.to(wide)[:, None, None])
    if keep is not None:
        weights = weights * keep / (1 - p)
    weights = weights.to(q.dtype)
    return weights[..., :prefix] @ pv + weights[..., prefix:] @ v


def softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Over the last dimension, beside a sink that takes its share; zeros where nothing is visible."""
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak if sink is None else torch.maximum(peak, sink.detach())
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink - peak)
    return weights / total.masked_fill(total == 0, 1.0)


class Call(NamedTuple):
    """What a call computes besides its tensors; `plan` is None on the torch path. The last two as in `lora_linear`."""

    scores: Scores
    dropout: float
    plan: Plan | None
    demanded: bool = False
    fell_back: bool = False


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _prefix_attention_triton as triton_path

    return triton_path


class PrefixAttentionFunction(torch.autograd.Function):
    """Tensors as in `Tensors`; all reshaping, casting and choosing is before `apply`. Saved for backward: the tensors,
    the result, and L, one number for each row and head."""

    @staticmethod
    def forward(ctx, call: Call, *tensors):
        seed = _path(call.plan is not None).draw_seed(tensors[0]) if call.dropout else None
        with without_autocast(tensors[0]):
            out_BHSD, lse_BHS, call = run_forward(Tensors(*tensors), call, seed)
        ctx.save_for_backward(*tensors, out_BHSD, lse_BHS, seed)
        ctx.call = call
        return out_BHSD

    @staticmethod
    @first_order
    def backward(ctx, dout_BHSD):
        *tensors, out_BHSD, lse_BHS, seed = ctx.saved_tensors
        needs = Tensors(*ctx.needs_input_grad[1:])
        with without_autocast(dout_BHSD):
            gradients = run_backward(dout_BHSD, Tensors(*tensors), out_BHSD, lse_BHS, ctx.call, seed, needs)
        return None, *gradients


def run_forward(tensors: Tensors, call: Call, seed: Tensor | None):
    """(out, what is kept of the softmax, the call as it was served) on the backend that `call.plan` stands for."""
    if call.plan is None:
        return *torch_path.forward(tensors, call, seed), call
    (out, lse), by_kernels = kernels_or_torch(
        lambda: kind_of("prefix_attention", "forward", tensors, call),
        call.demanded,
        lambda: _path(True).forward(tensors, call, seed),
        lambda: torch_path.forward(tensors, call, mask_of(tensors, call, seed, False)),
    )
    return out, lse, call if by_kernels else call._replace(fell_back=True)


def run_backward(dout: Tensor, tensors: Tensors, out, lse, call: Call, seed: Tensor | None, needs: Tensors):
    """The gradients of `Tensors`, None where not needed. What the kernels have kept of the softmax is theirs alone: the
    torch path in their place makes it again."""

    def by_torch_as_kernels():
        kept = out, lse
        if not call.fell_back:
            kept = torch_path.forward(tensors, call, mask_of(tensors, call, seed, True))
        mask = mask_of(tensors, call, seed, not call.fell_back)
        return torch_path.backward(dout, tensors, *kept, call, mask, needs)

    if call.plan is None:
        return torch_path.backward(dout, tensors, out, lse, call, seed, needs)
    if call.fell_back:
        return by_torch_as_kernels()
    return kernels_or_torch(
        lambda: kind_of("prefix_attention", "backward", tensors, call),
        call.demanded,
        lambda: _path(True).backward(dout, tensors, out, lse, call, seed, needs),
        by_torch_as_kernels,
    )[0]


def kind_of(op: str, phase: str, tensors: Tensors, call: Call) -> tuple:
    """What an attention op's kernels are compiled for, in words."""
    q, k = tensors.q_BHSD, tensors.k_BGTD
    heads = f"{q.shape[1]} heads of {q.shape[3]}, {k.shape[1]} of keys, {tensors.pk_BGPD.shape[2]} virtual keys"
    given = {**tensors._asdict(), **call.scores._asdict(), "dropout": call.dropout or None}
    names = ("bias_BHST", "pbias_BHSP", "sinks_H", "padding_BT", "segments_BT", "slopes_H", "window", "softcap")
    more = [name.partition("_")[0] for name in (*names, "dropout") if given[name] is not None]
    return op, phase, q.device, heads, q.dtype, f"causal {call.scores.causal}", call.plan.forward, *more


def mask_of(tensors: Tensors, call: Call, seed: Tensor | None, needed: bool, prefix: bool = True):
    """What the torch path drops in the place of the kernels: as they do, if they can say, which may be `needed`.
    Without `prefix` of the sequence's weights alone."""
    if seed is None:
        return None
    (batch, heads, queries, _), device = tensors.q_BHSD.shape, tensors.q_BHSD.device
    count, path, kind = tensors.pk_BGPD.shape[2], _path(True), ("attention", "dropout", device)
    sizes = (batch, heads, queries, count, tensors.k_BGTD.shape[2])
    mask = mask_of_kernels(kind, needed, lambda: path.keep_mask(seed, call.dropout, *sizes, device))
    if mask is None:
        return seed
    return torch_path.given_mask(mask if prefix else mask[..., count:], path.honoured(call.dropout))


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    query_start: int | None = None,
    bias: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_positions: Tensor | None = None,
    sliding_window: int | None = None,
    prefix_window: str = "slide",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    patched_backend: str | None = None,
) -> Tensor:
    """softmax over P virtual keys and T real ones, with the gradients of every tensor that wants one.

    Args:
        query: (B, H, S, D), any strides; fp32, fp16 or bf16 (fp64 on the torch backend). D up to 256.
        key, value: (B, Hkv, T, D), H a multiple of Hkv; query's dtype.
        prefix_key, prefix_value: (Hkv, P, D), shared by the batch, or (B, Hkv, P, D); query's dtype. Under autocast
            all five may have any floating-point dtype.
        causal: query i sees key j if j <= query_start + i; of the prefix it sees all.
        scale: of the scores; D ** -0.5 by default.
        padding_mask: (B, T) bool, True where there is a token. The prefix is never padded.
        segment_ids: (B, T) integers; a query sees the keys of its own segment, and the prefix. Packed sequences.
        query_start: the key position of query 0; T - S by default.
        bias: added to the scores of the real keys, broadcastable to (B, H, S, T).
        prefix_bias: likewise for the virtual keys, broadcastable to (B, H, S, P).
        alibi_slopes: (H,); slope times position is added, where virtual key j is at j - P.
        key_positions: (B, T), where a key stands behind the prefix, for ALiBi and for windows that slide over the
            prefix; by default the count of tokens before for ALiBi, the place in the row for windows, within the
            segment both.
        sliding_window: W; a query sees the W last keys up to its own, or without `causal` those less than W away.
        prefix_window: "slide": virtual key j stands at position j - P and leaves the window; "pin": it never does.
        softcap: c; the scaled products become c·tanh(product / c), before everything that is added.
        sinks: (H,) scores that take a share of the softmax and give nothing.
        dropout: probability that a weight is left out; the mask is drawn again in backward, never stored.
        training: dropout acts only if True.
        patched_backend: what `patch` was given.

    Returns:
        (B, H, S, D) in query's dtype, stored so that `.transpose(1, 2)` is contiguous. A row that sees nothing is 0.

    Raises:
        OpError (a ValueError): a shape, device, dtype or number does not fit.
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    prefix_key, prefix_value = (t[None] if t.ndim == 3 else t for t in (prefix_key, prefix_value))
    tensors = in_common_dtype(Tensors(query, key, value, prefix_key, prefix_value, bias, prefix_bias, sinks))
    check_tensors("prefix_attention", tensors)
    if prefix_window not in ("slide", "pin"):
        raise OpError(f"prefix_attention: prefix_window is {prefix_window!r}; 'slide' or 'pin' is needed")
    scores = make_scores(
        "prefix_attention", tensors, causal, scale, padding_mask, segment_ids, query_start, alibi_slopes,
        key_positions, sliding_window, softcap,
    )._replace(pin=prefix_window == "pin")  # fmt: skip
    if not 0.0 <= dropout < 1.0:
        raise OpError(f"prefix_attention: dropout is {dropout}; a probability in [0, 1) is needed")
    return apply_prefix_attention(tensors, scores, dropout if training else 0.0, patched_backend)


def apply_prefix_attention(tensors: Tensors, scores: Scores, dropout: float, patched_backend: str | None) -> Tensor:
    """`prefix_attention` for callers that have checked their tensors: autocast, backend, `apply`."""
    tensors = in_common_dtype(tensors)
    if torch.compiler.is_compiling():
        from fastpeft.ops._prefix_attention_compiled import compiled_attention

        return compiled_attention(None, tensors, scores, dropout, patched_backend)
    plan = prefix_attention_plan(tensors, scores, dropout, patched_backend)
    call = Call(scores, dropout, plan, plan is not None and is_demanded(patched_backend))
    return applied(PrefixAttentionFunction, call, *tensors)


def in_common_dtype(tensors: Tensors) -> Tensors:
    """What is multiplied, in autocast's dtype where that is in force."""
    dtype = autocast_dtype(tensors.q_BHSD)
    if dtype is None:
        return tensors
    return Tensors(*(t.to(dtype) if t.is_floating_point() else t for t in tensors[:5]), *tensors[5:])
