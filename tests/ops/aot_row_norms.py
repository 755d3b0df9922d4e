"""What `row_norms` launches, for the compile gate: every pair of dtypes, few and many rows, ranks of any number."""

import itertools

import torch

from fastpeft.kernels import row_norms as kernels
from tests.aot import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {  # weight, adapter
    "bf16": (BF16, BF16),
    "bf16-fp32": (BF16, FP32),
    "fp16": (FP16, FP16),
    "fp16-fp32": (FP16, FP32),
    "fp32": (FP32, FP32),
}
MANY, FEW = 4096, 64  # rows; with few of them the columns are split over programs
QUICK = {("bf16", 32): ("sm_90", "gfx942")}


def _meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_all(dtypes: str, rank: int, depth: int) -> None:
    """As a layer stores its weight, and transposed, as Conv1D does."""
    data, adapter = DTYPES[dtypes]
    for rows in (MANY, FEW):
        a, b = _meta(rank, depth, dtype=adapter), _meta(rows, rank, dtype=adapter)
        for weight in (_meta(rows, depth, dtype=data), _meta(depth, rows, dtype=data).t()):
            kernels.row_norms(weight, a, b, 2.0)


def cases():
    for dtypes, rank in itertools.product(DTYPES, (8, 32, 64, 1024)):

        def run(dtypes=dtypes, rank=rank):
            launch_all(dtypes, rank, 4096)

        yield Case(f"row_norms r{rank} {dtypes}", run, quick=QUICK.get((dtypes, rank), ()))
    yield Case("row_norms r5 bf16-fp32 odd", lambda: launch_all("bf16-fp32", 5, 4095))
