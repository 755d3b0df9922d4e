"""The benchmark of expert_lora_linear: its truth, its peers, what it refuses, its cells, on tiny shapes."""

import dataclasses

import pytest
import torch

from benchmarks import bench_expert_lora_linear as bench
from benchmarks import expert_lora_linear_peers as peers
from benchmarks import report
from benchmarks.bench_expert_lora_linear import BENCH, Cell, inputs_of
from benchmarks.expert_lora_linear_truth import ExpertTruth, by_expert
from benchmarks.harness import Call
from benchmarks.request import Request
from fastpeft import cost
from fastpeft.errors import FastpeftError
from fastpeft.ops import expert_lora_linear

CPU = torch.device("cpu")
CELL = Cell("tiny", 61, 4, 48, 40, 4, "fp32")
HERE = ["peft-fp32", "peft", "loop", "fastpeft", "fastpeft-fp32"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_implementation_is_right(dtype):
    inputs = inputs_of(dataclasses.replace(CELL, M=900, dtype=dtype), CPU)
    judge, checked = ExpertTruth(inputs), []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name == report.FLOOR or implementation.needs_gpu:
            continue
        verdict = judge.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.gain) == {"y", "x", "A", "B"}
        checked.append(implementation.name)
    assert checked == HERE


@pytest.mark.interpreter
def test_the_kernels_are_right():
    inputs = inputs_of(dataclasses.replace(CELL, dtype="fp16"), CPU)
    assert ExpertTruth(inputs).verify(peers.build_fastpeft(inputs, backend="triton")).problems == []


def test_the_truth_is_the_plain_form_in_float64():
    inputs = inputs_of(CELL, CPU)
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves(None).items()}
    y = by_expert(inputs, leaves, inputs.weight.double())
    expected = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), inputs.grad.double()), strict=True))}
    found = ExpertTruth(inputs)
    tail = found.tail(leaves)
    for name, each in expected.items():
        torch.testing.assert_close(tail[name] + found.base.get(name, 0), each.detach())


def wrong(change) -> Call:
    """The op on changed tensors, bound to the right ones."""
    inputs = inputs_of(CELL, CPU)
    leaves = inputs.leaves(None)

    def forward():
        given = {"scaling": inputs.scaling, "ends": inputs.ends, "lora_B": leaves["B"]}
        return expert_lora_linear(leaves["x"], inputs.weight, None, leaves["A"], **given | change(given))

    return Call(forward, leaves, inputs.grad, {"weight": inputs.weight})


WRONG = {
    "a row of the next expert": lambda given: {"ends": given["ends"] - torch.tensor([1, 0, 0, 0])},
    "ranks in the place of experts": lambda given: {
        "lora_B": given["lora_B"].view(40, 4, 4).transpose(1, 2).reshape(40, 16)
    },
    "a scaling 1 % off": lambda given: {"scaling": 0.99 * given["scaling"]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(change):
    assert ExpertTruth(inputs_of(CELL, CPU)).verify(wrong(lambda given: {})).problems == []
    assert ExpertTruth(inputs_of(CELL, CPU)).verify(wrong(change)).problems


def test_it_is_measured(run):
    document = run(peers.IMPLEMENTATIONS, (CELL,), bench=BENCH)
    rows = [row for row in document["results"] if row["status"] == "ok"]
    assert [row["impl"] for row in rows] == [report.FLOOR, *HERE]


def test_the_cells():
    first, more = bench.tiers(tiny=False)
    assert [(c.name, c.M, c.E, c.K, c.N, c.r) for c in (*first, *more)] == [
        ("llama3-8b gate/up", 2 * first[0].M // 2, 8, 4096, 14336, 16),
        ("llama3-8b gate/up", first[0].M, 64, 4096, 1792, 16),
    ]
    assert first[0].M % 4096 == 0
    (tiny,) = bench.tiers(tiny=True)[0]
    assert tiny.dtype == "bf16" and tiny.E == 8
    (given,) = bench.cells(Request(shapes=((5, 3, 16, 24),), ranks=(8,)))
    assert given.shape() == {"name": "given", "M": 5, "E": 3, "K": 16, "N": 24, "r": 8}
    sizes = {"M": 61, "E": 4, "K": 48, "N": 40, "itemsize": 4}
    assert CELL.work(False, "fwd") == cost.expert_lora_linear("fwd", **sizes, r=4)
    assert CELL.work(True, "bwd") == cost.expert_lora_linear("bwd", **sizes, r=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": ((1, 2, 3),)}, "--shape 1,2,3 is not M,E,K,N"),
        ({"shapes": ("lorafusion-grid",)}, "has no experts: it is for `fastpeft bench lora`"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(options, words):
    with pytest.raises(FastpeftError, match=words):
        bench.cells(Request(**options))


@pytest.mark.cuda
def test_peers_pass_the_check_on_the_gpu():
    inputs = inputs_of(Cell("tiny", 700, 8, 512, 384, 16, "bf16"), torch.device("cuda"))
    found = ExpertTruth(inputs)
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name != report.FLOOR:
            assert found.verify(implementation.build(inputs), implementation.rms_bound).problems == []
