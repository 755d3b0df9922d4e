"""The pytest-benchmark suites: they save and compare as pytest-benchmark's users expect, and time nothing wrong."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft.benchmarks import bench_lora_linear, bench_prefix_attention
from fastpeft.benchmarks.harness import Call
from fastpeft.benchmarks.suites import members, test_lora_linear, test_prefix_attention

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


BOTH = """
import sys, pytest
saving, comparing = (pytest.main([*sys.argv[1:], last]) for last in ("--benchmark-save=before", "--benchmark-compare"))
sys.exit(saving or comparing)
"""


def saved_and_compared(storage):
    """pytest twice on the suite of the LoRA linear's floor, each timed for an instant."""
    brief = ["--benchmark-min-rounds=2", "--benchmark-max-time=0.001", f"--benchmark-storage=file://{storage}"]
    command = [sys.executable, "-c", BOTH, "benchmarks/suites/test_lora_linear.py", "-k", "cpu and frozen"]
    # A worker of xdist's says so in its environment, and pytest-benchmark does not time in workers.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, *brief], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_was_saved_is_compared_with(tmp_path):
    compared = saved_and_compared(tmp_path)
    (saved,) = tmp_path.rglob("*before.json")
    entries = json.loads(saved.read_text())["benchmarks"]
    assert len(entries) == 2 and all(entry["stats"]["median"] > 0 for entry in entries)
    assert {entry["extra_info"]["backend"] for entry in entries} == {"torch: not a kernel benchmark"}
    assert all("on the CPU, in torch" in entry["group"] for entry in entries)
    assert compared.count("frozen] (NOW)") == compared.count("frozen] (0001_before)") == 2


class Untimed:
    """Stands in for the fixture: nothing may get as far as this."""

    extra_info: dict = {}

    def __call__(self, work):
        raise LookupError("was timed")


def wrong(implementation):
    """The implementation with a result 5 % too large."""

    def build(inputs) -> Call:
        call = implementation.build(inputs)
        return dataclasses.replace(call, forward=lambda: 1.05 * call.forward())

    return dataclasses.replace(implementation, build=build)


BENCHES = [(bench_lora_linear.BENCH, test_lora_linear), (bench_prefix_attention.BENCH, test_prefix_attention)]


@pytest.mark.parametrize("name", members.NAMES)
@pytest.mark.parametrize(("bench", "module"), BENCHES, ids=[bench.op for bench, _ in BENCHES])
def test_what_is_wrong_is_not_timed(bench, module, name):
    cell = bench.tiers(True)[0][0]
    planted = dataclasses.replace(bench, implementations=[wrong(each) for each in bench.implementations])
    with pytest.raises(LookupError, match="was timed"):
        members.time_cell(Untimed(), bench, CPU, cell, name, module.frozen)
    with pytest.raises(AssertionError):
        members.time_cell(Untimed(), planted, CPU, cell, name, module.frozen)
