"""The truth of the experts' LoRA linear in float64: output, dX, dA and dB."""

from dataclasses import dataclass

import torch

from .accuracy import MAX_RMS_RATIO, Expected, Tensors, Verdict, judge, poison
from .harness import Call
from .lora_linear_truth import FP32_FLOOR


@dataclass
class Inputs:
    """Tensors of one cell: x (M, K), sorted by expert, weight (E, N, K) and grad (M, N) in the data's dtype; lora_a
    (E·r, K) and lora_b (N, r·E) in fp32, in HF peft's layout, from which an implementation takes adapters in its own
    dtype. ends (E,): where each expert's rows end."""

    x: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    ends: torch.Tensor

    def leaves(self, adapter_dtype: torch.dtype | None) -> Tensors:
        """Fresh leaves x, A, B; None means adapters in the data's dtype."""
        dtype = adapter_dtype or self.x.dtype
        tensors = {"x": self.x, "A": self.lora_a.to(dtype), "B": self.lora_b.to(dtype)}
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}

    def segments(self) -> list[tuple[int, slice]]:
        """(expert, its rows)"""
        bounds = [0, *self.ends.tolist()]
        return [(e, slice(start, end)) for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))]


def factors_of(leaves: Tensors, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [E, r, K], B [E, N, r])"""
    a, b = leaves["A"], leaves["B"]
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)


def by_expert(inputs: Inputs, leaves: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """LoRA expert by expert, out of place: each term in the adapter's dtype, cast and added."""
    parts, (a, b) = [], factors_of(leaves, len(weight))
    for e, rows in inputs.segments():
        x = leaves["x"][rows]
        parts.append(x @ weight[e].T + ((x.to(a.dtype) @ a[e].T) @ b[e].T * inputs.scaling).to(x.dtype))
    return torch.cat(parts)


class ExpertTruth:
    """Everything in float64, made once for adapters of one dtype, and once more for another."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        y, dx = [], []
        for e, rows in inputs.segments():
            weight = inputs.weight[e].double()
            y.append(inputs.x[rows].double() @ weight.T)
            dx.append(inputs.grad[rows].double() @ weight)
        self.base = {"y": torch.cat(y), "x": torch.cat(dx)}

    def tail(self, leaves: Tensors) -> Tensors:
        """The low-rank part of y and dX, and all of dA and dB."""
        inputs, out = self.inputs, {name: torch.zeros_like(each) for name, each in self.base.items()}
        held = {name: leaves[name].detach().double() for name in ("A", "B")}
        a, b = factors_of(held, len(inputs.weight))
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for e, rows in inputs.segments():
            x, grad = inputs.x[rows].double(), inputs.grad[rows].double()
            shrunk, t = inputs.scaling * (x @ a[e].T), inputs.scaling * (grad @ b[e])
            out["y"][rows], out["x"][rows] = shrunk @ b[e].T, t @ a[e]
            da[e], db[e] = t.T @ x, grad.T @ shrunk
        return out | {"A": da.flatten(0, 1), "B": db.permute(1, 2, 0).flatten(1)}

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """Output and gradients of `call` (leaves x, A, B), which must be bound to these tensors."""
        verdict, inputs = Verdict(), self.inputs
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in call.leaves.items()}
        y = by_expert(inputs, leaves, inputs.weight)
        grads = torch.autograd.grad(y, leaves.values(), inputs.grad)
        eager = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
        tail = self.tail(leaves)
        poison([eager["y"], eager["x"]])
        y, grads = call.run()
        for name, out in {"y": y.detach(), **dict(zip(call.leaves, grads, strict=True))}.items():
            floor = FP32_FLOOR if eager[name].dtype == torch.float32 else 0.0
            label = name if name == "y" else f"d{name.upper()}"
            expected = Expected(label, eager[name], tail.pop(name), self.base.get(name), floor)
            judge(verdict, name, out, expected, max_rms_ratio, "the low-rank part")
        return verdict
