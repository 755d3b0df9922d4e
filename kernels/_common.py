"""What every kernel shares: matrix products in four precisions, dropout masks, and the launch context."""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

# The interpreter holds bfloat16 as raw 16-bit integers, so its products there are wrong: widen operands first.
UPCAST = INTERPRETED

# 16-bit draws, so a dropout probability is honoured to within 2**-17; the kept values are scaled by the exact inverse
# of the probability that results, which keeps the expectation exact.
DROPOUT_LEVELS = 65536

# Random123 (Salmon et al., SC'11) reports Philox4x32 passing BigCrush from 7 rounds on; torch uses 10.
PHILOX_ROUNDS = tl.constexpr(7)


class Dropout(NamedTuple):
    """A dropout mask that is never stored: element (row, column) is a function of the seed alone."""

    seed: torch.Tensor  # int64, one element, on the device of the data
    p: float

    @property
    def threshold(self) -> int:
        return dropout_threshold(self.p)

    @property
    def keep_scale(self) -> float:
        return DROPOUT_LEVELS / (DROPOUT_LEVELS - self.threshold)


def dropout_threshold(p: float) -> int:
    """The draws below this of 65536 are dropped."""
    return min(round(p * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)


def on_device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def processor_count(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors (compute units) of the tensor's device; in the interpreter a small number, so that a
    kernel that splits its reduction over programs does so there too."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def rank_block(rank: int) -> int:
    """Tensor cores want a power of two of at least 16; the lanes beyond the rank are masked."""
    return max(16, triton.next_power_of_2(rank))


def dot_mode(data_dtype: torch.dtype, adapter_dtype: torch.dtype) -> str:
    """How `dot` multiplies the data (x, dY) with the adapter's matrices so that neither is rounded.

    half: both are the same 16-bit type. split: bf16 data, fp32 adapter, which is taken apart into a high and a low
    bf16 half (16 significant bits, error 2**-17). tf32x3: fp16 data, fp32 adapter; fp16 halves would underflow where
    gradients are small, while tf32 holds fp16 exactly and three products recover fp32. For fp32 data the product
    follows torch's own setting.
    """
    if data_dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None else "ieee"
    if data_dtype == adapter_dtype:
        return "half"
    if data_dtype == torch.bfloat16:
        return "split"
    return "ieee" if torch.version.hip is not None else "tf32x3"


def split_evenly(total: int, block: int, parts: int) -> tuple[int, int]:
    """`total` cut into at most `parts` runs of whole blocks: (length of a run, number of runs)."""
    blocks = math.ceil(total / block)
    run = max(1, math.ceil(blocks / max(1, parts)))
    return run * block, max(1, math.ceil(blocks / run))


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b, accumulated in fp32. MODE as in `dot_mode`; HALF is the 16-bit type of the data."""
    if MODE == "half":
        acc = _product(a, b, acc, UPCAST)
    elif MODE == "split":
        a_high = a.to(HALF)
        b_high = b.to(HALF)
        if a.dtype == tl.float32:
            acc = _product((a - a_high.to(tl.float32)).to(HALF), b_high, acc, UPCAST)
        if b.dtype == tl.float32:
            acc = _product(a_high, (b - b_high.to(tl.float32)).to(HALF), acc, UPCAST)
        acc = _product(a_high, b_high, acc, UPCAST)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=MODE)
    return acc


@triton.jit
def keep_mask(seed_ptr, row_start, column_start, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] booleans, True where dropout keeps. `column_start` is a multiple of 8: one Philox call, counted
    by (column // 8, row), serves eight neighbouring columns with the halves of its four words in order."""
    seed = tl.load(seed_ptr)
    rows = row_start.to(tl.int64) + tl.arange(0, ROWS)
    groups = (column_start // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zeros = tl.zeros([ROWS, COLUMNS // 8], dtype=tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        groups[None, :] + zeros,
        (rows & 0xFFFFFFFF).to(tl.uint32)[:, None] + zeros,
        (rows >> 32).to(tl.uint32)[:, None] + zeros,
        zeros,
        PHILOX_ROUNDS,
    )
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # [ROWS, COLUMNS / 8, 2, 2]
    halves = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, COLUMNS / 8, 2, 2, 2]
    return tl.reshape(halves, [ROWS, COLUMNS]) >= threshold
