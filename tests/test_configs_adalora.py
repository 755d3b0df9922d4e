"""AdaLoRA's configuration: peft's fields and files, every value that cannot be honoured refused in words."""

import copy
import dataclasses
import json
import math

import peft
import pytest
import torch

import fastpeft
from fastpeft.configs import AdaLoraConfig, LoraConfig, PeftConfig, as_config, get_peft_config
from fastpeft.default_targets import ADALORA_TARGETS, DEFAULT_TARGETS
from fastpeft.errors import ConfigError
from tests.models import tiny
from tests.test_configs import UNHONOURED, WEIRD, by_name, default

PATTERN = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True]}

# Configurations that peft and fastpeft both accept, as keyword arguments beside total_step.
VALID = [
    {},
    {"target_r": 4, "init_r": 6, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.5, "beta2": 0.9},
    {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "orth_reg_weight": 0, "lora_alpha": -1},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "lora_dropout": 0.1, "bias": "all"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["layers"]},
    {"init_r": 3, "rank_pattern": PATTERN, "inference_mode": True},
    {"init_lora_weights": False, "modules_to_save": ["norm"], "fan_in_fan_out": True},
    # without effect in peft, refused only for a new adapter
    {"use_rslora": True, "lora_bias": True, "alpha_pattern": {"q_proj": 3}},
    {"init_lora_weights": "gaussian"},
]


def test_fields_are_those_of_peft_in_order_and_default():
    ours, theirs = by_name(AdaLoraConfig), by_name(peft.AdaLoraConfig)
    assert list(ours) == list(theirs)
    for name, field in theirs.items():
        if name != "runtime_config":
            assert default(ours[name]) == default(field) and type(default(ours[name])) is type(default(field)), name
    assert AdaLoraConfig(total_step=10).to_dict() == peft.AdaLoraConfig(total_step=10).to_dict()
    assert fastpeft.AdaLoraConfig is fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.ADALORA] is AdaLoraConfig


@pytest.mark.parametrize("kwargs", VALID, ids=range(len(VALID)))
def test_files_and_objects_are_interchangeable_with_peft(kwargs, tmp_path):
    kwargs = {"total_step": 40, **kwargs}
    theirs, ours = peft.AdaLoraConfig(**copy.deepcopy(kwargs)), AdaLoraConfig(**kwargs)
    theirs.save_pretrained(tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    for read in (as_config(theirs), as_config(raw), as_config(ours), get_peft_config(raw), PeftConfig.from_dict(raw)):
        assert read == ours and type(read) is AdaLoraConfig
    assert ours.to_dict() == theirs.to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours.to_file_dict(), indent=2, sort_keys=True))
    read, meant = peft.AdaLoraConfig.from_pretrained(str(tmp_path)), peft.AdaLoraConfig(**kwargs, peft_version="0.21.2")
    meant.inference_mode = True
    for name in by_name(peft.AdaLoraConfig):
        assert getattr(read, name) == getattr(meant, name), name


def test_the_ranks_that_peft_has_in_memory_are_those_of_its_file():
    theirs = peft.AdaLoraConfig(total_step=10, init_r=3)
    theirs.rank_pattern = {f"{key}.default": kept for key, kept in PATTERN.items()}
    config = as_config(theirs)
    assert config.rank_pattern == PATTERN
    assert config.kept_of("model.layers.0.self_attn.q_proj") == [True, False, True]
    assert config.kept_of("model.layers.1.self_attn.q_proj") is None


REFUSED = [
    ({"total_step": None}, "total_step=None: AdaLoRA needs the number of training steps"),
    ({"total_step": 0}, "total_step=0: AdaLoRA needs"),
    ({"total_step": -3}, "total_step=-3: AdaLoRA needs"),
    ({"total_step": 10.0}, "total_step=10.0: AdaLoRA needs"),
    ({"total_step": 10, "tinit": 10}, "tinit=10: total_step=10 and tfinal=0 leave no steps after it"),
    ({"total_step": 10, "tinit": 4, "tfinal": 6}, "tinit=4: total_step=10 and tfinal=6 leave no steps"),
    ({"tinit": -1}, "tinit=-1: must be an int from 0 up"),
    ({"tfinal": 1.5}, "tfinal=1.5: must be an int from 0 up"),
    ({"deltaT": 0}, "deltaT=0: must be an int of at least 1"),
    ({"init_r": 0}, "init_r=0: must be an int of at least 1"),
    ({"init_r": 2**17}, "init_r=131072: the most is 65536"),
    ({"target_r": -1}, "target_r=-1: must be an int from 0 up"),
    ({"target_r": True}, "target_r=True: must be"),
    ({"beta1": 0}, "beta1=0: must be a number above 0 and below 1"),
    ({"beta1": 1.0}, "beta1=1.0: must be"),
    ({"beta2": math.nan}, "beta2=nan: must be"),
    ({"beta2": "0.85"}, "beta2='0.85': must be"),
    ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1: must be a finite number from 0 up"),
    ({"orth_reg_weight": math.inf}, "orth_reg_weight=inf: must be"),
    ({"use_dora": True}, "use_dora=True: AdaLoRA does not go with DoRA"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0: must be a number from 0 to below 1"),
    ({"peft_type": "LORA"}, "peft_type='LORA': a AdaLoraConfig is for ADALORA"),
    ({"rank_pattern": [1]}, "rank_pattern=[1]: must be a dict from layers to lists of booleans, or None"),
    ({"rank_pattern": {"q_proj": [True] * 12}}, "a key of rank_pattern='q_proj': must be the path of a layer with"),
    ({"rank_pattern": {"q.lora_E": [1] * 12}}, "rank_pattern['q.lora_E']=[1, 1, 1"),
    ({"rank_pattern": {"q.lora_E": 3}}, "rank_pattern['q.lora_E']=3: must be a list of booleans"),
    ({"rank_pattern": {"q.lora_E": [True]}}, "rank_pattern['q.lora_E']=[True]: has 1 entries and init_r is 12"),
    ({"layers_pattern": "layers"}, "layers_pattern='layers': has no effect without layers_to_transform"),
]


@pytest.mark.parametrize(("kwargs", "words"), REFUSED, ids=range(len(REFUSED)))
def test_a_value_that_cannot_be_honoured_is_refused_in_words(kwargs, words):
    with pytest.raises(ConfigError) as refusal:
        AdaLoraConfig(**{"total_step": 10, **kwargs})
    assert words in str(refusal.value)


IDLE = {
    "r": (16, "AdaLoRA's ranks are init_r and target_r"),
    "use_rslora": (True, "AdaLoRA scales by lora_alpha / init_r"),
    "lora_bias": (True, "AdaLoRA has no bias of its own"),
    "alpha_pattern": ({"q_proj": 2}, "AdaLoRA has one lora_alpha"),
    "init_lora_weights": ("gaussian", "AdaLoRA has True and False"),
    "rank_pattern": ({"q.lora_E": [True] * 12}, "the allocator writes it in training"),
}


@pytest.mark.parametrize("name", IDLE)
def test_what_peft_ignores_is_loaded_but_not_made(name, tmp_path):
    value, words = IDLE[name]
    config = AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, **{name: value})
    with pytest.raises(ConfigError, match=f"{name}=.*{words}"):
        fastpeft.patch(tiny(), config)
    if name == "rank_pattern":
        return
    theirs = peft.get_peft_model(tiny(), peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, **{name: value}))
    theirs.save_pretrained(tmp_path)
    loaded = fastpeft.load_adapter(tiny(), tmp_path)
    assert getattr(loaded.peft_config["default"], name) == value


def test_ranks_of_layers_that_are_not_there_are_refused():
    values = {"total_step": 10, "init_r": 3, "rank_pattern": PATTERN, "target_modules": ["v_proj"]}
    from fastpeft.tuners.adalora_injection import plan

    with pytest.raises(ConfigError, match="rank_pattern has 'model.layers.0.self_attn.q_proj.lora_E', and target_mod"):
        plan(tiny(), AdaLoraConfig(**values))


def test_a_file_for_inference_needs_no_schedule():
    config = as_config({"peft_type": "ADALORA", "inference_mode": True})
    assert config.total_step is None
    with pytest.raises(ConfigError, match="total_step=None"):
        as_config({"peft_type": "ADALORA"})


@pytest.mark.parametrize("name", UNHONOURED)
def test_a_field_that_is_not_honoured_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"{name}=.*: fastpeft does not honour this field"):
        AdaLoraConfig(total_step=10, **{name: UNHONOURED[name]})


@pytest.mark.filterwarnings("ignore:target_r=")
def test_no_value_of_any_field_raises_anything_else():
    ours = set(by_name(AdaLoraConfig)) - set(by_name(LoraConfig)) | {"rank_pattern", "use_dora", "r"}
    for name in ours:
        for value in [*WEIRD, {"q.lora_E": WEIRD}, {"q.lora_E": [torch.ones(2)]}]:
            try:
                AdaLoraConfig(**{"total_step": 10, name: value}).validate_new()
            except ConfigError as error:
                assert len(str(error)) < 1000


def test_nothing_of_the_callers_is_kept_or_changed():
    raw = {"peft_type": "ADALORA", "total_step": 9, "init_r": 3, "rank_pattern": copy.deepcopy(PATTERN)}
    made = as_config(raw)
    next(iter(made.rank_pattern.values())).append(True)
    made.rank_pattern["x"] = []
    assert raw["rank_pattern"] == PATTERN
    config = AdaLoraConfig(task_type="CAUSAL_LM", total_step=9)
    fastpeft.patch(tiny(), config)
    assert dataclasses.asdict(config) == dataclasses.asdict(AdaLoraConfig(task_type="CAUSAL_LM", total_step=9))


def test_the_table_of_defaults_is_that_of_peft_and_what_it_lacks():
    from peft.utils import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as THEIRS

    ours = {family: names if isinstance(names, str) else list(names) for family, names in ADALORA_TARGETS.items()}
    assert {family: ours.pop(family) for family in ("mistral", "mixtral", "phi3")} == {
        **{family: list(DEFAULT_TARGETS[family]) for family in ("mistral", "mixtral")},
        "phi3": ["qkv_proj"],
    }
    assert ours == THEIRS


def test_a_family_without_a_default_gets_one_by_structure():
    from tests.target_parity import build_other

    model = build_other("falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ours = fastpeft.patch(model, AdaLoraConfig(total_step=10))
    assert ours.peft_config["default"].target_modules == {"query_key_value"}
