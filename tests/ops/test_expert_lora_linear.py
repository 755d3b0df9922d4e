"""`expert_lora_linear` against float64: outputs and gradients of every subset, dtypes, odd shapes and strides, experts
without rows, what it saves and makes, and what it refuses."""

import itertools

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.errors import BackendError, OpError
from fastpeft.ops import _expert_lora_linear_torch as torch_path
from fastpeft.ops.expert_lora_linear import (
    apply_expert_lora,
    by_expert,
    expert_lora_linear,
    expert_lora_linear_reference,
)
from tests.memory import Allocations, saved_for_backward
from tests.traffic import SUMS, count_traffic

pytestmark = pytest.mark.usefixtures("poison")

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
# (rows of each expert, K, N, r)
SHAPES = {
    "some": ((3, 5, 2), 8, 6, 2),
    "experts without rows": ((0, 4, 0, 0, 3, 0), 5, 7, 3),
    "one expert": ((9,), 4, 4, 1),
    "one row": ((0, 1), 3, 2, 2),
    "a rank beyond both widths": ((2, 3), 3, 2, 5),
    "no rows": ((0, 0, 0), 4, 3, 2),
    "wide": ((70, 1, 33, 0), 96, 64, 8),
}
# dtype of x -> of the adapter -> relative error of the greatest value that is allowed
DTYPES = {
    (torch.float64, torch.float64): 1e-13,
    (torch.float32, torch.float32): 1e-5,
    (torch.float32, torch.float64): 1e-5,
    (torch.bfloat16, torch.float32): 1.2e-2,
    (torch.bfloat16, torch.bfloat16): 2e-2,
    (torch.float16, torch.float32): 1.5e-3,
}


def tensors_for(shape: str, dtype=torch.float32, adapter_dtype=None, *, bias=True, transposed=False, seed=0) -> dict:
    """The arguments of a call, the scaling aside."""
    rows, inputs, outputs, rank = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, kind=dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(kind)

    count, kind = len(rows), adapter_dtype or dtype
    weight = draw(count, inputs, outputs).transpose(1, 2) if transposed else draw(count, outputs, inputs)
    return {
        "x": draw(sum(rows), inputs),
        "weight": weight,
        "bias": draw(count, outputs) if bias else None,
        "lora_A": draw(count * rank, inputs, kind=kind),
        "lora_B": draw(outputs, rank * count, kind=kind),
        "ends": torch.tensor(rows).cumsum(0),
    }


def call(tensors: dict, scaling: float = 0.7, function=expert_lora_linear) -> torch.Tensor:
    return function(*(tensors[name] for name in NAMES), scaling, tensors["ends"])


def gradients(tensors: dict, wanted, function=expert_lora_linear) -> tuple[torch.Tensor, dict]:
    held = {
        name: each.detach().clone().requires_grad_(name in wanted) if each is not None and name != "ends" else each
        for name, each in tensors.items()
    }
    y = call(held, function=function)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    y.backward(dy)
    return y.detach(), {name: each.grad for name, each in held.items() if each is not None and name != "ends"}


def exact(tensors: dict) -> dict:
    return {name: each if each is None or name == "ends" else each.double() for name, each in tensors.items()}


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    error = (found.double() - expected).abs().max() if expected.numel() else torch.zeros(())
    assert error <= rtol * (expected.abs().max() if expected.numel() else 1) and found.shape == expected.shape


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda each: f"{each[0]}-{each[1]}".replace("torch.", ""))
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_float64(shape, transposed, dtypes):
    tensors = tensors_for(shape, *dtypes, bias=not transposed, transposed=transposed)
    wanted = [name for name in NAMES if tensors[name] is not None]
    y, found = gradients(tensors, wanted)
    truth, expected = gradients(exact(tensors), wanted, expert_lora_linear_reference)
    assert y.dtype == dtypes[0]
    close(y, truth, DTYPES[dtypes])
    for name in wanted:
        assert found[name].dtype == tensors[name].dtype
        close(found[name], expected[name], DTYPES[dtypes])


@pytest.mark.interpreter
@pytest.mark.usefixtures("symmetric_products", "overflow_checks")
@pytest.mark.parametrize("dtypes", list(DTYPES)[1:2] + list(DTYPES)[5:], ids=["float32", "float16-float32"])
@pytest.mark.parametrize("shape", ["some", "experts without rows", "one row", "a rank beyond both widths", "wide"])
def test_the_kernels_are_right_too(shape, dtypes):
    tensors = tensors_for(shape, *dtypes)
    with backend("triton"):
        y, found = gradients(tensors, NAMES)
    truth, expected = gradients(exact(tensors), NAMES, expert_lora_linear_reference)
    close(y, truth, DTYPES[dtypes])
    for name in NAMES:
        close(found[name], expected[name], DTYPES[dtypes])


@pytest.mark.interpreter
@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",)], ids="-".join)
def test_every_gradient_of_the_kernels_alone(wanted):
    tensors = tensors_for("experts without rows")
    with backend("triton"):
        _, found = gradients(tensors, wanted)
    _, expected = gradients(exact(tensors), NAMES, expert_lora_linear_reference)
    close(found[wanted[0]], expected[wanted[0]], 1e-5)
    assert [name for name in NAMES if found[name] is not None] == list(wanted)


def test_the_kernels_are_used_where_they_are_demanded_alone():
    tensors = tensors_for("some", torch.float64)
    call(tensors)
    with backend("triton"), pytest.raises(BackendError, match="demanded but cannot serve this call"):
        call(tensors)


@pytest.mark.parametrize("wanted", [w for n in range(1, 6) for w in itertools.combinations(NAMES, n)], ids="-".join)
def test_every_subset_of_gradients(wanted):
    tensors = tensors_for("experts without rows", torch.float64)
    _, found = gradients(tensors, wanted)
    _, expected = gradients(tensors, NAMES, expert_lora_linear_reference)
    for name in NAMES:
        if name in wanted:
            close(found[name], expected[name], 1e-13)
        else:
            assert found[name] is None


def test_strided_rows_and_dy():
    tensors = tensors_for("some", torch.float64)
    truth, expected = gradients(tensors, ("x",))
    x = torch.empty(8, 10, dtype=torch.float64).t()[:, :8].copy_(tensors["x"]).requires_grad_()
    y = call({**tensors, "x": x})
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (dx,) = torch.autograd.grad(y, x, torch.stack([dy, dy], -1)[..., 0])
    assert x.stride() != tensors["x"].stride()
    close(y, truth, 1e-13)
    close(dx, expected["x"], 1e-13)


def test_several_adapters_and_none():
    tensors, other = tensors_for("some", torch.float64), tensors_for("some", torch.float64, seed=1)
    base = (tensors["x"], tensors["weight"], tensors["bias"])
    pairs = [(each["lora_A"], each["lora_B"], scaling) for each, scaling in ((tensors, 0.7), (other, -0.3))]
    plain = apply_expert_lora(*base, [], tensors["ends"])
    both = apply_expert_lora(*base, pairs, tensors["ends"])
    first, second = (apply_expert_lora(*base, [pair], tensors["ends"]) for pair in pairs)
    close(both, first + second - plain, 1e-13)
    close(first, call(tensors, function=expert_lora_linear_reference), 1e-13)


def test_the_grouped_product_is_that_of_the_experts(monkeypatch):
    """torch's grouped product, which bfloat16 gets on GPUs, has a form for the CPU."""
    tensors = tensors_for("wide", torch.bfloat16, torch.float32)
    by_expert = gradients(tensors, NAMES)
    assert not torch_path.can_group(tensors["x"], tensors["weight"])
    monkeypatch.setattr(torch_path, "can_group", lambda x, weight: True)
    grouped = gradients(tensors, NAMES)
    close(grouped[0], by_expert[0].double(), 1e-2)
    for name in NAMES:
        close(grouped[1][name], by_expert[1][name].double(), 1e-2)


def test_nothing_of_the_weight_s_size_is_made_or_saved():
    tensors = tensors_for("experts without rows")
    for name in ("x", "lora_A", "lora_B"):
        tensors[name].requires_grad_()
    weight = torch.randn(6, 7, 500)[:, :, :5]
    tensors["weight"] = weight.copy_(tensors["weight"])
    size = 6 * 7 * 5 * 4
    with Allocations() as made, saved_for_backward(besides=[each for each in tensors.values()]) as saved:
        call(tensors).sum().backward()
    assert made.sizes and max(made.sizes) < size
    b_by_expert, s = 6 * 7 * 3 * 4, 7 * 3 * 4
    assert sorted(saved.values()) == [s, b_by_expert]


def test_autocast_changes_nothing():
    tensors = tensors_for("some")
    with torch.autocast("cpu", torch.bfloat16):
        y = call(tensors)
    assert y.dtype == torch.float32 and torch.equal(y, call(tensors))


def test_a_checkpoint_computes_the_same():
    tensors = tensors_for("some")
    _, expected = gradients(tensors, NAMES)

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(expert_lora_linear, *args, use_reentrant=False)

    _, found = gradients(tensors, NAMES, checkpointed)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_a_second_derivative_is_refused():
    tensors = tensors_for("some")
    tensors["x"].requires_grad_()
    tensors["lora_A"].requires_grad_()
    (dx,) = torch.autograd.grad(call(tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_A", "lora_B"), NAMES], ids="-".join)
def test_compiled_as_one_graph(wanted):
    tensors = tensors_for("experts without rows", torch.float32, torch.float64)
    compiled = torch.compile(expert_lora_linear_unchecked, backend="aot_eager", fullgraph=True)
    y, found = gradients(tensors, wanted, compiled)
    expected_y, expected = gradients(tensors, wanted)
    close(y, expected_y.double(), 1e-6)
    for name in NAMES:
        assert (found[name] is None) == (name not in wanted)
        if name in wanted:
            close(found[name], expected[name].double(), 1e-6)


def expert_lora_linear_unchecked(x, weight, bias, lora_A, lora_B, scaling, ends):
    return apply_expert_lora(x, weight, bias, [(lora_A, lora_B, scaling)], ends)


def test_the_operators_keep_torch_s_rules():
    tensors = tensors_for("some")
    a, b = by_expert(tensors["lora_A"], tensors["lora_B"], 3)
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    args = (tensors["x"].requires_grad_(), tensors["weight"], tensors["bias"], tensors["ends"], [a], [b], [0.7], "")
    torch.library.opcheck(torch.ops.fastpeft.expert_lora_linear, args)


WRONG = {
    "x a list": ({"x": [1.0]}, "x is of list; a tensor is needed"),
    "x of three dimensions": ({"x": torch.zeros(1, 10, 8)}, "x has shape \\(1, 10, 8\\); 2 dimensions are needed"),
    "x too narrow": ({"x": torch.zeros(10, 7)}, "x has shape \\(10, 7\\), and \\(10, 8\\) goes with weight"),
    "weight of two dimensions": ({"weight": torch.zeros(6, 8)}, "weight has shape \\(6, 8\\); 3 dimensions"),
    "weight of integers": ({"weight": torch.zeros(3, 6, 8, dtype=torch.int8)}, "weight is torch.int8; a floating"),
    "weight of another dtype": (
        {"weight": torch.zeros(3, 6, 8).half()},
        "x is torch.float32 but weight is torch.flo",
    ),
    "weight elsewhere": ({"weight": torch.zeros(3, 6, 8, device="meta")}, "weight is on meta, x on cpu; move one"),
    "one bias for all": ({"bias": torch.zeros(1, 6)}, "bias has shape \\(1, 6\\), and \\(3, 6\\) goes with weight"),
    "A of two experts": ({"lora_A": torch.zeros(4, 8)}, "lora_A has shape \\(4, 8\\), and \\(3, 8\\) goes with weight"),
    "no rank": (
        {"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)},
        "and the rank is 0; neither may be empty",
    ),
    "ends of floats": ({"ends": torch.ones(3)}, "ends is torch.float32; int32 or int64 is needed"),
    "ends that fall": ({"ends": torch.tensor([4, 3, 10])}, "ends must rise from 0 or more to the 10 rows of x"),
    "ends too early": ({"ends": torch.tensor([3, 8, 9])}, "to the 10 rows of x, the last of them that number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case):
    changed, words = WRONG[case]
    with pytest.raises(OpError, match=f"expert_lora_linear: .*{words}"):
        call({**tensors_for("some"), **changed})


def test_a_scaling_that_is_no_number_is_refused():
    with pytest.raises(OpError, match="scaling is '2'; a number is needed"):
        call(tensors_for("some"), "2")


@pytest.mark.interpreter
def test_a_step_launches_eight_kernels_and_reads_x_twice_whatever_the_number_of_experts():
    launched = []
    for shape in ("some", "experts without rows", "one expert"):
        tensors = tensors_for(shape)
        leaves = [tensors[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
        with backend("triton"), count_traffic() as traffic:
            y = call(tensors)
            dy = torch.ones_like(y)
            torch.autograd.grad(y, leaves, dy)
        launched.append([name for name in traffic.kernels() if name not in SUMS])
        assert traffic.loaded(tensors["x"]) == 2 * tensors["x"].nbytes
        assert traffic.loaded(dy) == 2 * dy.nbytes
    assert launched[0] == launched[1] == launched[2] and len(launched[0]) == 8
