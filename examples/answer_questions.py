"""Questions that a text answers (extractive QA): LoRA and a head that points at the first and the last word.

    pip install fastpeft accelerate
    python examples/answer_questions.py        # --model DIR --steps 150 --rate 5e-3 --out DIR

With `task_type="QUESTION_ANS"` the head, `qa_outputs`, is trained and saved with the adapter. The texts are made of a
few words ("On Friday Ida took the train to Oslo."), and ask who, where and when; a pretrained encoder needs a tenth of
the tiny one's learning rate.
"""

import sys

import torch
import toys
import transformers

import fastpeft
from fastpeft.integrations.trainer import Trainer

LENGTH, BATCH = 64, 16
QUESTIONS = {"who": "Who travelled?", "where": "Where to?", "when": "On which day?"}
TRAIN, TEST = 300, 60  # texts, of which each asks all questions


def rows(tokenizer, trips: list[toys.Trip]) -> list[dict]:
    """Tokens of a question and a text, and the places of the answer's first and last token; `answer` is the words."""
    found = []
    for trip in trips:
        for kind, question in QUESTIONS.items():
            answer = getattr(trip, kind)
            begin = trip.text.index(answer)
            encoded = tokenizer(
                question, trip.text, padding="max_length", max_length=LENGTH, return_offsets_mapping=True,
                return_token_type_ids=True,
            )  # fmt: skip
            places = [
                place for place, (start, end) in enumerate(encoded.pop("offset_mapping"))
                if encoded.sequence_ids()[place] == 1 and start < begin + len(answer) and end > begin
            ]  # fmt: skip
            positions = {"start_positions": places[0], "end_positions": places[-1]}
            found.append({**encoded, **positions, "answer": answer})
    return found


def answers(trainer: Trainer, tokenizer, asked: list[dict]) -> list[str]:
    """The words between the likeliest first and last token."""
    starts, ends = trainer.predict(asked).predictions
    return [
        tokenizer.decode(row["input_ids"][start : end + 1]).strip()
        for row, start, end in zip(asked, starts.argmax(-1), ends.argmax(-1), strict=True)
    ]


def share_right(found: list[str], asked: list[dict]) -> float:
    return sum(each == row["answer"] for each, row in zip(found, asked, strict=True)) / len(asked)


def trainer_of(model: torch.nn.Module, options, data: list[dict]) -> Trainer:
    settings = transformers.TrainingArguments(
        options.out / "checkpoints", max_steps=options.steps, learning_rate=options.rate, seed=options.seed,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, logging_steps=max(1, options.steps // 6),
        save_strategy="no", report_to="none",
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=data)


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if the adapter answers no better, or something else after loading."""
    options = toys.parser("answer_questions", __doc__, steps=150, rate=5e-3).parse_args(argv)
    base = "AutoModelForQuestionAnswering", options.model, options.seed
    model, tokenizer = toys.load(*base)
    data, asked = rows(tokenizer, toys.trips(TRAIN, seed=1)), rows(tokenizer, toys.trips(TEST, seed=2))
    config = fastpeft.LoraConfig(task_type="QUESTION_ANS", r=16, lora_alpha=32, target_modules="all-linear")
    trainer = trainer_of(fastpeft.patch(model, config), options, data)
    fastpeft.print_trainable_parameters(model)
    before = share_right(answers(trainer, tokenizer, asked), asked)
    trainer.train()
    found = answers(trainer, tokenizer, asked)
    fastpeft.save_adapter(model, options.out / "adapter")

    model = fastpeft.load_adapter(toys.load(*base)[0], options.out / "adapter")
    reloaded = answers(trainer_of(model, options, data), tokenizer, asked)
    for row, answer in list(zip(asked, found, strict=True))[:3]:
        print(tokenizer.decode(row["input_ids"], skip_special_tokens=True), "->", answer)
    shares = [f"{share_right(each, asked):.1%}" for each in (found, reloaded)]
    print(f"right answers: before {before:.1%}, after {shares[0]}, reloaded {shares[1]}")
    print(f"the adapter: {options.out / 'adapter'}")
    return 0 if share_right(found, asked) > before and found == reloaded else 1


if __name__ == "__main__":
    sys.exit(main())
