"""Kernel of `row_norms`: ‖W_n + s·B_n A‖ of each row n, for DoRA, with one read of W [N, K] and no tensor of its size.

    _row_norms      Σ_k (W_nk + s·Σ_r B_nr A_rk)²     a tile of V = W + s·B A lives in registers, and is squared there

A [R, K], which every program reads, comes from L2. In fp32 the product is as exact as fp32 is, whatever torch's setting
for tf32: where V is much smaller than W, it is the difference of two numbers that are nearly the same.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import UPCAST, cdiv, launch, processor_count, rank_block, split_evenly
from fastpeft.kernels._tiles import INTERPRETED, Tiles

# Predicted: chosen from what the compiler reports, measured on no GPU. `ranks` are the most that are taken at a time.
CUDA = {"half": Tiles(64, 128, ranks=32), "ieee": Tiles(64, 64, ranks=32, stages=2)}
HIP = {"half": Tiles(64, 128, ranks=32, stages=2), "ieee": Tiles(64, 64, ranks=32, stages=2)}
SMALL = Tiles(16, 32, ranks=16, warps=4, stages=1)  # the interpreter's: every loop turns in small tests


@triton.jit
def _product(b, a, acc, IEEE: tl.constexpr, UPCAST: tl.constexpr):
    if IEEE or UPCAST:
        return tl.dot(b.to(tl.float32), a.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(b, a, acc)


@triton.jit
def _row_norms_kernel(
    w_ptr, a_ptr, b_ptr, out_ptr, scale, N, K, R, depth_per_program,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr, SPLIT: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program reads depth_per_program columns of BLOCK_N rows of W, once, and what of A and B belongs to them: B
    once too if ONE_BLOCK, where it has all ranks at a time.

    out [depth runs, N]: with more than one run the sums of squares, else their roots.
    """
    stride_wk, stride_ak = tl.cast(stride_wk, tl.int64), tl.cast(stride_ak, tl.int64)
    depth_run = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = depth_run * depth_per_program
    inner = first + tl.arange(0, BLOCK_K)
    m_n = rows < N
    p_w = w_ptr + rows[:, None] * stride_wn + inner[None, :] * stride_wk
    p_a = a_ptr + inner[None, :] * stride_ak
    p_b = b_ptr + rows[:, None] * stride_bn
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    if ONE_BLOCK:
        m_r = ranks < R
        b = tl.load(p_b + ranks[None, :] * stride_br, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for k in range(0, min(depth_per_program, K - first), BLOCK_K):
        m_k = inner < K - k
        w = tl.load(p_w, mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        update = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        if ONE_BLOCK:
            a = tl.load(p_a + ranks[:, None] * stride_ar, mask=m_r[:, None] & m_k[None, :], other=0.0)
            update = _product(b, a, update, IEEE, UPCAST)
        else:
            for r in tl.range(0, R, BLOCK_R, num_stages=1):
                m_rest = ranks < R - r
                p_rest = p_b + (r + ranks)[None, :] * stride_br
                rest = tl.load(p_rest, mask=m_n[:, None] & m_rest[None, :], other=0.0)
                p_next = p_a + (r + ranks)[:, None] * stride_ar
                a = tl.load(p_next, mask=m_rest[:, None] & m_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
                update = _product(rest, a, update, IEEE, UPCAST)
        v = w.to(tl.float32) + scale * update
        acc += tl.sum(v * v, axis=1)
        p_w += BLOCK_K * stride_wk
        p_a += BLOCK_K * stride_ak
    tl.store(out_ptr + depth_run * N + rows, acc if SPLIT else tl.sqrt_rn(acc), mask=m_n)


def tiles_of(mode: str) -> Tiles:
    return SMALL if INTERPRETED else (HIP if torch.version.hip else CUDA)[mode]


def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """‖weight_n + scale·b_n a‖ in fp32 [N]: weight [N, K], a [R, K], b [N, R], any strides."""
    (rows, depth), rank = weight.shape, len(a)
    mode = "half" if a.dtype == b.dtype != torch.float32 else "ieee"
    tiles = tiles_of(mode)
    row_blocks = cdiv(rows, tiles.rows)
    run, runs = split_evenly(depth, tiles.columns, processor_count(weight) // max(1, row_blocks))
    block = min(rank_block(rank), tiles.ranks)
    out = torch.empty(runs, rows, dtype=torch.float32, device=weight.device)
    launch(
        _row_norms_kernel, (row_blocks, runs), weight,
        weight, a, b, out, scale, rows, depth, rank, run, *weight.stride(), *a.stride(), *b.stride(),
        BLOCK_N=tiles.rows, BLOCK_K=tiles.columns, BLOCK_R=block, ONE_BLOCK=rank <= block, SPLIT=runs > 1,
        IEEE=mode == "ieee", UPCAST=UPCAST, **tiles.options,
    )  # fmt: skip
    return out[0] if runs == 1 else out.sum(0).sqrt_()
