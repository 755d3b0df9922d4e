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
    """The tiles of a kernel up to a head dimension (as rounded up), in the modes of `_common.dot_mode`."""

    kernel: str
    modes: tuple[str, ...]
    depth: int
    tiles: AttentionTiles


HALF, SINGLE = ("half",), ("tf32", "ieee")
KERNELS = ("forward", "grad_query", "grad_keys", "grad_prefix", "grad_bias")

CUDA = (
    Row("forward", HALF, 64, AttentionTiles(128, 64, stages=3)),
    Row("forward", HALF, 128, AttentionTiles(128, 64, warps=8)),
    Row("forward", HALF, 256, AttentionTiles(64, 32, 32, warps=4)),
    Row("grad_query", HALF, 64, AttentionTiles(64, 64)),
    Row("grad_query", HALF, 128, AttentionTiles(64, 64, warps=8)),
    Row("grad_query", HALF, 256, AttentionTiles(32, 32, 32, warps=8)),
    *(
        row
        for kernel in ("grad_keys", "grad_prefix", "grad_bias")
        for row in (
            Row(kernel, HALF, 64, AttentionTiles(64, 64)),
            Row(kernel, HALF, 128, AttentionTiles(32, 64, warps=8)),
            Row(kernel, HALF, 256, AttentionTiles(32, 32, warps=8)),
        )
    ),
    *(Row(kernel, SINGLE, 256, AttentionTiles(32, 32, 32, warps=4, stages=1)) for kernel in KERNELS),
)

SM_100 = (Row("forward", HALF, 64, AttentionTiles(128, 64)),)

HIP = (
    Row("forward", HALF, 64, AttentionTiles(128, 64)),
    Row("forward", HALF, 128, AttentionTiles(64, 32, 32, stages=1)),
    Row("grad_query", HALF, 64, AttentionTiles(64, 64)),
    Row("grad_query", HALF, 128, AttentionTiles(32, 32, 32, stages=1)),
    *(
        row
        for kernel in ("grad_keys", "grad_prefix", "grad_bias")
        for row in (
            Row(kernel, HALF, 64, AttentionTiles(32, 64, stages=1)),
            Row(kernel, HALF, 128, AttentionTiles(32, 32, stages=1)),
        )
    ),
)

SMALL = AttentionTiles(16, 16, 16, stages=1)  # so that every loop turns in small tests
INTERPRETER = tuple(Row(kernel, HALF + SINGLE, 256, SMALL) for kernel in KERNELS)

FAMILIES = {"interpreter": INTERPRETER, "hip": (*HIP, *CUDA), "sm_100": (*SM_100, *CUDA)}


@functools.cache
def attention_tiles(kernel: str, depth: int, mode: str, family: str) -> AttentionTiles:
    """The tiles of `kernel`; a family without a list of its own, known or not, has CUDA's."""
    for row in FAMILIES.get(family, CUDA):
        if row.kernel == kernel and mode in row.modes and depth <= row.depth:
            return row.tiles
    raise LookupError(f"no tiles for {kernel} in mode {mode} on {family}")
