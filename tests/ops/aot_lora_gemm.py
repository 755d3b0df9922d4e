"""What the strategy "persistent" launches, for the compile gate: forward and dX of a square layer. Where the device has
no descriptors that is `lora_linear`'s own kernel, which its own cases compile, too."""

import itertools

import torch

from fastpeft.kernels import lora_gemm
from fastpeft.kernels._common import Dropout
from tests.aot import Case
from tests.ops.aot_lora_linear import DTYPES, MANY

QUICK = {("bf16", 16, 0.1): ("sm_90", "sm_100")}


def launch_all(dtypes: str, rank: int, dropout: float, size: int = 4096) -> None:
    """Forward with and without a bias, dX in both types, as a part of another sum, too; its weight lies by depth."""
    data, adapter = DTYPES[dtypes]

    def meta(*shape, dtype=data):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight = meta(MANY, size), meta(size, size)
    s, b = meta(MANY, rank, dtype=adapter), meta(size, rank, dtype=adapter)
    a = meta(rank, size, dtype=adapter)
    mask = Dropout(meta(1, dtype=torch.int64), dropout) if dropout else None
    lora_gemm.tail(s, b, data, base=(x, weight), bias=meta(size), scale=0.5)
    lora_gemm.tail(s, b, data, base=(x, weight), scale=0.5)
    for out in (data, torch.float32):
        for residual in (None, meta(MANY, size, dtype=out)):
            options = dict(dropout=mask, out_dtype=out, residual=residual)
            lora_gemm.tail(s, a.t(), data, base=(x, weight.t()), **options)


def _case(dtypes: str, rank: int, dropout: float) -> Case:
    name = " ".join([f"lora_gemm r{rank}", dtypes, *["dropout"] * bool(dropout)])
    quick = QUICK.get((dtypes, rank, dropout), ())
    return Case(name, lambda: launch_all(dtypes, rank, dropout), quick=quick)


def cases():
    for dtypes, rank, dropout in itertools.product(("bf16", "bf16-fp32", "fp16-fp32"), (16, 64), (0.0, 0.1)):
        yield _case(dtypes, rank, dropout)
    for rank, dropout in itertools.product((8, 128), (0.0, 0.1)):
        yield _case("bf16", rank, dropout)
    yield _case("fp16", 16, 0.1)
