"""What `prefix_attention` and `gated_prompt_attention` have in common: their tensors, masks and checks.

A mask is never an input of the kernels: which keys a query sees follows from a few numbers and (B, T) vectors.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.errors import OpError

# Letters of the shape suffixes in this file: B batch, H query heads, G key/value heads, S queries, T keys, P virtual
# keys, D head dimension.


class Scores(NamedTuple):
    """How a score is made of q and k, and which keys a query sees; no gradients. Query i is at key position start + i.

    causal: key j ≤ start + i. window: j > start + i - window, and without `causal` also j < start + i + window. pin:
    the window does not apply to the prefix; otherwise virtual key j stands at j - P, before the query's segment.
    """

    causal: bool
    scale: float
    start: int
    window: int | None = None
    pin: bool = False
    softcap: float | None = None
    padding_BT: Tensor | None = None  # bool, True: attend
    segments_BT: Tensor | None = None  # int32; a query sees the keys of its own segment
    local_BT: Tensor | None = None  # int32, positions behind the prefix, for windows that slide over it
    slopes_H: Tensor | None = None  # fp32, ALiBi
    positions_BT: Tensor | None = None  # fp32, ALiBi's key positions

    def of_prompt(self) -> "Scores":
        """Those of a softmax over virtual keys alone, which has a scale and nothing else."""
        return Scores(causal=False, scale=self.scale, start=0)


class Tensors(NamedTuple):
    """What may want a gradient, in the order of the gradients. The prefix is (B or 1, G, P, D)."""

    q_BHSD: Tensor
    k_BGTD: Tensor
    v_BGTD: Tensor
    pk_BGPD: Tensor
    pv_BGPD: Tensor
    bias_BHST: Tensor | None  # B and H may be 1
    pbias_BHSP: Tensor | None
    sinks_H: Tensor | None


def of_sequence(tensors: Tensors) -> Tensors:
    """Without virtual keys: P = 0."""
    pk, pv = tensors.pk_BGPD[:, :, :0], tensors.pv_BGPD[:, :, :0]
    return tensors._replace(pk_BGPD=pk, pv_BGPD=pv, pbias_BHSP=None)


def of_prompt(tensors: Tensors) -> Tensors:
    """Without real keys: T = 0."""
    q, k, v, pk, pv, *_ = tensors
    return Tensors(q, k[:, :, :0], v[:, :, :0], pk, pv, None, None, None)


def visible(scores: Scores, queries: int, keys: int, device) -> Tensor:
    """(B or 1, 1, S, T) booleans: which keys of the sequence a query sees."""
    return visible_block(scores, slice(0, queries), slice(0, keys), device)


def visible_block(scores: Scores, rows: slice, columns: slice, device) -> Tensor:
    """These rows and columns of `visible`."""
    at = scores.start + torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(columns.start, columns.stop, device=device)[None]
    see = torch.ones(at.shape[0], key.shape[1], dtype=torch.bool, device=device)
    if scores.causal:
        see = see & (key <= at)
    if scores.window is not None:
        see = see & (key > at - scores.window)
        if not scores.causal:
            see = see & (key < at + scores.window)
    see = see[None, None]
    if scores.padding_BT is not None:
        see = see & scores.padding_BT[:, None, None, columns]
    if scores.segments_BT is not None:
        own = scores.segments_BT[:, scores.start + rows.start : scores.start + rows.stop]
        see = see & (own[:, None, :, None] == scores.segments_BT[:, None, None, columns])
    return see


def prefix_visible(scores: Scores, queries: int, prefix: int, device) -> Tensor | None:
    """(B or 1, 1, S, P) booleans: which virtual keys a query sees; None: all of them."""
    return prefix_visible_block(scores, slice(0, queries), prefix, device)


def prefix_visible_block(scores: Scores, rows: slice, prefix: int, device) -> Tensor | None:
    """These rows of `prefix_visible`."""
    if scores.window is None or scores.pin:
        return None
    if scores.local_BT is not None:
        at = scores.local_BT[:, None, scores.start + rows.start : scores.start + rows.stop, None]
    else:
        at = scores.start + torch.arange(rows.start, rows.stop, device=device)[None, None, :, None]
    key = torch.arange(prefix, device=device) - prefix
    see = key > at - scores.window
    return see if scores.causal else see & (key < at + scores.window)


def check_tensors(op: str, tensors: Tensors) -> None:
    """Raises OpError, naming `op`, unless shapes, dtypes and devices fit each other."""
    q, k, v, pk, pv, bias, pbias, sinks = tensors
    if q.ndim != 4:
        raise OpError(f"{op}: query has shape {tuple(q.shape)}; (B, H, S, D) is needed")
    batch, heads, queries, depth = q.shape
    if not q.is_floating_point():
        raise OpError(f"{op}: query is {q.dtype}; floating point is needed")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != depth or k.shape[1] == 0 or heads % k.shape[1]:
        raise OpError(
            f"{op}: key has shape {tuple(k.shape)}; (B, Hkv, T, D) = ({batch}, a divisor of {heads}, T, {depth}) is "
            f"needed for query of shape {tuple(q.shape)}"
        )
    _need_shape(op, "value", v, tuple(k.shape))
    if pk.ndim != 4 or pk.shape[0] not in (1, batch) or pk.shape[1] != k.shape[1] or pk.shape[3] != depth:
        raise OpError(
            f"{op}: the virtual keys have shape {tuple(pk.shape)}; ({k.shape[1]}, P, {depth}) or ({batch}, "
            f"{k.shape[1]}, P, {depth}) is needed for key of shape {tuple(k.shape)}"
        )
    if pk.shape[2] == 0:
        raise OpError(f"{op}: the prefix has P = 0 virtual tokens; at least 1 is needed")
    _need_shape(op, "the virtual values", pv, tuple(pk.shape))
    for name, extra, columns in (("bias", bias, k.shape[2]), ("prefix_bias", pbias, pk.shape[2])):
        if extra is not None:
            fits = extra.ndim == 4 and all(
                have in (1, want) for have, want in zip(extra.shape, (batch, heads), strict=False)
            )
            if not fits or tuple(extra.shape[2:]) != (queries, columns):
                raise OpError(
                    f"{op}: {name} has shape {tuple(extra.shape)}; ({batch} or 1, {heads} or 1, {queries}, {columns}) "
                    "is needed"
                )
    if sinks is not None:
        _need_shape(op, "sinks", sinks, (heads,))
    for name, each in zip(("query", "key", "value", "virtual keys", "virtual values"), tensors[:5], strict=True):
        if each.dtype != q.dtype:
            raise OpError(f"{op}: {name} is {each.dtype}, query {q.dtype}; cast one of them")
    for name, each in zip(("key", "value", "virtual keys", "virtual values", "bias", "prefix_bias", "sinks"),
                          tensors[1:], strict=True):  # fmt: skip
        if each is not None and each.device != q.device:
            raise OpError(f"{op}: {name} is on {each.device}, query on {q.device}; move one of them")


def make_scores(
    op, tensors: Tensors, causal, scale, padding_mask, segment_ids, query_start, alibi_slopes, key_positions,
    sliding_window, softcap,
) -> Scores:  # fmt: skip
    """The `Scores` of a call from the arguments of its public function, checked. Raises OpError."""
    q, k = tensors.q_BHSD, tensors.k_BGTD
    (batch, heads, queries, depth), keys = q.shape, k.shape[2]
    start = keys - queries if query_start is None else query_start
    if segment_ids is not None and not 0 <= start <= keys - queries:
        raise OpError(f"{op}: query_start is {start}; with segment_ids 0 to T - S = {keys - queries} is needed")
    if scale is None:
        scale = depth**-0.5
    elif not -math.inf < scale < math.inf:  # no isfinite, which torch.compile does not know of numbers that may change
        raise OpError(f"{op}: scale is {scale}; a finite number is needed")
    if softcap is not None and not 0 < softcap < math.inf:
        raise OpError(f"{op}: softcap is {softcap}; a positive number or None is needed")
    if sliding_window is not None and sliding_window < 1:
        raise OpError(f"{op}: sliding_window is {sliding_window}; at least 1, or None is needed")
    for name, each, shape in (
        ("padding_mask", padding_mask, (batch, keys)),
        ("segment_ids", segment_ids, (batch, keys)),
        ("alibi_slopes", alibi_slopes, (heads,)),
        ("key_positions", key_positions, (batch, keys)),
    ):
        if each is not None:
            _need_shape(op, name, each, shape)
            if each.device != q.device:
                raise OpError(f"{op}: {name} is on {each.device}, query on {q.device}; move one of them")
    if padding_mask is not None and padding_mask.dtype != torch.bool:
        raise OpError(f"{op}: padding_mask is {padding_mask.dtype}; torch.bool is needed, True where to attend")
    segments = None if segment_ids is None else segment_ids.to(torch.int32)
    local = None
    if segments is not None and (sliding_window is not None or alibi_slopes is not None):
        local = positions_within(segments)
    elif sliding_window is not None and key_positions is not None:
        if not 0 <= start <= keys - queries:
            raise OpError(f"{op}: query_start is {start}; with key_positions 0 to T - S = {keys - queries} is needed")
        local = key_positions.to(torch.int32)
    if alibi_slopes is not None and key_positions is None:
        key_positions = default_positions(batch, keys, padding_mask, local, q.device)
    return Scores(
        causal=causal,
        scale=float(scale),
        start=start,
        window=sliding_window,
        softcap=softcap,
        padding_BT=padding_mask,
        segments_BT=segments,
        local_BT=local if sliding_window is not None else None,
        slopes_H=None if alibi_slopes is None else alibi_slopes.float(),
        positions_BT=None if alibi_slopes is None else key_positions.float(),
    )


def positions_within(segments_BT: Tensor) -> Tensor:
    """(B, T) int32: how many keys of its own segment stand before a key; segments are runs."""
    at = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)
    first = torch.ones_like(segments_BT, dtype=torch.bool)
    first[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return (at - torch.where(first, at, 0).cummax(1).values).to(torch.int32)


def default_positions(batch, keys, padding_BT, local_BT, device) -> Tensor:
    """(B, T) positions for ALiBi: BLOOM's count of the tokens so far, 0 for padding, or those within the segment."""
    if local_BT is not None:
        return local_BT
    if padding_BT is not None:
        return (padding_BT.long().cumsum(1) - 1) * padding_BT
    return torch.arange(keys, device=device).expand(batch, -1)


def _need_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise OpError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
