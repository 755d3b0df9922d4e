"""`fastpeft check` of LoRA finds nothing where everything is right, and what is wrong where something is."""

import copy
import sys

import pytest
import torch
from transformers import MixtralForCausalLM

import fastpeft
from fastpeft import check_batches, check_lora, check_lora_model, check_model, check_rows, cli, dispatch, oracle
from fastpeft.patching import layers
from fastpeft.tuners import linear_arithmetic
from tests import checking
from tests.checking import run_check, scaled
from tests.models import tiny

ADAPTERS = [f"{name}.lora_{letter}" for name in ("q_proj", "k_proj", "v_proj", "o_proj") for letter in "AB"]
ADAPTERS += [f"{name}.lora_{letter}" for name in ("gate_proj", "up_proj", "down_proj") for letter in "AB"]


def document_of(tmp_path, *arguments):
    return checking.document_of(tmp_path, "--method", "lora", *arguments)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0, 0.3])
def test_everything_is_right(dtype, dropout, tmp_path):
    status, printed, document = document_of(tmp_path, "--dtype", dtype, "--dropout", dropout, "--backend", "torch")
    assert (status, document["faults"]) == (0, []), printed
    assert "14 x LoraLinear: lora_linear on torch (asked for)" in printed and "FAILED" not in printed
    whole = {row["tensor"]: row for row in document["rows"] if row["part"] == "whole model"}
    assert list(whole) == ["logits", *ADAPTERS]
    rounding = {"fp32": 2**-24, "bf16": 2**-9, "fp16": 2**-12}[dtype]
    for row in whole.values():
        # Every way of computing it rounds, and each somewhere between once and a few dozen times.
        assert all(0.1 * rounding < row[who] < 50 * rounding for who in ("ours", "eager", "peft")), row
        assert row["peft"] == pytest.approx(row["eager"], rel=0.1)
    ops = [row for row in document["rows"] if row["part"] != "whole model"]
    assert len(ops) == 4 * 4 and {row["tensor"] for row in ops} == {"y", "dx", "dlora_A", "dlora_B"}
    for row in document["rows"]:
        assert f"{row['ours']:.1e}" in printed and f"{row['difference']['rms']:.2f}" in printed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_per_cent_in_the_op_is_found(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(oracle, "lora_linear", scaled(oracle.lora_linear, 5))
    status, printed, document = document_of(tmp_path, "--dtype", dtype)
    assert status == 1
    wrong = {(row["part"], row["tensor"]) for row in document["rows"] if row["faults"]}
    assert wrong == {(row["part"], row["tensor"]) for row in document["rows"] if row["part"] != "whole model"}
    assert "FAILED" in printed and "gain is 0.99" in printed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_per_cent_in_the_model_is_found(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(linear_arithmetic, "apply_lora", scaled(linear_arithmetic.apply_lora, 6))
    status, _, document = document_of(tmp_path, "--dtype", dtype)
    assert status == 1
    wrong = {row["tensor"] for row in document["rows"] if row["faults"]}
    assert wrong >= {tensor for tensor in ADAPTERS}
    assert all(row["part"] == "whole model" for row in document["rows"] if row["faults"])


def test_another_dropout_mask_is_found(monkeypatch):
    """The plain formula gets the op's own masks; with others, everything differs."""
    real = check_lora_model.op_dropout

    def other(problem):
        torch.rand(1)
        return real(problem)

    monkeypatch.setattr(check_lora_model, "op_dropout", other)
    assert run_check("--method", "lora", "--dropout", 0.3)[0] == 1
    assert run_check("--method", "lora", "--dropout", 0)[0] == 0


def test_the_gain_that_half_precision_takes_from_eager_is_no_fault():
    generator = torch.Generator().manual_seed(0)
    truth = [torch.randn(64, 64, generator=generator, dtype=torch.float64)]
    eager = [(0.99 * truth[0]).bfloat16()]
    assert check_rows.row_of("lora", "a part", "a tensor", eager, eager, truth, check_rows.USUAL).faults == []
    ours = [(0.97 * truth[0]).bfloat16()]
    faults = check_rows.row_of(
        "lora", "a part", "a tensor", ours, eager, truth, check_rows.Noted(rms=9, peak=9, row=9)
    ).faults
    assert len(faults) == 1 and "gain is 0.97" in faults[0]


def test_layers_are_as_before_after_each_way_of_computing():
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(r=4, target_modules="all-linear"))
    ids = check_model.batches(model, 1, seed=0)[0]
    eager, masks = check_lora_model.eager(model, ids, 0.5, seed=0)
    assert len(masks) == len(list(layers(model))) and all(keep is not None for keep, _ in masks)
    again = check_lora_model.truth(copy.deepcopy(model), ids, masks)
    assert all(torch.equal(eager[name], again[name]) for name in eager)
    assert all("forward" not in layer.__dict__ for _, layer in layers(model))


def test_the_adapters_share_is_half_the_bases():
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(r=16, lora_alpha=7, target_modules="all-linear"))
    check_lora_model.randomize(model, seed=3)
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0].self_attn.q_proj
    with fastpeft.disable_adapter(model):
        base = layer(x)
    assert 0.25 < float(((layer(x) - base).std() / base.std()).detach()) < 1


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2"])
def test_own_model(family, tmp_path):
    model = tiny(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    status, printed, document = document_of(tmp_path, "--model", tmp_path / "model", "--rank", 4)
    assert status == 0, printed
    assert document["model"] == str(tmp_path / "model")
    logits = next(row for row in document["rows"] if row["tensor"] == "logits")
    assert 1e-4 < logits["eager"] < 1e-1  # the bf16 of its files


@pytest.mark.parametrize(
    ("family", "task", "layer"),
    [
        ("mixtral", "CAUSAL_LM", "o_proj"),  # whose experts torch multiplies in groups, but not in float64
        ("t5", "SEQ_2_SEQ_LM", "wi"),
        ("bert", "SEQ_CLS", "dense"),
        ("llama", "SEQ_CLS", "q_proj"),
        ("bart", "SEQ_CLS", "fc1"),
        ("roberta", "TOKEN_CLS", "query"),
        ("bert", "QUESTION_ANS", "query"),
    ],
)
def test_own_model_of_any_task(family, task, layer, tmp_path):
    model = tiny(family, task)
    if family == "llama":
        model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--rank", 4, "--dropout", 0.1 if family == "t5" else 0)
    status, printed, document = document_of(tmp_path, *arguments)
    assert status == 0, printed
    whole = {row["tensor"]: row for row in document["rows"] if row["part"] == "whole model"}
    assert {"logits", f"{layer}.lora_A", f"{layer}.lora_B"} <= whole.keys()
    for row in whole.values():
        assert all(1e-8 < row[who] < 1e-4 for who in ("ours", "eager", "peft")), row


def test_a_model_that_float64_does_not_serve(monkeypatch, tmp_path, capsys):
    tiny("mixtral").save_pretrained(tmp_path)
    monkeypatch.setattr(MixtralForCausalLM, "set_experts_implementation", lambda self, name: None)
    assert cli.main(["check", "--model", str(tmp_path)]) == 2
    assert "cannot be computed in float64" in capsys.readouterr().err


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    status, printed = run_check("--method", "lora")
    assert status == 0 and "peft is not installed" in printed


@pytest.mark.parametrize(
    "arguments",
    [["--rank", "0"], ["--rank", "257"], ["--rank", "four"], ["--dropout", "1"], ["--dropout", "nan"],
     ["--dtype", "int8"], ["--backend", "cuda"], ["--method", "ia3"],
     ["--prefix", "0"], ["--prefix", "1025"]],
)  # fmt: skip
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", *arguments])
    assert stop.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_refusals(monkeypatch, tmp_path, capsys):
    assert cli.main(["check", "--model", str(tmp_path)]) == 2
    assert "no config.json there" in capsys.readouterr().err
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    if not torch.cuda.is_available():
        assert cli.main(["check", "--backend", "triton"]) == 2
        assert "CPU tensors need TRITON_INTERPRET=1" in capsys.readouterr().err
    assert cli.main(["check", "--method", "lora", "--backend", "torch", "--json", str(tmp_path)]) == 2
    assert f"--json {tmp_path}: cannot be written" in capsys.readouterr().err


@pytest.mark.interpreter
def test_the_kernels_are_what_is_checked(monkeypatch, tmp_path):
    """With as little work as can be: the interpreter is slow."""
    monkeypatch.setattr(
        check_lora, "extent_of", lambda choice, rank: check_lora.Extent(op_rows=17, op_draws=1, model_draws=1)
    )
    monkeypatch.setattr(check_batches, "ROWS", 1)
    tiny().save_pretrained(tmp_path / "model")
    _, printed, document = document_of(tmp_path, "--model", tmp_path / "model", "--backend", "triton", "--dropout", 0.2)
    assert document["backends"]["lora"]["backend"] == "triton" and "lora_linear on triton (asked for" in printed
    assert all(0 < row["ours"] < 5e-6 and abs(row["difference"]["gain"] - 1) < 1e-5 for row in document["rows"])


def test_bounds_are_wider_only_where_the_kernels_round_more(monkeypatch):
    triton, torch_choice = dispatch.Choice("triton", ""), dispatch.Choice("torch", "")
    bf16, usual = torch.bfloat16, check_rows.USUAL
    for interpreted, expected in ((True, check_rows.TRUNCATED), (False, usual)):
        monkeypatch.setattr(check_lora, "interpreting", lambda value=interpreted: value)
        assert check_lora.bounds_of("y", triton, bf16, True, usual) == expected
        assert check_lora.bounds_of("dlora_A", triton, bf16, False, usual) == expected
        assert check_lora.bounds_of("dlora_A", triton, bf16, True, usual) == usual
        assert check_lora.bounds_of("y", triton, torch.float16, True, usual) == usual
        two_parts = usual if interpreted else check_rows.TWO_PARTS
        assert check_lora.bounds_of("dlora_A", triton, torch.float16, True, usual) == two_parts
        assert check_lora.bounds_of("dlora_A", torch_choice, bf16, True, usual) == usual
