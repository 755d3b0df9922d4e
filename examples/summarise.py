"""Summaries: a sequence-to-sequence model under transformers' Seq2SeqTrainer, which generates while it evaluates.

    pip install fastpeft accelerate
    python examples/summarise.py               # --model DIR --steps 200 --rate 1e-2 --out DIR

Of a sentence such as "On Friday Ida took the train to Oslo." the summary is "Ida to Oslo". What is measured is the
share of a summary's words that are generated at their places. `fastpeft.integrations.trainer.Seq2SeqTrainer` is
transformers' class, which also goes on from checkpoints of a patched model and loads the best one.
"""

import sys

import torch
import toys
import transformers

import fastpeft
from fastpeft.integrations.trainer import Seq2SeqTrainer

BATCH, MOST_TOKENS = 16, 8
TRAIN, TEST = 600, 40


def rows(tokenizer, trips: list[toys.Trip]) -> list[dict]:
    found = []
    for trip in trips:
        summary = tokenizer(f"{trip.who} to {trip.where}")["input_ids"]
        if summary[-1] != tokenizer.eos_token_id:
            summary.append(tokenizer.eos_token_id)
        found.append({**tokenizer(trip.text, return_token_type_ids=False), "labels": summary})
    return found


def words_right(tokenizer):
    """For the trainer: the share of words that are generated at their places."""

    def metrics(prediction) -> dict[str, float]:
        found, wanted = (texts(tokenizer, ids) for ids in (prediction.predictions, prediction.label_ids))
        pairs = [
            (word, answer.split()[place : place + 1])
            for answer, text in zip(found, wanted, strict=True)
            for place, word in enumerate(text.split())
        ]
        return {"words": sum([word] == answer for word, answer in pairs) / len(pairs)}

    return metrics


def texts(tokenizer, ids) -> list[str]:
    kept = [[token for token in row.tolist() if token >= 0] for row in ids]  # negative: not a token, not looked at
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def trainer_of(model: torch.nn.Module, tokenizer, options, data: list[dict], asked: list[dict]) -> Seq2SeqTrainer:
    settings = transformers.Seq2SeqTrainingArguments(
        options.out / "checkpoints", max_steps=options.steps, learning_rate=options.rate, seed=options.seed,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, logging_steps=max(1, options.steps // 4),
        eval_strategy="steps", eval_steps=options.steps // 2, save_steps=options.steps // 2, report_to="none",
        load_best_model_at_end=True, metric_for_best_model="words", predict_with_generate=True,
        generation_max_length=MOST_TOKENS,
    )  # fmt: skip
    return Seq2SeqTrainer(
        model, settings, train_dataset=data, eval_dataset=asked, compute_metrics=words_right(tokenizer),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if the adapter has learnt nothing, or writes something else after loading."""
    options = toys.parser("summarise", __doc__, steps=200, rate=1e-2).parse_args(argv)
    base = "AutoModelForSeq2SeqLM", options.model, options.seed
    model, tokenizer = toys.load(*base)
    data, asked = rows(tokenizer, toys.trips(TRAIN, seed=1)), rows(tokenizer, toys.trips(TEST, seed=2))
    config = fastpeft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=16, lora_alpha=32, target_modules="all-linear")
    trainer = trainer_of(fastpeft.patch(model, config), tokenizer, options, data, asked)
    before = trainer.evaluate()
    trainer.train()
    predicted = trainer.predict(asked)
    fastpeft.save_adapter(model, options.out / "adapter")

    model = fastpeft.load_adapter(toys.load(*base)[0], options.out / "adapter")
    reloaded = trainer_of(model, tokenizer, options, data, asked).predict(asked)
    found, again = texts(tokenizer, predicted.predictions), texts(tokenizer, reloaded.predictions)
    for row, summary in list(zip(asked, found, strict=True))[:3]:
        print(tokenizer.decode(row["input_ids"], skip_special_tokens=True), "->", summary)
    after = predicted.metrics
    print(f"loss: before {before['eval_loss']:.3f}, after {after['test_loss']:.3f}")
    print(f"words at their places: before {before['eval_words']:.1%}, after {after['test_words']:.1%}")
    print(f"the adapter: {options.out / 'adapter'}")
    return 0 if after["test_loss"] < before["eval_loss"] and found == again else 1


if __name__ == "__main__":
    sys.exit(main())
