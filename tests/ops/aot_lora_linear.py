"""What `lora_linear` launches, for the compile gate: every strategy, in the dtypes, ranks and dropouts that ship."""

import itertools

import torch

from fastpeft.dispatch import Plan
from fastpeft.ops import _lora_linear_triton as path
from tests.aot import Case

DTYPES = {  # data, adapter
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "fp32-tf32": (torch.float32, torch.float32),
}
PLANS = [Plan(name, name, "forced by the compile gate") for name in ("fused", "prewrite", "addmm", "augment")]
MANY, FEW = 8192, 16  # rows; with few of them one over the columns is split, and one over the rows is not
QUICK = {("bf16", 16, 0.1): ("sm_90", "gfx942"), ("bf16-fp32", 64, 0.1): ("sm_90",)}


def _meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_all(dtypes: str, rank: int, dropout: float, size: int = 4096, rows=(MANY, FEW)) -> None:
    """Forward and backward of a square layer by every plan, with every set of wanted gradients that matters."""
    data, adapter = DTYPES[dtypes]
    weight, bias = _meta(size, size, dtype=data), _meta(size, dtype=data)
    a, b = _meta(rank, size, dtype=adapter), _meta(size, rank, dtype=adapter)
    seed = _meta(1, dtype=torch.int64) if dropout else None
    for count, plan in itertools.product(rows, PLANS):
        x, dy = _meta(count, size, dtype=data), _meta(count, size, dtype=data)
        s = path.forward(x, weight, bias, None, a, b, 2.0, seed, dropout, plan)[1]
        path.forward(x, None, None, dy, a, b, 2.0, seed, dropout, plan)
        for with_bias in (False, True):
            path.grad_b_and_t(dy, s, b, 2.0, True, True, with_bias)
            path.grad_b_and_t(dy, s, b, 2.0, True, False, with_bias)
        t = path.grad_b_and_t(dy, s, b, 2.0, False, True, False)[1]
        for need_a, need_x in ((True, True), (True, False), (False, True)):
            path.grad_a_and_x(dy, x, t, weight, a, seed, dropout, plan, data, need_a, need_x)
        path.grad_a_and_x(dy, x, t, weight, a, seed, dropout, plan, torch.float32, True, True)  # x was fp32


def _case(dtypes, rank, dropout, bounded=True, quick=(), **shape):
    name = " ".join([f"lora_linear r{rank}", dtypes, *["dropout"] * bool(dropout), *map(str, shape.values())])

    def run():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = dtypes == "fp32-tf32"
        try:
            launch_all(dtypes, rank, dropout, **shape)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return Case(name, run, bounded, quick)


def cases():
    ranks = (8, 16, 32, 64, 128)
    for dtypes, rank, dropout in itertools.product(("bf16", "bf16-fp32", "fp16-fp32"), ranks, (0.0, 0.1)):
        yield _case(dtypes, rank, dropout, quick=QUICK.get((dtypes, rank, dropout), ()))
    yield _case("fp16", 16, 0.1)
    for dtypes, rank in itertools.product(("fp32", "fp32-tf32"), ranks):
        yield _case(dtypes, rank, 0.1)
    for dtypes in DTYPES:
        yield _case(dtypes, 256, 0.1, bounded=False)
    for dtypes in ("bf16", "bf16-fp32"):  # no row begins at a multiple of 16 bytes
        yield _case(dtypes, 5, 0.1, bounded=False, size=4095)
