"""`make fuzz` finds a planted mistake, shrinks it and prints a line that reproduces it; it ends when time is over."""

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastpeft.ops import _lora_linear_torch as path
from tests.fuzz import run
from tests.fuzz import test_fuzz_lora_linear as properties
from tests.fuzz.layouts import Layout

ROOT = Path(__file__).resolve().parents[2]
PROPERTY = "tests/fuzz/test_fuzz_lora_linear.py::test_lora_linear_on_torch"


@pytest.mark.slow
def test_a_planted_mistake_is_found_and_shrunk_to_a_line_that_can_be_pasted(monkeypatch, tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.run", "--examples=60", "--minutes=1", "--seed=0"]
    command += ["-p", "tests.fuzz.planted", PROPERTY]
    environment = os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.match(r"round 1, seed 0: \d+ examples held; ", done.stdout), done.stdout
    (line,) = set(re.findall(r"@example\((Case\(.*\))\)$", done.stdout, re.MULTILINE))
    case = eval(line, {"Case": properties.Case, "Layout": Layout})
    # The smallest that shows it.
    assert (case.rank, case.leading, case.inputs, case.outputs, case.layouts) == (3, (), 1, 1, {}), line
    assert "@reproduce_failure" in done.stdout
    properties.holds(case, "torch")
    monkeypatch.setattr(path, "add_product", path.add_product)  # put back what the module that plants replaces
    importlib.import_module("tests.fuzz.planted")
    with pytest.raises(AssertionError, match="out: an error of"):
        properties.holds(case, "torch")


@pytest.mark.parametrize(
    ("pytest_says", "examples", "rounds", "status"),
    [(0, 7, 3, 0), (1, 7, 1, 1), (2, 0, 1, 1), (4, 0, 1, 1), (5, 0, 1, 2), (0, 0, 1, 2)],
    ids=["held", "failed", "interrupted", "misused", "nothing collected", "nothing tried"],
)
def test_it_ends_when_the_time_is_over_or_with_the_first_failure(
    pytest_says, examples, rounds, status, monkeypatch, capsys
):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "time", lambda: float(next(clock)))
    seeds = []

    def one_round(seed, *_):
        seeds.append(seed)
        return pytest_says, "the output", Counter(properties=2 * bool(examples), examples=examples)

    monkeypatch.setattr(run, "one_round", one_round)
    assert run.main(["--minutes", "0.9", "--seed", "4"]) == status
    printed = capsys.readouterr().out
    assert len(seeds) == rounds == len(set(seeds)) and seeds[0] == 4 and printed.count("round ") == rounds
    assert f"{rounds * examples} examples in all" in printed and ("the output" in printed) is (status != 0)
