"""What `prompt_embedding` launches, for the compile gate: ids or embeddings, prompts shared or by sample."""

import itertools

import torch

from fastpeft.ops import _prompt_embedding_triton as path
from tests.aot import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {  # table, prompt
    "bf16": (BF16, BF16),
    "bf16-fp32": (BF16, FP32),
    "fp16": (FP16, FP16),
    "fp16-fp32": (FP16, FP32),
    "fp32": (FP32, FP32),
}
ENTRIES = 128256
# Batch, tokens, virtual tokens, hidden size: a training step; one of everything; rows that begin at no multiple of 16
# bytes; rows that are shorter than a block.
SHAPES = {"llama": (4, 2048, 30, 4096), "one": (1, 1, 1, 4096), "odd": (3, 77, 5, 4095), "short": (64, 128, 100, 48)}
QUICK = {("bf16-fp32", "llama"): ("sm_90", "gfx942")}


def _meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_all(dtypes: str, batch: int, tokens: int, count: int, hidden: int) -> None:
    """Forward from ids and from embeddings, with a prompt of either kind, and backward."""
    data, adapter = DTYPES[dtypes]
    embeds, table = _meta(batch, tokens, hidden, dtype=data), _meta(ENTRIES, hidden, dtype=data)
    for shape in ((count, hidden), (batch, count, hidden)):
        prompt = _meta(*shape, dtype=adapter)
        for kind in (torch.int32, torch.int64):
            path.forward(_meta(batch, tokens, dtype=kind), table, prompt)
        out = path.forward(None, embeds, prompt)
        start = _meta(batch, dtype=torch.int64)
        path.forward(_meta(batch, tokens, dtype=torch.int64), table, prompt, start)
        path.forward(None, embeds, prompt, start)
    path.grad_prompt(out, count, adapter)
    path.grad_prompt(out, count, adapter, start)


def cases():
    rounded = [("bf16-fp32", name) for name in SHAPES]
    for dtypes, name in dict.fromkeys([*rounded, ("fp32", "odd"), *itertools.product(DTYPES, ["llama"])]):

        def run(dtypes=dtypes, name=name):
            launch_all(dtypes, *SHAPES[name])

        yield Case(f"prompt_embedding {dtypes} {name}", run, quick=QUICK.get((dtypes, name), ()))
