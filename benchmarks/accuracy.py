"""Is it right? Output and every gradient of a benchmarked call against float64, at the very shape that is timed.

The yardstick is eager: the error (rms) may be at most 1.1 times that of the plain form in the same dtypes, and the
projection on the truth (the gain) must be 1 to within 0.002, for the whole and for the part that the adapter adds
alone: a wrong scale of 1 % hides in an rms tolerance, and behind what the frozen model computes anyway.

Of a single row, what goes through rank r has been rounded r times in all: such errors do not average out, and bounds
that hold for many rows are exceeded by chance. The bounds stay what they are: such a call is measured again and again,
x and dY in another order each time, and all that came out is judged as one output.

What the truth of an op is stands in `<op>_truth.py`; how an output is judged stands here.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from .harness import Call, Outputs

MAX_RMS_RATIO = 1.1
PEER_RMS_RATIO = 2.0  # a peer is taken as it is; twice eager's error would mean that it computes something else
MAX_GAIN_ERROR = 0.002
FEW_NUMBERS = 64  # that are rounded on the way: where they are no more, chance may exceed the bounds
# The root mean square of n such errors is off by about 1/sqrt(n) of itself, a ratio of two by 1.5/sqrt(n): of 4096 by
# 2.3 %, a quarter of what it may be above 1. Most that is right needs no more than 1024.
POOLED_NUMBERS = 1024, 4096
SEED = 20_431

Tensors = dict[str, torch.Tensor]
Given = tuple[torch.Tensor, ...]


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
    `floor`: a relative error that is small enough whatever eager's is. `gain_error`: how far from 1 a gain may be."""

    label: str
    eager: torch.Tensor
    tail: torch.Tensor
    base: torch.Tensor | None = None
    floor: float = 0.0
    gain_error: float = MAX_GAIN_ERROR


@dataclass(frozen=True)
class Trial:
    """A call of an op with LoRA and what judges it. `given`: the truth's own x and dY. `eager()`: the plain form's
    results of them as they stand. `exact(given)`: the truth as base and tail, of x and dY with any number of draws in
    front of their rows, or of what stands where that is None. `numbers`: how many are rounded on the way, of one draw.
    `floor`: of results in fp32."""

    call: Call
    given: Given
    eager: Callable[[], Tensors]
    exact: Callable[[Given | None], tuple[Tensors, Tensors]]
    numbers: int
    floor: float


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
    if error > max(max_rms_ratio * allowed, expected.floor * _rms(truth)):
        ratio = verdict.rms_ratio[name]
        verdict.problems.append(f"{label}: rms error {ratio:.3g} times eager's, allowed {max_rms_ratio}")
    verdict.gain[name] = _projection(out, truth)
    if base is not None:
        verdict.tail_gain[name] = _projection(out - base, tail)
    for what, gains in (("gain", verdict.gain), (f"gain of {part}", verdict.tail_gain)):
        if name in gains and not abs(gains[name] - 1) <= expected.gain_error:
            verdict.problems.append(f"{label}: {what} {gains[name]:.4f}, expected 1 ± {expected.gain_error:.2g}")


def named(y: Outputs, leaves: Tensors, gradients: Sequence[torch.Tensor]) -> Tensors:
    """Results by name: y, or y0, y1, ... of several, and of each leaf its gradient."""
    outputs = {f"y{i}": each for i, each in enumerate(y)} if isinstance(y, tuple) else {"y": y}
    return {name: each.detach() for name, each in (outputs | dict(zip(leaves, gradients, strict=True))).items()}


def verify_trial(trial: Trial, max_rms_ratio: float) -> Verdict:
    """One draw, by the strict bounds; where it is beyond them and so few numbers were rounded that chance may be why,
    many draws, by the same."""
    eager, found = _measured(trial)
    verdict = _judged(trial, eager, found, None, max_rms_ratio)
    if verdict.problems and trial.numbers <= FEW_NUMBERS:
        return _pooled(trial, (eager, found), max_rms_ratio)
    return verdict


def _measured(trial: Trial) -> tuple[Tensors, Tensors]:
    """Eager's results and the call's, of x and dY as they stand. The seed makes any mask the same in every draw."""
    eager = trial.eager()
    poison(list(eager.values()))
    torch.manual_seed(SEED)
    y, gradients = trial.call.run()
    return eager, named(y, trial.call.leaves, gradients)


def _judged(trial: Trial, eager: Tensors, found: Tensors, given: Given | None, max_rms_ratio: float) -> Verdict:
    verdict = Verdict()
    base, tail = trial.exact(given)
    for name, out in found.items():
        label = name if name[0] == "y" else f"d{name.upper()}"
        floor = trial.floor if eager[name].dtype == torch.float32 else 0.0
        expected = Expected(label, eager[name], tail.pop(name), base.get(name), floor)
        judge(verdict, name, out, expected, max_rms_ratio, "the low-rank part")
    return verdict


def _pooled(trial: Trial, first: tuple[Tensors, Tensors], max_rms_ratio: float) -> Verdict:
    """The verdict of what was measured and of more draws, as if they were one output; of the most where fewer are not
    within the bounds."""
    call, draws = trial.call, [_copied(trial.given, *first)]
    grads = call.grad if isinstance(call.grad, tuple) else (call.grad,)
    with shuffled([*trial.given, call.leaves["x"], *grads]) as shuffle:
        for numbers in POOLED_NUMBERS:
            while len(draws) * trial.numbers < numbers:
                shuffle()
                draws.append(_copied(trial.given, *_measured(trial)))
            given, eager, found = (_stacked(each) for each in zip(*draws, strict=True))
            verdict = _judged(trial, eager, found, tuple(given.values()), max_rms_ratio)
            if not verdict.problems:
                break
    return verdict


def _copied(given: Given, eager: Tensors, found: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """What the next draw overwrites: x and dY, and what a replayed call returns."""
    return {str(i): each.clone() for i, each in enumerate(given)}, eager, {n: each.clone() for n, each in found.items()}


def _stacked(draws: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@contextlib.contextmanager
def shuffled(tensors: Sequence[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Yields what puts the columns of all these into another order, in place and alike where they are as many: the same
    values meet others, and what is rounded is new. Afterwards the tensors are what they were. The orders are the same
    every time, and torch's generators are not asked."""
    before = [tensor.detach().clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(SEED)

    @torch.no_grad()
    def shuffle() -> None:
        orders: dict[int, torch.Tensor] = {}
        for tensor, original in zip(tensors, before, strict=True):
            width = tensor.shape[-1]
            if width not in orders:
                orders[width] = torch.randperm(width, generator=generator).to(tensor.device)
            tensor.copy_(original[..., orders[width]])

    try:
        yield shuffle
    finally:
        with torch.no_grad():
            for tensor, original in zip(tensors, before, strict=True):
                tensor.copy_(original)
