"""The truth of the gated MLP with LoRA in float64: output, dX, and of gate, up and down dA and dB."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .accuracy import MAX_RMS_RATIO, Expected, Tensors, Verdict, judge, poison
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
    """HF peft's algebra."""

    def layer(z, weight, a, b):
        return (F.linear(z, weight) + F.linear(F.linear(z.to(a.dtype), a), b) * scaling).to(z.dtype)

    return layer


def _results(inputs: Inputs, leaves: Tensors, weights: list[torch.Tensor], scaling: float) -> Tensors:
    y = by_layers(leaves, weights, plain_layer(scaling))
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


class MlpTruth:
    """Everything in float64, of adapters in one dtype or another. The adapters' part of y and of dX is what they change
    in the frozen module's."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.weights = [weight.double() for weight in inputs.weights]
        found = _results(inputs, self._wide(inputs.leaves(None)), self.weights, 0.0)
        self.base = {name: found[name] for name in ("y", "x")}

    def _wide(self, leaves: Tensors) -> Tensors:
        return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}

    def tail(self, leaves: Tensors) -> Tensors:
        """The adapters' part of y and of dX, and all of dA and dB."""
        found = _results(self.inputs, self._wide(leaves), self.weights, self.inputs.scaling)
        return {name: each - self.base[name] if name in self.base else each for name, each in found.items()}

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """Output and gradients of `call` (leaves x, A0, B0, ...), which must be bound to these tensors."""
        verdict, inputs = Verdict(), self.inputs
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in call.leaves.items()}
        eager, tail = _results(inputs, leaves, inputs.weights, inputs.scaling), self.tail(leaves)
        poison([eager["y"], eager["x"]])
        y, gradients = call.run()
        for name, out in {"y": y.detach(), **dict(zip(call.leaves, gradients, strict=True))}.items():
            floor = FP32_FLOOR if eager[name].dtype == torch.float32 else 0.0
            label = name if name == "y" else f"d{name.upper()}"
            numbers = len(inputs.x) * len(inputs.lora_a[0])
            expected = Expected(label, eager[name], tail.pop(name), self.base.get(name), floor, numbers=numbers)
            judge(verdict, name, out, expected, max_rms_ratio, "the low-rank part")
        return verdict
