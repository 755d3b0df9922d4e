"""The tiles of `mixed_lora_linear`'s kernels: those of `lora_linear`'s (`_tiles`), but where a kernel that looks up its
rows would spill in them. Predicted, as those are; what `fastpeft tune` measures is not asked, as the compile gate has
not seen these kernels in it."""

import functools

import torch

from fastpeft.kernels._tiles import ANY, HALF, SINGLE, SPLIT, TF32X3, Row, Tiles, _serves, family_of, tiles_for

OTHER_CUDA = (
    Row("shrink", HALF, 32, Tiles(64, depth=64, warps=4), above=16),
    Row("expand", SPLIT, 64, Tiles(128, 64), dropout=False),
)
OWN = {
    "sm_90": (Row("expand", SPLIT + TF32X3, ANY, Tiles(64, 128), dropout=True, above=64),),
    "sm_100": (
        Row("grad_columns", HALF, 64, Tiles(32, 64), above=32),
        Row("grad_columns", SPLIT, 64, Tiles(32, 64), above=32),
        Row("grad_columns", SPLIT, 128, Tiles(64, 64), above=16),
        Row("grad_columns", TF32X3, 64, Tiles(32, 64), above=16),
        Row("expand", SINGLE, 128, Tiles(64, 64), dropout=True),
    ),
    "hip": (),
    "interpreter": (),
}


def mixed_tiles(kernel: str, rank: int, mode: str, burden: bool, device: torch.device) -> Tiles:
    """The tiles of the kernel of this name at a greatest rank; `burden` as in `_tiles.Row`."""
    family = family_of(device)
    return _own(kernel, rank, mode, burden, family) or tiles_for(kernel, rank, mode, burden, family)


@functools.cache
def _own(kernel: str, rank: int, mode: str, burden: bool, family: str) -> Tiles | None:
    rows = OWN.get(family, OTHER_CUDA)
    return next((row.tiles for row in rows if _serves(row, kernel, rank, mode, burden)), None)
