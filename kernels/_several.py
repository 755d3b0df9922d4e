"""What a launch for several adapters on one input is made of (`lora_projections`): arguments for as many as a kernel
takes, the place of each result in one buffer, and tiles: those of `lora_linear`'s kernels (`_tiles`) with less in
registers and in shared memory. Predicted, as those are."""

from collections.abc import Sequence

import torch

from fastpeft.kernels._common import Dropout, next_power_of_2, rank_block
from fastpeft.kernels._tiles import SINGLE, Tiles, tiles_for

MOST = 4  # adapters of one launch
MOST_RANKS = 256  # of an adapter, which registers hold
_PADDING = {rest: [[rest] * (MOST - count) for count in range(MOST + 1)] for rest in (None, 0, 1.0)}


def four(values: list, rest) -> list:
    """The values, and `rest`, which is None, 0 or 1.0, in the place of what is missing."""
    return [*values, *_PADDING[rest][len(values)]]


def whole(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each contiguous."""
    return [each if each.is_contiguous() else each.contiguous() for each in matrices]


_NO_MASKS = [None] * MOST, [1.0] * MOST, [0] * MOST, 0


def mask_arguments(dropouts: list[Dropout | None]) -> tuple[list, list, list, int]:
    """(seeds, keep_scales, thresholds, DROPS) of a launch."""
    if not any(dropouts):
        return _NO_MASKS
    seeds = four([None if each is None else each.seed for each in dropouts], None)
    scales = four([1.0 if each is None else each.keep_scale for each in dropouts], 1.0)
    thresholds = four([0 if each is None else each.threshold for each in dropouts], 0)
    return seeds, scales, thresholds, sum(1 << p for p, each in enumerate(dropouts) if each is not None)


def places_of(length: int, ranks: list[int], by_rank: bool) -> tuple[tuple[int, ...], list[tuple] | None]:
    """(The shape of a buffer for a matrix of each rank, one behind the other, and where the ranks differ their places
    in it: shape, strides and start.) A matrix is [rank, length] with `by_rank`, or else [length, rank]."""
    if min(ranks) == max(ranks):
        return (len(ranks), ranks[0], length) if by_rank else (len(ranks), length, ranks[0]), None
    places, start = [], 0
    for rank in ranks:
        places.append(((rank, length), (length, 1), start) if by_rank else ((length, rank), (rank, 1), start))
        start += rank * length
    return (start,), places


def matrices_of(whole: torch.Tensor, places: list[tuple] | None) -> list[torch.Tensor]:
    """Those of a buffer with these `places_of` it."""
    if places is None:
        return list(whole.unbind())
    first = whole.storage_offset()
    return [whole.as_strided(shape, strides, first + start) for shape, strides, start in places]


def block_and_rank(ranks: Sequence[int]) -> tuple[int, int]:
    """(BLOCK_R, the rank of one adapter that would need as many registers)."""
    block = rank_block(max(ranks))
    return block, block * next_power_of_2(len(ranks))


def several_tiles(kernel: str, rank: int, mode: str, burden: bool, drops: bool, table: str, family: str) -> Tiles:
    """Those of one adapter of that rank by the device's `table`, as its `family` has them for several."""
    return _made_for_several(tiles_for(kernel, rank, mode, burden, table), kernel, rank, mode, drops, family)


def _made_for_several(tiles: Tiles, kernel: str, rank: int, mode: str, drops: bool, family: str) -> Tiles:
    """With less in registers where several masks, or several parts of a product, are there at once, and fewer stages
    where several wide A are in shared memory."""
    rows, columns, depth, stages = tiles.rows, tiles.columns, tiles.depth, tiles.stages
    wide, spills = rank > MOST_RANKS, family == "sm_100"  # spills: a few bytes, in the tiles of the others
    if kernel == "shrink":
        shallow = spills or rank == MOST_RANKS or (wide and family != "sm_90")
        rows, stages = min(64, rows // (4 if wide else 2) if drops else rows), min(stages, 2) if wide else stages
        depth = min(depth, 32) if drops and shallow else depth
    elif kernel == "grad_columns":
        halved = drops or mode == "split"
        rows = rows // 2 if halved else rows
        columns = min(columns, 64) if wide and (halved or not spills) else columns
        if spills and halved:
            columns, stages = (min(columns, 32), stages) if mode == "split" else (min(columns, 64), min(stages, 2))
    elif kernel == "expand" and drops:
        rows = min(64, rows // 2 if mode in SINGLE else rows)
    return tiles._replace(rows=max(16, rows), columns=columns, depth=depth, stages=stages)
