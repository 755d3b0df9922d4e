"""The tiles of the attention kernels, as data: per device family a list of rows, of which the first that fits is taken.

Every row is predicted: chosen from what the compiler reports (registers, spills, shared memory; see `make aot`), and
measured on no GPU yet. Shared memory: CUDA's rows fit the 99 KiB of the smallest card from sm_80 on, those of sm_90 and
sm_100 its 227 KiB, HIP's 64 KiB.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from fastpeft.kernels._common import rank_block


@dataclass(frozen=True)
class AttentionTiles:
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
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class Row(NamedTuple):
    """The tiles of a kernel up to a head dimension (as rounded up), in the modes of `_common.dot_mode`; for launches
    that do more for a score than a causal mask, or load rows under one (burdened), for others, or for both (None)."""

    kernel: str
    modes: tuple[str, ...]
    depth: int
    tiles: AttentionTiles
    burdened: bool | None = None


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


@functools.cache
def attention_tiles(kernel: str, depth: int, mode: str, burdened: bool, family: str) -> AttentionTiles:
    """The tiles of `kernel`; a family without a list of its own, known or not, has CUDA's."""
    for row in FAMILIES.get(family, CUDA):
        if row.kernel == kernel and mode in row.modes and depth <= row.depth and row.burdened in (None, burdened):
            return row.tiles
    raise LookupError(f"no tiles for {kernel} in mode {mode} on {family}")
