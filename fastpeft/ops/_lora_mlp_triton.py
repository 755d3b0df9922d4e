"""`lora_mlp` on the Triton kernels: the products with the three weights are the vendor's, as `lora_linear`'s plans have
them; what lies between is one kernel forward and one backward (`kernels.lora_mlp`), and x is read once for gate and up
in each direction (`kernels.lora_projections`).
"""

import torch
from torch import Tensor

from fastpeft.dispatch import Plan, lora_linear_plan, lora_linear_plans
from fastpeft.kernels import lora_linear as linear_kernels
from fastpeft.kernels import lora_mlp as kernels
from fastpeft.kernels import lora_projections as shared_kernels
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._partials import WAITING, add_up
from fastpeft.ops import _lora_linear_triton as single
from fastpeft.ops._cpu_products import add_through
from fastpeft.ops._lora_linear_torch import as_rows
from fastpeft.ops._lora_linear_triton import draw_seed as draw_seed
from fastpeft.ops._lora_linear_triton import honoured as honoured
from fastpeft.ops._lora_linear_triton import keep_mask as keep_mask


def _dropouts(seeds, call) -> list[Dropout | None]:
    if not any(call.dropouts):
        return [None, None, None]
    return [None if seed is None else Dropout(seed, p) for seed, p in zip(seeds, call.dropouts, strict=True)]


def _product(x: Tensor, each, s: Tensor | None, scale: float, plan: Plan) -> Tensor:
    """x Wᵀ + bias + s·S Bᵀ of a projection, as `expand` has it: x (..., K), and [M, N] of [M, K]."""
    if s is None:
        return torch.nn.functional.linear(x, each.weight, each.bias)
    return single.expand(s, x, each.weight, each.bias, each.b, scale, plan, {})


def _plans(x: Tensor, projections, call) -> tuple[Plan, ...]:
    """Those of the three products, which have as many rows."""
    gate, up, down = projections
    return lora_linear_plans(x, x.dtype, (gate.a, up.a, down.a), (gate.b, up.b, down.b), call.dropouts)


def _products(x: Tensor, projections, s, scalings, plans) -> list[Tensor]:
    """gate and up [M, H]."""
    return [_product(x, projections[i], s[i], scalings[i], plans[i]) for i in (0, 1)]


def forward(x: Tensor, projections, seeds, call):
    """(y (..., N) or [M, N], gate [M, H], up [M, H], S of each [M, R]): as the torch path's, of x (..., K)."""
    x_MK, dropouts, plans, down = as_rows(x), _dropouts(seeds, call), _plans(x, projections, call), projections[2]
    s: list[Tensor | None] = [None, None]
    own = [i for i in (0, 1) if projections[i].a is not None]
    if own:
        matrices = [projections[i].a for i in own]
        shrunk = shared_kernels.shrink_all(x_MK, matrices, matrices[0].dtype, [dropouts[i] for i in own])
        s = shrunk if len(own) == 2 else [shrunk[0] if i in own else None for i in (0, 1)]
    gate, up = _products(x_MK, projections, s, call.scalings, plans)
    h, s_down = kernels.gated_forward(gate, up, call.activation, down.a, dropouts[2], lead=x.shape[:-1])
    return _product(h, down, s_down, call.scalings[2], plans[2]), gate, up, (*s, s_down)


def backward(dy, x, products, s, projections, seeds, call, needs):
    """(dX [M, K], dA of each [R, K], dB of each [N, R], dgate [M, H], dup [M, H]), as the torch path's, of dY [M, N]
    and x (..., K)."""
    down, dropouts = projections[2], _dropouts(seeds, call)
    x, db, t_down = single.for_launches(x), [None, None, None], None
    if down.a is not None:
        reads = lora_linear_plan(dy, dy.dtype, down.a, down.b, call.dropouts[2]).reads
        need_t = needs.hidden or needs.a[2]
        db[2], t_down, _ = single.grad_b_and_t(
            dy, s[2], down.b, call.scalings[2], needs.b[2], need_t, False, reads
        )  # fmt: skip
    if not needs.inner:
        return None, (None, None, None), db, None, None
    if call.recompute:
        products = _products(as_rows(x), projections, s, call.scalings, _plans(x, projections, call))
    gate, up = products
    if not needs.hidden:
        h, _ = kernels.gated_forward(gate, up, call.activation)
        da, _, _ = linear_kernels.grad_columns(t_down, h, t_down.dtype, dropout=dropouts[2])
        return None, (None, None, da), db, None, None
    grads, da_down = _through_activation(dy, gate, up, s, t_down, projections, dropouts[2], call, needs)
    t, sums = grads.t, []
    db[:2] = grads.db
    for i, grad in ((0, grads.dgate), (1, grads.dup)):
        if t[i] is not None or projections[i].a is None:
            continue
        need_t = needs.x or needs.a[i]
        if need_t or needs.b[i]:
            numbers = call.scalings[i], needs.b[i], need_t, False
            db[i], t[i], _ = single.grad_b_and_t(grad, s[i], projections[i].b, *numbers, sums=sums)
            add_up(sums, beyond=WAITING)
    add_up(sums)
    dx, da_gate, da_up = _to_x(x, t, (grads.dgate, grads.dup), projections, dropouts, call, needs)
    return dx, (da_gate, da_up, da_down), db, grads.dgate, grads.dup


def _through_activation(dy, gate, up, s, t_down, projections, dropout, call, needs):
    """(`kernels.Grads`, dA of down or None): with every rank-r product that the kernel can hold."""
    down = projections[2]
    a = projections[0].a, projections[1].a, down.a
    most = kernels.fused_rank(dy.dtype, [each.dtype for each in a if each is not None][0])
    inside = down.a is not None and down.a.shape[0] <= most
    sides = [
        kernels.Side(s[i], projections[i].b, call.scalings[i])
        if a[i] is not None and a[i].shape[0] <= most and needs.b[i] and (needs.x or needs.a[i])
        else None
        for i in (0, 1)
    ]
    if down.a is None or inside:
        dh = dy @ down.weight
    else:
        dh = linear_kernels.tail(t_down, down.a.t(), dy.dtype, dropout=dropout).addmm_(dy, down.weight)
    with_h = needs.a[2] and not inside
    grads = kernels.gated_backward(
        dh, gate, up, call.activation, down=(t_down, down.a) if inside else None, sides=sides, with_h=with_h,
        dropout=dropout if inside else None,
    )  # fmt: skip
    if not with_h:
        return grads, grads.da if needs.a[2] else None
    da, _, _ = linear_kernels.grad_columns(t_down, grads.h, t_down.dtype, dropout=dropout)
    return grads._replace(h=None), da


def _to_x(x, t, grads, projections, dropouts, call, needs):
    """(dX, dA of gate, dA of up), each None where not wanted. The pass over x that makes both dA also writes the rank-r
    terms of dX, unless dX is wanted in a wider type than the products have."""
    own = [i for i in (0, 1) if t[i] is not None]
    da, dx = [None, None], None
    chosen = [i for i in own if needs.a[i]]
    with_tail = needs.x and chosen == own and call.dx_dtype is call.dtype
    if chosen == [0, 1]:
        a = projections[0].a, projections[1].a
        da, dx = shared_kernels.grad_all_columns(t, x, a, dropouts[:2], with_tail)
    elif chosen:
        (i,) = chosen
        (da[i],), dx = shared_kernels.grad_all_columns([t[i]], x, [projections[i].a], [dropouts[i]], with_tail)
    if not needs.x:
        return None, *da
    if dx is None:
        for i in own:
            dx = linear_kernels.tail(
                t[i], projections[i].a.t(), call.dtype, dropout=dropouts[i], out_dtype=call.dx_dtype, residual=dx
            )  # fmt: skip
    for i in (0, 1):
        grad, weight = grads[i], projections[i].weight
        dx = (grad @ weight).to(call.dx_dtype) if dx is None else add_through(dx, grad, weight)
    return dx, *da
