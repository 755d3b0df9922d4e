"""The check-in: the whole course on the CPU, and what happens when tests fail or the benchmark's process dies."""

import json
import signal
import sys
import time

import pytest
import torch

from benchmarks import checkin, report
from benchmarks.harness import Budget
from benchmarks.runner import cells_of

BENCHES = {bench.op: bench for bench in checkin.BENCHES}

TESTS = """
import time
import pytest

@pytest.mark.cuda
def test_right():
    pass

@pytest.mark.cuda
def test_other():
    {body}

def test_not_for_gpus():
    raise RuntimeError("must not be collected")
"""


def made_up_tests(tmp_path, body):
    path = tmp_path / "test_made_up.py"
    path.write_text(TESTS.format(body=body))
    return path


def test_the_whole_course_on_the_cpu(tmp_path, capfd):
    tests = made_up_tests(tmp_path, "assert 1 + 1 == 2")
    out = tmp_path / "out"
    code = checkin.main(["--out", str(out), "--device", "cpu", "--tiny", "--tests", str(tests), "--commit", "abc"])
    printed = capfd.readouterr().out
    document = json.loads((out / "checkin.json").read_text())
    assert code == 0, printed
    assert report.problems(document) == [] and document["running"] is None
    assert document["tests"]["passed"] == 2 and document["tests"]["failed"] == 0 and document["tests"]["rc"] == 0
    cells = {(row["shape"]["name"], row["dropout"]) for row in document["results"]}
    assert cells == {(name, p) for name in ("q/o", "k/v") for p in (0.0, 0.5)} | {("tiny", 0.0), ("tiny-alibi", 0.0)}
    rows = {row["impl"]: row for row in document["results"] if row["op"] == "lora_linear"}
    ours = ["fastpeft", "fastpeft-fp32", "fastpeft:torch"]
    assert list(rows) == ["frozen", "peft-fp32", "peft", "addmm-algebra", *ours]
    attention = {row["impl"]: row for row in document["results"] if row["op"] == "prefix_attention"}
    ours = ["fastpeft", "fastpeft:torch"]
    assert list(attention) == ["frozen", "peft", "cat-causal", "square", *ours, "peft-bloom"]
    assert all(row["status"] == "ok" and row["median_ms"] > 0 for row in document["results"])
    assert all(set(row["checked"]["gain"]) == {"y", "x", "A", "B"} for name, row in rows.items() if name != "frozen")
    assert rows["fastpeft"]["speedup_vs"].keys() == {"peft-fp32", "peft", "addmm-algebra"}
    assert document["stamp"]["ceilings"]["copy_gbps"] > 0 and document["stamp"]["ceilings"]["matmul_tflops"] > 0
    assert {entry["impl"] for entry in document["unmeasured"]} == {
        "peft-compile",
        "fastpeft:prewrite",
        "fastpeft:addmm",
        "fastpeft:augment",
        "fastpeft:fused",
        "flex",
        "fastpeft:merge",
        "fastpeft:concat",
    }
    table = (out / "table.txt").read_text()
    assert printed.startswith(report.CPU_HEADER) and printed.endswith(table) and report.CPU_HEADER in table
    assert "not measured: lora_linear: all cells peft-compile: not compiled on the CPU path" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "torch sees no GPU"),
        (["--device", "cpu"], "add --tiny"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkin.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The tests' stage


def test_a_failing_test_is_told_in_its_own_words(tmp_path):
    found = checkin.run_tests(made_up_tests(tmp_path, 'assert "apples" == "pears"'), tmp_path, 60)
    assert (found["rc"], found["passed"], found["failed"], found["timed_out"]) == (1, 1, 1, False)
    (failure,) = found["failures"]
    assert failure["test"].endswith("test_made_up::test_other")  # pytest puts the folders below its root in front
    assert "'apples' == 'pears'" in failure["text"]


@pytest.mark.parametrize("workers", [0, 2])
def test_tests_that_take_too_long_are_stopped_and_still_report(workers, tmp_path):
    start, limit = time.monotonic(), 15  # within which, on a busy machine, the test before has run
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        found = checkin.run_tests(made_up_tests(tmp_path, "time.sleep(200)"), tmp_path, limit, workers)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 4 * limit
    assert found["timed_out"] and found["passed"] == 1 and found["rc"] != 0
    assert found["note"] == f"Stopped after {limit} s: not all of them ran."


def test_tests_are_shared_by_workers(tmp_path):
    found = checkin.run_tests(made_up_tests(tmp_path, "assert 1 + 1 == 2"), tmp_path, 60, workers=2)
    assert (found["rc"], found["passed"]) == (0, 2) and "-n 2" in found["command"]


def test_no_test_marked_cuda_and_no_tests_at_all_are_said(tmp_path):
    (tmp_path / "test_plain.py").write_text("def test_plain(): pass\n")
    found = checkin.run_tests(tmp_path / "test_plain.py", tmp_path, 60)
    assert found["rc"] == 5 and found["note"] == "No test is marked cuda."
    assert "does not exist" in checkin.run_tests(tmp_path / "nowhere", tmp_path, 60)["note"]


# The benchmark's process


@pytest.fixture
def plan_file(tmp_path):
    """A document on disk as the check-in leaves it before the benchmark begins."""
    path = tmp_path / "checkin.json"
    document = report.new_document(checkin.plan("cpu", tiny=True))
    document["stamp"] = report.stamp("cpu")
    report.save(document, path)
    return path


WORKER = """
import json, os, sys, time
path, fault = sys.argv[1:]
document = json.load(open(path))
plan = document["plan"]
if "fastpeft" not in plan["without"]["lora_linear"] and not plan["skip"]:
    impl = None if fault == "timing" else "frozen" if fault == "floor" else "fastpeft"
    stage = "timing" if fault == "timing" else "check"
    document["running"] = {"op": "lora_linear", "cell": "q/o", "impl": impl, "stage": stage}
    json.dump(document, open(path, "w"))
    if fault == "hang":
        time.sleep(60)
    if fault == "lost":
        sys.exit(4)
    os.abort()
document["running"] = None
json.dump(document, open(path, "w"))
"""


def supervised(plan_file, fault, budget=60.0):
    worker = plan_file.with_name("worker.py")
    worker.write_text(WORKER)
    clean = checkin.supervise(plan_file, Budget(budget), [sys.executable, str(worker), str(plan_file), fault])
    return clean, report.load(plan_file)


def without_ours(document):
    return document["plan"]["without"]["lora_linear"]["fastpeft"]


def test_a_crash_leaves_out_who_caused_it_and_goes_on(plan_file):
    clean, document = supervised(plan_file, "crash")
    assert not clean and document["running"] is None and document["unmeasured"] == []
    assert without_ours(document) == "ended the process (ended by signal 6) in q/o"


def test_a_lost_device_counts_as_a_crash(plan_file):
    document = supervised(plan_file, "lost")[1]
    assert (
        document["plan"]["without"]["lora_linear"]["fastpeft"]
        == "ended the process (the device stopped answering) in q/o"
    )


def test_a_hang_is_ended(plan_file, monkeypatch):
    watch = checkin.watch
    monkeypatch.setattr(checkin, "watch", lambda process, path, budget: watch(process, path, budget, stall_s=2.0))
    document = supervised(plan_file, "hang")[1]
    assert without_ours(document) == "ended the process (stood still for 2 s) in q/o"


def test_a_crash_while_timing_costs_the_cell(plan_file):
    document = supervised(plan_file, "timing")[1]
    assert document["plan"]["skip"] == {"q/o": "its timing ended the process: ended by signal 6"}


def test_without_a_floor_it_stops_and_names_every_cell(plan_file):
    clean, document = supervised(plan_file, "floor")
    named = {entry["cell"] for entry in document["unmeasured"]}
    assert not clean and named == {cell.id for _, cell in cells_of(document["plan"], BENCHES)}
    assert report.exit_code(document) == 1


def test_a_spent_budget_ends_the_process(plan_file):
    start = time.monotonic()
    clean, document = supervised(plan_file, "hang", budget=1.0)
    assert time.monotonic() - start < 10 and not clean
    assert document["unmeasured"][0]["reason"] == "the benchmark's process did not get there (the time was up)"


def test_the_real_worker_reads_the_plan_and_leaves_out_what_it_says(plan_file):
    document = report.load(plan_file)
    for op, bench in BENCHES.items():
        names = [i.name for i in bench.implementations if i.name != report.FLOOR]
        document["plan"]["without"][op] = dict.fromkeys(names, "crash")
    first = cells_of(document["plan"], BENCHES)[0][1]
    document["plan"]["skip"] = {first.id: "crash"}
    report.save(document, plan_file)
    assert checkin.work(plan_file) == 0
    done = report.load(plan_file)
    assert len(done["results"]) == len(done["plan"]["cells"]) - 1 and {r["impl"] for r in done["results"]} == {"frozen"}
    assert {"op": "lora_linear", "cell": first.id, "impl": None, "reason": "crash"} in done["unmeasured"]
    for op in BENCHES:
        assert {"op": op, "cell": "all cells", "impl": "fastpeft", "reason": "crash"} in done["unmeasured"]
