"""Supervised fine-tuning on conversations with TRL's own SFTTrainer: of a script for peft, one import is changed.

    pip install fastpeft peft trl
    python examples/sft.py                     # --model DIR --steps 150 --rate 1e-2 --out DIR

`fastpeft.get_peft_model` gives what TRL asks for, a `peft.PeftModel`, and its arithmetic is fastpeft's. A model that is
patched without peft goes into `fastpeft.integrations.trainer.SFTTrainer` (see dpo.py). The loss counts the assistant's
words alone.
"""

import sys

import datasets
import torch
import toys
import trl

import fastpeft

BATCH = 16
TRAIN, TEST = 400, 32
QUESTIONS = {"who": "Who travelled?", "where": "Where to?", "when": "On which day?"}


def conversations(trips: list[toys.Trip]) -> datasets.Dataset:
    """In TRL's columns for conversations with a question and an answer."""
    kinds = list(QUESTIONS)
    rows = {"prompt": [], "completion": []}
    for number, trip in enumerate(trips):
        kind = kinds[number % len(kinds)]
        rows["prompt"].append([{"role": "user", "content": f"{QUESTIONS[kind]} {trip.text}"}])
        rows["completion"].append([{"role": "assistant", "content": getattr(trip, kind)}])
    return datasets.Dataset.from_dict(rows)


def trainer_of(model: torch.nn.Module, tokenizer, options, data, asked) -> trl.SFTTrainer:
    settings = trl.SFTConfig(
        str(options.out / "checkpoints"), max_steps=options.steps, learning_rate=options.rate, seed=options.seed,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, logging_steps=max(1, options.steps // 4),
        save_strategy="no", report_to="none", bf16=False, max_length=96, completion_only_loss=True,
    )  # fmt: skip
    return trl.SFTTrainer(model, settings, train_dataset=data, eval_dataset=asked, processing_class=tokenizer)


def answer(model: torch.nn.Module, tokenizer, prompt: list[dict]) -> str:
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(
        **inputs.to(model.device), max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if the adapter has learnt nothing or is another one after loading."""
    options = toys.parser("sft", __doc__, steps=150, rate=1e-2).parse_args(argv)
    base = "AutoModelForCausalLM", options.model, options.seed
    model, tokenizer = toys.load(*base)
    data, asked = conversations(toys.trips(TRAIN, seed=1)), conversations(toys.trips(TEST, seed=2))
    config = fastpeft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = fastpeft.get_peft_model(model, config)
    print(f"a {type(model).__module__}.{type(model).__name__}; {fastpeft.report(model)}")
    trainer = trainer_of(model, tokenizer, options, data, asked)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.out / "adapter")

    fresh = fastpeft.load_adapter(toys.load(*base)[0].to(model.device), options.out / "adapter").eval()
    model.eval()
    same = []
    for row in list(asked)[:6]:
        found, again = (answer(each, tokenizer, row["prompt"]) for each in (model, fresh))
        same.append(found == again)
        print(f"{row['prompt'][0]['content']} -> {found} (wanted: {row['completion'][0]['content']})")
    print(f"loss of answers: before {before:.3f}, after {after:.3f}; reloaded without peft: {sum(same)} of 6 the same")
    print(f"the adapter: {options.out / 'adapter'}")
    return 0 if after < before and all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
