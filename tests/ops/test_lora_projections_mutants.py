"""The test of the tests: mistakes planted in the kernels of `lora_projections`, each of which must be found."""

import importlib.util
import sys
from pathlib import Path

import pytest
from triton.runtime.errors import InterpreterError

from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels import _several, lora_projections
from fastpeft.ops import _lora_projections_triton as path
from fastpeft.oracle import Bounds
from tests.counting import count, how_many
from tests.ops import lora_projections_cases as cases
from tests.ops.lora_projections_cases import Problem, draw, faults_of, with_layout
from tests.ops.lora_projections_mutants import KERNELS, SEVERAL
from tests.ops.test_lora_linear_dropout import independent_mask
from tests.planting import mutated
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

SOURCE = Path(lora_projections.__file__).read_text()
MUTANTS = [mutant for mutants in KERNELS.values() for mutant in mutants]
TWICE = Bounds(rms=2.2, peak=4.0, row=8.0)  # so that one draw will do: what this finds the criterion finds
PREWRITE = Plan("prewrite", "prewrite", "forced by a test")


def problems() -> list[Problem]:
    """Together they use everything, on tensors with gaps: a sum of rank-r terms held by the pass over x and one made
    apart, in two launches; several runs of rows, of several blocks, and of columns; ranks of two chunks."""
    held = draw("fp16", shape=(37, 69), outputs=(17,), ranks=(5, 3, 4, 2), dropout=True)
    apart = draw("fp16-fp32", shape=(17, 69), outputs=(17,), ranks=(20, 3, 4, 2, 1), dropout=True)
    return [with_layout(held, "x", "gappy"), apart]


@pytest.fixture
def own_masks(monkeypatch):
    """The truth's masks come from the test's own Philox, not from the kernels under test."""
    monkeypatch.setattr(
        cases,
        "dropout_mask",
        lambda seed, p, rows, columns, device, name: independent_mask(int(seed), p, rows, columns),
    )


def first_fault() -> str | None:
    """What is wrong, in words; a lane that would leave its tensor is stopped before it does."""
    with backend("triton"), override_plan(PREWRITE), count_traffic():
        for problem in problems():
            try:
                if faults := faults_of([problem], TWICE):
                    return faults[0]
            except (InterpreterError, RuntimeError, IndexError) as fault:
                return f"{fault} {fault.__cause__}"
    return None


@pytest.mark.usefixtures("own_masks")
def test_the_kernels_as_they_are_pass():
    assert first_fault() is None


@pytest.mark.usefixtures("own_masks")
@pytest.mark.parametrize("mutant", MUTANTS[:: how_many(7, 1)], ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    monkeypatch.setattr(path, "kernels", planted(SOURCE, mutant, tmp_path, monkeypatch))
    assert first_fault() is not None
    count("planted faults caught")


def planted(source: str, mutant, tmp_path, monkeypatch):
    """The module with the mistake."""
    function, _, old, new = mutant
    source = mutated(source, function, old, new)
    assert source is not None, function
    file = tmp_path / "fastpeft_mutant_projections.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("own_masks")
@pytest.mark.parametrize("mutant", SEVERAL, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_in_what_launches_are_made_of_is_found(mutant, tmp_path, monkeypatch):
    module = planted(Path(_several.__file__).read_text(), mutant, tmp_path, monkeypatch)
    for name in {name for name, *_ in SEVERAL}:
        monkeypatch.setattr(lora_projections, name, getattr(module, name))
    assert first_fault() is not None
    count("planted faults caught")


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_a_dozen_mistakes_for_every_kernel(kernel):
    changes = {mutant[0:1] + mutant[2:] for mutant in KERNELS[kernel]}
    assert len(changes) == len(KERNELS[kernel]) >= 12
