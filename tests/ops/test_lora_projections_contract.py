"""What `lora_projections` promises besides numbers: autograd's rules, its errors, which backend serves a call, one
graph under torch.compile, and kernels that stay inside their outputs in any order."""

import dataclasses

import pytest
import torch

from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.errors import BackendError, FastpeftError, OpError
from fastpeft.ops import lora_projections
from tests.interpreter import GuardedTorch, backwards
from tests.ops.lora_projections_cases import OUTPUTS, SHAPE, call, draw, results
from tests.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("poison")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]
SMALL = {"shape": (9, 33), "outputs": (20, 17), "ranks": (3, 5)}


def grown(problem, name="torch", seed=1):
    """Results with every gradient."""
    torch.manual_seed(seed)
    with backend(name):
        return results(lambda leaves: call(problem, leaves), problem, list(problem.leaves()))


@pytest.mark.parametrize("name", BOTH)
def test_a_graph_can_be_used_twice_and_inputs_are_left_alone(name):
    problem = draw(dropout=True, **SMALL)
    leaves = problem.leaves()
    before, dys = [leaf.detach().clone() for leaf in leaves.values()], [dy.clone() for dy in problem.dy]
    with backend(name):
        ys = call(problem, leaves)
        first = torch.autograd.grad(ys, list(leaves.values()), problem.dy, retain_graph=True)
        second = torch.autograd.grad(ys, list(leaves.values()), problem.dy)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert [leaf._version for leaf in leaves.values()] == [0] * len(leaves)
    assert all(torch.equal(*pair) for pair in zip(leaves.values(), before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(problem.dy, dys, strict=True))


@pytest.mark.parametrize("shape", [(9, 33), (3, 3, 33)], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_results_and_gradients_may_be_changed_in_place(name, shape):
    """Nobody's storage is another's: those of x, of the results and of the gradients."""
    problem = draw(**SMALL | {"shape": shape})
    leaves = problem.leaves()
    with backend(name):
        ys = call(problem, leaves)
        gradients = torch.autograd.grad(ys, list(leaves.values()), problem.dy, retain_graph=True)
    storages = [t.untyped_storage().data_ptr() for t in (*leaves.values(), *ys)]
    assert len(set(storages)) == len(storages)
    with torch.no_grad():
        expected = [gradient.clone() for gradient in gradients]
        for i, gradient in enumerate(gradients):
            gradient.fill_(7)
            for other, each in zip(gradients[i + 1 :], expected[i + 1 :], strict=True):
                assert torch.equal(other, each)
    ys[0].mul_(2).sum().backward()


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_recorded_where_nothing_wants_a_gradient(name):
    problem = draw(**SMALL)
    frozen = {key: leaf.detach() for key, leaf in problem.leaves().items()}
    with backend(name):
        assert not any(y.requires_grad for y in call(problem, frozen))
        with torch.no_grad():
            assert not any(y.requires_grad for y in call(problem, problem.leaves()))
        with torch.inference_mode():
            inferred = call(problem, frozen)
        assert all(map(torch.equal, inferred, call(problem, problem.leaves())))


X, WEIGHTS, A, B = (getattr(draw(), name) for name in ("x", "weight", "A", "B"))


def arguments(**changes):
    problem = draw()
    given = {"x": problem.x, "weights": problem.weight, "biases": problem.bias, "lora_As": problem.A}
    return given | {"lora_Bs": problem.B, "scalings": problem.scalings} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"biases": [None]}, "lora_projections: 1 biases for 3 weights; one for each is needed"),
        ({"lora_As": A[:2]}, "2 lora_As for 3 weights"),
        ({"lora_Bs": [*B, B[0]]}, "4 lora_Bs for 3 weights"),
        ({"scalings": ()}, "0 scalings for 3 weights"),
        ({"dropouts": [0.1]}, "1 dropouts for 3 weights"),
        ({name: [] for name in ("weights", "biases", "lora_As", "lora_Bs", "scalings")}, "no weights; at least one"),
        ({"x": X[..., 1:]}, r"projection 0: lora_linear: weight has shape \(71, 69\), expected \(N, 68\)"),
        (
            {"lora_Bs": [B[0], B[1], B[2].t()]},
            r"projection 2: lora_linear: lora_B has shape \(3, 33\), expected \(33, 3\)",
        ),
        ({"weights": [WEIGHTS[0], None, WEIGHTS[2]]}, "weight is of NoneType; a tensor is needed"),
        (
            {"scalings": [1.0, float("inf"), 1.0]},
            "lora_projections: projection 1: lora_linear: scaling is inf; a finite number",
        ),
        ({"dropouts": [0.1, 0.1, 1.0]}, r"dropout is 1.0; a probability in \[0, 1\)"),
        ({"x": X.half()}, "lora_projections: x is torch.float16 but a weight is torch.float32; cast one"),
    ],
    ids=str,
)
def test_errors_name_the_argument_and_what_was_expected(changes, message):
    with pytest.raises(OpError, match=message) as caught:
        lora_projections(**arguments(**changes))
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FastpeftError)


@interpreted
def test_triton_demanded_in_vain_says_why():
    problem = draw()
    leaves = problem.leaves(torch.float64)
    with backend("triton"), pytest.raises(BackendError, match="cannot serve this call: .*float64"):
        call(problem, leaves)
    with backend("auto"):
        assert [y.shape for y in call(problem, leaves)] == [(*SHAPE[:-1], n) for n in OUTPUTS]


@interpreted
@pytest.mark.parametrize("forward", ["torch", "triton"])
def test_backward_uses_the_backend_of_its_forward(forward):
    problem = draw(**SMALL)
    with count_traffic() as traffic:
        with backend(forward):
            ys = call(problem, problem.leaves())
        launched = len(traffic.kernels())
        with backend({"torch": "triton", "triton": "torch"}[forward]):
            torch.autograd.backward(ys, problem.dy)
    assert (launched > 0, len(traffic.kernels()) - launched > 4) == ((forward == "triton"),) * 2


@interpreted
@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize("ranks", [(3, 5), (3, 20, 2)], ids=["held", "apart"])
def test_kernels_stay_inside_and_do_not_depend_on_program_order(ranks, monkeypatch):
    from fastpeft.kernels import _partials
    from fastpeft.kernels import lora_projections as kernels

    problem = draw("fp16-fp32", shape=(37, 69), outputs=(17,), ranks=ranks, dropout=True)
    with override_plan(Plan("prewrite", "prewrite", "a test")):
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
    assert len(guarded.allocations) >= 3 and guarded.trespassed() == 0
    assert traffic.atomics == 0


ADAPTERS = ("A0", "A1", "A2", "B0", "B1", "B2")
WANTED = [(("x", *ADAPTERS), (1,)), (("x", "bias0", "bias2", "weight1"), ()), (("B1",), ())]


@pytest.mark.parametrize(("wanted", "unused"), WANTED, ids=["x-A-B", "x-bias-weight", "B1"])
def test_compiled_as_one_graph(wanted, unused):
    problem = draw("bf16-fp32", unused=unused)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = [results(lambda leaves, op=op: op(problem, leaves), problem, wanted) for op in (call, compiled)]
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key]), key


def test_compiled_under_autocast():
    problem = draw("fp32", **SMALL)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    wanted = list(problem.leaves())
    with torch.autocast("cpu", torch.bfloat16):
        found = [results(lambda leaves, op=op: op(problem, leaves), problem, wanted) for op in (call, compiled)]
    for key in found[0]:
        assert found[0][key].dtype == found[1][key].dtype and torch.equal(found[0][key], found[1][key]), key


def test_compiled_dropout_is_drawn_anew_and_the_same_in_backward():
    problem = draw(shape=(40, 32), outputs=(32,), ranks=(32, 32), dropout=True)
    eye = (torch.eye(32),) * 2
    problem = dataclasses.replace(
        problem, weight=(torch.zeros(32, 32),) * 2, bias=(None,) * 2, A=eye, B=eye, scalings=(1.0, 1.0)
    )
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = problem.leaves()
    first, second = compiled(problem, leaves)
    (dx,) = torch.autograd.grad(first.sum(), leaves["x"])
    kept = first != 0
    assert torch.equal(kept, dx != 0) and 0.55 < kept.double().mean() < 0.85
    assert (second != 0).all()  # it drops nothing
    assert not torch.equal(compiled(problem, leaves)[0] != 0, kept)


@interpreted
def test_the_operators_on_triton_are_those_of_the_op():
    problem = draw("fp16-fp32", **SMALL)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    wanted = ["x", "A0", "B0", "A1", "B1"]
    with backend("triton"), count_traffic() as traffic:
        found = [results(lambda leaves, op=op: op(problem, leaves), problem, wanted) for op in (call, compiled)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    names = traffic.kernels()
    assert names[: len(names) // 2] == names[len(names) // 2 :] != []
