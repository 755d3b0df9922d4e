"""The LoRA linear of a mixture's experts, each on the tokens that are routed to it, against its peers: forward and
backward, no figure without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench experts`.
"""

import zlib
from dataclasses import dataclass

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from .dtypes import DTYPES
from .expert_lora_linear_peers import IMPLEMENTATIONS
from .expert_lora_linear_truth import ExpertTruth, Inputs
from .geometry import GRID
from .request import Request
from .runner import Bench

OP, SIZES = "expert_lora_linear", "M,E,K,N"
MODEL, TINY = "llama3-8b", "tiny"
RANKS = (16,)
SCALING = 0.75  # no power of two: those are exact in bf16 and hide where it is applied
EXPERTS, CHOSEN = (8, 64), 2  # a token goes to CHOSEN of them


@dataclass(frozen=True)
class Cell:
    """x (M, K), whose rows are shared out among E experts of weight (N, K), by chance as by a router in balance."""

    name: str
    M: int
    E: int
    K: int
    N: int
    r: int
    dtype: str
    compiled: bool = False
    dropout: float = 0.0

    @property
    def id(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape().items() if name != "name")
        return f"{self.name} {sizes} {self.dtype}"

    def shape(self) -> dict:
        return {name: getattr(self, name) for name in ("name", "M", "E", "K", "N", "r")}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        sizes = {name: getattr(self, name) for name in SIZES.split(",")}
        itemsize = DTYPES[self.dtype].itemsize
        return cost.expert_lora_linear(passed, **sizes, r=0 if frozen else self.r, itemsize=itemsize)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """As those of `lora_linear`: a base output of about 1 and adapters' of about 0.75, so that an error shows."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(cell.id.encode()))
    dtype = DTYPES[cell.dtype]

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=of) * scale

    routed = torch.randint(cell.E, (cell.M,), generator=generator, device=device)
    return Inputs(
        x=draw(cell.M, cell.K).to(dtype),
        weight=draw(cell.E, cell.N, cell.K, scale=cell.K**-0.5, of=dtype),
        grad=draw(cell.M, cell.N).to(dtype),
        lora_a=draw(cell.E * cell.r, cell.K, scale=cell.K**-0.5),
        lora_b=draw(cell.N, cell.r * cell.E, scale=cell.r**-0.5),
        scaling=SCALING,
        ends=torch.bincount(routed, minlength=cell.E).cumsum(0),
    )


def _named(request: Request, experts) -> list[Cell]:
    """Of each shape its widest linear layer, as that of experts of the same size together, or (EXPERTS[0]) each."""
    found = []
    for name, geometry in request.named(TINY if request.tiny else MODEL):
        layer, (k, n) = max(geometry.linears.items(), key=lambda item: item[1][0] * item[1][1])
        rows = CHOSEN * geometry.batch * geometry.seq
        for count in experts:
            width = max(16, n * EXPERTS[0] // count // 16 * 16)
            ranks = request.ranks or RANKS
            found += [Cell(f"{name} {layer}", rows, count, k, width, rank, request.data_type) for rank in ranks]
    return found


def tiers(tiny: bool) -> list[list[Cell]]:
    """Experts as wide as Llama's MLP, which is Mixtral's shape; then many narrow ones."""
    if tiny:
        return [_named(Request(tiny=True, dtype="bf16"), EXPERTS[:1])]
    return [_named(Request(), [count]) for count in EXPERTS]


def cells(request: Request) -> list[Cell]:
    """Of each shape, with every rank asked for (16)."""
    if GRID in request.shapes:
        raise FastpeftError(f"--shape {GRID} has no experts: it is for `fastpeft bench lora`")
    found = _named(request, EXPERTS[:1])
    for sizes in request.numbers(SIZES):
        found += [Cell("given", *sizes, rank, request.data_type) for rank in request.ranks or RANKS]
    return found


UNDERSTANDS = ("rank", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, ExpertTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS)
