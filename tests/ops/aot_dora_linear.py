"""What `dora_linear` launches besides `lora_linear`'s kernels, for the compile gate."""

import itertools

import torch

from fastpeft.kernels import dora_linear as kernels
from fastpeft.kernels._common import Dropout
from tests.aot import Case
from tests.ops.aot_lora_linear import DTYPES

M = 8192
QUICK = {("bf16", 16, 4096): ("sm_90", "gfx942")}


def _meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_all(dtypes: str, rank: int, size: int) -> None:
    """Forward with and without dropout and bias, G and the sums, each alone too, and a mask onto dX of either dtype."""
    data, adapter = DTYPES[dtypes]
    base, gain = _meta(M, size, dtype=data), _meta(size, dtype=torch.float32)
    s, b = _meta(M, rank, dtype=adapter), _meta(size, rank, dtype=adapter)
    for plain, bias in itertools.product((None, base), (None, _meta(size, dtype=data))):
        kernels.combine(plain, bias, base, gain, s, b, 2.0)
    for parts in ((True, True), (True, False), (False, True)):
        kernels.scaled_grad(base, base, gain, *parts)
    dropout = Dropout(_meta(1, dtype=torch.int64), 0.1)
    for onto in (None, base, _meta(M, size, dtype=torch.float32)):
        kernels.drop(base, dropout, onto)


def cases():
    for dtypes, rank in itertools.product(("bf16", "bf16-fp32", "fp16", "fp16-fp32", "fp32"), (8, 16, 64, 128, 256)):

        def run(dtypes=dtypes, rank=rank):
            launch_all(dtypes, rank, 4096)

        yield Case(f"dora_linear r{rank} {dtypes}", run, quick=QUICK.get((dtypes, rank, 4096), ()))
    yield Case("dora_linear r5 bf16-fp32 odd", lambda: launch_all("bf16-fp32", 5, 4095))
