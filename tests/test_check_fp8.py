"""`fastpeft check --base fp8`: right arithmetic passes, wrong is found, and the costs that it shows are measured."""

import pytest
import torch

from fastpeft import check_fp8, cli
from fastpeft.check_rows import relative_error
from tests.checking import document_of
from tests.models import tiny

ADAPTERS = [f"{name}_proj.lora_{letter}" for name in ("q", "k", "v", "o", "gate", "up", "down") for letter in "AB"]


@pytest.mark.parametrize(("dtype", "dropout"), [("bf16", 0), ("fp32", 0.3), ("fp16", 0)])
def test_everything_is_right(dtype, dropout, tmp_path):
    status, printed, document = document_of(tmp_path, "--base", "fp8", "--dtype", dtype, "--dropout", dropout)
    assert (status, document["faults"], document["base"]) == (0, [], "fp8"), printed
    assert "14 x LoraFp8Linear: lora_linear on torch" in printed and "FAILED" not in printed
    assert [(row["method"], row["tensor"]) for row in document["rows"]] == [("fp8", "y"), ("fp8", "dx")] * 5
    assert document["rows"][0]["part"] == "72 -> 72 (q_proj, widened)"
    assert document["rows"][-1]["part"] == "256 -> 512 (random numbers, widened)"
    layers = [cost for cost in document["costs"] if cost["part"] != "whole model"]
    whole = [cost for cost in document["costs"] if cost["part"] == "whole model"]
    assert len(layers) == 10 and [cost["tensor"] for cost in whole] == ["logits", *ADAPTERS]
    rounding = {"fp32": 2**-24, "bf16": 2**-9, "fp16": 2**-12}[dtype]
    for cost in layers:
        low, high = (0.03, 0.04) if cost["tensor"] == "y" else (0.02, 0.03)
        assert low < cost["fp8"] < high and cost["apart"] == pytest.approx(cost["fp8"], rel=0.05)
        assert 0.1 * rounding < cost["own"] < 10 * rounding
    for cost in whole:
        assert 0.03 < cost["fp8"] < 0.4 and 0.1 * rounding < cost["own"] < 50 * rounding
        assert cost["fp8"] < cost["fp8_peak"] and cost["own"] < cost["own_peak"] < cost["fp8_peak"]
        assert f"{cost['fp8']:.1e}" in printed and f"{cost['own_peak']:.1e}" in printed
    assert "what the base in fp8 costs, whole model" in printed and "is shown, not judged" in printed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_per_cent_is_found(dtype, monkeypatch, tmp_path):
    real = check_fp8.fp8_linear
    monkeypatch.setattr(check_fp8, "fp8_linear", lambda x, *more: 0.99 * real(x, *more))
    status, printed, document = document_of(tmp_path, "--base", "fp8", "--dtype", dtype)
    assert status == 1 and "FAILED" in printed
    assert all(row["faults"] for row in document["rows"])


def test_the_figures_are_errors():
    truth = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, far = truth + 0.01, truth * 1.1
    far[2, 3] += 5
    cost = check_fp8.cost_of("a part", "a tensor", [far, far], [near, near], [truth, truth])
    size = float(truth.square().mean().sqrt())
    assert cost.own == pytest.approx(0.01 / size) and cost.own_peak == pytest.approx(0.01 / size)
    assert cost.fp8 == relative_error([far], [truth])
    assert cost.fp8_peak == pytest.approx(float((far - truth).abs().max()) / size)
    assert cost.apart == pytest.approx(float((far - near).norm() / truth.norm()))


def test_a_model_of_one_s_own(tmp_path):
    tiny("gpt_neox", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    status, printed, document = document_of(tmp_path, "--base", "fp8", "--model", tmp_path / "model", "--rank", 4)
    assert status == 0, printed
    assert {cost["tensor"] for cost in document["costs"]} >= {"y", "dx", "logits", "dense_h_to_4h.lora_A"}


def test_wrong_usage(capsys):
    assert cli.main(["check", "--base", "fp8", "--method", "prefix"]) == 2
    assert "--base fp8 is checked with LoRA; leave out --method prefix" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["check", "--base", "fp4"])
    assert "invalid choice: 'fp4'" in capsys.readouterr().err


def test_a_base_without_such_layers(tmp_path, capsys):
    tiny("gpt2").save_pretrained(tmp_path)
    assert cli.main(["check", "--base", "fp8", "--model", str(tmp_path)]) == 2
    assert "'all-linear' matches no torch.nn.Linear of this GPT2LMHeadModel" in capsys.readouterr().err
