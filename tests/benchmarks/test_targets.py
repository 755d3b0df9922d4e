"""Targets: what is met, what is missed and by how much, and the screen that says it."""

import pytest

from benchmarks import report, summary, targets
from benchmarks.targets import TARGETS, Outcome, Target


def row(op, impl, shape, **figures):
    blank = {"dropout": 0.0, "pass": "fwd+bwd", "status": "ok", "median_ms": 1.0, "overhead_over_floor": 0.0,
             "saved_bytes": 0, "speedup_vs": {}, "note": ""}  # fmt: skip
    return blank | {"op": op, "impl": impl, "shape": shape} | figures


def linear(kind, impl="fastpeft", **figures):
    return row("lora_linear", impl, {"name": f"llama3-8b {kind}", "M": 8192, "r": 16}, **figures)


def attention(length, impl="fastpeft", **figures):
    return row("prefix_attention", impl, {"name": "llama3-8b", "B": 8, "S": length, "P": 30}, **figures)


def measured(rows):
    return {o.target.name: o.measured for o in targets.outcomes({"results": rows}) if o.measured is not None}


def test_each_figure_comes_from_its_rows():
    layer = [linear(kind, impl, median_ms=ms) for kind in targets.LAYER for impl, ms in (("fastpeft", 2), ("peft", 3))]
    assert measured(layer)["LoRA, a layer's linears: vs HF peft, same dtype"] == pytest.approx(1.5)
    assert "LoRA, a layer's linears: vs HF peft, same dtype" not in measured(layer[1:])
    found = measured([attention(512, overhead_over_floor=0.31, speedup_vs={"peft": 1.7})])
    assert found == {"prefix, S=512: over the floor": 0.31, "prefix, S=512: vs HF peft": 1.7}
    grid = [row("lora_linear", "fastpeft", {"name": "lorafusion-grid"}, speedup_vs={"peft": r}) for r in (1.2, 1.4)]
    assert measured(grid) == {"LoRA, LoRAFusion's grid: vs HF peft": pytest.approx(1.3)}
    kept = [linear("q/o", saved_bytes=8192 * 4096 * (2 + p), dropout=0.05 * p) for p in (0, 1)]
    assert measured(kept)["LoRA, kept for dropout, for each number of x"] == 1.0
    step = row("step", "fastpeft", {"name": "llama3-8b lora", "batch": 1}, tokens_per_s=9e3, **{"pass": "step"})
    assert measured([step]) == {"Llama-3-8B, LoRA on all linears: a step": 9e3}
    apart = [attention(2048, "peft", saved_bytes=5e8), attention(2048, saved_bytes=2e8)]
    assert measured(apart)["prefix, 32 layers, B=8, S=2048: less kept than HF peft"] == pytest.approx(9.6)


def test_other_passes_wrong_results_and_other_sizes_say_nothing():
    others = [
        attention(512, **{"pass": "fwd"}),
        attention(512, status="wrong"),
        attention(1024),
        attention(512) | {"shape": {"name": "llama3-8b", "B": 4, "S": 512, "P": 30}},
    ]
    assert measured(others) == {}


@pytest.mark.parametrize(
    ("target", "value", "gap"),
    [
        (Target("a", 0.11, None), 0.11, 0.0),
        (Target("a", 0.11, None), 0.221, 0.1),
        (Target("a", 1.6, None, True, "x"), 1.6, 0.0),
        (Target("a", 1.6, None, True, "x"), 0.8, 1.0),
        (Target("a", 8.0, None, True, "GB"), -3.0, float("inf")),
        (Target("a", 8.0, None, True, "GB"), 0.0, float("inf")),
        (Target("a", 0.125, None, unit="bytes"), 0.25, 1.0),
        (Target("a", 0.125, None, unit="bytes"), 0.0, -1.0),
    ],
)
def test_a_gap_is_the_fraction_that_is_missing(target, value, gap):
    assert Outcome(target, value).gap == pytest.approx(gap) and Outcome(target, value).met == (gap <= 0)
    assert Outcome(target, None).gap is None and Outcome(target, None).met is None


def test_the_largest_gaps_are_named_first():
    found = [Outcome(target, None) for target in TARGETS[:-5]]
    found += [Outcome(Target(name, 1.0, None, True, "x"), 1 / (1 + gap)) for name, gap in
              (("small", 0.1), ("met", -0.1), ("large", 0.9), ("middle", 0.5), ("tiny", 0.01))]  # fmt: skip
    assert [outcome.target.name for outcome in targets.gaps(found)] == ["large", "middle", "small"]


def test_the_screen_names_targets_gaps_and_troubles(tmp_path):
    document = report.new_document({})
    document["stamp"] = report.stamp("cpu") | {"device": "a GPU", "header": ""}
    wrong = linear("k/v", "fastpeft:fused", status="wrong", note="dA: gain 0.5", median_ms=None)
    document["results"] = [linear("q/o", overhead_over_floor=0.2), attention(8192, overhead_over_floor=0.01), wrong]
    document["steps"] = [
        {"name": "lora", "status": "done", "seconds": 61.0, "budget_s": 60.0, "note": ""},
        {"name": "step", "status": "partial", "seconds": 9.0, "budget_s": 60.0, "note": "ended by signal 6"},
    ]
    printed = summary.text(document, tmp_path)
    lines = printed.splitlines()
    assert len(lines) <= summary.LINES and max(map(len, lines)) <= 120
    assert "done: lora 61 s" in printed and "step: partial: ended by signal 6" in printed
    assert any("q/o, r=16: over" in line and "20.0 %" in line and "missed by 8.1 %" in line for line in lines)
    assert any("S=8192: over" in line and line.endswith("met") for line in lines)
    assert "largest gaps: LoRA, q/o, r=16: over the floor" in printed
    assert "wrong: lora_linear, fastpeft:fused: dA: gain 0.5" in printed
