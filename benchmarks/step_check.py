"""Is a whole step right? Loss and every adapter gradient, before any time is shown.

From the same adapter weights, without dropout, a batch of at most 2 samples of 256 tokens goes through the truth (HF
peft on the base in a wider type: fp32 for half precision, float64 for fp32), through HF peft as it is timed, the
measure, and through the implementation. The measure's error is what an implementation may make twice. Where HF peft has
no such method for such a model, our plain torch path takes its place; where the wider base does not fit, the measure is
the truth, and the bounds are stated ones.

Other sizes take other kernels: at the batch that is timed, implementation and measure are compared with each other.
"""

import gc
import math
import re
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .accuracy import Verdict
from .baselines import Missing
from .dtypes import DTYPES
from .step_cases import Case
from .step_models import OURS, PEFT, Model, adapted, inputs_of, load, stir, trained, widened

BATCH, SEQ = 2, 256
MEASURES = {PEFT: "HF peft", OURS: "fastpeft's plain torch path"}
TIMES_POOLED = 2.0  # of the measure's error, over the layers of a kind
TIMES_SINGLE = 4.0  # in one tensor, of the measure's worst in a tensor of that kind: a gate is a single number
TIMES_AT_SIZE = 5.0  # apart from the measure at the timed size: twice its error, its own, and what other sizes change
# Of the measure's relative error, as an error of the gain: roundings have no common direction. Of n numbers, three
# standard errors, where that is more.
GAIN_SHARE, GAIN_DEVIATIONS = 0.3, 3.0
FEW = 64  # numbers, which may all be next to zero: errors relative to what is usual for the kind


@dataclass(frozen=True)
class Bounds:
    """Relative. small: right whatever the measure's error is. most: a measure that errs more measures nothing. gain: of
    the projection on the truth. loss: of the loss. apart: from the measure, where it stands for the truth."""

    small: float
    most: float
    gain: float
    loss: float
    apart: float


BOUNDS = {
    "fp32": Bounds(1e-5, 1e-3, 5e-4, 1e-5, 1e-4),
    "fp16": Bounds(2e-4, 0.05, 0.002, 1e-3, 0.02),
    "bf16": Bounds(1e-3, 0.2, 0.002, 2e-3, 0.1),
}
WIDER = {"fp32": torch.float64, "fp16": torch.float32, "bf16": torch.float32}


@dataclass
class Outcome:
    """Of one forward and backward: the loss, and the gradient of each trained tensor by its name in our models."""

    loss: float
    gradients: dict[str, torch.Tensor]


def outcome(model: Model, inputs: dict[str, torch.Tensor]) -> Outcome:
    """Leaves no gradient behind. A tensor that took no part has none, and is a KeyError for who asks for it."""
    loss = model.loss(inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in trained(model.module).items() if p.grad is not None}
    model.module.zero_grad()
    return Outcome(loss.item(), gradients)


@dataclass
class Errors:
    """Relative rms errors of gradients: over the layers for each kind of tensor, and of each tensor; gain, and how many
    numbers there are, by kind."""

    pooled: dict[str, float] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)
    gain: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def worst(self, kind: str) -> float:
        """Of the tensors of a kind."""
        return max(error for name, error in self.single.items() if kind_of(name) == kind)


def release(device: torch.device) -> None:
    """On a GPU, what nothing refers to any more is memory again, circles included."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def kind_of(name: str) -> str:
    """The name without the layer's number: `model.layers.*.mlp.up_proj.lora_A.default.weight`."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def errors_of(found: Outcome, truth: Outcome) -> Errors:
    """Raises ValueError where the comparison would say nothing: other tensors, shapes, zeros for a truth."""
    if found.gradients.keys() != truth.gradients.keys():
        names = sorted(found.gradients.keys() ^ truth.gradients.keys())
        raise ValueError(f"a gradient on one side alone: {', '.join(names[:3])}")
    sums: dict[str, list[float]] = {}
    each: dict[str, tuple] = {}
    errors = Errors()
    for name, exact in truth.gradients.items():
        ours = found.gradients[name]
        if ours.shape != exact.shape:
            raise ValueError(f"gradient of {name}: {tuple(ours.shape)}, expected {tuple(exact.shape)}")
        ours, exact = ours.double(), exact.double()
        parts = [(ours - exact).square().sum().item(), exact.square().sum().item(), (ours * exact).sum().item()]
        if not parts[1] > 0:
            raise ValueError(f"gradient of {name}: the truth is zero or not finite")
        kind, numbers = kind_of(name), exact.numel()
        each[name] = (*parts[:2], kind, numbers)
        sums[kind] = [a + b for a, b in zip(sums.get(kind, (0.0,) * 5), (*parts, numbers, 1), strict=True)]
    for kind, (error, power, along, numbers, _) in sums.items():
        errors.pooled[kind], errors.gain[kind] = _root(error / power), along / power
        errors.numbers[kind] = numbers
    for name, (error, power, kind, numbers) in each.items():
        usual = sums[kind][1] / sums[kind][4]
        errors.single[name] = _root(error / (max(power, usual) if numbers < FEW else power))
    return errors


def _root(value: float) -> float:
    return math.sqrt(value) if math.isfinite(value) else math.inf


class Check:
    """What the implementations of one case are judged by. Holds gradients alone, no model, once it is made.

    Raises Missing where neither HF peft nor we have the method for the model.
    """

    def __init__(self, case: Case, base: nn.Module, device: torch.device):
        self.case, self.base, self.device = replace(case, dropout=0.0), base, device
        self.bounds = BOUNDS[case.dtype]
        self.small = replace(self.case, batch=min(case.batch, BATCH), seq=min(case.seq, SEQ))
        self.measure = PEFT
        try:
            model = self._measure(base)
        except Missing:
            self.measure = OURS
            model = self._measure(base)
        stir(model.module)
        self.values = {name: p.detach().clone() for name, p in trained(model.module).items()}
        self.measured = outcome(model, self._inputs(self.small))
        self.at_size = None
        self.size_note = ""
        if self.small != self.case:
            try:
                self.at_size = outcome(model, self._inputs(self.case))
            except torch.OutOfMemoryError:
                self.size_note = f"{MEASURES[self.measure]} has no memory for the timed size: not compared there"
        del model
        release(device)
        wider = str(WIDER[case.dtype]).removeprefix("torch.")
        self.truth = f"{MEASURES[self.measure]} in {wider}"
        self.exact = None
        try:
            self.exact = self._exact(WIDER[case.dtype])
        except torch.OutOfMemoryError:
            self.truth = f"{MEASURES[self.measure]} in {case.dtype}, for want of memory for {wider}"
        release(device)
        self.own = errors_of(self.measured, self.exact) if self.exact else None

    def _measure(self, base: nn.Module) -> Model:
        return adapted(self.measure, base, self.case, backend="torch")

    def _inputs(self, case: Case) -> dict[str, torch.Tensor]:
        return inputs_of(case, self.device)

    def _exact(self, dtype: torch.dtype) -> Outcome:
        """On a base of that type, which is gone when this returns."""
        model = self._measure(widened(self.base, dtype))
        model.module.to(dtype)
        load(self.values, model.module)
        return outcome(model, self._inputs(self.small))

    def verify(self, name: str) -> dict:
        """The figures for a row's `checked`; `problems` is empty where the implementation is right. Raises Missing, and
        whatever the implementation raises."""
        model = adapted(name, self.base, self.case)
        load(self.values, model.module)
        found = outcome(model, self._inputs(self.small))
        compared = self.at_size is not None and not name == self.measure == PEFT
        at_size = outcome(model, self._inputs(self.case)) if compared else None
        verdict = Verdict()
        try:
            self._judge(verdict, found, itself=name == self.measure == PEFT)
            if at_size is not None:
                self._judge_at_size(verdict, at_size)
        except ValueError as problem:
            verdict.problems.append(str(problem))
        sizes = f"batch {self.small.batch} of {self.small.seq} tokens"
        truth = f"{self.truth}, {sizes}" + (f"; {self.size_note}" if self.size_note else "")
        return {**verdict.as_json(), "truth": truth, "loss": found.loss}

    def _judge(self, verdict: Verdict, found: Outcome, itself: bool) -> None:
        bounds, truth = self.bounds, self.exact or self.measured
        errors = errors_of(found, truth)
        own = self.own or Errors(dict.fromkeys(errors.pooled, 0.0), dict.fromkeys(errors.single, 0.0), {})
        small = bounds.small if self.own else bounds.apart
        for kind, error in errors.pooled.items():
            measure = own.pooled[kind]
            verdict.gain[kind] = errors.gain[kind]
            if self.own and measure:
                verdict.rms_ratio[kind] = error / measure
            if itself:
                self._within(verdict, f"gradient of {kind}: relative rms error", error, bounds.most)
                continue
            allowed = max(small, TIMES_POOLED * min(measure, bounds.most))
            self._within(verdict, f"gradient of {kind}: relative rms error", error, allowed)
            allowed = max(small, TIMES_SINGLE * min(own.worst(kind), bounds.most))
            self._within(verdict, f"gradient of one {kind}: relative rms error", errors.worst(kind), allowed)
            share = max(GAIN_SHARE, GAIN_DEVIATIONS / math.sqrt(errors.numbers[kind]))
            gain = max(bounds.gain, 2 * abs(own.gain.get(kind, 1.0) - 1), share * min(measure or small, bounds.most))
            self._within(verdict, f"gradient of {kind}: gain minus 1", abs(errors.gain[kind] - 1), gain)
        allowed = max(bounds.loss * abs(truth.loss), 2 * abs(self.measured.loss - truth.loss))
        self._within(verdict, "loss: error", abs(found.loss - truth.loss), allowed)

    def _judge_at_size(self, verdict: Verdict, found: Outcome) -> None:
        bounds, errors = self.bounds, errors_of(found, self.at_size)
        for kind, error in errors.pooled.items():
            measure = min(self.own.pooled[kind], bounds.most) if self.own else bounds.apart
            least = bounds.apart if errors.numbers[kind] < FEW else bounds.small
            allowed = max(least, TIMES_AT_SIZE * measure)
            self._within(verdict, f"gradient of {kind} at the timed size: apart from the measure", error, allowed)
        apart = abs(found.loss - self.at_size.loss)
        self._within(verdict, "loss at the timed size: difference", apart, 2 * bounds.loss * abs(self.at_size.loss))

    @staticmethod
    def _within(verdict: Verdict, what: str, value: float, allowed: float) -> None:
        if not value <= allowed:
            verdict.problems.append(f"{what} {value:.3g}, allowed {allowed:.3g}")


def dtype_of(model: Model) -> str:
    """The short name of the type that most of the adapter's tensors have."""
    types = [p.dtype for p in trained(model.module).values()]
    return {dtype: name for name, dtype in DTYPES.items()}[max(set(types), key=types.count)]
