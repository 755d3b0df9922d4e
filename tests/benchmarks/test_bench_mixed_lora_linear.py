"""The benchmark of mixed_lora_linear: its truth, its peers, what it refuses, its cells, on tiny shapes."""

import dataclasses

import pytest
import torch

from benchmarks import bench_mixed_lora_linear as bench
from benchmarks import mixed_lora_linear_peers as peers
from benchmarks import report
from benchmarks.bench_mixed_lora_linear import BENCH, Cell, inputs_of
from benchmarks.harness import Call
from benchmarks.mixed_lora_linear_truth import MixedTruth, one_by_one
from benchmarks.request import Request
from fastpeft import cost
from fastpeft.errors import FastpeftError
from fastpeft.ops import mixed_lora_linear

CPU = torch.device("cpu")
CELL = Cell("tiny", 7, 13, 48, 40, 4, 2, "fp32")
HERE = ["peft-fp32", "peft", "loop", "fastpeft", "fastpeft-fp32", "fastpeft:torch"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_implementation_is_right(dtype):
    inputs = inputs_of(dataclasses.replace(CELL, S=400, dtype=dtype), CPU)
    judge, checked = MixedTruth(inputs), []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name == report.FLOOR:
            continue
        verdict = judge.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.gain) == {"y", "x", "A0", "B0", "A1", "B1"}
        checked.append(implementation.name)
    assert checked == HERE


@pytest.mark.interpreter
def test_the_kernels_are_right():
    inputs = inputs_of(dataclasses.replace(CELL, dtype="fp16"), CPU)
    verdict = MixedTruth(inputs).verify(peers.build_fastpeft(inputs, backend="triton"))
    assert verdict.problems == []


def test_the_truth_is_the_plain_form_in_float64():
    inputs = inputs_of(CELL, CPU)
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves(None).items()}
    y = one_by_one(inputs, leaves, inputs.weight.double())
    expected = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), inputs.grad.double()), strict=True))}
    found = MixedTruth(inputs)
    tail = found.tail(leaves)
    for name, each in expected.items():
        torch.testing.assert_close(tail[name] + found.base.get(name, 0), each.detach())


def wrong(change) -> Call:
    """The op on changed tensors, bound to the right ones."""
    inputs = inputs_of(CELL, CPU)
    leaves = inputs.leaves(None)

    def forward():
        a, b = ([leaf for name, leaf in leaves.items() if name[0] == letter] for letter in "AB")
        given = {"lora_A": a, "lora_B": b, "scalings": inputs.scalings, "rows": inputs.rows}
        return mixed_lora_linear(leaves["x"], inputs.weight, None, **given | change(given))

    return Call(forward, leaves, inputs.grad, {"weight": inputs.weight})


WRONG = {
    "other adapters": lambda given: {"rows": [g if g < 0 else 1 - g for g in given["rows"]]},
    "none for one sample": lambda given: {"rows": [-1, *given["rows"][1:]]},
    "an adapter for one that has none": lambda given: {"rows": [max(g, 0) for g in given["rows"]]},
    "one scaling": lambda given: {"scalings": [given["scalings"][0]] * 2},
    "a scaling 1 % off": lambda given: {"scalings": [0.99 * each for each in given["scalings"]]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(change):
    assert MixedTruth(inputs_of(CELL, CPU)).verify(wrong(lambda given: {})).problems == []
    assert MixedTruth(inputs_of(CELL, CPU)).verify(wrong(change)).problems


def test_it_is_measured(run):
    document = run(peers.IMPLEMENTATIONS, (CELL,), bench=BENCH)
    assert [row["impl"] for row in document["results"]] == [report.FLOOR, *HERE]
    assert {row["status"] for row in document["results"]} == {"ok"}


def test_the_cells():
    assert CELL.rows == [0, 1, -1, 0, 1, -1, 0] and CELL.ranks == [4, 2]
    first, more = bench.tiers(tiny=False)
    assert [(c.name, c.B, c.S, c.K, c.N, c.r, c.adapters) for c in first] == [
        ("llama3-8b q/o", 8, 2048, 4096, 4096, 16, 4), ("llama3-8b q/o", 8, 1, 4096, 4096, 16, 4),
    ]  # fmt: skip
    assert {c.r for c in more} == {64}
    (tiny, _) = bench.tiers(tiny=True)[0]
    assert tiny.dtype == "bf16" and -1 in tiny.rows and {0, 1} <= set(tiny.rows)
    (given,) = bench.cells(Request(shapes=((5, 3, 16, 24),), ranks=(8,)))
    assert given.shape() == {"name": "given", "B": 5, "S": 3, "K": 16, "N": 24, "r": 8, "adapters": 4}
    sizes = {"B": 7, "S": 13, "K": 48, "N": 40, "itemsize": 4}
    assert CELL.work(False, "fwd") == cost.mixed_lora_linear("fwd", **sizes, served=((3, 4), (2, 2)))
    assert CELL.work(True, "bwd") == cost.mixed_lora_linear("bwd", **sizes, served=())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": ((1, 2, 3),)}, "--shape 1,2,3 is not B,S,K,N"),
        ({"shapes": ("lorafusion-grid",)}, "has no samples: it is for `fastpeft bench lora`"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(options, words):
    with pytest.raises(FastpeftError, match=words):
        bench.cells(Request(**options))


@pytest.mark.cuda
def test_peers_pass_the_check_on_the_gpu():
    inputs = inputs_of(Cell("tiny", 7, 256, 512, 384, 16, 4, "bf16"), torch.device("cuda"))
    found = MixedTruth(inputs)
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name != report.FLOOR:
            assert found.verify(implementation.build(inputs), implementation.rms_bound).problems == []
