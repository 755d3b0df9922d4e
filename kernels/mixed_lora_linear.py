"""Kernels of `mixed_lora_linear`: the rank-r terms of a batch whose samples have adapters of their own, and their
gradients, all adapters in one launch.

    _mixed_shrink         S = drop(x) Aᵀ, or T = s·dY B            one read of x, or of dY
    _mixed_expand         y + s·S Bᵀ, or dX + mask⊙(T A)           in place on adapters' rows alone, or made anew
    _mixed_grad_columns   dA = Tᵀ drop(x), or dB = s·dYᵀ S         one read of x, or of dY
    _mixed_sum            the deterministic end of the split reductions

A program has a block of rows of one adapter (`_segments`), wherever in the batch its samples are: it looks up where
each sorted row lies, and reads the adapter's matrices once for the block. Ranks differ: the tile is that of the
greatest, and lanes beyond an adapter's own are masked. Adapters lie one behind the other, A as (r, K) and B as (N, r),
row by row, and so do the segments of S and T, as (rows, r). OF_B: the matrix is a B or its gradient, with whose
products the scaling goes; else an A.

Shapes: x [M, K], dY [M, N], M = samples·S. Every offset is computed in 64 bits. The grouping is that of Punica's and
S-LoRA's kernels (arXiv 2310.18547, 2311.03285); training through it, dropout and mixed precision are `lora_linear`'s.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels import _segments
from fastpeft.kernels._common import (
    UPCAST,
    cdiv,
    dot,
    dot_mode,
    keep_mask,
    launch,
    processor_count,
    rank_block,
    split_evenly,
)
from fastpeft.kernels._mixed_tiles import mixed_tiles
from fastpeft.kernels._partials import add_up, shares_or_whole
from fastpeft.kernels._segments import Layout
from fastpeft.kernels._tiles import Tiles
from fastpeft.kernels.lora_linear import constants

# Fields of a segment, see `_segments.segments`.
FIELDS = tl.constexpr(6)
COUNT, RANK, RANKS_BEFORE, ELEMENTS_BEFORE, THRESHOLD = (tl.constexpr(field) for field in range(1, 6))


@triton.jit
def _multiple(x, UNIT: tl.constexpr):
    """x, of which the compiler then knows that UNIT divides it."""
    return x // UNIT * UNIT


@triton.jit
def _rows_at(order_ptr, sorted_rows, mask, S):
    """Where sorted rows lie in the batch."""
    return tl.load(order_ptr + sorted_rows // S, mask=mask, other=0) * S + sorted_rows % S


@triton.jit
def _mixed_shrink_kernel(
    x_ptr, a_ptr, out_ptr, seed_ptr, order_ptr, blocks_ptr, segments_ptr, factors_ptr, S, K, elements,
    depth_per_program, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OF_B: tl.constexpr,
    DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads depth_per_program columns of BLOCK_M rows of an adapter, once, and keeps their products.

    OF_B: the matrix is (K, r) instead of (r, K). out [depth runs, elements]: with more than one run, partial sums for
    `_partials`.
    """
    block, depth_run = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    stride_xk, K = tl.cast(stride_xk, tl.int64), tl.cast(K, tl.int64)
    segment, local = tl.load(blocks_ptr + 2 * block), tl.load(blocks_ptr + 2 * block + 1)
    p_segment = segments_ptr + segment * FIELDS
    R = _multiple(tl.load(p_segment + RANK), RANK_UNIT)
    first_row, count = tl.load(p_segment) + local, tl.load(p_segment + COUNT)
    inside = local + tl.arange(0, BLOCK_M)
    m_m = inside < count
    rows = _rows_at(order_ptr, first_row + tl.arange(0, BLOCK_M), m_m, S)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    m_r = ranks < R
    first = depth_run * depth_per_program
    inner = first + tl.arange(0, BLOCK_K)
    p_x = x_ptr + rows[:, None] * stride_xm + inner[None, :] * stride_xk
    p_a = a_ptr + _multiple(tl.load(p_segment + RANKS_BEFORE), RANK_UNIT) * K
    if OF_B:
        p_a = p_a + inner[:, None] * R + ranks[None, :]
        step = BLOCK_K * R
    else:
        p_a = p_a + ranks[None, :] * K + inner[:, None]
        step = tl.cast(BLOCK_K, tl.int64)
    threshold = tl.load(p_segment + THRESHOLD).to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, depth_per_program, BLOCK_K):
        m_k = inner < K - k
        x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(p_a, mask=m_k[:, None] & m_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if DROPOUT:
            x = tl.where(keep_mask(seed_ptr, first_row, first + k, threshold, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
        acc = dot(x, a, acc, MODE, HALF, UPCAST)
        p_x += BLOCK_K * stride_xk
        p_a += step
    if OF_B:
        acc *= tl.load(factors_ptr + 2 * segment)
    if DROPOUT:
        acc *= tl.load(factors_ptr + 2 * segment + 1)
    start = depth_run * elements + _multiple(tl.load(p_segment + ELEMENTS_BEFORE), RANK_UNIT)
    tl.store(out_ptr + start + inside[:, None] * R + ranks[None, :], acc, mask=m_m[:, None] & m_r[None, :])


@triton.jit
def _mixed_expand_kernel(
    p_ptr, q_ptr, residual_ptr, out_ptr, seed_ptr, order_ptr, blocks_ptr, segments_ptr, factors_ptr, S, N,
    stride_rm, stride_rn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OF_B: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr,
    HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program computes residual + mask⊙(p qᵀ) of BLOCK_M rows of an adapter in BLOCK_N columns, rounded once; of
    rows of no adapter, whose rank is 0, the residual. OF_B: q is (N, r) instead of (r, N)."""
    block, column_start = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_N
    N = tl.cast(N, tl.int64)
    segment, local = tl.load(blocks_ptr + 2 * block), tl.load(blocks_ptr + 2 * block + 1)
    p_segment = segments_ptr + segment * FIELDS
    R = _multiple(tl.load(p_segment + RANK), RANK_UNIT)
    first_row, count = tl.load(p_segment) + local, tl.load(p_segment + COUNT)
    inside, columns = local + tl.arange(0, BLOCK_M), column_start + tl.arange(0, BLOCK_N)
    m_m, m_n = inside < count, columns < N
    rows = _rows_at(order_ptr, first_row + tl.arange(0, BLOCK_M), m_m, S)
    p_p = p_ptr + _multiple(tl.load(p_segment + ELEMENTS_BEFORE), RANK_UNIT) + inside[:, None] * R
    p_q = q_ptr + _multiple(tl.load(p_segment + RANKS_BEFORE), RANK_UNIT) * N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in tl.range(0, R.to(tl.int32), BLOCK_R, num_stages=1):
        ranks = r + tl.arange(0, BLOCK_R).to(tl.int64)
        m_r = ranks < R
        p = tl.load(p_p + ranks[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if OF_B:
            q = tl.load(p_q + columns[None, :] * R + ranks[:, None], mask=m_r[:, None] & m_n[None, :], other=0.0)
        else:
            q = tl.load(p_q + ranks[:, None] * N + columns[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
        acc = dot(p, q, acc, MODE, HALF, UPCAST)
    if OF_B:
        acc *= tl.load(factors_ptr + 2 * segment)
    if DROPOUT:
        threshold = tl.load(p_segment + THRESHOLD).to(tl.int32)
        keep = keep_mask(seed_ptr, first_row, column_start, threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * tl.load(factors_ptr + 2 * segment + 1), 0.0)
    m_out = m_m[:, None] & m_n[None, :]
    if HAS_RESIDUAL:
        p_residual = residual_ptr + rows[:, None] * stride_rm + columns[None, :] * stride_rn
        acc += tl.load(p_residual, mask=m_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], acc, mask=m_out)


@triton.jit
def _mixed_grad_columns_kernel(
    t_ptr, x_ptr, parts_ptr, seed_ptr, order_ptr, runs_ptr, segments_ptr, S, K, size, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, OF_B: tl.constexpr,
    DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_K columns of x over a run of an adapter's rows, once, and keeps tᵀ drop(x) in registers.

    parts [runs, size]: fp32 sums for `_mixed_sum`, laid out as an (r, K) matrix, or with OF_B as a (K, r) one.
    """
    column_start, run = tl.program_id(0).to(tl.int64) * BLOCK_K, tl.program_id(1).to(tl.int64)
    K = tl.cast(K, tl.int64)
    segment, start = tl.load(runs_ptr + 3 * run), tl.load(runs_ptr + 3 * run + 1)
    length = tl.load(runs_ptr + 3 * run + 2).to(tl.int32)
    p_segment = segments_ptr + segment * FIELDS
    R = _multiple(tl.load(p_segment + RANK), RANK_UNIT)
    first_row = tl.load(p_segment) + start
    threshold = tl.load(p_segment + THRESHOLD).to(tl.int32)
    columns, ranks = column_start + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R).to(tl.int64)
    m_k, m_r = columns < K, ranks < R
    p_t = t_ptr + _multiple(tl.load(p_segment + ELEMENTS_BEFORE), RANK_UNIT) + start * R
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for offset in range(0, length, BLOCK_M):
        inside = offset + tl.arange(0, BLOCK_M).to(tl.int64)
        m_m = inside < length
        rows = _rows_at(order_ptr, first_row + inside, m_m, S)
        p_x = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk
        x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if DROPOUT:
            keep = keep_mask(seed_ptr, first_row + offset, column_start, threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0).to(x.dtype)
        t = tl.load(p_t + inside[None, :] * R + ranks[:, None], mask=m_r[:, None] & m_m[None, :], other=0.0)
        acc = dot(t, x, acc, MODE, HALF, UPCAST)
    p_part = parts_ptr + run * size
    if OF_B:
        p_part = p_part + columns[None, :] * R + ranks[:, None]
    else:
        p_part = p_part + ranks[:, None] * K + columns[None, :]
    tl.store(p_part, acc, mask=m_r[:, None] & m_k[None, :])


@triton.jit
def _mixed_sum_kernel(
    parts_ptr, out_ptr, firsts_ptr, segments_ptr, factors_ptr, K, size,
    BLOCK: tl.constexpr, OF_B: tl.constexpr, DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK places of an adapter's matrix over its runs, always in the same order, and rounds once."""
    segment, K = tl.program_id(1).to(tl.int64), tl.cast(K, tl.int64)
    p_segment = segments_ptr + segment * FIELDS
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < tl.load(p_segment + RANK) * K
    first, after = tl.load(firsts_ptr + segment), tl.load(firsts_ptr + segment + 1)
    p_part = parts_ptr + first * size + places
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range((after - first).to(tl.int32)):
        acc += tl.load(p_part, mask=mask, other=0.0)
        p_part += size
    if OF_B:
        acc *= tl.load(factors_ptr + 2 * segment)
    if DROPOUT:
        acc *= tl.load(factors_ptr + 2 * segment + 1)
    start = _multiple(tl.load(p_segment + RANKS_BEFORE), RANK_UNIT) * K
    tl.store(out_ptr + start + places, acc, mask=mask)


def _tiles(kernel: str, layout: Layout, mode: str, burden: bool, data: torch.Tensor) -> Tiles:
    return mixed_tiles(kernel, max(layout.ranks), mode, burden, data.device)


def shrink(
    x: torch.Tensor, matrices: torch.Tensor, layout: Layout, seed: torch.Tensor | None = None, *,
    of_b: bool = False, tiles: Tiles | None = None,
) -> torch.Tensor:  # fmt: skip
    """drop(x) aᵀ of every adapter's rows, [elements] in the matrices' dtype: x [M, K]; matrices, one behind the other,
    (r, K) each, or with of_b (K, r), and then times the scaling. `seed` None: nothing is dropped."""
    depth, device, dropout = x.shape[1], x.device, seed is not None
    mode = dot_mode(x.dtype, matrices.dtype)
    tiles = tiles or _tiles("shrink", layout, mode, dropout, x)
    blocks = _segments.blocks(layout.counts, tiles.rows, device)
    run, runs = split_evenly(depth, tiles.depth, processor_count(x) // max(1, len(blocks)))
    sums = []
    out, parts = shares_or_whole(runs, (layout.elements,), matrices.dtype, device, 1.0, sums)
    launch(
        _mixed_shrink_kernel, (len(blocks), runs), x,
        x, matrices, parts, seed, _segments.order(layout, device), blocks, _segments.segments(layout, device),
        _segments.factors(layout, device), layout.tokens, depth, layout.elements, run, *x.stride(),
        BLOCK_M=tiles.rows, BLOCK_K=tiles.depth, BLOCK_R=rank_block(max(layout.ranks)), OF_B=of_b,
        DROPOUT=dropout, **constants(layout.rank_unit, mode, x.dtype, tiles),
    )  # fmt: skip
    add_up(sums)
    return out


def expand(
    p: torch.Tensor, matrices: torch.Tensor, layout: Layout, out: torch.Tensor, dtype: torch.dtype, *,
    residual: torch.Tensor | None = None, seed: torch.Tensor | None = None, of_b: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:  # fmt: skip
    """`out` [M, N], contiguous, filled with residual + mask⊙(p qᵀ), rounded once: p [elements]; matrices, one behind
    the other, (r, N) each, or with of_b (N, r), and then times the scaling. `dtype` is the data's, which the products
    are made for.

    Where the residual is `out` itself, rows of no adapter are not touched.
    """
    columns, device, dropout = out.shape[1], out.device, seed is not None
    mode = dot_mode(dtype, matrices.dtype)
    tiles = tiles or _tiles("expand", layout, mode, dropout or out.dtype != dtype, out)
    rest = () if residual is out else (len(layout.rest) * layout.tokens,)
    blocks = _segments.blocks((*layout.counts, *rest), tiles.rows, device)
    launch(
        _mixed_expand_kernel, (len(blocks), cdiv(columns, tiles.columns)), out,
        p, matrices, residual, out, seed, _segments.order(layout, device), blocks,
        _segments.segments(layout, device), _segments.factors(layout, device), layout.tokens, columns,
        *(residual.stride() if residual is not None else (0, 0)),
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_R=min(rank_block(max(layout.ranks)), tiles.ranks),
        OF_B=of_b, HAS_RESIDUAL=residual is not None, DROPOUT=dropout,
        **constants(layout.rank_unit, mode, dtype, tiles),
    )  # fmt: skip
    return out


def grad_columns(
    t: torch.Tensor, x: torch.Tensor, layout: Layout, seed: torch.Tensor | None = None, *, of_b: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:  # fmt: skip
    """tᵀ drop(x) of every adapter's rows, in t's dtype: matrices one behind the other, (r, K) each, or with of_b
    (K, r), and then times the scaling; t [elements], x [M, K]."""
    columns, device, dropout = x.shape[1], x.device, seed is not None
    mode = dot_mode(x.dtype, t.dtype)
    tiles = tiles or _tiles("grad_columns", layout, mode, dropout, x)
    column_blocks = cdiv(columns, tiles.columns)
    parts = max(1, 2 * processor_count(x) // column_blocks)
    runs, firsts, count = _segments.runs(layout.counts, tiles.rows, parts, device)
    segments, size = _segments.segments(layout, device), max(layout.ranks) * columns
    sums = torch.empty(count, size, dtype=torch.float32, device=device)
    out = torch.empty(sum(layout.ranks) * columns, dtype=t.dtype, device=device)
    block = 256 if UPCAST else 1024
    launch(
        _mixed_grad_columns_kernel, (column_blocks, count), x,
        t, x, sums, seed, _segments.order(layout, device), runs, segments, layout.tokens, columns, size,
        *x.stride(), BLOCK_M=tiles.rows, BLOCK_K=tiles.columns, BLOCK_R=rank_block(max(layout.ranks)),
        OF_B=of_b, DROPOUT=dropout, **constants(layout.rank_unit, mode, x.dtype, tiles),
    )  # fmt: skip
    launch(
        _mixed_sum_kernel, (cdiv(size, block), len(layout.ranks)), x,
        sums, out, firsts, segments, _segments.factors(layout, device), columns, size, block, of_b,
        dropout, layout.rank_unit, enable_fp_fusion=True,
    )  # fmt: skip
    return out
