"""LoRA-FA (Zhang et al., arXiv 2308.03303): A stays as it was drawn and B is trained, so that a layer needs to keep the
r numbers of a token that go into B, and not the token's whole input."""

from torch import nn

from fastpeft.errors import PatchError


def freeze_lora_A(model: nn.Module) -> nn.Module:  # noqa: N802 - the parameter's name
    """Freeze the A of every LoRA on a linear layer or a convolution, of every adapter; returns the model.

    What is left is trained as before, by any optimizer; `lora_linear` then saves no x for backward and makes no pass
    over it. HF peft's `create_lorafa_optimizer` freezes the same parameters, and besides scales the gradient of B; it
    takes patched models too. A of an embedding begins at zero and stays trainable. `set_adapter` and what adds an
    adapter make A trainable again: freeze after them, and before the optimizer is made.

    Args:
        model: a patched model or a PeftModel.

    Raises:
        PatchError: the model is no module, has no A of this kind, or has AdaLoRA, which ranks by the gradient of A.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"freeze_lora_A: a {type(model).__name__} has no parameters; give a patched model")
    named = [(name, module) for name, module in model.named_modules() if len(getattr(module, "lora_A", ()))]
    if not named:
        raise PatchError(f"freeze_lora_A: no layer of this {type(model).__name__} has a lora_A; add a LoRA first")
    for name, module in named:
        if len(getattr(module, "lora_E", ())):
            raise PatchError(f"freeze_lora_A: {name} has AdaLoRA, whose ranks go by the gradient of A; train A too")
    for _, module in named:
        module.lora_A.requires_grad_(False)
    return model
