"""Two adapters in one model, of one kind or of two, both at work: against models that are put together by other means,
HF peft's nested ones among them, and with everything that each does alone."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from tests.matrix import METHODS, MODES, Cell, close, read
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, quietly, randomise
from tests.prompt_pair import of_tokens, oracle, rows_of, with_prompt

TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
MERGED = ("lora", "adalora")  # what can go into the base's weights
IN_FRONT = ("prompt", "p-tuning")  # what stands in front of the tokens
VIRTUAL = ("prefix", *IN_FRONT)
OTHER_TARGETS = {"llama": "o_proj", "bert": "dense", "t5": "lm_head"}  # than AdaLoRA's by default


def pairs() -> list[tuple[str, str, str]]:
    """(family, first, second)."""
    chosen = [pair for pair in itertools.combinations_with_replacement(METHODS, 2) if pair != ("adalora", "adalora")]
    return [(family, *pair) for family in TASKS for pair in chosen]


def config(family: str, method: str, beside: str = "", second: bool = False):
    settings = dict(METHODS[method].settings)
    if second and method == beside:  # not twice the same
        changes = {"lora": {"r": 2, "lora_alpha": 6}, "adapter": {"adapter_len": 3}}
        settings.update(changes.get(method, {"num_virtual_tokens": 3}))
    if method == "lora" and beside == "adalora":
        settings["target_modules"] = [OTHER_TARGETS[family]]
    return getattr(fastpeft, METHODS[method].config)(task_type=TASKS[family], **settings)


def combined(family: str, first: str, second: str, base=None) -> torch.nn.Module:
    """Our model with the adapters a and b, both active, as they begin."""
    torch.manual_seed(11)
    base = tiny(family, TASKS[family]) if base is None else base
    model = quietly(fastpeft.patch, base, config(family, first, second), adapter_name="a")
    quietly(model.add_adapter, "b", config(family, second, first, second=True))
    quietly(model.set_adapter, ["a", "b"])
    return model.eval()


def at_work(family: str, first: str, second: str, base=None) -> torch.nn.Module:
    """The same, and nothing is neutral."""
    model = combined(family, first, second, base)
    randomise(model)
    for name, parameter in model.named_parameters():
        if ".adaption_gate." in name:
            parameter.data.fill_(0.5)
    return model


def plain(family: str) -> torch.nn.Module:
    return tiny(family, TASKS[family])


def inputs_of(family: str) -> dict:
    """Without labels, which for some heads change what is computed beside the logits."""
    inputs = batch(TASKS[family])
    labels = inputs.pop("labels")
    return {**inputs, "decoder_input_ids": labels} if family == "t5" else inputs


def here(model, directory, **options):
    return quietly(fastpeft.load_adapter, model, directory, **options)


def names_of_adapters(parameter: str) -> set[str]:
    return {part for part in parameter.split(".") if part in ("a", "b")}


@pytest.mark.parametrize(("family", "first", "second"), pairs())
def test_a_life_of_two(family, first, second, tmp_path):
    """Saved, each alone in either library, loaded again, chosen, switched off, taken out."""
    import peft

    base, inputs = plain(family), inputs_of(family)
    before, bare = snapshot(base), read(base, inputs)
    model = at_work(family, first, second, base)
    both = read(model, inputs)
    model.save_pretrained(tmp_path)
    for name, method in (("a", first), ("b", second)):  # and so ends with b's logits alone
        alone = read(here(plain(family), tmp_path / name), inputs)
        with fastpeft.use_adapter(model, name):
            close(read(model, inputs), alone, 1e-6)
        model.set_adapter(name)
        close(read(model.eval(), inputs), alone, 1e-6)
        trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        assert all(names_of_adapters(key) == {name} for key in trained) and trained
        if method != "adapter" or family == "llama":
            theirs = quietly(peft.PeftModel.from_pretrained, plain(family), tmp_path / name)
            close(read(theirs.eval(), inputs), alone)
        assert not torch.allclose(alone, both, atol=1e-3) and not torch.allclose(alone, bare, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(read(model, inputs), bare)
    quietly(model.set_adapter, ["a", "b"])
    assert torch.equal(read(model.eval(), inputs), both)
    loaded = here(here(plain(family), tmp_path / "a", adapter_name="a"), tmp_path / "b", adapter_name="b")
    quietly(loaded.set_adapter, ["a", "b"])
    close(read(loaded.eval(), inputs), both, 1e-6)
    loaded.save_pretrained(tmp_path / "again")
    for name in "ab":
        assert (tmp_path / "again" / name / WEIGHTS).read_bytes() == (tmp_path / name / WEIGHTS).read_bytes()
    quietly(loaded.delete_adapter, "a")
    close(read(loaded.eval(), inputs), alone, 1e-6)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(base)) == []


@pytest.mark.parametrize(("family", "first", "second"), pairs())
def test_both_learn(family, first, second):
    """Three steps: the loss falls, and everything of both has a gradient but the head that is not the last one's."""
    model, inputs = combined(family, first, second).train(), batch(TASKS[family])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set().union(*map(names_of_adapters, trained)) == {"a", "b"}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-3)
    before = loss_of(model, inputs)
    for step in range(1, 4):
        optimiser.zero_grad()
        model(**inputs).loss.backward()
        optimiser.step()
        if "adalora" in (first, second):
            fastpeft.update_and_allocate(model, step)
    assert loss_of(model, inputs) < before
    without = {key for key, each in trained.items() if each.grad is None or not each.grad.any()}
    idle = {key for key in trained if ".modules_to_save.a." in key}
    assert {key for key in without if not key.endswith("bias")} <= idle <= without
    assert bool(idle) == (family == "bert")


@torch.no_grad()
def loss_of(model, inputs) -> float:
    model.eval()
    loss = float(model(**inputs).loss)
    model.train()
    return loss


# Against what is put together by other means.


def merged(model, directory):
    return quietly(here(model, directory).merge_and_unload)


def as_one_prefix(folder):
    """A directory with one prefix, whose table is of the rows of a and b."""
    shutil.copytree(folder / "b", folder / "ab")
    table = torch.cat([load_file(folder / name / WEIGHTS)["prompt_embeddings"] for name in "ab"])
    tensors = {**load_file(folder / "b" / WEIGHTS), "prompt_embeddings": table}
    save_file(tensors, folder / "ab" / WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((folder / "ab" / "adapter_config.json").read_text())
    (folder / "ab" / "adapter_config.json").write_text(json.dumps({**settings, "num_virtual_tokens": len(table)}))
    return folder / "ab"


def of_oracle(family: str, model, methods: dict[str, str], folder, inputs) -> torch.Tensor:
    """The logits of the plain model whose vocabulary goes on with the prompts' rows, and that carries the other
    adapter, if it is of another kind."""
    prompts = [name for name in "ab" if methods[name] in IN_FRONT]
    rows = torch.cat([rows_of(model, name) for name in prompts])
    base = oracle(family, TASKS[family], rows)
    if family == "bert":
        base.classifier.load_state_dict(model.classifier.modules_to_save["b"].state_dict())
    for name in {"a", "b"}.difference(prompts):
        base = here(base, folder / name)
    with torch.no_grad():
        logits = base.eval()(**with_prompt(inputs, len(rows))).logits
    return of_tokens(logits, inputs, len(rows)).T if family == "llama" else logits


# A gated prompt beside a prefix: see the nested models below; two: see tests/test_hf_parity_adaption_prompt.py.
COMPOSED = [pair for pair in pairs() if pair[1:] not in (("prefix", "adapter"), ("adapter", "adapter"))]


@pytest.mark.parametrize(("family", "first", "second"), COMPOSED)
def test_two_are_what_they_are_one_after_the_other(family, first, second, tmp_path):
    model, inputs = at_work(family, first, second), inputs_of(family)
    if family == "bert":  # the head is the last one's
        heads = model.classifier.modules_to_save
        heads["a"].load_state_dict(heads["b"].state_dict())
    model.save_pretrained(tmp_path)
    if first in MERGED:
        expected = read(here(merged(plain(family), tmp_path / "a"), tmp_path / "b").eval(), inputs)
    elif first == second == "prefix":
        expected = read(here(plain(family), as_one_prefix(tmp_path)), inputs)
    else:
        expected = of_oracle(family, model, {"a": first, "b": second}, tmp_path, inputs)
    close(read(model, inputs), expected)


# HF peft's nested models, the first adapter inside of the second. It finds the heads of a nested model no more.
NESTED = [
    *((family, first, second) for family in ("llama", "t5") for first in MERGED for second in VIRTUAL),
    *(("llama", "adapter", second) for second in VIRTUAL),
]


@pytest.mark.parametrize(("family", "first", "second"), NESTED)
def test_as_peft_nests_them(family, first, second, tmp_path):
    import peft

    inputs = inputs_of(family)
    model = at_work(family, first, second)
    model.save_pretrained(tmp_path)
    inner = quietly(peft.PeftModel.from_pretrained, plain(family), tmp_path / "a")
    nested = quietly(peft.PeftModel.from_pretrained, inner, tmp_path / "b").eval()
    close(read(model, inputs), read(nested, inputs))


def test_two_loras_are_as_peft_adds_them_up(tmp_path):
    import peft

    model = at_work("llama", "lora", "lora")
    model.save_pretrained(tmp_path)
    theirs = quietly(peft.PeftModel.from_pretrained, plain("llama"), tmp_path / "a", adapter_name="a")
    quietly(theirs.load_adapter, tmp_path / "b", adapter_name="b")
    theirs.base_model.set_adapter(["a", "b"])
    close(read(model, batch()), read(theirs.eval(), batch()))
    expected = read(model, batch())
    fastpeft.merge(model)
    close(read(model, batch()), expected)
    fastpeft.unmerge(model)
    assert torch.equal(read(model, batch()), expected)


@pytest.mark.parametrize("second", [*VIRTUAL, "adapter"])
@pytest.mark.parametrize("first", MERGED)
@pytest.mark.parametrize("family", TASKS)
def test_one_may_be_merged_beside_the_other(family, first, second):
    model, inputs = at_work(family, first, second), inputs_of(family)
    expected = read(model, inputs)
    fastpeft.merge(model, ["a"])
    close(read(model, inputs), expected)
    fastpeft.unmerge(model)
    assert torch.equal(read(model, inputs), expected)
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match="'b'"):
        fastpeft.merge(model)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize(("family", "first", "second"), [pair for pair in pairs() if pair[0] != "bert"])
def test_both_generate(family, first, second):
    """With a cache, static or not, or without one, behind padding or not: the same tokens, of the same logits."""
    model = at_work(family, first, second)
    cell = Cell(family, TASKS[family], first)
    found = {mode: quietly(decode, model, cell) for mode, decode in MODES.items()}
    for mode, (ids, logits) in found.items():
        if family == "llama" or mode != "left padding":
            assert torch.equal(ids, found["no cache"][0]), mode
            close(logits, found["no cache"][1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [("lora", "prefix"), ("adalora", "adapter"), ("prefix", "prompt"), ("p-tuning", "adapter")]
)
@pytest.mark.parametrize("family", TASKS)
def test_checkpointing_changes_no_gradient(family, first, second, reentrant):
    expected = gradients(at_work(family, first, second), family)
    model = at_work(family, first, second)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, family)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        close(found[name], each, 1e-5)


def gradients(model, family: str) -> dict[str, torch.Tensor]:
    model.train()
    model(**batch(TASKS[family])).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("methods", [("prompt", "p-tuning"), ("prefix", "prefix"), ("lora", "prefix")])
def test_the_order_is_that_of_set_adapter(methods):
    """Prompts stand one behind the other, so the order counts; for the others it does not."""
    model = at_work("llama", *methods)
    first = read(model, batch())
    model.set_adapter(["b", "a"])
    second = read(model.eval(), batch())
    with fastpeft.use_adapter(model, ["a", "b"]):
        assert torch.equal(read(model, batch()), first)
    if methods[0] == "prompt":
        assert not torch.allclose(first, second, atol=1e-3)
    else:
        close(second, first)


# What cannot be, and is refused before anything has changed.

CAUSAL = {"task_type": "CAUSAL_LM"}
MAKES = {
    "lora": lambda **settings: fastpeft.LoraConfig(**{**CAUSAL, "target_modules": ["q_proj"], **settings}),
    "adalora": lambda **settings: fastpeft.AdaLoraConfig(**{**CAUSAL, "total_step": 9, **settings}),
    "prefix": lambda **settings: fastpeft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3, **settings),
    "prompt": lambda **settings: fastpeft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3, **settings),
    "p-tuning": lambda **settings: fastpeft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=3, **settings),
    "adapter": lambda **settings: fastpeft.AdaptionPromptConfig(**CAUSAL, adapter_len=3, adapter_layers=2, **settings),
}
IN_LAYER = {"target_modules": ["layers.1.mlp.up_proj"], "modules_to_save": ["layers.0"]}
EMBEDDED = {"target_modules": ["embed_tokens"]}
IMPOSSIBLE = [
    (("lora", {}), ("adalora", {}), "already carries an adapter of another method"),
    (("adalora", {}), ("lora", {}), "already carries an adapter of another method"),
    (("lora", {"bias": "all"}), ("lora", {"bias": "all"}), "both would train the same biases"),
    (("lora", {}), ("lora", {"target_modules": ["k_proj"], "modules_to_save": ["q_proj"]}), "already carries"),
    (("lora", {"modules_to_save": ["q_proj"], "target_modules": ["k_proj"]}), ("lora", {}), "already trained whole"),
    *((("lora", EMBEDDED), (kind, {}), "stands in front of it") for kind in IN_FRONT),
    *(((kind, {}), ("lora", EMBEDDED), "already carries an adapter of another method") for kind in IN_FRONT),
    *(((kind, {}), ("lora", {"modules_to_save": ["embed_tokens"]}), "already carries") for kind in IN_FRONT),
    *((("lora", IN_LAYER), (kind, {}), "trains model.layers.0 whole") for kind in ("prefix", "adapter")),
    *(((kind, {}), ("lora", IN_LAYER), "already carries an adapter") for kind in ("prefix", "adapter")),
    (("lora", {"target_modules": ["lm_head"], "modules_to_save": ["model"]}), ("prompt", {}), "trains model whole"),
]


def refused_beside(model, words: str, add) -> None:
    before = snapshot(model)
    with pytest.raises(fastpeft.FastpeftError, match=words):
        quietly(add)
    assert differences(before, snapshot(model)) == [] and list(model.peft_config) == ["a"]


@pytest.mark.parametrize(("first", "second", "words"), IMPOSSIBLE)
def test_what_cannot_be_together(first, second, words, tmp_path):
    model = quietly(fastpeft.patch, tiny(), MAKES[first[0]](**first[1]), adapter_name="a")
    config = MAKES[second[0]](**second[1])
    quietly(fastpeft.save_adapter, quietly(fastpeft.patch, tiny(), config), tmp_path)
    refused_beside(model, words, lambda: model.add_adapter("b", config))
    refused_beside(model, words, lambda: model.load_adapter(tmp_path, "b"))


def test_one_adalora_trains_and_others_may_be_loaded(tmp_path):
    config = MAKES["adalora"](target_modules=["o_proj"])
    quietly(fastpeft.save_adapter, fastpeft.patch(tiny(), config), tmp_path)
    model = fastpeft.patch(tiny(), MAKES["adalora"](), adapter_name="a")
    words = "AdaLoRA trains one adapter of a model"
    refused_beside(model, words, lambda: model.add_adapter("b", config))
    refused_beside(model, words, lambda: model.load_adapter(tmp_path, "b", is_trainable=True))
    model.load_adapter(tmp_path, "b")


@pytest.mark.parametrize(
    ("method", "saved"),
    [
        *itertools.product(("prefix", "adapter"), ("layers.0", "layers.0.self_attn", "model")),
        *itertools.product(IN_FRONT, ("embed_tokens", "model")),
    ],
)
def test_virtual_tokens_are_not_put_into_what_is_trained_whole(method, saved):
    """The copy that is trained knows nothing of them."""
    model = tiny()
    before = snapshot(model)
    with pytest.raises(fastpeft.TargetError, match="modules_to_save has .* carries .*; name other modules"):
        fastpeft.patch(model, MAKES[method](modules_to_save=[saved]))
    assert differences(before, snapshot(model)) == []


def test_prefixes_of_two_windows_are_not_used_at_once():
    model = fastpeft.patch(tiny("mistral"), MAKES["prefix"](), adapter_name="a")
    model.add_adapter("b", MAKES["prefix"](prefix_window="pin"))
    before = snapshot(model)
    words = "set_adapter: the prefixes of one call have one prefix_window, and 'a' has 'slide', 'b' has 'pin'"
    with pytest.raises(fastpeft.PatchError, match=words):
        model.set_adapter(["a", "b"])
    with pytest.raises(fastpeft.PatchError, match="use_adapter: "), fastpeft.use_adapter(model, ["b", "a"]):
        pass
    assert differences(before, snapshot(model)) == [] and model.active_adapters == ["a"]
    for name in "ba":
        model.set_adapter(name)


# What one adapter has added is not another's to adapt.


@pytest.mark.parametrize("targets", ["all-linear", r".*(mlp_head|transform|q_proj).*"])
@pytest.mark.parametrize(("method", "settings"), [("p-tuning", {}), ("prefix", {"prefix_projection": True})])
def test_the_network_of_virtual_tokens_is_no_target(method, settings, targets):
    model = fastpeft.patch(tiny(), MAKES[method](**settings), adapter_name="a")
    model.add_adapter("b", MAKES["lora"](target_modules=targets))
    alone = fastpeft.patch(tiny(), MAKES["lora"](target_modules=targets), adapter_name="b")
    assert fastpeft.adapter_state_dict(model, "b").keys() == fastpeft.adapter_state_dict(alone).keys()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_biases_of_that_network_are_not_those_of_the_model(family, tmp_path):
    task = TASKS.get(family, "CAUSAL_LM")
    lora = fastpeft.LoraConfig(bias="all", task_type=task, fan_in_fan_out=family == "gpt2")
    network = fastpeft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3)
    model = fastpeft.patch(tiny(family, task), network, adapter_name="a")
    model.add_adapter("b", lora)
    alone = fastpeft.patch(tiny(family, task), lora, adapter_name="b")
    assert set(model._fastpeft.in_place) == set(alone._fastpeft.in_place)
    model.set_adapter("b")
    assert not any("prompt_encoder" in name for name, each in model.named_parameters() if each.requires_grad)
    fastpeft.save_adapter(model, tmp_path, adapter_name="b")
    here(tiny(family, task), tmp_path / "b")


# Heads that both train.


def test_the_last_one_s_head_is_used_and_that_is_said():
    model = at_work("bert", "lora", "prefix")
    calls = []
    for name, head in model.classifier.modules_to_save.items():
        head.register_forward_hook(lambda *_, name=name: calls.append(name))
    with pytest.warns(UserWarning, match="classifier is trained whole by b, a; calls use the copy of the last"):
        model.set_adapter(["b", "a"])
    model(**inputs_of("bert"))
    assert calls == ["a"]
    quietly(model.set_adapter, ["a", "b"])
    model(**inputs_of("bert"))
    fastpeft.merge(model, ["a"])
    model(**inputs_of("bert"))
    assert calls == ["a", "b", "b"]
    fastpeft.unmerge(model)
    model.set_adapter("b")
    fastpeft.merge(model, ["a"])
    model(**inputs_of("bert"))
    assert calls[3:] == ["b"]


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"]])
def test_the_task_is_that_of_the_one_that_has_one(names):
    model = fastpeft.patch(plain("bert"), fastpeft.LoraConfig(), adapter_name="a")
    model.add_adapter("b", fastpeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    model.set_adapter(names)
    assert isinstance(model, fastpeft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["SEQ_CLS"])
