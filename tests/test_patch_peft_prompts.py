"""The life of a patched PeftModel whose adapters are virtual tokens (prefix tuning, prompt tuning, P-tuning,
LLaMA-Adapter), beside one that is not patched, as in tests/test_patch_peft_life.py."""

import copy
import itertools
import warnings

import pytest
import torch

import fastpeft
from fastpeft.reporting import LEFT
from tests.models import batch, tiny
from tests.test_patch_peft_life import assert_equal, gradients, logits, run, trained

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")

CONFIGS = {
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "projection": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "lstm": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM",
        encoder_dropout=0.0,
    ),
    "adapter": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
}  # fmt: skip
BY_TABLE = [name for name in CONFIGS if name != "adapter"]


def made(which, family="llama", layers=None):
    torch.manual_seed(11)
    model = peft.get_peft_model(tiny(family, layers=layers), CONFIGS[which]())
    return stir(model)


@torch.no_grad()
def stir(model):
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def second(config):
    """A longer one of the same kind."""
    config = copy.deepcopy(config)
    for name in ("num_virtual_tokens", "adapter_len"):
        if hasattr(config, name):
            setattr(config, name, 5)
    if hasattr(config, "adapter_layers"):
        config.adapter_layers = 1
    return config


def adds_another():
    model = yield
    torch.manual_seed(3)
    model.add_adapter("b", second(model.peft_config["default"]))
    yield logits(model)
    model.set_adapter("b")
    stir(model)
    yield logits(model)
    yield gradients(model)
    model.set_adapter("default")
    yield logits(model)
    yield gradients(model)


def deletes():
    model = yield
    torch.manual_seed(3)
    model.add_adapter("b", second(model.peft_config["default"]))
    model.delete_adapter("default")
    yield logits(model)
    yield model.active_adapters


def disables():
    model = yield
    with model.disable_adapter():
        yield logits(model)
        yield model.generate(input_ids=batch()["input_ids"], max_new_tokens=2, do_sample=False)
    yield logits(model)


def reaches_the_base():
    """What peft hands out is the base model, with its wrapped attention if that is the method's."""
    model = yield
    yield logits(model.get_base_model())
    yield logits(model)


def generates():
    model = yield
    model.eval()
    ids, options = batch()["input_ids"], {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    yield model.generate(input_ids=ids, **options)
    yield model.generate(input_ids=ids, num_beams=2, **options)
    yield model.generate(input_ids=ids[:1], **options)


def embeds():
    model = yield
    rows = model.get_base_model().get_input_embeddings()(batch()["input_ids"])
    yield logits(model, input_ids=None, inputs_embeds=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield logits(model, token_type_ids=torch.ones_like(batch()["input_ids"]))


SCENARIOS = (adds_another, deletes, disables, reaches_the_base, generates, embeds)
# peft hands token_type_ids on to a model with LLaMA-Adapter, and LLaMA takes none.
LIVES = [pair for pair in itertools.product(CONFIGS, SCENARIOS) if pair != ("adapter", embeds)]


@pytest.mark.parametrize(("which", "scenario"), LIVES, ids=[f"{which}-{each.__name__}" for which, each in LIVES])
def test_a_life_beside_peft_s(which, scenario):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = made(which), made(which)
        fastpeft.patch(ours)
        count = 0
        for found, expected in itertools.zip_longest(run(scenario, ours), run(scenario, theirs)):
            assert_equal(found, expected)
            count += 1
    assert count >= 2
    assert not [row for row in fastpeft.report(ours).layers if row.op == LEFT]


@pytest.mark.parametrize("which", CONFIGS)
def test_files_load_in_both_ways(which, tmp_path):
    theirs, ours = made(which), fastpeft.patch(made(which))
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    weights = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert weights[0] == weights[1]
    expected = logits(theirs.eval())
    assert_equal(logits(fastpeft.patch(peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours"))), expected)
    other = fastpeft.patch(made(which)).eval()
    other.load_adapter(tmp_path / "theirs", "loaded")
    other.set_adapter("loaded")
    assert_equal(logits(other), expected)


@pytest.mark.parametrize("which", CONFIGS)
def test_training_goes_on_with_the_same_optimizer(which):
    found = trained(made(which), patch_at=2)
    for name, expected in trained(made(which)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("which", CONFIGS)
def test_a_copy_is_patched_and_apart(which):
    model = fastpeft.patch(made(which))
    expected = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)
    fastpeft.unpatch(other)
    assert torch.equal(logits(model), expected)
    fastpeft.unpatch(model)
    assert_equal(logits(model), expected)
    assert not any(type(each).__module__.startswith("fastpeft") for each in model.modules())
    fastpeft.patch(model)
    assert torch.equal(logits(model), expected)


def test_a_prefix_of_peft_s_can_be_checkpointed():
    model = fastpeft.patch(made("prefix"))
    expected = gradients(model)
    for reentrant in (False, True):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_equal(gradients(model), expected)
        model.gradient_checkpointing_disable()


def test_a_segment_is_computed_again_as_it_was_though_the_adapter_is_disabled_by_then():
    model = fastpeft.patch(made("prefix")).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    loss = model(**batch()).loss
    with model.disable_adapter():
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_equal(found, expected)


def test_a_prefix_that_we_cannot_carry_is_left_to_peft(monkeypatch):
    model = made("prefix", "gpt2")
    expected = logits(model)
    monkeypatch.setattr("fastpeft.attention.sites.UNSERVED", ("gpt2",))
    fastpeft.patch(model)
    assert_equal(logits(model), expected)
    (row,) = [row for row in fastpeft.report(model).layers if row.op == LEFT]
    assert row.adapters == ("default",) and "cannot carry a prefix" in row.reason
    fastpeft.unpatch(model)
    assert_equal(logits(model), expected)
