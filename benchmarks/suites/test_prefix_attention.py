"""Attention over a prefix, without one, and HF peft's, under pytest-benchmark."""

import pytest
import torch.nn.functional as F

from fastpeft.benchmarks.bench_prefix_attention import BENCH
from fastpeft.benchmarks.suites.members import NAMES, cells_of, time_cell


def frozen(inputs):
    q, k, v = (tensor.double() for tensor in (inputs.q, inputs.k, inputs.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("device", "cell"), cells_of(BENCH, 1))
def test_forward_and_backward(benchmark, device, cell, name):
    time_cell(benchmark, BENCH, device, cell, name, frozen)
