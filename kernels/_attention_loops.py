"""The loops of attention over a run of keys or of queries: the online softmax forward, three sums backward."""

import triton
import triton.language as tl

from fastpeft.kernels._attention_scores import load_lse, load_rows, power, query_rows, score_tile, weights_and_gradient
from fastpeft.kernels._common import dot, keep_mask


@triton.jit
def key_range(
    row_start, S, T, start, window,
    PLAIN: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first, whole, last): the keys that BLOCK_M queries may see; those before `whole` every query sees."""
    at_first = start + row_start
    at_last = start + min(row_start + BLOCK_M, S) - 1
    first, last, whole = 0, T, T
    if CAUSAL:
        last = min(T, at_last + 1)
        whole = min(T, at_first + 1)
    if window is not None:
        first = max(0, at_first - window + 1) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            last = min(T, at_last + window)
    if PLAIN:
        whole = max(0, whole) // BLOCK_N * BLOCK_N
    else:
        whole = first
    return first, whole, last


@triton.jit
def query_range(
    column, S, start, count, window, local_ptr,
    PLAIN: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(begin, whole, end): the queries that may see some of BLOCK_N keys; from `whole` on they see all of these."""
    last_key = min(column + BLOCK_N, count) - 1
    begin, whole, end = 0, 0, S
    if PREFIX:
        if window is not None:
            if local_ptr is None:
                end = min(S, last_key - count + window - start)
    else:
        if CAUSAL:
            begin = max(0, column - start)
            whole = max(0, last_key - start)
        if window is not None:
            end = min(S, last_key + window - start)
            if not CAUSAL:
                begin = max(0, column - window + 1 - start)
    begin = begin // BLOCK_M * BLOCK_M
    end = max(begin, end)
    if PLAIN:
        whole = min(end, tl.cdiv(whole, BLOCK_M) * BLOCK_M)
    else:
        whole = end
    return begin, whole, end


@triton.jit
def attend(
    peak, total, acc, q, row_start, first, last, queries, keys_of, masks, numbers, dropout,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, TESTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The online softmax (FlashAttention, arXiv 2205.14135) over keys [first, last): the state with them in it.

    peak and total [rows], acc [rows, BLOCK_D]; a row that has seen nothing has peak -inf and total 0.
    """
    k_ptr, stride_kt, stride_kd, v_ptr, stride_vt, stride_vd, count = keys_of
    seed_ptr, mask_row, mask_column, threshold, keep_scale = dropout
    for column in range(first, last, BLOCK):
        keys = column + tl.arange(0, BLOCK)
        k = load_rows(k_ptr, keys, count, stride_kt, stride_kd, D, BLOCK_D, TESTED)
        v = load_rows(v_ptr, keys, count, stride_vt, stride_vd, D, BLOCK_D, TESTED)
        products = tl.zeros([q.shape[0], BLOCK], dtype=tl.float32)
        products = dot(q, tl.trans(k), products, MODE, None, UPCAST)
        scores, _ = score_tile(products, keys, queries, count, masks, numbers, CAUSAL, PREFIX, TESTED, False, MODE)
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is no number
        weights = power(scores - base[:, None], MODE)
        fade = power(peak - base, MODE)
        total = total * fade + tl.sum(weights, 1)
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, mask_row + row_start, mask_column + column, threshold, q.shape[0], BLOCK)
            weights = tl.where(keep, weights, 0.0)
        acc = dot(weights.to(v.dtype), v, acc * fade[:, None], MODE, None, UPCAST)
        peak = higher
    return peak, total, acc


@triton.jit
def prefix_statistics(
    q, dout, row_start, first, last, queries, keys_of, masks, numbers, dropout,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """(peak, total, δ) of the prefix's own softmax, where δ = Σ dout∘(its result) comes from the weights alone."""
    k_ptr, stride_kt, stride_kd, v_ptr, stride_vt, stride_vd, count = keys_of
    peak = tl.full([q.shape[0]], -float("inf"), dtype=tl.float32)
    total = tl.zeros([q.shape[0]], dtype=tl.float32)
    delta = tl.zeros([q.shape[0]], dtype=tl.float32)
    for column in range(first, last, BLOCK):
        keys = column + tl.arange(0, BLOCK)
        k = load_rows(k_ptr, keys, count, stride_kt, stride_kd, D, BLOCK_D, True)
        v = load_rows(v_ptr, keys, count, stride_vt, stride_vd, D, BLOCK_D, True)
        zeros = tl.zeros([q.shape[0], BLOCK], dtype=tl.float32)
        products = dot(q, tl.trans(k), zeros, MODE, None, UPCAST)
        scores, _ = score_tile(products, keys, queries, count, masks, numbers, CAUSAL, True, True, False, MODE)
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = power(scores - base[:, None], MODE)
        fade = power(peak - base, MODE)
        total = total * fade + tl.sum(weights, 1)
        delta = delta * fade + tl.sum(weights * dot(dout, tl.trans(v), zeros, MODE, None, UPCAST), 1)
        peak = higher
    return peak, total, delta / tl.where(total > 0, total, 1.0)


@triton.jit
def sum_deltas(
    delta, q, dout, lse, share, row_start, first, last, queries, keys_of, masks, numbers, dropout,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, TESTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """δ + Σ p∘drop(dout Vᵀ) over keys [first, last)."""
    k_ptr, stride_kt, stride_kd, v_ptr, stride_vt, stride_vd, count = keys_of
    for column in range(first, last, BLOCK):
        keys = column + tl.arange(0, BLOCK)
        k = load_rows(k_ptr, keys, count, stride_kt, stride_kd, D, BLOCK_D, TESTED)
        v = load_rows(v_ptr, keys, count, stride_vt, stride_vd, D, BLOCK_D, TESTED)
        _, terms, _ = weights_and_gradient(
            q, dout, k, v, row_start, column, lse, share, tl.zeros_like(delta), queries, count, masks, numbers, dropout,
            1.0, CAUSAL, PREFIX, TESTED, False, MODE, UPCAST,
        )  # fmt: skip
        delta += tl.sum(terms, 1)
    return delta


@triton.jit
def grad_rows(
    acc, q, dout, lse, share, delta, row_start, first, last, queries, keys_of, masks, numbers, dropout, gate,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, TESTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + Σ (u∘cap') K over keys [first, last)."""
    k_ptr, stride_kt, stride_kd, v_ptr, stride_vt, stride_vd, count = keys_of
    for column in range(first, last, BLOCK):
        keys = column + tl.arange(0, BLOCK)
        k = load_rows(k_ptr, keys, count, stride_kt, stride_kd, D, BLOCK_D, TESTED)
        v = load_rows(v_ptr, keys, count, stride_vt, stride_vd, D, BLOCK_D, TESTED)
        _, _, u = weights_and_gradient(
            q, dout, k, v, row_start, column, lse, share, delta, queries, count, masks, numbers, dropout, gate,
            CAUSAL, PREFIX, TESTED, False, MODE, UPCAST,
        )  # fmt: skip
        acc = dot(u.to(k.dtype), k, acc, MODE, None, UPCAST)
    return acc


@triton.jit
def grad_columns(
    dk, dv, k, v, column, begin, end, sources, statistics, masks, sizes, dropout, scale, softcap,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, TESTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv with queries [begin, end) of every batch and head that this run's steps come to, dk not yet scaled."""
    q_ptr, stride_qb, stride_qh, stride_qs, stride_qd, dout_ptr, stride_gb, stride_gh, stride_gs, stride_gd = sources
    lse_ptr, share_ptr, delta_ptr, gate_ptr, slopes_ptr = statistics
    window, padding_ptr, segments_ptr, positions_ptr, bias_ptr, stride_bb, stride_bh, stride_bs, stride_bt = masks
    H, group, S, T, count, start, local_ptr, owner, owned, kv_head, first_step, steps = sizes
    seed_ptr, mask_start, threshold, keep_scale = dropout
    tiles = tl.cdiv(end - begin, BLOCK)
    for step in range(first_step, min(first_step + steps, owned * group * tiles)):
        batch = owner * owned + (step // tiles // group).to(tl.int64)
        head = kv_head * group + (step // tiles % group).to(tl.int64)
        row_start = begin + step % tiles * BLOCK
        queries = query_rows(row_start, batch, S, T, start, segments_ptr, local_ptr, BLOCK)
        rows = queries[0]
        lse_row = (batch * H + head) * S
        q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, rows, S, stride_qs, stride_qd, D, BLOCK_D, True)
        dout_head = dout_ptr + batch * stride_gb + head * stride_gh
        dout = load_rows(dout_head, rows, S, stride_gs, stride_gd, D, BLOCK_D, True)
        lse, share = load_lse(lse_ptr, share_ptr, lse_row, rows, S, MODE)
        delta = tl.load(delta_ptr + lse_row + rows, mask=rows < S, other=0.0)
        slope = 0.0
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + head)
        gate = 1.0
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + head).to(tl.float32)
        bias_head = batch * stride_bb + head * stride_bh
        tile_masks = (
            window, padding_ptr, segments_ptr, positions_ptr, batch * T, bias_ptr, bias_head, stride_bs, stride_bt
        )  # fmt: skip
        weights, _, u = weights_and_gradient(
            q, dout, k, v, row_start, column, lse, share, delta, queries, count, tile_masks,
            (scale, softcap, slopes_ptr, slope), (seed_ptr, lse_row, mask_start, threshold, keep_scale), gate,
            CAUSAL, PREFIX, TESTED, True, MODE, UPCAST,
        )  # fmt: skip
        dv = dot(weights.to(dout.dtype), dout, dv, MODE, None, UPCAST)
        dk = dot(u.to(q.dtype), q, dk, MODE, None, UPCAST)
    return dk, dv
