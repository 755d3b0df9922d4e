"""The tiles of `lora_mlp`'s two kernels, in the rows of `_tiles`. Predicted, as those are, and asked by no tuning.

`gated_backward` has rows for what it holds beside the activation's gradients, at the greatest rank of the three: three
accumulators and three matrices of rank x columns. Where registers do not suffice it is launched without any of that, as
rank 0, and every rank-r product has a pass of its own (`FUSED_RANK`).
"""

import functools

from fastpeft.kernels._tiles import (
    ALL,
    ANY,
    HALF,
    SINGLE,
    SMALL,
    SPLIT,
    TF32X3,
    Row,
    Tiles,
    _serves,
)

# Beside the bytes of dh, g, u, dg and du (10·M·H in half precision) the partial sums of T, written and read, are
# 16·M·H·rank/columns: at rank 16 and 256 columns 10 %, at rank 32 and 128 columns 40 %, as much as the second reads of
# dg and du that they save; registers do not hold more columns.
CUDA = (
    Row("gated_forward", HALF, 32, Tiles(32, 64)),
    Row("gated_forward", HALF, 64, Tiles(64, 64)),
    Row("gated_forward", HALF, 128, Tiles(64, 32)),
    Row("gated_forward", HALF, ANY, Tiles(32, 64)),
    Row("gated_forward", SPLIT + TF32X3, 32, Tiles(32, 64)),
    Row("gated_forward", SPLIT + TF32X3, ANY, Tiles(32, 32)),
    Row("gated_forward", SINGLE, ANY, Tiles(16, 32, warps=4)),
    Row("gated_backward", ALL, 0, Tiles(16, 128, warps=4), above=-1),
    Row("gated_backward", HALF, 8, Tiles(32, 128), dropout=False),
    Row("gated_backward", HALF, 16, Tiles(16, 256), dropout=False),
    Row("gated_backward", HALF, 32, Tiles(16, 128), dropout=False),
    Row("gated_backward", HALF, 32, Tiles(16, 64, warps=4)),
    Row("gated_backward", SPLIT + TF32X3, 16, Tiles(16, 128), dropout=False),
    Row("gated_backward", SPLIT + TF32X3, 16, Tiles(16, 64)),
    Row("gated_backward", SPLIT, 32, Tiles(16, 64)),
    Row("gated_backward", SINGLE, 16, Tiles(16, 32, stages=2)),
)
HIP = (
    Row("gated_forward", HALF, ANY, Tiles(32, 64, warps=4, stages=2)),
    Row("gated_forward", ALL, ANY, Tiles(32, 32, warps=4, stages=2)),
    Row("gated_backward", ALL, 0, Tiles(16, 128, warps=4, stages=2), above=-1),
    Row("gated_backward", HALF, 32, Tiles(16, 64, warps=4, stages=2)),
    Row("gated_backward", SPLIT, 16, Tiles(16, 64, warps=4, stages=2)),
    Row("gated_backward", ALL, 32, Tiles(16, 32, warps=4, stages=2)),
)
# Wider where what spills on sm_80 does not.
SM_90 = (Row("gated_forward", HALF, 128, Tiles(64, 64), above=64),)
INTERPRETER = tuple(Row(kernel, ALL, ANY, SMALL, above=-1) for kernel in ("gated_forward", "gated_backward"))
# Beside that, what spills there in the tiles of the others.
SM_100 = (
    *SM_90,
    Row("gated_forward", SPLIT, 32, Tiles(32, 32)),
    Row("gated_backward", HALF, 16, Tiles(32, 128), dropout=False),
    Row("gated_backward", HALF, 32, Tiles(32, 64), dropout=True, above=16),
    Row("gated_backward", SINGLE, 16, Tiles(16, 32, warps=4, stages=2)),
)
FAMILIES = {"interpreter": INTERPRETER, "hip": HIP, "sm_90": (*SM_90, *CUDA), "sm_100": (*SM_100, *CUDA)}

# Up to this rank the backward kernel holds every rank-r product.
FUSED_RANK = {"half": 32, "split": 32, "tf32x3": 16, "tf32": 16, "ieee": 16}


@functools.cache
def mlp_tiles(kernel: str, rank: int, mode: str, burden: bool, family: str) -> Tiles:
    """The tiles of the kernel of this name at a rank, 0 if it has no rank-r products. burden: of forward dropout, of
    backward that one of the three has no LoRA there, which leaves the compiler other choices, not better ones."""
    for row in FAMILIES.get(family, CUDA):
        if _serves(row, kernel, rank, mode, burden):
            return row.tiles
    raise LookupError(f"no tiles for {kernel} in mode {mode}")
