"""Kernels of `prompt_embedding`: P learned rows in front of the S token rows of each of B samples, written in one pass.

    _prepend       out[b, :P] = prompt, out[b, P:] = table[ids[b]] or embeds[b]     one write of every row of the result
    _grad_prompt   dprompt = Σ_b dout[b, :P]                                        one read of the prompts' rows

With a start [B] the first start[b] rows of a sample, padding, stay in front of its prompt. A prompt that the batch
shares is read once. Shapes: ids [B, S], table [V, H], embeds [B, S, H], prompt [P, H] or [B, P, H], out [B, P + S, H].
Every offset is computed in 64 bits. Nothing is multiplied: how long a launch takes is a matter of its bytes, and the
blocks below are predicted, measured on no GPU: two loads of 16 bytes a thread in half precision, so that the 16
programs that a processor has room for keep 64 KiB in flight.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels._common import INTERPRETED, cdiv, launch, next_power_of_2

COLUMNS = 32 if INTERPRETED else 2048  # at most; the interpreter's are few, so that there are several blocks
SUMMED_COLUMNS = 32 if INTERPRETED else 256
SAMPLES = 2 if INTERPRETED else 8  # whose gradients are in flight at once
WARPS = 4


@triton.jit
def _prepend_kernel(
    ids_ptr, rows_ptr, prompt_ptr, start_ptr, out_ptr, B, S, P, H, entries,
    stride_ib, stride_is, stride_rb, stride_rs, stride_rh, stride_pb, stride_pp, stride_ph,
    BLOCK_H: tl.constexpr, LOOK_UP: tl.constexpr, BY_SAMPLE: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """The first programs have a block of columns of one row of the prompt each, and write it for every sample, or for
    its own one (BY_SAMPLE). The others have one token each, and all its columns.

    LOOK_UP: a token's row is that of its id among `entries`; an id outside is never read by, and its row is NaN.
    """
    program = tl.program_id(0).to(tl.int64)
    length = tl.cast(P, tl.int64) + S
    blocks = tl.cdiv(H, BLOCK_H)
    prompts = tl.cast(P, tl.int64) * blocks
    if BY_SAMPLE:
        prompts *= B
    if program < prompts:
        row, copies = program // blocks, B
        sample = row // P  # 0 where the batch shares the prompt
        if BY_SAMPLE:
            copies = 1
        row = row % P
        columns = program % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        m_h = columns < H
        p_prompt = prompt_ptr + sample * stride_pb + row * stride_pp + columns * stride_ph
        prompt = tl.load(p_prompt, mask=m_h).to(out_ptr.dtype.element_ty)
        p_copy = out_ptr + (sample * length + row) * H + columns
        if STARTS:
            p_start = start_ptr + sample
        for _ in range(copies):
            if STARTS:
                tl.store(p_copy + tl.load(p_start).to(tl.int64) * H, prompt, mask=m_h)
                p_start += 1
            else:
                tl.store(p_copy, prompt, mask=m_h)
            p_copy += length * H
    else:
        token = program - prompts
        sample, place = token // S, token % S
        if LOOK_UP:
            row = tl.load(ids_ptr + sample * stride_ib + place * stride_is).to(tl.int64)
            readable = tl.where((row >= 0) & (row < entries), H, 0)
            p_row = rows_ptr + row * stride_rs
        else:
            readable = H
            p_row = rows_ptr + sample * stride_rb + place * stride_rs
        moved = tl.cast(P, tl.int64)
        if STARTS:
            moved = tl.where(place >= tl.load(start_ptr + sample), moved, 0)
        p_out = out_ptr + (sample * length + moved + place) * H
        for first in range(0, H, BLOCK_H):
            inner = first + tl.arange(0, BLOCK_H).to(tl.int64)
            found = tl.load(p_row + inner * stride_rh, mask=inner < readable, other=float("nan"))
            tl.store(p_out + inner, found, mask=inner < H)


@triton.jit
def _grad_prompt_kernel(
    dout_ptr, start_ptr, out_ptr, B, H, stride_db, stride_dp, stride_dh,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """One program sums a block of columns of one row of the prompt over all samples in fp32, always in the same order:
    BLOCK_B sums of every BLOCK_B-th sample, then those."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(H, BLOCK_H)
    row = program // blocks
    columns = program % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    samples = tl.arange(0, BLOCK_B).to(tl.int64)
    step = BLOCK_B * tl.cast(stride_db, tl.int64)
    p_dout = dout_ptr + row * stride_dp + samples[:, None] * stride_db + columns[None, :] * stride_dh
    acc = tl.zeros([BLOCK_B, BLOCK_H], dtype=tl.float32)
    for first in range(0, B, BLOCK_B):
        mask = (samples < B - first)[:, None] & (columns < H)[None, :]
        p_rows = p_dout
        if STARTS:
            starts = tl.load(start_ptr + first + samples, mask=samples < B - first, other=0).to(tl.int64)
            p_rows = p_dout + starts[:, None] * stride_dp
        acc += tl.load(p_rows, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
        p_dout += step
    tl.store(out_ptr + row * H + columns, tl.sum(acc, axis=0), mask=columns < H)


def prepend(
    ids: torch.Tensor | None, rows: torch.Tensor, prompt: torch.Tensor, start: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, P + S, H] in rows' dtype: prompt [P, H] or [B, P, H], rounded to it, in front of rows[ids], where rows is a
    table [V, H] and ids [B, S] are int32 or int64, or of rows [B, S, H] where there are no ids; behind the first
    start[b] of them, where start [B] is int32 or int64, contiguous, 0 to S. Any strides; B, P and H are not 0."""
    (batch, tokens), hidden = (rows if ids is None else ids).shape[:2], rows.shape[-1]
    by_sample = prompt.ndim == 3
    count = prompt.shape[-2]
    out = torch.empty(batch, count + tokens, hidden, dtype=rows.dtype, device=rows.device)
    block = min(COLUMNS, next_power_of_2(hidden))
    programs = batch * tokens + count * cdiv(hidden, block) * (batch if by_sample else 1)
    launch(
        _prepend_kernel, (programs,), rows,
        ids, rows, prompt, start, out, batch, tokens, count, hidden, len(rows),
        *((0, 0) if ids is None else ids.stride()), *((0,) if ids is not None else ()), *rows.stride(),
        *(() if by_sample else (0,)), *prompt.stride(),
        BLOCK_H=block, LOOK_UP=ids is not None, BY_SAMPLE=by_sample, STARTS=start is not None,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def grad_prompt(dout: torch.Tensor, count: int, dtype: torch.dtype, start: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_b dout[b, start[b] : start[b] + count] [count, H], without a start from 0, summed in fp32 and rounded once to
    `dtype`: dout [B, P + S, H], any strides; start [B] as in `prepend`."""
    batch, _, hidden = dout.shape
    out = torch.empty(count, hidden, dtype=dtype, device=dout.device)
    block = min(SUMMED_COLUMNS, next_power_of_2(hidden))
    launch(
        _grad_prompt_kernel, (count * cdiv(hidden, block),), dout,
        dout, start, out, batch, hidden, *dout.stride(), min(SAMPLES, next_power_of_2(batch)), block,
        start is not None, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out
