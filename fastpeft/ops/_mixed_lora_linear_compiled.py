"""`mixed_lora_linear` as torch.library operators, so that torch.compile sees one node forward and one backward. Which
sample has which adapter is a constant of the graph; the backend is chosen when the graph runs."""

import torch
from torch import Tensor

from fastpeft.fallback import code_of, served
from fastpeft.ops.mixed_lora_linear import decide, run_backward, run_forward


def compiled_mixed_lora_linear(
    x, weight, bias, residual, a, b, rows: list[int], scalings: list[float], dropouts: list[float], dtype, patched
) -> Tensor:
    """y (M, N) of flat tensors, as in `apply_mixed_lora`, through the operators."""
    seeds = torch.randint(2**62, (len(a),), device=x.device) if any(dropouts) else None
    name = str(dtype).removeprefix("torch.")
    return torch.ops.fastpeft.mixed_lora_linear(
        x, weight, bias, residual, a, b, seeds, rows, scalings, dropouts, name, patched or ""
    )[0]  # fmt: skip


@torch.library.custom_op("fastpeft::mixed_lora_linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, a: list[Tensor], b: list[Tensor],
    seeds: Tensor | None, rows: list[int], scalings: list[float], dropouts: list[float], dtype: str, patched: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, S, how it was served): the last for backward, see `fastpeft.fallback.served`."""
    call = decide(x, getattr(torch, dtype), rows, b, scalings, dropouts, patched or None)
    y, s, call = run_forward(x, weight, bias, residual, a, b, seeds, call)
    return y, s, torch.tensor([code_of(call.triton, call)])


@_forward.register_fake
def _(x, weight, bias, residual, a, b, seeds, rows, scalings, dropouts, dtype, patched):
    kind = getattr(torch, dtype) if residual is None else residual.dtype
    # Sizes by `shape`: `len` of a tensor is a number of Python's, for which alone the graph would hold.
    y = x.new_empty(x.shape[0], b[0].shape[0], dtype=kind)
    elements = x.shape[0] // len(rows) * sum(len(a[g]) for g in rows if g >= 0)
    return y, a[0].new_empty(elements), torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("fastpeft::mixed_lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, a: list[Tensor], b: list[Tensor], s: Tensor,
    seeds: Tensor | None, how: Tensor, rows: list[int], scalings: list[float], dropouts: list[float], dtype: str,
    dx_dtype: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX, dW, dbias, every dA, every dB), the last two one behind the other; empty where `needs` does not ask."""
    call = decide(dy, getattr(torch, dtype), rows, b, scalings, dropouts, "torch")
    triton, fields = served(how.item())
    call = call._replace(triton=triton, dx_dtype=getattr(torch, dx_dtype), **fields)
    dx, dw, dbias, da, db = run_backward(dy, x, weight, a, b, s, seeds, call, tuple(needs))
    da, db = (None if each is None else torch.cat([part.reshape(-1) for part in each]) for each in (da, db))
    kinds = (call.dx_dtype, call.dtype, call.dtype, a[0].dtype, b[0].dtype)
    return tuple(
        dy.new_empty(0) if grad is None else grad.to(kind).contiguous()
        for grad, kind in zip((dx, dw, dbias, da, db), kinds, strict=True)
    )


@_backward.register_fake
def _(dy, x, weight, a, b, s, seeds, how, rows, scalings, dropouts, dtype, dx_dtype, needs):
    columns, kind = a[0].shape[1], getattr(torch, dtype)
    ranks, (count, outputs) = sum(len(each) for each in a), dy.shape
    shapes = ((count, columns), (outputs, columns), (outputs,), (ranks * columns,), (ranks * outputs,))
    kinds = (getattr(torch, dx_dtype), kind, kind, a[0].dtype, b[0].dtype)
    return tuple(
        dy.new_empty(shape if need else (0,), dtype=of if need else dy.dtype)
        for shape, of, need in zip(shapes, kinds, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, a, b, seeds, rows, scalings, dropouts, dtype, _ = inputs
    ctx.save_for_backward(x, weight, output[1], seeds, output[2], *a, *b)
    dx_dtype = str(torch.promote_types(x.dtype, getattr(torch, dtype))).removeprefix("torch.")
    ctx.numbers = (rows, scalings, dropouts, dtype, dx_dtype)
    ctx.dtypes = (x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype)


def _autograd(ctx, dy, _s, _backend):
    x, weight, s, seeds, how, *matrices = ctx.saved_tensors
    a, b = matrices[: len(matrices) // 2], matrices[len(matrices) // 2 :]
    need_x, need_w, need_bias, need_residual, need_a, need_b, *_ = ctx.needs_input_grad
    needs = [need_x, need_w, need_bias, any(need_a), any(need_b)]
    grads = torch.ops.fastpeft.mixed_lora_linear_backward(
        dy, x, weight, a, b, s, seeds, how, *ctx.numbers, needs
    )  # fmt: skip
    dx, dw, dbias, da, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    dx, dw, dbias = (
        None if grad is None else grad.to(kind) for grad, kind in zip((dx, dw, dbias), ctx.dtypes, strict=True)
    )
    da, db = ([None] * len(a) if grad is None else _apart(grad, like) for grad, like in ((da, a), (db, b)))
    return dx, dw, dbias, dy if need_residual else None, da, db, *(None,) * 6


def _apart(matrices: Tensor, like: list[Tensor]) -> list[Tensor]:
    """What lies one behind the other, each in the shape of one of `like`."""
    return [part.view(each.shape) for part, each in zip(matrices.split([t.numel() for t in like]), like, strict=True)]


_forward.register_autograd(_autograd, setup_context=_setup_context)
