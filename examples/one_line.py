"""One line in a script that is written for Hugging Face peft; run with and without it, side by side.

    pip install fastpeft peft
    python examples/one_line.py                # --model DIR --steps 30 --rate 5e-3 --seed 1 --out DIR

`finetune` is a plain peft script. With the line every number stays what it was, and so does the adapter's file; only
who computes changes, which `fastpeft.report` shows. Both times are printed. Of a tiny model on a CPU they say nothing
about a large one on a GPU.
"""

import itertools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import toys
from safetensors.torch import load_file

import fastpeft

LENGTH, BATCH = 64, 8
TOLERANCE = 1e-4  # of losses and weights, in fp32


class Run(NamedTuple):
    """losses: of each step. seconds: of all steps. report: who computes. folder: the adapter."""

    losses: list[float]
    seconds: float
    report: Any
    folder: Path


def finetune(options, with_the_line: bool) -> Run:
    model, tokenizer = toys.load("AutoModelForCausalLM", options.model, options.seed)
    batches = batches_of(tokenizer, options)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)

    if with_the_line:
        fastpeft.patch(model)  # the line

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), options.rate)
    model.train()
    losses, begin = [], time.perf_counter()
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    folder = options.out / ("with" if with_the_line else "without")
    model.save_pretrained(folder)
    return Run(losses, seconds, fastpeft.report(model) if with_the_line else None, folder)


def batches_of(tokenizer, options) -> list[torch.Tensor]:
    rows = toys.blocks(tokenizer, toys.prose(), BATCH * options.steps, LENGTH)
    every = torch.tensor([row["input_ids"] for row in rows])
    return list(itertools.islice(every.split(BATCH), options.steps))


def furthest(plain: Run, fast: Run) -> tuple[float, float]:
    """The largest differences of a loss, and of a number in the adapters' files."""
    losses = max(abs(a - b) for a, b in zip(plain.losses, fast.losses, strict=True))
    theirs, ours = (load_file(run.folder / "adapter_model.safetensors") for run in (plain, fast))
    assert theirs.keys() == ours.keys()
    return losses, max(float((theirs[name] - ours[name]).abs().max()) for name in theirs)


def main(argv: list[str] | None = None) -> int:
    """Both runs. Returns 0, or 1 if they differ, or nothing was learnt."""
    options = toys.parser("one_line", __doc__, steps=30, rate=5e-3).parse_args(argv)
    plain, fast = finetune(options, with_the_line=False), finetune(options, with_the_line=True)
    print(f"{'step':>6s} {'peft':>10s} {'with the line':>15s}")
    for step in range(0, options.steps, max(1, options.steps // 6)):
        print(f"{step + 1:6d} {plain.losses[step]:10.5f} {fast.losses[step]:15.5f}")
    losses, weights = furthest(plain, fast)
    print(f"largest difference of a loss {losses:.1e}, of a number in the adapter's file {weights:.1e}")
    print(f"seconds for {options.steps} steps here: {plain.seconds:.2f} without the line, {fast.seconds:.2f} with it")
    print(fast.report)
    return 0 if max(losses, weights) < TOLERANCE and plain.losses[-1] < plain.losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
