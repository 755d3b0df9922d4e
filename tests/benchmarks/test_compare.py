"""Two runs compared: a planted slowdown is found every time, and nothing is said of two runs of the same code."""

import math
import random
import time

import pytest
import torch

from benchmarks import lines, report, runner
from benchmarks.bench_lora_linear import BENCH, Cell
from benchmarks.compare import COUNTED, MILLISECONDS, TO_FLOOR, compare, text
from benchmarks.harness import Call, CpuTimer, paired_ratio, summarise
from benchmarks.runner import plan_of
from fastpeft.errors import FastpeftError
from tests.benchmarks.test_lines import document, result

SLOWDOWN = 1.3


def lines_of(*rows, **options):
    return lines.of(document(*rows, **options))


def only(changes):
    (change,) = changes
    return change


# Really run


class Slowed(Call):
    """Busy for as much longer as SLOWDOWN says, forward and backward."""

    def run_forward(self):
        return self._longer(super().run_forward)

    def run_backward(self, y):
        return self._longer(super().run_backward, y)

    @staticmethod
    def _longer(work, *arguments):
        start = time.process_time()
        out = work(*arguments)
        end = time.process_time()
        while time.process_time() < end + (SLOWDOWN - 1) * (end - start):
            pass
        return out


@pytest.fixture
def own_seconds(monkeypatch):
    """Timers count the seconds of this process alone: other tests are at work on the same two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(runner, "timer_for", lambda device: CpuTimer(time.process_time))
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_slowdown_is_caught_and_the_same_code_is_not(run, named, own_seconds):
    ours = named("fastpeft")[0]
    planted = runner.replace(ours, name="planted", build=lambda inputs: Slowed(**vars(ours.build(inputs))))
    cell = Cell("tiny", 128, 128, 128, 8, 0.0, "fp32")  # a round is over before the other core's work changes
    plan = plan_of([(BENCH, cell)], "cpu", budget_s=100.0, quick=True) | {"rounds": [300, 300]}

    def one_run() -> dict[str, list[dict]]:
        made = run([*named("frozen"), ours, planted], [cell], document=report.new_document(plan))
        floor, same, slow = [line for line in lines.of(made) if line["status"] == "ok"]
        return {"same": [floor, same], "slow": [floor, {**slow, "impl": same["impl"]}]}

    runs = [one_run() for _ in range(21)]
    for old, new in zip(runs, runs[1:], strict=False):
        quiet = compare(old["same"], new["same"])
        assert (quiet.pairs, quiet.regressions, quiet.improvements) == (2, (), ()), text(quiet)
        caught = compare(old["same"], new["slow"])
        slower = only(caught.regressions)
        assert (slower.impl, slower.what, caught.failed) == ("fastpeft", TO_FLOOR, True)
        assert 1.1 < slower.new / slower.old < 1.6


# Made up: clocks that drift, neighbours that get in between


def samples(rng, rounds, noise, factors):
    """Milliseconds of each, in rounds: a clock that wanders from where it began, and one sample in twenty is late."""
    clock = math.exp(rng.gauss(0, 0.3))
    times = [[] for _ in factors]
    for _ in range(rounds):
        clock *= math.exp(rng.gauss(0, 0.05))
        for factor, found in zip(factors, times, strict=True):
            late = 1 + 3 * rng.expovariate(1) if rng.random() < 0.05 else 1
            found.append(factor * clock * late * math.exp(noise * abs(rng.gauss(0, 1))))
    return times


def run_of(rng, rounds, noise, slowdown=1.0):
    """The lines of a floor and of ours, 1.2 times as long as the floor times the slowdown."""
    floor, ours = samples(rng, rounds, noise, (1.0, 1.2 * slowdown))
    over, spent = paired_ratio(ours, floor), summarise(ours)
    figures = {"p20_ms": spent.p20, "p80_ms": spent.p80, "rounds": rounds}
    shares = {"overhead_p20": over.p20 - 1, "overhead_p80": over.p80 - 1}
    rows = result("frozen", summarise(floor).median, 0.0), result("fastpeft", spent.median, over.median - 1)
    return lines_of(rows[0], rows[1] | figures | shares, gpu=None)


def on_a_gpu(found):
    return [line | {"stamp": line["stamp"] | {"gpu": "GPU"}} for line in found]


def test_of_a_thousand_pairs_none_is_a_false_alarm_and_every_slower_one_is_named():
    rng = random.Random(20_431)
    alarms = found = 0
    for _ in range(1000):
        old, new, slower = (run_of(rng, 60, 0.05, slowdown) for slowdown in (1.0, 1.0, SLOWDOWN))
        for place in (list, on_a_gpu):  # whose margins differ
            same = compare(place(old), place(new))
            alarms += bool(same.regressions or same.improvements)
            found += compare(place(old), place(slower)).failed
    assert (alarms, found) == (0, 2000)


def test_a_quick_run_raises_few_false_alarms():
    rng = random.Random(7)
    pairs = [[on_a_gpu(run_of(rng, 3, 0.05)) for _ in range(2)] for _ in range(1000)]
    assert sum(compare(*pair).failed for pair in pairs) <= 2  # of 1000


# What is compared


def pair(old, new):
    """Of two runs, each with a floor of 1 ms."""
    floor = result("frozen", 1.0, 0.0)
    return compare(lines_of(floor, old), lines_of(floor, new))


def test_the_clock_of_the_other_run_is_nothing_beside_a_floor():
    old = lines_of(result("frozen", 1.0, 0.0), result("fastpeft", 1.1, 0.1))
    new = lines_of(result("frozen", 2.0, 0.0), result("fastpeft", 2.2, 0.1))
    compared = compare(old, new)
    assert compared.regressions == () and not compared.failed
    assert "the floor takes 2.00 times as long" in text(compared)
    assert "nothing of ours is worse beyond the noise" in text(compared)


def test_what_became_faster_is_an_improvement():
    compared = pair(result("fastpeft", 1.5, 0.5), result("fastpeft", 1.1, 0.1))
    assert only(compared.improvements).what == TO_FLOOR and compared.regressions == () and not compared.failed
    assert "1.36 times as fast" in text(compared)


def test_without_a_floor_the_milliseconds_count():
    slower = only(pair(result("fastpeft", 1.0), result("fastpeft", 1.4)).regressions)
    assert (slower.what, slower.old, slower.new) == (MILLISECONDS, 1.0, 1.4)
    assert pair(result("fastpeft", 1.0), result("fastpeft", 1.08)).regressions == ()
    floor_gone = compare(
        lines_of(result("frozen", 1.0, 0.0), result("fastpeft", 1.0, 0.0)), lines_of(result("fastpeft", 1.5, None))
    )
    assert only(floor_gone.regressions).what == MILLISECONDS


def test_a_wide_spread_or_few_rounds_excuse_more():
    steady, slower = result("fastpeft", 1.1, 0.1), result("fastpeft", 1.3, 0.3)
    assert only(pair(steady, slower).regressions).allowed < 1.1
    assert pair(steady, slower | {"overhead_p20": -0.5, "overhead_p80": 1.5}).regressions == ()
    assert pair(steady, slower | {"rounds": 3, "overhead_p20": 0.2, "overhead_p80": 0.4}).regressions == ()


def test_a_difference_within_the_margin_is_none_and_a_cpus_margin_is_wider():
    old, new = result("fastpeft", 1.1, 0.100, spread=1e-4), result("fastpeft", 1.2, 0.177, spread=1e-4)
    assert only(pair(old, new).regressions).allowed == pytest.approx(1.05, abs=0.001)
    assert pair(old, result("fastpeft", 1.15, 0.150, spread=1e-4)).regressions == ()
    on_cpu = [lines_of(result("frozen", 1.0, 0.0), row, gpu=None) for row in (old, new)]
    assert compare(*on_cpu).regressions == ()


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_compared_exactly_and_once_for_all_passes(name):
    def rows(size):
        return lines_of(*(result("fastpeft", 1.0, 0.1, **{name: size, "pass": p}) for p in ("fwd", "bwd", "fwd+bwd")))

    big = 1 << 30
    larger = only(compare(rows(big), rows(big + big // 50)).regressions)
    assert (larger.what, larger.passed, larger.new - larger.old) == (name, "", big // 50)
    assert only(compare(rows(big), rows(0)).improvements).what == name
    assert compare(rows(big), rows(big + big // 101)).regressions == (), "within 1 %"
    assert compare(rows(1 << 20), rows(2 << 20)).regressions == (), "within 1 MiB"
    assert compare(rows(None), rows(big)).regressions == ()
    assert "1095.2 MB" in text(compare(rows(big), rows(big + big // 50)))


@pytest.mark.parametrize("status", ["wrong", "failed", "missing"])
def test_what_was_right_and_is_not_is_lost(status):
    gone = result("fastpeft", status=status, note="dA: not finite")
    compared = pair(result("fastpeft", 1.0, 0.1), gone)
    assert only(compared.lost).new == f"{status} (dA: not finite)" and compared.failed
    assert f"lost: lora_linear: fastpeft: q/o M=8192 K=4096 N=4096 r=16 bf16: ok, now {status}" in text(compared)
    back = pair(gone, result("fastpeft", 1.0, 0.1))
    assert (only(back.improvements).old, back.lost, back.failed) == (f"{status} (dA: not finite)", (), False)
    assert pair(gone, gone).lost == ()


def test_peers_are_named_and_are_no_failure_of_ours():
    compared = pair(result("peft", 1.1, 0.1), result("peft", 2.0, 1.0))
    assert only(compared.regressions).impl == "peft" and not compared.failed
    assert "worse: lora_linear: peft (not ours): " in text(compared)
    assert pair(result("fastpeft:fused", 1.1, 0.1), result("fastpeft:fused", 2.0, 1.0)).failed


OTHERS = {"op": "other", "dtype": "fp16", "dropout": 0.05, "pass": "bwd", "shape": {"name": "q/o", "M": 1}}


@pytest.mark.parametrize("name", OTHERS)
def test_only_what_is_the_same_in_all_is_compared(name):
    ours = result("fastpeft", 1.1, 0.1)
    compared = pair(ours, result("fastpeft", 9.0, 8.0) | {name: OTHERS[name]})
    assert (compared.pairs, compared.regressions) == (1, ())
    assert only(compared.only_old) == "lora_linear: fastpeft: q/o M=8192 K=4096 N=4096 r=16 bf16 fwd+bwd"
    assert len(compared.only_new) == 1


def test_why_a_partner_is_not_there_is_said():
    gap = {"op": "lora_linear", "cell": "all cells", "impl": "peft", "reason": "peft is not installed"}
    with_peer = lines_of(*(result("peft", 1.1, 0.1, **{"pass": passed}) for passed in ("fwd", "bwd")))
    compared = compare(with_peer, lines_of(result("fastpeft", 1.1, 0.1), unmeasured=[gap]))
    assert only(compared.only_old).endswith("bf16 fwd, bwd (peft is not installed)")
    assert only(compared.only_new).startswith("lora_linear: fastpeft: ")


def test_shapes_are_the_same_in_any_order():
    ours = result("fastpeft", 1.1, 0.1)
    turned = result("fastpeft", 1.1, 0.1, shape=dict(reversed(ours["shape"].items())))
    assert pair(ours, turned).pairs == 2


def test_another_device_is_refused():
    h100, a100, cpu = (lines_of(result("fastpeft", 1.1, 0.1), gpu=gpu) for gpu in ("H100", "A100", None))
    for old, new in ((h100, a100), (h100, cpu), (cpu, h100), (h100 + a100, h100 + a100)):
        with pytest.raises(FastpeftError, match="give --compare a file of one run on this very device"):
            compare(old, new)
    with pytest.raises(FastpeftError, match="times of H100 say nothing beside times of A100"):
        compare(h100, a100)
    other = lines_of(result("fastpeft", 1.1, 0.1), gpu=None, device="another CPU, 2 threads")
    with pytest.raises(FastpeftError, match="another CPU, 2 threads"):
        compare(other, cpu)


def test_the_older_run_and_other_versions_are_named():
    ours = result("fastpeft", 1.1, 0.1)
    said = text(compare(lines_of(ours, torch="2.12.0", dirty=True), lines_of(ours)))
    assert "compared with commit 0123456789ab with changes of 2026-12-01 10:00; torch 2.12.0, now 2.13.0" in said
    assert "compared with source " in text(compare(lines_of(ours, commit=None), lines_of(ours)))
    assert "one of the runs has no results" in text(compare(lines_of(ours), []))


def test_the_worst_comes_first():
    passes = {"fwd": 1.5, "bwd": 1.9, "fwd+bwd": 1.7}
    old, new = (
        lines_of(*(result("fastpeft", 1.0, factor - 1, **{"pass": p}) for p, factor in factors.items()))
        for factors in (dict.fromkeys(passes, 1.1), passes)
    )
    worse = [line for line in text(compare(old, new)).splitlines() if line.startswith("worse")]
    assert [line.split("bf16 ")[1].split(":")[0] for line in worse] == ["bwd", "fwd+bwd", "fwd"]
    assert "1.73 times as long, beyond the noise of 1.0" in worse[0] and "1.900 times the floor, was 1.100" in worse[0]
