"""Whole training steps of a small Llama under pytest-benchmark: frozen, HF peft's and ours, from equal weights."""

import pytest
import torch

from fastpeft.benchmarks import bench_step
from fastpeft.benchmarks.bench_step import FROZEN, OURS, PEFT, Case
from fastpeft.benchmarks.suites.members import DEVICES, time_it

SIZES = (("hidden_size", 128), ("intermediate_size", 352), ("num_hidden_layers", 2))
CASES = {"lora": Case("lora", 2, 64, sizes=SIZES), "prefix": Case("prefix", 2, 64, sizes=SIZES)}


@pytest.mark.parametrize("name", [FROZEN, PEFT, OURS])
@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_training_step(benchmark, device, method, name):
    case, ids = CASES[method], torch.arange(2 * 64, device=device).view(2, 64)
    found = {each: model.to(device) for each, model in bench_step.models(case).items()}
    bench_step.check(found, ids)
    time_it(benchmark, bench_step.steps_of(found, ids)[name], torch.device(device), f"{method} step")
