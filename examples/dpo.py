"""Direct preference optimisation under TRL's DPOTrainer, on one model: the reference is it without its adapter.

    pip install fastpeft trl
    python examples/dpo.py                     # --model DIR --steps 60 --rate 2e-3 --beta 0.1 --out DIR

With `peft_config` the trainer patches the model that it is given, and computes the reference with the adapter disabled,
so that there is no second model in memory. `fastpeft.integrations.trainer.DPOTrainer` is TRL's class for patched
models; TRL's own serves what `fastpeft.get_peft_model` returns. The preference: an answer is the place alone, no
sentence.
"""

import sys

import datasets
import torch
import toys
import trl

import fastpeft
from fastpeft.integrations.trainer import DPOTrainer

BATCH = 8
TRAIN, TEST = 240, 32


def preferences(trips: list[toys.Trip]) -> datasets.Dataset:
    """In TRL's columns."""
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"user: {trip.text} Where to?\nassistant:" for trip in trips],
            "chosen": [f" {trip.where}." for trip in trips],
            "rejected": [f" {trip.who} went to {trip.where}." for trip in trips],
        }
    )


def trainer_of(model: torch.nn.Module, tokenizer, options, data, asked) -> DPOTrainer:
    settings = trl.DPOConfig(
        str(options.out / "checkpoints"), max_steps=options.steps, learning_rate=options.rate, seed=options.seed,
        beta=options.beta, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        logging_steps=max(1, options.steps // 6), save_strategy="no", report_to="none", bf16=False, max_length=96,
    )  # fmt: skip
    config = fastpeft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return DPOTrainer(
        model, args=settings, train_dataset=data, eval_dataset=asked, processing_class=tokenizer, peft_config=config
    )


@torch.no_grad()
def logits(model: torch.nn.Module, sample: torch.Tensor) -> torch.Tensor:
    return model.eval()(sample).logits


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if nothing is preferred more, or the base or the loaded adapter is another one."""
    parser = toys.parser("dpo", __doc__, steps=60, rate=2e-3)
    parser.add_argument("--beta", type=float, default=0.1, help="how far the policy may go (default: 0.1)")
    options = parser.parse_args(argv)
    model, tokenizer = toys.load("AutoModelForCausalLM", options.model, options.seed)
    data, asked = preferences(toys.trips(TRAIN, seed=1)), preferences(toys.trips(TEST, seed=2))
    trainer = trainer_of(model, tokenizer, options, data, asked)
    parameters = sum(each.numel() for each in trainer.model.parameters())
    print(f"{parameters:,} parameters, those of the reference with them; {fastpeft.report(trainer.model)}")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(options.out / "adapter")

    fresh = toys.load("AutoModelForCausalLM", options.model, options.seed)[0].to(model.device)
    sample = torch.tensor([tokenizer(asked[0]["prompt"])["input_ids"]], device=model.device)
    with fastpeft.disable_adapter(model):
        kept = torch.equal(logits(model, sample), logits(fresh, sample))
    fastpeft.load_adapter(fresh, options.out / "adapter")
    same = torch.equal(logits(model, sample), logits(fresh, sample))
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        print(f"{name:24s} before {before[name]:7.3f}, after {after[name]:7.3f}")
    print(f"without the adapter the model is {'the base, bit for bit' if kept else 'another one!'}")
    print(f"the adapter: {options.out / 'adapter'}, {'the same' if same else 'another one!'} after loading")
    return 0 if kept and same and after["eval_rewards/margins"] > before["eval_rewards/margins"] else 1


if __name__ == "__main__":
    sys.exit(main())
