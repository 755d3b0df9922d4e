"""Targets: what is met, what is missed and by how much, and the screen that says it."""

import pytest

from benchmarks import report, summary, targets
from benchmarks.benches import BENCHES
from benchmarks.request import Request
from benchmarks.runner import in_turns
from benchmarks.step_cases import cases
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
    step = row("step", "fastpeft", {"name": "llama3-8b lora", "batch": 2, "seq": 4096}, tokens_per_s=9e3)
    step["pass"] = "step"
    assert measured([step]) == {"Llama-3-8B, LoRA on all linears, 2 x 4096: a step": 9e3}
    step["shape"]["seq"] = 2048
    assert measured([step]) == {}
    blocks = [row("lora_projections", "fastpeft", {"name": f"llama3-8b {name}", "M": 8192, "r": 16},
                  overhead_over_floor=over) for name, over in (("gate,up", 0.3), ("q,k,v", 0.08))]  # fmt: skip
    assert measured(blocks) == {"LoRA, q,k,v as one op, r=16: over the floor": 0.08}
    mlp = [row("lora_mlp", impl, {"name": "llama3-8b mlp", "M": m, "r": r}, overhead_over_floor=over)
           for impl, m, r, over in (("fastpeft", 8, 16, 0.7), ("fastpeft", 8192, 32, 0.06),
                                    ("fastpeft:separate", 8192, 16, 0.09), ("fastpeft", 8192, 16, 0.04))]  # fmt: skip
    assert measured(mlp) == {"LoRA, the MLP as one op, r=16: over the floor": 0.04}
    apart = [attention(2048, "peft", saved_bytes=5e8), attention(2048, saved_bytes=2e8)]
    assert measured(apart)["prefix, 32 layers, B=8, S=2048: less kept than HF peft"] == pytest.approx(9.6)


def test_every_target_is_of_something_that_is_planned():
    """Rows of all cells and steps, each with every figure."""
    figures = {"overhead_over_floor": 0.1, "saved_bytes": 1, "tokens_per_s": 1.0}
    figures |= {"speedup_vs": {"peft": 1.5, "lorafusion": 1.5}}
    cells = [(bench.op, "fwd+bwd", cell) for bench, cell in in_turns(list(BENCHES.values()))]
    planned = [*cells, *(("step", "step", case) for case in cases(Request()))]
    rows = [
        row(op, impl, cell.shape(), dropout=cell.dropout, **figures) | {"pass": passed}
        for op, passed, cell in planned
        for impl in ("fastpeft", "peft")
    ]
    assert [target.name for target in TARGETS if target.name not in measured(rows)] == []


@pytest.mark.parametrize(
    ("at_least", "value", "met", "stretched"),
    [
        (False, 0.11, True, False),
        (False, 0.09, True, True),
        (False, 0.12, False, False),
        (True, 0.10, False, False),
        (True, 0.115, True, False),
        (True, 0.12, True, True),
    ],
)
def test_a_stretch_is_beyond_the_target(at_least, value, met, stretched):
    outcome = Outcome(Target("a", 0.11, None, at_least, "x", 0.12 if at_least else 0.09), value)
    assert (outcome.met, outcome.stretched) == (met, stretched)
    assert Outcome(Target("a", 0.11, None, at_least), value).stretched is None
    assert Outcome(Target("a", 0.11, None, stretch=0.0), 0.0).stretched and Outcome(TARGETS[0], None).stretched is None


def test_each_stretch_is_beyond_its_target():
    further = [t for t in TARGETS if t.stretch is not None]
    assert len(further) == 10 and all(
        Outcome(t, t.stretch).stretched and Outcome(t, t.stretch).gap < 0 for t in further
    )


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
    document["results"].append(linear("q/o", overhead_over_floor=0.1, dropout=0.05))
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
    assert any(line.split("  ")[0] == "target" and "stretch" in line for line in lines)
    (dropout,) = [line for line in lines if "q/o, r=16, dropout" in line]
    assert dropout.split()[-8:] == ["11.0", "%", "10.0", "%", "met,", "and", "its", "stretch"]
    assert "largest gaps: LoRA, q/o, r=16: over the floor" in printed
    assert "wrong: lora_linear, fastpeft:fused: dA: gain 0.5" in printed
