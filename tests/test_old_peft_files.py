"""Files as every release of HF peft wrote them: which keys a configuration had, and names of tensors that have changed.

The keys are those of the releases' dataclasses, from 0.2, the oldest whose files have peft's present names of tensors,
to the one that is installed. Between them none has changed its meaning or its default but where it is said; patch
releases have the keys of their minor one.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from tests.matrix import METHODS, Cell, made, peft_s, read
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, close, quietly, randomise, result

CONFIG = "adapter_config.json"
RELEASES = tuple(f"0.{minor}" for minor in range(2, 22))

# Release -> the keys that came with it and their defaults. ... is what every file has a value of its own for.
COMMON = {
    "0.2": {"peft_type": ..., "task_type": ..., "base_model_name_or_path": None, "inference_mode": ...},
    "0.4": {"auto_mapping": None, "revision": None},
    "0.18": {"peft_version": ...},
}
PROMPTS = {
    "0.2": {"num_virtual_tokens": ..., "token_dim": None, "num_transformer_submodules": None}
    | {"num_attention_heads": None, "num_layers": None},
    "0.17": {"modules_to_save": None},
}
LORA = {
    "0.2": {"r": 8, "target_modules": None, "lora_alpha": 8, "lora_dropout": 0.0, "fan_in_fan_out": False}
    | {"bias": "none", "modules_to_save": None},
    "0.3": {"init_lora_weights": True},
    "0.4": {"layers_to_transform": None, "layers_pattern": None},
    "0.6": {"rank_pattern": {}, "alpha_pattern": {}},
    "0.7": {"megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"exclude_modules": None, "eva_config": None, "lora_bias": False},
    "0.15": {"trainable_token_indices": None, "corda_config": None},
    "0.16": {"use_qalora": False, "qalora_group_size": 16},
    "0.17": {"target_parameters": None},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False},
    "0.19": {"lora_ga_config": None, "use_bdlora": None},
    "0.20": {"velora_config": None, "monteclora_config": None},
    "0.21": {"kasa_config": None},
}
ADALORA = {
    "0.3": {"target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85}
    | {"orth_reg_weight": 0.5, "total_step": None, "rank_pattern": None},
}
KEYS = {
    "lora": [COMMON, LORA],
    "adalora": [COMMON, LORA, ADALORA],
    "prefix": [COMMON, PROMPTS]
    + [{"0.2": {"encoder_hidden_size": None, "prefix_projection": False}, "0.19": {"init_weights": None}}],
    "prompt": [COMMON, PROMPTS]
    + [{"0.2": {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}}]
    + [{"0.7": {"tokenizer_kwargs": None}}],
    "p-tuning": [COMMON, PROMPTS]
    + [{"0.2": {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": None, "encoder_num_layers": 2}}]
    + [{"0.2": {"encoder_dropout": 0.0}}],
    "adapter": [COMMON, {"0.3": {"target_modules": None, "adapter_len": ..., "adapter_layers": ...}}],
}
GONE = {"lora": {"0.2": {"merge_weights": False, "enable_lora": None}}}  # which 0.3 has not any more
SINCE = {"adalora": "0.3", "adapter": "0.3"}  # the others are older

# Before this release a task's heads were in the weights' file, and not among LoRA's modules_to_save.
HEADS_ARE_NAMED = "0.11"


def number(release: str) -> int:
    return int(release.split(".")[1])


def keys_of(method: str, release: str) -> dict:
    """The keys of a release's file, and their defaults."""
    found = dict(GONE.get(method, {}).get(release, {}))
    for table in KEYS[method]:
        for since, added in table.items():
            found.update(added if number(since) <= number(release) else {})
    return found


def as_of(release: str, method: str, today: dict) -> dict:
    """The configuration of today's file as a release wrote it."""
    out = {key: today.get(key, default) for key, default in keys_of(method, release).items()}
    if "peft_version" in out:
        out["peft_version"] = f"{release}.0"
    if method in ("lora", "adalora") and number(release) < number(HEADS_ARE_NAMED):
        out["modules_to_save"] = None
    return out


def cells_of(method: str) -> list[Cell]:
    other = ("gpt2", "CAUSAL_LM") if method == "adapter" else ("bert", "SEQ_CLS")
    return [Cell("llama", "CAUSAL_LM", method), Cell(*other, method)]


@pytest.fixture(scope="module")
def todays(tmp_path_factory):
    """Cell -> (the directory that the installed peft writes, the logits of what is loaded from it)."""
    found = {}
    for cell in [cell for method in METHODS for cell in cells_of(method)]:
        directory = tmp_path_factory.mktemp("today")
        quietly(quietly(made, peft_s(), cell).save_pretrained, directory)
        found[str(cell)] = directory, logits(cell, directory)
    return found


def logits(cell: Cell, directory, load=fastpeft.load_adapter) -> torch.Tensor:
    return read_unlabelled(quietly(load, cell.base(), directory), cell)


def read_unlabelled(model, cell: Cell) -> torch.Tensor:
    return read(model, {key: value for key, value in cell.inputs().items() if key != "labels"})


def rewritten(directory, target, change) -> None:
    """A copy of an adapter's directory whose configuration is `change(today's)`."""
    shutil.copytree(directory, target)
    config = change(json.loads((target / CONFIG).read_text()))
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_table_ends_with_the_installed_peft(method):
    import peft

    kind = getattr(peft, METHODS[method].config)
    needed = {"total_step": 1} if method == "adalora" else {}
    today = kind(**needed).to_dict()
    table = keys_of(method, RELEASES[-1])
    assert table.keys() == today.keys()
    given = {"prompt_tuning_init", "encoder_reparameterization_type"}  # enumerations, in a file by their names
    for key, default in table.items():
        if default is not ... and key not in {*needed, *given, "target_modules"}:
            assert today[key] == default, key
    known = {each.name for each in dataclasses.fields(getattr(fastpeft, METHODS[method].config))}
    assert table.keys() <= known


def released() -> list[tuple[str, str]]:
    every = ((method, release) for method in METHODS for release in RELEASES)
    return [(method, release) for method, release in every if number(release) >= number(SINCE.get(method, "0.2"))]


@pytest.mark.parametrize(("method", "release"), released())
def test_a_file_of_every_release_loads(method, release, todays, tmp_path):
    for count, cell in enumerate(cells_of(method)):
        directory, expected = todays[str(cell)]
        old = tmp_path / str(count)
        rewritten(directory, old, lambda today: as_of(release, method, today))
        model = quietly(fastpeft.load_adapter, cell.base(), old)
        assert torch.equal(read_unlabelled(model, cell), expected)
        fastpeft.save_adapter(model, tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (directory / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_installed_peft_reads_the_oldest_file_so_too(method, todays, tmp_path):
    import peft

    for count, cell in enumerate(cells_of(method)):
        directory, expected = todays[str(cell)]
        old = tmp_path / str(count)
        rewritten(directory, old, lambda today: as_of("0.4", method, today))
        close(logits(cell, old, peft.PeftModel.from_pretrained), expected, 1e-5)


NEEDED = {
    "lora": ("r", "lora_alpha", "target_modules"),
    "adalora": ("inference_mode", "init_r", "lora_alpha", "target_modules"),
    "adapter": ("adapter_len", "adapter_layers"),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_file_does_not_say_is_the_default_or_the_model_s(method, todays, tmp_path):
    needed = ("peft_type", "task_type", *NEEDED.get(method, ("num_virtual_tokens",)))
    for count, cell in enumerate(cells_of(method)):
        directory, expected = todays[str(cell)]
        rewritten(directory, tmp_path / str(count), lambda today: {key: today[key] for key in needed})
        assert torch.equal(logits(cell, tmp_path / str(count)), expected)


# A key -> a value of it that asks for what is not done here.
ASKS = {
    "lora": {
        "enable_lora": [True, False, True],
        "merge_weights": True,
        "megatron_config": {"a": 1},
        "megatron_core": "megatron.other",
        "loftq_config": {"loftq_bits": 4},
        "init_lora_weights": "loftq",
        "layer_replication": [[0, 1], [0, 1]],
        "eva_config": {"rho": 2.0},
        "corda_config": {"corda_method": "kpm"},
        "trainable_token_indices": [1, 2],
        "use_qalora": True,
        "qalora_group_size": 32,
        "alora_invocation_tokens": [1],
        "arrow_config": {"top_k": 1},
        "ensure_weight_tying": True,
        "lora_ga_config": {"direction": "ArB2r"},
        "use_bdlora": {"nblocks": 2},
        "velora_config": {"rank": 1},
        "monteclora_config": {"samples": 2},
        "kasa_config": {"rank": 1},
        "runtime_config": {"ephemeral_gpu_offload": True},
    },
    "adalora": {"use_dora": True, "loftq_config": {"loftq_bits": 4}, "trainable_token_indices": [3]},
    "prefix": {"init_weights": "ones", "num_layers": 7, "token_dim": 48},
    "prompt": {"prompt_tuning_init": "SPELLS", "tokenizer_kwargs": {"a": 1}},
    "p-tuning": {"encoder_reparameterization_type": "GRU", "encoder_dropout": 1.5},
    "adapter": {"adapter_layers": 9, "target_modules": "cross_attn"},
}


@pytest.mark.parametrize(("method", "key"), [(method, key) for method, asked in ASKS.items() for key in asked])
def test_a_key_that_asks_for_something_else_is_refused_by_name(method, key, todays, tmp_path):
    cell = cells_of(method)[0]
    rewritten(todays[str(cell)][0], tmp_path / "old", lambda today: {**today, key: ASKS[method][key]})
    refused(cell, tmp_path / "old", key)


def refused(cell: Cell, directory, *words: str) -> None:
    model = cell.base()
    before = snapshot(model)
    with pytest.raises(fastpeft.FastpeftError) as caught:
        quietly(fastpeft.load_adapter, model, directory)
    message = str(caught.value)
    assert all(word in message for word in words) and len(message.split()) > 5, message
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("method", METHODS)
def test_keys_of_a_newer_peft(method, todays, tmp_path):
    """An empty value asks for nothing; of any other nobody knows what it asks for."""
    cell = cells_of(method)[0]
    directory, expected = todays[str(cell)]
    empty = {"use_tomorrow": False, "tomorrow_config": None, "tomorrow_list": [], "tomorrow_dict": {}, "tomorrow": ""}
    newer = {**empty, "peft_version": "0.99.0"}
    rewritten(directory, tmp_path / "empty", lambda today: {**today, **newer})
    assert torch.equal(logits(cell, tmp_path / "empty"), expected)
    for count, value in enumerate((True, 0, 1, 0.5, "x", [0], {"a": None})):
        rewritten(directory, tmp_path / str(count), lambda today, value=value: {**today, **newer, "tomorrow": value})
        refused(cell, tmp_path / str(count), "tomorrow=")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_under_the_names_of_peft_0_6(bias, tmp_path):
    """Its layers were no wrappers, so the biases of targeted modules had the names that they have in the base model.
    peft 0.21.2 leaves them out without a word."""
    import peft

    settings = {"r": 2, "target_modules": ["c_attn"], "bias": bias, "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    theirs = peft.get_peft_model(tiny("gpt2"), peft.LoraConfig(**settings)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {key.replace(".base_layer.bias", ".bias"): tensor for key, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    rewritten(tmp_path, tmp_path / "old", lambda today: as_of("0.6", "lora", today))
    base = tiny("gpt2")
    before = snapshot(base)
    model = fastpeft.load_adapter(base, tmp_path / "old")
    expected = result(theirs, batch()).detach()
    close(result(model, batch()), expected, 1e-5)
    by_peft = quietly(peft.PeftModel.from_pretrained, tiny("gpt2"), tmp_path / "old")
    assert not torch.allclose(result(by_peft, batch()), expected, atol=1e-3)
    fastpeft.save_adapter(model, tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == tensors.keys()
    fastpeft.unpatch(model)
    assert differences(before, snapshot(base)) == []
