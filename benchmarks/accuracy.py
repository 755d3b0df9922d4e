"""Is it right? Output and every gradient of a benchmarked call against float64, at the very shape that is timed.

The yardstick is eager: the error (rms) may be at most 1.1 times that of the plain form in the same dtypes, and the
projection on the truth (the gain) must be 1 to within 0.002, for the whole and for the low-rank part alone: a wrong
scale of 1 % hides in an rms tolerance, and behind the base product. With dropout the mask is first read out of the
implementation itself, from outside: with a zero base weight and constant adapters dX is the mask times a constant, and
the generator's seed makes the same mask again for the measured call. Nothing here needs to know how masks are drawn.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F

from .harness import Call

MAX_RMS_RATIO = 1.1
PEER_RMS_RATIO = 2.0  # a peer is taken as it is; twice eager's error would mean that it computes something else
MAX_GAIN_ERROR = 0.002
# fp32 adapters on 16-bit data: taken apart into two bf16 halves they keep 16 bits (2**-17 = 8e-6), which is enough for
# gradients of bf16 activations; a TF32 product (3e-4) or rounding to bf16 (2e-3) is not.
FP32_FLOOR = 2e-5
SEED = 20_431

Tensors = dict[str, torch.Tensor]


@dataclass
class Verdict:
    """What was found. `problems` is empty where the call is right."""

    rms_ratio: dict[str, float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    tail_gain: dict[str, float] = field(default_factory=dict)
    keep_rate: float | None = None
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict:
        return asdict(self)


class Oracle:
    """The float64 truth for one base weight, input and output gradient; the part without adapters is computed once."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, scaling: float, dropout: float):
        self.x, self.weight, self.grad = x, weight, grad
        self.scaling, self.dropout = scaling, dropout
        self.base = {"y": x.double() @ weight.double().T, "x": grad.double() @ weight.double()}

    def tail(self, a: torch.Tensor, b: torch.Tensor, keep: torch.Tensor | None) -> Tensors:
        """The low-rank part of y and dX, and all of dA and dB. With u = m⊙x/(1-p): y += s·u Aᵀ Bᵀ, T = s·dY B,
        dX += m⊙(T A)/(1-p), dA = Tᵀ u, dB = s·dYᵀ (u Aᵀ)."""
        a, b, grad, u = a.double(), b.double(), self.grad.double(), self.x.double()
        if keep is not None:
            u = u * keep / (1 - self.dropout)
        shrunk = self.scaling * (u @ a.T)
        t = self.scaling * (grad @ b)
        dx = t @ a
        if keep is not None:
            dx = dx * keep / (1 - self.dropout)
        return {"y": shrunk @ b.T, "x": dx, "A": t.T @ u, "B": grad.T @ shrunk}

    def eager(self, a: torch.Tensor, b: torch.Tensor, keep: torch.Tensor | None) -> Tensors:
        """The plain form in the given dtypes, op by op as peft's Linear writes it, with its gradients."""
        x, a, b = (t.detach().clone().requires_grad_() for t in (self.x, a, b))
        u = x.to(a.dtype)
        if keep is not None:
            u = (u.float() * keep / (1 - self.dropout)).to(a.dtype)
        result = F.linear(x, self.weight)
        y = (result + F.linear(F.linear(u, a), b) * self.scaling).to(result.dtype)
        dx, da, db = torch.autograd.grad(y, (x, a, b), self.grad)
        return {"y": y.detach(), "x": dx, "A": da, "B": db}


def _rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _projection(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out * truth).sum() / truth.square().sum()).item()


def _poison(like: list[torch.Tensor]) -> None:
    """Leave NaN in the allocator's free blocks, so that an output that is not written shows."""
    blocks = [torch.full_like(tensor, float("nan")) for tensor in like]
    del blocks


def read_mask(call: Call, scaling: float, dropout: float, seed: int) -> tuple[torch.Tensor | None, str]:
    """The dropout mask that `call` draws after torch.manual_seed(seed): (bool (M, K), "") or (None, what is odd).

    Weight 0, A = 1, B = dY = 1 in the first output column only: dX = s·r/(1-p) where kept, 0 elsewhere.
    """
    tensors = {**call.frozen, **call.leaves, "grad": call.grad}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items() if name != "x"}
    rank = call.leaves["A"].shape[0]
    with torch.no_grad():
        tensors["weight"].zero_()
        tensors["A"].fill_(1)
        tensors["B"].zero_()[0] = 1
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


def verify(call: Call, oracle: Oracle, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
    """Output, dX, dA and dB of `call` (leaves x, A, B) against `oracle`, whose tensors it must be bound to."""
    verdict = Verdict()
    a, b = call.leaves["A"].detach(), call.leaves["B"].detach()
    keep = None
    if oracle.dropout:
        keep = check_dropout(call, oracle.scaling, oracle.dropout, verdict)
        if keep is None:
            return verdict
    tail = oracle.tail(a, b, keep)
    eager = oracle.eager(a, b, keep)
    _poison([eager["y"], eager["x"], a, b])
    torch.manual_seed(SEED)
    y, grads = call.run()
    outputs = {"y": y.detach(), **dict(zip(call.leaves, grads, strict=True))}
    for name, out in outputs.items():
        _judge(verdict, name, out, eager[name], tail.pop(name), oracle.base.get(name), max_rms_ratio)
    return verdict


def _judge(verdict: Verdict, name: str, out, eager, tail, base, max_rms_ratio: float) -> None:
    """Adds to `verdict` what `out` shows against base + tail (base None: dA, dB, which have no part without it)."""
    label = {"y": "y", "x": "dX", "A": "dA", "B": "dB"}[name]
    if out.shape != eager.shape or out.dtype != eager.dtype:
        expected = f"{tuple(eager.shape)} {eager.dtype}"
        verdict.problems.append(f"{label}: {tuple(out.shape)} {out.dtype}, expected {expected}")
        return
    if not torch.isfinite(out).all():
        verdict.problems.append(f"{label}: not finite")
        return
    if not out.any():
        verdict.problems.append(f"{label}: zero everywhere")
        return
    out = out.double()
    truth = tail if base is None else base + tail
    error, allowed = _rms(out - truth), _rms(eager.double() - truth)
    verdict.rms_ratio[name] = error / allowed if allowed else (0.0 if error == 0 else math.inf)
    floor = FP32_FLOOR * _rms(truth) if eager.dtype == torch.float32 else 0.0
    if error > max(max_rms_ratio * allowed, floor):
        ratio = verdict.rms_ratio[name]
        verdict.problems.append(f"{label}: rms error {ratio:.3g} times eager's, allowed {max_rms_ratio}")
    verdict.gain[name] = _projection(out, truth)
    if base is not None:
        verdict.tail_gain[name] = _projection(out.sub_(base), tail)
    for what, gains in (("gain", verdict.gain), ("gain of the low-rank part", verdict.tail_gain)):
        if name in gains and abs(gains[name] - 1) > MAX_GAIN_ERROR:
            verdict.problems.append(f"{label}: {what} {gains[name]:.4f}, expected 1 ± {MAX_GAIN_ERROR}")
