"""LoRA of a causal language model under transformers' Trainer: stopped in the middle, resumed, saved, loaded.

    pip install fastpeft accelerate
    python examples/causal_lm.py               # --model DIR --data FILE --steps 60 --rate 1e-2 --out DIR

The model is patched, and stays what it was: a LlamaForCausalLM. transformers' own Trainer saves its adapter, but goes
on from a checkpoint only with peft's classes; `fastpeft.integrations.trainer.Trainer` is the same class, which also
does so with a patched model. The first run stops half-way, a second one goes on with a fresh base, and in the end the
adapter is loaded once more: the loss on text that is held out has to be the same.
"""

import math
import sys
from pathlib import Path

import torch
import toys
import transformers

import fastpeft
from fastpeft.integrations.trainer import Trainer

LENGTH, BATCH = 64, 8
HELD_OUT = 16  # rows


def adapted(options) -> tuple[torch.nn.Module, object]:
    model, tokenizer = toys.load("AutoModelForCausalLM", options.model, options.seed)
    config = fastpeft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05)
    return fastpeft.patch(model, config), tokenizer


def trainer_of(model, options, data, stop_at: int | None = None) -> Trainer:
    settings = transformers.TrainingArguments(
        options.out / "checkpoints", max_steps=options.steps, learning_rate=options.rate, seed=options.seed,
        per_device_train_batch_size=BATCH, logging_steps=max(1, options.steps // 6), save_steps=options.steps // 2,
        report_to="none",
    )  # fmt: skip
    callbacks = [] if stop_at is None else [StopAt(stop_at)]
    return Trainer(model, settings, train_dataset=data[HELD_OUT:], eval_dataset=data[:HELD_OUT], callbacks=callbacks)


class StopAt(transformers.TrainerCallback):
    """In place of a power cut."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


def loss_of(trainer: Trainer) -> float:
    return trainer.evaluate()["eval_loss"]


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if the adapter has learnt nothing or is another one after loading."""
    parser = toys.parser("causal_lm", __doc__, steps=60, rate=1e-2)
    parser.add_argument("--data", type=Path, help="a text (default: Python's documentation)")
    options = parser.parse_args(argv)

    model, tokenizer = adapted(options)
    text = toys.prose() if options.data is None else options.data.read_text("utf-8")
    data = toys.blocks(tokenizer, text, BATCH * options.steps + HELD_OUT, LENGTH)
    print(fastpeft.report(model))
    half = options.steps // 2
    first = trainer_of(model, options, data, stop_at=half)
    before = loss_of(first)
    first.train()

    model, _ = adapted(options)  # as a new process would
    second = trainer_of(model, options, data)
    second.train(resume_from_checkpoint=True)
    after = loss_of(second)
    fastpeft.save_adapter(model, options.out / "adapter")

    fresh, _ = toys.load("AutoModelForCausalLM", options.model, options.seed)
    model = fastpeft.load_adapter(fresh, options.out / "adapter")
    reloaded = loss_of(trainer_of(model, options, data))
    print(f"stopped at step {half}, went on to step {second.state.global_step}")
    for name, loss in (("base", before), ("adapter", after), ("reloaded", reloaded)):
        print(f"{name:10s} loss {loss:.4f}, perplexity {math.exp(loss):.1f}")
    print(f"the adapter: {options.out / 'adapter'}")
    return 0 if after < before and math.isclose(after, reloaded, rel_tol=1e-6) else 1


if __name__ == "__main__":
    sys.exit(main())
