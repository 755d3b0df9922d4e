"""Kernels of `lora_projections`: up to four linear layers with LoRA that read one x.

    _shrink_all          S_p = drop_p(x) A_pᵀ for every p                              one read of x
    _grad_all_columns    dA_p = T_pᵀ drop_p(x) for every p; on request also            one read of x
                         Σ mask_p⊙(T_p A_p), which then seeds dX
    _tail_all            that sum alone, where registers do not suffice for both, or no dA is wanted

The base products, their tails, and dB_p with T_p, which read each dY_p once, are those of `lora_linear`. Shapes: x [M,
K], A_p [R_p, K] contiguous, S_p and T_p [M, R_p] contiguous. Masks are independent: each projection has a seed, and an
element's fate is a function of that and its place. Offsets are computed in 64 bits.
"""

import math

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import (
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
from fastpeft.kernels._partials import add_up, shares, shares_or_whole
from fastpeft.kernels._several import (
    MOST,
    block_and_rank,
    four,
    mask_arguments,
    matrices_of,
    places_of,
    several_tiles,
    whole,
)
from fastpeft.kernels._tiles import FUSED_TAIL_RANK, Tiles, by_tiles, family_of, table_of
from fastpeft.kernels.lora_linear import _known_multiple, constants


@triton.jit
def _shrunk(
    x, acc, a_ptr, seed_ptr, threshold, row_start, inner, column_start, m_k, K, R, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + drop(x) aᵀ [BLOCK_M, BLOCK_R] of one projection's depth block."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    a = tl.load(a_ptr + ranks[None, :] * K + inner[:, None], mask=m_k[:, None] & (ranks < R)[None, :], other=0.0)
    if DROPS:
        x = tl.where(keep_mask(seed_ptr, row_start, column_start, threshold, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
    return dot(x, a, acc, MODE, HALF, UPCAST)


@triton.jit
def _store_rows(acc, out_ptr, scale, rows, M, R, BLOCK_R: tl.constexpr):
    """scale·acc into out [M, R]."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(out_ptr + rows[:, None] * R + ranks[None, :], acc * scale, mask=mask)


@triton.jit
def _shrink_all_kernel(
    x_ptr, a_0, a_1, a_2, a_3, out_ptr, seed_0, seed_1, seed_2, seed_3, scale_0, scale_1, scale_2, scale_3,
    threshold_0, threshold_1, threshold_2, threshold_3, M, K, R_0, R_1, R_2, R_3, depth_per_program,
    stride_xm, stride_xk,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
    RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads depth_per_program columns of BLOCK_M rows of x, once, for all COUNT projections.

    out [depth runs, M·ΣR]: of each run one [M, R] behind the other. Bit p of DROPS: projection p has a mask.
    """
    R_0 = _known_multiple(R_0, RANK_UNIT)
    R_1 = _known_multiple(R_1, RANK_UNIT)
    R_2 = _known_multiple(R_2, RANK_UNIT)
    R_3 = _known_multiple(R_3, RANK_UNIT)
    stride_xk = tl.cast(stride_xk, tl.int64)
    row_start = tl.program_id(0).to(tl.int64) * BLOCK_M
    depth_run = tl.program_id(1).to(tl.int64)
    first = depth_run * depth_per_program
    rows = row_start + tl.arange(0, BLOCK_M)
    inner = first + tl.arange(0, BLOCK_K)
    p_x = x_ptr + rows[:, None] * stride_xm + inner[None, :] * stride_xk
    acc_0 = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc_1 = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc_2 = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc_3 = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, depth_per_program, BLOCK_K):
        m_k = inner < K
        x = tl.load(p_x, mask=(rows < M)[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        acc_0 = _shrunk(
            x, acc_0, a_0, seed_0, threshold_0, row_start, inner, first + k, m_k, K, R_0, BLOCK_M, BLOCK_K, BLOCK_R,
            DROPS % 2 == 1, MODE, HALF, UPCAST,
        )  # fmt: skip
        if COUNT > 1:
            acc_1 = _shrunk(
                x, acc_1, a_1, seed_1, threshold_1, row_start, inner, first + k, m_k, K, R_1, BLOCK_M, BLOCK_K,
                BLOCK_R, DROPS // 2 % 2 == 1, MODE, HALF, UPCAST,
            )  # fmt: skip
        if COUNT > 2:
            acc_2 = _shrunk(
                x, acc_2, a_2, seed_2, threshold_2, row_start, inner, first + k, m_k, K, R_2, BLOCK_M, BLOCK_K,
                BLOCK_R, DROPS // 4 % 2 == 1, MODE, HALF, UPCAST,
            )  # fmt: skip
        if COUNT > 3:
            acc_3 = _shrunk(
                x, acc_3, a_3, seed_3, threshold_3, row_start, inner, first + k, m_k, K, R_3, BLOCK_M, BLOCK_K,
                BLOCK_R, DROPS // 8 % 2 == 1, MODE, HALF, UPCAST,
            )  # fmt: skip
        p_x += BLOCK_K * stride_xk
        inner += BLOCK_K
    M_64 = tl.cast(M, tl.int64)
    p_out = out_ptr + depth_run * M_64 * (R_0 + R_1 + R_2 + R_3)
    _store_rows(acc_0, p_out, scale_0, rows, M, R_0, BLOCK_R)
    if COUNT > 1:
        _store_rows(acc_1, p_out + M_64 * R_0, scale_1, rows, M, R_1, BLOCK_R)
    if COUNT > 2:
        _store_rows(acc_2, p_out + M_64 * (R_0 + R_1), scale_2, rows, M, R_2, BLOCK_R)
    if COUNT > 3:
        _store_rows(acc_3, p_out + M_64 * (R_0 + R_1 + R_2), scale_3, rows, M, R_3, BLOCK_R)


@triton.jit
def _load_columns(a_ptr, columns, K, R, BLOCK_R: tl.constexpr):
    """[BLOCK_R, BLOCK_K] of a [R, K]."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (ranks < R)[:, None] & (columns < K)[None, :]
    return tl.load(a_ptr + ranks[:, None] * K + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _with_rows(
    x, acc, tail, a, t_ptr, seed_ptr, keep_scale, threshold, rows, row_start, column_start, M, R,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr, WITH_TAIL: tl.constexpr,
    MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(acc + tᵀ drop(x), tail + mask⊙(t a)·keep_scale) of one projection's block of rows."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (ranks < R)[:, None] & (rows < M)[None, :]
    t = tl.load(t_ptr + rows[None, :] * R + ranks[:, None], mask=mask, other=0.0)  # [BLOCK_R, BLOCK_M]
    if DROPS:
        keep = keep_mask(seed_ptr, row_start, column_start, threshold, BLOCK_M, BLOCK_K)
        acc = dot(t, tl.where(keep, x, 0.0).to(x.dtype), acc, MODE, HALF, UPCAST)
        if WITH_TAIL:
            term = dot(tl.trans(t), a, tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32), MODE, HALF, UPCAST)
            tail += tl.where(keep, term * keep_scale, 0.0)
    else:
        acc = dot(t, x, acc, MODE, HALF, UPCAST)
        if WITH_TAIL:
            tail = dot(tl.trans(t), a, tail, MODE, HALF, UPCAST)
    return acc, tail


@triton.jit
def _store_columns(acc, out_ptr, columns, K, R, keep_scale, BLOCK_R: tl.constexpr):
    """keep_scale·acc into out [R, K]."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (ranks < R)[:, None] & (columns < K)[None, :]
    tl.store(out_ptr + ranks[:, None] * K + columns[None, :], acc * keep_scale, mask=mask)


@triton.jit
def _grad_all_columns_kernel(
    x_ptr, t_0, t_1, t_2, t_3, a_0, a_1, a_2, a_3, out_ptr, tail_ptr, seed_0, seed_1, seed_2, seed_3,
    scale_0, scale_1, scale_2, scale_3, threshold_0, threshold_1, threshold_2, threshold_3,
    M, K, R_0, R_1, R_2, R_3, rows_per_program, stride_xm, stride_xk,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
    WITH_TAIL: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_K columns of x over rows_per_program rows, once, for all COUNT projections.

    out [row runs, ΣR·K]: of each run one dA [R, K] behind the other. WITH_TAIL also writes the sum of the rank-r terms
    of dX. Bit p of DROPS: projection p has a mask.
    """
    R_0 = _known_multiple(R_0, RANK_UNIT)
    R_1 = _known_multiple(R_1, RANK_UNIT)
    R_2 = _known_multiple(R_2, RANK_UNIT)
    R_3 = _known_multiple(R_3, RANK_UNIT)
    row_run = tl.program_id(1).to(tl.int64)
    column_start = tl.program_id(0).to(tl.int64) * BLOCK_K
    columns = column_start + tl.arange(0, BLOCK_K)
    first = row_run * rows_per_program
    K_64 = tl.cast(K, tl.int64)
    acc_0 = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    acc_1 = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    acc_2 = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    acc_3 = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    if WITH_TAIL:
        b_0 = _load_columns(a_0, columns, K_64, R_0, BLOCK_R)
        b_1 = _load_columns(a_1, columns, K_64, R_1, BLOCK_R) if COUNT > 1 else b_0
        b_2 = _load_columns(a_2, columns, K_64, R_2, BLOCK_R) if COUNT > 2 else b_0
        b_3 = _load_columns(a_3, columns, K_64, R_3, BLOCK_R) if COUNT > 3 else b_0
    else:
        b_0, b_1, b_2, b_3 = 0.0, 0.0, 0.0, 0.0
    for offset in range(0, rows_per_program, BLOCK_M):
        row_start = first + offset
        rows = row_start + tl.arange(0, BLOCK_M)
        m_x = (rows < M)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk, mask=m_x, other=0.0)
        tail = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        acc_0, tail = _with_rows(
            x, acc_0, tail, b_0, t_0, seed_0, scale_0, threshold_0, rows, row_start, column_start, M, R_0,
            BLOCK_M, BLOCK_K, BLOCK_R, DROPS % 2 == 1, WITH_TAIL, MODE, HALF, UPCAST,
        )  # fmt: skip
        if COUNT > 1:
            acc_1, tail = _with_rows(
                x, acc_1, tail, b_1, t_1, seed_1, scale_1, threshold_1, rows, row_start, column_start, M, R_1,
                BLOCK_M, BLOCK_K, BLOCK_R, DROPS // 2 % 2 == 1, WITH_TAIL, MODE, HALF, UPCAST,
            )  # fmt: skip
        if COUNT > 2:
            acc_2, tail = _with_rows(
                x, acc_2, tail, b_2, t_2, seed_2, scale_2, threshold_2, rows, row_start, column_start, M, R_2,
                BLOCK_M, BLOCK_K, BLOCK_R, DROPS // 4 % 2 == 1, WITH_TAIL, MODE, HALF, UPCAST,
            )  # fmt: skip
        if COUNT > 3:
            acc_3, tail = _with_rows(
                x, acc_3, tail, b_3, t_3, seed_3, scale_3, threshold_3, rows, row_start, column_start, M, R_3,
                BLOCK_M, BLOCK_K, BLOCK_R, DROPS // 8 % 2 == 1, WITH_TAIL, MODE, HALF, UPCAST,
            )  # fmt: skip
        if WITH_TAIL:
            tl.store(tail_ptr + rows[:, None] * K_64 + columns[None, :], tail, mask=m_x)
    p_out = out_ptr + row_run * K_64 * (R_0 + R_1 + R_2 + R_3)
    _store_columns(acc_0, p_out, columns, K_64, R_0, scale_0, BLOCK_R)
    if COUNT > 1:
        _store_columns(acc_1, p_out + K_64 * R_0, columns, K_64, R_1, scale_1, BLOCK_R)
    if COUNT > 2:
        _store_columns(acc_2, p_out + K_64 * (R_0 + R_1), columns, K_64, R_2, scale_2, BLOCK_R)
    if COUNT > 3:
        _store_columns(acc_3, p_out + K_64 * (R_0 + R_1 + R_2), columns, K_64, R_3, scale_3, BLOCK_R)


@triton.jit
def _with_term(
    acc, t_ptr, a_ptr, seed_ptr, keep_scale, threshold, rows, columns, row_start, column_start, M, K, R,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
    MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + mask⊙(t a)·keep_scale of one projection's tile."""
    term = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32) if DROPS else acc
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = r + tl.arange(0, BLOCK_R).to(tl.int64)
        m_t = (rows < M)[:, None] & (ranks < R)[None, :]
        t = tl.load(t_ptr + rows[:, None] * R + ranks[None, :], mask=m_t, other=0.0)  # [BLOCK_M, BLOCK_R]
        m_a = (ranks < R)[:, None] & (columns < K)[None, :]
        a = tl.load(a_ptr + ranks[:, None] * K + columns[None, :], mask=m_a, other=0.0)  # [BLOCK_R, BLOCK_K]
        term = dot(t, a, term, MODE, HALF, UPCAST)
    if DROPS:
        keep = keep_mask(seed_ptr, row_start, column_start, threshold, BLOCK_M, BLOCK_K)
        term = acc + tl.where(keep, term * keep_scale, 0.0)
    return term


@triton.jit
def _tail_all_kernel(
    t_0, t_1, t_2, t_3, a_0, a_1, a_2, a_3, out_ptr, seed_0, seed_1, seed_2, seed_3,
    scale_0, scale_1, scale_2, scale_3, threshold_0, threshold_1, threshold_2, threshold_3,
    M, K, R_0, R_1, R_2, R_3,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
    ONTO: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program writes a [BLOCK_M, BLOCK_K] tile of the sum of the rank-r terms of dX; ONTO adds it to what is there.
    Bit p of DROPS: projection p has a mask."""
    R_0 = _known_multiple(R_0, RANK_UNIT)
    R_1 = _known_multiple(R_1, RANK_UNIT)
    R_2 = _known_multiple(R_2, RANK_UNIT)
    R_3 = _known_multiple(R_3, RANK_UNIT)
    blocks = tl.cdiv(K, BLOCK_K)
    row_start = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    column_start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_K
    rows = row_start + tl.arange(0, BLOCK_M)
    columns = column_start + tl.arange(0, BLOCK_K)
    K_64 = tl.cast(K, tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    acc = _with_term(
        acc, t_0, a_0, seed_0, scale_0, threshold_0, rows, columns, row_start, column_start, M, K_64, R_0,
        BLOCK_M, BLOCK_K, BLOCK_R, DROPS % 2 == 1, MODE, HALF, UPCAST,
    )  # fmt: skip
    if COUNT > 1:
        acc = _with_term(
            acc, t_1, a_1, seed_1, scale_1, threshold_1, rows, columns, row_start, column_start, M, K_64, R_1,
            BLOCK_M, BLOCK_K, BLOCK_R, DROPS // 2 % 2 == 1, MODE, HALF, UPCAST,
        )  # fmt: skip
    if COUNT > 2:
        acc = _with_term(
            acc, t_2, a_2, seed_2, scale_2, threshold_2, rows, columns, row_start, column_start, M, K_64, R_2,
            BLOCK_M, BLOCK_K, BLOCK_R, DROPS // 4 % 2 == 1, MODE, HALF, UPCAST,
        )  # fmt: skip
    if COUNT > 3:
        acc = _with_term(
            acc, t_3, a_3, seed_3, scale_3, threshold_3, rows, columns, row_start, column_start, M, K_64, R_3,
            BLOCK_M, BLOCK_K, BLOCK_R, DROPS // 8 % 2 == 1, MODE, HALF, UPCAST,
        )  # fmt: skip
    p_out = out_ptr + rows[:, None] * K_64 + columns[None, :]
    m_out = (rows < M)[:, None] & (columns < K)[None, :]
    if ONTO:
        acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, acc, mask=m_out)


def _launched_on(x: torch.Tensor) -> tuple[str, str, int]:
    """What else a launch hangs on: (the table of tiles, the family, the processors) of x's device."""
    return table_of(x.device), family_of(x.device), processor_count(x)


def shrink_all(
    x: torch.Tensor,
    a: list[torch.Tensor],
    dtype: torch.dtype,
    dropouts: list[Dropout | None],
    tiles: Tiles | None = None,
) -> list[torch.Tensor]:
    """[drop_p(x) a_pᵀ, ...]: x [M, K], as `as_matrix` takes it, a_p [R_p, K] -> [M, R_p] each, in `dtype`; up to MOST
    of them."""
    rows, depth, *strides = as_matrix(x)
    mode = dot_mode(x.dtype, a[0].dtype)
    seeds, scales, thresholds, drops = mask_arguments(dropouts)
    grid, run, ranks, shape, places, options = _shrink_all_launch(
        rows, depth, tuple([each.shape[0] for each in a]), x.dtype, mode, drops, tiles, *_launched_on(x)
    )
    sums = []
    out, parts = shares_or_whole(grid[1], shape, dtype, x.device, 1.0, sums)
    launch(
        _shrink_all_kernel, grid, x,
        x, *four(whole(a), None), parts, *seeds, *scales, *thresholds, rows, depth, *ranks, run, *strides,
        **options,
    )  # fmt: skip
    add_up(sums)
    return matrices_of(out, places)


@by_tiles
def _shrink_all_launch(rows, depth, ranks, dtype, mode, drops, tiles, table, family, processors):
    """(the grid, columns of a program, the ranks, shape and places of the results, what the kernel is compiled for)."""
    block, rank = block_and_rank(ranks)
    tiles = tiles or several_tiles("shrink", rank, mode, bool(drops), bool(drops), table, family)
    row_blocks = cdiv(rows, tiles.rows)
    run, runs = split_evenly(depth, tiles.depth, processors // max(1, row_blocks))
    options = dict(
        COUNT=len(ranks), BLOCK_M=tiles.rows, BLOCK_K=tiles.depth, BLOCK_R=block, DROPS=drops,
        **constants(math.gcd(16, *ranks), mode, dtype, tiles),
    )  # fmt: skip
    return (row_blocks, runs), run, four(ranks, 0), *places_of(rows, ranks, by_rank=False), options


def grad_all_columns(
    ts: list[torch.Tensor],
    x: torch.Tensor,
    a: list[torch.Tensor],
    dropouts: list[Dropout | None],
    with_tail: bool,
    tiles: Tiles | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """([t_pᵀ drop_p(x), ...] like a_p, Σ mask_p⊙(t_p a_p) [M, K] in x's type or None) from one read of x [M, K], as
    `as_matrix` takes it: t_p [M, R_p] and a_p [R_p, K]; up to MOST of them. The second is None too where registers do
    not suffice for it (`holds_tail`)."""
    rows, columns, *strides = as_matrix(x)
    mode = dot_mode(x.dtype, a[0].dtype)
    seeds, scales, thresholds, drops = mask_arguments(dropouts)
    ranks = tuple([each.shape[0] for each in a])
    grid, run, ranks, with_tail, share, shape, places, options = _grad_all_columns_launch(
        rows, columns, ranks, x.dtype, mode, drops, with_tail, tiles, *_launched_on(x)
    )
    tail = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if with_tail else None
    sums = []
    grads, parts = share(grid[1], shape, a[0].dtype, x.device, 1.0, sums)
    launch(
        _grad_all_columns_kernel, grid, x,
        x, *four(ts, None), *four(whole(a), None), parts, tail, *seeds, *scales, *thresholds,
        rows, columns, *ranks, run, *strides, **options,
    )  # fmt: skip
    add_up(sums)
    return matrices_of(grads, places), tail


def holds_tail(rank: int, mode: str) -> bool:
    """Whether `grad_all_columns` can hold the rank-r term of dX beside every dA: `rank` by `block_and_rank`."""
    return rank <= FUSED_TAIL_RANK[mode]


@by_tiles
def _grad_all_columns_launch(rows, columns, ranks, dtype, mode, drops, with_tail, tiles, table, family, processors):
    """(the grid, rows of a program, the ranks, whether it has the tail, how results are shared, their shape and places,
    what the kernel is compiled for). Of MOST, registers do not suffice for rounding."""
    block, rank = block_and_rank(ranks)
    with_tail = with_tail and holds_tail(rank, mode)
    tiles = tiles or several_tiles("grad_columns", rank, mode, bool(drops), bool(drops), table, family)
    column_blocks = cdiv(columns, tiles.columns)
    run, runs = split_evenly(rows, tiles.rows, 2 * processors // column_blocks)
    options = dict(
        COUNT=len(ranks), BLOCK_M=tiles.rows, BLOCK_K=tiles.columns, BLOCK_R=block, DROPS=drops, WITH_TAIL=with_tail,
        **constants(math.gcd(16, *ranks), mode, dtype, tiles),
    )  # fmt: skip
    share, places = shares_or_whole if len(ranks) < MOST else shares, places_of(columns, ranks, by_rank=True)
    return (column_blocks, runs), run, four(ranks, 0), with_tail, share, *places, options


def tail_all(
    ts: list[torch.Tensor],
    a: list[torch.Tensor],
    dropouts: list[Dropout | None],
    data_dtype: torch.dtype,
    out_dtype: torch.dtype,
    onto: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Σ mask_p⊙(t_p a_p) [M, K] in `out_dtype`, or added to `onto` in place: t_p [M, R_p], a_p [R_p, K]; up to MOST of
    them. `data_dtype` is what the products are made for."""
    rows, columns, ranks = ts[0].shape[0], a[0].shape[1], tuple([each.shape[0] for each in a])
    mode = dot_mode(data_dtype, a[0].dtype)
    seeds, scales, thresholds, drops = mask_arguments(dropouts)
    out = torch.empty(rows, columns, dtype=out_dtype, device=a[0].device) if onto is None else onto
    wide = out.dtype is not data_dtype
    grid, ranks, options = _tail_all_launch(
        rows, columns, ranks, data_dtype, mode, drops, wide, onto is not None, tiles, *_launched_on(out)
    )
    launch(
        _tail_all_kernel, grid, out,
        *four(ts, None), *four(whole(a), None), out, *seeds, *scales, *thresholds, rows, columns, *ranks,
        **options,
    )  # fmt: skip
    return out


@by_tiles
def _tail_all_launch(rows, columns, ranks, dtype, mode, drops, wide, onto, tiles, table, family, processors):
    """(the grid, the ranks, what the kernel is compiled for)."""
    block = rank_block(max(ranks))
    tiles = tiles or several_tiles("expand", block, mode, bool(drops) or wide, bool(drops), table, family)
    options = dict(
        COUNT=len(ranks), BLOCK_M=tiles.rows, BLOCK_K=tiles.columns, BLOCK_R=min(block, tiles.ranks), DROPS=drops,
        ONTO=onto, **constants(math.gcd(16, *ranks), mode, dtype, tiles),
    )  # fmt: skip
    return (cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns),), four(ranks, 0), options
