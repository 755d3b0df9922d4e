"""`prefix_attention` and `gated_prompt_attention` as one torch.library operator, so that torch.compile sees one node
forward and one backward; with a gate it is the latter.

Inside a compiled graph the backend is chosen when the graph runs, not when it is traced. The seed of the dropout mask
is drawn by the graph, where compilation knows how to keep it for a recomputation.
"""

import torch
from torch import Tensor

from fastpeft.dispatch import ATTENTION_STRATEGIES, Plan, prefix_attention_plan
from fastpeft.fallback import code_of, is_demanded, served
from fastpeft.ops._prefix_attention_scores import Scores, Tensors
from fastpeft.ops.gated_prompt_attention import run_backward as gated_backward
from fastpeft.ops.gated_prompt_attention import run_forward as gated_forward
from fastpeft.ops.prefix_attention import Call, run_backward, run_forward

STRATEGIES = (*ATTENTION_STRATEGIES, "decode")
VECTORS = ("padding_BT", "segments_BT", "local_BT", "slopes_H", "positions_BT")


def compiled_attention(gate: Tensor | None, tensors: Tensors, scores: Scores, dropout: float, patched: str | None):
    """out of tensors as in the two ops' `apply`, through the operator."""
    seed = torch.randint(2**62, (1,), device=tensors.q_BHSD.device) if dropout else None
    vectors = (getattr(scores, name) for name in VECTORS)
    numbers = (scores.causal, scores.scale, scores.start, scores.window, scores.pin, scores.softcap, dropout)
    return torch.ops.fastpeft.attention(gate, *tensors, *vectors, seed, *numbers, patched or "")[0]


def _call(vectors, causal, scale, start, window, pin, softcap, dropout) -> Call:
    scores = Scores(causal, scale, start, window, pin, softcap, **dict(zip(VECTORS, vectors, strict=True)))
    return Call(scores, dropout, None)


@torch.library.custom_op("fastpeft::attention", mutates_args=())
def _forward(
    gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, bias: Tensor | None,
    pbias: Tensor | None, sinks: Tensor | None, padding: Tensor | None, segments: Tensor | None, local: Tensor | None,
    slopes: Tensor | None, positions: Tensor | None, seed: Tensor | None, causal: bool, scale: float, start: int,
    window: int | None, pin: bool, softcap: float | None, dropout: float, patched: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, the sequence's own out or empty, L in one or two parts, which plan): the rest is for backward."""
    tensors = Tensors(q, k, v, pk, pv, bias, pbias, sinks)
    call = _call((padding, segments, local, slopes, positions), causal, scale, start, window, pin, softcap, dropout)
    with torch.autocast(q.device.type, enabled=False):
        plan = prefix_attention_plan(tensors, call.scores, dropout, patched or None, gated=gate is not None)
        call = call._replace(plan=plan, demanded=plan is not None and is_demanded(patched or None))
        if gate is None:
            own, (out, lse, call) = q.new_empty(0), run_forward(tensors, call, seed)
        else:
            out, own, lse, call = gated_forward(tensors, gate, call, seed)
    parts = lse if lse.ndim == 4 else torch.stack((lse, torch.zeros_like(lse)))
    return out, own, parts, torch.tensor([*_numbers_of(plan), lse.ndim, code_of(plan is not None, call)])


@_forward.register_fake
def _(gate, q, k, v, pk, pv, bias, pbias, sinks, padding, segments, local, slopes, positions, seed, *numbers):
    batch, heads, queries, depth = q.shape

    def result():
        return q.new_empty(batch, queries, heads, depth).transpose(1, 2)

    own = q.new_empty(0) if gate is None else result()
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = q.new_empty(2, batch, heads, queries, dtype=wide)
    return result(), own, parts, torch.empty(4, dtype=torch.int64, device="cpu")


def _numbers_of(plan: Plan | None) -> tuple[int, int]:
    return (-1, -1) if plan is None else tuple(STRATEGIES.index(name) for name in plan[:2])


def _plan_of(numbers: list[int]) -> Plan | None:
    return None if numbers[0] < 0 else Plan(*(STRATEGIES[n] for n in numbers), "as in the compiled forward")


@torch.library.custom_op("fastpeft::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, result: Tensor, parts: Tensor, how: Tensor, gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    pk: Tensor, pv: Tensor, bias: Tensor | None, pbias: Tensor | None, sinks: Tensor | None, padding: Tensor | None,
    segments: Tensor | None, local: Tensor | None, slopes: Tensor | None, positions: Tensor | None,
    seed: Tensor | None, causal: bool, scale: float, start: int, window: int | None, pin: bool, softcap: float | None,
    dropout: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of gate and `Tensors`, empty where `needs` does not ask. result: out, or the sequence's own."""
    tensors = Tensors(q, k, v, pk, pv, bias, pbias, sinks)
    call = _call((padding, segments, local, slopes, positions), causal, scale, start, window, pin, softcap, dropout)
    *strategies, dimensions, code = how.tolist()
    call = call._replace(plan=_plan_of(strategies), **served(code)[1])
    lse = parts if dimensions == 4 else parts[0]
    need_gate, needs = needs[0], Tensors(*needs[1:])
    with torch.autocast(dout.device.type, enabled=False):
        if gate is None:
            grads = None, *run_backward(dout, tensors, result, lse, call, seed, needs)
        else:
            grads = gated_backward(dout, tensors, gate, result, lse, call, seed, needs, need_gate)
    # An operator's results may not share storage, as the kernels' gradients of keys and values do.
    return [
        dout.new_empty(0) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        if grad.untyped_storage().nbytes() > grad.nbytes else grad.contiguous()
        for grad in grads
    ]  # fmt: skip


@_backward.register_fake
def _(dout, result, parts, how, gate, q, k, v, pk, pv, bias, pbias, sinks, *rest):
    given = (gate, q, k, v, pk, pv, bias, pbias, sinks)
    return [t.new_empty(t.shape) if need else dout.new_empty(0) for t, need in zip(given, rest[-1], strict=True)]


def _setup_context(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:15], inputs[15:-1]
    out, own, parts, how = output
    ctx.save_for_backward(out if inputs[0] is None else own, parts, how, *tensors)
    ctx.mark_non_differentiable(own, parts, how)


def _autograd(ctx, dout, *_):
    needs = [bool(need) for need in ctx.needs_input_grad[:9]]
    grads = torch.ops.fastpeft.attention_backward(dout, *ctx.saved_tensors, *ctx.numbers, needs)
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


_forward.register_autograd(_autograd, setup_context=_setup_context)
