"""The truth of the LoRA linear in float64: output, dX, dA and dB, with and without dropout.

With dropout the mask is first read out of the implementation itself, from outside: with a zero base weight and constant
adapters dX is the mask times a constant, and the generator's seed makes the same mask again for the measured call.
Nothing here needs to know how masks are drawn.
"""

import math

import torch
import torch.nn.functional as F

from .accuracy import MAX_RMS_RATIO, SEED, Given, Tensors, Trial, Verdict, named, verify_trial
from .harness import Call

# fp32 adapters on 16-bit data: taken apart into two bf16 halves they keep 16 bits (2**-17 = 8e-6), which is enough for
# gradients of bf16 activations; a TF32 product (3e-4) or rounding to bf16 (2e-3) is not.
FP32_FLOOR = 2e-5
LABELS = {"y": "y", "x": "dX", "A": "dA", "B": "dB"}


class LoraTruth:
    """The float64 truth for one base weight, input and output gradient; the part without adapters is computed once."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, scaling: float, dropout: float):
        self.x, self.weight, self.grad = x, weight, grad
        self.scaling, self.dropout = scaling, dropout
        self.base = self.frozen(x, grad)

    def frozen(self, x: torch.Tensor, grad: torch.Tensor) -> Tensors:
        """y and dX without adapters."""
        weight = self.weight.double()
        return {"y": x.double() @ weight.T, "x": grad.double() @ weight}

    def tail(self, a: torch.Tensor, b: torch.Tensor, keep: torch.Tensor | None, given: Given | None = None) -> Tensors:
        """The low-rank part of y and dX, and all of dA and dB, of x and dY or of given ones, (..., M, K) and (..., M,
        N). With u = m⊙x/(1-p): y += s·u Aᵀ Bᵀ, T = s·dY B, dX += m⊙(T A)/(1-p), dA = Tᵀ u, dB = s·dYᵀ (u Aᵀ)."""
        a, b = a.double(), b.double()
        u, grad = (each.double() for each in given or (self.x, self.grad))
        if keep is not None:
            u = u * keep / (1 - self.dropout)
        shrunk = self.scaling * (u @ a.T)
        t = self.scaling * (grad @ b)
        dx = t @ a
        if keep is not None:
            dx = dx * keep / (1 - self.dropout)
        return {"y": shrunk @ b.T, "x": dx, "A": t.mT @ u, "B": grad.mT @ shrunk}

    def eager(self, a: torch.Tensor, b: torch.Tensor, keep: torch.Tensor | None) -> Tensors:
        """The plain form in the given dtypes, op by op as peft's Linear writes it, with its gradients."""
        x, a, b = (t.detach().clone().requires_grad_() for t in (self.x, a, b))
        u = x.to(a.dtype)
        if keep is not None:
            u = (u.float() * keep / (1 - self.dropout)).to(a.dtype)
        result = F.linear(x, self.weight)
        y = (result + F.linear(F.linear(u, a), b) * self.scaling).to(result.dtype)
        return named(y, {"x": x, "A": a, "B": b}, torch.autograd.grad(y, (x, a, b), self.grad))

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """Output, dX, dA and dB of `call` (leaves x, A, B), which must be bound to these tensors."""
        verdict = Verdict()
        a, b = (call.leaves[name].detach().clone() for name in "AB")  # what the call writes there is not the truth
        keep = None
        if self.dropout:
            keep = check_dropout(call, self.scaling, self.dropout, verdict)
            if keep is None:
                return verdict

        def exact(given: Given | None) -> tuple[Tensors, Tensors]:
            return self.frozen(*given) if given else self.base, self.tail(a, b, keep, given)

        of_call = Trial(
            call, (self.x, self.grad), lambda: self.eager(a, b, keep), exact, len(self.x) * len(a), FP32_FLOOR
        )
        found = verify_trial(of_call, max_rms_ratio)
        found.keep_rate, found.problems = verdict.keep_rate, verdict.problems + found.problems
        return found


def read_mask(call: Call, scaling: float, dropout: float, seed: int) -> tuple[torch.Tensor | None, str]:
    """The dropout mask that `call` draws after torch.manual_seed(seed): (bool (M, K), "") or (None, what is odd).

    Weight 0, A = B = 1, dY = 1 in the first output column only: dX = s·r/(1-p) where kept, 0 elsewhere; of DoRA too,
    whose rows then have the norm s·r·√K, and are given it as their magnitude.
    """
    tensors = {**call.frozen, **call.leaves, "grad": call.grad}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items() if name != "x"}
    rank, depth = call.leaves["A"].shape
    with torch.no_grad():
        tensors["weight"].zero_()
        tensors["A"].fill_(1)
        tensors["B"].fill_(1)
        for name in {"m", "norms"} & tensors.keys():
            tensors[name].fill_(scaling * rank * depth**0.5)
        tensors["grad"].zero_()[..., 0] = 1
    try:
        torch.manual_seed(seed)
        dx = call.run()[1][0].double()
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                tensors[name].copy_(tensor)
    kept_value = scaling * rank / (1 - dropout)
    keep = dx > kept_value / 2
    # 1 %: bf16 rounds three times on the way, at most 0.4 % each.
    if not torch.all(torch.where(keep, (dx / kept_value - 1).abs(), (dx / kept_value).abs()) < 0.01):
        return None, f"dX of a constant product is not 0 or s·r/(1-p) = {kept_value:.4g}: no dropout mask"
    return keep, ""


def check_dropout(call: Call, scaling: float, dropout: float, verdict: Verdict) -> torch.Tensor | None:
    """The mask for SEED; its rate and its dependence on the seed go into the verdict."""
    keep, oddity = read_mask(call, scaling, dropout, SEED)
    if keep is None:
        verdict.problems.append(oddity)
        return None
    verdict.keep_rate = keep.double().mean().item()
    sigma = math.sqrt(dropout * (1 - dropout) / keep.numel())
    if abs(verdict.keep_rate - (1 - dropout)) > 6 * sigma:
        verdict.problems.append(f"keep rate {verdict.keep_rate:.5f}, expected {1 - dropout} ± {6 * sigma:.1e}")
    other, _ = read_mask(call, scaling, dropout, SEED + 1)
    if other is None or torch.equal(keep, other):
        verdict.problems.append("the mask does not depend on torch.manual_seed")
    return keep
