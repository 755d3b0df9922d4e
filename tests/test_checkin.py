"""The check-in: the whole course on a CPU, going on where one stopped, and what it refuses."""

import json
import time

import pytest
import torch

from benchmarks import checkin, lines, report
from benchmarks.checkin import Ended
from benchmarks.harness import Budget
from benchmarks.summary import LINES
from tests.benchmarks.made_up import made_up_tests

STEPS = ["environment", "ceilings", "tests", "tune", "lora", "prefix", "step", "others", "more steps", "rest"]


@pytest.mark.slow
def test_the_whole_course(tmp_path):
    """A smoke run; one test, as it takes the better part of a minute."""
    out, tests = tmp_path / "out", made_up_tests(tmp_path, "assert 1 + 1 == 2")
    begun = time.monotonic()
    code = checkin.main(["--out", str(out), "--smoke", "--minutes", "4", "--tests", str(tests), "--commit", "abc"])
    document = report.load(out / "checkin.json")
    assert code == 0 and time.monotonic() - begun < 240
    assert_every_step_is_done(document)
    assert_every_op_and_whole_steps_are_measured(document)
    assert_files_are_left(out, document)
    assert_resuming_repeats_only_what_is_not_done(tmp_path / "again", document)


def assert_every_step_is_done(document):
    assert report.problems(document) == [] and document["running"] is None
    assert [step["name"] for step in document["steps"]] == STEPS
    assert {step["name"]: step["note"] for step in document["steps"] if step["status"] != "done" or step["note"]} == {}
    assert document["tests"]["passed"] == 2 and document["tests"]["rc"] == 0
    assert document["stamp"]["ceilings"]["copy_gbps"] > 0 and document["stamp"]["ceilings"]["matmul_tflops"] > 0


def assert_every_op_and_whole_steps_are_measured(document):
    rows = document["results"]
    assert {row["op"] for row in rows} == {
        *("lora_linear", "mixed_lora_linear", "expert_lora_linear", "prefix_attention", "gated_prompt_attention"),
        *("prompt_embedding", "lora_projections", "lora_mlp", "dora_linear", "step"),
    }
    assert {row["pass"] for row in rows if row["op"] == "lora_linear"} == {"fwd", "bwd", "fwd+bwd"}
    assert {row["status"] for row in rows} <= {"ok", "missing"}
    assert all(row["median_ms"] > 0 for row in rows if row["status"] == "ok")
    lora = {row["impl"]: row for row in rows if row["op"] == "lora_linear"}
    ours = ["fastpeft", "fastpeft-fp32", "fastpeft:torch"]
    assert list(lora) == ["frozen", "peft-fp32", "peft", "addmm-algebra", *ours]
    assert lora["fastpeft"]["speedup_vs"].keys() == {"peft-fp32", "peft", "addmm-algebra"}
    absent = {entry["impl"] for entry in document["unmeasured"]}
    assert {"peft-compile", "lorafusion", "fastpeft:prewrite", "flex", "fastpeft:merge", "flex-twice"} <= absent
    assert None not in absent


def assert_files_are_left(out, document):
    assert lines.load(out / "checkin.jsonl") == lines.of(document)
    table, summary = ((out / name).read_text() for name in ("table.txt", "summary.txt"))
    assert report.CPU_HEADER in table and report.CPU_HEADER in summary
    assert len(summary.splitlines()) <= LINES and max(map(len, summary.splitlines())) <= 120
    assert "done: environment" in summary and "2 passed" in summary
    assert "targets: none of them was measured" in summary
    assert json.loads((out / "checkin.json").read_text())["stamp"]["commit"]


def assert_resuming_repeats_only_what_is_not_done(out, document):
    out.mkdir()
    document["steps"] = [step for step in document["steps"] if step["name"] != "prefix"]
    document["results"] = [row for row in document["results"] if row["op"] != "prefix_attention"]
    report.save(document, out / "checkin.json")
    assert checkin.main(["--out", str(out), "--smoke", "--minutes", "2", "--resume"]) == 0
    again = report.load(out / "checkin.json")
    assert [step["name"] for step in again["steps"]] == [name for name in STEPS if name != "prefix"] + ["prefix"]
    assert {row["op"] for row in again["results"]} > {row["op"] for row in document["results"]}
    assert again["results"][: len(document["results"])] == document["results"]


def steps_of(monkeypatch, tmp_path, steps, seconds=100.0):
    """What the steps given leave in the document."""
    monkeypatch.setattr(checkin, "STEPS", steps)
    course = checkin.Course(tmp_path, Budget(seconds), "cpu", ())
    if not course.path.exists():
        document = report.new_document({})
        document["stamp"] = report.stamp("cpu")
        report.save(document, course.path)
    checkin.run_steps(course)
    return report.load(course.path)["steps"]


def test_every_test_for_gpus_is_among_those_that_it_runs():
    mark, files = ".".join(["mark", "cuda"]), (report.ROOT / "tests").rglob("test_*.py")
    marked = [path for path in files if mark in path.read_text()]
    given = [report.ROOT / each for each in checkin.TESTS]
    assert all(each.exists() for each in given) and len(marked) > 20
    assert not [path for path in marked if not any(path.is_relative_to(each) for each in given)]


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(monkeypatch, tmp_path):
    def full(course, budget):
        raise OSError(28, "No space left on device")

    short = Ended("partial", "2 cells not reached")
    steps = [("full", 0.5, full), ("late", 0.0, full), ("short", 0.9, lambda *_: short)]
    steps += [("good", 1.0, lambda *_: Ended("done"))]
    found = steps_of(monkeypatch, tmp_path, steps)
    assert [(step["name"], step["status"]) for step in found] == [
        ("full", "failed"), ("late", "skipped"), ("short", "partial"), ("good", "done")
    ]  # fmt: skip
    assert "No space left" in found[0]["note"] and found[2]["note"] == "2 cells not reached"
    assert found[3]["budget_s"] == pytest.approx(100, abs=2)  # what the others did not use
    again = steps_of(monkeypatch, tmp_path, [("good", 1.0, full), ("full", 1.0, lambda *_: Ended("done"))])
    assert {step["name"]: step["status"] for step in again} == {
        "late": "skipped", "short": "partial", "good": "done", "full": "done"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "torch sees no GPU"),
        (["--smoke", "--minutes", "0.1"], "too short for anything"),
        (["--smoke", "--resume"], "nothing to resume"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkin.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_other_sources_is_neither_resumed_nor_overwritten(tmp_path, capsys):
    document = report.new_document({})
    document["stamp"] = report.stamp("cpu") | {"source_sha256": "0" * 64}
    report.save(document, tmp_path / "checkin.json")
    before = (tmp_path / "checkin.json").read_text()
    for arguments, words in ((["--resume"], "has source_sha256 000"), ([], "is there already: --resume goes on")):
        assert checkin.main(["--out", str(tmp_path), "--smoke", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "checkin.json").read_text() == before
