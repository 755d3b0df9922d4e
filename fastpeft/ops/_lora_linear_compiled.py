"""`lora_linear` as torch.library operators, so that torch.compile sees one node forward and one backward.

Inside a compiled graph the backend is chosen when the graph runs, not when it is traced. The seed of the dropout mask
is drawn by the graph, where compilation knows how to keep it for a recomputation.
"""

import torch
from torch import Tensor

from fastpeft.dispatch import lora_linear_plan
from fastpeft.fallback import code_of, served
from fastpeft.ops.lora_linear import Call, decide, run_backward, run_forward


def compiled_lora_linear(x, weight, bias, residual, a, b, scaling: float, dropout: float, dtype, patched):
    """y (M, N) of flat tensors, as in `apply_lora`, through the operators."""
    seed = torch.randint(2**62, (1,), device=x.device) if dropout else None
    name = str(dtype).removeprefix("torch.")
    return torch.ops.fastpeft.lora_linear(
        x, weight, bias, residual, a, b, seed, scaling, dropout, name, patched or ""
    )[0]  # fmt: skip


@torch.library.custom_op("fastpeft::lora_linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, a: Tensor, b: Tensor,
    seed: Tensor | None, scaling: float, dropout: float, dtype: str, patched: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, S, how it was served): the last for backward, see `fastpeft.fallback.served`."""
    call = decide(x, getattr(torch, dtype), a, b, scaling, dropout, patched or None)
    y, s, call = run_forward(x, weight, bias, residual, a, b, seed, call)
    return y, s, torch.tensor([code_of(call.plan is not None, call)])


@_forward.register_fake
def _(x, weight, bias, residual, a, b, seed, scaling, dropout, dtype, patched):
    # Sizes by `shape`: `len` of a tensor is a number of Python's, for which alone the graph would hold.
    kind = getattr(torch, dtype) if residual is None else residual.dtype
    y = x.new_empty(x.shape[0], b.shape[0], dtype=kind)
    return y, a.new_empty(x.shape[0], a.shape[0]), torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("fastpeft::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, a: Tensor, b: Tensor, s: Tensor, seed: Tensor | None,
    how: Tensor, scaling: float, dropout: float, dtype: str, dx_dtype: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX, dW, dbias, dA, dB), empty where `needs` does not ask."""
    triton, fields = served(how.item())
    plan = lora_linear_plan(dy, getattr(torch, dtype), a, b, dropout) if triton else None
    call = Call(scaling, dropout, getattr(torch, dtype), getattr(torch, dx_dtype), plan, **fields)
    grads = run_backward(dy, x, weight, a, b, s, seed, call, tuple(needs))
    # A bias gradient leaves the kernels in fp32 and torch in the call's dtype; the operator promises the latter.
    kinds = (call.dx_dtype, call.dtype, call.dtype, a.dtype, b.dtype)
    return tuple(
        dy.new_empty(0) if grad is None else grad.to(kind).contiguous() for grad, kind in zip(grads, kinds, strict=True)
    )


@_backward.register_fake
def _(dy, x, weight, a, b, s, seed, how, scaling, dropout, dtype, dx_dtype, needs):
    columns, kind = a.shape[1], getattr(torch, dtype)
    shapes = ((dy.shape[0], columns), (dy.shape[1], columns), (dy.shape[1],), a.shape, b.shape)
    kinds = (getattr(torch, dx_dtype), kind, kind, a.dtype, b.dtype)
    return tuple(
        dy.new_empty(shape if need else (0,), dtype=of if need else dy.dtype)
        for shape, of, need in zip(shapes, kinds, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, a, b, seed, scaling, dropout, dtype, _ = inputs
    ctx.save_for_backward(x, weight, a, b, output[1], seed, output[2])
    dx_dtype = str(torch.promote_types(x.dtype, getattr(torch, dtype))).removeprefix("torch.")
    ctx.numbers = (scaling, dropout, dtype, dx_dtype)
    ctx.dtypes = (x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype)


def _autograd(ctx, dy, _s, _backend):
    x, weight, a, b, s, seed, how = ctx.saved_tensors
    need_x, need_w, need_bias, need_residual, need_a, need_b, *_ = ctx.needs_input_grad
    needs = [need_x, need_w, need_bias, need_a, need_b]
    grads = torch.ops.fastpeft.lora_linear_backward(dy, x, weight, a, b, s, seed, how, *ctx.numbers, needs)
    dx, dw, dbias, da, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    dx, dw, dbias = (
        None if grad is None else grad.to(kind) for grad, kind in zip((dx, dw, dbias), ctx.dtypes, strict=True)
    )
    return dx, dw, dbias, dy if need_residual else None, da, db, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
