"""`lora_projections` as torch.library operators, so that torch.compile sees one node forward and one backward; the
backend is chosen when the graph runs."""

import torch
from torch import Tensor

from fastpeft.dispatch import lora_linear_plans
from fastpeft.fallback import code_of, served
from fastpeft.ops.lora_projections import Call, Needs, decide, run_backward, run_forward


def compiled_lora_projections(
    x, bases, biases, a, b, scalings: list[float], dropouts: list[float], dtype, patched, based: bool
) -> list[Tensor]:
    """[y (M, N), ...] of flat tensors, as in `apply_lora_projections`, through the operators."""
    seeds = torch.randint(2**62, (len(a),), device=x.device) if any(dropouts) else None
    name, present = str(dtype).removeprefix("torch."), [bias for bias in biases if bias is not None]
    has_bias = [bias is not None for bias in biases]
    out = torch.ops.fastpeft.lora_projections(
        x, list(bases), present, a, b, seeds, has_bias, scalings, dropouts, name, patched or "", based
    )  # fmt: skip
    return out[: len(a)]


def _spread(present: list[Tensor], has: list[bool]) -> list[Tensor | None]:
    each = iter(present)
    return [next(each) if one else None for one in has]


def _seeds(seeds: Tensor | None, dropouts: list[float]) -> list[Tensor | None] | None:
    if seeds is None:
        return None
    return [seed if p else None for seed, p in zip(seeds.split(1), dropouts, strict=True)]


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, in a storage of its own: no result of an operator may lie in another's."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.numel() else tensor.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("fastpeft::lora_projections", mutates_args=())
def _forward(
    x: Tensor, bases: list[Tensor], biases: list[Tensor], a: list[Tensor], b: list[Tensor], seeds: Tensor | None,
    has_bias: list[bool], scalings: list[float], dropouts: list[float], dtype: str, patched: str, based: bool,
) -> list[Tensor]:  # fmt: skip
    """[y, ..., S, ..., how it was served]: the last for backward, see `fastpeft.fallback.served`."""
    numbers = tuple(scalings), tuple(dropouts)
    call = decide(x, getattr(torch, dtype), a, b, *numbers, patched or None, based)
    ys, ss, call = run_forward(x, bases, _spread(biases, has_bias), a, b, _seeds(seeds, dropouts), call)
    return [*ys, *map(_own, ss), torch.tensor([code_of(call.plans is not None, call)])]


@_forward.register_fake
def _(x, bases, biases, a, b, seeds, has_bias, scalings, dropouts, dtype, patched, based):
    # Sizes by `shape`: `len` of a tensor is a number of Python's, for which alone the graph would hold.
    kinds = [base.dtype if based else getattr(torch, dtype) for base in bases]
    ys = [x.new_empty(x.shape[0], each.shape[0], dtype=kind) for each, kind in zip(b, kinds, strict=True)]
    ss = [each.new_empty(x.shape[0], each.shape[0]) for each in a]
    return [*ys, *ss, torch.empty(1, dtype=torch.int64, device="cpu")]


@torch.library.custom_op("fastpeft::lora_projections_backward", mutates_args=())
def _backward(
    dys: list[Tensor], x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], s: list[Tensor],
    seeds: Tensor | None, how: Tensor, scalings: list[float], dropouts: list[float], dtype: str, dx_dtype: str,
    need_x: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """[dX, dW, ..., dbias, ..., dA, ..., dB, ...], empty where `needs` does not ask. Without weights the base products
    were given."""
    triton, fields = served(how.item())
    kind = getattr(torch, dtype)
    plans = lora_linear_plans(x, kind, a, b, dropouts) if triton else None
    based = not weights
    call = Call(tuple(scalings), tuple(dropouts), kind, getattr(torch, dx_dtype), plans, **fields, based=based)
    wanted, bases = _needs(need_x, needs), weights or [None] * len(a)
    dx, *grads = run_backward(dys, x, bases, a, b, s, _seeds(seeds, dropouts), call, wanted)
    kinds = (kind, kind, a[0].dtype, b[0].dtype)
    out = [dx if dx is None else dx.to(call.dx_dtype)]
    for each, to in zip(grads, kinds, strict=True):
        out += [grad if grad is None else grad.to(to) for grad in each]
    return [x.new_empty(0) if grad is None else _own(grad) for grad in out]


def _needs(need_x: bool, needs: list[bool]) -> Needs:
    count = len(needs) // 4
    return Needs(need_x, *(tuple(needs[i * count : (i + 1) * count]) for i in range(4)))


@_backward.register_fake
def _(dys, x, weights, a, b, s, seeds, how, scalings, dropouts, dtype, dx_dtype, need_x, needs):
    kind = getattr(torch, dtype)
    shapes = [(t.shape[0], x.shape[1]) for t in b] + [t.shape[:1] for t in b] + [t.shape for t in (*a, *b)]
    kinds = [kind] * (2 * len(a)) + [a[0].dtype] * len(a) + [b[0].dtype] * len(b)
    dx = x.new_empty(x.shape if need_x else (0,), dtype=getattr(torch, dx_dtype) if need_x else x.dtype)
    return [dx] + [
        x.new_empty(shape if need else (0,), dtype=of if need else x.dtype)
        for shape, of, need in zip(shapes, kinds, needs, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    x, bases, biases, a, b, seeds, has_bias, scalings, dropouts, dtype, _, ctx.based = inputs
    ctx.count = len(a)
    ctx.save_for_backward(x, seeds, *a, *b, *output[ctx.count :], *(() if ctx.based else bases))
    dx_dtype = str(torch.promote_types(x.dtype, getattr(torch, dtype))).removeprefix("torch.")
    ctx.numbers = (scalings, dropouts, dtype, dx_dtype)
    ctx.dtypes = (x.dtype, [base.dtype for base in bases], [each.dtype for each in biases])
    ctx.has_bias = has_bias


def _autograd(ctx, grads):
    x, seeds, *saved = ctx.saved_tensors
    dys, (a, b, s) = list(grads[: ctx.count]), (saved[at * ctx.count : (at + 1) * ctx.count] for at in range(3))
    how, *weights = saved[3 * ctx.count :]
    need_x, need_base, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    need_bias = [bool(each) for each in _spread(need_bias or [], ctx.has_bias)]
    needs = [*(need and not ctx.based for need in need_base), *need_bias, *need_a, *need_b]
    dx, *rest = torch.ops.fastpeft.lora_projections_backward(
        dys, x, weights, a, b, s, seeds, how, *ctx.numbers, need_x, needs
    )  # fmt: skip
    rest = [grad if need else None for grad, need in zip(rest, needs, strict=True)]
    dbase, dbias, da, db = (rest[start * ctx.count : (start + 1) * ctx.count] for start in range(4))
    if ctx.based:
        dbase = [dy if need else None for dy, need in zip(dys, need_base, strict=True)]
    dbias = [grad for grad, has in zip(dbias, ctx.has_bias, strict=True) if has]
    kind_x, kinds_base, kinds_bias = ctx.dtypes
    dx = dx.to(kind_x) if need_x else None
    dbase, dbias = (
        [grad if grad is None else grad.to(kind) for grad, kind in zip(each, kinds, strict=True)]
        for each, kinds in ((dbase, kinds_base), (dbias, kinds_bias))
    )
    return dx, dbase, dbias, da, db, *(None,) * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)
