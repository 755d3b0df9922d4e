"""Attention plus a gated softmax over a prompt (LLaMA-Adapter) against its peers: forward and backward, no figure
without a check.

`tiers` lists the cells, the most important first; `BENCH` says how a cell is run; `main` is the command line.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpeft import cost

from . import bench_prefix_attention as prefix
from . import command
from .bench_prefix_attention import LLAMA, MHA, SIZES
from .command import DTYPES
from .gated_prompt_attention_peers import IMPLEMENTATIONS
from .gated_prompt_attention_truth import GatedInputs, GatedTruth
from .runner import Bench

OP = "gated_prompt_attention"
# name: B, H, Hkv, S, P, D
SHAPES = {f"llama-{s}": (*LLAMA, s, 10, 128) for s in (2048, 512, 8192)}
SHAPES |= {f"mha-{s}": (*MHA, s, 10, 128) for s in (2048, 512, 8192)}  # with a gate for each head, as in the paper
TINY_SHAPES = {"tiny": (2, 4, 2, 96, 10, 32), "tiny-mha": (2, 4, 4, 64, 10, 32)}
MEAN_OF_PROMPT = 1.0
SUM_OF_GRADIENT = 8.0  # in standard deviations of a sum of as many numbers without a mean


@dataclass(frozen=True)
class Cell:
    """q (B, H, S, D), k and v (B, Hkv, S, D), prompt (Hkv, P, D), causal; gates: 1, as HF peft has it, or H."""

    name: str
    B: int
    H: int
    Hkv: int
    S: int
    P: int
    D: int
    dtype: str
    gates: int = 1
    compiled: bool = False
    dropout: float = 0.0

    @property
    def id(self) -> str:
        return " ".join([self.name, *(f"{name}={size}" for name, size in self.sizes().items()), self.dtype])

    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in (*SIZES.split(","), "gates")}

    def shape(self) -> dict:
        return {"name": self.name, **self.sizes()}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        sizes = {name: getattr(self, name) for name in SIZES.split(",")} | ({"P": 0} if frozen else {})
        return cost.gated_prompt_attention(passed, **sizes, itemsize=DTYPES[self.dtype].itemsize)

    def flops(self, frozen: bool) -> int:
        return self.work(frozen, "fwd+bwd").flops

    def bytes(self, frozen: bool) -> int:
        return self.work(frozen, "fwd+bwd").bytes


def inputs_of(cell: Cell, device: torch.device) -> GatedInputs:
    """As of attention over a prefix. The prompt's values and the result's gradient have a mean, so that the gradient of
    one gate is no difference of nearly equal sums; gates are open, a quarter to three quarters."""
    sizes = (getattr(cell, name) for name in SIZES.split(","))
    inputs = prefix.inputs_of(prefix.Cell(cell.name, *sizes, cell.dtype), device)
    inputs.pv.add_(MEAN_OF_PROMPT)
    inputs.grad.add_(SUM_OF_GRADIENT / inputs.grad.numel() ** 0.5)
    gate = torch.linspace(0.25, 0.75, cell.gates) if cell.gates > 1 else torch.tensor([0.4])
    return GatedInputs(**vars(inputs), gate=gate.to(device, DTYPES[cell.dtype]))


def _cell(name: str, sizes: Sequence[int], dtype: str = "bf16", per_head: bool = False) -> Cell:
    return Cell(name, *sizes, dtype, gates=sizes[1] if per_head or "mha" in name else 1)


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's grouped heads first, at every length; then as many key heads as heads."""
    cells = [_cell(name, sizes) for name, sizes in (TINY_SHAPES if tiny else SHAPES).items()]
    return [cells] if tiny else [cells[:3], cells[3:4], cells[4:]]


BENCH = Bench(OP, Cell, inputs_of, GatedTruth, IMPLEMENTATIONS, tiers, compiled_cells=1)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    return prefix.shape_of(text, SHAPES | TINY_SHAPES)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="bench adapter", description="Time a gated prompt's attention beside its peers.")
    out.add_argument("--per-head", action="store_true", help="a gate for each head; mha shapes have them anyway")
    prefix.add_sizes(out, _shape, SHAPES)
    return out


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    shapes = prefix.sizes_of(arguments, TINY_SHAPES if arguments.device == "cpu" else SHAPES)
    return [_cell(name, sizes, arguments.dtype, arguments.per_head) for name, sizes in shapes]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `command.main` for the status."""
    return command.main(BENCH, parser(), _cells, argv)


if __name__ == "__main__":
    sys.exit(main())
