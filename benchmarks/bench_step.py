"""Whole training steps on a CPU (forward, backward, AdamW): ours, HF peft and the frozen model, interleaved.

    python -m benchmarks.bench_step [--method lora|prefix] [--rounds 12] [--threads 2] [--json FILE] [--profile]

lora: a Llama of random weights (hidden 512, 4 layers, 8 heads, 2 key-value heads, MLP 1408) with LoRA of rank 16 on
every linear layer, fp32, batch 4 of 256 tokens. prefix: hidden 256, MLP 704, 30 virtual tokens, batch 2 of 1024 and 1
of 2048 tokens; the frozen model has no prefix there, and computes the gradient of its input. Before anything is timed,
both adapters take one step from the same start, without dropout, and must have the same loss and gradients. This times
the CPU path: it says nothing of kernels. On a machine that others use too, `--threads 1 --clock cpu` counts the seconds
of the process itself.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

CONFIG = dict(
    vocab_size=1024, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=1408, max_position_embeddings=4096, use_cache=False,
)  # fmt: skip
RANK, VIRTUAL_TOKENS = 16, 30
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FROZEN, PEFT, OURS = "frozen", "HF peft", "fastpeft"


@dataclass(frozen=True)
class Case:
    """One kind of step; `sizes` replace some of CONFIG's."""

    method: str
    batch: int
    tokens: int
    dropout: float = 0.0
    sizes: tuple[tuple[str, int], ...] = ()

    def options(self) -> dict:
        if self.method == "prefix":
            return {"num_virtual_tokens": VIRTUAL_TOKENS, "task_type": "CAUSAL_LM"}
        return {
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": "all-linear",
            "lora_dropout": self.dropout,
            "task_type": "CAUSAL_LM",
        }


SMALLER = (("hidden_size", 256), ("intermediate_size", 704))
CASES = {
    "lora": (Case("lora", 4, 256), Case("lora", 4, 256, dropout=0.05)),
    "prefix": (Case("prefix", 2, 1024, sizes=SMALLER), Case("prefix", 1, 2048, sizes=SMALLER)),
}
CLASSES = {"lora": "LoraConfig", "prefix": "PrefixTuningConfig"}


def models(case: Case, dropout: bool = True) -> dict[str, torch.nn.Module]:
    """The frozen model, HF peft's and ours, with equal base weights and equal adapters."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastpeft

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **dict(case.sizes)})).train()
    options, name = case.options(), CLASSES[case.method]
    if not dropout and case.dropout:
        options["lora_dropout"] = 0.0
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.enable_input_require_grads()
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, name)(**options))
    torch.manual_seed(1)
    ours = fastpeft.patch(copy.deepcopy(base), getattr(fastpeft, name)(**options))
    return {FROZEN: frozen, PEFT: theirs, OURS: ours}


def check(found: dict[str, torch.nn.Module], ids: torch.Tensor) -> None:
    """Equal losses and gradients. Raises AssertionError where a figure would be of something else."""
    grads = {}
    for name in (PEFT, OURS):
        loss = found[name](input_ids=ids, labels=ids).loss
        loss.backward()
        named = {key.split("model.", 1)[-1]: p.grad for key, p in found[name].named_parameters() if p.requires_grad}
        grads[name] = [loss, *(named[key] for key in sorted(named, key=lambda key: key.split("layers.")[-1]))]
        found[name].zero_grad()
    for ours, theirs in zip(grads[OURS], grads[PEFT], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(grad.abs().max() > 0 for grad in grads[OURS][1:])


def steps_of(found: dict[str, torch.nn.Module], ids: torch.Tensor) -> dict:
    """A function for each model that takes one whole step."""

    def step_of(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return {name: step_of(model) for name, model in found.items()}


def quartiles(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Of the quotients within a round."""
    quotients = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return [round(value, 3) for value in statistics.quantiles(quotients, n=4)]


def measure(case: Case, rounds: int, clock=time.perf_counter) -> dict:
    """Medians of each implementation's milliseconds, and quotients within a round: (lower quartile, median, upper)."""
    vocabulary = {**CONFIG, **dict(case.sizes)}["vocab_size"]
    ids = torch.randint(0, vocabulary, (case.batch, case.tokens))
    check(models(case, dropout=False), ids)
    steps = steps_of(models(case), ids)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            start = clock()
            step()
            if turn:
                times[name].append(1e3 * (clock() - start))
    return {
        **asdict(case),
        "rounds": rounds,
        "median_ms": {name: round(statistics.median(values), 1) for name, values in times.items()},
        "speedup_over_peft": quartiles(times[PEFT], times[OURS]),
        "cost_over_frozen": {name: quartiles(times[name], times[FROZEN]) for name in (PEFT, OURS)},
    }


def profile(case: Case, repeats: int = 5) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """(operator, its own milliseconds in a step, calls in a step), by implementation; what ours adds most first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorder

    vocabulary = {**CONFIG, **dict(case.sizes)}["vocab_size"]
    steps = steps_of(models(case), torch.randint(0, vocabulary, (case.batch, case.tokens)))
    spent: dict[str, dict[str, float]] = {}
    calls: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()
        with recorder(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(repeats):
                step()
        for event in recorded.key_averages():
            spent.setdefault(event.key, {})[name] = event.self_cpu_time_total / 1e3 / repeats
            calls.setdefault(event.key, {})[name] = event.count / repeats
    added = sorted(spent, key=lambda key: spent[key].get(FROZEN, 0.0) - spent[key].get(OURS, 0.0))
    return [(key, spent[key], calls[key]) for key in added]


def say(result: dict) -> str:
    low, middle, high = result["speedup_over_peft"]
    costs = ", ".join(f"{name} {middle}x" for name, (_, middle, _) in result["cost_over_frozen"].items())
    dropout = f", dropout {result['dropout']}" if result["method"] == "lora" else ""
    return (
        f"{result['method']}, batch {result['batch']} of {result['tokens']} tokens{dropout}: {result['median_ms']} ms; "
        f"{costs} the frozen step; ours {middle} times HF peft's speed ({low} to {high})"
    )


def _say_profile(case: Case, lines: int = 25) -> None:
    print(f"{case.method}, batch {case.batch} of {case.tokens} tokens: ms (calls) in a step")
    for key, spent, calls in profile(case)[:lines]:
        shares = [f"{name} {spent.get(name, 0.0):.2f} ({calls.get(name, 0):g})" for name in (FROZEN, PEFT, OURS)]
        print(f"  {key[:70]}: {', '.join(shares)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Training steps on the CPU, beside HF peft.")
    parser.add_argument("--method", choices=list(CASES), default="lora")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="instead: which operators a step spends its time in")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    if chosen.profile:
        for case in CASES[chosen.method]:
            _say_profile(case)
        return 0
    results = []
    for case in CASES[chosen.method]:
        results.append(measure(case, chosen.rounds, CLOCKS[chosen.clock]))
        print(say(results[-1]), flush=True)
    if chosen.json:
        document = {"schema": 2, "torch": torch.__version__, "threads": chosen.threads, "clock": chosen.clock}
        document["results"] = results
        chosen.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
