"""`prefix_attention` by CPU flash attention: pieces of rows × keys that the vendor's op serves, merged by log-sum-exp.

The op knows causal squares, groups of heads, and additive masks that may be broadcast. So a padding mask, and ALiBi,
which adds one number to each key, cost a row of T numbers. Only what depends on the row and the key (windows, packed
sequences, a bias with padding) needs a mask of rows × keys, made for a block of rows and the keys they can see.

Backward gives the op's backward the merged output and L. Its weights are exp(s - L) and its row sum is δ = Σ dout∘out,
so with the merged two each piece's gradients are those of the whole softmax.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops._prefix_attention_blocks import key_range
from fastpeft.ops._prefix_attention_scores import Scores, Tensors, prefix_visible_block, visible_block

MASK_BYTES = 1 << 24  # of a mask made for a block of rows
MASK_ROWS = 128  # at 64 to 256 about as fast; beyond, more hidden keys are multiplied than the op gains by its rows
WIDE_BYTES = 1 << 22  # of each operand that is widened to fp32 for some rows

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Piece(NamedTuple):
    """Query rows × keys of the prefix or of the sequence. causal: row i sees keys 0 to i of the piece; pairs: which key
    a row sees takes a mask of rows × keys."""

    of_prefix: bool
    rows: slice
    keys: slice
    causal: bool = False
    pairs: bool = False


def serves_forward(tensors: Tensors, call) -> bool:
    """Whether this path serves the forward of a call, and its backward but for the gradient of a bias. Over nothing at
    all the op divides by zero, and it masks before it scales, so that a hidden score times a scale that is not positive
    is seen."""
    q = tensors.q_BHSD
    scores = call.scores
    return q.numel() > 0 and q.device.type == "cpu" and scores.softcap is None and scores.scale > 0 and not call.dropout


# Which pieces


def pieces(tensors: Tensors, scores: Scores) -> Iterator[Piece]:
    """Disjoint pieces that together are everything visible, and perhaps pairs that a mask hides; the prefix last."""
    yield from _sequence_pieces(tensors, scores)
    yield from _prefix_pieces(tensors, scores)


def _sequence_pieces(tensors: Tensors, scores: Scores) -> Iterator[Piece]:
    queries, keys, start = tensors.q_BHSD.shape[2], tensors.k_BGTD.shape[2], scores.start
    bias, slides, packed = tensors.bias_BHST, scores.window is not None, scores.segments_BT is not None
    every = slice(0, queries)
    if queries == 1 and not packed and bias is None:  # order and window leave a range of keys
        whole = [(every, key_range(scores, every, keys), False)]
    elif not (slides or packed or scores.causal) and _needs_no_sum(bias, tensors, scores):
        whole = [(every, slice(0, keys), False)]
    elif not (slides or packed) and bias is None:  # the keys before the first query, then a square
        rows, start = slice(min(queries, max(0, -start)), queries), max(0, start)
        whole = [(rows, slice(0, min(start, keys)), False), (rows, slice(start, min(keys, start + queries)), True)]
    else:
        samples = 1 if scores.padding_BT is None and not packed else len(tensors.q_BHSD)
        for rows in _row_blocks(tensors, scores, bias, samples, keys):
            seen = _within_segments(scores, rows, key_range(scores, rows, keys))
            if seen.stop > seen.start:
                yield Piece(False, rows, seen, pairs=True)
        return
    for rows, part, causal in whole:
        if part.stop > part.start and rows.stop > rows.start:
            yield Piece(False, rows, part, causal)


def _prefix_pieces(tensors: Tensors, scores: Scores) -> Iterator[Piece]:
    queries, prefix, bias = tensors.q_BHSD.shape[2], tensors.pk_BGPD.shape[2], tensors.pbias_BHSP
    slides = scores.window is not None and not scores.pin
    if prefix == 0:
        return
    if not slides and _needs_no_sum(bias, tensors, scores._replace(padding_BT=None)):
        yield Piece(True, slice(0, queries), slice(0, prefix))
        return
    samples = 1 if scores.local_BT is None else len(scores.local_BT)
    for rows in _row_blocks(tensors, scores, bias, samples, prefix):
        if not slides or _some_see_the_prefix(scores, rows):
            yield Piece(True, rows, slice(0, prefix), pairs=slides)


def _some_see_the_prefix(scores: Scores, rows: slice) -> bool:
    """The last virtual key stands at -1, so rows from W - 1 on see none."""
    if scores.local_BT is None:
        return scores.start + rows.start < scores.window - 1
    local = scores.local_BT[:, scores.start + rows.start : scores.start + rows.stop]
    return bool((local < scores.window - 1).any())


def _needs_no_sum(bias: Tensor | None, tensors: Tensors, scores: Scores) -> bool:
    """Whether the op can take the bias as it is, or there is none: else it is copied, for some rows at a time."""
    if bias is None:
        return True
    q = tensors.q_BHSD
    as_it_is = bias.dtype in (q.dtype, torch.promote_types(q.dtype, torch.float32))
    return as_it_is and scores.slopes_H is None and scores.padding_BT is None


def _row_blocks(tensors: Tensors, scores: Scores, bias: Tensor | None, samples: int, keys: int) -> Iterator[slice]:
    """Rows whose masks of rows × keys are about MASK_BYTES."""
    _, heads, queries, _ = tensors.q_BHSD.shape
    by_head = scores.slopes_H is not None or (bias is not None and bias.shape[1] > 1)
    samples = samples if bias is None else max(samples, bias.shape[0])
    row_bytes = samples * (heads if by_head else 1) * max(1, keys) * max(4, tensors.q_BHSD.element_size())
    step = max(1, min(MASK_ROWS, MASK_BYTES // row_bytes))
    for first in range(0, queries, step):
        yield slice(first, min(first + step, queries))


def _within_segments(scores: Scores, rows: slice, seen: slice) -> slice:
    """The keys of `seen` from the first to the last that share a segment with one of the rows."""
    segments = scores.segments_BT
    if segments is None or not bool((segments[:, 1:] >= segments[:, :-1]).all()):
        return seen
    segments = segments.contiguous()
    own = segments[:, scores.start + rows.start : scores.start + rows.stop]
    low = int(torch.searchsorted(segments, own[:, :1].contiguous()).min())
    high = int(torch.searchsorted(segments, own[:, -1:].contiguous(), right=True).max())
    low = max(seen.start, low)
    return slice(low, max(low, min(seen.stop, high)))


# Masks and operands


def _mask(tensors: Tensors, scores: Scores, piece: Piece) -> Tensor | None:
    """What the op adds to a piece's scores, (B or 1, H or 1, rows or 1, keys), -inf where nothing is seen; or None."""
    q, prefix = tensors.q_BHSD, tensors.pk_BGPD.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    bias, added = tensors.pbias_BHSP if piece.of_prefix else tensors.bias_BHST, None
    if scores.slopes_H is not None:
        positions = torch.arange(-prefix, 0)[None] if piece.of_prefix else scores.positions_BT[:, piece.keys]
        added = scores.slopes_H.to(wide)[:, None, None] * positions.to(wide)[:, None, None]
    if bias is not None:
        part = bias[:, :, piece.rows, piece.keys]
        added = part if added is None else added + part
    if piece.of_prefix:
        see = prefix_visible_block(scores, piece.rows, prefix, q.device) if piece.pairs else None
    elif piece.pairs:
        see = visible_block(scores, piece.rows, piece.keys, q.device)
    else:
        see = None if scores.padding_BT is None else scores.padding_BT[:, None, None, piece.keys]
    if see is not None:
        added = torch.where(see, torch.zeros((), dtype=wide) if added is None else added, -torch.inf)
    if added is None or added.dtype in (q.dtype, wide):
        return added
    return added.to(wide)


def _operands(tensors: Tensors, scores: Scores, piece: Piece):
    """(q, k, v, mask) of a piece as the op wants them: keys by the batch of q, a mask by its rows."""
    q, k, v, pk, pv, *_ = tensors
    k, v = (pk, pv) if piece.of_prefix else (k, v)
    q = q[:, :, piece.rows]
    k, v = (t[:, :, piece.keys].expand(q.shape[0], -1, -1, -1) for t in (k, v))
    mask = _mask(tensors, scores, piece)
    return q, k, v, None if mask is None else mask.expand(-1, -1, q.shape[2], -1)


def _unit_stride(t: Tensor) -> Tensor:
    """The op reads rows of D adjacent numbers whatever the last stride says."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _as_the_op_reads(tensors: Tensors) -> Tensors:
    """It lays out its result as the queries are, which must not lie one over the other."""
    q, *keys = (_unit_stride(t) for t in tensors[:5])
    return Tensors(q.contiguous() if 0 in q.stride() else q, *keys, *tensors[5:])


# Forward


def forward(tensors: Tensors, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out, L) as in `_prefix_attention_torch`."""
    tensors = _as_the_op_reads(tensors)
    q, sinks = tensors.q_BHSD, tensors.sinks_H
    batch, heads, queries, depth = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = None, None
    for piece in pieces(tensors, scores):
        if out is None and piece.rows == slice(0, queries):
            out, lse = _attend(tensors, scores, piece)
            lse = lse.double()
            continue
        if out is None:
            out = torch.zeros(batch, queries, heads, depth, dtype=wide).transpose(1, 2)
            lse = torch.full((batch, heads, queries), -torch.inf, dtype=torch.float64)
        out = out.to(wide)
        _merge(out[:, :, piece.rows], lse[:, :, piece.rows], *_attend(tensors, scores, piece))
    if out is None:  # nothing is visible
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)
    if sinks is not None:
        sink = sinks.double()[:, None]
        sink = sink.masked_fill(sink == torch.inf, torch.nan)  # as a softmax has it
        share = torch.sigmoid(lse - sink)
        share = share.masked_fill_((lse == -torch.inf) & (sink == -torch.inf), 0.0)
        out = out.to(wide).mul_(share.to(wide).unsqueeze(-1))
        lse = torch.logaddexp(lse, sink)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.to(wide).contiguous()


def _merge(out, lse, o, log) -> None:
    """Merges (o, log) into (out, lse), in place; lse is fp64, for an L that is rounded once."""
    o, difference = o.to(out.dtype), (log - lse).unsqueeze(-1)
    # Two rows that see nothing are both 0, and the difference of their L is NaN.
    weight = torch.sigmoid(difference).nan_to_num_(0.0).to(out.dtype)
    if (out.sum() + o.sum()).isfinite():
        out.lerp_(o, weight)
    else:  # `lerp` is the more accurate, but subtracts: of an infinity it makes NaN
        apart = out * torch.sigmoid(-difference).nan_to_num_(1.0).to(out.dtype) + o * weight
        out.copy_(torch.where(out.isinf() | o.isinf(), apart, out.lerp(o, weight)))
    lse.copy_(torch.logaddexp(lse, log.double()))


def _attend(tensors: Tensors, scores: Scores, piece: Piece) -> tuple[Tensor, Tensor]:
    """The op's (out, L) of a piece, L = -inf where a row sees nothing."""
    q, k, v, mask = _operands(tensors, scores, piece)
    (batch, heads, queries, depth), groups = q.shape, k.shape[1]
    if queries == 1 and (mask is None or mask.shape[1] == 1):
        # One row: the heads of a group, and for a shared prefix the samples, are rows of one product.
        shared = piece.of_prefix and mask is None and tensors.pk_BGPD.shape[0] == 1
        q = q.reshape(batch, groups, -1, depth)
        if shared:
            q = q.transpose(0, 1).reshape(1, groups, -1, depth)
            k, v = k[:1], v[:1]
        mask = None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
        out, lse = _flash(q, k, v, scale=scores.scale, attn_mask=mask)
        out, lse = out.reshape(-1, q.shape[2], depth), lse.reshape(-1, q.shape[2])
        if shared:
            out, lse = (t.unflatten(1, (batch, -1)).transpose(0, 1) for t in (out, lse))
        out, lse = out.reshape(batch, heads, 1, depth), lse.reshape(batch, heads, 1)
    else:
        out, lse = _flash(q, k, v, is_causal=piece.causal, scale=scores.scale, attn_mask=mask)
    lse = lse.masked_fill(lse == torch.inf, torch.nan)  # a score was infinite
    # Of a row of nothing but NaN the op says out = 0, L = 0, as of one that sees nothing.
    lost = lse == 0
    if mask is not None:
        empty = _empty_rows(mask, piece)
        lse, lost = lse.masked_fill(empty, -torch.inf), lost & ~empty
    if lost.any():
        q, k, *_ = _operands(tensors, scores, piece)
        spoilt = q.isnan().any(-1) | k.isnan().flatten(1).any(1)[:, None, None]
        lost = (lost & spoilt & (out == 0).all(-1)).expand_as(lse)
        out, lse = out.masked_fill(lost.unsqueeze(-1), torch.nan), lse.masked_fill(lost, torch.nan)
    return out, lse


def _empty_rows(mask: Tensor, piece: Piece) -> Tensor:
    """(B or 1, H or 1, rows or 1) booleans: which rows see nothing; of these the op says out = 0, L = 0."""
    rows = mask.shape[2]
    if mask.stride(2) == 0:
        mask = mask[:, :, :1]
    if not piece.causal:
        return mask.amax(-1) == -torch.inf
    best = mask.squeeze(2).cummax(-1).values  # of keys 0 to i
    if rows > best.shape[-1]:
        best = torch.cat((best, best[..., -1:].expand(-1, -1, rows - best.shape[-1])), -1)
    return best[..., :rows] == -torch.inf


# Backward


class Total:
    """A sum of pieces' gradients of one tensor: the only one as it came, several in the wide type."""

    def __init__(self, like: Tensor):
        self.like, self.sum = like, None

    def add(self, part: Tensor, places: slice) -> None:
        if part.shape[0] != self.like.shape[0]:  # a prefix that the samples share
            part = part.sum(0, keepdim=True, dtype=torch.promote_types(part.dtype, torch.float32))
        if self.sum is None and part.shape == self.like.shape:
            self.sum = part
            return
        wide = torch.promote_types(self.like.dtype, torch.float32)
        if self.sum is None:
            self.sum = torch.zeros(self.like.shape, dtype=wide)
        self.sum = self.sum.to(wide)
        self.sum[:, :, places] += part

    def get(self) -> Tensor:
        return torch.zeros_like(self.like) if self.sum is None else self.sum.to(self.like.dtype)


def backward(dout, tensors: Tensors, out, lse, scores: Scores, needs: Tensors) -> tuple[Tensor | None, ...]:
    """The gradients of `Tensors` but for biases, None where not needed."""
    operands = _as_the_op_reads(tensors)
    dout = _unit_stride(dout)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # then every score is -inf, and its weight 0
    dsinks = _sink_gradient(dout, tensors.sinks_H, out, lse) if needs.sinks_H else None
    totals = [Total(t) for t in tensors[:5]]
    for piece in pieces(operands, scores):
        at = 3 if piece.of_prefix else 1  # the keys' place in Tensors
        if not (needs[0] or needs[at] or needs[at + 1]):
            continue
        for rows, (dq, dk, dv) in _piece_gradients(dout, operands, scores, out, lse, piece):
            for place, part, own in ((0, dq, rows), (at, dk, piece.keys), (at + 1, dv, piece.keys)):
                if needs[place]:
                    totals[place].add(part, own)
    grads = (total.get() if need else None for total, need in zip(totals, needs, strict=False))
    return *grads, None, None, dsinks


def _piece_gradients(dout, tensors: Tensors, scores: Scores, out, lse, piece: Piece):
    """Yields rows and (dq, dk, dv) of them, by the batch of q.

    The op adds up the gradients of half-precision keys in half precision, an error that grows with the rows: 1.7 times
    eager's at 3000. So the prefix's, which are summed over all rows, are made in fp32, from some rows at a time.
    """
    q, k, v, mask = _operands(tensors, scores, piece)
    rows, wide = piece.rows, torch.promote_types(q.dtype, torch.float32)
    steps = [rows]
    if piece.of_prefix and q.dtype != wide:
        step = max(1, WIDE_BYTES // max(1, q.shape[0] * q.shape[1] * q.shape[3] * wide.itemsize))
        steps = [slice(r, min(r + step, rows.stop)) for r in range(rows.start, rows.stop, step)]
        k, v = k.to(wide), v.to(wide)
    for step in steps:
        own = slice(step.start - rows.start, step.stop - rows.start)
        arguments = dout[:, :, step], q[:, :, own], k, v, out[:, :, step]
        grads = _flash_backward(
            *(t.to(k.dtype) for t in arguments), lse[:, :, step].contiguous(), 0.0, piece.causal,
            attn_mask=None if mask is None else mask[:, :, own], scale=scores.scale,
        )  # fmt: skip
        yield step, grads


def _sink_gradient(dout, sinks, out, lse) -> Tensor:
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return (torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2)).neg_().to(sinks.dtype)
