"""JSON lines: every result and every gap of a run, in the documented schema; what is not that is refused by line."""

import functools
import json
import math

import pytest

from benchmarks import lines, report, tables
from fastpeft.errors import FastpeftError

GPU = "NVIDIA H100 80GB HBM3"
DATE = "2026-12-01T10:00:00+00:00"
Q_O = {"name": "q/o", "M": 8192, "K": 4096, "N": 4096, "r": 16}
CHECK = {"rms_ratio": {"y": 0.7, "x": 1.02}, "gain": {"y": 1.0}, "tail_gain": {}, "keep_rate": None, "problems": []}


def result(impl, ms=1.0, over=None, *, spread=0.02, **changes):
    """A document's row, of a GPU's kind; without times unless it is ok."""
    ok = changes.get("status", "ok") == "ok"
    times = {"median_ms": ms, "p20_ms": ms * (1 - spread), "p80_ms": ms * (1 + spread), "forward_ms": ms / 3}
    rates = {"gbps": 500 / ms, "tflops": 400 / ms, "tokens_per_s": None, "mfu": None}
    margins = {
        "overhead_over_floor": over,
        "overhead_p20": None if over is None else over - spread,
        "overhead_p80": None if over is None else over + spread,
    }
    figures = times | rates | margins
    return {
        "op": "lora_linear", "impl": impl, "label": f"{impl} in words", "strategy": None, "adapter_dtype": "bf16",
        "shape": Q_O, "dtype": "bf16", "dropout": 0.0, "pass": "fwd+bwd", "status": "ok", "note": "", "host_ms": 0.1,
        "first_s": 1.0, "rounds": 40 if ok else 0, "speedup_vs": {}, "peak_bytes": 300 << 20, "held_bytes": 64 << 20,
        "saved_bytes": 67 << 20, "checked": None if impl == report.FLOOR else CHECK,
        **(figures if ok else dict.fromkeys(figures)), **changes,
    }  # fmt: skip


@functools.cache
def stamp_of_this_cpu():
    return report.stamp("cpu")


def document(*rows, unmeasured=(), gpu=GPU, **stamp):
    """A run's document with these results; `gpu=None`: of this CPU."""
    made = report.new_document({"device": "cuda" if gpu else "cpu"})
    of_gpu = {"device": gpu, "driver": "570.1", "header": ""} if gpu else {}
    ceilings = {"copy_gbps": 1000.0, "matmul_tflops": 800.0}
    known = {"torch": "2.13.0", "triton": "3.9.0", "peft": "0.21.2", "commit": "0123456789abcdef", "dirty": False}
    made["stamp"] = stamp_of_this_cpu() | known | of_gpu | {"ceilings": ceilings, "date": DATE} | stamp
    made["results"], made["unmeasured"] = list(rows), list(unmeasured)
    return made


def test_a_real_run_keeps_to_the_schema(run, named, tmp_path):
    made = run(named("frozen", "fastpeft", "peft", "fastpeft:fused"))
    found = lines.of(made)
    assert lines.problems(found) == []
    by_name = {(line["impl"], line["status"]): line for line in found}
    assert list(by_name) == [("frozen", "ok"), ("peft", "ok"), ("fastpeft", "ok"), ("fastpeft:fused", "unmeasured")]
    ours = by_name["fastpeft", "ok"]
    assert ours["checked"] is True and set(ours["check"]["gain"]) == {"y", "x", "A", "B"}
    assert by_name["frozen", "ok"]["checked"] is None and ours["speedup"].keys() == {"peft"}
    assert ours["p20"] <= ours["median"] <= ours["p80"] and ours["rounds"] >= 3
    ceilings = ours["stamp"]["ceilings"]
    assert ours["gbps_of_ceiling"] == pytest.approx(ours["gbps"] / ceilings["copy_gbps"])
    assert ours["tflops_of_ceiling"] == pytest.approx(ours["tflops"] / ceilings["matmul_tflops"])
    assert ours["stamp"]["gpu"] is None and ours["stamp"]["header"] == report.CPU_HEADER
    gap = by_name["fastpeft:fused", "unmeasured"]
    assert gap["note"] == "its kernels need a GPU" and gap["shape"] == {"name": "all cells"} and gap["median"] is None
    lines.save(found, tmp_path / "here.jsonl")
    assert lines.load(tmp_path / "here.jsonl") == found
    assert tables.of_lines(found) == [], "a CPU timed no kernel"


def test_figures_of_a_gpu_reach_the_tables(tmp_path):
    rows = result("frozen", 0.7, 0.0), result("fastpeft", 0.78, 0.112), result("peft", status="wrong", note="off")
    gap = {"op": "lora_linear", "cell": "all cells", "impl": "flex", "reason": "not installed"}
    lost = {"op": "lora_linear", "cell": "k/v M=1", "impl": None, "reason": "the budget was spent"}
    lines.save(lines.of(document(*rows, unmeasured=(gap, lost))), tmp_path / "gpu.jsonl")
    found = {line["impl"]: line for line in lines.load(tmp_path / "gpu.jsonl")}
    assert list(found) == ["frozen", "fastpeft", "peft", "flex", lines.EVERY]
    assert found["peft"]["checked"] is False and found["flex"]["stamp"]["gpu"] == GPU
    text = tables.text(tables.read(tmp_path))
    assert "| q/o M=8192 K=4096 N=4096 r=16 | bf16 | 0 | fwd+bwd | 0.700 | +11.2 | wrong |" in text


def test_steps_have_their_own_figures():
    step = result("fastpeft", 200.0, 0.1, op="step", **{"pass": "step"}, tokens_per_s=4e4, mfu=0.41)
    (line,) = lines.of(document(step))
    assert (line["tokens_per_s"], line["mfu"]) == (4e4, 0.41)
    older = {name: value for name, value in step.items() if name not in ("tokens_per_s", "mfu")}
    (line,) = lines.of(document(older))
    assert lines.problems([line]) == [] and line["tokens_per_s"] is None


def test_what_is_not_finite_is_null(tmp_path):
    made = document(result("frozen", 1.0, math.inf, peak_bytes=math.nan), copy_gbps=None)
    made["stamp"]["ceilings"] = dict.fromkeys(("copy_gbps", "matmul_tflops"))
    lines.save(lines.of(made), tmp_path / "a.jsonl")
    (line,) = lines.load(tmp_path / "a.jsonl")
    assert line["overhead_over_floor"] is None and line["peak_bytes"] is None and line["gbps_of_ceiling"] is None
    assert line["median"] == 1.0 and "copy_gbps" not in line["stamp"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.jsonl"
    found = lines.of(document(result("frozen")))
    lines.save(found, path)
    with pytest.raises(TypeError):
        lines.save([*found, {"not": {1, 2}}], path)
    assert lines.load(path) == found and [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


GOOD = lines.of(document(result("frozen", 0.7, 0.0), result("fastpeft", 0.75, 0.07)))
BAD = {
    "empty": ("\n", r"a\.jsonl holds no results"),
    "half a line": (json.dumps(GOOD[0])[:90], r"a\.jsonl, line 1 is not JSON"),
    "a document": (json.dumps({"schema": 2}, indent=1), r"a\.jsonl, line 1 is not JSON"),
    "NaN": ('{"median": NaN}', r"a\.jsonl, line 1 is not JSON \(NaN is no JSON number\)"),
    "not UTF-8": (b"\xff\xfe", r"a\.jsonl cannot be read"),
    "nested": ("[" * 100_000, r"a\.jsonl, line 1 is not JSON"),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_a_file_that_is_none_is_refused(content, said, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FastpeftError, match=said):
        lines.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FastpeftError, match=r"nowhere\.jsonl cannot be read"):
        lines.load(tmp_path / "nowhere.jsonl")


WRONG = {
    "schema": ({"schema": 7}, "schema 7, this reads 1"),
    "prediction": ({"prediction": True}, "a prediction, and no result"),
    "kind": ({"median": "fast"}, "it.median is str"),
    "unknown": ({"speed": 1.0}, "it.speed is unknown"),
    "status": ({"status": "fine"}, "status 'fine', not one of ok, wrong, missing, failed, unmeasured"),
    "ok without": ({"median": None}, "ok, and without a median"),
    "wrong with": ({"status": "wrong", "speedup": {"peft": 2.0}}, "wrong, and shows median, .*, speedup"),
    "no stamp": ({"stamp": None}, "it.stamp is NoneType, not an object"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_a_line_that_departs_from_the_schema_is_named(changes, said, tmp_path):
    found = [GOOD[0], {**GOOD[1], **changes}]
    assert lines.problems(GOOD) == []
    assert {problem.split(": ")[0] for problem in lines.problems(found)} == {"line 2"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in found))
    with pytest.raises(FastpeftError, match=rf"a\.jsonl, line 2: {said}"):
        lines.load(path)


def test_a_missing_field_is_named():
    line = {name: value for name, value in GOOD[1].items() if name != "checked"}
    assert lines.problems([line, 3]) == ["line 1: it.checked is missing", "line 2: it is int, not an object"]


# How lines are told apart


def test_who_is_ours():
    names = ("fastpeft", "fastpeft:fused", "fastpeft-fp32", "fastpefty", "peft", report.FLOOR)
    assert [lines.is_ours({"impl": name}) for name in names] == [True, True, True, False, False, False]


def test_cells_are_called_by_what_differs():
    attention = [
        {"name": f"llama-{s}", "B": 8, "S": s, "P": 30, "alibi": 0, "dropout": 0.0, "dtype": "bf16"}
        for s in (512, 2048)
    ]
    common, own = lines.told_apart(attention)
    assert common == "B=8 P=30 alibi=0 bf16" and own == ["llama-512 S=512", "llama-2048 S=2048"]
    dropped = [{**Q_O, "dropout": p, "dtype": "bf16"} for p in (0.0, 0.05)]
    common, own = lines.told_apart(dropped)
    assert common == "q/o M=8192 K=4096 N=4096 r=16 bf16" and own == ["dropout=0", "dropout=0.05"]
    assert lines.told_apart(dropped[:1]) == ("M=8192 K=4096 N=4096 r=16 bf16", ["q/o"])
    assert lines.told_apart([dropped[1], {"name": "k/v", "dtype": "fp32"}])[1][1] == "k/v fp32"
