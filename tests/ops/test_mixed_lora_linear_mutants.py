"""The test of the tests: mistakes planted in the kernels of `mixed_lora_linear` and in their tables, each of which must
be found."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from fastpeft.dispatch import backend
from fastpeft.kernels import _segments, mixed_lora_linear
from fastpeft.ops import _mixed_lora_linear_triton as path
from fastpeft.oracle import Bounds
from tests.counting import count
from tests.ops import mixed_lora_linear_cases as cases
from tests.ops.mixed_lora_linear_cases import Problem, draw, faults_of, with_layout
from tests.ops.mixed_lora_linear_mutants import KERNELS
from tests.ops.test_lora_linear_dropout import independent_mask
from tests.planting import mutated
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

KERNEL, TABLES = Path(mixed_lora_linear.__file__), Path(_segments.__file__)
MUTANTS = [mutant for mutants in KERNELS.values() for mutant in mutants]
TWICE = Bounds(rms=2.2, peak=4.0, row=8.0)  # so that one draw will do: what this finds the criterion finds


def problems() -> list[Problem]:
    """Together they use everything, on tensors with gaps: a base and a residual, several runs of rows and, of few rows,
    of columns; ranks of two blocks of the tile."""
    rows = (0, 1, -1, 1, 0)
    trained = draw(shape=(17, 45), outputs=40, ranks=(5, 20), rows=rows, dropout=True)
    few = draw(shape=(3, 69), outputs=40, ranks=(4, 3), rows=rows, dropout=True, base=False)
    for name in ("x", "dy", "residual"):
        trained = trained if name == "residual" else with_layout(trained, name, "gappy")
        few = with_layout(few, name, "gappy")
    return [trained, few]


@pytest.fixture
def own_masks(monkeypatch):
    """The truth's masks come from the test's own Philox, not from the kernels under test."""

    def mask(seeds, rows, dropouts, shape, device, name):
        tokens, first, out = shape[0] // len(rows), 0, torch.ones(shape, dtype=torch.bool)
        for g, p in enumerate(dropouts):
            samples = [b for b, each in enumerate(rows) if each == g]
            own = independent_mask(int(seeds), p, len(samples) * tokens, shape[1], first)
            out.view(-1, tokens, shape[1])[samples] = own.view(-1, tokens, shape[1])
            first += len(own)
        return out

    monkeypatch.setattr(cases, "mixed_dropout_mask", mask)


def first_fault(wanted=None) -> str | None:
    """What is wrong with the results and the gradients, all or those `wanted`, in words; a lane that would leave its
    tensor is stopped before it does."""
    with backend("triton"), count_traffic():
        for problem in problems():
            try:
                if faults := faults_of([problem], TWICE, wanted):
                    return faults[0]
            except (InterpreterError, RuntimeError) as fault:
                return f"{fault} {fault.__cause__}"
    return None


def load(source: str, file: Path, monkeypatch):
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("own_masks")
def test_the_kernels_as_they_are_pass():
    assert first_fault() is None


@pytest.mark.usefixtures("own_masks")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    function, _, old, new = mutant
    kernels, tables = mutated(KERNEL.read_text(), function, old, new), mutated(TABLES.read_text(), function, old, new)
    assert (kernels is None) != (tables is None), f"{function} is in neither file, or in both"
    if tables is not None:
        module = load(tables, tmp_path / "fastpeft_mutant_segments.py", monkeypatch)
        monkeypatch.setattr(mixed_lora_linear, "_segments", module)
    else:
        monkeypatch.setattr(path, "kernels", load(kernels, tmp_path / "fastpeft_mutant_mixed.py", monkeypatch))
    forward = any(mutant in KERNELS[kernel] for kernel in ("shrink", "expand", "shared"))
    assert ((forward and first_fault([])) or first_fault()) is not None  # most of these are seen without backward
    count("planted faults caught")


@pytest.mark.usefixtures("own_masks")
def test_nothing_is_found_in_forward_where_there_is_no_mistake():
    assert first_fault([]) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_a_dozen_mistakes_for_every_kernel(kernel):
    changes = {mutant[0:1] + mutant[2:] for mutant in KERNELS[kernel]}
    assert len(changes) == len(KERNELS[kernel]) >= 12
