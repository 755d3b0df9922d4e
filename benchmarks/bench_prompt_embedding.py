"""A prompt in front of the tokens' embeddings (prompt tuning, P-tuning) against its peers: forward and backward, no
figure without a check.

`tiers` lists the cells, the most important first; `cells` those that a command line asks for; `BENCH` says how a cell
is run: `fastpeft bench prompt`.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastpeft import cost
from fastpeft.errors import FastpeftError

from .bench_prefix_attention import refuse_grid
from .dtypes import DTYPES
from .prompt_embedding_peers import ADAPTER, IMPLEMENTATIONS
from .prompt_embedding_truth import Inputs, PromptTruth
from .request import Request
from .runner import Bench

OP, SIZES = "prompt_embedding", "B,S,P,hidden"
PROMPT, OTHER_PROMPTS = 30, (10, 100)
VOCABULARY = 32000  # of a shape by numbers


@dataclass(frozen=True)
class Cell:
    """Prompt (P, hidden) in fp32 in front of S tokens of B samples, from a frozen table (vocabulary, hidden)."""

    name: str
    B: int
    S: int
    P: int
    hidden: int
    vocabulary: int
    dtype: str
    compiled: bool = False
    dropout: float = 0.0

    @property
    def id(self) -> str:
        return " ".join([self.name, *(f"{name}={size}" for name, size in self.sizes().items()), self.dtype])

    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in (*SIZES.split(","), "vocabulary")}

    def shape(self) -> dict:
        return {"name": self.name, **self.sizes()}

    def work(self, frozen: bool, passed: str) -> cost.Work:
        sizes = {name: getattr(self, name) for name in SIZES.split(",")} | ({"P": 0} if frozen else {})
        return cost.prompt_embedding(passed, **sizes, itemsize=DTYPES[self.dtype].itemsize)


def inputs_of(cell: Cell, device: torch.device) -> Inputs:
    """Of unit variance; the tokens are drawn from the whole table, whose rows no cache then holds."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(cell.id.encode()))

    def draw(*shape: int, dtype: torch.dtype = DTYPES[cell.dtype]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return Inputs(
        ids=torch.randint(cell.vocabulary, (cell.B, cell.S), generator=generator, device=device),
        table=draw(cell.vocabulary, cell.hidden),
        prompt=draw(cell.P, cell.hidden, dtype=ADAPTER),
        grad=draw(cell.B, cell.P + cell.S, cell.hidden),
    )


def _named(request: Request, prompts: Iterable[int]) -> list[Cell]:
    return [
        Cell(name, of.batch, of.seq, prompt, of.hidden, of.vocabulary, request.data_type)
        for prompt in prompts
        for name, of in request.named("tiny" if request.tiny else "llama3-8b")
    ]


def tiers(tiny: bool) -> list[list[Cell]]:
    """Llama's embeddings with 30 virtual tokens first, then with fewer and with more."""
    if tiny:
        return [_named(Request(tiny=True, dtype="bf16"), [PROMPT])]
    return [_named(Request(), [PROMPT]), _named(Request(), OTHER_PROMPTS)]


def cells(request: Request) -> list[Cell]:
    """Of each shape with every prompt length asked for (30)."""
    refuse_grid(request, OP)
    given = request.numbers(SIZES)
    if given and request.prefixes:
        shape = ",".join(map(str, given[0]))
        raise FastpeftError(f"--prefix is for shapes by name: {shape} is {SIZES} already")
    found = _named(request, request.prefixes or (PROMPT,))
    return found + [Cell("given", *sizes, VOCABULARY, request.data_type) for sizes in given]


UNDERSTANDS = ("prefix", "batch", "seq")
BENCH = Bench(OP, Cell, inputs_of, PromptTruth, IMPLEMENTATIONS, tiers, cells, SIZES, UNDERSTANDS, compiled_cells=1)
