"""Bytes that each kernel of `mixed_lora_linear` must move, from the mixture and tile sizes alone, by pointer argument.

counts: rows of each adapter's segment; ranks: its rank. What is streamed (x, dY) is read once where it belongs to an
adapter, and nowhere else; an adapter's matrix once for each block of its rows. Each function returns (loads, stores).
"""

from math import ceil

from tests.ops.lora_linear_traffic import FP32, SEED, runs

INT, FACTOR = 8, 4  # bytes of an entry of the tables
BLOCK_FIELDS, RUN_FIELDS = 2, 3


def without_nothing(*counted):
    return tuple({name: count for name, count in counts.items() if count} for counts in counted)


def blocks_of(counts, rows) -> list[int]:
    """Of each segment the blocks of rows."""
    return [ceil(count / rows) for count in counts]


def shrink(counts, k, ranks, tiles, data, adapter, processors, dropout=False, scaled=False):
    """S or (`scaled`) T of every adapter: x once, A once for each block of rows; few rows are read in runs of
    columns."""
    blocks = blocks_of(counts, tiles.rows)
    programs, rows, elements = sum(blocks), sum(counts), sum(c * r for c, r in zip(counts, ranks, strict=True))
    parts = runs(k, tiles.depth, processors // programs)
    steps = ceil(ceil(k / tiles.depth) / parts)
    loads = {
        "x_ptr": rows * k * data,
        "a_ptr": sum(b * r for b, r in zip(blocks, ranks, strict=True)) * k * adapter,
        "seed_ptr": programs * parts * steps * SEED * dropout,
        "order_ptr": rows * parts * INT,
        "blocks_ptr": programs * parts * BLOCK_FIELDS * INT,
        "segments_ptr": programs * parts * 6 * INT,
        "factors_ptr": programs * parts * (scaled + dropout) * FACTOR,
    }
    return without_nothing(loads, {"out_ptr": elements * adapter if parts == 1 else parts * elements * FP32})


def expand(counts, n, ranks, tiles, data, adapter, rest=0, residual=False, dropout=False):
    """s·S Bᵀ on top of a residual: the residual and the result once, S once for each block of columns, B once for each
    block of rows. `rest`: rows of no adapter, whose residual is copied; in place they are not touched."""
    blocks_n, blocks = ceil(n / tiles.columns), blocks_of(counts, tiles.rows)
    programs = (sum(blocks) + ceil(rest / tiles.rows)) * blocks_n
    rows = sum(counts) + rest
    loads = {
        "p_ptr": blocks_n * sum(c * r for c, r in zip(counts, ranks, strict=True)) * adapter,
        "q_ptr": sum(b * r for b, r in zip(blocks, ranks, strict=True)) * n * adapter,
        "residual_ptr": rows * n * data * residual,
        "seed_ptr": programs * SEED * dropout,
        "order_ptr": blocks_n * rows * INT,
        "blocks_ptr": programs * BLOCK_FIELDS * INT,
        "segments_ptr": programs * (5 + dropout) * INT,
        "factors_ptr": programs * (1 + dropout) * FACTOR,
    }
    return without_nothing(loads, {"out_ptr": rows * n * data})


def grad_columns(counts, k, ranks, tiles, data, adapter, processors, dropout=False):
    """dA of every adapter: x once, T once for each block of columns; ((loads, stores), fp32 partial sums in bytes)."""
    blocks_k, needed = ceil(k / tiles.columns), sum(blocks_of(counts, tiles.rows))
    length = ceil(needed / max(1, 2 * processors // blocks_k))
    parts = [ceil(blocks / length) for blocks in blocks_of(counts, tiles.rows)]
    programs, rows = sum(parts) * blocks_k, sum(counts)
    sums = sum(p * r for p, r in zip(parts, ranks, strict=True)) * k * FP32
    loads = {
        "x_ptr": rows * k * data,
        "t_ptr": blocks_k * sum(c * r for c, r in zip(counts, ranks, strict=True)) * adapter,
        "seed_ptr": blocks_k * needed * SEED * dropout,
        "order_ptr": blocks_k * rows * INT,
        "runs_ptr": programs * RUN_FIELDS * INT,
        "segments_ptr": programs * 4 * INT,
    }
    return without_nothing(loads, {"parts_ptr": sums}), sums
