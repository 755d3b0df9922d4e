"""`lora_projections` on the Triton kernels: x is read once for all projections, the base products and their tails are
those of `lora_linear`, and dX accumulates in one buffer.
"""

import torch
from torch import Tensor

from fastpeft.kernels import lora_projections as kernels
from fastpeft.kernels._partials import WAITING, add_up
from fastpeft.kernels._several import MOST, MOST_RANKS
from fastpeft.kernels.lora_linear import grad_columns, shrink
from fastpeft.ops import _lora_linear_triton as single
from fastpeft.ops._lora_linear_torch import as_rows
from fastpeft.ops._lora_linear_triton import honoured as honoured


def draw_seeds(x: Tensor, dropouts) -> list[Tensor | None]:
    """One for each projection that drops, drawn on x's device in one launch: no synchronisation, safe under graphs."""
    seeds = torch.empty(len(dropouts), dtype=torch.int64, device=x.device).random_().split(1)
    return [seed if p else None for seed, p in zip(seeds, dropouts, strict=True)]


def keep_masks(seeds, dropouts, shape: tuple[int, int], device: torch.device) -> list[Tensor | None]:
    """Of each projection the [M, K] booleans that the kernels generate, element by element; None where none drops."""
    return [
        None if seed is None else single.keep_mask(seed, p, *shape, device)
        for seed, p in zip(seeds, dropouts, strict=True)
    ]


def _dropouts(seeds, dropouts) -> list:
    if seeds is None:
        return [None] * len(dropouts)
    return [None if seed is None else single.Dropout(seed, p) for seed, p in zip(seeds, dropouts, strict=True)]


def _by_launches(values) -> list:
    """As many at a time as a kernel takes."""
    return [values[start : start + MOST] for start in range(0, len(values), MOST)]


def forward(x, bases, biases, a, b, seeds, call):
    """((y (..., N) or [M, N], ...), (S [M, R], ...)): as the torch path's."""
    dropouts, x = _dropouts(seeds, call.dropouts), single.for_launches(x)
    if _fit(a):
        ss = kernels.shrink_all(x, a, a[0].dtype, dropouts)
    elif _too_wide(a):
        ss = [shrink(x, matrix, 1.0, matrix.dtype, dropout) for matrix, dropout in zip(a, dropouts, strict=True)]
    else:
        few = zip(_by_launches(a), _by_launches(dropouts), strict=True)
        ss = [s for matrices, drops in few for s in kernels.shrink_all(x, matrices, a[0].dtype, drops)]
    if call.based:
        return tuple(map(single.onto, bases, ss, b, call.scalings)), tuple(ss)
    shared, products = {}, zip(ss, bases, biases, b, call.scalings, call.plans, strict=True)
    ys = [single.expand(s, x, w, bias, b, scale, plan, shared) for s, w, bias, b, scale, plan in products]
    return ys, tuple(ss)


def _too_wide(a) -> bool:
    return max([each.shape[0] for each in a]) > MOST_RANKS


def _fit(a) -> bool:
    """Whether one launch takes them all."""
    return len(a) <= MOST and not _too_wide(a)


def grads(dy, x, weight, a, b, s, seeds, call, needs):
    """([dbias, ...], dX [M, K], [dA, ...], [dB, ...]), None where not wanted: of dY (..., N) and x (..., K)."""
    dy, x, count = list(map(single.for_launches, dy)), single.for_launches(x), len(dy)
    dbias, ts, db = [None] * count, [None] * count, [None] * count
    sums = []
    for p in range(count):
        need_b, need_t, need_bias = needs.b[p], needs.x or needs.a[p], needs.bias[p]
        if need_b or need_t or need_bias:
            add_up(sums, beyond=WAITING)
            db[p], ts[p], dbias[p] = single.grad_b_and_t(
                dy[p], s[p], b[p], call.scalings[p], need_b, need_t, need_bias, call.plans[p].reads, sums
            )
    add_up(sums)
    if not (needs.x or True in needs.a):
        return dbias, None, [None] * count, db
    dropouts = _dropouts(seeds, call.dropouts)
    whole = None if call.based else single.whole_product(call.plans[0].backward)
    every = False not in needs.a
    seeds_dx = needs.x and not whole and call.dx_dtype is dy[0].dtype and count <= MOST and every
    if every and _fit(a):
        da, dx = kernels.grad_all_columns(ts, x, a, dropouts, seeds_dx)
    else:
        da, dx = _grads_of_a(x, ts, a, dropouts, needs.a), None
    if needs.x:
        dx = _grad_of_x(dx, dy, weight, ts, a, dropouts, call.dx_dtype, whole)
    return dbias, dx, da, db


def _grads_of_a(x, ts, a, dropouts, wanted) -> list[Tensor | None]:
    """[dA, ...], by as many launches as it takes."""
    da, chosen = [None] * len(a), [p for p, want in enumerate(wanted) if want]
    if _too_wide(a):
        for p in chosen:
            da[p] = grad_columns(ts[p], x, ts[p].dtype, dropout=dropouts[p])[0]
        return da
    for places in _by_launches(chosen):
        t, matrices, drops = ([each[p] for p in places] for each in (ts, a, dropouts))
        found, _ = kernels.grad_all_columns(t, x, matrices, drops, False)
        for p, grad in zip(places, found, strict=True):
            da[p] = grad
    return da


def _grad_of_x(dx, dy, weight, ts, a, dropouts, dx_dtype, whole):
    """Σ dY W + mask⊙(T A), of which `dx` holds all the second terms, unless it is None; where somebody else has the
    base products, these terms alone. In a wider type than the base products are in, each of these is added as it comes.
    whole: the kernel that computes both terms of a projection in one, if that is the strategy."""
    narrow = dy[0].dtype
    if whole:
        for each, w, t, matrix, dropout in zip(dy, weight, ts, a, dropouts, strict=True):
            dx = whole(
                t, matrix.t(), narrow, base=(as_rows(each), w.t()), dropout=dropout, out_dtype=dx_dtype, residual=dx
            )  # fmt: skip
        return dx
    if dx is None:
        for few in zip(*map(_by_launches, (ts, a, dropouts)), strict=True):
            dx = kernels.tail_all(*few, narrow, dx_dtype, onto=dx)
    for each, w in zip(dy, weight, strict=True):
        if w is None:
            continue
        each = as_rows(each)
        dx = dx.addmm_(each, w) if dx_dtype is narrow else dx.add_(each @ w)
    return dx
