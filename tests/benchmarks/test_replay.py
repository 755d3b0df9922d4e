"""Few rows replayed from CUDA graphs, and eager beside them: on a made-up GPU, whose graphs are lists of functions."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_lora_linear, bench_lora_mlp, bench_lora_projections, harness, replay, runner
from benchmarks.baselines import Implementation
from benchmarks.harness import Call, Sample
from benchmarks.predict import predictions
from benchmarks.replay import COVERED, EAGER, GRAPH
from benchmarks.report import FLOOR
from benchmarks.request import Request
from benchmarks.rows import Prepared

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Graph:
    """Counts its replays; its pool is itself."""

    def __init__(self):
        self.replays, self.of_pool = 0, None

    def pool(self):
        return self

    def replay(self):
        self.replays += 1


@pytest.fixture
def capturing(monkeypatch):
    """[graph that is being captured or None], while torch.cuda is a made-up one."""
    now = [None]

    @contextlib.contextmanager
    def graph(of, pool=None):
        assert now[0] is None
        of.of_pool, now[0] = pool, of
        yield
        now[0] = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda which: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return now


def counted_call(capturing) -> tuple[Call, list]:
    """A call, and what it ran: ("forward" or "backward", the graph that was being captured)."""
    x, ran = torch.ones(2, requires_grad=True), []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ran.append(("forward", capturing[0]))
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            ran.append(("backward", capturing[0]))
            return 2 * dy

    entered = contextlib.contextmanager(lambda: (yield ran.append(("context", capturing[0]))))
    return Call(lambda: Doubled.apply(x), {"x": x}, torch.full((2,), 3.0), context=entered), ran


def test_a_call_becomes_two_graphs_that_share_their_memory(capturing):
    call, ran = counted_call(capturing)
    found = replay.captured(call)
    forward, backward = found.graphs
    assert [which for which, graph in ran if graph is None] == ["context", "forward", "context", "backward"] * 3
    assert [pair for pair in ran if pair[1]] == [
        ("context", forward), ("forward", forward), ("context", backward), ("backward", backward)
    ]  # fmt: skip
    assert (forward.of_pool, backward.of_pool) == (None, forward)


def test_a_replay_is_a_launch_and_no_python(capturing):
    call, ran = counted_call(capturing)
    found, before = replay.captured(call), len(ran)
    for _ in range(5):
        y, (dx,) = found.run()
    assert len(ran) == before and [graph.replays for graph in found.graphs] == [5, 5]
    assert y.tolist() == [2.0, 2.0] and not y.requires_grad and dx.tolist() == [6.0, 6.0]
    assert found.leaves is call.leaves and found.frozen is call.frozen and found.activations == call.activations


def test_a_call_that_no_graph_can_hold_is_named(capturing, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(runner, "warm_up", lambda call, device: (0.0, 1.0))
    call, _ = counted_call(capturing)
    found = runner.prepare(Implementation("some", "", lambda inputs: call), None, None, GPU, GRAPH)
    assert found.status == "failed" and "not permitted when stream is capturing" in found.note


class Verdict(SimpleNamespace):
    problems = ()


@pytest.mark.parametrize("launches", [COVERED, EAGER, GRAPH])
def test_what_is_timed_is_what_was_checked(capturing, launches, monkeypatch):
    call, _ = counted_call(capturing)
    host_ms = {Call: 5.0, replay.Replayed: 0.1}
    monkeypatch.setattr(runner, "warm_up", lambda call, device: (7.0, host_ms[type(call)]))
    monkeypatch.setattr(runner, "measure_memory", lambda call, device, count_saved: ("memory of", type(call)))
    checked = []
    truth = SimpleNamespace(verify=lambda call, bound: checked.append(call) or Verdict())
    found = runner.prepare(Implementation("some", "", lambda inputs: call), None, truth, GPU, launches)
    assert checked == [found.call] and isinstance(found.call, replay.Replayed) == (launches == GRAPH)
    assert (found.first_s, found.host_ms) == (7.0, 0.1 if launches == GRAPH else 5.0)
    assert found.memory == ("memory of", Call)


@pytest.mark.parametrize(("launches", "covered"), [(COVERED, True), (GRAPH, True), (EAGER, False)])
def test_only_eager_calls_begin_on_an_idle_device(launches, covered, monkeypatch):
    """The timer covers the host's time of those that it is told that time of."""
    cell = bench_lora_linear.Cell("some", 8, 16, 16, 8, 0.0, "bf16", launches=launches)
    asked = []
    run = object.__new__(runner.Run)
    run.device, run.plan = GPU, {"rounds": [1, 1], "seconds_per_cell": 0.0, "passes": []}
    run._enter = lambda *_: None
    prepared = Prepared(Implementation("some", "", None), "ok", call=object(), host_ms=5.0)
    monkeypatch.setattr(runner, "prepare", lambda *arguments: asked.append(arguments[-1]) or prepared)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def round(calls, host_ms):
        asked.append(host_ms)
        return {name: Sample(1.0, 2.0) for name in calls}

    bench = SimpleNamespace(op="lora_linear", inputs=lambda *_: None, truth=lambda inputs: None)
    run._cell(bench, cell, SimpleNamespace(round=round), [prepared.implementation])
    assert asked == [launches, {"some": 5.0} if covered else {}]


def test_a_cpu_has_one_way():
    cell = bench_lora_linear.Cell("some", 8, 16, 16, 8, 0.0, "bf16", launches=GRAPH)
    assert runner.launches_of(cell, CPU) == COVERED and runner.launches_of(cell, GPU) == GRAPH
    assert runner.launches_of(SimpleNamespace(), GPU) == COVERED
    small = bench_lora_linear.cells(Request(shapes=((8, 64, 64),), tiny=True))
    assert {cell.launches for cell in small} == {COVERED} and {cell.name for cell in small} == {"given"}


def test_few_rows_are_replayed_and_eager_and_many_are_neither():
    def ways(rows):
        found = bench_lora_linear.cells(Request(shapes=((rows, 4096, 4096),), dropouts=(0.0,)))
        return [(cell.name, cell.launches, cell.M) for cell in found]

    assert ways(64) == [("given, replayed", GRAPH, 64), ("given, eager", EAGER, 64)]
    assert ways(65) == [("given", COVERED, 65)]


@pytest.mark.parametrize("bench", [bench_lora_linear, bench_lora_projections, bench_lora_mlp], ids=lambda b: b.OP)
def test_few_rows_of_every_op_are_of_the_first_tier_s_layers(bench):
    (few,) = [tier for tier in bench.tiers(False) if tier[0].M == 1]
    first = bench.tiers(False)[0]
    names = [cell.name for cell in first[:4:2] if bench is bench_lora_linear] or [cell.name for cell in first]
    wanted = [(f"{name}, {way}", m) for m in (1, 8, 64) for name in names for way in ("replayed", "eager")]
    assert [(cell.name, cell.M) for cell in few] == wanted and {cell.r for cell in few} == {16}
    assert {(cell.launches, cell.name.rpartition(", ")[2]) for cell in few} == {(GRAPH, "replayed"), (EAGER, "eager")}
    assert len({runner.key_of(bench.BENCH, cell) for cell in few}) == len(few)


@pytest.mark.parametrize(
    ("bench", "shape"), [(bench_lora_projections, (8, 64, 32, 16)), (bench_lora_mlp, (8, 64, 32))], ids=["qkv", "mlp"]
)
def test_few_rows_by_numbers_are_replayed_and_eager_on_a_gpu(bench, shape):
    found = bench.cells(Request(shapes=(shape,)))
    assert [(cell.name, cell.launches) for cell in found] == [("given, replayed", GRAPH), ("given, eager", EAGER)]
    assert [cell.launches for cell in bench.cells(Request(shapes=(shape,), tiny=True))] == [COVERED]
    assert [cell.launches for cell in bench.cells(Request(shapes=((65, *shape[1:]),)))] == [COVERED]
    entry = runner.plan_of([(bench.BENCH, found[1])], "cuda", budget_s=1.0)
    assert runner.cells_of(entry, {bench.OP: bench.BENCH})[0][1].launches == EAGER


@pytest.mark.parametrize("rows", replay.DECODED)
@pytest.mark.parametrize(
    ("bench", "cell"),
    [
        (bench_lora_projections, bench_lora_projections.Cell("few", 1, 1024, 512, 128, 3, 16, "bf16")),
        (bench_lora_mlp, bench_lora_mlp.Cell("few", 1, 1024, 1536, 16, "bf16")),
    ],
    ids=["qkv", "mlp"],
)
def test_few_rows_are_judged(bench, cell, rows):
    """The check says something of one row of a model's width too: right ones pass, a scale that is 1 % off does not."""
    cell = replace(cell, M=rows)
    inputs = bench.inputs_of(cell, CPU)
    truth = bench.BENCH.truth(inputs)
    for each in bench.BENCH.implementations:
        if each.name != FLOOR and not each.compiled:
            assert truth.verify(each.build(inputs), each.rms_bound).problems == [], each.name
    (ours,) = [each for each in bench.BENCH.implementations if each.name == "fastpeft"]
    assert truth.verify(ours.build(replace(inputs, scaling=0.99 * inputs.scaling)), ours.rms_bound).problems


def test_decoding_comes_behind_rank_16():
    first, grid, second, third, *_, last = bench_lora_linear.tiers(False)
    assert {cell.M for cell in first} == {8192} and {cell.r for cell in third} == {64}
    assert [{(c.name, c.M) for c in tier} for tier in (grid, last)] == [{("lorafusion-grid", m)} for m in (8192, 2048)]
    layers, ways = ("q/o", "gate/up"), ("replayed", "eager")
    names = [(f"llama3-8b {layer}, {way}", m) for m in (1, 8, 64) for layer in layers for way in ways]
    assert [(cell.name, cell.M) for cell in second] == names
    assert len({runner.key_of(bench_lora_linear.BENCH, cell) for cell in second}) == len(second)
    entry = runner.plan_of([(bench_lora_linear.BENCH, second[1])], "cuda", budget_s=1.0)
    assert runner.cells_of(entry, {"lora_linear": bench_lora_linear.BENCH})[0][1].launches == EAGER


def test_a_host_s_time_is_not_predicted():
    cells = bench_lora_linear.cells(Request(shapes=((8, 4096, 4096),), dropouts=(0.0,)))
    found = predictions(bench_lora_linear.BENCH, cells, "fwd", ["h200"])
    assert {entry["cell"] for entry in found} == {cells[0].id} and "replayed" in cells[0].id


@pytest.mark.cuda
def test_a_replay_on_a_gpu_is_the_call():
    cell = bench_lora_linear.Cell("some", 8, 256, 128, 16, 0.0, "bf16")
    inputs = bench_lora_linear.inputs_of(cell, GPU)
    for build in (each.build for each in bench_lora_linear.IMPLEMENTATIONS if each.name in ("frozen", "fastpeft")):
        call = build(inputs)
        harness.warm_up(call, GPU)
        y, grads = call.run()
        found = replay.captured(call)
        again, others = found.run()
        assert torch.equal(again, y) and all(map(torch.equal, others, grads))
        inputs.weight.mul_(2)
        assert not torch.equal(found.run()[0], y), "a replay computes anew"
