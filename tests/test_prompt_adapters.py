"""Prompts among other adapters: switched, shared by threads, beside LoRA and prefixes, with heads, saved and resumed;
methods and tasks that others add."""

import copy
import dataclasses
import sys
import threading
import types
from typing import ClassVar

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file

import fastpeft
from fastpeft.journal import ENCODER
from fastpeft.tasks import PatchedModelForSequenceClassification
from fastpeft.tuners import prompt_injection
from tests.models import HIDDEN, batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, close, quietly, randomise, result
from tests.prefix_pair import settings_of as prefix_settings
from tests.prefix_pair import step_gradients, task_of
from tests.prompt_pair import LENGTH, METHODS, oracle, padded, prompted, rows_of, settings_of, with_prompt

TABLE = "prompt_encoder.default.embedding.weight"
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bloom": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def config(family: str = "llama", method: str = "prompt", **settings):
    return getattr(fastpeft, METHODS[method])(**settings_of(family, None, method, **settings))


def lora(**settings) -> fastpeft.LoraConfig:
    return fastpeft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})


def adalora() -> fastpeft.AdaLoraConfig:
    return fastpeft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM")


def of_table(values: torch.Tensor, family: str = "llama") -> torch.nn.Module:
    """A model with this one prompt."""
    model = prompted(family, num_virtual_tokens=len(values))
    with torch.no_grad():
        model.get_parameter(TABLE)[: len(values)].copy_(values)
    return model


# Which adapter a call uses.


def two(family: str = "llama", first: str = "prompt", second: str = "prompt"):
    """Prompts a (active) and b, of 5 and 3 virtual tokens."""
    torch.manual_seed(11)
    model = fastpeft.patch(tiny(family, task_of(family)), config(family, first), adapter_name="a")
    model.add_adapter("b", config(family, second, num_virtual_tokens=3))
    return model.eval()


@pytest.mark.parametrize("family", TASKS)
def test_several_prompts(family):
    inputs = padded("left", family, TASKS[family])
    model = two(family, second="mlp")
    table = {name: rows_of(model, name) for name in "ab"}
    for name in "ab":
        model.set_adapter(name)
        close(result(model, inputs), result(of_table(table[name], family), inputs), 1e-6)
        trained = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder" in n}
        assert trained == {name}
    for names in (["a", "b"], ["b", "a"]):  # in the order in which they are named
        quietly(model.set_adapter, names)  # of two heads the last is called
        rows = torch.cat([table[name] for name in names])
        assert len(rows) == LENGTH + 3
        close(result(model, inputs), result(of_table(rows, family), inputs), 1e-6)
        fed = with_prompt(inputs, len(rows))
        if family == "t5":
            fed["labels"] = inputs["labels"]
        if family != "bert":  # whose head has been drawn
            close(model(**inputs).loss, oracle(family, TASKS[family], rows)(**fed).loss, 1e-5)
    model(**inputs).loss.backward()
    for name, parameter in model.prompt_encoder.named_parameters():
        assert parameter.grad.any(), name
    model.eval().delete_adapter("a")
    assert model.active_adapters == ["b"]
    close(result(model, inputs), result(of_table(table["b"], family), inputs), 1e-6)


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_unpatching_leaves_nothing(family, method):
    task = TASKS[family]
    base = tiny(family, task).train()
    with torch.no_grad():
        before, expected = snapshot(base), result(copy.deepcopy(base).eval(), batch(task))
    model = prompted(family, task, method, base=base)
    with fastpeft.disable_adapter(model), torch.no_grad():
        assert torch.equal(result(model, batch(task)), expected)
    step_gradients(model, batch(task))
    model.add_adapter("b", config(family, num_virtual_tokens=2))
    model.set_adapter("b")
    step_gradients(model, batch(task))
    for parameter in model.parameters():
        parameter.grad = None
    quietly(model.delete_adapter, "b")
    assert model.active_adapters == ["default"]
    assert fastpeft.unpatch(model) is base
    assert differences(before, snapshot(base)) == []


def test_deleting_the_last_prompt_leaves_the_base_model():
    model = fastpeft.patch(tiny(), lora(), adapter_name="l")
    before = snapshot(model)
    model.add_adapter("p", config())
    model.set_adapter("p")
    result(model, batch())
    quietly(model.delete_adapter, "p")
    model.set_adapter("l")
    changed = [line for line in differences(before, snapshot(model)) if "'_fastpeft'" not in line]
    assert changed == []
    assert not any("Prompted" in type(module).__name__ for module in model.modules())


def test_use_and_disable_adapter():
    model, inputs = two(), batch()
    expected = {}
    for name in "ab":
        model.set_adapter(name)
        expected[name] = result(model, inputs)
    model.set_adapter("a")
    with fastpeft.use_adapter(model, "b"):
        assert torch.equal(result(model, inputs), expected["b"])
        with fastpeft.disable_adapter(model):
            assert torch.equal(result(model, inputs), result(tiny(), inputs))
    assert torch.equal(result(model, inputs), expected["a"])


def test_threads_each_have_their_prompt():
    model, inputs = two(), padded("left", "llama", "CAUSAL_LM")
    expected = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = result(model, inputs).detach()
    with model.disable_adapter():
        expected[None] = result(model, inputs).detach()
    wrong, barrier = [], threading.Barrier(3)

    def work(name):
        context = model.disable_adapter() if name is None else fastpeft.use_adapter(model, name)
        with context, torch.no_grad():
            barrier.wait()
            wrong.extend(name for _ in range(20) if not torch.equal(result(model, inputs), expected[name]))
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# A prompt beside LoRA, AdaLoRA, a prefix.


@pytest.mark.parametrize("first", ["other", "prompt"])
@pytest.mark.parametrize("other", ["lora", "adalora", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_prompt_beside_another_adapter(family, other, first, tmp_path):
    made = {
        "lora": lora(),
        "adalora": adalora(),
        "prefix": fastpeft.PrefixTuningConfig(**prefix_settings(family)),
    }[other]
    adapters = {"default": made, "p": config(family, "mlp")}
    names = ["default", "p"] if first == "other" else ["p", "default"]
    torch.manual_seed(11)
    model = fastpeft.patch(tiny(family), adapters[names[0]], adapter_name=names[0])
    model.add_adapter(names[1], adapters[names[1]])
    model.set_adapter(names)
    randomise(model)
    model.eval()
    inputs = padded("left", family, "CAUSAL_LM")
    both = model(**inputs)
    mask = inputs["attention_mask"].bool()
    slopes = step_gradients(model, inputs)
    assert any("mlp_head" in name for name in slopes) and any("mlp_head" not in name for name in slopes)
    model.eval().save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "p" / WEIGHTS)) == {"prompt_embeddings"}
    # The two together are the other one on a model whose vocabulary goes on with the prompt's rows.
    rows = rows_of(model, "p")
    alone = quietly(fastpeft.load_adapter, oracle(family, "CAUSAL_LM", rows), tmp_path)
    fed = with_prompt(inputs)
    close(both.loss, alone(**fed).loss, 1e-5)
    model.set_adapter("p")
    assert not torch.allclose(model(**inputs).logits[mask], both.logits[mask])
    model.set_adapter(names)
    loaded = quietly(fastpeft.load_adapter, tiny(family), tmp_path)
    quietly(loaded.load_adapter, tmp_path / "p", adapter_name="p")
    loaded.set_adapter(names)
    close(loaded(**inputs).logits[mask], both.logits[mask], 1e-6)
    fastpeft.unpatch(model)
    assert torch.equal(result(model, inputs), result(tiny(family), inputs))


def test_lora_may_be_merged_beside_a_prompt():
    model = fastpeft.patch(tiny(), lora())
    model.add_adapter("p", config())
    model.set_adapter(["default", "p"])
    randomise(model)
    expected = result(model.eval(), batch()).detach()
    fastpeft.merge(model, ["default"])
    close(result(model, batch()), expected, 1e-5)
    with pytest.raises(fastpeft.PatchError, match="'p' is a prompt, which no weight can hold"):
        fastpeft.unmerge(model)
        fastpeft.merge(model)
    assert torch.equal(result(model, batch()), expected)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_heads_and_other_modules_are_trained_and_come_back(family, task, tmp_path):
    more = ["model.norm" if family == "llama" else "bert.encoder.layer.1.output"] if task == "SEQ_CLS" else None
    model = prompted(family, task, modules_to_save=more)
    inputs = padded("left", family, task)
    found = step_gradients(model, inputs)
    trained = {name.split(".modules_to_save")[0] for name in found if "modules_to_save" in name}
    assert len(trained) == (2 if more else 1)
    randomise(model)
    expected = result(model.eval(), inputs)
    fastpeft.save_adapter(model, tmp_path)
    loaded = fastpeft.load_adapter(tiny(family, task), tmp_path)
    assert torch.equal(result(loaded, inputs), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with fastpeft.disable_adapter(model):
        assert torch.equal(result(model, inputs), result(tiny(family, task), inputs))


# Saving, and going on from there.


@pytest.mark.parametrize("method", ["prompt", "mlp", "lstm"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_goes_on_bit_for_bit(family, method, tmp_path):
    task = TASKS[family]
    settings = {"encoder_dropout": 0.1} if method == "lstm" else {}

    def steps(model, count):
        model.train()
        torch.manual_seed(3)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        losses = []
        for _ in range(count):
            loss = model(**batch(task)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = prompted(family, task, method, **settings)
    steps(model, 2)
    fastpeft.save_adapter(model, tmp_path)
    assert (tmp_path / ENCODER).exists() == (method != "prompt")
    loaded = fastpeft.load_adapter(tiny(family, task), tmp_path, trainable=True)
    assert loaded.prompt_encoder["default"].state_dict().keys() == model.prompt_encoder["default"].state_dict().keys()
    assert steps(loaded, 3) == steps(model, 3)
    for name, parameter in model.prompt_encoder.named_parameters():
        assert torch.equal(loaded.prompt_encoder.get_parameter(name), parameter), name


def test_inference_needs_no_network(tmp_path):
    model = prompted(method="mlp")
    fastpeft.save_adapter(model, tmp_path)
    expected = result(model, batch())
    loaded = fastpeft.load_adapter(tiny(), tmp_path)
    assert {n for n, _ in loaded.prompt_encoder.named_parameters()} == {"default.embedding.weight"}
    close(result(loaded, batch()), expected, 1e-6)
    (tmp_path / ENCODER).unlink()
    with pytest.raises(fastpeft.FastpeftError):  # the side file says that there is one
        fastpeft.load_adapter(tiny(), tmp_path)
    fastpeft.save_adapter(prompted(), tmp_path / "table")
    assert not (tmp_path / "table" / ENCODER).exists()


def test_the_network_is_left_out_of_eval_mode_and_dropout(tmp_path):
    """What is saved in train mode is the table without dropout."""
    model = prompted(method="lstm", encoder_dropout=0.5, encoder_num_layers=2).train()
    table = fastpeft.adapter_state_dict(model)["prompt_embeddings"]
    assert all(module.training for module in model.prompt_encoder.modules())
    assert torch.equal(table, fastpeft.adapter_state_dict(model.eval())["prompt_embeddings"])
    close(model.prompt_encoder["default"].rows(), table, 1e-6)
    assert not torch.allclose(model.train().prompt_encoder["default"].rows(), table)


@pytest.mark.parametrize("virtual_logits", [False, True])
def test_our_own_option_comes_back(virtual_logits, tmp_path):
    model = prompted(virtual_logits=virtual_logits)
    fastpeft.save_adapter(model, tmp_path)
    loaded = fastpeft.load_adapter(tiny(), tmp_path)
    assert result(loaded, batch()).shape[1] == 9 + LENGTH * virtual_logits
    assert "virtual_logits" not in (tmp_path / "adapter_config.json").read_text()


# What others add.


class PatchedModelForRanking(PatchedModelForSequenceClassification):
    """A task that gives its targets another name."""

    @classmethod
    def move_targets(cls, given, room, spares):
        given["labels"] = given.pop("ranks")


def test_a_task_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setitem(fastpeft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, "RANKING", PatchedModelForRanking)
    model = fastpeft.patch(tiny(task="SEQ_CLS"), config(task_type="RANKING")).eval()
    inputs = padded("right", "llama", "SEQ_CLS")
    inputs["ranks"] = inputs.pop("labels")
    assert isinstance(model, PatchedModelForRanking) and type(model).__name__ == "LlamaForSequenceClassification"
    loss = model(**inputs).loss
    loss.backward()
    assert model.score.modules_to_save["default"].weight.grad.any()
    fastpeft.save_adapter(model, tmp_path)
    loaded = fastpeft.load_adapter(tiny(task="SEQ_CLS"), tmp_path)
    assert torch.equal(loaded(**inputs).loss, loss) and isinstance(loaded, PatchedModelForRanking)
    fastpeft.unpatch(loaded)
    assert not isinstance(loaded, PatchedModelForRanking)
    monkeypatch.delitem(fastpeft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, "RANKING")
    with pytest.raises(fastpeft.ConfigError, match="task_type='RANKING': choose one of"):
        fastpeft.load_adapter(tiny(task="SEQ_CLS"), tmp_path)


@dataclasses.dataclass
class ShiftedPromptConfig(fastpeft.PromptTuningConfig):
    """Prompt tuning whose rows begin at `beginning`."""

    beginning: float = 0.0

    method: ClassVar[str] = "SHIFTED_PROMPT"
    tuner: ClassVar[str] = "a_strangers_tuner"


def test_a_method_of_ones_own(monkeypatch, tmp_path):
    tuner = types.ModuleType("a_strangers_tuner")

    def inject(plan, name, state, *, init, autocast):
        prompt_injection.inject(plan, name, state, init=init, autocast=autocast)
        with torch.no_grad():
            plan.model.prompt_encoder[name].embedding.weight.fill_(plan.config.beginning)

    tuner.plan, tuner.inject = prompt_injection.plan, inject
    monkeypatch.setitem(sys.modules, "a_strangers_tuner", tuner)
    monkeypatch.setitem(fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING, "SHIFTED_PROMPT", ShiftedPromptConfig)
    given = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH, "beginning": 0.5}
    for asked in (ShiftedPromptConfig(**given), {"peft_type": "SHIFTED_PROMPT", **given}):
        model = fastpeft.patch(tiny(), asked).eval()
        assert torch.equal(rows_of(model), torch.full((LENGTH, HIDDEN), 0.5))
    randomise(model)
    fastpeft.save_adapter(model, tmp_path)
    loaded = fastpeft.load_adapter(tiny(), tmp_path)
    assert type(loaded.peft_config["default"]) is ShiftedPromptConfig
    assert torch.equal(result(loaded, batch()), result(model, batch()))
    model.add_adapter("b", config())
    model.set_adapter(["default", "b"])
    step_gradients(model, batch())
