"""Launches that the compile gate must refuse, each for one reason: `python tests/aot_planted.py --quick` fails.

Called like tests/aot.py, whose `main` runs on these cases instead of those that ship.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fastpeft.kernels import lora_linear  # noqa: E402
from fastpeft.kernels._tiles import Tiles  # noqa: E402
from tests import aot  # noqa: E402


@triton.jit
def _row_times_stride(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + row * stride + columns))


@triton.jit
def _carried_by_a_loop(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    for _ in range(size):
        tl.store(out_ptr + offsets, tl.load(x_ptr + offsets))
        offsets += BLOCK * stride


@triton.jit
def _chosen_by_a_branch(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    if size > BLOCK:
        row = row * stride
    tl.store(out_ptr + columns, tl.load(x_ptr + row + columns))


@triton.jit
def _one_long_row(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + places, tl.load(x_ptr + places, mask=places < size), mask=places < size)


@triton.jit
def _in_64_bits(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    """The same addresses, well computed: nothing to refuse."""
    row, columns = (tl.program_id(0) // tl.cdiv(size, BLOCK)).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + row * stride + columns))


@triton.jit
def _float64(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.sqrt(tl.load(x_ptr + columns).to(tl.float64)))


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _elementwise(kernel, **options):
    return lambda: kernel[(1,)](_meta(4096), _meta(4096), 640, 4096, BLOCK=64, **options)


def _shrink(tiles):
    a = _meta(128, 4096, dtype=torch.float32)
    return lambda: lora_linear.shrink(_meta(32768, 4096), a, 1.0, torch.float32, tiles=tiles)  # by one launch


def _tail(tiles):
    base = (_meta(8192, 4096), _meta(4096, 4096))
    return lambda: lora_linear.tail(_meta(8192, 16), _meta(4096, 16), torch.bfloat16, base=base, tiles=tiles)


FUSION = {"enable_fp_fusion": True}
CASES = {
    "row times stride": _elementwise(_row_times_stride, **FUSION),
    "carried by a loop": _elementwise(_carried_by_a_loop, **FUSION),
    "chosen by a branch": _elementwise(_chosen_by_a_branch, **FUSION),
    "one long row": _elementwise(_one_long_row, **FUSION),
    "in 64 bits": _elementwise(_in_64_bits, **FUSION),
    "float64": _elementwise(_float64, **FUSION),
    "fusion not stated": _elementwise(_in_64_bits),
    "spills": _shrink(Tiles(128, depth=64, warps=4, stages=2)),
    "shared memory": _tail(Tiles(128, 128, depth=256, warps=8, stages=2)),
}

if __name__ == "__main__":
    both = {name: ("sm_90", "gfx942") for name in ("row times stride", "in 64 bits", "float64", "shared memory")}
    aot.all_cases = lambda ops: [aot.Case(name, run, quick=both.get(name, ("sm_90",))) for name, run in CASES.items()]
    sys.exit(aot.main())
