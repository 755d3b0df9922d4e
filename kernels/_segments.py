"""Which rows of a batch belong to which adapter, as the kernels of `mixed_lora_linear` are told: tables of integers.

The samples are sorted by adapter. What one adapter serves is a segment of that order, and the rows of its samples, S
each, are the segment's rows; samples of no adapter come last, a segment of rank 0. Everything is known on the host. A
table is made and copied to the device once for each layout: all layers of a model, and all steps of a `generate`, share
it, and nothing waits for the device.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastpeft.kernels._common import DROPOUT_LEVELS, dropout_threshold

REMEMBERED = 64  # layouts; a table has a few hundred bytes


class Layout(NamedTuple):
    """samples: of each adapter the samples that it serves, in order; rest: those of no adapter. tokens:
    S, the rows of a sample. ranks, scalings, dropouts: each adapter's."""

    samples: tuple[Sequence[int], ...]
    rest: tuple[int, ...]
    tokens: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each adapter's segment."""
        return tuple(len(samples) * self.tokens for samples in self.samples)

    @property
    def elements(self) -> int:
        """Of S or T: each row of a segment has as many as its adapter's rank."""
        return sum(count * rank for count, rank in zip(self.counts, self.ranks, strict=True))

    @property
    def rank_unit(self) -> int:
        """What divides every rank, as far as a kernel's loads profit."""
        return math.gcd(*self.ranks, 16)


def _table(rows: list, width: int, device: torch.device) -> torch.Tensor:
    """[rows, width] int64."""
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width)


@functools.lru_cache(REMEMBERED)
def _counted(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device).view(-1, 1)


@functools.lru_cache(REMEMBERED)
def order(layout: Layout, device: torch.device) -> torch.Tensor:
    """[samples] int64: the samples, sorted. Ranges of them, one behind the other, are sorted as they are."""
    if isinstance(layout.samples[0], range):
        return _counted(sum(map(len, layout.samples)), device)
    return _table([*(each for samples in layout.samples for each in samples), *layout.rest], 1, device)


@functools.lru_cache(REMEMBERED)
def segments(layout: Layout, device: torch.device) -> torch.Tensor:
    """[adapters + 1, 6] int64: of each segment its first sorted row, its rows, its rank, the ranks before it, the
    elements of S before it, and the draws that its dropout drops (`_common.keep_mask`)."""
    rows, first, ranks, elements = [], 0, 0, 0
    for count, rank, p in zip(layout.counts, layout.ranks, layout.dropouts, strict=True):
        rows.append((first, count, rank, ranks, elements, dropout_threshold(p)))
        first, ranks, elements = first + count, ranks + rank, elements + count * rank
    return _table([*rows, (first, len(layout.rest) * layout.tokens, 0, ranks, elements, 0)], 6, device)


@functools.lru_cache(REMEMBERED)
def factors(layout: Layout, device: torch.device) -> torch.Tensor:
    """[adapters + 1, 2] fp32: of each segment its scaling, and what dropout multiplies the kept values by."""
    keep = [DROPOUT_LEVELS / (DROPOUT_LEVELS - dropout_threshold(p)) for p in layout.dropouts]
    rows = [*zip(layout.scalings, keep, strict=True), (0.0, 1.0)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


@functools.lru_cache(REMEMBERED)
def blocks(counts: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """[blocks, 2] int64: blocks of `size` rows, each a segment's alone: the segment, and the first row in it."""
    rows = [(segment, first) for segment, count in enumerate(counts) for first in range(0, count, size)]
    return _table(rows, 2, device)


@functools.lru_cache(REMEMBERED)
def runs(
    counts: tuple[int, ...], size: int, parts: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """About `parts` runs of whole blocks, each a segment's alone, for a reduction over its rows: [runs, 3] int64, the
    segment, the first row in it and the rows to take; [segments + 1] int64, each segment's first run; their number."""
    needed = sum(math.ceil(count / size) for count in counts)
    length = size * max(1, math.ceil(needed / max(1, parts)))
    rows, firsts = [], [0]
    for segment, count in enumerate(counts):
        rows += [(segment, first, min(length, count - first)) for first in range(0, count, length)]
        firsts.append(len(rows))
    return _table(rows, 3, device), _table(firsts, 1, device), len(rows)
