"""The LoRA linear, the frozen layer, and HF peft's, under pytest-benchmark."""

import pytest

from fastpeft.benchmarks.bench_lora_linear import BENCH
from fastpeft.benchmarks.suites.members import NAMES, cells_of, time_cell


def frozen(inputs):
    return inputs.x.double() @ inputs.weight.double().T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("device", "cell"), cells_of(BENCH, 2))
def test_forward_and_backward(benchmark, device, cell, name):
    time_cell(benchmark, BENCH, device, cell, name, frozen)
