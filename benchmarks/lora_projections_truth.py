"""The truth of LoRA linears that share their input in float64: of each output, dA and dB; and dX, their sum."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .accuracy import MAX_RMS_RATIO, Given, Tensors, Trial, Verdict, named, verify_trial
from .harness import Call
from .lora_linear_truth import FP32_FLOOR


@dataclass
class Inputs:
    """Tensors of one cell: x (M, K); of each projection weight (N, K) and grad (M, N) in the data's dtype, lora_a
    (r, K) and lora_b (N, r) in fp32, from which an implementation takes adapters in its own dtype."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    grads: tuple[torch.Tensor, ...]
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    scaling: float

    @property
    def frozen(self) -> Tensors:
        return {f"weight{i}": weight for i, weight in enumerate(self.weights)}

    def leaves(self, adapter_dtype: torch.dtype | None) -> Tensors:
        """Fresh leaves x, A0, B0, A1, ...; None means adapters in the data's dtype."""
        dtype = adapter_dtype or self.x.dtype
        tensors = {"x": self.x}
        for i, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            tensors |= {f"A{i}": a.to(dtype), f"B{i}": b.to(dtype)}
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def matrices(leaves: Tensors, letter: str) -> list[torch.Tensor]:
    return [leaf for name, leaf in leaves.items() if name[0] == letter and name[1:].isdigit()]


def one_by_one(leaves: Tensors, weights: list[torch.Tensor], scaling: float) -> tuple[torch.Tensor, ...]:
    """HF peft's algebra: each layer by itself, its term cast and added."""
    x, found = leaves["x"], []
    for weight, a, b in zip(weights, matrices(leaves, "A"), matrices(leaves, "B"), strict=True):
        term = F.linear(F.linear(x.to(a.dtype), a), b) * scaling
        found.append((F.linear(x, weight) + term).to(weight.dtype))
    return tuple(found)


class ProjectionsTruth:
    """Everything in float64, of adapters in one dtype or another."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.base = self.frozen(inputs.x, *inputs.grads)

    def frozen(self, x: torch.Tensor, *grads: torch.Tensor) -> Tensors:
        """Every y and dX without adapters."""
        x, weights = x.double(), [weight.double() for weight in self.inputs.weights]
        base = {f"y{i}": F.linear(x, weight) for i, weight in enumerate(weights)}
        return base | {"x": sum(grad.double() @ weight for grad, weight in zip(grads, weights, strict=True))}

    def tail(self, leaves: Tensors, given: Given | None = None) -> Tensors:
        """The low-rank part of every y and of dX, and all of dA and dB, of x and dYs or of given ones, (..., M, K) and
        (..., M, N)."""
        inputs = self.inputs
        x, *grads = (each.double() for each in given or (inputs.x, *inputs.grads))
        out = {"x": torch.zeros_like(x)}
        for i, grad in enumerate(grads):
            a, b = leaves[f"A{i}"].detach().double(), leaves[f"B{i}"].detach().double()
            shrunk, t = inputs.scaling * (x @ a.T), inputs.scaling * (grad @ b)
            out |= {f"y{i}": shrunk @ b.T, f"A{i}": t.mT @ x, f"B{i}": grad.mT @ shrunk}
            out["x"] += t @ a
        return out

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """Outputs and gradients of `call` (leaves x, A0, B0, ...), which must be bound to these tensors."""
        inputs = self.inputs
        # Copies: what the call writes there is not the truth.
        adapters = {name: leaf.detach().clone() for name, leaf in call.leaves.items() if name != "x"}

        def eager() -> Tensors:
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in {"x": inputs.x, **adapters}.items()}
            ys = one_by_one(leaves, inputs.weights, inputs.scaling)
            return named(ys, leaves, torch.autograd.grad(ys, list(leaves.values()), inputs.grads))

        def exact(given: Given | None) -> tuple[Tensors, Tensors]:
            return self.frozen(*given) if given else self.base, self.tail(adapters, given)

        given, numbers = (inputs.x, *inputs.grads), len(inputs.x) * len(inputs.lora_a[0])
        return verify_trial(Trial(call, given, eager, exact, numbers, FP32_FLOOR), max_rms_ratio)
