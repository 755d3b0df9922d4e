"""The benchmark of lora_mlp: its truth, its peers, what it refuses, its cells, on tiny shapes."""

import dataclasses

import pytest
import torch

from benchmarks import bench_lora_mlp as bench
from benchmarks import lora_mlp_peers as peers
from benchmarks import report
from benchmarks.bench_lora_mlp import BENCH, Cell, inputs_of
from benchmarks.harness import Call
from benchmarks.lora_mlp_truth import MlpTruth
from benchmarks.request import Request
from fastpeft import cost
from fastpeft.errors import FastpeftError
from fastpeft.ops import lora_mlp
from fastpeft.ops.lora_mlp import Projection

CPU = torch.device("cpu")
CELL = Cell("tiny", 91, 48, 40, 4, "fp32")
HERE = ["peft-fp32", "peft", "addmm-algebra", "fastpeft:separate", "fastpeft", "fastpeft:recompute", "fastpeft-fp32"]
HERE += ["fastpeft:torch"]
NAMES = {"x", "y", *(f"{letter}{i}" for letter in "AB" for i in range(3))}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_implementation_is_right(dtype):
    inputs = inputs_of(dataclasses.replace(CELL, M=400, dtype=dtype), CPU)
    judge, checked = MlpTruth(inputs), []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name == report.FLOOR or implementation.compiled:
            continue
        verdict = judge.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.gain) == NAMES
        checked.append(implementation.name)
    assert checked == HERE


@pytest.mark.interpreter
def test_the_kernels_are_right():
    inputs = inputs_of(dataclasses.replace(CELL, dtype="fp16"), CPU)
    verdict = MlpTruth(inputs).verify(peers.build_fastpeft(inputs, backend="triton"))
    assert verdict.problems == []


def wrong(change) -> Call:
    """The op on changed projections, bound to the right ones."""
    inputs = inputs_of(CELL, CPU)
    leaves = inputs.leaves(None)

    def forward():
        given = [
            Projection(weight, None, leaves[f"A{i}"], leaves[f"B{i}"], inputs.scaling)
            for i, weight in enumerate(inputs.weights)
        ]
        return lora_mlp(leaves["x"], *change(*given))

    return Call(forward, leaves, inputs.grad, inputs.frozen)


WRONG = {
    "gate for up": lambda gate, up, down: (up, gate, down),
    "up's A for gate's": lambda gate, up, down: (
        gate._replace(lora_A=up.lora_A),
        up._replace(lora_A=gate.lora_A),
        down,
    ),
    "a scaling 1 % off": lambda gate, up, down: (gate, up, down._replace(scaling=0.99 * down.scaling)),
    "no adapter on up": lambda gate, up, down: (gate, up._replace(scaling=0.0), down),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(change):
    assert MlpTruth(inputs_of(CELL, CPU)).verify(wrong(lambda *given: given)).problems == []
    assert MlpTruth(inputs_of(CELL, CPU)).verify(wrong(change)).problems


def test_it_is_measured(run):
    document = run(peers.IMPLEMENTATIONS, (CELL,), bench=BENCH)
    assert [row["impl"] for row in document["results"]] == [report.FLOOR, *HERE]
    assert {row["status"] for row in document["results"]} == {"ok"}


def test_the_cells():
    first, _, more = bench.tiers(tiny=False)
    assert [(c.name, c.K, c.H, c.r) for c in (*first, *more)] == [("llama3-8b mlp", 4096, 14336, r) for r in (16, 32)]
    assert [cell.dtype for cell in bench.tiers(tiny=True)[0]] == ["bf16"]
    (given,) = bench.cells(Request(shapes=((65, 16, 24),), ranks=(8,)))
    assert given.shape() == {"name": "given", "M": 65, "K": 16, "H": 24, "r": 8}
    sizes = {"M": 91, "K": 48, "H": 40, "N": 48, "itemsize": 4}
    assert CELL.work(False, "fwd") == cost.lora_mlp("fwd", **sizes, r=4)
    assert CELL.work(True, "bwd") == cost.lora_mlp("bwd", **sizes, r=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": ((1, 2),)}, "--shape 1,2 is not M,K,H"),
        ({"shapes": ("lorafusion-grid",)}, "has no MLP: it is for `fastpeft bench lora`"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(options, words):
    with pytest.raises(FastpeftError, match=words):
        bench.cells(Request(**options))
