"""Prompt tuning and P-tuning beside Hugging Face peft: the start bit for bit, files, loading; outputs, gradients and
tokens as peft's with hf_quirks=True, and without it where peft is right."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests.models import batch, tiny
from tests.peft_pair import (
    WEIGHTS,
    assert_interchangeable,
    assert_same_files,
    assert_same_line,
    assert_same_start,
    assert_same_step,
    by_base_name,
    close,
    pair_of,
    quietly,
    randomise,
    result,
)
from tests.prefix_pair import task_of, with_positions
from tests.prompt_pair import LENGTH, METHODS, padded, prompt_pair, prompted, settings_of
from tests.test_prefix_generation import generate, prompts, unpadded

DECODERS = ("llama", "gpt2", "bloom", "opt", "gemma2", "gemma3")
ENCODERS = ("bert", "roberta")


def start_of(family: str, method: str, **settings):
    """Both models as they begin, ours without quirks: what is stored does not depend on these."""
    task = task_of(family)
    given = settings_of(family, task, method, **settings)
    return pair_of(lambda: tiny(family, task), given, METHODS[method])


VARIANTS = {
    "random": ("prompt", {}),
    "vocabulary": ("prompt", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "one": ("prompt", {"num_virtual_tokens": 1}),
    "long": ("prompt", {"num_virtual_tokens": 21}),
    "mlp": ("mlp", {}),
    "mlp-wide": ("mlp", {"encoder_hidden_size": 48}),
    "lstm": ("lstm", {}),
    "lstm-deep": ("lstm", {"encoder_num_layers": 3, "encoder_dropout": 0.2, "encoder_hidden_size": 8}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5", "bart", "bert"])
def test_the_start_and_the_files_are_as_in_peft(family, variant, tmp_path):
    method, settings = VARIANTS[variant]
    task = task_of(family)
    hf, ours = start_of(family, method, **settings)
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    assert_same_files(hf, ours, tmp_path)
    table = load_file(tmp_path / "ours" / WEIGHTS)["prompt_embeddings"]
    assert table.dtype == torch.float32 and len(table) % ours.peft_config["default"].num_virtual_tokens == 0

    def build():
        return tiny(family, task)

    quirky = quietly(fastpeft.load_adapter, build(), tmp_path / "hf")
    close(result(quirky, batch(task)), result(hf, batch(task)), 1e-5)
    if method == "lstm":  # which torch computes in another way, and rounds otherwise, where no gradient is wanted
        by_peft = quietly(peft.PeftModel.from_pretrained, build(), tmp_path / "ours")
        close(result(by_peft, batch(task)), result(hf, batch(task)), 1e-5)
    else:
        assert_interchangeable(hf, quirky, build, batch(task), tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_start_on_a_half_precision_base(family, dtype):
    for init in ("RANDOM", "SAMPLE_VOCAB"):
        given = settings_of(family, prompt_tuning_init=init)
        hf, ours = pair_of(lambda: tiny(family, task_of(family), dtype), given, "PromptTuningConfig")
        assert_same_start(hf, ours)
        assert ours.prompt_encoder["default"].embedding.weight.dtype == torch.float32


def test_a_model_without_a_task_head_starts_and_is_saved_as_in_peft(tmp_path):
    hf, ours = pair_of(
        lambda: tiny("bert", "SEQ_CLS").base_model, settings_of("bert", "FEATURE_EXTRACTION"), "PromptTuningConfig"
    )
    assert_same_start(hf, ours)
    assert_same_files(hf, ours, tmp_path)
    inputs = batch("SEQ_CLS")
    inputs.pop("labels")
    loaded = quietly(fastpeft.load_adapter, tiny("bert", "SEQ_CLS").base_model, tmp_path / "hf")
    close(loaded(**inputs).last_hidden_state, hf(**inputs).last_hidden_state, 1e-5)


# A text to begin with.

WORDS = ["[UNK]", "classify", "the", "sentiment", "of", "this", "review", "as", "good", "or", "bad"]
TEXT = "classify the sentiment of this review as good or bad"


@pytest.fixture
def tokenizer(tmp_path):
    """The folder of a tokenizer that knows a few words, and puts a token in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: 3 + place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("count", [3, 11, 25])
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5", "bert"])
def test_a_text_begins_as_in_peft(family, count, tokenizer, tmp_path):
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer}
    for more in ({}, {"tokenizer_kwargs": {"use_fast": True, "trust_remote_code": True}}):
        hf, ours = start_of(family, "prompt", num_virtual_tokens=count, **settings, **more)
        assert_same_start(hf, ours)
    rows = ours.prompt_encoder["default"].embedding.weight
    embedding = (ours.get_encoder() if family == "t5" else ours).get_input_embeddings()
    ids = torch.tensor(([3, *range(4, 14)] * 6)[: len(rows)])
    assert torch.equal(rows, embedding(ids))
    hf.peft_config["default"].tokenizer_kwargs = ours.peft_config["default"].tokenizer_kwargs  # peft takes one out
    assert_same_files(hf, ours, tmp_path)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_saved_text_is_not_read_again(trainable, tokenizer, tmp_path):
    """What is loaded comes from the file; the tokenizer may be gone, and nothing looks for it."""
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": tokenizer}
    ours = prompted(**settings)
    fastpeft.save_adapter(ours, tmp_path / "adapter")
    config = (tmp_path / "adapter" / "adapter_config.json").read_text().replace(tokenizer, "nobody/nothing")
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    loaded = fastpeft.load_adapter(tiny(), tmp_path / "adapter", trainable=trainable)
    assert torch.equal(result(loaded.eval(), batch()), result(ours, batch()))


# A step.


STEPS = [
    *((family, "CAUSAL_LM") for family in (*DECODERS, "mistral", "gpt_neox")),
    *((family, "SEQ_2_SEQ_LM") for family in ("t5", "bart")),
    *((family, "SEQ_CLS") for family in (*DECODERS, *ENCODERS)),
    *((family, "QUESTION_ANS") for family in ("llama", "gpt2", "bloom", "opt", *ENCODERS)),
]


@pytest.mark.parametrize("method", ["prompt", "mlp", "lstm"])
@pytest.mark.parametrize(("family", "task"), STEPS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported|Token type ids are not supported")
def test_with_quirks_a_step_is_as_in_peft(family, task, method):
    hf, ours = prompt_pair(family, task, method)
    for side in ("right", "left"):
        assert_same_step(hf, ours, padded(side, family, task))
    inputs = padded("left", family, task)
    if family in ("llama", "gpt2", "bert"):
        assert_same_step(hf, ours, {**inputs, "position_ids": with_positions(inputs)["position_ids"]})
    if family in ("bert", "gpt2"):
        kinds = torch.arange(9).expand(2, -1) % 2
        assert_same_step(hf, ours, {**inputs, "token_type_ids": kinds})
    inputs.pop("attention_mask")
    assert_same_step(hf, ours, inputs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", *ENCODERS])
def test_with_quirks_classes_of_tokens_are_as_in_peft(family):
    """peft has no loss there, and places for virtual tokens."""
    hf, ours = prompt_pair(family, "TOKEN_CLS")
    for side in ("right", "left"):
        inputs = padded(side, family, "TOKEN_CLS")
        labels = inputs.pop("labels")
        found, expected = result(ours, inputs), result(hf, inputs)
        assert found.shape == (2, LENGTH + 9, 3)
        close(found, expected, 1e-5)
        for logits in (found, expected):
            logits.square().mean().backward()
        slopes = [by_base_name(each)["prompt_encoder.default.embedding.weight"].grad for each in (ours, hf)]
        close(*slopes, 1e-4)
        assert ours(**inputs, labels=labels).loss.isfinite()


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "t5"])
def test_with_quirks_embeddings_are_as_in_peft(family):
    task = task_of(family)
    hf, ours = prompt_pair(family, task)
    inputs = padded("left", family, task)
    stack = ours.get_encoder() if family == "t5" else ours
    embeds = stack.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_same_step(hf, ours, {**inputs, "inputs_embeds": embeds})


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_with_quirks_states_and_tuples_are_as_in_peft(family):
    task = task_of(family)
    hf, ours = prompt_pair(family, task)
    inputs = padded("left", family, task)
    name = "encoder_hidden_states" if family == "t5" else "hidden_states"
    outputs = [model(**inputs, output_hidden_states=True) for model in (hf, ours)]
    for one, other in zip(outputs[1][name], outputs[0][name], strict=True):
        close(one, other, 1e-5)
    tuples = [model(**inputs, return_dict=False) for model in (hf, ours)]
    assert [type(each) for each in tuples] == [tuple, tuple] and len(tuples[0]) == len(tuples[1])
    close(tuples[1][1], tuples[0][1], 1e-5)


@pytest.mark.parametrize("family", [*DECODERS, "mistral"])
@pytest.mark.parametrize("method", ["prompt", "lstm"])
def test_without_quirks_it_is_as_in_peft_where_that_is_right(family, method):
    """In a batch that is padded on the right: the loss, the gradients, the logits of tokens."""
    hf, ours = prompt_pair(family, "CAUSAL_LM", method, quirks=False)
    inputs = padded("right", family, "CAUSAL_LM")
    outputs = [model(**inputs) for model in (hf, ours)]
    close(outputs[1].loss, outputs[0].loss, 1e-5)
    mask = inputs["attention_mask"].bool()
    assert outputs[1].logits.shape == (2, 9, 97)
    close(outputs[1].logits[mask], outputs[0].logits[:, LENGTH:][mask], 1e-5)
    for output in outputs:
        output.loss.backward()
    expected = {name: each.grad for name, each in by_base_name(hf).items() if each.grad is not None}
    greatest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        close(by_base_name(ours)[name].grad, grad, 1e-4, floor=1e-7 * greatest)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "prompt"), ("gpt2", "mlp"), ("bert", "prompt"), ("t5", "mlp"), ("bloom", "lstm")]
)
@pytest.mark.parametrize("quirks", [True, False])
def test_twenty_steps_are_as_in_peft(family, method, quirks):
    """In train mode, with the same optimiser. Padding is behind, where peft is right but for where BERT finds a class:
    that is at the first place of a row either way."""
    task = task_of(family)
    models = prompt_pair(family, task, method, quirks=quirks)
    losses = []
    for model in models:
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        losses.append([])
        for _ in range(20):
            loss = model(**padded("right", family, task)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    for found, expected in zip(losses[1], losses[0], strict=True):
        assert abs(found - expected) <= 1e-4 * abs(expected)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_heads_are_saved_as_in_peft(family, task, tmp_path):
    hf, ours = prompt_pair(family, task)
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    assert_same_files(hf, ours, tmp_path)
    inputs = {key: value for key, value in batch(task).items() if "labels" not in key}
    assert_interchangeable(hf, ours, lambda: tiny(family, task), inputs, tmp_path)
    saved = load_file(tmp_path / "ours" / WEIGHTS)
    assert len(saved) > 1 and all(name == "prompt_embeddings" or name.startswith("base_model.") for name in saved)


@pytest.mark.parametrize("method", ["prompt", "mlp"])
@pytest.mark.parametrize("family", [*DECODERS, "mistral", "gpt_neox", "t5", "bart"])
def test_with_quirks_tokens_are_as_in_peft(family, method):
    hf, ours = prompt_pair(family, method=method)
    modes = {"greedy": {}, "beam": {"num_beams": 3, "num_return_sequences": 2}, "sampled": {"do_sample": True}}
    for inputs in (prompts(), unpadded()):
        for name, options in modes.items():
            expected, found = (generate(model, **inputs, **options) for model in (hf, ours))
            assert torch.equal(found, expected), name
    inputs = unpadded()
    del inputs["attention_mask"]
    assert torch.equal(generate(ours, **inputs), generate(hf, **inputs))
    inputs = prompts()
    assert torch.equal(generate(ours, **inputs, use_cache=False), generate(hf, **inputs, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5"])
def test_without_quirks_tokens_of_full_rows_are_as_in_peft(family):
    hf, ours = prompt_pair(family, quirks=False)
    assert torch.equal(generate(ours, **unpadded()), generate(hf, **unpadded()))


def test_the_quirks_are_kept_with_the_adapter(tmp_path):
    """A directory of peft's is as peft computes it; one of ours as it was computed."""
    inputs = padded("left", "llama", "SEQ_CLS")
    for quirks in (True, False):
        hf, ours = prompt_pair("llama", "SEQ_CLS", quirks=quirks)
        fastpeft.save_adapter(ours, tmp_path / str(quirks))
        loaded = quietly(fastpeft.load_adapter, tiny("llama", "SEQ_CLS"), tmp_path / str(quirks))
        assert torch.equal(result(loaded, inputs), result(ours, inputs))
        again = quietly(fastpeft.load_adapter, tiny("llama", "SEQ_CLS"), tmp_path / str(quirks), hf_quirks=not quirks)
        assert not torch.allclose(result(again, inputs), result(ours, inputs))
    quietly(hf.save_pretrained, tmp_path / "hf")
    loaded = quietly(fastpeft.load_adapter, tiny("llama", "SEQ_CLS"), tmp_path / "hf")
    close(result(loaded, inputs), result(hf, inputs), 1e-5)
