"""LoRA+ (Hayou et al., arXiv 2402.12354): B learns faster than A, by a fixed ratio of their learning rates."""

import math
from typing import Any

import torch
from torch import nn

from fastpeft.errors import PatchError
from fastpeft.untrusted import shown


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The parameter groups of LoRA+, for any torch optimizer: `torch.optim.AdamW(fastpeft.param_groups(...))`.

    The groups, their order and what is in them are those of HF peft's `create_loraplus_optimizer`, so that an
    optimizer's saved state goes from the one to the other. Make them once the adapter that is to be trained is active.

    Args:
        model: a patched model or a PeftModel, with adapters of any kind.
        lr: of A, and of all that has no rule of its own (modules trained whole, virtual tokens).
        loraplus_lr_ratio: lr times this is that of B, and of vectors (biases, magnitudes of DoRA); the paper finds 16
            and more good, with an lr below LoRA's usual one.
        loraplus_lr_embedding: of LoRA on embeddings, A and B, whose input is one-hot.
        weight_decay: of all but biases and LayerNorms.

    Returns:
        Four dicts with "params", "lr" and "weight_decay": A and the rest; embeddings; B and vectors; those among the
        last that do not decay. Together they have each trainable parameter once. A group can be empty.

    Raises:
        PatchError: the model is no module or trains nothing, or a number is not finite, or is negative.
    """
    numbers = {"lr": lr, "loraplus_lr_ratio": loraplus_lr_ratio, "loraplus_lr_embedding": loraplus_lr_embedding}
    for name, value in {**numbers, "weight_decay": weight_decay}.items():
        if not _is_rate(value):
            raise PatchError(f"param_groups: {name}={shown(value)} must be a finite number, 0 or more")
    if not isinstance(model, nn.Module):
        raise PatchError(f"param_groups: a {type(model).__name__} has no parameters; give a patched model")
    rates = (lr, loraplus_lr_embedding, lr * loraplus_lr_ratio, lr * loraplus_lr_ratio)
    decays = (weight_decay, weight_decay, weight_decay, 0.0)
    groups = [{"params": [], "lr": rate, "weight_decay": decay} for rate, decay in zip(rates, decays, strict=True)]
    of_embeddings, of_norms = _of_embeddings(model), _of_norms(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in of_embeddings:
            place = 1
        elif "lora_B" in name or parameter.ndim == 1:
            place = 3 if "bias" in name or id(parameter) in of_norms else 2
        else:
            place = 0
        groups[place]["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise PatchError(f"param_groups: nothing in this {type(model).__name__} is trained; make an adapter active")
    return groups


def _is_rate(value: Any) -> bool:
    """A number, or torch's tensor for one that changes in captured steps."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and _is_rate(value.item())
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _of_embeddings(model: nn.Module) -> set[int]:
    """The ids of what belongs to a LoRA on an embedding: its factors, and the weight below it."""
    found = set()
    for module in model.modules():
        if len(getattr(module, "lora_embedding_A", ())):
            base = getattr(module, "base_layer", module)
            held = (*module.lora_embedding_A.values(), *module.lora_embedding_B.values())
            found.update(map(id, (*held, *base.parameters(recurse=False))))
    return found


def _of_norms(model: nn.Module) -> set[int]:
    norms = (module for module in model.modules() if isinstance(module, nn.LayerNorm))
    return {id(parameter) for norm in norms for parameter in norm.parameters()}
