"""What the experts' LoRA linear is measured against, and ours: a table of named implementations."""

import importlib.util

import torch
from torch import nn

from .baselines import Implementation, Missing, in_force, ours
from .expert_lora_linear_truth import Inputs, by_expert
from .harness import Call
from .report import FLOOR

# peft rounds fp32 adapters to the weight's dtype, and their gradients come through one of the weight in that dtype; of
# eager, by which errors are judged, both are in fp32.
ROUNDED = 1e5


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x_e W_eᵀ of each expert (M, N), by torch's grouped product, as transformers calls it. Raises Missing without."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        raise Missing("this torch has no grouped_mm")
    return torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends.to(torch.int32))


def build_frozen(inputs: Inputs) -> Call:
    """The floor: the base product and its dX, in torch's grouped product, as experts without adapters."""
    x = inputs.x.detach().clone().requires_grad_()
    return Call(lambda: grouped(x, inputs.weight, inputs.ends), {"x": x}, inputs.grad, {"weight": inputs.weight})


class _Experts(nn.Module):
    def __init__(self, inputs: Inputs):
        super().__init__()
        self.up_proj, self.ends = nn.Parameter(inputs.weight, requires_grad=False), inputs.ends

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return grouped(x, self.up_proj, self.ends)


def build_peft(inputs: Inputs, *, autocast_adapter_dtype: bool) -> Call:
    """peft's own wrapper of the parameter with our values in it: it makes the adapted weights of all experts."""
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    from peft import LoraConfig, get_peft_model

    model, rank = nn.Module(), len(inputs.lora_a) // len(inputs.weight)
    model.experts = _Experts(inputs)
    config = LoraConfig(
        r=rank, lora_alpha=inputs.scaling * rank, target_modules=[], target_parameters=["experts.up_proj"]
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    wrapper = model.base_model.model.experts
    leaves = {"x": inputs.x.detach().clone().requires_grad_()}
    leaves |= {"A": wrapper.lora_A["default"].weight, "B": wrapper.lora_B["default"].weight}
    with torch.no_grad():
        leaves["A"].copy_(inputs.lora_a)
        leaves["B"].copy_(inputs.lora_b)
    return Call(lambda: wrapper(leaves["x"]), leaves, inputs.grad, {"weight": inputs.weight})


def build_loop(inputs: Inputs) -> Call:
    """LoRA's algebra on each expert's rows, without an op of ours."""
    leaves = inputs.leaves(None)
    return Call(lambda: by_expert(inputs, leaves, inputs.weight), leaves, inputs.grad, {"weight": inputs.weight})


def build_fastpeft(inputs: Inputs, *, backend: str = "auto", adapter_dtype: torch.dtype | None = None) -> Call:
    context = in_force(backend, None)
    from fastpeft.ops import expert_lora_linear

    leaves = inputs.leaves(adapter_dtype)

    def forward():
        return expert_lora_linear(
            leaves["x"], inputs.weight, None, leaves["A"], leaves["B"], inputs.scaling, inputs.ends
        )

    return Call(forward, leaves, inputs.grad, {"weight": inputs.weight}, context)


IMPLEMENTATIONS = (
    Implementation(FLOOR, "frozen experts: grouped product and dX, no adapter", build_frozen),
    Implementation(
        "peft-fp32",
        "peft's wrapper of the parameter, fp32 adapters, its default",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=True),
        adapter_dtype=torch.float32,
        rms_bound=ROUNDED,
    ),
    Implementation(
        "peft",
        "peft's wrapper of the parameter, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False),
    ),
    Implementation("loop", "LoRA's algebra, expert by expert, out of place", build_loop),
    ours(
        "fastpeft",
        "fastpeft, its own choice: the torch backend",
        build_fastpeft,
    ),
    ours(
        "fastpeft-fp32",
        "fastpeft, its own choice, fp32 adapters",
        lambda inputs: build_fastpeft(inputs, adapter_dtype=torch.float32),
        adapter_dtype=torch.float32,
    ),
    ours(
        "fastpeft:triton",
        "fastpeft, Triton demanded: all experts in one launch",
        lambda inputs: build_fastpeft(inputs, backend="triton"),
        strategy="triton",
        needs_gpu=True,
    ),
    ours(
        "fastpeft:triton-fp32",
        "fastpeft, Triton demanded, fp32 adapters",
        lambda inputs: build_fastpeft(inputs, backend="triton", adapter_dtype=torch.float32),
        strategy="triton",
        adapter_dtype=torch.float32,
        needs_gpu=True,
    ),
)
