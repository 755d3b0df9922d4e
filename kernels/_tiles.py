"""Which tiles a kernel runs with, as data: per device family a list of rows, of which the first that fits is taken.

Every row here is predicted: chosen from what the compiler reports (registers, spills, shared memory, copies in flight;
see `make aot`) and from the bytes that each tile makes a kernel move, and measured on no GPU yet. What `fastpeft tune`
measures on a device stands in front of these rows, as a family of the device's own (`register`, `adopt`).

The rules behind the numbers. Shared memory: CUDA's rows fit the 99 KiB of the smallest card from sm_80 on, those of
sm_90 and sm_100 its 227 KiB, HIP's 64 KiB. Operands that are read again by every program (A by `shrink`, T by
`grad_columns`) come from L2 in proportion to rank / tile, so wide ranks want wide tiles. Copies in flight: 24 KiB a
processor and more, which is an H100's bandwidth times its latency (25 bytes/ns, about 0.7 µs).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret


class Tiles(NamedTuple):
    """Rows and columns of a program's tile, the depth of its inner step, and the ranks it takes at once where it takes
    them in turn."""

    rows: int
    columns: int = 0
    depth: int = 0
    ranks: int = 16
    warps: int = 8
    stages: int = 3

    @property
    def options(self) -> dict:
        """For the launch. Fusion of a product and a sum is asked for, as Triton's own default changes with versions."""
        return launch_options(self.warps, self.stages)


@functools.cache
def launch_options(warps: int, stages: int) -> dict:
    """Not to be changed."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


class Row(NamedTuple):
    """The tiles of a kernel up to a rank, in the modes of `_common.dot_mode`. dropout: for launches with a mask, or
    with another burden on the registers, for those without, or None for both. above: the rank is more than this."""

    kernel: str
    modes: tuple[str, ...]
    rank: int
    tiles: Tiles
    dropout: bool | None = None
    above: int = 0


ANY = 1 << 30
HALF, SPLIT, TF32X3, SINGLE = ("half",), ("split",), ("tf32x3",), ("tf32", "ieee")  # SINGLE: the data are fp32
SIXTEEN = HALF + SPLIT + TF32X3
ALL = SIXTEEN + SINGLE

CUDA = (
    Row("shrink", HALF, 32, Tiles(64, depth=128, warps=4)),
    Row("shrink", HALF, 128, Tiles(128, depth=64)),
    Row("shrink", HALF, ANY, Tiles(64, depth=64, stages=2)),
    Row("shrink", SPLIT, 16, Tiles(64, depth=128, warps=4)),
    Row("shrink", SPLIT, 32, Tiles(128, depth=64)),
    Row("shrink", SPLIT, 64, Tiles(128, depth=32, stages=4)),
    Row("shrink", SPLIT, 128, Tiles(64, depth=32, stages=4)),
    Row("shrink", TF32X3, 32, Tiles(64, depth=64, warps=4)),
    Row("shrink", TF32X3, 64, Tiles(128, depth=32)),
    Row("shrink", SPLIT + TF32X3, ANY, Tiles(64, depth=32)),
    Row("shrink", SINGLE, ANY, Tiles(32, depth=32, warps=4)),
    Row("tail", HALF, ANY, Tiles(128, 128, depth=64, ranks=32)),
    Row("tail", SPLIT + TF32X3, ANY, Tiles(128, 128, depth=64)),
    Row("tail", SINGLE, ANY, Tiles(64, 128, depth=32)),
    Row("expand", HALF, 64, Tiles(64, 128, ranks=32)),
    Row("expand", HALF, ANY, Tiles(128, 128, ranks=32)),
    Row("expand", SPLIT + TF32X3, 64, Tiles(64, 128)),
    Row("expand", SPLIT + TF32X3, ANY, Tiles(128, 128)),
    Row("expand", SINGLE, ANY, Tiles(64, 128)),
    # Partial sums beside the bytes of dY, written and read: 4·rank·(1/columns + runs/M), where the runs of rows are
    # processors/(N/columns). With 512 columns, M = 8192 and 132 processors: rank 8 12 % at N = 4096, 8 % at 14336; rank
    # 16 25 % and 16 %. A second read of dY would be 100 %.
    Row("grad_b_and_t", HALF, 16, Tiles(32, 512)),
    Row("grad_b_and_t", HALF, 32, Tiles(16, 512)),
    Row("grad_b_and_t", HALF, 64, Tiles(32, 256)),
    Row("grad_b_and_t", HALF, ANY, Tiles(32, 128)),
    Row("grad_b_and_t", SPLIT, 16, Tiles(16, 512)),
    Row("grad_b_and_t", SPLIT, 32, Tiles(16, 256, stages=4)),
    Row("grad_b_and_t", SPLIT, 64, Tiles(32, 128)),
    Row("grad_b_and_t", TF32X3, 16, Tiles(16, 256)),
    Row("grad_b_and_t", TF32X3, 64, Tiles(16, 128)),
    Row("grad_b_and_t", SPLIT + TF32X3, ANY, Tiles(16, 64, stages=2)),
    Row("grad_b_and_t", SINGLE, 64, Tiles(16, 64)),
    Row("grad_b_and_t", SINGLE, ANY, Tiles(16, 32, stages=2)),
    Row("grad_columns", HALF, 16, Tiles(32, 128, warps=4)),
    Row("grad_columns", HALF, 64, Tiles(32, 128, stages=4)),
    Row("grad_columns", HALF, 128, Tiles(64, 128)),
    Row("grad_columns", HALF, ANY, Tiles(32, 128)),
    Row("grad_columns", SPLIT, 32, Tiles(32, 128)),
    Row("grad_columns", SPLIT, 64, Tiles(16, 128)),
    Row("grad_columns", SPLIT, 128, Tiles(32, 128)),
    Row("grad_columns", TF32X3, 32, Tiles(16, 128)),
    Row("grad_columns", TF32X3, 64, Tiles(32, 128)),
    Row("grad_columns", TF32X3, 128, Tiles(16, 128)),
    Row("grad_columns", SPLIT + TF32X3, ANY, Tiles(16, 64, stages=2)),
    Row("grad_columns", SINGLE, 16, Tiles(16, 128)),
    Row("grad_columns", SINGLE, 32, Tiles(16, 64)),
    Row("grad_columns", SINGLE, ANY, Tiles(16, 32)),
)

# For more shared memory. Beside dropout's mask, or an fp32 result, a tile of 128 x 256 would leave no register.
LARGE = (
    Row("tail", HALF, ANY, Tiles(128, 256, depth=64, ranks=32), dropout=False),
    Row("tail", SPLIT + TF32X3, ANY, Tiles(128, 256, depth=64), dropout=False),
    Row("tail", HALF, ANY, Tiles(128, 128, depth=64, ranks=32, stages=4)),
    Row("tail", SPLIT + TF32X3, ANY, Tiles(128, 128, depth=64, stages=4)),
    Row("persistent", HALF, ANY, Tiles(128, 256, depth=64, ranks=32), dropout=False),
    Row("persistent", SPLIT + TF32X3, ANY, Tiles(128, 256, depth=64), dropout=False),
    Row("persistent", HALF, ANY, Tiles(128, 128, depth=64, ranks=32, stages=4)),
    Row("persistent", SPLIT + TF32X3, ANY, Tiles(128, 128, depth=64, stages=4)),
    Row("grad_b_and_t", SPLIT, 32, Tiles(16, 512)),
    Row("grad_columns", SPLIT, 128, Tiles(32, 128)),
    Row("tail", SINGLE, ANY, Tiles(128, 128, depth=32)),
    Row("grad_b_and_t", SINGLE, 64, Tiles(16, 128)),
    *CUDA,
)

# What spills a few bytes there in the tiles of the others.
SM_100 = (
    Row("shrink", HALF, 16, Tiles(64, depth=128, warps=4)),
    Row("shrink", HALF, 128, Tiles(64, depth=64)),
    Row("shrink", TF32X3, 32, Tiles(64, depth=32, warps=4)),
    Row("grad_b_and_t", TF32X3, 16, Tiles(16, 128)),
    Row("grad_columns", SPLIT, 16, Tiles(16, 128), dropout=False),
    Row("tail", SINGLE, ANY, Tiles(64, 128, depth=32)),
)

HIP = (
    Row("shrink", HALF, 32, Tiles(64, depth=128, warps=4, stages=2)),
    Row("shrink", SIXTEEN, 128, Tiles(64, depth=64, warps=4, stages=2)),
    Row("shrink", SIXTEEN, ANY, Tiles(64, depth=32, warps=4, stages=2)),
    Row("shrink", SINGLE, 64, Tiles(64, depth=64, warps=4, stages=2)),
    Row("shrink", SINGLE, ANY, Tiles(64, depth=32, warps=4, stages=2)),
    Row("tail", HALF, ANY, Tiles(128, 128, depth=64, ranks=32, stages=2)),
    Row("tail", SIXTEEN, ANY, Tiles(128, 128, depth=64, stages=2)),
    Row("tail", SINGLE, ANY, Tiles(128, 128, depth=32, stages=2)),
    Row("expand", ALL, ANY, Tiles(64, 128, warps=4, stages=2)),
    Row("grad_b_and_t", HALF, 32, Tiles(16, 256, warps=4, stages=2)),
    Row("grad_b_and_t", SPLIT, 16, Tiles(16, 256, warps=4, stages=2)),
    Row("grad_b_and_t", ALL, 64, Tiles(16, 128, warps=4, stages=2)),
    Row("grad_b_and_t", ALL, ANY, Tiles(16, 32, warps=4, stages=2)),
    Row("grad_columns", ALL, 64, Tiles(32, 128, warps=4, stages=2)),
    Row("grad_columns", ALL, 128, Tiles(32, 128, warps=4, stages=2)),
    Row("grad_columns", ALL, ANY, Tiles(16, 64, warps=4, stages=2)),
)

SMALL = Tiles(16, 32, depth=32, warps=4, stages=1)  # so that every loop turns in small tests
KERNELS = ("shrink", "tail", "expand", "grad_b_and_t", "grad_columns")
OPTIONAL = ("persistent",)  # on devices that copy tiles by descriptors
INTERPRETER = tuple(Row(kernel, ALL, ANY, SMALL) for kernel in (*KERNELS, *OPTIONAL))

FAMILIES = {"interpreter": INTERPRETER, "hip": HIP, "sm_90": LARGE, "sm_100": (*SM_100, *LARGE)}

# What `fastpeft tune` tries beside the predicted tiles, at two blocks of ranks: what the compile gate compiles
# (tests/ops/aot_tiles.py) stands here, and a table may ask for nothing else.
_CANDIDATES = (
    Row("shrink", HALF, 16, Tiles(64, depth=64, warps=4, stages=4)),
    Row("shrink", HALF, 16, Tiles(128, depth=64)),
    Row("shrink", SPLIT, 16, Tiles(64, depth=64, warps=4, stages=4)),
    Row("shrink", SPLIT, 16, Tiles(128, depth=32, stages=4)),
    Row("expand", HALF, 16, Tiles(128, 128, ranks=32)),
    Row("expand", HALF, 16, Tiles(32, 256, ranks=32)),
    Row("expand", SPLIT, 16, Tiles(32, 128, warps=4)),
    Row("grad_b_and_t", HALF, 16, Tiles(64, 256)),
    Row("grad_b_and_t", HALF, 16, Tiles(16, 512)),
    Row("grad_b_and_t", SPLIT, 16, Tiles(16, 256)),
    Row("grad_columns", HALF, 16, Tiles(64, 128)),
    Row("grad_columns", HALF, 16, Tiles(32, 64, warps=4)),
    Row("grad_columns", SPLIT, 16, Tiles(32, 64, warps=4)),
    Row("shrink", HALF, 64, Tiles(64, depth=64), above=32),
    Row("shrink", SPLIT, 64, Tiles(64, depth=32, warps=4, stages=4), above=32),
    Row("expand", HALF, 64, Tiles(128, 128, ranks=32), above=32),
    Row("grad_b_and_t", HALF, 64, Tiles(32, 128), above=32),
    Row("grad_b_and_t", SPLIT, 64, Tiles(16, 128, stages=4), above=32),
    Row("grad_columns", HALF, 64, Tiles(64, 64, warps=4), above=32),
    Row("grad_columns", SPLIT, 64, Tiles(16, 64, warps=4), above=32),
)
_LARGE_CANDIDATES = (
    Row("tail", HALF, 16, Tiles(128, 128, depth=64, ranks=32)),
    Row("tail", HALF, 16, Tiles(128, 256, depth=64, ranks=32, stages=4), dropout=False),
    Row("persistent", HALF, 16, Tiles(128, 128, depth=64, ranks=32, stages=4), dropout=False),
    Row("persistent", HALF, 16, Tiles(128, 256, depth=64, ranks=32, stages=4), dropout=False),
    Row("persistent", HALF, 16, Tiles(256, 128, depth=64, ranks=32), dropout=False),
)
_SPILLING_ON_SM_100 = (
    Row("shrink", HALF, 16, Tiles(128, depth=64)),
    Row("shrink", SPLIT, 64, Tiles(64, depth=32, warps=4, stages=4), above=32),
    Row("grad_columns", SPLIT, 16, Tiles(32, 64, warps=4)),
)
CANDIDATES = {
    "sm_80": _CANDIDATES,
    "sm_90": (*_CANDIDATES, *_LARGE_CANDIDATES),
    "sm_100": tuple(row for row in (*_CANDIDATES, *_LARGE_CANDIDATES) if row not in _SPILLING_ON_SM_100),
    "interpreter": (Row("shrink", ALL, ANY, Tiles(32, depth=32, warps=4, stages=1)),),  # for a rehearsal
}
RANK_BLOCKS = (16, 32, 64, 128, 256)

# Up to this rank the pass over x that makes dA holds the rank-r term of dX as well; beyond, registers do not suffice
# for both and the term has a kernel of its own, which reads nothing of x.
FUSED_TAIL_RANK = {"half": 64, "split": 32, "tf32x3": 32, "tf32": 32, "ieee": 32}


@functools.cache
def family_of(device: torch.device) -> str:
    """The device's family: "interpreter", "hip", or CUDA's capability as "sm_90"."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


_own: dict[torch.device, str] = {}


def table_of(device: torch.device) -> str:
    """The family whose rows serve the device: its own measured one, or `family_of` it."""
    return _own.get(device) or family_of(device)


def adopt(device: torch.device, name: str | None) -> None:
    """From now on the device's launches take the tiles of the family `name`; None: those of `family_of` again."""
    if name is None:
        _own.pop(device, None)
    else:
        _own[device] = name
    forget()


PREPARED = 256  # launches of one kind that are kept, those of the last sizes: a kilobyte each
_forgetting: list[Callable[[], None]] = []


def by_tiles(prepare: Callable) -> Callable:
    """Keeps what `prepare` gives for its last arguments, as long as tables are what they were: what hangs on sizes and
    tables alone is worked out once, which takes longer than to find it again. Not to be changed. A module's constants
    count as fixed: whoever puts another in their place, or in that of a function, has this `forget`."""
    prepared = functools.lru_cache(PREPARED)(prepare)
    also_forget(prepared.cache_clear)
    return prepared


def also_forget(clear: Callable[[], None]) -> None:
    """`forget` calls this too."""
    _forgetting.append(clear)


def forget() -> None:
    """What was worked out by tables that have changed."""
    for clear in _forgetting:
        clear()


def register(name: str, family: str, rows: list[Row]) -> None:
    """Makes `name` a family: these rows, and behind them those of `family`."""
    FAMILIES[name] = (*rows, *FAMILIES.get(family, CUDA))
    forget()


def tiles_for(kernel: str, rank: int, mode: str, dropout: bool, family: str) -> Tiles:
    """The tiles of `kernel`; a family without a list of its own, known or not, has CUDA's."""
    tiles = optional_tiles(kernel, rank, mode, dropout, family)
    if tiles is None:
        raise LookupError(f"no tiles for {kernel} in mode {mode} on {family}")
    return tiles


@by_tiles
def optional_tiles(kernel: str, rank: int, mode: str, dropout: bool, family: str) -> Tiles | None:
    """As `tiles_for`; None for one of OPTIONAL on a family that it does not serve."""
    rows = FAMILIES.get(family, CUDA)
    return next((row.tiles for row in rows if _serves(row, kernel, rank, mode, dropout)), None)


def candidates(kernel: str, rank: int, mode: str, dropout: bool, family: str) -> tuple[Tiles, ...]:
    """What tuning tries for `kernel` at a rank block, the predicted tiles first; nothing where it does not serve. The
    compile gate has seen all of them; a family that it does not compile for is offered its predicted ones alone."""
    predicted = optional_tiles(kernel, rank, mode, dropout, family)
    if predicted is None:
        return ()
    others = (row.tiles for row in CANDIDATES.get(family, ()) if _serves(row, kernel, rank, mode, dropout))
    return tuple(dict.fromkeys((predicted, *others)))


def _serves(row: Row, kernel: str, rank: int, mode: str, dropout: bool) -> bool:
    fits = row.kernel == kernel and mode in row.modes and row.above < rank <= row.rank
    return fits and row.dropout in (None, dropout)


def measured_row(kernel: str, rank: int, mode: str, dropout: bool, numbers: dict[str, int], family: str) -> Row | None:
    """The row of tiles that were measured at a rank block, or None if they are no candidates there."""
    if kernel not in (*KERNELS, *OPTIONAL) or rank not in RANK_BLOCKS:
        return None
    tiles = Tiles(**numbers)
    if tiles not in candidates(kernel, rank, mode, dropout, family):
        return None
    return Row(kernel, (mode,), rank, tiles, dropout, above=rank // 2 if rank > 16 else 0)
