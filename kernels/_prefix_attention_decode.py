"""A step of generation: attention of one query a sample over a prefix that the batch shares and its own keys.

    _decode      the state of a softmax over a run of keys. Of a shared prefix for the rows of all samples together, so
                 that it is read once for up to BLOCK_M of them and not once for each head of each sample; of a
                 sample's own keys for the heads of a group
    _merge_parts out and L from these states

With one query there are too few rows to fill a GPU: the keys are split into runs, about two programs a processor
(split-KV, as in Flash-Decoding). Gradients are prefix_attention.py's.
"""

import torch

from fastpeft.kernels import prefix_attention as general
from fastpeft.kernels._attention_decode import _decode_kernel, _merge_parts_kernel
from fastpeft.kernels._attention_tiles import AttentionTiles, attention_tiles
from fastpeft.kernels._common import cdiv, next_power_of_2, processor_count, rank_block, split_evenly
from fastpeft.kernels._tiles import table_of

PREFIX_SPLITS, SPLITS = 16, 48  # at most: together what `_merge_parts` holds


def visible_keys(scores, keys: int, window: int | None) -> tuple[int, int]:
    """[first, last): the keys that order and window leave to the query."""
    first, last = 0, keys
    if scores.causal:
        last = min(keys, scores.start + 1)
    if window is not None:
        first = max(0, scores.start - window + 1)
        last = last if scores.causal else min(keys, scores.start + window)
    return min(first, keys), max(min(first, keys), last)


def _visible_prefix(scores, prefix: int, window: int | None) -> int:
    """The first virtual key that the window leaves; key j stands at j - P. With segments each sample has its own."""
    if window is None or scores.local_BT is not None:
        return 0
    return min(prefix, max(0, prefix + scores.start - window + 1))


def _runs(keys: int, block: int, programs: int, most: int, device_like: torch.Tensor) -> tuple[int, int]:
    """(length, number) of the runs into which `keys` are split, where each split costs this many programs."""
    if keys <= 0 or programs == 0:
        return block, 0
    wanted = 2 * processor_count(device_like) // programs
    return split_evenly(keys, block, min(most, max(1, wanted)))


def forward(tensors, scores, *, tiles: AttentionTiles | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, 1, D], what is kept of the softmax as in prefix_attention.py) of `Tensors` with S = 1, `Scores`."""
    q, k, v, pk, pv, bias, pbias, sinks = tensors
    (batch, heads, _, depth), groups, keys, prefix = q.shape, *k.shape[1:3], pk.shape[2]
    shared = general.shared_arguments(tensors, scores, None)
    window, prefix_window = general.windows(tensors, scores)
    tiles = tiles or attention_tiles("decode", shared["BLOCK_D"], shared["MODE"], True, table_of(q.device))
    samples, group = batch // len(pk), shared["group"]
    blocks = tiles.blocks(prefix)
    blocks["BLOCK_M"] = min(tiles.queries, rank_block(samples * group))
    row_blocks = cdiv(samples * group, blocks["BLOCK_M"])
    first, last = visible_keys(scores, keys, window)
    prefix_first = _visible_prefix(scores, prefix, prefix_window)
    per_split = len(pk) * groups * row_blocks
    prefix_run, prefix_runs = _runs(prefix - prefix_first, blocks["BLOCK_P"], per_split, PREFIX_SPLITS, q)
    run, runs = _runs(last - first, blocks["BLOCK_N"], batch * groups, SPLITS, q)
    splits = prefix_runs + runs
    parts = torch.empty(splits, batch, heads, depth, dtype=torch.float32, device=q.device)
    states = torch.empty(2, splits, batch, heads, dtype=torch.float32, device=q.device)
    rows = {name: shared[name] for name in ("slopes_ptr", "positions_ptr", "padding_ptr", "segments_ptr", "local_ptr")}
    numbers = {name: shared[name] for name in ("scale", "softcap", "start", "H", "group", "T", "CAUSAL", "D")}
    kinds = {name: shared[name] for name in ("BLOCK_D", "MODE", "UPCAST")}
    arguments = {
        **dict(q_ptr=q, k_ptr=k, v_ptr=v, pk_ptr=pk, pv_ptr=pv, bias_ptr=bias, pbias_ptr=pbias),
        **dict(part_ptr=parts, peak_ptr=states[0], total_ptr=states[1]),
        **rows,
        **general.strides("q", "bh d", q),
        **general.strides("k", "bhtd", k),
        **general.strides("v", "bhtd", v),
        **general.strides("pk", "bhpd", general.broadcast(pk)),
        **general.strides("pv", "bhpd", general.broadcast(pv)),
        **general.strides("b", "bh t", general.broadcast(bias)),
        **general.strides("pb", "bh p", general.broadcast(pbias)),
        **numbers,
        **dict(window=window, prefix_window=prefix_window, B=batch, G=groups, P=prefix),
        **dict(samples=samples, row_blocks=row_blocks, first=first, last=last, length=run),
        **dict(prefix_first=prefix_first, prefix_length=prefix_run, prefix_splits=prefix_runs),
        "prefix_programs": per_split * prefix_runs,
        **blocks,
        "BLOCK_G": rank_block(group),
        **kinds,
        **tiles.options,
    }
    general.launch(_decode_kernel, (per_split * prefix_runs + batch * groups * runs,), q, arguments)
    return _merge_parts(parts, states, None if sinks is None else sinks.contiguous(), q, kinds)


def _merge_parts(parts, states, sinks, q, kinds: dict) -> tuple[torch.Tensor, torch.Tensor]:
    splits, batch, heads, depth = parts.shape
    out, lse = general.heads_inside(q), general.statistics(q)
    arguments = {
        **dict(part_ptr=parts, peak_ptr=states[0], total_ptr=states[1], sinks_ptr=sinks, out_ptr=out),
        **general.lse_arguments(lse),
        **dict(splits=splits, rows=batch * heads, H=heads, SPLITS=next_power_of_2(max(1, splits)), D=depth),
        **{name: kinds[name] for name in ("BLOCK_D", "MODE")},
        **dict(num_warps=4, num_stages=1, enable_fp_fusion=True),
    }
    general.launch(_merge_parts_kernel, (batch * heads,), q, arguments)
    return out, lse
