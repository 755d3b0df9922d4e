"""The benchmark of dora_linear and row_norms: its truth, its peers, what it refuses, its cells, on tiny shapes."""

import dataclasses

import pytest
import torch

from benchmarks import bench_dora_linear as bench
from benchmarks import dora_linear_peers as peers
from benchmarks import report
from benchmarks.bench_dora_linear import BENCH, Cell, inputs_of
from benchmarks.dora_linear_truth import DoraTruth, full_norms, plain
from benchmarks.harness import Call
from benchmarks.request import Request
from fastpeft import cost
from fastpeft.errors import FastpeftError
from fastpeft.ops.dora_linear import apply_dora
from fastpeft.ops.row_norms import row_norms

CPU = torch.device("cpu")
CELL = Cell("tiny", 91, 48, 40, 4, 0.0, "fp32")
LORA = "fastpeft:lora"
HERE = ["peft-fp32", "peft", "eager", LORA, "fastpeft", "fastpeft-fp32", "fastpeft:given-norms", "fastpeft:full-norms"]
HERE += ["fastpeft:torch"]


@pytest.mark.parametrize(("dtype", "dropout"), [("bf16", 0.0), ("bf16", 0.5), ("fp32", 0.0), ("fp32", 0.3)])
def test_every_implementation_is_right(dtype, dropout):
    inputs = inputs_of(dataclasses.replace(CELL, M=400, dtype=dtype, dropout=dropout), CPU)
    judge, checked = DoraTruth(inputs), []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name == report.FLOOR or implementation.compiled:
            continue
        verdict = judge.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.gain) == {"y", "x", "A", "B", "m"} - ({"m"} if implementation.name == LORA else set())
        assert (verdict.keep_rate is not None) is bool(dropout)
        checked.append(implementation.name)
    assert checked == HERE


@pytest.mark.interpreter
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_kernels_are_right(dropout):
    inputs = inputs_of(dataclasses.replace(CELL, dtype="fp16", dropout=dropout), CPU)
    assert DoraTruth(inputs).verify(peers.build_fastpeft(inputs, backend="triton")).problems == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_truth_is_the_plain_form_in_float64(dropout):
    inputs = inputs_of(dataclasses.replace(CELL, dropout=dropout), CPU)
    keep = torch.rand(CELL.M, CELL.K) < 0.5 if dropout else None
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves(None).items()}
    drop = (lambda x: x * keep / (1 - dropout)) if dropout else None
    x, *adapter = leaves.values()
    y = plain(x, inputs.lora.weight.double(), *adapter, inputs.lora.scaling, drop)
    gradients = torch.autograd.grad(y, leaves.values(), inputs.lora.grad.double())
    found = DoraTruth(inputs)
    tail = found.tail(inputs.leaves(None), keep)
    for name, each in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
        torch.testing.assert_close(tail[name] + found.lora.base.get(name, 0), each.detach())


def wrong(cell: Cell, change) -> Call:
    """The layer with a change, bound to the right tensors: change(weight, A, B, s, m) is its factors and scaling."""
    inputs = inputs_of(cell, CPU)
    lora, leaves = inputs.lora, inputs.leaves(None)

    def forward():
        x, a, b, m = leaves.values()
        factor, scaling = change(lora.weight, a, b, lora.scaling, m)
        return apply_dora(x, lora.weight, None, a, b, factor, scaling, lora.dropout)

    return Call(forward, leaves, lora.grad, {"weight": lora.weight})


def right(weight, a, b, s, m):
    return m / row_norms(weight, a, b, s), s


WRONG = {
    "norms of W alone": lambda weight, a, b, s, m: (m / weight.norm(dim=1), s),
    "norms of s·B A alone": lambda weight, a, b, s, m: (m / full_norms(0 * weight, a, b, s), s),
    "norms without the scaling": lambda weight, a, b, s, m: (m / row_norms(weight, a, b, 1.0), s),
    "norms of the columns": lambda weight, a, b, s, m: (m / (weight + s * b @ a).norm(dim=0)[:40], s),
    "the next row's norm": lambda weight, a, b, s, m: (m / row_norms(weight, a, b, s).roll(1), s),
    "norms with a gradient": lambda weight, a, b, s, m: (m / (weight + s * b @ a).norm(dim=1), s),
    "norms 1 % off": lambda weight, a, b, s, m: (m / (1.01 * row_norms(weight, a, b, s)), s),
    "a scaling 1 % off": lambda weight, a, b, s, m: (m / row_norms(weight, a, b, s), 0.99 * s),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(change, dropout):
    cell = dataclasses.replace(CELL, dropout=dropout)
    assert DoraTruth(inputs_of(cell, CPU)).verify(wrong(cell, right)).problems == []
    assert DoraTruth(inputs_of(cell, CPU)).verify(wrong(cell, change)).problems


def test_dropout_that_is_not_there_is_found():
    cell = dataclasses.replace(CELL, dropout=0.5)
    problems = DoraTruth(inputs_of(cell, CPU)).verify(peers.build_fastpeft(inputs_of(CELL, CPU))).problems
    assert any("no dropout mask" in problem for problem in problems)


def test_it_is_measured(run):
    document = run(peers.IMPLEMENTATIONS, (CELL,), bench=BENCH)
    rows = {row["impl"]: row for row in document["results"]}
    assert list(rows) == [report.FLOOR, *HERE] and {row["status"] for row in rows.values()} == {"ok"}
    assert rows["fastpeft"]["speedup_vs"].keys() == {"peft-fp32", "peft", "eager"}
    for name, work in {
        "fastpeft": CELL.work_of_dora("fwd+bwd"),
        "fastpeft:given-norms": CELL.work_of_dora("fwd+bwd", norms=False),
        LORA: CELL.work_of_lora("fwd+bwd"),
        report.FLOOR: CELL.work(True, "fwd+bwd"),
    }.items():
        assert rows[name]["tflops"] == pytest.approx(work.flops / rows[name]["median_ms"] / 1e9), name


def test_the_cells():
    first, more = bench.tiers(tiny=False)
    assert [(c.name, c.M, c.K, c.N, c.r, c.dropout) for c in (*first, *more)] == [
        ("llama3-8b q/o", 8192, 4096, 4096, rank, dropout) for rank in (16, 64) for dropout in (0.0, 0.05)
    ]
    assert [(cell.dtype, cell.dropout) for cell in bench.tiers(tiny=True)[0]] == [("bf16", 0.0), ("bf16", 0.5)]
    assert {cell.dropout for cell in bench.cells(Request(tiny=True))} == {0.0, 0.05}
    (given,) = bench.cells(Request(shapes=((5, 16, 24),), ranks=(8,), dropouts=(0.1,)))
    assert given.shape() == {"name": "given", "M": 5, "K": 16, "N": 24, "r": 8} and given.dropout == 0.1
    sizes = {"M": 91, "K": 48, "N": 40, "itemsize": 4}
    assert CELL.work(False, "fwd") == cost.dora_linear("fwd", **sizes, r=4)
    assert CELL.work(True, "bwd") == cost.dora_linear("bwd", **sizes, r=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": ((1, 2),)}, "--shape 1,2 is not M,K,N"),
        ({"shapes": ("lorafusion-grid",)}, "is no model: it is for `fastpeft bench lora`"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(options, words):
    with pytest.raises(FastpeftError, match=words):
        bench.cells(Request(**options))


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_peers_pass_the_check_on_the_gpu(dropout):
    inputs = inputs_of(Cell("tiny", 700, 512, 384, 16, dropout, "bf16"), torch.device("cuda"))
    found = DoraTruth(inputs)
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name != report.FLOOR:
            assert found.verify(implementation.build(inputs), implementation.rms_bound).problems == []
