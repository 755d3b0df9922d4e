"""Is it right? Output and every gradient of a benchmarked call against float64, at the very shape that is timed.

The yardstick is eager: the error (rms) may be at most 1.1 times that of the plain form in the same dtypes, and the
projection on the truth (the gain) must be 1 to within 0.002, for the whole and for the part that the adapter adds
alone: a wrong scale of 1 % hides in an rms tolerance, and behind what the frozen model computes anyway.

Of a single row, what goes through rank r has been rounded r times in all: such errors do not average out, and bounds
that hold for many rows are exceeded by chance. Three standard deviations are allowed there.

What the truth of an op is stands in `<op>_truth.py`; how an output is judged stands here.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from .harness import Call

MAX_RMS_RATIO = 1.1
PEER_RMS_RATIO = 2.0  # a peer is taken as it is; twice eager's error would mean that it computes something else
MAX_GAIN_ERROR = 0.002
FEW, DEVIATIONS = 64, 3.0  # numbers that are rounded, and how far chance may lead where they are no more
SEED = 20_431

Tensors = dict[str, torch.Tensor]


@dataclass
class Verdict:
    """What was found. `problems` is empty where the call is right. `tail_gain`: of the adapter's part alone."""

    rms_ratio: dict[str, float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    tail_gain: dict[str, float] = field(default_factory=dict)
    keep_rate: float | None = None
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict:
        return asdict(self)


class Truth(Protocol):
    """The float64 truth of one cell, by which every implementation that is bound to the cell's tensors is judged."""

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict: ...


@dataclass(frozen=True)
class Expected:
    """One output: eager's, and the truth as `tail`, or as `base` + `tail` where the adapter adds to what is there.
    `floor`: a relative error that is small enough whatever eager's is. `gain_error`: how far from 1 a gain may be.
    `numbers`: of how many roundings the error is made, None for many."""

    label: str
    eager: torch.Tensor
    tail: torch.Tensor
    base: torch.Tensor | None = None
    floor: float = 0.0
    gain_error: float = MAX_GAIN_ERROR
    numbers: int | None = None

    @property
    def chance(self) -> float:
        """What the rms of few errors may exceed its expectation by, and their sum its own rms, relative. Errors are
        relative to numbers, and the mean of fourth powers of normal ones is three times their square's: a third counts.
        """
        few = self.numbers is not None and self.numbers <= FEW
        return DEVIATIONS * math.sqrt(3 / self.numbers) if few else 0.0


def poison(like: list[torch.Tensor]) -> None:
    """Leave NaN in the allocator's free blocks, so that an output that is not written shows."""
    blocks = [torch.full_like(tensor, float("nan")) for tensor in like]
    del blocks


def _rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _projection(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out * truth).sum() / truth.square().sum()).item()


def judge(verdict: Verdict, name: str, out: torch.Tensor, expected: Expected, max_rms_ratio: float, part: str) -> None:
    """Adds to `verdict`, under `name`, what `out` shows; `part` is what the tail is called where there is a base."""
    label, eager, tail, base = expected.label, expected.eager, expected.tail, expected.base
    if out.shape != eager.shape or out.dtype != eager.dtype:
        wanted = f"{tuple(eager.shape)} {eager.dtype}"
        verdict.problems.append(f"{label}: {tuple(out.shape)} {out.dtype}, expected {wanted}")
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
    most = max_rms_ratio * (1 + expected.chance)
    if error > max(most * allowed, expected.floor * _rms(truth)):
        ratio = verdict.rms_ratio[name]
        verdict.problems.append(f"{label}: rms error {ratio:.3g} times eager's, allowed {most:.3g}")
    verdict.gain[name] = _projection(out, truth)
    if base is not None:
        verdict.tail_gain[name] = _projection(out - base, tail)
    for what, gains, of in (("gain", verdict.gain, truth), (f"gain of {part}", verdict.tail_gain, tail)):
        most = max(expected.gain_error, expected.chance and expected.chance * allowed / _rms(of))
        if name in gains and not abs(gains[name] - 1) <= most:
            verdict.problems.append(f"{label}: {what} {gains[name]:.4f}, expected 1 ± {most:.2g}")
