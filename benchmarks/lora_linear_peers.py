"""What the LoRA linear is measured against, and ours: a table of named implementations.

An entry binds tensors to a `Call`. A strategy of ours, or a peer, is one more entry in `IMPLEMENTATIONS`.
"""

import importlib.util
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .baselines import Implementation, Missing, in_force, ours
from .harness import Call
from .report import FLOOR


@dataclass
class Inputs:
    """Tensors of one cell: x (M, K), weight (N, K), grad (M, N) in the data's dtype; lora_a (r, K) and lora_b (N, r) in
    fp32, from which an implementation takes adapters in its own dtype."""

    x: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    dropout: float

    def leaves(self, adapter_dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """Fresh leaves; None means adapters in the data's dtype."""
        dtype = adapter_dtype or self.x.dtype
        tensors = {"x": self.x, "A": self.lora_a.to(dtype), "B": self.lora_b.to(dtype)}
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def build_frozen(inputs: Inputs) -> Call:
    """The floor: the base product and its dX, in the vendor's library, as a layer without adapters."""
    x = inputs.x.detach().clone().requires_grad_()
    return Call(lambda: F.linear(x, inputs.weight), {"x": x}, inputs.grad, {"weight": inputs.weight})


def _peft_layer(inputs: Inputs, autocast_adapter_dtype: bool) -> nn.Module:
    """peft.tuners.lora.layer.Linear around an nn.Linear on our weight, with our adapter values in it."""
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    from peft import LoraConfig, get_peft_model

    rank, k = inputs.lora_a.shape
    model = nn.Module()
    model.proj = nn.Linear(k, inputs.weight.shape[0], bias=False, device="meta")
    model.proj.weight = nn.Parameter(inputs.weight, requires_grad=False)
    config = LoraConfig(
        r=rank,
        lora_alpha=inputs.scaling * rank,
        lora_dropout=inputs.dropout,
        target_modules=["proj"],
        init_lora_weights=False,
    )
    layer = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).base_model.model.proj
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(inputs.lora_a)
        layer.lora_B["default"].weight.copy_(inputs.lora_b)
    if layer.scaling["default"] != inputs.scaling:
        raise RuntimeError(f"peft made the scaling {layer.scaling['default']}, asked for {inputs.scaling}")
    return layer.train()


def build_peft(inputs: Inputs, *, autocast_adapter_dtype: bool, compiled: bool = False) -> Call:
    layer = _peft_layer(inputs, autocast_adapter_dtype)
    x = inputs.x.detach().clone().requires_grad_()
    leaves = {"x": x, "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    forward = layer
    if compiled:
        torch._dynamo.reset()  # every cell compiles the same code anew; dynamo gives up after eight such times
        forward = torch.compile(layer, dynamic=False)
    return Call(lambda: forward(x), leaves, inputs.grad, {"weight": inputs.weight})


class AddmmLora(torch.autograd.Function):
    """y = x Wᵀ + bias, then y += s·S Bᵀ in place, S = drop(x) Aᵀ; backward dX = dY W, then dX += s·m⊙(T A), T = dY B.

    The algebra that hand-written LoRA functions without own GEMM kernels share: every product in the vendor's library,
    the low-rank terms accumulated with beta = 1. dY B is computed once.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling: float, dropout: float):
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        shrunk = dropped @ a.T
        y = F.linear(x, weight, bias)
        y.addmm_(shrunk, b.T, alpha=scaling)
        ctx.save_for_backward(dropped, mask, shrunk, weight, a, b)
        ctx.scaling, ctx.dropout = scaling, dropout
        return y

    @staticmethod
    def backward(ctx, grad):
        dropped, mask, shrunk, weight, a, b = ctx.saved_tensors
        t = grad @ b
        db = (grad.T @ shrunk).mul_(ctx.scaling)
        da = (t.T @ dropped).mul_(ctx.scaling)
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        if dx is not None and mask is None:
            dx.addmm_(t, a, alpha=ctx.scaling)
        elif dx is not None:
            dx.addcmul_(t @ a, mask.to(dx.dtype), value=ctx.scaling / (1 - ctx.dropout))
        return dx, None, None, da, db, None, None


def build_addmm(inputs: Inputs) -> Call:
    leaves = inputs.leaves(None)

    def forward():
        x, a, b = leaves.values()
        return AddmmLora.apply(x, inputs.weight, None, a, b, inputs.scaling, inputs.dropout)

    return Call(forward, leaves, inputs.grad, {"weight": inputs.weight})


def build_lorafusion(inputs: Inputs) -> Call:
    """Its own function, which wants x as (1, M, K) and draws dropout's seed from Python's generator."""
    if importlib.util.find_spec("lorafusion") is None:
        raise Missing("lorafusion is not installed")
    from lorafusion.ops.lora_v1 import fused_linear_lora

    leaves = inputs.leaves(None)

    def forward():
        x, a, b = leaves.values()
        return fused_linear_lora(x[None], inputs.weight, a, b, inputs.scaling, dropout_p=inputs.dropout)[0]

    return Call(forward, leaves, inputs.grad, {"weight": inputs.weight})


def build_fastpeft(
    inputs: Inputs, *, backend: str = "auto", strategy: str | None = None, adapter_dtype: torch.dtype | None = None
) -> Call:
    context = in_force(backend, strategy)
    from fastpeft.ops.lora_linear import lora_linear

    leaves = inputs.leaves(adapter_dtype)

    def forward():
        x, a, b = leaves.values()
        return lora_linear(x, inputs.weight, None, a, b, inputs.scaling, dropout=inputs.dropout, training=True)

    return Call(forward, leaves, inputs.grad, {"weight": inputs.weight}, context)


def _plan(inputs: Inputs, adapter_dtype: torch.dtype | None = None) -> str:
    """The strategy that serves the cell on a GPU, and why."""
    if not inputs.x.is_cuda:
        return ""
    from fastpeft.dispatch import lora_linear_plan_for

    sizes = (*inputs.x.shape, len(inputs.weight), len(inputs.lora_a))
    dtype = inputs.x.dtype
    plan = lora_linear_plan_for(inputs.x.device, dtype, adapter_dtype or dtype, sizes, inputs.dropout)
    return f"{plan.forward} forward, {plan.backward} backward, {plan.source}"


def strategies_of(x: torch.Tensor, weight: torch.Tensor, adapter_dtype: torch.dtype) -> tuple[str, ...]:
    """Those with figures of their own here: where "fused" stands in for "persistent" it would be timed twice."""
    from fastpeft.kernels import lora_gemm
    from fastpeft.plans import LORA_STRATEGIES

    own = lora_gemm.serves(x, weight, adapter_dtype)
    return tuple(name for name in LORA_STRATEGIES if name != "persistent" or own)


def build_rehomed(inputs: Inputs) -> Call:
    """A weight of its own with room beside it, as `fastpeft.rehome` gives."""
    from fastpeft.ops._rooms import with_room

    weight = with_room(inputs.weight, len(inputs.lora_a))
    return build_fastpeft(replace(inputs, weight=weight), backend="triton", strategy="augment")


def _strategy(name: str, label: str) -> Implementation:
    def build(inputs: Inputs) -> Call:
        return build_fastpeft(inputs, backend="triton", strategy=name)

    return ours(
        f"fastpeft:{name}",
        label,
        build,
        strategy=name,
        needs_gpu=True,
        serves=lambda inputs: name in strategies_of(inputs.x, inputs.weight, inputs.x.dtype),
    )


IMPLEMENTATIONS = (
    Implementation(FLOOR, "frozen linear: forward and dX, no adapter", build_frozen),
    Implementation(
        "peft-fp32",
        "peft, eager, its default: fp32 adapters (IEEE fp32 products, torch's default)",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=True),
        adapter_dtype=torch.float32,
    ),
    Implementation(
        "peft", "peft, eager, adapters in the base's dtype", lambda i: build_peft(i, autocast_adapter_dtype=False)
    ),
    Implementation(
        "peft-compile",
        "peft under torch.compile, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False, compiled=True),
        compiled=True,
    ),
    Implementation("addmm-algebra", "the vendor's product, then addmm_: Unsloth's and Axolotl's algebra", build_addmm),
    Implementation("lorafusion", "LoRAFusion", build_lorafusion, needs_gpu=True),
    ours(
        "fastpeft",
        "fastpeft, its own choice",
        build_fastpeft,
        said=_plan,
    ),
    ours(
        "fastpeft-fp32",
        "fastpeft, its own choice, fp32 adapters",
        lambda inputs: build_fastpeft(inputs, adapter_dtype=torch.float32),
        adapter_dtype=torch.float32,
        said=lambda inputs: _plan(inputs, torch.float32),
    ),
    _strategy("prewrite", "vendor GEMM accumulating onto a pre-written low-rank term"),
    _strategy("addmm", "vendor GEMM, then the low-rank term added in place"),
    _strategy("augment", "one vendor GEMM over operands copied side by side"),
    ours(
        "fastpeft:rehomed",
        "one vendor GEMM on a weight with room beside it, x and dY copied",
        build_rehomed,
        strategy="augment",
        needs_gpu=True,
    ),
    _strategy("fused", "one Triton GEMM with the low-rank term inside"),
    _strategy("persistent", "one persistent Triton GEMM by descriptors, the low-rank term inside"),
    ours(
        "fastpeft:torch",
        "fastpeft, torch backend",
        lambda inputs: build_fastpeft(inputs, backend="torch"),
        strategy="torch",
    ),
)
