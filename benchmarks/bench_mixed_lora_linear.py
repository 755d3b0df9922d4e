"""The LoRA linear on mixed batches, each sample its own adapter, against its peers: forward and backward, no figure
without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench mixed`.
"""

import zlib
from dataclasses import dataclass

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from .dtypes import DTYPES
from .geometry import GRID
from .mixed_lora_linear_peers import IMPLEMENTATIONS
from .mixed_lora_linear_truth import Inputs, MixedTruth
from .request import Request
from .runner import Bench

OP, SIZES = "mixed_lora_linear", "B,S,K,N"
MODEL, TINY = "llama3-8b", "tiny"
RANKS = (16, 64)
SCALING = 0.75  # no power of two: those are exact in bf16 and hide where it is applied
SAMPLES, ADAPTERS = 8, 4


@dataclass(frozen=True)
class Cell:
    """x (B, S, K), weight (N, K). The samples take turns: the adapters one after the other, of ranks r, r/2, r, ...,
    then none."""

    name: str
    B: int
    S: int
    K: int
    N: int
    r: int
    adapters: int
    dtype: str
    compiled: bool = False
    dropout: float = 0.0

    @property
    def id(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape().items() if name != "name")
        return f"{self.name} {sizes} {self.dtype}"

    @property
    def ranks(self) -> list[int]:
        return [max(1, self.r // (1 + i % 2)) for i in range(self.adapters)]

    @property
    def rows(self) -> list[int]:
        turns = [*range(self.adapters), -1]
        return [turns[b % len(turns)] for b in range(self.B)]

    def shape(self) -> dict:
        return {name: getattr(self, name) for name in ("name", "B", "S", "K", "N", "r", "adapters")}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        served = tuple((self.rows.count(i), rank) for i, rank in enumerate(self.ranks))
        sizes = {name: getattr(self, name) for name in SIZES.split(",")}
        itemsize = DTYPES[self.dtype].itemsize
        return cost.mixed_lora_linear(passed, **sizes, served=() if frozen else served, itemsize=itemsize)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """As those of `lora_linear`: a base output of about 1 and adapters' of about 0.75, so that an error shows."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(cell.id.encode()))
    dtype = DTYPES[cell.dtype]

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    return Inputs(
        x=draw(cell.B, cell.S, cell.K).to(dtype),
        weight=draw(cell.N, cell.K, scale=cell.K**-0.5).to(dtype),
        grad=draw(cell.B, cell.S, cell.N).to(dtype),
        lora_a=[draw(rank, cell.K, scale=cell.K**-0.5) for rank in cell.ranks],
        lora_b=[draw(cell.N, rank, scale=rank**-0.5) for rank in cell.ranks],
        scalings=[SCALING / (1 + i % 3) for i in range(cell.adapters)],
        rows=cell.rows,
    )


def _named(request: Request, ranks) -> list[Cell]:
    """Of each shape its first linear layer, trained and one step of `generate`; of as many samples as adapters have
    turns and a few more, where the shape's own are fewer."""
    found = []
    for name, geometry in request.named(TINY if request.tiny else MODEL):
        layer, (k, n) = next(iter(geometry.linears.items()))
        batch, adapters = (max(geometry.batch, 3), 2) if request.tiny else (max(geometry.batch, SAMPLES), ADAPTERS)
        for rank in ranks:
            for seq in dict.fromkeys((geometry.seq, *([] if request.seqs else [1]))):
                found.append(Cell(f"{name} {layer}", batch, seq, k, n, rank, adapters, request.data_type))
    return found


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's first linear layer at rank 16, then at 64."""
    if tiny:
        return [_named(Request(tiny=True, dtype="bf16"), RANKS[:1])]
    return [_named(Request(), [rank]) for rank in RANKS]


def cells(request: Request) -> list[Cell]:
    """Of each shape, with every rank asked for (16)."""
    if GRID in request.shapes:
        raise FastpeftError(f"--shape {GRID} has no samples: it is for `fastpeft bench lora`")
    ranks = request.ranks or RANKS[:1]
    found = _named(request, ranks)
    for sizes in request.numbers(SIZES):
        found += [Cell("given", *sizes, rank, ADAPTERS, request.data_type) for rank in ranks]
    return found


UNDERSTANDS = ("rank", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, MixedTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS)
