"""The test of the tests: mistakes planted in the kernels of `lora_linear`, each of which the criterion must find."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

from fastpeft import oracle
from fastpeft.kernels import _common, _partials, lora_linear
from fastpeft.ops import _lora_linear_triton
from tests.counting import count
from tests.ops.lora_linear_cases import draws, on
from tests.ops.lora_linear_mutants import KERNELS, SOONEST
from tests.ops.test_lora_linear import with_layout
from tests.ops.test_lora_linear_dropout import independent_mask
from tests.planting import mutated

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

KERNEL, *SHARED = (Path(module.__file__) for module in (lora_linear, _common, _partials))
MUTANTS = [mutant for mutants in KERNELS.values() for mutant in mutants]

# Twice the criterion, so that one draw will do: what this finds the criterion finds.
BOUNDS = oracle.Bounds(rms=2.2, peak=4.0, row=8.0, gain=0.002)
SPLIT = oracle.Bounds(rms=256, peak=256, row=512, gain=0.01)  # see the test of bf16 in test_lora_linear.py


@functools.cache
def problems():
    """(strategy, bounds, problem): together they use every feature of every kernel, on tensors with gaps. 45 outputs
    are two blocks of columns, so that 37 rows make two runs of row blocks in one kernel and 69 rows in the other; 21
    rows make two runs of columns. 13 rows and 29 outputs are one block, whose program writes the whole."""
    made = []
    for strategy, dtypes, rows, outputs, rank in (
        ("fused", "fp32", 37, 45, 5), ("prewrite", "fp32", 37, 45, 5), ("prewrite", "fp16-fp32", 37, 45, 5),
        ("fused", "fp32", 69, 45, 70), ("prewrite", "bf16-fp32", 37, 45, 5),
        ("fused", "fp32", 21, 45, 5), ("fused", "fp32", 13, 29, 5),
    ):  # fmt: skip
        (problem,) = draws(1, (rows, 69), outputs, rank, dtypes=dtypes, dropout=0.3)
        for name in ("x", "weight", "lora_A", "lora_B", "dy"):
            problem = with_layout(problem, name, "gappy")
        made.append((strategy, SPLIT if dtypes == "bf16-fp32" else BOUNDS, problem))
    return made


def fault_of(number: int, wanted=("x", "bias", "lora_A", "lora_B")) -> str | None:
    """What the criterion says of a problem's result and the gradients that are wanted."""
    strategy, bounds, problem = problems()[number]
    with on("triton", strategy):
        for difference in oracle.lora_linear_differences([problem], wanted):
            if faults := difference.faults(bounds):
                return faults[0]
    return None


def first_fault() -> str | None:
    """What the criterion says of the kernels as they are, at the first problem that it has something to say of."""
    return next((fault for number in range(len(problems())) if (fault := fault_of(number))), None)


def soonest(mutant) -> tuple[int, tuple[str, ...]]:
    """The problem and the gradients by which the mistake is probably found."""
    ways = SOONEST[next(name for name, mutants in KERNELS.items() if mutant in mutants)]
    return next((way for way, words in ways.items() if mutant[0] in words or mutant[1] in words), next(iter(ways)))


def load(source: str, path: Path, monkeypatch):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_masks(monkeypatch):
    """The oracle's masks come from the test's own Philox, not from the kernels under test."""

    def mask(seed, p, rows, columns, device, backend):
        return independent_mask(int(seed), p, rows, columns)

    monkeypatch.setattr(oracle, "dropout_mask", mask)


@pytest.mark.usefixtures("own_masks")
def test_the_kernels_as_they_are_pass():
    assert first_fault() is None


@pytest.mark.usefixtures("own_masks")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    function, _, old, new = mutant
    kernels = mutated(KERNEL.read_text(), function, old, new)
    shared = {file: made for file in SHARED if (made := mutated(file.read_text(), function, old, new)) is not None}
    assert (kernels is not None) + len(shared) == 1, f"{function} is in none of the files of kernels, or in several"
    for file, made in shared.items():
        module = load(made, tmp_path / f"fastpeft_mutant{file.name}", monkeypatch)
        if file.stem == "_common":
            monkeypatch.setattr(_lora_linear_triton, "Dropout", module.Dropout)
        imported = f"from fastpeft.kernels.{file.stem} import"
        kernels = KERNEL.read_text()
        assert kernels.count(imported) == 1
        kernels = kernels.replace(imported, f"from {module.__name__} import")
    module = load(kernels, tmp_path / "fastpeft_mutant_kernels.py", monkeypatch)
    monkeypatch.setattr(_lora_linear_triton, "kernels", module)
    assert (fault_of(*soonest(mutant)) or first_fault()) is not None
    count("planted faults caught")


@pytest.mark.usefixtures("own_masks")
@pytest.mark.parametrize("kernel", SOONEST)
def test_nothing_is_found_where_there_is_no_mistake(kernel):
    """Afterwards, where mistakes are looked for first: none of them has left anything in what all were given."""
    assert [(*way, fault) for way in SOONEST[kernel] if (fault := fault_of(*way))] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_a_dozen_mistakes_for_every_kernel(kernel):
    changes = {mutant[0:1] + mutant[2:] for mutant in KERNELS[kernel]}
    assert len(changes) == len(KERNELS[kernel]) >= 12
