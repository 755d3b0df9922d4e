"""What every kernel shares: matrix products in four precisions, dropout masks, and the launch context."""

import contextlib
import functools
from collections.abc import Callable
from contextvars import ContextVar
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


_ANYWHERE = contextlib.nullcontext()


def on_device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _ANYWHERE
    return torch.cuda.device(tensor.device)


_watch: ContextVar[Callable | None] = ContextVar("fastpeft_launches", default=None)


@contextlib.contextmanager
def watched_launches(watch: Callable):
    """Within it, in this thread, watch(kernel, grid, on, arguments, options) is called in the place of every launch."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def launch(kernel, grid: tuple[int, ...], on: torch.Tensor, /, *arguments, **options) -> None:
    """kernel[grid](*arguments, **options) on the device of the tensor `on`."""
    if (watch := _watch.get()) is not None:
        watch(kernel, grid, on, arguments, options)
        return
    with on_device_of(on):
        kernel[grid](*arguments, **options)


def processor_count(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors (compute units) of the tensor's device; in the interpreter a small number, so that a
    kernel that splits its reduction over programs does so there too."""
    return _processors(tensor.device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# Triton's own, called outside of a kernel, take two microseconds each.
def cdiv(count: int, size: int) -> int:
    """⌈count / size⌉."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


def rank_block(rank: int) -> int:
    """Tensor cores want a power of two of at least 16; the lanes beyond the rank are masked."""
    return max(16, 1 << (rank - 1).bit_length())


def as_matrix(x: torch.Tensor) -> tuple[int, int, int, int]:
    """(rows, columns, the step from a row to the next, from a column to the next) of x [M, K], or of a contiguous x
    (..., K), which is that matrix without a view of it: one takes as long as a launch's other preparations."""
    if x.ndim == 2:
        return *x.shape, *x.stride()
    columns = x.shape[-1]
    return x.numel() // columns, columns, columns, 1


def allows_tf32() -> bool:
    """Whether torch's own fp32 products on the GPU may be tf32's: its `allow_tf32`, by a name that answers in a sixth
    of the time. torch refuses to where it was told by its third name for it."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def dot_mode(data_dtype: torch.dtype, adapter_dtype: torch.dtype) -> str:
    """How `dot` multiplies the data (x, dY) with the adapter's matrices so that neither is rounded.

    half: both are the same 16-bit type. split: bf16 data, fp32 adapter, which is taken apart into three bf16 parts (all
    of its 24 bits), or into two where both factors are fp32 and the result will be bf16 (16 bits). tf32x3: fp16 data,
    fp32 adapter; fp16 halves would underflow where gradients are small, while tf32 holds fp16 exactly, so that only the
    adapter is taken apart: two products, or three where both factors are fp32, recover it (error 2**-21). For fp32 data
    the product follows torch's own setting.
    """
    if data_dtype is torch.float32:
        return "tf32" if allows_tf32() and torch.version.hip is None else "ieee"
    if data_dtype is adapter_dtype:
        return "half"
    if data_dtype is torch.bfloat16:
        return "split"
    return "ieee" if torch.version.hip is not None else "tf32x3"


def split_evenly(total: int, block: int, parts: int) -> tuple[int, int]:
    """`total` cut into at most `parts` runs of whole blocks: (length of a run, number of runs)."""
    if parts <= 1:
        return max(1, -(-total // block)) * block, 1
    blocks = -(-total // block)
    run = -(-blocks // parts) or 1
    return run * block, -(-blocks // run) or 1


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _high(x, MODE: tl.constexpr, HALF: tl.constexpr):
    """x as far as a tensor core multiplies it exactly: rounded to 16 bits, or cut to the 10 mantissa bits of tf32."""
    if MODE == "split":
        return x.to(HALF)
    elif x.dtype == tl.float32:
        return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b, accumulated in fp32. MODE as in `dot_mode`; HALF is the 16-bit type of the data."""
    if MODE == "half":
        acc = _product(a, b, acc, UPCAST)
    elif MODE == "split" or MODE == "tf32x3":
        a_high = _high(a, MODE, HALF)
        b_high = _high(b, MODE, HALF)
        if a.dtype == tl.float32:
            a_rest = a - a_high.to(tl.float32)
            a_middle = a_rest.to(a_high.dtype)
            if b.dtype != tl.float32 and MODE == "split":
                acc = _product((a_rest - a_middle.to(tl.float32)).to(a_high.dtype), b_high, acc, UPCAST)
            acc = _product(a_middle, b_high, acc, UPCAST)
        if b.dtype == tl.float32:
            b_rest = b - b_high.to(tl.float32)
            b_middle = b_rest.to(b_high.dtype)
            if a.dtype != tl.float32 and MODE == "split":
                acc = _product(a_high, (b_rest - b_middle.to(tl.float32)).to(b_high.dtype), acc, UPCAST)
            acc = _product(a_high, b_middle, acc, UPCAST)
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
