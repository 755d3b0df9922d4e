"""ViT and Whisper: LoRA beside peft, with heads trained and saved; prefixes of Whisper's decoder, encoder and
cross-attention, for which peft has no way, as its models read text."""

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests.models import batch_for, differences, snapshot, tiny
from tests.peft_pair import (
    WEIGHTS,
    assert_interchangeable,
    assert_same_files,
    assert_same_line,
    assert_same_merged,
    assert_same_start,
    assert_same_step,
    pair_of,
    quietly,
    randomise,
    result,
)
from tests.prefix_pair import LENGTH, prefixed, step_gradients

TABLE = "prompt_encoder.default.embedding.weight"
LORA = [
    ("vit", "SEQ_CLS", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    ("vit", "SEQ_CLS", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    ("whisper", "SEQ_CLS", {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"]}),
    ("whisper", "SEQ_2_SEQ_LM", {"target_modules": "all-linear"}),
    ("whisper", "SEQ_2_SEQ_LM", {"target_modules": ["q_proj", "v_proj"]}),
]


@pytest.mark.parametrize(("family", "task", "settings"), LORA)
def test_lora_is_as_in_peft(family, task, settings, tmp_path):
    hf, ours = pair_of(lambda: tiny(family, task), settings)
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    inputs = batch_for(family, task)
    assert_same_step(hf, ours, inputs)
    assert_same_files(hf, ours, tmp_path)
    assert_interchangeable(hf, ours, lambda: tiny(family, task), inputs, tmp_path)
    assert_same_merged(hf, ours, inputs)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize(
    ("family", "task", "settings"),
    [
        ("vit", "SEQ_CLS", {"task_type": "SEQ_CLS"}),
        ("vit", "SEQ_CLS", {"modules_to_save": ["classifier"]}),
        ("whisper", "SEQ_CLS", {"task_type": "SEQ_CLS"}),
        ("whisper", "SEQ_2_SEQ_LM", {"task_type": "SEQ_2_SEQ_LM"}),  # with which peft passes it words
    ],
)
def test_lora_trains_and_saves_heads(family, task, settings, targets, tmp_path):
    base, inputs = tiny(family, task), batch_for(family, task)
    before = snapshot(base)
    torch.manual_seed(11)
    model = fastpeft.patch(base, fastpeft.LoraConfig(r=4, target_modules=targets, **settings)).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if "modules_to_save" in name}
    assert len(heads) == (2 if task == "SEQ_CLS" else 0) and all(name.startswith("classifier.") for name in heads)
    assert all(".classifier" not in name for name in trained)
    if targets is None:
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained.keys() - heads} == {"q_proj", "v_proj"}
    optimiser, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(4):
        optimiser.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert all(parameter.grad.any() for parameter in trained.values())
    model.eval().save_pretrained(tmp_path)
    assert sum("classifier" in name for name in load_file(tmp_path / WEIGHTS)) == len(heads)
    loaded = quietly(fastpeft.load_adapter, tiny(family, task), tmp_path)
    assert torch.equal(result(loaded, inputs), result(model, inputs))
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


# Prefixes of Whisper.


@torch.no_grad()
def test_a_prefix_of_whisper_generates_the_same_with_and_without_a_cache():
    model = prefixed("whisper", "SEQ_2_SEQ_LM")
    model.get_parameter(TABLE).mul_(3)
    inputs = {"input_features": batch_for("whisper", "SEQ_2_SEQ_LM")["input_features"]}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = quietly(model.generate, **inputs, **options)
    assert torch.equal(quietly(model.generate, **inputs, **options, use_cache=False), found)
    beams = quietly(model.generate, **inputs, **options, num_beams=2)
    assert torch.equal(quietly(model.generate, **inputs, **options, num_beams=2, use_cache=False), beams)
    with model.disable_adapter():
        assert not torch.equal(quietly(model.generate, **inputs, **options), found)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("more", [{}, {"encoder_prefix": True}, {"cross_prefix": True}])
def test_the_stacks_of_whisper_have_a_prefix_each(more, tmp_path):
    base, inputs = tiny("whisper", "SEQ_2_SEQ_LM"), batch_for("whisper", "SEQ_2_SEQ_LM")
    before = snapshot(base)
    settings = {"num_transformer_submodules": 1, **more}
    model = prefixed("whisper", "SEQ_2_SEQ_LM", base=base, **settings)
    slopes = step_gradients(model, inputs)
    assert len(slopes) == 1 + len(more)
    assert all(slope.view(LENGTH, 4, -1).any(2).all() for slope in slopes.values())
    for kwargs in ({"use_reentrant": False}, {"use_reentrant": True}):
        again = prefixed("whisper", "SEQ_2_SEQ_LM", **settings)
        again.gradient_checkpointing_enable(kwargs)
        for name, slope in step_gradients(again, inputs).items():
            assert (slope - slopes[name]).norm() <= 1e-6 * slope.norm()
    model.eval().save_pretrained(tmp_path)
    loaded = quietly(fastpeft.load_adapter, tiny("whisper", "SEQ_2_SEQ_LM"), tmp_path)
    assert torch.equal(result(loaded, inputs), result(model, inputs))
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


def test_an_encoder_alone_has_one_prefix():
    model = tiny("whisper", "SEQ_CLS")
    before = snapshot(model)
    for name, word in (
        ("encoder_prefix", "all that this WhisperForAudioClassification has"),
        ("cross_prefix", "cannot"),
    ):
        config = fastpeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH, **{name: True})
        with pytest.raises(fastpeft.FastpeftError, match=word):
            fastpeft.patch(model, config)
    assert differences(before, snapshot(model)) == []


def test_the_encoder_of_whisper_keeps_its_positions():
    """A call takes all of them, so that there are none to move to; the decoder's move."""
    from fastpeft.attention.sites import find_sites

    model = tiny("whisper", "SEQ_2_SEQ_LM")
    assert find_sites(model, "encoder").positions == ()
    assert [path for path, _, _ in find_sites(model).positions] == ["model.decoder.embed_positions"]
