"""Attention over a learned prefix and a sequence against its peers: forward and backward, no figure without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench prefix`.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from .dtypes import DTYPES
from .geometry import GEOMETRIES, GRID, Geometry
from .prefix_attention_peers import IMPLEMENTATIONS
from .prefix_attention_truth import Inputs, PrefixTruth
from .request import Request
from .runner import Bench

OP, SIZES = "prefix_attention", "B,H,Hkv,S,P,D"
BATCH, LENGTHS, PREFIX = 8, (2048, 512, 8192), 30
PREFIXES = (100, 10, 200)  # of the grouped heads, besides 30
CARTRIDGE = 2048  # virtual tokens of a learned context, on 512 of the sequence


@dataclass(frozen=True)
class Cell:
    """q (B, H, S, D), k and v (B, Hkv, S, D), prefix (Hkv, P, D). `compiled`: torch.compile takes part here."""

    name: str
    B: int
    H: int
    Hkv: int
    S: int
    P: int
    D: int
    dtype: str
    alibi: bool = False
    causal: bool = True
    compiled: bool = False
    dropout: float = 0.0

    @property
    def id(self) -> str:
        return " ".join(
            [self.name, *(f"{key}={value}" for key, value in self.shape().items() if key != "name"), self.dtype]
        )

    def shape(self) -> dict:
        sizes = {name: getattr(self, name) for name in SIZES.split(",")}
        return {"name": self.name, **sizes, "alibi": int(self.alibi), "causal": int(self.causal)}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        sizes = {name: getattr(self, name) for name in SIZES.split(",")} | ({"P": 0} if frozen else {})
        return cost.prefix_attention(passed, **sizes, itemsize=DTYPES[self.dtype].itemsize, causal=self.causal)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """Of unit variance; the strides of a model's projections: heads beside each other."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(cell.id.encode()))
    dtype = DTYPES[cell.dtype]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    slopes = 2.0 ** -(8.0 / cell.H * torch.arange(1, cell.H + 1, device=device)) if cell.alibi else None
    return Inputs(
        q=draw(cell.B, cell.S, cell.H, cell.D).transpose(1, 2),
        k=draw(cell.B, cell.S, cell.Hkv, cell.D).transpose(1, 2),
        v=draw(cell.B, cell.S, cell.Hkv, cell.D).transpose(1, 2),
        pk=draw(cell.Hkv, cell.P, cell.D),
        pv=draw(cell.Hkv, cell.P, cell.D),
        grad=draw(cell.B, cell.S, cell.H, cell.D).transpose(1, 2),
        slopes=slopes,
        causal=cell.causal,
    )


def of_geometry(name: str, geometry: Geometry, prefix: int, dtype: str) -> Cell:
    heads = (geometry.heads, geometry.kv_heads, geometry.seq, prefix, geometry.depth)
    return Cell(name, geometry.batch, *heads, dtype, alibi=geometry.alibi, causal=geometry.causal)


def at_lengths(name: str, prefixes: Iterable[int], lengths: Sequence[int] = LENGTHS) -> list[Cell]:
    """A model's heads in batches of 8, in bf16."""
    request = Request((name,), (BATCH,), tuple(lengths))
    return [of_geometry(*found, prefix, "bf16") for prefix in prefixes for found in request.named()]


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's grouped heads with 30 virtual tokens first, at every length; then the other models and prefixes."""
    if tiny:
        alibi = Cell("tiny-alibi", 2, 4, 4, 64, 30, 64, "bf16", alibi=True)
        return [[Cell("tiny", 2, 4, 2, 96, PREFIX, 32, "bf16"), alibi]]
    bloom = at_lengths("bloom-560m", [PREFIX], [GEOMETRIES["bloom-560m"].seq])
    cartridge = at_lengths("llama3-8b", [CARTRIDGE], [512])
    first, second, third = ([prefix] for prefix in PREFIXES)
    return [
        at_lengths("llama3-8b", [PREFIX]),
        bloom,
        cartridge,
        at_lengths("llama3-8b", first),
        at_lengths("llama2-7b", [PREFIX]),
        at_lengths("llama3-8b", second),
        at_lengths("llama3-8b", third),
    ]


def cells(request: Request) -> list[Cell]:
    """Of each shape with every prefix asked for (30)."""
    refuse_grid(request, OP)
    prefixes, dtype = request.prefixes or (PREFIX,), request.data_type
    named = usual_lengths(request).named("tiny")
    found = [of_geometry(*each, prefix, dtype) for prefix in prefixes for each in named]
    return found + [Cell("given", *numbers, dtype) for numbers in attention_numbers(request)]


def usual_lengths(request: Request) -> Request:
    """Where no shape is asked for, and a GPU is there: Llama at several lengths."""
    if request.shapes or request.tiny:
        return request
    return replace(request, shapes=("llama3-8b",), seqs=request.seqs or tuple(request.first(list(LENGTHS))))


def refuse_grid(request: Request, op: str) -> None:
    """Raises FastpeftError for a shape that has linear layers alone."""
    if GRID in request.shapes:
        raise FastpeftError(
            f"--shape {GRID} is of linear layers: {op} has none of them; it is for `fastpeft bench lora`"
        )


def attention_numbers(request: Request) -> list[tuple[int, ...]]:
    """Raises FastpeftError where key heads do not divide the heads, or a prefix is asked for beside the shape's own."""
    found = request.numbers(SIZES)
    for sizes in found:
        given = ",".join(map(str, sizes))
        if sizes[1] % sizes[2]:
            raise FastpeftError(f"--shape {given}: H = {sizes[1]} is no multiple of Hkv = {sizes[2]}")
        if request.prefixes:
            raise FastpeftError(f"--prefix is for shapes by name: {given} is {SIZES} already")
    return found


UNDERSTANDS = ("prefix", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, PrefixTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS, compiled_cells=2)
