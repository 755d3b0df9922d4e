"""What a prompt cannot be, or stand in front of, is refused before anything changes, in words that name the value, the
place and the way out; what a file says is checked; and a wrong call raises as the base model does, or says more."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft.journal import ENCODER, SIDE
from tests.models import VOCABULARY, batch, tiny
from tests.peft_pair import WEIGHTS, quietly, result
from tests.prefix_pair import task_of
from tests.prompt_pair import LENGTH, METHODS, padded, prompted, settings_of
from tests.test_bad_input_prompts import CONFIG, PATCH, TARGET, refused
from tests.test_hf_parity_prompt import TEXT, WORDS, tokenizer  # noqa: F401, a fixture

FILE = fastpeft.AdapterFileError

WRONG = [
    ("llama", {"num_virtual_tokens": 0}, CONFIG, ("num_virtual_tokens=0", "at least 1")),
    ("llama", {"num_virtual_tokens": "5"}, CONFIG, ("num_virtual_tokens='5'",)),
    ("llama", {"num_virtual_tokens": 10**12}, CONFIG, ("num_virtual_tokens=1000000000000", "at most")),
    ("llama", {"prompt_tuning_init": "ZEROS"}, CONFIG, ("prompt_tuning_init='ZEROS'", "SAMPLE_VOCAB")),
    ("llama", {"prompt_tuning_init": "TEXT"}, CONFIG, ("prompt_tuning_init_text=None", "needs it")),
    ("llama", {"virtual_logits": 1}, CONFIG, ("virtual_logits=1",)),
    # no place for a token
    ("gpt2", {"num_virtual_tokens": 64}, CONFIG, ("num_virtual_tokens=64", "a table of 64 positions")),
    ("opt", {"num_virtual_tokens": 64}, CONFIG, ("num_virtual_tokens=64", "a table of 64 positions")),
    ("bert", {"num_virtual_tokens": 100}, CONFIG, ("num_virtual_tokens=100", "a table of 64 positions")),
    ("roberta", {"num_virtual_tokens": 63}, CONFIG, ("num_virtual_tokens=63", "a table of 63 positions")),
    ("bart", {"num_virtual_tokens": 64}, CONFIG, ("num_virtual_tokens=64", "a table of 64 positions")),
    # of another model
    ("llama", {"num_layers": 32}, CONFIG, ("num_layers=32", "this llama has 2")),
    ("llama", {"token_dim": 4096}, CONFIG, ("token_dim=4096", "this llama has 32")),
    ("gpt2", {"num_attention_heads": 3}, CONFIG, ("num_attention_heads=3", "this gpt2 has 4")),
    ("llama", {"num_transformer_submodules": 2}, CONFIG, ("num_transformer_submodules=2", "one stack")),
    # of another task
    ("llama", {"task_type": "SEQ_2_SEQ_LM"}, CONFIG, ("task_type='SEQ_2_SEQ_LM'", "CAUSAL_LM")),
    ("t5", {"task_type": "CAUSAL_LM"}, CONFIG, ("task_type='CAUSAL_LM'", "SEQ_2_SEQ_LM")),
    ("llama", {"task_type": None}, CONFIG, ("task_type=None", "CAUSAL_LM")),
    # trained whole what it stands in front of
    ("llama", {"modules_to_save": ["lm_hed"]}, TARGET, ("lm_hed", "lm_head")),
    ("llama", {"modules_to_save": ["embed_tokens"]}, TARGET, ("model.embed_tokens", "name other modules")),
    ("bert", {"modules_to_save": ["embeddings"]}, TARGET, ("modules_to_save has bert.embeddings", "word_embeddings")),
    ("t5", {"modules_to_save": ["encoder"]}, TARGET, ("modules_to_save has encoder", "encoder.embed_tokens")),
]


@pytest.mark.parametrize("form", ["config", "dict", "another adapter"])
@pytest.mark.parametrize(("family", "settings", "error", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_prompt_that_does_not_fit(family, settings, error, words, form):
    settings = {**settings_of(family), **settings}
    model = prompted(family) if form == "another adapter" else tiny(family, task_of(family)).train()
    if form == "dict":
        call = lambda: fastpeft.patch(model, {"peft_type": "PROMPT_TUNING", **settings})  # noqa: E731
    elif form == "config":
        call = lambda: fastpeft.patch(model, fastpeft.PromptTuningConfig(**settings))  # noqa: E731
    else:
        call = lambda: model.add_adapter("b", fastpeft.PromptTuningConfig(**settings))  # noqa: E731
    refused(call, model, error, *words)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "task", "words"),
    [
        ("vit", "SEQ_CLS", ("ViTForImageClassification", "not through an embedding of tokens", "LoRA")),
        ("whisper", "SEQ_2_SEQ_LM", ("WhisperForConditionalGeneration", "through a Conv1d")),
    ],
)
def test_a_model_that_reads_no_text(family, task, words, method):
    model = tiny(family, task)
    config = getattr(fastpeft, METHODS[method])(**settings_of(family, task, method))
    refused(lambda: fastpeft.patch(model, config), model, TARGET, *words)


def test_a_module_that_is_no_model_of_transformers():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3))
    config = fastpeft.PromptTuningConfig(**settings_of("llama", "SEQ_CLS"))
    refused(lambda: fastpeft.patch(model, config), model, TARGET, "Sequential is not a transformers model")


# Texts.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenizer_name_or_path": "/no/such/folder"}, ("'/no/such/folder': no tokenizer there", "folder")),
        ({"tokenizer_kwargs": {"revision": 3, "subfolder": 5}}, ("no tokenizer there that can be used",)),
        ({"prompt_tuning_init_text": ""}, ("prompt_tuning_init_text=''",)),
        ({"prompt_tuning_init_text": 7}, ("prompt_tuning_init_text=7",)),
        ({"tokenizer_kwargs": "fast"}, ("tokenizer_kwargs='fast'",)),
        ({"prompt_tuning_init": "RANDOM", "tokenizer_kwargs": {"a": 1}}, ("tokenizer_kwargs", "TEXT")),
    ],
)
def test_a_text_that_cannot_be_read(settings, words, tokenizer):  # noqa: F811
    model = tiny()
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer}
    call = lambda: fastpeft.patch(model, fastpeft.PromptTuningConfig(**settings_of("llama", **{**given, **settings})))  # noqa: E731
    refused(call, model, CONFIG, *words)


def test_a_damaged_tokenizer(tokenizer):  # noqa: F811
    for content in ("{}", "[", '{"model": 3}'):
        with open(f"{tokenizer}/tokenizer.json", "w") as file:
            file.write(content)
        model = prompted()
        given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer}
        config = fastpeft.PromptTuningConfig(**settings_of("llama", **given))
        refused(lambda: model.add_adapter("b", config), model, CONFIG, "tokenizer_name_or_path=")  # noqa: B023


def test_a_tokenizer_of_another_vocabulary(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for first, text, words in ((90, "bad", "its token 100 is none of the model's 97"), (3, " ", "has no tokens")):
        made = Tokenizer(models.WordLevel({word: first + place for place, word in enumerate(WORDS)}))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / str(first))
        model = tiny().train()
        given = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": str(tmp_path / str(first))}
        config = fastpeft.PromptTuningConfig(**settings_of("llama", prompt_tuning_init_text=text, **given))
        refused(lambda: fastpeft.patch(model, config), model, CONFIG, words)  # noqa: B023


# Other adapters.


def test_an_embedding_that_carries_another_adapter():
    prompt = fastpeft.PromptTuningConfig(**settings_of("llama"))
    lora = fastpeft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    for first, second, words in (
        (lora, prompt, ("model.embed_tokens carries another adapter", "leave it out there")),
        (prompt, lora, ("model.embed_tokens already carries an adapter", "exclude_modules")),
        (fastpeft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), prompt, ("embed",)),
        (prompt, fastpeft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), ("embed",)),
        (prompt, fastpeft.AdaLoraConfig(total_step=9, target_modules=["q_proj", "embed_tokens"]), ("embed",)),
    ):
        model = fastpeft.patch(tiny(), first)
        refused(lambda: model.add_adapter("b", second), model, TARGET, *words)  # noqa: B023


@pytest.mark.parametrize("call", [fastpeft.merge, fastpeft.merge_and_unload])
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_cannot_be_merged(method, call):
    model = prompted(method=method)
    refused(lambda: call(model), model, PATCH, "'default' is a prompt, which no weight can hold")


def test_a_vocabulary_cannot_grow_under_a_prompt():
    model = prompted()
    refused(lambda: model.resize_token_embeddings(VOCABULARY + 3), model, PATCH, "made for 97 tokens", "unpatch")
    model.resize_token_embeddings(VOCABULARY)
    with fastpeft.disable_adapter(model):
        result(model, batch())


# Calls.


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_mask_that_cannot_be_made_longer(family, quirks):
    task = task_of(family)
    model, inputs = prompted(family, task, hf_quirks=quirks), batch(task)
    expected = result(model, inputs)
    for mask in (torch.ones(2, 1, 9, 9), torch.zeros(2, 1, 9, 9).bool(), {"full_attention": None}):
        with pytest.raises(PATCH, match=r"attention_mask: .* only a mask \(batch, tokens\) can be made longer"):
            model(**{**inputs, "attention_mask": mask})
    if not quirks:
        for shape in ((2, 9 + LENGTH), (2, 8), (1, 9), (3, 9)):
            with pytest.raises(PATCH, match=r"attention_mask: shape .* beside tokens of shape \(2, 9\)"):
                model(**{**inputs, "attention_mask": torch.ones(shape, dtype=torch.int64)})
    assert torch.equal(result(model, inputs), expected)


@pytest.mark.parametrize("mask", [True, False])
def test_values_that_are_not_one_for_each_token(mask):
    inputs = batch("TOKEN_CLS") if mask else {k: v for k, v in batch("TOKEN_CLS").items() if k != "attention_mask"}
    model = prompted("bert", "TOKEN_CLS")
    for name, value in {
        "position_ids": torch.arange(8).expand(3, 2, -1),
        "token_type_ids": torch.zeros(2, 9, 3, dtype=torch.int64),
        "labels": torch.zeros(2, 12, dtype=torch.int64),
    }.items():
        with pytest.raises(PATCH, match=rf"{name}: shape .* each of the 9 tokens"):
            model(**{**inputs, name: value})


@pytest.mark.parametrize("name", ["perm_mask", "target_mapping", "global_attention_mask", "langs", "bbox"])
def test_other_arguments_with_places_for_tokens(name):
    with pytest.raises(PATCH, match=f"{name}: it has places for the tokens alone"):
        prompted("bert", "TOKEN_CLS")(**batch("TOKEN_CLS"), **{name: torch.ones(2, 9)})


@pytest.mark.parametrize("quirks", [False, True])
def test_what_the_base_model_refuses_is_left_to_it(quirks):
    model = prompted(hf_quirks=quirks)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(2, 9))
    ids = batch()["input_ids"]
    with pytest.raises(IndexError):
        model(input_ids=ids.clone().fill_(VOCABULARY))
    if not quirks:
        embeds = model.get_input_embeddings()(ids)
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(input_ids=ids, inputs_embeds=embeds)


def test_a_wrong_id_is_no_virtual_token():
    """Also where an embedding is asked for more than the ids that it was given (rows of several sequences)."""
    model, ids = prompted(), batch()["input_ids"].clone()
    ids[0, 3] = VOCABULARY + 1
    with pytest.raises(IndexError):
        model(input_ids=ids, position_ids=torch.arange(9).expand(2, -1) % 5)


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert", "opt", "bart", "roberta"])
def test_more_tokens_than_positions(family, quirks):
    task = task_of(family)
    model = prompted(family, task, hf_quirks=quirks)
    for length, fits in ((57, True), (58, True), (60, False), (64, False)):
        inputs = batch(task, length=length)
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        inputs["input_ids"] = inputs["input_ids"].clamp(min=3)
        if fits:
            model(**inputs)
            continue
        words = f"{LENGTH} virtual tokens and {length} tokens are {LENGTH + length}, .* a table of 6[34] positions"
        with pytest.raises(PATCH, match=words):
            model(**inputs)
    if family in ("gpt2", "bart"):
        with pytest.raises(PATCH, match="a table of 64 positions"):
            quietly(model.generate, batch(length=62)["input_ids"].clamp(min=3), max_new_tokens=1)


def test_another_error_is_not_explained_away():
    model = prompted("gpt2")
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 5), VOCABULARY - 1), position_ids=torch.arange(80, 85)[None])
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 5), VOCABULARY))


# Files.


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_files_of_another_model(family, tmp_path):
    fastpeft.save_adapter(prompted(), tmp_path)
    base = tiny(family, task_of(family))
    base.config.num_hidden_layers = 3
    refused(lambda: fastpeft.load_adapter(base, tmp_path), base, fastpeft.FastpeftError)


def edited(directory, **changes) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"token_dim": 64}, CONFIG, ("token_dim=64", "this llama has 32")),
        ({"num_layers": 5}, CONFIG, ("num_layers=5", "this llama has 2")),
        ({"num_virtual_tokens": 6}, FILE, ("prompt_embeddings", "(5, 32)", "(6, 32)")),
        ({"num_virtual_tokens": 2**40}, CONFIG, ("num_virtual_tokens=1099511627776",)),
        ({"num_transformer_submodules": 2}, CONFIG, ("num_transformer_submodules=2",)),
        ({"peft_type": "PREFIX_TUNING"}, fastpeft.FastpeftError, ()),
        ({"virtual_logits": True, "no_such_field": 3}, CONFIG, ("no_such_field",)),
        ({"prompt_tuning_init": "EVIL"}, CONFIG, ("prompt_tuning_init='EVIL'",)),
        ({"task_type": "SEQ_CLS"}, FILE, ()),
    ],
)
def test_a_configuration_that_was_changed(changes, error, words, tmp_path):
    fastpeft.save_adapter(prompted(), tmp_path)
    edited(tmp_path, **changes)
    task = "SEQ_CLS" if changes.get("task_type") == "SEQ_CLS" else "CAUSAL_LM"
    for model in (tiny(task=task), prompted(task=task)):
        refused(lambda: fastpeft.load_adapter(model, tmp_path, adapter_name="b"), model, error, *words)  # noqa: B023


@pytest.mark.parametrize("damage", ["no table", "two tables", "integers", "shape"])
def test_tensors_that_do_not_fit(damage, tmp_path):
    fastpeft.save_adapter(prompted(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    table = tensors.pop("prompt_embeddings")
    changed = {
        "no table": {"other": table},
        "two tables": {"prompt_embeddings": table, "other": table.clone()},
        "integers": {"prompt_embeddings": table.long()},
        "shape": {"prompt_embeddings": table[:, :16].contiguous()},
    }[damage]
    save_file(changed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = tiny()
    refused(lambda: fastpeft.load_adapter(model, tmp_path), model, FILE)


@pytest.mark.parametrize("damage", ["shape", "another", "not finite", "missing"])
def test_a_network_that_does_not_fit(damage, tmp_path):
    """The table is there, and can be used; to train on from the network is refused."""
    model = prompted(method="mlp")
    fastpeft.save_adapter(model, tmp_path)
    expected = result(model, batch())
    tensors = load_file(tmp_path / ENCODER)
    name = "mlp_head.2.weight"
    if damage == "shape":
        tensors[name] = tensors[name][:, :16].contiguous()
    elif damage == "another":
        tensors[name] = tensors[name] * 1.5
    elif damage == "not finite":
        tensors[name][0, 0] = float("nan")
    else:
        del tensors[name]
    save_file(tensors, tmp_path / ENCODER, metadata={"format": "pt"})
    base = tiny()
    refused(lambda: fastpeft.load_adapter(base, tmp_path, trainable=True), base, FILE, str(tmp_path))
    try:
        loaded = fastpeft.load_adapter(tiny(), tmp_path)
    except FILE:  # the directory's own record of its files may say that this is not what was saved
        return
    torch.testing.assert_close(result(loaded, batch()), expected)


def test_a_table_has_no_network(tmp_path):
    fastpeft.save_adapter(prompted(method="mlp"), tmp_path / "a")
    fastpeft.save_adapter(prompted(), tmp_path / "b")
    for name in (ENCODER, SIDE, WEIGHTS):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    model = tiny()
    words = ("PROMPT_TUNING of this configuration has no network", "delete it")
    refused(lambda: fastpeft.load_adapter(model, tmp_path / "b"), model, FILE, *words)


def test_a_padded_row_of_nothing_is_served():
    """A row that is padding throughout: nothing raises, and the others are as they were."""
    model, inputs = prompted(), padded("left", "llama", "CAUSAL_LM")
    inputs.pop("labels")
    expected = model(**inputs).logits[0]
    inputs["attention_mask"] = inputs["attention_mask"] * torch.tensor([[1], [0]])
    torch.testing.assert_close(model(**inputs).logits[0], expected)
