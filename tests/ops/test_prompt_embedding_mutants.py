"""The test of the tests: mistakes planted in the kernels of `prompt_embedding`, each of which must be found."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from fastpeft.dispatch import backend
from fastpeft.kernels import prompt_embedding as kernels
from fastpeft.ops import _prompt_embedding_triton, prompt_embedding
from fastpeft.oracle import Bounds
from tests.counting import count
from tests.ops.prompt_embedding_cases import Problem, assert_right, draw, with_layout
from tests.ops.prompt_embedding_mutants import KERNELS
from tests.planting import mutated
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

KERNEL = Path(kernels.__file__)
MUTANTS = [mutant for mutants in KERNELS.values() for mutant in mutants]
SIZES = {"tokens": 3, "entries": 4}
TWICE = Bounds(rms=2.2, peak=4.0, row=8.0)  # so that one draw will do: what this finds the criterion finds


def problems() -> list[Problem]:
    """Together they use everything, on tensors with gaps: ids and embeddings, prompts of either kind."""
    shared, own = draw("fp32", **SIZES), draw("fp32", embeds=True, by_sample=True, **SIZES)
    shared.ids[:2] = torch.tensor([[0, 3, 1], [2, 0, 3]])
    for name in ("ids", "rows", "prompt", "dout"):
        shared = with_layout(shared, name, "gappy")
        own = own if name == "ids" else with_layout(own, name, "gappy")
    behind = draw("fp32", starts=True, **SIZES)
    return [shared, own, behind, draw("fp32", embeds=True, by_sample=True, starts=True, **SIZES)]


def assert_unknown_rows_are_nan() -> None:
    """Of a table in the middle of a storage, which an id outside would else be read from."""
    problem = draw("fp32", batch=1, tokens=2, entries=6)
    table = problem.rows[1:5]
    problem.ids[0] = torch.tensor([-1, 4])
    assert prompt_embedding(problem.ids, table, problem.prompt)[0, -2:].isnan().all()


def first_fault() -> str | None:
    """What is wrong, in words; a lane that would leave its tensor is stopped before it does."""
    with backend("triton"), count_traffic():
        try:
            for problem in problems():
                assert_right([problem], TWICE)
            assert_unknown_rows_are_nan()
        except (AssertionError, InterpreterError) as fault:
            return f"{fault} {fault.__cause__}"
    return None


def test_the_kernels_as_they_are_pass():
    assert first_fault() is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    function, _, old, new = mutant
    path = tmp_path / "fastpeft_mutant_prompts.py"
    path.write_text(mutated(KERNEL.read_text(), function, old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(_prompt_embedding_triton, "forward", module.prepend)
    monkeypatch.setattr(_prompt_embedding_triton, "grad_prompt", module.grad_prompt)
    assert first_fault() is not None
    count("planted faults caught")


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_a_dozen_mistakes_for_every_kernel(kernel):
    changes = {mutant[0:1] + mutant[2:] for mutant in KERNELS[kernel]}
    assert len(changes) == len(KERNELS[kernel]) >= 12
