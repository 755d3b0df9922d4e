"""What `prefix_attention` launches, for the compile gate: both strategies, the dtypes and head dimensions."""

import itertools

import torch

from fastpeft.kernels import _prefix_attention_decode as decode
from fastpeft.kernels import prefix_attention as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.ops._prefix_attention_scores import Scores, Tensors
from tests.aot import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp32-tf32": torch.float32}
BATCH, HEADS, KV_HEADS, LENGTH = 8, 32, 8, 2048
QUICK = {("bf16", 128, "plain"): ("sm_90",), ("bf16", 64, "bias"): ("sm_90", "gfx942")}


def _meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _heads(heads, length, depth, dtype):
    """As a projection leaves them: heads last but one."""
    return _meta(BATCH, length, heads, depth, dtype=dtype).transpose(1, 2)


# name: (fields of Scores, whether there are biases, whether there are sinks, dropout)
FEATURES = {
    "plain": ({}, False, False, 0.0),
    "bidirectional": ({"causal": False}, False, False, 0.0),
    "padding window": ({"window": 512, "padding_BT": _meta(BATCH, LENGTH, dtype=torch.bool)}, False, False, 0.0),
    "padding window places": (
        {
            "window": 512,
            "padding_BT": _meta(BATCH, LENGTH, dtype=torch.bool),
            "local_BT": _meta(BATCH, LENGTH, dtype=torch.int32),
        },
        False, False, 0.0,
    ),
    "alibi padding": (
        {
            "slopes_H": _meta(HEADS),
            "positions_BT": _meta(BATCH, LENGTH),
            "padding_BT": _meta(BATCH, LENGTH, dtype=torch.bool),
        },
        False, False, 0.0,
    ),
    "bias": ({"causal": False}, True, False, 0.0),
    "softcap": ({"softcap": 50.0}, False, False, 0.0),
    "segments sinks": (
        {
            "window": 128,
            "segments_BT": _meta(BATCH, LENGTH, dtype=torch.int32),
            "local_BT": _meta(BATCH, LENGTH, dtype=torch.int32),
        },
        False, True, 0.0,
    ),
    "dropout": ({}, False, False, 0.1),
}  # fmt: skip


def launch_all(dtype: torch.dtype, depth: int, feature: str, prefix: int, merge: bool) -> None:
    """Forward and all gradients by the kernels alone; with `merge` also what stands beside a vendor's flash."""
    changes, biased, sunk, p = FEATURES[feature]
    bias, pbias = (_meta(1, HEADS, LENGTH, n, dtype=dtype) if biased else None for n in (LENGTH, prefix))
    tensors = Tensors(
        *(_heads(heads, LENGTH, depth, dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)),
        *(_meta(1, KV_HEADS, prefix, depth, dtype=dtype) for _ in range(2)),
        bias, pbias, _meta(HEADS) if sunk else None,
    )  # fmt: skip
    scores = Scores(**{"causal": True, "scale": depth**-0.5, "start": 0} | changes)
    dropout = Dropout(_meta(1, dtype=torch.int64), p) if p else None
    out, lse = kernels.forward(tensors, scores, dropout)
    dout = out
    delta, dq = kernels.grad_query(dout, out, lse, tensors, scores, dropout)
    kernels.grad_query(dout, out, lse, tensors, scores, dropout, wanted=False)
    for of_prefix in (False, True):
        kernels.grad_keys(dout, lse, delta, tensors, scores, dropout, prefix=of_prefix)
        if biased:
            kernels.grad_bias(dout, lse, delta, tensors, scores, dropout, prefix=of_prefix)
    if merge:
        gate = _meta(HEADS, dtype=dtype)
        kernels.forward(tensors, scores, sequence=False, first=(out, kernels.natural_lse(lse)))
        kernels.forward(tensors, scores, sequence=False, first=(out, None), gate=gate)
        kernels.grad_query(dout, out, lse, tensors, scores, sequence=False, before=dq)
        lse, delta, _ = kernels.grad_gated_query(dout, tensors, scores, gate, before=dq)
        kernels.grad_keys(dout, lse, delta, tensors, scores, prefix=True, gate=gate)


def launch_decode(dtype: torch.dtype, depth: int, feature: str, prefix: int) -> None:
    """A step of generation."""
    changes, biased, sunk, _ = FEATURES[feature]
    bias, pbias = (_meta(1, HEADS, 1, n, dtype=dtype) if biased else None for n in (LENGTH, prefix))
    k, pk = _heads(KV_HEADS, LENGTH, depth, dtype), _meta(1, KV_HEADS, prefix, depth, dtype=dtype)
    sinks = _meta(HEADS) if sunk else None
    tensors = Tensors(_heads(HEADS, 1, depth, dtype), k, k, pk, pk, bias, pbias, sinks)
    decode.forward(tensors, Scores(**{"causal": True, "scale": depth**-0.5, "start": LENGTH - 1} | changes))


def _case(dtypes, depth, feature="plain", prefix=30, bounded=True):
    def run():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = dtypes == "fp32-tf32"
        try:
            launch_all(DTYPES[dtypes], depth, feature, prefix, merge=feature == "plain")
            if feature != "dropout":
                launch_decode(DTYPES[dtypes], depth, feature, prefix)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    name = f"prefix_attention d{depth} p{prefix} {dtypes} {feature}"
    return Case(name, run, bounded, QUICK.get((dtypes, depth, feature), ()) if prefix == 30 else ())


def cases():
    for depth, feature in itertools.product((64, 128), FEATURES):
        yield _case("bf16", depth, feature)
    for depth, prefix in itertools.product((64, 128), (10, 100, 1000)):
        yield _case("bf16", depth, prefix=prefix)
    yield _case("fp16", 64)
    for dtypes, depth in itertools.product(("fp32", "fp32-tf32"), (64, 128)):
        yield _case(dtypes, depth, bounded=False)
    for depth in (16, 32, 80, 96, 256):
        yield _case("bf16", depth, bounded=depth <= 128)
