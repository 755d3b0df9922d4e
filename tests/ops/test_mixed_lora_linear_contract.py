"""What `mixed_lora_linear` promises besides numbers: autograd's rules, its errors, what it keeps for backward, which
backend serves a call, one graph under torch.compile, and kernels that stay inside their outputs in any order."""

import dataclasses

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.errors import BackendError, FastpeftError, OpError
from fastpeft.ops import mixed_lora_linear
from tests.interpreter import GuardedTorch, backwards
from tests.memory import saved_for_backward
from tests.ops.mixed_lora_linear_cases import INPUTS, OUTPUTS, RANKS, ROWS, TOKENS, call, draw, results
from tests.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("poison")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]


def grown(problem, name="torch", seed=1):
    """Results with every gradient that an adapter in use has."""
    torch.manual_seed(seed)
    with backend(name):
        return results(lambda leaves: call(problem, leaves), problem, list(problem.leaves()))


@pytest.mark.parametrize("base", [True, False], ids=["base", "residual"])
@pytest.mark.parametrize("name", BOTH)
def test_a_graph_can_be_used_twice_and_inputs_are_left_alone(name, base):
    problem = draw(dropout=True, base=base)
    leaves = problem.leaves()
    before, dy = [leaf.detach().clone() for leaf in leaves.values()], problem.dy.clone()
    with backend(name):
        y = call(problem, leaves)
        first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert [leaf._version for leaf in leaves.values()] == [0] * len(leaves) and dy._version == 0
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves.values(), before, strict=True))


def test_a_second_derivative_is_refused():
    leaves = draw().leaves()
    (dx,) = torch.autograd.grad(call(draw(), leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_recorded_where_nothing_wants_a_gradient(name):
    problem = draw()
    frozen = {name: leaf.detach() for name, leaf in problem.leaves().items()}
    with backend(name):
        assert not call(problem, frozen).requires_grad
        with torch.no_grad():
            assert not call(problem, problem.leaves()).requires_grad
        with torch.inference_mode():
            inferred = call(problem, frozen)
        assert torch.equal(inferred, call(problem, problem.leaves()))  # after tables that were made for inference


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_backward_keeps_x_s_and_seeds(name, dropout):
    """Of S only the rows of adapters: no mask, no copy of x, no copy of the adapters' matrices."""
    problem = draw("bf16-fp32", dropout=dropout)
    problem = dataclasses.replace(problem, bias=None)
    leaves = problem.leaves()
    leaves["weight"].requires_grad_(False)
    besides = [leaf for name, leaf in leaves.items() if name != "x"]
    with backend(name), saved_for_backward(besides=besides) as saved:
        call(problem, leaves)
    s = 4 * TOKENS * sum(r * ROWS.count(g) for g, r in enumerate(RANKS))
    seeds = [8 * (1 if name == "triton" else len(RANKS))] * dropout
    assert sorted(saved.values()) == sorted([leaves["x"].nbytes, s, *seeds])


def arguments(**changes):
    problem = draw()
    given = {name: getattr(problem, name) for name in ("x", "weight", "bias", "scalings", "rows")}
    given |= {"lora_A": list(problem.lora_A), "lora_B": list(problem.lora_B)}
    return given | changes


A, B = draw().lora_A, draw().lora_B


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(OUTPUTS, INPUTS + 1)}, r"mixed_lora_linear: weight has shape \(71, 70\), expected"),
        ({"lora_A": [A[0], A[1][:, 1:]]}, r"lora_A has shape \(17, 68\), expected \(r, 69\)"),
        ({"lora_B": [B[0], B[1][1:]]}, r"lora_B has shape \(70, 17\), expected \(71, 17\)"),
        ({"lora_B": [B[1], B[0]]}, r"lora_B has shape \(71, 17\), expected \(71, 5\)"),
        ({"lora_A": [A[0], A[1].int()]}, "lora_A is torch.int32; floating point is needed"),
        ({"lora_A": [A[0], A[1].to("meta")]}, "lora_A is on meta, x on cpu"),
        ({"lora_A": [A[0], None]}, "lora_A is of NoneType; a tensor is needed"),
        ({"lora_A": A[0]}, "lora_A is of Tensor; a list is needed"),
        ({"lora_B": [B[0]]}, "lora_B has 1 entries, lora_A has 2"),
        ({"scalings": (0.5,)}, "scalings has 1 entries, lora_A has 2"),
        ({"dropouts": (0.5, 0.1, 0.2)}, "dropouts has 3 entries, lora_A has 2"),
        ({"scalings": (0.5, float("nan"))}, "scaling is nan; a finite number is needed"),
        ({"dropouts": (0.5, 1.0)}, r"dropout is 1.0; a probability in \[0, 1\)"),
        ({"rows": ROWS[1:]}, r"rows has 5 entries, x has shape \(6, 13, 69\); one for each x\[b\]"),
        ({"rows": "012345"}, "rows is of str; a list is needed"),
        ({"rows": [0, 1, 2, 0, 0, 0]}, "rows has 2; -1, or the place of one of 2 adapters"),
        ({"rows": [0, 1, -2, 0, 0, 0]}, "rows has -2; -1, or the place"),
        ({"rows": [0, 1, 0.0, 0, 0, 0]}, "rows has 0.0; -1, or the place"),
        ({"rows": [0, True, 0, 0, 0, 0]}, "rows has True; -1, or the place"),
        ({"x": torch.zeros(INPUTS), "rows": [0]}, r"rows has 1 entries, x has shape \(69,\)"),
        ({"x": torch.zeros(6, 2, INPUTS).half()}, "mixed_lora_linear: x is torch.float16 but weight is torch.float32"),
        ({"lora_A": [], "lora_B": [], "scalings": [], "weight": None}, "x and weight are no tensors"),
    ],
)
def test_errors_name_the_argument_and_what_was_expected(changes, message):
    with pytest.raises(OpError, match=message) as caught:
        mixed_lora_linear(**arguments(**changes))
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FastpeftError)


def test_no_adapters_at_all_is_the_base():
    given = arguments(lora_A=[], lora_B=[], scalings=[], rows=[-1] * len(ROWS))
    expected = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])
    assert torch.equal(mixed_lora_linear(**given), expected)


@interpreted
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (draw(ranks=(3, 257)), "rank 257 is above 256"),
        (dataclasses.replace(draw(), **{n: getattr(draw(), n).double() for n in ("x", "weight", "bias")}), "float64"),
    ],
    ids=["rank", "float64"],
)
def test_triton_demanded_in_vain_says_why(problem, reason):
    with backend("triton"), pytest.raises(BackendError, match=f"cannot serve this call: .*{reason}"):
        call(problem, problem.leaves())
    with backend("auto"):
        assert call(problem, problem.leaves()).shape == (len(ROWS), TOKENS, OUTPUTS)


@interpreted
@pytest.mark.parametrize("forward", ["torch", "triton"])
def test_backward_uses_the_backend_of_its_forward(forward):
    problem = draw()
    with count_traffic() as traffic:
        with backend(forward):
            y = call(problem, problem.leaves())
        launched = len(traffic.kernels())
        with backend({"torch": "triton", "triton": "torch"}[forward]):
            y.sum().backward()
    assert (launched, len(traffic.kernels()) - launched > 4) == ((0, False) if forward == "torch" else (2, True))


@interpreted
@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize("base", [True, False], ids=["base", "residual"])
def test_kernels_stay_inside_and_do_not_depend_on_program_order(base, monkeypatch):
    from fastpeft.kernels import _partials
    from fastpeft.kernels import mixed_lora_linear as kernels

    problem = draw("fp16-fp32", shape=(11, 69), outputs=40, dropout=True, base=base)
    expected = grown(problem, "triton")
    with backwards():
        reordered = grown(problem, "triton")
    guarded = GuardedTorch()
    for module in (kernels, _partials):
        monkeypatch.setattr(module, "torch", guarded)
    with count_traffic() as traffic:  # raises where an active lane leaves its tensor
        inside = grown(problem, "triton")
    for key in expected:
        assert torch.equal(expected[key], reordered[key]), key
        assert torch.equal(expected[key], inside[key]), key
    assert len(guarded.allocations) >= 6 and guarded.trespassed() == 0
    assert traffic.atomics == 0


@pytest.mark.parametrize("wanted", [("x", "A0", "A1", "B0", "B1"), ("x", "bias", "weight"), ("B1",)], ids="-".join)
@pytest.mark.parametrize("base", [True, False], ids=["base", "residual"])
def test_compiled_as_one_graph(base, wanted):
    problem = draw("bf16-fp32", base=base)
    wanted = [name for name in wanted if name in problem.leaves()]
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = [results(lambda leaves, op=op: op(problem, leaves), problem, wanted) for op in (call, compiled)]
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key]), key


def test_compiled_dropout_is_drawn_anew_and_the_same_in_backward():
    problem = draw(shape=(40, 32), outputs=32, ranks=(32, 32), rows=(0, 1), dropout=True)
    eye = torch.eye(32)
    problem = dataclasses.replace(
        problem, weight=torch.zeros(32, 32), bias=None, lora_A=(eye, eye), lora_B=(eye, eye), scalings=(1.0, 1.0)
    )
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = problem.leaves()
    y = compiled(problem, leaves)
    (dx,) = torch.autograd.grad(y.sum(), leaves["x"])
    kept = y != 0
    assert torch.equal(kept, dx != 0) and 0.5 < kept[0].double().mean() < 0.85
    assert not torch.equal(compiled(problem, leaves) != 0, kept)


@interpreted
def test_the_operators_on_triton_are_those_of_the_op():
    problem = draw("fp16-fp32", shape=(3, 33), outputs=40)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    wanted = ["x", "A0", "B0", "A1", "B1"]
    with backend("triton"), count_traffic() as traffic:
        found = [results(lambda leaves, op=op: op(problem, leaves), problem, wanted) for op in (call, compiled)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    names = traffic.kernels()
    assert names[: len(names) // 2] == names[len(names) // 2 :] != []
