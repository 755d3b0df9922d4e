"""What `lora_mlp` promises besides numbers: autograd's rules, its errors, what it keeps for backward and allocates, and
one graph under torch.compile."""

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.errors import BackendError, FastpeftError, OpError
from fastpeft.ops import lora_mlp
from fastpeft.ops.lora_mlp import Projection
from tests.memory import Allocations, saved_for_backward
from tests.ops.lora_mlp_cases import INNER, INPUTS, OUTPUTS, RANKS, ROWS, call, draw, results

pytestmark = pytest.mark.usefixtures("poison")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", BOTH)
def test_a_graph_can_be_used_twice_and_inputs_are_left_alone(name, recompute):
    problem = draw(dropout=True, recompute=recompute)
    leaves = problem.leaves()
    before, dy = [leaf.detach().clone() for leaf in leaves.values()], problem.dy.clone()
    weights = [each.weight.clone() for each in problem.projections]
    with backend(name):
        y = call(problem, leaves)
        first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert [leaf._version for leaf in leaves.values()] == [0] * len(leaves) and dy._version == 0
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves.values(), before, strict=True))
    assert all(torch.equal(each.weight, copy) for each, copy in zip(problem.projections, weights, strict=True))


def test_a_second_derivative_is_refused():
    leaves = draw().leaves()
    (dx,) = torch.autograd.grad(call(draw(), leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_recorded_where_nothing_wants_a_gradient(name):
    problem = draw()
    frozen = problem.leaves(wanted=())
    with backend(name):
        assert not call(problem, frozen).requires_grad
        with torch.no_grad():
            assert not call(problem, problem.leaves()).requires_grad
        with torch.inference_mode():
            inferred = call(problem, frozen)
        torch.testing.assert_close(inferred, call(problem, problem.leaves()).detach(), rtol=1e-6, atol=1e-6)


X, HIDDEN, S = ROWS * INPUTS * 2, ROWS * INNER * 2, ROWS * 4  # bytes: x, gate or up, and a rank of S
GATE, UP, DOWN = RANKS
KEPT = {  # what is wanted: what is kept, of bf16 data and fp32 adapters
    "x": [HIDDEN] * 2,
    "gate.lora_A": [X, HIDDEN, HIDDEN],
    "up.lora_B gate.lora_B": [HIDDEN] * 2 + [S * (GATE + UP)],
    "down.lora_A": [HIDDEN] * 2,
    "down.lora_B": [S * DOWN],
    "down.bias": [],
    "gate.bias": [HIDDEN] * 2,
}


@pytest.mark.parametrize(("wanted", "kept"), KEPT.items(), ids=KEPT)
@pytest.mark.parametrize("name", BOTH)
def test_only_what_the_wanted_gradients_need_is_kept(name, wanted, kept):
    problem = draw("bf16-fp32")
    leaves = problem.leaves(wanted.split())
    besides = [*(leaf for key, leaf in leaves.items() if key != "x"), *(each.weight for each in problem.projections)]
    with backend(name), saved_for_backward(besides=besides) as saved:
        call(problem, leaves)
    assert sorted(saved.values()) == sorted(kept)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("name", BOTH)
def test_backward_keeps_gate_up_x_s_and_seeds(name, dropout, recompute):
    """No h, no mask; with `recompute` x and S alone."""
    problem = draw("bf16-fp32", dropout=dropout, recompute=recompute)
    leaves = problem.leaves()
    besides = [*(leaf for key, leaf in leaves.items() if key != "x"), *(each.weight for each in problem.projections)]
    with backend(name), saved_for_backward(besides=besides) as saved:
        call(problem, leaves)
    expected = [X, S * (GATE + UP), S * DOWN, *[HIDDEN, HIDDEN] * (not recompute), *[8] * 3 * dropout]
    assert sorted(saved.values()) == sorted(expected)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_the_torch_path_allocates_five_hidden_activations(dropout):
    """gate, up and h in forward, dgate and dup in backward; whatever else there is has the size of a block."""
    rows, inner = 16384, 512
    problem = draw(shape=(rows, 16), inner=inner, outputs=8, ranks=(2, 2, 2), bias=False, dropout=dropout)
    leaves = problem.leaves()
    with backend("torch"), Allocations() as allocated:
        y = call(problem, leaves)
        torch.autograd.grad(y, list(leaves.values()), problem.dy)
    hidden = rows * inner * 4
    assert allocated.sizes.count(hidden) == 5
    assert max(size for size in allocated.sizes if size != hidden) < hidden / 4


def given(**changes):
    """Arguments; a change is of x, of activation, or of a projection's field as gate__weight."""
    problem = draw()
    found = {"x": problem.x, "activation": "silu"}
    projections = dict(zip(("gate", "up", "down"), problem.projections, strict=True))
    for key, value in changes.items():
        side, _, field = key.partition("__")
        if field:
            projections[side] = projections[side]._replace(**{field: value})
        elif side in projections:
            projections[side] = value
        else:
            found[side] = value
    return found | projections


WEIGHT = torch.zeros(INNER, INPUTS)
WRONG = [
    ({"activation": "swish"}, "activation is 'swish'; one of 'silu', 'gelu', 'gelu_tanh', 'relu2' is needed"),
    ({"up": WEIGHT}, "up is of Tensor; a Projection is needed"),
    ({"gate__lora_B": None}, "gate has one of lora_A and lora_B; both or none are needed"),
    ({f"{side}__lora_{letter}": None for side in ("gate", "up", "down") for letter in "AB"}, "none of gate, up and"),
    ({"gate__weight": torch.zeros(INNER, INPUTS + 1)}, r"gate's weight has shape \(69, 42\), expected \(N, 41\)"),
    ({"up__weight": torch.zeros(INNER + 1, INPUTS)}, r"up's weight has shape \(70, 41\), expected \(69, 41\)"),
    ({"down__weight": torch.zeros(OUTPUTS, INPUTS)}, r"down's weight has shape \(35, 41\), expected \(N, 69\)"),
    ({"down__bias": torch.zeros(1)}, r"down's bias has shape \(1,\), expected \(35\)"),
    ({"up__lora_A": torch.zeros(2, INNER)}, r"up's lora_A has shape \(2, 69\), expected \(r, 41\)"),
    ({"up__lora_B": torch.zeros(INNER, 2)}, r"up's lora_B has shape \(69, 2\), expected \(69, 17\)"),
    ({"gate__lora_A": torch.zeros(0, INPUTS), "gate__lora_B": torch.zeros(INNER, 0)}, "gate's lora_A and lora_B have"),
    ({"down__scaling": float("inf")}, "down's scaling is inf; a finite number is needed"),
    ({"down__scaling": "1"}, "down's scaling is '1'; a finite number is needed"),
    ({"up__dropout": 1.0}, r"up's dropout is 1.0; a probability in \[0, 1\) is needed"),
    ({"up__weight": WEIGHT.requires_grad_()}, "up's weight wants a gradient; it is taken as frozen"),
    ({"gate__weight": WEIGHT.detach().half()}, "x is torch.float32 but gate's weight is torch.float16; cast one"),
    ({"down__lora_A": None, "down__lora_B": None, "down__weight": None}, "down's weight is of NoneType; a tensor"),
    ({"up__bias": torch.zeros(INNER).int()}, "up's bias is torch.int32; floating point is needed"),
    ({"up__bias": torch.zeros(INNER, device="meta")}, "up's bias is on meta, x on cpu; move one of them"),
    ({"x": torch.tensor(1.0)}, r"x of shape \(\) is a scalar"),
    ({"x": [1.0]}, "x is of list; a tensor is needed"),
    ({"x": torch.zeros(2, INPUTS, device="meta")}, "x is on the meta device and has no values"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_errors_name_the_argument_and_what_was_expected(changes, message):
    with pytest.raises(OpError, match=message) as caught:
        lora_mlp(**given(**changes))
    assert str(caught.value).startswith("lora_mlp: ")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FastpeftError)


def test_a_weight_that_wants_a_gradient_is_welcome_where_nothing_is_recorded():
    with torch.no_grad():
        assert lora_mlp(**given(up__weight=torch.zeros(INNER, INPUTS).requires_grad_())).shape == (ROWS, OUTPUTS)


def test_triton_demanded_in_vain():
    with backend("triton"), pytest.raises(BackendError, match="rank 300 is above 256"):
        call(draw(ranks=(3, 300, 3)), draw(ranks=(3, 300, 3)).leaves())


def test_a_projection_is_its_weight_unless_more_is_said():
    assert Projection(WEIGHT)[1:] == (None, None, None, 1.0, 0.0)


def test_float64():
    problem = draw()
    with backend("torch"):
        found = results(lambda leaves: call(problem, leaves), problem, problem.tensors, torch.float64)
    assert {each.dtype for each in found.values()} == {torch.float64}


COMPILED = {"all": None, "some": ("up.lora_B", "down.lora_A", "down.bias"), "x": ("x",)}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("wanted", COMPILED.values(), ids=COMPILED)
def test_compiled_as_one_graph(wanted, recompute):
    torch.compiler.reset()
    problem = draw(ranks=(5, 0, 3), recompute=recompute)
    wanted = list(problem.tensors) if wanted is None else wanted
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = [results(lambda leaves, op=op: op(problem, leaves), problem, wanted) for op in (call, compiled)]
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert found[1][key].dtype == expected.dtype
        torch.testing.assert_close(found[1][key], expected, rtol=1e-5, atol=1e-5)


def test_compiled_dropout_is_drawn_anew_and_the_same_in_backward():
    """y and dB of down are linear in what is kept of h: the same step of both masks gives the same sums."""
    torch.compiler.reset()
    problem = draw(dropout=True)
    leaves = problem.leaves()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    first, second = compiled(problem, leaves), compiled(problem, leaves)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    again = compiled(problem, leaves)
    assert torch.equal(first, again)
    (da,) = torch.autograd.grad(again, leaves["down.lora_A"], problem.dy)
    step, delta = 0.5, torch.randn(leaves["down.lora_A"].shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    moved = compiled(problem, leaves | {"down.lora_A": leaves["down.lora_A"] + step * delta})
    expected = ((moved - again) * problem.dy).sum() / step
    torch.testing.assert_close((da * delta).sum(), expected, rtol=1e-3, atol=1e-2)


@interpreted
def test_compiled_on_the_kernels():
    torch.compiler.reset()
    problem = draw(shape=(5, 33), inner=40, outputs=20, ranks=(3, 5, 4), dropout=True)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with backend("triton"):
        found = results(lambda leaves: compiled(problem, leaves), problem, problem.tensors)
    assert all(each.isfinite().all() for each in found.values())
    with backend("triton"):
        silent = draw(shape=(5, 33), inner=40, outputs=20, ranks=(3, 5, 4))
        found = [results(lambda leaves, op=op: op(silent, leaves), silent, silent.tensors) for op in (call, compiled)]
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-5, atol=1e-5)


def test_the_operators_are_what_torch_takes_them_for():
    problem = draw(shape=(4, 6), inner=5, outputs=3, ranks=(2, 0, 2), dropout=False)
    flat = [
        tensor for each in problem.projections for tensor in (each.weight, each.bias, each.lora_A, each.lora_B)
    ]  # fmt: skip
    has = [each is not None for each in flat]
    given = [each.clone().requires_grad_(i % 4 > 0) for i, each in enumerate(flat) if each is not None]
    numbers = (None, "silu", [0.5, 1.0, 2.0], [0.0] * 3, "float32", False, "torch")
    x = problem.x.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastpeft.lora_mlp, (x, given, has, *numbers))
