"""Bytes that each kernel of `lora_linear` must move, from shapes and tile sizes alone, by pointer argument.

Letters as in the op: M rows, K inputs, N outputs, R rank. A tensor that is read once costs its size. A tiled product
reads each operand once per block of the other one's dimension. Of what several programs have a share of the partial
sums are fp32 and are written once and read once. Each function returns (loads, stores).
"""

from dataclasses import dataclass
from math import ceil

FP32, SEED = 4, 8


@dataclass(frozen=True)
class Sizes:
    """Bytes of one element of the data (x, dY, W, bias) and of the adapter (A, B, S, T)."""

    data: int
    adapter: int


def runs(length: int, block: int, parts: int) -> int:
    """How many runs of whole blocks a reduction over `length` is cut into, for at most `parts` programs."""
    blocks = ceil(length / block)
    return ceil(blocks / ceil(blocks / max(1, parts)))


def share(parts: int, size: int, out: int) -> int:
    """What `parts` programs write of a result of `size` elements of `out` bytes, where a single one writes it whole."""
    return size * out if parts == 1 else parts * size * FP32


def sums(*shares: tuple[int, int, int]):
    """What adds up the shares, each (parts, size, out), all in one launch."""
    loads = {f"parts_{number}": parts * size * FP32 for number, (parts, size, _) in enumerate(shares)}
    return loads, {f"out_{number}": size * out for number, (_, size, out) in enumerate(shares)}


def shrink(m, k, r, tiles, data, adapter, out, processors, dropout=False):
    """S = s·drop(x) Aᵀ: x exactly once, A once per block of rows; few rows are read in runs of columns."""
    blocks = ceil(m / tiles.rows)
    parts = runs(k, tiles.depth, processors // blocks)
    loads = {"x_ptr": m * k * data, "a_ptr": blocks * r * k * adapter}
    if dropout:
        loads["seed_ptr"] = blocks * parts * ceil(ceil(k / tiles.depth) / parts) * SEED
    return loads, {"out_ptr": share(parts, m * r, out)}


def tail(m, n, r, tiles, sizes: Sizes, depth=0, bias=False, residual=False, dropout=False, out=None):
    """x Wᵀ + bias + residual + S Bᵀ: `depth` is K, or 0 without the base product, which re-reads as tiles do; `out` the
    bytes of an element of the result where it is not the data's."""
    blocks_m, blocks_n = ceil(m / tiles.rows), ceil(n / tiles.columns)
    loads = {
        "x_ptr": blocks_n * m * depth * sizes.data,
        "w_ptr": blocks_m * n * depth * sizes.data,
        "bias_ptr": blocks_m * n * sizes.data * bias,
        "residual_ptr": m * n * sizes.data * residual,
        "p_ptr": blocks_n * m * r * sizes.adapter,
        "q_ptr": blocks_m * n * r * sizes.adapter,
        "seed_ptr": blocks_m * blocks_n * SEED * dropout,
    }
    return {name: count for name, count in loads.items() if count}, {"out_ptr": m * n * (out or sizes.data)}


def grad_b_and_t(m, n, r, tiles, sizes: Sizes, processors, bias=False):
    """dB = dYᵀ S and T = s·dY B: dY exactly once; S once per block of columns, B once per run of rows."""
    blocks_n = ceil(n / tiles.columns)
    parts = runs(m, tiles.rows, processors // blocks_n)
    loads = {
        "dy_ptr": m * n * sizes.data,
        "s_ptr": blocks_n * m * r * sizes.adapter,
        "b_ptr": parts * n * r * sizes.adapter,
    }
    stores = {"t_ptr": blocks_n * m * r * FP32, "db_ptr": parts * n * r * FP32}
    if bias:
        stores["dbias_ptr"] = parts * n * FP32
    return loads, stores


def grad_columns(m, k, r, tiles, sizes: Sizes, processors, tail=False, total=False, dropout=False):
    """dA = Tᵀ drop(x), and mask⊙(T A): x exactly once, the latter written once; T once per block of columns."""
    blocks_k, blocks_m = ceil(k / tiles.columns), ceil(m / tiles.rows)
    parts = runs(m, tiles.rows, 2 * processors // blocks_k)
    loads = {
        "x_ptr": m * k * sizes.data,
        "t_ptr": blocks_k * m * r * sizes.adapter,
        "a_ptr": parts * r * k * sizes.adapter * tail,
        # One look at the seed for each block of rows of each run, whether or not the run ends inside x.
        "seed_ptr": blocks_k * parts * ceil(blocks_m / parts) * SEED * dropout,
    }
    stores = {
        "out_ptr": share(parts, r * k, sizes.adapter),
        "tail_ptr": m * k * sizes.data * tail,
        "sum_ptr": parts * k * FP32 * total,
    }
    return tuple({name: count for name, count in counts.items() if count} for counts in (loads, stores))


def shares_of_grad_b_and_t(m, n, r, tiles, sizes: Sizes, processors, bias=False):
    """T's, dB's and dbias's, as `sums` takes them."""
    blocks_n = ceil(n / tiles.columns)
    parts = runs(m, tiles.rows, processors // blocks_n)
    return (blocks_n, m * r, sizes.adapter), (parts, n * r, sizes.adapter), *[(parts, n, FP32)] * bias
