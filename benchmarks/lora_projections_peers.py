"""What LoRA linears that share their input are measured against, and ours: a table of named implementations."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from .baselines import Implementation, Missing, in_force, ours
from .harness import Call
from .lora_linear_peers import AddmmLora
from .lora_projections_truth import Inputs, matrices
from .report import FLOOR


def build_frozen(inputs: Inputs) -> Call:
    """The floor: the base products and the sum of their dX, in the vendor's library, as layers without adapters."""
    x = inputs.x.detach().clone().requires_grad_()
    return Call(lambda: tuple(F.linear(x, each) for each in inputs.weights), {"x": x}, inputs.grads, inputs.frozen)


def build_peft(inputs: Inputs, *, autocast_adapter_dtype: bool, compiled: bool = False) -> Call:
    """peft's own layers with our values in them, one after the other; compiled, as one function of x."""
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    for name, weight in inputs.frozen.items():
        layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        model.add_module(name, layer)
    rank = len(inputs.lora_a[0])
    config = LoraConfig(
        r=rank, lora_alpha=inputs.scaling * rank, target_modules=list(inputs.frozen), init_lora_weights=False
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).base_model.model
    layers = [model.get_submodule(name) for name in inputs.frozen]
    leaves = {"x": inputs.x.detach().clone().requires_grad_()}
    with torch.no_grad():
        for i, (layer, a, b) in enumerate(zip(layers, inputs.lora_a, inputs.lora_b, strict=True)):
            leaves |= {f"A{i}": layer.lora_A["default"].weight, f"B{i}": layer.lora_B["default"].weight}
            leaves[f"A{i}"].copy_(a)
            leaves[f"B{i}"].copy_(b)

    def forward(x):
        return tuple(layer(x) for layer in layers)

    if compiled:
        torch._dynamo.reset()  # every cell compiles the same code anew; dynamo gives up after eight such times
        forward = torch.compile(forward, dynamic=False)
    return Call(lambda: forward(leaves["x"]), leaves, inputs.grads, inputs.frozen)


def _layer_by_layer(inputs: Inputs, leaves: dict[str, torch.Tensor], layer, context=None) -> Call:
    def forward():
        each = zip(inputs.weights, matrices(leaves, "A"), matrices(leaves, "B"), strict=True)
        return tuple(layer(leaves["x"], *tensors) for tensors in each)

    return Call(forward, leaves, inputs.grads, inputs.frozen, *([context] if context else []))


def build_addmm(inputs: Inputs) -> Call:
    return _layer_by_layer(
        inputs, inputs.leaves(None), lambda x, weight, a, b: AddmmLora.apply(x, weight, None, a, b, inputs.scaling, 0.0)
    )


def build_separate(inputs: Inputs) -> Call:
    """Our op of single layers."""
    context = in_force("auto", None)
    from fastpeft.ops import lora_linear

    def layer(x, weight, a, b):
        return lora_linear(x, weight, None, a, b, inputs.scaling)

    return _layer_by_layer(inputs, inputs.leaves(None), layer, context)


def build_fastpeft(inputs: Inputs, *, backend: str = "auto", adapter_dtype: torch.dtype | None = None) -> Call:
    context = in_force(backend, None)
    from fastpeft.ops import lora_projections

    leaves, scalings = inputs.leaves(adapter_dtype), [inputs.scaling] * len(inputs.weights)
    a, b = matrices(leaves, "A"), matrices(leaves, "B")

    def forward():
        return tuple(lora_projections(leaves["x"], inputs.weights, None, a, b, scalings))

    return Call(forward, leaves, inputs.grads, inputs.frozen, context)


IMPLEMENTATIONS = (
    Implementation(FLOOR, "frozen linears: forward and dX, no adapter", build_frozen),
    Implementation(
        "peft-fp32",
        "peft's layers, fp32 adapters, its default",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=True),
        adapter_dtype=torch.float32,
    ),
    Implementation(
        "peft",
        "peft's layers, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False),
    ),
    Implementation(
        "peft-compile",
        "peft's layers in one function under torch.compile, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False, compiled=True),
        compiled=True,
    ),
    Implementation("addmm-algebra", "the vendor's products, then addmm_: Unsloth's and Axolotl's algebra", build_addmm),
    ours(
        "fastpeft:separate",
        "fastpeft, layer by layer",
        build_separate,
        strategy="separate",
    ),
    ours(
        "fastpeft",
        "fastpeft, one op",
        build_fastpeft,
    ),
    ours(
        "fastpeft-fp32",
        "fastpeft, one op, fp32 adapters",
        lambda inputs: build_fastpeft(inputs, adapter_dtype=torch.float32),
        adapter_dtype=torch.float32,
    ),
    ours(
        "fastpeft:torch",
        "fastpeft, one op, torch backend",
        lambda inputs: build_fastpeft(inputs, backend="torch"),
        strategy="torch",
    ),
)
