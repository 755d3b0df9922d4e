"""What an adapter's file may hold, and that each tensor of it goes where it belongs or is refused."""

import functools

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft.filling import config_of
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, close, quietly, randomise, result
from tests.two_adapters import config

Q = "base_model.model.model.layers.0.self_attn.q_proj"
GPT2 = "base_model.model.transformer"


def edited(directory, **changes) -> None:
    """Put these tensors into the weights' file; None takes one out."""
    tensors = {**load_file(directory / WEIGHTS), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / WEIGHTS, metadata={"format": "pt"})


def refused(model, directory, *words, **options) -> None:
    """Loading raises AdapterFileError with these words, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(fastpeft.AdapterFileError) as caught:
        quietly(fastpeft.load_adapter, model, directory, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("family", "task", "targets", "tied"),
    [
        ("bert", "SEQ_CLS", ["word_embeddings", "query"], False),
        ("gpt2", "CAUSAL_LM", ["wte", "c_attn"], True),
        ("t5", "SEQ_2_SEQ_LM", ["shared", "q"], True),
    ],
)
def test_targeted_embeddings_that_peft_saved_on_request(family, task, targets, tied, tmp_path):
    """And of a tied head, which is no target, the same weight once more."""
    import peft

    base = tiny(family, task)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.5)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type=task))
    randomise(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    saved = load_file(tmp_path / WEIGHTS)
    assert sum(key.endswith(".base_layer.weight") for key in saved) == 1
    assert ("base_model.model.lm_head.weight" in saved) == tied
    model = tiny(family, task)
    before = snapshot(model)
    fastpeft.load_adapter(model, tmp_path)
    close(result(model, batch(task)), result(theirs.eval(), batch(task)), 1e-5)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []
    if tied:
        edited(tmp_path, **{"base_model.model.lm_head.weight": saved["base_model.model.lm_head.weight"] + 1})
        refused(model, tmp_path, "lm_head.weight differs from", "base_layer.weight")
        original = next(key for key in saved if key.endswith(".base_layer.weight"))
        edited(tmp_path, **{original: None})
        refused(model, tmp_path, "does not declare: base_model.model.lm_head.weight")


def test_an_embedding_that_is_no_target_is_not_replaced(tmp_path):
    import peft

    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["model.embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)  # with lm_head.weight, which nothing ties to it
    refused(tiny(), tmp_path, "1 tensors", "declare: base_model.model.lm_head.weight")


FOREIGN = {
    f"{Q}.lora_B.a.bias": (32,),  # another adapter's
    f"{Q}.bias": (32,),  # there is none
    "base_model.model.lm_head.weight": (97, 32),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("patched", [False, True])
def test_what_bias_all_does_not_declare(patched, name, tmp_path):
    fastpeft.save_adapter(fastpeft.patch(tiny(), config(bias="all")), tmp_path)
    edited(tmp_path, **{name: torch.ones(FOREIGN[name])})
    model = tiny()
    if patched:
        fastpeft.patch(model, config(lora_bias=True), adapter_name="a")
    refused(model, tmp_path, "1 tensors", f"declare: {name}")


REPEATED = {
    "another name": ("ln_f.modules_to_save.foo.bias", (32,), "declare"),
    "another copy": ("ln_f.original_module.zzz", (32,), "declare"),
    "another shape": ("ln_f.original_module.bias", (31,), "has shape (31,)"),
    "another value": ("ln_f.modules_to_save.bias", (32,), "differs from"),
    "no bias": ("ln_f.original_module.weight", (32,), "declare"),
    "no trained module": ("h.0.ln_1.original_module.bias", (32,), "declare"),
    "twice": ("h.0.attn.c_attn.bias", (96,), "both for transformer.h.0.attn.c_attn.bias"),
    "twice, of another adapter's": ("h.0.mlp.c_fc.base_layer.bias", (128,), "both for transformer.h.0.mlp"),
}


@pytest.mark.parametrize("case", REPEATED)
def test_biases_that_are_in_the_file_again(case, tmp_path):
    """HF peft repeats the biases of what is trained whole under their names in memory, and nothing else."""
    name, shape, words = REPEATED[case]
    settings = {"r": 2, "target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}
    fastpeft.patch(tiny("gpt2"), fastpeft.LoraConfig(**settings)).save_pretrained(tmp_path)
    assert f"{GPT2}.ln_f.modules_to_save.bias" in load_file(tmp_path / WEIGHTS)
    fastpeft.load_adapter(tiny("gpt2"), tmp_path)
    edited(tmp_path, **{f"{GPT2}.{name}": torch.full(shape, 7.0)})
    refused(tiny("gpt2"), tmp_path, words)


def test_biases_of_an_older_peft(tmp_path):
    """Which took all names with "bias" in them. What is none by the present rule is read, not trained, and put back."""
    settings = {"r": 4, "target_modules": ["q"], "bias": "all", "task_type": "SEQ_2_SEQ_LM"}
    build = functools.partial(tiny, "t5", "SEQ_2_SEQ_LM")
    fastpeft.save_adapter(fastpeft.patch(build(), fastpeft.LoraConfig(**settings)), tmp_path)
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    edited(tmp_path, **{f"base_model.model.{name}": torch.full((32, 4), 0.25)})
    model = build()
    before = snapshot(model)
    fastpeft.load_adapter(model, tmp_path, trainable=True)
    assert (model.get_parameter(name) == 0.25).all() and not model.get_parameter(name).requires_grad
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("first", [{"target_modules": ["c_attn"]}, {"target_modules": ["c_fc"]}])
def test_biases_beside_another_adapter(first, tmp_path):
    """Whose targets stand in the file under other names than where the file's own adapter was alone."""
    model = fastpeft.patch(tiny("gpt2"), fastpeft.LoraConfig(r=2, target_modules=["c_attn"], bias="all"))
    randomise(model)
    expected = result(model, batch())
    model.save_pretrained(tmp_path / "alone")
    plain = tiny("gpt2")
    before = snapshot(plain)
    other = fastpeft.patch(plain, fastpeft.LoraConfig(r=2, **first), adapter_name="first")
    other.load_adapter(tmp_path / "alone", "b")
    other.set_adapter("b")
    assert torch.equal(result(other, batch()), expected)
    fastpeft.save_adapter(other, tmp_path, adapter_name="b")
    assert torch.equal(result(fastpeft.load_adapter(tiny("gpt2"), tmp_path / "b"), batch()), expected)
    other.delete_adapter("b")
    fastpeft.unpatch(other)
    assert differences(before, snapshot(plain)) == []


@pytest.mark.parametrize("where", [f"{Q}.lora_A.weight", "base_model.model.lm_head.weight"])
def test_values_that_the_model_cannot_hold(where, tmp_path):
    fastpeft.save_adapter(fastpeft.patch(tiny(), config(modules_to_save=["lm_head"])), tmp_path)
    tensor = load_file(tmp_path / WEIGHTS)[where]
    edited(tmp_path, **{where: torch.full_like(tensor, -1e30)})
    model = tiny(dtype=torch.float16)
    words = (where, "1e+30", "float16", "wider")
    refused(model, tmp_path, *words, autocast_adapter_dtype=False)
    if "lora" in where:
        fastpeft.load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("side", "error", "words"),
    [
        (
            {"hf_quirks": "yes"},
            fastpeft.AdapterFileError,
            "fastpeft.json has hf_quirks='yes'; it must be true or false",
        ),
        ({"hf_quirks": None}, fastpeft.AdapterFileError, "hf_quirks=None"),
        (
            {"options": ["evil"]},
            fastpeft.ConfigError,
            r"the options of fastpeft.json must be an object, not \['evil'\]",
        ),
        ({"options": "evil"}, fastpeft.ConfigError, "must be an object, not 'evil'"),
        ({"options": {"r": 8}}, fastpeft.ConfigError, "r=8: LoraConfig keeps no such option"),
    ],
)
def test_what_a_side_file_cannot_say(side, error, words):
    with pytest.raises(error, match=words):
        config_of({"peft_type": "LORA"}, side)
    assert config_of({"peft_type": "LORA"}, {"hf_quirks": True, "options": {}}) == fastpeft.LoraConfig()
