"""`fastpeft check` of prefixes and gated prompts finds nothing where everything is right, and what is wrong by its name
where something is."""

import sys

import pytest
import torch

import fastpeft
from fastpeft import (
    attention_oracle,
    check,
    check_attention,
    check_attention_model,
    check_batches,
    check_rows,
    dispatch,
)
from fastpeft.attention import interface, prompts
from tests.checking import document_of, run_check
from tests.models import tiny

METHODS = ("prefix", "adapter")
OF_A_MODEL = {
    "prefix": ["logits", "prefix_key", "prefix_value", "decoded logits"],
    "adapter": ["logits", "adaption_prompt", "adaption_gate", "decoded logits"],
}
OPS = {"prefix": "prefix_attention", "adapter": "gated_prompt_attention"}
FIVE = {"out", "dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value"}


@pytest.fixture
def small(monkeypatch):
    """With fewer draws: what is planted is found all the same."""
    extent = check_attention.Extent(keys=40, op_draws=12, short_draws=150, model_draws=16, decoded=1)
    monkeypatch.setattr(check_attention, "extent_of", lambda *_: extent)


@pytest.fixture
def few(monkeypatch):
    """For a mistake in the op, which a draw or two of each case shows; of the model as many, where nothing is found."""
    extent = check_attention.Extent(keys=40, op_draws=2, short_draws=8, model_draws=16, decoded=1)
    monkeypatch.setattr(check_attention, "extent_of", lambda *_: extent)


@pytest.fixture
def two_cases(monkeypatch):
    """For what is asked of the model: the op is checked with the first masks alone."""
    monkeypatch.setattr(check_attention, "CASES", check_attention.CASES[:2])


def parts(document, method):
    """{part: {tensor: row}}"""
    found = {}
    for row in document["rows"]:
        if row["method"] == method:
            found.setdefault(row["part"], {})[row["tensor"]] = row
    return found


@pytest.mark.parametrize(
    ("method", "dtype"), [("prefix", "fp32"), ("prefix", "bf16"), ("adapter", "fp32"), ("adapter", "fp16")]
)
def test_everything_is_right(method, dtype, tmp_path):
    status, printed, document = document_of(tmp_path, "--method", method, "--dtype", dtype, "--backend", "torch")
    assert (status, document["faults"]) == (0, []), printed
    found = parts(document, method)
    whole = found.pop("whole model")
    assert list(whole) == OF_A_MODEL[method]
    rounding = {"fp32": 2**-24, "bf16": 2**-9, "fp16": 2**-12}[dtype]
    for row in whole.values():
        assert all(0.1 * rounding < row[who] < 50 * rounding for who in ("ours", "eager", "peft")), row
        assert row["apart"] < 1e-6
    expected = [case.name for case in check_attention.CASES if method == "prefix" or not case.alone]
    assert list(found) == expected and all(rows.keys() >= FIVE for rows in found.values())
    assert "dsinks" in found["softcap, sinks"] and "dbias" in found["additive biases"]
    assert ("dprefix_bias" in found["additive biases"]) == (method == "prefix")
    assert f"2 x AdaptedLlamaAttention: {OPS[method]} on torch (asked for)" in printed and "FAILED" not in printed
    assert "64 of 64 tokens are HF peft's" in printed or dtype != "fp32"
    assert "HF peft in float64 is at most" in printed and "for CPU flash attention" in printed
    for row in document["rows"]:
        assert f"{row['ours']:.1e}" in printed and f"{row['difference']['rms']:.2f}" in printed


def with_another_scale(function, factor):
    def wrong(query, *rest, scale=None, **options):
        return function(query, *rest, scale=factor * (scale or query.shape[-1] ** -0.5), **options)

    return wrong


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_scale_in_the_op_is_found(method, dtype, monkeypatch, tmp_path, few):
    name = "gated" if method == "adapter" else "prefix_attention"
    monkeypatch.setattr(attention_oracle, name, with_another_scale(getattr(attention_oracle, name), 0.97))
    status, printed, document = document_of(tmp_path, "--method", method, "--dtype", dtype)
    assert status == 1
    wrong = {row["part"] for row in document["rows"] if row["faults"]}
    assert wrong == {row["part"] for row in document["rows"]} - {"whole model"}
    assert f"FAILED  {method}, left padding: dkey: " in printed and "gain is 0.9" in printed


@pytest.mark.parametrize(("method", "dtype"), [("prefix", "bf16"), ("adapter", "fp32")])
def test_a_wrong_scale_in_the_model_is_found(method, dtype, monkeypatch, tmp_path, small, two_cases):
    monkeypatch.setattr(interface, OPS[method], with_another_scale(getattr(interface, OPS[method]), 0.8))
    status, printed, document = document_of(tmp_path, "--method", method, "--dtype", dtype)
    assert status == 1 and f"FAILED  {method}, whole model: logits: " in printed
    assert {row["part"] for row in document["rows"] if row["faults"]} == {"whole model"}


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_is_not_hf_pefts_is_found(method, monkeypatch, tmp_path, small, two_cases):
    """Ours, the plain formula and the truth have it from one place, and agree."""
    real = interface._mask_options

    def unpadded(*arguments):
        return {**real(*arguments), "padding_mask": None}

    monkeypatch.setattr(interface, "_mask_options", unpadded)
    status, printed, document = document_of(tmp_path, "--method", method)
    assert status == 1
    wrong = [row for row in document["rows"] if row["faults"]]
    assert [row["tensor"] for row in wrong] == OF_A_MODEL[method]
    assert all("HF peft computes something else" in fault for row in wrong for fault in row["faults"])
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run_check("--method", method)[0] == 0


def test_by_default_all_methods_are_checked(tmp_path, small):
    status, printed, document = document_of(tmp_path)
    assert status == 0, printed
    assert list(document["backends"]) == list(check.METHODS) == ["lora", "prefix", "adapter"]
    assert {row["method"] for row in document["rows"]} == set(check.METHODS)
    assert document["refused"] == {} and document["schema"] == 2


def test_without_peft(monkeypatch, small, two_cases):
    monkeypatch.setitem(sys.modules, "peft", None)
    for method in METHODS:
        status, printed = run_check("--method", method)
        assert status == 0 and "peft is not installed" in printed and "32 of 32 tokens are eager's" in printed


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("gpt2", "CAUSAL_LM"),
        ("mistral", "CAUSAL_LM"),
        ("gemma2", "CAUSAL_LM"),
        ("bloom", "CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_2_SEQ_LM"),
        ("bert", "SEQ_CLS"),
        ("llama", "SEQ_CLS"),
        ("bert", "QUESTION_ANS"),
    ],
)
def test_own_model(family, task, tmp_path, small, two_cases):
    tiny(family, task).save_pretrained(tmp_path / "model")
    for method in METHODS:
        arguments = ("--method", method, "--model", tmp_path / "model", "--prefix", 5)
        status, printed, document = document_of(tmp_path, *arguments)
        assert status == 0, printed
        whole = parts(document, method)["whole model"]
        kinds = OF_A_MODEL[method] if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else OF_A_MODEL[method][:3]
        assert list(whole) == kinds
        for row in whole.values():
            assert all(1e-8 < row[who] < 1e-4 for who in ("ours", "eager")), row
        if method == "prefix" or family in ("gpt2", "mistral"):
            found = [row["peft"] if row["apart"] is None else row["apart"] for row in whole.values()]
            assert all(error < 1e-5 for error in found)
        else:
            assert ("HF peft does not serve this model" in printed) == (whole["logits"]["peft"] is None)


def test_a_method_that_does_not_serve_the_model_is_named(tmp_path, small, two_cases, monkeypatch):
    monkeypatch.setattr(prompts, "FUSED", ())  # GPT-2's projection, where a gated prompt's keys come from
    tiny("gpt2").save_pretrained(tmp_path / "model")
    status, printed, document = document_of(tmp_path, "--model", tmp_path / "model")
    assert status == 0, document["faults"]
    assert list(document["backends"]) == ["lora", "prefix"]
    assert list(document["refused"]) == ["adapter"] and "not checked  adapter: " in printed


def test_the_interface_is_as_before_after_the_plain_formula():
    kept = interface.prefix_attention, interface.gated_prompt_attention
    with pytest.raises(ZeroDivisionError), check_attention_model.plain():
        assert interface.prefix_attention not in kept
        1 / 0  # noqa: B018
    assert (interface.prefix_attention, interface.gated_prompt_attention) == kept


def test_forced_tokens_are_those_of_the_logits():
    model = check_attention_model.patched("prefix", tiny(), 3)
    batch = check_attention.check_model.batches(model, 1, seed=0, room=20, padded=True)[0]
    free = check_attention_model.decode(model, batch)
    assert torch.equal(free.logits.argmax(-1), free.tokens.flatten())
    forced = check_attention_model.decode(model, batch, (free.tokens + 1) % 97)
    assert torch.equal(forced.tokens, (free.tokens + 1) % 97)
    first = free.logits.view(*free.tokens.shape, -1)[:, 0]
    assert torch.equal(forced.logits.view(*free.tokens.shape, -1)[:, 0], first)


def test_a_padded_batch_scores_real_tokens_alone():
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    batch = check_attention.check_model.batches(model, 1, seed=0, padded=True)[0]
    mask, (targets,) = batch.inputs["attention_mask"], batch.targets
    assert mask[0].all() and (mask[1:, 0] == 0).all() and mask[:, -check_batches.POSITIONS :].all()
    assert torch.equal(targets == -100, mask[:, :-1] == 0)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_bounds(heads):
    cpu, triton = dispatch.Choice("torch", ""), dispatch.Choice("triton", "")
    sizes, case = {"heads": 8, "groups": 8 // heads}, check_attention.CASES[0]
    half = check_attention._flash_bounds(case, "dkey", sizes, torch.bfloat16)
    assert half.rms == {1: 1.25, 2: 1.25, 8: 2.12}[heads] and half.gain == 0.002
    assert check_attention._flash_bounds(case, "dquery", sizes, torch.bfloat16) == check_rows.FLASH
    assert check_attention.bounds_of("dgate", cpu, torch.float32, check_rows.USUAL) == check_rows.FEW
    assert check_attention.bounds_of("out", triton, torch.float16, check_rows.USUAL) == check_rows.USUAL


@pytest.mark.interpreter
@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_are_what_is_checked(method, monkeypatch, tmp_path):
    """With as little work as can be: the interpreter is slow."""
    extent = check_attention.Extent(keys=9, op_draws=1, short_draws=1, model_draws=1, decoded=0)
    monkeypatch.setattr(check_attention, "extent_of", lambda *_: extent)
    monkeypatch.setattr(check_batches, "ROWS", 1)
    monkeypatch.setattr(check_attention, "CASES", check_attention.CASES[1:2])
    tiny().save_pretrained(tmp_path / "model")
    arguments = ("--method", method, "--model", tmp_path / "model", "--backend", "triton")
    _, printed, document = document_of(tmp_path, *arguments)
    assert document["backends"][method]["backend"] == "triton" and f"{OPS[method]} on triton (asked for" in printed
    assert all(0 < row["ours"] < 5e-6 and abs(row["difference"]["gain"] - 1) < 1e-5 for row in document["rows"])
