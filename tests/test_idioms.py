"""Training scripts as people write them for peft, run as they are and with the one line that makes them fast: the same
numbers, the same files."""

import importlib
import json
import math
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

import fastpeft.integrations.peft
from fastpeft.reporting import LEFT

SCRIPTS = ("seq2seq_accelerate", "alpaca_trainer", "trl_sft_dpo", "classification", "many_adapters")
TIMES = ("_runtime", "_per_second")


@pytest.fixture(autouse=True)
def reset_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    yield reset
    reset()


@pytest.fixture
def patched(monkeypatch) -> list:
    """The report of every model that is patched, as it is then."""
    reports, patch = [], fastpeft.integrations.peft.patch_peft

    def reporting(model, *args, **kwargs):
        model = patch(model, *args, **kwargs)
        reports.append(fastpeft.report(model))
        return model

    monkeypatch.setattr(fastpeft.integrations.peft, "patch_peft", reporting)
    return reports


def run(name: str, folder: Path, monkeypatch, **options) -> dict:
    """What the script's `main` returns, run in a folder of its own under one relative path."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"tests.idioms.{name}").main("out", **options)


def assert_same(found, expected, where: str = "") -> None:
    """Equal, and numbers and tensors within 1e-5; times of day and durations are left out."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-5), f"{where}: {found}, {expected}"
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            if not str(key).endswith(TIMES):
                assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected), where
        for place, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    elif isinstance(expected, numpy.ndarray):
        assert_same(found.tolist(), expected.tolist(), where)
    else:
        assert found == expected, f"{where}: {found}, {expected}"


def content(path: Path):
    """Of a file: tensors, Python objects, parsed JSON, or bytes."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".bin", ".pt", ".pth", ".pkl"):
        loaded = torch.load(path, weights_only=False)
        return loaded.to_dict() if hasattr(loaded, "to_dict") else loaded
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_changes_nothing_but_the_speed(script, tmp_path, monkeypatch, patched, reset_accelerate):
    expected = run(script, tmp_path / "plain", monkeypatch, fast=False)
    assert not patched
    reset_accelerate()
    found = run(script, tmp_path / "fast", monkeypatch, fast=True)
    assert len(patched) >= 2
    assert all(report.layers and all(row.op != LEFT for row in report.layers) for report in patched)
    assert_same(found, expected)
    names = files(tmp_path / "plain")
    assert files(tmp_path / "fast") == names and any(name.endswith("adapter_model.safetensors") for name in names)
    for name in names:
        assert_same(content(tmp_path / "fast" / name), content(tmp_path / "plain" / name), name)


def test_with_dropout_the_script_trains_and_resumes(tmp_path, monkeypatch, patched):
    found = run("alpaca_trainer", tmp_path / "fast", monkeypatch, fast=True, four_bits=False, dropout=0.1)
    assert len(found["losses"]) == 6 and all(math.isfinite(loss) for loss in found["losses"])
    assert found["eval"][-1] < found["eval"][0] and len(set(found["losses"])) == 6
    states = [json.loads(Path(f"out/checkpoint-{step}/trainer_state.json").read_text()) for step in (4, 6)]
    assert states[1]["log_history"][: len(states[0]["log_history"])] == states[0]["log_history"]
    assert len(patched) == 3


@pytest.mark.parametrize(
    "pair",
    [
        (torch.ones(2), torch.ones(2) + 1e-4),
        (torch.ones(2), torch.ones(1)),
        (1.0, 1.0001),
        (math.nan, math.nan),
        ({"a": 1}, {"b": 1}),
        ([1, [2.0]], [1, [3.0]]),
        (numpy.ones(2), numpy.zeros(2)),
        ("a", "b"),
    ],
)
def test_the_comparison_finds_what_differs(pair):
    with pytest.raises(AssertionError):
        assert_same(*pair)
