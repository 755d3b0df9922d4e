"""Bytes that the kernels of `prefix_attention` must move, from shapes and tile sizes alone, by pointer argument.

The prefix is read once per tile of queries, K and V where a tile of queries sees some of them; nothing of either is
ever written. Each function returns (loads, stores).
"""

from math import ceil
from typing import NamedTuple

FP32 = 4


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    prefix: int
    depth: int
    data: int  # bytes of an element
    causal: bool = True


def tiles_of(length, block):
    """(first, last + 1) of each block."""
    return [(first, min(first + block, length)) for first in range(0, length, block)]


def keys_read(shape: Shape, rows: int, columns: int) -> int:
    """Over all tiles of queries of one head: how many keys they visit, in whole tiles."""
    start = shape.keys - shape.queries
    seen = [min(shape.keys, start + last) if shape.causal else shape.keys for _, last in tiles_of(shape.queries, rows)]
    return sum(min(shape.keys, ceil(count / columns) * columns) for count in seen)


def queries_read(shape: Shape, rows: int, columns: int) -> int:
    """Over all tiles of keys: how many queries they visit, in whole tiles."""
    start = shape.keys - shape.queries
    begin = [max(0, first - start) // rows * rows if shape.causal else 0 for first, _ in tiles_of(shape.keys, columns)]
    return sum(max(0, shape.queries - first) for first in begin)


def _rows(shape: Shape) -> int:
    return shape.batch * shape.heads * shape.queries


def forward(shape: Shape, rows: int, columns: int):
    row, row_tiles = shape.depth * shape.data, ceil(shape.queries / rows)
    every_head = shape.batch * shape.heads
    keys, prefix = every_head * keys_read(shape, rows, columns) * row, every_head * row_tiles * shape.prefix * row
    loads = {"q_ptr": _rows(shape) * row, "k_ptr": keys, "v_ptr": keys, "pk_ptr": prefix, "pv_ptr": prefix}
    return loads, {"out_ptr": _rows(shape) * row, "lse_ptr": _rows(shape) * FP32}


def merged(shape: Shape, rows: int):
    """The prefix alone, merged into a vendor's result: that is read once, and written once with the prefix in it."""
    row, row_tiles = shape.depth * shape.data, ceil(shape.queries / rows)
    prefix = shape.batch * shape.heads * row_tiles * shape.prefix * row
    loads = {"q_ptr": _rows(shape) * row, "pk_ptr": prefix, "pv_ptr": prefix}
    loads |= {"first_ptr": _rows(shape) * row, "first_lse_ptr": _rows(shape) * FP32}
    return loads, {"out_ptr": _rows(shape) * row, "lse_ptr": _rows(shape) * FP32}


def decode(shape: Shape, rows: int, columns: int, splits: int):
    """One query a sample: each key and value once; the prefix once for `rows` heads of samples, whoever's they are;
    each query once for every split. (loads, stores) of the parts, then of the merge."""
    row, group = shape.depth * shape.data, shape.heads // shape.kv_heads
    keys = shape.batch * shape.kv_heads * shape.keys * row
    prefix = shape.kv_heads * ceil(shape.batch * group / rows) * shape.prefix * row
    states = shape.batch * shape.heads * splits * FP32
    loads = {"q_ptr": _rows(shape) * row * splits, "k_ptr": keys, "v_ptr": keys, "pk_ptr": prefix, "pv_ptr": prefix}
    stored = {"part_ptr": states * shape.depth, "peak_ptr": states, "total_ptr": states}
    return (loads, stored), (stored, {"out_ptr": _rows(shape) * row, "lse_ptr": _rows(shape) * FP32})


def grad_query(shape: Shape, rows: int, columns: int):
    loads, _ = forward(shape, rows, columns)
    row = _rows(shape) * shape.depth * shape.data
    loads |= {"out_ptr": row, "dout_ptr": row, "lse_ptr": _rows(shape) * FP32}
    return loads, {"dq_ptr": row, "delta_ptr": _rows(shape) * FP32}


def grad_query_in_fp32(shape: Shape, rows: int, columns: int):
    """δ from a first pass over the keys, not from out; of the softmax two numbers are kept."""
    loads, stores = grad_query(shape, rows, columns)
    del loads["out_ptr"]
    twice = {name: 2 * loads[name] for name in ("k_ptr", "v_ptr", "pk_ptr", "pv_ptr")}
    return loads | twice | {"share_ptr": loads["lse_ptr"]}, stores


def grad_keys(shape: Shape, rows: int, columns: int):
    """Each key once; q, dout, L and δ once for each tile of keys that the queries see."""
    row = shape.depth * shape.data
    keys = shape.batch * shape.kv_heads * shape.keys * row
    queries = shape.batch * shape.heads * queries_read(shape, rows, columns)
    loads = {"k_ptr": keys, "v_ptr": keys, "q_ptr": queries * row, "dout_ptr": queries * row}
    loads |= {"lse_ptr": queries * FP32, "delta_ptr": queries * FP32}
    return loads, {"dk_ptr": keys, "dv_ptr": keys}


def grad_prefix(shape: Shape, columns: int, runs: int):
    """As grad_keys for a prefix that all share: each of the runs holds it once and writes partial sums."""
    row, tiles = shape.depth * shape.data, ceil(shape.prefix / columns)
    keys = shape.kv_heads * shape.prefix * shape.depth
    loads = {"k_ptr": runs * keys * shape.data, "v_ptr": runs * keys * shape.data}
    loads |= {"q_ptr": tiles * _rows(shape) * row, "dout_ptr": tiles * _rows(shape) * row}
    loads |= {"lse_ptr": tiles * _rows(shape) * FP32, "delta_ptr": tiles * _rows(shape) * FP32}
    partial = FP32 if runs > 1 else shape.data
    return loads, {"dk_ptr": runs * keys * partial, "dv_ptr": runs * keys * partial}
