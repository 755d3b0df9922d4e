"""The truth of a layer with DoRA in float64: output, dX, dA, dB and dm, with and without dropout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import lora_linear_peers
from .accuracy import MAX_RMS_RATIO, SEED, Expected, Tensors, Verdict, judge, poison
from .harness import Call
from .lora_linear_truth import FP32_FLOOR, LABELS, LoraTruth, check_dropout


@dataclass
class Inputs:
    """Tensors of one cell: those of a LoRA linear, x (M, K), weight (N, K), A (r, K), B (N, r), and the magnitudes (N,)
    in fp32, from which an implementation takes its own as it takes adapters."""

    lora: lora_linear_peers.Inputs
    magnitude: torch.Tensor

    def leaves(self, adapter_dtype: torch.dtype | None) -> Tensors:
        """Fresh leaves x, A, B, m; None means adapters in the data's dtype."""
        m = self.magnitude.to(adapter_dtype or self.lora.x.dtype, copy=True).requires_grad_()
        return {**self.lora.leaves(adapter_dtype), "m": m}


@torch.no_grad()
def full_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + s·B A‖ of each row (N,), of the whole sum (N, K), in fp32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.to(wide) + scaling * (b.to(wide) @ a.to(wide)), dim=1)


def plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    scaling: float,
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """HF peft's algebra (M, N): x Wᵀ + (f - 1)⊙(z Wᵀ) + f⊙(s·z Aᵀ Bᵀ), f = m/‖W + s·B A‖, z = drop(x). The norms are
    no part of the gradient, the sum is in fp32, with one cast at the end; without dropout there is one base product."""
    factor = m / full_norms(weight, a, b, scaling)
    y = F.linear(x, weight)
    z = x if drop is None else drop(x)
    base = y if drop is None else F.linear(z, weight)
    low_rank = F.linear(F.linear(z.to(a.dtype), a), b) * scaling
    return (y + (factor - 1) * base + factor * low_rank).to(y.dtype)


class DoraTruth:
    """Everything in float64. What DoRA changes in the frozen layer's y and dX is the tail, and all of dA, dB and dm. A
    call without magnitudes is LoRA's, and is judged as that."""

    def __init__(self, inputs: Inputs):
        lora = inputs.lora
        self.inputs = lora
        self.lora = LoraTruth(lora.x, lora.weight, lora.grad, lora.scaling, lora.dropout)

    def tail(self, leaves: Tensors, keep: torch.Tensor | None) -> Tensors:
        """With z = keep⊙x/(1-p), H = z Wᵀ, S = s·z Aᵀ, T = s·(f⊙dY) B: y += (f - 1)⊙H + f⊙(S Bᵀ),
        dX += keep⊙(((f - 1)⊙dY) W + T A)/(1-p), dA = Tᵀ z, dB = f⊙(dYᵀ S), dm = Σ dY⊙(H + S Bᵀ)/‖V‖."""
        inputs = self.inputs
        a, b, m = (leaves[name].detach().double() for name in ("A", "B", "m"))
        weight, grad, z = inputs.weight.double(), inputs.grad.double(), inputs.x.double()
        scale = 1.0 if keep is None else keep / (1 - inputs.dropout)
        z = z * scale
        norms = torch.linalg.vector_norm(weight + inputs.scaling * (b @ a), dim=1)
        f = m / norms
        base, shrunk = z @ weight.T, inputs.scaling * (z @ a.T)
        t, low_rank = inputs.scaling * ((grad * f) @ b), shrunk @ b.T
        return {
            "y": (f - 1) * base + f * low_rank,
            "x": ((grad * (f - 1)) @ weight + t @ a) * scale,
            "A": t.T @ z,
            "B": f[:, None] * (grad.T @ shrunk),
            "m": (grad * (base + low_rank)).sum(0) / norms,
        }

    def eager(self, leaves: Tensors, keep: torch.Tensor | None) -> Tensors:
        """`plain` in the given dtypes, with its gradients."""
        inputs = self.inputs
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        drop = None if keep is None else lambda x: (x.float() * keep / (1 - inputs.dropout)).to(x.dtype)
        x, *adapter = (leaves[name] for name in ("x", "A", "B", "m"))
        y = plain(x, inputs.weight, *adapter, inputs.scaling, drop)
        gradients = torch.autograd.grad(y, leaves.values(), inputs.grad)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """Output, dX, dA, dB and dm of `call` (leaves x, A, B, m), which must be bound to these tensors."""
        if "m" not in call.leaves:
            return self.lora.verify(call, max_rms_ratio)
        verdict, inputs, keep = Verdict(), self.inputs, None
        if inputs.dropout:
            keep = check_dropout(call, inputs.scaling, inputs.dropout, verdict)
            if keep is None:
                return verdict
        tail, eager = self.tail(call.leaves, keep), self.eager(call.leaves, keep)
        poison([eager["y"], eager["x"]])
        torch.manual_seed(SEED)
        y, gradients = call.run()
        for name, out in {"y": y.detach(), **dict(zip(call.leaves, gradients, strict=True))}.items():
            floor = FP32_FLOOR if eager[name].dtype == torch.float32 else 0.0
            label = LABELS.get(name, f"d{name}")
            expected = Expected(label, eager[name], tail.pop(name), self.lora.base.get(name), floor)
            judge(verdict, name, out, expected, max_rms_ratio, "what DoRA changes")
        return verdict
