"""HF peft's AdaLoRA and ours, trained side by side. `python -m tests.adalora_pair` prints the ranks after 60 steps."""

import copy
import functools

import torch

import fastpeft
from tests.models import batch, tiny
from tests.peft_pair import by_base_name, pair_of, quietly

SCHEDULE = {"total_step": 60, "init_r": 6, "target_r": 3, "tinit": 5, "tfinal": 10}
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
OF_FAMILY = {  # peft refuses or fails without
    "mistral": {"target_modules": ["q_proj", "v_proj"]},
    "mixtral": {"target_modules": ["q_proj", "v_proj"]},
    "phi3": {"target_modules": ["qkv_proj"]},
}


def pair(family="llama", task="CAUSAL_LM", dtype=torch.float32, options=None, **settings):
    """(peft's model, ours) from one seed; peft's number of ranks, which it trains on a base that is not fp32 and does
    not save, is frozen as ours is."""
    settings = {"task_type": task, **SCHEDULE, **OF_FAMILY.get(family, {}), **settings}
    build = functools.partial(tiny, family, task, dtype)
    hf, ours = pair_of(build, settings, "AdaLoraConfig", **(options or {}))
    for name, parameter in hf.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return hf, ours


def ours_alone(family="llama", task="CAUSAL_LM", dtype=torch.float32, seed=11, **settings):
    """Our model of the pair."""
    torch.manual_seed(seed)
    config = fastpeft.AdaLoraConfig(task_type=task, **{**SCHEDULE, **settings})
    return quietly(fastpeft.patch, tiny(family, task, dtype), config)


def unlabelled(inputs: dict) -> dict:
    """The inputs without labels: peft's AdaLoRA, loaded for inference, fails with them."""
    inputs = {key: value for key, value in inputs.items() if not key.endswith("positions")}
    labels = inputs.pop("labels", None)
    return inputs if labels is None or labels.shape == inputs["input_ids"].shape else {**inputs, **_decoded(labels)}


def _decoded(labels: torch.Tensor) -> dict:
    return {"decoder_input_ids": labels} if labels.ndim == 2 else {}


def adam(model, lr=1e-2):
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)


def train(model, optimizer, steps, inputs=None, after=None) -> list[float]:
    """The losses of these steps (numbers from 1), with the allocator's part; `after(step)` is called behind each."""
    allocate = getattr(model, "base_model", None)
    allocates = hasattr(allocate, "update_and_allocate")  # peft's; a model of transformers has a base_model too
    losses = []
    for step in steps:
        loss = model(**(inputs or batch())).loss
        loss.backward()
        optimizer.step()
        if allocates:
            allocate.update_and_allocate(step)
        else:
            fastpeft.update_and_allocate(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
        if after is not None:
            after(step)
    return losses


def pattern(model) -> dict | None:
    """Which triplets the live configuration says are left, under the keys of the file."""
    found = model.peft_config["default"].rank_pattern
    return found and {key.removesuffix(".default"): value for key, value in found.items()}


def ranks(model) -> dict[str, int]:
    """How many singular values of each layer are not zero."""
    return {
        name.removesuffix(".lora_E.default"): int(parameter.count_nonzero())
        for name, parameter in by_base_name(model).items()
        if name.endswith(".lora_E.default")
    }


def trace(model, steps, inputs=None) -> list:
    """(ranks, pattern) behind each step of training."""
    found = []
    train(model, adam(model), steps, inputs, lambda step: found.append((ranks(model), copy.deepcopy(pattern(model)))))
    return found


def main() -> None:
    hf, ours = pair("llama", **TARGETS)
    both = [trace(model, range(1, 61))[-1][0] for model in (hf, ours)]
    print(f"{'ranks after 60 steps':<32}{'peft':>6}{'ours':>6}")
    for path, rank in both[0].items():
        print(f"{path:<32}{rank:>6}{both[1][path]:>6}")
    print(f"{'sum':<32}{sum(both[0].values()):>6}{sum(both[1].values()):>6}")


if __name__ == "__main__":
    main()
