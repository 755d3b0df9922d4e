"""`patch` and `unpatch`: the model stays itself, is put back bit for bit whatever happened in between and whenever
patching fails, and can be copied, pickled and compiled."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import adapters, patching
from fastpeft.tuners import layer as layer_module
from fastpeft.tuners import lora, lora_injection, saved_modules
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import close, quietly, randomise, result

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def config(family="llama", **settings) -> fastpeft.LoraConfig:
    return fastpeft.LoraConfig(**{"r": 4, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **settings})


def patched(model=None, **settings):
    torch.manual_seed(11)
    model = quietly(fastpeft.patch, tiny() if model is None else model, config(**settings))
    randomise(model)
    return model


def train(model) -> None:
    """Two steps of everything that wants a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()


def test_the_model_is_the_same_object_of_its_own_class():
    from transformers import LlamaForCausalLM

    model = tiny()
    layer = model.model.layers[0].self_attn.q_proj
    names = [name for name, _ in model.named_parameters()]
    assert fastpeft.patch(model, config()) is model
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__ == LlamaForCausalLM.__module__ and type(model) is not LlamaForCausalLM
    assert model.model.layers[0].self_attn.q_proj is layer and isinstance(layer, nn.Linear)
    assert [name for name, _ in model.named_parameters() if "lora_" not in name] == names
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, _ in model.named_parameters() if "lora_" in name
    ]
    assert fastpeft.unpatch(model) is model and type(model) is LlamaForCausalLM


def test_a_new_adapter_changes_no_output():
    expected = result(tiny(), batch())
    assert torch.equal(result(fastpeft.patch(tiny(), config()), batch()), expected)


def test_a_configuration_of_peft_or_from_its_file_means_the_same_and_stays_as_it_is(tmp_path):
    import peft

    settings = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "use_rslora": True,
    }
    ours, theirs = fastpeft.LoraConfig(**settings), peft.LoraConfig(**settings)
    expected = result(patched(**settings), batch())
    for given in (ours, theirs, theirs.to_dict(), {"peft_type": "LORA", **settings}):
        before = copy.deepcopy(given if isinstance(given, dict) else vars(given))
        torch.manual_seed(11)
        model = fastpeft.patch(tiny(), given)
        randomise(model)
        assert torch.equal(result(model, batch()), expected)
        assert isinstance(model.peft_config["default"], fastpeft.LoraConfig)
        assert (given if isinstance(given, dict) else vars(given)) == before


def freeze_some(model) -> None:
    model.train()
    model.model.layers[1].eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" in name)
    model.lm_head.register_forward_hook(lambda *args: None)
    model.note = ["of the user"]


LIVES = {
    "nothing": ({}, lambda model: None),
    "training": ({}, train),
    "dora": ({"use_dora": True, "lora_dropout": 0.1}, train),
    "biases": ({"bias": "all"}, train),
    "heads": ({"modules_to_save": ["lm_head", "input_layernorm"]}, train),
    "pissa": ({"init_lora_weights": "pissa"}, train),
    "olora": ({"init_lora_weights": "olora"}, train),
    "embeddings": ({"target_modules": ["embed_tokens", "lm_head"]}, train),
    "merged": ({"bias": "all"}, lambda model: (train(model), fastpeft.merge(model))),
    "merged-pissa": ({"init_lora_weights": "pissa"}, fastpeft.merge),
    "unmerged": ({}, lambda model: (fastpeft.merge(model), fastpeft.unmerge(model))),
    "generated": ({}, lambda model: model.generate(batch()["input_ids"], max_new_tokens=3, do_sample=False)),
    "two": (
        {},
        lambda model: (model.add_adapter("b", config(r=2, use_dora=True)), model.set_adapter(["b", "default"])),
    ),
    "two-decomposed": (
        {"init_lora_weights": "pissa"},
        lambda model: model.add_adapter("b", config(init_lora_weights="olora", target_modules=["q_proj", "k_proj"])),
    ),
    "deleted": (
        {"init_lora_weights": "pissa", "bias": "all"},
        lambda model: (train(model), model.delete_adapter("default")),
    ),
    "eval": ({}, lambda model: model.eval()),
}


@pytest.mark.parametrize(
    ("family", "life"),
    [
        *(("llama", life) for life in LIVES),
        *(("llama-tied", life) for life in LIVES if life != "embeddings"),  # whose tied weights no decomposition takes
        *(
            ("gpt2", life)
            for life in ("training", "dora", "biases", "pissa", "olora", "merged", "merged-pissa", "deleted")
        ),
    ],
)
def test_unpatching_restores_everything(family, life):
    settings, live = LIVES[life]
    model = tiny(family)
    if family == "gpt2":
        settings = {**settings, "target_modules": TARGETS["gpt2"]}
    else:
        freeze_some(model)
    before = snapshot(model)
    patched(model, **settings)
    quietly(live, model)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


def test_the_comparison_sees_each_kind_of_change():
    model = tiny()
    before = snapshot(model)
    q_proj, k_proj = (getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
    with torch.no_grad():
        k_proj.weight[0, 0] = torch.nextafter(k_proj.weight[0, 0], torch.tensor(9.0))
        model.model.norm.weight.requires_grad_(False)
        model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.clone())
    q_proj.eval().train()
    model.lm_head.register_forward_hook(lambda *args: None)
    model.model.layers[1].mlp.__class__ = type("Other", (type(model.model.layers[1].mlp),), {})
    found = "\n".join(differences(before, snapshot(model)))
    for part in ("k_proj.weight: its values", "norm.weight: its requires_grad", "embed_tokens.weight: its object"):
        assert part in found
    for part in ("q_proj': its attributes", "lm_head': its attributes", "layers.1.mlp': its class"):
        assert part in found
    assert len(found.splitlines()) == 7  # the embedding is at another place too


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_unpatching_restores_what_checkpointing_had(kwargs):
    model = tiny()
    model.gradient_checkpointing_enable(kwargs)
    before = snapshot(model)
    patched(model)
    train(model)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []
    hooks = []
    for wrapped in (True, False):  # transformers leaves a hook of its own behind
        model = tiny()
        if wrapped:
            patched(model)
        model.gradient_checkpointing_enable(kwargs)
        model.gradient_checkpointing_disable()
        if wrapped:
            fastpeft.unpatch(model)
        hooks.append({name: len(module._forward_hooks) for name, module in model.named_modules()})
    assert hooks[0] == hooks[1]


def test_patching_again_is_patching_for_the_first_time():
    model = tiny()
    states = []
    for _ in range(2):
        patched(model, init_lora_weights="pissa")
        train(model)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        fastpeft.unpatch(model)
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


class Interrupted(BaseException):
    """As a KeyboardInterrupt is: not an Exception."""


STEPS = [
    (patching, "enable_input_grads"),
    (patching, "_set_trainable"),
    (patching, "_biases"),
    (patching, "check_names"),
    (lora_injection, "attach"),
    (lora_injection, "settle_fan_in_fan_out"),
    (layer_module, "patched_class"),
    (lora.LoraLinear, "build"),
    (lora.LoraLayer, "_decompose"),
    (lora.LoraLayer, "_add_magnitude"),
    (lora, "_widen"),
    (saved_modules.SavedModule, "add_adapter"),
    (nn.Module, "add_module"),
    (nn.Module, "requires_grad_"),
    (adapters, "fill"),
]


def failing(monkeypatch, owner, name: str, at: int) -> list:
    """The function fails at its call number `at`, after it has done its work; the list of its calls."""
    original, calls = getattr(owner, name), []

    def fail(*args, **kwargs):
        calls.append(name)
        outcome = original(*args, **kwargs)
        if len(calls) == at:
            raise Interrupted(name)
        return outcome

    monkeypatch.setattr(owner, name, fail)
    return calls


FULL = {
    "use_dora": True,
    "init_lora_weights": "pissa",
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "task_type": "CAUSAL_LM",
}


WAYS = ("patch", "load", "add", "load another")
UNUSED = {  # what a way does not do
    "patch": ("fill",),
    "load": (),
    "add": ("fill", "enable_input_grads", "check_names"),
    "load another": ("enable_input_grads", "check_names"),
}


def attempt(way: str, model, directory) -> None:
    if way == "patch":
        fastpeft.patch(model, config(**FULL))
    elif way == "add":
        model.add_adapter("b", config(**FULL))
    else:
        fastpeft.load_adapter(model, directory, adapter_name="b")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("way", "step"),
    [(way, step) for way in WAYS for step in STEPS if step[1] not in UNUSED[way]],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_failure_leaves_the_model_as_it_was(way, step, tmp_path, monkeypatch):
    patched(**FULL).save_pretrained(tmp_path)
    model = tiny().half()
    freeze_some(model)
    model.gradient_checkpointing_enable()
    if way in ("add", "load another"):
        settings = {**FULL, "bias": "none", "modules_to_save": ["norm"], "target_modules": ["q_proj", "k_proj"]}
        patched(model, **settings)
    before = snapshot(model)
    for at in (1, 2, 5):
        with monkeypatch.context() as patches:
            calls = failing(patches, *step, at)
            try:
                attempt(way, model, tmp_path)
            except Interrupted:
                reached = at
            else:
                assert len(calls) < at
                break
        assert differences(before, snapshot(model)) == []
    else:
        attempt(way, model, tmp_path)  # nothing is left that a second try would meet
    assert reached >= 1


def test_what_is_patched_is_not_patched_again():
    import peft

    model = patched()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match="already patched and has 'default'.*add_adapter"):
        fastpeft.patch(model, config())
    for inner in (model.model, model.model.layers[0].self_attn.q_proj, nn.Sequential(model)):
        before = snapshot(model)
        with pytest.raises(fastpeft.PatchError, match="patched as part of another model"):
            fastpeft.patch(inner, config())
        assert differences(before, snapshot(model)) == []
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (theirs, theirs.base_model, theirs.base_model.model):
        before = snapshot(model)
        with pytest.raises(fastpeft.PatchError, match="peft"):
            fastpeft.patch(model, config())
        assert differences(before, snapshot(model)) == []
    with pytest.raises(fastpeft.PatchError, match="is not patched"):
        fastpeft.unpatch(tiny())


@pytest.mark.parametrize("settings", [{}, FULL], ids=["plain", "full"])
def test_a_copy_lives_on_its_own(settings):
    model = patched(**settings)
    expected = result(model, batch()).detach()
    other = copy.deepcopy(model)
    assert torch.equal(result(other, batch()), expected)
    before = snapshot(model)
    train(other)
    other.add_adapter("b", config(r=2))
    other.set_adapter("b")
    with fastpeft.disable_adapter(other):
        assert torch.equal(result(model, batch()), expected)
    fastpeft.unpatch(other)
    assert differences(before, snapshot(model)) == []
    assert torch.equal(result(model, batch()), expected)
    assert torch.equal(result(other, batch()), result(tiny(), batch()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_copy_checkpoints_with_its_own_choice_of_adapters():
    model = patched()
    model.add_adapter("b", config())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    other = copy.deepcopy(model)
    other.set_adapter("b")
    train(other)
    found = {name for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert found and all(".b." in name for name in found)


LOADER = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
output = model(**torch.load(sys.argv[2])).logits
model.set_adapter("b")
other = model(**torch.load(sys.argv[2])).logits
import fastpeft
plain = fastpeft.unpatch(model)(**torch.load(sys.argv[2])).logits
torch.save([output, other, plain, type(model).__name__], sys.argv[3])
"""


def test_a_pickled_model_is_read_in_another_process(tmp_path):
    model = patched(**FULL)
    model.add_adapter("b", config(r=2, init_lora_weights=False))
    torch.save(model, tmp_path / "model.pt")
    torch.save(batch(), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("model.pt", "batch.pt", "out.pt")]
    done = subprocess.run([sys.executable, "-c", LOADER, *paths], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    output, other, plain, name = torch.load(tmp_path / "out.pt")
    assert torch.equal(output, result(model, batch())) and name == "LlamaForCausalLM"
    model.set_adapter("b")
    assert torch.equal(other, result(model, batch()))
    assert torch.equal(plain, result(tiny(), batch()))


def test_the_state_dict_goes_round():
    model = patched(**FULL)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(1)
    other = fastpeft.patch(tiny(), config(**FULL))
    assert not torch.equal(result(other, batch()), result(model, batch()))
    assert other.load_state_dict(torch.load(buffer), strict=True)
    assert torch.equal(result(other, batch()), result(model, batch()))


def test_moving_and_casting_the_model_takes_the_adapters_along():
    model = patched(**{**FULL, "init_lora_weights": True}).double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    close(result(model, batch()).float(), result(patched(**{**FULL, "init_lora_weights": True}), batch()), 1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["lora", "dora", "head"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_model_has_no_graph_breaks_and_the_same_gradients(family, settings):
    model = patched(tiny(family), **{"target_modules": TARGETS[family], **settings})
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": batch()["input_ids"]}  # GPT-2's loss function logs, which is a break of its own
    outputs = [each(**inputs).logits for each in (model, compiled)]
    close(outputs[1], outputs[0], 1e-5)
    for output in outputs:
        output.square().mean().backward()
    found = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(found[name].grad, parameter.grad, 1e-4)
    torch._dynamo.reset()
