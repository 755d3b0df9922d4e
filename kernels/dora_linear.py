"""Kernels of `dora_linear`, beside those of `lora_linear`: what DoRA does to a whole output, in one pass each.

    _dora_combine   y = plain + bias + gain⊙base + s·S Bᵀ     one read of each, one write
    _dora_grad      G = gain⊙dY, Σ dY⊙base                    one read of dY and base, one write
    _dora_drop      drop(x), or out + drop(x)                 the mask of `lora_linear`'s kernels, never stored

Shapes: y, plain, base, dY [M, N]; gain [N]; S [M, R], B [N, R]; x [M, K]. Every offset is computed in 64 bits.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    UPCAST,
    Dropout,
    cdiv,
    dot,
    dot_mode,
    keep_mask,
    launch,
    processor_count,
    rank_block,
    split_evenly,
)
from fastpeft.kernels._partials import add_up, shares_or_whole
from fastpeft.kernels._tiles import INTERPRETED, Tiles, table_of, tiles_for
from fastpeft.kernels.lora_linear import TRITON_TYPES

# Predicted: streams of 8 elements a thread, and for sums some rows in turn. Measured on no GPU.
STREAM = Tiles(16, 32, warps=4) if INTERPRETED else Tiles(32, 128, warps=4)


@triton.jit
def _dora_combine_kernel(
    plain_ptr, bias_ptr, base_ptr, gain_ptr, p_ptr, q_ptr, out_ptr, scale, M, N, R,
    stride_qn, stride_qr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_PLAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program computes a [BLOCK_M, BLOCK_N] tile of plain + bias + gain⊙base + scale·p qᵀ, rounded once."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = rows < M, columns < N
    m_out = m_m[:, None] & m_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = r + tl.arange(0, BLOCK_R).to(tl.int64)
        p = tl.load(p_ptr + rows[:, None] * R + ranks[None, :], mask=m_m[:, None] & (ranks < R)[None, :], other=0.0)
        p_q = q_ptr + columns[None, :] * stride_qn + ranks[:, None] * stride_qr
        q = tl.load(p_q, mask=(ranks < R)[:, None] & m_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = dot(p, q, acc, MODE, HALF, UPCAST)
    acc *= scale
    places = rows[:, None] * N + columns[None, :]
    gain = tl.load(gain_ptr + columns, mask=m_n, other=0.0)
    acc += gain[None, :] * tl.load(base_ptr + places, mask=m_out, other=0.0).to(tl.float32)
    if HAS_PLAIN:
        acc += tl.load(plain_ptr + places, mask=m_out, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + places, acc, mask=m_out)


@triton.jit
def _dora_grad_kernel(
    dy_ptr, base_ptr, gain_ptr, out_ptr, sum_ptr, M, N, rows_per_program, stride_dm, stride_dn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WITH_OUT: tl.constexpr, WITH_SUM: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_N columns of dY over rows_per_program rows, once, writes gain⊙dY, and sums dY⊙base, which
    it reads once too. These are fp32 [row runs, N]: of several, partial sums for `_partials`."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_run = tl.program_id(1).to(tl.int64)
    m_n = columns < N
    gain = tl.load(gain_ptr + columns, mask=m_n, other=0.0)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for offset in range(0, rows_per_program, BLOCK_M):
        rows = row_run * rows_per_program + offset + tl.arange(0, BLOCK_M)
        m_out = (rows < M)[:, None] & m_n[None, :]
        p_dy = dy_ptr + rows[:, None] * stride_dm + columns[None, :] * stride_dn
        dy = tl.load(p_dy, mask=m_out, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        places = rows[:, None] * N + columns[None, :]
        if WITH_SUM:
            total += tl.sum(dy * tl.load(base_ptr + places, mask=m_out, other=0.0).to(tl.float32), axis=0)
        if WITH_OUT:
            tl.store(out_ptr + places, gain[None, :] * dy, mask=m_out)
    if WITH_SUM:
        tl.store(sum_ptr + row_run * N + columns, total, mask=m_n)


@triton.jit
def _dora_drop_kernel(
    x_ptr, out_ptr, seed_ptr, keep_scale, threshold, M, K, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """One program writes a [BLOCK_M, BLOCK_K] tile of mask⊙x·keep_scale, or ONTO adds it to what is there."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    row_start = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M
    column_start = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K
    rows, columns = row_start + tl.arange(0, BLOCK_M), column_start + tl.arange(0, BLOCK_K)
    m_x = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk, mask=m_x, other=0.0).to(tl.float32)
    keep = keep_mask(seed_ptr, row_start, column_start, threshold, BLOCK_M, BLOCK_K)
    x = tl.where(keep, x * keep_scale, 0.0)
    p_out = out_ptr + rows[:, None] * K + columns[None, :]
    if ONTO:
        x += tl.load(p_out, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_out, x, mask=m_x)


def combine(plain, bias, base, gain, s, b, scale: float) -> torch.Tensor:
    """plain + bias + gain⊙base + scale·s bᵀ like base [M, N]: plain [M, N] or None, bias [N] or None, gain [N] in fp32,
    s [M, R], b [N, R] (any strides)."""
    (rows, columns), rank = base.shape, s.shape[1]
    mode = dot_mode(base.dtype, b.dtype)
    tiles = tiles_for("expand", rank, mode, False, table_of(base.device))
    out = torch.empty_like(base)
    launch(
        _dora_combine_kernel, (cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns),), base,
        plain, None if bias is None else bias.contiguous(), base, gain.contiguous(), s, b, out, scale,
        rows, columns, rank, *b.stride(),
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_R=min(rank_block(rank), tiles.ranks),
        HAS_PLAIN=plain is not None, HAS_BIAS=bias is not None, MODE=mode, HALF=TRITON_TYPES[base.dtype],
        UPCAST=UPCAST, **tiles.options,
    )  # fmt: skip
    return out


def scaled_grad(dy, base, gain, need_out: bool, need_sum: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(gain⊙dy like dy, Σ dy⊙base [N] in fp32), each None where not asked for: dy, base [M, N], gain [N] in fp32."""
    (rows, columns), tiles = dy.shape, STREAM
    column_blocks = cdiv(columns, tiles.columns)
    run, runs = split_evenly(rows, tiles.rows, 8 * processor_count(dy) // column_blocks)
    out = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if need_out else None
    sums, total, parts = [], None, None
    if need_sum:
        total, parts = shares_or_whole(runs, (columns,), torch.float32, dy.device, 1.0, sums)
    launch(
        _dora_grad_kernel, (column_blocks, runs), dy,
        dy, base, gain.contiguous(), out, parts, rows, columns, run, *dy.stride(), BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns, WITH_OUT=need_out, WITH_SUM=need_sum, **tiles.options,
    )  # fmt: skip
    add_up(sums)
    return out, total


def drop(x: torch.Tensor, dropout: Dropout, onto: torch.Tensor | None = None) -> torch.Tensor:
    """mask⊙x/(1 - p) like x [M, K], or added to `onto`, in place."""
    (rows, columns), tiles = x.shape, STREAM
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if onto is None else onto
    launch(
        _dora_drop_kernel, (cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns),), x,
        x, out, dropout.seed, dropout.keep_scale, dropout.threshold, rows, columns, *x.stride(),
        BLOCK_M=tiles.rows, BLOCK_K=tiles.columns, ONTO=onto is not None, **tiles.options,
    )  # fmt: skip
    return out
