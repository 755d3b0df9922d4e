"""Which training steps are timed: the order, what a request changes, and that every geometry makes its model."""

import dataclasses
import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import step_cases
from benchmarks.geometry import GEOMETRIES
from benchmarks.request import Request
from benchmarks.step_cases import Case, cases, cases_of
from benchmarks.step_models import build_base, inputs_of
from fastpeft.errors import FastpeftError

CPU = torch.device("cpu")


def test_the_order_is_by_value():
    wanted = cases(Request())
    assert [(case.model, case.method, case.dropout, case.tokens) for case in wanted[:5]] == [
        ("llama3-8b", "lora", 0.0, 2 * 4096),
        ("llama3-8b", "prefix", 0.0, 2 * 2048),
        ("llama3-8b", "lora", 0.05, 2 * 2048),
        ("llama3-8b", "adapter", 0.0, 2 * 2048),
        ("llama3-8b", "lora", 0.0, 2 * 2048),
    ]
    assert len(wanted) == len(set(wanted)) == len({case.id for case in wanted}) == 23
    assert {case.model for case in wanted} == GEOMETRIES.keys() - {"llama2-7b", "small", "tiny"}
    assert {case.dtype for case in wanted} == {"bf16"} and wanted[0].shape()["batch"] == 2
    plan = {"cases": json.loads(json.dumps([asdict(case) for case in wanted]))}
    assert cases_of(plan) == wanted and cases_of({}) == []


def test_a_request_is_followed():
    (only,) = cases(Request(shapes=("bert-base",), batches=(3,), seqs=(17,), dtype="fp16"), ["prefix"])
    assert only == Case("bert-base", "prefix", 3, 17, "fp16")
    drawn = cases(Request(shapes=("tiny",), dropouts=(0.0, 0.1), tiny=True), ["lora", "prefix"])
    assert [(case.method, case.dropout) for case in drawn] == [("lora", 0.0), ("lora", 0.1), ("prefix", 0.0)]
    assert [case.seq for case in cases(Request(shapes=("tiny",), seqs=(8, 16)), ["prefix"])] == [8, 16]
    assert cases(Request(quick=True)) == [case for case in cases(Request()) if case.model == "llama3.2-1b"][:2]
    on_cpu = [(case.model, case.batch, case.seq) for case in cases(Request(tiny=True), ["lora", "prefix"])]
    assert on_cpu == [("llama-512", 4, 256)] * 2 + [("small", 2, 1024), ("small", 1, 2048)]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(shapes=((8192, 4096, 4096),)), "--shape 8192,4096,4096: a step is one of a whole model: llama3-8b"),
        (Request(shapes=("lorafusion-grid",)), "--shape lorafusion-grid: a step is one of a whole model"),
        (Request(ranks=(8,)), "steps have rank 16, 30 virtual tokens"),
        (Request(prefixes=(8,)), "for single ops"),
        (Request(per_head=True), "for single ops"),
    ],
)
def test_what_no_step_has_is_refused(request_, words):
    with pytest.raises(FastpeftError, match=words):
        cases(request_)


@pytest.mark.parametrize("name", sorted(step_cases.MODELS))
def test_every_geometry_makes_a_model_of_its_sizes(name):
    geometry = step_cases.MODELS[name]
    arguments = dict(geometry.arguments)
    arguments["n_layer" if "n_layer" in arguments else "num_hidden_layers"] = 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(step_cases.MODELS, name, dataclasses.replace(geometry, arguments=arguments))
        base = build_base(name, "bf16", torch.device("meta"))
    shapes = {tuple(module.weight.shape)[::-1] for module in base.modules() if isinstance(module, torch.nn.Linear)}
    assert set(geometry.linears.values()) <= shapes
    inputs = inputs_of(Case(name, "lora", 2, 8, "bf16"), CPU)
    assert inputs["input_ids"].shape == (2, 8) and inputs["labels"].dim() == (1 if geometry.task == "SEQ_CLS" else 2)
