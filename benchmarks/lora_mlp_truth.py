"""The truth of the gated MLP with LoRA in float64: output, dX, and of gate, up and down dA and dB."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .accuracy import MAX_RMS_RATIO, Given, Tensors, Trial, Verdict, named, verify_trial
from .harness import Call
from .lora_linear_truth import FP32_FLOOR


@dataclass
class Inputs:
    """Tensors of one cell: x (M, K); weights of gate and up (H, K) and of down (N, H), and grad (M, N) in the data's
    dtype; of each lora_a and lora_b in fp32, from which an implementation takes adapters in its own dtype."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    grad: torch.Tensor
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    scaling: float

    @property
    def frozen(self) -> Tensors:
        return dict(zip(("gate", "up", "down"), self.weights, strict=True))

    def leaves(self, adapter_dtype: torch.dtype | None) -> Tensors:
        """Fresh leaves x, A0, B0, A1, ...; None means adapters in the data's dtype."""
        dtype = adapter_dtype or self.x.dtype
        tensors = {"x": self.x}
        for i, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            tensors |= {f"A{i}": a.to(dtype), f"B{i}": b.to(dtype)}
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def by_layers(leaves: Tensors, weights: list[torch.Tensor], layer) -> torch.Tensor:
    """down(silu(gate(x))·up(x)) of layer(z, weight, A, B)."""
    gate, up = (layer(leaves["x"], weights[i], leaves[f"A{i}"], leaves[f"B{i}"]) for i in (0, 1))
    return layer(F.silu(gate) * up, weights[2], leaves["A2"], leaves["B2"])


def plain_layer(scaling: float):
    """HF peft's algebra, of draws with adapters of their own too."""

    def layer(z, weight, a, b):
        return (F.linear(z, weight) + z.to(a.dtype) @ a.mT @ b.mT * scaling).to(z.dtype)

    return layer


def _results(leaves: Tensors, weights: list[torch.Tensor], scaling: float, grad: torch.Tensor) -> Tensors:
    y = by_layers(leaves, weights, plain_layer(scaling))
    return named(y, leaves, torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype)))


class MlpTruth:
    """Everything in float64, of adapters in one dtype or another. The adapters' part of y and of dX is what they change
    in the frozen module's."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.weights = [weight.double() for weight in inputs.weights]
        self.base = self.frozen(inputs.x, inputs.grad)

    def frozen(self, x: torch.Tensor, grad: torch.Tensor) -> Tensors:
        """y and dX without adapters."""
        x = x.detach().double().requires_grad_()
        gate, up, down = self.weights
        y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return named(y, {"x": x}, torch.autograd.grad(y, (x,), grad.double()))

    def exact(self, leaves: Tensors, given: Given | None = None) -> tuple[Tensors, Tensors]:
        """y and dX without adapters; the adapters' part of both, and all of dA and dB. Of given x and dY, (..., M, K)
        and (..., M, N), every draw has adapters of its own, or their gradients would be its sums with others'."""
        x, grad = given or (self.inputs.x, self.inputs.grad)
        base = self.frozen(x, grad) if given else self.base
        wide = {name: leaf.detach().double().expand(*x.shape[:-2], *leaf.shape) for name, leaf in leaves.items()}
        wide = {name: leaf.requires_grad_() for name, leaf in (wide | {"x": x.detach().double()}).items()}
        found = _results(wide, self.weights, self.inputs.scaling, grad)
        return base, {name: each - base[name] if name in base else each for name, each in found.items()}

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """Output and gradients of `call` (leaves x, A0, B0, ...), which must be bound to these tensors."""
        inputs = self.inputs
        # Copies: what the call writes there is not the truth.
        adapters = {name: leaf.detach().clone() for name, leaf in call.leaves.items() if name != "x"}

        def eager() -> Tensors:
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in {"x": inputs.x, **adapters}.items()}
            return _results(leaves, inputs.weights, inputs.scaling, inputs.grad)

        def exact(given: Given | None) -> tuple[Tensors, Tensors]:
            return self.exact(adapters, given)

        numbers = len(inputs.x) * len(inputs.lora_a[0])
        return verify_trial(Trial(call, (inputs.x, inputs.grad), eager, exact, numbers, FP32_FLOOR), max_rms_ratio)
