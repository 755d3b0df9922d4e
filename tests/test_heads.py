"""The heads of the tasks: found whatever they are called, trained and saved under HF peft's keys, and no targets."""

import pytest

import fastpeft
from tests.matrix import offers
from tests.models import tiny
from tests.peft_pair import quietly

HEADS = {  # family, task -> what is trained whole
    **{("llama", task): ["score"] for task in ("SEQ_CLS", "TOKEN_CLS")},
    **{("gpt2", "SEQ_CLS"): ["score"], ("gpt2", "TOKEN_CLS"): ["classifier"]},
    **{("bloom", "SEQ_CLS"): ["score"], ("bloom", "TOKEN_CLS"): ["classifier"]},
    **{(family, "SEQ_CLS"): ["classification_head"] for family in ("t5", "bart", "mbart")},
    **{("t5", "TOKEN_CLS"): ["classifier"], ("vit", "SEQ_CLS"): ["classifier"], ("whisper", "SEQ_CLS"): ["classifier"]},
    **{(family, task): ["classifier"] for family in ("bert", "roberta", "electra", "albert", "deberta-v2")
       for task in ("SEQ_CLS", "TOKEN_CLS")},
    **{("distilbert", "SEQ_CLS"): ["pre_classifier", "classifier"], ("distilbert", "TOKEN_CLS"): ["classifier"]},
    **{("modernbert", task): ["classifier"] for task in ("SEQ_CLS", "TOKEN_CLS")},
    ("modernbert", "QUESTION_ANS"): ["head", "classifier"],  # peft knows neither
    **{(family, "QUESTION_ANS"): ["qa_outputs"] for family in ("llama", "gpt2", "t5", "bart", "bert", "distilbert")},
}  # fmt: skip


@pytest.mark.parametrize(("family", "task"), HEADS, ids="-".join)
def test_a_head_is_trained_saved_and_no_target(family, task):
    assert offers(family, task)
    config = fastpeft.LoraConfig(task_type=task, target_modules="all-linear", r=2)
    model = quietly(fastpeft.patch, tiny(family, task), config)
    kinds = {path: type(module).__name__ for path, module in model.named_modules() if "modules_to_save" not in path}
    heads = [path for path, kind in kinds.items() if kind.startswith("Saved")]
    assert heads == HEADS[family, task]
    inside = tuple(f"{head}." for head in heads)
    assert not [path for path, kind in kinds.items() if kind.startswith("Lora") and f"{path}.".startswith(inside)]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    saved = [key for key in fastpeft.adapter_state_dict(model) if "lora_" not in key]
    assert len(trained) == len(saved) > 0
    assert all(key.startswith(tuple(f"base_model.model.{head}" for head in inside)) for key in saved)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_have_the_heads_under_peft_s_shorter_keys(method):
    settings = {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}
    kind = fastpeft.PromptTuningConfig if method == "prompt" else fastpeft.PrefixTuningConfig
    model = quietly(fastpeft.patch, tiny("bart", "SEQ_CLS"), kind(**settings))
    layers = [
        f"base_model.classification_head.{layer}.{leaf}"
        for layer in ("dense", "out_proj")
        for leaf in ("weight", "bias")
    ]
    assert set(fastpeft.adapter_state_dict(model)) == {"prompt_embeddings", *layers}
