"""Summarisation under accelerate with a loop of one's own, as in peft's examples: LoRA on T5, then a prefix on BART."""

import os

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    get_linear_schedule_with_warmup,
)

from fastpeft import get_peft_model as fast_get_peft_model
from tests.idioms.materials import summaries, tokenizer
from tests.models import tiny

BATCH_SIZE = 4
NUM_EPOCHS = 2
LR = 1e-2


def configs():
    return {
        "t5": LoraConfig(
            task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=4, lora_alpha=16, lora_dropout=0.0, use_rslora=True
        ),
        "bart": PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=4),
    }


def loaders(accelerator, tokenizer, model):
    def preprocess(examples):
        inputs = tokenizer(examples["document"], max_length=12, truncation=True)
        inputs["labels"] = tokenizer(text_target=examples["summary"], max_length=6, truncation=True)["input_ids"]
        return inputs

    dataset = summaries(16)
    with accelerator.main_process_first():
        processed = dataset.map(preprocess, batched=True, remove_columns=dataset.column_names)
    processed = processed.train_test_split(test_size=4, shuffle=False)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100, padding=True)
    options = {"collate_fn": collator, "batch_size": BATCH_SIZE, "pin_memory": False}
    return DataLoader(processed["train"], shuffle=True, **options), DataLoader(processed["test"], **options)


def train_epoch(accelerator, model, loader, optimizer, lr_scheduler):
    model.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather_for_metrics(loss.detach().repeat(BATCH_SIZE)).mean().item())
    return losses


@torch.no_grad()
def evaluate(accelerator, model, loader, tokenizer):
    model.eval()
    losses, texts = [], []
    for batch in loader:
        losses.append(model(**batch).loss.item())
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        generated = accelerator.unwrap_model(model).generate(**inputs, min_new_tokens=4, max_new_tokens=5, num_beams=2)
        generated = accelerator.pad_across_processes(generated, dim=1, pad_index=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(generated.cpu().numpy(), skip_special_tokens=True)
    return losses, texts


def train(name, output_dir, fast):
    set_seed(42)
    base, adapter = os.path.join(output_dir, f"{name}-base"), os.path.join(output_dir, f"{name}-adapter")
    tiny(name, "SEQ_2_SEQ_LM").save_pretrained(base)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2 if name == "t5" else 1)
    words = tokenizer()
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    model = (fast_get_peft_model if fast else get_peft_model)(model, configs()[name])
    model.print_trainable_parameters()
    loader, eval_loader = loaders(accelerator, words, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    lr_scheduler = get_linear_schedule_with_warmup(optimizer, 1, len(loader) * NUM_EPOCHS)
    model, loader, eval_loader, optimizer, lr_scheduler = accelerator.prepare(
        model, loader, eval_loader, optimizer, lr_scheduler
    )
    found = {"losses": [], "eval": []}
    for epoch in range(NUM_EPOCHS):
        losses = train_epoch(accelerator, model, loader, optimizer, lr_scheduler)
        found["losses"] += losses
        eval_losses, texts = evaluate(accelerator, model, eval_loader, words)
        found["eval"] += eval_losses
        found[f"perplexity-{epoch}"] = float(np.exp(np.mean(losses)))
        found[f"texts-{epoch}"] = texts
        accelerator.wait_for_everyone()
        accelerator.save_state(os.path.join(adapter, f"epoch-{epoch}"))
    unwrapped = accelerator.unwrap_model(model)
    state_dict = get_peft_model_state_dict(unwrapped, accelerator.get_state_dict(model))
    state_dict = {key: value.clone() for key, value in state_dict.items()}
    found["keys"] = sorted(state_dict)
    unwrapped.save_pretrained(adapter, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
    accelerator.load_state(os.path.join(adapter, "epoch-0"))
    found["first epoch"] = evaluate(accelerator, model, eval_loader, words)

    config = PeftConfig.from_pretrained(adapter)
    found["config"] = {key: str(value) for key, value in config.to_dict().items()}
    again = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
    again = PeftModel.from_pretrained(again, adapter)
    found["reloaded"] = evaluate(accelerator, accelerator.prepare(again), eval_loader, words)
    set_peft_model_state_dict(model, {key: torch.zeros_like(value) for key, value in state_dict.items()})
    found["emptied"] = evaluate(accelerator, model, eval_loader, words)
    set_peft_model_state_dict(model, state_dict)
    if config.peft_type == PeftType.LORA:
        found["merged"] = evaluate(accelerator, unwrapped.merge_and_unload(), eval_loader, words)
    accelerator.end_training()
    return found


def main(output_dir, fast):
    return {name: train(name, output_dir, fast) for name in configs()}
