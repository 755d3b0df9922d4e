"""Whole training steps of a small Llama under pytest-benchmark: frozen, HF peft's and ours, on one base."""

import pytest
import torch

from fastpeft.benchmarks.bench_step import step_of
from fastpeft.benchmarks.report import FLOOR
from fastpeft.benchmarks.step_cases import Case
from fastpeft.benchmarks.step_check import Check
from fastpeft.benchmarks.step_models import build_base
from fastpeft.benchmarks.suites.members import DEVICES, NAMES, time_it


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("device", DEVICES)
def test_training_step(benchmark, device, method, name):
    case, device = Case("tiny", method, 4, 64, "fp32"), torch.device(device)
    base = build_base(case.model, case.dtype, device)
    if name != FLOOR:
        assert Check(case, base, device).verify(name)["problems"] == []
    time_it(benchmark, step_of(name, base, case, device).run, device, f"{method} step")
