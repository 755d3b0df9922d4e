"""The two kernels of a step of generation, where every sample has one query; see _prefix_attention_decode.py."""

import triton
import triton.language as tl

from fastpeft.kernels._attention_loops import attend
from fastpeft.kernels._attention_scores import add_sink, power, store_lse


@triton.jit
def _rows_of(first, samples, owner, kv_head, group, BLOCK: tl.constexpr):
    """(rows, sample, head, how many) of BLOCK rows: an owner's `samples`, of each the heads of one kv head's group;
    owner and kv_head have 64 bits, and so have sample and head."""
    rows = first + tl.arange(0, BLOCK)
    return rows, owner * samples + rows // group, kv_head * group + rows % group, samples * group


@triton.jit
def _attend_for(
    place, q_ptr, strides_q, slopes_ptr, segments_ptr, local_ptr, part_ptr, peak_ptr, total_ptr, strides_part,
    split, begin, end, keys_of, masks, bias_of, scale, softcap, start, H, T,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The softmax of some rows, `place` as from `_rows_of`, over keys [begin, end): its state goes to
    part [splits, B, H, D], peak and total [splits, B, H]."""
    rows, sample, head, count = place
    stride_qb, stride_qh, stride_qd = strides_q
    window, padding_ptr, key_row, positions_ptr = masks
    bias_ptr, stride_bb, stride_bh, stride_bt = bias_of
    inner = tl.arange(0, BLOCK_D).to(tl.int64)
    real = rows < count
    whole = real[:, None] & (inner < D)[None, :]
    p_q = q_ptr + (sample * stride_qb + head * stride_qh)[:, None] + inner[None, :] * stride_qd
    q = tl.load(p_q, mask=whole, other=0.0)
    at = start + rows * 0
    own, local = at, at
    if segments_ptr is not None:
        own = tl.load(segments_ptr + sample * T + start, mask=real, other=0)
    if local_ptr is not None:
        local = tl.load(local_ptr + sample * T + start, mask=real, other=0)
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=real, other=0.0)[:, None]
    bias_head = (sample * stride_bb + head * stride_bh)[:, None]
    peak = tl.full([rows.shape[0]], -float("inf"), dtype=tl.float32)
    total = tl.zeros([rows.shape[0]], dtype=tl.float32)
    acc = tl.zeros([rows.shape[0], BLOCK_D], dtype=tl.float32)
    peak, total, acc = attend(
        peak, total, acc, q, 0, begin, end, (rows, at, local, own, count), keys_of,
        (window, padding_ptr, segments_ptr, positions_ptr, key_row, bias_ptr, bias_head, 0, stride_bt),
        (scale, softcap, slopes_ptr, slope), (None, 0, 0, 0, 1.0),
        CAUSAL, PREFIX, True, D, BLOCK, BLOCK_D, MODE, UPCAST,
    )  # fmt: skip
    of_row = split * strides_part + sample * H + head
    tl.store(peak_ptr + of_row, peak, mask=real)
    tl.store(total_ptr + of_row, total, mask=real)
    tl.store(part_ptr + of_row[:, None] * D + inner[None, :], acc, mask=whole)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, part_ptr, peak_ptr, total_ptr,
    bias_ptr, pbias_ptr, slopes_ptr, positions_ptr, padding_ptr, segments_ptr, local_ptr,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_pkb, stride_pkh, stride_pkp, stride_pkd,
    stride_pvb, stride_pvh, stride_pvp, stride_pvd, stride_bb, stride_bh, stride_bt, stride_pbb, stride_pbh, stride_pbp,
    scale, softcap, start, window, prefix_window, B, H, G, group, T, P, samples, row_blocks,
    first, last, length, prefix_first, prefix_length, prefix_splits, prefix_programs,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The first prefix_programs programs attend to a run of the prefix for up to BLOCK_M rows, a row being one head of
    one of the `samples` that share it; each of the others to a run of one sample's keys for the heads of one group."""
    program = tl.program_id(0).to(tl.int64)
    strides_q, strides_part = (stride_qb, stride_qh, stride_qd), tl.cast(B, tl.int64) * H
    if program < prefix_programs:
        split, rest = program % prefix_splits, program // prefix_splits
        block, kv_head, owner = rest % row_blocks, rest // row_blocks % G, rest // row_blocks // G
        shared_rows = _rows_of((block * BLOCK_M).to(tl.int32), samples, owner, kv_head, group, BLOCK_M)
        pk_head = pk_ptr + owner * stride_pkb + kv_head * stride_pkh
        pv_head = pv_ptr + owner * stride_pvb + kv_head * stride_pvh
        begin = (prefix_first + split * prefix_length).to(tl.int32)
        _attend_for(
            shared_rows, q_ptr, strides_q, slopes_ptr, None, local_ptr,
            part_ptr, peak_ptr, total_ptr, strides_part, split, begin, min(P, begin + prefix_length),
            (pk_head, stride_pkp, stride_pkd, pv_head, stride_pvp, stride_pvd, P), (prefix_window, None, 0, None),
            (pbias_ptr, stride_pbb, stride_pbh, stride_pbp), scale, softcap, start, H, T,
            CAUSAL, True, D, BLOCK_P, BLOCK_D, MODE, UPCAST,
        )  # fmt: skip
    else:
        program -= prefix_programs
        owner, kv_head = program % B, program // B % G
        split = program // B // G
        own_rows = _rows_of(0, 1, owner, kv_head, group, BLOCK_G)
        k_head = k_ptr + owner * stride_kb + kv_head * stride_kh
        v_head = v_ptr + owner * stride_vb + kv_head * stride_vh
        begin = (first + split * length).to(tl.int32)
        _attend_for(
            own_rows, q_ptr, strides_q, slopes_ptr, segments_ptr, None,
            part_ptr, peak_ptr, total_ptr, strides_part, prefix_splits + split, begin, min(last, begin + length),
            (k_head, stride_kt, stride_kd, v_head, stride_vt, stride_vd, T),
            (window, padding_ptr, owner * T, positions_ptr),
            (bias_ptr, stride_bb, stride_bh, stride_bt), scale, softcap, start, H, T,
            CAUSAL, False, D, BLOCK_N, BLOCK_D, MODE, UPCAST,
        )  # fmt: skip


@triton.jit
def _merge_parts_kernel(
    part_ptr, peak_ptr, total_ptr, sinks_ptr, out_ptr, lse_ptr, share_ptr, splits, rows, H,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """out [rows, D] and what is kept of the softmax, from its `splits` states; a row is a sample's head."""
    row = tl.program_id(0) + tl.arange(0, 1)
    split, inner = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    place = split.to(tl.int64)[:, None] * rows + row[None, :]
    some = (split < splits)[:, None]
    peaks = tl.load(peak_ptr + place, mask=some, other=-float("inf"))
    peak = tl.max(peaks, 0)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    fade = power(peaks - base[None, :], MODE)
    total = tl.sum(fade * tl.load(total_ptr + place, mask=some, other=0.0), 0)
    parts = tl.load(part_ptr + place * D + inner[None, :], mask=some & (inner < D)[None, :], other=0.0)
    acc = tl.sum(fade * parts, 0)[None, :]
    if sinks_ptr is not None:
        peak, total, acc = add_sink(peak, total, acc, tl.load(sinks_ptr + row % H), MODE)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + inner[None, :], acc, mask=(inner < D)[None, :])
    store_lse(lse_ptr, share_ptr, 0, peak, total, row, rows, MODE)
