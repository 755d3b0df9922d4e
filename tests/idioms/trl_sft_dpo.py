"""TRL: supervised fine-tuning where the trainer makes the adapter, then preferences on it and on a new one."""

import os

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fastpeft
from tests.idioms.materials import chats, preferences, tokenizer
from tests.models import tiny

COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}


def lora(**settings):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM", **settings)


def logged(trainer, *names):
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return [{name: entry[name] for name in names if name in entry} for entry in history]


def sft(base_model, output_dir, words, fast):
    arguments = SFTConfig(
        output_dir=output_dir, max_length=32, packing=False, assistant_only_loss=False, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, eval_strategy="steps", eval_steps=2, save_steps=2,
        **COMMON,
    )  # fmt: skip
    data = chats(12).train_test_split(test_size=4, seed=0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_model), args=arguments, train_dataset=data["train"],
        eval_dataset=data["test"], processing_class=words, peft_config=lora(modules_to_save=["embed_tokens"]),
    )  # fmt: skip
    if fast:
        fastpeft.patch(trainer.model)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(output_dir)
    found = logged(trainer, "loss", "eval_loss", "mean_token_accuracy", "entropy", "grad_norm")
    return found, {key: value for key, value in metrics.items() if "loss" in key or "accuracy" in key}


PREFERENCE = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "grad_norm")


def dpo_of_the_adapter(adapter, output_dir, words, fast):
    """The reference is a frozen copy of the adapter, which TRL makes in the same model."""
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)
    if fast:
        fastpeft.patch(model)
    arguments = DPOConfig(output_dir=output_dir, beta=0.2, max_length=32, save_strategy="no", **COMMON)
    trainer = DPOTrainer(
        model=model, ref_model=None, args=arguments, train_dataset=preferences(8), processing_class=words
    )
    trainer.train()
    trainer.save_model(output_dir)
    return logged(trainer, *PREFERENCE)


def dpo_of_a_new_one(base_model, output_dir, words, fast):
    """The reference is the model with its adapter disabled."""
    arguments = DPOConfig(
        output_dir=output_dir, beta=0.1, max_length=32, precompute_ref_log_probs=False, loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.5], save_steps=2, **COMMON,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_model), args=arguments, train_dataset=preferences(8),
        processing_class=words, peft_config=lora(use_dora=True),
    )  # fmt: skip
    if fast:
        fastpeft.patch(trainer.model)
    trainer.train()
    with torch.no_grad(), trainer.model.disable_adapter():
        inputs = words(preferences(8)["prompt"][:], return_tensors="pt", padding=True)
        reference = trainer.model(**inputs).logits
    trainer.save_model(output_dir)
    return logged(trainer, *PREFERENCE), reference


def main(output_dir, fast):
    set_seed(0)
    words = tokenizer()
    places = [os.path.join(output_dir, name) for name in ("base", "sft", "merged", "dpo", "dpo-merged")]
    base, adapter, merged, preferred, on_top = places
    tiny().save_pretrained(base)
    words.save_pretrained(base)
    found = {"sft": sft(base, adapter, words, fast)}
    found["dpo"] = dpo_of_the_adapter(adapter, preferred, words, fast)
    model = AutoPeftModelForCausalLM.from_pretrained(preferred, dtype=torch.float32, low_cpu_mem_usage=True)
    model = model.merge_and_unload()
    model.save_pretrained(merged)
    found["dpo on top"] = dpo_of_a_new_one(merged, on_top, words, fast)
    return found
