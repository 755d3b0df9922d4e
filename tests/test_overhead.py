"""An op's own Python stays as little as it is: functions entered in a call are the same on every machine, times are
not."""

import types

import pytest
import torch

from benchmarks import overhead
from fastpeft.kernels import _common


def test_an_op_enters_few_functions_beside_those_of_autograd():
    rows = {name: entered for name, *_, entered in overhead.measured(calls=1, repeats=1, cold_calls=1)}
    assert rows["lora_linear"] - rows["a bare Function"] <= 15
    assert rows["a patched layer"] - rows["lora_linear"] <= 30


ON_KERNELS = {  # launches forward and backward, and functions entered beyond what makes these alone
    "lora_linear": (3, 5, 66, 98),
    "three projections": (5, 9, 228, 362),
    "a gated MLP": (7, 6, 254, 258),
    "lora_linear, few rows": (2, 4, 66, 98),
    "three projections, few rows": (4, 8, 228, 362),
    "a gated MLP, few rows": (5, 5, 254, 258),
}


@pytest.mark.interpreter
def test_an_op_on_kernels_enters_few_functions_for_a_launch():
    rows = {row.name: row for row in overhead.measured_on_kernels(calls=1, repeats=1)}
    assert rows.keys() == ON_KERNELS.keys()
    for name, (*launches, entered, entered_back) in ON_KERNELS.items():
        assert rows[name].launches == launches, name
        assert 0 < rows[name].entered[0] <= entered and 0 < rows[name].entered[1] <= entered_back, rows[name]


def test_the_times_are_of_calls(capsys):
    assert overhead.main(calls=300, repeats=7, cold_calls=7) == 0
    lines, _, on_kernels = capsys.readouterr().out.partition("\n\n")
    lines = lines.splitlines()
    assert [line[:16].strip() for line in lines[1:]] == ["a bare Function", "lora_linear", "a patched layer"]
    kernels = {line[:27].strip(): list(map(float, line[27:].split()[:6])) for line in on_kernels.splitlines()[1:]}
    assert kernels.keys() == ON_KERNELS.keys()
    for forward, least, own, *back in kernels.values():
        assert 0 < least < forward and own > 0 and 0 < back[1] < back[0] and back[2] > 0
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
