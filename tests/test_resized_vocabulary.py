"""Adapters of a base whose vocabulary was resized: HF peft saves the embeddings with them, and so does fastpeft; they
take the place of the model's only where that is asked for."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from fastpeft import filling
from fastpeft.restoring import restore_adapter
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, close, quietly, randomise, result

MORE = 101  # tokens
KINDS = {
    "lora": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 2}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
}


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def base(request, tmp_path_factory):
    """A directory with a base model, as it was before it was resized."""
    directory = tmp_path_factory.mktemp("base")
    tiny(request.param).save_pretrained(directory)
    return directory


def resized(base, seed=1):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)  # for the new rows
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model.resize_token_embeddings(MORE)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[MORE - 4 :] = torch.randn(4, embedding.weight.shape[1])
    return model


def of(library, kind: str, model, **more):
    torch.manual_seed(5)
    name, settings = KINDS[kind]
    settings = {**settings, **{key: value for key, value in more.items() if value is not None}}
    config = getattr(library, name)(task_type="CAUSAL_LM", **settings)
    return quietly(peft.get_peft_model if library is peft else fastpeft.patch, model, config).eval()


INPUTS = {**batch(), "input_ids": batch()["input_ids"].masked_fill(batch()["input_ids"] % 7 == 3, MORE - 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_peft_and_go_both_ways(kind, base, tmp_path):
    hf, ours = of(peft, kind, resized(base)), of(fastpeft, kind, resized(base))
    randomise(hf, ours)
    for model, name in ((hf, "hf"), (ours, "ours")):
        quietly(model.save_pretrained, tmp_path / name)
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("hf", "ours"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert sum(key.endswith(("embed_tokens.weight", "lm_head.weight")) for key in found) == 2
    assert found.keys() == fastpeft.adapter_state_dict(ours).keys()

    other = resized(base, seed=2)
    before = snapshot(other)
    said = r"does not declare: .*with load_adapter\(..., embeddings=True\)"
    with pytest.raises(fastpeft.AdapterFileError, match=said):
        fastpeft.load_adapter(other, tmp_path / "hf")
    assert differences(before, snapshot(other)) == []
    fastpeft.load_adapter(other, tmp_path / "hf", embeddings=True, hf_quirks=False)
    with torch.no_grad():
        assert torch.equal(result(other, INPUTS), result(ours, INPUTS))
        if kind == "lora":
            close(result(other, INPUTS), result(hf, INPUTS), 1e-5)
    fastpeft.save_adapter(other, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()
    fastpeft.unpatch(other)
    assert differences(before, snapshot(other)) == []


def test_embeddings_are_saved_on_request_and_another_size_is_refused(tmp_path):
    hf, ours = of(peft, "lora", tiny()), of(fastpeft, "lora", tiny())
    for model, name in ((hf, "hf"), (ours, "ours")):
        quietly(model.save_pretrained, tmp_path / name, save_embedding_layers=True)
        quietly(model.save_pretrained, tmp_path / f"{name}-auto")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "hf" / WEIGHTS).read_bytes()
    assert (tmp_path / "ours-auto" / WEIGHTS).read_bytes() == (tmp_path / "hf-auto" / WEIGHTS).read_bytes()
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "ours" / WEIGHTS)
    asked = fastpeft.get_peft_model_state_dict(ours, save_embedding_layers=True)
    assert asked.keys() == load_file(tmp_path / "ours" / WEIGHTS).keys()
    with pytest.raises(fastpeft.PatchError, match="save_embedding_layers=False cannot be honoured"):
        ours.save_pretrained(tmp_path / "none", save_embedding_layers=False)
    model = tiny()
    model.resize_token_embeddings(MORE)
    said = r"has shape \(97, 32\), .* need \(101, 32\); .* to be here too: resize_token_embeddings\(97\)"
    with pytest.raises(fastpeft.AdapterFileError, match=said):
        fastpeft.load_adapter(model, tmp_path / "ours", embeddings=True)
    with pytest.raises(fastpeft.PatchError, match="embeddings='yes' must be True or False"):
        fastpeft.load_adapter(model, tmp_path / "ours", embeddings="yes")


def test_a_tied_head_that_differs_is_refused(tmp_path):
    from safetensors.torch import save_file

    of(fastpeft, "lora", tiny("llama-tied")).save_pretrained(tmp_path, save_embedding_layers=True)
    held = load_file(tmp_path / WEIGHTS)
    held["base_model.model.lm_head.weight"] = held["base_model.model.lm_head.weight"] + 1
    os.remove(tmp_path / "fastpeft.json")
    save_file(held, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = tiny("llama-tied")
    before = snapshot(model)
    with pytest.raises(fastpeft.AdapterFileError, match="lm_head.weight differs from .*embed_tokens.weight"):
        fastpeft.load_adapter(model, tmp_path, embeddings=True)
    assert differences(before, snapshot(model)) == []


def test_checkpoints_with_embeddings_are_gone_on_from(base, tmp_path):
    ours = of(fastpeft, "lora", resized(base))
    randomise(ours)
    fastpeft.save_adapter(ours, tmp_path)
    again = of(fastpeft, "lora", resized(base))
    restore_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(result(again, INPUTS), result(ours, INPUTS))


def test_a_failed_restoration_leaves_embeddings_alone(base, tmp_path, monkeypatch):
    ours = of(fastpeft, "lora", resized(base))
    randomise(ours)
    fastpeft.save_adapter(ours, tmp_path)
    again = of(fastpeft, "lora", resized(base, seed=2))
    before = snapshot(again)

    def filled_and_failed(*args):
        filling.fill(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpeft.restoring.fill", filled_and_failed)
    with pytest.raises(KeyboardInterrupt):
        restore_adapter(again, tmp_path)
    assert differences(before, snapshot(again)) == []
    fastpeft.unpatch(again)
    assert torch.equal(again.lm_head.weight, resized(base, seed=2).lm_head.weight)


@pytest.mark.parametrize("targets", [None, ["q_proj", "embed_tokens"]])
def test_a_second_adapter_s_embeddings_are_refused(base, tmp_path, targets):
    """One would silently compute with the other's."""
    models = [of(fastpeft, "lora", resized(base, seed), target_modules=targets) for seed in (1, 2)]
    for number, made in enumerate(models):
        randomise(made, seed=number)
        fastpeft.save_adapter(made, tmp_path / f"{number}")
    both = resized(base, seed=3)
    before = snapshot(both)
    fastpeft.load_adapter(both, tmp_path / "0", adapter_name="one", embeddings=True)
    state = snapshot(both)
    with pytest.raises(fastpeft.AdapterFileError, match="would take the place of .*weight.*two models"):
        fastpeft.load_adapter(both, tmp_path / "1", adapter_name="two", embeddings=True)
    assert differences(state, snapshot(both)) == []
    fastpeft.load_adapter(both, tmp_path / "0", adapter_name="same", embeddings=True)
    assert torch.equal(both.model.embed_tokens.weight, models[0].model.embed_tokens.weight)
    if targets is None:
        with pytest.warns(UserWarning, match="weight: values of an adapter's file"), both.disable_adapter():
            assert torch.equal(both.model.embed_tokens.weight, models[0].model.embed_tokens.weight)
    both.delete_adapter("same")
    fastpeft.unpatch(both)
    assert differences(before, snapshot(both)) == []


def test_deleting_an_adapter_gives_its_embeddings_back(base, tmp_path):
    ours = of(fastpeft, "lora", resized(base))
    fastpeft.save_adapter(ours, tmp_path)
    model = of(fastpeft, "lora", resized(base, seed=2))
    before = snapshot(model)
    model.load_adapter(tmp_path, "other", embeddings=True)
    assert torch.equal(model.lm_head.weight, ours.lm_head.weight)
    model.delete_adapter("other")
    assert differences(before, snapshot(model)) == []


def test_auto_classes_take_the_size_from_the_tokenizer(base, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    ours = of(fastpeft, "lora", resized(base))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(MORE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    loaded = fastpeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, embeddings=True)
    hf = quietly(peft.AutoPeftModelForCausalLM.from_pretrained, tmp_path)
    with torch.no_grad():
        close(result(loaded, INPUTS), result(ours, INPUTS), 1e-6)
        close(result(loaded, INPUTS), result(hf, INPUTS), 1e-5)
    assert json.loads((base / "config.json").read_text()).get("vocab_size") == 97


def test_auto_classes_say_that_a_tokenizer_cannot_be_read(base, tmp_path):
    ours = of(fastpeft, "lora", resized(base))
    ours.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    words = (
        "the tokenizer beside the adapter, .*cannot be read .AttributeError: .*; load the model, resize its embeddings"
    )
    with pytest.raises(fastpeft.AdapterFileError, match=words):
        fastpeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
