"""The tiles that `fastpeft tune` tries beside the predicted ones, for the compile gate: each candidate in every launch
of its op that it would serve."""

import itertools

import torch

from fastpeft.kernels import _attention_tiles, _tiles
from fastpeft.kernels._common import dot_mode, rank_block
from tests.aot import Case
from tests.ops import aot_lora_gemm, aot_lora_linear, aot_prefix_attention

META = torch.device("meta")  # on which the recorded launches are


def _with_each(module, launch, key: tuple) -> None:
    """`launch` once for each kernel and each of its candidates but the first, which is the predicted one."""
    family = _tiles.family_of(META)
    for kernel in (*module.KERNELS, *getattr(module, "OPTIONAL", ())):
        for tiles in module.candidates(kernel, *key, family)[1:]:
            row = module.measured_row(kernel, *key, tiles._asdict(), family)
            for each in (_tiles, _attention_tiles):
                each.register("candidate", family, [row] if each is module else [])
            _tiles.adopt(META, "candidate")
            try:
                launch()
            finally:
                _tiles.adopt(META, None)


def _lora_case(dtypes: str, rank: int, dropout: float) -> Case:
    mode = dot_mode(*aot_lora_linear.DTYPES[dtypes])

    def run():
        def launch():
            aot_lora_linear.launch_all(dtypes, rank, dropout, rows=(aot_lora_linear.MANY,))
            aot_lora_gemm.launch_all(dtypes, rank, dropout)

        for burdened in (False, True):  # also without dropout there are burdened launches: an fp32 result
            _with_each(_tiles, launch, (rank_block(rank), mode, burdened))

    return Case(f"tiles r{rank} {dtypes}" + " dropout" * bool(dropout), run)


def _attention_case(depth: int) -> Case:
    dtype = torch.bfloat16

    def run():
        def launch():
            aot_prefix_attention.launch_all(dtype, depth, "plain", 30, merge=True)
            aot_prefix_attention.launch_decode(dtype, depth, "plain", 30)

        for burdened in (False, True):
            _with_each(_attention_tiles, launch, (depth, "half", burdened))

    return Case(f"tiles d{depth} bf16", run)


def cases():
    for dtypes, rank, dropout in itertools.product(("bf16", "bf16-fp32"), (16, 64), (0.0, 0.1)):
        yield _lora_case(dtypes, rank, dropout)
    for depth in (64, 128):
        yield _attention_case(depth)
