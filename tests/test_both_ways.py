"""Directories that go both ways: what HF peft wrote loads here, what fastpeft wrote loads there, with the same logits,
and what was loaded is written again byte for byte."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests import adalora_pair
from tests.matrix import METHODS, TASKS, Cell, attempt, close, made, offers, ours, peft_s, read
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import WEIGHTS, by_base_name, pair_of, quietly, randomise, result

FAMILIES = ("llama", "gpt2", "bert", "t5", "bart")
VIRTUAL = ("prefix", "prompt", "p-tuning")


def unlabelled(inputs: dict) -> dict:
    """HF peft computes the logits of some cells without labels only."""
    kept = {key: value for key, value in inputs.items() if key not in ("labels", "start_positions", "end_positions")}
    labels = inputs.get("labels")
    decodes = labels is not None and labels.ndim == 2 and labels.shape != inputs["input_ids"].shape
    return {**kept, "decoder_input_ids": labels} if decodes else kept


def peft_computes(cell: Cell) -> bool:
    """Gated prompts are for a few decoders, and break on the heads of two tasks; no virtual tokens reach the decoder of
    a model that makes a class or an answer with it."""
    if cell.method == "adapter":
        return cell.family in ("llama", "gpt2") and cell.task in ("CAUSAL_LM", "SEQ_CLS")
    if cell.family not in ("t5", "bart") or cell.task == "SEQ_2_SEQ_LM" or cell.method not in VIRTUAL:
        return True
    return cell.task == "TOKEN_CLS" and cell.method != "prefix"


PAIRS = [pair for pair in itertools.product(FAMILIES, TASKS) if offers(*pair)]
CELLS = [Cell(*pair, method) for pair in PAIRS for method in METHODS]


def there(build: Callable, directory: Path, **options) -> torch.nn.Module:
    import peft

    return quietly(peft.PeftModel.from_pretrained, build(), directory, **options).eval()


def here(build: Callable, directory: Path, **options) -> torch.nn.Module:
    return quietly(fastpeft.load_adapter, build(), directory, **options)


def same_bytes(*directories: Path) -> None:
    contents = [(directory / WEIGHTS).read_bytes() for directory in directories]
    assert all(each == contents[0] for each in contents)


def assert_both_ways(hf, mine, build: Callable, inputs: dict, folder: Path, *, exact: bool = True) -> None:
    """Each library's directory, which may hold another's weights, in the other library; and written again by it.
    `exact`: what is loaded is in memory as it was before."""
    inputs = unlabelled(inputs)
    for name, model in (("hf", hf), ("ours", mine)):
        quietly(model.save_pretrained, folder / name)
    loaded = here(build, folder / "hf")
    assert loaded._fastpeft.quirky == {"default"}
    close(read(loaded, inputs), read(hf, inputs))
    loaded.save_pretrained(folder / "hf by us")
    theirs = there(build, folder / "ours")
    close(read(theirs, inputs), read(mine, inputs))
    quietly(theirs.save_pretrained, folder / "ours by hf")
    close(read(here(build, folder / "ours"), inputs), read(mine, inputs), 0 if exact and not projects(mine) else 1e-5)
    close(read(here(build, folder / "ours by hf"), inputs), read(mine, inputs))
    same_bytes(folder / "hf", folder / "hf by us")
    same_bytes(folder / "ours", folder / "ours by hf")


def projects(model) -> bool:
    """Whether the table is computed, in pieces while it is a network's and in one when it is saved."""
    return any(".transform." in name or "_head." in name for name, _ in model.named_parameters())


class WithoutHead(Cell):
    """Of gated prompts: peft has no heads beside them, which is [] for us."""

    def config(self, library):
        config = super().config(library)
        if self.method == "adapter" and library is fastpeft:
            config.modules_to_save = []
        return config


@pytest.mark.parametrize("cell", [cell for cell in CELLS if peft_computes(cell)], ids=str)
def test_every_task(cell, tmp_path):
    cell = WithoutHead(cell.family, cell.task, cell.method)
    models = [quietly(made, library, cell) for library in (peft_s(), ours(hf_quirks=True))]
    assert_both_ways(*models, cell.base, cell.inputs(), tmp_path)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not peft_computes(cell)], ids=str)
def test_what_peft_cannot_compute(cell):
    assert attempt(lambda: made(peft_s(), cell)(**unlabelled(cell.inputs())))


# kind, family, task, settings
Variant = tuple[str, str, str, dict]
PREFIX, PROMPT, NETWORK = "PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"
SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 8}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}
VARIANTS: dict[str, Variant] = {
    "lm_head beside lora": ("LoraConfig", "llama", "CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
    "embeddings beside lora": ("LoraConfig", "gpt2", "CAUSAL_LM", {"modules_to_save": ["wte", "ln_f"]}),
    "pooler and head beside lora": ("LoraConfig", "bert", "SEQ_CLS", {"modules_to_save": ["pooler"]}),
    "pooler and head beside adalora": ("AdaLoraConfig", "bert", "SEQ_CLS", {**SCHEDULE, "modules_to_save": ["pooler"]}),
    "lm_head beside a prefix": (PREFIX, "llama", "CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
    "pooler and head beside a prefix": (PREFIX, "bert", "SEQ_CLS", {"modules_to_save": ["pooler"]}),
    "a norm beside a prompt": (PROMPT, "gpt2", "CAUSAL_LM", {"modules_to_save": ["ln_f"]}),
    "pooler and head beside P-tuning": (NETWORK, "bert", "SEQ_CLS", {"modules_to_save": ["pooler"]}),
    "a head of two layers": (PREFIX, "roberta", "SEQ_CLS", {}),
    "dora": ("LoraConfig", "llama", "CAUSAL_LM", {"use_dora": True, "target_modules": "all-linear"}),
    "dora on Conv1D": ("LoraConfig", "gpt2", "CAUSAL_LM", {"use_dora": True, "use_rslora": True}),
    "dora on a classifier": ("LoraConfig", "bert", "SEQ_CLS", {"use_dora": True}),
    "rslora": ("LoraConfig", "t5", "SEQ_2_SEQ_LM", {"use_rslora": True, "r": 6}),
    "patterns": ("LoraConfig", "llama", "CAUSAL_LM")
    + ({"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"v_proj": 3}},),
    "lora_bias": ("LoraConfig", "bart", "SEQ_2_SEQ_LM", {"lora_bias": True}),
    "all biases": ("LoraConfig", "bart", "SEQ_2_SEQ_LM", {"bias": "all"}),
    "biases of targets": ("LoraConfig", "bert", "QUESTION_ANS", {"bias": "lora_only"}),
    "a targeted embedding": ("LoraConfig", "gpt2", "CAUSAL_LM", {"target_modules": ["wte", "c_attn"]}),
    "a projected prefix": (PREFIX, "llama", "CAUSAL_LM", {"prefix_projection": True, "encoder_hidden_size": 10}),
    "a projected prefix of a decoder": (PREFIX, "t5", "SEQ_2_SEQ_LM", {"prefix_projection": True}),
    "a projected prefix of a classifier": (PREFIX, "bert", "TOKEN_CLS", {"prefix_projection": True}),
    "a prefix of zeros": (PREFIX, "bart", "SEQ_2_SEQ_LM", {"init_weights": "zero"}),
    "an MLP": (NETWORK, "gpt2", "CAUSAL_LM", {"encoder_hidden_size": 12}),
    "an MLP before an encoder": (NETWORK, "bart", "SEQ_2_SEQ_LM", {"encoder_hidden_size": 12}),
    "an LSTM": (NETWORK, "llama", "CAUSAL_LM", LSTM),
    "an LSTM before an encoder": (NETWORK, "t5", "SEQ_2_SEQ_LM", LSTM),
    "tokens of the vocabulary": (PROMPT, "t5", "SEQ_2_SEQ_LM", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "one layer of gated prompts": ("AdaptionPromptConfig", "mistral", "CAUSAL_LM")
    + ({"adapter_len": 5, "adapter_layers": 1},),
}


def variant_pair(variant: Variant, dtype=torch.float32, **options):
    """(peft's model, ours, a function that builds their base)."""
    kind, family, task, settings = variant
    build = functools.partial(tiny, family, task, dtype)
    length = {"num_virtual_tokens": 5} if kind in (PREFIX, PROMPT, NETWORK) else {}
    models = pair_of(build, {"task_type": task, **length, **settings}, kind, **options)
    for key, parameter in models[0].named_parameters():
        if ".ranknum." in key:  # see tests/adalora_pair.py
            parameter.requires_grad_(False)
    randomise(*models)
    return *models, build


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name, tmp_path):
    assert_both_ways(*variant_pair(VARIANTS[name]), batch(VARIANTS[name][2]), tmp_path)
    same_bytes(tmp_path / "hf", tmp_path / "ours")


BF16 = (
    *("pooler and head beside lora", "dora", "lora_bias", "pooler and head beside adalora"),
    *("lm_head beside a prefix", "a projected prefix of a decoder", "an LSTM", "a norm beside a prompt"),
    "one layer of gated prompts",
)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", BF16)
def test_on_a_bf16_base(name, wide, tmp_path):
    """No value and no dtype is lost: what either library loads is what was there, and computes the same bits."""
    options = {"autocast_adapter_dtype": wide}
    hf, mine, build = variant_pair(VARIANTS[name], torch.bfloat16, **options)
    inputs = unlabelled(batch(VARIANTS[name][2]))
    for directory, model in (("hf", hf), ("ours", mine)):
        quietly(model.save_pretrained, tmp_path / directory)
    same_bytes(tmp_path / "hf", tmp_path / "ours")
    by_us, by_peft = here(build, tmp_path / "hf", **options), there(build, tmp_path / "ours", **options)
    found, expected = by_base_name(by_us), by_base_name(by_peft)
    assert found.keys() == expected.keys()
    for key, parameter in expected.items():
        assert found[key].dtype == parameter.dtype and torch.equal(found[key], parameter), key
    if not projects(mine):
        assert torch.equal(read(by_us, inputs), read(mine, inputs))
        assert torch.equal(read(by_peft, inputs), read(hf, inputs))
    by_us.save_pretrained(tmp_path / "again")
    quietly(by_peft.save_pretrained, tmp_path / "again by peft")
    same_bytes(tmp_path / "hf", tmp_path / "again", tmp_path / "again by peft")


# AdaLoRA behind its schedule.

PRUNING = {"total_step": 10, "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2, "lora_alpha": 12}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "task", "free"),
    [("llama", "CAUSAL_LM", "o_proj"), ("bert", "SEQ_CLS", "dense"), ("t5", "SEQ_2_SEQ_LM", "lm_head")],
)
def test_pruned_ranks(family, task, free, tmp_path):
    """`free`: what AdaLoRA has no part in, by default."""
    models = adalora_pair.pair(family, task, **PRUNING)
    for model in models:
        adalora_pair.train(model, adalora_pair.adam(model), range(1, 11), batch(task))
        assert 0 < sum(adalora_pair.ranks(model).values()) < 6 * len(adalora_pair.ranks(model))
    build = functools.partial(tiny, family, task)
    assert_both_ways(*(model.eval() for model in models), build, batch(task), tmp_path, exact=False)
    for directory in ("hf", "ours"):
        beside = fastpeft.patch(build(), fastpeft.LoraConfig(r=2, target_modules=[free]))
        quietly(beside.load_adapter, tmp_path / directory, adapter_name="b")
        beside.set_adapter("b")
        expected = read(here(build, tmp_path / directory), unlabelled(batch(task)))
        assert torch.equal(read(beside.eval(), unlabelled(batch(task))), expected)
        fastpeft.save_adapter(beside, tmp_path / "beside", adapter_name="b")
        same_bytes(tmp_path / directory, tmp_path / "beside" / "b")
        configs = [
            json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in (directory, "beside/b")
        ]
        assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"] != {}


# Names.


def named(library, cell: Cell, name: str, more: tuple[str, ...] = ()) -> torch.nn.Module:
    """A model with adapters of these names, which differ, the first of them active."""
    import peft

    torch.manual_seed(11)
    which = peft if library.name == "peft" else fastpeft
    options = {} if library.name == "peft" else {"hf_quirks": True}
    wrap = which.get_peft_model if library.name == "peft" else which.patch
    model = quietly(wrap, cell.base(), cell.config(which), adapter_name=name, **options)
    for other in more:
        quietly(model.add_adapter, other, cell.config(which))
    for each in (*more, name):
        model.set_adapter(each)
        randomise(model, seed=ord(each[0]))
    return model.eval()


NAMED = [Cell("llama", "CAUSAL_LM", method) for method in METHODS]
NAMED += [Cell("bert", "SEQ_CLS", method) for method in METHODS if method != "adapter"]


@pytest.mark.parametrize("cell", NAMED, ids=str)
def test_an_adapter_of_another_name(cell, tmp_path):
    inputs = unlabelled(cell.inputs())
    hf, mine = named(peft_s(), cell, "style"), named(ours(), cell, "style")
    for directory, model in (("hf", hf), ("ours", mine)):
        quietly(model.save_pretrained, tmp_path / directory)
        assert not (tmp_path / directory / WEIGHTS).exists()
    same_bytes(tmp_path / "hf" / "style", tmp_path / "ours" / "style")
    for name in ("style", "default", "other"):
        loaded = here(cell.base, tmp_path / "hf" / "style", adapter_name=name)
        close(read(loaded, inputs), read(hf, inputs))
        theirs = there(cell.base, tmp_path / "ours" / "style", adapter_name=name)
        close(read(theirs, inputs), read(mine, inputs))
        loaded.save_pretrained(tmp_path / name)
        same_bytes(tmp_path / "hf" / "style", tmp_path / name / ("" if name == "default" else name))


@pytest.mark.parametrize("cell", [cell for cell in NAMED if cell.method != "adalora"], ids=str)
def test_several_adapters_in_one_save(cell, tmp_path):
    """Of one method, as peft has it; one of them is the "default"."""
    inputs = unlabelled(cell.inputs())
    models = [named(library, cell, "default", ("b", "c")) for library in (peft_s(), ours())]
    expected = {}
    for which, model in zip(("hf", "ours"), models, strict=True):
        quietly(model.save_pretrained, tmp_path / which)
        for name in ("default", "b", "c"):
            model.set_adapter(name)
            expected[which, name] = read(model, inputs)
    for which, load in (("ours", there), ("hf", here)):
        loaded = load(cell.base, tmp_path / which)
        for name in ("b", "c"):
            quietly(loaded.load_adapter, tmp_path / which / name, adapter_name=name)
        for name in ("default", "b", "c"):
            loaded.set_adapter(name)
            close(read(loaded.eval(), inputs), expected[which, name])
        quietly(loaded.save_pretrained, tmp_path / "again" / which)
        for name in ("", "b", "c"):
            same_bytes(tmp_path / which / name, tmp_path / "again" / which / name)
    assert not torch.equal(expected["hf", "b"], expected["hf", "c"])


# Beside another adapter, and as peft does only where the adapter is peft's.


def padded_before(inputs: dict) -> dict:
    """With two tokens of padding in front, and segments: what peft does in its own way."""
    length = inputs["input_ids"].shape[1]
    text = {k: v for k, v in inputs.items() if v.ndim == 2 and v.shape[1] == length}
    out = {key: torch.nn.functional.pad(value, (2, 0)) for key, value in text.items()}
    if "token_type_ids" in inputs:
        out["token_type_ids"] = (torch.arange(length + 2) > 6).long().expand(len(inputs["input_ids"]), -1)
    return out


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell("llama", "CAUSAL_LM", method) for method in METHODS),
        *(Cell("bert", "QUESTION_ANS", method) for method in METHODS if method != "adapter"),
        *(Cell("t5", "SEQ_2_SEQ_LM", method) for method in METHODS if method != "adapter"),
    ],
    ids=str,
)
def test_beside_an_adapter_of_ours(cell, tmp_path):
    inputs = unlabelled(cell.inputs())
    if cell.family == "bert":
        inputs["token_type_ids"] = inputs["input_ids"]
    if cell.family != "t5":
        inputs = padded_before(inputs)
    hf = quietly(made, peft_s(), cell)
    quietly(hf.save_pretrained, tmp_path / "hf")
    base = cell.base()
    before = snapshot(base)
    first = {"adalora": "adalora"}.get(cell.method, "lora")  # of one kind in a module
    model = quietly(fastpeft.patch, base, Cell(cell.family, cell.task, first).config(fastpeft), adapter_name="a").eval()
    randomise(model)
    expected = read(model, inputs)
    quietly(model.load_adapter, tmp_path / "hf", adapter_name="b")
    assert model._fastpeft.quirky == {"b"} and torch.equal(read(model, inputs), expected)
    model.set_adapter("b")
    close(read(model.eval(), inputs), read(hf, inputs))
    quietly(fastpeft.load_adapter, model, tmp_path / "hf", adapter_name="c", hf_quirks=False)
    assert model._fastpeft.quirky == {"b"}
    with fastpeft.use_adapter(model, "c"):
        pair = [read(each, inputs) for each in (model, hf)]
    if cell.task == "QUESTION_ANS":  # of which peft has logits of virtual tokens too
        pair[1] = pair[1][..., -pair[0].shape[-1] :]
    differs = not torch.allclose(*pair, atol=1e-3)
    padded = cell.method in ("prompt", "p-tuning") and cell.family == "llama"
    assert differs == (padded or cell.task == "QUESTION_ANS")
    quietly(model.save_pretrained, tmp_path / "all")
    same_bytes(tmp_path / "hf", tmp_path / "all" / "b", tmp_path / "all" / "c")
    sides = {name: json.loads((tmp_path / "all" / name / "fastpeft.json").read_text()) for name in "abc"}
    assert {name: side["hf_quirks"] for name, side in sides.items()} == {"a": False, "b": True, "c": False}
    model.set_adapter("a")
    assert torch.equal(read(model.eval(), inputs), expected)
    again = here(cell.base, tmp_path / "all" / "a", adapter_name="a")
    for name in "bc":
        quietly(again.load_adapter, tmp_path / "all" / name, adapter_name=name)
    assert again._fastpeft.quirky == {"b"}
    again.set_adapter("b")
    close(read(again.eval(), inputs), read(hf, inputs))
    fastpeft.unpatch(model)
    assert differences(before, snapshot(base)) == []


def test_a_refused_adapter_leaves_the_others(tmp_path):
    """One that does not fit is refused as a whole, and what was there computes what it computed."""
    quietly(named(peft_s(), Cell("llama", "CAUSAL_LM", "prefix"), "default").save_pretrained, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert set(tensors) == {"prompt_embeddings"}
    model = fastpeft.patch(tiny("gpt2"), fastpeft.LoraConfig(r=2))
    before, expected = snapshot(model), result(model, batch()).detach()
    with pytest.raises(fastpeft.FastpeftError, match="made for another model"):
        model.load_adapter(tmp_path, adapter_name="b")
    assert differences(before, snapshot(model)) == []
    assert torch.equal(result(model, batch()), expected)
