"""Kernels of `lora_linear`: y = x Wᵀ + bias + s·S Bᵀ with S = drop(x) Aᵀ, and all its gradients.

    _shrink         S = drop(x) Aᵀ               one read of x        (also T = s·dY B where dY is read twice)
    _tail           x Wᵀ + bias + s·S Bᵀ         the base product with the rank-r term inside
                    dY W + mask⊙(T A)            the same kernel, other strides
                    residual + s·S Bᵀ            the same kernel without the base product
    _grad_b_and_t   dB = s·dYᵀ S, T = s·dY B     one read of dY
    _grad_columns   dA = Tᵀ drop(x)              one read of x; on request also mask⊙(T A), which then seeds dX

The scale s multiplies fp32 sums, before they are rounded, and only those of products with B or for it: S is kept as
the definition has it, and is finite in fp16 where the definition's is. Shapes: x [M, K], W [N, K], A [R, K], B [N, R],
dY [M, N]; S and T [M, R]. Every offset is computed in 64 bits. The decomposition at the rank-r tensors follows
LoRAFusion (arXiv 2510.00206, section 4), without its atomics and its stored masks.

What is streamed (x, dY) is the left factor of a product or, as [rows, columns], the right one, never a transposed left
one: mma operands of both kinds share one layout in shared memory, so that asynchronous copies can run ahead of both.
S and T are loaded as [ranks, rows] for the same reason.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
    UPCAST,
    Dropout,
    as_matrix,
    cdiv,
    dot,
    dot_mode,
    keep_mask,
    launch,
    processor_count,
    rank_block,
    split_evenly,
)
from fastpeft.kernels._partials import Sum, add_up, shares, shares_or_whole
from fastpeft.kernels._tiles import FUSED_TAIL_RANK, Tiles, by_tiles, table_of, tiles_for

# Registers hold a block of ranks up to the one; beyond, a kernel that holds ranks takes them in slices of the other,
# and reads what it streams once for each. In slices of 256 it would read it half as often, and spill.
MOST_RANKS, SLICE = 256, 128
WHOLE_RANK = 32  # up to which a dA of few rows is written whole

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _known_multiple(R, RANK_UNIT: tl.constexpr):
    """R, of which the compiler then knows that RANK_UNIT divides it: at rank 8 rows are read whole, not by element."""
    return R // RANK_UNIT * RANK_UNIT


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, scale, threshold, M, K, R, depth_per_program,
    stride_xm, stride_xk, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads depth_per_program columns of BLOCK_M rows of x, once, and keeps their R products in registers.

    out [depth runs, M, R]: with more than one run, partial sums for `_partials`.
    """
    R = _known_multiple(R, RANK_UNIT)
    stride_xk, stride_ak = tl.cast(stride_xk, tl.int64), tl.cast(stride_ak, tl.int64)
    row_start = tl.program_id(0).to(tl.int64) * BLOCK_M
    depth_run = tl.program_id(1).to(tl.int64)
    first = depth_run * depth_per_program
    rows = row_start + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    inner = first + tl.arange(0, BLOCK_K)
    p_x = x_ptr + rows[:, None] * stride_xm + inner[None, :] * stride_xk
    p_a = a_ptr + ranks[None, :] * stride_ar + inner[:, None] * stride_ak
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, depth_per_program, BLOCK_K):
        m_k = inner < K - k
        x = tl.load(p_x, mask=(rows < M)[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(p_a, mask=m_k[:, None] & (ranks < R)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if DROPOUT:
            x = tl.where(keep_mask(seed_ptr, row_start, first + k, threshold, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
        acc = dot(x, a, acc, MODE, HALF, UPCAST)
        p_x += BLOCK_K * stride_xk
        p_a += BLOCK_K * stride_ak
    p_out = out_ptr + (depth_run * M + rows)[:, None] * R + ranks[None, :]
    tl.store(p_out, acc * scale, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def _tail_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, p_ptr, q_ptr, out_ptr, seed_ptr, scale, threshold, M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_qn, stride_qr, stride_rm, stride_rn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, BASE_MODE: tl.constexpr, HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program computes a [BLOCK_M, BLOCK_N] tile of x wᵀ + bias + residual + scale·mask⊙(p qᵀ), rounded once.

    Tiles are walked in groups of GROUP rows of tiles, so that neighbours find x and w in L2.
    """
    R = _known_multiple(R, RANK_UNIT)
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
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = r + tl.arange(0, BLOCK_R).to(tl.int64)
        p = tl.load(p_ptr + rows[:, None] * R + ranks[None, :], mask=m_m[:, None] & (ranks < R)[None, :], other=0.0)
        p_q = q_ptr + columns[None, :] * stride_qn + ranks[:, None] * stride_qr
        q = tl.load(p_q, mask=(ranks < R)[:, None] & m_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = dot(p, q, acc, MODE, HALF, UPCAST)
    acc *= scale
    if DROPOUT:
        keep = keep_mask(seed_ptr, row_start, column_start, threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)
    if HAS_BASE:
        stride_xk, stride_wk = tl.cast(stride_xk, tl.int64), tl.cast(stride_wk, tl.int64)
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
    RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads a rectangle of dY, rows_per_program by BLOCK_N, once.

    It keeps dB of its columns in registers over all its rows, and writes its columns' share of T row block by row
    block: t [N / BLOCK_N, M, R] and db [row runs, N, R] are fp32 partial sums for `_partials`.
    """
    R = _known_multiple(R, RANK_UNIT)
    column_block, row_run = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    m_n, m_r = columns < N, ranks < R
    first = row_run * rows_per_program
    p_b = b_ptr + columns[None, :] * stride_bn + ranks[:, None] * stride_br
    b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
    acc = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for offset in range(0, rows_per_program, BLOCK_M):
        rows = first + offset + tl.arange(0, BLOCK_M)
        m_m = rows < M
        p_dy = dy_ptr + rows[:, None] * stride_dm + columns[None, :] * stride_dn
        dy = tl.load(p_dy, mask=m_m[:, None] & m_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        m_out = m_r[:, None] & m_m[None, :]
        s = tl.load(s_ptr + rows[None, :] * R + ranks[:, None], mask=m_out, other=0.0)  # [BLOCK_R, BLOCK_M]
        t = dot(b, tl.trans(dy), tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32), MODE, HALF, UPCAST)
        tl.store(t_ptr + (column_block * M + rows)[None, :] * R + ranks[:, None], t, mask=m_out)
        acc = dot(s, dy, acc, MODE, HALF, UPCAST)
        if WITH_BIAS:
            total += tl.sum(dy.to(tl.float32), axis=0)
    p_db = db_ptr + (row_run * N + columns)[None, :] * R + ranks[:, None]
    tl.store(p_db, acc, mask=m_r[:, None] & m_n[None, :])
    if WITH_BIAS:
        tl.store(dbias_ptr + row_run * N + columns, total, mask=m_n)


@triton.jit
def _grad_columns_kernel(
    t_ptr, x_ptr, a_ptr, out_ptr, tail_ptr, sum_ptr, seed_ptr, keep_scale, threshold, M, K, R, rows_per_program,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_or, stride_ok,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    WITH_PRODUCT: tl.constexpr, WITH_TAIL: tl.constexpr, WITH_SUM: tl.constexpr, WHOLE: tl.constexpr,
    DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_K columns of x over rows_per_program rows, once, and keeps tᵀ drop(x) in registers.

    WITH_TAIL also writes mask⊙(t a)·keep_scale, for which t is in hand; WITH_SUM also sums x's columns. out [row
    runs, R·K] and sum [row runs, K] are fp32 partial sums for `_partials`; WHOLE: of a single one, out·keep_scale.
    """
    R = _known_multiple(R, RANK_UNIT)
    row_run = tl.program_id(1).to(tl.int64)
    column_start = tl.program_id(0).to(tl.int64) * BLOCK_K
    columns = column_start + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    m_k, m_r = columns < K, ranks < R
    first = row_run * rows_per_program
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
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
            m_t = m_r[:, None] & m_m[None, :]
            t = tl.load(t_ptr + rows[None, :] * R + ranks[:, None], mask=m_t, other=0.0)  # [BLOCK_R, BLOCK_M]
            acc = dot(t, x, acc, MODE, HALF, UPCAST)
            if WITH_TAIL:
                tail = dot(tl.trans(t), a, tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32), MODE, HALF, UPCAST)
                if DROPOUT:
                    tail = tl.where(keep, tail * keep_scale, 0.0)
                tl.store(tail_ptr + rows[:, None] * K + columns[None, :], tail, mask=m_x)
        if WITH_SUM:
            total += tl.sum(x.to(tl.float32), axis=0)
    if WITH_PRODUCT:
        p_out = out_ptr + row_run * R * K + columns[None, :] * stride_ok + ranks[:, None] * stride_or
        if WHOLE:
            acc *= keep_scale
        tl.store(p_out, acc, mask=m_r[:, None] & m_k[None, :])
    if WITH_SUM:
        tl.store(sum_ptr + row_run * K + columns, total, mask=m_k)


@functools.cache
def constants(rank_unit: int, mode: str, data_dtype: torch.dtype, tiles: Tiles) -> dict:
    """What a launch is compiled for, beside its blocks: of ranks that `rank_unit` divides. Not to be changed."""
    half = TRITON_TYPES[data_dtype]
    return {"RANK_UNIT": rank_unit, "MODE": mode, "HALF": half, "UPCAST": UPCAST, **tiles.options}


def _launched_on(x: torch.Tensor) -> tuple[str, int]:
    """What else a launch hangs on: (the table of tiles, the processors) of x's device."""
    return table_of(x.device), processor_count(x)


def _mask_arguments(dropout: Dropout | None) -> tuple:
    """(seed, keep_scale, threshold) of a launch; without dropout nothing of it is read."""
    return (None, 1.0, 0) if dropout is None else (dropout.seed, dropout.keep_scale, dropout.threshold)


def shrink(
    x: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype, dropout: Dropout | None = None, tiles=None
) -> torch.Tensor:
    """scale·drop(x) aᵀ: x as `as_matrix` takes it, [M, K], a [R, K] (any strides) -> [M, R] in `dtype`."""
    (rows, depth, *strides), rank, device = as_matrix(x), a.shape[0], x.device
    if rank > MOST_RANKS:
        return torch.cat([shrink(x, each, scale, dtype, dropout, tiles) for each in a.split(SLICE)], 1)
    drops = dropout is not None
    grid, run, options = _shrink_launch(
        rows, depth, rank, x.dtype, dot_mode(x.dtype, a.dtype), drops, tiles, *_launched_on(x)
    )
    sums = []
    out, parts = shares_or_whole(grid[1], (rows, rank), dtype, device, 1.0, sums)
    seed, keep_scale, threshold = _mask_arguments(dropout)
    launch(
        _shrink_kernel, grid, x,
        x, a, parts, seed, scale * keep_scale, threshold, rows, depth, rank, run, *strides, *a.stride(),
        **options,
    )  # fmt: skip
    add_up(sums)
    return out


@by_tiles
def _shrink_launch(rows, depth, rank, dtype, mode, drops, tiles, table, processors) -> tuple[tuple, int, dict]:
    """(the grid, columns of a program, and what the kernel is compiled for)."""
    tiles = tiles or tiles_for("shrink", rank, mode, drops, table)
    row_blocks = cdiv(rows, tiles.rows)
    run, runs = split_evenly(depth, tiles.depth, processors // max(1, row_blocks))
    blocks = dict(BLOCK_M=tiles.rows, BLOCK_K=tiles.depth, BLOCK_R=rank_block(rank))
    return (row_blocks, runs), run, dict(**blocks, DROPOUT=drops, **constants(math.gcd(rank, 16), mode, dtype, tiles))


def tail(
    p: torch.Tensor,
    q: torch.Tensor,
    dtype: torch.dtype,
    *,
    base: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    out_dtype: torch.dtype | None = None,
    lead: Sequence[int] | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """x wᵀ + bias + residual + scale·mask⊙(p qᵀ), rounded once: p [M, R], q [N, R], base = x [M, K], w [N, K].

    `dtype` is the data's, which is what the products are made for; the result is of that type or of `out_dtype`, and
    [M, N] or (*lead, N), which are as many.
    """
    (rows, rank), columns = p.shape, q.shape[0]
    x, w = base or (None, None)
    bias = None if bias is None else bias.contiguous()
    drops, has = dropout is not None, (base is not None, bias is not None, residual is not None)
    wide = out_dtype not in (None, dtype)
    modes = dot_mode(dtype, q.dtype), dot_mode(dtype, dtype)
    grid, options = _tail_launch(rows, columns, rank, dtype, *modes, drops, wide, *has, tiles, table_of(p.device))
    seed, keep_scale, threshold = _mask_arguments(dropout)
    out = torch.empty(*(lead or (rows,)), columns, dtype=out_dtype or dtype, device=p.device)
    launch(
        _tail_kernel, grid, p,
        x, w, bias, residual, p, q, out, seed, scale * keep_scale, threshold,
        rows, columns, x.shape[1] if base else 0, rank,
        *(x.stride() if base else (0, 0)), *(w.stride() if base else (0, 0)), *q.stride(),
        *(residual.stride() if residual is not None else (0, 0)), **options,
    )  # fmt: skip
    return out


@by_tiles
def _tail_launch(
    rows, columns, rank, dtype, mode, base_mode, drops, wide, has_base, has_bias, has_residual, tiles, table
):
    """(the grid, and what the kernel is compiled for)."""
    tiles = tiles or tiles_for("tail" if has_base else "expand", rank, mode, drops or wide, table)
    options = dict(
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, BLOCK_R=min(rank_block(rank), tiles.ranks),
        GROUP=8, HAS_BASE=has_base, HAS_BIAS=has_bias, HAS_RESIDUAL=has_residual, DROPOUT=drops, BASE_MODE=base_mode,
        **constants(math.gcd(rank, 16), mode, dtype, tiles),
    )  # fmt: skip
    return (cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns),), options


def grad_b_and_t(
    dy: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    with_bias: bool,
    tiles: Tiles | None = None,
    sums: list[Sum] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dB = scale·dyᵀ s [N, R] like b, T = scale·dy b [M, R] like s, Σ dy [N] in fp32 or None) from one read of dy
    [M, N], as `as_matrix` takes it. With `sums` they are there when these are added up."""
    (rows, columns, *strides), rank, device = as_matrix(dy), b.shape[1], dy.device
    mode = dot_mode(dy.dtype, b.dtype)
    grid, run, options = _grad_b_and_t_launch(rows, columns, rank, dy.dtype, mode, with_bias, tiles, *_launched_on(dy))
    column_blocks, runs = grid
    own = [] if sums is None else sums
    t, t_parts = shares(column_blocks, (rows, rank), s.dtype, device, scale, own)
    db, db_parts = shares(runs, (columns, rank), b.dtype, device, scale, own)
    dbias, bias_parts = shares(runs, (columns,), torch.float32, device, 1.0, own) if with_bias else (None, None)
    launch(
        _grad_b_and_t_kernel, grid, dy,
        dy, s, b, t_parts, db_parts, bias_parts, rows, columns, rank, run, *strides, *b.stride(), **options
    )  # fmt: skip
    if sums is None:
        add_up(own)
    return db, t, dbias


@by_tiles
def _grad_b_and_t_launch(rows, columns, rank, dtype, mode, with_bias, tiles, table, processors):
    """(the grid, rows of a program, and what the kernel is compiled for)."""
    tiles = tiles or tiles_for("grad_b_and_t", rank, mode, False, table)
    column_blocks = cdiv(columns, tiles.columns)
    run, runs = split_evenly(rows, tiles.rows, processors // column_blocks)
    blocks = dict(BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_R=rank_block(rank))
    options = dict(**blocks, WITH_BIAS=with_bias, **constants(math.gcd(rank, 16), mode, dtype, tiles))
    return (column_blocks, runs), run, options


def grad_columns(
    t: torch.Tensor | None,
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    tail_of: torch.Tensor | None = None,
    with_sum: bool = False,
    transposed: bool = False,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(scale·tᵀ drop(x) in `dtype`, mask⊙(t·tail_of) [M, K] in x's type, Σ x [K] in fp32) from one read of x [M, K], as
    `as_matrix` takes it; t [M, R].

    The first is [R, K], or [K, R] if `transposed`; each is None where it was not asked for.
    """
    (rows, columns, *strides), rank, device = as_matrix(x), t.shape[1] if t is not None else 1, x.device
    if rank > MOST_RANKS:
        slices = [(each.contiguous(), with_sum and not number) for number, each in enumerate(t.split(SLICE, 1))]
        options = dict(transposed=transposed, scale=scale, dropout=dropout, tiles=tiles)
        found = [grad_columns(each, x, dtype, with_sum=summed, **options) for each, summed in slices]
        tail_out = None if tail_of is None else tail(t, tail_of.t(), x.dtype, dropout=dropout)
        return torch.cat([product for product, _, _ in found], int(transposed)), tail_out, found[0][2]
    has, drops, mode = t is not None, dropout is not None, dot_mode(x.dtype, x.dtype if t is None else t.dtype)
    flags = has, tail_of is not None, with_sum, drops, scale == 1.0
    grid, run, fuse, whole, options = _grad_columns_launch(
        rows, columns, rank, x.dtype, mode, *flags, tiles, *_launched_on(x)
    )
    fused, tail_out = (tail_of, torch.empty(rows, columns, dtype=x.dtype, device=device)) if fuse else (None, None)
    seed, keep_scale, threshold = _mask_arguments(dropout)
    product = parts = total = total_parts = None
    share, factor = shares_or_whole if whole else shares, scale * keep_scale
    sums = []
    if has:
        shape = (columns, rank) if transposed else (rank, columns)
        product, parts = share(grid[1], shape, dtype, device, factor, sums)
    if with_sum:
        total, total_parts = share(grid[1], (columns,), torch.float32, device, 1.0, sums)
    launch(
        _grad_columns_kernel, grid, x,
        t, x, fused, parts, tail_out, total_parts, seed, factor if whole else keep_scale, threshold,
        rows, columns, rank, run, *strides,
        *(fused.stride() if fuse else (0, 0)), *((1, rank) if transposed else (columns, 1)), **options,
    )  # fmt: skip
    if tail_of is not None and not fuse:
        tail_out = tail(t, tail_of.t(), x.dtype, dropout=dropout)
    add_up(sums)
    return product, tail_out, total


@by_tiles
def _grad_columns_launch(
    rows, columns, rank, dtype, mode, has_product, wants_tail, with_sum, drops, unscaled, tiles, table, processors
):
    """(the grid, rows of a program, whether it has the tail, whether one writes all, what the kernel is compiled for).
    Registers do not suffice for rounding many ranks too, or for another scale."""
    tiles = tiles or tiles_for("grad_columns", rank, mode, drops, table)
    fuse = wants_tail and rank <= FUSED_TAIL_RANK[mode]
    column_blocks = cdiv(columns, tiles.columns)
    run, runs = split_evenly(rows, tiles.rows, 2 * processors // column_blocks)
    whole = runs == 1 and rank <= WHOLE_RANK and (unscaled or not drops)
    options = dict(
        BLOCK_M=tiles.rows, BLOCK_K=tiles.columns, BLOCK_R=rank_block(rank), WITH_PRODUCT=has_product, WITH_TAIL=fuse,
        WITH_SUM=with_sum, WHOLE=whole, DROPOUT=drops, **constants(math.gcd(rank, 16), mode, dtype, tiles),
    )  # fmt: skip
    return (column_blocks, runs), run, fuse, whole, options
