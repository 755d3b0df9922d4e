"""The benchmark of lora_projections: its truth, its peers, what it refuses, its cells, on tiny shapes."""

import dataclasses

import pytest
import torch

from benchmarks import bench_lora_projections as bench
from benchmarks import lora_projections_peers as peers
from benchmarks import report
from benchmarks.bench_lora_projections import BENCH, Cell, inputs_of
from benchmarks.harness import Call
from benchmarks.lora_projections_truth import ProjectionsTruth, matrices, one_by_one
from benchmarks.request import Request
from fastpeft import cost
from fastpeft.errors import FastpeftError
from fastpeft.ops import lora_projections

CPU = torch.device("cpu")
CELL = Cell("tiny", 91, 48, 40, 24, 3, 4, "fp32")
HERE = ["peft-fp32", "peft", "addmm-algebra", "fastpeft:separate", "fastpeft", "fastpeft-fp32", "fastpeft:torch"]
NAMES = {"x", *(f"{letter}{i}" for letter in "yAB" for i in range(3))}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_implementation_is_right(dtype):
    inputs = inputs_of(dataclasses.replace(CELL, M=400, dtype=dtype), CPU)
    judge, checked = ProjectionsTruth(inputs), []
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
    verdict = ProjectionsTruth(inputs).verify(peers.build_fastpeft(inputs, backend="triton"))
    assert verdict.problems == []


def test_the_truth_is_the_plain_form_in_float64():
    inputs = inputs_of(CELL, CPU)
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves(None).items()}
    ys = one_by_one(leaves, [weight.double() for weight in inputs.weights], inputs.scaling)
    gradients = torch.autograd.grad(ys, list(leaves.values()), tuple(grad.double() for grad in inputs.grads))
    expected = {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(leaves, gradients, strict=True))
    found = ProjectionsTruth(inputs)
    tail = found.tail(leaves)
    assert expected.keys() == NAMES
    for name, each in expected.items():
        torch.testing.assert_close(tail[name] + found.base.get(name, 0), each)


def wrong(change) -> Call:
    """The op on changed lists, bound to the right ones."""
    inputs = inputs_of(CELL, CPU)
    leaves = inputs.leaves(None)

    def forward():
        given = {"weights": inputs.weights, "lora_As": matrices(leaves, "A"), "lora_Bs": matrices(leaves, "B")}
        given |= {"scalings": [inputs.scaling] * 3}
        return tuple(lora_projections(leaves["x"], biases=None, **given | change(given)))

    return Call(forward, leaves, inputs.grads, inputs.frozen)


def _swapped(each):
    return [each[0], each[2], each[1]]


WRONG = {
    "k's A for v's": lambda given: {"lora_As": _swapped(given["lora_As"])},
    "k's B for v's": lambda given: {"lora_Bs": _swapped(given["lora_Bs"])},
    "k's weight for v's": lambda given: {"weights": _swapped(given["weights"])},
    "a scaling 1 % off": lambda given: {"scalings": [given["scalings"][0]] * 2 + [given["scalings"][0] * 0.99]},
    "no adapter": lambda given: {"scalings": [0.0, *given["scalings"][1:]]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(change):
    assert ProjectionsTruth(inputs_of(CELL, CPU)).verify(wrong(lambda given: {})).problems == []
    assert ProjectionsTruth(inputs_of(CELL, CPU)).verify(wrong(change)).problems


def test_it_is_measured(run):
    document = run(peers.IMPLEMENTATIONS, (CELL,), bench=BENCH)
    assert [row["impl"] for row in document["results"]] == [report.FLOOR, *HERE]
    assert {row["status"] for row in document["results"]} == {"ok"}


def test_the_cells():
    assert CELL.sizes == (40, 24, 24)
    first, _, more = bench.tiers(tiny=False)
    assert [(c.name, c.K, c.sizes, c.r) for c in first] == [
        ("llama3-8b q,k,v", 4096, (4096, 1024, 1024), 16), ("llama3-8b gate,up", 4096, (14336, 14336), 16),
    ]  # fmt: skip
    assert {c.r for c in more} == {64} and len({c.M for c in (*first, *more)}) == 1
    assert [cell.dtype for cell in bench.tiers(tiny=True)[0]] == ["bf16"] * 2
    (given,) = bench.cells(Request(shapes=((65, 16, 24, 8),), ranks=(8,)))
    assert given.shape() == {"name": "given", "M": 65, "K": 16, "N": 24, "N2": 8, "count": 3, "r": 8}
    sizes = {"M": 91, "K": 48, "N": (40, 24, 24), "itemsize": 4}
    assert CELL.work(False, "fwd") == cost.lora_projections("fwd", **sizes, r=4)
    assert CELL.work(True, "bwd") == cost.lora_projections("bwd", **sizes, r=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shapes": ((1, 2),)}, "--shape 1,2 is not M,K,N,N2"),
        ({"shapes": ("lorafusion-grid",)}, "has no layers that share an input: it is for `fastpeft bench lora`"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(options, words):
    with pytest.raises(FastpeftError, match=words):
        bench.cells(Request(**options))


@pytest.mark.cuda
def test_peers_pass_the_check_on_the_gpu():
    inputs = inputs_of(Cell("tiny", 1792, 512, 384, 128, 3, 16, "bf16"), torch.device("cuda"))
    found = ProjectionsTruth(inputs)
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.name != report.FLOOR and not implementation.compiled:
            assert found.verify(implementation.build(inputs), implementation.rms_bound).problems == []
