"""The step benchmark times only what is right."""

import json

import pytest
import torch

from fastpeft.benchmarks import bench_step
from fastpeft.benchmarks.bench_step import Case
from fastpeft.tuners.lora import LoraLayer

SMALL = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=128, use_cache=False,
)  # fmt: skip


CASES = {
    "lora": (Case("lora", 2, 16), Case("lora", 2, 16, dropout=0.05)),
    "prefix": (Case("prefix", 2, 24), Case("prefix", 1, 40, sizes=(("num_attention_heads", 2),))),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_step, "CONFIG", SMALL)
    monkeypatch.setattr(bench_step, "CASES", CASES)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", CASES)
def test_every_implementation_is_timed(method, tmp_path, capsys):
    options = ["--method", method, "--rounds", "3", "--threads", "1", "--clock", "cpu"]
    assert bench_step.main([*options, "--json", str(tmp_path / "out.json")]) == 0
    saved = json.loads((tmp_path / "out.json").read_text())
    assert (saved["clock"], saved["threads"]) == ("cpu", 1)
    assert [(result["tokens"], result["dropout"]) for result in saved["results"]] == [
        (case.tokens, case.dropout) for case in CASES[method]
    ]
    assert all(set(result["median_ms"]) == {"frozen", "HF peft", "fastpeft"} for result in saved["results"])
    assert all(set(result["cost_over_frozen"]) == {"HF peft", "fastpeft"} for result in saved["results"])
    assert "times HF peft's speed" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    factors = LoraLayer.factors
    monkeypatch.setattr(LoraLayer, "factors", lambda self, name: tuple(1.01 * f for f in factors(self, name)))
    with pytest.raises(AssertionError):
        bench_step.measure(CASES["lora"][0], rounds=2)


def test_a_prefix_that_is_not_seen_is_not_timed(monkeypatch):
    from fastpeft.attention import interface

    def without(module, query, key, value, mask, prefix, prompts=(), **options):
        return prefix_attention(query, key, value, prefix[0], prefix[1] * 1.01)

    prefix_attention = interface.prefix_attention
    monkeypatch.setattr(interface, "attend", without)
    with pytest.raises(AssertionError):
        bench_step.measure(CASES["prefix"][0], rounds=2)


def test_the_profile_names_what_a_step_spends(capsys):
    assert bench_step.main(["--method", "prefix", "--threads", "1", "--profile"]) == 0
    assert "  aten::" in capsys.readouterr().out
