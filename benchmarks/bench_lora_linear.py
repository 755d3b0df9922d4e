"""The LoRA linear against its peers on a model's linear layers: forward and backward, no figure without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench lora`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpeft import cost

from .dtypes import DTYPES
from .geometry import GEOMETRIES, GRID
from .lora_linear_peers import IMPLEMENTATIONS, Inputs
from .lora_linear_truth import LoraTruth
from .replay import COVERED, DECODED, each_way
from .request import Request
from .runner import Bench

OP, SIZES = "lora_linear", "M,K,N"
MODEL, TINY = "llama3-8b", "tiny"
RANKS = (16, 64, 8, 128)
DROPOUTS = (0.0, 0.05)
TINY_DROPOUTS = (0.0, 0.5)  # on the CPU torch rounds 1/(1-p) to bf16: a gain of 1.002 at 0.05, exact at 0.5
SCALING = 0.75  # no power of two: those are exact in bf16 and hide where it is applied
# LoRAFusion's own: square layers, with its dropout.
GRID_ROWS, GRID_SIDES = (8192, 2048), (4096, 5120, 8192)
GRID_DROPOUT = 0.1


@dataclass(frozen=True)
class Cell:
    """x (M, K), weight (N, K), rank r. `compiled`: torch.compile takes part here. `launches`: one of `replay`'s."""

    name: str
    M: int
    K: int
    N: int
    r: int
    dropout: float
    dtype: str
    compiled: bool = False
    launches: str = COVERED

    @property
    def id(self) -> str:
        return f"{self.name} M={self.M} K={self.K} N={self.N} r={self.r} p={self.dropout:g} {self.dtype}"

    def shape(self) -> dict:
        return {"name": self.name, "M": self.M, "K": self.K, "N": self.N, "r": self.r}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        sizes = {name: getattr(self, name) for name in SIZES.split(",")} | {"r": 0 if frozen else self.r}
        return cost.lora_linear(passed, **sizes, itemsize=DTYPES[self.dtype].itemsize, dropout=self.dropout)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """Random and never zero: x and dY of unit variance, a base output of about 1 and an adapter output of about 0.75,
    so that an error in either shows."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(cell.id.encode()))
    dtype = DTYPES[cell.dtype]

    def draw(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device) * scale

    return Inputs(
        x=draw(cell.M, cell.K).to(dtype),
        weight=draw(cell.N, cell.K, cell.K**-0.5).to(dtype),
        grad=draw(cell.M, cell.N).to(dtype),
        lora_a=draw(cell.r, cell.K, cell.K**-0.5),
        lora_b=draw(cell.N, cell.r, cell.r**-0.5),
        scaling=SCALING,
        dropout=cell.dropout,
    )


def truth_of(inputs: Inputs) -> LoraTruth:
    return LoraTruth(inputs.x, inputs.weight, inputs.grad, inputs.scaling, inputs.dropout)


def _of_model(name: str, geometry, layers: int | None = None) -> list[tuple[str, tuple[int, int, int]]]:
    """(name, M,K,N) of the model's linear layers, or of the first ones."""
    rows = geometry.batch * geometry.seq
    return [(f"{name} {layer}", (rows, *sizes)) for layer, sizes in list(geometry.linears.items())[:layers]]


def _decoding() -> list[Cell]:
    """The model's first layers for few rows."""
    shapes = _of_model(MODEL, GEOMETRIES[MODEL], 2)
    return each_way([Cell(name, m, k, n, RANKS[0], 0.0, "bf16") for m in DECODED for name, (_, k, n) in shapes])


def tiers(tiny: bool) -> list[list[Cell]]:
    """Ranks outermost, so that rank 16 is done everywhere before any other begins; a tier is a rank. Behind rank 16
    come LoRAFusion's grid at as many rows and the model's few rows; the grid's fewer rows come last."""
    name = TINY if tiny else MODEL
    shapes = _of_model(name, GEOMETRIES[name], 2 if tiny else None)
    ranks, dropouts = (RANKS[:1], TINY_DROPOUTS) if tiny else (RANKS, DROPOUTS)
    found = [
        [Cell(name, *shape, rank, dropout, "bf16") for name, shape in shapes for dropout in dropouts] for rank in ranks
    ]
    if tiny:
        return found
    usual, fewer = (_grid(Request(), [rows]) for rows in GRID_ROWS)
    return [found[0], usual, _decoding(), *found[1:], fewer]


def _grid(request: Request, rows: Sequence[int] = GRID_ROWS) -> list[Cell]:
    return [
        Cell(GRID, m, side, side, rank, dropout, request.data_type)
        for rank in request.ranks or RANKS[:1]
        for side in GRID_SIDES
        for m in rows
        for dropout in request.dropouts or (GRID_DROPOUT,)
    ]


def cells(request: Request) -> list[Cell]:
    """Of each shape, with every rank (16) and every dropout (0 and 0.05, on a CPU 0.5) asked for; few rows, on a GPU,
    are replayed and eager."""
    shapes = [("given", numbers) for numbers in request.numbers(SIZES)]
    for name, geometry in request.named(TINY if request.tiny else MODEL):
        shapes += request.first(_of_model(name, geometry))
    usual = TINY_DROPOUTS if request.tiny and request.data_type != "fp32" else DROPOUTS
    found = [
        Cell(name, *shape, rank, dropout, request.data_type)
        for rank in request.ranks or RANKS[:1]
        for name, shape in shapes
        for dropout in request.dropouts or request.first(list(usual))
    ]
    found += _grid(request) if GRID in request.shapes else []
    return found if request.tiny else each_way(found)


UNDERSTANDS = ("rank", "dropout", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, truth_of, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS, compiled_cells=2)
