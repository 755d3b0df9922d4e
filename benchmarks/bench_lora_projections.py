"""LoRA linears that share their input (q, k and v; gate and up) as one op, against its peers and against our own layers
one by one: forward and backward, no figure without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench projections`.
"""

import zlib
from dataclasses import dataclass, replace

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from .dtypes import DTYPES
from .geometry import GRID, Geometry
from .lora_projections_peers import IMPLEMENTATIONS
from .lora_projections_truth import Inputs, ProjectionsTruth
from .replay import COVERED, DECODED, each_way
from .request import Request
from .runner import Bench

OP, SIZES = "lora_projections", "M,K,N,N2"
MODEL, TINY = "llama3-8b", "tiny"
RANKS = (16, 64)
SCALING = 0.75  # no power of two: those are exact in bf16 and hide where it is applied
GIVEN = 3  # projections of a shape by numbers


@dataclass(frozen=True)
class Cell:
    """x (M, K); `count` weights, the first of them (N, K) and the others (N2, K). `launches`: one of `replay`'s."""

    name: str
    M: int
    K: int
    N: int
    N2: int
    count: int
    r: int
    dtype: str
    compiled: bool = False
    dropout: float = 0.0
    launches: str = COVERED

    @property
    def id(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape().items() if name != "name")
        return f"{self.name} {sizes} {self.dtype}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.N, *[self.N2] * (self.count - 1))

    def shape(self) -> dict:
        return {name: getattr(self, name) for name in ("name", "M", "K", "N", "N2", "count", "r")}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        sizes = {"M": self.M, "K": self.K, "N": self.sizes, "r": 0 if frozen else self.r}
        return cost.lora_projections(passed, **sizes, itemsize=DTYPES[self.dtype].itemsize)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """As those of `lora_linear`: base outputs of about 1 and adapters' of about 0.75, so that an error shows."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(cell.id.encode()))
    dtype = DTYPES[cell.dtype]

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    return Inputs(
        x=draw(cell.M, cell.K).to(dtype),
        weights=[draw(n, cell.K, scale=cell.K**-0.5).to(dtype) for n in cell.sizes],
        grads=tuple(draw(cell.M, n).to(dtype) for n in cell.sizes),
        lora_a=[draw(cell.r, cell.K, scale=cell.K**-0.5) for _ in cell.sizes],
        lora_b=[draw(n, cell.r, scale=cell.r**-0.5) for n in cell.sizes],
        scaling=SCALING,
    )


def groups(geometry: Geometry) -> dict[str, tuple[int, int, int, int]]:
    """Which of a model's layers share an input: (inputs, outputs of the first and of each other, how many)."""
    found = {"q,k,v": (geometry.hidden, geometry.heads * geometry.depth, geometry.kv_heads * geometry.depth, 3)}
    if "gate/up" in geometry.linears:
        inputs, outputs = geometry.linears["gate/up"]
        found["gate,up"] = inputs, outputs, outputs, 2
    return found


def _named(request: Request, ranks) -> list[Cell]:
    found = []
    for name, geometry in request.named(TINY if request.tiny else MODEL):
        for rank in ranks:
            for group, sizes in groups(geometry).items():
                rows = geometry.batch * geometry.seq
                found.append(Cell(f"{name} {group}", rows, *sizes, rank, request.data_type))
    return found


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's projections at rank 16, its few rows, then at 64."""
    if tiny:
        return [_named(Request(tiny=True, dtype="bf16"), RANKS[:1])]
    first, *others = (_named(Request(), [rank]) for rank in RANKS)
    return [first, each_way(replace(cell, M=rows) for rows in DECODED for cell in first), *others]


def cells(request: Request) -> list[Cell]:
    """Of each shape, with every rank asked for (16); few rows, on a GPU, are replayed and eager."""
    if GRID in request.shapes:
        raise FastpeftError(f"--shape {GRID} has no layers that share an input: it is for `fastpeft bench lora`")
    ranks = request.ranks or RANKS[:1]
    found = _named(request, ranks)
    for sizes in request.numbers(SIZES):
        found += [Cell("given", *sizes, GIVEN, rank, request.data_type) for rank in ranks]
    return found if request.tiny else each_way(found)


UNDERSTANDS = ("rank", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, ProjectionsTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS)
