"""NaN, infinities, numbers at the ends of a type and rows that see nothing, in the attention ops: see
`tests/ops/attention_bounds.py` for where they must be."""

import contextlib
import dataclasses

import numpy
import pytest
import torch

from fastpeft.attention_oracle import AttentionProblem, _op, outcome, random_attention_problem
from fastpeft.dispatch import Plan, backend, override_plan
from tests.counting import count, how_many
from tests.ops import attention_cases
from tests.ops.attention_bounds import all_at_once, each_alone, faults_of

NAN, INF = float("nan"), float("inf")
TORCH, KERNELS = ("flash", "blocks"), ("fused", "merge")
PLACES = {
    "query": (1, 2, 5, 3),
    "key": (1, 1, 6, 2),
    "value": (1, 0, 7, 1),
    "prefix_key": (1, 2, 3),
    "prefix_value": (0, 1, 2),
    "dout": (0, 3, 4, 2),
    "gate": (0,),
    "bias": (0, 1, 9, 4),
    "prefix_bias": (0, 2, 9, 1),
    "sinks": (2,),
}
# Modifiers, and whether gated: key (1, 1, 6) is padding in "holes", and of another segment than most in "packed".
CALLS = {
    "causal": ((), False),
    "bidirectional": (("bidirectional",), False),
    "left": (("left", "sinks"), False),
    "packed": (("packed", "alibi"), False),
    "holes": (("holes",), False),
    "window": (("window", "right"), False),
    "biased": (("bias", "prefix-bias", "softcap"), False),
    "gated": (("right",), True),
    "gated-biased": (("bias", "softcap", "sinks"), True),
}
MERGED = ("causal", "bidirectional")  # what the vendor's flash can take

pytestmark = pytest.mark.usefixtures("poison", "quiet")


@pytest.fixture
def quiet():
    """numpy, which interprets the kernels, remarks on each operation whose result is not a number."""
    with numpy.errstate(all="ignore"):
        yield


@contextlib.contextmanager
def path(name: str):
    if name in TORCH:
        with attention_cases.path(name):
            yield
    else:
        with backend("triton"), override_plan(Plan(name, name, "forced by a test")):
            yield


def spoilt(call: str, name: str, value: float, dtype=torch.float32) -> AttentionProblem | None:
    """The problem with one element of that tensor changed; None where it has no such tensor."""
    modifiers, gated = CALLS[call]
    problem = random_attention_problem(modifiers, gate=(4,) if gated else None, dtype=dtype)
    if getattr(problem, name) is None:
        return None
    tensor = getattr(problem, name).clone()
    tensor[PLACES[name]] = value
    return dataclasses.replace(problem, **{name: tensor})


def faults(call: str, name: str, value: float, how: str) -> list[str]:
    problem = spoilt(call, name, value)
    wanted = problem.present()
    with path(how):
        got = outcome(_op, problem, wanted)
    expected = [outcome(form, problem, wanted) for form in (each_alone, all_at_once)]
    masks = value == -INF and name in ("bias", "prefix_bias", "sinks")
    assert any(not t.isfinite().all() for t in expected[1].values()) is not masks
    return faults_of(got, *expected)


def followed(paths, values: int, step: int) -> list:
    """(call, tensor, value, path): of NaN, inf and -inf in turn so many for each, or for every `step`-th."""
    found = []
    cases = [
        (call, name, how)
        for call, (_, gated) in CALLS.items()
        for name in PLACES
        for how in paths
        if (gated or name != "gate") and spoilt(call, name, NAN) and (how != "merge" or call in MERGED)
    ]
    for number, (call, name, how) in enumerate(cases[::step]):
        for value in [(NAN, INF, -INF)[(number + turn) % 3] for turn in range(values)]:
            found.append(pytest.param(call, name, value, how, id=f"{call}-{name}-{value}-{how}"))
    return found


@pytest.mark.parametrize(("call", "name", "value", "how"), followed(TORCH, how_many(1, 3), how_many(2, 1)))
def test_in_torch(call, name, value, how):
    assert not (found := faults(call, name, value, how)), "\n".join(found)
    count("numerical faults followed")


@pytest.mark.interpreter
@pytest.mark.parametrize(("call", "name", "value", "how"), followed(KERNELS, how_many(1, 3), how_many(5, 1)))
def test_in_kernels(call, name, value, how):
    assert not (found := faults(call, name, value, how)), "\n".join(found)
    count("numerical faults followed")


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("name", ["value", "prefix_value"])
@pytest.mark.parametrize("call", [call for call, (_, gated) in CALLS.items() if not gated])
def test_flash_merges_infinite_values(call, name, value):
    """Pieces of which one has an infinite result and the other a finite one."""
    assert not (found := faults(call, name, value, "flash")), "\n".join(found)
    count("numerical faults followed")


STEPS = [
    ("decode", ("left", "sinks"), ("query", "key", "prefix_key", "value", "prefix_value", "sinks")),
    ("concat", (), ("query", "key", "prefix_key", "value")),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("how", "modifiers", "name"), [(how, modifiers, name) for how, modifiers, names in STEPS for name in names]
)
def test_one_query(how, modifiers, name):
    """Whose forward has kernels of its own, or the vendor's over concatenated keys."""
    problem = random_attention_problem(modifiers, queries=1, keys=40)
    tensor = getattr(problem, name).clone()
    tensor[PLACES[name][:2] + (0,) * (tensor.ndim - 2)] = NAN  # the first key is padding in sample 1
    problem = dataclasses.replace(problem, **{name: tensor})
    with path(how):
        got = outcome(_op, problem, problem.present())
    expected = [outcome(form, problem, problem.present()) for form in (each_alone, all_at_once)]
    assert not (found := faults_of(got, *expected)), "\n".join(found)
    count("numerical faults followed")


@pytest.mark.parametrize("how", ["blocks", pytest.param("fused", marks=pytest.mark.interpreter)])
def test_dropout_hides_no_row(how):
    """Where the weights of a row are not numbers, leaving some of them out does not make it one that is."""
    problem = dataclasses.replace(spoilt("causal", "query", NAN), dropout=0.5)
    with path(how):
        torch.manual_seed(0)
        out = outcome(_op, problem, ("value",))["out"]
    assert out[1, 2, 5].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


ENDS = [
    ("flash", torch.float16),
    ("flash", torch.bfloat16),
    ("blocks", torch.float16),
    ("blocks", torch.bfloat16),
    pytest.param("fused", torch.float16, marks=pytest.mark.interpreter),
    pytest.param("merge", torch.float16, marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize(("how", "dtype"), ENDS)
def test_products_beyond_the_type(how, dtype):
    """q kᵀ is some 16·300², which fp16 does not hold, and values are near its end: eager in fp16 gives NaN, and the op
    what float64 gives, infinite only where that is beyond the type."""
    problem = random_attention_problem(dtype=dtype)
    size = {"query": 300.0, "key": 300.0, "prefix_key": 300.0, "value": 20000.0, "prefix_value": 20000.0, "dout": 0.01}
    end = torch.finfo(dtype).max
    large = {name: (getattr(problem, name).float() * by).clamp(-end, end).to(dtype) for name, by in size.items()}
    problem = dataclasses.replace(problem, **large)
    truth = outcome(all_at_once, problem, problem.present(), torch.float64)
    eager = outcome(all_at_once, problem, problem.present())
    with path(how):
        got = outcome(_op, problem, problem.present())
    assert eager["out"].isfinite().all() == (dtype == torch.bfloat16)
    assert got["out"].isfinite().all()
    error = (got["out"].double() - truth["out"]).abs().max() / truth["out"].abs().max()
    assert error < 4 * torch.finfo(dtype).eps
    for name, t in got.items():
        assert not t.isnan().any(), name
        assert t[truth[name].abs() < end / 2].isfinite().all(), name
        assert t[truth[name].abs() > end * 1.01].isinf().all(), name


EVERY = [*TORCH, pytest.param("fused", marks=pytest.mark.interpreter)]


@pytest.mark.parametrize("how", EVERY)
def test_rows_that_see_nothing_are_zero(how):
    """All keys are padding, and the prefix is out of the window of all but the first rows."""
    problem = random_attention_problem(("window",))
    padding = torch.zeros(2, 19, dtype=torch.bool)
    problem = dataclasses.replace(problem, options={**problem.options, "padding_mask": padding})
    reach = problem.options["sliding_window"] - 1  # virtual key -1 is seen by rows before it
    with path(how):
        got = outcome(_op, problem, problem.present())
    assert not got["out"][:, :, reach:].any() and not got["dquery"][:, :, reach:].any()
    assert got["out"][:, :, :reach].any() and got["dprefix_value"].any()
    assert not got["dkey"].any() and not got["dvalue"].any()
    assert all(t.isfinite().all() for t in got.values())


SMALL = [
    {"queries": 1}, {"queries": 1, "keys": 1, "prefix": 1}, {"heads": 1, "groups": 1}, {"prefix": 1}, {"depth": 1},
    {"batch": 1, "heads": 1, "groups": 1, "queries": 1, "keys": 1, "prefix": 1, "depth": 1}, {"batch": 0},
    {"queries": 0, "keys": 7},
]  # fmt: skip


@pytest.mark.parametrize("gate", [None, (1,)], ids=["prefix", "gated"])
@pytest.mark.parametrize("sizes", SMALL, ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()))
@pytest.mark.parametrize("how", EVERY)
def test_one_or_nothing_of_everything(how, sizes, gate):
    problem = random_attention_problem(gate=gate, **{"queries": 5, **sizes})
    with path(how):
        got = outcome(_op, problem, problem.present())
    truth = outcome(all_at_once, problem, problem.present(), torch.float64) if problem.query.numel() else None
    for name, t in got.items():
        if truth is None:
            assert not t.any(), name
        else:
            torch.testing.assert_close(t.double(), truth[name], atol=2e-6, rtol=2e-5, msg=name)


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_denormal_values_are_kept(how, dtype):
    """Values that are all the same denormal: so is their mean, whatever the weights, to half a unit of the smallest."""
    problem = random_attention_problem(dtype=dtype)
    smallest = torch.finfo(dtype).smallest_normal
    value = torch.tensor(smallest / 4, dtype=dtype)
    problem = dataclasses.replace(
        problem, value=value.expand_as(problem.value), prefix_value=value.expand_as(problem.prefix_value)
    )
    with path(how):
        out = outcome(_op, problem, ())["out"]
    assert 0 < value < smallest
    unit = smallest * torch.finfo(dtype).eps
    assert ((out.double() - value.double()).abs() <= max(unit, 1e-6 * float(value))).all()
