"""Attention over a learned prefix and a sequence against its peers: forward and backward, no figure without a check.

`tiers` lists the cells, the most important first; `BENCH` says how a cell is run; `main` is the command line, also
behind `fastpeft bench prefix`.
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from . import command
from .command import DTYPES, whole_numbers
from .prefix_attention_peers import IMPLEMENTATIONS
from .prefix_attention_truth import Inputs, PrefixTruth
from .runner import Bench

OP = "prefix_attention"
SIZES = "B,H,Hkv,S,P,D"
LLAMA, MHA = (8, 32, 8), (8, 32, 32)  # batch, heads, key-value heads
# name: B, H, Hkv, S, P, D
SHAPES = {f"llama-{s}": (*LLAMA, s, 30, 128) for s in (2048, 512, 8192)}
SHAPES |= {
    "bloom-560m": (8, 16, 16, 64, 30, 64),  # ALiBi
    "cartridge": (*LLAMA, 512, 2048, 128),
    **{f"mha-{s}": (*MHA, s, 30, 128) for s in (2048, 512, 8192)},
}
ALIBI = ("bloom-560m", "tiny-alibi")
PREFIXES = (100, 10, 200)  # of the llama shapes, besides 30
TINY_SHAPES = {"tiny": (2, 4, 2, 96, 30, 32), "tiny-alibi": (2, 4, 4, 64, 30, 64)}


@dataclass(frozen=True)
class Cell:
    """q (B, H, S, D), k and v (B, Hkv, S, D), prefix (Hkv, P, D), causal. `compiled`: torch.compile takes part here."""

    name: str
    B: int
    H: int
    Hkv: int
    S: int
    P: int
    D: int
    dtype: str
    alibi: bool = False
    compiled: bool = False
    dropout: float = 0.0

    @property
    def id(self) -> str:
        return " ".join(
            [self.name, *(f"{key}={value}" for key, value in self.shape().items() if key != "name"), self.dtype]
        )

    def shape(self) -> dict:
        sizes = {name: getattr(self, name) for name in SIZES.split(",")}
        return {"name": self.name, **sizes, "alibi": int(self.alibi)}

    def flops(self, frozen: bool) -> int:
        """Two products forward and five backward, over the causal half of the sequence and all of the prefix."""
        keys = self.S if frozen else self.S + 2 * self.P
        return 7 * self.B * self.H * self.D * self.S * keys

    def bytes(self, frozen: bool) -> int:
        """The least that a forward and backward move: q, k, v read and out written; then q, k, v, out and its gradient
        read, dq, dk, dv written; the prefix, shared by the batch, read twice and its gradients written."""
        prefix = 0 if frozen else 6 * self.P * self.Hkv * self.D
        return DTYPES[self.dtype].itemsize * (6 * self.B * self.S * (self.H + self.Hkv) * self.D + prefix)


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
    )


def _cell(name: str, sizes: Sequence[int], dtype: str = "bf16") -> Cell:
    return Cell(name, *sizes, dtype, alibi=name in ALIBI)


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's grouped heads with 30 virtual tokens first, at every length; then the other models and prefixes."""
    if tiny:
        return [[_cell(name, sizes) for name, sizes in TINY_SHAPES.items()]]
    named = {name: _cell(name, sizes) for name, sizes in SHAPES.items()}
    first = [cell for name, cell in named.items() if name.startswith("llama")]
    others = [[cell] for name, cell in named.items() if not name.startswith("llama")]
    more = [
        [Cell(**{**{f.name: getattr(cell, f.name) for f in fields(cell)}, "P": prefix}) for cell in first]
        for prefix in PREFIXES
    ]
    return [first, *others[:2], more[0], *others[2:], *more[1:]]


BENCH = Bench(OP, Cell, inputs_of, PrefixTruth, IMPLEMENTATIONS, tiers, compiled_cells=2)


def shape_of(text: str, known: Mapping[str, Sequence[int]]) -> tuple[str, Sequence[int]]:
    """A name of `known`, or B,H,Hkv,S,P,D."""
    if text in known:
        return text, known[text]
    if not text[:1].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(known)} nor {SIZES}")
    sizes = whole_numbers(text, SIZES)
    if sizes[1] % sizes[2]:
        raise argparse.ArgumentTypeError(f"{text!r}: H = {sizes[1]} is no multiple of Hkv = {sizes[2]}")
    return "given", sizes


def _shape(text: str) -> tuple[str, Sequence[int]]:
    return shape_of(text, SHAPES | TINY_SHAPES)


def _prefix(text: str) -> int:
    return whole_numbers(text, "P")[0]


def add_sizes(parser: argparse.ArgumentParser, shape: Callable, named: Mapping[str, Sequence[int]]) -> None:
    """--shape, --prefix and what all benches have."""
    parser.add_argument("--shape", type=shape, action="append", metavar=f"NAME|{SIZES}", help=", ".join(named))
    parser.add_argument("--prefix", type=_prefix, action="append", metavar="P", help="in place of the shapes' own")
    command.add_options(parser)


def sizes_of(arguments: argparse.Namespace, known: Mapping[str, Sequence[int]]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, sizes) of every cell asked for: the shapes given, or of those `known`, with every prefix given."""
    shapes = arguments.shape or list(known.items())[: 1 if arguments.quick else None]
    return [
        (name, (*sizes[:4], prefix, sizes[5])) for name, sizes in shapes for prefix in arguments.prefix or (sizes[4],)
    ]


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="bench prefix", description="Time attention over a prefix against its peers.")
    add_sizes(out, _shape, SHAPES)
    return out


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    shapes = sizes_of(arguments, TINY_SHAPES if arguments.device == "cpu" else SHAPES)
    return [_cell(name, sizes, arguments.dtype) for name, sizes in shapes]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `command.main` for the status."""
    return command.main(BENCH, parser(), _cells, argv)


if __name__ == "__main__":
    sys.exit(main())
