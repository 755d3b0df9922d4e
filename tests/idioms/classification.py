"""Classes of sentences and of words under transformers' Trainer: virtual tokens, AdaLoRA, heads that are trained."""

import os

import numpy as np
from peft import (
    AdaLoraConfig,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fastpeft
from fastpeft import get_peft_model as fast_get_peft_model
from tests.idioms.materials import labelled, tokenizer
from tests.models import tiny

STEPS = 6


def methods():
    return {
        "p-tuning": PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=5, encoder_hidden_size=16),
        "prompt": PromptTuningConfig(
            task_type=TaskType.SEQ_CLS, num_virtual_tokens=4, prompt_tuning_init=PromptTuningInit.RANDOM
        ),
        "prefix": PrefixTuningConfig(task_type=TaskType.TOKEN_CLS, num_virtual_tokens=4),
        "projected": PrefixTuningConfig(
            task_type=TaskType.SEQ_CLS, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
        ),
        "adalora": AdaLoraConfig(
            task_type=TaskType.SEQ_CLS, init_r=6, target_r=3, tinit=1, tfinal=2, deltaT=1, total_step=STEPS, beta1=0.85,
            lora_alpha=12, lora_dropout=0.0, orth_reg_weight=0.5, target_modules=["query", "value"],
            modules_to_save=["pooler"],
        ),
        "lora": LoraConfig(
            task_type=TaskType.TOKEN_CLS, r=4, lora_alpha=16, lora_dropout=0.0, bias="lora_only",
            modules_to_save=["classifier"],
        ),
    }  # fmt: skip


class AllocateRanks(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)


def compute_metrics(prediction):
    logits, labels = prediction
    logits = logits[0] if isinstance(logits, tuple) else logits
    found, counted = np.argmax(logits, axis=-1), labels != -100
    return {"accuracy": float((found == labels)[counted].mean()), "certainty": float(logits.max())}


def tokenize(words, task):
    def sequences(examples):
        return words(examples["text"], truncation=True, max_length=16) | {"labels": examples["label"]}

    def tokens(examples):
        inputs = words([text.split() for text in examples["text"]], truncation=True, is_split_into_words=True)
        inputs["labels"] = [
            [-100 if word is None else labels[word] for word in inputs.word_ids(batch_index=row)]
            for row, labels in enumerate(examples["label"])
        ]
        return inputs

    data = labelled(16, per_word=task == TaskType.TOKEN_CLS)
    function = tokens if task == TaskType.TOKEN_CLS else sequences
    return data.map(function, batched=True, remove_columns=data.column_names).train_test_split(4, seed=1)


def train(name, output_dir, fast):
    set_seed(11)
    config, words = methods()[name], tokenizer()
    per_word = config.task_type == TaskType.TOKEN_CLS
    kind = AutoModelForTokenClassification if per_word else AutoModelForSequenceClassification
    base, place = os.path.join(output_dir, f"{name}-base"), os.path.join(output_dir, name)
    tiny("roberta" if name == "prompt" else "bert", str(config.task_type.value)).save_pretrained(base)
    model = kind.from_pretrained(base, num_labels=3, id2label={0: "O", 1: "B", 2: "I"})
    model = (fast_get_peft_model if fast else get_peft_model)(model, config)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=place, learning_rate=1e-2, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        max_steps=STEPS, weight_decay=0.01, eval_strategy="steps", save_strategy="steps", eval_steps=3, save_steps=3,
        logging_steps=1, load_best_model_at_end=name in ("prompt", "prefix", "lora"), label_names=["labels"],
        metric_for_best_model="accuracy", use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = tokenize(words, config.task_type)
    collator = (DataCollatorForTokenClassification if per_word else DataCollatorWithPadding)(words)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["test"], processing_class=words,
        data_collator=collator, compute_metrics=compute_metrics, callbacks=[AllocateRanks()] * (name == "adalora"),
    )  # fmt: skip
    trainer.train()
    predictions = trainer.predict(data["test"])
    model.save_pretrained(place)
    history = trainer.state.log_history
    found = {key: [entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss", "eval_accuracy")}
    found |= {"metrics": {key: value for key, value in predictions.metrics.items() if "_per_" not in key}}
    found["metrics"].pop("test_runtime")
    found["trainable"] = model.get_nb_trainable_parameters()
    found["ranks"] = getattr(model.peft_config["default"], "rank_pattern", None)

    if per_word:
        served = PeftModel.from_pretrained(kind.from_pretrained(base, num_labels=3), place)
    else:
        served = AutoPeftModelForSequenceClassification.from_pretrained(
            place,
            num_labels=3,
            is_trainable=name == "adalora",  # without which peft's AdaLoRA takes no labels
        )
    if fast:
        fastpeft.patch(served)
    arguments.eval_strategy = "no"
    trainer = Trainer(model=served, args=arguments, data_collator=collator, compute_metrics=compute_metrics)
    found["served"] = trainer.predict(data["test"]).metrics["test_loss"]
    return found


def main(output_dir, fast):
    return {name: train(name, output_dir, fast) for name in methods()}
