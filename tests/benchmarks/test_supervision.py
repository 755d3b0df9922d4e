"""Workers that crash, hang or lose the device: what ended them is left out, and the rest is measured."""

import os
import sys
import time

import pytest

from benchmarks import report, supervision
from benchmarks.benches import BENCHES, BY_OP
from benchmarks.harness import Budget
from benchmarks.runner import cells_of, in_turns, plan_of


@pytest.fixture
def plan_file(tmp_path):
    """A document on disk as the check-in leaves it before the benchmark begins."""
    path = tmp_path / "checkin.json"
    cells = in_turns(list(BENCHES.values()), tiny=True)
    document = report.new_document(plan_of(cells, "cpu", budget_s=60.0, quick=True))
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
    script = plan_file.with_name("worker.py")
    script.write_text(WORKER)
    worker = supervision.Worker(plan_file, [sys.executable, str(script), str(plan_file), fault])
    return supervision.supervise(worker, Budget(budget)), report.load(plan_file)


def without_ours(document):
    return document["plan"]["without"]["lora_linear"]["fastpeft"]


def test_a_crash_leaves_out_who_caused_it_and_goes_on(plan_file):
    trouble, document = supervised(plan_file, "crash")
    assert (
        trouble.startswith("ended by signal 6, at {'op'")
        and document["running"] is None
        and document["unmeasured"] == []
    )
    assert without_ours(document) == "ended the process (ended by signal 6) in q/o"


def test_a_lost_device_counts_as_a_crash(plan_file):
    document = supervised(plan_file, "lost")[1]
    assert (
        document["plan"]["without"]["lora_linear"]["fastpeft"]
        == "ended the process (the device stopped answering) in q/o"
    )


def test_a_hang_is_ended(plan_file, monkeypatch):
    watch = supervision.watch
    monkeypatch.setattr(supervision, "watch", lambda *given: watch(*given, stall_s=2.0))
    document = supervised(plan_file, "hang")[1]
    assert without_ours(document) == "ended the process (stood still for 2 s) in q/o"


def test_a_crash_while_timing_costs_the_cell(plan_file):
    document = supervised(plan_file, "timing")[1]
    assert document["plan"]["skip"] == {"q/o": "its timing ended the process: ended by signal 6"}


def test_without_a_floor_it_stops_and_names_every_cell(plan_file):
    trouble, document = supervised(plan_file, "floor")
    named = {entry["cell"] for entry in document["unmeasured"]}
    assert trouble and named == {cell.id for _, cell in cells_of(document["plan"], BY_OP)}
    assert report.exit_code(document) == 1


def test_a_spent_budget_ends_the_process(plan_file, monkeypatch):
    monkeypatch.setattr(supervision, "GRACE_S", 0.5)
    start = time.monotonic()
    trouble, document = supervised(plan_file, "hang", budget=1.0)
    assert time.monotonic() - start < 10 and trouble.startswith("the time was up, at {'op': 'lora_linear'")
    assert document["unmeasured"][0]["reason"] == "the benchmark's process did not get there (the time was up)"


def test_the_real_worker_reads_the_plan_and_leaves_out_what_it_says(plan_file):
    document = report.load(plan_file)
    for op, bench in BY_OP.items():
        names = [i.name for i in bench.implementations if i.name != report.FLOOR]
        document["plan"]["without"][op] = dict.fromkeys(names, "crash")
    first = cells_of(document["plan"], BY_OP)[0][1]
    document["plan"]["skip"] = {first.id: "crash"}
    document["plan"]["until"] = time.time() + 60
    report.save(document, plan_file)
    assert supervision.work(plan_file) == 0
    done = report.load(plan_file)
    assert len(done["results"]) == len(done["plan"]["cells"]) - 1 and {r["impl"] for r in done["results"]} == {"frozen"}
    assert {"op": "lora_linear", "cell": first.id, "impl": None, "reason": "crash"} in done["unmeasured"]
    for op in BY_OP:
        assert {"op": op, "cell": "all cells", "impl": "fastpeft", "reason": "crash"} in done["unmeasured"]


SERVING = """
import json, os, sys
while os.read(0, 1):
    with open(sys.argv[1]) as file:
        document = json.load(file)
    document["plan"].setdefault("served", []).append(os.getpid())
    with open(sys.argv[1], "w") as file:
        json.dump(document, file)
    if document["plan"]["skip"]:
        os.abort()
    os.write(0, b"\\n")
"""


def test_a_process_serves_one_plan_after_another_until_it_dies_or_is_ended(plan_file):
    script = plan_file.with_name("worker.py")
    script.write_text(SERVING)
    worker = supervision.Worker(plan_file, [sys.executable, str(script), str(plan_file)])
    troubles = [supervision.supervise(worker, Budget(60.0)) for _ in range(2)]
    document = report.load(plan_file)
    document["plan"]["skip"] = {"q/o": "crash"}
    report.save(document, plan_file)
    troubles.append(supervision.supervise(worker, Budget(60.0)))
    document = report.load(plan_file)
    document["plan"]["skip"] = {}
    report.save(document, plan_file)
    troubles.append(supervision.supervise(worker, Budget(60.0)))
    worker.end()
    first, *others, last = report.load(plan_file)["plan"]["served"]
    assert others == [first, first] and last != first
    assert troubles == ["", "", "ended by signal 6, at None", ""]
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_the_real_worker_waits_for_the_next_plan_unless_something_failed(plan_file, status, monkeypatch):
    document = report.load(plan_file)
    document["results"] = [{"status": status}]
    report.save(document, plan_file)
    told, said = [b"\n", b"\n", b""], []
    monkeypatch.setattr(supervision.os, "read", lambda *_: told.pop(0))
    monkeypatch.setattr(supervision.os, "write", lambda to, what: said.append(to))
    monkeypatch.setattr(supervision, "work", lambda path: 0)
    assert supervision.serve(plan_file) == 0
    assert said == ([0, 0] if status == "ok" else [])
