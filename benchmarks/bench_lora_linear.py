"""The LoRA linear against its peers on Llama-3-8B's linears: forward and backward, no figure without a check.

`tiers` lists the cells, the most important first; `BENCH` says how a cell is run; `main` is the command line, also
behind `fastpeft bench lora`.
"""

import argparse
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import command
from .command import DTYPES, whole_numbers
from .lora_linear_peers import IMPLEMENTATIONS, Inputs
from .lora_linear_truth import LoraTruth
from .runner import Bench

OP = "lora_linear"
SHAPES = {
    "q/o": (8192, 4096, 4096),
    "gate/up": (8192, 4096, 14336),
    "k/v": (8192, 4096, 1024),
    "down": (8192, 14336, 4096),
}
TINY_SHAPES = {"q/o": (128, 128, 128), "k/v": (128, 128, 64)}
RANKS = (16, 64, 8, 128)
DROPOUTS = (0.0, 0.05)
TINY_DROPOUTS = (0.0, 0.5)  # on the CPU torch rounds 1/(1-p) to bf16: a gain of 1.002 at 0.05, exact at 0.5
SCALING = 0.75  # no power of two: those are exact in bf16 and hide where it is applied


@dataclass(frozen=True)
class Cell:
    """x (M, K), weight (N, K), rank r. `compiled`: torch.compile takes part here."""

    name: str
    M: int
    K: int
    N: int
    r: int
    dropout: float
    dtype: str
    compiled: bool = False

    @property
    def id(self) -> str:
        return f"{self.name} M={self.M} K={self.K} N={self.N} r={self.r} p={self.dropout:g} {self.dtype}"

    def shape(self) -> dict:
        return {"name": self.name, "M": self.M, "K": self.K, "N": self.N, "r": self.r}

    def flops(self, frozen: bool) -> int:
        """Operations of the base product and its dX; with an adapter also of S, T, both tails, dA and dB."""
        adapter = 0 if frozen else 6 * self.M * self.r * (self.K + self.N)
        return 4 * self.M * self.N * self.K + adapter

    def bytes(self, frozen: bool) -> int:
        """The least that a forward and backward move: each operand of the two base products once; with an adapter x
        twice more (for S and dA) and dY once more (for dB and T together)."""
        m, k, n = self.M, self.K, self.N
        adapter = 0 if frozen else 2 * m * k + m * n
        return DTYPES[self.dtype].itemsize * (2 * (m * k + n * k + m * n) + adapter)


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


def tiers(tiny: bool) -> list[list[Cell]]:
    """Ranks outermost, so that rank 16 is done everywhere before any other begins."""
    shapes, ranks, dropouts = (TINY_SHAPES, (16,), TINY_DROPOUTS) if tiny else (SHAPES, RANKS, DROPOUTS)
    return [
        [Cell(name, *shape, r, dropout, "bf16") for name, shape in shapes.items() for dropout in dropouts]
        for r in ranks
    ]


BENCH = Bench(OP, Cell, inputs_of, truth_of, IMPLEMENTATIONS, tiers)


def _shape(text: str) -> tuple[str, tuple[int, int, int]]:
    """NAME of SHAPES, or M,K,N."""
    if text in SHAPES:
        return text, SHAPES[text]
    if text[:1].isdigit():
        m, k, n = whole_numbers(text, "M,K,N")
        return f"{k}->{n}", (m, k, n)
    raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(SHAPES)} nor M,K,N")


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no rank: a whole number of at least 1 is wanted")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no dropout probability: 0 <= p < 1 is wanted")
    return value


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="bench lora", description="Time the LoRA linear against its peers.")
    names = ", ".join(SHAPES)
    out.add_argument("--shape", type=_shape, action="append", metavar="NAME|M,K,N", help=f"{names}, or x (M,K) to N")
    out.add_argument("--rank", type=_rank, action="append", help="may be given more than once; default 16")
    out.add_argument(
        "--dropout", type=_probability, action="append", help="may be repeated; default 0 and 0.05 (cpu: 0.5)"
    )
    command.add_options(out)
    return out


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    on_cpu = arguments.device == "cpu"
    shapes = arguments.shape or list((TINY_SHAPES if on_cpu else SHAPES).items())[: 1 if arguments.quick else None]
    return [
        Cell(name, *shape, rank, dropout, arguments.dtype)
        for rank in arguments.rank or (16,)
        for name, shape in shapes
        for dropout in arguments.dropout or (TINY_DROPOUTS if on_cpu else DROPOUTS)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `command.main` for the status."""
    return command.main(BENCH, parser(), _cells, argv)


if __name__ == "__main__":
    sys.exit(main())
