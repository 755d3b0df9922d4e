"""The base product of `lora_linear` with the rank-r term inside, for GPUs that copy tiles by descriptors (TMA).

    _persistent_tail   x Wᵀ + bias + residual + s·S Bᵀ   forward
                       dY W + residual + mask⊙(T A)      the same kernel, W read by its other dimension

It computes what `_tail_kernel` of `lora_linear` computes, by no more programs than there are processors: each walks
over tiles of the result, and x, W and the result travel by descriptors. The rank-r term opens each tile's sum, so that
scale and mask touch it alone and no second sum is held in registers; it is added in fp32, and the whole is rounded
once. S, T, A and B are loaded by pointers, with any strides.

The loop over tiles and the one over depth are two: as one (Triton's `flatten`) each step waits for its product before
it issues the next, as the compiled code says on sm_90, and on sm_100 a tile of 128 x 256 spills.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import Dropout, cdiv, dot, dot_mode, keep_mask, launch, processor_count, rank_block
from fastpeft.kernels._tiles import Tiles, optional_tiles, table_of
from fastpeft.kernels.lora_linear import _known_multiple, _mask_arguments, constants
from fastpeft.kernels.lora_linear import tail as by_pointers

ALIGNMENT = 16  # bytes, of a descriptor's first address and of the step from row to row
STORED_AT_ONCE = 128  # columns of a result's tile: a wider one is stored in two halves, by half the shared memory


@triton.jit
def _persistent_tail_kernel(
    x_desc, w_desc, bias_ptr, residual_ptr, p_ptr, q_ptr, out_desc, seed_ptr, scale, threshold, M, N, K, R,
    stride_qn, stride_qr, stride_rm, stride_rn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    W_BY_DEPTH: tl.constexpr, IN_HALVES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr, RANK_UNIT: tl.constexpr, MODE: tl.constexpr, BASE_MODE: tl.constexpr, HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program computes every num_programs-th [BLOCK_M, BLOCK_N] tile of x wᵀ + bias + residual + scale·mask⊙(p qᵀ).

    Tiles are walked in groups of GROUP rows of tiles, so that neighbours find x and w in L2. Beyond an edge a
    descriptor loads zeros and stores nothing. W_BY_DEPTH: w_desc is of wᵀ, whose rows lie one after the other.
    """
    R = _known_multiple(R, RANK_UNIT)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP * tiles_n)
        group_rows = min(tiles_m - group * GROUP, GROUP)
        within = tile % (GROUP * tiles_n)
        row_start = (group * GROUP + within % group_rows) * BLOCK_M
        column_start = (within // group_rows) * BLOCK_N
        rows = row_start.to(tl.int64) + tl.arange(0, BLOCK_M)
        columns = column_start.to(tl.int64) + tl.arange(0, BLOCK_N)
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
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row_start, k])  # [BLOCK_M, BLOCK_K]
            if W_BY_DEPTH:
                w = w_desc.load([k, column_start])  # [BLOCK_K, BLOCK_N]
            else:
                w = tl.trans(w_desc.load([column_start, k]))
            acc = dot(x, w, acc, BASE_MODE, HALF, UPCAST)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + columns, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            p_residual = residual_ptr + rows[:, None] * stride_rm + columns[None, :] * stride_rn
            acc += tl.load(p_residual, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
        if IN_HALVES:
            halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
            left, right = tl.split(halves)
            out_desc.store([row_start, column_start], left.to(out_desc.dtype))
            out_desc.store([row_start, column_start + BLOCK_N // 2], right.to(out_desc.dtype))
        else:
            out_desc.store([row_start, column_start], acc.to(out_desc.dtype))


def _described(tensor: torch.Tensor) -> bool:
    """Whether a descriptor can be of it: rows that lie whole and apart, aligned."""
    bytes_a_row = tensor.stride(0) * tensor.element_size()
    rows = tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] and bytes_a_row % ALIGNMENT == 0
    return rows and tensor.data_ptr() % ALIGNMENT == 0


def refusal(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> str | None:
    """Why the kernel cannot compute x wᵀ of x [M, K] and w [N, K], or None. Whether there are tiles for it on the
    device is another question."""
    if not _described(x):
        return "a descriptor of x needs rows that lie whole, at multiples of 16 bytes"
    if not (_described(w) or _described(w.t())):
        return "a descriptor of the weight needs rows or columns that lie whole, at multiples of 16 bytes"
    if w.shape[0] * out_dtype.itemsize % ALIGNMENT:
        return "a descriptor of the result needs rows of a multiple of 16 bytes"
    return None


def serves(x: torch.Tensor, w: torch.Tensor, adapter_dtype: torch.dtype) -> bool:
    """Whether the kernel, and not the one that stands in for it, computes x wᵀ with a term of `adapter_dtype`."""
    mode, family = dot_mode(x.dtype, adapter_dtype), table_of(x.device)
    return optional_tiles("persistent", 1, mode, False, family) is not None and refusal(x, w, x.dtype) is None


def tail(
    p: torch.Tensor,
    q: torch.Tensor,
    dtype: torch.dtype,
    *,
    base: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    out_dtype: torch.dtype | None = None,
    lead: Sequence[int] | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """x wᵀ + bias + residual + scale·mask⊙(p qᵀ) as `lora_linear.tail`, which stands in where this kernel cannot serve:
    for tensors by `refusal`, and on devices for which there are no tiles."""
    (x, w), (rows, rank), columns = base, p.shape, q.shape[0]
    out_dtype = out_dtype or dtype
    mode = dot_mode(dtype, q.dtype)
    burden = dropout is not None or residual is not None or out_dtype != dtype
    tiles = tiles or optional_tiles("persistent", rank, mode, burden, table_of(p.device))
    if tiles is None or refusal(x, w, out_dtype):
        options = dict(bias=bias, residual=residual, scale=scale, dropout=dropout, out_dtype=out_dtype, lead=lead)
        return by_pointers(p, q, dtype, base=base, **options)
    from triton.tools.tensor_descriptor import TensorDescriptor

    by_depth = not _described(w)
    bias = None if bias is None else bias.contiguous()
    seed, keep_scale, threshold = _mask_arguments(dropout)
    out = torch.empty(*(lead or (rows,)), columns, dtype=out_dtype, device=p.device)
    in_halves = tiles.columns > STORED_AT_ONCE
    stored = [tiles.rows, tiles.columns // 2 if in_halves else tiles.columns]
    descriptors = (
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(w.t(), [tiles.depth, tiles.columns])
        if by_depth
        else TensorDescriptor.from_tensor(w, [tiles.columns, tiles.depth]),
        TensorDescriptor(out, [rows, columns], [columns, 1], stored),
    )
    programs = min(processor_count(x), cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns))
    launch(
        _persistent_tail_kernel, (programs,), p,
        *descriptors[:2], bias, residual, p, q, descriptors[2], seed, scale * keep_scale, threshold,
        rows, columns, x.shape[1], rank, *q.stride(), *(residual.stride() if residual is not None else (0, 0)),
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, BLOCK_R=min(rank_block(rank), tiles.ranks),
        GROUP=8, W_BY_DEPTH=by_depth, IN_HALVES=in_halves, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, DROPOUT=dropout is not None, BASE_MODE=dot_mode(dtype, dtype),
        **constants(math.gcd(rank, 16), mode, dtype, tiles),
    )  # fmt: skip
    return out
