"""What `lora_mlp` launches of its own, for the compile gate: every activation, in the dtypes, ranks and dropouts that
ship, with everything in the backward kernel and with nothing in it. The products are compiled with `lora_linear`, what
is read once for gate and up with `lora_projections`."""

import itertools

import torch

from fastpeft.kernels import lora_mlp as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.ops.lora_mlp import ACTIVATIONS
from tests.aot import Case
from tests.ops.aot_lora_linear import DTYPES, FEW, MANY, _meta

QUICK = {("bf16", 16, 0.1): ("sm_90", "gfx942"), ("bf16-fp32", 16, 0.1): ("sm_90",)}


def launch_all(
    dtypes: str, ranks: tuple[int, int, int], dropout: float, activation: str, more: bool, size: int = 14336
) -> None:
    """Forward and backward at ranks of gate, up and down; `more`: of few rows, and with a part of the products."""
    data, adapter = DTYPES[dtypes]
    a = _meta(ranks[2], size, dtype=adapter)
    drop = Dropout(_meta(1, dtype=torch.int64), dropout) if dropout else None
    dh, gate, up = (_meta(MANY, size, dtype=data) for _ in range(3))
    kernels.gated_forward(gate, up, activation, a, drop)
    if more:
        kernels.gated_forward(gate[:FEW], up[:FEW], activation, a, drop)
        kernels.gated_forward(gate, up, activation)
        for with_h in (False, True):
            kernels.gated_backward(dh, gate, up, activation, with_h=with_h)
    if max(ranks) > kernels.fused_rank(data, adapter):
        return
    first, second = (
        kernels.Side(_meta(MANY, rank, dtype=adapter), _meta(size, rank, dtype=adapter), 2.0) for rank in ranks[:2]
    )
    down = (_meta(MANY, ranks[2], dtype=adapter), a)
    kernels.gated_backward(dh, gate, up, activation, down=down, sides=(first, second), dropout=drop)
    if more:
        kernels.gated_backward(dh, gate, up, activation, sides=(first, second))
        kernels.gated_backward(dh, gate, up, activation, sides=(None, second))
        kernels.gated_backward(dh, gate, up, activation, down=down, dropout=drop)


def _case(dtypes: str, ranks, dropout: float, activation="silu", more=False, bounded=True, quick=(), **shape) -> Case:
    name = " ".join([f"lora_mlp r{max(ranks)}", dtypes, activation, *["dropout"] * bool(dropout)])

    def run():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = dtypes == "fp32-tf32"
        try:
            launch_all(dtypes, ranks, dropout, activation, more, **shape)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return Case(name, run, bounded, quick)


def cases():
    for rank, dropout in itertools.product((8, 16, 32), (0.0, 0.1)):
        yield _case("bf16", (rank,) * 3, dropout, quick=QUICK.get(("bf16", rank, dropout), ()))
    for dtypes, rank in itertools.product(("bf16-fp32", "fp16-fp32"), (16, 32)):
        yield _case(dtypes, (rank,) * 3, 0.1, quick=QUICK.get((dtypes, rank, 0.1), ()))
    for rank in (8, 16, 32):
        yield _case("bf16", (rank,) * 3, 0.1, more=True)
    for dtypes in ("bf16-fp32", "fp16-fp32"):
        yield _case(dtypes, (16,) * 3, 0.1, more=True)
    for dtypes, activation in itertools.product(("bf16", "bf16-fp32"), ACTIVATIONS[1:]):
        yield _case(dtypes, (16,) * 3, 0.1, activation)
    yield _case("bf16", (32, 16, 8), 0.1, "gelu_tanh")
    for dtypes in ("fp16", "fp32", "fp32-tf32"):
        yield _case(dtypes, (16,) * 3, 0.1)
    for dtypes, rank, dropout in itertools.product(("bf16", "bf16-fp32"), (64, 128), (0.0, 0.1)):  # forward alone
        yield _case(dtypes, (rank,) * 3, dropout)
    for dtypes in DTYPES:
        yield _case(dtypes, (256,) * 3, 0.1, bounded=False)
    yield _case("bf16", (5, 3, 1), 0.1, bounded=False, size=14335)
