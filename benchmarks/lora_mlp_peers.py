"""What the gated MLP with LoRA is measured against, and ours: a table of named implementations."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from .baselines import Implementation, Missing, in_force, ours
from .harness import Call
from .lora_mlp_truth import Inputs, by_layers
from .report import FLOOR


def build_frozen(inputs: Inputs) -> Call:
    """The floor: the module without adapters, and its dX."""
    x = inputs.x.detach().clone().requires_grad_()
    gate, up, down = inputs.weights
    return Call(
        lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), {"x": x}, inputs.grad, inputs.frozen
    )


class _Mlp(nn.Module):
    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, layer)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def build_peft(inputs: Inputs, *, autocast_adapter_dtype: bool, compiled: bool = False) -> Call:
    """peft's own layers with our values in them, in a module such as transformers has."""
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    from peft import LoraConfig, get_peft_model

    rank = len(inputs.lora_a[0])
    config = LoraConfig(
        r=rank, lora_alpha=inputs.scaling * rank, target_modules=list(inputs.frozen), init_lora_weights=False
    )
    model = get_peft_model(_Mlp(inputs.frozen), config, autocast_adapter_dtype=autocast_adapter_dtype)
    model = model.base_model.model
    leaves = {"x": inputs.x.detach().clone().requires_grad_()}
    with torch.no_grad():
        for i, (name, a, b) in enumerate(zip(inputs.frozen, inputs.lora_a, inputs.lora_b, strict=True)):
            layer = model.get_submodule(name)
            leaves |= {f"A{i}": layer.lora_A["default"].weight, f"B{i}": layer.lora_B["default"].weight}
            leaves[f"A{i}"].copy_(a)
            leaves[f"B{i}"].copy_(b)
    forward = model
    if compiled:
        torch._dynamo.reset()  # every cell compiles the same code anew; dynamo gives up after eight such times
        forward = torch.compile(model, dynamic=False)
    return Call(lambda: forward(leaves["x"]), leaves, inputs.grad, inputs.frozen)


class AddmmMlp(torch.autograd.Function):
    """The module as one function whose products are all the vendor's, rank-r terms accumulated with beta = 1: saved are
    x, gate and up; h and every S are computed again, and dY B twice.

    The algebra of hand-written LoRA functions without kernels of their own for it, as Unsloth's and Axolotl's, in fresh
    buffers.
    """

    @staticmethod
    def forward(ctx, x, scaling: float, *tensors):
        weights, a, b = tensors[:3], tensors[3:6], tensors[6:]
        gate, up = (_with_term(x, weights[i], a[i], b[i], scaling) for i in (0, 1))
        ctx.save_for_backward(x, gate, up, *tensors)
        ctx.scaling = scaling
        return _with_term(F.silu(gate) * up, weights[2], a[2], b[2], scaling)

    @staticmethod
    def backward(ctx, grad):
        x, gate, up, *tensors = ctx.saved_tensors
        weights, a, b = tensors[:3], tensors[3:6], tensors[6:]
        act = F.silu(gate)
        dh = _with_term(grad, weights[2].T, b[2].T, a[2].T, ctx.scaling)
        gradients = [None, None, (act * up, grad)]
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        dup = dh.mul_(act)
        gradients[:2] = (x, dgate), (x, dup)
        dx = dgate @ weights[0]
        dx.addmm_(dup, weights[1])
        for i, each in ((0, dgate), (1, dup)):
            dx.addmm_(each @ b[i], a[i], alpha=ctx.scaling)
        da = [((dy @ b[i]).T @ z).mul_(ctx.scaling) for i, (z, dy) in enumerate(gradients)]
        db = [(dy.T @ (z @ a[i].T)).mul_(ctx.scaling) for i, (z, dy) in enumerate(gradients)]
        return dx, None, None, None, None, *da, *db


def _with_term(z, weight, a, b, scaling: float):
    y = z @ weight.T
    return y.addmm_(z @ a.T, b.T, alpha=scaling)


def build_addmm(inputs: Inputs) -> Call:
    leaves = inputs.leaves(None)
    matrices = [leaves[f"{letter}{i}"] for letter in "AB" for i in range(3)]

    def forward():
        return AddmmMlp.apply(leaves["x"], inputs.scaling, *inputs.weights, *matrices)

    return Call(forward, leaves, inputs.grad, inputs.frozen)


def build_separate(inputs: Inputs) -> Call:
    """Our op of single layers, the activation and the product in torch."""
    context = in_force("auto", None)
    from fastpeft.ops import lora_linear

    leaves = inputs.leaves(None)

    def layer(z, weight, a, b):
        return lora_linear(z, weight, None, a, b, inputs.scaling)

    return Call(lambda: by_layers(leaves, inputs.weights, layer), leaves, inputs.grad, inputs.frozen, context)


def build_fastpeft(
    inputs: Inputs, *, backend: str = "auto", adapter_dtype: torch.dtype | None = None, recompute: bool = False
) -> Call:
    context = in_force(backend, None)
    from fastpeft.ops import lora_mlp
    from fastpeft.ops.lora_mlp import Projection

    leaves = inputs.leaves(adapter_dtype)

    def forward():
        projections = [
            Projection(weight, None, leaves[f"A{i}"], leaves[f"B{i}"], inputs.scaling)
            for i, weight in enumerate(inputs.weights)
        ]
        return lora_mlp(leaves["x"], *projections, recompute=recompute)

    return Call(forward, leaves, inputs.grad, inputs.frozen, context)


def _ours(name: str, words: str, build, strategy: str, adapter_dtype=None) -> Implementation:
    return ours(name, words, build, strategy, adapter_dtype=adapter_dtype)


IMPLEMENTATIONS = (
    Implementation(FLOOR, "frozen MLP: forward and dX, no adapter", build_frozen),
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
        "peft's layers in one module under torch.compile, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False, compiled=True),
        compiled=True,
    ),
    Implementation("addmm-algebra", "one function of the vendor's products: Unsloth's algebra", build_addmm),
    _ours("fastpeft:separate", "fastpeft, layer by layer", build_separate, "separate"),
    _ours("fastpeft", "fastpeft, one op", build_fastpeft, "auto"),
    _ours(
        "fastpeft:recompute",
        "fastpeft, one op, gate and up computed again in backward",
        lambda inputs: build_fastpeft(inputs, recompute=True),
        "recompute",
    ),
    _ours(
        "fastpeft-fp32",
        "fastpeft, one op, fp32 adapters",
        lambda inputs: build_fastpeft(inputs, adapter_dtype=torch.float32),
        "auto",
        torch.float32,
    ),
    _ours(
        "fastpeft:torch",
        "fastpeft, one op, torch backend",
        lambda inputs: build_fastpeft(inputs, backend="torch"),
        "torch",
    ),
)
