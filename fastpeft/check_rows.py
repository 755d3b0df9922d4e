"""What `fastpeft check` reports: one row for each tensor that was computed in several ways, and how it is judged."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from fastpeft.dispatch import Choice
from fastpeft.oracle import Bounds, Difference, Draws, compare, projection, stacked

WHOLE = "whole model"


@dataclass(frozen=True)
class Noted(Bounds):
    """Bounds with what they are for."""

    note: str = "in general"


USUAL = Noted()
# The low-rank term alone: scaling and 1/(1 - p) folded into S are one rounding more than eager has there, 7 to 10 %
# more error at low rank. Of a whole model: the errors of its tensors hang together, so that the ratio varies more.
ALONE = Noted(rms=1.25, peak=2.5, row=2.5, note="for the low-rank term alone, and whole models")
# fp32 gradients of fp32 adapters on fp16 data come from tf32 products of two parts, which hold 21 of eager's 24 bits.
TWO_PARTS = Noted(
    rms=16,
    peak=16,
    row=32,
    note="for fp32 gradients of fp32 adapters on fp16 data, which the kernels compute to 21 bits",
)
# Triton's interpreter truncates where it makes a bf16 of an fp32, which doubles the error of a rounding and shrinks
# every value by up to 2**-8, twice in one op.
TRUNCATED = Noted(
    rms=2.2, peak=4.0, row=4.0, gain=0.002 + 2 * 2**-8, note="for bf16 in Triton's interpreter, which truncates"
)
# Two results are merged by a logarithm that is rounded to fp32 once more. The measure in fp32 is SDPA, the same code;
# the greatest of thousands of fp32 roundings varies more than their mean.
FLASH = Noted(rms=1.25, peak=3.5, row=2.5, note="for CPU flash attention")
# One query in fp32: all that its head gives the keys is off by one number, the rounding of that logarithm, so that the
# greatest error is a matter of luck.
ONE = Noted(rms=1.5, peak=6, row=6, note="for fp32 gradients of a single query by CPU flash attention")
# A gradient of one number for each head or layer: the quotient of two errors of few numbers is a matter of luck, and it
# is the gain that finds a mistake, with three standard errors of its own beside the bound.
FEW = Noted(rms=4, peak=8, row=4, note="for gradients of sinks and gates, one number for each head or layer")


def added_in_half(heads: int) -> Noted:
    """CPU flash attention adds up gradients of half-precision keys in half precision, over blocks of queries and over
    the heads that share them: a sum of n with n roundings has sqrt((n + 1) / 2) times the error of one rounding."""
    rms = max(1.25, round(((heads + 1) / 2) ** 0.5, 2))
    note = "for half-precision gradients of keys and values by CPU flash attention, which adds them up in half"
    return Noted(rms=rms, peak=4.0, row=2 * rms, note=note)


@dataclass
class Row:
    """One tensor. ours, eager and peft: relative rms errors; difference: ours in units of eager's."""

    method: str
    part: str
    tensor: str
    ours: float
    eager: float
    difference: Difference
    bounds: Noted
    faults: list[str]
    peft: float | None = None
    apart: float | None = None  # of HF peft in float64, from the truth
    pooled: int = 1  # how many tensors it is the worst of

    def severity(self) -> tuple[bool, float]:
        return bool(self.faults), self.difference.rms


@dataclass(frozen=True)
class Cost:
    """What a base in fewer bits adds to the error of one tensor, from float64 with the base as it was. fp8, own: rms
    errors over the rms of the truth, of the base in float8 and of the one in its own dtype; apart: of their difference;
    fp8_peak, own_peak: greatest errors over the rms of the truth."""

    part: str
    tensor: str
    fp8: float
    own: float
    apart: float
    fp8_peak: float
    own_peak: float


class Measured(NamedTuple):
    """What was found of one method. notes: lines for the reader; costs: figures that are shown and not judged."""

    choice: Choice
    rows: list[Row]
    notes: tuple[str, ...] = ()
    costs: tuple[Cost, ...] = ()


def relative_error(got: Draws, truth: Draws) -> float:
    """Of draws of one shape, all together."""
    g, t = (stacked(draws).double() for draws in (got, truth))
    error, power = float((g - t).square().sum()), float(t.square().sum())
    return (error / power) ** 0.5 if power else error**0.5


def row_of(method: str, part: str, tensor: str, got: Draws, eager: Draws, truth: Draws, bounds: Noted) -> Row:
    """Each of the three is draws of one tensor."""
    got, eager, truth = map(stacked, (got, eager, truth))
    difference = compare(tensor, got, eager, truth)
    # What half precision takes from eager's projection is no fault of ours; a factor of ours comes on top of it.
    allowed = bounds.gain + abs(projection(eager, truth) - 1)
    errors = relative_error(got, truth), relative_error(eager, truth)
    if bounds == FEW:
        allowed += 3 * errors[1] / truth.numel() ** 0.5
    faults = difference.faults(dataclasses.replace(bounds, gain=allowed))
    return Row(method, part, tensor, *errors, difference, bounds, faults)


def worst(rows: list[Row]) -> Row:
    """The worst of them, with the faults of all."""
    found = max(rows, key=Row.severity)
    found.faults = [fault for row in rows for fault in row.faults]
    found.pooled = len(rows)
    return found
