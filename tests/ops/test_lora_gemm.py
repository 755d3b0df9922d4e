"""The persistent product of `lora_linear` is as right as eager torch, moves no byte more than its tiles ask for, and
leaves to the kernel by pointers what descriptors cannot describe.

The interpreter serves descriptors as it does pointers; every size here is one that they can describe.
"""

import inspect
from unittest import mock

import pytest
import torch

from fastpeft import dispatch
from fastpeft.kernels import _tiles, lora_gemm
from fastpeft.kernels import lora_linear as by_pointers
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._tiles import SMALL, Tiles
from fastpeft.oracle import GRADIENTS, lora_linear_differences
from tests.ops import lora_linear_traffic as expected
from tests.ops.lora_linear_cases import DTYPES, EXACT_IN_INTERPRETER, TRUNCATED, assert_right, draws, on
from tests.ops.lora_projections_cases import assert_right as projections_are_right
from tests.ops.lora_projections_cases import draw as projections
from tests.ops.test_lora_linear import with_layout
from tests.ops.test_lora_projections import ONE as BOUNDS
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison", "symmetric_products")]

# Rows of a multiple of 16 bytes that end inside a tile of 16 x 32 x 32, at least two whole ones before.
SHAPE, OUTPUTS = (37, 72), 88


@pytest.fixture
def never_by_pointers(monkeypatch):
    """Base products by the kernel under test alone."""

    def refuse(*_, **__):
        raise AssertionError("the kernel by pointers stood in")

    monkeypatch.setattr(lora_gemm, "by_pointers", refuse)


@pytest.mark.usefixtures("never_by_pointers")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", EXACT_IN_INTERPRETER)
def test_every_gradient(dtypes, dropout):
    with on("triton", "persistent"):
        assert_right(draws(3, SHAPE, OUTPUTS, dtypes=dtypes, dropout=dropout), GRADIENTS)


@pytest.mark.usefixtures("never_by_pointers")
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32"])
def test_bfloat16_to_within_the_interpreters_truncation(dtypes):
    with on("triton", "persistent"):
        differences = lora_linear_differences(draws(2, SHAPE, OUTPUTS, dtypes=dtypes, dropout=0.3), ("x", "bias"))
    for difference in differences:
        assert not difference.faults(TRUNCATED), difference


@pytest.mark.usefixtures("never_by_pointers")
@pytest.mark.parametrize("rank", [1, 16, 33, 128, 300])
def test_rank(rank):
    with on("triton", "persistent"):
        assert_right(draws(max(3, 12 // rank), (21, 40), 48, rank, dtypes="fp16-fp32"), ("x", "bias"))


@pytest.mark.usefixtures("never_by_pointers", "overflow_checks")
@pytest.mark.parametrize(
    ("shape", "outputs"), [((1, 8), 8), ((16, 32), 32), ((17, 40), 40), ((200, 40), 40), ((3, 200), 56), ((3, 56), 200)]
)
def test_shape(shape, outputs):
    with on("triton", "persistent"):
        assert_right(draws(max(2, min(12, 4000 // (outputs * shape[0]))), shape, outputs, 17, dtypes="fp16"))


@pytest.mark.usefixtures("never_by_pointers")
def test_a_weight_that_lies_by_depth():
    """As transformers' Conv1D has it: then forward reads it by depth, and dX does not."""
    (problem,) = draws(1, SHAPE, OUTPUTS, dtypes="fp16", dropout=0.3)
    problem = with_layout(problem, "weight", "transposed")
    assert problem.weight.stride(1) != 1
    with on("triton", "persistent"):
        assert_right([problem])


@pytest.mark.usefixtures("never_by_pointers")
@pytest.mark.parametrize("dropout", [False, True])
def test_several_projections(dropout):
    """dX is added up in one buffer, the residual of each next product."""
    sizes = dict(shape=(3, 13, 72), outputs=(72, 40, 32))
    with on("triton", "persistent"):
        projections_are_right([projections("fp16", **sizes, dropout=dropout, seed=seed) for seed in range(4)], BOUNDS)


def operands(dtype=torch.float16, columns=OUTPUTS, rank=5):
    (rows, depth), draw = SHAPE, torch.randn
    p, q = draw(rows, rank).to(dtype), draw(columns, rank).to(dtype)
    return p, q, (draw(rows, depth).to(dtype), draw(columns, depth).to(dtype))


@pytest.mark.usefixtures("never_by_pointers")
@pytest.mark.parametrize("processors", [1, 3, 100])
@pytest.mark.parametrize("tiles", [SMALL, Tiles(16, 256, depth=32, warps=4, stages=1)], ids=["whole", "in halves"])
def test_all_terms_by_any_number_of_programs(tiles, processors, monkeypatch):
    monkeypatch.setattr(lora_gemm, "processor_count", lambda tensor: processors)
    p, q, base = operands(columns=264)
    bias, residual = torch.randn(264).half(), torch.randn(37, 264)
    dropout = Dropout(torch.tensor([7]), 0.3)
    options = dict(base=base, bias=bias, residual=residual, scale=0.7, dropout=dropout, out_dtype=torch.float32)
    found = lora_gemm.tail(p, q, torch.float16, tiles=tiles, **options)
    mask = by_pointers.tail(torch.ones(37, 1), torch.ones(264, 1), torch.float32, dropout=dropout)  # 0 or 1/(1 - p)
    exact = (
        base[0].double() @ base[1].double().t() + bias.double() + residual + 0.7 * mask * (p.double() @ q.double().t())
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("rank", [8, 70])
@pytest.mark.parametrize("kind", ["plain", "bias", "residual and fp32", "dropout"])
@pytest.mark.parametrize("by_depth", [False, True])
def test_bytes(rank, kind, by_depth, monkeypatch):
    """Those of the kernel by pointers: what a descriptor leaves out at an edge is not moved."""
    (rows, depth), data = SHAPE, torch.float16
    p, q = torch.randn(rows, rank), torch.randn(OUTPUTS, rank)
    x, w = torch.randn(rows, depth).to(data), torch.randn(OUTPUTS, depth).to(data)
    wide, dropout = kind == "residual and fp32", Dropout(torch.tensor([7]), 0.3)
    options = {
        "bias": torch.randn(OUTPUTS).to(data) if kind == "bias" else None,
        "residual": torch.randn(rows, OUTPUTS) if wide else None,
        "out_dtype": torch.float32 if wide else None,
        "dropout": dropout if kind == "dropout" else None,
    }
    base = (x, w.t().contiguous().t() if by_depth else w)
    with count_traffic() as traffic:
        lora_gemm.tail(p, q, data, base=base, tiles=SMALL, **options)
    loads, stores = expected.tail(
        rows, OUTPUTS, rank, SMALL, expected.Sizes(data=2, adapter=4), depth=depth, bias=kind == "bias",
        dropout=kind == "dropout", out=4 if wide else None,
    )  # fmt: skip
    names = {"x_ptr": "x_desc", "w_ptr": "w_desc", "out_ptr": "out_desc"}
    loads |= {"residual_ptr": rows * OUTPUTS * 4} if wide else {}
    assert traffic.of("_persistent_tail_kernel") == tuple(
        {names.get(name, name): count for name, count in counts.items()} for counts in (loads, stores)
    )
    assert traffic.atomics == 0


REFUSED = {
    "columns of x apart": (lambda x, w: (torch.zeros(37, 144).half()[:, ::2], w), "of x"),
    "rows of x not aligned": (lambda x, w: (torch.zeros(37, 73).half()[:, :72], w), "of x"),
    "x begins beside": (lambda x, w: (torch.zeros(37, 80).half()[:, 1:73], w), "of x"),
    "rows of x are one": (lambda x, w: (x[:1].expand(37, 72), w), "of x"),
    "rows of the weight not aligned": (lambda x, w: (x, torch.zeros(88, 73).half()[:, :72]), "of the weight"),
    "the weight apart": (lambda x, w: (x, torch.zeros(88, 144).half()[:, ::2]), "of the weight"),
    "outputs not aligned": (lambda x, w: (x, w[:87]), "of the result"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_descriptor_cannot_describe_is_left_to_pointers(case):
    change, words = REFUSED[case]
    p, q, base = operands()
    x, w = change(*base)
    assert words in lora_gemm.refusal(x, w, torch.float16)
    assert not lora_gemm.serves(x, w, torch.float16)
    with count_traffic() as traffic:
        found = lora_gemm.tail(p, q[: len(w)], torch.float16, base=(x, w), scale=0.5)
    assert traffic.kernels() == ["_tail_kernel"]
    assert torch.equal(found, by_pointers.tail(p, q[: len(w)], torch.float16, base=(x, w), scale=0.5))


def test_what_is_aligned_is_not_refused():
    x, w = torch.zeros(5, 80).half()[:, 8:72], torch.zeros(24, 64).half()
    assert lora_gemm.refusal(x, w, torch.float16) is lora_gemm.refusal(x, w, torch.float32) is None
    assert lora_gemm.refusal(x, torch.zeros(64, 24).half().t(), torch.float16) is None
    assert lora_gemm.serves(x, w, torch.float32)


@pytest.mark.parametrize(
    ("family", "served"),
    [("sm_80", False), ("sm_89", False), ("hip", False), ("sm_120", False), ("sm_90", True), ("sm_100", True)],
)
def test_devices(family, served, monkeypatch):
    """Only where copies by descriptors are, and only for data of 16 bits: fp32's products are not of tensor cores."""
    monkeypatch.setattr(lora_gemm, "table_of", lambda device: family)
    x, w = torch.zeros(16, 64), torch.zeros(24, 64)
    for data, adapter in DTYPES.values():
        expect = served and data != torch.float32
        assert lora_gemm.serves(x.to(data), w.to(data), adapter) is expect, (data, adapter)
    assert bool(_tiles.candidates("persistent", 16, "half", False, family)) is served
    numbers = Tiles(128, 256, depth=64, ranks=32)._asdict()
    assert (_tiles.measured_row("persistent", 16, "half", False, numbers, family) is not None) is served
    with mock.patch.object(lora_gemm, "by_pointers", return_value=None) as stood_in:
        if not served:
            lora_gemm.tail(*operands()[:2], torch.float16, base=operands()[2])
    assert stood_in.called is not served


def test_both_take_the_same_arguments():
    theirs, ours = (inspect.signature(module.tail).parameters for module in (by_pointers, lora_gemm))
    assert theirs.keys() == ours.keys()


def test_the_plan_is_known_and_never_the_rules_own():
    assert "persistent" in dispatch.LORA_STRATEGIES
    for device in ("cuda", "cpu"):
        for rows in (1, 64, 65, 8192):
            plan = dispatch.predicted_lora_plan(torch.device(device), rows)
            assert "persistent" not in (plan.forward, plan.backward)
