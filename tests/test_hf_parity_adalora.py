"""AdaLoRA beside Hugging Face peft on whole models: the start bit for bit, the loss with its orthogonal term, all
gradients, training, the schedule's trace, files, loading, merging."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests.adalora_pair import (
    OF_FAMILY,
    SCHEDULE,
    TARGETS,
    adam,
    ours_alone,
    pair,
    pattern,
    ranks,
    trace,
    train,
    unlabelled,
)
from tests.models import batch, tiny
from tests.peft_pair import (
    WEIGHTS,
    assert_interchangeable,
    assert_same_files,
    assert_same_line,
    assert_same_merged,
    assert_same_start,
    assert_same_step,
    by_base_name,
    close,
    quietly,
    randomise,
    result,
)

CASES = [
    *((family, "CAUSAL_LM") for family in ("llama", "mistral", "mixtral", "phi3", "gpt2", "bloom", "opt")),
    *((family, "SEQ_2_SEQ_LM") for family in ("t5", "bart")),
    *((family, "SEQ_CLS") for family in ("bert", "roberta", "llama")),
    ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
]


def assert_same(family, task, directory, **settings) -> None:
    """Everything, in one life of a pair of models."""
    hf, ours = pair(family, task, **settings)
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    inputs = batch(task)
    assert_same_step(hf, ours, inputs)
    assert_same_files(hf, ours, directory)
    assert_interchangeable(hf, ours, functools.partial(tiny, family, task), unlabelled(inputs), directory)
    assert_same_merged(hf, ours, unlabelled(inputs))


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_family_is_as_in_peft(family, task, tmp_path):
    assert_same(family, task, tmp_path)


VARIANTS = {
    "not-neutral": {"init_lora_weights": False},
    "alpha": {"lora_alpha": 20},
    "alpha-of-the-rank": {"lora_alpha": -1},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "layers": {"layers_to_transform": [1]},
    "exclude": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "no-regulariser": {"orth_reg_weight": 0.0},
    "embedding-and-head": {"target_modules": ["lm_head", "q_proj"]},
    "saved": {"modules_to_save": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_as_in_peft(variant, tmp_path):
    assert_same("llama", "CAUSAL_LM", tmp_path, **{**TARGETS, **VARIANTS[variant]})


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_training_is_as_in_peft(family, task):
    inputs = batch(task)
    hf, ours = pair(family, task, total_step=20, tinit=2, tfinal=4)
    losses = [train(model, adam(model), range(1, 21), inputs) for model in (hf, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.05


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2", "bert"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_ranks_of_sixty_steps_are_those_of_peft(family, every):
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    traces = [trace(model, range(1, 61), batch(task)) for model in pair(family, task, deltaT=every)]
    for step, (theirs, ours) in enumerate(zip(*traces, strict=True), 1):
        assert theirs == ours, step
    settled = traces[1][-1]
    assert sum(settled[0].values()) == 3 * len(settled[0]) == sum(map(sum, settled[1].values()))
    budgets = [sum(map(sum, left.values())) for _, left in traces[1] if left]
    assert len(set(budgets)) > 4 and budgets == sorted(budgets, reverse=True)


def test_between_two_allocations_values_grow_again_as_in_peft():
    both = [[sum(each[0].values()) for each in trace(model, range(1, 25))] for model in pair("llama", deltaT=4)]
    assert both[0] == both[1]
    assert both[1][7] < 24 and both[1][8] == 24 and both[1][15] < both[1][7]  # at 8, 9 and 16


@pytest.fixture(scope="module")
def pruned():
    """A pair after all of its schedule."""
    hf, ours = pair("llama", **TARGETS)
    for model in (hf, ours):
        train(model, adam(model), range(1, 61))
    return hf, ours


def test_a_pruned_adapter_is_interchangeable(pruned, tmp_path):
    hf, ours = pruned
    inputs = unlabelled(batch())
    for who, model in (("hf", hf), ("ours", ours)):
        quietly(model.save_pretrained, tmp_path / who)
    files = [load_file(tmp_path / who / WEIGHTS) for who in ("hf", "ours")]
    assert {key: tensor.shape for key, tensor in files[0].items()} == {key: t.shape for key, t in files[1].items()}
    assert sum(len(tensor) for key, tensor in files[1].items() if key.endswith("lora_E")) == 18
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("hf", "ours")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1] and len(configs[1]["rank_pattern"]) == 6
    import peft

    for directory, source in (("ours", ours), ("hf", hf)):
        by_peft = quietly(peft.PeftModel.from_pretrained, tiny(), tmp_path / directory)
        by_us = quietly(fastpeft.load_adapter, tiny(), tmp_path / directory)
        for loaded in (by_peft, by_us):
            close(result(loaded, inputs), result(source, inputs), 1e-5)
        assert ranks(by_us) == ranks(source)
        by_us.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / directory / WEIGHTS).read_bytes()
        again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
        assert again["rank_pattern"] == configs[1]["rank_pattern"]


@torch.no_grad()
def test_a_pruned_adapter_merges_as_in_peft(pruned, tmp_path):
    import peft

    _, ours = pruned
    ours.save_pretrained(tmp_path)
    inputs = unlabelled(batch())
    expected = result(ours, inputs)
    theirs = quietly(peft.PeftModel.from_pretrained, tiny(), tmp_path).merge_and_unload()
    mine = fastpeft.load_adapter(tiny(), tmp_path)
    close(result(mine.merge_and_unload(), inputs), expected, 1e-5)
    close(result(theirs, inputs), expected, 1e-5)
    fastpeft.merge(ours)
    close(result(ours, inputs), expected, 1e-5)
    fastpeft.unmerge(ours)
    assert torch.equal(result(ours, inputs), expected)


def test_a_layer_without_any_triplet_left_is_saved_and_loaded(pruned, tmp_path):
    hf, ours = pruned
    gone = "model.layers.1.self_attn.q_proj"
    assert ranks(hf)[gone] == ranks(ours)[gone] == 0  # of this seed
    ours.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)[f"base_model.model.{gone}.lora_A"].shape == (0, 32)
    for trainable in (False, True):
        loaded = fastpeft.load_adapter(tiny(), tmp_path, trainable=trainable)
        assert torch.isfinite(loaded(**batch()).loss)


def test_in_the_middle_of_the_schedule_the_file_is_that_of_peft(tmp_path):
    hf, ours = pair("llama", **TARGETS)
    for model in (hf, ours):
        train(model, adam(model), range(1, 31))
    assert pattern(ours) == pattern(hf) and 18 < sum(map(sum, pattern(ours).values())) < 36
    quietly(hf.save_pretrained, tmp_path / "hf")
    ours.save_pretrained(tmp_path / "ours")
    shapes = [{key: t.shape for key, t in load_file(tmp_path / who / WEIGHTS).items()} for who in ("hf", "ours")]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_as_in_peft(dtype, autocast):
    hf, ours = pair("llama", dtype=dtype, options={"autocast_adapter_dtype": autocast}, **TARGETS)
    assert_same_start(hf, ours)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32 if autocast else dtype}
    randomise(hf, ours)
    inputs = batch()
    exact = fastpeft.patch(tiny(dtype=torch.float64), fastpeft.AdaLoraConfig(**SCHEDULE, **TARGETS))
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(by_base_name(ours)[name])
        truth = exact(**inputs)
        errors = [(model(**inputs).logits - truth.logits).square().mean().sqrt() for model in (hf, ours)]
        losses = [abs(model(**inputs).loss.double() - truth.loss.double()) for model in (hf, ours)]
    assert errors[1] <= 1.1 * errors[0]
    assert losses[1] <= max(1.1 * losses[0], 1e-3)


def test_peft_trains_the_number_of_ranks_on_a_half_precision_base_and_loses_it():
    """Why `pair` freezes it: the scale would drift in training, and be another after loading."""
    import peft

    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", **SCHEDULE, **TARGETS)
    hf = peft.get_peft_model(tiny(dtype=torch.bfloat16), config)
    assert any(p.requires_grad for name, p in hf.named_parameters() if "ranknum" in name)
    ours = ours_alone(dtype=torch.bfloat16, **TARGETS)
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "ranknum" in name)


def test_loading_keeps_the_scale_where_peft_changes_it(tmp_path):
    """lora_alpha <= 0 stands for the number of ranks; peft takes that of the pruned layer after loading."""
    import peft

    ours = ours_alone(lora_alpha=0, **TARGETS)
    train(ours, adam(ours), range(1, 61))
    ours.save_pretrained(tmp_path)
    inputs = unlabelled(batch())
    close(result(fastpeft.load_adapter(tiny(), tmp_path), inputs), result(ours.eval(), inputs), 1e-5)
    theirs = quietly(peft.PeftModel.from_pretrained, tiny(), tmp_path)
    assert (result(theirs, inputs) - result(ours, inputs)).abs().max() > 1e-3


def test_where_peft_has_no_default_targets_we_have():
    import peft

    for family in OF_FAMILY:
        with pytest.raises(ValueError, match="target_modules"):
            quietly(peft.get_peft_model, tiny(family), peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10))
        config = ours_alone(family).peft_config["default"]
        assert config.target_modules == set(OF_FAMILY[family]["target_modules"])
