"""The four kernels of attention over a prefix and a sequence; what they compute and how they are launched is in
prefix_attention.py."""

import triton
import triton.language as tl

from fastpeft.kernels._attention_loops import (
    attend,
    grad_columns,
    grad_rows,
    key_range,
    prefix_statistics,
    query_range,
    sum_deltas,
)
from fastpeft.kernels._attention_scores import (
    add_sink,
    load_lse,
    load_rows,
    query_rows,
    store_lse,
    store_rows,
    unit,
    weights_and_gradient,
)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, out_ptr, lse_ptr, share_ptr, first_ptr, first_lse_ptr, gate_ptr, sinks_ptr,
    bias_ptr, pbias_ptr, slopes_ptr, positions_ptr, padding_ptr, segments_ptr, local_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_pkb, stride_pkh, stride_pkp, stride_pkd,
    stride_pvb, stride_pvh, stride_pvp, stride_pvd, stride_fb, stride_fh, stride_fs, stride_fd,
    stride_lb, stride_lh, stride_ls,
    stride_bb, stride_bh, stride_bs, stride_bt, stride_pbb, stride_pbh, stride_pbs, stride_pbp,
    scale, softcap, start, window, prefix_window, threshold, keep_scale, H, group, S, T, P, mask_start,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program attends for BLOCK_M queries of one head; of the keys' two kinds those that have a pointer.

    first [B, H, S, D] and first_lse, the result for the sequence alone, are where the softmax begins; with a gate the
    two softmaxes stay apart: out = first + gate·(softmax over the prefix), and L is the prefix's.
    """
    tiles = tl.cdiv(S, BLOCK_M)
    row_start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # under a causal mask the longest rows first
    batch, head = (tl.program_id(0) // tiles // H).to(tl.int64), (tl.program_id(0) // tiles % H).to(tl.int64)
    queries = query_rows(row_start, batch, S, T, start, segments_ptr, local_ptr, BLOCK_M)
    rows = queries[0]
    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, rows, S, stride_qs, stride_qd, D, BLOCK_D, True)
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head)
    numbers = (scale, softcap, slopes_ptr, slope)
    mask_row = (batch * H + head) * S
    peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if first_ptr is not None:
        first_head = first_ptr + batch * stride_fb + head * stride_fh
        first = load_rows(first_head, rows, S, stride_fs, stride_fd, D, BLOCK_D, True).to(tl.float32)
        if gate_ptr is None:
            p_lse = first_lse_ptr + batch * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_ls
            peak = tl.load(p_lse, mask=rows < S, other=0.0) * unit(MODE)
            some = (peak > -float("inf")) & (peak < float("inf"))  # where nothing was seen some vendors write inf
            acc = tl.where(some[:, None] | (first != first), first, 0.0)
            peak, total = tl.where(some, peak, -float("inf")), tl.where(some, 1.0, tl.sum(acc, 1))  # 0, or NaN
    if pk_ptr is not None:
        pk_head = pk_ptr + batch * stride_pkb + head // group * stride_pkh
        pv_head = pv_ptr + batch * stride_pvb + head // group * stride_pvh
        keys_of = (pk_head, stride_pkp, stride_pkd, pv_head, stride_pvp, stride_pvd, P)
        pbias_head = batch * stride_pbb + head * stride_pbh
        masks = (prefix_window, None, None, None, 0, pbias_ptr, pbias_head, stride_pbs, stride_pbp)
        dropout = (seed_ptr, mask_row, 0, threshold, keep_scale)
        begin = 0
        if prefix_window is not None:
            if local_ptr is None:
                begin = max(0, P + start + row_start - prefix_window + 1) // BLOCK_P * BLOCK_P
        peak, total, acc = attend(
            peak, total, acc, q, row_start, begin, P, queries, keys_of, masks, numbers, dropout,
            CAUSAL, True, True, D, BLOCK_P, BLOCK_D, MODE, UPCAST,
        )  # fmt: skip
    if k_ptr is not None:
        k_head = k_ptr + batch * stride_kb + head // group * stride_kh
        v_head = v_ptr + batch * stride_vb + head // group * stride_vh
        keys_of = (k_head, stride_kt, stride_kd, v_head, stride_vt, stride_vd, T)
        bias_head = batch * stride_bb + head * stride_bh
        masks = (
            window, padding_ptr, segments_ptr, positions_ptr, batch * T, bias_ptr, bias_head, stride_bs, stride_bt
        )  # fmt: skip
        dropout = (seed_ptr, mask_row, mask_start, threshold, keep_scale)
        begin, whole, end = key_range(row_start, S, T, start, window, PLAIN, CAUSAL, BLOCK_M, BLOCK_N)
        if PLAIN:
            peak, total, acc = attend(
                peak, total, acc, q, row_start, begin, whole, queries, keys_of, masks, numbers, dropout,
                CAUSAL, False, False, D, BLOCK_N, BLOCK_D, MODE, UPCAST,
            )  # fmt: skip
        peak, total, acc = attend(
            peak, total, acc, q, row_start, whole, end, queries, keys_of, masks, numbers, dropout,
            CAUSAL, False, True, D, BLOCK_N, BLOCK_D, MODE, UPCAST,
        )  # fmt: skip
    if sinks_ptr is not None:
        peak, total, acc = add_sink(peak, total, acc, tl.load(sinks_ptr + head), MODE)
    acc = acc * (keep_scale / tl.where(total == 0, 1.0, total))[:, None]
    if gate_ptr is not None:
        acc = first + tl.load(gate_ptr + head).to(tl.float32) * acc
    out_head = out_ptr + (batch * S * H + head) * D
    store_rows(out_head, rows, S, tl.cast(H, tl.int64) * D, 1, acc, D, BLOCK_D)
    store_lse(lse_ptr, share_ptr, mask_row, peak, total, rows, S, MODE)


@triton.jit
def _grad_query_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, out_ptr, dout_ptr, lse_ptr, share_ptr, delta_ptr, before_ptr, dq_ptr, gate_ptr,
    bias_ptr, pbias_ptr, slopes_ptr, positions_ptr, padding_ptr, segments_ptr, local_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_pkb, stride_pkh, stride_pkp, stride_pkd,
    stride_pvb, stride_pvh, stride_pvp, stride_pvd, stride_ob, stride_oh, stride_os, stride_od,
    stride_gb, stride_gh, stride_gs, stride_gd, stride_fb, stride_fh, stride_fs, stride_fd,
    stride_bb, stride_bh, stride_bs, stride_bt, stride_pbb, stride_pbh, stride_pbs, stride_pbp,
    scale, softcap, start, window, prefix_window, threshold, keep_scale, H, group, S, T, P, mask_start,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: δ of BLOCK_M queries of one head, and, if there is room for it, their dq.

    δ = Σ dout∘out; or from a first pass over the keys, δ = Σ p∘(dout Vᵀ): in fp32, since u = p∘(dout Vᵀ - δ) of a row
    that sees one key and little else is then as exact as autograd's, whose two terms have the same rounding errors;
    and with a gate, where δ is the ungated prefix's, whose result nobody has kept. `before` [B, H, S, D] is added.
    """
    tiles = tl.cdiv(S, BLOCK_M)
    row_start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch, head = (tl.program_id(0) // tiles // H).to(tl.int64), (tl.program_id(0) // tiles % H).to(tl.int64)
    queries = query_rows(row_start, batch, S, T, start, segments_ptr, local_ptr, BLOCK_M)
    rows = queries[0]
    mask_row = (batch * H + head) * S
    dout = load_rows(dout_ptr + batch * stride_gb + head * stride_gh, rows, S, stride_gs, stride_gd, D, BLOCK_D, True)
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head)
    numbers = (scale, softcap, slopes_ptr, slope)
    gate = 1.0
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + head).to(tl.float32)
    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, rows, S, stride_qs, stride_qd, D, BLOCK_D, True)
    if gate_ptr is None:
        lse, share = load_lse(lse_ptr, share_ptr, mask_row, rows, S, MODE)
    if pk_ptr is not None:
        pk_head = pk_ptr + batch * stride_pkb + head // group * stride_pkh
        pv_head = pv_ptr + batch * stride_pvb + head // group * stride_pvh
        prefix_of = (pk_head, stride_pkp, stride_pkd, pv_head, stride_pvp, stride_pvd, P)
        pbias_head = batch * stride_pbb + head * stride_pbh
        prefix_masks = (prefix_window, None, None, None, 0, pbias_ptr, pbias_head, stride_pbs, stride_pbp)
        prefix_dropout = (seed_ptr, mask_row, 0, threshold, keep_scale)
        prefix_begin = 0
        if prefix_window is not None:
            if local_ptr is None:
                prefix_begin = max(0, P + start + row_start - prefix_window + 1) // BLOCK_P * BLOCK_P
    if k_ptr is not None:
        k_head = k_ptr + batch * stride_kb + head // group * stride_kh
        v_head = v_ptr + batch * stride_vb + head // group * stride_vh
        keys_of = (k_head, stride_kt, stride_kd, v_head, stride_vt, stride_vd, T)
        bias_head = batch * stride_bb + head * stride_bh
        masks = (
            window, padding_ptr, segments_ptr, positions_ptr, batch * T, bias_ptr, bias_head, stride_bs, stride_bt
        )  # fmt: skip
        dropout = (seed_ptr, mask_row, mask_start, threshold, keep_scale)
        begin, whole, end = key_range(row_start, S, T, start, window, PLAIN, CAUSAL, BLOCK_M, BLOCK_N)
    if gate_ptr is not None:
        peak, total, delta = prefix_statistics(
            q, dout, row_start, prefix_begin, P, queries, prefix_of, prefix_masks, numbers, prefix_dropout,
            CAUSAL, D, BLOCK_P, BLOCK_D, MODE, UPCAST,
        )  # fmt: skip
        lse, share = store_lse(lse_ptr, share_ptr, mask_row, peak, total, rows, S, MODE)
    elif MODE == "half" or k_ptr is None:
        out = load_rows(out_ptr + batch * stride_ob + head * stride_oh, rows, S, stride_os, stride_od, D, BLOCK_D, True)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    else:
        delta = tl.zeros([BLOCK_M], dtype=tl.float32)
        if pk_ptr is not None:
            delta = sum_deltas(
                delta, q, dout, lse, share, row_start, prefix_begin, P, queries, prefix_of, prefix_masks, numbers,
                prefix_dropout, CAUSAL, True, True, D, BLOCK_P, BLOCK_D, MODE, UPCAST,
            )  # fmt: skip
        delta = sum_deltas(
            delta, q, dout, lse, share, row_start, begin, end, queries, keys_of, masks, numbers, dropout,
            CAUSAL, False, True, D, BLOCK_N, BLOCK_D, MODE, UPCAST,
        )  # fmt: skip
    tl.store(delta_ptr + mask_row + rows, delta, mask=rows < S)
    if dq_ptr is not None:
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        if pk_ptr is not None:
            acc = grad_rows(
                acc, q, dout, lse, share, delta, row_start, prefix_begin, P, queries, prefix_of, prefix_masks, numbers,
                prefix_dropout, gate, CAUSAL, True, True, D, BLOCK_P, BLOCK_D, MODE, UPCAST,
            )  # fmt: skip
        if k_ptr is not None:
            if PLAIN:
                acc = grad_rows(
                    acc, q, dout, lse, share, delta, row_start, begin, whole, queries, keys_of, masks, numbers, dropout,
                    gate, CAUSAL, False, False, D, BLOCK_N, BLOCK_D, MODE, UPCAST,
                )  # fmt: skip
            acc = grad_rows(
                acc, q, dout, lse, share, delta, row_start, whole, end, queries, keys_of, masks, numbers, dropout, gate,
                CAUSAL, False, True, D, BLOCK_N, BLOCK_D, MODE, UPCAST,
            )  # fmt: skip
        acc = acc * scale
        if before_ptr is not None:
            before_head = before_ptr + batch * stride_fb + head * stride_fh
            acc += load_rows(before_head, rows, S, stride_fs, stride_fd, D, BLOCK_D, True).to(tl.float32)
        dq_head = dq_ptr + (batch * S * H + head) * D
        store_rows(dq_head, rows, S, tl.cast(H, tl.int64) * D, 1, acc, D, BLOCK_D)


@triton.jit
def _grad_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, share_ptr, delta_ptr, gate_ptr, dk_ptr, dv_ptr,
    bias_ptr, slopes_ptr, positions_ptr, padding_ptr, segments_ptr, local_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gs, stride_gd,
    stride_bb, stride_bh, stride_bs, stride_bt, stride_xb, stride_xh, stride_xt, stride_xrun,
    scale, softcap, start, window, threshold, keep_scale, H, group, S, T, count, mask_start, owned, steps_per_run,
    PREFIX: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program keeps dk and dv of BLOCK_N of the `count` keys of one kv head in registers, over the queries of the
    group's heads, and over `owned` batches: all of them for a shared prefix.

    Of these steps, one for each tile of queries, head and batch, a run takes steps_per_run; dk and dv [runs, ...].
    """
    tiles = tl.cdiv(count, BLOCK_N)
    column = tl.program_id(0) % tiles * BLOCK_N
    owner = (tl.program_id(0) // tiles // (H // group)).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % (H // group)).to(tl.int64)
    run = tl.program_id(1)
    keys = column + tl.arange(0, BLOCK_N)
    k_head = k_ptr + owner * stride_kb + kv_head * stride_kh
    v_head = v_ptr + owner * stride_vb + kv_head * stride_vh
    k = load_rows(k_head, keys, count, stride_kt, stride_kd, D, BLOCK_D, True)
    v = load_rows(v_head, keys, count, stride_vt, stride_vd, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    sources = (q_ptr, stride_qb, stride_qh, stride_qs, stride_qd, dout_ptr, stride_gb, stride_gh, stride_gs, stride_gd)
    statistics = (lse_ptr, share_ptr, delta_ptr, gate_ptr, slopes_ptr)
    masks = (window, padding_ptr, segments_ptr, positions_ptr, bias_ptr, stride_bb, stride_bh, stride_bs, stride_bt)
    sizes = (H, group, S, T, count, start, local_ptr, owner, owned, kv_head, run * steps_per_run, steps_per_run)
    dropout = (seed_ptr, mask_start, threshold, keep_scale)
    begin, whole, end = query_range(column, S, start, count, window, local_ptr, PLAIN, PREFIX, CAUSAL, BLOCK_M, BLOCK_N)
    dk, dv = grad_columns(
        dk, dv, k, v, column, begin, whole, sources, statistics, masks, sizes, dropout, scale, softcap,
        CAUSAL, PREFIX, True, D, BLOCK_M, BLOCK_D, MODE, UPCAST,
    )  # fmt: skip
    if PLAIN:
        dk, dv = grad_columns(
            dk, dv, k, v, column, whole, end, sources, statistics, masks, sizes, dropout, scale, softcap,
            CAUSAL, PREFIX, False, D, BLOCK_M, BLOCK_D, MODE, UPCAST,
        )  # fmt: skip
    place = run.to(tl.int64) * stride_xrun + owner * stride_xb + kv_head * stride_xh
    store_rows(dk_ptr + place, keys, count, stride_xt, 1, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr + place, keys, count, stride_xt, 1, dv, D, BLOCK_D)


@triton.jit
def _grad_bias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, share_ptr, delta_ptr, out_ptr,
    bias_ptr, slopes_ptr, positions_ptr, padding_ptr, segments_ptr, local_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gs, stride_gd,
    stride_bb, stride_bh, stride_bs, stride_bt,
    scale, softcap, start, window, threshold, keep_scale, H, group, S, T, count, mask_start, batches, heads,
    PREFIX: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program sums u of a [BLOCK_M, BLOCK_N] tile over `batches` batches and `heads` heads, over which one bias was
    broadcast; out [biases, S, count]."""
    row_tiles, tiles = tl.cdiv(S, BLOCK_M), tl.cdiv(count, BLOCK_N)
    column = tl.program_id(0) % tiles * BLOCK_N
    row_start = tl.program_id(0) // tiles % row_tiles * BLOCK_M
    which = (tl.program_id(0) // tiles // row_tiles).to(tl.int64)
    biased_heads = H // heads
    first_batch, first_head = which // biased_heads * batches, which % biased_heads * heads
    keys = column + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    begin, whole, end = query_range(column, S, start, count, window, local_ptr, PLAIN, PREFIX, CAUSAL, BLOCK_M, BLOCK_N)
    steps = batches * heads
    if row_start + BLOCK_M <= begin or row_start >= end:
        steps = 0
    for step in range(0, steps):
        batch, head = first_batch + step // heads, first_head + step % heads
        queries = query_rows(row_start, batch, S, T, start, segments_ptr, local_ptr, BLOCK_M)
        rows = queries[0]
        lse_row = (batch * H + head) * S
        q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, rows, S, stride_qs, stride_qd, D, BLOCK_D, True)
        dout_head = dout_ptr + batch * stride_gb + head * stride_gh
        dout = load_rows(dout_head, rows, S, stride_gs, stride_gd, D, BLOCK_D, True)
        k_head = k_ptr + batch * stride_kb + head // group * stride_kh
        v_head = v_ptr + batch * stride_vb + head // group * stride_vh
        k = load_rows(k_head, keys, count, stride_kt, stride_kd, D, BLOCK_D, True)
        v = load_rows(v_head, keys, count, stride_vt, stride_vd, D, BLOCK_D, True)
        slope = 0.0
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + head)
        bias_head = batch * stride_bb + head * stride_bh
        masks = (
            window, padding_ptr, segments_ptr, positions_ptr, batch * T, bias_ptr, bias_head, stride_bs, stride_bt
        )  # fmt: skip
        lse, share = load_lse(lse_ptr, share_ptr, lse_row, rows, S, MODE)
        delta = tl.load(delta_ptr + lse_row + rows, mask=rows < S, other=0.0)
        _, u, _ = weights_and_gradient(
            q, dout, k, v, row_start, column, lse, share, delta, queries, count, masks,
            (scale, softcap, slopes_ptr, slope), (seed_ptr, lse_row, mask_start, threshold, keep_scale), 1.0,
            CAUSAL, PREFIX, True, False, MODE, UPCAST,
        )  # fmt: skip
        acc += u
    rows = row_start + tl.arange(0, BLOCK_M)
    place = out_ptr + (which * S + rows)[:, None] * count + keys[None, :]
    tl.store(place, acc, mask=(rows < S)[:, None] & (keys < count)[None, :])
