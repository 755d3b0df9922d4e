"""What the suites have in common: which cells on which devices of this machine, and how one is timed.

`pytest benchmarks` times, `pytest benchmarks --benchmark-autosave` and later `--benchmark-compare` tell what a change
did, `--benchmark-disable` runs each once. Every call is checked before it is timed. On a CPU they time the torch
backend on tiny shapes, which says nothing of kernels; where torch sees a GPU, the kernels on a model's shapes as well.
For the peers in full, overheads and what is kept for backward, see `fastpeft bench`.
"""

import pytest
import torch

from fastpeft.benchmarks.harness import synchronize
from fastpeft.benchmarks.report import FLOOR

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
NAMES = (FLOOR, "peft", "fastpeft")


def cells_of(bench, count: int) -> list:
    """(device, cell) of the bench's first cells, tiny ones on the CPU."""
    return [
        pytest.param(torch.device(device), cell, id=f"{device}-{cell.id.replace(' ', '-')}")
        for device in DEVICES
        for cell in bench.tiers(device == "cpu")[0][:count]
    ]


def time_cell(benchmark, bench, device: torch.device, cell, name: str, floor) -> None:
    """Forward and backward of the implementation, once it was found right; `floor(inputs)` is the floor in float64."""
    inputs = bench.inputs(cell, device)
    (implementation,) = [each for each in bench.implementations if each.name == name]
    call = implementation.build(inputs)
    if name == FLOOR:
        y, expected = call.run_forward().double(), floor(inputs)
        assert (y - expected).square().mean() < 1e-4 * expected.square().mean()
        assert all(grad.abs().max() > 0 for grad in call.run_backward(call.run_forward()))
    else:
        assert bench.truth(inputs).verify(call, implementation.rms_bound).problems == []
    time_it(benchmark, call.run, device, cell.id)


def time_it(benchmark, work, device: torch.device, group: str) -> None:
    """`work` and the wait for the device, in a table with the others of its group."""

    def timed() -> None:
        work()
        synchronize(device)

    on_gpu = device.type == "cuda"
    benchmark.group = f"{group} on {torch.cuda.get_device_name() if on_gpu else 'the CPU, in torch'}"
    benchmark.extra_info["backend"] = "triton" if on_gpu else "torch: not a kernel benchmark"
    benchmark(timed)
