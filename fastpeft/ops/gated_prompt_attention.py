"""Attention, plus a second softmax over a learned prompt behind a gate (LLaMA-Adapter, Zhang et al., arXiv 2303.16199,
equations 4 to 8, where the gate γ is given as it multiplies; a tanh is the caller's):

    out = O_s + γ_h O_p        O_s = attention(q, K, V)        O_p = softmax(scale·q Kpᵀ) Vp

O_s has every modifier of `prefix_attention`; the prompt's softmax has the scale only. With δ_p = Σ dout∘O_p:

    dγ_h = Σ δ_p      dVp = γ pᵀ dout      u = γ p∘(dout Vpᵀ - δ_p)      dKp = scale·uᵀ q      dq += scale·u Kp

At γ = 0, where training begins, dKp and dVp are zero and dγ is not. Saved for backward: the tensors, O_s and its L.
"""

import functools

import torch
from torch import Tensor

from fastpeft.dispatch import prefix_attention_plan
from fastpeft.errors import OpError
from fastpeft.fallback import is_demanded, kernels_or_torch
from fastpeft.ops import _gated_prompt_attention_torch as torch_path
from fastpeft.ops._autocast import without_autocast
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops._prefix_attention_scores import Scores, Tensors, check_tensors, make_scores, of_prompt, of_sequence
from fastpeft.ops.prefix_attention import Call, in_common_dtype, kind_of, mask_of, prefix_attention_reference

# Letters of the shape suffixes in this file: B batch, H query heads, G key/value heads, S queries, T keys, P virtual
# keys, D head dimension.


def gated_prompt_attention_reference(
    tensors: Tensors, gate: Tensor, scores: Scores, keep: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """The definition, for autograd, as eager attention computes it. gate (1,) or (H,); keep (B, H, S, T) or None."""
    own = prefix_attention_reference(of_sequence(tensors), scores, keep, p)
    of = prefix_attention_reference(of_prompt(tensors), scores.of_prompt())
    return (own + gate.view(-1, 1, 1) * of).to(own.dtype)


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _gated_prompt_attention_triton as triton_path

    return triton_path


class GatedPromptAttentionFunction(torch.autograd.Function):
    """Tensors as in `Tensors`; all reshaping, casting and choosing is before `apply`."""

    @staticmethod
    def forward(ctx, call: Call, gate, *tensors):
        seed = _path(call.plan is not None).draw_seed(tensors[0]) if call.dropout else None
        with without_autocast(gate):
            out_BHSD, own_BHSD, lse_BHS, call = run_forward(Tensors(*tensors), gate, call, seed)
        ctx.save_for_backward(gate, *tensors, own_BHSD, lse_BHS, seed)
        ctx.call = call
        return out_BHSD

    @staticmethod
    @first_order
    def backward(ctx, dout_BHSD):
        gate, *tensors, own_BHSD, lse_BHS, seed = ctx.saved_tensors
        _, need_gate, *needs = ctx.needs_input_grad
        with without_autocast(gate):
            gradients = run_backward(
                dout_BHSD, Tensors(*tensors), gate, own_BHSD, lse_BHS, ctx.call, seed, Tensors(*needs), need_gate
            )
        return None, *gradients


def run_forward(tensors: Tensors, gate: Tensor, call: Call, seed: Tensor | None):
    """(out, the sequence's own out, what is kept of its softmax, the call as it was served) on the backend that
    `call.plan` stands for."""
    if call.plan is None:
        return *torch_path.forward(tensors, gate, call, seed), call
    found, by_kernels = kernels_or_torch(
        lambda: kind_of("gated_prompt_attention", "forward", tensors, call),
        call.demanded,
        lambda: _path(True).forward(tensors, gate, call, seed),
        lambda: torch_path.forward(tensors, gate, call, mask_of(tensors, call, seed, False, prefix=False)),
    )
    return *found, call if by_kernels else call._replace(fell_back=True)


def run_backward(dout, tensors: Tensors, gate, own, lse, call: Call, seed, needs: Tensors, need_gate: bool):
    """(dgate, the gradients of `Tensors`), None where not needed; see `prefix_attention`'s."""

    def by_torch_as_kernels():
        kept = own, lse
        if not call.fell_back:
            _, *kept = torch_path.forward(tensors, gate, call, mask_of(tensors, call, seed, True, prefix=False))
        mask = mask_of(tensors, call, seed, not call.fell_back, prefix=False)
        return torch_path.backward(dout, tensors, gate, *kept, call, mask, needs, need_gate)

    if call.plan is None:
        return torch_path.backward(dout, tensors, gate, own, lse, call, seed, needs, need_gate)
    if call.fell_back:
        return by_torch_as_kernels()
    return kernels_or_torch(
        lambda: kind_of("gated_prompt_attention", "backward", tensors, call),
        call.demanded,
        lambda: _path(True).backward(dout, tensors, gate, own, lse, call, seed, needs, need_gate),
        by_torch_as_kernels,
    )[0]


def gated_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    query_start: int | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_positions: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    patched_backend: str | None = None,
) -> Tensor:
    """Attention plus gate times a softmax over P virtual keys, with the gradients of every tensor that wants one.

    Args:
        query, key, value: as in `prefix_attention`.
        prompt_key, prompt_value: (Hkv, P, D), shared by the batch, or (B, Hkv, P, D); query's dtype.
        gate: (), (1,) or (H,), any floating-point dtype; it multiplies the prompt's part as it is.
        causal to patched_backend: as in `prefix_attention`, for the sequence; the prompt's softmax has `scale` only.

    Returns:
        (B, H, S, D) in query's dtype, stored so that `.transpose(1, 2)` is contiguous.

    Raises:
        OpError (a ValueError): a shape, device, dtype or number does not fit.
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    prompt_key, prompt_value = (t[None] if t.ndim == 3 else t for t in (prompt_key, prompt_value))
    tensors = in_common_dtype(Tensors(query, key, value, prompt_key, prompt_value, bias, None, sinks))
    check_tensors("gated_prompt_attention", tensors)
    heads = query.shape[1]
    if tuple(gate.shape) not in ((), (1,), (heads,)) or not gate.is_floating_point():
        raise OpError(
            f"gated_prompt_attention: gate is {gate.dtype} of shape {tuple(gate.shape)}; floating point of shape (), "
            f"(1,) or ({heads},) is needed"
        )
    if gate.device != query.device:
        raise OpError(f"gated_prompt_attention: gate is on {gate.device}, query on {query.device}; move one of them")
    scores = make_scores(
        "gated_prompt_attention", tensors, causal, scale, padding_mask, segment_ids, query_start, alibi_slopes,
        key_positions, sliding_window, softcap,
    )  # fmt: skip
    if not 0.0 <= dropout < 1.0:
        raise OpError(f"gated_prompt_attention: dropout is {dropout}; a probability in [0, 1) is needed")
    dropout = dropout if training else 0.0
    if torch.compiler.is_compiling():
        from fastpeft.ops._prefix_attention_compiled import compiled_attention

        return compiled_attention(gate.reshape(-1), tensors, scores, dropout, patched_backend)
    plan = prefix_attention_plan(tensors, scores, dropout, patched_backend, gated=True)
    call = Call(scores, dropout, plan, plan is not None and is_demanded(patched_backend))
    return applied(GatedPromptAttentionFunction, call, gate.reshape(-1), *tensors)
