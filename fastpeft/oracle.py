"""How right an op is: its results beside the same definition in plain torch, both measured against float64.

The yardstick is not a tolerance but the eager form in the same dtypes, which rounds too: a result may have at most 1.1
times its root-mean-square error and twice its greatest. To that come two bounds which catch what an average hides: the
same for every single row, and a gain (the projection of the result on the truth) of 1 ± 0.002, because a scale that is
1 % off passes any tolerance wide enough for half precision. A low-rank term hides behind the base product, so it must
be measured alone as well (`LoraProblem.without_base`).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpeft.dispatch import choose_backend
from fastpeft.ops.lora_linear import dropout_mask, lora_linear, lora_linear_reference

Draws = Sequence[torch.Tensor] | torch.Tensor
GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B")


@dataclass(frozen=True)
class Bounds:
    """What a `Difference` may be at most; the defaults are the yardstick of this module's docstring."""

    rms: float = 1.1
    peak: float = 2.0
    row: float = 2.0
    gain: float = 0.002


@dataclass(frozen=True)
class Difference:
    """One tensor's error in units of the eager form's: 1 means as accurate as eager, below 1 more accurate.

    rms: of all elements. peak: of the greatest. row: of the worst row, each beside eager's in that row. gain: the
    projection on the truth. agree: NaN and infinities stand where eager has them.
    """

    name: str
    rms: float
    peak: float
    row: float
    gain: float
    agree: bool

    def faults(self, bounds: Bounds = Bounds()) -> list[str]:  # noqa: B008 (frozen)
        """What is wrong, in words; empty if nothing is. A NaN in a figure counts as wrong."""
        found = [] if self.agree else [f"{self.name}: NaN or infinity where eager has none, or the reverse"]
        for figure, bound in (("rms", bounds.rms), ("peak", bounds.peak), ("row", bounds.row)):
            if not getattr(self, figure) <= bound:
                found.append(f"{self.name}: {figure} error is {getattr(self, figure):.3g} times eager's, above {bound}")
        if not abs(self.gain - 1) <= bounds.gain:
            found.append(f"{self.name}: gain is {self.gain:.5f}, off 1 by more than {bounds.gain}")
        return found


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> float:
    """The greatest quotient; nothing over nothing is 0, something over nothing infinite."""
    quotient = torch.where(numerator == 0, 0.0, numerator / denominator)
    return float(quotient.max()) if quotient.numel() else 0.0


def _rms(t: torch.Tensor, *dimensions: int) -> torch.Tensor:
    return t.square().mean(dimensions or None).sqrt() if t.numel() else t.new_zeros(())


def _kind(t: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 and -1 infinite, 2 NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0))


def stacked(draws: Draws) -> torch.Tensor:
    """[draws, ...]"""
    return draws if isinstance(draws, torch.Tensor) else torch.stack([*draws])


def _pooled(draws: Draws) -> torch.Tensor:
    """[draws, rows, width] in float64."""
    whole = stacked(draws).detach().double()
    return whole.reshape(len(whole), -1, whole.shape[-1] if whole.ndim > 1 else 1)


def _shapes(draws: Draws) -> set[torch.Size]:
    return {draws.shape[1:]} if isinstance(draws, torch.Tensor) else {t.shape for t in draws}


def projection(got: Draws, truth: Draws) -> float:
    """The gain of `got`: its projection on `truth`, as far as both are finite."""
    g, t = map(_pooled, (got, truth))
    finite = g.isfinite() & t.isfinite()
    return _gain(g.where(finite, 0.0), t.where(finite, 0.0))


def _gain(g: torch.Tensor, t: torch.Tensor) -> float:
    power = t.square().sum()
    return float((g * t).sum() / power) if power > 0 else 1.0


def compare(name: str, got: Draws, eager: Draws, truth: Draws) -> Difference:
    """The `Difference` of `got` from `truth` (float64) in units of `eager`'s.

    Each is a sequence of draws, tensors of one shape whose last dimension is a row, or a tensor of them with a
    dimension in front; got and eager have one dtype.
    Errors are pooled over the draws, row by row, since the error of one small problem is a handful of roundings.

    Where eager happens to be (nearly) exact, the unit is the error of the truth rounded to the dtype: no result can be
    asked to be closer than that. A row's unit is no less than eager's relative error over all rows.
    """
    shapes = _shapes(got) | _shapes(eager) | _shapes(truth)
    if len(shapes) != 1 or got[0].dtype != eager[0].dtype:
        raise ValueError(f"{name}: shapes {shapes}, {got[0].dtype} against eager's {eager[0].dtype}")
    g, e, t = map(_pooled, (got, eager, truth))
    finite = g.isfinite() & e.isfinite() & t.isfinite()
    agree = bool(finite.all()) or torch.equal(_kind(g), _kind(e))
    g, e, t = (v.where(finite, 0.0) for v in (g, e, t))
    rounding, error, unit = t.to(got[0].dtype).double() - t, g - t, e - t
    power = t.square().sum()
    relative = _rms(unit) / _rms(t) if power > 0 else torch.zeros_like(power)
    row_unit = torch.stack((_rms(unit, 0, 2), _rms(rounding, 0, 2), relative * _rms(t, 0, 2))).amax(0)
    peaks = [v.abs().amax() if v.numel() else v.new_zeros(()) for v in (error, unit, rounding)]
    return Difference(
        name=name,
        rms=_ratio(_rms(error), torch.maximum(_rms(unit), _rms(rounding))),
        peak=_ratio(peaks[0], torch.maximum(*peaks[1:])),
        row=_ratio(_rms(error, 0, 2), row_unit),
        gain=_gain(g, t),
        agree=agree,
    )


@dataclass(frozen=True)
class LoraProblem:
    """One call of `lora_linear` with the gradient of its result: x (..., K), weight (N, K), bias (N,) or None,
    lora_A (R, K), lora_B (N, R), dy (..., N)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    dy: torch.Tensor
    scaling: float = 0.5
    dropout: float = 0.0

    def without_base(self) -> "LoraProblem":
        """The low-rank term alone."""
        return dataclasses.replace(self, weight=torch.zeros_like(self.weight), bias=None)


def random_lora_problem(
    shape: tuple[int, ...],
    outputs: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout: float = 0.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> LoraProblem:
    """Normal x of this shape, and matrices such that the base product has unit variance and the low-rank term (without
    dropout) a quarter of it: large for a trained adapter."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = adapter_dtype or dtype
    inputs = shape[-1]

    def normal(*size, deviation=1.0, dtype=dtype):
        return (torch.randn(*size, generator=generator) * deviation).to(dtype).to(device)

    return LoraProblem(
        x=normal(*shape),
        weight=normal(outputs, inputs, deviation=inputs**-0.5),
        bias=normal(outputs) if bias else None,
        lora_A=normal(rank, inputs, deviation=inputs**-0.5, dtype=adapter_dtype),
        lora_B=normal(outputs, rank, deviation=rank**-0.5, dtype=adapter_dtype),
        dy=normal(*shape[:-1], outputs),
        dropout=dropout,
    )


def _outcome(function, problem: LoraProblem, wanted: tuple[str, ...], dtype: torch.dtype | None) -> dict:
    """{"y": result, "dx": gradient, ...} of function(x, weight, bias, lora_A, lora_B), in `dtype` or as given."""
    leaves = {name: getattr(problem, name) for name in GRADIENTS}
    leaves = {
        name: None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_(name in wanted)
        for name, tensor in leaves.items()
    }
    y = function(*leaves.values())
    if not wanted:
        return {"y": y}
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], problem.dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}}


def seed_generators(seed: int, device: torch.device) -> None:
    """The CPU's and the device's own. `torch.manual_seed` notes for every kind of accelerator that is not in use where
    it was called from, a millisecond or two each time."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def op_dropout(problem: LoraProblem) -> tuple[torch.Tensor | None, float]:
    """The mask [M, K] that the op would draw now, and its exact probability of dropping."""
    if not problem.dropout:
        return None, 0.0
    x = problem.x
    backend = choose_backend(x, x.dtype).backend
    seed = torch.empty(1, dtype=torch.int64, device=x.device if backend == "triton" else "cpu").random_()
    columns = x.shape[-1]
    keep = dropout_mask(seed, problem.dropout, x.numel() // columns, columns, x.device, backend)
    return keep, round(problem.dropout * 65536) / 65536 if backend == "triton" else problem.dropout


def lora_linear_outcomes(problem: LoraProblem, wanted: tuple[str, ...], seed: int = 0) -> tuple[dict, dict, dict]:
    """Of `lora_linear`, of `lora_linear_reference` in the same dtypes and in float64, with the mask the op draws:
    {"y": result, "dx": gradient, ...} with the gradients that are `wanted`.

    Runs on the backend in force, and leaves torch's generators as they were.
    """
    with torch.random.fork_rng([problem.x.device] if problem.x.is_cuda else []):
        seed_generators(seed, problem.x.device)
        keep, p = op_dropout(problem)
        seed_generators(seed, problem.x.device)
        got = _outcome(
            lambda *leaves: lora_linear(*leaves, problem.scaling, dropout=problem.dropout, training=True),
            problem, wanted, None,
        )  # fmt: skip

    def reference(*leaves):
        return lora_linear_reference(*leaves, problem.scaling, keep, p)

    return got, _outcome(reference, problem, wanted, None), _outcome(reference, problem, wanted, torch.float64)


def lora_linear_differences(
    problems: Sequence[LoraProblem], wanted: tuple[str, ...] = ("x", "bias", "lora_A", "lora_B")
) -> list[Difference]:
    """How far y and the gradients dx, dweight, dbias, dlora_A, dlora_B, as far as `wanted`, are from the truth, pooled
    over problems of one shape."""
    wanted = tuple(name for name in wanted if getattr(problems[0], name) is not None)
    draws = [lora_linear_outcomes(problem, wanted, seed) for seed, problem in enumerate(problems)]
    return [compare(name, *([draw[i][name] for draw in draws] for i in range(3))) for name in draws[0][0]]
