"""`expert_lora_linear` in plain torch: expert by expert, each on its own rows, by `lora_linear`'s steps. Rows that lie
together are views, written in place; experts without rows cost nothing."""

import torch
from torch import Tensor

from fastpeft.errors import OpError
from fastpeft.ops._lora_linear_torch import add_product, product, shrink, transposed_product

ALIGNMENT = 16  # bytes, of the strides that torch's grouped product takes

Rows = list[tuple[int, slice]]


def segments(ends: Tensor, rows: int) -> Rows:
    """(expert, its rows), for those that have any. Raises OpError unless `ends` rises to the number of rows."""
    bounds = [0, *ends.tolist()]
    if bounds != sorted(bounds) or bounds[-1] != rows:
        raise OpError(
            f"expert_lora_linear: ends must rise from 0 or more to the {rows} rows of x, the last of them that number"
        )
    each = zip(bounds, bounds[1:], strict=False)
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(each) if end > start]


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies all experts in one launch: bfloat16 on a GPU of compute capability 8.0 at least, as
    transformers' own grouped product."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    aligned = all(size * x.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    return aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x_e w_e of each expert e [M, N]: x [M, K], weight [E, K, N]."""
    return torch.nn.functional.grouped_mm(x, weight, offs=ends.to(torch.int32))


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, rows: Rows) -> Tensor:
    """x_e W_eᵀ + bias_e [M, N]: x [M, K], weight [E, N, K], bias [E, N]."""
    if can_group(x, weight):
        y = _grouped(x, weight.transpose(1, 2), ends)
        if bias is not None:
            for expert, each in rows:
                y[each] += bias[expert]
        return y
    y = x.new_empty(len(x), weight.shape[1])
    for expert, each in rows:
        if bias is None:
            torch.mm(x[each], weight[expert].t(), out=y[each])
        else:
            torch.addmm(bias[expert], x[each], weight[expert].t(), out=y[each])
    return y


def base_gradients(dy: Tensor, x: Tensor | None, weight: Tensor, ends: Tensor, rows: Rows, needs: tuple[bool, ...]):
    """(dY_e W_e [M, K], dW [E, N, K], dbias [E, N]), each None where `needs` does not ask for it."""
    need_x, need_w, need_bias = needs
    grouped = need_x and can_group(dy, weight)
    dx = _grouped(dy, weight, ends) if grouped else dy.new_empty(len(dy), weight.shape[2]) if need_x else None
    dw = weight.new_zeros(weight.shape) if need_w else None
    dbias = dy.new_zeros(len(weight), dy.shape[1]) if need_bias else None
    for expert, each in rows:
        if need_x and not grouped:
            product(dy[each], weight[expert], 1.0, dx[each])
        if need_w:
            torch.mm(dy[each].t(), x[each], out=dw[expert])
        if need_bias:
            torch.sum(dy[each], 0, out=dbias[expert])
    return dx, dw, dbias


def forward(x, weight, bias, a, b, scalings, ends, rows) -> tuple[Tensor, list[Tensor]]:
    """(y [M, N], S [M, r] of each adapter): a, b of each adapter [E, r, K] and [E, N, r]."""
    y, s = base_product(x, weight, bias, ends, rows), []
    for a_g, b_g, scaling in zip(a, b, scalings, strict=True):
        s_g, scaled = a_g.new_empty(len(x), a_g.shape[1]), b_g * scaling
        for expert, each in rows:
            s_g[each] = shrink(x[each], a_g[expert], 1.0)
            add_product(y[each], s_g[each], scaled[expert].t())
        s.append(s_g)
    return y, s


def backward(dy, x, weight, a, b, s, scalings, ends, rows, needs):
    """(dX [M, K], dW [E, N, K], dbias [E, N], [dA [E, r, K], ...], [dB [E, N, r], ...]), each None where `needs`, which
    has a list for each of the last two, does not ask for it."""
    need_x, _, _, need_a, need_b = needs
    dx, dw, dbias = base_gradients(dy, x, weight, ends, rows, needs[:3])
    da, db = [], []
    for g, scaling in enumerate(scalings):
        da.append(torch.zeros_like(a[g]) if need_a[g] else None)
        db.append(torch.zeros_like(b[g]) if need_b[g] else None)
        for expert, each in rows:
            if need_b[g]:
                db[g][expert] = transposed_product(s[g][each], dy[each]).t() * scaling
            if not (need_a[g] or need_x):
                continue
            t = shrink(dy[each], b[g][expert].t(), scaling)
            if need_a[g]:
                da[g][expert] = transposed_product(t, x[each])
            if need_x:
                add_product(dx[each], t, a[g][expert])
    return dx, dw, dbias, da, db
