"""Attention over a prefix and a sequence, and its gradients (mathematics: fastpeft/ops/prefix_attention.py).

    _forward      out and L: the prefix's tiles, then the sequence's, in one online softmax. Either may be left out:
                  with the vendor's out and L in the sequence's place it merges (design B), or adds what a gate lets
                  through
    _grad_query   δ, and dq by the same two loops, onto the vendor's dq if there is one
    _grad_keys    dk and dv of a tile of keys; of the prefix over batch and heads as well, in partial sums
    _grad_bias    dbias of a tile, summed over what it was broadcast over

q [B, H, S, D], k and v [B, G, T, D], pk and pv [B or 1, G, P, D], any strides, also 0; out, dq [B, H, S, D], dk, dv
[B, G, T, D] are stored heads last but one. Deterministic: no atomics. Every offset is computed in 64 bits. Nothing that
no query sees is visited, where that follows from causality or the window.
"""

import torch

from fastpeft.kernels._attention_kernels import (
    _forward_kernel,
    _grad_bias_kernel,
    _grad_keys_kernel,
    _grad_query_kernel,
)
from fastpeft.kernels._attention_tiles import AttentionTiles, attention_tiles
from fastpeft.kernels._common import (
    UPCAST,
    Dropout,
    cdiv,
    dot_mode,
    processor_count,
    rank_block,
    split_evenly,
)
from fastpeft.kernels._common import launch as _launch
from fastpeft.kernels._partials import add_up
from fastpeft.kernels._tiles import table_of


def strides(name: str, letters: str, tensor: torch.Tensor | None) -> dict:
    """{"stride_qb": ...} of a tensor's dimensions, without those whose letter is a space; zeros where there is none."""
    found = (0,) * len(letters) if tensor is None else tensor.stride()
    named = zip(letters, found, strict=True)
    return {f"stride_{name}{letter}": stride for letter, stride in named if letter != " "}


def broadcast(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with stride 0 along its first two dimensions where they are 1."""
    if tensor is None:
        return None
    return tensor.expand(*(-1 if size > 1 else 2 for size in tensor.shape[:2]), -1, -1)


def _whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def heads_inside(like: torch.Tensor) -> torch.Tensor:
    """A new [B, H, S, D] of the same type, stored as [B, S, H, D]."""
    batch, heads, rows, depth = like.shape
    return torch.empty(batch, rows, heads, depth, dtype=like.dtype, device=like.device).transpose(1, 2)


def shared_arguments(tensors, scores, dropout: Dropout | None) -> dict:
    """The arguments that every kernel has."""
    q, k = tensors.q_BHSD, tensors.k_BGTD
    _, heads, queries, depth = q.shape
    padding = _whole(scores.padding_BT)
    return {
        "q_ptr": q,
        "slopes_ptr": _whole(scores.slopes_H),
        "positions_ptr": _whole(scores.positions_BT),
        "padding_ptr": None if padding is None else padding.view(torch.uint8),
        "segments_ptr": _whole(scores.segments_BT),
        "local_ptr": _whole(scores.local_BT),
        "seed_ptr": None if dropout is None else dropout.seed,
        **strides("q", "bhsd", q),
        "scale": scores.scale,
        "softcap": scores.softcap,
        "start": scores.start,
        "threshold": 0 if dropout is None else dropout.threshold,
        "keep_scale": 1.0 if dropout is None else dropout.keep_scale,
        "H": heads,
        "group": heads // k.shape[1],
        "S": queries,
        "T": k.shape[2],
        "CAUSAL": scores.causal,
        "D": depth,
        "BLOCK_D": rank_block(depth),
        "MODE": dot_mode(q.dtype, q.dtype),
        "UPCAST": UPCAST,
    }


def windows(tensors, scores) -> tuple[int | None, int | None]:
    """The window over the sequence and over the prefix; one that no two positions leave is cut to fit 32 bits. Samples'
    own positions may be far beyond the row."""
    if scores.window is None:
        return None, None
    far = abs(scores.start) + tensors.q_BHSD.shape[2] + tensors.k_BGTD.shape[2] + tensors.pk_BGPD.shape[2] + 1
    of_prefix = min(scores.window, far if scores.local_BT is None else 1 << 30)
    return min(scores.window, far), None if scores.pin else of_prefix


def mask_start(prefix: int) -> int:
    """The column of dropout's mask at which the sequence begins: the next multiple of 8 after the prefix."""
    return -(-prefix // 8) * 8


def _rows_arguments(tensors, scores, dropout, prefix: bool, sequence: bool) -> dict:
    """What `_forward` and `_grad_query` have in common; without `prefix` or `sequence` that loop is left out."""
    _, k, v, pk, pv, bias, pbias, _ = tensors
    window, prefix_window = windows(tensors, scores)
    tested = window is not None or scores.padding_BT is not None or scores.segments_BT is not None
    return {
        **shared_arguments(tensors, scores, dropout),
        "k_ptr": k if sequence else None,
        "v_ptr": v if sequence else None,
        "pk_ptr": pk if prefix else None,
        "pv_ptr": pv if prefix else None,
        "bias_ptr": bias,
        "pbias_ptr": pbias,
        **strides("k", "bhtd", k),
        **strides("v", "bhtd", v),
        **strides("pk", "bhpd", broadcast(pk)),
        **strides("pv", "bhpd", broadcast(pv)),
        **strides("b", "bhst", broadcast(bias)),
        **strides("pb", "bhsp", broadcast(pbias)),
        "window": window,
        "prefix_window": prefix_window,
        "P": pk.shape[2],
        "mask_start": mask_start(pk.shape[2]),
        "PLAIN": not tested,
    }


def statistics(q: torch.Tensor) -> torch.Tensor:
    """Room for what is kept of each row's softmax: L, natural, [B, H, S] in fp32; for fp32 data [2, B, H, S], the peak
    and the share (see _attention_scores.py)."""
    several = (2,) if q.dtype == torch.float32 else ()
    return torch.empty(*several, *q.shape[:3], dtype=torch.float32, device=q.device)


def natural_lse(statistics: torch.Tensor) -> torch.Tensor:
    """L [B, H, S], contiguous, from what `forward` returns."""
    return statistics if statistics.ndim == 3 else statistics[0] - statistics[1].log()


def lse_arguments(lse: torch.Tensor) -> dict:
    return {"lse_ptr": lse, "share_ptr": None} if lse.ndim == 3 else {"lse_ptr": lse[0], "share_ptr": lse[1]}


def _tiles(kernel: str, shared: dict, device: torch.device) -> AttentionTiles:
    burdens = ("bias_ptr", "seed_ptr", "slopes_ptr", "softcap", "window")
    ragged = shared["D"] != shared["BLOCK_D"]  # rows of it are loaded under a mask
    burdened = not shared["PLAIN"] or ragged or any(shared[name] is not None for name in burdens)
    return attention_tiles(kernel, shared["BLOCK_D"], shared["MODE"], burdened, table_of(device))


def launch(kernel, grid: tuple[int, ...], tensor: torch.Tensor, arguments: dict) -> None:
    if 0 not in grid:
        _launch(kernel, grid, tensor, **arguments)


def forward(
    tensors,
    scores,
    dropout: Dropout | None = None,
    *,
    prefix: bool = True,
    sequence: bool = True,
    first: tuple[torch.Tensor, torch.Tensor] | None = None,
    gate: torch.Tensor | None = None,
    tiles: AttentionTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, S, D], stored heads last but one; L [B, H, S] in fp32) of `Tensors` and `Scores`.

    first: (out, L) of the sequence alone, any strides, with which the prefix is merged; with gate [H], to which the
    prefix's own result is added times the gate. L is then the prefix's.
    """
    q = tensors.q_BHSD
    batch, heads, queries, _ = q.shape
    shared = _rows_arguments(tensors, scores, dropout, prefix, sequence)
    tiles = tiles or _tiles("forward", shared, q.device)
    out = heads_inside(q)
    lse = statistics(q)
    before, before_lse = first or (None, None)
    arguments = {
        **shared,
        "out_ptr": out,
        **lse_arguments(lse),
        "first_ptr": before,
        "first_lse_ptr": before_lse,
        "gate_ptr": gate,
        "sinks_ptr": _whole(tensors.sinks_H) if sequence or gate is None else None,
        **strides("f", "bhsd", before),
        **strides("l", "bhs", before_lse),
        **tiles.blocks(shared["P"]),
        **tiles.options,
    }
    launch(_forward_kernel, (cdiv(queries, tiles.queries) * batch * heads,), q, arguments)
    return out, lse


def grad_query(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tensors,
    scores,
    dropout: Dropout | None = None,
    *,
    wanted: bool = True,
    prefix: bool = True,
    sequence: bool = True,
    before: torch.Tensor | None = None,
    tiles: AttentionTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(δ [B, H, S] in fp32, dq stored as `forward`'s out, or None if not `wanted`); before [B, H, S, D] is added to dq.

    lse: what `forward` returned beside out.
    """
    shared = _rows_arguments(tensors, scores, dropout, prefix, sequence)
    shared |= {"out_ptr": out, "gate_ptr": None, **strides("o", "bhsd", out)}
    return _launch_grad_query(dout, lse, shared, wanted, before, tiles)


def grad_gated_query(
    dout: torch.Tensor,
    tensors,
    scores,
    gate: torch.Tensor,
    *,
    wanted: bool = True,
    before: torch.Tensor | None = None,
    tiles: AttentionTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(lse, δ, dq) of what the prefix adds through a gate [H], whose softmax is made again, as nothing of it was kept.

    δ is the ungated prefix's: its sum over batch and queries is the gate's gradient.
    """
    shared = _rows_arguments(tensors, scores, None, True, False)
    shared |= {"out_ptr": None, "gate_ptr": gate, **strides("o", "bhsd", None)}
    lse = statistics(tensors.q_BHSD)
    return lse, *_launch_grad_query(dout, lse, shared, wanted, before, tiles)


def _launch_grad_query(dout, lse, shared: dict, wanted: bool, before, tiles):
    q = shared["q_ptr"]
    batch, heads, queries, _ = q.shape
    tiles = tiles or _tiles("grad_query", shared, q.device)
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    dq = heads_inside(q) if wanted else None
    arguments = {
        **shared,
        **lse_arguments(lse),
        "dout_ptr": dout,
        "delta_ptr": delta,
        "before_ptr": before,
        "dq_ptr": dq,
        **strides("g", "bhsd", dout),
        **strides("f", "bhsd", before),
        **tiles.blocks(shared["P"]),
        **tiles.options,
    }
    launch(_grad_query_kernel, (cdiv(queries, tiles.queries) * batch * heads,), q, arguments)
    return delta, dq


def _columns_arguments(dout, lse, delta, tensors, scores, dropout, prefix: bool) -> dict:
    """What `_grad_keys` and `_grad_bias` have in common: one of the two kinds of keys."""
    _, k, v, pk, pv, bias, pbias, _ = tensors
    shared = shared_arguments(tensors, scores, dropout)
    window, prefix_window = windows(tensors, scores)
    if prefix:
        k, v, bias, window = broadcast(pk), broadcast(pv), pbias, prefix_window
        shared |= dict.fromkeys(("positions_ptr", "padding_ptr", "segments_ptr"))
        shared["local_ptr"] = shared["local_ptr"] if window is not None else None
    return {
        **shared,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        **lse_arguments(lse),
        "delta_ptr": delta,
        "bias_ptr": bias,
        **strides("k", "bhtd", k),
        **strides("v", "bhtd", v),
        **strides("g", "bhsd", dout),
        **strides("b", "bhst", broadcast(bias)),
        "window": window,
        "count": k.shape[2],
        "mask_start": 0 if prefix else mask_start(pk.shape[2]),
        "PREFIX": prefix,
        "PLAIN": window is None and shared["padding_ptr"] is None and shared["segments_ptr"] is None,
    }


def grad_keys(
    dout, lse, delta, tensors, scores, dropout: Dropout | None = None, *, prefix: bool, gate=None, tiles=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv) [B, G, T, D], stored heads last but one; or, of the prefix, [B or 1, G, P, D]."""
    q, k = tensors.q_BHSD, tensors.pk_BGPD if prefix else tensors.k_BGTD
    owners, kv_heads, count, depth = k.shape
    shared = _columns_arguments(dout, lse, delta, tensors, scores, dropout, prefix)
    tiles = tiles or _tiles("grad_prefix" if prefix else "grad_keys", shared, q.device)
    blocks = {"BLOCK_M": tiles.queries, "BLOCK_N": min(tiles.keys, rank_block(count))}
    programs = cdiv(count, blocks["BLOCK_N"]) * owners * kv_heads
    owned = len(q) // owners if prefix else 1
    steps = owned * shared["group"] * cdiv(shared["S"], tiles.queries)
    run, runs = split_evenly(steps, 1, 2 * processor_count(q) // max(1, programs)) if prefix else (steps, 1)
    dtype = k.dtype if runs == 1 else torch.float32
    shape = (2, runs, owners, kv_heads, count, depth) if prefix else (2, runs, owners, count, kv_heads, depth)
    dk, dv = gradients = torch.empty(*shape, dtype=dtype, device=q.device)
    if not prefix:
        dk, dv = dk.transpose(2, 3), dv.transpose(2, 3)
    arguments = {
        **shared,
        "gate_ptr": gate,
        "dk_ptr": dk,
        "dv_ptr": dv,
        **dict(zip(("stride_xrun", "stride_xb", "stride_xh", "stride_xt"), dk.stride(), strict=False)),
        "owned": owned,
        "steps_per_run": run,
        **blocks,
        **tiles.options,
    }
    launch(_grad_keys_kernel, (programs, runs), q, arguments)
    if runs == 1:
        return dk[0], dv[0]
    out = torch.empty(2, *shape[2:], dtype=k.dtype, device=q.device)
    add_up([(parts, each, 1.0, runs, each.numel()) for parts, each in zip(gradients, out, strict=True)])
    return out[0], out[1]


def grad_bias(
    dout, lse, delta, tensors, scores, dropout: Dropout | None = None, *, prefix: bool, tiles=None
) -> torch.Tensor:
    """dbias like the bias of the sequence or of the prefix, summed over what it was broadcast over."""
    q, bias = tensors.q_BHSD, tensors.pbias_BHSP if prefix else tensors.bias_BHST
    shared = _columns_arguments(dout, lse, delta, tensors, scores, dropout, prefix)
    tiles = tiles or _tiles("grad_bias", shared, q.device)
    out = torch.empty(bias.shape, dtype=bias.dtype, device=q.device)
    biases, heads = bias.shape[:2]
    arguments = {
        **shared,
        "out_ptr": out,
        "batches": len(q) // biases,
        "heads": shared["H"] // heads,
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        **tiles.options,
    }
    programs = cdiv(shared["S"], tiles.queries) * cdiv(shared["count"], tiles.keys) * biases * heads
    launch(_grad_bias_kernel, (programs,), q, arguments)
    return out
