"""Frozen weights with room beside and below them, for B and A of a low-rank term: [[W, B], [A, 0]].

With B beside W one vendor's product [x|S]·[W|B]ᵀ is a layer's forward, with A below it [dY|T]·[W; A] its dX, and W is
copied for neither. B and A are written anew in each call, which their r·(N + K) numbers cost: what they were before
does not matter then. One weight serves one stream at a time.

A weight is known by its storage: a copy, on another device or in another dtype, has one of its own and no room.
"""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

ALIGNED_TO = 64  # numbers: a row of the whole begins where a tile of the vendor's products may
WIDE_LOADS = 8  # numbers: the depth of a product that the vendor has wide loads for is a multiple


class Room(NamedTuple):
    """Of a weight (N, K): its shape, and that of the whole."""

    weight: tuple[int, int]
    whole: tuple[int, int]


_rooms: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage -> Room


def padded(size: int, rank: int, multiple: int = WIDE_LOADS) -> int:
    """size + rank, and on to a multiple."""
    return size + rank + -(size + rank) % multiple


def with_room(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The same values (N, K) in a storage with room for ranks up to this one."""
    sizes = tuple(weight.shape)
    whole = weight.detach().new_zeros([padded(size, rank, ALIGNED_TO) for size in sizes])
    whole[: sizes[0], : sizes[1]].copy_(weight.detach())
    _rooms[whole.untyped_storage()] = Room(sizes, tuple(whole.shape))
    return whole[: sizes[0], : sizes[1]]


def room_of(weight: torch.Tensor) -> Room | None:
    """That of a weight, which must be the whole of what `with_room` returned; the storage's other views have none."""
    room = _rooms.get(weight.untyped_storage()) if _rooms else None
    if room is None or weight.shape != room.weight:
        return None
    return room if weight.stride() == (room.whole[1], 1) and not weight.storage_offset() else None


def fits(weight: torch.Tensor, rank: int) -> bool:
    """Whether the weight has room for that rank on both sides."""
    room = room_of(weight)
    return room is not None and all(
        padded(size, rank) <= most for size, most in zip(room.weight, room.whole, strict=True)
    )


def joined(weight: torch.Tensor, narrow: torch.Tensor, dim: int) -> torch.Tensor | None:
    """[W|B] (dim 1, narrow = B [N, r]) or [W; A] (dim 0, narrow = A [r, K]), padded with zeros to a multiple of 8, in
    the weight's own storage; None where there is no room."""
    rank = narrow.shape[dim]
    if not fits(weight, rank):
        return None
    sizes, (_, step) = list(weight.shape), room_of(weight).whole
    start, sizes[dim] = sizes[dim], padded(sizes[dim], rank)
    # `data`: what is written beside the weight is no change of the weight, which backward may have saved.
    whole = weight.data.as_strided(sizes, (step, 1))
    whole.narrow(dim, start, rank).copy_(narrow)
    if rest := sizes[dim] - start - rank:
        whole.narrow(dim, start + rank, rest).zero_()
    return whole
