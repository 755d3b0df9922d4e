"""`lora_projections` in plain torch: the steps of `lora_linear`'s, with x taken once for all projections."""

import torch
from torch import Tensor

from fastpeft.ops import _cpu_products as cpu
from fastpeft.ops._lora_linear_torch import (
    Sum,
    add_dropped_product,
    add_product,
    as_rows,
    base_grad,
    copied,
    dropout_of,
    dropped,
    given_mask,
    grad_b_and_t,
    row_blocks,
    scaled_linear,
    transposed_product,
    with_rows,
)

MANY = 64  # rows, for which a copy of all matrices beside each other costs less than it saves


def draw_seeds(x: Tensor, dropouts) -> list[Tensor | None]:
    """One for each projection that drops, from the CPU generator, in the order in which single layers draw them."""
    return [torch.empty(1, dtype=torch.int64, device="cpu").random_() if p else None for p in dropouts]


def given_masks(masks, dropouts) -> list:
    """In the place of seeds: masks [M, K] that somebody else has drawn with these probabilities."""
    return [None if mask is None else given_mask(mask, p) for mask, p in zip(masks, dropouts, strict=True)]


def _droppers(seeds, dropouts, device) -> list:
    """What each projection drops, from the beginning."""
    if seeds is None:
        return [None] * len(dropouts)
    return [dropout_of(seed, p, device) for seed, p in zip(seeds, dropouts, strict=True)]


def forward(x, bases, biases, a, b, seeds, call):
    """((y (..., N), ...), (S [M, R], ...)): `bases` are weights, or with `call.based` the base products (..., N)."""
    x_MK = as_rows(x)
    ys = tuple(map(copied, bases) if call.based else map(cpu.linear, [with_rows(x, x_MK)] * len(bases), bases, biases))
    ss = _shrink(x_MK, a, _droppers(seeds, call.dropouts, x.device))
    for y, s, matrix, scaling in zip(ys, ss, b, call.scalings, strict=True):
        add_product(as_rows(y), s, matrix.t(), scaling)
    return ys, ss


def _shrink(x, a, droppers) -> tuple[Tensor, ...]:
    """(drop(x) aᵀ [M, R], ...)"""
    masked = any(each is not None for each in droppers)
    ranks = [len(each) for each in a]
    if not masked and x.dtype is a[0].dtype:
        if len(x) < MANY:
            return tuple(x @ each.t() for each in a)
        return scaled_linear(x, torch.cat(a), 1.0).split(ranks, 1)
    out = torch.empty(len(x), sum(ranks), dtype=a[0].dtype, device=x.device).split(ranks, 1)
    for block in row_blocks(*x.shape, masked):
        wide = None
        for s, matrix, dropout in zip(out, a, droppers, strict=True):
            if dropout is None:
                wide = x[block].to(matrix.dtype) if wide is None else wide
                scaled_linear(wide, matrix, 1.0, s[block])
            else:
                z = dropped(x[block], matrix.dtype, dropout.next(*x[block].shape))
                scaled_linear(z, matrix, dropout.scale, s[block])
    return out


def grads(dy, x, weight, a, b, s, seeds, call, needs):
    """(dX, [dA, ...], [dB, ...]), None where not wanted."""
    ts, db = [], []
    for p, (each, scaling) in enumerate(zip(dy, call.scalings, strict=True)):
        found, t = grad_b_and_t(each, s[p], b[p], scaling, needs.b[p], needs.x or needs.a[p])
        db.append(found)
        ts.append(t)
    if not (needs.x or any(needs.a)):
        return None, [None] * len(dy), db
    dx = sum_of_bases(dy, weight, call.dx_dtype, a[0].shape[1]) if needs.x else None
    return dx, add_terms(dx, x, ts, a, _droppers(seeds, call.dropouts, dy[0].device), needs.a), db


def sum_of_bases(dy, weight, dtype: torch.dtype, columns: int) -> Tensor:
    """Σ dY W [M, columns] in `dtype`: in a wider one than the products are in, each is added as it comes; else they
    accumulate. Where somebody else has the base products, zeros."""
    dx = base_grad(dy[0], weight[0], columns).to(dtype)
    for each, matrix in zip(dy[1:], weight[1:], strict=True):
        if matrix is not None:
            cpu.add_through(dx, each, matrix)
    return dx


def add_terms(dx, x, ts, a, droppers, wanted) -> list[Tensor | None]:
    """[dA, ...], and Σ mask⊙(T A) onto dx, in place, if there is one. Where T is None there is nothing to add."""
    if any(each is not None for each in droppers):
        return _add_masked_terms(dx, x, ts, a, droppers, wanted)
    if dx is not None and len(dx) >= MANY:
        add_product(dx, torch.cat(ts, 1), torch.cat(a))
    elif dx is not None:
        for t, matrix in zip(ts, a, strict=True):
            add_product(dx, t, matrix)
    return _grads_of_a(x, ts, wanted)


def _grads_of_a(x, ts, wanted) -> list[Tensor | None]:
    """(Tᵀ x, or None where not wanted), each in a storage of its own."""
    chosen = [t for t, want in zip(ts, wanted, strict=True) if want]
    if not chosen or len(chosen[0]) < MANY:
        return [transposed_product(t, x) if want else None for t, want in zip(ts, wanted, strict=True)]
    parts = iter(transposed_product(torch.cat(chosen, 1), x).split([t.shape[1] for t in chosen]))
    return [next(parts).clone() if want else None for want in wanted]


def _add_masked_terms(dx, x, ts, a, droppers, wanted) -> list[Tensor | None]:
    """`add_terms` under dropout: one drawing of each mask serves both."""
    kind, columns = a[0].dtype, a[0].shape[1]
    da = [Sum(t, columns) if want else None for t, want in zip(ts, wanted, strict=True)]
    rows = len(next(t for t in ts if t is not None))
    for block in row_blocks(rows, columns, masked=True):
        for t, matrix, into, dropout in zip(ts, a, da, droppers, strict=True):
            if t is None:
                continue
            scale = 1.0 if dropout is None else dropout.scale
            places = None if dropout is None else dropout.next(block.stop - block.start, columns)
            if into is not None:
                z = x[block].to(kind) if dropout is None else dropped(x[block], kind, places)
                into.add(t[block], z, scale)
            if dx is not None and dropout is None:
                add_product(dx[block], t[block], matrix)
            elif dx is not None:
                add_dropped_product(dx[block], t[block], matrix, scale, places)
    return [None if each is None else each.result() for each in da]
