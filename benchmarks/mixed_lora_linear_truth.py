"""The truth of the LoRA linear on a mixed batch in float64: output, dX, and of each adapter dA and dB."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .accuracy import MAX_RMS_RATIO, Expected, Tensors, Verdict, judge, poison
from .harness import Call
from .lora_linear_truth import FP32_FLOOR


@dataclass
class Inputs:
    """Tensors of one cell: x (B, S, K), weight (N, K), grad (B, S, N) in the data's dtype; of each adapter lora_a
    (r, K) and lora_b (N, r) in fp32, from which an implementation takes adapters in its own dtype, and its scaling.
    rows: of each sample its adapter's number, or -1."""

    x: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    scalings: list[float]
    rows: list[int]

    @property
    def samples(self) -> list[list[int]]:
        """Of each adapter its samples."""
        return [[b for b, g in enumerate(self.rows) if g == each] for each in range(len(self.lora_a))]

    def leaves(self, adapter_dtype: torch.dtype | None) -> Tensors:
        """Fresh leaves x, A0, B0, A1, ...; None means adapters in the data's dtype."""
        dtype = adapter_dtype or self.x.dtype
        tensors = {"x": self.x}
        for i, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            tensors |= {f"A{i}": a.to(dtype), f"B{i}": b.to(dtype)}
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def one_by_one(inputs: Inputs, leaves: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """HF peft's `_mixed_batch_forward`, out of place: adapter by adapter on its samples, each term cast and added."""
    result = F.linear(leaves["x"], weight)
    for i, samples in enumerate(inputs.samples):
        place = torch.tensor(samples, device=result.device)
        own = leaves["x"][place].to(leaves[f"A{i}"].dtype)
        term = F.linear(F.linear(own, leaves[f"A{i}"]), leaves[f"B{i}"]) * inputs.scalings[i]
        result = result.index_add(0, place, term.to(result.dtype))
    return result


class MixedTruth:
    """Everything in float64, made once for adapters of one dtype, and once more for another."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        base = {"y": F.linear(inputs.x.double(), inputs.weight.double())}
        self.base = base | {"x": inputs.grad.double() @ inputs.weight.double()}

    def tail(self, leaves: Tensors) -> Tensors:
        """The low-rank part of y and dX, and all of dA and dB."""
        inputs = self.inputs
        out = {name: torch.zeros_like(each) for name, each in self.base.items()}
        for i, samples in enumerate(inputs.samples):
            a, b = (leaves[f"{letter}{i}"].detach().double() for letter in "AB")
            x, grad = inputs.x[samples].double().flatten(0, 1), inputs.grad[samples].double().flatten(0, 1)
            shrunk, t = inputs.scalings[i] * (x @ a.T), inputs.scalings[i] * (grad @ b)
            out["y"][samples] = (shrunk @ b.T).view(len(samples), -1, len(b))
            out["x"][samples] = (t @ a).view(len(samples), -1, a.shape[1])
            out |= {f"A{i}": t.T @ x, f"B{i}": grad.T @ shrunk}
        return out

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """Output and gradients of `call` (leaves x, A0, B0, ...), which must be bound to these tensors."""
        verdict, inputs = Verdict(), self.inputs
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in call.leaves.items()}
        y = one_by_one(inputs, leaves, inputs.weight)
        eager = {
            "y": y.detach(),
            **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), inputs.grad), strict=True)),
        }
        tail = self.tail(leaves)
        poison([eager["y"], eager["x"]])
        y, grads = call.run()
        for name, out in {"y": y.detach(), **dict(zip(call.leaves, grads, strict=True))}.items():
            floor = FP32_FLOOR if eager[name].dtype == torch.float32 else 0.0
            label = name if name == "y" else f"d{name.upper()}"
            expected = Expected(label, eager[name], tail.pop(name), self.base.get(name), floor)
            judge(verdict, name, out, expected, max_rms_ratio, "the low-rank part")
        return verdict
