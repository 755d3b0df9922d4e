"""Kernels of `lora_linear`: y = x Wᵀ + bias + S Bᵀ with S = s·drop(x) Aᵀ, and all its gradients.

    _shrink         S = s·drop(x) Aᵀ             one read of x        (also T = s·dY B beyond rank 64)
    _tail           x Wᵀ + bias + S Bᵀ           the base product with the rank-r term inside
                    dY W + mask⊙(T A)            the same kernel, other strides
                    residual + S Bᵀ              the same kernel without the base product
    _grad_b_and_t   dB = dYᵀ S, T = s·dY B       one read of dY
    _grad_columns   dA = Tᵀ drop(x)              one read of x; on request also mask⊙(T A), which then seeds dX
    _sum_partials   the deterministic end of the split reductions

The scale s is folded into S and T in fp32, before either is rounded. Shapes: x [M, K], W [N, K], A [R, K], B [N, R],
dY [M, N]; S and T [M, R]. Every offset is computed in 64 bits. The decomposition at the rank-r tensors follows
LoRAFusion (arXiv 2510.00206, section 4), without its atomics and its stored masks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    UPCAST,
    Dropout,
    dot,
    dot_mode,
    keep_mask,
    on_device_of,
    processor_count,
    rank_block,
    split_evenly,
)

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a program's tile, the depth of its inner step, and how it is pipelined."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Predicted from the register and shared-memory reports of the compiler; no GPU has measured these yet.
SHRINK = Tiles(rows=64, columns=0, depth=128, warps=4, stages=3)
TAIL = Tiles(rows=128, columns=128, depth=64, warps=8, stages=3)
EXPAND = Tiles(rows=64, columns=128, depth=64, warps=4, stages=1)
GRAD_B_AND_T = Tiles(rows=32, columns=256, depth=0, warps=8, stages=2)
GRAD_COLUMNS = Tiles(rows=64, columns=128, depth=0, warps=4, stages=2)
SMALL = Tiles(rows=16, columns=32, depth=32, warps=4, stages=1)  # the interpreter's, so that every loop turns


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, scale, threshold, M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_M rows of x, once, and keeps their R products in registers."""
    row_start = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = row_start + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    p_x = x_ptr + rows[:, None] * stride_xm + inner[None, :] * stride_xk
    p_a = a_ptr + ranks[None, :] * stride_ar + inner[:, None] * stride_ak
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = inner < K - k
        x = tl.load(p_x, mask=(rows < M)[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(p_a, mask=m_k[:, None] & (ranks < R)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if DROPOUT:
            x = tl.where(keep_mask(seed_ptr, row_start, k, threshold, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
        acc = dot(x, a, acc, MODE, HALF, UPCAST)
        p_x += BLOCK_K * stride_xk
        p_a += BLOCK_K * stride_ak
    p_out = out_ptr + rows[:, None] * R + ranks[None, :]
    tl.store(p_out, acc * scale, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def _tail_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, p_ptr, q_ptr, out_ptr, seed_ptr, keep_scale, threshold, M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_qn, stride_qr, stride_rm, stride_rn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr, MODE: tl.constexpr, BASE_MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program computes a [BLOCK_M, BLOCK_N] tile of x wᵀ + bias + residual + mask⊙(p qᵀ), rounded once.

    Tiles are walked in groups of GROUP rows of tiles, so that neighbours find x and w in L2.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    group_rows = min(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    row_start = (group * GROUP + within % group_rows).to(tl.int64) * BLOCK_M
    column_start = (within // group_rows).to(tl.int64) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_M)
    columns = column_start + tl.arange(0, BLOCK_N)
    m_m, m_n = rows < M, columns < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        ranks = r + tl.arange(0, BLOCK_R).to(tl.int64)
        p = tl.load(p_ptr + rows[:, None] * R + ranks[None, :], mask=m_m[:, None] & (ranks < R)[None, :], other=0.0)
        p_q = q_ptr + columns[None, :] * stride_qn + ranks[:, None] * stride_qr
        q = tl.load(p_q, mask=(ranks < R)[:, None] & m_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = dot(p, q, acc, MODE, HALF, UPCAST)
    if DROPOUT:
        keep = keep_mask(seed_ptr, row_start, column_start, threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    if HAS_BASE:
        inner = tl.arange(0, BLOCK_K).to(tl.int64)
        p_x = x_ptr + rows[:, None] * stride_xm + inner[None, :] * stride_xk
        p_w = w_ptr + columns[None, :] * stride_wn + inner[:, None] * stride_wk
        for k in range(0, K, BLOCK_K):
            m_k = inner < K - k
            x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
            acc = dot(x, w, acc, BASE_MODE, HALF, UPCAST)
            p_x += BLOCK_K * stride_xk
            p_w += BLOCK_K * stride_wk
    m_out = m_m[:, None] & m_n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        p_residual = residual_ptr + rows[:, None] * stride_rm + columns[None, :] * stride_rn
        acc += tl.load(p_residual, mask=m_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], acc, mask=m_out)


@triton.jit
def _grad_b_and_t_kernel(
    dy_ptr, s_ptr, b_ptr, t_ptr, db_ptr, dbias_ptr, M, N, R, rows_per_program,
    stride_dm, stride_dn, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WITH_BIAS: tl.constexpr,
    MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads a rectangle of dY, rows_per_program by BLOCK_N, once.

    It keeps dB of its columns in registers over all its rows, and writes its columns' share of T row block by row
    block: t [N / BLOCK_N, M, R] and db [row runs, N, R] are fp32 partial sums for `_sum_partials`.
    """
    column_block, row_run = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    m_n, m_r = columns < N, ranks < R
    first = row_run * rows_per_program
    p_b = b_ptr + columns[:, None] * stride_bn + ranks[None, :] * stride_br
    b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
    acc = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for offset in range(0, rows_per_program, BLOCK_M):
        rows = first + offset + tl.arange(0, BLOCK_M)
        m_m = rows < M
        p_dy = dy_ptr + rows[:, None] * stride_dm + columns[None, :] * stride_dn
        dy = tl.load(p_dy, mask=m_m[:, None] & m_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        m_out = m_m[:, None] & m_r[None, :]
        s = tl.load(s_ptr + rows[:, None] * R + ranks[None, :], mask=m_out, other=0.0)  # [BLOCK_M, BLOCK_R]
        t = dot(dy, b, tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32), MODE, HALF, UPCAST)
        tl.store(t_ptr + (column_block * M + rows)[:, None] * R + ranks[None, :], t, mask=m_out)
        acc = dot(tl.trans(dy), s, acc, MODE, HALF, UPCAST)
        if WITH_BIAS:
            total += tl.sum(dy.to(tl.float32), axis=0)
    p_db = db_ptr + (row_run * N + columns)[:, None] * R + ranks[None, :]
    tl.store(p_db, acc, mask=m_n[:, None] & m_r[None, :])
    if WITH_BIAS:
        tl.store(dbias_ptr + row_run * N + columns, total, mask=m_n)


@triton.jit
def _grad_columns_kernel(
    t_ptr, x_ptr, a_ptr, out_ptr, tail_ptr, sum_ptr, seed_ptr, keep_scale, threshold, M, K, R, rows_per_program,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_or, stride_ok,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WITH_PRODUCT: tl.constexpr, WITH_TAIL: tl.constexpr, WITH_SUM: tl.constexpr,
    DROPOUT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_K columns of x over rows_per_program rows, once, and keeps tᵀ drop(x) in registers.

    WITH_TAIL also writes mask⊙(t a)·keep_scale, for which t is in hand; WITH_SUM also sums x's columns. The partial
    sums out [row runs, R·K] and sum [row runs, K] are fp32, for `_sum_partials`.
    """
    row_run = tl.program_id(1).to(tl.int64)
    column_start = tl.program_id(0).to(tl.int64) * BLOCK_K
    columns = column_start + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    m_k, m_r = columns < K, ranks < R
    first = row_run * rows_per_program
    acc = tl.zeros([BLOCK_K, BLOCK_R], dtype=tl.float32)
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    if WITH_TAIL:
        p_a = a_ptr + ranks[:, None] * stride_ar + columns[None, :] * stride_ak
        a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
    for offset in range(0, rows_per_program, BLOCK_M):
        rows = first + offset + tl.arange(0, BLOCK_M)
        m_m = rows < M
        m_x = m_m[:, None] & m_k[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk, mask=m_x, other=0.0)
        if DROPOUT:
            keep = keep_mask(seed_ptr, first + offset, column_start, threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0).to(x.dtype)  # [BLOCK_M, BLOCK_K]
        if WITH_PRODUCT:
            m_t = m_m[:, None] & m_r[None, :]
            t = tl.load(t_ptr + rows[:, None] * R + ranks[None, :], mask=m_t, other=0.0)  # [BLOCK_M, BLOCK_R]
            acc = dot(tl.trans(x), t, acc, MODE, HALF, UPCAST)
            if WITH_TAIL:
                tail = dot(t, a, tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32), MODE, HALF, UPCAST)
                if DROPOUT:
                    tail = tl.where(keep, tail * keep_scale, 0.0)
                tl.store(tail_ptr + rows[:, None] * K + columns[None, :], tail, mask=m_x)
        if WITH_SUM:
            total += tl.sum(x.to(tl.float32), axis=0)
    if WITH_PRODUCT:
        p_out = out_ptr + row_run * R * K + columns[:, None] * stride_ok + ranks[None, :] * stride_or
        tl.store(p_out, acc, mask=m_k[:, None] & m_r[None, :])
    if WITH_SUM:
        tl.store(sum_ptr + row_run * K + columns, total, mask=m_k)


@triton.jit
def _sum_partials_kernel(parts_ptr, out_ptr, scale, parts, size, BLOCK: tl.constexpr):
    """One program sums BLOCK places over all parts, always in the same order, and scales and rounds once."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    p_part = parts_ptr + places
    for _ in range(parts):
        acc += tl.load(p_part, mask=places < size, other=0.0)
        p_part += size
    tl.store(out_ptr + places, acc * scale, mask=places < size)


def _modes(data: torch.Tensor, adapter_dtype: torch.dtype) -> dict:
    return {"MODE": dot_mode(data.dtype, adapter_dtype), "HALF": TRITON_TYPES[data.dtype], "UPCAST": UPCAST}


def _mask_arguments(dropout: Dropout | None) -> tuple:
    """(seed, keep_scale, threshold) of a launch; without dropout nothing of it is read."""
    return (None, 1.0, 0) if dropout is None else (dropout.seed, dropout.keep_scale, dropout.threshold)


def sum_partials(parts: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """scale·Σ parts over the first dimension, in `dtype`."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    block = 256 if UPCAST else 1024
    with on_device_of(parts):
        _sum_partials_kernel[(triton.cdiv(out.numel(), block),)](parts, out, scale, len(parts), out.numel(), block)
    return out


def shrink(
    x: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype, dropout: Dropout | None = None, tiles=None
) -> torch.Tensor:
    """scale·drop(x) aᵀ: x [M, K], a [R, K] (any strides) -> [M, R] in `dtype`."""
    (rows, depth), rank = x.shape, a.shape[0]
    tiles = tiles or (SMALL if UPCAST else SHRINK)
    out = torch.empty(rows, rank, dtype=dtype, device=x.device)
    seed, keep_scale, threshold = _mask_arguments(dropout)
    with on_device_of(x):
        _shrink_kernel[(triton.cdiv(rows, tiles.rows),)](
            x, a, out, seed, scale * keep_scale, threshold, rows, depth, rank, *x.stride(), *a.stride(),
            BLOCK_M=tiles.rows, BLOCK_K=tiles.depth, BLOCK_R=rank_block(rank), DROPOUT=dropout is not None,
            **_modes(x, a.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def tail(
    p: torch.Tensor,
    q: torch.Tensor,
    dtype: torch.dtype,
    *,
    base: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """x wᵀ + bias + residual + mask⊙(p qᵀ) in `dtype`, rounded once: p [M, R], q [N, R], base = (x [M, K], w [N, K])."""
    (rows, rank), columns = p.shape, q.shape[0]
    tiles = tiles or (SMALL if UPCAST else TAIL if base else EXPAND)
    x, w = base or (None, None)
    data = torch.empty(0, dtype=dtype)
    seed, keep_scale, threshold = _mask_arguments(dropout)
    out = torch.empty(rows, columns, dtype=dtype, device=p.device)
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns),)
    with on_device_of(p):
        _tail_kernel[grid](
            x, w, bias, residual, p, q, out, seed, keep_scale, threshold,
            rows, columns, x.shape[1] if base else 0, rank,
            *(x.stride() if base else (0, 0)), *(w.stride() if base else (0, 0)), *q.stride(),
            *(residual.stride() if residual is not None else (0, 0)),
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, BLOCK_R=min(rank_block(rank), 64), GROUP=8,
            HAS_BASE=base is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            DROPOUT=dropout is not None, BASE_MODE=dot_mode(dtype, dtype), **_modes(data, q.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def grad_b_and_t(
    dy: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float, with_bias: bool, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dB = dyᵀ s [N, R] like b, T = scale·dy b [M, R] like s, Σ dy [N] in fp32 or None) from one read of dy [M, N]."""
    (rows, columns), rank = dy.shape, b.shape[1]
    tiles = tiles or (SMALL if UPCAST else GRAD_B_AND_T)
    column_blocks = triton.cdiv(columns, tiles.columns)
    run, runs = split_evenly(rows, tiles.rows, max(1, processor_count(dy) // column_blocks))
    partial = dict(dtype=torch.float32, device=dy.device)
    t_parts = torch.empty(column_blocks, rows, rank, **partial)
    db_parts = torch.empty(runs, columns, rank, **partial)
    bias_parts = torch.empty(runs, columns, **partial) if with_bias else None
    with on_device_of(dy):
        _grad_b_and_t_kernel[(column_blocks, runs)](
            dy, s, b, t_parts, db_parts, bias_parts, rows, columns, rank, run, *dy.stride(), *b.stride(),
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_R=rank_block(rank), WITH_BIAS=with_bias,
            **_modes(dy, b.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    dbias = sum_partials(bias_parts, torch.float32) if with_bias else None
    return sum_partials(db_parts, b.dtype), sum_partials(t_parts, s.dtype, scale), dbias


def grad_columns(
    t: torch.Tensor | None,
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    tail_of: torch.Tensor | None = None,
    with_sum: bool = False,
    transposed: bool = False,
    dropout: Dropout | None = None,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(tᵀ drop(x) in `dtype`, mask⊙(t·tail_of) like x, Σ x [K] in fp32) from one read of x [M, K]; t [M, R].

    The first is [R, K], or [K, R] if `transposed`; each is None where it was not asked for.
    """
    (rows, columns), rank = x.shape, t.shape[1] if t is not None else 1
    tiles = tiles or (SMALL if UPCAST else GRAD_COLUMNS)
    column_blocks = triton.cdiv(columns, tiles.columns)
    run, runs = split_evenly(rows, tiles.rows, max(1, 2 * processor_count(x) // column_blocks))
    partial = dict(dtype=torch.float32, device=x.device)
    shape = (columns, rank) if transposed else (rank, columns)
    parts = torch.empty(runs, *shape, **partial) if t is not None else None
    sums = torch.empty(runs, columns, **partial) if with_sum else None
    tail_out = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if tail_of is not None else None
    seed, keep_scale, threshold = _mask_arguments(dropout)
    with on_device_of(x):
        _grad_columns_kernel[(column_blocks, runs)](
            t, x, tail_of, parts, tail_out, sums, seed, keep_scale, threshold, rows, columns, rank, run, *x.stride(),
            *(tail_of.stride() if tail_of is not None else (0, 0)), *((1, rank) if transposed else (columns, 1)),
            BLOCK_M=tiles.rows, BLOCK_K=tiles.columns, BLOCK_R=rank_block(rank), WITH_PRODUCT=t is not None,
            WITH_TAIL=tail_of is not None, WITH_SUM=with_sum, DROPOUT=dropout is not None,
            **_modes(x, t.dtype if t is not None else x.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    product = sum_partials(parts, dtype, keep_scale) if t is not None else None
    return product, tail_out, sum_partials(sums, torch.float32) if with_sum else None
