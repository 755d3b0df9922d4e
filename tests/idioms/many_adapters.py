"""One base, many adapters: training two, then serving them singly, together, mixed in a batch, merged and replaced."""

import os

import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import AutoModelForCausalLM, set_seed

import fastpeft
from tests.idioms.materials import sentence, tokenizer
from tests.models import tiny

TASKS = {"french": (4, 8), "german": (8, 16)}  # rank, alpha


def train(base_model, output_dir, name, fast):
    rank, alpha = TASKS[name]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "up_proj"], task_type=TaskType.CAUSAL_LM,
        use_rslora=True,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model), config, adapter_name=name)
    if fast:
        fastpeft.patch(model)
    batch = tokenizer()([sentence(number + rank, 8) for number in range(4)], return_tensors="pt")
    optimizer = torch.optim.AdamW(filter(lambda parameter: parameter.requires_grad, model.parameters()), lr=2e-2)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(output_dir)
    return losses


@torch.no_grad()
def answers(model, batch, **options):
    """Logits, and what is generated."""
    model.eval()
    text = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)
    return model(**batch, **options).logits, text


def served(base_model, french, german, fast):
    base = AutoModelForCausalLM.from_pretrained(base_model)
    model = PeftModel.from_pretrained(base, french, adapter_name="french")
    if fast:
        fastpeft.patch(model)
    model.load_adapter(german, adapter_name="german")
    batch = tokenizer()([sentence(n, 5) for n in range(4)], return_tensors="pt")
    found = {"first": answers(model, batch), "active": model.active_adapters}
    model.set_adapter("german")
    found["second"] = answers(model, batch)
    with model.disable_adapter():
        found["none"] = answers(model, batch)
    found["mixed"] = answers(model, batch, adapter_names=["german", "__base__", "french", "german"])
    model.base_model.set_adapter(["french", "german"])
    found["both"] = answers(model, batch)
    for kind, more in {"linear": {}, "cat": {}, "svd": {"svd_rank": 4}, "ties": {"density": 0.5}}.items():
        names = ["french", "french"] if kind in ("linear", "ties") else ["french", "german"]
        name = f"{kind}-of-both"
        model.add_weighted_adapter(names, [0.7, 0.3], adapter_name=name, combination_type=kind, **more)
        model.set_adapter(name)
        found[name] = answers(model, batch) if kind != "svd" else model(**batch).logits.detach().shape
    model.add_adapter("new", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("new", inference_mode=True)
    model.delete_adapter("cat-of-both")
    found["configs"] = {name: config.r for name, config in model.peft_config.items()}
    layers = model.get_layer_status()
    found["layers"] = [(each.name, each.module_type, each.enabled, each.available_adapters) for each in layers]
    status = get_model_status(model)
    found["status"] = (
        status.active_adapters,
        status.trainable_params,
        status.adapter_model_type,
        status.merged_adapters,
    )
    found["types"] = sorted({type(each).__name__ for each in model.modules() if isinstance(each, LoraLayer)})
    model.set_adapter("german")
    model.merge_adapter()
    found["merged"] = answers(model, batch)
    found["merged adapters"] = model.get_layer_status()[0].merged_adapters
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["french", "german"])
    found["merged both"] = answers(model, batch)
    model.unmerge_adapter()
    with rescale_adapter_scale(model, 0.5):
        found["half"] = answers(model, batch)
    model.save_pretrained(os.path.join(os.path.dirname(french), "all"), selected_adapters=["german", "linear-of-both"])
    found["weights"] = get_peft_model_state_dict(model, adapter_name="german")
    unloaded = model.unload()
    found["unloaded"] = answers(unloaded, batch)
    found["left"] = type(unloaded).__name__, [name for name, _ in unloaded.named_parameters() if "lora" in name]
    return found


def swapped(base_model, french, german, fast):
    """One adapter takes another's place in the same tensors."""
    model = AutoPeftModelForCausalLM.from_pretrained(french)
    if fast:
        fastpeft.patch(model)
    batch = tokenizer()([sentence(1, 6)], return_tensors="pt")
    before = answers(model, batch)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    padded = answers(model, batch)
    hotswap_adapter(model, german, adapter_name="default", torch_device="cpu")
    after = answers(model, batch)
    config = PeftConfig.from_pretrained(german)
    return {"before": before, "padded": padded, "after": after, "rank": config.r}


def main(output_dir, fast):
    set_seed(7)
    base = os.path.join(output_dir, "base")
    tiny("qwen2").save_pretrained(base)
    found = {name: train(base, output_dir, name, fast) for name in TASKS}
    french, german = (os.path.join(output_dir, name) for name in TASKS)
    found["served"] = served(base, french, german, fast)
    found["swapped"] = swapped(base, french, german, fast)
    return found
