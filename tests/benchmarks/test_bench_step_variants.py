"""The step benchmark's other models: fused, by the vendor's products, compiled, in Liger's model."""

import importlib.machinery
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_step, report, step_models
from benchmarks.harness import Budget
from benchmarks.lora_linear_peers import AddmmLora
from benchmarks.step_cases import Case
from benchmarks.step_models import ALGEBRA, COMPILED, FUSED, OURS, PEFT
from fastpeft.tuners import mlp
from tests.benchmarks.test_bench_step import LORA, PREFIX, found, run, smaller
from tests.fused import seen

__all__ = ["seen", "smaller"]  # fixtures
ALONE = {"step": dict.fromkeys((PEFT, OURS, FUSED, "liger"), "not now")}


# Fused


def test_projections_and_mlps_are_fused_where_there_are_any(seen, monkeypatch):
    fused, apply = [], mlp.apply_lora_mlp
    monkeypatch.setattr(mlp, "apply_lora_mlp", lambda *given, **more: fused.append(1) or apply(*given, **more))
    row = found(run([LORA]), FUSED)
    assert row["status"] == "ok" and row["checked"]["problems"] == []
    # Checked, three steps of warm-up, one weighed, two timed, each of two layers; and two models' first calls, in which
    # q, k and v are seen, and are not one op.
    assert set(seen) == {3} and len(seen) == 14 and len(fused) == 14 + 4


@pytest.mark.parametrize("name", [FUSED, ALGEBRA])
def test_what_has_no_lora_is_named(name):
    row = found(run([PREFIX]), name)
    assert row["status"] == "missing" and row["note"] == "prefix has no layers of plain LoRA"


# The vendor's products, then addmm_


@pytest.fixture
def applied(monkeypatch):
    """The dropout of each call of the autograd function."""
    calls, apply = [], AddmmLora.apply
    monkeypatch.setattr(AddmmLora, "apply", lambda *given: calls.append(given[-1]) or apply(*given))
    return calls


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_every_linear_layer_is_computed_by_the_algebra(applied, dtype, dropout):
    row = found(run([replace(LORA, dtype=dtype, dropout=dropout)], without=ALONE), ALGEBRA)
    assert row["status"] == "ok" and row["checked"]["problems"] == [] and len(row["checked"]["gain"]) == 14
    assert row["speedup_vs"] == {} and row["adapter_dtype"] == "fp32"
    # Seven linear layers of two layers, checked without dropout, then six steps.
    assert applied == [0.0] * 14 + [dropout] * 84


def test_layers_with_a_bias_have_the_algebra_too(applied, smaller):
    row = found(run([Case(smaller("bert-base"), "lora", 2, 24, "fp32")], without=ALONE), ALGEBRA)
    assert row["status"] == "ok" and len(applied) >= 7 * 2 * 6


def test_a_fault_of_the_algebra_is_not_timed(monkeypatch):
    backward = AddmmLora.backward

    def off(ctx, grad):
        dx, *others = backward(ctx, grad)
        return dx, *(1.01 * each if each is not None else None for each in others)

    monkeypatch.setattr(AddmmLora, "backward", staticmethod(off))
    document = run([LORA], without=ALONE)
    assert found(document, ALGEBRA)["status"] == "wrong" and report.exit_code(document) == 3


def test_an_input_without_a_gradient_costs_no_product():
    """As the first layer's, whose inputs are the frozen embeddings."""
    x, weight, a, b = (torch.randn(shape) for shape in ((6, 8), (5, 8), (2, 8), (5, 2)))
    a.requires_grad_()
    y = AddmmLora.apply(x, weight, torch.ones(5), a, b, 0.5, 0.0)
    torch.testing.assert_close(y, x @ weight.T + 1 + 0.5 * (x @ a.T) @ b.T)
    with FlopCounterMode(display=False) as counter:
        (grad,) = torch.autograd.grad(y, a, torch.ones_like(y))
    torch.testing.assert_close(grad, 0.5 * (torch.ones_like(y) @ b).T @ x)
    assert counter.get_total_flops() == 2 * 6 * 2 * (5 + 5 + 8)  # dY B, dB, dA


# Compiled


@pytest.fixture
def compiled(monkeypatch):
    """The modules that were to be compiled, without a compilation: of it a CPU's would take a minute."""
    modules = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: modules.append((type(self).__name__, options)))
    return modules


def test_what_is_compiled_comes_last_and_in_rounds_with_ours(compiled):
    document = run([PREFIX, LORA, replace(LORA, dropout=0.05)], compiled=True)
    row = document["results"][-1]
    assert (row["impl"], row["status"], row["shape"]["name"], row["dropout"]) == (COMPILED, "ok", "tiny lora", 0.0)
    assert row["checked"]["problems"] == [] and row["saved_bytes"] is None and row["overhead_over_floor"] is not None
    ours = {(r["shape"]["name"], r["dropout"]): set(r["speedup_vs"]) for r in document["results"] if r["impl"] == OURS}
    assert ours == {
        ("tiny prefix", 0.0): {PEFT},
        ("tiny lora", 0.0): {PEFT, ALGEBRA, COMPILED},
        ("tiny lora", 0.05): {PEFT, ALGEBRA},
    }
    # Every layer of the model that is checked, and of the one that is timed.
    assert compiled == [("LlamaDecoderLayer", {"dynamic": False})] * 4
    assert len([r for r in document["results"] if r["impl"] == OURS]) == 3
    assert [(each["cell"], each["impl"]) for each in document["unmeasured"]] == [("other cells", COMPILED)]
    assert report.problems(document) == [] and report.exit_code(document) == 0
    rows = len(document["results"])
    assert len(run([], document)["results"]) == rows and len(compiled) == 4, "it is not measured again"


def test_without_time_nothing_is_compiled(compiled):
    document = run([LORA], compiled=True, budget=Budget(80))
    assert compiled == [] and found(document, OURS)["status"] == "ok"
    reasons = {each["cell"]: each["reason"] for each in document["unmeasured"]}
    assert reasons[LORA.id] == "no time was left to compile it"


@pytest.mark.parametrize("plan", [{"against": ["peft"]}, {"without": {"step": {COMPILED: "ended the process"}}}])
def test_what_is_not_wanted_is_not_compiled(compiled, plan):
    document = run([LORA], compiled=True, **plan)
    assert compiled == [] and COMPILED not in {row["impl"] for row in document["results"]}


def test_a_case_without_lora_is_not_compiled(compiled):
    assert run([PREFIX], compiled=True)["unmeasured"] == [] and compiled == []


def test_the_next_case_is_expected_to_take_as_long_as_its_tokens_say():
    short, long = replace(LORA, batch=1), replace(LORA, batch=4)
    assert bench_step._expected(short, [(8.0, 64), (3.0, 32)]) == [6.0, 3.0]
    assert bench_step._expected(long, [(8.0, 64)]) == [8.0] and bench_step._expected(long, []) == []


# Liger


@pytest.fixture
def liger(monkeypatch):
    """Stands in for liger_kernel: a global name of transformers' and a forward of the instance; returns the calls."""
    from transformers.models.llama import modeling_llama

    calls = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def apply(model):
        modeling_llama.apply_rotary_pos_emb = lambda *given, **more: calls.append("rotary") or rotate(*given, **more)
        norm = model.model.norm.forward
        model.model.norm.forward = lambda x: calls.append("norm") or norm(x)

    modules = {"liger_kernel": {}, "liger_kernel.transformers": {"_apply_liger_kernel_to_instance": apply}}
    modules["liger_kernel.transformers.monkey_patch"] = {"MODEL_TYPE_TO_APPLY_LIGER_FN": {"llama": None}}
    modules["liger_kernel.utils"] = {"infer_device": lambda: "cuda"}
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        vars(module).update(attributes, __path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    yield calls
    assert modeling_llama.apply_rotary_pos_emb is rotate


def test_liger_is_around_ours_alone(liger):
    row = found(run([LORA], without={"step": {OURS: "not now"}}), "liger")
    assert row["status"] == "ok" and set(row["speedup_vs"]) == {PEFT, ALGEBRA}
    # Check, three steps of warm-up, one weighed, two timed: two layers in each, and no other model's.
    assert (liger.count("norm"), liger.count("rotary")) == (7, 14)


def test_liger_has_nothing_for_some(liger, smaller):
    row = found(run([Case(smaller("qwen3-8b"), "lora", 2, 24, "fp32")]), "liger")
    assert (row["status"], row["note"]) == ("missing", "liger_kernel has nothing for qwen3") and liger == []


def test_liger_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(step_models.importlib.util, "find_spec", lambda name: None)
    row = found(run([LORA], without={"step": {PEFT: "not now"}}), "liger")
    assert (row["status"], row["note"]) == ("missing", "liger_kernel is not installed")
