"""`dora_linear` in plain torch: what is as large as y is gone through in blocks of rows that a CPU's cache holds, and
under dropout what is left of x lives in such blocks alone."""

import torch

from fastpeft.ops import _cpu_products as cpu
from fastpeft.ops._lora_linear_torch import (
    Sum,
    add_product,
    drop,
    dropout_of,
    dropped,
    grad_a_and_x,
    grad_b_and_t,
    product,
    row_blocks,
    shrink,
)


def forward(x, weight, bias, a, b, f, scale, seed, p):
    """(y [M, N], S [M, R], H [M, N]): shapes as in `dora_linear`, flattened."""
    dropout = dropout_of(seed, p, x.device)
    if dropout is None:
        base, s = cpu.linear(x, weight), shrink(x, a, 1.0)
        y, plain, gain = torch.empty_like(base), None, f
    else:
        y = plain = cpu.linear(x, weight, bias)
        base, s, gain = torch.empty_like(y), torch.empty(len(x), len(a), dtype=a.dtype, device=x.device), f - 1
        for block in row_blocks(*x.shape, masked=True):
            z = dropped(x[block], x.dtype, dropout.next(*x[block].shape))
            product(z, weight.t(), dropout.scale, base[block])
            product(z.to(a.dtype), a.t(), dropout.scale, s[block])
    start = f.new_zeros(1) if bias is None else bias.to(f.dtype)
    scaled_b = (b * f[:, None]).t()
    for block in row_blocks(*y.shape):
        total = torch.addcmul(start if plain is None else plain[block].to(f.dtype), base[block].to(f.dtype), gain)
        y[block] = add_product(total, s[block], scaled_b, scale)
    return y, s, base


def backward(dy, x, weight, a, b, f, s, base, seed, masked: bool, call, needs: tuple[bool, ...]):
    """(dX, dbias, dA, dB, df), each None where `needs` does not ask for it. `masked`: there was dropout, also where
    `seed` is None because nothing here needs the mask."""
    need_x, need_bias, need_a, need_b, need_f = needs
    e, t = grad_b_and_t(dy, s, b * f[:, None], call.scaling, need_b or need_f, need_x or need_a)
    df = (e * b).sum(1) + column_sums(dy, base, f.dtype) if need_f else None
    gain = f - 1 if masked else f
    if not (need_x or need_a):
        da = dx = None
    elif not masked:
        g = (dy * gain).to(dy.dtype) if need_x else dy
        da, dx = grad_a_and_x(g, x, t, weight, a, None, 0.0, call.dx_dtype, need_a, need_x)
    else:
        da, dx = _masked_grads(dy, x, weight, a, gain, t, dropout_of(seed, call.dropout, dy.device), call, needs)
    return dx, dy.sum(0) if need_bias else None, da, e * f[:, None] if need_b else None, df


def column_sums(dy, base, dtype: torch.dtype) -> torch.Tensor:
    """Σ dY⊙H over the rows [N], rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(dy.shape[1], dtype=wide, device=dy.device)
    for block in row_blocks(*dy.shape):
        total += (dy[block].to(wide) * base[block].to(wide)).sum(0)
    return total.to(dtype)


def _masked_grads(dy, x, weight, a, gain, t, dropout, call, needs):
    """(dA, dX) under dropout; one drawing of the mask serves both."""
    need_x, _, need_a, _, _ = needs
    da = Sum(t, a.shape[1]) if need_a else None
    dx = torch.empty(len(t), a.shape[1], dtype=call.dx_dtype, device=dy.device) if need_x else None
    for block in row_blocks(len(t), a.shape[1], masked=True):
        places = dropout.next(len(t[block]), a.shape[1])
        if need_a:
            da.add(t[block], dropped(x[block], a.dtype, places), dropout.scale)
        if need_x:
            through = product((dy[block] * gain).to(dy.dtype), weight, dropout.scale)
            dx[block] = drop(add_product(through, t[block], a, dropout.scale), places)
    da = da.result() if need_a else None
    return da, None if dx is None else cpu.add_through(dx, dy, weight)
