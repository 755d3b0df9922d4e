"""The step benchmark times only what is right."""

import json

import pytest
import torch

from fastpeft.benchmarks import bench_step
from fastpeft.tuners.lora import LoraLayer

SMALL = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=32, use_cache=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_step, "CONFIG", SMALL)
    monkeypatch.setattr(bench_step, "TOKENS", 16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_implementation_is_timed(tmp_path, capsys):
    assert bench_step.main(["--rounds", "3", "--threads", "1", "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["dropout"] for result in results] == [0.0, 0.05]
    assert all(set(result["median_ms"]) == {"frozen", "HF peft", "fastpeft"} for result in results)
    assert "times HF peft's speed" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    factors = LoraLayer.factors
    monkeypatch.setattr(LoraLayer, "factors", lambda self, name: tuple(1.01 * f for f in factors(self, name)))
    with pytest.raises(AssertionError):
        bench_step.measure(0.0, rounds=2)
