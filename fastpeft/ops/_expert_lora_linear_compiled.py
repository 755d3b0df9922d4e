"""`expert_lora_linear` as torch.library operators, so that torch.compile sees one node forward and one backward,
however many rows each expert has."""

import torch
from torch import Tensor

from fastpeft.ops._expert_lora_linear_torch import segments
from fastpeft.ops.expert_lora_linear import decide, run_backward, run_forward


@torch.library.custom_op("fastpeft::expert_lora_linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, a: list[Tensor], b: list[Tensor],
    scalings: list[float], patched: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, S of all adapters [M, Σr]): shapes as in `ExpertLoraLinearFunction`."""
    call = decide(x, a, segments(ends, len(x)), scalings, patched or None)
    y, s = run_forward(x, weight, bias, a, b, ends, call)
    return y, torch.cat(s, 1) if s else x.new_empty(0)


@_forward.register_fake
def _(x, weight, bias, ends, a, b, scalings, patched):
    rank = sum(each.shape[1] for each in a)
    s = a[0].new_empty(x.shape[0], rank) if a else x.new_empty(0)
    return x.new_empty(x.shape[0], weight.shape[1]), s


@torch.library.custom_op("fastpeft::expert_lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor, a: list[Tensor], b: list[Tensor], s: Tensor,
    scalings: list[float], patched: str, need_x: bool, need_w: bool, need_bias: bool, need_a: list[bool],
    need_b: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX, dW, dbias, every dA, every dB), the last two one behind the other; empty where they are not needed."""
    needs = (need_x, need_w, need_bias, need_a, need_b)
    parts = s.split([each.shape[1] for each in a], 1) if a else []
    call = decide(dy, a, segments(ends, len(dy)), scalings, patched or None)
    dx, dw, dbias, da, db = run_backward(dy, x, weight, a, b, parts, ends, call, needs)
    none = dy.new_empty(0)
    return *(none.clone() if each is None else each for each in (dx, dw, dbias)), _behind(da, dy), _behind(db, dy)


def _behind(grads: list[Tensor | None], like: Tensor) -> Tensor:
    present = [each.reshape(-1) for each in grads if each is not None]
    return torch.cat(present) if present else like.new_empty(0)


@_backward.register_fake
def _(dy, x, weight, ends, a, b, s, scalings, patched, need_x, need_w, need_bias, need_a, need_b):
    count, outputs, inputs = weight.shape
    shapes = ((dy.shape[0], inputs), (count, outputs, inputs), (count, outputs))
    base = [
        dy.new_empty(shape if need else (0,)) for shape, need in zip(shapes, (need_x, need_w, need_bias), strict=True)
    ]
    for matrices, needs in ((a, need_a), (b, need_b)):
        wanted = [each for each, need in zip(matrices, needs, strict=True) if need]
        like = wanted[0] if wanted else dy
        base.append(like.new_empty(sum(each.shape[0] * each.shape[1] * each.shape[2] for each in wanted)))
    return tuple(base)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ends, a, b, scalings, patched = inputs
    ctx.save_for_backward(x, weight, ends, output[1], *a, *b)
    ctx.scalings, ctx.patched, ctx.has_bias = scalings, patched, bias is not None


def _autograd(ctx, dy, _s):
    x, weight, ends, s, *matrices = ctx.saved_tensors
    a, b = matrices[: len(ctx.scalings)], matrices[len(ctx.scalings) :]
    need_x, need_w, need_bias, _, need_a, need_b, *_ = ctx.needs_input_grad
    needs = (need_x, need_w, need_bias and ctx.has_bias, list(need_a), list(need_b))
    *base, da, db = torch.ops.fastpeft.expert_lora_linear_backward(
        dy.contiguous(), x, weight, ends, a, b, s, ctx.scalings, ctx.patched, *needs
    )  # fmt: skip
    dx, dw, dbias = (grad if need else None for grad, need in zip(base, needs[:3], strict=True))
    none = None if ctx.scalings else []  # torch takes an empty list for one of tensors
    return dx, dw, dbias, None, _apart(da, a, needs[3]), _apart(db, b, needs[4]), none, None


def _apart(grads: Tensor, like: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    sizes = [each.numel() if need else 0 for each, need in zip(like, needs, strict=True)]
    parts = grads.split(sizes) if sizes else []
    return [part.view(each.shape) if need else None for part, each, need in zip(parts, like, needs, strict=True)]


_forward.register_autograd(_autograd, setup_context=_setup_context)
