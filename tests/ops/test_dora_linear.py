"""`dora_linear`: as right as the definition in eager torch, what it keeps for backward, and what falls back."""

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import fallback
from fastpeft.errors import BackendError, OpError
from fastpeft.kernels._common import Dropout
from fastpeft.ops import _dora_linear_triton
from fastpeft.ops.dora_linear import apply_dora, dora_linear_reference, takes
from fastpeft.ops.lora_linear import _path, dropout_mask
from fastpeft.oracle import Bounds, compare
from tests.memory import Allocations, saved_for_backward
from tests.ops.lora_linear_cases import on
from tests.peft_pair import close

pytestmark = pytest.mark.usefixtures("poison", "symmetric_products")
BOTH = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
DTYPES = {  # data, adapter; the factor is fp32
    "fp32": (torch.float32, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
NAMES = ("x", "bias", "lora_A", "lora_B", "factor")
M, K, N, R, SCALE = 37, 69, 45, 5, 0.7


def problem(seed=0, dtypes="fp32", shape=(M, K), outputs=N, rank=R, bias=True) -> dict:
    """Leaves, the frozen weight, and the gradient of the result; a factor of about 1, as training has it."""
    generator = torch.Generator().manual_seed(seed)
    data, adapter = DTYPES[dtypes]
    inputs = shape[-1]

    def normal(*size, scale=1.0, dtype=data):
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    given = {
        "x": normal(*shape),
        "weight": normal(outputs, inputs, scale=inputs**-0.5),
        "bias": normal(outputs) if bias else None,
        "lora_A": normal(rank, inputs, scale=inputs**-0.5, dtype=adapter),
        "lora_B": normal(outputs, rank, scale=rank**-0.5, dtype=adapter),
        "factor": 1 + normal(outputs, scale=0.3, dtype=torch.float32),
        "dy": normal(*shape[:-1], outputs),
    }
    return {
        name: each if each is None or name in ("weight", "dy") else each.requires_grad_()
        for name, each in given.items()
    }


def outcome(given: dict, function, wanted=NAMES) -> dict[str, torch.Tensor]:
    leaves = [name for name in wanted if given[name] is not None]
    y = function(*(given[name] for name in ("x", "weight", *NAMES[1:])))
    gradients = torch.autograd.grad(y, [given[name] for name in leaves], given["dy"].to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def ours(p: float):
    return lambda *given: apply_dora(*given, SCALE, p)


def definition(keep, p):
    return lambda *given: dora_linear_reference(*given, SCALE, keep, p)


def mask(name: str, given: dict, p: float, seed: int):
    """(the mask that a call would draw under torch's seed, the probability that it is honoured with)"""
    if not p:
        return None, 0.0
    torch.manual_seed(seed)
    path = _path(name == "triton")
    rows = given["x"].numel() // given["x"].shape[-1]
    keep = dropout_mask(path.draw_seed(given["x"]), p, rows, given["x"].shape[-1], "cpu", name)
    return keep, path.honoured(p) if name == "triton" else p


def doubled(given: dict) -> dict:
    return {name: each if each is None else each.detach().double().requires_grad_() for name, each in given.items()}


def assert_right(name, p=0.0, count=4, bounds=Bounds(), wanted=NAMES, **options):  # noqa: B008 (frozen)
    """On the backend, against float64, in units of the definition's own error."""
    rows: dict[str, list] = {}
    for seed in range(count):
        given = problem(seed, **options)
        keep, honoured = mask(name, given, p, seed)
        torch.manual_seed(seed)
        with on(name):
            found = outcome(given, ours(p), wanted)
        eager = outcome(given, definition(keep, honoured), wanted)
        exact = outcome(doubled(given), definition(keep, honoured), wanted)
        for key in found:
            rows.setdefault(key, []).append((found[key], eager[key], exact[key]))
    assert len(rows) >= 1 + len([each for each in wanted if each != "bias"])
    for key, each in rows.items():
        difference = compare(key, *zip(*each, strict=True))
        assert not difference.faults(bounds), difference


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("p", "bias"), [(0.0, True), (0.0, False), (0.3, True)])
@pytest.mark.parametrize("name", BOTH)
def test_beside_the_definition(name, p, bias, dtypes):
    assert_right(name, p, 6, dtypes=dtypes, bias=bias)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("shape", "outputs", "rank"),
    [((1, 1), 1, 1), ((2, 19, 33), 70, 17), ((130, 40), 3, 40), ((40,), 20, 3), ((3, 40), 20, 300)],
    ids=str,
)
def test_shapes(name, p, shape, outputs, rank):
    given = problem(shape=shape, outputs=outputs, rank=rank)
    keep, honoured = mask(name, given, p, 2)
    torch.manual_seed(2)
    with on(name):
        found = outcome(given, ours(p))
    for key, each in outcome(doubled(given), definition(keep, honoured)).items():
        close(found[key], each.float(), 2e-6)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "wanted", [(each,) for each in NAMES] + [("lora_A", "lora_B", "factor"), ("x", "lora_A")], ids=str
)
def test_subsets_of_gradients(name, p, wanted):
    """Each alone is what it is among all."""
    given = problem()
    with on(name):
        torch.manual_seed(2)
        everything = outcome(given, ours(p))
        for key, each in given.items():
            if key in NAMES:
                each.requires_grad_(key in wanted)
        torch.manual_seed(2)
        found = outcome(given, ours(p), wanted)
    assert found.keys() == {"y", *wanted}
    for key, each in found.items():
        close(each, everything[key], 1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_strides_are_any(name):
    given = problem()
    expected = {}
    for key in (None, "x", "weight", "lora_A", "lora_B", "dy"):
        tensors = dict(given)
        if key is not None:
            tensors[key] = given[key].detach().t().contiguous().t()
            assert tensors[key].stride() != given[key].stride()
            tensors[key].requires_grad_(given[key].requires_grad)
        with on(name):
            torch.manual_seed(2)
            found = outcome(tensors, ours(0.3))
        expected = expected or found
        for each in found:
            close(found[each], expected[each], 1e-5)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("wanted", "kept"),
    [(NAMES, "x s h"), (("lora_A",), "x"), (("lora_B",), "s"), (("factor",), "s h"), (("x",), ""), (("bias",), "")],
    ids=str,
)
def test_what_is_kept_for_backward(name, p, wanted, kept):
    """Never what is left of x, nor a mask."""
    given = problem()
    for key in NAMES:
        given[key].requires_grad_(key in wanted)
    parameters = tuple(given[key] for key in ("weight", *NAMES[1:]))
    with on(name), saved_for_backward(besides=parameters) as saved:
        apply_dora(*(given[key] for key in ("x", "weight", *NAMES[1:])), SCALE, p)
    sizes = {"x": M * K * 4, "s": M * R * 4, "h": M * N * 4}
    assert sorted(saved.values()) == sorted([sizes[each] for each in kept.split()] + [8] * (p > 0))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_the_torch_path_allocates(p):
    """As large as x or y in forward: y and H; in backward dX, and G where there is no dropout, else the share of the
    blocks' places, in which all of so small a problem fits."""
    given = problem(shape=(256, 96), outputs=160)
    with Allocations() as allocations:
        y = apply_dora(*(given[key] for key in ("x", "weight", *NAMES[1:])), SCALE, p)
    large = [size for size in allocations.sizes if size >= 256 * 96 * 4]
    assert len(large) <= (4 if p else 3) + 1
    assert y.shape == (256, 160)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_nothing_as_large_as_the_weight_is_made(name, p):
    """Of few rows, beside which W + s·B A would be by far the largest: neither in forward nor in backward."""
    given = problem(shape=(8, 768), outputs=512)
    with on(name), Allocations() as allocations:
        found = outcome(given, ours(p))
    assert len(found) == 6
    assert 8 * 768 * 4 <= max(allocations.sizes) < 512 * 768 * 4


@pytest.mark.interpreter
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_the_kernels_are_called_for(p, monkeypatch):
    """Forward: one pass combines, and under dropout one writes what is left of x. Backward: one pass makes G and the
    sums, and under dropout one masks what comes through."""
    calls = []
    for name in ("combine", "scaled_grad", "drop"):
        kernel = getattr(_dora_linear_triton.kernels, name)
        monkeypatch.setattr(
            _dora_linear_triton.kernels, name, lambda *a, k=kernel, n=name, **more: calls.append(n) or k(*a, **more)
        )
    with on("triton"):
        outcome(problem(), ours(p))
    assert calls == (["drop", "combine", "scaled_grad", "drop"] if p else ["combine", "scaled_grad"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_a_checkpoint_draws_the_same_mask(name, reentrant):
    given = problem()
    tensors = [given[key] for key in ("x", "weight", *NAMES[1:])]
    with on(name):
        torch.manual_seed(2)
        expected = outcome(given, ours(0.3))
        torch.manual_seed(2)
        y = checkpoint(ours(0.3), *tensors, use_reentrant=reentrant)
        y.backward(given["dy"])
    assert torch.equal(y, expected["y"])
    for key in NAMES:
        assert torch.equal(given[key].grad, expected[key]), key


@pytest.mark.parametrize("name", BOTH)
def test_first_derivatives_only(name):
    given = problem()
    with on(name):
        y = apply_dora(*(given[key] for key in ("x", "weight", *NAMES[1:])), SCALE, 0.0)
        (dx,) = torch.autograd.grad(y.sum(), given["x"], create_graph=True)
        with pytest.raises(OpError):
            dx.sum().backward()


@pytest.mark.parametrize("name", BOTH)
def test_autocast_is_that_of_the_op_beside(name):
    """The base's product in autocast's type, adapters as they are; gradients in the leaves' own types."""
    given = problem()
    with on(name), torch.autocast("cpu", torch.float16):
        found = outcome(given, ours(0.0))
    half = {key: each.detach().half() if key in ("x", "weight", "bias") else each for key, each in given.items()}
    half = {key: each.detach().requires_grad_(key in NAMES) for key, each in half.items()}
    with on(name):
        expected = outcome(half, ours(0.0))
    assert found["y"].dtype == torch.float16 and all(found[key].dtype == given[key].dtype for key in NAMES)
    for key, each in expected.items():
        close(found[key].float(), each.float(), 1e-3)


def test_what_it_takes():
    given = problem()
    x, weight = given["x"], given["weight"]
    assert takes(x, weight) and takes(x[0], weight)
    assert not takes(x.double(), weight) and not takes(x.sum(), weight)
    assert not takes(x, weight.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert takes(x.half(), weight)


@pytest.fixture
def nothing_has_failed():
    yield
    fallback._failed.clear()
    fallback._drawn.clear()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Triton serves what nobody has demanded."""
    from fastpeft.dispatch import Choice

    module = importlib.import_module("fastpeft.ops.lora_linear")
    monkeypatch.setattr(module, "choose_backend", lambda *given, **more: Choice("triton", "a test"))


@pytest.mark.interpreter
@pytest.mark.usefixtures("nothing_has_failed", "as_on_a_gpu")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_what_fails_is_computed_by_torch_with_the_kernels_mask(phase, p, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def fail(*given, **more):
        raise OutOfResources(300_000, 232_448, "shared memory")

    given = problem()
    torch.manual_seed(2)
    expected = outcome(given, ours(p))
    monkeypatch.setattr(_dora_linear_triton, phase, fail)
    torch.manual_seed(2)
    with pytest.warns(RuntimeWarning, match=rf"kernels failed \(dora_linear, {phase}, on cpu: .*OutOfResources"):
        found = outcome(given, ours(p))
    for key, each in expected.items():
        close(found[key], each, 1e-5)
    with on("triton"), pytest.raises(BackendError, match="dora_linear"):
        outcome(given, ours(p))


@pytest.mark.interpreter
def test_the_mask_is_that_of_lora_linear():
    """So that a mask can be asked for by one function."""
    x, seed = torch.ones(19, 40), torch.tensor([11])
    dropped = _dora_linear_triton.kernels.drop(x, Dropout(seed, 0.3))
    keep = dropout_mask(seed, 0.3, 19, 40, "cpu", "triton")
    close(dropped, keep * Dropout(seed, 0.3).keep_scale, 1e-6)
