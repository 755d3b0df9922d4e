"""The tiles of the attention kernels, as data: per device family a list of rows, of which the first that fits is taken.

Every row here is predicted: chosen from what the compiler reports (registers, spills, shared memory; see `make aot`),
and measured on no GPU yet. What `fastpeft tune` measures stands in front of them (see _tiles.py). Shared memory: CUDA's
rows fit the 99 KiB of the smallest card from sm_80 on, those of sm_90 and sm_100 its 227 KiB, HIP's 64 KiB.
"""

import functools
from typing import NamedTuple

from fastpeft.kernels._common import rank_block
from fastpeft.kernels._tiles import launch_options


class AttentionTiles(NamedTuple):
    """Queries and keys of a tile; of the prefix's keys at most `prefix`, or as many as there are."""

    queries: int
    keys: int
    prefix: int = 64
    warps: int = 4
    stages: int = 2

    def blocks(self, prefix: int) -> dict:
        return {"BLOCK_M": self.queries, "BLOCK_N": self.keys, "BLOCK_P": min(self.prefix, rank_block(prefix))}

    @property
    def options(self) -> dict:
        return launch_options(self.warps, self.stages)


class Row(NamedTuple):
    """The tiles of a kernel up to a head dimension (as rounded up), in the modes of `_common.dot_mode`; for launches
    that do more for a score than a causal mask, or load rows under one (burdened), for others, or for both (None).
    above: the head dimension is more than this."""

    kernel: str
    modes: tuple[str, ...]
    depth: int
    tiles: AttentionTiles
    burdened: bool | None = None
    above: int = 0


HALF, SINGLE = ("half",), ("tf32", "ieee")
COLUMNS = ("grad_keys", "grad_prefix", "grad_bias")
KERNELS = ("forward", "decode", "grad_query", *COLUMNS)


def _each(kernels: tuple[str, ...], *rows) -> tuple[Row, ...]:
    return tuple(Row(kernel, *row) for kernel in kernels for row in rows)


CUDA = (
    Row("forward", HALF, 64, AttentionTiles(128, 64, stages=3), False),
    Row("forward", HALF, 64, AttentionTiles(64, 64), True),
    Row("forward", HALF, 128, AttentionTiles(128, 64, warps=8), False),
    Row("forward", HALF, 128, AttentionTiles(64, 64, warps=8), True),
    Row("forward", HALF, 256, AttentionTiles(64, 32, 32, warps=8)),
    Row("grad_query", HALF, 64, AttentionTiles(64, 64), False),
    Row("grad_query", HALF, 128, AttentionTiles(64, 64, warps=8)),
    Row("grad_query", HALF, 256, AttentionTiles(32, 32, 32, warps=8)),
    Row("grad_prefix", HALF, 32, AttentionTiles(32, 64)),
    Row("decode", HALF, 128, AttentionTiles(64, 64, warps=8)),
    Row("decode", HALF, 256, AttentionTiles(32, 32, 32)),
    *_each(
        COLUMNS,
        (HALF, 64, AttentionTiles(64, 64), False),
        (HALF, 64, AttentionTiles(32, 64), True),
        (HALF, 128, AttentionTiles(32, 64, warps=8)),
        (HALF, 256, AttentionTiles(32, 32, warps=8)),
    ),
    *_each(
        KERNELS, (SINGLE, 64, AttentionTiles(32, 32, 32, stages=1)), (SINGLE, 256, AttentionTiles(16, 16, 16, stages=1))
    ),
)

SM_100 = (
    Row("forward", HALF, 64, AttentionTiles(128, 64), False),
    Row("forward", HALF, 64, AttentionTiles(64, 64, warps=8), True),
    Row("grad_prefix", HALF, 64, AttentionTiles(32, 64, warps=8)),
)

HIP = (
    Row("forward", HALF, 64, AttentionTiles(128, 64), False),
    Row("forward", HALF, 64, AttentionTiles(64, 32, 32, stages=1), True),
    Row("forward", HALF, 128, AttentionTiles(64, 32, 32, stages=1), False),
    Row("grad_query", HALF, 64, AttentionTiles(64, 64), False),
    Row("decode", HALF, 128, AttentionTiles(32, 32, 32, stages=1)),
    *_each(("forward", "grad_query"), (HALF, 128, AttentionTiles(32, 32, 32, stages=1))),
    *_each(
        COLUMNS,
        (HALF, 64, AttentionTiles(32, 64, stages=1), False),
        (HALF, 128, AttentionTiles(32, 32, stages=1)),
    ),
)

SMALL = AttentionTiles(16, 16, 16, stages=1)  # so that every loop turns in small tests
INTERPRETER = _each(KERNELS, (HALF + SINGLE, 256, SMALL))

FAMILIES = {"interpreter": INTERPRETER, "hip": (*HIP, *CUDA), "sm_100": (*SM_100, *CUDA)}


# What `fastpeft tune` tries beside the predicted tiles; see _tiles.py.
_CANDIDATES = (
    Row("forward", HALF, 64, AttentionTiles(64, 64, stages=3), False, 32),
    Row("forward", HALF, 64, AttentionTiles(128, 64, warps=8), False, 32),
    Row("forward", HALF, 128, AttentionTiles(64, 64), False, 64),
    Row("forward", HALF, 128, AttentionTiles(128, 32, warps=8), False, 64),
    Row("grad_query", HALF, 64, AttentionTiles(128, 64, warps=8), False, 32),
    Row("grad_query", HALF, 128, AttentionTiles(64, 32, warps=8), False, 64),
    Row("grad_keys", HALF, 64, AttentionTiles(32, 64), False, 32),
    *_each(
        ("grad_keys", "grad_prefix"),
        (HALF, 128, AttentionTiles(64, 64, warps=8), False, 64),
        (HALF, 128, AttentionTiles(32, 64, warps=8, stages=1), False, 64),
    ),
    Row("decode", HALF, 128, AttentionTiles(16, 64), above=64),
)
_LARGE_CANDIDATES = (
    Row("forward", HALF, 64, AttentionTiles(128, 128, warps=8), False, 32),
    Row("forward", HALF, 128, AttentionTiles(128, 64, warps=8, stages=3), False, 64),
    Row("forward", HALF, 128, AttentionTiles(128, 128, warps=8), False, 64),
    Row("grad_query", HALF, 128, AttentionTiles(128, 64, warps=8), False, 64),
)
_SPILLING_ON_SM_100 = (
    Row("forward", HALF, 64, AttentionTiles(64, 64, stages=3), False, 32),
    Row("forward", HALF, 64, AttentionTiles(128, 64, warps=8), False, 32),
    Row("forward", HALF, 64, AttentionTiles(128, 128, warps=8), False, 32),
    Row("grad_query", HALF, 128, AttentionTiles(128, 64, warps=8), False, 64),
)
CANDIDATES = {
    "sm_80": _CANDIDATES,
    "sm_90": (*_CANDIDATES, *_LARGE_CANDIDATES),
    "sm_100": tuple(row for row in (*_CANDIDATES, *_LARGE_CANDIDATES) if row not in _SPILLING_ON_SM_100),
    "interpreter": (Row("decode", HALF + SINGLE, 256, AttentionTiles(16, 32, 16, stages=1)),),  # for a rehearsal
}
DEPTH_BLOCKS = (16, 32, 64, 128, 256)


def register(name: str, family: str, rows: list[Row]) -> None:
    """Makes `name` a family: these rows, and behind them those of `family`."""
    FAMILIES[name] = (*rows, *FAMILIES.get(family, CUDA))
    attention_tiles.cache_clear()


def _serves(row: Row, kernel: str, depth: int, mode: str, burdened: bool) -> bool:
    fits = row.kernel == kernel and mode in row.modes and row.above < depth <= row.depth
    return fits and row.burdened in (None, burdened)


@functools.cache
def attention_tiles(kernel: str, depth: int, mode: str, burdened: bool, family: str) -> AttentionTiles:
    """The tiles of `kernel`; a family without a list of its own, known or not, has CUDA's."""
    for row in FAMILIES.get(family, CUDA):
        if _serves(row, kernel, depth, mode, burdened):
            return row.tiles
    raise LookupError(f"no tiles for {kernel} in mode {mode} on {family}")


def candidates(kernel: str, depth: int, mode: str, burdened: bool, family: str) -> tuple[AttentionTiles, ...]:
    """What tuning tries for `kernel` at a block of head dimensions, as `_tiles.candidates`."""
    others = (row.tiles for row in CANDIDATES.get(family, ()) if _serves(row, kernel, depth, mode, burdened))
    return tuple(dict.fromkeys((attention_tiles(kernel, depth, mode, burdened, family), *others)))


def measured_row(
    kernel: str, depth: int, mode: str, burdened: bool, numbers: dict[str, int], family: str
) -> Row | None:
    """The row of tiles that were measured at a block of head dimensions, or None if they are no candidates there."""
    if kernel not in KERNELS or depth not in DEPTH_BLOCKS or mode not in HALF + SINGLE:
        return None
    tiles = AttentionTiles(**numbers)
    if tiles not in candidates(kernel, depth, mode, burdened, family):
        return None
    return Row(kernel, (mode,), depth, tiles, burdened, above=depth // 2 if depth > 16 else 0)
