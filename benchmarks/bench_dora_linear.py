"""A linear layer with DoRA, the norms of its rows included, against its peers and against LoRA on the same tensors:
forward and backward, no figure without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench dora`.
"""

from dataclasses import dataclass

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from . import bench_lora_linear
from .bench_lora_linear import DROPOUTS, TINY_DROPOUTS
from .dora_linear_peers import IMPLEMENTATIONS
from .dora_linear_truth import DoraTruth, Inputs
from .dtypes import DTYPES
from .geometry import GRID
from .request import Request
from .runner import Bench

OP, SIZES = "dora_linear", "M,K,N"
MODEL, TINY = "llama3-8b", "tiny"
RANKS = (16, 64)
SEED = 5  # of the magnitudes: the other tensors are drawn as those of `lora_linear`


@dataclass(frozen=True)
class Cell(bench_lora_linear.Cell):
    """x (M, K), weight (N, K), rank r, magnitudes (N,). The id is not that of the same LoRA linear: cells are left out
    by their ids."""

    @property
    def id(self) -> str:
        return f"{super().id} dora"

    def work(self, frozen: bool, passed: str) -> cost.Work:
        return super().work(True, passed) if frozen else self.work_of_dora(passed)

    def work_of_dora(self, passed: str, norms: bool = True) -> cost.Work:
        sizes = {"M": self.M, "K": self.K, "N": self.N, "r": self.r, "dropout": self.dropout}
        return cost.dora_linear(passed, **sizes, itemsize=DTYPES[self.dtype].itemsize, norms=norms)

    def work_of_lora(self, passed: str) -> cost.Work:
        return super().work(False, passed)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """As those of `lora_linear`, so that rows of W + s·B A are of about 1.25, and magnitudes of about 1: the factors
    are some fifth off 1, and an error in them shows."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    magnitude = 1 + 0.25 * torch.randn(cell.N, generator=generator, device=device)
    return Inputs(bench_lora_linear.inputs_of(cell, device), magnitude)


def _named(request: Request, ranks, dropouts) -> list[Cell]:
    """Of each shape its first linear layer."""
    found = []
    for name, geometry in request.named(TINY if request.tiny else MODEL):
        layer, (k, n) = next(iter(geometry.linears.items()))
        sizes = (f"{name} {layer}", geometry.batch * geometry.seq, k, n)
        found += [Cell(*sizes, rank, dropout, request.data_type) for rank in ranks for dropout in dropouts]
    return found


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's first linear layer, without dropout and with, at rank 16, then at 64."""
    if tiny:
        return [_named(Request(tiny=True, dtype="bf16"), RANKS[:1], TINY_DROPOUTS)]
    return [_named(Request(), [rank], DROPOUTS) for rank in RANKS]


def cells(request: Request) -> list[Cell]:
    """Of each shape, with every rank (16) and every dropout (0 and 0.05, on a CPU in half precision 0.5) asked for."""
    if GRID in request.shapes:
        raise FastpeftError(f"--shape {GRID} is no model: it is for `fastpeft bench lora`")
    usual = TINY_DROPOUTS if request.tiny and request.data_type != "fp32" else DROPOUTS
    ranks, dropouts = request.ranks or RANKS[:1], request.dropouts or request.first(list(usual))
    found = _named(request, ranks, dropouts)
    for sizes in request.numbers(SIZES):
        found += [Cell("given", *sizes, rank, dropout, request.data_type) for rank in ranks for dropout in dropouts]
    return found


UNDERSTANDS = ("rank", "dropout", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, DoraTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS)
