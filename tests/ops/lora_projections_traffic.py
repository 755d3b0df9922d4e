"""Bytes that each kernel of `lora_projections` must move, from shapes and tile sizes alone, by pointer argument.

x is read once for all projections, where single layers read it once each. Letters as in the op; `ranks` of the
projections, `masks` whether each drops. Each function returns (loads, stores).
"""

from math import ceil

from tests.ops.lora_linear_traffic import SEED, Sizes, runs, share


def _each(name: str, counts) -> dict[str, int]:
    """Of the arguments name_0, name_1 and so on."""
    return {f"{name}_{p}": count for p, count in enumerate(counts)}


def _some(*counted):
    return tuple({name: count for name, count in counts.items() if count} for counts in counted)


def shrink_all(m, k, ranks, tiles, sizes: Sizes, out, processors, masks):
    """Every S: x exactly once, each A once per block of rows; few rows are read in runs of columns."""
    blocks = ceil(m / tiles.rows)
    parts = runs(k, tiles.depth, processors // blocks)
    looks = blocks * parts * ceil(ceil(k / tiles.depth) / parts)
    loads = {
        "x_ptr": m * k * sizes.data,
        **_each("a", (blocks * r * k * sizes.adapter for r in ranks)),
        **_each("seed", (looks * SEED * drops for drops in masks)),
    }
    return _some(loads, {"out_ptr": share(parts, m * sum(ranks), out)})


def grad_all_columns(m, k, ranks, tiles, sizes: Sizes, processors, masks, tail):
    """Every dA: x exactly once, each T once per block of columns; on request the sum of the rank-r terms, written
    once, for which each A is read once per run of rows."""
    blocks_k, blocks_m = ceil(k / tiles.columns), ceil(m / tiles.rows)
    parts = runs(m, tiles.rows, 2 * processors // blocks_k)
    looks = blocks_k * parts * ceil(blocks_m / parts)
    loads = {
        "x_ptr": m * k * sizes.data,
        **_each("t", (blocks_k * m * r * sizes.adapter for r in ranks)),
        **_each("a", (parts * r * k * sizes.adapter * tail for r in ranks)),
        **_each("seed", (looks * SEED * drops for drops in masks)),
    }
    return _some(loads, {"out_ptr": share(parts, sum(ranks) * k, sizes.adapter), "tail_ptr": m * k * sizes.data * tail})


def tail_all(m, k, ranks, tiles, sizes: Sizes, masks, out, onto):
    """The sum of the rank-r terms of dX: written once, or read once too where it is added to what is there."""
    blocks_m, blocks_k = ceil(m / tiles.rows), ceil(k / tiles.columns)
    loads = {
        **_each("t", (blocks_k * m * r * sizes.adapter for r in ranks)),
        **_each("a", (blocks_m * r * k * sizes.adapter for r in ranks)),
        "out_ptr": m * k * out * onto,
        **_each("seed", (blocks_m * blocks_k * SEED * drops for drops in masks)),
    }
    return _some(loads, {"out_ptr": m * k * out})
