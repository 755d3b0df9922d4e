"""Instruction tuning with transformers' Trainer as alpaca-lora does it: 4 bits, LoRA, resumed, best model, merged."""

import os

import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

import fastpeft
from tests.idioms.materials import instructions, tokenizer
from tests.quantised import checkpoint

MICRO_BATCH_SIZE = 2
BATCH_SIZE = 4
CUTOFF_LEN = 24
VAL_SET_SIZE = 4
TRAIN_ON_INPUTS = False
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def generate_prompt(data_point):
    if data_point["input"]:
        return f"user {data_point['instruction']} {data_point['input']} assistant {data_point['output']}"
    return f"user {data_point['instruction']} assistant {data_point['output']}"


def tokenize(words, prompt, add_eos_token=True):
    result = words(prompt, truncation=True, max_length=CUTOFF_LEN, padding=False, return_tensors=None)
    if not add_eos_token:
        result = {key: value[:-1] for key, value in result.items()}
    result["labels"] = result["input_ids"].copy()
    return result


def generate_and_tokenize_prompt(words, data_point):
    full = tokenize(words, generate_prompt(data_point))
    if not TRAIN_ON_INPUTS:
        prompt = tokenize(words, generate_prompt({**data_point, "output": ""}), add_eos_token=False)
        length = len(prompt["input_ids"])
        full["labels"] = [-100] * length + full["labels"][length:]
    return full


def load_base(base_model, four_bits):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        base_model, quantization_config=quantization if four_bits else None, dtype=torch.float32, device_map={"": "cpu"}
    )


def adapted(base_model, fast, four_bits, dropout, adapter_weights=None):
    model = load_base(base_model, four_bits)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    if fast:
        fastpeft.patch(model)
    if adapter_weights is not None:
        set_peft_model_state_dict(model, load_file(adapter_weights))
    model.print_trainable_parameters()
    model.config.use_cache = False
    return model


def trainer_of(model, words, output_dir, max_steps):
    data = instructions(16).train_test_split(test_size=VAL_SET_SIZE, shuffle=True, seed=42)
    data = data.map(lambda point: generate_and_tokenize_prompt(words, point), remove_columns=data["train"].column_names)
    arguments = transformers.TrainingArguments(
        output_dir=output_dir, per_device_train_batch_size=MICRO_BATCH_SIZE, warmup_steps=1, max_steps=max_steps,
        gradient_accumulation_steps=BATCH_SIZE // MICRO_BATCH_SIZE, learning_rate=3e-3, logging_steps=1, use_cpu=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, optim="adamw_torch",
        eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, save_total_limit=3,
        load_best_model_at_end=True, report_to=[], disable_tqdm=True, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["test"],
        data_collator=transformers.DataCollatorForSeq2Seq(
            words, pad_to_multiple_of=8, return_tensors="pt", padding=True
        ),
    )  # fmt: skip


def generate(model, words):
    inputs = words("user w1 w2 assistant", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(input_ids=inputs["input_ids"], max_new_tokens=6, do_sample=False, use_cache=True)
    return words.decode(output[0])


def main(output_dir, fast, four_bits=True, dropout=0.0):
    words, base_model = tokenizer(), os.path.join(output_dir, "base")
    AutoModelForCausalLM.from_pretrained(checkpoint()).save_pretrained(base_model)
    set_seed(42)
    trainer = trainer_of(adapted(base_model, fast, four_bits, dropout), words, output_dir, max_steps=4)
    trainer.train()

    weights = os.path.join(output_dir, "checkpoint-4", "adapter_model.safetensors")
    model = adapted(base_model, fast, four_bits, dropout, adapter_weights=weights)
    resumed = trainer_of(model, words, output_dir, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(os.path.join(output_dir, "final"))
    model.save_pretrained(output_dir)
    words.save_pretrained(output_dir)
    history = resumed.state.log_history
    found = {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "eval": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "best": os.path.basename(resumed.state.best_model_checkpoint),
        "weights": get_peft_model_state_dict(model),
        "text": generate(model.eval(), words),
    }

    served = PeftModel.from_pretrained(load_base(base_model, four_bits=False), output_dir)
    if fast:
        fastpeft.patch(served)
    found["served"] = generate(served, words)
    merged = served.merge_and_unload(progressbar=False, safe_merge=True)
    merged.save_pretrained(os.path.join(output_dir, "merged"), max_shard_size="400MB")
    found["merged"] = generate(merged, words)
    return found
