"""Corners of `patch(peft_model)`: what is nested, shared or replaced is right, is left to peft with a reason, or is
refused."""

import copy
import inspect

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.reporting import LEFT
from tests.models import batch, tiny
from tests.peft_pair import quietly
from tests.test_patch_peft_life import assert_equal, gradients, logits, lora, made
from tests.test_patch_peft_prompts import CONFIGS, second, stir
from tests.test_patch_peft_prompts import made as with_prompts

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")


def left(model):
    return [row for row in fastpeft.report(model).layers if row.op == LEFT]


@pytest.mark.parametrize("which", ["prefix", "prompt", "p-tuning"])
def test_token_classification_reads_segments(which):
    config = CONFIGS[which]()
    config.task_type = "TOKEN_CLS"
    torch.manual_seed(11)
    model = stir(quietly(peft.get_peft_model, tiny("bert", "TOKEN_CLS"), config)).eval()
    ids = torch.randint(3, 90, (2, 7))
    segments = torch.arange(7).expand(2, -1) % 2
    with torch.no_grad():
        expected = model(input_ids=ids, token_type_ids=segments).logits
        plain = model(input_ids=ids).logits
        found = fastpeft.patch(model)(input_ids=ids, token_type_ids=segments).logits
    assert_equal(found, expected)
    assert not torch.allclose(expected, plain)


@pytest.mark.parametrize("outer", ["prefix", "prompt"])
@pytest.mark.parametrize("inner", ["lora", "adapter"])
def test_virtual_tokens_around_a_peft_model_are_left_to_peft(inner, outer):
    nested = made() if inner == "lora" else with_prompts("adapter")
    torch.manual_seed(7)
    model = quietly(peft.get_peft_model, nested, CONFIGS[outer]())
    stir(model)
    expected = logits(model)
    fastpeft.patch(model)
    assert_equal(logits(model), expected)
    (row,) = left(model)
    assert "its base model is a PeftModel itself" in row.reason
    assert len(fastpeft.report(model).layers) > 1  # what is inside is served
    fastpeft.unpatch(model)
    assert_equal(logits(model), expected)
    assert not any(type(each).__module__.startswith("fastpeft") for each in model.modules())


def test_two_peft_models_of_one_base_cannot_both_be_patched():
    base = tiny()
    one = stir(peft.get_peft_model(base, CONFIGS["prefix"]()))
    two = stir(peft.get_peft_model(base, second(CONFIGS["prefix"]())))
    expected = logits(one), logits(two)
    fastpeft.patch(one)
    with pytest.raises(fastpeft.PatchError, match="patched as part of another model"):
        fastpeft.patch(two)
    assert_equal(logits(one), expected[0])
    assert_equal(logits(two), expected[1])
    with pytest.raises(fastpeft.PatchError, match="not patched"):
        fastpeft.report(two)


def test_a_dropout_module_s_mode_is_what_counts():
    """Dropout at inference: everything in eval mode but the dropouts."""
    model = fastpeft.patch(made(lora(lora_dropout=0.5))).eval()
    assert torch.equal(logits(model), logits(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(logits(model), logits(model))


def test_a_disabled_prompt_is_patched_all_the_same():
    model = with_prompts("prompt")
    expected = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    fastpeft.patch(model)
    assert not left(model)
    assert_equal(logits(model), expected)
    with model.disable_adapter():
        assert_equal(logits(model), plain)
        with pytest.raises(fastpeft.PatchError, match="leave the block first"):
            fastpeft.unpatch(model)
    fastpeft.unpatch(model)
    assert_equal(logits(model), expected)


def test_a_replaced_forward_of_the_whole_model_is_named():
    model = with_prompts("prefix")
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    expected = logits(model)
    fastpeft.patch(model)
    assert_equal(logits(model), expected)
    (row,) = left(model)
    assert "forward was replaced" in row.reason
    fastpeft.unpatch(model)
    assert_equal(logits(model), expected)


def test_a_peft_model_inside_a_module():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    model = Around(with_prompts("prefix"))
    expected = logits(model)
    fastpeft.patch(model)
    assert_equal(logits(model), expected)
    assert not left(model) and {row.op for row in fastpeft.report(model).layers} == {"prefix_attention"}
    fastpeft.unpatch(model)
    assert_equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig"])
def test_methods_that_we_do_not_have_are_left_and_named(kind):
    settings = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)
    model = fastpeft.get_peft_model(tiny(), peft_config=config)
    assert {row.op for row in fastpeft.report(model).layers} == {LEFT} and len(left(model)) == 2
    fastpeft.unpatch(model)
    with pytest.raises(fastpeft.PatchError, match="not patched"):
        fastpeft.report(model)


def test_get_peft_model_of_what_is_patched_changes_nothing():
    for model in (fastpeft.patch(made()), fastpeft.patch(tiny(), fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))):
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(fastpeft.PatchError, match="patched already; add another adapter"):
            fastpeft.get_peft_model(model, lora(target_modules=["k_proj"]))
        assert [name for name, _ in model.named_parameters()] == names


def test_a_dropout_that_leaves_nothing_is_peft_s():
    theirs, ours = (made(lora(lora_dropout=1.0)).train() for _ in range(2))
    fastpeft.patch(ours)
    assert_equal(logits(ours), logits(theirs))
    assert all("leaves nothing" in row.reason for row in left(ours))


def test_adalora_s_term_goes_by_peft_s_rule_of_names():
    """Every adapter whose name contains the trained one's counts, in peft and so here."""

    def adalora(**more):
        return peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)

    theirs, ours = (made(adalora(), adapter_name="x") for _ in range(2))
    for model in (theirs, ours):
        torch.manual_seed(2)
        model.add_adapter("x2", adalora(inference_mode=True))
    fastpeft.patch(ours)
    expected, found = theirs(**batch()).loss, ours(**batch()).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_ligers_head_under_adalora_and_transformers_own_adapters():
    from tests.test_neighbours import with_liger

    adalora = peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["lm_head"], task_type="CAUSAL_LM")
    own = tiny()
    own.add_adapter(lora(target_modules=["lm_head"]), "one")
    for model in (made(adalora), own):
        fastpeft.patch(model)
        with_liger(model.base_model.model if isinstance(model, peft.PeftModel) else model)
        with pytest.raises(fastpeft.PatchError, match="the adapter changes the model's head, and Liger"):
            model(**batch())


def test_the_arguments_of_forward_can_be_asked_for():
    for which in ("prefix", "prompt"):
        model = with_prompts(which)
        expected = inspect.signature(model.forward)
        assert inspect.signature(fastpeft.patch(model).forward) == expected
        assert "labels" in expected.parameters


def test_another_embedding_is_refused_in_words():
    model = fastpeft.patch(with_prompts("prompt"))
    model.base_model.set_input_embeddings(copy.deepcopy(nn.Embedding(97, 32)))
    with pytest.raises(fastpeft.PatchError, match="took its place after the patch"):
        logits(model)


def test_a_second_derivative_is_refused_and_not_wrong():
    model = fastpeft.patch(made(lora(target_modules="all-linear")))
    model.get_base_model().config._attn_implementation = "eager"
    rows = model.get_base_model().get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    (first,) = torch.autograd.grad(model(inputs_embeds=rows, labels=batch()["labels"]).loss, rows, create_graph=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(fastpeft.OpError, match="first derivatives only"):
        torch.autograd.grad(first.pow(2).sum(), parameters, allow_unused=True)
    assert gradients(model)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_without_an_adapter_in_force_a_peft_model_is_refused(kind):
    """peft cannot call it either, and says KeyError or TypeError."""
    model = made() if kind == "lora" else with_prompts(kind)
    config = model.peft_config["default"]
    model.delete_adapter("default")
    with pytest.raises(fastpeft.PatchError, match="no adapter is in force"):
        fastpeft.patch(model)
    quietly(model.add_adapter, "again", config)
    model.set_adapter("again")
    fastpeft.patch(model)
    assert fastpeft.report(model).layers
