"""The configurations of prefix tuning, prompt tuning, P-tuning and LLaMA-Adapter: peft's fields and files, our options
kept apart, refusals in words."""

import copy
import dataclasses
import json
import math

import numpy
import peft
import pytest
import torch

import fastpeft
from fastpeft.configs import (
    AdaptionPromptConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    as_config,
    get_peft_config,
)
from fastpeft.errors import ConfigError
from tests.models import tiny
from tests.peft_pair import quietly

PAIRS = [
    (PrefixTuningConfig, peft.PrefixTuningConfig),
    (PromptTuningConfig, peft.PromptTuningConfig),
    (PromptEncoderConfig, peft.PromptEncoderConfig),
    (AdaptionPromptConfig, peft.AdaptionPromptConfig),
]
OWN = {
    PrefixTuningConfig: ["prefix_window", "encoder_prefix", "cross_prefix", "legacy_bloom_layout"],
    PromptTuningConfig: ["virtual_logits"],
    PromptEncoderConfig: ["virtual_logits"],
    AdaptionPromptConfig: ["modules_to_save"],
}
NEEDED = {
    PrefixTuningConfig: {"num_virtual_tokens": 7},
    PromptTuningConfig: {"num_virtual_tokens": 7},
    PromptEncoderConfig: {"num_virtual_tokens": 7},
    AdaptionPromptConfig: {"adapter_len": 7, "adapter_layers": 2},
}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good or bad", "tokenizer_name_or_path": "a/b"}

# Configurations that peft and fastpeft both accept.
VALID = [
    *((PrefixTuningConfig, {"num_virtual_tokens": 7, **more}) for more in (
        {},
        *({"task_type": task.value} for task in TaskType),
        {"task_type": "CAUSAL_LM", "token_dim": 32, "num_attention_heads": 4, "num_layers": 2},
        {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2, "encoder_hidden_size": 64},
        {"num_transformer_submodules": 1, "prefix_projection": True, "encoder_hidden_size": 5},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], "inference_mode": True},
        {"init_weights": "zero", "base_model_name_or_path": "a/b", "revision": "main"},
        {"num_virtual_tokens": 1, "auto_mapping": {"base_model_class": "M", "parent_library": "l"}},
        {"num_virtual_tokens": 100_000},
    )),
    *((PromptTuningConfig, {"num_virtual_tokens": 7, **more}) for more in (
        {},
        *({"task_type": task.value} for task in TaskType),
        *({"prompt_tuning_init": init} for init in ("RANDOM", "SAMPLE_VOCAB")),
        {**TEXT, "task_type": "CAUSAL_LM", "inference_mode": True},
        {**TEXT, "tokenizer_kwargs": {"use_fast": False, "trust_remote_code": True}},
        {"prompt_tuning_init_text": "of no use here", "tokenizer_name_or_path": "a/b"},
        {"task_type": "CAUSAL_LM", "token_dim": 32, "num_attention_heads": 4, "num_layers": 2},
        {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], "inference_mode": True},
    )),
    *((PromptEncoderConfig, {"num_virtual_tokens": 7, **more}) for more in (
        {},
        *({"task_type": task.value} for task in TaskType),
        *({"encoder_reparameterization_type": kind} for kind in ("MLP", "LSTM")),
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3, "encoder_dropout": 0.25},
        {"encoder_hidden_size": 48, "token_dim": 32, "num_attention_heads": 4, "num_layers": 2},
        {"encoder_dropout": 0, "num_transformer_submodules": 1, "modules_to_save": ["score"]},
    )),
    *((AdaptionPromptConfig, {"adapter_len": 7, "adapter_layers": 2, **more}) for more in (
        {},
        *({"task_type": task.value} for task in TaskType),
        {"target_modules": "self_attn", "task_type": "CAUSAL_LM"},
        {"target_modules": "attn", "adapter_len": 1, "adapter_layers": 1, "inference_mode": True},
        {"base_model_name_or_path": "a/b", "revision": "main", "auto_mapping": {"a": "b"}},
    )),
]  # fmt: skip
THEIRS = dict(PAIRS)


def by_name(config):
    return {each.name: each for each in dataclasses.fields(config)}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_fields_are_those_of_peft_and_then_our_own(ours, theirs):
    assert list(by_name(ours)) == [*by_name(theirs), *OWN[ours]]
    for name, field in by_name(theirs).items():
        assert by_name(ours)[name].default == field.default, name
    needed = NEEDED[ours]
    assert ours(**needed).to_dict() == theirs(**needed).to_dict()
    assert list(ours(**needed).to_dict()) == list(theirs(**needed).to_dict())
    # By position, too.
    assert ours("CAUSAL_LM", **needed).task_type == theirs("CAUSAL_LM", **needed).task_type


def test_the_methods_are_registered_and_public():
    names = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "ADAPTION_PROMPT")
    for name, (ours, theirs) in zip(names, PAIRS, strict=True):
        assert fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[name]] is ours is getattr(fastpeft, theirs.__name__)
        assert ours(**NEEDED[ours]).peft_type is PeftType[name]


@pytest.mark.parametrize(("ours", "kwargs"), VALID, ids=range(len(VALID)))
def test_the_file_is_that_of_peft(ours, kwargs, tmp_path):
    theirs = THEIRS[ours](**copy.deepcopy(kwargs))
    theirs.inference_mode = True  # as in save_pretrained of a model
    theirs.save_pretrained(tmp_path)
    data = (tmp_path / "adapter_config.json").read_text()
    assert json.dumps(ours(**kwargs).to_file_dict(), indent=2, sort_keys=True) == data


@pytest.mark.parametrize(("ours", "kwargs"), VALID, ids=range(len(VALID)))
def test_each_reads_the_other(ours, kwargs, tmp_path):
    theirs = THEIRS[ours](**copy.deepcopy(kwargs))
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    meant = ours(**kwargs)
    for read in (as_config(theirs), as_config(raw), as_config(meant), get_peft_config(raw), ours.from_dict(raw)):
        assert read == meant and type(read) is ours
    assert meant.to_dict() == theirs.to_dict() and meant.side_values() == {}
    assert PeftConfig.from_dict(meant.to_dict()) == meant
    again = THEIRS[ours].from_pretrained(str(tmp_path))
    assert again.to_dict() == {**theirs.to_dict(), "task_type": kwargs.get("task_type")}


def test_a_file_of_an_older_peft_is_read():
    old = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 30}
    assert as_config(old) == PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)
    # peft writes the heads of a task twice.
    twice = {**old, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score", "classifier", "score"]}
    assert as_config(twice).modules_to_save == ["classifier", "score"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_peft_writes_for_a_model_is_read(family, tmp_path):
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
    quietly(quietly(peft.get_peft_model, tiny(family, task), config).save_pretrained, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    written = as_config(raw).to_file_dict()
    if family == "bert":
        assert raw.pop("modules_to_save") == written.pop("modules_to_save") * 2 == ["classifier", "score"] * 2
    assert written == raw


SET = [
    (PrefixTuningConfig, {"prefix_window": "pin", "cross_prefix": True}),
    (PrefixTuningConfig, {"encoder_prefix": True, "token_dim": 8}),
    (PromptTuningConfig, {"virtual_logits": True, **TEXT}),
    (PromptEncoderConfig, {"virtual_logits": True, "encoder_reparameterization_type": "LSTM"}),
    (AdaptionPromptConfig, {"modules_to_save": ["score"]}),
    (AdaptionPromptConfig, {"modules_to_save": []}),
]


@pytest.mark.parametrize(("ours", "kwargs"), SET, ids=range(len(SET)))
def test_our_own_options_go_to_the_side_file_and_come_back(ours, kwargs, tmp_path):
    config = ours(**NEEDED[ours], **kwargs)
    written, side = json.loads(json.dumps(config.to_file_dict())), json.loads(json.dumps(config.side_values()))
    own = {name: value for name, value in kwargs.items() if name in OWN[ours]}
    assert side == own and not own.keys() & written.keys()
    # peft sees nothing that it does not know ...
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    assert THEIRS[ours].from_pretrained(str(tmp_path)).to_dict() == {**written, "peft_type": config.peft_type}
    # ... and we get back what was set, in a new object.
    config.inference_mode = True
    assert as_config(written).with_side_values(side) == config and as_config(config) == config
    assert as_config(config.to_dict()) == config and own.items() <= config.to_dict().items()


def test_the_old_layout_of_bloom_is_said_for_loading_and_never_written():
    config = as_config({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "legacy_bloom_layout": True})
    assert config.legacy_bloom_layout and config.side_values() == {}
    assert "legacy_bloom_layout" not in config.to_file_dict() and as_config(config) == config


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"prefix_window": "wide"}, "prefix_window='wide': must be 'slide' (as peft) or 'pin'"),
        (
            {"num_virtual_tokens": 10**6},
            "num_virtual_tokens=1000000: PrefixTuningConfig keeps no such option in a side",
        ),
        ({"legacy_bloom_layout": True}, "keeps no such option"),
        ({3: 4}, "3=4: PrefixTuningConfig keeps no such option"),
        (["pin"], "must be a dict of fields, not list"),
        (None, "must be a dict of fields, not NoneType"),
    ],
)
def test_a_side_file_sets_our_own_options_only(side, words):
    config = PrefixTuningConfig(num_virtual_tokens=3)
    with pytest.raises(ConfigError) as refusal:
        config.with_side_values(side)
    assert words in str(refusal.value) and config == PrefixTuningConfig(num_virtual_tokens=3)


PREFIX_REFUSED = [
    (
        {"num_virtual_tokens": None},
        "num_virtual_tokens=None: the number of virtual tokens must be an int of at least 1",
    ),
    ({"num_virtual_tokens": 0}, "num_virtual_tokens=0: the number of virtual tokens must be"),
    ({"num_virtual_tokens": -1}, "num_virtual_tokens=-1: the number"),
    ({"num_virtual_tokens": True}, "num_virtual_tokens=True: the number"),
    ({"num_virtual_tokens": 7.0}, "num_virtual_tokens=7.0: the number"),
    ({"num_virtual_tokens": "7"}, "num_virtual_tokens='7': the number"),
    ({"num_virtual_tokens": 10**7}, "num_virtual_tokens=10000000: the number of virtual tokens can be at most 1048576"),
    (
        {"token_dim": 0},
        "token_dim=0: the width of a virtual token in one layer's keys must be an int of at least 1, or N",
    ),
    ({"token_dim": 2**40}, "token_dim=1099511627776: the width of a virtual token in one layer's keys can be at most"),
    ({"token_dim": 10, "num_attention_heads": 4}, "token_dim=10: must be a multiple of num_attention_heads=4"),
    ({"num_layers": -2}, "num_layers=-2: the number of layers must be an int of at least 1, or None"),
    ({"num_attention_heads": False}, "num_attention_heads=False: the number of heads"),
    ({"num_transformer_submodules": 0}, "num_transformer_submodules=0: must be 1, 2 (sequence-to-sequence) or None"),
    ({"num_transformer_submodules": 3}, "num_transformer_submodules=3: must be 1, 2"),
    ({"num_transformer_submodules": True}, "num_transformer_submodules=True: must be 1, 2"),
    ({"encoder_hidden_size": 0}, "encoder_hidden_size=0: the width of the network that prefix_projection=True makes"),
    ({"encoder_hidden_size": "128"}, "encoder_hidden_size='128': the width"),
    ({"prefix_projection": 1}, "prefix_projection=1: must be True or False"),
    ({"prefix_projection": None}, "prefix_projection=None: must be"),
    ({"init_weights": "zeros"}, "init_weights='zeros': must be None (random) or 'zero'"),
    ({"init_weights": 0}, "init_weights=0: must be None"),
    (
        {"modules_to_save": "score"},
        "modules_to_save='score': must be a list of module names or None, as in ['lm_head']",
    ),
    ({"modules_to_save": ["score", ""]}, "modules_to_save=['score', '']: must be a list"),
    ({"prefix_window": "both"}, "prefix_window='both': must be 'slide' (as peft) or 'pin'"),
    ({"prefix_window": None}, "prefix_window=None: must be"),
    ({"encoder_prefix": "yes"}, "encoder_prefix='yes': must be True or False"),
    ({"cross_prefix": 0}, "cross_prefix=0: must be"),
    ({"legacy_bloom_layout": None}, "legacy_bloom_layout=None: must be"),
    ({"task_type": "CAUSAL"}, "task_type='CAUSAL': choose one of SEQ_CLS"),
    ({"peft_type": "LORA"}, "peft_type='LORA': a PrefixTuningConfig is for PREFIX_TUNING; leave it out"),
]
# What the methods with a table have in common is refused of all alike.
COMMON_REFUSED = [
    case
    for case in PREFIX_REFUSED
    if {"num_virtual_tokens", "num_layers", "num_transformer_submodules", "modules_to_save", "task_type"} & set(case[0])
]
PROMPT_REFUSED = [
    *COMMON_REFUSED,
    ({"prompt_tuning_init": "ZERO"}, "prompt_tuning_init='ZERO': must be 'RANDOM', 'SAMPLE_VOCAB' or 'TEXT'"),
    ({"prompt_tuning_init": None}, "prompt_tuning_init=None: must be"),
    ({"prompt_tuning_init": "random"}, "prompt_tuning_init='random': must be"),
    ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text=None: prompt_tuning_init='TEXT' needs it"),
    ({**TEXT, "tokenizer_name_or_path": None}, "tokenizer_name_or_path=None: prompt_tuning_init='TEXT' needs it"),
    ({**TEXT, "prompt_tuning_init_text": ""}, "prompt_tuning_init_text='': must be a string, or None"),
    ({**TEXT, "prompt_tuning_init_text": ["a"]}, "prompt_tuning_init_text=['a']: must be a string, or None"),
    ({**TEXT, "tokenizer_name_or_path": 3}, "tokenizer_name_or_path=3: must be a string, or None"),
    ({**TEXT, "tokenizer_kwargs": ["use_fast"]}, "tokenizer_kwargs=['use_fast']: must be a dict with string keys"),
    ({**TEXT, "tokenizer_kwargs": {1: 2}}, "tokenizer_kwargs={1: 2}: must be a dict"),
    ({"tokenizer_kwargs": {"use_fast": True}}, "is for prompt_tuning_init='TEXT' alone; leave it out"),
    ({"virtual_logits": None}, "virtual_logits=None: must be True or False"),
    ({"peft_type": "P_TUNING"}, "peft_type='P_TUNING': a PromptTuningConfig is for PROMPT_TUNING; leave it out"),
]
P_TUNING_REFUSED = [
    *COMMON_REFUSED,
    ({"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type='GRU': must be 'MLP' or 'LSTM'"),
    ({"encoder_reparameterization_type": None}, "encoder_reparameterization_type=None: must be"),
    ({"encoder_hidden_size": 0}, "encoder_hidden_size=0: the width of the network must be an int of at least 1"),
    ({"encoder_hidden_size": 2**40}, "encoder_hidden_size=1099511627776: the width of the network can be at most"),
    ({"encoder_num_layers": 0}, "encoder_num_layers=0: the number of the LSTM's layers must be"),
    ({"encoder_num_layers": None}, "encoder_num_layers=None: the number"),
    ({"encoder_num_layers": 2.0}, "encoder_num_layers=2.0: the number"),
    ({"encoder_dropout": 1}, "encoder_dropout=1: must be a number from 0 to below 1"),
    ({"encoder_dropout": -0.1}, "encoder_dropout=-0.1: must be"),
    ({"encoder_dropout": math.nan}, "encoder_dropout=nan: must be"),
    ({"encoder_dropout": "0.1"}, "encoder_dropout='0.1': must be"),
    ({"virtual_logits": 1}, "virtual_logits=1: must be True or False"),
    ({"peft_type": "PROMPT_TUNING"}, "peft_type='PROMPT_TUNING': a PromptEncoderConfig is for P_TUNING; leave it out"),
]
ADAPTION_REFUSED = [
    ({"adapter_len": None}, "adapter_len=None: the number of virtual tokens in a layer must be an int of at least 1"),
    ({"adapter_len": 0}, "adapter_len=0: the number"),
    ({"adapter_len": True}, "adapter_len=True: the number"),
    ({"adapter_len": 2**21}, "adapter_len=2097152: the number of virtual tokens in a layer can be at most 1048576"),
    ({"adapter_layers": None}, "adapter_layers=None: the number of adapted layers (from the top) must be"),
    ({"adapter_layers": -1}, "adapter_layers=-1: the number"),
    ({"adapter_layers": [1]}, "adapter_layers=[1]: the number"),
    (
        {"target_modules": ["self_attn"]},
        "target_modules=['self_attn']: must be the name of the attention modules, as in",
    ),
    ({"target_modules": ""}, "target_modules='': must be the name"),
    ({"target_modules": "layers.0.self_attn"}, "target_modules='layers.0.self_attn': must be the name"),
    ({"modules_to_save": 3}, "modules_to_save=3: must be a list of module names or None"),
    ({"inference_mode": "no"}, "inference_mode='no': must be True or False"),
]


@pytest.mark.parametrize(
    ("ours", "kwargs", "words"),
    [
        *((PrefixTuningConfig, *case) for case in PREFIX_REFUSED),
        *((PromptTuningConfig, *case) for case in PROMPT_REFUSED),
        *((PromptEncoderConfig, *case) for case in P_TUNING_REFUSED),
        *((AdaptionPromptConfig, *case) for case in ADAPTION_REFUSED),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_in_words(ours, kwargs, words):
    with pytest.raises(ConfigError) as refusal:
        ours(**{**NEEDED[ours], **kwargs})
    assert words in str(refusal.value)
    config = ours(**NEEDED[ours])
    for name, value in kwargs.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError):
        config.validate()


@pytest.mark.parametrize("ours", OWN)
def test_what_is_needed_is_asked_for(ours):
    with pytest.raises(ConfigError, match=f"{next(iter(NEEDED[ours]))}=None: the number of virtual tokens"):
        ours()
    with pytest.raises(ConfigError, match="has no such field"):
        ours.from_dict({**NEEDED[ours], "number_of_tokens": 7})


WEIRD = [
    *(math.nan, math.inf, -1, 0, 1, 2**70, 10**400, 1.5, True, False, None, "", "x", "(", b"x", object(), PeftConfig),
    *([], [1], ["x"], [None], [[["x"]]], (), ("x",), set(), {1, "x"}, {}, {"x": 1}, {1: "x"}, {"x": {"y": []}}),
    *(numpy.int64(3), numpy.ones(2), torch.ones(2), json.loads("[" * 900 + "]" * 900), "\ud800", "x" * 10**6),
]


@pytest.mark.filterwarnings("ignore:encoder_num_layers")
@pytest.mark.parametrize("ours", OWN)
def test_no_value_of_any_field_raises_anything_else(ours):
    needed = NEEDED[ours]
    raw = {"peft_type": ours.method.value, **needed}
    accepted = refused = 0
    for name in by_name(ours):
        for value in WEIRD:
            for make in (
                lambda v, n=name: ours(**{**needed, n: v}).to_file_dict(),
                lambda v, n=name: as_config({**raw, n: v}).to_dict(),
                lambda v, n=name: ours(**needed).with_side_values({n: v}).side_values(),
            ):
                try:
                    make(value)
                    accepted += 1
                except ConfigError as error:
                    refused += 1
                    assert len(str(error)) < 1000
    assert accepted > 50 and refused > 700


@pytest.mark.parametrize(("layers", "dropout"), [(3, 0.0), (2, 0.1)])
def test_what_is_the_lstms_is_said_of_the_mlp(layers, dropout):
    given = {"num_virtual_tokens": 7, "encoder_num_layers": layers, "encoder_dropout": dropout}
    with pytest.warns(UserWarning, match=rf"encoder_num_layers={layers} and encoder_dropout={dropout} are the LSTM's"):
        PromptEncoderConfig(**given)
    PromptEncoderConfig(encoder_reparameterization_type="LSTM", **given)


def test_a_kind_may_be_pefts_own_enum():
    theirs = peft.PromptTuningInit.SAMPLE_VOCAB
    assert PromptTuningConfig(num_virtual_tokens=7, prompt_tuning_init=theirs).prompt_tuning_init == "SAMPLE_VOCAB"
    theirs = peft.PromptEncoderReparameterizationType.LSTM
    config = PromptEncoderConfig(num_virtual_tokens=7, encoder_reparameterization_type=theirs)
    assert config.encoder_reparameterization_type == "LSTM"


def test_nothing_of_the_callers_is_kept_or_changed():
    raw = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "modules_to_save": ["h"], "auto_mapping": {"a": "b"}}
    for source in (raw, PrefixTuningConfig(**raw), peft.PrefixTuningConfig(**raw)):
        before = copy.deepcopy(source)
        made = as_config(source)
        made.modules_to_save.append("k")
        made.auto_mapping["c"] = "d"
        made.token_dim = 3
        made.to_file_dict()["modules_to_save"].append("k")
        assert source == before
