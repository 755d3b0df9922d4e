"""What the LoRA linear on mixed batches is measured against, and ours: a table of named implementations."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from .baselines import Implementation, Missing, in_force, ours
from .harness import Call
from .mixed_lora_linear_truth import Inputs, one_by_one
from .report import FLOOR


def build_frozen(inputs: Inputs) -> Call:
    """The floor: the base product and its dX, in the vendor's library, as a layer without adapters."""
    x = inputs.x.detach().clone().requires_grad_()
    return Call(lambda: F.linear(x, inputs.weight), {"x": x}, inputs.grad, {"weight": inputs.weight})


def build_peft(inputs: Inputs, *, autocast_adapter_dtype: bool) -> Call:
    """peft's own layer with our values in it, called with `adapter_names`: a PeftModel refuses to train so, its layers
    do not."""
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.proj = nn.Linear(*inputs.weight.shape[::-1], bias=False, device="meta")
    model.proj.weight = nn.Parameter(inputs.weight, requires_grad=False)
    for i, (a, scaling) in enumerate(zip(inputs.lora_a, inputs.scalings, strict=True)):
        rank = len(a)
        config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["proj"], init_lora_weights=False)
        if i == 0:
            model = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=autocast_adapter_dtype)
        else:
            model.add_adapter(str(i), config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model.proj
    leaves = {"x": inputs.x.detach().clone().requires_grad_()}
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(inputs.lora_a, inputs.lora_b, strict=True)):
            leaves |= {f"A{i}": layer.lora_A[str(i)].weight, f"B{i}": layer.lora_B[str(i)].weight}
            leaves[f"A{i}"].copy_(a)
            leaves[f"B{i}"].copy_(b)
    for leaf in leaves.values():
        leaf.requires_grad_()
    names = ["__base__" if g < 0 else str(g) for g in inputs.rows]
    layer.eval()
    return Call(lambda: layer(leaves["x"], adapter_names=names), leaves, inputs.grad, {"weight": inputs.weight})


def build_loop(inputs: Inputs) -> Call:
    """peft's algebra without its modules."""
    leaves = inputs.leaves(None)
    return Call(lambda: one_by_one(inputs, leaves, inputs.weight), leaves, inputs.grad, {"weight": inputs.weight})


def build_fastpeft(inputs: Inputs, *, backend: str = "auto", adapter_dtype: torch.dtype | None = None) -> Call:
    context = in_force(backend, None)
    from fastpeft.ops import mixed_lora_linear

    leaves = inputs.leaves(adapter_dtype)
    a, b = ([leaf for name, leaf in leaves.items() if name[0] == letter] for letter in "AB")

    def forward():
        return mixed_lora_linear(leaves["x"], inputs.weight, None, a, b, inputs.scalings, inputs.rows)

    return Call(forward, leaves, inputs.grad, {"weight": inputs.weight}, context)


IMPLEMENTATIONS = (
    Implementation(FLOOR, "frozen linear: forward and dX, no adapter", build_frozen),
    Implementation(
        "peft-fp32",
        "peft's layer with adapter_names, fp32 adapters, its default",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=True),
        adapter_dtype=torch.float32,
    ),
    Implementation(
        "peft",
        "peft's layer with adapter_names, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False),
    ),
    Implementation("loop", "peft's algebra, adapter by adapter, out of place", build_loop),
    ours(
        "fastpeft",
        "fastpeft, its own choice",
        build_fastpeft,
    ),
    ours(
        "fastpeft-fp32",
        "fastpeft, its own choice, fp32 adapters",
        lambda inputs: build_fastpeft(inputs, adapter_dtype=torch.float32),
        adapter_dtype=torch.float32,
    ),
    ours(
        "fastpeft:torch",
        "fastpeft, torch backend: adapter by adapter",
        lambda inputs: build_fastpeft(inputs, backend="torch"),
        strategy="torch",
    ),
)
