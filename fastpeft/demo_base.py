"""The demo's models: a small Llama brought up here on English, or the user's own from a directory."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastpeft.demo_corpus import Encode, Tokens
from fastpeft.demo_train import Run, Schedule, train
from fastpeft.errors import FastpeftError
from fastpeft.local_model import load_causal_model, loading


@dataclass(frozen=True)
class Scale:
    """The sizes of a demo. The learning rates were chosen by held-out loss at the first of the three."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 1024
    sequence: int = 128
    batch: int = 8
    pretraining_steps: int = 400
    pretraining_rate: float = 2e-3
    steps: int = 200
    rate: float = 3e-3
    rank: int = 16
    block: int = 10  # steps that one run takes before it is another's turn
    characters: int = 1_500_000  # of each text
    held_out_rows: int = 64


ON_CPU = Scale()
QUICK = Scale(
    hidden=64, vocabulary=512, sequence=64, pretraining_steps=80, steps=40, characters=150_000, held_out_rows=32
)
ON_GPU = Scale(
    hidden=2048, layers=16, heads=32, kv_heads=8, vocabulary=4096, sequence=1024, pretraining_steps=150,
    pretraining_rate=3e-4, steps=100, rate=5e-4, characters=4_000_000, held_out_rows=32,
)  # fmt: skip
ON_SMALL_GPU = replace(ON_GPU, hidden=1024, heads=16, kv_heads=4, batch=4)
LARGE_GPU_BYTES = 40 * 2**30  # the large Llama's training in fp32 takes 12 GiB for weights and moments alone
OWN_MODEL_RATE = 5e-4
OWN_MODEL_STEPS = 60


@dataclass(frozen=True)
class Base:
    """A model before fine-tuning; `make` gives a fresh copy with the same weights each time."""

    name: str
    make: Callable[[], nn.Module]


class AutocastRun(Run):
    """Products in bf16. One block for each forward: autocast keeps the weights it has cast until its block ends."""

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            return super().loss(batch)


def base_dtype(device: torch.device) -> torch.dtype:
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if half else torch.float32


def pretrained_llama(english: Tokens, scale: Scale, device: torch.device, seed: int, advance) -> Base:
    """A Llama of this scale, from random weights in fp32 (with bf16 autocast on a GPU), then in the base's dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=scale.vocabulary, hidden_size=scale.hidden, intermediate_size=3 * scale.hidden,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, num_key_value_heads=scale.kv_heads,
        max_position_embeddings=2 * scale.sequence, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    with device:
        model = LlamaForCausalLM(config)
    starts = english.starts(scale.pretraining_steps, scale.batch, scale.sequence, seed)
    schedule = Schedule(english.training, starts, scale.sequence, scale.pretraining_rate, device, clip=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    kind = AutocastRun if base_dtype(device) == torch.bfloat16 else Run
    train([kind("base", model, optimizer)], schedule, scale.block, seed, advance)
    model.to(base_dtype(device)).eval()
    return Base("Llama", lambda: copy.deepcopy(model))


def own_model(path: Path, device: torch.device) -> tuple[Base, Encode, int | None, int]:
    """(base, encode, end token or None, longest sequence) of a transformers directory with weights and tokenizer.

    Raises FastpeftError if there is none, or it cannot be loaded.
    """
    model = load_causal_model(path, device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    from transformers import AutoTokenizer

    with loading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)

    def encode(documents) -> list[list[int]]:
        ids = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        largest = max((max(one) for one in ids if one), default=0)
        if largest >= vocabulary:
            raise FastpeftError(
                f"--model {path}: its tokenizer gives token {largest}, its model knows {vocabulary}; give a directory "
                "that has the model's own"
            )
        return ids

    name = f"{type(model).__name__} from {path}"
    return Base(name, lambda: load_causal_model(path, device)), encode, tokenizer.eos_token_id, longest
