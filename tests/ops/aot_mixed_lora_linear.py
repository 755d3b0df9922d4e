"""What `mixed_lora_linear` launches, for the compile gate: training and decoding, in the dtypes, ranks and dropouts
that ship."""

import itertools

import torch

from fastpeft.ops import _mixed_lora_linear_triton as path
from fastpeft.ops.mixed_lora_linear import Call
from tests.aot import Case
from tests.ops.aot_lora_linear import DTYPES, _meta

# Three adapters of mixed ranks and samples of none.
RANKS = {16: (8, 16, 4), 32: (32, 16, 8), 64: (16, 64, 8), 128: (8, 128, 16), 256: (256, 16, 64)}
SAMPLES, TOKENS = ((0, 3), (1,), (2, 5)), 1024
BATCH = 8
QUICK = {("bf16", 16, 0.1): ("sm_90", "gfx942"), ("bf16-fp32", 64, 0.1): ("sm_90",)}


def launch_all(dtypes: str, ranks: tuple[int, ...], dropout: float, size: int = 4096) -> None:
    """Forward and backward of a square layer, with and without a base product of its own."""
    data, adapter = DTYPES[dtypes]
    weight = _meta(size, size, dtype=data)
    a, b = [_meta(r, size, dtype=adapter) for r in ranks], [_meta(size, r, dtype=adapter) for r in ranks]
    seeds = _meta(1, dtype=torch.int64) if dropout else None
    numbers = ((0.5, 2.0, 0.25), (dropout, 0.0, dropout))

    def launch(tokens: int, base: torch.Tensor | None, wide: torch.dtype) -> None:
        x, dy = _meta(BATCH * tokens, size, dtype=data), _meta(BATCH * tokens, size, dtype=data)
        call = Call(SAMPLES, tokens, ranks, *numbers, data, wide, True)
        s = path.forward(x, base, None, None if base is not None else dy, a, b, seeds, call)[1]
        _, t = path.grad_b_and_t(dy, s, b, call, True, True)
        path.grad_a_and_x(dy, x, t, base, a, seeds, call, True, True)

    launch(TOKENS, weight, data)
    launch(TOKENS, None, data)
    launch(TOKENS, weight, torch.float32)  # x was fp32
    launch(1, weight, data)  # a step of `generate`


def _case(dtypes: str, rank: int, dropout: float, bounded=True, quick=(), ranks=None, **shape) -> Case:
    name = " ".join([f"mixed_lora_linear r{rank}", dtypes, *["dropout"] * bool(dropout), *map(str, shape.values())])

    def run():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = dtypes == "fp32-tf32"
        try:
            launch_all(dtypes, ranks or RANKS[rank], dropout, **shape)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return Case(name, run, bounded, quick)


def cases():
    ranks = (16, 32, 64, 128)
    for dtypes, rank, dropout in itertools.product(("bf16", "bf16-fp32", "fp16-fp32"), ranks, (0.0, 0.1)):
        yield _case(dtypes, rank, dropout, quick=QUICK.get((dtypes, rank, dropout), ()))
    yield _case("fp16", 16, 0.1)
    for dtypes, rank in itertools.product(("fp32", "fp32-tf32"), ranks):
        yield _case(dtypes, rank, 0.1)
    for dtypes in DTYPES:
        yield _case(dtypes, 256, 0.1, bounded=False)
    for dtypes in ("bf16", "bf16-fp32"):  # no row begins at a multiple of 16 bytes
        yield _case(dtypes, 5, 0.1, bounded=False, ranks=(5, 3, 1), size=4095)
