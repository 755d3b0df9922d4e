"""Models of one layer, adapted in every way by every method, and what a step of training computes of them compiled."""

import torch
import transformers

import fastpeft
from tests.models import _AUTO, DEPTHS, FAMILIES, batch
from tests.peft_pair import quietly, randomise
from tests.prefix_pair import padded_left, task_of

COMPILED = tuple(DEPTHS)
_TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query"], "gpt2": ["c_attn"], "t5": ["q", "wo"]}

_VIRTUAL = {"num_virtual_tokens": 3}
_NETWORK = {**_VIRTUAL, "encoder_hidden_size": 12}
_SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "total_step": 99, "lora_alpha": 8}
METHODS = {  # name -> class of the configuration, its settings, which of them is a dropout
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 8}, "lora_dropout"),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}, "lora_dropout"),
    "adalora": ("AdaLoraConfig", _SCHEDULE, "lora_dropout"),
    "prefix": ("PrefixTuningConfig", _VIRTUAL, None),
    "prefix-projection": ("PrefixTuningConfig", {**_NETWORK, "prefix_projection": True}, None),
    "prompt": ("PromptTuningConfig", _VIRTUAL, None),
    "p-tuning-mlp": ("PromptEncoderConfig", _NETWORK, None),
    "p-tuning-lstm": ("PromptEncoderConfig", {**_NETWORK, "encoder_reparameterization_type": "LSTM"}, None),
    "adapter": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}, None),
}


def _native(model, name: str, settings: dict):
    return fastpeft.patch(model, getattr(fastpeft, name)(**settings))


WAYS = {"native": _native}  # name -> a function of a plain model, a configuration's class and settings


def adapted(method: str, family: str = "llama", way: str = "native", **more) -> torch.nn.Module:
    """A model of one layer, in training, whose adapter is not neutral. `more`: other settings of the method."""
    kind, settings = FAMILIES[family]
    config = transformers.AutoConfig.for_model(kind, **{**settings, DEPTHS[family]: 1}, num_labels=3)
    task, (name, own, _) = task_of(family), METHODS[method]
    torch.manual_seed(0)
    model = getattr(transformers, _AUTO[task]).from_config(config)
    targets = {"target_modules": _TARGETS[family]} if "Lora" in name else {}
    model = quietly(WAYS[way], model, name, {"task_type": task, **targets, **own, **more})
    randomise(model)
    return model.train()


def varied(family: str, step: int) -> dict:
    """A batch of its own length and number of rows, padded on either side, or not at all."""
    inputs = batch(task_of(family), rows=2 + step % 3, length=(9, 12, 7, 15, 10, 8)[step % 6] + step // 6 % 3)
    if step % 4 == 1 and family != "t5":
        return padded_left(inputs)
    return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])} if step % 4 == 2 else inputs


def stepped(model, run, inputs: dict) -> tuple[torch.Tensor, dict]:
    """(loss, the gradients by name) of `run`, which is the model or what it was compiled to."""
    model.zero_grad()
    inputs, labels = dict(inputs), None
    if model.config.model_type == "gpt2":  # whose own loss logs, which breaks a graph
        labels = inputs.pop("labels")
    out = run(**inputs)
    loss = out.loss if labels is None else torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    return loss.detach(), grads
