"""What `lora_linear` promises besides numbers: autograd's rules, its errors, which backend serves a call, and that the
kernels stay inside their outputs and owe nothing to the order of their programs."""

import math
import os
import subprocess
import sys

import pytest
import torch

from fastpeft import dispatch
from fastpeft.dispatch import Plan, backend, choose_backend, override_plan, set_backend
from fastpeft.errors import BackendError, FastpeftError, OpError
from fastpeft.ops import lora_linear
from fastpeft.ops.lora_linear import apply_lora
from fastpeft.oracle import GRADIENTS, lora_linear_outcomes
from tests.interpreter import GuardedTorch, backwards
from tests.ops.lora_linear_cases import INPUTS, OUTPUTS, RANK, STRATEGIES, draws, on
from tests.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("poison")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]


def leaves_of(problem, dtype=None):
    return [getattr(problem, name).detach().to(dtype, copy=True).requires_grad_() for name in GRADIENTS]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout, rank):
    problem = draws(1, shape=(2, 3, 5), outputs=4, rank=rank)[0]

    def op(*leaves):
        torch.manual_seed(1)
        return lora_linear(*leaves, 0.7, dropout=dropout, training=True)

    assert torch.autograd.gradcheck(op, leaves_of(problem, torch.float64))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", BOTH)
def test_a_graph_can_be_used_twice_and_inputs_are_left_alone(name, dropout):
    problem = draws(1)[0]
    leaves = leaves_of(problem)
    before = [leaf.detach().clone() for leaf in leaves]
    dy = problem.dy.clone()
    with on(name, "prewrite" if name == "triton" else None):
        y = lora_linear(*leaves, 0.5, dropout=dropout, training=True)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(y, leaves, dy)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    assert [leaf._version for leaf in leaves] == [0] * len(leaves) and dy._version == 0
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))
    assert torch.equal(dy, problem.dy)


@pytest.mark.parametrize("shape", [(69,), (7, 69), (2, 3, 69), (0, 3, 69)], ids=str)
@pytest.mark.parametrize("base", ["", "bias", "residual"])
@pytest.mark.parametrize("name", BOTH)
def test_what_it_returns_may_be_changed_in_place(name, base, shape):
    """Of whatever shape: a Function's views may not be."""
    problem = draws(1)[0]
    x = problem.x[: math.prod(shape[:-1])].reshape(shape).requires_grad_()
    residual = torch.randn(*shape[:-1], OUTPUTS) if base == "residual" else None
    weight, bias = problem.weight if residual is None else None, problem.bias if base == "bias" else None
    factors = problem.lora_A, problem.lora_B, 0.5, 0.0
    with on(name):
        y = apply_lora(x, weight, bias, residual, *factors)
        expected = y.detach() * 3
        dy = torch.randn(y.shape)
        (right,) = torch.autograd.grad(y, x, dy * 3, retain_graph=True)
        y *= 3
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.shape == (*shape[:-1], OUTPUTS) and torch.equal(y, expected)
    assert dx.shape == x.shape and torch.equal(dx, right)


def test_a_second_derivative_is_refused():
    leaves = leaves_of(draws(1)[0])
    (dx,) = torch.autograd.grad(lora_linear(*leaves, 0.5).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_recorded_where_nothing_wants_a_gradient(name):
    problem = draws(1)[0]
    tensors = [getattr(problem, name) for name in GRADIENTS]
    with on(name):
        assert not lora_linear(*tensors, 0.5).requires_grad
        with torch.no_grad():
            assert not lora_linear(*leaves_of(problem), 0.5).requires_grad
        with torch.inference_mode():
            assert torch.equal(lora_linear(*tensors, 0.5), lora_linear(*leaves_of(problem), 0.5))


# Errors


def call(**changes):
    problem = draws(1)[0]
    arguments = {name: getattr(problem, name) for name in GRADIENTS} | {"scaling": 0.5} | changes
    return lora_linear(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(OUTPUTS, INPUTS + 1)}, r"weight has shape \(71, 70\), expected \(N, 69\)"),
        ({"weight": torch.zeros(OUTPUTS)}, r"weight has shape \(71,\), expected \(N, 69\) for x of shape \(37, 69\)"),
        ({"bias": torch.zeros(OUTPUTS - 1)}, r"bias has shape \(70,\), expected \(71"),
        ({"bias": torch.zeros(1, OUTPUTS)}, r"bias has shape \(1, 71\), expected \(71"),
        ({"lora_A": torch.zeros(RANK, INPUTS - 1)}, r"lora_A has shape \(5, 68\), expected \(r, 69\)"),
        ({"lora_B": torch.zeros(RANK, OUTPUTS)}, r"lora_B has shape \(5, 71\), expected \(71, 5\)"),
        ({"lora_B": torch.zeros(OUTPUTS, RANK + 1)}, r"lora_B has shape \(71, 6\), expected \(71, 5\)"),
        ({"lora_A": torch.zeros(0, INPUTS), "lora_B": torch.zeros(OUTPUTS, 0)}, "have rank 0; a rank of at least 1 is"),
        ({"x": torch.tensor(1.0)}, r"x of shape \(\)"),
        ({"weight": torch.tensor(1.0)}, r"weight has shape \(\), expected \(N, 69\)"),
        ({"lora_A": torch.tensor(1.0)}, r"lora_A has shape \(\), expected \(r, 69\)"),
        ({"lora_A": torch.zeros(RANK, INPUTS, device="meta")}, "lora_A is on meta, x on cpu"),
        ({"bias": torch.zeros(OUTPUTS, device="meta")}, "bias is on meta, x on cpu"),
        ({"x": torch.zeros(3, INPUTS, dtype=torch.int64)}, "x is torch.int64; floating point is needed"),
        ({"lora_B": torch.zeros(OUTPUTS, RANK, dtype=torch.int8)}, "lora_B is torch.int8; floating point is needed"),
        ({"x": torch.zeros(3, INPUTS).half()}, "x is torch.float16 but weight is torch.float32"),
        ({"x": torch.zeros(3, INPUTS).cfloat()}, "x is torch.complex64; floating point is needed"),
        *(
            ({name: torch.zeros(RANK, INPUTS).to(torch.float8_e4m3fn)}, f"{name} is torch.float8_e4m3fn; float32, .*64")
            for name in ("x", "weight", "bias", "lora_A", "lora_B")
        ),
        ({"x": [[1.0] * INPUTS]}, "x is of list; a tensor is needed"),
        ({"weight": None}, "weight is of NoneType; a tensor is needed"),
        ({"lora_A": None}, "lora_A is of NoneType; a tensor is needed"),
        ({"lora_B": 3}, "lora_B is of int; a tensor is needed"),
        ({"bias": 0.5}, "bias is of float; a tensor is needed"),
        *(({"scaling": bad}, "scaling is .*; a finite number") for bad in ("1", None, [1.0], torch.ones(2), 1j)),
        *(({"dropout": bad}, "dropout is .*; a probability") for bad in (None, "0.1", torch.ones(2))),
        ({"scaling": float("nan")}, "scaling is nan; a finite number is needed"),
        ({"scaling": float("inf")}, "scaling is inf; a finite number is needed"),
        ({"dropout": 1.0}, r"dropout is 1.0; a probability in \[0, 1\) is needed"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_errors_name_the_argument_and_what_was_expected(changes, message):
    with pytest.raises(OpError, match=message) as caught:
        call(**changes)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FastpeftError)


def test_tensors_without_values_are_refused():
    with pytest.raises(OpError, match="x is on the meta device and has no values"):
        call(**{name: getattr(draws(1)[0], name).to("meta") for name in GRADIENTS})


def test_the_checks_do_not_break_a_graph():
    """Nor where the scaling changes, so that it is no constant any more."""
    torch._dynamo.reset()
    operands = leaves_of(draws(1)[0])
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    for scaling in (1.0, 0.5, 2):
        assert torch.equal(compiled(*operands, scaling), lora_linear(*operands, scaling))


# Backends


@pytest.fixture
def no_default(monkeypatch):
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.delenv("FASTPEFT_BACKEND", raising=False)
    dispatch.backend_of_environment.cache_clear()


@interpreted
@pytest.mark.usefixtures("no_default")
def test_precedence_of_the_requests(environment_backend):
    x = torch.zeros(3, 4)

    def chosen(patched=None):
        return choose_backend(x, x.dtype, 2, patched).backend

    assert chosen() == "torch"  # auto, on the CPU
    environment_backend("triton")
    assert chosen() == "triton"
    set_backend("torch")
    assert chosen() == "torch"
    assert chosen(patched="triton") == "triton"
    with backend("torch"):
        assert chosen(patched="triton") == "torch"
        with backend("triton"):
            assert chosen(patched="torch") == "triton"
        assert chosen(patched="triton") == "torch"


@pytest.mark.usefixtures("no_default")
def test_the_environment_is_read_once(environment_backend, monkeypatch):
    """By the first call that asks; a name that is unknown is refused by every call."""
    environment_backend("torch")
    assert dispatch.requested_backend() == "torch"
    monkeypatch.setenv("FASTPEFT_BACKEND", "auto")
    assert dispatch.requested_backend() == "torch"
    environment_backend("gpu")
    for _ in range(2):
        with pytest.raises(BackendError, match="FASTPEFT_BACKEND: unknown backend 'gpu'"):
            dispatch.requested_backend()


@pytest.mark.usefixtures("no_default")
def test_unknown_backends_are_refused_where_they_are_named(environment_backend):
    with pytest.raises(BackendError, match="set_backend: unknown backend 'cuda'; choose one of 'auto', 'triton'"):
        set_backend("cuda")
    with pytest.raises(BackendError, match="backend: unknown backend 'Triton'"), backend("Triton"):
        pass
    environment_backend("gpu")
    with pytest.raises(BackendError, match="FASTPEFT_BACKEND: unknown backend 'gpu'"):
        call()


@interpreted
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({name: getattr(draws(1)[0], name).double() for name in GRADIENTS}, "torch.float64 is not served"),
    ],
)
def test_triton_demanded_in_vain_says_why(changes, reason):
    with backend("triton"), pytest.raises(BackendError, match=f"cannot serve this call: {reason}"):
        call(**changes)
    with backend("auto"):
        assert call(**changes).shape == (37, OUTPUTS)


def test_triton_demanded_without_an_interpreter_says_what_is_missing():
    program = (
        "import torch, fastpeft.dispatch as d, fastpeft.ops as o\n"
        "t = torch.zeros\n"
        "try:\n"
        "    with d.backend('triton'):\n"
        "        o.lora_linear(t(3, 4), t(5, 4), None, t(2, 4), t(5, 2), 1.0)\n"
        "except d.BackendError as error:\n"
        "    print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "CPU tensors need TRITON_INTERPRET=1 in the environment before triton is imported" in done.stdout


@interpreted
@pytest.mark.parametrize("forward", ["torch", "triton"])
def test_backward_uses_the_backend_and_the_plan_of_its_forward(forward):
    leaves = leaves_of(draws(1)[0])
    with count_traffic() as traffic:
        with backend(forward), override_plan(Plan("fused", "fused", "test")):
            y = lora_linear(*leaves, 0.5)
        launched = traffic.kernels()
        other = {"torch": "triton", "triton": "torch"}[forward]
        with backend(other), override_plan(Plan("prewrite", "prewrite", "test")):
            y.sum().backward()
    if forward == "torch":
        assert traffic.kernels() == []
    else:
        assert launched == ["_shrink_kernel", "_tail_kernel"]
        assert traffic.kernels()[-1] == "_tail_kernel"  # the fused dX, where prewrite would end with _sum_partials


# Kernels: inside their outputs, in any order


@interpreted
@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_stay_inside_and_do_not_depend_on_program_order(strategy, dropout, monkeypatch):
    from fastpeft.kernels import _partials
    from fastpeft.kernels import lora_linear as kernels

    problem = draws(1, dtypes="fp16-fp32", dropout=dropout, outputs=40)[0]
    wanted = ("x", "bias", "lora_A", "lora_B")
    with on("triton", strategy):
        expected = lora_linear_outcomes(problem, wanted)[0]
        with backwards():
            reordered = lora_linear_outcomes(problem, wanted)[0]
        guarded = GuardedTorch()
        for module in (kernels, _partials):
            monkeypatch.setattr(module, "torch", guarded)
        with count_traffic() as traffic:  # raises where an active lane leaves its tensor
            inside = lora_linear_outcomes(problem, wanted)[0]
    for key in expected:
        assert torch.equal(expected[key], reordered[key]), key
        assert torch.equal(expected[key], inside[key]), key
    assert len(guarded.allocations) >= 6 and guarded.trespassed() == 0
    assert traffic.atomics == 0
