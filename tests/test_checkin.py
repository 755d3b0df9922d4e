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

STEPS = ["environment", "ceilings", "tests", "tune", "lora", "prefix", "step", "others", "more steps"]
STEPS += ["compiled steps", "rest"]
# What a cell and a training step's case are guessed to take on an H200, by their tokens; nothing was measured.
CELL_S, CASE_S = 5.0, {2 * 4096: 45.0, 2 * 2048: 25.0}


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
    lora_step = {row["impl"]: row["status"] for row in rows if row["shape"]["name"] == "tiny lora"}
    assert lora_step["addmm-algebra"] == lora_step["fastpeft-fused"] == "ok"
    assert ("step", "peft-compile") in {(entry["op"], entry["impl"]) for entry in document["unmeasured"]}
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
    overhead = (out / "overhead.txt").read_text()
    assert "a patched layer" in overhead and "a gated MLP, few rows" in overhead


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


def planned(monkeypatch, tmp_path, name):
    """(cells, cases, whether torch.compile takes part) of a step on a GPU."""
    given = []

    def measure(course, budget, cells, cases=(), last=False):
        given.append(([(bench.op, cell) for bench, cell in cells], list(cases), last))

    monkeypatch.setattr(checkin, "_measure", measure)
    (run,) = [run for step, _, run in checkin.STEPS if step == name]
    run(checkin.Course(tmp_path, Budget(520), "cuda", ()), Budget(100))
    return given[0]


def test_what_the_targets_want_of_lora_comes_before_all_else(monkeypatch, tmp_path):
    cells, cases, _ = planned(monkeypatch, tmp_path, "lora")
    assert [op for op, _ in cells] == ["lora_linear"] * 11 + ["lora_projections"] * 2 + ["lora_mlp"] and cases == []
    assert {(cell.M, cell.r) for _, cell in cells} == {(8192, 16)}
    assert [cell.K for _, cell in cells if cell.name == "lorafusion-grid"] == [4096, 5120, 8192]
    _, cases, _ = planned(monkeypatch, tmp_path, "step")
    assert [(case.method, case.dropout, case.tokens) for case in cases] == [
        ("lora", 0.0, 8192), ("prefix", 0.0, 4096), ("lora", 0.05, 4096)
    ]  # fmt: skip


def test_what_has_to_be_compiled_comes_last(monkeypatch, tmp_path):
    compiled = [name for name in STEPS[4:] if planned(monkeypatch, tmp_path, name)[2]]
    assert compiled == ["compiled steps", "rest"]
    shares = {name: share for name, share, _ in checkin.STEPS}
    assert shares["compiled steps"] == shares["more steps"], "it gets what nothing else has used"
    assert list(shares) == STEPS and sorted(shares.values()) == list(shares.values()) and shares["rest"] == 1.0


def test_the_first_cells_fit_the_nine_minutes(monkeypatch, tmp_path):
    """By guesses; a budget ends what takes longer."""
    seconds = 60 * 9.0 - checkin.GRACE_S - checkin.SUMMARY_S
    assert seconds > 60 * 8.5
    begun = 0.0
    for name, share, _ in checkin.STEPS:
        if name in ("lora", "prefix", "step"):
            cells, cases, _ = planned(monkeypatch, tmp_path, name)
            guess = CELL_S * len(cells) + sum(CASE_S[case.tokens] for case in cases)
            assert guess <= (share - begun) * seconds, name
        begun = share


def test_rounds_of_whole_steps_may_be_few(monkeypatch, tmp_path):
    monkeypatch.setattr(checkin, "supervise", lambda worker, budget: "")
    course = checkin.Course(tmp_path, Budget(100), "cuda", ())
    for cases, least in (((), 10), (checkin._cases(course)[:1], checkin.STEP_ROUNDS)):
        document = report.new_document({})
        document["stamp"] = report.stamp("cpu")
        report.save(document, course.path)
        checkin._measure(course, Budget(50), (), cases)
        assert report.load(course.path)["plan"]["rounds"] == [least, 60]


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
