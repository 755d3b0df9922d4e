"""What a configuration leaves open: the default targets of a model, "all-linear", and the heads that a task trains."""

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn
from transformers import AutoConfig

from fastpeft.configs import LoraConfig
from fastpeft.default_targets import DEFAULT_TARGETS
from fastpeft.errors import TargetError
from fastpeft.targets import resolve_targets
from tests.target_parity import FAMILIES, adapted_by_peft, assert_same, build, build_other, resolved


def distilbert(head):
    return build_other("distilbert", head, dim=32, hidden_dim=64, n_layers=2, n_heads=4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("phi3", "mixtral")])
def test_the_default_is_that_of_peft(family):
    assert assert_same(lambda: build(family))
    assert resolved(build(family))[2].target_modules == adapted_by_peft(build(family))[2].target_modules


def test_the_table_of_defaults_is_that_of_peft():
    ours = {family: names if isinstance(names, str) else list(names) for family, names in DEFAULT_TARGETS.items()}
    assert ours == PEFT_DEFAULTS


WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: build("phi3"), {"qkv_proj"}),
        (lambda: build("mixtral"), {"q_proj", "v_proj"}),
        (lambda: build_other("modernbert", "AutoModelForMaskedLM", **WIDTHS), {"Wqkv"}),
        (lambda: distilbert("AutoModelForMaskedLM"), {"q_lin", "v_lin"}),
        (lambda: build_other("olmo2", **WIDTHS), {"q_proj", "v_proj"}),
    ],
    ids=["phi3", "mixtral", "modernbert", "distilbert", "olmo2"],
)
def test_a_default_by_structure_where_peft_has_none(make, names):
    with pytest.raises(ValueError, match="target_modules"):
        adapted_by_peft(make())
    ours, _, config = resolved(make())
    assert config.target_modules == names and len(ours) == 2 * len(names)
    assert ours == adapted_by_peft(make(), target_modules=sorted(names))[0]


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)


@pytest.mark.parametrize("model_type", ["llama", "gemma4"])
def test_a_default_whose_names_are_not_in_the_model_gives_way_to_the_structure(model_type):
    model = nn.ModuleDict({"a": FusedAttention(), "qkv": nn.Linear(4, 4)})
    model.config = AutoConfig.for_model(model_type)
    ours, _, config = resolved(model)
    assert list(ours) == ["a.qkv"] and config.target_modules == {"a.qkv"}  # a bare qkv would name the other one too


def test_a_default_that_is_a_pattern_is_filled_in_as_names():
    # peft keeps the string, and then ignores layers_to_transform, which its own check would have refused with it.
    def make():
        layer = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
        tower = nn.ModuleDict({"layers": nn.ModuleList([layer, nn.ModuleDict({"v_proj": nn.Linear(4, 4)})])})
        model = nn.ModuleDict({"model": nn.ModuleDict({"language_model": tower, "vision": nn.Linear(4, 4)})})
        model.config = AutoConfig.for_model("gemma4")
        return model

    assert len(assert_same(make)) == 2
    ours, _, config = resolved(make(), layers_to_transform=[1])
    assert list(ours) == ["model.language_model.layers.1.v_proj"] and config.target_modules == {"q_proj", "v_proj"}


def test_no_default_says_what_there_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="no default for Sequential .model type None.; set target_modules.*'0', '2'"):
        resolve_targets(model, LoraConfig())
    assert list(resolved(model, target_modules=["2"])[0]) == ["2"]
    with pytest.raises(TargetError, match="'all-linear': ReLU .* has no linear layer besides its heads"):
        resolve_targets(nn.ReLU(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(TargetError, match="expected a torch.nn.Module to adapt, not str"):
        resolve_targets("llama", LoraConfig())


# Heads, and what else is trained whole.

ALSO = {"llama": "norm", "gpt2": "ln_f", "bert": "pooler", "roberta": "LayerNorm"}


@pytest.mark.parametrize("family", ALSO)
@pytest.mark.parametrize("spec", [{}, {"target_modules": "all-linear"}, {"modules_to_save": True}])
def test_a_classification_head_is_trained_whole(family, spec):
    kwargs = {"task_type": "SEQ_CLS", **spec}
    if "modules_to_save" in spec:
        kwargs["modules_to_save"] = [ALSO[family]]
    assert_same(lambda: build(family, "SEQ_CLS"), **kwargs)
    _, saved, ours = resolved(build(family, "SEQ_CLS"), **kwargs)
    _, _, theirs = adapted_by_peft(build(family, "SEQ_CLS"), **kwargs)
    assert ours.modules_to_save == theirs.modules_to_save and saved[-1] in ("score", "classifier")


@pytest.mark.parametrize(
    ("make", "task", "trained"),
    [
        (lambda: build("bert", "TOKEN_CLS"), "TOKEN_CLS", ["classifier"]),
        (lambda: build("bert", "QUESTION_ANS"), "QUESTION_ANS", ["qa_outputs"]),
        (lambda: distilbert("AutoModelForSequenceClassification"), "SEQ_CLS", ["pre_classifier", "classifier"]),
    ],
    ids=["tokens", "answers", "two heads"],
)
def test_all_linear_leaves_every_trained_head_out(make, task, trained):
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        adapted_by_peft(make(), task_type=task, target_modules="all-linear")
    ours, saved, config = resolved(make(), task_type=task, target_modules="all-linear")
    assert saved == trained and not ours.keys() & {*trained} and len(ours) == 12
    theirs, also_saved, _ = adapted_by_peft(make(), **config.to_file_dict())
    assert theirs == ours and also_saved == saved


def test_a_head_that_peft_does_not_know_is_trained_too():
    def make():
        return build("bart", "SEQ_CLS")

    assert adapted_by_peft(make(), task_type="SEQ_CLS")[1] == []
    ours, saved, config = resolved(make(), task_type="SEQ_CLS")
    assert saved == ["classification_head"]
    assert config.modules_to_save == ["classifier", "score", "classification_head"]
    theirs, also_saved, _ = adapted_by_peft(make(), **config.to_file_dict())
    assert theirs == ours and also_saved == saved
    # In a file that peft wrote the head is not, and its configuration says so.
    assert resolved(make(), task_type="SEQ_CLS", modules_to_save=["classifier", "score"])[1] == []


def test_modules_trained_whole_are_matched_as_peft_matches_them():
    # The end of the path, with or without a dot before it.
    assert assert_same(lambda: build("llama"), target_modules=["q_proj"], modules_to_save=["down_proj", "head"])
    assert assert_same(lambda: build("llama"), target_modules=["q_proj", "v_proj"], modules_to_save=["v_proj", "0.mlp"])
    assert assert_same(lambda: build("llama"), target_modules=r".*_proj", modules_to_save=["self_attn"])
    # The inside of one is trained with it.
    ours, saved, _ = resolved(build("llama"), target_modules=["q_proj"], modules_to_save=["mlp", "gate_proj"])
    assert saved == ["model.layers.0.mlp", "model.layers.1.mlp"] and len(ours) == 2

    def shared():
        one = nn.Linear(4, 4)
        return nn.ModuleDict(
            {"a": nn.ModuleDict({"head": one}), "b": nn.ModuleDict({"head": one}), "q": nn.Linear(4, 4)}
        )

    # A module that two paths reach is replaced under both.
    assert_same(shared, target_modules=["q"], modules_to_save=["head"])
    assert resolved(shared(), target_modules=["q"], modules_to_save=["head"])[1] == ["a.head", "b.head"]


def test_modules_to_save_that_are_not_there():
    with pytest.raises(TargetError, match="modules_to_save='lm_haed' is not in the model; did you mean 'lm_head'"):
        resolve_targets(build("llama"), LoraConfig(modules_to_save=["lm_haed"]))
    assert resolved(build("llama"), task_type="TOKEN_CLS")[1] == []  # what the task adds need not be there
    with pytest.raises(TargetError, match="modules_to_save matches model.layers, a ModuleList; name the modules in it"):
        resolve_targets(build("llama"), LoraConfig(modules_to_save=["layers"]))
