"""The benchmark harness: order, statistics, peers, memory, budget, report and command line, on tiny shapes."""

import copy
import itertools
import json
from dataclasses import replace

import numpy
import pytest
import torch

from benchmarks import harness, report
from benchmarks import lora_linear_peers as peers
from benchmarks.baselines import Implementation
from benchmarks.bench_lora_linear import BENCH, Cell, inputs_of
from benchmarks.benches import BY_OP
from benchmarks.harness import Budget, Call, CpuTimer, Sample
from benchmarks.rows import Prepared, row_of
from benchmarks.runner import cells_of, in_turns, plan_of

CPU = torch.device("cpu")
PLAIN = Cell("tiny", 128, 128, 96, 16, 0.0, "bf16")
DROPPED = Cell("tiny", 128, 128, 96, 16, 0.5, "bf16")


def tiny_call(note=lambda: None) -> Call:
    x = torch.ones(2, requires_grad=True)

    def forward():
        note()
        return x * 2

    return Call(forward, {"x": x}, torch.ones(2))


# Order and statistics


def test_rounds_are_interleaved():
    order = []
    calls = {name: tiny_call(lambda name=name: order.append(name)) for name in "ABC"}
    samples = harness.interleave(CpuTimer(), calls, {}, rounds=(4, 4), seconds=0.0)
    assert "".join(order) == "ABC" * 4
    assert {name: len(found) for name, found in samples.items()} == {"A": 4, "B": 4, "C": 4}


def test_rounds_stop_at_the_time_but_never_below_the_least():
    calls = {"A": tiny_call()}
    assert len(harness.interleave(CpuTimer(), calls, {}, rounds=(3, 1000), seconds=0.0)["A"]) == 3
    assert len(harness.interleave(CpuTimer(), calls, {}, rounds=(3, 7), seconds=60.0)["A"]) == 7


def test_cpu_timer_on_a_fake_clock():
    ticks = iter([0.0, 0.002, 0.007, 1.0, 1.001, 1.010])
    timer = CpuTimer(lambda: next(ticks))
    found = timer.round({"A": tiny_call(), "B": tiny_call()}, {})
    assert found["A"].forward_ms == pytest.approx(2) and found["A"].total_ms == pytest.approx(7)
    assert found["B"].forward_ms == pytest.approx(1) and found["B"].total_ms == pytest.approx(10)


@pytest.mark.parametrize("values", [[3.0], [5.0, 1.0], [9.0, 1.0, 4.0, 7.0, 2.0], list(map(float, range(41, 0, -1)))])
def test_summary_is_numpys(values):
    summary = harness.summarise(values)
    expected = numpy.quantile(values, [0.5, 0.2, 0.8])
    assert (summary.median, summary.p20, summary.p80) == pytest.approx(tuple(expected))
    assert summary.rounds == len(values)


def test_paired_ratio_is_blind_to_drift():
    drift = [1.0, 1.7, 0.6, 2.2, 1.1]
    ratio = harness.paired_ratio([3 * d for d in drift], [2 * d for d in drift])
    assert (ratio.median, ratio.p20, ratio.p80) == pytest.approx((1.5, 1.5, 1.5))


def test_overhead_and_speedup_come_from_the_samples():
    samples = {
        "frozen": [Sample(1.0, 2.0), Sample(2.0, 4.0), Sample(1.0, 2.0)],
        "peft": [Sample(1.0, 3.0), Sample(2.0, 6.0), Sample(1.0, 3.0)],
        "fastpeft": [Sample(1.5, 2.2), Sample(2.0, 4.4), Sample(1.0, 2.2)],
    }
    ours = next(i for i in BENCH.implementations if i.name == "fastpeft")
    row = row_of(BENCH, PLAIN, Prepared(ours, "ok"), samples)
    assert row["median_ms"] == 2.2 and row["forward_ms"] == 1.5 and row["rounds"] == 3
    assert row["overhead_over_floor"] == pytest.approx(0.1)
    assert row["speedup_vs"] == {"peft": pytest.approx(3 / 2.2)}
    assert row["tflops"] == pytest.approx((4 * 128 * 128 * 96 + 6 * 128 * 16 * (128 + 96)) / 2.2e-3 / 1e12)


# The peers


def test_the_peft_baseline_is_pefts_own_layer():
    import peft

    inputs = inputs_of(PLAIN, CPU)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        layer = peers._peft_layer(inputs, autocast)
        assert type(layer) is peft.tuners.lora.layer.Linear
        assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == dtype
        assert layer.base_layer.weight.data_ptr() == inputs.weight.data_ptr() and layer.training


def test_a_missing_baseline_is_named(monkeypatch, run, named):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    document = run(named("frozen", "peft"))
    assert [row["status"] for row in document["results"]] == ["ok", "missing"]
    assert "lora_linear: peft: missing: peft is not installed" in report.table(document)
    assert report.exit_code(document) == 0


def test_what_raises_is_named_and_the_rest_is_measured(capsys, run, named):
    def build(inputs):
        raise RuntimeError("no such kernel")

    document = run([Implementation("planted", "planted", build, peer=False), *named("frozen")])
    assert [row["status"] for row in document["results"]] == ["failed", "ok"]
    assert document["results"][0]["note"] == "RuntimeError: no such kernel"
    assert "no such kernel" in capsys.readouterr().err
    assert report.exit_code(document) == 1


# Memory and the ledger


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    m, k, n, r = PLAIN.M, PLAIN.K, PLAIN.N, PLAIN.r
    inputs = inputs_of(PLAIN, CPU)
    assert harness.measure_memory(peers.build_frozen(inputs), CPU).saved == 0
    assert harness.measure_memory(peers.build_addmm(inputs), CPU).saved == 2 * (m * k + m * r)
    x = torch.randn(m, k, requires_grad=True)
    twice = Call(lambda: (x * x) * x.view(k, m).view(m, k), {"x": x}, torch.ones(m, k))
    assert harness.measure_memory(twice, CPU).saved == 2 * 4 * m * k  # x once, x² once
    dropped = harness.measure_memory(peers.build_addmm(inputs_of(DROPPED, CPU)), CPU).saved
    assert dropped == 2 * (m * k + m * r) + m * k  # and a mask of one byte per element
    assert n != k


def test_the_ledger_of_llamas_q_projection():
    cell = Cell("q/o", 8192, 4096, 4096, 16, 0.0, "bf16")
    base, ours = (cell.work(frozen, "fwd+bwd") for frozen in (True, False))
    assert base.flops == 4 * 8192 * 4096**2
    assert ours.flops / base.flops - 1 == pytest.approx(1.5 * 16 * (2 / 4096))
    # x once more, for dA; S written and read; A and B read twice, their gradients written.
    assert ours.bytes - base.bytes == 2 * (8192 * 4096 + 2 * 8192 * 16 + 3 * 16 * 2 * 4096)


# Budget, plan, report


def test_a_spent_budget_stops_the_run_and_names_what_is_missing(run, named):
    cells = [Cell("tiny", 16, 16, 16, r, 0.0, "bf16") for r in (1, 2, 3, 4)]
    now = itertools.count(0, 10).__next__  # ten seconds go by between any two looks at the clock
    document = run(named("frozen"), cells, budget=Budget(75, now))
    measured = [row["shape"]["r"] for row in document["results"]]
    missing = [e for e in document["unmeasured"] if e["impl"] is None]
    assert measured == [1, 2] and [entry["cell"] for entry in missing] == [c.id for c in cells[2:]]
    assert all(entry["reason"] == "the budget of 75 s was spent" for entry in missing)
    assert f"not measured: lora_linear: {cells[3].id}: the budget of 75 s was spent" in report.table(document)


def test_budget_leaves_room_for_one_more_like_the_last():
    budget = Budget(100, iter([0.0, 50.0, 50.0, 50.0]).__next__)
    assert budget.allows([20, 30, 40]) and not budget.allows([34]) and not budget.allows([], reserve=50)


def test_a_run_is_taken_up_where_it_stopped(run, named):
    cells = [PLAIN, DROPPED]
    document = run(named("frozen"), cells)
    kept = copy.deepcopy(document["results"][0])
    del document["results"][1]
    again = run(named("frozen"), cells, document=json.loads(json.dumps(document)))
    assert again["results"][0] == kept and [row["dropout"] for row in again["results"]] == [0.0, 0.5]


def test_what_is_compiled_comes_last_and_in_rounds_with_ours(run, named):
    """Its figures are of rounds with the floor and ours; ours keeps its own, and gets the ratio to it."""
    (addmm,) = named("addmm-algebra")
    members = [replace(addmm, name="compiled", compiled=True), *named("frozen", "peft", "fastpeft")]
    plan = plan_of([(BENCH, PLAIN), (BENCH, DROPPED)], "cpu", budget_s=100.0, quick=True, passes=("fwd", "fwd+bwd"))
    plan["without"] = {}
    plan["cells"][0]["compiled"] = True
    document = run(members, document=report.new_document(plan))
    assert [(row["impl"], row["pass"], row["dropout"]) for row in document["results"]] == [
        *((name, passed, p) for p in (0.0, 0.5) for passed in plan["passes"]
          for name in ("frozen", "peft", "fastpeft")),
        ("compiled", "fwd", 0.0), ("compiled", "fwd+bwd", 0.0),
    ]  # fmt: skip
    ours = [row for row in document["results"] if row["impl"] == "fastpeft"]
    assert [set(row["speedup_vs"]) for row in ours] == [{"peft", "compiled"}] * 2 + [{"peft"}] * 2
    assert all(row["status"] == "ok" and row["overhead_over_floor"] is not None for row in document["results"])
    before = copy.deepcopy(document["results"])
    assert run(members, document=document)["results"] == before, "nothing is measured twice"


def test_the_plan_begins_with_what_matters_most():
    plan = plan_of(in_turns(list(BY_OP.values())), "cuda", budget_s=400.0)
    cells = cells_of(plan, BY_OP)
    of = {op: [cell for bench, cell in cells if bench.op == op] for op in BY_OP}
    of_lora, of_prefix, of_prompt = of["lora_linear"], of["prefix_attention"], of["gated_prompt_attention"]
    assert {op: len({cell.id for cell in found}) for op, found in of.items()} == {
        "lora_linear": 50, "prefix_attention": 17, "gated_prompt_attention": 6, "prompt_embedding": 3,
        "mixed_lora_linear": 4, "expert_lora_linear": 2, "lora_projections": 16, "lora_mlp": 8, "dora_linear": 4,
    }  # fmt: skip
    assert len(cells) == 110
    assert [(c.name, c.r, c.dropout) for c in of_lora[:4]] == [
        ("llama3-8b q/o", 16, 0.0),
        ("llama3-8b q/o", 16, 0.05),
        ("llama3-8b gate/up", 16, 0.0),
        ("llama3-8b gate/up", 16, 0.05),
    ]
    first = [cell for _, cell in cells[:14]]
    assert first == of_lora[:8] + of_prefix[:3] + of_prompt[:3] and {cell.r for cell in of_lora[:8]} == {16}
    assert {(c.name, c.M, c.r, c.dropout) for c in of_lora[8:11]} == {("lorafusion-grid", 8192, 16, 0.1)}
    assert {(c.name, c.M, c.r, c.dropout) for c in of_lora[47:]} == {("lorafusion-grid", 2048, 16, 0.1)}
    assert [(c.S, c.P, c.H, c.Hkv) for c in of_prefix[:3]] == [(s, 30, 32, 8) for s in (2048, 512, 8192)]
    assert [cell.compiled for cell in of_lora] == [True] * 2 + [False] * 48
    assert [cell.compiled for cell in of_prefix] == [True] * 2 + [False] * 15
    assert all([cell.compiled for cell in of[op]][:2] == [True, False] for op in ("lora_projections", "lora_mlp"))
    assert plan["without"] == {op: {} for op in BY_OP} and json.loads(json.dumps(plan)) == plan


@pytest.fixture
def document(run, named):
    return run(named("frozen", "addmm-algebra"))


def _break(document, change):
    document = copy.deepcopy(document)
    change(document)
    return report.problems(document)


def test_the_schema_accepts_a_run_and_names_every_departure(document):
    assert report.problems(json.loads(json.dumps(document))) == []
    row = document["results"].index(document["results"][-1])
    where = f"document.results[{row}]"
    assert _break(document, lambda d: d["stamp"].pop("driver")) == ["document.stamp.driver is missing"]
    assert _break(document, lambda d: d.update(extra=1)) == ["document.extra is unknown"]
    assert _break(document, lambda d: d.update(schema=1)) == ["document.schema is 1, this reads 2"]
    assert _break(document, lambda d: d["results"][row]["shape"].update(M="1")) == [f"{where}.shape.M is str, not int"]
    assert _break(document, lambda d: d["results"][row].update(rounds=True)) == [f"{where}.rounds is bool, not int"]
    assert _break(document, lambda d: d["results"][row].update(median_ms=None)) == [
        f"{where} is ok and has no median_ms"
    ]
    assert "is wrong and shows" in _break(document, lambda d: d["results"][row].update(status="wrong"))[0]
    assert "is 'fast', not one of" in _break(document, lambda d: d["results"][row].update(status="fast"))[0]


def test_saving_is_whole_and_without_nan(document, tmp_path):
    odd = copy.deepcopy(document)
    odd["results"][-1]["checked"]["rms_ratio"]["y"] = float("inf")
    path = tmp_path / "run.json"
    report.save(odd, path)
    loaded = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert loaded["results"][-1]["checked"]["rms_ratio"]["y"] is None and report.problems(loaded) == []
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_the_source_digest_follows_the_sources(monkeypatch, tmp_path):
    for name in ("kernels", "fastpeft", "benchmarks"):
        (tmp_path / name).mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    first = report.source_digest()
    (tmp_path / "kernels" / "a.py").write_text("2")
    second = report.source_digest()
    (tmp_path / "kernels" / "a.py").rename(tmp_path / "fastpeft" / "a.py")
    assert len({first, second, report.source_digest()}) == 3


# On a GPU


@pytest.mark.cuda
def test_cuda_timer_sees_kernels_not_the_host():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16, requires_grad=True)
    call = Call(lambda: a @ a, {"x": a}, torch.ones_like(a))
    timer = harness.timer_for(device)
    host_ms = harness.warm_up(call, device)[1]
    samples = harness.interleave(
        timer, {"once": call, "again": call}, {"once": host_ms, "again": host_ms}, rounds=(5, 5), seconds=0
    )
    fastest = [min(s.total_ms for s in found) for found in samples.values()]  # others may use the device meanwhile
    # Three products of 0.14 TFLOP: no GPU there is does them in 0.1 ms, and the same work takes the same time.
    assert 0.1 < fastest[0] < 50 and fastest[0] == pytest.approx(fastest[1], rel=0.5)
    assert all(0 < s.forward_ms < s.total_ms for s in samples["once"])


@pytest.mark.cuda
def test_cuda_memory_and_kernels_are_counted():
    device = torch.device("cuda")
    inputs = inputs_of(Cell("small", 1024, 512, 256, 16, 0.0, "bf16"), device)
    call = peers.build_addmm(inputs)
    harness.warm_up(call, device)
    memory = harness.measure_memory(call, device)
    assert memory.saved == 2 * (1024 * 512 + 1024 * 16)
    assert memory.held == 2 * 1024 * 16  # x stood there before
    assert memory.peak >= 2 * (1024 * 256 + 1024 * 512)
    kernels = harness.kernel_profile(call, device)
    assert sum(kernel["launches"] for kernel in kernels) >= 8 and all(kernel["us"] > 0 for kernel in kernels)
