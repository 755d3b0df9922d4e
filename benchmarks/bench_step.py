"""Whole LoRA training steps on a CPU (forward, backward, AdamW): ours, HF peft and the frozen model, interleaved.

    python -m benchmarks.bench_step [--rounds 12] [--threads 2] [--json FILE]

The model is a Llama of random weights (hidden 512, 4 layers, 8 heads, 2 key-value heads, MLP 1408) with LoRA of rank 16
on every linear layer, fp32, batch 4 of 256 tokens. Before anything is timed, both adapters take one step from the same
start, without dropout, and must have the same loss and gradients. This times the CPU path: it says nothing of kernels.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

CONFIG = dict(
    vocab_size=1024, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=1408, max_position_embeddings=512, use_cache=False,
)  # fmt: skip
BATCH, TOKENS, RANK = 4, 256, 16


def models(dropout: float) -> dict[str, torch.nn.Module]:
    """The frozen model, HF peft's and ours, with equal base weights and equal adapters."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastpeft

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    options = dict(r=RANK, lora_alpha=RANK, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.enable_input_require_grads()
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    torch.manual_seed(1)
    ours = fastpeft.patch(copy.deepcopy(base), fastpeft.LoraConfig(**options))
    return {"frozen": frozen, "HF peft": theirs, "fastpeft": ours}


def check(found: dict[str, torch.nn.Module], ids: torch.Tensor) -> None:
    """Equal losses and gradients. Raises AssertionError where a figure would be of something else."""
    grads = {}
    for name in ("HF peft", "fastpeft"):
        loss = found[name](input_ids=ids, labels=ids).loss
        loss.backward()
        named = {key.split("model.", 1)[-1]: p.grad for key, p in found[name].named_parameters() if p.requires_grad}
        grads[name] = [loss, *(named[key] for key in sorted(named, key=lambda key: key.split("layers.")[-1]))]
        found[name].zero_grad()
    for ours, theirs in zip(grads["fastpeft"], grads["HF peft"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(grad.abs().max() > 0 for grad in grads["fastpeft"][1:])


def measure(dropout: float, rounds: int) -> dict:
    """Milliseconds of each round, by implementation."""
    ids = torch.randint(0, CONFIG["vocab_size"], (BATCH, TOKENS))
    check(models(0.0), ids)
    found = models(dropout)
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in found.items()}
    optimizers = {name: torch.optim.AdamW(own, lr=1e-4) for name, own in trained.items() if own}
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):  # the first warms up
        for name, model in found.items():
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            if name in optimizers:
                optimizers[name].step()
                optimizers[name].zero_grad()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [theirs / ours for theirs, ours in zip(times["HF peft"], times["fastpeft"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    return {"dropout": dropout, "median_ms": medians, "speedup_over_peft": [round(v, 3) for v in (low, middle, high)]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="LoRA training steps on the CPU, beside HF peft.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    results = []
    for dropout in (0.0, 0.05):
        results.append(measure(dropout, chosen.rounds))
        low, middle, high = results[-1]["speedup_over_peft"]
        print(f"dropout {dropout}: {results[-1]['median_ms']} ms, {middle} times HF peft's speed ({low} to {high})")
    if chosen.json:
        document = {"schema": 1, "torch": torch.__version__, "threads": chosen.threads, "results": results}
        chosen.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
