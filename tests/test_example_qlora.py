"""The QLoRA example, whole and short."""

import functools
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch

import fastpeft

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/qlora.py"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The script, whose base model is trained once and copied."""
    spec = importlib.util.spec_from_file_location("qlora", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train_base = module.pretrained

    @functools.cache
    def trained(steps: int, seed: int) -> Path:
        folder = tmp_path_factory.mktemp("base")
        train_base(folder, steps, seed)
        return folder

    module.pretrained = lambda folder, *how: shutil.copytree(trained(*how), folder, dirs_exist_ok=True)
    return module


@pytest.mark.parametrize(("bits", "each"), [(4, (4.1, 4.8)), (8, (8.1, 8.4))])
def test_an_adapter_learns_on_the_quantised_base(example, bits, each, tmp_path, capsys):
    options = {"--bits": bits, "--steps": 16, "--base-steps": 24, "--rank": 4, "--out": tmp_path}
    assert example.main([str(part) for pair in options.items() for part in pair]) == 0
    printed = capsys.readouterr().out
    numbers, size, width = re.search(r"([\d,]+) weights in ([\d,]+) bytes, ([\d.]+) bits each", printed).groups()
    assert each[0] < float(width) < each[1] and int(numbers.replace(",", "")) == 294912
    assert f"{8 * int(size.replace(',', '')) / 294912:.2f}" == width
    base, adapter, reloaded = (float(x) for x in re.findall(r"(?:base|adapter|reloaded) (\d\.\d+)", printed))
    assert adapter < base - 0.02 and reloaded == pytest.approx(adapter, abs=2e-3)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000


def test_an_adapter_that_loads_as_another_is_returned(example, tmp_path, monkeypatch):
    monkeypatch.setattr(fastpeft, "load_adapter", lambda model, folder: model)
    arguments = ["--steps", "16", "--base-steps", "24", "--rank", "4", "--out", str(tmp_path)]
    assert example.main(arguments) == 1


def test_nothing_that_is_tested_is_trained_on(example):
    trained, held_out = example.code()
    assert len(trained) > 5 * len(held_out) > 5000
    whole = bytes(trained.tolist())
    assert bytes(held_out[:4000].tolist()) not in whole and bytes(held_out[-4000:].tolist()) not in whole
    first, again, other = (example.batches(trained, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


def test_what_is_asked_for_wrongly(example, capsys):
    for arguments, message in ((["--bits", "3"], "invalid choice: 3"), (["--rank", "0"], "at least 1 is needed")):
        with pytest.raises(SystemExit) as stopped:
            example.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
