"""The products of the torch path that are oneDNN's on some processors, or made in fp32 on others: which, and that ops
are as right with them."""

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.ops import _cpu_products as cpu
from fastpeft.ops._lora_linear_torch import add_product, lies_down, product
from fastpeft.oracle import Bounds
from tests.memory import Allocations
from tests.op_calls import OPS
from tests.ops import lora_linear_cases, lora_mlp_cases, lora_projections_cases

AMD, INTEL = "vendor_id : AuthenticAMD", "vendor_id : GenuineIntel"
ORDER = Bounds(rms=1.3, peak=3.0, row=3.0)  # two libraries add up in two orders
DROPPING = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])


@pytest.fixture
def onednn(monkeypatch):
    """Every product that can be is oneDNN's, however small; yields the list of those that were."""
    found = []
    linear = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(cpu, "prefers_onednn", lambda: True)
    monkeypatch.setattr(cpu, "ELEMENTS", 0)
    monkeypatch.setattr(cpu, "ROWS", 1)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: found.append(tuple(args[0].shape)) or linear(*args)
    )
    return found


@DROPPING
def test_lora_linear(onednn, dropout):
    """In forward the base product and S, in backward dX and T; under dropout the masked term comes last."""
    with backend("torch"):
        lora_linear_cases.assert_right(lora_linear_cases.draws(8, dropout=0.3 * dropout), bounds=ORDER)
    assert len(onednn) == 8 * 4


@DROPPING
@pytest.mark.parametrize(("rank", "lies"), [(15, False), (16, True)])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16-fp32"])
def test_gradients_of_wide_rows(rank, lies, dtypes, dropout):
    """dA and dB are asked of the vendor lying down, or not."""
    assert lies_down(torch.empty(3, rank), 512) is lies and not lies_down(torch.empty(3, rank), 511)
    problems = lora_linear_cases.draws(
        2, (33, 1040), outputs=1030, rank=rank, base=False, dropout=0.3 * dropout, dtypes=dtypes
    )
    with backend("torch"):
        lora_linear_cases.assert_right(problems, ("x", "lora_A", "lora_B"), ORDER)


@DROPPING
@pytest.mark.parametrize("cases", [lora_projections_cases, lora_mlp_cases], ids=["projections", "mlp"])
def test_several_at_once(onednn, cases, dropout):
    with backend("torch"):
        cases.assert_right([cases.draw("fp32", dropout=dropout, seed=seed) for seed in range(8)], ORDER)
    assert onednn


SERVED = ("lora-addmm", "lora-dropout", "mixed", "mlp", "projections")


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith(SERVED)])
def test_every_op_gives_what_it_gives_without(onednn, monkeypatch, name):
    op, tensors, options, _ = OPS[name]

    def outcome():
        torch.manual_seed(0)
        given = tensors()
        out = op(*given, **options)
        return [out, *torch.autograd.grad(out, [t for t in given if t.requires_grad], torch.ones_like(out))]

    with backend("torch"):
        found = outcome()
        assert onednn, "nothing of this op was oneDNN's"
        monkeypatch.setattr(cpu, "prefers_onednn", lambda: False)
        expected = outcome()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(64, 48).t(), torch.randn(40, 64)),
        (torch.randn(48, 128)[:, ::2], torch.randn(40, 64)),
        (torch.randn(1, 64).expand(48, 64), torch.randn(40, 64)),
        (torch.randn(48, 64), torch.randn(40, 128)[:, ::2]),
        (torch.randn(48, 64).double(), torch.randn(40, 64).double()),
        (torch.randn(48, 64).bfloat16(), torch.randn(40, 64).bfloat16()),
    ],
    ids=["x transposed", "x gappy", "x expanded", "weight gappy", "fp64", "bf16"],
)
def test_what_would_be_copied_or_has_another_dtype_is_torch_s(onednn, x, weight):
    assert not cpu.is_onednns(x, weight)
    y = cpu.linear(x, weight)
    assert not onednn
    assert torch.equal(y, torch.nn.functional.linear(x, weight))


def test_a_bias_of_any_stride(onednn):
    x, weight, bias = torch.randn(48, 64), torch.randn(40, 64), torch.randn(40)
    apart = torch.stack([bias, torch.full_like(bias, 1e6)], 1)[:, 0]
    torch.testing.assert_close(cpu.linear(x, weight, apart), torch.nn.functional.linear(x, weight, bias))
    assert onednn


def test_neither_operand_is_copied(monkeypatch):
    monkeypatch.setattr(cpu, "prefers_onednn", lambda: True)
    x, weight = torch.randn(256, 512), torch.randn(384, 512)
    assert cpu.is_onednns(x, weight)
    with Allocations() as allocated:
        y = cpu.linear(x, weight, torch.zeros(384))
        cpu.through(y, weight)
    assert max(allocated.sizes) <= 256 * 512 * 4


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [(AMD, "AVX512", True), (AMD, "AVX2", False), (INTEL, "AVX512", False), ("", "DEFAULT", False)],
)
def test_whose_products_they_are(monkeypatch, processor, capability, expected):
    monkeypatch.setattr(cpu, "processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu.prefers_onednn.__wrapped__() is expected


@pytest.mark.parametrize("missing", ["mkl", "mkldnn"])
def test_a_torch_without_one_of_the_two_has_no_choice(monkeypatch, missing):
    monkeypatch.setattr(cpu, "processor", lambda: AMD)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(getattr(torch.backends, missing), "is_available", lambda: False)
    assert cpu.prefers_onednn.__wrapped__() is False


def test_the_users_switch_is_honoured(onednn):
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    assert cpu.is_onednns(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not cpu.is_onednns(x, weight)


def test_small_products_are_torch_s(monkeypatch):
    monkeypatch.setattr(cpu, "prefers_onednn", lambda: True)
    weight = torch.randn(512, 512)
    assert cpu.is_onednns(torch.randn(256, 512), weight)
    assert not cpu.is_onednns(torch.randn(256, 512), torch.randn(16, 512))
    assert not cpu.is_onednns(torch.randn(0, 512), weight)


def test_batches_of_any_length_leave_no_code_behind(monkeypatch):
    """oneDNN keeps what it compiles for a number of rows."""
    monkeypatch.setattr(cpu, "prefers_onednn", lambda: True)
    weight, x = torch.randn(512, 512), torch.randn(2048, 512)
    assert [rows for rows in range(1, 2049) if cpu.is_onednns(x[:rows], weight)] == list(range(256, 2049, 256))


def test_the_processor_says_what_it_is():
    assert cpu.processor()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_arrives_where_torch_puts_it(onednn, value):
    x, weight = torch.randn(48, 64), torch.randn(40, 64)
    x[7, 9] = value
    y, expected = cpu.linear(x, weight), torch.nn.functional.linear(x, weight)
    assert onednn
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(params=[True, False], ids=["widened", "native"])
def lacking(request, monkeypatch):
    """A machine without instructions for products in half precision, and one with them."""
    monkeypatch.setattr(cpu, "lacks_half", lambda dtype: request.param)
    return request.param


@HALF
@pytest.mark.parametrize("shape", [(33, 20, 17), (4, 1, 1), (5, 0, 3), (5, 3, 0), (64, 7, 130)])
def test_widened_products_are_rounded_once(monkeypatch, dtype, shape):
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(rows)
    out, p, q = (
        torch.randn(*size, generator=generator).to(dtype) for size in ((rows, columns), (rows, inner), (inner, columns))
    )
    truth, tolerance = 0.3 * (p.double() @ q.double()), {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 1e-6}
    for edge in (cpu.EDGE, 8):  # one block, and many
        monkeypatch.setattr(cpu, "EDGE", edge)
        torch.testing.assert_close(cpu.widened(p, q, 0.3).double(), truth, **tolerance)
        into = torch.full_like(out, float("nan"))
        assert cpu.widened(p, q.t().contiguous().t(), 0.3, into) is into
        torch.testing.assert_close(into.double(), truth, **tolerance)
        added = out.clone()
        assert cpu.add_widened(added, p, q, 0.3) is added
        torch.testing.assert_close(added.double(), out.double() + truth, **tolerance)


@HALF
def test_widened_products_copy_a_block_of_each_operand(monkeypatch, dtype):
    monkeypatch.setattr(cpu, "EDGE", 64)
    dy, weight = torch.randn(300, 256).to(dtype), torch.randn(256, 320).to(dtype)
    with Allocations() as allocated:
        dx = cpu.widened(dy, weight)
        cpu.add_widened(dx, dy, weight)
    assert allocated.peak <= dx.nbytes + 3 * 4 * 64 * 64


@DROPPING
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "bf16-fp32"])
def test_lora_linear_in_half_precision(lacking, dtypes, dropout):
    with backend("torch"):
        lora_linear_cases.assert_right(lora_linear_cases.draws(8, dropout=0.3 * dropout, dtypes=dtypes))


@DROPPING
@pytest.mark.parametrize("cases", [lora_projections_cases, lora_mlp_cases], ids=["projections", "mlp"])
def test_several_at_once_in_half_precision(lacking, cases, dropout):
    with backend("torch"):
        cases.assert_right([cases.draw("bf16", dropout=dropout, seed=seed) for seed in range(8)])


@HALF
def test_backward_and_the_adapters_are_widened_and_the_base_is_not(monkeypatch, dtype):
    found = []
    monkeypatch.setattr(cpu, "lacks_half", lambda dtype: True)
    for name in ("widened", "add_widened"):
        how = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, how=how: found.append(len(args)) or how(*args))
    op, tensors, options, _ = OPS["lora-addmm"]
    x, weight, bias, a, b = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors())
    with backend("torch"):
        y = op(x, weight, bias, a, torch.zeros_like(b), **options)
        assert torch.equal(y, torch.nn.functional.linear(x, weight, bias)) and len(found) == 2
        y.sum().backward()
    assert len(found) > 4


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith((*SERVED, "experts"))])
def test_every_op_gives_in_bfloat16_what_it_gives_without(monkeypatch, name):
    """To what the criterion elsewhere says of both: here a few roundings of bf16 in numbers of about one."""
    op, tensors, options, _ = OPS[name]
    given = [t.bfloat16() if t is not None and t.dtype is torch.float32 else t for t in tensors()]
    leaves = [t is not None and t.requires_grad for t in tensors()]
    wanted = [t.detach_().requires_grad_() for t, leaf in zip(given, leaves, strict=True) if leaf]

    def outcome(lacking):
        monkeypatch.setattr(cpu, "lacks_half", lambda dtype: lacking)
        torch.manual_seed(0)
        out = op(*given, **options)
        return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    with backend("torch"):
        for one, other in zip(outcome(True), outcome(False), strict=True):
            assert float((one - other).norm()) <= 0.02 * float(other.norm())


TWO_DTYPES = {
    "product": lambda p, q: product(p, q, 0.5),
    "add_product": lambda p, q: add_product(q.clone(), p, q),
    "through": lambda p, q: cpu.through(p, q),
    "add_through": lambda p, q: cpu.add_through(p.clone(), p, q),
}


@pytest.mark.parametrize("function", TWO_DTYPES)
def test_two_dtypes_are_refused_as_elsewhere(monkeypatch, function):
    monkeypatch.setattr(cpu, "lacks_half", lambda dtype: True)
    with pytest.raises(RuntimeError, match="dtype"):
        TWO_DTYPES[function](torch.randn(8, 8).bfloat16(), torch.randn(8, 8))


@HALF
def test_nothing_times_infinity_is_no_number_here_either(monkeypatch, dtype):
    p, q = torch.randn(8, 4).to(dtype), torch.randn(4, 8).to(dtype)
    q[1, 2] = float("inf")
    for lacking in (True, False):
        monkeypatch.setattr(cpu, "lacks_half", lambda dtype, lacking=lacking: lacking)
        for found in (product(p, q, 0.0), add_product(torch.zeros(8, 8, dtype=dtype), p, q, 0.0)):
            assert found[:, 2].isnan().all() and not found[:, [0, 1, 3, 4, 5, 6, 7]].any()


@pytest.mark.parametrize(
    ("capability", "bf16", "fp16", "expected"),
    [
        ("AVX2", False, False, (True, True)),
        ("AVX2", True, True, (False, False)),  # instructions beyond AVX2 without AVX-512
        ("AVX512", True, False, (False, True)),
        ("DEFAULT", False, False, (False, False)),  # no x86, or torch was told so
    ],
)
def test_what_a_machine_lacks(monkeypatch, capability, bf16, fp16, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name, has in (("bf16", bf16), ("fp16", fp16)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda has=has: has)
    assert tuple(map(cpu.lacks_half.__wrapped__, (torch.bfloat16, torch.float16))) == expected


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float16, True),
        (torch.bfloat16, torch.float16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float32, False),
        (torch.float64, torch.float64, False),
    ],
)
def test_what_is_widened(monkeypatch, p, q, expected):
    monkeypatch.setattr(cpu, "lacks_half", lambda dtype: True)
    matrix = torch.zeros(8, 8, dtype=q)
    assert cpu.widens(torch.zeros(4, 8, dtype=p), matrix) is expected
    assert not cpu.widens(torch.zeros(3, 8, dtype=p), matrix)  # as in a step of `generate`
    assert not cpu.widens(torch.zeros(4, 8, dtype=p, device="meta"), matrix)
