"""Whole training steps: what is timed is right, named, resumed, and shares one base."""

import copy
import gc
import itertools
import json
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_step, lines, report, step_cases, step_check, step_models
from benchmarks.geometry import GEOMETRIES
from benchmarks.harness import Budget
from benchmarks.request import Request
from benchmarks.step_cases import METHODS, Case, cases, cases_of
from benchmarks.step_check import Check, Outcome, errors_of
from benchmarks.step_models import ALGEBRA, FUSED, OURS, PEFT, build_base, model_flops, share, trained
from fastpeft.configs import PEFT_TYPE_TO_CONFIG_MAPPING
from fastpeft.tuners.lora import LoraLayer

CPU = torch.device("cpu")
LORA, PREFIX = Case("tiny", "lora", 2, 32, "fp32"), Case("tiny", "prefix", 2, 32, "fp32")
HAD = {peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}
LLAMA = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=61)
SMALLER = {
    "qwen3-8b": {**LLAMA, "num_key_value_heads": 2, "head_dim": 16},
    "bloom-560m": dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=61),
    "bert-base": LLAMA,
}


def run(wanted, document=None, budget=None, save=lambda: None, **plan) -> dict:
    """A run of these cases on the CPU; returns the document."""
    usual = {"device": "cpu", "rounds": [2, 2], "seconds_per_cell": 0.0, "without": {}, "skip": {}}
    if document is None:
        document = report.new_document({**usual, "cases": [asdict(case) for case in wanted], **plan})
        document["stamp"] = report.stamp("cpu")
        document["stamp"]["ceilings"] = {"copy_gbps": 50.0, "matmul_tflops": 0.5}
    bench_step.Steps(document, cases_of(document["plan"]), save, budget or Budget(100), lambda text: None).measure()
    return document


def found(document, name: str, method: str = "") -> dict:
    """The only row of an implementation, or of a method's."""
    (row,) = [row for row in document["results"] if row["impl"] == name and row["shape"]["name"].endswith(method)]
    return row


@pytest.fixture
def smaller(monkeypatch):
    """A model of a geometry's family with sizes for a CPU; returns its name."""

    def add(name: str) -> str:
        geometry = GEOMETRIES[name]
        arguments = {**geometry.arguments, **SMALLER[name]}
        sizes = {"heads": 4, "kv_heads": arguments.get("num_key_value_heads", 4), "depth": 16}
        monkeypatch.setitem(step_cases.MODELS, f"small {name}", replace(geometry, arguments=arguments, **sizes))
        return f"small {name}"

    return add


@pytest.fixture(scope="module")
def quick():
    """What `fastpeft bench step --quick` measures on a CPU, and what was running whenever it was saved."""
    running, wanted = [], cases(Request(tiny=True, quick=True))
    plan = {"cases": [asdict(case) for case in wanted]}
    document = report.new_document(
        {"device": "cpu", "rounds": [2, 2], "seconds_per_cell": 0.0, "without": {}, "skip": {}, **plan}
    )
    document["stamp"] = report.stamp("cpu")
    run(wanted, document, save=lambda: running.append(document["running"]))
    return document, running


# Rows


def test_rows_follow_the_schema(quick):
    document = json.loads(json.dumps(quick[0]))
    assert report.problems(document) == [] and lines.problems(lines.of(document)) == []
    assert [row["impl"] for row in document["results"]] == list(bench_step.IMPLEMENTATIONS) * 5
    assert {(row["op"], row["pass"], row["dtype"]) for row in document["results"]} == {("step", "step", "fp32")}
    assert document["running"] is None and [each["impl"] for each in document["unmeasured"]] == ["peft-compile"]
    assert document["stamp"]["ceilings"]["matmul_tflops"] > 0


def test_a_row_holds_the_figures(quick):
    for method in METHODS:
        rows = [row for row in quick[0]["results"] if row["shape"]["name"] == f"tiny {method}"]
        for row in (row for row in rows if row["status"] == "ok"):
            others = {PEFT, ALGEBRA} - {row["impl"]} if method == "lora" else {PEFT} - {row["impl"]}
            assert row["tokens_per_s"] == pytest.approx(64 / row["median_ms"] * 1e3)
            assert row["shape"] == {"name": f"tiny {method}", "batch": 2, "seq": 32}
            assert row["saved_bytes"] > 0 and row["rounds"] == 2 and row["mfu"] is None
            assert set(row["speedup_vs"]) == (set() if row["impl"] == "frozen" else others)
            assert (row["checked"] is None) == (row["impl"] == "frozen")
            if row["impl"] != "frozen":
                assert row["checked"]["problems"] == [] and row["checked"]["rms_ratio"]
                assert "HF peft in float64, batch 2 of 32 tokens" in row["checked"]["truth"]


def test_every_method_is_measured_or_named(quick):
    for method, about in METHODS.items():
        if method not in dict(step_cases.ALL_METHODS):
            assert [case.method for case in cases(Request(tiny=True), [method])] == [method] * 2
            continue
        rows = [row for row in quick[0]["results"] if row["impl"] == OURS and row["shape"]["name"] == f"tiny {method}"]
        for row in rows:
            assert row["status"] == ("ok" if about.peft_type in HAD else "missing")
            assert row["status"] == "ok" or row["note"] == f"fastpeft has no tuner for {about.peft_type}"
        assert len(rows) == (2 if method == "lora" else 1)


def test_a_method_without_a_tuner_is_named(monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "LORA")
    document = run([LORA])
    assert found(document, OURS)["status"] == "missing"
    assert found(document, OURS)["note"] == "fastpeft has no tuner for LORA"
    assert found(document, PEFT)["status"] == "ok" and report.exit_code(document) == 0


def test_every_stage_is_named_before_it_begins(quick):
    first = [(at["impl"], at["stage"]) for at in quick[1] if at and at["cell"] == LORA.id]
    checked, warmed = (PEFT, ALGEBRA, OURS, FUSED, "liger"), ("frozen", PEFT, ALGEBRA, OURS, FUSED)
    stages = [(None, "base"), (None, "truth"), *((name, "check") for name in checked)]
    assert first[:-1] == [*stages, *((name, "warm-up") for name in warmed), (None, "timing")]
    assert quick[1][0]["stage"] == "ceilings" and quick[1][-1] is None


def test_mfu_is_of_the_measured_product():
    case = replace(LORA, dtype="bf16")
    row = found(run([case]), OURS)
    flops = model_flops(build_base("tiny", "bf16", CPU), case)
    assert row["status"] == "ok" and row["mfu"] == pytest.approx(flops / (row["median_ms"] / 1e3) / 0.5e12)


@pytest.mark.parametrize("name", ["tiny", "bloom-560m", "bert-base"])
def test_model_flops_are_those_that_torch_counts(name, smaller):
    case = Case(name if name == "tiny" else smaller(name), "lora", 2, 48, "fp32")
    base = build_base(case.model, "fp32", CPU)
    base.set_attn_implementation("eager")
    step = bench_step.step_of("frozen", base, case, CPU)
    with FlopCounterMode(display=False) as counter:
        step.run()
    geometry = case.geometry
    pairs = 2 * 48**2 * geometry.heads * geometry.depth * 2
    # Eager attention computes what a causal mask hides.
    expected = model_flops(base, case) + (6 * pairs if geometry.causal else 0)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    assert 12 * pairs > 0.05 * expected


# Right or not timed


def wrong_factors(monkeypatch):
    factors = LoraLayer.factors
    monkeypatch.setattr(LoraLayer, "factors", lambda self, name: tuple(1.01 * f for f in factors(self, name)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_gradient_is_not_timed(monkeypatch, dtype):
    wrong_factors(monkeypatch)
    document = run([replace(LORA, dtype=dtype)])
    row = found(document, OURS)
    assert row["status"] == "wrong" and "gradient of model.layers.*.self_attn.q_proj.lora_A" in row["note"]
    assert row["median_ms"] is row["tokens_per_s"] is row["mfu"] is None and row["checked"]["problems"]
    assert found(document, PEFT)["status"] == "ok"
    assert report.problems(document) == [] and report.exit_code(document) == 3


def test_a_prefix_that_is_not_seen_right_is_not_timed(monkeypatch):
    from fastpeft.attention import interface

    def slightly_off(module, query, key, value, mask, prefix, prompts=(), **options):
        return prefix_attention(query, key, value, prefix[0], prefix[1] * 1.01)

    prefix_attention = interface.prefix_attention
    monkeypatch.setattr(interface, "attend", slightly_off)
    row = found(run([PREFIX]), OURS)
    assert row["status"] == "wrong" and "prompt_encoder" in row["note"]


def test_a_fault_at_the_timed_size_alone_is_found(monkeypatch):
    monkeypatch.setattr(step_check, "SEQ", 16)

    class Faulty(step_models.Model):
        def loss(self, inputs):
            loss = super().loss(inputs)
            return loss if inputs["input_ids"].shape[1] == 16 else loss + 0.01 * (loss - loss.detach())

    def adapted(name, *given, **options):
        model = step_models.adapted(name, *given, **options)
        return Faulty(model.module, model.context) if name == OURS else model

    assert found(run([LORA]), OURS)["checked"]["truth"] == "HF peft in float64, batch 2 of 16 tokens"
    monkeypatch.setattr(step_check, "adapted", adapted)
    row = found(run([LORA]), OURS)
    assert row["status"] == "wrong" and all("at the timed size" in text for text in row["checked"]["problems"])


def test_without_memory_for_the_truth_the_two_are_compared(monkeypatch):
    def widened(base, dtype):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(step_check, "widened", widened)
    row = found(run([LORA]), OURS)
    assert row["status"] == "ok" and "HF peft in fp32, for want of memory for float64" in row["checked"]["truth"]
    wrong_factors(monkeypatch)
    assert found(run([LORA]), OURS)["status"] == "wrong"


def test_what_peft_does_not_have_is_measured_by_the_plain_formula(smaller):
    document = run([Case(smaller("qwen3-8b"), "adapter", 2, 24, "fp32")])
    assert found(document, PEFT)["status"] == "missing" and "qwen3" in found(document, PEFT)["note"]
    ours = found(document, OURS)
    assert ours["status"] == "ok" and ours["speedup_vs"] == {}
    assert ours["checked"]["truth"].startswith("fastpeft's plain torch path in float64")


def test_what_peft_does_not_have_is_missing(smaller):
    document = run([Case(smaller("bloom-560m"), "adapter", 2, 24, "fp32")])
    assert found(document, OURS)["status"] == "ok"
    row = found(document, PEFT)
    assert row["status"] == "missing" and "Unsupported model type for adaption prompt: 'bloom'" in row["note"]


def test_a_classifier_is_trained_whole_beside_its_adapter(smaller):
    row = found(run([Case(smaller("bert-base"), "prefix", 2, 24, "fp32")]), OURS)
    assert row["status"] == "ok" and any("classifier" in name for name in row["checked"]["rms_ratio"])


def test_comparisons_that_say_nothing_are_errors():
    ones = Outcome(1.0, {"layers.0.a.b": torch.ones(2)})
    assert errors_of(ones, ones).pooled == {"layers.*.a.b": 0.0}
    for other, words in [({"layers.0.a.b": torch.zeros(2)}, "zero"), ({}, "on one side"),
                         ({"layers.0.a.b": torch.ones(3)}, "expected")]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            errors_of(ones, Outcome(1.0, other))
    assert errors_of(Outcome(1.0, {"layers.0.a.b": torch.full((2,), torch.nan)}), ones).pooled["layers.*.a.b"] > 1


def test_a_number_next_to_zero_is_judged_by_its_kind():
    truth = Outcome(1.0, {f"layers.{i}.gate": torch.tensor([value]) for i, value in enumerate((1.0, 1.0, 1e-6))})
    found = Outcome(1.0, {name: gradient + 1e-3 for name, gradient in truth.gradients.items()})
    errors = errors_of(found, truth)
    assert errors.worst("layers.*.gate") == pytest.approx(1.2e-3, rel=0.03)
    assert errors.gain["layers.*.gate"] == pytest.approx(1.001) and errors.numbers == {"layers.*.gate": 3}


# One base


@pytest.mark.parametrize("model", ["tiny", "bert-base"])
def test_all_models_share_the_base_and_leave_it_alone(model, smaller, monkeypatch):
    case = Case(model if model == "tiny" else smaller(model), "lora", 2, 24, "fp32", 0.05)
    base = build_base(case.model, "fp32", CPU)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    for name in ("frozen", PEFT, OURS):
        module = bench_step.step_of(name, base, case, CPU).model.module
        own = {p.data_ptr() for p in trained(module).values()}
        assert {p.data_ptr() for p in module.parameters()} - own <= pointers and not own & pointers
        assert len(own) == len(trained(module)) == (0 if name == "frozen" else 28)
    monkeypatch.setattr(bench_step, "build_base", lambda *given: base)
    assert found(run([case]), OURS)["status"] == "ok"
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())


def test_tied_weights_stay_tied_in_copies(smaller, monkeypatch):
    arguments = {**GEOMETRIES["tiny"].arguments, "tie_word_embeddings": True}
    monkeypatch.setitem(step_cases.MODELS, "tied", replace(GEOMETRIES["tiny"], arguments=arguments))
    copied = step_models.widened(build_base("tied", "fp32", CPU), torch.float64)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight and copied.lm_head.weight.dtype == torch.float64
    assert share(copied).lm_head.weight is copied.lm_head.weight


def test_the_wider_base_is_gone_after_the_check(monkeypatch):
    kept, widened = [], step_check.widened

    def noting(base, dtype):
        kept.append(widened(base, dtype))
        return kept[-1]

    monkeypatch.setattr(step_check, "widened", noting)
    check = Check(LORA, build_base("tiny", "fp32", CPU), CPU)
    (weight,) = [weakref.ref(module.lm_head.weight) for module in kept]
    assert weight() is not None
    kept.clear()
    gc.collect()
    assert weight() is None and check.exact.gradients


def test_neighbours_share_one_build(monkeypatch):
    built = []
    monkeypatch.setattr(bench_step, "build_base", lambda *given: built.append(given) or build_base(*given))
    run([LORA, PREFIX, replace(LORA, dtype="bf16")])
    assert [each[:2] for each in built] == [("tiny", "fp32"), ("tiny", "bf16")]


# Going on


def test_a_run_is_taken_up_where_it_stopped(monkeypatch):
    document = run([LORA, PREFIX])
    kept = copy.deepcopy(document["results"][:6])
    document["results"] = json.loads(json.dumps(kept))
    measured = []
    attempt = bench_step.Steps._case
    monkeypatch.setattr(
        bench_step.Steps, "_case", lambda self, case, *more: measured.append(case) or attempt(self, case, *more)
    )
    run([], document)
    assert measured == [PREFIX] and document["results"][:6] == kept and len(document["results"]) == 12


def test_a_spent_budget_names_what_is_missing():
    now = itertools.count(0, 10).__next__  # ten seconds go by between any two looks at the clock
    document = run([LORA, PREFIX, replace(LORA, dropout=0.05)], budget=Budget(65, now))
    assert {row["shape"]["name"] for row in document["results"]} == {"tiny lora"}
    assert [entry["cell"] for entry in document["unmeasured"]][:2] == [PREFIX.id, replace(LORA, dropout=0.05).id]
    assert document["unmeasured"][0]["reason"] == "the budget of 65 s was spent"


def test_what_the_plan_leaves_out_is_named():
    without = {"step": {PEFT: "ended the process"}}
    document = run([LORA, PREFIX], without=without, skip={PREFIX.id: "ended it too"}, against=["peft"])
    assert [row["impl"] for row in document["results"]] == ["frozen", OURS, FUSED]
    assert document["results"][1]["status"] == "ok" and document["results"][1]["speedup_vs"] == {}
    assert [(each["cell"], each["impl"], each["reason"]) for each in document["unmeasured"]] == [
        ("all cells", PEFT, "ended the process"),
        (PREFIX.id, None, "ended it too"),
    ]


def test_one_that_has_no_memory_is_named_and_the_rest_is_measured(monkeypatch):
    step_of = bench_step.step_of

    def planted(name, *given):
        if name == PEFT:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return step_of(name, *given)

    monkeypatch.setattr(bench_step, "step_of", planted)
    document = run([LORA])
    assert found(document, PEFT)["status"] == "failed" and "out of memory" in found(document, PEFT)["note"]
    assert found(document, OURS)["overhead_over_floor"] is not None and PEFT not in found(document, OURS)["speedup_vs"]
    assert report.problems(document) == [] and report.exit_code(document) == 1


def test_without_memory_for_the_model_the_case_is_left_out(monkeypatch):
    def build(model, dtype, device):
        if dtype == "bf16":
            raise torch.OutOfMemoryError("tried to allocate 16 GiB")
        return build_base(model, dtype, device)

    monkeypatch.setattr(bench_step, "build_base", build)
    document = run([replace(LORA, dtype="bf16"), PREFIX])
    assert "no memory for the model" in document["unmeasured"][0]["reason"] and len(document["results"]) == 6


def test_what_raises_is_named(monkeypatch, capsys):
    def attend(*given, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("fastpeft.attention.interface.attend", attend)
    document = run([PREFIX])
    assert found(document, OURS)["note"] == "RuntimeError: no such kernel" and found(document, PEFT)["status"] == "ok"
    assert "no such kernel" in capsys.readouterr().err


# The comparison on a CPU


@pytest.fixture
def tiny_plan(monkeypatch):
    monkeypatch.setattr(step_cases, "ON_CPU", (LORA, replace(LORA, dropout=0.05), PREFIX))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_command_prints_quotients_and_writes_the_document(tiny_plan, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--rounds", "3", "--threads", "1", "--clock", "cpu", "--json", str(path)]
    assert bench_step.main(options) == 0
    saved = json.loads(path.read_text())
    assert report.problems(saved) == [] and saved["plan"]["clock"] == "cpu"
    assert [row["dropout"] for row in saved["results"] if row["impl"] == OURS] == [0.0, 0.05]
    assert {row["rounds"] for row in saved["results"] if row["status"] == "ok"} == {3}
    printed = capsys.readouterr().out
    assert report.CPU_HEADER in printed and printed.count("x the speed of peft") == 4
    assert printed.count("over frozen") == 8 and "liger missing" in printed


def test_the_profile_names_what_a_step_spends(tiny_plan, capsys):
    assert bench_step.main(["--method", "prefix", "--threads", "1", "--profile"]) == 0
    assert "  aten::" in capsys.readouterr().out
