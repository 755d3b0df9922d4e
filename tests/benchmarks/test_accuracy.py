"""Right or no figure: the check inside the benchmarks passes what is right and stops every planted fault."""

import copy

import pytest
import torch

from benchmarks import lora_linear_peers as peers
from benchmarks import report
from benchmarks.accuracy import MAX_RMS_RATIO, PEER_RMS_RATIO, Expected, Verdict, judge
from benchmarks.baselines import Implementation
from benchmarks.bench_lora_linear import Cell, inputs_of, truth_of
from benchmarks.harness import Call
from benchmarks.lora_linear_peers import AddmmLora
from benchmarks.lora_linear_truth import LoraTruth

CPU = torch.device("cpu")
PLAIN = Cell("tiny", 128, 128, 96, 16, 0.0, "bf16")
DROPPED = Cell("tiny", 128, 128, 96, 16, 0.5, "bf16")


@pytest.mark.parametrize("cell", [PLAIN, DROPPED], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_implementation_that_runs_here_is_right(cell, dtype):
    cell = Cell(**{**cell.__dict__, "dtype": dtype})
    inputs = inputs_of(cell, CPU)
    truth = truth_of(inputs)
    checked = []
    for implementation in peers.IMPLEMENTATIONS:
        if implementation.needs_gpu or implementation.compiled or implementation.name == report.FLOOR:
            continue
        verdict = truth.verify(implementation.build(inputs), implementation.rms_bound)
        assert verdict.problems == [], implementation.name
        assert set(verdict.rms_ratio) == {"y", "x", "A", "B"} and set(verdict.tail_gain) == {"y", "x"}
        checked.append(implementation.name)
    assert checked == ["peft-fp32", "peft", "addmm-algebra", "fastpeft", "fastpeft-fp32", "fastpeft:torch"]


class Planted(torch.autograd.Function):
    """AddmmLora with one fault."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling, dropout, fault):
        ctx.fault, ctx.shape = fault, x.shape
        if fault == "seed ignored" and dropout:
            torch.manual_seed(0)
        y = AddmmLora.forward(ctx, x, weight, None, a, b, scaling, dropout)
        if fault == "forward scale":
            y.add_(y - x @ weight.T, alpha=0.01)
        return y[:, :-1] if fault == "shape" else y

    @staticmethod
    def backward(ctx, grad):
        dx, _, _, da, db, _, _ = AddmmLora.backward(ctx, grad)
        if ctx.fault == "scale of dA":
            da = da * 1.01
        elif ctx.fault == "dB is zero":
            db = torch.zeros_like(db)
        elif ctx.fault == "NaN in one place":
            dx[3, 5] = float("nan")
        elif ctx.fault == "noise in dX":
            dx = dx + 0.01 * torch.randn_like(dx)
        elif ctx.fault == "rows unwritten":
            dx[-1] = 0
        elif ctx.fault == "other mask in backward":
            _, mask, *_, a, b = ctx.saved_tensors
            tail = ctx.scaling / (1 - ctx.dropout) * (grad @ b @ a)
            dx = dx - tail * mask + tail * mask.roll(1, 0)
        return dx, None, da, db, None, None, None


def planted(fault):
    def build(inputs):
        leaves = inputs.leaves(None)

        def forward():
            x, a, b = leaves.values()
            return Planted.apply(x, inputs.weight, a, b, inputs.scaling, inputs.dropout, fault)

        return Call(forward, leaves, inputs.grad, {"weight": inputs.weight})

    return Implementation("planted", "planted", build, peer=False, rms_bound=MAX_RMS_RATIO)


FAULTS = {
    "scale of dA": "dA: gain 1.00",
    "forward scale": "y: gain of the low-rank part 1.00",
    "dB is zero": "dB: zero everywhere",
    "NaN in one place": "dX: not finite",
    "noise in dX": "dX: rms error",
    "rows unwritten": "dX: rms error",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_prints_no_speed(fault, run, named):
    document = run([*named(report.FLOOR), planted(fault)], [PLAIN])
    assert report.problems(document) == []
    right, wrong = document["results"]
    assert right["status"] == "ok" and right["median_ms"] > 0
    assert wrong["status"] == "wrong" and FAULTS[fault] in wrong["note"]
    assert [wrong[name] for name in ("median_ms", "p20_ms", "p80_ms", "overhead_over_floor", "tflops")] == [None] * 5
    assert wrong["speedup_vs"] == {} and wrong["checked"]["problems"]
    line = next(line for line in report.table(document).splitlines() if line.split()[:1] == ["tiny"])
    assert line.split()[-1] == "wrong"
    assert report.exit_code(document) == 3


@pytest.mark.parametrize("fault", ["seed ignored", "other mask in backward"])
def test_a_planted_dropout_fault_is_seen(fault):
    inputs = inputs_of(DROPPED, CPU)
    verdict = truth_of(inputs).verify(planted(fault).build(inputs))
    expected = {"seed ignored": "does not depend on torch.manual_seed", "other mask in backward": "y: "}
    assert any(expected[fault] in problem for problem in verdict.problems), verdict.problems


def test_dropout_without_effect_and_at_the_wrong_rate_are_seen():
    inputs = inputs_of(DROPPED, CPU)
    truth = truth_of(inputs)
    for p, expected in ((0.0, "no dropout mask"), (0.4, "no dropout mask")):
        other = copy.copy(inputs)
        other.dropout = p
        assert expected in truth.verify(peers.build_addmm(other)).problems[0]
    rate = copy.copy(inputs)
    rate.dropout, rate.scaling = 0.45, inputs.scaling * 0.55 / 0.5  # the constant looks right, the rate does not
    problems = truth.verify(peers.build_addmm(rate)).problems
    assert any(problem.startswith("keep rate 0.5") for problem in problems), problems


def test_a_check_leaves_the_tensors_as_they_were():
    inputs = inputs_of(DROPPED, CPU)
    call = peers.build_addmm(inputs)
    before = {name: tensor.detach().clone() for name, tensor in {**call.leaves, **call.frozen}.items()}
    grad = call.grad.clone()
    truth_of(inputs).verify(call)
    after = {**call.leaves, **call.frozen}
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(grad, call.grad)


def test_fp32_adapters_must_not_be_rounded():
    inputs = inputs_of(PLAIN, CPU)
    exact = peers.build_fastpeft(inputs, adapter_dtype=torch.float32)
    x, a, b = exact.leaves.values()

    def rounded():
        tail = x @ a.bfloat16().T @ b.bfloat16().T
        return torch.nn.functional.linear(x, inputs.weight) + tail * inputs.scaling

    assert truth_of(inputs).verify(exact).problems == []
    problems = truth_of(inputs).verify(Call(rounded, exact.leaves, inputs.grad, exact.frozen)).problems
    assert any("dA: rms error" in problem for problem in problems), problems


def test_the_oracle_is_the_autograd_of_the_definition():
    inputs = inputs_of(DROPPED, CPU)
    leaves = {name: t.double().detach().requires_grad_() for name, t in inputs.leaves(torch.float32).items()}
    keep = torch.rand(inputs.x.shape) > 0.5
    x, a, b = leaves.values()
    y = x @ inputs.weight.double().T + inputs.scaling * ((x * keep / 0.5) @ a.T) @ b.T
    grads = dict(zip("xAB", torch.autograd.grad(y, (x, a, b), inputs.grad.double()), strict=True))
    truth = LoraTruth(inputs.x, inputs.weight, inputs.grad, inputs.scaling, inputs.dropout)
    tail = truth.tail(a, b, keep)
    torch.testing.assert_close(truth.base["y"] + tail["y"], y)
    torch.testing.assert_close(truth.base["x"] + tail["x"], grads["x"])
    torch.testing.assert_close((tail["A"], tail["B"]), (grads["A"], grads["B"]))


@pytest.mark.parametrize(("numbers", "rms", "gain"), [(None, 1.1, 0.002), (128, 1.1, 0.002), (16, 2.53, 0.0065)])
def test_chance_is_allowed_for_where_few_numbers_are_rounded(numbers, rms, gain):
    """Three standard deviations of a third of them; of as many as eight rows of rank 16 have, nothing."""
    truth, wrong = torch.linspace(1, 2, 64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    wrong[::2], wrong[1::2] = 1.0, -1.0
    eager = truth + 0.005 * truth.square().mean().sqrt() * wrong / wrong.square().mean().sqrt()
    for excess, problems in ((0.99, 0), (1.01, 1)):
        verdict = Verdict()
        judge(
            verdict, "A", truth + excess * rms * (eager - truth), Expected("dA", eager, truth, numbers=numbers), 1.1, ""
        )
        assert len(verdict.problems) == problems, verdict
        scaled = Verdict()
        judge(scaled, "A", (1 + excess * gain) * truth, Expected("dA", eager, truth, numbers=numbers), 1.1, "")
        assert [" gain " in text for text in scaled.problems] == [True] * problems, scaled


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_peers_pass_the_check_on_the_gpu(dropout):
    device = torch.device("cuda")
    inputs = inputs_of(Cell("small", 1024, 512, 256, 16, dropout, "bf16"), device)
    for build in (peers.build_addmm, lambda i: peers.build_peft(i, autocast_adapter_dtype=False)):
        assert truth_of(inputs).verify(build(inputs), PEER_RMS_RATIO).problems == []
