"""Kernels of `lora_mlp` between its vendor's products: the activation, forward and backward, and every rank-r product
of what they hold.

    _gated_forward     h = act(g)⊙u, S = drop(h) Aᵀ of down                one read of g and u, one write of h
    _gated_backward    dh += mask⊙(T A) of down; dg = dh⊙u⊙act'(g), du = dh⊙act(g); T = s·dg B and dB = s·dgᵀ S of gate,
                       the same of up, and dA = Tᵀ drop(h) of down, for which h is made again as it was, rounded

The backward kernel reads dh, g and u once and writes dg and du; beyond the ranks that registers can hold it writes h
too, and the products have passes of their own (`lora_linear`). Shapes: g, u, h, dh [M, H], rows close together; A of
down [R, H], B of gate and up [H, R], S and T [M, R]. Sums over rows or columns are fp32 partial sums for
`_partials`, never atomics. Every offset is computed in 64 bits. That the activation can carry these products while
it waits for memory is this project's own; the in-place kernels of Unsloth and Liger make g and u into their gradients.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from fastpeft.kernels._mlp_tiles import FUSED_RANK, mlp_tiles
from fastpeft.kernels._partials import Sum, add_up, shares, shares_or_whole
from fastpeft.kernels._tiles import Tiles, by_tiles, family_of
from fastpeft.kernels.lora_linear import TRITON_TYPES, _known_multiple, _mask_arguments, constants


@triton.jit
def _activation(g, NAME: tl.constexpr):
    """(act(g), act'(g)) of g in fp32."""
    if NAME == "silu":
        gate = 1.0 / (1.0 + tl.exp(-g))
        return g * gate, gate * (1.0 + g * (1.0 - gate))
    elif NAME == "gelu":
        gate = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * gate, gate + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif NAME == "gelu_tanh":  # 0.5·g·(1 + tanh z) = g·σ(2 z)
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
        return g * gate, gate + g * gate * (1.0 - gate) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        positive = tl.where(g < 0.0, 0.0, g)  # of NaN NaN
        return positive * positive, 2.0 * positive


@triton.jit
def _gated_forward_kernel(
    gate_ptr, up_ptr, a_ptr, h_ptr, s_ptr, seed_ptr, keep_scale, threshold, M, H, R, columns_per_program,
    stride_ar, stride_ah,
    NAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, WITH_S: tl.constexpr,
    DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program makes columns_per_program columns of BLOCK_M rows of h, and keeps their R products in registers.

    s [column runs, M, R]: with more than one run, partial sums for `_partials`.
    """
    R = _known_multiple(R, RANK_UNIT)
    H = tl.cast(H, tl.int64)
    row_start = tl.program_id(0).to(tl.int64) * BLOCK_M
    column_run = tl.program_id(1).to(tl.int64)
    first = column_run * columns_per_program
    rows = row_start + tl.arange(0, BLOCK_M)
    m_m = rows < M
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for offset in range(0, columns_per_program, BLOCK_H):
        columns = first + offset + tl.arange(0, BLOCK_H)
        m_c = columns < H
        m_h = m_m[:, None] & m_c[None, :]
        places = rows[:, None] * H + columns[None, :]
        g = tl.load(gate_ptr + places, mask=m_h, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + places, mask=m_h, other=0.0).to(tl.float32)
        act, _ = _activation(g, NAME)
        h = (act * u).to(HALF)  # [BLOCK_M, BLOCK_H]
        tl.store(h_ptr + places, h, mask=m_h)
        if WITH_S:
            p_a = a_ptr + ranks[None, :] * stride_ar + columns[:, None] * stride_ah
            a = tl.load(p_a, mask=m_c[:, None] & (ranks < R)[None, :], other=0.0)  # [BLOCK_H, BLOCK_R]
            if DROPOUT:
                keep = keep_mask(seed_ptr, row_start, first + offset, threshold, BLOCK_M, BLOCK_H)
                h = tl.where(keep, h, 0.0).to(HALF)
            acc = dot(h, a, acc, MODE, HALF, UPCAST)
    if WITH_S:
        p_s = s_ptr + (column_run * M + rows)[:, None] * R + ranks[None, :]
        tl.store(p_s, acc * keep_scale, mask=m_m[:, None] & (ranks < R)[None, :])


@triton.jit
def _by_columns(p, columns, H, R, stride_h, stride_r, BLOCK_R: tl.constexpr):
    """[BLOCK_R, BLOCK_H] of a matrix with H columns of R ranks."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (ranks < R)[:, None] & (columns < H)[None, :]
    return tl.load(p + columns[None, :] * stride_h + ranks[:, None] * stride_r, mask=mask, other=0.0)


@triton.jit
def _by_rows(p, rows, M, R, BLOCK_R: tl.constexpr):
    """[BLOCK_R, BLOCK_M] of S or T [M, R]."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (ranks < R)[:, None] & (rows < M)[None, :]
    return tl.load(p + rows[None, :] * R + ranks[:, None], mask=mask, other=0.0)


@triton.jit
def _one_side(
    grad, b, db, s_ptr, t_ptr, rows, column_block, M, R,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """db + gradᵀ s of one of gate and up; its share of T is written to t [column blocks, M, R]."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    t = dot(grad, tl.trans(b), tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32), MODE, HALF, UPCAST)
    mask = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(t_ptr + (column_block * M + rows)[:, None] * R + ranks[None, :], t, mask=mask)
    return dot(_by_rows(s_ptr, rows, M, R, BLOCK_R), grad, db, MODE, HALF, UPCAST)


@triton.jit
def _store_sum(p, acc, row_run, columns, H, R, stride_h, stride_r, BLOCK_R: tl.constexpr):
    """acc [BLOCK_R, BLOCK_H] into the run's part of p [row runs, H·R]."""
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    mask = (ranks < R)[:, None] & (columns < H)[None, :]
    tl.store(p + row_run * H * R + columns[None, :] * stride_h + ranks[:, None] * stride_r, acc, mask=mask)


@triton.jit
def _gated_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, t_ptr, a_ptr, da_ptr, seed_ptr, keep_scale, threshold,
    gate_s_ptr, gate_b_ptr, gate_t_ptr, gate_db_ptr, up_s_ptr, up_b_ptr, up_t_ptr, up_db_ptr,
    M, H, R_DOWN, R_GATE, R_UP, rows_per_program,
    stride_ar, stride_ah, stride_gn, stride_gr, stride_un, stride_ur,
    NAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DOWN: tl.constexpr,
    BLOCK_GATE: tl.constexpr, BLOCK_UP: tl.constexpr, WITH_DOWN: tl.constexpr, WITH_GATE: tl.constexpr,
    WITH_UP: tl.constexpr, WITH_H: tl.constexpr, DROPOUT: tl.constexpr, UNIT_DOWN: tl.constexpr,
    UNIT_GATE: tl.constexpr, UNIT_UP: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program goes over a rectangle of dh, gate and up, rows_per_program by BLOCK_H, once.

    WITH_DOWN: dh is that of the base product, to which the rank-r term of down is added, and dA of down is summed;
    WITH_GATE, WITH_UP: T and dB are; WITH_H: h is written. dA [row runs, R, H], dB [row runs, H, R] and T [column
    blocks, M, R] are fp32 partial sums for `_partials`.
    """
    R_DOWN, R_GATE = _known_multiple(R_DOWN, UNIT_DOWN), _known_multiple(R_GATE, UNIT_GATE)
    R_UP = _known_multiple(R_UP, UNIT_UP)
    H = tl.cast(H, tl.int64)
    column_block, row_run = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column_start, first = column_block * BLOCK_H, row_run * rows_per_program
    columns = column_start + tl.arange(0, BLOCK_H)
    if WITH_DOWN:
        a = _by_columns(a_ptr, columns, H, R_DOWN, stride_ah, stride_ar, BLOCK_DOWN)
        da = tl.zeros([BLOCK_DOWN, BLOCK_H], dtype=tl.float32)
    if WITH_GATE:
        gate_b = _by_columns(gate_b_ptr, columns, H, R_GATE, stride_gn, stride_gr, BLOCK_GATE)
        gate_db = tl.zeros([BLOCK_GATE, BLOCK_H], dtype=tl.float32)
    if WITH_UP:
        up_b = _by_columns(up_b_ptr, columns, H, R_UP, stride_un, stride_ur, BLOCK_UP)
        up_db = tl.zeros([BLOCK_UP, BLOCK_H], dtype=tl.float32)
    for offset in range(0, rows_per_program, BLOCK_M):
        rows = first + offset + tl.arange(0, BLOCK_M)
        m_h = (rows < M)[:, None] & (columns < H)[None, :]
        places = rows[:, None] * H + columns[None, :]
        dh = tl.load(dh_ptr + places, mask=m_h, other=0.0).to(tl.float32)
        g = tl.load(gate_ptr + places, mask=m_h, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + places, mask=m_h, other=0.0).to(tl.float32)
        act, act_grad = _activation(g, NAME)
        if WITH_H or WITH_DOWN:
            h = (act * u).to(HALF)
        if WITH_H:
            tl.store(h_ptr + places, h, mask=m_h)
        if WITH_DOWN:
            t = _by_rows(t_ptr, rows, M, R_DOWN, BLOCK_DOWN)
            term = dot(tl.trans(t), a, tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32), MODE, HALF, UPCAST)
            if DROPOUT:
                keep = keep_mask(seed_ptr, first + offset, column_start, threshold, BLOCK_M, BLOCK_H)
                term = tl.where(keep, term * keep_scale, 0.0)
                h = tl.where(keep, h, 0.0).to(HALF)
            dh += term
            da = dot(t, h, da, MODE, HALF, UPCAST)
        dgate = (dh * u * act_grad).to(HALF)
        tl.store(dgate_ptr + places, dgate, mask=m_h)
        if WITH_GATE:
            gate_db = _one_side(
                dgate, gate_b, gate_db, gate_s_ptr, gate_t_ptr, rows, column_block, M, R_GATE,
                BLOCK_M, BLOCK_GATE, MODE, HALF, UPCAST,
            )  # fmt: skip
        dup = (dh * act).to(HALF)
        tl.store(dup_ptr + places, dup, mask=m_h)
        if WITH_UP:
            up_db = _one_side(
                dup, up_b, up_db, up_s_ptr, up_t_ptr, rows, column_block, M, R_UP,
                BLOCK_M, BLOCK_UP, MODE, HALF, UPCAST,
            )  # fmt: skip
    if WITH_DOWN:
        _store_sum(da_ptr, da, row_run, columns, H, R_DOWN, 1, H, BLOCK_DOWN)
    if WITH_GATE:
        _store_sum(gate_db_ptr, gate_db, row_run, columns, H, R_GATE, R_GATE, 1, BLOCK_GATE)
    if WITH_UP:
        _store_sum(up_db_ptr, up_db, row_run, columns, H, R_UP, R_UP, 1, BLOCK_UP)


class Side(NamedTuple):
    """What the backward kernel reads of gate, or of up: S [M, R], B [H, R], and the scaling."""

    s: Tensor
    b: Tensor
    scale: float


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


_NO_SIDE = (None,) * 6


def _side(side: Side | None, grid: tuple[int, int], rows: int, columns: int, sums: list[Sum]) -> tuple:
    """(T, dB, and what the kernel is given: S, B, and what programs write their shares of T and dB into), each None
    without a side."""
    if side is None:
        return _NO_SIDE
    column_blocks, runs = grid
    rank, dtype, device = side.b.shape[1], side.b.dtype, side.b.device
    t, t_parts = shares(column_blocks, (rows, rank), dtype, device, side.scale, sums)
    db, db_parts = shares(runs, (columns, rank), dtype, device, side.scale, sums)
    return t, db, side.s, side.b, t_parts, db_parts


class Grads(NamedTuple):
    """dg and du [M, H]; h [M, H] or None; T [M, R] and dB [H, R] of gate and of up, and dA [R, H] of down, or None."""

    dgate: Tensor
    dup: Tensor
    h: Tensor | None
    t: list[Tensor | None]
    db: list[Tensor | None]
    da: Tensor | None


def _launched_on(x: Tensor) -> tuple[str, int]:
    """What else a launch hangs on: (the family, the processors) of x's device."""
    return family_of(x.device), processor_count(x)


def gated_forward(
    gate: Tensor, up: Tensor, activation: str, a: Tensor | None = None, dropout: Dropout | None = None,
    tiles: Tiles | None = None, lead: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(h = act(gate)⊙up [M, H], or (*lead, H), which are as many, S = drop(h) aᵀ [M, R] in a's dtype, or None without
    a [R, H])."""
    (rows, columns), rank, has, drops = gate.shape, 1 if a is None else a.shape[0], a is not None, dropout is not None
    mode = dot_mode(gate.dtype, gate.dtype if a is None else a.dtype)
    grid, run, options = _gated_forward_launch(
        rows, columns, rank, gate.dtype, mode, activation, has, drops, tiles, *_launched_on(gate)
    )
    h = torch.empty(*(lead or (rows,)), columns, dtype=gate.dtype, device=gate.device)
    sums, s, s_parts = [], None, None
    if has:
        s, s_parts = shares_or_whole(grid[1], (rows, rank), a.dtype, gate.device, 1.0, sums)
    seed, keep_scale, threshold = _mask_arguments(dropout)
    launch(
        _gated_forward_kernel, grid, gate,
        gate, up, a, h, s_parts, seed, keep_scale, threshold, rows, columns, rank, run,
        *_strides(a), **options,
    )  # fmt: skip
    add_up(sums)
    return h, s


@by_tiles
def _gated_forward_launch(rows, columns, rank, dtype, mode, activation, with_s, drops, tiles, family, processors):
    """(the grid, columns of a program, what the kernel is compiled for)."""
    tiles = tiles or mlp_tiles("gated_forward", rank, mode, drops, family)
    row_blocks = cdiv(rows, tiles.rows)
    run, runs = split_evenly(columns, tiles.columns, 4 * processors // row_blocks)
    options = dict(
        NAME=activation, BLOCK_M=tiles.rows, BLOCK_H=tiles.columns, BLOCK_R=rank_block(rank), WITH_S=with_s,
        DROPOUT=drops, **constants(math.gcd(rank, 16), mode, dtype, tiles),
    )  # fmt: skip
    return (row_blocks, runs), run, options


def fused_rank(data_dtype: torch.dtype, adapter_dtype: torch.dtype) -> int:
    """Up to which rank `gated_backward` holds the products of all three."""
    return FUSED_RANK[dot_mode(data_dtype, adapter_dtype)]


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, *, down: tuple[Tensor, Tensor] | None = None,
    sides: tuple[Side | None, Side | None] = (None, None), with_h: bool = False, dropout: Dropout | None = None,
    tiles: Tiles | None = None,
) -> Grads:  # fmt: skip
    """What becomes of dh [M, H], which is used up: du is in its place. down: its T [M, R] and A [R, H], whose term dh
    does not have yet. All ranks at most `fused_rank`."""
    (rows, columns), (gate_side, up_side) = dh.shape, sides
    t_down, a = down or (None, None)
    matrices = [None if each is None else each.b for each in sides]
    ranks = [0 if a is None else a.shape[0], *[0 if b is None else b.shape[1] for b in matrices]]
    given = [each for each in (a, *matrices, dh) if each is not None][0]
    drops, mode = dropout is not None, dot_mode(dh.dtype, given.dtype)
    grid, run, sizes, options = _gated_backward_launch(
        rows, columns, *ranks, dh.dtype, mode, activation, with_h, drops, tiles, *_launched_on(dh)
    )
    dgate, h, sums = torch.empty_like(dh), torch.empty_like(dh) if with_h else None, []
    gate_t, gate_db, *gate_given = _side(gate_side, grid, rows, columns, sums)
    up_t, up_db, *up_given = _side(up_side, grid, rows, columns, sums)
    seed, keep_scale, threshold = _mask_arguments(dropout)
    da = da_parts = None
    if down is not None:
        da, da_parts = shares(grid[1], (ranks[0], columns), a.dtype, dh.device, keep_scale, sums)
    launch(
        _gated_backward_kernel, grid, dh,
        dh, gate, up, dgate, dh, h, t_down, a, da_parts, seed, keep_scale, threshold,
        *gate_given, *up_given, *sizes, run,
        *_strides(a), *_strides(matrices[0]), *_strides(matrices[1]), **options,
    )  # fmt: skip
    add_up(sums)
    return Grads(dgate, dh, h, [gate_t, up_t], [gate_db, up_db], da)


@by_tiles
def _gated_backward_launch(
    rows, columns, rank_down, rank_gate, rank_up, dtype, mode, activation, with_h, drops, tiles, family, processors
):
    """(the grid, rows of a program, the sizes as the kernel is told, what it is compiled for); rank 0: without it."""
    ranks = rank_down, rank_gate, rank_up
    tiles = tiles or mlp_tiles("gated_backward", max(ranks), mode, not all(ranks), family)
    column_blocks = cdiv(columns, tiles.columns)
    run, runs = split_evenly(rows, tiles.rows, processors // column_blocks)
    named = ("DOWN", rank_down), ("GATE", rank_gate), ("UP", rank_up)
    of_ranks = {f"BLOCK_{name}": rank_block(rank or 1) for name, rank in named}
    of_ranks |= {f"WITH_{name}": rank > 0 for name, rank in named}
    of_ranks |= {f"UNIT_{name}": math.gcd(rank or 1, 16) for name, rank in named}
    options = dict(
        NAME=activation, BLOCK_M=tiles.rows, BLOCK_H=tiles.columns, WITH_H=with_h, DROPOUT=drops, **of_ranks,
        MODE=mode, HALF=TRITON_TYPES[dtype], UPCAST=UPCAST, **tiles.options,
    )  # fmt: skip
    return (column_blocks, runs), run, (rows, columns, *(rank or 1 for rank in ranks)), options
