"""What `make compat` runs beside the contracts: each method beside HF peft in the version that is installed, from the
start to files, by numbers alone. Fields of a configuration and bytes of a file are of one version, and not compared."""

import pytest
import torch

import fastpeft
from fastpeft.reporting import LEFT
from tests.models import batch, tiny
from tests.peft_pair import (
    assert_interchangeable,
    assert_same_merged,
    assert_same_start,
    assert_same_step,
    pair_of,
    quietly,
    randomise,
    result,
)

TASK = {"task_type": "CAUSAL_LM"}
VIRTUAL = {"num_virtual_tokens": 4, **TASK}
TARGETS = {"target_modules": ["q_proj", "down_proj"], **TASK}
METHODS = {  # name -> (class, settings)
    "lora": ("LoraConfig", TARGETS),
    "dora": ("LoraConfig", {"use_dora": True, **TARGETS}),
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 3, "total_step": 10, "tinit": 2, "tfinal": 3, **TARGETS}),
    "prefix": ("PrefixTuningConfig", VIRTUAL),
    "prompt": ("PromptTuningConfig", VIRTUAL),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 16, **VIRTUAL}),
    "gated": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2, **TASK}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_as_in_the_peft_that_is_installed(method, tmp_path):
    kind, settings = METHODS[method]
    hf, ours = pair_of(tiny, settings, kind)
    assert_same_start(hf, ours)
    randomise(hf, ours)
    assert_same_step(hf, ours, batch())
    quietly(hf.save_pretrained, tmp_path / "hf")
    quietly(ours.save_pretrained, tmp_path / "ours")
    unlabelled = {key: value for key, value in batch().items() if key != "labels"}  # peft's AdaLoRA has no loss then
    assert_interchangeable(hf, ours, tiny, unlabelled, tmp_path)
    if "target_modules" in settings:
        assert_same_merged(hf, ours, batch())


@pytest.mark.parametrize("method", METHODS)
def test_a_patched_peft_model_computes_what_it_did(method):
    kind, settings = METHODS[method]
    model, other = (pair_of(tiny, settings, kind)[0] for _ in range(2))
    randomise(model, other)
    fastpeft.patch(model)
    report = fastpeft.report(model)
    assert report.layers and LEFT not in {each.op for each in report.layers}
    assert_same_step(other, model, batch())
    fastpeft.unpatch(model)
    assert torch.equal(result(model, batch()), result(other, batch()))


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_generation_is_one_argmax_after_the_other(method):
    _, model = pair_of(tiny, METHODS[method][1], METHODS[method][0])
    randomise(model)
    ids = batch()["input_ids"][:1]
    found, expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0), ids
    for _ in range(5):
        following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), 1)
    assert torch.equal(found, expected)
