"""`fastpeft tune`: what it chooses and why, that it ends in time and writes what it found, rehearsed without a GPU."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpeft import cli, dispatch, table_file, tables, tune
from fastpeft.benchmarks import tuning, tuning_tasks
from fastpeft.benchmarks.harness import Budget, Call, Sample
from fastpeft.benchmarks.tuning import Course, choose
from fastpeft.benchmarks.tuning_tasks import LoraTask, PrefixTask, Prepared
from fastpeft.errors import ConfigError
from fastpeft.kernels import _tiles
from fastpeft.table_file import LoraBucket, PrefixBucket, TileBucket

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 20
CPU, FULL = torch.device("cpu"), torch.float32


# What is chosen


def noisy(base: float, rounds: int, seed: int, spread: float = 0.15) -> list[float]:
    draw = random.Random(seed)
    return [base * draw.lognormvariate(0.0, spread) for _ in range(rounds)]


def test_what_is_faster_beyond_the_noise_is_chosen():
    times = {"a": noisy(1.0, 24, 1), "b": noisy(0.5, 24, 2), "c": noisy(0.9, 24, 3)}
    chosen = choose(times, "a")
    assert (chosen.name, chosen.predicted) == ("b", "a") and 0.3 < chosen.gain < 0.7


def test_noise_does_not_change_the_choice():
    """Of four equal variants the best looks several percent faster in the rounds that it was chosen by."""
    for seed in range(200):
        times = {name: noisy(1.0, 24, 4 * seed + n) for n, name in enumerate("abcd")}
        assert choose(times, "a").name == "a", seed


def test_a_common_drift_hides_nothing_and_makes_nothing_up():
    drift = [1.0 + index for index in range(24)]
    faster = {"a": drift, "b": [0.9 * each for each in drift]}
    assert choose(faster, "a").name == "b"
    equal = {"a": drift, "b": [0.995 * each for each in drift]}
    assert choose(equal, "a").name == "a", "less than the margin"


def test_lucky_rounds_of_one_kind_do_not_suffice():
    assert choose({"a": [1.0] * 24, "b": [0.1, 1.0] * 12}, "a").name == "a"
    assert choose({"a": [1.0] * 4, "b": [0.5] * 4}, "a").name == "a", "two rounds may be luck"


def test_luck_is_the_binomial_tail():
    assert tuning.by_luck(10, 10) == 2**-10 and tuning.by_luck(0, 7) == 1.0
    assert tuning.by_luck(9, 10) == 11 / 1024


def test_where_the_predicted_one_is_out_the_best_is_chosen():
    assert choose({"b": [2.0] * 4, "c": [1.0] * 4}, "a").name == "c"


# The course, on a made-up clock


class FakeTimer:
    """Forward and backward ms of each call by name, the same in every round."""

    def __init__(self, times):
        self.times, self.asked = times, []

    def round(self, calls, host_ms):
        self.asked.append(set(calls))
        return {name: Sample(self.times[name][0], sum(self.times[name])) for name in calls}


BUCKET = tables.lora_bucket(FULL, FULL, 64, 64, 64, 16, 0.0)


class Task:
    """Calls that do nothing; `problems` by name, and `raises` in a call of that name."""

    id, op, tiles = "made up", "lora_linear", False

    def __init__(self, problems=None, raises=None, bucket=BUCKET, seconds=0.0, clock=None):
        self.wrong, self.raises, self.bucket = problems or {}, raises, bucket
        self.seconds, self.clock = seconds, clock

    def prepare(self, device):
        def call(forward, backward):
            def run():
                if forward == self.raises:
                    raise RuntimeError("out of resources")
                return torch.ones(1, requires_grad=True) * 2

            leaf = torch.ones(1, requires_grad=True)
            return Call(lambda: run() * leaf, {"x": leaf}, torch.ones(1))

        if self.clock is not None:
            self.clock.now += self.seconds
        problems = {name: [text] for name, text in self.wrong.items()}
        predicted = {"forward": "prewrite", "backward": "prewrite"}
        names = ("fused", "prewrite", "addmm")
        return Prepared(self.bucket, call, lambda call, name: problems.get(name, []), names, predicted)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


TIMES = {"prewrite": (1.0, 1.0), "addmm": (0.5, 2.0), "fused": (2.0, 0.6)}


def course(*tasks, times=TIMES, seconds=100.0, clock=None):
    saved, said = [], []
    budget = Budget(seconds, *[clock] * (clock is not None))
    made = Course(
        CPU,
        tasks,
        budget,
        FakeTimer(times),
        (ROUNDS, ROUNDS),
        0.0,
        said.append,
        lambda entries: saved.append(len(entries)),
    )
    made.run()
    return made, saved, said


def test_each_part_gets_the_variant_that_is_fastest_there():
    made, saved, said = course(Task())
    (entry,) = made.entries
    assert entry.choice == {"forward": "addmm", "backward": "fused"} and not entry.confirmed
    assert entry.bucket == BUCKET and entry.median_ms["fused backward"] == pytest.approx(0.6)
    assert saved == [1] and "forward addmm, 50.0 % faster than prewrite" in said[0]


@pytest.mark.parametrize("fast", ["fused", "addmm"])
def test_the_variant_that_is_made_the_fastest_is_chosen(fast):
    made, *_ = course(Task(), times={name: (0.1, 0.1) if name == fast else (1.0, 1.0) for name in TIMES})
    assert made.entries[0].choice == {"forward": fast, "backward": fast}


def test_the_predicted_choice_is_written_as_confirmed():
    made, _, said = course(Task(), times=dict.fromkeys(TIMES, (1.0, 1.0)))
    (entry,) = made.entries
    assert entry.confirmed and entry.choice == {"forward": "prewrite", "backward": "prewrite"}
    assert "confirmed" in said[0]


def test_a_wrong_variant_is_left_out_and_named_however_fast():
    made, _, said = course(Task(problems={"addmm": "y: gain 1.01"}))
    (entry,) = made.entries
    assert entry.choice["forward"] == "prewrite" and entry.wrong == {"addmm": "y: gain 1.01"}
    assert made.timer.asked == [{"prewrite", "fused"}] * ROUNDS, "its time was not even taken"
    assert made.wrong == {"made up: addmm": "y: gain 1.01"} and "addmm left out: y: gain 1.01" in said[0]


def test_a_variant_that_raises_is_left_out_and_named(capsys):
    made, *_ = course(Task(raises="addmm"))
    assert made.entries[0].choice["forward"] == "prewrite"
    assert made.failed == {"made up: addmm": "RuntimeError: out of resources"} and not made.wrong


def test_where_the_predicted_one_is_wrong_the_best_of_the_others_is_taken():
    made, *_ = course(Task(problems={"prewrite": "dX: zero everywhere"}))
    assert made.entries[0].choice == {"forward": "addmm", "backward": "fused"}
    made, *_ = course(Task(problems=dict.fromkeys(TIMES, "no")))
    assert made.entries == [] and len(made.wrong) == 3


def test_the_course_ends_within_its_time():
    clock = Clock()
    tasks = [Task(bucket=BUCKET._replace(M=1 << n), seconds=10.0, clock=clock) for n in range(9)]
    made, saved, _ = course(*tasks, seconds=50.0, clock=clock)
    assert clock.now <= 50.0 and [entry.bucket.M for entry in made.entries] == [1, 2, 4, 8]
    assert len(made.unreached) == 5 and saved == [1, 2, 3, 4], "and the table was written after each"


def test_a_task_that_the_time_does_not_suffice_for_is_given_up_whole():
    """What was not tried might have been faster: nothing is confirmed by its absence."""
    clock = Clock()

    class Slow(Task):
        def prepare(self, device):
            made = super().prepare(device)

            def problems(call, name):
                clock.now += 20.0
                return []

            return made._replace(problems=problems)

    made, saved, _ = course(Slow(), seconds=45.0, clock=clock)
    assert clock.now == 20.0, "the next one would have ended too late"
    assert made.entries == saved == [] and made.unreached == ["made up"]


class ReadingTask(Task):
    """One whose dY may be read once or twice, at a cost that the timer knows."""

    def prepare(self, device):
        made = super().prepare(device)
        call = made.call
        return made._replace(reads=(1, 2), call=lambda forward, backward, reads=None: call(forward, backward))


@pytest.mark.parametrize(("twice", "reads"), [(0.5, 2), (1.0, 1), (3.0, 1)])
def test_reads_of_dy_are_measured_by_the_strategies_chosen_and_join_their_entry(twice, reads):
    times = TIMES | {"1 reads": (1.0, 1.0), "2 reads": (1.0, twice)}
    made, saved, said = course(ReadingTask(), times=times)
    (entry,) = made.entries
    assert entry.choice == {"forward": "addmm", "backward": "fused", "reads": reads}
    assert entry.median_ms["2 reads backward"] == pytest.approx(twice) and "addmm forward" in entry.median_ms
    assert saved == [1] and len(made.choices) == 1 and "reads of dY in made up" in said[1]


# Tasks


def test_the_most_valuable_buckets_come_first_and_none_twice():
    tasks = tuning_tasks.all_tasks("all")
    buckets = [task.bucket() for task in tasks]
    assert len(set(buckets)) == len(buckets) > 60
    first, second = buckets[:2]
    assert isinstance(first, LoraBucket) and (first.M, first.rank, first.adapter_dtype) == (8192, 16, FULL)
    assert isinstance(second, PrefixBucket) and (second.S, second.group, second.modified) == (2048, 4, False)
    assert {task.op for task in tuning_tasks.all_tasks("prefix")} == {"prefix_attention"}
    assert {bucket.S for bucket in buckets if isinstance(bucket, PrefixBucket)} >= {1, 512, 2048, 8192}


def prepared(task, name):
    made = task.prepare(CPU)
    return made, made.call(name, name)


def test_a_wrong_result_is_seen(monkeypatch):
    with dispatch.backend("triton"):
        for task, name in (
            (LoraTask(20, 24, 20, 4, FULL, FULL), "addmm"),
            (PrefixTask(1, 2, 1, 1, 20, 5, 16, FULL), "decode"),
        ):
            made, call = prepared(task, name)
            assert made.problems(call, name) == []
            right = call.forward
            assert made.problems(replace(call, forward=lambda right=right: right() * 1.01), name) != []


def test_the_tiles_that_run_are_those_on_trial():
    task = LoraTask(40, 48, 40, 8, FULL, FULL)
    made, call = prepared(task, "addmm")
    call.run()  # as before a question about tiles comes one about strategies
    with tuning_tasks.tiles_asked() as asked:
        call.run()
    shrink = TileBucket("shrink", 16, "ieee", False)
    assert shrink in asked and {each.kernel for each in asked} == {"shrink", "grad_b_and_t", "grad_columns"}
    first, other = tuning_tasks.candidates(shrink, CPU).values()
    assert first == _tiles.SMALL._asdict() and other["rows"] == 32
    trial = tuning_tasks.with_tiles(call, CPU, {shrink: other})
    with trial.context():
        assert _tiles.tiles_for("shrink", 8, "ieee", False, _tiles.table_of(CPU))._asdict() == other
        assert _tiles.tiles_for("tail", 8, "ieee", False, _tiles.table_of(CPU)) == _tiles.SMALL
    assert _tiles.table_of(CPU) == "interpreter"
    assert made.problems(trial, "addmm") == []


def test_two_reads_of_dy_run_two_kernels():
    task = LoraTask(40, 48, 40, 8, FULL, FULL)
    made = task.prepare(CPU)
    assert made.reads == (1, 2) and LoraTask(40, 48, 40, 65, FULL, FULL).prepare(CPU).reads == ()
    for reads, kernels in ((1, {"shrink", "grad_b_and_t", "grad_columns"}), (2, {"shrink", "grad_columns"})):
        call = made.call("addmm", "addmm", reads)
        with tuning_tasks.tiles_asked() as asked:
            call.run()
        assert {each.kernel for each in asked} == kernels
        assert made.problems(call, "addmm") == []


# The command


def run_main(*arguments, **environment):
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "fastpeft", "tune", *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_rehearsal_runs_the_whole_course(tmp_path, monkeypatch, capsys):
    """The check-in's tests begin one in a process of its own."""
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path))
    start = time.process_time()
    assert cli.main(["tune", "--smoke", "--seconds", "100"]) == 0
    assert time.process_time() - start < 20
    said = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    table = table_file.read(str(path))
    assert path.name == "interpreter.json" and table.device == tables.INTERPRETER
    assert {entry.op for entry in table.entries} >= {"lora_linear", "prefix_attention", "tiles"}
    (lora,) = [entry for entry in table.entries if entry.op == "lora_linear"]
    names = ("prewrite forward", "addmm forward", "augment forward", "fused forward", "1 reads backward")
    assert "persistent backward" in lora.median_ms
    assert set(names) <= lora.median_ms.keys() and lora.choice["reads"] in (1, 2)
    assert f"-> {path}" in said and "choices measured" in said


def test_the_rehearsal_s_table_is_never_loaded(tmp_path, monkeypatch):
    """A GPU is asked for by its name; one that had the interpreter's would not take its tiles, either."""
    bucket = tables.lora_bucket(FULL, FULL, 64, 64, 64, 16, 0.0)
    entry = table_file.Entry(bucket, {"forward": "augment", "backward": "augment"}, {}, False, "2026-01-01", {})
    table = tuning.stamped(CPU, [entry])
    assert table.device == "interpreter" and table.kernels and table.triton
    table_file.write(str(tmp_path / "interpreter.json"), table)
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    tables.forget()
    try:
        plan = dispatch.lora_linear_plan_for(torch.device("cuda", 0), FULL, FULL, (64, 64, 64, 16), 0.0)
        assert plan == dispatch.SHORT
        assert dispatch.lora_linear_plan_for(CPU, FULL, FULL, (64, 64, 64, 16), 0.0) == dispatch.FUSED
    finally:
        tables.forget()


def test_without_a_gpu_it_says_so_and_leaves_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--op", "all", "--smoke", "--shape", "8,8,8"], "--smoke has shapes of its own"),
        (["--op", "prefix", "--shape", "8,8,8"], "--op prefix and a --shape of another op"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, reason):
    options = tune.options_of(cli.parser().parse_args(["tune", *arguments]))
    with pytest.raises(ConfigError, match=reason):
        tuning._tasks(options)


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "8,8"], ["--shape", "8,0,8"], ["--shape", "1,3,2,8,8,8"], ["--seconds", "0"], ["--op", "x"]],
)
def test_wrong_usage_leaves_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", *arguments])
    assert stop.value.code == 2 and arguments[1] in capsys.readouterr().err


def test_a_shape_is_measured_in_the_dtypes_that_matter():
    options = tune.options_of(cli.parser().parse_args(["tune", "--shape", "64,96,128", "--shape", "1,4,2,64,8,32"]))
    tasks = tuning._tasks(options)
    assert [task.op for task in tasks] == ["lora_linear"] * 4 + ["prefix_attention"]
    assert {(task.M, task.K, task.N) for task in tasks[:4]} == {(64, 96, 128)} and tasks[4].P == 8


def test_a_table_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "notes.json").write_text("my notes")
    done = run_main("--smoke", "--op", "lora", "--out", str(tmp_path / "notes.json"))
    assert done.returncode == 2 and "notes.json" in done.stderr and done.stdout == ""
    assert (tmp_path / "notes.json").read_text() == "my notes"
