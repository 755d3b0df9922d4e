"""Bytes that each kernel of `lora_mlp` must move, from shapes and tile sizes alone, by pointer argument.

m, h: rows and hidden features; data, adapter: bytes of an element; ranks of gate, up and down, 0 without LoRA. What is
streamed (gate, up, dh) is read once and what is made (h, dg, du) written once; a matrix of LoRA is read once for each
run of rows, S and T once for each block of columns. Each function returns (loads, stores).
"""

from math import ceil

from tests.ops.lora_linear_traffic import FP32, SEED, runs, share
from tests.ops.mixed_lora_linear_traffic import without_nothing


def gated_forward(m, h, rank, tiles, data, adapter, processors, dropout=False):
    """h = act(g)⊙u and S of down: 3·m·h elements beside what is small."""
    blocks = ceil(m / tiles.rows)
    parts = runs(h, tiles.columns, 4 * processors // blocks)
    steps = ceil(ceil(h / tiles.columns) / parts)
    loads = {
        "gate_ptr": m * h * data,
        "up_ptr": m * h * data,
        "a_ptr": blocks * rank * h * adapter,
        "seed_ptr": blocks * parts * steps * SEED * dropout,
    }
    return without_nothing(loads, {"h_ptr": m * h * data, "s_ptr": share(parts, m * rank, adapter)})


def gated_backward(m, h, ranks, tiles, data, adapter, processors, dropout=False, with_h=False):
    """dg over a new buffer and du over dh, T and dB of gate and up, dA of down: 5·m·h elements beside what is small."""
    blocks = ceil(h / tiles.columns)
    parts = runs(m, tiles.rows, processors // blocks)
    steps = ceil(ceil(m / tiles.rows) / parts)
    gate, up, down = ranks
    loads = {
        "dh_ptr": m * h * data,
        "gate_ptr": m * h * data,
        "up_ptr": m * h * data,
        "t_ptr": blocks * m * down * adapter,
        "a_ptr": parts * h * down * adapter,
        "seed_ptr": blocks * parts * steps * SEED * dropout,
    }
    stores = {
        "dh_ptr": m * h * data,
        "dgate_ptr": m * h * data,
        "h_ptr": m * h * data * with_h,
        "da_ptr": parts * down * h * FP32,
    }
    for side, rank in (("gate", gate), ("up", up)):
        loads |= {f"{side}_s_ptr": blocks * m * rank * adapter, f"{side}_b_ptr": parts * h * rank * adapter}
        stores |= {f"{side}_t_ptr": blocks * m * rank * FP32, f"{side}_db_ptr": parts * h * rank * FP32}
    return without_nothing(loads, stores)
