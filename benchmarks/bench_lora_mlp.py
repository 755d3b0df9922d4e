"""The gated MLP with LoRA on gate, up and down as one op, against its peers and against our own layers one by one:
forward and backward, no figure without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench mlp`.
"""

import zlib
from dataclasses import dataclass, replace

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from .dtypes import DTYPES
from .geometry import GRID
from .lora_mlp_peers import IMPLEMENTATIONS
from .lora_mlp_truth import Inputs, MlpTruth
from .replay import COVERED, DECODED, each_way
from .request import Request
from .runner import Bench

OP, SIZES = "lora_mlp", "M,K,H"
MODEL, TINY = "llama3-8b", "tiny"
RANKS = (16, 32)
SCALING = 0.75  # no power of two: those are exact in bf16 and hide where it is applied


@dataclass(frozen=True)
class Cell:
    """x (M, K), gate and up (H, K), down (K, H), silu. `launches`: one of `replay`'s."""

    name: str
    M: int
    K: int
    H: int
    r: int
    dtype: str
    compiled: bool = False
    dropout: float = 0.0
    launches: str = COVERED

    @property
    def id(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape().items() if name != "name")
        return f"{self.name} {sizes} {self.dtype}"

    def shape(self) -> dict:
        return {name: getattr(self, name) for name in ("name", "M", "K", "H", "r")}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        sizes = {"M": self.M, "K": self.K, "H": self.H, "N": self.K, "r": 0 if frozen else self.r}
        return cost.lora_mlp(passed, **sizes, itemsize=DTYPES[self.dtype].itemsize)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """Base products of about 1 and adapters' of about 0.75, so that an error shows."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(cell.id.encode()))
    dtype, shapes = DTYPES[cell.dtype], [(cell.H, cell.K), (cell.H, cell.K), (cell.K, cell.H)]

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    return Inputs(
        x=draw(cell.M, cell.K).to(dtype),
        weights=[draw(n, k, scale=k**-0.5).to(dtype) for n, k in shapes],
        grad=draw(cell.M, cell.K).to(dtype),
        lora_a=[draw(cell.r, k, scale=k**-0.5) for _, k in shapes],
        lora_b=[draw(n, cell.r, scale=cell.r**-0.5) for n, _ in shapes],
        scaling=SCALING,
    )


def _named(request: Request, ranks) -> list[Cell]:
    """Of each shape that has a gated MLP."""
    found = []
    for name, geometry in request.named(TINY if request.tiny else MODEL):
        if "gate/up" not in geometry.linears:
            continue
        inputs, hidden = geometry.linears["gate/up"]
        rows = geometry.batch * geometry.seq
        found += [Cell(f"{name} mlp", rows, inputs, hidden, rank, request.data_type) for rank in ranks]
    return found


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's MLP at rank 16, its few rows, then at 32."""
    if tiny:
        return [_named(Request(tiny=True, dtype="bf16"), RANKS[:1])]
    first, *others = (_named(Request(), [rank]) for rank in RANKS)
    return [first, each_way(replace(cell, M=rows) for rows in DECODED for cell in first), *others]


def cells(request: Request) -> list[Cell]:
    """Of each shape, with every rank asked for (16); few rows, on a GPU, are replayed and eager."""
    if GRID in request.shapes:
        raise FastpeftError(f"--shape {GRID} has no MLP: it is for `fastpeft bench lora`")
    ranks = request.ranks or RANKS[:1]
    found = _named(request, ranks)
    for sizes in request.numbers(SIZES):
        found += [Cell("given", *sizes, rank, request.data_type) for rank in ranks]
    return found if request.tiny else each_way(found)


UNDERSTANDS = ("rank", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, MlpTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS)
