"""What several programs have a share of: fp32 partial sums, which one more launch adds up, always in the same order and
with one rounding, never atomics. Where that spares the launch, a single program writes its result itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels._common import UPCAST, cdiv, launch

FEW, MOST = 3, 6  # sums of one launch: Triton looks at each argument, so that few have a kernel with fewer
WAITING = 8 << 20  # bytes of shares that may wait for those of other outputs, so that one launch adds up all
BLOCK = 256 if UPCAST else 1024
_ARGUMENTS = [0, *[FEW] * FEW, *[MOST] * (MOST - FEW)]  # of each kind that a launch of so many sums has
# In the place of those that it has no sums for.
_REST = [((None,) * (places - number), (0,) * (places - number)) for number, places in enumerate(_ARGUMENTS)]


# (parts, out, scale, count, size): out, of `size` numbers, is scale·Σ parts over their first dimension, of `count`, in
# fp32, rounded once.
Sum = tuple[Tensor, Tensor, float, int, int]


@triton.jit
def _sum_block(parts_ptr, out_ptr, scale, parts, size, BLOCK: tl.constexpr):
    """One program sums BLOCK places over all parts, always in the same order, and scales and rounds once."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    p_part = parts_ptr + places
    for _ in range(parts):
        acc += tl.load(p_part, mask=places < size, other=0.0)
        p_part += size
    tl.store(out_ptr + places, acc * scale, mask=places < size)


@triton.jit(do_not_specialize=["count_0", "count_1", "count_2"])
def _sum_partials_kernel(
    parts_0, parts_1, parts_2, out_0, out_1, out_2, scale_0, scale_1, scale_2, count_0, count_1, count_2,
    size_0, size_1, size_2, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of COUNT sums, each of its own number of parts and size, the one that the second place in the grid says."""
    number = tl.program_id(1)
    if number == 0:
        _sum_block(parts_0, out_0, scale_0, count_0, size_0, BLOCK)
    if COUNT > 1:
        if number == 1:
            _sum_block(parts_1, out_1, scale_1, count_1, size_1, BLOCK)
    if COUNT > 2:
        if number == 2:
            _sum_block(parts_2, out_2, scale_2, count_2, size_2, BLOCK)


@triton.jit(do_not_specialize=["count_0", "count_1", "count_2", "count_3", "count_4", "count_5"])
def _sum_many_partials_kernel(
    parts_0, parts_1, parts_2, parts_3, parts_4, parts_5, out_0, out_1, out_2, out_3, out_4, out_5,
    scale_0, scale_1, scale_2, scale_3, scale_4, scale_5, count_0, count_1, count_2, count_3, count_4, count_5,
    size_0, size_1, size_2, size_3, size_4, size_5, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of four to six."""
    number = tl.program_id(1)
    if number == 0:
        _sum_block(parts_0, out_0, scale_0, count_0, size_0, BLOCK)
    if number == 1:
        _sum_block(parts_1, out_1, scale_1, count_1, size_1, BLOCK)
    if number == 2:
        _sum_block(parts_2, out_2, scale_2, count_2, size_2, BLOCK)
    if number == 3:
        _sum_block(parts_3, out_3, scale_3, count_3, size_3, BLOCK)
    if COUNT > 4:
        if number == 4:
            _sum_block(parts_4, out_4, scale_4, count_4, size_4, BLOCK)
    if COUNT > 5:
        if number == 5:
            _sum_block(parts_5, out_5, scale_5, count_5, size_5, BLOCK)


def shares(
    runs: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float, sums: list[Sum]
) -> tuple[Tensor, Tensor]:
    """(a result, what `runs` programs write their shares into: fp32 [runs, *shape]): `sums` learns of both, and the
    result is there when these are added up."""
    out = torch.empty(shape, dtype=dtype, device=device)
    parts = torch.empty((runs, *shape), dtype=torch.float32, device=device)
    sums.append((parts, out, scale, runs, out.numel()))
    return out, parts


def shares_or_whole(
    runs: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float, sums: list[Sum]
) -> tuple[Tensor, Tensor]:
    """The same, but a single program, which then scales and rounds, writes the result itself: that costs no launch."""
    if runs > 1:
        return shares(runs, shape, dtype, device, scale, sums)
    out = torch.empty(shape, dtype=dtype, device=device)
    return out, out


def add_up(sums: list[Sum], beyond: int = 0) -> None:
    """All of them, MOST in a launch, after which the list is empty; or none, while their shares take no more than
    `beyond` bytes."""
    if beyond and sum([each[0].nbytes for each in sums]) <= beyond:
        return
    while sums:
        parts, outs, scales, counts, sizes = zip(*sums[:MOST], strict=True)
        number = len(sizes)
        nothing, zeros = _REST[number]
        kernel = _sum_partials_kernel if number <= FEW else _sum_many_partials_kernel
        launch(
            kernel, (cdiv(max(sizes), BLOCK), number), outs[0],
            *parts, *nothing, *outs, *nothing, *scales, *zeros, *counts, *zeros, *sizes, *zeros,
            COUNT=number, BLOCK=BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
        del sums[:MOST]
