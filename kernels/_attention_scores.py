"""What the kernels of attention share: rows of queries and keys, and how a tile of q kᵀ becomes scores.

For 16-bit data scores are kept in units of log 2, and of a row's softmax one number, L: weight = exp2(score - L). For
fp32 the change of unit would double the error of large scores, and what L loses by rounding would come back in every
weight; there the unit is natural and two numbers are kept, the peak and the share: weight = exp(score - peak)·share,
with share = 1/Σ exp(score - peak), so L = peak - log share. `lse` below is L or the peak.

What a tile needs is passed in four tuples:

    queries   (rows, at, local, own, S): row numbers, key positions, positions for the prefix's window, segments
    keys_of   (k, stride_kt, stride_kd, v, stride_vt, stride_vd, count)
    masks     (window, padding, segments, positions, row of these three, bias, its head's place, stride_bs, stride_bt)
    numbers   (scale, softcap, ALiBi's slopes, this head's or, [rows, 1], each row's)

A mask or number that is None costs nothing. A tile has the queries along its rows, or, with KEYS_FIRST, the keys.
"""

import triton
import triton.language as tl

from fastpeft.kernels._common import dot, keep_mask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def unit(MODE: tl.constexpr):
    """What a natural score is multiplied with."""
    if MODE == "half":
        return LOG2E
    else:
        return 1.0


@triton.jit
def power(scores, MODE: tl.constexpr):
    if MODE == "half":
        return tl.exp2(scores)
    else:
        return tl.exp(scores)


@triton.jit
def load_rows(base, index, count, stride, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, TESTED: tl.constexpr):
    """[len(index), BLOCK_D] of rows of D elements; 0 beyond `count` rows (if TESTED) and beyond D."""
    inner = tl.arange(0, BLOCK_D).to(tl.int64)
    place = base + index.to(tl.int64)[:, None] * stride + inner[None, :] * stride_d
    if TESTED and D < BLOCK_D:
        return tl.load(place, mask=(index < count)[:, None] & (inner < D)[None, :], other=0.0)
    elif TESTED:
        return tl.load(place, mask=(index < count)[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(place, mask=(inner < D)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def store_rows(base, index, count, stride, stride_d, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    inner = tl.arange(0, BLOCK_D).to(tl.int64)
    place = base + index.to(tl.int64)[:, None] * stride + inner[None, :] * stride_d
    tl.store(place, rows, mask=(index < count)[:, None] & (inner < D)[None, :])


@triton.jit
def query_rows(row_start, batch, S, T, start, segments_ptr, local_ptr, BLOCK: tl.constexpr):
    """The tuple `queries` of the rows from row_start on. Without segments a query's own position is where it is."""
    rows = row_start + tl.arange(0, BLOCK)
    at = start + rows
    place = batch * T + at
    own = at
    if segments_ptr is not None:
        own = tl.load(segments_ptr + place, mask=rows < S, other=0)
    local = at
    if local_ptr is not None:
        local = tl.load(local_ptr + place, mask=rows < S, other=0)
    return rows, at, local, own, S


@triton.jit
def tanh(x):
    """To a few units in the last place: the exponentials cancel where x is small, there an odd polynomial (Cephes)."""
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
    series = (series * z - 3.33332819422e-1) * z * x + x
    return tl.where(size < 0.625, series, tl.where(x < 0, -large, large))


@triton.jit
def _along_keys(vector, KEYS_FIRST: tl.constexpr):
    if KEYS_FIRST:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def _along_queries(vector, KEYS_FIRST: tl.constexpr):
    if KEYS_FIRST:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def score_tile(
    products, keys, queries, count, masks, numbers,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, TESTED: tl.constexpr, KEYS_FIRST: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """(scores, cap'): -inf where a query does not see a key; cap' is the softcap's derivative, or of no use.

    Not TESTED: the caller knows that every query sees every key.
    """
    rows, at, local, own, S = queries
    window, padding_ptr, segments_ptr, positions_ptr, key_row, bias_ptr, bias_head, stride_bs, stride_bt = masks
    scale, softcap, slopes_ptr, slope = numbers
    slope_of_cap = products
    rows_2, keys_2 = _along_queries(rows, KEYS_FIRST), _along_keys(keys, KEYS_FIRST)
    if softcap is not None:
        # Beyond the end rows and keys are 0, and 0 times an infinity would be no number.
        bounded = tanh(tl.where((rows_2 < S) & (keys_2 < count), products, 0.0) * (scale / softcap))
        slope_of_cap = 1.0 - bounded * bounded
        scores = bounded * (softcap * unit(MODE))
    else:
        scores = products * (scale * unit(MODE))
    if slopes_ptr is not None:
        if PREFIX:
            positions = (keys - count).to(tl.float32)
        else:
            positions = tl.load(positions_ptr + key_row + keys, mask=keys < count, other=0.0)
        scores += _along_keys(positions, KEYS_FIRST) * (slope * unit(MODE))
    if bias_ptr is not None:
        place = bias_ptr + bias_head + rows_2.to(tl.int64) * stride_bs + keys_2.to(tl.int64) * stride_bt
        bias = tl.load(place, mask=(rows_2 < S) & (keys_2 < count), other=0.0)
        scores += bias.to(tl.float32) * unit(MODE)
    if TESTED:
        see = keys_2 < count
        if PREFIX:
            if window is not None:
                local_2 = _along_queries(local, KEYS_FIRST)
                see = see & (keys_2 - count > local_2 - window)
                if not CAUSAL:
                    see = see & (keys_2 - count < local_2 + window)
        else:
            at_2 = _along_queries(at, KEYS_FIRST)
            if CAUSAL:
                see = see & (keys_2 <= at_2)
            if window is not None:
                see = see & (keys_2 > at_2 - window)
                if not CAUSAL:
                    see = see & (keys_2 < at_2 + window)
            if padding_ptr is not None:
                real = tl.load(padding_ptr + key_row + keys, mask=keys < count, other=0)
                see = see & (_along_keys(real, KEYS_FIRST) != 0)
            if segments_ptr is not None:
                segments = tl.load(segments_ptr + key_row + keys, mask=keys < count, other=0)
                see = see & (_along_keys(segments, KEYS_FIRST) == _along_queries(own, KEYS_FIRST))
        scores = tl.where(see, scores, -float("inf"))
    return scores, slope_of_cap


@triton.jit
def weights_and_gradient(
    q, dout, k, v, row_start, column, lse, share, delta, queries, count, masks, numbers, dropout, gate,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, TESTED: tl.constexpr, KEYS_FIRST: tl.constexpr,
    MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(dropped weights, u, u∘cap') of a tile: p = exp(score - L) and u = p∘(drop(dout Vᵀ) - δ), both times the gate.

    lse and share as from `load_lse`.
    """
    seed_ptr, mask_row, mask_column, threshold, keep_scale = dropout
    keys = column + tl.arange(0, k.shape[0])
    if KEYS_FIRST:
        products = tl.zeros([k.shape[0], q.shape[0]], dtype=tl.float32)
        grads = dot(v, tl.trans(dout), products, MODE, None, UPCAST)
        products = dot(k, tl.trans(q), products, MODE, None, UPCAST)
    else:
        products = tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)
        grads = dot(dout, tl.trans(v), products, MODE, None, UPCAST)
        products = dot(q, tl.trans(k), products, MODE, None, UPCAST)
    scores, slope_of_cap = score_tile(
        products, keys, queries, count, masks, numbers, CAUSAL, PREFIX, TESTED, KEYS_FIRST, MODE
    )
    weights = power(scores - _along_queries(lse, KEYS_FIRST), MODE)
    if MODE != "half":
        weights *= _along_queries(share, KEYS_FIRST)
    weights *= gate
    dropped = weights
    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, mask_row + row_start, mask_column + column, threshold, q.shape[0], k.shape[0])
        if KEYS_FIRST:
            keep = tl.trans(keep)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
        grads = tl.where(keep, grads * keep_scale, 0.0)
    u = weights * (grads - _along_queries(delta, KEYS_FIRST))
    if numbers[1] is not None:
        return dropped, u, u * slope_of_cap
    else:
        return dropped, u, u


@triton.jit
def add_sink(peak, total, acc, sink, MODE: tl.constexpr):
    """The state of a softmax to which a score, natural, is added that gives nothing."""
    sink = sink.to(tl.float32) * unit(MODE)
    higher = tl.maximum(peak, sink)
    base = tl.where(higher == -float("inf"), 0.0, higher)
    fade = power(peak - base, MODE)
    return higher, total * fade + power(sink - base, MODE), acc * fade[:, None]


@triton.jit
def load_lse(lse_ptr, share_ptr, row, rows, S, MODE: tl.constexpr):
    """(lse in the scores' unit, share); lse is +inf for rows that saw nothing, or are none: every weight is then 0."""
    lse = tl.load(lse_ptr + row + rows, mask=rows < S, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse * unit(MODE))
    if share_ptr is not None:
        return lse, tl.load(share_ptr + row + rows, mask=rows < S, other=1.0)
    else:
        return lse, lse


@triton.jit
def store_lse(lse_ptr, share_ptr, row, peak, total, rows, S, MODE: tl.constexpr):
    """Stores what is kept of rows whose softmax has this state, and returns it as `load_lse` would."""
    seen = total != 0  # a total that is NaN is a row that saw one: it stays
    total = tl.where(seen, total, 1.0)
    if MODE == "half":
        lse = (peak + tl.log2(total)) * LN2
    else:
        lse = peak
    share = 1.0 / total
    tl.store(lse_ptr + row + rows, tl.where(seen, lse, -float("inf")), mask=rows < S)
    if share_ptr is not None:
        tl.store(share_ptr + row + rows, share, mask=rows < S)
    return tl.where(seen, lse * unit(MODE), float("inf")), share
