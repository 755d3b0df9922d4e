"""An op's own Python stays as little as it is: functions entered in a call are the same on every machine, times are
not."""

import types

import pytest
import torch

from benchmarks import overhead
from fastpeft import selection
from fastpeft.kernels import _common


def test_an_op_enters_few_functions_beside_those_of_autograd(monkeypatch):
    monkeypatch.setattr(selection, "_any_open", False)  # as it is while nobody has chosen adapters in a block
    rows = {name: entered for name, *_, entered in overhead.measured(calls=1, repeats=1, cold_calls=1)}
    assert rows["lora_linear"] - rows["a bare Function"] <= 8
    assert rows["a patched layer"] - rows["lora_linear"] <= 30


# Launches of a call without a gradient, of a forward and of a backward. Functions entered beyond those of a bare
# Function that makes the same allocations and launches and enters none for them: MOST at most.
ON_KERNELS = {
    "lora_linear": [3, 3, 4],
    "three projections": [5, 5, 6],
    "a gated MLP": [7, 7, 6],
    "lora_linear, few rows": [1, 1, 3],
    "three projections, few rows": [1, 1, 5],
    "a gated MLP, few rows": [2, 2, 5],
}
MOST = [16, 5, 8]


@pytest.mark.interpreter
def test_an_op_on_kernels_enters_few_functions():
    rows = {row.name: row for row in overhead.measured_on_kernels(calls=1, repeats=1)}
    assert rows.keys() == ON_KERNELS.keys()
    for name, launches in ON_KERNELS.items():
        assert rows[name].launches == launches, name
        assert all(found <= most for found, most in zip(rows[name].entered, MOST, strict=True)), rows[name]


def test_the_times_are_of_calls(capsys):
    assert overhead.main(calls=100, repeats=7, cold_calls=7) == 0
    lines, _, on_kernels = capsys.readouterr().out.partition("\n\n")
    machine, *lines = lines.splitlines()
    assert machine.endswith(f"torch {torch.__version__}")
    assert [line[:16].strip() for line in lines[1:]] == ["a bare Function", "lora_linear", "a patched layer"]
    kernels = {line[:27].strip(): list(map(float, line[27:].split()[:15])) for line in on_kernels.splitlines()[1:]}
    assert kernels.keys() == ON_KERNELS.keys()
    for row in kernels.values():
        for took, plain, least, own, first in zip(*(row[place::5] for place in range(5)), strict=True):
            assert min(took, plain, least, first) > 0 and abs(took - least - own) < 0.2
        # A backward's are within what the machine's pace changes by.
        assert all(0 < own < first for own, first in zip(row[3:9:5], row[4:10:5], strict=True))
        assert all(least < plain for plain, least in zip(row[1:7:5], row[2:8:5], strict=True))
    numbers = [list(map(float, line[16:].split())) for line in lines[1:]]
    bare, op, layer = (each[0] for each in numbers)
    assert 0 < bare < op < layer
    assert all(cold > warm > 0 for each in numbers for warm, cold in (each[:3:2], each[1:4:2]))


@pytest.mark.parametrize(("current", "changed"), [(0, True), (1, False)])
def test_the_device_is_changed_where_the_tensor_is_on_another(monkeypatch, current, changed):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    tensor = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), get_device=lambda: 1)
    context = _common.on_device_of(tensor)
    assert isinstance(context, torch.cuda.device) is changed and getattr(context, "idx", 1) == 1
    assert not isinstance(_common.on_device_of(torch.ones(1)), torch.cuda.device)
