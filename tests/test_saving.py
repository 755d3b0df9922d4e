"""Adapters to disk and back, ours and Hugging Face peft's, and what the Trainer makes of a patched model."""

import json

import pytest
import torch

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import by_base_name, close, quietly, randomise, result
from tests.two_adapters import TARGETS, config, outputs, trained, two

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def expected() -> dict:
    return outputs()


def files(directory) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_several_adapters_lie_where_peft_looks_for_them(tmp_path, expected):
    import peft

    model = two()
    model.save_pretrained(tmp_path / "all")
    fastpeft.save_adapter(model, tmp_path / "one", adapter_name="b")
    model.save_pretrained(tmp_path / "selected", selected_adapters=["a"])
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    each = {WEIGHTS, "adapter_config.json", "fastpeft.json"}
    assert files(tmp_path / "all") == {f"{name}/{file}" for name in "ab" for file in each}
    assert files(tmp_path / "one") == {f"b/{file}" for file in each}
    assert files(tmp_path / "selected") == {f"a/{file}" for file in each}
    assert not (tmp_path / "elsewhere").exists()
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "all" / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "all" / "b", adapter_name="b")
    ours = fastpeft.load_adapter(tiny(), tmp_path / "all" / "a", adapter_name="a")
    ours.load_adapter(tmp_path / "all" / "b", "b")
    for name in ("a", "b"):
        theirs.set_adapter(name)
        ours.set_adapter(name)
        close(result(theirs, batch()), expected[(name,)], 1e-6)
        assert torch.equal(result(ours, batch()), expected[(name,)])
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("a", "b"):
        paths = [tmp_path / who / name / WEIGHTS for who in ("theirs", "ours", "all")]
        assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()


def test_the_only_adapter_lies_in_the_directory_itself_in_our_call(tmp_path):
    model = fastpeft.patch(tiny(), config(), adapter_name="style")
    fastpeft.save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "as in peft")
    each = {WEIGHTS, "adapter_config.json", "fastpeft.json"}
    assert files(tmp_path / "ours") == each
    assert files(tmp_path / "as in peft") == {f"style/{file}" for file in each}


def test_a_loaded_adapter_is_frozen_unless_asked_for(tmp_path):
    two().save_pretrained(tmp_path, selected_adapters=["a"])
    model = fastpeft.load_adapter(tiny().train(), tmp_path / "a")
    assert not model.training and trained(model) == set()
    assert model.peft_config["default"].inference_mode
    model.load_adapter(tmp_path / "a", "other")
    assert trained(model) == set()
    for call in (model.set_adapter, lambda name, **_: fastpeft.set_adapter(model, name)):
        model.set_adapter("default", inference_mode=True)
        assert trained(model) == set()
        call("default")
        assert trained(model) == {"default"}
        call("other")
        assert trained(model) == {"other"}
    model = fastpeft.load_adapter(tiny().train(), tmp_path / "a", adapter_name="x", trainable=True)
    assert model.training and trained(model) == {"x"}
    model.load_adapter(tmp_path / "a", "y", is_trainable=True)
    assert model.training and trained(model) == {"x"} and model.active_adapters == ["x"]
    model.load_adapter(tmp_path / "a", "z")
    assert not model.training
    model.set_adapter("y")
    assert trained(model) == {"y"}


def test_loaded_biases_are_frozen_too_and_put_back(tmp_path):
    model = fastpeft.patch(tiny("qwen2"), config(bias="all"))
    randomise(model)
    model.save_pretrained(tmp_path)
    base = tiny("qwen2")
    before = snapshot(base)
    loaded = fastpeft.load_adapter(base, tmp_path)
    assert torch.equal(result(loaded, batch()), result(model, batch()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    fastpeft.unpatch(loaded)
    assert differences(before, snapshot(base)) == []
    loaded = fastpeft.load_adapter(base, tmp_path, trainable=True)
    assert {name.rpartition(".")[2] for name, p in loaded.named_parameters() if p.requires_grad} == {"weight", "bias"}


@pytest.mark.parametrize("patched", [False, True])
def test_base_weights_in_the_file_are_taken_and_put_back(patched, tmp_path, monkeypatch):
    import peft

    trained_on = tiny("phi")
    with torch.no_grad():
        for parameter in (trained_on.model.embed_tokens.weight, trained_on.lm_head.weight, trained_on.lm_head.bias):
            parameter.mul_(1.5)
    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(trained_on, peft.LoraConfig(**settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = tiny("phi")
    start = snapshot(model)
    if patched:
        fastpeft.patch(model, config(target_modules=["k_proj"]), adapter_name="first")
    before = snapshot(model)
    for at in range(1, 100):
        with monkeypatch.context() as patches:
            patches.setattr(torch.Tensor, "copy_", last_call_fails(torch.Tensor.copy_, at))
            try:
                fastpeft.load_adapter(model, tmp_path, adapter_name="b")
                break
            except ZeroDivisionError:
                pass
        assert differences(before, snapshot(model)) == [], at
    assert at > 10
    model.set_adapter("b")
    close(result(model, batch()), result(theirs.eval(), batch()), 1e-5)
    fastpeft.unpatch(model)
    assert differences(start, snapshot(model)) == []


def last_call_fails(function, at: int):
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        outcome = function(*args, **kwargs)
        if len(calls) == at:
            1 / 0  # noqa: B018
        return outcome

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("patched", [True, False])
def test_the_dtype_of_a_loaded_adapter_is_as_in_peft(dtype, wide, patched, tmp_path):
    import peft

    two().save_pretrained(tmp_path)
    theirs, ours = tiny(dtype=dtype), tiny(dtype=dtype)
    kwargs = {"autocast_adapter_dtype": wide}
    if patched:
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "b", adapter_name="b")
        ours = fastpeft.load_adapter(ours, tmp_path / "b", adapter_name="b")
        theirs.load_adapter(tmp_path / "a", adapter_name="a", **kwargs)
        ours.load_adapter(tmp_path / "a", adapter_name="a", **kwargs)
    else:
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a", adapter_name="a", **kwargs)
        ours = fastpeft.load_adapter(ours, tmp_path / "a", adapter_name="a", **kwargs)
    expected, found = by_base_name(theirs), by_base_name(ours)
    assert {name: p.dtype for name, p in found.items()} == {name: p.dtype for name, p in expected.items()}
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


def test_quirks_are_remembered_and_assumed_of_peft(tmp_path):
    for quirks in (True, False):
        model = fastpeft.patch(tiny(), config(), hf_quirks=quirks)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "fastpeft.json").read_text())["hf_quirks"] is quirks
        assert fastpeft.load_adapter(tiny(), tmp_path)._fastpeft.hf_quirks is quirks
        assert fastpeft.load_adapter(tiny(), tmp_path, hf_quirks=not quirks)._fastpeft.hf_quirks is not quirks
    (tmp_path / "fastpeft.json").unlink()
    assert fastpeft.load_adapter(tiny(), tmp_path)._fastpeft.hf_quirks is True


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_configuration_goes_through_us_unchanged(task_type, tmp_path):
    import peft

    settings = {
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "target_modules": TARGETS,
        "bias": "all",
        "use_rslora": True,
    }
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**settings, task_type=task_type))
    theirs.peft_config["default"].base_model_name_or_path = "somebody/something"
    theirs.save_pretrained(tmp_path / "theirs")
    fastpeft.load_adapter(tiny(), tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    found = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for each in found:
        each["target_modules"] = sorted(each["target_modules"])
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["eva", "orthogonal", "mica", "lora_ga"])
def test_an_initialisation_that_loading_does_not_repeat(init, tmp_path):
    """The value, and the settings of it, are kept; the adapter trains what it trains in peft; none is made anew."""
    import peft

    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": init, "task_type": "CAUSAL_LM"}
    if init == "lora_ga":
        settings["lora_ga_config"] = peft.LoraGAConfig()
    base = tiny()
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny()
    before = snapshot(model)
    fastpeft.load_adapter(model, tmp_path / "theirs", trainable=True)
    close(result(model, batch()), result(theirs.eval(), batch()), 1e-5)
    wanting = [{key for key, p in by_base_name(each).items() if p.requires_grad} for each in (model, theirs)]
    assert wanting[0] == wanting[1] and any("lora_A" in key for key in wanting[0])
    assert any("lora_B" in key for key in wanting[0]) == (init != "mica")
    model.save_pretrained(tmp_path / "ours")
    found = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for each in found:
        each["target_modules"] = sorted(each["target_modules"])
    assert found[0] == found[1] and found[1]["init_lora_weights"] == init
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    again = quietly(peft.PeftModel.from_pretrained, tiny(), tmp_path / "ours")
    close(result(again, batch()), result(model, batch()), 1e-5)
    with pytest.raises(fastpeft.ConfigError, match=f"'{init}': .*made by peft can be loaded"):
        model.add_adapter("b", theirs.peft_config["default"])
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []
    with pytest.raises(fastpeft.ConfigError, match=f"'{init}': .*made by peft can be loaded"):
        fastpeft.patch(model, theirs.peft_config["default"])
    assert differences(before, snapshot(model)) == []


@torch.no_grad()
def test_saving_while_merged_saves_the_same(tmp_path):
    torch.manual_seed(11)
    model = fastpeft.patch(
        tiny("phi"), fastpeft.LoraConfig(target_modules=["lm_head", "embed_tokens", "q_proj"], bias="all")
    )
    randomise(model)
    model.save_pretrained(tmp_path / "before")
    fastpeft.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "before" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_saves_the_adapter_only(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(11)
    model = fastpeft.patch(tiny(), config())
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    row = {key: value[0] for key, value in batch().items()}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, gradient_checkpointing=True, learning_rate=0.1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[row] * 4, eval_dataset=[row] * 2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    checkpoint = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files(checkpoint)
    assert not any(name.startswith("model") or name == "config.json" for name in files(checkpoint))
    assert all(torch.equal(dict(model.named_parameters())[name], parameter) for name, parameter in base.items())
    loaded = fastpeft.load_adapter(tiny(), checkpoint)
    assert torch.equal(result(loaded, batch()), result(model.eval(), batch()))
    assert not torch.allclose(result(loaded, batch()), result(tiny(), batch()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "task", "targets"),
    [
        ("phi3", "CAUSAL_LM", None),  # no default in peft
        ("mixtral", "CAUSAL_LM", None),  # its default comes out empty
        *(
            (family, task, "all-linear") for family in ("bert", "llama") for task in ("TOKEN_CLS", "QUESTION_ANS")
        ),  # crash
        ("bart", "SEQ_CLS", None),  # its head is not found, stays random and is not saved
        ("t5", "SEQ_CLS", "all-linear"),
    ],
)
def test_what_peft_cannot_set_up_it_can_load(family, task, targets, tmp_path):
    import peft

    torch.manual_seed(11)
    model = quietly(fastpeft.patch, tiny(family, task), fastpeft.LoraConfig(target_modules=targets, task_type=task))
    randomise(model)
    model.save_pretrained(tmp_path)
    inputs = batch(task)
    inputs["input_ids"][:, -3] = 2  # BART and T5 classify at the end of the sentence
    expected = result(model, inputs)
    assert torch.equal(result(quietly(fastpeft.load_adapter, tiny(family, task), tmp_path), inputs), expected)
    theirs = quietly(peft.PeftModel.from_pretrained, tiny(family, task), tmp_path)
    close(result(theirs, inputs), expected, 1e-5)
    heads = {"CAUSAL_LM": 0, "SEQ_CLS": 4}.get(task, 2)
    assert sum(".modules_to_save." in name for name, _ in model.named_parameters()) == heads
