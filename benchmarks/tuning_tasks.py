"""What `fastpeft tune` asks of a GPU, the most valuable first: per task one bucket of calls, its tensors, the variants
that may serve it, and how each is checked against float64.

Shapes are Llama-3-8B's and their rows, ranks and adapter dtypes; prefixes over its grouped heads. A rehearsal has tiny
ones in fp32, which is what the interpreter multiplies rightly.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastpeft import dispatch, tables
from fastpeft.ops._prefix_attention_scores import Scores, Tensors
from fastpeft.ops.lora_linear import lora_linear
from fastpeft.ops.prefix_attention import prefix_attention, prefix_attention_reference
from fastpeft.plans import ATTENTION_STRATEGIES, Plan
from fastpeft.table_file import AttentionTileBucket, TileBucket

from . import lora_linear_peers, prefix_attention_truth
from .accuracy import MAX_RMS_RATIO, Expected, Verdict, judge
from .harness import Call
from .lora_linear_truth import LoraTruth
from .prefix_attention_peers import ACTIVATIONS, FLASH_RMS_RATIO
from .prefix_attention_truth import FP32_FLOOR, PrefixTruth
from .rows import PASS_MS

SCALING = 0.75
PROJECTIONS = {"q/o": (4096, 4096), "gate/up": (4096, 14336), "down": (14336, 4096), "k/v": (4096, 1024)}  # K, N
ROWS, FEWER_ROWS = 8192, (2048, 64, 8, 1)
RANKS = (16, 64, 128, 32)
DROPOUT = 0.05
HEADS = (8, 32, 8)  # batch, query heads, key heads
LENGTHS, PREFIXES, DEPTH = (2048, 512, 8192, 128), (30, 100, 10, 200), 128

PARTS = {"forward": PASS_MS["fwd"], "backward": PASS_MS["bwd"], "total": PASS_MS["fwd+bwd"]}  # of a sample


def forced(forward: str, backward: str, reads: int | None = None) -> Callable[[], Any]:
    """A context for ours, on the kernels by these strategies and reads of dY. Decode cannot be forced: it is the rules'
    for a step of generation, and no table stands before them here."""

    @contextlib.contextmanager
    def context():
        with dispatch.backend("triton"), dispatch.override_plan(Plan(forward, backward, "on trial", reads)):
            yield

    return context


class ForwardCall(Call):
    """One whose backward nobody asks for: a step of generation."""

    def run_backward(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()


class Prepared(NamedTuple):
    """A task with its tensors: `call(forward, backward)` binds them to strategies, `problems(call, forward)` says what
    is wrong with it. predicted: the strategy of each part that the rules choose; each part is chosen for itself.
    reads: how often dY may be read for dB and T, as `call`'s third argument; the rule's first."""

    bucket: Any
    call: Callable[..., Call]
    problems: Callable[[Call, str], list[str]]
    strategies: tuple[str, ...]
    predicted: dict[str, str]
    reads: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoraTask:
    """x [M, K], weight [N, K]; `tiles`: those of the kernels that run are tried here, too."""

    M: int
    K: int
    N: int
    rank: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: float = 0.0
    tiles: bool = False
    op = "lora_linear"

    @property
    def id(self) -> str:
        types = "/".join(str(t).removeprefix("torch.") for t in dict.fromkeys((self.dtype, self.adapter_dtype)))
        return f"lora_linear M={self.M} K={self.K} N={self.N} r={self.rank} p={self.dropout:g} {types}"

    def bucket(self):
        sizes = (self.M, self.K, self.N, self.rank)
        return tables.lora_bucket(self.dtype, self.adapter_dtype, *sizes, self.dropout)

    def prepare(self, device: torch.device) -> Prepared:
        from fastpeft.ops._lora_linear_triton import ONE_READ_RANK

        def draw(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator, device=device) * scale

        generator = torch.Generator(device=device).manual_seed(7)
        inputs = lora_linear_peers.Inputs(
            x=draw(self.M, self.K).to(self.dtype),
            weight=draw(self.N, self.K, self.K**-0.5).to(self.dtype),
            grad=draw(self.M, self.N).to(self.dtype),
            lora_a=draw(self.rank, self.K, self.K**-0.5),
            lora_b=draw(self.N, self.rank, self.rank**-0.5),
            scaling=SCALING,
            dropout=self.dropout,
        )
        truth = LoraTruth(inputs.x, inputs.weight, inputs.grad, SCALING, self.dropout)

        def call(strategy: str, backward: str, reads: int | None = None) -> Call:
            leaves = inputs.leaves(self.adapter_dtype)

            def forward():
                x, a, b = leaves.values()
                return lora_linear(x, inputs.weight, None, a, b, SCALING, dropout=self.dropout, training=True)

            context = forced(strategy, backward, reads)
            return Call(forward, leaves, inputs.grad, {"weight": inputs.weight}, context=context)

        def problems(call: Call, strategy: str) -> list[str]:
            return truth.verify(call, MAX_RMS_RATIO).problems

        plan = dispatch.predicted_lora_plan(device, self.M)
        predicted = {"forward": plan.forward, "backward": plan.backward}
        reads = (1, 2) if self.rank <= ONE_READ_RANK else ()
        strategies = lora_linear_peers.strategies_of(inputs.x, inputs.weight, self.adapter_dtype)
        return Prepared(self.bucket(), call, problems, strategies, predicted, reads)


@dataclass(frozen=True)
class PrefixTask:
    """q (B, H, S, D) that are the last of T keys, (B, Hkv, T, D), behind P virtual ones; causal. With S = 1 a step of
    generation, forward only; else S = T."""

    B: int
    H: int
    Hkv: int
    S: int
    T: int
    P: int
    D: int
    dtype: torch.dtype
    tiles: bool = False
    op = "prefix_attention"

    @property
    def id(self) -> str:
        sizes = " ".join(f"{name}={getattr(self, name)}" for name in ("B", "H", "Hkv", "S", "T", "P", "D"))
        return f"prefix_attention {sizes} {str(self.dtype).removeprefix('torch.')}"

    def tensors(self, device: torch.device | str) -> tuple[Tensors, Scores]:
        generator = None if device == "meta" else torch.Generator(device=device).manual_seed(7)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        q = draw(self.B, self.S, self.H, self.D).transpose(1, 2)
        k, v = (draw(self.B, self.T, self.Hkv, self.D).transpose(1, 2) for _ in range(2))
        pk, pv = (draw(1, self.Hkv, self.P, self.D) for _ in range(2))
        scores = Scores(causal=True, scale=self.D**-0.5, start=self.T - self.S)
        return Tensors(q, k, v, pk, pv, None, None, None), scores

    def bucket(self):
        return tables.prefix_bucket(*self.tensors("meta"), 0.0)

    def prepare(self, device: torch.device) -> Prepared:
        tensors, scores = self.tensors(device)
        strategies = ("decode", *ATTENTION_STRATEGIES) if self.S == 1 else ATTENTION_STRATEGIES
        strategies = tuple(s for s in strategies if not dispatch.strategy_refusal(s, tensors, scores, 0.0))
        predicted = {"total": dispatch.predicted_attention_plan(tensors, scores, 0.0).forward}
        bind = self._decoding if self.S == 1 else self._training
        call, verify = bind(tensors, scores, device)

        def problems(call: Call, strategy: str) -> list[str]:
            return verify(call, MAX_RMS_RATIO if strategy in ("fused", "decode") else FLASH_RMS_RATIO).problems

        return Prepared(self.bucket(), call, problems, strategies, predicted)

    def _training(self, tensors: Tensors, scores: Scores, device: torch.device):
        q, k, v, pk, pv, *_ = tensors
        grad = torch.randn_like(q)
        inputs = prefix_attention_truth.Inputs(q=q, k=k, v=v, pk=pk[0], pv=pv[0], grad=grad)
        truth = PrefixTruth(inputs)

        def call(strategy: str, backward: str) -> Call:
            leaves = inputs.leaves()
            forward = {"forward": lambda: prefix_attention(*leaves.values()), "leaves": leaves, "grad": grad}
            return Call(**forward, context=forced(strategy, backward), activations=ACTIVATIONS)

        return call, truth.verify

    def _decoding(self, tensors: Tensors, scores: Scores, device: torch.device):
        wide = Tensors(*(None if t is None else t.double() for t in tensors))
        exact = prefix_attention_reference(wide, scores)
        floor = FP32_FLOOR if self.dtype == torch.float32 else 0.0
        expected = Expected("out", prefix_attention_reference(tensors, scores), exact, floor=floor)

        def call(strategy: str, backward: str) -> Call:
            def forward():
                with torch.no_grad():
                    return prefix_attention(*tensors[:5])

            return ForwardCall(forward, {}, tensors.q_BHSD, context=forced(strategy, backward), activations=())

        def verify(call: Call, max_rms_ratio: float) -> Verdict:
            verdict = Verdict()
            judge(verdict, "out", call.run()[0], expected, max_rms_ratio, "the prefix's part")
            return verdict

        return call, verify


@contextlib.contextmanager
def tiles_asked() -> Iterator[set]:
    """Yields a set that fills with the tile buckets that launches within the block ask for."""
    from fastpeft.kernels import (
        _attention_tiles,
        _prefix_attention_decode,
        _tiles,
        lora_gemm,
        lora_linear,
        prefix_attention,
    )

    asked = set()

    def recorder(function, kind):
        def ask(kernel, size, mode, burden, family):
            asked.add(kind(kernel, tables.block(size), mode, burden))
            return function(kernel, size, mode, burden, family)

        return ask

    attention = recorder(_attention_tiles.attention_tiles, AttentionTileBucket)
    _tiles.forget()  # a launch that is known asks for nothing
    with (
        mock.patch.object(lora_linear, "tiles_for", recorder(_tiles.tiles_for, TileBucket)),
        mock.patch.object(lora_gemm, "optional_tiles", recorder(_tiles.optional_tiles, TileBucket)),
        mock.patch.object(prefix_attention, "attention_tiles", attention),
        mock.patch.object(_prefix_attention_decode, "attention_tiles", attention),
    ):
        yield asked


def tile_module(bucket):
    """The kernels' table that a tile bucket is of."""
    from fastpeft.kernels import _attention_tiles, _tiles

    return _tiles if isinstance(bucket, TileBucket) else _attention_tiles


def candidates(bucket, device: torch.device) -> dict[str, dict[str, int]]:
    """name -> the numbers of each tile that may serve the bucket, the predicted one first."""
    from fastpeft.kernels._tiles import family_of

    found = tile_module(bucket).candidates(*bucket, family_of(device))
    return {" ".join(f"{n}={v}" for n, v in tiles._asdict().items() if v): tiles._asdict() for tiles in found}


def with_tiles(call: Call, device: torch.device, rows: dict) -> Call:
    """The call by these tiles: bucket -> numbers, in front of the predicted ones."""
    from fastpeft.kernels import _attention_tiles, _tiles

    name, family = f"tuning {sorted(map(repr, rows.items()))}", _tiles.family_of(device)
    for module in (_tiles, _attention_tiles):
        module.register(name, family, [
            module.measured_row(*bucket, numbers, family)
            for bucket, numbers in rows.items() if tile_module(bucket) is module
        ])  # fmt: skip

    @contextlib.contextmanager
    def context():
        _tiles.adopt(device, name)
        try:
            with call.context():
                yield
        finally:
            _tiles.adopt(device, None)

    return replace(call, context=context)


def lora_tasks() -> list[LoraTask]:
    """Of a GPU: fp32 adapters (peft's default) before half ones, rank 16 before others, many rows before few."""
    half, full = torch.bfloat16, torch.float32
    tasks = []
    for rank in RANKS:
        for dropout in (0.0, DROPOUT):
            for projection, sizes in PROJECTIONS.items():
                tiles = rank in (16, 64) and projection == "q/o"
                tasks += [LoraTask(ROWS, *sizes, rank, half, adapter, dropout, tiles) for adapter in (full, half)]
        if rank == RANKS[0]:
            few = [(rows, sizes) for rows in FEWER_ROWS for sizes in PROJECTIONS.values()]
            tasks += [LoraTask(rows, *sizes, rank, half, adapter) for rows, sizes in few for adapter in (full, half)]
    return tasks


def prefix_tasks() -> list[PrefixTask]:
    """Of a GPU: 30 virtual tokens at every length, steps of generation, then other prefixes."""
    half, tasks = torch.bfloat16, []
    for prefix in PREFIXES:
        first = prefix == PREFIXES[0]
        tasks += [PrefixTask(*HEADS, s, s, prefix, DEPTH, half, first and s == LENGTHS[0]) for s in LENGTHS]
        tasks += [PrefixTask(*HEADS, 1, t, prefix, DEPTH, half, first and t == 2048) for t in (2048, 512)]
    return tasks


def rehearsal_tasks() -> list:
    """Tiny ones, of each kind one, no longer than a tile."""
    full = torch.float32
    return [
        LoraTask(12, 16, 12, 8, full, full, tiles=True),
        PrefixTask(1, 2, 1, 12, 12, 4, 16, full),
        PrefixTask(1, 2, 1, 1, 12, 4, 16, full, tiles=True),
    ]


def all_tasks(op: str) -> list:
    """Of one op or, in turns, of both; no bucket twice."""
    lora = lora_tasks() if op in ("lora", "all") else []
    prefix = prefix_tasks() if op in ("prefix", "all") else []
    found = {}
    for task in (task for pair in zip_longest(lora, prefix) for task in pair if task is not None):
        found.setdefault(task.bucket(), task)
    return list(found.values())


def tasks_of_shape(sizes: tuple[int, ...]) -> list:
    """Of a shape given as M,K,N or B,H,Hkv,S,P,D."""
    half, full = torch.bfloat16, torch.float32
    if len(sizes) == 3:
        kinds = [(adapter, dropout) for dropout in (0.0, DROPOUT) for adapter in (full, half)]
        return [LoraTask(*sizes, RANKS[0], half, *kind) for kind in kinds]
    batch, heads, kv_heads, length, prefix, depth = sizes
    return [PrefixTask(batch, heads, kv_heads, length, length, prefix, depth, half)]
