"""The LoRA linear against its peers on Llama-3-8B's linears: forward and backward, no figure without a check.

`plan` lists the cells, the most important first; `BENCH` says how a cell is run; `main` is the command line, also
behind `fastpeft bench lora`.
"""

import argparse
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from . import report
from .accuracy import Oracle
from .baselines import IMPLEMENTATIONS, Inputs
from .runner import Bench, Run

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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALING = 0.75  # no power of two: those are exact in bf16 and hide where it is applied
COMPILED_CELLS = 3  # peft under torch.compile: 10 to 30 s of compilation each


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


def oracle_of(inputs: Inputs) -> Oracle:
    return Oracle(inputs.x, inputs.weight, inputs.grad, inputs.scaling, inputs.dropout)


BENCH = Bench(OP, Cell, inputs_of, oracle_of, IMPLEMENTATIONS)


def plan(device: str, *, tiny: bool = False, budget_s: float = 400.0) -> dict:
    """The whole grid for the check-in, ranks outermost so that rank 16 is done everywhere before any other begins."""
    shapes, ranks, dropouts = (TINY_SHAPES, (16,), TINY_DROPOUTS) if tiny else (SHAPES, RANKS, DROPOUTS)
    cells = [
        Cell(name, *shape, r, dropout, "bf16") for r in ranks for name, shape in shapes.items() for dropout in dropouts
    ]
    return plan_of(cells, device, budget_s=budget_s, quick=tiny)


def plan_of(cells: Sequence[Cell], device: str, *, budget_s: float, quick: bool = False) -> dict:
    """Plain data, so that a process can be started on it, and started again. `without` names implementations that are
    not to be run and why, `skip` likewise cells by id."""
    without = {}
    if device == "cpu":
        without = {i.name: "not compiled on the CPU path" for i in IMPLEMENTATIONS if i.compiled}
        without |= {i.name: "its kernels need a GPU" for i in IMPLEMENTATIONS if i.needs_gpu}
    compiled = COMPILED_CELLS if device == "cuda" and not quick else 0
    return {
        "op": OP,
        "device": device,
        "tiny": device == "cpu",
        "cells": [asdict(replace(cell, compiled=index < compiled)) for index, cell in enumerate(cells)],
        "budget_s": budget_s,
        "rounds": [3, 5] if quick else [10, 60],
        "seconds_per_cell": 2.5,
        "without": without,
        "skip": {},
    }


def _shape(text: str) -> tuple[str, tuple[int, int, int]]:
    """NAME of SHAPES, or M,K,N."""
    if text in SHAPES:
        return text, SHAPES[text]
    try:
        m, k, n = (int(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(SHAPES)
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {names} nor M,K,N") from None
    if min(m, k, n) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: M, K and N must be at least 1")
    return f"{k}->{n}", (m, k, n)


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
    out.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    out.add_argument("--quick", action="store_true", help="one shape unless named, fewer rounds, no torch.compile")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes unless named")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 1 if something failed to run, 2 for wrong usage, 3 if a result was wrong."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse's own way out; callers want a number
        return int(stop.code or 0)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench lora: torch sees no GPU. --device cpu runs the torch backend on tiny shapes.", file=sys.stderr)
        return 2
    on_cpu = arguments.device == "cpu"
    shapes = arguments.shape or list((TINY_SHAPES if on_cpu else SHAPES).items())[: 1 if arguments.quick else None]
    cells = [
        Cell(name, *shape, rank, dropout, arguments.dtype)
        for rank in arguments.rank or (16,)
        for name, shape in shapes
        for dropout in arguments.dropout or (TINY_DROPOUTS if on_cpu else DROPOUTS)
    ]
    document = report.new_document(plan_of(cells, arguments.device, budget_s=3600.0, quick=arguments.quick))
    document["stamp"] = report.stamp(arguments.device)
    Run(document, lambda: report.save(document, arguments.json) if arguments.json else None, BENCH).measure()
    print(report.table(document), end="")
    return report.exit_code(document)


if __name__ == "__main__":
    sys.exit(main())
