"""Attention plus a gated softmax over a prompt (LLaMA-Adapter) against its peers: forward and backward, no figure
without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench adapter`.
"""

from dataclasses import dataclass

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from . import bench_prefix_attention as prefix
from .bench_prefix_attention import SIZES
from .dtypes import DTYPES
from .gated_prompt_attention_peers import IMPLEMENTATIONS
from .gated_prompt_attention_truth import GatedInputs, GatedTruth
from .geometry import GEOMETRIES
from .request import Request
from .runner import Bench

OP, PROMPT = "gated_prompt_attention", 10
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


def inputs_of(cell: Cell, device: torch.device) -> GatedInputs:
    """As of attention over a prefix. The prompt's values and the result's gradient have a mean, so that the gradient of
    one gate is no difference of nearly equal sums; gates are open, a quarter to three quarters."""
    sizes = (getattr(cell, name) for name in SIZES.split(","))
    inputs = prefix.inputs_of(prefix.Cell(cell.name, *sizes, cell.dtype), device)
    inputs.pv.add_(MEAN_OF_PROMPT)
    inputs.grad.add_(SUM_OF_GRADIENT / inputs.grad.numel() ** 0.5)
    gate = torch.linspace(0.25, 0.75, cell.gates) if cell.gates > 1 else torch.tensor([0.4])
    return GatedInputs(**vars(inputs), gate=gate.to(device, DTYPES[cell.dtype]))


def _gated(of: prefix.Cell, per_head: bool = False) -> Cell:
    """With one gate, or one for each head, as in the paper."""
    sizes = (getattr(of, name) for name in SIZES.split(","))
    return Cell(of.name, *sizes, of.dtype, gates=of.H if per_head else 1)


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's grouped heads first, at every length; then as many key heads as heads, with a gate for each."""
    if tiny:
        return [[Cell("tiny", 2, 4, 2, 96, PROMPT, 32, "bf16"), Cell("tiny-mha", 2, 4, 4, 64, PROMPT, 32, "bf16", 4)]]
    grouped, single = (prefix.at_lengths(name, [PROMPT]) for name in ("llama3-8b", "llama2-7b"))
    single = [_gated(cell, per_head=True) for cell in single]
    return [list(map(_gated, grouped)), single[:1], single[1:]]


def cells(request: Request) -> list[Cell]:
    """Of each shape with every prompt length asked for (10)."""
    prefix.refuse_grid(request, OP)
    for name in request.shapes:
        if isinstance(name, str) and (GEOMETRIES[name].alibi or not GEOMETRIES[name].causal):
            raise FastpeftError(f"--shape {name}: LLaMA-Adapter is for decoders, and not for BLOOM's attention")
    found = [
        prefix.of_geometry(*each, length, request.data_type)
        for length in request.prefixes or (PROMPT,)
        for each in prefix.usual_lengths(request).named("tiny")
    ]
    found += [prefix.Cell("given", *sizes, request.data_type) for sizes in prefix.attention_numbers(request)]
    return [_gated(cell, request.per_head) for cell in found]


UNDERSTANDS = ("prefix", "batch", "seq", "per_head")
BENCH = Bench(OP, Cell, inputs_of, GatedTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS, compiled_cells=1)
