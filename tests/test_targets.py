"""Which modules are adapted: what peft adapts, on models of every family, and in words why nothing was."""

import copy
import functools
import re
import warnings

import pytest
from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.errors import ConfigError, TargetError
from fastpeft.names import shortest_ends
from fastpeft.targets import resolve_targets
from tests.target_parity import FAMILIES, adapted_by_peft, assert_same, build, build_other, resolved


def two_linears(family):
    """Two kinds of linear layers that are in every layer of the model, and the name of its list of layers."""
    model = build(family)
    paths = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and re.search(r"\.1\.", n)]
    first, last = paths[0], paths[-1]
    return first.rpartition(".")[2], last.rpartition(".")[2], re.match(r".*?\.?([^.]*)\.1\.", first)[1], first


# Each takes two leaf names, the name of the list of layers and a whole path.
SPECS = {
    "list": lambda a, b, layers, path: {"target_modules": [a, b]},
    "path": lambda a, b, layers, path: {"target_modules": [path]},
    "partial path": lambda a, b, layers, path: {"target_modules": [".".join(path.split(".")[-2:]), "absent"]},
    "regex": lambda a, b, layers, path: {"target_modules": rf".*\.({a}|{b})"},
    "regex of one layer": lambda a, b, layers, path: {"target_modules": rf"(?!.*\.0\.).*{a}$"},
    "all-linear": lambda a, b, layers, path: {"target_modules": "all-linear", "r": 4},
    "All-Linear but some": lambda a, b, layers, path: {"target_modules": "All-Linear", "exclude_modules": [a]},
    "excluded by regex": lambda a, b, layers, path: {"target_modules": [a, b], "exclude_modules": r".*\.0\..*"},
    "one layer": lambda a, b, layers, path: {
        "target_modules": [a, b],
        "layers_to_transform": 1,
        "layers_pattern": layers,
    },
    "layers": lambda a, b, layers, path: {
        **{"target_modules": [a, path], "layers_to_transform": [0]},
        **{"layers_pattern": ["nothing", layers]},
    },
    "all layers": lambda a, b, layers, path: {"target_modules": [a], "layers_to_transform": []},
    "patterns": lambda a, b, layers, path: {
        **{"target_modules": [a, b], "r": 8, "lora_alpha": 16},
        **{"rank_pattern": {rf".*\.0\..*{b}": 2, b: 3}, "alpha_pattern": {f"^{path}": 0.5, "q|v": 1, a: 7}},
    },
    "trained whole": lambda a, b, layers, path: {"target_modules": [a, b], "modules_to_save": [b]},
}


# Of a string peft keeps only the last parts of the names, and adds the experts, where a model has fused experts.
CASES = [(f, s) for f in FAMILIES for s in SPECS if f != "mixtral" or "linear" not in s.lower() and "regex of" not in s]


@pytest.mark.parametrize(("family", "spec"), CASES)
def test_the_modules_ranks_and_alphas_are_those_of_peft(family, spec):
    assert assert_same(lambda: build(family), **SPECS[spec](*two_linears(family)))


def test_embeddings_and_convolutions():
    make = functools.partial(build, "llama")
    assert list(assert_same(make, target_modules=["embed_tokens", "lm_head"])) == ["model.embed_tokens", "lm_head"]
    assert len(assert_same(lambda: build("gpt2"), target_modules=["wte", "c_fc"])) == 3
    kinds = {"c1": nn.Conv1d(4, 4, 3), "c2": nn.Conv2d(4, 4, 3), "c3": nn.Conv3d(4, 4, 3), "e": nn.Embedding(7, 4)}
    names = list(kinds)
    theirs, _, _ = adapted_by_peft(nn.ModuleDict(copy.deepcopy(kinds)), target_modules=names)
    assert resolved(nn.ModuleDict(kinds), target_modules=names)[0] == theirs and len(theirs) == 4


def test_the_first_number_in_a_path_is_the_layers():
    def make():
        block = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(2)])})
        return nn.ModuleDict({"m": nn.ModuleDict({"layers": nn.ModuleList([block, copy.deepcopy(block)])})})

    ours = assert_same(make, target_modules=["w1"], layers_to_transform=[1])
    assert list(ours) == ["m.layers.1.experts.0.w1", "m.layers.1.experts.1.w1"]
    assert assert_same(make, target_modules=["w1"], layers_to_transform=1, layers_pattern="m.layers") == ours
    ours = assert_same(make, target_modules=["w1"], layers_to_transform=1, layers_pattern="experts")
    assert list(ours) == ["m.layers.0.experts.1.w1", "m.layers.1.experts.1.w1"]


# Models that are adapted already.


@pytest.mark.parametrize("target", ["all-linear", r".*(_proj|default)", ["v_proj", "default", "lora_A"], None])
def test_a_second_adapter_goes_to_the_same_modules(target):
    first, _, _ = resolved(build("llama"), target_modules=target)
    model = build("llama")
    for name in first:
        for child in ("lora_A", "lora_B", "lora_dropout"):
            model.get_submodule(name).add_module(child, nn.ModuleDict({"default": nn.Linear(2, 2)}))
    model.lm_head.modules_to_save = nn.ModuleDict({"default": nn.Linear(32, 97)})
    assert resolved(model, target_modules=target)[0] == first and len(first) > 1
    assert resolved(model, target_modules=target, modules_to_save=["lm_head"])[1] == ["lm_head"]


def test_the_model_and_the_configuration_stay_as_they_were():
    model, config = build("llama"), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    before, modules = copy.deepcopy(config), dict(model.named_modules())
    resolution = resolve_targets(model, config)
    assert config == before and dict(model.named_modules()) == modules
    assert resolution.config is not config and resolution.config.target_modules != "all-linear"


# What is not found.

NOT_FOUND = [
    (
        {"target_modules": ["q_prj"]},
        "target_modules='q_prj' matches no module of LlamaForCausalLM (model type 'llama'); ",
    ),
    ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
    ({"target_modules": ["zzz"]}, "The linear layers are 'down_proj', 'gate_proj', 'k_proj', 'lm_head', 'o_proj'"),
    ({"target_modules": "q_proj"}, "A string is a regular expression for the whole path: write ['name'] for a name"),
    ({"target_modules": []}, "names nothing; the linear layers are 'down_proj'"),
    ({"target_modules": ""}, "target_modules='' names nothing"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "all 2 modules that target_modules='q_proj' matches",
    ),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "are excluded: 2 by exclude_modules='q_proj', 0 "),
    (
        {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
        "2 because modules_to_save=['self_attn'] trains",
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "the model has no layer 7; its layers are 0 to 1"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
        "layers_pattern='h' finds no numbered layers for layers_to_transform; the model's lists of layers are called "
        "'layers'",
    ),
    (
        {"target_modules": ["embed_tokens"], "layers_to_transform": [0]},
        "but none in layers_to_transform=[0] (layers_pattern=",
    ),
]


@pytest.mark.parametrize(("kwargs", "words"), NOT_FOUND, ids=range(len(NOT_FOUND)))
def test_why_nothing_is_adapted(kwargs, words):
    with pytest.raises(ValueError):
        adapted_by_peft(build("llama"), **kwargs)
    with pytest.raises(TargetError) as refusal:
        resolve_targets(build("llama"), LoraConfig(**kwargs))
    assert words in str(refusal.value)


def test_layers_that_the_model_does_not_have_are_no_silent_omission():
    kwargs = {"target_modules": ["q_proj"], "layers_to_transform": [0, 7, 9]}
    assert len(adapted_by_peft(build("llama"), **kwargs)[0]) == 1
    with pytest.raises(
        TargetError, match=r"layers_to_transform=\[0, 7, 9\]: the model has no layer 7, 9; its layers are 0"
    ):
        resolve_targets(build("llama"), LoraConfig(**kwargs))


def test_a_bare_backbone_needs_the_name_of_its_layers():
    # peft's rule for the first number in a path wants two parts before it, which `h.0.attn.c_attn` has not.
    kwargs = {"target_modules": ["c_attn"], "layers_to_transform": [1]}
    with pytest.raises(TargetError, match="lists of layers are called 'h'"):
        resolve_targets(build("gpt2").transformer, LoraConfig(**kwargs))
    assert list(assert_same(lambda: build("gpt2").transformer, **kwargs, layers_pattern="h")) == ["h.1.attn.c_attn"]


def test_a_class_that_cannot_carry_the_adapter_is_named():
    with pytest.raises(ValueError, match="is not supported"):
        adapted_by_peft(build("llama"), target_modules=["self_attn"])
    with pytest.raises(TargetError) as refusal:
        resolve_targets(build("llama"), LoraConfig(target_modules=["self_attn"]))
    assert (
        "model.layers.0.self_attn is a LlamaAttention, which LoRA does not apply to; it applies to Linear, Embedding"
        in str(refusal.value)
    )


def test_a_pattern_that_would_hang_is_given_up():
    hostile = LoraConfig(target_modules=r"(.|.)*$(?<!\w)")
    with pytest.raises(ConfigError, match="takes more than 0.4 s on the module name 'model"):
        resolve_targets(build("llama"), hostile)


WARNED = [
    (
        {"target_modules": ["q_proj", "v_prjo"]},
        "target_modules has 'v_prjo', which adapts nothing; did you mean 'v_proj'",
    ),
    ({"target_modules": ["q_proj", "query_key_value"]}, "target_modules has 'query_key_value', which adapts nothing"),
    (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        "all that it names is excluded or in other",
    ),
    ({"exclude_modules": ["lmhead"]}, "exclude_modules='lmhead' is not in the model; did you mean 'lm_head'"),
    ({"rank_pattern": {"k_proj": 4}}, "rank_pattern has 'k_proj', which matches no adapted module"),
    ({"alpha_pattern": {"zzz": 4}}, "alpha_pattern has 'zzz', which matches no adapted module"),
]


@pytest.mark.parametrize(("kwargs", "words"), WARNED, ids=range(len(WARNED)))
def test_a_part_without_effect_is_said(kwargs, words):
    with pytest.warns(UserWarning) as said:
        resolution = resolve_targets(build("llama"), LoraConfig(**kwargs))
    (sentence,) = (str(each.message) for each in said)
    assert words in sentence and {t.name for t in resolution.targets} == set(
        adapted_by_peft(build("llama"), **kwargs)[0]
    )


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"target_modules": ["self_attn.q_proj", "q_proj"]}, {"task_type": "SEQ_CLS", "exclude_modules": ["norm"]}],
)
def test_nothing_is_said_without_need(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_targets(build("llama"), LoraConfig(**kwargs)).targets


# Weights that a module's own forward is not in charge of.


def test_fused_experts_are_left_out_with_a_warning():
    with pytest.warns(
        UserWarning, match="leaves out 2 modules whose experts are one fused .*'model.layers.0.mlp.experts'"
    ):
        resolution = resolve_targets(build("mixtral"), LoraConfig(target_modules="all-linear"))
    theirs, _, _ = adapted_by_peft(build("mixtral"), target_modules="all-linear")
    ours = {target.name for target in resolution.targets}
    assert ours == {name for name in theirs if "self_attn" in name} and len(ours) == 8
    with pytest.raises(TargetError, match="target_modules='w1', 'w3' matches no module"):
        resolve_targets(build("mixtral"), LoraConfig(target_modules=["w1", "w3"]))
    one_layer = r".*\.1\..*q_proj"
    assert len(adapted_by_peft(build("mixtral"), target_modules=one_layer)[0]) == 2
    assert list(resolved(build("mixtral"), target_modules=one_layer)[0]) == ["model.layers.1.self_attn.q_proj"]


def mamba():
    return build_other("mamba", hidden_size=32, num_hidden_layers=2, state_size=4)


def test_layers_that_are_never_called_carry_no_adapter():
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        adapted_by_peft(mamba(), target_modules=["out_proj"])
    with pytest.raises(
        TargetError, match="out_proj: mamba reads this weight in a fused kernel without calling the module"
    ):
        resolve_targets(mamba(), LoraConfig(target_modules=["in_proj", "out_proj"]))
    ours, _, _ = resolved(mamba(), target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in ours} == {"in_proj", "x_proj", "dt_proj"}
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.warns(UserWarning, match="0.out_proj belongs to a torch.nn.MultiheadAttention, which never calls it"):
        resolve_targets(model, LoraConfig(target_modules=["out_proj"]))


def test_shortest_ends_name_what_is_meant_and_nothing_else():
    chosen = ["m.0.attn.q", "m.1.attn.q", "m.1.mlp.up", "head"]
    others = ["m.0.mlp.up", "x.q", "m.0.attn", "x.head"]
    ends = shortest_ends(chosen, others)
    assert ends == {"attn.q", "1.mlp.up", "head"}
    named = {n for n in chosen + others if n in ends or any(n.endswith(f".{end}") for end in ends)}
    assert named == {*chosen, "x.head"}  # a path that is the end of another cannot be told apart from it
