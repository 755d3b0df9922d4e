"""NaN, infinities and numbers at the ends of a type in the linear ops and the prompt's: where eager PyTorch puts them.

An element of a result or gradient is NaN, infinite or finite as in the op's definition. Dropout selects: what is left
out counts as 0 whatever it was, where the definition's product with a mask of zeros would make a NaN of it.
"""

import dataclasses

import numpy
import pytest
import torch

from fastpeft.ops import lora_linear
from fastpeft.oracle import _kind, _outcome, lora_linear_outcomes, op_dropout
from tests.counting import count, how_many
from tests.ops import lora_projections_cases as projections
from tests.ops import mixed_lora_linear_cases as mixed
from tests.ops import prompt_embedding_cases as prompts
from tests.ops.lora_linear_cases import DTYPES, STRATEGIES, draws, on

NAN, INF = float("nan"), float("inf")
LORA = ("x", "weight", "bias", "lora_A", "lora_B")
interpreted = pytest.mark.interpreter
PATHS = [("torch", None), *(pytest.param("triton", name, marks=interpreted) for name in STRATEGIES)]
BOTH = ["torch", pytest.param("triton", marks=interpreted)]

pytestmark = pytest.mark.usefixtures("poison", "quiet")


@pytest.fixture
def quiet():
    """numpy, which interprets the kernels, remarks on each operation whose result is not a number."""
    with numpy.errstate(all="ignore"):
        yield


def values(number: int) -> list[float]:
    """NaN, inf or -inf in turn, or all of them."""
    return [(NAN, INF, -INF)[(number + turn) % 3] for turn in range(how_many(1, 3))]


def spoilt(t: torch.Tensor, value: float) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[t.numel() // 2] = value
    return t


def assert_kinds(got: dict, eager: dict, split: bool = False) -> None:
    """`split`: fp32 was taken apart for 16-bit products, which makes NaN of an infinity."""
    for name in eager:
        ours, theirs = (_kind(each[name]) for each in (got, eager))
        assert torch.equal(*((kind != 0 for kind in (ours, theirs)) if split else (ours, theirs))), name
        assert not ((ours != 2) & (theirs == 2)).any(), name
    assert any(not t.isfinite().all() for t in got.values())
    count("numerical faults followed")


@pytest.mark.parametrize("dtypes", [name for name in DTYPES if name.startswith("fp")])
@pytest.mark.parametrize("name", [*LORA, "dy"])
@pytest.mark.parametrize(("backend", "strategy"), PATHS)
def test_lora_linear(backend, strategy, name, dtypes):
    (problem,) = draws(1, (7, 37), 35, dtypes=dtypes)
    for value in values([*LORA, "dy"].index(name) + len(dtypes)):
        changed = dataclasses.replace(problem, **{name: spoilt(getattr(problem, name), value)})
        with on(backend, strategy):
            got, eager, _ = lora_linear_outcomes(changed, LORA)
        assert_kinds(got, eager, split=backend == "triton" and dtypes == "fp16-fp32")


@pytest.mark.parametrize("name", [*LORA, "dy"])
def test_lora_linear_in_bfloat16(name):
    (problem,) = draws(1, (7, 37), 35, dtypes="bf16")
    for value in (NAN, INF, -INF):
        changed = dataclasses.replace(problem, **{name: spoilt(getattr(problem, name), value)})
        with on("torch"):
            got, eager, _ = lora_linear_outcomes(changed, LORA)
        assert_kinds(got, eager)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", [*LORA, "dy"])
@pytest.mark.parametrize("backend", BOTH)
def test_dropout_selects(backend, name, value):
    (problem,) = draws(1, (7, 37), 35, dropout=0.3)
    problem = dataclasses.replace(problem, **{name: spoilt(getattr(problem, name), value)})
    with on(backend, "fused" if backend == "triton" else None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            keep, p = op_dropout(problem)
        got, multiplied, _ = lora_linear_outcomes(problem, LORA)

    def selecting(x, weight, bias, a, b):
        z = torch.where(keep.view(x.shape), x, 0.0) / (1 - p)
        return torch.nn.functional.linear(x, weight, bias) + (z @ a.t()) @ b.t() * problem.scaling

    assert_kinds(got, _outcome(selecting, problem, LORA, None))
    for key in got:
        assert not (multiplied[key].isfinite() & ~got[key].isfinite()).any(), key


@pytest.mark.parametrize("tensor", ["x", "weight", "bias", "lora_A", "lora_B", "residual", "dy"])
@pytest.mark.parametrize("backend", BOTH)
def test_mixed_lora_linear(backend, tensor):
    problem = mixed.draw(shape=(5, 33), outputs=40, base=tensor != "residual")
    given = getattr(problem, tensor)
    for value in values(len(tensor)):
        changed = spoilt(given[0] if isinstance(given, tuple) else given, value)
        changed = (changed, *given[1:]) if isinstance(given, tuple) else changed
        with on(backend):
            got, eager, _ = mixed.outcomes(dataclasses.replace(problem, **{tensor: changed}))
        assert_kinds(got, eager)


@pytest.mark.parametrize("tensor", ["x", "weight", "bias", "A", "B", "dy"])
@pytest.mark.parametrize("backend", BOTH)
def test_lora_projections(backend, tensor):
    """A fault of one projection's stays with it, but for dX."""
    problem = projections.draw(shape=(9, 33), outputs=(40, 17), ranks=(5, 3))
    given = getattr(problem, tensor)
    for value in values(len(tensor)):
        changed = spoilt(given[0] if isinstance(given, tuple) else given, value)
        changed = (changed, *given[1:]) if isinstance(given, tuple) else changed
        with on(backend):
            got, eager, _ = projections.outcomes(dataclasses.replace(problem, **{tensor: changed}))
        assert_kinds(got, eager)
        others = [key for key in got if key.endswith("1")] if tensor != "x" else []
        assert len(others) == (0 if tensor == "x" else 4) and all(got[key].isfinite().all() for key in others)


@pytest.mark.parametrize("form", [{}, {"embeds": True}, {"by_sample": True}, {"starts": True}], ids=str)
@pytest.mark.parametrize("tensor", ["rows", "prompt", "dout"])
@pytest.mark.parametrize("backend", BOTH)
def test_prompt_embedding(backend, tensor, form):
    problem = prompts.draw(batch=3, tokens=4, entries=5, **form)
    if problem.ids is not None:
        problem.ids[:, 1] = 2  # the entry in the middle
    table = backend == "torch"
    for value in (NAN, INF, -INF):
        changed = dataclasses.replace(problem, **{tensor: spoilt(getattr(problem, tensor), value)})
        changed.dout[1, :2, 5] = value if tensor == "dout" else 1.0
        with on(backend):
            got = prompts.results(changed, table=table)
        assert_kinds(got, prompts.results(changed, reference=True, table=table))


@pytest.mark.parametrize(
    ("backend", "strategy", "dtypes"),
    [
        *(("torch", None, dtypes) for dtypes in ("fp16", "fp16-fp32", "bf16", "bf16-fp32")),
        *(pytest.param("triton", name, dtypes, marks=interpreted)
          for name in STRATEGIES for dtypes in ("fp16", "fp16-fp32")),
    ],
)  # fmt: skip
def test_sums_beyond_the_type(backend, strategy, dtypes):
    """Great terms that cancel, and some that do not: finite wherever eager is, infinite where the truth is. In bf16,
    whose end is fp32's, all terms of one sign are together finite, as some processors add up both signs apart."""
    (problem,) = draws(1, (7, 48), 35, dtypes=dtypes)
    end = torch.finfo(problem.x.dtype).max
    sign = torch.tensor([1.0, -1.0]).repeat(24)
    x = torch.full((7, 48), 0.9 * end / (32 if problem.x.dtype == torch.bfloat16 else 1)).mul_(sign)
    x[3] = x[3].abs()  # whose sum is beyond the end of the type
    weight = torch.ones(35, 48)
    problem = dataclasses.replace(
        problem, x=x.to(problem.x.dtype), weight=weight.to(problem.weight.dtype), bias=None,
        lora_A=problem.lora_A * 0, lora_B=problem.lora_B * 0.01, dy=problem.dy * 0.01,
    )  # fmt: skip
    wanted = ("x", "lora_A")
    with on(backend, strategy):
        got, eager, truth = lora_linear_outcomes(problem, wanted)
    assert (got["y"][3] == INF).all() and (got["y"][:3] == 0).all()
    for name, t in got.items():
        assert not t.isnan().any(), name
        assert not (eager[name].isfinite() & ~t.isfinite()).any(), name
        assert t[truth[name].abs() < end / 2].isfinite().all(), name
        assert t[truth[name].abs() > 1.01 * end].isinf().all(), name


@pytest.mark.parametrize(
    ("backend", "strategy", "dtype"),
    [
        *(("torch", None, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *(pytest.param("triton", name, dtype, marks=interpreted)
          for name in STRATEGIES for dtype in (torch.float32, torch.float16)),
    ],
)  # fmt: skip
def test_denormals_are_kept(backend, strategy, dtype):
    """x times 1 and an adapter of zeros is x, to the bit; as is dX of dY."""
    smallest = torch.finfo(dtype).smallest_normal
    x = (torch.arange(1, 1 + 5 * 16).view(5, 16) / 128 * smallest).to(dtype).requires_grad_()
    a, b = torch.zeros(3, 16, dtype=dtype), torch.zeros(16, 3, dtype=dtype)
    with on(backend, strategy):
        y = lora_linear(x, torch.eye(16, dtype=dtype), None, a, b, 1.0)
        (dx,) = torch.autograd.grad(y, x, x.detach())
    assert 0 < x.min() < smallest
    assert torch.equal(y, x) and torch.equal(dx, x)


@pytest.mark.parametrize("dtypes", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", BOTH)
def test_denormal_rows_are_copied(backend, dtypes):
    problem = prompts.draw(dtypes)
    problem = dataclasses.replace(
        problem, **{name: getattr(problem, name) * torch.finfo(problem.rows.dtype).smallest_normal / 8
                    for name in ("rows", "prompt")}
    )  # fmt: skip
    with on(backend):
        out = prompts.results(problem)["out"]
    assert out[:, prompts.COUNT :].count_nonzero() > 0.9 * out[:, prompts.COUNT :].numel()
    assert torch.equal(out, prompts.results(problem, reference=True)["out"])


@pytest.mark.parametrize(
    ("shape", "outputs", "rank"), [((1, 1), 1, 1), ((5, 7), 3, 1), ((1, 16), 16, 1), ((3, 1), 2, 2)], ids=str
)
@pytest.mark.parametrize(("backend", "strategy"), PATHS)
def test_one_of_everything(backend, strategy, shape, outputs, rank):
    (problem,) = draws(1, shape, outputs, rank)
    with on(backend, strategy):
        got, _, truth = lora_linear_outcomes(problem, LORA)
    for name, t in got.items():
        torch.testing.assert_close(t.double(), truth[name], atol=1e-6, rtol=1e-5, msg=name)
