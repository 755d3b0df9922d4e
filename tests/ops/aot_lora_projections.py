"""What `lora_projections` launches, for the compile gate: q, k, v and gate, up in the dtypes, ranks and dropouts that
ship. The products and their tails are compiled with `lora_linear`."""

import itertools

import torch

from fastpeft.kernels import lora_projections as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._partials import MOST, add_up
from tests.aot import Case
from tests.ops.aot_lora_linear import DTYPES, MANY, _meta

FEW = 16


def launch_all(dtypes: str, ranks: tuple[int, ...], dropout: float, size: int = 4096) -> None:
    """Forward and backward of what is read once, training and decoding."""
    data, adapter = DTYPES[dtypes]
    a = [_meta(r, size, dtype=adapter) for r in ranks]
    seeds = [Dropout(_meta(1, dtype=torch.int64), dropout) if dropout else None for _ in ranks]
    for rows in (MANY, FEW):
        x = _meta(rows, size, dtype=data)
        ts = kernels.shrink_all(x, a, adapter, seeds)
        kernels.grad_all_columns(ts, x, a, seeds, with_tail=True)
        kernels.grad_all_columns(ts, x, a, seeds, with_tail=False)
        for out in dict.fromkeys((data, torch.float32)):  # x was fp32
            dx = kernels.tail_all(ts, a, seeds, data, out)
        kernels.tail_all(ts, a, seeds, data, out, onto=dx)
    launch_sums(adapter, range(1, MOST + 1))


def launch_sums(adapter: torch.dtype, counts) -> None:
    """What adds up dB and T of several outputs."""
    for count in counts:
        add_up([(_meta(8, 4096, 16, dtype=torch.float32), _meta(4096, 16, dtype=adapter), 2.0, 8, 65536)] * count)


def launch_few() -> None:
    """One launch of each kernel."""
    a = [_meta(16, 4096, dtype=torch.bfloat16) for _ in range(2)]
    seeds = [Dropout(_meta(1, dtype=torch.int64), 0.1), None]
    x = _meta(MANY, 4096, dtype=torch.bfloat16)
    ts = kernels.shrink_all(x, a, torch.bfloat16, seeds)
    kernels.grad_all_columns(ts, x, a, seeds, with_tail=True)
    kernels.tail_all(ts, a, seeds, torch.bfloat16, torch.bfloat16)
    launch_sums(torch.bfloat16, (4, MOST))


def _case(dtypes: str, ranks: tuple[int, ...], dropout: float, bounded=True, **shape) -> Case:
    name = " ".join([f"lora_projections r{max(ranks)} x{len(ranks)}", dtypes, *["dropout"] * bool(dropout)])

    def run():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = dtypes == "fp32-tf32"
        try:
            launch_all(dtypes, ranks, dropout, **shape)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return Case(name, run, bounded)


def cases():
    yield Case("lora_projections quick", launch_few, quick=("sm_90", "gfx942"))
    ranks = (8, 16, 32, 64, 128)
    for dtypes, rank, dropout in itertools.product(("bf16", "bf16-fp32", "fp16-fp32"), ranks, (0.0, 0.1)):
        yield _case(dtypes, (rank,) * 3, dropout)
        yield _case(dtypes, (rank,) * 2, dropout)
    for dtypes, dropout in itertools.product(("bf16", "fp32", "fp32-tf32"), (0.0, 0.1)):
        yield _case(dtypes, (16,) * 4, dropout)
    for dtypes in DTYPES:
        yield _case(dtypes, (128, 64, 64), 0.1, bounded=False)
    yield _case("bf16", (5, 3, 1), 0.1, bounded=False, size=4095)
