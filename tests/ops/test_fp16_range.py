"""All-fp16 LoRA near the end of the type: what is finite in eager is finite here, whatever the scaling.

Eager scales what the product with B gives, and the gradient before that goes to B and through it. Each case brings one
tensor of its forward or backward to 0.9 of fp16's greatest number and keeps the others well below: a scale that is
folded in elsewhere, or multiplies what has been rounded already, overflows.
"""

import dataclasses
import itertools

import pytest
import torch

from fastpeft.oracle import Bounds, compare, lora_linear_outcomes
from tests.counting import count, how_many
from tests.ops import mixed_lora_linear_cases as mixed
from tests.ops.lora_linear_cases import HALF, STRATEGIES, draws, on

END = torch.finfo(HALF).max
SCALINGS = (0.07, 1.0, 9.0)
ONE_DRAW = Bounds(rms=2.2, peak=4.0, row=8.0)  # twice the criterion, as for planted mistakes
NAN = float("nan")

# Tensor -> (its factors; of these the one that is grown; what is brought to 0.3 before, by another one).
CASES = {
    "S": (("x", "lora_A"), "lora_A", None),
    "T": (("lora_B", "dy"), "lora_B", None),
    "y": (("x", "lora_A", "lora_B"), "lora_B", ("lora_A", "S")),
    "dB": (("x", "lora_A", "dy"), "dy", ("lora_A", "S")),
    "dA": (("x", "lora_B", "dy"), "x", ("lora_B", "T")),
    "dX": (("lora_A", "lora_B", "dy"), "lora_A", ("lora_B", "T")),
}
FACTORS = ("x", "lora_A", "lora_B", "dy")

WITHIN = list(itertools.product(CASES, SCALINGS, (0.0, 0.5)))
interpreted = pytest.mark.interpreter
PATHS = [("torch", None), *(pytest.param("triton", name, marks=interpreted) for name in STRATEGIES)]
BOTH = ["torch", pytest.param("triton", marks=interpreted)]


def on_kernels(every: list[tuple], step: int) -> list:
    """All of them, or every `step`-th."""
    return [pytest.param(*each, marks=interpreted) for each in every[:: how_many(step, 1)]]


pytestmark = pytest.mark.usefixtures("poison")


def sizes(x, a, b, dy, scaling: float, kept: float) -> dict[str, float]:
    """The greatest magnitude in each case's tensor: the low-rank term alone, nothing dropped but all scaled for it; of
    y what eager has of it before or after it scales."""
    x, dy = x.flatten(0, -2) * kept, dy.flatten(0, -2)
    s, t = x @ a.t(), dy @ b * scaling
    y, dx = s @ b.t() * max(scaling, 1.0), t @ a * kept
    tensors = {"S": s, "T": t, "y": y, "dB": dy.t() @ s * scaling, "dA": t.t() @ x, "dX": dx}
    return {name: float(tensor.abs().max()) for name, tensor in tensors.items()}


def at_the_end(case: str, given: dict[str, torch.Tensor], scaling: float, dropout: float) -> dict[str, torch.Tensor]:
    """The factors in fp16, with the case's tensor where it is to be and all others at 0.3 of the end or below."""
    factors, grown, before = CASES[case]
    given = {name: t.double() * (8 if name == "dy" else 1) for name, t in given.items()}

    def sized() -> dict[str, float]:
        return sizes(*(given[name] for name in FACTORS), scaling, 1 / (1 - dropout))

    if before:
        given[before[0]] *= 0.3 * END / sized()[before[1]]
    given[grown] *= (0.9 if case == "T" or not dropout else 0.6) * END / sized()[case]  # a sum without a term may grow
    for shrunk in (name for name in FACTORS if name not in factors):
        worst = max(size for name, size in sized().items() if shrunk in CASES[name][0])
        given[shrunk] *= min(1.0, 0.3 * END / worst)
    return {name: t.to(HALF) for name, t in given.items()}


def assert_as_finite_as_eager(got: dict, eager: dict, truth: dict) -> None:
    for name in eager:
        assert eager[name].isfinite().all(), f"{name}: not even eager's is finite"
        assert not (faults := compare(name, [got[name]], [eager[name]], [truth[name]]).faults(ONE_DRAW)), faults
    count("results at the end of fp16")


@pytest.mark.parametrize(
    ("backend", "strategy", "case", "scaling", "dropout"),
    [("torch", None, *each) for each in WITHIN]
    + on_kernels([("triton", name, *each) for name in STRATEGIES for each in WITHIN], 5),
)
def test_lora_linear(backend, strategy, case, scaling, dropout):
    (problem,) = draws(1, (19, 37), 35, dtypes="fp16")
    factors = at_the_end(case, {name: getattr(problem, name) for name in FACTORS}, scaling, dropout)
    problem = dataclasses.replace(problem, **factors, scaling=scaling, dropout=dropout)
    with on(backend, strategy):
        assert_as_finite_as_eager(*lora_linear_outcomes(problem, ("x", "bias", "lora_A", "lora_B")))


@pytest.mark.parametrize(
    ("backend", "case", "scaling", "dropout"),
    [("torch", *each) for each in WITHIN] + on_kernels([("triton", *each) for each in WITHIN], 5),
)
def test_mixed_lora_linear(backend, case, scaling, dropout):
    """The first adapter at the end of the type; the second has its halves, and half its scaling."""
    problem = mixed.draw("fp16", shape=(5, 37), outputs=35, ranks=(5, 5), rows=(0, 1, 0, -1, 0))
    first = [sample for sample, adapter in enumerate(problem.rows) if adapter == 0]
    given = {"x": problem.x[first], "lora_A": problem.lora_A[0], "lora_B": problem.lora_B[0], "dy": problem.dy[first]}
    found = at_the_end(case, given, scaling, dropout)
    x, dy = (t / t.abs().max() * found[name].abs().max() for name, t in (("x", problem.x), ("dy", problem.dy)))
    x[first], dy[first] = found["x"], found["dy"]
    problem = dataclasses.replace(
        problem, x=x, dy=dy,
        **{name: (found[name], found[name] / 2) for name in ("lora_A", "lora_B")},
        scalings=(scaling, scaling / 2), dropouts=(dropout, 0.0) if dropout else None,
    )  # fmt: skip
    with on(backend):
        assert_as_finite_as_eager(*mixed.outcomes(problem))


@pytest.mark.parametrize("dtypes", ["fp32", "fp16-fp32"])
@pytest.mark.parametrize(("backend", "strategy"), PATHS)
def test_a_scaling_of_zero_hides_no_nan(backend, strategy, dtypes):
    """BLAS leaves out a product that is multiplied by 0."""
    (problem,) = draws(1, (3, 37), 35, dtypes=dtypes)
    for name in ("x", "lora_A", "lora_B", "dy"):
        tensor = getattr(problem, name).clone()
        tensor[1, 2] = NAN
        changed = dataclasses.replace(problem, **{name: tensor}, scaling=0.0)
        with on(backend, strategy):
            got, eager, _ = lora_linear_outcomes(changed, ("x", "lora_A", "lora_B"))
        assert any(t.isnan().any() for t in eager.values())
        for key in eager:
            assert torch.equal(got[key].isnan(), eager[key].isnan()), (name, key)


@pytest.mark.parametrize("backend", BOTH)
def test_a_scaling_of_zero_hides_no_nan_in_a_mixed_batch(backend):
    problem = mixed.draw(shape=(3, 37), outputs=35)
    for name in ("lora_A", "lora_B"):
        first, *others = getattr(problem, name)
        first = first.clone()
        first[1, 2] = NAN
        changed = dataclasses.replace(problem, **{name: (first, *others)}, scalings=(0.0, 0.5))
        with on(backend):
            got, eager, _ = mixed.outcomes(changed)
        assert eager["y"].isnan().any()
        for key in eager:
            assert torch.equal(got[key].isnan(), eager[key].isnan()), (name, key)
