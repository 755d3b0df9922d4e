"""What HF peft's files cannot say of a prefix or a gated prompt: the network behind it, our own options, heads."""

import copy
import json
import warnings

import pytest
import torch

import fastpeft
from fastpeft.files import read_adapter, write_adapter
from fastpeft.journal import CONFIG, ENCODER, SIDE, WEIGHTS
from tests.models import batch, tiny
from tests.peft_pair import quietly

LENGTH = 4


def prefix(family="llama", task="CAUSAL_LM", **settings):
    torch.manual_seed(3)
    config = fastpeft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH, **settings)
    return fastpeft.patch(tiny(family, task), config)


def trained(model, optimizer, steps: int, task="CAUSAL_LM"):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(task)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def logits(model, task="CAUSAL_LM"):
    with torch.no_grad():
        return model.eval()(**batch(task)).logits


def test_training_goes_on_from_the_saved_network(tmp_path):
    model = prefix(prefix_projection=True, encoder_hidden_size=12)
    optimizer = adam(model)
    trained(model, optimizer, 2)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = trained(model, optimizer, 3)
    resumed = fastpeft.load_adapter(tiny("llama"), tmp_path, trainable=True).train()
    names = [name for name, parameter in resumed.named_parameters() if parameter.requires_grad]
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    again = adam(resumed)
    again.load_state_dict(state)
    assert trained(resumed, again, 3) == expected


def test_peft_reads_the_table_and_inference_needs_no_network(tmp_path):
    import peft

    model = prefix(prefix_projection=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / ENCODER).is_file()
    loaded = fastpeft.load_adapter(tiny("llama"), tmp_path)
    theirs = quietly(peft.PeftModel.from_pretrained, tiny("llama"), tmp_path)
    assert [name for name, _ in loaded.prompt_encoder.named_parameters()] == ["default.embedding.weight"]
    keep = batch()["attention_mask"].bool()
    for each in (loaded, theirs):
        torch.testing.assert_close(logits(each)[keep], logits(model)[keep], rtol=1e-5, atol=1e-4)
    with pytest.warns(UserWarning, match="without the network that it came out of"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / ENCODER).exists()


def test_an_adapter_that_peft_wrote_goes_on_as_a_table(tmp_path):
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=True)
    quietly(peft.get_peft_model, tiny("llama"), config).save_pretrained(tmp_path)
    model = fastpeft.load_adapter(tiny("llama"), tmp_path, trainable=True).train()
    losses = trained(model, adam(model), 3)
    assert losses[-1] < losses[0]


def test_a_save_without_a_network_removes_that_of_an_earlier_one(tmp_path):
    prefix(prefix_projection=True).save_pretrained(tmp_path)
    prefix().save_pretrained(tmp_path)
    assert not (tmp_path / ENCODER).exists()
    assert read_adapter(tmp_path).encoder is None


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("family", "task", "settings"),
    [
        ("mistral", "CAUSAL_LM", {"prefix_window": "pin"}),
        ("t5", "SEQ_2_SEQ_LM", {"encoder_prefix": True, "cross_prefix": True}),
        ("bart", "SEQ_2_SEQ_LM", {"encoder_prefix": True, "prefix_projection": True}),
    ],
)
def test_our_own_options_come_back(family, task, settings, trainable, tmp_path):
    model = prefix(family, task, **settings)
    trained(model, adam(model), 1, task)
    model.save_pretrained(tmp_path)
    loaded = fastpeft.load_adapter(tiny(family, task), tmp_path, trainable=trainable)
    torch.testing.assert_close(logits(loaded, task), logits(model, task), rtol=1e-5, atol=1e-5)
    config = loaded.peft_config["default"]
    assert all(getattr(config, name) == value for name, value in settings.items())
    assert not set(json.loads((tmp_path / CONFIG).read_text())) & {"prefix_window", "encoder_prefix", "cross_prefix"}
    plain = prefix(family, task, **{name: value for name, value in settings.items() if name == "prefix_projection"})
    trained(plain, adam(plain), 1, task)
    assert not torch.equal(logits(plain, task), logits(model, task))  # the option does something


def test_a_prefix_that_stays_is_another_model():
    slides, stays = prefix("mistral"), prefix("mistral", prefix_window="pin")
    found = (logits(slides) - logits(stays)).abs().amax(-1)[0]
    assert found[-1] > 1e-3  # a window of 4 has left the prefix behind


def test_old_checkpoints_of_bloom(tmp_path):
    """All keys came before all values until transformers 4.44."""
    model = prefix("bloom")
    table = model.prompt_encoder["default"].table().detach()
    blocks = table.unflatten(1, (4, -1))  # K0 V0 K1 V1
    old = blocks[:, [0, 2, 1, 3]].flatten(1).contiguous()
    settings = {**model.peft_config["default"].to_file_dict(), "legacy_bloom_layout": True}
    write_adapter(tmp_path, {"prompt_embeddings": old}, settings)
    loaded = fastpeft.load_adapter(tiny("bloom"), tmp_path, hf_quirks=False)  # in which padding is nobody's matter
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "today")
    assert torch.equal(read_adapter(tmp_path / "today").tensors["prompt_embeddings"], table)
    assert torch.equal(logits(fastpeft.load_adapter(tiny("bloom"), tmp_path / "today")), logits(model))
    with pytest.raises(fastpeft.ConfigError, match="legacy_bloom_layout=True: it is for loading"):
        prefix("bloom", legacy_bloom_layout=True)


def with_another_network(path):
    first = (path / ENCODER).read_bytes()
    prefix(prefix_projection=True, init_weights="zero").save_pretrained(path)
    (path / ENCODER).write_bytes(first)


def without_a_network(path):
    (path / ENCODER).unlink()


def with_the_network_of_a_wider_one(path):
    found = read_adapter(path)
    other = prefix(prefix_projection=True, encoder_hidden_size=7)
    encoder = other.prompt_encoder["default"].state_dict()
    write_adapter(path, found.tensors, found.config, found.side, encoder)


def with_a_network_that_gives_something_else(path):
    found = read_adapter(path)
    write_adapter(path, found.tensors, found.config, found.side, {k: 2 * v for k, v in found.encoder.items()})


def with_a_network_it_cannot_have(path):
    found = read_adapter(path)
    write_adapter(path, found.tensors, {**found.config, "prefix_projection": False}, found.side, found.encoder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (with_another_network, "is not the one that"),
        (without_a_network, "is missing, and"),
        (with_the_network_of_a_wider_one, "does not fit the configuration"),
        (with_a_network_that_gives_something_else, "does not give the saved prompt_embeddings"),
        (with_a_network_it_cannot_have, "has no network"),
    ],
)
def test_a_network_that_does_not_belong_to_it_is_refused(damage, words, tmp_path):
    prefix(prefix_projection=True).save_pretrained(tmp_path)
    damage(tmp_path)
    model = tiny("llama")
    with pytest.raises(fastpeft.AdapterFileError, match=words):
        fastpeft.load_adapter(model, tmp_path, trainable=True)
    assert not hasattr(model, "peft_config") and not hasattr(model, "prompt_encoder")


def test_options_of_other_weights_are_ignored(tmp_path):
    """HF peft saves over an adapter of ours and leaves the side file."""
    prefix("t5", "SEQ_2_SEQ_LM", encoder_prefix=True).save_pretrained(tmp_path)
    plain = prefix("t5", "SEQ_2_SEQ_LM")
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "plain" / WEIGHTS).read_bytes())
    with pytest.warns(UserWarning, match=f"{SIDE} is ignored"):
        loaded = fastpeft.load_adapter(tiny("t5", "SEQ_2_SEQ_LM"), tmp_path)
    assert not loaded.peft_config["default"].encoder_prefix
    assert torch.equal(logits(loaded, "SEQ_2_SEQ_LM"), logits(plain, "SEQ_2_SEQ_LM"))


def gated(task="CAUSAL_LM", **settings):
    torch.manual_seed(3)
    config = fastpeft.AdaptionPromptConfig(task_type=task, adapter_len=LENGTH, adapter_layers=1, **settings)
    model = fastpeft.patch(tiny("llama", task), config)
    trained(model, adam(model), 2, task)
    return model


def test_heads_beside_a_gated_prompt_are_trained_and_come_back(tmp_path):
    model = gated("SEQ_CLS")
    assert not torch.equal(model.score.modules_to_save["default"].weight, model.score.weight)
    model.save_pretrained(tmp_path)
    loaded = fastpeft.load_adapter(tiny("llama", "SEQ_CLS"), tmp_path)
    assert torch.equal(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"))


def test_a_gated_prompt_of_peft_s_has_no_head(tmp_path):
    import peft

    config = peft.AdaptionPromptConfig(task_type="SEQ_CLS", adapter_len=LENGTH, adapter_layers=1)
    theirs = quietly(peft.get_peft_model, tiny("llama", "SEQ_CLS"), config)
    quietly(theirs.save_pretrained, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = fastpeft.load_adapter(tiny("llama", "SEQ_CLS"), tmp_path)
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(theirs, "SEQ_CLS"), rtol=1e-5, atol=1e-5)
