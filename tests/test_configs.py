"""Configurations: peft's fields and files, every value that cannot be honoured refused in words, nothing shared."""

import copy
import dataclasses
import json
import math

import numpy
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastpeft.configs import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftType,
    TaskType,
    as_config,
    get_peft_config,
)
from fastpeft.errors import ConfigError

HONOURED = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "runtime_config", "target_parameters"),
}

# Configurations that peft and fastpeft both accept, as keyword arguments.
VALID = [
    {},
    {"task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["v_proj", "q_proj"]},
    {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.0\..*", "use_rslora": True},
    {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head", "o_proj"], "use_dora": True},
    {"target_modules": {"q_proj"}, "layers_to_transform": [0, 1], "layers_pattern": ["layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"rank_pattern": {"q_proj": 4, r"^model\.layers\.0\..*": 2}, "alpha_pattern": {"v_proj": 0.5}},
    {"task_type": "SEQ_CLS", "modules_to_save": ["norm"], "bias": "lora_only", "lora_alpha": 0.25},
    {"init_lora_weights": "gaussian", "bias": "all", "base_model_name_or_path": "a/b", "revision": "main"},
    {"init_lora_weights": "pissa_niter_16", "fan_in_fan_out": True, "inference_mode": True},
    {"init_lora_weights": False, "lora_bias": True},
    {"lora_alpha": -1, "lora_dropout": 0},
    {"lora_alpha": 0, "init_lora_weights": "olora"},
]


def by_name(config):
    return {each.name: each for each in dataclasses.fields(config)}


def default(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def test_fields_are_those_of_peft_in_order_and_default():
    ours, theirs = by_name(LoraConfig), by_name(peft.LoraConfig)
    assert list(ours) == list(theirs)
    for name, field in theirs.items():
        if name != "runtime_config":
            assert default(ours[name]) == default(field) and type(default(ours[name])) is type(default(field)), name
    assert dataclasses.asdict(default(ours["runtime_config"])) == dataclasses.asdict(default(theirs["runtime_config"]))
    assert LoraConfig().to_dict() == peft.LoraConfig().to_dict()


def test_the_enums_are_those_of_peft():
    assert {t.name: t.value for t in TaskType} == {t.name: t.value for t in peft.TaskType}
    assert all(peft.PeftType[t.name].value == t.value for t in PeftType) and len(PeftType) == 6
    # Members of the two enums are interchangeable as values and as keys.
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.LORA] is LoraConfig
    assert LoraConfig(task_type=peft.TaskType.SEQ_CLS).task_type is TaskType.SEQ_CLS


@pytest.mark.parametrize("kwargs", VALID, ids=range(len(VALID)))
def test_peft_reads_what_is_written(kwargs, tmp_path):
    written = LoraConfig(**kwargs).to_file_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True))
    read, meant = peft.LoraConfig.from_pretrained(str(tmp_path)), peft.LoraConfig(**kwargs, peft_version="0.21.2")
    meant.inference_mode = True
    for name in by_name(peft.LoraConfig):
        assert getattr(read, name) == getattr(meant, name), name


@pytest.mark.parametrize("kwargs", VALID, ids=range(len(VALID)))
def test_what_peft_holds_and_writes_is_read(kwargs, tmp_path):
    theirs = peft.LoraConfig(**kwargs)
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = LoraConfig(**kwargs)
    for read in (as_config(theirs), as_config(raw), as_config(ours), get_peft_config(raw), LoraConfig.from_dict(raw)):
        assert read == ours and type(read) is LoraConfig
    assert ours.to_dict() == theirs.to_dict()


def test_the_file_has_the_keys_of_peft(tmp_path):
    kwargs = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=4, **kwargs))
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "q_proj"]).to_file_dict()
    assert sorted(theirs.pop("target_modules")) == ours.pop("target_modules") == ["q_proj", "v_proj"]
    assert ours == theirs


def test_the_file_is_plain_json_and_leaves_the_configuration_alone():
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules={"b", "a"}, rank_pattern={"a": 3})
    before = copy.deepcopy(config)
    written = config.to_file_dict(auto_mapping={"base_model_class": "M", "parent_library": "l"})
    assert (
        written["task_type"] == "CAUSAL_LM" and type(written["task_type"]) is str and written["inference_mode"] is True
    )
    assert written["target_modules"] == ["a", "b"] and written["auto_mapping"]["base_model_class"] == "M"
    assert "runtime_config" not in written and json.loads(json.dumps(written)) == written
    written["rank_pattern"]["a"] = 9
    assert config == before and config.inference_mode is False


REFUSED = [
    ({"r": 0}, "r=0: the rank must be an int of at least 1"),
    ({"r": -4}, "r=-4: the rank"),
    ({"r": "8"}, "r='8': the rank"),
    ({"r": 8.0}, "r=8.0: the rank"),
    ({"r": True}, "r=True: the rank"),
    ({"lora_alpha": math.nan}, "lora_alpha=nan: must be a finite int or float"),
    ({"lora_alpha": -math.inf}, "lora_alpha=-inf: must be"),
    ({"lora_alpha": 10**400}, "must be a finite"),
    ({"lora_alpha": "8"}, "lora_alpha='8': must be"),
    ({"lora_alpha": True}, "lora_alpha=True: must be"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0: must be a number from 0 to below 1"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1: must be"),
    ({"lora_dropout": math.nan}, "lora_dropout=nan: must be"),
    ({"lora_dropout": "0.1"}, "lora_dropout='0.1': must be"),
    ({"bias": "some"}, "bias='some': must be 'none', 'all' or 'lora_only'"),
    ({"bias": True}, "bias=True: must be"),
    ({"use_dora": 1}, "use_dora=1: must be True or False"),
    ({"use_rslora": None}, "use_rslora=None: must be True or False"),
    ({"fan_in_fan_out": "no"}, "fan_in_fan_out='no': must be"),
    ({"inference_mode": 0}, "inference_mode=0: must be"),
    ({"init_lora_weights": None}, "init_lora_weights=None: fastpeft has True, False, 'gaussian'"),
    ({"init_lora_weights": 1}, "init_lora_weights=1: fastpeft has"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda': fastpeft has"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq': fastpeft has"),
    ({"init_lora_weights": "eva", "lora_ga_config": {"a": 1}}, "lora_ga_config={'a': 1}: fastpeft does not honour"),
    ({"init_lora_weights": "eva", "eva_config": [1]}, "eva_config=[1]: fastpeft does not honour"),
    ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights='pissa_niter_x': fastpeft has"),
    ({"init_lora_weights": "pissa_niter_99999999"}, "fastpeft has"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0: must be a rank"),
    ({"rank_pattern": {"q_proj": [True]}}, "rank_pattern['q_proj']=[True]: must be a rank"),
    ({"rank_pattern": [("q_proj", 4)]}, "rank_pattern=[('q_proj', 4)]: must be a dict"),
    ({"rank_pattern": {"(": 4}}, "a key of rank_pattern='(': not a regular expression"),
    ({"rank_pattern": {3: 4}}, "a key of rank_pattern=3: must be a string"),
    ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern['q_proj']=inf: must be a finite int or float"),
    ({"target_modules": 3}, "target_modules=3: must be a list of module names, a string"),
    ({"target_modules": ["q_proj", 3]}, "target_modules=['q_proj', 3]: must be a list"),
    ({"target_modules": [["q_proj"]]}, "target_modules=[['q_proj']]: must be a list"),
    ({"target_modules": ["q_proj", ""]}, "must be a list of module names"),
    ({"target_modules": "(q|v_proj"}, "target_modules='(q|v_proj': not a regular expression (missing )"),
    ({"target_modules": "a" * 3000}, "the pattern has 3000 characters, more than 2000"),
    ({"exclude_modules": b"lm_head"}, "exclude_modules=b'lm_head': must be a list"),
    ({"exclude_modules": "*"}, "exclude_modules='*': not a regular expression"),
    ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': must be a list of module names or None, as in ['lm_"),
    ({"modules_to_save": ["lm_head", ""]}, "modules_to_save=['lm_head', '']: must be a list of module names"),
    ({"layers_to_transform": "0"}, "layers_to_transform='0': must be a layer's number, a list of them"),
    ({"layers_to_transform": [True]}, "layers_to_transform=[True]: must be"),
    ({"layers_to_transform": [0, -1]}, "layers_to_transform=[0, -1]: must be"),
    ({"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern=3: must be the name of the list of layers"),
    ({"layers_pattern": "layers"}, "layers_pattern='layers': has no effect without layers_to_transform"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform=[0]: needs a list of target_m"),
    ({"target_modules": "x", "layers_pattern": "h"}, "layers_pattern='h': needs a list of target_modules"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias=True: does not go with use_dora=True"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True: needs init_lora_weights True or False"),
    ({"task_type": "causal_lm"}, "task_type='causal_lm': choose one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM"),
    ({"peft_type": "ADALORA"}, "peft_type='ADALORA': a LoraConfig is for LORA"),
    ({"revision": 3}, "revision=3: must be a string or None"),
    ({"base_model_name_or_path": b"x"}, "base_model_name_or_path=b'x': must be a string or None"),
    ({"auto_mapping": ["x"]}, "auto_mapping=['x']: must be a dict with string keys or None"),
    ({"runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)}, "does not honour it"),
    (
        {"target_parameters": "experts.down_proj"},
        "target_parameters='experts.down_proj': must be a list of names of par",
    ),
    ({"target_parameters": ["x", ""]}, "must be a list of names of parameters or None"),
    ({"target_parameters": ["x"], "lora_dropout": 0.1}, "lora_dropout=0.1: target_parameters needs 0.0; set it, or"),
    ({"target_parameters": ["x"], "use_dora": True}, "use_dora=True: target_parameters needs False"),
    ({"target_parameters": ["x"], "lora_bias": True}, "lora_bias=True: target_parameters needs False"),
    ({"target_parameters": ["x"], "fan_in_fan_out": True}, "fan_in_fan_out=True: target_parameters needs False"),
    ({"target_parameters": ["x"], "init_lora_weights": "pissa"}, "init_lora_weights='pissa': target_parameters needs"),
]


@pytest.mark.parametrize(("kwargs", "words"), REFUSED, ids=range(len(REFUSED)))
def test_a_value_that_cannot_be_honoured_is_refused_in_words(kwargs, words):
    with pytest.raises(ConfigError) as refusal:
        LoraConfig(**kwargs)
    assert words in str(refusal.value)
    # What is assigned later is seen by the next check.
    config = LoraConfig()
    for name, value in kwargs.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError):
        config.validate()


# For each field that is there for peft's sake alone: a value that peft would act upon.
UNHONOURED = {
    "megatron_config": {"a": 1},
    "megatron_core": "other.core",
    "trainable_token_indices": [0, 1],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArBr"},
    "velora_config": {"num_groups": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 32,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 1]],
    "use_bdlora": {"a": 1},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1.0},
    "ensure_weight_tying": True,
}


def test_every_field_of_peft_is_honoured_or_refused():
    assert HONOURED | UNHONOURED.keys() == by_name(peft.LoraConfig).keys()


@pytest.mark.parametrize("name", UNHONOURED)
def test_a_field_that_is_not_honoured_is_refused_by_name(name):
    value = UNHONOURED[name]
    for make in (lambda: LoraConfig(**{name: value}), lambda: as_config({"peft_type": "LORA", name: value})):
        with pytest.raises(
            ConfigError, match=rf"{name}=.*: fastpeft does not honour this field; leave it at its default"
        ):
            make()
    # Empty in any way, as older and newer files write it, is the default.
    assert as_config({"peft_type": "LORA", name: None}) is not None


WEIRD = [
    *(math.nan, math.inf, -1, 0, 1, 2**70, 10**400, 1.5, True, False, None, "", "x", "(", b"x", object(), LoraConfig),
    *([], [1], ["x"], [None], [[["x"]]], (), ("x",), set(), {1, "x"}, {}, {"x": 1}, {1: "x"}, {"x": {"y": []}}),
    *(
        numpy.int64(3),
        numpy.float64(0.5),
        numpy.ones(2),
        torch.ones(2),
        torch.float16,
        json.loads("[" * 900 + "]" * 900),
        "\ud800",
        "x" * 10**6,
    ),
]


def test_no_value_of_any_field_raises_anything_else():
    accepted = refused = 0
    for name in by_name(LoraConfig):
        for value in WEIRD:
            for make in (
                lambda v, n=name: LoraConfig(**{n: v}),
                lambda v, n=name: as_config({"peft_type": "LORA", n: v}),
            ):
                try:
                    make(value)
                    accepted += 1
                except ConfigError as error:
                    refused += 1
                    assert len(str(error)) < 1000
    assert accepted > 300 and refused > 1500


def test_nothing_of_the_callers_is_kept_or_changed():
    raw = {"peft_type": "LORA", "target_modules": ["q"], "rank_pattern": {"q": 2}, "auto_mapping": {"a": "b"}}
    raw |= {"modules_to_save": ["h"], "layers_to_transform": [1], "layers_pattern": ["l"], "exclude_modules": ["x"]}
    for source in (raw, LoraConfig(**raw), peft.LoraConfig(**raw)):
        before = copy.deepcopy(source)
        made = as_config(source)
        made.target_modules.add("k")
        made.exclude_modules.clear()
        made.rank_pattern["k"] = made.alpha_pattern["k"] = 1
        made.auto_mapping["c"] = "d"
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern"):
            getattr(made, name).append("k")
        made.runtime_config.ephemeral_gpu_offload = True
        assert source == before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "peft_type is missing from the configuration; fastpeft supports LORA"),
        ({"peft_type": None, "r": 8}, "peft_type is missing"),
        ({"peft_type": "EVIL"}, "peft_type='EVIL': unknown method; fastpeft supports LORA"),
        ({"peft_type": ["LORA"]}, "peft_type=['LORA']: unknown method"),
        ({"peft_type": "IA3"}, "peft_type='IA3': unknown method; fastpeft supports LORA"),
        (peft.IA3Config(), "unknown method"),
        (PeftConfig(), "peft_type is missing"),
        ({"peft_type": "LORA", "rr": 8}, "rr=8: LoraConfig has no such field"),
        ({"peft_type": "LORA", 3: 8}, "3=8: LoraConfig has no such field"),
        ([("peft_type", "LORA")], "expected a configuration such as LoraConfig(r=8), a peft configuration or the dict"),
        (None, "not NoneType"),
        (torch.nn.Linear(1, 1), "not Linear"),
    ],
)
def test_what_is_no_configuration_of_ours_is_said(source, words):
    with pytest.raises(ConfigError) as refusal:
        as_config(source)
    assert words in str(refusal.value)


def test_unknown_fields_are_ignored_only_when_empty():
    assert as_config({"peft_type": "LORA", "from_the_future": False, "another": {}}) == LoraConfig()


def test_what_peft_does_not_write_into_a_dict_is_seen_too():
    offloading = peft.LoraConfig(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    with pytest.raises(ConfigError, match="runtime_config=LoraRuntimeConfig.ephemeral_gpu_offload=True.: fastpeft"):
        as_config(offloading)
    custom = peft.LoraConfig()
    custom._register_custom_module({torch.nn.LSTM: torch.nn.Linear})
    with pytest.raises(ConfigError, match="_custom_modules=.*LSTM.*do not register any"):
        as_config(custom)


def test_from_dict_holds_the_class_to_its_method():
    assert LoraConfig.from_dict({"r": 4}) == LoraConfig(r=4)
    assert PeftConfig.from_dict({"peft_type": "LORA", "r": 4}) == LoraConfig(r=4)
    with pytest.raises(ConfigError, match="a configuration must be a dict of fields, not list"):
        LoraConfig.from_dict([1])


def test_where_an_adapter_comes_from_is_kept():
    origin = {
        "peft_version": "0.11.1",
        "revision": "abc",
        "base_model_name_or_path": "org/model",
        "auto_mapping": {"a": "b"},
    }
    written = as_config({"peft_type": "LORA", "inference_mode": True, **origin}).to_file_dict()
    assert {name: written[name] for name in origin} == origin
