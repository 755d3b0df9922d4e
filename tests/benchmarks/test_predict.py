"""Predictions: against published arithmetic, and never to be taken for measurements."""

import dataclasses

import pytest

from benchmarks import (
    bench_dora_linear,
    bench_gated_prompt_attention,
    bench_lora_linear,
    bench_prefix_attention,
    predict,
    report,
)
from benchmarks.designs import DESIGNS, KINDS
from benchmarks.geometry import GEOMETRIES
from benchmarks.predict import MARK, SHARES, predictions, text
from benchmarks.replay import COVERED, EAGER
from fastpeft.cost import MACHINES, PASSES
from fastpeft.errors import FastpeftError

LORA, PREFIX, GATED = bench_lora_linear.BENCH, bench_prefix_attention.BENCH, bench_gated_prompt_attention.BENCH
DORA = bench_dora_linear.BENCH

LAYERS = GEOMETRIES["llama3-8b"].linears


def lora_cell(name="q/o", r=16, dropout=0.0, dtype="bf16", bench=LORA):
    k, n = LAYERS[name]
    return bench.cell(name=name, M=8192, K=k, N=n, r=r, dropout=dropout, dtype=dtype)


def prefix_cell(S=2048, P=30, **options):
    return PREFIX.cell(name="given", B=8, H=32, Hkv=8, S=S, P=P, D=128, dtype="bf16", **options)


def percent(found, impl):
    (entry,) = [entry for entry in found if entry["impl"] == impl]
    return 100 * entry["predicted_overhead"]


@pytest.mark.parametrize(("name", "expected"), [("q/o", 11.2), ("gate/up", 6.4), ("down", 8.0)])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_prewriting_costs_what_the_roofline_of_an_h200_says(name, expected, dropout):
    """One read and one write beside the three passes, R (1/K + 1.5/N) at 790 TFLOP/s and 4.3 TB/s."""
    found = predictions(LORA, [lora_cell(name, dropout=dropout)], machines=["h200"])
    assert percent(found, "fastpeft:prewrite") == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize(("S", "expected"), [(512, 23.0), (2048, 6.0), (8192, 1.4)])
def test_concatenating_costs_what_the_roofline_of_an_h200_says(S, expected):
    found = predictions(PREFIX, [prefix_cell(S)], machines=["h200"])
    assert percent(found, "fastpeft:concat") == pytest.approx(expected, abs=0.4)
    assert percent(found, "least") == pytest.approx(100 * 60 / S)


@pytest.mark.parametrize("passed", PASSES)
@pytest.mark.parametrize("rank", [8, 64, 128])
def test_nothing_is_predicted_below_the_least(passed, rank):
    cells = [lora_cell(name, rank, p) for name in LAYERS for p in (0.0, 0.05)]
    found = predictions(LORA, cells, passed) + predictions(PREFIX, [prefix_cell(), prefix_cell(512, 200)], passed)
    least = {(e["cell"], e["machine"]): e["predicted_ms"] for e in found if e["impl"] == predict.LEAST}
    assert len(least) == (len(cells) + 2) * len(MACHINES)
    for entry in found:
        assert entry["predicted_ms"] >= least[entry["cell"], entry["machine"]] * (1 - 1e-9)
        assert entry["predicted_overhead"] >= 0


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_dora_is_lora_and_a_few_passes_and_under_dropout_the_base_once_more(dropout):
    """Beside LoRA's kernels: the norms' pass over W, one more over y, two over dY and one over H."""
    lora = predictions(LORA, [lora_cell(dropout=dropout)], machines=["h200"])
    dora = predictions(DORA, [lora_cell(dropout=dropout, bench=DORA)], machines=["h200"])
    assert all("dora" in entry["cell"] for entry in dora)
    for impl in ("fastpeft:prewrite", "least"):
        more = percent(dora, impl) - percent(lora, impl)
        assert 100 * bool(dropout) < more < 100 * bool(dropout) + 35, impl


def test_forward_and_backward_are_both_passes():
    forward, backward, both = (
        {(e["machine"], e["impl"]): e["predicted_ms"] for e in predictions(LORA, [lora_cell()], passed)}
        for passed in PASSES
    )
    assert both == pytest.approx({key: forward[key] + backward[key] for key in both})


@pytest.mark.parametrize("bench", [LORA, DORA, PREFIX, GATED], ids=lambda bench: bench.op)
def test_every_cell_of_a_bench_has_a_prediction(bench):
    for tiny in (False, True):
        cells = [cell for tier in bench.tiers(tiny) for cell in tier]
        found = predictions(bench, cells, machines=["h100"])
        predicted = {cell.id for cell in cells if getattr(cell, "launches", COVERED) != EAGER}
        assert {entry["cell"] for entry in found} == predicted
        assert text(found).count("H100 SXM") == 1 + len(predicted)


def test_what_the_vendor_cannot_do_is_not_predicted_of_it():
    found = predictions(PREFIX, [prefix_cell(alibi=True)], machines=["h100"])
    assert [entry["impl"] for entry in found] == ["fastpeft:fused", "least"]


def test_every_kind_of_kernel_has_a_share_and_every_op_a_design():
    assert set(SHARES) == set(KINDS) and all(0 < share < 1 for share in SHARES.values())
    assert {LORA.op, DORA.op, PREFIX.op, GATED.op} <= set(DESIGNS)


def test_every_line_of_text_is_marked_and_the_assumptions_are_stated():
    found = predictions(LORA, [lora_cell()]) + predictions(PREFIX, [prefix_cell(), prefix_cell(alibi=True)])
    lines = text(found).splitlines()
    assert all(line.startswith(MARK) for line in lines)
    whole = "\n".join(lines)
    for machine in MACHINES.values():
        assert f"{machine.name} {machine.tflops:.0f} TFLOP/s, {machine.gbps / 1000:.2f} TB/s" in whole
    for share in SHARES.values():
        assert f"{100 * share:.0f} %" in whole
    assert "data sheets" in whole and "none of it measured" in whole
    table = [line for line in lines if "H200 SXM" in line and "q/o" in line]
    assert len(table) == 1 and "+11.2" in table[0] and "0.695" in table[0]
    assert len([line for line in lines if "alibi=1" in line and " · " in line]) == len(MACHINES)


def test_a_prediction_is_no_measurement():
    """No key of a result's times is among its keys, and a document of results does not take one."""
    found = predictions(LORA, [lora_cell()])
    measured = {"median_ms", "p20_ms", "p80_ms", "forward_ms", "overhead_over_floor", "gbps", "tflops", "speedup_vs"}
    assert all(entry["prediction"] is True and not measured & set(entry) for entry in found)
    document = report.new_document({}) | {"stamp": report.stamp("cpu"), "results": found[:1]}
    assert any("predicted_ms is unknown" in problem for problem in report.problems(document))


REFUSED = [
    (lambda: predictions(LORA, [lora_cell(dtype="fp32")]), "no prediction for fp32: .* choose --dtype bf16"),
    (lambda: predictions(LORA, [lora_cell()], "both"), "no prediction for the pass 'both': choose one of fwd"),
    (lambda: predictions(dataclasses.replace(LORA, op="step"), [lora_cell()]), "no prediction for step: choose one"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_what_nothing_is_known_of_is_refused(call, said):
    with pytest.raises(FastpeftError, match=said):
        call()
