"""`lora_mlp` in plain torch: the vendor's products of whole matrices, and between them row blocks that fit a CPU's
cache: a block that was read for the activation serves the rank-r products beside it as well.

Dropout's masks are those that three calls of `lora_linear` would draw under the same seeds. `projections` are gate, up
and down, in this order, and so are `s`, `seeds` and whatever else has three entries.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastpeft.ops import _cpu_products as cpu
from fastpeft.ops import _lora_projections_torch as shared
from fastpeft.ops._lora_linear_torch import (
    Dropout,
    Given,
    Sum,
    add_dropped_product,
    add_product,
    drop,
    dropout_of,
    grad_b_and_t,
    product,
    row_blocks,
)
from fastpeft.ops._lora_linear_torch import draw_seed as draw_seed
from fastpeft.ops._lora_linear_torch import keeping as keeping
from fastpeft.ops._lora_linear_torch import kept as kept

aten = torch.ops.aten


def _gelu(approximate: str) -> tuple[Callable, Callable]:
    return (
        lambda gate, out: aten.gelu.out(gate, approximate=approximate, out=out),
        lambda grad, gate, out: aten.gelu_backward.grad_input(grad, gate, approximate=approximate, grad_input=out),
    )


# (act(gate), grad·act'(gate)), each written into `out`, which is none of its arguments.
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (
        lambda gate, out: aten.silu.out(gate, out=out),
        lambda grad, gate, out: aten.silu_backward.grad_input(grad, gate, grad_input=out),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu2": (
        lambda gate, out: torch.clamp(gate, min=0, out=out).square_(),
        lambda grad, gate, out: torch.clamp(gate, min=0, out=out).mul_(grad).mul_(2),
    ),
}


def _blocks(rows: int, columns: int, dropout: Dropout | Given | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Row blocks of [rows, columns], and the flat places of each that are dropped, None without dropout: the blocks in
    which `lora_linear` draws them. Smaller ones, that fit a cache more closely, take longer: a dozen calls each."""
    for block in row_blocks(rows, columns, masked=True):
        yield block, None if dropout is None else dropout.next(block.stop - block.start, columns)


class _Room:
    """For blocks: made once, used for each."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype, self.made = dtype, {}

    def like(self, block: Tensor, name: str) -> Tensor:
        if name not in self.made:  # the first block is the longest
            self.made[name] = torch.empty(block.shape, dtype=self.dtype, device=block.device)
        return self.made[name][: len(block)]


def _dropouts(seeds, call, device) -> list[Dropout | Given | None]:
    return [dropout_of(seed, p, device) for seed, p in zip(seeds, call.dropouts, strict=True)]


def _shrink_both(x: Tensor, gate, up, dropouts) -> list[Tensor | None]:
    """S [M, R] of gate and of up, x read once for both where it can be."""
    own = [i for i, each in enumerate((gate, up)) if each.a is not None]
    found = shared._shrink(x, [(gate, up)[i].a for i in own], [dropouts[i] for i in own]) if own else ()
    s: list[Tensor | None] = [None, None]
    for i, each in zip(own, found, strict=True):
        s[i] = each
    return s


def _add_terms(block: slice, products, s, projections, call) -> None:
    """s·S Bᵀ onto the base products of gate and up."""
    for y, s_each, each, scale in zip(products, s[:2], projections[:2], call.scalings[:2], strict=True):
        if s_each is not None:
            add_product(y[block], s_each[block], each.b.t(), scale)


def forward(x: Tensor, projections, seeds, call, keep: bool):
    """(y [M, N], gate [M, H], up [M, H], S of each [M, R]); without `keep` the last but S are lost."""
    gate, up, down = projections
    *dropouts, dropout = _dropouts(seeds, call, x.device)
    s_gate, s_up = _shrink_both(x, gate, up, dropouts)
    products = [cpu.linear(x, each.weight, each.bias) for each in (gate, up)]
    h = torch.empty_like(products[0]) if keep else products[0]
    s_down = None if down.a is None else torch.empty(len(x), len(down.a), dtype=down.a.dtype, device=x.device)
    act = ACTIVATIONS[call.activation][0]
    room = _Room(torch.promote_types(h.dtype, torch.float32))
    dropping = _Room(None if s_down is None else s_down.dtype)
    for block, places in _blocks(*h.shape, dropout):
        _add_terms(block, products, (s_gate, s_up), projections, call)
        g, u, out = products[0][block], products[1][block], h[block]
        if keep and out.dtype == room.dtype:
            act(g, out).mul_(u)
        else:
            out.copy_(act(g.to(room.dtype), room.like(g, "h")).mul_(u))
        if s_down is not None and places is None:
            product(out.to(s_down.dtype), down.a.t(), 1.0, s_down[block])
        elif s_down is not None:
            kept = drop(dropping.like(out, "h").copy_(out), places)
            product(kept, down.a.t(), dropout.scale, s_down[block])
    y = cpu.linear(h, down.weight, down.bias)
    if s_down is not None:
        add_product(y, s_down, down.b.t(), call.scalings[2])
    return y, *products, (s_gate, s_up, s_down)


class _Side:
    """What the gradient of gate, or of up, gives block by block: T [M, R] and dB [N, R], each where wanted."""

    def __init__(self, each, s, scale: float, grads: Tensor, need_t: bool, need_b: bool):
        self.b, self.s, self.scale = each.b, s, scale
        need_t = need_t and each.a is not None
        self.t = each.b.new_empty(len(grads), each.b.shape[1]) if need_t else None
        self.db = Sum(s, grads.shape[1]) if need_b else None

    def add(self, block: slice, grads: Tensor) -> None:
        if self.t is not None:
            product(grads.to(self.b.dtype), self.b, self.scale, self.t[block])
        if self.db is not None:
            self.db.add(self.s[block], grads, self.scale)

    def grad_b(self) -> Tensor | None:
        return None if self.db is None else self.db.result().t()


def _through_activation(dy, products, s, t_down, projections, seed, call, needs):
    """(dgate [M, H], dup [M, H], gate's _Side, up's _Side, dA of down), the first four None where only dA is wanted.

    dh is used up: dup is in its place.
    """
    gate, up, down = projections
    columns = products[0].shape[1]
    dropout = dropout_of(seed, call.dropouts[2], dy.device)
    da = Sum(t_down, columns) if needs.a[2] else None
    dgate = dup = dh = sides = None
    blocks = _blocks(len(dy), columns, dropout)
    if needs.hidden:
        dh = cpu.through(dy, down.weight)
        dgate, dup = torch.empty_like(dh), dh
        sides = [
            _Side(each, s[i], call.scalings[i], dh, needs.x or needs.a[i], needs.b[i])
            for i, each in enumerate((gate, up))
        ]
    act, act_grad = ACTIVATIONS[call.activation]
    room = _Room(torch.promote_types(products[0].dtype, torch.float32))
    for block, places in blocks:
        if call.recompute:
            _add_terms(block, products, s, projections, call)
        g, u = (each[block].to(room.dtype) for each in products)
        activated, other = act(g, room.like(g, "act")), room.like(g, "other")
        if needs.a[2]:
            h = torch.mul(activated, u, out=other).to(call.dtype).to(t_down.dtype)
            da.add(t_down[block], h if places is None else drop(h, places), 1.0 if places is None else dropout.scale)
        if not needs.hidden:
            continue
        if t_down is not None and places is None:
            add_product(dh[block], t_down[block], down.a)
        elif t_down is not None:
            add_dropped_product(dh[block], t_down[block], down.a, dropout.scale, places)
        d = dh[block].to(room.dtype)
        into = dgate[block] if dgate.dtype == room.dtype else room.like(g, "grad")
        act_grad(torch.mul(d, u, out=other), g, into)
        if into.dtype != dgate.dtype:
            dgate[block] = into
        dup[block].mul_(activated)
        for side, grads in zip(sides, (dgate[block], dup[block]), strict=True):
            side.add(block, grads)
    return dgate, dup, *(sides or (None, None)), None if da is None else da.result()


def backward(dy, x, products, s, projections, seeds, call, needs):
    """(dX [M, K], dA of each [R, K], dB of each [N, R], dgate [M, H], dup [M, H]), each None where not wanted.

    products: gate and up as forward has left them, or under `call.recompute` None.
    """
    gate, up, down = projections
    need_t = down.a is not None and (needs.hidden or needs.a[2])
    db_down, t_down = grad_b_and_t(dy, s[2], down.b, call.scalings[2], needs.b[2], need_t)
    if not (needs.hidden or needs.a[2]):
        return None, (None, None, None), (None, None, db_down), None, None
    if call.recompute:
        products = [cpu.linear(x, each.weight, each.bias) for each in (gate, up)]
    inner = _through_activation(dy, products, s, t_down, projections, seeds[2], call, needs)
    dgate, dup, gate_side, up_side, da_down = inner
    if not needs.hidden:
        return None, (None, None, da_down), (None, None, db_down), None, None
    t = (gate_side.t, up_side.t)
    dropouts = _dropouts(seeds, call, dy.device)
    weights = (gate.weight, up.weight)
    dx = shared.sum_of_bases((dgate, dup), weights, call.dx_dtype, weights[0].shape[1]) if needs.x else None
    own = [i for i in (0, 1) if t[i] is not None]
    da: list[Tensor | None] = [None, None]
    if own:
        chosen = ([each[i] for i in own] for each in (t, (gate.a, up.a), dropouts[:2], needs.a))
        for i, each in zip(own, shared.add_terms(dx, x, *chosen), strict=True):
            da[i] = each
    db = (gate_side.grad_b(), up_side.grad_b(), db_down)
    return dx, (*da, da_down), db, dgate, dup
