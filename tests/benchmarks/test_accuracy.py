"""Right or no figure: the check inside the benchmarks passes what is right and stops every planted fault."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks import accuracy, bench_lora_linear, bench_lora_mlp, bench_lora_projections, report
from benchmarks import lora_linear_peers as peers
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


def test_the_bounds_are_strict():
    truth, wrong = torch.linspace(1, 2, 64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    wrong[1::2] = -1.0
    eager = truth + 0.005 * truth.square().mean().sqrt() * wrong
    for excess, problems in ((0.99, 0), (1.01, 1)):
        noisy, scaled = Verdict(), Verdict()
        judge(noisy, "A", truth + excess * 1.1 * (eager - truth), Expected("dA", eager, truth), 1.1, "")
        judge(scaled, "A", (1 + excess * 0.002) * truth, Expected("dA", eager, truth), 1.1, "")
        assert [" rms " in text for text in noisy.problems] == [True] * problems, noisy
        assert [" gain " in text for text in scaled.problems] == [True] * problems, scaled


# Of one row and rank 16 few numbers are rounded, of four rows too, of five no more.
FEW = {
    "linear": (bench_lora_linear, Cell("one", 1, 128, 96, 16, 0.0, "bf16")),
    "dropout": (bench_lora_linear, Cell("one", 1, 128, 96, 16, 0.5, "bf16")),
    "mlp": (bench_lora_mlp, bench_lora_mlp.Cell("one", 1, 96, 160, 16, "bf16")),
    "projections": (bench_lora_projections, bench_lora_projections.Cell("one", 1, 128, 96, 64, 3, 16, "bf16")),
}
DRAWS = max(accuracy.POOLED_NUMBERS) // 16


@dataclass
class Changed(Call):
    """A call whose results `change` gets by name, with the number of the run, and may change."""

    change: Callable = lambda results, run: None
    runs: int = 0

    def run(self):
        y, gradients = super().run()
        results = accuracy.named(y, self.leaves, gradients)
        self.runs += 1
        if self.runs > 0:
            self.change(results, self.runs)
        ys = tuple(each for name, each in results.items() if name[0] == "y")
        return ys if isinstance(y, tuple) else ys[0], tuple(results[name] for name in self.leaves)


def few_rows(kind, change=lambda results, run: None, implementation="fastpeft", scaling=1.0, **sizes):
    """The cell's tensors, their truth and a call bound to them. Runs that read a mask, two, are not counted."""
    bench, cell = FEW[kind]
    inputs = bench.inputs_of(replace(cell, **sizes), CPU)
    (found,) = (each for each in bench.IMPLEMENTATIONS if each.name == implementation)
    call = found.build(replace(inputs, scaling=scaling * inputs.scaling))
    return inputs, bench.BENCH.truth(inputs), Changed(**vars(call), change=change, runs=-2 if kind == "dropout" else 0)


@pytest.mark.parametrize("kind", FEW)
def test_of_one_row_what_is_right_passes_by_many_draws_where_one_is_not_enough(kind, monkeypatch):
    pooled = 0
    for name in ("peft", "fastpeft"):
        for seed in range(8):
            _, truth, call = few_rows(kind, implementation=name, name=f"one {seed}")
            verdict = truth.verify(call)
            assert verdict.problems == [], (name, seed)
            if call.runs > 1:
                pooled += 1
                with monkeypatch.context() as alone:
                    alone.setattr(accuracy, "FEW_NUMBERS", 0)
                    assert truth.verify(call).problems, (name, seed)
    assert pooled > 0


def of_first(letter, change):
    """The change of the first result whose name begins so."""
    return lambda results, run: change(next(each for name, each in results.items() if name[0] == letter))


ZERO_DB = of_first("B", torch.Tensor.zero_)
FAULTS_OF_FEW = {
    "noise in dX": (of_first("x", lambda dx: dx.add_(0.01 * dx.std() * torch.randn_like(dx))), "dX: rms error"),
    "scale of dA": (of_first("A", lambda da: da.mul_(1.01)), ": gain 1.0"),
    "scale of y": (of_first("y", lambda y: y.mul_(1.01)), ": gain 1.0"),
    "dB is zero": (ZERO_DB, ": zero everywhere"),
    "the first draw is unwritten": (
        lambda results, run: results["x"].fill_(float("nan")) if run == 1 else None,
        "dX: not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_OF_FEW)
@pytest.mark.parametrize("kind", FEW)
def test_of_one_row_a_planted_fault_is_seen(kind, fault):
    change, expected = FAULTS_OF_FEW[fault]
    _, truth, call = few_rows(kind, change)
    problems = truth.verify(call).problems
    assert any(expected in problem for problem in problems), problems
    assert call.runs == DRAWS


@pytest.mark.parametrize("kind", [kind for kind in FEW if kind != "dropout"])
def test_of_one_row_a_scaling_that_is_1_percent_off_is_seen(kind):
    _, truth, call = few_rows(kind, scaling=1.01)
    problems = truth.verify(call).problems
    assert any("gain of the low-rank part 1.0" in problem for problem in problems), problems


@pytest.mark.parametrize("kind", FEW)
def test_the_truth_of_many_draws_is_that_of_each(kind, monkeypatch):
    trials = []
    monkeypatch.setattr(accuracy, "_judged", lambda trial, *results: trials.append(trial) or Verdict())
    _, truth, call = few_rows(kind, M=3)
    truth.verify(call)
    (trial,) = trials
    orders = [trial.given, tuple(each.flip(-1) for each in trial.given)]
    found = trial.exact(tuple(map(torch.stack, zip(*orders, strict=True))))
    for i, given in enumerate(orders):
        expected = trial.exact(given)
        torch.testing.assert_close([{name: each[i] for name, each in part.items()} for part in found], list(expected))
    torch.testing.assert_close(trial.exact(None), trial.exact(trial.given))


@pytest.mark.parametrize("kind", FEW)
def test_of_one_row_a_call_that_writes_into_an_adapter_is_seen(kind):
    _, truth, call = few_rows(kind)
    forward, adapter = call.forward, next(leaf for name, leaf in call.leaves.items() if name[0] == "A")

    def writes():
        adapter.data.mul_(1.02)
        return forward()

    call.forward = writes
    assert truth.verify(call).problems


def bits(inputs, call):
    grads = call.grad if isinstance(call.grad, tuple) else (call.grad,)
    tensors = [*call.leaves.values(), *call.frozen.values(), *grads]
    for each in vars(inputs).values():
        tensors += each if isinstance(each, list | tuple) else [each] if isinstance(each, torch.Tensor) else []
    return [each.detach().clone().view(torch.uint8) for each in tensors]


@pytest.mark.parametrize("fails_at", [None, 3])
@pytest.mark.parametrize("kind", FEW)
def test_the_draws_leave_the_tensors_as_they_were(kind, fails_at):
    """And each is another, of the same values, in the truth's tensors as in the call's."""
    seen = []

    def note(results, run):
        if run == fails_at:
            raise RuntimeError("planted")
        assert torch.equal(call.leaves["x"], inputs.x)
        seen.append(inputs.x[0].clone())
        ZERO_DB(results, run)

    inputs, truth, call = few_rows(kind, note)
    before = bits(inputs, call)
    with pytest.raises(RuntimeError, match="planted") if fails_at else contextlib.nullcontext():
        truth.verify(call)
    assert all(map(torch.equal, before, bits(inputs, call)))
    assert len(seen) == len({tuple(x.tolist()) for x in seen}) == (fails_at - 1 if fails_at else DRAWS)
    assert all(torch.equal(x.sort().values, inputs.x[0].sort().values) for x in seen)


@pytest.mark.parametrize("kind", FEW)
def test_draws_may_be_returned_in_the_same_tensors_and_take_no_random_numbers(kind):
    """As of a replayed graph, whose dY may be its own. The first is off by half a percent, so that there are others."""
    kept = {}

    def replayed(results, run):
        for name, each in results.items():
            results[name] = kept.setdefault(name, torch.empty_like(each)).copy_(each)
        if run == 1:
            results["x"].mul_(1.005)

    _, truth, call = few_rows(kind, replayed)
    call.grad = tuple(map(torch.clone, call.grad)) if isinstance(call.grad, tuple) else call.grad.clone()
    assert truth.verify(call).problems == []
    assert call.runs > 1
    if kind != "dropout":
        state = torch.get_rng_state()
        torch.manual_seed(accuracy.SEED)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("rows", "draws"), [(4, DRAWS // 4), (5, 1), (91, 1)])
@pytest.mark.parametrize("kind", FEW)
def test_of_many_rows_one_draw_is_judged(kind, rows, draws):
    _, truth, call = few_rows(kind, ZERO_DB, M=rows)
    assert truth.verify(call).problems
    assert call.runs == draws


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_peers_pass_the_check_on_the_gpu(dropout):
    device = torch.device("cuda")
    inputs = inputs_of(Cell("small", 1024, 512, 256, 16, dropout, "bf16"), device)
    for build in (peers.build_addmm, lambda i: peers.build_peft(i, autocast_adapter_dtype=False)):
        assert truth_of(inputs).verify(build(inputs), PEER_RMS_RATIO).problems == []
