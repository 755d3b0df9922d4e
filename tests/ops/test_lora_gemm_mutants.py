"""The test of the tests: mistakes planted in the persistent kernel, each of which the criterion must find."""

import importlib.util
from pathlib import Path

import pytest

from fastpeft import oracle
from fastpeft.kernels import lora_gemm
from fastpeft.ops import _lora_linear_triton
from tests.counting import count
from tests.ops.lora_gemm_mutants import MUTANTS
from tests.ops.lora_linear_cases import draws, on
from tests.ops.test_lora_linear import with_layout
from tests.ops.test_lora_linear_dropout import independent_mask
from tests.planting import mutated

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison", "own_masks")]

BOUNDS = oracle.Bounds(rms=2.2, peak=4.0, row=8.0, gain=0.002)  # twice the criterion, so that one draw will do


@pytest.fixture
def own_masks(monkeypatch):
    """The oracle's masks come from the tests' own Philox, not from the kernels under test."""

    def mask(seed, p, rows, columns, device, backend):
        return independent_mask(int(seed), p, rows, columns)

    monkeypatch.setattr(oracle, "dropout_mask", mask)


def first_fault() -> str | None:
    """What the criterion says of the kernel as it is. 9 x 2 tiles of the result are more than the programs, and of more
    rows than a group; B has gaps, and is of two chunks of ranks."""
    (problem,) = draws(1, (136, 72), 40, 21, dtypes="fp32", dropout=0.3)
    problem = with_layout(problem, "lora_B", "gappy")
    with on("triton", "persistent"):
        for difference in oracle.lora_linear_differences([problem], ("x", "bias")):
            if faults := difference.faults(BOUNDS):
                return faults[0]
    return None


def test_the_kernel_as_it_is_passes():
    assert first_fault() is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    function, _, old, new = mutant
    path = tmp_path / "fastpeft_mutant_gemm.py"
    path.write_text(mutated(Path(lora_gemm.__file__).read_text(), function, old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(_lora_linear_triton, "lora_gemm", module)
    assert first_fault() is not None
    count("planted faults caught")


def test_there_are_a_dozen_mistakes():
    assert len({mutant[0:1] + mutant[2:] for mutant in MUTANTS}) == len(MUTANTS) >= 12
