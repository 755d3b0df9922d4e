"""`lora_mlp` as torch.library operators, so that torch.compile sees one node forward and one backward; the backend is
chosen when the graph runs.

Twelve tensors, of gate, up and down weight, bias, A and B, go as a list of those that there are and `has`, which says
of each whether it is there.
"""

import torch
from torch import Tensor

from fastpeft.fallback import code_of, served
from fastpeft.ops.lora_mlp import Call, decide, needs_of, run_backward, run_forward


def compiled_lora_mlp(x, flat, activation: str, scalings, dropouts, dtype, recompute: bool, patched) -> Tensor:
    """y (M, N) of flat tensors, as in `apply_lora_mlp`, through the operators."""
    seeds = torch.randint(2**62, (3,), device=x.device) if any(dropouts) else None
    has = [each is not None for each in flat]
    numbers = (activation, list(scalings), list(dropouts), str(dtype).removeprefix("torch."), recompute, patched or "")
    return torch.ops.fastpeft.lora_mlp(x, [each for each in flat if each is not None], has, seeds, *numbers)[0]


def _spread(present: list, has: list[bool]) -> list:
    each = iter(present)
    return [next(each) if one else None for one in has]


def _seeds(seeds: Tensor | None, dropouts: list[float]) -> list[Tensor | None]:
    if seeds is None:
        return [None, None, None]
    return [seed if p else None for seed, p in zip(seeds.split(1), dropouts, strict=True)]


def _whole(tensors, like: Tensor) -> list[Tensor]:
    """Each in a storage of its own, nothing in the place of None."""
    return [
        like.new_empty(0)
        if each is None
        else each
        if _is_whole(each)
        else each.clone(memory_format=torch.contiguous_format)
        for each in tensors
    ]


def _is_whole(tensor: Tensor) -> bool:
    """Without elements it may be one of several parts of nothing."""
    return tensor.numel() > 0 and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


@torch.library.custom_op("fastpeft::lora_mlp", mutates_args=())
def _forward(
    x: Tensor, tensors: list[Tensor], has: list[bool], seeds: Tensor | None, activation: str, scalings: list[float],
    dropouts: list[float], dtype: str, recompute: bool, patched: str,
) -> list[Tensor]:  # fmt: skip
    """[y, g, u, S of each, how it was served]: g and u empty under `recompute`, S where there is no LoRA; the last for
    backward, see `fastpeft.fallback.served`."""
    flat = _spread(tensors, has)
    call = decide(x, flat, activation, scalings, dropouts, getattr(torch, dtype), recompute, patched or None)
    wanted = needs_of(True, [True] * 12)
    y, gate, up, s, call = run_forward(x, flat, _seeds(seeds, dropouts), call, wanted)
    products = (None, None) if recompute else (gate, up)
    return [y, *_whole(products, y), *_whole(s, y), torch.tensor([code_of(call.triton, call)])]


@_forward.register_fake
def _(x, tensors, has, seeds, activation, scalings, dropouts, dtype, recompute, patched):
    # Sizes by `shape`: `len` of a tensor is a number of Python's, for which alone the graph would hold.
    flat, kind = _spread(tensors, has), getattr(torch, dtype)

    def made(columns: int | None, of: torch.dtype):
        return x.new_empty((0,) if columns is None else (x.shape[0], columns), dtype=of)

    inner = None if recompute else flat[0].shape[0]
    s = [made(None, kind) if a is None else made(a.shape[0], a.dtype) for a in flat[2::4]]
    how = torch.empty(1, dtype=torch.int64, device="cpu")
    return [made(flat[8].shape[0], kind), made(inner, kind), made(inner, kind), *s, how]


@torch.library.custom_op("fastpeft::lora_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, products: list[Tensor], s: list[Tensor], tensors: list[Tensor], has: list[bool],
    seeds: Tensor | None, how: Tensor, activation: str, scalings: list[float], dropouts: list[float], dtype: str,
    recompute: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """[dX, and of each projection dbias, dA, dB], empty where `needs` (x and the twelve) does not ask."""
    triton, fields = served(how.item())
    flat, kind = _spread(tensors, has), getattr(torch, dtype)
    numbers = (activation, tuple(scalings), tuple(dropouts), kind, torch.promote_types(x.dtype, kind), recompute)
    there = [each if a is not None else None for each, a in zip(s, flat[2::4], strict=True)]
    saved = [x, *([None, None] if recompute else products), *there, *_seeds(seeds, dropouts), *flat]
    dx, dbias, da, db = run_backward(dy, saved, Call(*numbers, triton, **fields), needs_of(needs[0], needs[1:]))
    dx = None if dx is None else dx.to(x.dtype)
    return _whole([dx, *_by_projection(dbias, da, db)], x)


def _by_projection(*kinds: list) -> list:
    return [each for projection in zip(*kinds, strict=True) for each in projection]


@_backward.register_fake
def _(dy, x, products, s, tensors, has, seeds, how, activation, scalings, dropouts, dtype, recompute, needs):
    flat = [x, *(each for i, each in enumerate(_spread(tensors, has)) if i % 4)]
    wanted = [needs[0], *(need for i, need in enumerate(needs[1:]) if i % 4)]
    return [
        each.new_empty(each.shape) if need else x.new_empty(0) for each, need in zip(flat, wanted, strict=True)
    ]  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, tensors, has, seeds, *numbers, _ = inputs
    _, *products_and_s, how = output
    ctx.save_for_backward(x, seeds, how, *products_and_s, *tensors)
    ctx.has, ctx.numbers = has, numbers


def _autograd(ctx, grads):
    x, seeds, how, *rest = ctx.saved_tensors
    need_x, need_tensors, *_ = ctx.needs_input_grad
    needs = [need_x, *(bool(need) for need in _spread(need_tensors, ctx.has))]
    dx, *found = torch.ops.fastpeft.lora_mlp_backward(
        grads[0], x, rest[:2], rest[2:5], rest[5:], ctx.has, seeds, how, *ctx.numbers, needs
    )  # fmt: skip
    each = iter(found)
    twelve = [next(each) if i % 4 else None for i in range(12)]
    given = [grad if need else None for grad, need, has in zip(twelve, needs[1:], ctx.has, strict=True) if has]
    return dx if need_x else None, given, *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)
