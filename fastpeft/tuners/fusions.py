"""Layers that compute together what each could compute alone: which kinds of that there are. One that is taken out of
this table is out of the library."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastpeft.tuners.mlp import join_mlps, part_mlps
from fastpeft.tuners.rehoming import take_rooms
from fastpeft.tuners.siblings import join_siblings, part_siblings


class Fusion(NamedTuple):
    """join: begin it, wherever a patched model has a place for it, and nowhere twice. part: end it everywhere.
    recomputes: whether `join` takes, as its second argument, if backward computes again what it could keep."""

    join: Callable[..., None]
    part: Callable[[nn.Module], None]
    recomputes: bool


FUSIONS = {"projections": Fusion(join_siblings, part_siblings, False), "mlp": Fusion(join_mlps, part_mlps, True)}


def part_all(model: nn.Module) -> None:
    """End every fusion, and what was done for it to weights."""
    for fusion in FUSIONS.values():
        fusion.part(model)
    take_rooms(model)
